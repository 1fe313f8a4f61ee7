"""JSON for files that people read as well."""

from __future__ import annotations

import json
import re
from typing import Any


def as_text(found: dict[str, Any]) -> str:
    """JSON with each list of numbers on one line."""
    text = json.dumps(found, indent=1)
    return re.sub(r"\[[^\[\]{}]*\]", lambda match: re.sub(r"\s+", " ", match[0]), text) + "\n"
