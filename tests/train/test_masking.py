from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from scbin._errors import ScbinInputError
from scbin.tokens.bins import Bins
from scbin.tokens.tokens import MemoryTokens
from scbin.tokens.vocabulary import Vocabulary
from scbin.train.masking import mask_rows, masked_losses
from scbin.train.randomness import EVALUATION, held_out_cells
from scbin.train.settings import Masking

GENES = [f"G{i}" for i in range(60)]
ENCODINGS = ["bins", "binary", "rank", "gene_bins"]


def make(encoding="bins", zeros="drop", n_cells=400, n_bins=4, seed=0):
    """Random rows with two phenotypes, 40 % of the 60 genes expressed."""
    rng = np.random.default_rng(seed)
    bins = (
        None if encoding == "rank" else Bins(tuple(0.1 + np.arange(1 if encoding == "binary" else n_bins)), zeros=zeros)
    )
    v = Vocabulary.build(encoding, GENES, phenotypes={"sex": ["f", "m"], "tissue": ["lung", "gut", "skin"]}, bins=bins)
    rows = np.zeros((n_cells, v.n_positions), dtype=v.dtype)
    first = v.first_gene_position
    rows[:, 0], rows[:, first - 1], rows[:, -1] = (v.specials[name] for name in ("[CLS]", "[START]", "[END]"))
    for p in v.phenotypes:
        rows[:, p.position] = rng.integers(p.missing_id, p.stop_id, n_cells)
    if encoding == "rank":
        for row in rows:
            n = int(rng.integers(10, 40))
            row[first : first + n] = v.first_gene_id + rng.permutation(60)[:n]
            row[-1], row[first + n] = 0, v.specials["[END]"]
    else:
        level = rng.integers(1, v.n_levels, (n_cells, 60)) * (rng.random((n_cells, 60)) < 0.4)
        ids = v.group_start[v.gene_positions] + level
        rows[:, v.gene_positions] = ids if zeros == "keep" else np.where(level > 0, ids, 0)
    return csr_matrix(rows), v


def mask(rows, v, masking=None, seed=0, epoch=0, cells=None, **options):
    cells = np.arange(rows.shape[0]) if cells is None else cells
    pack, hidden = mask_rows(rows[cells], cells, v, masking or Masking(), seed=seed, epoch=epoch, **options)
    owner = pack.rows.numpy()
    return pack.input_ids.numpy(), pack.position_ids.numpy(), owner, hidden, pack


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_masks_are_a_function_of_seed_epoch_and_cell(encoding):
    rows, v = make(encoding)
    masking = Masking(phenotype_drop=0.1)
    state = np.random.get_state()[1].copy()
    ids, positions, owner, _, _ = mask(rows, v, masking, seed=3, epoch=1)
    for cell in np.random.default_rng(1).permutation(400)[:20]:
        alone, at, _, hidden, _ = mask(rows, v, masking, seed=3, epoch=1, cells=np.array([cell]))
        assert np.array_equal(ids[owner == cell], alone) and np.array_equal(positions[owner == cell], at)
        assert len(hidden.where)
    for other in ({"epoch": 2}, {"seed": 4}):
        again, *_ = mask(rows, v, masking, **{"seed": 3, "epoch": 1, **other})
        assert len(again) != len(ids) or not np.array_equal(again, ids)
    assert np.array_equal(state, np.random.get_state()[1])


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_rows_hold_what_was_there_and_the_labels_what_was_hidden(encoding):
    rows, v = make(encoding)
    ids, positions, owner, hidden, _ = mask(rows, v)
    labels = np.full(len(ids), -1)
    labels[hidden.where] = hidden.labels
    was = rows.toarray().astype(int)[owner, positions]
    untouched = labels < 0
    assert np.array_equal(ids[untouched], was[untouched])
    known = ~untouched & (was > 0)
    assert np.array_equal(labels[known], was[known])
    zeros = ~untouched & (was == 0)
    assert np.array_equal(labels[zeros], v.group_start[positions[zeros]])
    assert (ids[zeros] == v.mask_id).all()
    assert ((hidden.labels >= hidden.start) & (hidden.labels < hidden.stop)).all()
    assert (np.diff(hidden.loss) >= 0).all()
    # every token of the rows is still there, once, and no position twice in a row
    assert (~zeros).sum() == rows.nnz
    assert len(np.unique(owner * v.n_positions + positions)) == len(ids)


def test_fractions_of_masked_random_and_kept_tokens():
    rows, v = make("rank", n_cells=4000)
    ids, _, _, hidden, _ = mask(rows, v)
    gene = hidden.loss == 0
    shown = ids[hidden.where[gene]]
    assert gene.sum() / v.is_gene_token(rows.data).sum() == pytest.approx(0.15, abs=0.005)
    assert (shown == v.mask_id).mean() == pytest.approx(0.8, abs=0.015)
    assert (shown == hidden.labels[gene]).mean() == pytest.approx(0.1 + 0.1 / 60, abs=0.012)
    assert v.is_gene_token(shown[shown != v.mask_id]).all()
    sex = v.phenotype("sex")
    known = (rows[:, [sex.position]].toarray() >= sex.first_id).sum()
    assert (hidden.loss == 1).sum() / known == pytest.approx(0.5, abs=0.03)
    assert (hidden.labels[hidden.loss == 1] >= sex.first_id).all()


@pytest.mark.parametrize("swap", [0.0, 0.9])
@pytest.mark.parametrize("encoding", ["bins", "binary"])
def test_unexpressed_genes_make_up_their_fraction_of_the_labels(encoding, swap):
    rows, v = make(encoding, n_cells=3000)
    _, positions, owner, hidden, _ = mask(rows, v, Masking(zero_swap=swap))
    gene = hidden.loss == 0
    zero = hidden.labels[gene] == v.first_gene_id
    assert zero.mean() == pytest.approx(1 / v.n_levels, abs=0.02)
    at = hidden.where[gene]
    assert np.array_equal(rows.toarray()[owner[at], positions[at]] == 0, zero)
    allowed = v.gene_positions[:30]
    _, positions, _, hidden, _ = mask(rows, v, Masking(zero_swap=swap), zero_positions=allowed)
    at = hidden.where[hidden.labels == v.first_gene_id]
    assert set(positions[at]) == set(allowed)


def test_nonzero_ratio_hides_exact_numbers():
    rows, v = make("bins", zeros="keep")
    _, positions, owner, hidden, _ = mask(rows, v, Masking(0.1, nonzero_ratio=0.5, replacement=(1, 0, 0)))
    at = hidden.where[hidden.loss == 0]
    zero = hidden.labels[hidden.loss == 0] == v.first_gene_id
    assert set(np.bincount(owner[at][zero], minlength=400)) == {3}  # floor(0.5 * 6)
    assert set(np.bincount(owner[at][~zero], minlength=400)) == {3}
    assert np.unique(positions[at]).size == 60


@pytest.mark.parametrize("attend", [True, False])
def test_unattended_zeros_have_closed_gates(attend):
    rows, v = make("bins", zeros="keep", n_cells=50)
    ids, _, _, hidden, pack = mask(rows, v, Masking(attend_zeros=attend, replacement=(1, 0, 0)))
    if attend:
        assert pack.gates is None
        return
    labels = ids.copy()
    labels[hidden.where] = hidden.labels
    assert np.array_equal(pack.gates.numpy() < -1000, labels == v.first_gene_id)


def test_specials_are_masked_only_on_request():
    rows, v = make("rank")
    special = masked_losses(v).index("specials")
    *_, hidden, _ = mask(rows, v)
    assert not (hidden.loss == special).any()
    *_, hidden, _ = mask(rows, v, Masking(mask_specials=True, random_from="vocabulary"))
    labels = hidden.labels[hidden.loss == special]
    assert len(labels) / (3 * 400) == pytest.approx(0.15, abs=0.03)
    assert set(labels) == {2, 3, 4}


def test_dropped_phenotypes_leave_the_row():
    rows, v = make("bins")
    masking = Masking(phenotype_mask_prob=1.0, phenotype_drop=1.0, gene_mask_prob=0.0)
    ids, positions, _, hidden, _ = mask(rows, v, masking)
    sex = v.phenotype("sex")
    assert len(hidden.where) == 0 and (ids[positions == sex.position] == sex.missing_id).all()


def test_all_positions_can_be_scored():
    rows, v = make("gene_bins", zeros="keep")
    *_, hidden, _ = mask(rows, v, score_all=True)
    assert (hidden.loss == 0).sum() == 400 * 60


def test_truncated_rows_call_no_gene_unexpressed():
    rows, v = make("bins")
    v = Vocabulary.from_json(v.to_json().replace(f'"max_length":{v.max_length}', '"max_length":25'))
    full = np.diff(rows.indptr) >= 25
    *_, owner, hidden, _ = mask(rows, v, Masking(0.6))
    zero = hidden.where[hidden.labels == v.first_gene_id]
    assert 0 < full.sum() < 400 and len(zero) and not full[owner[zero]].any()


@pytest.mark.parametrize("mask_specials", [False, True])
def test_the_depth_of_a_cell_is_never_hidden(mask_specials):
    v = Vocabulary.build("bins", GENES, bins=Bins((1.0, 2.0), reads="counts"), depth=True)
    rows = np.zeros((50, v.n_positions), dtype=v.dtype)
    rows[:, v.depth.position], rows[:, v.gene_positions] = v.depth.first_id + 3, v.first_gene_id + 1
    masking = Masking(1.0, 1.0, mask_specials=mask_specials)
    ids, positions, _, hidden, _ = mask(csr_matrix(rows), v, masking)
    assert (ids[positions == v.depth.position] == v.depth.first_id + 3).all()
    assert (hidden.loss == 0).sum() == 50 * 60
    assert (ids[hidden.where] == v.mask_id).all()  # counts are never replaced by random ones


def test_order_of_an_epoch_and_held_out_cells():
    cells = np.array([5, 9, 2, 7])
    tokens = MemoryTokens(*make(n_cells=10))
    assert sorted(tokens.epoch_order(cells, 0, 0)) == [2, 5, 7, 9]
    assert np.array_equal(tokens.epoch_order(cells[::-1], 0, 3), tokens.epoch_order(cells, 0, 3))
    held_out = held_out_cells(10_000, 0.1, 0)
    assert held_out.mean() == pytest.approx(0.1, abs=0.01)
    assert np.array_equal(held_out[:50], held_out_cells(50, 0.1, 0))
    assert EVALUATION == -1


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        *(("A02", {name: "vocab"}) for name in ("random_from",)),
        *(("A02", {"replacement": value}) for value in ((0.5, 0.5), (2, -1, 0), (float("nan"), 0.5, 0.5))),
        ("A02", {"gene_mask_prob": float("nan")}),
        ("A02", {"nonzero_ratio": 1.5}),
        ("A01", {"mask_specials": "no"}),
        ("A01", {"attend_zeros": "seed"}),
        ("A01", {"gene_mask_prob": "0.1"}),
        ("A01", {"phenotype_mask_prob": None}),
        ("A01", {"nonzero_ratio": True}),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused(code, changes):
    with pytest.raises(ScbinInputError, match=next(iter(changes))) as caught:
        Masking(**changes)
    assert caught.value.code == code


@pytest.mark.parametrize(("zeros", "changes"), [("keep", {"zero_swap": 0.9}), ("drop", {"nonzero_ratio": 0.5})])
def test_rows_that_do_not_fit_the_masking(zeros, changes):
    rows, v = make(zeros=zeros, n_cells=3)
    with pytest.raises(ScbinInputError, match=next(iter(changes))):
        mask(rows, v, Masking(**changes))


def test_numbers_of_numpy_are_as_good_as_others():
    masking = Masking(np.float32(0.5), mask_specials=np.bool_(True), replacement=np.array([1, 0, 0]))
    assert masking == Masking(0.5, mask_specials=True, replacement=(1, 0, 0))
    assert json.loads(json.dumps(asdict(masking)))["replacement"] == [1.0, 0.0, 0.0]
