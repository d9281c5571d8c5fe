"""The whole check, for people and machines alike: format, lint, types, import arrows, tests.

``python -m tests`` runs it all and stops at the first step that fails; further arguments go to pytest.
"""

import subprocess
import sys
from pathlib import Path

STEPS = (
    ("format", ["ruff", "format", "--check", "."]),
    ("lint", ["ruff", "check", "."]),
    ("types", ["mypy"]),
    ("import arrows", ["importlinter.cli", "lint"]),
    ("tests", ["pytest"]),
)


def main() -> int:
    root = Path(__file__).parent.parent
    for name, (module, *arguments) in STEPS:
        print(f"== {name}", flush=True)
        extra = sys.argv[1:] if name == "tests" else []
        if module == "importlinter.cli":
            command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]
        else:
            command = [sys.executable, "-m", module, *arguments, *extra]
        code = subprocess.run(command, cwd=root, check=False).returncode
        if code:
            print(f"== {name} failed", flush=True)
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
