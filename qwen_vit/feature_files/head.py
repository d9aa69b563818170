"""Open a feature file, and read the metadata from its header."""

from typing import Any

from safetensors import safe_open

from qwen_vit.common.safetensors_header import read_header
from qwen_vit.common.store_path import AnyPath, StorePath
from qwen_vit.errors import CheckpointError, ExportError, UnreadableError
from qwen_vit.feature_files.ranges import RangedTensors
from qwen_vit.feature_files.schema import (
    EMBEDS,
    INTEGERS,
    METADATA_KEY,
    parse_metadata,
)

__all__ = ["WRITE_AGAIN", "cannot_read", "open_tensors"]

WRITE_AGAIN = "write it again with `qwen-vit encode`"
PASS_OR_WRITE = (
    "pass another file. If this file is truncated, write it again with `qwen-vit encode`"
)
OTHER_FILE = (
    "pass a file of `qwen-vit encode`. For a checkpoint, pass its folder as the model. For a "
    "golden file, use `qwen-vit compare --golden`"
)


def cannot_read(path: AnyPath, error: OSError) -> UnreadableError:
    if isinstance(path, StorePath):
        return UnreadableError(f"cannot be read ({error.strerror})", name=str(path))
    return UnreadableError(
        f"cannot be read ({error.strerror})",
        name=str(path),
        remedy="check its permissions and disk",
    )


def open_tensors(path: AnyPath, remedy: str) -> tuple[dict[str, Any], Any]:
    """Return a file's checked metadata, and an object that reads its tensors."""
    try:
        remote = RangedTensors(path) if isinstance(path, StorePath) else None
        tensors = read_header(path) if remote is None else remote.tensors
    except OSError as error:
        raise cannot_read(path, error) from None
    except CheckpointError as error:
        if isinstance(error.__cause__, OSError):
            raise cannot_read(path, error.__cause__) from None
        raise ExportError(
            f"truncated, or not a safetensors file ({path.stat().st_size} bytes)",
            name=str(path),
            expected="a feature file",
            remedy=PASS_OR_WRITE if remedy == WRITE_AGAIN else remedy,
        ) from None
    missing = {EMBEDS, *INTEGERS} - set(tensors)
    file = safe_open(path, framework="pt", device="cpu") if remote is None else remote
    text = (file.metadata() or {}).get(METADATA_KEY)
    if missing or text is None:
        # without any of its parts, the file was never a feature file; a shard has its own remedy
        is_other = len(missing) == 1 + len(INTEGERS) and text is None and remedy == WRITE_AGAIN
        raise (UnreadableError if is_other else ExportError)(
            "a safetensors file, but not a feature file",
            name=str(path),
            expected="image_embeds, image_grid_thw, image_token_offsets and their metadata",
            remedy=OTHER_FILE if is_other else remedy,
        )
    return parse_metadata(text, tensors, path, remedy), file
