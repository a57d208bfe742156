from __future__ import annotations

from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import scbin
import scbin.pl
import scbin.pp
import scbin.tl
from scbin._errors import ScbinInputError
from scbin.cli import main


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
        adata.obsm["X_scbin"][0] = np.nan
        return SimpleNamespace(history=pd.DataFrame(), save=lambda path, overwrite: path.mkdir(exist_ok=overwrite))

    monkeypatch.setattr(scbin.pp, "tokenize", lambda adata: None, raising=False)
    monkeypatch.setattr(scbin.tl, "pretrain", pretrain, raising=False)
    monkeypatch.setattr(scbin.pl, "embedding", lambda adata, **_: None, raising=False)
    monkeypatch.setattr(scbin.pl, "training", lambda model, ax: None, raising=False)
    return asked


def test_quickstart_leaves_what_it_promises(quick, tmp_path, capsys):
    out = tmp_path / "deep" / "quickstart"
    assert main(["quickstart", "--out", str(out), "--seed", "7"]) == 0
    assert {path.name for path in out.iterdir()} == {"embedding.png", "training.png", "adata.h5ad", "model"}
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
    assert "A02" in capsys.readouterr().err
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thesis.txt").write_text("three years")
    assert main(["quickstart", "--out", str(tmp_path)]) == 2
    assert "A04" in capsys.readouterr().err
    assert not quick and (tmp_path / "model" / "thesis.txt").exists()
