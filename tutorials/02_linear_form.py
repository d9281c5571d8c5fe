# %% [markdown]
# # 2. What the linear form is
#
# [Tutorial 1](01_getting_started.ipynb) said that the score of a label is $S = A \cdot Y + B$ at every layer of a
# network. Here we compute $A$, $Y$ and $B$ with our own hands, in a network so small that everything in it can be
# printed, and then let `linear_form` do it. After that we walk away from the image until the equation breaks, and see
# where and why.
#
# You need to know matrix products and what a ReLU does: it keeps what is positive and replaces the rest by zero.

# %%
import torch
from matplotlib import pyplot as plt
from torch import nn

from captum_scoremap import bias_terms, freeze, linear_form

torch.set_printoptions(precision=4, sci_mode=False)

# %% [markdown]
# ## A network small enough to print
#
# An "image" of four pixels, a layer of four units with ReLU, **max-pooling**, which of each pair of neighbors keeps
# the larger, and the scores of two labels. The weights are whole numbers, so that you can follow with a pencil.

# %%
model = nn.Sequential(
    nn.Linear(4, 4),  # F1 x + b1
    nn.ReLU(),
    nn.MaxPool1d(2),
    nn.Linear(2, 2),  # F2 y + b2, the scores of two labels
).eval()

F1 = torch.tensor([[1.0, -1.0, 0.0, 2.0], [0.0, 1.0, 1.0, -1.0], [2.0, 0.0, -1.0, 0.0], [-1.0, 1.0, 0.0, 1.0]])
b1 = torch.tensor([1.0, 0.0, -3.0, 0.0])
F2 = torch.tensor([[1.0, 2.0], [-1.0, 1.0]])
b2 = torch.tensor([0.0, 1.0])
with torch.no_grad():
    for layer, (weight, bias) in {model[0]: (F1, b1), model[3]: (F2, b2)}.items():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)

image = torch.tensor([[1.0, 2.0, 0.5, 1.5]])
with torch.no_grad():
    scores = model(image)
scores

# %% [markdown]
# ## Masks and switches
#
# Go through it step by step. The first layer is a matrix product; the ReLU closes what is negative.

# %%
x = image[0]
before = F1 @ x + b1
mask = before > 0
print("before the ReLU", before)
print("mask           ", mask)

# %% [markdown]
# The **mask** says which ReLUs are open *at this image*. Once you know it, the ReLU is no longer nonlinear: it
# multiplies by a diagonal matrix $R$ of ones and zeros. Max-pooling is the same kind of thing. Its **switch** says
# which of the two neighbors was larger; once you know it, pooling just picks them, and that is a matrix $P$ too.

# %%
R = torch.diag(mask.float())
y = R @ before
switch = y.reshape(2, 2).argmax(dim=1)
P = torch.zeros(2, 4)
P[0, 0 + switch[0]] = 1
P[1, 2 + switch[1]] = 1
print("after the ReLU", y)
print("switch", switch, "so P is")
print(P)

# %% [markdown]
# So at this image the whole network is a chain of matrices, and a chain of matrices is one matrix:
#
# $$S = F_2\,P\,R\,(F_1 x + b_1) + b_2
#     = \underbrace{F_2 P R F_1}_{A}\,x \;+\; \underbrace{F_2 P R\,b_1 + b_2}_{B}$$

# %%
A = F2 @ P @ R @ F1
B = F2 @ P @ R @ b1 + b2
print("A =", A, "B =", B, sep="\n")
print("A x + B =", A @ x + B)
assert torch.equal(A @ x + B, scores[0])

# %% [markdown]
# The same can be done from any layer on: with $Y$ the output of the ReLU, $A$ is $F_2 P$ and $B$ is $b_2$. Every
# layer has its own $A$ and $B$; the score is always the same.
#
# ## The same by `linear_form`
#
# `linear_form(model, image, target, layer)` returns $A$, $Y$, $B$ and $S$ of a label, for the output of any layer;
# without a layer it is about the image itself.

# %%
target = 0
of_image = linear_form(model, image, target)
of_relu = linear_form(model, image, target, model[1])

torch.testing.assert_close(of_image.coefficients[0], A[target])
torch.testing.assert_close(of_image.bias[0], B[target])
torch.testing.assert_close(of_relu.coefficients[0], (F2 @ P)[target])
torch.testing.assert_close(of_relu.activations[0], y)
torch.testing.assert_close(of_relu.bias[0], b2[target])

for name, form in {"image": of_image, "ReLU": of_relu}.items():
    print(f"{name:6s} A·Y = {form.sums.item():5.2f}, B = {form.bias.item():5.2f}, S = {form.score.item():5.2f}")

# %% [markdown]
# The products $A \cdot Y$ one by one are the **sub-scores**, the share of each pixel or unit. In an image of rows and
# columns, summed over the channels of each place, they become the score map.

# %%
print("x                 ", image[0])
print("A of label 0      ", of_image.coefficients[0])
print("sub-scores, A · x ", of_image.sub_scores[0])

# %% [markdown]
# The third pixel has a coefficient of zero: every unit that looks at it is closed or lost to its neighbor. A real
# network does the same with matrices of millions of entries, which nobody builds. $A$ is obtained by one backward
# pass, $B$ by running the network with masks and switches held fixed and the layer set to zero.
#
# ## Where B comes from
#
# `bias_terms` splits $B$ into the share of every layer's bias. By hand: $F_2 P R\,b_1$ is what the first layer's bias
# becomes on its way up, and $b_2$ adds itself.

# %%
shares = bias_terms(model, image, target)
for name, share in shares.items():
    print(f"bias of layer {name}: {share.item():5.2f}")
print(f"together:        {sum(shares.values()).item():5.2f}, and B is {B[target]:.2f}")

torch.testing.assert_close(shares["0"][0], (F2 @ P @ R @ b1)[target])
torch.testing.assert_close(sum(shares.values())[0], B[target])

# %% [markdown]
# ## The linear region
#
# How far does this one matrix reach? As long as masks and switches stay as they are, nothing in the chain changes,
# and $A x + B$ is *exactly* the network. The set of all images with the same masks and switches is called the
# **linear region** of the image. `freeze` makes a function of it, which has the masks and switches of one image and
# keeps them for any other.

# %%
frozen = freeze(model, image)
frozen.switches

# %% [markdown]
# Names are those of the modules: `1` is the ReLU, `2` the pooling (whose switch gives positions in the row it pools).
# Let us walk from the image in some direction and ask how far the region goes.

# %%
direction = torch.tensor([[0.0, 1.0, 0.0, 0.0]])  # the second pixel becomes brighter
boundary = frozen.distance_to_boundary(direction)
print(f"after a step of {boundary.distance.item():.4f} a switch flips in module {boundary.switch[0]!r}")

# %% [markdown]
# Up to this step the frozen network and the network agree, beyond it they need not:

# %%
edge = boundary.distance.item()
with torch.no_grad():
    for step in (0.0, 0.5 * edge, 0.99 * edge, 1.01 * edge, 2 * edge):
        moved = image + step * direction
        same, difference = frozen.same_region(freeze(model, moved)), frozen(moved) - model(moved)
        print(f"step {step:6.3f}: same region {same!s:5s}  frozen - network {difference[0].numpy().round(3)}")
        assert same == (step < edge)
        if same:
            torch.testing.assert_close(frozen(moved), model(moved))

# %% [markdown]
# And this is what flipped:

# %%
past = freeze(model, image + 1.01 * edge * direction)
print("flipped:", frozen.flipped(past))
for name in frozen.flipped(past):
    print("before", frozen.switches[name].tolist(), " after", past.switches[name].tolist())

# %% [markdown]
# The picture of it: in both directions the score of the network bends sooner or later, while the frozen one goes
# straight.

# %%
steps = torch.linspace(-4, 4, 401)
line = image + steps[:, None] * direction
with torch.no_grad():
    true = model(line)[:, target]
    straight = torch.cat([frozen(one[None])[:, target] for one in line])

kinks = [frozen.distance_to_boundary(sign * direction).distance.item() * sign for sign in (-1, 1)]
figure, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
ax.plot(steps, straight, "--", color="tab:red", label="frozen at the image: A x + B")
ax.plot(steps, true, color="tab:blue", label="the network")
ax.axvspan(*kinks, color="0.9", label="linear region of the image")
ax.plot(0, scores[0, target], "ko", label="the image")
ax.set_xlabel("step along the direction")
ax.set_ylabel("score of label 0, logits")
ax.legend(fontsize=8)
plt.show()

# %% [markdown]
# The network (blue) runs on the frozen line all through the gray region and leaves it at a kink on the right, where
# another neighbor wins the pooling. On the left the region ends too, and yet nothing bends: there the ReLU of the
# second unit closes, which had lost the pooling anyway. A new region may have the same line; a kink is always a
# boundary.
#
# ## Regions as a map
#
# Two pixels make a plane, and a plane can be drawn: every color below is one linear region, in each of which the
# network is a single matrix. The arrow is the walk from above.

# %%
across, up = torch.meshgrid(torch.linspace(-3, 5, 90), torch.linspace(-2, 6, 90), indexing="xy")
plane = image.repeat(across.numel(), 1)
plane[:, 0], plane[:, 1] = across.flatten(), up.flatten()
switches = freeze(model, plane).switches  # of all images at once
codes = torch.cat([switch.flatten(1).long() for switch in switches.values()], dim=1)
_, region = codes.unique(dim=0, return_inverse=True)

figure, ax = plt.subplots(figsize=(4.6, 4), layout="constrained")
ax.pcolormesh(across, up, region.reshape(across.shape), cmap="tab20", shading="nearest")
ax.plot(*image[0, :2], "ko")
ax.annotate("", image[0, :2] + torch.tensor([0, edge]), image[0, :2], arrowprops={"arrowstyle": "->"})
ax.set_xlabel("first pixel")
ax.set_ylabel("second pixel")
plt.show()
print(f"{region.max() + 1} regions")

# %% [markdown]
# Straight edges everywhere: a network of ReLUs and max-pooling is made of flat pieces. A photograph lies in such a
# piece too, only a tiny one, since millions of masks and switches have to stay. How tiny, for a small convolutional
# network with random weights and an image of noise?

# %%
torch.manual_seed(0)
convolutional = nn.Sequential(
    nn.Conv2d(3, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5408, 10)
).eval()
noise = torch.randn(1, 3, 32, 32)
way = torch.randn(1, 3, 32, 32)
reach = freeze(convolutional, noise).distance_to_boundary(way / way.norm()).distance.item()
print(f"{sum(switch.numel() for switch in freeze(convolutional, noise).switches.values())} masks and switches")
print(f"the region ends after {reach / noise.norm().item():.1e} of the image's own length")
assert reach / noise.norm().item() < 1e-2

# %% [markdown]
# This is what "exact at one image" means: $A$, $B$ and the score map are facts about this image and its region, and
# not predictions of what the network says when you paint over half of it. For that, see [tutorial
# 6](06_which_method_when.ipynb).
#
# ## Networks that are not piecewise linear
#
# GELU, sigmoid, softmax, layer norm and attention have no mask. Each still has an exact linear form *at one image*,
# if the right factor is frozen there: GELU, for one, is $x \cdot g(x)$ with a gate $g$ between 0 and 1, and the gate
# is held. The equation $S = A \cdot Y + B$ stays exact; there is just no region around the image any more in which it
# holds.

# %%
smooth = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2)).eval()
form = linear_form(smooth, image, target)
print(f"S = {form.score.item():.4f}, A·x + B = {form.sums.item() + form.bias.item():.4f}")
torch.testing.assert_close(form.sums + form.bias, form.score)

near = image + 0.5 * direction
with torch.no_grad():
    print(f"half a step away: frozen - network = {(freeze(smooth, image)(near) - smooth(near))[0, target].item():.1e}")

# %% [markdown]
# [Tutorial 5](05_transformers_and_modern_cnns.ipynb) is about these.
#
# ## In short
#
# - Mask and switch: what the ReLUs and the pooling windows decided at this image.
# - $A$: the coefficients of the score in a layer's output once these are held; $B$: what the biases above make of it.
# - `linear_form` gives $A$, $Y$, $B$, $S$; `bias_terms` splits $B$; `freeze` keeps masks and switches for other
#   images.
# - Exact at the image and in its region, and no further.
#
# Next: [3. Images of any size](03_images_of_any_size.ipynb).
