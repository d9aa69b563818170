"""Access one repository of the Hugging Face Hub: cached files, remote files and errors.

This module imports huggingface_hub inside functions, because the import reads environment
variables. It uses only names that versions 1 and 2 share.
"""

import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit
from urllib.request import getproxies

from qwen_vit.checkpoint import cache
from qwen_vit.checkpoint.bounded_progress import bounded_progress
from qwen_vit.checkpoint.explain import explain
from qwen_vit.checkpoint.http_ranges import fetch_json, open_http_range
from qwen_vit.checkpoint.ranges import RangeResponse, RangesRefusedError
from qwen_vit.common.strict_json import MAX_JSON_BYTES
from qwen_vit.errors import CheckpointError, HubError, with_options

__all__ = ["NotCachedError", "Repository"]

logger = logging.getLogger("qwen_vit")

PROXIES = {"http", "https", "all"}
COMMIT = re.compile(r"[0-9a-f]{40}")
COMMIT_IN_CACHE = re.compile(r"/snapshots/([0-9a-f]{40})(/|$)")
WEIGHTS = ".safetensors"
LISTING_TIMEOUT_S = 10.0
LINK_ATTEMPTS, LINK_PAUSE_S = 5, 0.02


class NotCachedError(HubError):
    """Report that a file is not in the Hub's cache and that the network is disabled or
    unreachable."""


class Repository:
    """Access a repository at one commit. `resolve` finds the commit of a branch or tag."""

    def __init__(
        self,
        name: str,
        revision: str | None,
        token: str | bool | None,
        cache_dir: str | Path | None,
        local_files_only: bool,
        subfolder: str | None = None,
    ) -> None:
        from huggingface_hub import constants

        # With telemetry, the client first reads a list of any size from the endpoint.
        constants.HF_HUB_DISABLE_TELEMETRY = True
        self.name, self.subfolder = name, subfolder
        self.full_name = f"{name}/{subfolder}" if subfolder else name
        self.label = f"{self.full_name} at {revision}" if revision else self.full_name
        self.commit = revision if revision is not None and COMMIT.fullmatch(revision) else None
        self.local_files_only = local_files_only
        self.fetched_bytes = 0
        self._revision = revision
        self._token = token
        # not every function of the client expands "~" to the home folder
        self._cache_dir = Path(cache_dir).expanduser() if cache_dir else None
        self._counting = threading.Lock()
        self._sizes: dict[str, int] = {}
        self._versions: dict[str, str] = {}  # ETags of the files that were read by ranges
        self._listing: dict[str, Any] | None = None
        self._found_address: bool | None = None

    def is_offline(self) -> bool:
        """Return whether the caller or HF_HUB_OFFLINE disables the network, or the Hub's name does
        not resolve."""
        from huggingface_hub import is_offline_mode

        return self.local_files_only or is_offline_mode() or not self._has_address()

    def cache(self) -> Path:
        from huggingface_hub.constants import HF_HUB_CACHE

        return Path(self._cache_dir or HF_HUB_CACHE)

    def resolve(self, name: str) -> Path | None:
        """Fetch a file and set the commit from its path.

        The other files come from the same commit, even if the branch moves.
        """
        path = self._fetch_if_there(name, self._revision)
        if path is None:
            return None
        found = COMMIT_IN_CACHE.search(str(path))
        if found is None:
            raise HubError(
                "not in any snapshot of the Hub's cache",
                name=str(path),
                remedy=with_options("pass another {}", "cache_dir"),
            )
        self.commit = found[1]
        return path

    def file(self, name: str) -> Path | None:
        """Return the path of a small file, fetched if necessary, or None if no such file exists.

        Raises NotCachedError if neither the cache nor the Hub shows whether the file exists.
        """
        known = self._look_up(name)
        # the cache also records which files a repository lacks
        if known is not None and not isinstance(known, Path) and not self._is_listed(name):
            return None
        return self._fetch_if_there(name, self.commit or self._revision)

    def explain(self, error: Exception) -> HubError:
        return explain(
            error, name=self.name, label=self.label, cache_dir=self.cache(),
            local_files_only=self.local_files_only,
        )  # fmt: skip

    def not_cached(self) -> NotCachedError:
        from huggingface_hub.errors import LocalEntryNotFoundError

        return NotCachedError.of(self.explain(LocalEntryNotFoundError("")))

    def cached(self, name: str) -> Path | None:
        known = self._look_up(name)
        return known if isinstance(known, Path) else None

    def cached_weights(self) -> list[str]:
        if self.commit is None:
            return []
        folder = cache.repository_folder(self.cache(), self.name) / "snapshots" / self.commit
        return [path.name for path in folder.glob(self._inside("*.safetensors*"))]

    def _inside(self, name: str) -> str:
        return f"{self.subfolder}/{name}" if self.subfolder else name

    def _look_up(self, name: str) -> Any:
        """Return a file's path in the cache, or None if the cache does not know the file. If the
        commit lacks the file, return huggingface_hub's sentinel."""
        from huggingface_hub import try_to_load_from_cache

        at = self.commit or self._revision
        inside = self._inside(name)
        known = try_to_load_from_cache(self.name, inside, cache_dir=self._cache_dir, revision=at)
        if not isinstance(known, str):
            return known
        found = COMMIT_IN_CACHE.search(known)
        return Path(known) if found and self.commit in (None, found[1]) else None

    def whole(self, name: str) -> Path:
        """Return the path of a whole file, fetched if necessary, and checked against the Hub's hash
        if the Hub gives one."""
        return self._fetch_sound(name, self.commit, partial(self.check, name, once=False))

    def _fetch_sound(self, name: str, revision: str | None, check: Callable[[Path], None]) -> Path:
        """Return the path of a file that `check` accepts. Fetch a damaged file a second time."""
        for _ in range(2):
            path = self._request_file(name, revision)
            try:
                check(path)
            except CheckpointError as error:
                if self.is_offline():
                    raise
                logger.warning("%s qwen_vit now deletes the file itself.", error)
            else:
                return path
            # delete it at once, so that no later call uses it if the next attempt fails
            path.resolve().unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        raise HubError(
            f"{name} arrived damaged twice (its hash differs from the Hub's hash)",
            name=self.label,
            remedy="check the network and any proxy, and try again",
        )

    def is_sound(self, name: str, path: Path) -> bool:
        try:
            self.check(name, path)
        except CheckpointError as error:
            logger.warning("%s", error)
            return False
        return True

    def check(self, name: str, path: Path, *, once: bool = True) -> None:
        """Hash a cached file and compare the hash with the Hub's checksum, if the Hub gives one.

        huggingface_hub checks only sizes. The function records a good file, and hashes it again
        only after a change or with `once=False`.
        """
        digest = cache.hub_digest(path) or self._remote_digest(name)
        if digest is None or len(digest) not in (40, 64):
            logger.warning("%s: checksum unavailable, not verified", path)
            return
        folder = cache.repository_folder(self.cache(), self.name)
        if once and cache.was_checked(folder, path, digest):
            return
        cache.check_digest(path, digest)
        cache.remember_check(folder, path, digest)

    def names(self) -> list[str] | None:
        """Return the names of the files beside config.json, or None if no list is available."""
        siblings = (self._info() or {}).get("siblings")
        if not isinstance(siblings, list):
            return None
        names = [str(each.get("rfilename")) for each in siblings if isinstance(each, dict)]
        start = self._inside("")
        names = [name.removeprefix(start) for name in names if name.startswith(start)]
        return [name for name in names if "/" not in name]  # folders contain other models or parts

    def licence(self) -> str | None:
        card = (self._info() or {}).get("cardData")
        card = card if isinstance(card, dict) else {}
        licence = card.get("license_name") or card.get("license")
        return licence if isinstance(licence, str) else None

    @contextmanager
    def open_range(self, name: str, start: int, end: int) -> Iterator[RangeResponse]:
        from huggingface_hub import hf_hub_url

        url = hf_hub_url(self.name, self._inside(name), revision=self.commit)
        version = self._versions.get(name)
        with open_http_range(url, start, end, self._token, version) as opened:
            if opened.version is not None:
                self._versions.setdefault(name, opened.version)
            if self._sizes.setdefault(name, opened.file_bytes) != opened.file_bytes:
                raise RangesRefusedError(f"its size changed from {self._sizes[name]} bytes")
            yield replace(opened, chunks=self._count(opened.chunks))

    def _count(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            with self._counting:
                self.fetched_bytes += len(chunk)
            yield chunk

    def _fetch_if_there(self, name: str, revision: str | None) -> Path | None:
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            return self._fetch_sound(name, revision, _check_small)
        except LocalEntryNotFoundError as error:
            raise NotCachedError.of(self.explain(error)) from error
        except EntryNotFoundError:
            self.names()
            if self._listing is None or self._is_listed(name):
                self._forget_absence(name)  # the cache must not record one wrong answer
            if self._is_listed(name):
                raise HubError(
                    f"lists {name} but returned 404", name=self.label, remedy="try again"
                ) from None
            return None

    def _is_listed(self, name: str) -> bool:
        return self._listing is not None and name in (self.names() or ())

    def _forget_absence(self, name: str) -> None:
        folder = cache.repository_folder(self.cache(), self.name) / ".no_exist"
        for path in folder.glob(f"*/{self._inside(name)}"):
            path.unlink(missing_ok=True)

    def _request_file(self, name: str, revision: str | None) -> Path:
        snapshots = cache.repository_folder(self.cache(), self.name) / "snapshots"
        present = {path.resolve() for path in snapshots.glob(f"*/{self._inside(name)}")}
        path, n_bytes = self._download_file(name, revision)
        if path.resolve() not in present:
            self.fetched_bytes += n_bytes
        return path

    def _download_file(self, name: str, revision: str | None) -> tuple[Path, int]:
        """Retry a FileNotFoundError four times, because another process may recreate the cache's
        link."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        attempt = 0
        while True:
            try:
                path = Path(
                    hf_hub_download(
                        self.name,
                        self._inside(name),
                        revision=revision,
                        token=self._token,
                        cache_dir=self._cache_dir,
                        local_files_only=self.is_offline(),
                        tqdm_class=bounded_progress(
                            name, None if name.endswith(WEIGHTS) else MAX_JSON_BYTES
                        ),
                    )
                )
                return path, path.stat().st_size
            except EntryNotFoundError:  # also a FileNotFoundError, but an answer of the server
                raise
            except FileNotFoundError:
                attempt += 1
                if attempt == LINK_ATTEMPTS:
                    raise
                time.sleep(LINK_PAUSE_S * 2**attempt)

    def _has_address(self) -> bool:
        """Return whether the Hub's host name resolves, or a proxy may resolve it.

        Without a network, the client itself would retry for a long time.
        """
        if self._found_address is None:
            from huggingface_hub.constants import ENDPOINT

            try:
                if not PROXIES & getproxies().keys():  # a proxy resolves names itself
                    socket.getaddrinfo(urlsplit(ENDPOINT).hostname, None)
                self._found_address = True
            except OSError as error:
                logger.info("%s does not resolve (%s)", ENDPOINT, error)
                self._found_address = False
        return self._found_address

    def _remote_digest(self, name: str) -> str | None:
        """Ask the Hub for a file's digest, because a cache without links does not contain it.

        Return None if the Hub gives none.
        """
        if self.is_offline():
            return None
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

        url = hf_hub_url(self.name, self._inside(name), revision=self.commit)
        try:
            return get_hf_file_metadata(url, token=self._token).etag
        except (HTTPError, OSError) as error:
            logger.info("%s: checksum unavailable (%s)", url, error)
            return None

    def _info(self) -> dict[str, Any] | None:
        if self._listing is None and not self.is_offline():
            from huggingface_hub.constants import ENDPOINT

            revision = self.commit or self._revision
            at = f"/revision/{quote(revision, safe='')}" if revision else ""
            try:
                found = fetch_json(
                    f"{ENDPOINT}/api/models/{self.name}{at}",
                    self._token,
                    deadline_s=LISTING_TIMEOUT_S,
                )
                self._listing = found if isinstance(found, dict) else {}
            except Exception as error:  # noqa: BLE001 - a mirror may have files and no listing
                logger.info("%s: the Hub gives no list of files (%s)", self.label, error)
        return self._listing


def _check_small(path: Path) -> None:
    """Compare a small file with the digest in its link, if the link has one.

    Do so for each call, because every later call would use a damaged file.
    """
    digest = cache.hub_digest(path)
    if digest is not None:
        cache.check_digest(path, digest)
