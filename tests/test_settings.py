"""Settings of the whole process: as they were before, whichever thread comes and goes first."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch
from torch import nn

from captum_scoremap import linear_form
from captum_scoremap.settings import as_written, module_by_module, plain_attention


def state() -> tuple[object, ...]:
    flags = torch.backends.cuda
    kernels = flags.flash_sdp_enabled(), flags.mem_efficient_sdp_enabled(), flags.math_sdp_enabled()
    return torch.backends.mha.get_fastpath_enabled(), *kernels, torch._dynamo.eval_frame._stance.stance


SETTINGS = {"module by module": module_by_module, "plain attention": plain_attention, "as written": as_written}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["in turn", "nested"])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_last_to_leave_undoes_what_the_first_made(name: str, order: tuple[int, int]) -> None:
    before = state()
    stacks = ExitStack(), ExitStack()
    for stack in stacks:
        stack.enter_context(SETTINGS[name]())
    inside = state()
    assert inside != before
    stacks[order[0]].close()
    assert state() == inside
    stacks[order[1]].close()
    assert state() == before


@pytest.mark.parametrize("name", SETTINGS)
def test_an_error_undoes_it_too(name: str) -> None:
    before = state()
    with pytest.raises(ZeroDivisionError), SETTINGS[name](), SETTINGS[name]():
        raise ZeroDivisionError
    assert state() == before


def test_explaining_on_several_threads_leaves_all_as_it_was() -> None:
    model, before = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), state()

    def explain(_: int) -> None:
        for _ in range(20):
            linear_form(model, torch.randn(2, 4), 1)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(explain, range(4)))
    assert state() == before
