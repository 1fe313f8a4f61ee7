"""Every family's adapter points at the modules that run, and turns keys as the stock attention does."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from vlattn.errors import InputError
from vlattn.models import registry
from vlattn.models.adapter import Adapter
from vlattn.models.registry import adapter_for

FAMILIES = (
    "llava_next",
    "llava_onevision",
    "video_llava",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "internvl",
    "idefics3",
    "smolvlm",
    "gemma3",
)
each_family = pytest.mark.parametrize("family", FAMILIES)


def forward(model: Any, inputs: dict[str, torch.Tensor], **more: Any) -> Any:
    with torch.no_grad():
        return model(**inputs, **more)


def language_call(model: Any, adapter: Adapter, inputs: dict[str, torch.Tensor], **more: Any) -> dict[str, Any]:
    """The keyword arguments that the decoder is called with."""
    seen: list[dict[str, Any]] = []
    hook = adapter.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    try:
        forward(model, inputs, **more)
    finally:
        hook.remove()
    return seen[0]


# Finding --------------------------------------------------------------------------------------------------------------
def test_the_tests_know_every_family_that_has_an_adapter(families: ModuleType) -> None:
    assert families.FAMILIES == FAMILIES
    assert {"llava", *FAMILIES} <= set(registry.families())


@each_family
def test_an_adapter_is_found_by_the_model_type_with_and_without_the_head(families: ModuleType, family: str) -> None:
    model = families.model(family)
    for given in (model, model.model):
        adapter = adapter_for(given)
        assert model.config.model_type in adapter.model_types
        assert adapter.multimodal is model.model


def test_an_unknown_family_is_refused_with_the_known_ones_named() -> None:
    model = nn.Linear(1, 1)
    model.config = type("Config", (), {"model_type": "clip"})()
    with pytest.raises(InputError, match=r"no adapter for Linear.*'clip'.*gemma3, idefics3, internvl, llava"):
        adapter_for(model)
    with pytest.raises(InputError, match="model_type None"):
        adapter_for(nn.Linear(1, 1))


def test_a_family_of_ones_own_can_be_registered(families: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))

    @registry.register
    class Mine(type(adapter_for(families.model("gemma3")))):  # type: ignore[misc]
        model_types = ("my_model",)

    model = families.model("gemma3")
    model.config.model_type = "my_model"
    assert isinstance(adapter_for(model), Mine)
    assert "my_model" in registry.families()


# Parts ----------------------------------------------------------------------------------------------------------------
@each_family
def test_the_parts_run_once_each_and_in_order(families: ModuleType, family: str) -> None:
    model = families.model(family)
    adapter, inputs = adapter_for(model), families.inputs(family, model)
    finished: list[str] = []

    def count(name: str, module: nn.Module) -> None:
        module.register_forward_hook(lambda *_: finished.append(name))

    count("multimodal", adapter.multimodal)
    count("tower", adapter.tower)
    count("projector", adapter.projector)
    count("decoder", adapter.language_model)
    for index, layer in enumerate(adapter.vision_layers):
        count(f"vision attention {index}", adapter.vision_attention(index))
        count(f"vision {index}", layer)
    for index, layer in enumerate(adapter.decoder_layers):
        count(f"attention {index}", adapter.decoder_attention(index))
        count(f"layer {index}", layer)
    forward(model, inputs)
    vision = [f"vision {part}{i}" for i in range(3) for part in ("attention ", "")]
    middle = ["projector", "tower"] if family.startswith("qwen") else ["tower", "projector"]  # a merger is in the tower
    decoder = [f"{part} {i}" for i in range(4) for part in ("attention", "layer")]
    assert finished == [*vision, *middle, *decoder, "decoder", "multimodal"]
    for attention in (adapter.vision_attention(0), adapter.decoder_attention(0)):
        assert type(attention).__name__.endswith("Attention")


def test_frames_go_through_the_video_tower_of_video_llava(families: ModuleType) -> None:
    model = families.model("video_llava")
    adapter: Any = adapter_for(model)
    ran: list[str] = []
    adapter.tower.register_forward_hook(lambda *_: ran.append("images"))
    adapter.video_tower.register_forward_hook(lambda *_: ran.append("videos"))
    forward(model, families.inputs("video_llava", model, images=0, video=True))
    assert ran == ["videos"]
    forward(model, families.inputs("video_llava", model))
    assert ran == ["videos", "images"]


@pytest.mark.parametrize(
    ("family", "changes", "layer"),
    [
        *((family, {}, 2) for family in FAMILIES if family not in ("llava_next", "video_llava")),
        *((family, {}, 1) for family in ("llava_next", "video_llava")),
        ("llava_next", {"vision_feature_layer": 1}, 0),
        ("llava_onevision", {"vision_feature_layer": 2}, 1),
        ("internvl", {"vision_feature_layer": -3}, 0),
    ],
)
def test_the_feature_layer_is_the_last_that_the_features_depend_on(
    families: ModuleType, family: str, changes: dict[str, Any], layer: int
) -> None:
    model = families.model(family, **changes)
    adapter = adapter_for(model)
    assert adapter.feature_layer == layer
    inputs = families.inputs(family, model)
    for poisoned, module in enumerate(adapter.vision_layers):
        # In front of the hooks that record hidden states, of which one may be the feature.
        hook = module.register_forward_hook(lambda module, args, output: output * torch.nan, prepend=True)
        embeds = language_call(model, adapter, inputs)["inputs_embeds"]
        hook.remove()
        assert bool(embeds.isnan().any()) == (poisoned <= layer)


@each_family
def test_the_tower_sees_its_patches_and_cls_where_it_has_one(families: ModuleType, family: str) -> None:
    model = families.model(family)
    adapter, inputs = adapter_for(model), families.inputs(family, model)
    seen: list[torch.Size] = []
    adapter.vision_layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).shape),
        with_kwargs=True,
    )
    forward(model, inputs)
    if family.startswith("qwen"):
        assert seen[0] == (len(inputs["pixel_values"]), 16)  # all images in one row
        assert not adapter.has_cls
        return
    pixels = next(value for name, value in inputs.items() if name.startswith("pixel_values"))
    assert seen[0][1] == (pixels.shape[-1] // 4) ** 2 + int(adapter.has_cls)
    merge = 2 if family in ("internvl", "idefics3", "smolvlm", "gemma3") else 1
    assert adapter.grid == (pixels.shape[-2] // 4 // merge, pixels.shape[-1] // 4 // merge)
    assert adapter.patchwise == (merge == 1)
    assert adapter.patches == adapter.grid[0] * adapter.grid[1]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_images_of_any_size_have_no_one_grid(families: ModuleType, family: str) -> None:
    with pytest.raises(InputError, match=r"grid: images of qwen.* have any size.*visual_tokens"):
        _ = adapter_for(families.model(family)).grid


@each_family
def test_deepstack_layers_are_those_whose_output_gets_features_of_the_tower(families: ModuleType, family: str) -> None:
    model = families.model(family)
    adapter = adapter_for(model)
    ins: list[torch.Tensor] = []
    outs: list[torch.Tensor] = []
    for layer in adapter.decoder_layers:
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: ins.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        layer.register_forward_hook(lambda module, args, output: outs.append(output))
    inputs = families.inputs(family, model)
    forward(model, inputs)
    visual = adapter.visual_mask(inputs)
    for index in range(3):
        changed = (outs[index] != ins[index + 1]).any(-1)  # [B, T]
        assert torch.equal(changed, visual & (index < adapter.deepstack_layers))
    assert adapter.deepstack_layers == (2 if family == "qwen3_vl" else 0)


# Rotary position embedding --------------------------------------------------------------------------------------------
def captured_attention(
    model: Any, adapter: Adapter, inputs: dict[str, torch.Tensor], **more: Any
) -> tuple[dict[str, Any], Any, list[dict[str, torch.Tensor]]]:
    """(the decoder's call, its cache, per layer {"q", "k"} before turning [B, H, N, d] and "out" [B, N, H * d])."""
    caught: list[dict[str, torch.Tensor]] = [{} for _ in adapter.decoder_layers]
    hooks = []
    for layer, found in enumerate(caught):
        attention = adapter.decoder_attention(layer)
        for name in ("q", "k"):
            # Behind the norm of each head, where the family has one.
            last = getattr(attention, f"{name}_norm", None) or getattr(attention, f"{name}_proj")

            def keep(module: nn.Module, args: Any, output: torch.Tensor, found: Any = found, name: str = name) -> None:
                heads = output if output.ndim == 4 else output.unflatten(-1, (-1, 8))
                found[name] = heads if heads.shape[1] in (2, 4) else heads.transpose(1, 2)

            hooks.append(last.register_forward_hook(keep))

        def keep_out(module: nn.Module, args: Any, found: Any = found) -> None:
            found["out"] = args[0]

        hooks.append(attention.o_proj.register_forward_pre_hook(keep_out))
    cache = DynamicCache()
    name = "cache" if "cache" in model.forward.__annotations__ else "past_key_values"
    call = language_call(model, adapter, inputs, use_cache=True, **{name: cache}, **more)
    for hook in hooks:
        hook.remove()
    return call, cache, caught


@each_family
@pytest.mark.parametrize("with_text_positions", [False, True])
def test_keys_and_queries_turned_by_the_adapter_are_those_of_the_stock_attention(
    families: ModuleType, family: str, with_text_positions: bool
) -> None:
    model = families.model(family)
    adapter = adapter_for(model)
    inputs = families.inputs(family, model)
    more: dict[str, Any] = {}
    if with_text_positions:
        # As generate gives them: positions from the mask, in front of the three of M-RoPE.
        text = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        more["position_ids"] = text
        if adapter.mrope:
            three, _ = model.model.get_rope_index(**{k: v for k, v in inputs.items() if "pixel" not in k})
            more["position_ids"] = torch.cat([text[None], three])
    call, cache, caught = captured_attention(model, adapter, inputs, **more)
    embeds, ids = call["inputs_embeds"], call["position_ids"]
    if ids is None:
        ids = torch.arange(embeds.shape[1])[None]
    padded = inputs["attention_mask"] == 0
    for layer, found in enumerate(caught):
        cos, sin = adapter.rotary(layer, embeds, ids)
        q, k = adapter.rotate(layer, found["q"], found["k"], cos, sin)
        keys, values = cache.layers[layer].keys, cache.layers[layer].values
        assert torch.equal(k, keys)
        # The last row sees everything but padding, in every family: attention by hand.
        attention = adapter.decoder_attention(layer)
        keys, values = keys.repeat_interleave(2, 1), values.repeat_interleave(2, 1)
        scores = (q[:, :, -1:] * keys).sum(-1) * attention.scaling  # [B, H, N]
        weights = scores.masked_fill(padded[:, None], -torch.inf).softmax(-1)
        by_hand = (weights[..., None] * values).sum(2).flatten(1)  # [B, H * d]
        assert torch.allclose(found["out"][:, -1], by_hand, atol=1e-6)


def test_gemma_turns_by_the_kind_of_the_layer(families: ModuleType) -> None:
    model = families.model("gemma3")
    adapter = adapter_for(model)
    hidden, ids = torch.zeros(1, 5, 32, dtype=torch.float64), torch.arange(5)[None]
    sliding, full = adapter.rotary(0, hidden, ids)[0], adapter.rotary(1, hidden, ids)[0]
    assert not torch.allclose(sliding, full)
    assert torch.equal(sliding, adapter.rotary(2, hidden, ids)[0])


def test_mrope_takes_plain_text_positions_as_the_same_in_all_three_axes(families: ModuleType) -> None:
    for family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        adapter = adapter_for(families.model(family))
        hidden, ids = torch.zeros(2, 5, 32, dtype=torch.float64), torch.arange(10).view(2, 5)
        plain, three = adapter.rotary(0, hidden, ids), adapter.rotary(0, hidden, ids.expand(3, 2, 5))
        assert torch.equal(plain[0], three[0])
        assert torch.equal(plain[1], three[1])
