"""What two layers of a vision tower attend to, by visual token: read from projections, on any attention backend.

Where patches merge into a token, their scores add up (to a constant factor).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from vlattn import ops
from vlattn.errors import InputError
from vlattn.interventions.merged_cells import CellWatch
from vlattn.interventions.paint_select import TileScores
from vlattn.interventions.vision_attention import no_pass
from vlattn.models.adapter import Adapter
from vlattn.models.llava_onevision import LlavaOnevisionAdapter
from vlattn.models.qwen2_vl import Qwen2VLAdapter
from vlattn.runtime.hooks import HookSet, as_keywords
from vlattn.runtime.session import Session


class TowerWatch(Protocol):
    """Looks at a tower whenever it runs."""

    def scores(self, call: Mapping[str, Any]) -> TileScores:
        """The scores of the last pass, once. call: the keyword arguments of the multimodal forward."""
        ...


def watch_tower(session: Session, hooks: HookSet, received: bool) -> TowerWatch:
    """Watch the first layer and the one whose output is the image feature.

    The score is the CLS row of the attention, mean over heads; where there is no CLS it is the attention received from
    all patches. On Qwen2.5-VL layers that attend in windows are passed over.

    received: tell the attention received beside that of CLS.
    """
    if isinstance(session.adapter, Qwen2VLAdapter):
        return _PackedWatch(session, hooks)
    return _GridWatch(session, hooks, received)


def _patches_left(session: Session, layer: int) -> torch.Tensor | None:
    """Patches that enter a vision layer, int64 [images, n] padded with -1, as pruners in the tower tell, or None."""
    for trace in session.traces:
        before = [pruned for pruned in trace.kept_by_layer if pruned < layer]
        if before:
            return trace.kept_by_layer[max(before)]
    return None


# Towers whose tiles are rows of one length ----------------------------------------------------------------------------
class _Look:
    """One layer of every tower. cls, received: [tiles, patches], from the last pass; NaN where a patch is padding."""

    def __init__(self, adapter: Adapter, layer: int, received: bool, hooks: HookSet) -> None:
        self.cls: torch.Tensor | None = None
        self.received: torch.Tensor | None = None
        self._lead, self._wanted = int(adapter.has_cls), received or not adapter.has_cls
        self._mask: Any = None
        self._held: dict[str, torch.Tensor] = {}
        for layers in adapter.encoders:
            attention = layers[layer].self_attn if hasattr(layers[layer], "self_attn") else layers[layer].attention
            hooks.before(attention, self._note)
            for name in "qk":
                norm = getattr(attention, f"{name}_norm", None)
                hooks.after(getattr(attention, f"{name}_proj") if norm is None else norm, self._keep(name))
            hooks.after(attention, self._look)

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._mask = as_keywords(module, args, kwargs).get("attention_mask")

    def _keep(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            self._held[name] = output

        return hook

    def _look(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        q, k = (self._held.pop(name).unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for name in "qk")
        alive, lead = _alive(self._mask, k.shape[2]), self._lead
        self._mask = None
        scale = q.shape[-1] ** -0.5
        self.cls = self.received = None
        if lead:
            row = ops.query_row_attention(q[:, :, :1], k, scale=scale, key_mask=alive)  # [tiles, H, 1, 1 + P]
            self.cls = _without(row.mean(1)[:, 0], alive)[:, 1:]
        if self._wanted:
            sums = ops.received_attention(q, k, scale=scale, key_mask=alive, query_mask=alive)  # [tiles, H, lead + P]
            self.received = _without(sums.mean(1), alive)[:, lead:]

    def take(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(score, attention received where asked for), and forget them."""
        score, received = self.cls if self._lead else self.received, self.received
        if score is None:
            raise no_pass()
        self.cls = self.received = None
        return score, received


def _alive(mask: Any, keys: int) -> torch.Tensor | None:
    """Which keys an attention mask lets anyone see, bool [tiles, keys]; None for all."""
    if mask is None:
        return None
    if mask.ndim == 2:
        return mask[:, :keys].bool()
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return seen[:, 0, :, :keys].any(1)


def _without(score: torch.Tensor, alive: torch.Tensor | None) -> torch.Tensor:
    return score if alive is None else score.masked_fill(~alive, torch.nan)


class _GridWatch:
    """Towers of the CLIP or SigLIP kind, and InternVL's."""

    def __init__(self, session: Session, hooks: HookSet, received: bool) -> None:
        self._session, self._adapter = session, session.adapter
        self._layers = (0, session.adapter.feature_layer)
        self._early = _Look(session.adapter, self._layers[0], received, hooks)
        self._late = _Look(session.adapter, self._layers[1], False, hooks)
        vision = session.adapter.config.vision_config
        size, patch = (x if isinstance(x, Sequence) else (x, x) for x in (vision.image_size, vision.patch_size))
        self._grid = size[0] // patch[0], size[1] // patch[1]

    def scores(self, call: Mapping[str, Any]) -> TileScores:
        early, received = self._early.take()
        late, _ = self._late.take()
        pooled = isinstance(self._adapter, LlavaOnevisionAdapter)
        pooled = pooled and bool((self._adapter.visual_kinds(call) == 1).any())
        early, late = (self._by_token(x, at, pooled) for x, at in zip((early, late), self._layers, strict=True))
        if received is not None:
            received = self._by_token(received, self._layers[0], pooled).flatten()
        return TileScores(early.flatten(), late.flatten(), received, [early.shape[1]] * early.shape[0])

    def _by_token(self, score: torch.Tensor, layer: int, pooled: bool) -> torch.Tensor:
        """[tiles, visual tokens of a tile] from what a layer gave its patches."""
        rows, columns = self._grid
        score = _spread(score, _patches_left(self._session, layer), rows * columns)
        grid = score.unflatten(1, self._grid)
        if pooled:  # video frames of LLaVA-OneVision, in its own way
            cells = [(side + 1) // 2 for side in self._grid]
            return F.interpolate(grid[:, None], size=cells, mode="bilinear")[:, 0].flatten(1)
        return sum_cells(grid, self._adapter.grid)


def sum_cells(grid: torch.Tensor, cells: tuple[int, int]) -> torch.Tensor:
    """Scores of patches [tiles, rows, columns] added up in blocks, one for each of cells[0] * cells[1] visual tokens.

    Returns:
        [tiles, cells], row-major; NaN patches count as 0, a cell of none but them is NaN.
    """
    blocks = grid.unflatten(2, (cells[1], -1)).unflatten(1, (cells[0], -1)).transpose(2, 3).flatten(3)
    there = ~blocks.isnan()
    return blocks.nansum(-1).masked_fill(~there.any(-1), torch.nan).flatten(1)


def _spread(score: torch.Tensor, left: torch.Tensor | None, patches: int) -> torch.Tensor:
    """Scores [tiles, n] of the patches that are left, at their places among all [tiles, P]; NaN for the others."""
    if score.shape[1] == patches:
        return score
    if left is None or left.shape != score.shape:
        raise InputError(
            f"pixel_values: a layer of the vision tower saw {score.shape[1]} patches a tile where this model's config "
            f"has {patches}, and nothing tells which; give images of the model's own size, without merging methods"
        )
    return score.new_full((score.shape[0], patches), torch.nan).scatter(1, left.to(score.device), score)


# Towers that pack the patches of all images ---------------------------------------------------------------------------
class _PackedWatch(CellWatch):
    """Towers of the Qwen-VL kind; a tile is an image, or one temporal step of a video."""

    def __init__(self, session: Session, hooks: HookSet) -> None:
        self._session = session
        last, vision = session.adapter.feature_layer, session.adapter.config.vision_config
        whole = getattr(vision, "fullatt_block_indexes", None)
        whole = list(range(last + 1)) if whole is None else [layer for layer in sorted(whole) if layer <= last]
        if not whole:
            raise InputError(
                "model: every layer of its vision tower attends in windows, so attention received cannot be compared "
                "across an image; set vision_config.fullatt_block_indexes"
            )
        self._watched = (whole[0], whole[-1])
        super().__init__(session, self._watched, hooks)

    def scores(self, call: Mapping[str, Any]) -> TileScores:
        if not self._grids:
            raise no_pass()
        grids, self._grids = self._grids, []
        cells = [t * h * w // self._merge**2 for t, h, w in grids]
        early, late = (self._in_order(number, cells) for number in range(2))
        return TileScores(early, late, None, [h * w // self._merge**2 for t, h, w in grids for _ in range(t)])

    def _in_order(self, number: int, cells: list[int]) -> torch.Tensor:
        """Attention received by each cell in a watched layer [cells], in the decoder's order."""
        layer = self._layers[number]
        received, layer.received, layer.key = layer.received, None, None
        assert received is not None
        if len(received) != sum(cells):  # in the tower's order, like the patches that pruners count
            received = self._spread(received, _patches_left(self._session, self._watched[number]), cells)
        return received if self._order is None else received[self._order.to(received.device)]

    def _spread(self, received: torch.Tensor, left: torch.Tensor | None, cells: list[int]) -> torch.Tensor:
        assert left is not None  # only pruners that tell what is left shorten these towers
        starts = torch.tensor(cells).cumsum(0) - torch.tensor(cells)
        rows = left.cpu() // self._merge**2 + starts[:, None]
        places = rows[left.cpu() >= 0][:: self._merge**2].to(received.device)
        return received.new_full((sum(cells),), torch.nan).index_put((places,), received)
