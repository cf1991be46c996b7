"""A compiled recipe in device memory: tables and numbers that all batches share."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

from hbx_gpu._engine.device.backend import Backend, Slot
from hbx_gpu.tokens._compile import Compiled
from hbx_gpu.tokens._device.records import RECIPE, RECIPE_TABLES
from hbx_gpu.tokens._lower_sampled import Prompt, Ranked, Weighted
from hbx_gpu.tokens._numbers import numbers_of, numbers_of_sampled, quantiles_of
from hbx_gpu.tokens._program import Sequence

Arrays: TypeAlias = dict[str, np.ndarray]
_ALIGNMENT = 16


class DeviceRecipe:
    """Tables of a compiled recipe on a device; they cross once.

    Parameters
    ----------
    compiled
        The recipe.
    ids_dtype
        ``"int64"`` or ``"int32"``, of ids and labels.
    backend
        The device.

    Attributes
    ----------
    address
        Address of its record, for kernels.
    n_codes
        Chromosomes, of a recipe that has them.
    """

    def __init__(self, compiled: Compiled, ids_dtype: str, backend: Backend) -> None:
        arrays = _arrays(compiled)
        self.n_codes = len(arrays["codes"])
        record = np.zeros(1, RECIPE)
        places, at = {}, -(-RECIPE.itemsize // _ALIGNMENT) * _ALIGNMENT
        for name in RECIPE_TABLES:
            places[name] = at
            at += -(-arrays[name].nbytes // _ALIGNMENT) * _ALIGNMENT
        slot = self._slot = Slot(backend)
        slot.reserve(at, at)
        assert slot.device is not None
        self.address = np.uint64(slot.device.address)
        for name, place in places.items():
            record[name] = slot.device.address + place
            slot.host[place : place + arrays[name].nbytes] = arrays[name].view(np.uint8)
        for name in ("quantiles", "ratios", "protect", "codes", "shown", "hidden"):
            record[f"n_{name}"] = len(arrays[name])
        record["n_features"], record["n_known"] = compiled.n_features, len(compiled.tables.known)
        record["n_prefix"] = len(arrays["prefix_sums"])
        program = compiled.program
        record["zeros"] = program.zeros
        record["logged"] = isinstance(program, Ranked) and program.logged
        record["ids_bytes"] = np.dtype(ids_dtype).itemsize
        slot.host[: record.nbytes] = record.view(np.uint8)
        backend.upload(slot.host[:at], slot.device)
        slot.busy = backend.event()


def _arrays(compiled: Compiled) -> Arrays:
    """All tables of a recipe; empty where it has none."""
    program, tables = compiled.program, compiled.tables
    none = np.empty(0, np.int64)
    found: Arrays = {
        "column": tables.column, "token": tables.token, "scale": tables.scale, "index": tables.index,
        "known": tables.known, "quantiles": none, "ratios": none, "protect": none, "front_values": none,
        "back_values": none, "back": np.array(compiled.back, np.int64), "chromosome": none, "place": none,
        "codes": none, "prefix_sums": none, "shown": none, "query": none, "hidden": none,
    }  # fmt: skip
    if isinstance(program, Sequence):
        found["whole"], found["fraction"] = numbers_of(program)
        found["quantiles"] = quantiles_of(program)
        found |= {
            "ratios": program.ratios, "protect": program.protect, "front_values": program.front_values,
            "back_values": program.back_values,
        }  # fmt: skip
    else:
        assert isinstance(program, Weighted | Ranked | Prompt)
        found["whole"], found["fraction"] = numbers_of_sampled(program)
    if isinstance(program, Weighted):
        codes, own = np.unique(program.chromosome[tables.known], return_inverse=True)
        chromosome = np.zeros(compiled.n_features, np.int32)
        chromosome[tables.known] = own
        found |= {"codes": codes.astype(np.int64), "chromosome": chromosome, "place": program.place}
    if isinstance(program, Prompt):
        found |= {
            "prefix_sums": program.prefix_sums, "shown": program.shown, "query": program.query,
            "hidden": np.array(program.metadata_masks, np.int64),
        }  # fmt: skip
    return {name: np.ascontiguousarray(array) for name, array in found.items()}
