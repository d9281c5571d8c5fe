"""`prepare`: the copy gives what the model gives, and only what is proven right is folded."""

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.testing import assert_close

from captum_scoremap import ScoreMap
from captum_scoremap.models import load_model, prepare


def randomize_norms(module: nn.Module) -> None:
    """Statistics and scales as after training: none of them zero or one."""
    generator = torch.Generator().manual_seed(0)
    for norm in module.modules():
        if isinstance(norm, _BatchNorm):
            size = norm.running_mean.shape
            norm.running_mean.copy_(0.1 * torch.randn(size, generator=generator))
            norm.running_var.copy_(0.5 + torch.rand(size, generator=generator))
            norm.weight.data.copy_(0.5 + torch.rand(size, generator=generator))
            norm.bias.data.copy_(0.1 * torch.randn(size, generator=generator))


def outputs_by_name(module: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """Tensor outputs of all modules, as they are when the module ends."""
    found: dict[str, Tensor] = {}

    def record(name: str, output: object) -> None:
        if isinstance(output, Tensor):
            found[name] = output.detach().clone()

    handles = [
        part.register_forward_hook(lambda _, __, output, name=name: record(name, output))
        for name, part in module.named_modules()
    ]
    with torch.no_grad():
        module(inputs)
    for handle in handles:
        handle.remove()
    return found


def ends_in_convolution(part: nn.Module) -> bool:
    """Whether what a module gives is what a convolution gives, so that folding the next norm changes it."""
    while isinstance(part, nn.Sequential) and len(part):
        part = part[-1]
    return isinstance(part, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d))


def norm_names(module: nn.Module) -> list[str]:
    return [name for name, part in module.named_modules() if isinstance(part, _BatchNorm)]


def check_prepared(model: nn.Module, prepared: nn.Module, inputs: Tensor) -> None:
    """Same layer names, and the same outputs at every layer but the convolutions."""
    plain, fast = outputs_by_name(model, inputs), outputs_by_name(prepared, inputs)
    assert {name for name, _ in model.named_modules()} <= {name for name, _ in prepared.named_modules()}
    assert set(plain) <= set(fast)
    parts = dict(model.named_modules())
    compared = [name for name in plain if not ends_in_convolution(parts[name])]
    for name in compared:
        scale = float(plain[name].abs().max()) or 1.0
        difference = float((plain[name] - fast[name]).abs().max()) / scale
        assert difference <= 1e-10, f"{name}: {difference}"
    assert not any(parameter.requires_grad for parameter in prepared.parameters())
    assert not any(part.training for part in prepared.modules())


@pytest.mark.parametrize(
    ("name", "side", "left"),
    [
        ("torchvision:resnet50", 64, 0),
        ("torchvision:mobilenet_v2", 64, 0),
        ("torchvision:vgg11_bn", 32, 0),
        ("torchvision:densenet121", 64, 62),  # norms before their convolutions, after a concatenation
        ("torchvision:googlenet", 64, 2),  # in the auxiliary branch, which does not run in eval mode
        ("torchvision:regnet_x_400mf", 64, 0),
        ("timm:mobilenetv3_small_100", 64, 0),
        ("efficientnet_lite0", 64, 0),
    ],
)
def test_prepared_models_give_the_same(name: str, side: int, left: int) -> None:
    model = load_model(name, "default" if name == "efficientnet_lite0" else "none", dtype=torch.float64).module
    if name != "efficientnet_lite0":
        randomize_norms(model)
    before = copy.deepcopy(model.state_dict())
    prepared = prepare(model)
    assert len(norm_names(prepared)) == left
    generator = torch.Generator().manual_seed(1)
    check_prepared(model, prepared, torch.randn(2, 3, side, side, generator=generator, dtype=torch.float64))
    assert all(parameter.requires_grad for parameter in model.parameters())
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


def test_a_model_in_training_mode_is_prepared_in_eval_mode_and_stays_in_training_mode() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    prepared = prepare(model)
    assert model.training
    assert model[1].training
    assert not prepared[1].training
    assert isinstance(prepared[1], nn.Identity)


def test_norm_with_activation_keeps_its_activation() -> None:
    prepared = prepare(timm.create_model("tf_efficientnet_lite0").eval())
    assert isinstance(prepared.get_submodule("bn1.act"), nn.ReLU6)
    assert prepared.bn1(torch.full((1, 1), -1.0)).item() == 0.0


class Flattened(nn.Module):
    def __init__(self, flatten: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(144, 2)
        self.flatten = flatten

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu()
        return self.head(self.flatten(x))


@pytest.mark.parametrize(
    ("flatten", "by_view"),
    [
        (lambda x: x.view(x.size(0), -1), True),
        (lambda x: x.view((x.size(0), -1)), True),
        (lambda x: x.view(x.shape).flatten(1), False),
        (lambda x: x.flatten(1), False),
        (lambda x: x.view(x.size(0), 2, 2, x.size(2), -1).flatten(1), False),
    ],
)
def test_a_model_that_flattens_by_view_keeps_its_layout(flatten: Callable[[Tensor], Tensor], by_view: bool) -> None:
    model, images = Flattened(flatten).eval(), torch.randn(1, 3, 8, 8)
    prepared = prepare(model)
    assert_close(prepared(images), model(images))
    assert isinstance(prepared.norm, nn.Identity)
    assert prepared.conv.weight.is_contiguous(memory_format=torch.channels_last) is not by_view


def test_convolutions_have_channels_last_weights() -> None:
    prepared = prepare(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv3d(3, 4, 3), nn.Conv1d(3, 4, 3)))
    assert prepared[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert prepared[1].weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert prepared[2].weight.is_contiguous()


class Branching(nn.Module):
    """Modules around one convolution and one norm, wired in a way that decides whether they may be folded."""

    def __init__(self, wiring: str, traceable: bool = True) -> None:
        super().__init__()
        self.traceable = traceable
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.other = nn.BatchNorm2d(3)
        self.alias = self.norm
        self.steps = [self.conv, self.norm]  # as a tuple or mapping of modules, unknown to PyTorch
        self.wiring = wiring

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if not self.traceable and float(x.sum()) > 1e9:
            return y
        if self.wiring == "alias":
            return self.alias(y)
        if self.wiring == "in a list":
            return self.steps[1](y)
        if self.wiring == "unregistered":
            return self.__dict__["steps"][-1](y).relu()
        if self.wiring == "read twice":
            return self.norm(y) + y
        if self.wiring == "norm called twice":
            return self.norm(self.norm(y))
        if self.wiring == "convolution called twice":
            return self.norm(self.conv(y))
        if self.wiring == "two norms":
            return self.norm(y) + self.other(y)
        if self.wiring == "weight read elsewhere":
            return self.norm(y) + F.conv2d(x, self.conv.weight, padding=1)
        if self.wiring == "statistics read elsewhere":
            return self.norm(y) * self.norm.weight.sum()
        if self.wiring == "changed in between":
            return self.norm(y.relu_())
        if self.wiring == "returned":
            return torch.cat([self.norm(y), y])
        return self.norm(y)


@pytest.mark.parametrize("traceable", [True, False])
@pytest.mark.parametrize(
    ("wiring", "folded"),
    [
        ("plain", True),
        ("alias", True),
        ("in a list", True),
        ("unregistered", True),
        ("read twice", False),
        ("norm called twice", False),
        ("convolution called twice", False),
        ("two norms", False),
        ("weight read elsewhere", False),
        ("statistics read elsewhere", False),
        ("changed in between", False),
        ("returned", False),
    ],
)
def test_only_what_nothing_else_reads_is_folded(wiring: str, folded: bool, traceable: bool) -> None:
    model = Branching(wiring, traceable).double().eval()
    randomize_norms(model)
    inputs = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if traceable else "ignore")
        prepared = prepare(model, inputs)
    assert isinstance(prepared.norm, nn.Identity) is folded
    torch.testing.assert_close(prepared(inputs), model(inputs), rtol=1e-12, atol=1e-12)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in prepared.modules())


def test_untraceable_model() -> None:
    model = Branching("plain", traceable=False).double().eval()
    randomize_norms(model)
    inputs = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"got Branching \(.*2 norms stay .*: norm, other. Pass inputs="):
        untouched = prepare(model)
    assert isinstance(untouched.norm, nn.BatchNorm2d)
    with pytest.warns(UserWarning, match=r"1 norms stay as they are, which costs time only: other\.$"):
        prepared = prepare(model, inputs)
    assert isinstance(prepared.norm, nn.Identity)
    torch.testing.assert_close(prepared(inputs), model(inputs), rtol=1e-12, atol=1e-12)


def test_an_optional_argument_counts_as_its_default() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
            y = self.conv(x)
            return self.norm(y) + y if skip is None else self.norm(y) + skip

    assert isinstance(prepare(Skip()).norm, nn.BatchNorm2d)


class Conditional(nn.Module):
    """Reads its convolution beside the norm, and so must keep both, where it is told to."""

    def __init__(self, traceable: bool) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.traceable = traceable

    def forward(
        self,
        x: Tensor,
        skip: Tensor | None = None,
        *,
        raw: bool = False,
        sizes: tuple[int, ...] = (1, 2),
        **rest: object,
    ) -> Tensor:
        y = self.conv(x)
        if not self.traceable and float(x.sum()) > 1e9:
            return y
        if raw:
            return y
        return self.norm(y).relu() if skip is None else self.norm(y) + y * skip


@pytest.mark.parametrize("traceable", [True, False])
@pytest.mark.filterwarnings("ignore:model must be traceable")
def test_settings_are_those_under_which_norms_were_folded(traceable: bool) -> None:
    model = Conditional(traceable).double().eval()
    randomize_norms(model)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    prepared = prepare(model, x)
    assert isinstance(prepared.norm, nn.Identity)
    for copied in (prepared, copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
        for arguments in ({}, {"skip": None}, {"raw": False, "sizes": (1, 2)}):
            torch.testing.assert_close(copied(x, **arguments), model(x, **arguments), rtol=1e-12, atol=1e-12)
        with pytest.raises(ValueError, match=r"skip must be None for a prepared model.* got a tensor \(2, 3, 4, 4\)"):
            copied(x, x)
        with pytest.raises(ValueError, match=r"raw must be False for a prepared model.* got True. Prepare the model"):
            copied(x, raw=True)
        with pytest.raises(ValueError, match=r"sizes must be \(1, 2\) for a prepared model.* got \(1, 3\)"):
            copied(x, sizes=(1, 3))
        with pytest.raises(ValueError, match=r"rest must be \{\} for a prepared model.* got \{'scale': 2\}"):
            copied(x, scale=2)
        with pytest.raises(TypeError, match=r"forward\(\) missing 1 required positional argument: 'x'"):
            copied()
    torch.testing.assert_close(
        ScoreMap(prepared).attribute(x, (0, 1, 1)), ScoreMap(model).attribute(x, (0, 1, 1)), rtol=1e-10, atol=1e-12
    )
    for example in ((x, x), {"x": x, "skip": x}, {"x": x, "raw": True}):
        left = prepare(model, example)
        arguments = (example, {}) if isinstance(example, tuple) else ((), example)
        assert isinstance(left.norm, nn.BatchNorm2d)
        torch.testing.assert_close(left(*arguments[0], **arguments[1]), model(*arguments[0], **arguments[1]))
        torch.testing.assert_close(left(x), model(x))  # nothing was folded, so that nothing is refused


class Standardized(nn.Conv2d):
    """A convolution that uses its weights in a way of its own."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight / self.weight.flatten(1).norm(dim=1)[:, None, None, None]
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class Binary(nn.Conv2d):
    """A convolution that makes its weights binary, and with them a bias, which it has none of."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (one if one is None else one.sign() / one.shape[1] for one in (self.weight, self.bias))
        return F.conv2d(x, weight, bias, self.stride, self.padding)


class Biasless(nn.Conv2d):
    """A convolution that refuses a bias."""

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is not None:
            raise RuntimeError("no bias is expected")
        return super().forward(x)


@pytest.mark.parametrize(
    "convolution",
    [
        Standardized(3, 4, 3),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
        nn.ConvTranspose2d(4, 4, 3, groups=2),
        Binary(3, 4, 3, bias=False),
        Biasless(3, 4, 3, bias=False),
    ],
    ids=["standardized", "parametrized", "grouped transposed", "binary", "biasless"],
)
def test_convolutions_that_cannot_take_a_norm_are_left(convolution: nn.Module) -> None:
    model = nn.Sequential(convolution, nn.BatchNorm2d(4)).double().eval()
    randomize_norms(model)
    prepared = prepare(model)
    assert isinstance(prepared[1], nn.BatchNorm2d)
    inputs = torch.randn(1, convolution.in_channels, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(prepared(inputs), model(inputs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("convolution", "norm", "shape"),
    [
        (nn.Conv1d(3, 4, 3, dilation=2), nn.BatchNorm1d(4), (2, 3, 9)),
        (nn.Conv2d(4, 4, 3, groups=2, bias=False), nn.BatchNorm2d(4, affine=False), (2, 4, 9, 9)),
        (nn.Conv2d(3, 4, 3, padding=2, padding_mode="reflect"), nn.BatchNorm2d(4), (2, 3, 9, 9)),
        (nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4), (2, 3, 5, 5, 5)),
        (nn.ConvTranspose2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), (2, 3, 5, 5)),
    ],
)
def test_every_kind_of_convolution(convolution: nn.Module, norm: nn.Module, shape: tuple[int, ...]) -> None:
    model = nn.Sequential(convolution, norm).double().eval()
    if norm.affine:
        randomize_norms(model)
    prepared = prepare(model)
    assert isinstance(prepared[1], nn.Identity)
    inputs = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(prepared(inputs), model(inputs), rtol=1e-12, atol=1e-12)


def test_norms_without_statistics_and_watched_layers_are_left() -> None:
    without = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    assert isinstance(prepare(without)[1], nn.BatchNorm2d)
    watched = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    watched[0].register_forward_hook(lambda *_: None)
    assert isinstance(prepare(watched)[1], nn.BatchNorm2d)


def test_prepare_takes_modules_only() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got function"):
        prepare(lambda x: x)


def test_inputs_that_are_no_arguments_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(TypeError, match=r"inputs must be arguments of the model, got .*: too many positional"):
        prepare(model, (torch.ones(1, 3, 5, 5), 1))
    with pytest.raises(TypeError, match=r"inputs must be arguments of the model, got .*: got an unexpected keyword"):
        prepare(model, {"pixel_values": torch.ones(1, 3, 5, 5)})


def test_a_model_of_several_arguments_is_recorded_on_a_tuple() -> None:
    class TwoImages(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.norm(self.conv(left if float(left.sum()) > float(right.sum()) else right))

    model = TwoImages().double().eval()
    randomize_norms(model)
    pair = torch.ones(1, 3, 5, 5, dtype=torch.float64), torch.zeros(1, 3, 5, 5, dtype=torch.float64)
    prepared = prepare(model, pair)
    assert isinstance(prepared.norm, nn.Identity)
    torch.testing.assert_close(prepared(*pair), model(*pair), rtol=1e-12, atol=1e-12)


class Remembers(nn.Module):
    """Keeps what it computed last, in an attribute and in a list, and reads a number of its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.conv(x)
        self.seen[:] = [self.last.relu()]
        return self.norm(self.last).relu() / (1 + self.norm.eps)


def test_a_model_that_holds_what_it_computed_is_copied() -> None:
    model = Remembers().double().eval()
    randomize_norms(model)
    x = torch.randn(1, 3, 5, 5, dtype=torch.float64)
    expected = model(x)
    assert model.last.grad_fn is not None
    prepared = prepare(model, x)
    torch.testing.assert_close(prepared(x), expected, rtol=1e-12, atol=1e-12)
    assert model.last.grad_fn is not None
    with torch.no_grad():
        prepared(2 * x)
    torch.testing.assert_close(model.last, model.conv(x), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_weight_norm_of_old_is_copied() -> None:
    model = nn.Sequential(torch.nn.utils.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)).double().eval()
    randomize_norms(model)
    x = torch.randn(1, 3, 5, 5, dtype=torch.float64)
    expected = model(x)
    torch.testing.assert_close(prepare(model)(x), expected, rtol=1e-12, atol=1e-12)


KEPT: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "an attribute": lambda model, x: model.__dict__.setdefault("table", torch.ones_like(x) * 2),
    "by its size": lambda model, x: model.tables.setdefault("size", x.new_ones(x.shape[0], 1, 1, 1)),
    "in a list": lambda model, x: (model.seen.append(x * 1.0), model.seen[0])[1],
}


@pytest.mark.parametrize("name", KEPT)
def test_what_a_model_keeps_of_its_runs_is_not_of_the_trace(name: str) -> None:
    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)
            self.tables: dict[str, Tensor] = {}
            self.seen: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.conv(x))
            return self.head((x * KEPT[name](self, x)).mean((2, 3)))

    model, images = Keeping().eval(), torch.rand(2, 3, 6, 6)
    assert_close(prepare(model)(images), copy.deepcopy(model)(images))
