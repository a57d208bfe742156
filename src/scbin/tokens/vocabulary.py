"""The vocabulary: which token id may stand at which position, and what it means; and the encodings that it asks."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from scipy import sparse

from scbin._arguments import check_fields
from scbin._errors import ScbinInputError, count
from scbin.tokens.rules import Bins

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from scbin.tokens.fit import Cells
    from scbin.tokens.rules import Layout, Tokenization
    from scbin.tokens.values import Rows

PAD, MASK, CLS, END, START, DEPTH = "[PAD]", "[MASK]", "[CLS]", "[END]", "[START]", "[DEPTH]"
# special tokens, position of the first gene without phenotypes, usual length
LAYOUTS: dict[str, tuple[tuple[str, ...], int, int]] = {
    "scbin": ((PAD, MASK, CLS, END, START), 2, 2048),
    "geneformer_v1": ((PAD, MASK), 0, 2048),
    "geneformer_v2": ((PAD, MASK, CLS, END), 1, 4096),
    "bionemo": ((PAD, MASK, CLS), 1, 2048),
}
CELLXGENE = ("sex", "tissue", "cell_type", "age", "disease")
DEPTH_EDGES = tuple(float(round(2 ** (5 + k / 2))) for k in range(31))  # 32 to a million counts, two per doubling
FORMAT = 1
MOST_POSITIONS, MOST_TOKENS, MOST_GENES = 2**18, 2**24, 2**18


# ---- encodings ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class GeneTokens:
    """The gene tokens of some rows: row k has `lengths[k]` of them from `offsets[k]` on; gaps between rows are allowed."""

    ids: np.ndarray  # token ids
    places: np.ndarray  # positions, counted from the first position of genes; rising within a row
    offsets: np.ndarray  # (rows,)
    lengths: np.ndarray  # (rows,)


class Encoding(Protocol):
    """How cells become tokens. Add one: write a class, and put an instance into `ENCODINGS`.

    The two flags say how a token names its gene: by its position, by its id, or both. `fit` and `encode` have to be written; the
    rest holds for tokens that say a level of a gene, 0 where it is not expressed. Everything else about tokens follows, and is
    asked of the :class:`Vocabulary`. (The one place where scbin inherits: encodings differ in few of these methods.)
    """

    position_is_gene: bool = True
    id_is_gene: bool = False

    def fit(self, cells: Cells, rule: Any, asked: Tokenization) -> dict[str, Any]:
        """Learn from cells; return fields of :meth:`scbin.Vocabulary.build`: `genes` (indices into `cells.genes`), `bins` ..."""

    def encode(self, vocabulary: Vocabulary, rows: Rows) -> GeneTokens:
        """Return the gene tokens of some cells."""

    def reads(self, vocabulary: Vocabulary) -> Literal["counts", "log1p", "any"]:
        """Return the unit `encode` needs: whole counts, counts or logs that are then per `bins.target_sum`, or any scale."""
        return "any" if vocabulary.bins is None else vocabulary.bins.reads

    def n_levels(self, vocabulary: Vocabulary) -> int:
        """Return the number of levels of a gene, level 0 (not expressed) included; 0 where tokens say no level."""
        return 0 if vocabulary.bins is None else vocabulary.bins.n_bins + 1

    def level_values(self, vocabulary: Vocabulary) -> np.ndarray:
        """Return the expression that each level stands for (levels,), rising from 0."""
        assert vocabulary.bins is not None
        return vocabulary.bins.centres

    def knocked_down(self, vocabulary: Vocabulary, levels: np.ndarray, fraction: float) -> np.ndarray:
        """Return the levels that are left after `fraction` of the expression that levels stand for is taken away."""
        bins, values = vocabulary.bins, np.asarray(self.level_values(vocabulary), dtype=np.float64)
        if bins is not None and bins.per == "cell":  # no unit: the place among the cell's expressed genes shrinks
            return np.floor(levels * (1 - fraction) + 1e-9).astype(levels.dtype)
        left = np.expm1(values[levels]) if vocabulary.unit == "log1p" else values[levels]
        left = np.log1p(left * (1 - fraction)) if vocabulary.unit == "log1p" else left * (1 - fraction)
        return np.minimum(np.searchsorted(values[1:] if bins is None else bins.edges, left, side="right"), levels)


ENCODINGS: dict[str, Encoding] = {}
"""Encodings by name. Add yours here, and `scbin.pp.tokenize(adata, encoding=name)` uses it."""


def encoding_of(name: str) -> Encoding:
    """Return the encoding of a name."""
    if name not in ENCODINGS:
        raise ScbinInputError("A02", f"encoding is {name!r}; choose one of {', '.join(map(repr, ENCODINGS))}.")
    return ENCODINGS[name]


# ---- the vocabulary -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TokenTables:
    """What token ids and positions say of genes: the gene of a token is the larger of its two genes, its expression a product."""

    gene_of_id: np.ndarray  # (tokens,) int64, -1 where an id does not name a gene
    gene_of_position: np.ndarray  # (positions,) int64, -1 where a position does not name one
    value_of_id: np.ndarray  # (tokens,) float32, 0 for what is no gene, and for [MASK]
    value_of_position: np.ndarray  # (positions,) float32


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

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def stop_id(self) -> int:
        """One past the id of the last value."""
        return self.first_id + len(self.values)


@dataclass(frozen=True)
class Depth:
    """The control token `[DEPTH]`: how many counts the cell has over the genes of the vocabulary, in log-spaced levels.

    The genes of the vocabulary, not all that were measured: the same cell then has the same depth in a table of fewer genes. The
    token is always visible; `first_id` is `[NO_DEPTH]`, for cells whose counts are not known, and the levels follow.
    """

    edges: tuple[float, ...]
    position: int
    first_id: int

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def stop_id(self) -> int:
        """One past the id of the last level."""
        return self.first_id + 2 + len(self.edges)

    def ids(self, counts: np.ndarray | None) -> np.ndarray | int:
        """Return the token of cells with so many counts (cells,)."""
        return self.first_id + (0 if counts is None else 1 + np.searchsorted(self.edges, counts, side="right"))

    @property
    def values(self) -> np.ndarray:
        """Counts that each level stands for, the geometric middle (levels,)."""
        edges = np.array([self.edges[0] / 2, *self.edges, 2 * self.edges[-1]])
        return np.sqrt(edges[:-1] * edges[1:])


KINDS: dict[str, Any] = {"bins": Bins, "depth": Depth}  # fields that are objects in JSON


@dataclass(frozen=True)
class Vocabulary:
    """The meaning of every token id and every position of an encoding.

    It holds gene names, phenotype values, bin edges and gene medians. A token matrix and its vocabulary are all that a model
    needs. Vocabularies are immutable, equal if their content is equal, and can be written to JSON and read without loss.
    """

    encoding: str  # a name in `ENCODINGS`
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
    depth: Depth | None = None

    # ---- building ---------------------------------------------------------------------------------------------------

    @classmethod
    def build(
        cls,
        encoding: str,
        genes: Sequence[str],
        *,
        phenotypes: Mapping[str, Sequence[str]] | None = None,
        bins: Bins | None = None,
        medians: Sequence[float] | None = None,
        max_length: int | None = None,
        layout: Layout = "scbin",
        depth: bool = False,
        gene_shares: Sequence[float] | None = None,
        name_map: Mapping[str, str] | None = None,
        age_groups: Mapping[str, int] | None = None,
    ) -> Vocabulary:
        """Lay out a vocabulary, by default `[CLS] phenotypes [DEPTH] [START] genes [END]`.

        Parameters
        ----------
        encoding
            What a token says.
        genes
            Gene names in the order of their ids or positions.
        phenotypes
            Values by category. Those of the CELLxGENE schema come first, in a fixed order, then the others as listed.
        bins
            How expression becomes bins; not for `"rank"`.
        medians
            Non-zero median of each gene per 10,000 counts; only for `"rank"`.
        max_length
            Longest row in tokens. Default: 2,048 for `"rank"` (4,096 for Geneformer V2), else as long as the genes need.
        layout
            Which special tokens there are: scbin's, or those of Geneformer V1 (none), V2 (`[CLS]` and `[END]`) or BioNeMo
            (`[CLS]`). Only scbin's has room for phenotypes and depth.
        depth
            Whether cells have a `[DEPTH]` token.
        gene_shares
            Share of all counts that each gene held in the data the genes were chosen on, to weigh the overlap with new data.
        name_map
            Other names of the genes: symbols, aliases, retired ids.
        age_groups
            Years in a class, for the phenotypes that are classes of ages.
        """
        specials, bare_position, longest = LAYOUTS[layout]
        fixed = encoding_of(encoding).position_is_gene
        if layout != "scbin" and (phenotypes or depth or fixed):
            raise ScbinInputError("A03", f'layout {layout!r} is for encoding="rank" without phenotypes and depth.')
        labels, widths, next_id = phenotypes or {}, age_groups or {}, len(specials)
        built: list[Phenotype] = []
        for name in sorted(labels, key=lambda n: CELLXGENE.index(n) if n in CELLXGENE else len(CELLXGENE)):
            values = tuple(map(str, labels[name]))
            built.append(Phenotype(name, values, len(built) + 1, next_id + 1, next_id, widths.get(name)))
            next_id += 1 + len(values)
        level = Depth(DEPTH_EDGES, len(built) + 1, next_id) if depth else None
        first = len(built) + bare_position + bool(depth)
        return cls(
            encoding=encoding,
            genes=tuple(map(str, genes)),
            specials={special: k for k, special in enumerate(specials)},
            phenotypes=tuple(built),
            first_gene_id=next_id if level is None else level.stop_id,
            first_gene_position=first,
            max_length=int(max_length or (first + len(genes) + 1 if fixed else longest)),
            bins=bins,
            medians=None if medians is None else tuple(map(float, medians)),
            gene_shares=None if gene_shares is None else tuple(map(float, gene_shares)),
            name_map=None if name_map is None else tuple(sorted(name_map.items())),
            depth=level,
        )

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "specials", dict(self.specials))
        n_genes, first, places = len(self.genes), self.first_gene_position, [p.position for p in self.phenotypes]
        names = [*self.genes, *self.specials, *chain(*self.aliases.items(), *(p.values for p in self.phenotypes))]
        spans = sorted([*self._control_spans, (self.first_gene_id, self.first_gene_id + self.n_gene_ids)])
        of_genes = {len(values) for values in (self.medians, self.gene_shares) if values is not None}
        of_genes |= {len(self.bins.matrix)} if self.bins is not None and self.bins.per == "gene" else set()
        own = self.encoding in ("bins", "binary", "gene_bins", "rank")
        rules = {
            "names of genes, tokens and labels are texts": all(isinstance(name, str) for name in names),
            "every gene and every value of a phenotype occurs once": len(set(self.genes)) == n_genes
            and all(len(set(p.values)) == len(p.values) for p in self.phenotypes),
            "all encodings but 'rank' have bins": not own or (self.bins is None) != self.position_is_gene,
            "medians, shares and edges are those of the genes": of_genes <= {n_genes},
            "max_length has room for one gene": self.max_length >= first + min(1, n_genes) + (END in self.specials),
            "token ids do not overlap": spans[0][0] >= 0 and all(a[1] <= b[0] for a, b in pairwise(spans)),
            "there is a [PAD] = 0, and a [MASK]": self.specials.get(PAD) == 0 and MASK in self.specials,
            "phenotypes stand before the genes": all(0 <= place < first for place in places),
        }
        if broken := [rule for rule, holds in rules.items() if not holds]:
            raise ScbinInputError("V04", f"this cannot be a vocabulary: {broken[0]}, but not here.")
        if max(self.n_positions / MOST_POSITIONS, self.n_tokens / MOST_TOKENS, n_genes / MOST_GENES) > 1:
            sizes = f"{count(n_genes, 'gene')}, {self.n_positions:,} positions and {self.n_tokens:,} token ids"
            raise ScbinInputError("V04", f"{sizes} are more than any network reads.")

    @property
    def _control_spans(self) -> list[tuple[int, int]]:
        """Ranges of the ids that stand for no gene."""
        used = [*self.specials.values(), *(p.missing_id for p in self.phenotypes if p.missing_id)]
        spans = [(i, i + 1) for i in used] + [(p.first_id, p.stop_id) for p in self.phenotypes if p.values]
        return spans if self.depth is None else [*spans, (self.depth.first_id, self.depth.stop_id)]

    # ---- sizes ------------------------------------------------------------------------------------------------------

    @property
    def codec(self) -> Encoding:
        """The encoding itself."""
        return encoding_of(self.encoding)

    @property
    def position_is_gene(self) -> bool:
        """Whether a gene has a position of its own (all encodings but `"rank"`)."""
        return self.codec.position_is_gene

    @property
    def unit(self) -> Literal["counts", "log1p", "order"]:
        """What the expression that tokens stand for is: counts, log1p values, or a number that falls with the rank."""
        reads = self.codec.reads(self)
        return "order" if reads == "any" else reads

    @cached_property
    def n_levels(self) -> int:
        """Number of levels of a gene, level 0 (not expressed) included; 0 for `"rank"`."""
        return self.codec.n_levels(self)

    @property
    def keeps_zeros(self) -> bool:
        """Whether genes that are not expressed have tokens."""
        return self.bins is not None and self.bins.zeros == "keep"

    @property
    def n_gene_ids(self) -> int:
        """Number of token ids that stand for genes or levels."""
        return len(self.genes) * max(1, self.n_levels) if self.codec.id_is_gene else self.n_levels

    @property
    def n_gene_positions(self) -> int:
        """Number of positions at which genes may stand; of ranks, `[END]` may have the last."""
        return len(self.genes) if self.position_is_gene else self.max_length - self.first_gene_position

    @cached_property
    def n_tokens(self) -> int:
        """Number of token ids; `vocab_size` of the network."""
        return max([self.first_gene_id + self.n_gene_ids, *(stop for _, stop in self._control_spans)])

    @cached_property
    def n_positions(self) -> int:
        """Number of positions: the width of `X_tokens`, and `max_position_embeddings` of the network."""
        return self.first_gene_position + self.n_gene_positions + (self.position_is_gene and END in self.specials)

    @cached_property
    def gene_positions(self) -> np.ndarray:
        """The positions at which genes stand."""
        return self.first_gene_position + np.arange(self.n_gene_positions)

    @property
    def dtype(self) -> np.dtype:
        """Smallest unsigned integer type that holds every token id."""
        return np.dtype(np.uint16 if self.n_tokens <= 2**16 else np.uint32)

    @property
    def mask_id(self) -> int:
        """The id of `[MASK]`."""
        return self.specials[MASK]

    def matrix(self, ids: np.ndarray, positions: np.ndarray, indptr: np.ndarray) -> sparse.csr_matrix:
        """Return tokens whose positions rise within each row as a matrix (rows, positions), without a copy."""
        shape = (len(indptr) - 1, self.n_positions)
        tokens = sparse.csr_matrix((ids, positions.astype(np.int32, copy=False), indptr), shape=shape, copy=False)
        tokens.has_sorted_indices = tokens.has_canonical_format = True
        return tokens

    # ---- what tokens say --------------------------------------------------------------------------------------------

    def ids_of(self, genes: np.ndarray, levels: Any) -> np.ndarray:
        """Return the token ids of genes at levels; ranked genes have one id each."""
        own = genes * max(1, self.n_levels) if self.codec.id_is_gene else np.zeros_like(genes)
        return self.first_gene_id + own + (levels if self.n_levels else 0)

    def levels_of(self, token_ids: np.ndarray) -> np.ndarray:
        """Return the level of each gene token (n,) int64; 1 for ranked genes."""
        ids = token_ids.astype(np.int64) - self.first_gene_id
        return ids % self.n_levels if self.n_levels else np.ones_like(ids)

    def genes_at(self, token_ids: np.ndarray, position_ids: np.ndarray) -> np.ndarray:
        """Return the gene that each gene token speaks of (n,) int64: its place, or for ranks its id, says which."""
        if self.position_is_gene:
            return position_ids.astype(np.int64) - self.first_gene_position
        return (token_ids.astype(np.int64) - self.first_gene_id) // max(1, self.n_levels)

    def is_gene_token(self, token_ids: np.ndarray) -> np.ndarray:
        """Whether each id stands for a gene or a bin."""
        return (token_ids >= self.first_gene_id) & (token_ids < self.first_gene_id + self.n_gene_ids)

    @cached_property
    def group_start(self) -> np.ndarray:
        """First token id that may be asked for at each position (positions,); 0 where only specials or `[DEPTH]` stand."""
        start = np.zeros(self.n_positions, dtype=np.int64)
        for phenotype in self.phenotypes:
            start[phenotype.position] = phenotype.first_id
        genes = np.arange(self.n_gene_positions)
        start[self.gene_positions] = self.ids_of(genes, 0) if self.position_is_gene else self.first_gene_id
        return start

    @cached_property
    def group_stop(self) -> np.ndarray:
        """One past the last token id that may be asked for at each position (positions,)."""
        size = np.zeros(self.n_positions, dtype=np.int64)
        for phenotype in self.phenotypes:
            size[phenotype.position] = len(phenotype.values)
        size[self.gene_positions] = self.n_levels if self.position_is_gene else self.n_gene_ids
        return self.group_start + size

    def tables(self) -> TokenTables:
        """Return gene and expression of every token id and position, to turn tokens into expression vectors."""
        of_id, values = np.full(self.n_tokens, -1, np.int64), np.zeros(self.n_tokens, np.float32)
        of_position, weights = np.full(self.n_positions, -1, np.int64), np.zeros(self.n_positions, np.float32)
        ids, where = self.first_gene_id + np.arange(self.n_gene_ids), self.gene_positions
        values[ids] = np.asarray(self.codec.level_values(self), np.float32)[self.levels_of(ids)]
        if self.position_is_gene:
            of_position[where], weights[where] = np.arange(len(where)), 1.0
        else:  # values fall with the rank as log1p values do
            of_id[ids] = self.genes_at(ids, ids)
            weights[where] = np.log1p(len(where) / (1.0 + np.arange(len(where))))
        return TokenTables(of_id, of_position, values, weights)

    @property
    def token_values(self) -> np.ndarray:
        """Expression value that each token id stands for (tokens,): 1 for a ranked gene, 0 for everything not a gene."""
        return self.tables().value_of_id

    @cached_property
    def aliases(self) -> dict[str, str]:
        """Other names of genes, upper-cased, to the genes."""
        return dict(self.name_map or ())

    def phenotype(self, name: str) -> Phenotype:
        """Return the category called `name`."""
        known = {phenotype.name: phenotype for phenotype in self.phenotypes}
        if name not in known:
            listed = ", ".join(map(repr, known)) or "none"
            raise ScbinInputError("A06", f"{name!r} is not a phenotype of this vocabulary. Available: {listed}.")
        return known[name]

    @cached_property
    def _control_texts(self) -> dict[int, str]:
        """What the ids that stand for no gene mean."""
        text = {i: special for special, i in self.specials.items()}
        for p in self.phenotypes:
            text |= {p.missing_id: f"[NO_{p.name.upper()}]"} if p.missing_id else {}
            text |= {p.first_id + k: f"[{value}]" for k, value in enumerate(p.values)}
        if self.depth is not None:
            levels = ["[NO_DEPTH]", *(f"[DEPTH {n:,.0f}]" for n in self.depth.values)]
            text |= dict(enumerate(levels, self.depth.first_id))
        return text

    def token_text(self, token_id: int, position: int) -> str:
        """Say in words what a token at a position means, for people and plots."""
        if token_id in self._control_texts:
            return self._control_texts[token_id]
        ids = np.array([token_id])
        gene = self.genes[self.genes_at(ids, np.array([position]))[0]]
        return f"{gene}={self.levels_of(ids)[0]}" if self.n_levels else gene

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
        return self._json

    @cached_property
    def _json(self) -> str:
        content = {"format": FORMAT} | _fields(self)
        return json.dumps(content, default=_fields, sort_keys=True, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Vocabulary:
        """Read back what `to_json` wrote."""
        try:
            content = _tuples(json.loads(text))
            if content.pop("format") != FORMAT:
                raise ValueError(f"it is not of format {FORMAT}, but of another version")
            parts = {name: kind(**content[name]) for name, kind in KINDS.items() if content.get(name) is not None}
            phenotypes = tuple(Phenotype(**phenotype) for phenotype in content["phenotypes"])
            return cls(**content | parts | {"phenotypes": phenotypes})
        except (LookupError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
            raise ScbinInputError("V04", f"this is not a vocabulary written by scbin ({str(error)[:200]}).") from error

    @property
    def mark(self) -> str:
        """What every row of tokens carries: the first 16 digits of `sha256`."""
        return self.sha256[:16]

    @cached_property
    def sha256(self) -> str:
        """Fingerprint of the content: two vocabularies with one fingerprint give the same tokens."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def _fields(part: Any) -> dict[str, Any]:
    """Return the fields of a vocabulary, or of an object in it; older ones had no depth and no age groups, which keeps their hash."""
    content = {field.name: getattr(part, field.name) for field in fields(part)}
    return {name: value for name, value in content.items() if value is not None or name not in ("depth", "age_groups")}


def _tuples(value: Any) -> Any:
    """Return what JSON says with tuples for its lists, as the fields of a vocabulary are."""
    if isinstance(value, dict):
        return {name: _tuples(item) for name, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
