"""The k best positions of a layer over any number of images, cut out of the images."""

import heapq
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou
from tqdm import tqdm

from captum_scoremap.attribution import CompleteScoreMap, LayerScoreMap, NeuronScoreMap
from captum_scoremap.checks import check_callable, check_layer
from captum_scoremap.layout import channel_dim_of
from captum_scoremap.patches.geometry import Box
from captum_scoremap.patches.pictures import Picture, Preprocess, Unreadable, batches, examples
from captum_scoremap.receptive_fields import ReceptiveField, receptive_field
from captum_scoremap.scores import is_function, logits_in, shape_or_type
from captum_scoremap.settings import module_by_module

__all__ = ["By", "Patch", "semantic_patches"]

By: TypeAlias = Literal["score_map", "complete_map", "gradient", "activation"]
Neuron: TypeAlias = tuple[nn.Module, int | tuple[int | slice, ...]]


_MANY = 9  # patches of a layer, as in Fig. 4


@dataclass(frozen=True, eq=False)
class Patch:
    """A region of an image that a high value of a layer comes from.

    Attributes:
        image: Position of the image in the sequence, or its path where it was given as one.
        target: Label whose score is meant; None for a function, the value of a neuron, and an activation.
        box: ``x0, y0, x1, y1`` in pixels of the original image, x1 and y1 exclusive.
        row: Row of the layer's cell.
        col: Column of the layer's cell.
        value: What the patch was chosen by: in logits by score map and complete map, in logits per unit of the
            layer's output by gradient, in units of that output by activation.
        pixels: The region, (C, H, W), in the resolution of the original image: uint8 of a file or PIL image, of
            a tensor as it was given.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval()
        >>> (patch,) = semantic_patches(model, model[1], torch.rand(1, 3, 8, 8), k=1, progress=False)
        >>> patch.image, patch.box == (patch.col, patch.row, patch.col + 3, patch.row + 3)
        (0, True)
    """

    image: int | Path
    target: int | None
    box: Box
    row: int
    col: int
    value: float
    pixels: Tensor


def semantic_patches(
    forward_func: Callable[..., Any],
    layer: nn.Module,
    images: Iterable[Picture],
    targets: int | Iterable[int | None] | Callable[[Any], Tensor] | None = None,
    by: By = "score_map",
    k: int | None = None,
    *,
    per_image: int = 1,
    size: int | tuple[int, int] | None = None,
    channel: int | None = None,
    neuron: Neuron | None = None,
    channel_dim: int | None = None,
    preprocess: Preprocess | None = None,
    batch_size: int = 16,
    progress: bool = True,
    on_unreadable: Unreadable | None = None,
) -> list[Patch]:
    """Find the image regions that the highest values of a layer come from (Yu et al. 2015, Section 4).

    The images pass through in batches, the next one read while the network computes, and only the k best patches so
    far are kept: memory does not grow with the number of images.

    Args:
        forward_func: The model in evaluation mode, or a function that calls it; gives scores (N, K).
        layer: The layer.
        images: Paths, PIL images, or tensors (C, H, W) as the network takes them; any iterable.
        targets: Label whose score is explained: one for all images, or one for each; or a function from the model's
            output to (N,), the score itself; None for the label that
            scores highest, or of a model that gives each image one score, (N,). For the patches of a single label,
            pass its images.
        by: ``"score_map"``: the score map M (SMSM). ``"complete_map"``: M plus every constant above the layer, at
            its place, so that the values of an image add up to its score. ``"gradient"``: the largest ``|A|`` of
            all channels (GSM), the saliency of Simonyan et al. 2013. ``"activation"``: the sum of Y over channels,
            whatever the label.
        k: Number of patches; None for 9, or as many as the images have where that is fewer.
        per_image: How many may come from one image; these do not overlap.
        size: Height and width of a patch in pixels of the network's input, around the center of the receptive
            field, shifted to lie inside the image; None for the receptive field itself.
        channel: Use this channel of the layer alone.
        neuron: Explain a neuron instead of a label: its layer, and its index in that layer's output without the
            batch dimension. ``layer`` lies below.
        channel_dim: Axis of the channels in the layer's output; None to find it by the shapes of layer and input.
        preprocess: From a PIL image to the network's input (C, H, W); may resize, crop, pad and mirror. Needed
            for paths and PIL images.
        batch_size: Images in one pass.
        progress: Whether to show a progress bar, where there is a terminal.
        on_unreadable: Called with path and reason of a file that is no image, which is then left out; None to
            raise.

    Returns:
        The patches, best first.

    Raises:
        TypeError: An image is of none of these kinds, or the layer is no module.
        ValueError: A number is out of range, there are more or fewer targets than images, ``preprocess`` is
            missing or does something else, or a file cannot be read.

    Warns:
        UserWarning: The images gave fewer than k patches.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval()
        >>> patches = semantic_patches(model, model[1], torch.rand(20, 3, 8, 8), k=5, progress=False)
        >>> len(patches), patches[0].pixels.shape
        (5, torch.Size([3, 3, 3]))
    """
    check_callable(forward_func)
    check_layer(forward_func, layer)
    if k is None:
        k = min(_MANY, max(per_image, 1) * len(images)) if isinstance(images, Sized) and len(images) else _MANY
    _check(images, targets, by, k, per_image, batch_size, channel, neuron)
    windows: dict[torch.Size, Tensor] = {}
    channels: dict[torch.Size, int] = {}
    function = targets if is_function(targets) else None
    given: Any = None if is_function(targets) else targets
    best: list[tuple[float, int, Patch]] = []  # a heap, the worst first, of equal values the latest
    found = 0
    pictures = tqdm(images, disable=None if progress else True, unit="image", leave=False)
    for batch in batches(examples(pictures, given, preprocess, on_unreadable, ahead=batch_size), batch_size):
        inputs = torch.stack([example.inputs for example in batch]).to(_device(forward_func))
        shape = inputs.shape[1:]
        if shape not in windows:
            channels[shape] = _channel_dim(forward_func, layer, inputs[:1]) if channel_dim is None else channel_dim
            with module_by_module():
                field = receptive_field(forward_func, layer, shape, channels[shape])
            windows[shape] = _windows(field, size)
        boxes = windows[shape]
        labels: list[int | None] = [example.target for example in batch]
        if function is None:
            labels = _labels(forward_func, inputs, labels, by, neuron)
        target: Any = function if function is not None or None in labels else labels
        values = _values(forward_func, layer, inputs, target, by, channel, neuron, channels[shape])
        maps = values.cpu().reshape(len(batch), *boxes.shape[:2])
        for example, label, value_map in zip(batch, labels, maps, strict=True):
            for row, col in _peaks(value_map, boxes, per_image):
                value = float(value_map[row, col])
                if len(best) == k and value <= best[0][0]:
                    break
                box, pixels = example.cut(tuple(boxes[row, col].tolist()))
                found += 1
                patch = Patch(example.name, label, box, row, col, value, pixels)
                push = heapq.heappush if len(best) < k else heapq.heappushpop
                push(best, (value, -found, patch))
    if len(best) < k:
        warnings.warn(
            f"the images gave {len(best)} patches, fewer than k = {k}. Pass more images or raise per_image.",
            stacklevel=2,
        )
    return [patch for _, _, patch in sorted(best, reverse=True)]


def _check(
    images: Iterable[Picture],
    targets: int | Iterable[int | None] | Callable[[Any], Tensor] | None,
    by: str,
    k: int,
    per_image: int,
    batch_size: int,
    channel: int | None,
    neuron: Neuron | None,
) -> None:
    """Refuse options that cannot be meant.

    Raises:
        ValueError: There is such an option.
    """
    if by not in get_args(By):
        raise ValueError(f"by must be one of {', '.join(get_args(By))}, got {by!r}.")
    for name, number in (("k", k), ("per_image", per_image), ("batch_size", batch_size)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}.")
    if neuron is not None and (targets is not None or by in {"activation", "complete_map"}):
        raise ValueError("neuron must come without targets, and by score_map or gradient: it stands for a label.")
    if by == "complete_map" and channel is not None:
        raise ValueError(f"channel must be left out by complete_map, which is of all channels, got {channel}.")
    if not isinstance(images, Sized):
        return
    if not len(images):
        raise ValueError("images must hold at least one, got none.")
    if k > per_image * len(images):
        raise ValueError(
            f"k must be at most {per_image * len(images)}, per_image of each of the {len(images)} images, got {k}. "
            "Lower k, pass more images or raise per_image."
        )
    if isinstance(targets, Collection) and len(targets) != len(images):
        raise ValueError(f"targets must be one label for each of the {len(images)} images, got {len(targets)}.")


def _device(forward_func: Callable[..., Any]) -> torch.device | None:
    """Return where the model is, if it says so."""
    parameters = forward_func.parameters() if isinstance(forward_func, nn.Module) else iter(())
    return next((parameter.device for parameter in parameters), None)


def _windows(field: ReceptiveField, size: int | tuple[int, int] | None) -> Tensor:
    """Return the boxes ``x0, y0, x1, y1`` of all cells in the network's input, (H, W, 4)."""
    if size is None:
        return field.boxes
    height, width = (size, size) if isinstance(size, int) else size
    rows, cols = field.input_size
    if not (0 < height <= rows and 0 < width <= cols):
        raise ValueError(f"size must be from 1 to the input's {rows} x {cols} pixels, got {height} x {width}.")
    cells = [[field.center(row, col) for col in range(field.boxes.shape[1])] for row in range(len(field.boxes))]
    corner = (torch.tensor(cells) - torch.tensor([width, height]) / 2).round().long()
    corner = corner.clamp(torch.tensor([0, 0]), torch.tensor([cols - width, rows - height]))
    return torch.cat([corner, corner + torch.tensor([width, height])], dim=-1)


def _labels(
    forward_func: Callable[..., Any],
    inputs: Tensor,
    targets: Sequence[int | None],
    by: By,
    neuron: Neuron | None,
) -> list[int | None]:
    """Return the label of each image: as it was given, else the one that scores highest; None for a single score."""
    if by == "activation" or neuron is not None:
        return [None] * len(targets)
    if None not in targets:
        return list(targets)
    with torch.no_grad():
        scores = logits_in(forward_func(inputs))
    if isinstance(scores, Tensor) and scores.shape == (len(inputs),) and set(targets) == {None}:
        return [None] * len(targets)
    if not isinstance(scores, Tensor) or scores.dim() != 2:
        raise ValueError(
            f"the model must return scores (N, K) where an image has no target, got {shape_or_type(scores)}. Pass as "
            "targets a function from the model's output to (N,)."
        )
    highest = scores.argmax(dim=1).tolist()
    return [best if target is None else target for target, best in zip(targets, highest, strict=True)]


def _values(
    forward_func: Callable[..., Any],
    layer: nn.Module,
    inputs: Tensor,
    target: Any,
    by: By,
    channel: int | None,
    neuron: Neuron | None,
    channel_dim: int,
) -> Tensor:
    """Return what the cells of the layer are ranked by, (N, H, W)."""
    multiply = by == "score_map"
    values: Tensor
    if by == "complete_map":
        complete: Tensor = CompleteScoreMap(forward_func, layer).attribute(inputs, target)
        return complete[:, 0]
    if by == "activation":
        values = _activations(forward_func, layer, inputs)
    elif neuron is not None:
        neuron_map = NeuronScoreMap(forward_func, neuron[0], multiply_by_inputs=multiply)
        values = neuron_map.attribute(inputs, neuron[1], to_layer=layer)
    else:
        layer_map = LayerScoreMap(forward_func, layer, multiply_by_inputs=multiply)
        values = layer_map.attribute(inputs, target, attr_dim_summation=False)
    if channel is not None:
        channels = values.shape[channel_dim]
        if not 0 <= channel < channels:
            raise ValueError(f"channel must be from 0 to {channels - 1}, got {channel}.")
        values = values.narrow(channel_dim, channel, 1)
    return values.abs().amax(channel_dim) if by == "gradient" else values.sum(channel_dim)


def _channel_dim(forward_func: Callable[..., Any], layer: nn.Module, image: Tensor) -> int:
    """Return the axis of the channels in the layer's output, by one more run."""
    return channel_dim_of(_activations(forward_func, layer, image).shape, image.shape)


def _activations(forward_func: Callable[..., Any], layer: nn.Module, inputs: Tensor) -> Tensor:
    """Return the output of a layer, of its last call, as it was before anything changed it in place."""
    outputs: list[Tensor] = []

    def keep(_: nn.Module, __: tuple[Any, ...], output: Tensor | tuple[Tensor]) -> None:
        (tensor,) = output if isinstance(output, tuple) else (output,)
        outputs[:] = [tensor.clone()]

    handle = layer.register_forward_hook(keep)
    try:
        with torch.no_grad(), module_by_module():
            forward_func(inputs)
    finally:
        handle.remove()
    return outputs[0]


def _peaks(values: Tensor, boxes: Tensor, count: int) -> Iterator[tuple[int, int]]:
    """The best cells of one image whose boxes do not overlap.

    Args:
        values: Of all cells, (H, W).
        boxes: Theirs, (H, W, 4).
        count: How many at most.

    Yields:
        Row and column, best first.
    """
    flat, values = boxes.flatten(0, 1).double(), values.flatten().double()
    values = values.where(flat[:, 2] > flat[:, 0], -torch.inf)  # some cells see nothing but padding
    for _ in range(count):
        best = int(values.argmax())
        if values[best] == -torch.inf:
            return
        yield divmod(best, boxes.shape[1])
        values[box_iou(flat, flat[best : best + 1])[:, 0] > 0] = -torch.inf
