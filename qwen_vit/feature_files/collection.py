"""Access the features of many images as a sequence with subsets, and read rows on demand."""

import operator
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from qwen_vit.common.arguments import typed_repr
from qwen_vit.common.missing_name import missing_name
from qwen_vit.common.store_path import AnyPath
from qwen_vit.errors import one_line, plural
from qwen_vit.feature_files import tables
from qwen_vit.features import ImageFeatures
from qwen_vit.images.image import ImageSource
from qwen_vit.integrations.hf import IMAGE_TOKEN_ID, to_hf
from qwen_vit.integrations.sglang import to_sglang
from qwen_vit.integrations.vllm import to_vllm, to_vllm_chat_part
from qwen_vit.show.sheets import show_features

__all__ = ["FeatureSubset", "Features", "as_id"]


class ListLike(Protocol):
    """Define the part of an array, a tensor, or a column of pandas that a selection needs."""

    def tolist(self) -> Any: ...


ImageKeys: TypeAlias = (
    slice | range | list[int] | list[str] | list[Path] | tuple[int, ...] | ListLike
)
# these methods return items as a list: of NumPy, torch and pandas; of Polars; of Arrow
LIST_METHODS = ("tolist", "to_list", "to_pylist")


def as_id(key: Any) -> Any:
    """Return the text of a path, which is an id, and every other key unchanged.

    >>> as_id(Path("im/a.png")), as_id(3)
    ('im/a.png', 3)
    """
    return os.fsdecode(key) if isinstance(key, os.PathLike) else key


class Features(ABC):
    """Access the features of images in order, and read rows on demand.

    An index is a position or an id, which may also be a `Path`. A slice selects a subset, and so
    does a list of positions or ids. A mask with one truth value per image selects a subset as well.
    Instead of a list, you can pass a tuple, range, array, tensor, or a pandas Index or Series. A
    subset also reads rows on demand. The rows may be views of the mapped file, so clone them before
    you write to them.
    """

    metadata: dict[str, Any]
    path: AnyPath

    @property
    @abstractmethod
    def ids(self) -> Sequence[str]:
        """Return the images' ids, in order."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def locate(self, key: int | str) -> Any:
        """Find an image, without reading rows.

        Args:
            key: the image's position or id.

        Returns:
            A value for `read_at`.

        Raises:
            KeyError: The id has no features.
            IndexError: The position does not exist.
            TypeError: The key is neither a position nor an id.
            ExportError: The image's shard is missing, cannot be read, is damaged or belongs to
                another export.
        """

    @abstractmethod
    def content(self) -> Any:
        """Return a value that changes with the files: their paths, sizes, and times or versions."""

    @abstractmethod
    def read_at(self, place: Any) -> ImageFeatures:
        """Return the features of an image that `locate` found.

        Args:
            place: a value that `locate` returned.

        Returns:
            The image's features, whose rows may be views of the mapped file.

        Raises:
            ExportError: The rows cannot be read, or differ from their digest with `verify`.
        """

    @overload
    def __getitem__(self, key: int | str | os.PathLike[str]) -> ImageFeatures: ...
    @overload
    def __getitem__(self, key: ImageKeys) -> "Features": ...
    def __getitem__(
        self, key: int | str | os.PathLike[str] | ImageKeys
    ) -> "ImageFeatures | Features":
        key = as_id(key)
        if isinstance(key, slice):
            return FeatureSubset(self, range(*key.indices(len(self))))
        methods = (getattr(key, name, None) for name in LIST_METHODS)
        to_list = next(filter(callable, methods), None)
        one_or_many: Any = key if to_list is None else to_list()
        if isinstance(one_or_many, (list, tuple, range)):
            return FeatureSubset(self, self._keys(one_or_many))
        return self.read_at(self.locate(one_or_many))

    def __iter__(self) -> Iterator[ImageFeatures]:
        return (self[index] for index in range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("float32 on the host needs a copy: omit copy=False")  # as NumPy does
        return self.to_numpy().astype(dtype or np.float32, copy=False)

    def __contains__(self, name: object) -> bool:
        try:
            name = as_id(name)
            return isinstance(name, str) and self.locate(name) is not None
        except KeyError:
            return False

    def to_hf(
        self,
        input_ids: Tensor | None = None,
        *,
        image_token_id: int = IMAGE_TOKEN_ID,
        mm_token_type_ids: bool = True,
    ) -> dict[str, Any]:
        """Return arguments for transformers' `generate` and `forward`, like `downstream.to_hf`.

        >>> load_features("dog.safetensors").to_hf()  # doctest: +SKIP
        {'mm_encoder_outputs': {'image': ...}, 'image_grid_thw': tensor([[ 1, 22, 32]])}

        Args:
            input_ids: the prompts' tokens (batch, sequence), which the method checks.
            image_token_id: the token id of `<|image_pad|>`.
            mm_token_type_ids: whether to return `mm_token_type_ids`. Pass False for Qwen2.5-Omni,
                which rejects this argument.

        Returns:
            The keyword arguments, as from `downstream.to_hf`.

        Raises:
            ArgumentError: As in `downstream.to_hf`.
            ExportError: As in `downstream.to_hf`.
        """
        return to_hf(
            self,
            input_ids,
            image_token_id=image_token_id,
            mm_token_type_ids=mm_token_type_ids,
        )

    def to_vllm(self) -> dict[str, Any]:
        """Return vLLM's `multi_modal_data`, like `downstream.to_vllm`."""
        return to_vllm(self)

    def to_vllm_chat_part(self) -> list[dict[str, Any]]:
        """Return one part of a chat message per image or video, for a vLLM server.

        See `downstream.to_vllm_chat_part`.
        """
        return to_vllm_chat_part(self)

    def to_sglang(self) -> list[dict[str, Any]]:
        """Return SGLang's `image_data`, like `downstream.to_sglang`."""
        return to_sglang(self)

    def show(
        self,
        pictures: Mapping[str, ImageSource] | None = None,
        *,
        point: tuple[float, float] | None = None,
        layer: int | None = None,
    ) -> list[Image.Image]:
        """Draw every image of a small file, or of a subset such as `features[:8]`.

        >>> load_features("photographs.safetensors")[:2].show(point=(120, 100))  # doctest: +SKIP
        [<PIL.PngImagePlugin.PngImageFile ...>, <PIL.PngImagePlugin.PngImageFile ...>]

        Args:
            pictures: the images by id, if the ids are not the images' paths.
            point: (x, y) in pixels of the first image. The method compares the cell at this point
                with every cell.
            layer: a block of `layers` to draw instead of the embeddings.

        Returns:
            One picture per image, in order.

        Raises:
            ArgumentError: As in `show_features`.
            ImageError: As in `show_features`.
        """
        return show_features(self, pictures, point=point, layer=layer)

    def to_numpy(self) -> NDArray[np.float32]:
        """Return all rows (T, D) as float32, image by image, in the order of `ids`.

        `np.asarray` of the features returns the same array.

        >>> load_features("means").to_numpy().shape  # doctest: +SKIP
        (999998, 3584)

        Returns:
            An array (T, D). For output="mean", T is the number of images. Otherwise the rows of an
            image follow the rows of all earlier images.

        Raises:
            ExportError: There is no image.
        """
        return tables.to_numpy(self)

    def to_pandas(self) -> Any:
        """Return a DataFrame with a row per image, in order, and the ids as the index.

        >>> load_features("means").to_pandas().loc["cat.jpg", "embeds"].shape  # doctest: +SKIP
        (3584,)

        The whole table is in memory. Failed images have no row: `errors` of the file or folder
        lists them.

        Returns:
            A DataFrame with the columns grid_t, grid_h, grid_w (patches), height, width (pixels),
            notes and embeds, and a column layer_K for each stored block K. Unknown sizes are
            missing values. embeds contains float32 arrays: (D,) for output="mean", else (n, D).
            layer_K contains float32 arrays (n_patches, C).

        Raises:
            ArgumentError: pandas cannot be imported.
        """
        return tables.to_pandas(self)

    def to_parquet(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the table of `to_pandas` as Parquet, completely or not at all, in constant memory.

        >>> load_features("means").to_parquet("means.parquet")  # doctest: +SKIP
        PosixPath('means.parquet')

        Arrays become lists, or lists of lists. If an id is not Unicode, the method escapes its
        invalid bytes, and the column id_bytes contains the original id.

        Args:
            path: the Parquet file.
            overwrite: whether to replace an existing file. The method never replaces a file that
                contains these features, or a file of an export.

        Returns:
            The path of the file.

        Raises:
            ArgumentError: pyarrow cannot be imported, or `path` is an address, a folder's name or
                not a path.
            ExportError: There is no image, or `path` exists without `overwrite=True`, has the
                suffix of another format, is not UTF-8 or cannot be written. `path` is a symbolic
                link or a file of an export, or contains these features.
        """
        return tables.write_parquet(self, path, overwrite=overwrite)

    def to_datasets(self, *, cache_dir: str | os.PathLike[str] | None = None) -> Any:
        """Return the table of `to_parquet` as a `datasets.Dataset`, in constant memory.

        >>> load_features("means").to_datasets().with_format("numpy")[0]["embeds"].shape
        ... # doctest: +SKIP
        (3584,)

        datasets writes the table of the same files to its cache only once, and maps it into memory.

        Args:
            cache_dir: the cache folder of datasets. None selects its default folder.

        Returns:
            A `datasets.Dataset` with a row per image, in order.

        Raises:
            ArgumentError: datasets cannot be imported.
            ExportError: There is no image.
        """
        return tables.to_datasets(self, cache_dir=cache_dir)

    def _keys(self, keys: Sequence[int] | Sequence[str]) -> Sequence[int | str]:
        if keys and all(isinstance(key, bool) for key in keys):
            if len(keys) != len(self):
                raise IndexError(
                    f"{self}: the mask has {plural(len(keys), 'value')}. Expected {len(self)}, one "
                    "for each image."
                )
            return [index for index, is_chosen in enumerate(keys) if is_chosen]
        names = list(map(as_id, keys))
        for name in names:
            self.locate(name)
        return names

    def position(self, key: int | str) -> int:
        """Return a position counted from the front.

        Args:
            key: a position. A negative position counts from the end.

        Returns:
            A position from 0 to the number of images less 1.

        Raises:
            TypeError: The key is not a position.
            IndexError: The position does not exist.
        """
        count = len(self)
        try:
            if isinstance(key, bool):
                raise TypeError
            index = operator.index(key)  # type: ignore[arg-type]
        except TypeError:
            raise TypeError(
                one_line(
                    f"{typed_repr(key)} does not select images of {self}. Expected a position or "
                    "an id, a slice, or a list or array of positions or ids."
                )
            ) from None
        if not -count <= index < count:
            raise IndexError(
                f"image {index} is not in {self}, which contains {plural(count, 'image')}"
            )
        return index % count


class FeatureSubset(Features):
    """Access some images of another collection, in a given order."""

    def __init__(self, source: Features, keys: Sequence[int | str]) -> None:
        self.source = source
        self.keys = keys
        self.metadata, self.path = source.metadata, source.path

    def __str__(self) -> str:
        return f"a subset of {self.source}"

    def __repr__(self) -> str:
        return f"<{plural(len(self), 'image')} of {self.source!r}>"

    @cached_property
    def ids(self) -> Sequence[str]:
        return [key if isinstance(key, str) else self.source.ids[key] for key in self.keys]

    def __len__(self) -> int:
        return len(self.keys)

    def __contains__(self, name: object) -> bool:
        name = as_id(name)
        return name in self.ids and name in self.source

    def locate(self, key: int | str) -> Any:
        if not isinstance(key, str):
            return self.source.locate(self.keys[self.position(key)])
        if key not in self.ids:
            raise KeyError(missing_name(key, self, self.ids))
        return self.source.locate(key)

    def content(self) -> Any:
        return self.source.content(), list(self.keys)

    def read_at(self, place: Any) -> ImageFeatures:
        return self.source.read_at(place)
