"""For tests of programs that use hbx_gpu: small data on disk, a slow engine to compare with, strategies.

Everything here is small, repeatable and needs no GPU. :func:`stored_groups` and :func:`sparse_batches` need
hypothesis, which hbx_gpu does not install. docs/testing.md shows how the parts go together.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hbx_gpu.testing._examples import N_FEATURES as N_FEATURES
    from hbx_gpu.testing._examples import example_atlas as example_atlas
    from hbx_gpu.testing._examples import example_dataset as example_dataset
    from hbx_gpu.testing._examples import example_groups as example_groups
    from hbx_gpu.testing._reference import read_reference as read_reference
    from hbx_gpu.testing._stored import CODECS as CODECS
    from hbx_gpu.testing._stored import StoredGroup as StoredGroup
    from hbx_gpu.testing._stored import expected_dense as expected_dense
    from hbx_gpu.testing._stored import write_sources as write_sources
    from hbx_gpu.testing._strategies import sparse_batches as sparse_batches
    from hbx_gpu.testing._strategies import stored_groups as stored_groups

_PUBLIC = {
    "CODECS": "_stored",
    "N_FEATURES": "_examples",
    "StoredGroup": "_stored",
    "example_atlas": "_examples",
    "example_dataset": "_examples",
    "example_groups": "_examples",
    "expected_dense": "_stored",
    "read_reference": "_reference",
    "sparse_batches": "_strategies",
    "stored_groups": "_strategies",
    "write_sources": "_stored",
}

__all__ = list(_PUBLIC)

if not TYPE_CHECKING:  # a type checker takes the names above and rejects all others

    def __getattr__(name: str) -> object:
        if name in _PUBLIC:
            return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(_PUBLIC)
