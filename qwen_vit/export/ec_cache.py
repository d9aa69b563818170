"""Write an export's features to vLLM's encoder cache, after each shard."""

import json
import os
from hashlib import sha256
from pathlib import Path

from qwen_vit.errors import ArgumentError, with_options
from qwen_vit.export.plan import ExportPlan
from qwen_vit.export.records import DoneShard
from qwen_vit.feature_files.file import open_shard
from qwen_vit.integrations.vllm.ec_cache import (
    SETTINGS,
    check_ec_folder,
    index_file,
    write_ec_cache,
)

__all__ = ["CacheWriter", "is_ec_cache"]


def is_ec_cache(folder: str) -> bool:
    """Return whether a folder contains the settings of an encoder cache.

    >>> is_ec_cache("tests/photographs")
    False
    """
    return os.path.isfile(os.path.join(folder, SETTINGS))


class CacheWriter:
    """Write the cache entries of each shard, with a list of the shard's entries.

    >>> cache = CacheWriter(plan, "cache")  # doctest: +SKIP
    >>> cache.add(done)  # doctest: +SKIP
    """

    def __init__(self, plan: ExportPlan, folder: str | os.PathLike[str]) -> None:
        if plan.options.output != "merged":
            raise ArgumentError(
                with_options("an encoder cache cannot hold {}", ("output", plan.options.output)),
                expected=with_options("{}, which a language model accepts", ("output", "merged")),
                remedy="export merged rows, or omit the encoder cache",
            )
        check_ec_folder(folder, plan.settings, plan.settings["dtype"])
        self._plan, self._folder = plan, Path(folder)
        text = json.dumps(dict(plan.settings), sort_keys=True)
        self._name = sha256(text.encode()).hexdigest()[:24]

    def add(self, done: DoneShard) -> None:
        """Write a shard's entries, unless earlier runs made the shard and the cache contains the
        shard's list."""
        index = f"{self._name}-{done.shard:08}"
        if done.n_kept == len(done.rows) and index_file(self._folder, index).exists():
            return
        shard = open_shard(self._plan.path(done.shard))
        if len(shard):
            write_ec_cache(shard, self._folder, shard.metadata, index=index)
