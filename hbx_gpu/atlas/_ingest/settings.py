"""How a dataset is added to an atlas, whatever it consists of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hbx_gpu._progress import Progress, checked
from hbx_gpu.atlas._ingest.obs_edits import ObsEdits
from hbx_gpu.atlas._ingest.parts import Storage
from hbx_gpu.atlas._model.schema import DatasetSchema


@dataclass(frozen=True)
class Settings:
    """How a dataset is added, whatever it consists of.

    Attributes
    ----------
    obs_table
        Obs table that receives the cells.
    storage, codec_asked
        Storage of the arrays, and whether the user named the codec.
    record
        The row of a dataset that is one group; None to make rows.
    dataset_uid
        None lets it follow from the content.
    choices
        Further columns of the dataset's rows: options that decide what is stored.
    obs_from
        Modality whose obs columns count where others differ.
    edits
        What the user changes about obs columns.
    exist_ok
        Skip what was ingested before.
    replace
        Let the dataset take the place of the one made of the same file, of a file of that name, or of the
        same cells.
    accept_duplicates
        Add cells that are in the atlas already, from another file.
    progress
        Called with the number of cells done and of all cells, over all modalities.
    """

    obs_table: str
    storage: Storage
    codec_asked: bool
    record: DatasetSchema | None = None
    dataset_uid: str | None = None
    choices: Mapping[str, str] = field(default_factory=dict)
    obs_from: str | None = None
    edits: ObsEdits = field(default_factory=ObsEdits)
    exist_ok: bool = False
    replace: bool = False
    accept_duplicates: bool = False
    progress: Progress | None = None

    def __post_init__(self) -> None:
        checked(self.progress)
