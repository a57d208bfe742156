"""The screen against exact edits: what it writes down is exact, its gradients are those of finite gates, its order is right."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.stats import spearmanr

from scbin.nn.gates import Screen, can_screen
from scbin.nn.network import CellNetwork, build_network
from scbin.nn.packs import pack_rows
from scbin.nn.presets import Network
from scbin.nn.run import Runner, at_rest, embed
from scbin.nn.vector import LatentVector, PooledVector
from scbin.tl._effects import cosine_shift
from scbin.tokens.bins import Bins
from scbin.tokens.edits import Edit, GeneRows, edit_rows
from scbin.tokens.tokens import MemoryTokens
from scbin.tokens.vocabulary import Vocabulary

RULES = {
    "bins": ("bins", Bins.linear(6)),
    "bins_keep": ("bins", Bins.linear(6, zeros="keep")),
    "binary": ("binary", Bins.binary()),
    "gene_bins": ("gene_bins", Bins(tuple(map(float, range(1, 7))), reads="counts")),
    "rank": ("rank", None),
}
N_GENES, HIDDEN = 60, 16
SHAPE = Network(2, HIDDEN, 32, 2, initializer_range=0.1, hidden_dropout_prob=0.0)


def cells_of(name: str, vector: str = "weighted", layer: int = -1, n_cells: int = 4) -> tuple[GeneRows, Runner]:
    """Random cells of an encoding, and a network of random weights with one kind of vector."""
    encoding, bins = RULES[name]
    genes, length = [f"G{i}" for i in range(N_GENES)], 64 if bins is None else None
    v = Vocabulary.build(encoding, genes, bins=bins, max_length=length)
    rng = np.random.default_rng(0)
    rows = np.zeros((n_cells, v.n_positions), dtype=v.dtype)
    first = v.first_gene_position
    for i in range(n_cells):
        rows[i, 0], rows[i, first - 1] = v.specials["[CLS]"], v.specials["[START]"]
        if bins is None:
            n = 50 - 3 * i
            rows[i, first : first + n] = v.first_gene_id + rng.permutation(N_GENES)[:n]
            rows[i, first + n] = v.specials["[END]"]
            continue
        level = rng.integers(1, v.n_levels, N_GENES) * (rng.random(N_GENES) < 0.7)
        own = np.arange(N_GENES) * v.n_levels if encoding == "gene_bins" else 0
        rows[i, first:-1] = np.where((level > 0) | (bins.zeros == "keep"), v.first_gene_id + own + level, 0)
        rows[i, -1] = v.specials["[END]"]
    backbone = build_network(v, SHAPE, "bert", seed=1).backbone
    if bins is None:  # neighbouring ranks alike, as training makes them: the shift of ranks can be interpolated
        table = backbone.bert.bert.embeddings.position_embeddings.weight
        angle = torch.arange(len(table))[:, None] / 64 * torch.linspace(0.5, 3, HIDDEN)
        table.data[:] = 0.3 * torch.sin(angle + torch.arange(HIDDEN))
    torch.manual_seed(0)
    latent = LatentVector(v, HIDDEN, 8, width=16, reads=True)
    kind = latent if vector == "latent" else PooledVector(v, HIDDEN, vector, layer)
    return GeneRows(sparse.csr_matrix(rows), v), Runner(CellNetwork(backbone, kind).eval(), "cpu", "float32")


def everywhere(cells, vectors):
    return np.broadcast_to(np.eye(vectors.shape[1]), (len(cells), vectors.shape[1], vectors.shape[1]))


def both(rows: GeneRows, runner: Runner, edit: Edit, directions=everywhere, budget: int = 10**6, pairs=None):
    """Vectors before, after exactly and after by the screen, and cells, of the pairs that the edit changes."""
    cells, genes = rows.expressed() if pairs is None else pairs
    edited = edit_rows(rows, edit, cells, genes)
    with at_rest(runner.network):
        before = embed(runner.network, MemoryTokens(rows.tokens, rows.vocabulary), device="cpu")
        exact = embed(runner.network, MemoryTokens(edited.tokens, rows.vocabulary), device="cpu")
        screened = np.empty(exact.shape)
        for at, own, after, changed in Screen(runner, rows, edit, budget).estimate(cells, genes, directions):
            np.testing.assert_allclose(own, before[cells[at]], atol=1e-4)
            assert changed.tolist() == edited.changed[at].tolist()
            screened[at] = after
    changed = edited.changed
    return before[cells][changed], exact[changed], screened[changed], cells[changed]


def agreement(before, exact, screened, cells) -> float:
    """Mean over cells of the rank correlation of exact and screened effects."""
    truth, guess = cosine_shift(before, exact), cosine_shift(before, screened)
    return float(np.mean([spearmanr(truth[cells == c], guess[cells == c])[0] for c in np.unique(cells)]))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("mode", ["delete", "overexpress", "inhibit", "activate", "knock_down"])
def test_the_order_of_genes_is_that_of_exact_edits(name, mode):
    rows, runner = cells_of(name)
    if not can_screen(runner.network, rows, Edit(mode), np.zeros((1, 1), int)):
        assert name == "rank" and mode != "delete"
        return
    found = both(rows, runner, Edit(mode, k=2))
    assert agreement(*found) > 0.97 if len(found[0]) else name == "binary"  # there is no second bin


@pytest.mark.parametrize("mode", ["delete", "overexpress"])
def test_the_learned_vector_has_gates_too(mode):
    assert agreement(*both(*cells_of("bins", "latent"), Edit(mode))) > 0.85


@pytest.mark.parametrize("mode", ["overexpress", "activate"])
def test_genes_that_come_in_are_ordered_too(mode):
    rows, runner = cells_of("bins")
    cells, genes = np.divmod(np.arange(4 * N_GENES), N_GENES)
    lacking = rows.find(cells, genes)[1] == 0
    found = both(rows, runner, Edit(mode), pairs=(cells[lacking], genes[lacking]))
    assert agreement(*found) > 0.95


@pytest.mark.parametrize("name", ["bins", "bins_keep", "gene_bins"])
@pytest.mark.parametrize("mode", ["delete", "overexpress", "inhibit"])
def test_without_attention_the_screen_is_exact(name, mode):
    _, exact, screened, _ = both(*cells_of(name, layer=0), Edit(mode), None)  # the embeddings: no token sees another
    np.testing.assert_allclose(screened, exact, atol=1e-5)


@pytest.mark.parametrize("vector", ["weighted", "mean", "cls", "latent"])
def test_slopes_are_those_of_finite_gates(vector):
    """The gradient along each direction, against the network with one gate a little closed."""
    rows, runner = cells_of("bins", vector, n_cells=1)
    cells, genes = rows.expressed()
    before, _, screened, _ = both(rows, runner, Edit(), pairs=(cells[:6], genes[:6]))
    pack, step = pack_rows(rows.tokens, np.array([0])), 0.01
    for k in range(6):
        gates = torch.zeros(pack.n_tokens)
        gates[rows.find(np.array([0]), genes[k : k + 1])[0][0]] = np.log(1 - step)
        with torch.inference_mode():
            hidden = runner(pack, -1, gates=gates)
            finite = (runner.network.vector(hidden, pack, gates=gates).numpy()[0] - before[k]) / step
        got = screened[k] - before[k]
        assert got @ finite / np.linalg.norm(got) / np.linalg.norm(finite) > 0.98


def test_few_directions_suffice():
    rows, runner = cells_of("bins", n_cells=8)
    with at_rest(runner.network):
        originals = embed(runner.network, MemoryTokens(rows.tokens, rows.vocabulary), device="cpu")
        directions = Screen(runner, rows, Edit()).directions(*rows.expressed(), originals, seed=0)
    axes = directions(np.arange(2), originals[:2])
    assert axes.shape[1] < HIDDEN
    np.testing.assert_allclose(axes[0] @ axes[0].T, np.eye(axes.shape[1]), atol=1e-5)
    assert agreement(*both(rows, runner, Edit(), directions)) > 0.95


def test_budget_does_not_change_the_screen():
    rows, runner = cells_of("bins")
    found = [both(rows, runner, Edit("overexpress"), budget=budget)[2] for budget in (1, 150, 10**6)]
    np.testing.assert_allclose(found[0], found[2], atol=1e-5)
    np.testing.assert_allclose(found[1], found[2], atol=1e-5)


def test_a_closed_gate_is_a_deleted_token():
    rows, runner = cells_of("bins", n_cells=1)
    gates = torch.zeros(rows.tokens.nnz)
    gates[5] = -1e9
    kept = np.delete(np.arange(rows.tokens.nnz), 5)
    fewer = rows.tokens.copy()
    fewer.data[5] = 0
    fewer.eliminate_zeros()
    with torch.inference_mode():
        gated = runner(pack_rows(rows.tokens, np.array([0])), gates=gates)[kept]
        deleted = runner(pack_rows(fewer, np.array([0])))
    torch.testing.assert_close(gated, deleted, atol=1e-5, rtol=0)


def test_the_network_keeps_its_gradients():
    rows, runner = cells_of("rank", "mean")
    with at_rest(runner.network):
        list(Screen(runner, rows, Edit()).estimate(*rows.expressed(), everywhere))
    assert all(p.requires_grad and p.grad is None for p in runner.network.parameters())
