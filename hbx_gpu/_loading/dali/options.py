"""How the pipelines of a loader are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Graph = Callable[[dict[str, Any]], Any]


@dataclass(frozen=True, slots=True)
class DaliOptions:
    """How a loader's pipelines are made; see :func:`cell_pipeline`.

    Attributes
    ----------
    device_id
        The GPU that batches are on; None: the CPU.
    """

    graph: Graph | None = None
    prefetch_queue_depth: int = 2
    num_threads: int | None = None
    seed: int | None = None
    device_id: int | None = None

    def __post_init__(self) -> None:
        for name in ("prefetch_queue_depth", "num_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
