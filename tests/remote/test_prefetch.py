"""``hbx-gpu prefetch``: after it, a query loads without a request for chunks."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hbx_gpu.atlas import RaggedAtlas
from hbx_gpu.cli import main
from hbx_gpu.dataloader import make_loader
from tests.remote.range_server import RangeServer


def test_what_was_prefetched_is_local(
    homeobox_fixtures: Path,
    range_server: Callable[..., RangeServer],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(homeobox_fixtures / "single_rna" / "atlas", tmp_path / "served" / "prefetched")
    server, cache = range_server(), tmp_path / "cache"
    given = [part for k, v in server.s3_options.items() for part in ("--storage-option", f"{k}={v}")]
    command = ["prefetch", "s3://prefetched", "--cache", str(cache), "--cache-bytes", "10000000", *given]
    assert main(command) == 0
    assert "0 bytes came" not in capsys.readouterr().out
    dataset = (
        RaggedAtlas.checkout_latest("s3://prefetched", storage_options=server.s3_options, cache=cache)
        .query()
        .to_cell_dataset()
    )
    loader = make_loader(dataset, batch_size=32, layout="csr")
    assert sum(len(batch["index"]) for batch in loader) == len(dataset)
    assert loader.stats().requests == 0
    assert main(command) == 0
    assert "; 0 bytes came from s3://prefetched" in capsys.readouterr().out


def test_a_store_on_a_plain_http_server_is_prefetched(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RangeServer(shared) as server:
        url = f"{server.url}/data/human_1k_cells_x_507_genes.h5ad"
        command = ["prefetch", url, "--cache", str(tmp_path), "--storage-option", "allow_http=true"]
        assert main(command) == 0
        assert "; 0 bytes came" not in capsys.readouterr().out
        assert main(command) == 0
        assert f"; 0 bytes came from {url}" in capsys.readouterr().out


def test_there_is_nothing_to_prefetch_on_a_disk(
    homeobox_fixtures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = homeobox_fixtures / "single_rna" / "atlas"
    assert main(["prefetch", str(path), "--cache", str(tmp_path)]) == 1
    assert "on a local disk already" in capsys.readouterr().err
