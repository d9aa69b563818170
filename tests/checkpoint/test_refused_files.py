"""Test that the error for a folder or file without a checkpoint names the content."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_vit.checkpoint.load import load_checkpoint
from qwen_vit.common.arguments import short_repr
from qwen_vit.errors import CheckpointError
from tests.support.checkpoint_cases import QKV, assert_same_tensors, refusal
from tests.support.checkpoints import (
    SMALL,
    write_checkpoint,
)


def test_the_error_for_a_folder_without_weights_names_its_files(tmp_path: Path) -> None:
    assert "nothing: not a folder. Expected a folder with" in refusal(tmp_path / "nothing")
    assert "no weights (the folder contains nothing). Expected model.safetensors" in refusal(
        tmp_path
    )
    (tmp_path / "notes.txt").touch()
    assert "(the folder contains notes.txt)" in refusal(tmp_path)
    (tmp_path / "a.gguf").touch()
    assert "no safetensors weights, only GGUF (a.gguf)" in refusal(tmp_path)
    assert "a.gguf: not a folder" in refusal(tmp_path / "a.gguf")


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, SMALL)
    (tmp_path / "config.json").unlink()
    assert f"{tmp_path / 'config.json'}: does not exist" in refusal(tmp_path)


def test_image_settings_of_another_model_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, SMALL)
    (tmp_path / "preprocessor_config.json").write_text('{"patch_size": 16}')
    assert "preprocessor_config.json: patch_size is 16, but config.json has 14" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "tower.pth"])
def test_pickles_are_never_opened(tmp_path: Path, name: str) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "sprung"),)

    write_checkpoint(tmp_path, SMALL)
    (tmp_path / "model.safetensors").unlink()
    torch.save(Trap(), tmp_path / name)
    message = refusal(tmp_path)
    assert f"no safetensors weights, only {name}; qwen_vit never opens pickles" in message
    assert "Get the safetensors version" in message
    shutil.move(tmp_path / name, tmp_path / "model.safetensors")
    assert ": a zip archive or a pickle" in refusal(tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_a_lora_adapter_names_its_base_model(tmp_path: Path) -> None:
    base = {"base_model_name_or_path": "Qwen/Qwen2.5-VL-7B-Instruct"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(base))
    (tmp_path / "adapter_model.safetensors").touch()
    message = refusal(tmp_path)
    assert ": a LoRA adapter for 'Qwen/Qwen2.5-VL-7B-Instruct'" in message
    assert "Merge the adapter into the base model" in message


def test_several_files_without_an_index_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, SMALL, shards=2)
    (tmp_path / "model.safetensors.index.json").unlink()
    message = refusal(tmp_path)
    assert "contains 2 sets of weights (model-00001-of-00002.safetensors, model-00002-of" in message
    assert "or restore the index" in message


def test_a_missing_shard_is_named_with_its_index(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, SMALL, shards=2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    message = refusal(tmp_path)
    assert "model.safetensors.index.json: names the shard model-00002-of-00002" in message
    assert "does not exist. Download the shard" in message


@pytest.mark.parametrize(
    "shard",
    ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..\\x.safetensors",
     "C:x.safetensors", "", "..", ".safetensors", "x.bin", "x\0.safetensors", 3, None,
     "\ud800.safetensors", "x" * 250 + ".safetensors"],
)  # fmt: skip
def test_an_index_may_only_name_plain_basenames(tmp_path: Path, shard: Any) -> None:
    write_checkpoint(tmp_path, SMALL, shards=2)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["visual.patch_embed.proj.weight"] = shard
    path.write_text(json.dumps(index))
    message = refusal(tmp_path)
    assert f"{path}: lists 'visual.patch_embed.proj.weight' in {short_repr(shard)}" in message
    assert "Expected the plain name of a .safetensors file" in message


def test_a_shard_may_be_a_link_of_the_folder_s_owner(tmp_path: Path) -> None:
    """Users link 16 GB of weights into a new folder to change config.json."""
    folder, shard = tmp_path / "folder", "model-00001-of-00002.safetensors"
    tensors = write_checkpoint(folder, SMALL, shards=2)
    (folder / shard).rename(tmp_path / "elsewhere")
    (folder / shard).symlink_to(tmp_path / "elsewhere")
    assert_same_tensors(load_checkpoint(folder).tensors, tensors)
    (folder / shard).unlink()
    os.mkfifo(tmp_path / "fifo")
    (folder / shard).symlink_to(tmp_path / "fifo")
    assert "not a file" in refusal(folder)


@pytest.mark.parametrize("below", ["", "text_encoder"])
def test_a_link_out_of_the_hub_s_cache_is_refused(tmp_path: Path, below: str) -> None:
    snapshot = tmp_path / "models--x/snapshots/abc" / below
    shard = "model-00001-of-00002.safetensors"
    write_checkpoint(snapshot, SMALL, shards=2)
    (snapshot / shard).rename(tmp_path / "elsewhere")
    (snapshot / shard).symlink_to(tmp_path / "elsewhere")
    message = refusal(snapshot)
    assert (
        f"names the shard {shard}, which is a link out of the Hub's cache to {tmp_path}" in message
    )
    assert "qwen-vit download" in message


def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, SMALL, shards=2)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shard = index["weight_map"].pop(f"visual.{QKV}")
    path.write_text(json.dumps(index))
    assert f"{shard}: contains 'visual.{QKV}', but {path} does not list it there" in refusal(
        tmp_path
    )
    other = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"} - {shard}
    index["weight_map"][f"visual.{QKV}"] = other.pop()
    path.write_text(json.dumps(index))
    assert f"visual.{QKV}'" in refusal(tmp_path)
    path.write_text('{"weight_map": []}')
    assert f"{path}: weight_map is []. Expected an object" in refusal(tmp_path)


def safetensors_file(header: dict[str, Any] | bytes, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def entry(start: int, end: int, *, dtype: str = "F32", shape: object = None) -> dict[str, Any]:
    shape = [(end - start) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "(0 bytes): empty. Expected safetensors weights."),
        (b"\x01\x00", "(2 bytes): cut short inside its first 8 bytes"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
            ": a git-lfs pointer. Expected safetensors weights. Run",
        ),
        (b"\n<!DOCTYPE html><html></html>", ": an HTML or XML page. Expected"),
        (b"GGUF" + bytes(99), ": a GGUF file. Expected"),
        ((500).to_bytes(8, "little") + b"{}", "500 bytes, which is larger than the file"),
        (
            (2**63).to_bytes(8, "little") + b"{}",
            "corrupt, or not a safetensors file: it declares a header of 92",
        ),
        (safetensors_file(b"{} x"), "header: not JSON"),
        (safetensors_file(b"[]"), "header: the JSON is []. Expected an object"),
        (safetensors_file(b'{"a": 1, "a": 1}'), "header: the key 'a' appears twice"),
        (safetensors_file({"a": 1}), "the header's entry 'a' lacks a valid dtype"),
        (safetensors_file({"a": entry(4, 0)}), "the header's entry 'a' lacks a valid dtype"),
        (safetensors_file({"a": entry(0, 4, shape=[-1])}, bytes(4)), "the header's entry 'a' l"),
        (safetensors_file({"a": entry(0, 4, shape=[True])}, bytes(4)), "the header's entry 'a'"),
        (safetensors_file({"a": entry(0, 8, shape=[3])}, bytes(8)), "has 8 bytes, but its shape"),
        (safetensors_file({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "and 'b' overlap"),
        (safetensors_file({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)), "4 bytes before 'b'"),
        (
            safetensors_file({"a": entry(0, 8)}, bytes(5)),
            "truncated: the last 3 bytes of the tensors are missing",
        ),
        (
            safetensors_file({"a": entry(0, 8)}, bytes(9)),
            "the last 1 bytes belong to no tensor. Expected no hole.",
        ),
    ],
    ids=[
        *("empty", "short", "lfs", "html", "gguf", "longer-header", "giant-header", "torn-json"),
        *("list", "duplicate", "entry", "reversed", "negative", "bool", "size", "overlap"),
        *("hole", "truncated", "tail"),
    ],
)
def test_damaged_files_name_their_path_size_and_remedy(
    tmp_path: Path, raw: bytes, words: str
) -> None:
    write_checkpoint(tmp_path, SMALL)
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    message = refusal(tmp_path)
    assert message.startswith(f"{path} ({len(raw)} bytes)")
    assert words in message
    assert any(x in message for x in ("download MODEL)", "git lfs pull", "Use the safetensors"))


def test_a_header_length_whose_bytes_look_like_markup_is_accepted(tmp_path: Path) -> None:
    """The bytes of the length 0x3C20 are a space and "<"."""
    write_checkpoint(tmp_path, SMALL, prefix="")
    path = tmp_path / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    padded = raw[8 : 8 + length].ljust(0x3C20)
    path.write_bytes(safetensors_file(padded, raw[8 + length :]))
    assert len(load_checkpoint(tmp_path).tensors) == 42


def test_a_file_cut_between_opening_and_reading_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, SMALL)
    checkpoint = load_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: changed or became unreadable"):
        checkpoint.tensors[QKV]
