"""Vocabularies and medians: dicts, JSON files, and the pickles that models are published with.

A pickle can run code when it is opened, so these are read by an unpickler that knows numbers, strings and
containers only.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import pickletools
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from hbx_gpu._untrusted import check_file
from hbx_gpu.errors import InvalidDataError
from hbx_gpu.statistics import Statistics

Table: TypeAlias = "Mapping[str, Any] | Statistics | str | os.PathLike[str]"
"""A dict keyed on feature uids, or the path of a JSON file or pickle that holds one.

Statistics of an atlas stand for their medians.
"""

# Modules and names that a published dictionary needs: those of NumPy 1 and 2 for its scalars.
_ALLOWED: dict[tuple[str, str], type] = {
    ("collections", "defaultdict"): defaultdict,
    ("numpy", "dtype"): np.dtype,
    ("builtins", "int"): int,
    ("builtins", "float"): float,
}

# Opcodes that name what was built before, and those of containers that a table does not have.
_MEMO = {"MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"}
_TUPLES = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}
_CONTAINERS = {"LIST", "EMPTY_LIST", "EMPTY_SET", "FROZENSET"}
_NUMBER_BYTES = 16  # of the largest NumPy scalar


def _scalar(dtype: np.dtype, data: bytes) -> np.generic:
    """A NumPy scalar of a pickle, numbers only: an object dtype would be a way to code."""
    if not isinstance(dtype, np.dtype) or dtype.kind not in "iufb":
        raise pickle.UnpicklingError(f"a NumPy scalar of dtype {dtype!r} is not a number")
    scalar: np.generic = np.frombuffer(data, dtype, count=1)[0]
    return scalar


def _latin1(text: str, encoding: str) -> bytes:
    """How protocol 2 spells bytes, here those of one number."""
    if not isinstance(text, str) or encoding != "latin1" or len(text) > _NUMBER_BYTES:
        raise pickle.UnpicklingError(f"it encodes a {type(text).__name__} that is not a number's bytes")
    return text.encode("latin1")


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Callable[..., object]:
        if (module, name) in (("numpy.core.multiarray", "scalar"), ("numpy._core.multiarray", "scalar")):
            return _scalar
        if (module, name) == ("_codecs", "encode"):
            return _latin1
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        raise pickle.UnpicklingError(f"it wants {module}.{name}")


def _unpickled(raw: bytes) -> object:
    """The dict of a pickle.

    A few hundred bytes can hold a tuple of twice the same tuple, and so on, 60 deep: hashing or printing it
    takes forever. So there are no lists and sets, and tuples only as the arguments of a call.
    """
    previous = ""
    for opcode, _, _ in pickletools.genops(raw):
        name = opcode.name
        if name in _CONTAINERS or (previous in _TUPLES and name not in {"REDUCE", "BUILD"} | _MEMO):
            raise pickle.UnpicklingError("it holds lists, sets or tuples")
        if name not in _MEMO:
            previous = name
    found: object = _Restricted(io.BytesIO(raw)).load()
    if isinstance(found, dict):
        for value in found.values():
            if not isinstance(value, str | int | float | np.generic | None):
                raise pickle.UnpicklingError(f"it holds a {type(value).__name__}")
    return found


def read_table(table: Table, what: str) -> dict[str, object]:
    """A table as a dict.

    Parameters
    ----------
    table
        A mapping; statistics, for their medians; or a path: ``.json`` is read as JSON, anything else as a
        pickle of a dict of strings, whole numbers, floats and NumPy scalars.
    what
        What the table holds, for messages.

    Raises
    ------
    InvalidDataError
        It is not a dict keyed on strings, or a pickle that holds anything but plain values.
    """
    if isinstance(table, Statistics):
        table = table.medians
    if isinstance(table, Mapping):
        found: object = dict(table)
    elif not isinstance(table, str | os.PathLike):
        raise TypeError(f"{what} must be a dict or the path of a file, got {_kind(table)}")
    else:
        path = Path(table)
        check_file(path, f"a file with {what}")
        raw = path.read_bytes()
        try:
            found = json.loads(raw) if path.suffix == ".json" else _unpickled(raw)
        except Exception as error:
            raise InvalidDataError(
                f"{path} cannot be read as {what}: {error}. Expected a JSON object, or a pickle of a plain "
                "dict of strings and numbers; pickles that hold anything else are not opened, because a "
                "pickle can run code. Load it yourself and pass the dict"
            ) from error
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise InvalidDataError(f"{what} must be a dict keyed on feature uids (strings), got {_kind(found)}")
    return found


def read_ids(table: Table, what: str = "the vocabulary") -> dict[str, int]:
    """A table of token ids: whole numbers of at least 0, each once.

    Raises
    ------
    InvalidDataError
        An id that is not a whole number, is negative or above 2**31 - 1, or belongs to two entries.
    """
    found: dict[str, int] = {}
    owner: dict[int, str] = {}
    for name, value in read_table(table, what).items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise InvalidDataError(f"{what}: the id of {name!r} must be a whole number, got {value!r}")
        number = int(value)
        if not 0 <= number < 2**31:
            raise InvalidDataError(f"{what}: the id of {name!r} must be in 0 .. 2**31 - 1, got {number}")
        if number in owner:
            raise InvalidDataError(
                f"{what} gives the id {number} to {owner[number]!r} and to {name!r}; every id may stand for "
                "one "
                "entry only. Renamed genes go into `mapping` (old uid -> new uid), which sums their counts"
            )
        owner[number] = name
        found[name] = number
    if not found:
        raise InvalidDataError(f"{what} is empty")
    return found


def read_scales(table: Table, what: str) -> dict[str, float]:
    """A table of positive, finite numbers such as medians.

    Raises
    ------
    InvalidDataError
        A number that is zero, negative, infinite or NaN.
    """
    found: dict[str, float] = {}
    for name, value in read_table(table, what).items():
        if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
            raise InvalidDataError(f"{what}: the value of {name!r} must be a number, got {value!r}")
        number = float(value)
        if not (math.isfinite(number) and number > 0):
            raise InvalidDataError(
                f"{what}: the value of {name!r} must be positive and finite, got {number}; counts are "
                "divided by "
                "it. Leave the gene out of the table if it was never measured"
            )
        found[name] = number
    if not found:
        raise InvalidDataError(f"{what}: the table is empty")
    return found


def _kind(value: object) -> str:
    if isinstance(value, dict):
        odd = next(key for key in value if not isinstance(key, str))
        return f"a dict with the key {odd!r}"
    return f"a {type(value).__name__}"
