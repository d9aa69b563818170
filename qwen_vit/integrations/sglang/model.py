"""Run Qwen2.5-VL in SGLang with this package's vision tower in place of SGLang's tower.

If SGLANG_EXTERNAL_MODEL_PACKAGE names the parent package, SGLang imports this module in each of its
processes. SGLang then builds `EntryClass` for Qwen2.5-VL checkpoints. SGLang provides all other
parts: processor, scheduler, caches, language model and data parallelism.
"""

import logging
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from typing import Any

from torch import Tensor

from qwen_vit.config import ImageConfig, VisionConfig
from qwen_vit.errors import ArgumentError, CheckpointError
from qwen_vit.graphs import MAX_BUCKET
from qwen_vit.integrations.engine_tower import EngineTower

try:
    from sglang.srt.managers import mm_schedule
    from sglang.srt.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration as TheirModel
    from sglang.srt.runtime_context import get_server_args

    NEEDED = TheirModel.load_weights, mm_schedule.embedding_cache
except (ImportError, AttributeError) as error:
    # SGLang logs an ImportError as a warning, and then runs its own model
    fact = f"qwen_vit does not fit this SGLang, whose own vision tower runs: {error}"
    raise ImportError(fact) from error

__all__ = ["RUN_WITH", "Qwen2_5_VLForConditionalGeneration"]

logger = logging.getLogger("sglang.qwen_vit")

RUN_WITH = ("0.5.23",)  # SGLang versions that tools/checks/engines has tested

PREFIXES = ("visual.", "model.visual.")  # names in the Hub's files; names in transformers >= 4.52
KEPT = "original_"
WITHOUT = "start SGLang without SGLANG_EXTERNAL_MODEL_PACKAGE"


class Qwen2_5_VLForConditionalGeneration(  # noqa: N801  # SGLang finds models by this name
    TheirModel  # type: ignore[misc]
):
    """Define SGLang's Qwen2.5-VL with an `EngineTower` as `visual`."""

    visual: Any

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__(config, quant_config, prefix)
        dtype, device = self.visual.dtype, self.visual.device
        try:
            ours = VisionConfig.from_json(_as_published(config.vision_config), source="the config")
            self.visual = None  # frees SGLang's tower before ours is allocated
            # SGLang's processor normalises, so the image settings do not matter
            self.visual = EngineTower(ours, ImageConfig.from_json({}), dtype, device)
        except CheckpointError as error:
            raise ArgumentError(
                f"qwen_vit cannot run this vision tower: {error.fact}",
                expected=error.expected,
                remedy=WITHOUT,
            ) from error
        if version("sglang") not in RUN_WITH:
            logger.warning(
                "We tested qwen_vit with SGLang %s, not with %s. This version has the "
                "names that qwen_vit needs, so qwen_vit continues.",
                " and ".join(RUN_WITH), version("sglang"),
            )  # fmt: skip
        self._unwritten = {name for name, _ in self.visual.named_parameters()}
        self._is_prepared = False
        logger.info("qwen_vit runs the vision tower, in %s on %s.", dtype, device)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
        """Load the tower's tensors, and pass every other tensor on to SGLang as it arrives.

        SGLang calls this method at the start with all weights, and for updates with some weights.
        """
        written: set[str] = set()

        def others() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
                if prefix is None:
                    yield name, tensor
                else:
                    own = [(name.removeprefix(prefix), tensor)]
                    written.update(self.visual.load_weights(own))

        loaded = super().load_weights(others())
        self._unwritten -= written
        if self._unwritten:
            raise CheckpointError(
                f"{len(self._unwritten)} of the {len(self.visual.state_dict())} tensors of the "
                "vision tower were not loaded",
                expected=f"all vision weights, under {' or '.join(PREFIXES)}",
                remedy=f"use a whole Qwen2.5-VL checkpoint, or {WITHOUT}",
            )
        if written and mm_schedule.embedding_cache is not None:
            # SGLang 0.5.23 caches embeddings of any tower, and would answer with embeddings of the
            # old weights
            mm_schedule.embedding_cache.clear()
        self._prepare()
        return loaded

    def post_load_weights(self) -> None:
        """Prepare the tower after SGLang itself has filled all parameters, for example with dummy
        weights."""
        self._unwritten.clear()
        self._prepare()

    def _prepare(self) -> None:
        """Compile kernels and capture graphs before SGLang gives the free GPU memory to its
        caches."""
        if self._is_prepared or get_server_args().enable_memory_saver:
            # SGLang's memory saver releases memory that is allocated while weights load, and graphs
            # would read it. Therefore the first request captures the graphs.
            return
        self._is_prepared = True
        self.visual.prepare([self.visual.dtype], MAX_BUCKET)


def _as_published(vision_config: Any) -> dict[str, Any]:
    """Return the vision config with the checkpoint's sizes.

    On a CPU, SGLang replaces `num_heads` and `intermediate_size` with larger numbers, and keeps the
    checkpoint's as `original_num_heads` and `original_intermediate_size`.
    """
    vision: dict[str, Any] = vision_config.to_dict()
    kept = {name.removeprefix(KEPT): vision[name] for name in vision if name.startswith(KEPT)}
    return {**vision, **kept}


EntryClass = Qwen2_5_VLForConditionalGeneration
