"""``python -m captum_scoremap`` is ``captum-scoremap``."""

import sys

from captum_scoremap.cli import main

sys.exit(main())
