"""The audit: gates that open and shut token for token, arms that are data, a runner that goes on after a kill, and a card that the Hub can read."""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData

from conftest import ARCHITECTURES, TOY, invoke, kslottery, talker
from kslottery import audit as audit_module
from kslottery.audit import (
    CHANNELS,
    TAIL,
    THRESHOLDS,
    Arm,
    _verdict,
    audit_ticket,
    count_matched,
    judge,
    opportunity,
    overlap,
    plan_arms,
    split_template,
    template_membership,
    template_transfer,
)
from kslottery.babel import build_world
from kslottery.core import load_model
from kslottery.data import Example, Role, encode_all, get_template, load_pairs
from kslottery.decomposition import UNKNOWN, Interval, forced_stop
from kslottery.evaluation import Translation, translate
from kslottery.ks import Scan, ks_scan
from kslottery.rows import TunedRows
from kslottery.ticket import Ticket
from kslottery.tuning import embed_tune, partial_tune

LANGUAGES = "Aldan-Borel"


def prompts(n=5, seed=0):
    "Random prompts of all parts: BOS, head, source, tail."
    rng, made = np.random.default_rng(seed), []
    for i in range(n):
        sizes = rng.integers(1, 4, 3)
        ids = [1, *rng.integers(2, 60, sizes.sum()).tolist()]
        roles = [0, *np.repeat([1, 2, 1], sizes).tolist()]
        made.append(Example(str(i), ids, [-100] * len(ids), roles, len(ids)))
    return split_template(made)


def written(model, beams, **choice):
    return [t.tokens for t in translate(model, TOY, prompts(), num_beams=beams, max_new_tokens=6, batch_size=3, progress=False, **choice)]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_gating_nothing_is_the_plain_model_and_gating_all_the_merged_one(kind, beams):
    model, rows = talker(kind), TunedRows(range(60), torch.randn(60, 16, generator=torch.Generator().manual_seed(3)))
    plain, merged = written(model, beams), written(rows.merged(model), beams)
    assert written(model, beams, rows=rows, read_by=()) == plain != merged
    assert written(model, beams, rows=rows, read_by=CHANNELS["everywhere"]) == merged
    assert written(model, beams, rows=TunedRows.of(model, range(60)), read_by=CHANNELS["source"]) == plain


def test_each_channel_reads_its_own_positions_and_no_others():
    "Under the cache, every channel equals the model that is given the mixed embeddings, position by position."
    model, rows = talker("llama"), TunedRows(range(60), torch.randn(60, 16, generator=torch.Generator().manual_seed(3)))
    (prompt,) = prompts(1, seed=2)
    assert {*prompt.roles} == {0, 1, 2, TAIL}
    embedding, merged = model.get_input_embeddings().weight, rows.merged(model).get_input_embeddings().weight
    seen = set()
    for channel, read_by in CHANNELS.items():
        (done,) = translate(model, TOY, [prompt], rows=rows, read_by=read_by, max_new_tokens=5, progress=False)
        seen.add(done.tokens)
        ids, roles = list(prompt.ids), list(prompt.roles)
        for token in done.tokens:
            mixed = torch.stack([(merged if r in read_by else embedding)[i] for i, r in zip(ids, roles)])
            with torch.no_grad():
                assert int(model(inputs_embeds=mixed[None]).logits[0, -1].argmax()) == token, channel
            ids.append(token)
            roles.append(int(Role.TARGET))
    assert len(seen) > 3  # the channels do not all say the same


def test_the_channels_divide_every_position():
    parts = ("head", "tail", "source", "history")
    assert sorted(sum((CHANNELS[p] for p in parts), ())) == sorted({*map(int, Role), TAIL})
    examples = prompts(20)
    found = opportunity(examples, range(64), [Translation(e.id, "", True, (5, 6, 63)) for e in examples])
    assert sum(found[p] for p in parts) == pytest.approx(found["everywhere"]) == np.mean([len(e.ids) for e in examples]) + 2
    assert found["head"] + found["tail"] == pytest.approx(found["instruction"]) and found["history"] == 2
    assert found["instruction"] + found["source"] == pytest.approx(found["prefill"])


def test_count_matching_takes_the_nearest_and_nobody_twice():
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 500, 200)
    ids, pool = np.arange(20), np.arange(20, 200)
    chosen = count_matched(counts, ids, pool)
    assert len(set(chosen)) == 20 and set(chosen) <= set(pool)
    apart = np.abs(np.sort(np.log(counts[chosen])) - np.sort(np.log(counts[ids]))).max()
    assert apart < 0.4 and count_matched(counts, ids, pool[:3]).tolist() == [20, 21, 22]


@pytest.mark.parametrize(
    "value, result", [((0.1, 0, 0.2), "pass"), ((0.6, 0.4, 0.8), "cannot tell"), ((0.9, 0.8, 1), "fail"), ((0.4, 0.3, 0.5), "cannot tell")]
)
def test_a_check_needs_its_whole_interval(value, result):
    assert judge(Interval(*value), 0.5) == result and judge(UNKNOWN, 0.5) == judge(None, 0.5) == "cannot tell"


def test_the_sentence_of_a_check_speaks_of_the_arm_that_decided():
    arms = [audit_module.Arm(name, name, (1,)) for name in ("random_rows", "random_rows_2", "count_matched_rows")]
    said = lambda *values: next(
        c for c in audit_module._arm_checks(arms, dict(zip([a.name for a in arms], values)), audit_module.THRESHOLDS) if c.name == "controls"
    )
    open_, over, under = Interval(0.6, 0.4, 0.8), Interval(0.55, 0.51, 0.59), Interval(0.1, 0.0, 0.2)
    assert (found := said(open_, over, under)).result == "fail" and found.value == over and "(random_rows_2) recover 55%" in found.sentence
    assert (found := said(open_, under, under)).result == "cannot tell" and found.value == open_
    assert (found := said(UNKNOWN, under, under)).result == "cannot tell" and "unknown" in found.sentence
    assert (found := said(under, under, Interval(0.2, 0.1, 0.3))).result == "pass" and "(count_matched_rows) recover 20%" in found.sentence


def test_the_verdict_rests_on_the_decisive_checks():
    check = lambda name, result, decisive=True: audit_module.Check(name, "?", result, None, 0.5, f"The {name} sentence.", decisive)
    names = ("gain", "stopping", "template", "controls", "noise")
    said = lambda **results: _verdict([check(n, results.get(n, "pass")) for n in names] + [check("one_row", results.get("one_row", "pass"), False)])
    assert said()[0] == said(one_row="fail")[0] == "real"
    assert said(controls="fail", noise="cannot tell") == ("artefact", "An artefact: the controls sentence.")
    assert said(noise="cannot tell") == ("cannot tell", "Cannot tell: the noise sentence.")
    assert said(gain="fail", stopping="fail")[0] == "no gain" and said(gain="cannot tell")[0] == "cannot tell"


def test_overlap():
    a, b = (Scan(np.array(x, float), None, 8) for x in ([4, 3, 2, 1, 0], [3, 4, 2, 1, 0]))
    assert overlap(a, b, 1)["jaccard"] == 0 and overlap(a, b, 2)["jaccard"] == 1 and overlap(a, b, 2)["rank_correlation"] == pytest.approx(0.8)
    with pytest.raises(ValueError, match="5 and 4"):
        overlap(a, Scan(np.ones(4), None, 8), 1)


def test_membership_is_told_from_frequency():
    "Statistics that follow the count alone show no membership; template rows that move more do."
    rng = np.random.default_rng(0)
    words = [rng.choice(np.arange(20, 300), size=rng.integers(20, 40), p=np.arange(280, 0, -1) / np.arange(281).sum()).tolist() for _ in range(60)]
    examples = [Example(str(i), [*range(5, 12), *w], [-100] * (7 + len(w)), [1] * 7 + [2] * len(w), 7 + len(w)) for i, w in enumerate(words)]
    counts = np.bincount([i for e in examples for i in e.ids], minlength=320)
    noise = rng.normal(0, 0.3, 320)
    frequency = template_membership(Scan(np.where(counts, np.exp(np.log1p(counts) + noise), 0), None, 8), examples)
    prompt = template_membership(Scan(np.where(counts, np.exp(noise), 0) + 9.0 * (np.isin(np.arange(320), range(5, 12))), None, 8), examples)
    assert frequency["pairs"] == prompt["pairs"] == 7 and prompt["template"] == 4 and prompt["matched"] > 50
    assert prompt["wilcoxon_pvalue"] == pytest.approx(1 / 2**7) and prompt["rank_shift"] > 50 and prompt["rank_shift_pvalue"] < 1e-3
    assert abs(frequency["rank_shift"]) < prompt["rank_shift"] / 3
    marked = [
        e._replace(ids=[1, *e.ids, 2], labels=[-100, *e.labels, -100], roles=[0, *e.roles, 0]) for e in examples
    ]  # BOS and EOS, as often as the template's
    still = Scan(np.where(np.arange(320) < 3, 0.0, np.where(counts, np.exp(np.log1p(counts) + noise), 0)), None, 8)
    assert template_membership(still, marked) == frequency  # they belong to neither side
    with pytest.raises(ValueError, match="nothing to compare"):
        template_membership(Scan(np.ones(64), None, 8), [e._replace(roles=[1] * len(e.roles)) for e in prompts()])


@pytest.fixture(scope="module")
def made():
    "The small world, a quick ticket for it, and its data."
    world = build_world(0, "small", progress=False)
    model, tokenizer = load_model(str(world.folder))
    train, test = load_pairs(world.split("train"), LANGUAGES, 30), load_pairs(world.split("test"), LANGUAGES, 8)
    examples = encode_all(tokenizer, "babel", train, LANGUAGES)
    settings, recipe = dict(lr_embed=3e-3, lr_partial=1e-2, epochs=2, batch_size=10), dict(epochs=2, batch_size=10, seed=0, progress=False)
    embed_rows = embed_tune(model, examples, lr=settings["lr_embed"], **recipe)
    scan = ks_scan(model.get_input_embeddings().weight, embed_rows.merged(model).get_input_embeddings().weight)
    ids = scan.top(4)
    facts = dict(template=asdict(get_template("babel")), languages=LANGUAGES, settings=settings, seed=0, license="mit")
    rows = partial_tune(model, ids, examples, lr=settings["lr_partial"], **recipe)
    ticket = Ticket.make(model, tokenizer, ids, name=str(world.folder), scan=scan, rows=rows, embed_rows=embed_rows, sentences=[p.hash for p in train], **facts)
    return model, tokenizer, ticket, train, test


OPTIONS = dict(max_new_tokens=12, batch_size=8, samples=50, progress=False)


def run(made, out, **changes):
    return audit_ticket(*made, out=out, **OPTIONS | changes)


def generated(audit):
    "The names of the arms that have a file."
    return [a.name for a in audit.arms if a.rows != "cut"]


@pytest.fixture(scope="module")
def audited(made, tmp_path_factory):
    out = tmp_path_factory.mktemp("audit")
    return run(made, out), out


def test_every_control_is_a_choice_of_rows(made, audited):
    model, _, ticket, train, _ = made
    arms = {a.name: a for a in audited[0].arms}
    ids = set(ticket.ids.tolist())
    assert {
        "base",
        "ticket",
        "embed_tuning",
        "noise",
        "flipped",
        "all_but_ticket",
        "frozen_ticket",
        "random_rows",
        "count_matched_rows",
        "template_rows",
        "frequent_rows",
    } <= arms.keys()
    assert {f"only_{c}" for c in CHANNELS} - {"only_everywhere"} <= arms.keys() and f"one_row_{ticket.ids[0]}" in arms
    for name in ("random_rows", "count_matched_rows", "template_rows", "all_but_ticket", "frozen_ticket"):
        assert not ids & set(arms[name].ids), name
    assert len(arms["random_rows"].ids) == len(ids) and {2, 7} <= {a.ids[0] for a in arms.values() if a.name.startswith("one_row")}  # BOS and the new line
    template = {i for e in encode_all(made[1], "babel", train, LANGUAGES) for i, r in zip(e.ids, e.roles) if r in (Role.INSTRUCTION, Role.SPECIAL)}
    for name in ("random_rows", "noise"):  # three draws, each with a seed of its own
        draws = [a for n, a in arms.items() if n == name or n.startswith(f"{name}_")]
        assert [a.seed for a in draws] == [0, 1, 2] and (name == "noise" or len({a.ids for a in draws}) == 3)
    assert not template & set(arms["count_matched_rows"].ids) and set(arms["template_rows"].ids) <= template
    assert set(arms["all_but_ticket"].ids) | ids == set(ticket.embed_rows.ids.tolist())
    flipped = audit_module._rows_of(arms["flipped"], model, ticket, [], None, "", False)
    torch.testing.assert_close(flipped.delta(model), -ticket.rows.delta(model))


def test_what_is_found_is_what_the_arms_say(made, audited):
    model, tokenizer, ticket, _, test = made
    audit, out = audited
    plain = translate(model, tokenizer, encode_all(tokenizer, "babel", test, LANGUAGES), max_new_tokens=12, batch_size=8, progress=False)
    assert audit.translations["base"] == plain
    merged = translate(ticket.rows.merged(model), tokenizer, encode_all(tokenizer, "babel", test, LANGUAGES), max_new_tokens=12, batch_size=8, progress=False)
    assert audit.translations["ticket"] == merged
    record = json.loads((out / "audit.json").read_text())
    assert record["sentence"] == audit.sentence and list(record["arms"]) == [a.name for a in audit.arms] and record["thresholds"] == THRESHOLDS
    assert {c["name"] for c in record["checks"]} == set(THRESHOLDS) and all(c["result"] in ("pass", "fail", "cannot tell") for c in record["checks"])
    assert audit.sentence in (out / "audit.md").read_text() and (out / "audit.png").read_bytes()[:4] == b"\x89PNG"
    assert audit.translations["forced_stop"] == forced_stop(audit.translations["base"], audit.translations["ticket"], tokenizer)
    ticket_gain = audit.scores["ticket"]["whole"]["bleu"] - audit.scores["base"]["whole"]["bleu"]
    only = audit.recoveries["only_history"]
    if only.value is not None:
        assert only.value * ticket_gain == pytest.approx(audit.scores["only_history"]["whole"]["bleu"] - audit.scores["base"]["whole"]["bleu"], abs=1e-6)


def counting(monkeypatch):
    "The names of the arms that are generated from now on."
    calls, real = [], audit_module.translate

    def counted(*args, label, **kwargs):
        calls.append(label.split()[2].rstrip(":"))
        return real(*args, label=label, **kwargs)

    monkeypatch.setattr(audit_module, "translate", counted)
    return calls


def test_arms_are_taken_over_only_if_their_fingerprint_fits(made, audited, tmp_path, monkeypatch):
    model, tokenizer, ticket, train, test = made
    out = tmp_path / "audit"
    shutil.copytree(audited[1], out)
    calls, names = counting(monkeypatch), generated(audited[0])
    again = run(made, out)
    assert calls == [] and again.recoveries == audited[0].recoveries and again.sentence == audited[0].sentence
    other = Ticket(ticket.ids, ticket.info, ticket.rows.scale(model, 0.5), ticket.embed_rows, ticket.scan, ticket.sentences)
    run((model, tokenizer, other, train, test), out)
    assert calls == [a.name for a in audited[0].arms if a.rows in ("ticket", "noise", "flipped") and a.ids]  # the others do not read the ticket's rows
    calls.clear()
    run((model, tokenizer, other, train, test[:-1]), out, arms=audited[0].arms[:4])
    assert calls == names[:3]
    calls.clear()
    for broken in ("", "{", '{"fingerprint": 1}'):
        (out / "arms" / "base.json").write_text(broken)
        run((model, tokenizer, other, train, test[:-1]), out, arms=audited[0].arms[:3])
    assert calls == ["base"] * 3


VICTIM = """
import signal
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell without job control starts its children deaf to it
from pathlib import Path
from kslottery.audit import audit_ticket
from kslottery.core import load_model
from kslottery.data import load_pairs
from kslottery.ticket import Ticket
folder = Path(sys.argv[1])
ticket = Ticket.load(folder / "ticket")
model, tokenizer = load_model(ticket.info["model"])
world, languages = Path(ticket.info["model"]), ticket.info["languages"]
audit_ticket(model, tokenizer, ticket, load_pairs(world / "train.jsonl", languages, 30), load_pairs(world / "test.jsonl", languages, 8), out=folder / "audit",
             max_new_tokens=12, batch_size=8, samples=50, progress=False)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_killed_audit_goes_on_where_it_was(made, audited, tmp_path, monkeypatch, how):
    made[2].save(tmp_path / "ticket")
    child = subprocess.Popen([sys.executable, "-c", VICTIM, str(tmp_path)], stderr=subprocess.PIPE, text=True)
    done = lambda: sorted(p.stem for p in (tmp_path / "audit" / "arms").glob("[!.]*.json"))
    deadline = time.time() + 120
    while len(done()) < 12 and child.poll() is None and time.time() < deadline:
        time.sleep(0.01)  # until it trains the controls
    child.send_signal(how)
    _, error = child.communicate()
    finished = done()
    assert child.returncode and 12 <= len(finished) < len(generated(audited[0])), error
    assert all(json.loads((tmp_path / "audit" / "arms" / f"{name}.json").read_text())["translations"] for name in finished)
    calls = counting(monkeypatch)
    resumed = run(made, tmp_path / "audit")
    assert calls == [name for name in generated(audited[0]) if name not in finished]
    assert resumed.translations == audited[0].translations and resumed.as_dict()["checks"] == audited[0].as_dict()["checks"]
    assert not list((tmp_path / "audit" / "arms").glob(".*"))


def test_without_embed_rows_data_or_settings_it_says_what_it_cannot_tell(made, tmp_path):
    model, tokenizer, ticket, train, test = made
    bare = Ticket(ticket.ids, {**ticket.info, "settings": None}, ticket.rows, None, None, ticket.sentences)
    audit = run((model, tokenizer, bare, [], test), tmp_path, fast=True)
    assert {a.rows for a in audit.arms} == {"ticket", "noise", "cut"}
    assert {c.name for c in audit.checks if c.sentence.startswith("No arm")} == {"controls", "one_row", "selection", "necessary", "replaceable"}
    assert audit.verdict != "real"


def test_a_ticket_under_another_prompt(made, audited, tmp_path):
    model, tokenizer, ticket, _, test = made
    asked = {
        "its own": "babel",
        "short": "From {source_language}: {source}\nTo {target_language}: {target}",
        "other": "{source_language}: {source}\n{target_language}: {target}",
    }
    gains = template_transfer(model, tokenizer, ticket, test, asked, out=tmp_path, **OPTIONS)
    assert gains["its own"] == audited[0].decomposition
    assert len({repr(g.base) for g in gains.values()}) == 3  # two prompts without a name of their own stay apart
    assert sorted(p.name for p in (tmp_path / "short" / "arms").iterdir()) == ["base.json", "ticket.json"]


def test_shared_rows_are_audited_without_channels(tmp_path):
    model = talker("gpt2")
    rows = TunedRows([5, 6], torch.randn(2, 16), "shared")
    ticket = Ticket.make(model, TOY, [5, 6], name="toy", rows=rows)
    assert not [a for a in plan_arms(TOY, ticket, prompts(), train=False) if a.channel != "everywhere"]


@pytest.mark.parametrize(
    "change, part", [("used", "1 test sentences were used for tuning"), ("fewer", "not the same"), ("none", "no test sentences"), ("empty", "no tuned rows")]
)
def test_what_cannot_be_audited_is_refused(made, tmp_path, change, part):
    model, tokenizer, ticket, train, test = made
    test = [*test, train[0]] if change == "used" else [] if change == "none" else test
    ticket = Ticket(np.zeros(0, np.int64), ticket.info) if change == "empty" else ticket
    with pytest.raises(ValueError, match=part):
        run((model, tokenizer, ticket, train[:5] if change == "fewer" else train, test), tmp_path / "out")
    with pytest.raises(ValueError, match="base and ticket"):
        run(made, tmp_path / "out", arms=[Arm("base", "base", ())])
    assert not (tmp_path / "out").exists()


def test_audit_from_the_command_line_and_the_card(made, audited, tmp_path):
    _, _, ticket, train, _ = made
    folder, world = tmp_path / "ticket", build_world(0, "small", progress=False)
    ticket.save(folder)
    assert "not been audited" in (folder / "README.md").read_text()
    (tmp_path / "train.jsonl").write_text("".join(world.split("train").read_text().splitlines(True)[: len(train)]))
    words = (
        "audit",
        folder,
        "--train",
        tmp_path / "train.jsonl",
        "--test",
        world.split("test"),
        "--limit",
        8,
        "--max-new-tokens",
        12,
        "--fast",
        "--samples",
        50,
    )
    status, said, error = kslottery(*words)
    assert status == 0, error
    record = json.loads((folder / "audit" / "audit.json").read_text())
    assert said.rstrip("\n").split("\n")[-1] == record["sentence"]
    again = Ticket.load(folder)
    assert again.audit == record and (folder / "audit.png").exists()
    card = (folder / "README.md").read_text()
    assert record["sentence"] in card and "![audit](audit.png)" in card and record["report"] in card
    status, said, error = invoke(*words, "--json")
    assert status == 0 and json.loads(said)["checks"] == record["checks"], error
    for wrong, part in (
        (("--train", ""), "--train"),
        (("--test", ""), "--test"),
        (("--test", tmp_path / "train.jsonl"), "were used for tuning"),
        (("--train", world.split("train")), "not the same"),
        (("--model", tmp_path), "no config.json"),
    ):
        status, _, error = invoke(*words, *wrong)
        assert status == 2 and part in error and error.strip().count("\n") == 0, (wrong, error)
    status, _, error = invoke("audit", tmp_path)
    assert status == 2 and "no ticket.json" in error
    status, _, error = invoke(
        "audit", folder, "--test", world.split("test"), "--limit", 8, "--max-new-tokens", 12, "--fast", "--train", "none", "--samples", 50
    )
    assert status == 0, error


def test_the_cards_header_survives_a_round_trip(made, tmp_path):
    _, _, ticket, _, _ = made
    for languages, name in (("en-ca", "org/model"), ("no-de", 'strange: "name" #1'), ("Aldan-Borel", "model")):
        about = {k: v for k, v in ticket.info.items() if k != "base_model"}  # as older tickets are
        ticket = Ticket(ticket.ids, {**about, "languages": languages, "model": name, "tokens": ["|", "\n", "---", None]}, ticket.rows, scan=ticket.scan)
        ticket.save(tmp_path / "ticket")
        text = (tmp_path / "ticket" / "README.md").read_text()
        card = ModelCard(text)
        data = card.data
        assert (data.base_model, data.library_name, data.pipeline_tag, data.license) == (None if " " in name else name, "peft", "text-generation", "mit")
        assert data.language == (languages.split("-") if languages != "Aldan-Borel" else None) and "kslottery" in data.tags
        assert ModelCardData(**data.to_dict()).to_yaml() == data.to_yaml()
        card.save(tmp_path / "card.md")
        assert (tmp_path / "card.md").read_text() == text  # written again by the Hub's library, nothing is lost
        table = [line for line in text.split("\n") if line.startswith("| `")]
        assert len(table) == 4 and all(line.replace(r"\|", "").count("|") == 5 for line in table)
