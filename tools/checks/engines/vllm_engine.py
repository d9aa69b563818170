"""Run vLLM's engine with the small model, and convert cases to requests."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from qwen_vit.integrations.vllm import to_vllm
from tools.checks.engines.answers import Answer, Answers, alone_and_batched
from tools.checks.engines.cases import CASES, FPS, NEW_TOKENS, Case, frames
from tools.checks.engines.features import of_case

Request = dict[str, Any]
Call = tuple[Tensor, Tensor, Tensor]  # the tower's rows, grids and result


@dataclass(slots=True)
class Engine:
    """Hold vLLM's engine with the small model, in this process.

    Attributes:
        llm: vLLM's `LLM`.
        cached_tokens: the number of prompt tokens from the prefix cache so far.
    """

    llm: Any
    cached_tokens: int = 0

    @classmethod
    def start(cls, work: Path, **options: Any) -> "Engine":
        """Start an engine with vLLM's `options`."""
        from vllm import LLM

        settings = {
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 1024,
            "max_num_seqs": 8,
            "max_logprobs": -1,
            "limit_mm_per_prompt": {"image": 8, "video": 4},
            "enable_prefix_caching": False,
            "enable_mm_embeds": True,
        }
        return cls(LLM(**{"model": str(work / "model"), **settings, **options}))

    def ask(self, requests: Sequence[Request]) -> list[Answer]:
        """Return the engine's answers to requests in one batch."""
        from vllm import SamplingParams

        sampling = SamplingParams(
            temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=-1
        )
        answers = []
        for done in self.llm.generate(list(requests), sampling, use_tqdm=False):
            [output] = done.outputs
            logprobs = [[step[i].logprob for i in range(len(step))] for step in output.logprobs]
            tokens = torch.tensor(output.token_ids)
            answers.append(Answer(tokens, torch.tensor(logprobs, dtype=torch.float64)))
            self.cached_tokens += done.num_cached_tokens or 0
        return answers

    def tower(self) -> str:
        """Return the class of the vision tower in every process."""
        return " and ".join(sorted(set(self.llm.apply_model(_tower_name))))

    def record_calls(self) -> list[Call]:
        """Start recording the vision tower's inputs and outputs."""
        calls: list[Call] = []

        def record(_: Any, given: tuple[Tensor], named: dict[str, Any], output: Tensor) -> None:
            calls.append((given[0].clone(), torch.tensor(named["grid_thw"]), output.clone()))

        def register(model: Any) -> None:
            model.visual.register_forward_hook(record, with_kwargs=True)

        self.llm.apply_model(register)
        return calls

    def answer(
        self, name: str, request: Callable[[Case], Request], cases: Sequence[Case] = CASES
    ) -> dict[str, Answers]:
        """Answer the cases one by one, and all of them together."""
        return alone_and_batched(self.ask, name, request, cases)


def _tower_name(model: Any) -> str:
    return type(model.visual).__name__


def pixel_request(each: Case) -> Request:
    """Convert a case to pixels, for the engine's own processor."""
    data: dict[str, Any] = {}
    if each.pictures:
        data["image"] = [Image.fromarray(frames(name)[0]) for name in each.pictures]
    if each.videos:
        data["video"] = [(frames(name), _video_facts(name)) for name in each.videos]
    return {"prompt": each.text, **({"multi_modal_data": data} if data else {})}


def _video_facts(name: str) -> dict[str, Any]:
    n = len(frames(name))
    return {
        "fps": FPS,
        "duration": n / FPS,
        "total_num_frames": n,
        "frames_indices": list(range(n)),
        "video_backend": "opencv",
        "do_sample_frames": False,
    }


def feature_request(work: Path, each: Case) -> Request:
    """Convert a case to features."""
    pictures, videos, seconds = of_case(work, each)
    if not pictures and not videos:
        return {"prompt": each.text}
    data = to_vllm(pictures, videos=videos, second_per_grid_ts=seconds)
    return {"prompt": each.text, "multi_modal_data": data}
