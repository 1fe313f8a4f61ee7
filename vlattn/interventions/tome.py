"""ToMe: in every layer of the vision tower, average the pairs of tokens whose keys are most alike.

"Token Merging: Your ViT But Faster", arXiv 2210.09461.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from vlattn.checks import (
    require_bool,
    require_choice,
    require_count,
    require_number,
    require_one,
)
from vlattn.errors import InputError
from vlattn.interventions.placement import Reduced
from vlattn.interventions.tome_merge import (
    Rate,
    exact_schedule,
    follow,
    match,
    merge,
    merge_schedule,
    proportional_bias,
    smallest_source,
)
from vlattn.interventions.tower_pruner import Reducer, TowerPruner
from vlattn.interventions.vision_attention import no_pass
from vlattn.kernels.reference import accumulation_dtype
from vlattn.runtime.hooks import HookSet
from vlattn.runtime.sequence import Positions
from vlattn.runtime.session import Session
from vlattn.runtime.trace import Trace

Order = Literal["min_source", "official"]


@dataclass
class _Pass:
    """One run of a tower.

    size: [B, t], how many original tokens each one stands for; None while nothing has merged.
    groups: int64 [B, N], where each original token is now.
    length: t, tokens now.
    firsts: {layer: int64 [B, t]}, the first original token in each one after that layer's merge.
    merged: [B, t, C], between the merge in a layer and that layer's end.
    through: what the layer's MLP made of `merged`.
    """

    size: torch.Tensor | None
    groups: torch.Tensor
    length: int
    firsts: dict[int, torch.Tensor] = field(default_factory=dict)
    merged: torch.Tensor | None = None
    through: torch.Tensor | None = None


class MergingTower:
    """Hooks on the layers of one tower of the CLIP or SigLIP kind that merge `counts[i]` tokens in layer i.

    The merge stands between attention and MLP, inside the layer's own forward: its second norm and its MLP get the
    shorter sequence, and the layer's residual sum, which still has the longer one, is replaced behind the layer.
    """

    def __init__(self, layers: Sequence[Any], counts: Sequence[int], cls: bool, prop_attn: bool) -> None:
        self.layers, self.counts, self.cls, self.prop_attn = layers, counts, cls, prop_attn
        self.now: _Pass | None = None
        self._key: torch.Tensor | None = None

    def attach(self, hooks: HookSet) -> None:
        hooks.before(self.layers[0], self._begin)
        for index, r in enumerate(self.counts):
            layer = self.layers[index]
            if self.prop_attn and index:
                hooks.before(layer, self._weigh)
            if r:
                hooks.after(layer.self_attn.k_proj, self._keep_key)
                hooks.before(layer.layer_norm2, self._merge(index, r, layer.self_attn.num_heads))
                hooks.after(layer.mlp, self._hold_back)
                hooks.after(layer, self._finish)

    def take(self) -> _Pass | None:
        """The pass that has ended, once."""
        now, self.now = self.now, None
        return now

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        batch, tokens = hidden.shape[:2]
        self.now = _Pass(None, torch.arange(tokens, device=hidden.device).expand(batch, -1), tokens)

    def _weigh(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple | None:
        """Before a layer: its attention counts each key as often as it stands for tokens."""
        if self.now is None or self.now.size is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        bias = proportional_bias(self.now.size, hidden.dtype).expand(-1, 1, hidden.shape[1], -1)
        if len(args) > 1:
            return (args[0], bias, *args[2:]), kwargs
        return args, {**kwargs, "attention_mask": bias}

    def _keep_key(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        self._key = output

    def _merge(self, index: int, r: int, heads: int) -> Any:
        """Between attention and MLP: shorten what the layer's second norm gets."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple | None:
            now, key, x = self.now, self._key, args[0]  # x: [B, t, C]
            self._key = None
            fits = min(r, (x.shape[1] - int(self.cls)) // 2)
            if now is None or key is None or fits < 1:
                return None
            matching = match(key.unflatten(-1, (heads, -1)).mean(2), fits, self.cls)
            size = now.size
            if size is None:
                size = torch.ones(x.shape[:2], dtype=accumulation_dtype(x.dtype), device=x.device)
            now.merged, now.size = merge(x, size, matching)
            now.groups, now.length = follow(now.groups, matching), now.merged.shape[1]
            now.firsts[index] = smallest_source(now.groups, now.length)
            return (now.merged, *args[1:]), kwargs

        return hook

    def _hold_back(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        """After the MLP: what it made waits for the layer's end; the residual sum gets zeros of its own length."""
        now = self.now
        if now is None or now.merged is None:
            return None
        now.through = output
        return output.new_zeros(()).expand(output.shape[0], 1, output.shape[2])

    def _finish(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        now = self.now
        if now is None or now.merged is None or now.through is None:
            return None
        short = now.merged + now.through
        now.merged = now.through = None
        return (short, *output[1:]) if isinstance(output, tuple) else short


@dataclass(frozen=True)
class ToMe(TowerPruner):
    """ToMe inside the CLIP or SigLIP tower of a vision-language model.

    "Token Merging: Your ViT But Faster", arXiv 2210.09461. In each layer up to the one whose output is the image
    feature, after attention, the most similar pairs of tokens (cosine of head-mean keys, matched between even and odd
    places) become their average, weighted by how many patches each stands for. The paper merges in classifiers; the
    place in these models, the exact budget and the order for the decoder are ours. Every tile merges alone.

    keep: visual tokens per encoder image (tile) that reach the decoder, CLS counted where the model hands it over, by
        an even schedule that lands on it exactly. Give this or `r`.
    r: tokens that each layer merges away, the paper's way: a number; a pair (r, inflect) for a number that changes
        linearly over the layers, inflect=-1 falling from 2 r to 0; a list for one number a layer. A layer never merges
        more than half of its patches.
    prop_attn: add the log of a token's size to its attention logits (proportional attention). It needs eager or sdpa
        attention in the tower.
    order: `min_source` puts each token where its first patch was, in raster order; `official` leaves the order in which
        merging put them, tile after tile.
    positions: `compact` renumbers the prompt after the drop, `preserve` keeps the original position ids; `auto` is
        compact.
    """

    keep: int | None = None
    r: Rate | None = None
    prop_attn: bool = True
    order: Order = "min_source"
    positions: Positions = "auto"

    def __post_init__(self) -> None:
        require_one(keep=self.keep, r=self.r)
        if self.keep is not None:
            require_count("keep", self.keep)
        elif isinstance(self.r, list):
            for one in self.r:
                require_count("r", one, least=0)
        elif isinstance(self.r, tuple) and len(self.r) == 2:
            require_count("r", self.r[0], least=0)
            require_number("r", self.r[1], -1.0, 1.0)
        else:
            require_count("r", self.r, least=0)
        require_bool("prop_attn", self.prop_attn)
        require_choice("order", self.order, ("min_source", "official"))
        require_choice("positions", self.positions, ("auto", "compact", "preserve"))

    def _reducer(self, session: Session, hooks: HookSet, trace: Trace) -> Reducer | None:
        adapter = session.adapter
        layers, patches = adapter.feature_layer + 1, adapter.patches
        if self.keep is None:
            assert self.r is not None
            if isinstance(self.r, list) and len(self.r) > layers:
                raise InputError(
                    f"r: got numbers for {len(self.r)} layers, but the image feature comes from layer {layers - 1} and "
                    f"later ones do not reach it; give at most {layers}"
                )
            counts = merge_schedule(self.r, layers)
        else:
            counts = exact_schedule(patches, self.keep, layers, int(adapter.cls_in_features))
        implementation = adapter.tower.config._attn_implementation or "eager"
        if self.prop_attn and implementation not in ("eager", "sdpa"):
            raise InputError(
                f"prop_attn: it adds to attention logits inside the tower, which {implementation} cannot; "
                "load the model with attn_implementation='sdpa' or use prop_attn=False"
            )
        if not any(counts):
            return None
        cls = int(adapter.has_cls)
        towers = [MergingTower(encoder, counts, adapter.has_cls, self.prop_attn) for encoder in adapter.encoders]
        for tower in towers:
            tower.attach(hooks)

        def reduce(features: torch.Tensor) -> Reduced:
            done = next((tower.take() for tower in towers if tower.now is not None), None)
            if done is None:
                raise no_pass()
            firsts = {layer: found[:, cls:] - cls for layer, found in done.firsts.items()}
            trace.kept_by_layer = {layer: found.sort(-1).values.cpu() for layer, found in firsts.items()}
            ids = smallest_source(done.groups, done.length)[:, cls:] - cls  # [tiles, K], in merged order
            groups = done.groups[:, cls:] - cls  # [tiles, P]
            lead = features.shape[1] - ids.shape[1]
            patch_rows = features[:, lead:]
            if self.order == "min_source":
                order = ids.argsort(-1)
                patch_rows = patch_rows.gather(1, order[..., None].expand(-1, -1, features.shape[-1]))
                ids, groups = ids.gather(1, order), order.argsort(-1).gather(1, groups)
            trace.notes["groups"] = groups.cpu()
            rows = torch.cat([features[:, :lead], patch_rows], 1)
            ids = torch.cat([ids.new_full((len(ids), lead), -1), ids], 1)
            return Reduced(rows, ids, selected=self.order == "min_source")

        return reduce
