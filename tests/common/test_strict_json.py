"""Test reading JSON files from a cache while other processes change it."""

import threading
from pathlib import Path

from qwen_vit.common.strict_json import read_json


def test_a_link_that_another_process_replaces_is_read(tmp_path: Path) -> None:
    """On a disk without locks, huggingface_hub removes a link, and then makes it again."""
    file = tmp_path / "snapshots" / "0" / "config.json"
    file.parent.mkdir(parents=True)
    threading.Timer(0.03, lambda: file.write_text('{"depth": 4}')).start()
    assert read_json(file) == {"depth": 4}
