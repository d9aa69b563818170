"""Provide random (length, rate, size, option) cases for the video samplers, equal on every
machine."""

from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from tests.support import ROOT

__all__ = ["CASES", "GOLDEN", "SamplingCase", "digest", "sampling_cases"]

GOLDEN = Path(ROOT) / "tests" / "golden" / "video_sampling.json"
CASES = 3_000
RATES = (30.0, 25.0, 24.0, 60.0, 30_000 / 1001, 24_000 / 1001, 60_000 / 1001, 1.0, 15.0, 12.5)


@dataclass(frozen=True, slots=True)
class SamplingCase:
    """Hold the number, rate and size of a video's frames, and options under this package's
    names."""

    n_frames: int
    rate: float
    height: int
    width: int
    options: dict[str, Any]


def sampling_cases(count: int = CASES) -> list[SamplingCase]:
    """Return the cases: short, usual and very long videos, every option, all shapes of frames."""
    random = Random(20_251_129)
    return [_case(random) for _ in range(count)]


def _case(random: Random) -> SamplingCase:
    longest = random.choice((10, 100, 1_000, 20_000, 500_000))
    n_frames = random.randint(1, longest)
    rate = random.choice(RATES) if random.random() < 0.6 else random.uniform(0.2, 120.0)
    height, width = (round(2 ** random.uniform(3.2, 12.5)) for _ in range(2))
    if random.random() < 0.5:
        height, width = random.choice(
            ((720, 1280), (1080, 1920), (480, 640), (2160, 3840), (1280, 720), (240, 320))
        )
    options: dict[str, Any] = {}
    if random.random() < 0.3:
        options["n_frames"] = random.randint(2, 900)
    elif random.random() < 0.7:
        options["fps"] = random.choice((0.1, 0.5, 1.0, 2.0, 3.0, 4.0, random.uniform(0.01, 60.0)))
    if random.random() < 0.3:
        max_frames = random.randint(2, 2_000)  # drawn in every case, as for the golden file
        options |= {} if "n_frames" in options else {"max_frames": max_frames}
    duration = n_frames / rate
    if random.random() < 0.3:
        options["start"] = round(random.uniform(0.0, duration), random.choice((0, 1, 6)))
    if random.random() < 0.3:
        begin = options.get("start", 0.0)
        options["end"] = round(random.uniform(begin, duration * 1.2), 3)
    if options.get("start", 0.0) >= options.get("end", float("inf")):
        del options["end"]
    if random.random() < 0.2:
        options["min_pixels"] = random.choice((784, 3_136, 50_176, 200_704))
    if random.random() < 0.3:
        options["max_pixels"] = random.choice((250_000, 401_408, 602_112, 2_000_000))
    return SamplingCase(n_frames, rate, height, width, options)


def digest(indices: list[int]) -> list[int]:
    """Summarise indices by their number, their ends, and a checksum in order."""
    total = 0
    for index in indices:
        total = (total * 1_000_003 + index) % (2**31 - 1)
    return [len(indices), indices[0], indices[-1], total]
