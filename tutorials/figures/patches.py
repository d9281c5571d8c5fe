"""Draw ``patches.png``: the regions that the highest values of two layers come from (Fig. 4 of Yu et al. 2015).

``python tutorials/figures/patches.py`` writes it beside this file.
"""

from pathlib import Path

from captum_scoremap import semantic_patches
from captum_scoremap.models import SAMPLES, load_model
from captum_scoremap.visualization import visualize_patches

# Patches are as large as the receptive field where that is small, else windows of 96 pixels.
LAYERS = {"blocks.2": None, "blocks.4": 96}

loaded = load_model()
figure, _ = visualize_patches(
    {
        name: {
            title: semantic_patches(
                loaded.module,
                loaded.module.get_submodule(name),
                [f"sample:{sample}" for sample in SAMPLES],
                by=by,
                per_image=3,
                size=size,
                preprocess=loaded.preprocessing,
            )
            for title, by in (("SMSM: score map", "score_map"), ("GSM: gradient", "gradient"))
        }
        for name, size in LAYERS.items()
    },
    show_values=False,
)
figure.savefig(Path(__file__).with_name("patches.png"), dpi=90)
