"""Replace the vision tower of vLLM's Qwen2.5-VL if VLLM_PLUGINS names this plugin.

vLLM loads every installed plugin of the group `vllm.general_plugins` in each of its processes,
unless VLLM_PLUGINS lists the plugins to load. Installing this package must not change an engine, so
`register` only logs a line if VLLM_PLUGINS does not name the plugin.
"""

import importlib.util
import logging
import os

__all__ = ["register"]

logger = logging.getLogger("vllm.qwen_vit")  # below vLLM's logger, so that vLLM prints it

NAME = "qwen_vit"
ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration"
THEIR_MODULE = "vllm.model_executor.models.qwen2_5_vl"
OUR_MODULE = "qwen_vit.integrations.vllm.model"


def register() -> None:
    """If VLLM_PLUGINS names the plugin, make vLLM build Qwen2.5-VL with this package's tower.

    vLLM calls this function in each process, in some processes more than once. Only a process that
    inspects or builds a Qwen2.5-VL imports `model`.
    """
    asked = [name.strip() for name in os.environ.get("VLLM_PLUGINS", "").split(",")]
    # vLLM 0.32 loads plugins before it configures logging, so Python prints only warnings
    level = logging.INFO if logger.isEnabledFor(logging.INFO) else logging.WARNING
    if NAME not in asked:
        logger.log(
            level,
            "qwen_vit is installed but not used. Set VLLM_PLUGINS=%s to run its vision tower.",
            NAME,
        )
        return
    if importlib.util.find_spec(THEIR_MODULE) is None:
        logger.warning("qwen_vit: this vLLM has no %s. vLLM's own vision tower runs.", THEIR_MODULE)
        return
    from vllm import ModelRegistry

    logger.log(level, "qwen_vit waits for a Qwen2.5-VL. Other models keep their own vision towers.")
    ModelRegistry.register_model(ARCHITECTURE, f"{OUR_MODULE}:{ARCHITECTURE}")
