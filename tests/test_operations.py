"""Every operation of the database that PyTorch tests its own operations with is exact, or refused by name."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from captum_scoremap import UnsupportedOperationError, freeze, linear_form
from captum_scoremap.rules import tensors_in

# of PyTorch's tests, which take it from everybody to set flags
with warnings.catch_warnings(), patch.object(torch.backends, "disable_global_flags", lambda: None):
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_methods_invocations import op_db

SAMPLES = 3  # of each operation
OPERATIONS = {
    f"{one.name} {one.variant_test_name}".strip(): one
    for one in op_db
    if torch.float64 in one.supported_dtypes("cpu")
    and not one.name.startswith("jiterator")  # of a GPU
    and one.variant_test_name != "partial_views"  # which reads memory beside its argument
}
REFUSED = r"[;,] got |must have a rule|could not be seen"
ROUNDED = {"bfloat16", "half", "chalf", "float", "cfloat"}
# Of numbers in a range, which steps away from the image leave.
NARROW = {"nn.functional.binary_cross_entropy", "bernoulli", "multinomial", "linalg.cholesky", "cholesky"}


def numbers_of(sample: Any) -> list[Tensor]:
    """The tensors of a sample's input, if they are dense and finite."""
    found = tensors_in(sample.input)
    if not all(one.dtype == torch.float64 and one.layout == torch.strided for one in found):
        return []
    return found if any(one.numel() for one in found) and all(map(bool, map(all_finite, found))) else []


def all_finite(one: Tensor) -> Tensor:
    return one.isfinite().all()


class Scored(nn.Module):
    """A weighted sum of all that an operation returns, (1, 1), for what is its input in one row, (1, elements)."""

    def __init__(self, operation: Any, sample: Any) -> None:
        super().__init__()
        self.operation, self.sample, self.shapes = operation, sample, [one.shape for one in numbers_of(sample)]

    def forward(self, image: Tensor) -> Tensor:
        parts = image[0].split([shape.numel() for shape in self.shapes])
        live = [part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]
        kind = type(self.sample.input)
        torch.manual_seed(0)
        output = self.operation(
            kind(live) if kind in {list, tuple} else live[0], *self.sample.args, **self.sample.kwargs
        )
        generator, score = torch.Generator().manual_seed(0), image.sum() * 0
        for one in tensors_in(output):
            if one.is_floating_point() or one.is_complex():
                real = torch.view_as_real(one.resolve_conj()) if one.is_complex() else one
                weight = torch.randn(real.shape, generator=generator, dtype=torch.float64)
                score = score + (real * weight.to(real.dtype)).sum()
        return score.to(torch.float64).reshape(1, 1)


def scored(operation: Any) -> Iterator[tuple[Scored, Tensor, Tensor]]:
    """The first samples as models, their images and scores, (1,), where these are finite."""
    samples = filter(numbers_of, operation.sample_inputs("cpu", torch.float64))
    for sample in itertools.islice(samples, SAMPLES):
        model, image = (
            Scored(operation, sample),
            torch.cat([one.detach().flatten() for one in numbers_of(sample)])[None],
        )
        with torch.no_grad():
            score = model(image.clone())[:, 0]
        if bool(score.isfinite()):
            yield model, image, score


@pytest.mark.filterwarnings("ignore")  # those of the operations
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_exact_or_refused(name: str) -> None:
    operation = OPERATIONS[name]
    close = {"rtol": 1e-2, "atol": 1e-2} if operation.name in ROUNDED else {"rtol": 1e-7, "atol": 1e-7}
    with torch.random.fork_rng():
        for model, image, score in scored(operation):
            refusal = ""
            try:
                form = linear_form(model, image, 0)
            except (UnsupportedOperationError, ValueError, TypeError) as error:
                refusal = str(error)
            if refusal:
                assert re.search(REFUSED, refusal)
                continue
            assert_close(form.score, score, rtol=1e-9, atol=1e-9)
            assert_close(form.sums + form.bias, score, **close)
            if operation.name in NARROW:
                continue
            frozen = freeze(model, image)
            step = torch.randn(image.shape, generator=torch.Generator().manual_seed(1), dtype=image.dtype)
            change = frozen(image + step) - frozen(image)
            assert_close(change[0], (form.coefficients * step).sum(1), **close)
