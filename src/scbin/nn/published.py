"""Published checkpoints as scbin's network: a table of names, and the same checks as for our own directories."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from scbin._errors import ScbinInputError, ScbinInputWarning, ScbinModelError
from scbin.encoding.geneformer import PARTS, VERSIONS, find_dictionaries, vocabulary_from_geneformer
from scbin.nn.checkpoint import CONFIG, WEIGHTS, assemble, expected_shapes
from scbin.nn.heads import Head, HeadPlan, Target, head_from
from scbin.nn.untrusted import (
    MAX_JSON,
    MAX_WEIGHTS,
    check_plain,
    make_config,
    read_header,
    read_json,
    read_tensors,
    refuse_pickles,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor
    from transformers import BertConfig, BertForMaskedLM

    from scbin.encoding.vocabulary import Vocabulary

PREFIX = "cls.predictions."
WORDS, POSITIONS = "bert.embeddings.word_embeddings.weight", "bert.embeddings.position_embeddings.weight"
# the parts that an output head of transformers adds to a network
_POOLER = {"bert.pooler.dense.weight": "dense.weight", "bert.pooler.dense.bias": "dense.bias"}
_CLASSIFIER = {"classifier.weight": "output.weight", "classifier.bias": "output.bias"}
_BUFFERS = ("bert.embeddings.position_ids",)  # 0, 1, 2 ..., stored by older versions of transformers


@dataclass(frozen=True, eq=False)
class Published:
    """What a published directory holds, as scbin's own parts."""

    bert: BertForMaskedLM
    vocabulary: Vocabulary
    head: Head | None
    source: str

    def remarks(self) -> list[ScbinInputWarning]:
        """Return what the user should know about the names in it."""
        found = []
        classes = () if self.head is None else self.head.targets[0].classes
        if any(name.startswith("LABEL_") for name in classes):
            text = (
                f"the {len(classes)} classes of this classifier have no names (LABEL_0, LABEL_1 ...): its authors did not store "
                "them. Pass class_names= in the order of their training."
            )
            found.append(ScbinInputWarning("M38", text))
        if self.vocabulary.encoding == "rank" and self.vocabulary.name_map is None:
            text = f"{PARTS[2]} and {PARTS[3]} name no gene by symbol, or are not there: genes are found by Ensembl id only."
            found.append(ScbinInputWarning("G16", text))
        return found


def read_files(path: Path) -> dict[str, Any]:
    """Return config.json of a directory as published, after looking at the two files that are read; others are left alone."""
    if not path.is_dir():
        raise ScbinModelError("M03", f"{path} is not a directory. Pass the directory of the model as it was published.")
    refuse_pickles(path, WEIGHTS)
    for name, most in ((CONFIG, MAX_JSON), (WEIGHTS, MAX_WEIGHTS)):
        if not os.path.lexists(path / name):
            raise ScbinModelError(
                "M04", f"{path} has no {name}. A published model is config.json and model.safetensors."
            )
        check_plain(path / name, most)
    return read_json(path / CONFIG)


def network_config(content: Mapping[str, Any], **changes: Any) -> BertConfig:
    """Return the configuration for a published network: its own numbers, without dropout in the attention."""
    config = make_config({**content, **changes}, CONFIG)
    config.attention_probs_dropout_prob = 0.0  # the packed attention has none
    return config


# ---- Geneformer ------------------------------------------------------------------------------------------------------


def read_geneformer(path: Path, dictionaries: Path | None, target: str, class_names: Sequence[str] | None) -> Published:
    """Return a Geneformer model, pretrained or a classifier of cells or genes, with the vocabulary of its version."""
    content = read_files(path)
    config = network_config(content)
    tensors, plan = _geneformer_tensors(path / WEIGHTS, config, content, target, class_names)
    files = find_dictionaries(path, dictionaries, config.vocab_size)
    vocabulary = vocabulary_from_geneformer(files[PARTS[0]], files[PARTS[1]], *(files.get(part) for part in PARTS[2:]))
    vocabulary = replace(vocabulary, max_length=config.max_position_embeddings)
    head = None if plan is None else _head(plan, tensors, config, len(vocabulary.genes))
    name = VERSIONS.get(config.vocab_size, ("",))[0] or f"with {config.vocab_size:,} tokens"
    return Published(assemble(config, tensors), vocabulary, head, f"Geneformer {name}")


def _geneformer_tensors(
    path: Path,
    config: BertConfig,
    content: Mapping[str, Any],
    target: str,
    class_names: Sequence[str] | None,
) -> tuple[dict[str, Tensor], HeadPlan | None]:
    """Return the tensors of the network, and beside them those of a classifier with its plan."""
    found, own = read_header(path, _BUFFERS), expected_shapes(config)
    classifier = found.get("classifier.weight")
    if classifier is None:
        if class_names is not None:
            raise ScbinInputError("M37", "class_names were given, but this model is no classifier.")
        tied = {name: shape for name, shape in _decoder(config).items() if name in found}
        tensors = read_tensors(path, own | tied, _BUFFERS)
        _check_tied(tensors, path.name)
        return tensors, None
    hidden = config.hidden_size
    n_classes = classifier[0] if len(classifier) == 2 else 0
    shapes = {name: shape for name, shape in own.items() if not name.startswith(PREFIX)}
    shapes |= {"classifier.weight": (n_classes, hidden), "classifier.bias": (n_classes,)}
    cells = next(iter(_POOLER)) in found
    shapes |= {"bert.pooler.dense.weight": (hidden, hidden), "bert.pooler.dense.bias": (hidden,)} if cells else {}
    classes = _class_names(content, n_classes, class_names)
    plan = HeadPlan(
        "pooler" if cells else "gene",
        (Target(target, "class" if cells else "gene", classes),),
        config.hidden_dropout_prob,
    )
    return read_tensors(path, shapes, _BUFFERS) | blank_output(config), plan


def _decoder(config: BertConfig) -> dict[str, tuple[int, ...]]:
    shape = (config.vocab_size, config.hidden_size)
    return {f"{PREFIX}decoder.weight": shape, f"{PREFIX}decoder.bias": shape[:1]}


def _check_tied(tensors: dict[str, Tensor], name: str) -> None:
    """Drop the second copy of a tied tensor, if it is one."""
    for copy, own in ((f"{PREFIX}decoder.weight", WORDS), (f"{PREFIX}decoder.bias", f"{PREFIX}bias")):
        if copy in tensors and not torch.equal(tensors.pop(copy), tensors[own]):
            raise ScbinModelError(
                "M36", f"{copy} in {name} differs from {own}, which stands for it in Geneformer's models."
            )


def blank_output(config: BertConfig) -> dict[str, Tensor]:
    """Return an output layer for a classifier that was published without one: it changes nothing, and knows nothing."""
    hidden = config.hidden_size
    return {
        f"{PREFIX}bias": torch.zeros(config.vocab_size),
        f"{PREFIX}transform.dense.weight": torch.eye(hidden),
        f"{PREFIX}transform.dense.bias": torch.zeros(hidden),
        f"{PREFIX}transform.LayerNorm.weight": torch.ones(hidden),
        f"{PREFIX}transform.LayerNorm.bias": torch.zeros(hidden),
    }


def _class_names(content: Mapping[str, Any], n_classes: int, given: Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of the classes in the order of the outputs: those given, or those of config.json."""
    if given is not None:
        if isinstance(given, str) or len(given) != n_classes:
            raise ScbinInputError(
                "M37",
                f"the model tells {n_classes} classes apart; class_names={str(given)[:80]} does not name each of them.",
            )
        return tuple(str(name) for name in given)
    labels = content.get("id2label")
    names = [labels.get(str(k)) for k in range(n_classes)] if isinstance(labels, dict) else [None]
    if not all(type(name) is str for name in names) or len(names) != n_classes:
        return tuple(f"LABEL_{k}" for k in range(n_classes))
    return tuple(str(name) for name in names)


def _head(plan: HeadPlan, tensors: dict[str, Tensor], config: BertConfig, n_genes: int) -> Head:
    """Take the tensors of the classifier out of those of the file."""
    own = {ours: tensors.pop(name) for name, ours in (_POOLER | _CLASSIFIER).items() if name in tensors}
    if plan.design == "gene":
        own |= {"centre": torch.zeros(config.hidden_size), "scale": torch.ones(config.hidden_size)}
    return head_from(plan, own, config.hidden_size, n_genes)


# ---- layouts with a position per gene --------------------------------------------------------------------------------


def check_genes(genes: Sequence[str], n_genes: int, what: str) -> tuple[str, ...]:
    """Return the ordered list of genes, if the network has a position for each."""
    if isinstance(genes, str) or not all(isinstance(gene, str) and gene for gene in genes):
        raise ScbinInputError("M39", "genes needs the list of gene names in the order of the training.")
    if len(genes) != n_genes:
        raise ScbinInputError(
            "M39",
            f"genes has {len(genes):,} names, but this {what} model has positions for {n_genes:,}. It needs exactly the list "
            "that it was trained with, in that order; the model itself does not store it.",
        )
    return tuple(str(gene) for gene in genes)


def check_edges(
    edges: Sequence[float] | None, n_edges: int, published: Mapping[int, tuple[float, ...]]
) -> tuple[float, ...]:
    """Return the edges of the bins, if there are as many as the network has bins."""
    if edges is None:
        if n_edges not in published:
            raise ScbinInputError(
                "M60",
                f"the token ids of this model leave room for {n_edges} edges between bins, which no published model has. Check "
                "phenotypes=, or pass edges= as they were in training.",
            )
        return published[n_edges]
    if len(edges) != n_edges:
        raise ScbinInputError("M60", f"edges has {len(edges)} numbers, but the token ids of this model need {n_edges}.")
    return tuple(float(edge) for edge in np.asarray(edges, dtype=np.float64))
