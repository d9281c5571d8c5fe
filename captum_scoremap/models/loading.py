"""Load a classifier whole: network, weights, preprocessing and the names of its labels."""

import importlib
import inspect
import math
import pickle
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torchvision.models import WeightsEnum, get_model, get_model_builder, get_model_weights, list_models
from torchvision.transforms import InterpolationMode

from captum_scoremap.checks import check_visible, nearest
from captum_scoremap.data.extras import import_extra
from captum_scoremap.models import efficientnet_lite
from captum_scoremap.models.hugging_face import load_transformers
from captum_scoremap.models.loaded import LoadedModel, readable_download, seeded
from captum_scoremap.models.preprocessing import IMAGENET_MEAN, Preprocessing

DEFAULT_MODEL = efficientnet_lite.NAMES[0]
_ZOOS = ("torchvision", "timm", "transformers")


def load_model(
    name: str = DEFAULT_MODEL,
    weights: str = "default",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    image_size: int | None = None,
) -> LoadedModel:
    """Load a model of a zoo, or one that your own function returns.

    Args:
        name: ``efficientnet_lite0`` or ``efficientnet_lite1`` (ImageNet weights from installed packages,
            no download), ``torchvision:NAME``, ``timm:NAME``, ``transformers:NAME_OR_FOLDER``, an image classifier of
            Hugging Face's, or ``module.path:callable``, called without arguments, which returns a module or a whole
            `LoadedModel`. Of a module alone the preprocessing is ImageNet's, for as many channels as its first
            convolution takes.
        weights: ``default`` (the zoo's own; of a callable, what it returns), ``none`` (random, seed 0), the
            name of a torchvision weights enum or of a timm tag, or the path of a state dict (loaded with
            ``weights_only=True``).
        device: Where to put it.
        dtype: Floating-point type of parameters and buffers.
        image_size: Side of the square that it sees, in pixels; None for its own.

    Returns:
        The model in eval mode, with its preprocessing and labels.

    Raises:
        ValueError: Model or weights of this name do not exist, or do not fit each other; or images of this size would
            have more pixels than Pillow holds for safe.
        TypeError: The callable returns something else than a module, or a compiled or scripted one.
        ModuleNotFoundError: An optional package is missing; the message names the extra.

    Example:
        >>> from PIL import Image
        >>> model = load_model("torchvision:squeezenet1_1", weights="none")
        >>> model.module(model.preprocessing(Image.new("RGB", (640, 480)))[None]).shape
        torch.Size([1, 1000])
    """
    largest = math.isqrt(Image.MAX_IMAGE_PIXELS or sys.maxsize)
    if image_size is not None and not 1 <= image_size <= largest:  # before a model is made for it
        raise ValueError(
            f"image_size must be from 1 to {largest} pixels, got {image_size}. Larger ones take gigabytes."
        )
    source, _, rest = name.partition(":")
    path = _weights_file(weights)
    wanted = "none" if path else weights
    if name in efficientnet_lite.NAMES:
        model = _load_efficientnet_lite(name, wanted)
    elif source == "torchvision" and rest:
        model = _load_torchvision(rest, wanted)
    elif source == "timm" and rest:
        model = _load_timm(rest, wanted, image_size)
    elif source == "transformers" and rest:
        model = load_transformers(rest, wanted)
    elif rest:
        model = _load_callable(source, rest, "default" if path else weights)
    else:
        raise ValueError(
            f"model must be {' or '.join(efficientnet_lite.NAMES)}, torchvision:NAME, timm:NAME, "
            f"transformers:NAME_OR_FOLDER or module.path:callable, got {name!r}.{_nearest_model(name)}"
        )
    model = replace(model, name=name)
    check_visible(model.module, "model")
    if path:
        _load_file(model, path)
    if any(tensor.is_meta for tensor in model.module.state_dict().values() if isinstance(tensor, Tensor)):
        raise ValueError(f"model must have numbers in its tensors, got {name} on the meta device. Load its weights.")
    if image_size is not None:
        model = replace(model, preprocessing=model.preprocessing.sized(image_size))
    return replace(model, module=model.module.eval().to(device=device, dtype=dtype))


def _nearest_model(name: str) -> str:
    """Return suggestions for a name without a source; bare torchvision names and folders are the most common slips."""
    if name in list_models():
        return f" Did you mean 'torchvision:{name}'?"
    if Path(name, "config.json").is_file():
        return f" Did you mean 'transformers:{name}'?"
    return nearest(name, efficientnet_lite.NAMES)


def _weights_file(weights: str) -> Path | None:
    """Return the path, where ``weights`` is one rather than a name."""
    path = Path(weights)
    if path.is_file():
        return path
    if path.suffix in {".pt", ".pth", ".bin", ".ckpt"} or len(path.parts) > 1:
        raise ValueError(f"weights must be a name or a state-dict file, got {weights!r}: no such file.")
    return None


def _load_efficientnet_lite(name: str, weights: str) -> LoadedModel:
    if weights not in {"default", "none"}:
        raise ValueError(f"weights of {name} must be default, none or a state-dict file, got {weights!r}.")
    with seeded():
        module = efficientnet_lite.build(name)
    if weights == "default":
        module.load_state_dict(efficientnet_lite.packaged_weights(name))
    return LoadedModel(name, module, efficientnet_lite.preprocessing(name), imagenet_labels())


def imagenet_labels() -> tuple[str, ...]:
    """Return the names of the 1000 ImageNet labels, which torchvision's weights carry.

    Returns:
        The names, in the usual order.

    Example:
        >>> imagenet_labels()[285]
        'Egyptian cat'
    """
    return tuple(torchvision.models.ResNet50_Weights.DEFAULT.meta["categories"])


def _load_torchvision(name: str, weights: str) -> LoadedModel:
    known = list_models()
    if name not in known:
        raise ValueError(f"torchvision model must exist, got {name!r}.{nearest(name, known)}")
    enum = get_model_weights(name)
    entry = _torchvision_weights(name, enum, weights)
    # Preprocessing and labels are those of the default weights where the weights themselves bring none.
    described = entry or enum["DEFAULT"]
    # Detection and segmentation models download a trained backbone unless told not to.
    has_backbone = "weights_backbone" in inspect.signature(get_model_builder(name)).parameters
    backbone = {"weights_backbone": None} if has_backbone else {}
    with seeded(), warnings.catch_warnings():
        # googlenet and inception_v3 announce a change of their random initialization.
        warnings.filterwarnings("ignore", "The default weight initialization", FutureWarning)
        with readable_download(name):
            module = get_model(name, weights=entry, **backbone)
    preprocessing = _from_preset(name, described.transforms())
    return LoadedModel(name, module, preprocessing, tuple(described.meta["categories"]))


def _torchvision_weights(name: str, enum: type[WeightsEnum], weights: str) -> WeightsEnum | None:
    """Return the entry of the enum that ``weights`` names; None for random weights."""
    if weights == "none":
        return None
    wanted = weights.rpartition(".")[2]
    wanted = "DEFAULT" if wanted == "default" else wanted
    if wanted not in enum.__members__:
        known = ["default", "none", *(entry.name for entry in enum)]
        raise ValueError(f"weights of {name} must be one of {', '.join(known)} or a file, got {weights!r}.")
    return enum[wanted]


def _from_preset(name: str, preset: Any) -> Preprocessing:
    """Return the preprocessing as in torchvision's preset, where that is one for single images."""
    if not hasattr(preset, "resize_size") or len(preset.resize_size) != 1:
        raise ValueError(f"model must take one image, got {name}, which takes {type(preset).__name__} input.")
    crop = getattr(preset, "crop_size", [None])[0]
    return Preprocessing(preset.resize_size[0], crop, tuple(preset.mean), tuple(preset.std), preset.interpolation)


def _load_timm(name: str, weights: str, image_size: int | None) -> LoadedModel:
    timm = import_extra("timm", "demo")
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        raise ValueError(f"timm model must exist, got {architecture!r}.{nearest(architecture, timm.list_models())}")
    if weights not in {"default", "none"}:
        name = f"{architecture}.{weights}"
        if name not in timm.list_models(f"{architecture}.*", pretrained=True):
            tags = [known.partition(".")[2] for known in timm.list_models(f"{architecture}.*", pretrained=True)]
            known = ", ".join(["default", "none", *tags])
            raise ValueError(f"weights of {architecture} must be one of {known} or a file, got {weights!r}.")
    with seeded(), readable_download(name):
        try:
            sized = {} if image_size is None else {"img_size": image_size}
            module = timm.create_model(name, pretrained=weights != "none", **sized)
        except TypeError:  # one that takes images of any size is not told theirs
            module = timm.create_model(name, pretrained=weights != "none")
    config = timm.data.resolve_model_data_config(module)
    side = config["input_size"][-1]
    preprocessing = Preprocessing(
        resize=int(side / config["crop_pct"]),
        crop=side,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=InterpolationMode(config["interpolation"]),
    )
    labels = imagenet_labels() if getattr(module, "num_classes", None) == 1000 else ()
    return LoadedModel(name, module, preprocessing, labels)


def _load_callable(module_path: str, attribute: str, weights: str) -> LoadedModel:
    """Return what a function of the user returns: a module, or a whole `LoadedModel`."""
    name = f"{module_path}:{attribute}"
    if weights != "default":
        raise ValueError(f"weights of {name} must be default or a state-dict file, got {weights!r}.")
    build = imported("model", name)
    _check_without_arguments(build, name)
    with seeded():
        built = build()
    if isinstance(built, LoadedModel):
        return built
    if not isinstance(built, nn.Module):
        raise TypeError(f"{name} must return a torch.nn.Module or a LoadedModel, got {type(built).__name__}.")
    first = next((module for module in built.modules() if isinstance(module, nn.Conv2d)), None)
    channels = first.in_channels if first is not None else len(IMAGENET_MEAN)
    return LoadedModel(name, built, Preprocessing().for_channels(channels))


def _check_without_arguments(build: Callable[..., Any], name: str) -> None:
    try:
        signature = inspect.signature(build)
    except ValueError:  # some functions written in C have none
        return
    try:
        signature.bind()
    except TypeError as error:
        raise ValueError(
            f"model must be a function that is called without arguments, got {name!r}: {error}. "
            "Write one that calls it."
        ) from None


def imported(what: str, name: str) -> Callable[..., Any]:
    """Return the function that a user names.

    Args:
        what: What it is for, for messages.
        name: ``module:function``.

    Returns:
        The function.

    Raises:
        ValueError: There is no such module, it raises something, or there is no such function in it.
        ModuleNotFoundError: The module imports another one that is not there.
    """
    module_path, _, attribute = name.partition(":")
    if not all(map(str.isidentifier, module_path.split("."))):
        dotted = ".".join(Path(module_path.removesuffix(".py")).parts)
        hint = f" Did you mean '{dotted}:{attribute}'?" if module_path and Path(module_path).exists() else ""
        raise ValueError(f"{what} must be module.path:function, got {name!r}.{hint}")
    try:
        module = importlib.import_module(module_path)
    except ModuleNotFoundError as error:
        if error.name is None or not module_path.startswith(error.name):
            raise
        raise ValueError(
            f"{what} must be importable, got {name!r}: there is no module {error.name!r}.{nearest(error.name, _ZOOS)}"
        ) from None
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        where = traceback.extract_tb(error.__traceback__)[-1]
        at = "" if isinstance(error, SyntaxError) else f" ({Path(where.filename).name}, line {where.lineno})"
        said = f": {error}" if str(error) else ""
        raise ValueError(
            f"{what} must be importable, got {name!r}, which raises {type(error).__name__}{said}{at}."
        ) from error
    found = getattr(module, attribute, None)
    if isinstance(found, nn.Module):
        raise ValueError(
            f"{what} must name a function, got {name!r}, a {type(found).__name__} itself. Name one that returns it."
        )
    if not callable(found):
        hint = f" It is a {type(found).__name__}." if hasattr(module, attribute) else nearest(attribute, vars(module))
        raise ValueError(f"{what} must name a callable, got {name!r}.{hint}")
    return found  # type: ignore[no-any-return]


def _load_file(model: LoadedModel, path: Path) -> None:
    """Put the state dict of a file into the model."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of whatever kind the bytes of another file lead to
        raise ValueError(
            f"weights must be a state dict saved by torch.save, got {str(path)!r}: {_unloadable(error)}."
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ValueError(
            f"weights must be a state dict (name -> tensor), got {str(path)!r}, a {type(loaded).__name__}."
        )
    nn.modules.utils.consume_prefix_in_state_dict_if_present(loaded, "module.")
    _check_fit(model.module.state_dict(), loaded, model.name, path)
    model.module.load_state_dict(loaded)


def _unloadable(error: Exception) -> str:
    """Return why a file holds no weights; what PyTorch says of it advises to run the code in it."""
    if isinstance(error, (RuntimeError, OSError)):
        return str(error).splitlines()[0].rstrip(".")
    if isinstance(error, pickle.UnpicklingError) and "Unsupported global" in str(error):
        return "it holds more than tensors, such as a whole model; save model.state_dict()"
    return "the file is empty, cut off, or of another kind"


def _check_fit(own: dict[str, Tensor], loaded: dict[str, Tensor], name: str, path: Path) -> None:
    """Raise, with the first name of each kind, unless the file has exactly the tensors of the model."""
    wrong_shape = [key for key in own if key in loaded and own[key].shape != loaded[key].shape]
    faults = (
        ("missing", [key for key in own if key not in loaded]),
        ("unknown", [key for key in loaded if key not in own]),
        ("of another shape", wrong_shape),
        ("with NaN", [key for key in own if key in loaded and bool(loaded[key].isnan().any())]),
    )
    found = [f"{len(keys)} {kind} ({_first(keys)})" for kind, keys in faults if keys]
    if found:
        raise ValueError(f"weights must fit {name}, got {str(path)!r}: {', '.join(found)} of {len(own)} tensors.")


def _first(keys: Sequence[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{keys[0]}, ..."
