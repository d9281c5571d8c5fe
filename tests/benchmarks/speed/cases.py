"""What is measured, and what is to be reached."""

from __future__ import annotations

from dataclasses import dataclass

TITLES = {
    "input": "one map at the input",
    "layer": "one map at the last layer",
    "layers": "all layers' score maps",
    "labels": "all 1000 labels at the last layer",
    "ten labels": "10 labels at the input",
    "complete": "complete map",
    "audit": "audit of a folder",
    "images of an audit": "images of an audit",
    "import": "import",
}


@dataclass(frozen=True)
class Case:
    """A job, and who does it.

    Attributes:
        kind: What is computed; a key of ``TITLES``.
        model: Of what, as ``load_model`` takes it.
        batch: Of how many images.
        who: Competitors; the first is what the others are compared with.
    """

    kind: str
    model: str
    batch: int
    who: tuple[str, ...]

    @property
    def title(self) -> str:
        if not self.model:
            return TITLES[self.kind]
        unit = "image" if self.batch == 1 else "images"
        return f"{TITLES[self.kind]}, {self.model.rpartition(':')[2]}, {self.batch} {unit}"


@dataclass(frozen=True)
class Goal:
    """A ratio to be reached.

    Attributes:
        case: In which case.
        who: Whose cost.
        against: Divided by whose.
        bound: The ratio.
        memory: Whether it is of peak memory; else of time.
        at_least: Whether the ratio is to be as large as that, rather than as small.
        label: What the table says of it; by default the case's title.
    """

    case: Case
    who: str
    against: str
    bound: float
    memory: bool = False
    at_least: bool = False
    label: str = ""


EFFICIENTNET = "efficientnet_lite0"
OURS = ("ours", "prepared", "compiled", "replayed")
TRANSFORMERS = ("vit_b_16", "swin_t", "convnext_tiny")


def _zoo(kind: str, name: str, batch: int, *who: str) -> Case:
    return Case(kind, f"torchvision:{name}", batch, who)


INPUT_1 = {
    name: _zoo("input", name, 1, "plain", "inference", "captum", "zennit", "ours")
    for name in ("alexnet", "vgg16", "resnet50")
}
INPUT_8 = {
    "alexnet": _zoo("input", "alexnet", 8, "plain", "inference", "captum", "ours"),
    "vgg16": _zoo("input", "vgg16", 8, "plain", "inference", "captum", *OURS),
    "resnet50": _zoo("input", "resnet50", 8, "plain", "inference", "captum", "zennit", *OURS),
}
MOBILE = _zoo("input", "mobilenet_v2", 8, "plain", "inference", "captum", *OURS)
LAYERS = {
    "resnet50": _zoo("layers", "resnet50", 8, "plain", "inference", "captum", *OURS),
    "vgg16": _zoo("layers", "vgg16", 8, "plain", "inference", "captum", "ours"),
}
LABELS = {name: _zoo("labels", name, 1, "plain", "captum", "ours") for name in ("alexnet", "resnet50")}
TEN_LABELS = _zoo("ten labels", "resnet50", 1, "plain", "captum", "ours", "prepared")
FROZEN = [_zoo("input", name, 1, "plain", "inference", "captum", "ours") for name in TRANSFORMERS[1:]]
VIT = _zoo("input", "vit_b_16", 1, "plain", "inference", "captum", *OURS)
SMALL = {
    name: _zoo("input", name, 1, "plain", "inference", *OURS)
    for name in ("resnet18", "mobilenet_v3_small", "efficientnet_b0")
}
COMPLETE = Case("complete", EFFICIENTNET, 8, ("plain", "inference", *OURS))
LAYER = _zoo("layer", "resnet50", 8, "plain", "inference", "captum", "grad-cam", "ours", "prepared")
IMPORT = Case("import", "", 1, ("captum", "ours"))
AUDIT = Case("audit", EFFICIENTNET, 64, ("plain", "ours"))

AUDITED = Case("images of an audit", EFFICIENTNET, 64, ("plain", "prepared", "compiled"))

CASES = [
    *INPUT_1.values(),
    *INPUT_8.values(),
    MOBILE,
    *LAYERS.values(),
    *LABELS.values(),
    TEN_LABELS,
    VIT,
    *FROZEN,
    *SMALL.values(),
    COMPLETE,
    LAYER,
    IMPORT,
    AUDIT,
    AUDITED,
]
_INPUTS = [*INPUT_1.values(), *INPUT_8.values()]
GOALS = [
    *(Goal(case, "ours", "plain", 1.05) for case in _INPUTS),
    *(Goal(case, "ours", "plain", 0.6, memory=True) for case in _INPUTS),
    Goal(INPUT_8["resnet50"], "prepared", "plain", 0.68),
    Goal(MOBILE, "prepared", "plain", 0.52),
    Goal(INPUT_8["vgg16"], "prepared", "plain", 0.92),
    Goal(LAYERS["resnet50"], "prepared", "plain", 0.8),
    *(Goal(case, "ours", "plain", 1.15) for case in LAYERS.values()),
    *(Goal(case, "ours", "captum", 0.6) for case in LAYERS.values()),
    *(Goal(case, "ours", "captum", 0.3, memory=True) for case in LAYERS.values()),
    *(Goal(case, "ours", "captum", 1 / 400) for case in LABELS.values()),
    Goal(TEN_LABELS, "ours", "captum", 0.7),
    Goal(TEN_LABELS, "prepared", "captum", 0.45),
    *(Goal(case, "ours", "plain", 1.25) for case in (VIT, *FROZEN)),
    Goal(SMALL["mobilenet_v3_small"], "compiled", "plain", 0.5),
    Goal(SMALL["efficientnet_b0"], "compiled", "plain", 0.6),
    Goal(SMALL["resnet18"], "compiled", "plain", 0.9),
    Goal(MOBILE, "compiled", "plain", 0.6),
    Goal(INPUT_8["resnet50"], "compiled", "plain", 0.8),
    Goal(INPUT_8["vgg16"], "compiled", "plain", 0.88),
    Goal(VIT, "compiled", "plain", 0.95),
    Goal(LAYERS["resnet50"], "compiled", "plain", 0.85),
    Goal(LAYERS["resnet50"], "compiled", "plain", 1.0, memory=True),
    Goal(COMPLETE, "compiled", "plain", 1.0),
    Goal(IMPORT, "ours", "captum", 1.05),
    Goal(AUDITED, "plain", "compiled", 1.15, at_least=True, label="images per second of an audit, compiled"),
    Goal(AUDIT, "plain", "ours", 0.8, at_least=True, label="images per second of the audit"),
]
