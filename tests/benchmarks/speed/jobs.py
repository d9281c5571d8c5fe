"""What each competitor does in each kind of case: the same job, as its authors would write it."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from captum.attr import InputXGradient, LayerGradientXActivation
from torch import Tensor, nn

from captum_scoremap import CompleteScoreMap, LayerScoreMap, ScoreMap, compile_map, prepare
from captum_scoremap.audit import audit
from captum_scoremap.audit.explaining import layers_to_pool, map_layers
from captum_scoremap.audit.plan import Plan
from captum_scoremap.audit.worker import Worker
from captum_scoremap.compiled import Mode
from captum_scoremap.compiled.parts import Method
from captum_scoremap.cost import Job, forward_backward
from captum_scoremap.data.sources import open_source
from captum_scoremap.linear import main_layers
from captum_scoremap.models import LoadedModel, Preprocessing, load_model, read_image

LABEL = 281
TEN_LABELS = range(LABEL, LABEL + 10)
ALL_LABELS = 1000
CALLS = 5  # of the thousand that Captum needs for all labels; their time is scaled
AUDIT_BATCH = 16  # the default of the audit

TINY = "tests.benchmarks.speed.jobs:tiny"
# the layer of the cases that take one
LAST = {"torchvision:alexnet": "features.12", "torchvision:resnet50": "layer4", TINY: "pool2"}


def tiny() -> LoadedModel:
    """A network for warming up and for tests."""
    layers = OrderedDict(
        conv1=nn.Conv2d(3, 4, 3, padding=1),
        bn1=nn.BatchNorm2d(4),
        relu1=nn.ReLU(),
        pool1=nn.MaxPool2d(4),
        conv2=nn.Conv2d(4, 8, 3, padding=1),
        relu2=nn.ReLU(),
        pool2=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        fc=nn.Linear(8 * 4 * 4, ALL_LABELS),
    )
    return LoadedModel("", nn.Sequential(layers), Preprocessing(32, 32))


@dataclass(frozen=True)
class Subject:
    """The model and the images that all competitors of a case get.

    Attributes:
        name: Model, as ``load_model`` takes it.
        batch: Number of images.
        device: Where to compute.
        folder: For files.
        is_prepared: Whether the model is the copy that ``prepare`` makes.
    """

    name: str
    batch: int
    device: str
    folder: Path
    is_prepared: bool = False

    @cached_property
    def loaded(self) -> LoadedModel:
        return load_model(self.name, "none" if self.name.startswith("torchvision:") else "default", self.device)

    @cached_property
    def model(self) -> nn.Module:
        return prepare(self.loaded.module) if self.is_prepared else self.loaded.module

    @cached_property
    def inputs(self) -> Tensor:
        side = self.loaded.preprocessing.crop
        return torch.randn(self.batch, 3, side, side, generator=torch.Generator().manual_seed(0)).to(self.device)

    @property
    def layer(self) -> nn.Module:
        return self.model.get_submodule(LAST[self.name])

    @property
    def layers(self) -> list[nn.Module]:
        """Layers that do the work and give rows and columns; in a prepared model, those of the same names."""
        kinds = (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d)
        names = [name for name, module in self.loaded.module.named_modules() if isinstance(module, kinds)]
        return [self.model.get_submodule(name) for name in names]

    @cached_property
    def photographs(self) -> Path:
        """A folder with as many photographs as the batch has images, of the usual size."""
        folder = self.folder / f"photographs{self.batch}"
        if not folder.exists():
            folder.mkdir()
            samples = [read_image(f"sample:{name}").resize((520, 395)) for name in ("chelsea", "coffee", "rocket")]
            for number in range(self.batch):
                shift = number % 20
                image = samples[number % len(samples)].crop((shift, shift, shift + 500, shift + 375))
                image.save(folder / f"{number:04}.jpg", quality=90)
        return folder


def inference(subject: Subject) -> Job:
    def job() -> Tensor:
        with torch.no_grad():
            return subject.model(subject.inputs)

    return job


def plain(subject: Subject) -> Job:
    """A hand-written forward and backward pass with respect to the input; parameters as the model comes."""
    return partial(forward_backward, subject.model, subject.inputs, LABEL)


def input_x_gradient(model: nn.Module, inputs: Tensor, label: int) -> Tensor:
    return InputXGradient(model).attribute(inputs.clone().requires_grad_(), label)


# One map at the input


def captum_input(subject: Subject) -> Job:
    return lambda: input_x_gradient(subject.model, subject.inputs, LABEL)


def zennit_input(subject: Subject) -> Job:
    zennit = {name: importlib.import_module(f"zennit.{name}") for name in ("attribution", "composites", "torchvision")}
    # merges batch norms wherever they follow a convolution, and splits relevance at shortcuts where there are some
    composite = zennit["composites"].EpsilonPlusFlat(canonizers=[zennit["torchvision"].ResNetCanonizer()])
    one_hot = torch.eye(ALL_LABELS, device=subject.device)[[LABEL] * subject.batch]

    def job() -> Tensor:
        with zennit["attribution"].Gradient(subject.model, composite) as method:
            return method(subject.inputs, one_hot)[1]

    return job


# One map at a layer


def captum_layer(subject: Subject) -> Job:
    return lambda: LayerGradientXActivation(subject.model, subject.layer).attribute(subject.inputs, LABEL)


def grad_cam_layer(subject: Subject) -> Job:
    grad_cam = importlib.import_module("pytorch_grad_cam")
    target = importlib.import_module("pytorch_grad_cam.utils.model_targets").ClassifierOutputTarget(LABEL)

    def job() -> object:
        with grad_cam.HiResCAM(subject.model, [subject.layer]) as method:
            return method(subject.inputs, [target] * subject.batch)

    return job


def our_layer(subject: Subject) -> Job:
    return lambda: LayerScoreMap(subject.model, subject.layer).attribute(subject.inputs, LABEL)


# All layers


def captum_layers(subject: Subject) -> Job:
    return lambda: LayerGradientXActivation(subject.model, subject.layers).attribute(subject.inputs, LABEL)


# Complete maps, and compiled ones


METHODS: dict[str, Callable[[Subject], Method]] = {
    "input": lambda subject: ScoreMap(subject.model),
    "layers": lambda subject: LayerScoreMap(subject.model, subject.layers),
    "complete": lambda subject: CompleteScoreMap(subject.model),
}


def ours(kind: str) -> dict[str, Callable[[Subject], Job]]:
    """Our map as it is, compiled, and compiled and replayed."""

    def plainly(subject: Subject) -> Job:
        return lambda: METHODS[kind](subject).attribute(subject.inputs, LABEL)

    def compiled(mode: Mode, subject: Subject) -> Job:
        return partial(compile_map(METHODS[kind](subject), subject.inputs, LABEL, mode=mode), subject.inputs, LABEL)

    modes: dict[str, Mode] = {"compiled": "default", "replayed": "reduce-overhead"}
    return {"ours": plainly, **{who: partial(compiled, mode) for who, mode in modes.items()}}


# All labels, and some


def captum_labels(subject: Subject) -> Job:
    method = LayerGradientXActivation(subject.model, subject.layer)
    return lambda: [method.attribute(subject.inputs, label) for label in range(CALLS)]


def our_labels(subject: Subject) -> Job:
    return lambda: LayerScoreMap(subject.model, subject.layer).attribute_targets(subject.inputs)


def captum_ten(subject: Subject) -> Job:
    return lambda: [input_x_gradient(subject.model, subject.inputs, label) for label in TEN_LABELS]


def our_ten(subject: Subject) -> Job:
    method = LayerScoreMap(subject.model, subject.layers[0])
    return lambda: method.attribute_targets(subject.inputs, TEN_LABELS, attribute_to_layer_input=True)


# A folder of photographs; importing


def raw_throughput(subject: Subject) -> Job:
    """Forward and backward passes over as many images, which are there already."""
    batches = subject.inputs.split(AUDIT_BATCH)
    return lambda: [forward_backward(subject.model, batch, LABEL) for batch in batches]


def our_audit(subject: Subject) -> Job:
    out, photographs = subject.folder / "audit", subject.photographs

    def job() -> None:
        audit(photographs, subject.loaded, out=out, batch_size=AUDIT_BATCH, device=subject.device, progress=False)
        shutil.rmtree(out)

    return job


def _audited(subject: Subject, *, compiled: bool) -> Job:
    """What an audit does for each image, decoding included; what it does once is left out."""
    source, inputs = open_source(subject.photographs), subject.inputs[:1]
    layers = map_layers(subject.model, main_layers(subject.model, inputs)[-3:], inputs)
    worker = Worker(
        source,
        Plan(len(source), batch_size=AUDIT_BATCH),
        replace(subject.loaded, module=subject.model),
        layers,
        layers_to_pool(subject.model, inputs),
        device=torch.device(subject.device),
        compiled=compiled,
    )

    def job() -> object:
        return list(worker.results(worker.plan.shards))

    if compiled:
        job()  # which compiles
    return job


def importing(module: str) -> Callable[[Subject], Job]:
    command = [sys.executable, "-c", f"import {module}"]
    return lambda _: partial(subprocess.run, command, check=True)


PASSES = {"plain": plain, "inference": inference}
KINDS: dict[str, dict[str, Callable[[Subject], Job]]] = {
    "input": {**PASSES, "captum": captum_input, "zennit": zennit_input, **ours("input")},
    "complete": {**PASSES, **ours("complete")},
    "layer": {**PASSES, "captum": captum_layer, "grad-cam": grad_cam_layer, "ours": our_layer},
    "layers": {**PASSES, "captum": captum_layers, **ours("layers")},
    "labels": {**PASSES, "captum": captum_labels, "ours": our_labels},
    "ten labels": {**PASSES, "captum": captum_ten, "ours": our_ten},
    "audit": {"plain": raw_throughput, "ours": our_audit},
    "images of an audit": {
        "plain": raw_throughput,
        "ours": partial(_audited, compiled=False),
        "compiled": partial(_audited, compiled=True),
    },
    "import": {"captum": importing("captum"), "ours": importing("captum_scoremap")},
}
"""What is computed, by whom: the job of a competitor on a subject."""

SHARES = {("labels", "captum"): CALLS / ALL_LABELS}
"""Jobs that do a part of the work; their time is divided by it."""

NEEDS = {"zennit": "zennit", "grad-cam": "pytorch_grad_cam"}
"""Peers that may not be installed, and their modules."""


def build(kind: str, who: str, subject: Subject) -> Job:
    """The job of one competitor; ``prepared`` is ours on the prepared model, which the compiled ones are of, too."""
    return KINDS[kind]["ours" if who == "prepared" else who](_subject_of(who, subject))


def build_alone(kind: str, who: str, subject: Subject) -> Job:
    """The same in a process of its own: the model is there and has run, so that its libraries are loaded."""
    torch.manual_seed(0)
    own = _subject_of(who, subject)
    with torch.no_grad():
        own.model(own.inputs[:1])
    return build(kind, who, own)


def _subject_of(who: str, subject: Subject) -> Subject:
    """What a competitor works on; a subject that is prepared already keeps what it has loaded."""
    own = who in {"prepared", "compiled", "replayed"}
    return replace(subject, is_prepared=True) if own and not subject.is_prepared else subject


def warm_up(kind: str, who: str, subject: Subject) -> None:
    """Do the job once on a tiny network, so that what it imports is there; nothing of the subject is kept."""
    build(kind, who, replace(subject, name=TINY, batch=1))()
