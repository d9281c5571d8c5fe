"""Which labels a layer knows by something that no other label has: the statistics behind the findings.

Of every image each layer's channels are known, pooled over positions (mean and maximum), so that it does not matter
*where* something is. A shortcut is simple: a mark, a color or a texture is there in an early layer, where objects are
not told apart yet. So for each label and layer a linear discriminant of its images against all others is fitted and
read on held-out images, and asked how far they lie beyond the images of other labels:

    separation = (q75 of the label's images − median of the others) / reach of the others

The upper quartile, so that half of the images are enough. The *reach* is the root mean square, over the other labels,
of how far the 85% quantile of a label's images lies above that median: all labels count, so that one neighbor more or
less is no great matter, but the one that reaches highest, so that a label with the same mark does no harm.

What is far depends on the layer and the data, so the null is the other labels: the logarithm of the separation is
compared with theirs by the generalized extreme Studentized deviate test (Rosner 1983), one-sided, with a prediction
interval of Student's t. A handful of labels may agree by accident; their spread is therefore taken a second time,
moderated by what is usual (Smyth 2004), and the larger chance counts. Layers say much the same, so that their chances
are combined by Cauchy's combination test (Liu and Xie 2020), which holds about, however they depend on each other; over
labels Bonferroni's correction is made. Where all labels are told apart as well, no label stands out.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy import special

from captum_scoremap.audit.shards import Shards

__all__ = ["FALSE_ALARMS", "Candidate", "at_any", "screen", "stand_out"]

Array: TypeAlias = NDArray[np.float64]
Integers: TypeAlias = NDArray[np.int64]

FALSE_ALARMS = 0.05
"""The chance, over all labels and layers, that a label is named where nothing sets any apart."""

_ENOUGH = 10  # images of a label: fewer cannot be split into folds and quantiles
_LABELS = 5  # to compare with each other
_FOLDS = 5
_SHRINKAGE = 0.1
_NUMBERS = 40_000_000  # of images times labels held at once; more images are thinned out
_CARRIED, _REACHED = 0.75, 0.85  # quantiles of a label's images
_SPREAD, _WEIGHT = 0.3, 8  # usual spread of the logarithms between labels, and how many labels that counts for


@dataclass(frozen=True)
class Candidate:
    """What sets a label apart, to be proven.

    Attributes:
        label: The label, predicted.
        layer: Name of the layer at which it stands out most.
        strength: How far it stands out, in standard deviations of the other labels.
        chance: The probability of as much by chance, for any label at any layer.
        weights: Of the channels' means and maxima in two discriminants, (2, 2, C): each was fitted to one half of the
            images, and is used on the other.
        typical: Mean of both over the images of other labels, (2, C).
        carriers: Images of this predicted label beyond the 95% quantile of all others, most typical first.
        halves: Which discriminant was not fitted to them, 0 or 1.
        sample: Images of other labels, to compare with.
    """

    label: int
    layer: str
    strength: float
    chance: float
    weights: Array
    typical: Array
    carriers: tuple[int, ...]
    halves: tuple[int, ...]
    sample: tuple[int, ...]


def screen(shards: Shards, layers: Sequence[str], predicted: Mapping[int, int]) -> list[tuple[Candidate, ...]]:
    """Compare each predicted label's channels with those of the others.

    Args:
        shards: The results.
        layers: Names of the layers whose channels are pooled.
        predicted: Predicted label of every image that could be audited, by its position.

    Returns:
        For each label of at least ten images a candidate, the least likely by chance first, each followed by those of
        other layers at which the label stands out, too; none where there are fewer than five such labels.
    """
    labels = [label for label, count in zip(*np.unique(list(predicted.values()), return_counts=True), strict=True)
              if count >= _ENOUGH]  # fmt: skip
    if len(labels) < _LABELS:
        return []
    indices = np.array(sorted(predicted))
    of_image = np.array([predicted[index] for index in indices.tolist()])
    indices, of_image = _thinned(indices, of_image, np.array(labels))
    found: dict[int, list[Candidate]] = defaultdict(list)
    for layer in layers:
        pooled = _pooled(shards, layer, indices)
        for candidate in _candidates(layer, pooled, indices, of_image, np.array(labels)):
            found[candidate.label].append(candidate)
    ranked = []
    for candidates in found.values():
        first, *others = sorted(candidates, key=_suspicion)
        first = replace(first, chance=min(at_any([one.chance for one in candidates]) * len(labels), 1.0))
        others = [replace(one, chance=min(one.chance * len(labels) * len(layers), 1.0)) for one in others]
        ranked.append((first, *(one for one in others if one.chance <= FALSE_ALARMS)))
    return sorted(ranked, key=lambda candidates: _suspicion(candidates[0]))


def _suspicion(candidate: Candidate) -> tuple[float, float, int]:
    """What candidates are ordered by: the least likely by chance first."""
    return candidate.chance, -candidate.strength, candidate.label


def stand_out(values: Array) -> tuple[Array, Array]:
    """How far each of some numbers lies above the others, and how likely that is by chance.

    The generalized extreme Studentized deviate test: the largest few, up to a fifth, are taken away one by one, each is
    compared with what is left, and the last that stands out makes all larger ones stand out. Every number is then
    compared with those that do not.

    Args:
        values: Numbers (K,), at least four.

    Returns:
        Distances in standard deviations (K,), and the chance of each (K,), from 0 to 1.

    Example:
        >>> distances, chances = stand_out(np.array([1.0, 1.1, 0.9, 1.2, 0.8, 5.0]))
        >>> int(distances.argmax()), bool(chances[5] < 0.05 / 6), bool((chances[:5] < 0.05 / 6).any())
        (5, True, False)
    """
    count = len(values)
    order = np.argsort(-values)
    outliers = 0
    for taken in range(1, max(count // 5, 1) + 1):
        _, chance = _against(values[order[taken - 1]], values[order[taken:]])
        if chance * count <= FALSE_ALARMS:
            outliers = taken
    ordinary = order[outliers:]
    found = [_against(values[place], values[ordinary[ordinary != place]]) for place in range(count)]
    distances, chances = np.array(found).T
    return distances, chances


def at_any(chances: Sequence[float]) -> float:
    """The chance of as much at any of some layers, which depend on each other in a way that nobody knows.

    Cauchy's combination test (Liu and Xie 2020), truncated: a layer that says nothing at all is no evidence against.

    Args:
        chances: Of each layer.

    Returns:
        About the smallest times their number where one alone is small, about that one where all are.

    Example:
        >>> round(at_any([0.001, 0.5]), 4), round(at_any([0.001, 0.001]), 4)
        (0.002, 0.001)
    """
    total = sum(1 / math.tan(math.pi * min(max(chance, np.finfo(float).tiny), 0.99)) for chance in chances)
    return math.atan2(len(chances), total) / math.pi


def _against(value: float, null: Array) -> tuple[float, float]:
    """Distance of a number from others in their standard deviations, and its chance, by Student's t."""
    freedom, variance = len(null) - 1, float(null.var(ddof=1))
    moderated = (_WEIGHT * _SPREAD**2 + freedom * variance) / (_WEIGHT + freedom)
    beyond, tiny = value - float(null.mean()), np.finfo(float).tiny
    found = []
    for square, degrees in ((variance, freedom), (moderated, _WEIGHT + freedom)):
        distance = beyond / math.sqrt(max(square, tiny))
        found.append((float(special.stdtr(degrees, -distance / math.sqrt(1 + 1 / len(null)))), distance))
    chance, distance = max(found)
    return distance, chance


def _candidates(
    layer: str, pooled: Array, indices: Integers, predicted: Integers, labels: Integers
) -> Iterator[Candidate]:
    """One candidate for each label at one layer, with the chance of this one alone."""
    features = pooled.reshape(len(pooled), -1)
    scale = features.std(0)
    scale[scale == 0] = np.inf  # a channel that never varies says nothing
    features = (features - features.mean(0)) / scale
    fold, half = _folds(predicted, _FOLDS), _folds(predicted, 2)
    scores = np.empty((len(features), len(labels)))
    for number in range(_FOLDS):
        fit, read = fold != number, fold == number
        scores[read] = _read(features, fit, read, predicted, labels)
    distances, chances = stand_out(np.log(_separations(scores, predicted, labels)))
    weights = np.stack([_directions(features[half != one], predicted[half != one], labels) for one in (0, 1)])
    final = np.where(half[:, None] == 0, features @ weights[0], features @ weights[1])
    for place, label in enumerate(labels.tolist()):
        mine = predicted == label
        beyond = np.quantile(final[~mine, place], 0.95)
        order = np.argsort(-final[:, place])
        carriers = order[mine[order] & (final[order, place] > beyond)]
        others = np.flatnonzero(~mine)
        yield Candidate(
            label=label,
            layer=layer,
            strength=float(distances[place]),
            chance=float(chances[place]),
            weights=(weights[:, :, place] / scale).reshape(2, *pooled.shape[1:]),
            typical=pooled[~mine].mean(0),
            carriers=tuple(indices[carriers].tolist()),
            halves=tuple(half[carriers].tolist()),
            sample=tuple(indices[others[:: max(len(others) // 32, 1)]].tolist()),
        )


def _read(
    features: Array, fit: NDArray[np.bool_], read: NDArray[np.bool_], predicted: Integers, labels: Integers
) -> Array:
    """Scores of held-out images, (images, labels), in standard deviations of those that were fitted."""
    weights = _directions(features[fit], predicted[fit], labels)
    known = features[fit] @ weights
    spread = known.std(0)
    scores: Array = (features[read] @ weights - known.mean(0)) / np.where(spread > 0, spread, 1)
    return scores


def _directions(features: Array, predicted: Integers, labels: Integers) -> Array:
    """Linear discriminants of each label against all others, (features, labels), with a shrunk common covariance."""
    means = np.stack([features[predicted == label].mean(0) for label in labels])
    counts = np.array([(predicted == label).sum() for label in labels])[:, None]
    known = np.isin(predicted, labels)
    centered = features[known] - means[np.searchsorted(labels, predicted[known])]
    size = features.shape[1]
    covariance = centered.T @ centered / max(len(centered) - len(labels), 1)
    ridge = _SHRINKAGE * max(np.trace(covariance) / size, np.finfo(float).tiny)
    covariance = (1 - _SHRINKAGE) * covariance + ridge * np.eye(size)
    total = (counts * means).sum(0)
    others = (total - counts * means) / (counts.sum() - counts)
    directions: Array = np.linalg.solve(covariance, (means - others).T)
    return directions


def _separations(scores: Array, predicted: Integers, labels: Integers) -> Array:
    """How far the images of each label lie beyond those of the others, (labels,)."""
    high = np.stack([np.quantile(scores[predicted == label], _REACHED, axis=0) for label in labels])
    found = np.empty(len(labels))
    for place, label in enumerate(labels):
        mine = predicted == label
        middle = np.median(scores[~mine, place])
        others = np.sort(np.delete(high[:, place], place))[:-1]
        reach = max(math.sqrt(np.square(np.maximum(others - middle, 0)).mean()), 1e-3)
        found[place] = max(float(np.quantile(scores[mine, place], _CARRIED) - middle) / reach, 1e-2)
    return found


def _folds(predicted: Integers, count: int) -> Integers:
    """One of so many folds for each image, each label's images dealt out in turn."""
    fold = np.empty(len(predicted), dtype=np.int64)
    for label in np.unique(predicted):
        mine = np.flatnonzero(predicted == label)
        fold[np.random.default_rng(label).permutation(mine)] = np.arange(len(mine)) % count
    return fold


def _thinned(indices: Integers, predicted: Integers, labels: Integers) -> tuple[Integers, Integers]:
    """At most so many images of each label that all scores fit in memory, evenly spread."""
    most = max(_NUMBERS // len(labels) ** 2, 2 * _ENOUGH)
    kept = []
    for label in np.unique(predicted):
        mine = np.flatnonzero(predicted == label)
        kept.append(mine[np.arange(min(len(mine), most)) * len(mine) // min(len(mine), most)])
    chosen = np.sort(np.concatenate(kept))
    return indices[chosen], predicted[chosen]


def _pooled(shards: Shards, layer: str, indices: Integers) -> Array:
    """Mean and maximum of the channels of a layer for images in order, (N, 2, C)."""
    parts, places = [], []
    for _, table in shards.each("channels"):
        chosen = table.filter(pc.equal(table["layer"], layer))
        chosen = chosen.filter(pc.is_in(chosen["index"], pa.array(indices)))
        if chosen.num_rows:
            both = [np.stack(chosen[name].to_pylist()) for name in ("mean", "maximum")]
            parts.append(np.stack(both, 1))
            places.append(np.searchsorted(indices, chosen["index"].to_numpy()))
    pooled = np.concatenate(parts).astype(np.float64)
    ordered = np.empty_like(pooled)
    ordered[np.concatenate(places)] = pooled
    return np.nan_to_num(ordered, posinf=0, neginf=0)
