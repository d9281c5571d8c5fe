"""Receptive fields against networks that are really run: changed pixels, and cells that change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from captum_scoremap.receptive_fields import ReceptiveField, receptive_field
from tests.between import Wrapped
from tests.state import untouched


class Residual(nn.Module):
    """Adds its input in place, as ResNets do."""

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        out += x
        return F.gelu(out)


class Concatenate(nn.Module):
    """Branches side by side, as in Inception and DenseNet."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], dim=1)


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.layer(x.mean((2, 3), keepdim=True)))


class Attention(nn.Module):
    """Self-attention among the cells of each row: columns see everything, rows stay apart."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(channels, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        tokens = x.permute(0, 2, 3, 1).reshape(n * h, w, c)
        tokens = self.attention(tokens, tokens, tokens)[0]
        return tokens.reshape(n, h, w, c).permute(0, 3, 1, 2)


def shift(x: Tensor) -> Tensor:
    """Writes into views of a tensor that starts out constant, as temporal shift modules do."""
    out = torch.zeros_like(x)
    out[:, :2, 1:] = x[:, :2, :-1]
    out[:, 2:] = x[:, 2:]
    return out


def attend(x: Tensor) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)
    return F.scaled_dot_product_attention(tokens, tokens, tokens).transpose(1, 2).reshape(x.shape)


def conv(*args: Any, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(*args, **kwargs)


NETWORKS: dict[str, Callable[[], list[nn.Module]]] = {
    "plain": lambda: [conv(3, 4, 3, stride=2), nn.GELU(), conv(4, 4, 3), nn.MaxPool2d(2)],
    "padded": lambda: [conv(3, 4, 5, stride=2, padding=2), nn.Tanh(), conv(4, 4, 3, padding=1)],
    "rows skipped by a stride": lambda: [conv(3, 4, 1, stride=3), conv(4, 4, 3, padding=1)],
    "oblong": lambda: [conv(3, 4, (1, 5), stride=(2, 1), padding=(0, 2)), conv(4, 4, (3, 1), stride=(1, 2))],
    "grouped": lambda: [conv(3, 4, 3), conv(4, 4, 3, groups=4), conv(4, 8, 3, groups=2)],
    "dilated": lambda: [conv(3, 4, 3, dilation=2, padding=2), conv(4, 4, 3, dilation=(3, 1), padding=1)],
    "ceiling": lambda: [nn.MaxPool2d(3, 2, ceil_mode=True), nn.AvgPool2d(2, 2, padding=1, ceil_mode=True)],
    "residual": lambda: [
        conv(3, 4, 3),
        Residual(conv(4, 4, 3, padding=1), nn.GELU(), conv(4, 4, 3, padding=1)),
    ],
    "dense": lambda: [conv(3, 4, 3), Concatenate(nn.Identity(), conv(4, 2, 3, padding=1)), nn.AvgPool2d(2)],
    "inception": lambda: [
        Concatenate(conv(3, 2, 1), conv(3, 2, 5, padding=2), nn.MaxPool2d(3, 1, 1)),
        conv(7, 4, 3, stride=2),
    ],
    "branch not taken": lambda: [
        Concatenate(conv(3, 2, 7, padding=3), conv(3, 2, 1)),
        Wrapped(lambda x: x[:, 2:]),
    ],
    "transposed": lambda: [conv(3, 4, 3, stride=2), nn.ConvTranspose2d(4, 4, 3, stride=2, output_padding=1)],
    "transposed, apart": lambda: [conv(3, 4, 2, stride=2), nn.ConvTranspose2d(4, 4, 2, stride=3, padding=1)],
    "transposed, dilated": lambda: [
        nn.ConvTranspose2d(3, 4, 3, padding=2, dilation=2),
        conv(4, 4, 2, stride=2),
    ],
    "adaptive": lambda: [conv(3, 4, 3), nn.AdaptiveAvgPool2d((4, 5)), nn.GELU()],
    "adaptive maximum": lambda: [conv(3, 4, 3), nn.AdaptiveMaxPool2d((5, 3))],
    "nearest": lambda: [conv(3, 4, 3, stride=2), nn.Upsample(scale_factor=2), conv(4, 4, 3)],
    "bilinear": lambda: [conv(3, 4, 3, stride=3), nn.Upsample((11, 7), mode="bilinear")],
    "bilinear, corners": lambda: [nn.AvgPool2d(3), nn.Upsample((9, 13), mode="bilinear", align_corners=True)],
    "bilinear, scaled": lambda: [nn.AvgPool2d(3), nn.Upsample(scale_factor=1.7, mode="bilinear")],
    "bicubic": lambda: [conv(3, 4, 3), nn.Upsample((6, 8), mode="bicubic")],
    "antialiased": lambda: [
        Wrapped(lambda x: F.interpolate(x, (5, 4), mode="bilinear", antialias=True)),
        nn.BatchNorm2d(3),
    ],
    "reflected": lambda: [conv(3, 4, 5, padding=2, padding_mode="reflect"), conv(4, 4, 3, stride=2)],
    "circular": lambda: [conv(3, 4, 3, padding=1, padding_mode="circular"), nn.AvgPool2d(2)],
    "one-sided padding": lambda: [nn.ZeroPad2d((0, 3, 2, -1)), conv(3, 4, 4, stride=2), nn.Softplus()],
    "gate": lambda: [conv(3, 4, 3), Gate(4), conv(4, 4, 3)],
    "local response": lambda: [conv(3, 4, 3), nn.LocalResponseNorm(3), conv(4, 4, 2)],
    "batch norm": lambda: [conv(3, 4, 3), nn.BatchNorm2d(4), nn.Hardswish()],
    "instance norm": lambda: [conv(3, 4, 3), nn.InstanceNorm2d(4)],
    "group norm": lambda: [conv(3, 4, 3), nn.GroupNorm(2, 4)],
    "channel softmax": lambda: [conv(3, 4, 3, stride=2), nn.Softmax2d(), nn.GLU(dim=1)],
    "pixel shuffle": lambda: [conv(3, 8, 3, stride=2), nn.PixelShuffle(2), conv(2, 2, 2)],
    "channel shuffle": lambda: [Concatenate(conv(3, 2, 1), conv(3, 2, 3, padding=1)), nn.ChannelShuffle(2)],
    "attention in rows": lambda: [conv(3, 4, 3, stride=3), Attention(4, heads=2)],
    "attention everywhere": lambda: [conv(3, 4, 4, stride=4), Wrapped(attend)],
    "shift": lambda: [conv(3, 4, 3, stride=2), Wrapped(shift)],
    "channels last": lambda: [
        conv(3, 4, 3, stride=2),
        Wrapped(lambda x: x.permute(0, 2, 3, 1)),
        nn.LayerNorm(4),
    ],
    "channels last in memory": lambda: [
        conv(3, 4, 3),
        Wrapped(lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)),
        nn.AdaptiveAvgPool2d(1),
    ],
    "features": lambda: [conv(3, 4, 3, stride=2), nn.Flatten(), nn.Linear(4 * 8 * 6, 5)],
    "unfolded": lambda: [
        nn.Unfold(3, dilation=2, padding=2, stride=2),
        nn.GELU(),
        nn.Fold((15, 14), 3, dilation=2, padding=(3, 2), stride=2),
        nn.MaxPool2d(2),
    ],
    "only padding": lambda: [conv(3, 4, 1, padding=2), nn.GELU()],
}


def network(name: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*NETWORKS[name]()).double().eval()


def seen(model: nn.Module, size: tuple[int, int], channel_dim: int, dim: int) -> Tensor:
    """Which rows (dim 2) or columns (dim 3) change each cell of the output when they change, (L, H, W)."""
    generator = torch.Generator().manual_seed(1)
    changed = []
    for line in range(size[dim - 2]):
        changes = []
        for _ in range(4):
            image = 3 * torch.randn(1, 3, *size, generator=generator, dtype=torch.double)
            other = image.clone()
            other.select(dim, line).normal_(std=30, generator=generator)
            with torch.no_grad():
                change = (model(image) - model(other)).abs().amax(channel_dim)[0]
            changes.append(change.reshape(*change.shape, *[1] * (2 - change.ndim)) > 1e-12)
        changed.append(torch.stack(changes).any(0))
    return torch.stack(changed)


def ends(changed: Tensor) -> tuple[Tensor, Tensor]:
    """First line, and one after the last, that changes each cell; zero and zero if none does."""
    some = changed.any(0)
    first = changed.int().argmax(0)
    last = len(changed) - changed.flip(0).int().argmax(0)
    return first * some, last * some


@pytest.mark.parametrize("name", NETWORKS)
def test_outside_a_box_nothing_matters_and_its_edges_do(name: str) -> None:
    model, size = network(name), (17, 14)
    channel_dim = -1 if name == "channels last" else 1
    field = receptive_field(model, model, size, channel_dim)
    rows = ends(seen(model, size, channel_dim, dim=2))
    cols = ends(seen(model, size, channel_dim, dim=3))
    expected = torch.stack([cols[0], rows[0], cols[1], rows[1]], dim=-1)
    torch.testing.assert_close(field.boxes, expected, rtol=0, atol=0)


def test_every_layer_below_counts_for_itself() -> None:
    model = network("plain")
    sizes = [receptive_field(model, layer, (17, 14)).size for layer in model]
    assert sizes == [(3, 3), (3, 3), (7, 7), (9, 9)]


@pytest.mark.parametrize(
    ("name", "layer", "side", "size", "stride", "padding"),
    [
        # Araujo, Norris, Sim: Computing Receptive Fields of Convolutional Neural Networks (Distill, 2019):
        # AlexNet (v2, its first padding two pixels more in torchvision) and Inception (v3).
        ("alexnet", "features", 224, 195, 32, 66),
        ("inception_v3", "Mixed_7c", 299, 1311, 32, 618),
        # By hand: 7x7 stride 2, pool 3 stride 2, then 3x3 twice in each of 2 blocks, all at stride 4.
        ("resnet18", "layer1", 64, 43, 4, 21),
    ],
)
@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
def test_published_sizes(name: str, layer: str, side: int, size: int, stride: int, padding: int) -> None:
    model = torchvision.models.get_model(name, weights=None)
    field = receptive_field(model, model.get_submodule(layer), (side, side))
    assert field.size == (size, size)
    assert field.stride == (stride, stride)
    assert field.offset == (-padding, -padding)


def test_center_is_that_of_the_box_before_clipping() -> None:
    model = network("padded")
    field = receptive_field(model, model, (17, 14))
    assert field.size == (9, 9)
    assert field.center(4, 3) == (field.box(4, 3)[0] + 4.5, field.box(4, 3)[1] + 4.5)
    assert field.center(0, 0) == (0.5, 0.5)


def test_center_of_cells_that_all_see_everything_is_spread_evenly() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 2, stride=2), Gate(4))
    field = receptive_field(model, model, (8, 12))
    assert field.stride == (0, 0)
    assert field.center(0, 5) == (11.0, 1.0)


def test_padding_with_pixels_of_the_image_leaves_stride_and_size() -> None:
    blurred = nn.Sequential(
        nn.ReflectionPad2d((2, 1, 2, 1)), conv(3, 3, 4, stride=2), nn.ReplicationPad2d(1), conv(3, 3, 3)
    )
    field = receptive_field(blurred, blurred, (20, 20))
    assert (field.size, field.stride, field.offset) == ((8, 8), (2, 2), (-4, -4))


def test_a_layer_that_runs_twice_counts_as_its_last_run() -> None:
    layer = conv(3, 3, 3, padding=1)
    model = nn.Sequential(layer, layer, nn.ReLU())
    assert receptive_field(model, layer, (9, 9)).size == (5, 5)


@pytest.mark.parametrize("batch_first", [False, True])
def test_attention_of_pytorch_in_every_implementation(batch_first: bool) -> None:
    encoder = nn.TransformerEncoderLayer(4, 2, dim_feedforward=8, batch_first=batch_first).eval()
    tokens = Wrapped(lambda x: encoder(x.flatten(2).transpose(1, 2)))
    if not batch_first:
        tokens = Wrapped(lambda x: encoder(x.flatten(2).permute(2, 0, 1)).transpose(0, 1))
    model = nn.Sequential(conv(3, 4, 4, stride=4), tokens)
    with torch.no_grad():
        field = receptive_field(model, model, (8, 12), channel_dim=-1)
    assert field.boxes.tolist() == [[[0, 0, 12, 8]]] * 6


def test_images_of_any_number_of_channels_and_type() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True)).to(torch.bfloat16)
    assert receptive_field(model, model[0], (1, 300, 300)).box(297, 0) == (0, 297, 3, 300)


def test_a_function_serves_as_model() -> None:
    model = network("plain")
    field = receptive_field(lambda x: model(x).softmax(1), model[2], (17, 14))
    assert field.size == (7, 7)


def test_model_is_as_before_also_after_an_error() -> None:
    model = nn.Sequential(conv(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), Wrapped(torch.fft.fft))
    model[1].eval()
    with untouched(model):
        receptive_field(model[:3], model[1], (9, 9))
    with untouched(model), pytest.raises(NotImplementedError):
        receptive_field(model, model[1], (9, 9))


def test_an_operation_of_unknown_reach_is_named_with_its_module() -> None:
    model = nn.Sequential(conv(3, 4, 3), nn.Sequential(nn.ReLU(), Wrapped(torch.fft.fft)))
    text = r"^model must consist of operations whose reach is known, got _fft_r2c in 1\.1\. Pass the part"
    with pytest.raises(NotImplementedError, match=text):
        receptive_field(model, model[0], (9, 9))


@pytest.mark.parametrize(
    ("function", "operation"),
    [
        (lambda x: F.conv2d(x, x[:1, :, :2, :2]), "convolution with weights that depend on the image"),
        (lambda x: torch.zeros(x.shape).add_(x), "add_ of a constant"),
        (lambda x: x if x.sum() > 0 else -x, "_local_scalar_dense"),
    ],
)
def test_what_depends_on_more_than_the_structure_is_an_error(
    function: Callable[[Tensor], Tensor], operation: str
) -> None:
    model = Wrapped(function)
    with pytest.raises(NotImplementedError, match=f"got {operation} in the model itself"):
        receptive_field(model, model, (9, 9))


@pytest.mark.parametrize("input_size", [(8,), (0, 8), (1, 3, 8, 8), 8])
def test_input_size_must_be_that_of_an_image(input_size: tuple[int, ...] | int) -> None:
    model = network("plain")
    with pytest.raises(ValueError, match=r"^input_size must be \(H, W\) or \(C, H, W\) in pixels, got [(8]"):
        receptive_field(model, model, input_size)


def test_layer_must_belong_to_the_model() -> None:
    with pytest.raises(ValueError, match=r"^layer must run when model does, got one that does not"):
        receptive_field(network("plain"), nn.ReLU(), (17, 14))


@pytest.mark.parametrize(
    ("function", "got"),
    [
        (lambda x: x.unbind(1), "tuple"),
        (lambda x: x[:, None], r"\(4, 1, 3, 9, 9\)"),
        (lambda x: x[:1], r"\(1, 3, 9, 9\)"),
        (lambda x: torch.ones(3), "Tensor"),
    ],
)
def test_layer_must_give_cells(function: Callable[[Tensor], Any], got: str) -> None:
    model = Wrapped(function)
    text = rf"^layer must give one tensor \(N, C, H, W\), .* that depends on the image, got {got} for N = 4\."
    with pytest.raises(ValueError, match=text):
        receptive_field(model, model, (9, 9))


@pytest.mark.parametrize("find", [ReceptiveField.box, ReceptiveField.center])
def test_cells_outside_the_layer_have_no_box(find: Callable[[ReceptiveField, int, int], object]) -> None:
    model = network("plain")
    field = receptive_field(model, model, (17, 14))
    with pytest.raises(ValueError, match=r"^row must be from 0 to 2, got 3. The layer has 3 x 2 cells.$"):
        find(field, 3, 0)
    with pytest.raises(ValueError, match=r"^col must be from 0 to 1, got -1. The layer has 3 x 2 cells.$"):
        find(field, 0, -1)
