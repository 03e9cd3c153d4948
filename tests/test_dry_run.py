"""Before a run: what it will take, at what rate rows pass, and what is refused; and nothing is left behind."""

import os

import nbformat
import papermill
import pytest
import torch

from conftest import ROOT, invoke
from kslottery.babel import build_world
from kslottery.core import load_model
from kslottery.data import Prompt, encode_all, load_pairs
from kslottery.doctor import plan_run
from kslottery.evaluation import Generation
from kslottery.ks import critical_value, ks_scan
from kslottery.run import parse_parameters
from kslottery.training import Training
from kslottery.tuning import Recipe, active_ids, embed_tune

RECIPE = Recipe(lr_embed=1e-5, epochs_embed=2, lr_partial=1e-2, epochs_partial=3, batch_size=10, progress=False)
PROMPT = Prompt("babel", "Aldan-Borel")


@pytest.fixture(scope="module")
def world():
    found = build_world(size="small", progress=False)
    model, tokenizer = load_model(found.folder)
    examples = encode_all(tokenizer, PROMPT, load_pairs(found.split("train")))
    return model, tokenizer, examples, load_pairs(found.split("test"))[:20]


def test_a_plan_can_be_counted_by_hand(world, tmp_path):
    model, tokenizer, examples, test = world
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainings = [("embed", RECIPE), *[("partial", RECIPE)] * 2, ("full", Training(1e-4, 1, 25))]
    asked = [(test, Generation(30, batch_size=8), 3), (test, Generation(15), 2), ([], Generation(), 9)]
    plan = plan_run(model, tokenizer, examples, PROMPT, trainings, translations=asked, folder=tmp_path / "not" / "yet")
    n = len(examples)
    assert plan.steps == {"embed": 2 * n // 10, "partial": 2 * 3 * n // 10, "full": n // 25}
    weights = sum(p.nbytes for p in model.parameters())
    rows = 16 * len(active_ids(examples)) * model.config.hidden_size  # number, gradient, two moments
    assert plan.memory["model"] == weights and plan.memory["copy"] == 4 * weights and plan.memory["rows"] == rows
    tokens = 10 * max(len(e.ids) for e in examples)  # of a batch, at most; it keeps several numbers of each in a layer
    layers = model.config.num_hidden_layers * model.config.hidden_size * 4
    assert layers * tokens / 2 < plan.memory["activations"] < 100 * layers * tokens
    assert plan.step > 0 and plan.training > 0.5 * plan.step * 2 * n // 10
    assert plan.translating == pytest.approx(plan.sentence * 20 * (3 + 2 / 2))
    assert plan.seconds == plan.training + plan.translating and not (tmp_path / "not").exists()
    assert plan.asked.startswith("<s>") and plan.learned.endswith("</s>") and "\n" not in plan.asked
    assert any("hardly any row can pass" in note for note in plan.notes) and 8 <= len(str(plan).splitlines()) <= 15
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    alone = plan_run(model, tokenizer, examples, PROMPT, [("partial", RECIPE)], alpha=None)
    assert alone.rates is None and "lr_embed" not in str(alone) and alone.translating == 0 and alone.notes == []


def test_at_the_suggested_rate_some_rows_pass_and_below_the_least_none(world):
    model, tokenizer, examples, _ = world
    examples = examples[:200]
    least, suggested = plan_run(model, tokenizer, examples, PROMPT, [("embed", RECIPE)]).rates
    assert least < suggested < 1e-2  # as the tutorial's
    passed = []
    for rate in (least / 2, suggested):
        rows = embed_tune(model, examples, Recipe(rate, 2, batch_size=10, progress=False))
        scan = ks_scan(model.get_input_embeddings().weight, rows.matrix(model), engine="plain", progress=False)
        passed.append(int((scan.statistic >= critical_value(0.05, scan.d)).sum()))
    assert passed[0] == 0 < passed[1]


def test_what_cannot_be_planned(world):
    model, tokenizer, examples, _ = world
    for trainings, words in (
        ([], "begin with rows"),
        ([("full", Training(1e-3))], "begin with rows"),
        ([("embed", RECIPE), ("dora", Training(1e-3))], "kind of training is 'dora': choose embed"),
    ):
        with pytest.raises(ValueError, match=words):
            plan_run(model, tokenizer, examples, PROMPT, trainings)


def notebook(folder, *cells, tag=None):
    made = [nbformat.v4.new_code_cell(source) for source in cells]
    made[0].metadata["tags"] = ["parameters"]
    if tag:
        made[tag].metadata["tags"] = ["plan"]
    nbformat.write(nbformat.v4.new_notebook(cells=made), folder / "mine.ipynb")
    return folder / "mine.ipynb"


CELLS = (
    "alpha = 0.05\nout = 'runs/mine'",
    "from kslottery.run import refuse_unknown_parameters\nrefuse_unknown_parameters()\n"
    "from pathlib import Path\nPath(out).mkdir(parents=True, exist_ok=True)",
    "print(f'the plan at {alpha}')\n1 / (alpha < 1)",
    "Path(out, 'written').touch()",
)


def test_a_dry_run_prints_the_plan_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = notebook(tmp_path, *CELLS, tag=2)
    before = sorted(tmp_path.rglob("*"))
    status, said, error = invoke("run", mine, "--dry-run", "-p", "alpha=0.5")
    assert (status, said) == (0, "the plan at 0.5\n"), error
    assert invoke("run", mine, "--dry-run", "--json")[1] == '{"plan": "the plan at 0.05"}\n'
    status, said, error = invoke("run", mine, "--dry-run", "-p", "alpha=2")
    assert status == 2 and said == "" and "division by zero" in error.splitlines()[-1]
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").touch()
    status, _, error = invoke("run", mine, "--dry-run", "-p", "out=thesis")
    assert status == 2 and "thesis.tex" in error


def test_a_notebook_without_a_plan_says_so(tmp_path):
    mine = notebook(tmp_path, "n = 1", "1 / 0")
    status, said, _ = invoke("run", mine, "--dry-run", "-p", f"n={2}")
    assert status == 0 and "no cell with the tag 'plan'" in said and "nothing else was checked" in said
    assert invoke("run", mine, "--dry-run", "-p", "n=two")[0] == 2


def test_the_quickstart_plans_itself(tmp_path):
    status, said, error = invoke(
        "run", "quickstart", "--dry-run", "-p", "fast=true", "-p", f"out={tmp_path / 'a' / 'b'}"
    )
    assert status == 0, error
    for part in (
        "the model reads:  <s>",
        "steps:",
        "partial 480",
        "lora 120",
        "time:",
        "memory:",
        "disk:",
        "lr_embed:",
    ):
        assert " ".join(part.split()) in " ".join(said.split())
    assert os.listdir(tmp_path) == [] and len(said.splitlines()) <= 15


def test_a_mistyped_parameter_is_refused_by_plain_papermill_too(tmp_path):
    with pytest.raises(ValueError, match=r"no parameter 'aplha' \(did you mean alpha\?\): choose alpha, out$"):
        parse_parameters(["aplha=1"], {"alpha": 0.05, "out": ""})
    tutorial = str(ROOT / "nbs" / "tutorials" / "quickstart.ipynb")
    with pytest.raises(papermill.PapermillExecutionError, match=r"did you mean lr_embed\?") as refused:
        papermill.execute_notebook(
            tutorial, str(tmp_path / "done.ipynb"), {"lr_embedd": 1}, kernel_name="python3", progress_bar=False
        )
    assert refused.value.exec_count == 3  # the imports


def test_a_bar_is_one_output_of_a_cell(tmp_path, monkeypatch):
    monkeypatch.delenv("KSLOTTERY_PROGRESS", raising=False)
    counts = "from kslottery.core import progress_bar\nimport time\nwith progress_bar(6, 'counting') as bar:\n"
    mine = notebook(
        tmp_path, "n = 1", counts + "    for i in range(6):\n        time.sleep(0.3)\n        bar.update(1)"
    )
    papermill.execute_notebook(str(mine), str(tmp_path / "done.ipynb"), kernel_name="python3", progress_bar=False)
    outputs = nbformat.read(tmp_path / "done.ipynb", as_version=4).cells[-1].outputs
    assert [o.output_type for o in outputs] == ["display_data"]
