"""Run a part of `python -m tools.checks.soak remote-kills`."""

from pathlib import Path

import pytest

from tests.support import remote_stress


@pytest.mark.slow
def test_killed_nodes_leave_the_bytes_of_one_local_run(tmp_path: Path) -> None:
    figures = remote_stress.kills_of_nodes(tmp_path, images=600, kills=2, first=300, nodes=2)
    assert figures["images_encoded_again"] <= 2 * figures["images_per_shard"]
