"""The audit itself: plan the work, do what is not yet done, put each shard in place, sum up."""

import hashlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import captum_scoremap
from captum_scoremap.audit.analysis import Analysis, analyze
from captum_scoremap.audit.cluster import on_ray
from captum_scoremap.audit.compare import SETTINGS as _SETTINGS
from captum_scoremap.audit.compare import check_comparable, compare
from captum_scoremap.audit.compiling import ENOUGH
from captum_scoremap.audit.explaining import MAPS, MapLayer, layers_to_pool, map_layers
from captum_scoremap.audit.findings import find
from captum_scoremap.audit.fingerprint import code_fingerprint, fingerprint, weights_fingerprint
from captum_scoremap.audit.plan import Plan
from captum_scoremap.audit.preparing import Prepared, compare_prepared
from captum_scoremap.audit.progress import Progress
from captum_scoremap.audit.report import SINGLE_FILE_LIMIT, write_report
from captum_scoremap.audit.shards import Shards, write_json
from captum_scoremap.audit.worker import METRICS, Worker
from captum_scoremap.checks import nearest
from captum_scoremap.copies import copied
from captum_scoremap.data.sources import FileSource, Source, open_source
from captum_scoremap.linear import main_layers
from captum_scoremap.models import DEFAULT_MODEL, LoadedModel, load_model, prepare
from captum_scoremap.scores import are_single, logits_in

__all__ = ["Audit", "audit"]

_TRIED = 4  # images on which the prepared model is compared with the original
_RESOLUTIONS = 3  # of the model's layers, the coarsest, are mapped by default


@dataclass(frozen=True)
class Audit:
    """A finished audit.

    Attributes:
        folder: Where its results lie.
        settings: What was asked for: model, layers, source and the like.
        analysis: The analysis of the whole set.
        report: The page to look at.
        prepared: What it changed that a prepared copy of the model was explained; None if no norm was folded.

    Example:
        >>> import tempfile
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
        >>> data = torch.utils.data.TensorDataset(torch.rand(4, 1, 8, 8), torch.tensor([0, 1] * 2))
        >>> done = audit(data, model, out=tempfile.mkdtemp(), progress=False)
        >>> done.report.name, done.layers.num_rows
        ('report.html', 4)
    """

    folder: Path
    settings: Mapping[str, Any]
    analysis: Analysis
    report: Path
    prepared: Prepared | None = None

    @property
    def images(self) -> pa.Table:
        """One row for each image; the columns are described in `captum_scoremap.audit.TABLES`."""
        return self._shards.table("images")

    @property
    def layers(self) -> pa.Table:
        """One row for each image and layer."""
        return self._shards.table("layers")

    @property
    def _shards(self) -> Shards:
        source = self.settings["source"]["images"]
        count = len(Plan(source, self.settings["limit"], shard_size=self.settings["shard_size"]).shards)
        return Shards(self.folder, count)


def audit(
    source: "str | os.PathLike[str] | Dataset[Any] | Source",
    model: str | nn.Module | LoadedModel = DEFAULT_MODEL,
    *,
    out: str | os.PathLike[str],
    labels: "str | os.PathLike[str] | Mapping[str, int | str] | None" = None,
    layers: Sequence[str] | None = None,
    metrics: Sequence[str] = (),
    maps: str = "score",
    limit: int | None = None,
    resume: bool = False,
    ray: str | None = None,
    workers: int = 2,
    batch_size: int = 16,
    shard_size: int = 128,
    device: str | torch.device = "cpu",
    prepare_model: bool = True,
    compile_maps: bool | None = None,
    progress: bool = True,
    show_paths: bool = False,
    compare_with: str | os.PathLike[str] | None = None,
    single_file: bool = False,
    score: Callable[[Any], Tensor] | None = None,
) -> Audit:
    """Explain every image of a data set, and keep what was found.

    Args:
        source: A folder of images, a list (``.csv``, ``.parquet``), ``torchvision:NAME[/SPLIT]:ROOT`` or a
            data set.
        model: A model, loaded or by the name `load_model` takes.
        out: Folder for the results; new or empty unless ``resume``.
        labels: True labels of a folder's images: a list, or a mapping from path to label.
        layers: Names of the layers to map, from image to score; by default the last layer of each of the
            three coarsest resolutions. The last one is what rankings use.
        metrics: Additional metrics of each image: ``"insertion"``, ``"deletion"``.
        maps: ``"score"`` for score maps, A·Y place by place, beside B; ``"complete"`` for complete maps, which also
            hold all of B that has a place (see `CompleteScoreMap`), each on its layer's own grid.
        limit: Take this many images, evenly spread over the source.
        resume: Continue the audit in ``out``, made with the same settings.
        ray: Address of a Ray cluster to compute on: ``"local"``, ``"auto"``, ``"ray://HOST:PORT"``; None computes in
            this process. The images must have the same path on all its machines.
        workers: Number of actors on the cluster.
        batch_size: Images that go through the model together.
        shard_size: Images whose results are written together.
        device: Where the model computes.
        prepare_model: Whether to explain a faster copy of the model, its batch norms folded.
        compile_maps: Whether to compile what computes the maps, which takes a minute or more before the first image; by
            default from 5000 images on. The numbers stay the same but for rounding.
        progress: Whether to show how far it is.
        show_paths: Whether the report may name the files by their full path on this machine.
        compare_with: Folder of another audit of the same model, of other images: `Analysis.changes` tells what changed.
        single_file: Whether the report shall be one file, to be sent or published as it is; for up to 500 images.
        score: A function from the model's output to what is audited: scores (N, K), one for each of K labels, or a
            single one, (N,), which has no runner-up, no true label and no findings. See `captum_scoremap.scores`. By
            default the output, or its logits, is such scores.

    Returns:
        The audit.

    Raises:
        ValueError: If an argument is not what it must be, or ``out`` holds another audit.
        TypeError: If one is of another kind.
        OSError: If ``out`` cannot be written.

    Example:
        >>> import tempfile, torch
        >>> from torch import Tensor, nn
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
        >>> data = torch.utils.data.TensorDataset(torch.rand(6, 1, 8, 8), torch.tensor([0, 1] * 3))
        >>> done = audit(data, model, out=tempfile.mkdtemp(), progress=False)
        >>> done.images.num_rows
        6
    """
    for argument, value in {"layers": layers, "metrics": metrics}.items():
        if isinstance(value, str):
            raise TypeError(f"{argument} must be a list of names, got the text {value!r}. Use [{value!r}].")
    loaded = _as_loaded(model)
    opened = open_source(source, labels, loaded.labels or None)
    plan = Plan(len(opened), limit, batch_size, shard_size)
    if plan.count == 0:
        raise ValueError(f"source must hold images, got {opened.title!r} without any.")
    if maps not in MAPS:
        raise ValueError(f"maps must be of {', '.join(MAPS)}, got {maps!r}.{nearest(maps, MAPS)}")
    worker = Worker(opened, plan, loaded, (), (), _check_metrics(metrics), maps, torch.device(device))
    if single_file and plan.count > SINGLE_FILE_LIMIT:
        raise ValueError(
            f"single_file must be left out with more than {SINGLE_FILE_LIMIT} images, got {plan.count}: the page would "
            "be too large to open. Give a limit, or leave it out."
        )
    tried = worker.first_readable(_TRIED if prepare_model else 1).to(device)
    inputs = tried[:1]
    original = loaded.module
    module = prepare(original, inputs.cpu()) if prepare_model else copied(original).eval()
    module = module.to(device)
    function = logits_in if score is None and are_single(_scores(module, inputs), len(inputs)) else score
    if function is not None:
        original = copied(original)
        for one in (original, module):
            one.register_forward_hook(_Scored(function))
        name = getattr(score, "__name__", "score").strip("<>")
        loaded = replace(loaded, labels=_names_of_scores(module, inputs, name, loaded.labels))
    worker = replace(
        worker,
        model=replace(loaded, module=module),
        layers=_choose_layers(module, layers, inputs),
        pool=layers_to_pool(module, inputs),
        compiled=plan.count >= ENOUGH if compile_maps is None else compile_maps,
    )
    count = _count_scores(module, inputs)
    if count is not None:
        worker.model.check_labels(count)
    _check_labels(opened, count)
    if metrics and count == 1:
        raise ValueError(
            f"metrics must be left out of an audit of one score, without probability, got {', '.join(metrics)}."
        )
    settings = _settings(worker, original, prepare_model) | {
        "score": None if score is None else {"name": _name_of(score), "hash": fingerprint(score)}
    }
    if compare_with is not None:
        check_comparable(Path(compare_with), settings)
    shards = Shards(Path(out), len(plan.shards), _stamp(settings))
    _check_folder(shards, resume)
    with shards.locked():
        _open_folder(shards, settings, plan, resume)
        _work(worker, shards, ray, workers, progress)
        analysis = replace(analyze(shards, settings["layers"]), findings=find(shards, worker))
        if compare_with is not None:
            other, name_of = Shards(Path(compare_with)), loaded.label_name
            changes = compare(shards, other, module, list(worker.layers), worker.example, name_of)
            analysis = replace(analysis, changes=changes)
        prepared = compare_prepared(original, module, worker.layers, tried) if prepare_model else None
        report = write_report(shards, settings, analysis, opened.path if show_paths else None, single_file, prepared)
    return Audit(shards.folder, settings, analysis, report, prepared)


def _work(worker: Worker, shards: Shards, ray: str | None, workers: int, show: bool) -> None:
    """Do the shards that are not done."""
    plan = worker.plan
    done = shards.finished()
    missing = sorted(set(plan.shards) - set(done))
    if worker.compiled and missing and show and sys.stderr is not None:
        print(
            "audit: maps are compiled first, which takes a minute or more; --no-compile leaves it out", file=sys.stderr
        )
    progress = Progress(plan.count, sum(map(plan.size, done)), show)
    results = (
        worker.results(missing, progress.advance)
        if ray is None
        else on_ray(worker, missing, ray, workers, progress.advance)
    )
    # Closing ends threads and cluster at once, whatever goes wrong here.
    with closing(progress), closing(results):
        for shard, tables in results:
            shards.write(shard, tables)


def _as_loaded(model: str | nn.Module | LoadedModel) -> LoadedModel:
    """Return the model with all that belongs to it."""
    if isinstance(model, str):
        return load_model(model)
    if isinstance(model, nn.Module):
        model = LoadedModel(type(model).__name__, model)
    if not isinstance(model, LoadedModel):
        raise TypeError(f"model must be a model or the name of one, got {type(model).__name__}. See load_model.")
    return model


@dataclass(frozen=True)
class _Scored:
    """A forward hook that makes a network return what a function makes of its output, as (N, K)."""

    score: Callable[[Any], Tensor]

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Tensor:
        found = self.score(output)
        if not isinstance(found, Tensor) or found.dim() not in {1, 2} or not found.is_floating_point():
            got = f"{tuple(found.shape)} of {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"score must return floating-point scores (N, K) or (N,), got {got}.")
        return found[:, None] if found.dim() == 1 else found


def _name_of(score: Callable[[Any], Tensor]) -> str:
    return f"{score.__module__}:{getattr(score, '__qualname__', type(score).__qualname__)}"


@torch.no_grad()
def _scores(module: nn.Module, inputs: Tensor) -> Any:
    """Return what the network gives images, without the rest of its output."""
    return logits_in(module(inputs))


def _count_scores(module: nn.Module, inputs: Tensor) -> int | None:
    """Return how many scores the network gives an image; None where it gives none."""
    scores = _scores(module, inputs)
    return scores.shape[1] if isinstance(scores, Tensor) and scores.dim() == 2 else None


@torch.no_grad()
def _names_of_scores(module: nn.Module, inputs: Tensor, score: str, labels: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of what is scored: the function's where that is one number, the model's where they fit."""
    count = module(inputs).shape[1]
    if count == 1:
        return (score,)
    return labels if len(labels) == count else ()


def _check_metrics(names: Sequence[str]) -> tuple[str, ...]:
    for name in names:
        if name not in METRICS:
            raise ValueError(f"metrics must be of {', '.join(METRICS)}, got {name!r}.{nearest(name, METRICS)}")
    return tuple(dict.fromkeys(names))


def _check_labels(source: Source, count: int | None) -> None:
    """See that the labels that are known without reading the images are the model's."""
    labels = source.labels if isinstance(source, FileSource) and count is not None and count > 1 else ()
    for index, label in enumerate(labels):
        if label is not None and count is not None and label >= count:
            raise ValueError(f"labels must be less than {count}, the model's, got {label} for {source.name(index)!r}.")


def _choose_layers(module: nn.Module, names: Sequence[str] | None, inputs: Tensor) -> tuple[MapLayer, ...]:
    """Return the layers asked for, or the last of each of the coarsest resolutions."""
    if not names:
        names = main_layers(module, inputs)[-_RESOLUTIONS:]
        if not names:
            raise ValueError(f"layers must be named, got none, and no layer of {type(module).__name__} gives a map.")
    known = dict(module.named_modules())
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"layers must be names, got {type(name).__name__}. model.named_modules() tells them.")
        if not name or name not in known:
            raise ValueError(f"layers must be named as in the model, got {name!r}.{nearest(name, known)}")
    return map_layers(module, list(dict.fromkeys(names)), inputs)


def _settings(worker: Worker, original: nn.Module, prepared: bool) -> dict[str, Any]:
    """Return what decides the results: two runs with equal settings yield equal tables."""
    plan = worker.plan
    return {
        "format": 4,
        "source": {
            "title": worker.source.title,
            "images": len(worker.source),
            "hash": worker.source.fingerprint(),
        },
        "model": {
            "name": worker.model.name,
            "hash": weights_fingerprint(original),
            "code": code_fingerprint(original),
            "prepared": prepared,
            "preprocessing": repr(worker.model.preprocessing),
            "labels": list(worker.model.labels),
        },
        "layers": [layer.name for layer in worker.layers],
        "pooled_layers": [layer.name for layer in worker.pool],
        "metrics": list(worker.metrics),
        "maps": worker.maps,
        "compiled": worker.compiled,
        "limit": plan.limit,
        "batch_size": plan.batch_size,
        "shard_size": plan.shard_size,
        "captum_scoremap": captum_scoremap.__version__,
        "torch": torch.__version__,
    }


def _stamp(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _check_folder(shards: Shards, resume: bool) -> None:
    """See whether the folder may be written to.

    Raises:
        ValueError: If it holds something else, or results and ``resume`` is not asked for.
    """
    folder = shards.folder
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out must be a folder, got the file {str(folder)!r}.")
    if (folder / _SETTINGS).exists():
        if shards.finished() and not resume:
            raise ValueError(
                f"out must be a new or empty folder, got {str(folder)!r} with an audit of "
                f"{len(shards.finished())} finished shards. Go on with resume, or choose another folder."
            )
        return
    is_empty = not folder.exists() or all(item.name.startswith(".") for item in folder.iterdir())
    if not (is_empty or (resume and shards.finished())):
        raise ValueError(f"out must be a new or empty folder, got {str(folder)!r} with other files in it.")


def _open_folder(shards: Shards, settings: Mapping[str, Any], plan: Plan, resume: bool) -> None:
    """Make the folder ready: new, or the same audit's to go on with; damaged results are named and taken out.

    Raises:
        ValueError: If it holds another audit.
    """
    path = shards.folder / _SETTINGS
    damaged = []
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = _changes(before, settings) if shards.finished() else []
    except FileNotFoundError:
        changed, damaged = [], [f"{_SETTINGS} is missing"] if shards.finished() else []
    except (ValueError, TypeError) as error:
        changed, damaged = [], [f"{_SETTINGS} cannot be read ({error})"]
    if changed:
        raise ValueError(
            f"resume must have the settings of the audit in {str(shards.folder)!r}, got other values of "
            f"{', '.join(changed)}. Repeat the first call's arguments, or choose another folder for what has changed."
        )
    write_json(path, settings)
    if resume:
        damaged += shards.mend(lambda shard: [index for batch in plan.batches(shard) for index in batch])
        shards.clear_leftovers()
    if damaged:
        warnings.warn(
            f"results in {str(shards.folder)!r} are damaged, and computed anew: {'; '.join(damaged)}.", stacklevel=3
        )


_HASHED = {"source": "content or labels", "model": "weights"}


def _changes(before: Any, settings: Mapping[str, Any]) -> list[str]:
    """Name the settings that differ, and what of the model and the source does."""
    if not isinstance(before, dict):
        raise TypeError(f"not a mapping, but {type(before).__name__}")
    changed = []
    for name, value in settings.items():
        old = before.get(name)
        if isinstance(value, dict) and isinstance(old, dict):
            parts = [
                _HASHED.get(name, "code") if part == "hash" else part for part in value if old.get(part) != value[part]
            ]
            changed += [f"{name} ({', '.join(parts)})"] if parts else []
        elif old != value:
            changed.append(name)
    return changed
