"""What an error says to do works when it is done."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.testing import assert_close

from captum_scoremap import (
    CompleteScoreMap,
    FusedScoreMap,
    LayerScoreMap,
    LinearForm,
    ScoreMap,
    UnsupportedOperationError,
    bias_terms,
    freeze,
    linear_form,
)
from captum_scoremap.rules import Frozen, Tangent
from tests.between import EXACT, Wrapped, between, some_images

special = torch.special
linalg = torch.linalg


def squares(x: Tensor) -> Tensor:
    """Positive definite matrices, one for each channel."""
    return x @ x.transpose(2, 3) + torch.eye(4, dtype=x.dtype)


BOXES = torch.tensor([[0, 0.2, 0.3, 2.9, 3.1], [1, 1.2, 0.0, 3.7, 2.2]], dtype=torch.float64)
OFFSET = nn.Conv2d(4, 18, 3, padding=1).double()
DEFORMED = nn.Parameter(torch.randn(4, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))

OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **{
        name: getattr(special, name)
        for name in "i0e i1 i1e ndtr erfcx digamma expit sinc log_ndtr gammaln psi exp2 expm1".split()
    },
    "bessel_j0": special.bessel_j0,
    "bessel_j1": special.bessel_j1,
    "spherical_bessel_j0": special.spherical_bessel_j0,
    "entr": lambda x: special.entr(x.abs() + 0.1),
    "log1p": lambda x: special.log1p(x.abs()),
    "ndtri": lambda x: special.ndtri(x.sigmoid()),
    "logit": lambda x: special.logit(x.sigmoid()),
    "xlogy": lambda x: special.xlogy(x, x.sigmoid()),
    "xlog1py": lambda x: special.xlog1py(x, x.sigmoid()),
    "polygamma": lambda x: special.polygamma(1, x.abs() + 1),
    "multigammaln": lambda x: special.multigammaln(x.abs() + 3, 2),
    "gammainc": lambda x: special.gammainc(torch.full_like(x, 2.0), x.abs()),
    "zeta": lambda x: special.zeta(torch.full_like(x, 2.0), x.abs() + 1),
    "logaddexp": lambda x: torch.logaddexp(x, 2 * x),
    "hypot": lambda x: torch.hypot(x, x + 1),
    "atan2": lambda x: torch.atan2(x, x + 1),
    "fmod": lambda x: torch.fmod(x, 0.7),
    "remainder": lambda x: x % 0.7,
    "frac": torch.frac,
    "copysign": lambda x: torch.copysign(x, -x),
    "heaviside": lambda x: x + torch.heaviside(x, torch.zeros((), dtype=x.dtype)),
    "float_power": lambda x: torch.float_power(x, 2),
    "square": torch.square,
    "deg2rad": torch.deg2rad,
    "nextafter": lambda x: x + torch.nextafter(x, x + 1).detach() * 0,
    "ldexp": lambda x: torch.ldexp(x, torch.tensor(2)),
    "frexp": lambda x: torch.frexp(x)[0],
    "celu": F.celu,
    "hardsigmoid": F.hardsigmoid,
    "tanhshrink": F.tanhshrink,
    "softsign": F.softsign,
    "det": lambda x: x * linalg.det(squares(x))[..., None, None],
    "logdet": lambda x: x * torch.logdet(squares(x))[..., None, None],
    "slogdet": lambda x: x + linalg.slogdet(squares(x))[1][..., None, None],
    "inv": lambda x: linalg.inv(squares(x)),
    "pinv": lambda x: linalg.pinv(squares(x)),
    "cholesky": lambda x: linalg.cholesky(squares(x)),
    "cholesky_solve": lambda x: torch.cholesky_solve(x, linalg.cholesky(squares(x))),
    "solve": lambda x: linalg.solve(squares(x), x),
    "lu_factor": lambda x: linalg.lu_factor(squares(x))[0],
    "lu": lambda x: linalg.lu(squares(x))[2],
    "lstsq": lambda x: linalg.lstsq(squares(x), x)[0],
    "qr": lambda x: linalg.qr(squares(x))[1],
    "eigvalsh": lambda x: x + linalg.eigvalsh(squares(x))[..., None],
    "eig": lambda x: x + linalg.eig(squares(x))[0].real[..., None],
    "svdvals": lambda x: x + linalg.svdvals(x + torch.eye(4, dtype=x.dtype))[..., None],
    "matrix_exp": lambda x: linalg.matrix_exp(0.1 * x),
    "matrix_power": lambda x: linalg.matrix_power(x, 3),
    "cross": lambda x: linalg.cross(x[:, :3], x[:, 1:], dim=1).repeat(1, 2, 1, 1)[:, :4],
    "householder": lambda x: linalg.householder_product(x, x[..., 0]),
    "matrix norm": lambda x: x / linalg.matrix_norm(x, keepdim=True),
    "nuclear norm": lambda x: x + linalg.matrix_norm(x + torch.eye(4, dtype=x.dtype), "nuc", keepdim=True),
    "vander": lambda x: linalg.vander(x[..., 0], N=4),
    "rfft": lambda x: torch.fft.irfft(torch.fft.rfft(x).abs() + 0j, n=4),
    "fft2": lambda x: torch.fft.ifft2(torch.fft.fft2(x) * 2).real,
    "hfft": lambda x: torch.fft.hfft(x + 0j, n=4),
    "fft, angle": lambda x: torch.fft.fft(x + 0.1).angle(),
    "stft": lambda x: (
        torch
        .stft(x.flatten(1), 16, hop_length=8, window=torch.ones(16, dtype=x.dtype), return_complex=True)
        .abs()[:, :, :7]
        .flatten(1)[:, :60]
        .repeat(1, 2)[:, :64]
        .view_as(x)
    ),
    "polar": lambda x: torch.polar(x.abs(), x).real,
    "roi_align": lambda x: torchvision.ops.roi_align(x, BOXES, (4, 4)),
    "roi_pool": lambda x: torchvision.ops.roi_pool(x, BOXES, (4, 4)),
    "ps_roi_align": lambda x: torchvision.ops.ps_roi_align(x, BOXES, (2, 2)).repeat(1, 4, 2, 2),
    "deform_conv2d": lambda x: torchvision.ops.deform_conv2d(x, OFFSET(x), DEFORMED, padding=1),
    "nms": lambda x: x * torchvision.ops.nms(x[0, 0].abs() + x.new_tensor([0, 0, 5, 5]), x[0, 0, :, 0], 0.5).numel(),
    "box_iou": lambda x: torchvision.ops.box_iou(x[0, 0].abs() + 1, x[0, 0].abs() + 1).mean() + x,
    "focal loss": lambda x: torchvision.ops.sigmoid_focal_loss(x, torch.zeros_like(x), reduction="none"),
    "drop_block": lambda x: torchvision.ops.drop_block2d(x, 0.2, 3, training=True),
    "stochastic depth": lambda x: torchvision.ops.stochastic_depth(x, 0.5, "row", training=True),
    "cdist": lambda x: torch.cdist(x, x + 1),
    "pdist": lambda x: x + F.pdist(x.flatten(1)).mean(),
    "cosine_similarity": lambda x: x * F.cosine_similarity(x, x + 1, dim=1)[:, None],
    "fractional max-pool": lambda x: F.fractional_max_pool2d(x, 2, output_size=4) if False else fractional(x),
    "lp_pool": lambda x: F.lp_pool2d(x, 2.0, 2).repeat(1, 1, 2, 2),
    "embedding_bag": lambda x: x * F.embedding_bag(torch.tensor([[0, 1]]), x[0, 0])[0],
    "embedding_bag, weighed": lambda x: (
        x * F.embedding_bag(torch.tensor([[0, 1]]), x[0, 0], per_sample_weights=x[1, 0, :1, :2], mode="sum")[0]
    ),
    "embedding_bag, largest": lambda x: x * F.embedding_bag(torch.tensor([[0, 1], [2, 2]]), x[0, 0], mode="max")[0],
    "scatter, multiplied by a number": lambda x: x.scatter(
        3, torch.zeros(2, 4, 4, 1, dtype=torch.long), 3.0, reduce="multiply"
    ),
    "scatter, a number added": lambda x: x.scatter(3, torch.zeros(2, 4, 4, 1, dtype=torch.long), 3.0, reduce="add"),
    "renorm": lambda x: torch.renorm(x, 2, 1, 1.0),
    "quantile": lambda x: x + torch.quantile(x, 0.3, dim=3, keepdim=True),
    "nanmedian": lambda x: x + x.nanmedian(3, keepdim=True)[0],
    "mode": lambda x: x + x.mode(3, keepdim=True)[0],
    "kthvalue": lambda x: x + x.kthvalue(2, 3, keepdim=True)[0],
    "cummax": lambda x: x.cummax(3)[0],
    "logcumsumexp": lambda x: x.logcumsumexp(3),
    "cumprod": lambda x: x.cumprod(3),
    "trapezoid": lambda x: x + torch.trapezoid(x, dim=3)[..., None],
    "cov": lambda x: x + torch.cov(x[0, 0]),
    "corrcoef": lambda x: x + torch.corrcoef(x[0, 0]),
    "unique": lambda x: x + x.unique().sum(),
    "grid_sample": lambda x: F.grid_sample(x, x.permute(0, 2, 3, 1)[..., :2].tanh(), align_corners=False),
    "scatter_reduce": lambda x: x.scatter_reduce(3, torch.zeros(2, 4, 4, 4, dtype=torch.long), x, "amax"),
    "scatter_mean": lambda x: x.scatter_reduce(3, torch.zeros(2, 4, 4, 4, dtype=torch.long), x, "mean"),
    "scatter_prod": lambda x: x.scatter_reduce(3, torch.zeros(2, 4, 4, 4, dtype=torch.long), x, "prod"),
    "histc": lambda x: x + torch.histc(x, 4, -2, 2),
    "sparse": lambda x: torch.sparse.mm(torch.eye(4, dtype=x.dtype).to_sparse(), x[0, 0]) + x,
    "pow of two": lambda x: x.abs() ** x,
    "pow of a number": lambda x: 2**x,
    "gru": lambda x: nn.GRU(4, 4).double()(x[:, 0])[0][:, None] + x,
    "rms_norm": lambda x: F.rms_norm(x, (4,)),
    "fake_quantize": lambda x: torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -128, 127),
    "addcdiv": lambda x: torch.addcdiv(x, x, x.exp()),
    "lerp": lambda x: torch.lerp(x, 2 * x, 0.3),
    "clamp by tensors": lambda x: x.clamp(-x.abs() - 1, x.abs() / 2),
    "linspace": lambda x: x * torch.linspace(x[0, 0, 0, 0], x[0, 0, 0, 1], 4, dtype=x.dtype),
    "linspace to a number": lambda x: x * torch.linspace(x[0, 0, 0, 0], 3.0, 4, dtype=x.dtype),
    "logspace": lambda x: x * torch.logspace(0.0, x[0, 0, 0, 1], 4, base=2.0, dtype=x.dtype),
    "chunks": lambda x: torch._chunk_cat([x, 2 * x], 2, 3).sum(-1, keepdim=True)[:, :, :1] * x,
    "chunks of several shapes": lambda x: x * torch._chunk_cat([x, x[..., 0], x[:1, :1, 0, 0]], 0, 3).mean(),
    "chunks, counted from the end": lambda x: x * torch._chunk_cat([x, 2 * x[:1]], -4, 2).mean(),
    "resize_as_": lambda x: x.clone().resize_as_(x),
    "resize_": lambda x: x.clone().resize_(2, 4, 4, 4) * 2,
    "gammainc of the first": lambda x: special.gammainc(x.abs() + 1, x.abs()),
    "zeta of the first": lambda x: special.zeta(x.abs() + 2, torch.full_like(x, 2.0)),
    "nextafter, live": lambda x: x + torch.nextafter(x, x + 1),
    "two of them": lambda x: special.bessel_j0(x) + special.i1e(special.zeta(x.abs() + 2, x.abs() + 1)),
    "airy": special.airy_ai,
    "hermite": lambda x: special.hermite_polynomial_h(x, torch.tensor(2)),
    "bessel_k": lambda x: special.modified_bessel_k0(x.abs() + 1),
    "bucketize": lambda x: x * torch.bucketize(x, torch.tensor([-1.0, 0.0, 1.0], dtype=x.dtype)),
}


def fractional(x: Tensor) -> Tensor:
    samples = torch.full((2, 4, 2), 0.5, dtype=x.dtype)
    return F.fractional_max_pool2d(x, 2, output_size=2, _random_samples=samples).repeat(1, 1, 2, 2)


def total(out: Tensor) -> Tensor:
    """A score of all images together, in equal parts: some operations mix them."""
    return out[:, 1].sum()[None]


def advised_rules(error: UnsupportedOperationError) -> dict[str, Any]:
    """The rules that the text of an error says to hand over, typed in."""
    found = re.search(r"rules=(\{.*?\}), with `(from captum_scoremap.rules import [A-Za-z, ]+)`", str(error))
    assert found is not None, str(error)
    names: dict[str, Any] = {}
    exec(found[2], names)
    rules: dict[str, Any] = eval(found[1], names)
    assert list(rules) == list(dict.fromkeys(operation for operation, _ in error.operations))
    return rules


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*Sparse")
@pytest.mark.filterwarnings("ignore:a map is zero everywhere")  # what has no derivative is frozen
def test_the_rule_that_an_error_suggests_works(name: str) -> None:
    images, function = some_images(), OPERATIONS[name]

    def explained(rules: dict[str, Any]) -> LinearForm:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = between(function)
            return linear_form(lambda x: total(model(x[0]))[None, 0], images[None], None, rules=rules)

    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        expected = total(between(function)(images))
    rules: dict[str, Any] = {}
    try:
        explained({})
    except UnsupportedOperationError as error:
        rules = advised_rules(error)
    form = explained(rules)
    assert_close(form.score, expected, **EXACT)
    assert_close(form.sums + form.bias, form.score, rtol=1e-10, atol=1e-11)


def test_an_operation_of_which_one_output_has_a_derivative_is_advised_its_tangent() -> None:
    """Eigenvectors are told up to a phase; eigenvalues have a gradient, which is what is found."""
    x = torch.rand(1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 0.5
    assert linalg.eigvals(x).imag.any()
    score = lambda x: linalg.eigvals(x).real.exp().sum(1)[:, None]  # noqa: E731
    with pytest.raises(UnsupportedOperationError) as problem:
        linear_form(score, x, 0)
    assert "no derivative" not in str(problem.value)
    rules = {name: rule for name, rule in advised_rules(problem.value).items() if isinstance(rule, Tangent)}
    assert list(rules) == ["linalg_eig"]
    form, leaf = linear_form(score, x, 0, rules=rules | {"exp": Tangent()}), x.clone().requires_grad_()
    assert_close(form.coefficients, torch.autograd.grad(score(leaf).sum(), leaf)[0], **EXACT)
    assert_close(form.sums + form.bias, score(x)[:, 0], **EXACT)


def test_the_value_is_advised_of_what_has_no_derivative_at_all() -> None:
    with pytest.raises(UnsupportedOperationError, match=r"Of special_bessel_j0 PyTorch has no derivative") as problem:
        linear_form(special.bessel_j0, torch.rand(1, 3), 0)
    assert {name: type(rule) for name, rule in advised_rules(problem.value).items()} == {"special_bessel_j0": Frozen}


def test_complex_inputs_are_explained_by_their_parts() -> None:
    model = lambda z: (z * z).abs() + z.imag  # noqa: E731
    inputs = torch.randn(2, 3, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
    with pytest.raises(TypeError, match=r"got torch.complex128. Explain real and imaginary parts: ") as problem:
        linear_form(model, inputs, 1)
    advice = re.search(r"parts: (.*), of (lambda.*)\.$", str(problem.value))
    assert advice is not None
    known = {"torch": torch, "inputs": inputs, "model": model}
    parts, of_parts = (eval(code, known) for code in advice.groups())
    form = linear_form(of_parts, parts, 1)
    assert form.coefficients[..., 1].any()
    assert_close(form.sums + form.bias, model(inputs)[:, 1], **EXACT)


@pytest.mark.filterwarnings("ignore:Sparse", "ignore:The PyTorch API of nested")
@pytest.mark.parametrize(
    "made",
    [
        Tensor.to_sparse,
        Tensor.to_sparse_csr,
        lambda one: torch.nested.as_nested_tensor(list(one[..., None]), layout=torch.jagged),
        lambda one: torch.nested.as_nested_tensor(list(one), layout=torch.strided),
    ],
)
def test_inputs_that_are_not_dense_are_made_so_as_advised(made: Callable[[Tensor], Tensor]) -> None:
    inputs = made(torch.ones(2, 3))
    with pytest.raises(TypeError, match=r"inputs must be dense tensors .* Make them dense: ") as problem:
        linear_form(lambda x: x.flatten(1), inputs, 1)
    dense = eval(str(problem.value).partition("Make them dense: ")[2].removesuffix("."), {"inputs": inputs})
    assert linear_form(lambda x: x.flatten(1), dense, 1).score.tolist() == [1.0, 1.0]


def test_inputs_without_numbers_are_not_to_be_made_dense() -> None:
    with pytest.raises(TypeError, match=r"on the device meta, without any. Pass the image itself, on the device"):
        linear_form(nn.Flatten(), torch.ones(2, 3, device="meta"), 1)


def test_all_operations_without_a_rule_are_named_with_their_module() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Wrapped(special.bessel_j0), Wrapped(special.airy_ai)).double()
    with pytest.raises(UnsupportedOperationError) as problem:
        ScoreMap(model).attribute(some_images(), (1, 1, 1))
    assert [module for _, module in problem.value.operations] == ["1", "2"]
    assert "bessel_j0" in str(problem.value)
    assert "'1'" in str(problem.value)


IN_EVAL: dict[str, Callable[[Tensor], Tensor]] = {
    "batch norm without statistics": nn.BatchNorm2d(4, track_running_stats=False).double().eval(),
    "functional batch norm": lambda x: F.batch_norm(x, None, None, training=True),
    "functional rrelu": lambda x: F.rrelu(x, training=True),
    "attention with dropout": lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
    "instance norm": nn.InstanceNorm2d(4, track_running_stats=True).double().eval(),
    "dropout": lambda x: F.dropout(x, 0.5, training=True),
    "detached numpy": lambda x: torch.from_numpy(x.detach().cpu().numpy() + 1),
    "detached tolist": lambda x: torch.tensor(x.detach().tolist(), dtype=x.dtype),
    "detached dlpack": lambda x: torch.from_dlpack(x.detach()),
}


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", IN_EVAL)
def test_no_error_says_to_do_what_was_done(name: str, count: int) -> None:
    images, model = some_images(count), between(IN_EVAL[name])
    assert not any(module.training for module in model.modules())
    try:
        form = linear_form(model, images, 1)
    except (UnsupportedOperationError, ValueError) as error:
        said = str(error)
        assert not re.search(r"[Cc]all (model)?\.detach|tensor\.detach\(\)", said)
        assert not said.endswith("Call model.eval().")
    else:
        assert_close(form.sums + form.bias, form.score, **EXACT)


@pytest.mark.parametrize("module", [nn.BatchNorm2d(4), nn.RReLU()])
def test_modules_in_training_mode_are_named_and_eval_helps(module: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), module, nn.Flatten(), nn.Linear(64, 3)).double().train()
    with pytest.raises(ValueError, match=rf"'1' \({type(module).__name__}\) in training mode. Call model.eval"):
        LayerScoreMap(model, model[0]).attribute(some_images(), 1)
    LayerScoreMap(model.eval(), model[0]).attribute(some_images(), 1)


@pytest.mark.parametrize("module", [nn.Dropout(0.5), nn.Dropout2d(0.5), nn.Dropout1d(0.3), nn.AlphaDropout(0.2)])
def test_dropout_in_training_mode_is_frozen_and_said_once(module: nn.Module) -> None:
    """Captum takes it, too; the noise is that of one run, so the form is exact for that run."""
    first = nn.Flatten(2) if isinstance(module, nn.Dropout1d) else nn.Identity()
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), first, module, nn.ReLU(), module, nn.Flatten(1), nn.Linear(64, 3)
    ).double()
    with pytest.warns(UserWarning, match=r"dropout is in training mode at '2'") as said:
        form = linear_form(model, some_images(), 1, model[0])
    assert len(said) == 1
    assert_close(form.sums + form.bias, form.score, **EXACT)
    assert form.coefficients.eq(0).any() or isinstance(module, nn.AlphaDropout)
    model.eval()
    assert_close(linear_form(model, some_images(), 1).score, model(some_images())[:, 1], **EXACT)


def test_a_mask_that_attentions_kernel_misreads_is_refused_and_the_advice_helps() -> None:
    """PyTorch takes what lies there for float64; the scores themselves are wrong."""

    class Masked(nn.Module):
        kind = torch.float32

        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x, attn_mask=torch.ones(x.shape[-2], x.shape[-2]).to(self.kind))

    masked = Masked()
    model, images = between(masked), some_images()
    with pytest.raises(ValueError, match=r"attn_mask of the queries' type, got torch.float32 beside torch.float64"):
        linear_form(model, images, 1)
    masked.kind = torch.float64
    form = linear_form(model, images, 1)
    assert_close(form.sums + form.bias, form.score, **EXACT)
    masked.kind = torch.float32
    form = linear_form(model.float(), images.float(), 1)
    assert_close(form.sums + form.bias, form.score, rtol=1e-4, atol=1e-4)


CALLS: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "the image": lambda model, x: ScoreMap(model).attribute(x, 1, return_convergence_delta=True),
    "a layer": lambda model, x: LayerScoreMap(model, model[0]).attribute(x, 1),
    "all labels": lambda model, x: LayerScoreMap(model, model[0]).attribute_targets(x),
    "the fused map": lambda model, x: FusedScoreMap(model, model[0]).attribute(x, 1),
    "the complete map": lambda model, x: CompleteScoreMap(model).attribute(x, 1),
    "a form": lambda model, x: linear_form(model, x, 1),
    "bias terms": lambda model, x: bias_terms(model, x, 1),
    "the frozen model": lambda model, x: freeze(model, x),
}


@pytest.mark.parametrize("call", CALLS)
def test_warnings_name_the_line_of_the_call(call: str) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(32, 3), nn.Dropout(0.1), nn.Softmax(1)).eval()
    model[3].train(call == "the frozen model")
    with pytest.warns(UserWarning, match="dropout is in" if model[3].training else "the model ends in") as caught:
        CALLS[call](model, torch.rand(1, 1, 6, 6))
    assert {one.filename for one in caught} == {__file__}
