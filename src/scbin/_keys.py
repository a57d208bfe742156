"""Every AnnData slot name, once."""

from __future__ import annotations

TOKENS = "X_tokens"  # obsm, CSR: row = cell, column = position id, value = token id
EMBEDDING = "X_scbin"  # obsm, float32 (cells, hidden)
UMAP = "X_umap_scbin"  # obsm, float32 (cells, 2)
STATUS = "scbin_status"  # obs, categorical: "ok", "empty", "no_vocab_gene"
UNS = "scbin"  # uns, one entry per verb, and:
VOCABULARY = "vocabulary"  # uns["scbin"]["vocabulary"], one JSON string
