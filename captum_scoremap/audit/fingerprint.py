"""What a model or a score function computes, as a short text: the same text, the same results.

A function is known by its code, not by its name alone: what it was made with (closures, defaults, attributes) and what
it reads of its module count, and so do functions of the user's that it calls. Code of installed packages goes by name.
"""

import functools
import hashlib
import sysconfig
import types
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["code_fingerprint", "fingerprint", "weights_fingerprint"]

_INSTALLED = tuple({str(Path(sysconfig.get_path(name))) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, type(Ellipsis))
# what PyTorch keeps in a module besides the user's attributes
_OF_PYTORCH = frozenset(vars(nn.Module()))


def fingerprint(value: object) -> str:
    """Return a text that differs where a model or a function may compute something else.

    Args:
        value: A module, a function, a partial function, a callable object, or what these hold.

    Returns:
        16 hexadecimal digits; the same in every process of one version of Python.

    Example:
        >>> def times(factor):
        ...     return lambda output: factor * output
        >>> fingerprint(times(2)) == fingerprint(times(2)), fingerprint(times(2)) == fingerprint(times(3))
        (True, False)
    """
    digest = _Digest()
    digest.add(value)
    return digest.text


def weights_fingerprint(module: nn.Module) -> str:
    """Return a text that differs where a module has other parts or other weights.

    Args:
        module: The module.

    Returns:
        16 hexadecimal digits; the same everywhere.

    Example:
        >>> weights_fingerprint(nn.ReLU()) == weights_fingerprint(nn.ReLU())
        True
    """
    digest = _Digest()
    digest.add_weights(module)
    return digest.text


def code_fingerprint(module: nn.Module) -> str:
    """Return a text that differs where a module of the user's may do something else with the same weights.

    Args:
        module: The module.

    Returns:
        16 hexadecimal digits; the same in every process of one version of Python.

    Example:
        >>> code_fingerprint(nn.Linear(2, 3)) == code_fingerprint(nn.Linear(2, 3))
        True
    """
    digest = _Digest()
    digest.add_code_of(module)
    return digest.text


class _Digest:
    """Takes values in, each object once."""

    def __init__(self) -> None:
        self.hash = hashlib.sha256()
        self._seen: dict[int, tuple[int, object]] = {}  # number and the object, which keeps its identity

    @property
    def text(self) -> str:
        """All that was taken in, as a short text."""
        return self.hash.hexdigest()[:16]

    def add(self, value: Any) -> None:
        """Take in a value and what it is made of."""
        if isinstance(value, _PLAIN):
            self._note(type(value).__name__, repr(value))
            return
        if id(value) in self._seen:
            self._note("seen", str(self._seen[id(value)][0]))
            return
        self._seen[id(value)] = len(self._seen), value
        self._note(type(value).__module__, type(value).__qualname__)
        if isinstance(value, Tensor):
            self._add_numbers(value)
        elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
            self._note(str(value.dtype), str(value.shape))
            self.hash.update(np.ascontiguousarray(value).tobytes())
        elif isinstance(value, Mapping):
            for key, item in value.items():
                self.add(key)
                self.add(item)
        elif isinstance(value, Set):
            self._note(*sorted(map(repr, value)))
        elif isinstance(value, (list, tuple)):
            for item in value:
                self.add(item)
        elif isinstance(value, types.CodeType):
            self._add_code(value)
        elif isinstance(value, types.FunctionType):
            self._add_function(value)
        elif isinstance(value, types.MethodType):
            self.add(value.__func__)
            self.add(value.__self__)
        elif isinstance(value, functools.partial):
            self.add((value.func, value.args, value.keywords))
        elif isinstance(value, nn.Module):
            self.add_weights(value)
            self.add_code_of(value)
        elif isinstance(value, type):
            self._add_class(value)
        elif isinstance(value, (types.ModuleType, types.BuiltinFunctionType)):
            self._note(value.__name__)
        else:
            self._add_class(type(value))
            self.add(getattr(value, "__dict__", {}))

    def _note(self, *texts: str) -> None:
        for text in texts:
            self.hash.update(f"{len(text)}:{text}".encode())

    def _add_numbers(self, tensor: Tensor) -> None:
        self._note(str(tensor.dtype), str(tuple(tensor.shape)))
        plain = tensor.detach().cpu()
        if plain.is_quantized:
            plain = plain.dequantize()
        self.hash.update(plain.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())

    def _add_code(self, code: types.CodeType) -> None:
        self._note(code.co_code.hex(), *code.co_names, *code.co_varnames, *code.co_freevars)
        for constant in code.co_consts:
            self.add(constant)

    def _add_function(self, function: types.FunctionType) -> None:
        self._note(function.__module__ or "", function.__qualname__)
        self.add(function.__defaults__)
        self.add(function.__kwdefaults__)
        for cell in function.__closure__ or ():
            try:
                self.add(cell.cell_contents)
            except ValueError:  # a name that has no value yet
                self._note("empty")
        if not _is_installed(function.__code__):
            self.add(function.__code__)
            for name in _names_in(function.__code__):
                if name in function.__globals__:
                    self._note(name)
                    self.add(function.__globals__[name])

    def _add_class(self, kind: type) -> None:
        """Take in the functions of a class that is the user's."""
        for parent in kind.__mro__:
            self._note(parent.__module__, parent.__qualname__)
            for name, member in vars(parent).items():
                function = getattr(member, "__func__", getattr(member, "fget", member))
                if isinstance(function, types.FunctionType) and not _is_installed(function.__code__):
                    self._note(name)
                    self.add(function)

    def add_weights(self, module: nn.Module) -> None:
        """Take in the parts of a module and their weights."""
        self._note(str(module))
        for name, tensor in module.state_dict().items():
            self._note(name)
            self.add(tensor)

    def add_code_of(self, module: nn.Module) -> None:
        """Take in what a module does, and by which settings of its own."""
        for part in module.modules():
            self._add_class(type(part))
            for name, value in vars(part).items():
                if name not in _OF_PYTORCH and isinstance(value, _PLAIN):
                    self._note(name)
                    self.add(value)


def _is_installed(code: types.CodeType) -> bool:
    return code.co_filename.startswith((*_INSTALLED, "<frozen"))


def _names_in(code: types.CodeType) -> list[str]:
    """Return the names that a function and those inside it look up, among them its globals."""
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return [*code.co_names, *(name for one in inner for name in _names_in(one))]
