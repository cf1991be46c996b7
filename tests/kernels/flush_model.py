"""What writing a finished row costs a block of `rowpack_dense`, from addresses and from ptxas' report.

``python -m tests.kernels.flush_model`` prints the table of docs/gpu.md. Nothing here was measured on a GPU.
"""

from __future__ import annotations

from tests.kernels import registers

WIDTHS = (2_000, 20_000, 36_601, 62_710)
SIZES = {"bf16": 2, "f32": 4}
MAX_SHARED = 227 << 10  # dynamic shared memory of a block on sm_90
_STATIC_ROOM = 16 << 10  # what the backend leaves to static shared memory
_BANKS, _WARP, _THREADS = 32, 32, 256
_SHARED_PER_SM, _RESERVED, _REGISTERS, _MAX_THREADS = 228 << 10, 1 << 10, 65_536, 2_048


def phases(words: list[int], width: int) -> int:
    """Wavefronts of one access of a warp to shared memory.

    Parameters
    ----------
    words
        First 4-byte word that each lane accesses.
    width
        Words per lane: 1, or 4, which go in four groups of eight lanes.
    """
    lanes = _WARP if width == 1 else _WARP // 4
    total = 0
    for first in range(0, len(words), lanes):
        banks: dict[int, set[int]] = {}
        for word in words[first : first + lanes]:
            for k in range(width):
                banks.setdefault((word + k) % _BANKS, set()).add(word + k)
        total += max(len(found) for found in banks.values())
    return total


def wavefronts(n: int, size: int, row: int, *, shifted: bool) -> int:
    """Wavefronts that reading and clearing the tile of one row takes.

    Parameters
    ----------
    n, size, row
        Features, bytes per element of the output, and number of the row, of which the first is aligned.
    shifted
        Whether the tile stands as aligned as the row (now), or begins at a 16-byte boundary (before).
    """
    step = 16 // size
    head = min(n, ((16 - row * n * size % 16) % 16) // size)
    vectors = (n - head) // step
    shift = (4 - head % 4) % 4 if shifted else 0
    wide = (shift + head) % 4 == 0
    total = 0
    for first in range(0, vectors, _WARP):
        lanes = [shift + head + v * step for v in range(first, min(first + _WARP, vectors))]
        for k in range(0, step, 4 if wide else 1):
            total += 2 * phases([word + k for word in lanes], 4 if wide else 1)  # read, clear
    rest = n - vectors * step
    return total + 2 * -(-rest // _WARP)


def per_row(n: int, size: int, *, shifted: bool) -> float:
    """Mean over the alignments that rows have."""
    rows = 16 // size
    return sum(wavefronts(n, size, row, shifted=shifted) for row in range(rows)) / rows


def tile_of(n: int) -> int:
    """Features per tile, as the host chooses it."""
    room = MAX_SHARED - _STATIC_ROOM - 16
    return n if 4 * n <= room else room // 32 * 8


def blocks_per_sm(kernel: str, n: int, arch: str = "sm_90") -> int:
    """Blocks of 256 threads that are on a multiprocessor together."""
    used = registers.read()["kernels"][kernel][arch]
    shared = 4 * tile_of(n) + 16 + used["shared"] + _RESERVED
    of_registers = _REGISTERS // (-(-used["registers"] // 8) * 8 * _THREADS)
    return int(min(_SHARED_PER_SM // shared, of_registers, _MAX_THREADS // _THREADS))


def table() -> list[tuple[str, ...]]:
    """Rows of the table, as text."""
    rows: list[tuple[str, ...]] = []
    for kind, size in SIZES.items():
        kernel = f"rowpack_dense_{kind}"
        for n in WIDTHS:
            before, now = per_row(n, size, shifted=False), per_row(n, size, shifted=True)
            used = registers.read()["kernels"][kernel]["sm_90"]["registers"]
            tiles = -(-n // tile_of(n))
            rows.append(
                (kind, f"{n:,}", f"{before:,.0f}", f"{now:,.0f}", str(used), str(blocks_per_sm(kernel, n)),
                 str(tiles), f"{n * size:,}")
            )  # fmt: skip
    return rows


if __name__ == "__main__":
    for line in table():
        print("| " + " | ".join(line) + " |")
