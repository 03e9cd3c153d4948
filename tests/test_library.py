"""The library as a whole: in sync with its notebooks, in order, small, light to import."""

import ast
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from conftest import ROOT
from house import BENCHMARKS, PICTURE, arrows, imports, picture, rooms

BIN = Path(sys.executable).parent
MODULES = list(rooms())  # in their order
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
# At most; fewer than. The redesign of 0.2 ended at 62 and 3,498: the library grows by capability only. To be hard to
# break took 460 statements, half of them the writing, locking and loading in core; the doctor of endings took 640,
# row health 190, adapters of both ends and GGUF 140, audits of any model 70, rows of the output and new tokens 100.
ARROWS, STATEMENTS = 100, 6400


def tree(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.suffix in (".py", ".ipynb")
    }


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    place = tmp_path_factory.mktemp("copy")
    for name in ("nbs", "kslottery"):
        shutil.copytree(
            ROOT / name,
            place / name,
            ignore=shutil.ignore_patterns("runs", "__pycache__", ".ipynb_checkpoints"),
            symlinks=True,
        )
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
    assert before.keys() == after.keys() and [n for n in after if before[n] != after[n]] == [], (
        "run make export and commit"
    )


def test_the_readme_is_the_index_notebook():
    from readme import render

    assert (ROOT / "README.md").read_text() == render(ROOT / "nbs" / "index.ipynb"), "run make export and commit"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_stored_outputs_are_whole(notebook):
    cells = json.loads(notebook.read_text())["cells"]
    code = [c for c in cells if c["cell_type"] == "code"]
    assert not [o for c in code for o in c["outputs"] if o["output_type"] == "error"]
    assert any(o for c in code for o in c["outputs"]) or notebook.stem == "index" or not code, (
        "store the outputs: make notebooks NB=..."
    )
    assert str(ROOT) not in notebook.read_text() and str(Path.home()) not in notebook.read_text(), (
        "a stored output names a path of one machine"
    )
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
    assert last["cell_type"] == "markdown" and f"papermill -k python3 nbs/tutorials/{tutorial.name}" in "".join(
        last["source"]
    )
    assert "## Run it " in "".join(last["source"])


# The house


def test_every_module_has_one_notebook_and_every_notebook_a_module():
    assert {p.stem for p in (ROOT / "kslottery").glob("[a-z]*.py")} == set(MODULES)
    for module, notebook in rooms().items():
        assert notebook.stem.split("_", 1)[1] == module, f"{notebook.name} exports {module}"
    numbers = [p.name.split("_")[0] for p in rooms().values()]
    assert numbers == [f"{n:02d}" for n in range(len(numbers))], "the numbers have a gap, a letter or a double"


def test_no_import_goes_upwards():
    "So there is no circle either."
    order = [*MODULES, BENCHMARKS]
    upwards = [f"{m} imports {o}" for m, others in arrows().items() for o in others if order.index(o) >= order.index(m)]
    assert upwards == []


def test_there_are_few_arrows():
    graph = arrows()
    most = sorted(((len(o), m) for m, o in graph.items()), reverse=True)[:5]
    assert sum(map(len, graph.values())) <= ARROWS, f"{sum(map(len, graph.values()))} arrows; most come from {most}"


def test_arrows_are_counted_wherever_an_import_stands(tmp_path):
    (tmp_path / "a.py").write_text(
        "from typing import TYPE_CHECKING\nfrom kslottery import ks, load_pairs\nimport kslottery.rows\n"
        "from . import data\nif TYPE_CHECKING:\n    from .cli import main\n"
        "def f():\n    from .core import write_json\n    from kslottery.run import execute\n"
    )
    assert imports(tmp_path / "a.py", set(MODULES)) == {"ks", "rows", "data", "core", "run"}


def test_the_picture_of_the_house_is_up_to_date():
    assert PICTURE.read_text(encoding="utf-8") == picture(), "run make house and commit"
    assert f"({PICTURE.relative_to(ROOT)})" in (ROOT / "CONTRIBUTING.md").read_text()


def test_the_library_is_small():
    "It grows by capability only."
    files = [p for p in (ROOT / "kslottery").glob("*.py") if p.name != "_modidx.py"]
    size = {p.stem: sum(isinstance(n, ast.stmt) for n in ast.walk(ast.parse(p.read_text()))) for p in files}
    assert sum(size.values()) < STATEMENTS, f"{sum(size.values())} statements: {size}"


def test_no_code_of_a_checkpoint_is_run():
    "SECURITY.md promises it: without the argument transformers asks on the terminal, and a `y` runs what it found."
    loads = []
    for module in MODULES:
        for node in ast.walk(ast.parse((ROOT / "kslottery" / f"{module}.py").read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".from_pretrained"):
                trusts = {k.arg: ast.unparse(k.value) for k in node.keywords}.get("trust_remote_code")
                loads.append((module, ast.unparse(node.func), trusts))
    assert [load for load in loads if load[1] != "PeftConfig.from_pretrained"] == [
        ("core", "loader.from_pretrained", "False")  # the one place, see `_load` there
    ]


# Import


def test_the_scan_needs_no_torch(tmp_path):
    "From anywhere; test_face has the import of the face."
    heavy = ("torch", "transformers", "nbdev", "fastcore", "papermill")
    code = f"import sys, kslottery.ks; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout == "[]\n"


def test_public_names_are_there():
    for module in MODULES:
        lib = importlib.import_module(f"kslottery.{module}")
        assert lib.__doc__ and [n for n in lib.__all__ if not hasattr(lib, n)] == []


# The site


def test_the_sidebar_lists_the_modules_in_their_order():
    contents = yaml.safe_load((ROOT / "_quarto.yml").read_text())["website"]["sidebar"]["contents"]
    (library,) = (item["contents"] for item in contents if item.get("section") == "Library")
    assert library == [notebook.name for notebook in rooms().values()]


def test_the_quarto_file_is_one():
    assert (ROOT / "nbs" / "_quarto.yml").is_symlink() and (
        ROOT / "nbs" / "_quarto.yml"
    ).resolve() == ROOT / "_quarto.yml"
