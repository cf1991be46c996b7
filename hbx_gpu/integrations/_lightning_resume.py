"""A Lightning callback for runs that are resumed on another number of devices than they were saved on.

Lightning counts the batches of an epoch on each device, and takes up that count from a checkpoint. On another
number of devices it stands for another part of the epoch, so the epoch would end too early or too late.
"""

from __future__ import annotations

import sys

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops.progress import _ProcessedTracker


class CountForDevices(Callback):
    """Counts the batches that were done before a checkpoint as batches of the devices there are now.

    It changes nothing unless a loader of hbx_gpu was resumed. Installing hbx_gpu adds it to every
    ``Trainer``, by the entry point ``lightning.pytorch.callbacks_factory``.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Set the progress of the epoch that is resumed."""
        if "hbx_gpu._loading.loader" not in sys.modules:
            return  # no loader of hbx_gpu exists, and a Trainer of other data shall not wait for the import
        from hbx_gpu._loading.loader import CellLoader

        loaders = trainer.fit_loop._combined_loader
        resumed = [
            loader
            for loader in (loaders.flattened if loaders is not None else [])
            if isinstance(loader, CellLoader) and loader.resumed
        ]
        if not trainer.fit_loop.restarting or not resumed:
            return
        # Of several loaders the longest decides when the epoch ends.
        loader = max(resumed, key=len)
        position = loader.state_dict()["sampler"]
        if "cells" not in position:  # the order of a torch sampler, which has no ranks to count for
            return
        # A state at the beginning of an epoch was saved at the end of the one before.
        done = position["batches"] if position["cells"] else len(loader)
        current = trainer.fit_loop.epoch_loop.batch_progress.current
        limit = trainer.limit_train_batches
        if isinstance(limit, int):
            done = min(done, limit)
        assert isinstance(current, _ProcessedTracker)
        shift = done - current.processed
        if shift and current.processed:
            current.ready += shift
            current.started += shift
            current.processed += shift
            current.completed += shift


def callbacks() -> list[Callback]:
    """Callbacks that Lightning adds to every Trainer."""
    return [CountForDevices()]
