"""`Statistics`: what is known of each feature over some cells, and as one file."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from hbx_gpu._untrusted import check_file, open_regular
from hbx_gpu.errors import CorruptDataError, InvalidDataError, UnknownNameError
from hbx_gpu.statistics._bins import Counted

if TYPE_CHECKING:
    import pandas as pd

_FORMAT = 1
_COLUMNS = ("measured", "nonzero", "sum", "mean", "variance", "median")


@dataclass(frozen=True, eq=False)
class Statistics:
    """Statistics of the features of some cells. Made by ``atlas.statistics()`` and :func:`compute`.

    All arrays have one entry per feature, in the order of `feature_uids`.

    Attributes
    ----------
    feature_uids
        object, (n_features,). Uid of each feature.
    n_cells
        Number of cells.
    measured
        int64. Cells whose dataset has the feature; a feature that a dataset's panel lacks is not measured in
        its cells.
    nonzero
        int64. Cells with a value other than 0.
    sum
        float64. Sum of the values; computed in integers where values are whole numbers.
    mean, variance
        float64. Over the cells that measure the feature; the variance has the divisor ``measured - 1``, and
        is NaN for fewer than two cells.
    median
        float64. Median, over the cells where it is not 0, of the value divided by the cell's total and
        multiplied by `target_sum`; NaN where there is none.
    target_sum
        What totals of cells were scaled to for `median`; None: medians are those of the values as they are.
    median_error
        Largest relative error of `median`: 0 where it is exact.
    whole
        bool. Whether all values of the feature are counts, so that `histogram` holds each of them.
    by
        obs column of `groups`, or None.
    groups
        Statistics of the cells of each value of `by`, sorted by value. Cells without a value are only part
        of the whole.
    histogram
        How often each whole number occurs in each feature. Highly variable features are found from it.
    """

    feature_uids: np.ndarray
    n_cells: int
    measured: np.ndarray
    nonzero: np.ndarray
    sum: np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    median: np.ndarray
    target_sum: float | None
    median_error: float
    whole: np.ndarray = field(repr=False)
    histogram: Counted = field(repr=False)
    by: str | None = None
    groups: Mapping[str, Statistics] = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        parts = f", by {self.by!r} ({len(self.groups)} groups)" if self.by is not None else ""
        return f"Statistics({self.n_cells:,} cells x {len(self.feature_uids):,} features{parts})"

    @property
    def medians(self) -> dict[str, float]:
        """Feature uid -> median, for the features that have one: the table that rank-value tokens take."""
        known = np.flatnonzero(np.isfinite(self.median) & (self.median > 0))
        return dict(zip(self.feature_uids[known].tolist(), self.median[known].tolist(), strict=True))

    def to_pandas(self) -> pd.DataFrame:
        """One row per feature; with groups, one row per group and feature.

        Returns
        -------
        pandas.DataFrame
            Indexed by feature uid: ``measured`` and ``nonzero`` (int64), ``sum``, ``mean``, ``variance`` and
            ``median`` (float64); with groups also the value of the group, in a column named after `by`.
        """
        import pandas as pd

        def frame(found: Statistics) -> pd.DataFrame:
            index = pd.Index(found.feature_uids, name="feature_uid")
            return pd.DataFrame({name: getattr(found, name) for name in _COLUMNS}, index=index)

        if self.by is None:
            return frame(self)
        parts = [frame(found).assign(**{self.by: name}) for name, found in self.groups.items()]
        if not parts:
            return frame(self).iloc[:0].assign(**{self.by: ""})
        return pd.concat(parts)

    def highly_variable(
        self, n: int, flavor: str = "seurat_v3", *, batch_key: str | None = None, span: float = 0.3
    ) -> pd.DataFrame:
        """The `n` most variable features, the most variable one first, as scanpy's ``highly_variable_genes``.

        Parameters
        ----------
        n
            Number of features; fewer are returned only where fewer vary.
        flavor
            ``"seurat_v3"``: counts are standardized by the variance that is expected of their mean, and
            clipped.
        batch_key
            Rank features within each group and take the median of their ranks: the column `by` of these
            statistics.
        span
            Share of the features that each local regression looks at.

        Returns
        -------
        pandas.DataFrame
            Indexed by feature uid: ``means``, ``variances``, ``variances_norm``, ``highly_variable_rank``,
            and with `batch_key` ``highly_variable_nbatches``.

        Raises
        ------
        InvalidDataError
            The values are not counts.
        UnknownNameError
            The statistics were not computed by `batch_key`.
        ValueError
            An unknown flavor, or `n` below 1.
        """
        from hbx_gpu.statistics._variable import seurat_v3

        if flavor != "seurat_v3":
            raise ValueError(f"flavor must be 'seurat_v3', got {flavor!r}")
        if n < 1:
            raise ValueError(f"the number of highly variable features must be at least 1, got {n}")
        if batch_key is not None and batch_key != self.by:
            have = f"by {self.by!r}" if self.by is not None else "without groups"
            raise UnknownNameError(
                f"batch_key {batch_key!r} needs statistics by that column, and these are {have}; compute "
                f"them with statistics(by={batch_key!r})"
            )
        if fractions := np.flatnonzero(~self.whole).tolist():
            raise InvalidDataError(
                f"highly variable features of flavor 'seurat_v3' are found from counts, and "
                f"{len(fractions)} features have values other than counts, first: "
                f"{self.feature_uids[fractions[:3]].tolist()}; compute the statistics of a layer of counts"
            )
        batches = [self] if batch_key is None else list(self.groups.values())
        return seurat_v3(self, batches, n, span, by_batch=batch_key is not None)

    # Files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one file, which :meth:`load` reads.

        Parameters
        ----------
        path
            A file; one that exists is replaced.
        """
        with open(path, "wb") as file:
            self.write(file)

    def write(self, file: BinaryIO) -> None:
        """Write everything to an open file, as :meth:`save` does.

        Parameters
        ----------
        file
            A file that is open for writing bytes.
        """
        sets = [self, *self.groups.values()]
        head = {
            "format": _FORMAT,
            "by": self.by,
            "groups": list(self.groups),
            "target_sum": self.target_sum,
            "median_error": self.median_error,
        }
        arrays: dict[str, np.ndarray] = {
            name: np.stack([getattr(s, name) for s in sets]) for name in _COLUMNS
        }
        arrays["whole"] = np.stack([s.whole for s in sets])
        arrays["n_cells"] = np.array([s.n_cells for s in sets], np.int64)
        arrays["n_bins"] = np.array([len(s.histogram.cell) for s in sets], np.int64)
        for part in ("cell", "code", "count"):
            arrays[part] = np.concatenate([getattr(s.histogram, part) for s in sets])
        text = json.dumps({**head, "feature_uids": self.feature_uids.tolist()})
        arrays["head"] = np.frombuffer(text.encode(), np.uint8)
        np.savez(file, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """Read a file that :meth:`save` wrote.

        Parameters
        ----------
        path
            The file.

        Returns
        -------
        Statistics
            What was saved, groups included.

        Raises
        ------
        FileNotFoundError
            There is no such file.
        CorruptDataError
            It holds something else.
        """
        check_file(path, "a file with statistics")
        with open(open_regular(path), "rb") as file:
            return cls.read(file, str(Path(path)))

    @classmethod
    def read(cls, file: BinaryIO, where: str) -> Statistics:
        """Read what :meth:`write` wrote to an open file, as :meth:`load` does.

        Parameters
        ----------
        file
            A file that is open for reading bytes.
        where
            Its path, for messages.

        Raises
        ------
        CorruptDataError
            It holds something else.
        """
        try:
            with np.load(file, allow_pickle=False) as arrays:
                return _loaded({name: arrays[name] for name in arrays.files})
        except (
            ValueError,
            KeyError,
            OSError,
            EOFError,
            TypeError,
            IndexError,
            zipfile.BadZipFile,
        ) as error:
            raise CorruptDataError(
                f"{where} does not hold statistics of hbx_gpu, or is damaged: {error}; compute them again"
            ) from error


def _loaded(arrays: Mapping[str, np.ndarray]) -> Statistics:
    head = json.loads(arrays["head"].tobytes())
    if head["format"] != _FORMAT:
        raise ValueError(f"format {head['format']!r}, and this release reads {_FORMAT}")
    uids = np.array(head["feature_uids"], dtype=object)
    names = list(head["groups"])
    shape = (1 + len(names), len(uids))
    for name in (*_COLUMNS, "whole"):
        if arrays[name].shape != shape:
            raise ValueError(f"{name} has shape {arrays[name].shape}, expected {shape}")
    ends = np.concatenate([[0], np.cumsum(arrays["n_bins"])]).tolist()
    if (
        len(ends) != shape[0] + 1
        or not len(arrays["cell"]) == len(arrays["code"]) == len(arrays["count"]) == ends[-1]
    ):
        raise ValueError("the histogram is not as long as the file says")
    if ends[-1] and not 0 <= int(arrays["cell"].min()) <= int(arrays["cell"].max()) < len(uids):
        raise ValueError("the histogram names features that do not exist")

    def part(i: int, by: str | None, groups: Mapping[str, Statistics]) -> Statistics:
        cut = slice(ends[i], ends[i + 1])
        return Statistics(
            feature_uids=uids,
            n_cells=int(arrays["n_cells"][i]),
            measured=arrays["measured"][i],
            nonzero=arrays["nonzero"][i],
            sum=arrays["sum"][i],
            mean=arrays["mean"][i],
            variance=arrays["variance"][i],
            median=arrays["median"][i],
            target_sum=head["target_sum"],
            median_error=float(head["median_error"]),
            whole=arrays["whole"][i],
            histogram=Counted(arrays["cell"][cut], arrays["code"][cut], arrays["count"][cut]),
            by=by,
            groups=groups,
        )

    return part(0, head["by"], {name: part(i, None, {}) for i, name in enumerate(names, 1)})
