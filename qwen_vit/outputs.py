"""Choose the rows that `encode` returns for an image, and the blocks with dense features."""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self, get_args

import torch
from torch import Tensor

from qwen_vit.common.arguments import check_choice, short_repr
from qwen_vit.errors import ArgumentError, with_options
from qwen_vit.features import FeatureOutput
from qwen_vit.kernels.pooling import segment_means, unit_rows
from qwen_vit.model import LayerTaps

__all__ = ["ImageRows", "OutputOptions", "check_layers", "check_normalize"]


class ImageRows(NamedTuple):
    """Hold one image's rows and its rows after each chosen block, in separate memory."""

    embeds: Tensor
    layers: dict[int, Tensor]


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """Describe the rows that a caller requested: `output`, `normalize` and `layers` of `encode`."""

    output: FeatureOutput = "merged"
    normalize: bool = False
    layers: tuple[int, ...] = ()

    @classmethod
    def checked(cls, output: Any, normalize: Any, layers: Any, depth: int) -> Self:
        check_choice("output", output, get_args(FeatureOutput))
        check_normalize(output, normalize)
        return cls(output, normalize, check_layers(layers, depth))

    @property
    def tower_output(self) -> Literal["merged", "patch"]:
        """Return the tower's output for these rows. A mean needs merged rows."""
        return "patch" if self.output == "patch" else "merged"

    def taps(self) -> LayerTaps | None:
        return LayerTaps(self.layers) if self.layers else None

    def join(self, pieces: Sequence[ImageRows]) -> ImageRows:
        """Join the rows of one video's pieces. Pass pieces from `split(..., pool=False)`."""
        embeds = torch.cat([piece.embeds for piece in pieces])
        if self.output == "mean":
            embeds = segment_means(embeds, [len(embeds)])
            embeds = unit_rows(embeds) if self.normalize else embeds
        layers = {k: torch.cat([piece.layers[k] for piece in pieces]) for k in self.layers}
        return ImageRows(embeds, layers)

    def split(
        self,
        rows: Tensor,
        taps: LayerTaps | None,
        patches: Sequence[int],
        merge_unit: int,
        *,
        pool: bool = True,
    ) -> list[ImageRows]:
        """Return the rows of a batch by image. `patches` gives each image's patch count.

        With `pool=False`, `join` computes a mean later.
        """
        lengths = [n if self.output == "patch" else n // merge_unit for n in patches]
        if self.output == "mean" and pool:
            rows, lengths = segment_means(rows, lengths), [1] * len(lengths)
            rows = unit_rows(rows) if self.normalize else rows
        # give each image separate memory: keeping one must not keep its whole batch
        copies: Any = torch.split_with_sizes_copy  # its stub says None
        tapped = {} if taps is None else taps.rows
        layers = {block: copies(found, list(patches)) for block, found in tapped.items()}
        return [
            ImageRows(embeds, {block: parts[index] for block, parts in layers.items()})
            for index, embeds in enumerate(copies(rows, lengths))
        ]


def check_normalize(output: str, normalize: object) -> None:
    if not isinstance(normalize, bool):
        raise ArgumentError(f"normalize is {short_repr(normalize)}", expected="True or False")
    if normalize and output != "mean":
        raise ArgumentError(
            with_options("{} requires {}", "normalize", ("output", "mean")),
            remedy="omit this option: `similarity` scales rows to unit length itself",
        )


def check_layers(layers: Iterable[Any], depth: int | None = None) -> tuple[int, ...]:
    """Return blocks in ascending order.

    >>> check_layers([31, 7], depth=32)
    (7, 31)

    Without `depth`, any block number >= 0 is valid.
    """
    last = "" if depth is None else f" to {depth - 1}"
    expected = f"integers from 0{last}, each once"
    blocks: list[int] = []
    if isinstance(layers, str | bytes) or not isinstance(layers, Iterable):
        raise ArgumentError(
            with_options("{} is {layers}", "layers", layers=short_repr(layers)),
            expected="a list of blocks such as [1]",
        )
    for each in layers:
        try:
            block = -1 if isinstance(each, bool) else operator.index(each)
        except TypeError:
            block = -1
        if block < 0 or (depth is not None and block >= depth):
            raise ArgumentError(
                with_options("{} contains {each}", "layers", each=short_repr(each)),
                expected=expected,
            )
        if block in blocks:
            raise ArgumentError(
                with_options("{} contains {block} twice", "layers", block=block), expected=expected
            )
        blocks.append(block)
    return tuple(sorted(blocks))
