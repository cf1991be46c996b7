"""A secret among the storage options appears in nothing that this package shows, writes or hands on."""

from __future__ import annotations

import logging
import pickle
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import hbx_gpu
from hbx_gpu._datasets.cells import CellDataset
from hbx_gpu._remote import writing
from hbx_gpu._remote.places import parse
from hbx_gpu.atlas import RaggedAtlas, create_or_open_atlas, repack
from hbx_gpu.cli import main
from hbx_gpu.dataloader import make_loader
from hbx_gpu.scdl._writing.convert import convert_h5ad
from tests.remote.objects import content, listing
from tests.remote.range_server import Kind, RangeServer
from tests.remote.test_writing import fill, h5ad
from tests.remote.weed import SECRET_KEY, Bucket

Make = Callable[..., RangeServer]


def shown(thing: object) -> bytes:
    """Everything by which an object could show what it knows."""
    return b"\0".join([repr(thing).encode(), str(thing).encode(), pickle.dumps(thing)])


def told(error: BaseException) -> str:
    """An error as a program shows it, with all errors that led to it."""
    return "".join(traceback.format_exception(error)) + repr(error) + str(vars(error))


def test_what_is_open_written_and_logged_has_no_secret(
    bucket: Bucket, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    url = f"{bucket.url}/atlas"
    fill(url, h5ad(tmp_path / "a.h5ad", 1), options=bucket.options)
    writable = RaggedAtlas.open(url)
    atlas = RaggedAtlas.checkout_latest(url, storage_options=bucket.options, cache=tmp_path / "cache")
    query = atlas.query()
    dataset = query.to_cell_dataset()
    assert isinstance(dataset, CellDataset)
    loader = make_loader(dataset, batch_size=8)
    next(iter(loader))
    texts = [
        *(repr(thing).encode() for thing in (writable, atlas, query, loader, writable.session.lock)),
        shown(dataset),
        shown(parse(url)),
        pickle.dumps(loader.state_dict()),
        caplog.text.encode(),
        *(path.read_bytes() for path in writable.catalog.root.rglob("*") if path.is_file()),
        *(path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file()),
        *(content(bucket.url, bucket.options, path) for path in listing(bucket.url, bucket.options)),
    ]
    assert len(texts) > 30
    assert not [text[:200] for text in texts if SECRET_KEY.encode() in text]
    assert np.array_equal(pickle.loads(pickle.dumps(dataset)).row_index.length, dataset.row_index.length)


WAYS: dict[str, Callable[[str, dict[str, str], Path], object]] = {
    "checkout": lambda url, options, _: RaggedAtlas.checkout_latest(url, storage_options=options),
    "open": lambda url, options, _: hbx_gpu.open(url, storage_options=options),
    "create": lambda url, options, _: create_or_open_atlas(url, storage_options=options),
    "repack": lambda url, options, _: repack(url, "zstd", storage_options=options),
    "convert": lambda url, options, path: convert_h5ad(path, str(parse(url, options))),
}
SECRET = "wJalrXUtnFEMI"


@pytest.mark.parametrize("kind", ["500", "reset", "wrong key"])
@pytest.mark.parametrize("way", WAYS)
def test_errors_have_no_secret(
    range_server: Make, request: pytest.FixtureRequest, tmp_path: Path, way: str, kind: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(writing, "_ATTEMPTS", 1)
    options = {"access_key_id": "AK" + SECRET, "secret_access_key": SECRET, "region": "r"}
    if kind == "wrong key":
        bucket: Bucket = request.getfixturevalue("bucket")
        options |= {"endpoint": bucket.options["endpoint"], "allow_http": "true"}
        url = f"{bucket.url}/{way}"
    else:
        server = range_server()
        fault: Kind = "500" if kind == "500" else "reset"
        server.faults = lambda *_: fault
        options |= {"endpoint": server.url, "allow_http": "true"}
        url = f"s3://bucket-{way}/x"
    file = h5ad(tmp_path / "a.h5ad")
    with pytest.raises(Exception) as caught:  # noqa: PT011 - whatever it is, its text is looked at
        WAYS[way](url, options, file)
    assert SECRET not in told(caught.value)
    pairs = [word for k, v in options.items() for word in ("--storage-option", f"{k}={v}")]
    if way == "create":
        assert main(["ingest", str(file), "--atlas", url, *pairs]) == 1
        output = capsys.readouterr()
        assert SECRET not in output.out + output.err
