"""Test `info` and `verify` with checkpoints, feature files and export folders."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qwen_vit.cli.verification import Findings
from qwen_vit.common import storage
from qwen_vit.encoder import VisionEncoder
from qwen_vit.export.options import ExportOptions
from qwen_vit.export.run import export_features
from qwen_vit.feature_files.write import write_features
from tests.support import IMAGES
from tests.support.checkpoints import SMALL, write_checkpoint, write_weights
from tests.support.commands import TO_FILE
from tests.support.feature_file_cases import poison
from tests.support.features import random_features

TINY = ("--model", "tiny", "--device", "cpu")


@pytest.fixture
def export_dir(folder: Path) -> Path:
    """Make an export of two images and a broken image, in two shards."""
    encoder = VisionEncoder.from_pretrained("tiny", device="cpu")
    inputs = ["a.png", "b.jpg", "broken.png"]
    export_features(encoder, inputs, "out", ExportOptions(shard_size=2))
    return folder / "out"


def facts_of(text: str) -> dict[str, str]:
    """Return each line's words by its first word."""
    return dict(re.split(r"\s{2,}", line, maxsplit=1) for line in text.splitlines() if "  " in line)


def test_a_feature_file_is_described_and_verified(folder: Path, run: Any) -> None:
    run("encode", "a.png", "b.jpg", *TINY, "--out", "f.safetensors")
    facts = json.loads(run("info", "f.safetensors", "--json").out)
    assert (facts["kind"], facts["images_done"], facts["rows"]) == ("feature file", 2, 10)
    assert (facts["width"], facts["dtype"], facts["output"]) == (192, "float32", "merged")
    assert facts["model"] == "tiny"
    lines = facts_of(run("info", "f.safetensors").out)
    assert (lines["images"], lines["rows"]) == ("2", "10 of 192 values, float32")
    verified = run("verify", "f.safetensors")
    assert verified.code == 0
    assert verified.out.startswith("whole: 2 images, 10 rows read")
    for command in ("info", "verify"):
        done = run(command, "f.safetensors", "--revision", "main", "--local-files-only")
        words = "ignored --revision and --local-files-only: features need no checkpoint\n"
        assert (done.code, done.err) == (0, words)
    poison(Path("f.safetensors"), row=7)
    broken = run("verify", "f.safetensors", "--json")
    document = json.loads(broken.out)
    assert broken.code == 1
    assert "f.safetensors: b.jpg: image_embeds contains NaN or infinity" in document["problems"]
    assert not any("a.png" in problem for problem in document["problems"])
    alias = run("info", "f.safetensors", "--verify")
    assert alias.code == 1
    assert "damaged: " in alias.out


@pytest.mark.parametrize("tensor", ["image_embeds", "layer_1"])
def test_a_wrong_bit_is_found_by_the_digest(folder: Path, run: Any, tensor: str) -> None:
    """The value is finite and plausible, so only the digest shows the change."""
    encoder = VisionEncoder.from_pretrained("tiny", device="cpu")
    encoded = encoder.encode(["a.png", "b.jpg"], layers=(1,))
    path = write_features("f.safetensors", encoded, encoder.metadata())
    assert "all images compared with their digests" in run("verify", path).out
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(path)
    tensors[tensor].view(torch.int32)[-1, 5] ^= 1
    save_file(tensors, path, metadata)
    done = run("verify", path)
    assert done.code == 1
    assert f"f.safetensors: b.jpg: its rows of {tensor} changed after they were" in done.out
    assert "a.png" not in done.out
    assert json.loads(run("info", path, "--json").out)["layers"] == [1]


@pytest.mark.parametrize("name", ["f", "f.pt"])
def test_a_file_with_another_suffix_is_recognised(folder: Path, run: Any, name: str) -> None:
    """`info` once said that such a file was not a feature file."""
    run("encode", "a.png", *TINY, "--out", "f")
    Path("f").replace(name)
    assert "kind             feature file" in run("info", name).out
    assert run("verify", name).out.startswith("whole: 1 image")
    assert run("show", name).err == ""
    Path("text").write_text("no features")
    os.mkfifo("fifo")  # to open it would block
    for command in ("info", "verify"):
        assert "text: a file, but not a feature file" in run(command, "text").err
        assert "fifo: a file. Expected a checkpoint's folder" in run(command, "fifo").err
    save_file({"a": torch.ones(2)}, "shard")
    assert "shard: a safetensors file, but not a feature file" in run("info", "shard").err


def test_info_names_the_quantization_of_features(folder: Path, run: Any) -> None:
    metadata = VisionEncoder.from_pretrained("tiny", device="cpu").metadata()
    for quantization in (None, "fp8"):
        facts = {**metadata, "quantization": quantization}
        path = write_features(
            f"{quantization}.safetensors", [random_features("a", (1, 4, 6))], facts
        )
        assert ("quantization" in run("info", path).out) == (quantization == "fp8")


def test_a_file_of_schema_1_is_verified_without_digests(folder: Path, run: Any) -> None:
    run("encode", "a.png", *TINY, "--out", "f.safetensors")
    with safe_open("f.safetensors", "pt") as opened:
        facts = json.loads(opened.metadata()["qwen_vit"])
    old = {name: value for name, value in facts.items() if name not in ("images", "layers")}
    text = json.dumps({**old, "schema_version": 1}, sort_keys=True)
    save_file(load_file("f.safetensors"), "f.safetensors", {"qwen_vit": text})
    assert (
        run("verify", "f.safetensors").out
        == "whole: 1 image, 4 rows read; no digests are recorded\n"
    )


def test_an_export_folder_is_described(export_dir: Path, run: Any) -> None:
    facts = json.loads(run("info", "out", "--json").out)
    assert facts["kind"] == "export folder"
    assert (facts["images_done"], facts["images_to_do"]) == (2, 0)
    assert (facts["images_failed"], facts["shards"]) == ({"truncated": 1}, 2)
    lines = facts_of(run("info", "out").out)
    assert (lines["images"], lines["failed"]) == ("2 done, 0 to do, 1 failed", "1 truncated")
    (export_dir / "shard-00000000.safetensors").unlink()
    lines = facts_of(run("info", "out").out)
    assert (lines["images"], lines["shards"]) == ("0 done, 2 to do, 1 failed", "1, 1 missing")


def test_verify_counts_the_failed_images(export_dir: Path, run: Any) -> None:
    done = run("verify", "out")
    assert (done.code, done.out.count("; 1 image failed")) == (0, 1)
    for command in (("verify",), ("info", "--verify"), ("info",)):
        document = json.loads(run(*command, "out", "--json").out)
        assert document["images_failed"] == {"truncated": 1}


def test_each_fault_of_an_export_is_found_and_named(export_dir: Path, run: Any) -> None:
    first, last = sorted(export_dir.glob("shard-*.safetensors"))
    assert run("verify", "out").code == 0
    content = first.read_bytes()

    def problems() -> str:
        done = run("verify", "out")
        assert done.code == 1
        return str(done.out)

    poison(first)
    assert "shard-00000000.safetensors: a.png: image_embeds contains NaN" in problems()
    first.write_bytes(content[:-4])
    assert "shard-00000000.safetensors: truncated" in problems()
    first.write_bytes(last.read_bytes())
    assert "shard-00000000.safetensors: belongs to a different export" in problems()
    first.unlink()
    assert "1 shard missing: run the same `qwen-vit export` command again" in problems()
    first.write_bytes(content)
    listing = export_dir / "listing.jsonl"
    listing.write_text(listing.read_text().replace("/a.png", "/A.png"))
    assert "listing.jsonl: its sha256 differs from the one in export.json" in problems()


def test_verify_lists_damage_that_prevents_opening(export_dir: Path, run: Any) -> None:
    """A feature file that could not be opened once ended `verify` with 2, and printed no JSON."""
    shard = export_dir / "shard-00000000.safetensors"
    Path("f.safetensors").write_bytes(shard.read_bytes()[:4000])
    for name in ("cut", "lost"):
        shutil.copytree("out", name)
    Path("cut/export.json").write_text("{")
    Path("lost/export.json").unlink()
    (export_dir / "listing.jsonl").write_text("{")
    for path, problem in (
        ("f.safetensors", "f.safetensors: truncated, or not a safetensors file"),
        ("out", "listing.jsonl: corrupt in lines 1 to 1."),
        ("cut", "cut/export.json: not JSON"),
        ("lost", "lost: a folder of shards without export.json"),
    ):
        done = run("verify", path, "--json")
        assert done.code == 1
        assert [problem in each for each in json.loads(done.out)["problems"]] == [True]
        for words in (("verify", path), ("info", path, "--verify")):
            done = run(*words)
            assert (done.code, done.err) == (1, "")
            assert done.out.startswith("damaged: 1 problem; 0 images, 0 rows read\n")


def test_verify_of_no_features_ends_with_2(folder: Path, run: Any) -> None:
    save_file({"a": torch.ones(2)}, "weights.safetensors")
    for path, error in (
        ("gone.safetensors", "does not exist"),
        ("weights.safetensors", "a safetensors file, but not a feature file"),
    ):
        done = run("verify", path, "--json")
        assert (done.code, done.out) == (2, "")
        assert error in done.err


def test_a_row_too_few_is_found(folder: Path, run: Any) -> None:
    """The offsets fit the tensor, but a grid does not, because an image's rows belong to another
    image."""
    run("encode", "a.png", "b.jpg", *TINY, "--out", "f.safetensors")
    with safe_open("f.safetensors", "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file("f.safetensors")
    tensors["image_token_offsets"][1] -= 1
    save_file(tensors, "f.safetensors", metadata)
    done = run("verify", "f.safetensors")
    assert done.code == 1
    assert "a.png: 3 rows for a grid of (1, 4, 4)" in done.out
    assert "b.jpg: 7 rows for a grid of (1, 4, 6)" in done.out


def test_a_checkpoint_is_verified(folder: Path, run: Any) -> None:
    tensors = write_checkpoint(folder / "model", SMALL, prefix="")
    done = run("verify", "model")
    assert done.code == 0
    assert done.out.startswith("whole: no hash is recorded for this folder; every weight was read")
    assert run("info", "model", "--verify").code == 0
    tensors["blocks.0.norm1.weight"][3] = float("nan")
    write_weights(folder / "model", tensors)
    for words in (("verify", "model"), ("info", "model", "--verify")):
        done = run(*words)
        assert done.code == 1
        assert "blocks.0.norm1.weight: contains 1 NaN and 0 infinite values" in done.out


def test_a_full_download_of_no_repository_is_ignored(run: Any) -> None:
    done = run("download", "tiny", "--full")
    assert (done.code, done.err) == (0, "ignored --full: MODEL is no repository on the Hub\n")


def test_a_missing_path_or_model_is_an_error(folder: Path, run: Any) -> None:
    for words, message in (
        (("verify", "gone.safetensors"), "gone.safetensors: does not exist. Expected a feature"),
        (("verify", "./gone"), "./gone: does not exist. Expected a checkpoint's folder."),
        (("info", "7B"), "Did you mean Qwen/Qwen2.5-VL-7B-Instruct"),
        (("info", "f.safetensors", "--image", "a.png"), "--image works only for checkpoints"),
    ):
        done = run(*words)
        assert (done.code, done.out) == (2, "")
        assert message in done.err


def test_many_problems_are_counted() -> None:
    text = Findings("read", tuple(f"problem {i}\x1b" for i in range(25))).text()
    assert text.startswith("damaged: 25 problems; read\n  problem 0\\x1b\n")
    assert text.endswith("  and 5 more: --json lists all")


CHELSEA = IMAGES / "chelsea.png"

# info


def test_info_describes_tiny(run: Any) -> None:
    done = run("info", "tiny", "--json")
    assert (done.code, done.err) == (0, "")
    facts = json.loads(done.out)
    assert (facts["model"], facts["licence"], facts["tensors"]) == ("tiny", "Apache-2.0", 66)
    assert "model.safetensors" in facts["files"]
    assert facts["vision_config"]["out_hidden_size"] == 192
    encoder = VisionEncoder.from_pretrained("tiny", device="cpu")
    assert facts["weights_sha256"] == encoder.metadata()["weights_sha256"]
    assert facts["config_sha256"] == encoder.metadata()["config_sha256"]
    assert facts["parameters"] == sum(t.numel() for t in encoder.checkpoint.tensors.values())

    listed = run("info", "tiny")
    lines = dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in listed.out.splitlines()
                 if re.search(r"\S\s{2,}\S", line))  # fmt: skip
    assert lines["licence"] == "Apache-2.0"
    assert lines["out_hidden_size"] == "192"
    assert lines["parameters"] == f"{facts['parameters']:,}"
    assert "commit" not in lines  # a folder has none
    assert "None" not in listed.out


def test_info_counts_the_tokens_that_encode_gives(folder: Path, run: Any) -> None:
    done = run("info", "tiny", "--image", CHELSEA, "--json")
    image = json.loads(done.out)["image"]
    assert image["size_px"] == [300, 451]
    assert (image["grid_thw"], image["patches"], image["tokens"]) == ([1, 22, 32], 704, 176)
    assert image["format"] == "PNG"
    encoded = run("encode", CHELSEA, *TO_FILE, "--json")
    assert json.loads(encoded.out)["images"][0]["tokens"] == 176


@pytest.mark.parametrize(
    "options", [("--max-pixels", "50176"), ("--min-pixels", "500000", "--max-pixels", "600000")]
)
def test_info_counts_the_tokens_of_other_pixel_limits(
    folder: Path, run: Any, options: tuple[str, ...]
) -> None:
    image = json.loads(run("info", "tiny", "--image", CHELSEA, *options, "--json").out)["image"]
    encoded = run("encode", CHELSEA, *TO_FILE, *options, "--json")
    assert image["tokens"] == json.loads(encoded.out)["images"][0]["tokens"] != 176
    done = run("info", "tiny", *options)
    assert "--max-pixels: without --image, there is no image" in done.err
    done = run("info", "tiny", "--image", CHELSEA, "--max-pixels", "7")
    assert (done.code, done.out) == (2, "")
    assert done.err == run("encode", CHELSEA, *TO_FILE, "--overwrite", "--max-pixels", "7").err


def test_info_on_a_broken_image_or_checkpoint_ends_with_2(folder: Path, run: Any) -> None:
    done = run("info", "tiny", "--image", "broken.png")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: broken.png")
    write_checkpoint(folder / "model", SMALL)
    weights = folder / "model" / "model.safetensors"
    assert run("info", "model").code == 0
    weights.write_bytes(weights.read_bytes()[:-100])
    torn = run("info", "model")
    assert (torn.code, torn.out) == (2, "")
    assert "error: " in torn.err
    assert "model/model.safetensors" in torn.err
    assert "Traceback" not in torn.err


def test_a_missing_package_is_an_error_and_no_damage(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`verify` once reported damage with exit code 1, so scripts would export again."""

    def missing(*_: Any, **__: Any) -> None:
        raise ImportError("install gcsfs")

    monkeypatch.setattr("fsspec.filesystem", missing)
    storage._filesystem.cache_clear()
    for command in ("verify", "info"):
        done = run(command, "gs://bucket/export")
        assert (done.code, done.out) == (2, "")
        assert "gs:// needs a package that is not installed (install gcsfs). Run" in done.err
