"""One quickstart run from all sides: what it leaves, whether numbers follow from texts, whether its claims hold."""

import copy
import json
import os
import re
import subprocess
import sys

import jsonschema
import nbformat
import numpy as np
import pytest
import sacrebleu
import torch
from peft import PeftModel

from conftest import DATA, ROOT, given, kslottery
from kslottery.babel import build_world
from kslottery.core import load_model
from kslottery.data import load_pairs
from kslottery.evaluation import Generation, score, translate
from kslottery.rows import TunedRows
from kslottery.run import SITE
from kslottery.ticket import Ticket

QUICKSTART = ROOT / "nbs" / "tutorials" / "quickstart.ipynb"
SCHEMA = json.loads((ROOT / "kslottery" / "results.schema.json").read_text())


def outputs(folder, name):
    return [json.loads(line) for line in (folder / "outputs" / f"{name}.jsonl").read_text().splitlines()]


def check_claims(results):
    "What the issue of the built-in world is: the base does not stop, few rows do as well as all, random rows do not."
    s = results["systems"]
    embed, partial, random = s["embed_tuning"], s["partial_tuning"], s["random_rows"]
    assert s["base"]["eos_rate"] < 0.1
    for rule in ("whole", "first_line"):
        a, b = embed[rule]["bleu"], partial[rule]["bleu"]
        assert abs(a - b) <= 0.1 * max(a, b), (rule, a, b)
    assert random["whole"]["bleu"] < 0.5 * partial["whole"]["bleu"], (random["whole"], partial["whole"])


def test_what_it_leaves_and_says(quickstart, results):
    out, said, progress = quickstart
    assert sorted(p.name for p in out.iterdir()) == [
        "outputs",
        "quickstart.ipynb",
        "report.html",
        "results.json",
        "ticket",
    ]
    assert all(sentence in said for sentence in results["summary"]) and str(out / "report.html") in said
    sections = re.findall(r"^\[\d+/\d+\] (.*)", progress, flags=re.M)
    assert "2. Embed Tuning" in sections and "5. What was found" in sections
    assert re.search(r"%.*\[\d\d:\d\d<", progress)  # bars with an estimate


def test_the_results_follow_their_schema(results):
    jsonschema.validate(results, SCHEMA)
    broken = copy.deepcopy(results)
    del broken["systems"]["random_rows"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, SCHEMA)


def recompute(folder, name):
    references = [r["target"] for r in outputs(folder, "references")]
    texts = outputs(folder, name)
    assert [t["id"] for t in texts] == [r["id"] for r in outputs(folder, "references")]
    whole = [" ".join(t["text"].split()) for t in texts]
    first = [" ".join(t["text"].strip().split("\n")[0].split()) for t in texts]
    scores = lambda x: {
        "bleu": sacrebleu.corpus_bleu(x, [references]).score,
        "chrf": sacrebleu.corpus_chrf(x, [references]).score,
    }
    return {
        "whole": scores(whole),
        "first_line": scores(first),
        "eos_rate": np.mean([t["ended"] for t in texts]),
        "mean_length": np.mean([len(t["text"]) for t in texts]),
    }


def test_every_score_follows_from_the_stored_texts(quickstart, results):
    for name, system in results["systems"].items():
        again = recompute(quickstart[0], name)
        assert {k: system[k] for k in again} == again, name
    assert {p.stem for p in (quickstart[0] / "outputs").iterdir()} == {*results["systems"], "references"}


@pytest.fixture(scope="module")
def loaded(quickstart):
    ticket = Ticket.load(quickstart[0] / "ticket")
    model, tokenizer = ticket.base()
    references = outputs(quickstart[0], "references")
    pairs = load_pairs(**ticket.provenance.test)
    assert [p.target for p in pairs] == [r["target"] for r in references]
    return ticket, model, tokenizer, pairs


def test_the_texts_follow_from_the_ticket(quickstart, loaded, results):
    "The stored ticket translates as the run did, ours and PEFT's way; with its rows shuffled the scores change."
    ticket, model, tokenizer, pairs = loaded
    assert ticket.provenance.generation == Generation(max_new_tokens=60, batch_size=25)
    stored = [t["text"] for t in outputs(quickstart[0], "partial_tuning")]

    def said(lm, rows=None):
        more = dict(generation=ticket.provenance.generation, progress=False)
        return translate(lm, tokenizer, pairs, ticket.prompt, rows, **more)

    assert [t.text for t in said(model, ticket.rows)] == stored
    shuffled = TunedRows(ticket.rows.ids, ticket.rows.weight.roll(1, dims=0))
    assert score(said(model, shuffled), pairs)["whole"] != results["systems"]["partial_tuning"]["whole"]
    adapted = PeftModel.from_pretrained(copy.deepcopy(model), quickstart[0] / "ticket").eval()
    assert [t.text for t in said(adapted)] == stored


def test_the_ticket_is_what_the_scan_selects(loaded, results):
    ticket, model, _, _ = loaded
    assert ticket.ids.tolist() == results["ticket"]["ids"] == ticket.scan.select(results["ticket"]["alpha"]).tolist()
    assert results["ticket"]["size"] == len(ticket.ids) and results["ticket"]["tokens"] == list(
        ticket.provenance.tokens
    )
    moved = (ticket.embed_rows.delta(model) != 0).any(1)
    assert set(ticket.ids) <= set(ticket.embed_rows.ids[moved].tolist())
    assert torch.equal(ticket.rows.ids, torch.tensor(sorted(ticket.ids)))
    exact = [h for h in ticket.sentences if not h.startswith("~")]
    assert len(exact) == results["sentences"]["train"] == len(set(exact)) == len(ticket.sentences) / 2


def test_tuned_parameters_are_counted(loaded, results):
    ticket, model, _, _ = loaded
    d, k = ticket.provenance.d, len(ticket.ids)
    counted = {n: s["trainable_parameters"] for n, s in results["systems"].items()}
    assert (
        counted["base"] == 0
        and counted["one_row"] == d
        and counted["full_fine_tuning"] == sum(p.numel() for p in model.parameters())
    )
    assert {
        counted[n] for n in ("partial_tuning", "partial_transfer", "top_frequency_rows", "random_rows", "noise_rows")
    } == {k * d}
    assert counted["embed_tuning"] == len(ticket.embed_rows) * d


def test_the_claims_hold_at_the_fast_size(results):
    check_claims(results)


def test_the_ticket_knows_what_to_be_audited_with(quickstart):
    status, said, error = kslottery(
        "audit", quickstart[0] / "ticket", "--fast", "--out", quickstart[0].parent / "audit"
    )
    assert status == 0, error
    assert said.strip().split("\n")[-1].startswith("Stopping: ")  # so the built-in world was made
    assert Ticket.load(quickstart[0] / "ticket").audit["verdict"] == "stopping"


def test_the_report_is_self_contained(quickstart, results):
    page = (quickstart[0] / "report.html").read_text()
    assert "<script" not in page and "data:image/png;base64" in page and '<details class="code">' in page
    assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//""", re.sub(r'<a [^>]*href="[^"]*"', "", page))
    assert "Traceback" not in page
    unfolded = re.sub(r'(?s)<details class="code">.*?</details>', "", page)
    settings = re.sub("<[^>]*>", "", unfolded)  # as they were in this run
    assert re.search("fast = True +# a smaller world", settings) and "# Parameters" not in settings
    assert (
        f"{SITE}babel.html" in page and ".ipynb)" not in page and "kslottery run quickstart -p fast=True" in page
    )  # where it leads, and how it was made
    assert "<s>" not in page and (
        "<s>" not in results["ticket"]["tokens"] or "&lt;s&gt;" in page
    )  # tokens are text, whatever they look like


def papermill(*words, cwd):
    return subprocess.run(
        [sys.executable, "-m", "papermill", "-k", "python3", *map(str, words)], cwd=cwd, capture_output=True, text=True
    )


def test_papermill_from_another_directory(tmp_path):
    done = papermill(
        QUICKSTART,
        "out.ipynb",
        "-p",
        "alpha",
        "0.01",
        "-p",
        "test_limit",
        "7",
        "-p",
        "fast",
        "True",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "runs" / "quickstart" / "results.json").read_text())
    assert results["seed"] == 0 and results["ticket"]["alpha"] == 0.01
    jsonschema.validate(results, SCHEMA)


def test_an_empty_ticket_is_a_result(tmp_path):
    status, said, error = kslottery(
        "run",
        "quickstart",
        "-p",
        "fast=true",
        "-p",
        "lr_embed=1e-6",
        "-p",
        "epochs=1",
        "-p",
        "test_limit=8",
        "-p",
        f"out={tmp_path / 'r'}",
    )
    assert status == 0, error
    results = json.loads((tmp_path / "r" / "results.json").read_text())
    jsonschema.validate(results, SCHEMA)
    assert results["ticket"]["size"] == 0 and "top_k" in said and "No row passes" in said
    assert results["systems"]["partial_tuning"]["whole"] == results["systems"]["base"]["whole"]
    assert set(results["systems"]) == {"base", "embed_tuning", "partial_tuning"}  # nothing to compare, nothing trained
    page = (tmp_path / "r" / "report.html").read_text()
    said = re.sub(r"<[^>]*>", " ", re.sub(r'(?s)<details class="code">.*?</details>', "", page))
    assert not re.search(r"\bbest 0\b|\bhas 0 rows|\b0% of these|\.\*\*|\bnan\b", said)
    assert len(Ticket.load(tmp_path / "r" / "ticket").ids) == 0


BAD = [
    (["alpha=1.5"], "alpha is 1.5"),
    (["model=/no/such/model"], "model /no/such/model is neither"),
    (["train=/no/such.tsv"], "/no/such.tsv cannot be found"),
    (["template=Say it: {target}"], "needs {source} exactly once"),
]


@pytest.mark.parametrize("parameters, words", BAD, ids=[b[0][0].split("=")[0] for b in BAD])
def test_bad_input_gets_one_sentence(tmp_path, parameters, words):
    (tmp_path / "mine.txt").write_text("precious")
    status, said, error = kslottery(
        "run", "quickstart", "-p", "fast=true", *[x for p in parameters for x in ("-p", p)], cwd=tmp_path
    )
    assert status == 1 and words in error.splitlines()[-1] and "Traceback" not in error
    assert (tmp_path / "mine.txt").read_text() == "precious"
    assert sorted(p.name for p in (tmp_path / "runs" / "quickstart").iterdir()) == ["quickstart.ipynb"]


VALUES = [
    ("alpha", 0, "alpha is 0"),
    ("top_k", -3, "top_k is -3"),
    ("alpha", 1.5, "alpha is 1.5"),
    ("epochs", 0, "epochs is 0"),
    ("seed", -1, "seed is -1"),
    ("num_beams", 0, "num_beams is 0"),
    ("arms", "full,none", "an arm is 'none': choose all, transfer"),
    ("lr_embed", -1.0, "lr_embed is -1.0"),
    ("lr_partial", 0.0, "lr_partial is 0.0"),
    ("lr_lora", 0.0, "lr_lora is 0.0"),
    ("lr_full", float("inf"), "lr is inf"),
    ("batch_size", 0, "batch_size is 0"),
    ("train_limit", -5, "train_limit is -5"),
    ("test_limit", -1, "test_limit is -1"),
    ("max_new_tokens", 0, "max_new_tokens is 0"),
    ("epsilon", 2.0, "epsilon is 2.0"),
    ("delta", 0.0, "delta is 0.0"),
    ("mode", "neither", "mode is 'neither'"),
]


def test_bad_values_are_refused_in_the_settings_cell(tmp_path, monkeypatch):
    "Before any file is read."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kslottery.babel.resolve", lambda *a: pytest.fail("it went on"))
    cells = [c for c in nbformat.read(QUICKSTART, as_version=4).cells if c.cell_type == "code"][:3]
    place = {}
    for cell in cells[:2]:  # the parameters and the imports
        exec(cell.source, place)
    for name, value, words in VALUES:
        with pytest.raises(ValueError, match=re.escape(words)):
            exec(cells[2].source, place | {name: value})
    assert not any(tmp_path.iterdir())


def test_arms_by_choice(tmp_path):
    "One row asked for and one arm, which is the same row: it is not tuned again, and nothing else is."
    settings = dict(fast="true", epochs=1, train_limit=60, test_limit=6, max_new_tokens=20, top_k=1, arms="one")
    settings["out"] = tmp_path / "r"
    status, said, error = kslottery("run", "quickstart", *given(settings))
    assert status == 0, error
    results = json.loads((tmp_path / "r" / "results.json").read_text())
    jsonschema.validate(results, SCHEMA)
    assert results["arms"] == ["one_row"] and "random" not in said and "the single row" in said
    assert set(results["systems"]) == {"base", "embed_tuning", "partial_tuning", "one_row"}
    assert outputs(tmp_path / "r", "one_row") == outputs(tmp_path / "r", "partial_tuning")


def test_what_is_the_same_is_translated_once():
    source = next(c.source for c in nbformat.read(QUICKSTART, as_version=4).cells if "def evaluate" in c.source)
    asked, scores = [], {"whole": {"bleu": 0}, "first_line": {"bleu": 0}, "eos_rate": 0}
    place = {
        "translate": lambda *a, **more: asked.append(a) or ["text"],
        "score": lambda *a: scores,
        "trainable_parameters": len,
        "TunedRows": TunedRows,
        **dict.fromkeys(("model", "tokenizer", "test_pairs", "prompt", "generation")),
    }
    exec(source.partition('evaluate("base")')[0], place)
    rows, same = TunedRows([3], torch.ones(1, 4)), TunedRows([3], torch.ones(1, 4))
    for name, tuned in (("base", None), ("empty", rows.restrict([])), ("ticket", rows), ("one_row", same)):
        place["evaluate"](name, tuned)
    assert len(asked) == 2 and [*place["outputs"]] == ["base", "empty", "ticket", "one_row"]


def test_a_model_of_16_bits(tmp_path):
    "A sentence alone may read otherwise than in its batch: no reason to fail in the last cell."
    world = build_world(size="small", progress=False)
    model, tokenizer = load_model(world.folder, dtype="bfloat16")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    settings = dict(
        model=tmp_path / "model",
        train=world.split("train"),
        test=world.split("test"),
        languages="Aldan-Borel",
        out=tmp_path / "r",
        fast="true",
        train_limit=60,
        test_limit=20,
        epochs=1,
        max_new_tokens=20,
        top_k=2,
    )
    status, said, error = kslottery("run", "quickstart", *given(settings))
    assert status == 0, error
    assert Ticket.load(tmp_path / "r" / "ticket").provenance.dtype == "bfloat16"


def test_a_strangers_folder_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years")
    status, _, error = kslottery("run", "quickstart", "-p", f"out={tmp_path}")
    assert status == 2 and "thesis.tex" in error and os.listdir(tmp_path) == ["thesis.tex"]


def test_real_text_in_a_minute(tmp_path):
    "Pre-train on real pairs, save a checkpoint, run the quickstart on NTREX with it: small, and right."
    if not DATA.is_dir():
        pytest.skip(f"no real parallel text at {DATA}: set KSLOTTERY_DATA to the folder that has it")
    status, _, error = kslottery(
        "run", "pretrain", "-p", f"data={DATA}", "-p", "fast=true", "-p", f"out={tmp_path / 'p'}"
    )
    assert status == 0, error
    ntrex = f"{DATA}/ntrex/eng.txt,{DATA}/ntrex/cat.txt"
    settings = dict(
        model=tmp_path / "p" / "model",
        train=DATA / "train" / "en-ca.tsv.gz",
        test=ntrex,
        languages="en-ca",
        template="explicit",
        out=tmp_path / "q",
        fast="true",
        train_limit=60,
        test_limit=10,
        epochs=1,
        max_new_tokens=30,
        top_k=5,
    )
    status, said, error = kslottery("run", "quickstart", *given(settings))
    assert status == 0, error
    results = json.loads((tmp_path / "q" / "results.json").read_text())
    jsonschema.validate(results, SCHEMA)
    assert results["ticket"]["size"] == 5 and results["sentences"] == {"train": 60, "test": 10}
    assert "hardly translates at all" in said  # the report says plainly how poor the base model is
    for name, system in results["systems"].items():
        again = recompute(tmp_path / "q", name)
        assert {k: system[k] for k in again} == again


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2, 7, 1234])
def test_the_claims_hold_at_full_size(seed, tmp_path):
    status, _, error = kslottery("run", "quickstart", "-p", f"seed={seed}", "-p", f"out={tmp_path / 'r'}")
    assert status == 0, error
    check_claims(json.loads((tmp_path / "r" / "results.json").read_text()))
