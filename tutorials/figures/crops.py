"""Draw ``crops.png``: the regions of photographs that a score map points at (Fig. 3 of Yu et al. 2015).

``python tutorials/figures/crops.py`` writes it beside this file.
"""

from pathlib import Path

import torch
from matplotlib.figure import Figure

from captum_scoremap import LayerScoreMap, score_map_crops
from captum_scoremap.models import load_model, read_image
from captum_scoremap.visualization import visualize_crops

PHOTOGRAPHS = {"sample:coffee": "espresso", "sample:chelsea": "Egyptian cat", "sample:flower": "daisy"}

loaded = load_model()
preprocessing = loaded.preprocessing
figure = Figure(figsize=(11, 2.4 * len(PHOTOGRAPHS)), layout="constrained")
rows = figure.subfigures(len(PHOTOGRAPHS), squeeze=False)[:, 0]
for row, (name, label) in zip(rows, PHOTOGRAPHS.items(), strict=True):
    image = preprocessing(read_image(name))
    target = loaded.label_index(label)
    score_map = LayerScoreMap(loaded.module, loaded.module.bn2).attribute(image[None], target)
    size = tuple(image.shape[1:])
    boxes = torch.cat([
        score_map_crops(score_map, size, 2, size=96, max_overlap=0.1)[0],
        score_map_crops(score_map, size)[0],
    ])
    captions = ["1: best window", "2: the next", "3: best box"]
    visualize_crops(
        preprocessing.picture(image),
        score_map,
        boxes,
        captions=captions,
        title=label,
        plt_fig_axis=(row, row.subplots(1, 2 + len(boxes))),
    )
figure.savefig(Path(__file__).with_name("crops.png"), dpi=90)
