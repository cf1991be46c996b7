"""What samplers and orders tell of themselves: any may have these attributes, and none must."""

from __future__ import annotations

from typing import Protocol, runtime_checkable


@runtime_checkable
class OfEpochs(Protocol):
    """Anything that is told the epoch: a sampler, or a collate."""

    def set_epoch(self, epoch: int, /) -> object: ...


@runtime_checkable
class _Seeded(Protocol):
    seed: int | None


@runtime_checkable
class _OfWorkers(Protocol):
    num_workers: int


@runtime_checkable
class _Batching(Protocol):
    batch_size: int | None


@runtime_checkable
class _Dropping(Protocol):
    drop_last: bool


@runtime_checkable
class _OfRank(Protocol):
    rank: int


@runtime_checkable
class _Paired(Protocol):
    paired: bool


def seed_of(sampler: object) -> int:
    """Return the seed; 0 where there is none, or none was drawn yet."""
    return int(sampler.seed or 0) if isinstance(sampler, _Seeded) else 0


def workers_of(sampler: object) -> int:
    """Return the number of worker processes that a sampler deals to; 0 where it does not tell."""
    return int(sampler.num_workers) if isinstance(sampler, _OfWorkers) else 0


def batch_size_of(sampler: object) -> int | None:
    """Return the rows of a batch; None where a sampler does not tell."""
    return sampler.batch_size if isinstance(sampler, _Batching) else None


def drops_last(sampler: object) -> bool:
    """Return whether a sampler drops a partial batch; False where it does not tell."""
    return bool(sampler.drop_last) if isinstance(sampler, _Dropping) else False


def rank_of(sampler: object) -> int:
    """Return the rank whose rows a sampler yields; 0 where it does not tell."""
    return int(sampler.rank) if isinstance(sampler, _OfRank) else 0


def is_paired(sampler: object) -> bool:
    """Return whether the second half of each batch holds controls of the first."""
    return bool(sampler.paired) if isinstance(sampler, _Paired) else False
