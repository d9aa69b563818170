"""Find a checkpoint in the package, in a local folder, or in a repository on the Hugging Face Hub.

From a repository, this module fetches the config files and the vision tensors. It reads shards that
are in the Hub's cache, and byte ranges of the others. If the server refuses ranges or the
connection keeps breaking, it fetches whole shards. It stores downloads by commit, so a later load
of the same commit needs no network.
"""

import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from qwen_vit.checkpoint import cache
from qwen_vit.checkpoint.load import find_tower
from qwen_vit.checkpoint.partial_download import Shards, write_tower
from qwen_vit.checkpoint.published import PACKAGED, did_you_mean, is_path, packaged_weights
from qwen_vit.checkpoint.ranges import RangesRefusedError, TransferError
from qwen_vit.checkpoint.repository import NotCachedError, Repository
from qwen_vit.checkpoint.tower_names import ANCHOR_KEY, plain_name, tower_prefixes
from qwen_vit.checkpoint.weight_files import (
    ADAPTER_CONFIG,
    INDEX_FILE,
    INDEX_SUFFIX,
    VISION_FILE,
    WEIGHTS_FILE,
    choose_weights,
    read_index,
)
from qwen_vit.common.arguments import check_local_path, check_path, missing_remedy, short_repr
from qwen_vit.common.strict_json import is_number, read_json
from qwen_vit.config import VisionConfig
from qwen_vit.errors import ArgumentError, CheckpointError, HubError, QwenVitError, with_options

__all__ = ["Download", "Origin", "Source", "download", "find_checkpoint"]

logger = logging.getLogger("qwen_vit")

MODELS = "a local folder, 'organisation/repository' on the Hub, or 'tiny'"
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
SETTINGS = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """`commit` is None unless a repository contains the checkpoint."""

    name: str
    commit: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Source(Origin):
    folder: Path


@dataclass(frozen=True, slots=True)
class Download:
    """Count a download's bytes: fetched now, kept on the disk, and left on the Hub (saved).

    `kept_bytes` is the size of the weights on the disk, and `saved_bytes` that of the rest. Both
    are None for a checkpoint outside the Hub. `saved_bytes` is also None if the index does not give
    the total size.
    """

    source: Source
    fetched_bytes: int = 0
    kept_bytes: int | None = None
    saved_bytes: int | None = None
    licence: str | None = None


def find_checkpoint(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    subfolder: str | None = None,
) -> Source:
    """Find `model`: the packaged "tiny", a local folder, or a repository on the Hub.

    >>> find_checkpoint("tiny").name
    'tiny'

    The function downloads the config files and the vision tensors once. `revision`, `token`,
    `cache_dir` and `local_files_only` have the same meaning as in huggingface_hub.
    """
    return download(
        model,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        subfolder=subfolder,
    ).source


def download(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    full: bool = False,
    subfolder: str | None = None,
) -> Download:
    """Find a checkpoint as `find_checkpoint` does, and count the download's bytes.

    >>> download("tiny").fetched_bytes
    0

    The Hub gives no checksum for a range. `full` downloads whole shards with vision tensors and
    checks them against the Hub's sha256. `subfolder` names the checkpoint's folder in a folder or
    repository of several models, such as "text_encoder".
    """
    name = check_path("model", model, MODELS)
    if cache_dir is not None:
        cache_dir = str(check_local_path("cache_dir", cache_dir, "a folder"))
    is_folder = _is_folder(name)
    _check_revision(revision, name, is_folder)
    if subfolder is not None:
        _check_subfolder(subfolder, name)
    if is_folder:
        folder = Path(name, subfolder or "")
        return Download(Source(folder=folder, name=str(folder) if subfolder else name))
    if name in PACKAGED:
        return Download(Source(folder=packaged_weights() / name, name=name))
    if os.path.exists(name):
        has_config = Path(name).with_name("config.json").is_file()
        what = "the folder that contains this file" if has_config else "a folder with config.json"
        remedy = f"pass {what}" + " and the weights" * (not has_config)
        raise CheckpointError("a file", name=name, expected="a checkpoint's folder", remedy=remedy)
    if is_path(name):
        raise CheckpointError(
            "does not exist",
            name=name,
            expected="a checkpoint's folder",
            remedy=missing_remedy(name),
        )
    if not REPOSITORY.fullmatch(name):
        raise HubError(
            "an address" if "://" in name else "does not exist",
            name=name,
            expected=MODELS,
            remedy=did_you_mean(name) or "check the name",
        )
    repository = Repository(name, revision, token, cache_dir, local_files_only, subfolder)
    try:
        return _download(repository, full)
    except NotCachedError as error:
        raise _with_cause(HubError.of(error), error) from None
    except QwenVitError:
        raise
    except Exception as error:  # noqa: BLE001 - each version of the client has its own errors
        raise _with_cause(repository.explain(error), error) from None


def _with_cause(error: HubError, raised: BaseException) -> HubError:
    """Add the text of the first cause as a note, because the client's traceback is very long."""
    cause, seen = raised, {id(raised)}
    while (earlier := cause.__cause__ or cause.__context__) is not None and id(earlier) not in seen:
        cause = earlier
        seen.add(id(cause))  # a retry can make a cycle of errors
    if text := str(cause).partition("\n")[0]:
        error.add_note(f"Cause: {type(cause).__name__}: {text}")
    return error


def _check_revision(revision: str | None, name: str, is_folder: bool) -> None:
    if revision == "":
        raise ArgumentError(
            "revision is empty",
            expected="a branch, a tag or a commit",
            remedy="omit the revision for the default branch",
        )
    if revision is not None and (is_folder or name in PACKAGED):
        what = "a local folder" if is_folder else "a checkpoint of this package"
        raise ArgumentError(
            f"revision is {short_repr(revision)}, but {name} is {what}, which has only one version",
            remedy=with_options(
                "omit {}, or name a repository on the Hub (a local folder with this name hides "
                "the repository)",
                "revision",
            ),
        )


def _check_subfolder(subfolder: str, name: str) -> None:
    parts = subfolder.split("/") if isinstance(subfolder, str) else [""]
    if not all(parts) or {".", ".."} & set(parts) or not subfolder.isprintable():
        raise ArgumentError(
            f"subfolder is {short_repr(subfolder)}",
            expected="a folder below the checkpoint's folder, such as text_encoder",
        )
    if name in PACKAGED:
        raise ArgumentError(f"{name} has no subfolder", remedy=with_options("omit {}", "subfolder"))


def _is_folder(name: str) -> bool:
    try:
        return Path(name).is_dir()
    except OSError as error:  # Python 3.11 raises if permissions forbid it
        raise CheckpointError(
            f"cannot be read ({error.strerror})",
            name=name,
            expected="a folder",
            remedy="check its name and its permissions",
        ) from error


def _download(repository: Repository, full: bool) -> Download:
    if not full and (kept := _kept(repository)) is not None:
        return kept  # a pinned commit needs no request
    snapshot = _resolve(repository)
    if not full and (kept := _kept(repository)) is not None:
        return kept
    VisionConfig.from_json(snapshot / "config.json")  # rejects other models before any weights
    _fetch_settings(repository)
    index, names = _find_weights(repository)
    if full:
        done = _fetch_whole(repository, index, names)
        cache.discard(_folder(repository))  # from now on, use the checked shards, not the ranges
        return done
    cached = {name: path for name in names if (path := repository.cached(name)) is not None}
    if repository.is_offline():
        if len(cached) < len(names):
            raise repository.not_cached()
        for name, path in cached.items():
            repository.check(name, path)
        return _whole(repository, index, list(cached.values()))
    local = {name: path for name, path in cached.items() if repository.is_sound(name, path)}
    if len(local) == len(names):
        return _whole(repository, index, list(local.values()))
    shards = Shards(local, set(names) - set(local), repository.open_range, repository.label)
    try:
        with cache.one_at_a_time(_folder(repository)):
            # another process may have downloaded it during the wait
            return _kept(repository) or _vision_alone(repository, snapshot, index, shards)
    except (RangesRefusedError, TransferError) as error:
        if isinstance(error, TransferError) and error.cause is not None:
            # the server's answer: a whole shard would get the same answer
            raise error.cause from None
        logger.warning(
            "%s: cannot fetch the vision tensors alone (%s); downloading whole files instead: %s",
            repository.label, error, ", ".join(names),
        )  # fmt: skip
        return _fetch_whole(repository, index, names)


def _folder(repository: Repository) -> Path:
    return cache.folder_of(
        repository.cache(), repository.name, repository.commit or "", repository.subfolder
    )


def _kept(repository: Repository) -> Download | None:
    """Return an earlier download of the commit, or None.

    If the download is damaged, discard it and return None. Offline, raise an error instead.
    """
    if repository.commit is None:
        return None
    folder = _folder(repository)
    cache.remove_abandoned(folder)
    try:
        manifest = cache.find(folder)
        if manifest is None:
            return None
        if (manifest.repo, manifest.commit) != (repository.name, repository.commit):
            raise CheckpointError(
                f"contains {manifest.repo} at {manifest.commit}",
                name=str(folder),
                expected=f"{repository.name} at {repository.commit}",
                remedy="delete the folder",
            )
    except CheckpointError as error:
        if repository.is_offline():
            raise
        logger.warning("%s qwen_vit now deletes the folder itself.", error)
        cache.discard(folder)
        return None
    source = Source(folder=folder, name=repository.full_name, commit=repository.commit)
    kept, whole = manifest.files[VISION_FILE]["bytes"], manifest.whole_bytes
    saved = None if whole is None else max(0, whole - kept)
    return Download(source, repository.fetched_bytes, kept, saved, manifest.licence)


def _resolve(repository: Repository) -> Path:
    config = repository.resolve("config.json")
    if config is None:
        _choose(repository, repository.names() or [WEIGHTS_FILE])
        raise HubError(
            "no config.json",
            name=repository.label,
            expected="a Qwen2.5-VL checkpoint",
            remedy="choose a repository with a Qwen2.5-VL checkpoint",
        )
    return config.parent


def _fetch_settings(repository: Repository) -> None:
    found, unknown = False, None
    for name in SETTINGS:
        try:
            found |= repository.file(name) is not None
        except NotCachedError as error:
            unknown = error
    if unknown is not None and not found:
        raise unknown  # the defaults would silently resize to other limits


def _find_weights(repository: Repository) -> tuple[Path | None, list[str]]:
    """Return the index, or None for a single file, and the names of the files with vision tensors.

    If a repository has both a single file and an index, the function chooses the file, as
    transformers does. It chooses the index if only the index's shards are in the cache.
    """
    if repository.cached(WEIGHTS_FILE) is not None:
        return None, [WEIGHTS_FILE]
    index = repository.file(INDEX_FILE)
    if index is None:
        # a mirror that lists no files may have this one
        listed = repository.names() or repository.cached_weights() or [WEIGHTS_FILE]
        weights = _choose(repository, listed)
        if not weights.endswith(INDEX_SUFFIX):
            return None, [weights]
        index = repository.file(weights)
        if index is None:
            raise HubError(
                f"lists {weights} but returned 404", name=repository.label, remedy="try again"
            )
    shard_of = read_index(index)
    prefixes = tower_prefixes(map(plain_name, shard_of))
    if not prefixes:
        raise HubError(
            f"names no {ANCHOR_KEY}",
            name=str(index),
            expected="a Qwen2.5-VL vision tower",
            remedy="choose a repository with a Qwen2.5-VL checkpoint",
        )
    names = sorted(
        {file for name, file in shard_of.items() if plain_name(name).startswith(prefixes[0])}
    )
    are_cached = all(repository.cached(name) is not None for name in names)
    if not are_cached and WEIGHTS_FILE in (repository.names() or ()):
        return None, [WEIGHTS_FILE]
    return index, names


def _choose(repository: Repository, names: Iterable[str]) -> str:
    return choose_weights(names, repository.label, lambda: repository.file(ADAPTER_CONFIG))


def _fetch_whole(repository: Repository, index: Path | None, names: list[str]) -> Download:
    done = _whole(repository, index, [repository.whole(name) for name in names])
    return replace(done, licence=repository.licence())


def _whole(repository: Repository, index: Path | None, files: list[Path]) -> Download:
    kept = sum(path.stat().st_size for path in files)
    whole = kept if index is None else _total_bytes(index)
    saved = None if whole is None else max(0, whole - kept)
    source = Source(folder=files[0].parent, name=repository.full_name, commit=repository.commit)
    return Download(source, repository.fetched_bytes, kept, saved)


def _vision_alone(
    repository: Repository, snapshot: Path, index: Path | None, shards: Shards
) -> Download:
    tower = find_tower(snapshot, shards.remote_files())  # rejects bad headers before any data
    manifest = cache.Manifest(
        repo=repository.name,
        commit=repository.commit or "",
        shards=shards.origins(),
        whole_bytes=sum(shards.file_bytes.values()) if index is None else _total_bytes(index),
        licence=repository.licence(),
    )
    folder = _folder(repository)
    with cache.fill(folder, manifest) as temporary:
        write_tower(tower, shards, temporary, repository.label)
    kept = _kept(repository)
    if kept is None:
        raise HubError(
            "another process removed the folder during the download",
            name=str(folder),
            remedy="try again",
        )
    return kept


def _total_bytes(index: Path) -> int | None:
    metadata = read_json(index).get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return int(total) if is_number(total) else None  # transformers may write a float
