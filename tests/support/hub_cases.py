"""Make repositories for a test's Hub, in the layouts of the real Hub."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from qwen_vit.checkpoint import cache as store
from qwen_vit.checkpoint.load import load_checkpoint
from tests.support.checkpoints import write_weights
from tests.support.hub_server import COMMIT, Hub

SETTINGS = "preprocessor_config.json"
INDEX = "model.safetensors.index.json"
OURS = ["config.json", "manifest.json", SETTINGS, "vision.safetensors"]
MOVED = "f" * 40


def serve(hub: Hub, name: str, folder: Path, commit: str = COMMIT) -> None:
    hub.commits[f"{name}@{commit}"] = folder
    hub.branches[f"{name}@main"] = commit


def own_folder(call: dict[str, Any], commit: str = COMMIT) -> Path:
    return store.folder_of(Path(call["cache_dir"]), call["model"], commit)


def hash_of(folder: Path) -> str:
    return load_checkpoint(folder).weights_sha256()


def edit_tensors(folder: Path, **added: torch.Tensor) -> None:
    tensors = load_file(folder / "model.safetensors")
    added = {f"visual.{name.replace('__', '.')}": tensor for name, tensor in added.items()}
    write_weights(folder, tensors | added)
