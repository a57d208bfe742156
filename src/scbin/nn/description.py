"""What a model says of itself, and the small parts of a model directory: history, head, model card."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scbin._errors import ScbinModelError
from scbin.nn.decoder import Decoder
from scbin.nn.heads import HeadPlan, head_from, head_shapes
from scbin.nn.projection import MOST_WIDTH, Projection
from scbin.nn.untrusted import read_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from scbin.encoding.vocabulary import Vocabulary
    from scbin.nn.heads import Head, Target

MOST_ROWS, MOST_NUMBERS = 20_000, 1_000_000


def describe(model: Any) -> dict[str, str]:
    """Return what a user asks first about a :class:`scbin.Model`, by name."""
    config, vocabulary = model.config, model.vocabulary
    bins = "" if vocabulary.bins is None else f", {vocabulary.bins.n_bins} bins"
    facts = {
        "encoding": f"{vocabulary.encoding}, {len(vocabulary.genes):,} genes{bins}",
        "phenotypes": ", ".join(f"{p.name} ({len(p.values)} values)" for p in vocabulary.phenotypes) or "none",
        "network": f"BERT, {config.num_hidden_layers} layers, hidden size {config.hidden_size}, "
        f"{config.num_attention_heads} heads, {model.n_parameters:,} parameters",
        "embedding": f"{config.hidden_size} numbers per cell, {model.readout.pooling} pooling, layer {model.readout.layer}",
    }
    if model.head is not None:
        facts["answers"] = ", ".join(answer(target) for target in model.head.targets)
    if model.decoder is not None:
        facts["decoder"] = "makes cells by phenotype, imputes genes" if vocabulary.phenotypes else "imputes genes"
    trained = [(key.removeprefix("n_"), model.training.get(key)) for key in ("n_cells", "steps", "epochs")]
    facts["trained"] = (
        ", ".join(f"{name} {value:,}" for name, value in trained if isinstance(value, int | float))
        or str(model.training.get("published_as", "not at all"))[:80]
    )
    for column in (name for name in model.history.columns if str(name).startswith("validation_")):
        losses = model.history[column].dropna()
        if losses.empty:
            continue
        task = column.removeprefix("validation_").replace("_", " ")
        facts[f"held-out loss, {task}"] = f"{losses.iloc[0]:.3f} at first, {losses.iloc[-1]:.3f} at last"
    return facts


def as_html(facts: Mapping[str, str]) -> str:
    """Return the facts as a table for notebooks; what comes from data is escaped."""
    rows = "".join(
        f"<tr><th style='text-align:left'>{escape(name)}</th><td style='text-align:left'>{escape(text)}</td></tr>"
        for name, text in facts.items()
    )
    return f"<b>scbin Model</b><table>{rows}</table>"


def model_card(facts: Mapping[str, str]) -> str:
    """Return the README of a model directory."""
    lines = "\n".join(f"| {name} | {text.replace('|', '/')} |" for name, text in facts.items())
    return (
        "---\nlibrary_name: scbin\ntags:\n- single-cell\n- transcriptomics\n- bert\n---\n\n# A scbin model\n\n"
        f"|  |  |\n|---|---|\n{lines}\n\n"
        '```python\nimport scbin\n\nmodel = scbin.Model.load("this_directory")\n'
        "scbin.pp.tokenize(adata, like=model)\nscbin.tl.embed(adata, model)\n```\n"
    )


def thinned(history: pd.DataFrame) -> pd.DataFrame:
    """Return the history as it is kept with a model: of more than `MOST_ROWS` rows an even choice, first and last among them.

    The rows of validations, which are few and would be missed, make up to half of it. Wide tables are kept to `MOST_NUMBERS`.
    """
    most = max(min(MOST_ROWS, MOST_NUMBERS // max(history.shape[1], 1)), 4)
    if len(history) <= most:
        return history
    names = [name for name in history.columns if str(name).startswith("validation_")]
    validated = _evenly(np.flatnonzero(history[names].notna().any(axis=1)), most // 2)
    return history.iloc[np.union1d(_evenly(np.arange(len(history)), most - len(validated)), validated)]


def _evenly(rows: np.ndarray, most: int) -> np.ndarray:
    return rows[np.linspace(0, len(rows) - 1, min(len(rows), most)).round().astype(np.int64)]


def read_history(fields: Mapping[str, Any]) -> pd.DataFrame:
    """Return the table again, numbers only; what was not measured is NaN."""
    columns = fields["columns"]
    if not all(type(name) is str for name in columns) or len(set(columns)) != len(columns):
        raise ValueError("the columns of the history need names of their own")
    frame = pd.DataFrame(fields["data"], columns=columns)
    return frame.astype({name: "float64" for name in columns if frame[name].dtype.kind not in "if"})


def answer(target: Target) -> str:
    """Say in words what a head answers."""
    if target.kind == "number":
        return f"{target.name} (a number)"
    return f"{target.name} ({len(target.classes)} classes{' of genes' if target.kind == 'gene' else ''})"


def read_head(path: Path, fields: Mapping[str, Any] | None, hidden_size: int, n_genes: int) -> Head | None:
    """Return the head that is described."""
    if not _is_there(path, fields) or fields is None:
        return None
    plan = HeadPlan.from_dict(fields)
    return head_from(plan, read_tensors(path, head_shapes(plan, hidden_size, n_genes)), hidden_size, n_genes)


def read_decoder(
    path: Path, fields: Mapping[str, Any] | None, vocabulary: Vocabulary, hidden_size: int
) -> Decoder | None:
    """Return the decoder that is described."""
    if not _is_there(path, fields) or fields is None:
        return None
    tensors = read_tensors(path, Decoder.shapes(vocabulary, fields, hidden_size))
    return Decoder.from_tensors({name: tensor.numpy() for name, tensor in tensors.items()}, vocabulary)


def read_projection(path: Path, fields: Mapping[str, Any] | None, hidden_size: int) -> Projection | None:
    """Return the projection that is described."""
    if not _is_there(path, fields) or fields is None:
        return None
    width, n_own = fields.get("width"), fields.get("own", 0)
    known = {"width"} <= set(fields) <= {"width", "own"}
    if not known or type(width) is not int or type(n_own) is not int:
        raise ValueError("this is not what a projection is described by")
    if not (1 <= width <= MOST_WIDTH and 0 <= n_own <= hidden_size):
        raise ValueError("a projection of this size is not possible")
    tensors = read_tensors(path, Projection.shapes(hidden_size, width, n_own))
    return Projection.from_tensors({name: tensor.numpy() for name, tensor in tensors.items()})


def _is_there(path: Path, fields: Mapping[str, Any] | None) -> bool:
    """Whether a part of a model exists; its file is there exactly when it is described."""
    if path.exists() != (fields is not None):
        raise ScbinModelError(
            "M18", f"scbin.json and {path.name} do not belong together. Fetch or save the model again."
        )
    return fields is not None
