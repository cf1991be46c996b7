"""``python -m benchmarks.tokens`` runs every recipe and writes its figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import tokens


def test_every_recipe_has_a_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--cells", "120", "--genes", "1100", "--rows", "32", "--rounds", "1"]
    assert tokens.main([*options, "--data", str(tmp_path / "data"), "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "tokens.json").read_text())["results"]
    assert set(results) == {"CSR, no tokens", *tokens.RECIPES}
    for name, each in results.items():
        assert each["median"] > 0
        assert name in printed
