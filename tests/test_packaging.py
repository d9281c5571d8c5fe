"""Wheel and sdist are built, hold what they should, and work once installed; all metadata agree."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import captum_scoremap

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONDA_NAMES = {"matplotlib": "matplotlib-base", "torch": "pytorch"}


def run(*command: str, **options: object) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sdist, and the wheel that is built from it."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", str(out), str(ROOT))
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return {"wheel": wheel, "sdist": sdist}


def test_wheel_holds_the_package_alone(built: dict[str, Path]) -> None:
    with zipfile.ZipFile(built["wheel"]) as wheel:
        names = set(wheel.namelist())
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "captum_scoremap").rglob("*.py")}
    assert sources <= names
    assert "captum_scoremap/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"captum_scoremap"}


def test_sdist_holds_what_is_needed_to_test_and_document(built: dict[str, Path]) -> None:
    with tarfile.open(built["sdist"]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    for needed in ("README.md", "CHANGELOG.md", "LICENSE", ".mkdocs.yml", ".citation.cff"):
        assert needed in names, needed
    for folder, pattern in (("tests", "*.py"), ("tutorials", "*.md"), ("tutorials", "*.ipynb")):
        assert {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob(pattern)} <= names


@pytest.mark.slow
def test_wheel_works_where_it_is_installed(built: dict[str, Path], tmp_path: Path) -> None:
    place = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(place), str(built["wheel"]))
    program = "import captum_scoremap, sys; print(captum_scoremap.__file__)"
    # -I: neither this folder nor PYTHONPATH, so that nothing but the wheel can be found before the other packages
    code = f"import sys; sys.path.insert(0, {str(place)!r}); {program}"
    assert str(place) in run(sys.executable, "-I", "-c", code, cwd=tmp_path)
    code = f"import sys; sys.path.insert(0, {str(place)!r}); from captum_scoremap.cli import main; main(['--version'])"
    assert run(sys.executable, "-I", "-c", code, cwd=tmp_path).split() == [
        "captum-scoremap",
        captum_scoremap.__version__,
    ]


def test_metadata_agree() -> None:
    citation = yaml.safe_load((ROOT / ".citation.cff").read_text(encoding="utf-8"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert citation["version"] == captum_scoremap.__version__
    assert f"version = {{{captum_scoremap.__version__}}}" in readme
    assert citation["license"] == PROJECT["license"]
    assert citation["keywords"] == PROJECT["keywords"]
    for author in citation["preferred-citation"]["authors"]:
        assert f"{author['family-names']}, {author['given-names']}" in readme
    assert re.search(
        rf"^## \[{re.escape(captum_scoremap.__version__)}\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )


def test_conda_recipe_needs_what_the_package_needs() -> None:
    recipe = yaml.safe_load((ROOT / "tests" / "conda" / "recipe.yaml").read_text(encoding="utf-8"))
    assert recipe["context"]["version"] == captum_scoremap.__version__
    needed = {f"python {PROJECT['requires-python']}"}
    for requirement in PROJECT["dependencies"]:
        name, bound = re.fullmatch(r"([\w-]+)(.*)", requirement).groups()  # type: ignore[union-attr]
        needed.add(f"{CONDA_NAMES.get(name, name)} {bound}")
    assert set(recipe["requirements"]["run"]) == needed
    scripts = [f"{name} = {target}" for name, target in PROJECT["scripts"].items()]
    assert recipe["build"]["python"]["entry_points"] == scripts
