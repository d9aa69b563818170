"""The named choices of a comparison. It imports nothing, so that `--help` stays fast."""

from typing import Literal

__all__ = ["ATTENTIONS", "PROCESSORS", "Attention", "Processor"]

Attention = Literal["sdpa", "eager", "flash_attention_2"]
ATTENTIONS: tuple[Attention, ...] = ("sdpa", "eager", "flash_attention_2")
Processor = Literal["pillow", "torchvision"]
PROCESSORS: tuple[Processor, ...] = ("pillow", "torchvision")
