"""`tl.generate`: cells made by a model."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

import scbin
from scbin import _keys
from scbin._anndata import check_adata, warn
from scbin._arguments import flags, numbers, plain, texts, whole_numbers
from scbin._errors import ScbinInputError, ScbinTypeError
from scbin.encoding.phenotypes import labels_of
from scbin.model import Model
from scbin.nn.decoder import partial_tokens
from scbin.nn.embedding import embed_tokens
from scbin.nn.sampling import Sampler, choose_values, expression_values
from scbin.pp._phenotypes import cell_labels
from scbin.tl._embed import embed
from scbin.tl._perturb_genes import gene_names

if TYPE_CHECKING:
    from anndata import AnnData

    from scbin.encoding.vocabulary import Phenotype, Vocabulary
    from scbin.nn.decoder import Decoder, Vectors


def generate(
    model: Model | str | os.PathLike[str],
    phenotypes: Mapping[str, str] | None = None,
    n_cells: int | None = None,
    *,
    like: AnnData | None = None,
    balance: str | None = None,
    n_genes: int | None = None,
    steps: int = 16,
    temperature: float = 1.0,
    seed: int = 0,
    device: str = "auto",
    token_budget: int = 32_768,
    progress: bool = True,
) -> AnnData:
    """Make cells of a kind, such as `{"cell_type": "B cell", "sex": "female"}`.

    For tests of methods, teaching, and to even out rare types in the training of a classifier. Made cells show what the model
    took from its data; they are no evidence about biology. The result says in every cell, in the names of the cells and in
    `uns` that it was made.

    Genes are drawn a part at a time. At first how often cells of the kind express a gene decides; then the network reads what
    has been drawn, and what it sees moves the odds of the other genes.

    Parameters
    ----------
    model
        A :class:`scbin.Model`, or the directory of one, pretrained on cells tokenized with `phenotypes=`.
    phenotypes
        What the cells are to be: a value by phenotype. What is left out is drawn as it came together in the training cells.
    n_cells
        How many. With `balance`: how many cells of each value there are to be in all. Default there: as many as the most
        frequent value has.
    like, balance
        Fill up rare classes: cells are made for the values of `like.obs[balance]`, as many as each lacks. The result holds the
        made cells alone, with the gene names of `like`.
    n_genes
        How many genes each cell expresses, about. Default: drawn as the training cells of the kind had them.
    steps
        Parts in which the genes are drawn. More cost time; from 8 to 32 little changes.
    temperature
        Below 1 the likelier is drawn more often than it is likely: cells vary less.
    seed
        The same seed gives the same cells. A cell depends on the seed and its number, not on how many are made.
    device
        `"auto"` takes cuda, then mps, then cpu.
    token_budget
        Most tokens to go through the network at once.
    progress
        Show a progress bar.

    Returns
    -------
    A new `AnnData` (cells, genes of the model) with the following fields:

    `X`
        Expression, CSR float32: log1p of counts per 10,000 where the bins are of that (the default), drawn evenly within each
        bin; counts for bins of counts; 1 for `"binary"`; for quantiles per cell the share of the cell's genes below.
    `obs[...]`
        Each phenotype of the model, categorical.
    `obs['scbin_generated']`
        True. Where made cells are joined with real ones, give those the column too: `anndata.concat` keeps common columns alone.
    `obsm['X_scbin']`
        The vector that the model gives each cell, for :func:`scbin.pl.generated`.
    `obsm['X_tokens']`, `uns['scbin']`
        The tokens and their vocabulary, so that other verbs read the cells as any others.
    `uns['scbin_generated']`
        Model, arguments and version, as JSON.

    Raises
    ------
    ScbinInputError
        If the model cannot make cells, a phenotype or value is unknown, or an argument is out of range.

    Notes
    -----
    Drawing parts of a whole given the parts before, in few steps, follows masked generative models of images.

    Examples
    --------
    >>> import scbin
    >>> adata = scbin.datasets.pbmc68k_reduced()
    >>> scbin.pp.tokenize(adata, phenotypes=["bulk_labels"])
    >>> model = scbin.tl.pretrain(adata, preset="tiny", max_steps=2, progress=False)
    >>> made = scbin.tl.generate(model, {"bulk_labels": "CD19+ B"}, n_cells=5, progress=False)
    >>> made.obs_names[0], made.shape, bool(made.obs["scbin_generated"].all())
    ('generated_0', (5, 765), True)
    """
    _check_arguments(n_cells, n_genes, steps, temperature, seed, token_budget, progress)
    model = _model_of(model)
    vocabulary, decoder = model.vocabulary, _decoder_of(model)
    wanted = _wanted(phenotypes, vocabulary)
    if (like is None) != (balance is None):
        raise ScbinInputError("S06", "like= and balance= go together: like=adata, balance='cell_type'.")
    if like is not None and balance is not None:
        rows = _lacking(check_adata(like), balance, wanted, n_cells, vocabulary)
    else:
        if n_cells is None:
            raise ScbinInputError("S05", "say how many cells to make: n_cells=100.")
        rows = np.repeat(wanted[None], n_cells, axis=0)
    if n_genes is not None and n_genes > len(vocabulary.genes):
        raise ScbinInputError("S05", f"n_genes is {n_genes}, but the model knows {len(vocabulary.genes):,} genes.")
    cells = np.arange(len(rows))
    vectors: Vectors = partial(
        embed_tokens,
        model.bert,
        weights=model.weights(),
        layer=model.readout.layer,
        device=device,
        token_budget=token_budget,
    )
    sampler = Sampler(vectors, decoder, vocabulary, steps, temperature)
    values = choose_values(rows, decoder.frequencies, seed, cells)
    sizes = sampler.sizes(values, seed, cells) if n_genes is None else np.full(len(cells), float(n_genes))
    levels = sampler.sample(values, sizes, seed, cells, progress=progress)
    made = _anndata(levels, values, vocabulary, seed, like)
    record = {
        "generated": True,
        "scbin": scbin.__version__,
        "model": model.fingerprint,
        "phenotypes": dict(phenotypes or {}),
    }
    record |= {"balance": balance, "n_genes": n_genes, "steps": steps, "temperature": temperature, "seed": seed}
    embed(made, model, device=device, token_budget=token_budget, progress=False)
    made.uns[_keys.GENERATED] = json.dumps(record | {"values": _unit(vocabulary)}, default=plain)
    return made


def _check_arguments(
    n_cells: Any, n_genes: Any, steps: Any, temperature: Any, seed: Any, token_budget: Any, progress: Any
) -> None:
    whole_numbers(optional=True, n_cells=n_cells, n_genes=n_genes)
    whole_numbers(steps=steps, seed=seed, token_budget=token_budget)
    numbers(temperature=temperature)
    flags(progress=progress)
    least = {"n_cells": (n_cells, 1), "n_genes": (n_genes, 1), "steps": (steps, 1), "seed": (seed, 0)}
    for name, (value, smallest) in {**least, "token_budget": (token_budget, 1)}.items():
        if value is not None and value < smallest:
            raise ScbinInputError("S05", f"{name} is {value}; it needs to be at least {smallest}.")
    if not 0 < temperature <= 10:
        raise ScbinInputError("S05", f"temperature is {temperature}; it needs a number above 0, at most 10.")


def _model_of(model: Any) -> Model:
    if isinstance(model, Model):
        return model
    if isinstance(model, str | os.PathLike):
        return Model.load(model)
    raise ScbinTypeError("M20", f"model is a {type(model).__name__}; pass a scbin.Model or the path of its directory.")


def _decoder_of(model: Model) -> Decoder:
    vocabulary = model.vocabulary
    if not vocabulary.position_is_gene:
        raise ScbinInputError(
            "S02",
            'this model reads genes by rank, and ranks do not say how much a gene is expressed. Tokenize with encoding="bins" '
            "and pretrain to make cells.",
        )
    if not vocabulary.phenotypes:
        raise ScbinInputError(
            "S03",
            "this model knows no phenotypes, so it cannot be told what to make. Tokenize with phenotypes=['cell_type'] and "
            "pretrain.",
        )
    if model.decoder is None:
        raise ScbinInputError(
            "S04",
            "this model has no decoder: it was fine-tuned, published by others, or trained by an earlier scbin. Use the one "
            "that scbin.tl.pretrain returned.",
        )
    return model.decoder


def _wanted(phenotypes: Any, vocabulary: Vocabulary) -> np.ndarray:
    """Return the number of the wanted value of each phenotype (phenotypes,), -1 where it is open."""
    if phenotypes is not None and not isinstance(phenotypes, Mapping):
        raise ScbinTypeError(
            "S07", f"phenotypes is a {type(phenotypes).__name__}; pass a value by phenotype: {{'cell_type': 'B cell'}}."
        )
    wanted = np.full(len(vocabulary.phenotypes), -1, dtype=np.int64)
    names = [phenotype.name for phenotype in vocabulary.phenotypes]
    for name, value in (phenotypes or {}).items():
        if name not in names:
            raise ScbinInputError(
                "S07", f"{name!r} is not a phenotype of this model. It knows: {_listed(name, names)}."
            )
        wanted[names.index(name)] = _number(value, vocabulary.phenotype(name))
    return wanted


def _number(value: object, phenotype: Phenotype) -> int:
    label = labels_of(pd.Series([value], dtype=object), phenotype.name)[0]
    if label in phenotype.values:
        return phenotype.values.index(label)
    near = _listed(str(value), list(phenotype.values))
    raise ScbinInputError("S08", f"the model never saw {phenotype.name} {str(value)!r}. Close to it: {near}.")


def _listed(name: object, names: list[str]) -> str:
    """The closest of some names, or the first ones."""
    by_lower = {known.lower(): known for known in names}
    near = difflib.get_close_matches(str(name).lower(), list(by_lower), n=5, cutoff=0.3)
    return ", ".join(repr(known) for known in ([by_lower[match] for match in near] or names[:5])) or "none"


def _lacking(
    like: AnnData, balance: str, wanted: np.ndarray, n_cells: int | None, vocabulary: Vocabulary
) -> np.ndarray:
    """Return the wanted values of the cells (cells, phenotypes) that the classes of a column lack."""
    texts(balance=balance)
    names = [phenotype.name for phenotype in vocabulary.phenotypes]
    if balance not in names:
        raise ScbinInputError(
            "S07", f"{balance!r} is not a phenotype of this model. It knows: {_listed(balance, names)}."
        )
    column = names.index(balance)
    if wanted[column] >= 0:
        raise ScbinInputError("S06", f"{balance!r} is what is balanced; leave it out of phenotypes.")
    phenotype = vocabulary.phenotypes[column]
    counts = pd.Series(cell_labels(like, balance, phenotype.age_groups)).value_counts()
    unread = [value for value in counts.index if value not in phenotype.values]
    if unread:
        warn("S09", f"no cells are made for {balance} {', '.join(map(repr, unread[:5]))}: the model never saw them.")
    counts = counts.drop(unread)
    if counts.empty:
        raise ScbinInputError("S08", f"none of the values of like.obs[{balance!r}] is one that the model has seen.")
    full = int(counts.max()) if n_cells is None else n_cells
    rows = [
        np.repeat(
            [np.where(np.arange(len(wanted)) == column, number, wanted)], max(0, full - counts.get(value, full)), axis=0
        )
        for number, value in enumerate(phenotype.values)
    ]
    if not sum(len(part) for part in rows):
        raise ScbinInputError("S06", f"every {balance} has at least {full} cells already; there is nothing to fill up.")
    return np.concatenate(rows)


def _anndata(
    levels: sparse.csr_matrix, values: np.ndarray, vocabulary: Vocabulary, seed: int, like: AnnData | None
) -> AnnData:
    cells = np.arange(levels.shape[0])
    expression = sparse.csr_matrix(
        (expression_values(levels, vocabulary, seed, cells), levels.indices, levels.indptr), levels.shape
    )
    taken = set() if like is None else set(like.obs_names)
    first = 0
    while any(f"generated_{first + k}" in taken for k in cells):
        first += len(cells)
    obs = pd.DataFrame(index=[f"generated_{first + k}" for k in cells])
    for n, phenotype in enumerate(vocabulary.phenotypes):
        obs[phenotype.name] = pd.Categorical.from_codes(values[:, n], categories=list(phenotype.values))
    obs[_keys.GENERATED] = True
    names = vocabulary.genes if like is None else gene_names(like, vocabulary).names
    made = ad.AnnData(expression.astype(np.float32), obs=obs, var=pd.DataFrame(index=list(names)))
    made.obsm[_keys.TOKENS] = _tokens(levels, values, vocabulary)
    made.uns[_keys.UNS] = {_keys.VOCABULARY: vocabulary.to_json()}
    return made


def _tokens(levels: sparse.csr_matrix, values: np.ndarray, vocabulary: Vocabulary) -> sparse.csr_matrix:
    dense = levels.toarray()
    tokens = partial_tokens(dense, np.ones(dense.shape, dtype=bool), vocabulary)
    for n, phenotype in enumerate(vocabulary.phenotypes):
        own = np.where(values[:, n] >= 0, phenotype.first_id + values[:, n], phenotype.missing_id)
        tokens.data[tokens.indices == phenotype.position] = own
    return tokens


def _unit(vocabulary: Vocabulary) -> str:
    bins = vocabulary.bins
    if bins is None or bins.n_bins == 1:
        return "1 where expressed"
    if bins.per == "cell":
        return "share of the cell's expressed genes below"
    return "counts" if bins.reads == "counts" else f"log1p of counts per {bins.target_sum:g}"
