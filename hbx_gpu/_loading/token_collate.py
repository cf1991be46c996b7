"""The collate that makes a model's inputs of sparse batches."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from hbx_gpu._protocols import Collating, TensorBatch, Widths
from hbx_gpu._tensors import check_columns, metadata_tensors
from hbx_gpu.batch import SparseBatch
from hbx_gpu.tokens import Compiled, encode
from hbx_gpu.tokens._cells import Options, check_options
from hbx_gpu.tokens._measured import Measured


class TokenCollate(Collating):
    """Sparse batches to tokens of a model.

    Parameters
    ----------
    compiled
        Recipe of the model's inputs, made for the dataset.
    categories
        Values of the obs columns that batches carry as codes.
    seed
        Seed of random choices, which also depend on the epoch, the cell and the gene.
    where
        Name of the matrix that holds the counts, for messages.
    padding, pad_to_multiple_of, ids_dtype
        As for :func:`hbx_gpu.tokens.encode`.
    measured
        Which features were measured in each row of the dataset, for recipes that depend on it.
    """

    def __init__(
        self,
        compiled: Compiled,
        *,
        categories: Mapping[str, np.ndarray],
        seed: int,
        where: str,
        padding: str = "longest",
        pad_to_multiple_of: int | None = None,
        ids_dtype: str = "int64",
        measured: Measured | None = None,
    ) -> None:
        import torch

        self.options = Options(padding, pad_to_multiple_of or 1, ids_dtype)
        check_options(compiled, self.options)
        self.compiled, self.seed, self.where, self._measured = compiled, seed, where, measured
        self._categories = {
            name: values for name, values in categories.items() if name in compiled.recipe.obs_columns
        }
        self._padding, self._multiple, self._ids_dtype = padding, pad_to_multiple_of, ids_dtype
        # Worker processes are started once and must learn of later epochs: they map this memory.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """See :class:`~hbx_gpu._protocols.Collate`."""
        self._epoch[0] = epoch

    @property
    def epoch(self) -> int:
        """The epoch that draws depend on."""
        return int(self._epoch[0])

    def obs_of(self, metadata: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Columns of obs that the recipe reads, with values in the place of codes."""
        return {name: _decoded(metadata[name], values) for name, values in self._categories.items()}

    def __call__(self, batch: SparseBatch) -> TensorBatch:
        """Tokens as :func:`hbx_gpu.tokens.encode` makes them, as tensors, and the batch's metadata."""
        import torch

        metadata = batch.metadata or {}
        made = encode(
            batch,
            self.compiled,
            seed=self.seed,
            epoch=self.epoch,
            obs=self.obs_of(metadata),
            measured=self._measured_in(metadata),
            where=self.where,
            padding=self._padding,
            pad_to_multiple_of=self._multiple,
            ids_dtype=self._ids_dtype,
        )
        check_columns([*made, *metadata])
        tensors = {
            name: torch.from_numpy(array) if isinstance(array, np.ndarray) else int(array)
            for name, array in made.items()
        }
        return {**tensors, **metadata_tensors(metadata)}

    @property
    def host_only(self) -> bool:
        """Whether kernels of devices lack a part of the recipe, so that the host makes its tokens."""
        return self._measured is not None

    def _measured_in(self, metadata: Mapping[str, np.ndarray]) -> Measured | None:
        """Of the rows of a batch."""
        if self._measured is None:
            return None
        return Measured(self._measured.masks, self._measured.of_row[metadata["index"]])

    def nbytes(self, n_rows: int, n_features: Widths, /) -> int:  # noqa: ARG002
        """Bytes of a batch at its widest."""
        return n_rows * int(self.compiled.program.length) * 24


def _decoded(codes: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values of a column of codes; None where a cell has none."""
    found = np.full(len(codes), None, object)
    known = codes >= 0
    found[known] = np.asarray(values, object)[codes[known]]
    return found
