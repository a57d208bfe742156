"""The vocabulary: which token id may stand at which position, and what it means."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from scbin._errors import ScbinInputError, count
from scbin.encoding.bins import Bins

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

Encoding = Literal["bins", "binary", "rank", "gene_bins"]
Layout = Literal["scbin", "geneformer_v1", "geneformer_v2", "bionemo"]

PAD, MASK, CLS, END, START = "[PAD]", "[MASK]", "[CLS]", "[END]", "[START]"
CANONICAL_SPECIALS = {PAD: 0, MASK: 1, CLS: 2, END: 3, START: 4}
# specials, position of the first gene without phenotypes, usual length
LAYOUTS: dict[str, tuple[dict[str, int], int, int]] = {
    "scbin": (CANONICAL_SPECIALS, 2, 2048),
    "geneformer_v1": ({PAD: 0, MASK: 1}, 0, 2048),
    "geneformer_v2": ({PAD: 0, MASK: 1, CLS: 2, END: 3}, 1, 4096),
    "bionemo": ({PAD: 0, MASK: 1, CLS: 2}, 1, 2048),
}
CANONICAL_PHENOTYPES = ("sex", "tissue", "cell_type", "age", "disease")
FORMAT = 1


@dataclass(frozen=True)
class Phenotype:
    """One category of control tokens, such as sex.

    The token ids of `values` are contiguous from `first_id`; `missing_id` is the id of `[NO_X]`, or 0 where a cell without a
    label has no token. The token always stands at `position`.
    """

    name: str
    values: tuple[str, ...]
    position: int
    first_id: int
    missing_id: int
    age_groups: int | None = None  # years in a class, where the values are classes of ages that labels are cut into

    @property
    def stop_id(self) -> int:
        """One past the id of the last value."""
        return self.first_id + len(self.values)


@dataclass(frozen=True)
class Vocabulary:
    """What every token id and every position of an encoding means.

    Gene names, phenotype values, bin edges and gene medians live here, and nothing else does: a token matrix and its
    vocabulary are all that a model needs. Vocabularies are immutable, equal when their content is equal, and go to JSON and
    back without loss.
    """

    encoding: Encoding
    genes: tuple[str, ...]
    specials: Mapping[str, int]
    phenotypes: tuple[Phenotype, ...]
    first_gene_id: int  # first id of the genes ("rank", "gene_bins") or of bin 0 ("bins", "binary")
    first_gene_position: int
    max_length: int  # tokens a row may have; also the number of positions for "rank"
    bins: Bins | None = None  # None for "rank"
    medians: tuple[float, ...] | None = None  # per gene, for "rank": non-zero median per 10,000 counts
    gene_shares: tuple[float, ...] | None = None  # share of the counts that each gene held where the genes were chosen
    name_map: tuple[tuple[str, str], ...] | None = None  # symbols, aliases and retired ids, each to one of the genes

    def __post_init__(self) -> None:
        object.__setattr__(self, "specials", dict(self.specials))
        self._check()

    # ---- building ---------------------------------------------------------------------------------------------------

    @classmethod
    def build(
        cls,
        encoding: Encoding,
        genes: Sequence[str],
        *,
        phenotypes: Mapping[str, Sequence[str]] | None = None,
        bins: Bins | None = None,
        medians: Sequence[float] | None = None,
        max_length: int | None = None,
        layout: Layout = "scbin",
        gene_shares: Sequence[float] | None = None,
        name_map: Mapping[str, str] | None = None,
        age_groups: Mapping[str, int] | None = None,
    ) -> Vocabulary:
        """Lay out a vocabulary, by default `[CLS] phenotypes [START] genes [END]`.

        Parameters
        ----------
        encoding
            What a token says.
        genes
            Gene names in the order of their ids or positions.
        phenotypes
            Values by category. The categories of the CELLxGENE schema come first, in a fixed order, then the others as
            listed.
        bins
            How expression becomes bins; not for `"rank"`.
        medians
            Non-zero median of each gene per 10,000 counts; only for `"rank"`.
        max_length
            Longest row in tokens. Default: 2,048 for `"rank"` (4,096 for Geneformer V2), else as long as the genes need.
        layout
            Which special tokens there are: scbin's, or those of Geneformer V1 (none), V2 (`[CLS]` and `[END]`) or BioNeMo
            (`[CLS]`). Only scbin's has room for phenotypes.
        gene_shares
            Share of all counts that each gene held in the data the genes were chosen on, to weigh the overlap with new data.
        name_map
            Other names of the genes: symbols, aliases, retired ids.
        age_groups
            Years in a class, for the phenotypes that are classes of ages.
        """
        specials, bare_position, longest = LAYOUTS[layout]
        if layout != "scbin" and (phenotypes or encoding != "rank"):
            raise ScbinInputError("V11", f'layout {layout!r} is for encoding="rank" without phenotypes.')
        names = sorted(phenotypes or {}, key=_canonical_order)
        next_id, built = len(specials), []
        for position, name in enumerate(names, start=1):
            values = tuple(str(value) for value in (phenotypes or {})[name])
            years = (age_groups or {}).get(name)
            built.append(Phenotype(name, values, position, next_id + 1, next_id, years))
            next_id += 1 + len(values)
        first_gene_position = len(built) + bare_position
        if max_length is None:
            max_length = longest if encoding == "rank" else first_gene_position + len(genes) + 1
        return cls(
            encoding=encoding,
            genes=tuple(str(gene) for gene in genes),
            specials=specials,
            phenotypes=tuple(built),
            first_gene_id=next_id,
            first_gene_position=first_gene_position,
            max_length=int(max_length),
            bins=bins,
            medians=None if medians is None else tuple(float(median) for median in medians),
            gene_shares=None if gene_shares is None else tuple(float(share) for share in gene_shares),
            name_map=None if name_map is None else tuple(sorted(name_map.items())),
        )

    @classmethod
    def from_geneformer(
        cls,
        token_dictionary: Mapping[str, int] | str | Path,
        gene_medians: Mapping[str, float] | str | Path,
        ensembl_mapping: Mapping[str, str] | str | Path | None = None,
        gene_names: Mapping[str, str] | str | Path | None = None,
    ) -> Vocabulary:
        """Build the `"rank"` vocabulary of a Geneformer version, V1 or V2, with its own token ids.

        Parameters
        ----------
        token_dictionary
            `{gene or special: id}`, or a file with it.
        gene_medians
            `{gene: median}`, or a file with it.
        ensembl_mapping
            `{symbol, alias or retired id: gene}`, or a file with it: with it, data may name genes by symbol.
        gene_names
            `{symbol: gene}`, or a file with it (V1 has its symbols there).

        Examples
        --------
        >>> Vocabulary.from_geneformer({"<pad>": 0, "<mask>": 1, "ENSG00000000003": 2}, {"ENSG00000000003": 2.0})
        Vocabulary: rank, 1 gene, phenotypes: none, 3 token ids, 2,048 positions
        """
        from scbin.encoding.geneformer import vocabulary_from_geneformer

        return vocabulary_from_geneformer(token_dictionary, gene_medians, ensembl_mapping, gene_names)

    def _check(self) -> None:
        if self.encoding not in get_args(Encoding):
            raise ScbinInputError("V01", f"encoding is {self.encoding!r}; choose one of {list(get_args(Encoding))}.")
        if len(set(self.genes)) != len(self.genes):
            raise ScbinInputError("V02", "a vocabulary names every gene once, but some genes stand in it twice.")
        if (self.bins is None) != (self.encoding == "rank"):
            raise ScbinInputError("V03", f"encoding {self.encoding!r} and bins={self.bins!r} do not go together.")
        if self.medians is not None and len(self.medians) != len(self.genes):
            raise ScbinInputError("V04", f"{count(len(self.medians), 'median')} for {count(len(self.genes), 'gene')}.")
        for phenotype in self.phenotypes:
            if len(set(phenotype.values)) != len(phenotype.values):
                raise ScbinInputError("V05", f"the values of phenotype {phenotype.name!r} are not unique.")
        shortest = self.first_gene_position + min(1, len(self.genes)) + (END in self.specials)
        if self.max_length < shortest:
            raise ScbinInputError(
                "V12", f"max_length is {self.max_length}, but one gene and the special tokens need {shortest}."
            )
        used = [*self.specials.values(), *(p.missing_id for p in self.phenotypes if p.missing_id)]
        spans = [(i, i + 1) for i in used] + [(p.first_id, p.stop_id) for p in self.phenotypes if p.values]
        spans = sorted([*spans, (self.first_gene_id, self.first_gene_id + self.n_gene_ids)])
        if spans[0][0] < 0 or any(before[1] > after[0] for before, after in zip(spans, spans[1:], strict=False)):
            raise ScbinInputError(
                "V06", "token ids overlap: specials, phenotype values and genes need ranges of their own."
            )
        if self.specials.get(PAD) != 0 or MASK not in self.specials:
            raise ScbinInputError("V07", "the special tokens need [PAD] = 0 and a [MASK].")

    # ---- sizes ------------------------------------------------------------------------------------------------------

    @property
    def n_levels(self) -> int:
        """Number of bins, bin 0 (not expressed) included; 0 for `"rank"`."""
        return 0 if self.bins is None else self.bins.n_bins + 1

    @property
    def n_gene_ids(self) -> int:
        """Number of token ids that stand for genes or bins."""
        n = {"rank": len(self.genes), "gene_bins": len(self.genes) * self.n_levels}
        return n.get(self.encoding, self.n_levels)

    @property
    def n_tokens(self) -> int:
        """Number of token ids; `vocab_size` of the network."""
        ends = [max(self.specials.values()) + 1, self.first_gene_id + self.n_gene_ids]
        return max([*ends, *(p.stop_id for p in self.phenotypes), *(p.missing_id + 1 for p in self.phenotypes)])

    @property
    def n_positions(self) -> int:
        """Number of positions: the width of `X_tokens`, and `max_position_embeddings` of the network."""
        if self.encoding == "rank":
            return self.max_length
        return self.first_gene_position + len(self.genes) + (END in self.specials)

    @property
    def dtype(self) -> np.dtype:
        """Smallest unsigned integer type that holds every token id."""
        return np.dtype(np.uint16 if self.n_tokens <= 2**16 else np.uint32)

    @property
    def position_is_gene(self) -> bool:
        """Whether a gene has a position of its own (all encodings but `"rank"`)."""
        return self.encoding != "rank"

    @property
    def mask_id(self) -> int:
        """The id of `[MASK]`."""
        return self.specials[MASK]

    # ---- groups: what may stand where -------------------------------------------------------------------------------

    @cached_property
    def group_start(self) -> np.ndarray:
        """First token id of the group of each position (positions,); 0 where only specials stand."""
        return self._groups[0]

    @cached_property
    def group_stop(self) -> np.ndarray:
        """One past the last token id of the group of each position (positions,); 0 where only specials stand."""
        return self._groups[1]

    @cached_property
    def _groups(self) -> tuple[np.ndarray, np.ndarray]:
        start, stop = np.zeros((2, self.n_positions), dtype=np.int64)
        for phenotype in self.phenotypes:
            start[phenotype.position], stop[phenotype.position] = phenotype.first_id, phenotype.stop_id
        genes = self.gene_positions
        if self.encoding == "gene_bins":
            start[genes] = self.first_gene_id + self.n_levels * np.arange(len(self.genes))
            stop[genes] = start[genes] + self.n_levels
        else:
            start[genes], stop[genes] = self.first_gene_id, self.first_gene_id + self.n_gene_ids
        return start, stop

    @cached_property
    def gene_positions(self) -> np.ndarray:
        """The positions at which genes stand."""
        stop = self.max_length if self.encoding == "rank" else self.first_gene_position + len(self.genes)
        return np.arange(self.first_gene_position, stop)

    def genes_at(self, token_ids: np.ndarray, position_ids: np.ndarray) -> np.ndarray:
        """Return the gene that each gene token speaks of (n,) int64: its place, or for ranks and so on its id, says which."""
        if self.position_is_gene:
            return position_ids.astype(np.int64) - self.first_gene_position
        return token_ids.astype(np.int64) - self.first_gene_id

    def is_gene_token(self, token_ids: np.ndarray) -> np.ndarray:
        """Whether each id stands for a gene or a bin."""
        return (token_ids >= self.first_gene_id) & (token_ids < self.first_gene_id + self.n_gene_ids)

    @cached_property
    def token_values(self) -> np.ndarray:
        """Expression value that each token id stands for (tokens,): 1 for a ranked gene, 0 for everything not a gene."""
        values = np.zeros(self.n_tokens, dtype=np.float32)
        if self.bins is None:
            levels: np.ndarray = np.ones(len(self.genes), dtype=np.float32)
        else:
            levels = np.tile(self.bins.centres, len(self.genes) if self.encoding == "gene_bins" else 1)
        values[self.first_gene_id : self.first_gene_id + self.n_gene_ids] = levels
        return values

    @cached_property
    def aliases(self) -> dict[str, str]:
        """Other names of genes, upper-cased, to the genes."""
        return dict(self.name_map or ())

    def phenotype(self, name: str) -> Phenotype:
        """Return the category called `name`."""
        for phenotype in self.phenotypes:
            if phenotype.name == name:
                return phenotype
        known = ", ".join(repr(p.name) for p in self.phenotypes) or "none"
        raise ScbinInputError("V08", f"{name!r} is not a phenotype of this vocabulary. It knows: {known}.")

    # ---- text -------------------------------------------------------------------------------------------------------

    def token_text(self, token_id: int, position: int) -> str:
        """Say in words what a token at a position means, for people and plots."""
        for text, special_id in self.specials.items():
            if token_id == special_id:
                return text
        for phenotype in self.phenotypes:
            if token_id == phenotype.missing_id:
                return f"[NO_{phenotype.name.upper()}]"
            if phenotype.first_id <= token_id < phenotype.stop_id:
                return f"[{phenotype.values[token_id - phenotype.first_id]}]"
        if self.encoding == "rank":
            return self.genes[token_id - self.first_gene_id]
        level = (token_id - self.first_gene_id) % self.n_levels
        return f"{self.genes[position - self.first_gene_position]}={level}"

    def __repr__(self) -> str:
        phenotypes = ", ".join(f"{p.name} ({len(p.values)})" for p in self.phenotypes) or "none"
        bins = "" if self.bins is None else f", {count(self.bins.n_bins, 'bin')}"
        return (
            f"Vocabulary: {self.encoding}, {count(len(self.genes), 'gene')}{bins}, phenotypes: {phenotypes}, "
            f"{count(self.n_tokens, 'token id')}, {count(self.n_positions, 'position')}"
        )

    # ---- JSON -------------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """Return the vocabulary as one line of JSON, the same bytes for the same content."""
        fields = asdict(self)
        for phenotype in fields["phenotypes"]:
            if phenotype["age_groups"] is None:  # as in vocabularies older than this field, whose fingerprints stay
                del phenotype["age_groups"]
        return json.dumps({"format": FORMAT, **fields}, sort_keys=True, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Vocabulary:
        """Read back what `to_json` wrote."""
        try:
            fields: dict[str, Any] = json.loads(text)
            if fields.pop("format") != FORMAT:
                raise ScbinInputError(
                    "V09", f"this vocabulary is not of format {FORMAT}; it needs another scbin version."
                )
            fields["genes"] = tuple(fields["genes"])
            fields["phenotypes"] = tuple(
                Phenotype(**{**phenotype, "values": tuple(phenotype["values"])}) for phenotype in fields["phenotypes"]
            )
            fields["bins"] = None if fields["bins"] is None else Bins.from_dict(fields["bins"])
            for name in ("medians", "gene_shares"):
                fields[name] = None if fields.get(name) is None else tuple(fields[name])
            if fields.get("name_map") is not None:
                fields["name_map"] = tuple((str(name), str(gene)) for name, gene in fields["name_map"])
            return cls(**fields)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ScbinInputError("V10", f"this is not a vocabulary written by scbin ({error}).") from error

    @cached_property
    def sha256(self) -> str:
        """Fingerprint of the content: two vocabularies with one fingerprint give the same tokens."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def _canonical_order(name: str) -> int:
    """Sort key: the five CELLxGENE categories first, the others behind them as listed (sorting is stable)."""
    return CANONICAL_PHENOTYPES.index(name) if name in CANONICAL_PHENOTYPES else len(CANONICAL_PHENOTYPES)
