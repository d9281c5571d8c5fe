"""S = A·Y + B for forward methods as people write them: views, in-place changes, keywords, tricks of the trade."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from captum_scoremap import UnsupportedOperationError, bias_terms, linear_form
from tests.state import untouched

Forward = Callable[..., Tensor]

IMAGES: dict[str, tuple[Forward, Callable[[], tuple[nn.Module, ...]]]] = {}
TOKENS: dict[str, tuple[Forward, Callable[[], tuple[nn.Module, ...]]]] = {}
WITHOUT_RULE: dict[str, tuple[Forward, Callable[[], tuple[nn.Module, ...]]]] = {}


def conv() -> nn.Module:
    return nn.Conv2d(4, 4, 3, padding=1)


def of_images(*modules: Callable[[], nn.Module]) -> Callable[[Forward], Forward]:
    """A function of images x (2, 4, 6, 6) and a convolution that keeps their shape, and of further modules."""

    def register(forward: Forward) -> Forward:
        IMAGES[forward.__name__] = (forward, lambda: (conv(), *(build() for build in modules)))
        return forward

    return register


def of_tokens(*modules: Callable[[], nn.Module]) -> Callable[[Forward], Forward]:
    """A function of tokens x (2, 5, 8) and modules."""

    def register(forward: Forward) -> Forward:
        TOKENS[forward.__name__] = (forward, lambda: tuple(build() for build in modules))
        return forward

    return register


def without_rule(*modules: Callable[[], nn.Module]) -> Callable[[Forward], Forward]:
    """A function of tokens x (2, 5, 8) and modules that no rule covers."""

    def register(forward: Forward) -> Forward:
        WITHOUT_RULE[forward.__name__] = (forward, lambda: tuple(build() for build in modules))
        return forward

    return register


def pooled(x: Tensor) -> Tensor:
    return x.mean((2, 3))


class Written(nn.Module):
    """A network whose forward method is a function of its parts."""

    def __init__(self, forward: Forward, parts: tuple[nn.Module, ...]) -> None:
        super().__init__()
        self.function = forward
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.parts)


# --- written into -------------------------------------------------------------------------------------


@of_images()
def negative_values_set_to_zero(x: Tensor, conv: nn.Module) -> Tensor:
    y = conv(x)
    y[y < 0] = 0
    return pooled(y)


@of_images()
def negative_values_set_to_a_number(x: Tensor, conv: nn.Module) -> Tensor:
    y = conv(x).clone()
    y[y < 0] = -0.3
    return pooled(y)


@of_images()
def rows_written_into_a_buffer(x: Tensor, conv: nn.Module) -> Tensor:
    out = torch.zeros_like(x)
    out[:, :, ::2] = conv(x)[:, :, ::2]
    out[:, :, 1::2] = x[:, :, 1::2].relu()
    return pooled(out * torch.arange(6.0, dtype=x.dtype))


@of_images()
def indices_written(x: Tensor, conv: nn.Module) -> Tensor:
    out = torch.zeros(len(x), 8, 6, 6, dtype=x.dtype)
    out.index_copy_(1, torch.arange(4), conv(x))
    return pooled(out[:, 2:6])


@of_images()
def scattered(x: Tensor, conv: nn.Module) -> Tensor:
    y = conv(x)
    return pooled(torch.zeros_like(y).scatter_add(2, torch.zeros(y.shape, dtype=torch.long), y))


@of_images()
def views_changed_in_place(x: Tensor, conv: nn.Module) -> Tensor:
    y = conv(x)
    pairs = y.view(2, 2, 2, 6, 6)
    pairs[:, 0].relu_()
    pairs[:, 1].mul_(pairs[:, 0].sigmoid())
    return pooled(y)


@of_images()
def input_changed_in_place(x: Tensor, conv: nn.Module) -> Tensor:
    x.sub_(0.5).div_(0.25)
    return pooled(conv(x).relu())


@of_images()
def saved_results_changed_in_place(x: Tensor, conv: nn.Module) -> Tensor:
    y = conv(x).relu_()
    z = y.sigmoid()
    y += 0.5
    y.clamp_(max=1.2)
    z *= y
    return pooled(z)


@of_images(nn.Identity, lambda: nn.ReLU(inplace=True))
def result_in_place_not_used(x: Tensor, conv: nn.Module, identity: nn.Module, relu: nn.Module) -> Tensor:
    y = conv(x)
    relu(identity(y))
    return pooled(y)


@of_images()
def data_changed(x: Tensor, conv: nn.Module) -> Tensor:
    y = conv(x)
    y.data.clamp_(min=0)
    return pooled(y)


@of_images()
def standardized_in_place(x: Tensor, conv: nn.Module) -> Tensor:
    y = conv(x)
    y -= y.mean((1, 2, 3), keepdim=True)
    y /= y.std((1, 2, 3), keepdim=True)
    y *= y.sigmoid()
    return pooled(y)


# --- constants on the way ------------------------------------------------------------------------------


@of_images()
def part_without_gradients(x: Tensor, conv: nn.Module) -> Tensor:
    with torch.no_grad():
        y = conv(x)
    return pooled(y + x)


@of_images()
def part_detached(x: Tensor, conv: nn.Module) -> Tensor:
    return pooled(conv(x).detach() * x)


@of_images()
def divided_by_a_python_number(x: Tensor, conv: nn.Module) -> Tensor:
    y = conv(x)
    return pooled(y / float(y.abs().mean()))


@of_images()
def divided_by_an_item(x: Tensor, conv: nn.Module) -> Tensor:
    y = conv(x)
    return pooled(y / y.abs().mean().item())


@of_images()
def branch_on_a_value(x: Tensor, conv: nn.Module) -> Tensor:
    y = conv(x)
    return pooled(y) if y.sum() > 0 else y.relu().amax((2, 3))


@of_images()
def sign_by_argmax(x: Tensor, conv: nn.Module) -> Tensor:
    return pooled(torch.where(conv(x).argmax(1, keepdim=True) == 0, x, -x))


@of_images()
def one_hot_choice(x: Tensor, conv: nn.Module) -> Tensor:
    return pooled(F.one_hot(conv(x).argmax(1), 4).permute(0, 3, 1, 2) * x)


@of_images()
def masks_multiplied(x: Tensor, conv: nn.Module) -> Tensor:
    y = conv(x)
    return pooled(y * (y > 0) * (x < 1))


@of_images()
def rounded(x: Tensor, conv: nn.Module) -> Tensor:
    return pooled(conv(x).round() + x)


@of_images()
def cast_to_float32_and_back(x: Tensor, conv: nn.Module) -> Tensor:
    return pooled(conv(x).round(decimals=3) + x.relu().double())


# --- written otherwise ---------------------------------------------------------------------------------


@of_images()
def keywords(x: Tensor, conv: nn.Module) -> Tensor:
    y = F.conv2d(input=conv(x), weight=torch.ones(4, 1, 3, 3, dtype=x.dtype), padding=1, groups=4)
    return F.relu(input=y, inplace=True).mean(dim=(2, 3))


@of_images()
def maximum_by_keyword(x: Tensor, conv: nn.Module) -> Tensor:
    return pooled(torch.max(input=conv(x), other=x))


@of_images()
def maximum_of_a_stack(x: Tensor, conv: nn.Module) -> Tensor:
    return pooled(torch.stack([conv(x), x, x.flip(2)]).max(0)[0])


@of_images()
def largest_and_sorted(x: Tensor, conv: nn.Module) -> Tensor:
    y = conv(x).flatten(1)
    return y.topk(3, 1).values + y.sort(1).values[:, :3] + y.median(1, keepdim=True).values


@of_images()
def clamped_between_tensors(x: Tensor, conv: nn.Module) -> Tensor:
    return pooled(torch.clamp(conv(x), min=x - 0.1, max=x + 0.1))


@of_images()
def pooled_and_unpooled(x: Tensor, conv: nn.Module) -> Tensor:
    y, switches = F.max_pool2d(conv(x), 2, return_indices=True)
    return pooled(F.max_unpool2d(y, switches, 2))


@of_images()
def unfolded_and_folded(x: Tensor, conv: nn.Module) -> Tensor:
    return pooled(F.fold(F.unfold(conv(x), 2), (6, 6), 2))


@of_images()
def unbound_and_summed(x: Tensor, conv: nn.Module) -> Tensor:
    return torch.stack([part.mean((1, 2)) for part in conv(x).unbind(1)], 1)


@of_images()
def checkpointed(x: Tensor, conv: nn.Module) -> Tensor:
    return pooled(checkpoint(conv, x, use_reentrant=False).relu())


@of_images()
def filtered_by_frequency(x: Tensor, conv: nn.Module) -> Tensor:
    return pooled(torch.fft.irfft2(torch.fft.rfft2(conv(x))))


@of_images()
def sampled_on_a_fixed_grid(x: Tensor, conv: nn.Module) -> Tensor:
    turn = torch.tensor([[0.8, -0.6, 0.1], [0.6, 0.8, 0.0]], dtype=x.dtype).expand(len(x), 2, 3)
    return pooled(F.grid_sample(conv(x), F.affine_grid(turn, [2, 4, 5, 5], False), align_corners=False))


@of_images(lambda: nn.Linear(4, 6))
def spatial_transformer(x: Tensor, conv: nn.Module, head: nn.Module) -> Tensor:
    grid = F.affine_grid(head(pooled(x)).view(2, 2, 3), [2, 4, 5, 5], False)
    return pooled(F.grid_sample(conv(x), grid, align_corners=False))


@of_images(
    lambda: nn.utils.parametrizations.spectral_norm(conv()), lambda: nn.utils.parametrizations.weight_norm(conv())
)
def parametrized_weights(x: Tensor, conv: nn.Module, spectral: nn.Module, normed: nn.Module) -> Tensor:
    return pooled(normed(spectral(conv(x)).relu()))


@of_images()
def gate_by_a_parameter(x: Tensor, conv: nn.Module) -> Tensor:
    return pooled(conv(x)) * torch.sigmoid(conv.get_parameter("bias"))


# --- products and norms by hand -----------------------------------------------------------------------


@of_images()
def product_of_three(x: Tensor, conv: nn.Module) -> Tensor:
    y = conv(x)
    return torch.einsum("nchw,nchw,nkhw->nk", y, y.sigmoid(), x)


@of_images()
def gram_matrix(x: Tensor, conv: nn.Module) -> Tensor:
    y = conv(x).flatten(2)
    return (y @ y.transpose(1, 2)).mean(2)


@of_images()
def batched_products(x: Tensor, conv: nn.Module) -> Tensor:
    y, z = conv(x).flatten(2), x.flatten(2)
    return torch.baddbmm(z @ z.transpose(1, 2), y, y.transpose(1, 2)).mean(2)


@of_images()
def fused_product(x: Tensor, conv: nn.Module) -> Tensor:
    return pooled(torch.addcmul(conv(x), x, x.sigmoid(), value=0.3))


@of_images(lambda: nn.Bilinear(4, 4, 3))
def bilinear_form(x: Tensor, conv: nn.Module, form: nn.Module) -> Tensor:
    return form(pooled(conv(x)), pooled(x))


@of_images(lambda: nn.Linear(4, 36))
def filters_from_the_image(x: Tensor, conv: nn.Module, head: nn.Module) -> Tensor:
    filters = head(pooled(x)).view(8, 1, 3, 3)
    return pooled(F.conv2d(conv(x).reshape(1, 8, 6, 6), filters, groups=8, padding=1).view(2, 4, 6, 6))


@of_images()
def variance_by_hand(x: Tensor, conv: nn.Module) -> Tensor:
    y = conv(x)
    variance, average = torch.var_mean(y, 1, keepdim=True)
    return pooled((y - average) * torch.rsqrt(variance + 1e-3) + (y - average) / (y.var(1, keepdim=True) + 1).sqrt())


@of_images()
def cosine_similarity(x: Tensor, conv: nn.Module) -> Tensor:
    return F.cosine_similarity(pooled(conv(x))[:, None], pooled(x)[:, :, None].expand(-1, -1, 4), dim=2)


@of_images()
def distances(x: Tensor, conv: nn.Module) -> Tensor:
    return -torch.cdist(conv(x).flatten(2), x.flatten(2)).mean(2)


@of_images()
def generalized_mean(x: Tensor, conv: nn.Module) -> Tensor:
    return F.avg_pool2d(conv(x).clamp(min=1e-6).pow(2.5), 6).pow(1 / 2.5).flatten(1)


@of_images()
def power_pooling(x: Tensor, conv: nn.Module) -> Tensor:
    return F.lp_pool2d(conv(x), 2.0, 6).flatten(1)


@of_images()
def softmax_pooling(x: Tensor, conv: nn.Module) -> Tensor:
    y = conv(x).flatten(2)
    return (y.softmax(2) * y).sum(2) + y.logsumexp(2)


@of_images()
def entropy(x: Tensor, conv: nn.Module) -> Tensor:
    p = conv(x).flatten(2).softmax(2)
    return -(p * p.log()).sum(2)


# --- tokens --------------------------------------------------------------------------------------------


def encoder_layer(norm_first: bool = False) -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)


@of_tokens(encoder_layer)
def transformer_layer(x: Tensor, layer: nn.Module) -> Tensor:
    return layer(x).mean(1)


@of_tokens(lambda: nn.TransformerEncoder(encoder_layer(norm_first=True), 2, enable_nested_tensor=False))
def transformer(x: Tensor, encoder: nn.Module) -> Tensor:
    return encoder(x).mean(1)


@of_tokens(lambda: nn.TransformerDecoderLayer(8, 2, 16, batch_first=True))
def decoder_layer(x: Tensor, layer: nn.Module) -> Tensor:
    return layer(x[:, :2], x).mean(1)


@of_tokens(lambda: nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True))
def padded_attention(x: Tensor, attention: nn.Module) -> Tensor:
    padding = torch.tensor([[False] * 4 + [True]] * 2)
    return attention(x, x, x, key_padding_mask=padding)[0].mean(1)


@of_tokens(lambda: nn.MultiheadAttention(8, 2, batch_first=True))
def attention_pooling(x: Tensor, attention: nn.Module) -> Tensor:
    return attention(x[:, :1], x[:, 1:], x[:, 1:])[0].mean(1)


@of_tokens(lambda: nn.Embedding(2, 8))
def embedding_of_a_mask(x: Tensor, embedding: nn.Module) -> Tensor:
    return embedding((x[..., 0] > 0).long()).mean(1) + x.mean(1)


@of_tokens(lambda: nn.LSTM(8, 3, batch_first=True))
def lstm(x: Tensor, layer: nn.Module) -> Tensor:
    return layer(x)[0][:, -1]


@of_tokens(lambda: nn.LSTM(8, 3, 2, batch_first=True, bidirectional=True))
def lstm_in_both_directions(x: Tensor, layer: nn.Module) -> Tensor:
    return layer(x)[0].mean(1)


@of_tokens(lambda: nn.GRU(8, 3, batch_first=True))
def gru(x: Tensor, layer: nn.Module) -> Tensor:
    return layer(x)[0][:, -1]


@of_tokens(lambda: nn.RNN(8, 3, batch_first=True, nonlinearity="relu"))
def rnn(x: Tensor, layer: nn.Module) -> Tensor:
    return layer(x)[0][:, -1]


@of_tokens(lambda: nn.Linear(8, 8))
def atan2(x: Tensor, layer: nn.Module) -> Tensor:
    y = layer(x)
    return torch.atan2(y[:, 0], y[:, 1])


@of_tokens(lambda: nn.Linear(8, 8))
def quantile(x: Tensor, layer: nn.Module) -> Tensor:
    return layer(x).quantile(0.3, 1)


@without_rule()
def bessel_j0(x: Tensor) -> Tensor:
    return torch.special.bessel_j0(x).mean(1)


@without_rule()
def matrix_exp(x: Tensor) -> Tensor:
    return torch.linalg.matrix_exp(x[:, :, :5]).mean(1)


# --- tests ---------------------------------------------------------------------------------------------


def network(forward: Forward, parts: Callable[[], tuple[nn.Module, ...]]) -> Written:
    torch.manual_seed(0)
    model = Written(forward, parts()).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


CASES = [
    *(pytest.param(*case, (2, 4, 6, 6), id=name) for name, case in IMAGES.items()),
    *(pytest.param(*case, (2, 5, 8), id=name) for name, case in TOKENS.items()),
]


@pytest.mark.filterwarnings("ignore:a map is zero everywhere")  # where positions are all that goes on
@pytest.mark.parametrize(("forward", "parts", "shape"), CASES)
def test_identity_holds(
    forward: Forward,
    parts: Callable[[], tuple[nn.Module, ...]],
    shape: tuple[int, ...],
    generator: torch.Generator,
) -> None:
    model = network(forward, parts)
    inputs = torch.randn(shape, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        scores = model(inputs.clone())[:, 1]
    with untouched(model, inputs):
        forms = [linear_form(model, inputs, 1), linear_form(model, inputs, 1, model.parts[0])]
        terms = bias_terms(model, inputs, 1)
    for form in forms:
        assert_close(form.score, scores, rtol=1e-12, atol=1e-14)
        products = form.sub_scores if isinstance(form.sub_scores, tuple) else (form.sub_scores,)
        total = sum(product.reshape(len(scores), -1).sum(1) for product in products)
        assert_close(total + form.bias, scores, rtol=1e-10, atol=1e-10)
    assert_close(sum(terms.values(), torch.zeros(2, dtype=torch.float64)), forms[0].bias, rtol=1e-10, atol=1e-10)


def test_images_of_a_state_lie_in_the_second_dimension(generator: torch.Generator) -> None:
    def states(x: Tensor, layer: nn.Module) -> Tensor:
        outputs, (hidden, cell) = layer(x)
        return outputs.mean(1)[:, :3] + hidden[-1] * cell[0].sigmoid()

    model = network(states, lambda: (nn.LSTM(8, 3, 2, batch_first=True, bidirectional=True),))
    inputs = torch.randn(2, 5, 8, generator=generator, dtype=torch.float64)
    for layer in (None, model.parts[0]):
        form = linear_form(model, inputs, 1, layer)
        assert_close(form.residual, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)


def test_queries_share_heads_of_keys_and_values(generator: torch.Generator) -> None:
    """Grouped queries: the coefficients of a value are the weights of all queries that look at it."""
    x = torch.randn(
        2, 8, 5, 3, generator=generator, dtype=torch.float64
    )  # four heads of queries, two of keys, of values

    def grouped(x: Tensor) -> Tensor:
        parts = x.split((4, 2, 2), 1)
        return F.scaled_dot_product_attention(*parts, enable_gqa=True)[:, :, 1].sum(1)

    query, key, _ = x.split((4, 2, 2), 1)
    weights = (query @ key.repeat_interleave(2, 1).transpose(-2, -1) / 3**0.5).softmax(-1)
    expected = torch.zeros_like(x)
    expected[:, 6:, :, 0] = weights[:, :, 1].unflatten(1, (2, 2)).sum(2)
    form = linear_form(grouped, x, 0)
    assert_close(form.coefficients, expected, rtol=1e-12, atol=1e-12)
    assert_close(form.bias, torch.zeros_like(form.bias), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", WITHOUT_RULE)
def test_what_has_no_rule_is_named(name: str, generator: torch.Generator) -> None:
    model = network(*WITHOUT_RULE[name])
    inputs = torch.randn(2, 5, 8, generator=generator, dtype=torch.float64)
    with untouched(model, inputs), pytest.raises(UnsupportedOperationError, match=name):
        linear_form(model, inputs, 1)


def small() -> nn.Sequential:
    """With an operation in place and switches."""
    torch.manual_seed(0)
    layers = nn.Conv2d(4, 4, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    return nn.Sequential(*layers).double().eval()


class OwnTensor(Tensor):
    """What data libraries hand on, such as torchvision's ``Image``."""


def own_tensors(model: nn.Module, inputs: Tensor) -> Tensor:
    return inputs.as_subclass(OwnTensor)


def constant_parameters(model: nn.Module, inputs: Tensor) -> Tensor:
    model.requires_grad_(False)
    return inputs


def gradients_from_training(model: nn.Module, inputs: Tensor) -> Tensor:
    model(inputs).sum().backward()
    return inputs


def part_of_a_graph(model: nn.Module, inputs: Tensor) -> Tensor:
    return inputs.requires_grad_() * 1


def channels_last(model: nn.Module, inputs: Tensor) -> Tensor:
    return inputs.contiguous(memory_format=torch.channels_last)


def hooks_of_the_user(model: nn.Module, inputs: Tensor) -> Tensor:
    model[1].register_forward_hook(lambda _module, _arguments, output: 2 * output)
    model[2].register_forward_pre_hook(lambda _module, arguments: (arguments[0] - 0.1,))
    return inputs


def test_full_backward_hooks_of_the_user_are_an_error(generator: torch.Generator) -> None:
    model = small()
    model[2].register_full_backward_hook(lambda _module, _given, _received: None)
    inputs = torch.randn(2, 4, 6, 6, generator=generator, dtype=torch.float64)
    with (
        untouched(model, inputs),
        pytest.raises(ValueError, match=r"must have no full backward hooks, .* got one at '2'"),
    ):
        linear_form(model, inputs, 1, model[0])


@pytest.mark.parametrize(
    "prepare",
    [
        own_tensors,
        constant_parameters,
        gradients_from_training,
        part_of_a_graph,
        channels_last,
        hooks_of_the_user,
    ],
    ids=lambda prepare: prepare.__name__,
)
def test_identity_holds_however_model_and_image_come(
    prepare: Callable[[nn.Module, Tensor], Tensor], generator: torch.Generator
) -> None:
    model = small()
    inputs = prepare(model, torch.randn(2, 4, 6, 6, generator=generator, dtype=torch.float64))
    with torch.no_grad():
        scores = model(inputs.clone()).as_subclass(Tensor)[:, 1]
    with untouched(model, inputs):
        forms = [linear_form(model, inputs, 1, layer) for layer in (None, model[0], model[1], model[2])]
    for form in forms:
        assert not form.sub_scores.requires_grad
        assert_close(form.sub_scores.flatten(1).sum(1) + form.bias, scores, rtol=1e-12, atol=1e-12)


def test_whole_numbers_made_of_the_image_are_constants() -> None:
    """As rounding: x + int(x) has the coefficients of x."""
    image = torch.tensor([[1.6, -2.3]], dtype=torch.float64)
    form = linear_form(lambda x: (x + x.long().to(x.dtype)).sum(1), image)
    assert_close(form.coefficients, torch.ones_like(image))
    assert_close(form.bias, torch.tensor([-1.0], dtype=torch.float64))
    with pytest.warns(UserWarning, match="a map is zero everywhere: .* to_copy"):
        form = linear_form(lambda x: x.to(torch.int32).to(x.dtype).sum(1), image)
    assert not form.coefficients.any()
    counts = torch.zeros(1, 2, dtype=torch.int64)
    form = linear_form(lambda x: (counts.copy_(x) * x).sum(1), image)
    assert_close(form.coefficients, torch.tensor([[1.0, -2.0]], dtype=torch.float64))
