"""Pack loaded images and videos into batches of patches, and return their features in order.

Loader threads prefetch images. The caller's thread packs loaded images into batches and runs the
encoder on them. Each image keeps its name from the input to its features or its error.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from qwen_vit.common.prefetch import Job, work_ahead
from qwen_vit.config import Grid, VisionConfig
from qwen_vit.errors import ExportError, ImageError, with_options
from qwen_vit.features import FailedImage, ImageFeatures, VideoFeatures
from qwen_vit.graphs import MAX_BUCKET
from qwen_vit.images.frames import Frames
from qwen_vit.images.on_gpu import patches_on_gpu
from qwen_vit.images.patches import Patches
from qwen_vit.images.picture import Picture
from qwen_vit.loading import LoadedImage, OnError
from qwen_vit.model import LayerTaps, Output
from qwen_vit.outputs import ImageRows, OutputOptions
from qwen_vit.video.pieces import PieceStream

__all__ = ["BatchEncoder", "InFlightLimit", "pack"]

logger = logging.getLogger("qwen_vit")

Forward = Callable[[Tensor, tuple[Grid, ...], Output, LayerTaps | None], Tensor]

# Patches in one forward pass. More patches save no time on a GPU. A single image may be larger.
TOKEN_BUDGET = {"cuda": MAX_BUCKET, "cpu": 4_096}
# The number of batches that are packed together. On a CPU results may depend on the batch, and the
# same images must give the same results. A CPU therefore packs one batch, in the order of the
# images.
WINDOW = {"cuda": 4, "cpu": 1}
BATCHES_AHEAD = 2  # the host may queue this many batches ahead of the GPU
WINDOW_BYTES = 2**28  # of decoded pictures and patches
IMAGES_IN_A_WINDOW = 1_024  # so that a long run of failed images is also reported


class _Piece(NamedTuple):
    """Hold an image, or some steps of a video, for one pass of the tower."""

    place: int  # the place in its window
    name: str
    patches: Patches | Picture | Frames

    @property
    def n_patches(self) -> int:
        return self.patches.n_patches


@dataclass(frozen=True, slots=True)
class BatchEncoder:
    """Pack loaded images into batches and run `forward` on them, in constant memory."""

    forward: Forward
    device: torch.device
    config: VisionConfig
    outputs: OutputOptions
    on_error: OnError

    @property
    def video_values(self) -> int:
        """Return the number of values in a video's row, which has two frames."""
        return self.config.patch_dim

    def encode(
        self, jobs: Iterator[Job[LoadedImage]], threads: int
    ) -> Iterator[ImageFeatures | FailedImage]:
        """Yield the features of every image, or its FailedImage, in order."""
        limit = InFlightLimit(self.device)
        with closing(work_ahead(jobs, threads=threads)) as loaded:
            for window in self._windows(loaded):
                if window and window[0].stream is not None:
                    yield self._encode_stream(window[0], window[0].stream, limit)
                else:
                    yield from self._encode_window(window, limit)

    def _windows(self, loaded: Iterable[LoadedImage]) -> Iterator[list[LoadedImage]]:
        """Yield the images in order, in groups to pack together. A stream is a group by itself.

        The first group is one batch, so that a GPU starts early.
        """
        budget = TOKEN_BUDGET[self.device.type]
        window: list[LoadedImage] = []
        n_patches = n_bytes = 0
        try:
            for each in loaded:
                is_full = (
                    n_patches + each.n_patches > budget
                    or n_bytes + each.n_bytes > WINDOW_BYTES
                    or len(window) == IMAGES_IN_A_WINDOW
                )
                if window and is_full:
                    yield window
                    window, n_patches, n_bytes = [], 0, 0
                    budget = WINDOW[self.device.type] * TOKEN_BUDGET[self.device.type]
                if each.stream is not None:
                    if window:
                        yield window
                    yield [each]
                    window, n_patches, n_bytes = [], 0, 0
                    continue
                window.append(each)
                n_patches += each.n_patches
                n_bytes += each.n_bytes
        except ExportError:  # the export was stopped: it does not need the earlier results
            raise
        except Exception:
            yield window  # yield the images before the failed one first
            raise
        yield window

    def _encode_window(
        self, window: list[LoadedImage], limit: "InFlightLimit"
    ) -> Iterator[ImageFeatures | FailedImage]:
        done: dict[int, dict[int, ImageRows | ImageError]] = {}  # by place, then by piece
        pieces = self._pieces(window)
        for batch in self._batches(pieces):
            results = self._encode_parts([pieces[index] for index in batch])
            for index, result in zip(batch, results, strict=True):
                done.setdefault(pieces[index].place, {})[index] = result
            limit.step()
        pieces.clear()
        items = [(replace(each, patches=None), _grid_of(each)) for each in window]
        is_video = [_values(each) == self.video_values for each in window]
        window.clear()  # the pixels are no longer needed
        for place, (item, grid_thw) in enumerate(items):
            rows = self._joined(done.pop(place, {}), is_video[place])
            outcome = item.error if rows is None else rows
            if isinstance(outcome, ImageRows):
                yield self._features(item, outcome, grid_thw)
            elif outcome is not None:
                yield FailedImage(item.id, outcome, size_px=item.size_px)

    def _encode_stream(
        self, video: LoadedImage, stream: PieceStream, limit: "InFlightLimit"
    ) -> ImageFeatures | FailedImage:
        found: list[ImageRows] = []
        t = h = w = 0
        with closing(stream.pieces()) as pieces:
            try:
                for patches in pieces:
                    [rows] = self._encode_parts([_Piece(0, video.id, patches)])
                    limit.step()
                    if isinstance(rows, ImageError):
                        raise rows
                    found.append(rows)
                    [grid] = patches.grids
                    t, h, w = t + grid.t, grid.h, grid.w
            except ImageError as error:
                if self.on_error == "raise":
                    raise
                return FailedImage(video.id, error.without_frames(), size_px=video.size_px)
        return self._features(replace(video, stream=None), self.outputs.join(found), (t, h, w))

    def _features(
        self, item: LoadedImage, rows: ImageRows, grid_thw: tuple[int, int, int]
    ) -> ImageFeatures:
        features = ImageFeatures(
            item.id, rows.embeds, grid_thw, item.size_px, item.notes, rows.layers,
            self.outputs.output, self.outputs.normalize,
        )  # fmt: skip
        return features if item.timing is None else VideoFeatures.of(features, item.timing)

    def _joined(
        self, pieces: Mapping[int, ImageRows | ImageError], is_video: bool
    ) -> ImageRows | ImageError | None:
        """Return the rows of an input's pieces, the error of its first failed piece, or None
        without pieces."""
        found = [pieces[index] for index in sorted(pieces)]
        error = next((each for each in found if isinstance(each, ImageError)), None)
        if error is not None or not found:
            return error
        rows = [each for each in found if isinstance(each, ImageRows)]
        return self.outputs.join(rows) if is_video else rows[0]

    def _pieces(self, window: Sequence[LoadedImage]) -> list[_Piece]:
        """Return each image as one piece, and split a long video into pieces that fit into one
        pass. Failed images have no piece."""
        most = TOKEN_BUDGET[self.device.type]
        return [
            _Piece(place, loaded.id, patches)
            for place, loaded in enumerate(window)
            if loaded.patches is not None
            for patches in (
                loaded.patches.split_steps(most)
                if isinstance(loaded.patches, Patches) and _values(loaded) == self.video_values
                else [loaded.patches]
            )
        ]

    def _batches(self, pieces: Sequence[_Piece]) -> list[list[int]]:
        """Return the indices of each pass's pieces. Images and videos are in separate passes.

        On a CPU, each piece of a video is a pass by itself, so that its rows do not depend on other
        inputs.
        """
        is_video = [piece.patches.n_values == self.video_values for piece in pieces]
        stills = [index for index, video in enumerate(is_video) if not video]
        videos = [index for index, video in enumerate(is_video) if video]
        if self.device.type == "cpu":
            return [each for each in (stills, *([index] for index in videos)) if each]
        batches = []
        for kind in (stills, videos):
            sizes = [pieces[index].n_patches for index in kind]
            packed = pack(sizes, TOKEN_BUDGET[self.device.type])
            batches += [[kind[index] for index in batch] for batch in packed]
        return batches

    def _encode_parts(self, pieces: Sequence[_Piece]) -> list[ImageRows | ImageError]:
        """Return each piece's rows or error. Split a batch that is too large for the GPU's memory
        into halves."""
        outputs, taps = self.outputs, self.outputs.taps()
        sizes = [piece.n_patches for piece in pieces]
        try:
            patches = self._joined_patches(pieces)
            # keep no reference to the batch's rows, so that their memory is free for the halves
            return list(
                outputs.split(
                    self.forward(patches.pixels, patches.grids, outputs.tower_output, taps),
                    taps, sizes, self.config.merge_unit,
                    pool=patches.n_values != self.video_values,
                )
            )  # fmt: skip
        except torch.cuda.OutOfMemoryError as cause:
            if len(pieces) == 1 and isinstance(pieces[0].patches, Patches):
                error = ImageError(
                    f"its {sizes[0]} patches do not fit into the memory of {self.device}",
                    name=pieces[0].name,
                    remedy=with_options("lower {}, or free memory on this device", "max_pixels"),
                    code="out-of-memory",
                )
                if self.on_error == "raise":
                    raise error from cause
                return [error]
        del taps  # and the rows in it
        if len(pieces) == 1 and not isinstance(pieces[0].patches, Patches):
            # the decoded pixels may need more memory than the patches
            logger.warning("out of memory on %s: the CPU resizes %s", self.device, pieces[0].name)
            try:
                patches = pieces[0].patches.patchify()
            except ImageError as error:
                if self.on_error == "raise":
                    raise
                return [error.without_frames()]
            return self._encode_parts([pieces[0]._replace(patches=patches)])
        half = len(pieces) // 2
        logger.warning(
            "out of memory on %s: encoding %d images or parts of videos in two halves",
            self.device,
            len(pieces),
        )
        return [*self._encode_parts(pieces[:half]), *self._encode_parts(pieces[half:])]

    def _joined_patches(self, pieces: Sequence[_Piece]) -> Patches:
        """Return the patches of a batch, on the GPU if the batch contains pictures or frames."""
        parts = [piece.patches for piece in pieces]
        ready = [part for part in parts if isinstance(part, Patches)]
        pinned_rows = TOKEN_BUDGET["cuda"] if self.device.type == "cuda" else 0
        if len(ready) < len(parts):
            return patches_on_gpu(parts, self.device, pinned_rows=pinned_rows)
        return Patches.cat(ready, pinned_rows=pinned_rows)


class InFlightLimit:
    """Keep the host from running more than a few batches ahead of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: deque[torch.cuda.Event] = deque()

    def step(self) -> None:
        """After each batch, wait for the batch that came BATCHES_AHEAD batches earlier."""
        if self._device.type != "cuda":
            return
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self._device))
        self._events.append(event)
        if len(self._events) > BATCHES_AHEAD:
            # otherwise torch also creates a context on the first GPU
            with torch.cuda.device(self._device):
                self._events.popleft().synchronize()


def _values(loaded: LoadedImage) -> int:
    return 0 if loaded.patches is None else loaded.patches.n_values


def _grid_of(loaded: LoadedImage) -> tuple[int, int, int]:
    if loaded.patches is None:
        return 0, 0, 0
    [grid] = loaded.patches.grids
    return grid.t, grid.h, grid.w


def pack(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Group sizes, by their indices, into batches of at most `budget`: largest first, first fit.

    >>> pack([3, 7, 5, 4, 12], 10)
    [[4], [1, 0], [2, 3]]

    A size above the budget is a batch by itself.
    """
    batches: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        size = sizes[index]
        place = next((at for at, left in enumerate(room) if size <= left), None)
        if place is None:
            batches.append([index])
            room.append(budget - size)
        else:
            batches[place].append(index)
            room[place] -= size
    return batches
