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
from scbin.io.dictionaries import geneformer_vocabulary
from scbin.nn.labels import gene_outputs, label_outputs
from scbin.nn.network import CellNetwork
from scbin.nn.run import embed
from scbin.nn.vector import PooledVector
from scbin.tokens.tokens import MemoryTokens

N_GENES, HIDDEN = 30, 32
GENES = [f"ENSG{k:011d}" for k in range(1, N_GENES + 1)]
SYMBOLS = [f"SYM{k}" for k in range(1, N_GENES + 1)]
PARTS = ("token_dictionary", "gene_median_dictionary", "ensembl_mapping_dict", "gene_name_id_dict")


def cells(names=GENES, n_cells=12, seed=0):
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rng.gamma(0.6, 2.0, (1, len(names))) * np.ones((n_cells, 1))).astype(np.float32)
    return ad.AnnData(csr_matrix(counts), var=pd.DataFrame(index=list(names)))


def tokenized(adata, model):
    scbin.pp.tokenize(adata, like=model)
    return MemoryTokens(adata.obsm["X_tokens"], model.vocabulary, adata.obs)


def embedding(tokens, model, pooling=None, layer=-1):
    network = model.network
    if pooling is not None:
        network = CellNetwork(network.backbone, PooledVector(model.vocabulary, HIDDEN, pooling, layer))
    return embed(network, tokens, device="cpu", precision="float32")


def write_dictionaries(folder, version, ending="", kind="pkl"):
    """Write the four dictionaries as Geneformer does, ids and medians as numbers of numpy."""
    folder.mkdir(parents=True, exist_ok=True)
    specials = ("<pad>", "<mask>") if version == 1 else ("<pad>", "<mask>", "<cls>", "<eos>")
    tokens = {name: k for k, name in enumerate((*specials, *GENES))}
    medians = dict(zip(GENES, np.random.default_rng(5).gamma(2, 1, N_GENES).tolist(), strict=True))
    symbols = dict(zip(SYMBOLS, GENES, strict=True))
    mapping = {gene: gene for gene in GENES} | ({} if version == 1 else symbols)
    for part, content in zip(PARTS, (tokens, medians, mapping, symbols), strict=True):
        if kind == "json":
            (folder / f"{part}{ending}.json").write_text(json.dumps(content))
            continue
        numbers = {k: v if type(v) is str else np.array(v)[()] for k, v in content.items()}
        (folder / f"{part}{ending}.pkl").write_bytes(pickle.dumps(numbers, protocol=4))


def geneformer_config(version, **changes):
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    sizes |= {"vocab_size": N_GENES + 2 * version, "max_position_embeddings": 24, "initializer_range": 0.2}
    dropout = {"hidden_dropout_prob": 0.02, "attention_probs_dropout_prob": 0.02}
    return BertConfig(**sizes, **dropout, hidden_act="relu", **changes)


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
    matrix = tokens.matrix
    ids, positions = np.zeros((2, tokens.n_cells, int(tokens.lengths.max())), dtype=np.int64)
    for k in range(tokens.n_cells):
        row = slice(matrix.indptr[k], matrix.indptr[k + 1])
        ids[k, : row.stop - row.start], positions[k, : row.stop - row.start] = matrix.data[row], matrix.indices[row]
    return torch.from_numpy(ids), torch.from_numpy(positions), torch.from_numpy((ids > 0).astype(np.int64))


def mean_over(hidden, chosen):
    return ((hidden * chosen[..., None]).sum(1) / chosen.sum(1, keepdim=True)).numpy()


def test_geneformer_gives_the_hidden_states_of_plain_transformers(geneformer, tmp_path):
    version, path, plain = geneformer
    model = Model.from_geneformer(path)
    tokens = tokenized(cells(), model)
    ids, positions, mask = padded(tokens)
    assert torch.equal(positions[0][mask[0] > 0], torch.arange(int(mask[0].sum())))
    with torch.no_grad():
        states = plain(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    is_gene = (ids >= (2 if version == 1 else 4)).float()
    for layer in (-1, -2, -3, 0):
        assert np.abs(embedding(tokens, model, "mean", layer) - mean_over(states[layer], is_gene)).max() < 1e-5
        if version == 2:
            assert np.abs(embedding(tokens, model, "cls", layer) - states[layer][:, 0].numpy()).max() < 1e-5
    own = mean_over(states[-2], is_gene) if version == 1 else states[-2][:, 0].numpy()
    assert np.abs(embedding(tokens, model) - own).max() < 1e-5
    by_symbol = tokenized(cells(SYMBOLS), model)
    assert (by_symbol.matrix != tokens.matrix).nnz == 0
    # saved as ours and opened by transformers
    bert = model.network.backbone.bert
    assert bert.config.attention_probs_dropout_prob == 0 and bert.config.hidden_dropout_prob == 0.02
    assert all(parameter.requires_grad for parameter in bert.parameters())
    assert "Geneformer" in repr(model) and "not at all" not in repr(model)
    model.save(tmp_path / "own")
    assert Model.load(tmp_path / "own").fingerprint == model.fingerprint
    again = BertForMaskedLM.from_pretrained(tmp_path / "own").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in plain.state_dict().items())


@pytest.mark.parametrize("place", [".", "../geneformer", "../geneformer/gene_dictionaries_30m", "../../geneformer"])
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
    write_dictionaries(package, 3 - version, "_gc95M")
    with pytest.raises(ScbinInputError, match=r"V05.*entries") as caught:
        Model.from_geneformer(tmp_path / "model", dictionaries=package)
    assert "dictionaries=" in str(caught.value) and "token_dictionary" in str(caught.value)
    write_dictionaries(package / "gene_dictionaries_30m", version)
    found = Model.from_geneformer(tmp_path / "model", dictionaries=str(package))
    assert found.vocabulary == Model.from_geneformer(path).vocabulary
    (package / "gene_dictionaries_30m" / "gene_median_dictionary.pkl").unlink()
    for folder in (package, tmp_path / "nowhere"):
        with pytest.raises(ScbinInputError, match="V05"):
            Model.from_geneformer(tmp_path / "model", dictionaries=folder)
    for file in path.glob("*dictionary.pkl"):
        shutil.copy(file, tmp_path / "model")
    with pytest.warns(ScbinInputWarning, match="V05"):  # without symbols
        assert Model.from_geneformer(tmp_path / "model").vocabulary.name_map is None


@pytest.mark.parametrize(("version", "corpus", "length"), [(1, "gc30M", 2048), (2, "gc95M", 4096)])
def test_with_the_published_dictionaries(shared, tmp_path, version, corpus, length):
    n_tokens = {1: 25_426, 2: 20_275}[version]
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=n_tokens, max_position_embeddings=length, **sizes)
    plain = build(BertForMaskedLM, config)
    plain.save_pretrained(tmp_path / "model")
    with pytest.raises(ScbinInputError, match=rf"Geneformer V{version}.*token_dictionary_gc"):
        Model.from_geneformer(tmp_path / "model")
    model = Model.from_geneformer(tmp_path / "model", dictionaries=shared / "geneformer")
    names = (f"{part}_{corpus}.json" for part in PARTS)
    assert model.vocabulary == geneformer_vocabulary(*(shared / "geneformer" / name for name in names))
    adata = ad.read_h5ad(shared / "data" / "pbmc3k_labelled.h5ad")[:3].copy()
    with warnings.catch_warnings(action="ignore"):  # some of its symbols stand twice
        tokens = tokenized(adata, model)
    ids, _, mask = padded(tokens)
    with torch.no_grad():
        states = plain.bert(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    expected = mean_over(states[-2], (ids >= 2).float()) if version == 1 else states[-2][:, 0].numpy()
    assert np.abs(embedding(tokens, model) - expected).max() < 1e-5


@pytest.mark.parametrize("kind", [BertForSequenceClassification, BertForTokenClassification], ids=["cells", "genes"])
def test_classifiers_bring_their_head(geneformer, tmp_path, kind):
    version, path, _ = geneformer
    plain = build(kind, geneformer_config(version, num_labels=3), seed=1)
    plain.save_pretrained(tmp_path / "model")
    arguments = {"dictionaries": path}
    unnamed = Model.from_geneformer(tmp_path / "model", **arguments)
    assert unnamed.network.labels.targets[0].classes == ("LABEL_0", "LABEL_1", "LABEL_2")
    arguments |= {"target": "disease", "class_names": ["healthy", "dilated", "hypertrophic"]}
    model = Model.from_geneformer(tmp_path / "model", **arguments)
    target = model.network.labels.targets[0]
    assert (target.name, list(target.classes)) == ("disease", arguments["class_names"])
    assert model.network.vector.layer == -1
    tokens = tokenized(cells(), model)
    ids, _, mask = padded(tokens)
    with torch.no_grad():
        logits = plain(input_ids=ids, attention_mask=mask).logits.numpy()
    options = {"device": "cpu", "precision": "float32"}
    if kind is BertForSequenceClassification:
        assert np.abs(label_outputs(model.network, tokens, **options) - logits).max() < 1e-5
    else:  # the mean over a gene's tokens
        first = model.vocabulary.first_gene_id
        ours = gene_outputs(model.network, tokens, **options)
        expected = [logits[ids.numpy() == first + gene].mean(axis=0) for gene in np.unique(ids[ids >= first]) - first]
        assert np.abs(ours[np.isfinite(ours[:, 0])] - expected).max() < 1e-5
    model.save(tmp_path / "own")
    assert Model.load(tmp_path / "own").fingerprint == model.fingerprint
    # there was no output layer in the file: what stands for it is drawn from no generator
    assert Model.from_geneformer(tmp_path / "model", **arguments).fingerprint == model.fingerprint


def test_names_in_the_configuration_are_taken(geneformer, tmp_path):
    version, path, _ = geneformer
    config = geneformer_config(version, id2label={0: "B", 1: "A"}, label2id={"B": 0, "A": 1})
    build(BertForSequenceClassification, config).save_pretrained(tmp_path / "model")
    found = Model.from_geneformer(tmp_path / "model", dictionaries=path).network.labels
    assert found.targets[0].classes == ("B", "A")
    for folder, names in ((tmp_path / "model", ["x"]), (tmp_path / "model", "BA"), (path, ["x"])):
        with pytest.raises(ScbinInputError, match="A02"):
            Model.from_geneformer(folder, dictionaries=path, class_names=names)


def change_tensors(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")


WORDS, BIAS, DECODER = "bert.embeddings.word_embeddings.weight", "cls.predictions.bias", "cls.predictions.decoder"
SPOILED = {
    "missing": ("M02", lambda t: t.pop(BIAS)),
    "cut": ("M02", lambda t: t.update({WORDS: t[WORDS][:-1]})),
    "head of one number": ("M02", lambda t: t.update({"classifier.weight": t[BIAS][:3].clone()})),
    "no config": ("M01", lambda path: (path / "config.json").unlink()),
    "only pickles": ("M01", lambda path: (path / "model.safetensors").unlink()),  # training_args.bin is left
    "link": ("M03", lambda p: (p / "config.json").unlink() or (p / "config.json").symlink_to("/etc/hostname")),
    "empty config": ("M02", lambda path: (path / "config.json").write_text("{}")),
}


@pytest.mark.parametrize("name", SPOILED)
def test_directories_that_do_not_fit(geneformer, tmp_path, name):
    path = shutil.copytree(geneformer[1], tmp_path / "model")
    code, spoil = SPOILED[name]
    if list(SPOILED).index(name) < 3:
        change_tensors(path, spoil)
    else:
        spoil(path)
    with pytest.raises(ScbinModelError, match=code):
        Model.from_geneformer(path)


def test_what_older_versions_stored_besides(geneformer, tmp_path):
    path = shutil.copytree(geneformer[1], tmp_path / "model")
    extra = {"bert.embeddings.position_ids": torch.arange(24)[None]}
    change_tensors(
        path, lambda t: t.update(extra | {f"{DECODER}.weight": t[WORDS].clone(), f"{DECODER}.bias": t[BIAS].clone()})
    )
    assert Model.from_geneformer(path).fingerprint == Model.from_geneformer(geneformer[1]).fingerprint


SIZES = {"cell_type": 161, "development_stage": 14, "disease": 31, "sex": 2, "tissue": 45}
VALUES = {name: [f"{name.replace('_', ' ')} no {k}" for k in range(n)] for name, n in SIZES.items()}
FEW = 20  # genes of the small models; their vocabularies have the published size


def labelled(names):
    adata = cells(names, seed=3)
    rng = np.random.default_rng(4)
    for column, values in VALUES.items():
        adata.obs[column] = rng.choice(values, adata.n_obs)
    return adata


def logged(adata):
    counts = adata.X.toarray()
    return np.log1p(counts / counts.sum(1, keepdims=True) * 1e4)[:, :FEW]


@pytest.fixture(scope="module")
def polygene(tmp_path_factory):
    path = tmp_path_factory.mktemp("polygene") / "model"
    config = geneformer_config(1, pad_token_id=0)
    config.vocab_size, config.max_position_embeddings, config.hidden_act = 284, FEW + 8, "gelu"
    plain = build(BertForMaskedLM, config)
    plain.save_pretrained(path)
    order = ("tissue", "cell_type", "development_stage", "sex", "disease")
    words = ["[PAD]", "[MASK]", "[SEP]", "[CLS]", "[UNK]", "[START]", "[END]", *(f"[no_{k}]" for k in range(5))]
    words += [f"[unused{k}]" for k in range(9)]
    words += [f"[{value.replace(' ', '_')}]" for name in order for value in VALUES[name]]
    (path / "vocab.txt").write_text("\n".join([*words, *(str(k) for k in range(10))]))
    return path, plain


def test_polygene_gives_the_hidden_states_of_plain_transformers(polygene):
    path, plain = polygene
    model = Model.from_polygene(path, SYMBOLS[:FEW])
    adata = labelled(SYMBOLS)
    tokens = tokenized(adata, model)
    # its own way to write a cell, zeros and all, bin 0 attended to by nobody
    bins = np.digitize(logged(adata), np.concatenate([[0], np.linspace(0.1, 9.0, 9)])) - 1
    first = {"sex": 241, "tissue": 21, "cell_type": 66, "development_stage": 227, "disease": 243}
    ids = np.full((adata.n_obs, FEW + 8), 0)
    ids[:, 0], ids[:, 6], ids[:, -1] = 3, 5, 6
    for at, (name, start) in enumerate(first.items(), start=1):
        ids[:, at] = [start + VALUES[name].index(value) for value in adata.obs[name]]
    ids[:, 7:-1] = 274 + bins
    mask = np.ones_like(ids)
    mask[:, 7:-1] = bins > 0
    assert (tokens.matrix.toarray() == ids * mask).all()
    with torch.no_grad():
        inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        states = plain(**inputs, output_hidden_states=True).hidden_states
    is_gene = torch.from_numpy(mask.copy())
    is_gene[:, :7], is_gene[:, -1] = 0, 0
    for layer in (-1, -2, 0):
        assert np.abs(embedding(tokens, model, "cls", layer) - states[layer][:, 0].numpy()).max() < 1e-5
        assert np.abs(embedding(tokens, model, "mean", layer) - mean_over(states[layer], is_gene)).max() < 1e-5
    assert (model.network.vector.pooling, model.network.vector.layer) == ("mean", -1)
    missing = adata[:1].copy()
    missing.obs["tissue"] = "unknown"
    assert tokenized(missing, model).matrix[0, 2] == 8


def test_polygene_by_lists_and_what_it_refuses(polygene, tmp_path):
    path, genes = polygene[0], SYMBOLS[:FEW]
    model = Model.from_polygene(path, genes)
    assert model.vocabulary.phenotype("tissue").values == tuple(VALUES["tissue"])
    assert Model.from_polygene(path, genes, phenotypes=VALUES).fingerprint == model.fingerprint
    model.save(tmp_path / "own")
    assert Model.load(tmp_path / "own").fingerprint == model.fingerprint
    bare = shutil.copytree(path, tmp_path / "model")
    (bare / "vocab.txt").unlink()
    assert Model.from_polygene(bare, genes, phenotypes=VALUES).fingerprint == model.fingerprint
    with pytest.raises(ScbinInputError, match="A03"):
        Model.from_polygene(bare, genes)
    for names in (genes[:-1], "SYM1"):
        with pytest.raises(ScbinInputError, match="A0[12]"):
            Model.from_polygene(path, names)
    changes = ({"tissue": ["lung"]}, {"tissue": "lung"}, {"batch": ["a"]}, {"sex": []})
    for values, edges in (*((VALUES | change, None) for change in changes), (VALUES, [0.1, 1.0])):
        with pytest.raises(ScbinInputError, match="A0[123]"):
            Model.from_polygene(path, genes, phenotypes=values, edges=edges)
    for content in (b"\xff\xfe", b"[CLS]\n" * 300):
        (bare / "vocab.txt").write_bytes(content)
        with pytest.raises(ScbinModelError, match="M02"):
            Model.from_polygene(bare, genes)


class PerturbGene:
    """PerturbGene's network through plain DistilBERT: token types instead of positions, nothing tied."""

    def __init__(self, n_bins, n_labels=None):
        sizes = {"vocab_size": 257 + n_bins, "dim": HIDDEN, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
        config = DistilBertConfig(**sizes, initializer_range=0.2, pad_token_id=3, max_position_embeddings=64)
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
        bins = np.digitize(logged(adata), edges)
        starts = dict(zip(SIZES, np.cumsum([4, *SIZES.values()]).tolist(), strict=False))
        rows = []
        for k in range(adata.n_obs):
            row = [(0, 0)]
            row += [(starts[n] + VALUES[n].index(adata.obs[n].iloc[k]), list(SIZES).index(n) + 1) for n in listed]
            row += [(257 + b, 6 + gene) for gene, b in enumerate(bins[k]) if b > 0]
            rows.append([*row, (1, 0)])
        ids = np.full((len(rows), max(map(len, rows))), 3)
        types, mask = np.zeros((2, *ids.shape), dtype=np.int64)
        for k, row in enumerate(rows):
            ids[k, : len(row)], types[k, : len(row)] = np.array(row).T
            mask[k, : len(row)] = 1
        ids, types, mask = map(torch.from_numpy, (ids, types, mask))
        with torch.no_grad():
            words = self.net.distilbert.embeddings.word_embeddings(ids)
            out = self.net(inputs_embeds=words + self.types(types), attention_mask=mask, output_hidden_states=True)
        return out, types, mask


@pytest.mark.parametrize(("n_bins", "edges"), [(2, [0.1]), (11, np.linspace(0.1, 9.0, 10))], ids=["one", "ten"])
def test_perturbgene_gives_the_hidden_states_of_plain_distilbert(tmp_path, n_bins, edges):
    theirs = PerturbGene(n_bins)
    model = Model.from_perturbgene(theirs.save(tmp_path / "model"), SYMBOLS[:FEW], phenotypes=VALUES)
    assert model.vocabulary.n_tokens == 257 + n_bins
    model.save(tmp_path / "own")
    plain = BertForMaskedLM.from_pretrained(tmp_path / "own").eval()
    assert not plain.config.tie_word_embeddings and Model.load(tmp_path / "own").fingerprint == model.fingerprint
    for listed in (list(SIZES), ["cell_type", "sex"]):
        adata = labelled(SYMBOLS)
        out, types, mask = theirs.run(adata, edges, listed)
        for name in set(SIZES) - set(listed):
            adata.obs[name] = "unknown"
        tokens = tokenized(adata, model)
        states, is_gene = out.hidden_states, ((types >= 6) & (mask > 0)).float()
        for layer in (-1, -2, 0):
            assert np.abs(embedding(tokens, model, "cls", layer) - states[layer][:, 0].numpy()).max() < 1e-5
            assert np.abs(embedding(tokens, model, "mean", layer) - mean_over(states[layer], is_gene)).max() < 1e-5
        own_ids, own_positions, own_mask = padded(tokens)
        assert torch.equal(own_mask.sum(1), mask.sum(1))
        with torch.no_grad():
            logits = plain(input_ids=own_ids, position_ids=own_positions, attention_mask=own_mask).logits
        order = [3, 2, 0, 1, *range(4, 257 + n_bins)]  # their ids in the order of ours
        assert (logits[own_ids >= 257] - out.logits[..., order][is_gene > 0]).abs().max() < 2e-5


def test_perturbgene_classifiers_and_what_it_refuses(tmp_path):
    theirs = PerturbGene(2, n_labels=4)
    path, genes = theirs.save(tmp_path / "model"), SYMBOLS[:FEW]
    arguments = {"phenotypes": VALUES, "target": "age", "class_names": ["a", "b", "c", "d"]}
    model = Model.from_perturbgene(path, genes, **arguments)
    assert model.network.labels.targets[0].classes == tuple("abcd")
    tokens = tokenized(labelled(SYMBOLS), model)
    first = torch.from_numpy(embedding(tokens, model, "cls", -1))
    with torch.no_grad():
        expected = theirs.out(torch.relu(theirs.dense(first))).numpy()
    assert np.abs(label_outputs(model.network, tokens, device="cpu", precision="float32") - expected).max() < 1e-5
    model.save(tmp_path / "own")
    assert Model.load(tmp_path / "own").fingerprint == model.fingerprint
    wrong = [{"class_names": ["a"]}, {"phenotypes": VALUES | {"sex": ["one"]}}, {"edges": [0.1, 0.2]}]
    for names, options in (
        *((genes, each) for each in wrong),
        (genes, {"phenotypes": {"sex": ["x"]}}),
        (genes[:-1], {}),
    ):
        with pytest.raises(ScbinInputError, match="A02"):
            Model.from_perturbgene(path, names, **(arguments | options))
    listed = {name: {f"[{v.replace(' ', '_')}]": k for k, v in enumerate(values)} for name, values in VALUES.items()}
    again = Model.from_perturbgene(path, genes, phenotypes=listed)
    assert again.vocabulary == model.vocabulary
