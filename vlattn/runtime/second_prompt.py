"""Prompts of second streams, made from the call of the main one: the same with its images as they are, or without them.

No intervention acts on a second stream: neither what it hides nor what it prunes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from vlattn.errors import InputError
from vlattn.models.sizes import call_of
from vlattn.runtime.sequence import Segment, valid_columns

if TYPE_CHECKING:
    from vlattn.runtime.session import Session

# Arguments with pixels (of one modality or all) -> the same with others.
Change = Callable[[dict[str, Any]], dict[str, Any]]

PIXELS = ("pixel_values", "pixel_values_images", "pixel_values_videos")
_NOT_THE_PROMPT = {
    "cache",
    "past_key_values",
    "use_cache",
    "cache_position",
    "labels",
    "logits_to_keep",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
}


def text_positions(mask: torch.Tensor) -> torch.Tensor:
    """Positions of a left-padded prompt, counted from its first token: int64 [B, T] for bool [B, T]."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def rows_of(value: Any, times: int) -> Any:
    """Every `times`-th row of a tensor [R, ...], or of M-RoPE's position ids [3 or 4, R, T]."""
    if value.ndim == 3 and not value.is_floating_point():
        return value[:, ::times]
    return value[::times]


def without_image(call: dict[str, Any], session: Session) -> dict[str, Any]:
    """The prompt with its visual tokens, and what a family wraps around them, taken out: left-padded, positions anew.

    Returns:
        input_ids (or inputs_embeds), attention_mask and position_ids [B, T'] ([3, B, T'] with M-RoPE).
    """
    visual = session.visual
    assert visual is not None
    drop = visual.mask.clone()
    ids, embeds, mask = call.get("input_ids"), call.get("inputs_embeds"), call.get("attention_mask")
    for here in session.adapter.places_of(session.adapter.wrapper_ids, call):
        drop |= here
    batch, length = drop.shape
    valid = valid_columns(mask, batch, length, drop.device)
    segment = Segment.of(valid & ~drop)
    places = text_positions(segment.alive)
    found: dict[str, Any] = {
        "attention_mask": segment.alive.long(),
        "position_ids": places.expand(3, -1, -1) if session.adapter.mrope else places,
    }
    if ids is not None:
        found["input_ids"] = torch.where(segment.alive, segment.take(ids), ids.new_zeros(()))
    else:
        assert embeds is not None
        found["inputs_embeds"] = segment.rows(embeds)
    return found


def with_image(call: dict[str, Any], session: Session, change: Change | None = None) -> dict[str, Any]:
    """The prompt as it is, with image features that no intervention has touched.

    Features that generation computed beforehand are used again, unless a method prunes them or `change` wants other
    pixels: then they are computed anew from the pixels, which they carry. Beams share what is computed anew: only every
    n-th row is returned then, for n beams.

    change: what to put in place of pixels, given the arguments that hold them.
    """
    given = call["inputs_embeds"] if call.get("input_ids") is None else call["input_ids"]
    shape = given.shape[:2]
    inputs = {name: value for name, value in call.items() if value is not None and name not in _NOT_THE_PROMPT}
    inputs["attention_mask"] = valid_columns(call.get("attention_mask"), shape[0], shape[1], given.device).long()
    if "position_ids" not in inputs and not session.adapter.mrope:  # then stock code counts padding
        inputs["position_ids"] = torch.arange(shape[1], device=given.device).expand(shape)
    if any(name in inputs for name in PIXELS):
        return inputs if change is None else {**inputs, **change(inputs)}
    features = inputs.get("mm_encoder_outputs") or {}
    if change is None and not any(member.selects_features for member in session.members):
        return inputs
    anew, times = {}, 1
    for modality, output in features.items():
        made = call_of(output)
        if made is None:
            raise InputError(
                f"pixel_values: the {modality} features were computed outside this context, so a second stream cannot "
                "see the image as it is; give pixel_values (not precomputed features) inside the context"
            )
        method = getattr(session.adapter.multimodal, f"get_{modality}_features")
        anew[modality] = method(**(made.arguments if change is None else change(made.arguments)))
        times = len(output.pooler_output) // made.entries
    if not anew:
        raise InputError("pixel_values: got none, and no features of images either; give the image with its prompt")
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and shape in (value.shape[:2], value.shape[1:3]):
            inputs[name] = rows_of(value, times)
    return {**inputs, "mm_encoder_outputs": anew}


def repeated(inputs: dict[str, Any], times: int, session: Session) -> dict[str, Any]:
    """Each row `times` times, and its image features with it, as generation itself repeats prompts for beams."""
    if times == 1:
        return inputs
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    model: Any = session.model
    ids, rest = model._expand_inputs_for_generation(expand_size=times, input_ids=inputs.get("input_ids"), **rest)
    return rest if ids is None else {**rest, "input_ids": ids}
