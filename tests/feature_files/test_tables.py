"""Test stored features as NumPy, pandas, Parquet and datasets, in constant memory."""

import builtins
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import torch

from qwen_vit.common.installation import install_command
from qwen_vit.errors import ArgumentError, ExportError
from qwen_vit.export.options import ExportOptions
from qwen_vit.export.run import export_features
from qwen_vit.feature_files import tables
from qwen_vit.feature_files.collection import Features
from qwen_vit.feature_files.read import load_features
from qwen_vit.feature_files.write import write_features
from qwen_vit.features import FeatureOutput, ImageFeatures
from tests.support.export_stress import tiny_png
from tests.support.fake_encoder import FakeEncoder
from tests.support.features import METADATA, ODD_IDS, features_of
from tests.support.process_memory import memory_mb

IDS = list(ODD_IDS.values())
NUMBERS = ("grid_t", "grid_h", "grid_w", "height", "width")


def images(
    output: FeatureOutput = "merged", dtype: torch.dtype = torch.bfloat16
) -> list[ImageFeatures]:
    """Make features with odd ids and two layers. Every second image has no size."""
    made = torch.Generator().manual_seed(0)
    found = []
    for place, each in enumerate(features_of(*IDS, dtype=dtype)):
        n_patches = 4 * len(each.embeds)
        layers = {k: torch.randn(n_patches, 5, generator=made).to(dtype) for k in (7, 15)}
        is_mean = output == "mean"
        embeds = each.embeds.float().mean(0, keepdim=True) if is_mean else each.embeds
        found.append(
            replace(
                each, embeds=embeds, layers={} if is_mean else layers, output=output,
                size_px=(3 + place, 5) if place % 2 else (0, 0), notes=("EXIF", "grey"),
            )
        )  # fmt: skip
    return found


@pytest.fixture(params=["merged", "mean"])
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> Features:
    return load_features(write_features(tmp_path / "f", images(request.param), METADATA))


def test_rows_are_one_array_image_after_image(stored: Features) -> None:
    rows = stored.to_numpy()
    assert rows.dtype == np.float32
    expected = torch.cat([image.embeds.float() for image in stored])
    assert np.array_equal(rows, expected.numpy())
    chosen = stored[[3, 1]].to_numpy()
    assert np.array_equal(chosen, torch.cat([stored[i].embeds.float() for i in (3, 1)]).numpy())
    if stored[0].output == "mean":
        assert rows.shape == (len(stored), 6)
    assert np.array_equal(np.asarray(stored), rows)  # NumPy would make an array of the images
    assert np.asarray(stored[[3, 1]], np.float16).shape == chosen.shape
    with pytest.raises(ValueError, match="omit copy=False"):
        np.array(stored, copy=False)


def check_table(rows: list[dict[str, Any]], stored: Features) -> None:
    """Check that the rows of a table have the images' values, grids, and whole numbers or nulls."""
    assert len(rows) == len(stored)
    for row, image in zip(rows, stored, strict=True):
        assert (row["grid_t"], row["grid_h"], row["grid_w"]) == image.grid_thw
        size = None if image.size_px == (0, 0) else image.size_px
        assert size == (None if row["height"] is None else (row["height"], row["width"]))
        assert list(row["notes"]) == list(image.notes)
        embeds = image.numpy()
        expected = embeds[0] if image.output == "mean" else embeds
        assert np.array_equal(np.array(row["embeds"], np.float32), expected)
        assert [name for name in row if name.startswith("layer_")] == [
            f"layer_{block}" for block in sorted(image.layers, key=str)
        ]
        for block, values in image.layers.items():
            assert np.array_equal(np.array(row[f"layer_{block}"]), values.float().numpy())


def test_parquet_has_every_image_with_its_id(stored: Features, tmp_path: Path) -> None:
    path = stored.to_parquet(tmp_path / "t.parquet")
    table = pq.read_table(path)
    check_table(table.to_pylist(), stored)
    assert {str(table.schema.field(name).type) for name in NUMBERS} == {"int64"}
    names = [
        text if whole is None else os.fsdecode(whole)
        for text, whole in zip(table["id"].to_pylist(), table["id_bytes"].to_pylist(), strict=True)
    ]
    assert names == list(stored.ids)
    facts = json.loads(table.schema.metadata[b"qwen_vit"])
    assert (facts["model"], facts["output"]) == ("tiny", stored[0].output)
    assert not facts.keys() & {"ids", "images", "errors"}


def test_a_subset_is_written_in_its_order(stored: Features, tmp_path: Path) -> None:
    chosen = stored[[4, 0, 1]]
    check_table(pq.read_table(chosen.to_parquet(tmp_path / "t")).to_pylist(), chosen)


@pytest.mark.parametrize("batch_bytes", [1, 200, 10_000])
def test_batches_of_any_size_give_the_same_table(
    stored: Features, tmp_path: Path, batch_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "BATCH_BYTES", batch_bytes)
    path = stored.to_parquet(tmp_path / "t")
    check_table(pq.read_table(path).to_pylist(), stored)
    if batch_bytes == 1:
        assert pq.ParquetFile(path).num_row_groups == len(stored)


def test_a_failed_write_leaves_no_table(
    stored: Features, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t"
    path.write_text("old")
    with pytest.raises(ExportError, match=r"t: already exists\. .*overwrite=True to replace"):
        stored.to_parquet(path)
    monkeypatch.setattr(tables, "BATCH_BYTES", 1)
    real, seen = tables._record_batch, []

    def fail_late(*arguments: Any) -> Any:
        seen.append(arguments)
        if len(seen) == 3:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(tables, "_record_batch", fail_late)
    with pytest.raises(ExportError, match=r"t: could not be written .No space"):
        stored.to_parquet(path, overwrite=True)
    assert path.read_text() == "old"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["f", "t"]


@pytest.mark.parametrize("choose", [lambda stored: stored, lambda stored: stored[:1]])
def test_a_table_does_not_replace_its_own_features(
    stored: Features, tmp_path: Path, choose: Callable[[Features], Features]
) -> None:
    """The table once replaced the file, and the features were lost."""
    before = (tmp_path / "f").read_bytes()
    os.link(tmp_path / "f", tmp_path / "same")
    for name in ("f", "same"):
        with pytest.raises(ExportError, match=rf"{name}: to_parquet reads .* from this file"):
            choose(stored).to_parquet(tmp_path / name, overwrite=True)
    assert (tmp_path / "f").read_bytes() == before


def test_bfloat16_takes_about_its_own_size_in_parquet(tmp_path: Path) -> None:
    """A bfloat16 value as float32 has two zero bytes of four, and the file stores equal byte
    positions together."""
    made = torch.Generator().manual_seed(0)
    rows = torch.randn(4_096, 64, generator=made).bfloat16()
    image = ImageFeatures("a", rows, (1, 128, 128))
    stored = load_features(write_features(tmp_path / "f", image, METADATA))
    size = stored.to_parquet(tmp_path / "t").stat().st_size
    print(f"{size / rows.nbytes:.3f} of the rows' bytes")
    assert size < 1.02 * rows.nbytes


def test_memory_stays_flat_while_a_table_is_written(tmp_path: Path) -> None:
    """The table has 256 MB of rows, which are 512 MB as float32, in batches of 32 MB."""
    rows = torch.ones(2_048, 1_024, dtype=torch.bfloat16)
    grid = (1, 128, 64)
    file = write_features(
        tmp_path / "f", [ImageFeatures(f"{i}", rows, grid) for i in range(64)], METADATA
    )
    stored = load_features(file)
    stored[:8].to_parquet(tmp_path / "warm")
    before, peak = memory_mb(os.getpid())[0], 0.0
    real = tables._record_batch

    def watched(*arguments: Any) -> Any:
        nonlocal peak
        batch = real(*arguments)
        peak = max(peak, memory_mb(os.getpid())[0])
        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "_record_batch", watched)
        stored.to_parquet(tmp_path / "t")
    print(f"{peak - before:.0f} MB more")
    assert peak - before < 200  # a batch, its lists, and Arrow's pages


# pandas and datasets


def test_a_data_frame_has_a_row_for_each_id(stored: Features) -> None:
    pandas = pytest.importorskip("pandas", reason="pip install -e '.[pandas]'")
    frame = stored.to_pandas()
    assert list(frame.index) == list(stored.ids)
    assert {str(frame.dtypes[name]) for name in NUMBERS} == {"Int64"}
    rows = frame.astype(object).where(frame.notna(), None).to_dict("records")
    check_table(rows, stored)
    assert frame.loc[IDS[0], "height"] is pandas.NA
    for place, name in enumerate(IDS):  # also for unusual ids
        assert frame.loc[name, "grid_w"] == 2 * (place + 1)


def test_integers_of_parquet_are_integers_in_pandas(stored: Features, tmp_path: Path) -> None:
    """pandas converts a column with a missing value to floats, unless the file has a note."""
    pandas = pytest.importorskip("pandas", reason="pip install -e '.[pandas]'")
    frame = pandas.read_parquet(stored.to_parquet(tmp_path / "t"))
    assert {str(frame.dtypes[name]) for name in NUMBERS} == {"Int64"}
    assert frame["height"].isna().tolist() == [place % 2 == 0 for place in range(len(IDS))]


def test_integers_of_a_manifest_are_integers_in_pandas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p").mkdir()
    for number in range(3):
        Path(f"p/{number}.png").write_bytes(tiny_png(number))
    Path("p/x.png").write_bytes(b"")
    done = export_features(FakeEncoder(), ["p"], "out", ExportOptions())
    table = pq.read_table(done.manifest)
    numbers = [field.name for field in table.schema if field.type == pa.int64()]
    assert {"index", "row_begin", "tokens", "grid_h", "height"} <= {*numbers}
    assert table["tokens"].to_pylist() == [4, 4, 4, None]
    assert all(isinstance(value, int | None) for value in table["row_end"].to_pylist())
    digests = [image["rows_sha256"]["image_embeds"] for image in shard_images("out")]
    assert table["rows_sha256"].to_pylist() == [*digests, None]
    pandas = pytest.importorskip("pandas", reason="pip install -e '.[pandas]'")
    frame = pandas.read_parquet(done.manifest)
    assert {str(frame.dtypes[name]) for name in numbers} == {"Int64"}
    assert frame["tokens"].tolist()[:3] == [4, 4, 4]


def shard_images(folder: str) -> list[Any]:
    [shard] = Path(folder).glob("shard-*")
    return list(load_features(shard).metadata["images"])


def test_a_dataset_has_the_images_and_follows_the_file(stored: Features, tmp_path: Path) -> None:
    """datasets finds an earlier result by the path alone, unless the content is part of the key."""
    pytest.importorskip("datasets", reason="pip install -e '.[datasets]'")
    cache = tmp_path / "cache"
    made = stored.to_datasets(cache_dir=cache)
    check_table(
        [{k: v for k, v in row.items() if k not in ("id", "id_bytes")} for row in made], stored
    )
    assert made["id"][1] == IDS[1]
    assert os.fsdecode(made["id_bytes"][IDS.index(ODD_IDS["bytes"])]) == ODD_IDS["bytes"]
    chosen = stored[[2, 0]].to_datasets(cache_dir=cache)
    assert len(chosen) == 2
    other = [replace(image, embeds=image.embeds + 1) for image in stored]
    again = load_features(write_features(tmp_path / "f", other, METADATA, overwrite=True))
    check_table(
        [{k: v for k, v in row.items() if k not in ("id", "id_bytes")}
         for row in again.to_datasets(cache_dir=cache)], again,
    )  # fmt: skip


# Refusals


@pytest.mark.parametrize(
    ("call", "package", "extra"),
    [
        ("to_pandas", "pandas", "pandas"),
        ("to_parquet", "pyarrow", "arrow"),
        ("to_datasets", "datasets", "datasets"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    stored: Features, tmp_path: Path, call: str, package: str, extra: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    real = builtins.__import__

    def without(name: str, *arguments: Any, **more: Any) -> Any:
        if name.partition(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {package!r}")
        return real(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    arguments = (tmp_path / "t",) if call == "to_parquet" else ()
    words = rf"{package} cannot be imported .*\. Run {re.escape(install_command(extra))}"
    with pytest.raises(ArgumentError, match=words):
        getattr(stored, call)(*arguments)
    assert [each.name for each in tmp_path.iterdir()] == ["f"]


def test_features_without_an_image_are_refused(stored: Features, tmp_path: Path) -> None:
    nothing = stored[:0]
    for call in (nothing.to_numpy, lambda: nothing.to_parquet(tmp_path / "t")):
        with pytest.raises(ExportError, match=r"contains no image\. Choose at least one"):
            call()
    assert [each.name for each in tmp_path.iterdir()] == ["f"]


def test_a_data_frame_without_an_image_has_the_columns(stored: Features) -> None:
    pytest.importorskip("pandas", reason="pip install -e '.[pandas]'")
    frame = stored[:0].to_pandas()
    assert (len(frame), frame.index.name) == (0, "id")
    assert list(frame.columns) == [*NUMBERS, "notes", "embeds"]


def test_a_table_of_a_folder_has_only_the_good_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p").mkdir()
    for number in range(5):
        Path(f"p/{number}.png").write_bytes(b"" if number == 1 else tiny_png(number))
    options = ExportOptions(output="mean", shard_size=2)
    export_features(FakeEncoder(), ["p"], "out", options)
    stored = load_features("out")
    assert stored.to_numpy().shape == (4, 16)
    table = pq.read_table(stored.to_parquet("t"))
    assert table["id"].to_pylist() == ["0.png", "2.png", "3.png", "4.png"]
    check_table(table.to_pylist(), stored)
    assert [failed.id for failed in stored.errors] == ["1.png"]
