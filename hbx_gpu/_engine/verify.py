"""Checks of stored chunks that all engines make before or after decoding, and the errors they raise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from hbx_gpu._codecs.chain import check_crc32c
from hbx_gpu._codecs.rowpack_format import read_header
from hbx_gpu._plan.rows import INDEX_ROLE, BatchPlan, SourceTable
from hbx_gpu._source import Scalar
from hbx_gpu._storage.chunks import ChunkDirectory
from hbx_gpu._storage.readers import Slab
from hbx_gpu.errors import CorruptChunkError

CHUNK_MISSING = "the object is missing, and its fill value would repeat column 0 within a row"


class ChunkChecks:
    """Checks of the chunks of one dataset. Safe to use from many threads.

    Parameters
    ----------
    table
        Vectors of the dataset's Sources.
    directory
        Their chunks; its arrays are numbered as in `table`.
    tails
        Bytes of CRC32C at the end of the chunks of each array, where the engine decodes the rest itself: 4 or
        0. None: no array has them.
    """

    def __init__(
        self, table: SourceTable, directory: ChunkDirectory, tails: Sequence[int] | None = None
    ) -> None:
        self._tails = np.array(tails if tails is not None else [0] * len(directory.layouts), np.int64)
        self._any_tails = bool(self._tails.any())
        self._table, self._directory = table, directory
        # Checksums cover whole chunks, random rows a few blocks of one: each chunk is verified once.
        self._verified = np.zeros(int(table.chunk_base[-1]), dtype=bool)
        layouts = directory.layouts
        self._chunk_bytes = np.array(
            [math.prod(la.chunk_shape) * la.dtype.itemsize for la in layouts], np.int64
        )
        self._plain = np.array([layout.byte_offset is not None for layout in layouts], bool)

    def rowpack_checksums(self, plan: BatchPlan, slab: Slab, jobs: np.ndarray) -> None:
        """Verify the CRC32C of the chunks `jobs` of a plan that were not verified before.

        Raises
        ------
        CorruptChunkError
            Bytes were altered, or a header is not one that an encoder writes.
        """
        verified = self._verified[plan.chunks[jobs]]
        if verified.all():
            return
        for c in jobs[~verified]:
            try:
                read_header(slab.view(int(c)).data, check=True)
            except CorruptChunkError as error:
                raise self._directory.error(int(plan.chunks[c]), error.reason) from error
            self._verified[plan.chunks[c]] = True

    def checked(self, plan: BatchPlan, c: int, raw: np.ndarray) -> np.ndarray:
        """The bytes of the chunk `c` of a plan without the CRC32C after them, which is verified once.

        Raises
        ------
        CorruptChunkError
            Bytes were altered, or there are fewer than a checksum has.
        """
        chunk = plan.chunks[c]
        if not self._verified[chunk]:
            check_crc32c(raw)
            self._verified[chunk] = True
        return raw[:-4]

    def without_tails(self, plan: BatchPlan, slab: Slab, resident: np.ndarray | None = None) -> Slab:
        """A slab whose chunks end before their CRC32C, each verified once.

        Parameters
        ----------
        plan, slab
            Chunks as they are stored.
        resident
            bool, (n_chunks,). Chunks that are not taken from the slab, so that their entries are ignored.

        Raises
        ------
        CorruptChunkError
            As for :meth:`checked`.
        """
        if not self._any_tails:
            return slab
        tails = self._tails[plan.chunk_array]
        here = (tails > 0) & (slab.address != 0)
        if resident is not None:
            here &= ~resident
        for c in np.flatnonzero(here & ~self._verified[plan.chunks]).tolist():
            try:
                self.checked(plan, c, slab.view(c))
            except CorruptChunkError as error:
                raise self._directory.error(int(plan.chunks[c]), error.reason) from error
        return replace(slab, nbytes=np.where(here, slab.nbytes - tails, slab.nbytes))

    def raw_sizes(self, plan: BatchPlan, slab: Slab, jobs: np.ndarray) -> None:
        """Check that the chunks `jobs` of a plan, stored as they are, have the bytes of their elements.

        Raises
        ------
        CorruptChunkError
            A chunk has another number of bytes.
        """
        array = plan.chunk_array[jobs]
        # The directory computes the sizes of a plain file's chunks, the last one's included.
        wrong = (slab.nbytes[jobs] != self._chunk_bytes[array]) & ~self._plain[array]
        for c in jobs[wrong]:
            layout = self._directory.layouts[int(plan.chunk_array[c])]
            raise self._directory.error(
                int(plan.chunks[c]),
                f"{slab.nbytes[c]} bytes stored, {math.prod(layout.chunk_shape)} elements of {layout.dtype} "
                "expected",
            )

    def fill_value(self, plan: BatchPlan, c: int) -> Scalar:
        """Return the value of all elements of the absent chunk `c` of a plan, as stored (columns are local).

        Raises
        ------
        CorruptChunkError
            The chunk holds column numbers and cannot be one that its writer skipped.
        """
        array = int(plan.chunk_array[c])
        source, number = divmod(array, self._table.n_roles)
        value = self._directory.layouts[array].fill_value
        if number + self._table.first_role == INDEX_ROLE:
            # Genes occur once per row. Several elements of a row under one fill value mean that the
            # object was lost, not that its writer skipped it.
            counts = plan.piece_count[plan.piece_ptr[c] : plan.piece_ptr[c + 1]]
            lost = counts.max() > 1 or not self._directory.layouts[array].absent_is_fill
            if lost and not self._table.repeats[source]:
                raise self._directory.error(int(plan.chunks[c]), CHUNK_MISSING)
            if not 0 <= value < self._table.remap_length[source]:
                raise self.column_error(plan, c)
        return value

    def column_error(self, plan: BatchPlan, c: int) -> CorruptChunkError:
        """The error to raise for the chunk `c` of a plan that holds a column its Source does not have."""
        m = int(self._table.remap_length[int(plan.chunk_array[c]) // self._table.n_roles])
        reason = f"a column number is outside [0, {m}), the group's features"
        return self._directory.error(int(plan.chunks[c]), reason)
