"""Measured perturbations: how a screen is read, changes of pseudobulks, what of them reproduces, and kernel regression over them."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.utils.extmath import randomized_svd

from scbin._adata import read_obs, warn
from scbin._errors import ScbinInputError, count
from scbin.pp._plan import Source
from scbin.tokens.phenotypes import labels_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from anndata import AnnData

BLOCKS = 8  # parts of the cells, of which halves are made
SPLITS = 10
TEMPERATURES = (0.05, 0.1, 0.2, 0.4)  # of the weights of targets with similar features, on the scale of cosines
PENALTIES = (0.03, 0.1, 0.3, 1.0, 3.0)
ERRORS = 2.0  # standard errors by which features must be better than the mean to be used
MOST_TO_CHOOSE = 300  # perturbations among which kernel and penalty are chosen
NULL_DRAWS = 10_000
FEWEST_PAIRS = 5  # from which a synergy is learned
MOST_RESIDUALS = 2_000  # cells from which the covariance of the noise is taken
WIDTH = 50  # dimensions of a block of gene features
COMPONENTS = 10  # of the measured changes, in which genes and members of pairs are compared
PAIR_WIDTHS = (0.2, 0.3, 0.5, 1.0)
ONE_MEMBER = 0.2  # part of a pair's synergy that either member has with any other, against that of both
FOLDS = 10
FEWEST_CONTROLS = 5  # in a batch (of a donor); cells of batches with fewer are left out
BETWEEN = re.compile(r"\s*(?:\|+|[+;,&])\s*")
GUIDE = re.compile(r"^(.+?)(?:[-_. ](sg|g|guide|gRNA)|[-_. ]|(?<=[A-Z0-9])(s?g))\d+$")
NO_TARGET = re.compile(r"^(?:neg|probe|safe|sg)?[-_ ]?(?:ctrl|control|ntc?|non[-_ ]?targeting)[-_ ]?\w{0,4}$", re.I)
Rows = np.ndarray
Kernels = dict[str, np.ndarray]
Rule = tuple[str, float]  # "zero", "mean", "nearby" with a temperature, "ridge" with a penalty
MEAN: Rule = ("mean", np.inf)
ZERO: Rule = ("zero", np.inf)
RIDGE: list[Rule] = [("ridge", penalty) for penalty in PENALTIES]
SINGLES: list[Rule] = [*(("nearby", temperature) for temperature in TEMPERATURES), *RIDGE]


# ---- changes and their reproducibility ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Sums:
    """Summed expression of perturbations and of controls, by block of cells; a half of the blocks is half of the cells (or donors)."""

    sums: np.ndarray  # (perturbations, blocks, genes)
    cells: np.ndarray  # (perturbations, strata, blocks)
    control_sums: np.ndarray  # (strata, blocks, genes)
    control_cells: np.ndarray  # (strata, blocks)
    spectrum: np.ndarray  # eigenvalues of the covariance of the noise over genes, centred over genes
    variance: np.ndarray  # of each gene over cells of one kind (genes,)

    def changes(self, blocks: Any = slice(None), controls: Any = None) -> np.ndarray:
        """Return the mean change against the controls of the same strata (perturbations, genes); NaN without cells."""
        of = blocks if controls is None else controls
        n = self.cells[:, :, blocks].sum(axis=2)  # (perturbations, strata)
        control = self.control_sums[:, of].sum(axis=1) / np.maximum(self.control_cells[:, of].sum(axis=1), 1)[:, None]
        total = np.where(n.any(axis=1), n.sum(axis=1), np.nan)[:, None]
        return (self.sums[:, blocks].sum(axis=1) - n @ control) / total

    def noise(self) -> np.ndarray:
        """Return the variance of each change in units of the variance of one cell (perturbations,)."""
        n, m = self.cells.sum(axis=2), np.maximum(self.control_cells.sum(axis=1), 1)
        total = np.maximum(n.sum(axis=1), 1)
        return 1 / total + ((n / total[:, None]) ** 2 / m).sum(axis=1)


def sum_cells(
    values: sparse.csr_matrix, group: np.ndarray, stratum: np.ndarray, donor: np.ndarray | None, seed: int
) -> Sums:
    """Add up cells by perturbation, stratum and block; `group` is the perturbation of each cell, -1 for controls.

    Donors are blocks, so that halves share none; without donors cells are dealt out at random, evenly over perturbations and strata.
    """
    rng, n = np.random.default_rng(seed), len(group)
    if donor is None:
        order = np.lexsort((rng.random(n), stratum, group))
        block = np.empty(n, dtype=np.int64)
        block[order] = (np.arange(n) + rng.integers(BLOCKS)) % BLOCKS
        n_blocks = BLOCKS
    else:
        donors = int(donor.max()) + 1
        n_blocks = min(donors, BLOCKS)
        block = (rng.permutation(donors) % n_blocks)[donor]
    n_groups, n_strata = int(group.max()) + 1, int(stratum.max()) + 1

    def added(rows: np.ndarray, code: np.ndarray, size: int) -> np.ndarray:
        ones = np.ones(len(rows), dtype=np.float32)
        return (sparse.csr_matrix((ones, (code, rows)), shape=(size, n)) @ values).toarray()

    own, control = np.flatnonzero(group >= 0), np.flatnonzero(group < 0)
    sums = added(own, group[own] * n_blocks + block[own], n_groups * n_blocks)
    control_sums = added(control, stratum[control] * n_blocks + block[control], n_strata * n_blocks)
    cells = np.zeros((n_groups + 1, n_strata, n_blocks))  # the last one: controls
    np.add.at(cells, (group, stratum, block), 1)

    some = np.sort(rng.permutation(n)[:MOST_RESIDUALS])
    kind = (group[some] + 1) * n_strata + stratum[some]
    residuals = pd.DataFrame(values[some].toarray().astype(np.float64))
    residuals -= residuals.groupby(kind).transform("mean")
    freedom = max(len(some) - len(np.unique(kind)), 1)
    variance = (residuals**2).sum().to_numpy() / freedom
    centred = residuals.sub(residuals.mean(axis=1), axis=0).to_numpy()  # as a correlation does
    small = centred @ centred.T if len(some) < centred.shape[1] else centred.T @ centred
    spectrum = np.maximum(np.linalg.eigvalsh(small)[::-1], 0) / freedom
    shapes = (n_groups, n_blocks, -1), (n_strata, n_blocks, -1)
    known = (sums.reshape(shapes[0]), cells[:-1], control_sums.reshape(shapes[1]), cells[-1])
    return Sums(*known, spectrum, variance)


def halves(n_blocks: int, seed: int) -> np.ndarray:
    """Return different ways to take half of the blocks (splits, blocks) bool, at most `SPLITS`."""
    every = [half for half in itertools.combinations(range(n_blocks), n_blocks // 2) if 0 in half or n_blocks % 2]
    chosen = np.random.default_rng(seed).permutation(len(every))[:SPLITS]
    return np.array([np.isin(np.arange(n_blocks), every[i]) for i in chosen])


def reproducibility(sums: Sums, own: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the split-half correlation of each change, without own genes, and its p value.

    The correlation is the mean over splits of the cells (donors), each half with controls of its own. Under no effect it is one of noise
    with the covariance of cells, whatever their number, so its distribution is drawn from the eigenvalues of that covariance.
    """
    ways = halves(sums.cells.shape[2], seed)
    each = np.array(
        [correlations(*(np.where(own, np.nan, sums.changes(half)) for half in (way, ~way))) for way in ways]
    )
    r = pd.DataFrame(each).mean().to_numpy()
    rng, scale = np.random.default_rng(seed), np.sqrt(sums.spectrum[sums.spectrum > 0]).astype(np.float32)
    sides = [way / way.sum(axis=1, keepdims=True) for way in (ways, ~ways)]  # (splits, blocks)
    null = np.empty(NULL_DRAWS)
    for start in range(0, NULL_DRAWS, 500):
        noise = rng.standard_normal((500, ways.shape[1], len(scale)), dtype=np.float32) * scale
        gram = noise @ noise.swapaxes(1, 2)  # (draws, blocks, blocks)
        pairs = ((0, 0), (1, 1), (0, 1))
        first, second, both = (np.einsum("sk,nkl,sl->ns", sides[i], gram, sides[j]) for i, j in pairs)
        null[start : start + 500] = (both / np.sqrt(first * second)).mean(axis=1)
    above = NULL_DRAWS - np.searchsorted(np.sort(null), r)
    return r, np.where(np.isfinite(r), (1 + above) / (1 + NULL_DRAWS), np.nan)


def correlations(left: np.ndarray, right: np.ndarray, *, centre: bool = True) -> np.ndarray:
    """Return the Pearson correlation (or cosine) of each row of one matrix with the same row of another, where both are known."""
    known = np.isfinite(left) & np.isfinite(right)
    n = np.maximum(known.sum(axis=1, keepdims=True), 1)
    a, b = (
        np.where(known, x - np.where(known, x, 0).sum(axis=1, keepdims=True) / n * centre, 0) for x in (left, right)
    )
    length = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    return np.where(known.any(axis=1), (a * b).sum(axis=1) / np.where(length > 0, length, np.inf), np.nan)


# ---- features of genes ----------------------------------------------------------------------------------------------


def control_features(values: sparse.csr_matrix) -> dict[str, np.ndarray]:
    """Return what control cells say of each gene: PCA loadings and rows of co-expression (genes, dimensions)."""
    dense = values.toarray().astype(np.float64)
    dense -= dense.mean(axis=0)
    scale = dense.std(axis=0)
    dense /= np.where(scale > 0, scale, np.inf)
    together = dense.T @ dense / len(dense)
    _, size, vectors = randomized_svd(dense, n_components=min(30, *dense.shape), random_state=0)
    np.fill_diagonal(together, 0.0)
    return {"pca": vectors.T * size / np.sqrt(len(dense)), "coexpression": narrow(together)}


def lengthened(rows: np.ndarray) -> np.ndarray:
    """Return rows of length 1; those of zeros stay."""
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(length > 0, length, 1.0)


def narrow(block: np.ndarray) -> np.ndarray:
    """Return features about their mean, each of length 1, in at most `WIDTH` dimensions; what is not known stays NaN."""
    known = np.isfinite(block).all(axis=1)
    rows = np.asarray(block[known], dtype=np.float64)
    rows = rows - (rows.mean(axis=0) if len(rows) else 0)
    if rows.shape[1] > WIDTH < len(rows):
        left, size, _ = randomized_svd(rows, n_components=WIDTH, random_state=0)
        rows = left * size
    result = np.full((len(block), rows.shape[1]), np.nan)
    result[known] = lengthened(rows)
    return result


def components(changes: np.ndarray) -> np.ndarray:
    """Return the main directions of changes over genes, with their lengths (genes, components)."""
    n = min(COMPONENTS, *changes.shape)
    _, size, genes = randomized_svd(changes, n_components=n, random_state=0)
    return genes.T * size


def response_features(changes: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Return what measured perturbations do to the gene of each target (targets, components); `at` -1: it is no gene of the data.

    Genes that the same perturbations move act alike when they are perturbed themselves.
    """
    return np.where((at >= 0)[:, None], components(changes - changes.mean(axis=0))[at], np.nan)


def kernels(features: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return a cosine kernel of each block of features of targets (targets, d), and their mean; targets without features resemble none."""
    rows = {name: lengthened(np.nan_to_num(block)) for name, block in features.items()}
    made = {name: each @ each.T for name, each in rows.items()}
    return made | ({"all": np.mean(list(made.values()), axis=0)} if len(made) > 1 else {})


def pair_kernels(members: np.ndarray, n: int, pairs: np.ndarray) -> Kernels:
    """Return kernels between pairs of targets (pairs, 2), of several widths: pairs are alike whose members change the same genes.

    `members` are the changes of single targets, the first `n` measured. They are compared in the main components of these, where there
    is less noise, and those that change more count for more: a target without effect has no synergy.
    """
    rows = members @ lengthened(components(members[:n]).T).T
    size, alike, (a, b) = np.linalg.norm(rows, axis=1), lengthened(rows) @ lengthened(rows).T, pairs.T
    strength = np.sqrt(size / max(float(np.sqrt((size[:n] ** 2).mean())), 1e-12))
    made = {}
    for width in PAIR_WIDTHS:
        k = np.exp((alike - 1) / width) * np.outer(strength, strength)
        aa, bb, ab, ba = (k[np.ix_(*ends)] for ends in ((a, a), (b, b), (a, b), (b, a)))
        made[str(width)] = aa * bb + ab * ba + ONE_MEMBER * (aa + bb + ab + ba)
    return made


# ---- regression over perturbations ----------------------------------------------------------------------------------


def smoother(kernel: Rows | None, rule: Rule, train: Rows, test: Rows) -> Rows:
    """Return the weights with which changes of the training perturbations make up each prediction (test, train).

    `"nearby"` is the mean weighted by exp(kernel / temperature), `"ridge"` kernel ridge regression about a mean. A perturbation
    that is in both is predicted from the others: exact leave-one-out, of ridge in closed form.
    """
    (kind, strength), others = rule, np.asarray(test)[:, None] != train
    if kernel is None or np.isinf(strength):
        return others / np.maximum(others.sum(axis=1, keepdims=True), 1) * (kind != "zero")
    like = kernel[np.ix_(test, train)]
    if kind == "nearby":
        weights = np.where(others, np.exp((like - like.max(axis=1, keepdims=True)) / strength), 0)
        return weights / weights.sum(axis=1, keepdims=True)
    inverse = np.linalg.inv(kernel[np.ix_(train, train)] + strength * np.eye(len(train)))
    ones = inverse.sum(axis=1)
    weights = like @ inverse + np.outer(1 - like @ ones, ones / ones.sum())
    inverse -= np.outer(ones, ones) / ones.sum()
    row, i = np.nonzero(~others)
    weights[row] = -inverse[i] / np.diag(inverse)[i, None]
    weights[row, i] = 0
    return weights


def choose(
    known: Kernels,
    rules: list[Rule],
    changes: Rows,
    target: Rows,
    weight: Rows,
    start: Rule = MEAN,
    errors: float = ERRORS,
) -> tuple[str, Rule]:
    """Return the kernel and rule with the smallest leave-one-out error: `start`, unless another is better by so many standard errors.

    `changes` are learned from and `target` is predicted (perturbations, genes). The error is the log of the squared distance, so
    that strong effects do not decide alone; `weight` is the reliability of each perturbation.
    """
    some = np.argsort(-weight, kind="stable")[:MOST_TO_CHOOSE]
    changes, target, weight = changes[some], target[some], weight[some] / max(float(weight[some].sum()), 1e-12)
    squares, cross, gram = (target**2).sum(axis=1), target @ changes.T, changes @ changes.T

    def error(name: str, rule: Rule) -> np.ndarray:
        rows = smoother(known.get(name), rule, some, some)
        distance = squares - 2 * (rows * cross).sum(axis=1) + np.einsum("ij,ij->i", rows @ gram, rows)
        return np.log(np.maximum(distance, 1e-12))

    best, gain, base = ("", start), 0.0, error("", start)
    for each in itertools.product(known, rules):
        better = base - error(*each)
        mean = float(weight @ better)
        doubt = errors * float(np.sqrt(weight**2 @ (better - mean) ** 2))
        if mean > max(gain, doubt):
            best, gain = each, mean
    return best


def without_own(changes: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Return changes in which that of a target itself is replaced by its mean over the other perturbations."""
    others = np.where(own, 0.0, changes).sum(axis=0) / np.maximum((~own).sum(axis=0), 1)
    return np.where(own, others, changes)


def predict(
    features: dict[str, Rows], changes: Rows, weight: Rows, learn: Rows, train: Rows, test: Rows, at: Rows | None = None
) -> Rows:
    """Return predicted changes of the perturbations `test` from those in `train`, by the rule that is best among `learn`.

    `at` are the own genes of targets, whose responses to `learn` become features; without it, it is the best ridge regression.
    """
    shrunk = weight[:, None] * changes
    alike = kernels(features if at is None else features | {"response": response_features(shrunk[learn], at)})
    part = {name: kernel[np.ix_(learn, learn)] for name, kernel in alike.items()}
    rules, errors = (RIDGE, 0.0) if at is None else (SINGLES, ERRORS)
    name, rule = choose(part, rules, shrunk[learn], changes[learn], weight[learn], errors=errors)
    return smoother(alike.get(name), rule, train, test) @ shrunk[train]


def folds(n: int, seed: int) -> list[tuple[Rows, Rows]]:
    """Return divisions of `n` perturbations into those learned from and those left out (n,) bool, each left out once."""
    fold = np.random.default_rng(seed).permutation(n) % FOLDS
    return [(fold != k, fold == k) for k in np.unique(fold)]


def combine(base: Rows, measured: Rows, weight: Rows, alike: Kernels, train: Rows, test: Rows) -> Rows:
    """Return predicted changes of the pairs `test`: a multiple of the sum of both members, and what resembling pairs do beyond it.

    `base` is that sum for all pairs, `measured` the change of those in `train`. Of few measured pairs no synergy is learned.
    """
    if len(train) < FEWEST_PAIRS:
        return base[test]
    top, size = ((weight[:, None] * base[train] * x).sum() for x in (measured, base[train]))
    factor = float(np.clip(top / size if size > 0 else 1.0, 0.1, 1.5))
    left = measured - factor * base[train]
    part = {name: kernel[np.ix_(train, train)] for name, kernel in alike.items()}
    name, rule = choose(part, RIDGE, left, left, weight, ZERO)
    return factor * base[test] + smoother(alike.get(name), rule, train, test) @ left


# ---- a screen as it lies in an AnnData ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Cells:
    """The cells of a screen that are read, in rows of `values`."""

    values: sparse.csr_matrix  # log1p of expression at equal depth
    names: tuple[str, ...]  # of the perturbations, targets joined by "+"
    group: np.ndarray  # (cells,) number of the perturbation, -1: control
    stratum: np.ndarray  # (cells,) batch of a donor
    donor: np.ndarray | None  # (cells,)
    rows: np.ndarray  # (cells,) rows of adata
    is_counts: bool
    total: np.ndarray  # (cells,) counts of each cell


def targets_of(labels: Iterable[str], control: str, genes: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return the targets of each label, sorted; none for controls.

    `"A+B"`, `"A || B"`, `"A;B"` and, where both are genes or labels, `"A_B"` are pairs. Guides are named after their gene:
    `"A-1"` is A where A is a gene or label and `"A-1"` is none, `"A_sg1"` and `"Ag1"` are A. Guides without target count as nothing.

    Examples
    --------
    >>> targets_of(["A+B", "B_A", "Ag2", "NTg1", "A+ctrl", "HLA-1"], "NT", ["A", "B"])
    {'A+B': ('A', 'B'), 'B_A': ('A', 'B'), 'Ag2': ('A',), 'NTg1': (), 'A+ctrl': ('A',), 'HLA-1': ('HLA-1',)}
    """
    labels, genes = list(labels), {*genes, control}
    known = genes | {label for label in labels if not BETWEEN.search(label) and "_" not in label}

    def gene(part: str) -> str:
        found = GUIDE.match(part)
        return found[1] if found and part not in genes and (found[2] or found[3] or found[1] in known) else part

    made = {}
    for label in labels:
        parts, halves = [part for part in BETWEEN.split(label.strip()) if part], label.split("_")
        if len(parts) == 1 and gene(label) == label not in genes and len(halves) == 2:
            if all(gene(half) in known or NO_TARGET.match(half) for half in halves):
                parts = halves
        named = {gene(part) for part in parts} - {control}
        made[label] = tuple(sorted(name for name in named if len(parts) == 1 or not NO_TARGET.match(name)))
    return made


def read_cells(adata: AnnData, params: Mapping[str, Any], known: Iterable[str] = ()) -> Cells:
    """Return the cells of a screen; `params` are the arguments of `tl.fit_perturbations`, `known` further names of genes."""
    key, control, donor_key = params["key"], params["control"], params["donor_key"]
    labels = labels_of(read_obs(adata, key), key)
    distinct = sorted({label for label in labels if label is not None})
    targets = targets_of(distinct, control, [*adata.var_names, *known])
    if all(targets.values()):
        like = [label for label in distinct if NO_TARGET.match(label)] or distinct[:5]
        found = f"no cell of obs[{key!r}] is {control!r}"
        raise ScbinInputError("A06", f"{found}. Pass control= the unperturbed cells: {', '.join(map(repr, like))}?")
    name_of = {label: "+".join(each) for label, each in targets.items()}  # "": control
    named = pd.Series(labels, dtype=object).map(name_of)
    part = {name: labels_of(read_obs(adata, name), name) for name in (donor_key, params["batch_key"]) if name}
    columns = {name: np.asarray(column, dtype=object) for name, column in part.items()}
    frame = pd.DataFrame({"all": 0, **columns}, index=range(adata.n_obs))
    together = frame.groupby(list(frame)).ngroup().fillna(-1).to_numpy(dtype=np.int64)  # -1: unknown
    keep = named.notna().to_numpy() & (together >= 0)
    controls = np.bincount(together[keep & (named == "").to_numpy()], minlength=together.max(initial=0) + 1)
    few = keep & (controls[together] < FEWEST_CONTROLS)
    rows = np.flatnonzero(keep & ~few)
    names = sorted(set(named.iloc[rows]) - {""})
    if not names:
        found = f"no batch or donor has perturbed cells and {FEWEST_CONTROLS} controls"
        raise ScbinInputError("P02", f"{found}. Leave batch_key= or donor_key= out, or pass more cells.")
    if few.any():
        found = f"{count(int(few.sum()), 'cell')} of batches with fewer than {FEWEST_CONTROLS} controls"
        warn("P02", f"{found} are left out.")
    group = pd.Index(names).get_indexer(named.iloc[rows])
    stratum = np.unique(together[rows], return_inverse=True)[1]
    donor = None if donor_key is None else pd.factorize(frame[donor_key].iloc[rows], sort=True)[0]
    if donor is not None and donor.max() < 1:
        raise ScbinInputError("P02", f"all cells are of one donor in obs[{donor_key!r}]. Leave donor_key= out.")
    values, is_counts, total = read_expression(adata, params, rows, group, names)
    return Cells(values, tuple(names), group, stratum, donor, rows, is_counts, total)


def own_genes(names: Any, genes: np.ndarray) -> np.ndarray:
    """Return which genes are targets of each perturbation (perturbations, genes) bool."""
    return np.array([np.isin(genes, name.split("+")) for name in names]).reshape(len(names), len(genes))


def read_expression(
    adata: AnnData, params: Mapping[str, Any], rows: np.ndarray, group: np.ndarray, names: list[str]
) -> tuple[sparse.csr_matrix, bool, np.ndarray]:
    """Return log1p of expression at equal depth of some cells, whether they are counts, and their depths.

    The depth of a cell is that of its genes without its targets, which count with their share in controls: when an abundant target goes
    down, all other genes would seem to go up.
    """
    source = Source(adata, params["layer"])
    reading = source.read(source.scan(), "auto")
    matrix = sparse.vstack([block.csr() for block in source.blocks()], format="csr")[rows].astype(np.float32)
    if logs := reading.kind == "log1p":
        matrix.data = np.expm1(matrix.data * np.float32(np.log(reading.base)))
    total = np.asarray(matrix.sum(axis=1, dtype=np.float64)).ravel()
    if logs and reading.target_sum is None:  # of some genes: the depth is not known
        return matrix.log1p(), False, total
    if params["total_key"] is not None and not logs:
        total = pd.to_numeric(read_obs(adata, params["total_key"]), errors="coerce").to_numpy(dtype=float)[rows]
        if not (np.isfinite(total) & (total > 0)).all():
            raise ScbinInputError("I05", f"obs[{params['total_key']!r}] is not a number above 0 for every cell.")
    own = sparse.csr_matrix(np.vstack([own_genes(names, adata.var_names.to_numpy(str)), np.zeros(adata.n_vars, bool)]))
    usual = own @ np.asarray(matrix[group < 0].sum(axis=0)).ravel() / max(total[group < 0].sum(), 1.0)
    others = total - np.asarray(matrix.multiply(own[group]).sum(axis=1)).ravel()
    total = np.where(others > 0, others / (1 - usual[group]), total)
    scale = np.median(total[total > 0]) / np.maximum(total, 1e-12)
    matrix.data = np.log1p(matrix.data * np.repeat(scale, np.diff(matrix.indptr)).astype(np.float32))
    return matrix, not logs, total
