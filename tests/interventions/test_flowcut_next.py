"""FlowCut on LLaVA-NeXT against plain loops: the tower tile by tile, the stitched order, the cut in the decoder."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers as hf

import vlattn
from vlattn.errors import InputError
from vlattn.runtime.hooks import cache_of

LAYERS, FEATURE = 6, 4  # vision layers, and the one whose output is the image feature
TILES = {(14, 40): (1, 2), (36, 30): (2, 2), (9, 32): (1, 2), (40, 16): (2, 1)}
"""Rows and columns of tiles that images of these sizes are cut into."""
STEPS = 4

Inputs = dict[str, torch.Tensor]


def helper(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tiles() -> ModuleType:
    """`tests/naive_flowcut_tiles.py`: where the tokens of tiles go, and prompts written out."""
    return helper("naive_flowcut_tiles")


@pytest.fixture(scope="module")
def stage() -> ModuleType:
    """`tests/naive_flowcut_decoder.py`: the decoder with its cut in plain loops."""
    return helper("naive_flowcut_decoder")


@pytest.fixture
def llava_next(families: ModuleType) -> Callable[..., Any]:
    def make(**options: Any) -> Any:
        return families.model("llava_next", **{"vision_layers": LAYERS, "seed": 2, **options})

    return make


def with_positions(inputs: Inputs) -> Inputs:
    """With the position ids that `generate` gives: a bare forward counts padding."""
    return {**inputs, "position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)}


def images_of(
    tiles: ModuleType, naive: ModuleType, model: Any, inputs: Inputs, keep: int, per_image: bool = False
) -> tuple[list[Any], dict[str, Any]]:
    """Every image of a batch as the plain loops leave it, and what they say of the tiles, all in one encoder batch."""
    grids = [TILES[tuple(size)] for size in inputs["image_sizes"].tolist()]
    pixels = torch.cat(
        [own[: 1 + high * wide] for own, (high, wide) in zip(inputs["pixel_values"], grids, strict=True)]
    )
    tower = model.model.vision_tower
    with torch.no_grad():
        x = naive.embeddings(tower, pixels)
        flow: dict[str, Any]
        if per_image:
            each = [naive.naive_flowcut(tower, one[None], keep // 2, FEATURE) for one in x]
            flow = {"kept": [one["kept"][0] for one in each], "feature": torch.cat([one["feature"] for one in each])}
        else:
            flow = naive.naive_flowcut(tower, x, keep // 2, FEATURE)
        features = model.model.multi_modal_projector(flow["feature"][:, 1:])
    placed, before = [], 0
    for size, (high, wide) in zip(inputs["image_sizes"].tolist(), grids, strict=True):
        kept = flow["kept"][before : before + 1 + high * wide]
        order, slots, total = tiles.stitched(kept, high, wide, 4, tuple(size))
        rows = [features[before + tile][kept[tile].index(patch)] for tile, patch in order]
        placed.append(tiles.Placed(torch.stack(rows), slots, total))
        before += 1 + high * wide
    return placed, flow


# The tower and what enters the decoder --------------------------------------------------------------------------------
@pytest.mark.parametrize("count", ["batch_max", "per_image"])
@pytest.mark.parametrize(("keep", "images"), [(8, 1), (13, 2), (2, 1)])
def test_half_the_budget_of_every_tile_enters_the_decoder_in_raster_order_of_the_stitched_grid(
    llava_next: Any, families: ModuleType, naive: ModuleType, tiles: ModuleType, stage: ModuleType,
    keep: int, images: int, count: Any,
) -> None:  # fmt: skip
    """Images of three and five tiles in a left-padded batch: the small view first, cropped cells gone, no newline."""
    model = llava_next()
    inputs = with_positions(families.inputs("llava_next", model, images=images))
    placed, flow = images_of(tiles, naive, model, inputs, keep, count == "per_image")
    with torch.no_grad(), vlattn.FlowCut(keep=keep, count=count)(model) as trace, stage.watching(model) as seen:
        model(**inputs)
    assert trace.kept is not None
    assert trace.kept.tolist() == flow["kept"]
    assert trace.kept.shape[1] == keep // 2
    if count == "batch_max":
        assert {layer: ids.tolist() for layer, ids in trace.kept_by_layer.items()} == flow["by_layer"]
        assert sorted(flow["by_layer"]) == [1, 3]
    (entered,) = seen
    prompts = tiles.sequences(model, inputs, placed)
    assert entered.embeds.shape[1] == max(len(prompt.embeds) for prompt in prompts)
    for b, prompt in enumerate(prompts):
        alive = entered.alive[b]
        torch.testing.assert_close(entered.embeds[b][alive], prompt.embeds, rtol=1e-10, atol=1e-10)
        assert entered.positions[b][alive].tolist() == list(range(len(prompt.embeds)))
    cropped = sum(len(flow["kept"]) * [keep // 2]) - sum(len(image.slots) for image in placed)
    assert cropped > 0  # the letterbox took some


def test_rows_of_two_tiles_side_by_side_interleave(families: ModuleType, stage: ModuleType) -> None:
    """Two tiles of 3 x 3 patches that keep [0, 4, 8] and [1, 3, 6], on a tower made to prefer bright patches.

    Red, bright or dark, goes into one direction, which alone the values read; green tells the patches apart. Queries
    are zero, so every patch gets equal attention and the last pruning removes everything at once.
    """
    model = families.model("llava_next", vision_layers=4, image_grid_pinpoints=[[12, 24]], **small())
    tower = model.model.vision_tower
    with torch.no_grad():
        for weight in tower.parameters():
            weight.zero_()
        for module in tower.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.weight.fill_(1)
        embed = tower.embeddings.patch_embedding.weight
        embed[0, 0], embed[1, 0], embed[2, 1], embed[3, 1] = 1.0, -1.0, 1.0, -1.0
        for layer in tower.encoder.layers:
            layer.self_attn.v_proj.weight[0, 0] = 1
            layer.self_attn.v_proj.bias[0] = 4  # dark ones read as less than this, bright ones as more
    bright = [[0, 1, 2], [0, 4, 8], [1, 3, 6]]
    pixels = torch.zeros(3, 3, 12, 12, dtype=torch.float64)
    for tile in range(3):
        for patch in range(9):
            at = (slice(patch // 3 * 4, patch // 3 * 4 + 4), slice(patch % 3 * 4, patch % 3 * 4 + 4))
            pixels[tile, 0][at] = 1 if patch in bright[tile] else -1
            pixels[tile, 1][at] = (9 * tile + patch) / 100
    inputs = families._prompts([[[families.IMAGE] * (9 + 3 * 7)]], torch.Generator().manual_seed(0))
    inputs |= {"pixel_values": pixels[None], "image_sizes": torch.tensor([[12, 24]])}
    with torch.no_grad(), vlattn.FlowCut(keep=6, semantic="none")(model) as trace, stage.watching(model) as seen:
        model(**inputs)
    with torch.no_grad():  # the layers pass on what they get
        features = model.model.multi_modal_projector(tower.pre_layrnorm(tower.embeddings(pixels))[:, 1:])
    assert trace.kept is not None
    assert trace.kept.tolist() == bright
    order = [(0, 0), (0, 1), (0, 2), (1, 0), (2, 1), (1, 4), (2, 3), (1, 8), (2, 6)]
    expected = torch.stack([features[tile, patch] for tile, patch in order])
    torch.testing.assert_close(seen[0].embeds[0, 3:-3], expected, rtol=1e-10, atol=1e-10)
    assert len(features.flatten(0, 1).unique(dim=0)) == 27


def small() -> dict[str, Any]:
    """A tower with tiles of 3 x 3 patches."""
    vision = hf.CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=12, patch_size=4
    )
    return {"vision_config": vision, "image_seq_length": 9}


def test_the_batchs_largest_count_couples_tiles_and_a_count_of_each_image_does_not(
    llava_next: Any, families: ModuleType, naive: ModuleType, tiles: ModuleType
) -> None:
    model = llava_next()
    inputs = families.inputs("llava_next", model)
    both = {name: inputs[name] for name in ("pixel_values", "image_sizes")}
    first = {name: value[:1] for name, value in both.items()}

    def kept(count: Any, given: Inputs) -> tuple[list[list[int]], list[list[int]]]:
        """The patches left after the first pruning and at the end."""
        with torch.no_grad(), vlattn.FlowCut(keep=8, count=count)(model) as trace:
            model.model.get_image_features(**given, return_dict=True)
        assert trace.kept is not None
        return [[i for i in row if i >= 0] for row in trace.kept_by_layer[1].tolist()], trace.kept.tolist()

    for now, alone in zip(kept("per_image", both), kept("per_image", first), strict=True):
        assert now[:3] == alone
    assert kept("per_image", both)[1] == images_of(tiles, naive, model, inputs, 8, per_image=True)[1]["kept"]
    together, alone = kept("batch_max", both)[0][:3], kept("batch_max", first)[0]
    assert all(set(less) < set(more) for less, more in zip(together, alone, strict=True))
    assert kept("batch_max", both)[1][:3] != kept("batch_max", first)[1]
    shared = images_of(tiles, naive, model, inputs, 8)[1]
    assert kept("batch_max", both) == (shared["by_layer"][1], shared["kept"])


@pytest.mark.parametrize(("keep", "target"), [(4, 1), (9, 3), (14, 6)])
def test_cls_counts_inside_the_half_of_the_budget_where_the_model_hands_it_over(
    llava_next: Any, keep: int, target: int
) -> None:
    """transformers cannot stitch tiles that carry their CLS, so this looks at the tower alone."""
    model = llava_next(vision_feature_select_strategy="full")
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad(), vlattn.FlowCut(keep=keep)(model) as trace:
        states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    assert states[FEATURE + 1].shape[1] == 1 + target
    assert trace.kept_by_layer[FEATURE - 1].shape == (3, target)


@pytest.mark.parametrize(("strategy", "keep", "least"), [("default", 1, 2), ("full", 3, 4), ("full", 2, 4)])
def test_a_budget_whose_half_is_nothing_is_refused(llava_next: Any, strategy: str, keep: int, least: int) -> None:
    model = llava_next(vision_feature_select_strategy=strategy)
    with pytest.raises(
        InputError, match=f"keep: got {keep}; half of it is kept of every tile, so give at least {least}"
    ):
        vlattn.attach(model, vlattn.FlowCut(keep=keep))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_budget_of_all_tokens_gives_the_stock_logits_bit_for_bit(
    llava_next: Any, families: ModuleType, dtype: torch.dtype
) -> None:
    model = llava_next(dtype=dtype)
    inputs = families.inputs("llava_next", model, images=2)
    largest = max(int((row == families.IMAGE).sum()) for row in inputs["input_ids"])
    more = {"max_new_tokens": STEPS, "do_sample": False}
    with torch.no_grad():
        expected, said = model(**inputs).logits, model.generate(**inputs, **more)
        with vlattn.FlowCut(keep=largest)(model) as trace:
            assert torch.equal(model(**inputs).logits, expected)
            assert torch.equal(model.generate(**inputs, **more), said)
    assert trace.kept is not None
    assert trace.kept.tolist() == [list(range(16))] * 14
    assert trace.kept_by_layer == {}
    assert trace.kept_in_decoder == {}


# The decoder ----------------------------------------------------------------------------------------------------------
def decoded(
    stage: ModuleType, model: Any, entered: Any, prompt: Any, b: int, keep: int, compact: bool,
    new: Sequence[int] = (), full: int = 0,
) -> Any:  # fmt: skip
    """The plain decoder on what entered as prompt b, followed by the tokens `new`; full: length of the stock prompt."""
    embeds = entered.embeds[b][entered.alive[b]]
    places = torch.arange(len(embeds)) if compact else prompt.places
    behind = torch.arange(len(new)) + (len(embeds) if compact else full)
    table = model.get_input_embeddings().weight.detach()
    whole = torch.cat([embeds, table[torch.tensor(list(new), dtype=torch.long)]])
    return stage.decode(
        model, whole, torch.cat([places, behind]), prompt.images, keep, compact=compact, prompt=len(embeds)
    )


@contextmanager
def layer_positions(model: Any) -> Iterator[list[list[torch.Tensor]]]:
    """The position ids that every decoder layer gets, call by call; entered behind a method."""
    found: list[list[torch.Tensor]] = [[] for _ in model.model.language_model.layers]
    handles = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs, into=into: into.append(kwargs["position_ids"]), with_kwargs=True
        )
        for layer, into in zip(model.model.language_model.layers, found, strict=True)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("positions", ["compact", "preserve"])
@pytest.mark.parametrize(("keep", "images"), [(8, 1), (6, 2)], ids=["one-image", "two-images"])
def test_the_cut_behind_layer_1_the_logits_and_the_cache_are_those_of_a_plain_decoder(
    llava_next: Any, families: ModuleType, naive: ModuleType, tiles: ModuleType, stage: ModuleType,
    keep: int, images: int, positions: Any,
) -> None:  # fmt: skip
    model = llava_next()
    inputs = with_positions(families.inputs("llava_next", model, images=images))
    placed, _ = images_of(tiles, naive, model, inputs, keep)
    prompts = tiles.sequences(model, inputs, placed)
    method = vlattn.FlowCut(keep=keep, positions=positions)
    with torch.no_grad(), method(model) as trace, stage.watching(model) as seen:
        out = model(**inputs, use_cache=True)
    lengths, cut = [], []
    for b, prompt in enumerate(prompts):
        expected = decoded(stage, model, seen[0], prompt, b, keep, positions == "compact")
        assert expected.gap > 1e-9
        torch.testing.assert_close(out.logits[b, -len(expected.kept) :], expected.logits, rtol=1e-10, atol=1e-10)
        lengths.append(expected.lengths)
        visual = sum(map(len, prompt.images))
        left = sum(min(len(image), keep) for image in prompt.images)
        assert [layer[b] for layer in trace.visual_by_layer] == [visual] * 2 + [left] * 3
        assert expected.lengths[2:] == [expected.lengths[0] - visual + left] * 2
        slots = [slot for slot in trace.kept_in_decoder[1][b].tolist() if slot >= 0]
        assert slots == [prompt.slots[i] for i in expected.kept if prompt.slots[i] >= 0]
        cut.append(visual - left)
    assert max(cut) > 0
    longest = [max(row[layer] for row in lengths) for layer in range(4)]
    assert trace.decoder_lengths == longest
    cache = cache_of(dict(out))
    assert [cache.get_seq_length(layer) for layer in range(4)] == longest


@pytest.mark.parametrize("positions", ["compact", "preserve"])
@pytest.mark.parametrize(("keep", "images"), [(8, 1), (6, 2)], ids=["one-image", "two-images"])
def test_cached_decoding_equals_recomputing_everything_with_the_same_kept_set(
    llava_next: Any, families: ModuleType, naive: ModuleType, tiles: ModuleType, stage: ModuleType,
    keep: int, images: int, positions: Any,
) -> None:  # fmt: skip
    model = llava_next()
    inputs = families.inputs("llava_next", model, images=images)
    placed, _ = images_of(tiles, naive, model, inputs, keep)
    prompts = tiles.sequences(model, inputs, placed)
    method = vlattn.FlowCut(keep=keep, positions=positions)
    with torch.no_grad(), method(model), stage.watching(model) as seen:
        out = model.generate(
            **inputs, max_new_tokens=STEPS, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    new = out.sequences[:, -STEPS:]
    for b, prompt in enumerate(prompts):
        full = int(inputs["attention_mask"][b].sum())
        expected = decoded(stage, model, seen[0], prompt, b, keep, positions == "compact", new[b, :-1].tolist(), full)
        for step in range(STEPS):  # generate hands logits on in fp32
            torch.testing.assert_close(out.logits[step][b], expected.logits[step - STEPS].float(), rtol=2e-6, atol=2e-6)
    assert len(set(new.flatten().tolist())) > 2


def test_layers_below_the_cut_count_all_that_entered_and_those_above_what_is_left(
    llava_next: Any, families: ModuleType, naive: ModuleType, tiles: ModuleType
) -> None:
    """Positions restart above the cut; at decode steps the drop is taken off there, and nothing below."""
    model, keep = llava_next(), 8
    inputs = families.inputs("llava_next", model)
    placed, _ = images_of(tiles, naive, model, inputs, keep)
    prompts = tiles.sequences(model, inputs, placed)
    with torch.no_grad(), vlattn.FlowCut(keep=keep)(model), layer_positions(model) as seen:
        model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)
    for b, prompt in enumerate(prompts):
        entered = len(prompt.embeds)
        left = entered - len(prompt.images[0]) + keep
        for layer, length in enumerate((entered, entered, left, left)):
            assert seen[layer][0][b, -length:].tolist() == list(range(length))
            assert [ids[b].tolist() for ids in seen[layer][1:]] == [[length + step] for step in range(STEPS - 1)]
    drops = [len(prompt.images[0]) - keep for prompt in prompts]
    assert min(drops) > 0
    assert len(set(drops)) == 2


def test_the_decoder_leaves_images_alone_that_are_within_the_budget(
    llava_next: Any, families: ModuleType, naive: ModuleType, tiles: ModuleType, stage: ModuleType
) -> None:
    """A letterboxed image loses most of its tiles' tokens to the cropping: what is left fits, stock code runs on it."""
    keep = 14
    for seed in range(40):
        model = llava_next(seed=seed)
        inputs = families.inputs("llava_next", model, batch=3)
        inputs = {name: value[2:] for name, value in inputs.items()}  # the image of 9 x 32
        inputs = {**inputs, "input_ids": inputs["input_ids"][:, inputs["attention_mask"][0].bool()]}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        (placed,), _ = images_of(tiles, naive, model, inputs, keep)
        if len(placed.slots) <= keep:
            break
    (prompt,) = tiles.sequences(model, inputs, [placed])
    assert len(placed.slots) <= keep < placed.total
    with torch.no_grad():
        with vlattn.FlowCut(keep=keep)(model) as trace, stage.watching(model) as seen:
            found = model(**inputs).logits
        torch.testing.assert_close(seen[0].embeds[0], prompt.embeds, rtol=1e-10, atol=1e-10)
        expected = model(inputs_embeds=seen[0].embeds).logits
    assert torch.equal(found, expected)
    assert trace.kept_in_decoder == {}
    assert trace.visual_by_layer == [[len(placed.slots)]] * 5


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eager_attention_and_half_precision_keep_as_many_tokens_and_give_finite_logits(
    llava_next: Any, families: ModuleType, attn: str, dtype: torch.dtype
) -> None:
    model = llava_next(attn=attn, dtype=dtype)
    inputs = families.inputs("llava_next", model)
    with torch.no_grad(), vlattn.FlowCut(keep=8)(model) as trace:
        logits = model(**inputs).logits
    assert logits.dtype == dtype
    assert bool(logits[:, -1].isfinite().all())
    assert trace.kept is not None
    assert trace.kept.shape == (8, 4)
    assert trace.visual_by_layer[2][1] == 8  # the other image loses more to its cropping


def test_a_decoder_without_the_layer_to_cut_behind_is_refused(llava_next: Any) -> None:
    model = llava_next(decoder_layers=1)
    with pytest.raises(InputError, match="layer: got 1, but this model's decoder has layers 0 to 0"):
        vlattn.attach(model, vlattn.FlowCut(keep=8))


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"decoder_layer": -1}, "decoder_layer: got -1"),
        ({"decoder_layer": True}, "decoder_layer: got True"),
        ({"decoder_layer": 1.0}, "decoder_layer: got 1.0"),
        ({"group_aligned": "yes"}, "group_aligned: got 'yes'"),
    ],
)
def test_a_wrong_setting_of_the_second_stage_is_refused_by_name(fields: dict[str, Any], names: str) -> None:
    with pytest.raises(InputError, match=names):
        vlattn.FlowCut(keep=8, **fields)
