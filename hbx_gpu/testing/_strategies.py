"""Hypothesis strategies: stored matrices and sparse batches of all shapes that occur."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import scipy.sparse as sp
from hypothesis import strategies as st

from hbx_gpu.batch import SparseBatch
from hbx_gpu.testing._stored import CODECS, StoredGroup


@st.composite
def sparse_batches(draw: st.DrawFn, max_rows: int = 20, max_features: int = 40) -> SparseBatch:
    """Batches of up to `max_rows` rows: empty rows and batches, unsorted columns, explicit zeros.

    Values are uint32 or float32; no column occurs twice in a row.
    """
    n_features = draw(st.integers(1, max_features))
    columns = st.lists(st.integers(0, n_features - 1), unique=True, max_size=n_features)
    rows = draw(st.lists(columns, max_size=max_rows))
    indices = np.array([column for row in rows for column in row], np.int32)
    dtype = draw(st.sampled_from([np.uint32, np.float32]))
    values = draw(st.lists(st.integers(0, 1000), min_size=len(indices), max_size=len(indices)))
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    return SparseBatch(indices, np.array(values, dtype), offsets, n_features)


@st.composite
def stored_groups(draw: st.DrawFn, codecs: tuple[str, ...] = CODECS) -> tuple[list[StoredGroup], int]:
    """Up to four groups over a common feature space; returns (groups, n_features)."""
    n_features = draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtypes = draw(
        st.lists(
            st.sampled_from([np.uint32, np.uint16, np.uint64, np.int64, np.float32]), min_size=1, max_size=4
        )
    )
    groups = []
    for dtype in dtypes:
        m = draw(st.integers(1, n_features))
        n = draw(st.integers(1, 30))
        density = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
        mask = rng.random((n, m)) < density
        mask[rng.random(n) < 0.2] = False
        indptr = np.concatenate([[0], np.cumsum(mask.sum(1))])
        indices = np.nonzero(mask)[1]
        for a, b in pairwise(indptr):  # stored order need not be ascending
            rng.shuffle(indices[a:b])
        high = 2**16 if dtype is np.uint16 else 2**31
        data = rng.integers(0, rng.choice([2, 200, high]), size=len(indices)).astype(dtype)
        remap = rng.permutation(n_features)[:m].astype(np.int32)
        if draw(st.booleans()):
            remap[rng.random(m) < 0.3] = -1
        matrix = sp.csr_matrix((n, m), dtype=dtype)
        matrix.data, matrix.indices, matrix.indptr = data, indices.astype(np.int32), indptr.astype(np.int32)
        groups.append(
            StoredGroup(
                matrix=matrix,
                remap=remap,
                codec=draw(st.sampled_from(codecs)),
                chunk=draw(st.sampled_from([1, 5, 32, 128, 200, 1000])),
                chunks_per_shard=draw(st.sampled_from([0, 1, 3, 16])),
                lead=draw(st.sampled_from([0, 1, 130])),
            )
        )
    return groups, n_features
