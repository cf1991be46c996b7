"""The table of registers and static shared memory per kernel, kernels/registers.json.

`python -m tests.kernels.registers` rewrites it after a change of kernels: the difference is what that costs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hbx_gpu._engine.device import sources
from tests.kernels import nvrtc

TABLE = Path(__file__).resolve().parents[2] / "kernels" / "registers.json"


def measured(name: str, arch: str) -> dict[str, nvrtc.Usage]:
    """What the kernels of a file use on an architecture."""
    return nvrtc.usage(nvrtc.compile_text(sources.source(name), name, arch)[1])


def read() -> dict[str, Any]:
    """The checked-in table: `nvrtc` (version) and `kernels` {kernel: {arch: {registers, shared}}}."""
    result: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return result


def write() -> None:
    """Compile every kernel for every architecture and rewrite the table."""
    kernels: dict[str, dict[str, dict[str, int]]] = {}
    for file in sources.kernel_files():
        for arch in nvrtc.ARCHITECTURES:
            for kernel, used in measured(file.name, arch).items():
                entry = {"registers": used.registers, "shared": used.shared}
                kernels.setdefault(kernel, {})[arch] = entry
    # One line per kernel: differences are read.
    lines = ",\n".join(
        f"    {json.dumps(kernel)}: {json.dumps(kernels[kernel])}" for kernel in sorted(kernels)
    )
    TABLE.write_text(
        f'{{\n  "nvrtc": "{nvrtc.version()}",\n  "kernels": {{\n{lines}\n  }}\n}}\n', encoding="utf-8"
    )


if __name__ == "__main__":
    write()
    print(TABLE.read_text(encoding="utf-8"))
