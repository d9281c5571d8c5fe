"""Steps and their transposes: <J u, v> = <u, Jᵀ v>, step by step and for the tape as a whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.testing import assert_close

from captum_scoremap.rules import with_rules
from captum_scoremap.tape import Recording, Step
from tests.test_handwritten import IMAGES, TOKENS, network
from tests.test_reference import CASES, Case

EXACT = {"rtol": 1e-10, "atol": 1e-12}


def noise(like: Any, generator: torch.Generator) -> Tensor:
    """Random numbers of the shape and type of a tensor or value."""
    return torch.randn(tuple(like.shape), dtype=like.dtype, generator=generator)


def inner(some: list[Tensor], others: list[Tensor | None]) -> Tensor:
    """The sum of products, zero where there is nothing; the real part of complex ones."""
    total = torch.zeros((), dtype=torch.float64)
    for one, other in zip(some, others, strict=True):
        if other is not None:
            total = total + (one.conj() * other).sum().real
    return total


def check_step(step: Step, generator: torch.Generator) -> None:
    """A step is affine, and its transpose that of its linear part."""
    zero = step.forward([value.zeros() for value in step.values])
    assert [(tuple(t.shape), t.dtype) for t in zero][: len(step.outputs)] == [
        (tuple(v.shape), v.dtype) for v in step.outputs
    ]

    def linear(arguments: list[Tensor]) -> list[Tensor]:
        moved = step.forward(arguments)
        # a mask of -inf is a constant like any other, and so is memory that nothing filled yet
        differences = [torch.where(rest.isfinite(), one - rest, 0) for one, rest in zip(moved, zero, strict=True)]
        return differences[: len(step.outputs)]

    first, second = ([noise(value, generator) for value in step.values] for _ in range(2))
    images = linear(first)
    for one, other, both in zip(
        images, linear(second), linear([2 * a - b for a, b in zip(first, second, strict=True)]), strict=True
    ):
        assert_close(both, 2 * one - other, **EXACT)
    coefficients = tuple(
        noise(value, generator).masked_fill(rest.isinf(), 0) for value, rest in zip(step.outputs, zero, strict=False)
    )
    shares = list(step.rule.transpose(step, step.frozen(), coefficients))
    for value, share in zip(step.values, shares, strict=True):
        assert share is None or (share.shape == value.shape and share.dtype == value.dtype)
    assert_close(inner(images, list(coefficients)), inner(first, shares), **EXACT)


def check_tape(function: Callable[..., Any], image: Tensor, generator: torch.Generator) -> None:
    """Every step, and all of them, forward and transposed."""
    recording = Recording(function, with_rules(None), keep_bypass=True)
    output = recording.record((image,))
    tape = recording.tape
    with torch.no_grad():
        for step in tape.steps:
            check_step(step, generator)
        (start,), end = tape.inputs, tape.value_of_output()
        assert start is not None
        if end is None:
            return
        assert_close(tape.forward({start: image}, [end])[end], output, **EXACT)
        rest = tape.forward({start: torch.zeros_like(image)}, [end])[end]
        direction, coefficients = noise(start, generator), noise(end, generator)
        moved = tape.forward({start: direction}, [end])[end] - rest
        doubled = tape.forward({start: -2 * direction}, [end])[end] - rest
        assert_close(doubled, -2 * moved, **EXACT)
        found = tape.transposed({end: coefficients}, {start: lambda a: a})
        pulled = found.get(start, torch.zeros_like(image))
        assert_close(inner([moved], [coefficients]), inner([direction], [pulled]), **EXACT)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_operation_and_its_transpose(case: Case, generator: torch.Generator) -> None:
    image = torch.randn(2, *case.shape, dtype=torch.float64, generator=generator)
    check_tape(case.function, image, generator)


@pytest.mark.parametrize("name", [*IMAGES, *TOKENS])
def test_every_forward_method_and_its_transpose(name: str, generator: torch.Generator) -> None:
    case, shape = (IMAGES[name], (2, 4, 6, 6)) if name in IMAGES else (TOKENS[name], (2, 5, 8))
    check_tape(network(*case), torch.randn(shape, dtype=torch.float64, generator=generator), generator)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "swin_t"])
def test_every_network_and_its_transpose(name: str, generator: torch.Generator) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(torchvision.models, name)(weights=None, num_classes=7).double().eval()
    check_tape(model, torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=generator), generator)


def test_transposed_steps_may_be_consumed(generator: torch.Generator) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double().eval()
    image = torch.randn(2, 4, dtype=torch.float64, generator=generator)
    found = []
    for consume in (False, True):
        recording = Recording(model, with_rules(None))
        recording.record((image,))
        tape = recording.tape
        (start,), end = tape.inputs, tape.value_of_output()
        steps = len(tape.steps)
        with torch.no_grad():
            row = torch.ones(2, 3, dtype=torch.float64)
            found.append(tape.transposed({end: row}, {start: lambda a: a}, consume=consume)[start])
        assert len(tape.steps) == (0 if consume else steps)
    assert_close(found[0], found[1], rtol=0, atol=0)


def test_coefficients_of_every_wanted_value_in_one_pass(generator: torch.Generator) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double().eval()
    image = torch.randn(2, 4, dtype=torch.float64, generator=generator)
    recording = Recording(model, with_rules(None), [(model[0], False), (model[1], False)])
    recording.record((image,))
    tape, row = recording.tape, torch.randn(2, 3, dtype=torch.float64, generator=generator)
    values = [tape.inputs[0], *(tapped.values[0] for site, tapped in recording.tapped.items() if site is not None)]
    with torch.no_grad():
        together = tape.transposed({tape.value_of_output(): row}, dict.fromkeys(values, lambda a: a))
        for value in values:
            alone = tape.transposed({tape.value_of_output(): row}, {value: lambda a: a})
            assert_close(alone[value], together[value], rtol=0, atol=0)
        above = row @ model[2].weight
        mask = model[0](image) > 0
    assert_close(together[values[2]], above, **EXACT)
    assert_close(together[values[1]], above * mask, **EXACT)
    assert_close(together[values[0]], (above * mask) @ model[0].weight.detach(), **EXACT)


MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda x: x.view(2, 6, 4),
    "reshape of a transpose": lambda x: x.transpose(1, 2).reshape(2, -1),
    "squeeze and unsqueeze": lambda x: x.unsqueeze(1).squeeze(1),
    "clone": lambda x: x.clone(),
    "permute": lambda x: x.permute(2, 0, 1),
    "t": lambda x: x[0].t(),
    "expand": lambda x: x[:, None].expand(2, 3, 4, 6),
    "select": lambda x: x[:, 1],
    "slice": lambda x: x[:, 1:3],
    "unbind and stack": lambda x: torch.stack(x.unbind(1)[::2], 1),
    "split and cat": lambda x: torch.cat(x.split(2, 1)[::-1], 1),
    "pad": lambda x: torch.nn.functional.pad(x, (1, 2, -1, 1)),
    "as_strided": lambda x: x.as_strided((2, 3), (24, 2)),
    "roll": lambda x: x.roll((1, 2), (1, 2)),
    "flip": lambda x: x.flip(2),
    "index": lambda x: x[:, torch.tensor([2, 0, 0])],
    "index_select": lambda x: x.index_select(1, torch.tensor([2, 0])),
    "gather": lambda x: x.gather(1, torch.tensor([[[0, 3, 1]], [[1, 1, 2]]])),
    "unfold": lambda x: x.unfold(1, 2, 1),
    "repeat": lambda x: x.repeat(1, 2, 1),
    "pixel_shuffle": lambda x: torch.nn.functional.pixel_shuffle(x[:, :, :, None], 2),
}


@pytest.mark.parametrize("name", MOVES)
def test_steps_that_move_elements_make_no_new_ones(name: str) -> None:
    """Numbers at their outputs can be carried back to where the elements came from, and lose nothing on the way."""
    x = torch.arange(1.0, 49.0, dtype=torch.float64).view(2, 4, 6)
    recording = Recording(MOVES[name], with_rules(None))
    output = recording.record((x,))
    assert [step.operation for step in recording.tape.steps if not step.rule.moves] == []
    assert set(output.unique().tolist()) <= {0.0, *x.unique().tolist()}
    numbers = torch.where(output == 0, 0.0, torch.rand_like(output))
    value, start = recording.tape.value_of_output(), recording.tape.inputs[0]
    assert value is not None
    assert start is not None
    found = recording.tape.transposed({value: numbers}, {start: lambda share: share})[start]
    for element in x.unique().tolist():
        assert_close(found[x == element].sum(), numbers[output == element].sum())
