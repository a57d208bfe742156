"""Models that others published, checked like our own directories and brought under BERT's names: Geneformer, Polygene, PerturbGene."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from scbin._arguments import shown
from scbin._errors import ScbinInputError, ScbinModelError
from scbin.io.dictionaries import VERSIONS, find_dictionaries, geneformer_vocabulary
from scbin.io.directory import CONFIG, WEIGHTS, assemble, expected_tensors
from scbin.io.untrusted import (
    MAX_JSON,
    MAX_WEIGHTS,
    check_plain,
    check_weights_there,
    make_config,
    read_header,
    read_json,
    read_tensors,
)
from scbin.nn.labels import GeneHead, LabelHead
from scbin.tokens.rules import Bins
from scbin.tokens.vocabulary import CLS, END, MASK, PAD, START, Phenotype, Vocabulary

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor
    from transformers import BertConfig, BertForMaskedLM

HEAD, EMBEDDINGS = "cls.predictions.", "bert.embeddings."
WORDS, POSITIONS = f"{EMBEDDINGS}word_embeddings.weight", f"{EMBEDDINGS}position_embeddings.weight"
TYPES = f"{EMBEDDINGS}token_type_embeddings.weight"
DECODER, DECODER_BIAS = f"{HEAD}decoder.weight", f"{HEAD}decoder.bias"
COPIES = {DECODER: WORDS, DECODER_BIAS: f"{HEAD}bias"}  # tied tensors that some store twice, and what they are equal to
COUNTED = (f"{EMBEDDINGS}position_ids",)  # 0, 1, 2 ..., stored by older versions of transformers


class Published(NamedTuple):
    """What a published directory holds, as scbin's own parts."""

    bert: BertForMaskedLM
    vocabulary: Vocabulary
    labels: LabelHead | GeneHead | None
    source: str


def _read_config(path: Path) -> dict[str, Any]:
    """Return config.json of a directory, after looking at the two files that are read; others are left alone."""
    check_weights_there(path, WEIGHTS)
    for name, most in ((CONFIG, MAX_JSON), (WEIGHTS, MAX_WEIGHTS)):
        if not os.path.lexists(path / name):
            raise ScbinModelError("M01", f"{path} has no {name}. A published model is {CONFIG} and {WEIGHTS}.")
        check_plain(path / name, most)
    return read_json(path / CONFIG)


def _bert_config(content: Mapping[str, Any], **changes: Any) -> BertConfig:
    config = make_config({**content, **changes}, CONFIG)
    config.attention_probs_dropout_prob = 0.0  # the packed attention has none
    return config


def _read_weights(
    path: Path,
    config: BertConfig,
    hidden: str | None = None,
    *,
    of_genes: bool = False,
    renamed: Mapping[str, Any] | None = None,
    absent: Collection[str] = (),
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the tensors of a network by BERT's names and, of a classifier, those of its head by the names of ours.

    A classifier of cells has a layer called `hidden` before its output, one `of_genes` has none. `renamed` has patterns of BERT's
    names and what stands for them in the file. A classifier is published without the output layer of a BERT: what it gets for
    one changes nothing and knows nothing.
    """

    def theirs(name: str) -> str:
        for pattern, replacement in (renamed or {}).items():
            name = re.sub(pattern, replacement, name)
        return name

    found, expected, size = read_header(path / WEIGHTS), expected_tensors(config), config.hidden_size
    layers: dict[str, tuple[str, int]] = {}
    if hidden is not None and "classifier.weight" in found:
        shape = found["classifier.weight"][1]
        layers["classifier"] = ("output", shape[0] if len(shape) == 2 else 0)
        if f"{hidden}.weight" in found or not of_genes:
            layers[hidden] = ("dense", size)
    names = [name for name in expected if name not in absent and not (layers and name.startswith(HEAD))]
    shapes = {theirs(name): expected[name] for name in names}
    copies = {copy: name for copy, name in COPIES.items() if copy in found and copy not in shapes and name in names}
    shapes |= {copy: expected[name] for copy, name in copies.items()}
    for layer, (_, width) in layers.items():
        shapes[f"{layer}.weight"] = torch.empty(width, size, device="meta")
        shapes[f"{layer}.bias"] = torch.empty(width, device="meta")
    read = read_tensors(path / WEIGHTS, shapes, COUNTED)
    for copy, name in copies.items():
        if not torch.equal(read[copy], read[name]):
            raise ScbinModelError("M02", f"{copy} in {WEIGHTS} differs from {name}, with which it should be tied.")
    tensors = {name: read[theirs(name)] if name in names else torch.zeros(expected[name].shape) for name in expected}
    if layers:
        tensors[f"{HEAD}transform.dense.weight"].fill_diagonal_(1)
        tensors[f"{HEAD}transform.LayerNorm.weight"].fill_(1)
        tensors |= {DECODER: tensors[WORDS]} if DECODER in expected else {}
    parts = ("weight", "bias")
    return tensors, {f"{ours}.{k}": read[f"{layer}.{k}"] for layer, (ours, _) in layers.items() for k in parts}


def _labels(
    vocabulary: Vocabulary, weights: dict[str, Tensor], target: str, class_names: Any, stored: Any = None, **design: Any
) -> LabelHead | GeneHead | None:
    """Return the head of a classifier; its classes are those given, or those that config.json stores, or LABEL_0 and so on."""
    if not weights:
        if class_names is not None:
            raise ScbinInputError("A02", "class_names were given, but this model is no classifier.")
        return None
    n_classes, size = weights["output.weight"].shape
    if class_names is not None and (isinstance(class_names, str) or len(class_names) != n_classes):
        what = f"class_names={shown(class_names)} does not name each of them."
        raise ScbinInputError("A02", f"the model tells {n_classes} classes apart; {what}")
    names = class_names
    if names is None and isinstance(stored, dict):
        names = [stored.get(str(k)) for k in range(n_classes)]
    if names is None or not all(type(each) is str for each in names):
        names = [f"LABEL_{k}" for k in range(n_classes)]
    answer = {"name": target, "classes": list(names)}
    head: LabelHead | GeneHead
    if "dense.weight" in weights:
        head = LabelHead(vocabulary, size, [answer], expression=False, **design)
    else:
        head = GeneHead(vocabulary, size, [answer])
    head.load_state_dict(head.state_dict() | weights)
    return head.eval()


def read_geneformer(path: Path, dictionaries: Path | None, target: str, class_names: Sequence[str] | None) -> Published:
    """Return a Geneformer model, V1 or V2, pretrained or a classifier of cells or genes, with the vocabulary of its version."""
    content = _read_config(path)
    config = _bert_config(content)
    tensors, weights = _read_weights(path, config, "bert.pooler.dense", of_genes=True)
    tokens, medians, *names = find_dictionaries(path, dictionaries, config.vocab_size)
    vocabulary = geneformer_vocabulary(tokens or {}, medians or {}, *names)
    vocabulary = replace(vocabulary, max_length=config.max_position_embeddings)
    design = {"hidden": "tanh", "dropout": config.hidden_dropout_prob}
    labels = _labels(vocabulary, weights, target, class_names, content.get("id2label"), **design)
    version = VERSIONS.get(config.vocab_size, (f"with {config.vocab_size:,} tokens",))[0]
    return Published(assemble(config, tensors), vocabulary, labels, f"Geneformer {version}")


FRAME = 8  # positions that are no gene: [CLS], five phenotypes, [START], [END]
POSITION_OF = {"sex": 1, "tissue": 2, "cell_type": 3, "age": 4, "disease": 5}


def _bins_vocabulary(
    genes: Sequence[str],
    n_genes: int,
    specials: dict[str, int],
    phenotypes: tuple[Phenotype, ...],
    first_bin: int,
    n_edges: int,
    edges: Sequence[float] | None,
    published: Mapping[int, Bins],
) -> Vocabulary:
    """Return the vocabulary, if the network has a position for each gene and an id for each bin."""
    if isinstance(genes, str) or not all(isinstance(gene, str) and gene for gene in genes):
        raise ScbinInputError("A01", "genes needs the list of gene names in the order of the training.")
    if len(genes) != n_genes:
        what = f"genes has {len(genes):,} names, but this model has positions for {n_genes:,}"
        raise ScbinInputError(
            "A02", f"{what}. Pass the list of its training, in that order; the model does not store it."
        )
    if edges is None and n_edges not in published:
        what = f"the token ids of this model leave room for {n_edges} edges between bins, which no published model has"
        raise ScbinInputError("A02", f"{what}. Check phenotypes=, or pass edges= as they were in training.")
    if edges is not None and len(edges) != n_edges:
        raise ScbinInputError("A02", f"edges has {len(edges)} numbers, but the token ids of this model need {n_edges}.")
    return Vocabulary(
        encoding="bins",
        genes=tuple(map(str, genes)),
        specials=specials,
        phenotypes=phenotypes,
        first_gene_id=first_bin,
        first_gene_position=FRAME - 1,
        max_length=n_genes + FRAME,
        # Polygene has tokens for genes in bin 0 too, which no other attends to: leaving them out changes nothing else
        bins=Bins(published[n_edges].edges if edges is None else tuple(np.asarray(edges, dtype=np.float64).tolist())),
        gene_shares=(1 / n_genes,) * n_genes,  # what counts each gene held in training is unknown
    )


def _values(phenotypes: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Return lists of values under scbin's names of the categories; `{value: id}` is taken in the order of the ids."""
    found: dict[str, tuple[str, ...]] = {}
    for category, values in phenotypes.items():
        if isinstance(values, dict) and all(type(number) is int for number in values.values()):
            values = sorted(values, key=values.__getitem__)
        name = "age" if category == "development_stage" else category
        if name not in POSITION_OF:
            raise ScbinInputError("A02", f"{shown(category)} is none of the phenotypes {', '.join(POSITION_OF)}.")
        if isinstance(values, str | dict) or not all(isinstance(value, str) for value in values):
            what = "needs a list of texts in the order of the token ids."
            raise ScbinInputError("A01", f"phenotypes[{shown(category)}] {what}")
        found[name] = tuple(map(_plain_value, values))
    return found


def _plain_value(text: str) -> str:
    """Return the value that a token such as `[B_cell]` stands for; a value without brackets is one already."""
    inner = text.strip()
    return inner[1:-1].replace("_", " ") if inner.startswith("[") and inner.endswith("]") else text


NAMES, POLYGENE_BIN = "vocab.txt", 274
# first id of the values and their number, id of "missing"
POLYGENE = {
    **{"sex": (241, 2, 7), "tissue": (21, 45, 8), "cell_type": (66, 161, 9)},
    **{"age": (227, 14, 10), "disease": (243, 31, 11)},
}


def read_polygene(
    path: Path, genes: Sequence[str], phenotypes: Mapping[str, Sequence[str]] | None, edges: Sequence[float] | None
) -> Published:
    """Return a Polygene model: our own layout with other token ids."""
    config = _bert_config(_read_config(path))
    values = _polygene_values(path / NAMES, phenotypes)
    vocabulary = _bins_vocabulary(
        genes,
        config.max_position_embeddings - FRAME,
        {PAD: 0, MASK: 1, CLS: 3, START: 5, END: 6},
        tuple(Phenotype(n, values[n], POSITION_OF[n], first, missing) for n, (first, _, missing) in POLYGENE.items()),
        POLYGENE_BIN,
        config.vocab_size - POLYGENE_BIN - 1,
        edges,
        {n: Bins.polygene(n + 1) for n in range(1, 256)},
    )
    return Published(assemble(config, _read_weights(path, config)[0]), vocabulary, None, "Polygene")


def _polygene_values(path: Path, phenotypes: Mapping[str, Sequence[str]] | None) -> dict[str, tuple[str, ...]]:
    """Return the values of each phenotype in the order of their ids, from the lists given or the text beside the model."""
    listed: dict[str, tuple[str, ...]] = {}
    if os.path.lexists(path):
        check_plain(path, MAX_JSON)
        try:
            texts = path.read_text(encoding="utf-8").splitlines()
        except ValueError as error:
            raise ScbinModelError("M02", f"{path.name} is not text ({str(error)[:80]}).") from error
        if len(texts) < POLYGENE_BIN or [text.upper() for text in texts[:4]] != ["[PAD]", "[MASK]", "[SEP]", "[CLS]"]:
            raise ScbinModelError("M02", f"{path.name} does not list Polygene's tokens, one per line from [PAD] on.")
        for name, (first, n, _) in POLYGENE.items():
            listed[name] = tuple(map(_plain_value, texts[first : first + n]))
    if phenotypes is None:
        if not listed:
            what = f"{path.parent} has no {NAMES} with the names of the tokens"
            raise ScbinInputError("A03", f"{what}: pass phenotypes={{'sex': [...], ...}}.")
        return listed
    given = _values(phenotypes)
    for name, (_, n, _) in POLYGENE.items():
        own = given.get(name, ())
        if len(own) != n:
            raise ScbinInputError("A02", f"Polygene knows {n} values of {name!r}; phenotypes has {len(own)}.")
        if listed and [v.replace("_", " ") for v in own] != [v.replace("_", " ") for v in listed[name]]:
            raise ScbinInputError("A03", f"the values of {name!r} are not those of {path.name}, in its order.")
    return given


ORDER = ("cell_type", "age", "disease", "sex", "tissue")  # of its token ids and of its token types
SPECIALS = [3, 2, 0, 1]  # its ids of [PAD], [MASK], [CLS] and [EOS], in the order of ours
DROPOUT = 0.2  # of its classifiers
KEYS = {
    **{"dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads"},
    **{"hidden_dim": "intermediate_size", "activation": "hidden_act", "dropout": "hidden_dropout_prob"},
    **{"type_vocab_size": "max_position_embeddings", "vocab_size": "vocab_size"},
    **{"initializer_range": "initializer_range"},
}
# our names, in the order in which they are replaced, and theirs
DISTILBERT: dict[str, str | Callable[[re.Match[str]], str]] = {
    r"^bert\.embeddings\.position_embeddings": "distilbert.embeddings.token_type_embeddings",
    r"^bert\.embeddings": "distilbert.embeddings",
    r"^bert\.encoder\.layer": "distilbert.transformer.layer",
    r"attention\.self\.(query|key|value)": lambda found: f"attention.{found[1][0]}_lin",
    r"attention\.output\.dense": "attention.out_lin",
    r"attention\.output\.LayerNorm": "sa_layer_norm",
    r"intermediate\.dense": "ffn.lin1",
    r"(\d)\.output\.dense": r"\1.ffn.lin2",
    r"(\d)\.output\.LayerNorm": r"\1.output_layer_norm",
    r"^cls\.predictions\.transform\.dense": "vocab_transform",
    r"^cls\.predictions\.transform\.LayerNorm": "vocab_layer_norm",
    r"^cls\.predictions\.decoder": "vocab_projector",
    r"^cls\.predictions\.bias": "vocab_projector.bias",
}


def read_perturbgene(
    path: Path,
    genes: Sequence[str],
    phenotypes: Mapping[str, Sequence[str]],
    edges: Sequence[float] | None,
    target: str,
    class_names: Sequence[str] | None,
) -> Published:
    """Return a PerturbGene model, a DistilBERT whose token types are our positions, pretrained or a classifier of cells."""
    content = {KEYS[key]: value for key, value in _read_config(path).items() if key in KEYS}
    theirs = _bert_config(content, type_vocab_size=1, tie_word_embeddings=False, pad_token_id=0, layer_norm_eps=1e-12)
    values = _values(phenotypes)
    if set(values) != set(ORDER):
        what = f"{', '.join(ORDER)}; found {', '.join(values) or 'none'}"
        raise ScbinInputError("A02", f"phenotypes needs the values of {what}.")
    *starts, first_bin = np.cumsum([4, *(len(values[name]) for name in ORDER)]).tolist()
    start_of = dict(zip(ORDER, starts, strict=True))
    vocabulary = _bins_vocabulary(
        genes,
        theirs.max_position_embeddings - 6,
        {PAD: 0, MASK: 1, CLS: 2, END: 3},
        # a cell without a label has no token: PerturbGene leaves such a category out
        tuple(Phenotype(n, values[n], at, start_of[n], missing_id=0) for n, at in POSITION_OF.items()),
        first_bin,
        theirs.vocab_size - first_bin - 1,
        edges,
        {n: Bins.perturbgene(n) for n in (1, 10)},
    )
    absent = (TYPES, DECODER_BIAS)
    tensors, weights = _read_weights(path, theirs, "pre_classifier", renamed=DISTILBERT, absent=absent)
    labels = _labels(vocabulary, weights, target, class_names, hidden="relu", dropout=DROPOUT)
    for name in (WORDS, DECODER, f"{HEAD}bias"):  # rows in the order of our ids
        tensors[name] = torch.cat([tensors[name][SPECIALS], tensors[name][4:]])
    tensors[DECODER_BIAS] = tensors[f"{HEAD}bias"].clone()
    old = tensors[POSITIONS]  # (genes + 6, H): none, the phenotypes in their order, the genes
    rows = [0, *(1 + ORDER.index(name) for name in POSITION_OF)]
    start = torch.zeros_like(old[:1])  # [START], which they do not have and no row has
    tensors[POSITIONS] = torch.cat([old[rows], start, old[6:], old[:1]])
    config = _bert_config(theirs.to_dict(), max_position_embeddings=vocabulary.n_positions)
    return Published(assemble(config, tensors), vocabulary, labels, "PerturbGene")
