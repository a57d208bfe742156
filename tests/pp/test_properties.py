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

from scbin import Tokenization
from scbin._adata import read_tokens
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


def table(x, names=None) -> ad.AnnData:
    n, m = x.shape
    names = [f"GENE{k}x" for k in range(m)] if names is None else names
    return ad.AnnData(x, obs=pd.DataFrame(index=[f"c{k}" for k in range(n)]), var=pd.DataFrame(index=names))


def tokens(adata: ad.AnnData, **kwargs) -> np.ndarray:
    tokenize(adata, **kwargs)
    return read_tokens(adata).matrix.toarray()


def fitted(x: np.ndarray, encoding: str, **kwargs):
    """The tokens and the vocabulary, None where no cell has a count (rank has no medians then)."""
    if encoding == "rank" and not x.any():
        return None, None
    adata = table(x)
    out = tokens(adata, encoding=encoding, **kwargs)
    return out, read_tokens(adata).vocabulary


@quick
@given(counts, encodings, st.randoms(use_true_random=False), st.integers(0, 8))
def test_cells_are_independent_and_genes_have_no_order(x, encoding, random, cut):
    out, vocabulary = fitted(x, encoding)
    if vocabulary is None:
        return
    order = random.sample(range(len(x)), len(x))
    np.testing.assert_array_equal(tokens(table(x[order]), like=vocabulary), out[order])
    parts = [tokens(table(part), like=vocabulary) for part in (x[:cut], x[cut:])]
    np.testing.assert_array_equal(np.vstack(parts), out)
    order = random.sample(range(x.shape[1]), x.shape[1])
    np.testing.assert_array_equal(tokens(table(x[:, order], [f"GENE{k}x" for k in order]), like=vocabulary), out)


@quick
@given(counts, st.sampled_from(["bins", "rank", "binary"]), st.integers(2, 9))
def test_rescaling_a_cell_changes_nothing_but_counts_and_depth(x, encoding, factor):
    rule = "linear" if encoding == "bins" else None
    out, vocabulary = fitted(x, encoding, rule=rule, tokenization=Tokenization(depth=False))
    if vocabulary is not None:
        np.testing.assert_array_equal(tokens(table(x * factor), like=vocabulary), out)


@quick
@given(counts, st.integers(2, 9))
def test_a_molecule_is_a_molecule_at_any_depth(x, factor):
    """The token of a count depends on nothing but the count; the depth is a token of its own."""
    out, vocabulary = fitted(np.minimum(x, 30), "bins")
    other = np.column_stack([np.minimum(x, 30)[:, :1], np.minimum(x, 30)[:, 1:] * factor])
    again = tokens(table(other), like=vocabulary)
    first, both = vocabulary.first_gene_position, (out[:, 0] > 0) & (again[:, 0] > 0)
    np.testing.assert_array_equal(out[both, first], again[both, first])
    expressed = out[:, first : first + x.shape[1]] > 0
    values = vocabulary.token_values[out[:, first : first + x.shape[1]]]
    exact = expressed & (x <= 16)
    np.testing.assert_array_equal(values[exact], x[exact])
    totals = np.minimum(x, 30).sum(axis=1)
    levels = vocabulary.depth.first_id + 1 + np.digitize(totals, vocabulary.depth.edges)
    np.testing.assert_array_equal(out[:, vocabulary.depth.position], np.where(totals > 0, levels, 0))


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
ODD = ["", "CD3E", "CD3E-1", "ENSG00000000003.1", "ENSG00000000003", "ENSMUSG00000000001", "Cd3e", "cd3e"]
odd_names = st.one_of(st.text(max_size=8), st.sampled_from(ODD))
odd_labels = st.one_of(st.none(), st.text(max_size=5), st.sampled_from(["unknown", "a/b", "[MASK]", " ", "1"]))
RULES = ["counts", "linear", "quantile", "quantile_per_gene", "quantile_per_cell", "log2"]
arguments = st.fixed_dictionaries(
    {},
    optional={
        "values": st.sampled_from(["auto", "counts", "log1p"]),
        "rule": st.sampled_from(RULES),
        "phenotypes": st.just(["kind"]),
        "n_genes": st.integers(1, 4),
        "tokenization": st.builds(
            Tokenization,
            zeros=st.sampled_from(["drop", "keep"]),
            n_bins=st.integers(1, 5),
            max_length=st.one_of(st.none(), st.integers(4, 12)),
            depth=st.sampled_from([None, False]),
        ),
    },
)


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
    try:
        tokenize(adata, encoding=encoding, **data.draw(arguments))
    except ScbinInputError:
        assert not len(adata.obsm)
        assert list(adata.obs.columns) == ["kind"]
        return
    matrix, vocabulary = read_tokens(adata).matrix, read_tokens(adata).vocabulary
    assert matrix.shape == (len(x), vocabulary.n_positions)
    assert np.isfinite(x).all()
    lengths = np.diff(matrix.indptr)
    assert lengths.max(initial=0) <= vocabulary.max_length
    assert ((lengths > 0) == (adata.obs["scbin_status"] == "ok").to_numpy()).all()
    dense = adata.X.toarray() if sparse.issparse(adata.X) else adata.X
    np.testing.assert_array_equal(dense, before)
    start, stop = vocabulary.group_start[matrix.indices], vocabulary.group_stop[matrix.indices]
    inside = (matrix.data >= start) & (matrix.data < stop)
    control = [*vocabulary.specials.values(), *(p.missing_id for p in vocabulary.phenotypes)]
    depth = vocabulary.depth
    control += [] if depth is None else range(depth.first_id, depth.stop_id)
    assert (inside | np.isin(matrix.data, control)).all()


def test_rounded_logs_of_counts_are_counts_and_those_of_other_values_are_not():
    rng = np.random.default_rng(0)
    x = rng.poisson(rng.gamma(0.5, 2, 200), (30, 200)).astype(np.float64)
    x[:, 0] = np.maximum(x[:, 0], 1)
    logs = np.log1p(x * (1e4 / x.sum(axis=1, keepdims=True)))
    assert tokens(table(x.astype(np.float32))).tolist() == tokens(table(logs.round(3).astype(np.float32))).tolist()
    other = table(np.log1p(x * rng.uniform(0.5, 1.5, x.shape)).round(3).astype(np.float32))
    tokenize(other, values="log1p")
    assert read_tokens(other).vocabulary.unit == "log1p"
