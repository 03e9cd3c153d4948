"""The method as one function: the same as its steps by hand, restartable, checked before it works, and on any model."""

import inspect
import signal
import subprocess
import time
import tracemalloc

import numpy as np
import pytest
import torch

import forks
from conftest import ROOT, TIED, TOY, tiny_model
from kslottery import lottery
from kslottery.data import Pair, Prompt, encode_all
from kslottery.evaluation import translate
from kslottery.ks import critical_value, ks_scan
from kslottery.lottery import find_ticket
from kslottery.ticket import Selection, Ticket
from kslottery.tuning import Recipe, active_ids, embed_tune, partial_transfer, partial_tune

PROMPT = Prompt("t20 t21 {source} t22 {target}")
PAIRS = [Pair(f"x:{n}", f"t{5 + n % 5} t{30 + n % 3}", f"t{40 + n % 5} t{41 + n % 5}") for n in range(24)]
RECIPE = Recipe(lr_embed=0.05, epochs_embed=3, lr_partial=0.1, epochs_partial=2, batch_size=8, progress=False)


def find(model, pairs=PAIRS, prompt=PROMPT, **words):
    return find_ticket(model, TOY, pairs, prompt, **{"recipe": RECIPE, "alpha": 0.9} | words)


def test_it_is_the_five_steps(model):
    "On every architecture: what `find_ticket` gives is what its steps give, put together by hand."
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ticket = find(model)
    examples = encode_all(TOY, PROMPT, PAIRS)
    embed_rows = embed_tune(model, examples, RECIPE)
    scan = ks_scan(model.get_input_embeddings().weight, embed_rows.matrix(model))
    ids = scan.select(0.9)
    rows = partial_tune(model, ids, examples, RECIPE)
    assert 0 < len(ids) < len(active_ids(examples)) and ticket.ids.tolist() == ids.tolist()
    assert torch.equal(ticket.embed_rows.weight, embed_rows.weight) and torch.equal(ticket.rows.weight, rows.weight)
    assert np.array_equal(ticket.scan.statistic, scan.statistic)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    transferred = partial_transfer(ticket.embed_rows, ticket.ids)
    assert torch.equal(transferred.weight, embed_rows.restrict(ids).weight)


def test_it_knows_about_itself(tmp_path):
    model = tiny_model("llama")
    ticket = find(model, recipe=RECIPE)
    ticket.save(tmp_path / "t")
    again = Ticket.load(tmp_path / "t")
    facts = again.provenance
    assert facts == ticket.provenance and facts.selection == Selection(alpha=0.9) and again.prompt == PROMPT
    assert again.recipe.as_dict() == RECIPE.as_dict() and facts.train is None  # these pairs come from no file
    occurs = [sum(e.ids.count(i) for e in encode_all(TOY, PROMPT, PAIRS)) for i in ticket.ids]
    assert [*facts.counts] == occurs and again.to_frame()["count"].tolist() == occurs
    assert again.base(model, TOY) == (model, TOY)
    again.check_pairs(PAIRS[::-1])
    with pytest.raises(ValueError, match="not the same"):
        again.check_pairs(PAIRS[:10])


def test_top_k_takes_the_best():
    ticket = find(tiny_model("llama"), top_k=3)
    assert ticket.ids.tolist() == ticket.scan.top(3).tolist() and ticket.provenance.selection.top_k == 3
    assert len(ticket.rows) == 3


@pytest.mark.parametrize("kind", TIED)
def test_tied_models_may_share(kind):
    ticket = find(tiny_model(kind), recipe=Recipe.from_dict(RECIPE.as_dict() | {"mode": "shared"}))
    assert ticket.mode == ticket.rows.mode == ticket.embed_rows.mode == "shared" and ticket.peft_obstacle is None
    assert find(tiny_model(kind)).mode == "input_only"


def test_an_empty_ticket_is_a_value(tmp_path):
    model = tiny_model("llama")
    ticket = find(model, alpha=0.001, recipe=Recipe(lr_embed=1e-7, epochs_embed=1, progress=False))
    assert len(ticket.ids) == len(ticket.rows) == 0
    best, needed = ticket.scan.statistic.max(), critical_value(0.001, 16)
    for word in (f"D = {best:.3f}", f"{needed:.3f} is needed", "lr_embed", "1e-07", "epochs_embed", "alpha", "top_k"):
        assert word in ticket.advice
    assert ticket.advice in repr(ticket)
    texts = [
        [t.text for t in translate(model, TOY, PAIRS[:3], PROMPT, rows, progress=False)] for rows in (None, ticket.rows)
    ]
    assert texts[0] == texts[1]
    ticket.save(tmp_path / "t")
    again = Ticket.load(tmp_path / "t")
    assert again.advice == ticket.advice and len(again.rows) == 0 and again.advice in again.card()


@pytest.mark.parametrize(
    "words, error, says",
    [
        (dict(alpha=0), (TypeError, ValueError), "alpha is 0"),
        (dict(alpha=1.5), ValueError, "alpha is 1.5"),
        (dict(alpha=float("nan")), ValueError, "alpha is nan"),
        (dict(top_k=-1), ValueError, "top_k is -1"),
        (dict(top_k=2.5), TypeError, "top_k is 2.5"),
        (dict(top_k=65), ValueError, "top_k is 65 and the embedding has 64 rows"),
        (dict(pairs=[]), ValueError, "no pairs"),
        (dict(prompt="explicit"), TypeError, "Prompt"),
        (dict(recipe=Recipe(mode="shared")), ValueError, "does not tie"),
    ],
    ids=str,
)
def test_values_are_checked_before_work_starts(words, error, says, monkeypatch):
    monkeypatch.setattr(lottery, "embed_tune", lambda *a, **k: pytest.fail("work had started"))
    with pytest.raises(error, match=says) as told:
        find(tiny_model("llama"), **words)
    assert "\n" not in str(told.value)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    model = tiny_model("llama")
    find(model, checkpoint=tmp_path / "state")
    assert {p.name for p in (tmp_path / "state").iterdir()} == {"embed.safetensors", "partial.safetensors"}
    with pytest.raises(ValueError, match="another run"):
        find(model, pairs=PAIRS[:20], checkpoint=tmp_path / "state")


FINDER = """
import sys; sys.path.insert(0, {tests!r})
from test_lottery import *
from kslottery.training import Engine
recipe = Recipe.from_dict(RECIPE.as_dict() | dict(epochs_embed=40, epochs_partial=40))
recipe = dataclasses.replace(recipe, engine=Engine(save_every=5))
ticket = find(tiny_model("llama"), recipe=recipe, checkpoint={checkpoint!r})
ticket.save({place!r})
"""


def test_killed_in_either_training_it_goes_on_to_the_same_ticket(tmp_path):
    "kill -9 as soon as a file of state is there, twice: the end is the same, bit for bit."

    def start(name):
        names = dict(tests=str(ROOT / "tests"), checkpoint=str(tmp_path / name), place=str(tmp_path / f"{name}-ticket"))
        return subprocess.Popen([*forks.PYTHON, "import dataclasses" + FINDER.format(**names)])

    assert start("unbroken").wait(timeout=300) == 0
    for file in ("embed", "partial"):
        process = start("killed")
        while process.poll() is None and not (tmp_path / "killed" / f"{file}.safetensors").exists():
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() != 0, "it was through before it could be killed"
    assert start("killed").wait(timeout=300) == 0
    one, two = (tmp_path / f"{name}-ticket" for name in ("unbroken", "killed"))
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes(), path.name


def test_the_model_is_not_copied(monkeypatch):
    "The scan holds a few rows at a time: no tensor of the size of the matrix is made beside the model's own."
    model = tiny_model("llama", vocabulary=60_000)
    embed_rows = embed_tune(model, encode_all(TOY, PROMPT, PAIRS), RECIPE)
    after = embed_rows.matrix(model)
    assert after.base.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    monkeypatch.setattr(type(model), "__deepcopy__", lambda *a: pytest.fail("a model was copied"), raising=False)
    tracemalloc.start()
    find(model, top_k=2)
    assert tracemalloc.get_traced_memory()[1] < 60_000 * 16 * 4 * 4  # numpy's arrays: statistics, p-values, chunks
    tracemalloc.stop()


def test_one_page():
    "The function reads like the paper: at most 15 statements."
    source = inspect.getsource(find_ticket)
    body = source[source.rindex('"""') :]
    steps = [body.index(f"# {n}.") for n in range(1, 6)]
    assert steps == sorted(steps) and len([line for line in body.split("\n") if line.strip()]) <= 20
