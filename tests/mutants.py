"""Do the tests fail where the core is wrong? Random mutants of it, one at a time, each against the core's tests.

``python -m tests.mutants --count 100 --seed 0 --out mutants.jsonl`` copies the project to a temporary folder, changes
one operator, comparison, constant or flag of the copy, and runs the core's tests there until one fails: the mutant is
killed. A line is written for each mutant; those that are in the file already are not run again. An hour or two on one
core. Survivors are to be explained one by one: a mutant that computes the same is no gap in the tests.
"""

import argparse
import ast
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

ROOT = Path(__file__).parent.parent
ROOMS = ("rules", "tape", "linear", "attribution")

# in the order in which they find most for their time; one process each, so that what is slow runs for few
TESTS = (
    "steps handwritten linear_form memory run reference paper adjoints table numbers structures functions noise",
    "boundary unseen own_operations precision relations exactness bad_input advice fused captum_contract captum_tools",
    "complete targets random_networks multiview",
)
TIMEOUT = 1200  # seconds; an endless loop is found, too

SWAPPED: dict[type, str] = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "//", ast.Pow: "*",
    ast.BitAnd: "|", ast.BitOr: "&", ast.MatMult: "*",
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
    ast.Is: "is not", ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in",
    ast.And: "or", ast.Or: "and",
}  # fmt: skip


class Mutant(NamedTuple):
    """One change: ``old`` between two offsets of a file becomes ``new``."""

    path: str
    line: int
    start: int
    end: int
    new: str

    def applied(self, source: str) -> str:
        return source[: self.start] + self.new + source[self.end :]

    def described(self, source: str) -> dict[str, object]:
        was = source.splitlines()[self.line - 1].strip()
        now = self.applied(source).splitlines()[self.line - 1].strip()
        return {"path": self.path, "line": self.line, "was": was, "now": now}


def mutants_of(path: str, source: str) -> Iterator[Mutant]:
    """All mutants of a file whose change stands on one line; annotations, imports and docstrings stay."""
    lines = source.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))

    def offset(line: int, column: int) -> int:
        return starts[line - 1] + len(lines[line - 1].encode()[:column].decode())

    def span(node: ast.expr) -> tuple[int, int]:
        return offset(node.lineno, node.col_offset), offset(node.end_lineno or 0, node.end_col_offset or 0)

    def between(left: ast.expr, right: ast.expr, operator: ast.AST) -> Iterator[Mutant]:
        """The operator stands somewhere between its operands, among blanks and parentheses."""
        start, end = span(left)[1], span(right)[0]
        gap = source[start:end]
        old = gap.strip("() \n\t")
        if "\n" not in gap and "#" not in gap and type(operator) in SWAPPED:
            at = start + gap.index(old)
            yield Mutant(path, left.end_lineno or 0, at, at + len(old), SWAPPED[type(operator)])

    for node in _expressions(ast.parse(source)):
        match node:
            case ast.BinOp(left=left, op=arithmetic, right=right):
                yield from between(left, right, arithmetic)
            case ast.Compare(left=left, ops=comparisons, comparators=comparators):
                for one, comparison, other in zip([left, *comparators], comparisons, comparators, strict=False):
                    yield from between(one, other, comparison)
            case ast.BoolOp(op=connective, values=[left, right]):
                yield from between(left, right, connective)
            case ast.UnaryOp(op=ast.Not()):
                start = span(node)[0]
                yield Mutant(path, node.lineno, start, start + len("not"), "")
            case ast.UnaryOp(op=ast.USub()):
                start = span(node)[0]
                yield Mutant(path, node.lineno, start, start + len("-"), "+")
            case ast.Constant(bool() as value):
                yield Mutant(path, node.lineno, *span(node), str(not value))
            case ast.Constant(int() as value):
                yield Mutant(path, node.lineno, *span(node), str(value + 1))
            case ast.Constant(float() as value):
                yield Mutant(path, node.lineno, *span(node), repr(value * 2 + 1e-3))


def _expressions(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those of annotations and of text, whose change changes nothing."""
    for name, field in ast.iter_fields(tree):
        if name in {"annotation", "returns", "decorator_list"} or isinstance(tree, ast.JoinedStr):
            continue
        for node in field if isinstance(field, list) else [field]:
            if isinstance(node, ast.AST):
                yield node
                yield from _expressions(node)


def all_mutants() -> list[Mutant]:
    paths = [path for room in ROOMS for path in sorted((ROOT / "captum_scoremap" / room).glob("*.py"))]
    return [mutant for path in paths for mutant in mutants_of(str(path.relative_to(ROOT)), path.read_text())]


def killed_by(copy: Path) -> str | None:
    """The first test that fails, None if all pass."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    for names in TESTS:
        files = [f"tests/test_{name}.py" for name in names.split()]
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            "--no-header",
            "--tb=no",
            *files,
        ]
        try:
            run = subprocess.run(
                command, cwd=copy, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
            )
        except subprocess.TimeoutExpired:
            return "takes too long"
        if run.returncode:
            failed = [line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
            return failed[0].split(" - ")[0] if failed else "nothing can be imported"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--count", type=int, default=100, help="how many (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice (default 0)")
    parser.add_argument("--out", type=Path, required=True, help="file of the results, a line each")
    arguments = parser.parse_args()

    everything = all_mutants()
    chosen = random.Random(arguments.seed).sample(everything, arguments.count)
    lines = arguments.out.read_text().splitlines() if arguments.out.exists() else []
    done = {tuple(json.loads(line)["mutant"]): json.loads(line) for line in lines}
    with tempfile.TemporaryDirectory() as folder, arguments.out.open("a") as out:
        copy = Path(folder) / "project"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "__pycache__", ".*cache*"))
        for mutant in tqdm(chosen, desc=f"of {len(everything)} mutants"):
            if tuple(mutant) in done:
                continue
            source = (ROOT / mutant.path).read_text()
            (copy / mutant.path).write_text(mutant.applied(source))
            row = {"mutant": mutant, **mutant.described(source), "killed_by": killed_by(copy)}
            (copy / mutant.path).write_text(source)
            done[tuple(mutant)] = row
            print(json.dumps(row), file=out, flush=True)
    survivors = [row for row in (done[tuple(mutant)] for mutant in chosen) if row["killed_by"] is None]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} killed. Alive:")
    for row in survivors:
        print(f"{row['path']}:{row['line']}\n  - {row['was']}\n  + {row['now']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
