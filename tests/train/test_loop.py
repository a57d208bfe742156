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
from scbin.data.masking import MaskingScheme
from scbin.train import loop
from scbin.train.distributed import World
from scbin.train.loop import train
from scbin.train.objective import Objective
from scbin.train.signals import EXIT_RESUMABLE
from scbin.train.step import Stepper, prepare_share


def weights(bert):
    return torch.cat([p.detach().reshape(-1) for p in bert.parameters()])


def run(small, **changes):
    bert = small.bert(hidden_dropout_prob=0.1)
    history = train(bert, small.objective(), small.tokens, small.settings(**changes))
    return bert, history


@pytest.fixture(scope="module")
def undisturbed(small):
    return run(small)


def test_it_learns(small):
    bert = small.bert(hidden_size=64)
    objective = Objective(small.vocabulary, MaskingScheme(phenotype_mask_prob=1.0))
    history = train(bert, objective, small.tokens, small.settings(epochs=50, learning_rate=1e-3))
    assert history["loss_cell_type"].iloc[-10:].mean() < 0.6 * np.log(3)
    assert history["validation_cell_type"].dropna().iloc[-1] < np.log(3)
    assert list(history["step"]) == list(range(len(history)))
    assert not bert.training


def test_the_same_run_twice_has_the_same_bits_and_moves_no_global_generator(small, undisturbed):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    bert, history = run(small)
    assert torch.equal(weights(bert), weights(undisturbed[0]))
    assert torch.equal(state, torch.get_rng_state())
    assert (history["loss"] == undisturbed[1]["loss"]).all()


def test_the_token_budget_changes_nothing_that_is_learned(small):
    found = []
    for budget in (10_000, 400, 60):
        bert = small.bert()
        history = train(bert, small.objective(), small.tokens, small.settings(token_budget=budget, epochs=15))
        found.append((weights(bert), history["loss"].to_numpy()))
    for w, losses in found[1:]:
        assert losses == pytest.approx(found[0][1], abs=2e-6 * found[0][1].max())
        assert (w - found[0][0]).abs().max() < 1e-5


def test_every_cell_once_per_epoch(small, monkeypatch):
    seen = []
    real = loop.prepare_share

    def spy(objective, tokens, cells, *args, **kwargs):
        seen.append((kwargs["epoch"], cells))
        return real(objective, tokens, cells, *args, **kwargs)

    monkeypatch.setattr(loop, "prepare_share", spy)
    run(small, cells_per_step=17)
    held_out = np.concatenate([cells for epoch, cells in seen if epoch == -1])
    for epoch in range(3):
        cells = np.concatenate([c for e, c in seen if e == epoch])
        assert sorted([*cells, *np.unique(held_out)]) == [i for i in range(100) if i != 3]


def test_resume_at_every_step_ends_in_the_same_bits(small, undisturbed, tmp_path):
    n_steps = len(undisturbed[1])
    for stop_after in range(1, n_steps):
        directory = tmp_path / str(stop_after)

        def stop(row, stop_after=stop_after):
            if row["step"] + 1 == stop_after:
                os.kill(os.getpid(), signal.SIGTERM)

        with pytest.raises(SystemExit) as left:
            bert = small.bert(hidden_dropout_prob=0.1)
            train(bert, small.objective(), small.tokens, small.settings(save_dir=directory), on_step=stop)
        assert left.value.code == EXIT_RESUMABLE
        bert, history = run(small, save_dir=directory, resume=True)
        assert torch.equal(weights(bert), weights(undisturbed[0]))
        assert (history["loss"] == undisturbed[1]["loss"]).all()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_ctrl_c_saves_first(small, tmp_path):
    def stop(row):
        if row["step"] == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(small.bert(), small.objective(), small.tokens, small.settings(save_dir=tmp_path), on_step=stop)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000002"]


@pytest.mark.parametrize(("number", "leaves"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_during_the_last_step_is_obeyed(small, tmp_path, number, leaves):
    def stop(row):
        if row["step"] == 3:
            os.kill(os.getpid(), number)

    settings = small.settings(save_dir=tmp_path, max_steps=4)
    with pytest.raises(leaves):
        train(small.bert(), small.objective(), small.tokens, settings, on_step=stop)
    assert (tmp_path / "step-00000004").is_dir()


def test_the_time_of_a_step_has_no_validation_in_it(small, monkeypatch):
    plain = loop._Run.validate
    monkeypatch.setattr(loop._Run, "validate", lambda run: (time.sleep(0.5), plain(run))[1])
    settings = small.settings(max_steps=4, validate_every=2, validation_share=0.2)
    history = train(small.bert(), small.objective(), small.tokens, settings)
    assert history["validation_genes"].notna().sum() == 2
    assert (settings.cells_per_step / history["cells_per_second"]).max() < 0.5


def test_other_threads_train_without_touching_signals(small, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    result = []
    thread = threading.Thread(target=lambda: result.append(run(small, save_dir=tmp_path, epochs=1)))
    thread.start()
    thread.join()
    assert len(result) == 1 and signal.getsignal(signal.SIGTERM) is before


def test_a_finished_run_is_not_run_again_and_another_one_is_refused(small, undisturbed, tmp_path):
    run(small, save_dir=tmp_path)
    bert, history = run(small, save_dir=tmp_path, resume=True)
    assert torch.equal(weights(bert), weights(undisturbed[0])) and len(history) == len(undisturbed[1])
    with pytest.raises(ScbinInputError, match="T34"):
        run(small, save_dir=tmp_path)
    with pytest.raises(ScbinModelError, match=r"settings.learning_rate was 0.003, is 0.1"):
        run(small, save_dir=tmp_path, resume=True, learning_rate=0.1)
    assert len(list(tmp_path.glob("step-*"))) == 2


@pytest.mark.parametrize("where", ["weight", "gradient"])
def test_steps_that_are_not_finite_are_skipped_then_stop_the_run(small, where, monkeypatch):
    bert, names = small.bert(), [f"cell-{i}" for i in range(100)]
    real = loop.Stepper.gradients
    bad_steps = {2, 4}

    def poisoned(self, share, totals, step):
        losses = real(self, share, totals, step)
        if step in bad_steps:
            next(p for p in self.parameters if p.grad is not None).grad[0, 0] = float("nan")
        return losses

    if where == "weight":
        with torch.no_grad():
            bert.cls.predictions.transform.dense.weight[0, 0] = float("inf")
    else:
        monkeypatch.setattr(loop.Stepper, "gradients", poisoned)
        history = train(bert, small.objective(), small.tokens, small.settings(), cell_names=names)
        assert set(history.loc[history["skipped"] == 1, "step"]) == bad_steps
        assert torch.isfinite(weights(bert)).all()
        bad_steps = {0, 3, 4, 5}
        bert = small.bert()
    with pytest.raises(ScbinTrainingError, match=r"T62.*cell-\d+") as stopped:
        train(bert, small.objective(), small.tokens, small.settings(), cell_names=names)
    assert stopped.value.code == "T62"


def test_out_of_memory_halves_the_budget_and_learns_the_same(small, undisturbed, tmp_path, monkeypatch):
    real = loop.Stepper.gradients
    failures = [2]

    def short_of_memory(self, share, totals, step):
        if step == 1 and failures[0]:
            failures[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, share, totals, step)

    bert = small.bert()
    plain = train(small.bert(), small.objective(), small.tokens, small.settings())
    monkeypatch.setattr(loop.Stepper, "gradients", short_of_memory)
    with pytest.warns(ScbinTrainingWarning, match="T61"):
        history = train(bert, small.objective(), small.tokens, small.settings(token_budget=1600, save_dir=tmp_path))
    assert history["loss"].to_numpy() == pytest.approx(plain["loss"].to_numpy(), rel=1e-6)
    assert '"token_budget": 400' in next(tmp_path.glob("step-*")).joinpath("state.json").read_text()


def test_a_cell_that_does_not_fit_is_named_by_its_length(small, monkeypatch):
    def never(self, share, totals, step):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(loop.Stepper, "gradients", never)
    with warnings.catch_warnings(), pytest.raises(ScbinTrainingError, match=r"T60.*one cell of \d+ tokens"):
        warnings.simplefilter("ignore", ScbinTrainingWarning)
        train(small.bert(), small.objective(), small.tokens, small.settings())


def test_gradient_checkpointing_and_half_precision(small):
    plain, _ = run(small, epochs=1)
    checked, _ = run(small, epochs=1, gradient_checkpointing=True)
    assert (weights(plain) - weights(checked)).abs().max() < 1e-6
    _, history = run(small, epochs=1, precision="bfloat16")
    assert np.isfinite(history["loss"]).all() and not history["skipped"].any()


@pytest.mark.gpu
def test_cuda_skips_steps_that_are_not_finite(small, monkeypatch):
    """There the optimiser itself skips, and the host hears of it one step later."""
    real, bad_steps = loop.Stepper.gradients, {2, 4}

    def poisoned(self, share, totals, step):
        losses = real(self, share, totals, step)
        if step in bad_steps:
            next(p for p in self.parameters if p.grad is not None).grad[0, 0] = float("nan")
        return losses

    monkeypatch.setattr(loop.Stepper, "gradients", poisoned)
    bert = small.bert()
    history = train(bert, small.objective(), small.tokens, small.settings(device="cuda"))
    assert set(history.loc[history["skipped"] == 1, "step"]) == bad_steps
    assert torch.isfinite(weights(bert)).all()
    bad_steps = {3, 4, 5}
    with pytest.raises(ScbinTrainingError, match="T62"):
        train(small.bert(), small.objective(), small.tokens, small.settings(device="cuda"))


@pytest.mark.gpu
def test_cuda_waits_for_nothing_inside_a_step(small):
    device = torch.device("cuda", 0)
    bert, objective = small.bert().to(device).train(), small.objective().to(device)
    stepper = Stepper(bert, objective, World(), device, torch.bfloat16, 0)
    share = prepare_share(objective, small.tokens, np.arange(40, 80), World(), seed=0, epoch=0, token_budget=400)
    stepper.gradients(share, share.counts, 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        stepper.gradients(share, share.counts, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_cuda_learns_what_the_cpu_learns(small):
    found = []
    for device in ("cpu", "cuda"):
        bert = small.bert()
        history = train(bert, small.objective(), small.tokens, small.settings(device=device, precision="float32"))
        found.append((weights(bert).cpu(), history["loss"].to_numpy()))
    assert found[0][1] == pytest.approx(found[1][1], abs=1e-3)
    history = train(small.bert(), small.objective(), small.tokens, small.settings(device="cuda", precision="bfloat16"))
    assert history["loss"].to_numpy() == pytest.approx(found[0][1], rel=0.05)
    assert "mfu" in history or "H" not in torch.cuda.get_device_name()
