"""The settings that pruners in front of the decoder share: how many visual tokens to keep, and how positions follow."""

from __future__ import annotations

from dataclasses import dataclass

from vlattn.errors import InputError
from vlattn.interventions.base import Intervention
from vlattn.models.adapter import Adapter
from vlattn.runtime.sequence import Positions


def known_grid(adapter: Adapter) -> tuple[int, int] | None:
    """The grid of one tile; None in families whose images have any size."""
    try:
        return adapter.grid
    except InputError:
        return None


@dataclass(frozen=True)
class VisualPruner(Intervention):
    """Base of pruners that act before the decoder and end with a number of visual tokens.

    keep: visual tokens per image that reach the decoder (a CLS feature counts inside it, where the model uses one).
    positions: `compact` renumbers the prompt after the drop, as code that concatenates features does; `preserve` keeps
        the original position ids; `auto` is compact, and preserve where positions have three dimensions (Qwen-VL).
    """

    keep: int
    positions: Positions = "auto"

    place = "encoder"
    selects_features = True

    def __post_init__(self) -> None:
        if isinstance(self.keep, bool) or not isinstance(self.keep, int) or self.keep < 1:
            raise InputError(f"keep: got {self.keep!r}; give the number of visual tokens to keep, at least 1")
        if self.positions not in ("auto", "compact", "preserve"):
            raise InputError(f"positions: got {self.positions!r}; give 'auto', 'compact' or 'preserve'")

    def _check_keep(self, adapter: Adapter, tiles: bool = False) -> None:
        """Refuse a number that no image of this model can have; `tiles`: where it is counted by tile."""
        grid, lead = known_grid(adapter), int(adapter.cls_in_features)
        if grid is None or (adapter.many_tiles and not tiles):
            return
        total = grid[0] * grid[1] + lead
        if not lead < self.keep <= total:
            raise InputError(
                f"keep: got {self.keep}; this model has {total} visual tokens per image, "
                f"give {1 + lead} <= keep <= {total}"
            )
