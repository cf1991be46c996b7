"""Dtypes of stored values: which ones an archive may have, exact casts, and the smallest that fits."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np

from hbx_gpu._advice import option
from hbx_gpu.errors import InvalidDataError

UNSIGNED = ("uint8", "uint16", "uint32", "uint64")
FLOATS = ("float16", "float32", "float64")
DATA_DTYPES = (*UNSIGNED, *FLOATS)
DEFAULT_DTYPE = "float32"
DEFAULT_TOLERANCE = 1e-08
# Every integer up to here is a float64.
_EXACT_IN_DOUBLE = 2**53
# Values that are checked at once.
_PIECE = 1 << 20


def check_dtype(name: object, *, auto: bool = True) -> str:
    """The name of a data dtype, checked; None is the default.

    Raises
    ------
    ValueError
        Not one of the seven names (nor ``auto``, where that is allowed).
    """
    if name is None:
        return DEFAULT_DTYPE
    allowed = (*DATA_DTYPES, "auto") if auto else DATA_DTYPES
    if not isinstance(name, str) or name not in allowed:
        raise ValueError(f"Invalid data_dtype {name!r}. Must be one of: {', '.join(allowed)}")
    return name


def smallest_unsigned(largest: int) -> np.dtype:
    """The narrowest unsigned dtype that holds a number."""
    return np.dtype(next(name for name in UNSIGNED if largest <= np.iinfo(name).max))


def widest(dtypes: list[np.dtype]) -> np.dtype:
    """The widest of data dtypes of one family.

    Raises
    ------
    ValueError
        Integers and floating point numbers are mixed.
    """
    # Old releases stored signed integers too, and called them unsigned.
    dtypes = [np.dtype(f"u{d.itemsize}") if d.kind == "i" else d for d in dtypes]
    integers = sorted({d.name for d in dtypes if d.kind == "u"})
    floats = sorted({d.name for d in dtypes if d.kind == "f"})
    if integers and floats:
        raise ValueError(
            f"Cannot merge datasets with a mix of int and float dtypes for data: {integers} and {floats}. "
            "Cast one side first (cast_data_to_dtype), or name the dtype of the result with data_dtype "
            "('auto' for the smallest that holds them all)"
        )
    return max(dtypes, key=lambda d: d.itemsize)


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far stored values may be from the original ones.

    Attributes
    ----------
    absolute
        Largest difference that counts as equal.
    allow_loss
        Whether values beyond it are stored nevertheless, with a warning, instead of raising.
    """

    absolute: float = DEFAULT_TOLERANCE
    allow_loss: bool = False

    def __post_init__(self) -> None:
        if not self.absolute >= 0:
            raise ValueError(f"the tolerance must be a number that is not negative, found {self.absolute}")

    def cast(self, values: np.ndarray, dtype: np.dtype, where: str) -> np.ndarray:
        """Values in another dtype.

        Parameters
        ----------
        values
            (n,), real numbers.
        dtype
            Unsigned or floating point. Fractions are cut off and numbers out of range become the nearest
            that there is; both count as loss.
        where
            What the values are, for messages.

        Raises
        ------
        InvalidDataError
            A value changed by more than the tolerance, NaN included, and loss is not allowed.
        """
        if values.dtype == dtype:
            return values
        if values.dtype.kind not in "biuf":
            raise InvalidDataError(f"{where}: expected real numbers, found {values.dtype}")
        if _surely_exact(values, dtype):
            return values.astype(dtype)
        stored = np.empty(len(values), dtype)
        # Piece by piece: cutting and checking need several float64 copies.
        for i in range(0, len(values), _PIECE):
            piece = slice(i, i + _PIECE)
            stored[piece] = _nearest(values[piece], dtype)
            errors = _error(values[piece], stored[piece])
            if errors.max() > self.absolute:
                self._report(values[piece], stored[piece], errors, where)
        return stored

    def _report(self, values: np.ndarray, stored: np.ndarray, errors: np.ndarray, where: str) -> None:
        worst = int(errors.argmax())
        said = (
            f"Downcasted data values for 'data.npy' are not close to original values. Max abs diff: "
            f"{errors[worst]:g} ({where}: {values[worst]} as {stored.dtype} is {stored[worst]}; tolerance "
            f"{self.absolute:g})"
        )
        if not self.allow_loss:
            raise InvalidDataError(
                f"{said}. Choose a wider dtype with {option('data_dtype')} (auto for the smallest exact "
                f"one), a larger {option('data_dtype_tolerance')}, or accept the loss with "
                f"{option('allow_loss', 'True')}"
            )
        warnings.warn(said, UserWarning, stacklevel=2)


def _surely_exact(values: np.ndarray, dtype: np.dtype) -> bool:
    # NumPy calls 64-bit integers safe as float64, which they are not.
    rounds = values.dtype.kind in "iu" and values.dtype.itemsize == 8 and dtype.kind == "f"
    if not len(values) or (np.can_cast(values.dtype, dtype, "safe") and not rounds):
        return True
    if values.dtype.kind not in "iu":
        return False
    low, high = int(values.min()), int(values.max())
    if dtype.kind == "u":
        return low >= 0 and high <= np.iinfo(dtype).max
    exact = 2 ** (np.finfo(dtype).nmant + 1)
    result: bool = -exact <= low and high <= min(exact, int(np.finfo(dtype).max))
    return result


def _nearest(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(all="ignore"):
        if dtype.kind == "f":
            return values.astype(dtype)
        if values.dtype.kind in "iu":
            top = min(int(np.iinfo(dtype).max), int(np.iinfo(values.dtype).max))
            result: np.ndarray = np.clip(values, 0, top).astype(dtype)
            return result
        # The largest float below the limit: 2**64 - 1 itself is none, and casting 2**64 is undefined.
        top = np.nextafter(np.float64(2.0 ** (8 * dtype.itemsize)), 0)
        return np.clip(np.nan_to_num(values.astype(np.float64), nan=0.0), 0, top).astype(dtype)


def _error(values: np.ndarray, stored: np.ndarray) -> np.ndarray:
    """float64, (n,). What was lost per value; infinite where a NaN or an infinity was."""
    with np.errstate(all="ignore"):
        error = np.abs(values.astype(np.float64) - stored.astype(np.float64))
    same = (values == stored) | ((values != values) & (stored != stored))
    error[np.isnan(error)] = np.inf
    error[same] = 0.0
    if values.dtype.kind in "iu" and values.dtype.itemsize == 8:
        # float64 is blind to differences of large integers, and so is comparing with floats.
        large = np.flatnonzero((values > _EXACT_IN_DOUBLE) | (values < -_EXACT_IN_DOUBLE))
        error[large] = [abs(float(int(values[i]) - _whole(stored[i]))) for i in large]
    return error


def _whole(value: float) -> float | int:
    return int(value) if np.isfinite(value) else float(value)


@dataclass
class Range:
    """What is known of values seen so far, to choose the smallest dtype that holds them exactly.

    Fractions make it a float dtype: float32 if every value is one, else float64. So do negative numbers.
    """

    low: int = 0
    high: int = 0
    single: bool = True
    fractions: bool = False

    def add(self, values: np.ndarray) -> None:
        """Take values into account."""
        for i in range(0, len(values), _PIECE):
            self._add(values[i : i + _PIECE])

    def _add(self, values: np.ndarray) -> None:
        if values.dtype.kind == "f":
            with np.errstate(all="ignore"):
                self.fractions |= not bool((np.isfinite(values) & (values == np.trunc(values))).all())
        if not self.fractions:
            self.low = min(self.low, int(values.min()))
            self.high = max(self.high, int(values.max()))
        self.single &= (
            values.dtype == np.float32 or not _error(values, _nearest(values, np.dtype("f4"))).any()
        )

    def dtype(self) -> np.dtype:
        """The smallest dtype for all values seen."""
        if self.fractions or self.low < 0 or self.high >= 2**64:
            return np.dtype("f4" if self.single else "f8")
        return smallest_unsigned(self.high)
