"""docs/statistics.md: medians of an atlas make tokens of Geneformer, end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hbx_gpu import RaggedAtlas, tokens
from hbx_gpu.batch import SparseBatch
from hbx_gpu.errors import InvalidDataError
from hbx_gpu.testing import example_atlas
from tests.pages import blocks

PAGE = Path(__file__).resolve().parents[2] / "docs" / "statistics.md"


def test_medians_of_an_atlas_are_those_of_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    example_atlas(tmp_path / "atlas")
    monkeypatch.chdir(tmp_path)
    (source,) = (text for language, text in blocks(PAGE) if language == "python" and "geneformer_v2" in text)
    session: dict[str, Any] = {}
    exec(compile(source, str(PAGE), "exec"), session)
    batch, vocabulary = session["batch"], session["vocabulary"]
    # By hand: genes of the first cell of the batch, by falling count / total * 10,000 / median.
    atlas = RaggedAtlas.checkout_latest(tmp_path / "atlas")
    found = atlas.statistics()
    dataset = atlas.query().to_cell_dataset()
    cell = dataset[int(batch["index"][0])]
    assert isinstance(cell, SparseBatch)
    ranked = cell.values / cell.values.sum() * 10_000 / found.median[cell.indices]
    order = cell.indices[np.lexsort((cell.indices, -ranked))]
    genes = [vocabulary[found.feature_uids[column]] for column in order]
    ids = batch["input_ids"][0][: int(batch["lengths"][0])].tolist()
    assert ids == [vocabulary["<cls>"], *genes, vocabulary["<eos>"]]


def test_statistics_without_medians_are_refused(tmp_path: Path) -> None:
    found = example_atlas(tmp_path).statistics(medians=False, keep=False)
    with pytest.raises(InvalidDataError, match="the table is empty"):
        tokens.geneformer_v2({"<pad>": 0, "<mask>": 1, "<cls>": 2, "<eos>": 3, "f1": 4}, found)
