"""Real engines beside our features and our tower: the same answers as transformers in float64.

`environment` builds an engine's pinned environment, `small_model` writes a model of 14 MB, `cases`
holds prompts with pictures and videos, `reference` answers them with transformers in float64, and
`answers` compares. `vllm_checks` names vLLM's scenarios, and `vllm_plugin_checks` has those of our
tower; `vllm_child` runs them inside the engine's environment. `changed` and `other_models` write
models with other weights and other towers.
"""
