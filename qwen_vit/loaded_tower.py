"""Define `LoadedTower`, which runs the vision tower on rows of patches on its device."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, Self

import torch
from torch import Tensor

from qwen_vit.checkpoint.convert import convert
from qwen_vit.checkpoint.hub import Origin
from qwen_vit.checkpoint.load import Checkpoint
from qwen_vit.common.tensors import resolved
from qwen_vit.config import Grid, ImageConfig, VisionConfig
from qwen_vit.device import (
    check_fits,
    check_process,
    choose_device,
    choose_dtype,
    choose_quantization,
    warn_of_error,
    warn_without_gpu,
)
from qwen_vit.errors import ArgumentError
from qwen_vit.features import dtype_name
from qwen_vit.graphs import GraphRunner, run_tower
from qwen_vit.images.rows import as_grids, check_rows, pixels_for_tower
from qwen_vit.metadata import origin_metadata
from qwen_vit.model import LayerTaps, Output, VisionTower
from qwen_vit.weight_format import Quantization

__all__ = ["LoadedTower"]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class LoadedTower:
    """Hold a checkpoint's tower on a device, and encode a processor's rows.

    >>> from qwen_vit import VisionEncoder
    >>> isinstance(VisionEncoder.from_pretrained("tiny"), LoadedTower)
    True

    `VisionEncoder` also loads checkpoints by name, and encodes images and videos.
    """

    tower: VisionTower
    checkpoint: Checkpoint
    image_config: ImageConfig
    source: Origin
    device: torch.device
    dtype: torch.dtype
    graphs: GraphRunner | None

    @classmethod
    def _load(
        cls, opened: Callable[[], tuple[Checkpoint, Origin]], device: str | torch.device,
        dtype: str | torch.dtype, quantization: str | None, *, min_pixels: int | None,
        max_pixels: int | None, cuda_graphs: bool,
    ) -> Self:  # fmt: skip
        """Check device, dtype and quantization before `opened` downloads or reads a checkpoint."""
        chosen = choose_device(device)
        computed = choose_dtype(dtype, chosen)
        quantized = choose_quantization(quantization, chosen, computed)
        checkpoint, source = opened()
        encoder = cls.from_checkpoint(
            checkpoint, source, chosen, computed, quantization=quantized,
            min_pixels=min_pixels, max_pixels=max_pixels, cuda_graphs=cuda_graphs,
        )  # fmt: skip
        warn_without_gpu(device)
        return encoder

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, source: Origin, device: torch.device, dtype: torch.dtype,
        *, quantization: Quantization | None = None, min_pixels: int | None,
        max_pixels: int | None, cuda_graphs: bool,
    ) -> Self:  # fmt: skip
        """Build an encoder from an open checkpoint, with checked device, dtype and quantization.

        `VisionEncoder.from_pretrained` checks these values and calls this method.

        Args:
            checkpoint: the open checkpoint.
            source: the origin that `metadata` records.
            device: the device of the tower.
            dtype: the dtype of the tower.
            quantization: "fp8" or None.
            min_pixels: as in `from_pretrained`.
            max_pixels: as in `from_pretrained`.
            cuda_graphs: as in `from_pretrained`.

        Returns:
            An encoder, as from `from_pretrained`.

        Raises:
            CheckpointError: A weight contains NaN or infinity, or overflows during conversion. The
                device does not support the checkpoint's architecture.
            ArgumentError: A pixel limit is invalid, or torch's threads do not work in this forked
                process.
        """
        check_process(device)
        image_config = checkpoint.image_config.bounded(min_pixels, max_pixels)
        check_fits(checkpoint.config, device, quantization)
        with torch.device("meta"):
            tower = VisionTower(checkpoint.config, dtype, quantization)
        with torch.device("cpu"):  # for any default device of the caller
            state = convert(
                checkpoint.tensors, checkpoint.config, image_config, dtype, device,
                quantization=quantization, locate=checkpoint.locate,
            )  # fmt: skip
        tower.load_state_dict(state, strict=True, assign=True)
        warn_of_error(quantization)
        graphs = GraphRunner(tower, device) if cuda_graphs and device.type == "cuda" else None
        return cls(tower, checkpoint.on_host(), image_config, source, device, dtype, graphs)

    def __repr__(self) -> str:
        kind = ", ".join(filter(None, (dtype_name(self.dtype), self.quantization)))
        return f"VisionEncoder({self.source.name!r}, {kind}, on {self.device})"

    @property
    def config(self) -> VisionConfig:
        """Return the tower's architecture."""
        return self.checkpoint.config

    @property
    def quantization(self) -> Quantization | None:
        """Return the quantization of the MLP's GEMMs, or None."""
        return self.tower.quantization

    def to(self, *_: object, **__: object) -> NoReturn:
        """Raise ArgumentError, because an encoder keeps its device and dtype."""
        remedy = "pass device= and dtype= to VisionEncoder.from_pretrained"
        raise ArgumentError("a VisionEncoder keeps its device and dtype", remedy=remedy)

    def encode_patches(self, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
        """Encode the output of Hugging Face's processor, as Hugging Face's vision encoder does.

        >>> from qwen_vit import VisionEncoder
        >>> encoder = VisionEncoder.from_pretrained("tiny")
        >>> encoder.encode_patches(torch.zeros(24, 1176), torch.tensor([[1, 4, 6]])).shape
        torch.Size([6, 192])

        Args:
            pixel_values: (N, 1176) floats, normalised, in the processor's order.
            grid_thw: (images, 3) integers in patches, with one or several frames.

        Returns:
            The merged tokens (M, out_hidden_size), image after image, each image row-major.

        Raises:
            ImageError: The rows do not have the type and shape that the grids imply (code
                `patches`), or a grid is invalid (code `grid`). The grids contain more patches than
                int32 can count (code `too-many-patches`). The method raises these errors before it
                runs a kernel.
        """
        grids = as_grids(grid_thw)
        check_rows("pixel_values", pixel_values, grids, self.config.patch_dim, is_float=True)
        return self.forward(self._owned(pixel_values), grids, "merged")

    def encode_pixels(self, rows: Tensor, grid_thw: Tensor, *, still: bool = True) -> Tensor:
        """Encode a processor's rows of pixels before normalisation.

        >>> from qwen_vit import VisionEncoder
        >>> encoder = VisionEncoder.from_pretrained("tiny")
        >>> rows = torch.zeros(24, 1176, dtype=torch.uint8)
        >>> encoder.encode_pixels(rows, torch.tensor([[1, 4, 6]])).shape
        torch.Size([6, 192])

        Args:
            rows: (N, 1176) uint8, each (channel, 2 frames, 14, 14), in the processor's order.
            grid_thw: (images, 3) integers in patches.
            still: True if both frames of every row are the same image. The method then reads only
                the first frame, and the result has the same bits as from `encode`. For videos
                pass False, which gives the same bits as `encode_patches` on the normalised rows.

        Returns:
            The merged tokens (M, out_hidden_size), as from `encode_patches`.

        Raises:
            ImageError: As in `encode_patches`.
        """
        grids = as_grids(grid_thw)
        check_rows("rows", rows, grids, self.config.patch_dim, is_float=False)
        if not still:
            return self.forward(self._owned(rows), grids, "merged")
        pixels = pixels_for_tower(resolved(rows), self.config, self.image_config, still=True)
        return self.forward(pixels, grids, "merged")

    def _owned(self, rows: Tensor) -> Tensor:
        rows = resolved(rows)
        if self.device.type == "cuda" and rows.is_pinned():
            # copy the rows: a loader may refill them after the return, and the GPU reads them later
            return torch.empty_like(rows, pin_memory=True).copy_(rows)
        return rows

    def metadata(self) -> dict[str, Any]:
        """Return the origin that a feature file records, such as model, hashes and versions.

        >>> from qwen_vit import VisionEncoder
        >>> VisionEncoder.from_pretrained("tiny").metadata()["model"]
        'tiny'
        """
        return origin_metadata(
            self.source, self.checkpoint, self.image_config, self.dtype, self.device,
            self.quantization,
        )  # fmt: skip

    def forward(
        self, patches: Tensor, grids: tuple[Grid, ...], output: Output,
        taps: LayerTaps | None = None,
    ) -> Tensor:  # fmt: skip
        """Run the tower on checked rows, with a CUDA graph if one fits.

        `encode_patches` and `encode_pixels` check the rows and call this method.

        Args:
            patches: (N, 588) or (N, 1176), uint8 or floats, in the processor's order. The device
                normalises uint8 rows of two frames, because it is faster than the host.
            grids: the grid (t, h, w) of each image, in patches.
            output: "merged" or "patch".
            taps: receives the residual streams of its blocks, or None.

        Returns:
            The merged tokens (M, out_hidden_size), or the patches (N, hidden_size), image after
            image, each image row-major.
        """
        check_process(self.device)
        if patches.dtype == torch.uint8 and patches.shape[1] == self.config.patch_dim:
            rows = patches.to(self.device, non_blocking=True)
            patches = pixels_for_tower(rows, self.config, self.image_config, still=False)
        with torch.autocast(self.device.type, enabled=False):  # the precision is fixed
            return run_tower(
                self.tower, self.graphs, patches, grids,
                device=self.device, dtype=self.dtype, output=output, taps=taps,
            )  # fmt: skip
