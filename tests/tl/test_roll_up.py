from __future__ import annotations

import anndata as ad
import networkx as nx
import numpy as np
import pandas as pd
import pytest

import scbin
from scbin._errors import ScbinInputError

PARENTS = {"CD4": "T", "CD8": "T", "T": "lymphocyte", "B": "lymphocyte", "NK/T": "lymphocyte", "lymphocyte": "cell"}
CLASSES = ["B", "CD4", "CD8", "NK/T", "monocyte"]


@pytest.fixture
def predicted():
    probability = np.random.default_rng(0).dirichlet(np.full(5, 0.4), 200)
    adata = ad.AnnData(np.ones((200, 2)))
    probability[7] = np.nan
    labels = np.where(np.isnan(probability[:, 0]), -1, np.nan_to_num(probability).argmax(axis=1))
    adata.obs["scbin_kind"] = pd.Categorical.from_codes(labels, categories=CLASSES)
    adata.obsm["scbin_kind_probability"] = probability
    return adata


@pytest.mark.parametrize("threshold", [0.3, 0.7, 0.95])
def test_terms_are_the_smallest_that_reach_the_threshold(predicted, threshold, tmp_path):
    table = pd.DataFrame({"term": [*PARENTS, "cell"], "parent": [*PARENTS.values(), None]})
    scbin.tl.roll_up(predicted, "kind", dict(table.values), threshold=threshold)
    tree = nx.DiGraph((parent, child) for child, parent in PARENTS.items())
    tree.add_nodes_from(CLASSES)
    below = {term: [k for k, c in enumerate(CLASSES) if c == term or term in nx.ancestors(tree, c)] for term in tree}
    for row, (term, found) in enumerate(
        zip(predicted.obs["scbin_kind_rolled"], predicted.obs["scbin_kind_rolled_probability"], strict=True)
    ):
        of = {name: predicted.obsm["scbin_kind_probability"][row, part].sum() for name, part in below.items()}
        enough = {name: (len(below[name]), -p) for name, p in of.items() if p >= threshold - 1e-9}
        if not enough:
            assert pd.isna(term) and np.isnan(found)
            continue
        best = min(enough.values())
        assert enough[term][0] == best[0] and np.isclose(enough[term][1], best[1]) and np.isclose(found, of[term])
    predicted.write_h5ad(tmp_path / "a.h5ad")
    assert ad.read_h5ad(tmp_path / "a.h5ad").obs["scbin_kind_rolled"].equals(predicted.obs["scbin_kind_rolled"])


def test_what_is_refused(predicted):
    with pytest.raises(ScbinInputError, match="L01.*its own ancestor"):
        scbin.tl.roll_up(predicted, "kind", {"B": "x", "x": "B"})
    with pytest.raises(ScbinInputError, match="A06"):
        scbin.tl.roll_up(predicted, "age", PARENTS)
    assert list(predicted.obs) == ["scbin_kind"]
