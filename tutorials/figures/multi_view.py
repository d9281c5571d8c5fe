"""Draw ``multi_view.png``: score maps of one view, and of all views of a photograph.

``python tutorials/figures/multi_view.py`` writes it beside this file.
"""

from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from captum_scoremap import LayerScoreMap, MultiView
from captum_scoremap.models import load_model, read_image
from captum_scoremap.visualization import visualize_score_map

PHOTOGRAPHS = {"sample:coffee": "espresso", "sample:china": "palace"}

loaded = load_model()
network = MultiView.from_classifier(loaded.module)
preprocessing = loaded.preprocessing
figure = Figure(figsize=(11, 5.6), layout="constrained")
for axes, (name, label) in zip(figure.subplots(2, 3, width_ratios=[3, 2, 3]), PHOTOGRAPHS.items(), strict=True):
    target = loaded.label_index(label)
    whole, crop = (prepare(read_image(name)) for prepare in (preprocessing.whole, preprocessing))
    height, width = whole.shape[1:]

    axes[0].imshow(preprocessing.picture(whole).permute(1, 2, 0))
    corner = ((width - crop.shape[2]) / 2, (height - crop.shape[1]) / 2)
    axes[0].add_patch(Rectangle(corner, crop.shape[2], crop.shape[1], fill=False, color="white", linewidth=2))
    axes[0].set_title(f"{label}: {width} x {height} pixels, one view in white", fontsize=10)
    axes[0].set_axis_off()

    for ax, model, layer, image, title in (
        (axes[1], loaded.module, loaded.module.bn2, crop, "one view"),
        (axes[2], network, network.features.bn2, whole, "mean of {} views"),
    ):
        with torch.no_grad():
            score = model(image[None])[0, target]
        score_map = LayerScoreMap(model, layer).attribute(image[None], target)
        views = len(network.view_boxes(*image.shape[1:]))
        visualize_score_map(score_map, preprocessing.picture(image), plt_fig_axis=(figure, ax))
        ax.set_title(f"{title.format(views)}, S = {score:.2f}", fontsize=10)
figure.savefig(Path(__file__).with_name("multi_view.png"), dpi=110)
