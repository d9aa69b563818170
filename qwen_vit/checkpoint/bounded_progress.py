"""Limit the size of files that the Hub's client downloads itself, and stop slow downloads."""

from typing import Any

from qwen_vit.checkpoint.ranges import Pace
from qwen_vit.errors import HubError

__all__ = ["bounded_progress"]


def bounded_progress(name: str, limit: int | None) -> Any:
    """Return a progress bar class that raises HubError if a download is too large or too slow.

    While the client writes a file, it reports the number of bytes only to the progress bar.
    """
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    class Bounded(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            sizes = [size for size in (limit, kwargs.get("total")) if size is not None]
            self._most = min(sizes, default=None)
            self._arrived, self._pace = 0, Pace(name)
            if limit is not None and (kwargs.get("total") or 0) > limit:
                raise _too_large(name, kwargs["total"], limit)
            super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            self._arrived += int(n or 0)
            self._pace.count(int(n or 0))
            if self._most is not None and self._arrived > self._most:
                raise _too_large(name, self._arrived, self._most)
            return super().update(n)

    return Bounded


def _too_large(name: str, n_bytes: int, limit: int) -> HubError:
    return HubError(
        f"has {n_bytes} bytes or more",
        name=name,
        expected=f"at most {limit}",
        remedy="check the mirror (HF_ENDPOINT)",
    )
