"""The audit: gates that open and shut token for token, arms that are a table, a runner that goes on after a kill."""

import copy
import json
import re
import shutil
import signal
import subprocess
import time
import weakref
from dataclasses import FrozenInstanceError, replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig, PrefixTuningConfig, ShiraConfig, TrainableTokensConfig, get_peft_model
from scipy.stats import binom
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import forks
from conftest import ARCHITECTURES, TOY, invoke, kslottery, talker
from kslottery import audit as audit_module
from kslottery.audit import (
    ARMS,
    CHANNELS,
    SUSPICIONS,
    Arm,
    AuditSettings,
    _adapted,
    audit_models,
    audit_ticket,
    count_matched,
    opportunity,
    overlap,
    plan_arms,
    template_membership,
    template_transfer,
)
from kslottery.babel import build_world
from kslottery.core import load_model
from kslottery.data import INSTRUCTION, Example, Pair, Prompt, Role, encode_all, load_pairs
from kslottery.decomposition import Bootstrap, Interval, decompose, forced_stop
from kslottery.evaluation import Generation, Translation, translate
from kslottery.ks import Scan
from kslottery.lottery import find_ticket
from kslottery.plots import plot_audit
from kslottery.rows import TunedRows, weights_fingerprint
from kslottery.ticket import Provenance, Ticket
from kslottery.training import Training
from kslottery.tuning import Recipe, peft_tune

LANGUAGES = "Aldan-Borel"
ASKED = Prompt("t9 t10 {source} t11 {target}")


def with_bos():
    "A tokenizer of 64 words that puts a BOS before every prompt."
    special = {0: "<pad>", 1: "<s>", 63: "</s>"}
    words = Tokenizer(models.WordLevel({special.get(i, f"t{i}"): i for i in range(64)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def sentences(n=5, seed=0):
    "Random sentences of one to three words."
    rng = np.random.default_rng(seed)
    said = lambda: " ".join(f"t{i}" for i in rng.integers(2, 60, rng.integers(1, 4)))
    return [Pair(str(i), said(), "t5") for i in range(n)]


def prompts(n=5, seed=0):
    "Random prompts of all parts: BOS, head, source, tail."
    made = [e._replace(ids=e.ids[: e.prompt], roles=e.roles[: e.prompt]) for e in encoded(n, seed)]
    return [e._replace(labels=[-100] * e.prompt) for e in made]


def encoded(n=5, seed=0):
    return encode_all(with_bos(), ASKED, sentences(n, seed))


def written(model, beams, *rows, **gate):
    "The tokens of some continuations."
    how = Generation(num_beams=beams, max_new_tokens=6, batch_size=3)
    done = translate(model, with_bos(), sentences(), ASKED, *rows, generation=how, progress=False, **gate)
    return [t.tokens for t in done]


def merged(rows, model):
    return rows.write(copy.deepcopy(model))


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_gating_nothing_is_the_plain_model_and_gating_all_the_merged_one(kind, beams):
    model, rows = talker(kind), TunedRows(range(60), torch.randn(60, 16, generator=torch.Generator().manual_seed(3)))
    plain, tuned = written(model, beams), written(merged(rows, model), beams)
    assert written(model, beams, rows, read_by=()) == plain != tuned
    assert written(model, beams, rows, read_by=CHANNELS["everywhere"]) == tuned
    assert written(model, beams, TunedRows.of(model, range(60)), read_by=CHANNELS["source"]) == plain


def test_each_channel_reads_its_own_positions_and_no_others():
    "Under the cache, every channel equals the model that is given the mixed embeddings, position by position."
    model, rows = talker("llama"), TunedRows(range(60), torch.randn(60, 16, generator=torch.Generator().manual_seed(3)))
    pairs, (prompt,) = sentences(1, seed=2), prompts(1, seed=2)
    assert {*prompt.roles} == {Role.SPECIAL, Role.HEAD, Role.SOURCE, Role.TAIL}
    plain, tuned = (m.get_input_embeddings().weight for m in (model, merged(rows, model)))
    seen, how = set(), dict(generation=Generation(max_new_tokens=5), progress=False)
    for channel, read_by in CHANNELS.items():
        (done,) = translate(model, with_bos(), pairs, ASKED, rows, read_by=read_by, **how)
        seen.add(done.tokens)
        ids, roles = list(prompt.ids), list(prompt.roles)
        for token in done.tokens:
            mixed = torch.stack([(tuned if r in read_by else plain)[i] for i, r in zip(ids, roles)])
            with torch.no_grad():
                assert int(model(inputs_embeds=mixed[None]).logits[0, -1].argmax()) == token, channel
            ids.append(token)
            roles.append(int(Role.TARGET))
    assert len(seen) > 3  # the channels do not all say the same


def test_the_channels_divide_every_position():
    parts = ("head", "tail", "source", "history")
    assert sorted(sum((CHANNELS[p] for p in parts), ())) == sorted(Role)
    examples = prompts(20)
    found = opportunity(examples, range(64), [Translation(e.id, "", True, (5, 6, 63)) for e in examples])
    assert (
        sum(found[p] for p in parts)
        == pytest.approx(found["everywhere"])
        == np.mean([len(e.ids) for e in examples]) + 2
    )
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


ROWS = ("none", "ticket", "noise", "flipped", "embed", "tuned", "embed_tuned", "cut", "model")
NO_ROWS = ("none", "cut", "model")


@pytest.mark.parametrize("name", [*ARMS, "nosie", "", "noise*", "random_rows_2", "one_row_13", "only_everywhere"])
def test_no_arm_outside_the_table_can_be_made(name):
    "Every combination of a name, what stands in the rows and where they are read: those of the table, and no others."
    assert {kind.rows for kind in ARMS.values()} == {*ROWS} == {*audit_module._ROWS, "cut"}
    assert {kind.channel for kind in ARMS.values()} == {*CHANNELS}
    if name not in ARMS:
        with pytest.raises(ValueError, match=f"choose {', '.join(ARMS)}"):
            Arm(name, (5,))
    for rows, channel in product(ROWS, CHANNELS):
        ids = () if name in ARMS and ARMS[name].rows in NO_ROWS else (5,)
        with pytest.raises(TypeError):
            Arm(name, ids, rows=rows, channel=channel)
        if name not in ARMS:
            continue
        arm = Arm(name, ids)
        if (rows, channel) == (ARMS[name].rows, ARMS[name].channel):
            assert (arm.rows, arm.channel, arm.check, arm.against) == ARMS[name][1:5]
            continue
        assert (arm.rows, arm.channel) != (rows, channel)
        for change in (dict(rows=rows), dict(channel=channel), dict(rows=rows, channel=channel)):
            with pytest.raises((ValueError, TypeError), match="init=False"):  # the latter since Python 3.13
                replace(arm, **change)
            with pytest.raises(FrozenInstanceError):
                setattr(arm, *next(iter(change.items())))


def test_an_arm_has_the_rows_it_needs_and_a_key_of_its_own():
    for name, kind in ARMS.items():
        right, wrong = ((), (5,)) if kind.rows in NO_ROWS else ((5,), ())
        assert Arm(name, right).key == (f"{name}_5" if name == "one_row" else name)
        with pytest.raises(ValueError, match=f"the arm {name} is given {len(wrong)} ids"):
            Arm(name, wrong)
    with pytest.raises(ValueError, match="2 ids, but needs 1"):
        Arm("one_row", (5, 6))
    drawn = [Arm("random_rows", (n,), n, n) for n in range(3)]
    assert [a.key for a in drawn] == ["random_rows", "random_rows_2", "random_rows_3"]
    assert drawn[2].label == "random words (draw 3)" and Arm("one_row", (5,), token="⏎").label == "only “⏎”"
    assert (
        Arm("one_row", np.array([5])) == Arm("one_row", (5,), token="⏎") and Arm("one_row", (5,)).label == "only row 5"
    )


def test_every_check_that_looks_at_arms_has_one():
    assert {kind.check for kind in ARMS.values()} - {None} == {*SUSPICIONS} - {"ranking"}
    assert {kind.against for kind in ARMS.values()} == {"ticket", "embed_tuning", "tuned"}


@pytest.mark.parametrize(
    "change, part",
    [
        (dict(draws=0), "draws 0"),
        (dict(singles=-1), "singles is -1"),
        (dict(arms=(Arm("base"),)), "base and ticket must come first"),
        (dict(arms=(Arm("base"), Arm("ticket", (5,)), *[Arm("noise", (5,))] * 2)), "no key may come twice"),
    ],
)
def test_settings_are_checked_when_they_are_made(change, part):
    with pytest.raises(ValueError, match=part):
        AuditSettings(**change)


# What the checks say: constructed truths


def said(texts):
    return [Translation(str(i), text, True) for i, text in enumerate(texts)]


WORDS = [f"w{i}" for i in range(80)]


def references(n=100, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(7, 14))) for _ in range(n)]


def noisy(texts, rate, seed=1):
    "Each word is wrong at this rate."
    rng = np.random.default_rng(seed)
    return [" ".join("x" if rng.random() < rate else word for word in text.split()) for text in texts]


def rambling(texts, seed=2):
    rng = np.random.default_rng(seed)
    return [text + "\n" + " ".join(rng.choice(WORDS, 25)) for text in texts]


def judge(references, base, ticket, **texts):
    "Verdict, checks by name, and what is said, of texts without a model; the arms by their names."
    arms = [Arm("base"), *(Arm(name, (5,)) for name in ("ticket", *texts))]
    written = {arm.key: said(x) for arm, x in zip(arms, (base, ticket, *texts.values()))}
    gained = decompose(written["base"], written["ticket"], references)
    contrasts = audit_module._contrasts(written, arms, gained, None, references)
    checks = {c: audit_module._arm_check(c, arms, contrasts, 150 / gained.units) for c in SUSPICIONS if c != "ranking"}
    return gained.verdict, checks, *audit_module._said(gained, list(checks.values()))


def results(checks):
    return {name: check.result for name, check in checks.items() if check.value is not None}


def test_content_that_the_prompts_rows_carry_is_content():
    "A soft prompt: all is gained by rows that are read in the instruction only. That is no stopping."
    r = references()
    better = noisy(r, 0.1)
    verdict, checks, bold, lines = judge(r, noisy(r, 0.6), better, only_instruction=better, noise=noisy(r, 0.6, 3))
    assert verdict == "content" and results(checks) == {"template": "found", "noise": "not found"}
    assert bold.startswith("Content: ") and bold.endswith(" But: carried by the prompt's rows.")
    assert "Not found: a blind change of these rows does at least half." in lines
    asked = next(line for line in lines if line.startswith("Not asked: "))
    assert "one row alone" in asked and "prompt's" not in asked


def test_every_check_that_failed_is_named():
    "One row, necessity, replaceability: none of them once decided, so none of them was said."
    r = references()
    better, worse = noisy(r, 0.1), noisy(r, 0.6)
    others = dict(one_row=better, all_but_ticket=better, frozen_ticket=noisy(r, 0.1, 4), template_rows=better)
    verdict, checks, bold, lines = judge(r, worse, better, **others, random_rows=worse)
    failed = ("one_row", "necessary", "replaceable", "selection")
    assert results(checks) == dict.fromkeys(failed, "found") | {"controls": "not found"}
    assert verdict == "content" and all(SUSPICIONS[name] in bold for name in failed[:3]) and "No artefact" not in bold
    assert any(line.startswith("Other rows of the prompt do at least half: other rows of the templ") for line in lines)


def test_no_artefact_is_found_only_where_no_arm_does_half():
    r = references()
    better, worse = noisy(r, 0.1), noisy(r, 0.6)
    close = noisy(r, 0.22, 7)  # about half
    verdict, checks, bold, lines = judge(r, worse, better, only_instruction=worse, random_rows=close)
    assert results(checks) == {"template": "not found", "controls": "cannot tell"}
    assert bold.endswith(" No artefact found by these checks (1 of 7 could tell).")
    assert "Cannot tell: other rows do at least half." in lines
    *_, bold, lines = judge(r, worse, better, only_instruction=worse, frequent_rows=better)
    assert "No artefact" not in bold and any("most frequent rows: " in line for line in lines)
    assert "real" not in bold and lines[-1].startswith("One training seed, one metric (bleu, delta 1), 100 test")


def test_stopping_is_compared_by_the_gain_and_content_by_the_content():
    "An arm that only stops has all of a gain that is stopping, half of a mixed one, and nothing of the content."
    r = references()
    fair, better = noisy(r, 0.3), noisy(r, 0.1)
    verdict, checks, bold, _ = judge(r, rambling(better), better, one_row=better, noise=rambling(better, 5))
    assert verdict == "stopping" and results(checks) == {"noise": "not found", "one_row": "found"}
    assert bold.endswith(". One row alone does at least half.") and "gain." in checks["one_row"].sentence
    verdict, checks, bold, _ = judge(r, rambling(fair), better, one_row=fair, only_instruction=better)
    assert verdict == "mixed" and results(checks) == {"template": "found", "one_row": "not found"}
    assert "gain and content" in checks["one_row"].sentence and "But: carried" in bold
    verdict, checks, *_ = judge(r, rambling(fair, 5), rambling(better), one_row=fair)
    assert verdict == "content" and results(checks) == {"one_row": "not found"}  # though it gains more in all


@pytest.mark.parametrize("tuned", ["better", "worse"])
def test_without_a_gain_nothing_is_compared(tuned):
    r = references()
    texts = {"better": noisy(r, 0.3), "worse": noisy(r, 0.9, 3)}
    verdict, checks, bold, lines = judge(r, noisy(r, 0.3), texts[tuned], one_row=r, random_rows=r)
    assert verdict == {"better": "no gain", "worse": "a loss"}[tuned]
    assert {c.result for c in checks.values()} == {"cannot tell"} and len(lines) == 1
    assert {c.sentence for c in checks.values()} == {"There is no gain to compare with."} and "But" not in bold


NUMBERS = dict(metric=lambda texts, references: [float(text.split()[0]) for text in texts])


def simulated(seed, share, arms=6, n=50, per=1):
    "What arms do beyond half that have this share of a gain of 40 points, n sentences in documents of so many."
    rng = np.random.default_rng(seed)
    shared = lambda scale: np.repeat(rng.normal(0, scale, n // per), per) + rng.normal(0, 5, n)
    gain = np.repeat(rng.exponential(40, n // per), per)
    scores = {"base": 100 + shared(5), "ticket": 100 + gain + shared(5)}
    names = [f"random_rows_{k}" for k in range(2, arms + 2)]
    scores |= {name: 100 + share * gain + shared(5) for name in names}
    texts = {name: said([f"{x:.6f} y" for x in values]) for name, values in scores.items()}
    gained = SimpleNamespace(verdict="stopping", whole=Interval(40, 30, 50), rule="first line", rules={})
    drawn = [Arm("random_rows", (k,), draw=k) for k in range(1, arms + 1)]
    groups = [i // per for i in range(n)] if per > 1 else None
    references = [f"r{i}" for i in range(n)]
    found = audit_module._contrasts(texts, drawn, gained, None, references, groups=groups, **NUMBERS)
    return audit_module._arm_check("controls", drawn, found, 150 / (n // per)).result


@pytest.mark.parametrize("n, per", [(40, 1), (100, 4)])
def test_six_arms_at_a_half_seldom_make_a_false_finding(n, per):
    "Intervals one by one say so in a fifth of the samples; documents taken for sentences more often still."
    runs = 500
    wrong = sum(simulated(seed, 0.5, n=n, per=per) == "found" for seed in range(runs))
    assert wrong <= binom.ppf(0.999, runs, 0.05)


def test_an_arm_that_does_all_or_nothing_is_told():
    assert [simulated(seed, 1.0) for seed in range(5)] == ["found"] * 5
    assert [simulated(seed, 0.0) for seed in range(5)] == ["not found"] * 5


def test_one_arm_is_enough_and_few_sentences_are_not():
    arms = [
        Arm("random_rows", (1,)),
        Arm("random_rows", (2,), draw=1),
        Arm("count_matched_rows", (3,)),
        Arm("noise", (4,)),
    ]
    above, open_, below = Interval(9, 5, 13), Interval(1, -3, 5), Interval(-20, -25, -15)

    def check(*values, name="controls", guard=1.5):
        return audit_module._arm_check(name, arms, {"gain": dict(zip([a.key for a in arms], values))}, guard)

    found = check(below, above, open_, below)
    assert found.result == "found" and found.value == above
    assert found.sentence == "Random words (draw 2): +9.0 (+5.0 to +13.0) from half of the ticket's gain."
    assert (
        check(below, open_, below, above).result == "cannot tell"
        and check(below, below, below, above).result == "not found"
    )
    assert check(below, above, open_, below, guard=10).result == "cannot tell"  # nine points of a dozen sentences
    assert check(below, below, below, below, name="one_row").sentence == "No arm of this audit asks."


def test_the_ranking_is_a_line_of_its_own():
    check = audit_module._ranking(Interval(0.7, 0.6, 0.8))
    assert check.result == "found" and "70% (60% to 80%)" in check.sentence
    assert audit_module._ranking(Interval(0.4, 0.3, 0.6)).result == "cannot tell"
    assert audit_module._ranking(None).result == "cannot tell"


def test_a_short_audit_draws_its_sentences_and_keeps_documents_whole():
    drawn = audit_module._drawn
    assert len(drawn(range(300), 0, 50)) == 50 and drawn(range(300), 0, 50).max() > 150
    assert drawn(range(300), 0, 50).tolist() == drawn(range(300), 0, 50).tolist() != drawn(range(300), 1, 50).tolist()
    documents = np.repeat([f"d{i}" for i in range(40)], 7)
    kept = [documents[i] for i in drawn(documents, 0, 50)]
    assert 50 <= len(kept) < 57 and all(kept.count(name) == 7 for name in kept)
    assert drawn(range(9), 0, 50).tolist() == list(range(9))


def test_overlap():
    a, b = (Scan(np.array(x, float), None, 8) for x in ([4, 3, 2, 1, 0], [3, 4, 2, 1, 0]))
    assert (
        overlap(a, b, 1)["jaccard"] == 0
        and overlap(a, b, 2)["jaccard"] == 1
        and overlap(a, b, 2)["rank_correlation"] == pytest.approx(0.8)
    )
    with pytest.raises(ValueError, match="5 and 4"):
        overlap(a, Scan(np.ones(4), None, 8), 1)


def test_membership_is_told_from_frequency():
    "Statistics that follow the count alone show no membership; template rows that move more do."
    rng = np.random.default_rng(0)
    words = [
        rng.choice(
            np.arange(20, 300), size=rng.integers(20, 40), p=np.arange(280, 0, -1) / np.arange(281).sum()
        ).tolist()
        for _ in range(60)
    ]
    examples = [
        Example(
            str(i), [*range(5, 12), *w], [-100] * (7 + len(w)), [Role.HEAD] * 7 + [Role.SOURCE] * len(w), 7 + len(w)
        )
        for i, w in enumerate(words)
    ]
    counts = np.bincount([i for e in examples for i in e.ids], minlength=320)
    noise = rng.normal(0, 0.3, 320)
    frequency = template_membership(Scan(np.where(counts, np.exp(np.log1p(counts) + noise), 0), None, 8), examples)
    prompt = template_membership(
        Scan(np.where(counts, np.exp(noise), 0) + 9.0 * (np.isin(np.arange(320), range(5, 12))), None, 8), examples
    )
    assert frequency["pairs"] == prompt["pairs"] == 7 and prompt["template"] == 4 and prompt["matched"] > 50
    assert prompt["rank_shift"] > 50 and prompt["rank_shift_pvalue"] < 1e-3
    assert prompt["wilcoxon_pvalue"] is None and prompt["wilcoxon_reason"].startswith("0 of 7 tokens have a partner")
    assert abs(frequency["rank_shift"]) < prompt["rank_shift"] / 3
    marked = [
        e._replace(ids=[1, *e.ids, 2], labels=[-100, *e.labels, -100], roles=[0, *e.roles, 0]) for e in examples
    ]  # BOS and EOS, as often as the template's
    still = Scan(np.where(np.arange(320) < 3, 0.0, np.where(counts, np.exp(np.log1p(counts) + noise), 0)), None, 8)
    assert template_membership(still, marked) == frequency  # they belong to neither side
    as_often = [
        e._replace(ids=[*e.ids[:7], *range(300, 307)], roles=[*e.roles[:7], *[2] * 7], prompt=14) for e in examples
    ]
    fair = template_membership(Scan(9.0 * np.isin(np.arange(320), range(5, 12)) + np.exp(noise), None, 8), as_often)
    assert fair["wilcoxon_pvalue"] == pytest.approx(1 / 2**7) and fair["wilcoxon_reason"] is None
    with pytest.raises(ValueError, match="nothing to compare"):
        template_membership(
            Scan(np.ones(64), None, 8), [e._replace(roles=[Role.TAIL] * len(e.roles)) for e in prompts()]
        )


@pytest.fixture(scope="module")
def made():
    "The small world, a quick ticket for it, and its data."
    world = build_world(0, "small", progress=False)
    model, tokenizer = load_model(str(world.folder))
    train, test = load_pairs(world.split("train"), limit=30), load_pairs(world.split("test"), limit=8)
    recipe = Recipe(lr_embed=3e-3, epochs_embed=2, epochs_partial=2, batch_size=10, progress=False)
    ticket = find_ticket(model, tokenizer, train, world.prompt, top_k=4, recipe=recipe)
    return ticket, test, dict(train=train, model=model, tokenizer=tokenizer)


GENERATION = Generation(max_new_tokens=12, batch_size=8)
SETTINGS = AuditSettings(generation=GENERATION, bootstrap=Bootstrap(samples=50), progress=False)


def run(made, out, given=None, **changes):
    "The audit of what was made, with other settings or other things given."
    ticket, test, about = made
    return audit_ticket(ticket, test, out=out, settings=replace(SETTINGS, **changes), **about | (given or {}))


def read(folder):
    "The fingerprint of each arm that has a file."
    return {p.stem: json.loads(p.read_text())["fingerprint"] for p in (folder / "arms").glob("[!.]*.json")}


def once(audit, folder):
    "The keys of the arms that are generated: of two with one fingerprint, the first."
    prints = read(folder)
    keys = [a.key for a in audit.arms if a.rows != "cut"]
    return [key for n, key in enumerate(keys) if prints[key] not in [prints[k] for k in keys[:n]]]


@pytest.fixture(scope="module")
def audited(made, tmp_path_factory):
    out = tmp_path_factory.mktemp("audit")
    return run(made, out), out


def test_every_control_is_a_choice_of_rows(made, audited):
    ticket, _, about = made
    arms = {a.key: a for a in audited[0].arms}
    ids, examples = set(ticket.ids.tolist()), encode_all(about["tokenizer"], ticket.prompt, about["train"])
    assert set(ARMS) - {"one_row", "tuned", "tuned_stop"} <= arms.keys() and f"one_row_{ticket.ids[0]}" in arms
    for name in ("random_rows", "count_matched_rows", "template_rows", "all_but_ticket", "frozen_ticket"):
        assert not ids & set(arms[name].ids), name
    single = {a.ids[0]: a for a in arms.values() if a.name == "one_row"}
    assert len(arms["random_rows"].ids) == len(ids) and {2, 7} <= single.keys()  # BOS and the new line
    assert single[7].label == "only “⏎”"
    template = {i for e in examples for i, r in zip(e.ids, e.roles) if r in (*INSTRUCTION, Role.SPECIAL)}
    for name in ("random_rows", "noise"):  # three draws, each with a seed of its own
        draws = [a for a in arms.values() if a.name == name]
        assert [a.seed for a in draws] == [0, 1, 2] and (name == "noise" or len({a.ids for a in draws}) == 3)
        assert [a.key for a in draws] == [name, f"{name}_2", f"{name}_3"]
    assert not template & set(arms["count_matched_rows"].ids) and set(arms["template_rows"].ids) <= template
    assert set(arms["all_but_ticket"].ids) | ids == set(ticket.embed_rows.ids.tolist())
    bench = audit_module._bench(ticket, made[1], about["train"], about["model"], about["tokenizer"], SETTINGS)
    flipped = audit_module._ROWS["flipped"](arms["flipped"], bench)
    torch.testing.assert_close(flipped.delta(about["model"]), -ticket.rows.delta(about["model"]))


def test_what_is_found_is_what_the_arms_say(made, audited):
    (ticket, test, about), (audit, out) = made, audited
    model, tokenizer = about["model"], about["tokenizer"]
    write = lambda lm: translate(lm, tokenizer, test, ticket.prompt, generation=GENERATION, progress=False)
    assert audit.translations["base"] == write(model)
    assert audit.translations["ticket"] == write(merged(ticket.rows, model))
    record = json.loads((out / "audit.json").read_text())
    assert record["sentence"] == audit.sentence and record["lines"] == audit.lines
    assert record["verdict"] == record["decomposition"]["verdict"] == audit.decomposition.verdict
    assert list(record["arms"]) == [a.key for a in audit.arms]
    assert [c["name"] for c in record["checks"]] == list(SUSPICIONS)
    assert all(c["result"] in ("found", "not found", "cannot tell") for c in record["checks"])
    assert all(f"* {line}" in record["report"] for line in audit.lines)
    assert audit.sentence in (out / "audit.md").read_text() and (out / "audit.png").read_bytes()[:4] == b"\x89PNG"
    texts = audit.translations
    assert texts["forced_stop"] == forced_stop(texts["base"], texts["ticket"], tokenizer)
    bleu = lambda key: audit.scores[key]["whole"]["bleu"]
    only = audit.recoveries["only_history"]
    if only.value is not None:
        assert only.value * (bleu("ticket") - bleu("base")) == pytest.approx(
            bleu("only_history") - bleu("base"), abs=1e-6
        )


def test_an_audit_says_what_it_found_where_it_is_shown(audited):
    audit = audited[0]
    shown = repr(audit).split("\n")
    assert shown[0] == audit.sentence and len(shown) == 1 + len(audit.lines) + len(SUSPICIONS)
    page = audit._repr_markdown_()
    assert page.startswith(f"**{audit.sentence}**") and all(f"| {c.result} |" in page for c in audit.checks)
    assert "recovery" in audit.table() and "recovery" not in page


def test_the_figure_shows_every_arm_that_recovers_a_share(audited):
    audit = audited[0]
    told = replace(audit, recoveries={key: Interval(0.5, 0.4, 0.6) for key in audit.recoveries})
    shown = [label.get_text() for label in plot_audit(told).get_yticklabels()]
    wanted = [a.label + " (of Embed Tuning's gain)" * (a.against == "embed_tuning") for a in audit.arms[1:]]
    assert shown == wanted


def counting(monkeypatch):
    "The keys of the arms that are generated from now on."
    calls, real = [], audit_module._generated

    def counted(arm, *args):
        calls.append(arm.key)
        return real(arm, *args)

    monkeypatch.setattr(audit_module, "_generated", counted)
    return calls


def test_arms_are_taken_over_only_if_their_fingerprint_fits(made, audited, tmp_path, monkeypatch):
    ticket, test, about = made
    out = tmp_path / "audit"
    shutil.copytree(audited[1], out)
    calls, keys = counting(monkeypatch), once(*audited)
    again = run(made, out)
    assert calls == [] and again.recoveries == audited[0].recoveries and again.sentence == audited[0].sentence
    other = replace(ticket, rows=ticket.rows.scale(about["model"], 0.5))
    run((other, test, about), out)
    mine = [a.key for a in audited[0].arms if a.rows in ("ticket", "noise", "flipped")]
    assert calls == [key for key in keys if key in mine]  # the others do not read the ticket's rows
    calls.clear()
    few = tuple(audited[0].arms[:4])
    run((other, test[:-1], about), out, arms=few)
    assert calls == keys[:3]
    calls.clear()
    for broken in ("", "{", '{"fingerprint": 1}'):
        (out / "arms" / "base.json").write_text(broken)
        run((other, test[:-1], about), out, arms=few[:3])
    assert calls == ["base"] * 3


def test_identical_arms_are_translated_once(made, tmp_path, monkeypatch):
    "Two arms that read the same, at the same places; rows that stand nowhere are the base model."
    ticket, test, about = made
    calls, ids = counting(monkeypatch), tuple(ticket.ids)
    words = [a for a in plan_arms(about["tokenizer"], ticket, encode_all(about["tokenizer"], ticket.prompt, test))]
    word = next(a for a in words if a.name == "count_matched_rows").ids[:1]  # no token of the template
    arms = [Arm("base"), Arm("ticket", ids), Arm("noise", ids, 3), Arm("noise", ids, 3, 1), Arm("noise", ids, 4, 2)]
    unread = Ticket(word, Provenance.of(about["model"], about["tokenizer"], word), TunedRows.of(about["model"], word))
    audit = run(made, tmp_path / "a", arms=tuple(arms))
    assert calls == ["base", "ticket", "noise", "noise_3"] and audit.recoveries["noise"] == audit.recoveries["noise_2"]
    assert sorted(read(tmp_path / "a")) == sorted(a.key for a in arms)  # each has its file all the same
    calls.clear()
    nowhere = tuple([Arm("base"), Arm("ticket", word), *(Arm(f"only_{c}", word) for c in ("head", "instruction"))])
    audit = run((unread, test, about), tmp_path / "b", arms=nowhere, prompt=ticket.prompt)
    assert calls == ["base", "ticket"] and audit.translations["only_head"] == audit.translations["base"]


VICTIM = """
import signal
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell without job control starts its children deaf to it
from pathlib import Path
from kslottery.audit import AuditSettings, audit_ticket
from kslottery.data import load_pairs
from kslottery.decomposition import Bootstrap
from kslottery.evaluation import Generation
from kslottery.ticket import Ticket
ticket = Ticket.load(Path(sys.argv[1]) / "ticket")
world = Path(ticket.provenance.model)
generation = Generation(max_new_tokens=12, batch_size=8)
settings = AuditSettings(generation=generation, bootstrap=Bootstrap(samples=50), progress=False)
train = load_pairs(world / "train.jsonl", limit=30)
audit_ticket(ticket, load_pairs(world / "test.jsonl", limit=8), train=train, settings=settings)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_killed_audit_goes_on_where_it_was(made, audited, tmp_path, monkeypatch, how):
    replace(made[0]).save(tmp_path / "ticket")
    out = tmp_path / "ticket" / "audit"  # where it goes if nobody says where
    child = subprocess.Popen([*forks.PYTHON, VICTIM, str(tmp_path)], stderr=subprocess.PIPE, text=True)
    done = lambda: sorted(p.stem for p in (out / "arms").glob("[!.]*.json"))
    deadline = time.time() + 120
    while len(done()) < 12 and child.poll() is None and time.time() < deadline:
        time.sleep(0.01)  # until it trains the controls
    child.send_signal(how)
    _, error = child.communicate()
    finished = done()
    assert child.returncode and 12 <= len(finished) < len(read(audited[1])), error
    assert all(json.loads((out / "arms" / f"{name}.json").read_text())["translations"] for name in finished)
    calls = counting(monkeypatch)
    resumed = run(made, out)
    assert calls == [name for name in once(*audited) if name not in finished]
    assert resumed.translations == audited[0].translations
    assert resumed.as_dict()["checks"] == audited[0].as_dict()["checks"]
    assert not list((out / "arms").glob(".*"))


def test_without_a_folder_nothing_is_kept(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert made[0].folder is None
    audit = run(made, None, arms=(Arm("base"), Arm("ticket", made[0].ids)))
    assert audit.verdict and list(tmp_path.iterdir()) == []


def test_without_embed_rows_data_or_recipe_it_says_what_it_cannot_tell(made, tmp_path):
    ticket, test, about = made
    bare = Ticket(ticket.ids, replace(ticket.provenance, recipe=None), ticket.rows, sentences=ticket.sentences)
    audit = run((bare, test, about), tmp_path, dict(train=None), fast=True)
    assert {a.rows for a in audit.arms} == {"none", "ticket", "noise", "cut"}
    silent = {c.name for c in audit.checks if c.sentence.startswith("No arm")}
    no_gain = {c.name for c in audit.checks if c.sentence.startswith("There is no gain")}
    assert silent in ({"controls", "one_row", "selection", "necessary", "replaceable"}, set()) and silent | no_gain
    assert "No artefact" not in audit.sentence
    for arm, part in (
        (Arm("embed_tuning", ticket.ids), "reads Embed-Tuned rows"),
        (Arm("random_rows", (5,)), "recorded recipe"),
    ):
        with pytest.raises(ValueError, match=f"the arm {arm.key} cannot be run: it .*{part}"):
            run((bare, test, about), tmp_path, arms=(Arm("base"), Arm("ticket", ticket.ids), arm))


def test_a_ticket_under_another_prompt(made, audited, tmp_path):
    ticket, test, about = made
    asked = {
        "its own": Prompt("babel", LANGUAGES),
        "short": Prompt("From {source_language}: {source}\nTo {target_language}: {target}", LANGUAGES),
        "other": Prompt("{source_language}: {source}\n{target_language}: {target}", LANGUAGES),
    }
    models = {name: about[name] for name in ("model", "tokenizer")}
    gains = template_transfer(ticket, test, asked, **models, out=tmp_path, settings=SETTINGS)
    assert gains["its own"] == audited[0].decomposition
    assert len({repr(g.base) for g in gains.values()}) == 3  # two prompts without a name of their own stay apart
    assert sorted(p.name for p in (tmp_path / "short" / "arms").iterdir()) == ["base.json", "ticket.json"]


def test_shared_rows_are_audited_without_channels():
    model = talker("gpt2")
    rows = TunedRows([5, 6], torch.randn(2, 16), "shared")
    ticket = Ticket([5, 6], Provenance.of(model, TOY, [5, 6]), rows)
    assert not [a for a in plan_arms(TOY, ticket, prompts(), train=False) if a.channel != "everywhere"]


@pytest.mark.parametrize(
    "change, part",
    [
        ("used", "1 test sentences were used for tuning"),
        ("fewer", "not the same"),
        ("none", "no test sentences"),
        ("empty", "no tuned rows"),
    ],
)
def test_what_cannot_be_audited_is_refused_before_a_model_is_loaded(made, tmp_path, monkeypatch, change, part):
    ticket, test, about = made
    train = about["train"]
    test = [*test, train[0]] if change == "used" else [] if change == "none" else test
    ticket = Ticket([], replace(ticket.provenance, tokens=(), counts=None)) if change == "empty" else ticket
    monkeypatch.setattr(Ticket, "base", lambda *args: pytest.fail("a model is loaded"))
    with pytest.raises(ValueError, match=part):
        audit_ticket(ticket, test, train=train[:5] if change == "fewer" else train, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "asked, part",
    [
        (dict(metric="blue"), "metric 'blue' is unknown|metric is 'blue'"),
        (dict(metric=lambda texts, references: float("nan")), "returned 'nan' for 8 texts"),
        (dict(metric=lambda texts, references: "good"), "returned 'good' for 8 texts"),
        (dict(metric=lambda texts, references: np.mean([a == b for a, b in zip(texts, references)])), "points from 0"),
        (dict(delta=0.0), "delta is 0.0: give the points of the metric"),
        (dict(groups=["a", "b"]), "groups has 2 entries for 8 sentences"),
    ],
)
def test_metric_delta_and_groups_are_tried_before_a_model_is_loaded(made, tmp_path, monkeypatch, asked, part):
    ticket, test, about = made
    monkeypatch.setattr(Ticket, "base", lambda *args: pytest.fail("a model is loaded"))
    with pytest.raises(ValueError, match=part) as error:
        settings = replace(SETTINGS, **asked)
        audit_ticket(ticket, test, train=about["train"], out=tmp_path / "out", settings=settings)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_the_verdict_counts_in_the_metric_that_is_asked_for(made, audited, tmp_path, monkeypatch):
    shutil.copytree(audited[1], tmp_path / "audit")
    calls = counting(monkeypatch)
    few = tuple(a for a in audited[0].arms if a.name in ("base", "ticket", "only_instruction", "noise"))
    told = {}
    words = lambda texts, references: [100 * (a.split() == b.split()) for a, b in zip(texts, references)]
    asked = dict(arms=few, delta=2.0, groups=np.array(list("aabbccdd")))
    for metric in ("chrf", words):
        told[metric] = run(made, tmp_path / "audit", metric=metric, **asked)
        gained = told[metric].decomposition
        assert (gained.units, gained.n, gained.delta) == (4, 8, 2.0)
    assert calls == []  # the texts are the same
    name = told[words].decomposition.metric
    assert name == "<lambda>" and f"one metric ({name}, delta 2)" in repr(told[words])
    assert "| bleu, whole |" in told[words].table() and "| chrf, whole |" in told["chrf"].table()
    assert plot_audit(told["chrf"]).get_xlabel() == "recovery: share of the gain in chrF2, whole continuation"


def test_a_short_audit_takes_whole_documents(made, tmp_path):
    ticket, _, about = made
    world = build_world(0, "small", progress=False)
    test = load_pairs(world.split("test"), limit=100)
    documents = [f"d{i // 20}" for i in range(100)]
    few = (Arm("base"), Arm("ticket", ticket.ids))
    gains = {}
    for groups in (None, documents):
        asked = replace(SETTINGS, fast=True, groups=groups, arms=few, generation=Generation(2, 1, 50))
        bench = audit_module._bench(ticket, test, None, about["model"], about["tokenizer"], asked)
        gains[groups is None] = [p.id for p in bench.test], bench.settings.groups
    (alone, none), (together, kept) = gains[True], gains[False]
    assert len(alone) == 50 and none is None and alone != [p.id for p in test[:50]]
    assert len(together) == len(kept) == 60 and len({*kept}) == 3
    where = [p.id for p in test]
    assert kept == [documents[where.index(i)] for i in together]


@pytest.mark.parametrize("verdict", ["real", "artefact"])
def test_an_audit_of_an_older_version_is_shown_as_it_was(made, tmp_path, verdict):
    "Version 0.2: other words, other checks, a decomposition without notes."
    check = dict(name="one_row", question="Does one row do the same?", result="fail", value=None, threshold=0.8)
    old = {
        "verdict": verdict,
        "sentence": f"{verdict}: so it was said.",
        "checks": [check],
        "thresholds": {"one_row": 0.8},
        "decomposition": {"verdict": "stopping", "metric": "bleu"},
        "report": "| check | result | |",
    }
    replace(made[0]).save(tmp_path / "ticket")
    (tmp_path / "ticket" / "audit.json").write_text(json.dumps(old))
    found = Ticket.load(tmp_path / "ticket")
    assert found.audit == old and old["sentence"] in found.card() and old["report"] in found.card()
    status, said, error = invoke("card", tmp_path / "ticket", "--refresh", "--json")
    assert status == 0 and json.loads(said)["verdict"] == verdict and old["sentence"] in json.loads(said)["text"], error


def test_audit_from_the_command_line_and_the_card(made, audited, tmp_path):
    ticket, _, about = made
    folder, world = tmp_path / "ticket", build_world(0, "small", progress=False)
    replace(ticket, provenance=replace(ticket.provenance, train=None)).save(
        folder
    )  # it does not say where its data are
    assert "not been audited" in (folder / "README.md").read_text()
    lines = world.split("train").read_text().splitlines(True)
    (tmp_path / "train.jsonl").write_text("".join(lines[: len(about["train"])]))
    (tmp_path / "groups.txt").write_text("".join(f"d{i // 2}\n" for i in range(9)))
    counted = ("--metric", "chrf", "--delta", 0.5, "--groups", tmp_path / "groups.txt")
    short = ("--limit", 8, "--max-new-tokens", 12, "--fast", "--samples", 50, *counted)
    words = ("audit", folder, "--train", tmp_path / "train.jsonl", "--test", world.split("test"), *short)
    status, said, error = kslottery(*words)
    assert status == 0, error
    record = json.loads((folder / "audit" / "audit.json").read_text())
    assert said.rstrip("\n").split("\n")[-1] == record["sentence"]
    assert all(f"* {line}\n" in said for line in record["lines"])
    about_it = record["decomposition"]
    assert (about_it["metric"], about_it["delta"], about_it["units"], about_it["n"]) == ("chrf", 0.5, 4, 8)
    again = Ticket.load(folder)
    assert again.audit == record and (folder / "audit.png").exists()
    card = (folder / "README.md").read_text()
    assert (
        record["sentence"] in card
        and "![audit](audit.png)" in card
        and all(f"> {line}\n" in card for line in record["report"].splitlines())
    )
    status, said, error = invoke(*words, "--json")
    assert status == 0 and json.loads(said)["checks"] == record["checks"], error
    for wrong, part in (
        (("--train", ""), "--train"),
        (("--test", ""), "--test"),
        (("--test", tmp_path / "train.jsonl"), "were used for tuning"),
        (("--train", world.split("train")), "not the same"),
        (("--model", tmp_path), "no config.json"),
        (("--metric", "blue"), "choose bleu"),
        (("--delta", 0), "delta is 0"),
        (("--groups", tmp_path / "nowhere"), "nowhere"),
    ):
        status, _, error = invoke(*words, *wrong)
        assert status == 2 and part in error and error.strip().count("\n") == 0, (wrong, error)
    status, _, error = invoke("audit", tmp_path)
    assert status == 2 and "no ticket.json" in error
    status, _, error = invoke("audit", folder, "--test", world.split("test"), *short, "--train", "none")
    assert status == 0, error


# Any other tuning

CAUSAL = dict(task_type="CAUSAL_LM")
ADAPTERS = {
    "lora": lambda: LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, **CAUSAL),
    "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=3, **CAUSAL),
    "tokens": lambda: TrainableTokensConfig(token_indices=[9, 10], init_weights=False, **CAUSAL),
    "shira": lambda: ShiraConfig(r=4, init_weights=False, **CAUSAL),
}
FEW = AuditSettings(generation=Generation(max_new_tokens=6), bootstrap=Bootstrap(samples=50), progress=False)
quiet = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def adapted(kind, name, dtype=torch.float32, size=0.3):
    "A model that talks, and a copy of it with an adapter of random numbers."
    model = talker(kind).to(dtype)
    if kind == "qwen2":
        model.config.tie_word_embeddings = True
        model.tie_weights()
    tuned = get_peft_model(copy.deepcopy(model), ADAPTERS[name]()).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for p in tuned.parameters():
            if p.requires_grad:
                p += size * torch.randn_like(p)
    return model, tuned


@quiet
@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "gemma"])
def test_an_adapter_is_audited_by_its_folder_and_in_memory(tmp_path, kind, name):
    if (kind, name) == ("gpt2", "shira"):
        pytest.skip("PEFT has no SHiRA for GPT-2's layers")
    model, tuned = adapted(kind, name, torch.bfloat16 if kind == "qwen2" else torch.float32, 3.0)
    tuned.save_pretrained(tmp_path / "adapter")
    given = dict(tokenizer=with_bos(), settings=FEW)
    before = weights_fingerprint(model)
    found = audit_models(model, tmp_path / "adapter", sentences(), ASKED, **given)
    assert [a.key for a in found.arms] == [*found.translations] == ["base", "tuned", "tuned_stop"]
    assert [t.tokens for t in found.translations["base"]] == written(model, 1)
    said = translate(tuned, with_bos(), sentences(), ASKED, generation=FEW.generation, progress=False)
    assert found.translations["tuned"] == said != found.translations["base"]
    assert weights_fingerprint(model) == before  # the base that is given stays plain
    assert audit_models(None, tuned, sentences(), ASKED, **given).translations == found.translations  # switched off
    assert audit_models(model, tuned, sentences(), ASKED, **given).verdict == found.verdict
    others = {n for n in ARMS if n not in ("base", "ticket", "forced_stop", "tuned", "tuned_stop")}
    assert {*found.facts["left_out"]} == others | {f"check {n}" for n in SUSPICIONS} and found.checks == []
    assert any(line.startswith("Left out: embed_tuning, only_instruction") for line in found.lines)
    assert "looked for" not in found.table() and "channel" not in found.table() and "tuned model" in found.table()
    assert plot_audit(found).figure


def on_disk(model, folder, tokenizer=None):
    model.save_pretrained(folder)
    (tokenizer or with_bos()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_a_pair_of_checkpoints_goes_on_where_it_was_interrupted(tmp_path, monkeypatch, kind):
    "In 16 bits, one in memory at a time, the tuned one first; what was written is taken over, and no other text is."
    base = talker(kind).to(torch.bfloat16)
    other, ends = talker(kind, seed=1), copy.deepcopy(base)
    ends.generation_config.eos_token_id = 62  # the same numbers, and another end
    files = [on_disk(m, tmp_path / n) for m, n in ((base, "base"), (other, "tuned"), (ends, "ends"))]
    plain = load_model(files[0])[0]
    calls, real, loads, load = counting(monkeypatch), audit_module._generated, [], audit_module.load_model

    def loaded(name):
        assert not [m for m in loads if m() is not None]
        model, tokenizer = load(name)
        loads.append(weakref.ref(model))
        return model, tokenizer

    monkeypatch.setattr(audit_module, "load_model", loaded)
    how = dict(out=tmp_path / "audit", settings=FEW)
    with monkeypatch.context() as patch:
        patch.setattr(audit_module, "_generated", lambda a, *more: real(a, *more) if a.name == "tuned" else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            audit_models(*files[:2], sentences(), ASKED, **how)
    assert calls == ["tuned"] and len(loads) == 2
    done = audit_models(*files[:2], sentences(), ASKED, **how)
    assert calls == ["tuned", "base"] and {p.name for p in (tmp_path / "audit").iterdir()} == {
        "arms",
        "audit.json",
        "audit.md",
        "audit.png",
    }
    assert [t.tokens for t in done.translations["base"]] == written(plain, 1)
    record = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert [*record["arms"]] == ["base", "tuned", "tuned_stop"] and "one_row" in record["left_out"]
    assert "ticket" not in record["arms"] and record["settings"]["train_sentences"] == 0
    audit_models(files[0], files[2], sentences(), ASKED, **how)
    assert calls == ["tuned", "base", "tuned"]  # another end is another model
    audit_models(files[0], files[2], sentences(), ASKED, **how)
    assert calls == ["tuned", "base", "tuned"]


def test_another_scale_of_an_adapter_is_another_model(tmp_path, monkeypatch):
    model, tuned = adapted("llama", "lora")
    calls, how = counting(monkeypatch), dict(tokenizer=with_bos(), out=tmp_path / "audit", settings=FEW)
    tuned.save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    for _ in range(2):
        audit_models(model, tmp_path / "adapter", sentences(), ASKED, **how)
    assert calls == ["tuned", "base"]
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 99}))
    audit_models(model, tmp_path / "adapter", sentences(), ASKED, **how)
    assert calls == ["tuned", "base", "tuned"]


def test_the_adapter_in_use_its_scale_and_whether_it_is_in_use_are_another_model():
    _, tuned = adapted("llama", "lora")
    tuned.add_adapter("other", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    prints = [_adapted(tuned)]
    tuned.set_adapter("other")
    prints.append(_adapted(tuned))
    tuned.set_adapter("default")
    assert _adapted(tuned) == prints[0]
    for layer in (m for m in tuned.modules() if hasattr(m, "set_scale")):
        layer.set_scale("default", 3)
    prints.append(_adapted(tuned))
    with tuned.disable_adapter():
        prints.append(_adapted(tuned))
    assert len({*map(json.dumps, prints)}) == 4 and _adapted(tuned) == prints[2]


@quiet
def test_what_is_no_pair_is_refused_and_writes_nothing(tmp_path):
    model, tuned = adapted("llama", "lora")
    tuned.save_pretrained(tmp_path / "adapter")
    more = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    foreign = PreTrainedTokenizerFast(tokenizer_object=more, eos_token="w63")
    other = on_disk(model, tmp_path / "other", foreign)
    base, wrapped = on_disk(model, tmp_path / "base"), talker("llama")
    get_peft_model(wrapped, ADAPTERS["lora"]())
    deep = talker("llama", hidden=32)
    given = dict(tokenizer=with_bos())
    ticket_plan = (Arm("base"), Arm("ticket", (5,)), Arm("noise", (5,)))
    for pair, how, words in (
        ((None, model), given, "there is no base"),
        ((None, base), {}, "there is no base"),
        ((None, tmp_path / "adapter"), {}, "there is no base"),  # made in memory: it names none
        ((model, tuned), {}, "there is no tokenizer"),
        ((wrapped, tuned), given, "give none as base"),
        ((deep, tmp_path / "adapter"), given, "does not fit this model"),
        ((base, other), {}, "other vocabularies .64 and 64 tokens, 128 entries differ"),
        ((base, tmp_path / "nowhere"), {}, "neither a checkpoint folder"),
        ((model, tuned), given | dict(train=sentences()), "were used for tuning"),
        ((model, tuned), given | dict(out=tmp_path / "base"), "holds something else"),
    ):
        with pytest.raises((ValueError, FileExistsError, FileNotFoundError), match=words) as caught:
            audit_models(*pair, sentences(), ASKED, **{"settings": FEW, "out": tmp_path / "no"} | how)
        assert "\n" not in str(caught.value) and not list(tmp_path.glob("no/arms/[!.]*"))
    plain = replace(FEW, arms=ticket_plan)  # a ticket's plan is not asked for
    assert len(audit_models(model, tuned, sentences(), ASKED, **given, settings=plain).arms) == 3


def test_a_tuned_model_is_no_arm_of_a_ticket(made, tmp_path):
    for arms in ((Arm("base"), Arm("tuned")), (Arm("base"), Arm("ticket", made[0].ids), Arm("tuned_stop"))):
        with pytest.raises(ValueError, match="see audit_models"):
            run(made, tmp_path / "no", arms=arms)


@quiet
def test_a_lora_that_learnt_to_stop_from_the_command_line(made, tmp_path):
    "In the small world there is little to gain but stopping, whoever learns it."
    world, (_, _, about) = build_world(0, "small", progress=False), made
    learnt = encode_all(about["tokenizer"], world.prompt, load_pairs(world.split("train"), limit=100))
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **CAUSAL)
    tuned = peft_tune(about["model"], config, learnt, Training(1e-2, 2, 10, 0, False))
    tuned.save_pretrained(tmp_path / "lora")
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "lora").iterdir()}
    out, asked = tmp_path / "audit", ("--template", "babel", "--languages", LANGUAGES, "--limit", 30)
    words = ("audit", tmp_path / "lora", "--test", world.split("test"), *asked, "--max-new-tokens", 40, "--out", out)
    status, said, error = invoke(*words)
    assert status == 0, error
    record = json.loads((out / "audit.json").read_text())
    assert record["verdict"] == "stopping" and said.rstrip("\n").split("\n")[-1] == record["sentence"]
    assert f"* {record['lines'][-2]}\n" in said and record["lines"][-2].startswith("Left out")
    written = {p: p.stat().st_mtime_ns for p in (out / "arms").iterdir()}
    status, said, error = invoke(*words, "--model", world.folder, "--json")  # the base that the adapter names, again
    assert status == 0 and json.loads(said)["arms"] == record["arms"], error
    assert {p: p.stat().st_mtime_ns for p in (out / "arms").iterdir()} == written
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "lora").iterdir()} == before


@quiet
def test_an_adapter_that_is_a_choice_of_rows_gets_a_tickets_arms(made, tmp_path, monkeypatch):
    world, (ticket, _, _) = build_world(0, "small", progress=False), made
    monkeypatch.chdir(tmp_path)
    ticket.save(tmp_path / "ticket")
    (tmp_path / "rows").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tmp_path / "ticket" / name, tmp_path / "rows")
    asked = ("--template", "babel", "--languages", LANGUAGES, "--limit", 6, "--fast", "--max-new-tokens", 8)
    words = ("--test", world.split("test"), *asked, "--samples", 50)
    status, said, error = invoke("audit", "rows", *words)
    assert status == 0 and "carried by the prompt's rows" in said.lower(), error
    record = json.loads((tmp_path / "rows-audit" / "audit.json").read_text())
    assert {"ticket", "only_instruction", "noise"} <= {*record["arms"]}
    assert {*record["left_out"]} >= {"random_rows", "embed_tuning"} and sorted(p.name for p in tmp_path.iterdir()) == [
        "rows",
        "rows-audit",
        "ticket",
    ]
    config = TrainableTokensConfig(token_indices=[3], target_modules=["q_proj"], init_weights=False, **CAUSAL)
    get_peft_model(load_model(str(world.folder))[0], config).save_pretrained("odd")  # rows of no embedding
    status, said, error = invoke("audit", "odd", *words)
    arms = {*json.loads(Path("odd-audit", "audit.json").read_text())["arms"]} if status == 0 else error
    assert "tuned" in arms and "ticket" not in arms
    for subject, more, part in (
        ("rows", ("--test", ""), "a tuned model does not record its test data|the ticket does not record its test"),
        ("rows", ("--template", ""), "records no prompt"),
        (world.folder, (), "does not say which model was tuned: name it with --model"),
        ("rows-audit", (), "no ticket.json, no adapter_config.json and no config.json"),
    ):
        status, _, error = invoke("audit", subject, *words, *more)
        assert status == 2 and re.search(part, error) and error.strip().count("\n") == 0, (more, error)


def test_the_cards_header_survives_a_round_trip(made, tmp_path):
    ticket = made[0]
    for languages, name in (("en-ca", "org/model"), ("no-de", 'strange: "name" #1'), ("Aldan-Borel", "model")):
        about = dict(model=name, base_model="", license="mit", prompt=Prompt("babel", languages))
        facts = replace(ticket.provenance, tokens=("|", "\n", "---", None), **about)
        Ticket(ticket.ids, facts, ticket.rows, scan=ticket.scan).save(tmp_path / languages)
        text = (tmp_path / languages / "README.md").read_text()
        card = ModelCard(text)
        data = card.data
        assert (data.base_model, data.library_name, data.pipeline_tag, data.license) == (
            None if " " in name else name,
            "peft",
            "text-generation",
            "mit",
        )
        assert data.language == (languages.split("-") if languages != "Aldan-Borel" else None)
        assert "kslottery" in data.tags and ModelCardData(**data.to_dict()).to_yaml() == data.to_yaml()
        card.save(tmp_path / "card.md")
        assert (tmp_path / "card.md").read_text() == text  # written again by the Hub's library, nothing is lost
        table = [line for line in text.split("\n") if line.startswith("| `")]
        assert len(table) == 4 and len({line.replace(r"\|", "").count("|") for line in table}) == 1
