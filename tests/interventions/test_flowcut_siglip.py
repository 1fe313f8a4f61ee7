"""FlowCut in towers without CLS against plain loops: SigLIP under LLaVA and under LLaVA-OneVision's tiles."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import vlattn
from vlattn.errors import InputError
from vlattn.interventions.flowcut_score import flowcut_score

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
    """`tests/naive_flowcut_tiles.py`: a tower without CLS in plain loops, and prompts written out."""
    return helper("naive_flowcut_tiles")


@pytest.fixture(scope="module")
def stage() -> ModuleType:
    """`tests/naive_flowcut_decoder.py`: the decoder with its cut in plain loops."""
    return helper("naive_flowcut_decoder")


def encode(model: Any, method: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """(features [images, placeholders, D] with NaN where dropped, trace)."""
    with torch.no_grad(), method(model) as trace:
        output = model.model.get_image_features(pixels, return_dict=True)
    return torch.stack(list(output.pooler_output)), trace


def pixels_of(model: Any, count: int, seed: int = 0) -> torch.Tensor:
    side = model.config.vision_config.image_size
    generator = torch.Generator().manual_seed(50 + seed)
    return torch.randn(count, 3, side, side, generator=generator, dtype=torch.float64).to(model.dtype)


# LLaVA with a SigLIP tower --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("semantic", ["auto", "none", "softmax", "cosine"])
@pytest.mark.parametrize(
    ("layers", "layer", "keep", "batch", "seed"),
    [(6, -2, 9, 1, 0), (6, -2, 5, 3, 1), (7, -2, 12, 2, 2), (5, -1, 1, 2, 3), (8, 5, 20, 2, 4)],
)
def test_ids_and_features_equal_the_plain_loops(
    llava: Any, tiles: ModuleType, layers: int, layer: int, keep: int, batch: int, seed: int, semantic: Any
) -> None:
    model = llava(siglip=True, layers=layers, feature_layer=layer, seed=seed)
    pixels = pixels_of(model, batch, seed)
    feature_layer = layer - 1 if layer >= 0 else layers + layer
    asked = "none" if semantic == "auto" else semantic
    flows = tiles.without_cls(model.model.vision_tower, pixels, keep, feature_layer, asked)
    found, trace = encode(model, vlattn.FlowCut(keep=keep, semantic=semantic), pixels)
    assert min(flow.gap for flow in flows) > 1e-9
    assert trace.kept is not None
    assert trace.kept.tolist() == [flow.kept for flow in flows]
    # Every second layer, the one before the feature layer among them.
    assert sorted(trace.kept_by_layer) == [i for i in range(feature_layer) if (feature_layer - 1 - i) % 2 == 0]
    for index, ids in trace.kept_by_layer.items():
        assert ids.tolist() == [flow.by_layer[index] for flow in flows]
    for image, flow in enumerate(flows):
        with torch.no_grad():
            expected = model.model.multi_modal_projector(flow.feature)
        torch.testing.assert_close(found[image, flow.kept], expected, rtol=1e-10, atol=1e-10)
        assert bool(found[image, sorted(set(range(36)) - set(flow.kept))].isnan().all())


def test_the_ways_to_compare_values_differ_in_what_they_keep(llava: Any) -> None:
    model = llava(siglip=True)
    pixels = pixels_of(model, 3)
    kept = [
        str(encode(model, vlattn.FlowCut(keep=9, semantic=semantic), pixels)[1].kept.tolist())
        for semantic in ("none", "softmax", "cosine")
    ]
    assert len(set(kept)) == 3


def test_without_value_similarity_a_score_is_the_share_of_attention_times_the_size_of_the_value() -> None:
    """With CLS, as elsewhere, each layer's attention is scaled to sum to 1 over patches."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(2, 3, 6, 4, generator=generator, dtype=torch.float64)
    cls = torch.rand(2, 3, 6, generator=generator, dtype=torch.float64)
    score, attention = flowcut_score(cls, v, semantic="none")
    for b in range(2):
        seen = [sum(float(cls[b, h, j]) for h in range(3)) / 3 for j in range(1, 6)]
        size = [sum(abs(float(v[b, :, j, d].sum()) / 3) for d in range(4)) for j in range(1, 6)]
        expected = [a / sum(seen) * s for a, s in zip(seen, size, strict=True)]
        torch.testing.assert_close(score[b], torch.tensor(expected, dtype=torch.float64))
        torch.testing.assert_close(attention[b], torch.tensor(seen, dtype=torch.float64))


def test_without_value_similarity_a_tower_with_cls_keeps_other_patches(llava: Any, naive: ModuleType) -> None:
    """One pruning, of the average of two layers' scores."""
    model = llava(layers=3, feature_layer=-1)
    tower, pixels, scores = model.model.vision_tower, pixels_of(model, 3), []
    with torch.no_grad():
        x = naive.embeddings(tower, pixels)
        for layer in tower.encoder.layers[:2]:
            y, attention = layer.layer_norm1(x), layer.self_attn
            q, k, v = (naive.split(getattr(attention, f"{name}_proj")(y), 2) for name in "qkv")
            cls = (q[:, :, :1] @ k.transpose(-1, -2) / 8**0.5).softmax(-1)[:, :, 0, 1:].mean(1)
            scores.append(cls / cls.sum(1, keepdim=True) * v.mean(1)[:, 1:].abs().sum(-1) / 2)
            x = layer(x, None)
    kept = {
        semantic: encode(model, vlattn.FlowCut(keep=7, semantic=semantic), pixels)[1].kept.tolist()
        for semantic in ("none", "softmax", "cosine")
    }
    assert kept["none"] == (scores[0] + scores[1]).topk(7).indices.sort().values.tolist()
    assert kept["none"] not in (kept["softmax"], kept["cosine"])


def test_a_projector_that_runs_without_its_tower_is_an_error(llava: Any) -> None:
    model = llava(siglip=True)
    with vlattn.FlowCut(keep=9)(model), pytest.raises(InputError, match="model: its projector ran without"):
        model.model.multi_modal_projector(torch.zeros(1, 36, 16, dtype=torch.float64))


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("semantic", ["none", "softmax", "cosine"])
def test_per_image_gives_each_image_what_it_has_alone(llava: Any, attn: str, semantic: Any) -> None:
    model = llava(siglip=True, layers=8, attn=attn, sharpness=4.0)
    method = vlattn.FlowCut(keep=9, count="per_image", semantic=semantic)
    pixels = pixels_of(model, 3)
    ragged, trace = encode(model, method, pixels)
    alone = [encode(model, method, image[None]) for image in pixels]
    assert trace.kept is not None
    assert trace.kept.tolist() == [one.kept[0].tolist() for _, one in alone]
    tolerance = 1e-10 if attn == "sdpa" else 1e-5  # eager attention rounds its weights to fp32 on the way
    together = torch.cat([features for features, _ in alone])
    torch.testing.assert_close(ragged, together, equal_nan=True, rtol=tolerance, atol=tolerance)
    ragged_layers = 0
    for layer, rows in trace.kept_by_layer.items():
        for row, (_, one) in zip(rows.tolist(), alone, strict=True):
            own = one.kept_by_layer[layer][0].tolist()
            assert row == own + [-1] * (len(row) - len(own))
        ragged_layers += bool((rows < 0).any())
    assert ragged_layers > 0


def test_decoding_equals_the_prompt_with_the_kept_features_written_out(
    llava: Any, prompts: Any, tiles: ModuleType
) -> None:
    model = llava(siglip=True)
    inputs = prompts(model, images=(1, 2))
    flows = tiles.without_cls(model.model.vision_tower, inputs["pixel_values"], 7, 4)
    with torch.no_grad():
        placed = [tiles.Placed(model.model.multi_modal_projector(flow.feature), flow.kept, 36) for flow in flows]
    with torch.no_grad(), vlattn.FlowCut(keep=7)(model) as trace:
        said = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)[:, -STEPS:]
    for b, prompt in enumerate(tiles.sequences(model, inputs, placed)):
        with torch.no_grad():
            expected = model.generate(inputs_embeds=prompt.embeds[None], max_new_tokens=STEPS, do_sample=False)
        assert torch.equal(said[b], expected[0, -STEPS:])
    assert trace.kept_in_decoder == {}  # one tile: no cut inside the decoder
    assert trace.visual_by_layer == [[7, 14]] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeping_every_patch_gives_the_stock_logits_bit_for_bit(llava: Any, prompts: Any, dtype: torch.dtype) -> None:
    model = llava(siglip=True, dtype=dtype)
    inputs = prompts(model, images=(1, 2))
    with torch.no_grad():
        expected = model(**inputs).logits
        with vlattn.FlowCut(keep=36)(model) as trace:
            assert torch.equal(model(**inputs).logits, expected)
    assert trace.kept is not None
    assert trace.kept.tolist() == [list(range(36))] * 3


@pytest.mark.parametrize("count", ["batch_max", "per_image"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_runs_to_finite_features(llava: Any, dtype: torch.dtype, count: Any) -> None:
    model = llava(siglip=True, layers=8, dtype=dtype, sharpness=20.0)
    found, trace = encode(model, vlattn.FlowCut(keep=9, count=count), pixels_of(model, 3))
    assert trace.kept is not None
    assert trace.kept.shape == (3, 9)
    for image, ids in enumerate(trace.kept.tolist()):
        assert ids == sorted(set(ids))
        assert bool(found[image, ids].isfinite().all())


# LLaVA-OneVision ------------------------------------------------------------------------------------------------------
@pytest.fixture
def onevision(families: ModuleType) -> Any:
    """Its features come from the last of six vision layers; nine patches a view."""
    return families.model("llava_onevision", vision_layers=6)


def projected(tiles: ModuleType, model: Any, pixels: torch.Tensor, target: int) -> tuple[list[Any], list[list[int]]]:
    """(features [target, D] of each view or tile, the patches they come from)."""
    flows = tiles.without_cls(model.model.vision_tower, pixels, target, 5)
    assert min(flow.gap for flow in flows) > 1e-9
    with torch.no_grad():
        return [model.model.multi_modal_projector(flow.feature) for flow in flows], [flow.kept for flow in flows]


def test_a_single_view_keeps_half_the_budget_and_the_newline_at_its_end(
    onevision: Any, families: ModuleType, tiles: ModuleType, stage: ModuleType
) -> None:
    """Of several images in a prompt each has one view; the decoder has nothing to cut."""
    inputs = families.inputs("llava_onevision", onevision, images=2)
    assert inputs["batch_num_images"].tolist() == [2, 2]
    features, kept = projected(tiles, onevision, inputs["pixel_values"][:, 0], 4)
    newline = onevision.model.image_newline.detach()[None]
    placed = [tiles.Placed(torch.cat([rows, newline]), [*ids, 9], 10) for rows, ids in zip(features, kept, strict=True)]
    with torch.no_grad(), vlattn.FlowCut(keep=8)(onevision) as trace, stage.watching(onevision) as seen:
        onevision(**inputs)
    assert trace.kept is not None
    assert trace.kept.tolist() == kept
    assert trace.kept_in_decoder == {}
    assert trace.visual_by_layer == [[10, 10]] * 5
    for b, prompt in enumerate(tiles.sequences(onevision, inputs, placed)):
        embeds = seen[0].embeds[b][seen[0].alive[b]]
        torch.testing.assert_close(embeds, prompt.embeds, rtol=1e-10, atol=1e-10)


def test_tiles_that_are_not_shrunk_are_stitched_and_cut_in_the_decoder_as_in_llava_next(
    onevision: Any, families: ModuleType, tiles: ModuleType, stage: ModuleType
) -> None:
    sizes, grids, keep = [(11, 30), (24, 8)], [(1, 2), (2, 1)], 8
    generator = torch.Generator().manual_seed(4)
    pixels = torch.randn(2, 3, 3, 12, 12, generator=generator, dtype=torch.float64)
    features, kept = projected(tiles, onevision, pixels.flatten(0, 1), keep // 2)
    placed = []
    for number, (size, grid) in enumerate(zip(sizes, grids, strict=True)):
        order, slots, total = tiles.stitched(kept[3 * number : 3 * number + 3], *grid, 3, size)
        rows = [features[3 * number + tile][kept[3 * number + tile].index(patch)] for tile, patch in order]
        placed.append(tiles.Placed(torch.stack(rows), slots, total))
    inputs = families._prompts([[[families.IMAGE] * image.total] for image in placed], generator)
    inputs |= {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}
    with torch.no_grad(), vlattn.FlowCut(keep=keep)(onevision) as trace, stage.watching(onevision) as seen:
        out = onevision.generate(
            **inputs, max_new_tokens=STEPS, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    assert trace.kept is not None
    assert trace.kept.tolist() == kept
    new = out.sequences[:, -STEPS:]
    table = onevision.get_input_embeddings().weight.detach()
    for b, prompt in enumerate(tiles.sequences(onevision, inputs, placed)):
        embeds = seen[0].embeds[b][seen[0].alive[b]]
        torch.testing.assert_close(embeds, prompt.embeds, rtol=1e-10, atol=1e-10)
        assert len(prompt.images[0]) > keep
        expected = stage.decode(
            onevision, torch.cat([embeds, table[new[b, :-1]]]), torch.arange(len(embeds) + STEPS - 1),
            prompt.images, keep, compact=True, prompt=len(embeds),
        )  # fmt: skip
        slots = [prompt.slots[i] for i in expected.kept if i < len(embeds) and prompt.slots[i] >= 0]
        assert trace.kept_in_decoder[1][b].tolist() == slots
        for step in range(STEPS):  # generate hands logits on in fp32
            torch.testing.assert_close(out.logits[step][b], expected.logits[step - STEPS].float(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("video", [False, True], ids=["shrunk-tiles", "video"])
def test_what_is_pooled_behind_the_projector_is_refused(onevision: Any, families: ModuleType, video: bool) -> None:
    inputs = families.inputs("llava_onevision", onevision, images=int(not video), video=video)
    with torch.no_grad():
        expected = onevision(**inputs).logits
        with pytest.raises(InputError, match="pools or shrinks"), vlattn.FlowCut(keep=4)(onevision):
            onevision(**inputs)
        assert torch.equal(onevision(**inputs).logits, expected)
