"""Tiles through DALI against loops over tiles in torch and Pillow: ``python -m benchmarks.images``, 20 s."""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import conditions
from hbx_gpu._bench.machine import describe
from hbx_gpu._bench.tables import spread, table, write_json

TILE, CROP = 96, 64
MEAN, STD = (100.0, 110.0, 120.0), (50.0, 51.0, 52.0)


def pictures(n: int) -> np.ndarray:
    """uint8 (n, 3, TILE, TILE): smooth waves with noise, so that JPEG has what it is made for."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:TILE, :TILE]
    phases = rng.uniform(0, 6, (n, 3, 1, 1))
    waves = 127 + 90 * np.sin(rows / 8 + phases) * np.cos(columns / 11 - phases)
    result: np.ndarray = np.clip(waves + rng.normal(0, 6, waves.shape), 0, 255).astype(np.uint8)
    return result


def torch_loop(tiles: np.ndarray, *, vertical: bool) -> Callable[[int], Any]:
    """Random crop, flips and normalization of one tile after the other, as torchvision's classes do them."""
    import torch

    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (MEAN, STD))
    whole = torch.from_numpy(tiles)

    def one(tile: Any, draws: list[float]) -> Any:
        top, left = (int(place * (TILE - CROP + 1)) for place in draws[:2])
        tile = tile[:, top : top + CROP, left : left + CROP]
        if draws[2] < 0.5:
            tile = tile.flip(-1)
        if vertical and draws[3] < 0.5:
            tile = tile.flip(-2)
        return (tile.float() - mean) / std

    def call(epoch: int) -> Any:
        draws = np.random.default_rng(epoch).random((len(tiles), 4)).tolist()
        return torch.stack([one(tile, numbers) for tile, numbers in zip(whole, draws, strict=True)])

    return call


def torch_every_step(tiles: np.ndarray) -> Callable[[int], Any]:
    """All steps, one tile after the other, in torch's own operators."""
    import torch
    from torch.nn import functional

    from hbx_gpu.images._draws import color_matrices

    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (MEAN, STD))
    whole = torch.from_numpy(tiles)

    def one(tile: Any, draws: list[float], turn: Any, colors: Any) -> Any:
        top, left = (int(place * (TILE - CROP + 1)) for place in draws[:2])
        tile = tile[:, top : top + CROP, left : left + CROP]
        for axis in (1, 2):
            tile = tile.flip(-axis) if draws[1 + axis] < 0.5 else tile
        grid = functional.affine_grid(turn[None], [1, 3, CROP, CROP], align_corners=False)
        x = functional.grid_sample(tile[None].float(), grid, align_corners=False)
        x = functional.interpolate(x, (48, 48), mode="bilinear", antialias=True, align_corners=False)[0]
        average = x.mean((1, 2), keepdim=True)
        x = draws[4] * (average + draws[5] * (x - average))
        return (torch.einsum("ij,jhw->ihw", colors, x) - mean) / std

    def call(epoch: int) -> Any:
        draws = np.random.default_rng(epoch).random((len(tiles), 9))
        draws[:, 4:6] = 0.8 + 0.4 * draws[:, 4:6]
        angle = np.deg2rad(40 * draws[:, 6] - 20)
        turns = np.zeros((len(tiles), 2, 3), np.float32)
        turns[:, 0, 0] = turns[:, 1, 1] = np.cos(angle)
        turns[:, 0, 1], turns[:, 1, 0] = -np.sin(angle), np.sin(angle)
        colors = torch.from_numpy(color_matrices(0.8 + 0.4 * draws[:, 7], 0.1 * draws[:, 8] - 0.05))
        numbers = zip(whole, draws.tolist(), torch.from_numpy(turns), colors, strict=True)
        return torch.stack([one(*each) for each in numbers])

    return call


def pillow_loop(files: list[np.ndarray]) -> Callable[[int], Any]:
    """Decode one file after the other, then as :func:`torch_loop`."""
    from PIL import Image

    def call(epoch: int) -> Any:
        images = [np.asarray(Image.open(io.BytesIO(file.tobytes()))) for file in files]
        return torch_loop(np.stack([image.transpose(2, 0, 1) for image in images]), vertical=False)(epoch)

    return call


def jpegs(tiles: np.ndarray) -> list[np.ndarray]:
    """The tiles as JPEG files of quality 90."""
    from PIL import Image

    found = []
    for tile in tiles:
        with io.BytesIO() as file:
            Image.fromarray(tile.transpose(1, 2, 0)).save(file, "JPEG", quality=90)
            found.append(np.frombuffer(file.getvalue(), np.uint8))
    return found


def cases(n: int) -> dict[str, dict[str, Callable[[int], Any]]]:
    """Ways to do the same, by case; the first of each is the one compared with."""
    from hbx_gpu.images import ImagePipeline, ImageTransform

    tiles = pictures(n)
    files, cells = jpegs(tiles), np.arange(n)
    plain: dict[str, Any] = {"random_crop": CROP, "horizontal_flip": 0.5, "mean": MEAN, "std": STD}
    every: dict[str, Any] = {
        **plain, "vertical_flip": 0.5, "rotation": 20, "resize": (48, 48), "brightness": 0.2, "contrast": 0.2,
        "saturation": 0.2, "hue": 0.05,
    }  # fmt: skip

    def dali(data: Any, threads: int, options: dict[str, Any]) -> Callable[[int], Any]:
        pipeline = ImagePipeline(ImageTransform(**options), num_threads=threads)
        return lambda epoch: pipeline(data, cells, epoch)

    ragged = [tile[:, : TILE - k % 20, k % 20 :].copy() for k, tile in enumerate(tiles)]
    return {
        "crop, flip, normalize": {
            "torch, tile by tile": torch_loop(tiles, vertical=False),
            "DALI, 1 thread": dali(tiles, 1, plain),
            "DALI, 2 threads": dali(tiles, 2, plain),
            "DALI, 2 threads, list of tiles of differing shape": dali(ragged, 2, plain),
        },
        "crop, two flips, normalize": {
            "torch, tile by tile": torch_loop(tiles, vertical=True),
            "DALI, 1 thread": dali(tiles, 1, {**plain, "vertical_flip": 0.5}),
            "DALI, 2 threads": dali(tiles, 2, {**plain, "vertical_flip": 0.5}),
        },
        "every step": {
            "torch, tile by tile": torch_every_step(tiles),
            "DALI, 1 thread": dali(tiles, 1, every),
            "DALI, 2 threads": dali(tiles, 2, every),
        },
        "JPEG, crop, flip, normalize": {
            "Pillow and torch, tile by tile": pillow_loop(files),
            "DALI, 1 thread": dali(files, 1, plain),
            "DALI, 2 threads": dali(files, 2, plain),
        },
    }


def measure(ways: dict[str, Callable[[int], Any]], seconds: float) -> dict[str, list[float]]:
    """Seconds per call of each way, in turns, for so long together."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for call in ways.values():
        call(0)
        call(1)
    end, epoch = time.perf_counter() + seconds, 2
    while time.perf_counter() < end or epoch < 7:
        for name, call in ways.items():
            start = time.perf_counter()
            call(epoch)
            found[name].append(time.perf_counter() - start)
        epoch += 1
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write; returns the exit status."""
    import torch

    parser = argparse.ArgumentParser(prog="python -m benchmarks.images", description=__doc__)
    parser.add_argument("--tiles", type=int, default=256, help="tiles per batch")
    parser.add_argument("--seconds", type=float, default=14, help="of measuring, together")
    parser.add_argument("--out", type=Path, help="folder for images.txt and images.json")
    options = parser.parse_args(argv)
    # More only slow such small tensors down.
    torch.set_num_threads(1)
    known = conditions()
    known["versions"] |= {package: metadata.version(package) for package in ("nvidia-dali-cuda130", "pillow")}
    rows, results = [], {}
    for case, ways in cases(options.tiles).items():
        seconds = measure(ways, options.seconds / 4)
        results[case] = {name: spread(values) for name, values in seconds.items()}
        first = next(iter(results[case].values()))
        for name, found in results[case].items():
            low, middle, high = (1e3 * found[key] for key in ("min", "median", "max"))
            rows.append(
                [f"{case}: {name}", f"{middle:.2f}", f"{low:.2f}-{high:.2f}", f"{options.tiles / middle:.0f}",
                 f"{first['median'] * 1e3 / middle:.2f}", f"{first['min'] * 1e3 / low:.2f}"]
            )  # fmt: skip
    text = "\n".join(
        [
            describe(known),
            f"{options.tiles} uint8 tiles {TILE} x {TILE} x 3, crop {CROP} x {CROP}, float32 out; "
            "ways in turns, torch on one thread",
            table(["case", "ms, median", "range", "tiles/ms", "times as fast", "best to best"], rows),
        ]
    )
    print(text)
    if options.out:
        write_json(options.out / "images.json", {"conditions": known, "results": results})
        (options.out / "images.txt").write_text(text + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
