"""Loaders for Hugging Face accelerate, and so for the ``Trainer`` of transformers.

``accelerator.prepare`` takes a plain torch ``DataLoader`` apart and deals its batches to processes. A loader
of :func:`hbx_gpu.dataloader.make_loader` does so by itself, and ``prepare`` leaves it as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hbx_gpu._loading.framework_samplers import Rows
from hbx_gpu._loading.loader import CellLoader
from hbx_gpu.integrations._install import not_installed

try:
    from accelerate import Accelerator
    from accelerate.data_loader import DataLoaderStateMixin
    from accelerate.state import GradientState
    from accelerate.utils import send_to_device
except ImportError as error:
    raise not_installed("accelerate", error) from error

__all__ = ["PreparedLoader", "prepare"]


def prepare(loader: CellLoader, accelerator: Accelerator) -> PreparedLoader:
    """Return a loader that tells accelerate where an epoch ends, and moves batches to its device.

    Parameters
    ----------
    loader
        Loader of this process; all processes make it with the same seed.
    accelerator
        Accelerator of the training loop.

    Returns
    -------
    PreparedLoader
        Give it to ``accelerator.prepare`` with the model, or iterate it. Each iteration is another epoch.
    """
    return PreparedLoader(loader, accelerator)


class PreparedLoader(DataLoaderStateMixin):
    """A loader as ``accelerator.prepare`` returns them; made by :func:`prepare`.

    Attributes
    ----------
    loader
        The loader itself.
    iteration
        Number of the epoch in this process.
    """

    # accelerate leaves what has this attribute as it is.
    _is_accelerate_prepared = True
    end_of_dataloader: bool
    remainder: int

    def __init__(self, loader: CellLoader, accelerator: Accelerator) -> None:
        self.loader = loader
        self.device = accelerator.device
        self.gradient_state = GradientState()
        self.iteration = 0

    def __getattr__(self, name: str) -> Any:
        """Attributes of the loader, from which accelerate makes another one to skip batches."""
        if name == "loader":  # before it is set
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)

    def begin(self) -> None:
        """Tell accelerate that an epoch begins; no cell comes twice, so metrics leave none out."""
        self.reset()
        self.remainder = 0
        self.gradient_state._add_dataloader(self)

    def __iter__(self) -> Iterator[Any]:
        sampler = self.loader.sampler
        assert isinstance(sampler, Rows)
        sampler.set_epoch(self.iteration)
        done = self.loader.state_dict()["sampler"]["batches"] if self.loader.resumed else 0
        left = len(self.loader) - done
        self.begin()
        try:
            for batch in self.loader:
                left -= 1
                self.end_of_dataloader = left == 0
                yield send_to_device(batch, self.device)
            self.iteration += 1
        finally:
            self.end()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        self.iteration = epoch

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`CellLoader.state_dict`."""
        return self.loader.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; see :meth:`CellLoader.load_state_dict`."""
        self.loader.load_state_dict(state)
        self.iteration = 0
