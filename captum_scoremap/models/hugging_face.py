"""Image classifiers of Hugging Face's ``transformers``, with their image processor and label names."""

import warnings
from typing import Any

import numpy as np
from PIL import Image
from torchvision.transforms import InterpolationMode

from captum_scoremap.data.extras import import_extra
from captum_scoremap.models.loaded import LoadedModel, readable_download, seeded
from captum_scoremap.models.preprocessing import Preprocessing

__all__ = ["load_transformers"]

# The mean difference from the processor's own tensor, in fractions of white, that resampling may make.
_RESAMPLING = 0.02
_MODES = {
    0: InterpolationMode.NEAREST,
    1: InterpolationMode.LANCZOS,
    2: InterpolationMode.BILINEAR,
    3: InterpolationMode.BICUBIC,
}


def load_transformers(name: str, weights: str) -> LoadedModel:
    """Load an image classifier by its name on the hub, or from a folder that ``save_pretrained`` wrote.

    Args:
        name: Name or folder.
        weights: ``default``, or ``none`` for random ones, seed 0.

    Returns:
        The model, its preprocessing as its image processor's, its labels as its configuration names them.

    Raises:
        ValueError: There is none of this name, or it is no image classifier, or its image processor does something
            that :class:`Preprocessing` cannot.
    """
    transformers = import_extra("transformers", "transformers")
    if weights not in {"default", "none"}:
        raise ValueError(f"weights of {name} must be default, none or a state-dict file, got {weights!r}.")
    with seeded(), readable_download(name, "a folder that save_pretrained wrote"):
        config = transformers.AutoConfig.from_pretrained(name)
        known = transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
        if type(config) not in known:
            raise ValueError(f"model must be an image classifier, got {name}, which is a {config.model_type}.")
        kind = transformers.AutoModelForImageClassification
        module = kind.from_config(config) if weights == "none" else kind.from_pretrained(name)
    labels = tuple(config.id2label[index] for index in sorted(config.id2label))
    named = any(label != f"LABEL_{index}" for index, label in enumerate(labels))
    return LoadedModel(name, module, _preprocessing(transformers, name, config), labels if named else ())


def _preprocessing(transformers: Any, name: str, config: Any) -> Preprocessing:
    """What the model's image processor does, held to what that makes of a picture."""
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError):
        size = getattr(config, "image_size", None)
        side = size if isinstance(size, int) else 224
        warnings.warn(
            f"{name} has no image processor (preprocessor_config.json): its images are taken as ImageNet's, {side} x "
            f"{side}. Save one beside the model: processor.save_pretrained(folder).",
            stacklevel=4,
        )
        return Preprocessing(resize=(side, side), crop=None).for_channels(getattr(config, "num_channels", 3))
    found = _translated(processor.to_dict())
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8))
    picture = picture.resize((480, 360), Image.Resampling.BICUBIC)
    expected = processor(images=picture, return_tensors="pt")["pixel_values"][0]
    own = found(picture)
    if own.shape != expected.shape or float((own - expected).abs().mean()) * min(found.std) > _RESAMPLING:
        raise ValueError(
            f"image processor must resize, cut and normalize, got {type(processor).__name__} of {name}, which does "
            "something else. Return a LoadedModel from a function of yours, with a subclass of Preprocessing."
        )
    return found


def _translated(settings: dict[str, Any]) -> Preprocessing:
    """The settings of an image processor by other names."""
    size, cut = settings.get("size") or {}, settings.get("crop_size") or {}
    resize: int | tuple[int, int]
    crop = cut.get("height") if settings.get("do_center_crop") else None
    if "shortest_edge" in size:
        side: int = size["shortest_edge"]
        share = settings.get("crop_pct")
        if share and side < 384:  # as ConvNeXt's: the size is that of the part that is cut out
            resize, crop = int(side / share), side
        else:
            resize = (side, side) if share else side
    else:
        resize = (size.get("height", 224), size.get("width", 224))
    normalizes = settings.get("do_normalize", True)
    return Preprocessing(
        resize=resize,
        crop=crop,
        mean=tuple(settings["image_mean"]) if normalizes else (0.0, 0.0, 0.0),
        std=tuple(settings["image_std"]) if normalizes else (1.0, 1.0, 1.0),
        interpolation=_MODES.get(int(settings.get("resample", 2)), InterpolationMode.BILINEAR),
    )
