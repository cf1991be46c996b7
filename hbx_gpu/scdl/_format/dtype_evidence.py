"""Which dtype the values of an archive really have, where the header is missing, stale or contradicted.

The real package leaves a stale header after it casts a reopened archive, and old releases recorded no dtype
at all. File size and number of values give the width; inside a width only the values can tell. Where
they do not, opening is refused: a wrong dtype gives wrong numbers without any error.
"""

from __future__ import annotations

import numpy as np

from hbx_gpu.errors import CorruptDataError

# Values that are looked at; opening must not depend on the number of cells.
_WHOLE = 1 << 20
_WINDOWS, _WINDOW = 64, 1 << 14
# Bit patterns below these are integers if they are anything: as floats they are below 6.1e-5 (subnormal),
# 1e-30 and 2.3e-308.
_SMALL = {2: 0x0400, 4: 0x0DA24260, 8: 1 << 53}
# Small negative integers; NaNs with the sign bit lie below.
_SMALL_NEGATIVE = {2: 0, 4: -(1 << 20), 8: -(1 << 31)}
# Without a header.
_ASSUMED = np.dtype("f4")
# Counts without one that is this small are unlikely; so are float16 values with these bits (1.8e-7).
_LEAST_COUNT = 3
# Bits of 2048.0; every larger float16 is a whole number.
_LARGEST_EXACT_HALF = 0x6800
_UNSIGNED = {1: "u1", 2: "u2", 4: "u4", 8: "u8"}
_FLOAT = {2: "f2", 4: "f4", 8: "f8"}


def sample(array: np.ndarray) -> np.ndarray:
    """All of a 1-D array, or windows spread over it where it is long."""
    if len(array) <= _WHOLE:
        return np.asarray(array)
    starts = np.linspace(0, len(array) - _WINDOW, _WINDOWS).astype(np.int64)
    return np.concatenate([array[s : s + _WINDOW] for s in starts])


def value_dtype(
    raw: np.ndarray, n_values: int, stated: np.dtype | None, *, old: bool, where: str
) -> tuple[np.dtype, str]:
    """Establish the dtype of stored values.

    Parameters
    ----------
    raw
        uint8, the bytes of the file.
    n_values
        How many values it holds, above 0.
    stated
        What the header says, None without a header.
    old
        Whether a release up to 0.1.2 wrote the archive: values in the dtype of their source, int64 named
        uint64 in the header.
    where
        The file, for messages.

    Returns
    -------
    dtype
        Unsigned integers or floats; signed integers in archives of old releases.
    notice
        What the user must know (the header is wrong), or an empty string.

    Raises
    ------
    CorruptDataError
        The size fits no dtype, or more than one dtype is possible.
    """
    width, rest = divmod(len(raw), n_values)
    if rest or width not in _UNSIGNED:
        raise CorruptDataError(
            f"{where}: expected {n_values} values (the last entry of row_ptr.npy)"
            f"{f' of {stated}' if stated else ''}, found {len(raw)} bytes, which is "
            "not a multiple of any dtype's size"
        )
    if stated is not None and stated.itemsize == width:
        return _stated(raw, stated, old=old, where=where)
    found = _found(raw, width, stated, old=old, where=where)
    if stated is None:
        notice = "" if found == np.float32 else f"{where}: nothing records the dtype of the values"
    else:
        notice = f"{where}: the header says {stated}, but {n_values} values take {width} bytes each"
    return found, notice and f"{notice}; they are {found}. Pass data_dtype to decide yourself"


def contradiction(raw: np.ndarray, dtype: np.dtype) -> str:
    """Why values cannot have a dtype of the right width that somebody asks for; an empty string if they can.

    Parameters
    ----------
    raw
        uint8, the bytes of the file.
    dtype
        Integer or float.
    """
    width = dtype.itemsize
    if width < 4:
        return ""
    if dtype.kind == "f" and _share_small(_nonzero(raw, width), width) > 0.5:
        return f"its bits are those of integers: as {dtype} nearly all values would be next to nothing"
    if dtype.kind != "f" and _genuine(raw, np.dtype(_FLOAT[width])):
        return f"its bits are those of {np.dtype(_FLOAT[width])}: as {dtype} all values would be enormous"
    return ""


def _stated(raw: np.ndarray, stated: np.dtype, *, old: bool, where: str) -> tuple[np.dtype, str]:
    """The header's dtype, which has the right width, unless the values say that it cannot be."""
    width = stated.itemsize
    if width == 1:
        return stated, ""
    if old and stated == np.uint64:
        return np.dtype("i8"), ""
    nonzero = _nonzero(raw, width)
    if stated.kind == "f" and _as_integers(nonzero, stated, where):
        truth = np.dtype(_UNSIGNED[width])
    elif stated.kind == "u" and _whole_floats(nonzero, width):
        truth = np.dtype(_FLOAT[width])
        if width == 2 and (nonzero > _LARGEST_EXACT_HALF).mean() > 0.5:
            # All larger values are whole, so they are not evidence.
            _refuse(where, f"the header says {stated}, but the values would be {truth} as well", width)
    else:
        return stated, ""
    return truth, (
        f"{where}: the header says {stated}, but the bits of the values are those of {truth} (an archive "
        f"that was cast by a release which left the header stale); reading {truth}. Pass data_dtype to "
        "decide yourself"
    )


def _as_integers(nonzero: np.ndarray, stated: np.dtype, where: str) -> bool:
    """Whether what the header says to be floats are integers."""
    width = stated.itemsize
    if _many_nans(nonzero, width):
        return True
    small = _share_small(nonzero, width)
    # Fractions of a cell's counts may be subnormal in float16, but not next to nothing.
    if small <= 0.5 or (width == 2 and small < 1 and nonzero.min() > _LEAST_COUNT):
        return False
    if small < 1 or (width == 2 and nonzero.min() > _LEAST_COUNT):
        _refuse(where, f"the header says {stated}, but most values would do as integers", width)
    return True


def _found(raw: np.ndarray, width: int, stated: np.dtype | None, *, old: bool, where: str) -> np.dtype:
    """The dtype among those of a width, when it is the only possible one."""
    truth = np.dtype("u1") if width == 1 else _integer_or_float(raw, width, old=old, where=where)
    if stated is None and width == _ASSUMED.itemsize:
        # Twice as many values of two bytes take as much room.
        if (truth.kind != "f" and not _genuine(raw, truth)) or _genuine(raw, np.dtype("f2")):
            _refuse(where, f"no header says what they are, and they are unlikely to be {truth}", width)
        return truth
    stated = stated or _ASSUMED
    # The file may be cut or doubled instead of cast: then its bytes look right in the header's dtype.
    if not _genuine(raw, truth):
        _refuse(
            where,
            f"values are expected to be {stated}, and the bytes are unlikely to be {truth} either",
            width,
        )
    # The halves of a float64 never look like float32 values, so a narrower float that does is one; and
    # what was cast to a wider one has nothing in the lower bits.
    floats = stated.kind == truth.kind == "f"
    if not (floats and (width < stated.itemsize or _widened(raw, truth, stated))) and _genuine(raw, stated):
        _refuse(where, f"its bytes look like {stated}, but there are too many or too few of them", width)
    return truth


def _integer_or_float(raw: np.ndarray, width: int, *, old: bool, where: str) -> np.dtype:
    nonzero = _nonzero(raw, width)
    small = _share_small(nonzero, width)
    if small == 1 and (width > 2 or nonzero.min() <= _LEAST_COUNT):
        signed = old and (width == 8 or bool((nonzero < 0).any()))
        return np.dtype(f"i{width}" if signed else _UNSIGNED[width])
    if width > 2 and small <= 0.01:
        return np.dtype(_FLOAT[width])
    _refuse(where, f"the values take {width} bytes each and no header says of which kind they are", width)
    raise AssertionError


def _refuse(where: str, reason: str, width: int) -> None:
    kinds = [np.dtype(k[width]).name for k in (_UNSIGNED, _FLOAT) if width in k]
    raise CorruptDataError(
        f"{where}: {reason}, so the dtype cannot be established. If you know it, open with "
        f"data_dtype={' or '.join(map(repr, kinds))}; else restore the file or convert the source again"
    )


def _nonzero(raw: np.ndarray, width: int) -> np.ndarray:
    """Sampled bit patterns as signed integers, without positive and negative zero."""
    bits = sample(raw.view(f"i{width}"))
    result: np.ndarray = bits[(bits != 0) & (bits != np.iinfo(bits.dtype).min)]
    return result


def _share_small(nonzero: np.ndarray, width: int) -> float:
    """Which part of the patterns are those of ordinary integers (nan-free: 0.0 if there are none)."""
    if not len(nonzero):
        return 0.0
    return float(((nonzero < _SMALL[width]) & (nonzero >= _SMALL_NEGATIVE[width])).mean())


def _many_nans(nonzero: np.ndarray, width: int) -> bool:
    """Whether there are more kinds of NaN than computing makes."""
    nans = nonzero[np.isnan(nonzero.view(_FLOAT[width]))]
    return len(np.unique(nans[:_WINDOW])) >= 4


def _widened(raw: np.ndarray, wide: np.dtype, narrow: np.dtype) -> bool:
    """Whether all values of a wide float dtype are such of a narrow one, and not all alike."""
    values = sample(raw.view(wide))
    with np.errstate(all="ignore"):
        same = values.astype(narrow).astype(wide) == values
    return bool(same.all()) and len(np.unique(raw[: 1 << 16].view(narrow))) > 8


def _whole_floats(nonzero: np.ndarray, width: int) -> bool:
    """Whether enormous integers are whole numbers when read as floats: counts that were cast."""
    if len(nonzero) < 8 or (width == 2 and len(np.unique(nonzero)) < 4):  # chance does this to a few values
        return False
    values = nonzero.view(_FLOAT[width])
    # float16 has too few numbers for counts: larger ones are rounded, not refused.
    largest = 65504.0 if width == 2 else 2.0 ** (np.finfo(values.dtype).nmant + 1)
    with np.errstate(invalid="ignore"):
        return bool(((values >= 1) & (values <= largest) & (values == np.floor(values))).all())


def _genuine(raw: np.ndarray, dtype: np.dtype) -> bool:
    """Whether bytes look like stored values of a dtype: hardly any zeros, and usual magnitudes."""
    whole = raw[: len(raw) // dtype.itemsize * dtype.itemsize]
    values = sample(whole.view(dtype))
    nonzero = values[values != 0]
    if len(nonzero) < 0.75 * len(values):
        # Parts of wider values; stored zeros are rare.
        return False
    if dtype.kind == "f":
        low, high = (6e-5, 65504.0) if dtype.itemsize == 2 else (1e-12, 1e12)
        with np.errstate(invalid="ignore"):
            size = np.abs(nonzero)
            return bool(((size >= low) & (size <= high)).mean() >= 0.99)
    if dtype.itemsize == 1:
        # Bytes of wider values are spread evenly, with a median of 127.
        return bool(np.median(nonzero) <= 112)
    return bool((np.abs(nonzero) < 1 << (4 * dtype.itemsize)).mean() >= 0.25)
