"""VisionZip: keep the patches that the encoder's CLS token attends to, and fold the rest into a few contextual tokens.

"VisionZip: Longer is Better but Not Necessary in Vision Language Models", arXiv 2412.04467.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from vlattn import ops
from vlattn.checks import require_bool, require_choice, require_count
from vlattn.errors import InputError
from vlattn.interventions.merged_cells import ImageCells, choose_cells
from vlattn.interventions.placement import Reduced, in_tile_order
from vlattn.interventions.tower_pruner import Reducer, TowerPruner
from vlattn.interventions.vision_attention import LayerWatch
from vlattn.kernels.reference import accumulation_dtype
from vlattn.models.adapter import Adapter
from vlattn.models.qwen2_vl import Qwen2VLAdapter
from vlattn.runtime.hooks import HookSet
from vlattn.runtime.sequence import Positions
from vlattn.runtime.session import Session
from vlattn.runtime.tokens import VisualTokens
from vlattn.runtime.trace import Trace

Merge = Literal["official", "mean"]


class Zipped(NamedTuple):
    """What `visionzip` makes of the patches of each image.

    dominant: int64 [B, d], ids of the patches kept as they are, ascending.
    target: int64 [B, c], ids of the patches that others were folded into, ascending.
    contextual: [B, c, C], the folded tokens, in the input's dtype.
    """

    dominant: torch.Tensor
    target: torch.Tensor
    contextual: torch.Tensor


def visionzip(
    hidden: torch.Tensor,
    score: torch.Tensor,
    key: torch.Tensor,
    dominant: int,
    contextual: int,
    merge: Merge = "official",
) -> Zipped:
    """The `dominant` highest-scored patches, and the others folded into `contextual` tokens by key similarity.

    Args:
        hidden: patch features [B, N, C].
        score: attention that each patch gets [B, N]; ties go to the lower id.
        key: head-mean keys of the same layer, bias included, without any scale [B, N, D].
        dominant: d >= 1, patches kept as they are.
        contextual: c >= 1, with d + c <= N.
        merge: see `fold`.
    """
    best = ops.select_tokens(score, dominant)[0]  # [B, d]
    taken = torch.zeros_like(score, dtype=torch.bool).scatter(1, best, True)
    rest = taken.int().argsort(dim=1, stable=True)[:, : score.shape[1] - dominant]  # [B, M], ascending

    def of_rest(values: torch.Tensor) -> torch.Tensor:
        return values.gather(1, rest[..., None].expand(-1, -1, values.shape[-1]))  # [B, M, ...]

    folded, target = fold(of_rest(hidden), of_rest(key), contextual, merge)
    return Zipped(best, rest[:, target], folded)


def fold(
    hidden: torch.Tensor, key: torch.Tensor, count: int, merge: Merge = "official"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fold M tokens into `count` of them: evenly spaced targets, which each other token joins by cosine of keys.

    Args:
        hidden: [B, M, C].
        key: [B, M, D]; a zero key joins the first target.
        count: targets, 1 <= count <= M.
        merge: `official`: the target plus the mean of those that joined it, as the released code does; `mean`: the
            mean of the whole group, target included, as the paper words it.

    Returns:
        (folded [B, count, C] in the dtype of `hidden`, target int64 [count], indices into M).
    """
    total = hidden.shape[1]
    target = torch.arange(count, device=hidden.device) * max(1, total // count)  # [c]
    joins = torch.ones(total, dtype=torch.bool, device=hidden.device)
    joins[target] = False
    dtype = accumulation_dtype(hidden.dtype)
    unit = F.normalize(key.to(accumulation_dtype(key.dtype)), dim=-1)  # [B, M, D]
    choice = (unit[:, joins] @ unit[:, target].transpose(1, 2)).argmax(-1)  # [B, M - c]; ties: the first target
    group = F.one_hot(choice, count).to(dtype).transpose(1, 2)  # [B, c, M - c]
    others = group @ hidden[:, joins].to(dtype)  # [B, c, C]
    members = group.sum(-1, keepdim=True)  # [B, c, 1]
    centre = hidden[:, target].to(dtype)
    if merge == "official":
        folded = centre + others / members.clamp(min=1)
    else:
        folded = (centre + others) / (members + 1)
    return folded.to(hidden.dtype), target


def stitched_order(tiles: list[Reduced], visual: VisualTokens, image: int, contextual: int) -> torch.Tensor:
    """The tokens of an image in several tiles, as the released code orders them: the small view as it is; dominant ones
    of the other tiles, row by row of the stitched grid, which goes through the tiles; their CLS; their contextual ones.

    Args:
        tiles: the image's, the small view first; each is CLS (where there is one), dominant ascending, contextual.
        visual: tells where tiles stand in the stitched grid. Patches in padding, which the model cuts off, are kept.
        image: running index of the image.
        contextual: how many contextual tokens each tile has.

    Returns:
        [K_image, D].
    """
    here = (visual.image == image) & (visual.patch >= 0)
    tile, row, column = (values[here] for values in (visual.tile, visual.row, visual.column))
    tile = tile - tile.min()
    height, width = (int(values[tile == 0].max()) + 1 for values in (row, column))
    if not bool(((row >= height) | (column >= width)).any()):  # frames or views, not parts of one grid
        return in_tile_order(tiles, visual, image)
    crop, down, right = tile - 1, row.div(height, rounding_mode="floor"), column.div(width, rounding_mode="floor")
    below = (tile > 0) & (down > 0)
    # Padding is cut evenly on both sides, so a grid of several rows of tiles always shows one below the first.
    across = int(((crop - right)[below] // down[below])[0]) if bool(below.any()) else len(tiles) - 1
    dominant, place, cls, rest = [], [], [], []
    for number, part in enumerate(tiles[1:]):
        ids, features = part.ids[0], part.features[0]
        lead = int(ids[0] == -1)
        patch = ids[lead : len(ids) - contextual]
        stitched_row = number // across * height + patch // width
        place.append(stitched_row * across * width + number % across * width + patch % width)
        dominant.append(features[lead : len(ids) - contextual])
        cls.append(features[:lead])
        rest.append(features[len(ids) - contextual :])
    order = torch.cat(place).argsort()
    return torch.cat([tiles[0].features[0], torch.cat(dominant)[order], *cls, *rest])


@dataclass(frozen=True)
class VisionZip(TowerPruner):
    """VisionZip: dominant tokens by attention, contextual tokens from the rest, dominant + contextual in all.

    "VisionZip: Longer is Better but Not Necessary in Vision Language Models", arXiv 2412.04467. Attention, keys and
    features are those of the layer whose output is the image feature; the decoder gets CLS, the dominant patches in
    raster order, then the contextual tokens. Every tile is reduced alone; the tiles of one image are ordered as in the
    released code. In towers without CLS, attention is what each patch receives from all, and `dominant` are all patches
    (ours). On the Qwen-VL families the last layer of the tower counts, the choice is made among merged cells and each
    contextual token stays at its target's place; images with no more than dominant + contextual cells stay whole.

    dominant: tokens kept as they are, CLS among them (192, 128 and 64 tokens: 162 + 30, 108 + 20, 54 + 10).
    contextual: tokens that all others are folded into.
    merge: `official` adds the mean of its group to each contextual token's own feature, as the released code does;
        `mean` averages the group, as the paper words it.
    cls: hand CLS to the decoder, as the released code does. Without it, one more patch is dominant.
    positions: `compact` renumbers the prompt after the drop, `preserve` keeps the original position ids; `auto` is
        compact, and preserve where positions have three dimensions (Qwen-VL).
    """

    dominant: int = 54
    contextual: int = 10
    merge: Merge = "official"
    cls: bool = True
    positions: Positions = "auto"

    def __post_init__(self) -> None:
        require_count("dominant", self.dominant)
        require_count("contextual", self.contextual)
        require_choice("merge", self.merge, ("official", "mean"))
        require_bool("cls", self.cls)
        require_choice("positions", self.positions, ("auto", "compact", "preserve"))

    @classmethod
    def refuses(cls, family: type[Adapter]) -> str | None:
        return None if issubclass(family, Qwen2VLAdapter) else super().refuses(family)

    def _attach(self, session: Session, hooks: HookSet, trace: Trace) -> None:
        if not isinstance(session.adapter, Qwen2VLAdapter):
            super()._attach(session, hooks, trace)
            return
        layers = [session.adapter.feature_layer]
        choose_cells("VisionZip", session, hooks, trace, self.positions, layers, self._of_cells)

    def _of_cells(self, image: ImageCells) -> tuple[torch.Tensor, torch.Tensor | None]:
        total = len(image.features)
        if total <= self.dominant + self.contextual:
            return torch.arange(total, device=image.features.device), None
        found = visionzip(
            image.features[None],
            image.received[0][None],
            image.key[0][None],
            self.dominant,
            self.contextual,
            self.merge,
        )
        kept = torch.cat([image.features[found.dominant[0]], found.contextual[0]])
        return torch.cat([found.dominant[0], found.target[0]]), kept

    def _reducer(self, session: Session, hooks: HookSet, trace: Trace) -> Reducer:
        adapter = session.adapter
        patches, with_cls = adapter.patches, self.cls and adapter.has_cls
        dominant = self.dominant - int(with_cls)
        if dominant < 1 or self.dominant + self.contextual > patches:
            raise InputError(
                f"dominant, contextual: got {self.dominant}, {self.contextual}; an image has {patches} patches"
                f"{' and CLS is one of the dominant' if with_cls else ''}, so give dominant >= {1 + int(with_cls)} "
                f"and dominant + contextual <= {patches}"
            )
        watch = LayerWatch(adapter, adapter.feature_layer, hooks)
        cls_rows: list[torch.Tensor] = []

        def keep_cls(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            cls_rows[:] = [hidden[:, :1]]

        if with_cls:
            for layers in adapter.encoders:
                hooks.after(layers[adapter.feature_layer], keep_cls)

        def reduce(features: torch.Tensor) -> Reduced:
            view = watch.view()
            hidden = features[:, features.shape[1] - patches :]  # [tiles, P, C]
            found = visionzip(hidden, view.salience(), view.keys(), dominant, self.contextual, self.merge)
            rows = hidden.gather(1, found.dominant[..., None].expand(-1, -1, hidden.shape[-1]))
            front = [cls_rows.pop().to(hidden.dtype)] if with_cls else []
            ids = [found.dominant.new_full((len(hidden), int(with_cls)), -1), found.dominant]
            ids.append(torch.full_like(found.target, -2))
            return Reduced(torch.cat([*front, rows, found.contextual], 1), torch.cat(ids, 1), selected=False)

        return reduce

    def _arrange(self, tiles: list[Reduced], visual: VisualTokens, image: int) -> torch.Tensor:
        return stitched_order(tiles, visual, image, self.contextual)
