"""Test vLLM's encoder cache as files: complete entries of one model, checked before use."""

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_vit import VisionEncoder
from qwen_vit.errors import ArgumentError, ExportError, ImageError, QwenVitError
from qwen_vit.features import FailedImage, ImageFeatures
from qwen_vit.integrations.vllm import (
    CachedFeatures,
    read_ec_cache,
    to_vllm_cached,
    to_vllm_cached_chat_part,
    write_ec_cache,
)
from qwen_vit.integrations.vllm.ec_cache import check_ec_folder
from tests.support.fake_engines import EngineDeadError, FakeVllm, chat_request
from tests.support.features import random_features

WIDTH = 8
MODEL = {"weights_sha256": "5f" * 32, "config_sha256": "c0" * 32, "model": "tiny"}
NOBODY = 65534
ENTRY = "encoder_cache.safetensors"


PICTURES = [random_features("a/wide.jpg", (1, 4, 6)), random_features("tall", (1, 6, 4), seed=1)]
CLIP = random_features("clip", (2, 4, 4), seed=2)


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """Return a folder that every user may enter, because only one user may enter pytest's
    folders."""
    with TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def make_read_only(folder: Path) -> None:
    for path in (folder, *(each for each in folder.rglob("*") if each.is_dir())):
        path.chmod(0o555)


@contextmanager
def unprivileged() -> Iterator[None]:
    """Change to a user without write permission if root runs the tests."""
    was = os.getresuid()
    if was[0] == 0:
        os.setresuid(NOBODY, NOBODY, 0)
    try:
        yield
    finally:
        os.setresuid(*was)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_requests_that_name_entries_get_the_rows(tmp_path: Path, dtype: torch.dtype) -> None:
    made = [replace(each, embeds=each.embeds.to(dtype)) for each in (*PICTURES, CLIP)]
    entries = write_ec_cache(
        made[:2], tmp_path / "ec", MODEL, videos=made[2:], second_per_grid_ts=[0.5]
    )
    assert [entry.id for entry in entries] == ["a/wide.jpg", "tall", "clip"]
    chosen = [entries[2], entries[1], entries[0]]
    engine, request = FakeVllm(WIDTH, tmp_path / "ec"), to_vllm_cached(chosen)
    sent = chat_request(to_vllm_cached_chat_part(chosen))
    for each in (request, sent):
        assert each["multi_modal_data"]["video"]["second_per_grid_ts"].tolist() == [0.5]
    for found in (
        engine.generate({"prompt": "", **request}),
        engine.chat(to_vllm_cached_chat_part(chosen)),
    ):
        assert torch.equal(found["video"][0], made[2].embeds)
        assert torch.equal(found["image"][0], made[1].embeds)
        assert torch.equal(found["image"][1], made[0].embeds)


def test_a_chat_part_holds_no_embeddings(tmp_path: Path) -> None:
    entries = write_ec_cache(PICTURES, tmp_path / "ec", MODEL)
    parts = to_vllm_cached_chat_part(entries)
    assert parts[0]["image_embeds"] == {"image_grid_thw": [1, 4, 6]}
    assert len(json.dumps(parts)) < 400


def test_written_entries_are_read_back(tmp_path: Path) -> None:
    entries = write_ec_cache(
        PICTURES, tmp_path / "ec", MODEL, videos=[CLIP], second_per_grid_ts=[0.5]
    )
    cache = read_ec_cache(tmp_path / "ec", MODEL)
    assert dict(cache) == {entry.id: entry for entry in entries}
    assert "tall" in cache
    assert "short" not in cache
    with pytest.raises(KeyError, match=r"'short' is not in .*ec, which contains"):
        cache["short"]


def test_the_same_features_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "other"):
        write_ec_cache(PICTURES, tmp_path / name, MODEL)
    assert content(tmp_path / "one") == content(tmp_path / "other")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "one").rglob(ENTRY)}
    write_ec_cache(PICTURES, tmp_path / "one", MODEL)
    assert content(tmp_path / "one") == content(tmp_path / "other")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "one").rglob(ENTRY)} == before


def test_an_id_holds_model_setting_dtype_grid_and_rows(tmp_path: Path) -> None:
    def uuid(folder: str, made: ImageFeatures, **changes: str) -> str:
        [entry] = write_ec_cache([made], tmp_path / folder, {**MODEL, **changes})
        return entry.uuid

    one = PICTURES[0]
    other_row = replace(one, embeds=one.embeds.clone())
    other_row.embeds[-1, -1] += 1e-3
    uuids = [
        uuid("one", one),
        uuid("rows", other_row),
        uuid("grid", replace(one, grid_thw=(1, 6, 4))),
        uuid("dtype", replace(one, embeds=one.embeds.bfloat16())),
        uuid("weights", one, weights_sha256="00"),
        uuid("config", one, config_sha256="00"),
        uuid("quantization", one, quantization="fp8"),
    ]
    assert len(set(uuids)) == len(uuids)
    assert uuid("again", replace(one, id="another name"), model="another name") == uuids[0]
    models = [each.split("-")[0] for each in uuids]
    assert models[0] == models[1] == models[2]
    assert len(set(models)) == 5


def test_a_folder_without_a_quantization_is_of_an_exact_model(tmp_path: Path) -> None:
    """An earlier version wrote the folder."""
    [before, _] = write_ec_cache(PICTURES, tmp_path / "ec", MODEL)
    path = tmp_path / "ec" / "qwen_vit.json"
    settings = json.loads(path.read_text())
    del settings["quantization"]
    path.write_text(json.dumps(settings))
    [after, _] = write_ec_cache(PICTURES, tmp_path / "ec", {**MODEL, "quantization": None})
    assert after.uuid == before.uuid
    with pytest.raises(ExportError, match=r"is None, and the quantization of the features is fp8"):
        write_ec_cache(PICTURES, tmp_path / "ec", {**MODEL, "quantization": "fp8"})


def test_an_encoder_of_ours_names_its_own_model(tmp_path: Path) -> None:
    encoder = VisionEncoder.from_pretrained("tiny")
    [made] = encoder.encode(["tests/photographs/chelsea.png"])
    [entry] = write_ec_cache([made], tmp_path / "ec", encoder.metadata())
    stored = load_file(tmp_path / "ec" / entry.uuid / ENTRY)
    assert torch.equal(stored["ec_cache"], made.embeds)
    assert len(read_ec_cache(tmp_path / "ec", encoder.metadata())) == 1
    bounded = VisionEncoder.from_pretrained("tiny", max_pixels=50_176)
    with pytest.raises(ExportError, match=r"different model or setting: its config_sha256 is"):
        read_ec_cache(tmp_path / "ec", bounded.metadata())


OTHERS: dict[str, tuple[dict[str, str], Any]] = {
    "weights": ({"weights_sha256": "00"}, lambda rows: rows),
    "setting": ({"config_sha256": "00"}, lambda rows: rows),
    "dtype": ({}, lambda rows: rows.bfloat16()),
    "quantization": ({"quantization": "fp8"}, lambda rows: rows),
    "width": ({}, lambda rows: rows[:, :4]),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_folder_is_of_one_model(tmp_path: Path, other: str) -> None:
    """An engine would stop at rows of another width, and give wrong answers for another model's
    rows."""
    write_ec_cache(PICTURES, tmp_path / "ec", MODEL)
    before = content(tmp_path / "ec")
    changes, change = OTHERS[other]
    made = [replace(each, embeds=change(each.embeds)) for each in PICTURES]
    with pytest.raises(ExportError, match=r"a different model or setting: .* Pass anot"):
        write_ec_cache(made, tmp_path / "ec", {**MODEL, **changes})
    assert content(tmp_path / "ec") == before


BAD: dict[str, ImageFeatures | FailedImage] = {
    "a row too few": replace(PICTURES[0], embeds=PICTURES[0].embeds[:-1]),
    "another grid": replace(PICTURES[0], grid_thw=(1, 4, 4)),
    "a grid in time": CLIP,
    "NaN": replace(PICTURES[0], embeds=PICTURES[0].embeds * float("nan")),
    "integers": replace(PICTURES[0], embeds=PICTURES[0].embeds.int()),
    "float64": replace(PICTURES[0], embeds=PICTURES[0].embeds.double()),
    "failed": FailedImage("broken", ImageError("ends early")),
}


@pytest.mark.parametrize("name", BAD)
def test_one_bad_image_prevents_all_entries(tmp_path: Path, name: str) -> None:
    bad = BAD[name]
    some = [bad] if name == "float64" else [PICTURES[1], bad]
    with pytest.raises(QwenVitError):
        write_ec_cache(some, tmp_path / "ec", MODEL)
    assert not (tmp_path / "ec").exists()


@pytest.mark.parametrize(
    "metadata", [None, {}, {"weights_sha256": "5f"}, {**MODEL, "config_sha256": 1}]
)
def test_metadata_name_the_model(tmp_path: Path, metadata: Any) -> None:
    with pytest.raises(ArgumentError, match=r"metadata has no .*encoder.metadata\(\)"):
        write_ec_cache(PICTURES, tmp_path / "ec", metadata)
    assert not (tmp_path / "ec").exists()


def test_a_folder_with_other_files_is_not_changed(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(
        ExportError, match=r"the folder contains notes.txt \(1 in all\) and no qwen_vit.json"
    ):
        write_ec_cache(PICTURES, tmp_path, MODEL)
    assert content(tmp_path) == {"notes.txt": b"mine"}
    with pytest.raises(ExportError, match=r"notes.txt: not a folder"):
        write_ec_cache(PICTURES, tmp_path / "notes.txt", MODEL)
    with pytest.raises(ExportError, match=r"no-such: does not exist. Create the folder first"):
        write_ec_cache(PICTURES, tmp_path / "no-such" / "ec", MODEL)
    for name, words in (("notes.txt", "not a folder"), ("none", "does not exist"), ("", "without")):
        with pytest.raises(ExportError, match=rf"{words}.*Expected an encoder cache"):
            read_ec_cache(tmp_path / name)


def test_a_folder_that_another_process_is_initialising_is_accepted(tmp_path: Path) -> None:
    """The other process has a temporary file and no qwen_vit.json. A killed process also leaves
    such a file."""
    (tmp_path / "ec").mkdir()
    (tmp_path / "ec" / ".qwen_vit.json.5f.tmp").touch()
    assert write_ec_cache(PICTURES, tmp_path / "ec", MODEL)


@pytest.mark.parametrize("state", ["new", "empty", "in use"])
def test_a_folder_that_is_not_writable_is_named(open_folder: Path, state: str) -> None:
    """The folder's permissions forbid writing, for a user other than root."""
    folder = open_folder / "ec"
    if state == "in use":
        write_ec_cache(PICTURES[:1], folder, MODEL)
    elif state == "empty":
        folder.mkdir()
    make_read_only(open_folder)
    before = content(open_folder)
    with unprivileged(), pytest.raises(ExportError, match=r"could not be written \(Permission"):
        write_ec_cache(PICTURES, folder, MODEL)
    assert content(open_folder) == before


@pytest.mark.parametrize("is_there", [True, False])
def test_a_folder_without_write_permission_is_refused_in_advance(
    open_folder: Path, is_there: bool
) -> None:
    """The check runs before an export encodes an image."""
    if is_there:
        (open_folder / "ec").mkdir()
    make_read_only(open_folder)
    with unprivileged(), pytest.raises(ExportError, match=r"ec: .*ermission"):
        check_ec_folder(open_folder / "ec", MODEL, "float32")


def test_a_full_disk_leaves_no_incomplete_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM uses every file with the entry's name, so a file must be complete or absent."""
    write_ec_cache(PICTURES[:1], tmp_path / "ec", MODEL)
    before = content(tmp_path / "ec")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ExportError, match=r"safetensors: could not be written \(No space left"):
        write_ec_cache(PICTURES[1:], tmp_path / "ec", MODEL)
    assert content(tmp_path / "ec") == before


def test_files_can_be_read_by_the_engines_user(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        [entry, _] = write_ec_cache(PICTURES, tmp_path / "ec", MODEL)
    finally:
        os.umask(before)
    mode = (tmp_path / "ec" / entry.uuid / ENTRY).stat().st_mode
    assert stat.S_IMODE(mode) == 0o644


DAMAGES: dict[str, Any] = {
    "gone": lambda path: path.unlink(),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-4]),
    "no safetensors": lambda path: path.write_bytes(b"<html>"),
    "a row too few": lambda path: save_file({"ec_cache": torch.ones(5, WIDTH)}, path),
    "another width": lambda path: save_file({"ec_cache": torch.ones(6, 4)}, path),
    "another name": lambda path: save_file({"rows": torch.ones(6, WIDTH)}, path),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_refused_before_a_request_names_it(tmp_path: Path, damage: str) -> None:
    """vLLM's engine stops at each such request."""
    [entry, other] = write_ec_cache(PICTURES, tmp_path / "ec", MODEL)
    DAMAGES[damage](tmp_path / "ec" / entry.uuid / ENTRY)
    cache = read_ec_cache(tmp_path / "ec")
    with pytest.raises(ExportError, match=r"encoder_cache.safetensors.*Write the entry again"):
        cache[entry.id]
    assert cache[other.id] == other
    if damage in ("gone", "a row too few", "another width"):
        engine = FakeVllm(WIDTH, tmp_path / "ec")
        with pytest.raises(EngineDeadError):
            engine.generate({"prompt": "", **to_vllm_cached([entry])})
    write_ec_cache(PICTURES, tmp_path / "ec", MODEL)
    assert read_ec_cache(tmp_path / "ec")[entry.id] == entry


def test_the_newest_entry_of_an_image_is_used(tmp_path: Path) -> None:
    """A changed image has another entry after encoding."""
    [old] = write_ec_cache([PICTURES[0]], tmp_path / "ec", MODEL)
    changed = replace(PICTURES[0], embeds=PICTURES[0].embeds + 1)
    [new] = write_ec_cache([changed], tmp_path / "ec", MODEL)
    index = list((tmp_path / "ec" / "index").iterdir())
    index.sort(key=lambda path: new.uuid in path.read_text())
    for files, expected in ((index, new), (index[::-1], old)):  # the newest file counts
        for time, path in enumerate(files, start=1):
            os.utime(path, (time, time))
        assert read_ec_cache(tmp_path / "ec")[PICTURES[0].id] == expected


def line(**changes: Any) -> bytes:
    entry = {"id": "a", "uuid": f"{'0' * 16}-{'0' * 40}", "grid_thw": [1, 2, 2]}
    return json.dumps({**entry, "second_per_grid_t": None, **changes}).encode()


LINES = {
    "no JSON": b"{",
    "a path": line(uuid="../../etc"),
    "two sides": line(grid_thw=[1, 2]),
    "a side of 0": line(grid_thw=[1, 0, 2]),
    "no seconds": line(second_per_grid_t=0),
    "more": line(more=1),
    "no uuid": b'{"id": "a"}',
}


@pytest.mark.parametrize("name", LINES)
def test_a_damaged_index_is_named(tmp_path: Path, name: str) -> None:
    write_ec_cache(PICTURES, tmp_path / "ec", MODEL)
    (tmp_path / "ec" / "index" / "z.jsonl").write_bytes(line() + b"\n" + LINES[name] + b"\n")
    with pytest.raises(ExportError, match=r"z.jsonl, line 2.*Write the entry again"):
        read_ec_cache(tmp_path / "ec")


def test_unusual_ids_are_restored(tmp_path: Path) -> None:
    names = ("фото 🐈.jpg", "two\nlines", "\x85\u2028", os.fsdecode(b"\xe9"))
    odd = [replace(PICTURES[0], id=name) for name in names]
    written = write_ec_cache(odd, tmp_path / "ec", MODEL)
    assert list(read_ec_cache(tmp_path / "ec").values()) == written


def _write(folder: Path, number: int) -> None:
    made = [
        random_features(f"{number}-{i}", (1, 2, 4), seed=100 * number + i) for i in range(10, 30)
    ]
    write_ec_cache([*made, *PICTURES], folder, MODEL)


def test_many_processes_write_one_folder(tmp_path: Path) -> None:
    context = get_context("fork")
    writers = [context.Process(target=_write, args=(tmp_path / "ec", i)) for i in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 4
    cache = read_ec_cache(tmp_path / "ec", MODEL)
    assert len({entry.uuid for entry in cache.values()}) == len(cache) == 4 * 20 + 2
    assert not list((tmp_path / "ec").rglob("*.tmp"))


@pytest.mark.parametrize("adapter", [to_vllm_cached, to_vllm_cached_chat_part])
@pytest.mark.parametrize(
    "given", [[], PICTURES, CachedFeatures("a", "b", (1, 2, 2)), "a", {"a": 1}, None]
)
def test_arguments_that_are_not_entries_are_refused(adapter: Any, given: Any) -> None:
    with pytest.raises(ArgumentError, match=r"entries (is|contains)"):
        adapter(given)
