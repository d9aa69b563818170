"""Test that weights/published.toml is consistent, names unconfirmed fields, and fits the model."""

import json
import math
import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qwen_vit.checkpoint import convert as convert_module
from qwen_vit.checkpoint.convert import convert
from qwen_vit.checkpoint.hub import REPOSITORY
from qwen_vit.checkpoint.load import find_tower
from qwen_vit.checkpoint.published import packaged_weights
from qwen_vit.checkpoint.published_tensors import LazyTensors
from qwen_vit.checkpoint.tower_names import expected_tensors
from qwen_vit.checkpoint.weight_files import RemoteFiles, StoredTensor
from qwen_vit.cli.describe import licence_of
from qwen_vit.common.safetensors_header import TensorInfo
from qwen_vit.config import ImageConfig, VisionConfig
from qwen_vit.model import VisionTower
from tests.support import ROOT
from tests.support.checkpoints import split_qkv

PUBLISHED = tomllib.loads((packaged_weights() / "published.toml").read_text())["checkpoint"]
OFFICIAL = [f"Qwen/Qwen2.5-VL-{size}-Instruct" for size in ("3B", "7B", "32B", "72B")]
FIELDS = {"repo", "licence", "commit", "prefix", "tensors", "bytes", "seen_in", "unconfirmed"}
COMMIT = re.compile(r"[0-9a-f]{40}")


def config_of(entry: Mapping[str, Any]) -> VisionConfig:
    return VisionConfig.from_json({"model_type": "qwen2_5_vl", **entry["vision"]})


def stored_shapes(entry: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes that the entry's files have."""
    with torch.device("meta"):
        tensors = {k: torch.empty(shape) for k, shape in expected_tensors(config_of(entry)).items()}
        if entry["prefix"] == "thinker.visual.":
            tensors = split_qkv(tensors)
    return {entry["prefix"] + name: tuple(tensor.shape) for name, tensor in tensors.items()}


def test_the_official_checkpoints_are_listed_once() -> None:
    repos = [entry["repo"] for entry in PUBLISHED]
    assert repos[:4] == OFFICIAL
    widths = [entry["vision"]["out_hidden_size"] for entry in PUBLISHED[:4]]
    assert widths == [2048, 3584, 5120, 8192]
    assert len(set(repos)) == len(repos)


@pytest.mark.parametrize("entry", PUBLISHED, ids=lambda entry: entry["repo"])
def test_an_entry_marks_unverified_and_unconfirmed_fields(entry: dict[str, Any]) -> None:
    assert set(entry) == FIELDS | {"vision"}
    assert REPOSITORY.fullmatch(entry["repo"])
    assert entry["seen_in"]
    known = {*FIELDS, *entry["vision"]}
    assert set(entry["unconfirmed"]) <= known
    for field in ("commit", "licence"):
        assert entry[field] == "unverified" or field in entry["unconfirmed"], field
    assert entry["commit"] == "unverified" or COMMIT.fullmatch(entry["commit"])
    if entry["licence"] == "unverified":
        assert licence_of(entry["repo"]).startswith("unknown")
    else:
        assert licence_of(entry["repo"]) == entry["licence"]
    shapes = stored_shapes(entry)
    assert len(shapes) == entry["tensors"]
    assert 2 * sum(map(math.prod, shapes.values())) == entry["bytes"]


class Watch(TorchDispatchMode):
    """Track, through any operation, the published tensors from which each tensor is computed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made_of: dict[int, frozenset[str]] = {}
        self.alive: list[Tensor] = []  # a live tensor's id is unique

    def mark(self, tensor: Tensor, names: frozenset[str]) -> None:
        self.made_of[id(tensor)] = names
        self.alive.append(tensor)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        inputs = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if torch.is_tensor(x)]
        names = frozenset().union(*(self.made_of.get(id(x), frozenset()) for x in inputs))
        for output in torch.utils._pytree.tree_leaves(result):
            if torch.is_tensor(output):
                self.mark(output, self.made_of.get(id(output), frozenset()) | names)
        return result


@pytest.mark.parametrize("entry", PUBLISHED, ids=lambda entry: entry["repo"])
def test_the_names_map_one_to_one_onto_the_model(
    entry: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device, every stored tensor becomes part of one parameter, and every parameter
    consists of stored tensors that belong together. Only the patch embedding has two parameters:
    the published weights, and the folded weights for uint8 pixels.
    """
    config, image_config = config_of(entry), ImageConfig.from_json({})
    shapes = stored_shapes(entry)
    infos = {name: TensorInfo("BF16", shape, 0, 0) for name, shape in shapes.items()}
    document = {"model_type": "qwen2_5_vl", "vision_config": entry["vision"]}
    (tmp_path / "config.json").write_text(json.dumps(document))
    tower = find_tower(tmp_path, RemoteFiles(frozenset({"model.safetensors"}), lambda _: infos))
    assert tower.prefix == entry["prefix"]
    assert Counter(t.name for t in tower.stored()) == Counter(shapes.keys())

    reads: Counter[str] = Counter()
    watch = Watch()

    def read(self: LazyTensors, source: StoredTensor) -> Tensor:
        reads[source.name] += 1
        tensor = torch.empty(source.info.shape, dtype=torch.bfloat16, device="meta")
        watch.mark(tensor, frozenset({source.name}))
        return tensor

    monkeypatch.setattr(LazyTensors, "_read", read)
    monkeypatch.setattr(convert_module, "check_finite", lambda tensor, name: tensor)
    monkeypatch.setattr(Tensor, "isfinite", lambda tensor: torch.ones(tensor.shape, device="cpu"))
    monkeypatch.setattr(Tensor, "cpu", lambda tensor: tensor)  # meta tensors have no data to copy
    meta = torch.device("meta")
    with meta:
        model = VisionTower(config, torch.bfloat16)
        with watch:
            tensors = LazyTensors(tower.sources)
            state = convert(tensors, config, image_config, torch.bfloat16, meta)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in state.items()} == expected
    model.load_state_dict(state, strict=True, assign=True)

    places_of: dict[str, list[str]] = {name: [] for name in shapes}
    for ours, tensor in state.items():
        made_of = watch.made_of[id(tensor)]
        assert made_of, f"{ours} holds no published tensor"
        for name in made_of:
            places_of[name].append(ours)
    patch = entry["prefix"] + "patch_embed.proj.weight"
    assert len(places_of.pop(patch)) == 3  # weights for rows and for pixels, and a bias
    assert {name: places for name, places in places_of.items() if len(places) != 1} == {}
    # Per block, q, k, v and norm1 share a parameter, and gate, up and norm2 share one.
    shared = Counter(places[0] for places in places_of.values())
    together = {n: c for n, c in shared.items() if not re.search(r"attn\.qkv|gate_up", n)}
    assert set(together.values()) == {1}
    assert set(reads) == set(shapes)


def test_the_table_in_the_documentation_matches() -> None:
    text = (ROOT / "docs" / "checkpoints.md").read_text("utf-8")
    for entry in PUBLISHED[:4]:
        [row] = [line for line in rows(text) if f"`{entry['repo']}`" in line]
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        size = f"{entry['bytes'] / 1e9:.2f} GB"
        assert cells[1:] == [entry["licence"], size, str(entry["vision"]["out_hidden_size"])]


def rows(text: str) -> Iterator[str]:
    return (line for line in text.splitlines() if line.startswith("| `"))
