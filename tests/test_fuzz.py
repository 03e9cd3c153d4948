"""A short slice of `make fuzz` and `make faults`, that both find what they look for, and the page that shows both."""

import ast
import contextlib
import json
import os
import random
import re
import signal
import sys
import time
from collections import Counter

import pytest
import typer.testing

import faults
import fuzz
import kslottery
from conftest import ROOT
from kslottery import audit, babel, checkpoints, cli
from kslottery.core import must
from kslottery.data import load_pairs

CASES = {"tickets": 150, "tables": 300, "templates": 400, "checkpoints": 60, "cards": 50, "options": 25}
ACTS = ("certify", "whole_folder", "whole_files", "certificates", "audits", "files", "merges")


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    "What the harness puts in place of slow things, and of a home, is gone after each test."
    before = dict(os.environ)
    for module, name in ((babel, "_build"), (checkpoints, "png"), (audit, "png"), (cli, "execute")):
        monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setattr(typer.testing, "_get_command", typer.testing._get_command)
    yield
    os.environ.clear()
    os.environ |= before


@pytest.mark.parametrize("name", fuzz.KINDS)
def test_odd_input_gives_a_result_or_one_sentence(name):
    tried, refused, found, _ = fuzz.mutated(name, 0, 60, most=CASES[name], room=fuzz.memory_room())
    assert tried == CASES[name] and refused < 0.95 * tried and (refused > 0.1 * tried or name == "cards")
    assert not [(f["rule"], f["place"], f["message"][:100], f["done"]) for f in fuzz.distinct(found)]


@pytest.mark.slow
@pytest.mark.parametrize("name", fuzz.KINDS)
def test_odd_input_for_five_minutes(name):
    seed = random.randrange(10**6)
    tried, _, found, _ = fuzz.mutated(name, seed, 300 / len(fuzz.KINDS), room=fuzz.memory_room())
    assert tried and not fuzz.distinct(found), f"again: python tests/fuzz.py --kind {name} --seed {seed}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tickets", "tables", "templates"])
def test_hypothesis_finds_nothing_either(name):
    tried, _, found, took = fuzz.shrunk(name, 0, 20, room=fuzz.memory_room())
    assert tried and not found and took < 20 + fuzz.HANG + 5


def test_an_artefact_is_old_or_new():
    found = faults.run(["kills", "races", "soak"], 0, 0.02, ACTS)
    assert {part: found[part].tried > 3 for part in found} == dict.fromkeys(("kills", "races", "soak"), True)
    assert not [fault for part in found.values() for fault in part.as_dict()["faults"]]


@pytest.mark.slow
@pytest.mark.parametrize("part", faults.PARTS)
def test_an_artefact_is_old_or_new_whatever_happens(part):
    found = faults.run([part], 1, 0.2)[part].as_dict()
    assert (found["tried"] or found["skipped"]) and not found["faults"]


def test_writing_in_place_is_found_out(monkeypatch):
    "With a library that writes where the artefact lies, kills and races fail: they can fail."
    monkeypatch.setattr(faults, "whole_file", contextlib.nullcontext)
    monkeypatch.setattr(faults, "whole_files", contextlib.nullcontext)
    found = faults.run(["kills", "races"], 0, 0.02, ["whole_file", "whole_files", "files"])
    kills, races = ({*part.sorts} for part in found.values())
    assert {"whole_file: torn", "whole_files: mixed after the next command"} <= kills
    assert any("it is torn" in fault for fault in races)


def test_a_file_holds_the_tallies_of_both(tmp_path, capsys):
    file = tmp_path / "new" / "faults.json"
    fuzz.store(file, "faults", {"kills": {"tried": 1}})
    fuzz.main(["--cases", "30", "--kind", "templates", "--seed", "5", "--out", str(file)])
    fuzz.store(file, "faults", {"soak": {"tried": 2}})
    found = json.loads(file.read_text())
    assert {part: {name: row["tried"] for name, row in rows.items()} for part, rows in found.items()} == {
        "faults": {"kills": 1, "soak": 2},
        "fuzz": {"templates": 30},
    }
    assert {"seed", "engine", "seconds", "versions", "failed", "faults"} <= {*found["fuzz"]["templates"]}
    assert "30 tried" in capsys.readouterr().out


def test_too_few_cases_are_no_success(monkeypatch, capsys):
    monkeypatch.setattr(fuzz, "shared_out", lambda *words: (7, 1, [], 1.0))
    assert fuzz.main(["--cases", "7", "--kind", "tables"]) == 0
    assert fuzz.main(["--cases", "8", "--kind", "tables"]) == 1
    assert "1 of 8 cases were not reached" in capsys.readouterr().out
    monkeypatch.setattr(fuzz, "shared_out", lambda *words: (0, 0, [], 1.0))
    assert fuzz.main(["--kind", "tables"]) == 1


def test_shares_are_whole():
    assert sum(fuzz.shares(100_000, fuzz.KINDS).values()) == 100_000 and {*fuzz.SHARES} == {*fuzz.KINDS}
    assert fuzz.shares(7, ["cards"]) == {"cards": 7}


def test_a_stored_sentence_names_no_place_of_this_machine():
    assert fuzz.unplaced("ValueError: /dev/shm/x-1/data.tsv, line 3: 'a/b'") == "ValueError: PATH, line 3: 'a/b'"


@pytest.mark.parametrize(
    "said",
    ["list index out of range", "'NoneType' object is not iterable", "'weight_map'", "", "[Errno 2] No such file: 'x'"]
    + ["Expecting value: line 1 column 1 (char 0)", "invalid literal for int() with base 10: 'x'", "Circular reference"]
    + [
        "unsupported operand type(s) for /: 'str' and 'int'",
        "'utf-8' codec can't decode byte 0xff",
        "embedded null byte",
    ],
)
def test_bare_python_is_told_from_a_sentence(said):
    assert fuzz.BARE.match(said)
    assert not fuzz.BARE.match(f"data.tsv is damaged ({said}): copy it again")


class Trap(fuzz.Kind):
    "Breaks every rule, in turn."

    ACTS = (
        lambda: load_pairs("missing.tsv"),
        lambda: [][1],
        lambda: int("x"),
        lambda: time.sleep(60),
        lambda: os.kill(os.getpid(), signal.SIGKILL),
        lambda: bytearray(2**34),
        lambda: input("shall I?"),
        lambda: open(os.environ["KSLOTTERY_FUZZ_RAN"], "w").close(),
        lambda: sys.exit(0),
        lambda: must(False, "the table is red", lambda text: ValueError(f"{text}\x1b[31m: mend it")),
        lambda: 1,
    )

    def case(self, number, here):
        return [f"number {number}"], self.ACTS[number]


def test_the_harness_sees_every_sort_of_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "rng_of", lambda kind, seed, number: number)
    kind, rules, at = Trap(tmp_path), Counter(), 0
    while at < len(Trap.ACTS):
        _, _, found, last = fuzz.watch(kind, "trap", 0, at, len(Trap.ACTS) - at, time.time() + 60, hang=0.5)
        rules += Counter(f["rule"] for f in found)
        at = last + 1
    assert rules["traceback"] == 2 and "many lines" not in rules
    assert {"traceback", "bare", "hang", "died", "contract", "code ran", "exit", "control signs"} <= {*rules}


def test_a_case_is_the_same_again(tmp_path):
    kind = fuzz.Tables(tmp_path)
    told = [kind.case(fuzz.rng_of("tables", 3, n), tmp_path / f"{again}-{n}")[0] for again in "ab" for n in range(20)]
    plain = [[part.replace(f"/{again}-", "/") for part in one] for again, one in zip("a" * 20 + "b" * 20, told)]
    assert plain[:20] == plain[20:]


def test_a_word_for_every_state():
    old, new = {"a": "1", "b": "1"}, {"a": "2", "b": "2"}
    states = [old, new, None, {"a": "1", "b": "2"}, {"a": "1", "b": "3"}]
    assert [faults.named(s, old, new) for s in states] == ["old", "new", "lost", "mixed", "torn"]


PAGE, STORED = (ROOT / name for name in ("nbs/explanation/security.ipynb", "benchmarks/results/faults.json"))


def page(capsys, monkeypatch, folder):
    "What each code cell of the page says in a checkout that lies in a folder."
    monkeypatch.setattr(kslottery, "__file__", str(folder / "kslottery" / "__init__.py"))
    names: dict = {}
    for cell in json.loads(PAGE.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            *body, last = ast.parse("".join(cell["source"])).body
            shown = isinstance(last, ast.Expr) and not ast.unparse(last).startswith("print")
            exec(compile(ast.Module([*body, *([] if shown else [last])], []), str(PAGE), "exec"), names)
            value = eval(compile(ast.Expression(last.value), str(PAGE), "eval"), names) if shown else None
            made = value.data if type(value).__name__ == "Markdown" else value._repr_html_() if shown else ""
            yield capsys.readouterr().out + made, cell["outputs"]


def row(tried, *found):
    facts = {"tried": tried, "failed": sum(f["times"] for f in found), "faults": list(found)}
    return facts | {"seconds": 2.4, "seed": 7, "versions": {"python": "3.11"}}


FUZZ = {name: row(1000) for name in fuzz.KINDS}
FAULTS = {name: row(100) for name in faults.PARTS}
TORN = {"fault": "save: torn <b>", "times": 3, "example": ""}
BARE = {"rule": "bare", "message": "KeyError: 1", "place": "data.py", "times": 2, "case": 11}


@pytest.mark.parametrize(
    "found, said",
    [
        (None, ["No odd inputs are stored", "No disturbed commands", "Nothing is stored", "is not here"]),
        ({"fuzz": FUZZ, "faults": FAULTS}, ["Of 6,000 odd inputs, none failed.", "Of 600 dist", "Nothing is listed"]),
        (
            {"fuzz": {**FUZZ, "tables": row(10, BARE)}, "faults": {**FAULTS, "kills": row(50, TORN)}},
            [
                "Of 5,010 odd inputs, 2 failed. What failed is listed below.",
                "--kind tables --seed 7 --case 11",
                "&lt;b&gt;",
            ]
            + ["generations, 3 failed.", "--only kills --seed 7"],
        ),
        (
            {"faults": {"full": row(0) | {"skipped": "(skipped: no tmpfs)"}, "soak": row(9)}},
            ["No odd inputs", "none failed. Not tried here: kills, signals, races, full, permissions.", "skipped: no"],
        ),
    ],
    ids=["absent", "good", "bad", "some"],
)
def test_the_page_is_true_under_any_numbers(found, said, tmp_path, capsys, monkeypatch):
    if found is not None:
        file = tmp_path / "benchmarks" / "results" / "faults.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(found))
    text = "\n".join(text for text, _ in page(capsys, monkeypatch, tmp_path))
    assert [sentence for sentence in said if sentence not in text] == []
    assert (" failed. What failed" in text) == bool(
        found and any(r["failed"] for p in found.values() for r in p.values())
    )


def test_the_page_explains_every_kind_and_part():
    text = "".join("".join(cell["source"]) for cell in json.loads(PAGE.read_text(encoding="utf-8"))["cells"])
    assert [name for name in (*fuzz.KINDS, *faults.PARTS) if f'"{name}": "' not in text] == []


@pytest.mark.skipif(not STORED.exists(), reason="make fuzz and make faults have not stored anything")
def test_the_stored_file_is_whole_and_the_page_says_what_it_says(capsys, monkeypatch):
    text = STORED.read_text(encoding="utf-8")
    found = json.loads(text)
    least = {"kills": 500, "races": 200, "soak": 10_000}
    assert {*found["fuzz"]} == {*fuzz.KINDS} and sum(row["tried"] for row in found["fuzz"].values()) >= 100_000
    assert {name: row["tried"] >= least.get(name, 1) for name, row in found["faults"].items()} == dict.fromkeys(
        faults.PARTS, True
    )
    assert not re.search(r"/(tmp|dev|root|home|work)/", text)
    for made, outputs in page(capsys, monkeypatch, ROOT):
        data = [output.get("data", {}) for output in outputs]
        kept = ["".join(o.get("text") or d.get("text/markdown") or d["text/html"]) for o, d in zip(outputs, data)]
        assert "".join(kept) == made, "make notebooks NB=nbs/explanation/security.ipynb"
