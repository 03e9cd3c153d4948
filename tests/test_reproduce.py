"""The parameter sets of "Reproduce the paper": YAML files that papermill reads and the notebook understands."""

import json

import papermill
import pytest
import yaml

from conftest import ROOT
from kslottery.data import TEMPLATES, language_names
from kslottery.evaluation import METRICS
from kslottery.ks import critical_value
from kslottery.run import notebook_defaults

TUTORIALS = ROOT / "nbs" / "tutorials"
SETS = sorted(TUTORIALS.glob("reproduce-*.yaml"))


@pytest.fixture(scope="module")
def defaults():
    return notebook_defaults(TUTORIALS / "reproduce.ipynb")


def test_there_is_one_for_the_built_in_model_and_one_for_7b():
    assert [p.stem for p in SETS] == ["reproduce-7b", "reproduce-builtin"]


@pytest.mark.parametrize("path", SETS, ids=lambda p: p.stem)
def test_a_set_names_every_parameter_of_the_notebook(path, defaults):
    given = yaml.safe_load(path.read_text())
    assert given.keys() == defaults.keys() == papermill.inspect_notebook(str(TUTORIALS / "reproduce.ipynb")).keys()
    assert {n: type(v) for n, v in given.items()} == {
        n: type(v) for n, v in defaults.items()
    }  # 2e-5 without a point is a text to YAML
    assert given["template"] in TEMPLATES and given["metric"] in METRICS
    assert given["batch_size"] % given["accumulate"] == 0 and given["train"] != given["test"] and not given["fast"]
    assert critical_value(given["alpha"], 4096) > 0 and min(int(k) for k in given["sizes"].split(",")) > 0
    for direction in given["languages"].split(","):
        assert len(language_names(direction)) == 2


def test_the_set_of_the_built_in_model_is_the_default(defaults):
    assert yaml.safe_load((TUTORIALS / "reproduce-builtin.yaml").read_text()) == defaults


def test_the_set_for_7b_is_the_recipe():
    "The authors' scripts, and for Partial Tuning the audit: what the page's table of the recipe says."
    given = yaml.safe_load((TUTORIALS / "reproduce-7b.yaml").read_text())
    recipe = dict(
        lr_embed=2e-5,
        epochs_embed=3,
        batch_size=128,
        accumulate=8,
        lr_partial=1e-2,
        epochs_partial=5,
        train_limit=10000,
        template="alpaca",
        num_beams=4,
        max_new_tokens=256,
        seed=42,
        metric="spbleu",
    )
    assert {n: given[n] for n in recipe} == recipe
    names = [language_names(d) for d in given["languages"].split(",")]
    assert names == [
        ("English", x) for x in ("Catalan", "Spanish", "German", "Romanian", "Danish", "Portuguese")
    ]  # all six published tickets; a code that is not known would stand in the prompt


def test_files_are_found_for_each_direction(tmp_path):
    "The notebook's own function, on files of two directions."
    cells = ["".join(c["source"]) for c in json.loads((TUTORIALS / "reproduce.ipynb").read_text())["cells"]]
    code = next(c for c in cells if "def data(" in c)
    code = code[code.index("def filled(") : code.index("pairs = {")]
    for pair, text in (("ca-en", "Bon dia.\tGood day."), ("en-es", "Good day.\tBuen día.")):
        (tmp_path / f"{pair}.tsv").write_text("\t".join(pair.split("-")) + f"\n{text}\n")
    from kslottery.babel import resolve
    from kslottery.data import load_pairs

    place = dict(resolve=resolve, load_pairs=load_pairs, seed=0, size="small")
    exec(code, place)
    found = {d: place["data"](f"{tmp_path}/{{sorted}}.tsv", d, 0)[0] for d in ("en-ca", "en-es")}
    assert [(p.source, p.target) for p in found.values()] == [("Good day.", "Bon dia."), ("Good day.", "Buen día.")]
