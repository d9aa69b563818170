"""Define the vision tower of Qwen2.5-VL, to read from top to bottom.

    patch embedding -> window order -> blocks -> patch merger -> row-major order

The two kinds of block differ only in which patches a patch attends to. In a window block, a patch
attends to its window of 8 x 8 patches. In the blocks of `fullatt_block_indexes`, it attends to its
whole frame. Every index that depends on the data comes from the layout, so the forward pass
contains no loop over images and no branch on values. Once the rotary tables exist, it does not
wait for the GPU.

Sources: "Qwen2.5-VL Technical Report" (arXiv:2502.13923), section 2.1; transformers'
models/qwen2_5_vl/modeling_qwen2_5_vl.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qwen_vit.config import RMS_NORM_EPS, Grid, VisionConfig
from qwen_vit.kernels.attention import RotaryTable, attention, kind_of, tiling
from qwen_vit.kernels.linear import (
    ResidualStream,
    linear,
    linear_residual,
    normed_linear,
    rms_norm,
)
from qwen_vit.kernels.linear_fp8 import gated_rows, linear_residual_fp8
from qwen_vit.kernels.pixels import gather_pixels
from qwen_vit.layout import Layout, Segments
from qwen_vit.weight_format import (
    FP8,
    PIXEL_ZERO,
    Quantization,
    padded_mlp_size,
    padded_pixel_size,
    pixel_weight_exponent,
)

__all__ = ["LayerTaps", "Output", "VisionTower", "plan_layout"]

Output = Literal["merged", "patch"]

ROTARY_POSITIONS = 4096  # rows of the angle table; the largest published image needs 3,620


def plan_layout(
    grids: Sequence[Grid],
    config: VisionConfig,
    device: torch.device,
    dtype: torch.dtype,
    n_rows: int | None = None,
) -> Layout:
    """Return the layout on the host, with the tiles that this device's kernels need.

    >>> config = VisionConfig.from_json({"model_type": "qwen2_5_vl", "out_hidden_size": 3584})
    >>> layout = plan_layout([Grid(1, 32, 32)], config, torch.device("cpu"), torch.float32)
    >>> layout.n_patches, len(layout.merged_order)
    (1024, 256)
    """
    return Layout.from_grids(
        grids,
        config,
        window_tiling=tiling(device, dtype, _window_kind(config)),
        full_tiling=tiling(device, dtype, "full"),
        n_rows=n_rows,
    )


def _window_kind(config: VisionConfig) -> str:
    return kind_of((config.window_px // config.patch_px) ** 2)


def _parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


class Linear(nn.Module):
    """Apply a GEMM with a weight and a bias. The caller names the epilogue that it includes."""

    def __init__(self, n_in: int, n_out: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = _parameter(n_out, n_in, dtype=dtype)
        self.bias = _parameter(n_out, dtype=dtype)

    def forward(self, x: Tensor, epilogue: str = "plain") -> Tensor:
        return linear(x, self.weight, self.bias, epilogue=epilogue)


class NormedLinear(Linear):
    """Apply RMSNorm, then a GEMM. The loader folds the norm's weight into the GEMM's weight."""

    def forward(self, x: ResidualStream, epilogue: str = "plain") -> Tensor:  # type: ignore[override]
        return normed_linear(x, self.weight, self.bias, eps=RMS_NORM_EPS, epilogue=epilogue)


class ResidualLinear(Linear):
    """Apply a GEMM and add the result to the residual stream.

    With `quantized`, the new stream also contains its values in e4m3, for the MLP that follows.
    """

    def forward(  # type: ignore[override]
        self, x: Tensor, stream: ResidualStream, *, quantized: bool = False
    ) -> ResidualStream:
        return linear_residual(stream, x, self.weight, self.bias, quantized=quantized)


class PatchEmbed(nn.Module):
    """Convert a patch's pixels to C values. The convolution is a GEMM, because the kernel size
    equals the stride."""

    def __init__(self, config: VisionConfig, dtype: torch.dtype) -> None:
        super().__init__()
        C, P = config.hidden_size, config.patch_dim
        self.out_dtype = dtype
        # float16 has 3 more mantissa bits; the power of two keeps weights in range
        operand_dtype = torch.float16 if dtype == torch.bfloat16 else dtype
        self.scale = 2.0 ** -pixel_weight_exponent(dtype)
        self.weight = _parameter(C, P, dtype=operand_dtype)
        # the same for uint8 pixels of a still image: both frames summed, mean and std folded in
        self.pixel_weight = _parameter(C, padded_pixel_size(config), dtype=operand_dtype)
        self.pixel_bias = _parameter(C, dtype=torch.float32)

    def forward(self, patches: Tensor, grid_index: Tensor) -> Tensor:
        """Convert uint8 pixels or float rows in grid order to (rows, C) in window order."""
        if patches.dtype != torch.uint8:
            rows = patches[grid_index].to(self.weight.dtype)
            return linear(rows, self.weight, out_scale=self.scale, out_dtype=self.out_dtype)
        pixels = gather_pixels(
            patches, grid_index, zero=PIXEL_ZERO, width=self.pixel_weight.shape[1],
            dtype=self.pixel_weight.dtype,
        )  # fmt: skip
        return linear(
            pixels, self.pixel_weight, self.pixel_bias,
            out_scale=self.scale, out_dtype=self.out_dtype,
        )  # fmt: skip


class Attention(nn.Module):
    """Compute x + proj(attention(qkv(norm(x))))."""

    def __init__(
        self, config: VisionConfig, dtype: torch.dtype, quantization: Quantization | None
    ) -> None:
        super().__init__()
        self.n_heads = config.num_heads
        self.quantized = quantization == "fp8"  # the MLP that follows takes e4m3
        self.qkv = NormedLinear(config.hidden_size, 3 * config.hidden_size, dtype)
        self.proj = ResidualLinear(config.hidden_size, config.hidden_size, dtype)

    def forward(
        self, x: ResidualStream, rotary: RotaryTable, segments: Segments, kind: str
    ) -> ResidualStream:
        N, C = x.values.shape
        qkv = self.qkv(x).view(N, 3, self.n_heads, C // self.n_heads)
        # the loader has made each rotary pair of Q and K adjacent
        out = attention(qkv, rotary, segments, kind=kind, adjacent_pairs=True)
        return self.proj(out.view(N, C), x, quantized=self.quantized)


class MLP(nn.Module):
    """Compute x + down(silu(gate(norm(x))) * up(norm(x))).

    The loader has padded I with zeros, which change no value, and interleaved gate and up.
    """

    def __init__(self, config: VisionConfig, dtype: torch.dtype) -> None:
        super().__init__()
        C, I = config.hidden_size, padded_mlp_size(config)  # noqa: E741
        self.gate_up = NormedLinear(C, 2 * I, dtype)
        self.down = ResidualLinear(I, C, dtype)

    def forward(self, x: ResidualStream) -> ResidualStream:
        return self.down(self.gate_up(x, epilogue="swiglu"), x)


class QuantizedLinear(nn.Module):
    """Hold an e4m3 weight with a scale per output column, and a bias."""

    def __init__(self, n_in: int, n_out: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = _parameter(n_out, n_in, dtype=FP8)
        self.weight_scale = _parameter(n_out, dtype=torch.float32)
        self.bias = _parameter(n_out, dtype=dtype)

    def __getstate__(self) -> dict[str, Any]:  # pickle fails for torch's 8-bit floats
        return {**self.__dict__, "_parameters": self._with_weight_in(torch.uint8)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._parameters = self._with_weight_in(FP8)

    def _with_weight_in(self, dtype: torch.dtype) -> dict[str, nn.Parameter | None]:
        weight = nn.Parameter(self.weight.data.view(dtype), requires_grad=False)
        return {**self._parameters, "weight": weight}


class QuantizedMLP(nn.Module):
    """Compute the same function as `MLP`, from e4m3 rows and weights, with sums in float32.

    The kernels that write the stream and the hidden rows also quantise them.
    """

    def __init__(self, config: VisionConfig, dtype: torch.dtype) -> None:
        super().__init__()
        C, I = config.hidden_size, padded_mlp_size(config)  # noqa: E741
        self.gate_up = QuantizedLinear(C, 2 * I, dtype)
        self.down = QuantizedLinear(I, C, dtype)

    def forward(self, x: ResidualStream) -> ResidualStream:
        gate_up, down = self.gate_up, self.down
        hidden = gated_rows(
            x, (gate_up.weight, gate_up.weight_scale), gate_up.bias, eps=RMS_NORM_EPS
        )
        return linear_residual_fp8(x, hidden, (down.weight, down.weight_scale), down.bias)


class Block(nn.Module):
    def __init__(
        self, config: VisionConfig, dtype: torch.dtype, quantization: Quantization | None
    ) -> None:
        super().__init__()
        self.attn = Attention(config, dtype, quantization)
        self.mlp = MLP(config, dtype) if quantization is None else QuantizedMLP(config, dtype)

    def forward(
        self, x: ResidualStream, rotary: RotaryTable, segments: Segments, kind: str
    ) -> ResidualStream:
        return self.mlp(self.attn(x, rotary, segments, kind))


class PatchMerger(nn.Module):
    """Normalise the patches of a merge unit, and turn these 4 patches into one merged token."""

    def __init__(self, config: VisionConfig, dtype: torch.dtype) -> None:
        super().__init__()
        merged = config.hidden_size * config.merge_unit
        self.norm_weight = _parameter(config.hidden_size, dtype=dtype)
        self.fc1 = Linear(merged, merged, dtype)
        self.fc2 = Linear(merged, config.out_hidden_size, dtype)

    def forward(self, x: Tensor) -> Tensor:
        # each of the 4 has its own scale, so this norm is not a row scale of the GEMM
        normed = rms_norm(x, self.norm_weight, RMS_NORM_EPS)
        merged = normed.view(-1, self.fc1.weight.shape[1])
        return self.fc2(self.fc1(merged, epilogue="gelu"))


@dataclass(frozen=True, slots=True)
class LayerTaps:
    """Collect the residual stream after chosen blocks, before any norm.

    `rows` maps a block to (N, C) in raster order, a copy in the tower's dtype. After the last
    block, the rows equal `output="patch"`.
    """

    blocks: tuple[int, ...]
    rows: dict[int, Tensor] = field(default_factory=dict)

    def keep(self, block: int, stream: ResidualStream, layout: Layout) -> None:
        if block in self.blocks:
            self.rows[block] = stream.values[layout.raster_order]


class VisionTower(nn.Module):
    """Turn patches and their layout into one embedding per merged token or per patch.

    >>> from qwen_vit import VisionEncoder
    >>> encoder = VisionEncoder.from_pretrained("tiny", device="cpu")
    >>> layout = plan_layout([Grid(1, 4, 6)], encoder.config, encoder.device, encoder.dtype)
    >>> encoder.tower(torch.zeros(24, 588, dtype=torch.uint8), layout).shape
    torch.Size([6, 192])

    Construct the tower on the meta device, without weights, and assign the result of
    `convert.convert`.
    """

    def __init__(
        self, config: VisionConfig, dtype: torch.dtype, quantization: Quantization | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.quantization = quantization
        self.patch_embed = PatchEmbed(config, dtype)
        self.blocks = nn.ModuleList(
            [Block(config, dtype, quantization) for _ in range(config.depth)]
        )
        self.merger = PatchMerger(config, dtype)
        self.window_kind = _window_kind(config)
        self.angles: tuple[Tensor, Tensor] | None = None  # of every position so far

    def forward(
        self,
        patches: Tensor,
        layout: Layout,
        output: Output = "merged",
        taps: LayerTaps | None = None,
    ) -> Tensor:
        """Encode `patches`, (N, P / 2) uint8 or (N, P) float, to (M, O), or unmerged to (N, C).

        `patches` are in grid order. The rows of the result are in raster order of their cells,
        image after image. `taps` collects the rows after chosen blocks, and does not change the
        result.
        """
        cos, sin = self._rotary_angles(layout.n_positions)
        rotary = RotaryTable(cos, sin, layout.positions)

        # to window order: merge units move, their 4 patches stay together
        x = ResidualStream.from_values(self.patch_embed(patches, layout.grid_index))  # (rows, C)

        for index, block in enumerate(self.blocks):
            if index in self.config.fullatt_block_indexes:
                x = block(x, rotary, layout.frames, "full")
            else:
                x = block(x, rotary, layout.windows, self.window_kind)
            if taps is not None:
                taps.keep(index, x, layout)

        if output == "patch":
            return x.values[layout.raster_order]
        # back to row-major: each merged cell fetches the window-order unit that it became
        return self.merger(x.values)[layout.merged_order]  # (M, O)

    def _rotary_angles(self, n_positions: int) -> tuple[Tensor, Tensor]:
        """Return one axis's cosines and sines by position and frequency: (positions, R / 2).

        The host computes the tables in float64 and rounds them once to float32, whatever the
        tower's dtype. With angles in bf16, a cosine at position 256 would be wrong by 0.47.
        """
        angles = self.angles
        if angles is None or len(angles[0]) < n_positions:
            config, device = self.config, self.patch_embed.weight.device
            size = max(ROTARY_POSITIONS, n_positions)
            # plain tensors, in any mode and with any default device of the caller
            with torch.inference_mode(False), torch.device("cpu"):
                frequencies = torch.arange(0, config.rotary_pairs, 2, dtype=torch.float64)
                inverse = config.rope_theta ** -(frequencies / config.rotary_pairs)
                phases = torch.outer(torch.arange(size, dtype=torch.float64), inverse)
                angles = (phases.cos().float().to(device), phases.sin().float().to(device))
            self.angles = angles
        return angles  # not the attribute: another thread may store a shorter table there
