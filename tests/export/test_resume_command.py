"""Test `qwen-vit export --resume DIR`: recorded options, changed inputs, versions."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_vit.device import choose_quantization
from qwen_vit.errors import ExportError
from qwen_vit.export.estimate import estimate_export
from qwen_vit.export.run import export_features
from qwen_vit.feature_files.describe import describe_features
from qwen_vit.feature_files.read import load_features
from qwen_vit.feature_files.verify import verify_features
from tests.support.commands import run_command
from tests.support.export_stress import tiny_png
from tests.support.fake_encoder import FakeEncoder
from tests.support.growing_exports import content, write


@pytest.fixture
def run(
    growing_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Any:
    """Run `qwen-vit export ...` in this process. Return code, JSON, stderr."""
    loaded: list[dict[str, Any]] = []

    def load(model: str, **loading: Any) -> FakeEncoder:
        loaded.append({"model": model, **loading})
        return FakeEncoder(max_pixels=loading.get("max_pixels"))

    loader = type("Loader", (), {"from_pretrained": staticmethod(load)})
    monkeypatch.setattr("qwen_vit.export.run.VisionEncoder", loader)

    command: Any = partial(run_command, monkeypatch, capfd, "export")
    command.loaded = loaded
    return command


START = ("p", "--model", "stand-in", "--out", "out", "--shard-size", "4", "--output", "patch",
         "--layers", "1,3", "--max-pixels", "10000")  # fmt: skip


def test_resume_needs_no_options(run: Any) -> None:
    assert run(*START)[0] == 1
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    Path("out/shard-00000001.safetensors").unlink()
    code, out, err = run("--resume", "out", "--json")
    assert code == 1, err  # exit code 1: 7.png failed in this run
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == before
    assert json.loads(out)["resumed"] == 6
    assert run.loaded[-1]["model"] == "stand-in"
    assert run.loaded[-1]["max_pixels"] == 10_000


def test_python_resumes_with_the_recorded_options(run: Any) -> None:
    run(*START)
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    Path("out/shard-00000001.safetensors").unlink()
    encoder: Any = FakeEncoder(max_pixels=10_000)
    estimate_export(encoder, None, folder="out")
    assert export_features(encoder, None, "out").resumed == 6
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == before


def test_an_export_is_not_an_input(run: Any) -> None:
    run(*START)
    code, _, err = run("out", "--model", "stand-in", "--out", "other")
    assert code == 2
    assert "out: an export, without images. Expected images. To resume the export, run" in err
    assert "`qwen-vit export --resume out`" in err


def test_resume_names_changed_inputs_and_extends_with_its_own(
    run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    run(*START)
    write("p/x.png", tiny_png(42))
    assert run("--resume", "out")[0] == 0
    assert "the export's inputs changed: 1 new, first x.png; the export con" in caplog.text
    assert "with its own listing; to add the new images, pass --extend" in caplog.text
    write("p/7.png", tiny_png(7))
    code, out, _ = run("--resume", "out", "--extend", "--retry-failed", "--json", "-q")
    done = json.loads(out)
    assert (code, done["images"], done["exported"]) == (1, 11, 10)
    run(*START[:4], "fresh", *START[5:])
    assert content() == content("fresh")


def test_resume_works_from_another_folder(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run(*START)
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert run("--resume", "../out")[0] == 0
    code, _, err = run("--resume", "../out", "--extend")
    assert code == 2
    assert "its inputs are relative to" in err


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("--resume", "none"), "none: no export to resume"),
        (("--resume", "out", "--output", "mean"), "--output does not work with --resume"),
        (("--resume", "out", "--model", "tiny"), "--model does not work with --resume"),
        (
            ("p", "--out", "out"),
            "missing: --model. Pass INPUTS, --model and --out, or only --resume OUT",
        ),
    ],
)
def test_bad_usage_of_resume(run: Any, words: tuple[str, ...], error: str) -> None:
    run(*START)
    code, _, err = run(*words)
    assert code == 2
    assert error in err


def test_an_error_of_resume_suggests_only_options_of_resume(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user who resumes cannot "leave --quantization out", because --resume rejects the option."""
    run(*START)

    def load(model: str, **loading: Any) -> None:
        choose_quantization("fp8", torch.device("cpu"), torch.float32)

    loader = type("Loader", (), {"from_pretrained": staticmethod(load)})
    monkeypatch.setattr("qwen_vit.export.run.VisionEncoder", loader)
    remedy = (
        "Leave --quantization out. --resume keeps the recorded --quantization: to change this "
        "option, start a new export with another --out."
    )
    for words in (("--resume", "out"), ("--resume", "out", "--dry-run")):
        code, _, err = run(*words)
        assert (code, remedy in err) == (2, True), err
    code, _, err = run(*START)
    assert (code, "Leave --quantization out.\n" in err, "recorded" in err) == (2, True, False), err


def test_a_damaged_description_has_a_remedy_that_works(run: Any) -> None:
    """Each command once named another remedy, and the export refused the folder."""
    run(*START)
    settings = Path("out/export.json")
    content, words = settings.read_bytes(), "which restores export.json."
    for damage in (lambda: settings.write_text("{"), settings.unlink):
        damage()
        assert words in run("--resume", "out")[2]
        for read in (load_features, describe_features):
            with pytest.raises(ExportError, match=words):
                read("out")
        assert [words in each for each in verify_features("out").problems] == [True]
        assert run(*START, "--dry-run")[0] == 0
        assert run(*START)[0] == 0
        assert settings.read_bytes() == content


def test_settings_of_another_type_are_refused(run: Any) -> None:
    run(*START)
    settings = json.loads(Path("out/export.json").read_text())
    for changes, words in (
        ({"limits": 5}, ("its settings cannot be read", "Pass another --out.")),
        ({"image_policy": 5}, ("its image_policy is 5", "which restores export.json.")),
    ):
        Path("out/export.json").write_text(json.dumps({**settings, **changes}))
        code, _, err = run("--resume", "out")
        assert code == 2
        assert all(each in err for each in words)
