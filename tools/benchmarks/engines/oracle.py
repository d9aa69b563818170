"""Compute the requests' embeddings and first-token log-probabilities in float64 on the GPU."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tools.benchmarks.engines.workloads import PROMPT, picture, request_sizes


class Oracle:
    """Hold transformers' float64 model of `folder`."""

    def __init__(self, folder: Path, device: torch.device, n_requests: int | None = None) -> None:
        from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
            Qwen2VLImageProcessorPil,
        )

        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float64)
        self._model: Any = model.to(device).eval()
        self._tower = self._model.model.visual
        self._requests = []
        tokenizer = AutoTokenizer.from_pretrained(folder)
        processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
        for seed, size in enumerate(request_sizes()[:n_requests]):
            made = processor(images=[picture(*size, seed)], return_tensors="pt").to(device)
            tokens = int(made["image_grid_thw"].prod()) // 4
            text = PROMPT.replace("<|image_pad|>", "<|image_pad|>" * tokens)
            ids = tokenizer(text, return_tensors="pt")["input_ids"].to(device)
            self._requests.append((ids, made["pixel_values"].double(), made["image_grid_thw"]))

    @torch.inference_mode()
    def embeddings(self) -> list[Tensor]:
        """Return the tower's embeddings of every request, (tokens, D) each."""
        return [self._tower(rows, grid_thw=grid).pooler_output for _, rows, grid in self._requests]

    def logprobs(self, embeddings: Sequence[Tensor]) -> Tensor:
        """Return the language model's float64 outputs (requests, vocabulary) for a tower's
        embeddings."""
        found = []
        for (ids, rows, grid), given in zip(self._requests, embeddings, strict=True):
            with torch.inference_mode(), self._tower_gives(given):
                output = self._model(
                    input_ids=ids,
                    pixel_values=rows,
                    image_grid_thw=grid,
                    mm_token_type_ids=(ids == self._model.config.image_token_id).long(),
                    logits_to_keep=1,
                )
            found.append(output.logits[0, -1].log_softmax(-1).cpu())
        return torch.stack(found)

    @contextmanager
    def _tower_gives(self, embeddings: Tensor) -> Iterator[None]:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        given = embeddings.to(self._model.device, torch.float64)

        def forward(*_: Any, **__: Any) -> Any:
            return BaseModelOutputWithPooling(last_hidden_state=given, pooler_output=given)

        self._tower.forward = forward
        try:
            yield
        finally:
            del self._tower.forward  # restores the method of the class
