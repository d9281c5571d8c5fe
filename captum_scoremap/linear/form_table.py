"""Linear forms as a table: S = Σ A·Y + B, layer by layer, in text and in HTML."""

from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING

from captum_scoremap.rules import tensors_in

if TYPE_CHECKING:
    from .form import LinearForm

__all__ = ["as_html", "as_text"]

HEADINGS = ("layer", "size", "Σ A·Y", "B", "S", "residual")


def _rows(forms: Sequence["LinearForm"]) -> Iterator[tuple[str, ...]]:
    """Yield what stands in the table, a row for each layer and image, the headings first."""
    several = any(len(form.score) > 1 for form in forms)
    yield (HEADINGS[0], "image", *HEADINGS[1:]) if several else HEADINGS
    for form in forms:
        sizes = [" × ".join(map(str, y.shape[1:])) or "1" for y in tensors_in(form.activations)]
        numbers = zip(form.sums, form.bias, form.score, form.relative_residual, strict=True)
        for image, (total, bias, score, residual) in enumerate(numbers):
            row = (", ".join(sizes), f"{total:.4f}", f"{bias:.4f}", f"{score:.4f}", f"{residual:.1e}")
            yield (form.layer, str(image), *row) if several else (form.layer, *row)


def as_text(forms: Sequence["LinearForm"]) -> str:
    """Return the table of the forms of one model in lines of text, numbers aligned to the right."""
    rows = list(_rows(forms))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        name, *numbers = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([name.strip().ljust(widths[0]), *numbers]))
    return "\n".join(lines)


def as_html(forms: Sequence["LinearForm"]) -> str:
    """Return the table in HTML, for notebooks."""
    head, *rows = _rows(forms)
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"
