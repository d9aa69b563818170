"""Store a downloaded tower in a folder of its own, completely or not at all, with checksums.

`models--ORG--NAME/qwen_vit/COMMIT/` in the Hub's cache contains the config files,
vision.safetensors and manifest.json. For a subfolder, the last part is COMMIT--SUBFOLDER. The
manifest records the size and sha256 of each file. A writer fills a folder under another name, and
renames it when it is complete. Therefore no reader finds a partial folder, even after a crash.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from qwen_vit.checkpoint.weight_files import VISION_FILE
from qwen_vit.common.atomic_file import sync_folder
from qwen_vit.common.safetensors_header import LENGTH_BYTES, MAX_HEADER_BYTES
from qwen_vit.common.strict_json import read_json
from qwen_vit.errors import CheckpointError

__all__ = [
    "Manifest",
    "check",
    "check_digest",
    "discard",
    "fill",
    "find",
    "folder_of",
    "hub_digest",
    "one_at_a_time",
    "recorded_licence",
    "remember_check",
    "remove_abandoned",
    "repository_folder",
    "was_checked",
]

logger = logging.getLogger("qwen_vit")

MANIFEST_FILE = "manifest.json"
FORMAT = 1
ABANDONED_S = 24 * 3600.0  # for a partial download of another host
UNKNOWN_SPACE = "unknown"


@dataclass(frozen=True, slots=True)
class Manifest:
    """Describe the content of a folder, and its origin.

    `shards` records how qwen_vit read each shard. `whole_bytes` is the size of the checkpoint's
    weights, or None if the index does not give it. The writer adds `files` and `header_sha256` when
    the folder is complete. `header_sha256` is the hash of vision.safetensors' header, which `find`
    checks.
    """

    repo: str
    commit: str
    header_sha256: str = ""
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    shards: Mapping[str, str] = field(default_factory=dict)
    whole_bytes: int | None = None
    licence: str | None = None
    format: int = FORMAT

    def to_json(self) -> dict[str, Any]:
        document = asdict(self)
        return {**document, "checksum": _checksum(document)}


def folder_of(cache: Path, repo: str, commit: str, subfolder: str | None = None) -> Path:
    """Return the folder of a repository's tower at a commit, in a Hub cache.

    >>> folder_of(Path("hub"), "Qwen/Qwen2.5-VL-7B-Instruct", "0" * 40).parent.as_posix()
    'hub/models--Qwen--Qwen2.5-VL-7B-Instruct/qwen_vit'
    """
    name = f"{commit}--{subfolder.replace('/', '--')}" if subfolder else commit
    return repository_folder(cache, repo) / "qwen_vit" / name


def repository_folder(cache: Path, repo: str) -> Path:
    """Return the folder in which huggingface_hub stores a repository."""
    return cache / f"models--{repo.replace('/', '--')}"


def find(folder: Path) -> Manifest | None:
    """Return a folder's manifest, or None if the folder does not exist.

    The function checks the manifest, the file sizes and the header of vision.safetensors. Raises
    CheckpointError if the check fails, or if a newer version of qwen_vit wrote the folder.
    """
    if not folder.is_dir():
        return None
    manifest = _read_manifest(folder)
    for name, recorded in manifest.files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != recorded["bytes"]:
            raise CheckpointError(
                "missing" if size is None else f"{size} bytes",
                name=str(path),
                expected=f"the {recorded['bytes']} bytes that {MANIFEST_FILE} records",
                remedy=_remedy(folder),
            )
    header = _header_sha256(folder / VISION_FILE)
    if header != manifest.header_sha256:
        raise CheckpointError(
            f"the header changed after the download (sha256 {header[:12]}...)",
            name=str(folder / VISION_FILE),
            expected=f"{manifest.header_sha256[:12]}...",
            remedy=_remedy(folder),
        )
    return manifest


def recorded_licence(folder: Path) -> str | None:
    """Return the licence that the model card named at the time of the download, or None if it is
    unknown."""
    return _read_manifest(folder).licence if (folder / MANIFEST_FILE).is_file() else None


def check(folder: Path) -> dict[str, str] | None:
    """Hash again each file that has a recorded hash. Return the kind of hash that matched, by file
    name, or None if no hashes are recorded.

    A snapshot in the Hub's cache contains links to files whose names are digests: sha256 for large
    files, and git's sha1 for others.
    """
    if (folder / MANIFEST_FILE).is_file():
        manifest = find(folder)
        recorded = {} if manifest is None else manifest.files
        for name, entry in recorded.items():
            _compare(folder / name, _file_sha256(folder / name), entry["sha256"])
        return dict.fromkeys(recorded, "sha256 as recorded when it was written")
    results = {}
    for path in sorted(folder.iterdir()):
        digest = hub_digest(path)
        if digest is not None:
            results[path.name] = check_digest(path, digest)
    return results or None


def hub_digest(path: Path) -> str | None:
    """Return the Hub's digest of a cached file, sha256 or git's sha1 in hex, or None if it is
    unknown."""
    if not path.is_symlink():
        return None
    target = Path(os.readlink(path))
    is_hex = all(character in "0123456789abcdef" for character in target.name)
    known = target.parent.name == "blobs" and is_hex and len(target.name) in (40, 64)
    return target.name if known else None


def check_digest(path: Path, digest: str) -> str:
    """Check a file against a sha256 or git's sha1. Return the kind of hash that matched."""
    if len(digest) == 64:
        _compare(path, _file_sha256(path), digest)
        return "the Hub's sha256"
    content = path.read_bytes()
    _compare(path, hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), digest)
    return "the Hub's git sha1"


def was_checked(repository: Path, path: Path, digest: str) -> bool:
    """Return whether an earlier check accepted this digest for a file of the same size and
    modification time."""
    return _mark(repository, path, digest).exists()


def remember_check(repository: Path, path: Path, digest: str) -> None:
    mark = _mark(repository, path, digest)
    with suppress(OSError):
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()


def _mark(repository: Path, path: Path, digest: str) -> Path:
    status = path.stat()
    return repository / "qwen_vit" / "checked" / f"{digest}-{status.st_size}-{status.st_mtime_ns}"


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Let one process fill `folder` while other processes wait.

    The lock only saves bandwidth. On a file system without effective locks, processes download in
    parallel, and the first to finish keeps its folder.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("another process is downloading to %s; waiting for it", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            logger.info("%s cannot be locked (%s)", folder, error.strerror)
        yield  # closing the file unlocks it, and so does the end of the process


@contextmanager
def fill(folder: Path, manifest: Manifest) -> Iterator[Path]:
    """Yield a temporary folder to fill. After the block, record the content, sync the folder to the
    disk and rename it. If another process has renamed its folder first, remove this one.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{_owner()}.{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        yield temporary
        _record(temporary, manifest)
        _rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_abandoned(folder: Path) -> None:
    """Remove partial downloads beside `folder` that killed processes left.

    The function cannot see processes of another host or container. It removes their partial
    downloads after a day without a write.
    """
    for path in folder.parent.glob(".*.*-*.*"):
        space, _, process = path.name.split(".")[2].rpartition("-")
        try:
            if space == _process_space() != UNKNOWN_SPACE:
                is_abandoned = not _is_alive(int(process))
            else:
                is_abandoned = time.time() - _last_change(path) > ABANDONED_S
        except (OSError, OverflowError, ValueError):  # another process removed it, or not ours
            continue
        if is_abandoned:
            shutil.rmtree(path, ignore_errors=True)


def discard(folder: Path) -> None:
    """Rename a folder and then remove it, so that other processes see it disappear at once."""
    doomed = folder.with_name(f".{folder.name}.{_owner()}.{uuid.uuid4().hex[:8]}")
    with suppress(FileNotFoundError):  # another process removed it
        folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _record(folder: Path, manifest: Manifest) -> None:
    files = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        files[path.name] = {"bytes": path.stat().st_size, "sha256": _file_sha256(path)}
    header = _header_sha256(folder / VISION_FILE)
    complete = replace(manifest, header_sha256=header, files=files)
    with (folder / MANIFEST_FILE).open("w") as file:
        json.dump(complete.to_json(), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)


def _rename(temporary: Path, folder: Path) -> None:
    while True:
        try:
            temporary.rename(folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            try:
                if find(folder) is not None:
                    return  # another process was first
            except CheckpointError:
                discard(folder)
        else:
            sync_folder(folder.parent)
            return


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST_FILE
    try:
        document = read_json(path)
    except CheckpointError as error:
        raise CheckpointError.of(error, remedy=_remedy(folder)) from None
    checksum = document.pop("checksum", None)
    if checksum != _checksum(document) or document.get("format") != FORMAT:
        raise CheckpointError(
            "changed after the download, or a newer version of qwen_vit wrote it",
            name=str(path),
            remedy=_remedy(folder),
        )
    return Manifest(**document)


def _compare(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise CheckpointError(
            f"corrupt: its hash is {found[:16]}...",
            name=f"{path} ({path.stat().st_size} bytes)",
            expected=f"{expected[:16]}...",
            remedy="delete the file, and download it again (qwen-vit download MODEL)",
        )


def _remedy(folder: Path) -> str:
    return f"delete {folder}, and download it again (qwen-vit download MODEL)"


def _checksum(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _header_sha256(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(LENGTH_BYTES)
        length = int.from_bytes(start, "little")
        header = file.read(length) if length <= MAX_HEADER_BYTES else b""
    return hashlib.sha256(start + header).hexdigest()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # the process belongs to another user
        return True
    return True


def _last_change(folder: Path) -> float:
    """Return the latest time at which a download wrote: a running download writes constantly."""
    return max(path.stat().st_mtime for path in (folder, *folder.iterdir()))


def _owner() -> str:
    return f"{_process_space()}-{os.getpid()}"


def _process_space() -> str:
    """Return an id of the machine's boot and of the container, or "unknown" without /proc.

    Running processes of one boot and one container have different process ids.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return hashlib.sha256(f"{boot} {os.readlink('/proc/self/ns/pid')}".encode()).hexdigest()[:8]
    except OSError:
        return UNKNOWN_SPACE
