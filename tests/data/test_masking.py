from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from scbin._errors import ScbinInputError
from scbin.data.masking import EVALUATION, MaskingScheme, epoch_order, mask_rows, split_pack, task_names
from scbin.encoding.bins import Bins
from scbin.encoding.vocabulary import Vocabulary

GENES = [f"G{i}" for i in range(60)]


def make(encoding="bins", zeros="drop", n_cells=400, n_bins=4, seed=0):
    rng = np.random.default_rng(seed)
    bins = (
        None if encoding == "rank" else Bins(tuple(0.1 + np.arange(1 if encoding == "binary" else n_bins)), zeros=zeros)
    )
    v = Vocabulary.build(encoding, GENES, phenotypes={"sex": ["f", "m"], "tissue": ["lung", "gut", "skin"]}, bins=bins)
    rows = np.zeros((n_cells, v.n_positions), dtype=v.dtype)
    rows[:, 0], rows[:, v.first_gene_position - 1], rows[:, -1] = (
        v.specials["[CLS]"],
        v.specials["[START]"],
        v.specials["[END]"],
    )
    for p in v.phenotypes:
        rows[:, p.position] = rng.integers(p.missing_id, p.stop_id, n_cells)
    if encoding == "rank":
        for row in rows:
            n = int(rng.integers(10, 40))
            row[v.first_gene_position : v.first_gene_position + n] = v.first_gene_id + rng.permutation(60)[:n]
            row[-1] = 0
            row[v.first_gene_position + n] = v.specials["[END]"]
    else:
        level = rng.integers(1, v.n_levels, (n_cells, 60)) * (rng.random((n_cells, 60)) < 0.4)
        ids = v.group_start[v.gene_positions] + level
        rows[:, v.gene_positions] = ids if zeros == "keep" else np.where(level > 0, ids, 0)
    return csr_matrix(rows), v


@pytest.mark.parametrize("encoding", ["bins", "binary", "rank", "gene_bins"])
def test_masks_are_a_function_of_seed_epoch_and_cell(encoding):
    tokens, v = make(encoding)
    scheme = MaskingScheme(phenotype_drop=0.1)
    pack, targets = mask_rows(tokens, np.arange(400), v, scheme, seed=3, epoch=1, views=2)
    order = np.random.default_rng(1).permutation(400)
    for cell in order[:20]:
        alone, alone_targets = mask_rows(tokens, np.array([cell]), v, scheme, seed=3, epoch=1, views=2)
        for view in range(2):
            a, b = pack.cu_seqlens[2 * cell + view : 2 * cell + view + 2]
            c, d = alone.cu_seqlens[view : view + 2]
            assert np.array_equal(pack.input_ids[a:b], alone.input_ids[c:d])
            assert np.array_equal(pack.position_ids[a:b], alone.position_ids[c:d])
    other, _ = mask_rows(tokens, np.arange(400), v, scheme, seed=3, epoch=2, views=2)
    assert pack.n_tokens != other.n_tokens or not np.array_equal(pack.input_ids, other.input_ids)
    assert len(alone_targets)


@pytest.mark.parametrize("encoding", ["bins", "binary", "rank", "gene_bins"])
def test_the_rows_hold_what_was_there_and_the_labels_what_was_hidden(encoding):
    tokens, v = make(encoding)
    pack, targets = mask_rows(tokens, np.arange(400), v, MaskingScheme(), seed=0, epoch=0)
    truth = tokens.toarray().astype(int)
    row = np.repeat(pack.cells, pack.lengths)
    labels = np.full(pack.n_tokens, -1)
    labels[targets.where] = targets.labels
    was = truth[row, pack.position_ids]
    untouched = labels < 0
    assert np.array_equal(pack.input_ids[untouched], was[untouched])
    hidden = ~untouched & (was > 0)
    assert np.array_equal(labels[hidden], was[hidden])
    zeros = ~untouched & (was == 0)
    assert np.array_equal(labels[zeros], v.group_start[pack.position_ids[zeros]])
    assert (pack.input_ids[zeros] == v.mask_id).all()
    assert ((targets.labels >= targets.start) & (targets.labels < targets.stop)).all()
    # every token of the matrix is still there, once, and no position twice in a row
    assert (~zeros).sum() == tokens.nnz
    assert len(np.unique(row * v.n_positions + pack.position_ids)) == pack.n_tokens


def test_shares_of_masked_random_and_kept_tokens():
    tokens, v = make("rank", n_cells=4000)
    pack, targets = mask_rows(tokens, np.arange(4000), v, MaskingScheme(phenotype_mask_prob=0.5), seed=0, epoch=0)
    gene = targets.task == 0
    seen = pack.input_ids[targets.where[gene]]
    n_genes = v.is_gene_token(tokens.data).sum()
    assert gene.sum() / n_genes == pytest.approx(0.15, abs=0.005)
    assert (seen == v.mask_id).mean() == pytest.approx(0.8, abs=0.015)
    assert (seen == targets.labels[gene]).mean() == pytest.approx(0.1 + 0.1 / 60, abs=0.012)
    assert v.is_gene_token(seen[seen != v.mask_id]).all()
    sex = v.phenotype("sex")
    known = (tokens[:, [sex.position]].toarray() >= sex.first_id).sum()
    assert (targets.task == 1).sum() / known == pytest.approx(0.5, abs=0.03)
    assert (targets.labels[targets.task == 1] >= sex.first_id).all()


@pytest.mark.parametrize(("encoding", "swap"), [("bins", 0.0), ("binary", 0.0), ("bins", 0.9), ("binary", 0.9)])
def test_unexpressed_genes_make_up_their_share_of_the_answers(encoding, swap):
    tokens, v = make(encoding, n_cells=3000)
    pack, targets = mask_rows(tokens, np.arange(3000), v, MaskingScheme(zero_swap=swap), seed=0, epoch=0)
    gene = targets.task == 0
    zero = targets.labels[gene] == v.first_gene_id
    assert zero.mean() == pytest.approx(1 / v.n_levels, abs=0.02)
    row = np.repeat(pack.cells, pack.lengths)[targets.where[gene]]
    was = tokens.toarray()[row, pack.position_ids[targets.where[gene]]]
    assert np.array_equal(was == 0, zero)


def test_views_deal_the_genes_and_share_the_rest():
    tokens, v = make("bins")
    pack, _ = mask_rows(tokens, np.arange(400), v, MaskingScheme(0, 0, zero_targets=0), seed=0, epoch=0, views=2)
    gene = pack.position_ids >= v.first_gene_position
    gene &= pack.position_ids < v.n_positions - 1
    assert gene.sum() == v.is_gene_token(tokens.data).sum()
    assert (~gene).sum() == 2 * (~v.is_gene_token(tokens.data)).sum()
    halves = np.add.reduceat(gene, pack.cu_seqlens[:-1])
    assert halves.reshape(-1, 2).mean(0) == pytest.approx(halves.mean(), rel=0.05)


def test_nonzero_ratio_hides_exact_numbers():
    tokens, v = make("bins", zeros="keep")
    scheme = MaskingScheme(0.1, nonzero_ratio=0.5, replacement=(1, 0, 0))
    pack, targets = mask_rows(tokens, np.arange(400), v, scheme, seed=0, epoch=0)
    gene = targets.task == 0
    row = np.repeat(np.arange(400), pack.lengths)[targets.where[gene]]
    zero = targets.labels[gene] == v.first_gene_id
    assert set(np.bincount(row[zero], minlength=400)) == {3}  # floor(0.5 * 6)
    assert set(np.bincount(row[~zero], minlength=400)) == {3}
    assert np.unique(pack.position_ids[targets.where[gene]]).size == 60


@pytest.mark.parametrize("attend", ["all", "masked", "seed"])
def test_unattended_zeros_stand_behind_the_attended_tokens(attend):
    tokens, v = make("bins", zeros="keep", n_cells=50)
    scheme = MaskingScheme(attend_zeros=attend, replacement=(1, 0, 0))
    pack, targets = mask_rows(tokens, np.arange(50), v, scheme, seed=0, epoch=0)
    if attend == "all":
        assert pack.key_lengths is None
        return
    key = np.arange(pack.n_tokens) - np.repeat(pack.cu_seqlens[:-1], pack.lengths) < np.repeat(
        pack.key_lengths, pack.lengths
    )
    labels = pack.input_ids.copy()
    labels[targets.where] = targets.labels
    zero = labels == v.first_gene_id
    hidden = np.zeros(pack.n_tokens, dtype=bool)
    hidden[targets.where] = True
    assert np.array_equal(key, ~zero if attend == "seed" else ~zero | hidden)


def test_specials_are_masked_only_on_request():
    tokens, v = make("rank")
    _, targets = mask_rows(tokens, np.arange(400), v, MaskingScheme(), seed=0, epoch=0)
    special = len(task_names(v)) - 1
    assert not (targets.task == special).any()
    scheme = MaskingScheme(mask_specials=True, random_from="vocabulary")
    _, targets = mask_rows(tokens, np.arange(400), v, scheme, seed=0, epoch=0)
    hidden = targets.labels[targets.task == special]
    assert len(hidden) / (3 * 400) == pytest.approx(0.15, abs=0.03)
    assert set(hidden) == {2, 3, 4}


def test_dropped_phenotypes_leave_or_become_padding():
    tokens, v = make("bins")
    kwargs = {"phenotype_mask_prob": 1.0, "phenotype_drop": 1.0, "gene_mask_prob": 0.0}
    pack, targets = mask_rows(tokens, np.arange(400), v, MaskingScheme(**kwargs), seed=0, epoch=0)
    sex = v.phenotype("sex")
    assert len(targets) == 0
    assert (pack.input_ids[pack.position_ids == sex.position] == sex.missing_id).all()
    pack, _ = mask_rows(tokens, np.arange(400), v, MaskingScheme(**kwargs, phenotype_drop_as="pad"), seed=0, epoch=0)
    assert pack.n_tokens == tokens.nnz and (pack.input_ids == 0).any()


def test_chosen_positions_are_hidden_exactly():
    tokens, v = make("bins")
    where = (1, v.first_gene_position + 5)
    pack, targets = mask_rows(tokens, np.arange(400), v, MaskingScheme(chosen=where), seed=0, epoch=0)
    assert (targets.task == 0).sum() == 400
    assert (pack.input_ids[targets.where] == v.mask_id).all()
    truth = tokens.toarray()[:, where[1]].astype(int)
    assert np.array_equal(targets.labels[targets.task == 0], np.where(truth, truth, v.first_gene_id))


def test_all_positions_can_be_scored():
    tokens, v = make("gene_bins", zeros="keep")
    _, targets = mask_rows(tokens, np.arange(400), v, MaskingScheme(loss_positions="all"), seed=0, epoch=0)
    assert (targets.task == 0).sum() == 400 * 60


def test_truncated_rows_do_not_call_cut_genes_unexpressed():
    tokens, v = make("bins")
    v = Vocabulary.from_json(v.to_json().replace(f'"max_length":{v.max_length}', '"max_length":20'))
    cut = tokens.tolil()
    for i in range(cut.shape[0]):
        for position in cut.rows[i][19:-1]:
            cut[i, position] = 0
    cut = cut.tocsr()
    pack, targets = mask_rows(cut, np.arange(400), v, MaskingScheme(zero_targets=3), seed=0, epoch=0)
    zero = targets.where[targets.labels == v.first_gene_id]
    row = np.repeat(np.arange(400), pack.lengths)[zero]
    last = np.array([max(p for p in r if p < v.n_positions - 1) for r in cut.tolil().rows])
    full = np.diff(cut.indptr) >= 20
    assert full.any() and (pack.position_ids[zero] <= last[row])[full[row]].all()


def test_splitting_a_pack_keeps_every_row_and_target():
    tokens, v = make("bins")
    pack, targets = mask_rows(tokens, np.arange(100), v, MaskingScheme(), seed=0, epoch=EVALUATION, views=2)
    parts = split_pack(pack, targets, 300)
    assert sorted(np.concatenate([rows for *_, rows in parts])) == list(range(200))
    assert sum(len(t) for _, t, _ in parts) == len(targets)
    for part, part_targets, rows in parts:
        assert part.n_tokens <= 300
        assert np.array_equal(part.cells, pack.cells[rows])
        assert (np.diff(part_targets.task) >= 0).all()
        own = part.input_ids[part_targets.where]
        group = (own >= part_targets.start) & (own < part_targets.stop)
        assert (group | (own == v.mask_id)).all()


def test_order_of_an_epoch():
    cells = np.array([5, 9, 2, 7])
    assert sorted(epoch_order(cells, 0, 0)) == [2, 5, 7, 9]
    assert np.array_equal(epoch_order(cells[::-1], 0, 3), epoch_order(cells, 0, 3))


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("A02", {"random_from": "vocab"}),
        ("A02", {"phenotype_drop_as": "remove"}),
        ("A02", {"zero_swap_pool": "absnt"}),
        ("A02", {"attend_zeros": "mask"}),
        ("A02", {"loss_positions": None}),
        ("A01", {"mask_specials": "no"}),
        ("A01", {"gene_mask_prob": "0.1"}),
        ("A01", {"phenotype_mask_prob": None}),
        ("A01", {"zero_targets": "1"}),
        ("A01", {"nonzero_ratio": True}),
        ("T06", {"gene_mask_prob": float("nan")}),
        ("T06", {"nonzero_ratio": 1.5}),
        ("T06", {"zero_targets": -1}),
        ("T07", {"replacement": (0.5, 0.5)}),
        ("T07", {"replacement": (2, -1, 0)}),
        ("T07", {"replacement": "all"}),
        ("T07", {"replacement": 1.0}),
        ("T07", {"replacement": (float("nan"), 0.5, 0.5)}),
        ("T07", {"chosen": (-1,)}),
        ("T07", {"chosen": (0.5,)}),
        ("T07", {"chosen": 4}),
        ("T07", {"chosen": None}),
    ],
)
def test_what_cannot_be_meant_is_refused(code, changes):
    with pytest.raises(ScbinInputError, match=next(iter(changes))) as caught:
        MaskingScheme(**changes)
    assert caught.value.code == code


def test_numbers_of_numpy_are_as_good_as_others():
    scheme = MaskingScheme(
        np.float32(0.5), mask_specials=np.bool_(True), replacement=np.array([1, 0, 0]), chosen=np.array([4, 7])
    )
    assert scheme == MaskingScheme(0.5, mask_specials=True, replacement=(1, 0, 0), chosen=(4, 7))
    assert json.loads(json.dumps(asdict(scheme)))["chosen"] == [4, 7]
