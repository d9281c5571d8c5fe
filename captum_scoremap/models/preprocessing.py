"""What a model expects of its input image: size, mean, standard deviation; and the way back to a picture."""

from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import CenterCrop, InterpolationMode, Normalize, Resize, ToTensor

from captum_scoremap.data.pictures import UnreadableError, to_rgb

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# PIL's name of the colors that so many channels hold
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


@dataclass(frozen=True)
class Preprocessing:
    """PIL image in, normalized tensor (C, H, W) out.

    Attributes:
        resize: Length of the shorter side after resizing, in pixels; or height and width, whatever the image's.
        crop: Side of the square cut out of the middle, in pixels; None keeps the whole image.
        mean: What is subtracted from each channel, which before is a fraction of white in 0 to 1. One channel is gray,
            three are red, green and blue, four have opacity as well.
        std: What each channel is divided by, after that.
        interpolation: How pixels are resampled.

    Example:
        >>> preprocessing = Preprocessing(resize=256, crop=224)
        >>> preprocessing(Image.new("RGB", (640, 480))).shape
        torch.Size([3, 224, 224])
    """

    resize: int | tuple[int, int] = 256
    crop: int | None = 224
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: InterpolationMode = InterpolationMode.BILINEAR

    def __call__(self, image: Image.Image) -> Tensor:
        """Return the tensor (C, H, W) that the model takes, float32.

        Args:
            image: A picture of any mode.

        Returns:
            The tensor.

        Raises:
            ValueError: Resized, the picture would have more pixels than Pillow holds for safe, so narrow is it.
        """
        resized = self._resized(image)
        return self._normalized(resized if self.crop is None else CenterCrop(self.crop).forward(resized))

    def whole(self, image: Image.Image) -> Tensor:
        """Return the same without the crop, (C, H, W): every part of the image, at the scale of training."""
        return self._normalized(self._resized(image))

    def sized(self, side: int) -> "Preprocessing":
        """Return the same for images of another size.

        Args:
            side: Side in pixels of the square that the model is to see, or of the shorter side where nothing is cut.

        Returns:
            The same part of the image, larger or smaller.

        Example:
            >>> Preprocessing(resize=256, crop=224).sized(112).resize
            128
        """
        if isinstance(self.resize, tuple):
            return replace(self, resize=(side, side), crop=None if self.crop is None else side)
        if self.crop is None:
            return replace(self, resize=side)
        return replace(self, resize=round(self.resize * side / self.crop), crop=side)

    def for_channels(self, count: int) -> "Preprocessing":
        """Return the same for a model of another number of channels: the mean of what it was for all of them.

        Args:
            count: Channels.

        Returns:
            The preprocessing.

        Raises:
            ValueError: If no picture has so many channels.

        Example:
            >>> Preprocessing(mean=(0.4, 0.5, 0.6)).for_channels(1).mean
            (0.5,)
        """
        if count == len(self.mean):
            return self
        if count not in _MODES:
            raise ValueError(
                f"a model must take pictures of {', '.join(map(str, _MODES))} channels, got one of {count}. Return a "
                "LoadedModel whose preprocessing, a subclass of Preprocessing, makes such a tensor."
            )
        mean, std = (round(sum(values) / len(values), 4) for values in (self.mean, self.std))
        return replace(self, mean=(mean,) * count, std=(std,) * count)

    def box(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Return which part of a photograph the model sees, so that maps can be drawn on the photograph itself.

        Args:
            size: Width and height of the photograph in pixels, as ``PIL.Image.Image.size``.

        Returns:
            Pixels ``x0, y0, x1, y1`` of the photograph, ends excluded.

        Example:
            >>> Preprocessing(resize=256, crop=224).box((640, 480))
            (110, 30, 530, 450)
        """
        if self.crop is None:
            return (0, 0, *size)
        if isinstance(self.resize, tuple):
            scales = [side / resized for side, resized in zip(size, reversed(self.resize), strict=True)]
        else:
            scales = [min(size) / self.resize] * 2
        starts = [max(0.0, (side - self.crop * scale) / 2) for side, scale in zip(size, scales, strict=True)]
        x0, y0 = (round(start) for start in starts)
        x1, y1 = (round(side - start) for side, start in zip(size, starts, strict=True))
        return x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)  # of a picture of few pixels it is a part of one

    def picture(self, inputs: Tensor) -> Tensor:
        """Return what the model saw, to be looked at.

        Args:
            inputs: Normalized image, (C, H, W).

        Returns:
            The same pixels as fractions of white in 0 to 1, (C, H, W), on the CPU, float32.
        """
        pixels = inputs.detach().to("cpu", torch.float32)
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (pixels * std + mean).clamp(0.0, 1.0)

    # forward, not a call: this runs on a thread that reads ahead, and torch.fx, which takes the call of a module on any
    # thread for one of the model's, may be tracing the model meanwhile
    def _resized(self, image: Image.Image) -> Image.Image:
        mode = _MODES.get(len(self.mean), "RGB")
        if not (mode == "RGBA" and image.has_transparency_data):
            image = to_rgb(image)
        image = image if image.mode == mode else image.convert(mode)
        short, long = sorted(image.size)
        limit = Image.MAX_IMAGE_PIXELS
        if isinstance(self.resize, int) and limit is not None and self.resize**2 * long > limit * short:
            raise UnreadableError(
                f"{image.size[0]} x {image.size[1]} pixels are too long and narrow to be resized to {self.resize} at "
                "the shorter side; cut it first"
            )
        resized: Image.Image = Resize(self.resize, self.interpolation).forward(image)
        return resized

    def _normalized(self, image: Image.Image) -> Tensor:
        normalized: Tensor = Normalize(self.mean, self.std).forward(ToTensor()(image))
        return normalized
