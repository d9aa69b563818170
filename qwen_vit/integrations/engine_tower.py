"""Provide the tower for inference engines, as an `nn.Module` that the engine's loader fills.

vLLM and SGLang build a model, and pass weights to it while they read a checkpoint. They measure the
model's memory, and pass patch rows from their processors to the tower. This package has a thin
model class for each engine. This module contains the code that both classes share.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qwen_vit.checkpoint.update import WeightUpdates
from qwen_vit.config import Grid, ImageConfig, VisionConfig
from qwen_vit.device import check_fits, choose_dtype, choose_quantization, warn_of_error
from qwen_vit.errors import CheckpointError
from qwen_vit.graphs import GraphRunner, run_tower
from qwen_vit.images.rows import as_grids, check_rows, pixels_for_tower
from qwen_vit.model import VisionTower

__all__ = ["EngineTower"]


class EngineTower(nn.Module):
    """Run the vision tower inside an inference engine, on one device.

    >>> from qwen_vit import VisionEncoder
    >>> tiny = VisionEncoder.from_pretrained("tiny", device="cpu")
    >>> tower = EngineTower(tiny.config, tiny.image_config, torch.float32, torch.device("cpu"))
    >>> len(tower.load_weights(tiny.checkpoint.tensors.items())) == len(tower.state_dict())
    True
    >>> tower(torch.zeros(24, 1176), [[1, 4, 6]]).shape
    torch.Size([6, 192])

    The parameters are stored in the tower's own format (padded, permuted, norms folded in).
    `load_weights` writes them in place, so the engine can count, offload and restore them like any
    other parameters. `image_config` has the mean and std that normalise uint8 rows. `dtype` is the
    engine's dtype, bfloat16 or float32. On a CPU, the tower computes in float32.
    """

    def __init__(
        self,
        config: VisionConfig,
        image_config: ImageConfig,
        dtype: torch.dtype,
        device: torch.device,
        quantization: str | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.image_config = image_config
        self.spatial_merge_size = config.spatial_merge_size
        self.out_hidden_size = config.out_hidden_size
        self._out_dtype = dtype
        choose_dtype(dtype, torch.device("cuda"))  # this rejects float16, with the reason
        self._compute_dtype = torch.float32 if device.type == "cpu" else dtype
        quantized = choose_quantization(quantization, device, self._compute_dtype)
        check_fits(config, device, quantized)
        with torch.device("meta"):
            tower = VisionTower(config, self._compute_dtype, quantized)
        self.tower = tower.to_empty(device=device)
        warn_of_error(quantized)
        self._updates = WeightUpdates(self.tower, config, image_config, quantized)
        on_gpu = device.type == "cuda"
        self._graphs = GraphRunner(self.tower, device) if on_gpu else None
        self._is_still = False

    @property
    def dtype(self) -> torch.dtype:
        return self._out_dtype

    @property
    def device(self) -> torch.device:
        return self.tower.merger.fc1.weight.device

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load all or some published tensors, in any order and any number of times.

        Args:
            weights: pairs of a name without the tower's prefix, such as "blocks.0.norm1.weight",
                and a tensor on any device. The tower keeps no reference to the tensors.

        Returns:
            The names of this module's parameters that the call wrote.
        """
        return {f"tower.{name}" for name in self._updates.load(weights)}

    @contextmanager
    def reading_images(self) -> Iterator[None]:
        """Inside the block, assume that both frames of uint8 rows are equal, and read only one."""
        self._is_still = True
        try:
            yield
        finally:
            self._is_still = False

    def prepare(self, row_dtypes: Iterable[torch.dtype], largest: int) -> int:
        """Compile the kernels and capture the CUDA graphs that requests will need.

        Args:
            row_dtypes: dtypes of the tower's input rows. Pass uint8 for pixels of images,
                float32 for pixels of videos, and the engine's dtype for normalised rows.
            largest: maximum number of patches in one call.

        Returns:
            The GPU memory in bytes that the graphs reserve beyond torch's allocated memory. The
            value is 0 on a CPU, which needs no preparation.
        """
        if self._graphs is None:
            return 0
        before = _kept_bytes(self.device)
        width = self.config.patch_dim
        for dtype in row_dtypes:
            # the tower reads one frame of uint8 stills
            frames = self.config.temporal_patch_size if dtype == torch.uint8 else 1
            self._graphs.capture_buckets(dtype, width // frames, largest)
        return max(0, _kept_bytes(self.device) - before)

    def forward(self, rows: Tensor, grid_thw: Sequence[Sequence[int]] | Tensor) -> Tensor:
        """Encode patch rows from the engine's processor.

        Args:
            rows: (N, 1176) normalised floats or uint8 pixels, in the processor's order.
            grid_thw: (items, 3) in patches.

        Returns:
            (M, out_hidden_size) in the engine's dtype: each item's merged tokens, row-major.
        """
        if missing := self._updates.missing:
            raise CheckpointError(
                f"{len(missing)} vision tensors of an update have not arrived "
                f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''})",
                expected="a norm's weight and the weights that it scales in one update",
                remedy="send all vision weights before the next request",
            )
        if isinstance(grid_thw, Tensor):
            grids = as_grids(grid_thw)
        else:
            grids = tuple(Grid(*grid) for grid in grid_thw)
        is_float = rows.is_floating_point()
        check_rows("pixel_values", rows, grids, self.config.patch_dim, is_float=is_float)
        if not is_float:
            rows = pixels_for_tower(
                rows.to(self.device, non_blocking=True), self.config, self.image_config,
                still=self._is_still,
            )  # fmt: skip
        with torch.autocast(self.device.type, enabled=False):
            merged = run_tower(
                self.tower, self._graphs, rows, grids,
                device=self.device, dtype=self._compute_dtype, output="merged",
            )  # fmt: skip
        return merged.to(self._out_dtype)


def _kept_bytes(device: torch.device) -> int:
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
