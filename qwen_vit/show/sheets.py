"""Draw one picture of each image's features."""

import io
from collections.abc import Iterable, Mapping
from pathlib import PurePath

from PIL import Image

from qwen_vit.errors import display_name, plural
from qwen_vit.images.image import ImageSource
from qwen_vit.show.draw import check_packages, sheet_png
from qwen_vit.show.views import DenseFeatures, FeatureView, FeatureViews, Point, view_features

__all__ = ["panel_titles", "show_features"]

MAX_NAME = 30  # characters of an image's name in a title


def show_features(
    features: Iterable[DenseFeatures],
    pictures: Mapping[str, ImageSource] | None = None,
    *,
    point: Point | None = None,
    layer: int | None = None,
    frame: int = 0,
) -> list[Image.Image]:
    """Draw each image's windows, feature map and, with a point, similarity map.

    >>> from qwen_vit import VisionEncoder
    >>> encoder = VisionEncoder.from_pretrained("tiny")
    >>> photographs = ["tests/photographs/chelsea.png", "tests/photographs/rocket.jpg"]
    >>> pictures = show_features(encoder.encode(photographs, output="patch"), point=(120, 100))
    >>> pictures[1].save("rocket-features.png")  # doctest: +SKIP

    Args:
        features: features from one encoder with one output, "merged" or "patch". The function
            fits the principal components to all feature maps together, so that colours are
            comparable.
        pictures: the images by id, if the ids are not the images' paths. For features with a
            `sha256`, the function logs a warning for an image file other than the encoded one.
        point: (x, y) in pixels of the first image. The function compares the cell at this point
            with every cell.
        layer: a block of `features.layers` to draw instead of the embeddings.
        frame: the index of a video's pair of frames.

    Returns:
        One picture per image, in order. A notebook displays a picture, and `save` writes it.

    Raises:
        ArgumentError: matplotlib (the extra `show`) is missing. There are no features, an image
            failed, the rows are not cells, the layer or the frame does not exist, or widths differ.
            The point is outside its image or in an image of unknown size, or an image of `pictures`
            does not fit its features.
        ImageError: qwen_vit cannot read an image of `pictures`.
    """
    check_packages("show", "matplotlib")
    found = view_features(features, pictures, point=point, layer=layer, frame=frame)
    return [
        Image.open(io.BytesIO(sheet_png(view, found, panel_titles(view, found))))
        for view in found.views
    ]


def panel_titles(view: FeatureView, views: FeatureViews) -> tuple[str, str, str]:
    rows, columns = view.colours.shape[:2]
    what = "image" if view.picture is not None else "features"
    is_cut = view.h % views.window or view.w % views.window
    marked = _shorten(display_name(PurePath(views.views[0].id).name))
    return (
        f"{what} and {plural(view.n_windows(views.window), 'attention window')}"
        + ", striped where the edge cuts them" * bool(is_cut),
        f"feature map, {columns} x {rows} cells: equal colours mark similar features",
        "similarity to the marked cell" + f" of {marked}" * (view.mark is None),
    )


def _shorten(name: str) -> str:
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 3]}..."
