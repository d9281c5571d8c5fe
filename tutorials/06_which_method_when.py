# %% [markdown]
# # 6. Which method when
#
# There are dozens of ways to color an image by what a network sees in it, and they disagree. Which is right? That
# depends on the question. This tutorial puts score maps and methods of [Captum](https://captum.ai) through the same
# tests, reads the outcome with the suspicion it deserves, and ends with a guide: which map for which question.
#
# A map is called **faithful** if it tells what the network really uses. A **metric** is one way to measure that. None
# is the truth; each asks its own question:
#
# | metric | question |
# | --- | --- |
# | completeness | Does the map add up to the score? |
# | insertion, deletion | Does the probability follow when the map's best pixels are put in, or taken out? |
# | grid pointing game | In a mosaic of four photographs, is the map in the cell of its label? |
# | patch score | Does the network recognize the label in the map's best patch alone? |
# | parameter randomization | Does the map change when the network forgets what it learned? |

# %%
import itertools

import torch
import torch.nn.functional as F
from captum.attr import InputXGradient, IntegratedGradients, LayerGradCam, Saliency
from matplotlib import pyplot as plt
from scipy import stats

from captum_scoremap import (
    FusedScoreMap,
    LayerScoreMap,
    ScoreMap,
    bias_terms,
    linear_form,
    metrics,
    prepare,
    score_map_crops,
)
from captum_scoremap.models import SAMPLES, load_model, read_image
from captum_scoremap.visualization import MapStyle, visualize_crops

loaded = load_model()  # EfficientNet-Lite0, trained on ImageNet
model = prepare(loaded.module)  # the same network with its batch norms folded: same scores, less time
inputs = torch.stack([loaded.preprocessing(read_image(f"sample:{name}")) for name in SAMPLES])
with torch.no_grad():
    probabilities = model(inputs).softmax(1)
target = probabilities.argmax(1)  # what the network says, right or wrong: that is what we explain

figure, axes = plt.subplots(1, 6, figsize=(12, 2.6), layout="constrained")
for ax, image, label, sure in zip(axes, inputs, target.tolist(), probabilities.amax(1).tolist(), strict=True):
    ax.imshow(loaded.preprocessing.picture(image).permute(1, 2, 0))
    ax.set_title(f"{loaded.label_name(label)}\n{sure:.2f}")
    ax.axis("off")
plt.show()

# %% [markdown]
# Six photographs that come with scikit-image and scikit-learn. The network is sure of one, undecided about most, and
# wrong about the astronaut, whom it has no label for. An explanation is of what the network says, not of what is
# true, so we keep her.
#
# ## Every method is a function
#
# All metrics take a method as a function: `attribute(inputs, target)`, images and labels in, maps out. So score maps
# and Captum's classes run through the very same code, and so do **controls**: "methods" that never look at the
# network. What a control reaches is what a metric gives for nothing.

# %%
SEED = 0  # chance, too, should be the same tomorrow


def chance(inputs, target):
    return torch.rand(len(inputs), 1, 14, 14, generator=torch.Generator().manual_seed(SEED))


def middle(inputs, target):
    """Photographers put things in the middle."""
    rows = torch.linspace(-1, 1, inputs.shape[-2])[:, None] ** 2
    columns = torch.linspace(-1, 1, inputs.shape[-1]) ** 2
    return (-rows - columns).exp().expand(len(inputs), 1, -1, -1)


def edges(inputs, target):
    """An edge detector, smoothed: pleasant to look at, and without a network."""
    gray = F.pad(inputs.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    across = (gray[..., 1:-1, 2:] - gray[..., 1:-1, :-2]).abs()
    down = (gray[..., 2:, 1:-1] - gray[..., :-2, 1:-1]).abs()
    return F.avg_pool2d(across + down, 15, stride=1, padding=7)


def saliency(model):
    """Captum's gradient methods warn unless the image already asks for a gradient; so let it ask."""
    return lambda inputs, target: Saliency(model).attribute(inputs.clone().requires_grad_(), target)


def methods(model):
    """All methods for a model, by name."""
    return {
        "FusedScoreMap": FusedScoreMap(model).attribute,
        "LayerScoreMap, last layer": LayerScoreMap(model, model.bn2).attribute,
        "LayerScoreMap, earlier": LayerScoreMap(model, model.blocks[4]).attribute,
        "Saliency": saliency(model),
        "control: middle": middle,
        "control: edges": edges,
        "control: chance": chance,
    }


maps = {name: method(inputs, target).detach() for name, method in methods(model).items()}
for name, one in maps.items():
    print(f"{name:26s} {tuple(one.shape)}")

# %% [markdown]
# Two popular methods are missing from the list because they are in it already. On this network, which is piecewise
# linear and ends in a global average, **Grad-CAM at the last layer is the last layer's score map**, and
# `InputXGradient` is `ScoreMap`:

# %%
cat, label = inputs[:1], target[:1]
grad_cam = LayerGradCam(model, model.bn2).attribute(cat, label)
difference = (grad_cam - maps["LayerScoreMap, last layer"][:1]).abs().max()
print(f"largest difference of Grad-CAM and the score map: {difference:.0e} logits")
assert difference < 1e-4
product = InputXGradient(model).attribute(cat.clone().requires_grad_(), label).detach()
assert torch.allclose(product, ScoreMap(model).attribute(cat, label), atol=1e-5)

# %%
figure, axes = plt.subplots(3, 1 + len(maps), figsize=(13, 5.4), layout="constrained")
for row, index in zip(axes, (0, 1, 5), strict=True):
    picture = loaded.preprocessing.picture(inputs[index]).permute(1, 2, 0)
    row[0].imshow(picture)
    row[0].set_ylabel(loaded.label_name(int(target[index])))
    for ax, (name, one) in zip(row[1:], maps.items(), strict=True):
        sized = metrics.input_sized(one, 224, 224)[index]
        limit = sized.abs().quantile(0.995).item()
        ax.imshow(picture.mean(2), cmap="gray", alpha=0.4)
        ax.imshow(sized, cmap="RdBu_r", vmin=-limit, vmax=limit, alpha=0.7)
        if index == 0:
            ax.set_title(name.replace(", ", ",\n").replace(": ", ":\n"), fontsize=9)
for ax in axes.flat:
    ax.set(xticks=[], yticks=[])
plt.show()

# %% [markdown]
# Each map has its own color scale. Try to guess from the pictures alone which ones look at the network: the edges
# look convincing, and know nothing. **Looking at maps does not tell good ones from bad ones.** Hence the metrics.
#
# ## Does it add up?
#
# A method is **complete** if its map adds up to the score, less an offset that it does not claim: B for score maps,
# the score of the baseline image for Integrated Gradients.

# %%
form = linear_form(model, cat, label, model.bn2)
with torch.no_grad():
    of_gray = model(torch.zeros_like(cat))[0, label]
rows = {
    "LayerScoreMap": (LayerScoreMap(model, model.bn2).attribute, form.bias),
    "ScoreMap": (ScoreMap(model).attribute, linear_form(model, cat, label).bias),
    "Integrated Gradients, 4 steps": (
        lambda x, t: IntegratedGradients(model).attribute(x, target=t, n_steps=4),
        of_gray,
    ),
    "Integrated Gradients, 16 steps": (
        lambda x, t: IntegratedGradients(model).attribute(x, target=t, n_steps=16),
        of_gray,
    ),
    "Grad-CAM": (LayerGradCam(model, model.bn2).attribute, 0.0),
    "all in one corner": (lambda x, t: F.pad((form.score - form.bias)[:, None, None, None], (0, 6, 0, 6)), form.bias),
}
missing = {}
for name, (method, offset) in rows.items():
    missing[name] = metrics.completeness(model, method, cat, label, offset).item()
    print(f"{name:32s} {missing[name]:+9.5f} logits missing of {form.score.item():.2f}")
assert abs(missing["LayerScoreMap"]) < 1e-3
assert abs(missing["ScoreMap"]) < 1e-3

# %% [markdown]
# Score maps add up, to rounding. Integrated Gradients would with infinitely many steps; with few it is far off, and
# this number tells. Grad-CAM does not mean to add up; on this network, at this layer, it nearly does, as it is the
# score map there.
#
# But see the last line: a map that puts the whole sum into the upper left corner adds up as well. **Completeness
# makes the numbers on a map mean something; it does not put them in the right place.** It is necessary for "this much
# comes from there", and not enough.
#
# ## Does the probability follow?
#
# **Deletion** replaces pixels by a neutral value, the most important first: the sooner the label's probability falls,
# the better. **Insertion** puts them into a blurred image: the sooner it rises, the better. Each is summed up by the
# area under its curve. A metric wants a function, but our maps are finished: `lambda *_: finished` hands them in.

# %%
STEPS = 5  # a study would take 32 and hundreds of images; this is a tutorial
inserted = {
    name: metrics.insertion(model, lambda *_, finished=finished: finished, inputs, target, steps=STEPS)
    for name, finished in maps.items()
}

# %%
deleted = {
    name: metrics.deletion(model, lambda *_, finished=finished: finished, inputs, target, steps=STEPS)
    for name, finished in maps.items()
}

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3), layout="constrained", sharey=True)
for ax, curves, title in ((axes[0], inserted, "insertion"), (axes[1], deleted, "deletion")):
    for name, curve in curves.items():
        style = ":" if name.startswith("control") else "-"
        ax.plot(curve.fractions, curve.probabilities[1], style, label=name)
    ax.set(title=f"espresso: {title}", xlabel="share of pixels exchanged")
axes[0].set_ylabel("probability")
axes[1].legend(fontsize=8, bbox_to_anchor=(1, 1), loc="upper left")
plt.show()

# %% [markdown]
# On the left the best curve is the upper one, on the right the lower one; controls are dotted. This is one
# photograph; the table below has all six.
#
# ## Is it where the label is?
#
# Four photographs become one mosaic. We ask for the map of each of the four labels: what share of its positive part
# lies in the right cell? A quarter is chance. Such a mosaic is four times as large, so one has to do here.

# %%
pictures, cells = metrics.mosaics(inputs, target, n=2, count=1, generator=torch.Generator().manual_seed(0))
grid = {name: metrics.grid_pointing_game(one, pictures, cells).flatten() for name, one in methods(model).items()}
names = [loaded.label_name(cell) for cell in cells[0].tolist()]
print(f"{'':26s} " + " ".join(f"{name:>12s}" for name in names))
for name, shares in grid.items():
    print(f"{name:26s} " + " ".join(f"{share:12.2f}" for share in shares.tolist()))

# %% [markdown]
# Where masks of the objects exist, `pointing_game` and `energy_pointing_game` ask the same of single photographs: is
# the highest value on the object, and what share of the positive part? A mosaic is such a case, with a cell as the
# mask:

# %%
mask = torch.zeros(1, 448, 448, dtype=torch.bool)
mask[:, :224, :224] = True  # the first cell
last = LayerScoreMap(model, model.bn2).attribute
share = metrics.energy_pointing_game(last, pictures, cells[:, 0], mask)
hit = metrics.pointing_game(last, pictures, cells[:, 0], mask, tolerance=15)
print(f"share {share.item():.2f} (as in the grid: {grid['LayerScoreMap, last layer'][0]:.2f}), hit: {hit.item()}")
assert torch.allclose(share, grid["LayerScoreMap, last layer"][:1], atol=1e-4)

# %% [markdown]
# ## Is the best patch enough?
#
# The window of half the side in which a map has the largest sum is cut out, enlarged and shown to the network alone.
# The **patch score** is the probability that it still gives the label.

# %%
patch = {}
for name, finished in maps.items():
    boxes = metrics.strongest_window(metrics.input_sized(finished, 224, 224), 112)
    patch[name] = metrics.patch_score(model, inputs, target, boxes)
    print(f"{name:26s} {patch[name].mean():.2f}")

# %% [markdown]
# ## Does it depend on what was learned?
#
# The network's layers are given new random parameters, one after another from the top. After the last one nothing of
# what it learned is left, so a map of it should have nothing in common with the map before. Measured by rank
# correlation: 0 is nothing, 1 is the same map.

# %%
bottom = next(name for name, module in model.named_modules() if hasattr(module, "reset_parameters"))
kept = {}
for name in maps:
    found = metrics.parameter_randomization(
        model,
        lambda randomized, x, t, name=name: methods(randomized)[name](x, t),
        inputs[:2],
        target[:2],
        layers=[bottom],
    )
    kept[name] = found[bottom]
    print(f"{name:26s} {kept[name].mean():+.2f}")
assert kept["control: edges"].min() > 0.99

# %% [markdown]
# The controls cannot pass: they never looked at the network, so all of their map remains. A method near their 1.00
# would be a picture of the image, not of the network. This test says who fails, not who is good; and with two
# photographs, and the few cells of the last layer's map, a correlation of 0.3 is nothing yet.
#
# ## The table
#
# Means of few values need their **confidence interval**: the range in which the true mean lies with 95% confidence.
# With six values the factor is Student's t = 2.57 (with the four of the mosaic 3.18), not the 1.96 of large samples.

# %%
CONFIDENCE = 0.95


def interval(values: torch.Tensor) -> tuple[float, float]:
    """Mean, and half the width of its 95% confidence interval."""
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * values.std().item() / len(values) ** 0.5
    return values.mean().item(), half


table = {
    "insertion ↑": {name: inserted[name].area for name in maps},
    "deletion ↓": {name: deleted[name].area for name in maps},
    "grid 2 × 2 ↑": grid,
    "patch score ↑": patch,
}
print(f"{'':26s} " + " ".join(f"{metric:>14s}" for metric in table))
for name in maps:
    numbers = [interval(values[name]) for values in table.values()]
    print(f"{name:26s} " + " ".join(f"   {mean:.2f} ± {half:.2f}" for mean, half in numbers))

# %%
figure, axes = plt.subplots(1, 4, figsize=(12, 2.8), layout="constrained", sharey=True)
for ax, (metric, values) in zip(axes, table.items(), strict=True):
    for place, name in enumerate(reversed(maps)):
        mean, half = interval(values[name])
        color = "gray" if name.startswith("control") else "tab:blue"
        ax.errorbar(mean, place, xerr=half, fmt="o", color=color)
    ax.set_title(metric)
axes[0].set_yticks(range(len(maps)), reversed(maps))
plt.show()

# %% [markdown]
# ## How to read such a table without fooling oneself
#
# **1. Few images.** The bars overlap nearly everywhere: photographs differ far more than methods do. What can be
# compared is *the same photograph under two methods*: take the differences, and the interval of those.

# %%
ahead = table["insertion ↑"]["FusedScoreMap"] - table["deletion ↓"]["FusedScoreMap"]
for rival in list(maps)[1:]:
    behind = table["insertion ↑"][rival] - table["deletion ↓"][rival]
    mean, half = interval(ahead - behind)
    said = "more than chance explains" if abs(mean) > half else "nothing can be said"
    print(f"insertion − deletion, FusedScoreMap minus {rival:26s} {mean:+.2f} ± {half:.2f}  {said}")

# %% [markdown]
# Six comparisons are six chances to be lucky, too: with 95% intervals, one comparison in twenty is "more than chance"
# by chance alone.
#
# **2. The choice of the metric.** Ranks of the methods by each (1 is best):

# %%
print(f"{'':26s} " + " ".join(f"{metric:>14s}" for metric in table))
ranks = {}
for metric, values in table.items():
    better = [-values[name].mean().item() if "↑" in metric else values[name].mean().item() for name in maps]
    ranks[metric] = stats.rankdata(better, method="min")
for index, name in enumerate(maps):
    print(f"{name:26s} " + " ".join(f"{of_metric[index]:14d}" for of_metric in ranks.values()))

# %% [markdown]
# Go along the lines: a rank in one column says little about the next. Saliency is among the best by deletion, and
# among the worst by insertion. Choosing the metric chooses the winner; so look at all of them, and
# decide before measuring which one counts. A method that leads every column, as the fused map did when this was
# written, makes a better case, but mind points 1 and 5.
#
# **3. The choice of the baseline.** What is a deleted pixel replaced by? Zero (which here is gray) and a blurred
# image are both common. The very same maps:

# %%
for name in ("FusedScoreMap", "LayerScoreMap, last layer", "Saliency", "control: edges"):
    finished = maps[name]
    blurred = metrics.deletion(model, lambda *_, one=finished: one, inputs, target, baseline="blur", steps=STEPS).area
    print(f"{name:26s} deletion to gray {deleted[name].area.mean():.2f}, to blur {blurred.mean():.2f}")

# %% [markdown]
# A blurred photograph still shows a lot, so deletion to blur takes less away. Numbers with different baselines cannot
# be compared, not even between two papers that both say "deletion". Always say which.
#
# **4. Controls.** A method that does not beat edges, middle and chance has shown nothing, however good its number
# looks. By how much is each ahead of the best control?

# %%
controls = [name for name in maps if name.startswith("control")]
print(f"{'':26s} " + " ".join(f"{metric:>14s}" for metric in table))
for name in maps:
    if name not in controls:
        ahead_of_controls = []
        for metric, values in table.items():
            means = torch.tensor([values[control].mean() for control in controls])
            mean = values[name].mean()
            ahead_of_controls.append(mean - means.max() if "↑" in metric else means.min() - mean)
        print(f"{name:26s} " + " ".join(f"{margin:+14.2f}" for margin in ahead_of_controls))

# %% [markdown]
# Some of the differences are next to nothing, or below it: there the metric, with these few photographs, cannot tell
# the method from one that never saw the network.
#
# **5. Selection.** Trying many variants and reporting the best on the images that chose it is reporting luck. Here
# are twenty-five "methods" that look at nothing at all: each always takes the same window, wherever that is. We let
# three photographs choose the best, and measure it on the other three, for all twenty ways to divide six photographs:

# %%
corners = [(x, y) for y in range(0, 113, 28) for x in range(0, 113, 28)]
windows = torch.tensor([[x, y, x + 112, y + 112] for x, y in corners]).expand(6, -1, -1)
scores = metrics.patch_score(model, inputs, target, windows)  # (6 photographs, 25 windows)

on_chosen, on_others = [], []
for choosing in itertools.combinations(range(6), 3):
    others = [index for index in range(6) if index not in choosing]
    best = scores[list(choosing)].mean(0).argmax()
    on_chosen.append(scores[list(choosing), best].mean())
    on_others.append(scores[others, best].mean())
chosen, others = torch.stack(on_chosen).mean(), torch.stack(on_others).mean()
print(f"the best of 25: {chosen:.2f} where it was chosen, {others:.2f} elsewhere")
print(f"any of the 25:  {scores.mean():.2f}")
assert chosen > others

# %% [markdown]
# The difference is the **selection bias**: nothing but luck, reported as progress. It concerns this package too.
# `FusedScoreMap` was chosen among many variants, on photographs like those it is measured on; the page on
# [faithfulness](site/benchmarks.md#faithfulness) says which numbers are held out and which are not. Ask the same of
# every table you read.
#
# ## Which map for which question
#
# | question | take | because |
# | --- | --- | --- |
# | How much of the score comes from where, all of it? | `CompleteScoreMap` | signed, adds up to the score itself |
# | What does a layer add, place by place? | `LayerScoreMap`, `linear_form` | an exact sum, in logits, at any layer |
# | Why this label and not that? | `form - other` | the difference of two exact sums is one |
# | Where is it? What do I crop? | `FusedScoreMap`, `score_map_crops` | one map of the image's size, of no unit |
# | Which pixels? | `ScoreMap` | sub-scores of the image; fine, with both signs |
# | What about all the other labels? | `LayerScoreMap.attribute_targets` | every label from one forward pass |
# | What is not on the map? | `bias_terms`, `bias_maps` | B, by the layer that brings it in; place by place |
# | Does it hold for my model? | `captum-scoremap check` | the residual at every layer |
# | Does it hold over my data? | `captum-scoremap audit` | [tutorial 7](07_auditing_a_model.ipynb) |
#
# Each in a line or two, on the cat. Why *tiger cat* and not *lynx*?

# %%
mine = linear_form(model, cat, loaded.label_index("tiger cat"), model.bn2)
lynx = linear_form(model, cat, loaded.label_index("lynx"), model.bn2)
why = mine - lynx
print(f"{mine.score.item():.2f} − {lynx.score.item():.2f} = {why.score.item():.2f}")
print(f"sum of the map {why.sums.item():.2f}, B {why.bias.item():.2f}")
assert why.residual.abs().item() < 1e-3

# %% [markdown]
# All thousand labels at once: which of them have the most of their score in the upper left part of the image, 4 × 4
# of 7 × 7 cells?

# %%
every = LayerScoreMap(model, model.bn2).attribute_targets(cat)  # (1, 1000, 7, 7)
upper_left = every[0, :, :4, :4].sum((1, 2))
print([loaded.label_name(index) for index in upper_left.topk(4).indices.tolist()], tuple(every.shape))
assert torch.allclose(every[:, label], maps["LayerScoreMap, last layer"][:1], atol=1e-3)

# %% [markdown]
# B at the image, the part that is on no pixel. Single terms are large and take each other away:

# %%
terms = bias_terms(model, cat, label)
for name, value in sorted(terms.items(), key=lambda item: -abs(item[1].item()))[:4]:
    print(f"{name:28s} {value.item():+.2f}")
total, bias = sum(terms.values()), linear_form(model, cat, label).bias
print(f"all {len(terms)} terms: {total.item():+.2f}, B = {bias.item():+.2f}")
assert torch.allclose(total, bias, atol=1e-3)

# %% [markdown]
# And for cropping, the fused map. Above each crop stands the probability of *tiger cat* for it alone:

# %%
fused = FusedScoreMap(model).attribute(cat, label)
boxes = score_map_crops(fused, (224, 224), k=2, size=96, max_overlap=0.2)
probability = metrics.patch_score(model, cat, label, boxes)[0].tolist()
picture = loaded.preprocessing.picture(cat[0])
captions = [f"crop {index}: {value:.2f}" for index, value in enumerate(probability, start=1)]
figure, _ = visualize_crops(
    picture,
    fused[0, 0],
    boxes[0],
    captions=captions,
    title=f"whole image: {probabilities[0].max():.2f}",
    style=MapStyle(unit="without unit"),
)
figure

# %% [markdown]
# ## To take home
#
# - Choose the map by the question, not by its looks.
# - Completeness gives numbers a meaning; only tests against the network give them a place.
# - Of a table ask: how many images, which metric, which baseline, where are the controls, who chose what on which
#   images?
# - Run the metrics on *your* model and *your* images; they are functions, and a method is a function.
