from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import csr_matrix, vstack

import scbin.get
import scbin.pl
from scbin._errors import ScbinInputError
from scbin.encoding.bins import Bins
from scbin.encoding.vocabulary import Vocabulary

GENES = [f"GENE{i}" for i in range(12)]
PHENOTYPES = {"sex": ["female", "male"], "cell_type": ["B cell", "$T_4$"]}


def build(encoding):
    bins = {"bins": Bins((0.1, 1.0, 2.0)), "binary": Bins((0.1,)), "gene_bins": Bins((1, 2, 4), reads="counts")}.get(
        encoding
    )
    length = 16 if encoding == "rank" else None
    return Vocabulary.build(encoding, GENES, phenotypes=PHENOTYPES, bins=bins, max_length=length)


def encode(vocabulary, genes, levels):
    """One row: female, cell type not given, the genes with their levels (or in their order)."""
    sex, cell_type = vocabulary.phenotypes
    positions = [0, sex.position, cell_type.position, vocabulary.first_gene_position - 1]
    ids = [vocabulary.specials["[CLS]"], sex.first_id, cell_type.missing_id, vocabulary.specials["[START]"]]
    if vocabulary.encoding == "rank":
        positions += list(vocabulary.first_gene_position + np.arange(len(genes)))
        ids += [vocabulary.first_gene_id + gene for gene in genes]
    else:
        step = vocabulary.n_levels if vocabulary.encoding == "gene_bins" else 0
        positions += [vocabulary.first_gene_position + gene for gene in genes]
        ids += [vocabulary.first_gene_id + step * g + level for g, level in zip(genes, levels, strict=True)]
    row = csr_matrix((ids, positions, [0, len(ids)]), shape=(1, vocabulary.n_positions), dtype=vocabulary.dtype)
    row.sort_indices()
    return row


@pytest.mark.parametrize("encoding", ["bins", "binary", "rank", "gene_bins"])
def test_table_says_what_was_encoded(encoding):
    vocabulary = build(encoding)
    levels = [1, 1, 1] if encoding == "binary" else [2, 3, 1]
    table = scbin.get.tokens_df(encode(vocabulary, [5, 2, 7], levels), vocabulary=vocabulary)
    assert table["name"].tolist()[:4] == ["[CLS]", "sex", "cell_type", "[START]"]
    assert table["text"].tolist()[1:3] == ["[female]", "[NO_CELL_TYPE]"]
    genes = table[table["kind"] == "gene"].set_index("name")
    if encoding == "rank":
        assert genes["rank"].to_dict() == {"GENE5": 1, "GENE2": 2, "GENE7": 3}
        assert genes["bin"].isna().all()
    else:
        assert genes["bin"].to_dict() == dict(zip(["GENE5", "GENE2", "GENE7"], levels, strict=True))
        assert genes["value"].to_dict() == {
            f"GENE{g}": vocabulary.bins.centres[level] for g, level in zip([5, 2, 7], levels, strict=True)
        }


@pytest.mark.parametrize("encoding", ["bins", "binary", "rank", "gene_bins"])
def test_picture_names_what_the_model_reads(encoding):
    vocabulary = build(encoding)
    ax = scbin.pl.tokens(encode(vocabulary, [5, 2, 7], [1, 1, 1]), vocabulary=vocabulary)
    ax.figure.canvas.draw()
    words = {text.get_text() for text in ax.texts}
    assert {"female", "not given", "GENE5", "GENE2", "GENE7"} <= words
    assert ax.get_title(loc="left") == "Cell 0: 7 tokens, 3 genes"


def test_strongest_genes_come_first_and_the_rest_is_counted():
    vocabulary = build("bins")
    ax = scbin.pl.tokens(encode(vocabulary, [1, 4, 8], [1, 3, 2]), vocabulary=vocabulary, n_genes=2)
    shown = [text.get_text() for text in ax.texts if text.get_text().startswith("GENE")]
    assert shown == ["GENE4", "GENE8"]
    assert "and 1 more gene" in {text.get_text() for text in ax.texts}


def test_cell_by_number_and_errors():
    vocabulary = build("rank")
    rows = vstack(
        [encode(vocabulary, [1], []), encode(vocabulary, [2], []), csr_matrix((1, 16), dtype=np.uint16)]
    ).tocsr()
    assert scbin.get.tokens_df(rows, 1, vocabulary=vocabulary)["name"].iloc[-1] == "GENE2"
    assert scbin.get.tokens_df(rows, -2, vocabulary=vocabulary)["name"].iloc[-1] == "GENE2"
    for cell, code in [(3, "P09"), ("AAAC-1", "P09"), (2, "P12")]:
        with pytest.raises(ScbinInputError, match=code):
            scbin.pl.tokens(rows, cell, vocabulary=vocabulary)
    with pytest.raises(ScbinInputError, match="P08"):
        scbin.pl.tokens(rows)


def test_cell_of_an_anndata_by_name(toy):
    vocabulary = build("bins")
    toy = toy[:2].copy()
    toy.obsm["X_tokens"] = vstack([encode(vocabulary, [1], [2]), encode(vocabulary, [2, 3], [3, 1])]).tocsr()
    toy.uns["scbin"] = {"vocabulary": vocabulary.to_json()}
    before = toy.copy()
    ax = scbin.pl.tokens(toy, "cell1")
    assert ax.get_title(loc="left") == "Cell cell1: 6 tokens, 2 genes"
    assert scbin.get.tokens_df(toy, "cell1").equals(scbin.get.tokens_df(toy, 1))
    assert list(toy.obsm) == list(before.obsm)
    assert toy.uns == before.uns
