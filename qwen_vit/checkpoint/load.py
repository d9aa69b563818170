"""A checkpoint folder -> its config and tensors under their published names, strictly checked."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qwen_vit.checkpoint.weight_files import RemoteFiles, StoredTensor, find_tensors
from qwen_vit.common.strict_json import read_json
from qwen_vit.config import ImageConfig, VisionConfig, check_consistent
from qwen_vit.errors import CheckpointError

__all__ = [
    "ANCHOR_KEY",
    "Checkpoint",
    "Tower",
    "config_hash",
    "expected_tensors",
    "find_tower",
    "load_checkpoint",
    "tower_prefixes",
    "weights_hash",
]

# Where a tower lies: "visual." (the Hub's files), "model.visual." (transformers >= 4.52 in memory),
# "thinker.visual." (Qwen2.5-Omni), nothing (a tower saved alone), or deeper in a larger model. All
# are found by the one name that every tower has once.
ANCHOR_KEY = "patch_embed.proj.weight"

STORED_DTYPES = ("F32", "BF16", "F16")

# Names that only other towers have.
OTHER_TOWERS = (
    (re.compile(r"\.mlp\.fc1\.|^merger\.ln_q\.bias$"), "Qwen2-VL"),
    (re.compile(r"^pos_embed\.|\.mlp\.linear_fc1\.|^deepstack_merger_list\."), "Qwen3-VL"),
)
# What quantisers store beside, or instead of, a weight.
QUANTISED = re.compile(
    r"\.(weight_scale|weight_scale_inv|weight_zero_point|weight_packed|weight_shape|input_scale"
    r"|scales|qweight|qzeros|g_idx|SCB|weight_format|weight\.(absmax|quant_map|quant_state).*)$"
)


@dataclass(frozen=True, slots=True)
class Tower:
    """Where a vision tower lies: its configs, and which stored tensors make up each published one.

    `settings` are the config files that were read, `prefix` is what stands before the names.
    """

    config: VisionConfig
    image_config: ImageConfig
    settings: tuple[Path, ...]
    sources: Mapping[str, tuple[StoredTensor, ...]]
    prefix: str

    def stored(self) -> list[StoredTensor]:
        """Every stored tensor, once: 390 at depth 32, or 518 where q, k and v lie apart."""
        return [tensor for parts in self.sources.values() for tensor in parts]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What `load_checkpoint` found in a folder; the tensors are read when they are asked for.

    `tensors` maps the 390 published names without prefix, such as "blocks.0.attn.qkv.weight", to
    CPU tensors as stored, NaN and all: `convert` refuses those. `files` are all files that were
    read, `prefix` is what was cut off.
    """

    config: VisionConfig
    image_config: ImageConfig
    tensors: Mapping[str, Tensor]
    files: tuple[Path, ...]
    prefix: str
    dtypes: tuple[str, ...]

    def weights_sha256(self) -> str:
        """`weights_hash` of the tensors, computed once."""
        if isinstance(self.tensors, _LazyTensors):
            return self.tensors.sha256()
        return weights_hash(self.tensors)

    def locate(self, name: str) -> str:
        """Where a tensor lies, for messages: its file, the file's size, its name there."""
        if isinstance(self.tensors, _LazyTensors):
            return self.tensors.locate(name)
        return name


def load_checkpoint(folder: str | Path) -> Checkpoint:
    """Open a local checkpoint: config.json, the image settings and safetensors weights.

    >>> load_checkpoint("no/such/folder")
    Traceback (most recent call last):
    qwen_vit.errors.CheckpointError: no/such/folder is not a folder, expected one with config.json \
and safetensors weights

    The headers are checked at once (names, shapes, types), the values when they are converted.
    Raises CheckpointError, naming the file, for whatever is missing, damaged or of another model.
    """
    tower = find_tower(Path(folder))
    stored = tower.stored()
    return Checkpoint(
        config=tower.config,
        image_config=tower.image_config,
        tensors=_LazyTensors(tower.sources),
        files=(*tower.settings, *sorted({tensor.path for tensor in stored})),
        prefix=tower.prefix,
        dtypes=tuple(sorted({tensor.info.dtype for tensor in stored})),
    )


def find_tower(folder: Path, elsewhere: RemoteFiles | None = None) -> Tower:
    """Find the vision tower in a folder and check names, shapes and types against config.json.

    Weight files that are still on the Hub may be given as `elsewhere`: of them, only the headers
    are asked for. Raises CheckpointError as load_checkpoint does.
    """
    prefix = ""

    def tower_names(names: set[str]) -> set[str]:
        nonlocal prefix
        prefix = _find_prefix(names, folder)
        return {name for name in names if name.startswith(prefix)}

    stored = find_tensors(folder, tower_names, elsewhere)
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise CheckpointError(
            f"{config_path} is not there, expected the config of the weights; "
            "copy it from the same checkpoint"
        )
    config = VisionConfig.from_json(config_path)
    image_config, image_path = _read_image_config(folder)
    check_consistent(config, image_config, source=str(image_path or f"{folder} (default settings)"))
    bare = {name.removeprefix(prefix): tensor for name, tensor in stored.items()}
    sources = _check_strictly(bare, config, folder)
    settings = (config_path,) if image_path is None else (config_path, image_path)
    return Tower(config, image_config, settings, sources, prefix)


def expected_tensors(config: VisionConfig) -> dict[str, tuple[int, ...]]:
    """Return the published name and shape of every tensor of a tower: 390 at depth 32."""
    C, I = config.hidden_size, config.intermediate_size  # noqa: E741
    merged = C * config.merge_unit
    block: dict[str, tuple[int, ...]] = {
        "norm1.weight": (C,),
        "attn.qkv.weight": (3 * C, C),
        "attn.qkv.bias": (3 * C,),
        "attn.proj.weight": (C, C),
        "attn.proj.bias": (C,),
        "norm2.weight": (C,),
        "mlp.gate_proj.weight": (I, C),
        "mlp.gate_proj.bias": (I,),
        "mlp.up_proj.weight": (I, C),
        "mlp.up_proj.bias": (I,),
        "mlp.down_proj.weight": (C, I),
        "mlp.down_proj.bias": (C,),
    }
    frames, side = config.temporal_patch_size, config.patch_px
    return {
        ANCHOR_KEY: (C, config.in_channels, frames, side, side),
        **{f"blocks.{i}.{k}": shape for i in range(config.depth) for k, shape in block.items()},
        "merger.ln_q.weight": (C,),
        "merger.mlp.0.weight": (merged, merged),
        "merger.mlp.0.bias": (merged,),
        "merger.mlp.2.weight": (config.out_hidden_size, merged),
        "merger.mlp.2.bias": (config.out_hidden_size,),
    }


def weights_hash(tensors: Mapping[str, Tensor]) -> str:
    """Return a sha256 of the names, types, shapes and bytes, whatever files they came from.

    >>> weights_hash({"a": torch.zeros(2)}) == weights_hash({"a": torch.zeros(2)})
    True
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        head = [name, str(tensor.dtype), list(tensor.shape)]
        digest.update(json.dumps(head).encode() + b"\n")
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def config_hash(config: VisionConfig, image_config: ImageConfig) -> str:
    """Return a sha256 of both configs' values, whatever spelling their files used."""
    both = {"vision": config.to_json(), "image": image_config.to_json()}
    return hashlib.sha256(json.dumps(both, sort_keys=True).encode()).hexdigest()


class _LazyTensors(Mapping[str, Tensor]):
    """Published names -> tensors, each read at its look-up; q, k and v apart are joined then."""

    def __init__(self, sources: Mapping[str, tuple[StoredTensor, ...]]) -> None:
        self._sources = sources
        # maps, so what was opened stays whatever becomes of it; and each file's size in bytes
        self._open_files: dict[Path, tuple[Any, int]] = {}
        self._sha256: str | None = None

    def sha256(self) -> str:
        if self._sha256 is None:
            self._sha256 = weights_hash(self)
        return self._sha256

    def locate(self, name: str) -> str:
        return " with ".join(
            f"{source.path} ({self._open(source)[1]} bytes): {source.name}"
            for source in self._sources[name]
        )

    def __getitem__(self, name: str) -> Tensor:
        parts = [self._read(source) for source in self._sources[name]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def _read(self, source: StoredTensor) -> Tensor:
        try:
            tensor: Tensor = self._open(source)[0].get_tensor(source.name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{source.path} changed or became unreadable while it was read ({error}); "
                "check the disk, and download the file again"
            ) from None
        return tensor

    def _open(self, source: StoredTensor) -> tuple[Any, int]:
        if source.path not in self._open_files:
            file = safe_open(source.path, framework="pt", device="cpu")
            self._open_files[source.path] = (file, source.path.stat().st_size)
        return self._open_files[source.path]


def _read_image_config(folder: Path) -> tuple[ImageConfig, Path | None]:
    # As transformers does: what a whole processor says of its images comes first.
    processor, preprocessor = folder / "processor_config.json", folder / "preprocessor_config.json"
    if processor.exists():
        settings = read_json(processor)
        if "image_processor" in settings:
            return ImageConfig.from_json(settings, source=str(processor)), processor
    if preprocessor.exists():
        return ImageConfig.from_json(preprocessor), preprocessor
    return ImageConfig.from_json({}), None


def tower_prefixes(names: Iterable[str]) -> list[str]:
    """Return what stands before each vision tower's tensors, sorted; one for a usual checkpoint.

    >>> tower_prefixes(["visual.patch_embed.proj.weight", "model.norm.weight"])
    ['visual.']
    """
    return sorted(
        name.removesuffix(ANCHOR_KEY)
        for name in names
        if name == ANCHOR_KEY or name.endswith(f".{ANCHOR_KEY}")
    )


def _find_prefix(names: set[str], folder: Path) -> str:
    prefixes = tower_prefixes(names)
    if len(prefixes) > 1:
        raise CheckpointError(
            f"{folder} holds {len(prefixes)} vision towers, under {', '.join(prefixes[:5])}; "
            "expected one; save the one that you mean on its own"
        )
    if not prefixes:
        raise CheckpointError(
            f"{folder} holds no vision tower: none of its {len(names)} tensors "
            f"({_some(names)}) is called {ANCHOR_KEY}; use a Qwen2.5-VL checkpoint"
        )
    return prefixes[0]


def _check_strictly(
    bare: Mapping[str, StoredTensor], config: VisionConfig, folder: Path
) -> dict[str, tuple[StoredTensor, ...]]:
    """Return which stored tensors make up each published one, or raise for any difference."""
    _refuse_other_towers(bare, folder)
    _refuse_quantised(bare, folder)
    shapes = expected_tensors(config)
    parts_of = {name: _parts(name, split="blocks.0.attn.q.weight" in bare) for name in shapes}
    expected = {part for parts in parts_of.values() for part in parts}
    missing, extra = expected - set(bare), set(bare) - expected
    if missing or extra:
        files = ", ".join(sorted({tensor.path.name for tensor in bare.values()}))
        raise CheckpointError(
            f"{folder} ({files}): {len(missing)} of {len(expected)} vision tensors are missing "
            f"({_some(missing)}) and {len(extra)} are not known ({_some(extra)}); "
            "use the config.json that belongs to the weights, or download the weights again"
        )
    for name, parts in parts_of.items():
        shape = (shapes[name][0] // len(parts), *shapes[name][1:])
        for part in parts:
            if bare[part].info.shape != shape:
                raise CheckpointError(
                    f"{bare[part].path}: {bare[part].name} has the shape "
                    f"{list(bare[part].info.shape)}, expected {list(shape)} from config.json; "
                    "use the config.json that belongs to the weights"
                )
    return {name: tuple(bare[part] for part in parts) for name, parts in parts_of.items()}


def _parts(name: str, *, split: bool) -> tuple[str, ...]:
    if split and ".attn.qkv." in name:
        return tuple(name.replace(".qkv.", f".{letter}.") for letter in "qkv")
    return (name,)


def _refuse_other_towers(bare: Mapping[str, StoredTensor], folder: Path) -> None:
    for pattern, model in OTHER_TOWERS:
        for name in sorted(bare):
            if pattern.search(name):
                raise CheckpointError(
                    f"{folder} holds the vision tower of {model} ({bare[name].name} in "
                    f"{bare[name].path.name}), expected Qwen2.5-VL; use transformers for it"
                )


def _refuse_quantised(bare: Mapping[str, StoredTensor], folder: Path) -> None:
    quantised = {name for name in bare if QUANTISED.search(name)}
    other = {name for name, tensor in bare.items() if tensor.info.dtype not in STORED_DTYPES}
    if quantised or other:
        first = bare[min(other or quantised)]
        raise CheckpointError(
            f"{folder}: {len(quantised | other)} vision tensors are quantised or of another type "
            f"({_some(quantised | other)}; {first.name} in {first.path.name} is "
            f"{first.info.dtype}), expected {', '.join(STORED_DTYPES)}; use a checkpoint that "
            "leaves the vision tower unquantised"
        )


def _some(names: set[str]) -> str:
    return ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "") or "none"
