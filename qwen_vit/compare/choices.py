"""Define the named choices of a comparison, without slow imports, so that `--help` is fast."""

from typing import Literal

__all__ = ["ATTENTIONS", "PROCESSORS", "Attention", "Processor"]

Attention = Literal["sdpa", "eager", "flash_attention_2"]
ATTENTIONS: tuple[Attention, ...] = ("sdpa", "eager", "flash_attention_2")
Processor = Literal["pillow", "torchvision"]
PROCESSORS: tuple[Processor, ...] = ("pillow", "torchvision")
