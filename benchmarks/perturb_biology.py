"""Does in silico perturbation know biology? Interferon-stimulated genes, and knock-outs that were really made.

python benchmarks/perturb_biology.py interferon kang_ifnb_2k.h5ad
python benchmarks/perturb_biology.py knockouts papalexi_thp1_crisprko_299g.h5ad

interferon: control cells, each gene pushed to the top bin in turn; how near they come to the cells stimulated with IFN-beta. Known
interferon-stimulated genes should come first (AUROC against all other genes of the model). Beside it: the genes' mean
expression, the same push and the same shift in PCA space, a push by one standard deviation there, and the plain difference of
the two states.

knockouts: a model trained on control cells alone. Each gene that was knocked out in the experiment is deleted from control cells that
express it; the change of all other genes, as the model expects them when they are hidden and as regression reads them off the
cell's vector, is compared with the change that was observed. Beside it: no change, the mean change under the other
knock-outs, and regression on the gene's expression in control cells; and how well two halves of the cells agree, since some
knock-outs change nothing that can be seen.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import anndata as ad
import numpy as np
from scipy import stats
from sklearn.linear_model import RidgeCV
from sklearn.metrics import roc_auc_score

import scbin
from scbin.encoding.edits import Edit, GeneRows, edit_rows
from scbin.nn.embedding import embed_tokens
from scbin.tl._expression import log_normalised

# Genes that reviews of the type I interferon response name as induced (Schoggins and Rice 2011, Curr Opin Virol; Schneider,
# Chevillotte and Rice 2014, Annu Rev Immunol), written down before any result was seen.
CORE = """
ADAR APOBEC3A BST2 CCL8 CMPK2 CXCL10 CXCL11 DDX58 DDX60 DHX58 EIF2AK2 EPSTI1 GBP1 GBP4 HERC5 HERC6 IFI16 IFI27 IFI35 IFI44 IFI44L
IFI6 IFIH1 IFIT1 IFIT2 IFIT3 IFIT5 IFITM1 IFITM2 IFITM3 IRF7 IRF9 ISG15 ISG20 LAP3 LY6E MX1 MX2 NMI NT5C3A OAS1 OAS2 OAS3 OASL
PARP14 PARP9 PLSCR1 RSAD2 RTP4 SAMD9 SAMD9L SIGLEC1 SP110 STAT1 STAT2 TNFSF10 TRIM22 UBE2L6 USP18 XAF1
""".split()
# The hallmark "interferon alpha response" of MSigDB (Liberzon and others 2015), with older names of two genes: wider, and not all
# of it is induced in blood.
HALLMARK = """
ADAR B2M BATF2 BST2 C1S CASP1 CASP8 CCRL2 CD47 CD74 CMPK2 CMTR1 CNP CSF1 CXCL10 CXCL11 DDX60 DHX58 EIF2AK2 ELF1 EPSTI1 FAM46A GBP2
GBP4 GMPR HELZ2 HERC6 HLA-C IFI27 IFI30 IFI35 IFI44 IFI44L IFIH1 IFIT2 IFIT3 IFITM1 IFITM2 IFITM3 IL15 IL4R IL7 IRF1 IRF2 IRF7
IRF9 ISG15 ISG20 LAMP3 LAP3 LGALS3BP LPAR6 LY6E MOV10 MVB12A MX1 NCOA7 NMI NUB1 OAS1 OASL OGFR PARP12 PARP14 PARP9 PLSCR1 PNPT1
PROCR PSMA3 PSMB8 PSMB9 PSME1 PSME2 RIPK2 RNF31 RSAD2 RTP4 SAMD9 SAMD9L SELL SLC25A28 SP110 STAT2 TAP1 TDRD7 TENT5A TMEM140 TRAFD1
TRIM14 TRIM21 TRIM25 TRIM26 TRIM5 TXNIP UBA7 UBE2L6 USP18 WARS WARS1
""".split()


# ---- interferon -----------------------------------------------------------------------------------------------------


def interferon(arguments: argparse.Namespace) -> None:
    adata = ad.read_h5ad(arguments.file)
    if arguments.min_share:
        share = np.asarray((adata.X > 0).mean(axis=0)).ravel()
        adata.var["highly_variable"] = share >= arguments.min_share
    rows: dict[str, list[tuple[float, float]]] = {}
    for seed in range(arguments.seeds):
        cells = adata.copy()
        scbin.pp.tokenize(cells)
        model = scbin.tl.pretrain(cells, seed=seed, progress=False)
        genes = np.array(model.vocabulary.genes)
        stimulated, start = (cells.obs["condition"] == state for state in ("IFN-beta", "control"))
        drawn = np.zeros(cells.n_obs, dtype=bool)
        drawn[np.random.default_rng(seed).choice(np.flatnonzero(start), arguments.cells, replace=False)] = True
        cells.obs["state"] = np.where(stimulated, "IFN-beta", np.where(drawn, "start", "control"))
        scbin.tl.perturb(
            cells,
            model,
            genes=genes.tolist(),
            mode="overexpress",
            state_key="state",
            start="start",
            goal="IFN-beta",
            method=arguments.method,
            donor_key="donor_id",
            progress=False,
        )
        table = scbin.get.perturb_df(cells, sort_by=None).set_index("gene").loc[genes]
        log1p = log_normalised(cells)[:, cells.var_names.get_indexer(genes)].toarray().astype(np.float64)
        scores = {
            "scbin: shift towards IFN-beta": table["shift"].to_numpy(),
            "scbin: the same in SDs of genes alike": table["effect_size"].fillna(0).to_numpy(),
            "scbin: alignment, however far": table["alignment"].fillna(0).to_numpy(),
            "mean expression in control cells": log1p[start].mean(axis=0),
            "mean expression in all cells": log1p.mean(axis=0),
            **_in_pca(log1p, stimulated.to_numpy(), start.to_numpy(), drawn, model.vocabulary),
            "difference of mean log expression": log1p[stimulated].mean(axis=0) - log1p[start].mean(axis=0),
        }
        core, wide = (np.isin(genes, names) for names in (CORE, HALLMARK))
        for name, values in scores.items():
            rows.setdefault(name, []).append((roc_auc_score(core, values), roc_auc_score(wide, values)))
        hits = table[table["fdr"] < 0.05].sort_values("shift", ascending=False)
        print(
            f"seed {seed}: {len(genes):,} genes, {core.sum()} core and {wide.sum()} hallmark genes among them, {arguments.cells} "
            f"cells; {int(table['exact'].sum()):,} genes exact; {len(hits)} at FDR .05, first {', '.join(hits.index[:12])}",
            flush=True,
        )
    print(
        f"\nAUROC, mean over {arguments.seeds} seeds (range)".ljust(44) + "core ISGs".rjust(22) + "hallmark".rjust(22)
    )
    for name, found in rows.items():
        print(name.ljust(44) + "".join(_mean_and_range([pair[k] for pair in found]).rjust(22) for k in range(2)))


def _in_pca(
    log1p: np.ndarray, stimulated: np.ndarray, start: np.ndarray, drawn: np.ndarray, vocabulary: scbin.Vocabulary
) -> dict[str, np.ndarray]:
    """The change of the cosine to the stimulated cells when a gene is pushed in the space of 50 scaled components."""
    scale = log1p.std(axis=0) + 1e-12
    scaled = np.clip((log1p - log1p.mean(axis=0)) / scale, -10, 10)
    axes = np.linalg.svd(scaled, full_matrices=False)[2][:50].T  # (genes, 50)
    places = scaled @ axes
    goal = _unit(places[stimulated].mean(axis=0) - places[start | stimulated].mean(axis=0))
    top = float(vocabulary.bins.centres[-1])
    names = ("PCA: pushed to the top bin", "PCA: pushed by one SD", "PCA: alignment")
    result = {name: np.zeros(len(axes)) for name in names}
    way = _unit(places[stimulated].mean(axis=0) - places[start].mean(axis=0))
    result["PCA: alignment"] = _unit(axes) @ way  # a push of a gene goes the same way in every cell
    for cell in np.flatnonzero(drawn):
        here = places[cell] - places[start | stimulated].mean(axis=0)
        pushes = ((top - log1p[cell]) / scale, np.ones(len(axes)))
        for name, push in zip(names[:2], pushes, strict=True):
            result[name] += (_unit(here + push[:, None] * axes) - _unit(here)) @ goal
    return result


# ---- knock-outs -----------------------------------------------------------------------------------------------------


def knockouts(arguments: argparse.Namespace) -> None:
    adata = ad.read_h5ad(arguments.file)
    perturbed = adata.obs["perturbation"].astype(str).to_numpy()
    log1p = log_normalised(adata).toarray().astype(np.float64)
    control = perturbed == "control"
    shown = (log1p[control] > 0).mean(axis=0) >= 0.05
    made = sorted(set(perturbed) - {"control"})
    observed = {name: log1p[perturbed == name].mean(axis=0) - log1p[control].mean(axis=0) for name in made}
    tested = [name for name in made if name in adata.var_names]
    print(
        f"{len(tested)} of {len(made)} knocked-out genes are among the {adata.n_vars}; {shown.sum()} in 5 % of control cells"
    )
    others = {
        name: np.mean([observed[other] for other in made if other != name], axis=0) for name in tested
    }  # leaves the knock-out itself out
    own = log1p[control]
    lost = {}
    for name in tested:
        x = own[:, adata.var_names.get_loc(name)]
        lost[name] = -x.mean() * ((x - x.mean()) @ (own - own.mean(axis=0))) / ((x - x.mean()) @ (x - x.mean()))
    methods = {
        "no change": {name: np.zeros(adata.n_vars) for name in tested},
        "mean change under other knock-outs": others,
        "regression on the gene, control cells": lost,
    }
    for seed in range(arguments.seeds):
        cells = adata[control].copy()
        cells.var["highly_variable"] = True
        scbin.pp.tokenize(cells)
        model = scbin.tl.pretrain(cells, seed=seed, progress=False)
        for readout, changes in _predicted_changes(cells, model, tested, arguments.cells, seed).items():
            methods[f"scbin: {readout}, seed {seed}"] = changes
    _report(methods, observed, tested, adata, shown, perturbed, log1p)


def _predicted_changes(
    cells: ad.AnnData, model: scbin.Model, names: list[str], n_cells: int, seed: int
) -> dict[str, dict[str, np.ndarray]]:
    """Mean change of all genes when one is deleted: as the model expects them when hidden, and as the cell's vector tells.

    The second reads the genes off the vector by ridge regression on the same control cells, before and after.
    """
    vocabulary = model.vocabulary
    rows = GeneRows(cells.obsm["X_tokens"].tocsr(), vocabulary)
    log1p = log_normalised(cells).toarray()
    vectors = cells.obsm["X_scbin"]
    reader = RidgeCV(np.geomspace(1e-2, 1e4, 13)).fit(vectors, log1p)
    by_mask, by_vector = {}, {}
    for name in names:
        gene = vocabulary.genes.index(name)
        holding = np.flatnonzero(rows.find(np.arange(cells.n_obs), np.full(cells.n_obs, gene))[1] > 0)
        holding = np.sort(np.random.default_rng(seed).permutation(holding)[:n_cells])
        part = cells[holding].copy()
        scbin.tl.perturb(part, model, genes=name, mode="delete", readout="expression", method="exact", progress=False)
        entry = part.uns["scbin_perturb"]
        by_mask[name] = np.zeros(cells.n_vars)
        by_mask[name][cells.var_names.get_indexer(entry["genes"])] = np.nan_to_num(entry["expression"][0])
        edited = edit_rows(rows, Edit("delete"), holding, np.full(len(holding), gene)).tokens
        after = embed_tokens(model.bert, edited, model.weights())
        by_vector[name] = (reader.predict(after) - reader.predict(vectors[holding])).mean(axis=0)
    return {"hidden genes": by_mask, "cell vector": by_vector}


def _report(
    methods: dict[str, dict[str, np.ndarray]],
    observed: dict[str, np.ndarray],
    tested: list[str],
    adata: ad.AnnData,
    shown: np.ndarray,
    perturbed: np.ndarray,
    log1p: np.ndarray,
) -> None:
    print("\nPearson correlation over the other genes | sign agreement over those that changed (rank-sum, FDR .05)")
    print("".ljust(40) + "".join(name.rjust(14) for name in (*tested, "mean", "of changed")))
    changed, genes = {}, {}
    for name in tested:
        genes[name] = shown & (adata.var_names != name)
        p_values = stats.ranksums(log1p[perturbed == name], log1p[perturbed == "control"], axis=0).pvalue
        fdr = np.ones(len(p_values))
        fdr[genes[name]] = stats.false_discovery_control(p_values[genes[name]])
        changed[name] = fdr < 0.05
    print("genes that changed".ljust(40) + "".join(str(int(changed[name].sum())).rjust(14) for name in tested))
    halves = [_halves_agree(log1p, perturbed, name, genes[name]) for name in tested]
    print("two halves of the cells agree".ljust(40) + "".join(f"{r:.2f}".rjust(14) for r in halves))
    affected = np.array([changed[name].any() for name in tested])  # knock-outs that changed anything at all
    for method, predicted in methods.items():
        correlations, signs = [], []
        for name in tested:
            ours, theirs = predicted[name], observed[name]
            own = genes[name]
            correlations.append(np.corrcoef(ours[own], theirs[own])[0, 1] if np.ptp(ours[own]) else np.nan)
            agree = np.sign(ours[changed[name]]) == np.sign(theirs[changed[name]])
            signs.append(agree.mean() if len(agree) else np.nan)
        cells = [f"{r:.2f} | {s:.2f}" for r, s in zip(correlations, signs, strict=True)]
        for those in (np.ones(len(tested), dtype=bool), affected):
            known = [np.array(values)[those & np.isfinite(values)] for values in (correlations, signs)]
            mean = [values.mean() if len(values) else np.nan for values in known]
            cells.append(f"{mean[0]:.2f} | {mean[1]:.2f}")
        print(method.ljust(40) + "".join(cell.rjust(14) for cell in cells))


def _halves_agree(log1p: np.ndarray, perturbed: np.ndarray, name: str, genes: np.ndarray) -> float:
    """Correlation of the change seen in one half of the cells with that in the other: no prediction can be nearer to it."""
    rng = np.random.default_rng(0)
    there, control = (rng.permutation(np.flatnonzero(perturbed == kind)) for kind in (name, "control"))
    first, second = (log1p[there[k::2]].mean(axis=0) - log1p[control[k::2]].mean(axis=0) for k in (0, 1))
    return float(np.corrcoef(first[genes], second[genes])[0, 1])


# ---- both -----------------------------------------------------------------------------------------------------------


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-30)


def _mean_and_range(values: list[float]) -> str:
    return f"{np.mean(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("interferon", "knockouts"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--cells", type=int, default=60, help="control cells that are perturbed (per gene for knockouts)"
    )
    parser.add_argument("--method", default="auto", choices=("auto", "exact", "screen"))
    parser.add_argument(
        "--min-share",
        type=float,
        default=0.0,
        help="read all genes in this share of the cells, not the most variable ones",
    )
    arguments = parser.parse_args()
    {"interferon": interferon, "knockouts": knockouts}[arguments.what](arguments)


if __name__ == "__main__":
    main()
