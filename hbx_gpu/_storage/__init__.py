"""From array metadata to bytes in memory: layouts, chunk tables and readers. zarr-python is not used here."""

from hbx_gpu._storage.choice import open_reader
from hbx_gpu._storage.chunks import ChunkDirectory, Extents
from hbx_gpu._storage.metadata import read_layout
from hbx_gpu._storage.plain import npy_layout, plain_layout
from hbx_gpu._storage.readers import Reader, Slab

__all__ = [
    "ChunkDirectory",
    "Extents",
    "Reader",
    "Slab",
    "npy_layout",
    "open_reader",
    "plain_layout",
    "read_layout",
]
