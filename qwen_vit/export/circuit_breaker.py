"""Stop an export after many consecutive failures, which usually have one cause."""

from dataclasses import dataclass

from qwen_vit.errors import ExportError, ImageError, Wording, with_options

__all__ = ["CircuitBreaker", "TrippedError"]


class TrippedError(ExportError):
    """Report that too many consecutive images failed."""


@dataclass(slots=True)
class CircuitBreaker:
    """Raise TrippedError after `limit` consecutive failures, which a lost disk or a damaged model
    may cause.

    >>> breaker = CircuitBreaker(2)
    >>> breaker.count_done(ImageError("does not exist", name="a.jpg"))
    >>> breaker.count_done(None)
    >>> breaker.failed
    0

    A limit of 0 never stops the export.
    """

    limit: int
    unread: int = 0  # consecutive failures, counted before the encoder
    failed: int = 0  # consecutive failures of any stage, counted after the encoder

    def count_read(self, error: ImageError | None) -> None:
        self.unread = 0 if error is None else self.unread + 1
        self._check(self.unread, error)

    def count_done(self, error: ImageError | None) -> None:
        self.failed = 0 if error is None else self.failed + 1
        self._check(self.failed, error)

    def _check(self, failures: int, error: ImageError | None) -> None:
        if error is not None and 0 < self.limit <= failures:
            fact = f"stopped after {failures} consecutive failures; last error: "
            raise TrippedError(
                Wording(fact + str(error), shell=fact + error.text(in_shell=True)),
                remedy=with_options(
                    "fix the cause and run the same command again, which tries these images again "
                    "and keeps the shards before them, or allow more failures with {}",
                    "max_failures",
                ),
            )
