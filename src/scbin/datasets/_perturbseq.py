"""A simulated Perturb-seq screen of which everything is known."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy.sparse import csr_matrix

from scbin._arguments import checked
from scbin._errors import ScbinInputError


@checked
def perturbseq(
    n_perturbations: int = 40,
    n_cells: int = 4000,
    n_genes: int = 500,
    *,
    n_modules: int = 8,
    n_pairs: int = 0,
    effect: float = 1.0,
    known_modules: bool = True,
    synergy: float = 1.0,
    efficiency: float = 0.8,
    seed: int = 0,
) -> AnnData:
    """Simulate a CRISPRi screen in which the effect of every perturbation is known.

    Genes belong to modules that vary together in unperturbed cells. Knocking down a gene lowers its own module, affects other
    modules and a few genes directly, and causes a response that all perturbations share. The effect of a pair is the sum of its
    genes plus a synergy that depends on both modules. A fifth of the targets affect no other gene. Cells have about 1,000 counts
    and come from two batches and four donors, which differ in every gene.

    Parameters
    ----------
    n_perturbations
        Number of targets, the first genes of the table.
    n_cells
        Number of cells; a tenth of them, at least 100, are controls.
    n_genes
        Genes.
    n_modules
        Number of modules. A tenth of the genes, none of them a target, belong to no module.
    n_pairs
        Number of pairs of targets.
    effect
        Size of all effects other than that on the target itself; with 0 there is only noise.
    known_modules
        Whether a target acts through its own module. If not, it acts through a random one, and no feature of the target predicts
        its effects.
    synergy
        Size of the synergy of pairs, relative to the effect of a module.
    efficiency
        Mean fraction of cells in which a guide works. There are three guides for each gene.
    seed
        The same seed gives the same cells.

    Returns
    -------
    A new AnnData of counts with `obs["perturbation"]` (`"GENE0"`, `"GENE0+GENE1"`, `"control"`), `obs["guide"]`, `obs["batch"]` and
    `obs["donor"]`, `var["module"]` (-1: none), and `uns["perturbseq"]`: `"names"` of the perturbations and their `"log_change"`, the
    mean change of log expression (perturbations, genes).

    Raises
    ------
    ScbinInputError
        If there are fewer genes than targets, too few cells, or more pairs than targets allow.

    Examples
    --------
    >>> import scbin
    >>> adata = scbin.datasets.perturbseq(n_perturbations=10, n_cells=500, n_genes=100)
    >>> adata.shape, adata.obs["perturbation"].nunique()
    ((500, 100), 11)
    """
    every, least = list(combinations(range(n_perturbations), 2)), 100 + n_perturbations + n_pairs
    if min(n_perturbations, n_modules, seed + 1, n_pairs + 1) < 1 or n_pairs > len(every):
        raise ScbinInputError(
            "A02", f"there are targets, modules, seeds from 0 on, and at most {len(every)} pairs of them."
        )
    if n_genes < n_perturbations or n_cells < least:
        raise ScbinInputError("A02", f"it needs at least {n_perturbations} genes and {least} cells.")
    rng = np.random.default_rng(seed)
    module = np.where(rng.random(n_genes) < 0.1, -1, rng.integers(n_modules, size=n_genes))
    module[:n_perturbations] = rng.integers(n_modules, size=n_perturbations)
    member = (module[:, None] == np.arange(n_modules)) * rng.gamma(8, 1 / 8, (n_genes, n_modules))  # (genes, modules)

    # what perturbing does to modules (perturbations, modules), and then to genes
    wiring = -np.eye(n_modules) + np.where(rng.random((n_modules,) * 2) < 0.25, rng.normal(0, 0.5, (n_modules,) * 2), 0)
    acts = module[:n_perturbations] if known_modules else rng.integers(n_modules, size=n_perturbations)
    works = rng.random(n_perturbations) >= 0.2
    strength = works * effect * rng.uniform(0.5, 1.0, n_perturbations)
    direct = (rng.random((n_perturbations, n_genes)) < 0.02) * rng.normal(0, 0.6, (n_perturbations, n_genes))
    shared = 0.25 * rng.normal(size=n_genes) * (rng.random(n_genes) < 0.3)
    change = strength[:, None] * (wiring[acts] @ member.T + direct + shared)
    pairs = [every[i] for i in rng.choice(len(every), n_pairs, replace=False)]
    beyond = synergy * rng.normal(0, 0.7, (n_modules, n_modules, n_modules))
    beyond = (beyond + beyond.transpose(1, 0, 2)) / np.sqrt(2)
    rows = [change[a] + change[b] + strength[a] * strength[b] * (member @ beyond[acts[a], acts[b]]) for a, b in pairs]
    change = np.vstack([np.zeros(n_genes), change, *rows])  # control first
    sets = [(), *((k,) for k in range(n_perturbations)), *pairs]
    for row, targets in zip(change, sets, strict=True):
        row[list(targets)] = -2.0

    n_controls = max(100, n_cells // 10)
    which = np.concatenate([np.zeros(n_controls, int), 1 + np.arange(n_cells - n_controls) % (len(sets) - 1)])
    which = rng.permutation(which)
    guide, batch, donor = (rng.integers(n, size=n_cells) for n in (3, 2, 4))
    guide_works = np.clip(rng.normal(efficiency, 0.1, (len(sets), 3)), 0, 1)
    hit = rng.random(n_cells) < guide_works[which, guide]
    noise = rng.normal(0, 0.5, (n_cells, n_modules)) @ member.T  # the state of a cell, and where it is from
    noise += 0.2 * rng.normal(size=(2, n_genes))[batch] + 0.2 * rng.normal(size=(4, n_genes))[donor]
    share = np.exp(rng.normal(0, 1.5, n_genes) + noise + hit[:, None] * change[which])
    share *= (1000.0 * rng.lognormal(0, 0.3, n_cells) / share.sum(axis=1))[:, None]
    counts = rng.poisson(share * rng.gamma(5.0, 0.2, share.shape))

    genes = [f"GENE{k}" for k in range(n_genes)]
    names = np.array(["control", *("+".join(sorted(genes[k] for k in targets)) for targets in sets[1:])], dtype=object)
    obs = pd.DataFrame(
        {
            "perturbation": pd.Categorical(names[which]),
            "guide": pd.Categorical([f"{names[w]}_g{g + 1}" for w, g in zip(which, guide, strict=True)]),
            "batch": pd.Categorical([f"batch{b}" for b in batch]),
            "donor": pd.Categorical([f"donor{d}" for d in donor]),
        },
        index=[f"cell{k}" for k in range(n_cells)],
    )
    mean = (guide_works.mean(axis=1)[1:, None] * change[1:]).astype(np.float32)
    uns, var = {"perturbseq": {"names": names[1:], "log_change": mean}}, pd.DataFrame({"module": module}, index=genes)
    return AnnData(csr_matrix(counts.astype(np.float32)), obs=obs, var=var, uns=uns)
