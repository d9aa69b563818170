"""Images to the embeddings that Qwen2.5-VL's language model sees, and nothing else.

The names are imported when they are first used: importing the package takes no time, and a command
that is interrupted while torch is imported can say so.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen_vit.encoder import VisionEncoder
    from qwen_vit.errors import (
        ArgumentError,
        CheckpointError,
        ComparisonError,
        ExportError,
        HubError,
        ImageError,
        QwenVitError,
    )
    from qwen_vit.export.options import ExportOptions
    from qwen_vit.export.run import export_features
    from qwen_vit.feature_files.read import load_features
    from qwen_vit.features import ImageFeatures, write_features
    from qwen_vit.images.load import ImageLimits
    from qwen_vit.integrations.hf import as_hf_tower, expand_placeholders
    from qwen_vit.kernels.attention import fused_rope_varlen_attention

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "CheckpointError",
    "ComparisonError",
    "ExportError",
    "ExportOptions",
    "HubError",
    "ImageError",
    "ImageFeatures",
    "ImageLimits",
    "QwenVitError",
    "VisionEncoder",
    "__version__",
    "as_hf_tower",
    "expand_placeholders",
    "export_features",
    "fused_rope_varlen_attention",
    "load_features",
    "write_features",
]

MODULES = {
    "ExportOptions": "export.options",
    "ImageFeatures": "features",
    "ImageLimits": "images.load",
    "VisionEncoder": "encoder",
    "as_hf_tower": "integrations.hf",
    "expand_placeholders": "integrations.hf",
    "export_features": "export.run",
    "fused_rope_varlen_attention": "kernels.attention",
    "load_features": "feature_files.read",
    "write_features": "features",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{MODULES.get(name, 'errors')}"), name)
    globals()[name] = value  # the next look-up finds it there
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
