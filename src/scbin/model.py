"""The model: a network, the vocabulary it reads and how it was trained."""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from scbin._errors import ScbinInputError, ScbinModelError
from scbin.encoding.vocabulary import CLS, Vocabulary
from scbin.nn.checkpoint import DECODER, HEAD, PROJECTION, own_tensors, read_model_directory, write_model_directory
from scbin.nn.description import (
    as_html,
    describe,
    model_card,
    read_decoder,
    read_head,
    read_history,
    read_projection,
    thinned,
)
from scbin.nn.embedding import pooling_weights
from scbin.nn.hub import local_directory
from scbin.nn.published import read_geneformer
from scbin.nn.published_bins import read_perturbgene, read_polygene
from scbin.nn.readout import Readout, read_readout

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from transformers import BertConfig, BertForMaskedLM

    from scbin.nn.decoder import Decoder
    from scbin.nn.embedding import Pooling, Weights
    from scbin.nn.heads import Head
    from scbin.nn.projection import Projection
    from scbin.nn.published import Published

FORMAT = 1


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
    decoder
        What turns its vectors back into genes, for :func:`scbin.tl.generate` and :func:`scbin.tl.impute`. `None`: nothing.
    projection
        From the vector that the readout takes to the cell's place in the embedding. `None`: the vector itself.

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
    decoder: Decoder | None = None
    projection: Projection | None = None

    def __post_init__(self) -> None:
        # what JSON can hold, before anyone relies on it: the same values before saving and after loading
        text = json.dumps(dict(self.training), default=_plain)
        self.training = json.loads(text, parse_constant=lambda _: None)  # it has no NaN

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
        """Sha256 over vocabulary, readout, projection, head and weights: equal models have equal fingerprints."""
        digest = hashlib.sha256(f"{self.vocabulary.sha256} {self.readout}".encode())
        tensors = own_tensors(self.bert)
        if self.projection is not None:
            tensors |= {f"projection.{name}": tensor for name, tensor in _as_tensors(self.projection).items()}
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

    def place(self, vectors: np.ndarray) -> np.ndarray:
        """Return where cells lie in the embedding (cells, hidden), given the vectors that the readout takes (cells, hidden)."""
        return vectors if self.projection is None else self.projection(vectors)

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the model into a directory: weights, configuration, vocabulary, history and a model card.

        The weights are stored as safetensors in the layout of Hugging Face, so that plain
        `transformers.BertForMaskedLM.from_pretrained` opens the directory too. It appears whole or not at all. Of a long history
        about 20,000 rows are kept, evenly spaced, with those of the validations among them.

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
            "history": json.loads(thinned(self.history).to_json(orient="split", index=False, double_precision=15)),
        }
        parts: dict[str, Mapping[str, torch.Tensor]] = {}
        if self.projection is not None:
            about["projection"], parts[PROJECTION] = self.projection.describe(), _as_tensors(self.projection)
        if self.head is not None:
            about["head"] = self.head.plan.to_dict()
            parts[HEAD] = {name: tensor.detach() for name, tensor in self.head.state_dict().items()}
        if self.decoder is not None:
            about["decoder"], parts[DECODER] = self.decoder.counts(), _as_tensors(self.decoder)
        card = model_card(describe(self))
        write_model_directory(Path(path), self.bert, about, card, parts, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, revision: str | None = None) -> Model:
        """Read a model from the directory that :meth:`save` wrote.

        The directory is treated as if a stranger had made it: no code in it is run, every number is checked, and a file that
        was damaged, exchanged or added is an error that names it.

        Parameters
        ----------
        path
            The directory; together with `revision`, the `"owner/name"` of a model on the Hugging Face hub.
        revision
            Which state of a model on the hub: the hash of a commit, best, or a branch. Without it nothing is ever fetched.

        Raises
        ------
        ScbinModelError
            If the directory is not a whole and sound model, or the hub does not have it.
        """
        path = local_directory(path, revision)
        bert, about = read_model_directory(path)
        known = {"format", "vocabulary", "readout", "training", "history"}
        if about.get("format") != FORMAT or set(about) - {"projection", "head", "decoder"} != known:
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
            readout = read_readout(about["readout"], vocabulary, bert.config.num_hidden_layers)
            history = read_history(about["history"])
            head = read_head(path / HEAD, about.get("head"), bert.config.hidden_size, len(vocabulary.genes))
            decoder = read_decoder(path / DECODER, about.get("decoder"), vocabulary, bert.config.hidden_size)
            projection = read_projection(path / PROJECTION, about.get("projection"), bert.config.hidden_size)
            return cls(bert, vocabulary, readout, about["training"], history, head, decoder, projection)
        except (ScbinInputError, TypeError, AttributeError, LookupError, ValueError, OverflowError) as error:
            if isinstance(error, ScbinModelError):
                raise
            raise ScbinModelError(
                "M17", f"scbin.json in {path} does not describe a model ({str(error)[:80]})."
            ) from error

    # ---- models that others published ------------------------------------------------------------------------------------

    @classmethod
    def from_geneformer(
        cls,
        path: str | os.PathLike[str],
        *,
        dictionaries: str | os.PathLike[str] | None = None,
        layer: int | None = None,
        pooling: Pooling | None = None,
        target: str = "label",
        class_names: Sequence[str] | None = None,
    ) -> Model:
        """Read a Geneformer model as it was published, V1 or V2, pretrained or fine-tuned to classify cells or genes.

        After it, `scbin.pp.tokenize(adata, like=model)` ranks the genes as Geneformer does, by symbol or Ensembl id, and every
        tool works. Its weights need to be `model.safetensors`; its dictionaries are read without unpickling.

        Parameters
        ----------
        path
            The folder of the model: `config.json` and `model.safetensors`. All else in it is left alone.
        dictionaries
            The folder of Geneformer's dictionaries (`token_dictionary_gc104M.pkl` and so on, also as JSON): `geneformer` in its
            package. Default: the model's own folder, or `geneformer` beside it as in a copy of Geneformer's repository.
        layer
            Which hidden states make the embedding. Default: -2, the last layer but one, which Geneformer calls `emb_layer=-1`; for
            a classifier -1, the last, which its head reads.
        pooling
            Default: `"cls"` for V2, `"mean"` for V1, which has no such token.
        target
            Name of what a classifier answers.
        class_names
            Its classes in the order of training, where the model only knows them as LABEL_0, LABEL_1 ...

        Raises
        ------
        ScbinModelError
            If the directory is damaged, has pickled weights only, or does not fit its configuration.
        ScbinInputError
            If the dictionaries are not found or belong to another version.
        """
        folder = None if dictionaries is None else Path(dictionaries)
        published = read_geneformer(Path(path), folder, target, class_names)
        usual: Pooling = "cls" if CLS in published.vocabulary.specials else "mean"
        if layer is None:
            layer = -2 if published.head is None else -1
        return cls._published(published, Readout(pooling or usual, layer))

    @classmethod
    def from_polygene(
        cls,
        path: str | os.PathLike[str],
        genes: Sequence[str],
        *,
        phenotypes: Mapping[str, Sequence[str]] | None = None,
        edges: Sequence[float] | None = None,
        layer: int = -1,
        pooling: Pooling = "mean",
    ) -> Model:
        """Read a Polygene model: bins of expression, a position for each of its genes, five phenotypes as tokens.

        Parameters
        ----------
        path
            The folder of the model: `config.json`, `model.safetensors` and, if it is there, `vocab.txt`.
        genes
            The genes in the order of the training; Polygene does not store their names.
        phenotypes
            Values of sex, tissue, cell_type, age and disease in the order of their tokens. Default: from `vocab.txt`, with spaces
            for its underscores.
        edges
            Lower edges of the bins above zero, where they are not the published ones (even from 0.1 to 9).
        layer, pooling
            How the embedding is taken.

        Raises
        ------
        ScbinModelError, ScbinInputError
            If the directory is not sound, or the lists do not fit it.
        """
        return cls._published(read_polygene(Path(path), genes, phenotypes, edges), Readout(pooling, layer))

    @classmethod
    def from_perturbgene(
        cls,
        path: str | os.PathLike[str],
        genes: Sequence[str],
        *,
        phenotypes: Mapping[str, Sequence[str]],
        edges: Sequence[float] | None = None,
        layer: int = -1,
        pooling: Pooling = "mean",
        target: str = "label",
        class_names: Sequence[str] | None = None,
    ) -> Model:
        """Read a PerturbGene model: a DistilBERT whose token types are genes, pretrained or fine-tuned to classify cells.

        Its tensors get BERT's names and its ids scbin's order; what it computes stays the same. A cell without a label has no
        token in that place, as in PerturbGene.

        Parameters
        ----------
        path
            The folder of the model: `config.json` and `model.safetensors`. Its pickled tokenizer is never opened.
        genes
            The genes in the order of the training.
        phenotypes
            Values of cell_type, development_stage (or age), disease, sex and tissue in the order of their tokens.
        edges
            Edges of the bins, where they are not the published ones (0.1, or ten even ones from 0.1 to 9).
        layer, pooling
            How the embedding is taken.
        target, class_names
            Name of what a classifier answers, and of its classes in the order of training.

        Raises
        ------
        ScbinModelError, ScbinInputError
            If the directory is not sound, or the lists do not fit it.
        """
        published = read_perturbgene(Path(path), genes, phenotypes, edges, target, class_names)
        return cls._published(published, Readout(pooling, layer))

    @classmethod
    def _published(cls, published: Published, readout: Readout) -> Model:
        n_layers = published.bert.config.num_hidden_layers
        if type(readout.layer) is not int or not -n_layers - 1 <= readout.layer <= n_layers:
            raise ScbinInputError(
                "T14", f"layer is {readout.layer}; this network has layers 0 (embeddings) to {n_layers}."
            )
        if published.head is not None and readout.layer not in (-1, n_layers):
            raise ScbinInputError(
                "M65", f"layer is {readout.layer}, but the head of this classifier reads the last. Leave it out here."
            )
        pooling_weights(published.vocabulary, readout.pooling)
        for warning in published.remarks():
            warnings.warn(warning, stacklevel=3)
        return cls(
            published.bert, published.vocabulary, readout, {"published_as": published.source}, head=published.head
        )

    # ---- what a user asks first ---------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        facts = describe(self)
        width = max(len(name) for name in facts)
        return "\n".join(["scbin Model", *(f"  {name:<{width}}  {text}" for name, text in facts.items())])

    def _repr_html_(self) -> str:
        return as_html(describe(self))


def _plain(value: Any) -> Any:
    """Return an array, a number of numpy or a path as what JSON knows."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise ScbinInputError("M19", f"a {type(value).__name__} cannot be kept with a model; use numbers and text.")


def _as_tensors(part: Projection | Decoder) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in part.tensors().items()}
