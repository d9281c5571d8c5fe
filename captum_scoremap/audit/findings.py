"""What a model may wrongly rely on: candidates of the screening, looked at with the network."""

from typing import Any

from captum_scoremap.audit.proof import prove
from captum_scoremap.audit.screening import screen
from captum_scoremap.audit.shards import Shards, write_json
from captum_scoremap.audit.worker import Worker

__all__ = ["find"]


def find(shards: Shards, worker: Worker) -> list[dict[str, Any]]:
    """Find what sets single labels apart, prove it, and write it to ``analysis/findings.json``.

    Args:
        shards: The results.
        worker: The model and its images.

    Returns:
        A mapping for each finding, most suspicious first:

        - ``label`` and ``name``: the label that is recognized by it;
        - ``kind``: ``"place"``, ``"concept"`` (it moves), ``"background"`` (a color or texture that is spread over the
          image), ``"border"`` or ``"confused pair"`` (images of the label ``true`` carry it and are taken for
          ``label``); None where it was not looked at, being far from likely;
        - ``strength``: how far the label stands out among the others, in their standard deviations; ``chance``: the
          probability of as much by chance for any label at any layer;
        - ``confident``: whether that is at most 5%, by a test that takes the labels' strengths for normal, and taking
          it away lowers S more than a control does; of 59 small networks on which the rule was not chosen, 25 of them
          without a planted shortcut, two named a label that carries nothing, beside the one that does;
        - ``share``: the part of the label's score S that comes from it, by the exact sum S = A·Y + B at ``layer``;
        - ``images``: positions of the images that carry it, the clearest first; ``patches``: where in them;
        - ``layer``; ``channels``: those that add most, with logits; ``row`` and ``column`` of a place; ``map``,
          ``rows`` and ``columns``: where it lies on average; ``area``, ``border`` and ``consistency``: what the kind
          goes by;
        - ``effect``: what happens on images that it was not found on when it is taken away: ``how``, ``score`` (S),
          ``score_fall``, ``accuracy_fall``, both with ``control_`` in front for a control of equal size, ``chance``.
    """
    predicted: dict[int, int] = {}
    truth: dict[int, int] = {}
    for _, table in shards.each("images"):
        for row in table.select(["index", "predicted", "true"]).to_pylist():
            if row["predicted"] is not None:
                predicted[row["index"]] = row["predicted"]
            if row["true"] is not None:
                truth[row["index"]] = row["true"]
    layers = {layer.name: layer for layer in worker.pool}
    model = worker.model
    candidates = screen(shards, list(layers), predicted)
    findings = prove(candidates, model.module, layers, worker.example, predicted, truth, model.label_name)
    write_json(shards.folder / "analysis" / "findings.json", {"findings": findings})
    return findings
