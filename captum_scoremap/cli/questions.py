"""What a command is asked about an image: why this label's score, why this and not that, why what a function gives."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_scoremap.models import LoadedModel
from captum_scoremap.models.loading import imported
from captum_scoremap.scores import Target, are_single, logits_in, shape_or_type

__all__ = ["Question", "example_target", "questions", "score_function"]

_BEST = "top:1"


@dataclass(frozen=True)
class Question:
    """Why has this image its score for this label, for this label rather than that, or by this function?

    Attributes:
        label: Name of the label or labels, or of the function.
        score: What is explained: index of the label, or a function from the model's output to (N,); None for a model
            that gives one number.
        target: Index of the label; None for a function or a single number.
        contrast: Index of the label whose score is taken off; None for none.
    """

    label: str
    score: Target
    target: int | None = None
    contrast: int | None = None


def questions(
    score: str | None, target: str | None, contrast: str | None, loaded: LoadedModel
) -> Callable[[nn.Module, Tensor], list[Question]]:
    """Return what is to be asked of each image, given the network and the image as it takes it.

    Args:
        score: ``module:function``; None to ask for labels.
        target: Name or index of a label, or ``top:N``; None for the label that scores highest.
        contrast: Name or index of the label whose score is taken off; None for none.
        loaded: The model.

    Returns:
        From the network and an image (1, C, H, W) to the questions.

    Raises:
        ValueError: Function or labels are not what they must be.
    """
    if score is not None:
        question = Question(score, score_function(score, target=target, contrast=contrast))
        return lambda network, inputs: [question]

    def of_label(index: int, other: int | None) -> Question:
        name = loaded.label_name(index)
        if other is None:
            return Question(name, index, index)
        return Question(
            f"{name} − {loaded.label_name(other)}",
            lambda output: logits_in(output)[:, index] - logits_in(output)[:, other],
            index,
            other,
        )

    def of_image(network: nn.Module, inputs: Tensor) -> list[Question]:
        output = _scores(network, inputs)
        if target is contrast is None and are_single(output, len(inputs)):
            return [Question("score", None)]
        scores = _label_scores(output, loaded.name)
        loaded.check_labels(scores.shape[1])
        targets = _targets(target or _BEST, scores, loaded)
        if contrast is None:
            return [of_label(index, None) for index in targets]
        other = _label_index("contrast", contrast, scores, loaded)
        if targets == [other]:
            raise ValueError(
                f"contrast must be another label than the target, got {loaded.label_name(other)} for both. "
                "Name another one."
            )
        return [of_label(index, other) for index in targets if index != other]

    return of_image


def score_function(name: str | None, **labels: str | None) -> Callable[[Any], Tensor] | None:
    """Return the function whose value is explained, where the user named one.

    Args:
        name: ``module:function``, or None.
        **labels: Values of the options that name labels, which mean nothing beside a function.

    Returns:
        The function; None without a name.

    Raises:
        ValueError: There is no such function, or a label is named as well.

    Example:
        >>> score_function("captum_scoremap.scores:logits_in").__name__
        'logits_in'
    """
    if name is None:
        return None
    given = [f"--{option}" for option, value in labels.items() if value is not None]
    if given:
        raise ValueError(f"{' and '.join(given)} must be left out with --score; the function says what is meant.")
    return imported("score", name)


def example_target(score: str | None, network: nn.Module, inputs: Tensor, name: str) -> Target:
    """Return a target for which what is computed is the same as for all others: where any label will do.

    Args:
        score: ``module:function``; None for a label.
        network: The network.
        inputs: Images (N, C, H, W).
        name: What the model is called, for messages.

    Returns:
        The function; None where the network gives one number an image; else the first label.

    Raises:
        ValueError: The network gives no scores, and no function says what is meant.
    """
    if score is not None:
        return score_function(score)
    scores = _scores(network, inputs)
    if are_single(scores, len(inputs)):
        return None
    _label_scores(scores, name)
    return 0


@torch.no_grad()
def _scores(network: nn.Module, inputs: Tensor) -> Any:
    """Return what the network gives images, without the rest of its output."""
    return logits_in(network(inputs))


def _label_scores(scores: Any, name: str) -> Tensor:
    """Return what a network gives, where it is the scores of all labels, (N, K).

    Args:
        scores: What it gives.
        name: What the model is called, for messages.

    Returns:
        The scores.

    Raises:
        ValueError: It is something else.
    """
    if not isinstance(scores, Tensor) or scores.ndim != 2:
        raise ValueError(
            f"model must give scores (N, K), one per label, got {shape_or_type(scores)} from {name}. "
            "Say by --score what of it is meant."
        )
    return scores


def _label_index(option: str, label: str, scores: Tensor, loaded: LoadedModel) -> int:
    """Return the place of a label that an option names among the scores."""
    index = loaded.label_index(label)
    if index >= scores.shape[1]:
        raise ValueError(f"{option} must be less than {scores.shape[1]}, the number of labels, got {index}.")
    return index


def _targets(target: str, scores: Tensor, loaded: LoadedModel) -> list[int]:
    """Return the indices of the labels that an option names on one image."""
    labels = scores.shape[1]
    best = re.fullmatch(r"top:(\d+)", target)
    if best is None:
        return [_label_index("target", target, scores, loaded)]
    if not 1 <= int(best[1]) <= labels:
        raise ValueError(f"target must be top:1 to top:{labels}, got {target!r}.")
    return [int(index) for index in scores[0].topk(int(best[1])).indices]
