"""Conditions under which an audit counts as failed, for a build pipeline: ``residual>1e-3``, ``accuracy<0.7``."""

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import pyarrow as pa

from captum_scoremap.audit.schema import TABLES
from captum_scoremap.checks import nearest

__all__ = ["Condition", "Failure", "failures", "parse_condition"]

_COMPARE: Mapping[str, Callable[[float, float], bool]] = MappingProxyType({
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
})
_SET = ("accuracy", "failed")
_OF_IMAGES = ("score", "probability", "contrast", "insertion", "deletion", "seconds")
_UNKNOWN: Mapping[str, str] = MappingProxyType({
    "accuracy": "Give true labels: --labels, a column label in the list, or folders named like labels.",
    "insertion": "Ask for it: --metrics insertion.",
    "deletion": "Ask for it: --metrics deletion.",
    "region_share": "Give boxes or masks: columns x0, y0, x1, y1 or mask in the list.",
    "region_area": "Give boxes or masks: columns x0, y0, x1, y1 or mask in the list.",
})
_OF_LAYERS = tuple(field.name for field in TABLES["layers"] if field.name not in {"index", "layer"})


@dataclass(frozen=True)
class Condition:
    """One condition.

    Attributes:
        name: What is looked at: ``accuracy``, ``failed`` (images that could not be audited), or a column of the tables
            ``images`` or ``layers``.
        comparison: One of ``>``, ``<``, ``>=``, ``<=``.
        limit: The number it is compared with.
    """

    name: str
    comparison: str
    limit: float

    def holds(self, value: float) -> bool:
        """Return whether a value meets the condition."""
        return _COMPARE[self.comparison](value, self.limit)

    def __str__(self) -> str:
        return f"{self.name}{self.comparison}{self.limit:g}"


@dataclass(frozen=True)
class Failure:
    """A condition that holds, or one of which nothing is known.

    Attributes:
        condition: The condition.
        value: The value that meets it: of the whole set, or the worst of an image; None where no value is known.
        images: Names of the images that it is about.
    """

    condition: Condition
    value: float | None
    images: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.value is None:
            why = _UNKNOWN.get(self.condition.name, "No image was audited.")
            return f"{self.condition} cannot be evaluated: no image has a known {self.condition.name}. {why}"
        return f"{self.condition} holds: {self.condition.name} is {self.value:.4g}"


def parse_condition(text: str) -> Condition:
    """Read a condition.

    Args:
        text: A name, one of ``>``, ``<``, ``>=``, ``<=``, and a number.

    Returns:
        The condition.

    Raises:
        ValueError: If it is not of that form, or there is nothing of that name.

    Example:
        >>> parse_condition("residual > 1e-3")
        Condition(name='residual', comparison='>', limit=0.001)
    """
    known = (*_SET, *_OF_IMAGES, *_OF_LAYERS)
    found = re.fullmatch(r"\s*(\w+)\s*(>=|<=|>|<)\s*(\S+)\s*", text)
    try:
        limit = float(found[3]) if found else float("nan")
    except ValueError:
        limit = float("nan")
    if found is None or limit != limit:
        raise ValueError(
            f"a condition must be a name, one of > < >= <=, and a number, got {text!r}. Try residual>1e-3."
        )
    if found[1] not in known:
        raise ValueError(f"a condition must be about {', '.join(known)}, got {found[1]!r}.{nearest(found[1], known)}")
    return Condition(found[1], found[2], limit)


def failures(conditions: Sequence[Condition], images: pa.Table, layers: pa.Table, last: str) -> list[Failure]:
    """Find the conditions that hold, and those that cannot be evaluated.

    A number of the whole set names the images that make it so: ``accuracy`` those predicted wrongly, ``failed`` those
    that could not be audited. A number of an image names the images that meet the condition. The residual is looked at
    in every layer, anything else of a layer in the last one.

    Args:
        conditions: The conditions.
        images: The table ``images``.
        layers: The table ``layers``.
        last: Name of the last layer.

    Returns:
        A failure for each condition that holds, or for which no value is known.
    """
    names = dict(zip(images["index"].to_pylist(), images["name"].to_pylist(), strict=True))
    found = (_failure(condition, images, layers, last, names) for condition in conditions)
    return [failure for failure in found if failure is not None]


def _failure(
    condition: Condition, images: pa.Table, layers: pa.Table, last: str, names: Mapping[int, str]
) -> Failure | None:
    if condition.name in _SET:
        return _failure_of_set(condition, images)
    if condition.name in _OF_IMAGES:
        pairs = zip(images["index"].to_pylist(), images[condition.name].to_pylist(), strict=True)
        known = [(index, value) for index, value in pairs if value is not None]
    else:
        columns = zip(*(layers[name].to_pylist() for name in ("index", "layer", condition.name)), strict=True)
        known = [
            (index, value)
            for index, layer, value in columns
            if value is not None and (layer == last or condition.name == "residual")
        ]
    if not known:
        return Failure(condition, None)
    met = [(index, value) for index, value in known if condition.holds(value)]
    if not met:
        return None
    worst = max if condition.comparison.startswith(">") else min
    value = worst(value for _, value in met)
    return Failure(condition, value, tuple(names[index] for index in dict.fromkeys(index for index, _ in met)))


def _failure_of_set(condition: Condition, images: pa.Table) -> Failure | None:
    column = images["error" if condition.name == "failed" else "correct"].to_pylist()
    if condition.name == "failed":
        value: float | None = sum(error is not None for error in column)
        culprits = [error is not None for error in column]
    else:
        known = [correct for correct in column if correct is not None]
        value = sum(known) / len(known) if known else None
        culprits = [correct is False for correct in column]
    if value is None:
        return Failure(condition, None)
    if not condition.holds(value):
        return None
    named = zip(images["name"].to_pylist(), culprits, strict=True)
    return Failure(condition, value, tuple(name for name, culprit in named if culprit))
