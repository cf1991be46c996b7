"""The reference for counting, which `kernels` must equal: it compares every fragment with every region."""

from __future__ import annotations

import numpy as np

from hbx_gpu.batch import SparseBatch
from hbx_gpu.chromatin._counting import fragment_layers
from hbx_gpu.chromatin._regions import Regions


def reference_counts(batch: SparseBatch, matrix: Regions) -> np.ndarray:
    """What :func:`count_fragments` must give, as a dense matrix: every fragment against every region.

    Returns
    -------
    np.ndarray
        int64, (n_rows, n_features).
    """
    code, left, right = matrix.table()
    names = matrix.chromosomes[code] if len(code) else np.empty(0, object)
    out = np.zeros((len(batch), matrix.n_features), np.int64)
    starts, lengths = fragment_layers(batch)
    for row in range(len(batch)):
        for k in range(int(batch.offsets[row]), int(batch.offsets[row + 1])):
            start, end = int(starts[k]), int(starts[k]) + int(lengths[k])
            if start == end:
                continue
            here = names == matrix.names[int(batch.indices[k])]
            first = here & (left <= start) & (start < right)
            last = here & (left <= end - 1) & (end - 1 < right)
            if matrix.count == "fragments":
                out[row] += here & (left < end) & (start < right)
            elif matrix.count == "paired":
                out[row] += first | last
            else:
                out[row] += first.astype(np.int64) + last
    return np.minimum(out, 1) if matrix.count == "binary" else out
