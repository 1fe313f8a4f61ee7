"""Attention routing: the stock attention runs for all rows, and the few rows that a method edits are computed again.

One attention function per base implementation (`vlattn_sdpa`, `vlattn_eager`, ...) is registered with transformers,
with the base's own mask function, and chosen on one model's config instance while somebody needs it. It calls the base
and then, for layers with edits, recomputes the last rows densely: [B, H, R, K] for R rows, never [T, T].
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vlattn.errors import InputError
from vlattn.kernels.dispatch import Backend, uses_triton
from vlattn.kernels.reference import accumulation_dtype
from vlattn.runtime.hooks import Gate, HookSet

if TYPE_CHECKING:
    from vlattn.models.adapter import Adapter
    from vlattn.runtime.decoder import DecoderCuts

PREFIX = "vlattn_"


@dataclass
class AttentionCall:
    """One call of a decoder layer's attention, seen by the edits of its last rows.

    layer: 0-based decoder layer.
    prefill: whether the queries are the prompt's.
    query, key, value: as attention gets them [B, H or H_kv, Q or K, d], positions turned in.
    visual: bool [B, K], keys that are visual tokens; False for generated tokens.
    alive: bool [B, K], keys that are no padding (and not behind the end of a static cache).
    prompt: keys of the prompt; those behind it were generated.
    """

    layer: int
    prefill: bool
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    visual: torch.Tensor
    alive: torch.Tensor
    prompt: int

    def last_rows(self, allowed: torch.Tensor, scaling: float | None) -> dict[str, Any]:
        """Arguments of `vlattn.ops.grouped_attention` for the last R rows; allowed: bool [B or 1, 1, R, K]."""
        rows = allowed.shape[2]
        return {
            "q": self.query[:, :, -rows:],
            "k": self.key,
            "v": self.value,
            "scale": self.query.shape[-1] ** -0.5 if scaling is None else scaling,
            "key_mask": allowed[:, 0].expand(self.key.shape[0], -1, -1),
        }


class AttentionEdit(Protocol):
    """What a method does to attention rows. `rows` says how many of the last query rows it wants, 0 for none."""

    def rows(self, call: AttentionCall) -> int: ...

    def logits(self, call: AttentionCall, logits: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        """New scaled logits [B, H, R, K] (fp32, before the mask); allowed: bool [B or 1, 1, R, K]."""
        ...

    def weights(self, call: AttentionCall, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """New weights [B, H, R, K] (fp32) and which rows changed (bool [B, H, R]); None for none."""
        ...

    def fused(
        self, call: AttentionCall, allowed: torch.Tensor, scaling: float | None, backend: Backend | None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """All that the edit does to the last R rows, by an op that makes no weights: output [B, H, R, d] and which rows
        changed (bool [B, H, R]); None where no op covers it. Asked behind `rows`, instead of `logits` and `weights`."""
        ...


class Plain:
    """Defaults for edits that act on logits or weights alone."""

    def logits(self, call: AttentionCall, logits: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        return logits

    def weights(self, call: AttentionCall, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return weights, None

    def fused(
        self, call: AttentionCall, allowed: torch.Tensor, scaling: float | None, backend: Backend | None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        return None


# The edits of every attention module that has some; the registered functions look here.
_ROUTES: weakref.WeakKeyDictionary[nn.Module, _Route] = weakref.WeakKeyDictionary()


@dataclass
class _Route:
    owner: AttentionEdits
    layer: int


class AttentionEdits:
    """The edits on one model's decoder.

    backend: of the ops that edit rows without making their weights; None for Triton on a GPU, and weights elsewhere.
    """

    backend: Backend | None = None

    def __init__(self, adapter: Adapter, cuts: DecoderCuts, gate: Gate) -> None:
        self._adapter, self._cuts, self._gate = adapter, cuts, gate
        self._edits: dict[int, list[AttentionEdit]] = {}
        self._before: str | None = None
        self._masks: tuple[Any, tuple[int, int], torch.Tensor, torch.Tensor] | None = None
        self._known_keys: tuple[Any, torch.Tensor, tuple[int, int | None], torch.Tensor] | None = None

    def add(self, layers: list[int], edit: AttentionEdit, hooks: HookSet) -> None:
        """Have `edit` act on `layers` until `hooks` are removed."""
        if not self._edits:
            self._install()
        for layer in layers:
            self._edits.setdefault(layer, []).append(edit)
            _ROUTES[self._adapter.decoder_attention(layer)] = _Route(self, layer)
        hooks.also(lambda: self._drop(layers, edit))

    def on(self, layer: int) -> list[AttentionEdit]:
        """The edits that act on a layer, in the order they were added."""
        return list(self._edits.get(layer, ()))

    def _drop(self, layers: list[int], edit: AttentionEdit) -> None:
        for layer in layers:
            self._edits[layer] = [known for known in self._edits[layer] if known is not edit]
            if not self._edits[layer]:
                del self._edits[layer]
                _ROUTES.pop(self._adapter.decoder_attention(layer), None)
        if not self._edits:
            self._adapter.text_config._attn_implementation = self._before

    def _install(self) -> None:
        config = self._adapter.text_config
        self._before = config._attn_implementation
        config._attn_implementation = register(self._before or "eager")

    def edit(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None:
        """The last R rows edited: (output [B, R, H, d], which rows changed bool [B, R, H], weights); None for none.

        keep_weights (in `kwargs`): whether weights must come with them. Otherwise they are None where a kernel ran.
        """
        if self._gate.closed:
            return None
        call = self._call(layer, query, key, value)
        if call is None:
            return None
        edits = self._edits[layer]
        wanted = [edit.rows(call) for edit in edits]
        most = max(wanted)
        if not most:
            return None
        allowed = self._allowed_keys(mask, call.alive, most, kwargs.get("sliding_window"))
        cap = kwargs.get("softcap")
        if len(edits) == 1 and cap is None and not kwargs.get("keep_weights") and uses_triton(query, self.backend):
            made = edits[0].fused(call, allowed, kwargs.get("scaling"), self.backend)
            if made is not None:
                return (made[0].transpose(1, 2), made[1].transpose(1, 2), None) if bool(made[1].any()) else None
        logits = scaled_logits(query[:, :, -most:], key, kwargs.get("scaling"))
        if cap is not None:
            logits = (logits / cap).tanh() * cap
        touched = logits.new_zeros(logits.shape[:3], dtype=torch.bool)
        for edit, rows in zip(edits, wanted, strict=True):
            if rows:
                new = edit.logits(call, logits[:, :, -rows:], allowed[:, :, -rows:])
                if new is not logits:
                    touched[:, :, -rows:] |= (new != logits[:, :, -rows:]).any(-1)
                    logits = torch.cat([logits[:, :, :-rows], new], 2)
        weights = logits.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0)
        for edit, rows in zip(edits, wanted, strict=True):
            if rows:
                new, changed = edit.weights(call, weights[:, :, -rows:])
                if changed is not None:
                    touched[:, :, -rows:] |= changed
                    weights = torch.cat([weights[:, :, :-rows], new], 2)
        if not bool(touched.any()):
            return None
        output = weighted_values(weights, value)
        return output.transpose(1, 2).to(query.dtype), touched.transpose(1, 2), weights

    def _allowed_keys(self, mask: Any, alive: torch.Tensor, rows: int, window: int | None) -> torch.Tensor:
        """`allowed_keys`, once for all layers that are given one mask over one set of keys."""
        asked = (rows, window)
        known = self._known_keys
        if known is None or known[0] is not mask or known[1] is not alive or known[2] != asked:
            self._known_keys = known = (mask, alive, asked, allowed_keys(mask, alive, rows, window))
        return known[3]

    def _call(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> AttentionCall | None:
        now = self._cuts.at(layer)
        if now is None:
            return None
        prompt, keys = now.alive.shape[1], key.shape[2]
        behind = 0 if self._cuts.prefill else self._cuts.generated + query.shape[2]
        if self._masks is None or self._masks[0] is not now or self._masks[1] != (keys, behind):
            places = torch.arange(keys, device=key.device)
            visual = torch.zeros(key.shape[0], keys, dtype=torch.bool, device=key.device)
            visual[:, :prompt] = now.tokens.visual
            alive = (places < prompt + behind).expand(key.shape[0], -1).clone()
            alive[:, :prompt] &= now.alive if now.segment is None else now.segment.keys
            self._masks = now, (keys, behind), visual, alive  # layers between two cuts see the same keys
        _, _, visual, alive = self._masks
        return AttentionCall(layer, self._cuts.prefill, query, key, value, visual, alive, prompt)


# Registration ---------------------------------------------------------------------------------------------------------
def register(base: str) -> str:
    """The name of the routed form of an attention implementation, known to transformers from the first call on."""
    if base.startswith(PREFIX):
        return base
    name = PREFIX + base
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        if base.startswith("flex") or "paged" in base:
            raise InputError(
                f"attn_implementation: attention rows cannot be edited on {base}; "
                "load the model with attn_implementation='sdpa', 'eager' or 'flash_attention_2'"
            )
        AttentionInterface.register(name, _routed(base))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


def base_name(implementation: str | None) -> str:
    """An implementation's name without the routing prefix."""
    return (implementation or "eager").removeprefix(PREFIX)


def _routed(base: str) -> Callable[..., Any]:
    def attention(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
    ) -> Any:
        function = _base(module, base)
        route = _ROUTES.get(module)
        edited = None
        if route is not None:
            keep = base == "eager"
            edited = route.owner.edit(route.layer, query, key, value, mask, keep_weights=keep, **kwargs)
        if edited is not None and base != "eager" and edited[1].shape[1] == query.shape[2] and bool(edited[1].all()):
            return edited[0], None  # every row of every head is replaced, as in most decode steps
        output, weights = function(module, query, key, value, mask, **kwargs)
        if edited is None:
            return output, weights
        rows, touched, made = edited
        n = rows.shape[1]
        output = torch.cat([output[:, :-n], torch.where(touched[..., None], rows, output[:, -n:])], 1)
        if weights is not None and made is not None:
            new = torch.where(touched.transpose(1, 2)[..., None], made.to(weights.dtype), weights[:, :, -n:])
            weights = torch.cat([weights[:, :, :-n], new], 2)
        return output, weights

    return attention


def _base(module: nn.Module, base: str) -> Callable[..., Any]:
    if base == "eager":  # every modelling file has its own
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[base]


# Dense rows -----------------------------------------------------------------------------------------------------------
_BLOCK = 2**20  # bytes of keys that are widened at once; they stay in a core's cache


def allowed_keys(mask: Any, alive: torch.Tensor, rows: int, window: int | None = None) -> torch.Tensor:
    """Which keys the last `rows` query rows may look at, bool [B or 1, 1, rows, K].

    window: of a sliding layer, where the mask does not say it (flash attention is told apart from its mask).
    """
    keys = alive.shape[1]
    if isinstance(mask, torch.Tensor) and mask.ndim == 4:
        last = mask[:, :1, -rows:, :keys]
        return (last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min / 2) & alive[:, None, None]
    if mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 2):
        raise InputError(
            f"attention_mask: rows cannot be edited under a {type(mask).__name__}; "
            "load the model with attn_implementation='sdpa', 'eager' or 'flash_attention_2'"
        )
    ends = int(alive.any(0).nonzero().max()) + 1  # behind it a static cache is empty
    places = torch.arange(keys, device=alive.device)
    own = torch.arange(ends - rows, ends, device=alive.device)
    near = places <= own[:, None]
    if window is not None:
        near &= places > own[:, None] - window
    return (near & alive[:, None])[:, None]


def scaled_logits(query: torch.Tensor, key: torch.Tensor, scaling: float | None) -> torch.Tensor:
    """scaling * q k^T [B, H, R, K] in fp32 (fp64 stays); key heads serve groups of query heads."""
    dtype = accumulation_dtype(query.dtype)
    batch, heads, rows, width = query.shape
    grouped = query.to(dtype).reshape(batch, key.shape[1], -1, width)  # [B, H_kv, G * R, d]
    wanted = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    if key.device.type == "cpu" and key.dtype != dtype and not wanted:
        logits = _in_blocks(grouped.flatten(0, 1), key.flatten(0, 1))
    else:
        logits = grouped @ key.to(dtype).mT
    return logits.view(batch, heads, rows, -1) * (width**-0.5 if scaling is None else scaling)


def _in_blocks(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """query key^T [n, R, K] in the wider dtype of the queries [n, R, d], keys [n, K, d] widened a few heads at a time.

    A wide copy of all keys would go to memory and back, several times what the keys themselves take to read.
    """
    step = max(1, _BLOCK // max(1, key.shape[1:].numel() * query.element_size()))
    wide = query.new_empty(min(step, len(key)), *key.shape[1:])
    logits = query.new_empty(len(key), query.shape[1], key.shape[1])
    for start in range(0, len(key), step):
        block = slice(start, start + step)
        part = wide[: len(key[block])].copy_(key[block])
        torch.bmm(query[block], part.mT, out=logits[block])
    return logits


def weighted_values(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """weights @ v [B, H, R, d], in the values' dtype, as stock attention multiplies them."""
    batch, heads, rows, keys = weights.shape
    grouped = weights.to(value.dtype).reshape(batch, value.shape[1], -1, keys)
    return (grouped @ value).view(batch, heads, rows, -1)
