"""Where the commands print."""

import sys

from rich.console import Console


def make_console() -> Console:
    """Return the console of every command: as wide as the terminal, or 120 columns where there is none.

    Names of files, labels and layers are printed as they are: no markup, no emoji in ``sample:coffee:``.

    Returns:
        The console.
    """
    return Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False, emoji=False)
