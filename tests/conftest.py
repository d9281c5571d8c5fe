"""Options, seeds and a watch that no test leaves anything behind in torch or in pyplot.

What takes long to import is imported where it is used: the process that hands the tests out to others needs none of it.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("captum_scoremap")
    group.addoption(
        "--networks",
        type=int,
        default=200,
        metavar="N",
        help="random networks that each Hypothesis test of the identity S = A·Y + B draws (default 200)",
    )
    group.addoption(
        "--images",
        type=Path,
        default=None,
        metavar="DIR",
        help="folder of photographs with a labels.csv; tests that need one are skipped without it",
    )
    group.addoption(
        "--plainly",
        action="store_true",
        help="empty the table of faster ways: everything must hold without them, only slower",
    )
    group.addoption(
        "--browser",
        default=None,
        metavar="PATH",
        help="a Chromium for the tests of the audit's report, which are skipped without it",
    )


LONGEST = [
    f"test_{name}.py"
    for name in """
        tutorials any_model compiled cli zoo audit_findings benchmarks audit_run audit_terminal docs cost audit_report
        random_networks
    """.split()
]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the sweeps over whole model zoos and what starts a cluster, unless ``-m`` asks for something.

    The files that take longest come first, the longest of all before the others, so that no process is left alone with
    one at the end.
    """
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))
    if config.option.markexpr:
        return
    by_hand = [item for item in items if item.get_closest_marker("sweep") or item.get_closest_marker("ray")]
    if by_hand:
        config.hook.pytest_deselected(items=by_hand)
        items[:] = [item for item in items if item not in by_hand]


def pytest_collection_finish() -> None:
    """Leave what is imported by now out of all that looks for garbage, a twentieth of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Weights and images that a test draws without a seed of its own are the same in every run."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _torch_as_before() -> Iterator[None]:
    """Global hooks, function modes, the gradient mode and the default dtype end as they began."""
    from tests.state import GlobalState

    before = GlobalState.now()
    yield
    assert GlobalState.now() == before


@pytest.fixture(autouse=True)
def _figures_as_before() -> Iterator[None]:
    """No figure of pyplot's stays open."""
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    yield
    assert pyplot.get_fignums() == before


@pytest.fixture
def plain() -> Iterator[None]:
    """Do everything the plain way: without packed masks and what else is only faster."""
    from captum_scoremap.speed import plainly

    with plainly():
        yield


@pytest.fixture(autouse=True)
def _plainly_if_asked(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("plainly"):
        if request.path.name == "test_speed.py":
            pytest.skip("of the faster ways themselves")
        request.getfixturevalue("plain")


@pytest.fixture
def generator() -> torch.Generator:
    """The one source of chance in a test, always the same."""
    import torch

    return torch.Generator().manual_seed(0)


@pytest.fixture
def images(request: pytest.FixtureRequest) -> Path:
    """The folder given as ``--images``; the test is skipped where there is none."""
    folder: Path | None = request.config.getoption("images")
    if folder is None:
        pytest.skip("needs photographs: pytest --images DIR")
    return folder
