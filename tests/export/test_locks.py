"""Test that parts run side by side, and that locks exclude other writers."""

import fcntl
import json
import multiprocessing
import os
import pickle
import signal
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qwen_vit.errors import ExportError
from qwen_vit.export import lock as lock_module
from qwen_vit.export.lock import hold_folder, short_lock
from qwen_vit.export.run import make_manifest
from qwen_vit.feature_files.read import load_features
from tests.support.exports import SMALL, NeverAsked, export, files, make_shard, plan_of, shards
from tests.support.fake_encoder import FakeEncoder

# Parts and locks


def test_all_parts_together_equal_one_export(export_dir: Path) -> None:
    export(out="whole")
    first = export(options=replace(SMALL, part=(1, 2)))
    assert (first.images, first.exported, len(shards())) == (7, 6, 2)
    assert not load_features("out").is_complete
    second = export(options=replace(SMALL, part=(2, 2)))
    assert (second.images, second.exported) == (4, 4)
    assert files() == files("whole")
    assert export(options=replace(SMALL, part=(9, 9))).images == 0


def test_a_worker_makes_a_shard_from_the_plan_alone(export_dir: Path) -> None:
    export(out="whole")
    with plan_of() as plan:
        sent = pickle.loads(pickle.dumps(plan))
        rows = make_shard(FakeEncoder(), sent, 1)
        assert [(row.index, row.id, row.row_begin, row.row_end) for row in rows] == [
            (4, "4.png", 0, 4), (5, "5.png", 4, 8), (6, "6.png", 8, 12), (7, "7.png", 12, 16),
        ]  # fmt: skip
        assert make_shard(NeverAsked(), sent, 1) == rows
        for shard in (2, 0):  # shards may have any order
            make_shard(FakeEncoder(), sent, shard)
        make_manifest(plan)
    assert files() == files("whole")


def test_the_error_of_a_second_writer_names_the_first(export_dir: Path) -> None:
    with plan_of(), pytest.raises(ExportError) as caught:
        export()
    owner = f"process {os.getpid()} on {socket.gethostname()} (since 20"
    assert str(caught.value).startswith(f"out: {owner}")
    assert str(caught.value).endswith(
        "is writing to it. Wait for the other process or stop it, and run the same command again."
    )
    assert export().exported == 10


PARTS = [
    ((1, 1), (1, 2), False),
    ((1, 2), (1, 1), False),
    ((1, 2), (1, 2), False),
    ((1, 2), (2, 2), True),
    ((1, 2), (2, 3), False),
]


@pytest.mark.parametrize(("first", "second", "fits"), PARTS)
def test_only_different_parts_of_one_count_run_together(
    tmp_path: Path, first: tuple[int, int], second: tuple[int, int], fits: bool
) -> None:
    with hold_folder(tmp_path, first):
        if fits:
            with hold_folder(tmp_path, second), short_lock(tmp_path):
                pass
        else:
            with (
                pytest.raises(
                    ExportError, match=r"process \d+ on .* is writing to it|other parts are"
                ),
                hold_folder(tmp_path, second),
            ):
                pass
    assert list(tmp_path.iterdir()) == []


def die_holding(folder: Path) -> None:
    with hold_folder(folder):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_lock_whose_owner_was_killed_is_taken_over(tmp_path: Path) -> None:
    """The kernel releases the lock when the process ends. The remaining name of a process of this
    host has no effect."""
    fork = multiprocessing.get_context("fork")
    owner = fork.Process(target=die_holding, args=(tmp_path,))
    owner.start()
    owner.join(60)
    assert owner.exitcode == -signal.SIGKILL
    left = json.loads((tmp_path / "lock").read_text())
    assert left["host"] == socket.gethostname()
    with hold_folder(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_a_lock_of_another_host_is_an_error_with_a_remedy(
    tmp_path: Path,
) -> None:
    owner = {"host": "node-17", "pid": 4, "since": "2026-01-01T00:00:00+00:00"}
    (tmp_path / "lock").write_text(json.dumps(owner))
    for part in ((1, 1), (1, 2)):
        with pytest.raises(ExportError) as caught, hold_folder(tmp_path, part):
            pass
        assert "process 4 on node-17 (since 2026" in caught.value.fact
        assert "was writing to it, and this host" in caught.value.fact
        assert f"delete {tmp_path}/lock" in caught.value.remedy
    (tmp_path / "lock").unlink()
    with hold_folder(tmp_path):
        pass


def refuse_lock(*_: Any) -> None:
    raise OSError(38, "Function not implemented")


def test_a_disk_without_locks_causes_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A name without a lock once blocked every other host forever."""
    monkeypatch.setattr("fcntl.flock", refuse_lock)
    for host in ("node-1", "node-2"):
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        for part in ((1, 2), (1, 1)):
            with hold_folder(tmp_path, part), short_lock(tmp_path):
                pass
    assert caplog.text.count("cannot be locked (Function not implemented)") == 1
    with hold_folder(tmp_path):
        monkeypatch.setattr("socket.gethostname", lambda: "node-3")
        with pytest.raises(ExportError, match=r"process .* on node-2 .* was writing to it"):
            hold_folder(tmp_path).__enter__()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("held", [(1, 1), (2, 3)])
def test_without_locks_a_running_owner_on_this_host_keeps_others_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: tuple[int, int]
) -> None:
    """A second export once took over the name, and removed the first export's temporary files."""
    monkeypatch.setattr("fcntl.flock", refuse_lock)
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    owner = fork.Process(target=hold_until_killed, args=(tmp_path, held, ready))
    owner.start()
    try:
        assert ready.wait(60)
        for part in {(1, 1), held}:
            with pytest.raises(ExportError, match=f"process {owner.pid} on .* is writing to it"):
                hold_folder(tmp_path, part).__enter__()
    finally:
        owner.kill()
        owner.join(60)
    with hold_folder(tmp_path):  # the owner's name remains, but its process has ended
        pass
    for pid in (0, -1, 2**70, "7", None):
        (tmp_path / "lock").write_text(json.dumps({"host": socket.gethostname(), "pid": pid}))
        with hold_folder(tmp_path):
            pass


def hold_until_killed(folder: Path, part: tuple[int, int], ready: Any) -> None:
    with hold_folder(folder, part):
        ready.set()
        time.sleep(600)


def test_without_locks_the_last_written_name_owns_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fcntl.flock", refuse_lock)
    other = {"host": socket.gethostname(), "pid": os.getppid(), "since": "2026-01-01"}
    monkeypatch.setattr(
        lock_module,
        "time",
        SimpleNamespace(
            sleep=lambda _: (tmp_path / "lock").write_text(json.dumps(other)),
            monotonic=time.monotonic,
        ),
    )
    with pytest.raises(ExportError, match=f"process {os.getppid()} on"):
        hold_folder(tmp_path).__enter__()


def test_a_short_lock_of_another_host_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts begin together on many hosts that do not see each other's locks."""
    name = tmp_path / "lock-moment"
    name.write_text(json.dumps({"host": "node-17", "pid": 4, "since": "2026-01-01"}))
    pauses = iter([lambda: None, name.unlink])
    monkeypatch.setattr(
        lock_module,
        "time",
        SimpleNamespace(sleep=lambda _: next(pauses)(), monotonic=time.monotonic),
    )
    with short_lock(tmp_path):
        assert next(pauses, None) is None


def test_a_lock_on_an_unlinked_file_is_not_a_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process opens the lock file, the owner unlinks the file, and the process then locks the
    unlinked file. Another process would create and lock a new file."""
    real, is_unlinked = fcntl.flock, [False]

    def flock(descriptor: int, kind: int) -> None:
        if not is_unlinked[0]:
            (tmp_path / "lock").unlink()
            is_unlinked[0] = True
        real(descriptor, kind)

    monkeypatch.setattr(fcntl, "flock", flock)
    with hold_folder(tmp_path):
        with pytest.raises(ExportError, match="is writing to it"), hold_folder(tmp_path):
            pass
        assert (tmp_path / "lock").exists()


def hold_repeatedly(folder: Path, count: int, wrong: Any) -> None:
    inside = folder / "inside"
    for _ in range(count):
        with short_lock(folder):
            try:
                inside.touch(exist_ok=False)
            except FileExistsError:
                wrong.value += 1
            inside.unlink(missing_ok=True)


def test_short_locks_never_overlap(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    wrong = fork.Value("i", 0)
    workers = [fork.Process(target=hold_repeatedly, args=(tmp_path, 40, wrong)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert wrong.value == 0


# The command


def test_a_lock_that_is_about_to_be_released_is_waited_for(tmp_path: Path) -> None:
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with hold_folder(tmp_path):
            held.set()
            done.wait(0.2)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(30)
    with hold_folder(tmp_path):
        assert done.is_set() is False
    holder.join(30)
