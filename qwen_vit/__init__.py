"""Images to the embeddings that Qwen2.5-VL's language model sees, and nothing else."""

from qwen_vit.downstream import as_hf_tower, expand_placeholders
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
from qwen_vit.export import export_features
from qwen_vit.export_plan import ExportOptions
from qwen_vit.feature_files import load_features
from qwen_vit.features import ImageFeatures, write_features
from qwen_vit.image import ImageLimits
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
