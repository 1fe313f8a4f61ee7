"""What is installed, what an import costs, and what the package offers."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import vlattn

ROOT = Path(__file__).parent.parent
MAPPED = ("assets", "configs", "eval", "kernels")


def pyproject_list(name: str) -> list[str]:
    text = (ROOT / "pyproject.toml").read_text()
    body = re.search(rf"^{name} = \[(.*?)\]", text, re.MULTILINE | re.DOTALL)
    assert body is not None
    return re.findall(r'"([^"]+)"', body[1])


def holds(folder: Path, pattern: str) -> bool:
    return any(path.is_file() and not path.name.startswith(".") for path in folder.glob(pattern))


def folders() -> dict[str, Path]:
    """Every folder that can be a package: {dotted name: path}."""
    found = {"vlattn": ROOT / "vlattn"}
    for top, prefix in [(ROOT / "vlattn", "vlattn"), *[(ROOT / name, f"vlattn.{name}") for name in MAPPED]]:
        if prefix != "vlattn":
            found[prefix] = top
        for path in top.rglob("*"):
            if path.is_dir() and "__pycache__" not in path.parts:
                found[".".join([prefix, *path.relative_to(top).parts])] = path
    return found


def test_the_package_list_is_the_folders_that_hold_python_or_are_mapped_and_hold_data() -> None:
    listed = pyproject_list("packages")
    mapped = {f"vlattn.{name}" for name in MAPPED}
    expected = {
        name for name, path in folders().items() if holds(path, "*.py") or (name in mapped and holds(path, "**/*"))
    }
    assert listed == sorted(set(listed))
    assert set(listed) == expected


def test_importing_vlattn_and_its_errors_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, vlattn, vlattn.errors; dir(vlattn); vlattn.InputError; "
        "print([m for m in ('torch', 'transformers', 'numpy', 'PIL') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == "[]"


def test_every_exported_name_resolves_to_its_namesake_and_unknown_names_do_not() -> None:
    assert vlattn.__all__ == sorted(vlattn.__all__)
    for name in vlattn.__all__:
        found = getattr(vlattn, name)
        assert found.__name__ == name
        assert name in dir(vlattn)
        assert found.__doc__
    with pytest.raises(AttributeError, match="no attribute 'FastVV'"):
        vlattn.FastVV  # noqa: B018


def test_an_input_error_is_a_value_error_so_that_callers_may_catch_either() -> None:
    assert issubclass(vlattn.InputError, ValueError)


def test_type_checkers_see_exactly_the_exported_names() -> None:
    text = (ROOT / "vlattn" / "__init__.py").read_text()
    assert sorted(re.findall(r"^    from .* import \w+ as (\w+)$", text, re.MULTILINE)) == vlattn.__all__
