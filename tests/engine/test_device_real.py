"""The device engine over real data: all fixtures and both files, bit for bit what the host engine makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hbx_gpu._engine.host.dense import densify
from hbx_gpu.atlas import RaggedAtlas
from hbx_gpu.cli import main
from hbx_gpu.dataloader import CellDataset
from hbx_gpu.errors import InvalidDataError
from hbx_gpu.transforms import Transform
from tests.atlas.cases import TABLES, Case
from tests.emulation.backend import EmulatedBackend
from tests.kernels.conftest import on_gpu

TRANSFORM = Transform(target_sum=1e4, log1p=True)


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest) -> Any:
    if request.param == "emulated":
        return EmulatedBackend()
    on_gpu()
    from hbx_gpu._engine.device.cuda import CudaBackend

    return CudaBackend(0)


def equal(dataset: CellDataset, backend: Any, selection: np.ndarray) -> None:
    """CSR bit for bit, dense rows within rounding."""
    host = dataset[selection]
    engine: Any = dataset.device_engine(backend)
    indices, (values,), offsets = (
        [part.cpu().numpy() for part in found] if isinstance(found, list) else found.cpu().numpy()
        for found in engine.csr(*dataset.read(selection))
    )
    assert np.array_equal(indices, host.indices)
    assert values.dtype == host.values.dtype
    assert np.array_equal(values, host.values)
    assert np.array_equal(offsets, host.offsets)
    plain = engine.dense(*dataset.read(selection)).cpu().numpy()
    assert np.array_equal(plain, densify(host))
    try:
        expected = densify(host, transform=TRANSFORM)
    except InvalidDataError as refused:
        with pytest.raises(InvalidDataError, match=str(refused).partition(": ")[2]):
            engine.dense(*dataset.read(selection), "float32", TRANSFORM)
        return
    scaled = engine.dense(*dataset.read(selection), "float32", TRANSFORM).cpu().numpy()
    np.testing.assert_allclose(scaled, expected, rtol=5e-6, atol=0)


@pytest.mark.parametrize(("atlas", "version", "table", "suffix"), TABLES)
def test_every_fixture(
    homeobox_fixtures: Path, backend: Any, atlas: str, version: int, table: str, suffix: str
) -> None:
    case = Case(homeobox_fixtures / atlas, version, table, suffix)
    assert case.matrices()
    for field, layer, _ in case.matrices():
        dataset: Any = case.query().to_cell_dataset(field_name=field, layer=layer)
        rows = np.random.default_rng(0).permutation(len(dataset))[:64]
        equal(dataset, backend, np.concatenate([rows, rows[:3]]))


@pytest.mark.parametrize("codec", ["hbx_gpu.rowpack", "homeobox.bitpacking"])
def test_both_real_files(real_h5ad: tuple[Path, Path], backend: Any, tmp_path: Path, codec: str) -> None:
    path = str(tmp_path / "atlas")
    assert main(["ingest", *map(str, real_h5ad), "--atlas", path, "--codec", codec]) == 0
    dataset: Any = RaggedAtlas.checkout_latest(path).query().to_cell_dataset("gene_expression")
    rows = np.random.default_rng(1).permutation(len(dataset))[:200]
    equal(dataset, backend, rows)
    equal(dataset, backend, np.arange(100))
