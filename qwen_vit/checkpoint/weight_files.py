"""Find the file of each tensor in a checkpoint folder, independently of the model."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from qwen_vit.common.arguments import short_repr
from qwen_vit.common.safetensors_header import TensorInfo, read_header
from qwen_vit.common.strict_json import read_json
from qwen_vit.errors import CheckpointError, with_options

__all__ = [
    "ADAPTER_CONFIG",
    "INDEX_FILE",
    "INDEX_SUFFIX",
    "VISION_FILE",
    "WEIGHTS_FILE",
    "RemoteFiles",
    "StoredTensor",
    "choose_weights",
    "find_tensors",
    "is_plain_basename",
    "read_index",
]

INDEX_SUFFIX = ".safetensors.index.json"
WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model" + INDEX_SUFFIX
VISION_FILE = "vision.safetensors"  # a tower alone, as stored after a download
PREFERRED_FILES = (WEIGHTS_FILE, INDEX_FILE, VISION_FILE)
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_NAME_BYTES = 255
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", ADAPTER_CONFIG)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Locate a tensor in a file: the file, the tensor's name in the file, and its header entry."""

    path: Path
    name: str
    info: TensorInfo


@dataclass(frozen=True, slots=True)
class RemoteFiles:
    """List weight files of a folder that are still on the Hub, and read their headers."""

    names: frozenset[str]
    header_of: Callable[[str], dict[str, TensorInfo]]


def find_tensors(
    folder: Path, wanted: Callable[[set[str]], set[str]], remote: RemoteFiles | None = None
) -> dict[str, StoredTensor]:
    """Locate the tensors in a folder that `wanted` selects by name.

    The weights are model.safetensors, the shards of an index, vision.safetensors, or the only other
    safetensors file. Shards without a wanted tensor may be absent.
    """
    remote_names = remote.names if remote is not None else frozenset()

    def header_at(path: Path) -> dict[str, TensorInfo]:
        if remote is not None and path.name in remote.names:
            return remote.header_of(path.name)
        return read_header(path)

    path = _weights_path(folder, remote_names)
    if not path.name.endswith(INDEX_SUFFIX):
        header = header_at(path)
        return {name: StoredTensor(path, name, header[name]) for name in wanted(set(header))}

    shard_of = read_index(path)
    names = wanted(set(shard_of))
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted({shard_of[name] for name in names}):
        shard_path = folder / shard
        if shard not in remote_names:
            _check_shard_path(shard_path, index=path)
        header = header_at(shard_path)
        listed = {name for name in names if shard_of[name] == shard}
        for odd in sorted(listed - set(header)):
            raise CheckpointError(
                f"lists {short_repr(odd)} in {shard}, but {shard_path} does not contain it",
                name=str(path),
                remedy="download both files again",
            )
        for odd in sorted(wanted(set(header) | names) & set(header) - listed):
            raise CheckpointError(
                f"contains {short_repr(odd)}, but {path} does not list it there",
                name=str(shard_path),
                remedy="download both files again",
            )
        tensors |= {name: StoredTensor(shard_path, name, header[name]) for name in listed}
    return tensors


def _weights_path(folder: Path, remote: Iterable[str]) -> Path:
    try:
        names = _file_names(folder)
    except OSError as error:
        raise CheckpointError(
            f"cannot be read ({error.strerror})",
            name=str(folder),
            remedy="check its name and permissions",
        ) from error
    names = sorted({*names, *remote})
    if not any(name.endswith((".safetensors", INDEX_SUFFIX)) for name in names):
        _name_subfolder(folder)
    return folder / choose_weights(names, str(folder), lambda: folder / ADAPTER_CONFIG)


def _name_subfolder(folder: Path) -> None:
    """Raise CheckpointError with the subfolders that contain a checkpoint, if there are any."""
    below = sorted(
        path.parent.name
        for path in folder.glob("*/config.json")
        if any(path.parent.glob("*.safetensors"))
    )
    if below:
        raise CheckpointError(
            f"no weights, but a config.json and weights in {_listing(below)}",
            name=str(folder),
            remedy=with_options("pass {}", ("subfolder", below[0])),
        )


def choose_weights(
    names: Iterable[str], source: str, adapter_config: Callable[[], Path | None]
) -> str:
    """Return the file among `names` that contains the weights, or the index.

    >>> choose_weights(["README.md", "model.safetensors"], "folder", Path)
    'model.safetensors'

    `adapter_config` returns the file that names the base model of an adapter, for the message.
    """
    names = sorted(names)
    for name in PREFERRED_FILES:
        if name in names:
            return name
    indexes = [name for name in names if name.endswith(INDEX_SUFFIX)]
    singles = [name for name in names if name.endswith(".safetensors")]
    singles = [name for name in singles if name not in ADAPTER_FILES]
    for found in (indexes, singles):
        if len(found) == 1:
            return found[0]
        if found:
            raise CheckpointError(
                f"contains {len(found)} sets of weights ({_listing(found)})",
                name=source,
                expected=f"one or {INDEX_FILE}",
                remedy="move the other sets away, or restore the index",
            )
    if any(name in names for name in ADAPTER_FILES):
        raise CheckpointError(
            f"a LoRA adapter for {_adapter_base(adapter_config())}",
            name=source,
            expected="a whole model",
            remedy="merge the adapter into the base model (peft's merge_and_unload) and save the "
            "result",
        )
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    if pickles:
        raise CheckpointError(
            f"no safetensors weights, only {_listing(pickles)}; qwen_vit never opens pickles, "
            "because a pickle can run code",
            name=source,
            remedy="get the safetensors version of this checkpoint",
        )
    ggufs = [name for name in names if name.endswith(".gguf")]
    if ggufs:
        raise CheckpointError(
            f"no safetensors weights, only GGUF ({_listing(ggufs)})",
            name=source,
            remedy="use the original safetensors checkpoint",
        )
    raise CheckpointError(
        f"no weights (the folder contains {_listing(names)})",
        name=source,
        expected=WEIGHTS_FILE,
        remedy="pass a folder or a repository that has safetensors weights",
    )


def _file_names(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise CheckpointError(
            "not a folder",
            name=str(folder),
            expected="a folder with config.json and safetensors weights",
        )
    return sorted(path.name for path in folder.iterdir() if not path.is_dir())


def _listing(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (", ".join(names[:5]) or "nothing") + more


def _adapter_base(path: Path | None) -> str:
    if path is None or not path.is_file():
        return "a base model that it does not name"
    base = read_json(path).get("base_model_name_or_path")
    return short_repr(base) if base else "a base model that it does not name"


def read_index(path: Path) -> dict[str, str]:
    """Return the shard of each tensor. Each shard is the plain name of a safetensors file."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(
            f"weight_map is {short_repr(weight_map)}",
            name=str(path),
            expected="an object",
            remedy="download the index again",
        )
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not is_plain_basename(shard):
            raise CheckpointError(
                f"lists {short_repr(name)} in {short_repr(shard)}",
                name=str(path),
                expected="the plain name of a .safetensors file in the same folder",
                remedy="do not use this checkpoint, or correct its index",
            )
    return weight_map


def is_plain_basename(name: str) -> bool:
    """Return whether `name` is a valid, visible name of a safetensors file, not a path or address.

    >>> is_plain_basename("model-00001-of-00005.safetensors"), is_plain_basename("../a.safetensors")
    (True, False)
    """
    return (
        name.endswith(".safetensors")
        and not any(character in name for character in "/\\:\0")
        and not name.startswith(".")
        and len(name.encode("utf-8", "replace")) <= MAX_NAME_BYTES
        and name.isprintable()  # half of a surrogate pair, which no file system accepts
    )


def _check_shard_path(path: Path, *, index: Path) -> None:
    if not path.exists():
        raise CheckpointError(
            f"names the shard {path.name}, but {path} does not exist",
            name=str(index),
            remedy="download the shard into this folder, or pass a Hub repository as the model",
        )
    # A local folder's links are its owner's, and may lead to any regular file. In the Hub's cache
    # every file of snapshots/COMMIT is a link into blobs. No other link may leave the folder.
    target, home = path.resolve(), path.parent.resolve()
    cache = next((each.parent for each in (home, *home.parents) if each.name == "snapshots"), None)
    if cache is None or target.is_relative_to(home) or target.is_relative_to(cache / "blobs"):
        return
    raise CheckpointError(
        f"names the shard {path.name}, which is a link out of the Hub's cache to {target}",
        name=str(index),
        remedy="delete the link, and download the model again (qwen-vit download MODEL)",
    )
