"""Do the tests fail where the core is wrong? Random mutants of it, one at a time, each against the tests that reach it.

``python -m tests.mutants --count 100 --seed 0 --out mutants.jsonl`` copies the project to a temporary folder and runs
the core's tests there once, to learn which of them execute each line and how long each takes. Then it changes one
operator, comparison, constant or flag of the copy, and runs the tests that execute the line, the fastest first, until
one fails: the mutant is killed. A line is written for each mutant; those that are in the file already are not run
again. About an hour on one core. Survivors are to be explained one by one: a mutant that computes the same is no gap
in the tests.
"""

import argparse
import ast
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from bisect import bisect
from collections import defaultdict
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from coverage import CoverageData
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
ROOMS = ("rules", "tape", "places", "linear", "attribution")

TESTS = """
    adjoints advice bad_input boundary captum_contract captum_tools casts complete constant_layers definition edges
    exactness frame frozen_values functions fused handwritten inference_mode kernels_of_devices layouts linear_form
    memory modes moving multiview noise numbers own_operations paper planes positions precision quantized
    random_networks reference relations run scripted speed steps structures sums table targets unseen
""".split()
START = 60  # seconds in which pytest starts at the latest
SLOWER = 5  # times as long as measured: an endless loop, not a busy machine

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


class Tests:
    """What each test executes, and how long it takes, learned from one run of all of them in the unchanged copy."""

    def __init__(self, copy: Path) -> None:
        self._copy = copy
        rooms = [f"--cov=captum_scoremap/{room}" for room in ROOMS]
        files = [f"tests/test_{name}.py" for name in TESTS]
        run = self._pytest("-vv", "--durations=0", "--cov-context=test", "--cov-report=", *rooms, *files)
        if run.returncode:
            raise SystemExit(f"The tests must pass in the unchanged project; they do not:\n{run.stdout[-3000:]}")
        self._lines = CoverageData(str(copy / ".coverage"))
        self._lines.read()
        self._seconds: dict[str, float] = defaultdict(float)
        for seconds, test in re.findall(r"^(\d+\.\d+)s (?:setup|call|teardown) +(.+)$", run.stdout, re.MULTILINE):
            self._seconds[test] += float(seconds)

    def that_reach(self, mutant: Mutant) -> list[str]:
        """Return the tests that execute a mutant's statement, the fastest first; all, if it runs at import."""
        path = self._copy / mutant.path
        statements = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.stmt)]
        first = max(node.lineno for node in statements if node.lineno <= mutant.line <= (node.end_lineno or 0))
        contexts = self._lines.contexts_by_lineno(str(path))
        found = {context for line in range(first, mutant.line + 1) for context in contexts.get(line, ())}
        tests = self._seconds if "" in found else {context.rpartition("|")[0] for context in found}
        return sorted(tests, key=lambda test: self._seconds[test])

    def killer_of(self, mutant: Mutant) -> str | None:
        """Return the first test that fails now that the mutant is in the copy, None if all pass."""
        tests, budget = self.that_reach(mutant), 5.0
        while tests:
            seconds = list(accumulate(self._seconds[test] for test in tests))
            count = max(1, bisect(seconds, budget))
            (self._copy / "chosen.txt").write_text("\n".join(tests[:count]))
            try:
                run = self._pytest("-q", "-x", "--tb=no", "@chosen.txt", limit=START + SLOWER * seconds[count - 1])
            except subprocess.TimeoutExpired:
                return "takes too long"
            if run.returncode:
                failed = [line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
                return failed[0].split(" - ")[0] if failed else f"pytest ends with {run.returncode}"
            tests, budget = tests[count:], 4 * budget
        return None

    def _pytest(self, *arguments: str, limit: float | None = None) -> subprocess.CompletedProcess[str]:
        """Run pytest in the copy; only that without a limit, the first, writes bytecode: no mutant's is kept."""
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(self._copy)}
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--no-header", *arguments],
            cwd=self._copy,
            env=environment | {"PYTHONDONTWRITEBYTECODE": "1" if limit else ""},
            capture_output=True,
            text=True,
            timeout=limit,
            check=False,
        )


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
        tests = Tests(copy)
        for mutant in tqdm(chosen, desc=f"of {len(everything)} mutants"):
            if tuple(mutant) in done:
                continue
            source = (copy / mutant.path).read_text()  # which nobody edits meanwhile
            (copy / mutant.path).write_text(mutant.applied(source))
            row = {"mutant": mutant, **mutant.described(source), "killed_by": tests.killer_of(mutant)}
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
