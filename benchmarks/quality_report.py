"""Tables and a picture of what quality.py measured."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pandas as pd
from quality_methods import HARMONY, HVG, PCA, PCA_ALL, SCBIN, SCBIN_BATCH, SCVI, SCVI_BATCH
from quality_metrics import BATCH_SCORES, CONSERVATION

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

SHOWN = {
    "knn_f1": "macro-F1 of 15 nearest neighbours",
    "kmeans_nmi": "NMI of k-means",
    "leiden_nmi": "NMI of Leiden, best resolution",
}
_STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9.5}
WITHOUT_BATCH = (PCA, PCA_ALL, HVG, SCVI, SCBIN)
FOR_BATCHES = (PCA, SCBIN, HARMONY, SCVI_BATCH, SCBIN_BATCH)
TITLES = {
    "knn_f1": "macro-F1, 15 nearest neighbours, 5 folds",
    "logistic_f1": "macro-F1, logistic regression on the embedding, 5 folds",
    "kmeans_nmi": "NMI, k-means with as many groups as labels",
    "kmeans_ari": "ARI, k-means with as many groups as labels",
    "leiden_nmi": "NMI, Leiden at the best resolution",
    "leiden_ari": "ARI, Leiden at that resolution",
    "leiden1_nmi": "NMI, Leiden at resolution 1",
    "leiden1_ari": "ARI, Leiden at resolution 1",
    "silhouette": "silhouette of labels, 0 to 1",
}
COLOURS = {
    PCA: "#4d4d4d", PCA_ALL: "#9a9a9a", HVG: "#cfcfcf", SCVI: "#009e73", SCVI_BATCH: "#009e73", HARMONY: "#e69f00",
    SCBIN: "#0072b2", SCBIN_BATCH: "#d55e00",
}  # fmt: skip


def write(table: Path, out: Path) -> None:
    """Write `<out>.md` and `<out>.png`, and print the first."""
    rows = pd.read_csv(table)
    rows["conservation"] = rows[list(CONSERVATION)].mean(axis=1)
    rows["mixing"] = rows[list(BATCH_SCORES)].mean(axis=1, skipna=False)
    parts = [f"**{title}**\n\n{_scores(rows, score, WITHOUT_BATCH)}" for score, title in TITLES.items()]
    parts += [_batches(rows), _genes(rows), _costs(rows), _facts()]
    text = "\n\n".join(part for part in parts if part) + "\n"
    out.with_suffix(".md").write_text(text)
    print(text)
    _picture(rows, out.with_suffix(".png"))


# ---- tables ---------------------------------------------------------------------------------------------------------


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _header(cells: Sequence[str]) -> list[str]:
    return [_line(cells), "|" + "---|" * len(cells)]


def _of(rows: pd.DataFrame, name: str, method: str, score: str) -> pd.Series:
    return rows.loc[(rows["set"] == name) & (rows["method"] == method), score].dropna()


def _spread(values: pd.Series) -> str:
    if not len(values):
        return "-"
    return f"{values.mean():.3f}" + (f" ± {values.std(ddof=0):.3f}" if len(values) > 1 else "")


def _marked(texts: list[str], best: int | None) -> list[str]:
    """Return the texts with those bold that show the best mean."""
    if best is None:
        return texts
    top = texts[best].split(" ")[0]
    return [f"**{text}**" if text.split(" ")[0] == top else text for text in texts]


def _scores(rows: pd.DataFrame, score: str, methods: Sequence[str]) -> str:
    """Return sets by methods, mean and standard deviation over seeds, and means over the sets that methods share."""
    methods = [method for method in methods if (rows["method"] == method).any()]
    lines = _header(["", *methods])
    table = {}
    for name in dict.fromkeys(rows["set"]):
        values = [_of(rows, name, method, score) for method in methods]
        means = pd.Series([found.mean() for found in values])
        table[name] = means
        n_cells = int(rows.loc[rows["set"] == name, "n_cells"].iloc[0])
        best = None if means.isna().all() else int(means.idxmax())
        lines.append(_line([f"{name} ({n_cells:,})", *_marked([_spread(found) for found in values], best)]))
    table = pd.DataFrame(table).T
    table.columns = methods
    before = 0
    for wanted in ([method for method in methods if method != SCVI], methods):  # scVI reads counts only and takes long
        common = table[wanted].dropna()
        if 1 < len(common) and len(common) != before:
            means = common.mean()
            texts = _marked([f"{mean:.3f}" for mean in means], int(means.argmax()))
            shown = dict(zip(wanted, texts, strict=True))
            lines.append(_line([f"mean of {len(common)} sets", *(shown.get(method, "-") for method in methods)]))
        before = len(common)
    return "\n".join(lines)


def _batches(rows: pd.DataFrame) -> str:
    """Return, for sets with batches, label conservation and mixing of each method."""
    names = {"conservation": "label conservation", "knn_f1": "kNN F1", "mixing": "mixing", "ilisi": "iLISI"}
    names |= {"batch_asw": "batch ASW", "connectivity": "connectivity", "kbet": "kBET"}
    lines = _header(["batches", "", *names.values()])
    for name in dict.fromkeys(rows.loc[rows["mixing"].notna(), "set"]):
        part = rows[(rows["set"] == name) & rows["method"].isin(FOR_BATCHES)]
        means = part.groupby("method")[list(names)].mean()
        tops = means.round(3).max()
        for method in [method for method in FOR_BATCHES if method in means.index]:
            texts = [_spread(_of(rows, name, method, score)) for score in names]
            cells = [
                f"**{t}**" if round(means.loc[method, s], 3) == tops[s] else t
                for t, s in zip(texts, names, strict=True)
            ]
            n_batches = int(part["n_batches"].iloc[0])
            lines.append(_line([f"{name}, {n_batches}" if method == FOR_BATCHES[0] else "", method, *cells]))
    return "\n".join(lines) if len(lines) > 2 else ""


def _genes(rows: pd.DataFrame) -> str:
    """Return how well hidden genes are found on cells held out of pretraining, beside the best simple method."""
    titles = {"exact": "right bin", "within_one": "off by one at most", "log_loss": "log loss (smaller is better)"}
    lines = _header(["hidden genes", *(f"{title}: scbin, best simple method" for title in titles.values())])
    part = rows[rows["genes_exact"].notna()]
    for name in dict.fromkeys(part["set"]):
        cells = [
            f"{_spread(_of(rows, name, SCBIN, f'genes_{score}'))}, {_spread(_of(rows, name, SCBIN, f'genes_{score}_simple'))}"
            for score in titles
        ]
        lines.append(_line([name, *cells]))
    return "\n".join(lines) if len(lines) > 2 else ""


def _costs(rows: pd.DataFrame) -> str:
    """Return seconds and memory of each method."""
    methods = [method for method in COLOURS if (rows["method"] == method).any()]
    lines = _header(["CPU seconds; most memory, GB", *methods])
    for name in dict.fromkeys(rows["set"]):
        cells = []
        for method in methods:
            seconds, memory = (_of(rows, name, method, column) for column in ("cpu_seconds", "peak_gb"))
            cells.append(f"{seconds.mean():.0f}; {memory.max():.1f}" if len(seconds) else "-")
        lines.append(_line([name, *cells]))
    return "\n".join(lines)


def _facts() -> str:
    import torch

    packages = ("scbin", "torch", "scanpy", "scikit-learn", "harmonypy", "scvi-tools", "igraph")
    modules = {"scikit-learn": "sklearn", "scvi-tools": "scvi"}
    there = [f"{name} {version(name)}" for name in packages if name != "scbin" and find_spec(modules.get(name, name))]
    return f"Python {platform.python_version()}, {', '.join(there)}; {torch.get_num_threads()} threads of {os.cpu_count()} cores."


# ---- picture --------------------------------------------------------------------------------------------------------


def _picture(rows: pd.DataFrame, path: Path) -> None:
    """Draw scores without batches above, and mixing of batches against conservation of labels below."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(rows.sort_values("n_cells", ascending=False)["set"]))
    told = rows[rows["method"].isin(["Harmony", "scVI, batch_key", "scbin, batch_key"])]  # of the batches
    batched = [name for name in reversed(names) if told.loc[told["set"] == name, "mixing"].notna().any()]
    heights = [1.2 + 0.5 * len(names), *([3.1] if batched else [])]
    with plt.rc_context(_STYLE):
        figure = plt.figure(figsize=(11.5, sum(heights)), layout="constrained")
        parts = figure.subfigures(len(heights), 1, height_ratios=heights, hspace=0.04, squeeze=False).ravel()
        axes = parts[0].subplots(1, len(SHOWN), sharey=True)
        for ax, (score, title) in zip(axes, SHOWN.items(), strict=True):
            _dots(ax, rows, names, score)
            ax.set_title(title, loc="left")
        parts[0].suptitle("Without labels and without batches", x=0.01, ha="left", fontweight="bold")
        _legend(parts[0], axes, WITHOUT_BATCH)
        if batched:
            panels = parts[1].subplots(1, max(len(batched), 3), sharex=True, sharey=True)
            for ax, name in zip(panels, batched, strict=False):
                _against(ax, rows, name)
            for ax in panels[len(batched) :]:
                ax.axis("off")
            parts[1].suptitle("Batches brought together", x=0.01, ha="left", fontweight="bold")
            _legend(parts[1], panels, FOR_BATCHES)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _legend(part: SubFigure, axes: Sequence[Axes], order: Sequence[str]) -> None:
    found = {text: handle for ax in axes for handle, text in zip(*ax.get_legend_handles_labels(), strict=True)}
    there = [name for name in order if name in found]
    handles = [found[name] for name in there]
    part.legend(handles, there, loc="outside lower center", ncols=len(there), frameon=False, handletextpad=0.1)


def _dots(ax: Axes, rows: pd.DataFrame, names: Sequence[str], score: str) -> None:
    """Draw a band per set, a dot per method at its mean over seeds, and a line from the worst seed to the best."""
    for row, name in enumerate(names):
        if row % 2 == 0:
            ax.axhspan(row - 0.5, row + 0.5, color="#f4f4f4", lw=0, zorder=0)
        for place, method in enumerate(WITHOUT_BATCH):
            values = _of(rows, name, method, score)
            if len(values):
                height, size = row + 0.17 * (place - 2), 52 if method == SCBIN else 26
                ax.plot([values.min(), values.max()], [height, height], color=COLOURS[method], lw=1.5, zorder=2)
                ax.scatter(
                    values.mean(),
                    height,
                    s=size,
                    color=COLOURS[method],
                    edgecolor="white",
                    lw=0.6,
                    zorder=3,
                    label=method,
                )
    counts = [int(rows.loc[rows["set"] == name, "n_cells"].iloc[0]) for name in names]
    ax.set_yticks(
        range(len(names)), [f"{name}\n{n:,} cells" for name, n in zip(names, counts, strict=True)], fontsize=8
    )
    ax.set_ylim(-0.5, len(names) - 0.5)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.grid(axis="x", color="#dddddd", lw=0.6)
    ax.set_axisbelow(True)


def _against(ax: Axes, rows: pd.DataFrame, name: str) -> None:
    """Draw each method of a set with batches: to the right is better for labels, up is better for mixing."""
    for method in FOR_BATCHES:
        x, y = _of(rows, name, method, "conservation"), _of(rows, name, method, "mixing")
        if len(x) and len(y):
            colour = COLOURS[method]
            ax.plot([x.min(), x.max()], [y.mean()] * 2, color=colour, lw=1.5)
            ax.plot([x.mean()] * 2, [y.min(), y.max()], color=colour, lw=1.5)
            ax.scatter(x.mean(), y.mean(), s=60, color=colour, edgecolor="white", lw=0.8, zorder=3, label=method)
    ax.set_title(name, loc="left", fontsize=8.5)
    ax.locator_params(nbins=5)
    ax.set_xlabel("label conservation")
    if ax.get_subplotspec().is_first_col():
        ax.set_ylabel("mixing of batches")
    ax.grid(color="#eeeeee", lw=0.6)
    ax.set_axisbelow(True)
