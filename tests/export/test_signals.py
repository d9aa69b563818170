"""Test signals to the command: saved images, and the number of allowed failures."""

import json
import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from qwen_vit.export.segments import count_kept
from qwen_vit.export.stop import StopSignals
from tests.support.commands import run_command
from tests.support.fake_encoder import FakeEncoder
from tests.support.interrupted_exports import segments


@pytest.fixture(autouse=True)
def default_handlers() -> Iterator[None]:
    """Undo the handlers of libraries, such as Ray's for SIGTERM, which ends this process."""
    before = {
        number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)
    }
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_first_signal_requests_a_stop_and_the_second_interrupts() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as stop:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)  # for example during the load of an encoder
        with stop.accepted():
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.is_requested()
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_ignored_signal_stays_ignored() -> None:
    """nohup also ignores SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop, stop.accepted():
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.is_requested()
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_command_and_saves_encoded_images(
    run: Any, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    encode = FakeEncoder._encode

    def interrupted(self: Any, batch: Any, options: Any) -> Any:
        os.kill(os.getpid(), number)
        return encode(self, batch, options)

    with monkeypatch.context() as patch:
        patch.setattr(FakeEncoder, "_encode", interrupted)
        code, _, err = run("--shard-size", "100")
    lines = [line for line in err.splitlines() if not line.startswith("skipped: ")]
    assert code == 130
    assert lines == [
        "saving encoded images; interrupt again to stop at once",
        "the export saved 32 images; run the same command again to resume",
        "interrupted",
    ]
    assert count_kept(Path("out")) == 32  # one batch of images
    code, out, _ = run("--shard-size", "100", "--json", "--allow-failed", "8")
    done = json.loads(out)
    assert (code, done["exported"], segments()) == (0, 92, [])
    assert done["resumed"] >= 32


@pytest.fixture
def run(
    hundred_images: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Any:
    """Run `qwen-vit export p ... --out out` in this process. Return code, stdout, stderr."""
    loader = type("Loader", (), {"from_pretrained": staticmethod(lambda *_, **__: FakeEncoder())})
    monkeypatch.setattr("qwen_vit.export.run.VisionEncoder", loader)

    words = ("export", "p", "--model", "stand-in", "--out", "out")
    return partial(run_command, monkeypatch, capfd, *words)


@pytest.mark.parametrize(("allowed", "code"), [((), 1), (("7",), 1), (("8",), 0), (("9",), 0)])
def test_the_allowed_failures_count_one_run(run: Any, allowed: tuple[str, ...], code: int) -> None:
    words = ("--allow-failed", *allowed) if allowed else ()
    found, out, _ = run("--json", *words)
    assert (found, sum(json.loads(out)["failed"].values())) == (code, 8)
    # failures of earlier runs do not count
    assert run(*words)[0] == 0
    Path("p/new.png").write_bytes(b"")
    assert run("--allow-failed", "-1")[0] == 2


def test_options_of_time_reach_the_export(run: Any) -> None:
    assert run("--shard-seconds", "0.000001", "--allow-failed", "8")[0] == 0
    assert run("--shard-seconds", "0")[0] == 2
    assert segments() == []
