# %% [markdown]
# # 8. Maps in production
#
# A score map is worth most where the decision is made: beside the model, in production, where there may be no PyTorch
# and no captum_scoremap. A map is a computation like any other, so it can be written down as a **graph** and shipped
# as one file with the model. In this tutorial we write such a file and run it in
# [onnxruntime](https://onnxruntime.ai).
#
# It needs the extra `onnx`, which `pip install ".[tutorials]"` brings along. No download is needed.

# %%
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from captum_scoremap import LayerScoreMap, compile_map
from captum_scoremap.models import load_model, prepare, read_image
from captum_scoremap.visualization import visualize_score_map

loaded = load_model()  # EfficientNet-Lite0
cat = loaded.preprocessing(read_image("sample:chelsea"))[None]
coffee = loaded.preprocessing(read_image("sample:coffee"))[None]
model = prepare(loaded.module, cat)  # the same scores with the batch norms folded: a smaller, faster graph

# %% [markdown]
# ## From a method to a graph
#
# `compile_map` runs the method once and notes every operation. What the map freezes at an image, such as the masks of
# ReLUs, are operations of the graph, too, so it holds at *any* image of this size; and the label is an argument. To be
# sure, the graph is compared with `method.attribute` at a random image before you get it.
#
# A model that takes other turns at other images (`if x.sum() > 0`) is no graph, and is refused with the line where it
# does so. `backend="graph"` runs PyTorch's operations one by one. Leave it out, and Inductor makes faster code of them,
# which takes minutes the first time.

# %%
method = LayerScoreMap(model, model.bn2)
compiled = compile_map(method, cat, target=285, backend="graph")

espresso = loaded.label_index("espresso")
there, here = compiled(coffee, espresso), method.attribute(coffee, espresso)
bool(torch.allclose(there, here))

# %% [markdown]
# The coffee was not there when the map was compiled. Neither was its label.
#
# ## Into a file
#
# `export` writes the graph as `.onnx`, or as `.pt2` for PyTorch without this package. The file takes any number of
# images, N, and returns the scores, the map and the other side of the sum: **B**, and the **residual** S - (A·Y + B),
# by which the receiver can check each single map. What was written is read again and compared before the file appears.

# %%
place = tempfile.TemporaryDirectory()
exported = compiled.export(Path(place.name) / "model_with_map.onnx")
for name, (shape, kind) in {**exported.takes, **exported.returns}.items():
    print(f"{name:10s} {shape!s:20s} {kind}")

# %% [markdown]
# ## Without PyTorch
#
# From here on everything is onnxruntime and NumPy.

# %%
session = onnxruntime.InferenceSession(exported.path, providers=["CPUExecutionProvider"])
feed = {"image": coffee.numpy(), "target": np.array([espresso])}
scores, score_map, bias, residual = session.run(None, feed)

best = int(scores[0].argmax())
print(f"{loaded.label_name(best)}: S = {scores[0, best]:.3f}")
print(f"A·Y + B = {score_map.sum():.3f} + {bias[0]:.3f} = {score_map.sum() + bias[0]:.3f}")
print(f"the residual is rounding: {abs(residual[0]) < 1e-5 * abs(scores[0, best])}")

# %%
picture = loaded.preprocessing.picture(coffee[0])
figure, _ = visualize_score_map(torch.from_numpy(score_map), picture, title="espresso, by onnxruntime")
figure

# %% [markdown]
# On the command line the same is `captum-scoremap export --layers bn2 --out model_with_map.onnx`. Complete maps and
# fused maps export as well (`--maps complete`), and so do several layers at once.

# %%
place.cleanup()
