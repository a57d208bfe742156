"""How predictions of hidden tokens are scored: one value per target, so that sums over packs and processes are exact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from scbin._arguments import check_fields, instances, numbers, shown
from scbin._errors import ScbinInputError
from scbin.nn.limits import BELOW_1, LARGEST, TINY, check_limits

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
        Fraction of the target, from 0 to below 1, that the cross entropy spreads evenly over the group (or vocabulary).
    sigma
        Standard deviation of the Gaussian in bins.
    over
        Probabilities sum to one over the `"group"` of the position (the levels of a gene, the values of a phenotype), or over
        the whole `"vocabulary"`, as in Geneformer, Polygene and PerturbGene.
    positions
        Score the `"masked"` positions, or `"all"` of them, copied tokens too, as Bioformers does.
    average
        The mean is taken over the positions of `"each"` loss by itself, so that a phenotype counts as much as all genes, or
        over all `"positions"` together, as in Polygene and PerturbGene.
    class_weights
        One weight per value, by loss: `{"cell_type": [0.2, 1.8]}`.
    weights
        Weight of each loss in the sum: `{"genes": 1.0, "cell_vector": 0.5}`. Default 1.

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
    average: Literal["each", "positions"] = "each"
    class_weights: Mapping[str, Sequence[float]] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self)
        check_limits(vars(self), {"label_smoothing": (0.0, BELOW_1), "sigma": (TINY, LARGEST)})
        instances(Mapping, "a dict by loss", class_weights=self.class_weights, weights=self.weights)
        by_class = {name: _weights(f"class_weights[{name!r}]", values) for name, values in self.class_weights.items()}
        by_loss = {name: _weights(f"weights[{name!r}]", [value])[0] for name, value in self.weights.items()}
        for name, values in by_class.items():
            if not any(values):
                raise ScbinInputError("A02", f"class_weights[{name!r}] are all 0: there is nothing to learn.")
        object.__setattr__(self, "class_weights", by_class)
        object.__setattr__(self, "weights", by_loss)

    def check(self, vocabulary: Vocabulary, losses: Sequence[str]) -> None:
        """Raise where the vocabulary has no such loss, or none that can be scored so."""
        for name in {*self.class_weights, *self.weights} - set(losses):
            raise ScbinInputError("A06", f"{name!r} is not something to predict here. There are: {', '.join(losses)}.")
        sizes = {phenotype.name: len(phenotype.values) for phenotype in vocabulary.phenotypes}
        sizes |= {"genes": vocabulary.n_levels or vocabulary.n_gene_ids, "specials": vocabulary.n_tokens}
        fault = None
        for name, values in self.class_weights.items():
            if len(values) != sizes.get(name):
                own = sizes.get(name, "no")
                fault = f"class_weights[{name!r}] has {len(values)} weights; {name} has {own} values here."
        if self.kind == "ordinal" and not vocabulary.n_levels:
            fault = 'kind="ordinal" needs bins that follow one another; ranked genes do not.'
        elif self.kind == "binary" and vocabulary.n_levels != 2:
            fault = f'kind="binary" needs two levels per gene; this vocabulary has {vocabulary.n_levels}.'
        elif self.over == "vocabulary" and (self.kind != "cross_entropy" or self.class_weights):
            fault = 'over="vocabulary" goes with plain cross entropy alone.'
        elif self.label_smoothing and self.kind != "cross_entropy" and not vocabulary.phenotypes:
            fault = f"label_smoothing belongs to the cross entropy, and kind={self.kind!r} scores all there is. Leave one out."
        if fault:
            raise ScbinInputError("A03", fault)

    def score(self, logits: Tensor, labels: Tensor, *, genes: bool, class_weights: Tensor | None = None) -> Tensor:
        """Return what each prediction costs (M,), given logits (M, K) and labels (M,) within the group."""
        if genes and self.kind == "ordinal":
            return gaussian_ordinal(logits, labels, self.sigma, class_weights)
        if genes and self.kind == "binary":
            return binary_cross_entropy(logits, labels, class_weights)
        return cross_entropy(logits, labels, self.label_smoothing, class_weights)


def _weights(name: str, values: Any) -> tuple[float, ...]:
    """Return weights as plain numbers; none may be below 0."""
    values = values.tolist() if isinstance(values, np.ndarray | torch.Tensor) else values
    instances((list, tuple), "a list of weights", **{name: values})
    for value in values:
        numbers(**{name: value})
    if not all(0 <= value < float("inf") for value in values):
        raise ScbinInputError("A02", f"{name} is {shown(values)}; weights are finite and not below 0.")
    return tuple(float(value) for value in values)


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


def gaussian_ordinal(logits: Tensor, labels: Tensor, sigma: float = 1.0, class_weights: Tensor | None = None) -> Tensor:
    """Return the cross entropy (M,) against a Gaussian around the true bin: near misses cost less.

    The target is exp(-(k - label)^2 / (2 sigma^2)) over the bins of the group, scaled to sum to one (also at the ends).
    """
    bins = torch.arange(logits.shape[1], device=logits.device)
    target = torch.softmax(-((bins - labels[:, None]).float() ** 2) / (2 * sigma**2), dim=1)
    loss = -(target * F.log_softmax(logits.float(), dim=1)).sum(1)
    return loss if class_weights is None else loss * class_weights[labels].to(loss)


def binary_cross_entropy(logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Return the binary cross entropy (M,) of "expressed", whose one logit is that of bin 1 minus that of bin 0."""
    difference = logits[:, 1].float() - logits[:, 0].float()
    loss = F.binary_cross_entropy_with_logits(difference, labels.float(), reduction="none")
    return loss if class_weights is None else loss * class_weights[labels].to(loss)
