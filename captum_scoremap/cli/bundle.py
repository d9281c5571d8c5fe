"""An explanation as one folder that can be filed: pictures, arrays, residuals, versions and the command."""

import hashlib
import importlib.metadata
import json
import platform
import shlex
import shutil
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import typer
from torch import nn

from captum_scoremap import __version__
from captum_scoremap.cli.explanation import Explanation
from captum_scoremap.data.pictures import SAMPLE_PREFIX

MANIFEST = "manifest.json"
_PACKAGES = ("captum", "numpy", "pillow", "timm", "torch", "torchvision")


class Bundle:
    """A folder under way; it is removed unless its manifest, which comes last, was written.

    Args:
        folder: The folder, which must not exist or be empty.

    Raises:
        ValueError: There is something in it, or it cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self._existed = folder.exists()
        try:
            folder.mkdir(exist_ok=True)
            occupied = any(folder.iterdir())
        except OSError as error:
            raise ValueError(
                f"--bundle must be a folder that can be made, got {str(folder)!r}: {error.strerror}."
            ) from error
        if occupied:
            raise ValueError(f"--bundle must be a new or empty folder, got {str(folder)!r}. Name another one.")
        self.folder = folder
        self._complete = False

    def __enter__(self) -> "Bundle":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove what a failed run has written."""
        if self._complete:
            return
        for path in self.folder.iterdir():
            path.unlink()
        if not self._existed:
            shutil.rmtree(self.folder)

    def write(
        self,
        context: typer.Context,
        network: nn.Module,
        explanations: Sequence[Explanation],
        left_out: Sequence[ValueError] = (),
    ) -> None:
        """Write the manifest, from which the run can be checked and repeated.

        Args:
            context: The command, with the values of all its options.
            network: The network that was explained.
            explanations: What was found, in the order of the pictures.
            left_out: Why other images could not be explained.
        """
        files = sorted(path for path in self.folder.iterdir() if path.is_file())
        settings = {name: _plain(value) for name, value in context.params.items() if name != "bundle"}
        manifest = {
            "command": _command(context),
            "settings": settings,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "versions": {
                "captum_scoremap": __version__,
                "python": platform.python_version(),
                "platform": platform.platform(),
                **{name: _version(name) for name in _PACKAGES},
            },
            "network_sha256": _fingerprint(network),
            "images": {name: _image(name) for name in dict.fromkeys(one.image for one in explanations)},
            "left_out": [str(reason) for reason in left_out],
            "explanations": [_numbers(one) for one in explanations],
            "files": {path.name: _sha256(path) for path in files},
        }
        text = json.dumps(manifest, indent=2, ensure_ascii=False)
        (self.folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
        self._complete = True


def _numbers(explanation: Explanation) -> dict[str, Any]:
    """S = A·Y + B at every layer, in logits; residuals as fractions."""
    return {
        "image": explanation.image,
        "label": explanation.label,
        "target": explanation.target,
        "contrast": explanation.contrast,
        "score": explanation.score,
        "placeless": explanation.placeless,
        "layers": [
            {
                "layer": row.layer,
                "size": list(row.size),
                "sum": row.total,
                "bias": row.bias,
                "residual": row.residual,
                "placeless": row.placeless,
            }
            for row in explanation.layers
        ],
    }


def _command(context: typer.Context) -> str:
    """Return the command line, with the options that were given."""
    words = [*context.command_path.split()]
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        value = context.params.get(parameter.name or "")
        if source is None or source.name != "COMMANDLINE":
            continue
        if parameter.param_type_name == "argument":
            words += [str(one) for one in (value if isinstance(value, (list, tuple)) else [value])]
        elif isinstance(value, bool):
            words.append((parameter.opts if value else parameter.secondary_opts)[0])
        else:
            words += [parameter.opts[0], str(_plain(value))]
    return shlex.join(words)


def _plain(value: Any) -> Any:
    """Return a value as JSON has it."""
    value = getattr(value, "value", value)  # of an enumeration
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value if isinstance(value, (bool, int, float, str)) or value is None else str(value)


def _image(name: str) -> dict[str, str | None]:
    """Return the sum of a file's bytes; samples come with a package."""
    return {"sha256": None if name.startswith(SAMPLE_PREFIX) else _sha256(Path(name))}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@torch.no_grad()
def _fingerprint(network: nn.Module) -> str:
    """Return a sum of all parameters and buffers with their names."""
    total = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            total.update(plain.numpy().tobytes())
    return total.hexdigest()
