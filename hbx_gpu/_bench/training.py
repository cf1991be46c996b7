"""A real training step while loading: how long the model waits for its data."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from hbx_gpu._loading.loader import CellLoader

MODELS = ("mlp", "transformer")
_HIDDEN, _LATENT = 128, 10  # sizes of scVI's layers
_WIDTH, _HEADS, _LAYERS = 64, 4, 2
_GENES = {"cpu": 64, "cuda": 512}  # tokens per cell
_WARM_UP = 2


@dataclass(frozen=True)
class Trained:
    """A model trained while loading.

    Attributes
    ----------
    cells_per_s, steps
        Cells/s and number of steps with loading.
    step_seconds
        Seconds of a step on a batch that is kept, without any loading.
    waiting
        Share of the loop's time spent in ``next()``.
    slowdown
        Time with loading over the time of as many steps on a held batch, less 1. Beyond `waiting` it is what
        the loader's threads take from the model's, and on a GPU the work that both have there.
    """

    model: str
    cells_per_s: float
    steps: int
    step_seconds: float
    waiting: float
    slowdown: float
    first_loss: float
    last_loss: float


def make_step(
    model: str, n_features: int, device: torch.device | str, dtype: torch.dtype
) -> Callable[[Tensor], Tensor]:
    """A function that trains on one dense batch of counts and returns the loss, a tensor."""
    import torch

    torch.manual_seed(0)
    if model == "mlp":
        network = _mlp(n_features)
    else:
        network = _transformer(n_features, min(n_features, _GENES[torch.device(device).type]))
    network = network.to(device=device, dtype=dtype)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)

    def step(x: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss: Tensor = network(x)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _mlp(n_features: int) -> nn.Module:
    """An autoencoder of scVI's size: counts -> 128 -> 10 -> 128 -> Poisson rates, scaled to depth."""
    import torch
    from torch import nn

    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode = nn.Sequential(
                nn.Linear(n_features, _HIDDEN), nn.LayerNorm(_HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, _LATENT)
            )
            self.decode = nn.Sequential(
                nn.Linear(_LATENT, _HIDDEN), nn.LayerNorm(_HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, n_features)
            )

        def forward(self, x: Tensor) -> Tensor:
            depth = x.sum(1, keepdim=True).clamp_min(1)
            log_rate = torch.log_softmax(self.decode(self.encode(torch.log1p(x))), dim=1) + depth.log()
            loss: Tensor = (log_rate.exp() - x * log_rate).float().mean()
            return loss

    return Autoencoder()


def _transformer(n_features: int, n_genes: int) -> nn.Module:
    """Attention over each cell's `n_genes` strongest genes; a tenth of the values is hidden and predicted."""
    import torch
    from torch import nn

    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gene = nn.Embedding(n_features, _WIDTH)
            self.value = nn.Linear(1, _WIDTH)
            layer = nn.TransformerEncoderLayer(
                _WIDTH, _HEADS, 4 * _WIDTH, dropout=0.0, batch_first=True, norm_first=True
            )
            self.body = nn.TransformerEncoder(layer, _LAYERS, enable_nested_tensor=False)
            self.head = nn.Linear(_WIDTH, 1)

        def forward(self, x: Tensor) -> Tensor:
            top, genes = torch.log1p(x).topk(n_genes, dim=1)
            hidden = torch.rand(top.shape, device=x.device) < 0.1
            tokens = self.gene(genes) + self.value((top * ~hidden).unsqueeze(-1))
            guess = self.head(self.body(tokens)).squeeze(-1)
            loss: Tensor = (((guess - top) ** 2) * hidden).float().sum() / hidden.sum().clamp_min(1)
            return loss

    return Transformer()


def train(
    model: str, loader: CellLoader, n_features: int, *, seconds: float, finish: Callable[[], None]
) -> Trained:
    """Train on epochs of `loader`, whose batches hold dense ``X``, for about `seconds`.

    Parameters
    ----------
    finish
        Waits for the device; nothing on the CPU.
    """
    held = next(iter(loader))["X"].clone()
    step = make_step(model, n_features, held.device, held.dtype)
    first_loss = float(step(held))
    for _ in range(_WARM_UP):
        step(held)
    finish()
    n_held, clock = 0, time.perf_counter()
    while n_held < 2 or time.perf_counter() - clock < seconds / 2:
        step(held)
        n_held += 1
        if n_held % 8 == 0:
            finish()  # or a GPU's queue grows without bound
    finish()
    alone = (time.perf_counter() - clock) / n_held
    steps, cells, waited, epoch = 0, 0, 0.0, 1
    clock = time.perf_counter()
    elapsed = 0.0
    while elapsed < seconds:
        loader.set_epoch(epoch)
        epoch += 1
        batches = iter(loader)
        while elapsed < seconds:
            begin = time.perf_counter()
            batch = next(batches, None)
            waited += time.perf_counter() - begin
            if batch is None:
                break
            loss = step(batch["X"])
            steps += 1
            cells += len(batch["X"])
            elapsed = time.perf_counter() - clock
        del batches
    finish()
    elapsed = time.perf_counter() - clock
    return Trained(
        model=model,
        cells_per_s=cells / elapsed,
        steps=steps,
        step_seconds=alone,
        waiting=waited / elapsed,
        slowdown=max(0.0, elapsed / (steps * alone) - 1),
        first_loss=first_loss,
        last_loss=float(loss),
    )
