"""Copy tensors to a GPU through a fixed amount of pinned memory, while threads read ahead.

A plain copy of a mapped tensor runs at the rate of one thread's page faults, while the GPU waits.
This module copies the tensors as one stream of bytes, cut into pieces. Threads copy the next pieces
into pinned slots while the GPU fetches the previous ones.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["to_device"]

PIECE_BYTES = 4 * 2**20
MAX_THREADS = 4
SLOTS_PER_THREAD = 2  # one is filled while the GPU fetches the other


class _Span(NamedTuple):
    """Hold the source and target of a range of a tensor's bytes.

    `whole` is the tensor in its last span, and None in its other spans.
    """

    source: Any  # uint8 array
    target: Tensor  # uint8, of the same length
    whole: Tensor | None


def to_device(tensors: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Yield the tensors on a device, in order. Copies to a GPU run on its current stream.

    >>> [tensor.item() for tensor in to_device([torch.ones(())], torch.device("cpu"))]
    [1.0]

    Threads read CPU tensors at most 32 MiB ahead of the GPU.
    """
    threads = min(MAX_THREADS, len(os.sched_getaffinity(0)))
    for on_cpu, run in groupby(tensors, lambda tensor: tensor.device.type == "cpu"):
        if on_cpu and device.type == "cuda":
            yield from _through_slots(run, device, threads, PIECE_BYTES)
        else:
            yield from (tensor.to(device) for tensor in run)


def _through_slots(
    tensors: Iterable[Tensor], device: torch.device, threads: int, piece_bytes: int
) -> Iterator[Tensor]:
    n_slots = SLOTS_PER_THREAD * threads
    on_gpu = device.type == "cuda"
    slots = torch.empty(n_slots, piece_bytes, dtype=torch.uint8, device="cpu", pin_memory=on_gpu)
    memory = slots.numpy()
    fetched: list[torch.cuda.Event | None] = [None] * n_slots

    def fill(slot: int, spans: list[_Span]) -> None:
        if (event := fetched[slot]) is not None:
            # otherwise torch also creates a context on the first GPU
            with torch.cuda.device(spans[0].target.device):
                event.synchronize()
        at = 0
        for source, _, _ in spans:
            # NumPy copies with one thread and without the GIL
            np.copyto(memory[slot, at : at + len(source)], source)
            at += len(source)

    def land(slot: int, spans: list[_Span], filled: Future[None]) -> Iterator[Tensor]:
        filled.result()
        at = 0
        for _, target, _ in spans:
            target.copy_(slots[slot, at : at + len(target)], non_blocking=True)
            at += len(target)
        if on_gpu:
            fetched[slot] = torch.cuda.current_stream(device).record_event()
        yield from (span.whole for span in spans if span.whole is not None)

    with ThreadPoolExecutor(threads, "qwen-vit-load") as pool:
        under_way: deque[tuple[int, list[_Span], Future[None]]] = deque()
        for number, spans in enumerate(_pieces(tensors, device, piece_bytes)):
            if len(under_way) == n_slots:
                yield from land(*under_way.popleft())
            slot = number % n_slots
            under_way.append((slot, spans, pool.submit(fill, slot, spans)))
        while under_way:
            yield from land(*under_way.popleft())


def _pieces(
    tensors: Iterable[Tensor], device: torch.device, piece_bytes: int
) -> Iterator[list[_Span]]:
    """Yield the spans of all bytes in order, one slot at a time. A slot contains a part of a large
    tensor, or many small tensors."""
    spans, room = [], piece_bytes
    for tensor in tensors:
        whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        source = _bytes_of(tensor.contiguous()).numpy()
        target = _bytes_of(whole)
        begin, is_last = 0, False
        while not is_last:
            end = min(begin + room, len(source))
            is_last = end == len(source)
            spans.append(_Span(source[begin:end], target[begin:end], whole if is_last else None))
            room -= end - begin
            begin = end
            if room == 0:
                yield spans
                spans, room = [], piece_bytes
    if spans:
        yield spans


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)
