"""`VisionEncoder`: images in, the embeddings that the language model sees out."""

import io
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, NamedTuple, Self, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from qwen_vit.checkpoint.convert import convert
from qwen_vit.checkpoint.hub import Source, find_checkpoint
from qwen_vit.checkpoint.load import Checkpoint, config_hash, load_checkpoint
from qwen_vit.common.prefetch import Job, pack, thread_count, work_ahead
from qwen_vit.config import Grid, ImageConfig, VisionConfig
from qwen_vit.errors import ArgumentError, CheckpointError, ExportError, ImageError
from qwen_vit.features import ImageFeatures, dtype_name
from qwen_vit.graphs import MAX_BUCKET, MIN_STEP, GraphRunner
from qwen_vit.images.load import ArrayLayout, ImageLimits, ImageSource, RgbImage, load_image
from qwen_vit.images.patches import Patches, patchify
from qwen_vit.kernels.attention import HEAD_DIMS
from qwen_vit.layout import check_grids
from qwen_vit.model import Output, VisionTower, plan_layout
from qwen_vit.weight_format import pixel_weight_exponent

__all__ = ["VisionEncoder"]

logger = logging.getLogger("qwen_vit")

OnError = Literal["raise", "skip"]

# Patches in one forward pass. More gain nothing on a GPU; an image may be larger on its own.
TOKEN_BUDGET = {"cuda": MAX_BUCKET, "cpu": 4_096}
# Batches that are packed together. On a CPU one, as it comes: there an image's bits may depend on
# its company, and the same images shall give the same ones.
WINDOW = {"cuda": 4, "cpu": 1}
BATCHES_AHEAD = 2  # of the GPU: what is sent ahead waits in pinned memory
IMAGES_IN_A_WINDOW = 1_024  # so that a long run of images that fail is reported, too
MIN_CAPABILITY = (8, 0)
# Each of these is one image; iterating over it would give its characters, bytes or rows.
ONE_IMAGE = (
    str,
    os.PathLike,
    bytes,
    bytearray,
    memoryview,
    Image.Image,
    np.ndarray,
    Tensor,
    Patches,
    io.IOBase,
)


class _Loaded(NamedTuple):
    """One image on its way: its patches, or what went wrong."""

    features: ImageFeatures
    patches: Patches | None

    @property
    def n_patches(self) -> int:
        return 0 if self.patches is None else len(self.patches.pixels)

    @property
    def n_bytes(self) -> int:
        return 0 if self.patches is None else self.patches.pixels.nbytes


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class VisionEncoder:
    """The vision encoder of Qwen2.5-VL, without the language model.

    >>> encoder = VisionEncoder.from_pretrained("tiny")
    >>> [features] = encoder.encode(["tests/images/rocket.jpg"])
    >>> features.embeds.shape, features.grid_thw
    (torch.Size([345, 192]), (1, 30, 46))

    Build one with `from_pretrained`. Source: "Qwen2.5-VL Technical Report" (arXiv:2502.13923).
    """

    tower: VisionTower
    checkpoint: Checkpoint
    image_config: ImageConfig
    source: Source
    device: torch.device
    dtype: torch.dtype
    graphs: GraphRunner | None

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str],
        *,
        revision: str | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        cuda_graphs: bool = True,
    ) -> Self:
        """Load a checkpoint: a Hub repository, a local folder, or the packaged "tiny".

        >>> VisionEncoder.from_pretrained("tiny", device="cpu", max_pixels=50_176).dtype
        torch.float32

        `device="auto"` is CUDA where there is one, else the CPU, where the same Triton kernel runs
        in Triton's interpreter: right, and slow. `dtype="auto"` is bfloat16 on a GPU and float32
        on a CPU; float32 on a GPU is IEEE, never TF32. `min_pixels` and `max_pixels` bound
        height x width after resizing and replace the checkpoint's own. `cuda_graphs=False` launches
        every kernel by itself: slower for small batches, the same bits. Graphs serve merged output;
        `output="patch"` launches every kernel by itself.

        Raises HubError, CheckpointError or ArgumentError, each with what to do.
        """
        chosen_device = _choose_device(device)
        chosen_dtype = _choose_dtype(dtype, chosen_device)
        source = find_checkpoint(
            model,
            revision=revision,
            token=token,
            cache_dir=None if cache_dir is None else os.fspath(cache_dir),
            local_files_only=local_files_only,
        )
        checkpoint = load_checkpoint(source.folder)
        image_config = _with_limits(checkpoint.image_config, min_pixels, max_pixels)
        _check_fits(checkpoint.config, chosen_device)
        with torch.device("meta"):
            tower = VisionTower(checkpoint.config, chosen_dtype)
        with torch.device("cpu"):  # whatever the caller's default device is
            state = convert(
                checkpoint.tensors, checkpoint.config, image_config, chosen_dtype, chosen_device,
                locate=checkpoint.locate,
            )  # fmt: skip
        tower.load_state_dict(state, strict=True, assign=True)
        use_graphs = cuda_graphs and chosen_device.type == "cuda"
        graphs = GraphRunner(tower, chosen_device) if use_graphs else None
        return cls(tower, checkpoint, image_config, source, chosen_device, chosen_dtype, graphs)

    def __repr__(self) -> str:
        return f"VisionEncoder({self.source.name!r}, {dtype_name(self.dtype)}, on {self.device})"

    @property
    def config(self) -> VisionConfig:
        """The tower's architecture."""
        return self.checkpoint.config

    def encode(
        self,
        images: Iterable[ImageSource | Patches],
        *,
        on_error: OnError = "raise",
        output: Output = "merged",
        layout: ArrayLayout = "auto",
        limits: ImageLimits | None = None,
        decode_threads: int | None = None,
    ) -> list[ImageFeatures]:
        """Encode images: paths, bytes, PIL images, arrays or tensors, in any mix and size.

        >>> import numpy as np
        >>> encoder = VisionEncoder.from_pretrained("tiny")
        >>> encoder.encode([np.zeros((56, 84, 3), np.uint8)])[0].embeds.shape
        torch.Size([6, 192])

        Returns one ImageFeatures per image, in order: `embeds` (n_tokens, out_hidden_size),
        row-major over merged cells of 28 x 28 pixels. With `output="patch"`, un-merged:
        (n_patches, hidden_size), row-major over patches of 14 x 14 pixels. `layout` is "HWC" or
        "CHW" where an array's shape leaves its channel axis open. `limits` bounds what is decoded:
        ImageLimits() if not given. `decode_threads` read, decode and resize ahead of the encoder:
        one for two cores, 2 to 16, if not given; the embeddings do not depend on it. An image's
        `id` is its path; of others, "image 0", "image 1" ... by their place.

        Raises ImageError for the first image that cannot be encoded; with `on_error="skip"` that
        image's features carry the error instead, and the others go on.
        """
        return list(
            self.encode_iter(
                images, on_error=on_error, output=output, layout=layout, limits=limits,
                decode_threads=decode_threads,
            )
        )  # fmt: skip

    def encode_iter(
        self,
        images: Iterable[ImageSource | Patches],
        *,
        on_error: OnError = "raise",
        output: Output = "merged",
        layout: ArrayLayout = "auto",
        limits: ImageLimits | None = None,
        decode_threads: int | None = None,
    ) -> Iterator[ImageFeatures]:
        """As `encode`, one after the other and in order, in memory that stays flat.

        >>> encoder = VisionEncoder.from_pretrained("tiny")
        >>> for features in encoder.encode_iter(["tests/images/chelsea.png"]):
        ...     print(features.grid_thw)
        (1, 22, 32)

        `images` is iterated in the caller's thread, ahead of what comes out. On a GPU, where an
        image's bits do not depend on its batch, images are grouped by size. Raises ArgumentError
        at once for an option that makes no sense.
        """
        if isinstance(images, ONE_IMAGE):
            raise ArgumentError(
                f"images is one {type(images).__name__}, expected a list of images; "
                "pass [image] instead"
            )
        try:
            images = iter(images)
        except TypeError:
            raise ArgumentError(f"images is {images!r}, expected a list of images") from None
        limits = ImageLimits() if limits is None else limits
        for name, value, is_right, expected in (
            ("on_error", on_error, on_error in get_args(OnError), "'raise' or 'skip'"),
            ("output", output, output in get_args(Output), "'merged' or 'patch'"),
            ("layout", layout, layout in get_args(ArrayLayout), "'auto', 'HWC' or 'CHW'"),
            ("limits", limits, isinstance(limits, ImageLimits), "ImageLimits or None"),
        ):
            if not is_right:
                raise ArgumentError(f"{name} is {value!r}, expected {expected}")
        threads = thread_count(decode_threads)
        return self._encode_jobs(
            self._jobs(images, on_error, layout, limits, threads > 1), output, on_error, threads
        )

    def _encode_jobs(
        self, jobs: Iterator[Job[_Loaded]], output: Output, on_error: OnError, threads: int
    ) -> Iterator[ImageFeatures]:
        pace = InFlightLimit(self.device)
        with closing(work_ahead(jobs, threads=threads)) as loaded:
            for window in self._windows(loaded):
                yield from self._encode_window(window, output, on_error, pace)

    def encode_patches(self, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
        """Encode what Hugging Face's processor returns, as its vision encoder does.

        >>> encoder = VisionEncoder.from_pretrained("tiny")
        >>> encoder.encode_patches(torch.zeros(24, 1176), torch.tensor([[1, 4, 6]])).shape
        torch.Size([6, 192])

        Shapes: `pixel_values` (N, 1176) float, normalised, in the processor's order; `grid_thw`
        (images, 3) integers in patches, several frames allowed; returns (M, out_hidden_size).

        Raises ImageError (codes `patches`, `grid`) where the two disagree, before any kernel runs.
        """
        grids = _grids(grid_thw)
        expected = (sum(grid.n_patches for grid in grids), self.config.patch_dim)
        if not isinstance(pixel_values, Tensor):
            raise ImageError(
                f"pixel_values is a {type(pixel_values).__name__}, expected a torch tensor; ask "
                'the processor for return_tensors="pt"',
                code="patches",
            )
        if tuple(pixel_values.shape) != expected or not pixel_values.is_floating_point():
            raise ImageError(
                f"pixel_values is {pixel_values.dtype} of shape {tuple(pixel_values.shape)}, but "
                f"grid_thw promises floating-point rows of shape {expected}; pass both as one "
                "call of the processor returned them",
                code="patches",
            )
        if self.device.type == "cuda" and pixel_values.is_pinned():
            # a loader may fill it again when this returns, and the GPU reads it later: a copy
            pixel_values = torch.empty_like(pixel_values, pin_memory=True).copy_(pixel_values)
        return self._forward(pixel_values, grids, "merged")

    def metadata(self) -> dict[str, Any]:
        """What a feature file records about its origin: model, hashes, versions, image policy."""
        return {
            "model": self.source.name,
            "commit": self.source.commit,
            "weights_sha256": self.checkpoint.weights_sha256(),
            "config_sha256": config_hash(self.config, self.image_config),
            "versions": {name: _version(name) for name in ("qwen-vit", "torch", "triton")},
            "dtype": dtype_name(self.dtype),
            "image_policy": {
                **self.image_config.to_json(),
                "resample": "Pillow bicubic on uint8",
                "orientation": "EXIF applied",
                "alpha": "composited on white",
            },
        }

    def _jobs(
        self,
        images: Iterable[ImageSource | Patches],
        on_error: OnError,
        layout: ArrayLayout,
        limits: ImageLimits,
        is_ahead: bool,
    ) -> Iterator[Job[_Loaded]]:
        for index, image in enumerate(images):
            is_path = isinstance(image, (str, os.PathLike))
            name = os.fsdecode(image) if is_path else f"image {index}"  # type: ignore[arg-type]
            n_bytes = len(image) if isinstance(image, bytes) else 0
            if isinstance(image, Patches):
                make = partial(self._accept_patches, image, name)
            else:
                load: Callable[[], RgbImage] = partial(
                    load_image, image, name=name, layout=layout, limits=limits
                )
                if is_ahead and not is_path and not isinstance(image, bytes):
                    # the caller may change it, once the next one is asked for
                    load, n_bytes = load_eagerly(load)
                make = partial(self._load_and_patchify, load, name)
            yield Job(partial(capture_image_error, make, name, on_error), n_bytes)

    def _load_and_patchify(self, load: Callable[[], RgbImage], name: str) -> _Loaded:
        """One image, loaded, resized and cut into patches."""
        rgb = load()
        patches = patchify(rgb.picture, self.image_config, name=name)
        features = ImageFeatures(name, None, _thw(patches), (rgb.height, rgb.width), rgb.notes)
        return _Loaded(features, patches)

    def _accept_patches(self, patches: Patches, name: str) -> _Loaded:
        """One image that the caller has patchified."""
        if len(patches.grids) != 1:
            raise ImageError(
                f"{name} is the patches of {len(patches.grids)} images, expected those of one; "
                "pass each image's patches by themselves",
                code="patches",
            )
        values = patches.pixels.shape[1]
        expected = self.config.patch_dim // self.config.temporal_patch_size  # of one frame
        if values != expected:
            raise ImageError(
                f"{name} has patches of {values} values, expected {expected}; build them with this "
                "encoder's image_config",
                code="patches",
            )
        check_grids(patches.grids, self.config, f"{name}, grids")
        return _Loaded(ImageFeatures(name, None, _thw(patches)), patches)

    def _windows(self, loaded: Iterable[_Loaded]) -> Iterator[list[_Loaded]]:
        """The images in order, as many at a time as are packed together."""
        budget = WINDOW[self.device.type] * TOKEN_BUDGET[self.device.type]
        window: list[_Loaded] = []
        n_patches = 0
        try:
            for each in loaded:
                is_full = n_patches + each.n_patches > budget or len(window) == IMAGES_IN_A_WINDOW
                if window and is_full:
                    yield window
                    window, n_patches = [], 0
                window.append(each)
                n_patches += each.n_patches
        except ExportError:  # of an export that is stopped: nobody takes what came before
            raise
        except Exception:
            yield window  # what came before it is given before it is raised
            raise
        yield window

    def _encode_window(
        self, window: list[_Loaded], output: Output, on_error: OnError, pace: "InFlightLimit"
    ) -> Iterator[ImageFeatures]:
        results: dict[int, Tensor | ImageError] = {}
        for batch in self._batches(window):
            parts = _parts(window[index] for index in batch)
            results.update(zip(batch, self._encode_parts(parts, output, on_error), strict=True))
            del parts
            pace.step()
        plain = [features for features, _ in window]
        window.clear()  # nobody needs the pixels while the results are taken
        for index, features in enumerate(plain):
            result = results.pop(index, None)
            if isinstance(result, ImageError):
                yield replace(features, grid_thw=None, error=result)
            else:
                yield features if result is None else replace(features, embeds=result)

    def _batches(self, window: Sequence[_Loaded]) -> list[list[int]]:
        """Places in the window of the images for each pass; those that failed are in none."""
        good = [index for index, loaded in enumerate(window) if loaded.patches is not None]
        if self.device.type == "cpu":
            return [good] if good else []
        batches = pack([window[index].n_patches for index in good], TOKEN_BUDGET[self.device.type])
        return [[good[place] for place in batch] for batch in batches]

    def _encode_parts(
        self, parts: Sequence[tuple[str, Patches]], output: Output, on_error: OnError
    ) -> list[Tensor | ImageError]:
        """Each named image's embeddings; a batch too large for the GPU's memory is halved."""
        if not parts:
            return []
        pinned_rows = TOKEN_BUDGET["cuda"] if self.device.type == "cuda" else 0
        patches = Patches.cat((part for _, part in parts), pinned_rows=pinned_rows)
        unit = 1 if output == "patch" else self.config.merge_unit
        rows = [len(part.pixels) // unit for _, part in parts]
        try:
            # each image gets its own memory: keeping one must not keep its whole batch (which has
            # no name here, so that the memory is free when halves are tried)
            copies: Any = torch.split_with_sizes_copy  # typed as if it gave nothing
            return list(copies(self._forward(patches.pixels, patches.grids, output), rows))
        except torch.cuda.OutOfMemoryError as error:
            if len(parts) == 1:
                message = (
                    f"{parts[0][0]} has {len(patches.pixels)} patches, which do not fit the memory "
                    f"of {self.device}; lower max_pixels, or free memory there"
                )
                if on_error == "raise":
                    raise ImageError(message, code="out-of-memory") from error
                return [ImageError(message, code="out-of-memory")]
        half = len(parts) // 2
        logger.warning("out of memory on %s: a batch of %d is halved", self.device, len(parts))
        return [
            *self._encode_parts(parts[:half], output, on_error),
            *self._encode_parts(parts[half:], output, on_error),
        ]

    def _forward(self, patches: Tensor, grids: tuple[Grid, ...], output: Output) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):  # the precision is ours to choose
            return self._run(patches, grids, output)

    def _run(self, patches: Tensor, grids: tuple[Grid, ...], output: Output) -> Tensor:
        if self.device.type == "cuda" and patches.device.type == "cpu":
            patches = patches.pin_memory()  # itself, where it is pinned already
        is_whole_units = MIN_STEP % self.config.merge_unit == 0
        graphs = self.graphs if output == "merged" and is_whole_units else None
        n_rows = None if graphs is None else graphs.graph_bucket(patches)
        if graphs is not None and n_rows is not None:
            filled_up = _layout(grids, self.config, self.device, self.dtype, n_rows)
            merged = graphs.run(patches, filled_up)
            if merged is not None:
                return merged
        layout = _layout(grids, self.config, self.device, self.dtype)
        with torch.no_grad():
            return self.tower(  # type: ignore[no-any-return]
                patches.to(self.device, non_blocking=True), layout.to(self.device), output
            )


class InFlightLimit:
    """Keeps the host a few batches ahead of a GPU, and no more."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: deque[torch.cuda.Event] = deque()

    def step(self) -> None:
        """After each batch: wait for the one that is BATCHES_AHEAD before it."""
        if self._device.type != "cuda":
            return
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self._device))
        self._events.append(event)
        if len(self._events) > BATCHES_AHEAD:
            with torch.cuda.device(self._device):  # or the first GPU is woken, too
                self._events.popleft().synchronize()


def _thw(patches: Patches) -> tuple[int, int, int]:
    [grid] = patches.grids
    return grid.t, grid.h, grid.w


def _parts(loaded: Iterable[_Loaded]) -> list[tuple[str, Patches]]:
    return [(features.id, patches) for features, patches in loaded if patches is not None]


def load_eagerly(load: Callable[[], RgbImage]) -> tuple[Callable[[], RgbImage], int]:
    """What gives, or raises, later what `load` does now; and its bytes."""
    loaded: Future[RgbImage] = Future()
    try:
        rgb = load()
    except ImageError as error:
        loaded.set_exception(error.without_frames())
        return loaded.result, 0
    loaded.set_result(rgb)
    return loaded.result, 4 * rgb.height * rgb.width  # as Pillow holds them


def capture_image_error(make: Callable[[], _Loaded], name: str, on_error: OnError) -> _Loaded:
    try:
        return make()
    except ImageError as error:
        if on_error == "raise":
            raise
        return _Loaded(ImageFeatures(name, None, None, error=error.without_frames()), None)


# computed from integers, so that repeated sizes cost nothing
_layout = lru_cache(maxsize=32)(plan_layout)


def _grids(grid_thw: Tensor) -> tuple[Grid, ...]:
    if (
        not isinstance(grid_thw, Tensor)
        or grid_thw.dim() != 2
        or grid_thw.shape[1] != 3
        or grid_thw.is_floating_point()
        or grid_thw.is_complex()
        or grid_thw.dtype == torch.bool
    ):
        what = (
            f"{grid_thw.dtype} of shape {tuple(grid_thw.shape)}"
            if isinstance(grid_thw, Tensor)
            else f"a {type(grid_thw).__name__}"
        )
        raise ImageError(
            f"grid_thw is {what}, expected an integer tensor of shape (images, 3) with frames, "
            "height and width in patches",
            code="grid",
        )
    return tuple(Grid(*row) for row in grid_thw.tolist())


def _choose_device(device: str | torch.device) -> torch.device:
    if device == "auto":
        if not torch.cuda.is_available():
            _say_once(
                "no CUDA GPU: computing on the CPU in float32, with the attention kernel in "
                "Triton's interpreter (right, and slow)"
            )
            return torch.device("cpu")
        device = "cuda"
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        raise ArgumentError(
            f"device is {device!r}, expected 'auto', 'cpu', 'cuda' or 'cuda:1'"
        ) from None
    if chosen.type == "cpu":
        return chosen
    if chosen.type != "cuda":
        raise ArgumentError(f"device is {device!r}, expected an NVIDIA GPU ('cuda') or 'cpu'")
    if not torch.cuda.is_available():
        raise ArgumentError(
            f"device is {device!r}, but torch {torch.__version__} sees no CUDA GPU; install an "
            "NVIDIA driver and a CUDA build of torch, or use device='cpu'"
        )
    if (chosen.index or 0) >= torch.cuda.device_count():
        raise ArgumentError(
            f"device is {device!r}, but there are {torch.cuda.device_count()} GPUs; count from 0"
        )
    capability = torch.cuda.get_device_capability(chosen)
    if capability < MIN_CAPABILITY:
        raise ArgumentError(
            f"{torch.cuda.get_device_name(chosen)} has compute capability "
            f"{capability[0]}.{capability[1]}, expected 8.0 (Ampere) or newer; use device='cpu'"
        )
    index = torch.cuda.current_device() if chosen.index is None else chosen.index
    return torch.device("cuda", index)


def _choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    chosen = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if not isinstance(chosen, torch.dtype):
        raise ArgumentError(f"dtype is {dtype!r}, expected 'auto', 'bfloat16' or 'float32'")
    pixel_weight_exponent(chosen)  # refuses float16 and every other type, with the reason
    if device.type == "cpu" and chosen != torch.float32:
        raise ArgumentError(
            f"dtype is {chosen} on a CPU, expected float32: Triton's interpreter multiplies "
            "bfloat16 wrongly; use dtype='float32', or a GPU"
        )
    return chosen


def _check_fits(config: VisionConfig, device: torch.device) -> None:
    fits = {kind: least <= config.head_dim <= most for kind, (least, most) in HEAD_DIMS.items()}
    if not fits[device.type]:
        least, most = HEAD_DIMS[device.type]
        raise CheckpointError(
            f"head_dim is {config.head_dim}, expected {least} to {most} on {device}, for which the "
            "attention kernel is made; "
            + ("use device='cpu'" if fits["cpu"] else "choose another checkpoint")
        )
    if device.type == "cuda" and config.patch_px % 2:
        raise CheckpointError(
            f"patch_size is {config.patch_px}, expected an even one on a GPU, which loads rows of "
            "patches by 16 bytes; use device='cpu'"
        )


def _with_limits(
    image_config: ImageConfig, min_pixels: int | None, max_pixels: int | None
) -> ImageConfig:
    try:
        return replace(
            image_config,
            min_pixels=image_config.min_pixels if min_pixels is None else min_pixels,
            max_pixels=image_config.max_pixels if max_pixels is None else max_pixels,
        )
    except CheckpointError as error:
        raise ArgumentError(f"{error}; pass other min_pixels or max_pixels") from None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


@lru_cache
def _say_once(message: str) -> None:
    logger.warning(message)
