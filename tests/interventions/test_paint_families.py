"""Which tokens PAINT finds informed on every family: the tower's attention in full, and tokens traced by disturbance.

The reference knows no layout. It shakes one patch behind the tower, or one packed row in front of the merger, and sees
which positions of the prompt feel it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch

import vlattn
from vlattn.errors import InputError
from vlattn.interventions.paint import PAINT
from vlattn.models.registry import adapter_for

IQR = 0.2
METHOD = PAINT(iqr=IQR, local_ratio=0.4)
# Positions (b, t) of the prompts that patch (tile, patch) reaches.
Reach = dict[tuple[int, int], set[tuple[int, int]]]
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


class Stop(Exception):
    """The decoder's door has been reached."""


@contextmanager
def hooked(*hooks: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def embeds_of(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """What the decoder would get [B, T, D]."""
    found: list[torch.Tensor] = []

    def stop(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(kwargs["inputs_embeds"].clone())
        raise Stop

    language = adapter_for(model).language_model
    with hooked(language.register_forward_pre_hook(stop, with_kwargs=True)), torch.no_grad(), pytest.raises(Stop):
        model(**inputs)
    return found[0]


def first_output(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def replaced(output: Any, new: torch.Tensor) -> Any:
    return (new, *output[1:]) if isinstance(output, tuple) else new


def tower_rows(model: Any, inputs: dict[str, Any]) -> Reach:
    """{(tile, patch): positions (b, t) of the prompts that its feature reaches}, by shaking one after the other."""
    adapter, shape, shaken = adapter_for(model), [], [(-1, -1)]
    lead = int(adapter.has_cls)

    def shake(module: Any, args: tuple[Any, ...], output: Any) -> Any:
        hidden = first_output(output).clone()
        shape[:] = [hidden.shape[0], hidden.shape[1] - lead]
        tile, patch = shaken[0]
        if tile >= 0:
            hidden[tile, lead + patch] += torch.linspace(1, 2, hidden.shape[-1]).to(hidden)
        return replaced(output, hidden)

    hooks = [layers[adapter.feature_layer].register_forward_hook(shake, prepend=True) for layers in adapter.encoders]
    found = {}
    with hooked(*hooks):
        still = embeds_of(model, inputs)
        for shaken[0] in [(tile, patch) for tile in range(shape[0]) for patch in range(shape[1])]:
            moved = (embeds_of(model, inputs) != still).any(-1).nonzero()
            found[shaken[0]] = {(b, t) for b, t in moved.tolist()}
    return found


def tower_weights(model: Any, inputs: dict[str, Any], layer: int) -> torch.Tensor:
    """What the eager tower's layer attends to, as it says itself [tiles, H, N, N]."""
    adapter, found = adapter_for(model), []

    def keep(module: Any, args: tuple[Any, ...], output: Any) -> None:
        found.append(output[1])

    attentions = [getattr(layers[layer], "self_attn", None) or layers[layer].attention for layers in adapter.encoders]
    with hooked(*(attention.register_forward_hook(keep) for attention in attentions)):
        embeds_of(model, inputs)
    return found[0].double()


def patch_scores(model: Any, inputs: dict[str, Any], layer: int) -> torch.Tensor:
    """[tiles, patches]: from CLS, or received from all patches that are no padding."""
    weights = tower_weights(model, inputs, layer).sum(1)
    if adapter_for(model).has_cls:
        return weights[:, 0, 1:]
    seen = weights.sum(1) > 0  # padding is seen by nobody
    return (weights * seen[..., None]).sum(1)


def expected_choice(
    boost: Any,
    reach: dict[tuple[int, int], set[tuple[int, int]]],
    early: torch.Tensor,
    late: torch.Tensor,
    merges: bool,
) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
    """(local, summary) positions; tiles are chosen from one by one.

    merges: whether patches that reach the same position add up; else such positions are nobody's.
    """
    sources: dict[tuple[int, int], set[tuple[int, int]]] = defaultdict(set)
    for source, places in reach.items():
        for place in places:
            sources[place].add(source)
    tiles: dict[int, dict[Any, list[int]]] = defaultdict(lambda: defaultdict(list))
    for (tile, patch), places in reach.items():
        own = frozenset(place for place in places if merges or len(sources[place]) == 1)
        # A patch that was cropped off, or shrunk, is a token of its own that has no place.
        tiles[tile][own or ("nowhere", patch)].append(patch)
    local, summary = set(), set()
    for tile, tokens in tiles.items():
        groups = sorted(tokens, key=lambda group: tokens[group][0])
        scores = [torch.stack([x[tile, tokens[group]].sum() for group in groups]) for x in (early, late)]
        found = boost.informed(*scores, local=0.4, iqr=IQR)
        for chosen, into in zip(found, (local, summary), strict=True):
            into |= {place for i in chosen for place in groups[i] if isinstance(place, tuple)}
    return local, summary


def positions(mask: torch.Tensor) -> set[tuple[int, int]]:
    return {(b, t) for b, t in mask.nonzero().tolist()}


def assert_chosen(trace: Any, expected: tuple[set[tuple[int, int]], set[tuple[int, int]]]) -> None:
    assert positions(trace.notes["local"]) == expected[0]
    assert positions(trace.notes["summary"]) == expected[1]
    assert expected[0]
    assert expected[1]


CASES = [
    ("llava_next", {}, {}),
    ("llava_onevision", {"images": 2}, {}),
    ("llava_onevision", {"images": 1}, {}),
    ("video_llava", {}, {}),
    ("video_llava", {"images": 0, "video": True}, {}),
    ("internvl", {}, {"image_size": 24}),
    ("idefics3", {}, {}),
    ("smolvlm", {"images": 2}, {}),
    ("gemma3", {"images": 2}, {}),
]


@pytest.mark.parametrize(("family", "prompt", "changes"), CASES, ids=lambda x: x if isinstance(x, str) else "")
def test_the_choice_is_made_by_tile_among_visual_tokens(
    families: ModuleType, naive_boost: ModuleType, family: str, prompt: dict[str, Any], changes: dict[str, Any]
) -> None:
    model = families.model(family, attn="eager", dtype=torch.float32)
    inputs = families.inputs(family, model, **prompt)
    adapter = adapter_for(model)
    early, late = (patch_scores(model, inputs, layer) for layer in (0, adapter.feature_layer))
    expected = expected_choice(naive_boost, tower_rows(model, inputs), early, late, not adapter.patchwise)
    with torch.no_grad(), METHOD(model) as trace:
        model(**inputs)
    assert_chosen(trace, expected)


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_beams_choose_what_a_prompt_alone_does(families: ModuleType, family: str) -> None:
    model = families.model(family)
    inputs = families.inputs(family, model)
    with torch.no_grad(), METHOD(model) as trace:
        model(**inputs)
        chosen = trace.notes["local"], trace.notes["summary"]
        model.generate(**inputs, max_new_tokens=2, num_beams=3, do_sample=False)
        for name, before in zip(("local", "summary"), chosen, strict=True):
            assert torch.equal(trace.notes[name], before.repeat_interleave(3, 0))


# Video frames of LLaVA-OneVision: pooled, which mixes patches side by side --------------------------------------------
def test_frames_are_chosen_from_by_scores_pooled_as_their_features_are(
    families: ModuleType, naive_boost: ModuleType
) -> None:
    model = families.model("llava_onevision", attn="eager", dtype=torch.float32)
    inputs = families.inputs("llava_onevision", model, images=0, video=True)
    adapter = adapter_for(model)
    scores = [patch_scores(model, inputs, layer)[..., None] for layer in (0, adapter.feature_layer)]
    early, late = (model.model.apply_pooling(x)[..., 0] for x in scores)  # [frames, cells]
    local, summary = set(), set()
    for b in range(2):
        places = (inputs["input_ids"][b] == families.VIDEO).nonzero().flatten().tolist()
        for frame in range(2):
            found = naive_boost.informed(early[2 * b + frame], late[2 * b + frame], local=0.4, iqr=IQR)
            for chosen, into in zip(found, (local, summary), strict=True):
                into |= {(b, places[4 * frame + i]) for i in chosen}
    with torch.no_grad(), METHOD(model) as trace:
        model(**inputs)
    assert_chosen(trace, (local, summary))


# The Qwen-VL families -----------------------------------------------------------------------------------------------
def packed_scores(model: Any, inputs: dict[str, Any], layer: int) -> torch.Tensor:
    """Attention received by each packed patch from those of its image or frame [N], in the tower's order."""
    attention, calls = adapter_for(model).vision_attention(layer), []

    def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args[0] if args else kwargs["hidden_states"], kwargs))

    with hooked(attention.register_forward_pre_hook(keep, with_kwargs=True)):
        embeds_of(model, inputs)
    hidden, kwargs = calls[0]
    with torch.no_grad():
        q, k, _ = attention.qkv(hidden).view(len(hidden), 3, attention.num_heads, -1).unbind(1)
    cos, sin = (table[:, None] for table in kwargs["position_embeddings"])
    q, k = (x * cos + torch.cat([-x.chunk(2, -1)[1], x.chunk(2, -1)[0]], -1) * sin for x in (q, k))
    received = torch.zeros(len(q), dtype=q.dtype)
    bounds = kwargs["cu_seqlens"].tolist()
    for start, stop in pairwise(bounds):
        logits = torch.einsum("qhd,khd->hqk", q[start:stop], k[start:stop]) / q.shape[-1] ** 0.5
        received[start:stop] = logits.softmax(-1).sum((0, 1))
    return received


def packed_rows(model: Any, inputs: dict[str, Any]) -> list[tuple[int, int]]:
    """The position (b, t) that each packed row in front of the merger reaches, in the tower's order."""
    shaken, rows = [-1], []

    def shake(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0].clone()
        rows[:] = [len(hidden)]
        if shaken[0] >= 0:
            hidden[shaken[0]] += torch.linspace(1, 2, hidden.shape[-1]).to(hidden)
        return (hidden, *args[1:])

    found = []
    with hooked(adapter_for(model).projector.register_forward_pre_hook(shake)):
        still = embeds_of(model, inputs).nan_to_num(0)
        for shaken[0] in range(rows[0]):
            ((b, t),) = (embeds_of(model, inputs).nan_to_num(0) != still).any(-1).nonzero().tolist()
            found.append((b, t))
    return found


def packed_choice(
    boost: Any, places: list[tuple[int, int]], sizes: list[int], early: torch.Tensor, late: torch.Tensor
) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
    """sizes: tokens of each tile, in prompt order."""
    scores: list[dict[tuple[int, int], float]] = []
    for values in (early, late):
        scores.append(defaultdict(float))
        for place, value in zip(places, values.tolist(), strict=True):
            scores[-1][place] += value
    order, local, summary = sorted(scores[0]), set(), set()
    for size in sizes:
        tile, order = order[:size], order[size:]
        found = boost.informed(*(torch.tensor([s[p] for p in tile]) for s in scores), local=0.4, iqr=IQR)
        for chosen, into in zip(found, (local, summary), strict=True):
            into |= {tile[i] for i in chosen}
    assert not order
    return local, summary


@pytest.mark.parametrize("video", [False, True], ids=["images", "video"])
@pytest.mark.parametrize("family", QWEN)
def test_merged_cells_are_chosen_from_by_image_or_frame(
    families: ModuleType, naive_boost: ModuleType, family: str, video: bool
) -> None:
    model = families.model(family)
    inputs = families.inputs(family, model, images=0 if video else 2, video=video)
    layers = (2, 2) if family == "qwen2_5_vl" else (0, 2)  # its other layers attend in windows
    early, late = (packed_scores(model, inputs, layer) for layer in layers)
    grids = inputs["video_grid_thw" if video else "image_grid_thw"].tolist()
    sizes = [h * w // 4 for t, h, w in grids for _ in range(t)]
    expected = packed_choice(naive_boost, packed_rows(model, inputs), sizes, early, late)
    with torch.no_grad(), METHOD(model) as trace:
        model(**inputs)
    assert_chosen(trace, expected)


def test_the_first_and_last_layers_without_windows_are_read(families: ModuleType, naive_boost: ModuleType) -> None:
    model = families.model("qwen2_5_vl", vision_layers=5)
    model.config.vision_config.fullatt_block_indexes = [3, 1]
    model.model.visual.fullatt_block_indexes = [3, 1]
    inputs = families.inputs("qwen2_5_vl", model, images=2)
    early, late = (packed_scores(model, inputs, layer) for layer in (1, 3))
    sizes = [h * w // 4 for _, h, w in inputs["image_grid_thw"].tolist()]
    expected = packed_choice(naive_boost, packed_rows(model, inputs), sizes, early, late)
    with torch.no_grad(), METHOD(model) as trace:
        model(**inputs)
    assert_chosen(trace, expected)


def test_a_tower_of_windows_alone_is_refused(families: ModuleType) -> None:
    model = families.model("qwen2_5_vl")
    model.config.vision_config.fullatt_block_indexes = []
    with pytest.raises(InputError, match="every layer of its vision tower attends in windows"):
        PAINT()(model).attach()


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_beside_flowcut_cells_that_left_the_tower_move_no_quartile(
    families: ModuleType, naive_boost: ModuleType, family: str
) -> None:
    model = families.model(family, vision_layers=6)
    with torch.no_grad():
        for block in model.model.visual.blocks:  # attention so uneven that patches leave before the last layer
            block.attn.qkv.weight[:32] *= 10
    inputs = families.inputs(family, model)
    grids = inputs["image_grid_thw"].prod(1).tolist()
    whole = packed_rows(model, inputs)
    flowcut = vlattn.FlowCut(keep=2, group_aligned=True)
    with flowcut(model) as trace:
        late = packed_scores(model, inputs, 5)
        entering = [whole[sum(grids[:b]) + i] for b in range(2) for i in trace.kept_by_layer[3][b].tolist() if i >= 0]
    assert len(late) == len(entering) < len(whole)
    early, rows = packed_scores(model, inputs, 0), whole
    if family == "qwen2_5_vl":  # its other layers attend in windows
        early, rows = late, entering

    def summed(places: list[tuple[int, int]], values: torch.Tensor, b: int) -> dict[tuple[int, int], float]:
        found: dict[tuple[int, int], float] = defaultdict(float)
        for place, value in zip(places, values.tolist(), strict=True):
            if place[0] == b:
                found[place] += value
        return found

    local, summary = set(), set()
    for b in range(2):
        by_cell = summed(entering, late, b)
        scores = torch.tensor(list(by_cell.values()))
        summary |= {list(by_cell)[i] for i in naive_boost.informed(scores, scores, iqr=IQR)[1]}
        first = summed(rows, early, b)
        local |= set(sorted(first, key=lambda place: -first[place])[: int(0.4 * (grids[b] // 4))]) - summary
    with torch.no_grad(), vlattn.compose(flowcut, METHOD)(model) as trace:
        logits = model(**inputs).logits[:, -1]
    assert_chosen(trace, (local, summary))
    with torch.no_grad(), flowcut(model):
        assert not torch.isclose(model(**inputs).logits[:, -1], logits).all()


def test_flowcut_that_mixes_patches_of_cells_is_refused(families: ModuleType) -> None:
    model = families.model("qwen2_vl")
    with pytest.raises(InputError, match=r"FlowCut mixes patches into new tokens.*give FlowCut group_aligned=True"):
        vlattn.compose(vlattn.FlowCut(keep=2), PAINT())(model).attach()


@pytest.mark.parametrize("family", ["llava_onevision", "video_llava", *QWEN])
def test_images_and_videos_in_one_batch_are_refused(families: ModuleType, family: str) -> None:
    model = families.model(family)
    inputs = families.inputs(family, model, images=1, video=True)
    with torch.no_grad(), PAINT()(model), pytest.raises(InputError, match="images and videos of one batch take two"):
        model(**inputs)


@pytest.mark.parametrize("family", ["idefics3", "gemma3", "internvl", "llava_onevision", *QWEN])
def test_features_that_did_not_pass_through_the_tower_are_refused(families: ModuleType, family: str) -> None:
    model = families.model(family)
    inputs = families.inputs(family, model)
    pixels = {name: inputs.pop(name) for name in ("pixel_values", "pixel_attention_mask") if name in inputs}
    assert pixels
    with torch.no_grad(), PAINT()(model), pytest.raises(InputError, match="did not pass through the vision tower"):
        model(**inputs)
