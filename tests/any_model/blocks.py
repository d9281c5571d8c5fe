"""Blocks, parametrizations and wrappers around models, each between a convolution and a linear head."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from tests.configurations import parallel_on_cpu

from . import Case, Model

Function = Callable[[Tensor], Tensor]


class Around(nn.Module):
    """A convolution (N, 8, 6, 6), a block that keeps the shape, a linear head on the mean over positions."""

    def __init__(self, block: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.block, self.head = nn.Conv2d(3, 8, 3), block, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.conv(x)).mean((2, 3)))


def image(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 8, 8, dtype=torch.float64)


def around(make: Callable[[], Any], **options: Any) -> Case:
    return Case(lambda: (Around(make()), image()), **options)


def block(function: Function, **options: Any) -> Case:
    return around(lambda: function, **options)


def small() -> nn.Sequential:
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)]
    return nn.Sequential(*layers).double().eval()


def quietly(make: Callable[..., Any], *args: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(*args)


# --- blocks -------------------------------------------------------------------------------------------


class ConvNorm(nn.Module):
    """Convolution, norm and SiLU, as YOLO's detectors have them."""

    def __init__(self, before: int, after: int, size: int = 1) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(before, after, size, padding=size // 2, bias=False), nn.BatchNorm2d(after)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.norm(self.conv(x)), inplace=True)


class CrossStage(nn.Module):
    """C2f: half of the channels go through bottlenecks, every stage is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = ConvNorm(8, 8), ConvNorm(16, 8)
        self.inner = nn.ModuleList(nn.Sequential(ConvNorm(4, 4, 3), ConvNorm(4, 4, 3)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).chunk(2, 1))
        parts.extend(stage(parts[-1]) + parts[-1] for stage in self.inner)
        return self.last(torch.cat(parts, 1))


class PyramidPooling(nn.Module):
    """SPPF."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.pool = ConvNorm(8, 4), ConvNorm(16, 8), nn.MaxPool2d(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.first(x)]
        maps.extend(self.pool(maps[-1]) for _ in range(3))
        return self.last(torch.cat(maps, 1))


class Distribution(nn.Module):
    """The expected distance under a softmax, as heads of box edges have it."""

    def forward(self, x: Tensor) -> Tensor:
        bins = torch.arange(4, dtype=x.dtype)
        n, _, rows, columns = x.shape
        expected = (x.view(n, 2, 4, rows, columns).softmax(2) * bins.view(1, 1, 4, 1, 1)).sum(2)
        return expected.repeat(1, 4, 1, 1)


class Graph(nn.Module):
    """Positions as the nodes of a graph: messages gathered, mixed and added up where they arrive."""

    def __init__(self, reduce: str) -> None:
        super().__init__()
        self.message, self.reduce = nn.Linear(16, 8), reduce
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("edges", torch.randint(36, (2, 90), generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        nodes = x.flatten(2).transpose(1, 2)
        source, goal = self.edges
        messages = self.message(torch.cat([nodes[:, source], nodes[:, goal]], 2)).relu()
        place = goal.view(1, -1, 1).expand_as(messages)
        if self.reduce == "index_add":
            found = torch.zeros_like(nodes).index_add(1, goal, messages)
        elif self.reduce == "scatter_add":
            found = torch.zeros_like(nodes).scatter_add_(1, place, messages)
        elif self.reduce == "index_put":
            found = torch.zeros_like(nodes).transpose(0, 1).index_put((goal,), messages.transpose(0, 1), True)
            found = found.transpose(0, 1)
        elif self.reduce == "attention":
            scores = messages.sum(2)
            top = torch.full_like(nodes[:, :, 0], -torch.inf).scatter_reduce(1, place[:, :, 0], scores, "amax")
            weights = (scores - top.gather(1, place[:, :, 0])).exp()
            total = torch.zeros_like(nodes[:, :, 0]).scatter_add(1, place[:, :, 0], weights)
            weights = weights / total.gather(1, place[:, :, 0])
            found = torch.zeros_like(nodes).scatter_add(1, place, messages * weights[:, :, None])
        else:
            found = torch.zeros_like(nodes).scatter_reduce(1, place, messages, self.reduce, include_self=False)
        return found.transpose(1, 2).reshape(x.shape)


class Fourier(nn.Module):
    """A Fourier neural operator's layer: a complex product for each frequency."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 2, 2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(x)
        out = torch.zeros_like(spectrum)
        low = torch.einsum("nixy,ioxy->noxy", spectrum[:, :, :3, :2], torch.view_as_complex(self.weight))
        out[:, :, :3, :2] = low
        return F.gelu(torch.fft.irfft2(out, s=x.shape[-2:])) + x


class Equilibrium(nn.Module):
    """A fixed point, by as many steps as it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(30):
            after = torch.tanh(0.1 * self.conv(z) + x)
            if float((after - z).detach().abs().max()) < 1e-3:
                break
            z = after
        return z


class Radiance(nn.Module):
    """A field's color along rays: sines of positions, a perceptron, and what the way lets through."""

    def __init__(self) -> None:
        super().__init__()
        self.field = nn.Sequential(nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 9))

    def forward(self, x: Tensor) -> Tensor:
        rays = x.flatten(2).transpose(1, 2)
        waves = torch.cat([wave(rays * 2.0**octave) for octave in range(3) for wave in (torch.sin, torch.cos)], -1)
        found = self.field(waves)
        density, color = found[..., :1].relu(), found[..., 1:].sigmoid()
        opacity = 1 - torch.exp(-density * 0.1)
        passed = torch.cumprod(torch.cat([torch.ones_like(opacity[:, :1]), 1 - opacity + 1e-10], 1), 1)[:, :-1]
        return (opacity * passed * color).transpose(1, 2).reshape(x.shape)


class StateSpace(nn.Module):
    """A selective state space, step by step: its rates come from the image."""

    def __init__(self) -> None:
        super().__init__()
        self.rates, self.log = nn.Linear(8, 12), nn.Parameter(torch.zeros(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        steps = x.flatten(2).transpose(1, 2)
        rate, read, write = self.rates(steps).split((8, 2, 2), 2)
        rate, state, found = F.softplus(rate), steps.new_zeros(len(x), 8, 2), []
        for t in range(steps.shape[1]):
            decay = torch.exp(-rate[:, t, :, None] * self.log.exp())
            state = decay * state + rate[:, t, :, None] * write[:, t, None] * steps[:, t, :, None]
            found.append((state * read[:, t, None]).sum(-1))
        return torch.stack(found, 2).view(x.shape)


class Experts(nn.Module):
    """A mixture of experts: each token goes to the two that a router chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(8, 4), nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2).reshape(-1, 8)
        weights, chosen = self.router(tokens).softmax(-1).topk(2)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(chosen == number)
            out.index_add_(0, token, F.gelu(expert(tokens[token])) * weights[token, place, None])
        return out.view(len(x), -1, 8).transpose(1, 2).reshape(x.shape)


class Squeeze(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class Wave(nn.Module):
    """A warp by a flow found from the image, a correlation and a softmax over it, as in optical flow."""

    def __init__(self) -> None:
        super().__init__()
        self.flow = nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        grid = F.affine_grid(torch.eye(2, 3).to(x).expand(len(x), 2, 3), x.shape, align_corners=False)
        warped = F.grid_sample(x, grid + 0.05 * self.flow(x).permute(0, 2, 3, 1), align_corners=False)
        volume = torch.einsum("nchw,ncij->nhwij", x, warped).flatten(3).softmax(-1)
        return torch.einsum("nhwk,nck->nchw", volume, warped.flatten(2))


class Splines(nn.Module):
    """A Kolmogorov-Arnold layer: cubic B-splines of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.base = nn.Parameter(torch.randn(8, 8, 8)), nn.Linear(8, 8)
        self.register_buffer("knots", torch.linspace(-3, 3, 12))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.permute(0, 2, 3, 1)
        at, knots = tokens.unsqueeze(-1), self.knots
        basis = ((at >= knots[:-1]) & (at < knots[1:])).to(x.dtype)
        for order in (1, 2, 3):
            rise = (at - knots[: -order - 1]) / (knots[order:-1] - knots[: -order - 1])
            fall = (knots[order + 1 :] - at) / (knots[order + 1 :] - knots[1:-order])
            basis = rise * basis[..., :-1] + fall * basis[..., 1:]
        return (self.base(F.silu(tokens)) + torch.einsum("nhwik,iok->nhwo", basis, self.weight)).permute(0, 3, 1, 2)


class Capsules(nn.Module):
    """Votes of the positions for four capsules, routed by agreement."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(36, 4, 8, 2))

    def forward(self, x: Tensor) -> Tensor:
        votes = torch.einsum("npc,pocd->npod", x.flatten(2).transpose(1, 2), self.weight)
        agreed = torch.zeros(votes.shape[:3], dtype=x.dtype)
        for _ in range(3):
            found = (agreed.softmax(2).unsqueeze(-1) * votes).sum(1)
            size = (found * found).sum(-1, keepdim=True)
            found = size / (1 + size) * found / (size + 1e-9).sqrt()
            agreed = agreed + (votes * found.unsqueeze(1)).sum(-1)
        return found.flatten(1)[:, :, None, None].expand(-1, -1, 6, 6)


class Hypernetwork(nn.Module):
    """A convolution of each image, by weights made of that image."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Linear(8, 64)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.weights(x.mean((2, 3))).view(-1, 8, 1, 1)
        return F.conv2d(x.reshape(1, -1, 6, 6), weights, groups=len(x)).view(x.shape)


class LowRank(nn.Module):
    """LoRA around a frozen convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Conv2d(8, 8, 1).requires_grad_(False)
        self.down, self.up = nn.Conv2d(8, 2, 1, bias=False), nn.Conv2d(2, 8, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * self.up(F.dropout(self.down(x), 0.1, self.training))


def shifted(x: Tensor) -> Tensor:
    return torch.eye(6, dtype=x.dtype) * 5 + x


def echoed(x: Tensor) -> Tensor:
    """Short Fourier transforms, there and back."""
    window = torch.hann_window(32, dtype=x.dtype)
    spectrum = torch.stft(x.flatten(1), 32, 8, window=window, return_complex=True)
    return torch.istft(spectrum * spectrum.abs(), 32, 8, window=window, length=288).view(x.shape)


def fractional(x: Tensor) -> Tensor:
    samples = torch.full((len(x), 8, 2), 0.3, dtype=x.dtype)
    return F.interpolate(F.fractional_max_pool2d(x, 2, output_size=3, _random_samples=samples), size=6)


LINEAR_ALGEBRA: dict[str, Function] = {
    "least squares": lambda x: torch.linalg.lstsq(shifted(x), x).solution,
    "pseudo-inverse": lambda x: torch.linalg.pinv(shifted(x)) @ x,
    "LU": lambda x: torch.linalg.lu_solve(*torch.linalg.lu_factor(shifted(x)), x),
    "factors of LU": lambda x: torch.linalg.lu(shifted(x))[2],
    "Cholesky": lambda x: torch.cholesky_solve(x, torch.linalg.cholesky(shifted(x @ x.transpose(2, 3)))),
    "reflections": lambda x: torch.linalg.householder_product(x.tril(), x[..., 0]),
    "cross product": lambda x: torch.linalg.cross(x[:, :3], x[:, 3:6], dim=1).repeat(1, 3, 1, 1)[:, :8],
}


# --- parametrizations ---------------------------------------------------------------------------------


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return (weight + weight.flip(-1)) / 2


def parametrized() -> nn.Module:
    conv = nn.Conv2d(8, 8, 3, padding=1)
    parametrize.register_parametrization(conv, "weight", Symmetric())
    return conv


def old_weight_norm() -> nn.Module:
    return quietly(nn.utils.weight_norm, nn.Conv2d(8, 8, 3, padding=1))


# --- wrappers around a whole model --------------------------------------------------------------------


def functional() -> tuple[Model, Tensor]:
    model = small()
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    return lambda x: torch.func.functional_call(model, state, (x,)), image()


def ensemble() -> tuple[Model, Tensor]:
    members = [nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.ReLU(), nn.Linear(5, 3)).double() for _ in range(3)]
    state = torch.func.stack_module_state(members)
    call = lambda params, buffers, x: torch.func.functional_call(members[0], (params, buffers), (x,))  # noqa: E731
    return lambda x: torch.vmap(call, (0, 0, None))(*state, x).mean(0), image()


def channels_last() -> tuple[Model, Tensor]:
    model = small().to(memory_format=torch.channels_last)
    return model, image().contiguous(memory_format=torch.channels_last)


def input_gradient() -> tuple[Model, Tensor]:
    """A gradient that the model takes of itself, as an energy's force."""
    model = small()

    def force(x: Tensor) -> Tensor:
        return torch.func.grad(lambda y: model(y)[:, 1].sum())(x).flatten(1)[:, :3]

    return force, image()


def tangents() -> tuple[Model, Tensor]:
    model = small()
    return lambda x: quietly(torch.func.jvp, model, (x,), (x,))[1], image()


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = small()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.model.float()(x.float()).double()


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.block, self.reentrant = CrossStage(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that nothing requires gradients
            return checkpoint(self.block, x, use_reentrant=self.reentrant)  # type: ignore[no-any-return]


def labelled(x: Tensor) -> Tensor:
    """Scores by connectionist temporal classification of columns of positions."""
    steps = x.flatten(2).permute(2, 0, 1)[:5].log_softmax(2)
    words = torch.tensor([[1, 2], [2, 1]])
    losses = F.ctc_loss(steps, words, *x.new_tensor([[5, 5], [2, 2]], dtype=torch.long), reduction="none")
    return losses.view(-1, 1, 1, 1).expand_as(x)


ADJACENCY = (torch.rand(36, 36, generator=torch.Generator().manual_seed(1)) > 0.8).double()


def sparsely(x: Tensor) -> Tensor:
    nodes = x.flatten(2).permute(2, 0, 1).reshape(36, -1)
    return torch.sparse.mm(ADJACENCY.to_sparse(), nodes).relu().view(36, len(x), 8).permute(1, 2, 0).reshape(x.shape)


def by_rows(x: Tensor) -> Tensor:
    nodes = x.flatten(2).permute(2, 0, 1).reshape(36, -1)
    return (ADJACENCY.to_sparse_csr() @ nodes).relu().view(36, len(x), 8).permute(1, 2, 0).reshape(x.shape)


def masked(x: Tensor) -> Tensor:
    """Attention whose scores are held below nothing at all in some places."""
    scores = torch.einsum("nchw,ncij->nhwij", x, x).flatten(3)
    limit = torch.where(ADJACENCY.diagonal() > 0, torch.inf, -torch.inf).to(x.dtype)
    limit[0] = torch.inf
    return torch.einsum("nhwk,nck->nchw", scores.clamp(max=limit).softmax(-1), x.flatten(2))


class Bags(nn.Module):
    """Words of a vocabulary, weighed by what the image says of each."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(10, 8, mode="sum")

    def forward(self, x: Tensor) -> Tensor:
        words = torch.tensor([[1, 2, 9, 4, 5, 6, 7, 0]] * len(x))
        return x * self.words(words, per_sample_weights=x.mean((2, 3)).softmax(1))[:, :, None, None]


def bagged(x: Tensor, mode: str) -> Tensor:
    """Some positions of each image in bags, one of them empty; the last one counts as padding."""
    chosen, starts = torch.tensor([0, 3, 5, 1, 2, 2, 35]), torch.tensor([0, 3, 3, 5, 7])
    options = {"mode": mode, "include_last_offset": True, "padding_idx": 35}
    bags = [F.embedding_bag(chosen, one, starts, **options) for one in x.flatten(2).transpose(1, 2)]
    return torch.stack(bags).sum(1)[:, :, None, None]


def multiplied(x: Tensor) -> Tensor:
    return x + torch.scatter(x, 1, torch.zeros_like(x[:, :2], dtype=torch.int64), x[:, :2], reduce="multiply")


def largest(x: Tensor) -> Tensor:
    return x.index_reduce(1, torch.tensor([0, 0, 3]), x[:, 5:], "amax", include_self=True)


def hessians(x: Tensor) -> Tensor:
    """The second derivatives of a sum of cubes, (N, 4, 4), summed over rows."""
    found = torch.vmap(torch.func.hessian(lambda y: (y**3).sum()))(x.flatten(1)[:, :4])
    return found.sum(1).repeat(1, 2)[:, :, None, None]


COPIES: dict[str, Function] = {
    "view": lambda x: torch.view_copy(x, (2, 288)).relu().view(x.shape),
    "select": lambda x: x * torch.select_copy(x, 1, 0).unsqueeze(1),
    "slice": lambda x: torch.slice_copy(x, 1, 0, 4).relu().repeat(1, 2, 1, 1),
    "transpose": lambda x: torch.transpose_copy(x, 2, 3).relu(),
    "permute": lambda x: torch.permute_copy(x, (0, 1, 3, 2)).relu(),
    "expand": lambda x: torch.expand_copy(x[:, :1], (2, 8, 6, 6)).relu(),
    "unsqueeze": lambda x: torch.unsqueeze_copy(x, 1).relu().squeeze(1),
    "squeeze": lambda x: torch.squeeze_copy(x.unsqueeze(1)).relu(),
    "diagonal": lambda x: x * torch.diagonal_copy(x, 0, 2, 3).unsqueeze(2),
    "unfold": lambda x: torch.unfold_copy(x, 3, 1, 1).squeeze(-1).relu(),
    "as_strided": lambda x: torch.as_strided_copy(x.contiguous(), (2, 288), (288, 1)).relu().view(x.shape),
    "t": lambda x: torch.t_copy(x.flatten(1)).relu().t().reshape(x.shape),
    "split": lambda x: torch.cat([part.relu() for part in torch.split_copy(x, 3, 1)], 1),
    "split_with_sizes": lambda x: torch.cat([part.relu() for part in torch.split_with_sizes_copy(x, (1, 7), 1)], 1),
    "unbind": lambda x: torch.stack([part.relu() for part in torch.unbind_copy(x, 1)], 1),
}

CASES = {
    "YOLO's C2f": around(CrossStage),
    "YOLO's SPPF": around(PyramidPooling),
    "YOLO's distribution of distances": around(Distribution),
    **{
        f"graph, {how}": around(lambda how=how: Graph(how))
        for how in ("index_add", "scatter_add", "index_put", "attention", "sum", "mean", "amax")
    },
    "graph, a sparse matrix": block(sparsely),
    "graph, a sparse matrix by rows": block(lambda x: quietly(by_rows, x)),
    "Fourier neural operator": around(Fourier),
    "Kolmogorov-Arnold": around(Splines),
    "capsules": around(Capsules),
    "hypernetwork": around(Hypernetwork),
    "LoRA": around(LowRank),
    **{name: block(function) for name, function in LINEAR_ALGEBRA.items()},
    "echo": block(echoed),
    "fractional pooling": block(fractional),
    "equilibrium": around(Equilibrium),
    "radiance field": around(Radiance),
    "selective state space": around(StateSpace),
    "mixture of experts": around(Experts),
    "squeeze and excitation": around(Squeeze),
    "warp and correlation": around(Wave),
    "a Hessian for each image": block(lambda x: quietly(hessians, x), gradient=""),
    "products scattered": block(lambda x: quietly(multiplied, x), gradient="differences"),
    "the largest of each index": block(lambda x: quietly(largest, x)),
    "temporal classification": block(labelled),
    "masked attention": block(masked),
    **{f"a copy of {name}": block(function) for name, function in COPIES.items()},
    "pixels and channels shuffled": block(
        lambda x: F.pixel_unshuffle(F.channel_shuffle(F.pixel_shuffle(x, 2).repeat(1, 2, 1, 1).relu(), 2), 2)[:, ::2]
    ),
    "tokens mixed by Fourier's transform": block(
        lambda x: x + torch.fft.fft2(x.flatten(2).transpose(1, 2)).real.transpose(1, 2).view_as(x)
    ),
    "parametrized weight": around(parametrized),
    "weight norm": around(lambda: parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1))),
    "weight norm, the old one": around(old_weight_norm),
    "spectral norm": around(lambda: parametrizations.spectral_norm(nn.Conv2d(8, 8, 3, padding=1))),
    "orthogonal": Case(
        lambda: (nn.Sequential(nn.Flatten(), parametrizations.orthogonal(nn.Linear(192, 3))), image()), random=False
    ),
    "encoder layer": Case(
        lambda: (
            nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Flatten(), nn.Linear(40, 3)),
            torch.randn(2, 5, 8, dtype=torch.float64),
        )
    ),
    "DataParallel": Case(lambda: (parallel_on_cpu(small()), image()), layers=("module.0", "module.2")),
    "functional_call": Case(functional),
    "ensemble by vmap": Case(ensemble),
    "channels last": Case(channels_last),
    "gradient of the model": Case(input_gradient, gradient="differences"),
    "derivative of the model along the image": Case(tangents, gradient=""),
    "checkpoint": around(lambda: Checkpointed(reentrant=False)),
    "checkpoint, re-entrant": around(lambda: Checkpointed(reentrant=True), gradient="differences", random=False),
    # bfloat16 has eight bits
    "autocast": Case(lambda: (Autocast(), image()), tolerance=2e-2, random=False, layers=(), gradient=""),
    "scripted block": around(
        lambda: quietly(torch.jit.script, CrossStage().double().eval()), random=False, layers=("conv",)
    ),
    "scripted block, frozen": around(
        lambda: quietly(torch.jit.freeze, quietly(torch.jit.script, CrossStage().double().eval())),
        random=False,
        layers=("conv",),
    ),
    "bags of rows, weighed by the image": around(Bags),
    **{
        f"bags of live rows, {mode}": block(lambda x, mode=mode: x + bagged(x, mode), layers=("conv",))
        for mode in ("sum", "mean", "max")
    },
    "scripted model": Case(
        lambda: (quietly(torch.jit.script, small()), image()), refused="got a scripted one", random=False
    ),
    "compiled model": Case(
        lambda: (torch.compile(small(), backend="eager"), image()), refused="got a compiled one", random=False
    ),
    "complex weights": block(
        lambda x: (
            (torch.complex(x, x.flip(1)) * torch.polar(torch.ones(8, 1, 1, dtype=x.dtype), ADJACENCY[:8, :1, None]))
            .abs()
            .relu()
        )
    ),
    "a stem of sines": block(lambda x: x * math.sqrt(2) + torch.sin(3 * x) ** 2),
}
