"""Define `VisionEncoder`, which turns images into the language model's embeddings."""

from __future__ import annotations  # help() then prints the names of type aliases

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, Unpack, overload

import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen_vit.batching import TOKEN_BUDGET, BatchEncoder
from qwen_vit.checkpoint.hub import Origin, find_checkpoint
from qwen_vit.checkpoint.load import Checkpoint, load_checkpoint
from qwen_vit.common.prefetch import core_count, thread_count
from qwen_vit.config import ImageConfig, VisionConfig
from qwen_vit.device import check_process
from qwen_vit.errors import ArgumentError
from qwen_vit.features import FailedImage, FeatureOutput, ImageFeatures
from qwen_vit.images.image import ArrayLayout, ExifPolicy, ImageLimits, check_formats
from qwen_vit.images.pages import Pages
from qwen_vit.images.picture import resizes_on
from qwen_vit.loaded_tower import LoadedTower
from qwen_vit.loading import (
    EncodeOptions,
    ImageInput,
    ImageLoader,
    Images,
    OneImage,
    OnError,
    Videos,
    as_images,
    as_videos,
    is_one_image,
    is_single_still,
)
from qwen_vit.model import VisionTower
from qwen_vit.outputs import OutputOptions
from qwen_vit.video.options import Sampling, VideoLimits, VideoOptions

__all__ = ["VisionEncoder"]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class VisionEncoder(LoadedTower):
    """Encode images with Qwen2.5-VL's vision encoder, without the language model.

    >>> encoder = VisionEncoder.from_pretrained("tiny")
    >>> features = encoder.encode("tests/photographs/rocket.jpg")
    >>> features.embeds.shape, features.grid_thw
    (torch.Size([345, 192]), (1, 30, 46))

    Build an encoder with `from_pretrained` or `from_tensors`. An encoder can be copied, pickled and
    sent to other processes. A deep copy has its own weights. Every copy gives the same bits. On a
    CPU, a forked process must call `torch.set_num_threads(1)` first. A spawned process need not.

    Source: "Qwen2.5-VL Technical Report" (arXiv:2502.13923).
    """

    def __new__(cls, *parts: Any, **named: Any) -> Self:
        """Reject VisionEncoder("tiny"). Copying and unpickling pass no arguments."""
        first = parts[0] if parts else named.get("tower", next(iter(named.values()), None))
        if first is not None and not isinstance(first, VisionTower):
            raise ArgumentError(
                "the class does not load a model",
                remedy=f"call VisionEncoder.from_pretrained({json.dumps(str(first))})",
            )
        return object.__new__(cls)

    @classmethod
    def from_pretrained(
        cls, model: str | os.PathLike[str], *, revision: str | None = None,
        subfolder: str | None = None, device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto", quantization: str | None = None,
        token: str | bool | None = None, cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False, min_pixels: int | None = None,
        max_pixels: int | None = None, cuda_graphs: bool = True, torch_dtype: None = None,
        device_map: None = None,
    ) -> Self:  # fmt: skip
        """Load a checkpoint: a Hub repository, a local folder, or the packaged "tiny".

        >>> VisionEncoder.from_pretrained("tiny", device="cpu", max_pixels=50_176).dtype
        torch.float32

        Args:
            model: a repository's name such as "Qwen/Qwen2.5-VL-7B-Instruct", a folder, or "tiny".
            revision: a branch, tag or commit of the repository.
            subfolder: the checkpoint's subfolder of `model`, such as "text_encoder".
            device: "auto" selects a GPU if the machine has one, and the CPU otherwise. A CPU
                interprets the Triton attention kernels, correctly but slowly.
            dtype: "auto" selects bfloat16 on a GPU and float32 on a CPU. float32 on a GPU is IEEE,
                never TF32.
            quantization: "fp8" (experimental) computes the MLP in 8-bit floats, less accurately.
                It needs a GPU of compute capability 8.9 or newer.
            token: the access token, as in huggingface_hub.
            cache_dir: the cache folder, as in huggingface_hub.
            local_files_only: True uses no network, as in huggingface_hub.
            min_pixels: the smallest height x width after resizing. None keeps the checkpoint's
                value.
            max_pixels: the largest height x width after resizing, which a thin image may exceed.
                None keeps the checkpoint's value.
            cuda_graphs: False launches every kernel separately, which is slower for small batches
                but gives the same bits. `output="patch"` and `layers` never use graphs.
            torch_dtype: transformers' name for `dtype`. Any value but None raises ArgumentError.
            device_map: transformers' name for `device`. Any value but None raises ArgumentError.

        Returns:
            An encoder on the chosen device. An encoder cannot change its device or dtype.

        Raises:
            HubError: The name is unknown, or the Hub and its cache cannot provide the files.
            CheckpointError: The checkpoint is missing, damaged, unsupported, or of another model.
            ArgumentError: An argument is invalid, or this machine does not support it.
        """
        for theirs, value, ours in (
            ("torch_dtype", torch_dtype, "dtype"), ("device_map", device_map, "device"),
        ):  # fmt: skip
            if value is not None:
                raise ArgumentError(
                    f"{theirs} is transformers' name for {ours}", remedy=f"pass {ours}="
                )

        def opened() -> tuple[Checkpoint, Origin]:
            source = find_checkpoint(
                model, revision=revision, subfolder=subfolder, token=token,
                cache_dir=cache_dir, local_files_only=local_files_only,
            )  # fmt: skip
            return load_checkpoint(source.folder), source

        return cls._load(
            opened, device, dtype, quantization,
            min_pixels=min_pixels, max_pixels=max_pixels, cuda_graphs=cuda_graphs,
        )  # fmt: skip

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], config: VisionConfig | Mapping[str, Any],
        image_config: ImageConfig | Mapping[str, Any] | None = None, *, name: str = "tensors",
        device: str | torch.device = "auto", dtype: str | torch.dtype = "auto",
        quantization: str | None = None, min_pixels: int | None = None,
        max_pixels: int | None = None, cuda_graphs: bool = True,
    ) -> Self:  # fmt: skip
        """Build an encoder from loaded tensors, after checks of their names, shapes and values.

        >>> tiny = VisionEncoder.from_pretrained("tiny").checkpoint
        >>> given = {f"model.visual.{name}": tensor for name, tensor in tiny.tensors.items()}
        >>> VisionEncoder.from_tensors(given, tiny.config, name="mine")
        VisionEncoder('mine', float32, on cpu)

        Args:
            tensors: tensors by published names with any prefix or none, on any device. The mapping
                may also contain tensors of a language model. The encoder keeps the tower's tensors
                on the host, so do not change them.
            config: the tower's config, or the content of config.json.
            image_config: the image settings, or the content of preprocessor_config.json. None
                selects transformers' defaults.
            name: the model's name in messages and feature files.
            device: as in `from_pretrained`.
            dtype: as in `from_pretrained`.
            quantization: as in `from_pretrained`.
            min_pixels: as in `from_pretrained`.
            max_pixels: as in `from_pretrained`.
            cuda_graphs: as in `from_pretrained`.

        Returns:
            An encoder, as from `from_pretrained`.

        Raises:
            CheckpointError: As in `from_pretrained`.
            ArgumentError: As in `from_pretrained`.
        """
        return cls._load(
            lambda: (Checkpoint.from_tensors(tensors, config, image_config), Origin(name=name)),
            device, dtype, quantization,
            min_pixels=min_pixels, max_pixels=max_pixels, cuda_graphs=cuda_graphs,
        )  # fmt: skip

    @overload
    def encode(
        self, images: Images, *, frames: Literal["all"], on_error: OnError = "raise",
        **options: Unpack[EncodeOptions],
    ) -> list[ImageFeatures | FailedImage]: ...  # fmt: skip
    @overload
    def encode(  # type: ignore[overload-overlap]  # a str is also an iterable
        self, images: OneImage, *, on_error: Literal["raise"] = "raise",
        frames: Literal["first"] = "first", **options: Unpack[EncodeOptions],
    ) -> ImageFeatures: ...  # fmt: skip
    @overload
    def encode(  # type: ignore[overload-overlap]
        self, images: OneImage, *, on_error: OnError, frames: Literal["first"] = "first",
        **options: Unpack[EncodeOptions],
    ) -> ImageFeatures | FailedImage: ...  # fmt: skip
    @overload
    def encode(  # type: ignore[overload-overlap]
        self, images: NDArray[Any] | Tensor, *, on_error: Literal["raise"] = "raise",
        frames: Literal["first"] = "first", **options: Unpack[EncodeOptions],
    ) -> ImageFeatures | list[ImageFeatures]: ...  # fmt: skip
    @overload
    def encode(
        self, images: Iterable[ImageInput], *, on_error: Literal["raise"] = "raise",
        frames: Literal["first"] = "first", **options: Unpack[EncodeOptions],
    ) -> list[ImageFeatures]: ...  # fmt: skip
    @overload
    def encode(
        self, images: Iterable[ImageInput], *, on_error: OnError,
        frames: Literal["first"] = "first", **options: Unpack[EncodeOptions],
    ) -> list[ImageFeatures | FailedImage]: ...  # fmt: skip
    def encode(
        self, images: Images, *, on_error: OnError = "raise", output: FeatureOutput = "merged",
        normalize: bool = False, layers: Iterable[int] = (), layout: ArrayLayout = "auto",
        exif: ExifPolicy = "apply", limits: ImageLimits | None = None,
        video_limits: VideoLimits | None = None, formats: Iterable[str] = (),
        frames: Pages = "first", decode_threads: int | None = None,
    ) -> Any:  # fmt: skip
        """Encode images from paths, bytes, PIL images, arrays or tensors, in any mix.

        >>> import numpy as np
        >>> encoder = VisionEncoder.from_pretrained("tiny")
        >>> encoder.encode([np.zeros((56, 84, 3), np.uint8)])[0].embeds.shape
        torch.Size([6, 192])

        Args:
            images: one image, or an iterable of images. A 4D array or tensor is a stack of images.
                A `Video`, a path such as clip.mp4, and the bytes of a video file give
                VideoFeatures. Do not change a PIL image in another thread during the call.
            on_error: "raise" raises the error of the first failed image. "skip" returns a
                FailedImage instead, and continues with the other images.
            output: "merged" returns the language model's input. "patch" returns unmerged rows.
                "mean" returns one vector per image, which is the float32 mean of the merged rows.
            normalize: True divides each mean by its Euclidean length. This option needs
                output="mean".
            layers: numbers of blocks whose dense features `encode` also returns. The first block is
                0. Layers do not change `embeds`. With layers, `encode` uses no CUDA graphs.
            layout: "HWC" or "CHW", for arrays whose shape leaves the channel axis ambiguous.
            exif: "apply" rotates an image by its EXIF orientation. "ignore" skips this rotation.
                Use it for upright images with a stale tag, for example after `Image.transpose`.
            limits: the limits on an image. None selects ImageLimits().
            video_limits: the limits on a video. None selects VideoLimits().
            formats: further formats to decode: "PPM", "ICO", "TGA" and "JPEG2000".
            frames: "first", or "all" for a list of all pages of a TIFF or frames of an animation.
                Each page of an image with several pages has an id such as "scan.tif#page=2".
            decode_threads: the number of threads that read and decode ahead of the encoder.
                None selects one thread per two cores, from 2 to 16, and 1 on a single core. The
                embeddings do not depend on this number.

        Returns:
            The ImageFeatures of one image, or a list of ImageFeatures for several images, in order.
            `embeds` has the shape (n_tokens, out_hidden_size), row-major over merged cells of 28 x
            28 pixels. With output="patch" the shape is (n_patches, hidden_size), row-major over
            patches of 14 x 14 pixels. With output="mean" the shape is (1, out_hidden_size).
            `layers[k]` is the residual stream after block k, before any norm, with the shape
            (n_patches, hidden_size), row-major. After the last block, this stream equals
            output="patch". The `id` is the path or the name, or "image 0" or "video 0" by position.

        Raises:
            ImageError: `encode` cannot read or encode an image, and `on_error` is "raise".
            ArgumentError: `images` is neither an image nor an iterable, or an option is invalid.
        """
        results = list(
            self._stream(
                images, is_lent=is_one_image(images) or isinstance(images, list | tuple),
                on_error=on_error, output=output, normalize=normalize, layers=layers,
                layout=layout, exif=exif, limits=limits, formats=formats, frames=frames,
                video_limits=video_limits, decode_threads=decode_threads,
            )
        )  # fmt: skip
        return results[0] if is_one_image(images) and frames == "first" else results

    @overload
    def encode_iter(
        self, images: Images, *, on_error: Literal["raise"] = "raise", frames: Pages = "first",
        **options: Unpack[EncodeOptions],
    ) -> Iterator[ImageFeatures]: ...  # fmt: skip
    @overload
    def encode_iter(
        self, images: Images, *, on_error: OnError, frames: Pages = "first",
        **options: Unpack[EncodeOptions],
    ) -> Iterator[ImageFeatures | FailedImage]: ...  # fmt: skip
    def encode_iter(
        self, images: Images, *, on_error: OnError = "raise", output: FeatureOutput = "merged",
        normalize: bool = False, layers: Iterable[int] = (), layout: ArrayLayout = "auto",
        exif: ExifPolicy = "apply", limits: ImageLimits | None = None,
        video_limits: VideoLimits | None = None, formats: Iterable[str] = (),
        frames: Pages = "first", decode_threads: int | None = None,
    ) -> Any:  # fmt: skip
        """Encode like `encode`, but yield images one by one in order, in constant memory.

        >>> encoder = VisionEncoder.from_pretrained("tiny")
        >>> for features in encoder.encode_iter(["tests/photographs/chelsea.png"]):
        ...     print(features.grid_thw)
        (1, 22, 32)

        The method iterates over `images` in the caller's thread, ahead of the results. On a GPU, it
        encodes images out of order to fill each batch, which does not change their bits.

        Args:
            images: as in `encode`.
            on_error: as in `encode`.
            output: as in `encode`.
            normalize: as in `encode`.
            layers: as in `encode`.
            layout: as in `encode`.
            exif: as in `encode`.
            limits: as in `encode`.
            video_limits: as in `encode`.
            formats: as in `encode`.
            frames: as in `encode`.
            decode_threads: as in `encode`.

        Returns:
            An iterator over the ImageFeatures that `encode` returns in its list, in order.

        Raises:
            ArgumentError: An option is invalid. The call itself raises this error.
            ImageError: As in `encode`. The iterator raises this error instead of a result.
        """
        return self._stream(
            images, is_lent=False, on_error=on_error, output=output, normalize=normalize,
            layers=layers, layout=layout, exif=exif, limits=limits, formats=formats, frames=frames,
            video_limits=video_limits, decode_threads=decode_threads,
        )  # fmt: skip

    def _stream(
        self, images: Images, *, is_lent: bool, on_error: OnError, output: FeatureOutput,
        normalize: bool, layers: Iterable[int], layout: ArrayLayout, exif: ExifPolicy,
        limits: ImageLimits | None, video_limits: VideoLimits | None, formats: Iterable[str],
        frames: Pages, decode_threads: int | None,
    ) -> Iterator[ImageFeatures | FailedImage]:  # fmt: skip
        """Encode like `encode_iter`. With `is_lent`, the caller's PIL images keep their pixels."""
        check_process(self.device)
        outputs = OutputOptions.checked(output, normalize, layers, self.config.depth)
        limits = ImageLimits() if limits is None else limits
        if formats:
            limits = replace(limits, formats=(*limits.formats, *check_formats(formats)))
        video_limits = VideoLimits() if video_limits is None else video_limits
        threads, many = thread_count(decode_threads), as_images(images)
        in_parallel = 1 if is_one_image(images) else threads
        if is_lent and frames == "first" and is_single_still(images):
            threads = 1  # starting a thread would take longer than it saves
        loader = ImageLoader(
            self.config, self.image_config, layout, limits, on_error, video_limits,
            video_threads=max(1, core_count() // in_parallel), exif=exif, frames=frames,
            piece_patches=TOKEN_BUDGET[self.device.type], on_gpu=resizes_on(self.device),
            is_lent=is_lent,
        )  # fmt: skip
        batches = BatchEncoder(self.forward, self.device, self.config, outputs, on_error)
        return batches.encode(loader.jobs(many, is_ahead=threads > 1), threads)

    def encode_video(
        self, videos: Videos, *, fps: float = 2.0, n_frames: int | None = None,
        start: float | None = None, end: float | None = None, max_frames: int | None = None,
        min_pixels: int | None = None, max_pixels: int | None = None, sampling: Sampling = "qwen",
        on_error: OnError = "raise", **options: Unpack[EncodeOptions],
    ) -> Any:  # fmt: skip
        """Encode one or several videos from files, bytes of files, or frames.

        >>> import numpy as np
        >>> encoder = VisionEncoder.from_pretrained("tiny")
        >>> frames = np.zeros((4, 56, 84, 3), np.uint8)
        >>> clip = encoder.encode_video(frames, fps=1.0, min_pixels=784)
        >>> clip.grid_thw, clip.second_per_grid_t, clip.frame_seconds
        ((2, 4, 6), 2.0, (0.0, 1.0, 2.0, 3.0))

        Args:
            videos: a path, the bytes of a file, frames (t, h, w, c), a list of PIL images or arrays
                as frames, or a `Video`. An iterable of such values gives several videos. A `Video`
                has its own options.
            fps: the number of frames to sample per second, or the rate of frames that you pass.
            n_frames: the number of frames to sample instead of `fps`, rounded to an even number.
            start: the seconds from the first frame to the start of sampling.
            end: the seconds from the first frame to the end of sampling.
            max_frames: the largest number of frames with `fps`. None means 768.
            min_pixels: the smallest height x width of a frame after resizing. None means 100,352.
            max_pixels: the largest height x width of a frame after resizing. None means 602,112.
                With sampling="qwen", a long video may get smaller frames.
            sampling: "qwen" samples like qwen-vl-utils 0.0.14, and "transformers" samples like
                transformers.
            on_error: as in `encode`.
            options: options of `encode`, such as `output`, `layers` and `video_limits`.

        Returns:
            The VideoFeatures of one video, or a list of VideoFeatures for several videos. `embeds`
            is (n_tokens, out_hidden_size) for a grid (t, h, w) of pairs of frames. `map` is (t, h /
            2, w / 2, D). With output="mean" a video has one row.

        Raises:
            ImageError: As in `encode`. Video files need the extra `video`.
            ArgumentError: `videos` is neither a video nor an iterable, an option is invalid, or
                `n_frames` is given with `fps` or `max_frames`.
        """
        chosen = VideoOptions(
            fps=fps, n_frames=n_frames, start=start, end=end, max_frames=max_frames,
            min_pixels=min_pixels, max_pixels=max_pixels, sampling=sampling,
        )  # fmt: skip
        return self.encode(as_videos(videos, chosen), on_error=on_error, **options)
