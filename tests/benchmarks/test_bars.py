"""The picture of a comparison shows the rows of its table, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import bars

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks" / "results" / "compare-stores.txt"


def test_the_committed_picture_is_that_of_the_table(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = bars.bars(RESULT.read_text())
    assert len(found) == 18
    assert [bar.rate for bar in found] == sorted((bar.rate for bar in found), reverse=True)
    assert {bar.loader for bar in found if not bar.ours} >= {"AnnLoader", "annbatch, chunk 512"}
    assert bars.main([str(RESULT), str(tmp_path / "new.svg")]) == 0
    committed = RESULT.with_suffix(".svg").read_text()
    for picture in (committed, (tmp_path / "new.svg").read_text()):
        for bar in found:
            assert f"{bar.rate:,}" in picture
            assert f"{bar.start:.1f}" in picture or bar.order != "shuffled stream"
            assert bar.name in picture


def test_text_without_a_table_is_refused() -> None:
    with pytest.raises(ValueError, match="expected the table of"):
        bars.bars("nothing\n")
