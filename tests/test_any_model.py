"""S = A·Y + B of whatever people hand over: the table of :mod:`tests.any_model`."""

from __future__ import annotations

import importlib.util

import pytest

from tests.any_model import blocks, detection, recurrent

TABLES = {module.__name__.rpartition(".")[2]: module.CASES for module in (blocks, detection, recurrent)}


if importlib.util.find_spec("transformers") is not None:
    from tests.any_model import dense, transformers

    TABLES |= {"transformers": transformers.CASES, "dense": dense.CASES}


@pytest.mark.parametrize(("table", "name"), [(table, name) for table, cases in TABLES.items() for name in cases])
def test_it_is_exact_or_refused(table: str, name: str) -> None:
    TABLES[table][name].check()
