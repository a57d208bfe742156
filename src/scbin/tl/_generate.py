"""`tl.generate`: cells made by a model."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import torch
from scipy import sparse
from tqdm.auto import tqdm

import scbin
from scbin import _docs, _keys
from scbin._adata import check_adata, gene_names, iter_blocks, read_obs, warn, write_tokens
from scbin._arguments import checked, instances, plain
from scbin._errors import ScbinInputError
from scbin.model import resolve_model
from scbin.nn.density import Density, expected_shares
from scbin.tl._embed import embed
from scbin.tokens.encoding import Encoder
from scbin.tokens.phenotypes import age_labels, labels_of, text_of
from scbin.tokens.values import Reading

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from anndata import AnnData

    from scbin.model import Model
    from scbin.nn.counts import CountHead
    from scbin.tokens.vocabulary import Vocabulary

CELLS_AT_ONCE = 512


@_docs.shared
@checked
def generate(
    model: Model | str | os.PathLike[str],
    phenotypes: Mapping[str, Any] | None = None,
    n_cells: int | None = None,
    *,
    depth: float | None = None,
    like: AnnData | None = None,
    balance: str | None = None,
    seed: int = 0,
    device: str = "auto",
    token_budget: int = 32_768,
    progress: bool = True,
) -> AnnData:
    """Generate cells of a kind, such as `{"cell_type": "B cell", "sex": "female"}`.

    For tests of methods, teaching, and to balance rare types in the training of a classifier. Generated cells show what the
    model learned from its data; they are no evidence about biology. Every cell is marked as generated, in `obs`, in its name
    and in `uns`.

    For each cell a vector is drawn from where the training cells of this kind lie, and then the counts of all genes from the
    count head, given the vector and a depth. So genes vary together within a type as they do in real cells.

    Parameters
    ----------
    model
        A :class:`scbin.Model`, or the path of its directory, pretrained on cells that were tokenized with `phenotypes=`.
    phenotypes
        What the cells are to be: a value by phenotype. What is left out is drawn as it occurred in the training cells.
    n_cells
        How many. With `balance`: how many cells of each value there are to be in all; default there: as many as the most
        frequent value has.
    depth
        Counts per cell over the genes of the model. Default: drawn with the vector, as the training cells had them.
    like
        With `balance`, the data whose rare values are to be filled up. Genes are then named as there.
    balance
        Column of `like.obs`, a phenotype of the model: cells are generated for each value, as many as it lacks.
    seed
        The same seed gives the same cells. A cell depends on the seed and its number, not on how many are generated.
    {device}
    {token_budget}
    {progress}

    Returns
    -------
    A new `AnnData` (cells, genes of the model) with the following fields:

    `X`
        Counts, CSR float32. Where the model reads log1p values, such values; for `"binary"` 1 for expressed genes.
    `obs[<phenotype>]`
        Each phenotype of the model, categorical.
    `obs["scbin_generated"]`
        True. Where generated cells are joined with real ones, give those the column too: `anndata.concat` keeps common
        columns only.
    `obsm["X_tokens"]`, `uns["scbin"]`
        The tokens and their vocabulary, so that other verbs read the cells as any others.
    `obsm["X_scbin"]`
        The embedding of the generated cells, for :func:`scbin.pl.generated`.
    `uns["scbin_generated"]`
        Model, arguments and version, as JSON.

    Raises
    ------
    ScbinInputError
        If the model cannot generate cells, a phenotype or value is unknown, or an argument is out of range.

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
    least = {"n_cells": (n_cells, 1), "depth": (depth, 1), "seed": (seed, 0), "token_budget": (token_budget, 1)}
    for name, (value, smallest) in least.items():
        if value is not None and not smallest <= value < np.inf:
            raise ScbinInputError("A02", f"{name} is {value}; it needs to be at least {smallest}.")
    if (like is None) != (balance is None) or (n_cells is None and balance is None):
        raise ScbinInputError(
            "A03", "pass n_cells=100, or like= and balance= together: like=adata, balance='cell_type'."
        )
    model = resolve_model(model)
    vocabulary, head, density = model.vocabulary, model.network.counts, model.network.density
    why = ""
    if vocabulary.unit == "order":
        why = 'reads genes by rank, which does not say how much is expressed. Tokenize with encoding="bins"'
    elif not vocabulary.phenotypes:
        why = "knows no phenotypes, so it cannot be told what to generate. Tokenize with phenotypes=['cell_type']"
    elif head is None or not isinstance(density, Density):
        why = "has no count head or no density of its training cells: it was published by others or fine-tuned"
    if why or head is None or not isinstance(density, Density):
        raise ScbinInputError("M06", f"this model {why}, and use the model that scbin.tl.pretrain returns.")
    if depth is not None and vocabulary.unit != "counts":
        what = f"this model reads {vocabulary.unit} values, which have no depth"
        raise ScbinInputError("A03", f"{what}; leave depth out.")
    wanted = _wanted(phenotypes, n_cells, like, balance, vocabulary, density)
    generators = [np.random.default_rng([seed, number]) for number in range(len(wanted))]
    vectors, log_depth, values = density.draw(wanted, generators)
    if depth is not None:
        log_depth = np.full(len(wanted), np.log(depth))

    taken: set[str] = set() if like is None else set(like.obs_names)
    names = (f"generated_{number}" for number in range(len(wanted) + len(taken)))
    obs = pd.DataFrame(index=[name for name in names if name not in taken][: len(wanted)])
    ids = np.empty(values.shape, dtype=np.int64)
    for k, phenotype in enumerate(vocabulary.phenotypes):
        obs[phenotype.name] = pd.Categorical.from_codes(values[:, k], categories=list(phenotype.values))
        ids[:, k] = np.where(values[:, k] < 0, phenotype.missing_id, phenotype.first_id + values[:, k])
    obs[_keys.GENERATED] = True
    made = ad.AnnData(_expression(head, density, vectors, log_depth, generators, vocabulary, progress), obs=obs)
    made.var_names = list(vocabulary.genes if like is None else gene_names(like, vocabulary).names)
    reading = Reading("counts" if vocabulary.unit == "counts" else "log1p")
    encoder = Encoder(vocabulary, np.arange(made.n_vars), reading)
    parts = [encoder.encode(block, ids[block.start :][: block.n_rows]).tokens for block in iter_blocks(made)]
    tokens = sparse.vstack(parts, format="csr")
    write_tokens(made, tokens, vocabulary, pd.Categorical(np.where(np.diff(tokens.indptr) > 0, "ok", "empty")))
    embed(made, model, device=device, token_budget=token_budget, progress=False)
    asked = {"phenotypes": dict(phenotypes or {}), "balance": balance, "depth": depth, "seed": seed}
    record = {"generated": True, "scbin": scbin.__version__, "model": model.fingerprint, "unit": vocabulary.unit}
    made.uns[_keys.GENERATED] = json.dumps(record | asked, default=plain)
    return made


def _wanted(
    phenotypes: Any,
    n_cells: int | None,
    like: AnnData | None,
    balance: str | None,
    vocabulary: Vocabulary,
    density: Density,
) -> np.ndarray:
    """Return the number of the wanted value of each phenotype (cells, phenotypes), -1 where it is open."""
    asked = {} if phenotypes is None else phenotypes
    instances(Mapping, "a value by phenotype: {'cell_type': 'B cell'}", phenotypes=asked)
    known: dict[str, dict[str, int]] = {}  # the values that training cells had, with their numbers
    for phenotype, column in zip(vocabulary.phenotypes, density.values.cpu().numpy().T, strict=True):
        known[phenotype.name] = {value: k for k, value in enumerate(phenotype.values) if k in column}
    row = np.full(len(known), -1)
    for name in (*asked, *([] if balance is None else [balance])):
        if name not in known:
            listed = ", ".join(map(repr, known))
            raise ScbinInputError("A06", f"{name!r} is no phenotype of this model. It knows: {listed}.")
    for name, value in asked.items():
        number = known[name].get(text_of(value) or "")
        if number is None:
            close = ", ".join(map(repr, difflib.get_close_matches(str(value), known[name], n=5, cutoff=0.0)))
            raise ScbinInputError("A06", f"the model saw no cell with {name} {str(value)!r}. Close to it: {close}.")
        row[list(known).index(name)] = number
    if like is None or balance is None:
        return np.repeat(row[None], n_cells or 0, axis=0)

    if balance in asked:
        raise ScbinInputError("A03", f"{balance!r} is what is balanced; leave it out of phenotypes.")
    labels, width = labels_of(read_obs(check_adata(like), balance), balance), vocabulary.phenotype(balance).age_groups
    counts = pd.Series(labels if width is None else age_labels(labels, width)[0]).value_counts()
    new = [value for value in counts.index if value not in known[balance]]
    if new and len(new) < len(counts):
        listed = ", ".join(map(repr, new[:5]))
        warn("I36", f"no cells are generated for {balance} {listed}: the model never saw them.")
    counts = counts.drop(new)
    full = int(counts.max() if n_cells is None and len(counts) else n_cells or 0)
    rows = np.repeat(row[None], len(counts), axis=0)
    rows[:, list(known).index(balance)] = [known[balance][value] for value in counts.index]
    rows = np.repeat(rows, np.maximum(0, full - counts.to_numpy()), axis=0)
    if not len(rows):
        what = f"the model knows no {balance} with fewer than {full} cells"
        raise ScbinInputError("A02", f"{what}; there is nothing to add.")
    return rows


def _expression(
    head: CountHead, density: Density, vectors: np.ndarray, log_depth: np.ndarray,
    generators: Sequence[np.random.Generator], vocabulary: Vocabulary, progress: bool,
) -> sparse.csr_matrix:  # fmt: skip
    """Draw the expression of each cell (cells, genes) given its vector and depth, each with its own generator.

    Counts are negative binomial. Of other units, a gene is on with the probability that keeps its mean at the value that it has
    where it is on.
    """
    theta, typical = density.dispersion(head), density.typical.cpu().numpy()
    blocks = []
    for start in tqdm(range(0, len(vectors), CELLS_AT_ONCE), desc="generating", unit="block", disable=not progress):
        part = slice(start, start + CELLS_AT_ONCE)
        mean = expected_shares(head, torch.from_numpy(vectors[part])) * np.exp(log_depth[part, None])
        if vocabulary.unit == "counts":
            pairs = zip(mean, generators[part], strict=True)
            drawn = np.stack([rng.poisson(mu * rng.gamma(theta) / theta) for mu, rng in pairs])
        else:
            value = np.minimum(np.maximum(mean, typical), vocabulary.token_values.max())
            chance = np.stack([rng.random(mean.shape[1]) for rng in generators[part]])
            drawn = np.where(chance * typical < mean, value, 0)
        blocks.append(sparse.csr_matrix(drawn.astype(np.float32)))
    return sparse.vstack(blocks, format="csr")
