"""Run a part of checks.soak, and test that no corrupt file gets its final name."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.hub_fault_injection import (
    Chaos,
    chaos,
    crowd,
    kill_at_random,
    storm,
    wrong_headers,
)
from tests.support.mutated_files import mutated_documents, mutated_weights


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chaos]:
    with chaos(tmp_path_factory.mktemp("chaos")) as ready:
        yield ready


@pytest.mark.slow
def test_a_download_that_is_killed_leaves_nothing_corrupt(running: Chaos) -> None:
    print(kill_at_random(running, 4))


def test_many_processes_at_once_end_with_one_good_file(running: Chaos) -> None:
    print(counted := crowd(running, 4, processes=6))
    assert counted["most_bytes_with_locks"] < 1.1  # one process downloads, the others wait


def test_random_faults_end_in_success_or_in_our_own_error(running: Chaos) -> None:
    print(storm(running, 4))


def test_wrong_bytes_in_a_header_are_found(running: Chaos) -> None:
    print(wrong_headers(running, 8))


def test_mutated_weights_are_refused_by_name(tmp_path: Path) -> None:
    print(mutated_weights(tmp_path, 2_000))


def test_mutated_indexes_and_configs_are_refused_by_name(tmp_path: Path) -> None:
    print(mutated_documents(tmp_path, 200))
