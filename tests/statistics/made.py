"""Makes tests/statistics/scanpy.json with scanpy and scikit-misc, which the tests do not install.

pip install scanpy==1.11.5 scikit-misc==0.5.3 && python tests/statistics/made.py
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

N_CELLS, N_GENES, N_TOP = 300, 400, 60


def counts() -> np.ndarray:
    """int64, (300, 400). Counts of very different genes, some constant, made with a generator that stays."""
    random = np.random.RandomState(7)
    scale = 10 ** random.uniform(-2, 1.5, N_GENES)
    scale[::50] = 0
    cells = -np.log(random.random_sample((N_CELLS, N_GENES)))
    bursts = np.where(random.random_sample((N_CELLS, N_GENES)) < 0.02, random.random_sample(N_GENES) * 9, 1.0)
    found: np.ndarray = np.minimum(np.floor(cells * bursts * scale), 1023).astype(np.int64)
    return found


def batches() -> list[str]:
    """Batch of each cell."""
    return [f"b{i * i % 3}" for i in range(N_CELLS)]


def points() -> tuple[np.ndarray, np.ndarray]:
    """x with repeats, and y, for a regression."""
    random = np.random.RandomState(8)
    x = np.round(random.normal(size=150), 1)
    return x, np.sin(x) + random.normal(size=150) / 10


def main() -> None:
    import anndata as ad
    import scanpy as sc
    from skmisc.loess import loess

    model = loess(*points(), span=0.3, degree=2)
    model.fit()
    found: dict[str, object] = {"loess": model.outputs.fitted_values.tolist()}
    data = ad.AnnData(counts().astype(np.float32))
    data.obs["batch"] = batches()
    for key in (None, "batch"):
        table = sc.pp.highly_variable_genes(
            data, flavor="seurat_v3", n_top_genes=N_TOP, batch_key=key, inplace=False
        )
        found["whole" if key is None else "batch"] = {
            "top": np.flatnonzero(table["highly_variable"]).tolist(),
            "variances_norm": table["variances_norm"].tolist(),
            "rank": [None if np.isnan(r) else r for r in table["highly_variable_rank"]],
        }
    (Path(__file__).parent / "scanpy.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
