from __future__ import annotations

import numpy as np

from scbin.datasets import pbmc68k_reduced


def test_cells_as_promised():
    adata = pbmc68k_reduced()
    assert adata.shape == (700, 765)
    assert adata.X.format == "csr"
    assert adata.obs["bulk_labels"].nunique() == 10
    assert adata.X.data.min() > 0 and np.isfinite(adata.X.data).all()
    assert pbmc68k_reduced() is not adata
