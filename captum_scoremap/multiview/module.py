"""`MultiView`: a classifier of views of a fixed size scores images of any size."""

from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from captum_scoremap.multiview.families import divide, native_size, unknown_family
from captum_scoremap.multiview.geometry import Geometry, Pair, rows_and_columns
from captum_scoremap.multiview.heads import at_every_view
from captum_scoremap.multiview.sliding import Sliding, SumPooling, five_positions

Views = Literal["dense", "ten-crop"]


class MultiView(nn.Module):
    """Score images of any size by the mean score of all views of them (Section 2.1-2.2 of the paper).

    The convolutional part runs once on the whole image, a sliding layer moves the network's window over its
    last feature map, the fully-connected part scores every window, and a sum-pooling layer averages::

        S_c = 1/V * sum_v S_c(view v)

    All parts are layers, and sliding and sum-pooling are linear: score maps of any layer are exact.

    A window sees what the plain model sees on the crop that `view_boxes` gives. A crop cut out before the
    network differs in two ways: padded convolutions see zeros at its border where the image has pixels, and
    layers that look at the whole map (squeeze-and-excitation, instance norm) look at the crop alone. In a
    network without such layers, the scores of a view and of its crop are equal.

    Args:
        features: The convolutional part, from images ``(N, C, H, W)`` of any size to maps ``(N, C', h, w)``.
        head: The rest of the network, from a window ``(N, C', *window)`` to scores ``(N, K)``. Its layers run
            as convolutions where they can, with the same parameters. ``AdaptiveAvgPool2d`` at its start
            becomes part of the window; a head of layers unknown here runs on the windows of all views as one
            batch.
        window: Rows and columns of the map that the head takes; one number for a square.
        stride: Cells of the map between neighboring views, down and right; one number for both.
        views: ``"dense"``: all views at the stride. ``"ten-crop"``: the four corners and the center, also of
            the mirrored image; the layers then see a batch of ``2 N``, every image and its mirrored one.
        view_size: Height and width of a view, in pixels; default is the smallest image with a map as large as
            the window.

    Raises:
        TypeError: If `features` or `head` are no modules.
        ValueError: If `window`, `stride` or `views` are out of range, or `view_size` does not fit `window`.

    Example:
        >>> features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2))
        >>> head = nn.Sequential(nn.Flatten(), nn.Linear(4 * 3 * 3, 10))
        >>> multi_view = MultiView(features, head, window=3)
        >>> image = torch.rand(1, 1, 20, 30)
        >>> multi_view(image).shape
        torch.Size([1, 10])
        >>> multi_view.view_scores(image).shape
        torch.Size([1, 10, 7, 12])
        >>> multi_view.view_boxes(20, 30)[1]
        tensor([ 2,  0, 10,  8])
    """

    def __init__(
        self,
        features: nn.Module,
        head: nn.Module,
        window: int | Pair,
        stride: int | Pair = 1,
        *,
        views: Views = "dense",
        view_size: int | Pair | None = None,
    ) -> None:
        super().__init__()
        for name, part in (("features", features), ("head", head)):
            if not isinstance(part, nn.Module):
                raise TypeError(f"{name} must be a torch.nn.Module, got {type(part).__name__}.")
        self.window, self.stride = _pair("window", window), _pair("stride", stride)
        if views not in {"dense", "ten-crop"}:
            raise ValueError(f"views must be 'dense' or 'ten-crop', got {views!r}.")
        if views == "ten-crop" and self.stride != (1, 1):
            raise ValueError(f"stride must be 1 for views='ten-crop', got {stride}. Leave it out.")
        self.views: Views = views
        self.features = features
        self._view_size = None if view_size is None else _pair("view_size", view_size)
        if self._view_size is not None and (cells := self._geometry.map_size(self._view_size)) != self.window:
            raise ValueError(
                f"view_size must give a feature map as large as the window, {_times(self.window)}, got "
                f"{_times(self._view_size)} pixels, which give {_times(cells)}. Use window={cells}."
            )
        views_head, average = at_every_view(head, self.window)
        self.sliding = Sliding(self.window, self.stride, average=average, five=views == "ten-crop")
        self.head = views_head
        self.sum_pooling = SumPooling()
        for module in (self, self.sliding, self.sum_pooling):
            module.training = features.training

    @classmethod
    def from_classifier(
        cls,
        model: nn.Module,
        stride: int | Pair = 1,
        *,
        views: Views = "dense",
        view_size: int | Pair | None = None,
    ) -> "MultiView":
        """Make a classifier of torchvision or timm score images of any size.

        The layers are the model's own, under their own names in ``features`` and ``head``. That the score of
        an image as large as one view is the model's is checked here, on noise.

        Args:
            model: A convolutional classifier: torchvision's AlexNet, VGG, SqueezeNet, ResNet (ResNeXt, Wide
                ResNet), DenseNet, GoogLeNet, Inception3, ShuffleNetV2, RegNet, MobileNetV2, MobileNetV3,
                EfficientNet, MNASNet or ConvNeXt; or one of timm's that ends in global average pooling.
            stride: Cells of the last feature map between neighboring views.
            views: ``"dense"`` or ``"ten-crop"``.
            view_size: Height and width of the images the model was trained on, in pixels; default is what
                timm says of the model, else 299 for Inception3 and 224 for all others.

        Returns:
            The multi-view architecture of the model.

        Raises:
            TypeError: If `model` is no module.
            unknown_family: A ValueError, if the model's family is unknown, it does not take images of any
                size, or its scores are not reproduced.

        Example:
            >>> from torchvision.models import alexnet
            >>> multi_view = MultiView.from_classifier(alexnet().eval())
            >>> multi_view.view_scores(torch.rand(1, 3, 256, 300)).shape
            torch.Size([1, 1000, 2, 3])
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
        features, head = divide(model)
        size = native_size(model) if view_size is None else _pair("view_size", view_size)
        geometry = Geometry(features)
        try:
            window, _ = geometry.map_size(size), geometry.stride
        except ValueError as error:
            raise unknown_family(model, "that takes images of any size") from error
        multi_view = cls(features, head, window, stride, views=views)
        multi_view._view_size, multi_view._geometry = size, geometry
        if not _same_scores(multi_view, model):
            raise unknown_family(model, "whose layers run in their usual order")
        layers = set(model.modules())
        for module in multi_view.modules():
            if module not in layers and not module._parameters:
                module.training = model.training
        return multi_view

    @cached_property
    def _geometry(self) -> Geometry:
        return Geometry(self.features)

    @property
    def view_size(self) -> Pair:
        """Height and width of a view, in pixels; images must be at least this large."""
        if self._view_size is None:
            self._view_size = self._geometry.smallest_view(self.window)
        return self._view_size

    def forward(self, images: Tensor) -> Tensor:
        """Return the mean score of all views.

        Args:
            images: ``(N, C, H, W)``, at least one view large.

        Returns:
            Scores ``(N, K)``, in logits.
        """
        scores: Tensor = self.sum_pooling(self.view_scores(images))
        return scores

    def view_scores(self, images: Tensor) -> Tensor:
        """Return the score of every view.

        Args:
            images: ``(N, C, H, W)``, at least one view large.

        Returns:
            Scores ``(N, K, rows, cols)``, in logits; for ten crops ``(N, K, 2, 5)``, the second row of the
            mirrored image.

        Raises:
            ValueError: If `images` is no batch of images, or they are smaller than a view.
        """
        if images.ndim != 4:
            hint = "Use images[None]." if images.ndim == 3 else "Give a batch of images."
            raise ValueError(f"images must be a batch (N, C, H, W), got {tuple(images.shape)}. {hint}")
        ten = self.views == "ten-crop"
        maps = self._maps(torch.stack([images, images.flip(-1)], 1).flatten(0, 1) if ten else images)
        scores: Tensor = self.head(self.sliding(maps))
        return torch.cat([scores[::2], scores[1::2]], 2) if ten else scores

    def probabilities(self, images: Tensor, by: Literal["score", "view"] = "score") -> Tensor:
        """Return the probabilities of the labels; the largest is the predicted label's.

        Args:
            images: ``(N, C, H, W)``, at least one view large.
            by: ``"score"``: softmax of the mean score. ``"view"``: mean of the views' softmax.

        Returns:
            Probabilities ``(N, K)``.

        Raises:
            ValueError: If `by` is neither.
        """
        if by not in {"score", "view"}:
            raise ValueError(f"by must be 'score' or 'view', got {by!r}.")
        scores = self.view_scores(images)
        return scores.mean((-2, -1)).softmax(1) if by == "score" else scores.softmax(1).mean((-2, -1))

    def view_boxes(self, height: int, width: int) -> Tensor:
        """Return where the views of an image lie: the crops on which the plain model sees just these windows.

        A crop that would reach beyond the image ends with it: its feature map is as large all the same.

        Args:
            height: Height of the image, in pixels.
            width: Width of the image, in pixels.

        Returns:
            Integer ``x0, y0, x1, y1`` in pixels, ``(rows * cols, 4)``, row by row as in `view_scores`. For
            ten crops the last five are boxes of the image whose crops are to be mirrored.

        Raises:
            ValueError: If the image is smaller than a view.
        """
        if self._is_too_small((height, width)):
            raise self._too_small((height, width))
        cells = self._geometry.map_size((height, width))
        if self.views == "ten-crop":
            positions = five_positions(cells, self.window)
        else:
            rows, cols = (range(0, cells[a] - self.window[a] + 1, self.stride[a]) for a in (0, 1))
            positions = [(row, col) for row in rows for col in cols]
        starts = torch.tensor(positions) * torch.tensor(self._geometry.stride)
        ends = torch.minimum(starts + torch.tensor(self.view_size), torch.tensor([height, width]))
        boxes = torch.cat([starts, ends], 1)[:, [1, 0, 3, 2]]
        if self.views == "dense":
            return boxes
        mirrored = boxes.clone()
        mirrored[:, [0, 2]] = width - boxes[:, [2, 0]]
        return torch.cat([boxes, mirrored])

    def extra_repr(self) -> str:
        """Return the choice of views, for ``print``."""
        return f"views={self.views!r}"

    def _maps(self, images: Tensor) -> Tensor:
        size = (images.shape[2], images.shape[3])
        try:
            maps: Tensor = self.features(images)
        except RuntimeError as error:
            if isinstance(error, NotImplementedError) or not self._is_too_small(size):
                raise
            raise self._too_small(size) from error
        cells = rows_and_columns(maps)
        if cells[0] < self.window[0] or cells[1] < self.window[1]:
            raise self._too_small(size)
        return maps

    def _is_too_small(self, size: Pair) -> bool:
        return size[0] < self.view_size[0] or size[1] < self.view_size[1]

    def _too_small(self, size: Pair) -> ValueError:
        return ValueError(
            f"images must be at least one view large, {_times(self.view_size)} pixels, got {_times(size)}. "
            f"Enlarge them."
        )


def _same_scores(multi_view: MultiView, model: nn.Module) -> bool:
    """Tell whether a model's scores are those of its multi-view architecture, on one view of noise."""
    like, channels = next(model.parameters()), multi_view._geometry.channels
    noise = torch.randn((1, channels, *multi_view.view_size), generator=torch.Generator().manual_seed(0))
    modes = {module: module.training for module in [*model.modules(), *multi_view.modules()]}
    try:
        for module in modes:
            module.training = False
        with torch.no_grad():
            image = noise.to(like)
            expected, got = model(image), multi_view.view_scores(image)[:, :, 0, 0]
    finally:
        for module, training in modes.items():
            module.training = training
    tolerance = max(1e-3, 8 * torch.finfo(like.dtype).eps)
    return torch.allclose(got, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def _pair(name: str, value: int | Pair) -> Pair:
    pair = tuple(value) if isinstance(value, tuple | list) else (value, value)
    if len(pair) != 2 or not all(isinstance(number, int) and number > 0 for number in pair):
        raise ValueError(f"{name} must be a positive integer or a pair of them, got {value!r}.")
    return pair[0], pair[1]


def _times(pair: Pair) -> str:
    return f"{pair[0]} x {pair[1]}"
