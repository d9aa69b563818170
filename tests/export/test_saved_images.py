"""Test that `info`, `verify` and a dry run count the images that an interrupted export saved."""

import json
from pathlib import Path
from typing import Any, cast

import pytest

from qwen_vit.cli.text import estimate_text
from qwen_vit.export.estimate import estimate_export
from qwen_vit.export.options import ExportOptions
from qwen_vit.export.run import export_features
from qwen_vit.feature_files.describe import describe_features
from qwen_vit.feature_files.verify import verify_features
from tests.support.exports import files
from tests.support.fake_encoder import FakeEncoder
from tests.support.feature_file_cases import poison
from tests.support.interrupted_exports import Stop, segments


def interrupted(shard_size: int, after: int) -> ExportOptions:
    options, stop = ExportOptions(shard_size=shard_size), cast(Any, Stop(after))
    with pytest.raises(KeyboardInterrupt):
        export_features(FakeEncoder(), ["p"], "out", options, stop=stop)
    return options


def test_images_saved_in_the_first_shard_count_as_saved(
    hundred_images: Path, qwen_vit: Any
) -> None:
    """Saved images once counted as "to do", the rows had "None values, None", and `verify` called
    the folder damaged."""
    options = interrupted(200, 60)  # the encoder has finished one batch of 32 images
    info = qwen_vit("info", "out")
    assert info.code == 0
    assert "images          0 done, 32 saved in an open shard, 65 to do, 3 failed\n" in info.out
    assert "rows            128 of 16 values, float32\n" in info.out
    assert "None" not in info.out
    facts = json.loads(qwen_vit("info", "out", "--json").out)
    assert (facts["images_done"], facts["images_saved"], facts["images_to_do"]) == (0, 32, 65)
    assert facts["bytes"] == Path("out", *segments()).stat().st_size
    verify = qwen_vit("verify", "out")
    assert verify.code == 1
    assert verify.out == (
        "not complete: 32 saved in an open shard, 65 to do; 32 images, 128 rows read; all images "
        "compared with their digests; 3 images failed\n"
        "  1 shard missing: run the same `qwen-vit export` command again to write what is missing\n"
    )
    both = qwen_vit("info", "out", "--verify")
    assert (both.code, both.out) == (1, info.out + verify.out)
    before = files()
    for inputs in (["p"], None):
        found = estimate_export(FakeEncoder(), inputs, options, folder="out")
        assert (found.images, found.saved, found.to_do, found.failed) == (100, 32, 65, 3)
        text = estimate_text(found, Path("out"))
        assert text.startswith("images       32 saved in an open shard, 65 to do, 3 failed earlier")
    assert files() == before
    done = export_features(FakeEncoder(), ["p"], "out", options)
    assert (done.images, done.exported) == (100, 92)


def test_images_saved_after_a_finished_shard_count_as_saved(hundred_images: Path) -> None:
    options = interrupted(40, 78)
    facts, found = describe_features("out"), verify_features("out")
    dry = estimate_export(FakeEncoder(), None, options, folder="out")
    assert (facts["images_done"], facts["images_saved"], facts["images_to_do"]) == (37, 32, 25)
    assert (dry.done, dry.saved, dry.to_do, dry.failed) == (37, 32, 25, 6)
    assert (found.saved, found.to_do, found.images, found.is_damaged) == (32, 25, 69, False)
    assert facts["rows"] == found.rows
    assert facts["images_failed"] == {"truncated": 6}


def test_a_folder_without_a_saved_image_has_no_row_facts(
    hundred_images: Path, qwen_vit: Any
) -> None:
    interrupted(200, 60)
    Path("out", *segments()).unlink()
    info, verify = qwen_vit("info", "out"), qwen_vit("verify", "out")
    assert "rows            0\n" in info.out
    assert "None" not in info.out
    assert verify.out.startswith("not complete: 100 to do; 0 images, 0 rows read\n")


def test_a_damaged_saved_image_is_a_problem(hundred_images: Path, qwen_vit: Any) -> None:
    interrupted(200, 60)
    poison(Path("out", *segments()))
    done = qwen_vit("verify", "out")
    assert done.code == 1
    assert done.out.startswith("damaged: ")
    assert "segment-00000000-00000000.safetensors: 000.png: image_embeds contains NaN" in done.out
