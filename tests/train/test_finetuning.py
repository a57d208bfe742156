"""Fine-tuning over arrays: what is learned, what must not matter, and that the start is never lost."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from scbin._errors import ScbinInputError
from scbin.nn.embedding import hide_phenotypes, pooling_weights
from scbin.nn.heads import HeadPlan, Target, build_head
from scbin.nn.prediction import answer_cells
from scbin.train.answers import AnswerObjective, Answers
from scbin.train.best import Best
from scbin.train.finetuning import Tuning, finetune_tokens
from scbin.train.loop import train
from scbin.train.starting import ConvexStart, Lesson

PLAN = HeadPlan("wide", (Target("kind", classes=("a", "b", "c")), Target("size", "number")))
QUIET = Tuning(gene_drop=0.2, label_smoothing=0.05)


@pytest.fixture(scope="module")
def lesson(small):
    vocabulary = small.vocabulary
    slot = vocabulary.phenotypes[0]
    tokens = small.tokens
    kind = tokens[:, slot.position].toarray().ravel().astype(float) - slot.first_id
    kind[kind < 0] = np.nan
    size = np.diff(tokens.indptr).astype(float)
    size = (size - size.mean()) / size.std()
    size[::7] = np.nan
    cells = np.delete(np.arange(100), 3)
    weights = pooling_weights(vocabulary, "weighted")
    answers = Answers((kind, size), (1.0, 0.5), (None, None))
    return Lesson(hide_phenotypes(tokens, vocabulary), vocabulary, weights, answers, cells[20:], cells[:20])


def run(small, lesson, plan=PLAN, tuning=QUIET, bert=None, **settings):
    settings = small.settings(**{"epochs": 2, "patience": 5, "learning_rate": 1e-3, **settings})
    return finetune_tokens(small.bert() if bert is None else bert, plan, lesson, tuning, settings)


def outputs(result, lesson):
    return answer_cells(result.bert, result.head, lesson.tokens, lesson.vocabulary, lesson.weights, device="cpu")


def flat(result):
    modules = (result.bert, result.head)
    return torch.cat([p.detach().reshape(-1) for module in modules for p in module.parameters()])


def test_it_learns_what_is_there_to_learn(small, lesson):
    result = run(small, lesson)
    out = outputs(result, lesson)
    kind, size = lesson.answers.values
    assert (out[:, :3].argmax(1) == kind)[lesson.held_out].mean() > 0.8
    known = lesson.held_out[np.isfinite(size[lesson.held_out])]
    assert np.corrcoef(out[known, 3], size[known])[0, 1] > 0.8
    assert {"validation_kind", "validation_size", "loss_kind"} <= set(result.history.columns)


def test_the_start_is_a_fit_to_all_cells_where_training_does_not_help(small, lesson):
    bert = small.bert()
    before = copy.deepcopy(bert.state_dict())
    result = run(small, lesson, bert=bert, learning_rate=1.0)
    assert result.report["start_kept"]
    assert all(torch.equal(before[name], tensor) for name, tensor in result.bert.state_dict().items())
    whole = ConvexStart(small.bert(), lesson, PLAN, device="cpu").head(np.delete(np.arange(100), 3))
    np.testing.assert_allclose(result.head.genes.detach(), whole.genes.detach(), atol=1e-6)


def test_donors_are_judged_by_others(small, lesson):
    donors = np.repeat(["a", "b", "c", "d", "e"], 20)
    start = ConvexStart(small.bert(), replace(lesson, groups=donors), PLAN, device="cpu")
    folds = start._folds(0, lesson.training)
    here = donors[lesson.training]
    assert len(np.unique(folds)) == 4 and all(len(np.unique(folds[here == name])) == 1 for name in np.unique(here))
    one = ConvexStart(small.bert(), replace(lesson, groups=np.repeat("a", 100)), PLAN, device="cpu")
    assert len(np.unique(one._folds(0, lesson.training))) == 4


def test_pretrained_weights_count(small, lesson):
    other = small.bert()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    here, there = (run(small, lesson, bert=bert, tuning=replace(QUIET, train=False)) for bert in (small.bert(), other))
    assert not torch.allclose(here.head.output.weight, there.head.output.weight)
    for result, bert in ((here, small.bert()), (there, other)):
        assert all(torch.equal(bert.state_dict()[n], t) for n, t in result.bert.state_dict().items())


def test_neither_packs_nor_order_nor_checkpoints_change_what_is_learned(small, lesson, tmp_path):
    one = run(small, lesson)
    packed = run(small, lesson, token_budget=40)
    torch.testing.assert_close(flat(packed), flat(one), atol=2e-4, rtol=0)
    saved = run(small, lesson, save_dir=tmp_path)
    assert torch.equal(flat(saved), flat(one))


def test_a_stopped_run_goes_on_as_if_it_had_not_been(small, lesson, tmp_path):
    def once(**settings):
        bert, head = small.bert(), build_head(PLAN, 16, 30, seed=1)
        objective = AnswerObjective(head, lesson.vocabulary, lesson.weights, lesson.answers)
        cells = np.concatenate([lesson.training, lesson.held_out])
        plain = small.settings(**{"epochs": 4, "patience": 2, "schedule": "constant", "warmup": 0, **settings})
        history = train(bert, objective, lesson.tokens, plain, cells=cells, held_out=lesson.held_out)
        return history, torch.cat([p.detach().reshape(-1) for m in (bert, head) for p in m.parameters()])

    whole, weights = once()
    stop = RuntimeError("killed")

    def kill(row):
        if row["step"] == 6:
            raise stop

    bert, head = small.bert(), build_head(PLAN, 16, 30, seed=1)
    objective = AnswerObjective(head, lesson.vocabulary, lesson.weights, lesson.answers)
    settings = small.settings(
        epochs=4, patience=2, schedule="constant", warmup=0, save_dir=tmp_path, checkpoint_every=2
    )
    with pytest.raises(RuntimeError, match="killed"):
        train(
            bert, objective, lesson.tokens, settings, cells=np.concatenate([lesson.training, lesson.held_out]),
            held_out=lesson.held_out, on_step=kill,
        )  # fmt: skip
    resumed, again = once(save_dir=tmp_path, checkpoint_every=2, resume=True)
    assert torch.equal(again, weights) and len(resumed) == len(whole)


def test_the_best_state_comes_back_and_the_run_stops():
    layer = torch.nn.Linear(2, 2)
    best = Best({"net": layer}, {"a": 1.0, "b": 3.0}, patience=2)
    states = []
    for a, b in [(1.0, 1.0), (0.0, 0.9), (5.0, 5.0), (0.7, 0.7)]:
        states.append(layer.weight.detach().clone())
        best.look({"validation_a": a, "validation_b": b})
        assert best.exhausted is (len(states) == 4 and best.loss == 0.675)
        with torch.no_grad():
            layer.weight.add_(1)
    best.restore()
    assert best.loss == pytest.approx(0.675) and torch.equal(layer.weight, states[1])


def test_frozen_layers_stay_and_rest_no_longer_afterwards(small, lesson):
    bert = small.bert(num_hidden_layers=2)
    before = {name: p.detach().clone() for name, p in bert.named_parameters()}
    plan = HeadPlan("mlp", PLAN.targets)
    result = run(small, lesson, plan=plan, tuning=replace(QUIET, freeze=1), bert=bert, patience=None)
    moved = {name for name, p in result.bert.named_parameters() if not torch.equal(p, before[name])}
    assert not any("layer.0." in name for name in moved) and any("layer.1." in name for name in moved)
    assert any("word_embeddings" in name for name in moved)
    assert all(p.requires_grad for p in result.bert.parameters())


def test_adapters_are_merged_and_gone(small, lesson):
    pytest.importorskip("peft")
    bert = small.bert()
    names = set(bert.state_dict())
    before = {name: p.detach().clone() for name, p in bert.named_parameters()}
    plan = HeadPlan("mlp", PLAN.targets)
    result = run(small, lesson, plan=plan, tuning=replace(QUIET, lora={"r": 2}), bert=bert, patience=None)
    assert set(result.bert.state_dict()) == names
    moved = {name for name, p in result.bert.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(name.endswith(("query.weight", "value.weight")) for name in moved)
    assert all(p.requires_grad for p in result.bert.parameters())
    with pytest.raises(ScbinInputError, match="F06"):
        run(small, lesson, plan=plan, tuning=replace(QUIET, lora={"rank": 2}))


@pytest.mark.parametrize("design", ["pooler", "attention", "linear"])
def test_other_designs_learn_too(small, lesson, design):
    result = run(small, lesson, plan=HeadPlan(design, PLAN.targets), epochs=1)
    assert np.isfinite(outputs(result, lesson)[lesson.held_out]).all()


def test_a_random_head_cannot_go_untrained(small, lesson):
    with pytest.raises(ScbinInputError, match="F07"):
        run(small, lesson, plan=HeadPlan("mlp", PLAN.targets), tuning=replace(QUIET, train=False))


def test_genes_that_are_held_out_are_not_learned_from(small, lesson):
    labels = np.where(np.arange(30) < 24, np.arange(30) % 3 > 0, np.nan).astype(float)
    held_out = np.arange(30) % 4 == 0
    plan = HeadPlan("gene", (Target("tf", "gene", ("no", "yes")),))
    genes = replace(lesson, answers=Answers((labels,), (1.0,), (None,)), held_out_genes=held_out)
    head = build_head(plan, 16, 30)
    objective = AnswerObjective(
        head, genes.vocabulary, genes.weights, genes.answers, held_out_genes=held_out, gene_drop=0.0
    )
    pack, targets = objective.rows(genes.tokens, genes.training[:8], 0, 0)
    first = genes.vocabulary.first_gene_position
    asked = pack.position_ids[targets.where] - first
    assert not held_out[asked].any() and (asked < 24).all() and len(asked) > 20
    _, targets = objective.rows(genes.tokens, genes.training[:8], 0, -1)
    pack, _ = objective.rows(genes.tokens, genes.training[:8], 0, -1)
    assert held_out[pack.position_ids[targets.where] - first].all()
    result = run(small, genes, plan=plan, epochs=1)
    assert np.isfinite(result.history["loss_tf"]).all()


def test_balanced_sampling_draws_classes_alike(small, lesson):
    values = np.where(np.arange(100) < 90, 0.0, 1.0)
    head = build_head(HeadPlan("wide", (Target("kind", classes=("a", "b")),)), 16, 30)
    answers = Answers((values,), (1.0,), (None,))
    objective = AnswerObjective(head, lesson.vocabulary, lesson.weights, answers, sampling="balanced")
    drawn = objective.order(np.arange(100), 0, 0)
    assert len(drawn) == 100 and 30 < (drawn >= 90).sum() < 70
    assert (drawn == objective.order(np.arange(100)[::-1], 0, 0)).all()
