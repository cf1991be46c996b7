"""Values on their way into a layer: checked, never rounded or wrapped silently."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hbx_gpu._advice import option
from hbx_gpu._h5ad.matrix import Block
from hbx_gpu.errors import InvalidDataError

_MAX_COUNT = 2**32 - 1


@dataclass(frozen=True)
class LayerCast:
    """Turns the values of a matrix into those of a layer, or says which one does not fit.

    Attributes
    ----------
    dtype
        ``uint32`` or ``float32``.
    source
        File and matrix, for messages.
    advice
        What the user can do instead; ends the message.
    cell, feature
        Names of a row and of a column.
    allow_rounding
        Let float layers lose precision.
    looks_like
        Says what the values of the whole matrix look like; asked when one is refused.
    """

    dtype: str
    source: str
    advice: str
    cell: Callable[[int], str]
    feature: Callable[[int], str]
    allow_rounding: bool = False
    looks_like: Callable[[], str] = str

    def check_dtype(self, dtype: np.dtype) -> None:
        """Refuse dtypes that are not numbers."""
        if dtype.kind not in "biuf":
            raise InvalidDataError(f"{self.source}: expected numbers, found dtype {dtype}. {self.advice}")

    def __call__(self, block: Block) -> np.ndarray:
        """The block's values in the layer's dtype, (nnz,) or (n_rows, n_columns).

        Raises
        ------
        InvalidDataError
            Counts: a value that is fractional, negative, not finite or above 2^32 - 1. Float layers: a
            value that float32 does not hold exactly, unless rounding is allowed (overflow never is).
        """
        return self._counts(block) if self.dtype == "uint32" else self._floats(block)

    def _counts(self, block: Block) -> np.ndarray:
        values = block.values
        if values.dtype.kind in "bu" and values.dtype.itemsize <= 4:
            return values.astype(np.uint32)
        if values.dtype.kind == "f":
            values = values.astype(
                np.result_type(values.dtype, np.float32), copy=False
            )  # no limits in float16
            with np.errstate(invalid="ignore"):
                # 2^32 is exact in float32, 2^32 - 1 is not. Comparisons with NaN are false.
                good = (values >= 0) & (values < 2.0**32) & (np.trunc(values) == values)
        else:
            good = (values >= 0) & (values <= _MAX_COUNT)
        if not good.all():
            found = self.looks_like()
            seen = f"; the matrix holds {found}" if found else ""
            self._refuse_unless(good, block, f"counts are whole numbers from 0 to {_MAX_COUNT}{seen}")
        return values.astype(np.uint32)

    def _floats(self, block: Block) -> np.ndarray:
        values = block.values
        with np.errstate(over="ignore"):
            out = values.astype(np.float32)
        # In float64, where every value of up to 53 bits is exact; wider integers are checked as such.
        same = (out == values) | (values != values)  # NaN stays NaN
        if values.dtype.kind in "iu" and values.dtype.itemsize == 8:
            with np.errstate(invalid="ignore"):
                same &= (np.abs(out) < 2.0**63) & (out.astype(values.dtype) == values)
        if self.allow_rounding:
            same = np.isfinite(out) | ~np.isfinite(values)
        rule = "float32 cannot hold it"
        if not self.allow_rounding:
            rule += f" exactly; {option('allow_rounding', 'True')} rounds"
        self._refuse_unless(same, block, rule)
        return out

    def _refuse_unless(self, good: np.ndarray, block: Block, rule: str) -> None:
        if good.all():
            return
        at = int(np.flatnonzero(~good)[0])
        row, column = block.place(at)
        raise InvalidDataError(
            f"{self.source}: row {row} (cell {self.cell(row)!r}), column {column} (feature "
            f"{self.feature(column)!r}) holds {block.values.flat[at]!s}; {rule}. {self.advice}"
        )
