# %% [markdown]
# # 5. Transformers and modern CNNs
#
# The paper behind this package was written for networks of convolutions, ReLUs and max-pooling. Such a network is
# *piecewise linear*: around one image it simply is a linear function, so that its score splits into a sum without
# remainder.
#
# Most networks of today are not piecewise linear. They have GELUs, layer norms, squeeze-and-excitation, attention.
# And still
#
# > **S = A·Y + B** holds at every layer of every one of them, exactly, *at one image*,
#
# once the right factor of each nonlinear operation is **frozen**: held at the value it has for this image, as if it
# were a constant. (S is the score of a label, its logit; Y the output of a layer; A its coefficients, B whatever is
# left. The products A·Y, summed over channels, are the layer's **score map**. Tutorials [1](01_getting_started.ipynb)
# and [2](02_linear_form.ipynb) introduce them all.)
#
# Which factor is the right one? That is a choice, and this tutorial is about it: what is frozen and why, how much the
# choice matters, how to make another one, and what happens where there is none.

# %%
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits
from torch import nn
from torchvision.ops import SqueezeExcitation

from captum_scoremap import LayerScoreMap, UnsupportedOperationError, bias_terms, linear_form, token_grid
from captum_scoremap.linear import check_exactness
from captum_scoremap.models import load_model, read_image
from captum_scoremap.rules import TANGENT, Composite, Rule, Tangent
from captum_scoremap.visualization import visualize_score_map

# %% [markdown]
# ## One number through one activation
#
# The smallest network there is: one number goes in, one activation, one number comes out. `linear_form` takes any
# function, so we can ask it for the A and B of a lone ReLU, GELU or softplus. It knows two ways to write them.
#
# - The **gate**: output = (f(x)/x) · x. The factor f(x)/x says how much of x passes; it is frozen, x is not. B is
#   zero.
# - The **tangent**: output = f'(x) · x + rest. A is the ordinary derivative; the rest goes to B. This is
#   `rules=TANGENT`.

# %%
point = torch.tensor([[1.2]])
functions = {"ReLU": F.relu, "GELU": F.gelu, "softplus": F.softplus}

forms = {}
for name, function in functions.items():
    for way, rules in (("default", None), ("tangent", TANGENT)):
        form = forms[name, way] = linear_form(function, point, target=0, rules=rules)
        a, b, s = form.coefficients.item(), form.bias.item(), form.score.item()
        print(f"{name:8s} {way:8s} A·x + B = {a:6.3f} · 1.2 {b:+.3f} = {a * 1.2 + b:.3f}   S = {s:.3f}")
        assert form.relative_residual.item() < 1e-6

# %%
figure, axes = plt.subplots(1, 3, figsize=(10, 2.8), layout="constrained")
xs = torch.linspace(-3, 3, 121)
for ax, (name, function) in zip(axes, functions.items(), strict=True):
    ax.plot(xs, function(xs), color="black", label=name)
    for way, style in (("default", "-"), ("tangent", "--")):
        form = forms[name, way]
        line = form.coefficients.item() * xs + form.bias.item()
        ax.plot(xs, line, style, label=f"{way}, B = {form.bias.item():.2f}", alpha=0.7)
    ax.plot(1.2, function(point).item(), "o", color="black")
    ax.set(title=name, ylim=(-1, 3))
    ax.axhline(0, color="gray", linewidth=0.5)
    ax.axvline(0, color="gray", linewidth=0.5)
    ax.legend(fontsize=8, loc="upper left")
plt.show()

# %% [markdown]
# Look at where the lines meet the vertical axis: that is B. All lines run through the black point, the image, so all
# of them are exact there.
#
# - **ReLU**: gate and tangent are the same line. For piecewise linear networks there is no choice to make.
# - **GELU**: the gate's line goes through the origin, the tangent's does not. Taking the tangent (that is, the
#   gradient) sends part of the value to B, and B is on no map. So functions through zero (GELU, SiLU, Mish, tanh,
#   ...) are gates here.
# - **Softplus**: it does not pass through zero, so it has no gate. It has its tangent either way.
#
# ## Products
#
# Of two factors that both depend on the image, one can freeze the one, the other, or each in turn. Which is right
# depends on what they do.

# %%
x = torch.tensor([[1.2]])
for name, function in {
    "x · sigmoid(x)": lambda x: x * torch.sigmoid(x),
    "silu(x)": F.silu,
    "x · x": lambda x: x * x,
}.items():
    form = linear_form(function, x, target=0)
    slope = linear_form(function, x, target=0, rules=TANGENT).coefficients
    print(f"{name:15s} A = {form.coefficients.item():.3f}, B = {form.bias.item():.3f}   (gradient {slope.item():.3f})")

assert linear_form(F.silu, x, 0).coefficients.allclose(torch.sigmoid(x))  # the sigmoid is the gate
assert linear_form(lambda x: x * x, x, 0).coefficients.allclose(x)  # half of the gradient 2x

# %% [markdown]
# A sigmoid that multiplies something says *how much passes*; what passes is the evidence. So the sigmoid is frozen.
# That a SiLU, which is just this product, gets the same A is no accident. Attention is the same thing once more: its
# weights say where the network looks, its values are what it sees there; the weights are frozen.
#
# Two factors of equal standing, such as x · x, get half of the credit each. The gradient would count the product
# twice.
#
# One kind is left: norms. A layer norm subtracts the mean and multiplies by 1/std. That scale, common to all
# features, is no evidence of its own and is frozen; subtracting the mean is linear already.
#
# | operation | frozen | linear form |
# | --- | --- | --- |
# | ReLU and other piecewise linear ones | mask: which piece | slope · x + offset |
# | max-pooling | switch: which position | take that one |
# | GELU, SiLU, tanh, ... | gate f(x)/x | gate · x |
# | sigmoid, softmax where they multiply something | their value | a constant factor |
# | layer norm and the like | 1/std | scale · (x − mean) |
# | attention | its weights | weights @ values |
# | a product of equals | each factor in turn | half and half |
#
# The whole table is under [Mathematics](site/mathematics.md#beyond-the-paper-any-network). Enough of single numbers.
#
# ## A transformer, trained in the notebook
#
# Handwritten digits from scikit-learn, 8 × 8 pixels, enlarged to 32 × 32. A *vision transformer* cuts the image into
# patches of 4 × 4 pixels and turns each into a vector, a **token**; puts one additional token, the **class token**,
# in front of them; lets all tokens look at each other, block by block; and reads the answer from the class token alone.
# Ours has two blocks.

# %%
digits = load_digits()
pixels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1  # from -1 (paper) to 1 (ink)
images = F.interpolate(pixels, (32, 32), mode="bilinear")
labels = torch.tensor(digits.target)
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
training, held_out = order[:1400], order[1400:]


class Block(nn.Module):
    """Tokens look at each other (attention), then each is worked on alone (a GELU between two linear layers)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.norm1(tokens)
        tokens = tokens + self.attention(x, x, x, need_weights=False)[0]
        return tokens + self.mlp(self.norm2(tokens))


class SmallViT(nn.Module):
    def __init__(self, width: int = 32, blocks: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, stride=4)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 65, width))
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(blocks)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        patches = self.patches(image).flatten(2).transpose(1, 2)  # (N, 64, width)
        tokens = torch.cat([self.class_token.expand(len(image), -1, -1), patches], dim=1) + self.positions
        return self.head(self.norm(self.blocks(tokens))[:, 0])


# %%
def train(model: nn.Module, epochs: int, rate: float) -> nn.Module:
    """Train on the digits, print the accuracy on those held out, return the model ready for explaining."""
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, epochs * len(training.split(50)))
    for _ in range(epochs):
        for batch in training[torch.randperm(len(training))].split(50):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    model.eval()  # dropout off, batch norm fixed: the package insists on it
    with torch.no_grad():
        accuracy = (model(images[held_out]).argmax(1) == labels[held_out]).float().mean()
    print(f"{accuracy:.0%} of {len(held_out)} held-out digits are right")
    assert accuracy > 0.85
    return model


torch.manual_seed(0)
vit = train(SmallViT(), epochs=6, rate=8e-3)

# %% [markdown]
# ## Exact at every block
#
# For a hundred held-out digits and their true labels we ask for the linear form at every stage. Tokens come as
# (images, tokens, channels): the map sums over the last dimension, as it finds from the shape.
#
# The **residual** S − (A·Y + B) puts three computations against each other: S is what the model says, A comes from
# one backward pass, B from the frozen model with the layer's output set to zero.

# %%
shown, named = images[held_out[:100]], labels[held_out[:100]]
stages = {"patches": vit.patches, **{f"blocks.{i}": block for i, block in enumerate(vit.blocks)}, "norm": vit.norm}

parts = {}
for name, layer in stages.items():
    form = linear_form(vit, shown, named, layer)
    score_map = form.score_map(channel_dim=1 if name == "patches" else -1)
    if name == "patches":
        on_patches, on_class_token = score_map.sum((1, 2, 3)), torch.zeros(100)
    else:
        on_patches, on_class_token = score_map[:, 1:].sum((1, 2)), score_map[:, 0, 0]
    parts[name] = [on_patches.mean().item(), on_class_token.mean().item(), form.bias.mean().item()]
    print(f"{name:9s} largest relative residual {form.relative_residual.max():.1e}")
    assert form.relative_residual.max() < 1e-5

# %%
figure, ax = plt.subplots(figsize=(7, 3), layout="constrained")
bottoms = [0.0] * len(parts)
for which, color in zip(("patches", "class token", "B"), ("tab:red", "tab:orange", "lightgray"), strict=True):
    values = [part[("patches", "class token", "B").index(which)] for part in parts.values()]
    ax.bar(list(parts), values, bottom=bottoms, color=color, label=which)
    bottoms = [bottom + value for bottom, value in zip(bottoms, values, strict=True)]
ax.set(ylabel="logits, mean of 100 digits", title="One score, split up at four layers")
ax.legend(bbox_to_anchor=(1, 1), loc="upper left")
plt.show()

# %% [markdown]
# Every bar is as high as the mean score; what changes is who carries it.
#
# - At `patches` there is no class token yet: it and the position vectors, which are the same for every image, are
#   part of B.
# - Then, block by block, the evidence moves from the patches into the class token. That is what attention is for
#   here.
# - After the last block only the class token is read: the patches' share is exactly zero. **Where a transformer reads
#   its class token alone, the map of its last block is empty**, and that is no fault of the method. For a picture,
#   take an early layer. (Transformers that average all their tokens have maps at every block.)

# %%
last = LayerScoreMap(vit, vit.blocks[-1]).attribute(shown, named)
assert last.shape == (100, 65, 1)
assert (last[:, 1:] == 0).all()
grids = token_grid(last)  # leaves the class token out and lays the 64 others out as they lie in the image
grids.shape, grids.abs().max().item()

# %% [markdown]
# ## The maps
#
# Four digits, at two layers. Red adds to the score of the true label, blue takes from it. Every map has a color scale
# of its own: mind the numbers at the bars.

# %%
chosen = [int((named == label).nonzero()[0]) for label in (0, 4, 6, 7)]
figure, axes = plt.subplots(len(chosen), 3, figsize=(8, 9), layout="constrained")
for row, index in zip(axes, chosen, strict=True):
    image, label = shown[index : index + 1], int(named[index])
    maps = {"patches": LayerScoreMap(vit, vit.patches).attribute(image, label)}
    maps["blocks.0"] = token_grid(LayerScoreMap(vit, vit.blocks[0]).attribute(image, label))
    row[0].imshow(image[0, 0], cmap="gray")
    row[0].set(title=f"a {label}", xticks=[], yticks=[])
    for ax, (name, score_map) in zip(row[1:], maps.items(), strict=True):
        picture = (image[0] + 1) / 2
        title = f"{name}: Σ = {score_map.sum():.2f}"
        visualize_score_map(score_map, picture, title=title, plt_fig_axis=(figure, ax))
plt.show()

# %% [markdown]
# At `patches` the map sits on the strokes, and only on a few places of them. One block later the values are several
# times smaller and spread widely: most of the evidence has gone over into the class token, which has no place in the
# image.
#
# ## Gate against tangent
#
# Now the same question with `rules=TANGENT`, where A is the ordinary gradient. Both are exact. What differs is B.

# %%
image, label = shown[chosen[0] : chosen[0] + 1], int(named[chosen[0]])
probe = image.clone().requires_grad_()
(gradient,) = torch.autograd.grad(vit(probe)[0, label], probe)
tangent = linear_form(vit, image, label, rules=TANGENT)
assert torch.allclose(tangent.coefficients, gradient, atol=1e-5)  # the tangent's A is the gradient, nothing else


def share_of_b(form) -> float:
    """|B| / (|B| + |A·Y|), mean of all images."""
    return (form.bias.abs() / (form.bias.abs() + form.sums.abs())).mean().item()


print("share of B, |B| / (|B| + |A·Y|), mean of 100 digits")
for name, layer in stages.items():
    gate, tangent = (linear_form(vit, shown, named, layer, rules=rules) for rules in (None, TANGENT))
    print(f"{name:9s} default {share_of_b(gate):6.1%}   tangent {share_of_b(tangent):6.1%}")
    assert gate.relative_residual.max() < 1e-5
    assert tangent.relative_residual.max() < 1e-5

# %% [markdown]
# With tangents almost the whole score is B: the sum is exact and says nothing. The culprit is the layer norm. Its
# output does not change if its input is doubled, so its derivative along its own input is zero; a gradient times the
# input of the norm **adds up to zero for every image there is**, whatever the picture of it may look like. Let us
# check that at the last block, whose output goes straight into a norm. (At `norm` itself both agree: only a linear
# layer follows.)

# %%
tangent = linear_form(vit, shown, named, vit.blocks[-1], rules=TANGENT)
print(f"scores up to {tangent.score.max():.1f}, A·Y of the tangent at most {tangent.sums.abs().max():.0e}")
assert tangent.sums.abs().max() < 1e-3

# %% [markdown]
# A smaller B is a good sign, but no proof that the map is right. So we test both maps against the network: wipe out
# the eight patches (of 64) with the highest values and see how far the score falls. Beside them two maps that know
# nothing about the network: chance, and the patches with the most ink.

# %%
with torch.no_grad():
    untouched = vit(shown).gather(1, named[:, None]).mean().item()


def score_without(maps: torch.Tensor, count: int = 8) -> float:
    """Mean score after the cells with the highest values were painted over in the color of the paper."""
    highest = maps.flatten(1).topk(count, dim=1).indices
    cells = torch.zeros(len(maps), 64).scatter(1, highest, 1.0).view(-1, 1, 8, 8)
    wiped = shown.masked_fill(F.interpolate(cells, (32, 32)) > 0, -1.0)
    with torch.no_grad():
        return vit(wiped).gather(1, named[:, None]).mean().item()


fallen = {
    "chance": score_without(torch.rand(100, 1, 8, 8, generator=torch.Generator().manual_seed(0))),
    "most ink": score_without(F.avg_pool2d(shown, 4)),
    "tangent": score_without(LayerScoreMap(vit, vit.patches, rules=TANGENT).attribute(shown, named)),
    "default": score_without(LayerScoreMap(vit, vit.patches).attribute(shown, named)),
}
print(f"untouched {untouched:.2f}")
for name, score in fallen.items():
    print(f"{name:9s} {score:.2f}")
assert fallen["default"] < min(fallen["tangent"], fallen["most ink"], fallen["chance"]) - 0.5

# %% [markdown]
# The patches that the default's map names matter most by far. The tangent's map is hardly better than the two that
# know nothing. One small network and one test are no law, though; [tutorial 6](06_which_method_when.ipynb) is about
# such tests and how they mislead.
#
# What does B hold at the image itself? `bias_terms` takes it apart, by the name of the module or parameter that
# brings it in.

# %%
terms = bias_terms(vit, image, label)
form = linear_form(vit, image, label)
for name, share in sorted(terms.items(), key=lambda item: -abs(item[1].item()))[:5]:
    print(f"{name:28s} {share.item():+.2f}")
print(f"{'all ' + str(len(terms)) + ' terms':28s} {sum(terms.values()).item():+.2f}   B = {form.bias.item():+.2f}")
assert torch.allclose(sum(terms.values()), form.bias, atol=1e-4)

# %% [markdown]
# ## Modern CNNs
#
# Some are less modern than they look. EfficientNet-Lite0, the pretrained network of tutorial 1, was made for phones:
# all its activations are ReLU6. It is piecewise linear, so that gate and tangent, and thus the gradient, are one and
# the same:

# %%
lite = load_model()
cat = lite.preprocessing(read_image("sample:chelsea"))[None]
target = lite.label_index("Egyptian cat")
gate, tangent = (linear_form(lite.module, cat, target, lite.module.blocks[4], rules=rules) for rules in (None, TANGENT))
assert torch.allclose(gate.coefficients, tangent.coefficients)
print(f"B is {gate.bias.item():.4f} by gates and {tangent.bias.item():.4f} by tangents")

# %% [markdown]
# Its bigger sisters have SiLUs, and **squeeze-and-excitation** (SE): a small branch looks at the mean of every
# channel and returns a sigmoid for each, by which the channel is multiplied. Here is a small network with both,
# trained on the same digits.

# %%
torch.manual_seed(0)


class Inverted(nn.Module):
    """Widen, filter each channel, weigh the channels (SE), narrow; beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        wide = 2 * width
        self.widen = nn.Sequential(nn.Conv2d(width, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.SiLU())
        self.filter = nn.Sequential(
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.SiLU()
        )
        self.se = SqueezeExcitation(wide, wide // 4, activation=nn.SiLU)
        self.narrow = nn.Sequential(nn.Conv2d(wide, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.narrow(self.se(self.filter(self.widen(x))))


cnn = train(
    nn.Sequential(
        nn.Conv2d(1, 16, 4, stride=4),
        Inverted(16),
        Inverted(16),
        Inverted(16),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    ),
    epochs=6,
    rate=1e-2,
)

# %%
for index in range(4):
    gate, tangent = (linear_form(cnn, shown, named, cnn[index], rules=rules) for rules in (None, TANGENT))
    print(f"layer {index}: share of B {share_of_b(gate):5.1%} by default, {share_of_b(tangent):5.1%} by tangents")
    assert max(gate.relative_residual.max(), tangent.relative_residual.max()) < 1e-5

# %% [markdown]
# The two differ less than in the transformer: batch norm, unlike layer norm, is linear in evaluation mode, so no
# scale is lost. Note too that B is large in the early layers of *both*. Those are the shifts of the batch norms,
# which `bias_terms` would name. A large B is worth knowing: the map then tells only part of the story, however exact
# it is.
#
# The SE branch itself is a gate. It says how much of each channel passes, and gets no credit of its own:

# %%
channels_weights = LayerScoreMap(cnn, cnn[2].se.fc2).attribute(shown, named)
print(f"score map of the SE branch: at most {channels_weights.abs().max():.0f}")
assert (channels_weights == 0).all()

# %% [markdown]
# ## What is my model made of?
#
# `check_exactness` answers for every module: what runs there, what is frozen of it, whether the sum is exact at its
# output, and how many logits of B its biases bring in. One block of the small network:

# %%
found = check_exactness(cnn, shown[:1], int(named[0]))
print(f"{'module':24s} {'operations':28s} {'residual':>9s} {'part of B':>11s}")
for one in found.layers:
    if one.layer.startswith("2."):
        operations = ", ".join(name + ("" if kind == "linear" else f" ({kind})") for name, kind in one.operations)
        print(f"{one.layer:24s} {operations or '-':28s} {one.residual:9.0e} {one.bias:+11.3f}")
assert found.is_exact

# %% [markdown]
# In brackets stands what is frozen. The sigmoid has its tangent on its own line; one line below, where it meets the
# features in a product, it counts as the constant factor that we saw above.
#
# On the command line the same is said of any model of torchvision or timm, or your own. Its exit status is 0 only if
# all is exact, which makes it a test for a build pipeline.
#
# ```console
# captum-scoremap check --model torchvision:efficientnet_b0 --weights none
# captum-scoremap check --model my_package.models:build --dtype float64 --json
# ```

# %% [markdown]
# ## A rule of your own
#
# `rules=` is a mapping from an operation's name to a rule, on every class and function of the package. To choose
# among the rules that are there, name one: `rules={"gelu": Tangent()}`. To write one, say what is frozen and how it
# is applied.
#
# As an example, a SiLU that is treated like a ReLU: where x is positive it passes as it is, elsewhere nothing does,
# and what is then missing from the true value is a constant.

# %%
ways = {"default": None, "tangent": {"silu": Tangent()}}


class LikeReLU(Rule):
    kind = "mask and rest"

    def freeze(self, call):
        x = call.input
        mask = (x > 0).to(x)
        return mask, call.output - mask * x

    def apply(self, call, state):
        mask, rest = state
        return mask * call.input + rest


ways["like a ReLU"] = {"silu": LikeReLU()}
for name, rules in ways.items():
    form = linear_form(cnn, shown, named, cnn[1], rules=rules)
    print(
        f"{name:12s} share of B {share_of_b(form):5.1%}, largest relative residual {form.relative_residual.max():.0e}"
    )
    assert form.relative_residual.max() < 1e-5

# %% [markdown]
# Three exact forms of the same scores: exactness alone does not single one out. But it catches mistakes. A rule whose
# output at the image is not that of the operation is refused, by name:

# %%
operation = F.silu  # the function itself serves as its name, too


class Forgetful(LikeReLU):
    def apply(self, call, state):
        mask, _ = state
        return mask * call.input  # the rest is forgotten


try:
    linear_form(cnn, shown, named, cnn[1], rules={operation: Forgetful()})
except ValueError as error:
    print(error)

# %% [markdown]
# ## Where there is no rule
#
# What the package does not know it does not pass over in silence. PyTorch's own operations nearly all have a rule; an
# LSTM, for one, is taken apart into its gates. But an operation may come from an extension, with a fast kernel that
# nobody can look into. This network has such an activation, half of its channels passing the other half:

# %%
torch.manual_seed(0)


@torch.library.custom_op("tutorial::gated", mutates_args=())
def gated(x: torch.Tensor) -> torch.Tensor:
    content, leave = x.chunk(2, dim=1)
    return content.tanh() * leave.sigmoid()


def remember(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def backward(ctx, gradient):
    content, leave = ctx.saved_tensors[0].chunk(2, dim=1)
    to_content = gradient * leave.sigmoid() * (1 - content.tanh() ** 2)
    to_leave = gradient * content.tanh() * leave.sigmoid() * (1 - leave.sigmoid())
    return torch.cat([to_content, to_leave], dim=1)


gated.register_autograd(backward, setup_context=remember)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(1, 32, 8, stride=8)
        self.head = nn.Linear(16 * 16, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(gated(self.features(image)).flatten(1))


network = train(Gated(), epochs=6, rate=1e-2)
few, their_labels = shown[:3], named[:3]
try:
    linear_form(network, few, their_labels)
except UnsupportedOperationError as error:
    print(error)

# %% [markdown]
# The message offers the tangent. It works, but we have seen what tangents leave out. We know what the kernel computes,
# a sigmoid that multiplies something: a gate. **`Composite`** takes the operation apart: write it in smaller
# operations, and each of them falls under its own rule.

# %%
ways = {"tangent": Tangent()}


def in_small_operations(x):
    content, leave = x.chunk(2, dim=1)
    return content.tanh() * leave.sigmoid()


ways["gates"] = Composite(in_small_operations)
for name, rule in ways.items():
    form = linear_form(network, few, their_labels, rules={"gated": rule})
    print(f"{name:8s} share of B {share_of_b(form):5.1%}")
    assert form.relative_residual.max() < 1e-4

# %% [markdown]
# The same scores; by gates more of each is on the pixels, by the tangent more of it is in B.
#
# ## To take home
#
# - S = A·Y + B holds for every network at one image; gates, scales and attention weights are frozen there.
# - A transformer's map says where the score comes from *once it is known where the network looked*, not why it looked
#   there.
# - Lay token maps out with `token_grid`, and take them early: late ones live on the class token.
# - Gate and tangent are both exact; the tangent's B can swallow the whole score. Look at B before you look at the
#   map.
# - `captum-scoremap check` says of a model what is frozen where; `rules=` changes it; what has no rule is an error
#   with a name.
