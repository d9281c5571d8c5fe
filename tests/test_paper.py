"""Eq. (2)-(4) of the paper: a network computed by hand, and dense matrices for larger ones."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.testing import assert_close

from captum_scoremap import LayerScoreMap, ScoreMap, bias_terms, freeze, linear_form
from tests import reference
from tests.reference import Operation

# Two layers with weights (a convolution, a fully-connected one), one max-pooling and one ReLU. All on paper:
#
#          | 1 2 0 1 2 |        filter 0  | 1 0 |  bias -7.5      filter 1  |  0 1 |  bias 0.5
#    Y_0 = | 0 1 3 0 1 |                  | 0 2 |                           | -1 0 |
#          | 2 0 1 2 0 |
#
# conv, 2 x 4 a channel.  Channel 0 is Y(i,j) + 2 Y(i+1,j+1) - 7.5, channel 1 is Y(i,j+1) - Y(i+1,j) + 0.5:
#
#    Y_1[0] = | -4.5  0.5 -7.5 -4.5 |   1+2·1-7.5  2+2·3-7.5  0+2·0-7.5  1+2·1-7.5
#             | -7.5 -4.5 -0.5 -7.5 |   0+2·0-7.5  1+2·1-7.5  3+2·2-7.5  0+2·0-7.5
#    Y_1[1] = |  2.5 -0.5 -1.5  2.5 |   2-0+0.5    0-1+0.5    1-3+0.5    2-0+0.5
#             | -0.5  3.5 -0.5 -0.5 |   1-2+0.5    3-0+0.5    0-1+0.5    1-2+0.5
#
# pool, 2 x 2.  The switches are (0,1) and (1,2) in channel 0, (1,1) and (0,3) in channel 1:
#
#    Y_2[0] = | 0.5 -0.5 |      Y_2[1] = | 3.5 2.5 |
#
# relu.  Only the second position of channel 0 is closed:
#
#    Y_3[0] = | 0.5  0   |      Y_3[1] = | 3.5 2.5 |
#
# fc, two labels, on (Y_3[0], Y_3[1]):
#
#    S_0 = 2·0.5 - 1·0 + 2·3.5 + 1·2.5 + 0.5 = 11
#    S_1 = 4·0.5 + 2·0 - 1·3.5 + 3·2.5 - 2   =  4
#
# A and B, from the top down; label 0 first.
#
#    relu:  A = | 2 -1 |  | 2 1 |, B = 0.5; sub-scores | 1 0 |  | 7 2.5 |, M = | 8 2.5 |, and 10.5 + 0.5 = 11.
#    pool:  the closed position loses its coefficient (R_3): A = | 2 0 |  | 2 1 |; the rest as above.
#    conv:  each coefficient goes to its switch (R_2): 2 to (0,1) of channel 0; 2 and 1 to (1,1) and (0,3) of
#           channel 1:
#           M = | 0 1 0 2.5 |, B = 0.5.
#               | 0 7 0 0   |
#    image: each switch spreads its filter: 2 · filter 0 at (0,1), 2 · filter 1 at (1,1), filter 1 at (0,3):
#           A = | 0  2 0  0 1 |     M = A Y_0 = | 0 4  0 0 2 |,  sum 24.
#               | 0  0 6 -1 0 |                 | 0 0 18 0 0 |
#               | 0 -2 0  0 0 |                 | 0 0  0 0 0 |
#           (1,2) has 2·2 of filter 0 and 2·1 of filter 1. B = 0.5 + 2·(-7.5) + (2+1)·0.5 = -13; 24 - 13 = 11.
#
# Label 1 by the same steps from (4 2) (-1 3):
#
#    relu:  A = | 4 2 |  | -1 3 |, M = | -1.5 7.5 |, B = -2, and 6 - 2 = 4.     pool:  A = | 4 0 |  | -1 3 |.
#    conv:  4 at (0,1); -1 at (1,1) and 3 at (0,3): M = | 0  2   0 7.5 |
#                                                       | 0 -3.5 0 0   |
#    image: A = | 0 4 0  0 3 |      M = | 0 8  0 0 6 |,  sum 35;
#               | 0 0 7 -3 0 |          | 0 0 21 0 0 |
#               | 0 1 0  0 0 |          | 0 0  0 0 0 |   B = -2 + 4·(-7.5) + (-1+3)·0.5 = -31; 35 - 31 = 4.
#
# The bias terms of label 0: conv 2·(-7.5) + (2+1)·0.5 = -13.5, fc 0.5; of label 1: conv 4·(-7.5) + (-1+3)·0.5
# = -29, fc -2. The share of conv is the step of sum M from image to conv: 10.5 - 24 = -13.5, 6 - 35 = -29.

IMAGE = [[[1, 2, 0, 1, 2], [0, 1, 3, 0, 1], [2, 0, 1, 2, 0]]]
FILTERS = [[[[1, 0], [0, 2]]], [[[0, 1], [-1, 0]]]]
FILTER_BIAS = [-7.5, 0.5]
WEIGHT = [[2, -1, 2, 1], [4, 2, -1, 3]]
WEIGHT_BIAS = [0.5, -2]


@dataclass(frozen=True)
class OnPaper:
    label: int
    layer: str | None
    coefficients: ArrayLike
    activations: ArrayLike
    score_map: ArrayLike
    bias: float
    score: float


CONV = [
    [[-4.5, 0.5, -7.5, -4.5], [-7.5, -4.5, -0.5, -7.5]],
    [[2.5, -0.5, -1.5, 2.5], [-0.5, 3.5, -0.5, -0.5]],
]
POOL = [[[0.5, -0.5]], [[3.5, 2.5]]]
RELU = [[[0.5, 0]], [[3.5, 2.5]]]

ON_PAPER = [
    OnPaper(0, "relu", [[[2, -1]], [[2, 1]]], RELU, [[[8, 2.5]]], 0.5, 11),
    OnPaper(0, "pool", [[[2, 0]], [[2, 1]]], POOL, [[[8, 2.5]]], 0.5, 11),
    OnPaper(
        0,
        "conv",
        [[[0, 2, 0, 0], [0, 0, 0, 0]], [[0, 0, 0, 1], [0, 2, 0, 0]]],
        CONV,
        [[[0, 1, 0, 2.5], [0, 7, 0, 0]]],
        0.5,
        11,
    ),
    OnPaper(
        0,
        None,
        [[[0, 2, 0, 0, 1], [0, 0, 6, -1, 0], [0, -2, 0, 0, 0]]],
        IMAGE,
        [[[0, 4, 0, 0, 2], [0, 0, 18, 0, 0], [0, 0, 0, 0, 0]]],
        -13,
        11,
    ),
    OnPaper(1, "relu", [[[4, 2]], [[-1, 3]]], RELU, [[[-1.5, 7.5]]], -2, 4),
    OnPaper(1, "pool", [[[4, 0]], [[-1, 3]]], POOL, [[[-1.5, 7.5]]], -2, 4),
    OnPaper(
        1,
        "conv",
        [[[0, 4, 0, 0], [0, 0, 0, 0]], [[0, 0, 0, 3], [0, -1, 0, 0]]],
        CONV,
        [[[0, 2, 0, 7.5], [0, -3.5, 0, 0]]],
        -2,
        4,
    ),
    OnPaper(
        1,
        None,
        [[[0, 4, 0, 0, 3], [0, 0, 7, -3, 0], [0, 1, 0, 0, 0]]],
        IMAGE,
        [[[0, 8, 0, 0, 6], [0, 0, 21, 0, 0], [0, 0, 0, 0, 0]]],
        -31,
        4,
    ),
]


def tensor(values: ArrayLike) -> Tensor:
    return torch.tensor(np.asarray(values), dtype=torch.float64)


def image() -> Tensor:
    return tensor(IMAGE)[None]


@pytest.fixture
def network() -> nn.Sequential:
    """The network of the comment above."""
    model = nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(1, 2, 2),
            pool=nn.MaxPool2d(2),
            relu=nn.ReLU(),
            flatten=nn.Flatten(),
            fc=nn.Linear(4, 2),
        )
    ).double()
    values = {
        "conv.weight": tensor(FILTERS),
        "conv.bias": tensor(FILTER_BIAS),
        "fc.weight": tensor(WEIGHT),
        "fc.bias": tensor(WEIGHT_BIAS),
    }
    model.load_state_dict(values)
    return model.eval()


def on_paper_id(case: OnPaper) -> str:
    return f"{case.layer or 'image'}-label{case.label}"


@pytest.mark.parametrize("case", ON_PAPER, ids=on_paper_id)
def test_linear_form_is_the_one_on_paper(network: nn.Sequential, case: OnPaper) -> None:
    layer = None if case.layer is None else network.get_submodule(case.layer)
    form = linear_form(network, image(), case.label, layer)
    assert_close(form.coefficients[0], tensor(case.coefficients), rtol=0, atol=0)
    assert_close(form.activations[0], tensor(case.activations), rtol=0, atol=0)
    assert_close(form.score_map()[0], tensor(case.score_map), rtol=0, atol=0)
    assert_close(form.bias, tensor([case.bias]), rtol=0, atol=0)
    assert_close(form.score, tensor([case.score]), rtol=0, atol=0)
    assert_close(form.residual, tensor([0.0]), rtol=0, atol=0)


@pytest.mark.parametrize("case", [c for c in ON_PAPER if c.layer], ids=on_paper_id)
def test_layer_score_map_is_the_one_on_paper(network: nn.Sequential, case: OnPaper) -> None:
    attribution = LayerScoreMap(network, network.get_submodule(str(case.layer)))
    score_map, delta = attribution.attribute(image(), case.label, return_convergence_delta=True)
    assert_close(score_map[0], tensor(case.score_map), rtol=0, atol=0)
    assert_close(delta, tensor([0.0]), rtol=0, atol=0)


@pytest.mark.parametrize("case", [c for c in ON_PAPER if not c.layer], ids=on_paper_id)
def test_score_map_of_the_image_is_the_one_on_paper(network: nn.Sequential, case: OnPaper) -> None:
    sub_scores, delta = ScoreMap(network).attribute(image(), case.label, return_convergence_delta=True)
    assert_close(sub_scores[0], tensor(case.score_map), rtol=0, atol=0)
    assert_close(delta, tensor([0.0]), rtol=0, atol=0)
    coefficients = ScoreMap(network, multiply_by_inputs=False).attribute(image(), case.label)
    assert_close(coefficients[0], tensor(case.coefficients), rtol=0, atol=0)


@pytest.mark.parametrize(("label", "conv", "fc"), [(0, -13.5, 0.5), (1, -29.0, -2.0)])
def test_bias_terms_are_those_on_paper(network: nn.Sequential, label: int, conv: float, fc: float) -> None:
    terms = {name: share for name, share in bias_terms(network, image(), label).items() if share.any()}
    assert terms == {"conv": tensor([conv]), "fc": tensor([fc])}


def test_mask_and_switches_are_those_on_paper(network: nn.Sequential) -> None:
    switches = freeze(network, image()).switches
    assert switches["relu"].tolist() == [[[[True, False]], [[True, True]]]]
    # positions in the 2 x 4 plane, row-major: (0,1) (1,2) and (1,1) (0,3)
    assert switches["pool"].tolist() == [[[[1, 6]], [[5, 3]]]]


def test_dense_matrices_give_the_forms_on_paper() -> None:
    operations: list[Operation] = [
        lambda y: reference.convolution(y, np.array(FILTERS, float), np.array(FILTER_BIAS)),
        lambda y: reference.max_pool(y, reference.windows(y, 2, 2), (1, 2)),
        reference.relu,
        lambda y: reference.linear(y.ravel(), np.array(WEIGHT, float), np.array(WEIGHT_BIAS)),
    ]
    names = {None: 0, "conv": 1, "pool": 2, "relu": 3}
    for case in ON_PAPER:
        form = reference.forms(operations, np.array(IMAGE, float), case.label)[names[case.layer]]
        np.testing.assert_array_equal(form.coefficients, case.coefficients)
        np.testing.assert_array_equal(form.activations, case.activations)
        np.testing.assert_array_equal(form.score_map, case.score_map)
        assert (form.bias, form.score) == (case.bias, case.score)


# --- larger chains against dense matrices -------------------------------------------------------------------


def weights(module: nn.Module, name: str) -> NDArray[np.float64]:
    value = getattr(module, name)
    return np.asarray(value.detach().numpy(), dtype=np.float64)


def matrices(module: nn.Module) -> Operation:
    """The dense operation of a module, from its weights and settings alone."""
    match module:
        case nn.Conv1d() | nn.Conv2d() | nn.Conv3d():
            settings = (module.stride[0], int(module.padding[0]), module.dilation[0], module.groups)
            return lambda y: reference.convolution(y, weights(module, "weight"), weights(module, "bias"), *settings)
        case nn.ConvTranspose1d() | nn.ConvTranspose2d() | nn.ConvTranspose3d():
            moves = (module.stride[0], int(module.padding[0]), module.output_padding[0], module.dilation[0])
            return lambda y: reference.transposed_convolution(
                y, weights(module, "weight"), weights(module, "bias"), *moves, module.groups
            )
        case nn.Linear():
            return lambda y: reference.linear(y, weights(module, "weight"), weights(module, "bias"))
        case nn.BatchNorm1d() | nn.BatchNorm2d() | nn.BatchNorm3d():
            names = ("running_mean", "running_var", "weight", "bias")
            return lambda y: reference.batch_norm(y, *(weights(module, name) for name in names), module.eps)
        case nn.ReLU():
            return reference.relu
        case nn.LeakyReLU():
            return lambda y: reference.leaky_relu(y, module.negative_slope)
        case nn.PReLU():
            return lambda y: reference.leaky_relu(y, weights(module, "weight"))
        case nn.ReLU6():
            return lambda y: reference.clamp(y, 0, 6)
        case nn.Hardtanh():
            return lambda y: reference.clamp(y, module.min_val, module.max_val)
        case nn.MaxPool1d() | nn.MaxPool2d() | nn.MaxPool3d():
            pooling = (module.kernel_size, module.stride, module.padding, module.dilation)

            def max_pool(y: NDArray[np.float64]) -> reference.Affine:
                size = pooled_size(y, *pooling)
                return reference.max_pool(y, reference.windows(y, *pooling), size)

            return max_pool
        case nn.AvgPool1d() | nn.AvgPool2d() | nn.AvgPool3d():
            kernel, stride, padding = (np.ravel(s)[0] for s in (module.kernel_size, module.stride, module.padding))

            def average_pool(y: NDArray[np.float64]) -> reference.Affine:
                size = pooled_size(y, kernel, stride, padding)
                return reference.average_pool(y, reference.windows(y, kernel, stride, padding), size)

            return average_pool
        case nn.Flatten():
            return lambda y: reference.view(y, lambda index: index.ravel())
        case _:
            raise NotImplementedError(type(module))


def pooled_size(y: NDArray[np.float64], kernel: int, stride: int, padding: int, dilation: int = 1) -> list[int]:
    return [(n + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1 for n in y.shape[1:]]


CHAINS: dict[str, tuple[tuple[int, ...], Sequence[nn.Module]]] = {
    "alexnet in small": (
        (3, 13, 11),
        [
            nn.Conv2d(3, 4, 3, stride=2, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(4, 6, 3, padding=1, groups=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2, stride=1, padding=1),
            nn.Flatten(),
            nn.Linear(6 * 4 * 3, 7),
            nn.ReLU(inplace=True),
            nn.Linear(7, 3),
        ],
    ),
    "saturating, batch norm, average pooling": (
        (2, 7, 8),
        [
            nn.Conv2d(2, 4, 3, dilation=2, padding=2),
            nn.BatchNorm2d(4),
            nn.ReLU6(inplace=True),
            nn.AvgPool2d(3, stride=2, padding=1),
            nn.Conv2d(4, 4, 3, padding=1, groups=4),
            nn.BatchNorm2d(4),
            nn.Hardtanh(-0.3, 0.7),
            nn.Flatten(),
            nn.Linear(4 * 4 * 4, 3),
        ],
    ),
    "encoder and decoder": (
        (2, 5, 6),
        [
            nn.Conv2d(2, 4, 3, stride=2, padding=1),
            nn.PReLU(4),
            nn.ConvTranspose2d(4, 2, 3, stride=2, padding=1, output_padding=1, groups=2),
            nn.LeakyReLU(0.2, inplace=True),
            nn.MaxPool2d(2, dilation=2, stride=1),
            nn.Flatten(),
            nn.Linear(2 * 4 * 4, 3),
        ],
    ),
    "one dimension": (
        (2, 17),
        [
            nn.Conv1d(2, 4, 5, stride=2, padding=2),
            nn.BatchNorm1d(4),
            nn.ReLU(),
            nn.MaxPool1d(3, stride=2, padding=1),
            nn.ConvTranspose1d(4, 3, 3, stride=2),
            nn.LeakyReLU(-0.5),
            nn.AvgPool1d(2),
            nn.Flatten(),
            nn.Linear(3 * 5, 3),
        ],
    ),
    "three dimensions": (
        (1, 4, 5, 4),
        [
            nn.Conv3d(1, 3, 3, padding=1),
            nn.BatchNorm3d(3),
            nn.ReLU(inplace=True),
            nn.MaxPool3d(2, stride=2, padding=1),
            nn.ConvTranspose3d(3, 2, 2),
            nn.ReLU(),
            nn.AvgPool3d(2),
            nn.Flatten(),
            nn.Linear(2 * 2 * 2 * 2, 3),
        ],
    ),
}


def randomize(model: nn.Module, generator: torch.Generator) -> None:
    """Normal weights, and norm statistics far from 0 and 1."""
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.dtype == torch.float64:
            noise = torch.randn(value.shape, generator=generator, dtype=value.dtype)
            value.data.copy_(noise.abs() + 0.5 if "running_var" in name else noise)


@pytest.mark.parametrize("name", CHAINS)
def test_matrix_form_agrees_at_every_layer(name: str, generator: torch.Generator) -> None:
    shape, modules = CHAINS[name]
    model = nn.Sequential(*modules).double().eval()
    randomize(model, generator)
    x = torch.randn(1, *shape, generator=generator, dtype=torch.float64)
    for label in range(3):
        expected = reference.forms([matrices(module) for module in model], x[0].numpy(), label)
        scale = max(abs(expected[0].score), *(np.abs(form.sub_scores).sum() for form in expected))
        for layer, dense in zip([None, *model], expected, strict=True):
            form = linear_form(model, x, label, layer)
            compared = (
                (form.coefficients[0], dense.coefficients),
                (form.activations[0], dense.activations),
                (form.sub_scores[0], dense.sub_scores),
                (form.score_map()[0], dense.score_map),
                (form.bias[0], dense.bias),
                (form.score[0], dense.score),
            )
            for ours, theirs in compared:
                assert_close(ours, tensor(theirs), rtol=1e-12, atol=1e-12 * scale)
