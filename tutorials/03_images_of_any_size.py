# %% [markdown]
# # 3. Images of any size
#
# Most classifiers take one **view** of fixed size, cut from the middle of a photograph. The rest of it never reaches
# the network. The paper (Yu et al. 2015, Section 2.1) scores *all* views of an image at once, and keeps everything
# linear while doing so. Here we build that from a network that reads single digits, let it loose on a
# whole canvas of them, and ask where on the canvas it saw a six. At the end, the same with a photograph.

# %%
import torch
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle
from sklearn.datasets import load_digits
from torch import nn

from captum_scoremap import LayerScoreMap, MultiView, linear_form, score_map_crops
from captum_scoremap.models import load_model, read_image
from captum_scoremap.visualization import visualize_crops, visualize_score_map

# %% [markdown]
# ## A network that reads one digit
#
# scikit-learn carries handwritten digits of 8 × 8 pixels. Ten labels are one for each digit. An eleventh,
# *nothing*, is for views that show no digit or only a part of one. We make examples by shifting digits: one pixel to
# the side is still the digit, three pixels or more are nothing.

# %%
data = load_digits()
digits, names = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)
test = torch.arange(len(names)) % 5 == 0  # a fifth of the digits are never shown in training
NOTHING = 10


def shifted(images: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """Images moved down and right; what they leave is black."""
    return nn.functional.pad(images, (8, 8, 8, 8))[:, :, 8 - rows : 16 - rows, 8 - cols : 16 - cols]


def examples(digits: torch.Tensor, names: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Digits at their place, and parts of digits."""
    images, labels = [torch.zeros(500, 1, 8, 8)], [torch.full((500,), NOTHING)]
    for rows in range(-7, 8):
        for cols in range(-7, 8):
            far = max(abs(rows), abs(cols))
            if far != 2:
                some = slice(None) if far < 2 else slice((rows + 15 * cols) % 10, None, 10)
                images.append(shifted(digits[some], rows, cols))
                labels.append(names[some] if far < 2 else torch.full((len(names[some]),), NOTHING))
    return torch.cat(images), torch.cat(labels)


images, labels = examples(digits[~test], names[~test])
print(f"{len(images)} images to learn from, {(labels == NOTHING).float().mean():.0%} of them nothing")

# %% [markdown]
# The network has the two parts that all classic networks have: `features`, convolutions and max-pooling, turns an
# image into a small map; `head`, fully connected layers, turns the map into scores. Training takes seconds.

# %%
threads = torch.get_num_threads()
torch.set_num_threads(1)  # faster for so small a network, and the same on every number of cores
torch.manual_seed(0)
features = nn.Sequential(nn.Conv2d(1, 24, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(24, 64, 2), nn.ReLU())
head = nn.Sequential(nn.Flatten(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 11))
model = nn.Sequential(features, head)

optimizer = torch.optim.Adam(model.parameters())
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=800)
for _ in range(800):
    batch = torch.randint(len(images), (128,))
    loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
model.eval()
torch.set_num_threads(threads)

with torch.no_grad():
    for what, (some, expected) in {
        "digits": (digits[test], names[test]),
        "digits and parts": examples(digits[test], names[test]),
    }.items():
        right = (model(some).argmax(1) == expected).float().mean()
        print(f"{right:.1%} of {len(some)} {what} that it has not seen are read correctly")
        assert right > 0.9

# %% [markdown]
# ## A canvas
#
# Now six of the digits it has not seen, at places of our choice on a canvas of 36 × 52 pixels.

# %%
unseen = {digit: digits[(names == digit) & test][0] for digit in range(10)}
places = {7: (3, 4), 6: (5, 22), 4: (2, 40), 0: (21, 8), 2: (24, 25), 3: (22, 41)}

canvas = torch.zeros(1, 1, 36, 52)
for digit, (row, col) in places.items():
    canvas[:, :, row : row + 8, col : col + 8] = unseen[digit]

figure, ax = plt.subplots(figsize=(5, 3.4))
ax.imshow(canvas[0, 0], cmap="gray")
plt.show()

# %% [markdown]
# The network itself cannot take it: its fully connected layer expects a map of 2 × 2 cells. The convolutions do not
# mind the size; they give a larger map.

# %%
print("one view:", tuple(features(digits[:1]).shape), "  canvas:", tuple(features(canvas).shape))

try:
    model(canvas)
except RuntimeError as error:
    print("the network on the canvas:", error)

# %% [markdown]
# ## The multi-view architecture
#
# So let the convolutions run *once* on the whole canvas, and move a window of 2 × 2 cells over their map. Every
# position of the window is a view. That is what `MultiView` adds, as two additional layers (Fig. 1 of the paper):
#
# - the **sliding layer** lays the windows out one after another,
# - the head scores each of them,
# - the **sum-pooling layer** takes the mean of all these scores.

# %%
network = MultiView(features, head, window=2)
network

# %%
with torch.no_grad():
    each = network.view_scores(canvas)  # (N, K, rows, cols): a score for each label and view
    mean = network(canvas)  # (N, K)
boxes = network.view_boxes(36, 52)  # where the views lie: x0, y0, x1, y1 in pixels, row by row
rows, cols = each.shape[2:]
print(f"{rows} x {cols} = {len(boxes)} views; the last one is at {boxes[-1].tolist()}")
torch.testing.assert_close(mean, each.mean(dim=(2, 3)))

# %% [markdown]
# Is a view's score really what the network says of that crop? Cut out all of them and see. They agree, but for
# rounding, since the convolutions here have no padding.

# %%
with torch.no_grad():
    crops = torch.cat([canvas[:, :, y0:y1, x0:x1] for x0, y0, x1, y1 in boxes.tolist()])
    one_by_one = model(crops)
difference = (each[0].flatten(1).T - one_by_one).abs().max()
print(f"largest difference to {len(crops)} crops, scored one by one: {difference:.1e}")
assert difference < 1e-4

# %% [markdown]
# ## Which view says what?
#
# Every view has its probabilities. Draw the surest view of each digit.

# %%
chances = each.softmax(dim=1)[0]
figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
axes[0].imshow(canvas[0, 0], cmap="gray")
for digit, (row, col) in places.items():
    best = int(chances[digit].argmax())
    x0, y0, x1, y1 = boxes[best].tolist()
    axes[0].add_patch(Rectangle((x0 - 0.5, y0 - 0.5), 8, 8, fill=False, color="tab:orange"))
    axes[0].text(x0, y0 + 8, f"{digit}: {chances[digit].max():.2f}", color="tab:orange", fontsize=8, va="top")
    print(f"{digit} is at {(row, col)}, its surest view at {(y0, x0)} with probability {chances[digit].max():.2f}")
    assert max(abs(y0 - row), abs(x0 - col)) <= 2
shown = axes[1].imshow(chances[7], cmap="Reds", vmin=0, vmax=1)
axes[1].set_title("probability of a 7, view by view")
figure.colorbar(shown)
plt.show()

# %% [markdown]
# All six are found, up to the two pixels between neighboring views. But the score of the canvas is one number for each
# label, the mean over all views. Which places does it come from?
#
# ## A score map of the whole canvas
#
# Sliding and sum-pooling are linear, so the score of the canvas is $S = A \cdot Y + B$ like any other, at every layer
# of this larger network. Nothing new is to be learned: `MultiView` is a module, and `LayerScoreMap` explains modules.

# %%
last = network.features[4]
score_map, delta = LayerScoreMap(network, last).attribute(canvas, target=6, return_convergence_delta=True)
print(f"{tuple(score_map.shape)}, S = {mean[0, 6]:.3f}, delta {delta.item():.0e}")
assert delta.abs() < 1e-4

# %% [markdown]
# The mean score of a 6 is far below zero, since most of the views show nothing. The better question is a contrast: why
# a 6 *and not a 3*? ([Tutorial 1](01_getting_started.ipynb) asked this of cat and lynx.) We ask at two layers: at the
# input of sum-pooling, where a cell is a view and its sub-score is its share of the mean, and at the last convolution.

# %%
sliding = {
    digit: LayerScoreMap(network, network.sum_pooling).attribute(canvas, digit, attribute_to_layer_input=True)
    for digit in (6, 3)
}
by_view = sliding[6] - sliding[3]
torch.testing.assert_close(by_view[0, 0], (each[0, 6] - each[0, 3]) / len(boxes), rtol=1e-4, atol=1e-6)

by_cell = (linear_form(network, canvas, 6, last) - linear_form(network, canvas, 3, last)).score_map()
figure, axes = plt.subplots(1, 2, figsize=(10, 3), layout="constrained")
visualize_score_map(by_view, title="6, not 3: by view", plt_fig_axis=(figure, axes[0]))
visualize_score_map(by_cell, canvas, title="6, not 3: at the last convolution", plt_fig_axis=(figure, axes[1]))
plt.show()

best = boxes[int(by_view.flatten().argmax())].tolist()
print(f"the 6 is at {places[6]}, the view that adds most at {(best[1], best[0])}")
assert max(abs(best[1] - places[6][0]), abs(best[0] - places[6][1])) <= 2

# %% [markdown]
# The view that says *6, not 3* loudest is the one on the 6. The others have a say too: a view of half a digit, or of
# another digit, also has a score for 6 and one for 3, and the mean asks them all. That is the price of a mean, and
# worth knowing before you read such a map as a detector.
#
# ## A photograph
#
# Now a real network. `MultiView.from_classifier` divides classifiers of torchvision and timm by itself. A photograph is
# scaled as for training (256 pixels on the shorter side), but not cropped: `preprocessing.whole`.

# %%
loaded = load_model()  # EfficientNet-Lite0
network = MultiView.from_classifier(loaded.module)
photograph = loaded.preprocessing.whole(read_image("sample:coffee"))[None]
picture = loaded.preprocessing.picture(photograph[0])
target = loaded.label_index("espresso")

with torch.no_grad():
    views = network.view_scores(photograph)
    score = network(photograph)[0, target]
rows, cols = views.shape[2:]
print(f"{tuple(photograph.shape[2:])} pixels, {rows} x {cols} views")
for line in views.softmax(1)[0, target].tolist():
    print("probability of an espresso:", "  ".join(f"{chance:.2f}" for chance in line))

# %% [markdown]
# Every view shows enough of the cup. Now where: the score map of all views, and the regions it points at (Fig. 3 of
# the paper). `score_map_crops` takes the map and returns boxes in pixels, here the two best windows of 112 pixels that
# hardly overlap, and the best box of any size.

# %%
form = linear_form(network, photograph, target, network.features.bn2)
print(f"sum of the map {form.sums.item():.3f} + B {form.bias.item():.3f} = score {score:.3f}")
assert form.relative_residual < 1e-5

size = tuple(photograph.shape[2:])
windows = score_map_crops(form.score_map(), size, k=2, size=112, max_overlap=0.1)[0]
box = score_map_crops(form.score_map(), size)[0]
captions = ["1: best window", "2: the next", "3: best box"]
figure, _ = visualize_crops(
    picture, form.score_map(), torch.cat([windows, box]), captions=captions, title="espresso", fig_size=(12, 2.4)
)
figure

# %% [markdown]
# ## One thing to watch: padding
#
# This network pads its convolutions with zeros. A view inside the photograph sees its neighbor's pixels where a lone
# crop would see those zeros, so their scores differ. For the label itself it can be much:

# %%
with torch.no_grad():
    x0, y0, x1, y1 = network.view_boxes(*size)[0].tolist()
    crop = loaded.module(photograph[:, :, y0:y1, x0:x1])[0]
print(f"espresso, first view: {views[0, target, 0, 0]:.2f} among all views, {crop[target]:.2f} as a crop")
assert views[0, :, 0, 0].argmax() == crop.argmax()

# %% [markdown]
# More than two logits, and still the same best label. Over all labels the difference is smaller: [Images of any
# size](site/any_size.md#padding) says how small, and how often the best label stays. A network without padding, like
# the one of the digits, has no such difference.
#
# ## Where to go from here
#
# - [4. What did it learn?](04_what_did_it_learn.ipynb): the parts of many photographs that a layer draws on.
# - [6. Which method when](06_which_method_when.ipynb): beside other methods, with measures.
# - On a photograph of your own: `captum-scoremap explain photo.jpg --view multi`.
