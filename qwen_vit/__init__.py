"""Turn images into the embeddings that Qwen2.5-VL's language model reads.

>>> from qwen_vit import VisionEncoder
>>> VisionEncoder.from_pretrained("tiny").encode("tests/photographs/rocket.jpg").grid_thw
(1, 30, 46)

The first use of a public name imports its module. Therefore importing the package does not import
torch.
"""

__version__ = "0.1.0"

TYPE_CHECKING = False  # importing it from typing would delay the handler for Ctrl-C by 20 ms
# Type checkers read the first list, and Python reads the second. A test compares them.
if TYPE_CHECKING:
    from qwen_vit.cosine import similarity as similarity
    from qwen_vit.encoder import VisionEncoder as VisionEncoder
    from qwen_vit.errors import ArgumentError as ArgumentError
    from qwen_vit.errors import CheckpointError as CheckpointError
    from qwen_vit.errors import ComparisonError as ComparisonError
    from qwen_vit.errors import ExportError as ExportError
    from qwen_vit.errors import HubError as HubError
    from qwen_vit.errors import ImageError as ImageError
    from qwen_vit.errors import QwenVitError as QwenVitError
    from qwen_vit.errors import UnreadableError as UnreadableError
    from qwen_vit.export.options import ExportOptions as ExportOptions
    from qwen_vit.export.run import export_features as export_features
    from qwen_vit.feature_files.file import FeatureFile as FeatureFile
    from qwen_vit.feature_files.read import FeatureFolder as FeatureFolder
    from qwen_vit.feature_files.read import load_features as load_features
    from qwen_vit.feature_files.write import write_features as write_features
    from qwen_vit.features import FailedImage as FailedImage
    from qwen_vit.features import ImageFeatures as ImageFeatures
    from qwen_vit.features import VideoFeatures as VideoFeatures
    from qwen_vit.images.image import ImageLimits as ImageLimits
    from qwen_vit.integrations.hf import as_hf_tower as as_hf_tower
    from qwen_vit.integrations.hf import expand_placeholders as expand_placeholders
    from qwen_vit.kernels.rope_varlen_attention import (
        fused_rope_varlen_attention as fused_rope_varlen_attention,
    )
    from qwen_vit.loading import ImageInput as ImageInput
    from qwen_vit.show.sheets import show_features as show_features
    from qwen_vit.video.options import Video as Video
    from qwen_vit.video.options import VideoLimits as VideoLimits
    from qwen_vit.video.options import VideoOptions as VideoOptions
else:
    _NAMES = {
        "cosine": ["similarity"],
        "encoder": ["VisionEncoder"],
        "errors": [
            "ArgumentError",
            "CheckpointError",
            "ComparisonError",
            "ExportError",
            "HubError",
            "ImageError",
            "QwenVitError",
            "UnreadableError",
        ],
        "export.options": ["ExportOptions"],
        "export.run": ["export_features"],
        "feature_files.file": ["FeatureFile"],
        "feature_files.read": ["FeatureFolder", "load_features"],
        "feature_files.write": ["write_features"],
        "features": ["FailedImage", "ImageFeatures", "VideoFeatures"],
        "images.image": ["ImageLimits"],
        "integrations.hf": ["as_hf_tower", "expand_placeholders"],
        "kernels.rope_varlen_attention": ["fused_rope_varlen_attention"],
        "loading": ["ImageInput"],
        "show.sheets": ["show_features"],
        "video.options": ["Video", "VideoLimits", "VideoOptions"],
    }
    _MODULES = {name: module for module, names in _NAMES.items() for name in names}
    __all__ = sorted(["__version__", *_MODULES])

    def __getattr__(name):
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = value  # so that Python does not call this function again for this name
        return value

    def __dir__():
        return sorted({*globals(), *__all__})
