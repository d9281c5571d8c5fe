"""What a model expects of its input image: size, mean, standard deviation; and the way back to a picture."""

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import CenterCrop, InterpolationMode, Normalize, Resize, ToTensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """PIL image in, normalized tensor (C, H, W) out.

    Attributes:
        resize: Length of the shorter side after resizing, in pixels.
        crop: Side of the square cut out of the middle, in pixels; None keeps the whole image.
        mean: What is subtracted from each channel, which before is a fraction of white in 0 to 1.
        std: What each channel is divided by, after that.
        interpolation: How pixels are resampled.

    Example:
        >>> preprocessing = Preprocessing(resize=256, crop=224)
        >>> preprocessing(Image.new("RGB", (640, 480))).shape
        torch.Size([3, 224, 224])
    """

    resize: int = 256
    crop: int | None = 224
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: InterpolationMode = InterpolationMode.BILINEAR

    def __call__(self, image: Image.Image) -> Tensor:
        """Return the tensor (C, H, W) that the model takes, float32."""
        resized = self._resized(image)
        return self._normalized(resized if self.crop is None else CenterCrop(self.crop)(resized))

    def whole(self, image: Image.Image) -> Tensor:
        """Return the same without the crop, (C, H, W): every part of the image, at the scale of training."""
        return self._normalized(self._resized(image))

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
        scale = min(size) / self.resize
        starts = [max(0.0, (side - self.crop * scale) / 2) for side in size]
        x0, y0 = (round(start) for start in starts)
        x1, y1 = (round(side - start) for side, start in zip(size, starts, strict=True))
        return x0, y0, x1, y1

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

    def _resized(self, image: Image.Image) -> Image.Image:
        resized: Image.Image = Resize(self.resize, self.interpolation)(image)
        return resized

    def _normalized(self, image: Image.Image) -> Tensor:
        normalized: Tensor = Normalize(self.mean, self.std)(ToTensor()(image))
        return normalized
