"""Polygene's and PerturbGene's checkpoints: a position per gene, phenotypes as tokens."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from scbin._errors import ScbinInputError, ScbinModelError
from scbin.encoding.bins import Bins
from scbin.encoding.vocabulary import CLS, END, MASK, PAD, START, Phenotype, Vocabulary
from scbin.nn.checkpoint import WEIGHTS, assemble, expected_shapes
from scbin.nn.heads import HeadPlan, Target, head_from
from scbin.nn.published import (
    POSITIONS,
    PREFIX,
    WORDS,
    Published,
    blank_output,
    check_edges,
    check_genes,
    network_config,
    read_files,
)
from scbin.nn.untrusted import MAX_JSON, check_plain, read_header, read_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor
    from transformers import BertConfig

FRAME = 8  # positions that are no gene: [CLS], five phenotypes, [START], [END]
POSITION_OF = {"sex": 1, "tissue": 2, "cell_type": 3, "age": 4, "disease": 5}

# ---- Polygene --------------------------------------------------------------------------------------------------------

VOCABULARY_FILE = "vocab.txt"
_POLYGENE_SPECIALS = {PAD: 0, MASK: 1, CLS: 3, START: 5, END: 6}
# first id of the values and their number, id of "missing"
_POLYGENE_PHENOTYPES = {"sex": (241, 2, 7), "tissue": (21, 45, 8), "cell_type": (66, 161, 9)}
_POLYGENE_PHENOTYPES |= {"age": (227, 14, 10), "disease": (243, 31, 11)}
_POLYGENE_BINS = 274


def read_polygene(
    path: Path,
    genes: Sequence[str],
    phenotypes: Mapping[str, Sequence[str]] | None,
    edges: Sequence[float] | None,
) -> Published:
    """Return a Polygene model: our own layout with other token ids."""
    content = read_files(path)
    config = network_config(content)
    names = check_genes(genes, config.max_position_embeddings - FRAME, "Polygene")
    n_edges = config.vocab_size - _POLYGENE_BINS - 1
    even = {n: Bins.polygene(n + 1).edges for n in range(1, 256)}
    values = _polygene_values(path / VOCABULARY_FILE, phenotypes)
    vocabulary = Vocabulary(
        encoding="bins",
        genes=names,
        specials=_POLYGENE_SPECIALS,
        phenotypes=tuple(
            Phenotype(name, values[name], POSITION_OF[name], first, missing)
            for name, (first, _, missing) in _POLYGENE_PHENOTYPES.items()
        ),
        first_gene_id=_POLYGENE_BINS,
        first_gene_position=FRAME - 1,
        max_length=config.max_position_embeddings,
        # genes in bin 0 are attended to by no token in Polygene, so that leaving them out changes nothing else
        bins=Bins(check_edges(edges, n_edges, even), zeros="drop"),
        gene_shares=_alike(names),
    )
    return Published(
        assemble(config, read_tensors(path / WEIGHTS, expected_shapes(config))), vocabulary, None, "Polygene"
    )


def _polygene_values(path: Path, phenotypes: Mapping[str, Sequence[str]] | None) -> dict[str, tuple[str, ...]]:
    """Return the values of each phenotype in the order of their ids, from the lists given or the text beside the model."""
    there = os.path.lexists(path)
    if phenotypes is None and not there:
        raise ScbinInputError(
            "M61",
            f"{path.parent} has no {VOCABULARY_FILE} with the names of the tokens: pass phenotypes={{'sex': [...], ...}}.",
        )
    texts = _read_lines(path) if there else []
    if there and (
        len(texts) < _POLYGENE_BINS or [text.upper() for text in texts[:4]] != ["[PAD]", "[MASK]", "[SEP]", "[CLS]"]
    ):
        raise ScbinModelError("M62", f"{path.name} does not list Polygene's tokens, one per line from [PAD] on.")
    listed = {
        name: tuple(_plain(text) for text in texts[first : first + n])
        for name, (first, n, _) in _POLYGENE_PHENOTYPES.items()
    }
    if phenotypes is None:
        return listed
    given = _by_category(phenotypes)
    for name, (_, n, _) in _POLYGENE_PHENOTYPES.items():
        if len(given.get(name, ())) != n:
            raise ScbinInputError(
                "M61", f"Polygene knows {n} values of {name!r}; phenotypes has {len(given.get(name, ()))}."
            )
        if there and tuple(map(_token, given[name])) != tuple(map(_token, listed[name])):
            raise ScbinInputError(
                "M61", f"the values of {name!r} in phenotypes are not those of {path.name}, in its order."
            )
    return given


def _alike(genes: tuple[str, ...]) -> tuple[float, ...]:
    """Return equal shares: what counts each gene held in training is unknown, so overlap is weighed by genes."""
    return (1 / len(genes),) * len(genes)


def _read_lines(path: Path) -> list[str]:
    check_plain(path, MAX_JSON)
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except ValueError as error:
        raise ScbinModelError("M62", f"{path.name} is not text ({str(error)[:80]}).") from error


def _by_category(phenotypes: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Return lists of values under scbin's names of the categories; `{value: id}` is taken in the order of the ids."""
    found: dict[str, tuple[str, ...]] = {}
    for name, values in phenotypes.items():
        if isinstance(values, dict) and all(type(number) is int for number in values.values()):
            values = sorted(values, key=values.__getitem__)
        if isinstance(values, str | dict) or not all(isinstance(value, str) for value in values):
            raise ScbinInputError(
                "M61", f"phenotypes[{str(name)[:80]!r}] needs a list of texts in the order of the token ids."
            )
        name = "age" if name == "development_stage" else name
        if name not in POSITION_OF:
            raise ScbinInputError("M61", f"{str(name)[:80]!r} is none of the phenotypes {', '.join(POSITION_OF)}.")
        found[name] = tuple(_plain(value) for value in values)
    return found


def _plain(text: str) -> str:
    """Return the value that a token such as `[B_cell]` stands for; a value without brackets is one already."""
    inner = re.fullmatch(r"\[(.*)\]", text.strip())
    return text if inner is None else inner[1].replace("_", " ")


def _token(value: str) -> str:
    return f"[{value.replace(' ', '_')}]"


# ---- PerturbGene -----------------------------------------------------------------------------------------------------

_ORDER = ("cell_type", "age", "disease", "sex", "tissue")  # of its token ids and of its token types
_OLD_SPECIALS = [3, 2, 0, 1]  # its ids of [PAD], [MASK], [CLS] and [EOS], in the order of ours
_KEYS = {"dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads"}
_KEYS |= {"hidden_dim": "intermediate_size", "activation": "hidden_act", "dropout": "hidden_dropout_prob"}
_KEYS |= {
    "type_vocab_size": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "initializer_range": "initializer_range",
}
_WITHIN_LAYER = {
    "attention.self.query": "attention.q_lin",
    "attention.self.key": "attention.k_lin",
    "attention.self.value": "attention.v_lin",
    "attention.output.dense": "attention.out_lin",
    "attention.output.LayerNorm": "sa_layer_norm",
    "intermediate.dense": "ffn.lin1",
    "output.dense": "ffn.lin2",
    "output.LayerNorm": "output_layer_norm",
}
_TYPES = "bert.embeddings.token_type_embeddings.weight"
_OUTSIDE = {
    WORDS: "distilbert.embeddings.word_embeddings.weight",
    POSITIONS: "distilbert.embeddings.token_type_embeddings.weight",
    f"{PREFIX}decoder.weight": "vocab_projector.weight",
    f"{PREFIX}bias": "vocab_projector.bias",
}
_OUTSIDE |= {
    f"{ours}.{part}": f"{theirs}.{part}"
    for ours, theirs in (
        ("bert.embeddings.LayerNorm", "distilbert.embeddings.LayerNorm"),
        (f"{PREFIX}transform.dense", "vocab_transform"),
        (f"{PREFIX}transform.LayerNorm", "vocab_layer_norm"),
    )
    for part in ("weight", "bias")
}
_HEAD = {"pre_classifier": "dense", "classifier": "output"}


def read_perturbgene(
    path: Path,
    genes: Sequence[str],
    phenotypes: Mapping[str, Sequence[str]],
    edges: Sequence[float] | None,
    target: str,
    class_names: Sequence[str] | None,
) -> Published:
    """Return a PerturbGene model: a DistilBERT whose token types are our positions."""
    content = read_files(path)
    content = {_KEYS[key]: value for key, value in content.items() if key in _KEYS}
    theirs = network_config(content, type_vocab_size=1, tie_word_embeddings=False, pad_token_id=0, layer_norm_eps=1e-12)
    names = check_genes(genes, theirs.max_position_embeddings - 6, "PerturbGene")
    values = _by_category(phenotypes)
    if set(values) != set(_ORDER):
        raise ScbinInputError(
            "M61", f"phenotypes needs the values of {', '.join(_ORDER)}; got {', '.join(values) or 'none'}."
        )
    starts = dict(zip(_ORDER, np.cumsum([4, *(len(values[name]) for name in _ORDER)]).tolist(), strict=False))
    first_bin = 4 + sum(len(values[name]) for name in _ORDER)
    even = {n: Bins.perturbgene(n).edges for n in (1, 10)}
    vocabulary = Vocabulary(
        encoding="bins",
        genes=names,
        specials={PAD: 0, MASK: 1, CLS: 2, END: 3},
        # a cell without a label has no token: PerturbGene leaves such a category out
        phenotypes=tuple(Phenotype(n, values[n], at, starts[n], missing_id=0) for n, at in POSITION_OF.items()),
        first_gene_id=first_bin,
        first_gene_position=FRAME - 1,
        max_length=len(names) + FRAME,
        bins=Bins(check_edges(edges, theirs.vocab_size - first_bin - 1, even)),
        gene_shares=_alike(names),
    )
    config = network_config(theirs.to_dict(), max_position_embeddings=vocabulary.n_positions)
    tensors, plan = _perturbgene_tensors(path / WEIGHTS, theirs, target, class_names)
    head = None
    if plan is not None:
        own = {
            f"{ours}.{part}": tensors.pop(f"{his}.{part}") for his, ours in _HEAD.items() for part in ("weight", "bias")
        }
        head = head_from(plan, own, config.hidden_size, len(names))
    return Published(assemble(config, _renumbered(tensors)), vocabulary, head, "PerturbGene")


def _perturbgene_tensors(
    path: Path, theirs: BertConfig, target: str, class_names: Sequence[str] | None
) -> tuple[dict[str, Tensor], HeadPlan | None]:
    """Return the tensors under our names, in their order of rows, and those of a classifier with its plan."""
    shapes = expected_shapes(theirs)
    blank = torch.zeros(shapes.pop(_TYPES))
    shapes.pop(f"{PREFIX}decoder.bias")  # the same as the bias
    found = read_header(path)
    classifier, plan = found.get("classifier.weight"), None
    wanted = {name: _their_name(name) for name in shapes}
    if classifier is not None:
        wanted = {ours: his for ours, his in wanted.items() if not ours.startswith(PREFIX)}
    read = {his: shapes[ours] for ours, his in wanted.items()}
    if classifier is not None:
        hidden, n_classes = theirs.hidden_size, classifier[0] if len(classifier) == 2 else 0
        read |= {"pre_classifier.weight": (hidden, hidden), "pre_classifier.bias": (hidden,)}
        read |= {"classifier.weight": (n_classes, hidden), "classifier.bias": (n_classes,)}
        classes = tuple(class_names or (f"LABEL_{k}" for k in range(n_classes)))
        if len(classes) != n_classes:
            raise ScbinInputError("M37", f"the model tells {n_classes} classes apart; class_names has {len(classes)}.")
        plan = HeadPlan("mlp", (Target(target, "class", classes),))
    elif class_names is not None:
        raise ScbinInputError("M37", "class_names were given, but this model is no classifier.")
    tensors = read_tensors(path, read)
    ours = {name: tensors.pop(his) for name, his in wanted.items()}
    if classifier is not None:
        ours |= blank_output(theirs) | {f"{PREFIX}decoder.weight": ours[WORDS].clone()}
    return ours | tensors | {_TYPES: blank}, plan


def _their_name(name: str) -> str:
    """Return PerturbGene's name of a tensor of BERT."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    layer = re.fullmatch(r"bert\.encoder\.layer\.(\d+)\.(.+)\.(weight|bias)", name)
    if layer is None:
        raise KeyError(name)
    return f"distilbert.transformer.layer.{layer[1]}.{_WITHIN_LAYER[layer[2]]}.{layer[3]}"


def _renumbered(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with their rows in the order of our ids and positions."""
    out = dict(tensors)
    for name in (WORDS, f"{PREFIX}decoder.weight", f"{PREFIX}bias"):
        rows = torch.arange(len(tensors[name]))
        rows[:4] = torch.tensor(_OLD_SPECIALS)
        out[name] = tensors[name][rows].clone()
    out[f"{PREFIX}decoder.bias"] = out[f"{PREFIX}bias"].clone()
    old = tensors[POSITIONS]  # (genes + 6, H): none, the phenotypes in their order, the genes
    rows = torch.tensor([0, *(1 + _ORDER.index(name) for name in POSITION_OF)])
    start = torch.zeros_like(old[:1])  # [START], which they do not have and no row has
    out[POSITIONS] = torch.cat([old[rows], start, old[6:], old[:1]])
    return out
