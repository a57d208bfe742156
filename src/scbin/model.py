"""The model: a network, the vocabulary it reads and how it was trained."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from scbin._errors import ScbinInputError, ScbinModelError
from scbin.encoding.vocabulary import Vocabulary
from scbin.nn.checkpoint import own_tensors, read_model_directory, write_model_directory

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from transformers import BertConfig, BertForMaskedLM

    from scbin.nn.embedding import Pooling

FORMAT = 1


@dataclass(frozen=True)
class Readout:
    """How a model turns the vectors of a cell's tokens into one.

    Parameters
    ----------
    pooling
        `"weighted"`: mean over the genes, weighted by the expression that their tokens stand for; `"mean"`: each gene alike;
        `"cls"`: the vector of the `[CLS]` token.
    layer
        Index into the hidden states: -1 is the last layer, -2 the one before, 0 the embeddings.
    gene_weights
        Weight of each gene for `"weighted"`, in the order of the vocabulary. `None`: all alike.
    """

    pooling: Pooling = "weighted"
    layer: int = -1
    gene_weights: tuple[float, ...] | None = None


@dataclass(eq=False)
class Model:
    """A BERT on cells, ready to embed, predict and be trained further.

    Made by :func:`scbin.tl.pretrain` or :meth:`Model.load`, not by hand. A model knows the names of its genes and phenotypes:
    new data are matched to it by name (`scbin.pp.tokenize(adata, like=model)`).

    Parameters
    ----------
    bert
        The network, a stock `transformers.BertForMaskedLM` on the CPU.
    vocabulary
        What it reads: genes, bins, phenotypes and their tokens.
    readout
        How a cell's vector is taken from it.
    training
        How it was trained: plain values by name.
    history
        What was measured during training, one row per step.

    Examples
    --------
    >>> import scbin
    >>> adata = scbin.datasets.pbmc68k_reduced()[:100].copy()
    >>> scbin.pp.tokenize(adata)
    >>> model = scbin.tl.pretrain(adata, preset="tiny", max_steps=2, progress=False)
    >>> model.vocabulary.encoding
    'bins'
    """

    bert: BertForMaskedLM
    vocabulary: Vocabulary
    readout: Readout = field(default_factory=Readout)
    training: Mapping[str, Any] = field(default_factory=dict)
    history: pd.DataFrame = field(default_factory=pd.DataFrame)

    @property
    def config(self) -> BertConfig:
        """The configuration of the network."""
        return self.bert.config

    @property
    def n_parameters(self) -> int:
        """Number of trainable numbers in the network."""
        return sum(tensor.numel() for tensor in own_tensors(self.bert).values())

    @property
    def fingerprint(self) -> str:
        """Sha256 over vocabulary, readout and weights: equal models have equal fingerprints."""
        digest = hashlib.sha256(f"{self.vocabulary.sha256} {self.readout}".encode())
        for name, tensor in own_tensors(self.bert).items():
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the model into a directory: weights, configuration, vocabulary, history and a model card.

        The weights are stored as safetensors in the layout of Hugging Face, so that plain
        `transformers.BertForMaskedLM.from_pretrained` opens the directory too. It appears whole or not at all.

        Parameters
        ----------
        path
            The directory to write.
        overwrite
            Replace a model that is there already.

        Examples
        --------
        >>> import scbin, tempfile, pathlib
        >>> adata = scbin.datasets.pbmc68k_reduced()[:100].copy()
        >>> scbin.pp.tokenize(adata)
        >>> model = scbin.tl.pretrain(adata, preset="tiny", max_steps=2, progress=False)
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "my_model"
        >>> model.save(path)
        >>> scbin.Model.load(path).fingerprint == model.fingerprint
        True
        """
        about = {
            "format": FORMAT,
            "vocabulary": json.loads(self.vocabulary.to_json()),
            "readout": asdict(self.readout),
            "training": dict(self.training),
            "history": json.loads(self.history.to_json(orient="split", index=False, double_precision=15)),
        }
        write_model_directory(Path(path), self.bert, about, self._card(), overwrite=overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Model:
        """Read a model from the directory that :meth:`save` wrote.

        The directory is treated as if a stranger had made it: no code in it is run, every number is checked, and a file that
        was damaged, exchanged or added is an error that names it.

        Parameters
        ----------
        path
            The directory.

        Raises
        ------
        ScbinModelError
            If the directory is not a whole and sound model.
        """
        bert, about = read_model_directory(Path(path))
        known = {"format", "vocabulary", "readout", "training", "history"}
        if about.get("format") != FORMAT or set(about) != known:
            raise ScbinModelError(
                "M16", f"scbin.json in {path} is not of format {FORMAT}; it needs another scbin version."
            )
        try:
            vocabulary = Vocabulary.from_json(json.dumps(about["vocabulary"]))
            readout = _read_readout(about["readout"], vocabulary)
            history = pd.DataFrame(about["history"]["data"], columns=about["history"]["columns"])
        except (ScbinInputError, TypeError, KeyError, ValueError) as error:
            raise ScbinModelError(
                "M17", f"scbin.json in {path} does not describe a model ({str(error)[:80]})."
            ) from error
        shape = (bert.config.vocab_size, bert.config.max_position_embeddings)
        if shape[0] != vocabulary.n_tokens or shape[1] < vocabulary.n_positions:
            raise ScbinModelError(
                "M18",
                f"the network in {path} has {shape[0]} tokens and {shape[1]} positions, its vocabulary "
                f"{vocabulary.n_tokens} and {vocabulary.n_positions}. They do not belong together.",
            )
        return cls(bert, vocabulary, readout, about["training"], history)

    # ---- what a user asks first ---------------------------------------------------------------------------------------

    def _facts(self) -> dict[str, str]:
        config, vocabulary = self.config, self.vocabulary
        bins = "" if vocabulary.bins is None else f", {vocabulary.bins.n_bins} bins"
        facts = {
            "encoding": f"{vocabulary.encoding}, {len(vocabulary.genes):,} genes{bins}",
            "phenotypes": ", ".join(f"{p.name} ({len(p.values)} values)" for p in vocabulary.phenotypes) or "none",
            "network": f"BERT, {config.num_hidden_layers} layers, hidden size {config.hidden_size}, "
            f"{config.num_attention_heads} heads, {self.n_parameters:,} parameters",
            "embedding": f"{config.hidden_size} numbers per cell, {self.readout.pooling} pooling, layer {self.readout.layer}",
        }
        trained = {key: self.training[key] for key in ("n_cells", "steps", "epochs") if key in self.training}
        facts["trained"] = (
            ", ".join(f"{key.replace('n_', '')} {value:,}" for key, value in trained.items()) or "not at all"
        )
        for column in self.history.columns[self.history.columns.str.startswith("validation_")]:
            losses = self.history[column].dropna()
            task = column.removeprefix("validation_").replace("_", " ")
            facts[f"held-out loss, {task}"] = f"{losses.iloc[0]:.3f} at first, {losses.iloc[-1]:.3f} at last"
        return facts

    def __repr__(self) -> str:
        facts = self._facts()
        width = max(len(name) for name in facts)
        return "\n".join(["scbin Model", *(f"  {name:<{width}}  {text}" for name, text in facts.items())])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{escape(name)}</th><td style='text-align:left'>{escape(text)}</td></tr>"
            for name, text in self._facts().items()
        )
        return f"<b>scbin Model</b><table>{rows}</table>"

    def _card(self) -> str:
        facts = "\n".join(f"| {name} | {text.replace('|', '/')} |" for name, text in self._facts().items())
        return (
            "---\nlibrary_name: scbin\ntags:\n- single-cell\n- transcriptomics\n- bert\n---\n\n# A scbin model\n\n"
            f"|  |  |\n|---|---|\n{facts}\n\n"
            '```python\nimport scbin\n\nmodel = scbin.Model.load("this_directory")\n'
            "scbin.pp.tokenize(adata, like=model)\nscbin.tl.embed(adata, model)\n```\n"
        )


def _read_readout(fields: Mapping[str, Any], vocabulary: Vocabulary) -> Readout:
    readout = Readout(**fields)
    if readout.gene_weights is None:
        return readout
    weights = tuple(float(weight) for weight in readout.gene_weights)
    if len(weights) != len(vocabulary.genes) or min(weights, default=0.0) < 0:
        raise ValueError(f"{len(weights)} gene weights for {len(vocabulary.genes)} genes")
    return replace(readout, gene_weights=weights)
