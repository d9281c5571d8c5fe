"""Settings of PyTorch that hold for the whole process, on all threads, made for as long as any of them needs it."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["as_written", "module_by_module", "plain_attention"]


class Shared:
    """A setting of the whole process: the first of all threads makes it, and the last undoes it.

    Example:
        >>> from contextlib import nullcontext
        >>> with Shared(nullcontext)():
        ...     pass
    """

    def __init__(self, setting: Callable[[], AbstractContextManager[None]]) -> None:
        self._setting, self._lock, self._count = setting, threading.Lock(), 0
        self._made: AbstractContextManager[None] | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Have it made inside the context."""
        with self._lock:
            if self._made is None:
                made = self._setting()
                made.__enter__()
                self._made = made
            self._count += 1
        try:
            yield
        finally:
            with self._lock:
                self._count -= 1
                if not self._count:
                    made, self._made = self._made, None
                    made.__exit__(None, None, None)


@contextmanager
def _without_fast_path() -> Iterator[None]:
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


# Run the modules inside PyTorch's transformer layers, not one kernel for all, nor on nested tensors.
module_by_module = Shared(_without_fast_path)
# Of the kernels of attention the plain one alone, which can be derived twice.
plain_attention = Shared(lambda: sdpa_kernel(SDPBackend.MATH))
# Compiled code as it was written.
as_written = Shared(lambda: torch.compiler.set_stance("force_eager"))
