"""Feature files, read lazily; nothing in them is trusted, and every damage is named."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qwen_vit.errors import CheckpointError, ExportError
from qwen_vit.features import METADATA_KEY, SCHEMA_VERSION, ImageFeatures
from qwen_vit.safetensors_header import read_header
from qwen_vit.strict_json import parse_json, show

__all__ = ["FeatureFile", "load_features"]

INTEGERS = ("image_grid_thw", "image_token_offsets")


class FeatureFile:
    """A feature file, opened lazily: an image's rows are read when it is asked for.

    >>> features = load_features("features.safetensors")  # doctest: +SKIP
    >>> features["cats/one.jpg"].embeds.shape, features[0].grid_thw  # doctest: +SKIP
    (torch.Size([256, 3584]), (1, 32, 32))

    Indexed by position or by id; iterates over ImageFeatures.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata = _read_metadata(path)
        self.ids: list[str] = self.metadata["ids"]
        self._file = safe_open(path, framework="pt", device="cpu")
        self.image_grid_thw: Tensor = self._file.get_tensor("image_grid_thw")
        self._offsets: list[int] = self._file.get_tensor("image_token_offsets").tolist()
        self._index = {name: index for index, name in enumerate(self.ids)}
        self._check()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, key: int | str) -> ImageFeatures:
        index = self._position(key)
        rows = slice(self._offsets[index], self._offsets[index + 1])
        t, h, w = self.image_grid_thw[index].tolist()
        embeds = self._file.get_slice("image_embeds")[rows]
        return ImageFeatures(self.ids[index], embeds, (t, h, w))

    def __iter__(self) -> Iterator[ImageFeatures]:
        return (self[index] for index in range(len(self)))

    def _position(self, key: int | str) -> int:
        if isinstance(key, str):
            if key not in self._index:
                raise KeyError(f"{key!r} is not in {self.path}, which holds {len(self)} images")
            return self._index[key]
        if not -len(self) <= key < len(self):
            raise IndexError(f"image {key} of {self.path}, which holds {len(self)}")
        return key % len(self)

    def _check(self) -> None:
        rows = self._file.get_slice("image_embeds").get_shape()[0]
        offsets = self._offsets
        rising = all(a <= b for a, b in pairwise(offsets))
        if offsets[0] != 0 or offsets[-1] != rows or not rising:
            raise ExportError(
                f"{self.path} disagrees with itself (offsets from {offsets[0]} to {offsets[-1]} "
                f"over {rows} rows); write it again"
            )


def load_features(path: str | Path) -> FeatureFile:
    """Open a feature file that `qwen-vit encode` or `write_features` wrote.

    >>> load_features("no-such-file.safetensors")
    Traceback (most recent call last):
    qwen_vit.errors.ExportError: no-such-file.safetensors is not a file, expected a feature file \
written by `qwen-vit encode`

    Raises ExportError, naming the file, for one that is missing, torn or of another schema.
    """
    path = Path(path)
    if not path.is_file():
        raise ExportError(
            f"{path} is not a file, expected a feature file written by `qwen-vit encode`"
        )
    try:
        return FeatureFile(path)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{path} could not be read ({error}); write it again") from None


def _read_metadata(path: Path) -> dict[str, Any]:
    try:
        tensors = read_header(path)
    except CheckpointError:
        raise ExportError(
            f"{path} ({path.stat().st_size} bytes) is torn, or no safetensors file, expected a "
            "feature file; write it again with `qwen-vit encode`"
        ) from None
    missing = {"image_embeds", *INTEGERS} - set(tensors)
    with safe_open(path, framework="pt", device="cpu") as file:
        text = (file.metadata() or {}).get(METADATA_KEY)
    if missing or text is None:
        raise ExportError(
            f"{path} is a safetensors file but no feature file: expected image_embeds, "
            "image_grid_thw, image_token_offsets and the metadata of `qwen-vit encode`"
        )
    try:
        metadata = parse_json(text.encode(), source=str(path))
    except CheckpointError as error:
        raise ExportError(str(error)) from None
    version, ids = metadata.get("schema_version"), metadata.get("ids")
    if version != SCHEMA_VERSION:
        raise ExportError(
            f"{path} has feature schema {version!r}, expected {SCHEMA_VERSION}; read it with the "
            "version of qwen_vit that wrote it"
        )
    if not isinstance(ids, list) or not all(isinstance(name, str) for name in ids):
        raise ExportError(f"{path}: its ids are {show(ids)}, expected names; write it again")
    found = {name: (tensors[name].dtype, tensors[name].shape) for name in INTEGERS}
    expected = {"image_grid_thw": (len(ids), 3), "image_token_offsets": (len(ids) + 1,)}
    if len(set(ids)) < len(ids) or len(tensors["image_embeds"].shape) != 2:
        problem = f"{len(ids)} ids, {len(set(ids))} of them different; image_embeds of shape "
        problem += str(tensors["image_embeds"].shape)
    elif found != {name: ("I64", shape) for name, shape in expected.items()}:
        problem = f"{len(ids)} ids; {found}"
    else:
        return metadata
    raise ExportError(f"{path} disagrees with itself ({problem}); write it again")
