"""Test features as arrays, as maps, and in a notebook."""

import sys
from typing import Any

import numpy as np
import pytest
import torch

from qwen_vit.errors import ImageError
from qwen_vit.features import FailedImage, ImageFeatures

FEATURES = ImageFeatures(
    "a <b>.jpg", torch.arange(12.0).view(6, 2), (1, 4, 6), (57, 85), ("EXIF",),
    {3: torch.zeros(24, 4)},
)  # fmt: skip
FAILED = FailedImage(
    "x.jpg", ImageError("ends <early>", name="x.jpg", code="truncated"), "decode", (3, 5)
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_features_are_arrays_of_float32(dtype: torch.dtype) -> None:
    rows = torch.randn(6, 2).to(dtype)
    features = ImageFeatures("a", rows, (1, 4, 6))
    assert np.asarray(features).dtype == np.float32
    assert np.array_equal(np.asarray(features), rows.float().numpy())
    assert np.asarray(features, dtype=np.float64).dtype == np.float64
    assert np.stack([features, features]).shape == (2, 6, 2)
    assert (np.mean(features, axis=0) == rows.float().numpy().mean(axis=0)).all()


def test_an_array_shares_memory_unless_a_copy_is_needed() -> None:
    assert np.shares_memory(np.asarray(FEATURES), FEATURES.embeds.numpy())
    assert not np.shares_memory(np.array(FEATURES), FEATURES.embeds.numpy())
    half = ImageFeatures("a", FEATURES.embeds.bfloat16(), (1, 4, 6))
    if np.lib.NumpyVersion(np.__version__) >= "2.0.0":
        assert np.shares_memory(np.array(FEATURES, copy=False), FEATURES.embeds.numpy())
        with pytest.raises(ValueError, match="needs a copy"):
            np.array(half, copy=False)
        with pytest.raises(ValueError, match="copy"):
            np.array(FEATURES, dtype=np.float64, copy=False)


def test_a_failed_image_raises_its_error_instead_of_an_array() -> None:
    with pytest.raises(ImageError, match=r"x\.jpg: ends <early>"):
        np.asarray(FAILED)


def test_a_notebook_shows_a_table_whose_text_is_escaped() -> None:
    assert FEATURES._repr_html_() == (
        "<table><caption>a &lt;b&gt;.jpg</caption>"
        "<tr><th>embeds</th><td>6 x 2, float32, merged</td></tr>"
        "<tr><th>layers</th><td>3</td></tr>"
        "<tr><th>grid</th><td>1 x 4 x 6 patches (t, h, w)</td></tr>"
        "<tr><th>size</th><td>85 x 57 px</td></tr>"
        "<tr><th>notes</th><td>EXIF</td></tr></table>"
    )
    assert FAILED._repr_html_() == (
        "<table><caption>x.jpg</caption>"
        "<tr><th>failed</th><td>truncated: x.jpg: ends &lt;early&gt;</td></tr>"
        "<tr><th>stage</th><td>decode</td></tr><tr><th>size</th><td>5 x 3 px</td></tr></table>"
    )


@pytest.mark.parametrize("shown", [FEATURES, FAILED])
def test_the_notebook_output_needs_no_other_package(
    shown: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("matplotlib", "IPython", "jinja2", "pandas"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "<table>" in shown._repr_html_()


def test_the_repr_names_the_layers() -> None:
    assert repr(FEATURES).endswith("embeds=(6, 2) float32, grid_thw=(1, 4, 6), layers=[3])")
