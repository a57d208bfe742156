"""Splits of counts against their distribution, losses against dense logits of stock BERT, gradients over any packs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from scipy.special import gammaln
from scipy.stats import binom, chisquare
from transformers import BertConfig, BertForMaskedLM

from scbin._errors import ScbinInputError
from scbin.nn.network import build_network
from scbin.nn.packs import gene_values, pack_rows, token_expression
from scbin.tokens.bins import Bins
from scbin.tokens.tokens import MemoryTokens
from scbin.tokens.vocabulary import Vocabulary
from scbin.train.masking import masked_losses, split_counts, split_rows
from scbin.train.pretraining import VISIBLE, Pretraining
from scbin.train.settings import Loss, Masking
from scbin.train.task import EVALUATION

COUNTS = Bins(tuple(float(k) for k in range(1, 13)), reads="counts")


def make(encoding="bins", n_cells=30, n_genes=12, zeros="drop", depth=False, seed=0):
    """Rows with one phenotype; all encodings but rank and log1p bins hold counts."""
    rng = np.random.default_rng(seed)
    bins = {"rank": None, "log1p": Bins((0.1, 1.0, 2.0)), "binary": Bins.binary()}.get(encoding, COUNTS)
    if bins is COUNTS and zeros == "keep":
        bins = Bins(COUNTS.edges, "keep", "counts")
    name = "bins" if encoding == "log1p" else encoding
    genes = [f"G{i}" for i in range(n_genes)]
    v = Vocabulary.build(name, genes, phenotypes={"sex": ["f", "m"]}, bins=bins, max_length=n_genes + 8, depth=depth)
    rows = np.zeros((n_cells, v.n_positions), dtype=v.dtype)
    rows[:, 0], rows[:, v.first_gene_position - 1] = v.specials["[CLS]"], v.specials["[START]"]
    rows[:, 1] = v.phenotypes[0].first_id + rng.integers(0, 2, n_cells)
    counts = rng.poisson(rng.gamma(1.0, 2.0, (n_cells, n_genes))).clip(0, v.n_levels - 1 if v.n_levels else 9)
    for row, cell in zip(rows, counts, strict=True):
        if encoding == "rank":
            genes = rng.permutation(n_genes)[: 4 + cell.sum() % 7]
            row[3 : 3 + len(genes)], row[3 + len(genes)] = v.first_gene_id + genes, v.specials["[END]"]
        else:
            ids = v.group_start[v.gene_positions] + cell
            row[v.gene_positions] = ids if zeros == "keep" else np.where(cell > 0, ids, 0)
        if depth:
            row[v.depth.position] = v.depth.ids(cell.sum())
    return MemoryTokens(csr_matrix(rows), v), counts


# ---- splitting ------------------------------------------------------------------------------------------------------


def split(tokens, cells=None, visible=(0.3, 0.9), seed=0, epoch=0):
    cells = np.arange(tokens.n_cells) if cells is None else cells
    rows, hidden, asked = split_rows(tokens.matrix[cells], cells, tokens.vocabulary, visible, seed=seed, epoch=epoch)
    return rows, hidden.toarray(), asked


@pytest.mark.parametrize("zeros", ["drop", "keep"])
@pytest.mark.parametrize("encoding", ["bins", "gene_bins"])
def test_both_halves_are_the_counts(encoding, zeros):
    tokens, _ = make(encoding, zeros=zeros)
    v = tokens.vocabulary
    rows, hidden, asked = split(tokens)
    levels = rows.toarray()[:, v.gene_positions].astype(int)
    shown = np.where(levels > 0, levels - v.group_start[v.gene_positions], 0)
    value = np.rint(v.token_values[v.group_start[v.gene_positions][0] :][: v.n_levels]).astype(int)
    visible = np.rint(token_expression(tokens.matrix, v).toarray()) - hidden
    # the token of the visible count is the one that the encoding gives to that many molecules
    assert np.array_equal(np.searchsorted(np.asarray(v.bins.edges), visible, side="right"), shown)
    assert (visible >= 0).all() and (value[shown] >= visible - 1).all()
    others = np.delete(np.arange(v.n_positions), v.gene_positions)
    assert np.array_equal(rows.toarray()[:, others], tokens.matrix.toarray()[:, others])
    assert asked is None and (zeros == "drop") == (rows.nnz < tokens.matrix.nnz)


def test_the_network_is_told_the_visible_depth():
    tokens, _ = make(depth=True, n_genes=60)
    v = tokens.vocabulary
    rows, hidden, _ = split(tokens)
    whole = np.rint(token_expression(tokens.matrix, v).toarray())
    told = rows.toarray()[:, v.depth.position]
    assert np.array_equal(told, v.depth.ids((whole - hidden).sum(1))) and len(set(told)) > 2


@pytest.mark.parametrize(("count", "fraction"), [(1, 0.4), (5, 0.7), (128, 0.3), (1000, 0.6)])
def test_molecules_are_split_binomially(count, fraction):
    n = 20_000
    indptr, genes, counts = np.arange(0, n + 1, 10), np.tile(np.arange(10), n // 10), np.full(n, count)
    shown = split_counts(indptr, genes, counts, np.arange(n // 10), np.uint64(7), fraction, fraction)
    expected = binom(count, fraction)
    assert shown.mean() == pytest.approx(expected.mean(), abs=5 * expected.std() / np.sqrt(n))
    assert shown.std() == pytest.approx(expected.std(), rel=0.03)
    if count < 10:
        seen = np.bincount(shown, minlength=count + 1)
        assert chisquare(seen, n * expected.pmf(np.arange(count + 1))).pvalue > 1e-3


def test_fractions_are_drawn_for_each_cell():
    indptr, genes = np.arange(0, 400_001, 100), np.tile(np.arange(100), 4000)
    counts = np.full(400_000, 50)
    shown = split_counts(indptr, genes, counts, np.arange(4000), np.uint64(1), 0.3, 0.9)
    fraction = shown.reshape(4000, 100).mean(1) / 50
    assert fraction.min() == pytest.approx(0.3, abs=0.03) and fraction.max() == pytest.approx(0.9, abs=0.03)
    assert np.histogram(fraction, 6, (0.3, 0.9))[0] == pytest.approx(4000 / 6, rel=0.15)


@pytest.mark.parametrize("encoding", ["rank", "log1p", "binary"])
def test_of_other_units_whole_genes_are_split(encoding):
    tokens, _ = make(encoding, n_cells=300)
    v = tokens.vocabulary
    rows, hidden, asked = split(tokens, visible=(0.4, 0.6))
    whole, shown = (token_expression(each, v).toarray() for each in (tokens.matrix, rows))
    assert not ((shown > 0) & (hidden > 0)).any() and not ((hidden > 0) & ~asked).any()
    assert np.array_equal((shown > 0) | (hidden > 0), whole > 0)
    assert hidden[hidden > 0] == pytest.approx(whole[hidden > 0], rel=1e-6)
    assert asked.mean() == pytest.approx(0.5, abs=0.02)
    if encoding == "rank":  # later genes move up, the order stays, [END] stands behind the last
        before, after = tokens.matrix.toarray()[:, 3:].astype(int), rows.toarray()[:, 3:].astype(int)
        for one, other, of_cell in zip(before, after, asked, strict=True):
            kept = [t for t in one[one > 0] if t < v.first_gene_id or not of_cell[t - v.first_gene_id]]
            assert other[: len(kept)].tolist() == kept and not other[len(kept) :].any()


@pytest.mark.parametrize("encoding", ["bins", "rank"])
def test_splits_are_a_function_of_seed_epoch_and_cell(encoding):
    tokens, _ = make(encoding)
    state = np.random.get_state()[1].copy()
    rows, hidden, _ = split(tokens, epoch=EVALUATION)
    for order in (np.array([5, 2, 9]), np.array([29])):
        some, of_some, _ = split(tokens, order, epoch=EVALUATION)
        assert (some != rows[order]).nnz == 0 and np.array_equal(of_some, hidden[order])
    for other in ({"epoch": 0}, {"epoch": EVALUATION, "seed": 1}):
        assert not np.array_equal(split(tokens, **other)[1], hidden)
    assert np.array_equal(state, np.random.get_state()[1])


# ---- losses ---------------------------------------------------------------------------------------------------------


def asked_at_once(task, tokens, cells=None, seed=0, epoch=0):
    cells = np.arange(tokens.n_cells) if cells is None else cells
    batch = task.prepare(tokens, cells, seed=seed, epoch=epoch, token_budget=10_000)
    ((pack, targets),) = batch.packs
    return pack, targets, batch.counts


def dense_losses(network, task, pack, targets):
    """Masked losses from the full logits of stock BERT, cell by cell, in float64."""
    config = BertConfig(**{**network.backbone.bert.config.to_dict(), "attn_implementation": "eager"})
    stock = BertForMaskedLM(config).eval()
    stock.load_state_dict(network.backbone.bert.state_dict())
    stock, logits, loss = stock.double(), [], task.score
    cells = zip(pack.input_ids.split(pack.layout.lengths), pack.position_ids.split(pack.layout.lengths), strict=True)
    for ids, positions in cells:
        logits.append(stock(input_ids=ids[None], position_ids=positions[None]).logits[0])
    logits, sums = torch.cat(logits)[targets.where], np.zeros(len(task.losses))
    for number, first, last, _, size in targets.segments:
        name = task.masked[number]
        for row in range(first, last):
            start, y = int(targets.starts[row]), int(targets.labels[row])
            log_p = torch.log_softmax(logits[row, start : start + size], 0)
            target = torch.nn.functional.one_hot(torch.tensor(y), size).double()
            if name == "genes" and loss.kind == "ordinal":
                target = torch.exp(-((torch.arange(size) - y).double() ** 2) / (2 * loss.sigma**2))
                target = target / target.sum()
            target = (1 - loss.label_smoothing) * target + loss.label_smoothing / size
            sums[task.losses.index(name)] -= float((target * log_p).sum().detach())
    return sums


@pytest.mark.parametrize("encoding", ["rank", "bins", "binary", "gene_bins"])
@pytest.mark.parametrize(
    "loss", [{}, {"label_smoothing": 0.3}, {"over": "vocabulary"}, {"kind": "ordinal", "sigma": 0.7}]
)
def test_masked_losses_equal_those_of_dense_logits(encoding, loss):
    tokens, _ = make(encoding)
    if encoding == "rank" and "kind" in loss:
        with pytest.raises(ScbinInputError, match="follow one another"):
            Pretraining(tokens.vocabulary, loss=Loss(**loss))
        return
    network = build_network(tokens.vocabulary, "tiny", "bert", vector="pooled").eval()
    task = Pretraining(tokens.vocabulary, Masking(0.4, mask_specials=True), Loss(**loss, weights={"cell_vector": 0.0}))
    pack, targets, counts = asked_at_once(task, tokens)
    sums = task.loss(network, network.backbone.encode(pack), pack, targets).detach().numpy()
    assert task.losses == masked_losses(tokens.vocabulary) and (counts > 5).all()
    assert sums == pytest.approx(dense_losses(network, task, pack, targets), rel=1e-5)


def negative_binomial(x, mean, theta):
    """Its log probability, also of values that are not whole."""
    binomial = gammaln(x + theta) - gammaln(theta) - gammaln(x + 1)
    return binomial + theta * np.log(theta / (theta + mean)) + x * np.log(mean / (theta + mean))


@pytest.mark.parametrize("encoding", ["bins", "log1p", "rank"])
def test_the_cell_vector_is_scored_by_the_likelihood_of_what_it_has_not_seen(encoding):
    tokens, _ = make(encoding)
    v, batches = tokens.vocabulary, np.arange(30) % 2
    network = build_network(v, "tiny", batches=["a", "b"], vector_options={"size": 4}).eval()
    with torch.no_grad():
        for parameter in network.counts.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    task, cells = Pretraining(v, Masking(0, 0), batches=batches), np.array([3, 4, 11])
    pack, targets, n = asked_at_once(task, tokens, cells, seed=5, epoch=2)
    got = task.loss(network, network.backbone.encode(pack), pack, targets)[-1].item()
    rows, hidden, asked = split(tokens, cells, VISIBLE, seed=5, epoch=2)
    visible = pack_rows(rows, cells)
    z = network.vector(network.backbone.encode(visible), visible)
    log_depth = torch.tensor(np.log(np.maximum(hidden.sum(1), 1)))
    mean = network.counts.log_mean(z, log_depth, torch.tensor(batches[cells])).exp().detach().double().numpy()
    log_p = negative_binomial(hidden, mean, network.counts.log_dispersion.exp().detach().double().numpy())
    assert got == pytest.approx(-log_p[... if asked is None else asked].sum(), rel=1e-5)
    assert n[-1] == pytest.approx(hidden.sum(), rel=1e-5) and task.watched == "cell_vector"


@pytest.mark.parametrize("kind", ["bert", "mlp"])
def test_gradients_are_equal_over_any_packs(kind):
    tokens, _ = make("bins", n_cells=40)
    task, found = Pretraining(tokens.vocabulary, Masking()), []
    for budget in (10_000, 150, 40):
        network = build_network(tokens.vocabulary, "tiny", kind, seed=1)  # in training, with dropout
        batch = task.prepare(tokens, np.arange(40), seed=0, epoch=0, token_budget=budget)
        for pack, targets in batch.packs:
            hidden = network.backbone.encode(pack)
            (task.loss(network, hidden, pack, targets) / torch.from_numpy(batch.counts).float()).sum().backward()
        found.append((len(batch.packs), {n: p.grad for n, p in network.named_parameters() if p.grad is not None}))
    assert found[0][0] == 1 < found[1][0] < found[2][0]
    for _, gradients in found[1:]:
        assert gradients.keys() == found[0][1].keys()
        for name, gradient in gradients.items():
            assert (gradient - found[0][1][name]).abs().max() < 1e-5


def test_a_task_is_described_and_refuses_what_it_cannot_learn():
    tokens, _ = make("bins", n_cells=3)
    assert Pretraining(tokens.vocabulary).describe()["losses"] == ["sex", "cell_vector"]
    assert Pretraining(tokens.vocabulary, Masking()).losses == ("genes", "sex", "cell_vector")
    assert Pretraining(make("rank")[0].vocabulary).losses == ("genes", "sex", "cell_vector")
    with pytest.raises(ScbinInputError, match="nothing to learn"):
        Pretraining(tokens.vocabulary, loss=Loss(weights={"genes": 0, "sex": 0, "cell_vector": 0}))
    with pytest.raises(ScbinInputError, match="age"):
        Pretraining(tokens.vocabulary, loss=Loss(weights={"age": 1.0}))
    task = Pretraining(tokens.vocabulary)
    network = build_network(tokens.vocabulary, "tiny", vector="pooled")
    pack, targets, _ = asked_at_once(task, tokens)
    with pytest.raises(ScbinInputError, match="count head"):
        task.loss(network, network.backbone.encode(pack), pack, targets)
    genes, values = gene_values(tokens.vocabulary.tables(), tokens.matrix.data, tokens.matrix.indices)
    assert (values[genes < 0] == 0).all()


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        *(("A02", {name: value}) for name, value in (("over", "vocab"), ("positions", None), ("kind", "binary"))),
        *(("A02", {"label_smoothing": value}) for value in (2.0, 1.0, float("nan"))),
        *(("A01", {"weights": value}) for value in (None, {"genes": "1"})),
        ("A02", {"weights": {"genes": np.nan}}),
        ("A01", {"label_smoothing": "0.1"}),
        ("A02", {"sigma": 0.0}),
        ("A03", {"kind": "ordinal", "over": "vocabulary"}),
    ],
    ids=str,
)
def test_a_loss_that_cannot_be_meant_is_refused(code, changes):
    with pytest.raises(ScbinInputError, match=next(iter(changes))) as caught:
        Loss(**changes)
    assert caught.value.code == code
