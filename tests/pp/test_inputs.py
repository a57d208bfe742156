"""Every row of the list of odd inputs (docs/inputs.md): its code, and what becomes of the data."""

from __future__ import annotations

import json
import logging
import re
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scbin import Tokenization, Vocabulary
from scbin._adata import check_adata, gene_names, iter_blocks, read_tokens
from scbin._errors import ScbinInputError, ScbinInputWarning, ScbinTypeError
from scbin.io.dictionaries import geneformer_vocabulary
from scbin.pp import check, tokenize
from scbin.tokens.encoding import Encoder
from scbin.tokens.genes import clean_names, match_genes
from scbin.tokens.kernels import frame_rows, over_rows
from scbin.tokens.rules import Bins
from scbin.tokens.values import Block, Reading

RNG = np.random.default_rng(5)
COUNTS = RNG.poisson(1.5, size=(12, 30)).astype(np.float32)
COUNTS[:, 0] += 1
DEPTH = COUNTS.sum(axis=1, keepdims=True)
LOGS = np.log1p(COUNTS / DEPTH * 1e4)
NOISE = np.abs(np.random.default_rng(0).normal(size=COUNTS.shape)).astype(np.float32)
SYMBOLS = [f"GENE{chr(65 + k)}{k}" for k in range(30)]
IDS = [f"ENSG{k:011d}" for k in range(30)]


def cells(x=COUNTS, *, names=None, obs=None, **kwargs) -> ad.AnnData:
    x = sparse.csr_matrix(x) if isinstance(x, np.ndarray) and x.dtype != object else x
    obs = pd.DataFrame(obs, index=[f"c{k}" for k in range(x.shape[0])])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # anndata remarks on repeated names
        return ad.AnnData(x, obs=obs, var=pd.DataFrame(index=pd.Index((names or SYMBOLS)[: x.shape[1]])), **kwargs)


def labelled(values) -> ad.AnnData:
    return cells(obs={"kind": values})


def tokens(adata, **kwargs) -> np.ndarray:
    tokenize(adata, **kwargs)
    return read_tokens(adata).matrix.toarray()


def vocabulary_of(adata, **kwargs) -> Vocabulary:
    return read_tokens(tokenize(adata, copy=True, **kwargs)).vocabulary


def record(adata) -> dict:
    return json.loads(adata.uns["scbin"]["tokenize"])


def same(adata, expected=None, **kwargs) -> None:
    np.testing.assert_array_equal(tokens(adata, **kwargs), EXPECTED if expected is None else expected)


def fails(adata, code: str, *words: str, **kwargs) -> None:
    before = list(adata.obsm) if isinstance(adata, ad.AnnData) else []
    with pytest.raises(ScbinInputError) as caught:
        tokenize(adata, **kwargs)
    assert caught.value.code == code, str(caught.value)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)
    assert not isinstance(adata, ad.AnnData) or list(adata.obsm) == before


def warns(adata, code: str, *words: str, **kwargs) -> np.ndarray:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = tokens(adata, **kwargs)
    found = {w.message.code: str(w.message) for w in caught if isinstance(w.message, ScbinInputWarning)}
    assert code in found, found
    assert [word for word in words if word not in found[code]] == [], found[code]
    return out


def changed(row: int, column: int, value: float) -> np.ndarray:
    out = COUNTS.copy()
    out[row, column] = value
    return out


EXPECTED = tokens(cells())
VOCABULARY = vocabulary_of(cells())
LINEAR = vocabulary_of(cells(), rule="linear")


# ---- what the values are ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["bins", "rank", "gene_bins", "binary"])
@pytest.mark.parametrize("target", [1e4, 500.0, None])
@pytest.mark.parametrize("base", [np.e, 2, 10])
def test_i01_logs_give_the_tokens_and_the_vocabulary_of_their_counts(base, target, encoding):
    scale = np.median(DEPTH) if target is None else target
    logs = cells((np.log1p(COUNTS / DEPTH * scale) / np.log(base)).astype(np.float32))
    counts = tokenize(cells(), encoding=encoding, copy=True)
    same(logs, counts.obsm["X_tokens"].toarray(), encoding=encoding)
    assert read_tokens(logs).vocabulary == read_tokens(counts).vocabulary
    assert ("natural log" if base == np.e else f"log base {base}") in record(logs)["values"]
    assert f"cells sum to {scale:,.6g}" in record(logs)["values"]


def test_i01_by_range_only(caplog):
    caplog.set_level(logging.INFO)
    warns(cells(NOISE), "I01", "by its range only", 'values="log1p"')
    assert 'rule="linear"' in caplog.text
    tokenize(cells(NOISE), values="log1p")  # warnings are errors


def test_i01_by_note_in_uns():
    adata = cells(NOISE, uns={"log1p": {"base": None}})
    tokenize(adata)
    assert "by uns" in record(adata)["values"]
    same(cells(uns={"log1p": {"base": None}}))  # counts, despite a note


def test_i01_another_sum_than_the_models():
    expected = tokens(cells(), like=LINEAR)
    same(cells(np.log1p(COUNTS / DEPTH * 500).astype(np.float32)), expected, like=LINEAR)
    per_cell = np.linspace(300, 900, 12)[:, None]
    warns(cells(np.log1p(COUNTS / DEPTH * per_cell).astype(np.float32)), "I01", "no common sum", like=LINEAR)


def test_i01_counts_that_logs_do_not_tell():
    noise = cells(NOISE, uns={"log1p": {}})
    for arguments in ({"encoding": "gene_bins"}, {"rule": "counts"}, {"like": VOCABULARY}):
        fails(noise.copy(), "I01", "read counts", **arguments)
    fails(noise.copy(), "A03", "depth=True", tokenization=Tokenization(depth=True))
    out = warns(noise, "I01", "[NO_DEPTH]", like=LINEAR)
    assert (out[:, 1] == LINEAR.depth.first_id).all()


def test_i01_a_cell_whose_logs_are_those_of_no_counts_is_said_to_be_rounded():
    many = np.tile(COUNTS, (5, 1))
    logs = np.log1p(many / many.sum(axis=1, keepdims=True) * 1e4)
    logs[7, logs[7] > 0] *= 0.97
    adata = cells(logs)
    warns(adata, "I01", "1 cell has logs", "rounded")


@pytest.mark.parametrize(
    ("x", "code", "words"),
    [
        (np.vstack([COUNTS[:3], LOGS[3:]]), "I01", ["two units", "3 cells", "9 cells"]),
        *((COUNTS / DEPTH * target, "I02", ["sc.pp.log1p"]) for target in (1e4, 1e6)),
        (np.sqrt(COUNTS), "I02", ["square roots"]),
        (changed(2, 3, -2), "I04", ["1 negative value", "cell 'c2', gene 'GENED3': -2", "background"]),
        *((changed(2, 3, x), "I05", ["1 value that is not finite", "cell 'c2', gene 'GENED3'"]) for x in (np.nan, np.inf, -np.inf)),
        (changed(1, 1, 1e30), "I08", ["1e+30"]),
    ],
)  # fmt: skip
def test_i02_i04_i05_i08_values_that_cannot_be_read(x, code: str, words: list[str]):
    fails(cells(x.astype(np.float32)), code, *words)
    if code == "I05":
        for values in ("counts", "log1p"):
            fails(cells(x.astype(np.float32)), code, *words, values=values)


def test_i08_large_values_that_are_warned_of_and_logs_that_are_none():
    warns(cells(changed(1, 1, 2e6)), "I08")
    fails(cells(np.where(LOGS == LOGS.max(), 40.5, LOGS)), "I08", "no log1p value", values="log1p")


def test_i03_scaled():
    scaled = LOGS - LOGS.mean(axis=0)
    adata = cells(scaled)
    adata.raw = cells(LOGS)
    fails(adata, "I03", f"{(scaled < 0).sum():,} negative", "sc.pp.scale", "cell 'c", "adata.raw.to_adata()")
    adata.layers["scaled"], adata.layers["data"] = scaled, LOGS
    fails(adata, "I03", "layer='data'")
    fails(adata, "A06", "Available: 'scaled', 'data'.", layer="absent")
    adata.layers["counts"] = COUNTS
    fails(adata, "I03", "layer='counts'")
    same(adata, layer="counts")
    with pytest.raises(ScbinInputError, match=r"I03.*layer=\.$"):
        tokenize(cells(scaled))


@pytest.mark.parametrize("dtype", ["float64", "float32", "int64", "int32", "uint16", "uint8", "bool", ">f4", "float16"])
def test_i06_value_types(dtype: str):
    expected = tokens(cells((COUNTS > 0).astype(np.float32))) if dtype == "bool" else EXPECTED
    dense = dtype in (">f4", "float16")  # which only dense arrays have
    same(ad.AnnData(COUNTS.astype(dtype), var=cells().var) if dense else cells(COUNTS.astype(dtype)), expected)


def test_i06_numbers_in_another_order_of_bytes():
    same(ad.AnnData(COUNTS.astype(">i4"), var=cells().var), tokens(cells()))


def test_i06_large_counts_do_not_wrap():
    big = changed(0, 1, 70_000)
    adata = cells(big.astype(np.int64))
    row, vocabulary = tokens(adata, encoding="rank")[0], read_tokens(adata).vocabulary
    best = SYMBOLS[int(np.argmax(big[0] / np.asarray(vocabulary.medians)))]
    assert vocabulary.genes[row[vocabulary.first_gene_position] - vocabulary.first_gene_id] == best


def test_i07_ambient_corrected():
    corrected = np.where(COUNTS > 0, COUNTS * 20 + np.random.default_rng(0).random(COUNTS.shape), 0)
    adata = cells(corrected.astype(np.float32))
    warns(adata, "I07", "non-integer counts")
    assert record(adata)["values"] == "counts that are not whole" and read_tokens(adata).vocabulary.unit == "log1p"
    fails(adata, "I07", "read counts", encoding="gene_bins")


# ---- containers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["bins", "rank", "binary", "gene_bins"])
def test_i09_negative_zero_and_i10_explicit_zeros(encoding: str):
    matrix = sparse.csr_matrix(np.ones_like(COUNTS))
    matrix.data[:] = np.where(COUNTS == 0, np.where(np.arange(30) % 2, np.float32(-0.0), 0), COUNTS).ravel()
    same(cells(matrix), tokens(cells(), encoding=encoding), encoding=encoding)


def test_i11_unsorted_and_duplicate_indices():
    matrix = sparse.csr_matrix(COUNTS)
    rows = [matrix[k] for k in range(12)]
    data = np.concatenate([[*row.data[::-1], 0.0, 2.0] for row in rows]).astype(np.float32)
    indices = np.concatenate([[*row.indices[::-1], 0, 0] for row in rows])
    messy = sparse.csr_matrix((data, indices, matrix.indptr + 2 * np.arange(13)), shape=COUNTS.shape)
    messy.has_canonical_format = messy.has_sorted_indices = True  # wrong flags must not be believed
    more = COUNTS.copy()
    more[:, 0] += 2
    same(cells(messy), tokens(cells(more)))
    np.testing.assert_array_equal(messy.indices, indices)


def set_x(adata: ad.AnnData, value) -> ad.AnnData:
    """Put something into X that anndata itself would not take."""
    if hasattr(adata, "_X"):
        adata._X = value
    else:  # from 0.13 on, X is the layer None
        adata.layers._data[None] = value
    return adata


def test_i13_other_kinds():
    for kind in (sparse.coo_matrix, sparse.coo_array, sparse.lil_matrix, sparse.dok_matrix):
        fails(set_x(cells(), kind(COUNTS)), "I13", kind.__name__, "csr_matrix(X)")
    for value in (COUNTS.tolist(), COUNTS[0]):
        fails(set_x(cells(), value), "I13", type(value).__name__, "csr_matrix(X)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy remarks on it
        fails(set_x(cells(), np.matrix(COUNTS)), "I13", "a matrix", "csr_matrix(X)")
    fails(ad.AnnData(COUNTS.astype(object), var=cells().var), "I13", "object", "astype")
    fails(ad.AnnData(COUNTS.astype(str), var=cells().var), "I13", "<U", "astype")
    fails(set_x(cells(), np.ma.masked_array(COUNTS, COUNTS > 3)), "I13", "filled")


def test_dask_chunked_along_genes():
    array = pytest.importorskip("dask.array")
    chunks = array.from_array(COUNTS, chunks=(5, 7))
    for matrix in (chunks, chunks.map_blocks(sparse.csr_matrix, dtype=COUNTS.dtype)):
        same(ad.AnnData(matrix, obs=cells().obs, var=cells().var))


def test_i18_views():
    adata, mask = cells(), np.arange(12) % 2 == 0
    view = adata[mask]
    tokenize(view, like=VOCABULARY)  # warnings are errors
    assert not view.is_view and "X_tokens" not in adata.obsm
    np.testing.assert_array_equal(view.obsm["X_tokens"].toarray(), EXPECTED[mask])
    done = tokenize(adata[mask], like=VOCABULARY, copy=True)
    np.testing.assert_array_equal(done.obsm["X_tokens"].toarray(), EXPECTED[mask])


def test_i43_index_types_and_damage():
    matrix = sparse.csr_matrix(COUNTS)
    matrix.indices, matrix.indptr = matrix.indices.astype(np.int64), matrix.indptr.astype(np.int64)
    same(cells(matrix))
    for name, place, value in (("indptr", 3, 10**6), ("indices", 5, 99), ("indices", 5, -1)):
        adata = cells(sparse.csr_matrix(COUNTS))
        getattr(adata.X, name)[place] = value
        fails(adata, "I43", "damaged")
    adata = cells(sparse.csc_matrix(COUNTS))
    adata.X.indices[5] = 99
    fails(adata, "I43", "damaged")


def test_i45_tokens_beyond_2_to_the_31(tmp_path):
    """Rows far out in arrays of 2^31 tokens, of which only the pages in use exist."""
    far, kinds = 2**31, [np.uint16, np.int32, np.uint16, np.int32]
    ids, places, *out = (
        np.memmap(tmp_path / f"{k}.bin", dtype=dtype, mode="w+", shape=(far + 10,)) for k, dtype in enumerate(kinds)
    )
    ids[far + 4 : far + 7], places[far + 4 : far + 7] = [7, 8, 9], [0, 1, 2]
    rows = [np.array(row, dtype=np.int64) for row in ([far + 1, far + 4], [far + 4], [3])]
    prefix = np.zeros((1, 0), dtype=np.uint32)
    over_rows(frame_rows, rows[0], (*rows[1:], ids, places, prefix, 0, -1), tuple(out))
    assert out[0][far + 1 : far + 4].tolist() == [7, 8, 9] and out[1][far + 1 : far + 4].tolist() == [0, 1, 2]


def test_i44_i45_offsets_are_64_bit():
    block = next(iter_blocks(cells()))
    assert block.indptr.dtype == np.int64
    encoder = Encoder(VOCABULARY, np.arange(30, dtype=np.int32), Reading("counts"))
    parts = [
        encoder.encode(Block(0, block.data[a:b], block.indices[a:b], np.array([0, b - a]), 30), np.zeros((1, 0), int))
        for a, b in zip(block.indptr, block.indptr[1:], strict=False)
    ]
    np.testing.assert_array_equal(sparse.vstack([part.tokens for part in parts]).toarray(), EXPECTED)


# ---- cells -----------------------------------------------------------------------------------------------------------


def test_i19_empty_cells_and_i57_mostly_empty_droplets():
    few = COUNTS.copy()
    few[[1, 4]] = 0
    adata = cells(few)
    out = warns(adata, "I19", "2 cells", "filter_cells", like=VOCABULARY)
    assert not out[[1, 4]].any()
    assert adata.obs["scbin_status"].iloc[[1, 4]].tolist() == ["empty", "empty"]
    few[1] = COUNTS[1]
    warns(cells(few), "I19", "1 cell has no counts at all")
    many = sparse.vstack([sparse.csr_matrix(COUNTS), sparse.csr_matrix((5000, 30), dtype=np.float32)], format="csr")
    out = warns(cells(many), "I19", "5,000 cells")
    assert (out[:12] > 0).any(axis=1).all()


def test_i20_no_gene_of_the_vocabulary():
    odd = COUNTS.copy()
    odd[3, :15] = 0
    adata = cells(odd)
    warns(adata, "I20", "1 cell", like=Vocabulary.build("bins", SYMBOLS[:15], bins=VOCABULARY.bins))
    assert adata.obs["scbin_status"].iloc[3] == "no_vocab_gene"


def test_i46_long_cells():
    adata = cells()
    assert (np.count_nonzero(tokens(adata, tokenization=Tokenization(max_length=10)), axis=1) <= 10).all()
    assert record(adata)["cut_cells"] == 12


def test_i47_one_cell_one_gene_and_i48_nothing():
    assert tokens(cells(COUNTS[:1])).shape[0] == 1
    assert tokens(cells(COUNTS[:, :1])).any() and tokens(cells(COUNTS[:1, :1]), encoding="rank").any()
    adata = cells(COUNTS[:0])
    fails(adata, "I47", "like=model")  # no cells, no vocabulary
    assert tokens(adata, like=VOCABULARY).shape == (0, VOCABULARY.n_positions)
    assert adata.obsm["X_tokens"].dtype == np.uint16
    assert list(adata.obs["scbin_status"].cat.categories) == ["ok", "empty", "no_vocab_gene"]
    fails(ad.AnnData(np.zeros((3, 0), dtype=np.float32)), "I48", "no genes")
    fails(ad.AnnData(obs=cells().obs, var=cells().var), "I48", "layer=")


@pytest.mark.parametrize("bad", [None, "a.h5ad", [1], pd.DataFrame()])
def test_i55_not_an_anndata(bad):
    with pytest.raises(ScbinTypeError, match="I55"):
        check_adata(bad)


# ---- genes -----------------------------------------------------------------------------------------------------------


def test_i22_duplicate_names():
    names = SYMBOLS.copy()
    names[9] = names[2]
    summed = COUNTS.copy()
    summed[:, 2] += summed[:, 9]
    kept = [k for k in range(30) if k != 9]
    for rule in ("counts", "linear"):
        expected = tokens(cells(summed[:, kept], names=[SYMBOLS[k] for k in kept]), rule=rule)
        for x in (COUNTS, LOGS):
            np.testing.assert_array_equal(warns(cells(x, names=names), "I22", repr(names[2]), rule=rule), expected)


@pytest.mark.parametrize("bad", [[3], [np.nan], [None], [""]])
def test_i25_names_that_are_no_text(bad: list):
    adata = cells()
    adata.var.index = pd.Index([*bad, *SYMBOLS[1:]], dtype=object)
    fails(adata, "I25", "var_names must be strings")


def test_i25_empty_ids_in_a_column():
    adata = cells()
    adata.var["id"] = ["", np.nan, *SYMBOLS[2:]]
    assert vocabulary_of(adata, gene_key="id").genes == tuple(SYMBOLS[2:])


def renamed(names: list[str]) -> Vocabulary:
    return Vocabulary.build("bins", names, bins=VOCABULARY.bins, depth=True)


def test_i26_versions():
    same(cells(names=[f"{name}.{k}" for k, name in enumerate(IDS)]), like=renamed(IDS))
    twins = clean_names(["ENSG00000000005.7", "ENSG00000000005.7_PAR_Y"])
    assert match_genes(twins).genes == ("ENSG00000000005", "ENSG00000000005_PAR_Y")


def test_symbols_and_aliases_through_a_map():
    ids = {"<pad>": 0, "<mask>": 1, **{gene: k + 2 for k, gene in enumerate(IDS)}}
    names = {s.lower(): i for s, i in zip(SYMBOLS, IDS, strict=True)}
    vocabulary = geneformer_vocabulary(ids, dict.fromkeys(IDS, 1.0), names)
    same(cells(), tokens(cells(names=IDS), like=vocabulary), like=vocabulary)
    fails(cells(names=[s.capitalize() for s in SYMBOLS]), "I31", "species", like=vocabulary)  # those of a mouse
    orf = geneformer_vocabulary({"<pad>": 0, "<mask>": 1, IDS[0]: 2}, {IDS[0]: 1.0}, {"C1ORF112": IDS[0]})
    assert match_genes(np.array(["C1orf112", "c1orf112"], dtype=object), orf).columns.tolist() == [0, -1]


def test_columns_are_those_that_were_tokenized():
    adata = cells(names=["GENEA0".capitalize(), *SYMBOLS[:29]])
    tokenize(adata, like=VOCABULARY)
    assert gene_names(adata, VOCABULARY).columns.tolist() == [*range(1, 30), -1]
    adata = cells(names=SYMBOLS[::-1])
    adata.var["turned"] = [*SYMBOLS[:29], None]
    tokenize(adata, like=VOCABULARY, gene_key="turned")
    assert gene_names(adata, VOCABULARY).columns.tolist() == [*range(29), -1]
    adata.var["turned"] = "other"  # no longer there: those that fit best
    assert gene_names(adata, VOCABULARY).columns.tolist() == list(range(30))[::-1]


def test_i31_no_overlap_and_i32_low_overlap():
    for names in ([f"OTHER{k}" for k in range(30)], IDS, [s.lower() for s in SYMBOLS], [f"c{k}" for k in range(30)]):
        fails(cells(names=names), "I31", names[0], "GENEA0", "species", "gene_key=", like=VOCABULARY)
    adata = cells(names=IDS)
    adata.var["symbol"] = SYMBOLS
    same(adata, like=VOCABULARY, gene_key="symbol")
    warns(cells(COUNTS[:, :18]), "I32", "of the counts", like=VOCABULARY)
    fails(cells(COUNTS[:, :3]), "I32", "force=True", like=VOCABULARY)
    warns(cells(COUNTS[:, :3]), "I32", like=VOCABULARY, tokenization=Tokenization(force=True))


def test_i33_other_features():
    adata = cells()
    adata.var["feature_types"] = ["Gene Expression"] * 25 + ["Antibody Capture"] * 5
    np.testing.assert_array_equal(warns(adata, "I33", "5 of the columns"), tokens(cells(COUNTS[:, :25])))
    np.testing.assert_array_equal(warns(adata[:, [0, 29]].copy(), "I33"), tokens(cells(COUNTS[:, :1])))


def test_genes_that_cannot_be_chosen():
    adata = cells()
    adata.var["mine"], adata.var["text"], adata.var["none"] = [k < 7 for k in range(30)], "yes", False
    for wrong in ("text", "none", "hvg"):
        fails(adata, "A06", repr(wrong), "Available: 'mine'", mask_var=wrong)
    fails(adata, "A02", "n_genes is 0", n_genes=0)
    assert vocabulary_of(adata, mask_var="mine").genes == tuple(SYMBOLS[:7])
    adata.var["holes"] = pd.array([True] * 7 + [None] * 23, dtype="boolean")
    assert vocabulary_of(adata, mask_var="holes").genes == tuple(SYMBOLS[:7])
    fails(cells(np.zeros((4, 5))), "V04", "empty", encoding="rank")
    fails(adata, "A03", "leave out", encoding="rank", mask_var="mine")
    fails(adata, "A03", "leave out", encoding="rank", rule="counts")


# ---- labels ----------------------------------------------------------------------------------------------------------


def test_i35_missing_column():
    fails(cells(obs={"cell_type": "T"}), "A06", "'cell_type'", phenotypes=["celltype"])
    fails(cells(), "A06", layer="nothing")
    fails(cells(), "A06", gene_key="nothing")


def test_i36_new_label():
    vocabulary = vocabulary_of(labelled(["a"] * 6 + ["b"] * 6), phenotypes=["kind"])
    out = warns(labelled(["a"] * 8 + ["new"] * 4), "I36", "'new' (4)", like=vocabulary)
    assert (out[8:, 1] == vocabulary.phenotypes[0].missing_id).all()


@pytest.mark.parametrize("missing", [np.nan, None, "", "unknown", "Unknown", " "])
def test_i37_missing_labels(missing):
    adata = labelled(pd.Series(["a"] * 6 + [missing] * 6, dtype=object).to_numpy())
    out, phenotype = tokens(adata, phenotypes=["kind"]), read_tokens(adata).vocabulary.phenotypes[0]
    assert phenotype.values == ("a",)
    assert (out[6:, 1] == phenotype.missing_id).all()


def test_i38_unused_categories_and_i51_string_dtype():
    values = ["a"] * 6 + ["b"] * 6
    expected = tokens(labelled(values), phenotypes="kind")
    same(labelled(pd.Categorical(values, categories=["z", "b", "a"])), expected, phenotypes="kind")
    same(labelled(pd.array(values, dtype="string")), expected, phenotypes="kind")


def test_i39_ages_of_new_data_are_cut_as_those_of_the_vocabulary():
    fine = {"phenotypes": ["development_stage"], "tokenization": Tokenization(age_groups=10)}
    stages = ["34-year-old human stage"] * 4 + ["third decade stage"] * 4 + ["adult stage"] * 4
    adata = cells(obs={"development_stage": stages})
    warns(adata, "I39", "'adult stage' (4)", **fine)
    vocabulary = Vocabulary.from_json(read_tokens(adata).vocabulary.to_json())
    assert (vocabulary.phenotype("age").values, vocabulary.phenotype("age").age_groups) == (("20-30", "30-40"), 10)
    new = cells(obs={"development_stage": ["29-year-old human stage"] * 6 + ["fourth decade stage"] * 6})
    out, first = tokens(new, like=vocabulary), vocabulary.phenotypes[0].first_id
    assert out[:, 1].tolist() == [first] * 6 + [first + 1] * 6
    numbers = cells(obs={"age": np.arange(12) * 6.5})  # classes are made of numbers, of any kind
    warns(numbers, "I39", "'0' (1)", "'6.5' (1)", phenotypes="age", tokenization=Tokenization(age_groups=10))
    assert read_tokens(numbers).vocabulary.phenotype("age").values[:2] == ("10-20", "20-30")
    fails(cells(obs={"age": "34", "development_stage": "x"}), "A03", "same", phenotypes=["age", "development_stage"])
    assert "age_groups" not in vocabulary_of(cells(obs={"age": list("ab") * 6}), phenotypes=["age"]).to_json()


def test_odd_labels():
    odd = ["a b", "a_b", "[MASK]", "x/y", "$z$", "ü"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScbinInputWarning)
        vocabulary = vocabulary_of(labelled(np.repeat(odd, 2)), phenotypes=["kind"])
    assert set(vocabulary.phenotypes[0].values) == set(odd)


@pytest.mark.parametrize(
    ("values", "expected"),
    [([1.0, 2.0] * 6, ("1", "2")), ([10, 9] * 6, ("9", "10")), ([True, False] * 6, ("False", "True"))],
)
def test_i42_numbers_as_labels(values, expected):
    assert vocabulary_of(labelled(values), phenotypes=["kind"]).phenotypes[0].values == expected
    fails(labelled(np.linspace(0, 1, 12)), "I42", "looks continuous", phenotypes=["kind"])


# ---- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("container", ["h5ad", "zarr"])
def test_i50_round_trip(tmp_path, container: str):
    adata = labelled(["CD4+/CD25 T Reg"] * 6 + ["b"] * 6)
    expected = tokens(adata, phenotypes=["kind"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr remarks on its own formats
        getattr(adata, f"write_{container}")(tmp_path / f"a.{container}")
        back = getattr(ad, f"read_{container}")(tmp_path / f"a.{container}")
    np.testing.assert_array_equal(read_tokens(back).matrix.toarray(), expected)
    assert read_tokens(back).vocabulary == read_tokens(adata).vocabulary
    assert back.obs["scbin_status"].tolist() == ["ok"] * 12


def test_i52_a_column_that_cannot_be_written(tmp_path):
    adata = cells(obs={"mine": pd.Series([(k, {k}) for k in range(12)], dtype=object).to_numpy()})
    same(adata)
    with pytest.raises(TypeError) as caught:  # from anndata, whose file it is
        adata.write_h5ad(tmp_path / "a.h5ad")
    assert "mine" in " ".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    del adata.obs["mine"]
    adata.write_h5ad(tmp_path / "a.h5ad")


def test_i53_tokens_that_are_of_another_width_or_type_or_unknown():
    adata = cells()
    tokenize(adata)
    kept = adata.obsm["X_tokens"]
    unknown = kept.copy()
    unknown.data[0] = 60_000
    for value in (np.ones(12), np.full(kept.shape, np.nan), kept.astype(np.float32), kept[:, :20], unknown):
        adata.obsm["X_tokens"] = value
        with pytest.raises(ScbinInputError, match="V02"):
            read_tokens(adata)


def test_i54_foreign_key_and_two_sets_of_tokens():
    adata = cells()
    adata.obsm["mine"] = np.zeros((12, 2))
    fails(adata, "A04", "key_added=", key_added="mine")
    for _ in range(2):
        tokenize(adata, encoding="rank", key_added="X_ranks")
        tokenize(adata)
    for key in ("", "a/b"):
        fails(adata, "A02", repr(key), key_added=key)
    assert read_tokens(adata, key="X_ranks").vocabulary.encoding == "rank"
    assert read_tokens(adata).vocabulary == VOCABULARY
    assert "tokenize_X_ranks" in adata.uns["scbin"]


# ---- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        *({"layer": 3}, {"gene_key": 3}, {"phenotypes": 3}, {"phenotypes": ["kind", 3]}, {"phenotypes": {"kind": 3}}),
        {"phenotypes": [["kind", "kind"]]},
        *({"n_genes": "x"}, {"n_genes": 10.5}, {"mask_var": 3}, {"rule": 3}, {"rule": ["a", "b"]}, {"key_added": 3}),
        *({"copy": 1}, {"tokenization": 3}, {"like": 3}),
    ],
    ids=str,
)
def test_arguments_of_another_type(arguments):
    fails(cells(obs={"kind": ["a"] * 12}), "A01", next(iter(arguments)), "pass ", **arguments)


@pytest.mark.parametrize(
    "fields",
    [
        {"n_bins": "x"},
        {"n_bins": 3.5},
        {"max_length": 10.5},
        {"force": "yes"},
        {"depth": "x"},
    ],
    ids=str,
)
def test_finer_choices_of_another_type(fields):
    with pytest.raises(ScbinTypeError, match=f"A01.*{next(iter(fields))}.*pass "):
        Tokenization(**fields)


def test_arguments_that_are_no_choice():
    for name in ("encoding", "values"):
        fails(cells(), "A02", f"{name} is 'nonsense'; choose one of", **{name: "nonsense"})
    for name in ("zeros", "layout", "age_groups"):
        with pytest.raises(ScbinInputError, match=f"A02.*{name} is 'nonsense'; choose one of"):
            Tokenization(**{name: "nonsense"})
    same(cells(), tokens(cells(), rule=[0.5, 5.0]), rule=np.array([0.5, 5.0]))  # edges in any sequence
    fails(cells(), "A02", "quantile_per_cell", rule="squares")
    with pytest.raises(ScbinInputError, match="A02.*n_bins is 0"):
        Tokenization(n_bins=0)
    with pytest.raises(ScbinInputError, match="A02.*max_length is 0"):
        Tokenization(max_length=0)
    assert vocabulary_of(cells(), tokenization=Tokenization(layout="geneformer_v1")).depth is not None  # of ranks alone
    same(cells(), tokens(cells(), rule=[0.5, 5.0]), rule=Bins(np.array([0.5, 5.0]), reads="log1p"))
    fails(cells(), "A03", "leave it out", like=VOCABULARY, encoding="rank")


def test_every_row_of_the_page_has_a_test():
    """docs/inputs.md lists the codes for users; every one is in the name of a test here or of the containers."""
    page = (Path(__file__).parents[2] / "docs" / "inputs.md").read_text()
    listed = {
        code
        for line in page.splitlines()
        if line.startswith("| I")
        for code in re.findall(r"I\d\d", line.split("|")[1])
    }
    names = " ".join(
        re.findall(
            r"def (test_\w+)", Path(__file__).read_text() + (Path(__file__).parent / "test_containers.py").read_text()
        )
    )
    assert [code for code in sorted(listed) if not re.search(rf"_{code.lower()}(_|\b)", names)] == []


# ---- check -----------------------------------------------------------------------------------------------------------


def test_check_reports_what_tokenize_would_do_and_changes_nothing(capsys):
    table = check(cells(LOGS - 0.5))
    assert table.loc[table["kind"] == "error", "code"].tolist() == ["I03"]
    assert "negative" in capsys.readouterr().out
    adata = cells()
    assert set(check(adata, like=VOCABULARY, quiet=True)["kind"]) == {"ok"}
    assert not len(adata.obsm) and not len(adata.uns) and not len(adata.obs.columns)
    for arguments, code in (({"quiet": 1}, "A01"), ({"layer": 3}, "A01"), ({"encoding": "no"}, "A02")):
        with pytest.raises(ScbinInputError) as caught:
            check(cells(), **arguments)
        assert caught.value.code == code
