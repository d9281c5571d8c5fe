"""``python -m captum_scoremap`` is ``captum-scoremap``."""

import atexit
import os
import sys

from captum_scoremap.cli import main

if __name__ == "__main__":
    status = main()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):  # nobody reads it any more
            continue
    # Threads of libraries that still run when the interpreter goes down abort the process, whatever its status.
    os._exit(status)
