from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import anndata as ad
import matplotlib.pyplot as plt
import pandas as pd
import pytest

import scbin
import scbin.pl
import scbin.pp
import scbin.tl
from scbin._errors import ScbinInputError, ScbinInputWarning
from scbin.cli import VERBS, main


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip() == f"scbin {scbin.__version__}"


@pytest.fixture
def quick(monkeypatch):
    """Stand-ins for tokenizing, training and pictures: the command is what is tested here."""
    asked = {}

    def pretrain(adata, **arguments):
        asked.update(arguments)
        adata.obsm["X_scbin"] = adata.X.toarray()[:, :16]
        return SimpleNamespace(history=pd.DataFrame(), save=lambda path, overwrite: path.mkdir(exist_ok=overwrite))

    monkeypatch.setattr(scbin.pp, "tokenize", lambda adata: None, raising=False)
    monkeypatch.setattr(scbin.tl, "pretrain", pretrain, raising=False)
    monkeypatch.setattr(scbin.pl, "embedding", lambda adata, **_: plt.subplots()[1], raising=False)
    return asked


def test_quickstart_leaves_what_it_promises(quick, tmp_path, capsys):
    out = tmp_path / "deep" / "quickstart"
    assert main(["quickstart", "--out", str(out), "--seed", "7"]) == 0
    assert {path.name for path in out.iterdir()} == {"embedding.png", "adata.h5ad", "model"}
    assert quick == {"preset": "tiny", "device": "auto", "seed": 7}
    printed = capsys.readouterr().out
    assert "PCA, 50 components" in printed and "scbin  " in printed
    assert ad.read_h5ad(out / "adata.h5ad").obsm["X_pca"].shape == (700, 50)


def test_errors_are_one_line_without_a_traceback(quick, tmp_path, monkeypatch, capsys):
    def fail(adata, **_):
        raise ScbinInputError("A02", "there is no cuda here.")

    monkeypatch.setattr(scbin.tl, "pretrain", fail)
    assert main(["quickstart", "--out", str(tmp_path / "q")]) == 2
    assert capsys.readouterr().err.strip() == "scbin: [A02] there is no cuda here."


def test_what_is_in_the_way_is_refused_before_training(quick, tmp_path, capsys):
    (tmp_path / "here").touch()
    assert main(["quickstart", "--out", str(tmp_path / "here")]) == 2
    assert "File exists" in capsys.readouterr().err
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thesis.txt").write_text("three years")
    assert main(["quickstart", "--out", str(tmp_path)]) == 2
    assert "A04" in capsys.readouterr().err
    assert not quick and (tmp_path / "model" / "thesis.txt").exists()


# ---- the verbs on files ----------------------------------------------------------------------------------------------


@pytest.fixture
def shell(toy, tmp_path, monkeypatch, capsys):
    """An empty folder with three shards, and the command, which returns its status and what it printed."""
    monkeypatch.chdir(tmp_path)
    for k in range(3):
        toy[20 * k : 20 * k + 20].copy().write_h5ad(f"shard_{k}.h5ad")

    def run(*words, status=0):
        capsys.readouterr()
        found = main([str(word) for word in words])
        printed = capsys.readouterr()
        assert found == status, printed.err
        return printed.out if status == 0 else printed.err

    return run


QUIET = ("--device", "cpu", "--progress", "false")


def test_files_from_a_shell(shell, tmp_path):
    """The three commands of the README on three shards, and what can be done with the model."""
    assert "read as counts" in shell("check", "shard_0.h5ad", "--n_genes", 20)
    told = shell("tokenize", "shard_{0..2}.h5ad", "--out", "corpus", "--phenotypes", "[cell_type, sex]")
    assert told.split() == [f"corpus/shard_{k}.h5ad" for k in range(3)]
    small = ("--preset", "tiny", "--max_steps", 2, "--training.cells_per_step", 16)
    shell("pretrain", "corpus", *small, "--out", "model", *QUIET)
    shell("embed", "corpus", "--model", "model", *QUIET)
    shell("predict", "corpus", "--model", "model", *QUIET)
    found = ad.read_h5ad("corpus/scbin/shard_1.h5ad")
    assert found.obsm["X_scbin"].shape == (20, 30) and "scbin_cell_type" in found.obs and found.n_vars == 40
    assert scbin.Model.load("model").training["training"]["cells_per_step"] == 16

    shell("finetune", "corpus", "--model", "model", "--target", "cell_type", "--max_steps", 0, "--out", "tuned", *QUIET)
    with pytest.warns(ScbinInputWarning, match="L04"):
        table = shell("evaluate", "corpus", "--model", "tuned", "--baselines", "false", *QUIET)
        shell(
            "evaluate", "corpus/shard_0.h5ad", "--model", "tuned", "--baselines", "false", "--out", "scores.csv", *QUIET
        )
    assert "macro_f1" in table and "macro_f1" in pd.read_csv("scores.csv")
    shell("perturb", "corpus", "--model", "model", "--genes", "[GENE3, GENE4]", "--out", "moved.h5ad", *QUIET)
    assert ad.read_h5ad("moved.h5ad").layers["scbin_shift"].shape == (60, 40)
    kinds = "{cell_type: B cell}"
    shell("generate", "--model", "model", "--phenotypes", kinds, "--n_cells", 7, "--out", "made.h5ad", *QUIET)
    assert ad.read_h5ad("made.h5ad").n_obs == 7
    shell("plot", "training", "moved.h5ad", status=2)
    shell("plot", "tokens", "corpus/shard_0.h5ad", "--cell", 0, "--out", "tokens.png")
    assert (tmp_path / "tokens.png").stat().st_size > 1000


def test_a_config_is_printed_and_read(shell, capsys):
    with pytest.raises(SystemExit):
        main("tokenize shard_0.h5ad --out c --n_genes 9 --tokenization.zeros keep --print_config".split())
    with open("run.yaml", "w") as file:
        file.write(capsys.readouterr().out)
    shell("tokenize", "--config", "run.yaml")
    vocabulary = scbin.open_tokens("c").vocabulary
    assert len(vocabulary.genes) == 9 and vocabulary.keeps_zeros
    with pytest.raises(SystemExit) as stop:
        main(["tokenize", "shard_0.h5ad", "--no_such_option", "1"])
    assert stop.value.code == 2


def test_faults_of_files_are_one_line(shell, monkeypatch):
    assert shell("embed", "nothing.h5ad", "--model", "x", status=2).startswith("scbin: [F01] nothing.h5ad is not there")
    assert "[F01] no_0.h5ad is not there" in shell("tokenize", "no_{0..2}.h5ad", "--out", "corpus", status=2)
    assert "V01" in shell("pretrain", "shard_0.h5ad", "--out", "model", status=2)
    assert "A04" in shell("pretrain", "nothing.h5ad", "--out", ".", status=2)  # before anything is read
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "M05" in shell("pretrain", "nothing.h5ad", "--out", "model", status=2)
    assert "--out is missing" in shell("pretrain", "shard_0.h5ad", status=2)
    assert "takes one file; here are 3" in shell("check", "shard_{0..2}.h5ad", status=2)
    assert "V01" in shell("perturb", "shard_{0..2}.h5ad", "--model", "m", "--out", "p.h5ad", status=2)
    assert "--out is missing" in shell("perturb", "shard_0.h5ad", "--model", "m", status=2)


@pytest.mark.parametrize("verb", [name for name in VERBS if name != "plot"])
def test_help_comes_from_docstrings(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    told = capsys.readouterr().out
    assert stop.value.code == 0 and ":class:" not in told and "(type:" in told


def test_help_and_version_need_no_torch():
    program = "import sys; from scbin.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip().endswith("False") and all(verb in done.stdout for verb in VERBS), done.stderr
    done = subprocess.run([sys.executable, "-m", "scbin", "--version"], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == f"scbin {scbin.__version__}"
