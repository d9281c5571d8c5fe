"""Patches of PyTorch's classes that are in place only while a run, on whatever thread, listens to them."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

__all__ = ["Listeners"]

Listener = TypeVar("Listener")


class Listeners(Generic[Listener]):
    """Who listens to one patch on which thread: it is made for the first of all, and undone after the last."""

    def __init__(self, patch: Callable[[], None], undo: Callable[[], None]) -> None:
        self._patch, self._undo = patch, undo
        self._lock = threading.Lock()
        self._by_thread: dict[int, list[Listener]] = {}

    def here(self) -> Sequence[Listener]:
        """Return those on this thread, the innermost at the end."""
        return self._by_thread.get(threading.get_ident(), ())

    @contextmanager
    def joined_by(self, listener: Listener) -> Iterator[None]:
        """Have one listen on this thread inside the context."""
        thread = threading.get_ident()
        with self._lock:
            if not self._by_thread:
                self._patch()
            self._by_thread.setdefault(thread, []).append(listener)
        try:
            yield
        finally:
            with self._lock:
                self._by_thread[thread].pop()
                if not self._by_thread[thread]:
                    del self._by_thread[thread]
                if not self._by_thread:
                    self._undo()
