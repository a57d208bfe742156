"""What must hold for any cells: about 1,000 small random tables."""

from __future__ import annotations

import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import sparse

from scbin._anndata import read_tokens
from scbin._errors import ScbinInputError
from scbin.pp import tokenize

ENCODINGS = ["bins", "binary", "rank", "gene_bins"]
pytestmark = pytest.mark.filterwarnings("ignore::scbin._errors.ScbinInputWarning")
quick = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
many = settings(quick, max_examples=400)

counts = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 8), st.integers(1, 10)),
    elements=st.one_of(st.just(0.0), st.integers(0, 5), st.integers(0, 40_000)).map(float),
)
encodings = st.sampled_from(ENCODINGS)


def table(x, names=None, cells=None) -> ad.AnnData:
    n, m = x.shape
    names = [f"GENE{k}x" for k in range(m)] if names is None else names
    return ad.AnnData(x, obs=pd.DataFrame(index=cells or [f"c{k}" for k in range(n)]), var=pd.DataFrame(index=names))


def tokens(adata: ad.AnnData, **kwargs) -> np.ndarray:
    tokenize(adata, **kwargs)
    return read_tokens(adata)[0].toarray()


def fitted(x: np.ndarray, encoding: str):
    """The tokens and the vocabulary, None where no cell has a count (rank has no medians then)."""
    adata = table(x)
    if encoding == "rank" and not x.any():
        return None, None
    out = tokens(adata, encoding=encoding)
    return out, read_tokens(adata)[1]


@quick
@given(counts, encodings, st.randoms(use_true_random=False))
def test_permuting_cells_permutes_rows(x, encoding, random):
    out, vocabulary = fitted(x, encoding)
    if vocabulary is not None:
        order = random.sample(range(len(x)), len(x))
        np.testing.assert_array_equal(tokens(table(x[order]), like=vocabulary), out[order])


@quick
@given(counts, encodings, st.randoms(use_true_random=False))
def test_permuting_genes_changes_nothing(x, encoding, random):
    out, vocabulary = fitted(x, encoding)
    if vocabulary is not None:
        order = random.sample(range(x.shape[1]), x.shape[1])
        names = [f"GENE{k}x" for k in order]
        np.testing.assert_array_equal(tokens(table(x[:, order], names), like=vocabulary), out)


@quick
@given(counts, encodings, st.integers(0, 8))
def test_parts_equal_the_whole(x, encoding, cut):
    out, vocabulary = fitted(x, encoding)
    if vocabulary is not None:
        parts = [tokens(table(part), like=vocabulary) for part in (x[:cut], x[cut:])]
        np.testing.assert_array_equal(np.vstack(parts), out)


@quick
@given(counts, st.sampled_from(["bins", "rank", "binary"]), st.integers(2, 9))
def test_rescaling_a_cell_changes_nothing(x, encoding, factor):
    out, vocabulary = fitted(x, encoding)
    if vocabulary is not None:
        np.testing.assert_array_equal(tokens(table(x * factor), like=vocabulary), out)


@quick
@given(
    counts,
    encodings,
    st.sampled_from(["csr", "csc", "array", "fortran", "int64", "float64", "zeros", "unsorted", "view"]),
)
def test_container_changes_nothing(x, encoding, kind):
    out, vocabulary = fitted(x, encoding)
    if vocabulary is None:
        return
    matrix = sparse.csr_matrix(np.ones_like(x))
    matrix.data[:] = x.ravel()
    if kind == "unsorted":
        for row in range(len(x)):
            part = slice(matrix.indptr[row], matrix.indptr[row + 1])
            matrix.indices[part], matrix.data[part] = matrix.indices[part][::-1].copy(), matrix.data[part][::-1].copy()
    made = {
        "csr": lambda: sparse.csr_matrix(x),
        "csc": lambda: sparse.csc_matrix(x),
        "array": lambda: sparse.csr_array(x),
        "fortran": lambda: np.asfortranarray(x),
        "int64": lambda: x.astype(np.int64),
        "float64": lambda: x.astype(np.float64),
    }.get(kind, lambda: matrix)()
    adata = table(made)
    np.testing.assert_array_equal(tokens(adata[:] if kind == "view" else adata, like=vocabulary), out)


@quick
@given(counts, encodings)
def test_ranks_and_bins_mean_what_they_say(x, encoding):
    out, vocabulary = fitted(x, encoding)
    if vocabulary is None:
        return
    for row, values in zip(out, x, strict=True):
        ids = row[vocabulary.is_gene_token(row)]
        if encoding == "rank":
            genes = [int(vocabulary.genes[k - vocabulary.first_gene_id][4:-1]) for k in ids]
            middle = dict(zip(vocabulary.genes, vocabulary.medians, strict=True))
            keys = [float(values[g]) / middle[f"GENE{g}x"] for g in genes]
            assert keys == sorted(keys, reverse=True)
            assert sorted(genes) == np.flatnonzero(values).tolist()
        else:
            assert (len(ids) == 0) == (not values.any()) or encoding != "gene_bins"


odd_values = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, 2.0, -1.0, 0.5, np.nan, np.inf, -np.inf, 1e30, 3e7, 1e-30]),
    st.floats(width=32, allow_nan=True, allow_infinity=True),
)
odd_matrices = st.one_of(
    counts,
    counts.map(lambda x: np.log1p(x / np.maximum(x.sum(axis=1, keepdims=True), 1) * 1e4)),
    counts.map(lambda x: x / np.maximum(x.sum(axis=1, keepdims=True), 1) * 1e4),
    counts.map(np.sqrt),
    hnp.arrays(np.float32, st.tuples(st.integers(0, 6), st.integers(0, 6)), elements=odd_values),
)
odd_names = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        ["", "CD3E", "CD3E-1", "ENSG00000000003.1", "ENSG00000000003", "ENSMUSG00000000001", "Cd3e", "cd3e"]
    ),
)
odd_labels = st.one_of(st.none(), st.text(max_size=5), st.sampled_from(["unknown", "a/b", "[MASK]", " ", "1"]))


@many
@given(odd_matrices, st.data(), encodings)
def test_nothing_but_typed_errors(x, data, encoding):
    names = data.draw(st.lists(odd_names, min_size=x.shape[1], max_size=x.shape[1]))
    labels = data.draw(st.lists(odd_labels, min_size=len(x), max_size=len(x)))
    container = data.draw(st.sampled_from([np.asarray, sparse.csr_matrix, sparse.csc_array, np.asfortranarray]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata = table(container(x), names)
    adata.obs["kind"] = pd.Series(labels, index=adata.obs_names, dtype=object).to_numpy()
    before = x.copy()
    arguments = data.draw(
        st.fixed_dictionaries(
            {},
            optional={
                "values": st.sampled_from(["auto", "counts", "log1p"]),
                "zeros": st.sampled_from(["drop", "keep"]),
                "bins": st.sampled_from(["linear", "quantile", "quantile_per_gene", "quantile_per_cell", "log2"]),
                "n_bins": st.integers(1, 5),
                "max_length": st.integers(4, 12),
                "phenotypes": st.just(["kind"]),
                "n_genes": st.integers(1, 4),
            },
        )
    )
    try:
        tokenize(adata, encoding=encoding, **arguments)
    except ScbinInputError:
        assert not len(adata.obsm)
        assert list(adata.obs.columns) == ["kind"]
        return
    matrix, vocabulary = read_tokens(adata)
    assert matrix.shape == (len(x), vocabulary.n_positions)
    assert np.isfinite(x).all()
    lengths = np.diff(matrix.indptr)
    assert lengths.max(initial=0) <= vocabulary.max_length
    assert ((lengths > 0) == (adata.obs["scbin_status"] == "ok").to_numpy()).all()
    dense = adata.X.toarray() if sparse.issparse(adata.X) else adata.X
    np.testing.assert_array_equal(dense, before)
    start, stop = vocabulary.group_start[matrix.indices], vocabulary.group_stop[matrix.indices]
    inside = (matrix.data >= start) & (matrix.data < stop)
    specials = [*vocabulary.specials.values(), *(p.missing_id for p in vocabulary.phenotypes)]
    assert (inside | np.isin(matrix.data, specials)).all()
