"""FusedScoreMap against its definition written out, and what it promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from captum_scoremap import CompleteScoreMap, FusedScoreMap, linear_form, semantic_patches
from captum_scoremap.attribution.fused import log_odds
from captum_scoremap.linear import Subject, layer_shapes, main_layers, main_modules
from captum_scoremap.metrics import parameter_randomization
from tests.state import GlobalState

LABELS = 5


def with_weights(model: nn.Module, generator: torch.Generator) -> nn.Module:
    for parameter in model.parameters():
        parameter.data = (
            torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / parameter[0].numel() ** 0.5
        )
    return model.double().eval()


@pytest.fixture
def model(generator: torch.Generator) -> nn.Sequential:
    """Piecewise linear, with maps of 16 x 16, 8 x 8 and 4 x 4."""
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, LABELS),
    )
    with_weights(network, generator)
    return network


@pytest.fixture
def inputs(generator: torch.Generator) -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=generator, dtype=torch.float64)


def fused_by_hand(model: nn.Sequential, layers: list[int], image: Tensor, label: int) -> Tensor:
    """Steps 1 to 5 of the class, one image, with plain autograd: a piecewise-linear network's A is the gradient."""
    image = image.clone().requires_grad_()
    value, outputs = image, {}
    for index, module in enumerate(model):
        value = outputs[index] = module(value)
    probability = value.softmax(1)[0, label]
    odds = (probability / (1 - probability)).log()
    detail = torch.zeros(image.shape[-2:], dtype=image.dtype)
    connected = torch.ones(image.shape[-2:], dtype=torch.bool)
    outputs[-1] = image
    for index in (-1, *layers):
        (gradient,) = torch.autograd.grad(odds, outputs[index], retain_graph=True)
        score_map = (gradient * outputs[index]).sum(1, keepdim=True).detach()
        detail += F.interpolate(score_map / score_map.abs().max(), image.shape[-2:], mode="bilinear")[0, 0]
        if index < 0:
            continue
        (gradient,) = torch.autograd.grad(value[0, label], outputs[index], retain_graph=True)
        adds = (gradient * outputs[index]).sum(1)[0] != 0
        rows, columns = (image.shape[axis] // adds.shape[axis - 2] for axis in (2, 3))
        connected &= adds.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    bias = odds.detach() - score_map.sum()
    everywhere_alike = score_map * score_map.numel() + bias
    belief = 1 / (1 + torch.exp(-F.interpolate(everywhere_alike, image.shape[-2:], mode="bilinear")[0, 0]))
    return torch.where(detail > 0, detail**2 * belief, -(detail**2)) * connected


@pytest.mark.parametrize("layers", [[1, 4, 6], [4, 6], [6]])
def test_the_map_is_what_its_definition_says(model: nn.Sequential, inputs: Tensor, layers: list[int]) -> None:
    target = torch.tensor([3, 0])
    found = FusedScoreMap(model, [model[index] for index in layers]).attribute(inputs, target=target)
    assert found.shape == (2, 1, 16, 16)
    for image, label, fused in zip(inputs, target.tolist(), found[:, 0], strict=True):
        torch.testing.assert_close(fused, fused_by_hand(model, layers, image[None], label))


def test_the_default_is_the_last_layer_of_each_resolution(model: nn.Sequential, inputs: Tensor) -> None:
    chosen = FusedScoreMap(model, [model[1], model[4], model[6]]).attribute(inputs, target=1)
    torch.testing.assert_close(FusedScoreMap(model).attribute(inputs, target=1), chosen, rtol=0, atol=0)


def test_tuples_in_tuples_out(model: nn.Sequential, inputs: Tensor) -> None:
    method = FusedScoreMap(model)
    (fused,) = method.attribute((inputs,), target=1)
    torch.testing.assert_close(fused, method.attribute(inputs, target=1), rtol=0, atol=0)


# --- log-odds ---


@pytest.mark.parametrize("target", [2, (2,), torch.tensor(2), torch.tensor([2, 2, 2]), [2, 2, 2], [(2,)] * 3])
def test_log_odds_are_those_of_the_softmax(target: object, generator: torch.Generator) -> None:
    scores = torch.randn(3, LABELS, generator=generator, dtype=torch.float64)
    probability = scores.softmax(1)[:, 2]
    torch.testing.assert_close(log_odds(scores, target), (probability / (1 - probability)).log())


def test_log_odds_of_a_pixel_are_among_the_labels_of_that_pixel(generator: torch.Generator) -> None:
    scores = torch.randn(3, LABELS, 4, 4, generator=generator, dtype=torch.float64)
    probability = scores.softmax(1)[:, 2, 1, 3]
    torch.testing.assert_close(log_odds(scores, (2, 1, 3)), (probability / (1 - probability)).log())


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_a_single_score_is_its_own_log_odds(shape: tuple[int, ...], generator: torch.Generator) -> None:
    scores = torch.randn(shape, generator=generator)
    torch.testing.assert_close(log_odds(scores, None), scores.reshape(3), rtol=0, atol=0)


# --- layers ---


class Residual(nn.Module):
    """Halves the resolution in the middle of its branch, and uses one ReLU twice."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Conv2d(6, 6, 1)
        self.down = nn.Conv2d(6, 6, 3, stride=2, padding=1)
        self.shortcut = nn.Conv2d(6, 6, 1, stride=2)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.down(self.relu(self.before(x))) + self.shortcut(x))


class Network(nn.Module):
    """Four resolutions, channels-last tokens, and a layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.blocks = nn.ModuleList([Residual(), Residual(), Residual()])
        self.relu = nn.ReLU()
        self.tokens = nn.LayerNorm(6)
        self.head = nn.Linear(6, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        x = self.tokens(x.movedim(1, -1))
        return self.head(self.relu(x).mean((1, 2)))


def test_main_layers_lie_outside_of_branches(inputs: Tensor) -> None:
    network = Network().double().eval()
    before = GlobalState.now()
    found = list(main_modules(Subject(network, (inputs.repeat(1, 1, 2, 2),))))
    assert found == [network.stem, *network.blocks[:-1], network.tokens]  # channels last
    assert GlobalState.now() == before


def test_fewer_resolutions_are_fine(inputs: Tensor) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 14 * 14, LABELS)).double()
    assert list(main_modules(Subject(network, (inputs,)))) == [network[1]]


def test_a_network_without_maps_is_named(inputs: Tensor) -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, LABELS)).double().eval()
    with pytest.raises(ValueError, match=r"layers must be named for this model, for none of its modules returns a map"):
        FusedScoreMap(flat).attribute(inputs, target=0)


def test_layers_are_looked_for_once_for_each_size(model: nn.Sequential, inputs: Tensor) -> None:
    calls = []
    model.register_forward_pre_hook(lambda module, arguments: calls.append(arguments))
    method = FusedScoreMap(model)
    method.attribute(inputs, target=0)
    assert len(calls) == 2
    method.attribute(inputs, target=1)
    assert len(calls) == 3
    method.attribute(inputs[..., :8], target=1)
    assert len(calls) == 5


# --- promises ---


class Halves(nn.Module):
    """DiFull (Rao et al. 2022): the score of label 0 sees the left half of the image alone, label 1 the right."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.joined = nn.Identity()
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        halves = [self.features(half) for half in x.chunk(2, dim=3)]
        joined = self.joined(torch.cat(halves, dim=3))
        return torch.cat([self.head(half.mean((2, 3))) for half in joined.chunk(2, dim=3)], dim=1)


def test_a_disconnected_cell_gets_exactly_zero(inputs: Tensor, generator: torch.Generator) -> None:
    network = with_weights(Halves(), generator)
    for label, seen in ((0, slice(None, 8)), (1, slice(8, None))):
        fused = FusedScoreMap(network, [network.joined]).attribute(inputs, target=label)
        outside = fused.clone()
        outside[..., seen] = 0
        assert (outside == 0).all()
        assert (fused[..., seen] > 0).any((1, 2, 3)).all()


def test_an_image_without_influence_gives_a_map_of_zeros(inputs: Tensor) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 14 * 14, LABELS)).double().eval()
    nn.init.zeros_(network[2].weight)
    fused = FusedScoreMap(network).attribute(inputs, target=0)
    torch.testing.assert_close(fused, torch.zeros(2, 1, 16, 16, dtype=torch.float64), rtol=0, atol=0)


def test_randomizing_the_network_destroys_the_map(model: nn.Sequential, generator: torch.Generator) -> None:
    images = torch.randn(20, 3, 16, 16, generator=generator, dtype=torch.float64)
    correlations = parameter_randomization(
        model,
        lambda randomized, inputs, target: FusedScoreMap(randomized).attribute(inputs, target=target),
        images,
        torch.arange(20) % LABELS,
        layers=["0"],
    )
    assert correlations["0"].mean().abs() < 0.2


def test_inputs_must_be_images(model: nn.Sequential, inputs: Tensor) -> None:
    with pytest.raises(ValueError, match=r"inputs must be one tensor of images, \(N, C, H, W\), got .*, .*"):
        FusedScoreMap(model).attribute((inputs, inputs), target=0)


def test_layers_must_not_be_empty(model: nn.Sequential) -> None:
    with pytest.raises(ValueError, match=r"layers must name at least one module, got none\. Leave it out"):
        FusedScoreMap(model, [])


@pytest.mark.parametrize("method", [FusedScoreMap, CompleteScoreMap])
def test_layers_must_be_modules(method: Any, model: nn.Sequential) -> None:
    with pytest.raises(TypeError, match=r"layer must be a module, got the name 'relu'"):
        method(model, "relu")
    with pytest.raises(TypeError, match=r"layer must be a module, got int"):
        method(model, 5)


def test_a_layer_must_return_a_map(model: nn.Sequential, inputs: Tensor) -> None:
    with pytest.raises(ValueError, match=r"layers must return maps .*, got \(2, 5\) from a Linear"):
        FusedScoreMap(model, [model[9]]).attribute(inputs, target=0)


def test_one_layer_is_one_layer(inputs: Tensor, generator: torch.Generator) -> None:
    """A Sequential is a layer, not a list of its modules."""
    network = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Flatten(), nn.Linear(4 * 14 * 14, LABELS)
    ).double()
    network = with_weights(network, generator)
    found = FusedScoreMap(network, network[0]).attribute(inputs, target=0)
    torch.testing.assert_close(found, FusedScoreMap(network, [network[0]]).attribute(inputs, target=0), rtol=0, atol=0)


# --- tokens ---


class Block(nn.Module):
    """Attention and an MLP, without norms; tokens (N, tokens, C)."""

    def __init__(self, sequence_first: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=not sequence_first)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.mlp(x)


class Transformer(nn.Module):
    """Patches of 4 pixels, two more tokens before them, six blocks; the score is read from the first token."""

    def __init__(self, sequence_first: bool = False, has_tokens: bool = True) -> None:
        super().__init__()
        self.sequence_first, self.has_tokens = sequence_first, has_tokens
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.tokens = nn.Parameter(torch.randn(1, 2, 8))
        self.blocks = nn.ModuleList([Block(sequence_first) for _ in range(6)])
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        if self.has_tokens:
            x = torch.cat([self.tokens.expand(len(x), -1, -1), x], 1)
        x = x.transpose(0, 1) if self.sequence_first else x
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        x = x.transpose(0, 1) if self.sequence_first else x
        return self.head(x[:, 0] if self.has_tokens else x.mean(1))


@pytest.fixture
def wide(generator: torch.Generator) -> Tensor:
    return torch.randn(2, 3, 16, 24, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("has_tokens", [True, False])
@pytest.mark.parametrize("sequence_first", [True, False])
def test_tokens_are_fused(sequence_first: bool, has_tokens: bool, wide: Tensor, generator: torch.Generator) -> None:
    network = with_weights(Transformer(sequence_first, has_tokens), generator)
    grid = (4, 6)
    expected = {network.patches: grid, **{network.blocks[block]: grid for block in (1, 3, 4)}}
    assert main_modules(Subject(network, (wide,))) == expected
    assert list(main_modules(Subject(lambda x: network(x), (wide,)))) == list(expected)  # a function
    fused = FusedScoreMap(network).attribute(wide, target=1)
    assert fused.shape == (2, 1, 16, 24)
    assert (fused > 0).any()
    named = FusedScoreMap(network, list(expected)).attribute(wide, target=1)
    torch.testing.assert_close(fused, named, rtol=0, atol=0)
    alone = torch.cat([FusedScoreMap(network).attribute(one[None], target=1) for one in wide])
    torch.testing.assert_close(fused, alone, rtol=1e-8, atol=1e-8)


class _Tokens(nn.Module):
    """Maps (N, C, h, w) to tokens (N, 1 + h w, C), the mean before them."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        return torch.cat([x.mean(1, keepdim=True), x], 1)


class _First(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum(1)


class Heads(nn.Sequential):
    """A block that splits its tokens into heads, (N, heads, tokens, C / heads), as for norms of queries and keys."""

    def forward(self, x: Tensor) -> Tensor:
        heads = self[0](x.unflatten(2, (4, 10)).transpose(1, 2))  # 7 tokens of 10 channels look like 7 x 10 positions
        return x + heads.transpose(1, 2).flatten(2)


def test_heads_of_attention_are_no_map(generator: torch.Generator) -> None:
    blocks = [Heads(nn.Tanh()) for _ in range(4)]
    network = with_weights(
        nn.Sequential(nn.Conv2d(3, 40, 4, 4), _Tokens(), *blocks, _First(), nn.Linear(40, 2)), generator
    )
    images = torch.randn(1, 3, 8, 12, generator=generator, dtype=torch.float64)
    assert list(main_modules(Subject(network, (images,)))) == [network[0], *blocks[1:3]]
    assert bool((FusedScoreMap(network).attribute(images, target=1) != 0).any())


@pytest.mark.parametrize("sequence_first", [True, False])
def test_complete_maps_of_tokens_add_up(sequence_first: bool, wide: Tensor, generator: torch.Generator) -> None:
    network = with_weights(Transformer(sequence_first), generator)
    score = network(wide)[:, 1].detach()
    for layers in (None, network.blocks[2], list(network.blocks[1:3])):
        complete, placeless = CompleteScoreMap(network, layers).attribute(wide, 1, return_placeless=True)
        torch.testing.assert_close(complete.sum((1, 2, 3)) + placeless, score, rtol=1e-9, atol=1e-9)
    form = linear_form(network, wide, 1, network.blocks[2])
    torch.testing.assert_close(form.complete_map().sum((1, 2, 3)) + form.placeless, score, rtol=1e-9, atol=1e-9)


class Queries(nn.Module):
    """A decoder's object queries, as many as fill a square, over the positions of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU())
        self.queries = nn.Parameter(torch.randn(1, 25, 8))
        self.blocks = nn.ModuleList(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True) for _ in range(3))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.features(x).flatten(2).transpose(1, 2)
        found = self.queries.expand(len(x), -1, -1)
        for block in self.blocks:
            found = block(found, tokens)
        return self.head(nn.Tanh()(found))[:, 0]


def test_object_queries_are_no_positions_and_passing_modules_no_layers() -> None:
    model = Queries().eval()
    assert main_layers(model, torch.randn(1, 3, 32, 32)) == ["features"]


def test_modules_that_the_forward_makes_are_no_layers(inputs: Tensor) -> None:
    """They could not be named, and run no more when the model runs again."""

    class Makes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(nn.Tanh()(self.conv(x)).mean((2, 3)))

    model = Makes().to(inputs.dtype).eval()
    assert main_layers(model, inputs) == ["conv"]
    assert_close(FusedScoreMap(model).attribute(inputs, 1), FusedScoreMap(model, model.conv).attribute(inputs, 1))


@pytest.mark.parametrize("side", [32, 28])
@pytest.mark.parametrize("is_padded", [False, True])
def test_tokens_that_were_merged_are_positions(side: int, is_padded: bool) -> None:
    """Swin's as Hugging Face has them: a quarter of the tokens, of twice the channels, also of an odd row of them."""

    class Merging(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.merge = nn.Conv2d(3, 8, 4, 4), nn.Linear(32, 16)
            self.fine = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2))
            self.coarse = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 16, batch_first=True) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.patches(x).flatten(2).transpose(1, 2)
            for block in self.fine:
                tokens = block(tokens)
            grid = tokens.unflatten(1, (side // 4, side // 4))
            odd = side // 4 % 2
            grid = (
                nn.functional.pad(grid, (0, 0, 0, odd, 0, odd))
                if is_padded
                else grid[:, : -odd or None, : -odd or None]
            )
            cells = grid.shape[1] // 2
            grid = grid.unflatten(2, (cells, 2)).unflatten(1, (cells, 2))
            tokens = self.merge(grid.transpose(2, 3).flatten(3).flatten(1, 2))
            for block in self.coarse:
                tokens = block(tokens)
            return tokens.mean(1)

    assert main_layers(Merging().eval(), torch.randn(1, 3, side, side)) == ["fine.1", "coarse.1"]


def test_logits_by_name_as_the_models_of_hugging_face_return_them(model: nn.Sequential, inputs: Tensor) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, images: Tensor) -> dict[str, Tensor]:
            return {"logits": self.inner(images)}

    torch.testing.assert_close(FusedScoreMap(Named()).attribute(inputs, 2), FusedScoreMap(model).attribute(inputs, 2))


# --- models of one block a stage ---


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        # the last stage has a class token, on which alone the score depends
        ("Pvt", {}, ["block.0.0", "block.1.0", "block.2.0", "patch_embeddings.3"]),
        ("PvtV2", {}, ["blocks.0", "blocks.0", "blocks.0", "blocks.0"]),
        # stages that return maps
        ("Segformer", {"decoder_hidden_size": 16}, ["stages.0", "stages.1", "stages.2", "stages.3"]),
    ],
)
def test_one_block_is_a_layer(name: str, options: dict[str, int], expected: list[str]) -> None:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(
        image_size=64, depths=[1] * 4, hidden_sizes=[8, 16, 24, 32], num_attention_heads=[1, 2, 2, 4], **options
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForImageClassification")(config).double().eval()
        image = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    found = main_layers(model, image)
    assert len(found) == len(expected)
    assert all(one.endswith(end) for one, end in zip(found, expected, strict=True)), found
    assert bool((FusedScoreMap(model).attribute(image, 1) != 0).any())
    complete, placeless = CompleteScoreMap(model).attribute(image, 1, return_placeless=True)
    torch.testing.assert_close(complete.sum() + placeless[0], model(image).logits[0, 1], rtol=1e-9, atol=1e-12)


class Padded(nn.Module):
    """A transformer of PyTorch's, some of whose tokens are padding: by itself it goes over to nested tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 3)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        padding = torch.arange(tokens.shape[1]).expand(len(x), -1) >= 13
        return self.head(self.encoder(tokens, src_key_padding_mask=padding)[:, :13].mean(1))


def test_layers_of_a_transformer_with_padding_are_found() -> None:
    model, images = Padded().double().eval().requires_grad_(False), torch.rand(2, 3, 16, 16, dtype=torch.float64)
    before = torch.backends.mha.get_fastpath_enabled(), GlobalState.now()
    assert next(iter(layer_shapes(model, images).values())) == (2, 8, 4, 4)
    assert FusedScoreMap(model).attribute(images, 1).shape == (2, 1, 16, 16)
    complete, placeless = CompleteScoreMap(model).attribute(images, 1, return_placeless=True)
    score = linear_form(model, images, 1).score
    assert_close(complete.sum((1, 2, 3)) + placeless, score, rtol=1e-10, atol=1e-12)
    assert len(semantic_patches(model, model.encoder.layers[1], images, [0, 1], k=2, size=8)) == 2
    assert (torch.backends.mha.get_fastpath_enabled(), GlobalState.now()) == before
