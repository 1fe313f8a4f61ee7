"""What each family of metrics makes of paths that are too short: one table that tests and documentation share.

| case | string similarity | string distance | geometric | MultiMatch | behaviour |
|---|---|---|---|---|---|
| both empty | 1 | 0 | NaN | NaN | NaN |
| one empty | 0 | length of the other | NaN | NaN | NaN |
| length 1 | defined | defined | defined, TDE for k = 1 | NaN | search 1, refix 0, revisit 0 |
| length 2 | defined | defined | defined, TDE for k <= 2 | NaN | defined |

"One empty" is the case too where a metric counts time and no fixation is long enough to count. A normalised distance is
1 there. With `on_degenerate="raise"` a value that is NaN, or that an empty path decided, is an error instead.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vlattn.checks import require_choice
from vlattn.errors import InputError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Degenerate = Literal["nan", "raise"]
Family = Literal["string similarity", "string distance", "geometric", "MultiMatch", "behaviour"]

FAMILIES: tuple[Family, ...] = ("string similarity", "string distance", "geometric", "MultiMatch", "behaviour")
POLICY: dict[str, tuple[str, ...]] = {
    "both empty": ("1", "0", "NaN", "NaN", "NaN"),
    "one empty": ("0", "length of the other", "NaN", "NaN", "NaN"),
    "length 1": ("defined", "defined", "defined, TDE for k = 1", "NaN", "search 1, refix 0, revisit 0"),
    "length 2": ("defined", "defined", "defined, TDE for k <= 2", "NaN", "defined"),
}
"""By case, a cell for each of `FAMILIES`."""


def policy_table() -> str:
    """`POLICY` in Markdown."""
    head = ["| case | " + " | ".join(FAMILIES) + " |", "|---" * (len(FAMILIES) + 1) + "|"]
    return "\n".join([*head, *(f"| {case} | " + " | ".join(cells) + " |" for case, cells in POLICY.items())])


def settle(metric: str, values: Floats, empty: NDArray[np.bool_], on_degenerate: Degenerate) -> Floats:
    """The values as they are, or an error for the first that a degenerate path decided.

    Args:
        metric: what errors call it. values: [B], or [B, K] of which a row is degenerate if all of it is NaN.
        empty: bool [B], where a path is empty.
    """
    require_choice("on_degenerate", on_degenerate, ("nan", "raise"))
    undefined = np.isnan(values) if values.ndim == 1 else np.isnan(values).all(1)
    rows = np.flatnonzero(empty | undefined)
    if on_degenerate == "raise" and len(rows):
        why = "a path is empty" if empty[rows[0]] else "paths are too short, or lack what it needs"
        raise InputError(
            f"{metric}: undefined for {len(rows)} of {len(values)} rows, the first of them {rows[0]}, where {why}; "
            "leave such paths out, or give on_degenerate='nan'"
        )
    return values
