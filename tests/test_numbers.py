"""Numbers that leave the run for NumPy, Python or raw memory; constants that are made, or cached, while it lasts."""

from __future__ import annotations

import copy
import ctypes
import io
import math
import pickle
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from captum_scoremap import LayerScoreMap, UnsupportedOperationError, linear_form
from tests.between import assert_as_plain, assert_is_gradient, assert_refused, between, some_images

Function = Callable[[Tensor], Tensor]

POOL = ThreadPoolExecutor(1)
WEIGHTS = torch.randn(5, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def by_pointer(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    x = x.contiguous()
    size = x.numel() * x.element_size()
    ctypes.memmove(out.data_ptr(), x.data_ptr(), size)
    return out


def by_pointer_into_zeros(x: Tensor) -> Tensor:
    out = x.new_zeros(x.shape)
    ctypes.memmove(out.data_ptr(), x.contiguous().data_ptr(), x.numel() * x.element_size())
    return out * 2


def by_array_of_new_memory(x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    np.maximum(x.detach().numpy(), 0, out=out.numpy())
    return out


def by_data(x: Tensor) -> Tensor:
    holder = torch.empty(0, dtype=x.dtype)
    holder.data = x.relu()
    return holder


def by_data_of_itself(x: Tensor) -> Tensor:
    y = x * 1
    y.data = torch.ones_like(x)
    return y + x


def by_file(x: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file)


NUMBERS: dict[str, Function] = {
    "data": by_data,
    "data of itself": by_data_of_itself,
    "save and load": by_file,
    "from_numpy(numpy())": lambda x: torch.from_numpy(np.maximum(x.detach().numpy(), 0)),
    "tensor(numpy())": lambda x: torch.tensor(x.detach().cpu().numpy() * 2),
    "as_tensor(np.asarray())": lambda x: torch.as_tensor(np.asarray(x.detach()) * 2),
    "as_tensor(np.array())": lambda x: torch.as_tensor(np.array(x.detach()) * 2),
    "numpy(force=True)": lambda x: torch.from_numpy(x.numpy(force=True) * 2),
    "np.from_dlpack": lambda x: torch.from_numpy(np.from_dlpack(x.detach()) * 2),
    "from_dlpack": lambda x: torch.from_dlpack(x.detach()) * 2,
    "tensor(tolist())": lambda x: torch.tensor(x.tolist(), dtype=x.dtype),
    "new_tensor(tolist())": lambda x: x.new_tensor(x.tolist()),
    "a list of item()": lambda x: torch.tensor([v.item() for v in x.flatten()], dtype=x.dtype).view(x.shape),
    "a list of float()": lambda x: torch.tensor([float(v) for v in x.flatten()], dtype=x.dtype).view(x.shape),
    "math on item()": lambda x: torch.tensor([math.tanh(v) for v in x.flatten()], dtype=x.dtype).view(x.shape),
    "np.tanh of a tensor": lambda x: torch.as_tensor(np.tanh(x.detach())),
    "a part of it": lambda x: torch.cat([x[:, :2], torch.from_numpy(x[:, 2:].detach().numpy() * 2)], 1),
    "times one of NumPy's": lambda x: x * torch.from_numpy(1 / (1 + np.exp(-x.detach().numpy()))),
    "written to zeros": by_array_of_new_memory,
    "deepcopy": lambda x: copy.deepcopy(x.detach()),
    "pickle": lambda x: pickle.loads(pickle.dumps(x.detach())),
    "by pointer": by_pointer,
    "by pointer into zeros": by_pointer_into_zeros,
}


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # of NumPy's, about torch's
def test_numbers_that_leave_and_come_back_are_refused_or_right(name: str) -> None:
    images, model = some_images(), between(NUMBERS[name])
    with pytest.raises(UnsupportedOperationError) as problem:
        linear_form(model, images, 1)
    assert re.search(r"numpy|tolist|Tensor.data|dlpack|item|NumPy|kernel|copy|__array__", str(problem.value))
    assert "must have a rule" not in str(problem.value)
    assert_refused(NUMBERS[name], "could not be seen")


def logged(log: Callable[[Tensor], object]) -> Function:
    """A ReLU that notes something about what passes."""
    seen: list[object] = []

    def function(x: Tensor) -> Tensor:
        seen.append(log(x))
        return x.relu()

    return function


LOGS: dict[str, Callable[[Tensor], object]] = {
    "numpy": lambda x: x.detach().cpu().numpy().mean(),
    "a copy": lambda x: x.detach().numpy().copy(),
    "np.asarray": lambda x: np.asarray(x.detach()).max(),
    "item": lambda x: x.mean().item(),
    "float": lambda x: float(x.abs().max()),
    "tolist": lambda x: x.mean((2, 3)).tolist(),
    "dlpack": lambda x: np.from_dlpack(x.detach()).sum(),
    "text": lambda x: f"{x.mean():.3f} {x}",
    "pointer": lambda x: x.data_ptr(),
    "shape": lambda x: (x.shape, x.stride(), x.is_contiguous()),
    "isnan": lambda x: bool(x.isnan().any()),
    "histogram": lambda x: torch.histc(x, 5).tolist(),
    "statistics": lambda x: (x.std().item(), x.quantile(0.5).item(), int(x.argmax())),
    "memory": lambda x: x.untyped_storage().nbytes(),
    "a copy elsewhere": lambda x: x.detach().clone().cpu(),
    "deepcopy": lambda x: copy.deepcopy(x.detach()),
    "pickle": lambda x: pickle.dumps(x.detach()),
    "another thread": lambda x: POOL.submit(lambda: x.mean().item()).result(),
}


@pytest.mark.parametrize("name", LOGS)
def test_what_is_only_logged_does_not_count(name: str) -> None:
    assert_as_plain(logged(LOGS[name]), torch.relu)


@pytest.mark.parametrize("name", ["no_grad", "detach", "data"])
def test_switching_gradients_off_changes_nothing(name: str) -> None:
    off = {"no_grad": gradient_mode_off, "detach": lambda x: x.detach().relu(), "data": lambda x: x.data.relu()}
    assert_as_plain(off[name], torch.relu)


def gradient_mode_off(x: Tensor) -> Tensor:
    with torch.no_grad():
        return x.relu()


MADE: dict[str, Function] = {
    "from a list": lambda x: x.relu() * torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=x.dtype)[:, None, None],
    "from numbers": lambda x: x.relu() + torch.tensor(2.0, dtype=x.dtype),
    "from NumPy": lambda x: x.relu() * torch.from_numpy(np.arange(1.0, 5.0))[:, None, None],
    "as_tensor of NumPy": lambda x: x.relu() * torch.as_tensor(np.linspace(1, 2, 4))[:, None, None],
    "tensor of NumPy": lambda x: x.relu() * torch.tensor(np.hanning(4) + 1)[:, None, None],
    "new_tensor": lambda x: x.relu() * x.new_tensor([1.0, 2.0, 3.0, 4.0])[:, None, None],
    "new_full": lambda x: x.relu() * x.new_full((4, 1, 1), 2.0),
    "arange": lambda x: x.relu() * torch.arange(1.0, 5.0, dtype=x.dtype)[:, None, None],
    "of its shape": lambda x: x.relu() + torch.tensor([float(n) for n in x.shape], dtype=x.dtype)[:, None, None],
    "grid": lambda x: F.grid_sample(
        x.relu(),
        F.affine_grid(torch.eye(2, 3, dtype=x.dtype).expand(2, 2, 3), [2, 4, 4, 4], False),
        align_corners=False,
    ),
    "mask by tril": lambda x: x.relu() * torch.ones(4, 4, dtype=x.dtype).tril(),
    "written piece by piece": lambda x: x.relu() * written(x),
    "filled by index": lambda x: x.relu() * torch.zeros(4, 4, dtype=x.dtype).fill_diagonal_(1.0),
    "empty, then filled": lambda x: x.relu() * torch.empty(4, dtype=x.dtype).fill_(2.0)[:, None, None],
    "empty, then by NumPy of constants": lambda x: x.relu() * torch.from_numpy(np.ones((4, 1, 1))),
    "one_hot": lambda x: x.relu() * F.one_hot(torch.tensor([0, 1, 2, 3]), 4).to(x.dtype),
    "data": lambda x: x.relu() * nn.Parameter(torch.full((4, 1, 1), 2.0, dtype=x.dtype)),
    "of constants by NumPy": lambda x: x.relu() * torch.from_numpy(WEIGHTS[0].numpy() * 2),
    "of constants by tolist": lambda x: x.relu() * torch.tensor(WEIGHTS[0].tolist(), dtype=x.dtype),
    "of a thread": lambda x: x.relu() * CONSTANT_OF_A_THREAD,
}


def written(x: Tensor) -> Tensor:
    table = x.new_empty(4, 4)
    for row in range(4):
        table[row] = row + 1.0
    return table


CONSTANT_OF_A_THREAD = POOL.submit(torch.full, (4, 4), 2.0, dtype=torch.float64).result()


@pytest.mark.parametrize("name", MADE)
def test_constants_made_in_the_forward_are_constants(name: str) -> None:
    assert_is_gradient(MADE[name])


class Cached(nn.Module):
    """Makes its table the first time that it is asked, as position tables are made."""

    def __init__(self, make: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.make, self.table = make, None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = self.make(x)
        return x.relu() * self.table


CACHES: dict[str, Callable[[Tensor], Tensor]] = {
    "arange": lambda x: torch.arange(4.0, dtype=x.dtype),
    "NumPy": lambda x: torch.from_numpy(np.arange(4.0)),
    "of several": lambda x: torch.stack([torch.arange(4.0, dtype=x.dtype).sin() for _ in range(4)]),
    "a view": lambda x: torch.arange(16.0, dtype=x.dtype).view(4, 4)[:, 1:2],
}


@pytest.mark.parametrize("name", CACHES)
def test_tables_cached_in_a_run_are_constants_in_it_and_later(name: str) -> None:
    assert_is_gradient(Cached(CACHES[name]))
    cached = Cached(CACHES[name])
    between(cached)(some_images())
    assert_is_gradient(cached)


def test_tables_closed_over_are_constants() -> None:
    tables = [torch.randn(4, 4, dtype=torch.float64) for _ in range(3)]
    views = {"all": tables[0][:, 1:], "last": tables[1].t()}
    assert_is_gradient(lambda x: x.relu() * tables[2] + views["last"] * x + views["all"].sum())


def test_tables_of_a_dictionary_cached_by_shape_are_constants() -> None:
    tables: dict[torch.Size, Tensor] = {}

    def function(x: Tensor) -> Tensor:
        if x.shape not in tables:
            tables[x.shape] = torch.linspace(0, 1, 4, dtype=x.dtype).expand(4, 4).contiguous()
        return x.relu() * tables[x.shape]

    for _ in range(2):
        assert_is_gradient(function)


def test_what_a_thread_returns_is_refused_as_the_output_itself() -> None:
    """Nothing reads the output after it: it must be met all the same."""

    def forward(x: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(torch.tanh, x).result()

    class Threaded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return forward(self.layer(x))

    model = Threaded().double().eval()
    with pytest.raises(UnsupportedOperationError, match="another thread"):
        LayerScoreMap(model, model.layer).attribute_targets(some_numbers(), [0])


def test_a_changed_view_may_be_logged() -> None:
    """The numbers are read from the memory's last value, and nothing comes back."""
    seen = []

    def forward(x: Tensor) -> Tensor:
        y = x * 2
        y[:, :1] += 1
        seen.append(y.numpy().mean())
        return y.sum(1)

    form = linear_form(forward, some_numbers())
    assert_close(form.coefficients, torch.full_like(form.coefficients, 2))
    assert_close(form.bias, torch.ones_like(form.bias))


def some_numbers() -> Tensor:
    return torch.rand(2, 4, dtype=torch.float64)
