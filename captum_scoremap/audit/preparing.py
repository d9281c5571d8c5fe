"""What it changes that a prepared copy of the model is explained: measured on the first images of an audit.

Folding a norm into a convolution changes how sums round. A unit that lies within rounding of an edge of its activation
(zero and six of a ReLU6, where saturated units lie exactly) may then fall on the edge's other side. Its value, and with
it the score, is the same but for rounding, but its mask differs, and so do A and B at the layers below. S = A·Y + B
is exact for the model whose masks are held: the copy.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from captum_scoremap.audit.explaining import MapLayer, explain
from captum_scoremap.copies import copied
from captum_scoremap.tape import freeze

__all__ = ["Prepared", "compare_prepared"]


@dataclass(frozen=True)
class Prepared:
    """How a prepared copy differs from its model.

    Attributes:
        images: Number of images on which it was measured.
        switches: Masks and switches of these images.
        flipped: How many of them differ.
        score: Largest difference of the predicted label's score, in logits.
        sub_scores: Largest difference of its A·Y at one of the layers, in logits.
    """

    images: int
    switches: int
    flipped: int
    score: float
    sub_scores: float

    def __str__(self) -> str:
        return (
            f"norms folded: {self.flipped} of {self.switches} masks and switches of the first {self.images} images "
            f"differ, scores by up to {self.score:.1e} logits, A·Y of a layer by up to {self.sub_scores:.1e}"
        )


def compare_prepared(
    model: nn.Module, prepared: nn.Module, layers: Sequence[MapLayer], inputs: Tensor
) -> Prepared | None:
    """Measure what preparing a model changed.

    Args:
        model: The model as it was.
        prepared: Its copy, in eval mode.
        layers: Layers that both have.
        inputs: Images (N, C, H, W), on the device of ``prepared``.

    Returns:
        The differences; None if no norm was folded.
    """
    kinds = {name: type(module) for name, module in model.named_modules()}
    if all(type(module) is kinds.get(name) for name, module in prepared.named_modules()):
        return None
    original = copied(model).eval().to(inputs.device)
    unknown = torch.full((len(inputs),), -1, device=inputs.device)
    one, other = (explain(network, layers, inputs, unknown) for network in (original, prepared))
    usable = one.finite & other.finite
    images = int(usable.sum())
    if not images:
        return Prepared(0, 0, 0, 0.0, 0.0)
    one, other, inputs = one.take(usable), other.take(usable), inputs[usable]
    label = one.labels[:, :1]
    of_scores = (one.scores - other.scores).gather(1, label).abs()
    agree = other.labels[:, 0] == label[:, 0]
    changes = [(one.sums[layer.name] - other.sums[layer.name])[agree, 0].abs() for layer in layers]
    sub_scores = max((float(change.max()) for change in changes if len(change)), default=0.0)
    mine, others = (freeze(network, inputs).switches for network in (original, prepared))
    pairs = [(mine[name], others[name]) for name in mine.keys() & others.keys()]
    pairs = [(first, second) for first, second in pairs if first.shape == second.shape]
    switches = sum(first.numel() for first, _ in pairs)
    flipped = sum(int((first != second).sum()) for first, second in pairs)
    return Prepared(images, switches, flipped, float(of_scores.max()), sub_scores)
