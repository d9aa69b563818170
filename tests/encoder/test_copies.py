"""Test copies and pickles of an encoder, and encoders in other processes."""

import copy
import multiprocessing
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import joblib  # type: ignore[import-untyped]
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from qwen_vit import VisionEncoder, as_hf_tower
from tests.support import ROOT

IMAGES = tuple(
    np.random.default_rng(seed).integers(0, 256, (56, 84, 3), dtype=np.uint8) for seed in range(4)
)
GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]


@cache
def encoder(device: str = "cpu") -> VisionEncoder:
    return VisionEncoder.from_pretrained("tiny", device=device)


def embeds_of(some: VisionEncoder) -> list[Tensor]:
    """Encode each image alone, because bits may depend on the batch on a CPU."""
    return [some.encode([image])[0].embeds.cpu() for image in IMAGES]


@cache
def expected(device: str = "cpu") -> list[Tensor]:
    return embeds_of(encoder(device))


def assert_same_bits(ours: list[Tensor], device: str = "cpu") -> None:
    for one, other in zip(ours, expected(device), strict=True):
        assert torch.equal(one, other)


def through_pickle(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


COPIES: dict[str, Callable[[Any], Any]] = {"deepcopy": copy.deepcopy, "pickle": through_pickle}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_an_encoder_gives_the_same_bits(how: str, device: str) -> None:
    expected(device)  # a used encoder has open files and captured graphs
    twin = COPIES[how](encoder(device))
    assert_same_bits(embeds_of(twin), device)
    assert twin.metadata() == encoder(device).metadata()
    pairs = zip(twin.tower.parameters(), encoder(device).tower.parameters(), strict=True)
    assert all(ours.data_ptr() != theirs.data_ptr() for ours, theirs in pairs)  # separate weights
    if device == "cuda":
        assert twin.graphs is not None
        assert twin.graphs is not encoder(device).graphs


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("how", COPIES)
def test_a_model_that_holds_the_tower_is_copied_with_it(how: str, device: str) -> None:
    model = nn.ModuleDict({"visual": as_hf_tower(encoder(device)), "head": nn.Linear(2, 2)})
    twin = COPIES[how](model)
    assert twin["visual"].encoder is not encoder(device)
    assert_same_bits(embeds_of(twin["visual"].encoder), device)
    rows, grid = torch.zeros(24, 1176), torch.tensor([[1, 4, 6]])
    ours, theirs = (each["visual"](rows, grid_thw=grid).pooler_output for each in (twin, model))
    assert torch.equal(ours, theirs)


def test_the_averaged_copy_of_a_model_keeps_its_tower() -> None:
    """torch copies a model by deepcopy for exponential moving averages."""
    model = nn.Sequential(as_hf_tower(encoder()))
    averaged: Any = torch.optim.swa_utils.AveragedModel(model)
    assert_same_bits(embeds_of(averaged.module[0].encoder))


class Encoded(Dataset[Tensor]):
    """Encode images in the workers of a data loader."""

    def __init__(self, some: VisionEncoder) -> None:
        self.encoder = some

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: int) -> Tensor:
        return self.encoder.encode([IMAGES[index]])[0].embeds.cpu()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "device"),
    [
        ("fork", "cpu"),
        ("spawn", "cpu"),
        ("forkserver", "cpu"),
        # a fork of a process that has used CUDA cannot use CUDA
        pytest.param("spawn", "cuda", marks=GPU),
        pytest.param("forkserver", "cuda", marks=GPU),
    ],
)
def test_workers_of_a_data_loader_encode(method: str, device: str) -> None:
    expected(device)
    loader: DataLoader[Tensor] = DataLoader(
        Encoded(encoder(device)), batch_size=None, num_workers=2, multiprocessing_context=method
    )
    assert_same_bits([embeds.clone() for embeds in loader], device)


def encode_one(some: VisionEncoder, index: int) -> Tensor:
    return some.encode([IMAGES[index]])[0].embeds


@pytest.mark.slow
def test_joblib_sends_an_encoder_to_its_workers() -> None:
    jobs = (joblib.delayed(encode_one)(encoder(), index) for index in range(len(IMAGES)))
    assert_same_bits(joblib.Parallel(n_jobs=2)(jobs))


def test_a_fork_while_another_thread_encodes_does_not_hang() -> None:
    """A lock that a thread holds at the fork would never be free in the child. OpenMP's threads do
    not survive a fork either. torch therefore hangs in the child unless the child sets one thread,
    as the workers of a DataLoader do.
    """
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            encoder().encode([IMAGES[0]])

    thread = threading.Thread(target=work)
    thread.start()
    try:
        with multiprocessing.get_context("fork").Pool(2, torch.set_num_threads, (1,)) as pool:
            made = pool.starmap_async(encode_one, [(encoder(), i) for i in range(4)])
            assert_same_bits(made.get(timeout=120))
    finally:
        stop.set()
        thread.join()


FORKED = """
import multiprocessing, sys, torch, numpy as np
from qwen_vit import VisionEncoder

torch.set_num_threads(2)
encoder = VisionEncoder.from_pretrained("tiny", device="cpu")
image = np.zeros((56, 84, 3), np.uint8)
rows = torch.zeros(24, 1176), torch.tensor([[1, 4, 6]])
calls = [
    lambda: encoder.encode(image),
    lambda: encoder.encode_iter([image]),
    lambda: encoder.encode_video(image[None].repeat(4, 0), fps=1.0),
    lambda: encoder.encode_patches(*rows),
    lambda: VisionEncoder.from_pretrained("tiny", device="cpu"),
]


def child():
    for call in calls:
        try:
            call()
        except ValueError as error:
            print(error)
    torch.set_num_threads(1)
    print(tuple(encoder.encode(image).embeds.shape), flush=True)


process = multiprocessing.get_context("fork").Process(target=child)
process.start()
process.join(60)
if process.exitcode is None:
    process.kill()
sys.exit(process.exitcode != 0)
"""


def test_a_forked_process_with_several_threads_is_an_error() -> None:
    """torch would wait for ever in the child for OpenMP's threads, which do not survive a fork."""
    done = subprocess.run(
        [sys.executable, "-c", FORKED], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    error = (
        "torch's threads do not work in this process, because it was forked from a process with an "
        "encoder. Call torch.set_num_threads(1) in the new process, or start it with spawn."
    )
    assert done.stdout.splitlines() == [*[error] * 5, "(6, 192)"], done.stderr


def test_only_the_weights_hash_of_a_pickled_encoder_needs_its_files(tmp_path: Path) -> None:
    """The pickle contains the weights. Only their hash needs the checkpoint, which another machine
    may not have."""
    file = tmp_path / "encoder.pickle"
    file.write_bytes(pickle.dumps(encoder()))
    code = f"""
import pickle, numpy as np
encoder = pickle.load(open({str(file)!r}, "rb"))
features = encoder.encode(np.zeros((56, 84, 3), np.uint8))
print(tuple(features.embeds.shape), encoder)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True,
        timeout=240,
    )  # fmt: skip
    assert done.stdout == "(6, 192) VisionEncoder('tiny', float32, on cpu)\n"
