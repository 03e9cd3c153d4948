"""What a reader copies works: the fenced blocks of README and of the notebooks' text are run as they stand.

They run in a folder where models and sentences are stand-ins of the same names; some commands are made smaller
(SMALLER), and settings files are read without a run. Of `make` and `papermill` lines it is checked that their targets,
notebooks and parameters exist: CI runs the first, test_notebooks the second. Blocks of `bash`, not `sh`, are downloads
and programs for several GPUs: these are not run. What is no command of these, or names what
is not there, fails. Code cells of notebooks are run by test_notebooks; the ten lines of the home page are one of them.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess

import papermill
import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from conftest import ROOT
from kslottery import Generation, Prompt, Recipe, build_world, find_ticket, load_model, load_pairs
from kslottery.cli import app
from kslottery.run import find_notebook, notebook_defaults, parse_parameters
from test_library import NOTEBOOKS

MODELS = (
    "Qwen/Qwen2.5-0.5B",
    "meta-llama/Llama-3.2-1B",
    "base-model",
    "runs/pretrain/model",
)  # here all the small built-in model
TABLES = {"train": ("train", "train.en-ca", "train.en-es"), "test": ("test",), "calibration": ("fresh", "fresh.en-ca")}
TEXTS = (("eng.txt", "cat.txt"), ("data/ntrex/eng.txt", "data/ntrex/cat.txt"))
TASKS = {"sentiment": "classify", "topic": "summarise"}
TICKETS = ("my/ticket", "runs/audit/outputs/stopping/ticket")
SMALLER = {  # what a command gets in addition, so that it takes seconds
    ("run", "quickstart"): "-p fast=true -p test_limit=6 -p epochs=1 -p max_new_tokens=12 -p top_k=2",
    ("run", "tasks"): "-p fast=true -p test_limit=6 -p epochs=1 -p max_new_tokens=6 -p top_k=2",
    ("run", "stability"): "-p fast=true -p epochs=1 -p test_limit=6 -p max_new_tokens=6 -p top_k=2",
    ("run", "pretrain"): "-p fast=true -p steps=2 -p hidden=32",
    ("audit",): "--fast --limit 6",
    ("certify",): "--limit 6 --epsilon 0.9",
}
SENTENCES = {"train": 30, "test": 30, "calibration": 190}  # of each table; with fewer nothing can be certified
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def cells(page, kind):
    return [
        "".join(c["source"]) for c in json.loads(page.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == kind
    ]


def blocks(page):
    "The fenced blocks of README, or of a notebook's text: (language, text)."
    return FENCE.findall(
        page.read_text(encoding="utf-8") if page.suffix == ".md" else "\n\n".join(cells(page, "markdown"))
    )


HOME = ROOT / "nbs" / "index.ipynb"  # README is made from it
PAGES = {p.relative_to(ROOT).as_posix(): blocks(p) for p in (ROOT / "README.md", *NOTEBOOKS) if p != HOME and blocks(p)}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with stand-ins for all that the blocks name."
    folder = tmp_path_factory.mktemp("reader")
    world = build_world(seed=0, size="small", progress=False)
    for name in MODELS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(world.folder)
    for split, names in TABLES.items():
        for name in names:
            (folder / f"{name}.tsv").write_text(
                f"en\t{'es' if name.endswith('es') else 'ca'}\n"
                + "".join(f"{p.source}\t{p.target}\n" for p in load_pairs(world.split(split), limit=SENTENCES[split]))
            )
    (folder / "data" / "ntrex").mkdir(parents=True)
    (folder / "data" / "train").symlink_to(folder / "data")
    shutil.copy(folder / "train.tsv", folder / "data" / "en-ca.tsv")
    subprocess.run(["gzip", folder / "data" / "en-ca.tsv"], check=True)
    for sides in TEXTS:
        for side, texts in zip(sides, zip(*((p.source, p.target) for p in load_pairs(world.split("test"), limit=30)))):
            (folder / side).write_text("".join(f"{text}\n" for text in texts))
    for name, task in TASKS.items():
        for split in ("train", "test"):
            shutil.copy(world.split(f"{task}-{split}"), folder / f"{name}-{split}.jsonl")
    weights = load_file(world.folder / "model.safetensors")
    weights["model.embed_tokens.weight"][[7, 9]] *= 4
    shutil.copytree(world.folder, folder / "tuned-model")
    save_file(weights, folder / "tuned-model" / "model.safetensors", {"format": "pt"})
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").touch()
    with contextlib.chdir(folder):
        model, tokenizer = load_model("base-model")
        recipe = Recipe(lr_embed=1e-3, epochs_embed=1, lr_partial=1e-3, epochs_partial=1, batch_size=10)
        prompt = Prompt("explicit", "en-ca")
        ticket = find_ticket(model, tokenizer, load_pairs("train.tsv"), prompt, top_k=2, recipe=recipe)
        ticket.remember(test=load_pairs("test.tsv", limit=6), generation=Generation(max_new_tokens=12))
        for name in TICKETS:
            ticket.save(name)
    return folder


def kslottery(words):
    extra = " ".join(more for start, more in SMALLER.items() if tuple(words[: len(start)]) == start)
    done = CliRunner().invoke(app, [*words, *extra.split()])
    assert done.exit_code == 0, f"kslottery {' '.join(words)}: {done.output[-1500:]}"


def run_line(line):
    "One line of a shell block."
    command, *words = shlex.split(line, comments=True) or [""]
    if not command:  # a comment
        return
    if command == "kslottery" and "-f" in words:  # settings for a GPU and the Hub: read, and the run is not started
        file = ROOT / words[words.index("-f") + 1]
        assert parse_parameters([], notebook_defaults(find_notebook(words[1])), file), line
    elif command == "kslottery":
        kslottery(words)
    elif command == "source":
        assert os.path.isfile(words[0]), line
    elif command == "make":
        done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif command == "papermill":
        notebook, known = (
            next(w for w in words if w.endswith(".ipynb")),
            {words[i + 1] for i, w in enumerate(words) if w == "-p"},
        )
        assert known <= set(papermill.inspect_notebook(str(ROOT / notebook))), line
    else:
        pytest.fail(f"nothing here stands in for {command!r}: {line}")


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run(page, place, monkeypatch):
    "In their order, in one folder."
    monkeypatch.chdir(place)
    monkeypatch.setenv("KSLOTTERY_PROGRESS", os.devnull)
    for language, block in PAGES[page]:
        if language == "sh":
            for line in re.sub(r"\\\n\s*", " ", block).strip().split("\n"):
                run_line(line)
        elif language == "bash":  # what needs a network or several GPUs: only its grammar is looked at
            subprocess.run(["bash", "-n"], input=block, text=True, check=True)
        elif language == "json":  # records of a data file
            (place / "block.jsonl").write_text(block)
            assert load_pairs("block.jsonl")
        elif language == "py" or language == "python" and page != "README.md":
            exec(compile(block, page, "exec"), {})
        elif language == "python":  # what runs on the built-in world
            assert block.strip() in cells(HOME, "code"), "no cell of the home page, which test_notebooks runs"
        else:
            pytest.fail(
                f"a block of {page} says it is {language!r}: write sh, py, python or json, so that it can be tried"
            )


def test_home_and_readme_have_the_same_blocks():
    assert [b for b in PAGES["README.md"] if b[0] != "python"] == blocks(HOME) != []


def test_readme_answers_a_question_by_every_command():
    table = [line for line in (ROOT / "README.md").read_text().split("\n") if line.startswith("| ")]
    names = [c.name or c.callback.__name__ for c in app.registered_commands]
    assert [n for n in names if not any(f"`kslottery {n}" in line for line in table)] == []
    assert {n for line in table for n in re.findall(r"`kslottery (\w+)", line)} <= set(names)
