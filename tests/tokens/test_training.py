"""The training loop of docs/tokens.md on the real mouse data: losses fall below the unigram entropy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hbx_gpu.atlas import RaggedAtlas
from hbx_gpu.cli import main

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tokens.md"


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """Names that the blocks of "Train on it" define."""
    text = PAGE.read_text().partition("## Train on it")[2]
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    return names


@pytest.fixture(scope="module")
def dataset(real_h5ad: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("mouse") / "atlas"
    assert main(["ingest", str(real_h5ad[0]), "--atlas", str(path)]) == 0
    return RaggedAtlas.checkout_latest(path).query().to_cell_dataset("gene_expression")


@pytest.mark.slow
@pytest.mark.parametrize(("model", "steps"), [("geneformer", 100), ("scgpt", 60), ("tahoe-x1", 60)])
def test_a_small_transformer_learns(page: dict[str, Any], dataset: Any, model: str, steps: int) -> None:
    uids = [str(uid) for uid in dataset.feature_uids]
    specials = {"<pad>": 0, "<mask>": 1, "<cls>": 2, "<eos>": 3}
    vocabulary = {uid: i + 4 for i, uid in enumerate(uids)} | specials
    recipe, n_bins = page["recipes"](vocabulary, dict.fromkeys(uids, 1.0))[model]
    losses, entropy = page["train"](dataset, recipe, len(vocabulary), steps, n_bins)
    last = float(np.mean(losses[-10:]))
    assert last < losses[0]
    assert last < entropy
