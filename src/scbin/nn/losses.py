"""How predictions of hidden tokens are scored: one value per target, so that sums over packs and processes are exact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F

from scbin._arguments import check_fields, instances, numbers, plain
from scbin._errors import ScbinInputError
from scbin.nn.limits import check_limits

if TYPE_CHECKING:
    from torch import Tensor

    from scbin.tokens.vocabulary import Vocabulary


@dataclass(frozen=True)
class Loss:
    """How the prediction of a hidden gene or phenotype is scored.

    Parameters
    ----------
    kind
        Score of the genes: `"cross_entropy"`; `"ordinal"`, a Gaussian around the true bin, so that near misses cost less;
        `"binary"`, one logit per gene, for two levels. Phenotypes always have the cross entropy.
    label_smoothing
        Fraction of the target that the cross entropy spreads evenly over the group (or vocabulary).
    sigma
        Standard deviation of the Gaussian in bins.
    over
        Probabilities sum to one over the `"group"` of the position (the levels of a gene, the values of a phenotype), or over
        the whole `"vocabulary"`, as in Geneformer, Polygene and PerturbGene.
    positions
        Score the `"masked"` positions, or `"all"` of them, copied tokens too, as Bioformers does.
    weights
        Weight of each loss, which is a mean, in the sum: `{"genes": 1.0, "cell_vector": 0.5}`. Default 1.

    Examples
    --------
    >>> Loss("ordinal", sigma=0.7).over
    'group'
    """

    kind: Literal["cross_entropy", "ordinal", "binary"] = "cross_entropy"
    label_smoothing: float = 0.0
    sigma: float = 1.0
    over: Literal["group", "vocabulary"] = "group"
    positions: Literal["masked", "all"] = "masked"
    weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self)
        check_limits(vars(self), {"label_smoothing": (0.0, 0.99), "sigma": (1e-3, 1e3)})
        instances(Mapping, "a dict by loss", weights=self.weights)
        weights: dict[str, Any] = {f"weights[{name!r}]": plain(weight) for name, weight in self.weights.items()}
        numbers(**weights)
        check_limits({name: float(weight) for name, weight in weights.items()}, dict.fromkeys(weights, (0.0, 1e9)))
        object.__setattr__(self, "weights", {name: float(weight) for name, weight in self.weights.items()})

    def check(self, vocabulary: Vocabulary, losses: Sequence[str]) -> None:
        """Raise where the vocabulary has no such loss, or none that can be scored so."""
        for name in set(self.weights) - set(losses):
            raise ScbinInputError("A06", f"{name!r} is not something to predict here. There are: {', '.join(losses)}.")
        fault = None
        if self.kind == "ordinal" and not vocabulary.n_levels:
            fault = 'kind="ordinal" needs bins that follow one another; ranked genes do not.'
        elif self.kind == "binary" and vocabulary.n_levels != 2:
            fault = f'kind="binary" needs two levels per gene; this vocabulary has {vocabulary.n_levels}.'
        elif self.over == "vocabulary" and self.kind != "cross_entropy":
            fault = f'over="vocabulary" goes with the cross entropy, not with kind={self.kind!r}.'
        if fault:
            raise ScbinInputError("A03", fault)

    def score(self, logits: Tensor, labels: Tensor, *, genes: bool) -> Tensor:
        """Return what each prediction costs (M,), given logits (M, K) and labels (M,) within the group."""
        if genes and self.kind == "ordinal":
            return gaussian_ordinal(logits, labels, self.sigma)
        if genes and self.kind == "binary":
            return binary_cross_entropy(logits, labels)
        return cross_entropy(logits, labels, self.label_smoothing)


def cross_entropy(
    logits: Tensor, labels: Tensor, smoothing: float = 0.0, class_weights: Tensor | None = None
) -> Tensor:
    """Return -log softmax(logits)_label (M,), with label smoothing over the K columns, in float32.

    With class weights (K,) the mean is the sum of this over the sum of `class_weights[labels]`, as in torch.

    Examples
    --------
    >>> cross_entropy(torch.zeros(1, 4), torch.tensor([2])).exp()
    tensor([4.])
    """
    weights = None if class_weights is None else class_weights.float()
    return F.cross_entropy(logits.float(), labels, weight=weights, reduction="none", label_smoothing=smoothing)


def gaussian_ordinal(logits: Tensor, labels: Tensor, sigma: float = 1.0) -> Tensor:
    """Return the cross entropy (M,) against a Gaussian around the true bin: near misses cost less.

    The target is exp(-(k - label)^2 / (2 sigma^2)) over the bins of the group, scaled to sum to one (also at the ends).
    """
    bins = torch.arange(logits.shape[1], device=logits.device)
    target = torch.softmax(-((bins - labels[:, None]).float() ** 2) / (2 * sigma**2), dim=1)
    return F.cross_entropy(logits.float(), target, reduction="none")


def binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the binary cross entropy (M,) of "expressed", whose one logit is that of bin 1 minus that of bin 0."""
    difference = logits[:, 1].float() - logits[:, 0].float()
    return F.binary_cross_entropy_with_logits(difference, labels.float(), reduction="none")
