"""Transform tiles with DALI: each calling thread has a pipeline, fed with tiles and their random numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from hbx_gpu._devices import require_dali
from hbx_gpu._streams import Held, own_stream
from hbx_gpu.images._decode import Decoder, Pipelines, threads
from hbx_gpu.images._draws import draw
from hbx_gpu.images._tiles import Tiles, check_sizes, collect
from hbx_gpu.images._transform import ImageTransform

if TYPE_CHECKING:
    import torch
    from nvidia.dali.pipeline import Pipeline
    from torch import Tensor

    from hbx_gpu.images._graph import Decoding


_Data: TypeAlias = np.ndarray | list[np.ndarray]


@dataclass(frozen=True, slots=True)
class _Part:
    """Tiles that one run takes: of one stored type, or images that are decoded alike."""

    positions: np.ndarray
    stored: np.dtype
    decoding: Decoding | None = None


class ImagePipeline:
    """Transforms the tiles of a batch on the CPU or on a GPU. Callable by several threads; picklable.

    What comes out is a function of the tiles, their cells, `seed` and epoch: neither other cells of the
    batch nor threads or the order of calls matter. DALI's own random numbers are not used.

    Parameters
    ----------
    transform
        Steps to apply to tiles.
    seed
        Seed of random steps, which also depend on epoch and cell.
    device_id
        The GPU to work on; None: the CPU.
    num_threads
        DALI's, for every calling thread (default: the cores this process may use).
    decode
        How encoded images are decoded: ``"rgb"``, ``"gray"``, or ``"any"`` (channels as stored).
    tile_shape
        (C, h, w) of tiles, for batches in which no cell has one. Needed only where neither the transform nor
        `decode` say how many channels there are, and how large they come out.

    Raises
    ------
    DeviceUnavailableError
        DALI or the GPU cannot be used; says what is missing.
    ValueError
        A `tile_shape` or `decode` that cannot be.
    """

    def __init__(
        self,
        transform: ImageTransform,
        *,
        seed: int = 0,
        device_id: int | None = None,
        num_threads: int | None = None,
        decode: str = "rgb",
        tile_shape: Sequence[int] | None = None,
    ) -> None:
        require_dali("image tiles go through DALI")
        if device_id is not None:
            from hbx_gpu._devices import resolve

            device_id = resolve(f"cuda:{device_id}")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must be in 0 .. 2**64 - 1, got {seed}")
        if tile_shape is not None and (len(tile_shape) != 3 or min(tile_shape) < 1):
            raise ValueError(f"tile_shape must be (C, h, w), got {tile_shape}")
        self.transform, self.seed, self.device_id = transform, seed, device_id
        self.num_threads, self.decode = num_threads, decode
        self.tile_shape = None if tile_shape is None else tuple(map(int, tile_shape))
        self._decoder = Decoder(decode, threads(num_threads))
        self._pipelines = Pipelines(device_id, threads(num_threads))
        self._held = Held()

    def __reduce__(self) -> tuple[object, ...]:
        options = {
            name: getattr(self, name) for name in ("seed", "device_id", "num_threads", "decode", "tile_shape")
        }
        return _rebuild, (self.transform, options)

    def __call__(
        self,
        tiles: np.ndarray | Sequence[np.ndarray],
        cells: Sequence[int] | np.ndarray,
        epoch: int = 0,
        *,
        present: np.ndarray | None = None,
    ) -> Tensor:
        """Transform the tiles of n cells.

        Parameters
        ----------
        tiles
            (n, C, H, W) or (n, H, W); or n arrays, (C, h, w) or (h, w), of shapes that may differ where the
            transform crops or resizes; or n encoded images (uint8, 1-D). uint8, uint16, int16 and float32
            go to DALI as they are, bool, int8 and float16 as a larger type that holds them.
        cells
            Row numbers in the dataset, (n,), not negative.
        epoch
            0 .. 2**32 - 1.
        present
            bool (n,); False for cells without a tile. So are arrays without elements.

        Returns
        -------
        torch.Tensor
            (n, C, H', W') of the transform's dtype, on the device; zeros for cells without a tile. On a GPU
            ordered into the current stream.

        Raises
        ------
        ValueError
            Tiles that the transform cannot bring to one shape; names the cell row.
        InvalidDataError
            Types that DALI does not take exactly.
        CorruptDataError
            An encoded image that cannot be decoded; names the cell row.
        UnsupportedError
            An encoded image that would not be decoded right; names the cell row.
        """
        rows = np.asarray(cells, np.int64)
        found = collect(tiles, rows, present)
        rows = rows[found.places]
        if not len(rows):
            return self._zeros(found.n, self._shape_without(tiles))
        parts, shapes = self._look(found, rows)
        check_sizes(shapes, rows, self.transform.crop, not (self.transform.crop or self.transform.resize))
        self.transform.check_channels(int(shapes[0, 0]))
        self._check_float16(parts)
        if len(parts) == 1 and len(rows) == found.n:
            return self._run(parts[0], found, rows, shapes, epoch)
        import torch

        out = self._zeros(found.n, self.transform.output_shape(shapes[0]))
        for part in parts:
            places = torch.from_numpy(found.places[part.positions]).to(out.device)
            out[places] = self._run(part, found, rows, shapes, epoch)
        return out

    def _zeros(self, n: int, shape: tuple[int, ...]) -> Tensor:
        import torch

        device = "cpu" if self.device_id is None else f"cuda:{self.device_id}"
        return torch.zeros((n, *shape), dtype=getattr(torch, self.transform.dtype), device=device)

    def _shape_without(self, tiles: object) -> tuple[int, int, int]:
        """(C, H, W) of the output for a batch in which no cell has a tile."""
        known = self.tile_shape
        if isinstance(tiles, np.ndarray) and tiles.ndim in (3, 4):
            known = tiles.shape[1:] if tiles.ndim == 4 else (1, *tiles.shape[1:])
        if known is None:
            channels = self.transform.n_channels
            size = self.transform.resize or self.transform.crop
            if channels is None or size is None:
                raise ValueError(
                    "no cell of this batch has a tile, and nothing says which shape its zeros have; give "
                    "tile_shape=(C, h, w)"
                )
            known = (channels, *size)
        return self.transform.output_shape(known)

    def _look(self, found: Tiles, rows: np.ndarray) -> tuple[list[_Part], np.ndarray]:
        """Return the parts that are run together, and the shapes (C, h, w) of all tiles."""
        if not found.encoded:
            return [_Part(positions, stored) for stored, positions in found.by_dtype()], found.shapes()
        assert isinstance(found.data, list)
        decodings, shapes = self._decoder.look(found.data, rows)
        return [
            _Part(
                np.array([position for position, other in enumerate(decodings) if other == decoding]),
                np.dtype(decoding.dtype),
                decoding,
            )
            for decoding in dict.fromkeys(decodings)
        ], shapes

    def _check_float16(self, parts: list[_Part]) -> None:
        plain = not self.transform.scale and self.transform.mean is None and self.transform.std is None
        if self.transform.dtype == "float16" and plain and any(part.stored == np.uint16 for part in parts):
            raise ValueError(
                "float16 ends at 65,504 and these tiles are uint16; add scale=True, or mean and std, or ask "
                'for dtype="float32"'
            )

    def _run(self, part: _Part, found: Tiles, rows: np.ndarray, shapes: np.ndarray, epoch: int) -> Tensor:
        from hbx_gpu.images._graph import arguments, run, transform_graph

        heights, widths = shapes[part.positions, 1], shapes[part.positions, 2]
        drawn = draw(self.transform, self.seed, epoch, rows[part.positions], heights, widths)
        feeds = arguments(self.transform, drawn, heights, widths)
        data, gpu = found.take(part.positions), self.device_id is not None
        key = part.stored, part.decoding
        pipe = self._pipelines.get(
            key,
            lambda: transform_graph(self.transform, part.stored, gpu=gpu, decoding=part.decoding),
            len(data),
        )
        try:
            if gpu:
                return self._run_on_gpu(pipe, data, feeds, encoded=found.encoded)

            from torch.utils.dlpack import from_dlpack

            return from_dlpack(run(pipe, {"tiles": data, **feeds}).as_tensor())
        except RuntimeError:
            self._pipelines.drop(key)
            if part.decoding is not None and isinstance(data, list):
                self._decoder.blame(data, rows[part.positions], [part.decoding] * len(data))
            raise

    def _run_on_gpu(
        self, pipe: Pipeline, data: _Data, feeds: Mapping[str, object], *, encoded: bool
    ) -> Tensor:
        import torch

        from hbx_gpu.images._graph import run

        current = torch.cuda.current_stream(self.device_id)
        moved: list[Tensor] = []
        fed: object = data
        if not encoded:
            assert self.device_id is not None
            moved, fed = _to_gpu(data, self.device_id)
        output = run(pipe, {"tiles": fed, **feeds}, stream=current)
        for tensor in moved:
            # DALI is done with what it was fed when the current stream gets here, and not before.
            tensor.record_stream(current)
        from torch.utils.dlpack import from_dlpack

        made = from_dlpack(output.as_tensor())
        self._held.hand_over([made], current)
        return made


def _rebuild(transform: ImageTransform, options: dict[str, Any]) -> ImagePipeline:
    return ImagePipeline(transform, **options)


def _to_gpu(data: _Data, device_id: int) -> tuple[list[Tensor], object]:
    """(tensors on the GPU, what to feed): one copy out of page-locked memory, finished.

    DALI waits for no event of what it is fed without a copy.
    """
    import torch
    from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]  # torch lacks a stub of it

    arrays = [data] if isinstance(data, np.ndarray) else data
    sizes = [array.nbytes for array in arrays]
    ends = np.cumsum([-(-size // 256) * 256 for size in sizes])  # aligned as an allocation of its own
    staged = torch.empty(int(ends[-1]), dtype=torch.uint8, pin_memory=True)
    memory = staged.numpy()
    starts = [0, *ends[:-1].tolist()]
    for array, start, size in zip(arrays, starts, sizes, strict=True):
        memory[start : start + size] = array.reshape(-1).view(np.uint8)
    stream, written = own_stream(device_id, "images"), torch.cuda.Event(blocking=True)
    with torch.cuda.stream(stream):
        slab = staged.to(f"cuda:{device_id}", non_blocking=True)
        written.record(stream)
    written.synchronize()
    parts = [
        slab[start : start + size].view(_torch_type(array.dtype)).view(array.shape)
        for array, start, size in zip(arrays, starts, sizes, strict=True)
    ]
    feeds = [to_dlpack(part) for part in parts]
    return [slab], feeds[0] if isinstance(data, np.ndarray) else feeds


def _torch_type(dtype: np.dtype) -> torch.dtype:
    import torch

    found: torch.dtype = getattr(torch, dtype.name)
    return found
