"""Where the elements of views lie in memory, as a view of a row of numbers has it."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from captum_scoremap.rules.moving import _places

AXES = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 12)), max_size=4)


@given(AXES, st.integers(0, 5))
def test_places_are_those_of_a_view_by_strides(axes: list[tuple[int, int]], offset: int) -> None:
    size, stride = [length for length, _ in axes], [step for _, step in axes]
    expected = torch.arange(250).as_strided(size, stride, offset).reshape(-1)
    assert torch.equal(_places(torch.device("cpu"), size, stride, offset), expected)


def test_axes_that_lie_in_memory_as_one_are_counted_as_one() -> None:
    """Each operation is a node of a compiled or exported map."""

    class Counting(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += 1
            return func(*args, **(kwargs or {}))

    for size, most in (((2, 8, 5, 7), 2), ((2, 4, 5, 7), 7)):  # the whole, and half of the channels
        with Counting() as counted:
            _places(torch.device("cpu"), size, (280, 35, 7, 1))
        assert counted.count <= most
