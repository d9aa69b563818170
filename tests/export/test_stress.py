"""Run a few trials of `tools.checks.soak` with the command in separate processes."""

from pathlib import Path

import pytest

from tests.support import disk_stress, export_stress, shortage_stress


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> export_stress.Exports:
    return export_stress.Exports(tmp_path_factory.mktemp("exports"), 300)


@pytest.mark.slow
def test_kills_lose_and_repeat_no_image(exports: export_stress.Exports) -> None:
    assert export_stress.kills(exports, kills=4)["kills"] == 4


@pytest.mark.slow
def test_interrupts_exit_with_130_and_leave_complete_shards(exports: export_stress.Exports) -> None:
    assert export_stress.interrupts(exports, times=2)["longest_wait_s"] < 5


@pytest.mark.slow
@pytest.mark.skipif(not disk_stress.may_mount(), reason="needs the right to mount")
def test_a_full_disk_exits_with_2_and_the_export_resumes_with_space(
    exports: export_stress.Exports,
) -> None:
    disk_stress.full_disks(exports, disks=1)


@pytest.mark.slow
def test_memory_and_open_files_stay_flat(tmp_path: Path) -> None:
    export_stress.flat_memory(tmp_path, images=1_500, first=500)


@pytest.mark.slow
def test_an_outage_of_the_inputs_changes_no_byte(exports: export_stress.Exports) -> None:
    assert shortage_stress.outages(exports, outages=2, seed=3)["outages"] == 2


@pytest.mark.slow
def test_a_temporary_lack_of_memory_changes_no_byte(tmp_path: Path) -> None:
    assert shortage_stress.memory_edges(tmp_path, runs=2, images=20)["runs"] == 2
