# %% [markdown]
# # 9. Any score
#
# Most tutorials on attribution explain a classifier's logit. But a network may draw regions, find boxes, watch a
# video, compare an image with a sentence, count, or read a sequence. For all of them the sum
#
# > **S = A·Y + B**
#
# holds as it does for a label, because **S may be any number that the network computes**. All you say is which:
# `target` takes, beside a label, a *function* from the model's output to one number for each image. Nothing needs to
# be wrapped.
#
# We train six small networks, half a minute at most each, on pictures that we draw ourselves. So we know what they
# should look at, and can tell whether the maps say so.

# %%
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits
from torch import nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator

from captum_scoremap import CompleteScoreMap, ScoreMap, linear_form
from captum_scoremap.scores import detection, region_mean, similarity
from captum_scoremap.visualization import MapStyle, visualize_score_map

SIDE, CELL = 48, 24
SHAPES, COLORS = ("circle", "square", "triangle"), ("red", "green", "blue")
PALETTE = torch.tensor([[0.95, 0.35, 0.3], [0.35, 0.85, 0.35], [0.4, 0.5, 1.0]])
generator = torch.Generator().manual_seed(0)
torch.manual_seed(0)


def draw(kind, x, y, radius):
    """Masks (N, SIDE, SIDE) of one shape each; all arguments are (N,)."""
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    dx, dy = (columns - x[:, None, None]) / radius[:, None, None], (rows - y[:, None, None]) / radius[:, None, None]
    circle = dx**2 + dy**2 <= 1
    square = torch.maximum(dx.abs(), dy.abs()) <= 0.85
    triangle = (dy <= 0.8) & (dy >= 2 * dx.abs() - 1)
    return torch.stack([circle, square, triangle])[kind, torch.arange(len(kind))]


def pictures(count, at_most=4):
    """Images on a noisy background with up to four shapes, one in each quarter, and what is where."""
    images = 0.05 + 0.02 * torch.randn(count, 3, SIDE, SIDE, generator=generator)
    kinds = torch.randint(3, (count, 4), generator=generator)
    colors = torch.randint(3, (count, 4), generator=generator)
    order = torch.rand(count, 4, generator=generator).argsort(1)
    present = order < torch.randint(1, at_most + 1, (count, 1), generator=generator)
    radius = 5 + 4 * torch.rand(count, 4, generator=generator)
    slack = CELL / 2 - radius - 1
    moves = (2 * torch.rand(2, count, 4, generator=generator) - 1) * slack
    corner = torch.tensor([[0, 0], [CELL, 0], [0, CELL], [CELL, CELL]]).T[:, None]  # x and y
    x, y = corner + CELL / 2 + moves
    labels = torch.zeros(count, SIDE, SIDE, dtype=torch.long)
    for quarter in range(4):
        here = draw(kinds[:, quarter], x[:, quarter], y[:, quarter], radius[:, quarter])
        here = here & present[:, quarter, None, None]
        images = torch.where(here[:, None], PALETTE[colors[:, quarter]][:, :, None, None], images)
        labels = torch.where(here, kinds[:, quarter, None, None] + 1, labels)
    boxes = torch.stack([x - radius, y - radius, x + radius, y + radius], 2)
    return images, {"kinds": kinds, "colors": colors, "present": present, "boxes": boxes, "labels": labels}


def block(before, after, stride=1):
    conv = nn.Conv2d(before, after, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(after), nn.ReLU())


def trained(model, loss_of, steps, rate=3e-3):
    """The model after some steps of Adam, in evaluation mode."""
    optimizer = torch.optim.Adam(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    for _ in range(steps):
        loss = loss_of(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def backbone():
    return nn.Sequential(block(3, 16, 2), block(16, 32), block(32, 64, 2), block(64, 64))


def show(pairs, titles, unit="logits per cell"):
    """Images beside each other, each under its map."""
    figure, axes = plt.subplots(1, len(pairs), figsize=(3.2 * len(pairs), 3.2), layout="constrained", squeeze=False)
    for ax, (score_map, image), title in zip(axes[0], pairs, titles, strict=True):
        visualize_score_map(score_map, image, title=title, style=MapStyle(unit=unit), plt_fig_axis=(figure, ax))
    plt.show()


photos, truth = pictures(6)
figure, axes = plt.subplots(1, 6, figsize=(12, 2.2), layout="constrained")
for ax, photo in zip(axes, photos, strict=True):
    ax.imshow(photo.permute(1, 2, 0).clamp(0, 1))
    ax.axis("off")
plt.show()

# %% [markdown]
# ## A region: segmentation
#
# A network that labels every pixel has SIDE x SIDE scores for each label. A question about one *thing* is a question
# about a region: the mean of its logits, `region_mean(mask, label)`.

# %%
LABELS = 1 + len(SHAPES)  # with the background


class Segmenter(nn.Module):
    def __init__(self):
        super().__init__()
        self.features, self.head = backbone(), nn.Conv2d(64, LABELS, 1)

    def forward(self, x):
        return F.interpolate(self.head(self.features(x)), size=x.shape[2:], mode="bilinear", align_corners=False)


def segmentation_loss(model):
    images, truth = pictures(16)
    return F.cross_entropy(model(images), truth["labels"])


segmenter = trained(Segmenter(), segmentation_loss, 250)
images, truth = pictures(64)
with torch.no_grad():
    print(f"pixels labeled right: {(segmenter(images).argmax(1) == truth['labels']).float().mean():.0%}")

# %%
busy = int(truth["present"].sum(1).argmax())
image = images[busy : busy + 1]
quarters = [0, 3]
pairs, titles = [], []
for quarter in quarters:
    label = int(truth["kinds"][busy, quarter]) + 1
    x0, y0, x1, y1 = truth["boxes"][busy, quarter].long()
    region = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    region[y0:y1, x0:x1] = truth["labels"][busy, y0:y1, x0:x1] == label
    target = region_mean(region, label)
    complete, placeless = CompleteScoreMap(segmenter).attribute(image, target, return_placeless=True)
    score = target(segmenter(image)).item()
    assert abs(complete.sum() + placeless - score) < 1e-3
    pairs.append((complete, image[0]))
    titles.append(f"the {SHAPES[label - 1]}'s region\nmean logit {score:.1f}")
show(pairs, titles)

# %% [markdown]
# The evidence of a region lies in and around the region, and nowhere else: the network has a small receptive field,
# and the map is exact, so it cannot show anything beyond it.
#
# ## One box of a detector
#
# A detector's output is a list of boxes. `detection(label, box)` is the logit of the one that overlaps your box most.
# Which boxes survive, and where they lie, is frozen, like a max-pooling's switches; their class score is explained.
# Here that is torchvision's FCOS, on our small features.

# %%
anchors = AnchorGenerator(((16,),), ((1.0,),))


class Features(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.out_channels = backbone(), 64

    def forward(self, x):
        return {"0": self.body(x)}


def detection_loss(model):
    images, truth = pictures(8)
    targets = [
        {"boxes": truth["boxes"][one][here], "labels": truth["kinds"][one][here] + 1}
        for one, here in enumerate(truth["present"])
    ]
    return sum(model(list(images), targets).values())


detector = FCOS(
    Features(),
    LABELS,
    min_size=SIDE,
    max_size=SIDE,
    image_mean=[0.2, 0.2, 0.2],
    image_std=[0.25, 0.25, 0.25],
    anchor_generator=anchors,
    score_thresh=0.2,
    size_divisible=8,  # else it pads to a multiple of 32, and maps of layers are of the padded image
)
detector = trained(detector, detection_loss, 200, rate=2e-3)

# %%
images, truth = pictures(200)
pair = ((truth["kinds"] == 0) & truth["present"]).sum(1) == 2  # two circles
image, boxes = images[pair][:1], truth["boxes"][pair][0]
circles = [
    quarter for quarter in range(4) if truth["kinds"][pair][0, quarter] == 0 and truth["present"][pair][0, quarter]
]

pairs, titles = [], []
for quarter in circles:
    target = detection(1, boxes[quarter].tolist())
    complete = CompleteScoreMap(detector).attribute(image, target)
    pairs.append((complete, image[0]))
    titles.append(f"this circle's box\nlogit {target(detector(list(image))).item():.2f}")
show(pairs, titles)

# %% [markdown]
# Both boxes say "circle", and each has a map of its own.
#
# ## A moment: video
#
# Nothing changes with a third dimension. The clips show a shape that moves; the score is the logit of the direction.
# The input is (N, C, T, H, W), and a layer's map (N, 1, t, h, w).

# %%
DIRECTIONS = ("left", "right", "up", "down")
STEPS = torch.tensor([[-1, 0], [1, 0], [0, -1], [0, 1]])


def clips(count, frames=8):
    """A shape that stands still, and moves in one direction for three frames."""
    direction = torch.randint(4, (count,), generator=generator)
    start = torch.randint(1, frames - 4, (count,), generator=generator)
    kind = torch.randint(3, (count,), generator=generator)
    middle = SIDE / 2 + 5 * (2 * torch.rand(2, count, generator=generator) - 1)
    video = 0.05 + 0.02 * torch.randn(count, 3, frames, SIDE, SIDE, generator=generator)
    for frame in range(frames):
        gone = 4 * (frame - start).clamp(0, 3)[:, None] * STEPS[direction]
        here = draw(kind, middle[0] + gone[:, 0], middle[1] + gone[:, 1], torch.full((count,), 8.0))
        video[:, :, frame] = torch.where(here[:, None], PALETTE[kind][:, :, None, None], video[:, :, frame])
    return video[..., ::2, ::2], direction, start


class Watcher(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv3d(3, 12, (1, 3, 3), padding=(0, 1, 1)),
            nn.BatchNorm3d(12),
            nn.ReLU(),
            nn.Conv3d(12, 24, (2, 5, 5), (1, 2, 2), (0, 2, 2)),
            nn.BatchNorm3d(24),
            nn.ReLU(),
            nn.AdaptiveAvgPool3d(1),
        )
        self.head = nn.Linear(24, 4)

    def forward(self, x):
        return self.head(self.features(x).flatten(1))


def video_loss(model):
    video, direction, _ = clips(16)
    return F.cross_entropy(model(video), direction)


watcher = trained(Watcher(), video_loss, 150, rate=1e-2)
video, direction, start = clips(64)
with torch.no_grad():
    print(f"directions right: {(watcher(video).argmax(1) == direction).float().mean():.0%}")

# %%
clip, label, first = video[:1], int(direction[0]), int(start[0])
opposite = label ^ 1
form = linear_form(watcher, clip, lambda logits: logits[:, label] - logits[:, opposite], watcher.features[5])
score_map = form.score_map()  # (1, 1, 7, 12, 12): a map for each pair of frames
figure, axes = plt.subplots(1, 7, figsize=(13, 2.3), layout="constrained")
for frame, ax in enumerate(axes):
    moves = ", it moves" if first <= frame < first + 3 else ""
    title = f"{frame + 1} to {frame + 2}{moves}\n{score_map[:, :, frame].sum():+.2f}"
    here = {"limit": float(score_map.abs().max()), "style": MapStyle(show_colorbar=False), "plt_fig_axis": (figure, ax)}
    visualize_score_map(score_map[:, :, frame], clip[0, :, frame], title=title, **here)
plt.show()
print(
    f"why {DIRECTIONS[label]} and not {DIRECTIONS[opposite]}: S = {form.score.item():.2f}, B = {form.bias.item():.2f}"
)

# %% [markdown]
# The score here is a *difference* of two logits, written as a function. The frames in which the shape moves hold it;
# what the clip shows while it rests counts for little.
#
# ## A sentence: similarity, as in CLIP
#
# CLIP compares the embedding of an image with that of a text. We train a pair of encoders as small as can be: the
# "text" is a color and a shape. The score is the cosine similarity with the embedding of a text,
# `similarity(embedding)`.

# %%
WIDTH = 24  # of embeddings


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.features, self.project = backbone(), nn.Linear(64, WIDTH)

    def forward(self, x):
        return self.project(self.features(x).amax((2, 3)))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.words = Encoder(), nn.Embedding(9, WIDTH)

    def texts(self):
        return F.normalize(self.words.weight, dim=1)


def contrast_loss(model):
    images, truth = pictures(24, at_most=1)
    which = truth["present"].float().argmax(1)
    rows = torch.arange(len(images))
    text = truth["colors"][rows, which] * 3 + truth["kinds"][rows, which]
    return F.cross_entropy(8 * F.normalize(model.image(images), dim=1) @ model.texts().T, text)


clip_like = trained(Pair(), contrast_loss, 250)

# %%
images, truth = pictures(300, at_most=2)
two = (truth["present"].sum(1) == 2).nonzero().flatten()
differ = [
    one
    for one in two.tolist()
    if len(set(truth["kinds"][one][truth["present"][one]].tolist())) == 2
    and len(set(truth["colors"][one][truth["present"][one]].tolist())) == 2
]
one = differ[0]
image = images[one : one + 1]
pairs, titles = [], []
for quarter in truth["present"][one].nonzero().flatten().tolist():
    color, kind = int(truth["colors"][one, quarter]), int(truth["kinds"][one, quarter])
    target = similarity(clip_like.texts()[color * 3 + kind].detach())
    complete = CompleteScoreMap(clip_like.image).attribute(image, target)
    pairs.append((complete, image[0]))
    titles.append(f'"{COLORS[color]} {SHAPES[kind]}"\nsimilarity {target(clip_like.image(image)).item():.2f}')
show(pairs, titles, unit="similarity per cell")

# %% [markdown]
# One image, two sentences: each finds its own shape, and the other one speaks against it. It never saw two shapes at
# once in training.
#
# ## A quantity: regression
#
# A model with a single output needs no `target` at all; its map is in the *unit of the output*. This one counts
# circles. If it really counts, each circle should add one.

# %%
CIRCLE = SHAPES.index("circle")


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.features, self.head = nn.Sequential(backbone(), block(64, 64)), nn.Conv2d(64, 1, 1)

    def forward(self, x):
        return self.head(self.features(x)).relu().sum((2, 3))  # a density: where it is zero, nothing is counted


def counting_loss(model):
    images, truth = pictures(24)
    circles = ((truth["kinds"] == CIRCLE) & truth["present"]).sum(1, keepdim=True).float()
    return F.mse_loss(model(images), circles)


counter = Counter()
counter.features[0].load_state_dict(segmenter.features.state_dict())  # it knows shapes already
counter = trained(counter, counting_loss, 400, rate=3e-3)
images, truth = pictures(200)
circles = ((truth["kinds"] == CIRCLE) & truth["present"]).sum(1)
with torch.no_grad():
    print(f"mean error: {(counter(images)[:, 0] - circles).abs().mean():.2f} circles")

# %%
chosen = [int((circles == count).nonzero()[0]) for count in (1, 2, 3)]
pairs, titles = [], []
for one in chosen:
    image = images[one : one + 1]
    complete, placeless = CompleteScoreMap(counter, counter.features).attribute(image, return_placeless=True)
    quarters = F.avg_pool2d(complete, 6, divisor_override=1)[0, 0].flatten()
    for quarter, amount in enumerate(quarters.tolist()):
        here = bool(truth["present"][one, quarter])
        what = SHAPES[int(truth["kinds"][one, quarter])] if here else "nothing"
        print(f"{what:9s} {amount:+.2f}", end="   ")
    print(f"S = {counter(image).item():.2f}")
    pairs.append((complete, image[0]))
    titles.append(f"{counter(image).item():.2f} circles")
show(pairs, titles, unit="circles per cell")

# %% [markdown]
# Each line adds up to S, but for the placeless rest. This is more than a picture: the network's count, split into
# amounts that you can check one by one. Which part of a circle it looks at is its own choice; one edge is enough to
# tell it.
#
# ## A sequence: an LSTM
#
# Layers with a memory have rules as well: the gates of an LSTM are sigmoids, so they are frozen, and what passes them
# is explained. This one reads handwritten digits row by row, from top to bottom.

# %%
digits = load_digits()
rows = torch.tensor(digits.images / 16, dtype=torch.float32)
labels = torch.tensor(digits.target)


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.memory, self.head = nn.LSTM(8, 48, batch_first=True), nn.Linear(48, 10)

    def forward(self, x):
        states, _ = self.memory(x)
        return self.head(states[:, -1])


def reading_loss(model):
    batch = torch.randint(1500, (128,), generator=generator)
    return F.cross_entropy(model(rows[batch]), labels[batch])


reader = trained(Reader(), reading_loss, 500, rate=1e-2)
with torch.no_grad():
    print(f"digits right: {(reader(rows[1500:]).argmax(1) == labels[1500:]).float().mean():.0%}")

# %%
chosen = [1500 + int((labels[1500:] == digit).nonzero()[0]) for digit in (0, 3, 4, 7)]
maps, delta = ScoreMap(reader).attribute(rows[chosen], labels[chosen], return_convergence_delta=True)
assert delta.abs().max() < 1e-3
pairs = [(one[None, None], row.expand(3, 8, 8)) for one, row in zip(maps, rows[chosen], strict=True)]
show(pairs, [f"digit {digit}" for digit in labels[chosen].tolist()])

# %% [markdown]
# ## In short
#
# | question | `target` |
# | --- | --- |
# | why this label? | an index |
# | why this label and not that? | `lambda logits: logits[:, a] - logits[:, b]` |
# | why is this region labeled so? | `scores.region_mean(mask, label)` |
# | why does this box say so? | `scores.detection(label, box)` |
# | why is it like that image, or that text? | `scores.similarity(embedding)` |
# | why this amount? | none |
# | anything else | a function from the output to (N,) |
#
# The same functions go to the command line, `captum-scoremap explain --score module:function`. Networks of Hugging
# Face's are taken as they are; [recipes](site/recipes.md) for them and for detectors are in the how-to.
