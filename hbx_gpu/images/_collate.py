"""Batches of tiles to what a training loop receives: transformed tensors beside the metadata."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hbx_gpu._protocols import Collating
from hbx_gpu._tensors import metadata_tensors
from hbx_gpu.batch import DenseBatch, RaggedBatch
from hbx_gpu.images._dali import ImagePipeline
from hbx_gpu.images._transform import ImageTransform


class TileCollate(Collating):
    """Makes ``{"X": tensor, **metadata}`` of a batch of tiles or encoded images. Picklable.

    Loader threads may call it at once. What a cell's tile becomes depends on `seed`, epoch and the cell's row
    alone.

    Parameters
    ----------
    transform
        Steps to apply to tiles.
    seed, device_id, num_threads, decode, tile_shape
        As for :class:`~hbx_gpu.images._dali.ImagePipeline`.

    Attributes
    ----------
    epoch
        Epoch of the batches that are collated now; see :meth:`set_epoch`.
    """

    def __init__(
        self,
        transform: ImageTransform,
        *,
        seed: int = 0,
        device_id: int | None = None,
        num_threads: int | None = None,
        decode: str = "rgb",
        tile_shape: Sequence[int] | None = None,
    ) -> None:
        self.pipeline = ImagePipeline(
            transform,
            seed=seed,
            device_id=device_id,
            num_threads=num_threads,
            decode=decode,
            tile_shape=tile_shape,
        )
        self.epoch = 0

    @property
    def on_device(self) -> bool:
        return self.pipeline.device_id is not None

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that random steps depend on; call this between epochs."""
        if not 0 <= epoch < 2**32:
            raise ValueError(f"epoch must be in 0 .. 2**32 - 1, got {epoch}")
        self.epoch = int(epoch)

    def __call__(
        self, batch: DenseBatch | RaggedBatch, *, present: np.ndarray | None = None, epoch: int | None = None
    ) -> dict[str, object]:
        """Collate a batch.

        Parameters
        ----------
        batch
            Tiles with metadata, in which ``index`` holds the cells' row numbers (int64).
        present
            bool (n,), as in ``MultimodalBatch.present``: False for cells without a tile. In a ragged batch
            arrays without elements say so too.
        epoch
            Epoch to use instead of the one set, for loaders that read ahead across epochs.

        Returns
        -------
        dict
            ``X``: tensor (n, C, H, W) of the transform's dtype, on the pipeline's device. Metadata as in
            :func:`hbx_gpu._collates.sparse_to_dense_collate`, on the CPU.

        Raises
        ------
        ValueError
            No metadata column ``index``, or one called ``X``; otherwise as for
            :class:`~hbx_gpu.images._dali.ImagePipeline`.
        """
        metadata = batch.metadata or {}
        if "index" not in metadata:
            raise ValueError(
                "what is drawn for a tile belongs to its cell, so a batch needs the cells' row numbers in "
                f"metadata['index']; it has {', '.join(map(repr, metadata)) or 'no metadata'}"
            )
        columns = metadata_tensors(metadata)
        chosen = self.epoch if epoch is None else epoch
        return {"X": self.pipeline(batch.data, metadata["index"], chosen, present=present), **columns}
