"""Run one engine per process inside vLLM's environment, for `vllm_checks`.

python -m tools.checks.engines.vllm_child SCENARIO NAME WORK

It writes answers to WORK/answers/NAME, and other results to WORK/facts/NAME.json. The environment
variable VLLM_PLUGINS decides which tower encodes pixels: `qwen_vit` selects our tower, and an empty
value selects vLLM's own tower.
"""

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from qwen_vit.errors import QwenVitError
from qwen_vit.integrations.engine_tower import EngineTower
from qwen_vit.integrations.vllm import read_ec_cache, to_vllm, to_vllm_cached
from tools.checks.engines.answers import Answers, Found, child_command
from tools.checks.engines.cases import PICTURES, Case, case, frames
from tools.checks.engines.changed import IN_PIECES, UPDATED, pieces
from tools.checks.engines.features import encoder, features, of_case
from tools.checks.engines.other_models import CASES_OF_OTHERS, TOWERS
from tools.checks.engines.vllm_engine import Call, Engine, Request, feature_request, pixel_request

UNKNOWN_VERSION = "0.99.0"
NEEDED_NAME = "_process_image_input"


def _tower_layers(model: Any) -> list[str]:
    """Return the names of the tower's classes, which vLLM uses in warnings about layers that it
    cannot load."""
    return sorted({type(module).__name__ for module in model.visual.modules()})


def offline(work: Path) -> Found:
    """Answer every case as pixels and as features: alone, in a batch, and with faults."""
    engine = Engine.start(work)
    calls = engine.record_calls()
    found = engine.answer("pixels", pixel_request)
    found |= engine.answer("features", lambda each: feature_request(work, each))
    tower = engine.tower()
    is_ours = tower == EngineTower.__name__
    facts = {"tower": tower, **({"unequal": unequal_values(work, calls)} if is_ours else {})}
    return found | controls(engine, work), facts


def float_rows(work: Path) -> Found:
    """Answer every case as pixels that the engine's processor normalises (vLLM < 0.28)."""
    engine = Engine.start(work, mm_device_do_normalize=False, enable_mm_embeds=False)
    calls = engine.record_calls()
    found = engine.answer("float rows", pixel_request)
    return found, {"tower": engine.tower(), "unequal": unequal_values(work, calls)}


def unequal_values(work: Path, calls: Sequence[Call]) -> dict[str, int]:
    """Return the number of values, for each kind of rows, with other bits than the encoder's
    output."""
    ours = encoder(work)
    found: dict[str, int] = {}
    for rows, grids, output in calls:
        is_still = bool((grids[:, 0] == 1).all())  # every video here has more steps
        if rows.is_floating_point():
            right = ours.encode_patches(rows, grids)
        else:
            right = ours.encode_pixels(rows, grids, still=is_still)
        dtype = str(rows.dtype).removeprefix("torch.")
        kind = f"{'images' if is_still else 'videos'} in {dtype}"
        found[kind] = found.get(kind, 0) + int((output != right).sum())
    return found


def controls(engine: Engine, work: Path) -> dict[str, Answers]:
    """Answer with faulty features, which must change the answers."""
    one, several, video = case("wide"), case("several"), case("video")
    right, clip = features(work, "wide"), of_case(work, video)[1]
    backwards = replace(right, embeds=right.embeds.flip(0))
    exchanged = [features(work, name) for name in case("swapped").pictures]
    both = case("videos and a picture")
    without_seconds = feature_request(work, both)["multi_modal_data"]
    del without_seconds["video"]["second_per_grid_ts"]  # vLLM then assumes one second
    requests = {
        one: to_vllm([backwards]),
        several: to_vllm(exchanged),
        video: to_vllm(videos=clip, second_per_grid_ts=[2.0]),
        both: without_seconds,
    }
    answers = {
        each.name: engine.ask([{"prompt": each.text, "multi_modal_data": data}])[0]
        for each, data in requests.items()
    }
    return {"control": answers}


def prefix_cache(work: Path) -> Found:
    """Answer twice with the prefix cache. The second time, prompts are cached."""
    engine = Engine.start(work, enable_prefix_caching=True, block_size=32)  # the minimum on a CPU
    found: dict[str, Answers] = {}
    hits = {}
    for turn in ("", ", again"):
        before = engine.cached_tokens
        found |= engine.answer(f"pixels, prefix cache{turn}", pixel_request)
        found |= engine.answer(
            f"features, prefix cache{turn}", lambda each: feature_request(work, each)
        )
        hits[turn] = engine.cached_tokens - before
    return found, {"tower": engine.tower(), "cached_tokens": hits[", again"]}


def pixels(work: Path) -> Found:
    """Answer every case as pixels."""
    engine = Engine.start(work, enable_mm_embeds=False)
    return engine.answer("pixels", pixel_request), {"tower": engine.tower()}


def ec_consumer(work: Path) -> Found:
    """Answer every case from the encoder cache that another process wrote into WORK/ec."""
    cache = read_ec_cache(work / "ec")
    engine = Engine.start(work, ec_transfer_config=transfer(work / "ec", "ec_consumer"))

    def request(each: Case) -> Request:
        names = [*each.pictures, *each.videos]
        entries = [cache[name] for name in names]
        return {"prompt": each.text, **(to_vllm_cached(entries) if entries else {})}

    return engine.answer("encoder cache", request), {"tower": engine.tower()}


def ec_producer(work: Path) -> Found:
    """Send images through an engine that runs only the tower and writes the rows to files."""
    folder = work / "produced"
    engine = Engine.start(
        work, mm_encoder_only=True, enable_mm_embeds=False,
        ec_transfer_config=transfer(folder, "ec_producer"),
    )  # fmt: skip
    distances = {}
    for name in PICTURES:
        request = {
            "prompt": case("tall").text,
            "multi_modal_data": {"image": [Image.fromarray(frames(name)[0])]},
            "multi_modal_uuids": {"image": [name]},
        }
        engine.llm.generate([request], use_tqdm=False)
        made = load_file(folder / name / "encoder_cache.safetensors")["ec_cache"].double()
        ours = features(work, name).embeds.double()
        distances[name] = float((made - ours).abs().max() / ours.abs().max())
    return {}, {"tower": engine.tower(), "distances": distances}


def transfer(folder: Path, role: str) -> dict[str, Any]:
    """Return vLLM's setting for an encoder cache in a folder."""
    return {
        "ec_connector": "ECExampleConnector",
        "ec_role": role,
        "ec_connector_extra_config": {"shared_storage_path": str(folder)},
    }


def other_models(work: Path) -> Found:
    """Send images to models with other vision towers, each in a separate engine."""
    found: dict[str, Answers] = {}
    towers = {}
    for name in TOWERS:
        engine = Engine.start(work, model=str(work / name), enable_mm_embeds=False)
        found |= engine.answer(name, pixel_request, [case(each) for each in CASES_OF_OTHERS])
        towers[name] = engine.tower()
        del engine
    return found, {"towers": towers}


def variants(work: Path) -> Found:
    """Run an engine without images, a vLLM of an unknown version, and a vLLM with changed names."""
    none = {"image": 0, "video": 0}
    found: dict[str, Answers] = {}
    towers = {}
    for variant, change, names, options in (
        ("limits of 0", None, ["text"], {"limit_mm_per_prompt": none}),
        ("unknown version", unknown_version, UPDATED, {}),
        ("other names", other_names, UPDATED, {}),
    ):
        if change:
            change()
        engine = Engine.start(work, enable_mm_embeds=False, **options)
        answers = engine.ask([pixel_request(case(name)) for name in names])
        found[variant] = dict(zip(names, answers, strict=True))
        towers[variant] = engine.tower()
        del engine  # its destructor would close resources of the next engine
    return found, {"towers": towers}


def unknown_version() -> None:
    """Give this process's vLLM a version that the plugin does not support."""
    import vllm

    vllm.__version__ = UNKNOWN_VERSION
    forget_our_model()


def other_names() -> None:
    """Rename a method of this process's vLLM that the plugin needs."""
    from vllm.model_executor.models import qwen2_5_vl

    source = inspect.getsource(qwen2_5_vl).replace(NEEDED_NAME, "_embed_images")
    exec(compile(source, qwen2_5_vl.__file__, "exec"), qwen2_5_vl.__dict__)
    forget_our_model()


def forget_our_model() -> None:
    """Let vLLM import the plugin's model again."""
    from vllm.model_executor.model_loader import utils
    from vllm.model_executor.models import registry

    sys.modules.pop("qwen_vit.integrations.vllm.model")
    registry._try_load_model_cls.cache_clear()
    utils._MODEL_ARCH_BY_HASH.clear()


def updates(work: Path) -> Found:
    """Answer with dummy weights, the model's weights, other vision weights in pieces, the model's
    weights, and pieces again."""
    engine = Engine.start(work, load_format="dummy", enable_mm_embeds=False)
    llm = engine.llm

    def answers(name: str) -> dict[str, Answers]:
        llm.reset_mm_cache()
        llm.llm_engine.reset_encoder_cache()  # required after every weight update
        requests = [pixel_request(case(each)) for each in UPDATED]
        return {name: dict(zip(UPDATED, engine.ask(requests), strict=True))}

    dummy = answers("dummy")
    finite = all(bool(each.logprobs.isfinite().all()) for each in dummy["dummy"].values())
    llm.collective_rpc("update_config", args=({"load_config": {"load_format": "auto"}},))
    llm.collective_rpc("reload_weights")
    found = answers("weights from disk over dummy ones")
    for piece in pieces(work):
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(piece)})
    found |= answers(f"{IN_PIECES} by reload_weights")
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(work / "model")})
    found |= answers("weights from disk")
    for piece in pieces(work):
        llm.apply_model(partial(_load_weights, piece))
    found |= answers(f"{IN_PIECES} by load_weights")
    [layers] = llm.apply_model(_tower_layers)
    return found, {"tower": engine.tower(), "layers": layers, "finite": finite}


def _load_weights(piece: list[tuple[str, Tensor]], model: Any) -> None:
    model.load_weights(piece)


def parallel(work: Path, mode: str) -> Found:
    """Answer every case over two processes, each with the whole tower, or a share of items."""
    engine = Engine.start(
        work, tensor_parallel_size=2, mm_encoder_tp_mode=mode, enable_mm_embeds=False
    )
    found = engine.answer(f"2 processes, {mode}", pixel_request)
    return found, {"tower": engine.tower()}


REFUSED: dict[str, dict[str, Any]] = {
    "float16": {"dtype": "float16"},
    "cudagraph_mm_encoder": {"compilation_config": {"cudagraph_mm_encoder": True}},
    "compile_mm_encoder": {"compilation_config": {"compile_mm_encoder": True}},
    "enable_tower_connector_lora": {"enable_lora": True, "enable_tower_connector_lora": True},
    "quantised": {"model": "quantised"},
    "compressed": {"model": "compressed"},
    "incomplete": {"model": "incomplete"},
}


def refusals(work: Path) -> Found:
    """Return the errors with which engines do not start, because our tower cannot run."""
    found = {}
    for name, options in REFUSED.items():
        folder = work / options.get("model", "model")
        try:
            Engine.start(work, **{**options, "model": str(folder)})
        except Exception as error:  # noqa: BLE001  # vLLM raises its own around ours
            found[name] = [f"{type(each).__name__}: {each}" for each in causes(error)]
        else:
            found[name] = []
    return {}, found


def causes(error: BaseException | None) -> list[BaseException]:
    """Return an error and its causes, the first cause last."""
    return [] if error is None else [error, *causes(error.__cause__ or error.__context__)]


def nan(work: Path) -> Found:
    """Send NaN in a request's features, and record the answers to shorter requests afterwards. Two
    blocks of 128 tokens serve one request at a time. The next requests therefore use the same
    blocks, whose ends still contain the NaN of the longer request.
    """
    engine = Engine.start(work, max_model_len=128, max_num_seqs=1, num_gpu_blocks_override=3)
    wide, others = case("wide"), [case(name) for name in ("text", "strip", "tall")]
    right = features(work, "wide")
    bad = replace(right, embeds=right.embeds * float("nan"))
    refusal = ""
    try:
        to_vllm([bad])
    except QwenVitError as error:
        refusal = str(error)
    before = {each.name: engine.ask([feature_request(work, each)])[0] for each in others}
    data = to_vllm([right])
    data["image"]["image_embeds"] = bad.embeds
    engine.ask([{"prompt": wide.text, "multi_modal_data": data}])
    after = [engine.ask([feature_request(work, each)])[0] for each in others]
    n_nan = sum(bool(answer.logprobs.isnan().any()) for answer in after)
    return {"before NaN": before}, {"refusal": refusal, "n_nan": n_nan, "others": len(others)}


SCENARIOS: dict[str, Callable[[Path], Found]] = {
    "offline": offline,
    "float-rows": float_rows,
    "prefix-cache": prefix_cache,
    "pixels": pixels,
    "ec-consumer": ec_consumer,
    "ec-producer": ec_producer,
    "nan": nan,
    "other-models": other_models,
    "updates": updates,
    "variants": variants,
    "refusals": refusals,
    "parallel": partial(parallel, mode="weights"),
    "parallel-data": partial(parallel, mode="data"),
}


main = child_command(__doc__, SCENARIOS)


if __name__ == "__main__":
    main()
