"""What token ids and positions mean, and that old vocabularies stay what they were."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import sparse

from scbin._errors import ScbinInputError
from scbin.tokens.rules import Bins
from scbin.tokens.vocabulary import Depth, Vocabulary

GENES = ["A1", "B2", "C3"]
LABELS = {"kind": ["x"], "sex": ["f", "m"]}
CASES = [("bins", Bins.counts()), ("bins", Bins.linear(5)), ("binary", Bins.binary()), ("gene_bins", Bins.log2(9))]


def build(encoding, bins=None, **kwargs) -> Vocabulary:
    return Vocabulary.build(encoding, GENES, bins=bins, **kwargs)


@pytest.mark.parametrize("depth", [False, True])
@pytest.mark.parametrize(("encoding", "bins"), [*CASES, ("rank", None)])
def test_layout(encoding, bins, depth: bool):
    v = build(encoding, bins, phenotypes=LABELS, depth=depth)
    assert [(p.name, p.position) for p in v.phenotypes] == [("sex", 1), ("kind", 2)]  # CELLxGENE's first
    assert (v.depth.position if depth else None) == (3 if depth else None)
    assert v.first_gene_position == 4 + depth
    assert v.gene_positions.tolist()[:3] == [4 + depth, 5 + depth, 6 + depth]
    assert v.first_gene_id == 5 + 3 + 2 + (33 if depth else 0)
    assert v.group_stop[: v.first_gene_position].tolist() == [0, 8, 10, *([0] * (1 + depth))]
    assert Vocabulary.from_json(v.to_json()) == v
    assert ('"depth"' in v.to_json()) == depth
    if depth:
        assert [v.token_text(10, 3), v.token_text(11, 3), v.token_text(43 - 1, 3)][:2] == ["[NO_DEPTH]", "[DEPTH 23]"]
        assert len(v.depth.values) == v.depth.stop_id - v.depth.first_id - 1


def test_depth_is_log_spaced_levels_of_the_counts():
    depth = Depth((32.0, 64.0, 128.0), position=1, first_id=5)
    assert depth.ids(np.array([1, 31, 32, 63, 64, 1e6])).tolist() == [6, 6, 7, 7, 8, 9]
    assert (depth.ids(None), depth.stop_id) == (5, 10)
    assert depth.values == pytest.approx([22.63, 45.25, 90.51, 181.02], abs=0.01)


@pytest.mark.parametrize(("encoding", "bins"), CASES)
def test_tables_say_gene_and_expression_of_every_token(encoding, bins):
    v = build(encoding, bins, phenotypes=LABELS, depth=True)
    t = v.tables()
    levels = np.array([1, 0, bins.n_bins])
    genes = np.arange(3)
    ids, positions = v.ids_of(genes, levels), v.first_gene_position + genes
    assert np.maximum(t.gene_of_id[ids], t.gene_of_position[positions]).tolist() == [0, 1, 2]
    np.testing.assert_allclose(t.value_of_id[ids] * t.value_of_position[positions], bins.centres[levels])
    assert v.levels_of(ids).tolist() == levels.tolist() and v.genes_at(ids, positions).tolist() == [0, 1, 2]
    control = ~v.is_gene_token(np.arange(v.n_tokens))
    assert not t.value_of_id[control].any()
    assert (t.gene_of_position[: v.first_gene_position] == -1).all() and t.gene_of_position[-1] == -1
    assert v.unit == ("counts" if bins.reads == "counts" else "log1p")
    assert ((v.group_start[positions] <= ids) & (ids < v.group_stop[positions])).all()
    assert v.token_text(int(ids[2]), int(positions[2])) == f"C3={bins.n_bins}"


def test_tables_of_ranks_fall_with_the_rank():
    v = build("rank", max_length=8)
    t, first = v.tables(), v.first_gene_position
    assert np.maximum(t.gene_of_id[[7, 5]], t.gene_of_position[[first, first + 1]]).tolist() == [2, 0]
    values = t.value_of_id[5] * t.value_of_position[v.gene_positions]
    assert (values > 0).all() and (np.diff(values) < 0).all()
    assert (v.unit, v.n_levels, v.n_positions, v.token_text(6, 3)) == ("order", 0, 8, "B2")
    assert t.value_of_id[v.mask_id] == 0 and t.gene_of_id[v.mask_id] == -1


def test_an_old_vocabulary_loads_with_the_same_fingerprint():
    old = {
        "format": 1, "encoding": "bins", "genes": ["A1", "B2"], "specials": {"[PAD]": 0, "[MASK]": 1, "[CLS]": 2, "[END]": 3, "[START]": 4},
        "phenotypes": [{"name": "sex", "values": ["f", "m"], "position": 1, "first_id": 6, "missing_id": 5}],
        "first_gene_id": 8, "first_gene_position": 3, "max_length": 6, "medians": None, "gene_shares": [0.5, 0.5], "name_map": None,
        "bins": {"edges": [0.1, 0.5], "zeros": "drop", "reads": "log1p", "target_sum": 10000.0, "per": "all", "gene_edges": None},
    }  # fmt: skip
    text = json.dumps(old, sort_keys=True, separators=(",", ":"))
    v = Vocabulary.from_json(text)
    assert v.to_json() == text and v.depth is None
    assert v.sha256 == "ca04a3353e7cd8463b6ff45979ee86f097df79aeba3d21a26fdd5e1358c14a45"


@pytest.mark.parametrize("layout", ["geneformer_v1", "geneformer_v2", "bionemo"])
def test_published_layouts_have_no_room_for_phenotypes_and_depth(layout):
    for arguments in ({"depth": True}, {"phenotypes": LABELS}):
        with pytest.raises(ScbinInputError, match="A03"):
            build("rank", layout=layout, **arguments)


def test_vocabularies_that_cannot_be():
    specials = {"[PAD]": 0, "[MASK]": 1}
    calls = {
        "A02": [lambda: build("squares")],
        "A06": [lambda: build("rank").phenotype("sex")],
        "V04": [
            lambda: build("bins"),
            lambda: build("rank", Bins.linear()),
            lambda: build("rank", medians=[1.0]),
            lambda: build("rank", max_length=2),
            lambda: build("rank", phenotypes={"sex": ["f", "f"]}),
            lambda: Vocabulary.build("rank", ["A", "A"]),
            lambda: Vocabulary.from_json('{"format": 2}'),
            lambda: Vocabulary.from_json("[]"),
            lambda: Vocabulary("rank", ("A",), specials, (), 1, 0, 5),
            lambda: Vocabulary("rank", ("A",), {"[PAD]": 0}, (), 1, 0, 5),
        ],
    }
    for code, wrong in calls.items():
        for call in wrong:
            with pytest.raises(ScbinInputError, match=code):
                call()


@pytest.mark.parametrize(("encoding", "bins"), [*CASES, ("rank", None)])
def test_hostile_json_is_refused_by_name_or_read(encoding, bins):
    v = build(encoding, bins, phenotypes=LABELS, depth=True, gene_shares=[0.5, 0.25, 0.25], name_map={"X": "A1"})
    fields = json.loads(v.to_json())
    inner = [(fields, name) for name in fields] + [(fields["phenotypes"][0], name) for name in fields["phenotypes"][0]]
    inner += [(part, name) for part in (fields["depth"], fields["bins"] or {}) for name in part]
    refused = 0
    for part, name in inner:
        kept = part[name]
        for junk in (None, -1, 0.5, 2**31, 10**30, "x", [], {}, [[1]], {"a": 1}, [None], ["\ud800"]):
            part[name] = junk
            try:
                assert Vocabulary.from_json(json.dumps(fields)).genes is not None
            except ScbinInputError as error:
                assert error.code == "V04"
                refused += 1
        part[name] = kept
    assert refused > 6 * len(inner)
    for text in ("", "[" * 100_000, "3"):
        with pytest.raises(ScbinInputError, match="V04"):
            Vocabulary.from_json(text)


def test_more_than_65_535_ids_need_32_bits():
    v = Vocabulary.build("gene_bins", [f"G{k}" for k in range(4000)], bins=Bins.linear())
    assert (v.n_tokens, v.dtype) == (4000 * 21 + 5, np.uint32)
    assert sparse.csr_matrix((1, v.n_positions), dtype=v.dtype).dtype == np.uint32
