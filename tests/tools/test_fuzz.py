"""Test that the fuzz targets handle each seed and each finding correctly and quickly."""

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen_vit.errors import CheckpointError
from qwen_vit.images.load import load_image
from tests.support import ROOT
from tools.checks import fuzz_targets
from tools.checks.fuzz import CORPUS, fuzz
from tools.checks.fuzz_child import mutate
from tools.checks.fuzz_targets import TARGETS, WrongAcceptanceError, check, run_target

FILES = sorted(path for path in CORPUS.rglob("*") if path.is_file())


def test_every_target_has_a_corpus_and_each_folder_a_target() -> None:
    assert {path.parent.name for path in FILES} == {*TARGETS}
    assert all(path.stat().st_size < 50_000 for path in FILES)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_the_corpus_is_handled_in_time(path: Path) -> None:
    begin = time.process_time()
    run_target(path.parent.name, path.read_bytes())
    assert time.process_time() - begin < 2


@pytest.mark.filterwarnings("ignore")
def test_every_target_accepts_a_seed() -> None:
    """A corpus that every parser rejects would fuzz only the first check."""
    for name, target in TARGETS.items():
        accepted = []
        for path in (CORPUS / name).iterdir():
            try:
                target(path.read_bytes())
            except Exception:  # noqa: BLE001 - refused, by whatever error
                continue
            accepted.append(path.name)
        assert accepted, name


def test_the_rules_of_the_targets_detect_violations(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: bytes) -> None:
        raise KeyError("raw")

    monkeypatch.setitem(TARGETS, "header", fails)
    with pytest.raises(KeyError):
        run_target("header", b"{}")
    monkeypatch.setattr(CheckpointError, "__str__", lambda _: "two\nlines")
    with pytest.raises(WrongAcceptanceError):
        run_target("documents", b"[")
    cut = (CORPUS / "images" / "cut_and_closed.jpg").read_bytes()
    image = load_image((CORPUS / "images" / "progressive.jpg").read_bytes())
    monkeypatch.setattr(fuzz_targets, "load_image", lambda *_, **__: image)
    with pytest.raises(WrongAcceptanceError, match="remature end"):
        run_target("images", cut)
    check(lambda: None)


def quadratic(size: int) -> float:
    return size**2 / 100_000


def costly_chunk(size: int) -> float:
    """Return costs that are linear after 100 bytes: 10 times the bytes cost 37 times the time."""
    return 0.1 + 0.004 * (size - 100)


@pytest.mark.parametrize(
    ("seconds", "found"), [(lambda _: 6.0, True), (quadratic, True), (costly_chunk, False)]
)
def test_slow_inputs_are_findings(
    monkeypatch: pytest.MonkeyPatch, seconds: Callable[[int], float], found: bool
) -> None:
    """Test the limit on an input's time, and the limit on the growth of the time with the size."""
    clock = [0.0]

    def target(data: bytes) -> None:
        clock[0] += seconds(len(data))

    monkeypatch.setitem(TARGETS, "header", target)
    monkeypatch.setattr(time, "process_time", lambda: clock[0])
    data = bytes(range(100))
    if found:
        with pytest.raises(fuzz_targets.TooSlowError, match="100 bytes took"):
            run_target("header", data)
    else:
        run_target("header", data)
    assert len(fuzz_targets.grown(data)) == 1_000
    assert len(fuzz_targets.grown(data, 5)) == 500


def test_a_collection_of_all_objects_is_no_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every second call, Python searches all objects, which takes longer than the input."""
    clock, calls = [0.0], [0]

    def target(data: bytes) -> None:
        calls[0] += 1
        clock[0] += len(data) * 6e-5 + (0.2 if calls[0] % 2 == 0 else 0)

    monkeypatch.setitem(TARGETS, "header", target)
    monkeypatch.setattr(time, "process_time", lambda: clock[0])
    run_target("header", bytes(range(100)))
    assert calls[0] > 2


def test_mutations_differ_and_keep_the_size() -> None:
    data = (CORPUS / "images" / "progressive.jpg").read_bytes()
    mutated = {mutate(data, 20_000, seed) for seed in range(200)}
    assert len(mutated) > 100
    assert max(map(len, mutated)) <= 20_000
    assert mutate(b"", 10, 3) is not None


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")
@pytest.mark.parametrize("name", TARGETS)
def test_ten_seconds_of_fuzzing_find_nothing(name: str, tmp_path: Path) -> None:
    run = fuzz(name, 10, 0, tmp_path)
    assert run.inputs > 0, run.output
    assert run.findings == [], run.output[-3_000:]
    assert ROOT.exists()
