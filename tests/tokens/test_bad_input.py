"""What cannot become tokens is refused in words, before the first batch where it can be known by then."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from hbx_gpu import SparseBatch, tokens
from hbx_gpu.errors import InvalidDataError
from hbx_gpu.tokens._tables import read_table

GENES = ["ENSG1.4", "ENSG2.1", "ENSG3.2"]
PLAIN = ["ENSG1", "ENSG2", "ENSG3"]
WORDS = {"<pad>": 0, "<mask>": 1, "<cls>": 2, "<eos>": 3, "ENSG1": 4, "ENSG2": 5, "ENSG3": 6}
MEDIANS = {"ENSG1": 1.0, "ENSG2": 2.0, "ENSG3": 0.5}
ENGINES = ["host", "reference"]


def rows(values: Any) -> csr_matrix:
    return csr_matrix(np.array([values]))


def recipe(**options: Any) -> tokens.RankValue:
    return tokens.geneformer_v2(WORDS, MEDIANS, **options)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("values", [[1.5, 0, 1], [-1.0, 2, 0], [np.nan, 1, 1], [np.inf, 1, 1]])
def test_values_that_are_not_counts(engine: str, values: list[float]) -> None:
    with pytest.raises(InvalidDataError, match="made of counts, but some values"):
        tokens.encode(rows(values), recipe(), PLAIN, engine=engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_totals_that_are_not_exact(engine: str) -> None:
    with pytest.raises(InvalidDataError, match=r"more than 2\*\*53"):
        tokens.encode(rows([2.0**53, 1.0, 1.0]), recipe(), PLAIN, engine=engine)
    assert tokens.encode(rows([2.0**53, 0, 0]), recipe(), PLAIN, engine=engine)["lengths"] == [3]


@pytest.mark.parametrize("engine", ENGINES)
def test_negative_logarithms(engine: str) -> None:
    se = tokens.state_se(dict(zip(PLAIN, range(3), strict=True)), values="log1p", cls_gene=0)
    with pytest.raises(InvalidDataError, match="logarithms of counts"):
        tokens.encode(rows([-0.5, 1.0, 0.0]), se, PLAIN, engine=engine)


@pytest.mark.parametrize("bad", [0, 0.0, -1.0, float("nan"), float("inf")])
def test_medians_that_nothing_can_be_divided_by(bad: float) -> None:
    with pytest.raises(InvalidDataError, match="'ENSG2' must be positive and finite"):
        tokens.geneformer_v2(WORDS, MEDIANS | {"ENSG2": bad})
    with pytest.raises(InvalidDataError, match="must be a number"):
        tokens.geneformer_v2(WORDS, MEDIANS | {"ENSG2": "3"})


@pytest.mark.parametrize("bad", ["x", None, -1, 0.5, float("nan"), float("inf")])
def test_places_of_genes_that_are_not_whole_numbers(bad: object) -> None:
    places = dict.fromkeys(PLAIN, 1)
    with pytest.raises(InvalidDataError, match="'ENSG2' must be a whole number"):
        tokens.uce(WORDS, places, places | {"ENSG2": bad})


def test_medians_that_are_missing() -> None:
    few = {"ENSG1": 1.0, "ENSG2": 2.0}
    with pytest.raises(
        InvalidDataError, match="genes of the dataset have a token but no median, such as ENSG3"
    ):
        tokens.compile(tokens.geneformer_v2(WORDS, few), PLAIN)
    dropping = tokens.compile(tokens.geneformer_v2(WORDS, few, missing_medians="drop"), PLAIN)
    assert dropping.report.matched == 2
    with pytest.raises(InvalidDataError, match="empty"):
        tokens.geneformer_v2(WORDS, {})


def test_vocabularies_that_are_none() -> None:
    with pytest.raises(InvalidDataError, match="gives the id 5 to 'ENSG2' and to 'ENSG9'"):
        tokens.geneformer_v2(WORDS | {"ENSG9": 5}, MEDIANS)
    with pytest.raises(InvalidDataError, match="whole number"):
        tokens.geneformer_v2(WORDS | {"ENSG9": 7.5}, MEDIANS)
    with pytest.raises(InvalidDataError, match=r"0 \.\. 2\*\*31"):
        tokens.geneformer_v2(WORDS | {"ENSG9": -7}, MEDIANS)
    with pytest.raises(InvalidDataError, match="keyed on feature uids"):
        tokens.geneformer_v2({1: 2}, MEDIANS)  # type: ignore[dict-item]
    with pytest.raises(InvalidDataError, match=r"none of the 2 features is in the vocabulary.*'TP53'"):
        tokens.compile(recipe(), ["TP53", "MYC"])
    with pytest.raises(InvalidDataError, match="strip_versions=True"):
        tokens.compile(recipe(), GENES)
    assert tokens.compile(recipe(strip_versions=True), GENES).report.matched == 3


def test_specials_that_are_missing() -> None:
    lacking = {name: number for name, number in WORDS.items() if name != "<eos>"}
    with pytest.raises(InvalidDataError, match="eos='<eos>' is not in the vocabulary"):
        tokens.geneformer_v2(lacking, MEDIANS)
    unmasked = {name: number for name, number in WORDS.items() if name != "<mask>"}
    assert tokens.geneformer_v2(unmasked, MEDIANS)
    with pytest.raises(InvalidDataError, match="mask_token='<mask>'"):
        tokens.geneformer_v2(unmasked, MEDIANS, mlm=0.15)
    with pytest.raises(InvalidDataError, match="front='<cls>'"):
        tokens.scgpt({"<pad>": 0, "a": 1}, side="one")


@pytest.mark.parametrize("length", [0, 1, 2])
def test_lengths_without_room(length: int) -> None:
    with pytest.raises(ValueError, match="leaves no room for genes beside 2 special tokens"):
        recipe(length=length)


def test_lengths_are_whole_numbers() -> None:
    with pytest.raises(ValueError, match=r"must be whole numbers, got 12\.5"):
        recipe(length=12.5)


def test_settings_that_mean_nothing() -> None:
    for wrong, message in (
        ({"mlm": 1.5}, "probability"),
        ({"arithmetic": "f16"}, "arithmetic must be one of"),
        ({"target_sum": 0}, "target_sum must be positive"),
        ({"length": -1}, "no room"),
    ):
        with pytest.raises(ValueError, match=message):
            recipe(**wrong)
    with pytest.raises(ValueError, match="at least one id"):
        tokens.MaskTokens(replacement=(5, 5))
    with pytest.raises(ValueError, match="shares"):
        tokens.MaskTokens(masked=0.8, replaced=0.3)
    with pytest.raises(ValueError, match="side has no default"):
        tokens.QuantileBins(WORDS)
    with pytest.raises(ValueError, match="resolution"):
        tokens.scfoundation(PLAIN, resolution="x9")
    with pytest.raises(ValueError, match="twice"):
        tokens.scfoundation(["a", "a"])
    with pytest.raises(TypeError, match="SparseBatch or a scipy CSR"):
        tokens.encode(np.ones((2, 3)), recipe(), PLAIN)
    with pytest.raises(TypeError, match="one of the recipes"):
        tokens.compile(tokens.Recipe(WORDS), PLAIN)


def test_names_that_do_not_fit() -> None:
    named = recipe(names={"input_ids": "values", "values": "input_ids"})  # each has one of its own
    assert "values" in tokens.encode(rows([1, 2, 3]), named, PLAIN)
    with pytest.raises(ValueError, match="there is no output 'inputs' to rename"):
        recipe(names={"inputs": "gene"})
    with pytest.raises(ValueError, match="gives an output the name of another"):
        tokens.encode(rows([1, 2, 3]), recipe(names={"attention_mask": "labels"}, mlm=0.5), PLAIN)
    with pytest.raises(ValueError, match="'input_ids' and 'values' would both be called 'input_ids'"):
        recipe(names={"values": "input_ids"})
    with pytest.raises(ValueError, match="would both be called 'gene'"):
        recipe(names={"input_ids": "gene", "labels": "gene"})


def test_nested_tensors_of_padded_batches() -> None:
    packed = tokens.encode(rows([1, 0, 3]), recipe(), PLAIN, padding="packed")
    assert tokens.nested(packed).unbind()[0].tolist() == [2, 6, 4, 3]
    with pytest.raises(ValueError, match="made of packed batches"):
        tokens.nested(tokens.encode(rows([1, 0, 3]), recipe(), PLAIN))
    with pytest.raises(ValueError, match="has no 'values'"):
        tokens.nested(packed, "values")


def test_a_feature_space_that_changed() -> None:
    compiled = tokens.compile(recipe(), PLAIN)
    with pytest.raises(InvalidDataError, match="feature space has changed"):
        tokens.encode(rows([1, 2, 3]), compiled, PLAIN[::-1])
    with pytest.raises(InvalidDataError, match="have 2 columns"):
        tokens.encode(rows([1, 2]), compiled)
    again = pickle.loads(pickle.dumps(compiled))
    assert tokens.encode(rows([1, 2, 3]), again, PLAIN)["input_ids"].tolist() == [[2, 6, 4, 5, 3]]


@pytest.mark.parametrize("engine", ENGINES)
def test_renamed_genes_are_summed(engine: str) -> None:
    named = recipe(mapping={"OLD": "ENSG2"})
    compiled = tokens.compile(named, ["OLD", *PLAIN])
    assert compiled.report.matched == 4
    assert compiled.report.n_tokens == 3
    assert "1 of them summed" in str(compiled.report)
    batch = tokens.encode(rows([5, 3, 5, 1]), compiled, engine=engine)
    # ENSG2: (5 + 5) / 2; ENSG1: 3 / 1; ENSG3: 1 / 0.5
    assert batch["input_ids"].tolist() == [[2, 5, 4, 6, 3]]


@pytest.mark.parametrize("engine", ENGINES)
def test_columns_outside_the_features(engine: str) -> None:
    batch = SparseBatch(np.array([7], np.int32), np.ones(1, np.float32), np.array([0, 1]), 3)
    with pytest.raises((InvalidDataError, IndexError)):
        tokens.encode(batch, recipe(), PLAIN, engine=engine)


def test_obs_values_without_an_id() -> None:
    named = recipe(context=(tokens.ObsTokens("species", {"mouse": 9}),))
    made = tokens.encode(rows([1, 0, 0]), named, PLAIN, obs={"species": ["mouse"]})
    assert made["input_ids"].tolist() == [[2, 9, 4, 3]]
    with pytest.raises(InvalidDataError, match="'yeti', which ObsTokens has no id for"):
        tokens.encode(rows([1, 0, 0]), named, PLAIN, obs={"species": ["yeti"]})
    with pytest.raises(InvalidDataError, match="reads obs column 'species'"):
        tokens.encode(rows([1, 0, 0]), named, PLAIN)


def test_files_of_tables(tmp_path: Path) -> None:
    (tmp_path / "words.json").write_text(json.dumps(WORDS))
    numbers = {name: np.float64(value) for name, value in MEDIANS.items()}
    (tmp_path / "medians.pkl").write_bytes(pickle.dumps(numbers))
    (tmp_path / "words.pkl").write_bytes(pickle.dumps({k: np.int64(v) for k, v in WORDS.items()}, protocol=2))
    read = tokens.geneformer_v2(tmp_path / "words.json", tmp_path / "medians.pkl")
    assert read == recipe()
    assert tokens.RankValue.geneformer_v2(tmp_path / "words.json", tmp_path / "medians.pkl") == recipe()
    assert read_table(tmp_path / "words.pkl", "words") == WORDS


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('ran')",))


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps({"a": Evil()}),
        pickle.dumps({"a": np.array([1, 2])}),
        pickle.dumps([1, 2]),
        pickle.dumps({"a": Path("x")}),
        b"cnumpy._core.multiarray\nscalar\n(cnumpy\ndtype\n(S'O'\nI0\nI1\ntRS'x'\ntR.",
        b"not a pickle",
        b"",
    ],
)
def test_pickles_that_hold_more_than_plain_values(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "medians.pkl"
    path.write_bytes(content)
    with pytest.raises(InvalidDataError, match=r"medians"):
        tokens.geneformer_v2(WORDS, path)


def doubled(start: Any, wrap: Callable[[Any], Any]) -> Any:
    for _ in range(60):
        start = wrap(start)
    return start


def key_that_doubles() -> bytes:
    """A dict with one key, a tuple of twice the same tuple, 60 deep; writing it needs no hash."""
    steps = b"".join(b"h%ch%c\x86\x940" % (k, k) for k in range(60))
    return b"\x80\x04}\x8c\x01a\x940" + steps + b"h%cK\x01s." % 60


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    "wrap", [lambda v: [v, v], lambda v: (v, v), lambda v: {"a": v, "b": v}], ids=["list", "tuple", "dict"]
)
def test_values_that_double(tmp_path: Path, wrap: Callable[[Any], Any], protocol: int) -> None:
    path = tmp_path / "words.pkl"
    path.write_bytes(pickle.dumps({"a": doubled("x", wrap)}, protocol))
    with pytest.raises(InvalidDataError, match="it holds") as caught:
        read_table(path, "words")
    assert len(str(caught.value)) < 1000


def test_keys_that_double(tmp_path: Path) -> None:
    path = tmp_path / "words.pkl"
    path.write_bytes(key_that_doubles())
    with pytest.raises(InvalidDataError, match="it holds lists, sets or tuples"):
        read_table(path, "words")


def test_texts_that_are_encoded_again_and_again(tmp_path: Path) -> None:
    path = tmp_path / "words.pkl"
    again = b"c_codecs\nencode\n(h\x00X\x06\x00\x00\x00latin1tR0"
    path.write_bytes(b"X\x00\x10\x00\x00" + b"x" * 4096 + b"q\x000" + again * 100 + b"}.")
    with pytest.raises(InvalidDataError, match="not a number's bytes"):
        read_table(path, "words")
