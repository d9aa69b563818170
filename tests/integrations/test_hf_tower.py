"""Our tower in transformers' models: the same answers as from theirs."""


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return make_setting(tmp_path_factory.mktemp("model"))


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
