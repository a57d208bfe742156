"""The tasks of fine-tuning: what is left out, what is asked, and what it costs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from scbin.nn.labels import GeneHead, LabelHead, Target
from scbin.train.labels import Labels, drop_genes
from scbin.train.loop import train
from scbin.train.settings import Finetuning, Training
from scbin.train.task import EVALUATION, Task

TARGETS = [Target("kind", classes=("a", "b", "c")), Target("number", "number")]
PREPARED = {"seed": 1, "epoch": 2, "token_budget": 80}


@pytest.fixture
def labelled(small):
    """Small cells with a class and a number, some unknown, and a network with a head for both."""
    rng = np.random.default_rng(5)
    kinds, numbers = rng.integers(0, 3, 100).astype(float), rng.normal(size=100)
    kinds[10:15], numbers[12:20] = np.nan, np.nan
    network = small.network()
    network.labels = LabelHead(small.vocabulary, 16, TARGETS)
    torch.nn.init.normal_(network.labels.genes, std=0.1)
    return small.tokens, network, (kinds, numbers)


def losses_of(task, network, batch):
    total = torch.zeros(len(task.losses))
    for pack, targets in batch.packs:
        hidden = network.backbone.encode(pack, task.layer)
        total += task.loss(network, hidden, pack, targets).detach()
    return total.numpy()


def test_dropped_genes_are_a_function_of_seed_epoch_and_cell(small):
    rows, v = small.tokens.matrix, small.vocabulary
    cells = np.array([5, 1, 9])
    one, again = (drop_genes(rows[cells], cells, v, 0.3, key=4) for _ in range(2))
    assert (one != again).nnz == 0
    alone = drop_genes(rows[[1]], np.array([1]), v, 0.3, key=4)
    assert (one[1] != alone[0]).nnz == 0
    assert (one != drop_genes(rows[cells], cells, v, 0.3, key=5)).nnz
    whole, kept = rows[4:], drop_genes(rows[4:], np.arange(4, 100), v, 0.3, key=4)
    genes = [v.is_gene_token(each.data).sum() for each in (kept, whole)]
    assert genes[0] / genes[1] == pytest.approx(0.7, abs=0.03)
    assert (kept.data != 0).sum() - genes[0] == (whole.data != 0).sum() - genes[1]  # control tokens stay
    bare = drop_genes(whole, np.arange(4, 100), v, 0.999, key=4)
    assert (np.add.reduceat(v.is_gene_token(bare.data), bare.indptr[:-1]) >= 1).all()  # and one gene of each cell
    assert drop_genes(whole, np.arange(4, 100), v, 0.0, key=4) is whole


def test_losses_against_torch(labelled):
    tokens, network, values = labelled
    weights = np.array([0.5, 1.0, 2.0])
    how = {"weights": (1.0, 0.5), "class_weights": (weights, np.ones(1))}
    task = Labels(network.labels, tokens.vocabulary, values, Finetuning(gene_dropout=0.0), **how)
    assert isinstance(task, Task) and task.losses == ("kind", "number") and task.weights == (1.0, 0.5)
    network.eval()
    cells = np.arange(8, 30)
    batch = task.prepare(tokens, cells, **PREPARED)
    assert len(batch.packs) > 1 and {cell for pack, _ in batch.packs for cell in pack.cells} == set(cells)
    outputs = np.zeros((100, 4), dtype=np.float32)
    for pack, _ in batch.packs:
        hidden = network.backbone.encode(pack)
        outputs[pack.cells] = network.labels(network.vector(hidden, pack), pack).detach()
    known = cells[np.isfinite(values[0][cells])]
    expected = F.cross_entropy(
        torch.from_numpy(outputs[known, :3]), torch.from_numpy(values[0][known]).long(),
        weight=torch.from_numpy(weights).float(), reduction="sum",
    )  # fmt: skip
    also = cells[np.isfinite(values[1][cells])]
    found = losses_of(task, network, batch)
    np.testing.assert_allclose(found, [expected, ((outputs[also, 3] - values[1][also]) ** 2).sum()], rtol=1e-4)
    np.testing.assert_allclose(batch.counts, [weights[values[0][known].astype(int)].sum(), len(also)])
    network.train()  # with label smoothing: a cell counts by the weight of its own class, whatever others weigh
    truth = torch.from_numpy(values[0][known]).long()
    smooth = F.cross_entropy(torch.from_numpy(outputs[known, :3]), truth, reduction="none", label_smoothing=0.1)
    expected = (smooth * torch.from_numpy(weights)[truth]).sum()
    assert losses_of(task, network, batch)[0] == pytest.approx(float(expected), rel=1e-4)


def test_packs_change_nothing_and_validation_leaves_nothing_out(labelled):
    tokens, network, values = labelled
    task = Labels(network.labels, tokens.vocabulary, values, Finetuning())
    network.eval()
    cells = np.arange(40)
    results = []
    for budget in (100, 100_000):
        batch = task.prepare(tokens, cells, seed=1, epoch=3, token_budget=budget)
        results.append((losses_of(task, network, batch), batch.counts))
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-4)
    np.testing.assert_array_equal(results[0][1], results[1][1])
    n_tokens = sum(p.n_tokens for p, _ in task.prepare(tokens, cells, seed=1, epoch=EVALUATION, token_budget=100).packs)
    assert n_tokens == tokens.matrix[:40].nnz
    assert sum(p.n_tokens for p, _ in batch.packs) < n_tokens


def test_a_description_changes_with_what_is_learned(labelled):
    tokens, network, values = labelled
    task = lambda values=values, settings=None, **how: Labels(
        network.labels, tokens.vocabulary, values, settings or Finetuning(), **how
    ).describe()
    assert task() == task() != task(settings=Finetuning(gene_dropout=0.1))
    assert task() != task(values=(np.roll(values[0], 1), values[1]))
    assert task() != task(class_weights=(np.ones(3) * 2, np.ones(1)))


def test_it_learns_what_is_there_to_learn(small):
    rows = small.tokens.matrix
    first = np.array([rows[i].data[1] if rows[i].nnz else 0 for i in range(100)]) - small.vocabulary.first_gene_id
    kind = np.where(first >= 0, first % 3, np.nan).astype(float)
    network = small.network()
    network.labels = LabelHead(small.vocabulary, 16, TARGETS[:1])
    task = Labels(network.labels, small.vocabulary, [kind], Finetuning(gene_dropout=0.1))
    history = train(
        network, task, small.tokens, Training(epochs=15, learning_rate=3e-2, cells_per_step=32, patience=None),
        device="cpu", progress=False,
    )  # fmt: skip
    validation = history["validation_kind"].dropna()
    assert history["loss_kind"].dropna().iloc[-3:].mean() < 0.7 * history["loss_kind"].dropna().iloc[:3].mean()
    assert np.isfinite(validation).all()


def test_genes_that_are_held_out_are_asked_about_in_validation_only(small):
    values = np.where(np.arange(30) < 24, np.arange(30) % 3, np.nan).astype(float)
    held_out = np.arange(30) % 5 == 0
    network = small.network()
    network.labels = GeneHead(small.vocabulary, 16, TARGETS[:1])
    task = Labels(network.labels, small.vocabulary, [values], Finetuning(gene_dropout=0.0), held_out=held_out)
    for epoch, wanted in ((0, ~held_out), (EVALUATION, held_out)):
        batch = task.prepare(small.tokens, np.arange(50), seed=0, epoch=epoch, token_budget=200)
        asked = np.concatenate([genes.numpy() for _, (_, genes, _) in batch.packs])
        assert set(asked) == set(np.flatnonzero(wanted & np.isfinite(values))) and batch.counts[0] == len(asked)
    pack, targets = batch.packs[0]
    where, genes, labels = targets
    hidden = network.backbone.encode(pack)
    found = network.labels(hidden[where], genes)
    expected = F.cross_entropy(found, labels[0].long(), reduction="sum")
    network.eval()
    torch.testing.assert_close(task.loss(network, hidden, pack, targets)[0], expected)
    ids = pack.input_ids[where] - small.vocabulary.first_gene_id
    assert (ids == genes).all() and not [name for name, _ in task.named_parameters()]
