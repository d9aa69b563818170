"""Test `--output`, `--normalize` and `--layers` of the commands."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qwen_vit.encoder import VisionEncoder
from qwen_vit.feature_files.read import load_features

COMMON = ("--model", "tiny", "--device", "cpu", "--out", "out")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, qwen_vit: Any) -> Any:
    """Run `qwen-vit ARGUMENTS` in this process, in a folder with two images. Return code, stdout,
    stderr."""
    for name, width in (("a.png", 56), ("b.png", 84)):
        values = np.random.default_rng(width).integers(0, 256, (56, width, 3), np.uint8)
        Image.fromarray(values).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return qwen_vit


@pytest.mark.parametrize("command", ["encode", "export"])
def test_vectors_and_layers_are_written(run: Any, command: str) -> None:
    rows = ("--output", "mean", "--normalize", "--layers", "3, 1")
    code, _, err = run(command, "a.png", "b.png", *COMMON, *rows)
    assert code == 0, err
    encoder = VisionEncoder.from_pretrained("tiny", device="cpu")
    options: Any = {"output": "mean", "normalize": True, "layers": (1, 3)}
    for stored, name in zip(load_features("out"), ("a.png", "b.png"), strict=True):
        ours = encoder.encode(name, **options)
        assert (stored.id, stored.output, stored.normalized) == (name, "mean", True)
        assert torch.allclose(stored.embeds, ours.embeds, atol=1e-6)
        assert list(stored.layers) == [1, 3]
        assert torch.allclose(stored.layers[3], ours.layers[3], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("output", "rows", "header"),
    [("merged", (4, 6), "tokens"), ("patch", (16, 24), "patches"), ("mean", (1, 1), "rows")],
)
def test_json_and_table_count_the_rows(
    run: Any, output: str, rows: tuple[int, int], header: str
) -> None:
    arguments = ("encode", "a.png", "b.png", "no.png", *COMMON, "--overwrite", "--output", output)
    code, out, _ = run(*arguments, "--json", "--layers", "0")
    document = json.loads(out)
    assert code == 1
    assert (document["output"], document["normalize"], document["layers"]) == (output, False, [0])
    images = document["images"]
    assert [image["rows"] for image in images] == [*rows, None]
    assert [image["tokens"] for image in images] == [4, 6, None]
    assert len({frozenset(image) for image in images}) == 1
    _, out, _ = run(*arguments)
    assert header in out.splitlines()[0].split()


def test_an_exports_report_names_its_rows(run: Any) -> None:
    code, out, _ = run("export", "a.png", "b.png", *COMMON, "--output", "mean", "--json")
    assert (code, json.loads(out)["rows"]) == (0, 2)


def test_encode_replaces_no_shard_of_an_export(run: Any) -> None:
    run("export", "a.png", *COMMON)
    arguments = ("encode", "a.png", "--overwrite", "--model", "tiny", "--device", "cpu")
    code, _, err = run(*arguments, "--out", "out/shard-00000000.safetensors")
    assert code == 2
    assert "shard-00000000.safetensors: the name of a file of the export in this folder" in err
    code, _, err = run(*arguments, "--out", "https://host/f.safetensors")
    assert code == 2
    assert "https://host/f.safetensors is an address. Pass a path on this machine" in err


@pytest.mark.parametrize("command", ["encode", "export"])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--layers", "1,x"), "--layers is '1,x', expected block numbers such as 7,15"),
        (("--layers", "-1"), "--layers is '-1', expected block numbers"),
        (("--layers", "1,"), "--layers is '1,'"),
        (("--layers", "1,1"), "error: --layers contains 1 twice"),
        (("--layers", "5"), "error: --layers contains 5. Expected integers from 0 to 4"),
        (("--normalize",), "error: --normalize requires --output mean"),
        (("--output", "max"), "Invalid value for '--output'"),
    ],
)
def test_contradictory_options_are_refused_before_any_file_is_written(
    run: Any, command: str, options: tuple[str, ...], words: str
) -> None:
    code, out, err = run(command, "a.png", *COMMON, *options)
    assert (code, out) == (2, "")
    assert words in err
    assert not Path("out").exists()
