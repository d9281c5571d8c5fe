"""How far an audit is: a bar on a terminal, a plain line every so often elsewhere."""

import sys
import time
from collections.abc import Callable

from tqdm import tqdm

__all__ = ["Progress"]

_EVERY = 30.0  # seconds between plain lines


class Progress:
    """Counts images and says so on standard error.

    Args:
        total: Images of the whole audit.
        done: Images that an earlier run has done; they do not count for the rate.
        show: Whether to say anything.
        clock: Seconds since some moment.
    """

    def __init__(
        self, total: int, done: int = 0, show: bool = True, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.total, self.done, self.show, self.clock = total, done, show, clock
        self.start = self.last = clock()
        self.first = done
        self.show = show and sys.stderr is not None
        terminal = self.show and sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=done, unit=" images", desc="audit", smoothing=0.1) if terminal else None

    def advance(self, count: int) -> None:
        """Note that ``count`` more images are done."""
        self.done += count
        try:
            if self.bar is not None:
                self.bar.update(count)
            elif self.show and (self.clock() - self.last >= _EVERY or self.done == self.total):
                self.last = self.clock()
                print(self.line(), file=sys.stderr, flush=True)
        except OSError:  # nobody reads it any more
            self.show, self.bar = False, None

    def line(self) -> str:
        """Images done, rate and time left, as one line."""
        seconds = max(self.clock() - self.start, 1e-9)
        rate = (self.done - self.first) / seconds
        left = f"{(self.total - self.done) / rate:.0f} s left" if rate else "time left unknown"
        return f"audit: {self.done} of {self.total} images, {rate:.1f} images/s, {left}"

    def close(self) -> None:
        """Leave the terminal tidy."""
        if self.bar is not None:
            self.bar.close()
