"""The model: a network, the vocabulary it reads and how it was trained."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import pandas as pd
from huggingface_hub import HfApi

from scbin import _keys
from scbin._arguments import checked, instances
from scbin._errors import ScbinInputError
from scbin._session import versions
from scbin.io.directory import describe_parts, local_directory, own_tensors, parts_of, read_model, write_model
from scbin.io.published import read_geneformer, read_perturbgene, read_polygene

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anndata import AnnData

    from scbin.nn.counts import CountHead
    from scbin.nn.network import CellNetwork
    from scbin.tokens.vocabulary import Vocabulary


@dataclass(eq=False, repr=False)
class Model:
    """A network on cells, ready to embed, predict and be trained further.

    Made by :func:`scbin.tl.pretrain` or :meth:`Model.load`, not by hand. A model knows the names of its genes and phenotypes:
    new data are matched to it by name (`scbin.pp.tokenize(adata, like=model)`).

    Parameters
    ----------
    network
        All learned parts: backbone, cell vector and heads, on the CPU.
    vocabulary
        What it reads: genes, phenotypes and their tokens.
    training
        A record of its training, as plain values by name.
    history
        The losses during training, one row per step.

    Examples
    --------
    >>> import scbin, tempfile, pathlib
    >>> adata = scbin.datasets.pbmc68k_reduced()[:100].copy()
    >>> scbin.pp.tokenize(adata)
    >>> model = scbin.tl.pretrain(adata, preset="tiny", max_steps=2, progress=False)
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "my_model"
    >>> model.save(path)
    >>> scbin.Model.load(path).fingerprint == model.fingerprint
    True
    """

    network: CellNetwork
    vocabulary: Vocabulary
    training: Mapping[str, Any] = field(default_factory=dict)
    history: pd.DataFrame = field(default_factory=pd.DataFrame)

    def __post_init__(self) -> None:
        # what JSON can hold, before anyone relies on it: the same values before saving and after loading
        text = json.dumps(dict(self.training), default=lambda value: getattr(value, "tolist", value.__str__)())
        self.training = json.loads(text, parse_constant=lambda _: None)  # it has no NaN

    @property
    def config(self) -> dict[str, Any]:
        """Kind and configuration of each part of the network, as plain values."""
        return describe_parts(self.network)

    @property
    def n_parameters(self) -> int:
        """Number of trainable numbers in the network, those that two places share counted once."""
        return sum(parameter.numel() for parameter in self.network.parameters())

    @property
    def fingerprint(self) -> str:
        """Sha256 over vocabulary, configuration and weights: equal models have equal fingerprints."""
        digest = hashlib.sha256(f"{self.vocabulary.sha256} {json.dumps(self.config, sort_keys=True)}".encode())
        for place, part in parts_of(self.network).items():
            for name, tensor in own_tensors(part).items():
                digest.update(f"{place}.{name}".encode())
                digest.update(tensor.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    @checked
    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the model into a directory: weights, configuration, vocabulary, history and a model card.

        The weights are stored as safetensors; those of a BERT in the layout of Hugging Face, so that plain
        `transformers.BertForMaskedLM.from_pretrained` opens the directory too. It appears whole or not at all, and what was there
        before is untouched by an error. Of a long history about 20,000 rows are kept, with those of the validations among them.

        Parameters
        ----------
        path
            The directory to write.
        overwrite
            Replace a model that is there already.
        """
        content = (self.network, self.vocabulary, dict(self.training), self.history)
        write_model(Path(path), content, self._facts() | {"saved with": versions()}, overwrite=overwrite)

    @checked
    def push_to_hub(self, repo_id: str, *, private: bool = True, api: Any = None) -> str:
        """Upload the model to the Hugging Face hub, and return the hash of the commit: the `revision` to load it by.

        What is uploaded is what :meth:`save` writes. Log in first: `hf auth login`.

        Parameters
        ----------
        repo_id
            `"owner/name"`. The repository is made if it does not exist.
        private
            Whether a new repository is visible to its owner only.
        api
            A `huggingface_hub.HfApi` with another server or token.
        """
        api = HfApi() if api is None else api
        with TemporaryDirectory() as folder:
            self.save(Path(folder) / "model")
            api.create_repo(repo_id, private=private, exist_ok=True)
            sent = api.upload_folder(repo_id=repo_id, folder_path=Path(folder) / "model", commit_message="scbin model")
        return sent.oid

    @classmethod
    @checked
    def load(cls, path: str | os.PathLike[str], *, revision: str | None = None) -> Model:
        """Read a model from the directory that :meth:`save` wrote, or from the Hugging Face hub.

        The directory is treated as untrusted: no code in it is run, every number is checked, and a file that
        was damaged, exchanged or added is an error that names it.

        Parameters
        ----------
        path
            The directory, or the `"owner/name"` of a model on the hub.
        revision
            Which state of a model on the hub: the hash of a commit, best, or a branch. Without it nothing is fetched: the main branch
            is looked for in the cache.
        """
        return cls(*read_model(local_directory(path, revision)))

    @classmethod
    @checked
    def from_geneformer(
        cls,
        path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        dictionaries: str | os.PathLike[str] | None = None,
        target: str = "label",
        class_names: Sequence[str] | None = None,
    ) -> Model:
        """Read a Geneformer model as it was published, V1 or V2, pretrained or fine-tuned to classify cells or genes.

        After it, `scbin.pp.tokenize(adata, like=model)` ranks the genes as Geneformer does, by symbol or Ensembl id, and every
        tool works. Its weights need to be `model.safetensors`; its dictionaries are read without running anything in them.
        The cell vector is Geneformer's: the last layer but one at `<cls>` (V2) or the mean over genes (V1); `scbin.tl.embed` takes
        others.

        Parameters
        ----------
        path
            The folder of the model, of which `config.json` and `model.safetensors` are read; or `"owner/name/folder"` on the
            hub, such as `"ctheodoris/Geneformer/Geneformer-V2-104M"`, with `revision`.
        revision
            Which state of the repository on the hub to fetch: the hash of a commit, best, or a branch.
        dictionaries
            The folder of Geneformer's dictionaries (`token_dictionary_gc104M.pkl` and so on, also as JSON): `geneformer` in its
            package. Default: the model's own folder, or `geneformer` beside it as in a copy of Geneformer's repository.
        target
            Name of what a classifier predicts.
        class_names
            Its classes in the order of training, where the model only knows them as LABEL_0, LABEL_1 ...
        """
        folder = None if dictionaries is None else Path(dictionaries)
        model = Path(path) if revision is None else local_directory(path, revision, geneformer=True)
        return cls(*read_geneformer(model, folder, target, class_names))

    @classmethod
    @checked
    def from_polygene(
        cls,
        path: str | os.PathLike[str],
        genes: Sequence[str],
        *,
        phenotypes: Mapping[str, Sequence[str]] | None = None,
        edges: Sequence[float] | None = None,
    ) -> Model:
        """Read a Polygene model: bins of expression, a position for each of its genes, five phenotypes as tokens.

        Parameters
        ----------
        path
            The folder of the model: `config.json`, `model.safetensors` and, if it is there, `vocab.txt`.
        genes
            The genes in the order of the training; Polygene does not store their names.
        phenotypes
            Values of sex, tissue, cell_type, age and disease in the order of their tokens. Default: from `vocab.txt`, with spaces
            for its underscores.
        edges
            Lower edges of the bins above zero, where they are not the published ones (even from 0.1 to 9).
        """
        return cls(*read_polygene(Path(path), genes, phenotypes, edges))

    @classmethod
    @checked
    def from_perturbgene(
        cls,
        path: str | os.PathLike[str],
        genes: Sequence[str],
        *,
        phenotypes: Mapping[str, Sequence[str]],
        edges: Sequence[float] | None = None,
        target: str = "label",
        class_names: Sequence[str] | None = None,
    ) -> Model:
        """Read a PerturbGene model: a DistilBERT whose token types are genes, pretrained or fine-tuned to classify cells.

        Its tensors get BERT's names and its ids scbin's order; what it computes stays the same. A cell without a label has no
        token in that place, as in PerturbGene. Its pickled tokenizer is never opened.

        Parameters
        ----------
        path
            The folder of the model: `config.json` and `model.safetensors`.
        genes
            The genes in the order of the training.
        phenotypes
            Values of cell_type, development_stage (or age), disease, sex and tissue in the order of their tokens.
        edges
            Edges of the bins, where they are not the published ones (0.1, or ten even ones from 0.1 to 9).
        target
            Name of what a classifier predicts.
        class_names
            Its classes in the order of training.
        """
        return cls(*read_perturbgene(Path(path), genes, phenotypes, edges, target, class_names))

    def _facts(self) -> dict[str, str]:
        """Return what a user asks first about a model, by name."""
        vocabulary, network, training = self.vocabulary, self.network, self.training
        body, vector, kinds = network.backbone, network.vector, {k: part["kind"] for k, part in self.config.items()}
        facts = {
            "encoding": f"{vocabulary.encoding}, {len(vocabulary.genes):,} genes",
            "phenotypes": ", ".join(f"{p.name} ({len(p.values)} values)" for p in vocabulary.phenotypes) or "none",
            "network": f"{kinds['backbone']}, {body.n_layers} layers, hidden size {body.hidden_size}, "
            f"{self.n_parameters:,} parameters",
            "cell vector": f"{vector.size} numbers, {getattr(vector, 'pooling', kinds['vector'])}, layer {vector.layer}",
            "trained": f"on {training['n_cells']:,} cells, {training.get('steps', 0):,} steps"
            if "n_cells" in training
            else str(training.get("published_as", "not at all"))[:80],
        }
        if network.labels is not None:
            labels: Any = network.labels
            facts["predicts"] = ", ".join(target.name for target in labels.targets)
        if report := training.get("finetune"):
            losses = ", ".join(f"{loss:.3f} {name}" for name, loss in report.get("held_out_loss", {}).items())
            facts["fine-tuned"] = (
                f"on {report.get('n_cells')} cells, {report.get('n_held_out')} held out; {report.get('kept')}"
            )
            facts["held-out loss"] = losses or "not known"
        for column, values in self.history.filter(like="validation_").items():
            losses = values.dropna()
            if len(losses):
                name = str(column).removeprefix("validation_").replace("_", " ")
                facts[f"held-out loss, {name}"] = f"{losses.iloc[0]:.3f} at first, {losses.iloc[-1]:.3f} at last"
        return facts

    def __repr__(self) -> str:
        facts = self._facts()
        width = max(map(len, facts))
        return "\n".join(["scbin Model", *(f"  {name:<{width}}  {text}" for name, text in facts.items())])


_session: dict[str, Model] = {}  # the models that were trained last in this session, by the fingerprint left in uns


def remember(identifier: str, model: Model) -> None:
    """Keep a model for the verbs that follow in this session; a notebook rarely has more than four in use."""
    _session.pop(identifier, None)
    _session[identifier] = model
    for old in list(_session)[:-4]:
        del _session[old]


def count_head(model: Model, fix: str) -> CountHead:
    """Return the count head of a model that has one and reads how much is expressed; `fix` says what to do where not."""
    head: Any = model.network.counts
    if head is None or model.vocabulary.unit == "order":
        raise ScbinInputError("M06", f"this model reads genes by rank, or has no count head. {fix}")
    return head


def resolve_model(model: Model | str | os.PathLike[str] | None, adata: AnnData | None = None) -> Model:
    """Return the model itself, the one in a directory or on the hub, or for `None` the one that was trained on these cells."""
    if isinstance(model, Model):
        return model
    if isinstance(model, str | os.PathLike):
        return Model.load(model)
    instances((), "a scbin.Model, the path of its directory or its id on the hub", optional=True, model=model)
    entry = {} if adata is None else adata.uns.get(_keys.UNS, {})
    identifier, directory = (str(entry.get(key, "")) for key in (_keys.MODEL_ID, _keys.MODEL_PATH))
    if identifier in _session:
        return _session[identifier]
    fix = "Pass what scbin.tl.pretrain returned, or the directory that model.save(...) wrote: model='my_model'."
    if not directory or not Path(directory).is_dir():
        raise ScbinInputError("M01", f"no model was given, and none is known for these cells in this session. {fix}")
    found = Model.load(directory)
    if found.fingerprint != identifier:
        raise ScbinInputError(
            "M01", f"{directory} now contains another model than the one trained on these cells. {fix}"
        )
    return found
