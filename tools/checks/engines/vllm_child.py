"""What `tools.checks.engines.vllm_checks` runs inside vLLM's environment: one engine a process.

python -m tools.checks.engines.vllm_child SCENARIO WORK   the scenario's answers, to WORK/answers

Which tower answers pixels is decided by the process's environment: with VLLM_PLUGINS=qwen_vit it is
ours, by the plugin, and with VLLM_PLUGINS empty vLLM's own.
"""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import click
import torch
from PIL import Image

from qwen_vit import ImageFeatures, VisionEncoder
from qwen_vit.integrations.vllm import to_vllm
from tools.checks.engines.answers import Answer, Answers, save_answers
from tools.checks.engines.cases import CASES, FPS, NEW_TOKENS, Case, case, frames

Request = dict[str, Any]
Scenario = Callable[[Path], dict[str, Answers]]


def start_engine(work: Path, **options: Any) -> Any:
    """vLLM's engine with the small model, in this process."""
    from vllm import LLM

    return LLM(
        model=str(work / "model"), dtype="float32", enforce_eager=True, max_model_len=1024,
        max_num_seqs=8, max_logprobs=-1, limit_mm_per_prompt={"image": 8, "video": 4},
        **{"enable_prefix_caching": False, "enable_mm_embeds": True, **options},
    )  # fmt: skip


def ask(engine: Any, requests: Sequence[Request]) -> list[Answer]:
    """Answers of requests that the engine is given together."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=-1)
    answers = []
    for done in engine.generate(list(requests), sampling, use_tqdm=False):
        [output] = done.outputs
        logprobs = torch.tensor(
            [[step[i].logprob for i in range(len(step))] for step in output.logprobs],
            dtype=torch.float64,
        )
        answers.append(Answer(torch.tensor(output.token_ids), logprobs))
    return answers


def pixel_request(each: Case) -> Request:
    """A case as pixels, for the engine's own processor."""
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


@cache
def encoder(work: Path) -> VisionEncoder:
    """Our encoder with the small model's tower."""
    return VisionEncoder.from_pretrained(work / "model", device="cpu", dtype="float32")


@cache
def features(work: Path, name: str) -> ImageFeatures:
    """Our features of a picture."""
    [made] = encoder(work).encode([frames(name)[0]])
    return made


def feature_request(work: Path, each: Case, pictures: Sequence[ImageFeatures] = ()) -> Request:
    """A case as features; `pictures` in place of the right ones."""
    data = {}
    if each.pictures:
        data = to_vllm(pictures or [features(work, name) for name in each.pictures])
    return {"prompt": each.text, **({"multi_modal_data": data} if data else {})}


def offline(work: Path) -> dict[str, Answers]:
    """Every case as pixels and as features: alone, batched, and with faults that must be seen."""
    engine = start_engine(work)
    return {
        **_each_way(engine, "pixels", pixel_request),
        **_each_way(engine, "features", lambda each: feature_request(work, each), without_video),
        **controls(engine, work),
    }


def prefix_cache(work: Path) -> dict[str, Answers]:
    """The same with the prefix cache, every case twice: the second time from the cache."""
    engine = start_engine(work, enable_prefix_caching=True)
    found: dict[str, Answers] = {}
    for turn in ("", ", cached"):
        found |= _each_way(engine, f"pixels, prefix cache{turn}", pixel_request)
        found |= _each_way(
            engine, f"features, prefix cache{turn}", lambda each: feature_request(work, each),
            without_video,
        )  # fmt: skip
    return found


def pixels(work: Path) -> dict[str, Answers]:
    """Every case as pixels: with VLLM_PLUGINS=qwen_vit by our tower."""
    return _each_way(start_engine(work, enable_mm_embeds=False), "pixels", pixel_request)


def every(each: Case) -> bool:
    """All cases."""
    return True


def without_video(each: Case) -> bool:
    """The cases of pictures and text."""
    return not each.videos


def _each_way(
    engine: Any,
    name: str,
    request: Callable[[Case], Request],
    which: Callable[[Case], bool] = every,
) -> dict[str, Answers]:
    chosen = [each for each in CASES if which(each)]
    alone = {each.name: ask(engine, [request(each)])[0] for each in chosen}
    batched = ask(engine, [request(each) for each in chosen])
    together = {each.name: answer for each, answer in zip(chosen, batched, strict=True)}
    return {name: alone, f"{name}, batched": together}


def controls(engine: Any, work: Path) -> dict[str, Answers]:
    """Features with faults, whose answers must be others."""
    one, several = case("wide"), case("several")
    right = features(work, "wide")
    backwards = ImageFeatures(right.id, right.embeds.flip(0), right.grid_thw)
    exchanged = [features(work, name) for name in case("swapped").pictures]
    asked = {
        one.name: feature_request(work, one, [backwards]),
        several.name: feature_request(work, several, exchanged),
    }
    answers = [ask(engine, [request])[0] for request in asked.values()]
    return {"control": dict(zip(asked, answers, strict=True))}


SCENARIOS: dict[str, Scenario] = {
    "offline": offline,
    "prefix-cache": prefix_cache,
    "pixels": pixels,
}


@click.command(help=__doc__)
@click.argument("scenario", type=click.Choice(list(SCENARIOS)))
@click.argument("work", type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(scenario: str, work: Path) -> None:
    """Run one scenario in one engine."""
    for way, answers in SCENARIOS[scenario](work).items():
        save_answers(work / "answers" / f"{way}.safetensors", answers)


if __name__ == "__main__":
    main()
