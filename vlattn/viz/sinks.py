"""Visual sinks over their image, and where text looks before and after VAR gave their attention away."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlattn.errors import InputError
from vlattn.models.registry import adapter_for
from vlattn.runtime.hooks import HookSet
from vlattn.runtime.routing import AttentionCall, Plain
from vlattn.runtime.session import Session, close_if_empty, session_of

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import nn

    from vlattn.interventions.base import Intervention

SINK_COLOUR = "#00E5FF"


@dataclass(frozen=True)
class SinkMap:
    """One image as one decoder layer sees it.

    layer: the layer.
    sinks: bool [rows, columns], visual sinks.
    before, after: attention of the text behind the image on each visual token, mean over its rows and all heads, in the
        stock model and under the method [rows, columns]; NaN where there is no token. Fp32 or fp64.
    """

    layer: int
    sinks: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor


def sink_map(model: nn.Module, inputs: Mapping[str, Any], method: Intervention, layer: int, image: int = 0) -> SinkMap:
    """Run a prompt twice, as the model is and under `method`, and look at one layer of it.

    Args:
        model: with no intervention attached.
        inputs: keyword arguments of its forward: one prompt or a left-padded batch.
        method: a `VAR`, or a composition with one.
        layer: a decoder layer that the method acts on.
        image: running index within the batch. Of an image that is cut into tiles, its small view is shown.

    Raises:
        InputError: no such layer or image, or a prompt that ends with its image.
    """
    with _watching(model, layer, image) as before, torch.no_grad():
        model(**inputs)
    with method(model) as trace, _watching(model, layer, image) as after, torch.no_grad():
        model(**inputs)
    by_layer: Any = trace.notes.get("visual_sinks")
    if not isinstance(by_layer, dict) or layer not in by_layer:
        known = f"acts on layers {sorted(by_layer)}" if isinstance(by_layer, dict) else "finds no sinks; give a VAR"
        raise InputError(f"layer: got {layer}, but the method {known}")
    slots = torch.tensor(by_layer[layer][after.prompt], dtype=torch.int64)
    return SinkMap(layer, after.grid(torch.isin(after.slots, slots)), before.grid(), after.grid())


@dataclass
class _Watch(Plain):
    """Reads the weights of the text behind an image, and changes none.

    prompt: which prompt of the batch holds the image.
    slots, places: int64 [m] and [m, 2], running index, and row and column, of the image's tokens in this layer.
    attention: [m], on those tokens.
    shape: rows and columns of the image.
    """

    session: Session
    image: int
    prompt: int = 0
    slots: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    places: torch.Tensor = field(default_factory=lambda: torch.empty(0, 2, dtype=torch.int64))
    attention: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    shape: tuple[int, int] = (0, 0)

    def rows(self, call: AttentionCall) -> int:
        visual = self.session.visual
        if not call.prefill or visual is None:
            return 0
        mine = self._shown()
        if not bool(mine.any()):
            raise InputError(f"image: got {self.image}, but the prompts have {visual.images} images; count from 0")
        self.prompt = int(mine.any(1).nonzero()[0])
        shows = (self._slot(call) != -1).nonzero()
        behind = call.prompt - 1 - int(shows.max()) if len(shows) else 0
        if not behind:
            raise InputError(
                "inputs: no text follows the image in this layer, so nothing looks back at it; put the question after "
                "the image"
            )
        return behind

    def weights(self, call: AttentionCall, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        visual, mine = self.session.visual, self._shown()[self.prompt]
        assert visual is not None
        b = self.prompt
        row, column = (x[b][mine].cpu() for x in (visual.row, visual.column))
        self.shape = int(row.max()) + 1, int(column.max()) + 1
        by_slot = visual.slot[b][mine].cpu()
        slot = self._slot(call).cpu()
        here = torch.isin(slot, by_slot).nonzero().flatten()
        self.slots = slot[here]
        order = torch.searchsorted(by_slot, self.slots)
        self.places = torch.stack([row[order], column[order]], 1)
        self.attention = weights[b].mean((0, 1))[here.to(weights.device)].cpu()
        return weights, None

    def _slot(self, call: AttentionCall) -> torch.Tensor:
        """Running indices of the prompt's visual tokens in this layer, int64 [n]."""
        now = self.session.cuts.at(call.layer)
        assert now is not None
        return now.tokens.slot[self.prompt]

    def _shown(self) -> torch.Tensor:
        """The tokens of the image's first tile, bool [B, T]."""
        visual = self.session.visual
        assert visual is not None
        mine = (visual.image == self.image) & (visual.patch >= 0)
        first = visual.tile[mine].min() if bool(mine.any()) else -1
        return mine & (visual.tile == first)

    def grid(self, values: torch.Tensor | None = None) -> torch.Tensor:
        """Values [m] of the tokens, the weights where none are given, at their places [rows, columns]."""
        values = self.attention if values is None else values
        empty = False if values.dtype == torch.bool else torch.nan
        found = torch.full(self.shape, empty, dtype=values.dtype)
        found[self.places[:, 0], self.places[:, 1]] = values
        return found


@contextmanager
def _watching(model: nn.Module, layer: int, image: int) -> Iterator[_Watch]:
    depth = len(adapter_for(model).decoder_layers)
    if not 0 <= layer < depth:
        raise InputError(f"layer: got {layer}, but this model's decoder has layers 0 to {depth - 1}; give one of them")
    session = session_of(model, adapter_for)
    hooks = HookSet(session.gate)
    watch = _Watch(session, image)
    try:
        session.attention.add([layer], watch, hooks)
        yield watch
    finally:
        hooks.remove()
        close_if_empty(session)


# Drawing --------------------------------------------------------------------------------------------------------------
def draw_sinks(maps: Sequence[SinkMap], picture: Image, out: str | Path) -> Path:
    """Draw a row for each map: its sinks over the picture, attention before and after, and what changed.

    Args:
        maps: of `sink_map`, of one image.
        picture: the image as the model sees it: cropped as its processor does.
        out: the file; its ending chooses the format (.png, .svg, .pdf).

    Raises:
        InputError: nothing to draw, or matplotlib is missing.
    """
    if not maps:
        raise InputError("maps: got none; give at least one, of sink_map(...)")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise InputError(
            "figure: drawing needs matplotlib, which is not installed; run pip install 'vlattn[viz]'"
        ) from None
    figure = Figure(figsize=(13, 3.2 * len(maps)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, found in zip(figure.subplots(len(maps), 4, squeeze=False), maps, strict=True):
        _draw(figure, axes, found, picture)
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def _draw(figure: Any, axes: Any, found: SinkMap, picture: Image) -> None:
    """One map in four axes."""
    from matplotlib.colors import ListedColormap

    rows, columns = found.sinks.shape
    extent = (0, columns, rows, 0)
    before, after = 100 * found.before.double(), 100 * found.after.double()
    change = after - before
    top = float(torch.cat([before, after]).nan_to_num(0).max()) or 1.0
    most = float(change.abs().nan_to_num(0).max()) or 1.0
    axes[0].imshow(picture, extent=extent, aspect="equal")
    colours = ListedColormap(["#00000000", SINK_COLOUR])
    axes[0].imshow(found.sinks.numpy(), extent=extent, cmap=colours, vmin=0, vmax=1, alpha=0.3)
    drawn = [
        axes[1].imshow(before.numpy(), extent=extent, cmap="magma", vmin=0, vmax=top),
        axes[2].imshow(after.numpy(), extent=extent, cmap="magma", vmin=0, vmax=top),
        axes[3].imshow(change.numpy(), extent=extent, cmap="RdBu_r", vmin=-most, vmax=most),
    ]
    count = int(found.sinks.sum())
    axes[0].set_title(f"layer {found.layer}: {count} sinks of {rows * columns}", fontsize=10)
    masses = [float(values.nansum()) for values in (before, after)]
    axes[1].set_title(f"before: {masses[0]:.1f}% on the image", fontsize=10)
    axes[2].set_title(f"after: {masses[1]:.1f}%", fontsize=10)
    axes[3].set_title(f"after - before: {round(masses[1] - masses[0], 1) + 0.0:+.1f} points", fontsize=10)
    for each, colour in zip(axes, (SINK_COLOUR, SINK_COLOUR, SINK_COLOUR, "#000000"), strict=True):
        _outline(each, found.sinks, colour)
        each.set_xticks([])
        each.set_yticks([])
    figure.colorbar(drawn[1], ax=list(axes[1:3]), shrink=0.8, label="attention of a text row, %")
    figure.colorbar(drawn[2], ax=axes[3], shrink=0.8, label="percentage points")


def _outline(axes: Any, sinks: torch.Tensor, colour: str) -> None:
    """The border between sinks and the rest."""
    from matplotlib.collections import LineCollection

    axes.add_collection(LineCollection(borders(sinks), colors=colour, linewidths=1.4))


def borders(cells: torch.Tensor) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Sides, as ((x, y), (x, y)), between cells that are set and cells that are not, or the edge of the grid."""
    padded = torch.nn.functional.pad(cells, (1, 1, 1, 1))
    upright = (padded[1:-1, 1:] != padded[1:-1, :-1]).nonzero().tolist()  # between columns x - 1 and x
    level = (padded[1:, 1:-1] != padded[:-1, 1:-1]).nonzero().tolist()
    return [((x, y), (x, y + 1)) for y, x in upright] + [((x, y), (x + 1, y)) for y, x in level]
