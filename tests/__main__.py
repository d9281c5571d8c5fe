"""The whole check, for people and machines alike: format, lint, types, import arrows, tests.

``python -m tests`` runs it all and stops at the first step that fails; additional arguments go to pytest. Test files
are shared out over the cores, a process of one thread on each. With ``--fast`` only the core's tests run, the rules
and what is read off the tape: a minute on two cores.
"""

import os
import subprocess
import sys
from pathlib import Path

STEPS = (
    ("format", ["ruff", "format", "--check", "."]),
    ("lint", ["ruff", "check", "."]),
    ("types", ["mypy"]),
    ("import arrows", ["importlinter.cli", "lint"]),
    ("tests", ["pytest", "--numprocesses", "auto", "--dist", "loadfile", "--no-loadscope-reorder"]),
)

CORE = """
    test_reference test_paper test_run test_memory test_steps test_linear_form test_handwritten test_bad_input
""".split()


# whole networks, half of the time
LEFT_OUT = "tests/test_steps.py::test_every_network_and_its_transpose"


def pytest_arguments(arguments: list[str]) -> list[str]:
    """What goes to pytest, given what was typed."""
    chosen = [argument for argument in arguments if argument != "--fast"]
    if chosen == arguments:
        return chosen
    return [*(f"tests/{name}.py" for name in CORE), "--deselect", LEFT_OUT, *chosen]


def main() -> int:
    root = Path(__file__).parent.parent
    for name, (module, *arguments) in STEPS:
        print(f"== {name}", flush=True)
        extra = pytest_arguments(sys.argv[1:]) if name == "tests" else []
        if module == "importlinter.cli":
            command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]
        else:
            command = [sys.executable, "-m", module, *arguments, *extra]
        environment = {
            "OMP_NUM_THREADS": "1",
            **os.environ,
        }  # several processes of several threads get in each other's way
        code = subprocess.run(command, cwd=root, env=environment, check=False).returncode
        if code:
            print(f"== {name} failed", flush=True)
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
