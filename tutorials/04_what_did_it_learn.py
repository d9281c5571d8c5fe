# %% [markdown]
# # 4. What did it learn?
#
# A score map says where in *one* image a score comes from. Put the best spots of *many* images side by side and you
# see what a layer looks for: eyes, wheels, text. The paper (Yu et al. 2015, Section 4) calls them **semantic patches**.
# Here we cut them from six photographs by score map and by gradient, ask how much of an image a cell of a layer can
# see at all, and measure how much of the label a patch carries.
#
# Two names from the paper: **SMSM** chooses patches by *score map*, **GSM** by the *gradient* (the saliency of
# Simonyan et al. 2013). [Tutorial 1](01_getting_started.ipynb) explains what a score map is.

# %%
import torch
from captum.attr import LayerActivation

from captum_scoremap import LayerScoreMap, receptive_field, semantic_patches
from captum_scoremap.metrics import patch_score
from captum_scoremap.models import SAMPLES, load_model, read_image
from captum_scoremap.visualization import visualize_patches

loaded = load_model()  # EfficientNet-Lite0
model = loaded.module
files = [f"sample:{name}" for name in SAMPLES]  # paths of your own files do as well
inputs = torch.stack([loaded.preprocessing(read_image(file)) for file in files])

with torch.no_grad():
    probabilities = model(inputs).softmax(1)
labels = probabilities.argmax(1)
for name, label, chances in zip(SAMPLES, labels.tolist(), probabilities, strict=True):
    print(f"{name:10s} {loaded.label_name(label):16s} {chances[label]:.2f}")

# %% [markdown]
# ImageNet has no label for a space suit; the network makes a football helmet of it, without being sure. We explain the
# label that the network gives, right or wrong: why it errs is as good a question as any.
#
# ## How much can a cell see?
#
# Each cell of a layer depends on a rectangle of pixels, its **receptive field**. `receptive_field` finds it for all
# cells from the structure of the network.

# %%
names = ["blocks.0", "blocks.1", "blocks.2", "blocks.3", "blocks.4", "bn2"]
fields = {name: receptive_field(model, model.get_submodule(name), (224, 224)) for name in names}
for name, field in fields.items():
    rows, cols = field.boxes.shape[:2]
    print(f"{name:9s} {rows:3d} x {cols:3d} cells, each sees {field.size[0]:3d} pixels, {field.stride[0]:2.0f} apart")

# %% [markdown]
# From `blocks.4` on, a field is larger than the image of 224 pixels. Do not take such numbers on trust: put noise
# everywhere but in the field of one cell, and the cell must not change. Put noise in the field, and it must.

# %%
row, col = 14, 14
x0, y0, x1, y1 = fields["blocks.2"].box(row, col)
noise = torch.randn(3, 224, 224, generator=torch.Generator().manual_seed(0))
outside, inside = noise.clone(), inputs[0].clone()
outside[:, y0:y1, x0:x1] = inputs[0, :, y0:y1, x0:x1]
inside[:, y0:y1, x0:x1] = noise[:, y0:y1, x0:x1]

images = torch.stack([inputs[0], outside, inside])
cells = LayerActivation(model, model.blocks[2]).attribute(images).detach()[:, :, row, col]
print(f"the cell sees columns {x0} to {x1}, rows {y0} to {y1}")
outer, inner = ((cells[index] - cells[0]).abs().max() for index in (1, 2))
print(f"noise outside changes it by {outer:.0e}, inside by {inner:.1f}")
torch.testing.assert_close(cells[1], cells[0], rtol=1e-4, atol=1e-4)
assert inner > 0.1

# %% [markdown]
# ## Patches by score map
#
# `semantic_patches` runs through any number of images, keeps the cells with the highest sub-scores, and cuts their
# receptive fields out of the files. Without `targets` each image is asked for its own best label.

# %%
layer = model.blocks[2]
patches = semantic_patches(model, layer, files, k=9, per_image=3, preprocess=loaded.preprocessing)
for patch in patches[:3]:
    print(f"{patch.image}: {loaded.label_name(patch.target)}, cell {(patch.row, patch.col)}, {patch.value:.3f} logits")

# %% [markdown]
# Where does a value come from? It is one cell of a score map, nothing else:

# %%
best = patches[0]
index = files.index(str(best.image))
score_map = LayerScoreMap(model, layer).attribute(inputs[index : index + 1], best.target)
print(f"the map has {score_map[0, 0, best.row, best.col]:.3f} logits at that cell, {score_map.max():.3f} at most")
torch.testing.assert_close(score_map[0, 0, best.row, best.col].item(), best.value, rtol=1e-3, atol=1e-5)
assert score_map.argmax() == best.row * score_map.shape[3] + best.col

# %% [markdown]
# ## SMSM beside GSM
#
# The same with `by="gradient"`: cells are then ranked by how much the score *would change* with them, $|A|$, and not by
# what they *add* to it, $A \cdot Y$. At `blocks.4`, where a cell sees the whole image, we give the patches a size:
# squares around the center of the field. This is Fig. 4 of the paper, with another network.

# %%
sizes = {"blocks.2": None, "blocks.4": 96}
methods = {"SMSM: score map": "score_map", "GSM: gradient": "gradient"}
found = {
    name: {
        title: semantic_patches(
            model,
            model.get_submodule(name),
            files,
            by=by,
            per_image=3,
            size=size,
            preprocess=loaded.preprocessing,
        )
        for title, by in methods.items()
    }
    for name, size in sizes.items()
}
figure, _ = visualize_patches(found)
figure

# %% [markdown]
# Best first, row by row; the number in the corner is what a patch was chosen by, so the numbers of the two columns
# cannot be compared: logits on the left, logits per unit of activation on the right. How far do both agree?

# %%
for name, by_method in found.items():
    smsm, gsm = ({(str(patch.image), patch.row, patch.col) for patch in some} for some in by_method.values())
    photographs = [{cell[0] for cell in cells} for cells in (smsm, gsm)]
    print(f"{name}: {len(smsm & gsm)} of {len(smsm)} cells in common; photographs: {list(map(len, photographs))}")
    assert smsm != gsm

# %% [markdown]
# Both look at the strongest values of *all* images, so one photograph may come up several times and another not at
# all. To see every photograph, use `per_image=1` and as many patches as images, as below.
#
# ## What is one channel for?
#
# A layer's channels are its vocabulary. Which channel of `blocks.4` adds most to *espresso*, and where in all the
# photographs is it most active? `attr_dim_summation=False` keeps the channels apart; `channel` asks for one.

# %%
coffee = SAMPLES.index("coffee")
by_channel = LayerScoreMap(model, model.blocks[4]).attribute(
    inputs[coffee : coffee + 1], loaded.label_index("espresso"), attr_dim_summation=False
)
shares = by_channel.sum(dim=(0, 2, 3))
channel = int(shares.argmax())
print(f"channel {channel} of {len(shares)} adds {shares[channel]:.2f} logits, all together {shares.sum():.2f}")

options = {"channel": channel, "k": 6, "size": 96, "preprocess": loaded.preprocessing}
active = semantic_patches(model, model.blocks[4], files, by="activation", **options)
for patch in active:
    print(f"{patch.image}: activation {patch.value:.2f}")
figure, _ = visualize_patches({"blocks.4": {f"channel {channel}, most active": active}}, columns=6, fig_size=(9, 2))
figure

# %% [markdown]
# Six photographs are too few to name a channel; with a folder of some thousand, the same lines will do.
#
# ## How much of the label is in a patch?
#
# Patches look convincing, and that is the danger. So measure: `patch_score` enlarges a patch to a whole view and asks
# the network for the label's probability on it alone. One square of 112 pixels from each photograph, a quarter of it,
# chosen in three ways at two layers; and, for comparison, the square in the middle.

# %%
chosen = {"the middle": torch.tensor([[56, 56, 168, 168]]).expand(len(inputs), 4)}
for name in ("blocks.2", "bn2"):
    for by in ("score_map", "gradient", "activation"):
        some = semantic_patches(model, model.get_submodule(name), inputs, labels.tolist(), by, k=6, size=112)
        chosen[f"{name}, {by}"] = torch.tensor([patch.box for patch in sorted(some, key=lambda patch: patch.image)])

print(f"{'':22s}" + "".join(f"{name:>10s}" for name in SAMPLES) + f"{'mean':>10s}")
means = {}
for what, boxes in chosen.items():
    scores = patch_score(model, inputs, labels, boxes)
    means[what] = scores.mean().item()
    print(f"{what:22s}" + "".join(f"{score:10.2f}" for score in scores.tolist()) + f"{means[what]:10.2f}")
assert means["bn2, score_map"] > means["the middle"]
assert means["bn2, score_map"] > means["bn2, gradient"]

# %% [markdown]
# At the last layer the score map chooses better than the gradient. That is no accident: global pooling follows, so the
# gradient is the same at every cell and has nothing to choose by.

# %%
for name in ("blocks.2", "bn2"):
    gradient = LayerScoreMap(model, model.get_submodule(name), multiply_by_inputs=False).attribute(
        inputs, labels, attr_dim_summation=False
    )
    spread = gradient.std(dim=(2, 3)).mean() / gradient.abs().mean()
    print(f"{name:9s} spread of the gradient over cells, relative to its size: {spread:.1e}")
assert spread < 1e-4

# %% [markdown]
# Beyond that, **six photographs prove nothing**. On 63 photographs
# ([Benchmarks](site/benchmarks.md#semantic-patches)) score map and gradient do about equally well before the last
# layer, at the last one the score map is far ahead, and both beat the activation, which does not know the label. And
# squares as large as 160 pixels are no better than the middle of the image, where photographers put their subject.
# [Tutorial 6](06_which_method_when.ipynb) is about reading such tables.
#
# ## Where to go from here
#
# - [5. Transformers and modern CNNs](05_transformers_and_modern_cnns.ipynb): what else has a linear form, and why.
# - [7. Auditing a model](07_auditing_a_model.ipynb): from a folder of images to a report.
# - On a folder of your own: `captum-scoremap patches photos --layer blocks.2 --layer blocks.4`.
