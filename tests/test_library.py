"""The library as a whole: in sync with its notebooks, documented, light to import."""

import importlib
import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

BIN = Path(sys.executable).parent
MODULES = sorted(p.stem for p in (ROOT / "kslottery").glob("*.py") if not p.stem.startswith("_"))
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
ORDER = (
    "core",
    "ks",
    "checkpoints",
    "criteria",
    "certificate",
    "data",
    "babel",
    "rows",
    "ticket",
    "tuning",
    "bank",
    "evaluation",
    "losses",
    "decomposition",
    "audit",
    "plots",
    "run",
    "doctor",
    "cli",
)  # modules import only upwards


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.suffix in (".py", ".ipynb")}


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    place = tmp_path_factory.mktemp("copy")
    for name in ("nbs", "kslottery"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("runs", "__pycache__", ".ipynb_checkpoints"), symlinks=True)
    for name in ("settings.ini", "_quarto.yml", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, place / name)
    return place


def test_notebooks_are_clean(copied):
    before = tree(copied / "nbs")
    subprocess.run([BIN / "nbdev_clean"], cwd=copied, check=True)
    assert [n for n, b in tree(copied / "nbs").items() if before[n] != b] == [], "run make export and commit"


def test_the_library_is_what_the_notebooks_export(copied):
    before = tree(copied / "kslottery")
    subprocess.run([BIN / "nbdev_export"], cwd=copied, check=True)
    after = tree(copied / "kslottery")
    assert before.keys() == after.keys() and [n for n in after if before[n] != after[n]] == [], "run make export and commit"


def test_the_readme_is_the_index_notebook():
    from readme import render

    assert (ROOT / "README.md").read_text() == render(ROOT / "nbs" / "index.ipynb"), "run make export and commit"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_stored_outputs_are_whole(notebook):
    cells = json.loads(notebook.read_text())["cells"]
    code = [c for c in cells if c["cell_type"] == "code"]
    assert not [o for c in code for o in c["outputs"] if o["output_type"] == "error"]
    assert any(o for c in code for o in c["outputs"]) or notebook.stem == "index" or not code, "store the outputs: make notebooks NB=..."
    assert str(ROOT) not in notebook.read_text() and str(Path.home()) not in notebook.read_text(), "a stored output names a path of one machine"
    told = [
        f"cell {n}: {json.dumps(o)[:200]}"
        for n, c in enumerate(cells)
        for o in c.get("outputs", [])
        if o.get("name") == "stderr" or "widget" in str([*o.get("data", {})])
    ]
    assert not told, "warnings and progress bars are stored: keep the cell from showing them, and make notebooks NB=..."
    assert cells[0]["cell_type"] == "markdown" and "".join(cells[0]["source"]).startswith("# ")


@pytest.mark.parametrize("tutorial", sorted((ROOT / "nbs" / "tutorials").glob("*.ipynb")), ids=lambda p: p.stem)
def test_a_tutorial_ends_with_how_to_run_it_on_your_model(tutorial):
    last = json.loads(tutorial.read_text())["cells"][-1]
    assert last["cell_type"] == "markdown" and f"papermill -k python3 nbs/tutorials/{tutorial.name}" in "".join(last["source"])
    assert "## Run it " in "".join(last["source"])


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_has_a_docstring(module):
    lib = importlib.import_module(f"kslottery.{module}")
    assert lib.__doc__
    for name in lib.__all__:
        thing = getattr(lib, name)
        if not (inspect.isfunction(thing) or inspect.isclass(thing)):
            continue
        documented = thing.__doc__ and not thing.__doc__.startswith(f"{name}(")  # not the one that dataclasses and tuples make up
        assert documented, f"kslottery.{module}.{name} has no docstring"
        if inspect.isclass(thing):
            for method, function in vars(thing).items():
                if (
                    inspect.isfunction(function)
                    and not method.startswith("_")
                    and function.__qualname__ == f"{name}.{method}"
                    and method not in ("forward", "extra_repr")
                ):
                    assert inspect.getdoc(getattr(thing, method)), f"{name}.{method} has no docstring"


def test_modules_import_only_upwards():
    for module in MODULES:
        text = (ROOT / "kslottery" / f"{module}.py").read_text()
        for other in ORDER:
            if f"from kslottery.{other} " in text or f"from .{other} " in text:
                assert ORDER.index(other) < ORDER.index(module), f"{module} imports {other}"
    assert set(MODULES) <= set(ORDER)


def test_import_is_light_and_works_from_anywhere(tmp_path):
    code = "import time; t = time.perf_counter(); import kslottery, kslottery.ks; print(time.perf_counter() - t); import sys; print([m for m in ('torch', 'transformers', 'nbdev', 'fastcore', 'papermill') if m in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True).stdout.split("\n")
    assert float(said[0]) < 2 and said[1] == "[]"


def test_the_quarto_file_is_one():
    assert (ROOT / "nbs" / "_quarto.yml").is_symlink() and (ROOT / "nbs" / "_quarto.yml").resolve() == ROOT / "_quarto.yml"
