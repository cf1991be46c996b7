"""docs/chromatin.md: every Python block, one after the other in one session."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest


def test_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "chromatin.md"
    sources = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    assert len(sources) == 5
    monkeypatch.chdir(tmp_path)
    session: dict[str, Any] = {}
    for source in sources:
        exec(compile(source, str(page), "exec"), session)
    assert session["dataset"].n_features == 200 + 200 + 190
    assert session["x"].shape == (200 % 64, 590)
    assert session["peaks"].feature_uids.tolist() == [
        "chr2:1000-41000",
        "chr1:500000-600000",
        "chr1:550000-551000",
    ]
    frame = session["found"].to_frame()
    assert len(frame) == 200 * 100
    cuts = np.concatenate([frame["start"], frame["end"] - 1])
    chrom = np.concatenate([frame["chrom"]] * 2)
    expected = ((chrom == "chr1") & (cuts >= 500_000) & (cuts < 600_000)).sum()
    peaks = session["peaks"][:]
    assert peaks.values[peaks.indices == 1].sum() == expected
    assert "590" in capsys.readouterr().out
