"""S = A·Y + B of whatever people hand over: the table of :mod:`tests.any_model`."""

from __future__ import annotations

import importlib.util

import pytest

from tests.any_model import Case, blocks, detection, recurrent

TABLES = {module.__name__.rpartition(".")[2]: module.CASES for module in (blocks, detection, recurrent)}


def cases_of_transformers() -> dict[str, Case]:
    if importlib.util.find_spec("transformers") is None:
        return {}
    from tests.any_model import transformers

    return transformers.CASES


TABLES["transformers"] = cases_of_transformers()


@pytest.mark.parametrize(("table", "name"), [(table, name) for table, cases in TABLES.items() for name in cases])
def test_it_is_exact_or_refused(table: str, name: str) -> None:
    TABLES[table][name].check()
