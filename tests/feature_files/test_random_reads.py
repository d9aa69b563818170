"""Measure random reads of a remote export on a separate server."""

from pathlib import Path

from tests.support import store_stress


def test_random_reads_transfer_only_rows_and_headers(tmp_path: Path) -> None:
    """Run a part of `python -m tools.checks.soak remote`."""
    figures = store_stress.random_reads(tmp_path, images=60, chosen=10)
    assert figures["over_percent"] == 0
