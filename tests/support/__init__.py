"""What tests and tools share: fakes, oracles, servers, fault injection, random cases."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # the checkout's top
IMAGES = ROOT / "tests" / "photographs"
