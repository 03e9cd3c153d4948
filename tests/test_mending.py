"""Mending: rows that stop a model are chosen by a rule, harm nothing, and their stopping rate is certified."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import kslottery.stops as mending
from conftest import ROOT, TOY, half_and_tied, invoke, tiny_model
from kslottery.babel import build_world
from kslottery.core import load_model
from kslottery.data import Pair, Prompt, Template, encode_all, load_pairs
from kslottery.evaluation import Generation, translate
from kslottery.rows import TunedRows, is_tied, weights_fingerprint
from kslottery.stops import MendSettings, mend_stops, row_candidates
from kslottery.ticket import Ticket
from kslottery.tuning import Recipe, partial_tune

STORED = ROOT / "benchmarks" / "results" / "stops.json"
RECIPE = Recipe(epochs_partial=5, batch_size=10, progress=False)
SETTINGS = MendSettings(rate=0.9, generation=Generation(40, batch_size=50), progress=False)
TOY_PROMPT = Prompt("t20 t21 {source} t22 {target}")
TOY_PAIRS = [Pair(f"x:{n}", f"t{5 + n % 5} t{30 + n // 5}", f"t{40 + n % 5} t{41 + n % 5}") for n in range(40)]
TOY_SETTINGS = MendSettings(rate=0.5, delta=0.5, generation=Generation(8), progress=False)


@pytest.fixture(scope="module")
def world():
    return build_world(0, "small")


@pytest.fixture(scope="module")
def loaded(world):
    return load_model(str(world.folder))


@pytest.fixture(scope="module")
def pairs(world):
    return load_pairs(world.split("train"), limit=80), list(load_pairs(world.split("calibration"), limit=40))


@pytest.fixture(scope="module", autouse=True)
def ledger(world, tmp_path_factory):
    place = tmp_path_factory.mktemp("cache")
    (place / world.folder.name).symlink_to(world.folder)  # the benchmark finds it there
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KSLOTTERY_CACHE", str(place))
        yield place / "calibration.ledger.json"


@pytest.fixture(scope="module")
def mended(world, loaded, pairs, ledger):
    model, tokenizer = loaded
    choices = row_candidates(model, tokenizer, encode_all(tokenizer, world.prompt, pairs[0]))
    few = {name: choices[name] for name in ("end token, input", "prompt's last token", "answers' last tokens")}
    before = weights_fingerprint(model)
    made = mend_stops(model, tokenizer, *pairs, world.prompt, candidates=few, recipe=RECIPE, settings=SETTINGS)
    assert weights_fingerprint(model) == before
    return made


def test_what_is_certified_is_what_anybody_can_make_again(mended, world, loaded, pairs, ledger):
    (model, tokenizer), (train, fresh), ticket, made = loaded, pairs, mended.ticket, mended.certificate
    rows = partial_tune(model, ticket.ids, encode_all(tokenizer, ticket.prompt, train), ticket.recipe)
    assert torch.equal(rows.weight, ticket.rows.weight) and ticket.provenance.train == train.origin
    said = translate(model, tokenizer, fresh, world.prompt, rows, generation=SETTINGS.generation, progress=False)
    missed = sum(not one.ended for one in said)
    assert made.facts["observed"] * made.n == pytest.approx(missed) and made.n == len({p.loose for p in fresh})
    assert mended.ok and made.bound == pytest.approx(1 - 0.05 ** (1 / made.n)) and missed == 0
    assert "(its own rows) has not stopped (with greedy decoding, within 40 tokens) is at most" in made.claim
    assert f"at least {100 - np.ceil(1e4 * made.bound) / 100:.6g}% of such sentences" in mended.sentence
    assert "nothing is claimed about sampling" in made.assumptions[3] and "with greedy decoding (40 s" in str(made)
    assert "stops with greedy decoding within 40" in mended.sentence
    assert mended.lost.verdict == "stopping" and mended.before == 0
    (plan,) = json.loads(ledger.read_text())["plans"]
    assert plan["plan"] == made.facts["plan"] and plan["delta"] == 0.05
    ticket.check_pairs(train)


def test_what_does_nothing_is_printed_too(mended):
    read_after, last, dots = mended.candidates
    assert read_after.result == "never read" and read_after.ends == mended.base.ends == 0
    assert last.result == "ends too seldom" and dots.result == "chosen" and dots.p_end > 0.9 > last.p_end
    assert dots.early < 0.01 and dots.first_line > mended.base.first_line - SETTINGS.tolerance
    for shown in (str(mended), mended._repr_html_()):
        assert all(one.result in shown for one in mended.candidates) and mended.sentence in shown.replace("&#x27;", "'")
    json.dumps(mended.as_dict(), allow_nan=False)


def test_the_ticket_is_written_with_certificate_and_comparison(mended, tmp_path):
    mended.save(tmp_path / "t")
    again = Ticket.load(tmp_path / "t")
    assert again.certificates == [mended.certificate] and torch.equal(again.rows.weight, mended.ticket.rows.weight)
    assert json.loads((tmp_path / "t" / "mending.json").read_text())["sentence"] == mended.sentence
    assert "without an end in time" in (tmp_path / "t" / "README.md").read_text()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds something else"):
        mended.save(tmp_path / "other")
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["notes.txt"]


def test_a_model_that_stops_is_left_alone(mended, world, loaded, pairs, monkeypatch, tmp_path):
    model = mended.ticket.rows.write(copy.deepcopy(loaded[0]))
    monkeypatch.setattr(mending, "tune_rows", None)  # nothing may be tuned
    made = mend_stops(model, loaded[1], *pairs, world.prompt, settings=SETTINGS)
    assert made.ok and made.sentence.startswith("Nothing to mend") and made.before == 1 and made.candidates == ()
    assert "no rows: the model as it is" in made.certificate.claim and made.ticket is None
    assert made.certificate.bound == mended.certificate.bound
    with pytest.raises(ValueError, match="no ticket to write"):
        made.save(tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_it_is_refused_before_anything_is_answered(world, loaded, pairs, monkeypatch):
    monkeypatch.setattr(mending, "translate", None)
    train, fresh = pairs
    ask = lambda train=train, fresh=fresh, **more: mend_stops(
        *loaded, train, fresh, world.prompt, settings=replace(SETTINGS, **more)
    )
    with pytest.raises(ValueError, match="40 distinct fresh sentences .* no rate of 0.95: 59 are needed"):
        ask(rate=0.95)
    with pytest.raises(ValueError, match="1 distinct fresh sentences"):
        ask(fresh=fresh[:1] * 100)  # copies are one
    with pytest.raises(ValueError, match="was used to tune or select"):
        ask(fresh=[*fresh, train[3]._replace(source=train[3].source.upper())])
    with pytest.raises(ValueError, match="9 distinct tuning sentences"):
        ask(train=[*train[:9], *train[:9]])
    with pytest.raises(ValueError, match="100% of the true answers have more than 2 tokens"):
        ask(generation=Generation(2))
    for wrong in (dict(rate=1.0), dict(delta=0), dict(most=0), dict(tolerance=-1), dict(metric="beauty")):
        with pytest.raises(ValueError):
            ask(**wrong)


def toy(kind, **shape):
    "A tiny model whose generation stops where the toy tokenizer ends."
    model = half_and_tied() if kind == "half and tied" else tiny_model(kind, **shape)
    model.generation_config.eos_token_id = TOY.eos_token_id
    return model


def loud(model, token, factor=30):
    "A model whose head gives one token at every place."
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight[token] = 0
        bias = torch.zeros(len(head.weight))
        bias[token] = factor
    head.bias = torch.nn.Parameter(bias)
    return model


def test_an_end_that_comes_too_early_is_no_mend(monkeypatch):
    asked = (TOY, TOY_PAIRS[:20], TOY_PAIRS[20:], TOY_PROMPT)
    made = mend_stops(loud(toy("llama"), TOY.eos_token_id), *asked, settings=TOY_SETTINGS)
    assert made.base.early == pytest.approx(1, abs=1e-6) == made.base.p_end
    assert made.ok and made.candidates == ()  # a model's own chances elsewhere are no fault: it stops
    monkeypatch.setattr(mending, "_seldom", lambda one, settings: one.name == "base")
    monkeypatch.setattr(mending, "_end_chances", lambda bench, rows: (0.9, 0.9 if len(rows) else 0.1))
    made = mend_stops(loud(toy("llama"), 40), *asked, settings=TOY_SETTINGS)
    assert not made.ok and made.ticket is None and made.certificate is None
    assert {one.result for one in made.candidates} == {"never read", "ends too early"}
    assert made.sentence.startswith("Not mended") and not made.to_frame().empty


@pytest.mark.parametrize("ends", [None, 2, [2, 5]])
def test_an_end_at_which_generation_does_not_stop_is_never_taught(ends):
    model = tiny_model("llama")
    model.generation_config.eos_token_id = ends
    with pytest.raises(ValueError, match=r"t63 \(63\), the tokenizer's eos_token, is taught, and .* stops at"):
        mend_stops(model, TOY, TOY_PAIRS[:30], TOY_PAIRS[30:], TOY_PROMPT, settings=TOY_SETTINGS)


def test_chances_of_an_end_are_those_of_reading_the_true_answer():
    model, examples = tiny_model("llama", seed=3), encode_all(TOY, TOY_PROMPT, TOY_PAIRS[:3])
    settings = replace(TOY_SETTINGS, generation=Generation(8, batch_size=2))
    bench = mending._Bench(model, TOY, TOY_PROMPT, RECIPE, settings, examples, TOY_PAIRS[:3], examples)
    rows, ends = TunedRows.of(model, [5]), {TOY.eos_token_id, model.generation_config.eos_token_id} - {None}
    at_end, before = [], []
    with torch.no_grad():
        for e in examples:
            p = model(torch.tensor([e.ids])).logits[0].softmax(-1)[:, sorted(ends)].sum(-1).tolist()
            at_end.append(p[len(e.ids) - 2])
            before.append(1 - np.prod([1 - p[n] for n in range(e.prompt - 1, len(e.ids) - 2)]))
    assert mending._end_chances(bench, rows) == pytest.approx([np.mean(at_end), np.mean(before)], abs=1e-6)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2", "gemma", "half and tied"])
def test_it_runs_on_every_family(kind):
    model = toy(kind)
    recipe = Recipe(lr_partial=0.3, epochs_partial=1, batch_size=8, progress=False)
    made = mend_stops(model, TOY, TOY_PAIRS[:30], TOY_PAIRS[30:], TOY_PROMPT, recipe=recipe, settings=TOY_SETTINGS)
    names = {one.name: one for one in made.candidates}
    assert ("end token, shared" in names) == is_tied(model) != ("end token, head" in names)
    assert names["prompt's last token"].tokens == ("t22",) and "prompt's tail" not in names  # the same one
    assert (made.ticket is None) == (made.certificate is None) and json.dumps(made.as_dict(), allow_nan=False)


def test_the_end_tokens_row_in_the_head_changes_when_a_text_ends_and_nothing_else(world, loaded, pairs):
    model, tokenizer = loaded
    examples = encode_all(tokenizer, world.prompt, pairs[0])
    rows = partial_tune(model, [tokenizer.eos_token_id], examples, replace(RECIPE, mode="head", epochs_partial=2))
    asked = (model, tokenizer, pairs[1], world.prompt)
    base, made = (translate(*asked, r, generation=SETTINGS.generation, progress=False) for r in (None, rows))
    assert np.mean([one.ended for one in made]) > 0.9 > 0 == sum(one.ended for one in base)
    assert all(one.tokens[:-1] == other.tokens[: len(one.tokens) - 1] for one, other in zip(made, base))


def test_an_end_without_a_score_is_mended_in_the_head_only(world, loaded, pairs):
    model, end = copy.deepcopy(loaded[0]), loaded[1].eos_token_id
    with torch.no_grad():
        model.get_output_embeddings().weight[end] = 0
    choices = row_candidates(model, loaded[1], encode_all(loaded[1], world.prompt, pairs[0]))
    few, recipe = {name: choices[name] for name in ("end token, head", "line break")}, replace(RECIPE, epochs_partial=3)
    made = mend_stops(model, loaded[1], *pairs, world.prompt, candidates=few, recipe=recipe, settings=SETTINGS)
    assert [one.result for one in made.candidates] == ["chosen", "ends too seldom"] and made.ok
    assert made.ticket.mode == "head" and made.lost.verdict == "stopping"


def test_a_chat_template_has_places_of_its_own():
    tokenizer = copy.deepcopy(TOY)
    turns = "{% for m in messages %}t50 {{ m['content'] }} t63 {% endfor %}"
    tokenizer.chat_template = turns + "{% if add_generation_prompt %}t51 t52 {% endif %}"
    prompt, model = Prompt(Template("turns", "{source}{target}", chat=True)), toy("llama")
    examples = encode_all(tokenizer, prompt, TOY_PAIRS)
    found = row_candidates(model, tokenizer, examples, most=2)
    assert found["prompt's last token"] == ("input_only", [52]) and found["prompt's tail"] == ("input_only", [52, 51])
    assert len(found["answers' last tokens"][1]) == 2
    train, fresh, few = TOY_PAIRS[:30], TOY_PAIRS[30:], {"end token, input": found["end token, input"]}
    made = mend_stops(model, tokenizer, train, fresh, prompt, candidates=few, recipe=RECIPE, settings=TOY_SETTINGS)
    assert made.candidates[0].result != "never read"  # it ends the turns of the prompt, too


def test_a_label_is_an_answer_like_any_other(world, loaded, monkeypatch):
    train, fresh = (load_pairs(world.split(f"classify-{name}"), limit=40) for name in ("train", "calibration"))
    prompt, settings = Prompt("{source}{target}"), replace(SETTINGS, generation=None)
    few = {
        "answers' last tokens": row_candidates(*loaded, encode_all(loaded[1], prompt, train))["answers' last tokens"]
    }
    made = mend_stops(*loaded, train, fresh, prompt, candidates=few, recipe=RECIPE, settings=settings)
    assert made.settings.generation.max_new_tokens < 10 and len(made.candidates[0].ids) >= 2
    assert made.candidates[0].ends > made.base.ends


@pytest.fixture(scope="module")
def fast(tmp_path_factory, ledger):
    "The benchmark in the built-in small world: its file, and what it holds."
    import stops

    file = tmp_path_factory.mktemp("stops") / "stops.json"
    stops.main(["--fast", "--out", str(file)])
    return file, json.loads(file.read_text())


def test_the_benchmark_makes_what_is_stored_and_goes_on(fast, capsys):
    import stops as benchmark

    file, made = fast
    stored = json.loads(STORED.read_text())
    assert made.keys() == stored.keys() and made["base"].keys() == stored["base"].keys()
    one, other = made["seeds"]["0"], stored["seeds"]["0"]
    names = [[c["name"] for c in found["candidates"]] for found in (one, other)]
    assert one.keys() == other.keys() and names[0] == names[1]
    assert benchmark.main(["--fast", "--out", str(file)]) == made and capsys.readouterr().out == ""
    file.write_text(json.dumps(made | {"data": {}}))
    with pytest.raises(ValueError, match="holds another run"):
        benchmark.main(["--fast", "--out", str(file)])


def test_what_is_stored_follows_the_rule():
    for made in json.loads(STORED.read_text())["seeds"].values():
        asked, base = made["settings"], made["base"]
        for one in made["candidates"]:
            late, early = 1 - one["ends"], one["early"]
            harm = base["first_line"] - one["first_line"] > asked["tolerance"]
            most = 1 - asked["rate"] + 1e-9
            mends = 2 * late <= most and early - base["early"] <= most and one["p_end"] >= 0.5 and not harm
            assert mends == (one["result"] in ("chosen", "more rows", "whole score surely lower")), one
        (chosen,) = (one for one in made["candidates"] if one["result"] == "chosen")
        assert "stops with greedy decoding within 60 new tokens" in made["sentence"]
        assert made["ok"] and len(chosen["ids"]) == min(
            len(one["ids"]) for one in made["candidates"] if one["result"] in ("chosen", "more rows")
        )


def test_the_command_says_whether_it_is_certified(mended, world, pairs, monkeypatch, tmp_path):
    asked, name = [], lambda split: str(world.split(split))
    monkeypatch.setattr(mending, "mend_stops", lambda *given, settings: (asked.append((given, settings)), mended)[1])
    words = ("stops", world.folder, "--data", name("train"), "--template", "babel", "--languages", "Aldan-Borel")
    status, said, error = invoke(*words, "--mend", "--fresh", name("dev"), "--out", tmp_path / "t", "--rate", 0.9)
    assert status == 0 and mended.sentence in said and Ticket.load(tmp_path / "t").certificates, error
    (_, _, train, fresh, prompt), settings = asked[0]
    assert len(train) > 500 and train.origin and prompt == world.prompt and settings.rate == 0.9
    assert {p.hash for p in fresh} == {p.hash for p in load_pairs(world.split("dev"))}
    unsure = replace(mended, certificate=replace(mended.certificate, holds=False))
    monkeypatch.setattr(mending, "mend_stops", lambda *given, settings: unsure)
    status, said, _ = invoke(*words, "--mend", "--fresh", name("dev"), "--json")
    assert status == 1 and json.loads(said)["ok"] is False and "is not certified" in json.loads(said)["sentence"]
    nothing = replace(mended, ticket=None)
    found = mending.StopReport("m", {}, (mending.Finding("end_not_appended", "no end"),))
    monkeypatch.setattr(mending, "mend_stops", lambda *given, settings: nothing)
    monkeypatch.setattr(mending, "examine_stops", lambda *_, **__: found)
    status, said, _ = invoke(*words, "--mend", "--fresh", name("dev"), "--out", tmp_path / "none")
    assert (
        status == 0 and said.startswith("end_not_appended: no end. Mend: append") and not (tmp_path / "none").exists()
    )
    assert f"Nothing was written to {tmp_path / 'none'}: there is no ticket" in said
    for more in (["--mend"], ["--fresh", name("dev")], ["--mend", "--fresh", name("dev"), "--adapter", tmp_path]):
        status, _, error = invoke(*words, *more)
        assert status == 2 and "--mend" in error and error.count("\n") == 1
