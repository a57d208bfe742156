"""The model: a network, the vocabulary it reads and how it was trained."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scbin._errors import ScbinInputError, ScbinModelError
from scbin.encoding.vocabulary import Vocabulary
from scbin.nn.checkpoint import HEAD, own_tensors, read_model_directory, write_model_directory
from scbin.nn.embedding import pooling_weights
from scbin.nn.heads import HeadPlan, head_from, head_shapes
from scbin.nn.untrusted import read_tensors

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from transformers import BertConfig, BertForMaskedLM

    from scbin.nn.embedding import Pooling, Weights
    from scbin.nn.heads import Head, Target

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
    head
        What it was fine-tuned to answer (:func:`scbin.tl.finetune`), and the weights for it. `None`: nothing.

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
    head: Head | None = None

    def __post_init__(self) -> None:
        # what JSON can hold, before anyone relies on it: the same values before saving and after loading
        self.training = json.loads(json.dumps(dict(self.training), default=_plain))

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
        """Sha256 over vocabulary, readout, head and weights: equal models have equal fingerprints."""
        digest = hashlib.sha256(f"{self.vocabulary.sha256} {self.readout}".encode())
        tensors = own_tensors(self.bert)
        if self.head is not None:
            digest.update(str(self.head.plan).encode())
            tensors |= {f"head.{name}": tensor for name, tensor in self.head.state_dict().items()}
        for name, tensor in tensors.items():
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def weights(self, pooling: Pooling | None = None) -> Weights:
        """Return the weight of each token in its cell's vector, for the model's own pooling or another."""
        genes = self.readout.gene_weights
        as_array = None if genes is None else np.array(genes, dtype=np.float32)
        return pooling_weights(self.vocabulary, pooling or self.readout.pooling, as_array)

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
        tensors = None
        if self.head is not None:
            about["head"] = self.head.plan.to_dict()
            tensors = {name: tensor.detach() for name, tensor in self.head.state_dict().items()}
        write_model_directory(Path(path), self.bert, about, self._card(), tensors, overwrite=overwrite)

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
        if about.get("format") != FORMAT or set(about) - {"head"} != known:
            raise ScbinModelError(
                "M16", f"scbin.json in {path} is not of format {FORMAT}; it needs another scbin version."
            )
        try:
            vocabulary = Vocabulary.from_json(json.dumps(about["vocabulary"]))
            shape = (bert.config.vocab_size, bert.config.max_position_embeddings)
            if shape[0] != vocabulary.n_tokens or shape[1] < vocabulary.n_positions:
                raise ScbinModelError(
                    "M18",
                    f"the network in {path} has {shape[0]} tokens and {shape[1]} positions, its vocabulary "
                    f"{vocabulary.n_tokens} and {vocabulary.n_positions}. They do not belong together.",
                )
            readout = _read_readout(about["readout"], vocabulary, bert.config.num_hidden_layers)
            history = _read_history(about["history"])
            head = _read_head(Path(path) / HEAD, about.get("head"), bert.config.hidden_size, len(vocabulary.genes))
            return cls(bert, vocabulary, readout, about["training"], history, head)
        except (ScbinInputError, TypeError, AttributeError, LookupError, ValueError, OverflowError) as error:
            if isinstance(error, ScbinModelError):
                raise
            raise ScbinModelError(
                "M17", f"scbin.json in {path} does not describe a model ({str(error)[:80]})."
            ) from error

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
        if self.head is not None:
            facts["answers"] = ", ".join(_answer(target) for target in self.head.targets)
        trained = [(key.removeprefix("n_"), self.training.get(key)) for key in ("n_cells", "steps", "epochs")]
        facts["trained"] = (
            ", ".join(f"{name} {value:,}" for name, value in trained if isinstance(value, int | float)) or "not at all"
        )
        for column in (name for name in self.history.columns if str(name).startswith("validation_")):
            losses = self.history[column].dropna()
            if losses.empty:
                continue
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


def _plain(value: Any) -> Any:
    """Return an array, a number of numpy or a path as what JSON knows."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise ScbinInputError("M19", f"a {type(value).__name__} cannot be kept with a model; use numbers and text.")


def _read_history(fields: Mapping[str, Any]) -> pd.DataFrame:
    """Return the table again, numbers only; what was not measured is NaN."""
    columns = fields["columns"]
    if not all(type(name) is str for name in columns) or len(set(columns)) != len(columns):
        raise ValueError("the columns of the history need names of their own")
    frame = pd.DataFrame(fields["data"], columns=columns)
    return frame.astype({name: "float64" for name in columns if frame[name].dtype.kind not in "if"})


def _answer(target: Target) -> str:
    """Say in words what a head answers."""
    if target.kind == "number":
        return f"{target.name} (a number)"
    return f"{target.name} ({len(target.classes)} classes{' of genes' if target.kind == 'gene' else ''})"


def _read_head(path: Path, fields: Mapping[str, Any] | None, hidden_size: int, n_genes: int) -> Head | None:
    """Return the head that is described; its file is there exactly when it is described."""
    if path.exists() != (fields is not None):
        raise ScbinModelError(
            "M18", f"scbin.json and {path.name} do not belong together. Fetch or save the model again."
        )
    if fields is None:
        return None
    plan = HeadPlan.from_dict(fields)
    return head_from(plan, read_tensors(path, head_shapes(plan, hidden_size, n_genes)), hidden_size, n_genes)


def _read_readout(fields: Mapping[str, Any], vocabulary: Vocabulary, n_layers: int) -> Readout:
    readout = Readout(**fields)
    if type(readout.layer) is not int or not -n_layers - 1 <= readout.layer <= n_layers:
        raise ValueError(f"layer {readout.layer!r} of a network with {n_layers}")
    weights = readout.gene_weights
    if weights is not None:
        weights = tuple(float(weight) for weight in weights)
        if len(weights) != len(vocabulary.genes) or min(weights, default=0.0) < 0:
            raise ValueError(f"{len(weights)} gene weights for {len(vocabulary.genes)} genes")
    pooling_weights(vocabulary, readout.pooling, None if weights is None else np.array(weights, dtype=np.float32))
    return replace(readout, gene_weights=weights)
