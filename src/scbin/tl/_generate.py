"""`tl.generate` and `tl.impute`: the counts that a model expects, in cells made by it and in real ones."""

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
from scbin._adata import (
    check_adata,
    check_writable,
    copied,
    gene_names,
    iter_blocks,
    read_tokens,
    write,
    write_tokens,
    write_uns,
)
from scbin._arguments import checked, instances, plain
from scbin._errors import ScbinInputError
from scbin.model import count_head, resolve_model
from scbin.nn.counts import Density, expected_shares
from scbin.nn.packs import token_expression
from scbin.nn.run import embed as embed_tokens
from scbin.tl._embed import embed
from scbin.tl._labels import MaskedPhenotypes
from scbin.tokens.encoding import Encoder
from scbin.tokens.phenotypes import text_of
from scbin.tokens.values import Reading

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from anndata import AnnData

    from scbin.model import Model
    from scbin.tokens.vocabulary import Vocabulary

CELLS_AT_ONCE = 1_024


@_docs.shared
@checked
def generate(
    model: Model | str | os.PathLike[str],
    phenotypes: Mapping[str, Any] | None = None,
    n_cells: int = 100,
    *,
    depth: float | None = None,
    seed: int = 0,
    device: str = "auto",
    token_budget: int = 32_768,
    progress: bool = True,
) -> AnnData:
    """Generate cells with given phenotypes, such as `{"cell_type": "B cell", "sex": "female"}`.

    Use them to test methods, to teach, or to balance rare types when training a classifier. Generated cells show what the model
    learned and are not evidence about biology. They are marked as generated in `obs`, in their names and in `uns`.

    For each cell, a vector is drawn from the density of training cells with these phenotypes, and then the counts of all genes
    from the count head, given the vector and a depth. So genes vary together within a type.

    Parameters
    ----------
    model
        A :class:`scbin.Model`, or the path of its directory, pretrained on cells that were tokenized with `phenotypes=`.
    phenotypes
        The value of each phenotype. Those left out are drawn as they occurred in the training cells.
    n_cells
        How many.
    depth
        Counts per cell over the genes of the model. Default: those of the training cells.
    seed
        The same seed gives the same cells. A cell depends on the seed and its number, not on how many are generated.
    {device}
    {token_budget}
    {progress}

    Returns
    -------
    A new `AnnData` (cells, genes of the model) with the following fields:

    `X`
        Counts, CSR float32; log1p values if the model reads these, and 1 for expressed genes with `"binary"`.
    `obs[<phenotype>]`
        Each phenotype of the model, categorical.
    `obs["scbin_generated"]`
        True. Before you join real and generated cells, give the real ones this column, too: `anndata.concat` keeps only common
        columns.
    `obsm["X_tokens"]`, `uns["scbin"]`
        The tokens and their vocabulary, for other functions.
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
    if n_cells < 1 or not 1 <= (1 if depth is None else depth) < np.inf:
        raise ScbinInputError("A02", f"n_cells={n_cells}, depth={depth}: numbers and depths are at least 1.")
    model = resolve_model(model)
    vocabulary, density = model.vocabulary, model.network.density
    count_head(model, 'Tokenize with encoding="bins", and use the model that scbin.tl.pretrain returns.')
    if not isinstance(density, Density) or not vocabulary.phenotypes:
        why = "knows no phenotypes or no density of its training cells"
        fix = "Tokenize with phenotypes=['cell_type'], and use the model that scbin.tl.pretrain returns"
        raise ScbinInputError("M06", f"this model {why}. {fix}.")
    if depth is not None and vocabulary.unit != "counts":
        raise ScbinInputError("A03", f"this model reads {vocabulary.unit} values, which have no depth: leave it out.")
    wanted = np.tile(_wanted({} if phenotypes is None else phenotypes, vocabulary, density), (n_cells, 1))
    generators = [np.random.default_rng([seed, number]) for number in range(n_cells)]
    vectors, log_depth, values = density.draw(wanted, generators)
    log_depth = log_depth if depth is None else np.full(n_cells, np.log(depth))

    obs = pd.DataFrame(index=[f"generated_{number}" for number in range(n_cells)])
    ids = np.empty(values.shape, dtype=np.int64)
    for k, phenotype in enumerate(vocabulary.phenotypes):
        obs[phenotype.name] = pd.Categorical.from_codes(values[:, k], categories=list(phenotype.values))
        ids[:, k] = np.where(values[:, k] < 0, phenotype.missing_id, phenotype.first_id + values[:, k])
    obs[_keys.GENERATED] = True
    drawn = _expression(model, vectors, log_depth, values, generators, progress)
    made = ad.AnnData(drawn, obs=obs, var=pd.DataFrame(index=list(vocabulary.genes)))
    encoder = Encoder(vocabulary, np.arange(made.n_vars), Reading("counts" if vocabulary.unit == "counts" else "log1p"))
    parts = [encoder.encode(block, ids[block.start :][: block.n_rows]).tokens for block in iter_blocks(made)]
    tokens = sparse.vstack(parts, format="csr")
    write_tokens(made, tokens, vocabulary, pd.Categorical(np.where(np.diff(tokens.indptr) > 0, "ok", "empty")))
    embed(made, model, device=device, token_budget=token_budget, progress=False)
    asked = {"phenotypes": dict(phenotypes or {}), "depth": depth, "seed": seed}
    record = {"generated": True, "scbin": scbin.__version__, "model": model.fingerprint, "unit": vocabulary.unit}
    made.uns[_keys.GENERATED] = json.dumps(record | asked, default=plain)
    return made


def _wanted(asked: Mapping[str, Any], vocabulary: Vocabulary, density: Density) -> np.ndarray:
    """Return the number of the wanted value of each phenotype (phenotypes,), -1 where it is open."""
    instances(Mapping, "a value by phenotype: {'cell_type': 'B cell'}", phenotypes=asked)
    names = [phenotype.name for phenotype in vocabulary.phenotypes]
    row, seen = np.full(len(names), -1), density.values.cpu().numpy()
    for name, value in asked.items():
        if name not in names:
            raise ScbinInputError("A06", f"{name!r} is not a phenotype of this model. Available: {names}.")
        k, text = names.index(name), text_of(value)
        known = [of for number, of in enumerate(vocabulary.phenotypes[k].values) if number in seen[:, k]]
        if text not in known:
            close = ", ".join(map(repr, difflib.get_close_matches(str(value), known, n=5, cutoff=0.0)))
            raise ScbinInputError("A06", f"no training cell had {name} {str(value)!r}. Closest: {close}.")
        row[k] = vocabulary.phenotypes[k].values.index(text)
    return row


def _expression(
    model: Any, vectors: np.ndarray, log_depth: np.ndarray, values: np.ndarray, rngs: Any, progress: bool
) -> sparse.csr_matrix:
    """Draw the expression of each cell (cells, genes) given its vector, depth and phenotypes, each with its own generator.

    Counts are negative binomial. Of other units, a gene is on with the probability that keeps its mean at the value that it has
    where it is on.
    """
    vocabulary, density = model.vocabulary, model.network.density
    theta, typical = (each.cpu().numpy().astype(np.float64) for each in (density.dispersion, density.typical))
    blocks = []
    for start in tqdm(range(0, len(vectors), CELLS_AT_ONCE), desc="generating", unit="block", disable=not progress):
        part = slice(start, start + CELLS_AT_ONCE)
        mean = density.expected(model.network.counts, vectors[part], log_depth[part], values[part])
        if vocabulary.unit == "counts":
            pairs = zip(mean, rngs[part], strict=True)
            drawn = np.stack([rng.poisson(mu * rng.gamma(theta) / theta) for mu, rng in pairs])
        else:
            value = np.minimum(np.maximum(mean, typical), vocabulary.token_values.max())
            chance = np.stack([rng.random(mean.shape[1]) for rng in rngs[part]])
            drawn = np.where(chance * typical < mean, value, 0)
        blocks.append(sparse.csr_matrix(drawn.astype(np.float32)))
    return sparse.vstack(blocks, format="csr")


# ---- imputation -----------------------------------------------------------------------------------------------------


@_docs.shared
@checked
def impute(
    adata: AnnData,
    model: Model | str | os.PathLike[str] | None = None,
    *,
    genes: str | Sequence[str] | None = None,
    tokens_key: str | None = None,
    device: str = "auto",
    token_budget: int = 32_768,
    progress: bool = True,
    key_added: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Add a layer with the expression that the model expects in each cell.

    Use it to plot genes that were rarely detected. The count head predicts each gene from the cell vector and the depth. Detected
    genes keep their values. Expected values are smoother than data, so do not use them in statistical tests. Phenotype tokens are
    hidden.

    Parameters
    ----------
    {tokenized}
    {model}
    genes
        Names of genes, as in `var_names`. Default: all genes of the model.
    {reading}
    {key_added}
    {copy}

    Returns
    -------
    {returns_copy}

    `adata.layers["scbin_imputed"]`
        CSR float32 (cells, genes) in the unit of the tokens: counts at the depth of the cell, or log1p values. Genes that the
        model does not know, or that are not in `genes`, have no value; cells without tokens have NaN.
    `adata.uns["scbin"]["impute"]`
        How it was imputed, as JSON.

    Raises
    ------
    ScbinInputError
        If the cells are not tokenized, the model has no count head or reads ranks, or a gene is unknown. Nothing is written
        then.

    Examples
    --------
    >>> import scbin
    >>> adata = scbin.datasets.pbmc68k_reduced()[:200].copy()
    >>> scbin.pp.tokenize(adata)
    >>> model = scbin.tl.pretrain(adata, preset="tiny", max_steps=2, progress=False)
    >>> scbin.tl.impute(adata, model, genes=["CD8A", "CD79A"], progress=False)
    >>> adata.layers["scbin_imputed"].nnz
    400
    """
    check_adata(adata)
    key = _keys.IMPUTED if key_added is None else key_added
    check_writable(adata, "layers", key)
    chosen = resolve_model(model, adata)
    vocabulary, tokens = chosen.vocabulary, read_tokens(adata, chosen.vocabulary, tokens_key)
    head = count_head(chosen, 'Tokenize with encoding="bins" and pretrain to impute.')
    names = gene_names(adata, vocabulary)
    asked = np.arange(len(vocabulary.genes)) if genes is None else np.array(names.resolve(genes), dtype=np.int64)
    asked = asked[names.columns[asked] >= 0]
    if not len(asked):
        raise ScbinInputError("A06", "none of the genes to impute is a column of adata.")
    asked = asked[np.argsort(names.columns[asked], kind="stable")]
    options = {"device": device, "token_budget": token_budget, "progress": progress}
    vectors = embed_tokens(chosen.network, MaskedPhenotypes(tokens), **options)
    blocks = [sparse.csr_matrix((0, adata.n_vars), dtype=np.float32)]
    for start in range(0, tokens.n_cells, CELLS_AT_ONCE):
        rows = tokens.take(np.arange(start, min(start + CELLS_AT_ONCE, tokens.n_cells)))
        values = token_expression(rows, vocabulary).toarray()
        shares = expected_shares(head, torch.from_numpy(vectors[start : start + len(values)]))
        expected = np.where(values > 0, values, shares * values.sum(axis=1, keepdims=True))[:, asked].astype(np.float32)
        expected[np.diff(rows.indptr) == 0] = np.nan
        bounds, columns = np.arange(len(values) + 1) * len(asked), np.tile(names.columns[asked], len(values))
        blocks.append(sparse.csr_matrix((expected.ravel(), columns, bounds), (len(values), adata.n_vars)))
    target = copied(adata) if copy else adata
    write(target, "layers", key, sparse.vstack(blocks, format="csr"))
    record = {"model": chosen.fingerprint, "genes": len(asked), "unit": vocabulary.unit}
    write_uns(target, _keys.IMPUTE, record)
    return target if copy else None
