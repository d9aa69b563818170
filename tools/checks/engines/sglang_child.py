"""Run one engine per process inside SGLang's environment, for `sglang_checks`.

python -m tools.checks.engines.sglang_child SCENARIO NAME WORK

It writes answers to WORK/answers/NAME, and other results to WORK/facts/NAME.json. The environment
variable SGLANG_EXTERNAL_MODEL_PACKAGE decides which tower encodes pixels.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from qwen_vit.errors import QwenVitError
from qwen_vit.integrations.hf import expand_placeholders
from qwen_vit.integrations.sglang import to_sglang
from tools.checks.engines.answers import (
    Answer,
    Answers,
    Found,
    alone_and_batched,
    child_command,
)
from tools.checks.engines.cases import (
    CASES,
    NEW_TOKENS,
    SECONDS_PER_GRID,
    Case,
    case,
    frames,
    grid,
    rows,
)
from tools.checks.engines.changed import IN_PIECES, UPDATED, pieces
from tools.checks.engines.features import encoder, features
from tools.checks.engines.small_model import N_TOKENS

Request = dict[str, Any]

TURNS, NO_CACHE = ("", ", again"), ", no radix cache"

# These settings let SGLang run on a CPU without its compiled kernels.
SETTINGS = {
    "device": "cpu",
    "dtype": "float32",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "mm_attention_backend": "sdpa",
    "grammar_backend": "none",
    "max_total_tokens": 4096,
    "context_length": 1024,
    "max_running_requests": 16,
    "random_seed": 0,
    "log_level": "info",
}
SAMPLING = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}


@dataclass(slots=True)
class Engine:
    """Hold SGLang's engine with the small model. Its scheduler is a separate process.

    Attributes:
        engine: SGLang's `Engine`.
        tokenizer: the model's tokenizer.
        cached_tokens: the number of prompt tokens from the radix cache so far.
    """

    engine: Any
    tokenizer: Any
    cached_tokens: int = 0

    @classmethod
    def start(cls, work: Path, **options: Any) -> "Engine":
        """Start an engine with SGLang's `options`."""
        import sglang
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(work / "model")
        settings = {"model_path": str(work / "model"), **SETTINGS, **options}
        engine = sglang.Engine(**settings)
        return cls(engine, tokenizer)

    def ask(self, requests: Sequence[Request]) -> list[Answer]:
        """Return the engine's answers to requests in one batch."""
        if any("text" in request for request in requests):
            prompts = {"prompt": [request["text"] for request in requests]}
        else:
            prompts = {"input_ids": [self.input_ids(request["case"]) for request in requests]}
        made = self.engine.generate(
            **prompts, image_data=[request.get("images") for request in requests],
            sampling_params=SAMPLING, return_logprob=True, top_logprobs_num=N_TOKENS,
        )  # fmt: skip
        self.cached_tokens += sum(each["meta_info"]["cached_tokens"] for each in made)
        return [parse_answer(each) for each in made]

    def input_ids(self, each: Case) -> list[int]:
        """Return a case's tokens, with one placeholder per row of embeddings."""
        text = expand_placeholders(
            each.text,
            [grid(name) for name in each.pictures],
            video_grids=[grid(name) for name in each.videos],
        )
        ids: list[int] = self.tokenizer(text).input_ids
        return ids

    def answer(
        self, name: str, request: Callable[[Case], Request], cases: Sequence[Case] = CASES
    ) -> dict[str, Answers]:
        """Answer the cases one by one, and all of them together."""
        return alone_and_batched(self.ask, name, request, cases)


def parse_answer(document: Any) -> Answer:
    """Parse the answer from the output of SGLang's `generate`, of the engine or the server."""
    facts = document["meta_info"]
    logprobs = torch.full((NEW_TOKENS, N_TOKENS), torch.nan, dtype=torch.float64)
    for i, step in enumerate(facts["output_top_logprobs"]):
        for logprob, token, _ in step:
            logprobs[i, token] = logprob
    tokens = [token for _, token, _ in facts["output_token_logprobs"]]
    return Answer(torch.tensor(tokens), logprobs)


def pixel_request(each: Case) -> Request:
    """Convert a case of images to pixels and text, for SGLang's own processor."""
    images = [Image.fromarray(frames(name)[0]) for name in each.pictures]
    return {"text": each.text, **({"images": images} if images else {})}


def row_request(work: Path, each: Case) -> Request:
    """Convert a case to a processor's rows, which SGLang passes to its tower.

    SGLang 0.5.23 assumes 24 frames a second for every video that its own processor cuts, so this
    function passes the seconds.
    """
    settings = encoder(work).image_config
    item: dict[str, Any] = {"format": "processor_output"}
    for names, values, grids in (
        (each.pictures, "pixel_values", "image_grid_thw"),
        (each.videos, "pixel_values_videos", "video_grid_thw"),
    ):
        if names:
            item[values] = rows(names, settings.image_mean, settings.image_std).float()
            item[grids] = torch.tensor([grid(name) for name in names])
    if each.videos:
        item["second_per_grid_ts"] = torch.tensor(len(each.videos) * [SECONDS_PER_GRID])
    return {"case": each, **({"images": [item]} if len(item) > 1 else {})}


def feature_request(work: Path, each: Case) -> Request:
    """Convert a case of images to features."""
    made = [features(work, name) for name in each.pictures]
    return {"case": each, **({"images": to_sglang(made)} if made else {})}


def has_no_video(each: Case) -> bool:
    """Return whether a case has only images and text."""
    return not each.videos


PICTURE_CASES = [each for each in CASES if has_no_video(each)]
VIDEO_CASES = [each for each in CASES if each.videos]


def own(work: Path, turns: Sequence[str] = TURNS, **options: Any) -> Found:
    """Answer with SGLang's own tower and with our features, twice. The second time, prompts are
    cached."""
    engine = Engine.start(work, **options)
    found: dict[str, Answers] = {}
    hits = 0
    for turn in turns:
        hits = engine.cached_tokens
        found |= engine.answer(f"pixels{turn}", pixel_request, PICTURE_CASES)
        found |= engine.answer(
            f"features{turn}", lambda each: feature_request(work, each), PICTURE_CASES
        )
    hits = engine.cached_tokens - hits
    found |= controls(engine, work)
    # SGLang's own tower attends across the frames of a video.
    found |= {
        f"control, {way}": answers
        for way, answers in engine.answer(
            "SGLang's tower, videos", lambda each: row_request(work, each), VIDEO_CASES
        ).items()
    }
    return found, {"cached_tokens": hits}


def own_without_cache(work: Path) -> Found:
    """Run `own` without the radix cache."""
    return own(work, (NO_CACHE,), disable_radix_cache=True)


def controls(engine: Engine, work: Path) -> dict[str, Answers]:
    """Answer with faulty features, which must change the answers."""
    one, several = case("wide"), case("several")
    right = features(work, "wide")
    backwards = replace(right, embeds=right.embeds.flip(0))
    exchanged = [features(work, name) for name in case("swapped").pictures]
    requests = {one: to_sglang([backwards]), several: to_sglang(exchanged)}
    return {
        "control": {
            each.name: engine.ask([{"case": each, "images": images}])[0]
            for each, images in requests.items()
        }
    }


def tower(work: Path, turns: Sequence[str] = TURNS, **options: Any) -> Found:
    """Answer every case with our tower, as pixels, rows and features, twice."""
    engine = Engine.start(work, **options)
    found: dict[str, Answers] = {}
    hits = 0
    for turn in turns:
        hits = engine.cached_tokens
        found |= engine.answer(f"pixels{turn}", pixel_request, PICTURE_CASES)
        found |= engine.answer(f"rows{turn}", lambda each: row_request(work, each))
    hits = engine.cached_tokens - hits
    found |= engine.answer("features", lambda each: feature_request(work, each), PICTURE_CASES)
    return found | controls(engine, work), {"cached_tokens": hits}


def tower_without_cache(work: Path) -> Found:
    """Run `tower` without the radix cache."""
    return tower(work, (NO_CACHE,), disable_radix_cache=True)


def updates(work: Path) -> Found:
    """Answer with dummy weights, with the model's weights, with other vision weights in pieces, and
    again with the model's weights."""
    engine = Engine.start(work, load_format="dummy")

    def answers(name: str) -> dict[str, Answers]:
        requests = [row_request(work, case(each)) for each in UPDATED]
        return {name: dict(zip(UPDATED, engine.ask(requests), strict=True))}

    dummy = answers("dummy")
    finite = all(bool(each.logprobs.isfinite().all()) for each in dummy["dummy"].values())
    replies = [engine.engine.update_weights_from_disk(str(work / "model"), load_format="auto")]
    found = answers("weights from disk over dummy ones")
    replies.append(engine.engine.begin_weight_update())
    for piece in pieces(work):
        replies.append(engine.engine.update_weights_from_tensor(piece))
    replies.append(engine.engine.end_weight_update())
    found |= answers(IN_PIECES)
    replies.append(engine.engine.update_weights_from_disk(str(work / "model")))
    found |= answers("weights from disk")
    return found, {"finite": finite, "replies": [[each[0], str(each[1])] for each in replies]}


def parallel(work: Path) -> Found:
    """Answer every case over two processes, each of which encodes a share of the items."""
    engine = Engine.start(work, tp_size=2, mm_enable_dp_encoder=True)
    return engine.answer("rows", lambda each: row_request(work, each)), {}


def video_features(work: Path) -> Found:
    """Check that our code rejects features of a video, and that unchecked features crash SGLang."""
    each = case("video")
    made = [features(work, name) for name in each.videos]
    refusal = ""
    try:
        to_sglang(made)
    except QwenVitError as error:
        refusal = str(error)
    (work / "facts" / "refusal.json").write_text(json.dumps(refusal))
    engine = Engine.start(work)
    item = {
        "format": "precomputed_embedding",
        "feature": torch.cat([one.embeds for one in made]),
        "video_grid_thw": torch.tensor([one.grid_thw for one in made]),
        "second_per_grid_ts": torch.tensor(len(made) * [SECONDS_PER_GRID]),
    }
    engine.engine.generate(
        input_ids=[engine.input_ids(each)], video_data=[[item]], sampling_params=SAMPLING
    )
    return {}, {}


def start(work: Path, **options: Any) -> Found:
    """Start an engine that must fail."""
    Engine.start(work, **options)
    return {}, {}


SCENARIOS: dict[str, Callable[[Path], Found]] = {
    "own": own,
    "own-without-cache": own_without_cache,
    "tower": tower,
    "tower-without-cache": tower_without_cache,
    "updates": updates,
    "parallel": parallel,
    "video-features": video_features,
    "float16": lambda work: start(work, dtype="float16"),
    "quantised": lambda work: start(work, model_path=str(work / "quantised")),
    "incomplete": lambda work: start(work, model_path=str(work / "incomplete")),
}


main = child_command(__doc__, SCENARIOS)


if __name__ == "__main__":
    main()
