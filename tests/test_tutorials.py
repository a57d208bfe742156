"""Every cell of every notebook runs, with few steps of training (pytest -m slow tests/test_tutorials.py); all of them keep their outputs."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

import scbin

FOLDER = Path(__file__).parents[1] / "tutorials"
NOTEBOOKS = {path.stem: json.loads(path.read_text())["cells"] for path in sorted(FOLDER.glob("*.ipynb"))}


def code_of(cells: list[dict]) -> list[str]:
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_keep_their_outputs_and_say_what_made_them(name):
    cells = NOTEBOOKS[name]
    assert "scbin.session_info(" in code_of(cells)[-1]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output["output_type"] == "error" or output.get("name") == "stderr" for output in outputs)


def test_the_gallery_has_every_plot():
    gallery = "\n".join(code_of(NOTEBOOKS["gallery"]))
    assert [name for name in scbin.pl.__all__ if f"scbin.pl.{name}(" not in gallery] == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("scbin.pl._embedding.FEWEST_FOR_UMAP", 10_000)  # UMAP takes seconds to compile
    for verb, most in (("pretrain", 5), ("finetune", 1)):
        function = getattr(scbin.tl, verb)

        def small(*args, _function=function, _most=most, **options):
            steps = options.get("max_steps")
            return _function(*args, **{**options, "max_steps": _most if steps is None else min(_most, steps)})

        monkeypatch.setattr(scbin.tl, verb, small)
    namespace: dict[str, object] = {}
    for code in code_of(NOTEBOOKS[name]):
        exec(compile(code, f"{name}.ipynb", "exec"), namespace)
        plt.close("all")
