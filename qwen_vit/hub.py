"""Find a checkpoint: the packaged one, a local folder, or a repository on the Hugging Face Hub.

The only file that imports huggingface_hub, and only when the Hub is asked: that import reads
environment variables, which importing this package does not.
"""

import errno
import os
import re
from dataclasses import dataclass
from pathlib import Path

from qwen_vit.checkpoint import LANDMARK, tower_prefixes
from qwen_vit.errors import HubError, QwenVitError
from qwen_vit.strict_json import read_json
from qwen_vit.weight_files import is_plain_basename

__all__ = ["Source", "find_checkpoint", "packaged_weights"]

PACKAGED = ("tiny",)
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
COMMIT_IN_CACHE = re.compile(r"/snapshots/([0-9a-f]{40})(/|$)")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SETTINGS = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True, slots=True)
class Source:
    """Where a checkpoint lies, and what it is called. `commit` is None for a local folder."""

    folder: Path
    name: str
    commit: str | None = None


def find_checkpoint(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Source:
    """Find `model`: the packaged "tiny", a local folder, or a repository on the Hub.

    >>> find_checkpoint("tiny").name
    'tiny'

    From the Hub come the config files and the shards that hold vision tensors, into the usual
    cache; `revision`, `token`, `cache_dir` and `local_files_only` mean what they mean in
    huggingface_hub. Raises HubError with the cause and what to do.
    """
    name = os.fsdecode(model)
    if name and Path(name).is_dir():
        return Source(Path(name), name)
    if name in PACKAGED:
        return Source(packaged_weights() / name, name)
    if not REPOSITORY.fullmatch(name) or name.startswith((".", "/")):
        raise HubError(
            f"{name!r} is neither a folder nor a Hub repository, expected a local folder, "
            "'organisation/repository', or 'tiny'"
        )
    try:
        return _download(name, revision, token, cache_dir, local_files_only)
    except QwenVitError:
        raise
    except Exception as error:  # each version of the client has its own transport errors
        raise _explain(error, name, revision, local_files_only) from error


def packaged_weights() -> Path:
    """`weights/` inside an installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / "weights"
    return inside if inside.is_dir() else package.parent / "weights"


def _download(
    repo: str,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | Path | None,
    local_files_only: bool,
) -> Source:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def fetch(file: str, commit: str | None) -> Path:
        return Path(
            hf_hub_download(
                repo,
                file,
                revision=commit,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
            )
        )

    config = fetch("config.json", revision)
    found = COMMIT_IN_CACHE.search(str(config))
    commit = found[1] if found else revision  # the other files must come from the same commit
    found_settings, unknown = False, None
    for file in SETTINGS:
        try:
            fetch(file, commit)
            found_settings = True
        except LocalEntryNotFoundError as error:
            # the cache also remembers which files a repository does not have
            if try_to_load_from_cache(repo, file, cache_dir=cache_dir, revision=commit) is None:
                unknown = error
        except EntryNotFoundError:
            continue
    if unknown is not None and not found_settings:
        raise unknown  # going on would silently resize to other limits
    try:
        index = fetch(INDEX, commit)
    except EntryNotFoundError:
        fetch(WEIGHTS, commit)
    else:
        for shard in _vision_shards(index):
            fetch(shard, commit)
    return Source(config.parent, repo, commit)


def _vision_shards(index: Path) -> list[str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise HubError(f"{index} has no weight_map, expected one; delete it and download it again")
    prefixes = tower_prefixes(weight_map)
    if not prefixes:
        raise HubError(
            f"{index} names no {LANDMARK}, expected a Qwen2.5-VL vision tower; choose a repository "
            "that holds one"
        )
    shards = [shard for name, shard in weight_map.items() if name.startswith(prefixes[0])]
    for shard in shards:
        if not isinstance(shard, str) or not is_plain_basename(shard):
            raise HubError(
                f"{index} names the shard {shard!r}, expected the plain name of a file; "
                "do not use this repository"
            )
    return sorted(set(shards))


def _explain(error: Exception, repo: str, revision: str | None, local_files_only: bool) -> HubError:
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = f"{repo} at {revision}" if revision else repo
    reply = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    status = getattr(reply, "status_code", None)
    if isinstance(error, GatedRepoError):
        cause = "is gated; accept its licence on its page, then log in with `hf auth login`"
    elif isinstance(error, RevisionNotFoundError):
        cause = "has no such revision; look at its branches and commits"
    elif isinstance(error, RepositoryNotFoundError):
        cause = "was not found, or is private; check the name, or log in with `hf auth login`"
    elif status in (401, 403):
        cause = (
            f"was refused (HTTP {status}); log in with `hf auth login`, with a token that may read "
            f"https://huggingface.co/{repo}"
        )
    elif status is not None and status >= 500:
        cause = f"is not served at the moment (HTTP {status}); try again later"
    elif isinstance(error, LocalEntryNotFoundError):
        cause = (
            "is not in the local cache, and the network was not asked; leave out local_files_only"
            if local_files_only
            else "could not be reached and is not in the local cache; check the network, or "
            "HF_HUB_OFFLINE, or pass a local folder"
        )
    elif isinstance(error, EntryNotFoundError):
        cause = (
            "has no config.json or no safetensors weights; no pickle (.bin, .pt) is ever opened, "
            "choose a repository with safetensors"
        )
    elif isinstance(error, OSError) and error.errno == errno.ENOSPC:
        cause = "does not fit on the disk; make space, or pass another cache_dir"
    else:
        reason = str(error).partition("\n")[0]
        cause = f"could not be fetched ({type(error).__name__}: {reason}); try again"
    return HubError(f"{at} {cause}")
