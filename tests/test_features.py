"""Feature files: written whole or not at all, and read back as they were."""

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file

from qwen_vit.common import atomic_file as atomic_file_module
from qwen_vit.errors import ArgumentError, ExportError, ImageError
from qwen_vit.feature_files import write as write_module
from qwen_vit.feature_files import writer as writer_module
from qwen_vit.feature_files.read import load_features
from qwen_vit.feature_files.schema import ItemFacts
from qwen_vit.feature_files.write import write_features
from qwen_vit.feature_files.writer import FeatureWriter, RowTensor
from qwen_vit.features import UNKNOWN_SIZE, FailedImage, ImageFeatures
from tests.support.features import METADATA, ODD_IDS, features_of


def failed(name: str) -> FailedImage:
    return FailedImage(name, ImageError("ends early", name=name, code="truncated"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "features.safetensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_read_back(path: Path, dtype: torch.dtype) -> None:
    written = features_of("a.jpg", "b/c.png", "d", dtype=dtype)
    assert write_features(path, written, METADATA) == path
    read = load_features(path)
    assert len(read) == 3
    assert read.ids == ["a.jpg", "b/c.png", "d"]
    assert read.metadata["model"] == "tiny"
    assert read.metadata["schema_version"] == 2
    assert read.image_grid_thw.dtype == torch.int64
    for there, then in zip(read, written, strict=True):
        assert there.id == then.id
        assert there.grid_thw == then.grid_thw
        assert there.embeds.dtype == dtype
        assert torch.equal(there.embeds, then.embeds)


def test_features_of_two_types_are_stored_in_the_wider_one(path: Path) -> None:
    narrow, wide = features_of("a", dtype=torch.bfloat16), features_of("b")
    write_features(path, [*narrow, *wide], METADATA)
    for there, then in zip(load_features(path), [*narrow, *wide], strict=True):
        assert there.embeds.dtype == torch.float32
        assert torch.equal(there.embeds, then.embeds.float())


def test_the_file_has_the_three_documented_tensors(path: Path) -> None:
    written = features_of("a", "b", "c")
    write_features(path, [written[0], failed("x"), *written[1:]], METADATA)
    tensors = load_file(path)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == {
        "image_embeds": (torch.float32, (6, 6)),
        "image_grid_thw": (torch.int64, (3, 3)),
        "image_token_offsets": (torch.int64, (4,)),
    }
    assert tensors["image_token_offsets"].tolist() == [0, 1, 3, 6]
    assert tensors["image_grid_thw"].tolist() == [[1, 2, 2], [1, 2, 4], [1, 2, 6]]
    assert load_features(path).ids == ["a", "b", "c"]  # the failed one is left out


def test_the_same_features_give_the_same_bytes(tmp_path: Path) -> None:
    """safetensors writes several metadata keys in random order; one key of sorted JSON repeats."""
    texts = set()
    for attempt in range(4):
        shuffled = dict(sorted(METADATA.items(), reverse=attempt % 2 == 0))
        file = write_features(tmp_path / f"{attempt}", features_of("a", "b"), shuffled)
        texts.add(file.read_bytes())
    assert len(texts) == 1


def test_odd_ids_come_back_as_they_were(path: Path) -> None:
    ids = list(ODD_IDS.values())
    write_features(path, features_of(*ids), METADATA)
    read = load_features(path)
    assert read.ids == ids
    for index, name in enumerate(ids):
        assert len(read[name].embeds) == index + 1
    assert os.fsencode(read.ids[2]) == b"caf\xe9\xff.jpg"


@pytest.mark.parametrize("name", ["n" * 255, "--out", "два\nlines"])
def test_a_file_may_have_any_name_the_system_allows(tmp_path: Path, name: str) -> None:
    path = write_features(tmp_path / name, features_of("a"), METADATA)
    assert [each.name for each in tmp_path.iterdir()] == [name]
    assert load_features(path).ids == ["a"]


def test_others_may_read_the_file_as_the_umask_says(path: Path) -> None:
    """safetensors makes files that only their owner can read, whatever the umask."""
    for umask, mode in ((0o022, 0o644), (0o077, 0o600)):
        before = os.umask(umask)
        try:
            write_features(path, features_of("a"), METADATA)
        finally:
            os.umask(before)
        assert path.stat().st_mode & 0o777 == mode


# Refusals before anything is written


NAN = ImageFeatures("bad.jpg", torch.tensor([[1.0, float("nan")]]), (1, 2, 2))
INFINITE = ImageFeatures("bad.jpg", torch.tensor([[float("-inf"), 1.0]]), (1, 2, 2))
REFUSED = {
    "duplicate ids": (
        features_of("a", "b", "a"),
        METADATA,
        ("two images have the id 'a'. Name them differently",),
    ),
    "NaN": (
        [NAN],
        METADATA,
        ("'bad.jpg' (1 of 1 image) contain NaN or infinity", 'try dtype="float32"'),
    ),
    "infinity": (
        [*features_of("a", width=2), INFINITE],
        METADATA,
        ("'bad.jpg' (1 of 2 images) contain NaN or infinity",),
    ),
    "all failed": ([failed("a"), failed("b")], METADATA, ("no image", "all 2 failed")),
    "nothing": ([], METADATA, ("features is empty. Pass at least one image.",)),
    "two widths": (
        [*features_of("a"), *features_of("b", width=4)],
        METADATA,
        ("shapes (n, 4), (n, 6) do not fit into one file. Write one file for each",),
    ),
    "one axis": (
        [ImageFeatures("bad", torch.ones(4), (1, 2, 2))],
        METADATA,
        ("'bad' are torch.float32 of the shape (4,). Expected floating-point rows (n, width).",),
    ),
    "three axes": (
        [ImageFeatures("bad", torch.ones(1, 1, 4), (1, 2, 2))],
        METADATA,
        ("of the shape (1, 1, 4)",),
    ),
    "integers": (
        [*features_of("a"), ImageFeatures("bad", torch.ones(1, 6, dtype=torch.int32), (1, 2, 2))],
        METADATA,
        ("'bad' are torch.int32",),
    ),
    "an empty grid": (
        [ImageFeatures("bad", torch.ones(1, 6), (0, 0, 0))],
        METADATA,
        ("'bad' has 1 rows for a grid of (0, 0, 0). Expected a whole number of patches",),
    ),
    "NaN in the metadata": (features_of("a"), {"x": float("nan")}, ("be written as JSON (",)),
    "no JSON": (
        features_of("a"),
        {"x": object},
        ("its metadata cannot be written as JSON (", "Pass VisionEncoder.metadata()."),
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_would_be_no_good_file_is_refused_and_nothing_is_touched(
    path: Path, reason: str
) -> None:
    write_features(path, features_of("old"), METADATA)
    before = path.read_bytes()
    features, metadata, words = REFUSED[reason]
    with pytest.raises(ExportError) as caught:
        write_features(path, features, metadata)
    assert caught.value.name == str(path)
    assert caught.value.remedy
    for word in (f"{path}: ", *words):
        assert word in str(caught.value)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_header_that_no_reader_takes_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "MAX_HEADER_BYTES", 2_000)
    write_features(path, features_of("a"), METADATA)
    with pytest.raises(ExportError, match=r"its header would have \d+ bytes.*fewer images"):
        write_features(path, features_of("n" * 2_000), METADATA)
    assert load_features(path).ids == ["a"]


# Atomic


class FaultError(Exception):
    """Stands for what the package does not expect."""


def half_then(error: BaseException) -> Callable[[torch.Tensor], Any]:
    """A head, and then an error where rows should come."""

    def bytes_of(tensor: torch.Tensor) -> Any:
        raise error

    return bytes_of


FAULTS = [
    OSError(28, "No space left on device"),
    KeyboardInterrupt(),
    FaultError(),
]


@pytest.mark.parametrize("error", FAULTS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("step", ["save", "replace", "fsync"])
def test_a_write_that_fails_leaves_the_old_file_and_no_other(
    path: Path, error: BaseException, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_features(path, features_of("old"), METADATA)
    before = path.read_bytes()

    def fail(*_: Any) -> None:
        raise error

    if step == "save":
        monkeypatch.setattr(write_module, "bytes_of", half_then(error))
    else:
        monkeypatch.setattr(atomic_file_module.os, step, fail)
    expected = ExportError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as caught:
        write_features(path, features_of("new"), METADATA)
    monkeypatch.undo()
    if expected is ExportError:
        assert str(path) in str(caught.value)
        assert "No space left on device" in str(caught.value)
        assert "disk" in str(caught.value)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def small_writer(path: Path, head_bytes: int = 4096) -> FeatureWriter:
    return FeatureWriter(path, [RowTensor("image_embeds", 6, torch.float32)], head_bytes)


def add(writer: FeatureWriter, rows: torch.Tensor, **n_rows: int) -> None:
    """Append images of so many merged rows each, by their names."""
    items = [ItemFacts(name, (1, 2, 2 * count), count) for name, count in n_rows.items()]
    writer.add({"image_embeds": rows}, items)


@pytest.mark.parametrize("shape", [(3, 5), (3, 7), (2, 6), (6,), (1, 3, 6), ()])
def test_rows_of_another_width_do_not_go_into_a_growing_file(
    path: Path, shape: tuple[int, ...]
) -> None:
    """They were written, and the file's own header then promised other bytes."""
    with small_writer(path) as writer:
        add(writer, torch.ones(1, 6), a=1)
        with pytest.raises(ExportError, match=r"2 images from b on have .* Expected \(3, 6\)\."):
            add(writer, torch.ones(shape), b=1, c=2)
        add(writer, torch.ones(3, 6), d=2, e=1)
        writer.save({**METADATA, "output": "merged"})
    file = load_features(path)
    assert file.ids == ["a", "d", "e"]
    assert [len(features.embeds) for features in file] == [1, 2, 1]


@pytest.mark.parametrize("head_bytes", [8, 4096])
def test_a_disk_that_fills_up_at_the_head_is_named(
    path: Path, head_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows may still be in a buffer then, which seeking writes."""

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with small_writer(path, head_bytes) as writer:
        add(writer, torch.ones(1, 6), a=1)
        atomic = writer._growing[0].atomic
        monkeypatch.setattr(atomic, "file", Mock(wraps=atomic.file, seek=full))
        with pytest.raises(ExportError, match=r"features.safetensors: could not be .*No space"):
            writer.save(METADATA)
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("where", ["missing/f.safetensors", "file/f.safetensors", "n" * 256])
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ExportError, match="could not be written") as caught:
        write_features(tmp_path / where, features_of("a"), METADATA)
    assert str(tmp_path / where) in str(caught.value)
    assert ".tmp" not in str(caught.value)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_two_threads_that_write_one_file_leave_one_whole_file(path: Path) -> None:
    choices = [features_of(f"{i}", width=64) for i in range(4)]
    threads = [threading.Thread(target=write_features, args=(path, c, METADATA)) for c in choices]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert load_features(path).ids in [["0"], ["1"], ["2"], ["3"]]
    assert list(path.parent.iterdir()) == [path]


def test_merged_and_patch_features_do_not_share_a_file(tmp_path: Path) -> None:
    merged = ImageFeatures("a.jpg", torch.zeros(4, 8), (1, 4, 4))
    patch = ImageFeatures("b.jpg", torch.zeros(16, 8), (1, 4, 4))
    with pytest.raises(ExportError, match=r"4 patches per row and .b\.jpg. has 1"):
        write_features(tmp_path / "f.safetensors", [merged, patch], {})
    for features, expected in ((merged, 4), (patch, 1)):
        path = write_features(tmp_path / f"{expected}.safetensors", [features], {})
        assert load_features(path).metadata["patches_per_row"] == expected


def test_rows_that_do_not_fit_their_grid_are_refused(tmp_path: Path) -> None:
    wrong = ImageFeatures("a.jpg", torch.zeros(5, 8), (1, 4, 4))
    with pytest.raises(ExportError, match=r".a\.jpg. has 5 rows for a grid of"):
        write_features(tmp_path / "f.safetensors", [wrong], {})


@pytest.mark.parametrize(
    ("features", "metadata", "message"),
    [
        (None, {}, "features is one NoneType. Expected a list of ImageFeatures"),
        ([torch.zeros(1, 4)], {}, "features holds a Tensor. Expected ImageFeatures"),
        (torch.zeros(1, 4), {}, "features is one Tensor. Expected a list of ImageFeatures"),
        (
            [ImageFeatures(7, torch.zeros(1, 4), (1, 2, 2))],
            {},
            "the id 7 and the grid_thw .1, 2, 2",
        ),
        (
            [ImageFeatures("a", torch.zeros(1, 4), (2, 2))],
            {},
            "the grid_thw .2, 2.\\. Expected text",
        ),
        (
            [ImageFeatures("a", torch.zeros(1, 4), torch.tensor([1, 2, 2]))],
            {},
            "the grid_thw tensor.* Expected text and three whole numbers",
        ),
        ([ImageFeatures("a", torch.zeros(1, 4), None)], {}, "the grid_thw None. Expected text"),
        (
            [ImageFeatures("a", torch.zeros(1, 4), (1, 2, 2))],
            None,
            "metadata is None. Expected a mapping. Pass encoder.metadata",
        ),
    ],
)
def test_what_are_no_features_is_refused(
    tmp_path: Path, features: Any, metadata: Any, message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        write_features(tmp_path / "a.safetensors", features, metadata)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "embeds", [torch.zeros(1, 4).numpy(), torch.zeros(1, 4).to_sparse(), [[0.0] * 4]]
)
def test_embeddings_that_are_no_dense_tensor_are_refused(tmp_path: Path, embeds: Any) -> None:
    features = [ImageFeatures("a", embeds, (1, 2, 2))]
    with pytest.raises(ExportError, match=r"embeddings of 'a' are a .*\. Expected a dense torch"):
        write_features(tmp_path / "a.safetensors", features, {})


def test_a_choice_of_a_shard_takes_along_nothing_of_the_others(tmp_path: Path) -> None:
    """The sizes of other images, by their places; or a file that could not be read again."""
    images = [{"size_px": [number, 1], "notes": []} for number in range(3)]
    metadata = {**METADATA, "images": images, "errors": [{"id": "z"}], "ids": ["a", "b", "c"]}
    chosen = [ImageFeatures(name, torch.ones(1, 4), (1, 2, 2)) for name in ("c", "a")]
    again = load_features(write_features(tmp_path / "a.safetensors", chosen, metadata))
    assert (list(again.ids), again[0].size_px, list(again.errors)) == (["c", "a"], UNKNOWN_SIZE, [])


def test_means_of_images_of_any_size_go_into_one_file(tmp_path: Path) -> None:
    means = [
        ImageFeatures(name, torch.ones(1, 4), grid)
        for name, grid in (("a", (1, 2, 2)), ("b", (1, 4, 6)))
    ]
    metadata = {**METADATA, "output": "mean"}
    again = load_features(write_features(tmp_path / "a.safetensors", means, metadata))
    assert again["b"].grid_thw == (1, 4, 6)
    assert again.metadata["patches_per_row"] is None


def test_a_path_that_no_reader_opens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"not UTF-8\. Expected a path that safetensors can"):
        write_features(
            f"{tmp_path}/caf\udce9", [ImageFeatures("a", torch.ones(1, 4), (1, 2, 2))], {}
        )
    assert not list(tmp_path.iterdir())


def test_a_grid_may_be_a_list_as_json_gives_it(tmp_path: Path) -> None:
    features = [ImageFeatures("a", torch.ones(1, 4), [1, 2, 2])]  # type: ignore[arg-type]
    again = load_features(write_features(tmp_path / "a.safetensors", features, METADATA))
    assert again["a"].grid_thw == (1, 2, 2)


def test_features_may_come_from_a_stream(tmp_path: Path) -> None:
    stream = (ImageFeatures(name, torch.ones(1, 4), (1, 2, 2)) for name in "ab")
    assert len(load_features(write_features(tmp_path / "a.safetensors", stream, METADATA))) == 2
    with pytest.raises(ExportError, match="all 2 failed"):
        write_features(tmp_path / "b.safetensors", (failed(name) for name in "ab"), METADATA)
    with pytest.raises(ArgumentError, match="path is a NoneType"):
        load_features(None)  # type: ignore[arg-type]


def test_a_file_that_appeared_meanwhile_is_kept(tmp_path: Path) -> None:
    """Two commands looked whether it is there, and the second one's result replaced the first's."""
    path, features = tmp_path / "a.safetensors", [ImageFeatures("a", torch.ones(1, 4), (1, 2, 2))]
    path.write_text("of another")
    with pytest.raises(ExportError, match=r"a.safetensors: exists\. Expected a new name"):
        write_features(path, features, METADATA, overwrite=False)
    assert path.read_text() == "of another"
    assert [each.name for each in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_disk_without_links_takes_a_new_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", Mock(side_effect=OSError(errno.EPERM, "no links")))
    path, features = tmp_path / "a.safetensors", [ImageFeatures("a", torch.ones(1, 4), (1, 2, 2))]
    write_features(path, features, METADATA, overwrite=False)
    assert load_features(path).ids == ["a"]


def test_a_link_keeps_its_place(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "target")
    with pytest.raises(ExportError, match=r"link: a symbolic link\. .*target"):
        write_features(link, [ImageFeatures("a", torch.ones(1, 4), (1, 2, 2))], METADATA)
    assert link.is_symlink()
    assert not (tmp_path / "target").exists()
