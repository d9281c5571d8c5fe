"""Where a ray leaves the linear region: distances by hand, and ties, which go to the first switch in order."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from captum_scoremap import Boundary, freeze

ROW = torch.tensor([[2.0, -3.0, 5.0]], dtype=torch.float64)


def boundary(model: object, direction: Tensor, image: Tensor = ROW) -> Boundary:
    return freeze(model, image).distance_to_boundary(direction)  # type: ignore[arg-type]


def test_the_nearest_of_several_flips() -> None:
    found = boundary(nn.Sequential(nn.ReLU()), torch.tensor([[-1.0, 1.0, -1.0]], dtype=torch.float64))
    assert_close(found.distance, torch.tensor([2.0], dtype=torch.float64))
    assert found.switch == ("0",)


def test_switches_behind_do_not_count() -> None:
    found = boundary(nn.Sequential(nn.ReLU()), torch.tensor([[1.0, -1.0, 1.0]], dtype=torch.float64))
    assert found == Boundary(found.distance, ("",))
    assert math.isinf(float(found.distance))


@pytest.mark.parametrize("scale", [1.0, 0.1, 1 / 3, 7.0, 1e-3, 1e3])
@pytest.mark.parametrize("slope", [-0.2, -1.0, -1 / 3, 0.3, 1e-3])
def test_a_leaky_relu_before_a_relu_is_the_one_that_flips(slope: float, scale: float) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.LeakyReLU(slope), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x * scale) / 3)

    found = boundary(Model(), torch.tensor([[-1.0, 1.0, -1.0]], dtype=torch.float64))
    assert_close(found.distance, torch.tensor([2.0], dtype=torch.float64))
    assert found.switch == ("first",)


TIES: dict[str, tuple[nn.Module, str]] = {
    "relu, relu": (nn.Sequential(nn.ReLU(), nn.ReLU()), "0"),
    "abs, relu": (nn.Sequential(nn.Hardtanh(0.0, 9.0), nn.ReLU()), "0"),
    "prelu, leaky": (nn.Sequential(nn.PReLU(init=-0.5), nn.LeakyReLU(-0.1)), "0"),
    "batch norm between": (nn.Sequential(nn.LeakyReLU(-0.1), nn.Identity(), nn.Threshold(0.0, 0.0)), "0"),
    "three": (nn.Sequential(nn.LeakyReLU(-0.3), nn.LeakyReLU(-0.7), nn.ReLU()), "0"),
}


@pytest.mark.parametrize("name", TIES)
def test_ties_go_to_the_first(name: str) -> None:
    model, first = TIES[name]
    found = boundary(model.double().eval(), torch.tensor([[-1.0, 0.0, 0.0]], dtype=torch.float64))
    assert_close(found.distance, torch.tensor([2.0], dtype=torch.float64))
    assert found.switch == (first,)


# At [[2, -3, 5]], moved by -1, 1 and -1 in each unit step.
FLIPS = {
    "greater": (lambda x: x * (x > 0), 2.0),
    "not less": (lambda x: x * (x >= 1.5), 0.5),
    "less, than another": (lambda x: x * (x < x.roll(1, 1)), 2.5),
    "greater than a constant": (lambda x: torch.where(x.gt(torch.full_like(x, 4.0)), x, -x), 1.0),
    "sign": (lambda x: x * x.sign(), 2.0),
    "sign bit": (lambda x: torch.where(x.signbit(), x, 2 * x), 2.0),
    "larger of two": (lambda x: torch.maximum(x, 2 * x), 2.0),
    "smaller of two": (lambda x: torch.minimum(x, torch.full_like(x, 4.0)), 1.0),
    "largest": (lambda x: x.amax(1), 9 / 2 - 3 / 2 + 1),
    "a threshold": (lambda x: F.threshold(x, 1.0, 0.0), 1.0),
}


@pytest.mark.parametrize("name", FLIPS)
def test_whatever_has_switches_flips_where_it_does(name: str) -> None:
    function, distance = FLIPS[name]
    direction = torch.tensor([[-1.0, 1.0, -1.0]], dtype=torch.float64)
    found = boundary(function, direction)
    assert_close(found.distance, torch.tensor([distance], dtype=torch.float64))
    frozen = freeze(function, ROW)
    before, beyond = (freeze(function, ROW + (distance + d) * direction) for d in (-1e-6, 1e-6))
    assert frozen.same_region(before)
    assert set(frozen.flipped(beyond)) == set(found.switch)


def picked(position: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: x.gather(1, position(x, 1, keepdim=True))


# Operations that take elements by their order.
ORDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "sort": lambda x: x.sort(1)[0],
    "sort, descending, stable": lambda x: x.sort(dim=-1, stable=True, descending=True)[0],
    "sort, rows": lambda x: x.view(1, 3, 2).sort(1)[0],
    "argsort": lambda x: x.gather(1, x.argsort(1)),
    "topk": lambda x: x.topk(3, 1)[0],
    "topk, smallest": lambda x: x.topk(2, largest=False)[0],
    "topk, one, in no order": lambda x: x.topk(1, 1, sorted=False)[0],
    "topk, all": lambda x: x.topk(6)[0],
    "topk, columns": lambda x: x.view(1, 3, 2).topk(2, 1)[0],
    "median": lambda x: x.median(1)[0],
    "median, kept": lambda x: x.median(1, keepdim=True)[0],
    "nanmedian": lambda x: x.nanmedian(1)[0],
    "kthvalue": lambda x: x.view(1, 2, 3).kthvalue(2, 2)[0],
    "cummax": lambda x: x.cummax(1)[0],
    "cummin": lambda x: x.view(1, 3, 2).cummin(1)[0],
    "quantile": lambda x: x.quantile(0.3, 1),
    "argmax": picked(torch.argmax),
    "argmin": picked(torch.argmin),
    "argmax, gone": lambda x: x[:, x.argmax(1)],
    "argmax, of all": lambda x: x.flatten()[x.argmax()][None],
    "argmax, of all, kept": lambda x: x.gather(1, x.argmax(keepdim=True)),
    "argmax, scattered": lambda x: x * torch.zeros_like(x).scatter(1, x.argmax(1, keepdim=True), 1.0),
}


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("name", ORDERS)
def test_orders_hold_up_to_the_boundary_and_not_beyond(name: str, seed: int) -> None:
    function, draws = ORDERS[name], torch.Generator().manual_seed(seed)
    image, direction = (torch.randn(1, 6, dtype=torch.float64, generator=draws) for _ in range(2))
    if seed % 2:
        direction[0, 2:] = 0.0  # two move past others that stand
    frozen = freeze(function, image)
    found = frozen.distance_to_boundary(direction)
    step, (switch,) = float(found.distance), found.switch
    if switch == "":
        assert frozen.same_region(freeze(function, image + 1e4 * direction))
    else:
        assert frozen.same_region(freeze(function, image + (1 - 1e-9) * step * direction))
        assert switch in frozen.flipped(freeze(function, image + (1 + 1e-9) * step * direction))


def test_the_largest_is_overtaken_by_a_smaller_one() -> None:
    image, direction = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[4.0, 0.0, 0.0]])
    found = boundary(lambda x: x.topk(1, 1)[0], direction, image)
    assert (found.distance.tolist(), found.switch) == ([0.5], ("topk",))


# What no order decides, and what errors call it.
NOT_FOLLOWED: dict[str, Callable[[Tensor], Tensor]] = {
    "mode": lambda x: x.mode(1)[0],
    "topk": lambda x: x.topk(2, 1, sorted=False)[0],
    "round": lambda x: x * x.round(),
    "median": lambda x: x.median()[None],
    "norm": lambda x: F.pairwise_distance(x, torch.ones_like(x), p=1.0)[:, None],
    "linalg_vector_norm": lambda x: torch.linalg.vector_norm(x, math.inf, dim=1, keepdim=True),
    "cdist": lambda x: torch.cdist(x, torch.zeros_like(x), p=1.0),
    "bucketize": lambda x: x * torch.bucketize(x, torch.tensor([0.0, 4.0], dtype=x.dtype)),
    "scatter_reduce": lambda x: x.scatter_reduce(1, torch.zeros(1, 3, dtype=torch.long), x, "amax"),
}


@pytest.mark.parametrize("name", NOT_FOLLOWED)
def test_switches_that_are_not_followed_are_named(name: str) -> None:
    with pytest.warns(UserWarning, match=f"does not follow the switches of {name}, which may flip before") as said:
        found = boundary(lambda x: NOT_FOLLOWED[name](x).relu(), -torch.ones_like(ROW))
    assert len(said) == 1
    assert said[0].filename == __file__
    assert found.switch[0] in {"relu", ""}


@pytest.mark.parametrize("name", NOT_FOLLOWED)
def test_switches_that_do_not_move_need_not_be_followed(name: str) -> None:
    found = boundary(
        lambda x: NOT_FOLLOWED[name](x[:, :3]) + x[:, 3:].relu().sum(), -torch.eye(4)[3:], torch.ones(1, 4)
    )
    assert (found.distance.tolist(), found.switch) == ([1.0], ("relu",))


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_direction_is_finite(number: float) -> None:
    with pytest.raises(ValueError, match=r"direction must be finite, got 2 values that are NaN or infinite"):
        boundary(nn.ReLU(), torch.tensor([[number, 1.0, number]], dtype=torch.float64))


def test_a_later_switch_that_is_nearer_wins() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Threshold(1.5, 0.0))
    found = boundary(model, torch.tensor([[-1.0, 0.0, 0.0]], dtype=torch.float64))
    assert_close(found.distance, torch.tensor([0.5], dtype=torch.float64))
    assert found.switch == ("1",)


def test_pools_flip_where_another_position_catches_up() -> None:
    image = torch.tensor([[[[1.0, 4.0], [2.0, 3.0]]]], dtype=torch.float64)
    direction = torch.tensor([[[[0.0, -1.0], [0.0, 1.0]]]], dtype=torch.float64)
    found = boundary(nn.Sequential(nn.MaxPool2d(2)), direction, image)
    assert_close(found.distance, torch.tensor([0.5], dtype=torch.float64))
    assert found.switch == ("0",)


# At [[0, 2, 2]], moved by the direction: whether a switch flips at once, and how far it is otherwise.
ON_IT: dict[str, tuple[Callable[[Tensor], Tensor], list[float], float]] = {
    "relu, on": (F.relu, [1.0, 0.0, 0.0], 0.0),
    "relu, off": (F.relu, [-1.0, -1.0, 0.0], 2.0),
    "relu, along": (F.relu, [0.0, -1.0, 0.0], 2.0),
    "not less": (lambda x: x * (x >= 0), [-1.0, 0.0, 0.0], 0.0),
    "not less, up": (lambda x: x * (x >= 0), [1.0, 0.0, 0.0], math.inf),
    "less than another": (lambda x: x * (x < x.roll(1, 1)), [0.0, 1.0, 2.0], math.inf),
    "the other, less": (lambda x: x * (x < x.roll(1, 1)), [0.0, 2.0, 1.0], 0.0),
    "pool, another": (lambda x: F.max_pool1d(x, 3), [0.0, 1.0, 2.0], 0.0),
    "pool, the same": (lambda x: F.max_pool1d(x, 3), [1.0, 0.5, 0.25], 4.0),
    "largest": (lambda x: x.amax(1), [0.0, -1.0, 0.0], 0.0),
    "hardtanh": (lambda x: F.hardtanh(x, 0.0, 9.0), [1.0, 0.0, 0.0], 0.0),
    "largest, the same": (lambda x: x.amax(1), [1.0, 1.0, -1.0], math.inf),
    "pool, kept": (lambda x: F.max_pool1d(x, 3), [1.0, 1.0, -1.0], math.inf),
    "sort": (lambda x: x.sort(dim=1, stable=True)[0], [0.0, 1.0, 0.0], 0.0),
    "sort, the same": (lambda x: x.sort(dim=1, stable=True)[0], [1.0, 0.0, 0.5], 2.0),
    "argmax": (picked(torch.argmax), [0.0, 0.0, 1.0], 0.0),
    "argmax, the same": (picked(torch.argmax), [3.0, 1.0, 0.0], 1.0),
    "cummax": (lambda x: x.cummax(1)[0], [0.0, 1.0, 0.0], 0.0),
    "twice": (lambda x: F.leaky_relu(F.relu(x - 2), -0.2), [0.0, 0.0, 3.0], 0.0),
}


@pytest.mark.parametrize("name", ON_IT)
def test_an_image_on_a_boundary_leaves_its_region_at_once_or_not(name: str) -> None:
    function, move, distance = ON_IT[name]
    image, direction = (torch.tensor([one], dtype=torch.float64) for one in ([0.0, 2.0, 2.0], move))
    frozen = freeze(function, image)
    found = frozen.distance_to_boundary(direction)
    assert_close(found.distance, torch.tensor([distance], dtype=torch.float64))
    near = freeze(function, image + 1e-6 * direction)
    assert frozen.same_region(near) == (distance > 0)
    if distance == 0:
        assert found.switch[0] in frozen.flipped(near)


def test_images_have_distances_of_their_own() -> None:
    images = torch.tensor([[1.0], [2.0], [-3.0]], dtype=torch.float64)
    found = boundary(nn.Sequential(nn.ReLU()), -torch.ones_like(images), images)
    assert_close(found.distance, torch.tensor([1.0, 2.0, math.inf], dtype=torch.float64))
    assert found.switch == ("0", "0", "")


@pytest.mark.parametrize("seed", range(5))
def test_the_model_is_affine_up_to_the_boundary_and_not_beyond(seed: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 6), nn.LeakyReLU(-0.3), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)).double()
        image, direction = torch.randn(1, 4, dtype=torch.float64), torch.randn(1, 4, dtype=torch.float64)
    frozen = freeze(model, image)
    found = frozen.distance_to_boundary(direction)
    if found.switch == ("",):
        direction = -direction
        found = frozen.distance_to_boundary(direction)
    step = float(found.distance)
    assert found.switch[0] in {"1", "3"}
    assert frozen.same_region(freeze(model, image + (1 - 1e-9) * step * direction))
    beyond = frozen.flipped(freeze(model, image + (1 + 1e-9) * step * direction))
    assert found.switch[0] in beyond
    inside = image + 0.5 * step * direction
    assert_close(frozen(inside), model(inside).detach(), rtol=1e-12, atol=1e-13)


CANCELLED: dict[str, Callable[[Tensor], Tensor]] = {
    "x + (c - x)": lambda x: F.relu(x + (0.3 - x)),
    "(x + c) - x": lambda x: F.relu((x + 0.3) - x),
    "c - x, tensor": lambda x: F.relu(x + (torch.linspace(-1, 1, 6).to(x) - x)),
    "norms' biases": lambda x: F.relu(F.batch_norm(x, torch.zeros(6).to(x), torch.ones(6).to(x), eps=0) - x + 0.1),
    "linear": lambda x: F.relu(F.linear(x, torch.eye(6).to(x), torch.linspace(-1, 1, 6).to(x)) - x),
    "maximum": lambda x: torch.maximum(0.7 - x, 0.2 - x) + x,
    "max_pool1d": lambda x: F.max_pool1d(torch.stack([x + 0.1, x + 0.7], 2), 2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CANCELLED)
def test_what_cancels_does_not_move(name: str, dtype: torch.dtype) -> None:
    """Rounding of a constant beside a change is no change, or a switch would flip at some 1e16."""
    draws = torch.Generator().manual_seed(0)
    for size in (1e-3, 0.9449569463146377, 7.0):
        image, direction = (torch.randn(1, 6, dtype=dtype, generator=draws) for _ in range(2))
        found = boundary(CANCELLED[name], size * direction, image)
        assert (found.distance.tolist(), found.switch) == ([math.inf], ("",))


def mean_of_others(x: Tensor) -> Tensor:
    """Three means of the same numbers, added up in different orders."""
    return torch.stack([x.mean(1), (x[:, 0] + x[:, 2] + x[:, 1]) / 3, (x[:, 1] + (x[:, 2] + x[:, 0])) / 3], 1)


ALIKE: dict[str, Callable[[Tensor], Tensor]] = {
    "max_pool1d": lambda x: F.max_pool1d(mean_of_others(x)[:, None], 3),
    "adaptive_max_pool1d": lambda x: F.adaptive_max_pool1d(mean_of_others(x)[:, None], 1),
    "amax": lambda x: mean_of_others(x).amax(1),
    "max": lambda x: mean_of_others(x).max(1)[0],
    "sort": lambda x: mean_of_others(x).sort(1)[0],
    "topk": lambda x: mean_of_others(x).topk(2, 1)[0],
    "cummax": lambda x: mean_of_others(x).cummax(1)[0],
    "argmax": lambda x: mean_of_others(x).argmax(1) + x.sum(1),
    "maximum": lambda x: torch.maximum(*mean_of_others(x)[:, 1:].unbind(1)),
    "minimum": lambda x: torch.minimum(*mean_of_others(x)[:, :2].unbind(1)),
    "where": lambda x: torch.where(mean_of_others(x)[:, 0] > mean_of_others(x)[:, 1], x[:, 0], x[:, 1]),
}


@pytest.mark.parametrize("name", ALIKE)
def test_what_moves_alike_never_meets(name: str) -> None:
    """But for rounding it is one value: no step tells which of them is the larger."""
    draws = torch.Generator().manual_seed(0)
    for _ in range(20):
        image, direction = (torch.randn(1, 3, dtype=torch.float64, generator=draws) for _ in range(2))
        assert boundary(ALIKE[name], direction, image).distance.tolist() == [math.inf]


def test_windows_of_circular_padding_move_alike() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.Conv1d(3, 2, 3, stride=2, padding=2, bias=False, padding_mode="circular").double()
    model = nn.Sequential(layer, nn.MaxPool1d(2, 1, dilation=2))
    draws = torch.Generator().manual_seed(0)
    for _ in range(20):
        image, direction = (torch.randn(1, 3, 4, dtype=torch.float64, generator=draws) for _ in range(2))
        assert boundary(model, direction, image).distance.tolist() == [math.inf]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-20, 1e-6, 1e-3, 1.0, 1e3])
def test_small_directions_lose_nothing_to_large_constants(size: float, dtype: torch.dtype) -> None:
    """Distances scale with the inverse of the direction, to rounding, whatever a bias beside it is."""
    direction = torch.full((1, 3), -size, dtype=dtype)
    if float(direction[0, 0]) == 0:
        pytest.skip("smaller than what the type can hold")
    image = torch.tensor([[1.0, 2.0, 4.0]], dtype=dtype)
    found = boundary(lambda x: F.relu(x + 2.0 - 2.0), direction, image)
    wanted = float(image[0, 0]) / -float(direction[0, 0])
    if wanted <= torch.finfo(dtype).max:
        assert_close(float(found.distance), wanted, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_a_direction_of_zeros_leaves_nothing() -> None:
    found = boundary(nn.ReLU(), torch.zeros_like(ROW))
    assert (found.distance.tolist(), found.switch) == ([math.inf], ("",))


def test_names_of_functions_are_numbered() -> None:
    def model(x: Tensor) -> Tensor:
        return F.relu(F.relu(x - 1) - 1.5)

    found = boundary(model, torch.tensor([[0.0, 0.0, -1.0]], dtype=torch.float64))
    assert_close(found.distance, torch.tensor([2.5], dtype=torch.float64))
    assert found.switch == ("relu#2",)


def test_adaptive_pools_have_windows_of_different_lengths() -> None:
    """Five positions in three windows: 0-1, 1-3 and 3-4; what comes nearest to a maximum lies outside its window."""
    image = torch.tensor([[[[4.0, 0.0, 3.0, 9.0, 0.0]]]], dtype=torch.float64)
    direction = torch.tensor([[[[0.0, 0.0, 1.0, 0.0, 0.0]]]], dtype=torch.float64)
    found = boundary(nn.Sequential(nn.AdaptiveMaxPool2d((1, 3))), direction, image)
    assert_close(found.distance, torch.tensor([6.0], dtype=torch.float64))


class Steps(nn.Module):
    """Of which a method is the model."""

    def ahead(self, x: Tensor) -> Tensor:
        return 2 * x if x.sum() > 0 else x.relu()


def test_another_branch_is_another_region() -> None:
    def model(x: Tensor) -> Tensor:
        return 2 * x.relu() if x[0, 0] > 1 else x

    here, near, there = (freeze(model, torch.full((1, 2), number)) for number in (1.5, 1.6, 0.5))
    assert here.same_region(near)
    assert not here.same_region(there)
    with pytest.raises(ValueError, match="got one that took another branch there"):
        here.flipped(there)
    steps = Steps().eval()
    assert not freeze(steps.ahead, torch.ones(1, 2)).same_region(freeze(steps.ahead, -torch.ones(1, 2)))
    for other in (freeze(nn.Tanh(), torch.ones(1, 2)), freeze(model, torch.full((1, 3), 1.5))):
        with pytest.raises(ValueError, match=r"other must be the same model, .*; got different switches"):
            here.same_region(other)
