"""The names of the tables of an atlas, and the file that keeps them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hbx_gpu._advice import option
from hbx_gpu._files import write_durably
from hbx_gpu._untrusted import parse_json, read_small
from hbx_gpu.atlas._catalog import tables
from hbx_gpu.atlas._catalog.paths import check_database, plain_name
from hbx_gpu.atlas._catalog.snapshot_records import VERSION_TABLE, read_records
from hbx_gpu.atlas._writing.arrays import DEFAULT_CODEC, HOMEOBOX_CODEC, codec_names
from hbx_gpu.errors import AtlasError

_CONFIG = "hbx_gpu.json"


class OlderGenerationError(AtlasError):
    """An atlas of a Homeobox release whose tables are read and not written."""


@dataclass(frozen=True)
class Names:
    """Names of tables, kept in a small file beside them because nothing else records them before a snapshot.

    Attributes
    ----------
    obs_tables, dataset_table, version_table
        Names of the obs tables, the table of groups, and the table of snapshots.
    registries
        Feature space -> registry table.
    codec
        Codec of new arrays unless the caller names another.
    """

    obs_tables: tuple[str, ...]
    dataset_table: str
    registries: Mapping[str, str]
    version_table: str = VERSION_TABLE
    codec: str = DEFAULT_CODEC

    def save(self, root: Path) -> None:
        """Write the names to disk durably."""
        _save(root, asdict(self))

    @staticmethod
    def exist(root: Path) -> bool:
        """Whether our own file exists, which means that the creation of our atlas has finished."""
        return (root / _CONFIG).is_file()

    @staticmethod
    def forget(root: Path) -> None:
        """Remove our own file."""
        (root / _CONFIG).unlink(missing_ok=True)

    @classmethod
    def load(
        cls, root: Path, *, version_table: str = VERSION_TABLE, allow_links: bool = False
    ) -> Names | None:
        """Names of an atlas: from its last snapshot and our own file; None where neither exists.

        Raises
        ------
        OlderGenerationError
            Written by a release whose tables we read but do not write.
        AtlasError
            Our own file is damaged, or names what is not a table.
        UnsafePathError
            A file that is not a regular one, or a link that leads out of the atlas.
        """
        own = _load(root)
        version_table = own.get("version_table", version_table)
        check_database(root, allow_links=allow_links)
        has_database = (root / "lance_db").is_dir()
        records = read_records(root, version_table_name=version_table) if has_database else []
        if not own and not records:
            return None
        if records:
            last = records[-1]
            _check_generation(root, version_table)
            own.setdefault("dataset_table", last.dataset_table[0])
            own["registries"] = {s: name for s, (name, _) in last.registries.items()} | own.get(
                "registries", {}
            )
            own["obs_tables"] = sorted({*last.obs_tables, *own.get("obs_tables", ())})
        if missing := [key for key in ("obs_tables", "dataset_table", "registries") if key not in own]:
            raise AtlasError(
                f"{root / _CONFIG} lacks {', '.join(missing)}, and the atlas has no snapshot that says it; "
                "restore the file from a copy of the atlas"
            )
        return cls(
            tuple(own["obs_tables"]),
            own["dataset_table"],
            own["registries"],
            version_table,
            # An atlas that Homeobox wrote is continued in its style, so that Homeobox can still read it.
            own.get("codec", HOMEOBOX_CODEC),
        )


def _load(root: Path) -> dict[str, Any]:
    """Our own file beside the tables; empty where there is none.

    Raises
    ------
    AtlasError
        The file holds something that is not a name, or not the name of a table.
    """
    path = root / _CONFIG
    if not os.path.lexists(path):
        return {}
    own = parse_json(read_small(path), path)
    expected = {
        "obs_tables": list,
        "dataset_table": str,
        "registries": dict,
        "version_table": str,
        "codec": str,
    }
    if not isinstance(own, dict):
        raise AtlasError(
            f"{path} holds a {type(own).__name__}, an object is expected; restore it from a copy"
        )
    for key, kind in expected.items():
        if key in own and not isinstance(own[key], kind):
            raise AtlasError(
                f"{path}: {key} is {str(own[key])[:100]!r}, expected is a {kind.__name__}; restore the file "
                "from a copy of the atlas"
            )
    registries = own.get("registries", {}).values()
    named = [own.get(key) for key in ("dataset_table", "version_table") if key in own]
    for name in (*own.get("obs_tables", ()), *registries, *named):
        plain_name(name, f"the name of a table in {path}")
    if own.get("codec", HOMEOBOX_CODEC) not in codec_names():
        raise AtlasError(f"{path}: codec is {own['codec'][:100]!r}; there are {', '.join(codec_names())}")
    return own


def set_default_codec(root: Path, codec: str) -> None:
    """Make `codec` the default for new arrays. Only atlases that hbx_gpu made can record it."""
    own = _load(root)
    if own and own.get("codec") != codec:
        _save(root, own | {"codec": codec})


def _save(root: Path, config: dict[str, Any]) -> None:
    write_durably(root / _CONFIG, json.dumps(config, indent=2))


def _check_generation(root: Path, version_table: str) -> None:
    if "obs_table_versions" not in tables.open_table(root, version_table).schema.names:
        raise OlderGenerationError(
            f"the atlas at {root} was written by a Homeobox release before 0.2.4: it can be read "
            "(RaggedAtlas.checkout_latest) but not added to; create a new atlas and ingest there"
        )


def only_table(names: Sequence[str]) -> str:
    """The only obs table, used where none is named.

    Raises
    ------
    ValueError
        There are several.
    """
    if len(names) != 1:
        raise ValueError(
            f"the atlas has several obs tables ({list(names)}); pass {option('obs_table')} to select one"
        )
    return names[0]
