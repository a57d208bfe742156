"""What a network answers: outputs of its head, and shares of phenotype values at hidden slots."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from scbin.nn.attention import to_device
from scbin.nn.bert import logits_at
from scbin.nn.device import resolve_device
from scbin.nn.heads import evidence, gene_values
from scbin.nn.reading import hidden_packs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scipy.sparse import csr_matrix
    from transformers import BertForMaskedLM

    from scbin.encoding.vocabulary import Vocabulary
    from scbin.nn.device import Precision
    from scbin.nn.embedding import Weights
    from scbin.nn.heads import Head


def answer_cells(
    bert: BertForMaskedLM,
    head: Head,
    tokens: csr_matrix,
    vocabulary: Vocabulary,
    weights: Weights,
    *,
    layer: int = -1,
    device: str = "auto",
    precision: Precision = "float32",
    token_budget: int = 32_768,
    progress: bool = False,
) -> np.ndarray:
    """Return the outputs of a head for every cell (cells, outputs), NaN where a row has no gene.

    A cell's outputs are the same whatever other cells there are, in whatever order, under whatever token budget.

    Parameters
    ----------
    bert, head
        The network and its head, which are on the device only for the time of the call.
    tokens
        Token matrix; slots that must not be seen are hidden already.
    vocabulary
        Of the tokens.
    weights
        Of each token in its cell's vector.
    layer
        Whose hidden states the head reads.
    device, precision, token_budget, progress
        As for embeddings.
    """
    result = np.full((tokens.shape[0], head.plan.n_outputs), np.nan, dtype=np.float32)
    target = resolve_device(device)
    home = head.output.weight.device
    head.to(target).eval()
    try:
        packs = hidden_packs(
            bert, tokens, layer=layer, device=device, precision=precision, token_budget=token_budget, progress=progress
        )
        for rows, pack, layout, hidden in packs:
            with torch.inference_mode():
                out = head(hidden, evidence(pack, layout, weights, vocabulary, target))
            result[rows] = out.cpu().numpy()
    finally:
        head.to(home)
    result[~has_genes(tokens, vocabulary)] = np.nan
    return result


def answer_genes(
    bert: BertForMaskedLM,
    head: Head,
    tokens: csr_matrix,
    vocabulary: Vocabulary,
    *,
    layer: int = -1,
    device: str = "auto",
    precision: Precision = "float32",
    token_budget: int = 32_768,
    progress: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean outputs of a head for each gene over the cells it is seen in (genes, outputs), and their number (genes,).

    NaN for genes that no cell shows.
    """
    n_genes = len(vocabulary.genes)
    sums, counts = np.zeros((n_genes, head.plan.n_outputs)), np.zeros(n_genes, dtype=np.int64)
    target = resolve_device(device)
    home = head.output.weight.device
    head.to(target).eval()
    try:
        packs = hidden_packs(
            bert, tokens, layer=layer, device=device, precision=precision, token_budget=token_budget, progress=progress
        )
        for _, pack, _, hidden in packs:
            where = np.flatnonzero(vocabulary.is_gene_token(pack.input_ids))
            genes = gene_values(pack.input_ids[where], pack.position_ids[where], vocabulary)[0]
            with torch.inference_mode():
                out = head.of_genes(hidden.index_select(0, to_device(where, target))).double().cpu().numpy()
            np.add.at(sums, genes, out)
            counts += np.bincount(genes, minlength=n_genes)
    finally:
        head.to(home)
    with np.errstate(invalid="ignore"):
        return sums / np.where(counts, counts, np.nan)[:, None], counts


def answer_phenotypes(
    bert: BertForMaskedLM,
    tokens: csr_matrix,
    vocabulary: Vocabulary,
    names: Sequence[str],
    *,
    device: str = "auto",
    precision: Precision = "float32",
    token_budget: int = 32_768,
    progress: bool = False,
) -> dict[str, np.ndarray]:
    """Return the logits (cells, values) of phenotypes at their slots, within each one's own values.

    What stands in the slots is up to the caller: `[MASK]`, so that the label cannot be read off. NaN where a row has no gene.
    """
    phenotypes = [vocabulary.phenotype(name) for name in names]
    result = {p.name: np.full((tokens.shape[0], len(p.values)), np.nan, dtype=np.float32) for p in phenotypes}
    packs = hidden_packs(bert, tokens, device=device, precision=precision, token_budget=token_budget, progress=progress)
    for rows, pack, layout, hidden in packs:
        owner = np.repeat(np.arange(len(rows)), layout.lengths)
        for phenotype in phenotypes:
            where = np.flatnonzero(pack.position_ids == phenotype.position)
            picked = hidden.index_select(0, to_device(where, hidden.device))
            with torch.inference_mode():
                logits = logits_at(bert, picked.float(), phenotype.first_id, phenotype.stop_id)
            result[phenotype.name][rows[owner[where]]] = logits.float().cpu().numpy()
    missing = ~has_genes(tokens, vocabulary)
    for outputs in result.values():
        outputs[missing] = np.nan
    return result


def hide_slots(tokens: csr_matrix, vocabulary: Vocabulary, names: Sequence[str]) -> csr_matrix:
    """Return the rows with `[MASK]` in the slots of some phenotypes."""
    positions = [vocabulary.phenotype(name).position for name in names]
    hidden = tokens.copy()
    hidden.data[np.isin(hidden.indices, positions)] = vocabulary.mask_id
    return hidden


def shares(outputs: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Return the probabilities (cells, classes) that outputs stand for, as float64."""
    return np.exp(log_softmax(np.asarray(outputs, dtype=np.float64) / temperature, axis=1))


def entropy(probabilities: np.ndarray) -> np.ndarray:
    """Return how undecided each row is (cells,): 0 for one sure class, 1 for all classes alike."""
    logs = np.log(np.where(probabilities > 0, probabilities, 1.0))
    return -(probabilities * logs).sum(1) / max(np.log(probabilities.shape[1]), 1e-12)


def has_genes(tokens: csr_matrix, vocabulary: Vocabulary) -> np.ndarray:
    """Whether each row has a gene (cells,): without one there is nothing to answer from."""
    owner = np.repeat(np.arange(tokens.shape[0]), np.diff(tokens.indptr))
    return np.bincount(owner[vocabulary.is_gene_token(tokens.data)], minlength=tokens.shape[0]) > 0


def calibrated(outputs: np.ndarray, classes: np.ndarray) -> float:
    """Return the temperature at which the probabilities of known classes have the least log loss.

    Parameters
    ----------
    outputs
        Of cells that the head was not fitted on (cells, classes).
    classes
        Their true classes (cells,).
    """
    if len(classes) < 2:
        return 1.0
    rows = np.arange(len(classes))
    exact = np.asarray(outputs, dtype=np.float64)
    found = minimize_scalar(
        lambda log_t: -log_softmax(exact / np.exp(log_t), axis=1)[rows, classes].mean(),
        bounds=(-3, 3),
        method="bounded",
    )
    return float(np.exp(found.x))
