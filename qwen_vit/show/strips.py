"""Cut long pictures into strips, like lines of text, so that every part is visible."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from numpy.typing import NDArray

__all__ = ["Box", "StripLayout"]

MAX_RATIO = 4.0  # maximum aspect ratio of a picture without cuts
TARGET_RATIO = 1.6  # aspect ratio of the strips together
GAP = 0.35  # gap between strips, relative to the short side


class Box(NamedTuple):
    """Define a rectangle, in patches."""

    left: float
    top: float
    width: float
    height: float


@dataclass(frozen=True, slots=True)
class StripLayout:
    """Define the positions of a picture's parts, for a whole picture or for strips.

    >>> StripLayout.of(30, 46, 8).is_cut
    False
    >>> long = StripLayout.of(4, 858, 8)
    >>> len(long.sources), long.sources[1], long.places[1].top
    (12, Box(left=72, top=0, width=72, height=4), 5.4)

    Cuts run between windows. The strips of a tall picture are side by side.

    Attributes:
        sources: each strip's rectangle in the picture, in patches.
        places: each strip's rectangle in the drawing, in patches.
    """

    sources: tuple[Box, ...]
    places: tuple[Box, ...]

    @classmethod
    def of(cls, h: int, w: int, window: int) -> "StripLayout":
        long, short = max(h, w), min(h, w)
        count = 1
        if long > MAX_RATIO * short:
            count = math.ceil(math.sqrt(long / short / TARGET_RATIO))
        length = math.ceil(long / count / window) * window if count > 1 else long
        sources: list[Box] = []
        places: list[Box] = []
        for index, start in enumerate(range(0, long, length)):
            stop = min(start + length, long)
            across, along = index * short * (1 + GAP), stop - start
            if h > w:
                sources.append(Box(0, start, short, along))
                places.append(Box(across, 0, short, along))
            else:
                sources.append(Box(start, 0, along, short))
                places.append(Box(0, across, along, short))
        return cls(tuple(sources), tuple(places))

    @property
    def size(self) -> tuple[float, float]:
        """Return the width and height of the drawing, in patches."""
        return (
            max(place.left + place.width for place in self.places),
            max(place.top + place.height for place in self.places),
        )

    @property
    def is_cut(self) -> bool:
        return len(self.sources) > 1

    def crops(self, array: NDArray[Any]) -> list[tuple[NDArray[Any], Box]]:
        """Return each strip's part of an array (rows, columns, ...) and its place in the drawing.

        The array's sides must be multiples or divisors of the picture's sides.
        """
        last = self.sources[-1]
        per_row = array.shape[0] / (last.top + last.height)
        per_column = array.shape[1] / (last.left + last.width)
        found = []
        for source, place in zip(self.sources, self.places, strict=True):
            rows = slice(round(source.top * per_row), round((source.top + source.height) * per_row))
            columns = slice(
                round(source.left * per_column),
                round((source.left + source.width) * per_column),
            )
            found.append((array[rows, columns], place))
        return found

    def move(self, box: Box) -> Box:
        """Return the place in the drawing of a rectangle that no cut crosses."""
        for source, place in zip(self.sources, self.places, strict=True):
            is_here = (
                source.left <= box.left < source.left + source.width
                and source.top <= box.top < source.top + source.height
            )
            if is_here:
                left, top = box.left - source.left + place.left, box.top - source.top + place.top
                return Box(left, top, box.width, box.height)
        raise IndexError(f"{box} is outside the picture")
