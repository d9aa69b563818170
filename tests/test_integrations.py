"""transformers' own model answers the same from our features as from its own tower.

And vLLM's and SGLang's inputs have their documented forms. Each comparison is shown to bite.
"""

import copy
import pickle
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessorPil

from qwen_vit import VisionEncoder
from qwen_vit.config import VisionConfig
from qwen_vit.downstream import (
    as_hf_tower,
    expand_placeholders,
    to_hf,
    to_sglang,
    to_vllm,
    to_vllm_chat_part,
)
from qwen_vit.errors import ArgumentError, ExportError, ImageError
from qwen_vit.export.options import ExportOptions
from qwen_vit.export.run import export_features
from qwen_vit.feature_files.collection import Features
from qwen_vit.feature_files.read import load_features
from qwen_vit.feature_files.write import write_features
from qwen_vit.features import FailedImage, ImageFeatures
from qwen_vit.integrations import hf as hf_module
from tests.support.checkpoints import SMALL
from tests.support.fake_engines import (
    SPECIAL,
    sglang_items,
    small_model,
    small_tokenizer,
    vllm_chat_data,
    vllm_items,
)
from tests.support.towers import assert_no_worse_than

IMAGE_TOKEN = 4
ONE_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
# Height and width in pixels: a wide and a tall one of equally many tokens, one with windows that
# are not whole, and one that is enlarged.
SIZES = ((56, 84), (140, 84), (61, 200), (84, 56), (20, 20))
NEW_TOKENS = 16


@dataclass(frozen=True)
class Setting:
    """A model, a prompt with five images, its answer from pixels, and our exported features."""

    model: Any
    encoder: VisionEncoder
    features: Features
    prompt: str
    ids: Tensor
    pixels: dict[str, Tensor]
    logits: Tensor
    exact_logits: Tensor
    tokens: list[int]

    @property
    def is_image(self) -> Tensor:
        return (self.ids == IMAGE_TOKEN).long()

    def logits_from(self, **arguments: Any) -> Tensor:
        with torch.no_grad():
            return self.model(**{"input_ids": self.ids} | arguments).logits

    def tokens_from(self, **arguments: Any) -> list[int]:
        return greedy(self.model, input_ids=self.ids, **arguments)

    def assert_same_answer(self, logits: Tensor, tokens: list[int]) -> None:
        """Tokens to the last; logits no further from float64 than twice transformers' own float32.

        Twice, because that is how far two float32 runs may be apart in the order of their sums.
        """
        assert_no_worse_than(logits, self.logits, self.exact_logits, factor=2)
        assert tokens == self.tokens


def greedy(model: Any, **arguments: Any) -> list[int]:
    ids = arguments["input_ids"]
    arguments = {"attention_mask": torch.ones_like(ids)} | arguments
    out = model.generate(**arguments, max_new_tokens=NEW_TOKENS, do_sample=False)
    return out[0, ids.shape[1] :].tolist()


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """transformers writes its model; the encoder reads the tower from that folder, and exports.

    The five images fill three shards, and a sixth one is broken.
    """
    folder = tmp_path_factory.mktemp("model")
    vision = replace(SMALL, hidden_size=32, out_hidden_size=48)
    model = small_model(vision, image_token_id=IMAGE_TOKEN)
    model.save_pretrained(folder)
    processor = Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=1_003_520)
    processor.save_pretrained(folder)
    encoder = VisionEncoder.from_pretrained(folder)
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in SIZES]
    (folder / "images").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / "images" / f"{i}.png")
    (folder / "images" / "1 broken.png").write_bytes(b"no image")
    exported = folder / "export"
    export_features(encoder, [str(folder / "images")], exported, ExportOptions(shard_size=2))
    features = load_features(exported)
    assert features.ids == [f"{i}.png" for i in range(len(SIZES))]
    prompt = "Which " + " or ".join(ONE_IMAGE for _ in SIZES) + "?<|im_end|>"
    text = expand_placeholders(prompt, [each.grid_thw for each in features])
    ids = small_tokenizer(IMAGE_TOKEN)(text, return_tensors="pt").input_ids
    pixels = dict(processor(images, return_tensors="pt"))
    pixels["mm_token_type_ids"] = (ids == IMAGE_TOKEN).long()
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        logits = model(input_ids=ids, **pixels).logits
        doubled = pixels | {"pixel_values": pixels["pixel_values"].double()}
        exact_logits = exact(input_ids=ids, **doubled).logits
    tokens = greedy(model, input_ids=ids, **pixels)
    return Setting(model, encoder, features, prompt, ids, pixels, logits, exact_logits, tokens)


# transformers


def test_mm_encoder_outputs_give_the_answer_of_the_models_own_tower(setting: Setting) -> None:
    arguments = setting.features.to_hf(setting.ids, image_token_id=IMAGE_TOKEN)
    logits = setting.logits_from(**arguments)
    setting.assert_same_answer(logits, setting.tokens_from(**arguments))


def test_inputs_embeds_with_the_right_positions_give_the_same_answer(setting: Setting) -> None:
    """Positions by transformers' own get_rope_index; one forward pass for each new token."""
    model, ids = setting.model, setting.ids
    rows = torch.cat([each.embeds for each in setting.features])
    text = model.get_input_embeddings()
    embeds = text(ids).masked_scatter((ids == IMAGE_TOKEN)[..., None], rows)
    grids = torch.tensor([each.grid_thw for each in setting.features])
    positions, _ = model.model.get_rope_index(ids, setting.is_image, image_grid_thw=grids)
    first, tokens = None, []
    for _ in range(NEW_TOKENS):
        logits = setting.logits_from(input_ids=None, inputs_embeds=embeds, position_ids=positions)
        first = logits if first is None else first
        tokens.append(int(logits[0, -1].argmax()))
        embeds = torch.cat([embeds, text(torch.tensor([tokens[-1:]]))], dim=1)
        positions = torch.cat([positions, positions.max() + torch.ones(3, 1, 1).long()], dim=2)
    assert first is not None
    setting.assert_same_answer(first, tokens)


def test_our_tower_in_the_models_place_gives_the_same_answer(setting: Setting) -> None:
    theirs = setting.model.model.visual
    setting.model.model.visual = as_hf_tower(setting.encoder)
    try:
        logits = setting.logits_from(**setting.pixels)
        tokens = setting.tokens_from(**setting.pixels)
    finally:
        setting.model.model.visual = theirs
    setting.assert_same_answer(logits, tokens)


@dataclass
class SumEncoder:
    """The least that a tower needs of an encoder."""

    config: VisionConfig
    dtype: torch.dtype

    def encode_patches(self, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
        return pixel_values.unflatten(0, (-1, 4)).sum(dim=1)


class Pixels(Dataset):  # type: ignore[type-arg]
    """A data set that runs a tower in the data loader's workers."""

    def __init__(self, tower: nn.Module) -> None:
        self.tower = tower

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Tensor:
        rows = torch.full((24, 1176), float(index))
        return self.tower(rows, torch.tensor([[1, 4, 6]])).pooler_output


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_tower_copies_pickles_and_runs_in_workers(start: str) -> None:
    """Alone and inside a model, as far as its encoder does."""
    tower = as_hf_tower(SumEncoder(SMALL, torch.float32))
    model = nn.Sequential(nn.Linear(2, 2), tower)
    rows, grids = torch.ones(24, 1176), torch.tensor([[1, 4, 6]])
    expected = torch.full((6, 1176), 4.0)
    for other in (copy.deepcopy(tower), pickle.loads(pickle.dumps(tower)), copy.deepcopy(model)[1]):
        assert other is not tower
        assert torch.equal(other(rows, grid_thw=grids).pooler_output, expected)
        assert (other.dtype, other.spatial_merge_size) == (torch.float32, 2)
    loader = DataLoader(
        Pixels(tower), batch_size=None, num_workers=1, multiprocessing_context=start
    )
    assert [float(made[0, 0]) for made in loader] == [0.0, 4.0, 8.0]


def test_our_tower_takes_videos_too(setting: Setting) -> None:
    """Two frames in time for each step of the grid: (2, 4, 6) has 48 rows of pixels."""
    rows = torch.randn(48, 1176, generator=torch.Generator().manual_seed(0))
    grids = torch.tensor([[2, 4, 6]])
    ids = torch.tensor([[20, SPECIAL["<|vision_start|>"], *12 * [IMAGE_TOKEN + 1], 3, 21]])
    video = {"input_ids": ids, "pixel_values_videos": rows, "video_grid_thw": grids}
    video["mm_token_type_ids"] = 2 * (ids == IMAGE_TOKEN + 1).long()
    theirs = setting.model.model.visual
    expected = setting.logits_from(**video)
    setting.model.model.visual = as_hf_tower(setting.encoder)
    try:
        logits = setting.logits_from(**video)
    finally:
        setting.model.model.visual = theirs
    exact = copy.deepcopy(setting.model).double()
    with torch.no_grad():
        exact_logits = exact(**video | {"pixel_values_videos": rows.double()}).logits
    assert_no_worse_than(logits, expected, exact_logits, factor=2)


def test_the_models_own_features_through_a_file_change_no_bit(
    setting: Setting, tmp_path: Path
) -> None:
    """What is left when the towers' rounding is taken out: the way through the file is exact."""
    grids = setting.pixels["image_grid_thw"]
    with torch.no_grad():
        merged = setting.model.model.visual(setting.pixels["pixel_values"], grid_thw=grids)
    rows = merged.pooler_output.split((grids.prod(-1) // 4).tolist())
    made = [
        ImageFeatures(str(i), part, tuple(grid))
        for i, (part, grid) in enumerate(zip(rows, grids.tolist(), strict=True))
    ]
    stored = load_features(write_features(tmp_path / "f.safetensors", made, {}))
    arguments = stored.to_hf(setting.ids, image_token_id=IMAGE_TOKEN)
    assert torch.equal(setting.logits_from(**arguments), setting.logits)


def test_padded_batches_and_beams_work(setting: Setting) -> None:
    """Two prompts of two and three images, and transformers' own copies of them for its beams."""
    grids = [each.grid_thw for each in setting.features]
    tokenizer = small_tokenizer(IMAGE_TOKEN)
    texts = [
        expand_placeholders(ONE_IMAGE * len(part) + "?", part) for part in (grids[:2], grids[2:])
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    pixels = setting.pixels | {"mm_token_type_ids": (ids == IMAGE_TOKEN).long()}
    ours = setting.features.to_hf(ids, image_token_id=IMAGE_TOKEN)
    answers = [
        setting.model.generate(
            input_ids=ids,
            attention_mask=mask,
            **arguments,
            max_new_tokens=NEW_TOKENS,
            num_beams=3,
            do_sample=False,
        )
        for arguments in (pixels, ours)
    ]
    assert torch.equal(*answers)


def by_columns(image: ImageFeatures) -> ImageFeatures:
    """Its rows in the order of the columns of its grid."""
    _, h, w = image.grid_thw
    rows = image.embeds.unflatten(0, (h // 2, w // 2)).transpose(0, 1).flatten(0, 1)
    return replace(image, embeds=rows)


def swapped(images: list[ImageFeatures]) -> list[ImageFeatures]:
    """The wide and the tall image, of six tokens each, change places."""
    return [images[3], images[1], images[2], images[0], images[4]]


def two_rows_swapped(images: list[ImageFeatures]) -> list[ImageFeatures]:
    """The first two, of 45 in all."""
    return [replace(images[0], embeds=images[0].embeds[[1, 0, 2, 3, 4, 5]]), *images[1:]]


def grids_swapped(images: list[ImageFeatures]) -> list[ImageFeatures]:
    pairs = zip(images, swapped(images), strict=True)
    return [replace(image, grid_thw=other.grid_thw) for image, other in pairs]


FAULTS: dict[str, Callable[[list[ImageFeatures]], list[ImageFeatures]]] = {
    "rows by columns": lambda images: [by_columns(image) for image in images],
    "two images swapped": swapped,
    "two rows swapped": two_rows_swapped,
    "grids swapped": grids_swapped,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_sees_a_fault_in_the_features(setting: Setting, fault: str) -> None:
    arguments = to_hf(FAULTS[fault](list(setting.features)))
    arguments["mm_token_type_ids"] = setting.is_image
    logits = setting.logits_from(**arguments)
    with pytest.raises(AssertionError, match="ours"):
        assert_no_worse_than(logits, setting.logits, setting.exact_logits, factor=1000)
    if fault in ("rows by columns", "two images swapped"):  # the others: 15 and 2 %, no token
        assert setting.tokens_from(**arguments) != setting.tokens


def test_the_comparison_sees_positions_in_a_row(setting: Setting) -> None:
    """Without mm_token_type_ids transformers numbers image tokens as text, and says nothing."""
    arguments = setting.features.to_hf()
    logits = setting.logits_from(**arguments)
    with pytest.raises(AssertionError, match="ours"):
        assert_no_worse_than(logits, setting.logits, setting.exact_logits, factor=1000)
    assert setting.tokens_from(**arguments) != setting.tokens


def test_image_tokens_that_do_not_fit_the_features_are_refused(setting: Setting) -> None:
    """One token less, one image less, and the right number in the wrong order."""
    one_less = setting.ids.clone()
    one_less[0, (one_less[0] == IMAGE_TOKEN).nonzero()[0]] = 20
    others = setting.features[["1.png", "0.png", "2.png", "3.png", "4.png"]]
    for ids, features in (
        (one_less, setting.features),
        (setting.ids, setting.features[:4]),
        (setting.ids, others),
    ):
        words = r"5 runs of .* token 4, .*lengths \[.*\. Expected \[.* the tokens .*\. Expand the"
        with pytest.raises(ArgumentError, match=words):
            features.to_hf(ids, image_token_id=IMAGE_TOKEN)


class OtherVersion:
    """`importlib.metadata.version`, for a machine with another transformers."""

    def __init__(self, found: str | None) -> None:
        self.found = found

    def __call__(self, package: str) -> str:
        if self.found is None:
            raise PackageNotFoundError(package)
        return self.found


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (None, "transformers is not installed. Expected 5.18 or newer, which to_hf needs."),
        ("4.57.6", "Run pip install 'transformers>=5.18'."),
        ("5.17.0", "transformers 5.17.0 is installed. Expected 5.18 or newer, which to_hf needs."),
    ],
)
def test_a_transformers_that_takes_no_features_is_named(
    found: str | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_module, "version", OtherVersion(found))
    with pytest.raises(ArgumentError, match=re.escape(words)):
        to_hf(features_of((1, 4, 4)))


def test_the_tower_goes_back_one_version_more(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_module, "version", OtherVersion("5.17"))
    assert as_hf_tower(setting.encoder).dtype == torch.float32
    monkeypatch.setattr(hf_module, "version", OtherVersion("5.16.1"))
    with pytest.raises(ArgumentError, match=r" 5\.16\.1 is .* 5\.17 or newer, which as_hf_tower"):
        as_hf_tower(setting.encoder)


# vLLM and SGLang


def test_vllms_parser_finds_each_images_rows(setting: Setting) -> None:
    found = vllm_items(setting.features.to_vllm(), hidden_size=48)
    assert_same_rows(found, setting.features)


def test_vllms_server_finds_each_images_rows(setting: Setting) -> None:
    data = vllm_chat_data(setting.features.to_vllm_chat_part())
    assert_same_rows(vllm_items(data, hidden_size=48), setting.features)
    assert data["image"]["image_grid_thw"].tolist() == setting.pixels["image_grid_thw"].tolist()


def test_sglangs_engine_finds_each_images_rows(setting: Setting) -> None:
    [ids] = setting.ids.tolist()
    assert_same_rows(sglang_items(ids, setting.features.to_sglang(), IMAGE_TOKEN), setting.features)


def assert_same_rows(found: Sequence[Tensor], features: Iterable[ImageFeatures]) -> None:
    for rows, image in zip(found, features, strict=True):
        assert torch.equal(rows, image.embeds)


def test_bfloat16_stays_bfloat16_everywhere() -> None:
    """NumPy has no such type, so vLLM's other form, .npy, would have to widen it."""
    made = features_of((1, 4, 4), (1, 2, 6), dtype=torch.bfloat16)
    assert to_vllm(made)["image"]["image_embeds"].dtype == torch.bfloat16
    assert to_sglang(made)[0]["feature"].dtype == torch.bfloat16
    assert to_hf(made)["mm_encoder_outputs"]["image"].pooler_output[1].dtype == torch.bfloat16
    data = vllm_chat_data(to_vllm_chat_part(made))
    assert_same_rows(vllm_items(data, hidden_size=8), made)


def test_a_chat_part_holds_its_own_image_and_not_the_file(tmp_path: Path) -> None:
    """`torch.save` of a view writes everything that it looks into: here, all images."""
    made = features_of((1, 2, 2), (1, 200, 200))
    stored = load_features(write_features(tmp_path / "f.safetensors", made, {}))
    small = stored.to_vllm_chat_part()[0]["image_embeds"]["image_embeds"]
    assert len(small) < 4000 < 200 * 200 * 8


# For all


ADAPTERS = (to_hf, to_vllm, to_vllm_chat_part, to_sglang)


def features_of(*grids: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> Any:
    return [
        ImageFeatures(str(i), torch.full((t * h * w // 4, 8), i + 0.5, dtype=dtype), (t, h, w))
        for i, (t, h, w) in enumerate(grids)
    ]


def with_embeds(embeds: Any, grid: Any = (1, 4, 4)) -> list[ImageFeatures]:
    return [*features_of((1, 2, 2)), ImageFeatures("bad.jpg", embeds, grid)]


def failed(fact: str, name: str = "") -> FailedImage:
    return FailedImage("bad.jpg", ImageError(fact, name=name))


NAN = torch.tensor([0.0, float("nan"), 0, 0, 0, 0, 0, 0]).expand(4, 8)
REFUSED = {
    "patch": (
        with_embeds(torch.ones(16, 8)),
        'bad.jpg: .* (16, 8). Expected 4 merged .*output="merged", neither "patch"',
    ),
    "mean": (with_embeds(torch.ones(1, 8)), 'bad.jpg: .* (1, 8). Expected 4 merged .*"mean"'),
    "a row less": (with_embeds(torch.ones(3, 8)), "(3, 8). Expected 4 merged rows for its grid"),
    "flat": (with_embeds(torch.ones(4)), "shape (4,). Expected 4 merged rows"),
    "NaN": (with_embeds(NAN), "bad.jpg: .* NaN or infinity. Expected finite .* again."),
    "infinity": (
        with_embeds(1 / torch.zeros(4, 8)),
        "bad.jpg: .* NaN or infinity. Expected finite",
    ),
    "integers": (
        with_embeds(torch.ones(4, 8).int()),
        "torch.int32. Expected finite floating-point",
    ),
    "another width": (with_embeds(torch.ones(4, 6)), "'0' has rows of 8 .* 'bad.jpg' of 6 "),
    "another type": (with_embeds(torch.ones(4, 8).half()), "8 torch.float32 .* 8 torch.float16"),
    "failed": (
        [*features_of((1, 2, 2)), failed("ends early", "bad.jpg")],
        "bad.jpg: this image failed: ends early. Leave it out.",
    ),
    "failed in an export": (
        [failed("bad.jpg: ends early. Fetch it again.")],
        "bad.jpg: this image failed: bad.jpg: ends early. Fetch it again. Leave it out.",
    ),
    "odd grid": (
        with_embeds(torch.ones(4, 8), (1, 4, 5)),
        "a grid is (1, 4, 5). Expected .* multiples of 2. Pass the grid_thw",
    ),
    "none": ([], "features is empty. Pass at least one image."),
}


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.__name__)
@pytest.mark.parametrize("given", [features_of((1, 2, 2))[0], torch.ones(4, 8), [torch.ones(4, 8)]])
def test_what_are_no_features_is_refused_by_every_adapter(adapter: Any, given: Any) -> None:
    with pytest.raises(ArgumentError, match=r"features (is one|holds a) .*\. Expected"):
        adapter(given)


@pytest.mark.parametrize("ids", [[[4, 4]], torch.tensor([4, 4]), torch.tensor([[4]]).numpy()])
def test_input_ids_of_another_kind_are_refused(ids: Any) -> None:
    words = r"input_ids is a .*\. Expected a tensor of shape .prompts, tokens.\. Call the tokenizer"
    with pytest.raises(ArgumentError, match=words):
        to_hf(features_of((1, 2, 2)), ids)


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.__name__)
@pytest.mark.parametrize("reason", REFUSED)
def test_features_that_no_language_model_takes_are_refused(adapter: Any, reason: str) -> None:
    features, words = REFUSED[reason]
    pattern = ".*".join(re.escape(part) for part in words.split(".*"))
    with pytest.raises((ExportError, ArgumentError), match=pattern):
        adapter(features)


def test_a_file_a_choice_and_a_list_give_the_same(setting: Setting) -> None:
    listed = list(setting.features)
    for adapter in ADAPTERS:
        method = adapter.__name__
        assert same(getattr(setting.features, method)(), adapter(listed))
        chosen = getattr(setting.features[["3.png", "0.png"]], method)()
        assert same(chosen, adapter([listed[3], listed[0]]))
        assert same(getattr(setting.features[1:3], method)(), adapter(listed[1:3]))


def same(one: Any, other: Any) -> bool:
    """Whether two nests of dicts, lists and tensors are equal."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


# Exports


def exported(setting: Setting, tmp_path: Path, **options: Any) -> Features:
    images = str(Path(setting.features.metadata["model"]) / "images")
    export_features(setting.encoder, [images], tmp_path / "export", ExportOptions(**options))
    return load_features(tmp_path / "export")


@pytest.mark.parametrize("output", ["mean", "patch"])
def test_an_export_of_other_outputs_is_read_but_no_language_model_gets_it(
    setting: Setting, tmp_path: Path, output: Literal["mean", "patch"]
) -> None:
    features = exported(setting, tmp_path, output=output)
    rows = [len(image.embeds) for image in features]
    patches = setting.pixels["image_grid_thw"].prod(-1).tolist()
    assert rows == (5 * [1] if output == "mean" else patches)
    for adapter in ADAPTERS:
        with pytest.raises(ExportError, match=r'output="merged", neither "patch" nor "mean"'):
            getattr(features, adapter.__name__)()


def test_an_export_in_bfloat16_stays_in_it(setting: Setting, tmp_path: Path) -> None:
    """In the same shards, and so in the same batches, which decide the last bits on a CPU."""
    features = exported(setting, tmp_path, dtype="bfloat16", shard_size=2)
    rounded = [replace(each, embeds=each.embeds.bfloat16()) for each in setting.features]
    assert same(features.to_vllm(), to_vllm(rounded))


def test_the_command_that_an_error_names_mends_a_torn_export(
    setting: Setting, tmp_path: Path
) -> None:
    features = exported(setting, tmp_path, shard_size=2)
    shard = tmp_path / "export" / "shard-00000001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(ExportError, match=r"\. Run the same `qwen-vit export` command again"):
        list(load_features(tmp_path / "export"))
    again = exported(setting, tmp_path, shard_size=2)
    assert shard.read_bytes() == whole
    assert same(again.to_vllm(), features.to_vllm())


# Placeholders


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)), max_size=5))
def test_placeholders_are_those_of_transformers_processor(
    halves: list[tuple[int, int, int]],
) -> None:
    """Source: Qwen2_5_VLProcessor.replace_image_token; the processor itself needs torchvision."""
    grids = [(t, 2 * h, 2 * w) for t, h, w in halves]
    tensor = torch.tensor(grids, dtype=torch.int64).reshape(-1, 3)
    processor: Any = SimpleNamespace(
        image_processor=SimpleNamespace(merge_size=2), image_token="<|image_pad|>"
    )
    theirs = [
        Qwen2_5_VLProcessor.replace_image_token(processor, {"image_grid_thw": tensor}, i)
        for i in range(len(grids))
    ]
    text = "".join(f"<|vision_start|><|image_pad|><|vision_end|>{i}\n" for i in range(len(grids)))
    expected = "".join(f"<|vision_start|>{pad}<|vision_end|>{i}\n" for i, pad in enumerate(theirs))
    assert expand_placeholders(text, grids) == expected
    assert expand_placeholders(text, tensor) == expected


@pytest.mark.parametrize(
    ("text", "grids", "words"),
    [
        ("no image", [(1, 4, 4)], "has 0 <|image_pad|> for 1 image. Expected one per"),
        ("<|image_pad|>", [], "has 1 <|image_pad|> for 0 images. Expected one per image."),
        ("<|image_pad|>" * 4, [(1, 4, 4)], "has 4 .* Write one per image, not yet expanded."),
        ("<|image_pad|>", [(1, 4, 5)], "a grid is (1, 4, 5)"),
        ("<|image_pad|>", [(1, 4.7, 4)], "a grid is (1, 4.7, 4). Expected whole numbers"),
        ("<|image_pad|>", [None], "a grid is None. Expected whole numbers"),
        ("<|image_pad|>", [(4, 4)], "a grid is (4, 4)"),
        ("<|image_pad|>", [(1, 0, 4)], "a grid is (1, 0, 4)"),
        ("<|image_pad|>", [(0, 4, 4)], "a grid is (0, 4, 4)"),
    ],
)
def test_a_text_that_does_not_fit_its_grids_is_refused(
    text: str, grids: list[Any], words: str
) -> None:
    pattern = ".*".join(re.escape(part) for part in words.split(".*"))
    with pytest.raises(ArgumentError, match=pattern):
        expand_placeholders(text, grids)
