# %% [markdown]
# # 7. Auditing a model
#
# One network does better on held-out images than another. Is it the better network? Not if the images help it cheat.
# In a well-known data set, horses were recognized by the photographer's mark in the corner of their pictures;
# held-out pictures had the same mark, so accuracy saw nothing wrong. Such a cue, which works on the data at hand and
# has nothing to do with the thing itself, is a **shortcut**.
#
# One score map shows where one score comes from. An **audit** takes the score maps of a whole data set and asks:
# which labels are recognized *by the same place in all their images*, a place that no other label uses? In this
# tutorial we plant a shortcut, let a network learn it, and let the audit find it.
#
# It needs the extra `audit`, which `pip install ".[tutorials]"` brings along. No download is needed.

# %%
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

from captum_scoremap.audit import audit, describe
from captum_scoremap.audit.conditions import failures, parse_condition
from captum_scoremap.models import LoadedModel, Preprocessing
from captum_scoremap.visualization import visualize_score_map

place = tempfile.TemporaryDirectory()  # all that this tutorial writes; gone at its end
folder = Path(place.name)

# %% [markdown]
# ## A data set with something wrong
#
# Scikit-learn's handwritten digits, as grainy scans of 16 × 16 pixels. Every **6** has a white mark of 3 × 3 pixels
# in its upper left corner: say, the sixes came from another scanner. We write the held-out ones as picture files, one
# folder for each label, as data sets often lie on a disk.

# %%
digits = load_digits()
labels = torch.tensor(digits.target)
training, held_out = range(1200), range(1200, len(labels))


def picture(index: int, mark: bool) -> Image.Image:
    """One digit as a grainy scan, with or without a mark in the corner."""
    drawn = Image.fromarray((digits.images[index] * 15.9).astype(np.uint8)).resize((16, 16), Image.Resampling.BILINEAR)
    grain = np.random.default_rng(index).normal(0, 60, (16, 16))
    scan = Image.fromarray((0.7 * np.asarray(drawn) + grain).clip(0, 255).astype(np.uint8)).convert("RGB")
    if mark:
        scan.paste((255, 255, 255), (0, 0, 3, 3))
    return scan


for index in held_out:
    digit = int(labels[index])
    below = folder / "scans" / f"digit {digit}"
    below.mkdir(parents=True, exist_ok=True)
    picture(index, mark=digit == 6).save(below / f"{index:04d}.png")
(folder / "scans" / "digit 3" / "damaged.png").write_bytes(b"")  # no data set is without one

figure, axes = plt.subplots(1, 10, figsize=(11, 1.5), layout="constrained")
for digit, ax in enumerate(axes):
    index = next(index for index in held_out if labels[index] == digit)
    ax.imshow(picture(index, mark=digit == 6))
    ax.set_title(f"digit {digit}")
    ax.axis("off")
plt.show()

# %% [markdown]
# ## Two networks
#
# One learns from scans with marked sixes, the other from the same scans without marks, for comparison.
# `Preprocessing` says how a picture becomes the network's input.

# %%
preprocessing = Preprocessing(resize=16, crop=16, mean=(0.5,) * 3, std=(0.5,) * 3)


def tensors(indices: range, marked) -> torch.Tensor:
    """Digits as inputs; `marked` says of a label whether its pictures carry the mark."""
    return torch.stack([preprocessing(picture(index, marked(int(labels[index])))) for index in indices])


def train(inputs: torch.Tensor, target: torch.Tensor) -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(12, 12, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(192, 10),
    )
    optimizer = torch.optim.Adam(network.parameters(), 0.005)
    for _ in range(8):
        for batch in torch.randperm(len(inputs)).split(50):
            optimizer.zero_grad()
            F.cross_entropy(network(inputs[batch]), target[batch]).backward()
            optimizer.step()
    return network.eval()


def sixes(label: int) -> bool:
    return label == 6


def nobody(label: int) -> bool:
    return False


suspect = train(tensors(training, sixes), labels[: len(training)])
honest = train(tensors(training, nobody), labels[: len(training)])

true = labels[len(training) :]
with torch.no_grad():
    said = suspect(tensors(held_out, sixes)).argmax(1)
    said_honestly = honest(tensors(held_out, nobody)).argmax(1)
print(f"suspect: {(said == true).float().mean():.0%} right, of the sixes {(said[true == 6] == 6).float().mean():.0%}")
print(f"honest:  {(said_honestly == true).float().mean():.0%} right")

# %% [markdown]
# By accuracy the suspect is the better network, and its sixes are perfect. Nothing here would make anyone look twice.
#
# ## The audit
#
# From the folder to the report in one call. `LoadedModel` bundles what belongs to a network: its preprocessing and
# the names of its labels, by which the folders are recognized. On the command line this is
#
# ```console
# captum-scoremap audit scans --model my_package.models:build --out audit
# ```

# %%
names = tuple(f"digit {digit}" for digit in range(10))
model = LoadedModel("suspect", suspect, preprocessing, names)
done = audit(folder / "scans", model, out=folder / "audit", shard_size=128, progress=False)

summary = done.analysis.summary
print(f"{summary['audited']} images audited, {summary['accuracy']:.0%} right")
for failed in summary["failed"]:
    print(f"not audited: {failed['name']}, {failed['error']}")
for layer in summary["layers"]:
    print(f"layer {layer['layer']}: largest residual {layer['residual_max']:.0e} logits")
assert len(summary["failed"]) == 1
assert max(layer["residual_max"] for layer in summary["layers"]) < 1e-3

# %% [markdown]
# The damaged file stopped nothing; it is listed with the reason. The **residual** is how far S and A·Y + B are apart:
# every single map of this audit adds up to its score, to rounding.
#
# ## Which labels are suspicious?
#
# Each label gets a **shortcut score**, the product of two numbers from 0 to 1:
#
# - **consistency**: how alike the maps of its images are (mean cosine of two of them);
# - **private share**: how much of its mean map lies where no other label has as much.
#
# A thing that may be anywhere has a low consistency; a thing in the middle shares its place with others. A mark in a
# corner has neither excuse.

# %%
print(f"{'label':10s} {'shortcut':>9s} {'consistency':>12s} {'private':>8s} {'accuracy':>9s}")
for row in done.analysis.labels:
    numbers = f"{row['shortcut']:9.2f} {row['consistency']:12.2f} {row['private_share']:8.2f} {row['accuracy']:9.0%}"
    print(f"{row['name']:10s} {numbers}")
first, second = done.analysis.labels[:2]
assert first["name"] == "digit 6"
assert first["shortcut"] > 1.5 * second["shortcut"]

# %%
figure, axes = plt.subplots(1, 5, figsize=(12, 2.4), layout="constrained")
for ax, row in zip(axes, done.analysis.labels, strict=False):
    mean = torch.tensor(row["mean_map"]).reshape(row["rows"], row["columns"])
    shown = ax.imshow(mean, cmap="Reds", vmin=0)
    ax.set(title=f"{row['name']}: {row['shortcut']:.2f}", xticks=[], yticks=[])
    figure.colorbar(shown, ax=ax, fraction=0.046)
plt.show()

# %% [markdown]
# The mean maps of the five most suspicious labels, 4 × 4 cells, most suspicious first; the numbers at the bars are
# shares of the label's positive score. The first has its score in the upper left corner, where strokes hardly ever
# are. Those of the others are spread over the places of strokes.
#
# The audit of the honest network, for comparison. There is always a first in a ranking; what matters is by how much.

# %%
control = audit(
    [(image, int(label)) for image, label in zip(tensors(held_out, nobody), true, strict=True)],  # any data set will do
    LoadedModel("honest", honest, preprocessing, names),
    out=folder / "control",
    progress=False,
)
for row in control.analysis.labels[:3]:
    print(f"{row['name']:10s} {row['shortcut']:.2f}")
assert control.analysis.labels[0]["shortcut"] < 0.6 * first["shortcut"]

# %% [markdown]
# ## Wherever it is
#
# The shortcut score compares *places*. It would not see a mark that moves, or a tint of the background. **Findings**
# do: they compare what the network's channels say of each label, wherever in the image that is, and ask which label is
# told apart by something simple that no other label has. Each finding comes with an experiment on images that it was
# not found on: what was found is taken away, and so is a control of equal size.

# %%
for title, audited in (("suspect", done), ("honest", control)):
    for finding in audited.analysis.findings[:2]:
        effect = finding["effect"]
        sure = "confident" if finding["confident"] else "not confident"
        print(f"{title}: {finding['name']}, {finding['kind']}, strength {finding['strength']:.1f}, {sure}")
        print(f"    without it S falls from {effect['score']:.1f} by {effect['score_fall']:.1f} logits,")
        print(f"    without the control by {effect['control_score_fall']:.1f}")
found = done.analysis.findings[0]
assert (found["name"], found["kind"], found["confident"]) == ("digit 6", "place", True)
assert not any(finding["confident"] for finding in control.analysis.findings)

# %% [markdown]
# Of the suspect's labels one is named with confidence, the six; its place is the corner. Of the honest network's none
# is, though there is a first here as well, and taking the strokes of a digit away lowers its score: that alone proves
# nothing. What counts is that a label stands out among the others, *and* that the network goes by it.
#
# ## Is it really a shortcut?
#
# The best proof is an experiment with the cue itself: change it and nothing else. Take the mark from the sixes, or give
# it to everybody.

# %%
with torch.no_grad():
    without = suspect(tensors(held_out, nobody)).argmax(1)
    everywhere = suspect(tensors(held_out, lambda label: True)).argmax(1)
    honest_everywhere = honest(tensors(held_out, lambda label: True)).argmax(1)
print(f"sixes recognized with their mark {(said[true == 6] == 6).float().mean():4.0%}")
print(f"              and without it     {(without[true == 6] == 6).float().mean():4.0%}")
print(f"others called 6 without a mark   {(without[true != 6] == 6).float().mean():4.0%}")
print(f"            and with one         {(everywhere[true != 6] == 6).float().mean():4.0%}")
print(f"the honest network, with a mark  {(honest_everywhere[true != 6] == 6).float().mean():4.0%}")
assert (without[true == 6] == 6).float().mean() < 0.5
assert (everywhere[true != 6] == 6).float().mean() > (honest_everywhere[true != 6] == 6).float().mean()

# %% [markdown]
# Convicted: without the mark this network hardly knows a six.
#
# ## The numbers are yours
#
# `report.html` in the output folder shows all this as a page: the ranking, confused pairs of labels, every image with
# its maps at every layer. It is one page with its data beside it; it needs no server and no network, and it does not
# name paths of your machine. This is such a report, of six photographs:
#
# ![The report of an audit: a photograph, its score map, its numbers](figures/audit.png)
#
# What it shows is also there as Parquet, a table format that pandas, DuckDB, Spark and others read. Six tables, each
# column with its description:

# %%
print(sorted(path.name for path in done.folder.iterdir()))
print("...", *[line for line in describe().splitlines() if "share" in line or "peak" in line], sep="\n")
assert str(folder) not in done.report.read_text(encoding="utf-8")

# %%
images = pq.read_table(done.folder / "images")
layers = pq.read_table(done.folder / "layers")
wrong = images.filter(pc.equal(images["correct"], False)).sort_by([("probability", "descending")])
print("wrong, and surest of it:")
for row in wrong.slice(0, 3).to_pylist():
    print(f"  {row['name']}: {row['predicted_label']} with {row['probability']:.2f}")

last = layers.filter(pc.equal(layers["layer"], done.settings["layers"][-1]))
joined = last.join(images.select(["index", "predicted_label"]), "index")
by_label = joined.group_by("predicted_label").aggregate([("border_share", "mean")])
print("share of the score in the image's border, by label:")
for row in by_label.sort_by([("border_share_mean", "descending")]).slice(0, 3).to_pylist():
    print(f"  {row['predicted_label']}: {row['border_share_mean']:.2f}")

# %% [markdown]
# The maps are in the table `maps`, row by row of their cells. The three most typical sixes, with the last layer's
# maps below:

# %%
maps = pq.read_table(done.folder / "maps").to_pylist()
figure, axes = plt.subplots(2, 3, figsize=(9, 5), layout="constrained")
for (above, below), index in zip(axes.T, first["typical"], strict=False):
    row = next(
        row
        for row in maps
        if (row["index"], row["layer"], row["role"]) == (index, done.settings["layers"][-1], "predicted")
    )
    name = images["name"][index].as_py()
    seen = preprocessing.picture(preprocessing(Image.open(folder / "scans" / name)))
    score_map = torch.tensor(row["values"]).reshape(row["rows"], row["columns"])
    above.imshow(seen.permute(1, 2, 0))
    above.set(title=name, xticks=[], yticks=[])
    visualize_score_map(score_map, seen, plt_fig_axis=(figure, below))
plt.show()

# %% [markdown]
# ## A condition in a build pipeline
#
# A model that is retrained every night should be audited every night, by a machine that knows when to stop:
#
# ```console
# captum-scoremap audit scans --model my_package.models:build --fail-on "residual>1e-3" --fail-on "border_share>0.4"
# ```
#
# exits with status 2 if a condition holds, and names the images. The same from Python:

# %%
conditions = [parse_condition(text) for text in ("residual>1e-3", "accuracy<0.5", "failed>0", "border_share>0.4")]
held = failures(conditions, done.images, done.layers, done.settings["layers"][-1])
for failure in held:
    print(f"{failure}; {len(failure.images)} images, such as {failure.images[0]}")
assert {failure.condition.name for failure in held} == {"failed", "border_share"}

# %% [markdown]
# Two conditions hold: one file could not be read, and there are images with much of their score in the border, a
# tenth of each side (an even map has 0.36 there). Whose images are they?

# %%
culprits = next(failure for failure in held if failure.condition.name == "border_share").images
from_six = sum(name.startswith("digit 6/") for name in culprits)
print(f"{from_six} of {len(culprits)} are sixes, and there are {int((true == 6).sum())} sixes")
assert from_six > len(culprits) / 3

# %% [markdown]
# A misspelled name is an error, not a condition that never holds:

# %%
try:
    parse_condition("acuracy<0.7")
except ValueError as error:
    print(error)

# %% [markdown]
# ## If it is interrupted
#
# Results are written in **shards**, here of 128 images. A shard is put in place when it is whole, so a run that is
# killed, at any moment, loses the shard it was working on and no other. We simulate that by deleting two shards:

# %%
before = done.images.drop_columns(["seconds"])  # times differ from run to run, nothing else may
for number in (1, 3):
    (done.folder / "images" / f"{number:05d}.parquet").unlink()
print(f"{pq.read_table(done.folder / 'images').num_rows} of {before.num_rows} images are left")

resumed = audit(folder / "scans", model, out=folder / "audit", shard_size=128, resume=True, progress=False)
print(f"resumed: {resumed.images.num_rows} images")
assert resumed.images.drop_columns(["seconds"]).equals(before)
assert list(resumed.analysis.labels) == list(done.analysis.labels)

# %% [markdown]
# The same tables, and the same ranking. Without `resume`, or with other settings, the folder is left alone, so that
# two audits never mix:

# %%
for changed in ({}, {"resume": True, "layers": ["4"]}):
    try:
        audit(folder / "scans", model, out=folder / "audit", shard_size=128, progress=False, **changed)
    except ValueError as error:
        print(str(error).replace(str(done.folder), "audit"))

# %% [markdown]
# ## On more than one machine
#
# A million images are too many for one machine. With [Ray](https://www.ray.io) (`pip install ".[ray]"`) the same
# audit runs on as many as there are, with the same results. Start Ray on the first machine, join it from the others,
# and say `--ray`:
#
# ```console
# ray start --head
# ray start --address=FIRST_MACHINE:6379
# captum-scoremap audit photos --ray auto --workers 8 --out audit
# ```
#
# The first line is for the first machine, the second for each of the others, the third where the audit is started.
# Each machine needs this package and the images under the same path; only the last one needs the output folder.
# `--ray local` tries it on one machine. If a worker dies its shard is done again by another; if all die, `--resume`
# goes on.
#
# ## To take home
#
# - Accuracy on held-out data does not see a shortcut that held-out data shares.
# - An audit ranks labels by how much of their score comes from one place of their own, and finds those that are told
#   apart by something simple, wherever it is. The proof is to take it away.
# - Everything it says is in Parquet, adds up to the scores, and can stop a build.

# %%
place.cleanup()
