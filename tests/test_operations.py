"""Every operation of PyTorch's own list is exact, or refused by name; in processes of their own."""

from __future__ import annotations

import subprocess
import sys

import pytest

PARTS = 4


@pytest.mark.parametrize("part", range(PARTS))
def test_operations_are_exact_or_refused(part: int) -> None:
    command = [sys.executable, "-m", "tests.operations", str(part), str(PARTS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    *wrong, checked = done.stdout.splitlines()
    assert wrong == []
    assert int(checked.removeprefix("checked ")) > 150
