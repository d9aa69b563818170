"""Read and write a golden file: Hugging Face's results for comparisons without transformers.

A golden file is one safetensors file. For image i, it contains `i.pixel_values` (N, P) float32, the
processor's rows in grid order, and each stage of the tower as `i.STAGE`, in the dtype of the run.
The metadata is one key of sorted JSON, because safetensors writes several keys in random order. The
JSON contains the schema version, package versions, processor, attention implementation, dtype and
both configs. It also contains the model with its commit, and the fingerprint of every weight. For
each image, it records the id, SHA-256, size, grid, and each stage's error against the float64
oracle. A SHA-256 over metadata and tensors detects an incomplete or edited file.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from qwen_vit.checkpoint.published_tensors import weights_hash
from qwen_vit.common.arguments import missing_remedy
from qwen_vit.common.atomic_file import atomic_file
from qwen_vit.common.safetensors_header import read_header
from qwen_vit.common.strict_json import parse_json
from qwen_vit.compare.oracle import Trace
from qwen_vit.compare.stages import stage_names
from qwen_vit.config import Grid
from qwen_vit.encoder import VisionEncoder
from qwen_vit.errors import CheckpointError, ComparisonError, display_name, with_options
from qwen_vit.features import dtype_name

__all__ = ["SCHEMA_VERSION", "Case", "Golden", "load_golden", "write_golden"]

SCHEMA_VERSION = 1
METADATA_KEY = "qwen_vit_golden"
FINGERPRINT_DIGITS = 16
OPTIONS = {  # settings that an option can change, with the option's name
    **{name: name for name in ("attention", "dtype", "processor")},
    **{f"image_config.{name}": name for name in ("min_pixels", "max_pixels")},
}


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """Hold one image with Hugging Face's results.

    `errors` are the errors of Hugging Face's stages against the float64 oracle, or None before the
    measurement.
    """

    id: str
    sha256: str
    size_px: tuple[int, int]  # height, width
    pixel_values: Tensor  # (N, P) float32, grid order
    grid: Grid
    trace: Trace
    errors: Mapping[str, float] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Golden:
    """Hold a golden file whose hash is valid, and read an image's tensors on request."""

    path: Path
    facts: Mapping[str, Any]

    def index_of(self, sha256: str) -> int | None:
        known = [image["sha256"] for image in self.facts["images"]]
        return known.index(sha256) if sha256 in known else None

    def __len__(self) -> int:
        return len(self.facts["images"])

    def case(self, index: int) -> Case:
        image = self.facts["images"][index]
        stages = stage_names(self.facts["vision_config"]["depth"])
        with safe_open(self.path, framework="pt", device="cpu") as file:
            tensors = {
                name: file.get_tensor(f"{index}.{name}") for name in ("pixel_values", *stages)
            }
        height, width = image["size_px"]
        return Case(
            image["id"],
            image["sha256"],
            (height, width),
            tensors.pop("pixel_values"),
            Grid(*image["grid_thw"]),
            tensors,
            image["errors"],
        )

    def check_fits(
        self, encoder: VisionEncoder, *, processor: str, attention: str | None = None
    ) -> None:
        here: dict[str, Any] = {"dtype": dtype_name(encoder.dtype), "processor": processor}
        if attention is not None:
            here["attention"] = attention
        there = {name: self.facts[name] for name in here}
        for part, config in (
            ("vision_config", encoder.config.to_json()),
            ("image_config", encoder.image_config.to_json()),
        ):
            here |= {f"{part}.{key}": value for key, value in config.items()}
            there |= {f"{part}.{key}": value for key, value in self.facts[part].items()}
        for name in sorted(here.keys() | there.keys()):
            if here.get(name) != there.get(name):
                remedy = (
                    with_options("pass {}", (OPTIONS[name], there[name]))
                    if name in OPTIONS
                    else "compare with a golden file of this model and these settings"
                )
                raise ComparisonError(
                    f"{name} is {there.get(name)!r} in the golden file and {here.get(name)!r} here",
                    name=str(self.path),
                    expected="the same",
                    remedy=remedy,
                )

    def changed_weights(self, encoder: VisionEncoder) -> tuple[str, ...]:
        theirs = self.facts["fingerprints"]
        here = fingerprints(encoder.checkpoint.tensors)
        return tuple(name for name in here if here[name] != theirs.get(name))


def fingerprints(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the first digits of each tensor's SHA-256, over name, dtype, shape and bytes."""
    return {name: weights_hash({name: tensors[name]})[:FINGERPRINT_DIGITS] for name in tensors}


def write_golden(
    path: Path,
    encoder: VisionEncoder,
    cases: Sequence[Case],
    reference: Mapping[str, Any],
    *,
    overwrite: bool = False,
) -> None:
    """Write a golden file completely or not at all, with the same bytes for the same arguments.

    `reference` records how Hugging Face's tower ran: attention implementation, processor, versions
    and device.
    """
    for case in cases:
        for stage, error in (case.errors or {}).items():
            if not math.isfinite(error):
                raise ComparisonError(
                    f"not saved: the error of Hugging Face's {stage} of {display_name(case.id)} is "
                    "not finite",
                    name=str(path),
                    remedy=with_options("compare without {}", "save_golden"),
                )
    tensors: dict[str, Tensor] = {}
    for index, case in enumerate(cases):
        tensors[f"{index}.pixel_values"] = case.pixel_values
        tensors |= {f"{index}.{stage}": values for stage, values in case.trace.items()}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    facts: dict[str, Any] = {
        **reference,
        "schema_version": SCHEMA_VERSION,
        "dtype": dtype_name(encoder.dtype),
        "model": encoder.source.name,
        "commit": encoder.source.commit,
        "weights_sha256": encoder.checkpoint.weights_sha256(),
        "fingerprints": fingerprints(encoder.checkpoint.tensors),
        "vision_config": encoder.config.to_json(),
        "image_config": encoder.image_config.to_json(),
        "images": [
            {
                "id": case.id,
                "sha256": case.sha256,
                "size_px": list(case.size_px),
                "grid_thw": [case.grid.t, case.grid.h, case.grid.w],
                "errors": dict(case.errors or {}),
            }
            for case in cases
        ],
    }
    facts["content_sha256"] = _content_hash(facts, weights_hash(tensors))
    text = json.dumps(facts, sort_keys=True, allow_nan=False)
    with atomic_file(path, overwrite=overwrite) as file:
        file.write(save(tensors, {METADATA_KEY: text}))


def load_golden(path: Path) -> Golden:
    """Read a golden file and check its hash.

    >>> load_golden(Path("no-such-file.safetensors"))
    Traceback (most recent call last):
    qwen_vit.errors.ComparisonError: no-such-file.safetensors: does not exist. Expected a golden \
    file written by `qwen-vit compare --save-golden`. Check the path.
    """
    name = str(path)
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise FileNotFoundError
    except FileNotFoundError:
        raise ComparisonError(
            "not a file" if path.exists() else "does not exist",
            name=name,
            expected="a golden file written by `qwen-vit compare --save-golden`",
            remedy=missing_remedy(path),
        ) from None
    except OSError as error:
        raise ComparisonError(
            f"cannot be read ({error.strerror})", name=name, remedy="check its permissions"
        ) from None
    try:
        names = read_header(path)
        with safe_open(path, framework="pt", device="cpu") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
            facts = None if text is None else parse_json(text.encode(), source=name)
            if facts is None:
                raise ComparisonError(
                    f"a safetensors file but not a golden file: its metadata has no {METADATA_KEY}",
                    name=name,
                    remedy="make a golden file with `qwen-vit compare --save-golden`",
                )
            if facts.get("schema_version") != SCHEMA_VERSION:
                raise ComparisonError(
                    f"has golden schema {facts.get('schema_version')!r}",
                    name=name,
                    expected=f"schema {SCHEMA_VERSION}",
                    remedy="make the file again with this version of qwen_vit",
                )
            tensors = _Stored(file, names)
            expected = facts.get("content_sha256")
            if expected != _content_hash(facts, weights_hash(tensors)):
                raise ComparisonError(
                    "was changed after it was written: its sha256 differs from the recorded sha256",
                    name=name,
                    remedy="get the file again, or make the file again",
                )
    except (CheckpointError, OSError, SafetensorError) as error:
        # only the fact, because the remedy is for a checkpoint
        reason = error.fact if isinstance(error, CheckpointError) else str(error)
        raise ComparisonError(
            f"incomplete, or not a safetensors file ({size} bytes; {reason})",
            name=name,
            remedy="get the file again",
        ) from None
    return Golden(path, facts)


class _Stored(Mapping[str, Tensor]):
    def __init__(self, file: Any, names: Iterable[str]) -> None:
        self._file, self._names = file, tuple(names)

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Any:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _content_hash(facts: Mapping[str, Any], tensors_sha256: str) -> str:
    stated = {key: value for key, value in facts.items() if key != "content_sha256"}
    text = json.dumps(stated, sort_keys=True) + tensors_sha256
    return hashlib.sha256(text.encode()).hexdigest()
