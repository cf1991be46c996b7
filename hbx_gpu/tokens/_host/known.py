"""Known genes of a batch's rows: what every host kernel begins with."""

from __future__ import annotations

import numpy as np

from hbx_gpu._buffers import POOL
from hbx_gpu.errors import InvalidDataError
from hbx_gpu.tokens import _rows
from hbx_gpu.tokens._cells import Cells
from hbx_gpu.tokens._compile import Compiled
from hbx_gpu.tokens._host import rows
from hbx_gpu.tokens._lower_sampled import Prompt, Ranked


class Known:
    """Known genes of a batch's rows, end to end.

    Attributes
    ----------
    pointers
        int64 (n + 1,). Row i is ``genes[pointers[i] : pointers[i + 1]]``.
    genes, counts
        uint32 and float64.
    totals, totals_known
        float64 (n,). Sums of all counts, and of those of known genes.
    longest
        Known genes of the longest row.
    """

    def __init__(self, compiled: Compiled, cells: Cells) -> None:
        tables, program = compiled.tables, compiled.program
        n = len(cells)
        room = len(cells.columns)
        zeros = program.zeros and not isinstance(program, Prompt)  # its kernel knows all genes
        if zeros:
            room = int(np.maximum(np.diff(cells.offsets), len(tables.known)).sum())
        self.pointers = np.empty(n + 1, np.int64)
        self.genes, self.counts = POOL.empty(room + 1, np.uint32), POOL.empty(room + 1, np.float64)
        self.totals, self.totals_known = np.empty(n, np.float64), np.empty(n, np.float64)
        values = cells.values
        if values.dtype == np.float16 or values.dtype == bool:
            values = values.astype(np.float32)
        logged = isinstance(program, Ranked) and program.logged
        status = rows.known_genes(
            cells.offsets, cells.columns, values, tables.column, tables.known, zeros, logged,
            self.pointers, self.genes, self.counts, self.totals, self.totals_known,
        )  # fmt: skip
        if status == rows.NOT_COUNTS:
            raise _rows.not_logarithms(cells.where) if logged else _rows.not_counts(cells.where)
        if status == rows.TOO_MANY:
            raise _rows.too_many(cells.where)
        if status == rows.BAD_COLUMN:
            raise InvalidDataError(
                f"{cells.where}: a column number lies outside the {compiled.n_features} features"
            )
        self.longest = int(np.diff(self.pointers).max(initial=0))
