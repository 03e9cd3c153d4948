"""The front door: what `import kslottery` offers, what it costs, and the programs that users write, as they stand."""

import ast
import contextlib
import importlib
import os
import re
import subprocess
import sys

import matplotlib
import pytest

import kslottery
from conftest import ROOT
from kslottery import load_pairs
from kslottery.babel import build_world

matplotlib.use("Agg")
HEAVY = "torch transformers scipy numba pandas numpy accelerate peft datasets matplotlib safetensors".split()


def fresh(code):
    "What a Python that has imported nothing prints."
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split("\n")


def test_the_import_is_light():
    seconds = "import time; t = time.process_time(); import kslottery; print(time.process_time() - t)"
    said = fresh(f"{seconds}; import sys; print([m for m in {HEAVY} if m in sys.modules])")
    assert float(said[0]) < 0.3 and said[1] == "[]"


def test_names_are_seen_before_they_are_used():
    names = fresh("import kslottery, sys; print(dir(kslottery)); print('torch' in sys.modules)")
    assert set(kslottery.__all__) <= set(ast.literal_eval(names[0])) and names[1] == "False"
    assert kslottery.__doc__ and re.fullmatch(r"\d+\.\d+\.\d+", kslottery.__version__)


@pytest.mark.parametrize("name", kslottery.__all__)
def test_a_name_is_that_of_its_module(name):
    module = importlib.import_module(f"kslottery.{kslottery._WHERE[name]}")
    assert getattr(kslottery, name) is getattr(module, name) and name in module.__all__


def test_an_unknown_name_is_one_sentence():
    with pytest.raises(AttributeError, match="kslottery has no find_tickets: it has .*find_ticket"):
        _ = kslottery.find_tickets
    with pytest.raises(ImportError, match="nothing_like_it"):
        from kslottery import nothing_like_it  # noqa: F401


def test_the_face_that_tools_see_is_the_face():
    "Names are imported when they are used; type checkers and editors read the stub, which says the same."
    tree = ast.parse((ROOT / "kslottery" / "__init__.pyi").read_text())
    seen = {
        alias.asname: node.module
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if node.level == 1 and alias.asname == alias.name
    }
    assert seen == kslottery._WHERE
    rest = [ast.unparse(node) for node in tree.body if not isinstance(node, ast.ImportFrom)]
    assert rest == ["__version__: str"] and isinstance(kslottery.__version__, str)
    assert (ROOT / "kslottery" / "py.typed").exists()
    assert (ROOT / "kslottery" / "__init__.py").read_text().startswith('__version__ = "')


@pytest.mark.slow
def test_a_type_checker_sees_the_face(tmp_path):
    "Every name has its type, and a name that is not there is an error."
    uses = [f"kslottery.{name}" for name in kslottery.__all__]
    wrong = ["kslottery.find_tickets", "kslottery.load_pairs(1)"]
    code = [f"reveal_type({use})" for use in uses] + wrong
    (tmp_path / "user.py").write_text("\n".join(["import kslottery", *code, "from kslottery import *"]) + "\n")
    words = ["-m", "mypy", "--config-file", ROOT / "pyproject.toml", "--cache-dir", tmp_path / "cache", "user.py"]
    place = os.environ | {"MYPYPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, env=place)
    said = [line for line in done.stdout.split("\n") if line.startswith("user.py")]
    shown = [line for line in said if "Revealed type is" in line]
    assert len(shown) == len(uses) and not [line for line in shown if 'is "Any"' in line], done.stdout + done.stderr
    errors = [line.split(": ", 2)[2] for line in said if ": error: " in line]
    assert len(errors) == 2 and 'has no attribute "find_tickets"' in errors[0] and "incompatible" in errors[1], errors


# Five small programs


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with sentences and models of the names that the programs use."
    folder, world = tmp_path_factory.mktemp("user"), build_world(seed=0, size="small", progress=False)
    for name, split, size in (("train", "train", 60), ("test", "test", 12), ("fresh", "calibration", 30)):
        pairs = load_pairs(world.split(split), limit=size)
        (folder / f"{name}.tsv").write_text("en\tca\n" + "".join(f"{p.source}\t{p.target}\n" for p in pairs))
    (folder / "Qwen").mkdir()
    (folder / "Qwen" / "Qwen2.5-0.5B").symlink_to(world.folder)
    return folder


MADE = """
from kslottery import Prompt, Recipe, find_ticket, load_model, load_pairs, score, translate

model, tokenizer = load_model("Qwen/Qwen2.5-0.5B")
prompt = Prompt("explicit", "en-ca")
ticket = find_ticket(model, tokenizer, load_pairs("train.tsv"), prompt, alpha=0.05, recipe=Recipe(lr_embed=2e-5))
ticket
test = load_pairs("test.tsv")
for rows in (None, ticket.rows):
    print(score(translate(model, tokenizer, test, prompt, rows=rows), test))
ticket.save("ticket")
"""
SCANNED = """
from kslottery import scan_checkpoints

ticket = scan_checkpoints("base", "tuned").ticket(alpha=0.05)
ticket.save("scanned")
"""
AUDITED = """
from kslottery import AuditSettings, Ticket, audit_ticket, load_pairs

ticket = Ticket.load("ticket")
audit = audit_ticket(ticket, load_pairs("test.tsv"), train=load_pairs("train.tsv"), settings=AuditSettings(fast=True))
print(audit.sentence)
"""
CERTIFIED = """
from kslottery import Ticket, certify_ticket, load_pairs

ticket = Ticket.load("ticket")
for certificate in certify_ticket(ticket, load_pairs("fresh.tsv"), epsilon=0.02):
    print(certificate)
"""


def program(text, folder, monkeypatch, **exchanged):
    "Run a program in a folder; what it printed, and its names."
    assert len([line for line in text.split("\n") if line.strip()]) <= 10
    for old, new in exchanged.items():
        assert old in text
        text = re.sub(rf"\b{old}=[^,)]+", f"{old}={new}", text)
    monkeypatch.chdir(folder)
    names = {}
    with open("printed.txt", "w") as printed, contextlib.redirect_stdout(printed):
        exec(compile(text, "program", "exec"), names)
    return (folder / "printed.txt").read_text(), names


@pytest.fixture(scope="module")
def made(place):
    "The first program, with the rates of a small model."
    with pytest.MonkeyPatch.context() as patch:
        rates = "3e-3, epochs_embed=2, epochs_partial=1, lr_partial=1e-2, batch_size=10"
        said, names = program(MADE, place, patch, lr_embed=rates)
    return place, said, names


def test_sentences_to_ticket(made):
    place, said, names = made
    assert len(names["ticket"].ids) and "ticket.json" in {p.name for p in (place / "ticket").iterdir()}
    assert "bleu" in said.lower() and "token" in repr(names["ticket"]) and "<table" in names["ticket"]._repr_html_()
    assert names["ticket"].provenance.train["data"] == "train.tsv"


def test_two_checkpoints_to_ticket(made, monkeypatch):
    place, _, names = made
    names["model"].save_pretrained(place / "base")
    names["ticket"].rows.write(names["model"]).save_pretrained(place / "tuned")
    for name in ("base", "tuned"):
        names["tokenizer"].save_pretrained(place / name)
    names["model"], _ = kslottery.load_model(str(place / "Qwen" / "Qwen2.5-0.5B"))  # as it was
    _, found = program(SCANNED, place, monkeypatch)
    assert set(found["ticket"].ids) <= set(names["ticket"].ids) and (place / "scanned" / "ticket.json").exists()


def test_ticket_to_audit(made, monkeypatch):
    place, _, names = made
    names["ticket"].remember(generation=kslottery.Generation(max_new_tokens=24, batch_size=12))
    said, found = program(AUDITED, place, monkeypatch)
    assert said.strip() == found["audit"].sentence and said.strip()


def test_ticket_to_certificates(made, monkeypatch):
    place, _, names = made
    names["ticket"].remember(generation=kslottery.Generation(max_new_tokens=24, batch_size=30))
    said, _ = program(CERTIFIED, place, monkeypatch, epsilon=0.3)
    assert "ladder: at most 30 chrF points lost on average" in said


@pytest.mark.slow
def test_the_readme_runs_as_printed(tmp_path, monkeypatch, capsys):
    "On the built-in world, to the printed scores. (test_wheel runs the same lines on a smaller world.)"
    page = (ROOT / "README.md").read_text()
    text = "\n".join(re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S))
    assert "from kslottery import" in text and "find_ticket" in text
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KSLOTTERY_PROGRESS", "/dev/null")
    exec(compile(text, "README.md", "exec"), names := {})
    said = capsys.readouterr().out + repr(names["ticket"])
    lines = [line.strip() for line in said.split("\n") if line.strip()]
    assert len(lines) >= 8 and [line for line in lines if line not in page] == []
