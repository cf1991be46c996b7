"""Arrow columns of obs tables as NumPy: numbers, codes of categories, moments, vectors, objects."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

Encoder = Callable[[pa.Array], np.ndarray]


def is_categorical(kind: pa.DataType) -> bool:
    """Whether a column of this type becomes integer codes over a vocabulary."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    result: bool = (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_null(kind)
    )
    return result


def is_bool(kind: pa.DataType) -> bool:
    """Whether a column holds truth values, encoded or not."""
    result: bool = pa.types.is_boolean(kind.value_type if pa.types.is_dictionary(kind) else kind)
    return result


def is_text(kind: pa.DataType) -> bool:
    """Whether a column becomes codes over words that the column itself holds."""
    return is_categorical(kind) and not is_bool(kind)


def plain(array: pa.Array) -> pa.Array:
    """The decoded values of a dictionary-encoded array; any other array unchanged."""
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def encoder_of(kind: pa.DataType, vocabulary: pa.Array | None) -> Encoder:
    """Function that converts a column of this type to NumPy."""
    if pa.types.is_dictionary(kind) and not is_categorical(kind):
        inner = encoder_of(kind.value_type, None)
        return lambda array: inner(plain(array))
    if is_bool(kind):
        return lambda array: pc.fill_null(plain(array).cast(pa.int64()), -1).to_numpy()
    if vocabulary is not None:
        return lambda array: _codes(array, vocabulary)
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return _numbers
    if pa.types.is_decimal(kind):
        return lambda array: _numbers(array.cast(pa.float64()))
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return lambda array: array.cast(pa.timestamp("us"), safe=False).to_numpy(zero_copy_only=False)
    if pa.types.is_duration(kind):
        return lambda array: array.cast(pa.duration("us"), safe=False).to_numpy(zero_copy_only=False)
    if pa.types.is_fixed_size_list(kind) and (
        pa.types.is_integer(kind.value_type) or pa.types.is_floating(kind.value_type)
    ):
        return _vectors
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        plain_numbers = pa.types.is_integer(kind.value_type) or pa.types.is_floating(kind.value_type)
        dtype = np.dtype(kind.value_type.to_pandas_dtype() if plain_numbers else object)
        return lambda array: _objects(array, dtype)
    return _objects


def _codes(array: pa.Array, vocabulary: pa.Array) -> np.ndarray:
    encoded = array if pa.types.is_dictionary(array.type) else array.cast(pa.string()).dictionary_encode()
    place = pc.fill_null(pc.index_in(encoded.dictionary.cast(pa.string()), value_set=vocabulary), -1)
    codes = pc.fill_null(place.cast(pa.int64()).take(encoded.indices), -1)
    return cast(np.ndarray, codes.to_numpy())


def _numbers(array: pa.Array) -> np.ndarray:
    if pa.types.is_integer(array.type):
        # A double would not hold every integer, and the dtype must not depend on the requested rows.
        array = pc.fill_null(array, missing_integer(array.type))
    return cast(np.ndarray, array.to_numpy(zero_copy_only=False))


def missing_integer(kind: pa.DataType) -> int:
    """Value of a missing integer: the smallest of a signed type, the largest of an unsigned type."""
    limits = np.iinfo(kind.to_pandas_dtype())
    return int(limits.max if limits.kind == "u" else limits.min)


def _vectors(array: pa.Array) -> np.ndarray:
    width = array.type.list_size
    values = cast(np.ndarray, pc.drop_null(array).flatten().to_numpy(zero_copy_only=False)).reshape(-1, width)
    if not array.null_count:
        return values
    out = np.full((len(array), width), np.nan, dtype=np.result_type(values.dtype, np.float32))
    out[array.is_valid().to_numpy(zero_copy_only=False)] = values
    return out


def _objects(array: pa.Array, dtype: np.dtype | None = None) -> np.ndarray:
    """Python values; lists become arrays of `dtype`, or of objects where elements are missing."""
    out = np.empty(len(array), dtype=object)
    for i, value in enumerate(array.to_pylist()):
        if isinstance(value, list):
            value = np.array(value, dtype=object if None in value else dtype)
        out[i] = value
    return out


def narrow(encoder: Encoder, n_codes: int) -> Encoder:
    """An encoder whose codes have the smallest signed type that holds them, and -1."""
    kind = np.min_scalar_type(-max(n_codes, 1))
    return lambda array: encoder(array).astype(kind)


_FEW_WORDS = 1_024


class GrowingVocabulary:
    """Codes of a text column whose vocabulary is not known before all of it was read."""

    def __init__(self) -> None:
        self._codes: dict[str, int] = {}
        self._known = pa.array([], pa.string())

    def __call__(self, array: pa.Array) -> np.ndarray:
        """Codes in the order in which values came first; -1 for missing ones."""
        # Looking up few known words takes half the time of finding the words of each part anew.
        if len(self._codes) <= _FEW_WORDS and not pa.types.is_dictionary(array.type):
            text = array.cast(pa.string())
            found = pc.index_in(text, value_set=self._known)
            if found.null_count > text.null_count:
                for word in pc.drop_null(text.filter(pc.is_null(found)).unique()).to_pylist():
                    self._codes[word] = len(self._codes)
                self._known = pa.array(list(self._codes), pa.string())
                found = pc.index_in(text, value_set=self._known)
            kind = np.min_scalar_type(-max(len(self._codes), 1))
            known: np.ndarray = pc.fill_null(found, -1).to_numpy().astype(kind)
            return known
        # Rows of a file mostly come in stretches of one value, or have few values.
        text = array if pa.types.is_dictionary(array.type) else array.cast(pa.string()).dictionary_encode()
        names = text.dictionary.cast(pa.string()).to_pylist()
        of_name = [-1 if name is None else self._codes.setdefault(name, len(self._codes)) for name in names]
        of_name.append(-1)
        indices = pc.fill_null(text.indices.cast(pa.int64()), -1) if text.null_count else text.indices
        place = indices.to_numpy(zero_copy_only=False)
        codes: np.ndarray = np.array(of_name, np.min_scalar_type(-max(len(self._codes), 1)))[place]
        return codes

    def finish(self, parts: list[np.ndarray]) -> tuple[pa.Array, np.ndarray]:
        """The vocabulary, sorted, and the codes of all parts over it, as :func:`narrow` has them."""
        found = pa.array(list(self._codes), pa.string())
        order = pc.sort_indices(found)
        rank = np.full(len(found) + 1, -1, np.min_scalar_type(-max(len(found), 1)))
        rank[order.to_numpy()] = np.arange(len(found))
        return found.take(order), np.concatenate([rank[:0], *(rank[part] for part in parts)])
