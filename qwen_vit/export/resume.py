"""Read the model and options of an existing export, so that a user can resume it without repeating
them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from qwen_vit.common.store_path import AnyPath, PathOrAddress, as_path
from qwen_vit.errors import ArgumentError, ExportError
from qwen_vit.export.folder import OTHER_FOLDER
from qwen_vit.export.options import ExportOptions
from qwen_vit.export.plan import check_is_export
from qwen_vit.export.settings import SETTINGS, read_description
from qwen_vit.export.store_folder import as_folder
from qwen_vit.export.versions import video_policy_of
from qwen_vit.images.image import EXIF_IGNORED, ImageLimits
from qwen_vit.video.options import VideoLimits, VideoOptions

__all__ = ["StartOptions", "options_or_recorded", "read_start_options"]


@dataclass(frozen=True, slots=True)
class StartOptions:
    """Describe the model and options with which an export started.

    Attributes:
        model: a repository, a folder, or "tiny".
        loading: other arguments of `VisionEncoder.from_pretrained`.
        options: the options that determine the shards' content.
    """

    model: str
    loading: dict[str, Any]
    options: ExportOptions


def options_or_recorded(
    options: ExportOptions | None,
    inputs: Sequence[str | os.PathLike[str]] | None,
    folder: PathOrAddress | None,
) -> ExportOptions:
    """Return `options`. Without them and without inputs, return the options of the export to
    resume. Without options, but with inputs, return `ExportOptions()`."""
    if options is None and inputs is None and folder is not None:
        return read_start_options(as_path(folder, "folder")).options
    return options or ExportOptions()


def read_start_options(folder: AnyPath) -> StartOptions:
    """Return the model and options of the export in a folder.

    >>> start = read_start_options(Path("features"))  # doctest: +SKIP
    >>> encoder = load_encoder(start.model, start.options, **start.loading)  # doctest: +SKIP
    >>> export_features(encoder, None, "features", start.options)  # doctest: +SKIP
    """
    check_is_export(folder)
    stored = read_description(as_folder(folder))
    try:
        policy, inputs = stored["image_policy"], stored.get("inputs", {})
        known = {field.name for field in fields(ImageLimits)}
        bounds: dict[str, Any] = {
            # JSON turned tuples into lists
            name: tuple(value) if isinstance(value, list) else value
            for name, value in stored["limits"].items()
            if name in known
        }
        limits = ImageLimits(**bounds, allow_urls=tuple(inputs.get("allow_urls", ())))
        video = video_policy_of(stored)
        video.pop("decoder", None)
        as_video, video_limits = video.pop("as_video", False), video.pop("limits", {})
        options = ExportOptions(
            stored["output"], stored["dtype"], stored["shard_size"], limits=limits,
            normalize=stored["normalize"], layers=tuple(stored["layers"]),
            column=inputs.get("column"), id_column=inputs.get("id_column"),
            exif="ignore" if policy.get("orientation") == EXIF_IGNORED else "apply",
            video=VideoOptions(**video), video_limits=VideoLimits(**video_limits),
            as_video=as_video, pages=inputs.get("pages", "first"),
        )  # fmt: skip
        loading = {
            "revision": stored["commit"],
            "device": stored["device"],
            "quantization": stored.get("quantization"),
            "min_pixels": policy["min_pixels"],
            "max_pixels": policy["max_pixels"],
        }
        model = stored["model"]
    except (ArgumentError, KeyError, TypeError, AttributeError) as error:
        reason = error.fact if isinstance(error, ArgumentError) else error
        raise ExportError(
            f"its settings cannot be read ({reason})",
            name=str(folder / SETTINGS),
            remedy=OTHER_FOLDER,
        ) from None
    beside = os.path.join(str(inputs.get("folder", "")), model)
    return StartOptions(beside if os.path.isdir(beside) else model, loading, options)
