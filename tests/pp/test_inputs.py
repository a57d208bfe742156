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

import scbin
from scbin._anndata import check_adata, raw_blocks, read_tokens
from scbin._errors import ScbinInputError, ScbinInputWarning, ScbinTypeError
from scbin._sparse import DiskRows
from scbin.encoding.encode import Encoder, joined_offsets
from scbin.encoding.genes import match_genes
from scbin.encoding.kernels import compact, frozen, over_rows
from scbin.encoding.values import Reading
from scbin.encoding.vocabulary import Vocabulary
from scbin.pp import check, iter_tokens, tokenize

COUNTS = np.random.default_rng(5).poisson(1.5, size=(12, 30)).astype(np.float32)
COUNTS[:, 0] += 1
DEPTH = COUNTS.sum(axis=1, keepdims=True)
LOGS = np.log1p(COUNTS / DEPTH * 1e4)
SYMBOLS = [f"GENE{chr(65 + k)}{k}" for k in range(30)]


def cells(x=COUNTS, *, names=None, obs=None, **kwargs) -> ad.AnnData:
    x = sparse.csr_matrix(x) if isinstance(x, np.ndarray) and x.dtype != object else x
    obs = pd.DataFrame(obs, index=[f"c{k}" for k in range(x.shape[0])])
    var = pd.DataFrame(index=pd.Index((names or SYMBOLS)[: x.shape[1]], dtype=object))
    return ad.AnnData(x, obs=obs, var=var, **kwargs)


def tokens(adata, **kwargs):
    tokenize(adata, **kwargs)
    return read_tokens(adata)[0].toarray()


def record(adata) -> dict:
    return json.loads(adata.uns["scbin"]["tokenize"])


EXPECTED = tokens(cells())
VOCABULARY = read_tokens(scbin.pp.tokenize(cells(), copy=True))[1]


def fails(adata, code: str, *words: str, **kwargs):
    before = list(adata.obsm) if isinstance(adata, ad.AnnData) else []
    with pytest.raises(ScbinInputError) as caught:
        tokenize(adata, **kwargs)
    assert caught.value.code == code, str(caught.value)
    for word in words:
        assert word in str(caught.value)
    assert not isinstance(adata, ad.AnnData) or list(adata.obsm) == before


def warns(adata, code: str, *words: str, **kwargs) -> np.ndarray:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = tokens(adata, **kwargs)
    found = {w.message.code: str(w.message) for w in caught if isinstance(w.message, ScbinInputWarning)}
    assert code in found, found
    for word in words:
        assert word in found[code]
    return out


def test_i01_log1p():
    adata = cells(LOGS, layers={"counts": sparse.csr_matrix(COUNTS)})
    np.testing.assert_array_equal(tokens(adata), EXPECTED)
    assert record(adata)["values"] == "log1p"
    assert record(adata)["target_sum"] == 10_000


@pytest.mark.parametrize("base", [2, 10])
def test_i01_other_bases(base: int):
    adata = cells((LOGS / np.log(base)).astype(np.float32))
    np.testing.assert_array_equal(tokens(adata), EXPECTED)
    assert record(adata)["base"] == base


def test_i01_line_names_counts_layer(caplog):
    caplog.set_level(logging.INFO)
    tokenize(cells(LOGS, layers={"counts": sparse.csr_matrix(COUNTS)}))
    assert "layers['counts'] holds counts" in caplog.text


def test_i01_by_range_only():
    noise = np.abs(np.random.default_rng(0).normal(size=COUNTS.shape)).astype(np.float32)
    warns(cells(noise), "I01", "by its range only", 'values="log1p"')
    tokenize(cells(noise), values="log1p")  # warnings are errors


def test_i01_by_note_in_uns():
    noise = np.abs(np.random.default_rng(0).normal(size=COUNTS.shape)).astype(np.float32)
    adata = cells(noise, uns={"log1p": {"base": None}})
    tokenize(adata)
    assert "by uns" in record(adata)["text"]


def test_i01_counts_despite_note():
    adata = cells(uns={"log1p": {"base": None}})
    np.testing.assert_array_equal(tokens(adata), EXPECTED)


def test_i01_another_sum_than_the_models():
    logs = np.log1p(COUNTS / DEPTH * 500).astype(np.float32)
    warns(cells(logs), "I01", "normalised to 500", "10,000", like=VOCABULARY)


def test_i01_count_bins_on_logs():
    fails(cells(LOGS), "I01", "reads counts", encoding="gene_bins")


@pytest.mark.parametrize("target", [1e4, 1e6])
def test_i02_normalised_not_logged(target: float):
    fails(cells((COUNTS / DEPTH * target).astype(np.float32)), "I02", "sc.pp.log1p")


def test_i02_square_roots():
    fails(cells(np.sqrt(COUNTS)), "I02", "square roots")


def test_i03_scaled():
    scaled = (LOGS - LOGS.mean(axis=0)) / (LOGS.std(axis=0) + 1)
    adata = cells(scaled, layers={"counts": sparse.csr_matrix(COUNTS)})
    fails(adata, "I03", f"{(scaled < 0).sum():,} negative", "sc.pp.scale", "cell 'c", 'layer="counts"')
    np.testing.assert_array_equal(tokens(adata, layer="counts"), EXPECTED)


def test_i04_negative_counts():
    bad = COUNTS.copy()
    bad[2, 3] = -2
    fails(cells(bad), "I04", "cell 'c2', gene 'GENED3': -2", "original counts")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("values", ["auto", "counts", "log1p"])
def test_i05_not_finite(value: float, values: str):
    bad = COUNTS.copy()
    bad[2, 3] = value
    fails(cells(bad), "I05", "cell 'c2', gene 'GENED3'", values=values)


@pytest.mark.parametrize("dtype", ["float64", "float32", "int64", "int32", "uint16", "uint8", "bool"])
def test_i06_value_types(dtype: str):
    expected = EXPECTED if dtype != "bool" else tokens(cells((COUNTS > 0).astype(np.float32)))
    np.testing.assert_array_equal(tokens(cells(COUNTS.astype(dtype))), expected)


@pytest.mark.parametrize("dtype", [">f4", "float16"])
def test_i06_value_types_that_only_dense_arrays_have(dtype: str):
    np.testing.assert_array_equal(tokens(ad.AnnData(COUNTS.astype(dtype), var=cells().var)), EXPECTED)


def test_i06_large_counts_do_not_wrap():
    big = COUNTS.copy()
    big[0, 1] = 70_000
    adata = cells(big.astype(np.int64))
    row = tokens(adata, encoding="rank")[0]
    _, vocabulary = read_tokens(adata)
    key = big[0] / np.asarray(vocabulary.medians)
    assert vocabulary.genes[row[2] - vocabulary.first_gene_id] == SYMBOLS[int(np.argmax(key))]


def test_i07_ambient_corrected():
    corrected = np.where(COUNTS > 0, COUNTS * 20 + np.random.default_rng(0).random(COUNTS.shape), 0)
    adata = cells(corrected.astype(np.float32))
    warns(adata, "I07", "non-integer counts")
    assert record(adata)["values"] == "counts"
    fails(adata, "I07", "reads counts", encoding="gene_bins")


def test_i08_too_large():
    big = COUNTS.copy()
    big[1, 1] = 2e6
    warns(cells(big), "I08")
    big[1, 1] = 1e30
    fails(cells(big), "I08", "1e+30")


def test_i09_negative_zero():
    odd = np.where(COUNTS == 0, np.float32(-0.0), COUNTS)
    matrix = sparse.csr_matrix(np.ones_like(odd))
    matrix.data[:] = odd.ravel()
    np.testing.assert_array_equal(tokens(cells(matrix)), EXPECTED)


@pytest.mark.parametrize("encoding", ["bins", "rank", "binary", "gene_bins"])
def test_i10_explicit_zeros(encoding: str):
    matrix = sparse.csr_matrix(np.ones_like(COUNTS))
    matrix.data[:] = COUNTS.ravel()
    np.testing.assert_array_equal(tokens(cells(matrix), encoding=encoding), tokens(cells(), encoding=encoding))


def test_i11_unsorted_and_duplicate_indices():
    matrix = sparse.csr_matrix(COUNTS)
    data, indices, indptr = [], [], [0]
    for k in range(len(COUNTS)):
        row = matrix[k]
        data += [*row.data[::-1], 0.0, 2.0]
        indices += [*row.indices[::-1], 0, 0]
        indptr.append(len(data))
    messy = sparse.csr_matrix((np.array(data, dtype=np.float32), indices, indptr), shape=COUNTS.shape)
    messy.has_canonical_format = True  # a wrong flag must not be believed
    messy.has_sorted_indices = True
    more = COUNTS.copy()
    more[:, 0] += 2
    before = messy.indices.copy()
    np.testing.assert_array_equal(tokens(cells(messy)), tokens(cells(more)))
    np.testing.assert_array_equal(messy.indices, before)


def test_i12_csc():
    np.testing.assert_array_equal(tokens(cells(sparse.csc_matrix(COUNTS))), EXPECTED)


def test_i12_csc_on_disk_is_noted(tmp_path, caplog):
    cells(sparse.csc_matrix(COUNTS)).write_h5ad(tmp_path / "a.h5ad")
    adata = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    caplog.set_level(logging.INFO)
    np.testing.assert_array_equal(tokens(adata), EXPECTED)
    assert "CSR is faster" in caplog.text
    adata.file.close()


def test_i13_other_kinds():
    adata = cells()
    objects = ad.AnnData(COUNTS.astype(object), obs=adata.obs, var=adata.var)
    fails(objects, "I13", "object", "astype")
    adata = cells()
    adata.layers["m"] = np.ma.masked_array(COUNTS, COUNTS > 3)
    if isinstance(adata.layers["m"], np.ma.MaskedArray):  # as anndata keeps it
        fails(adata, "I13", "filled", layer="m")


def set_x(adata: ad.AnnData, value) -> None:
    """Put something into X that anndata itself would not take."""
    if hasattr(adata, "_X"):
        adata._X = value
    else:  # from 0.13 on, X is the layer None
        adata.layers._data[None] = value


@pytest.mark.parametrize("kind", [sparse.coo_matrix, sparse.coo_array, sparse.lil_matrix, sparse.dok_matrix])
def test_i13_other_sparse_formats(kind):
    with pytest.raises(ValueError, match="CSR"):  # anndata itself refuses them
        ad.AnnData(kind(COUNTS))
    adata = cells()
    set_x(adata, kind(COUNTS))  # should one get past it
    fails(adata, "I13", f"sparse {kind(COUNTS).format}", "csr_matrix(X)")


@pytest.mark.parametrize("value", [COUNTS.tolist(), COUNTS[0]], ids=["list", "one row"])
def test_i13_no_matrix(value):
    adata = cells()
    set_x(adata, value)
    fails(adata, "I13", type(value).__name__, "csr_matrix(X)")


def test_i13_numpy_matrix_and_lists():
    adata = cells()
    adata.X = COUNTS.tolist()  # anndata makes arrays of both
    np.testing.assert_array_equal(tokens(adata), EXPECTED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy and anndata both remark on it
        adata.layers["m"] = np.matrix(COUNTS)
        np.testing.assert_array_equal(tokens(adata, layer="m"), EXPECTED)
        set_x(adata, np.matrix(COUNTS))
        fails(adata, "I13", "numpy matrix", "np.asarray(X)")


def test_i13_text():
    fails(ad.AnnData(COUNTS.astype(str), var=cells().var), "I13", "<U", "astype")


def test_i14_csr_array():
    np.testing.assert_array_equal(tokens(cells(sparse.csr_array(COUNTS))), EXPECTED)


@pytest.mark.parametrize("order", ["C", "F"])
def test_i15_dense(order: str):
    adata = ad.AnnData(np.array(COUNTS, order=order), obs=cells().obs, var=cells().var)
    np.testing.assert_array_equal(tokens(adata), EXPECTED)


def test_i16_dask_chunked_along_genes():
    array = pytest.importorskip("dask.array")
    adata = ad.AnnData(array.from_array(COUNTS, chunks=(5, 7)), obs=cells().obs, var=cells().var)
    fails(adata, "I16", "rechunk((1000, -1))")


def test_i17_backed_line(tmp_path, caplog):
    cells().write_h5ad(tmp_path / "a.h5ad")
    adata = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    caplog.set_level(logging.INFO)
    np.testing.assert_array_equal(tokens(adata), EXPECTED)
    assert "until adata.write" in caplog.text
    adata.file.close()


def test_i18_views():
    adata = cells()
    mask = np.arange(12) % 2 == 0
    view = adata[mask]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenize(view, like=VOCABULARY)
    assert not view.is_view
    assert "X_tokens" not in adata.obsm
    np.testing.assert_array_equal(view.obsm["X_tokens"].toarray(), EXPECTED[mask])
    done = tokenize(adata[mask], like=VOCABULARY, copy=True)
    np.testing.assert_array_equal(done.obsm["X_tokens"].toarray(), EXPECTED[mask])


def test_i19_empty_cells():
    sparse_cells = COUNTS.copy()
    sparse_cells[[1, 4]] = 0
    adata = cells(sparse_cells)
    out = warns(adata, "I19", "2 cells", "'c1', 'c4'", "filter_cells", like=VOCABULARY)
    assert not out[[1, 4]].any()
    assert adata.obs["scbin_status"].iloc[[1, 4]].tolist() == ["empty", "empty"]


def test_i20_no_gene_of_the_vocabulary():
    vocabulary = Vocabulary.build("bins", SYMBOLS[:15], bins=VOCABULARY.bins)
    odd = COUNTS.copy()
    odd[3, :15] = 0
    adata = cells(odd)
    warns(adata, "I20", "'c3'", like=vocabulary)
    assert adata.obs["scbin_status"].iloc[3] == "no_vocab_gene"


def test_i21_gene_zero_everywhere():
    none = COUNTS.copy()
    none[:, 7] = 0
    adata = cells(none)
    tokenize(adata)
    assert record(adata)["genes_zero"] == 1


def test_i22_duplicate_names():
    names = SYMBOLS.copy()
    names[9] = names[2]
    summed = COUNTS.copy()
    summed[:, 2] += summed[:, 9]
    kept = [k for k in range(30) if k != 9]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata = cells(names=names)
    expected = tokens(cells(summed[:, kept], names=[SYMBOLS[k] for k in kept]))
    np.testing.assert_array_equal(warns(adata, "I22", repr(names[2])), expected)
    fails(adata, "I22", 'duplicates="sum"', duplicates="error")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logged = cells(LOGS, names=names)
    np.testing.assert_array_equal(warns(logged, "I22"), expected)


def test_i23_made_unique():
    names = SYMBOLS.copy()
    names[9] = names[2] + "-1"
    out = warns(cells(names=names), "I23", repr(names[9]))
    assert out.shape[1] == EXPECTED.shape[1] - 1
    vocabulary = Vocabulary.build("bins", names, bins=VOCABULARY.bins)  # here GENE-1 is a gene of its own
    tokenize(cells(names=names), like=vocabulary)  # warnings are errors


def test_i24_duplicate_cells():
    adata = cells()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata.obs_names = ["same"] * 12
    np.testing.assert_array_equal(warns(adata, "I24"), EXPECTED)


@pytest.mark.parametrize("bad", [[3], [np.nan], [None], [""]])
def test_i25_names_that_are_no_text(bad: list):
    adata = cells()
    adata.var.index = pd.Index([*bad, *SYMBOLS[1:]], dtype=object)
    fails(adata, "I25", "var_names must be strings")


def test_i25_empty_ids_in_a_column():
    adata = cells()
    adata.var["id"] = ["", np.nan, *SYMBOLS[2:]]
    tokenize(adata, gene_key="id")
    assert read_tokens(adata)[1].genes == tuple(SYMBOLS[2:])


def test_i26_versions():
    ids = [f"ENSG{k:011d}" for k in range(30)]
    plain = Vocabulary.build("bins", ids, bins=VOCABULARY.bins)
    out = tokens(cells(names=[f"{name}.{k}" for k, name in enumerate(ids)]), like=plain)
    np.testing.assert_array_equal(out, EXPECTED)
    twins = ["ENSG00000000005.7", "ENSG00000000005.7_PAR_Y"]
    assert match_genes([scbin.encoding.genes.strip_version(name) for name in twins]).genes == (
        "ENSG00000000005",
        "ENSG00000000005_PAR_Y",
    )


def test_i27_species():
    human = Vocabulary.build("bins", [f"ENSG{k:011d}" for k in range(30)], bins=VOCABULARY.bins)
    fails(cells(names=[f"ENSMUSG{k:011d}" for k in range(30)]), "I27", "mouse", "human", like=human)
    symbols = ["CD3E", "CD4", "GAPDH", "ACTB", "MALAT", "FOXP", "LYZ", "NKG", "GNLY", "CST", "PTPRC", "MS4A"]
    human = Vocabulary.build("bins", symbols, bins=VOCABULARY.bins)
    fails(cells(COUNTS[:, :12], names=[s.title() for s in symbols]), "I27", "mouse", like=human)


def test_i28_case():
    fails(cells(names=[s.lower() for s in SYMBOLS]), "I28", 'case="upper"', like=VOCABULARY)
    out = tokens(cells(names=[s.lower() for s in SYMBOLS]), like=VOCABULARY, case="upper")
    np.testing.assert_array_equal(out, EXPECTED)


def geneformer_like(genes: list[str], names: dict[str, str]) -> Vocabulary:
    ids = {"<pad>": 0, "<mask>": 1, **{gene: k + 2 for k, gene in enumerate(genes)}}
    return Vocabulary.from_geneformer(ids, dict.fromkeys(genes, 1.0), names)


def test_i29_aliases_and_i30_symbols_through_a_map(caplog):
    ids = [f"ENSG{k:011d}" for k in range(30)]
    vocabulary = geneformer_like(ids, {s.lower(): i for s, i in zip(SYMBOLS, ids, strict=True)})
    caplog.set_level(logging.INFO)
    np.testing.assert_array_equal(tokens(cells(), like=vocabulary), tokens(cells(names=ids), like=vocabulary))
    assert "map of symbols" in caplog.text


def test_i30_symbols_without_a_map():
    ids = [f"ENSG{k:011d}" for k in range(30)]
    adata = cells()
    adata.var["ensembl_id"] = ids
    vocabulary = Vocabulary.build("bins", ids, bins=VOCABULARY.bins)
    fails(adata, "I30", "symbols", "Ensembl ids", "gene_key='ensembl_id'", like=vocabulary)
    np.testing.assert_array_equal(tokens(adata, like=vocabulary, gene_key="ensembl_id"), EXPECTED)


def test_i31_no_overlap():
    fails(cells(names=[f"OTHER{k}" for k in range(30)]), "I31", "OTHER0", "GENEA0", like=VOCABULARY)


def test_i32_low_overlap():
    warns(cells(COUNTS[:, :18], names=SYMBOLS), "I32", "of the counts", like=VOCABULARY)
    few = cells(COUNTS[:, :3], names=SYMBOLS)
    fails(few, "I32", "force=True", like=VOCABULARY)
    warns(few, "I32", like=VOCABULARY, force=True)


def test_i33_other_features():
    adata = cells()
    kinds = ["Gene Expression"] * 25 + ["Antibody Capture"] * 5
    adata.var["feature_types"] = kinds
    out = warns(adata, "I33", "5 columns")
    np.testing.assert_array_equal(out, tokens(cells(COUNTS[:, :25])))


def test_i34_transposed():
    fails(cells().T.copy(), "I34", "adata.T", like=VOCABULARY)


def test_i35_missing_column():
    fails(cells(obs={"cell_type": "T"}), "I35", "'cell_type'", phenotypes=["celltype"])
    fails(cells(), "I35", layer="nothing")
    fails(cells(), "I35", gene_key="nothing")


def labelled(values) -> ad.AnnData:
    return cells(obs={"kind": values})


def test_i36_new_label():
    adata = labelled(["a"] * 6 + ["b"] * 6)
    tokenize(adata, phenotypes=["kind"])
    vocabulary = read_tokens(adata)[1]
    out = warns(labelled(["a"] * 8 + ["new"] * 4), "I36", "'new' (4 cells)", like=vocabulary)
    assert (out[8:, 1] == vocabulary.phenotypes[0].missing_id).all()


@pytest.mark.parametrize("missing", [np.nan, None, "", "unknown", "Unknown", " "])
def test_i37_missing_labels(missing):
    adata = labelled(pd.Series(["a"] * 6 + [missing] * 6, dtype=object).to_numpy())
    out = tokens(adata, phenotypes=["kind"])
    phenotype = read_tokens(adata)[1].phenotypes[0]
    assert phenotype.values == ("a",)
    assert (out[6:, 1] == phenotype.missing_id).all()


def test_i38_unused_categories():
    plain = labelled(["a"] * 6 + ["b"] * 6)
    extra = labelled(pd.Categorical(["a"] * 6 + ["b"] * 6, categories=["z", "b", "a"]))
    np.testing.assert_array_equal(tokens(plain, phenotypes="kind"), tokens(extra, phenotypes="kind"))


def test_i39_ages():
    stages = ["34-year-old human stage"] * 4 + ["third decade stage"] * 4 + ["adult stage"] * 4
    adata = cells(obs={"development_stage": stages})
    warns(adata, "I39", "'adult stage' (4)", phenotypes=["development_stage"], age_groups=10)
    assert read_tokens(adata)[1].phenotypes[0].values == ("20-30", "30-40")
    assert read_tokens(adata)[1].phenotypes[0].name == "age"


def test_i39_ages_of_new_data_are_cut_as_those_of_the_vocabulary():
    adata = cells(obs={"development_stage": ["34-year-old human stage"] * 6 + ["25-year-old stage"] * 6})
    tokenize(adata, phenotypes=["development_stage"], age_groups=10)
    vocabulary = Vocabulary.from_json(read_tokens(adata)[1].to_json())
    assert vocabulary.phenotype("age").age_groups == 10
    new = cells(obs={"development_stage": ["29-year-old human stage"] * 6 + ["fourth decade stage"] * 6})
    out = tokens(new, like=vocabulary)
    first = vocabulary.phenotypes[0].first_id
    assert out[:, 1].tolist() == [first] * 6 + [first + 1] * 6
    parts = [part.toarray() for part in iter_tokens(new, like=vocabulary)]
    np.testing.assert_array_equal(np.vstack(parts), out)
    as_text = cells(obs={"age": ["a"] * 6 + ["b"] * 6})
    tokenize(as_text, phenotypes=["age"])
    assert "age_groups" not in read_tokens(as_text)[1].to_json()


def test_i40_rare_label():
    warns(labelled(["a"] * 10 + ["b"] * 2), "I40", "'b' (2)", phenotypes=["kind"])


def test_i41_odd_labels():
    odd = ["a b", "a_b", "[MASK]", "x/y", "$z$", "ü"]
    adata = labelled(np.repeat(odd, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScbinInputWarning)
        tokenize(adata, phenotypes=["kind"])
    assert set(read_tokens(adata)[1].phenotypes[0].values) == set(odd)
    fails(labelled(["x" * 600] * 12), "I41", "600", phenotypes=["kind"])


@pytest.mark.parametrize(
    ("values", "expected"),
    [([1.0, 2.0] * 6, ("1", "2")), ([10, 9] * 6, ("9", "10")), ([True, False] * 6, ("False", "True"))],
)
def test_i42_numbers_as_labels(values, expected):
    adata = labelled(values)
    tokenize(adata, phenotypes=["kind"])
    assert read_tokens(adata)[1].phenotypes[0].values == expected


def test_i42_continuous():
    fails(labelled(np.linspace(0, 1, 12)), "I42", "looks continuous", phenotypes=["kind"])


def test_i43_index_types_and_damage():
    matrix = sparse.csr_matrix(COUNTS)
    matrix.indices, matrix.indptr = matrix.indices.astype(np.int64), matrix.indptr.astype(np.int64)
    np.testing.assert_array_equal(tokens(cells(matrix)), EXPECTED)
    for damage in ("indptr", "column", "negative"):
        broken = sparse.csr_matrix(COUNTS)
        adata = cells(broken)
        if damage == "indptr":
            adata.X.indptr[3] = 10**6
        else:
            adata.X.indices[5] = 99 if damage == "column" else -1
        fails(adata, "I43", "damaged")


def test_i44_a_block_that_starts_beyond_2_to_the_31(tmp_path):
    """A file with 2^31 more stored values than it has room for on disk: the chunks of the first cell do not exist."""
    h5py = pytest.importorskip("h5py")
    few = sparse.csr_matrix(COUNTS)
    path, far = tmp_path / "a.h5ad", 2**31
    more = cells(np.vstack([COUNTS[:1], COUNTS]))
    more.write_h5ad(path)
    with h5py.File(path, "r+") as file:
        group = file["X"]
        for name, values in (("data", few.data), ("indices", few.indices)):
            del group[name]
            stored = group.create_dataset(name, (far + few.nnz,), dtype=values.dtype, chunks=(65_536,))
            stored[far:] = values
        del group["indptr"]
        group["indptr"] = np.concatenate([[0], far + few.indptr.astype(np.int64)])
    assert path.stat().st_size < 2**22
    adata = ad.read_h5ad(path, backed="r")
    with DiskRows(adata.X.group) as rows:
        assert rows.n_stored == far + few.nnz
        found = rows.read(int(rows.indptr[1]), int(rows.indptr[-1]))
        np.testing.assert_array_equal(found[0], few.data)
        np.testing.assert_array_equal(found[1], few.indices)
        assert not rows.read(far - 70_000, far)[0].any()  # nothing is stored there: the library fills in zeros
    adata.file.close()


def test_i45_tokens_beyond_2_to_the_31(tmp_path):
    """Rows far out in arrays of 2^31 tokens, of which only the pages in use exist."""
    far = 2**31
    arrays = [
        np.memmap(tmp_path / f"{k}.bin", dtype=dtype, mode="w+", shape=(far + 10,))
        for k, dtype in enumerate([np.uint16, np.int32, np.uint16, np.int32])
    ]
    ids, positions, out_ids, out_positions = arrays
    ids[far + 4 : far + 7], positions[far + 4 : far + 7] = [7, 8, 9], [0, 1, 2]
    rows = (np.array([far + 1, far + 4]), np.array([far + 4]), np.array([3]))
    over_rows(compact, *(frozen(row.astype(np.int64)) for row in rows), frozen(ids), frozen(positions), *arrays[2:])
    assert out_ids[far + 1 : far + 4].tolist() == [7, 8, 9]
    assert out_positions[far + 1 : far + 4].tolist() == [0, 1, 2]
    assert joined_offsets([np.array([0, far, far + 2]), np.array([0, 5])]).tolist() == [0, far, far + 2, far + 7]


def test_i44_i45_offsets_are_64_bit():
    block = next(raw_blocks(cells()))
    assert block.indptr.dtype == np.int64
    encoder = Encoder(VOCABULARY, np.arange(30, dtype=np.int32), Reading("counts"))
    phenotypes = np.zeros((12, 0), dtype=np.int64)
    assert encoder.encode(block.data, block.indices, block.indptr, phenotypes).tokens.shape == (12, 33)


def test_i46_long_cells():
    adata = cells()
    out = tokens(adata, max_length=10)
    assert (np.count_nonzero(out, axis=1) <= 10).all()
    assert record(adata)["cut_cells"] == 12
    assert 0 < record(adata)["cut_share"] < 1


def test_i47_one_cell_one_gene():
    assert tokens(cells(COUNTS[:1])).shape[0] == 1
    assert tokens(cells(COUNTS[:, :1])).any()
    assert tokens(cells(COUNTS[:1, :1]), encoding="rank").any()


def test_i48_nothing():
    adata = cells(COUNTS[:0])
    fails(adata, "E09", "like=model")  # no cells, no vocabulary
    assert tokens(adata, like=VOCABULARY).shape == (0, 33)
    assert adata.obsm["X_tokens"].dtype == np.uint16
    assert list(adata.obs["scbin_status"].cat.categories) == ["ok", "empty", "no_vocab_gene"]
    fails(ad.AnnData(np.zeros((3, 0), dtype=np.float32)), "I48", "no genes")
    fails(ad.AnnData(obs=cells().obs, var=cells().var), "I48", "layer=")


def test_i49_raw_is_suggested_not_used(caplog):
    adata = cells(LOGS)
    adata.raw = cells()
    caplog.set_level(logging.INFO)
    tokenize(adata[:, :10].copy())
    assert "adata.raw.to_adata()" in caplog.text


@pytest.mark.parametrize("container", ["h5ad", "zarr"])
def test_i50_round_trip(tmp_path, container: str):
    adata = labelled(["CD4+/CD25 T Reg"] * 6 + ["b"] * 6)
    expected = tokens(adata, phenotypes=["kind"])
    path = tmp_path / f"a.{container}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr remarks on its own formats
        getattr(adata, f"write_{container}")(path)
        back = getattr(ad, f"read_{container}")(path)
    out, vocabulary = read_tokens(back)
    np.testing.assert_array_equal(out.toarray(), expected)
    assert vocabulary == read_tokens(adata)[1]
    assert back.obs["scbin_status"].tolist() == ["ok"] * 12


def test_i51_string_dtype():
    adata = labelled(["a"] * 6 + ["b"] * 6)
    expected = tokens(adata, phenotypes=["kind"])
    adata.obs["kind"] = adata.obs["kind"].astype("string")
    np.testing.assert_array_equal(tokens(adata, phenotypes=["kind"]), expected)


def test_i52_a_column_that_cannot_be_written(tmp_path):
    adata = cells(obs={"mine": pd.Series([(k, {k}) for k in range(12)], dtype=object).to_numpy()})
    np.testing.assert_array_equal(tokens(adata), EXPECTED)
    with pytest.raises(TypeError) as caught:  # from anndata, whose file it is
        adata.write_h5ad(tmp_path / "a.h5ad")
    assert "mine" in " ".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    del adata.obs["mine"]
    adata.write_h5ad(tmp_path / "a.h5ad")


@pytest.mark.parametrize("value", [np.ones(12), np.full((12, 33), np.nan), np.ones((12, 33), dtype=np.float32)])
def test_i53_tokens_that_are_one_dimensional_or_not_whole(value):
    adata = cells()
    tokenize(adata)
    adata.obsm["X_tokens"] = value
    with pytest.raises(ScbinInputError, match=r"T04.*column.* of float"):
        read_tokens(adata)


@pytest.mark.parametrize(("value", "code"), [(np.ones(12), "I53"), (np.full((12, 3), np.nan), "P02")])
def test_i53_an_embedding_that_is_one_dimensional_or_has_no_numbers(value, code: str):
    adata = cells()
    adata.obsm["X_scbin"] = value
    with pytest.raises(ScbinInputError, match=code):
        scbin.pl.embedding(adata)


def test_i54_foreign_key():
    adata = cells()
    adata.obsm["mine"] = np.zeros((12, 2))
    fails(adata, "I54", "key_added=", key_added="mine")
    tokenize(adata, key_added="fresh")
    tokenize(adata, key_added="fresh")
    tokenize(adata)
    tokenize(adata)
    for key in ("X_scbin", "X_scbin_2", "X_umap_scbin"):
        fails(adata, "A04", "embeddings", key_added=key)
    for key in ("", "a/b"):
        fails(adata, "A03", repr(key), key_added=key)


def test_two_sets_of_tokens_have_two_vocabularies():
    adata = cells()
    tokenize(adata, encoding="rank", key_added="X_ranks")
    tokenize(adata)
    assert read_tokens(adata, key="X_ranks")[1].encoding == "rank"
    assert read_tokens(adata)[1] == VOCABULARY
    assert json.loads(adata.uns["scbin"]["tokenize_X_ranks"])["encoding"] == "rank"


@pytest.mark.parametrize(
    "arguments",
    [
        {"layer": 3},
        {"gene_key": 3},
        {"phenotypes": 3},
        {"phenotypes": ["kind", 3]},
        {"phenotypes": {"kind": 3}},
        {"n_genes": "x"},
        {"n_genes": 10.5},
        {"n_bins": "x"},
        {"n_bins": 3.5},
        {"threshold": "x"},
        {"mask_var": 3},
        {"bins": 3},
        {"bins": ["a", "b"]},
        {"max_length": 10.5},
        {"medians": [1, 2]},
        {"force": "yes"},
        {"key_added": 3},
        {"copy": 1},
    ],
    ids=str,
)
def test_arguments_of_another_type(arguments):
    fails(cells(obs={"kind": ["a"] * 12}), "A01", next(iter(arguments)), "pass ", **arguments)


@pytest.mark.parametrize("name", ["encoding", "values", "zeros", "layout", "age_groups", "case", "duplicates"])
def test_arguments_that_are_no_choice(name: str):
    fails(cells(), "A02", f"{name} is 'nonsense'; choose one of", **{name: "nonsense"})


def test_check_refuses_what_tokenize_refuses():
    for arguments, code in (({"quiet": 1}, "A01"), ({"layer": 3}, "A01"), ({"encoding": "no"}, "A02")):
        with pytest.raises(ScbinInputError) as caught:
            check(cells(), **arguments)
        assert caught.value.code == code


def test_one_of_a_thing_is_not_called_many():
    bad = COUNTS.copy()
    bad[2, 3] = np.nan
    fails(cells(bad), "I05", "1 value that is not finite")
    bad[2, 3] = -1
    fails(cells(bad), "I04", "1 value below 0")
    none = COUNTS.copy()
    none[4] = 0
    warns(cells(none), "I19", "1 cell has no counts at all ('c4'); it keeps its row")
    kinds = ["Gene Expression"] * 29 + ["Antibody Capture"]
    adata = cells()
    adata.var["feature_types"] = kinds
    warns(adata, "I33", "1 column is not 'Gene Expression'", "was left out")
    warns(labelled(["a"] * 11 + ["b"]), "I40", "there is 1 label of 'kind'", phenotypes=["kind"])


def test_every_row_of_the_page_has_a_test():
    """docs/inputs.md lists the codes for users; every one is the name of a test here."""
    page = (Path(__file__).parents[2] / "docs" / "inputs.md").read_text()
    rows = [re.findall(r"I\d\d", line.split("|")[1]) for line in page.splitlines() if line.startswith("| I")]
    listed = [code for row in rows for code in row]
    assert listed == [f"I{k:02d}" for k in range(1, 58)]
    names = " ".join(name for name in globals() if name.startswith("test_"))
    assert [code for code in listed if not re.search(rf"_{code.lower()}(_|\b)", names)] == []


@pytest.mark.parametrize("bad", [None, "a.h5ad", [1], pd.DataFrame()])
def test_i55_not_an_anndata(bad):
    with pytest.raises(ScbinTypeError) as caught:
        check_adata(bad)
    assert caught.value.code == "I55"
    assert isinstance(caught.value, TypeError)


def test_i56_read_only(tmp_path):
    matrix = sparse.csr_matrix(COUNTS)
    for part in (matrix.data, matrix.indices, matrix.indptr):
        part.setflags(write=False)
    np.testing.assert_array_equal(tokens(cells(matrix)), EXPECTED)
    np.save(tmp_path / "x.npy", COUNTS)
    adata = cells()
    adata.X = np.load(tmp_path / "x.npy", mmap_mode="r")
    np.testing.assert_array_equal(tokens(adata), EXPECTED)


def test_i57_mostly_empty_droplets():
    many = sparse.vstack([sparse.csr_matrix(COUNTS), sparse.csr_matrix((5000, 30), dtype=np.float32)], format="csr")
    adata = cells(many)
    out = warns(adata, "I19", "5,000 cells")
    assert (out[:12] > 0).any(axis=1).all()


@pytest.mark.parametrize("edges", [[0.5, 5.0], (0.5, 5.0), np.array([0.5, 5.0])])
def test_edges_of_any_sequence(edges):
    np.testing.assert_array_equal(tokens(cells(), bins=edges), tokens(cells(), bins=[0.5, 5.0]))


def test_scaled_values_beside_unscaled_ones():
    """What was scaled is often still there: as a layer, or as `.raw`, which holds logs."""
    scaled = LOGS - LOGS.mean(axis=0)
    adata = cells(scaled)
    adata.raw = cells(LOGS)
    fails(adata, "I03", "adata.raw.to_adata()")
    adata.layers["scaled"], adata.layers["data"] = scaled, LOGS
    fails(adata, "I03", 'layer="data"')
    with pytest.raises(ScbinInputError, match=r"I35.*Available: 'scaled', 'data'\."):
        tokenize(adata, layer="absent")
    adata.layers["counts"] = COUNTS
    fails(adata, "I03", 'layer="counts"')
    del adata.layers["data"], adata.layers["counts"], adata.raw
    with pytest.raises(ScbinInputError, match=r"I03.*log1p values\.$"):
        tokenize(adata)


def test_genes_that_cannot_be_chosen():
    adata = cells()
    adata.var["mine"], adata.var["text"], adata.var["none"] = True, "yes", False
    fails(adata, "E04", "'yes'", mask_var="text")
    fails(adata, "E05", "mask_var=None", mask_var="none")
    fails(adata, "E06", "True and False: 'mine', 'none'", mask_var="hvg")
    fails(adata, "E07", "n_genes is 0", n_genes=0)
    fails(cells(np.zeros((4, 5))), "E03", "empty", encoding="rank")
    fails(cells(), "E08", "median", encoding="rank", medians={"GENEA0": -1.0})


def test_like_another_encoding():
    fails(cells(), "E02", "leave it out", like=VOCABULARY, encoding="rank")
    fails(cells(), "E01", "like is a int", like=3)
    with pytest.raises(ScbinTypeError, match="E01.*like is None"):
        next(iter_tokens(cells(), like=None))


def test_check_reports_errors_as_rows(capsys):
    table = check(cells(LOGS - 0.5))
    assert table.loc[table["kind"] == "error", "code"].tolist() == ["I03"]
    assert "negative" in capsys.readouterr().out


def test_check_changes_nothing():
    adata = cells()
    table = check(adata, like=VOCABULARY, quiet=True)
    assert set(table["kind"]) == {"ok"}
    assert not len(adata.obsm) and not len(adata.uns) and not len(adata.obs.columns)
