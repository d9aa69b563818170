"""Reading a local checkpoint folder, refusing a bad one, and converting what was read."""

import copy
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_vit.checkpoint import published_tensors
from qwen_vit.checkpoint.convert import convert, rotary_permutation
from qwen_vit.checkpoint.load import Checkpoint, config_hash, load_checkpoint
from qwen_vit.checkpoint.published_tensors import weights_hash
from qwen_vit.checkpoint.tower_names import expected_tensors
from qwen_vit.common.strict_json import short_repr
from qwen_vit.config import ImageConfig, VisionConfig
from qwen_vit.errors import ArgumentError, CheckpointError
from qwen_vit.weight_format import padded_mlp_size, padded_pixel_size, pixel_weight_exponent
from tests.support.checkpoints import (
    SMALL,
    WIDE,
    random_tensors,
    split_qkv,
    write_checkpoint,
    write_weights,
)

IMAGE_CONFIG = ImageConfig.from_json({})
QKV = "blocks.0.attn.qkv.weight"
NORM_OF_A_BLOCK = re.compile(r"blocks\.\d+\.norm[12]\.weight")


def refusal(folder) -> str:
    """Return the message with which the folder is refused."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder)
    return str(caught.value)


def edit_weights(folder, edit) -> None:
    """Change the tensors of model.safetensors in place."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def assert_same_tensors(found, expected) -> None:
    assert set(found) == set(expected)
    for name in expected:
        assert found[name].dtype == expected[name].dtype
        assert torch.equal(found[name], expected[name]), name


# What is read


def test_the_published_tower_has_390_tensors():
    published = VisionConfig.from_json({"model_type": "qwen2_5_vl", "out_hidden_size": 3584})
    shapes = expected_tensors(published)
    assert len(shapes) == 390
    assert shapes["patch_embed.proj.weight"] == (1280, 3, 2, 14, 14)
    assert shapes["merger.mlp.2.weight"] == (3584, 5120)


def test_expected_tensors_are_those_of_transformers():
    modeling = pytest.importorskip("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
    theirs_config = modeling.Qwen2_5_VLVisionConfig(**SMALL.to_json())
    with torch.device("meta"):
        theirs = modeling.Qwen2_5_VisionTransformerPretrainedModel(theirs_config)
    shapes = {name: tuple(value.shape) for name, value in theirs.state_dict().items()}
    assert expected_tensors(SMALL) == shapes


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    "prefix", ["visual.", "model.visual.", "thinker.visual.", "", "base_model.model.visual."]
)
def test_every_key_layout_and_file_layout_reads_alike(tmp_path, prefix, shards):
    tensors = write_checkpoint(tmp_path, SMALL, prefix=prefix, shards=shards)
    checkpoint = load_checkpoint(tmp_path)
    assert_same_tensors(checkpoint.tensors, tensors)
    assert (checkpoint.config, checkpoint.prefix, checkpoint.dtypes) == (SMALL, prefix, ("BF16",))
    assert checkpoint.image_config.max_pixels == 12_845_056
    assert {path.name for path in checkpoint.files} >= {"config.json", "preprocessor_config.json"}
    assert weights_hash(checkpoint.tensors) == weights_hash(tensors)


@pytest.mark.parametrize("name", ["vision.safetensors", "tower.safetensors"])
def test_a_single_file_of_another_name_is_read(tmp_path, name):
    tensors = write_checkpoint(tmp_path, SMALL)
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    assert_same_tensors(load_checkpoint(str(tmp_path)).tensors, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_types_are_kept_until_conversion(tmp_path, dtype):
    tensors = write_checkpoint(tmp_path, SMALL, dtype=dtype)
    assert_same_tensors(load_checkpoint(tmp_path).tensors, tensors)


def test_image_settings_fall_back_to_the_processor_then_to_the_defaults(tmp_path):
    write_checkpoint(tmp_path, SMALL)
    (tmp_path / "processor_config.json").write_text('{"processor_class": "x"}')
    assert load_checkpoint(tmp_path).image_config.max_pixels == 12_845_056
    nested = {"image_processor": {"size": {"longest_edge": 50_176}}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert load_checkpoint(tmp_path).image_config.max_pixels == 50_176
    for name in ("processor_config.json", "preprocessor_config.json"):
        (tmp_path / name).unlink()
    assert load_checkpoint(tmp_path).image_config == ImageConfig.from_json({})


def test_a_snapshot_of_the_hub_cache_is_read_through_its_links(tmp_path):
    repo, snapshot = tmp_path / "models--x", tmp_path / "models--x/snapshots/abc"
    tensors = write_checkpoint(repo / "blobs", SMALL, shards=2)
    snapshot.mkdir(parents=True)
    for path in (repo / "blobs").iterdir():
        (snapshot / path.name).symlink_to(os.path.relpath(path, snapshot))
    assert_same_tensors(load_checkpoint(snapshot).tensors, tensors)


def test_shards_without_a_vision_tensor_need_not_be_there(tmp_path):
    tensors = write_checkpoint(tmp_path, SMALL, shards=2)
    index_path = tmp_path / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    index["weight_map"]["model.layers.0.weight"] = "model-00003-of-00003.safetensors"
    index_path.write_text(json.dumps(index))
    assert_same_tensors(load_checkpoint(tmp_path).tensors, tensors)


# What is refused: weights that do not fit


def test_missing_and_extra_tensors_are_counted_and_named(tmp_path):
    write_checkpoint(tmp_path, SMALL)

    def edit(tensors):
        del tensors["visual.blocks.1.norm2.weight"]
        tensors["visual.blocks.9.norm1.weight"] = torch.zeros(32)

    edit_weights(tmp_path, edit)
    message = refusal(tmp_path)
    assert f"{tmp_path} (model.safetensors): 1 of 42 vision tensors are missing" in message
    assert "(blocks.1.norm2.weight) and 1 are not known (blocks.9.norm1.weight)" in message
    assert "Use the config.json that belongs to the weights, or download" in message


def test_at_most_five_missing_tensors_are_named(tmp_path):
    write_checkpoint(tmp_path, SMALL)
    document = {"model_type": "qwen2_5_vl", "vision_config": replace(SMALL, depth=4).to_json()}
    (tmp_path / "config.json").write_text(json.dumps(document))
    message = refusal(tmp_path)
    assert "12 of 54 vision tensors are missing" in message
    assert message.count("blocks.3.") == 5
    assert "0 are not known (none)" in message


def test_a_single_unknown_tensor_is_refused(tmp_path):
    write_checkpoint(tmp_path, SMALL)
    edit_weights(tmp_path, lambda tensors: tensors.update({"visual.extra": torch.zeros(1)}))
    assert "0 of 42 vision tensors are missing (none) and 1 are not known (extra)" in refusal(
        tmp_path
    )


@pytest.mark.parametrize("prefix", ["visual.", "thinker.visual."])
def test_a_block_of_the_other_qkv_layout_is_refused(tmp_path, prefix):
    write_checkpoint(tmp_path, SMALL, prefix=prefix)

    def edit(tensors):
        if prefix == "visual.":
            for part in ("weight", "bias"):
                whole = tensors.pop(f"visual.blocks.2.attn.qkv.{part}")
                for letter, third in zip("qkv", whole.chunk(3), strict=True):
                    tensors[f"visual.blocks.2.attn.{letter}.{part}"] = third.clone()
        else:
            del tensors["thinker.visual.blocks.2.attn.k.bias"]

    edit_weights(tmp_path, edit)
    assert "blocks.2.attn.k.bias" in refusal(tmp_path)


def test_a_wrong_shape_names_both_shapes_and_the_file(tmp_path):
    write_checkpoint(tmp_path, SMALL)
    edit_weights(
        tmp_path, lambda tensors: tensors.update({"visual." + QKV: torch.zeros(96, 31).bfloat16()})
    )
    message = refusal(tmp_path)
    assert message.startswith(
        f"{tmp_path / 'model.safetensors'}: visual.{QKV}: has the shape [96, 31]. "
        "Expected [96, 32] from config.json. Use the config.json that belongs to the weights."
    )


@pytest.mark.parametrize(
    ("name", "dtype", "shown"),
    [
        (QKV, torch.float8_e4m3fn, "F8_E4M3"),
        (QKV, torch.int8, "I8"),
        (QKV, torch.float64, "F64"),
        (QKV + "_scale", torch.float32, "F32"),
        ("blocks.0.attn.qkv.qweight", torch.int32, "I32"),
        ("blocks.0.mlp.up_proj.weight.absmax", torch.float32, "F32"),
    ],
)
def test_quantised_towers_are_refused_by_name(tmp_path, name, dtype, shown):
    write_checkpoint(tmp_path, SMALL)
    edit_weights(
        tmp_path, lambda tensors: tensors.update({f"visual.{name}": torch.zeros(96, 32).to(dtype)})
    )
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path} (model.safetensors): 1 vision tensors are quantised")
    assert f"model.safetensors: visual.{name} is {shown})" in message
    assert "Expected F32, BF16, F16. Use a checkpoint that leaves the vision tower unq" in message


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("blocks.0.mlp.fc1.weight", "Qwen2-VL"),
        ("merger.ln_q.bias", "Qwen2-VL"),
        ("pos_embed.weight", "Qwen3-VL"),
        ("blocks.0.mlp.linear_fc1.weight", "Qwen3-VL"),
    ],
)
def test_towers_of_other_models_are_refused_by_name(tmp_path, name, model):
    write_checkpoint(tmp_path, SMALL)
    edit_weights(tmp_path, lambda tensors: tensors.update({f"visual.{name}": torch.zeros(4)}))
    message = refusal(tmp_path)
    assert f"holds the vision tower of {model} ({tmp_path / 'model.safetensors'}: " in message
    assert f": visual.{name}). Expected Qwen2.5-VL. Use transformers for it." in message


def test_two_towers_and_none_are_refused(tmp_path):
    write_checkpoint(tmp_path, SMALL)
    edit_weights(
        tmp_path,
        lambda tensors: tensors.update({"other.patch_embed.proj.weight": torch.zeros(1)}),
    )
    assert "holds 2 vision towers, under other., visual. Expected one. Save" in refusal(tmp_path)
    write_weights(tmp_path, {"lm_head.weight": torch.zeros(1)})
    assert f"{tmp_path}: no vision tower: none of its 1 tensors (lm_head.weight)" in refusal(
        tmp_path
    )


@pytest.mark.parametrize("shards", [1, 2])
def test_weights_that_are_not_finite_are_counted_and_their_file_named(tmp_path, shards):
    tensors = write_checkpoint(tmp_path, SMALL, prefix="", shards=shards)
    tensors[QKV][0, :3] = float("nan")
    tensors[QKV][1, 0] = -float("inf")
    write_weights(tmp_path, tensors, shards=shards)
    checkpoint = load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        convert(
            checkpoint.tensors, SMALL, IMAGE_CONFIG, torch.float32, locate=checkpoint.locate
        )  # fmt: skip
    assert ".safetensors (" in str(caught.value)
    assert f" bytes): {QKV}: 3 NaN and 1 infinite values of 3072" in str(caught.value)
    assert "download it again" in caught.value.remedy
    with pytest.raises(CheckpointError, match=f"^{QKV}: 3 NaN and 1 infinite"):
        convert(tensors, SMALL, IMAGE_CONFIG, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_one_value_that_is_not_finite_is_found_in_every_tensor(value, dtype):
    """Only what the tensors became is looked at, so none may lose it on the way: not in a product
    with a norm's weight of zero, not in another type, not in a sum."""
    for name, tensor in random_tensors(SMALL).items():
        tensors = random_tensors(SMALL)
        for norm in filter(NORM_OF_A_BLOCK.fullmatch, tensors):
            tensors[norm] = torch.zeros_like(tensors[norm])
        tensors[name].view(-1)[tensor.numel() // 2] = float(value)
        counts = "1 NaN and 0" if value == "nan" else "0 NaN and 1"
        words = rf"^{re.escape(name)}: {counts} infinite values of {tensor.numel()}\. Expected"
        with pytest.raises(CheckpointError, match=words):
            convert(tensors, SMALL, IMAGE_CONFIG, dtype)


def test_the_place_of_a_tensor_in_three_parts_names_each(tmp_path):
    write_checkpoint(tmp_path, SMALL, prefix="thinker.visual.")
    size = (tmp_path / "model.safetensors").stat().st_size
    place = load_checkpoint(tmp_path).locate(QKV)
    file = f"{tmp_path}/model.safetensors ({size} bytes): thinker.visual.blocks.0.attn"
    assert place == " with ".join(f"{file}.{letter}.weight" for letter in "qkv")


# What is refused: folders and files


def test_folders_without_weights_say_what_they_hold(tmp_path):
    assert "nothing: not a folder. Expected one with" in refusal(tmp_path / "nothing")
    assert "no weights (it holds nothing). Expected model.safetensors" in refusal(tmp_path)
    (tmp_path / "notes.txt").touch()
    assert "(it holds notes.txt)" in refusal(tmp_path)
    (tmp_path / "a.gguf").touch()
    assert "no safetensors weights, only GGUF (a.gguf)" in refusal(tmp_path)
    assert "a.gguf: not a folder" in refusal(tmp_path / "a.gguf")


def test_a_missing_config_is_named(tmp_path):
    write_checkpoint(tmp_path, SMALL)
    (tmp_path / "config.json").unlink()
    assert f"{tmp_path / 'config.json'}: not there" in refusal(tmp_path)


def test_image_settings_of_another_model_are_refused(tmp_path):
    write_checkpoint(tmp_path, SMALL)
    (tmp_path / "preprocessor_config.json").write_text('{"patch_size": 16}')
    assert "preprocessor_config.json: patch_size is 16, but config.json says 14" in refusal(
        tmp_path
    )


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "tower.pth"])
def test_pickles_are_never_opened(tmp_path, name):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    write_checkpoint(tmp_path, SMALL)
    (tmp_path / "model.safetensors").unlink()
    torch.save(Trap(), tmp_path / name)
    message = refusal(tmp_path)
    assert f"no safetensors weights, only {name}: pickles are never opened" in message
    assert "Get the safetensors version" in message
    shutil.move(tmp_path / name, tmp_path / "model.safetensors")
    assert ": a zip archive or a pickle" in refusal(tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_a_lora_adapter_names_its_base_model(tmp_path):
    base = {"base_model_name_or_path": "Qwen/Qwen2.5-VL-7B-Instruct"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(base))
    (tmp_path / "adapter_model.safetensors").touch()
    message = refusal(tmp_path)
    assert ": a LoRA adapter for 'Qwen/Qwen2.5-VL-7B-Instruct'" in message
    assert "Merge it into its base model" in message


def test_several_files_without_an_index_are_refused(tmp_path):
    write_checkpoint(tmp_path, SMALL, shards=2)
    (tmp_path / "model.safetensors.index.json").unlink()
    message = refusal(tmp_path)
    assert "holds 2 sets of weights (model-00001-of-00002.safetensors, model-00002-of" in message
    assert "or restore the index" in message


def test_a_missing_shard_is_named_with_its_index(tmp_path):
    write_checkpoint(tmp_path, SMALL, shards=2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    message = refusal(tmp_path)
    assert "model.safetensors.index.json: names the shard model-00002-of-00002" in message
    assert "does not exist. Download it" in message


@pytest.mark.parametrize(
    "shard",
    ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..\\x.safetensors",
     "C:x.safetensors", "", "..", ".safetensors", "x.bin", "x\0.safetensors", 3, None,
     "\ud800.safetensors", "x" * 250 + ".safetensors"],
)  # fmt: skip
def test_an_index_may_only_name_plain_basenames(tmp_path, shard):
    write_checkpoint(tmp_path, SMALL, shards=2)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["visual.patch_embed.proj.weight"] = shard
    path.write_text(json.dumps(index))
    message = refusal(tmp_path)
    assert f"{path}: lists 'visual.patch_embed.proj.weight' in {short_repr(shard)}" in message
    assert "Expected the plain name of a .safetensors file" in message


def test_a_shard_may_be_a_link_of_the_folder_s_owner(tmp_path):
    """People link 16 GB of weights to change config.json."""
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
def test_a_link_out_of_the_hub_s_cache_is_refused(tmp_path, below):
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


def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path):
    write_checkpoint(tmp_path, SMALL, shards=2)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shard = index["weight_map"].pop(f"visual.{QKV}")
    path.write_text(json.dumps(index))
    assert f"{shard}: holds 'visual.{QKV}', but {path} does not list it there" in refusal(tmp_path)
    other = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"} - {shard}
    index["weight_map"][f"visual.{QKV}"] = other.pop()
    path.write_text(json.dumps(index))
    assert f"visual.{QKV}'" in refusal(tmp_path)
    path.write_text('{"weight_map": []}')
    assert f"{path}: weight_map is []. Expected an object" in refusal(tmp_path)


def safetensors_file(header: dict | bytes, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def entry(start: int, end: int, *, dtype: str = "F32", shape: object = None) -> dict:
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
        (safetensors_file({"a": entry(0, 8)}, bytes(5)), "truncated: 3 bytes of 'a'"),
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
def test_damaged_files_name_their_path_size_and_remedy(tmp_path, raw, words):
    write_checkpoint(tmp_path, SMALL)
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    message = refusal(tmp_path)
    assert message.startswith(f"{path} ({len(raw)} bytes)")
    assert words in message
    assert any(x in message for x in ("download MODEL)", "git lfs pull", "Use the safetensors"))


def test_a_header_length_that_spells_markup_is_no_impostor(tmp_path):
    """A length of 0x3C20 starts like a space and "<"."""
    write_checkpoint(tmp_path, SMALL, prefix="")
    path = tmp_path / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    padded = raw[8 : 8 + length].ljust(0x3C20)
    path.write_bytes(safetensors_file(padded, raw[8 + length :]))
    assert len(load_checkpoint(tmp_path).tensors) == 42


def test_a_file_cut_between_opening_and_reading_is_named(tmp_path):
    write_checkpoint(tmp_path, SMALL)
    checkpoint = load_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: changed or became unreadable"):
        checkpoint.tensors[QKV]


# Copies, pickles and threads

IN_ANOTHER_PROCESS = """
import pickle, sys
checkpoint = pickle.load(sys.stdin.buffer)
tensor = checkpoint.tensors["merger.mlp.0.weight"]
print(checkpoint.weights_sha256(), len(checkpoint.tensors), tensor.float().sum().item())
"""


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))]
)
@pytest.mark.parametrize("when", ["before reading", "after reading", "after hashing"])
@pytest.mark.parametrize("prefix", ["visual.", "thinker.visual."])
def test_a_copy_or_a_pickle_reads_the_same_tensors(tmp_path, prefix, when, duplicate):
    """Once it could not be copied once it was read: safetensors' open files cannot be."""
    tensors = write_checkpoint(tmp_path, SMALL, prefix=prefix, shards=2)
    checkpoint = load_checkpoint(tmp_path)
    if when == "after reading":
        assert_same_tensors(checkpoint.tensors, tensors)
    if when == "after hashing":
        checkpoint.weights_sha256()
    twin = duplicate(checkpoint)
    assert_same_tensors(twin.tensors, tensors)
    assert_same_tensors(checkpoint.tensors, tensors)  # the first one still holds its files
    for field in ("config", "image_config", "files", "prefix", "dtypes"):
        assert getattr(twin, field) == getattr(checkpoint, field)
    assert twin.locate(QKV) == checkpoint.locate(QKV)
    assert twin.weights_sha256() == weights_hash(tensors)


def test_a_pickle_keeps_the_hash_that_was_computed(tmp_path, monkeypatch):
    tensors = write_checkpoint(tmp_path, SMALL)
    checkpoint = load_checkpoint(tmp_path)
    checkpoint.weights_sha256()
    twin = pickle.loads(pickle.dumps(checkpoint))
    monkeypatch.setattr(published_tensors, "weights_hash", None)  # calling it fails
    assert twin.weights_sha256() == weights_hash(tensors)


@pytest.mark.parametrize("given", [False, True])
def test_a_pickle_is_read_by_another_process(tmp_path, given):
    tensors = write_checkpoint(tmp_path, SMALL)
    checkpoint = load_checkpoint(tmp_path)
    if given:
        checkpoint = Checkpoint.from_tensors(tensors, SMALL)
    sums = checkpoint.tensors["merger.mlp.0.weight"].float().sum().item()
    done = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS],
        input=pickle.dumps(checkpoint),
        env={**os.environ, "PYTHONPATH": str(Path(published_tensors.__file__).parents[2])},
        capture_output=True,
        check=True,
    )
    assert done.stdout.decode().split() == [weights_hash(tensors), "42", str(sums)]


def test_two_threads_may_open_the_same_file_at_once(tmp_path, monkeypatch):
    tensors = write_checkpoint(tmp_path, SMALL)
    both, open_file = threading.Barrier(2, timeout=60), published_tensors.safe_open

    def open_together(*arguments, **options):
        both.wait()
        return open_file(*arguments, **options)

    monkeypatch.setattr(published_tensors, "safe_open", open_together)
    checkpoint = load_checkpoint(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: dict(checkpoint.tensors), range(2)))
    for read in found:
        assert_same_tensors(read, tensors)


# Tensors that someone else loaded


def given(prefix="visual.", **changes):
    """The tensors of a tower under a prefix, beside one of a language model."""
    tensors = random_tensors(SMALL)
    stored = split_qkv(tensors) if prefix == "thinker.visual." else tensors
    stored = {prefix + name: tensor for name, tensor in stored.items()}
    beside = {"lm_head.weight": torch.zeros(2)} if prefix else {}
    return stored | beside | {name.replace("__", "."): value for name, value in changes.items()}


def rejection(*arguments) -> CheckpointError:
    """The error with which given tensors are refused."""
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.from_tensors(*arguments)
    return caught.value


@pytest.mark.parametrize(
    "prefix", ["visual.", "model.visual.", "thinker.visual.", "", "base_model.model.visual."]
)
def test_given_tensors_make_the_checkpoint_that_their_files_make(tmp_path, prefix):
    tensors = write_checkpoint(tmp_path, SMALL, prefix=prefix)
    loaded = load_checkpoint(tmp_path)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    config = json.loads((tmp_path / "config.json").read_text())
    checkpoint = Checkpoint.from_tensors(given(prefix), config, settings)
    assert_same_tensors(checkpoint.tensors, tensors)
    for field in ("config", "image_config", "prefix", "dtypes"):
        assert getattr(checkpoint, field) == getattr(loaded, field)
    assert (checkpoint.files, checkpoint.locate(QKV)) == ((), QKV)
    assert checkpoint.weights_sha256() == loaded.weights_sha256()
    convert_both = (
        convert(each.tensors, SMALL, each.image_config, torch.bfloat16)
        for each in (checkpoint, loaded)
    )
    assert_same_tensors(*convert_both)


@pytest.mark.parametrize("image_config", [None, {}, IMAGE_CONFIG])
def test_configs_are_objects_or_what_their_files_say(image_config):
    for config in (SMALL, SMALL.to_json(), {"model_type": "qwen2_5_vl", **SMALL.to_json()}):
        checkpoint = Checkpoint.from_tensors(given(), config, image_config)
        assert (checkpoint.config, checkpoint.image_config) == (SMALL, IMAGE_CONFIG)


def test_given_parameters_and_views_will_do_and_nothing_is_copied():
    tensors = random_tensors(SMALL, dtype=torch.float32)
    views = {
        name: torch.stack([tensor, tensor], 1)[:, 0]  # of every other value
        for name, tensor in tensors.items()
        if tensor.ndim == 1
    }
    stored = {name: torch.nn.Parameter(tensor) for name, tensor in (tensors | views).items()}
    checkpoint = Checkpoint.from_tensors(stored, SMALL)
    assert not any(tensor.requires_grad for tensor in checkpoint.tensors.values())
    assert all(checkpoint.tensors[name].data_ptr() == t.data_ptr() for name, t in stored.items())
    assert checkpoint.weights_sha256() == weights_hash(tensors)
    state = convert(checkpoint.tensors, SMALL, IMAGE_CONFIG, torch.float32)
    assert_same_tensors(state, convert(tensors, SMALL, IMAGE_CONFIG, torch.float32))
    ours = {tensor.data_ptr() for tensor in state.values()}
    assert ours.isdisjoint(tensor.data_ptr() for tensor in stored.values())


def test_a_checkpoint_of_given_tensors_is_copied_and_pickled():
    checkpoint = Checkpoint.from_tensors(given("thinker.visual."), SMALL)
    for twin in (copy.deepcopy(checkpoint), pickle.loads(pickle.dumps(checkpoint))):
        assert_same_tensors(twin.tensors, checkpoint.tensors)
        assert twin.weights_sha256() == checkpoint.weights_sha256()


@pytest.mark.parametrize(
    ("changes", "name", "fact", "expected"),
    [
        (
            {"visual__blocks__9__norm1__weight": torch.zeros(32)},
            "tensors",
            "0 of 42 vision tensors are missing (none) and 1 are not known (blocks.9.norm1.weight)",
            "",
        ),
        (
            {"visual__merger__ln_q__weight": torch.zeros(31)},
            "visual.merger.ln_q.weight",
            "has the shape [31]",
            "[32] from config.json",
        ),
        (
            {"visual__merger__ln_q__weight": torch.zeros(32, dtype=torch.float64)},
            "tensors",
            "1 vision tensors are quantised or of another type (merger.ln_q.weight; "
            "visual.merger.ln_q.weight is torch.float64)",
            "F32, BF16, F16",
        ),
        (
            {"visual__blocks__0__attn__qkv__qweight": torch.zeros(4, dtype=torch.int32)},
            "tensors",
            "1 vision tensors are quantised or of another type (blocks.0.attn.qkv.qweight; "
            "visual.blocks.0.attn.qkv.qweight is torch.int32)",
            "F32, BF16, F16",
        ),
        (
            {"visual__pos_embed__weight": torch.zeros(4)},
            "tensors",
            "holds the vision tower of Qwen3-VL (visual.pos_embed.weight)",
            "Qwen2.5-VL",
        ),
        (
            {"patch_embed__proj__weight": torch.zeros(4)},
            "tensors",
            "holds 2 vision towers, under no prefix, visual.",
            "one",
        ),
    ],
)
def test_given_tensors_that_do_not_fit_are_named(changes, name, fact, expected):
    error = rejection(given(**changes), SMALL)
    assert (error.name, error.fact, error.expected) == (name, fact, expected)
    assert error.remedy


def test_a_given_tower_that_is_incomplete_or_of_another_config_is_refused():
    incomplete = given()
    del incomplete["visual.blocks.1.norm2.weight"]
    assert "1 of 42 vision tensors are missing (blocks.1.norm2.weight)" in str(
        rejection(incomplete, SMALL)
    )
    assert "12 of 54 vision tensors are missing" in str(rejection(given(), replace(SMALL, depth=4)))
    assert "no vision tower: none of its 1 tensors (a)" in str(
        rejection({"a": torch.ones(1)}, SMALL)
    )
    assert str(rejection(given(), {"model_type": "llava"})).startswith("config: model_type is 'll")
    other_images = {"patch_size": 16}
    assert "image_config: patch_size is 16, but config.json says 14" in str(
        rejection(given(), SMALL, other_images)
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([torch.zeros(1)], SMALL), r"tensors is \[.*\. Expected a mapping whose keys are strings"),
        (({0: torch.zeros(1)}, SMALL), r"tensors is \{0: .*\. Expected a mapping whose keys are"),
        ((given(), 3), r"config is 3\. Expected a mapping"),
        ((given(), SMALL, 3), r"image_config is 3\. Expected a mapping"),
        (
            (given(visual__merger__ln_q__weight=[1.0]), SMALL),
            r"tensors\['visual\.merger\.ln_q\.weight'\]: a list\. Expected a torch tensor",
        ),
        (
            (given(visual__merger__ln_q__weight=torch.zeros(32, device="meta")), SMALL),
            r"ln_q\.weight'\]: a tensor on the meta device\. Expected .* Load the weights first",
        ),
        (
            (given(visual__merger__ln_q__weight=torch.zeros(32).to_sparse()), SMALL),
            r"ln_q\.weight'\]: a tensor of the layout torch\.sparse_coo\. Expected",
        ),
    ],
)
def test_what_is_no_tensor_or_no_config_is_refused(arguments, words):
    with pytest.raises(ArgumentError, match=words):
        Checkpoint.from_tensors(*arguments)


# Conversion


def gate_and_up(gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Undo the loader's turns of 8 rows."""
    gate, up = gate_up.view(-1, 2, 8, *gate_up.shape[1:]).unbind(1)
    return gate.flatten(0, 1), up.flatten(0, 1)


def marked_tensors(config: VisionConfig) -> tuple[dict[str, torch.Tensor], int]:
    """Return tensors whose every element is another whole number from 1 up, exact in float32.

    The norms of the blocks are 1: they are folded into the weights that follow.
    """
    tensors, start = {}, 1
    for name, shape in expected_tensors(config).items():
        if NORM_OF_A_BLOCK.search(name):
            tensors[name] = torch.ones(shape)
            continue
        count = torch.Size(shape).numel()
        tensors[name] = torch.arange(start, start + count, dtype=torch.float32).view(shape)
        start += count
    assert start < 2**24
    return tensors, start - 1


def test_every_published_weight_lands_exactly_once_and_all_padding_is_zero():
    tensors, count = marked_tensors(SMALL)
    state = convert(tensors, SMALL, IMAGE_CONFIG, torch.float32)
    landed = torch.cat([v.flatten() for k, v in state.items() if "pixel" not in k])
    marks = landed[landed != 0].long().sort().values
    assert torch.equal(marks, torch.arange(1, count + 1))
    padding = SMALL.depth * (128 - 12) * (2 * 32 + 2 + 32)
    assert int((landed == 0).sum()) == padding


def test_padding_lies_behind_gate_behind_up_and_behind_down():
    tensors = random_tensors(SMALL, dtype=torch.float32)
    state = convert(tensors, SMALL, IMAGE_CONFIG, torch.float32)
    I, I_padded = 12, padded_mlp_size(SMALL)  # noqa: E741
    assert I_padded == 128
    gate, up = gate_and_up(state["blocks.0.mlp.gate_up.weight"])
    gain = tensors["blocks.0.norm2.weight"]
    assert torch.equal(gate[:I], tensors["blocks.0.mlp.gate_proj.weight"] * gain)
    assert torch.equal(up[:I], tensors["blocks.0.mlp.up_proj.weight"] * gain)
    gate_bias, up_bias = gate_and_up(state["blocks.0.mlp.gate_up.bias"])
    assert torch.equal(gate_bias[:I], tensors["blocks.0.mlp.gate_proj.bias"])
    assert torch.equal(up_bias[:I], tensors["blocks.0.mlp.up_proj.bias"])
    down = state["blocks.0.mlp.down.weight"]
    assert torch.equal(down[:, :I], tensors["blocks.0.mlp.down_proj.weight"])
    assert not gate[I:].any()
    assert not up[I:].any()
    assert not down[:, I:].any()
    assert padded_mlp_size(replace(SMALL, intermediate_size=128)) == 128
    assert padded_mlp_size(replace(SMALL, intermediate_size=3420)) == 3456


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_of_a_blocks_norms_are_multiplied_in_with_one_rounding(dtype):
    """W (g x) = (W g) x, so the norm that is left has no weight of its own."""
    tensors = random_tensors(SMALL, dtype=torch.bfloat16)
    tensors |= {
        name: torch.rand(32, generator=torch.Generator().manual_seed(3)).bfloat16() * 4 - 1
        for name in tensors
        if NORM_OF_A_BLOCK.search(name)
    }
    state = convert(tensors, SMALL, IMAGE_CONFIG, dtype)
    values = state["blocks.1.attn.qkv.weight"][2 * 32 :]  # V's rows keep their places
    expected = tensors["blocks.1.attn.qkv.weight"][2 * 32 :].double()
    expected = (expected * tensors["blocks.1.norm1.weight"].double()).to(dtype)
    assert torch.equal(values, expected)
    gate, _ = gate_and_up(state["blocks.1.mlp.gate_up.weight"])
    expected = tensors["blocks.1.mlp.gate_proj.weight"].double()
    expected = (expected * tensors["blocks.1.norm2.weight"].double()).to(dtype)
    assert torch.equal(gate[: len(expected)], expected)


def test_weights_that_overflow_with_their_norm_are_named():
    tensors = random_tensors(SMALL, dtype=torch.float32)
    tensors["blocks.0.norm1.weight"] = torch.full((32,), 1e30)
    tensors[QKV] = torch.full_like(tensors[QKV], 1e30)
    with pytest.raises(
        CheckpointError, match=r"qkv\.weight with .*norm1\.weight in .*32: 0 NaN and .* infinite"
    ):
        convert(tensors, SMALL, IMAGE_CONFIG, torch.float32)


def test_weights_that_overflow_in_bfloat16_are_named():
    tensors = random_tensors(SMALL, dtype=torch.float32)
    tensors["merger.mlp.2.bias"][3] = torch.finfo(torch.float32).max
    with pytest.raises(
        CheckpointError, match=r"^merger\.mlp\.2\.bias in torch\.bfloat16: 0 NaN and 1 "
    ):
        convert(tensors, SMALL, IMAGE_CONFIG, torch.bfloat16)
    convert(tensors, SMALL, IMAGE_CONFIG, torch.float32)


def test_the_permutation_makes_rotary_pairs_adjacent_and_keeps_attention_scores():
    tensors = random_tensors(WIDE, dtype=torch.float32)
    tensors["blocks.0.norm1.weight"] = torch.ones(WIDE.hidden_size)
    state = convert(tensors, WIDE, IMAGE_CONFIG, torch.float32)
    H, D = WIDE.num_heads, WIDE.head_dim
    assert sorted(rotary_permutation(D).tolist()) == list(range(D))
    assert rotary_permutation(D)[:4].tolist() == [0, 40, 1, 41]

    x = torch.randn(5, WIDE.hidden_size, generator=torch.Generator().manual_seed(1)).double()

    def project(source):
        weight, bias = source[QKV].double(), source["blocks.0.attn.qkv.bias"].double()
        return (x @ weight.T + bias).view(5, 3, H, D).unbind(1)

    q, k, v = project(tensors)
    q_new, k_new, v_new = project(state)
    # sums of the same 160 products in float64, in the same order: equal but for the BLAS' blocking
    assert torch.allclose(q_new[..., 0::2], q[..., : D // 2], rtol=0, atol=1e-13)
    assert torch.allclose(q_new[..., 1::2], q[..., D // 2 :], rtol=0, atol=1e-13)
    assert torch.allclose(v_new, v, rtol=0, atol=1e-13)
    scores, scores_new = (torch.einsum("nhd,mhd->hnm", *pair) for pair in ((q, k), (q_new, k_new)))
    assert torch.allclose(scores, scores_new, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_uint8_pixels_give_what_published_float_rows_give(dtype):
    """The folded weights equal the published ones to half a unit in their last place.

    Every product and sum below is in float64, so what differs is the rounding of pixel_weight
    (24 bits, or fp16's 11), each term's share being at most 2**-24 or 2**-11 of its size, and
    fp16's subnormal step of 2**-25 / 2**10; plus the bias's rounding to float32.
    """
    config = replace(SMALL, patch_px=14)
    tensors = random_tensors(config, dtype=torch.bfloat16)
    state = convert(tensors, config, IMAGE_CONFIG, dtype)
    pixels = torch.randint(0, 256, (7, 3, 14, 14), generator=torch.Generator().manual_seed(2))

    mean, std = (
        torch.tensor(values, dtype=torch.float64).view(3, 1, 1)
        for values in (IMAGE_CONFIG.image_mean, IMAGE_CONFIG.image_std)
    )
    frame = (pixels.double() / 255 - mean) / std
    rows = frame.unsqueeze(2).expand(-1, -1, 2, -1, -1).flatten(1)  # (N, 1176)
    truth = rows @ tensors["patch_embed.proj.weight"].double().flatten(1).T

    K = padded_pixel_size(config)
    assert (K, state["patch_embed.pixel_weight"].shape) == (640, (32, 640))
    centred = torch.nn.functional.pad((pixels - 128).double().flatten(1), (0, K - 588))
    weight = state["patch_embed.pixel_weight"].double() * 2.0 ** -pixel_weight_exponent(dtype)
    found = centred @ weight.T + state["patch_embed.pixel_bias"].double()
    assert not weight[:, 588:].any()

    bits = 24 if dtype == torch.float32 else 11
    bound = centred.abs() @ (weight.abs() * 2.0**-bits + 2.0**-35).T
    bound += state["patch_embed.pixel_bias"].double().abs() * 2.0**-24 + 1e-12
    print(f"{dtype}: largest error {(found - truth).abs().max():.2e}, bound {bound.max():.2e}")
    assert ((found - truth).abs() <= bound).all()
    row_weight = state["patch_embed.weight"].float() * 2.0 ** -pixel_weight_exponent(dtype)
    assert torch.equal(row_weight, tensors["patch_embed.proj.weight"].float().flatten(1))


def test_the_state_has_the_types_that_the_model_expects():
    state = convert(random_tensors(SMALL), SMALL, IMAGE_CONFIG, torch.bfloat16)
    others = {
        "patch_embed.weight": torch.float16,
        "patch_embed.pixel_weight": torch.float16,
        "patch_embed.pixel_bias": torch.float32,
    }
    for name, tensor in state.items():
        assert tensor.dtype == others.get(name, torch.bfloat16), name
        assert tensor.is_contiguous(), name
    float_state = convert(random_tensors(SMALL), SMALL, IMAGE_CONFIG, torch.float32)
    assert {tensor.dtype for tensor in float_state.values()} == {torch.float32}
    assert set(float_state) == set(state)
    in_block = {name.removeprefix("blocks.0.") for name in state if name.startswith("blocks.0.")}
    assert in_block == {
        "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias",
        "mlp.gate_up.weight", "mlp.gate_up.bias", "mlp.down.weight", "mlp.down.bias",
    }  # fmt: skip
    assert {name for name in state if not name.startswith("blocks.")} == {
        "patch_embed.weight", "patch_embed.pixel_weight", "patch_embed.pixel_bias",
        "merger.norm_weight", "merger.fc1.weight", "merger.fc1.bias", "merger.fc2.weight",
        "merger.fc2.bias",
    }  # fmt: skip


def test_the_state_outlives_the_file(tmp_path):
    tensors = write_checkpoint(tmp_path, SMALL)
    state = convert(load_checkpoint(tmp_path).tensors, SMALL, IMAGE_CONFIG, torch.bfloat16)
    path = tmp_path / "model.safetensors"
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    expected = convert(tensors, SMALL, IMAGE_CONFIG, torch.bfloat16)
    assert_same_tensors(state, expected)


@pytest.mark.parametrize(
    ("dtype", "words"),
    [
        (torch.float16, r"float16 is refused: .*overflow.*\. Use bfloat16 or float32"),
        (torch.float64, r"dtype is torch.float64\. Expected torch.bfloat16 or torch.float32"),
    ],
)
def test_other_types_are_refused_with_the_reason(dtype, words):
    with pytest.raises(ArgumentError, match=words):
        pixel_weight_exponent(dtype)
    with pytest.raises(ArgumentError, match=words):
        convert(random_tensors(SMALL), SMALL, IMAGE_CONFIG, dtype)


def test_patch_weights_too_large_to_fold_into_float16_are_refused():
    tensors = random_tensors(SMALL)
    tensors["patch_embed.proj.weight"][0, 0, 0, 0, 0] = 1e5
    with pytest.raises(
        CheckpointError, match=r"patch_embed\.proj\.weight: reaches 99840, .* Use dtype float32"
    ):
        convert(tensors, SMALL, IMAGE_CONFIG, torch.bfloat16)
    convert(tensors, SMALL, IMAGE_CONFIG, torch.float32)


# Hashes


def test_the_weights_hash_depends_on_name_type_shape_and_bytes_alone():
    base = {"a": torch.arange(4.0), "b": torch.ones(2)}
    same = {"b": torch.ones(4)[::2], "a": torch.arange(4.0)}
    assert weights_hash(base) == weights_hash(same)
    for other in (
        {**base, "a": torch.tensor([0.0, 1.0, 2.0, 3.5])},
        {**base, "a": torch.arange(4.0).view(2, 2)},
        {**base, "a": torch.arange(4.0).view(torch.int32)},
        {"c": base["a"], "b": base["b"]},
        {"a": base["a"]},
    ):
        assert weights_hash(other) != weights_hash(base)


def test_the_config_hash_ignores_spelling_but_no_value():
    base = config_hash(SMALL, IMAGE_CONFIG)
    respelt = {**SMALL.to_json(), "in_chans": 3, "rope_parameters": {"rope_theta": 10_000}}
    assert config_hash(VisionConfig.from_json(respelt), ImageConfig.from_json({})) == base
    assert config_hash(replace(SMALL, rope_theta=5e4), IMAGE_CONFIG) != base
    assert config_hash(SMALL, replace(IMAGE_CONFIG, max_pixels=4096)) != base
