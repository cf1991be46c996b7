"""Check that batches hold what is stored, by comparing sampled rows with the NumPy reference engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hbx_gpu._engine.reference import ReferenceEngine

if TYPE_CHECKING:
    from torch import Tensor

    from hbx_gpu._datasets.cells import CellDataset
    from hbx_gpu._protocols import TensorBatch

_ROWS = 24  # per batch: the reference decodes whole chunks for each


class Checker:
    """Compares rows of batches with rows decoded by :class:`~hbx_gpu._engine.reference.ReferenceEngine`.

    Attributes
    ----------
    rows, wrong
        Rows checked so far, and how many of them were not equal.
    """

    def __init__(self, dataset: CellDataset, seed: int = 0) -> None:
        self._dataset = dataset
        self._engine = ReferenceEngine(dataset._table, dataset._directory, [dataset.dtype])
        self._reader = dataset.open_reader("preadv")
        self._known: dict[int, np.ndarray] = {}
        self._rng = np.random.default_rng(seed)
        self.rows = self.wrong = 0

    def check(self, batch: TensorBatch) -> None:
        """Look at some rows of a batch that carries ``index``, dense or CSR, on any device."""
        import torch

        index = torch.as_tensor(batch["index"]).cpu().numpy()
        picked = np.sort(self._rng.choice(len(index), min(_ROWS, len(index)), replace=False))
        expected = torch.from_numpy(self._expected(index[picked]))
        found = _rows(batch["X"], picked)
        same = (found == expected.to(found.dtype)).all(dim=1)
        self.rows += len(picked)
        self.wrong += int((~same).sum())

    def _expected(self, rows: np.ndarray) -> np.ndarray:
        """float64, (n, n_features); kept, because settings share their order."""
        missing = np.array([row for row in rows.tolist() if row not in self._known], np.int64)
        if len(missing):
            plan, slab = self._dataset.read(missing, self._reader)
            indices, (values,), offsets = self._engine.csr(plan, slab)
            for k, row in enumerate(missing.tolist()):
                inside = slice(int(offsets[k]), int(offsets[k + 1]))
                dense = np.zeros(self._dataset.n_features)
                np.add.at(dense, indices[inside], values[inside].astype(np.float64))
                self._known[row] = dense.astype(np.float32)
        return np.stack([self._known[row] for row in rows.tolist()])


def _rows(x: Tensor, picked: np.ndarray) -> Tensor:
    """Dense rows on the CPU."""
    import torch

    if x.layout is torch.sparse_csr:
        crow, columns, values = (part.cpu() for part in (x.crow_indices(), x.col_indices(), x.values()))
        out = torch.zeros((len(picked), x.shape[1]), dtype=values.dtype)
        for k, row in enumerate(picked.tolist()):
            inside = slice(int(crow[row]), int(crow[row + 1]))
            out[k, columns[inside]] = values[inside]
        return out
    return x[torch.from_numpy(picked).to(x.device)].cpu()
