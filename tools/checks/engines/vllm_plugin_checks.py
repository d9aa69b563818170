"""Define vLLM's scenarios with this package installed, and with our tower as plugin."""

import tomllib

from qwen_vit import __version__
from tools.checks.engines.answers import Result, compare, plain
from tools.checks.engines.changed import Changed, write_unfit
from tools.checks.engines.context import Context
from tools.checks.engines.other_models import CASES_OF_OTHERS, TOWERS, write_other_models
from tools.common import ROOT

CHILD = "tools.checks.engines.vllm_child"
PLUGIN = "our tower by plugin: "
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # the engine runs in the child process itself
OURS, THEIRS = "EngineTower", "Qwen2_5_VisionTransformer"

VARIANTS = {  # scenario: the class of the tower in vLLM
    "limits of 0": "StageMissingLayer",
    "unknown version": OURS,
    "other names": THEIRS,
}
LINES_OF_VARIANTS = {  # log line: its number of occurrences
    "qwen_vit runs the vision tower": 1,
    "not with 0.99.0. This version has the names that qwen_vit needs": 1,
    "does not fit vLLM 0.99.0": 1,
    "._process_image_input. vLLM's own vision tower runs": 1,
}
REFUSALS = {  # the start options of an engine, and a part of its error
    "float16": "dtype is float16, and activations of the published 3B model overflow",
    "cudagraph_mm_encoder": "qwen_vit does not run with cudagraph_mm_encoder",
    "compile_mm_encoder": "qwen_vit does not run with compile_mm_encoder",
    "enable_tower_connector_lora": "qwen_vit does not run with enable_tower_connector_lora",
    "quantised": "of a quantised or other type",
    "compressed": "this checkpoint's vision tower is quantised (visual.",
    "incomplete": "weights were not initialized from checkpoint",  # the error of vLLM
}


def installed(context: Context) -> dict[str, str]:
    """Return the variables of a process in which this package counts as installed, with its
    plugins. Python finds entry points by an installed package's metadata. A folder with the same
    two files replaces the metadata, so that the environment still matches its lock.
    """
    folder = context.work / "installed" / f"qwen_vit-{__version__}.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = []
    for group, names in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in names.items())]
    (folder / "entry_points.txt").write_text("\n".join(lines) + "\n")
    (folder / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: qwen-vit\nVersion: {__version__}\n"
    )
    return {"PYTHONPATH": f"{ROOT}:{folder.parent}"}


def by_plugin(context: Context) -> dict[str, str]:
    """Return the variables of a process that runs our tower."""
    return {**installed(context), "VLLM_PLUGINS": "qwen_vit"}


def same_bits(name: str, unequal: dict[str, int], dtype: str) -> list[Result]:
    """Check that rows had only this dtype, and that the tower computed the encoder's bits."""
    wanted = [f"{kind} in {dtype}" for kind in ("images", "videos")]
    came = ", ".join(unequal) or "none"
    return [
        plain(name, "rows", sorted(unequal) == wanted, f"of {came}"),
        *(
            plain(name, f"bits of {kind}", n == 0, f"{n} values are not the encoder's")
            for kind, n in unequal.items()
        ),
    ]


def passive(context: Context) -> list[Result]:
    """Check that vLLM runs its own tower, and logs one line on the plugin, by default."""
    name = "passive"
    context.run_child(CHILD, "pixels", name, VLLM_PLUGINS=None, **IN_PROCESS, **installed(context))
    found = context.facts(name)["tower"]
    log = context.log(name).read_text(errors="replace")
    lines = log.count("qwen_vit is installed but not used. Set VLLM_PLUGINS=qwen_vit")
    return [
        *context.compare(name, lambda way: f"installed, not asked: {way}"),
        plain(name, "which tower", found == THEIRS, f"{found} ran"),
        plain(name, "the log names the setting", lines == 1, f"{lines} line"),
    ]


def producer(context: Context) -> list[Result]:
    """Check that an encoder-only engine writes the bits of `encode` into the encoder cache."""
    context.run_child(CHILD, "ec-producer", "plugin-producer", **IN_PROCESS, **by_plugin(context))
    distances = context.facts("plugin-producer")["distances"]
    return [
        plain("our tower by plugin: producer", name, distance == 0,
              f"{distance:.1e} from encode" if distance else "the bits of encode")
        for name, distance in distances.items()
    ]  # fmt: skip


def other_models(context: Context) -> list[Result]:
    """Check models with other vision towers. vLLM's own towers run, one line reports this, and no
    answer changes."""
    write_other_models(context.work)
    without, name = "other-models", "plugin-other-models"
    context.run_child(CHILD, without, without, **IN_PROCESS)
    context.run_child(CHILD, without, name, **IN_PROCESS, **by_plugin(context))
    results = []
    for model, tower in TOWERS.items():
        for way in (model, f"{model}, batched"):
            right, answers = context.answers(without, way), context.answers(name, way)
            results += [
                compare(f"with the plugin: {way}", each, answers[each], right[each])
                for each in CASES_OF_OTHERS
            ]
        right = context.answers(without, model)
        results.append(
            compare("control", f"{model}: swapped", right["swapped"], right["several"],
                    must_differ=True)
        )  # fmt: skip
        found = context.facts(name)["towers"][model]
        results.append(plain(name, f"{model}: which tower", found == tower, f"{found} ran"))
    lines = context.log(name).read_text(errors="replace").count("Other models keep their own")
    return [*results, plain(name, "the log has the line", lines == 1, f"{lines} line")]


def variants(context: Context) -> list[Result]:
    """Check an engine without images, a vLLM of an unknown version, and a vLLM with changed
    names."""
    name = "plugin-variants"
    context.run_child(CHILD, "variants", name, **IN_PROCESS, **by_plugin(context))
    towers = context.facts(name)["towers"]
    log = context.log(name).read_text(errors="replace")
    results = context.compare(name, lambda way: f"{PLUGIN}{way}")
    for variant, tower in VARIANTS.items():
        found = towers[variant]
        results.append(plain(name, f"{variant}: which tower", found == tower, f"{found} ran"))
    for line, wanted in LINES_OF_VARIANTS.items():
        n = log.count(line)
        results.append(plain(name, f"the log: {line[-40:]}", n == wanted, f"{n} of {wanted} lines"))
    return results


def updates(context: Context) -> list[Result]:
    """Check that answers follow weight updates. Changed weights must give other answers than the
    model."""
    changed = Changed.write(context)
    name = "plugin-updates"
    context.run_child(CHILD, "updates", name, **IN_PROCESS, **by_plugin(context))
    facts = context.facts(name)
    log = context.log(name).read_text(errors="replace")
    warned = [layer for layer in facts["layers"] if f" {layer}: Failed to load weights" in log]
    return [
        *changed.compare(name, lambda way: f"{PLUGIN}{way}"),
        plain(name, "which tower", facts["tower"] == OURS, f"{facts['tower']} ran"),
        plain(name, "dummy weights", facts["finite"], "finite answers"),
        plain(name, "vLLM's warnings", not warned, f"of our layers: {', '.join(warned) or 'none'}"),
    ]


def refusals(context: Context) -> list[Result]:
    """Check that the engine's start fails, with the reason, if our tower cannot run."""
    write_unfit(context.work)
    context.run_child(CHILD, "refusals", "plugin-refusals", **IN_PROCESS, **by_plugin(context))
    facts = context.facts("plugin-refusals")
    results = []
    for name, expected in REFUSALS.items():
        ours = [error for error in facts[name] if expected in error]
        fact = ours[0] if ours else f"{expected!r} not in {facts[name]}"
        results.append(plain("our tower by plugin: refusals", name, bool(ours), fact))
    return results
