"""What the results of an audit hold: every table, every column, its type, its unit.

The descriptions travel with the data, as metadata of each Parquet column.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import pyarrow as pa

__all__ = ["COMMIT", "TABLES", "Column", "describe"]


@dataclass(frozen=True)
class Column:
    """One column: its name, its type, what it means."""

    name: str
    type: pa.DataType
    meaning: str


def _schema(*columns: Column) -> pa.Schema:
    return pa.schema([
        pa.field(column.name, column.type, metadata={"description": column.meaning}) for column in columns
    ])


_INDEX = Column("index", pa.int64(), "position of the image in the source")
_LAYER = Column("layer", pa.string(), "name of the layer's module")
_BOX = pa.list_(pa.int32(), 4)
_NUMBERS = (
    Column(
        "sub_scores",
        pa.float64(),
        "A·Y: sum of the map of the label (in layers: the predicted one), and of tokens off the map, in logits",
    ),
    Column(
        "bias",
        pa.float64(),
        "B: what the layers above add whatever Y is, in logits; of complete maps what of S has no place",
    ),
    Column("bias_share", pa.float64(), "|B| / (|B| + |A·Y|), from 0 to 1"),
    Column("residual", pa.float64(), "|S − (A·Y + B)|: how far the explanation is from exact, in logits"),
    Column("top10_share", pa.float64(), "share of the positive score in the tenth of the area where it is highest"),
    Column("border_share", pa.float64(), "share of the positive score in the image's border, a tenth of each side"),
    Column("region_share", pa.float64(), "share of the positive score in the image's box or mask; null without one"),
)

TABLES: Mapping[str, pa.Schema] = MappingProxyType({
    "views": _schema(
        _INDEX,
        Column("format", pa.string(), "media type of the picture: image/jpeg, or image/png where it is small"),
        Column("view", pa.binary(), "what the model saw: the preprocessed input as a picture"),
    ),
    "maps": _schema(
        _INDEX,
        _LAYER,
        Column("role", pa.string(), "whose score the map explains: predicted, runner_up or true"),
        Column("label", pa.int32(), "that label; the contrast of two labels is the difference of their maps"),
        Column("rows", pa.int32(), "height of the map, in cells"),
        Column("columns", pa.int32(), "width of the map, in cells"),
        Column(
            "values", pa.list_(pa.float32()), "the map, row by row, in logits: M, or C where complete maps were chosen"
        ),
        Column("score", pa.float64(), "S: that label's score, in logits"),
        *_NUMBERS,
    ),
    "layers": _schema(
        _INDEX,
        _LAYER,
        *_NUMBERS,
        Column(
            "region_area",
            pa.float64(),
            "share of the input's area that the image's box or mask covers; null without one",
        ),
        Column("peak_row", pa.float64(), "where the map is highest, from 0 (top) to 1 (bottom)"),
        Column("peak_column", pa.float64(), "where the map is highest, from 0 (left) to 1 (right)"),
    ),
    "channels": _schema(
        _INDEX,
        _LAYER,
        Column(
            "sub_scores",
            pa.list_(pa.float32()),
            "A·Y of each channel for the predicted label, summed over positions, in logits: of score maps the parts of "
            "the layer's sub_scores; null at a layer without maps",
        ),
        Column("mean", pa.list_(pa.float32()), "the mean of each channel over positions, in the layer's units"),
        Column("maximum", pa.list_(pa.float32()), "the maximum of each channel over positions, in the layer's units"),
    ),
    "scores": _schema(
        _INDEX,
        Column("scores", pa.list_(pa.float32()), "the scores of all labels, in logits"),
    ),
    "images": _schema(
        _INDEX,
        Column("name", pa.string(), "path below the source's folder, or the position in a data set"),
        Column("error", pa.string(), "why the image could not be audited: all other columns are then null"),
        Column("width", pa.int32(), "width of the input the model saw, in pixels"),
        Column("height", pa.int32(), "height of the input the model saw, in pixels"),
        Column("predicted", pa.int32(), "label of the highest score"),
        Column("predicted_label", pa.string(), "its name"),
        Column("score", pa.float64(), "S: the predicted label's score, in logits, before softmax"),
        Column("probability", pa.float64(), "the predicted label's probability, after softmax; null of a single score"),
        Column("runner_up", pa.int32(), "label of the second highest score; null of a single score"),
        Column("runner_up_label", pa.string(), "its name"),
        Column("runner_up_score", pa.float64(), "its score, in logits"),
        Column("contrast", pa.float64(), "score minus the runner-up's score, in logits"),
        Column("true", pa.int32(), "the true label; null where it is not known"),
        Column("true_label", pa.string(), "its name"),
        Column("true_score", pa.float64(), "its score, in logits"),
        Column("correct", pa.bool_(), "whether the predicted label is the true one; null where that is not known"),
        Column(
            "crops",
            pa.list_(_BOX),
            "the box of the largest sum on the last layer's map: x0, y0, x1, y1, pixels of the input",
        ),
        Column(
            "insertion",
            pa.float64(),
            "area under the insertion curve (higher is better); null where not asked for",
        ),
        Column(
            "deletion",
            pa.float64(),
            "area under the deletion curve (lower is better); null where not asked for",
        ),
        Column("seconds", pa.float64(), "time the image took: its part of its batch, decoding included"),
    ),
})
"""The tables in the order they are written; each is a folder of Parquet files, one a shard."""

COMMIT = "images"
"""The table that is written last: a shard is done once its part of this table is in place."""


def describe() -> str:
    """Return the tables and their columns as text, for people.

    Returns:
        A line for each table and each column.

    Example:
        >>> print(describe().splitlines()[0])
        views
    """
    lines = []
    for table, schema in TABLES.items():
        lines.append(table)
        for field in schema:
            lines.append(f"  {field.name} ({field.type}): {(field.metadata or {})[b'description'].decode()}")
    return "\n".join(lines)
