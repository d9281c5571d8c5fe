"""Which score is explained: from a model's output to one number for each image, and scores ready made.

``target`` is an index in any of Captum's forms, or a function from the model's output to (N,). The function is part of
the run that is explained, so that S = A·Y + B is exact for it as well: a region's mean logit, a similarity, the score
of one detection.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from captum_scoremap.checks import InvalidTypeError, InvalidValueError

__all__ = ["Label", "Target", "detection", "logits_in", "region_mean", "select_scores", "similarity"]

Label = int | np.integer[Any] | tuple[int, ...] | Callable[[Any], Tensor]


@dataclass(frozen=True)
class Positions:
    """Labels as a tensor whose numbers no code reads, so that they can be an argument of a graph.

    Attributes:
        flat: Where the score of each image is among all of its own, flattened, (N,) int64.
    """

    flat: Tensor


Target = (
    Label
    | Positions
    | Tensor
    | np.ndarray[Any, Any]
    | Sequence[int]
    | Sequence[np.integer[Any]]
    | Sequence[tuple[int, ...]]
    | None
)


def select_scores(output: Any, target: Target, images: int | None = None) -> Tensor:
    """Return the scores (N,) that a target selects from a model's output.

    Args:
        output: (N,), or (N, ...), or what holds that as its logits (see :func:`logits_in`); whatever the model returns,
            for a function.
        target: None if there is one score for each image; an int, a one-element tensor or a tuple of indices for all
            images; a list, tensor or array of N ints, or a list of N tuples, one for each; or a function of the whole
            output.
        images: How many images the model was given; None where that is not known.

    Returns:
        The scores, (N,).

    Raises:
        InvalidTypeError: If the output is no floating-point tensor, or the target has no known form.
        InvalidValueError: If the target is missing, out of range or of the wrong length, or there are neither a score
            for each image nor for several of them.

    Example:
        >>> select_scores(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), [0, 1])
        tensor([1., 4.])
        >>> select_scores({"age": torch.tensor([[31.0]])}, lambda output: output["age"][:, 0])
        tensor([31.])
    """
    if is_function(target):
        return _checked(target(output), images)
    output = logits_in(output)
    if not isinstance(output, Tensor) or not output.is_floating_point():
        got = f"a tensor of {output.dtype}" if isinstance(output, Tensor) else type(output).__name__
        advice = f"Name one by a function as target: lambda output: output{_way_to_scores(output)}[:, label]."
        if isinstance(output, (Tensor, np.ndarray)):
            advice = "Have the model return the scores that these were made of, as a tensor."
        raise InvalidTypeError(
            f"the model must return a floating-point tensor of scores, (N, ...), got {got}. {advice}"
        )
    if output.dim() == 0 and images == 1:
        return select_scores(output[None], target, images)
    if output.dim() == 0:
        raise InvalidValueError("the model must return a score for each image, (N, ...), got a single number.")
    count, sizes = output.shape[0], tuple(output.shape[1:])
    if images is not None and count and images % count and count % images:
        raise InvalidValueError(
            f"inputs must have a batch dimension, (N, ...), and the model must return a score for each image; got "
            f"{count} scores for {images} images. If that is one image, use inputs[None]."
        )
    if target is None:
        if output[0].numel() != 1:
            raise InvalidValueError(
                f"target must be given for a model that returns {tuple(output.shape)}, got None. Name a label."
            )
        return output.reshape(count)
    if isinstance(target, Positions):
        chosen: Tensor = output.reshape(count, -1).gather(1, target.flat[:, None])[:, 0]
        return chosen
    if isinstance(target, np.ndarray):
        target = torch.as_tensor(target)
    if isinstance(target, Tensor):
        if target.is_floating_point() or target.is_complex() or target.dtype is torch.bool:
            raise InvalidTypeError(f"target must hold integers, got {target.dtype}.")
        target = int(target) if target.numel() == 1 else target.long()
    if isinstance(target, np.integer):
        target = int(target)
    if isinstance(target, bool) or not isinstance(target, (int, tuple, list, Tensor)):
        raise InvalidTypeError(
            "target must be an int, a tuple, a list or a tensor of integers, or a function from the model's output to "
            f"(N,), got {type(target).__name__}."
        )
    if not sizes:
        raise InvalidValueError(
            f"target must be None for a model that returns one score for each image, ({count},); got "
            f"{target.tolist() if isinstance(target, Tensor) else target!r}. "
            "If these are the scores of one image, use inputs[None]."
        )
    if isinstance(target, (list, Tensor)):
        if len(target) != count:
            raise InvalidValueError(f"target must have one entry for each of the {count} images, got {len(target)}.")
        columns = _indices(target, sizes).to(output.device).unbind(1)
        place: tuple[Any, ...] = (torch.arange(count, device=output.device), *columns)
        return output[place]
    scores: Tensor = output
    for axis_index in reversed(_index(target, sizes)):
        scores = scores[..., axis_index]
    return scores


def _way_to_scores(output: Any) -> str:
    """Return how to get at the first floating-point tensor in what a model returns, as one would write it."""
    if isinstance(output, Mapping):
        parts = [(f"[{name!r}]", one) for name, one in output.items()]
    elif isinstance(output, (tuple, list)):
        parts = [(f"[{number}]", one) for number, one in enumerate(output)]
    elif hasattr(output, "__dataclass_fields__"):
        parts = [(f".{name}", getattr(output, name)) for name in output.__dataclass_fields__]
    else:
        return ""
    for way, one in parts:
        if isinstance(one, Tensor) and one.is_floating_point():
            return way
        if inner := _way_to_scores(one):
            return way + inner
    return ""


def logits_in(output: Any) -> Any:
    """Return the scores in a model's output: its logits, as the models of Hugging Face return them by name.

    Args:
        output: A tensor; or a mapping, dataclass or named tuple with ``logits``, ``logits_per_image`` as CLIP's, or a
            ``last_hidden_state`` (N, K) as PP-LCNet's; or anything.

    Returns:
        The tensor of that name; else the output as it is.

    Example:
        >>> logits_in({"loss": None, "logits": torch.tensor([[1.0, 2.0]])})
        tensor([[1., 2.]])
    """
    if isinstance(output, (Tensor, list)) or (isinstance(output, tuple) and not hasattr(output, "_fields")):
        return output
    for name in ("logits", "logits_per_image", "last_hidden_state"):
        found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(found, Tensor) and (name.startswith("logits") or found.dim() == 2):  # else maps or tokens
            return found
    return output


def shape_or_type(output: Any) -> str:
    """Return what errors say of a model's output: its shape if it is a tensor, else its type.

    Args:
        output: What :func:`logits_in` returned.

    Returns:
        The words.

    Example:
        >>> shape_or_type(torch.zeros(2, 3)), shape_or_type([])
        ('(2, 3)', 'list')
    """
    return str(tuple(output.shape)) if isinstance(output, Tensor) else type(output).__name__


def are_single(scores: Any, images: int) -> bool:
    """Return whether scores are one number for each image, (N,), rather than one for each label.

    Args:
        scores: What :func:`logits_in` returned.
        images: N.

    Returns:
        Whether they are.

    Example:
        >>> are_single(torch.zeros(2), 2), are_single(torch.zeros(2, 10), 2)
        (True, False)
    """
    return isinstance(scores, Tensor) and tuple(scores.shape) == (images,)


def is_function(target: object) -> TypeGuard[Callable[[Any], Tensor]]:
    """Return whether a target is a function of the model's output."""
    return callable(target) and not isinstance(target, Tensor)


def region_mean(mask: Tensor, label: int, key: str = "out") -> Callable[[Any], Tensor]:
    """Return the target "mean logit of a label in a region", for models of segmentation.

    Args:
        mask: The region, boolean or weights of at least 0, (H, W) for all images or (N, H, W). Where the model's map
            has another size, each of its cells counts by the share of it that is in the region.
        label: Channel of the map.
        key: Where the map is in an output that is a mapping.

    Returns:
        A function from the model's output, (N, K, h, w) or a mapping to it, to (N,), in logits.

    Raises:
        ValueError: If the mask is empty or no (H, W) or (N, H, W); by the function, if the output does not fit.

    Example:
        >>> from captum_scoremap import ScoreMap
        >>> model = torch.nn.Conv2d(3, 2, 3, padding=1).eval()
        >>> mask = torch.zeros(8, 8, dtype=torch.bool)
        >>> mask[2:6, 2:6] = True
        >>> ScoreMap(model).attribute(torch.rand(1, 3, 8, 8), target=region_mean(mask, label=1)).shape
        torch.Size([1, 3, 8, 8])
    """
    mask = torch.as_tensor(mask)
    if mask.dim() not in {2, 3}:
        raise ValueError(f"mask must be (H, W) or (N, H, W), got {tuple(mask.shape)}.")
    weights = mask.reshape(-1, 1, *mask.shape[-2:])
    if bool((weights < 0).any()) or not bool(weights.flatten(1).any(1).all()):
        raise ValueError("mask must mark a region in every image, with weights of at least 0; got one that does not.")

    def mean_in_region(output: Any) -> Tensor:
        logits = _entry(output, key)
        if logits.dim() != 4 or not -logits.shape[1] <= label < logits.shape[1]:
            raise ValueError(
                f"the model must return maps (N, K, h, w) of more than {label} labels, got {tuple(logits.shape)}."
            )
        if len(weights) not in {1, len(logits)}:
            raise ValueError(f"mask must be one, or one for each of the {len(logits)} images, got {len(weights)}.")
        own = weights.to(logits.device, logits.dtype)
        if own.shape[2:] != logits.shape[2:]:
            own = F.interpolate(own, size=logits.shape[2:], mode="area")
        share = own / own.sum((2, 3), keepdim=True)
        return (logits[:, label] * share[:, 0]).sum((1, 2))

    return mean_in_region


def similarity(embedding: Tensor, key: str = "image_embeds") -> Callable[[Any], Tensor]:
    """Return the target "cosine similarity with an embedding", for models that return embeddings.

    Times the temperature of a model as CLIP, it is the logit of the text that the embedding stands for.

    Args:
        embedding: (D,) for all images, or (N, D).
        key: Where the model's embedding is in an output that is a mapping.

    Returns:
        A function from the model's output, (N, D) or a mapping to it, to (N,), from -1 to 1.

    Raises:
        ValueError: If the embedding is zero or has another shape; by the function, if the output does not fit.

    Example:
        >>> from captum_scoremap import linear_form
        >>> model = torch.nn.Linear(4, 3).eval()
        >>> form = linear_form(model, torch.rand(2, 4), target=similarity(torch.tensor([1.0, 0.0, 0.0])))
        >>> bool(form.relative_residual.max() < 1e-5)
        True
    """
    if embedding.dim() not in {1, 2} or not bool(embedding.reshape(-1, embedding.shape[-1]).any(-1).all()):
        raise ValueError(f"embedding must be (D,) or (N, D) and not zero, got {tuple(embedding.shape)}.")
    direction = F.normalize(embedding.detach(), dim=-1)

    def cosine(output: Any) -> Tensor:
        own = _entry(output, key)
        count = len(direction) if direction.dim() == 2 else len(own)
        if own.dim() != 2 or tuple(own.shape) != (count, direction.shape[-1]):
            raise ValueError(
                f"the model must return embeddings (N, {direction.shape[-1]}), got {tuple(own.shape)} for an embedding "
                f"of {tuple(embedding.shape)}."
            )
        return (F.normalize(own, dim=-1) * direction.to(own)).sum(-1)

    return cosine


def detection(label: int, box: Sequence[float] | Tensor | None = None) -> Callable[[Any], Tensor]:
    """Return the target "class score of one detection", for object detectors.

    In each image it is the detection of the label that overlaps the box most, or scores highest. Which one that is
    is fixed at the image.

    Args:
        label: The label, as the model counts them.
        box: ``x0, y0, x1, y1``, for all images, in the model's units: pixels for torchvision's detectors, fractions of
            the image for DETR and its like. None for the detection that scores highest.

    Returns:
        A function from the model's output to (N,), in logits. The output is one mapping for each image with boxes,
        labels and probabilities "scores", as torchvision's detectors return: the logit of the probability. Or it is one
        mapping with "logits", (N, queries, K), and "pred_boxes" (N, queries, 4) as center, width and height.

    Raises:
        ValueError: If the box is no box; by the function, if there is no such detection.

    Example:
        >>> found = [{"boxes": torch.tensor([[0.0, 0.0, 4.0, 4.0], [4.0, 4.0, 8.0, 8.0]]),
        ...           "labels": torch.tensor([3, 3]), "scores": torch.tensor([0.9, 0.5])}]
        >>> detection(3)(found), detection(3, box=(4, 4, 7, 7))(found)
        (tensor([2.1972]), tensor([0.]))
    """
    region = None if box is None else torch.as_tensor(box, dtype=torch.float64).reshape(-1, 4)
    if region is not None and (len(region) != 1 or bool((region[:, 2:] <= region[:, :2]).any())):
        raise ValueError(f"box must be x0, y0, x1, y1 with x0 < x1 and y0 < y1, got {box!r}.")
    from torchvision.ops import box_convert, box_iou  # not what importing this package should cost

    def best(scores: Tensor, boxes: Tensor) -> int:
        fitness = scores if region is None else box_iou(boxes, region.to(boxes))[:, 0]
        return int(fitness.argmax())

    def score_of_detection(output: Any) -> Tensor:
        if isinstance(output, Mapping):
            logits, boxes = _entry(output, "logits"), _entry(output, "pred_boxes")
            if not 0 <= label < logits.shape[-1]:
                raise ValueError(f"label must be from 0 to {logits.shape[-1] - 1}, got {label}.")
            corners = box_convert(boxes, "cxcywh", "xyxy")
            pairs = zip(logits[..., label], corners, strict=True)
            return torch.stack([scores[best(scores, own)] for scores, own in pairs])
        return torch.stack([_detected(one, label, best) for one in output])

    return score_of_detection


def _detected(found: Mapping[str, Tensor], label: int, best: Callable[[Tensor, Tensor], int]) -> Tensor:
    """Return the logit of a detection in one image."""
    labels = found["labels"].tolist()
    places = [place for place, one in enumerate(labels) if one == label]
    if not places:
        raise ValueError(f"the model must find label {label} in every image, got {sorted(set(labels))} in one.")
    probability = found["scores"][places[best(found["scores"][places], found["boxes"][places])]]
    if not 0 < float(probability.detach()) < 1:
        raise ValueError("a detection must have a probability between 0 and 1, got a rounded one. Use float64.")
    return probability.logit()


def _entry(output: Any, key: str) -> Tensor:
    """A model's output, or what a mapping holds by a key."""
    if isinstance(output, Tensor):
        return output
    if not isinstance(output, Mapping) or not isinstance(output.get(key), Tensor):
        known = f" with {', '.join(map(str, output))}" if isinstance(output, Mapping) else ""
        raise ValueError(
            f"the model must return a tensor, or a mapping with {key!r}, got {type(output).__name__}{known}."
        )
    found: Tensor = output[key]
    return found


def _checked(scores: object, images: int | None) -> Tensor:
    """Return what a target function returned.

    Returns:
        The scores.

    Raises:
        InvalidTypeError: If they are no floating-point tensor.
        InvalidValueError: If they are not one number for each image.
    """
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        raise InvalidTypeError(
            f"a target function must return a floating-point tensor, one score for each image, got "
            f"{type(scores).__name__}."
        )
    if scores.dim() == 0 and images == 1:
        return scores.reshape(1)
    if scores.dim() != 1 or (images is not None and len(scores) != images):
        wanted = "(N,)" if images is None else f"({images},)"
        raise InvalidValueError(
            f"a target function must return one score for each image, {wanted}, got {tuple(scores.shape)}."
        )
    return scores


def _indices(target: Tensor | list[Any], sizes: tuple[int, ...]) -> Tensor:
    """Targets of all images as indices into their scores, (N, number of sizes), checked as :func:`_index` does."""
    if isinstance(target, Tensor) and len(target):
        for entry in (target[0], target.amin(0), target.amax(0)):  # not each: a metric has thousands
            _index(entry.tolist(), sizes)
    else:
        target = torch.tensor([_index(entry, sizes) for entry in target], dtype=torch.long)
    return target.reshape(-1, len(sizes))


def _index(entry: Any, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """One target as an index into an image's scores.

    Returns:
        The index.

    Raises:
        InvalidTypeError: If it holds something else than integers.
        InvalidValueError: If it has too many or too few entries or is out of range.
    """
    entries = tuple(entry) if isinstance(entry, (tuple, list)) else (entry,)
    try:
        index = tuple(operator.index(i) for i in entries)
    except TypeError:
        raise InvalidTypeError(f"target must hold integers, got {entry!r}.") from None
    if any(isinstance(i, bool) for i in entries):
        raise InvalidTypeError(f"target must hold integers, got {entry!r}.")
    if len(index) != len(sizes):
        raise InvalidValueError(
            f"target must have {len(sizes)} ind{'ex' if len(sizes) == 1 else 'ices'} for scores of shape (N, "
            f"{', '.join(map(str, sizes))}), got {entry!r}."
        )
    for i, size in zip(index, sizes, strict=True):
        if not -size <= i < size:
            raise InvalidValueError(f"target must be from 0 to {size - 1}, got {i}.")
    return index
