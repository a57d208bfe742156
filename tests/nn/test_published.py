"""Published layouts: what plain transformers computes from the files is what scbin computes from them."""

from __future__ import annotations

import json
import pickle
import shutil
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.sparse import csr_matrix
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    DistilBertConfig,
    DistilBertForMaskedLM,
)

import scbin
from scbin import Model
from scbin._errors import ScbinInputError, ScbinInputWarning, ScbinModelError

N_GENES, HIDDEN = 30, 32
GENES = [f"ENSG{k:011d}" for k in range(1, N_GENES + 1)]
SYMBOLS = [f"SYM{k}" for k in range(1, N_GENES + 1)]
QUIET = {"device": "cpu", "progress": False}
PARTS = ("token_dictionary", "gene_median_dictionary", "ensembl_mapping_dict", "gene_name_id_dict")


def cells(names=GENES, n_cells=12, seed=0):
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rng.gamma(0.6, 2.0, (1, len(names))) * np.ones((n_cells, 1))).astype(np.float32)
    return ad.AnnData(csr_matrix(counts), var=pd.DataFrame(index=list(names)))


def write_dictionaries(folder, version, ending="", kind="pkl"):
    """Write the four dictionaries as Geneformer does, ids and medians as numbers of numpy."""
    folder.mkdir(parents=True, exist_ok=True)
    specials = ("<pad>", "<mask>") if version == 1 else ("<pad>", "<mask>", "<cls>", "<eos>")
    tokens = {name: k for k, name in enumerate((*specials, *GENES))}
    medians = dict(zip(GENES, np.random.default_rng(5).gamma(2, 1, N_GENES).tolist(), strict=True))
    mapping = {gene: gene for gene in GENES} | ({} if version == 1 else dict(zip(SYMBOLS, GENES, strict=True)))
    contents = (tokens, medians, mapping, dict(zip(SYMBOLS, GENES, strict=True)))
    for part, content in zip(PARTS, contents, strict=True):
        if kind == "json":
            (folder / f"{part}{ending}.json").write_text(json.dumps(content))
            continue
        numbers = {k: v if type(v) is str else np.array(v)[()] for k, v in content.items()}
        (folder / f"{part}{ending}.pkl").write_bytes(pickle.dumps(numbers, protocol=4))
    return folder


def geneformer_config(version, **changes):
    return BertConfig(
        vocab_size=N_GENES + (2 if version == 1 else 4),
        hidden_size=HIDDEN,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        hidden_act="relu",
        hidden_dropout_prob=0.02,
        attention_probs_dropout_prob=0.02,
        max_position_embeddings=24,
        initializer_range=0.2,
        **changes,
    )


def build(kind, config, seed=0):
    torch.manual_seed(seed)
    return kind(config).eval()


@pytest.fixture(scope="module", params=[1, 2], ids=["V1", "V2"])
def geneformer(request, tmp_path_factory):
    """A network in the layout of a version, saved by plain transformers, with its dictionaries in the model's folder."""
    path = tmp_path_factory.mktemp("geneformer") / "model"
    plain = build(BertForMaskedLM, geneformer_config(request.param))
    plain.save_pretrained(path)
    write_dictionaries(path, request.param)
    (path / "training_args.bin").write_bytes(b"\x80\x04never opened")
    (path / "modeling.py").write_text("raise SystemExit")
    return request.param, path, plain


def padded(tokens):
    """Return ids, positions and mask (cells, longest) of token rows, as a padded batch has them."""
    longest = int(np.diff(tokens.indptr).max())
    ids, positions = np.zeros((2, tokens.shape[0], longest), dtype=np.int64)
    for k in range(tokens.shape[0]):
        row = slice(tokens.indptr[k], tokens.indptr[k + 1])
        ids[k, : row.stop - row.start], positions[k, : row.stop - row.start] = tokens.data[row], tokens.indices[row]
    return torch.from_numpy(ids), torch.from_numpy(positions), torch.from_numpy((ids > 0).astype(np.int64))


def mean_over(hidden, chosen):
    return ((hidden * chosen[..., None]).sum(1) / chosen.sum(1, keepdim=True)).numpy()


def embedding(adata, model, **arguments):
    return scbin.tl.embed(adata, model, **QUIET, **arguments, copy=True).obsm["X_scbin"]


# ---- Geneformer ------------------------------------------------------------------------------------------------------


def test_geneformer_gives_the_hidden_states_of_plain_transformers(geneformer):
    version, path, plain = geneformer
    model = Model.from_geneformer(path)
    adata = cells()
    scbin.pp.tokenize(adata, like=model)
    ids, positions, mask = padded(adata.obsm["X_tokens"])
    assert torch.equal(positions[0][mask[0] > 0], torch.arange(int(mask[0].sum())))
    with torch.no_grad():
        states = plain(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    is_gene = (ids >= (2 if version == 1 else 4)).float()
    for layer in (-1, -2, -3, 0):
        expected = mean_over(states[layer], is_gene)
        assert np.abs(embedding(adata, model, pooling="mean", layer=layer) - expected).max() < 1e-5
        if version == 2:
            expected = states[layer][:, 0].numpy()
            assert np.abs(embedding(adata, model, pooling="cls", layer=layer) - expected).max() < 1e-5
    assert (model.readout.pooling, model.readout.layer) == ("mean" if version == 1 else "cls", -2)
    own = embedding(adata, model)
    expected = mean_over(states[-2], is_gene) if version == 1 else states[-2][:, 0].numpy()
    assert np.abs(own - expected).max() < 1e-5


def test_symbols_and_ids_are_the_same_cells(geneformer):
    _, path, _ = geneformer
    model = Model.from_geneformer(path)
    by_id, by_symbol = cells(), cells(SYMBOLS)
    for adata in (by_id, by_symbol):
        scbin.pp.tokenize(adata, like=model)
    assert (by_id.obsm["X_tokens"] != by_symbol.obsm["X_tokens"]).nnz == 0


def test_what_came_in_is_saved_as_ours_and_opened_by_transformers(geneformer, tmp_path):
    version, path, plain = geneformer
    model = Model.from_geneformer(path, layer=-1, pooling="mean")
    assert model.config.attention_probs_dropout_prob == 0 and model.config.hidden_dropout_prob == 0.02
    assert "Geneformer" in repr(model) and "not at all" not in repr(model)
    model.save(tmp_path / "own")
    assert Model.load(tmp_path / "own").fingerprint == model.fingerprint
    again = BertForMaskedLM.from_pretrained(tmp_path / "own")
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


def test_it_can_be_trained_further(geneformer):
    _, path, _ = geneformer
    model = Model.from_geneformer(path)
    assert all(parameter.requires_grad for parameter in model.bert.parameters())
    assert not any(tensor.is_meta for tensor in [*model.bert.parameters(), *model.bert.buffers()])


@pytest.mark.parametrize(
    "place", [".", "geneformer", "../geneformer", "../geneformer/gene_dictionaries_30m", "../../geneformer"]
)
@pytest.mark.parametrize("kind", ["pkl", "json"])
def test_where_dictionaries_are_found(geneformer, tmp_path, place, kind):
    version, path, _ = geneformer
    model = tmp_path / "repository" / "fine_tuned" / "model"
    shutil.copytree(path, model, ignore=shutil.ignore_patterns("*dict*"))
    write_dictionaries((model / place).resolve(), version, "_gc30M", kind)
    assert Model.from_geneformer(model).vocabulary == Model.from_geneformer(path).vocabulary


def test_dictionaries_of_their_own_folder_and_of_several_versions(geneformer, tmp_path):
    version, path, _ = geneformer
    shutil.copytree(path, tmp_path / "model", ignore=shutil.ignore_patterns("*dict*"))
    package = tmp_path / "package"
    write_dictionaries(package, 3 - version, "_other")
    with pytest.raises(ScbinInputError, match=r"G13.*entries") as caught:
        Model.from_geneformer(tmp_path / "model", dictionaries=package)
    assert "dictionaries=" in str(caught.value) and "token_dictionary" in str(caught.value)
    write_dictionaries(package / "gene_dictionaries_30m", version, "_this")
    found = Model.from_geneformer(tmp_path / "model", dictionaries=str(package))
    assert found.vocabulary == Model.from_geneformer(path).vocabulary
    (package / "gene_dictionaries_30m" / "gene_median_dictionary_this.pkl").unlink()
    with pytest.raises(ScbinInputError, match="G14"):
        Model.from_geneformer(tmp_path / "model", dictionaries=package)
    with pytest.raises(ScbinInputError, match="G12"):
        Model.from_geneformer(tmp_path / "model", dictionaries=tmp_path / "nowhere")


def test_without_symbols_one_is_told(geneformer, tmp_path):
    version, path, _ = geneformer
    shutil.copytree(path, tmp_path / "model", ignore=shutil.ignore_patterns("ensembl*", "gene_name*"))
    with pytest.warns(ScbinInputWarning, match="G16"):
        assert Model.from_geneformer(tmp_path / "model").vocabulary.name_map is None


@pytest.mark.parametrize(("n_tokens", "version"), [(25_426, "V1"), (20_275, "V2")])
def test_the_version_is_known_by_the_number_of_tokens(tmp_path, n_tokens, version):
    config = BertConfig(
        vocab_size=n_tokens, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    build(BertForMaskedLM, config).save_pretrained(tmp_path / "model")
    with pytest.raises(ScbinInputError, match="G13") as caught:
        Model.from_geneformer(tmp_path / "model")
    assert f"Geneformer {version}" in str(caught.value)
    assert ("gene_dictionaries_30m" in str(caught.value)) == (version == "V1")


@pytest.mark.parametrize(("version", "corpus", "length"), [(1, "gc30M", 2048), (2, "gc95M", 4096)])
def test_with_the_published_dictionaries(shared, tmp_path, version, corpus, length):
    n_tokens = {1: 25_426, 2: 20_275}[version]
    config = BertConfig(
        vocab_size=n_tokens, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    config.max_position_embeddings = length
    plain = build(BertForMaskedLM, config)
    plain.save_pretrained(tmp_path / "model")
    model = Model.from_geneformer(tmp_path / "model", dictionaries=shared / "geneformer")
    names = (f"{part}_{corpus}.json" for part in PARTS)
    assert model.vocabulary == scbin.Vocabulary.from_geneformer(*(shared / "geneformer" / name for name in names))
    adata = ad.read_h5ad(shared / "data" / "pbmc3k_labelled.h5ad")[:8].copy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of its symbols stand twice
        scbin.pp.tokenize(adata, like=model)
    ids, _, mask = padded(adata.obsm["X_tokens"])
    with torch.no_grad():
        states = plain(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    expected = mean_over(states[-2], (ids >= 2).float()) if version == 1 else states[-2][:, 0].numpy()
    assert np.abs(embedding(adata, model) - expected).max() < 1e-5


# ---- its classifiers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [BertForSequenceClassification, BertForTokenClassification], ids=["cells", "genes"])
def test_classifiers_bring_their_head(geneformer, tmp_path, kind):
    version, path, _ = geneformer
    plain = build(kind, geneformer_config(version, num_labels=3), seed=1)
    plain.save_pretrained(tmp_path / "model")
    arguments = {"dictionaries": path}
    with pytest.warns(ScbinInputWarning, match="M38"):
        unnamed = Model.from_geneformer(tmp_path / "model", **arguments)
    assert unnamed.head.targets[0].classes == ("LABEL_0", "LABEL_1", "LABEL_2")
    names = ["healthy", "dilated", "hypertrophic"]
    model = Model.from_geneformer(tmp_path / "model", **arguments, target="disease", class_names=names)
    assert model.head.targets[0].name == "disease" and model.head.targets[0].classes == tuple(names)
    assert model.readout.layer == -1
    with pytest.raises(ScbinInputError, match="M65"):
        Model.from_geneformer(tmp_path / "model", **arguments, layer=-2)
    adata = cells()
    scbin.pp.tokenize(adata, like=model)
    ids, _, mask = padded(adata.obsm["X_tokens"])
    with torch.no_grad():
        out = plain(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        last = out.hidden_states[-1]
        if kind is BertForTokenClassification:
            ours = model.head.of_genes(last)
        else:
            ours = model.head.output(torch.tanh(model.head.dense(last[:, 0])))
    assert (ours - out.logits).abs().max() < 1e-5
    head = load_file(tmp_path / "model" / "model.safetensors")
    assert torch.equal(model.head.output.weight, head["classifier.weight"])
    model.save(tmp_path / "own")
    assert Model.load(tmp_path / "own").fingerprint == model.fingerprint
    # there was no output layer in the file: what stands for it is drawn from no generator
    again = Model.from_geneformer(tmp_path / "model", **arguments, target="disease", class_names=names)
    assert again.fingerprint == model.fingerprint


def test_names_in_the_configuration_are_taken(geneformer, tmp_path):
    version, path, _ = geneformer
    config = geneformer_config(version, id2label={0: "B", 1: "A"}, label2id={"B": 0, "A": 1})
    build(BertForSequenceClassification, config).save_pretrained(tmp_path / "model")
    assert Model.from_geneformer(tmp_path / "model", dictionaries=path).head.targets[0].classes == ("B", "A")
    for names in (["x"], "BA"):
        with pytest.raises(ScbinInputError, match="M37"):
            Model.from_geneformer(tmp_path / "model", dictionaries=path, class_names=names)
    with pytest.raises(ScbinInputError, match="M37"):
        Model.from_geneformer(path, class_names=["x"])


# ---- what is wrong with a directory ----------------------------------------------------------------------------------


def change_tensors(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")


WORDS = "bert.embeddings.word_embeddings.weight"
BIAS = "cls.predictions.bias"
DECODER = "cls.predictions.decoder"


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("M12", lambda t: t.update(other=t.pop(WORDS))),
        ("M12", lambda t: t.update({f"model.{name}": t.pop(name) for name in list(t)})),
        ("M12", lambda t: t.pop(BIAS)),
        ("M33", lambda t: t.update({WORDS: t[WORDS][:-1]})),
        ("M15", lambda t: t[WORDS].view(-1)[5:6].fill_(float("nan"))),
        ("M36", lambda t: t.update({f"{DECODER}.weight": t[WORDS] + 1})),
        ("M13", lambda t: t.update({WORDS: t[WORDS].double()})),
    ],
    ids=["renamed", "all renamed", "missing", "cut", "nan", "untied", "float64"],
)
def test_tensors_that_do_not_fit(geneformer, tmp_path, code, change):
    _, path, _ = geneformer
    shutil.copytree(path, tmp_path / "model")
    change_tensors(tmp_path / "model", change)
    with pytest.raises(ScbinModelError, match=code):
        Model.from_geneformer(tmp_path / "model")


def test_what_older_versions_stored_besides(geneformer, tmp_path):
    _, path, _ = geneformer
    shutil.copytree(path, tmp_path / "model")
    extra = {"bert.embeddings.position_ids": torch.arange(24)[None]}
    change_tensors(
        tmp_path / "model",
        lambda t: t.update(extra | {f"{DECODER}.weight": t[WORDS].clone(), f"{DECODER}.bias": t[BIAS].clone()}),
    )
    assert Model.from_geneformer(tmp_path / "model").fingerprint == Model.from_geneformer(path).fingerprint


@pytest.mark.parametrize(
    ("code", "spoil"),
    [
        ("M03", shutil.rmtree),
        ("M04", lambda path: (path / "config.json").unlink()),
        ("M31", lambda path: (path / "model.safetensors").unlink()),  # training_args.bin is left
        ("M07", lambda path: (path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")),
        ("M30", lambda path: (path / "config.json").unlink() or (path / "config.json").symlink_to("/etc/hostname")),
        ("M08", lambda path: (path / "config.json").write_text("{")),
        ("M10", lambda path: (path / "config.json").write_text("{}")),
        ("M34", lambda path: edit_config(path, vocab_size=2**20, hidden_size=8192, intermediate_size=8192)),
        ("M11", lambda path: edit_config(path, vocab_size=10**8)),
        ("M13", lambda path: (path / "model.safetensors").write_bytes(b"\x80\x04" * 600)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_directories_that_are_none(geneformer, tmp_path, code, spoil):
    _, path, _ = geneformer
    shutil.copytree(path, tmp_path / "model")
    spoil(tmp_path / "model")
    with pytest.raises(ScbinModelError, match=code):
        Model.from_geneformer(tmp_path / "model")


def edit_config(path, **changes):
    content = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(content | changes))


def test_layers_and_poolings_that_it_does_not_have(geneformer):
    version, path, _ = geneformer
    for layer in (9, -5, True):
        with pytest.raises(ScbinInputError, match="T14"):
            Model.from_geneformer(path, layer=layer)
    if version == 1:
        with pytest.raises(ScbinInputError, match="T16"):
            Model.from_geneformer(path, pooling="cls")


# ---- layouts with a position per gene --------------------------------------------------------------------------------

SIZES = {"cell_type": 161, "development_stage": 14, "disease": 31, "sex": 2, "tissue": 45}
VALUES = {name: [f"{name.replace('_', ' ')} no {k}" for k in range(n)] for name, n in SIZES.items()}
FEW = 20  # genes of the small models; their vocabularies have the published size


def labelled(names):
    adata = cells(names, seed=3)
    rng = np.random.default_rng(4)
    for column, values in VALUES.items():
        adata.obs[column] = rng.choice(values, adata.n_obs)
    return adata


def polygene_text():
    """The lines of a vocab.txt as Polygene has them."""
    order = ("tissue", "cell_type", "development_stage", "sex", "disease")
    words = ["[PAD]", "[MASK]", "[SEP]", "[CLS]", "[UNK]", "[START]", "[END]", *(f"[no_{k}]" for k in range(5))]
    words += [f"[unused{k}]" for k in range(9)]
    words += [f"[{value.replace(' ', '_')}]" for name in order for value in VALUES[name]]
    return "\n".join([*words, *(str(k) for k in range(10))])


@pytest.fixture(scope="module")
def polygene(tmp_path_factory):
    path = tmp_path_factory.mktemp("polygene") / "model"
    config = geneformer_config(1, pad_token_id=0)
    config.vocab_size, config.max_position_embeddings, config.hidden_act = 284, FEW + 8, "gelu"
    plain = build(BertForMaskedLM, config)
    plain.save_pretrained(path)
    (path / "vocab.txt").write_text(polygene_text())
    return path, plain


def test_polygene_gives_the_hidden_states_of_plain_transformers(polygene):
    path, plain = polygene
    genes = SYMBOLS[:FEW]
    model = Model.from_polygene(path, genes)
    adata = labelled(SYMBOLS)
    scbin.pp.tokenize(adata, like=model)
    # its own way to write a cell, zeros and all, bin 0 attended to by nobody
    counts = adata.X.toarray()
    logged = np.log1p(counts / counts.sum(1, keepdims=True) * 1e4)[:, :FEW]
    edges = np.concatenate([[0], np.linspace(0.1, 9.0, 9)])
    bins = np.digitize(logged, edges) - 1
    first = {"sex": 241, "tissue": 21, "cell_type": 66, "development_stage": 227, "disease": 243}
    ids = np.full((adata.n_obs, FEW + 8), 0)
    ids[:, 0], ids[:, 6], ids[:, -1] = 3, 5, 6
    for at, (name, start) in enumerate(first.items(), start=1):
        ids[:, at] = [start + VALUES[name].index(value) for value in adata.obs[name]]
    ids[:, 7:-1] = 274 + bins
    mask = np.ones_like(ids)
    mask[:, 7:-1] = bins > 0
    with torch.no_grad():
        out = plain(
            input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), output_hidden_states=True
        ).hidden_states
    for k in range(adata.n_obs):
        row = adata.obsm["X_tokens"][k]
        assert np.array_equal(row.indices, np.flatnonzero(mask[k])) and np.array_equal(row.data, ids[k][mask[k] > 0])
    is_gene = torch.from_numpy(mask.copy())
    is_gene[:, :7], is_gene[:, -1] = 0, 0
    for layer in (-1, -2, 0):
        shown = {"layer": layer, "phenotypes": "show"}
        assert np.abs(embedding(adata, model, pooling="cls", **shown) - out[layer][:, 0].numpy()).max() < 1e-5
        assert np.abs(embedding(adata, model, pooling="mean", **shown) - mean_over(out[layer], is_gene)).max() < 1e-5
    assert model.readout == scbin.model.Readout("mean", -1)
    missing = adata[:1].copy()
    missing.obs["tissue"] = "unknown"
    scbin.pp.tokenize(missing, like=model)
    assert missing.obsm["X_tokens"][0, 2] == 8


def test_polygene_by_lists_and_what_it_refuses(polygene, tmp_path):
    path, _ = polygene
    genes = SYMBOLS[:FEW]
    model = Model.from_polygene(path, genes)
    assert model.vocabulary.phenotype("tissue").values == tuple(VALUES["tissue"])
    given = Model.from_polygene(path, genes, phenotypes=VALUES)
    assert given.fingerprint == model.fingerprint
    model.save(tmp_path / "own")
    assert Model.load(tmp_path / "own").fingerprint == model.fingerprint
    shutil.copytree(path, tmp_path / "model")
    (tmp_path / "model" / "vocab.txt").unlink()
    assert Model.from_polygene(tmp_path / "model", genes, phenotypes=VALUES).fingerprint == model.fingerprint
    for code, arguments in (
        ("M61", {}),
        ("M61", {"phenotypes": VALUES | {"tissue": ["lung"]}}),
        ("M61", {"phenotypes": VALUES | {"tissue": "lung"}}),
        ("M61", {"phenotypes": VALUES | {"batch": ["a"]}}),
        ("M60", {"phenotypes": VALUES, "edges": [0.1, 1.0]}),
    ):
        with pytest.raises(ScbinInputError, match=code):
            Model.from_polygene(tmp_path / "model", genes, **arguments)
    for wrong in (genes[:-1], [*genes, "more"], "SYM1"):
        with pytest.raises(ScbinInputError, match="M39"):
            Model.from_polygene(path, wrong)
    with pytest.raises(ScbinInputError, match="M61"):
        Model.from_polygene(path, genes, phenotypes=VALUES | {"sex": VALUES["sex"][::-1]})
    (tmp_path / "model" / "vocab.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ScbinModelError, match="M62"):
        Model.from_polygene(tmp_path / "model", genes)
    (tmp_path / "model" / "vocab.txt").write_text("[CLS]\n" * 300)
    with pytest.raises(ScbinModelError, match="M62"):
        Model.from_polygene(tmp_path / "model", genes)


class PerturbGene:
    """PerturbGene's network through plain DistilBERT: token types instead of positions, nothing tied."""

    def __init__(self, n_bins, n_labels=None):
        config = DistilBertConfig(
            vocab_size=257 + n_bins,
            dim=HIDDEN,
            n_layers=2,
            n_heads=4,
            hidden_dim=64,
            initializer_range=0.2,
            pad_token_id=3,
            max_position_embeddings=64,
        )
        config.tie_word_embeddings = False
        self.config, self.net = config, build(DistilBertForMaskedLM, config, seed=2)
        torch.manual_seed(7)
        self.types = torch.nn.Embedding(FEW + 6, HIDDEN).requires_grad_(False)
        self.dense, self.out = torch.nn.Linear(HIDDEN, HIDDEN), torch.nn.Linear(HIDDEN, n_labels or 1)
        self.n_labels = n_labels
        with torch.no_grad():
            self.net.distilbert.embeddings.position_embeddings.weight.zero_()
            self.net.vocab_projector.weight.add_(torch.randn(257 + n_bins, HIDDEN))
            self.net.vocab_projector.bias.add_(torch.randn(257 + n_bins))

    def save(self, path):
        path.mkdir()
        content = self.config.to_dict() | {"type_vocab_size": FEW + 6, "tie_word_embeddings": True}
        (path / "config.json").write_text(json.dumps(content))
        tensors = {k: v.clone() for k, v in self.net.state_dict().items() if "position_embeddings" not in k}
        tensors["distilbert.embeddings.token_type_embeddings.weight"] = self.types.weight.clone()
        if self.n_labels:
            tensors = {k: v for k, v in tensors.items() if not k.startswith("vocab")}
            tensors |= {f"pre_classifier.{k}": v for k, v in self.dense.state_dict().items()}
            tensors |= {f"classifier.{k}": v for k, v in self.out.state_dict().items()}
        save_file(tensors, path / "model.safetensors")
        (path / "tokenizer.pkl").write_bytes(b"\x80\x04never opened")
        return path

    def run(self, adata, edges, listed):
        """Return logits and hidden states for cells written in PerturbGene's way, with ids, types and mask."""
        counts = adata.X.toarray()
        logged = np.log1p(counts / counts.sum(1, keepdims=True) * 1e4)[:, :FEW]
        bins = np.digitize(logged, edges)
        starts = dict(zip(SIZES, np.cumsum([4, *SIZES.values()]).tolist(), strict=False))
        rows = []
        for k in range(adata.n_obs):
            row = [(0, 0)]
            row += [(starts[n] + VALUES[n].index(adata.obs[n].iloc[k]), list(SIZES).index(n) + 1) for n in listed]
            row += [(257 + b, 6 + gene) for gene, b in enumerate(bins[k]) if b > 0]
            rows.append([*row, (1, 0)])
        longest = max(map(len, rows))
        ids = np.full((len(rows), longest), 3)
        types, mask = np.zeros((2, *ids.shape), dtype=np.int64)
        for k, row in enumerate(rows):
            ids[k, : len(row)], types[k, : len(row)] = np.array(row).T
            mask[k, : len(row)] = 1
        ids, types, mask = map(torch.from_numpy, (ids, types, mask))
        with torch.no_grad():
            words = self.net.distilbert.embeddings.word_embeddings(ids)
            out = self.net(inputs_embeds=words + self.types(types), attention_mask=mask, output_hidden_states=True)
        return out, ids, types, mask


@pytest.mark.parametrize(("n_bins", "edges"), [(2, [0.1]), (11, np.linspace(0.1, 9.0, 10))], ids=["one", "ten"])
def test_perturbgene_gives_the_hidden_states_of_plain_distilbert(tmp_path, n_bins, edges):
    theirs = PerturbGene(n_bins)
    model = Model.from_perturbgene(theirs.save(tmp_path / "model"), SYMBOLS[:FEW], phenotypes=VALUES)
    assert model.vocabulary.n_tokens == 257 + n_bins and not model.config.tie_word_embeddings
    model.save(tmp_path / "own")
    plain = BertForMaskedLM.from_pretrained(tmp_path / "own").eval()
    assert Model.load(tmp_path / "own").fingerprint == model.fingerprint
    for listed in (list(SIZES), ["cell_type", "sex"]):
        adata = labelled(SYMBOLS)
        out, ids, types, mask = theirs.run(adata, edges, listed)
        for name in set(SIZES) - set(listed):
            adata.obs[name] = "unknown"
        scbin.pp.tokenize(adata, like=model)
        states, is_gene = out.hidden_states, ((types >= 6) & (mask > 0)).float()
        for layer in (-1, -2, 0):
            shown = {"layer": layer, "phenotypes": "show"}
            assert np.abs(embedding(adata, model, pooling="cls", **shown) - states[layer][:, 0].numpy()).max() < 1e-5
            expected = mean_over(states[layer], is_gene)
            assert np.abs(embedding(adata, model, pooling="mean", **shown) - expected).max() < 1e-5
        own_ids, own_positions, own_mask = padded(adata.obsm["X_tokens"])
        assert torch.equal(own_mask.sum(1), mask.sum(1))
        with torch.no_grad():
            logits = plain(input_ids=own_ids, position_ids=own_positions, attention_mask=own_mask).logits
        order = [3, 2, 0, 1, *range(4, 257 + n_bins)]  # their ids in the order of ours
        genes = own_ids >= 257
        assert (logits[genes] - out.logits[..., order][is_gene > 0]).abs().max() < 2e-5


def test_perturbgene_classifiers_and_what_it_refuses(tmp_path):
    theirs = PerturbGene(2, n_labels=4)
    path, genes = theirs.save(tmp_path / "model"), SYMBOLS[:FEW]
    names = ["a", "b", "c", "d"]
    arguments = {"phenotypes": VALUES, "target": "age", "class_names": names}
    model = Model.from_perturbgene(path, genes, **arguments)
    assert model.head.targets[0].classes == tuple(names) and model.head.plan.design == "mlp"
    vectors = torch.randn(5, HIDDEN)
    with torch.no_grad():
        ours = model.head.output(torch.relu(model.head.dense(vectors)))
        assert (ours - theirs.out(torch.relu(theirs.dense(vectors)))).abs().max() < 1e-6
    model.save(tmp_path / "own")
    assert Model.load(tmp_path / "own").fingerprint == model.fingerprint
    for code, wrong in (
        ("M37", arguments | {"class_names": ["a"]}),
        ("M60", arguments | {"phenotypes": VALUES | {"sex": ["one"]}}),
        ("M60", arguments | {"edges": [0.1, 0.2]}),
        ("M61", arguments | {"phenotypes": {"sex": ["one"]}}),
    ):
        with pytest.raises(ScbinInputError, match=code):
            Model.from_perturbgene(path, genes, **wrong)
    with pytest.raises(ScbinInputError, match="M39"):
        Model.from_perturbgene(path, genes[:-1], phenotypes=VALUES)
    listed = {name: {f"[{v.replace(' ', '_')}]": k for k, v in enumerate(values)} for name, values in VALUES.items()}
    with pytest.warns(ScbinInputWarning, match="M38"):
        again = Model.from_perturbgene(path, genes, phenotypes=listed)
    assert again.vocabulary == model.vocabulary


# ---- the hub ---------------------------------------------------------------------------------------------------------


def test_the_hub_is_asked_only_for_an_id_with_a_revision(trained, tmp_path, monkeypatch):
    trained[1].save(tmp_path / "download")
    (tmp_path / "download" / ".gitattributes").write_text("*.safetensors filter=lfs")
    asked = []

    def snapshot_download(repo_id, *, revision, allow_patterns):
        asked.append((repo_id, revision))
        assert set(allow_patterns) >= {"config.json", "model.safetensors", "scbin.json", "manifest.json"}
        assert not any("*" in name or name.endswith((".py", ".bin")) for name in allow_patterns)
        return str(tmp_path / "download")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    assert Model.load("owner/name", revision="0123abc").fingerprint == trained[1].fingerprint
    assert asked == [("owner/name", "0123abc")]
    with pytest.raises(ScbinModelError, match=r"M03.*revision="):
        Model.load("owner/name")
    (tmp_path / "owner" / "name").mkdir(parents=True)
    with pytest.raises(ScbinModelError, match="M04"):
        Model.load("owner/name")
    for path, code in (("owner/name", "M63"), ("a/b/c", "M63"), ("../name", "M63"), (tmp_path / "x" / "y", "M63")):
        with pytest.raises(ScbinInputError, match=code):
            Model.load(path, revision="main")
    assert len(asked) == 1

    def fail(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ScbinModelError, match=r"M64.*no route"):
        Model.load("other/name", revision="main")
