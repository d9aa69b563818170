"""Convert errors of huggingface_hub and the system to HubError, with cause and remedy."""

import errno
import os
from pathlib import Path

from qwen_vit.checkpoint.published import did_you_mean, published_checkpoints
from qwen_vit.errors import HubError, with_options

__all__ = ["explain"]

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
CACHE = ("HF_HUB_CACHE", "HF_HOME", "HF_TOKEN_PATH")
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def explain(
    error: Exception, *, name: str, label: str, cache_dir: Path, local_files_only: bool
) -> HubError:
    """`name` is the repository's name. `label` is the name with the subfolder and the revision."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    address = f"https://huggingface.co/{name}"
    reply = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    status = getattr(reply, "status_code", None)
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, GatedRepoError):
        fact = "the repository is gated"
        remedy = f"accept its licence on {address}, then log in with `hf auth login`"
    elif isinstance(error, RevisionNotFoundError):
        fact = "no such revision"
        remedy = f"look at its branches and commits on {address}"
    elif isinstance(error, RepositoryNotFoundError):
        fact = "not found, or private"
        remedy = "check the name, or log in with `hf auth login`"
    elif status in (401, 403):
        fact = f"the Hub denies access (HTTP {status})"
        remedy = f"log in with `hf auth login`, with a token that may read {address}"
    elif status == 429:
        fact = "too many requests (HTTP 429)"
        remedy = "wait five minutes, or log in with `hf auth login` for a higher limit"
    elif status is not None and status >= 500:
        fact, remedy = f"server error (HTTP {status})", "try again later"
    elif isinstance(error, LocalEntryNotFoundError):
        fact, remedy = _explain_absence(local_files_only)
    elif isinstance(error, EntryNotFoundError):
        fact = "no config.json or no safetensors weights; qwen_vit never opens pickles (.bin, .pt)"
        remedy = "choose a repository with safetensors"
    elif number in NO_SPACE:
        fact = f"does not fit on the disk ({cache_dir})"
        remedy = with_options("free some space, or pass {}", "cache_dir")
    elif number in NOT_WRITABLE:
        fact = f"the cache cannot be written ({error})"
        variable = _set_variable(CACHE)
        remedy = with_options(
            "pass another {}, or {change}",
            "cache_dir",
            change=f"check {variable}" if variable else "set HF_HOME",
        )
    else:
        reason = str(error).partition("\n")[0]
        fact, remedy = f"could not be fetched ({type(error).__name__}: {reason})", "try again"
    kinds = RepositoryNotFoundError | LocalEntryNotFoundError
    is_missing = isinstance(error, kinds) and not isinstance(error, GatedRepoError)
    is_known = name in published_checkpoints()
    if is_missing and status in (None, 401, 404) and not is_known:
        question = did_you_mean(name)
        remedy = f"{question} Otherwise " + remedy if question else remedy
    return HubError(fact, name=label, remedy=remedy)


def _explain_absence(local_files_only: bool) -> tuple[str, str]:
    """Return the fact and the remedy for a file that is not in the cache."""
    from huggingface_hub import is_offline_mode

    if local_files_only:
        ruled_out = "not in the local cache, and {} rules out the network"
        leave_out = with_options("leave out {}", "local_files_only")
        return with_options(ruled_out, "local_files_only"), leave_out
    if is_offline_mode():
        offline = _set_variable(OFFLINE) or OFFLINE[0]
        remedy = f"unset {offline.partition('=')[0]}, or pass a local folder"
        return f"not in the local cache, and {offline} rules out the network", remedy
    checked = " and ".join(filter(None, ["the network", _set_variable(("HF_ENDPOINT",))]))
    remedy = f"check {checked}, or pass a local folder"
    return "not in the local cache, and the Hub could not be reached", remedy


def _set_variable(names: tuple[str, ...]) -> str:
    """Return the first of these environment variables that is set, such as "HF_HOME=/data"."""
    return next((f"{name}={os.environ[name]}" for name in names if os.environ.get(name)), "")
