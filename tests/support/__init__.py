"""Provide code for tests and tools: fakes, oracles, servers, fault injection, random cases."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # the checkout's top
IMAGES = ROOT / "tests" / "photographs"


def checkout_first() -> str:
    """Return PYTHONPATH for a child process: this checkout, then the folders of this process."""
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
