"""Compute the requests' first-token log-probabilities by transformers in float64 on the GPU."""

from pathlib import Path

import torch
from torch import Tensor

from tools.benchmarks.engines.workloads import PROMPT, picture, request_sizes


def oracle_logprobs(folder: Path, device: torch.device) -> Tensor:
    """Return log-probabilities (requests, vocabulary) in float64 for the model in `folder`."""
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
        Qwen2VLImageProcessorPil,
    )

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float64)
    model = model.to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    image_id = model.config.image_token_id
    rows = []
    for seed, size in enumerate(request_sizes()):
        made = processor(images=[picture(*size, seed)], return_tensors="pt").to(device)
        tokens = int(made["image_grid_thw"].prod()) // 4
        text = PROMPT.replace("<|image_pad|>", "<|image_pad|>" * tokens)
        ids = tokenizer(text, return_tensors="pt")["input_ids"].to(device)
        with torch.inference_mode():
            output = model(
                input_ids=ids,
                pixel_values=made["pixel_values"].double(),
                image_grid_thw=made["image_grid_thw"],
                mm_token_type_ids=(ids == image_id).long(),
                logits_to_keep=1,
            )
        rows.append(output.logits[0, -1].double().log_softmax(-1).cpu())
    return torch.stack(rows)
