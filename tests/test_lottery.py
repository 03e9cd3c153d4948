"""The method as one function: the same as its steps by hand, restartable, checked before it works, and on any model."""

import copy
import inspect
import signal
import subprocess
import time
import tracemalloc
import types

import numpy as np
import pytest
import torch

import forks
from conftest import ROOT, TIED, TOY, tiny_model
from kslottery import lottery
from kslottery.audit import ARMS, AuditSettings, _obstacle, audit_ticket
from kslottery.calibration import CertifySettings, certify_ticket
from kslottery.data import Example, Pair, Prompt, collate, encode_all
from kslottery.decomposition import Bootstrap
from kslottery.evaluation import Generation, translate
from kslottery.ks import critical_value, ks_scan, scan_rows
from kslottery.lottery import find_ticket, gradient_scan
from kslottery.rows import is_tied
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


def dense_gradient(model, examples, mode):
    "Lengths of the gradient at all rows, of one padded batch, by plain autograd on the whole matrix."
    model = copy.deepcopy(model).requires_grad_(True)
    weight, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    if mode == "input_only" and head.weight is weight:
        head.weight = torch.nn.Parameter(weight.detach().clone())
    batch = collate(examples, TOY.pad_token_id)
    model(batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss.backward()
    grads = {"head": [head.weight.grad], "both": [weight.grad, head.weight.grad]}.get(mode, [weight.grad])
    return torch.cat(grads, 1).norm(dim=1).double().numpy()


def test_the_gradient_is_that_of_plain_autograd(model):
    "On every architecture, tied or not, one sentence at a time; padding has no part in it."
    pairs = [*PAIRS[:3], PAIRS[3]._replace(source="t8"), PAIRS[4]._replace(target="t44")]
    examples = encode_all(TOY, PROMPT, pairs)
    assert len({len(e.ids) for e in examples}) > 1  # so that a batch of them is padded
    active = active_ids(examples)
    for mode in ("input_only", "shared") if is_tied(model) else ("input_only", "head", "both"):
        scan, dense = gradient_scan(model, examples, mode=mode), dense_gradient(model, examples, mode)
        assert np.allclose(scan.statistic[active], dense[active], rtol=1e-4, atol=1e-9)
        assert np.flatnonzero(scan.statistic).tolist() == [i for i in active if dense[i] > 0]
        assert scan.statistic[TOY.pad_token_id] == 0 and (scan.pvalue, scan.criterion) == (None, "gradient")
        end = scan.statistic[TOY.eos_token_id]  # what is read last has nothing to predict, but is predicted
        assert end == 0 if mode == "input_only" else end > 0  # by its output row


def test_the_gradient_by_hand():
    "Two tokens and the softmax: an input row's gradient is W'(softmax - one-hot), over the number of target tokens."

    class Bigram(torch.nn.Module):
        config = types.SimpleNamespace(is_encoder_decoder=False)
        device, dtype, name_or_path = "cpu", torch.float32, ""

        def __init__(self):
            super().__init__()
            self.read, self.head = torch.nn.Embedding(4, 2), torch.nn.Linear(2, 4, bias=False)
            self.read.weight.data = torch.tensor([[9.0, 9], [0, 0], [1, 0], [5, 5]])
            self.head.weight.data = torch.tensor([[0.0, 0], [3, 4], [0, 0], [0, 0]])

        get_input_embeddings = lambda self: self.read
        get_output_embeddings = lambda self: self.head

        def forward(self, input_ids, labels, use_cache):
            logits = self.head(self.read(input_ids))[0, :-1]
            return types.SimpleNamespace(loss=torch.nn.functional.cross_entropy(logits, labels[0, 1:]))

    scan = gradient_scan(Bigram(), [Example("x", [1, 1], [-100, 1], [0, 0], 1)])  # p(1) = 1/4, and 1 is right
    assert scan.statistic.tolist() == [0, 5 * 0.75, 0, 0]
    scan = gradient_scan(Bigram(), [Example("x", [1, 1, 1], [-100, 1, 1], [0] * 3, 1)] * 2)  # a mean is a mean
    assert scan.statistic.tolist() == [0, 5 * 0.75, 0, 0]


def test_the_gradient_in_16_bits():
    examples = encode_all(TOY, PROMPT, PAIRS[:10])
    full, half = (gradient_scan(tiny_model("llama").to(dtype), examples) for dtype in (torch.float32, torch.bfloat16))
    active = active_ids(examples)
    assert np.corrcoef(full.statistic[active], half.statistic[active])[0, 1] > 0.99
    assert full.top(1) == half.top(1)


def test_a_ticket_by_the_gradient(tmp_path, monkeypatch):
    "No Embed Tuning; the rest is any ticket's, and what asks for Embed-Tuned rows says so in one sentence."
    monkeypatch.setattr(lottery, "embed_tune", None)
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ticket = find(model, criterion="gradient", top_k=3)
    examples = encode_all(TOY, PROMPT, PAIRS)
    assert ticket.ids.tolist() == gradient_scan(model, examples[: lottery.GRADIENT_SENTENCES]).top(3).tolist()
    assert torch.equal(ticket.rows.weight, partial_tune(model, ticket.ids, examples, RECIPE).weight)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    ticket.save(tmp_path / "t")
    again = Ticket.load(tmp_path / "t")
    assert again.provenance.selection == Selection("gradient", 0.9, 3) and again.embed_rows is None
    assert np.array_equal(again.scan.statistic, ticket.scan.statistic) and again.scan.pvalue is None
    assert "| criterion | `gradient` |" in again.card() and "gradient" in repr(again) and " D " not in repr(again)
    fresh = [Pair(f"y:{n}", f"t{30 + n % 9} t{50 + n // 9}", "t40 t41") for n in range(63)]
    with pytest.raises(ValueError, match="no Embed-Tuned rows to be compared with: give"):
        certify_ticket(again, fresh, epsilon=0.5, model=model, tokenizer=TOY)
    how = AuditSettings(fast=True, bootstrap=Bootstrap(20), generation=Generation(4), progress=False)
    audit = audit_ticket(again, fresh[:8], train=PAIRS, model=model, tokenizer=TOY, settings=how)
    assert not {"embed_tuning", "all_but_ticket"} & {arm.name for arm in audit.arms}
    assert audit.checks[-1].sentence == "The ticket has no Embed-Tuned rows."


def test_any_criterion_ranks():
    model = tiny_model("llama")
    ticket = find(model, criterion="relative", top_k=3)
    after = ticket.embed_rows.matrix(model)
    assert ticket.ids.tolist() == scan_rows(after.base, after, "relative").top(3).tolist()
    assert ticket.provenance.selection.criterion == "relative" and ticket.scan.criterion == "relative"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"criterion": "gradient"}, "'gradient' has no p-values to compare with alpha: say by top_k"),
        ({"criterion": "l2"}, "'l2' has no p-values to compare with alpha: say by top_k"),
        ({"criterion": "gradient", "top_k": 60}, "top_k is 60 and only .* rows have a gradient: take at most"),
        ({"criterion": "gradients", "top_k": 3}, "criterion is 'gradients': choose ks, .*, gradient"),
    ],
)
def test_a_criterion_that_cannot_be(words, said, monkeypatch):
    for name in ("embed_tune", *(["partial_tune"] if words.get("top_k", 0) < 60 else [])):
        monkeypatch.setattr(lottery, name, None)  # before any training
    with pytest.raises(ValueError, match=said):
        find(tiny_model("llama"), **words)


@pytest.mark.parametrize("kind", TIED)
def test_tied_models_may_share(kind):
    ticket = find(tiny_model(kind), recipe=Recipe.from_dict(RECIPE.as_dict() | {"mode": "shared"}))
    assert ticket.mode == ticket.rows.mode == ticket.embed_rows.mode == "shared" and ticket.peft_obstacle is None
    assert find(tiny_model(kind)).mode == "input_only"


@pytest.mark.parametrize("mode", ["head", "both"])
def test_untied_models_have_rows_of_the_output(mode, tmp_path):
    "Found on the side that is scanned; audited and certified like any other, but for the gates."
    model, recipe = tiny_model("llama"), Recipe.from_dict(RECIPE.as_dict() | {"mode": mode})
    ticket = find(model, recipe=recipe)
    side = (model.get_output_embeddings() if mode == "head" else model.get_input_embeddings()).weight
    assert ticket.ids.tolist() == ks_scan(side, ticket.embed_rows.matrix(model)).select(0.9).tolist()
    assert len(ticket.ids) and {ticket.mode, ticket.rows.mode, ticket.embed_rows.mode} == {mode}
    assert torch.equal(
        ticket.rows.weight, partial_tune(model, ticket.ids, encode_all(TOY, PROMPT, PAIRS), recipe).weight
    )
    ticket.save(tmp_path / "t")
    again = Ticket.load(tmp_path / "t")
    fresh = [Pair(f"y:{n}", f"t{30 + n % 9} t{50 + n // 9}", "t40 t41") for n in range(63)]
    how = AuditSettings(fast=True, bootstrap=Bootstrap(20), generation=Generation(4), progress=False)
    audit = audit_ticket(again, fresh[:8], train=PAIRS, model=model, tokenizer=TOY, settings=how)
    assert {arm.channel for arm in audit.arms} == {"everywhere"}
    gated = [kind for kind in ARMS.values() if kind.channel != "everywhere"]
    assert gated and all(f"{mode} rows also score" in _obstacle(kind, again, True) for kind in gated)
    settings = CertifySettings(ladder="none", generation=Generation(4), progress=False)
    made = certify_ticket(again, fresh, epsilon=0.5, model=model, tokenizer=TOY, settings=settings)
    assert {c.kind for c in made} == {"agreement"}
    with pytest.raises(ValueError, match="ties the two: use mode shared"):
        find(tiny_model("gpt2"), recipe=recipe)


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
