"""VisionZip and HiPrune on the Qwen-VL families: what the tower attends to, and what the decoder then gets.

The reference reads the tower with full matrices, and hides what leaves from attention instead of removing it.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from vlattn.errors import InputError
from vlattn.interventions.hiprune import HiPrune, hiprune_choice
from vlattn.interventions.visionzip import VisionZip, visionzip

QWEN = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]


def half_turn(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


class Reference:
    """The stock model on a prompt, looked into.

    features: for each image [n, D], as the decoder gets them.
    received, key: {layer: for each image [n] and [n, d]}, means over heads (queries) and the four patches of a cell.
    """

    def __init__(self, model: Any, inputs: dict[str, torch.Tensor], layers: list[int]) -> None:
        self.model, self.inputs = model, inputs
        tower, merged = model.model.visual, []
        calls: dict[int, Any] = {}
        hooks = [
            tower.blocks[layer].attn.register_forward_pre_hook(
                lambda module, args, kwargs, layer=layer: calls.__setitem__(layer, (args, kwargs)), with_kwargs=True
            )
            for layer in layers
        ]
        hooks.append(tower.merger.register_forward_hook(lambda module, args, output: merged.append(output)))
        images = "pixel_values" in inputs
        pixels = inputs["pixel_values" if images else "pixel_values_videos"]
        grid = inputs["image_grid_thw" if images else "video_grid_thw"]
        with torch.no_grad():
            packed = tower(pixels, grid_thw=grid).pooler_output
        for hook in hooks:
            hook.remove()
        # Where each cell of the prompt stands inside the tower: their merged features are equal, and all differ.
        same = (packed[:, None] == merged[-1][None]).all(-1)
        assert bool((same.sum(1) == 1).all())
        order = same.int().argmax(1)
        counts = (grid.prod(1) // 4).tolist()
        self.features = packed.split(counts)
        self.received, self.key = {}, {}
        for layer, (args, kwargs) in calls.items():
            received, key = self._look(tower.blocks[layer].attn, *args, **kwargs)
            self.received[layer] = received.view(-1, 4).mean(1)[order].split(counts)
            self.key[layer] = key.view(len(order), 4, -1).mean(1)[order].split(counts)

    @staticmethod
    def _look(
        attention: Any, hidden_states: torch.Tensor, cu_seqlens: torch.Tensor, position_embeddings: Any, **rest: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, _ = attention.qkv(hidden_states).view(len(hidden_states), 3, attention.num_heads, -1).unbind(1)
        cos, sin = (table[:, None] for table in position_embeddings)
        q, rotated = (x * cos + half_turn(x) * sin for x in (q, k))
        received = torch.zeros(len(q), dtype=q.dtype)
        for start, stop in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
            logits = torch.einsum("qhd,khd->hqk", q[start:stop], rotated[start:stop]) / q.shape[-1] ** 0.5
            received[start:stop] = logits.softmax(-1).mean((0, 1))
        return received, k.mean(1)

    def logits(self, kept: list[torch.Tensor], features: list[torch.Tensor]) -> list[torch.Tensor]:
        """Of the positions that stay, prompt by prompt: kept[i] are image i's cells, features[i] what stands there."""
        ids, mask = self.inputs["input_ids"], self.inputs["attention_mask"]
        visual = (ids == self.model.config.image_token_id) | (ids == self.model.config.video_token_id)
        left = mask.bool() & ~visual
        places = visual.nonzero().split([len(f) for f in self.features])

        def edit(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple:
            embeds = kwargs["inputs_embeds"].clone()
            for place, cells, values in zip(places, kept, features, strict=True):
                batch, position = place[cells].unbind(1)
                embeds[batch, position], left[batch, position] = values, True
            return args, {**kwargs, "inputs_embeds": embeds, "attention_mask": left.long()}

        hook = self.model.model.language_model.register_forward_pre_hook(edit, with_kwargs=True)
        with torch.no_grad():
            found = self.model(**self.inputs).logits
        hook.remove()
        return [row[alive] for row, alive in zip(found, left, strict=True)]


def assert_same_logits(model: Any, inputs: dict[str, torch.Tensor], method: Any, expected: list[torch.Tensor]) -> Any:
    with torch.no_grad(), method(model) as trace:
        found = model(**inputs).logits
    assert found.shape[1] == max(map(len, expected))
    for row, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(row[len(row) - len(wanted) :], wanted, rtol=1e-9, atol=1e-9)
    return trace


@pytest.mark.parametrize("family", QWEN)
@pytest.mark.parametrize(("images", "video"), [(1, False), (2, False), (0, True)], ids=str)
@pytest.mark.parametrize("merge", ["official", "mean"])
def test_visionzip_folds_cells_at_their_targets_places(
    families: ModuleType, family: str, images: int, video: bool, merge: Any
) -> None:
    model, method = families.model(family), VisionZip(5, 2, merge=merge)
    inputs = families.inputs(family, model, images=images, video=video)
    last = len(model.model.visual.blocks) - 1
    with torch.no_grad():
        reference = Reference(model, inputs, [last])
        kept, features = [], []
        for x, score, key in zip(reference.features, reference.received[last], reference.key[last], strict=True):
            if len(x) <= 7:
                kept.append(torch.arange(len(x)))
                features.append(x)
                continue
            found = visionzip(x[None], score[None], key[None], 5, 2, merge)
            kept.append(torch.cat([found.dominant[0], found.target[0]]))
            features.append(torch.cat([x[found.dominant[0]], found.contextual[0]]))
        expected = reference.logits(kept, features)
    trace = assert_same_logits(model, inputs, method, expected)
    assert trace.budget()["final"] == sum(map(len, kept)) / 2
    assert trace.visual_tokens == max(map(len, reference.features))
    if not video:
        assert [sorted(row[row >= 0].tolist()) for row in trace.kept] == [sorted(ids.tolist()) for ids in kept]


@pytest.mark.parametrize("family", QWEN)
@pytest.mark.parametrize("object_layer", [1, 2, 3])
def test_hiprune_chooses_cells_by_two_layers(families: ModuleType, family: str, object_layer: int) -> None:
    model, method = families.model(family), HiPrune(keep=7, alpha=0.6, object_layer=object_layer, wrap=False)
    inputs = families.inputs(family, model, images=2)
    with torch.no_grad():
        reference = Reference(model, inputs, [object_layer - 1, 2])
        kept = []
        for i, (_, height, width) in enumerate(inputs["image_grid_thw"].tolist()):
            middle, deep = (reference.received[layer][i][None] for layer in (object_layer - 1, 2))
            keep = min(7, height * width // 4)
            kept.append(hiprune_choice(middle, deep, keep, (height // 2, width // 2), 0.6, False)[0])
        features = [x[ids] for x, ids in zip(reference.features, kept, strict=True)]
        expected = reference.logits(kept, features)
    trace = assert_same_logits(model, inputs, method, expected)
    assert [row[row >= 0].tolist() for row in trace.kept] == [ids.tolist() for ids in kept]


@pytest.mark.parametrize("family", QWEN)
@pytest.mark.parametrize("method", [VisionZip(5, 2), HiPrune(keep=6, object_layer=2)], ids=["visionzip", "hiprune"])
def test_beams_and_return_sequences_see_their_own_image(families: ModuleType, family: str, method: Any) -> None:
    model = families.model(family)
    inputs = families.inputs(family, model)
    more = {"max_new_tokens": 4, "do_sample": False, "num_beams": 3, "num_return_sequences": 3}
    with torch.no_grad(), method(model) as trace:
        together = model.generate(**inputs, **more)
        kept = trace.kept.view(2, 3, -1) if len(trace.kept) == 6 else trace.kept[:, None]
        assert bool((kept == kept[:, :1]).all())
        alone = []
        cells = inputs["image_grid_thw"].prod(1)
        for b, pixels in enumerate(inputs["pixel_values"].split(cells.tolist())):
            one = {k: v[b : b + 1] for k, v in inputs.items() if k != "pixel_values"}
            alone.append(model.generate(**one, pixel_values=pixels, **more))
            assert torch.equal(trace.kept[0], kept[b, 0])
    length = inputs["input_ids"].shape[1]
    assert torch.equal(together[:, length:], torch.cat(alone)[:, length:])


@pytest.mark.parametrize("family", QWEN)
@pytest.mark.parametrize("method", [VisionZip(40, 8), HiPrune(keep=48, object_layer=1)], ids=["visionzip", "hiprune"])
def test_images_within_the_budget_stay_as_they_are_bit_for_bit(families: ModuleType, family: str, method: Any) -> None:
    model = families.model(family)
    inputs = families.inputs(family, model, images=2)
    with torch.no_grad():
        expected = model(**inputs).logits
        with method(model) as trace:
            assert torch.equal(model(**inputs).logits, expected)
    assert trace.budget()["final"] == sum(trace.visual_full) / 2


def test_positions_of_three_dimensions_are_never_renumbered(families: ModuleType) -> None:
    model = families.model("qwen2_vl")
    with pytest.raises(InputError, match="positions: 'compact' has no meaning for VisionZip on qwen2_vl"):
        VisionZip(5, 2, positions="compact")(model).attach()


def test_images_beside_videos_and_grids_of_several_frames_are_refused(families: ModuleType) -> None:
    model = families.model("qwen2_vl")
    both = families.inputs("qwen2_vl", model, images=1, video=True)
    with VisionZip(5, 2)(model), pytest.raises(InputError, match="give images or videos, not both"):
        model(**both)
    videos = families.inputs("qwen2_vl", model, images=0, video=True)
    with HiPrune(keep=5, object_layer=1)(model), pytest.raises(InputError, match="HiPrune looks for neighbours"):
        model(**videos)


@pytest.mark.parametrize("layer", [4, 9])
def test_a_layer_that_is_not_there_is_refused(families: ModuleType, layer: int) -> None:
    with pytest.raises(InputError, match=f"object_layer: got {layer}; .* give 1 <= object_layer <= 3"):
        HiPrune(keep=5, object_layer=layer)(families.model("qwen2_5_vl")).attach()
