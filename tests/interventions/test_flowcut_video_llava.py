"""FlowCut on Video-LLaVA against plain loops: every image and every frame is pruned in its own tower."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import vlattn

LAYERS, FEATURE, PATCHES, FRAMES = 6, 4, 9, 2
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
    """`tests/naive_flowcut_tiles.py`: prompts written out with what is left of their images."""
    return helper("naive_flowcut_tiles")


@pytest.fixture(scope="module")
def stage() -> ModuleType:
    """`tests/naive_flowcut_decoder.py`: what enters the decoder."""
    return helper("naive_flowcut_decoder")


def make(families: ModuleType, strategy: str = "default", **options: Any) -> Any:
    """The towers are drawn anew for each other, so that one's patches tell from the other's."""
    return families.model(
        "video_llava", vision_layers=LAYERS, vision_feature_select_strategy=strategy,
        image_seq_length=PATCHES + int(strategy == "full"), **options,
    )  # fmt: skip


def batch(families: ModuleType, model: Any, images: int, videos: int, lead: int = 0) -> Inputs:
    """Two left-padded prompts with images, then videos of two frames; lead: 1 where images hand their CLS over."""
    plain = families.inputs("video_llava", model, images=images, video=bool(videos))
    pieces = [[families.IMAGE] * (PATCHES + lead)] * images + [[families.VIDEO] * (FRAMES * (1 + PATCHES))] * videos
    prompts = families._prompts([pieces] * 2, torch.Generator().manual_seed(1))
    return {**plain, **prompts}


def placed_of(
    tiles: ModuleType, naive: ModuleType, model: Any, inputs: Inputs, keep: int, images: int, videos: int, lead: int
) -> tuple[list[Any], dict[str, list[list[int]]]]:
    """Images and videos in prompt order as the plain loops leave them, and the patches each tower kept."""
    kept, found = {}, {}
    project = model.model.multi_modal_projector
    for kind, tower, count in (("image", model.model.image_tower, images), ("video", model.model.video_tower, videos)):
        if not count:
            continue
        name = "pixel_values_videos" if kind == "video" else next(n for n in inputs if n in NAMES)
        pixels = inputs[name].flatten(0, 1) if kind == "video" else inputs[name]
        with torch.no_grad():
            flow = naive.naive_flowcut(tower, naive.embeddings(tower, pixels), keep - lead, FEATURE)
            features = project(flow["feature"])
        kept[kind] = flow["kept"]
        assert len(flow["by_layer"]) == 2
        if kind == "image":
            found[kind] = [
                tiles.Placed(rows[1 - lead :], [0] * lead + [lead + i for i in ids], PATCHES + lead)
                for rows, ids in zip(features, flow["kept"], strict=True)
            ]
        else:  # frames hand their CLS over whatever images do
            step, each = 1 + PATCHES, []
            for video in range(len(pixels) // FRAMES):
                slots: list[int] = []
                for frame in range(FRAMES):
                    slots += [step * frame, *(step * frame + 1 + i for i in flow["kept"][FRAMES * video + frame])]
                rows = features[FRAMES * video : FRAMES * (video + 1)].flatten(0, 1)
                each.append(tiles.Placed(rows, slots, step * FRAMES))
            found[kind] = each
    order = []
    for b in range(2):
        for kind, count in (("image", images), ("video", videos)):
            order += found.get(kind, [])[b * count : (b + 1) * count]
    return order, kept


NAMES = ("pixel_values", "pixel_values_images")


@pytest.mark.parametrize(("images", "videos"), [(1, 0), (0, 1), (2, 1)], ids=["images", "videos", "both"])
@pytest.mark.parametrize("strategy", ["default", "full"])
def test_images_and_frames_enter_with_what_the_plain_loops_keep_of_each(
    families: ModuleType, naive: ModuleType, tiles: ModuleType, stage: ModuleType,
    strategy: str, images: int, videos: int,
) -> None:  # fmt: skip
    """`keep` patches of each; a frame's CLS comes on top of them, unless images' CLS counts inside the budget too."""
    model, keep, lead = make(families, strategy), 4, int(strategy == "full")
    inputs = batch(families, model, images, videos, lead)
    placed, kept = placed_of(tiles, naive, model, inputs, keep, images, videos, lead)
    with torch.no_grad(), vlattn.FlowCut(keep=keep)(model) as trace, stage.watching(model) as seen:
        model(**inputs)
    assert trace.kept is not None
    assert trace.kept.tolist() == kept["video" if videos else "image"]  # of the tower that ran last
    per_frame = keep - lead + 1
    assert trace.visual_by_layer == [[images * keep + videos * FRAMES * per_frame] * 2] * 5
    assert trace.kept_in_decoder == {}
    for b, prompt in enumerate(tiles.sequences(model, inputs, placed)):
        embeds = seen[0].embeds[b][seen[0].alive[b]]
        torch.testing.assert_close(embeds, prompt.embeds, rtol=1e-10, atol=1e-10)


def test_frames_are_pruned_by_their_own_tower(families: ModuleType, naive: ModuleType, tiles: ModuleType) -> None:
    """The same pixels as an image and as a frame keep different patches: without this the tests here prove less."""
    model = make(families)
    inputs = batch(families, model, 1, 1)
    name = next(n for n in inputs if n in NAMES)
    inputs["pixel_values_videos"] = inputs[name][:, None].expand(-1, FRAMES, -1, -1, -1)
    _, kept = placed_of(tiles, naive, model, inputs, 4, 1, 1, 0)
    assert kept["video"][0] == kept["video"][1] != kept["image"][0]


@pytest.mark.parametrize(("images", "videos"), [(1, 0), (0, 1), (2, 1)], ids=["images", "videos", "both"])
def test_decoding_equals_the_prompts_written_out(
    families: ModuleType, naive: ModuleType, tiles: ModuleType, images: int, videos: int
) -> None:
    model = make(families)
    inputs = batch(families, model, images, videos)
    placed, _ = placed_of(tiles, naive, model, inputs, 4, images, videos, 0)
    more = {"max_new_tokens": STEPS, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad(), vlattn.FlowCut(keep=4)(model):
        out = model.generate(**inputs, **more)
    said = out.sequences[:, -STEPS:]
    for b, prompt in enumerate(tiles.sequences(model, inputs, placed)):
        with torch.no_grad():
            expected = model.generate(inputs_embeds=prompt.embeds[None], **more)
        assert torch.equal(said[b], expected.sequences[0, -STEPS:])
        for mine, its in zip(out.logits, expected.logits, strict=True):
            torch.testing.assert_close(mine[b], its[0], rtol=2e-6, atol=2e-6)
    assert len(set(said.flatten().tolist())) > 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeping_every_patch_gives_the_stock_logits_bit_for_bit(families: ModuleType, dtype: torch.dtype) -> None:
    model = make(families, dtype=dtype)
    inputs = batch(families, model, 1, 1)
    with torch.no_grad():
        expected = model(**inputs).logits
        with vlattn.FlowCut(keep=PATCHES)(model):
            assert torch.equal(model(**inputs).logits, expected)


def test_per_image_gives_each_frame_what_it_has_alone(families: ModuleType) -> None:
    model = make(families)
    frames = torch.randn(1, 5, 3, 12, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def kept(pixels: torch.Tensor) -> list[list[int]]:
        with torch.no_grad(), vlattn.FlowCut(keep=3, count="per_image")(model) as trace:
            model.model.get_video_features(pixels, return_dict=True)
        assert trace.kept is not None
        return trace.kept.tolist()

    assert kept(frames) == [kept(frames[:, i : i + 1])[0] for i in range(5)]
