"""Test that every stage agrees with transformers, and that a mistake shows at its stage."""

import itertools
import json
import math
import os
import re
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwen_vit import VisionEncoder
from qwen_vit.compare import huggingface as reference
from qwen_vit.compare import measure
from qwen_vit.compare import run as compare_module
from qwen_vit.compare.golden import Golden
from qwen_vit.compare.huggingface import Processed, hf_tower
from qwen_vit.compare.result import Comparison
from qwen_vit.compare.run import compare, compare_with_golden
from qwen_vit.compare.stages import trace_tower
from qwen_vit.compare.text import as_text, closer_line
from qwen_vit.compare.tolerance import fp32_budget
from qwen_vit.images.patches import patchify
from tests.support import IMAGES, ROOT
from tests.support.comparisons import CHELSEA, ROCKET, SMALL, STAGES, encoder
from tests.support.goldens import PHOTOGRAPHS
from tests.support.weight_faults import WeightFault, inject_fault


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


def test_the_verdict_is_first_and_v_adds_every_stage(run: Any) -> None:
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


def test_the_report_states_which_tower_is_closer_to_float64() -> None:
    [image] = compare(encoder(), [CHELSEA]).images

    def line(*pairs: tuple[float, float]) -> str:
        """Return a comparison of images with one stage, with these errors of ours and of Hugging
        Face."""
        stages = [replace(image.stages[-1], ours=ours, theirs=theirs) for ours, theirs in pairs]
        images = tuple(replace(image, stages=(stage,)) for stage in stages)
        return closer_line(Comparison({}, images, ()))

    assert line((1e-7, 2e-7), (3e-7, 4e-7), (2e-7, 1e-7)) == (
        "closer to float64: ours, at 2 of 3 stages; in the merged tokens our error is 0.50 to 2.00 "
        "times Hugging Face's"
    )
    assert line((2e-7, 1e-7)).startswith("closer to float64: Hugging Face, at 1 of 1 stage; ")
    assert "our error is 2.00 times" in line((2e-7, 1e-7))
    assert line((2e-7, 1e-7), (1e-7, 2e-7)).startswith(
        "closer to float64: both equally, at 1 of 2 stages; "
    )
    assert line() == line((math.nan, 1e-7)) == ""


@pytest.mark.slow
def test_three_photographs_and_their_page_take_less_than_a_minute(tmp_path: Path) -> None:
    """Run the command in a separate process, like a user. The test measures processor time, because
    other work on the machine then does not count."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "qwen_vit", "compare", "--model", "tiny", "--device", "cpu",
         *(str(IMAGES / name) for name in PHOTOGRAPHS), "--report", str(tmp_path / "page")],
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


def test_a_fault_of_our_tower_is_found_at_its_stage(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint is correct. Hugging Face and the oracle read it, and only our tower is
    wrong."""
    fault = WeightFault("blocks.2.attn.proj.bias", "bias dropped", "block.2")
    broken = replace(encoder(), tower=inject_fault(encoder(), fault).tower)
    monkeypatch.setattr(VisionEncoder, "from_pretrained", lambda *_, **__: broken)
    code, out, _ = run(CHELSEA, *SMALL)
    assert code == 1
    assert f"differs: {CHELSEA}: first at block.2: " in out
    assert "agrees" not in out.splitlines()[0]


def test_a_fault_of_hugging_face_is_not_attributed_to_our_tower(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A reference with a large error would otherwise allow our tower twice this error."""

    def broken(tensors: Any, *arguments: Any) -> Any:
        name = "blocks.3.mlp.down_proj.weight"
        return hf_tower({**tensors, name: tensors[name] * 1.5}, *arguments)

    monkeypatch.setattr(compare_module, "hf_tower", broken)
    [image] = compare(encoder(), [CHELSEA]).images
    assert image.problems[0].startswith("block.3: Hugging Face is ")
    assert "not the same model, or not the same input" in image.problems[0]
    assert all(stage.ours < 1e-6 for stage in image.stages)


def shifted(pixels: Processed, levels: float, std: float = 0.26862954) -> Processed:
    """Change grey levels in the first channel of the first patch."""
    values = pixels.pixel_values.clone()
    values[0, : values.shape[1] // 3] += levels / 255 / std
    return pixels._replace(pixel_values=values)


@pytest.mark.parametrize(("processor", "passed"), [("pillow", False), ("torchvision", True)])
def test_processors_have_separate_results_and_only_the_pillow_processor_counts(
    monkeypatch: pytest.MonkeyPatch, processor: str, passed: bool
) -> None:
    """Both towers must get the chosen processor's pixels. Our tower once used its own pixels if
    they equalled the Pillow processor's pixels, and therefore differed.
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
def test_an_image_of_a_few_rows_is_compared_as_an_image(rows: int) -> None:
    """transformers interpreted the image's rows as channels, and the comparison blamed our tower
    for the other grid."""
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
    assert (code, len(document["images"]), document["agrees"]) == (1, 1, True)
    assert [(each["id"], each["code"]) for each in document["skipped"]] == [
        (str(torn), "truncated")
    ]
    code, out, err = run(torn, *SMALL)
    assert (code, "skipped: " in out, "agrees" in out) == (2, False, False)
    assert err.count(f"skipped: {torn}: ") == 1  # as in `encode`
    assert out.splitlines()[0] == "nothing was compared: every image was skipped"
    saved = tmp_path.parent / f"{tmp_path.name}.safetensors"
    _, out, err = run(CHELSEA, torn, *SMALL, "--save-golden", saved)
    assert "agrees: 1 of 1 image (1 skipped), 7 stages;" in out
    assert out.endswith(f"\nwrote {saved}\n")
    code, out, err = run(torn, *SMALL, "--save-golden", tmp_path / "golden.safetensors")
    assert (code, out, list(tmp_path.iterdir())) == (2, "", [torn])
    assert f"not saved: 1 of 1 image failed ({torn}" in err
    assert "truncated PNG" in err
    assert "Pass an image that can be compared." in err


def test_an_image_too_large_for_the_gpus_memory_is_skipped(
    monkeypatch: pytest.MonkeyPatch, golden: Golden
) -> None:
    calls = itertools.count()

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
        assert "Lower max_pixels" in str(error)
        assert [image.id for image in done.images] == [str(CHELSEA)]


def test_values_that_are_not_finite_differ_and_stay_json(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def with_nan(*arguments: Any) -> Any:
        trace = trace_tower(*arguments)
        trace["block.4"][3, 3] = math.nan
        return trace

    monkeypatch.setattr(measure, "trace_tower", with_nan)
    done = compare(encoder(), [CHELSEA])
    assert done.images[0].problems[0].startswith("block.4: inf from Hugging Face")
    document = json.loads(json.dumps(done.to_json(), allow_nan=False))
    assert document["images"][0]["stages"][5]["relative"] is None
