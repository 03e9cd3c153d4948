"""The tasks tutorial by the command line, on files of prompts and completions: what it leaves, and its numbers."""

import gzip
import json

import numpy as np
import pytest
from scipy.stats import binomtest

from conftest import given, kslottery
from kslottery.babel import make_task


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "One run on two small files (one of them gzipped): the built-in world's prompts without their instruction."
    room = tmp_path_factory.mktemp("tasks")
    for task, ending in (("classify", "jsonl"), ("summarise", "jsonl.gz")):
        for split, size in (("train", 40), ("test", 12)):
            records = [{**r, "prompt": r["prompt"].split("\n", 1)[1]} for r in make_task(task, split, 0)[:size]]
            text = "".join(json.dumps(r) + "\n" for r in records).encode()
            (room / f"{task}-{split}.{ending}").write_bytes(gzip.compress(text) if ending.endswith("gz") else text)
    files = {
        split: ",".join(str(room / f"{t}-{split}.{e}") for t, e in (("classify", "jsonl"), ("summarise", "jsonl.gz")))
        for split in ("train", "test")
    }
    settings = dict(fast="true", epochs=1, top_k=3, max_new_tokens=12, seed=0, out=room / "run", **files)
    status, said, error = kslottery("run", "tasks", *given(settings), cwd=room)
    assert status == 0, error
    return room, said, json.loads((room / "run" / "results.json").read_text())


def test_what_it_leaves_and_says(run):
    room, said, results = run
    assert sorted(p.name for p in (room / "run").iterdir()) == ["outputs", "report.html", "results.json", "tasks.ipynb"]
    assert list(results["tasks"]) == ["classify", "summarise"] and all(s in said for s in results["summary"])
    page = (room / "run" / "report.html").read_text()
    assert "Traceback" not in page and "<s>" not in page  # tokens are text, whatever they look like
    arms = {"base", "embed_tuning", "ticket", "random_rows", "wording_rows", "other_rows"}
    for task, other in (("classify", "summarise"), ("summarise", "classify")):
        assert set(results["tasks"][task]) == arms | {f"ticket_of_{other}"}
        assert all(set(r) == {"whole", "first_line", "eos_rate", "rows"} for r in results["tasks"][task].values())
        assert results["origin"][task]["ticket"] == results["tasks"][task]["ticket"]["rows"] == 3
        assert (
            sum(results["origin"][task][k] for k in ("wording rows", "other rows"))
            == results["tasks"][task]["embed_tuning"]["rows"]
        )
    assert {(t["task"], t["opening_of"], t["seed"]) for t in results["tickets"]} == {
        *((a, b, 0) for a in results["tasks"] for b in results["tasks"]),
        *((a, a, 1) for a in results["tasks"]),
    }


def test_every_share_follows_from_the_stored_texts(run):
    room, _, results = run
    read = lambda task, name: [
        json.loads(line) for line in (room / "run" / "outputs" / task / f"{name}.jsonl").read_text().splitlines()
    ]
    for task, systems in results["tasks"].items():
        references = [" ".join(r["target"].split()) for r in read(task, "references")]
        assert len(references) == 12
        for name, result in systems.items():
            texts = read(task, name)
            right = {
                "whole": sum(" ".join(t["text"].split()) == r for t, r in zip(texts, references)),
                "first_line": sum(
                    " ".join(t["text"].strip().split("\n")[0].split()) == r for t, r in zip(texts, references)
                ),
            }
            for rule, k in right.items():
                low, high = binomtest(k, 12).proportion_ci(method="exact")
                assert result[rule] == {"accuracy": k / 12, "ci": [pytest.approx(low), pytest.approx(high)], "n": 12}, (
                    task,
                    name,
                )
            assert result["eos_rate"] == np.mean([t["ended"] for t in texts])


def test_every_overlap_follows_from_the_tickets(run):
    results = run[2]
    tickets = {(t["task"], t["opening_of"], t["seed"]): set(t["ids"]) for t in results["tickets"]}
    jaccard = lambda a, b: len(tickets[a] & tickets[b]) / len(tickets[a] | tickets[b])
    a, b = results["tasks"]
    expected = {
        "other seed": [jaccard((t, t, 0), (t, t, 1)) for t in (a, b)],
        "other opening": [jaccard((a, a, 0), (a, b, 0)), jaccard((b, b, 0), (b, a, 0))],
        "other task": [jaccard((a, a, 0), (b, a, 0)), jaccard((b, b, 0), (a, b, 0))],
        "other task and opening": [
            jaccard((a, a, 0), (b, b, 0)),
            jaccard((a, a, 1), (b, b, 1)),
            jaccard((a, b, 0), (b, a, 0)),
        ],
    }
    for kind, values in expected.items():
        assert sorted(results["overlap"][kind]["jaccard"]) == sorted(values), kind


def test_bad_input_gets_one_sentence(run, tmp_path):
    good = run[0] / "classify-train.jsonl"
    status, _, error = kslottery(
        "run",
        "tasks",
        "-p",
        "fast=true",
        "-p",
        f"train={good},{good}",
        "-p",
        f"test={good}",
        "-p",
        f"out={tmp_path / 'r'}",
    )
    assert status == 1 and "2 training sets and 1 test sets" in error.splitlines()[-1] and "Traceback" not in error
