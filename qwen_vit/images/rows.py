"""Check patch rows from a processor, and apply the processor's normalisation."""

from functools import lru_cache

import torch
from torch import Tensor

from qwen_vit.common.arguments import typed_repr
from qwen_vit.common.tensors import odd_kind
from qwen_vit.config import Grid, ImageConfig, VisionConfig
from qwen_vit.errors import ImageError

__all__ = ["as_grids", "check_rows", "normalise", "pixels_for_tower"]


def as_grids(grid_thw: Tensor) -> tuple[Grid, ...]:
    """Convert a processor's `image_grid_thw`, (images, 3) integers, to grids.

    >>> as_grids(torch.tensor([[1, 4, 6]]))
    (Grid(t=1, h=4, w=6),)
    """
    if (
        not isinstance(grid_thw, Tensor)
        or odd_kind(grid_thw)
        or grid_thw.dim() != 2
        or grid_thw.shape[1] != 3
        or grid_thw.is_floating_point()
        or grid_thw.is_complex()
        or grid_thw.dtype == torch.bool
    ):
        what = _shape_text(grid_thw) if isinstance(grid_thw, Tensor) else typed_repr(grid_thw)
        raise ImageError(
            f"grid_thw is {what}",
            expected="an integer tensor of shape (images, 3): time steps, and height and width in "
            "patches",
            remedy="pass the processor's image_grid_thw",
            code="grid",
        )
    return tuple(Grid(*row) for row in grid_thw.tolist())


def check_rows(
    name: str, rows: Tensor, grids: tuple[Grid, ...], patch_dim: int, *, is_float: bool
) -> None:
    if not isinstance(rows, Tensor):
        raise ImageError(
            f"{name} is {typed_repr(rows)}",
            expected="a torch tensor",
            remedy='ask the processor for return_tensors="pt"',
            code="patches",
        )
    kind = "floating-point" if is_float else "uint8"
    expected = (sum(grid.n_patches for grid in grids), patch_dim)
    is_kind = rows.is_floating_point() if is_float else rows.dtype == torch.uint8
    if odd_kind(rows) or tuple(rows.shape) != expected or not is_kind:
        raise ImageError(
            f"{name} is {_shape_text(rows)}",
            expected=f"{kind} rows of shape {expected}, as grid_thw requires",
            remedy="pass the rows and the grids of one call of the processor",
            code="patches",
        )


def _shape_text(tensor: Tensor) -> str:
    kind = odd_kind(tensor)
    return f"a {kind} tensor" if kind else f"{tensor.dtype} of shape {tuple(tensor.shape)}"


def normalise(values: Tensor, config: ImageConfig) -> Tensor:
    """Convert uint8 pixels (N, channels, ...) to the processor's float32, on the same device.

    The bits are the same on every device.
    """
    shape = (1, -1, *(1 for _ in range(values.dim() - 2)))
    largest, mean, std = _constants(config, values.device)
    return (values.float() / largest - mean.view(shape)) / std.view(shape)


@lru_cache(maxsize=32)  # a copy to a GPU for each call would make the host wait
def _constants(config: ImageConfig, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return 255 and the channels' mean and deviation, as float32 tensors on a device.

    On a GPU, torch replaces a division by a Python number with a multiplication by the reciprocal.
    In float16, 3 of the 768 normalised values of a published model would then have other bits.
    """
    with torch.inference_mode(False):  # the tensors outlive the caller's mode
        numbers = 255.0, config.image_mean, config.image_std
        largest, mean, std = (torch.tensor(each, dtype=torch.float32) for each in numbers)
        return largest.to(device), mean.to(device), std.to(device)


def pixels_for_tower(
    rows: Tensor, config: VisionConfig, image_config: ImageConfig, *, still: bool
) -> Tensor:
    """Convert uint8 rows (N, P) to the tower's input, on the same device.

    With `still`, both frames of a row are equal, and the result is the first frame, (N, P / 2).
    Otherwise, the result is the normalised float32 rows (N, P).
    """
    frames = config.in_channels, config.temporal_patch_size, config.patch_px**2
    pixels = rows.view(len(rows), *frames)
    return (pixels[:, :, 0] if still else normalise(pixels, image_config)).flatten(1)
