"""VisPruner: the published vector, the pruning in plain loops, and what a live model makes of it."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from vlattn.errors import InputError
from vlattn.interventions.vispruner import VisPruner, vispruner_choice

Numbers = Callable[..., torch.Tensor]


def choice_by_loops(features: torch.Tensor, score: torch.Tensor, keep: int, share: float, step: int) -> list[int]:
    """One image: [N, C], [N]."""
    unit = features / features.norm(dim=-1, keepdim=True)
    order = sorted(range(len(score)), key=lambda i: -float(score[i]))
    best = int(keep * share)
    kept, left = order[:best], order[best:]
    if keep == best:
        return sorted(kept)
    while len(left) > keep - best:
        even, odd = left[0::2], left[1::2]
        alike = {i: max(float(unit[i] @ unit[j]) for j in odd) for i in even}
        ranked = sorted(even, key=lambda i: -alike[i])
        left = ranked[min(step, len(left) - (keep - best), len(even)) :] + odd
    return sorted(kept + left)


def test_the_published_vector_is_reproduced(formula: Numbers) -> None:
    features = formula(92, 1, 64, 5)
    score = (3 * formula(93, 1, 2, 64)).softmax(-1).mean(1)
    important = [4, 5, 11, 12, 14, 17, 19, 22, 25, 27, 31, 36, 40, 50, 52, 59]
    assert vispruner_choice(features, score, 16, important=1.0).tolist() == [important]
    kept = [1, 3, 4, 5, 6, 7, 11, 12, 13, 14, 15, 17, 19, 22, 25, 27]
    kept += [29, 30, 31, 32, 33, 36, 40, 41, 45, 48, 50, 52, 54, 57, 59, 62]
    assert vispruner_choice(features, score, 32).tolist() == [kept]


@pytest.mark.parametrize("step", [1, 8, 100])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.75, 1.0])
@pytest.mark.parametrize(("total", "keep"), [(1, 1), (7, 2), (63, 32), (64, 6), (81, 20), (36, 36)])
def test_the_choice_equals_plain_loops(total: int, keep: int, share: float, step: int) -> None:
    generator = torch.Generator().manual_seed(total)
    features = torch.randn(2, total, 5, generator=generator, dtype=torch.float64)
    score = torch.rand(2, total, generator=generator, dtype=torch.float64)
    found = vispruner_choice(features, score, keep, share, step)
    assert found.tolist() == [choice_by_loops(features[b], score[b], keep, share, step) for b in range(2)]
    assert found.shape == (2, keep)


def test_of_equal_patches_one_stays_while_different_ones_are_there() -> None:
    different = torch.eye(8, dtype=torch.float64)
    features = torch.cat([different, different[:1].expand(24, 8)])[None]
    score = torch.zeros(1, 32, dtype=torch.float64)
    kept = vispruner_choice(features, score, 8, important=0.0, step=1)[0].tolist()
    assert set(range(1, 8)) <= set(kept)


def test_ties_in_attention_go_to_the_lower_id() -> None:
    found = vispruner_choice(torch.ones(1, 9, 2), torch.zeros(1, 9), 4, important=1.0)
    assert found.tolist() == [[0, 1, 2, 3]]


# In a model -----------------------------------------------------------------------------------------------------------
TOWERS = [{}, {"strategy": "full"}, {"feature_layer": -1}, {"siglip": True, "feature_layer": -1}]


def kept_by_loops(naive_tower: ModuleType, model: Any, pixels: torch.Tensor, keep: int, method: VisPruner) -> list[int]:
    """Of one image or tile [3, h, w]."""
    cls = model.config.vision_config.model_type == "clip_vision_model"
    layers = model.config.vision_config.num_hidden_layers
    layer = model.config.vision_feature_layer % (layers + 1) - 1
    attention = naive_tower.look(model.model.vision_tower, pixels[None], layer).attention[0].mean(0)
    score = attention[0, 1:] if cls else attention.sum(0)
    features = naive_tower.features_of(model, pixels[None])[0, int(cls) :]
    return choice_by_loops(features, score, keep, method.important, method.step)


@pytest.mark.parametrize("options", TOWERS, ids=str)
@pytest.mark.parametrize("method", [VisPruner(keep=9), VisPruner(keep=20, important=0.25, step=2)], ids=str)
def test_the_decoder_gets_the_chosen_patches_in_raster_order(
    llava: Any, prompts: Any, tiny: ModuleType, naive_tower: ModuleType, options: dict[str, Any], method: VisPruner
) -> None:
    model = llava(layers=4, **options)
    inputs, lead = prompts(model, images=(1, 2)), int(options.get("strategy") == "full")
    stock, ids = tiny.features(model, inputs["pixel_values"]), []
    for pixels in inputs["pixel_values"]:
        ids.append(kept_by_loops(naive_tower, model, pixels, method.keep - lead, method))
    expected = [
        image[list(range(lead)) + [i + lead for i in kept]].detach() for image, kept in zip(stock, ids, strict=True)
    ]
    trace = naive_tower.assert_decodes_as(model, inputs, method, expected)
    assert trace.kept.tolist() == ids
    assert trace.budget()["final"] == 1.5 * method.keep


def stitched(model: Any, kept: list[list[int]], features: torch.Tensor, height: int, width: int, size: Any) -> Any:
    """One LLaVA-NeXT image: the kept patches of each tile [tiles, P, D] in the model's own order, no newlines."""
    patches = features.shape[1]
    numbers = torch.arange(features.shape[0] * patches, dtype=torch.float64).view(-1, patches, 1)
    order, _ = model.model.pack_image_features([numbers], size[None], "default", numbers.new_full((1,), -1))
    places = [divmod(int(n), patches) for n in order[0][:, 0] if n >= 0]
    return torch.stack([features[tile, patch] for tile, patch in places if patch in kept[tile]])


def test_every_tile_keeps_its_own_and_the_model_stitches_them(families: ModuleType, naive_tower: ModuleType) -> None:
    model, method = families.model("llava_next"), VisPruner(keep=6)
    inputs, expected, all_kept = families.inputs("llava_next", model, batch=2), [], []
    for pixels, (height, width), size in zip(
        inputs["pixel_values"], [(1, 2), (2, 2)], inputs["image_sizes"], strict=True
    ):
        tiles = pixels[: 1 + height * width]
        kept = [kept_by_loops(naive_tower, model, tile, 6, method) for tile in tiles]
        with torch.no_grad():
            features = model.model.multi_modal_projector(naive_tower.features_of(model, tiles)[:, 1:])
        expected.append(stitched(model, kept, features, height, width, size))
        all_kept += kept
    trace = naive_tower.assert_decodes_as(model, inputs, method, expected)
    assert trace.kept.tolist() == all_kept


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0}, "keep: got 0"),
        ({"important": 1.5}, "important: got 1.5; give a number from 0.0 to 1.0"),
        ({"important": True}, "important: got True"),
        ({"step": 0}, "step: got 0; give an integer of at least 1"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        VisPruner(**settings)


@pytest.mark.parametrize("keep", [37, 128])
def test_more_patches_than_there_are_is_refused(llava: Any, keep: int) -> None:
    with pytest.raises(InputError, match=f"keep: got {keep}; this model has 36 visual tokens"):
        VisPruner(keep=keep)(llava(layers=3)).attach()
