"""Orders of cells and their cutting into batches: index arithmetic without data or I/O.

The content of batches is a function of (seed, epoch) alone; ranks and workers only decide who gets a batch,
and when (:mod:`hbx_gpu.sampler._epoch`). What each order does to the composition of batches is measured in
``docs/orders.md``.
"""

from hbx_gpu.sampler._balanced import BalancedCellSampler
from hbx_gpu.sampler._cells import CellSampler
from hbx_gpu.sampler._epoch import EpochSampler
from hbx_gpu.sampler._labels import GroupedCellSampler
from hbx_gpu.sampler._neighbors import NeighborSampler, neighbor_table
from hbx_gpu.sampler._splits import split_rows
from hbx_gpu.sampler._weighted import WeightedCellSampler

__all__ = [
    "BalancedCellSampler",
    "CellSampler",
    "EpochSampler",
    "GroupedCellSampler",
    "NeighborSampler",
    "WeightedCellSampler",
    "neighbor_table",
    "split_rows",
]
