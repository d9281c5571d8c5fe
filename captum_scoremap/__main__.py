"""``captum-scoremap`` and ``python -m captum_scoremap``: the program as a process."""

import atexit
import os
import sys
from typing import NoReturn

from captum_scoremap.cli import main

__all__ = ["run"]


def run() -> NoReturn:
    """Run the program and end the process with its status.

    Threads of libraries that still run when the interpreter goes down abort the process, whatever its status: it ends
    at once, with what is to be done at exit done, and all output written.
    """
    status = main()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):  # nobody reads it any more
            continue
    os._exit(status)


if __name__ == "__main__":
    run()
