from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from scbin._errors import ScbinInputError
from scbin.data.masking import MaskingScheme
from scbin.encoding.bins import Bins
from scbin.encoding.vocabulary import Vocabulary
from scbin.nn.bert import build_bert, encode_pack
from scbin.train.distributed import World
from scbin.train.objective import MaskedLoss, Objective
from scbin.train.step import Stepper, prepare_share, private_generators
from scbin.train.terms import Denoising


def dense_losses(bert, pack, targets, n_tasks, loss):
    """Losses per task from the full logits of stock BERT, cell by cell, in float64."""
    double = build_like(bert).double().requires_grad_(False)
    logits = []
    for a, b in zip(pack.cu_seqlens[:-1], pack.cu_seqlens[1:], strict=True):
        ids, positions = (torch.from_numpy(x[a:b])[None] for x in (pack.input_ids, pack.position_ids))
        logits.append(double(input_ids=ids, position_ids=positions).logits[0])
    logits = torch.cat(logits)[torch.from_numpy(targets.where)]
    sums = np.zeros(n_tasks)
    for row, label, start, stop, task in zip(
        logits, targets.labels, targets.start, targets.stop, targets.task, strict=True
    ):
        inside = row if loss.over == "vocabulary" else row[start:stop]
        y = int(label if loss.over == "vocabulary" else label - start)
        log_p = torch.log_softmax(inside, 0)
        target = torch.nn.functional.one_hot(torch.tensor(y), len(inside)).double()
        if task == 0 and loss.kind == "ordinal":
            target = torch.softmax(-((torch.arange(len(inside)) - y) ** 2).double() / (2 * loss.sigma**2), 0)
        elif task > 0 or loss.kind == "cross_entropy":
            target = (1 - loss.label_smoothing) * target + loss.label_smoothing / len(inside)
        sums[task] -= float((target * log_p).sum())
    return sums


def build_like(bert):
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(**{**bert.config.to_dict(), "attn_implementation": "eager"})
    other = BertForMaskedLM(config).eval()
    other.load_state_dict(bert.state_dict())
    return other


def data(encoding, n_cells=12):
    rng = np.random.default_rng(0)
    genes = [f"G{i}" for i in range(12)]
    bins = None if encoding == "rank" else Bins((0.1,) if encoding == "binary" else (0.1, 1.0, 2.0))
    v = Vocabulary.build(encoding, genes, phenotypes={"sex": ["f", "m"]}, bins=bins, max_length=20)
    rows = np.zeros((n_cells, v.n_positions), dtype=v.dtype)
    rows[:, 0], rows[:, 1], rows[:, 2] = v.specials["[CLS]"], v.phenotypes[0].first_id, v.specials["[START]"]
    for row in rows:
        if encoding == "rank":
            row[3:9] = v.first_gene_id + rng.permutation(12)[:6]
        else:
            level = rng.integers(0, v.n_levels, 12)
            row[v.gene_positions] = np.where(level, v.group_start[v.gene_positions] + level, 0)
    return csr_matrix(rows), v


@pytest.mark.parametrize("encoding", ["rank", "bins", "binary", "gene_bins"])
@pytest.mark.parametrize(
    "kwargs", [{}, {"label_smoothing": 0.3}, {"kind": "ordinal"}, {"kind": "binary"}, {"over": "vocabulary"}]
)
def test_losses_equal_those_of_dense_logits(encoding, kwargs):
    tokens, v = data(encoding)
    loss = MaskedLoss(**kwargs)
    if (kwargs.get("kind") == "ordinal" and encoding == "rank") or (
        kwargs.get("kind") == "binary" and encoding != "binary"
    ):
        with pytest.raises(ScbinInputError, match="T41"):
            Objective(v, loss=loss)
        return
    objective = Objective(v, MaskingScheme(0.4), loss)
    bert = build_bert(v, "tiny", num_hidden_layers=1).eval()
    pack, targets = objective.rows(tokens, np.arange(12), 0, 0)
    batch = objective.batch(pack, targets, np.arange(12), torch.device("cpu"))
    hidden = encode_pack(bert, batch.input_ids, batch.position_ids, batch.layout)
    sums = objective.masked_sums(bert, hidden, batch).detach().numpy()
    expected = dense_losses(bert, pack, targets, len(objective.tasks), loss)
    assert objective.counts(targets)[0] > 10
    assert sums == pytest.approx(expected, rel=1e-5)


def test_class_weights_divide_by_their_sum():
    tokens, v = data("bins")
    tokens = tokens.tolil()
    tokens[::2, 1] = v.phenotypes[0].first_id + 1
    tokens = tokens.tocsr()
    objective = Objective(v, MaskingScheme(0.0, 1.0), MaskedLoss(class_weights={"sex": [0.5, 2.0]}))
    bert = build_bert(v, "tiny", num_hidden_layers=1).eval()
    pack, targets = objective.rows(tokens, np.arange(12), 0, 0)
    batch = objective.batch(pack, targets, np.arange(12), torch.device("cpu"))
    hidden = encode_pack(bert, batch.input_ids, batch.position_ids, batch.layout)
    got = objective.masked_sums(bert, hidden, batch)[1] / objective.counts(targets)[1]
    first = v.phenotypes[0].first_id
    z = (bert.cls(hidden[batch.where])[:, first : first + 2]).double()
    expected = torch.nn.functional.cross_entropy(z, batch.labels, weight=torch.tensor([0.5, 2.0]).double())
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradients_do_not_depend_on_packs_or_token_budget(small, dropout):
    """One pack; several, with their activations kept; several, twice through the network. The last two even with dropout."""
    found = []
    for budget, size in ((10_000, None), (10_000, 200), (200, None))[bool(dropout) :]:
        bert, objective = small.bert(hidden_dropout_prob=dropout).train(), small.objective()
        stepper = Stepper(bert, objective, World(), torch.device("cpu"), torch.float32, 0)
        share = prepare_share(
            objective, small.tokens, np.arange(10, 40), World(), seed=0, epoch=0, token_budget=budget, pack_tokens=size
        )
        assert (len(share.packs) == 1) == (budget == 10_000 and size is None)
        with private_generators(torch.device("cpu")):
            losses = stepper.gradients(share, share.counts, 3)
        found.append((losses.total, [p.grad.clone() for p in bert.parameters() if p.grad is not None]))
    for total, gradients in found[1:]:
        assert float(total) == pytest.approx(float(found[0][0]), rel=1e-6)
        for x, y in zip(gradients, found[0][1], strict=True):
            assert (x - y).abs().max() < 1e-5 if dropout == 0 else torch.equal(x, y)


def test_parts_equal_the_whole_by_finite_differences(small):
    """The gradient carried into each pack is that of the contrastive loss itself."""
    bert, objective = small.bert().double(), small.objective(masked_weight=0.0)
    stepper = Stepper(bert, objective, World(), torch.device("cpu"), torch.float32, 0)
    share = prepare_share(objective, small.tokens, np.arange(10, 30), World(), seed=0, epoch=0, token_budget=150)
    weight = bert.bert.encoder.layer[0].output.dense.weight
    base = stepper.gradients(share, share.counts, 0)
    gradient = weight.grad.clone()
    direction = torch.randn_like(weight)
    step = 1e-2
    with torch.no_grad():
        weight += step * direction
        up = stepper.gradients(share, share.counts, 0).total
        weight -= 2 * step * direction
        down = stepper.gradients(share, share.counts, 0).total
    assert float((up - down) / (2 * step)) == pytest.approx(float((gradient * direction).sum()), rel=5e-3)
    assert float(base.total) > 0


def test_unknown_tasks_are_refused(small):
    with pytest.raises(ScbinInputError, match="T40"):
        Objective(small.vocabulary, loss=MaskedLoss(task_weights={"age": 1.0}))


def test_what_a_run_is_known_by_holds_nothing_that_another_machine_computes_otherwise(small):
    """A run that started on one kind of processor goes on on another, where sums differ in their last digits."""
    targets = np.random.default_rng(0).normal(size=(100, 8))
    weights = np.random.default_rng(1).random(small.vocabulary.n_tokens)
    told = [
        Objective(
            small.vocabulary,
            cell_terms=[Denoising(targets * shake, 0.5)],
            token_weights=weights * shake,
            origin={"gene_table": "svd"},
        ).describe()
        for shake in (1.0, 1 + 1e-6)
    ]
    assert told[0] == told[1]
    other = Objective(small.vocabulary, cell_terms=[Denoising(targets, 0.4)], origin={"gene_table": "svd"}).describe()
    assert other != told[0]


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("A02", {"kind": "ordnal"}),
        ("A02", {"over": "vocab"}),
        ("A02", {"kind": None}),
        ("A01", {"label_smoothing": "0.1"}),
        ("A01", {"sigma": None}),
        ("T68", {"label_smoothing": 2.0}),
        ("T68", {"label_smoothing": float("nan")}),
        ("T68", {"sigma": 0}),
        ("T68", {"sigma": float("inf")}),
        ("A01", {"class_weights": [1, 2]}),
        ("A01", {"class_weights": {"sex": "ab"}}),
        ("A01", {"class_weights": {"sex": [1, "2"]}}),
        ("T68", {"class_weights": {"sex": [1, -1]}}),
        ("T68", {"class_weights": {"sex": np.zeros(2)}}),
        ("A01", {"task_weights": None}),
        ("A01", {"task_weights": {"genes": "1"}}),
        ("T68", {"task_weights": {"genes": -1.0}}),
        ("T68", {"task_weights": {"genes": np.nan}}),
    ],
)
def test_a_loss_that_cannot_be_meant_is_refused(code, changes):
    with pytest.raises(ScbinInputError, match=next(iter(changes))) as caught:
        MaskedLoss(**changes)
    assert caught.value.code == code


@pytest.mark.parametrize("encoding", ["rank", "bins", "gene_bins"])
def test_class_weights_of_another_length_are_refused(encoding):
    _, v = data(encoding)
    sizes = {"genes": 12 if encoding == "rank" else 4, "sex": 2, "specials": v.n_tokens}
    for task, size in sizes.items():
        Objective(v, loss=MaskedLoss(class_weights={task: np.ones(size)}))
        with pytest.raises(ScbinInputError, match=rf"T69.*{task}.* has {size + 1} weights.* has {size} values"):
            Objective(v, loss=MaskedLoss(class_weights={task: [1.0] * (size + 1)}))


def test_smoothing_that_nothing_would_be_smoothed_by_is_refused():
    _, v = data("bins")
    loss = MaskedLoss("ordinal", label_smoothing=0.3)
    Objective(v, loss=loss)  # the phenotype has it
    with pytest.raises(ScbinInputError, match=r"T41.*label_smoothing"):
        Objective(Vocabulary.build("bins", v.genes, bins=v.bins), loss=loss)


def test_a_loss_of_numbers_of_numpy_is_kept_as_plain_ones():
    loss = MaskedLoss(
        np.str_("ordinal"),
        sigma=np.float32(0.5),
        class_weights={"genes": np.ones(2)},
        task_weights={"genes": np.int64(2)},
    )
    assert loss == MaskedLoss("ordinal", sigma=0.5, class_weights={"genes": (1.0, 1.0)}, task_weights={"genes": 2.0})
    assert json.loads(json.dumps(asdict(loss)))["class_weights"] == {"genes": [1.0, 1.0]}
