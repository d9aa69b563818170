"""A checkpoint folder -> which file holds which tensor. Nothing here knows the model."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qwen_vit.errors import CheckpointError
from qwen_vit.safetensors_header import TensorInfo, read_header
from qwen_vit.strict_json import read_json, show

__all__ = ["StoredTensor", "find_tensors", "is_plain_basename"]

INDEX_SUFFIX = ".safetensors.index.json"
PREFERRED_FILES = ("model.safetensors", "model" + INDEX_SUFFIX, "vision.safetensors")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as it lies on disk: its file, its name there, and what the header says of it."""

    path: Path
    name: str
    info: TensorInfo


def find_tensors(folder: Path, wanted: Callable[[set[str]], set[str]]) -> dict[str, StoredTensor]:
    """Return the tensors of a folder that `wanted` picks from the names that are there.

    The weights are model.safetensors, or the shards of an index, or vision.safetensors, or the
    only other safetensors file. Shards that hold nothing wanted need not be there.
    """
    path = _weights_path(folder)
    if not path.name.endswith(INDEX_SUFFIX):
        header = read_header(path)
        return {name: StoredTensor(path, name, header[name]) for name in wanted(set(header))}

    shard_of = _read_index(path)
    names = wanted(set(shard_of))
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted({shard_of[name] for name in names}):
        shard_path = _shard_path(folder, shard, index=path)
        header = read_header(shard_path)
        listed = {name for name in names if shard_of[name] == shard}
        for odd in sorted(listed - set(header)):
            raise CheckpointError(
                f"{path} says that {show(odd)} is in {shard}, but {shard_path} does not hold it; "
                "download both files again"
            )
        for odd in sorted(wanted(set(header) | names) & set(header) - listed):
            raise CheckpointError(
                f"{shard_path} holds {show(odd)}, but {path} does not list it there; "
                "download both files again"
            )
        tensors |= {name: StoredTensor(shard_path, name, header[name]) for name in listed}
    return tensors


def _weights_path(folder: Path) -> Path:
    try:
        names = _file_names(folder)
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be read ({error.strerror}); check its name and permissions"
        ) from error
    for name in PREFERRED_FILES:
        if name in names:
            return folder / name
    indexes = [name for name in names if name.endswith(INDEX_SUFFIX)]
    singles = [name for name in names if name.endswith(".safetensors")]
    singles = [name for name in singles if name not in ADAPTER_FILES]
    for found in (indexes, singles):
        if len(found) == 1:
            return folder / found[0]
        if found:
            raise CheckpointError(
                f"{folder} holds {len(found)} sets of weights ({_listing(found)}), expected one or "
                f"model{INDEX_SUFFIX}; move the others away, or restore the index"
            )
    if any(name in names for name in ADAPTER_FILES):
        raise CheckpointError(
            f"{folder} is a LoRA adapter for {_adapter_base(folder)}, expected a whole model; "
            "merge it into its base model (peft's merge_and_unload) and save that"
        )
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    if pickles:
        raise CheckpointError(
            f"{folder} has no safetensors weights, only {_listing(pickles)}: no pickle is ever "
            "opened, since opening one runs code; get the safetensors version of this checkpoint"
        )
    raise CheckpointError(
        f"{folder} has no weights (it holds {_listing(names)}), expected model.safetensors; "
        "download them (qwen-vit download MODEL)"
    )


def _file_names(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a folder, expected one with config.json and safetensors weights"
        )
    return sorted(path.name for path in folder.iterdir() if not path.is_dir())


def _listing(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (", ".join(names[:5]) or "nothing") + more


def _adapter_base(folder: Path) -> str:
    path = folder / "adapter_config.json"
    base = read_json(path).get("base_model_name_or_path") if path.is_file() else None
    return show(base) if base else "a base model that it does not name"


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(
            f"{path}: weight_map is {show(weight_map)}, expected an object; download it again"
        )
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not is_plain_basename(shard):
            raise CheckpointError(
                f"{path}: {show(name)} is said to be in {show(shard)}, expected the plain name of "
                "a .safetensors file in the same folder; do not use this checkpoint, or correct "
                "its index"
            )
    return weight_map


def is_plain_basename(name: str) -> bool:
    return (
        name.endswith(".safetensors")
        and not any(character in name for character in "/\\:\0")
        and not name.startswith(".")
    )


def _shard_path(folder: Path, shard: str, *, index: Path) -> Path:
    path = folder / shard
    if not path.exists():
        raise CheckpointError(
            f"{index} names the shard {shard}, but {path} is not there; "
            "download it (qwen-vit download MODEL)"
        )
    # In the Hub's cache every file of snapshots/COMMIT is a link into blobs; no other link leaves.
    target, home = path.resolve(), folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if not any(target.is_relative_to(parent) for parent in allowed):
        raise CheckpointError(
            f"{index} names the shard {shard}, which is a link out of the folder to {target}; "
            "copy that file into the folder if you trust it"
        )
    return path
