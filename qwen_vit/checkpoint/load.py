"""Open a checkpoint: read its configs, and check the names, shapes and types of its tensors."""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen_vit.checkpoint.published_tensors import (
    GivenTensors,
    LazyTensors,
    PublishedTensors,
)
from qwen_vit.checkpoint.tower_names import check_tower, find_prefix, plain_name, tensor_info
from qwen_vit.checkpoint.weight_files import RemoteFiles, StoredTensor, find_tensors
from qwen_vit.common.arguments import short_repr, typed_repr
from qwen_vit.common.strict_json import read_json
from qwen_vit.config import ImageConfig, VisionConfig, check_consistent
from qwen_vit.errors import ArgumentError, CheckpointError, with_options

__all__ = ["Checkpoint", "Tower", "config_hash", "find_tower", "load_checkpoint"]


logger = logging.getLogger("qwen_vit")


@dataclass(frozen=True, slots=True)
class Tower:
    """Describe a vision tower in files: its configs, and the stored parts of each published
    tensor."""

    config: VisionConfig
    image_config: ImageConfig
    settings: tuple[Path, ...]
    sources: Mapping[str, tuple[StoredTensor, ...]]
    prefix: str

    def stored(self) -> list[StoredTensor]:
        """Return every stored tensor: 390 at depth 32, or 518 with q, k and v stored separately."""
        return [tensor for parts in self.sources.values() for tensor in parts]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Provide a tower's weights and configs, from `load_checkpoint` or `from_tensors`.

    `tensors` maps the published names without prefix, such as "blocks.0.attn.qkv.weight", to
    tensors as stored. For a checkpoint in files, each look-up reads a file. `convert` rejects NaN
    and infinity. `prefix` is the text before the names of the vision tensors. `dtypes` are the
    stored types, such as "BF16".

    A checkpoint can be copied and pickled. If it is in files, a copy shares the open files, and an
    unpickled checkpoint opens the same paths.
    """

    config: VisionConfig
    image_config: ImageConfig
    tensors: PublishedTensors[Any]
    files: tuple[Path, ...]
    prefix: str
    dtypes: tuple[str, ...]

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        config: VisionConfig | Mapping[str, Any],
        image_config: ImageConfig | Mapping[str, Any] | None = None,
    ) -> "Checkpoint":
        """Return a checkpoint of loaded tensors on any device, after checking names and shapes.

        >>> from qwen_vit.checkpoint.published import packaged_weights
        >>> loaded = load_checkpoint(packaged_weights() / "tiny")
        >>> given = {f"visual.{name}": tensor for name, tensor in loaded.tensors.items()}
        >>> checkpoint = Checkpoint.from_tensors(given, loaded.config)
        >>> checkpoint.weights_sha256() == loaded.weights_sha256()
        True

        Args:
            tensors: maps published names, with any prefix or none, to tensors. The mapping may also
                contain tensors of a language model. The checkpoint does not copy the tensors, so do
                not change them afterwards.
            config: the tower's config, or the content of config.json.
            image_config: the image settings, or the content of preprocessor_config.json. None
                selects transformers' defaults.
        """
        if not isinstance(config, VisionConfig):
            config = VisionConfig.from_json(_check_mapping(config, "config"), source="config")
        if not isinstance(image_config, ImageConfig):
            settings = {} if image_config is None else _check_mapping(image_config, "image_config")
            image_config = ImageConfig.from_json(settings, source="image_config")
        check_consistent(config, image_config, source="image_config")
        _check_mapping(tensors, "tensors")
        prefix = find_prefix({plain_name(name) for name in tensors}, "tensors")
        given = {
            plain_name(name).removeprefix(prefix): _check_given(tensors[name], name)
            for name in tensors
            if plain_name(name).startswith(prefix)
        }
        infos = {name: tensor_info(tensor) for name, tensor in given.items()}
        parts_of = check_tower(infos, config, source="tensors", locate=lambda name: prefix + name)
        return cls(
            config=config,
            image_config=image_config,
            tensors=GivenTensors(
                {name: tuple(given[part] for part in parts) for name, parts in parts_of.items()}
            ),
            files=(),
            prefix=prefix,
            dtypes=tuple(sorted({info.dtype for info in infos.values()})),
        )

    def on_host(self) -> "Checkpoint":
        return replace(self, tensors=self.tensors.on_host())

    def weights_sha256(self) -> str:
        return self.tensors.sha256()

    def locate(self, name: str) -> str:
        return self.tensors.locate(name)


def load_checkpoint(folder: str | Path) -> Checkpoint:
    """Open a local checkpoint: config.json, the image settings and safetensors weights.

    >>> load_checkpoint("no/such/folder")
    Traceback (most recent call last):
    qwen_vit.errors.CheckpointError: no/such/folder: not a folder. Expected a folder with \
config.json and safetensors weights.

    The function checks the headers immediately: names, shapes and types. Conversion checks the
    values.
    """
    tower = find_tower(Path(folder))
    stored = tower.stored()
    return Checkpoint(
        config=tower.config,
        image_config=tower.image_config,
        tensors=LazyTensors(tower.sources),
        files=(*tower.settings, *sorted({tensor.path for tensor in stored})),
        prefix=tower.prefix,
        dtypes=tuple(sorted({tensor.info.dtype for tensor in stored})),
    )


def find_tower(folder: Path, remote: RemoteFiles | None = None) -> Tower:
    """Find the vision tower in a folder, and check its config, names, shapes and types.

    `remote` lists weight files on the Hub. The function reads only their headers.
    """
    prefix = ""

    def tower_names(names: set[str]) -> set[str]:
        nonlocal prefix
        prefix = find_prefix({plain_name(name) for name in names}, str(folder))
        return {name for name in names if plain_name(name).startswith(prefix)}

    stored = find_tensors(folder, tower_names, remote)
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise CheckpointError(
            "does not exist",
            name=str(config_path),
            expected="the config of the weights",
            remedy="copy the file from the same checkpoint",
        )
    config = VisionConfig.from_json(config_path)
    image_config, image_path = _read_image_config(folder)
    check_consistent(config, image_config, source=str(image_path or f"{folder} (default settings)"))
    bare = {plain_name(name).removeprefix(prefix): tensor for name, tensor in stored.items()}
    files = ", ".join(sorted({tensor.path.name for tensor in stored.values()}))
    parts_of = check_tower(
        {name: tensor.info for name, tensor in bare.items()},
        config,
        source=f"{folder} ({files})",
        locate=lambda name: f"{bare[name].path}: {bare[name].name}",
    )
    sources = {name: tuple(bare[part] for part in parts) for name, parts in parts_of.items()}
    settings = (config_path,) if image_path is None else (config_path, image_path)
    return Tower(config, image_config, settings, sources, prefix)


def config_hash(config: VisionConfig, image_config: ImageConfig) -> str:
    """Return a sha256 of both configs' values. The hash does not depend on the files'
    key names and formatting."""
    both = {"vision": config.to_json(), "image": image_config.to_json()}
    return hashlib.sha256(json.dumps(both, sort_keys=True).encode()).hexdigest()


def _check_mapping(value: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ArgumentError(
            f"{name} is {short_repr(value)}", expected="a mapping whose keys are strings"
        )
    return value


def _check_given(tensor: object, name: str) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise ArgumentError(f"tensors[{name!r}] is {typed_repr(tensor)}", expected="a torch tensor")
    if tensor.is_meta or tensor.layout != torch.strided:
        what = "on the meta device" if tensor.is_meta else f"of the layout {tensor.layout}"
        raise ArgumentError(
            f"a tensor {what}",
            name=f"tensors[{name!r}]",
            expected="a tensor with values in memory",
            remedy="load the weights first",
        )
    return tensor.detach()


def _read_image_config(folder: Path) -> tuple[ImageConfig, Path | None]:
    # As in transformers, the image settings of a whole processor take precedence.
    processor, preprocessor = folder / "processor_config.json", folder / "preprocessor_config.json"
    if processor.exists():
        settings = read_json(processor)
        if "image_processor" in settings:
            return ImageConfig.from_json(settings, source=str(processor)), processor
    if preprocessor.exists():
        return ImageConfig.from_json(preprocessor), preprocessor
    assumed = ImageConfig.from_json({})
    logger.warning(
        "%s: no preprocessor_config.json. Assuming transformers' defaults: images of %d to %d "
        "pixels. Copy the file from the base model, or pass %s.",
        folder, assumed.min_pixels, assumed.max_pixels,
        with_options("{} and {}", "min_pixels", "max_pixels"),
    )  # fmt: skip
    return assumed, None
