"""Identify the rows that a loader's state counts, so that it continues over the same rows only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable


@runtime_checkable
class Identified(Protocol):
    """A dataset that can tell its rows from others."""

    def identity(self) -> dict[str, object]:
        """Plain values: ``cells``, ``rows`` (a digest), and if they are from an atlas ``snapshot``."""


def identity_of(dataset: object) -> dict[str, object] | None:
    """Return the identity of a dataset's rows; None if the dataset does not tell."""
    return dataset.identity() if isinstance(dataset, Identified) else None


def check_identity(saved: Mapping[str, object] | None, dataset: object) -> None:
    """Raise an error for a state that was saved over other rows.

    Raises
    ------
    ValueError
        The rows differ; the message says how, and which snapshot to open if the atlas has grown.
    """
    here = identity_of(dataset)
    if saved is None or here is None or saved["rows"] == here["rows"]:
        return
    was, now = saved.get("snapshot"), here.get("snapshot")
    told = f"{saved['cells']:,} cells when it was saved, {here['cells']:,} here"
    if was is not None and now is not None and was != now:
        raise ValueError(
            f"this state was saved over snapshot {was} of the atlas, and the dataset is from snapshot {now}, "
            f"where the query selects other cells ({told}). Open snapshot {was}: "
            f"RaggedAtlas.checkout(path, {was})"
        )
    raise ValueError(
        f"this state belongs to other cells ({told}; the rows differ). Build the dataset as it was for "
        "the saved run: the same atlas or archive, filters, limits and subset"
    )
