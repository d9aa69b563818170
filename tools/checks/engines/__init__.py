"""Check real engines with our features and our tower against transformers in float64.

`environment` builds an engine's pinned environment. `small_model` writes a model of 14 MB. `cases`
defines prompts with images and videos. `reference` answers them with transformers in float64, and
`answers` compares answers. `vllm_checks` names vLLM's scenarios, and `vllm_plugin_checks` has the
scenarios with our tower. `vllm_child` runs scenarios inside the engine's environment. `changed` and
`other_models` write models with different weights and different towers.
"""
