"""Models that others published, checked like our own directories and brought under BERT's names: Geneformer, Polygene, PerturbGene."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from scbin._arguments import shown
from scbin._errors import ScbinInputError, ScbinInputWarning, ScbinModelError
from scbin.io.dictionaries import VERSIONS, find_dictionaries, geneformer_vocabulary
from scbin.io.directory import CONFIG, WEIGHTS, Content, assemble, expected_tensors
from scbin.io.files import MAX_JSON, check_files, check_plain, make_config, read_header, read_json, read_tensors
from scbin.nn.bert import BertBackbone
from scbin.nn.labels import GeneHead, LabelHead
from scbin.nn.network import CellNetwork
from scbin.nn.vector import PooledVector
from scbin.tokens.rules import Bins
from scbin.tokens.vocabulary import CLS, END, MASK, PAD, START, Phenotype, Vocabulary

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor
    from transformers import BertConfig

HEAD, EMBEDDINGS = "cls.predictions.", "bert.embeddings."
WORDS, POSITIONS = f"{EMBEDDINGS}word_embeddings.weight", f"{EMBEDDINGS}position_embeddings.weight"
DECODER, BIAS, DECODER_BIAS = (f"{HEAD}{name}" for name in ("decoder.weight", "bias", "decoder.bias"))
# what some files hold beside the weights: those that are tied to others, and 0, 1, 2 ...
IGNORED = (DECODER, DECODER_BIAS, f"{EMBEDDINGS}position_ids")


# ---- what all of them need --------------------------------------------------------------------------------------------


def _read_config(path: Path) -> dict[str, Any]:
    """Return config.json of a directory, after looking at the two files that are read; others are left alone."""
    check_files(path, (CONFIG, WEIGHTS))
    return read_json(path / CONFIG)


def _bert_config(content: Mapping[str, Any], **changes: Any) -> BertConfig:
    config = make_config({**content, **changes}, CONFIG)
    config.attention_probs_dropout_prob = 0.0  # the packed attention has none
    return config


def _read_weights(
    path: Path, config: BertConfig, theirs: Callable[[str], str | None] = lambda name: name, hidden: str = ""
) -> dict[str, Tensor]:
    """Return the tensors of a network by BERT's names and, of a classifier, `dense` and `output` of its head.

    `theirs` turns BERT's names into those in the file, `None` where it has no such tensor; `hidden` is their name of the layer
    before the output of a classifier of cells. A classifier is published without the output layer of a BERT: it gets zeros.
    """
    found, width = read_header(path / WEIGHTS), config.hidden_size
    entries = {name: (theirs(name), blank) for name, blank in expected_tensors(config).items()}
    n_classes = found.get("classifier.weight", ("", ()))[1][:1] if hidden else ()
    if n_classes:
        entries |= {name: (None, blank) for name, (_, blank) in entries.items() if name.startswith(HEAD)}
        for own, layer, n in (("dense", hidden, (width,)), ("output", "classifier", n_classes)):
            if f"{layer}.weight" in found:  # a classifier of genes has no dense layer
                entries[f"{own}.weight"] = f"{layer}.weight", torch.empty(*n, width, device="meta")
                entries[f"{own}.bias"] = f"{layer}.bias", torch.empty(n, device="meta")
    read = read_tensors(path / WEIGHTS, {name: blank for name, blank in entries.values() if name is not None}, IGNORED)
    return {own: torch.zeros(blank.shape) if name is None else read[name] for own, (name, blank) in entries.items()}


def _content(
    source: str, bert: Any, vocabulary: Vocabulary, usual: tuple[Any, int] = ("mean", -1), head: Any = None
) -> Content:
    """Return what a model consists of; a classifier has the vector that its head reads."""
    if head is not None:
        usual = ("mean" if isinstance(head, GeneHead) else "first", -1)
    backbone = BertBackbone(bert)
    network = CellNetwork(backbone, PooledVector(vocabulary, backbone.hidden_size, *usual), labels=head)
    return network.eval(), vocabulary, {"published_as": source}, pd.DataFrame()


def _head(
    vocabulary: Vocabulary, tensors: Mapping[str, Tensor], target: str, class_names: Any, stored: Any, **design: Any
) -> Any:
    """Return the head of a classifier; its classes are those given, or those that config.json stores, or LABEL_0 and so on."""
    weights = {name: tensor for name, tensor in tensors.items() if name.startswith(("dense.", "output."))}
    n_classes, size = weights["output.weight"].shape if weights else (0, 0)
    known = stored if isinstance(stored, dict) else {}
    names = class_names or [str(known.get(str(k), f"LABEL_{k}")) for k in range(n_classes)]
    if isinstance(names, str) or len(names) != n_classes:
        what = f"class_names={shown(class_names)} was given, but the model has {n_classes} classes"
        raise ScbinInputError("A02", f"{what}. Name each of them; omit it if the model is not a classifier.")
    if not weights:
        return None
    targets: list[Any] = [{"name": target, "classes": list(names)}]
    head: Any = GeneHead(vocabulary, size, targets)
    if "dense.weight" in weights:  # of cells
        head = LabelHead(vocabulary, size, targets, expression=False, **design)
    head.load_state_dict(head.state_dict() | weights)
    return head.eval()


# ---- Geneformer -------------------------------------------------------------------------------------------------------


def read_geneformer(path: Path, dictionaries: Path | None, target: str, class_names: Any) -> Content:
    """Return a Geneformer model, V1 or V2, pretrained or a classifier of cells or genes, with the vocabulary of its version."""
    content = _read_config(path)
    config = _bert_config(content)
    tensors = _read_weights(path, config, hidden="bert.pooler.dense")
    vocabulary = geneformer_vocabulary(*find_dictionaries(path, dictionaries, config.vocab_size))
    vocabulary = replace(vocabulary, max_length=config.max_position_embeddings)
    if vocabulary.name_map is None:
        text = "the dictionaries name no gene by symbol, or are not there: genes are found by Ensembl id only."
        warnings.warn(ScbinInputWarning("V05", text), stacklevel=4)
    design = {"hidden": "tanh", "dropout": config.hidden_dropout_prob}
    head = _head(vocabulary, tensors, target, class_names, content.get("id2label"), **design)
    source = f"Geneformer {VERSIONS.get(config.vocab_size, f'with {config.vocab_size:,} tokens')}"
    usual = ("cls" if CLS in vocabulary.specials else "mean", -2)
    return _content(source, assemble(config, tensors), vocabulary, usual, head)


# ---- Polygene and PerturbGene: bins of expression, a position for each gene -------------------------------------------

FRAME = 8  # positions that are no gene: [CLS], five phenotypes, [START], [END]
POSITION_OF = {"sex": 1, "tissue": 2, "cell_type": 3, "age": 4, "disease": 5}


def _bins_vocabulary(
    genes: Sequence[str], n_genes: int, edges: Any, n_edges: int, published: Collection[int], **parts: Any
) -> Vocabulary:
    """Return the vocabulary, if the network has a position for each gene and an id for each bin."""
    if len(genes) != n_genes or (n_edges not in published if edges is None else len(edges) != n_edges):
        what = f"this model has positions for {n_genes:,} genes and token ids for {n_edges} edges between bins"
        fix = f"Pass its {n_genes:,} genes in the order of training, not {len(genes):,}; check phenotypes= and edges="
        raise ScbinInputError("A02", f"{what}, which is not what was given. {fix}.")
    between = np.linspace(0.1, 9.0, n_edges) if edges is None else edges
    return Vocabulary(
        encoding="bins",
        genes=tuple(map(str, genes)),
        first_gene_position=FRAME - 1,
        max_length=n_genes + FRAME,
        # Polygene has tokens for genes in bin 0 too, which no other attends to: leaving them out changes nothing else
        bins=Bins(tuple(map(float, between))),
        gene_shares=(1 / n_genes,) * n_genes,  # what counts each gene held in training is unknown
        **parts,
    )


def _values(phenotypes: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, tuple[str, ...]]:
    """Return the values of each category under scbin's names of them, if they are as many as the model has (0: any number)."""
    given = {"age" if name == "development_stage" else name: values for name, values in phenotypes.items()}
    for name in {**sizes, **given}:
        values, n = given.get(name, ()), sizes.get(name, -1)
        if isinstance(values, str) or not values or len(values) != (n or len(values)):
            what = f"phenotypes needs the values of {', '.join(sizes)} in the order of their tokens"
            raise ScbinInputError("A02", f"{what}; those of {name!r} are not as many as in the model: {shown(values)}.")
    return {name: tuple(map(_plain_value, given[name])) for name in sizes}


def _plain_value(text: str) -> str:
    """Return the value that a token such as `[B_cell]` stands for; a value without brackets is one already."""
    return text[1:-1].replace("_", " ") if text.startswith("[") and text.endswith("]") else text


NAMES, POLYGENE_BIN = "vocab.txt", 274
# first id of the values and their number; the id of "missing" is six more than the position
POLYGENE = {"sex": (241, 2), "tissue": (21, 45), "cell_type": (66, 161), "age": (227, 14), "disease": (243, 31)}


def read_polygene(path: Path, genes: Sequence[str], phenotypes: Any, edges: Any) -> Content:
    """Return a Polygene model: our own layout with other token ids."""
    config = _bert_config(_read_config(path))
    listed = _polygene_names(path / NAMES) if phenotypes is None else phenotypes
    values = _values(listed, {name: n for name, (_, n) in POLYGENE.items()})
    vocabulary = _bins_vocabulary(
        genes,
        config.max_position_embeddings - FRAME,
        edges,
        config.vocab_size - POLYGENE_BIN - 1,
        published=range(1, 256),
        specials={PAD: 0, MASK: 1, CLS: 3, START: 5, END: 6},
        phenotypes=tuple(Phenotype(k, values[k], at, POLYGENE[k][0], 6 + at) for k, at in POSITION_OF.items()),
        first_gene_id=POLYGENE_BIN,
    )
    return _content("Polygene", assemble(config, _read_weights(path, config)), vocabulary)


def _polygene_names(path: Path) -> dict[str, list[str]]:
    """Return the values of each phenotype in the order of their ids, from the text beside the model."""
    if not os.path.lexists(path):
        raise ScbinInputError("A03", f"{path} with the names of the tokens is not there: pass phenotypes=.")
    check_plain(path, MAX_JSON)
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    if len(texts) < POLYGENE_BIN or [text.upper() for text in texts[:4]] != ["[PAD]", "[MASK]", "[SEP]", "[CLS]"]:
        raise ScbinModelError("M02", f"{path.name} does not list Polygene's tokens, one per line from [PAD] on.")
    return {name: texts[first : first + n] for name, (first, n) in POLYGENE.items()}


ORDER = ("cell_type", "age", "disease", "sex", "tissue")  # of its token ids and of its token types
SPECIALS = [3, 2, 0, 1]  # its ids of [PAD], [MASK], [CLS] and [EOS], in the order of ours
DROPOUT = 0.2  # of its classifiers
KEYS = {
    **{"dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads"},
    **{"hidden_dim": "intermediate_size", "activation": "hidden_act", "dropout": "hidden_dropout_prob"},
    **{"type_vocab_size": "max_position_embeddings", "vocab_size": "vocab_size"},
    **{"initializer_range": "initializer_range"},
}
# parts of our names, in the order in which they are replaced, and of theirs
DISTILBERT = {
    "embeddings.position": "embeddings.token_type",
    "bert.encoder": "bert.transformer",
    **{f"attention.self.{name}": f"attention.{name[0]}_lin" for name in ("query", "key", "value")},
    "attention.output.dense": "attention.out_lin",
    "attention.output.LayerNorm": "sa_layer_norm",
    "intermediate.dense": "ffn.lin1",
    "output.dense": "ffn.lin2",
    "output.LayerNorm": "output_layer_norm",
    "cls.predictions.transform.dense": "vocab_transform",
    "cls.predictions.transform.LayerNorm": "vocab_layer_norm",
    "cls.predictions.decoder": "vocab_projector",
    "cls.predictions": "vocab_projector",
}


def _of_distilbert(name: str) -> str | None:
    """Return PerturbGene's name of a tensor of BERT; it has no token types beside those that are our positions."""
    if name in (f"{EMBEDDINGS}token_type_embeddings.weight", DECODER_BIAS):
        return None
    for ours, theirs in DISTILBERT.items():
        name = name.replace(ours, theirs)
    return f"distil{name}" if name.startswith("bert.") else name


def read_perturbgene(
    path: Path, genes: Sequence[str], phenotypes: Any, edges: Any, target: str, class_names: Any
) -> Content:
    """Return a PerturbGene model, a DistilBERT whose token types are our positions, pretrained or a classifier of cells."""
    content = {KEYS[key]: value for key, value in _read_config(path).items() if key in KEYS}
    theirs = _bert_config(content, type_vocab_size=1, tie_word_embeddings=False, pad_token_id=0, layer_norm_eps=1e-12)
    values = _values(phenotypes, dict.fromkeys(ORDER, 0))
    *starts, first_bin = np.cumsum([4, *(len(values[name]) for name in ORDER)]).tolist()
    start_of = dict(zip(ORDER, starts, strict=True))
    vocabulary = _bins_vocabulary(
        genes,
        theirs.max_position_embeddings - 6,
        edges,
        theirs.vocab_size - first_bin - 1,
        published=(1, 10),
        specials={PAD: 0, MASK: 1, CLS: 2, END: 3},
        # a cell without a label has no token: PerturbGene leaves such a category out
        phenotypes=tuple(Phenotype(n, values[n], at, start_of[n], missing_id=0) for n, at in POSITION_OF.items()),
        first_gene_id=first_bin,
    )
    tensors = _read_weights(path, theirs, _of_distilbert, hidden="pre_classifier")
    head = _head(vocabulary, tensors, target, class_names, None, hidden="relu", dropout=DROPOUT)
    for name in (WORDS, DECODER, BIAS):  # rows in the order of our ids
        tensors[name] = torch.cat([tensors[name][SPECIALS], tensors[name][4:]])
    tensors[DECODER_BIAS] = tensors[BIAS].clone()
    old = tensors[POSITIONS]  # (genes + 6, H): none, the phenotypes in their order, the genes
    rows = [0, *(1 + ORDER.index(name) for name in POSITION_OF)]
    start = torch.zeros_like(old[:1])  # [START], which they do not have and no row has
    tensors[POSITIONS] = torch.cat([old[rows], start, old[6:], old[:1]])
    config = _bert_config(theirs.to_dict(), max_position_embeddings=vocabulary.n_positions)
    return _content("PerturbGene", assemble(config, tensors), vocabulary, head=head)
