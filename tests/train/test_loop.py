"""The guarantees of the training loop, with toys in place of network and task."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings

import numpy as np
import pytest
import torch

from scbin._errors import ScbinInputError, ScbinModelError, ScbinTrainingError, ScbinTrainingWarning
from scbin.nn.network import build_network
from scbin.nn.presets import PRESETS
from scbin.train import loop
from scbin.train.distributed import World
from scbin.train.loop import EXIT_RESUMABLE, Trainer, build_optimizer, learning_rate_factor, split_cells
from scbin.train.settings import RECIPES, Training

NUMBERS = ["loss", "loss_token", "validation", "gradient_norm"]


def weights(network):
    return torch.cat([p.detach().reshape(-1) for p in network.parameters()])


def signal_after(step, number=signal.SIGTERM):
    """A callback that sends this process a signal, in a step that is computed."""
    return lambda row: os.kill(os.getpid(), number) if row["step"] == step and ("loss" in row or not step) else None


def trainer_of(small, network, task, device):
    training = small.training()
    return Trainer(network, task, small.tokens, split_cells(small.tokens, training, 0), training, World(), device, 0)


@pytest.fixture(scope="module")
def undisturbed(small):
    return small.run()


def test_it_learns(small):
    network, history = small.run(small.network(), epochs=60)
    validation = history["validation_token"].dropna()
    assert validation.iloc[-1] < 0.5 * validation.iloc[0]
    assert history["step"].tolist() == list(range(len(history))) and history["loss"].isna().sum() == 1
    assert not network.training


def test_the_loss_is_the_sum_over_what_is_asked_by_its_count(small):
    """One step of plain SGD by hand, from all cells in one pack, against the first row of the history."""
    network, task = small.network(), small.task()
    cells, _ = split_cells(small.tokens, Training(held_out=0.0), 0)
    batch = task.prepare(small.tokens, cells, seed=0, epoch=0, token_budget=10**6)
    ((pack, targets),) = batch.packs
    with torch.no_grad():
        sums = task.loss(network, network.backbone.encode(pack), pack, targets)
    expected = (sums * torch.tensor(task.weights)).sum() / len(cells)
    _, history = small.run(network, task=task, held_out=0.0, cells_per_step=200, token_budget=100, max_steps=1)
    assert history["loss"].iloc[-1] == pytest.approx(float(expected), rel=1e-6)


def test_the_same_run_twice_has_the_same_bits_and_moves_no_global_generator(small, undisturbed):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    network, history = small.run()
    assert torch.equal(weights(network), weights(undisturbed[0]))
    assert torch.equal(state, torch.get_rng_state())
    assert history[NUMBERS].equals(undisturbed[1][NUMBERS])
    assert not torch.equal(weights(small.run(seed=1)[0]), weights(network))


@pytest.mark.parametrize("kind", ["network", "bert"])
def test_the_token_budget_changes_nothing_that_is_learned(small, kind):
    found = [small.run(getattr(small, kind)(), token_budget=budget, epochs=10) for budget in (10_000, 200, 30)]
    for network, history in found[1:]:
        assert history["loss"].to_numpy() == pytest.approx(found[0][1]["loss"].to_numpy(), rel=2e-5, nan_ok=True)
        assert (weights(network) - weights(found[0][0])).abs().max() < 1e-5


def test_gradients_are_those_of_the_whole_step(small):
    """Through the loop in packs of any size, against one backward pass over all cells."""
    network, task = small.network(), small.task()
    trainer = trainer_of(small, network, task, torch.device("cpu"))
    epoch, cells = next(trainer.steps_left())
    found = []
    for trainer.budget in (10**6, 60):
        batch = trainer.prepare(cells, epoch)
        trainer.summed(batch, cells, epoch, 1 / batch.counts)
        found.append(torch.cat([p.grad.reshape(-1) for p in trainer.parameters]))
    assert len(batch.packs) > 5 and (found[0] - found[1]).abs().max() < 1e-6 * found[0].abs().max() + 1e-7


def test_every_cell_once_per_epoch_and_held_out_ones_never(small, monkeypatch):
    seen = []
    task = small.task()
    real = task.prepare

    def spy(tokens, cells, **how):
        seen.append((how["epoch"], cells))
        return real(tokens, cells, **how)

    monkeypatch.setattr(task, "prepare", spy)
    small.run(task=task, cells_per_step=17, held_out=0.2)
    held_out = np.unique(np.concatenate([cells for epoch, cells in seen if epoch == -1]))
    assert 10 < len(held_out) < 30
    orders = [np.concatenate([c for e, c in seen if e == epoch]) for epoch in range(3)]
    for cells in orders:
        assert sorted([*cells, *held_out]) == [i for i in range(100) if i != 3]
    assert not np.array_equal(orders[0], orders[1])


def test_cells_and_held_out_cells_can_be_named(small, monkeypatch):
    cells, held_out = split_cells(small.tokens, Training(), 0, np.arange(50), np.array([1, 3, 60]))
    assert held_out.tolist() == [1, 60] and set(cells) == set(range(50)) - {1, 3}
    many = split_cells(small.tokens, Training(held_out=0.5), 0)[1]
    monkeypatch.setattr(loop, "_MOST_HELD_OUT", 10)
    few = split_cells(small.tokens, Training(held_out=0.5), 0)[1]
    assert len(many) > 35 and len(few) < 25 and set(few) <= set(many)
    with pytest.raises(ScbinInputError, match="I47"):
        split_cells(small.tokens, Training(), 0, np.array([3]))


# ---- interrupted ------------------------------------------------------------------------------------------------------


def test_resume_at_every_step_ends_in_the_same_bits(small, undisturbed, tmp_path):
    for stop_after in range(len(undisturbed[1]) - 1):
        directory = tmp_path / str(stop_after)
        with pytest.raises(SystemExit) as left:
            small.run(save_dir=directory, callbacks=[signal_after(stop_after)])
        assert left.value.code == EXIT_RESUMABLE
        assert max(path.name for path in directory.glob("step-*")) == f"step-{stop_after:08d}"
        network, history = small.run(save_dir=directory)
        assert torch.equal(weights(network), weights(undisturbed[0]))
        assert history[NUMBERS].equals(undisturbed[1][NUMBERS])
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_early_stopping_survives_an_interruption(small, tmp_path):
    how = {"epochs": 40, "learning_rate": 0.3, "patience": 3, "validate_every": 2, "held_out": 0.2}
    whole, full = small.run(**how)
    assert len(full) < 100
    with pytest.raises(SystemExit):
        small.run(save_dir=tmp_path, callbacks=[signal_after(len(full) - 3)], **how)
    for _ in range(2):  # goes on, then finds that it is finished
        network, history = small.run(save_dir=tmp_path, **how)
        assert torch.equal(weights(network), weights(whole)) and history[NUMBERS].equals(full[NUMBERS])


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("number", "leaves"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGUSR1, SystemExit)])
def test_a_signal_saves_first_and_is_obeyed_also_in_the_last_step(small, tmp_path, number, leaves, last):
    with pytest.raises(leaves):
        small.run(save_dir=tmp_path, max_steps=4 if last else 9, callbacks=[signal_after(4, number)])
    assert max(path.name for path in tmp_path.glob("step-*")) == "step-00000004"


def test_a_finished_run_is_not_run_again_and_another_one_is_refused(small, undisturbed, tmp_path):
    small.run(save_dir=tmp_path)
    network, history = small.run(save_dir=tmp_path)
    assert torch.equal(weights(network), weights(undisturbed[0])) and len(history) == len(undisturbed[1])
    with pytest.raises(ScbinModelError, match=r"T03.*training.learning_rate was 0.003, is 0.1"):
        small.run(save_dir=tmp_path, learning_rate=0.1)
    with pytest.raises(ScbinModelError, match=r"T03.*seed was 0, is 1"):
        small.run(save_dir=tmp_path, seed=1)
    other = type(small)(seed=1)
    with pytest.raises(ScbinModelError, match=r"T03.*data was"):
        small.run(save_dir=tmp_path, tokens=other.tokens)
    small.run(save_dir=tmp_path, token_budget=100, checkpoint_every=3)  # what changes nothing may change
    assert len(list(tmp_path.glob("step-*"))) == 2


def test_other_threads_train_without_touching_signals(small, tmp_path):
    before, result = signal.getsignal(signal.SIGTERM), []
    thread = threading.Thread(target=lambda: result.append(small.run(save_dir=tmp_path, epochs=1)))
    thread.start()
    thread.join()
    assert len(result) == 1 and signal.getsignal(signal.SIGTERM) is before


# ---- validation and early stopping --------------------------------------------------------------------------------------


def test_the_best_weights_are_kept_and_training_stops_after_patience(small):
    network, task = small.network(), small.task()
    copies = {}

    def watch(row):
        if "validation" in row:
            copies[row["step"]] = weights(network).clone()

    how = {"epochs": 50, "learning_rate": 0.1, "held_out": 0.2, "validate_every": 2, "patience": 3}
    _, history = small.run(network, task=task, callbacks=[watch], **how)
    validation = history.set_index("step")["validation"].dropna()
    best = validation.idxmin()
    assert len(history) - 1 == best + 6 < 200 and best > 0
    assert torch.equal(weights(network), copies[best])


def test_a_start_that_is_best_is_kept(small):
    network = small.network()
    start = weights(network).clone()
    task = small.task()
    task.watched, task.weights = "length", (1.0, 0.0)  # a loss that nothing moves
    task.length.weight.data.zero_()
    _, history = small.run(network, task=task, patience=2, held_out=0.2, validate_every=3)
    assert len(history) - 1 == 6
    assert history["validation"].idxmin() == 0 and torch.equal(weights(network), start)
    assert (history["validation"].dropna() == history["validation_length"].dropna()).all()


def test_the_time_of_a_step_has_no_validation_in_it(small, monkeypatch):
    plain = loop.Trainer.validate
    monkeypatch.setattr(loop.Trainer, "validate", lambda run: (time.sleep(0.3), plain(run))[1])
    _, history = small.run(max_steps=4, validate_every=2, held_out=0.2)
    assert history["validation_token"].notna().sum() == 3
    assert (32 / history["cells_per_second"]).max() < 0.3


def test_a_callback_that_raises_ends_the_run(small):
    def prune(row):
        if row["step"] == 2:
            raise InterruptedError

    network = small.network()
    with pytest.raises(InterruptedError):
        small.run(network, callbacks=[prune])
    assert not network.training and all(p.requires_grad for p in network.parameters())


# ---- what goes wrong ----------------------------------------------------------------------------------------------------


def poisoned(monkeypatch, bad_steps):
    real = Trainer.summed

    def summed(self, *args):
        result = real(self, *args)
        if self.parts.training and self.step + 1 in bad_steps:
            next(p for p in self.parameters if p.grad is not None).grad[0] = float("nan")
        return result

    monkeypatch.setattr(Trainer, "summed", summed)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_steps_that_are_not_finite_are_skipped_then_stop_the_run(small, monkeypatch, device):
    with monkeypatch.context() as patch:
        poisoned(patch, {2, 4})
        network, history = small.run(device=device)
    assert set(history.loc[history["skipped"] == 1, "step"]) == {2, 4}
    assert torch.isfinite(weights(network)).all() and history["gradient_norm"].isna().sum() == 3  # and at the start
    poisoned(monkeypatch, {1, 4, 5, 6})
    with pytest.raises(ScbinTrainingError, match=r"T01.*cells of the last one: \d+, \d+") as stopped:
        small.run(device=device)
    assert stopped.value.code == "T01"


def test_weights_that_are_not_finite_stop_the_run(small, tmp_path):
    network = small.network()
    with torch.no_grad():
        network.backbone.mix.weight[0, 0] = float("inf")
    with pytest.raises(ScbinTrainingError, match="T01"):
        small.run(network)


def test_out_of_memory_halves_the_budget_and_learns_the_same(small, monkeypatch):
    plain, expected = small.run(small.network())
    failures, budgets, real = [torch.OutOfMemoryError("CUDA out of memory.")] * 2, [], Trainer.losses_of

    def losses_of(self, packed):
        budgets.append(self.budget)
        if self.parts.training and failures:
            raise failures.pop()
        return real(self, packed)

    monkeypatch.setattr(Trainer, "losses_of", losses_of)
    with pytest.warns(ScbinTrainingWarning, match=r"T02.*at most \d+ tokens"):
        network, history = small.run(small.network(), token_budget=800)
    assert budgets[0] == 800 and 50 < budgets[-1] <= 200
    assert history["loss"].to_numpy() == pytest.approx(expected["loss"].to_numpy(), rel=1e-5, nan_ok=True)
    assert (weights(network) - weights(plain)).abs().max() < 1e-5
    failures += [RuntimeError("DefaultCPUAllocator: can't allocate memory")] * 1000
    with warnings.catch_warnings(), pytest.raises(ScbinTrainingError, match=r"T02.*one cell of \d+ tokens"):
        warnings.simplefilter("ignore", ScbinTrainingWarning)
        small.run()


def test_an_error_in_the_thread_that_prepares_is_raised_here(small, monkeypatch):
    task, real = small.task(), small.task().prepare

    def broken(tokens, cells, *, epoch, **how):
        if epoch == 1:
            raise OSError("disk gone")
        return real(tokens, cells, epoch=epoch, **how)

    monkeypatch.setattr(task, "prepare", broken)
    with pytest.raises(OSError, match="disk gone"):
        small.run(task=task)


# ---- the optimiser -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 0.1, 10])
def test_schedules_equal_those_of_transformers(name, warmup):
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    n_warm = 10 if warmup else 0
    scheduler = get_scheduler(name, optimizer, n_warm, 100)
    for step in range(100):
        theirs = scheduler.get_last_lr()[0]
        ours = learning_rate_factor(step, 100, Training(warmup=warmup, schedule=name))
        # ours rises to the peak at the end of the warm-up, theirs one step later: no step is spent on a rate of zero
        assert ours == pytest.approx(theirs + (1 / 10 if step < n_warm else 0), abs=1e-6)
        optimizer.step()
        scheduler.step()


def test_groups_of_decay_and_rate(small):
    network = build_network(small.vocabulary, "tiny")
    named = {f"network.{name}": p for name, p in network.named_parameters()}
    groups = build_optimizer(named, 1.0, 0.1).param_groups
    found = {id(p): (group["factor"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert found[id(network.backbone.tokens.weight)] == (1.0, 0.1)
    assert found[id(network.backbone.norm.weight)] == (1.0, 0.0)
    assert found[id(network.counts.loadings)] == (5.0, 0.1) and found[id(network.counts.scale)] == (5.0, 0.0)
    assert len(found) == len(named)


def test_half_precision_and_biases_of_keys(small):
    start, plain = small.bert(), small.bert()
    small.run(plain, epochs=1)
    bias = "backbone.bert.bert.encoder.layer.0.attention.self.key.bias"  # its gradient is nothing but rounding
    assert torch.equal(plain.state_dict()[bias], start.state_dict()[bias])
    assert all(p.requires_grad for p in plain.parameters())
    _, history = small.run(small.bert(), epochs=1, precision="bfloat16")
    assert np.isfinite(history["loss"].iloc[1:]).all() and not history["skipped"].any()


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        *(("A02", {name: 0}) for name in ("epochs", "cells_per_step", "token_budget", "patience", "clip")),
        *(("A02", {name: -1.0}) for name in ("learning_rate", "warmup", "weight_decay", "timeout")),
        *(("A02", {name: float("nan")}) for name in ("learning_rate", "clip", "held_out")),
        ("A02", {"held_out": 1.0}),
        ("A02", {"max_steps": -1}),
        ("A02", {"schedule": "steps"}),
        ("A02", {"precision": "float8"}),
        *(("A01", {name: "3"}) for name in ("epochs", "learning_rate", "callbacks", "timeout")),
        ("A01", {"epochs": 1.5}),
        ("A01", {"cells_per_step": True}),
    ],
    ids=str,
)
def test_settings_are_checked(code, arguments):
    with pytest.raises(ScbinInputError) as caught:
        Training(**arguments)
    assert caught.value.code == code


def test_settings_are_filled_in_where_nothing_was_chosen():
    training = Training(epochs=np.int64(3), clip=float("inf")).filled(epochs=5, learning_rate=1e-4, clip=1.0)
    assert (training.epochs, training.learning_rate, training.clip) == (3, 1e-4, float("inf"))
    assert type(training.epochs) is int and training.complete().schedule == "cosine"
    with_recipe = Training(cells_per_step=256).for_preset("tiny", 20_000)
    assert (with_recipe.epochs, with_recipe.cells_per_step, with_recipe.learning_rate) == (19, 256, 1e-3)
    assert Training(epochs=50).for_preset("custom", 10) == Training(epochs=50).complete()
    assert set(RECIPES) == set(PRESETS) and all(Training(**recipe) for recipe in RECIPES.values())
    assert "callbacks" not in training.learned() and "token_budget" not in training.learned()


# ---- on a GPU ------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["network", "bert"])
def test_cuda_waits_for_nothing_inside_a_step(small, kind):
    device, network, task = torch.device("cuda", 0), getattr(small, kind)(), small.task()
    trainer = trainer_of(small, network, task, device)
    epoch, cells = next(trainer.steps_left())
    batch = trainer.prepare(cells, epoch)
    trainer.summed(batch, cells, epoch, 1 / batch.counts)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.summed(batch, cells, epoch, 1 / batch.counts)
        trainer.optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["network", "bert"])
def test_cuda_learns_what_the_cpu_learns(small, kind):
    found = {}
    for name in ("cpu", "cuda"):
        network, history = small.run(getattr(small, kind)(), device=name, precision="float32")
        found[name] = history["loss"].to_numpy()
        assert next(network.parameters()).device.type == "cpu"
    assert found["cuda"] == pytest.approx(found["cpu"], abs=1e-2, nan_ok=True)
    _, history = small.run(getattr(small, kind)(), device="cuda", precision="bfloat16")
    assert history["loss"].to_numpy() == pytest.approx(found["cpu"], rel=0.05, nan_ok=True)
