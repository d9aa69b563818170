"""Compare our encoder, Hugging Face's encoder and float64 on a checkpoint and some images.

For every image, this module compares the processors' pixels, then the towers stage by stage: our
stages with Hugging Face's, and both with a float64 oracle. Hugging Face's results come from a run
on this machine or from a golden file. After an image, memory keeps only its results, unless its
stages go into a golden file or a report.
"""

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from qwen_vit.common.arguments import check_choice, check_paths, typed_repr
from qwen_vit.common.atomic_file import check_target, refuse_existing
from qwen_vit.compare.choices import ATTENTIONS, PROCESSORS, Attention, Processor
from qwen_vit.compare.golden import Case, Golden, load_golden, write_golden
from qwen_vit.compare.huggingface import (
    Processed,
    check_transformers,
    hf_tower,
    hf_trace,
    package_versions,
    process,
)
from qwen_vit.compare.measure import compare_case, compare_pixels
from qwen_vit.compare.result import Comparison, ImageComparison, Preprocessing, SampledFrames
from qwen_vit.compare.videos import digest_of, load_rows
from qwen_vit.config import Grid
from qwen_vit.encoder import VisionEncoder
from qwen_vit.errors import (
    ArgumentError,
    ComparisonError,
    ImageError,
    Wording,
    plural,
    with_options,
)
from qwen_vit.images.image import ImageLimits, RgbImage
from qwen_vit.images.load import load_image, read_image_file
from qwen_vit.images.patches import Patches, patchify
from qwen_vit.loading import is_video_file
from qwen_vit.video.load import load_video
from qwen_vit.video.options import Video, VideoOptions

__all__ = ["compare", "compare_checkpoint", "compare_with_golden"]


class _Prepared(NamedTuple):
    """Hold Hugging Face's results for an image or video and both sides' pixels, before our tower
    runs."""

    case: Case
    pixels: Sequence[Preprocessing]
    patches: Patches | None
    frames: SampledFrames | None = None


def compare_checkpoint(
    images: Sequence[str | os.PathLike[str]],
    *,
    model: str | os.PathLike[str],
    golden: Path | None = None,
    save_golden: Path | None = None,
    overwrite: bool = False,
    attention: Attention | None = None,
    processor: Processor = "pillow",
    keep_maps: bool = False,
    show_progress: bool = False,
    video: VideoOptions | None = None,
    **loading: Any,
) -> Comparison:
    """Load a checkpoint and compare it with a golden file or Hugging Face, for `qwen-vit compare`.

    `loading` takes further arguments for `VisionEncoder.from_pretrained`. Before it loads the
    checkpoint, the function reads the golden file, or checks that transformers is installed.
    """
    if golden is not None and save_golden is not None:
        raise ArgumentError(
            with_options("{} compares with a file and {} writes one", "golden", "save_golden"),
            expected="one of the two",
            remedy="omit the other",
        )
    if not images and golden is None:
        raise ArgumentError(
            Wording("images is empty", shell="IMAGES is empty"),
            remedy=with_options(
                "pass at least one image, or {}, whose file contains images", "golden"
            ),
        )
    stored = None if golden is None else load_golden(golden)
    if stored is None:
        check_transformers()
    encoder = VisionEncoder.from_pretrained(model, cuda_graphs=False, **loading)
    if stored is not None:
        return compare_with_golden(
            encoder, stored, images,
            attention=attention, processor=processor, keep_maps=keep_maps,
            show_progress=show_progress, video=video,
        )  # fmt: skip
    return compare(
        encoder, images,
        attention=attention or "sdpa", processor=processor, save_golden=save_golden,
        overwrite=overwrite, keep_maps=keep_maps, show_progress=show_progress, video=video,
    )  # fmt: skip


def compare(
    encoder: VisionEncoder,
    images: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    attention: Attention = "sdpa",
    processor: Processor = "pillow",
    save_golden: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    keep_maps: bool = False,
    show_progress: bool = False,
    video: VideoOptions | None = None,
) -> Comparison:
    """Run Hugging Face's tower and ours on images and videos, stage by stage.

    >>> from qwen_vit import VisionEncoder
    >>> encoder = VisionEncoder.from_pretrained("tiny", device="cpu", max_pixels=50_176)
    >>> compare(encoder, ["tests/photographs/chelsea.png"]).passed
    True

    The function skips and reports images that it cannot compare.

    Args:
        encoder: our encoder.
        images: paths of images and videos, or one path.
        attention: the attention implementation of Hugging Face's tower.
        processor: the processor of Hugging Face that computes an image's pixels for its tower. Our
            tower takes our own pixels if they agree, and the processor's pixels otherwise.
        save_golden: the file for Hugging Face's results, or None.
        overwrite: whether to replace an existing golden file.
        keep_maps: whether to keep the feature maps for a report.
        show_progress: whether to show a progress bar.
        video: the sampling of videos. The Pillow processor receives the resized frames.

    Returns:
        The differences of pixels and stages for each image. `passed` is the verdict.

    Raises:
        ArgumentError: An argument has the wrong type or value. transformers is not installed, is
            too old, or rejects `attention`.
        ExportError: `save_golden` exists and `overwrite` is False, is a symbolic link or a file of
            an export, has the suffix of another format, is not UTF-8 or cannot be written.
    """
    if not isinstance(encoder, VisionEncoder):
        raise ArgumentError(f"encoder is {typed_repr(encoder)}", expected="a VisionEncoder")
    check_choice("attention", attention, ATTENTIONS)
    check_choice("processor", processor, PROCESSORS)
    if video is not None and not isinstance(video, VideoOptions):
        raise ArgumentError(f"video is {typed_repr(video)}", expected="VideoOptions")
    images = check_paths("images", images)
    if save_golden is not None:
        save_golden = check_target("save_golden", save_golden)
        if not overwrite:
            refuse_existing(save_golden)
    check_transformers()
    config = encoder.config
    theirs = hf_tower(encoder.checkpoint.tensors, config, encoder.dtype, encoder.device, attention)
    live = _LiveReference(encoder, theirs, processor, video or VideoOptions())
    kept: list[Case] = []

    def results() -> Iterator[Outcome]:
        for name in images:
            try:
                case, pixels, patches, frames = live.case_of(name)
                result = compare_case(
                    encoder, case, pixels, patches, processor, keep_maps, frames=frames
                )
            except ImageError as error:
                yield name, error
                continue
            except torch.cuda.OutOfMemoryError:
                yield name, _out_of_memory(name, encoder)
                continue
            if save_golden is not None:
                kept.append(_with_errors(case, result))
            yield result

    done = _collected(_with_progress(results(), len(images), show_progress))
    reference = {
        "attention": attention,
        "processor": processor,
        "versions": package_versions(),
        "device": _device_name(encoder.device),
    }
    if save_golden is not None:
        if not kept:
            raise _none_to_save(save_golden, len(images), [error for _, error in done[1]])
        write_golden(save_golden, encoder, kept, reference, overwrite=overwrite)
    facts = {**_facts_of(encoder), "reference": reference, "golden": None}
    return Comparison(facts, *done)


@dataclass(frozen=True)
class _LiveReference:
    encoder: VisionEncoder
    tower: Any
    processor: Processor
    video: VideoOptions

    def case_of(self, name: str) -> _Prepared:
        if is_video_file(name):
            return self._case_of_video(name)
        config = self.encoder.image_config
        rgb, digest = _read(name)
        patches = patchify(rgb.picture, config, name=name)
        found = {
            each: process(rgb.pixels, config, each, name=name)
            for each in PROCESSORS
            if each in (self.processor, "pillow") or "torchvision" in package_versions()
        }
        pixels = [compare_pixels(each, patches, done, config) for each, done in found.items()]
        rows, grid = found[self.processor]
        size_px = (rgb.height, rgb.width)
        return _Prepared(self._traced(name, digest, size_px, rows, grid), pixels, patches)

    def _case_of_video(self, name: str) -> _Prepared:
        config = self.encoder.image_config
        loaded = load_rows(name, self.video, config)
        pixels = [compare_pixels("pillow", loaded.patches, loaded.processed, config)]
        case = self._traced(name, digest_of(name), loaded.size_px, *loaded.processed)
        return _Prepared(case, pixels, loaded.patches, loaded.frames)

    def _traced(
        self, name: str, digest: str, size_px: tuple[int, int], rows: Tensor, grid: Grid
    ) -> Case:
        return Case(name, digest, size_px, rows, grid, hf_trace(self.tower, rows, [grid]))


def _none_to_save(path: Path, n_images: int, errors: Sequence[ImageError]) -> ComparisonError:
    reasons = "; ".join(map(_without_remedy, errors[:3]))
    return ComparisonError(
        f"not saved: {n_images} of {plural(n_images, 'image')} failed ({reasons})",
        name=str(path),
        remedy="pass an image that can be compared",
    )


def compare_with_golden(
    encoder: VisionEncoder,
    golden: Golden,
    images: Sequence[str | os.PathLike[str]] = (),
    *,
    attention: Attention | None = None,
    processor: Processor = "pillow",
    keep_maps: bool = False,
    show_progress: bool = False,
    video: VideoOptions | None = None,
) -> Comparison:
    """Compare our tower with Hugging Face's results in a golden file, without transformers.

    With `images`, the function compares only these images, and also our own pixels. The golden file
    must contain each image, by SHA-256. `video` sets the sampling of videos. Without `images`, the
    function compares every image of the golden file, from the stored pixel values. If weights
    differ from the golden file's, the function still compares, and the result names these weights.
    The function skips and reports images that are unreadable or too large for the GPU's memory.
    """
    golden.check_fits(encoder, processor=processor, attention=attention)
    chosen = _chosen(golden, images)

    def results() -> Iterator[Outcome]:
        for index, name in chosen:
            if isinstance(index, ImageError):
                yield str(name), index
                continue
            case = golden.case(index)
            try:
                pixels, patches = [], None
                if name is not None:
                    patches = _patches_of(name, encoder, video or VideoOptions())
                    done = Processed(case.pixel_values, case.grid)
                    pixels = [compare_pixels(processor, patches, done, encoder.image_config)]
                yield compare_case(encoder, case, pixels, patches, processor, keep_maps)
            except ImageError as error:
                yield case.id, error
            except torch.cuda.OutOfMemoryError:
                yield case.id, _out_of_memory(case.id, encoder)

    done = _collected(_with_progress(results(), len(chosen), show_progress))
    facts = {
        **_facts_of(encoder),
        "reference": {
            key: golden.facts[key] for key in ("attention", "processor", "versions", "device")
        },
        "golden": {
            "path": str(golden.path),
            **{key: golden.facts[key] for key in ("model", "commit", "weights_sha256")},
            "changed_weights": golden.changed_weights(encoder),
        },
    }
    return Comparison(facts, *done)


def _patches_of(name: str, encoder: VisionEncoder, video: VideoOptions) -> Patches:
    if is_video_file(name):
        return load_video(Video.of(name, video, name), encoder.image_config).patches
    return patchify(load_image(name).picture, encoder.image_config, name=name)


def _with_errors(case: Case, result: ImageComparison) -> Case:
    trace = {name: values.cpu() for name, values in case.trace.items()}
    errors = {stage.name: stage.theirs for stage in result.stages}
    return Case(
        case.id, case.sha256, case.size_px, case.pixel_values.cpu(), case.grid, trace, errors
    )


def _chosen(
    golden: Golden, images: Sequence[str | os.PathLike[str]]
) -> list[tuple[int | ImageError, str | None]]:
    """Return a pair for each comparison: a case's index or an image's error, and the image file.

    Without `images`, the files are None.
    """
    if not images:
        return [(index, None) for index in range(len(golden))]
    chosen: list[tuple[int | ImageError, str | None]] = []
    for name in map(os.fsdecode, images):
        try:
            digest = digest_of(name) if is_video_file(name) else _read(name)[1]
        except ImageError as error:
            chosen.append((error, name))
            continue
        index = golden.index_of(digest)
        if index is None:
            known = ", ".join(image["id"] for image in golden.facts["images"])
            raise ComparisonError(
                f"not one of the images of {golden.path} ({known}): its sha256 is {digest[:16]}...",
                name=name,
                remedy="pass one of these images, or no image to compare all of them",
            )
        chosen.append((index, name))
    return chosen


Outcome = ImageComparison | tuple[str, ImageError]


def _with_progress(
    results: Iterator[Outcome], total: int, show_progress: bool
) -> Iterable[Outcome]:
    return tqdm(results, total=total, unit="image", file=sys.stderr, disable=not show_progress)


def _collected(
    results: Iterable[Outcome],
) -> tuple[tuple[ImageComparison, ...], tuple[tuple[str, ImageError], ...]]:
    found = list(results)
    good = tuple(each for each in found if isinstance(each, ImageComparison))
    return good, tuple(each for each in found if not isinstance(each, ImageComparison))


def _facts_of(encoder: VisionEncoder) -> dict[str, Any]:
    metadata = encoder.metadata()
    return {
        **{
            key: metadata[key]
            for key in ("model", "commit", "weights_sha256", "dtype", "quantization")
        },
        "device": _device_name(encoder.device),
        "versions": metadata["versions"],
        "vision_config": encoder.config.to_json(),
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _read(name: str) -> tuple[RgbImage, str]:
    data = read_image_file(name, name, ImageLimits())
    return load_image(data, name=name), sha256(data).hexdigest()


def _out_of_memory(name: str, encoder: VisionEncoder) -> ImageError:
    return ImageError(
        f"the comparison does not fit into the memory of {encoder.device}",
        name=name,
        remedy=with_options("lower {}, or free memory on this device", "max_pixels"),
        code="out-of-memory",
    )


def _without_remedy(error: ImageError) -> str:
    return str(ImageError(error.fact, name=error.name, code=error.code))
