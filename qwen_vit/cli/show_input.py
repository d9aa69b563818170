"""Encode images or read stored features for `show`."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_vit.checkpoint.published import PACKAGED
from qwen_vit.cli.checks import check_one_picture
from qwen_vit.cli.console import print_log
from qwen_vit.cli.images import encode_one_by_one, list_images, load_encoder
from qwen_vit.config import VisionConfig
from qwen_vit.errors import TO_ENCODE, ArgumentError, ImageError, display_name, plural, with_options
from qwen_vit.feature_files.collection import Features
from qwen_vit.feature_files.file import FeatureFile
from qwen_vit.feature_files.read import FeatureFolder, load_features
from qwen_vit.feature_files.schema import RESUME
from qwen_vit.features import FailedImage, ImageFeatures
from qwen_vit.images.image import ImageLimits, ImageSource
from qwen_vit.images.pages import split_page_id
from qwen_vit.inputs.find import find_items
from qwen_vit.inputs.listing import Item
from qwen_vit.inputs.pages import as_page, page_items
from qwen_vit.inputs.read import read_item
from qwen_vit.show.views import WINDOW_PATCHES, check_point

__all__ = ["ShowInput", "encode_images", "read_stored"]

VIDEO_CODES = ("memory", "out-of-memory", "slow")  # their remedies name options such as --fps
PATCH_PX = 14  # in every published checkpoint


@dataclass(frozen=True, slots=True)
class ShowInput:
    """Hold the features to draw, and the images if they are available.

    Attributes:
        pictures: the images by id. For an image without an entry, `show` reads the file that the id
            names, if the file exists.
        source: the encoder of the features, such as "tiny, float32 on cpu".
        window: the side of an attention window, in patches.
        full_attention: the blocks with full attention, or None if they are unknown.
        total: the number of images without `limit`.
        has_images: whether the user passed --images.
    """

    features: list[ImageFeatures]
    pictures: dict[str, ImageSource]
    model: str
    source: str
    window: int = WINDOW_PATCHES
    patch_px: int = PATCH_PX
    full_attention: tuple[int, ...] | None = None
    depth: int | None = None
    failed: list[FailedImage] = field(default_factory=list)
    total: int = 0
    has_images: bool = False

    @property
    def is_random(self) -> bool:
        """Return whether the weights are random instead of trained."""
        return self.model in PACKAGED


def encode_images(
    inputs: Sequence[str], model: str, output: str, layer: int | None, limit: int, out: Path,
    *, point: tuple[float, float] | None = None, **loading: Any,
) -> ShowInput:  # fmt: skip
    """Encode the first `limit` images. Check after the first one that it contains `point`."""
    items = list_images(inputs, out)
    chosen = items[:limit]
    if limit > 1:
        check_one_picture(out, len(items))
    encoder = load_encoder(model, **loading)
    if layer is not None and layer >= encoder.config.depth:
        raise ArgumentError(
            f"--layer is {layer}",
            expected=f"a block from 0 to {encoder.config.depth - 1}",
            remedy="pass another --layer",
        )
    layers = () if layer is None else (layer,)
    encoded = encode_one_by_one(encoder, chosen, "skip", output=output, layers=layers)
    features: list[ImageFeatures] = []
    failed: list[FailedImage] = []
    for each, _ in encoded:
        if isinstance(each, FailedImage):
            failed.append(each)
            continue
        if point is not None and not features:
            check_point(point, each.id, each.size_px)
        features.append(each)
    videos = {item.id for item in chosen if item.is_video}
    if any(each.id in videos and each.code in VIDEO_CODES for each in failed):
        print_log(
            "`show` has no video options: pass them to `qwen-vit encode`, and show its feature file"
        )
    good = {each.id for each in features}
    config: VisionConfig = encoder.config
    return ShowInput(
        features,
        _pictures({item.id: item for item in chosen if item.id in good}),
        encoder.source.name,
        repr(encoder).removeprefix("VisionEncoder(").removesuffix(")").replace("'", ""),
        config.window_units * config.spatial_merge_size,
        config.patch_px,
        tuple(config.fullatt_block_indexes),
        config.depth,
        failed,
        len(items),
    )


def read_stored(
    path: str, ids: Sequence[str], limit: int, images: Sequence[str] = (), *,
    output: str | None = None,
) -> ShowInput:  # fmt: skip
    """Read the stored features of `ids`, or the first `limit`, and find the original images in
    `images`. Raise ArgumentError if the features have a different output from `output`."""
    stored = load_features(path)
    try:
        chosen: Features = stored[list(ids)] if ids else stored[:limit]
    except KeyError as error:
        raise ArgumentError(
            str(error.args[0]), remedy="pass an id of the stored features as --id"
        ) from None
    features = list(chosen)
    if not features:
        raise _no_features(stored, path)
    if output not in (None, features[0].output):  # a file has one output
        raise ArgumentError(
            f"no {output} features, only {features[0].output} features",
            name=path,
            remedy=with_options("encode again, and pass {}", ("output", output)) + TO_ENCODE,
        )
    pictures = _find_pictures([each.id for each in features], images) if images else {}
    metadata = stored.metadata
    return ShowInput(
        features, pictures, str(metadata.get("model")),
        f"{metadata.get('model')}, {metadata.get('dtype')}, from {display_name(path)}",
        total=len(ids) or len(stored), has_images=bool(images),
    )  # fmt: skip


def _no_features(stored: FeatureFile | FeatureFolder, path: str) -> ArgumentError:
    fact, remedy = "contains no features", "pass another file or folder"
    if isinstance(stored, FeatureFolder) and not stored.is_complete:
        fact, remedy = "its finished shards contain no features", RESUME
    elif isinstance(stored, FeatureFolder) and stored.errors:
        fact += f", because {plural(len(stored.errors), 'image')} failed"
        remedy = "fix the causes, and export again with --retry-failed"
    return ArgumentError(fact, name=path, remedy=remedy)


def _find_pictures(ids: Sequence[str], images: Sequence[str]) -> dict[str, ImageSource]:
    """Map each id to the image whose path shares the longest ending with the id.

    Of several such images, the function selects the only one with this id. It logs ids without an
    image, and ids for which several images remain.
    """
    wanted = {name: _parts(name) for name in ids}
    found: dict[str, list[Item]] = {name: [] for name in ids}
    length = dict.fromkeys(ids, 1)  # length of the longest common ending so far, in parts of a path
    listed = find_items(images)
    if any(split_page_id(name)[1] is not None for name in ids):
        listed = page_items(listed, ImageLimits())
    for item in listed:
        ends = [_parts(item.id), *([_parts(item.source)] if item.offset is None else [])]
        alike = {
            name: max(_common_length(parts, end) for end in ends) for name, parts in wanted.items()
        }
        most = max(alike.values())
        for name, common in alike.items():
            if common == most and common >= length[name]:
                found[name] = [*(found[name] if common == length[name] else []), item]
                length[name] = common
    for name, items in found.items():
        if len(exact := [item for item in items if item.id == name]) == 1:
            found[name] = exact
    places = Counter(
        (item.source, item.page) for items in found.values() for item in items if not item.offset
    )
    good = {
        name: items[0] for name, items in found.items()
        if len(items) == 1 and places[items[0].source, items[0].page] <= 1
    }  # fmt: skip
    missing = [name for name in ids if name not in good]
    if missing:
        print_log(
            f"found no file for {plural(len(missing), 'image')}, first {display_name(missing[0])}: "
            "--images contains no file, or several files, with this name"
        )
    videos = [name for name, item in good.items() if item.is_video]
    if videos:
        print_log(
            f"drew {plural(len(videos), 'video')} without frames, first "
            f"{display_name(videos[0])}: --images adds only images"
        )
    return _pictures(good)


def _common_length(left: Sequence[str], right: Sequence[str]) -> int:
    pairs = enumerate(zip(left, right, strict=False))
    shortest = min(len(left), len(right))
    return next((index for index, (one, other) in pairs if one != other), shortest)


def _parts(name: str) -> list[str]:
    """Return the parts of a path, from the last to the first."""
    return list(reversed(Path(name).parts))


def _pictures(items: Mapping[str, Item]) -> dict[str, ImageSource]:
    """Return the path or the bytes of each image. Omit videos, and log unreadable tar members."""
    found: dict[str, ImageSource] = {}
    for name, item in items.items():
        if item.is_video:
            continue
        try:
            if item.offset is None and item.page is None:
                found[name] = item.source
            else:
                found[name] = as_page(read_item(item, ImageLimits()), item)
        except ImageError as error:
            print_log(f"drew the features without their image: {error.text(in_shell=True)}")
    return found
