"""What `visual_tokens` says of each placeholder is what its feature was computed from, in every family."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from vlattn.errors import InputError
from vlattn.models.adapter import Adapter
from vlattn.models.layouts import place_layouts, run_lengths
from vlattn.models.registry import adapter_for
from vlattn.models.sizes import remembered
from vlattn.runtime.hooks import as_keywords
from vlattn.runtime.tokens import ImageLayout, VisualTokens

IMAGE, VIDEO = 63, 62
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
TILED = ("llava_next", "llava_onevision", "video_llava", "internvl", "idefics3", "smolvlm", "gemma3")
FIELDS = ("mask", "image", "tile", "patch", "row", "column")

# Every family with one image a prompt, several, videos, and both.
CASES = [
    *((family, {}) for family in TILED + QWEN),
    *((family, {"images": 2}) for family in TILED + QWEN),
    *((family, {"images": 0, "video": True}) for family in ("llava_onevision", "video_llava", *QWEN)),
    *((family, {"images": 2, "video": True}) for family in ("llava_onevision", "video_llava", *QWEN)),
    ("llava_next", {"batch": 4}),
    ("llava_onevision", {"batch": 3}),
]


def embeddings(model: Any, adapter: Adapter, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the decoder gets, features in place [B, T, D]."""
    seen: list[torch.Tensor] = []
    hook = adapter.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        hook.remove()
    return seen[0]


def tiles_of(visual: VisualTokens, here: torch.Tensor, wanted: dict[str, Any]) -> torch.Tensor:
    """Number of the encoder image among those of one kind, at `here` [B, T]; -1 elsewhere.

    Tiles count through images and videos of the batch, and towers see those of one kind at a time.
    """
    named = here & (visual.tile >= 0)
    number = visual.tile.where(named, -1)
    if "video" in wanted:
        number[named] = visual.tile[named].unique(return_inverse=True)[1]
    return number


def same(one: VisualTokens, other: VisualTokens) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in FIELDS)


# By number: each feature is replaced by which one it is --------------------------------------------------------------
@pytest.mark.parametrize(("family", "wanted"), [case for case in CASES if case[0] in TILED])
def test_features_numbered_at_the_projector_arrive_where_visual_tokens_says(
    families: ModuleType, family: str, wanted: dict[str, Any]
) -> None:
    model = families.model(family)
    adapter, inputs = adapter_for(model), families.inputs(family, model, **wanted)

    def number(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        tiles, slots = output.shape[:2]  # [tiles, slots, D]
        coded = torch.zeros_like(output)
        coded[..., 0] = torch.arange(tiles)[:, None]
        coded[..., 1] = torch.arange(slots)
        side = int((slots - slots % 2 if family == "video_llava" else slots) ** 0.5)
        coded[..., 2] = torch.arange(slots).div(side, rounding_mode="floor")
        coded[..., 3] = torch.arange(slots) % side
        return coded

    adapter.projector.register_forward_hook(number)
    coded = embeddings(model, adapter, inputs)
    visual = adapter.visual_tokens(inputs)
    checked = 0
    for token in (IMAGE, VIDEO):
        here = (inputs["input_ids"] == token) & (visual.tile >= 0)
        assert torch.equal(coded[here][:, 0].long(), tiles_of(visual, here, wanted)[here])
        pooled = family == "llava_onevision" and token == VIDEO
        lead = int(family == "video_llava" and token == VIDEO)
        if not pooled:
            assert torch.equal(coded[here][:, 1].long() - lead, visual.patch[here])
        else:  # the middle of a pooled cell of a 3x3 grid
            assert torch.allclose(coded[here][:, 2], visual.row[here].double() * 1.5 + 0.25)
            assert torch.allclose(coded[here][:, 3], visual.column[here].double() * 1.5 + 0.25)
        checked += int(here.sum())
    assert checked >= 8 * len(inputs["input_ids"])
    # What has no tile is a newline, or a mixture of shrunk tiles.
    newline = visual.mask & (visual.row < 0) & (visual.tile < 0)
    if family in ("llava_next", "llava_onevision"):
        assert bool((coded[newline] == model.model.image_newline).all())
        assert bool(newline.any())
    else:
        assert torch.equal(visual.mask, visual.tile >= 0)


def cells_of_qwen(inputs: dict[str, torch.Tensor], order: list[tuple[int, int]]) -> Iterator[tuple[int, ...]]:
    """(image, tile, patch, row, column) of each placeholder; `order` names (kind, number) of images in the prompts."""
    tiles = 0
    for image, (kind, number) in enumerate(order):
        t, h, w = inputs["video_grid_thw" if kind else "image_grid_thw"][number].tolist()
        for _ in range(t):
            for row in range(h // 2):
                for column in range(w // 2):
                    yield image, tiles, row * (w // 2) + column, row, column
            tiles += 1


@pytest.mark.parametrize(("family", "wanted"), [case for case in CASES if case[0] in QWEN])
def test_qwen_images_and_frames_are_grids_of_merged_cells_in_row_order(
    families: ModuleType, family: str, wanted: dict[str, Any]
) -> None:
    model = families.model(family)
    adapter, inputs = adapter_for(model), families.inputs(family, model, **wanted)
    images, videos = wanted.get("images", 1), int(wanted.get("video", False))
    order = []
    for b in range(2):
        order += [(0, b * images + i) for i in range(images)] + [(1, b * videos + i) for i in range(videos)]
    expected = torch.tensor(list(cells_of_qwen(inputs, order)))
    visual = adapter.visual_tokens(inputs)
    said = torch.stack([getattr(visual, name)[visual.mask] for name in FIELDS[1:]], 1)
    assert torch.equal(said, expected)


# By touch: with attention in the tower silenced, a pixel reaches only the token it belongs to -------------------------
def without_mixing(model: Any, adapter: Adapter) -> None:
    """Let the tower's attention add nothing, so that patches go up each for itself."""
    for tower in {adapter.tower, getattr(adapter, "video_tower", adapter.tower)}:
        for name, weight in tower.named_parameters():
            if any(part in name for part in (".out_proj.", ".attn.proj.", ".projection_layer.")):
                weight.data.zero_()


def touched(model: Any, adapter: Adapter, inputs: dict[str, torch.Tensor], name: str, where: Any) -> torch.Tensor:
    """Which positions change with pixels, bool [B, T]."""
    pixels = inputs[name].clone()
    pixels[where] += 1.0
    before, after = embeddings(model, adapter, inputs), embeddings(model, adapter, {**inputs, name: pixels})
    return (before != after).any(-1)


def real_tiles(family: str, inputs: dict[str, torch.Tensor], name: str) -> list[tuple[int, ...]]:
    """Indices into pixels of the encoder images, without padding, in order."""
    pixels = inputs[name]
    if name == "pixel_values_videos" or family in ("idefics3", "smolvlm"):
        return [(n, i) for n in range(pixels.shape[0]) for i in range(pixels.shape[1]) if pixels[n, i].any()]
    if pixels.ndim == 4:
        return [(i,) for i in range(len(pixels))]
    # One small view and the tiles of each image; several images of OneVision are not cut.
    grids = {"llava_next": [2, 4, 2, 2], "llava_onevision": [2, 6, 4]}[family]
    one = "batch_num_images" in inputs
    return [(n, i) for n in range(len(pixels)) for i in range(1 if one else 1 + grids[n % len(grids)])]


@pytest.mark.parametrize(("family", "wanted"), [case for case in CASES if case[0] in TILED])
def test_touching_one_cell_changes_the_token_that_says_so_and_no_other(
    families: ModuleType, family: str, wanted: dict[str, Any]
) -> None:
    model = families.model(family)
    adapter, inputs = adapter_for(model), families.inputs(family, model, **wanted)
    without_mixing(model, adapter)
    visual = adapter.visual_tokens(inputs)
    merge = 2 if family in ("internvl", "idefics3", "smolvlm", "gemma3") else 1
    for name in [name for name in inputs if name.startswith("pixel_values")]:
        video = name == "pixel_values_videos"
        here = inputs["input_ids"] == (VIDEO if video else IMAGE)
        tile = tiles_of(visual, here, wanted)
        shrunk = here & (visual.tile < 0) & (visual.row >= 0)
        pooled = video and family == "llava_onevision"
        columns = inputs[name].shape[-1] // 4 // merge
        reached = 0
        for number, index in enumerate(real_tiles(family, inputs, name)):
            for patch in range(number % 2, columns**2, 5):
                row, column = divmod(patch, columns)
                area = (
                    slice(4 * merge * row, 4 * merge * (row + 1)),
                    slice(4 * merge * column, 4 * merge * (column + 1)),
                )
                changed = touched(model, adapter, inputs, name, (*index, slice(None), *area))
                if pooled:  # the two nearest of three rows, halfway between
                    near = (visual.row * 1.5 + 0.25 - row).abs() < 1
                    near &= (visual.column * 1.5 + 0.25 - column).abs() < 1
                    expected = (tile == number) & near
                elif bool(shrunk.any()) and not bool((tile == number).any()):
                    assert bool((changed <= shrunk).all())
                    continue
                else:
                    expected = (tile == number) & (visual.patch == patch)
                assert torch.equal(changed, expected), (name, index, patch)
                reached += int(expected.sum())
        assert reached > 3


@pytest.mark.parametrize("family", QWEN)
def test_painting_one_cell_of_a_processed_image_changes_its_token_alone(families: ModuleType, family: str) -> None:
    from PIL import Image
    from transformers.models.qwen2_vl import Qwen2VLImageProcessorPil  # of all three families

    model = families.model(family)
    adapter, inputs = adapter_for(model), families.inputs(family, model)
    without_mixing(model, adapter)
    processor = Qwen2VLImageProcessorPil(do_resize=False, patch_size=4, temporal_patch_size=2, merge_size=2)

    def processed(painted: tuple[int, int, int] | None) -> dict[str, torch.Tensor]:
        pictures = [Image.new("RGB", (w * 4, h * 4), (90, 60, 30)) for _, h, w in inputs["image_grid_thw"].tolist()]
        if painted is not None:
            image, row, column = painted
            pictures[image].paste((200, 210, 220), (8 * column, 8 * row, 8 * column + 8, 8 * row + 8))
        found = processor(images=pictures, return_tensors="pt")
        assert torch.equal(found["image_grid_thw"], inputs["image_grid_thw"])
        return {**inputs, "pixel_values": found["pixel_values"].to(model.dtype)}

    blank = embeddings(model, adapter, processed(None))
    visual = adapter.visual_tokens(inputs)
    for image, (_, h, w) in enumerate(inputs["image_grid_thw"].tolist()):
        for row in range(h // 2):
            for column in range(w // 2):
                changed = (embeddings(model, adapter, processed((image, row, column))) != blank).any(-1)
                said = (visual.image == image) & (visual.row == row) & (visual.column == column)
                assert torch.equal(changed, said)
                assert int(said.sum()) == 1


# Anyres ---------------------------------------------------------------------------------------------------------------
def test_llava_next_stitches_tiles_crops_the_padding_and_ends_rows_with_newlines(families: ModuleType) -> None:
    model = families.model("llava_next")
    adapter = adapter_for(model)
    inputs = families.inputs("llava_next", model, batch=2)
    assert inputs["image_sizes"].tolist() == [[14, 40], [36, 30]]
    visual = adapter.visual_tokens(inputs)
    # Height 14 of width 40 fills 11.2 of 16 rows of pixels, 2.8 of 4 rows of patches: rows 1 and 2 of the middle stay.
    first = visual.image == 0
    rows = [[0] * 4, [1] * 4, [2] * 4, [3] * 4, [1] * 8, [-1], [2] * 8, [-1]]
    assert visual.row[first].tolist() == [row for part in rows for row in part]
    assert visual.column[first].tolist() == [0, 1, 2, 3] * 4 + [*range(8), -1] * 2
    assert visual.tile[first].tolist() == [0] * 16 + ([1] * 4 + [2] * 4 + [-1]) * 2
    assert visual.patch[first].tolist() == [*range(16), *[4, 5, 6, 7] * 2, -1, *[8, 9, 10, 11] * 2, -1]
    # Width 30 of height 36 fills 6.67 of 8 columns of patches in 2x2 tiles: columns 1 to 6 stay.
    second = visual.image == 1
    assert visual.row[second].tolist()[16:] == [r for row in range(8) for r in [row] * 6 + [-1]]
    assert visual.column[second].tolist()[16:] == [1, 2, 3, 4, 5, 6, -1] * 8
    assert visual.tile[second].unique().tolist() == [-1, 3, 4, 5, 6, 7]


def test_shrunk_tiles_of_onevision_have_places_of_the_shrunk_grid(families: ModuleType) -> None:
    model = families.model("llava_onevision")
    adapter = adapter_for(model)
    inputs = families.inputs("llava_onevision", model, batch=2)
    whole, shrunk = adapter.visual_tokens(inputs), None

    def places(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        coded = torch.zeros_like(output)
        # Row and column in the stitched grid; image 1 has tiles 4 to 9, three rows of two.
        for tile in range(len(output)):
            for patch in range(9):
                coded[tile, patch, 0] = (tile - 4) // 2 * 3 + patch // 3
                coded[tile, patch, 1] = (tile - 4) % 2 * 3 + patch % 3
        return coded

    adapter.projector.register_forward_hook(places)
    coded = embeddings(model, adapter, inputs)
    shrunk = (whole.image == 1) & (whole.tile < 0) & (whole.row >= 0)
    rows, columns = int(whole.row[shrunk].max()) + 1, int(whole.column[shrunk].max()) + 1
    assert int(shrunk.sum()) == rows * columns < 6 * 9
    assert bool((whole.patch[shrunk] == -1).all())
    # 28 of 40 fill 6.3 of 9 rows' columns: all six stay, so both axes shrink from their whole length.
    for axis, place, size, full in ((0, whole.row, rows, 9), (1, whole.column, columns, 6)):
        middle = (place[shrunk] + 0.5) * full / size - 0.5
        assert torch.allclose(coded[shrunk][:, axis], middle.double())
    # The first image has two tiles, which are as many as fit: it is not shrunk.
    assert bool((whole.patch[(whole.image == 0) & (whole.row >= 0)] >= 0).all())


def test_several_images_of_onevision_are_not_cut_into_tiles(families: ModuleType) -> None:
    model = families.model("llava_onevision")
    visual = adapter_for(model).visual_tokens(families.inputs("llava_onevision", model, images=2))
    for image in range(4):
        assert visual.patch[visual.image == image].tolist() == [*range(9), -1]
        assert visual.tile[visual.image == image].tolist() == [image] * 9 + [-1]


def test_the_ratio_that_onevision_features_were_made_with_decides_what_is_shrunk(families: ModuleType) -> None:
    model = families.model("llava_onevision")
    adapter, inputs = adapter_for(model), families.inputs("llava_onevision", model)
    memory = adapter.remember_sizes()
    with torch.no_grad():
        features = model.model.get_image_features(
            inputs["pixel_values"], inputs["image_sizes"], vision_aspect_ratio="anyres_max_9", return_dict=True
        )
    memory.remove()
    counts = list(map(len, features.pooler_output))
    ids = torch.tensor([[3, *[IMAGE] * counts[0], 4, *[IMAGE] * counts[1]]])
    visual = adapter.visual_tokens({"input_ids": ids, "mm_encoder_outputs": {"image": features}})
    assert torch.equal(visual.tile >= 0, visual.row >= 0)  # nothing is shrunk
    assert visual.tile.max() == 9


def test_counts_of_images_that_contradict_their_sizes_are_refused(families: ModuleType) -> None:
    model = families.model("llava_onevision")
    adapter, inputs = adapter_for(model), families.inputs("llava_onevision", model, images=2)
    with pytest.raises(InputError, match="batch_num_images: it counts 3 images, but image_sizes has 4"):
        adapter.visual_tokens({**inputs, "batch_num_images": torch.tensor([1, 2])})


# Prompts --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("family", "wanted"), CASES)
def test_the_mask_is_the_placeholders_by_id_and_by_embedding(
    families: ModuleType, family: str, wanted: dict[str, Any]
) -> None:
    model = families.model(family)
    adapter, inputs = adapter_for(model), families.inputs(family, model, **wanted)
    visual = adapter.visual_tokens(inputs)
    for row, said in zip(inputs["input_ids"].tolist(), visual.mask.tolist(), strict=True):
        assert said == [token in (IMAGE, VIDEO) for token in row]
    assert not bool((visual.mask & (inputs["attention_mask"] == 0)).any())
    by_value = {name: value for name, value in inputs.items() if name != "input_ids"}
    by_value["inputs_embeds"] = model.get_input_embeddings()(inputs["input_ids"])
    assert same(adapter.visual_tokens(by_value), visual)


@pytest.mark.parametrize(("family", "wanted"), [case for case in CASES if "batch" not in case[1]])
@pytest.mark.parametrize("copies", [1, 2])
def test_the_prefill_of_generate_knows_the_layouts_too(
    families: ModuleType, family: str, wanted: dict[str, Any], copies: int
) -> None:
    model = families.model(family)
    adapter, inputs = adapter_for(model), families.inputs(family, model, **wanted)
    if (copies, family, wanted) == (2, "llava_next", {"images": 2}) and not hasattr(
        model, "_expand_multimodal_outputs"
    ):
        pytest.skip("this version of transformers mixes up several images of repeated prompts")
    told: list[VisualTokens] = []

    def read(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not told:
            told.append(adapter.visual_tokens(as_keywords(module, args, kwargs)))

    before = dict(vars(model.model))
    memory = adapter.remember_sizes()
    hook = model.model.register_forward_pre_hook(read, with_kwargs=True)
    model.generate(**inputs, max_new_tokens=2, do_sample=False, num_beams=copies)
    hook.remove()
    memory.remove()
    memory.remove()
    after = vars(model.model)
    assert before.keys() == after.keys()
    expected = adapter.visual_tokens(inputs)
    for name in ("mask", "patch", "row", "column"):
        assert torch.equal(getattr(told[0], name), getattr(expected, name).repeat_interleave(copies, 0))
    assert told[0].images == copies * expected.images
    assert bool((told[0].image[told[0].mask].diff() >= 0).all())


def test_sizes_are_remembered_while_one_of_several_memories_is_there(families: ModuleType) -> None:
    model = families.model("llava_next")
    adapter, inputs = adapter_for(model), families.inputs("llava_next", model)
    given = {name: inputs[name] for name in ("pixel_values", "image_sizes")}

    def features() -> Any:
        with torch.no_grad():
            return model.get_image_features(**given, return_dict=True)

    outer, inner = adapter.remember_sizes(), adapter.remember_sizes()
    assert torch.equal(remembered(features())["image_sizes"], inputs["image_sizes"])
    inner.remove()
    assert torch.equal(remembered(features())["image_sizes"], inputs["image_sizes"])
    outer.remove()
    assert remembered(features()) == {}
    assert "get_image_features" not in vars(model.model)


def test_text_alone_has_no_visual_tokens_in_any_family(families: ModuleType) -> None:
    for family in TILED + QWEN:
        adapter = adapter_for(families.model(family))
        visual = adapter.visual_tokens({"input_ids": torch.tensor([[3, 4, 5], [6, 7, 8]])})
        assert visual.images == 0
        assert not bool(visual.mask.any())


def test_frames_of_internvl_are_images_and_tiles_in_a_row_one_image(families: ModuleType) -> None:
    adapter = adapter_for(families.model("internvl"))
    visual = adapter.visual_tokens({"input_ids": torch.tensor([[3, *[IMAGE] * 8, 4, *[IMAGE] * 4], [5] * 14])})
    assert visual.image[0].tolist() == [-1, *[0] * 8, -1, *[1] * 4]
    assert visual.tile[0].tolist() == [-1, *[0] * 4, *[1] * 4, -1, *[2] * 4]
    assert visual.patch[0].tolist() == [-1, 0, 1, 2, 3, 0, 1, 2, 3, -1, 0, 1, 2, 3]


# Bad input ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("family", "wanted", "missing"),
    [
        ("llava_next", {}, "image_sizes"),
        ("llava_onevision", {}, "image_sizes"),
        ("llava_onevision", {"images": 0, "video": True}, "pixel_values_videos"),
        ("video_llava", {"images": 0, "video": True}, "pixel_values_videos"),
        *((family, {}, "image_grid_thw") for family in QWEN),
        *((family, {"images": 0, "video": True}, "video_grid_thw") for family in QWEN),
    ],
)
def test_a_layout_that_cannot_be_read_is_refused_with_what_to_give(
    families: ModuleType, family: str, wanted: dict[str, Any], missing: str
) -> None:
    model = families.model(family)
    adapter, inputs = adapter_for(model), families.inputs(family, model, **wanted)
    del inputs[missing]
    with pytest.raises(InputError, match=f"^{missing}: not given.*pass {missing}"):
        adapter.visual_tokens(inputs)


@pytest.mark.parametrize("family", [*TILED, *QWEN])
def test_placeholders_that_do_not_fit_the_images_are_refused(families: ModuleType, family: str) -> None:
    model = families.model(family)
    adapter, inputs = adapter_for(model), families.inputs(family, model)
    first = (inputs["input_ids"] == IMAGE).nonzero()[0]
    for token, name in ((3, "fewer"), (IMAGE, "more")):
        ids = inputs["input_ids"].clone()
        ids[first[0], first[1] - int(name == "more")] = token
        with pytest.raises(InputError, match=r"input_ids: .*placeholders"):
            adapter.visual_tokens({**inputs, "input_ids": ids})


def test_images_without_placeholders_are_refused() -> None:
    kinds, layout = torch.tensor([[-1, 0, 0, -1]]), ImageLayout.of_grid(1, 2)
    assert place_layouts(kinds, [[layout]]).images == 1
    with pytest.raises(InputError, match="1 images or videos have no placeholders"):
        place_layouts(kinds, [[layout, layout]])


def test_prompts_are_repeated_only_where_all_copies_are_alike() -> None:
    layout = ImageLayout.of_grid(1, 2)
    kinds = torch.tensor([[-1, 0, 0], [-1, 0, 0]])
    assert place_layouts(kinds, [[layout]]).image.tolist() == [[-1, 0, 0], [-1, 1, 1]]
    with pytest.raises(InputError, match="image or video 0 of a prompt has no features"):
        place_layouts(torch.tensor([[-1, 0, 0], [0, 0, -1]]), [[layout]])


def test_neither_ids_nor_embeddings_are_refused(families: ModuleType) -> None:
    with pytest.raises(InputError, match="got neither input_ids nor inputs_embeds"):
        adapter_for(families.model("gemma3")).visual_tokens({})


def test_a_placeholder_without_an_embedding_asks_for_ids(families: ModuleType) -> None:
    adapter = adapter_for(families.model("gemma3", image_token_index=70))
    with pytest.raises(InputError, match=r"inputs_embeds: the tokens \(70,\) lie outside the 64 embeddings"):
        adapter.visual_tokens({"inputs_embeds": torch.zeros(1, 3, 32, dtype=torch.float64)})


def test_runs_end_with_their_row() -> None:
    assert run_lengths(torch.tensor([[0, 0, -1, 0], [0, 0, 0, -1], [-1, -1, -1, -1]])) == [2, 1, 3]
