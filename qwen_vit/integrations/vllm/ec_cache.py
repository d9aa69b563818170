"""Write and read vLLM's encoder cache as files, so that a request needs only a grid and a uuid.

vLLM's `ECExampleConnector` reads an item's rows from FOLDER/UUID/encoder_cache.safetensors, one
tensor `ec_cache` (tokens, width). The connector does not check entries, and rows of a wrong width
or number stop the engine for all users. Therefore all entries of a folder share one model, its
image settings, a dtype, a width and a quantization. The folder's `qwen_vit.json` records these
settings. Each entry's uuid contains a digest of the settings, and a digest of the grid and rows.
`index/` maps images to entries. Each call writes one file there, so any number of processes may
write.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen_vit.common.arguments import check_local_path, short_repr, typed_repr
from qwen_vit.common.atomic_file import (
    TEMPORARY_SUFFIX,
    atomic_file,
    cannot_write,
    check_parent,
    check_utf8,
)
from qwen_vit.common.missing_name import missing_name
from qwen_vit.common.safetensors_header import TensorInfo, build_header, read_header
from qwen_vit.common.strict_json import is_integer, is_number, parse_json, read_json
from qwen_vit.errors import ArgumentError, CheckpointError, ExportError, display_name, plural
from qwen_vit.features import FailedImage, ImageFeatures, dtype_name
from qwen_vit.integrations.rows import MERGE_SIZE, check_modalities, count_tokens, split_videos
from qwen_vit.integrations.vllm.cached import CachedFeatures

__all__ = [
    "EncoderCache",
    "check_ec_folder",
    "index_file",
    "read_ec_cache",
    "write_ec_cache",
]

SETTINGS, INDEX, ENTRY = "qwen_vit.json", "index", "encoder_cache.safetensors"  # vLLM's name
FORMAT = "qwen_vit encoder cache 1"
STORED_AS = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
FIELDS = ("id", "uuid", "grid_thw", "second_per_grid_t")  # keys of a line of the index
UUID = re.compile("[0-9a-f]{16}-[0-9a-f]{40}")
DIGESTS = ("weights_sha256", "config_sha256")
SAME = (*DIGESTS, "dtype", "quantization", "width")  # settings of all entries of a folder
WRITE_AGAIN = "write the entry again with write_ec_cache"
OTHER_FOLDER = "pass another folder: an engine that serves another model must not read this one"


def write_ec_cache(
    features: Iterable[ImageFeatures | FailedImage],
    folder: str | os.PathLike[str],
    metadata: Mapping[str, Any],
    *,
    videos: Iterable[ImageFeatures | FailedImage] = (),
    second_per_grid_ts: Sequence[float] = (),
    index: str = "",
) -> list[CachedFeatures]:
    """Write features into a folder from which vLLM can read them, even after a restart.

    >>> import tempfile
    >>> made = [ImageFeatures("a.jpg", torch.ones(6, 8), (1, 4, 6))]
    >>> metadata = {"weights_sha256": "5f", "config_sha256": "c0"}  # encoder.metadata()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     [entry] = write_ec_cache(made, folder, metadata)
    ...     os.listdir(f"{folder}/{entry.uuid}")
    ['encoder_cache.safetensors']

    An engine started with the `ec_transfer_config` {"ec_connector": "ECExampleConnector",
    "ec_role": "ec_consumer", "ec_connector_extra_config": {"shared_storage_path": FOLDER}} accepts
    requests from `to_vllm_cached` or `to_vllm_cached_chat_part`. Source: vLLM's
    distributed/ec_transfer/ec_connector/example_connector.py.

    Args:
        features: as in `to_vllm`. The function checks all features before it writes.
        folder: a new or empty folder, or a folder that this function wrote with the same settings.
        metadata: `encoder.metadata()`, or the `metadata` of `load_features(...)`.
        videos: as in `to_vllm`.
        second_per_grid_ts: as in `to_vllm`.
        index: the name of the file that lists these entries. The default is a digest of the list.

    Returns:
        The entries for a request: images, then videos, in order.

    Raises:
        ExportError: The features are not finite merged tokens of one width and of one dtype
            (bfloat16, float16 or float32), or an image failed. The folder has files but no
            `qwen_vit.json`, its settings are damaged or differ from those of the features, or a
            file cannot be written.
        ArgumentError: `metadata` lacks a digest, or `to_vllm` raises ArgumentError for the same
            features.
    """
    folder = check_local_path("folder", folder, "the folder of the cache")
    check_utf8(folder)
    pictures, clips, seconds = split_videos(features, videos, second_per_grid_ts)
    found = check_modalities(pictures, clips, seconds)
    rows = [part for kind in found if kind is not None for part in kind[0]]
    grids = [grid for kind in found if kind is not None for grid in kind[1].tolist()]
    if rows[0].dtype not in STORED_AS:
        raise ExportError(
            f"the features are {dtype_name(rows[0].dtype)}",
            expected=" or ".join(map(dtype_name, STORED_AS)),
            remedy="encode the images again",
        )
    settings = _settings(metadata, dtype_name(rows[0].dtype)) | {"width": rows[0].shape[1]}
    _make_folder(folder, settings)
    entries = []
    times = [None] * len(pictures) + [float(value) for value in seconds]
    for item, part, grid, time in zip([*pictures, *clips], rows, grids, times, strict=True):
        t, h, w = grid
        values = part.detach().cpu().contiguous()
        entry = CachedFeatures(item.id, _uuid(settings, values, grid), (t, h, w), time)
        _write_entry(folder / entry.uuid, values)
        entries.append(entry)
    _write_index(folder, entries, index)
    return entries


class EncoderCache(Mapping[str, CachedFeatures]):
    """Map image ids to the entries of an encoder cache, and check each entry on access.

    `read_ec_cache` opens a cache. `cache[id]` raises KeyError for an unknown id. It raises
    ExportError if the entry's file is missing or unreadable, or if its header is damaged or
    contradicts the grid or width. Such an entry would stop vLLM.

    Attributes:
        folder: the cache's folder.
        settings: the digests of the model and its image settings, and the dtype, quantization and
            width of the entries.

    Args:
        entries: the entries by id.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], entries: Mapping[str, CachedFeatures]
    ) -> None:
        self.folder, self.settings = folder, settings
        self._entries = entries

    def __repr__(self) -> str:
        return f"EncoderCache({str(self.folder)!r}: {plural(len(self), 'image')})"

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> CachedFeatures:
        if name not in self._entries:
            raise KeyError(missing_name(name, self.folder, self._entries))
        entry = self._entries[name]
        self._check(self.folder / entry.uuid / ENTRY, entry)
        return entry

    def _check(self, path: Path, entry: CachedFeatures) -> None:
        wanted = (count_tokens(entry.grid_thw, MERGE_SIZE), self.settings["width"])
        try:
            found = read_header(path)
        except CheckpointError as error:
            raise ExportError.of(
                error, expected="an entry of the cache", remedy=WRITE_AGAIN
            ) from None
        shapes = {name: info.shape for name, info in found.items()}
        if shapes != {"ec_cache": wanted}:
            raise ExportError(
                f"the file contains {shapes}",
                name=str(path),
                expected=f"ec_cache {wanted} for the grid {entry.grid_thw} of {entry.id!r}",
                remedy=WRITE_AGAIN,
            )


def read_ec_cache(
    folder: str | os.PathLike[str], metadata: Mapping[str, Any] | None = None
) -> EncoderCache:
    """Open a folder that `write_ec_cache` or `qwen-vit export --ec-cache` wrote.

    >>> cache = read_ec_cache("cache")  # doctest: +SKIP
    >>> engine.generate({"prompt": text, **to_vllm_cached([cache["a.jpg"]])})  # doctest: +SKIP

    If the folder has two entries for an image, the mapping contains the newer one.

    Args:
        folder: the cache.
        metadata: the metadata of the encoder whose model the engine serves. The function rejects a
            cache of a different model or of different image settings. None disables the check.

    Returns:
        A mapping from ids to entries.

    Raises:
        ExportError: The folder has no `qwen_vit.json`, its settings or its index are damaged or
            unreadable, or its digests differ from those in `metadata`.
    """
    folder = check_local_path("folder", folder, "the folder of the cache")
    settings = _read_settings(folder)
    if metadata is not None:
        if not isinstance(metadata, Mapping):
            raise ArgumentError(f"metadata is {typed_repr(metadata)}", expected="a mapping")
        _check_same(folder, settings, {name: metadata.get(name) for name in DIGESTS})
    entries: dict[str, CachedFeatures] = {}
    for path in _index_files(folder / INDEX):
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            entry = _parse_entry(line, f"{path}, line {number}")
            entries[entry.id] = entry
    return EncoderCache(folder, settings, entries)


def check_ec_folder(
    folder: str | os.PathLike[str], metadata: Mapping[str, Any], dtype: str
) -> None:
    """Create or check a folder for `write_ec_cache`, before any features exist.

    >>> check_ec_folder("cache", encoder.metadata(), "bfloat16")  # doctest: +SKIP
    """
    folder = check_local_path("folder", folder, "the folder of the cache")
    check_utf8(folder)
    settings = _settings(metadata, dtype)
    if SETTINGS in _names(folder):
        _check_same(folder, _read_settings(folder), settings)
    if not os.access(folder, os.W_OK):
        raise ExportError("not writable", name=str(folder), remedy="check its permissions")


def _settings(metadata: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return the settings that all entries of a folder share, except the width."""
    digests = {
        name: metadata.get(name) if isinstance(metadata, Mapping) else None for name in DIGESTS
    }
    for name, digest in digests.items():
        if not isinstance(digest, str) or not digest:
            raise ArgumentError(
                f"metadata has no {name}",
                expected="encoder.metadata(), or the metadata of load_features(...)",
                remedy="pass the metadata, so that the entries of different models have different "
                "names",
            )
    quantization = metadata.get("quantization")
    return {**digests, "dtype": dtype, "quantization": quantization, "format": FORMAT}


def _uuid(settings: Mapping[str, Any], rows: Tensor, grid: Sequence[int]) -> str:
    # None adds nothing, so entries from before the setting `quantization` keep their uuids
    values = [settings[name] for name in SAME if settings[name] is not None]
    model = sha256(json.dumps(values).encode()).hexdigest()
    content = sha256(json.dumps(list(grid)).encode())
    content.update(_bytes_of(rows))
    return f"{model[:16]}-{content.hexdigest()[:40]}"


def _names(folder: Path) -> list[str]:
    """Return the names in the folder, and create the folder if it does not exist.

    The function rejects a folder that has other files but no `qwen_vit.json`.
    """
    try:
        check_parent(folder)
        if os.path.lexists(folder) and not folder.is_dir():
            raise ExportError("not a folder", name=str(folder), remedy="pass another folder")
        folder.mkdir(exist_ok=True)
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise cannot_write(folder, error) from None
    strange = [name for name in names if not name.endswith(TEMPORARY_SUFFIX)]
    if strange and SETTINGS not in names:
        raise ExportError(
            f"the folder contains {display_name(strange[0])} ({len(strange)} in all) and no "
            f"{SETTINGS}",
            name=str(folder),
            expected="an encoder cache that this package wrote, or an empty folder",
            remedy="pass another folder",
        )
    return names


def _make_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    if SETTINGS not in _names(folder):
        with atomic_file(folder / SETTINGS) as file:
            file.write(json.dumps(settings, sort_keys=True, indent=1).encode() + b"\n")
    _check_same(folder, _read_settings(folder), settings)
    try:
        (folder / INDEX).mkdir(exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from None


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / SETTINGS
    if not path.is_file():
        other = "not a folder" if folder.exists() else "does not exist"
        raise ExportError(
            f"a folder without {SETTINGS}" if folder.is_dir() else other,
            name=str(folder),
            expected="an encoder cache that this package wrote",
        )
    try:
        settings = read_json(path)
    except CheckpointError as error:
        raise ExportError.of(error, remedy="write the cache into a new folder") from None
    wrong = {name: settings.get(name) for name in ("format", "width")}
    if settings.get("format") != FORMAT or not is_integer(settings.get("width")):
        raise ExportError(
            f"its settings include {wrong}",
            name=str(path),
            expected=f"the format {FORMAT!r} and a whole number as the width",
            remedy="write the cache into a new folder with this version",
        )
    return settings


def _check_same(folder: Path, stored: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    differ = [name for name in SAME if name in settings and stored.get(name) != settings[name]]
    if differ:
        facts = "; ".join(
            f"its {name} is {stored.get(name)}, and the {name} of the features is {settings[name]}"
            for name in differ
        )
        fact = f"belongs to a different model or setting: {facts}"
        raise ExportError(fact, name=str(folder), remedy=OTHER_FOLDER)


def _write_entry(folder: Path, rows: Tensor) -> None:
    """Keep an existing file of the right size, because the entry's name identifies the content."""
    path, data = folder / ENTRY, _bytes_of(rows)
    info = TensorInfo(STORED_AS[rows.dtype], tuple(rows.shape), 0, data.nbytes)
    header = build_header({"ec_cache": info})
    try:
        if path.is_file() and path.stat().st_size == len(header) + data.nbytes:
            return
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from None
    with atomic_file(path) as file:
        file.write(header)
        file.write(data)


def _bytes_of(rows: Tensor) -> Any:
    """View contiguous CPU rows as a uint8 array, because NumPy has no bfloat16."""
    return rows.reshape(-1).view(torch.uint8).numpy()


def _write_index(folder: Path, entries: Sequence[CachedFeatures], name: str) -> None:
    lines = [json.dumps(asdict(entry), sort_keys=True) + "\n" for entry in entries]
    content = "".join(lines).encode()
    with atomic_file(index_file(folder, name or sha256(content).hexdigest()[:32])) as file:
        file.write(content)


def index_file(folder: Path, name: str) -> Path:
    return folder / INDEX / f"{name}.jsonl"


def _index_files(folder: Path) -> list[Path]:
    """Return the files of the index, oldest first, so that newer entries replace older ones."""
    try:
        files = [entry for entry in os.scandir(folder) if entry.name.endswith(".jsonl")]
        files.sort(key=lambda entry: (entry.stat().st_mtime_ns, entry.name))
    except OSError as error:
        raise ExportError(
            f"cannot be read ({error.strerror})",
            name=str(folder),
            remedy="check its permissions, or write the cache again",
        ) from None
    return [Path(entry.path) for entry in files]


def _parse_entry(line: bytes, source: str) -> CachedFeatures:
    try:
        found = parse_json(line, source=source)
    except CheckpointError as error:
        raise ExportError.of(error, remedy=WRITE_AGAIN) from None
    name, uuid, grid, time = (found.get(key) for key in FIELDS)
    is_right = (
        found.keys() == set(FIELDS)
        and isinstance(name, str)
        and isinstance(uuid, str)
        and UUID.fullmatch(uuid) is not None  # the code builds a path from it
        and isinstance(grid, list)
        and len(grid) == 3
        and all(is_integer(n) and n > 0 for n in grid)
        and (time is None or (is_number(time) and time > 0))
    )
    if not is_right:
        raise ExportError(f"not an entry: {short_repr(found)}", name=source, remedy=WRITE_AGAIN)
    return CachedFeatures(found["id"], found["uuid"], tuple(found["grid_thw"]), time)
