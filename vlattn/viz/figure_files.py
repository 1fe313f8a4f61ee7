"""What figures of accuracy against cost have in common: their style, and the two files they are written to."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def style(size: int = 10) -> dict[Any, Any]:
    """matplotlib settings: text in an SVG stays text, and equal results give equal files. size: of the font."""
    bare = {"axes.spines.top": False, "axes.spines.right": False}
    return {"font.size": size, **bare, "svg.fonttype": "none", "svg.hashsalt": "vlattn"}


def save(figure: Any, out: Path, name: str, dpi: int = 150) -> list[Path]:
    """Write out/NAME.png and out/NAME.svg; the folder is made."""
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{name}.png", out / f"{name}.svg"]
    figure.savefig(paths[0], dpi=dpi)
    figure.savefig(paths[1], metadata={"Date": None})
    return paths
