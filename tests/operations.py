"""Every operation of the list that PyTorch tests its own operations with is exact, or refused by name.

``python -m tests.operations 0 4`` checks the first of four parts. In a process of its own: to import that list changes
how others script, and more.
"""

from __future__ import annotations

import itertools
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from captum_scoremap import UnsupportedOperationError, freeze, linear_form
from captum_scoremap.rules import tensors_in

SAMPLES = 3  # of each operation
REFUSED = r"[;,] got |must have a rule|could not be seen"
ROUNDED = {"bfloat16", "half", "chalf", "float", "cfloat"}
# Of numbers in a range, which steps away from the image leave.
NARROW = {"nn.functional.binary_cross_entropy", "bernoulli", "multinomial", "linalg.cholesky", "cholesky"}


def operations() -> list[Any]:
    """All of the list that take double precision on a CPU."""
    from torch.testing._internal.common_methods_invocations import op_db

    return [
        one
        for one in op_db
        if torch.float64 in one.supported_dtypes("cpu")
        and not one.name.startswith("jiterator")  # of a GPU
        and one.variant_test_name != "partial_views"  # which reads memory beside its argument
    ]


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


def check(operation: Any) -> None:
    """Raise unless an operation is exact, or refused by name."""
    close = {"rtol": 1e-2, "atol": 1e-2} if operation.name in ROUNDED else {"rtol": 1e-7, "atol": 1e-7}
    for model, image, score in scored(operation):
        try:
            form = linear_form(model, image, 0)
        except (UnsupportedOperationError, ValueError, TypeError) as error:
            if not re.search(REFUSED, str(error)):
                raise
            continue
        assert_close(form.score, score, rtol=1e-9, atol=1e-9)
        assert_close(form.sums + form.bias, score, **close)
        if operation.name in NARROW:
            continue
        frozen = freeze(model, image)
        step = torch.randn(image.shape, generator=torch.Generator().manual_seed(1), dtype=image.dtype)
        change = frozen(image + step) - frozen(image)
        assert_close(change[0], (form.coefficients * step).sum(1), **close)


def main(part: int, parts: int) -> int:
    """Check every so many operations, and print what is wrong; return how many were checked."""
    warnings.simplefilter("ignore")  # of PyTorch's tests, and of operations
    checked = operations()[part::parts]
    for operation in checked:
        try:
            check(operation)
        except Exception as error:
            name = f"{operation.name} {operation.variant_test_name}".strip()
            print(f"{name}: {type(error).__name__}: {error}".replace("\n", " "))
    return len(checked)


if __name__ == "__main__":
    print("checked", main(int(sys.argv[1]), int(sys.argv[2])))
