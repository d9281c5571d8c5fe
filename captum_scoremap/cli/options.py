"""Options that several sub-commands take, with one meaning everywhere."""

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer

ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="NAME",
        help="efficientnet_lite0, _lite1 or _lite2, torchvision:NAME, timm:NAME, transformers:NAME (or a folder) or "
        "module.path:callable, a function of yours that returns the model.",
    ),
]
WeightsOption = Annotated[
    str,
    typer.Option(
        "--weights",
        "-w",
        metavar="W",
        help="default, none (random), the name of torchvision weights, or a state-dict file.",
    ),
]
ImageSizeOption = Annotated[
    int | None,
    typer.Option(
        "--image-size",
        metavar="PIXELS",
        min=1,
        help="Side of the square that the model sees. \\[default: the model's own]",
        show_default=False,
    ),
]
ScoreOption = Annotated[
    str | None,
    typer.Option(
        "--score",
        metavar="MODULE:FUNCTION",
        help="Explain what a function makes of the model's output, one number an image, not a label's score.",
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option("--device", metavar="D", help="auto (a CUDA GPU if there is one), cpu, cuda:1, mps, ..."),
]


PICTURE_FORMATS = (".png", ".pdf", ".svg")


class DType(str, Enum):
    """Floating-point types to compute in."""

    float32 = "float32"
    float64 = "float64"
    bfloat16 = "bfloat16"
    float16 = "float16"

    @property
    def torch(self) -> torch.dtype:
        """The type as PyTorch knows it."""
        dtype: torch.dtype = getattr(torch, self.value)
        return dtype


DTypeOption = Annotated[DType, typer.Option("--dtype", metavar="T", help="float32, float64, bfloat16 or float16.")]
PrepareOption = Annotated[
    bool,
    typer.Option(
        "--prepare/--no-prepare",
        help="Explain a faster copy of the model, its batch norms folded; or the model as it is.",
    ),
]
CompileOption = Annotated[
    bool | None,
    typer.Option(
        "--compile/--no-compile",
        help="Compile what computes the maps, which takes a minute or more at first. \\[default: where it pays]",
        show_default=False,
    ),
]


def names_in(text: str | None) -> list[str]:
    """Return the names of a list that the user typed, ``A,B,...``.

    Args:
        text: The list; None for none.

    Returns:
        The names, without the spaces around them.

    Example:
        >>> names_in("layer3, layer4")
        ['layer3', 'layer4']
    """
    return [] if text is None else [name.strip() for name in text.split(",") if name.strip()]


def chosen_device(name: str) -> torch.device:
    """Return the device that the user named; a CUDA device is made to compute in full precision.

    Args:
        name: ``auto`` or what `torch.device` takes.

    Returns:
        The device.

    Raises:
        ValueError: There is no such device on this machine.

    Example:
        >>> chosen_device("cpu")
        device(type='cpu')
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device must be one of this machine, got {name!r}: {reason}") from error
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # it keeps 10 bits, and sums would be exact to a thousandth only
    return device


def check_suffix(option: str, path: Path, known: Sequence[str]) -> None:
    """Raise unless the name of a file says a format that can be written.

    Args:
        option: The option that named the file.
        path: The file.
        known: Suffixes of the formats.

    Raises:
        ValueError: It ends in none of them.
    """
    if path.suffix.lower() not in known:
        raise ValueError(f"--{option} must end in {', '.join(known)}, got {str(path)!r}.")


def check_writable(path: Path) -> None:
    """Raise unless a file can be written at ``path``; called before the work starts.

    Args:
        path: Where a result will go. A file that is there already is left as it is.

    Raises:
        ValueError: The folder does not exist, or the file cannot be opened for writing.
    """
    existed = path.exists()
    try:
        with path.open("ab"):
            pass
    except OSError as error:
        raise ValueError(f"output must be a path that can be written, got {str(path)!r}: {error.strerror}.") from error
    if not existed:
        path.unlink()
