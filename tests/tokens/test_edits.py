"""Edits of token rows against the same edits of Python lists, one row at a time."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import sparse

from scbin._errors import ScbinInputError
from scbin.tokens.edits import Edit, GeneRows, edit_rows, shortened
from scbin.tokens.rules import Bins
from scbin.tokens.vocabulary import Vocabulary

GENES = [f"G{i}" for i in range(12)]
EDITS = [
    Edit("delete"),
    Edit("overexpress"),
    *(Edit(mode, k=k) for mode in ("inhibit", "activate") for k in (1, 2, 3)),
    *(Edit("knock_down", fraction=fraction) for fraction in (0.3, 0.9, 1.0)),
]
LAYOUTS = {
    "bins": ("bins", Bins.linear(5), "scbin"),
    "bins_counts": ("bins", Bins.counts(), "scbin"),
    "bins_keep": ("bins", Bins.linear(5, zeros="keep"), "scbin"),
    "bins_per_gene": ("bins", Bins.from_quantiles(np.linspace(0.2, 3, 12)[:, None] * [1.0, 2.0, 4.0]), "scbin"),
    "bins_per_cell": ("bins", Bins.cell_quantiles(5), "scbin"),
    "binary": ("binary", Bins.binary(), "scbin"),
    "gene_bins": ("gene_bins", Bins(tuple(map(float, range(1, 5))), reads="counts"), "scbin"),
    "gene_bins_keep": ("gene_bins", Bins.log2(9), "scbin"),
    "rank": ("rank", None, "scbin"),
    "rank_v1": ("rank", None, "geneformer_v1"),
    "rank_v2": ("rank", None, "geneformer_v2"),
    "rank_bionemo": ("rank", None, "bionemo"),
}


def vocabulary_of(name: str) -> Vocabulary:
    encoding, bins, layout = LAYOUTS[name]
    phenotypes = {"sex": ["f", "m"]} if layout == "scbin" else None
    # ranks have room for 9 genes, so that what comes in pushes something out
    frame = {"scbin": 4, "geneformer_v1": 0, "geneformer_v2": 2, "bionemo": 1}[layout]
    length = 9 + frame if encoding == "rank" else None
    return Vocabulary.build(encoding, GENES, phenotypes=phenotypes, bins=bins, layout=layout, max_length=length)


def state_row(v: Vocabulary, state) -> tuple[list[int], list[int]]:
    """Tokens and positions of a cell: a list of genes by rank, or a dict gene -> bin."""
    first, specials = v.first_gene_position, v.specials
    tokens = {0: specials["[CLS]"]} if "[CLS]" in specials else {}
    tokens |= {p.position: p.first_id for p in v.phenotypes}
    if "[START]" in specials:
        tokens[first - 1] = specials["[START]"]
    if isinstance(state, list):
        tokens |= {first + r: v.first_gene_id + gene for r, gene in enumerate(state)}
        end = first + len(state)
    else:
        for gene, level in state.items():
            own = gene * v.n_levels if v.encoding == "gene_bins" else 0
            if level or v.bins.zeros == "keep":
                tokens[first + gene] = v.first_gene_id + own + level
        end = first + len(GENES)
    if "[END]" in specials:
        tokens[end] = specials["[END]"]
    return [tokens[p] for p in sorted(tokens)], sorted(tokens)


def matrix(v: Vocabulary, states) -> sparse.csr_matrix:
    rows = [state_row(v, state) for state in states]
    indptr = np.cumsum([0, *(len(ids) for ids, _ in rows)])
    ids = np.array([i for row, _ in rows for i in row], dtype=v.dtype)
    return sparse.csr_matrix((ids, [p for _, row in rows for p in row], indptr), shape=(len(rows), v.n_positions))


def cells_of(v: Vocabulary, seed: int) -> list:
    rng = np.random.default_rng(seed)
    if v.encoding == "rank":
        return [rng.permutation(12)[:n].tolist() for n in (9, 9, 8, 5, 2, 1)]
    levels = rng.integers(0, v.n_levels, (6, 12)) * (rng.random((6, 12)) < 0.6)
    keep = v.bins.zeros == "keep"
    return [{g: int(level) for g, level in enumerate(row) if level or keep} for row in levels]


def edited_list(row: list[int], edit: Edit, genes: tuple[int, ...], room: int) -> tuple[list[int], int]:
    n, targets = len(row), []
    for place, gene in enumerate(genes):
        there = gene in row
        r = row.index(gene) if there else n
        q = 4 * r // n if there else 4
        if edit.mode == "overexpress":
            targets.append((place, gene))
        elif edit.mode == "knock_down" and there and edit.fraction < 1:
            targets.append((r + round(edit.fraction * (n - 1 - r)), gene))
        elif edit.mode in ("inhibit", "activate") and (there or edit.mode == "activate"):
            q += edit.k if edit.mode == "inhibit" else -edit.k
            targets.append((0 if q < 0 else n - 1 if q > 3 else int((q + 0.5) * n / 4), gene))
    out = [gene for gene in row if gene not in genes]
    final = [None] * (len(out) + len(targets))
    for target, gene in sorted(targets, key=lambda pair: pair[0]):
        free = [i for i, g in enumerate(final) if g is None]
        behind = [i for i in free if i >= target]
        if behind:
            final[behind[0]] = gene
        else:  # at the end: those before it move up
            last = free[-1]
            final[last : len(final) - 1] = final[last + 1 :]
            final[-1] = gene
    rest = iter(out)
    final = [next(rest) if gene is None else gene for gene in final]
    cut = max(0, len(final) - room)
    return final[: len(final) - cut], cut


def edited_dict(v: Vocabulary, row: dict[int, int], edit: Edit, genes: tuple[int, ...]) -> dict[int, int]:
    top, highest, row = v.bins.n_bins, max(row.values(), default=0), dict(row)
    for gene in genes:
        level = row.get(gene, 0)
        if edit.mode == "delete":
            new = 0
        elif edit.mode == "overexpress":
            new = highest if v.unit == "counts" else top  # more molecules than any gene has would be far outside
        elif edit.mode == "activate":
            new = min(level + edit.k, top)
        elif level == 0:
            new = 0
        elif edit.mode == "inhibit":
            new = max(level - edit.k, 1)
        elif v.bins.per == "cell":
            new = int(level * (1 - edit.fraction) + 1e-9)
        else:
            edges, middle = v.bins.edges, float(v.bins.centres[level])
            left = middle * (1 - edit.fraction)
            if v.bins.reads == "log1p":
                left = np.log1p(np.expm1(middle) * (1 - edit.fraction))
            new = sum(edge <= left for edge in edges)
        if new or v.bins.zeros == "keep":
            row[gene] = new
        else:
            row.pop(gene, None)
    return row


@pytest.mark.parametrize("edit", EDITS, ids=lambda e: f"{e.mode}-{e.k}-{e.fraction}")
@pytest.mark.parametrize("name", LAYOUTS)
def test_equal_to_lists_edited_one_by_one(name, edit):
    v = vocabulary_of(name)
    states = cells_of(v, seed=hash_of(name))
    tokens = matrix(v, states)
    before = tokens.copy()
    rows = GeneRows(tokens, v)
    room = v.max_length - v.first_gene_position - ("[END]" in v.specials)
    for width in (1, 2, 3):
        lists = list(itertools.permutations(range(12), width))[:: {1: 1, 2: 17, 3: 301}[width]]
        pairs = [(cell, genes) for cell in range(len(states)) for genes in lists]
        got = edit_rows(rows, edit, np.array([c for c, _ in pairs]), np.array([g for _, g in pairs]))
        cuts = []
        if v.encoding == "rank":
            expected = [edited_list(states[c], edit, g, room) for c, g in pairs]
            truth, cuts = matrix(v, [row for row, _ in expected]), [cut for _, cut in expected]
        else:
            truth, cuts = matrix(v, [edited_dict(v, states[c], edit, g) for c, g in pairs]), [0] * len(pairs)
        assert_equal(got.tokens, truth)
        assert got.n_cut.tolist() == cuts
        original = tokens[[c for c, _ in pairs]]
        assert got.changed.tolist() == [(got.tokens[i] != original[i]).nnz > 0 for i in range(len(pairs))]
    assert_equal(tokens, before)


def hash_of(name: str) -> int:
    return sum(map(ord, name))


def assert_equal(left, right):
    assert left.shape == right.shape and left.dtype == right.dtype
    assert np.array_equal(left.indptr, right.indptr)
    assert np.array_equal(left.indices, right.indices)
    assert np.array_equal(left.data, right.data)


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name.startswith("rank")])
def test_the_original_loses_what_the_edited_row_lost(name):
    v = vocabulary_of(name)
    states = cells_of(v, seed=1)
    n_cut = np.array([2, 0, 1, 0, 1, 0])
    got = shortened(GeneRows(matrix(v, states), v), np.arange(6), n_cut)
    assert_equal(got, matrix(v, [row[: len(row) - cut] for row, cut in zip(states, n_cut, strict=True)]))


@pytest.mark.parametrize("name", LAYOUTS)
def test_expressed_pairs_are_those_of_the_cells(name):
    v = vocabulary_of(name)
    states = cells_of(v, seed=2)
    cells, genes = GeneRows(matrix(v, states), v).expressed()
    truth = [(c, g) for c, row in enumerate(states) for g in sorted(row) if v.encoding == "rank" or row[g] > 0]
    assert list(zip(cells.tolist(), genes.tolist(), strict=True)) == truth


def test_no_pairs_and_empty_rows():
    v = vocabulary_of("bins")
    empty = GeneRows(sparse.csr_matrix((3, v.n_positions), dtype=v.dtype), v)
    assert len(empty.expressed()[0]) == 0
    got = edit_rows(empty, Edit("delete"), np.array([0, 2]), np.array([1, 2]))
    assert got.tokens.nnz == 0 and not got.changed.any()
    none = edit_rows(empty, Edit("delete"), np.array([], dtype=int), np.array([], dtype=int))
    assert none.tokens.shape == (0, v.n_positions)


@pytest.mark.parametrize(
    "fields, code",
    [
        ({"mode": "remove"}, "A02"),
        ({"k": 0}, "A02"),
        ({"k": 1.5}, "A01"),
        ({"fraction": 0.0}, "A02"),
        ({"fraction": 1.1}, "A02"),
    ],
)
def test_edits_that_there_are_not(fields, code):
    with pytest.raises(ScbinInputError, match=code):
        Edit(**fields)
