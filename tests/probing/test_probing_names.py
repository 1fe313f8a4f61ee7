"""What `vlattn.probing` offers, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import vlattn.probing as probing

WANTED = """BLR_GRID Backbone POOLERS Pooler ProbeResult ProbeSettings TokenBatches TokenCache Tokens fast_settings
knn_probe load_backbone load_head load_result make_pooler parse_pooler train_probe"""


@pytest.mark.parametrize("name", probing.__all__)
def test_a_name_is_what_its_home_defines(name: str) -> None:
    home = import_module(probing._HOMES[name])
    found = getattr(probing, name)
    assert found is getattr(home, name)
    assert getattr(found, "__module__", home.__name__) in (home.__name__, "builtins")


def test_the_names_that_people_look_for_are_there_and_listed() -> None:
    assert set(WANTED.split()) <= set(probing.__all__) <= set(dir(probing))
    with pytest.raises(AttributeError, match="no attribute 'EPP'"):
        probing.EPP  # noqa: B018


def test_no_name_is_hidden_by_a_module_once_that_is_imported() -> None:
    modules = {path.stem for path in Path(probing.__file__).parent.glob("*.py")}
    assert not modules & set(probing.__all__)


def test_importing_the_room_alone_is_light() -> None:
    code = (
        "import sys, vlattn.probing\n"
        "print([m for m in ('torch', 'transformers', 'timm', 'numpy', 'PIL') if m in sys.modules])\n"
        "from vlattn.probing import BLR_GRID\n"
        "print([m for m in ('transformers', 'timm', 'open_clip') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "[]"]
