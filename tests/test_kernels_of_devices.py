"""Kernels that only other devices have are held to the operations that the CPU has for the same layer.

Their operations reach the tape before any device does, so that the CPU can record what a GPU would run.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.testing import assert_close

from captum_scoremap import ScoreMap, freeze, linear_form
from captum_scoremap.rules import DEFAULT, TANGENT, Tangent

aten = torch.ops.aten
MODES = {"RNN_RELU": 0, "RNN_TANH": 1, "LSTM": 2, "GRU": 3}
LENGTHS = torch.tensor([7, 5, 2])


class Head(nn.Module):
    """A recurrent layer and one score for each image of all that it returns."""

    def __init__(self, rnn: nn.RNNBase, packed: bool) -> None:
        super().__init__()
        self.rnn, self.packed = rnn, packed
        self.head = nn.LazyLinear(3)

    def run(self, x: Tensor | PackedSequence) -> Any:
        return self.rnn(x)

    def forward(self, x: Tensor) -> Tensor:
        first = self.rnn.batch_first
        laid_out = x if first else x.transpose(0, 1)
        steps, state = self.run(pack_padded_sequence(laid_out, LENGTHS, first) if self.packed else laid_out)
        if self.packed:
            steps, _ = pad_packed_sequence(steps, first)
        steps = steps if first else steps.transpose(0, 1)
        states = [one.transpose(0, 1).flatten(1) for one in (state if isinstance(state, tuple) else (state,))]
        scores: Tensor = self.head(torch.cat([steps.relu().sum(1), *states], 1))
        return scores


class ByCudnn(Head):
    """The same by the kernel of cuDNN."""

    def run(self, x: Tensor | PackedSequence) -> Any:
        rnn, packed = self.rnn, isinstance(x, PackedSequence)
        data, sizes = (x.data, x.batch_sizes.tolist()) if isinstance(x, PackedSequence) else (x, [])
        directions, count = 2 if rnn.bidirectional else 1, 3
        hidden = data.new_zeros(rnn.num_layers * directions, count, rnn.proj_size or rnn.hidden_size)
        cell = data.new_zeros(rnn.num_layers * directions, count, rnn.hidden_size)
        stride = len(rnn._flat_weights) // (rnn.num_layers * directions)
        output, hidden, cell, _, _ = aten._cudnn_rnn(
            data,
            rnn._flat_weights,
            stride,
            None,
            hidden,
            cell if rnn.mode == "LSTM" else None,
            MODES[rnn.mode],
            rnn.hidden_size,
            rnn.proj_size,
            rnn.num_layers,
            rnn.batch_first,
            rnn.dropout,
            rnn.training,
            rnn.bidirectional,
            sizes,
            None,
        )
        state = (hidden, cell) if rnn.mode == "LSTM" else hidden
        return (x._replace(data=output) if packed else output), state


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"batch_first": True},
        {"num_layers": 2, "bidirectional": True, "dropout": 0.5},
        {"bias": False, "batch_first": True, "bidirectional": True},
        {"proj_size": 4, "num_layers": 2, "bidirectional": True},
        {"proj_size": 4, "bias": False},
        {"nonlinearity": "relu", "num_layers": 2},
        {"nonlinearity": "tanh", "batch_first": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_of_cudnn(kind: type[nn.RNNBase], options: dict[str, Any], packed: bool) -> None:
    if ("proj_size" in options and kind is not nn.LSTM) or ("nonlinearity" in options) != (kind is nn.RNN):
        pytest.skip("there is no such layer")
    torch.manual_seed(0)
    model = Head(kind(5, 6, **options), packed).double().eval()
    inputs = torch.randn(3, 7, 5, dtype=torch.float64)
    model(inputs)
    twin = ByCudnn(model.rnn, packed).double().eval()
    twin.head = model.head
    expected, found = linear_form(model, inputs, 1), linear_form(twin, inputs, 1)
    assert_close(found.score, model(inputs)[:, 1], rtol=1e-12, atol=1e-14)
    assert_close(found.coefficients, expected.coefficients, rtol=1e-10, atol=1e-13)
    assert_close(found.bias, expected.bias, rtol=1e-10, atol=1e-13)


def test_dropout_inside_cudnn_is_refused() -> None:
    model = ByCudnn(nn.LSTM(5, 6, num_layers=2, dropout=0.5, batch_first=True), packed=False)
    model.head = nn.Linear(30, 3)
    model.eval()
    model.rnn.training = True
    with pytest.raises(NotImplementedError, match=r"keeps to itself what dropout between recurrent layers drops"):
        linear_form(model, torch.randn(3, 7, 5), 1)


class FusedLstmCell(nn.LSTMCell):
    def forward(self, x: Tensor, state: Any = None) -> Any:
        hidden, cell = state
        gates = x @ self.weight_ih.t(), hidden @ self.weight_hh.t()
        return aten._thnn_fused_lstm_cell(*gates, cell, self.bias_ih, self.bias_hh)[:2]


class FusedGruCell(nn.GRUCell):
    def forward(self, x: Tensor, state: Any = None) -> Any:
        gates = x @ self.weight_ih.t(), state @ self.weight_hh.t()
        return aten._thnn_fused_gru_cell(*gates, state, self.bias_ih, self.bias_hh)[0]


class FusedNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Any:
        return aten._fused_rms_norm(x, list(self.normalized_shape), self.weight, self.eps)[0]


class ByCell(nn.Module):
    def __init__(self, cell: Any) -> None:
        super().__init__()
        self.cell, self.norm, self.head = cell, nn.RMSNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.new_zeros(len(x), 6)
        state: Any = (hidden, hidden) if isinstance(self.cell, nn.LSTMCell) else hidden
        for step in x.unbind(1):
            state = self.cell(step, state)
        scores: Tensor = self.head(self.norm(state[0] if isinstance(state, tuple) else state))
        return scores


@pytest.mark.parametrize(("plain", "fused"), [(nn.LSTMCell, FusedLstmCell), (nn.GRUCell, FusedGruCell)])
@pytest.mark.parametrize("eps", [None, 0.1])
def test_fused_cells_and_norms(plain: Any, fused: Any, eps: float | None) -> None:
    torch.manual_seed(0)
    model, twin = ByCell(plain(5, 6)).double().eval(), ByCell(fused(5, 6)).double().eval()
    model.norm, twin.norm = nn.RMSNorm(6, eps).double(), FusedNorm(6, eps).double()
    nn.init.normal_(model.norm.weight)
    twin.load_state_dict(model.state_dict())
    inputs = torch.randn(2, 4, 5, dtype=torch.float64)
    expected, found = linear_form(model, inputs, 1), linear_form(twin, inputs, 1)
    assert_close(found.score, model(inputs)[:, 1], rtol=1e-12, atol=1e-14)
    assert_close(found.coefficients, expected.coefficients, rtol=1e-10, atol=1e-13)
    assert_close(found.bias, expected.bias, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("eps", [None, 0.1])
@pytest.mark.parametrize("is_weighted", [True, False])
def test_fused_norms_are_those_of_the_layer(eps: float | None, is_weighted: bool) -> None:
    """On a CPU PyTorch itself takes this operation apart before anything can record it."""
    x, weight = torch.randn(2, 3, 4, 5), torch.randn(4, 5) if is_weighted else None
    found, scale = DEFAULT["_fused_rms_norm"].body(x, [4, 5], weight, eps)
    assert_close(found, nn.functional.rms_norm(x, [4, 5], weight, eps))
    assert scale.shape == (2, 3, 1, 1)


class Warp(nn.Module):
    """An image read at moved places, by one kernel or another."""

    def __init__(self, sample: Any) -> None:
        super().__init__()
        self.sample = sample
        self.conv, self.flow, self.head = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 2, 3, padding=1), nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        features = self.conv(x).relu()
        moved = self.sample(features, self.flow(features).permute(0, 2, 3, 1).tanh())
        scores: Tensor = self.head(moved.relu().flatten(1))
        return scores


@pytest.mark.parametrize("rules", [None, {"grid_sample": Tangent()}, {"cudnn_grid_sampler": Tangent()}])
def test_warps_by_cudnn(rules: Any) -> None:
    """The grid is frozen, or a tangent taken at it, whichever kernel reads the image."""
    bilinear_with_zeros_around = 0, 0, True
    torch.manual_seed(0)
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl(
            "cudnn_grid_sampler", lambda x, grid: aten.grid_sampler_2d(x, grid, *bilinear_with_zeros_around), "CPU"
        )
        library.impl(
            "cudnn_grid_sampler_backward",
            lambda x, grid, slopes: aten.grid_sampler_2d_backward(
                slopes, x, grid, *bilinear_with_zeros_around, [True, True]
            ),
            "CPU",
        )
        model = Warp(lambda x, grid: aten.grid_sampler_2d(x, grid, *bilinear_with_zeros_around)).double().eval()
        inputs = torch.randn(2, 2, 7, 7, dtype=torch.float64)
        model(inputs)
        twin = Warp(aten.cudnn_grid_sampler).double().eval()
        twin(inputs)
        twin.load_state_dict(model.state_dict())
        for layer in ("", "conv", "flow"):
            expected, found = (
                linear_form(one, inputs, 1, one.get_submodule(layer) if layer else None, rules=own)
                for one, own in ((model, rules and {"grid_sample": Tangent()}), (twin, rules))
            )
            assert_close(found.score, model(inputs)[:, 1], rtol=1e-12, atol=1e-14)
            assert_close(found.coefficients, expected.coefficients, rtol=1e-10, atol=1e-13)
            assert_close(found.bias, expected.bias, rtol=1e-10, atol=1e-13)


class Adaptive(nn.Module):
    """A norm whose weight, bias or statistics depend on the image, by one kernel or another."""

    def __init__(self, norm: Any, live: str, of_image: bool) -> None:
        super().__init__()
        self.norm, self.live, self.of_image = norm, live, of_image
        self.conv, self.head = nn.Conv2d(2, 4, 3), nn.Linear(4 * 25, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        own = {"weight": torch.ones_like, "bias": torch.zeros_like, "mean": torch.zeros_like, "var": torch.ones_like}
        of_image = {"weight": x.amax((0, 2, 3)), "bias": x.mean((0, 2, 3))}
        of_image |= {"mean": x.mean((0, 2, 3)), "var": x.var((0, 2, 3))}
        given = [of_image[name] if name in self.live else make(self.conv.bias.detach()) for name, make in own.items()]
        scores: Tensor = self.head(self.norm(x, *given, self.of_image, 0.1, 1e-5)[0].relu().flatten(1))
        return scores


@pytest.mark.parametrize(
    ("live", "of_image"),
    [
        *product(["weight", "bias", "weight bias", "mean var", "weight mean"], [False]),
        *product(["weight", "bias", "weight bias"], [True]),
    ],
)
@pytest.mark.parametrize("vendor", ["cudnn_batch_norm", "miopen_batch_norm"])
def test_norms_of_vendors_with_weights_of_the_image(vendor: str, live: str, of_image: bool) -> None:
    """Their kernels must have a weight, and one of them returns more than PyTorch's own."""
    extra = len(getattr(aten, vendor).default._schema.returns) - 3

    def kernel(*args: Any) -> tuple[Tensor, ...]:
        assert args[1] is not None
        return *aten.native_batch_norm(*args), *[torch.empty(0, dtype=torch.uint8)] * extra

    torch.manual_seed(0)
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl(vendor, kernel, "CPU")
        model = Adaptive(aten.native_batch_norm, live, of_image).double().eval()
        twin = Adaptive(getattr(aten, vendor), live, of_image).double().eval()
        twin.load_state_dict(model.state_dict())
        inputs = torch.randn(1, 2, 7, 7, dtype=torch.float64)
        with torch.no_grad():
            score = model(inputs)[:, 1]
        for layer in ("", "conv"):
            expected, found = (
                linear_form(one, inputs, 1, one.get_submodule(layer) if layer else None) for one in (model, twin)
            )
            assert_close(found.score, score, rtol=1e-12, atol=1e-14)
            assert_close(found.coefficients, expected.coefficients, rtol=1e-10, atol=1e-13)
            assert_close(found.bias, expected.bias, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("is_training", [True, False, None])
def test_dropout_by_one_kernel(share: float, is_training: bool | None) -> None:
    """CUDA draws and multiplies at once; the CPU has that kernel, too, though none of its layers calls it."""
    torch.manual_seed(0)
    conv, head = nn.Conv2d(2, 4, 3).double(), nn.Linear(100, 3).double()
    kept: list[Tensor] = []

    def model(x: Tensor) -> Tensor:
        dropped, mask = torch.native_dropout(conv(x).relu(), share, is_training)
        kept.append(mask.double() / (1 - share) if is_training is not False and share < 1 else mask.double())
        scores: Tensor = head(dropped.flatten(1))
        return scores

    inputs = torch.randn(2, 2, 7, 7, dtype=torch.float64)
    form = linear_form(model, inputs, 1, conv)
    coefficients = head.weight[1].reshape(4, 5, 5) * kept[0] * (conv(inputs) > 0)
    assert_close(form.coefficients, coefficients, rtol=1e-12, atol=1e-15)
    assert_close(form.bias, head.bias[1].expand(2), rtol=1e-12, atol=1e-14)
    assert_close(form.score, form.sums + form.bias, rtol=1e-12, atol=1e-14)
    kept.clear()
    frozen = freeze(model, inputs)
    scale = kept[0]
    assert_close(frozen(2 * inputs), head(((conv(2 * inputs) * (conv(inputs) > 0)) * scale).flatten(1)))
    assert all("dropout" not in name for name in frozen.switches)


@pytest.mark.parametrize("options", [{"grad_kwargs": {"create_graph": True}}, {"rules": TANGENT}])
def test_dropout_by_one_kernel_draws_once(options: dict[str, Any]) -> None:
    """However the map is made, it is that of the units that the run kept."""

    def model(x: Tensor) -> Tensor:
        dropped, mask = torch.native_dropout(x.relu(), 0.5, True)
        kept.append(mask)
        return dropped.sum(1, keepdim=True)

    torch.manual_seed(0)
    kept: list[Tensor] = []
    method = ScoreMap(model, multiply_by_inputs=False, rules=options.get("rules"))
    coefficients = method.attribute(torch.ones(1, 50), 0, grad_kwargs=options.get("grad_kwargs"))
    assert_close(coefficients.detach(), 2.0 * kept[0])
