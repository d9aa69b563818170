"""Test mutated files. Readers must accept each file, or reject it with its name within a second."""

import json
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwen_vit.checkpoint.load import load_checkpoint
from qwen_vit.common.tensors import check_finite
from qwen_vit.errors import CheckpointError
from tests.support.checkpoints import SMALL, write_checkpoint
from tests.support.hub_fault_injection import tally_of

MAX_SECONDS = 1.0  # for one damaged file
Mutate = Callable[[bytes, random.Random], bytes]
TOKENS = (
    b"null", b"-1", b"0", b"1e999", b"9" * 40, b"[]", b"{}", b'""', b"true", b"NaN",
    b"18446744073709551616", b"9223372036854775807", b'"../a.safetensors"', b'"\\ud800"',
    b"[" * 3000, b'{"a":' * 500, b'"F8_E4M3"', b'"F64"', b"\xff\xfe", b"\0",
)  # fmt: skip


def mutate_bytes(content: bytes, rng: random.Random, *, within: int | None = None) -> bytes:
    """Make one to three edits of any kind, mostly in the first bytes."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        size = min(len(changed), within or len(changed)) if rng.random() < 0.9 else len(changed)
        if size == 0:
            return bytes(changed)
        at, kind = rng.randrange(size), rng.randrange(7)
        length = min(rng.choice((1, 1, 2, 8, 100)), len(changed) - at)
        if kind == 0:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[at] = rng.randrange(256)
        elif kind == 2:
            del changed[at : at + length]
        elif kind == 3:
            changed[at:at] = rng.randbytes(length)
        elif kind == 4:
            changed[at:at] = changed[at : at + length]
        elif kind == 5:
            del changed[at:]
        else:
            changed[at : at + length] = rng.choice(TOKENS)
    return bytes(changed)


def mutate_header(content: bytes, rng: random.Random) -> bytes:
    """Edit a safetensors file. Half of the edits keep the length field correct."""
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    if rng.random() < 0.3:
        return mutate_bytes(content, rng, within=8 + length)
    if rng.random() < 0.5:
        header = mutate_json(header, rng)
    else:
        header = mutate_bytes(header, rng)
    return len(header).to_bytes(8, "little") + header + data


def mutate_json(content: bytes, rng: random.Random) -> bytes:
    """Change, remove, repeat or exchange values of a JSON document."""
    document = json.loads(content)
    entries: list[tuple[Any, Any]] = []

    def collect(value: Any) -> None:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            entries.append((value, key))
            if isinstance(item, dict | list):
                collect(item)

    collect(document)
    for _ in range(rng.randint(1, 3)):
        parent, key = rng.choice(entries)
        other_parent, other = rng.choice(entries)
        try:
            kind = rng.randrange(5)
            if kind == 0:
                odd: Any = (
                    None,
                    -1,
                    0,
                    1,
                    2**63,
                    1e300,
                    "",
                    "a",
                    [],
                    {},
                    True,
                    [1] * 50,
                    "F64",
                    "BF16",
                )
                parent[key] = rng.choice(odd)
            elif kind == 1:
                parent[key], other_parent[other] = other_parent[other], parent[key]
            elif kind == 2:
                del parent[key]
            elif kind == 3 and isinstance(parent, dict):
                parent[f"{key}{rng.choice(('', 'x', ' ', '.', 'Ω'))}"] = parent.pop(key)
            elif isinstance(parent[key], int):
                parent[key] += rng.choice((-1, 1, 8, -(10**6)))
        except (KeyError, IndexError):
            continue
    if rng.random() < 0.1:  # the same key twice
        return (
            json.dumps(document).encode().replace(b"{", b'{"model_type": 1, "model_type": 2, ', 1)
        )
    try:
        return json.dumps(document).encode()
    except ValueError:  # an exchange may have made a reference cycle
        return b"{}"


def mutated_weights(folder: Path, times: int, seed: int = 0) -> dict[str, Any]:
    """Test mutated safetensors files."""
    write_checkpoint(folder, replace(SMALL, depth=1, fullatt_block_indexes=(0,)))
    return _mutated(folder, ["model.safetensors"], mutate_header, times, seed)


def mutated_documents(folder: Path, times: int, seed: int = 0) -> dict[str, Any]:
    """Test mutated indexes and configs."""
    write_checkpoint(folder, replace(SMALL, depth=1, fullatt_block_indexes=(0,)), shards=2)
    names = ["model.safetensors.index.json", "config.json", "preprocessor_config.json"]

    def mutate(content: bytes, rng: random.Random) -> bytes:
        return (mutate_json if rng.random() < 0.5 else mutate_bytes)(content, rng)

    return _mutated(folder, names, mutate, times, seed)


def _mutated(
    folder: Path, names: list[str], mutate: Mutate, times: int, seed: int
) -> dict[str, Any]:
    rng = random.Random(seed)
    originals = {name: (folder / name).read_bytes() for name in names}
    found: Counter[str] = Counter()
    slowest = 0.0
    for i in range(times):
        name = names[i % len(names)]
        content = mutate(originals[name], rng)
        (folder / name).write_bytes(content)
        begin = time.perf_counter()
        try:
            checkpoint = load_checkpoint(folder)
            for published, tensor in checkpoint.tensors.items():
                check_finite(tensor, checkpoint.locate(published))
            found["read"] += 1
        except CheckpointError as error:
            message = str(error)
            assert name in message or str(folder) in message, (i, message)
            assert "\n" not in message, (i, message)
            assert " at 0x" not in message, (i, message)
            found["refused"] += 1
        except Exception as error:
            (folder / f"{name}.culprit").write_bytes(content)
            raise AssertionError(f"mutation {i} of {name}: {type(error).__name__}") from error
        duration = time.perf_counter() - begin
        slowest = max(slowest, duration)
        assert duration < MAX_SECONDS, (i, name, duration)
        (folder / name).write_bytes(originals[name])
    return {"slowest_s": round(slowest, 3), **tally_of(times, found)}
