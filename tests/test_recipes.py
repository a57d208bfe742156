"""The recipes in the docs run as they are, with a small network in place of the large one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

import scbin
from scbin.cli import main
from scbin.nn.presets import preset

RECIPES = sorted((Path(__file__).parents[1] / "docs" / "recipes").glob("*.yaml"))


@pytest.fixture
def cells(toy, tmp_path):
    for column in ("tissue", "disease"):
        toy.obs[column] = np.where(np.arange(60) % 2, "a", "b")
    toy.obs["development_stage"] = np.where(np.arange(60) % 2, "34-year-old stage", "61-year-old stage")
    toy.write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


def test_there_are_six():
    assert len(RECIPES) == 6


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe(recipe, cells, tmp_path, capsys):
    asked = yaml.safe_load(recipe.read_text())
    size = asked["pretrain"]["preset"]
    assert isinstance(size, dict) or preset(size).num_hidden_layers >= 6
    start = ["--config", str(recipe)]
    assert main([*start, "tokenize", str(cells), "--out", str(tmp_path / "corpus")]) == 0, capsys.readouterr().err
    small = ["--preset", "tiny", "--max_steps", "2", "--progress", "false", "--device", "cpu"]
    found = main([*start, "pretrain", str(tmp_path / "corpus"), "--out", str(tmp_path / "model"), *small])
    assert found == 0, capsys.readouterr().err
    model = scbin.Model.load(tmp_path / "model")
    asked_masking = asked["pretrain"]["masking"]
    assert model.training["steps"] == 2
    assert {name: model.training["masking"][name] for name in asked_masking} == asked_masking
    assert "loss_cell_vector" not in model.history and model.history["loss_genes"].notna().any()
    assert model.vocabulary.encoding == asked["tokenize"]["encoding"]
