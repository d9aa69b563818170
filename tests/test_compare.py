"""`qwen-vit compare`: agreement is found, and so is every injected fault, by stage and name."""

import itertools
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qwen_vit import VisionEncoder
from qwen_vit.checkpoint.published_tensors import GivenTensors
from qwen_vit.common import atomic_file as atomic_file_module
from qwen_vit.common import transformers_version
from qwen_vit.compare import huggingface as reference
from qwen_vit.compare import measure
from qwen_vit.compare import run as compare_module
from qwen_vit.compare.golden import METADATA_KEY, Golden, load_golden
from qwen_vit.compare.huggingface import Processed
from qwen_vit.compare.result import Comparison
from qwen_vit.compare.run import compare, compare_with_golden
from qwen_vit.compare.text import as_text, closer_line
from qwen_vit.compare.tolerance import Difference, fp32_budget, judge, relative_error
from qwen_vit.errors import ArgumentError, ComparisonError
from qwen_vit.images.patches import patchify
from tests.support.checkpoints import SMALL as SMALL_TOWER
from tests.support.checkpoints import write_checkpoint, write_weights
from tests.support.goldens import IMAGE_FOLDER, PHOTOGRAPHS, TINY_FOLDER
from tests.support.weight_faults import WeightFault, damaged, every_fault, inject_fault

ROOT = Path(__file__).resolve().parent.parent
CHELSEA, ROCKET = IMAGE_FOLDER / "chelsea.png", IMAGE_FOLDER / "rocket.jpg"
SMALL = ("--model", "tiny", "--device", "cpu", "--max-pixels", "30000")
STAGES = ["patch_embed", *(f"block.{i}" for i in range(5)), "merger"]


@cache
def encoder() -> VisionEncoder:
    return VisionEncoder.from_pretrained("tiny", device="cpu", max_pixels=30_000)


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Golden:
    """Of two photographs, from Hugging Face."""
    path = tmp_path_factory.mktemp("golden") / "golden.safetensors"
    assert compare(encoder(), [CHELSEA, ROCKET], save_golden=path).passed
    return load_golden(path)


@pytest.fixture
def run(qwen_vit: Any) -> Any:
    """`qwen-vit compare ARGUMENTS` in this process: exit code, stdout, stderr."""
    return partial(qwen_vit, "compare")


# Against transformers


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_tiny_checkpoint_agrees_at_every_stage(run: Any, attention: str) -> None:
    code, out, err = run(CHELSEA, *SMALL, "--attention", attention, "--json")
    document = json.loads(out)
    assert (code, document["agrees"], document["golden"]) == (0, True, None), err
    assert document["reference"]["attention"] == attention
    [image] = document["images"]
    assert [stage["stage"] for stage in image["stages"]] == STAGES
    assert image["tower_input"] == "uint8 pixels"
    [pillow] = [part for part in image["preprocessing"] if part["processor"] == "pillow"]
    assert (pillow["same_grid"], pillow["values_differ"], pillow["passed"]) == (True, 0, True)
    for stage in image["stages"]:
        assert 0 < stage["relative"] <= stage["allowed"]
        assert stage["allowed"] == fp32_budget(stage["theirs_against_float64"])
        assert stage["ratio"] == stage["ours_against_float64"] / stage["theirs_against_float64"]
        assert 0.999999 < stage["worst_cosine"] <= stage["mean_cosine"] <= 1
        assert 0 < stage["largest"] < 1e-4


def test_the_verdict_comes_first_and_every_stage_with_v(run: Any) -> None:
    verdict = r"agrees: 1 of 1 image, 7 stages; the worst is .*/chelsea\.png\)"
    for flags, listed in (((), []), (("-v",), STAGES)):
        code, out, _ = run(CHELSEA, *SMALL, *flags)
        lines = out.splitlines()
        assert code == 0
        assert re.fullmatch(verdict, lines[0])
        assert lines[1].startswith("closer to float64: ours, at 7 of 7 stages")
        stages = [line.split()[0] for line in lines if re.match(r"  (patch|block|merger)", line)]
        assert stages == listed
    assert re.search(rf"\n  {CHELSEA} +agrees  +\S+e-07 ", run(CHELSEA, *SMALL)[1])


def test_who_is_closer_to_float64_is_said_in_words() -> None:
    [image] = compare(encoder(), [CHELSEA]).images

    def line(*pairs: tuple[float, float]) -> str:
        """For images of one stage, with these errors of ours and of Hugging Face's."""
        stages = [replace(image.stages[-1], ours=ours, theirs=theirs) for ours, theirs in pairs]
        images = tuple(replace(image, stages=(stage,)) for stage in stages)
        return closer_line(Comparison({}, images, ()))

    assert line((1e-7, 2e-7), (3e-7, 4e-7), (2e-7, 1e-7)) == (
        "closer to float64: ours, at 2 of 3 stages; in the merged tokens our error is 0.50 to 2.00 "
        "times Hugging Face's"
    )
    assert line((2e-7, 1e-7)).startswith("closer to float64: Hugging Face, at 1 of 1 stage; ")
    assert "our error is 2.00 times" in line((2e-7, 1e-7))
    assert line() == line((math.nan, 1e-7)) == ""


@pytest.mark.slow
def test_three_photographs_and_their_page_take_less_than_a_minute(tmp_path: Path) -> None:
    """In a process of its own, as a user's. Processor time: on two cores the clock shows no more,
    and what else the machine does meanwhile does not count."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "qwen_vit", "compare", "--model", "tiny", "--device", "cpu",
         *(str(IMAGE_FOLDER / name) for name in PHOTOGRAPHS), "--report", str(tmp_path / "page")],
        capture_output=True, text=True, check=False, timeout=240,
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert done.returncode == 0, done.stderr
    assert "agrees: 3 of 3 images, 21 stages" in done.stdout
    assert (tmp_path / "page" / "index.html").stat().st_size > 1_000_000
    print(f"{seconds:.0f} s")
    assert seconds < 60


def test_a_mistake_of_ours_alone_is_found_at_its_stage(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint is right: Hugging Face and the oracle read it, and only our tower is off."""
    fault = WeightFault("blocks.2.attn.proj.bias", "bias dropped", "block.2")
    broken = replace(encoder(), tower=inject_fault(encoder(), fault).tower)
    monkeypatch.setattr(VisionEncoder, "from_pretrained", lambda *_, **__: broken)
    code, out, _ = run(CHELSEA, *SMALL)
    assert code == 1
    assert f"differs: {CHELSEA}: first at block.2: " in out
    assert "agrees" not in out.splitlines()[0]


def test_a_mistake_of_hugging_face_is_not_taken_for_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reference far from float64 would otherwise allow ours twice that distance."""
    hf_tower = compare_module.hf_tower

    def broken(tensors: Any, *arguments: Any) -> Any:
        name = "blocks.3.mlp.down_proj.weight"
        return hf_tower({**tensors, name: tensors[name] * 1.5}, *arguments)

    monkeypatch.setattr(compare_module, "hf_tower", broken)
    [image] = compare(encoder(), [CHELSEA]).images
    assert image.problems[0].startswith("block.3: Hugging Face is ")
    assert "not the same model, or not the same input" in image.problems[0]
    assert all(stage.ours < 1e-6 for stage in image.stages)


def shifted(pixels: Processed, levels: float, std: float = 0.26862954) -> Processed:
    """Other grey levels in the first channel of the first patch."""
    values = pixels.pixel_values.clone()
    values[0, : values.shape[1] // 3] += levels / 255 / std
    return pixels._replace(pixel_values=values)


@pytest.mark.parametrize(("processor", "passed"), [("pillow", False), ("torchvision", True)])
def test_processors_are_named_apart_and_only_the_pillow_one_is_judged(
    monkeypatch: pytest.MonkeyPatch, processor: str, passed: bool
) -> None:
    """Both towers get the chosen processor's pixels: ours as well, where they are not our own.

    Once, ours took its own pixels whenever they were the Pillow processor's, and differed.
    """
    process = reference.process

    def pretended(rgb: Any, config: Any, which: Any, **name: str) -> Processed:
        done = process(rgb, config, "pillow", **name)
        return shifted(done, 3.0) if which == processor else done

    versions = {**reference.package_versions(), "torchvision": "0"}
    monkeypatch.setattr(compare_module, "process", pretended)
    monkeypatch.setattr(compare_module, "package_versions", lambda: versions)
    done = compare(encoder(), [CHELSEA], processor=processor)  # type: ignore[arg-type]
    [image] = done.images
    parts = {part.processor: part for part in image.preprocessing}
    assert set(parts) == {"pillow", "torchvision"}
    odd = parts[processor]
    assert (odd.values_differ, odd.largest_levels, odd.passed) == (392, 3, False)
    assert [part.values_differ for name, part in parts.items() if name != processor] == [0]
    assert all(stage.verdict.passed for stage in image.stages)
    assert image.tower_input == "the pixel values of the processor"
    assert done.passed == passed
    if not passed:
        assert image.problems[0].startswith("preprocessing (pillow): 392 of ")


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_an_image_of_a_few_rows_is_compared_as_what_it_is(rows: int) -> None:
    """transformers took its rows for channels, and another grid for a mistake of ours."""
    rgb = np.random.default_rng(rows).integers(0, 256, (rows, 5, 3), np.uint8)
    config = encoder().image_config
    theirs = reference.process(rgb, config, "pillow")
    part = measure.compare_pixels("pillow", patchify(rgb, config), theirs, config)
    assert (part.same_grid, part.values_differ) == (True, 0)


def test_another_grid_is_reported_before_any_value(monkeypatch: pytest.MonkeyPatch) -> None:
    process = reference.process
    monkeypatch.setattr(
        compare_module, "process",
        lambda rgb, config, which, **name: process(rgb[:60], config, which, **name),
    )  # fmt: skip
    [image] = compare(encoder(), [CHELSEA]).images
    [part] = image.preprocessing
    assert (part.same_grid, part.values_differ, part.passed) == (False, None, False)
    assert "its grid is (1, 4, 32)" in image.problems[0]
    assert "different grid" in as_text(compare(encoder(), [CHELSEA]), has_stages=True)


def test_an_image_that_cannot_be_read_is_skipped_and_ends_with_1(run: Any, tmp_path: Path) -> None:
    torn = tmp_path / "torn.png"
    torn.write_bytes(CHELSEA.read_bytes()[:5000])
    code, out, _ = run(CHELSEA, torn, *SMALL, "--json")
    document = json.loads(out)
    assert (code, len(document["images"]), document["agrees"]) == (1, 1, False)
    assert [(each["id"], each["code"]) for each in document["skipped"]] == [
        (str(torn), "truncated")
    ]
    code, out, _ = run(torn, *SMALL)
    assert (code, "skipped: " in out, "agrees" in out) == (1, True, False)
    assert out.splitlines()[1] == "nothing was compared: every image was skipped"
    assert "agrees: 1 of 1 image," in run(CHELSEA, torn, *SMALL)[1]
    code, out, err = run(torn, *SMALL, "--save-golden", tmp_path / "golden.safetensors")
    assert (code, out, list(tmp_path.iterdir())) == (2, "", [torn])
    assert f"not saved: 1 of 1 image failed ({torn}" in err
    assert "truncated PNG" in err
    assert "Pass an image that can be compared." in err


def test_an_image_too_large_for_the_gpus_memory_is_skipped(
    monkeypatch: pytest.MonkeyPatch, golden: Golden
) -> None:
    trace_tower, calls = measure.trace_tower, itertools.count()

    def full(*arguments: Any) -> Any:
        if next(calls) % 2 == 0:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return trace_tower(*arguments)

    monkeypatch.setattr(measure, "trace_tower", full)
    for done in (
        compare(encoder(), [ROCKET, CHELSEA]),
        compare_with_golden(encoder(), golden, [ROCKET, CHELSEA]),
    ):
        [(name, error)] = done.skipped
        assert (name, error.code, done.passed) == (str(ROCKET), "out-of-memory", False)
        assert "Lower --max-pixels" in str(error)
        assert [image.id for image in done.images] == [str(CHELSEA)]


def test_values_that_are_not_finite_differ_and_stay_json(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trace_tower = measure.trace_tower

    def with_nan(*arguments: Any) -> Any:
        trace = trace_tower(*arguments)
        trace["block.4"][3, 3] = math.nan
        return trace

    monkeypatch.setattr(measure, "trace_tower", with_nan)
    done = compare(encoder(), [CHELSEA])
    assert done.images[0].problems[0].startswith("block.4: inf from Hugging Face")
    document = json.loads(json.dumps(done.to_json(), allow_nan=False))
    assert document["images"][0]["stages"][5]["relative"] is None


def version_of(**pretended: str | None) -> Callable[[str], str]:
    def version(package: str) -> str:
        if package in pretended:
            if pretended[package] is None:
                raise reference.PackageNotFoundError(package)
            return pretended[package]
        return "1.0"

    return version


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (None, "transformers is not installed. Expected 5.18 or newer, which "),
        ("4.49.0", "transformers 4.49.0 is too old. Expected 5.18 or newer, which "),
    ],
)
def test_without_a_transformers_to_use_the_range_and_the_find_are_named(
    run: Any, monkeypatch: pytest.MonkeyPatch, found: str | None, words: str
) -> None:
    monkeypatch.setattr(transformers_version, "version", version_of(transformers=found))
    code, out, err = run(CHELSEA, *SMALL)
    assert (code, out) == (2, "")
    assert words in err
    assert "Run pip install 'qwen-vit[hf]'" in err
    assert "--golden FILE" in err


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="FlashAttention is installed")
def test_an_attention_that_is_not_installed_is_refused_with_the_others() -> None:
    checkpoint = encoder().checkpoint
    with pytest.raises(
        ArgumentError, match=r"refuses --attention flash_attention_2 .* Use sdpa or eager\."
    ):
        reference.hf_tower(
            checkpoint.tensors, checkpoint.config, torch.bfloat16, attention="flash_attention_2"
        )


def test_a_transformers_that_does_not_import_is_named_with_its_versions(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl", None)
    code, out, err = run(CHELSEA, *SMALL)
    assert (code, out) == (2, "")
    assert re.search(r"error: transformers cannot be imported \(.*\) with torch .*\. Install", err)


BAD_USAGE = {
    "no images": (("--model", "tiny"), "images is empty. Pass at least one image"),
    "both goldens": (
        (CHELSEA, *SMALL, "--golden", "a", "--save-golden", "b"),
        "--golden compares with a file and --save-golden writes one. Expected one of them. Leave",
    ),
    "no golden": ((*SMALL, "--golden", "none"), "none: not a file. Expected a golden file"),
    "golden is a folder": ((*SMALL, "--golden", "."), "Expected a golden file"),
    "attention": ((CHELSEA, *SMALL, "--attention", "flash_attention_2"), "takes no float32"),
    "unknown attention": ((CHELSEA, *SMALL, "--attention", "fast"), "'fast' is not one of"),
    "torchvision": ((CHELSEA, *SMALL, "--processor", "torchvision"), "pass --processor pillow"),
    "report is a file": (
        (CHELSEA, *SMALL, "--report", CHELSEA),
        "a file. Expected a folder for the report. Pass another --report.",
    ),
    "report of a long name": ((CHELSEA, *SMALL, "--report", "r" * 300), "File name too long"),
    "saved golden is a folder": (
        (CHELSEA, *SMALL, "--save-golden", "."),
        ".: a folder. Expected a file to write. Pass another --save-golden.",
    ),
    "report in no folder": (
        (CHELSEA, *SMALL, "--report", "no/page"),
        "no: not a folder. Create it first.",
    ),
    "same image twice": (
        (CHELSEA, CHELSEA, *SMALL, "--save-golden", "g"),
        "chelsea.png: given twice. Expected each image once. Leave one out.",
    ),
}


@pytest.mark.parametrize("fault", BAD_USAGE)
def test_bad_usage_ends_with_2_before_any_work(
    run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: str
) -> None:
    if fault == "torchvision" and "torchvision" in reference.package_versions():
        pytest.skip("torchvision is installed")
    monkeypatch.chdir(tmp_path)
    arguments, words = BAD_USAGE[fault]
    code, out, err = run(*arguments)
    assert (code, out) == (2, ""), err
    assert words in err
    assert "Traceback" not in err
    assert os.listdir() == []


def test_what_is_no_yardstick_is_not_saved(run: Any, tmp_path: Path) -> None:
    """Finite weights that overflow: all figures were lost in a raw error of the JSON writer."""
    tensors = write_checkpoint(tmp_path / "model", SMALL_TOWER, prefix="", dtype=torch.float32)
    for name in ("up", "down"):
        tensors[f"blocks.2.mlp.{name}_proj.weight"] *= 1e30
    write_weights(tmp_path / "model", tensors)
    options = ("--model", str(tmp_path / "model"), "--device", "cpu", "--max-pixels", "30000")
    code, out, err = run(CHELSEA, *options, "--save-golden", str(tmp_path / "golden"))
    assert (code, out) == (2, "")
    assert (
        f"{tmp_path / 'golden'}: not saved: Hugging Face's block.2 of {CHELSEA} contains NaN or"
        in err
    )
    assert not (tmp_path / "golden").exists()
    code, out, _ = run(CHELSEA, *options, "--json")
    stages = json.loads(out)["images"][0]["stages"]
    assert code == 1
    assert next(stage["stage"] for stage in stages if not stage["passed"]) == "block.2"


# Against a golden file


def test_a_golden_needs_no_transformers(
    run: Any, golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    for module in (reference, transformers_version):
        monkeypatch.setattr(module, "version", version_of(transformers=None))
    for images, taken in (((CHELSEA,), "uint8 pixels"), ((), "the pixel values of the processor")):
        code, out, err = run(*images, *SMALL, "--golden", golden.path, "--json")
        document = json.loads(out)
        assert code == 0, err
        assert [image["tower_input"] for image in document["images"]] == [taken] * (
            len(images) or 2
        )
        assert document["golden"]["changed_weights"] == []
        assert document["reference"]["versions"] == golden.facts["versions"]


def test_a_golden_says_what_the_live_comparison_says(golden: Golden) -> None:
    [live] = compare(encoder(), [CHELSEA]).images
    [stored] = compare_with_golden(encoder(), golden, [CHELSEA]).images
    assert stored.stages == live.stages
    assert stored.preprocessing == live.preprocessing


def test_a_golden_states_how_it_was_made(golden: Golden) -> None:
    facts = golden.facts
    assert (facts["dtype"], facts["attention"], facts["processor"]) == ("float32", "sdpa", "pillow")
    names = {"torch", "transformers", "pillow", "libjpeg-turbo", "numpy"}
    assert names <= set(facts["versions"])
    assert (facts["model"], facts["commit"], facts["device"]) == ("tiny", None, "cpu")
    assert facts["weights_sha256"] == encoder().checkpoint.weights_sha256()
    assert list(facts["images"][0]["errors"]) == sorted(STAGES)
    assert len(facts["images"][0]["sha256"]) == 64
    assert golden.path.stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_the_same_comparison_writes_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        compare(encoder(), [CHELSEA], save_golden=tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_an_image_that_the_golden_does_not_hold_is_refused(run: Any, golden: Golden) -> None:
    other = IMAGE_FOLDER / "astronaut.png"
    code, out, err = run(other, *SMALL, "--golden", golden.path)
    assert (code, out) == (2, "")
    assert re.search(rf"{other}: not one of the images of .* \(.*chelsea.png, .*rocket.jpg\)", err)


def test_an_image_that_cannot_be_read_is_skipped_beside_a_golden_too(
    run: Any, golden: Golden, tmp_path: Path
) -> None:
    torn = tmp_path / "torn.png"
    torn.write_bytes(CHELSEA.read_bytes()[:5000])
    code, out, _ = run(torn, CHELSEA, *SMALL, "--golden", golden.path, "--json")
    document = json.loads(out)
    assert (code, [image["id"] for image in document["images"]]) == (1, [str(CHELSEA)])
    assert [each["code"] for each in document["skipped"]] == ["truncated"]


def test_a_golden_that_the_system_refuses_is_named(tmp_path: Path) -> None:
    with pytest.raises(ComparisonError, match=r"cannot be read \(File name too long\)"):
        load_golden(tmp_path / ("g" * 300))


def test_without_an_image_no_page_is_written(run: Any, tmp_path: Path) -> None:
    code, out, err = run(tmp_path / "gone.png", *SMALL, "--report", tmp_path / "page")
    assert (code, "gone.png: does not exist" in out) == (1, True)
    assert f"wrote nothing to {tmp_path / 'page'}: no image was compared" in err
    assert list(tmp_path.iterdir()) == []


def test_figures_are_printed_even_where_their_page_cannot_be_written(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic_file_module.os, "fsync", full)
    code, out, err = run(CHELSEA, *SMALL, "--report", tmp_path / "page")
    assert code == 2
    assert out.startswith("agrees: 1 of 1 image")
    assert "could not be written (No space left on device)" in err


OTHERWISE = {
    "max_pixels": (("--max-pixels", "40000"), "image_config.max_pixels is 30000 in the golden and"),
    "processor": (("--processor", "torchvision"), "processor is 'pillow' in the golden and"),
    "attention": (("--attention", "eager"), "attention is 'sdpa' in the golden and 'eager' here"),
}


@pytest.mark.parametrize("setting", OTHERWISE)
def test_another_setting_than_the_goldens_is_refused_by_name(
    run: Any, golden: Golden, setting: str
) -> None:
    arguments, words = OTHERWISE[setting]
    code, out, err = run(*SMALL, *arguments, "--golden", golden.path)
    assert (code, out) == (2, "")
    assert words in err
    kept = {"max_pixels": 30_000, "processor": "pillow", "attention": "sdpa"}[setting]
    assert f"Expected the same. Pass {arguments[0]} {kept}." in err


def test_another_dtype_or_architecture_is_refused_by_name(golden: Golden) -> None:
    with pytest.raises(ComparisonError, match="dtype is 'float32' in the golden and 'bfloat16' "):
        compare_with_golden(replace(encoder(), dtype=torch.bfloat16), golden)
    config = replace(encoder().config, window_px=56)
    other = replace(encoder(), checkpoint=replace(encoder().checkpoint, config=config))
    with pytest.raises(ComparisonError, match=r"vision_config\.window_size is 112 in the"):
        compare_with_golden(other, golden)


def rewritten(source: Path, target: Path, change: Callable[[dict[str, Any], Any], None]) -> Path:
    """The golden with its tensors or metadata edited by hand."""
    tensors = load_file(source)
    with safe_open(source, framework="pt") as file:
        facts = json.loads(file.metadata()[METADATA_KEY])
    change(facts, tensors)
    save_file(tensors, target, metadata={METADATA_KEY: json.dumps(facts, sort_keys=True)})
    return target


def nudge(facts: dict[str, Any], tensors: Any) -> None:
    tensors["0.block.2"][5, 7] += 1e-6


EDITS: dict[str, Callable[[dict[str, Any], Any], None]] = {
    "a value": nudge,
    "an error": lambda facts, _: facts["images"][0]["errors"].update(merger=1e-2),
    "a version": lambda facts, _: facts["versions"].update(transformers="9.9"),
    "an image's sha256": lambda facts, _: facts["images"][0].update(sha256="0" * 64),
    "a tensor left out": lambda _, tensors: tensors.pop("1.merger"),
    "no sha256": lambda facts, _: facts.pop("content_sha256"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_golden_edited_by_hand_is_refused(golden: Golden, tmp_path: Path, edit: str) -> None:
    path = rewritten(golden.path, tmp_path / "edited", EDITS[edit])
    with pytest.raises(
        ComparisonError,
        match=r"edited: was changed after it was written: .* Get it again, or make it",
    ):
        load_golden(path)


def test_a_golden_of_another_schema_is_refused(golden: Golden, tmp_path: Path) -> None:
    path = rewritten(golden.path, tmp_path / "g", lambda facts, _: facts.update(schema_version=2))
    with pytest.raises(
        ComparisonError, match=r"golden schema 2\. Expected schema 1\. Make it again"
    ):
        load_golden(path)


@pytest.mark.parametrize("kept", [0, 7, 5_000, -1])
def test_a_torn_golden_is_refused(golden: Golden, tmp_path: Path, kept: int) -> None:
    torn = tmp_path / "torn"
    torn.write_bytes(golden.path.read_bytes()[:kept])
    with pytest.raises(
        ComparisonError, match=r"torn: torn, or not a safetensors file \(\d+ bytes; "
    ) as caught:
        load_golden(torn)
    assert caught.value.name == str(torn)
    assert (caught.value.expected, caught.value.remedy) == ("", "get it again")  # no checkpoint's


def test_another_safetensors_file_is_no_golden() -> None:
    with pytest.raises(
        ComparisonError, match=r"model\.safetensors: a safetensors file but not a golden"
    ):
        load_golden(TINY_FOLDER / "model.safetensors")


# One tensor in a hundred and more; tools.checks.trust injects every fault.
FAULTS = (
    ("patch_embed.proj.weight", "row scaled"),
    ("blocks.4.attn.qkv.weight", "row scaled"),
    ("blocks.1.mlp.gate_proj.bias", "rows swapped"),
    ("blocks.0.norm1.weight", "rows swapped"),
    ("merger.mlp.0.bias", "bias dropped"),
)


@pytest.mark.parametrize(("tensor", "fault"), FAULTS)
def test_a_fault_in_one_tensor_of_a_checkpoint_is_found_and_its_stage_named(
    golden: Golden, tmp_path: Path, run: Any, tensor: str, fault: str
) -> None:
    [fault] = [
        each
        for each in every_fault(encoder().checkpoint.tensors)
        if (each.tensor, each.fault) == (tensor, fault)
    ]
    shutil.copytree(TINY_FOLDER, tmp_path / "tiny")
    weights = tmp_path / "tiny" / "model.safetensors"
    tensors = load_file(weights)
    tensors[f"visual.{tensor}"] = damaged(tensors[f"visual.{tensor}"], fault, 0)
    save_file(tensors, weights)
    code, out, _ = run(
        "--model", tmp_path / "tiny", *SMALL[2:], "--golden", golden.path, CHELSEA
    )  # fmt: skip
    first = out.splitlines()[:2]
    assert code == 1
    here, there = (VisionEncoder.from_pretrained(tmp_path / "tiny", device="cpu"), encoder())
    hashes = [each.checkpoint.weights_sha256()[:16] for each in (here, there)]
    assert f"({hashes[0]} here, {hashes[1]} in the golden): 1 tensor, {tensor}" in first[0]
    assert first[1].startswith(f"differs: {CHELSEA}: first at {fault.stage}: the golden is ")
    assert "other weights" in first[1]  # by its own error as it states it, not by ours of today


def test_other_weights_that_give_the_same_numbers_agree_and_are_named(golden: Golden) -> None:
    """The same values stored as float32: another hash, the same model."""
    tensors = encoder().checkpoint.tensors
    given = GivenTensors({name: (tensor.float(),) for name, tensor in tensors.items()})
    other = replace(encoder(), checkpoint=replace(encoder().checkpoint, tensors=given))
    done = compare_with_golden(other, golden, [CHELSEA])
    assert done.passed
    text = as_text(done, has_stages=True)
    assert text.startswith("weights differ from the golden's")
    assert "closer" not in text  # ours and the golden's errors are those of two models
    assert "ratio" not in text
    stages = [stage for image in done.to_json()["images"] for stage in image["stages"]]
    assert {stage["ratio"] for stage in stages} == {None}
    same = compare_with_golden(encoder(), golden, [CHELSEA])
    assert "ratio" in as_text(same)
    assert "closer to float64" in as_text(same)


# The policy


def test_float32_is_bounded_by_hugging_faces_own_error() -> None:
    def passes(distance: float, theirs: float) -> bool:
        return judge(torch.float32, distance=distance, ours=0.0, theirs=theirs).passed

    assert passes(9.9e-6, 1e-7)
    assert not passes(1.1e-5, 1e-7)
    assert passes(3.9e-5, 2e-5)
    assert not passes(4.1e-5, 2e-5)
    assert not passes(0.0, 1.1e-4)
    assert not passes(math.inf, 1e-7)
    assert not passes(0.0, math.inf)


def test_bfloat16_is_bounded_by_the_ratio_of_the_errors() -> None:
    def passes(ours: float, theirs: float, recorded: float | None = None) -> bool:
        verdict = judge(torch.bfloat16, distance=1.0, ours=ours, theirs=theirs, recorded=recorded)
        return verdict.passed

    assert passes(1.01e-3, 1e-3)
    assert not passes(1.02e-3, 1e-3)
    assert passes(0.0, 0.0)
    assert not passes(1e-3, 0.0)
    assert not passes(1e-3, 1.5)  # farther from the truth than zeros would be: no yardstick
    assert not passes(math.inf, 1e-3)
    # a golden of other weights is far from the oracle of these: that must not excuse ours
    assert not passes(2e-3, 0.5, recorded=1e-3)
    assert not passes(0.9e-3, 0.5, recorded=1e-3)


def test_a_difference_is_measured_per_token() -> None:
    b = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    a = torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 0.0]])
    found = Difference.between(a, b)
    assert found.relative == pytest.approx((2 / 5) ** 0.5)
    assert (found.largest, found.worst_cosine) == (1.0, 0.0)
    assert found.mean_cosine == pytest.approx(2 / 3)
    a[2, 0] = math.nan
    broken = Difference.between(a, b)
    assert (broken.relative, broken.largest, broken.worst_cosine) == (math.inf, math.inf, -1.0)
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0
    with pytest.raises(ArgumentError, match="shapes"):
        relative_error(torch.zeros(2), torch.zeros(3))
