"""Run atheris, with mutators that repeat chunks, as the child process of `tools.checks.fuzz`."""

import gc
import random
import re
import sys
import warnings

MARKER = re.compile(rb"\xff[\xc0-\xfe]")

__all__ = ["main", "mutate"]


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Repeat, cut out, zero or swap chunks, as in bombs and incomplete files."""
    rng = random.Random(seed)
    begin, end = sorted(rng.randrange(len(data) + 1) for _ in "ab")
    markers = [found.start() for found in MARKER.finditer(data)]
    if len(markers) > 1 and rng.random() < 0.5:  # choose complete segments of a JPEG
        first = rng.randrange(len(markers) - 1)
        begin, end = markers[first], markers[rng.randrange(first + 1, len(markers))]
    chunk = data[begin:end]
    kind = rng.randrange(5)
    if kind == 0:
        room = max(1, (max_size - len(data)) // max(1, len(chunk)))
        chunk = chunk * min(room, rng.choice((2, 3, 10, 100, 10_000)))
    elif kind == 1:
        chunk = b""
    elif kind == 2:
        chunk = bytes(len(chunk))
    elif kind == 3 and len(chunk) >= 4:  # overwrite sizes and counts
        value = rng.choice((0, 1, 0x7FFF, 0xFFFF, 2**31 - 1, 2**32 - 1))
        chunk = value.to_bytes(4, rng.choice(("big", "little"))) + chunk[4:]
    else:
        chunk = chunk[::-1]
    return (data[:begin] + chunk + data[end:])[:max_size]


def main() -> None:
    """Fuzz the target in the first argument. The other arguments are libFuzzer's arguments."""
    import atheris

    target = sys.argv.pop(1)
    with atheris.instrument_imports(include=["qwen_vit"]):
        from tools.checks.fuzz_targets import run_target
    warnings.simplefilter("ignore")
    gc.freeze()  # garbage collections must not search the imported modules' objects

    def mutator(data: bytes, max_size: int, seed: int) -> bytes:
        if seed % 3:
            return bytes(atheris.Mutate(data, max_size))
        return mutate(data, max_size, seed)

    atheris.Setup(sys.argv, lambda data: run_target(target, data), custom_mutator=mutator)
    atheris.Fuzz()
