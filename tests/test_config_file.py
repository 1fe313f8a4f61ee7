from __future__ import annotations

from pathlib import Path

import pytest

from vlattn.config_file import read_config
from vlattn.probing.sweep_config import ProbeSweepConfig


def test_a_folder_of_results_does_not_hide_the_shipped_file_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "probe_digits").mkdir()
    monkeypatch.chdir(tmp_path)
    assert read_config(ProbeSweepConfig, "probe_digits", "probe_digits")["epochs"] == 10


def test_a_file_of_the_users_hides_the_shipped_one_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "probe_digits").write_text("subjects: []\npoolers: [gap]\n")
    monkeypatch.chdir(tmp_path)
    assert read_config(ProbeSweepConfig, "probe_digits", "probe_digits")["subjects"] == []
