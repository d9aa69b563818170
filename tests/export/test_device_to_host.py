"""Test the ring of pinned memory that copies results from the GPU to the host."""

from collections import deque

import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen_vit.export.device_to_host import (
    ALIGNED_BYTES,
    MAX_UNWRITTEN_BYTES,
    RING_BYTES,
    PinnedRing,
)


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 3)), min_size=1, max_size=60))
def test_pieces_of_the_ring_never_overlap(steps: list[tuple[int, int]]) -> None:
    """Each step allocates some bytes, and releases a few of the oldest pieces."""
    memory = torch.zeros(16 * ALIGNED_BYTES, dtype=torch.uint8)
    ring, live = PinnedRing(memory), deque[tuple[int, torch.Tensor]]()
    for number, (size, n_released) in enumerate(steps, 1):
        place = ring.allocate(size * ALIGNED_BYTES // 4)
        if place is not None:
            place.fill_(number)
            live.append((number, place))
        else:
            assert live or size * ALIGNED_BYTES // 4 > len(memory)
        assert all((each == value).all() for value, each in live)
        for _ in range(min(n_released, len(live))):
            live.popleft()
            ring.release()


def test_the_ring_wraps_at_its_end() -> None:
    ring = PinnedRing(torch.zeros(4 * ALIGNED_BYTES, dtype=torch.uint8))
    taken = [ring.allocate(ALIGNED_BYTES) for _ in range(5)]
    assert [place is None for place in taken] == [False] * 4 + [True]
    for _ in range(50):
        ring.release()
        assert ring.allocate(ALIGNED_BYTES - 1) is not None
        assert ring.allocate(1) is None


@given(st.lists(st.integers(1, 2**26 // ALIGNED_BYTES), min_size=20, max_size=60))
def test_the_ring_has_space_for_one_more_image_than_the_writer_queues(sizes: list[int]) -> None:
    """A full ring would pin new memory of every requested size."""
    ring = PinnedRing(torch.empty(RING_BYTES, dtype=torch.uint8))
    waiting = deque[int]()
    for size in (each * ALIGNED_BYTES for each in sizes):
        assert ring.allocate(size) is not None
        while waiting and sum(waiting) + size > MAX_UNWRITTEN_BYTES:  # like `BackgroundWriter`
            waiting.popleft()
            ring.release()
        waiting.append(size)
