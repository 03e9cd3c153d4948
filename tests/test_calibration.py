"""Losses against a reference model, and `kslottery certify` as a user meets it."""

import copy
import json
import os
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import kslottery.calibration as calibration_module
from conftest import TOY, invoke, kslottery, talker
from kslottery.babel import build_world
from kslottery.calibration import (
    Calibration,
    CertifySettings,
    certify_ticket,
    ladder,
    ladder_sizes,
    plan_calibration,
    retuned,
    text_loss,
)
from kslottery.certificate import certify_agreement
from kslottery.core import load_model
from kslottery.data import Pair, Prompt, encode_all, load_pairs
from kslottery.evaluation import Generation
from kslottery.ks import ks_scan
from kslottery.rows import TunedRows
from kslottery.ticket import Provenance, Ticket
from kslottery.tuning import Recipe, embed_tune

PROMPT = Prompt("babel", "Aldan-Borel")
QUIET = CertifySettings(prompt=PROMPT, generation=Generation(max_new_tokens=20), progress=False)
SHORT = replace(QUIET, loss="tokens", sizes=[2], generation=Generation(max_new_tokens=8))


@pytest.fixture(scope="module")
def world():
    return build_world(0, "small")


@pytest.fixture(scope="module")
def loaded(world):
    return load_model(str(world.folder))


@pytest.fixture(scope="module")
def ticket(world, loaded):
    model, tokenizer = loaded
    train = load_pairs(world.split("train"))
    recipe = Recipe(lr_embed=1.5e-3, epochs_embed=1, epochs_partial=1, batch_size=10, progress=False)
    embed_rows = embed_tune(model, encode_all(tokenizer, PROMPT, train), recipe)
    after = embed_rows.matrix(model)
    scan = ks_scan(after.base, after)
    ids = scan.top(3)
    facts = Provenance.of(model, tokenizer, ids, prompt=PROMPT, recipe=replace(recipe, batch_size=50), pairs=train)
    return Ticket(ids, facts, embed_rows.restrict(ids), embed_rows, scan, [h for p in train for h in (p.hash, p.loose)])


@pytest.fixture(scope="module")
def fresh(world):
    return list(load_pairs(world.split("calibration"), limit=24))


@pytest.fixture(autouse=True)
def ledger(fresh, tmp_path, monkeypatch):
    "The ledger of sentences that come from no file."
    monkeypatch.setenv("KSLOTTERY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "calibration.ledger.json"


@pytest.fixture
def file(world, tmp_path):
    "Calibration sentences in a file beside which a ledger may stand."
    path = tmp_path / "fresh.jsonl"
    path.write_text("\n".join(world.split("calibration").read_text().splitlines()[:60]) + "\n")
    return path


def calibration_of(ticket, loaded, fresh, *, reference=None, used=None, settings=QUIET):
    used = ticket.sentences if used is None else used
    return Calibration(*loaded, fresh, ticket.embed_rows if reference is None else reference, settings, used)


def certified(ticket, loaded, fresh, settings, **more):
    model, tokenizer = loaded
    return certify_ticket(
        ticket, fresh, epsilon=0.9, delta=0.1, model=model, tokenizer=tokenizer, settings=settings, **more
    )


def test_the_reference_loses_nothing_and_batches_do_not_matter(ticket, loaded, fresh):
    sized = lambda b: replace(QUIET, generation=replace(QUIET.generation, batch_size=b))
    by_one, by_all = (calibration_of(ticket, loaded, fresh, settings=sized(b)) for b in (1, 24))
    for kind in ("exact", "tokens", "quality_shortfall"):
        assert not by_all.losses(ticket.embed_rows, kind).values.any()
        part = ticket.embed_rows.restrict(ticket.embed_rows.ids[::2])
        assert (
            np.array_equal(by_one.losses(part, kind).values, by_all.losses(part, kind).values)
            and by_all.losses(part, kind).values.any()
        )


def test_another_model_as_reference_is_the_same_as_its_rows(ticket, loaded, fresh):
    merged = ticket.embed_rows.write(copy.deepcopy(loaded[0]))
    part = ticket.embed_rows.restrict(ticket.ids)
    by_rows, by_model = calibration_of(ticket, loaded, fresh), calibration_of(ticket, loaded, fresh, reference=merged)
    for kind in ("exact", "tokens", "quality_difference"):
        assert np.array_equal(by_rows.losses(part, kind).values, by_model.losses(part, kind).values)


def test_provenance_travels(ticket, loaded, fresh):
    found = calibration_of(ticket, loaded, fresh).losses(ticket.embed_rows.restrict(ticket.ids), "exact", "whole")
    assert (
        found.hashes == tuple(p.hash for p in fresh)
        and found.loose == tuple(p.loose for p in fresh)
        and found.used == frozenset(ticket.sentences)
        and found.rows == tuple(sorted(ticket.ids.tolist()))
    )
    assert len({found.prints[k] for k in ("model", "reference", "ticket", "data")}) == 4 and not found.vouched
    made = ("template", "chat", "languages", "dtype", "max_new_tokens", "num_beams", "batch_size")
    assert [found.prints[k] for k in made] == [PROMPT.template.text, False, "Aldan-Borel", "float32", 20, 1, 16]


@pytest.mark.parametrize(
    "change, part",
    [
        (lambda t, p: dict(used=[*t.sentences, p[7].hash]), ":8 was used"),
        (lambda t, p: dict(used=[*t.sentences, p[7]._replace(target="in other words").hash]), ":8 was used"),
        (
            lambda t, p: dict(pairs=[*p[:7], p[7]._replace(source=f" {p[7].source.upper()} !")], used=[p[7].loose]),
            ":8 was",
        ),
        (lambda t, p: dict(used=[]), "not recorded"),
        (lambda t, p: dict(pairs=[]), "n = 0"),
    ],
)
def test_overlap_is_refused_before_anything_is_translated(ticket, loaded, fresh, change, part, monkeypatch):
    monkeypatch.setattr("kslottery.calibration.translate", lambda *a, **k: pytest.fail("it translated"))
    changes = change(ticket, fresh)
    with pytest.raises(ValueError, match=part):
        calibration_of(ticket, loaded, changes.pop("pairs", fresh), **changes)


@pytest.mark.parametrize(
    "kind, extraction, part", [("loss", "whole", "choose quality"), ("exact", "second_line", "choose whole")]
)
def test_unknown_losses_are_refused(ticket, loaded, fresh, kind, extraction, part):
    with pytest.raises(ValueError, match=part):
        calibration_of(ticket, loaded, fresh).losses(ticket.embed_rows, kind, extraction)


def test_a_ladder_of_tuned_tickets(ticket, loaded, fresh, world):
    model, tokenizer = loaded
    train = load_pairs(world.split("train"))
    rows_of = retuned(model, tokenizer, ticket, train)
    best = ticket.scan.top(2)
    tuned = rows_of(best)
    assert rows_of(best) is tuned and tuned.ids.tolist() == sorted(best.tolist())
    assert torch.any(tuned.delta(model) != 0) and len(rows_of([])) == 0
    settings = replace(SHORT, ladder="tuning", train=train, generation=QUIET.generation)
    found = certified(ticket, loaded, fresh, settings)
    assert len(found) == 1 and found[0].size == 2 and found[0].confidence == 0.9
    assert "its rows tuned again from the base model" in found[0].claim
    for wrong in (fresh, train[:20], [*train, fresh[0]]):  # all of its own data, and nothing else
        with pytest.raises(ValueError, match="not the same"):
            retuned(model, tokenizer, ticket, wrong)
    assert retuned(model, tokenizer, ticket, train[::-1])


def spent(certificates):
    return [c.facts["spent"] for c in certificates]


def test_the_ledger_adds_up_what_was_spent_on_sentences(ticket, loaded, fresh, ledger):
    "By other tickets, too, in another order, or on some of the sentences only; the same plan again costs nothing."
    for pairs, before in ((fresh[:10], 0), (fresh[9::-1], 0), (fresh[8:16], 0.1), (fresh[9:20], 0.2), (fresh[20:], 0)):
        (found,) = certified(ticket, loaded, pairs, SHORT)
        assert found.facts["spent"] == pytest.approx(before)
        said = [a for a in found.assumptions if "had been spent" in a]
        assert len(said) == (before > 0) and all(f"a delta of {before:g}" in a for a in said)
    other = replace(ticket, ids=ticket.ids[:2], provenance=replace(ticket.provenance, tokens=("a", "b")), rows=None)
    other.provenance = replace(other.provenance, counts=None)
    settings = replace(SHORT, sizes=[1])
    assert spent(certified(other, loaded, fresh[:8], settings)) == [0.1]
    assert spent(certified(other, loaded, fresh[:8], settings)) == [0.1]
    assert len(json.loads(ledger.read_text())["plans"]) == 5
    ledger.write_text(ledger.read_text().replace("0.1", "0.01"))
    with pytest.raises(ValueError, match="calibration.ledger.json is damaged .it was edited: its hash does not fit"):
        certified(ticket, loaded, fresh, SHORT)


def test_a_ledger_stands_beside_the_file_or_in_the_cache(ticket, loaded, file, ledger, monkeypatch):
    file = file.rename(file.with_name("fresh, again.jsonl"))
    pairs, beside = load_pairs(file, limit=20), file.with_name("fresh, again.jsonl.ledger.json")
    assert spent(certified(ticket, loaded, pairs, SHORT)) == [0] and beside.exists() and not ledger.exists()
    kept = beside.read_text()
    monkeypatch.setattr("os.access", lambda path, mode: mode == os.R_OK)  # the file is somebody else's
    assert spent(certified(ticket, loaded, pairs, replace(SHORT, sizes=[3]))) == [0.1]
    assert spent(certified(ticket, loaded, pairs, replace(SHORT, sizes=[4]))) == [0.2]
    assert beside.read_text() == kept and ledger.exists()


def test_a_plan_is_written_before_anything_is_translated(ticket, loaded, fresh, tmp_path, monkeypatch):
    mine = replace(ticket)
    mine.save(tmp_path / "t")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr("kslottery.calibration.translate", lambda *a, **k: (_ for _ in ()).throw(RuntimeError))
        certified(mine, loaded, fresh, SHORT)
    (path,) = (tmp_path / "t").glob("plan-*.json")
    plan = json.loads(path.read_text())
    assert (plan["epsilon"], plan["delta"], plan["sizes"], plan["loss"]) == (0.9, 0.1, [2], "tokens")
    assert plan["sentences"] == sorted(p.hash for p in fresh) and plan["dtype"] == "float32"
    (found,) = certified(mine, loaded, fresh[::-1], SHORT)  # the order does not matter
    assert found.facts["plan"] == plan["hash"] and path.name == f"plan-{plan['hash'][:16]}.json"
    certified(mine, loaded, fresh, replace(SHORT, generation=replace(SHORT.generation, batch_size=4)))
    assert len(list((tmp_path / "t").glob("plan-*.json"))) == 2


def test_too_few_sentences_are_refused_before_a_model_is_loaded(ticket, fresh, ledger, monkeypatch):
    monkeypatch.setattr(Ticket, "base", lambda *a: pytest.fail("it loaded a model"))
    copies = [p._replace(id=str(i), source=fresh[0].source.title() + " " * i) for i, p in enumerate(fresh)]
    for pairs, epsilon, part in (
        (fresh, 0.02, "24 distinct sentences can certify nothing: with fewer than 183 .* epsilon 0.02 and delta 0.025"),
        (copies, 0.5, "1 distinct sentence can certify nothing: with fewer than 6"),
        ([], 0.5, "n = 0"),
    ):
        with pytest.raises(ValueError, match=part):
            certify_ticket(ticket, pairs, epsilon=epsilon, settings=QUIET)
    with pytest.raises(ValueError, match="2 distinct documents can certify nothing"):
        certify_ticket(ticket, fresh, epsilon=0.5, settings=replace(QUIET, groups=[f"d{i // 12}" for i in range(24)]))
    assert not ledger.exists()
    monkeypatch.setattr(Ticket, "base", lambda *a: (_ for _ in ()).throw(InterruptedError))
    with pytest.warns(UserWarning, match="low power: .* 24 sentences"), pytest.raises(InterruptedError):
        certify_ticket(ticket, fresh, epsilon=0.143, settings=QUIET)


def test_models_in_two_precisions_are_not_compared(ticket, loaded, fresh):
    half = copy.deepcopy(loaded[0]).to(torch.bfloat16)
    with pytest.raises(ValueError, match="the model is in float32 and the reference in bfloat16"):
        calibration_of(ticket, loaded, fresh, reference=half)
    rows = replace(QUIET, generation=Generation(max_new_tokens=6, batch_size=8))
    losses = calibration_of(ticket, (half, loaded[1]), fresh, settings=rows).losses(ticket.rows)
    assert "in batches of 8" in certify_agreement(losses, 0.05).claim


# Until it holds


ASKED = replace(SHORT, sizes=None, ladder="none")


def manifest_of(path):
    return json.loads(path.read_text())


@pytest.fixture
def counted(monkeypatch):
    "The ids that were translated, by call."
    seen, translate = [], calibration_module.translate
    monkeypatch.setattr(
        calibration_module,
        "translate",
        lambda model, tokenizer, pairs, *a, **k: (
            seen.append([p.id for p in pairs]) or translate(model, tokenizer, pairs, *a, **k)
        ),
    )
    return seen


def test_sentences_are_added_in_the_order_of_a_manifest_until_it_holds(ticket, loaded, fresh, tmp_path, counted):
    path = tmp_path / "m.json"
    settings = replace(ASKED, until=path, generation=Generation(max_new_tokens=8, batch_size=4))
    (found,) = certified(ticket, loaded, [*fresh, fresh[0]._replace(id="a copy")], settings)
    manifest = manifest_of(path)
    order = [i for i, _ in manifest["order"]]
    assert sorted(order) == sorted(p.id for p in fresh) and order != [p.id for p in fresh]
    assert (manifest["epsilon"], manifest["delta"], manifest["n_plan"]) == (0.9, 0.1, 24)
    assert found.kind == "anytime" and found.holds and found.n == 4 and found.facts["n_plan"] == 24
    assert found.facts["manifest"] == found.facts["plan"] == manifest["hash"] and manifest["hash"][:16] in found.claim
    assert found.facts["fixed_n_bound"] <= 1 and counted == [order[:4]]  # the reference; and no more
    assert certified(ticket, loaded, fresh[::-1], settings) == [found] and len(counted) == 1  # all was kept
    first = [p for i in order[:3] for p in fresh if p.id == i]
    (part,) = certified(ticket, loaded, first, settings)  # only some are there as yet
    assert part.n == 3 and spent([part, found]) == [0, 0]


def test_more_sentences_cost_what_is_new(ticket, loaded, fresh, tmp_path, counted):
    settings = replace(ASKED, until=tmp_path / "m.json", most=6, loss="exact")
    asked = dict(epsilon=0.3, delta=0.1, model=loaded[0], tokenizer=loaded[1])
    made = certify_ticket(ticket, fresh, **asked, settings=settings)
    order = [i for i, _ in manifest_of(tmp_path / "m.json")["order"]]
    assert [c.n for c in made] == [6, 6] and counted == [order[:6]] * 2
    made = certify_ticket(ticket, fresh, **asked, settings=replace(settings, most=None))
    assert sum(counted[2::2], []) == sum(counted[3::2], []) == order[6 : made[0].n] and len(made) == 2


def test_what_a_manifest_refuses(ticket, loaded, fresh, tmp_path, ledger, counted):
    path = tmp_path / "m.json"
    settings = replace(ASKED, until=path)
    certified(ticket, loaded, fresh, settings)
    manifest, entries, done = path.read_text(), ledger.read_text(), len(counted)
    by_id = {p.id: p for p in fresh}
    order = [by_id[i] for i, _ in json.loads(manifest)["order"]]
    stranger = Pair("other:1", "gefet bibe", "bo")
    asked = dict(model=loaded[0], tokenizer=loaded[1], epsilon=0.9, delta=0.1)
    for pairs, more, wanted, part in (
        ([*order[:2], *order[3:]], {}, {}, f"{order[3].id} cannot be used: after the 2 .* goes on with {order[2].id};"),
        (order[1:], {}, {}, f"after the 0 sentences that are there, .* goes on with {order[0].id};"),
        ([*order, stranger], {}, {}, "sentence other:1 cannot be used"),
        ([order[0]._replace(target="mended"), *order[1:]], {}, {}, "cannot be used: after the 0"),
        (fresh, dict(epsilon=0.8), {}, "was written for epsilon 0.9, and 0.8 is asked"),
        (fresh, dict(delta=0.05), {}, "was written for delta 0.1, and 0.05 is asked"),
        (fresh, {}, dict(n_plan=9), "was written for n_plan 24, and 9 is asked"),
        (fresh, {}, dict(loss="exact"), "was written for loss 'tokens', and 'exact' is asked"),
        (fresh, {}, dict(ladder="transfer"), "was written for made 'its own rows'"),
        (fresh, {}, dict(generation=Generation(max_new_tokens=9)), "was written for max_new_tokens 8, and 9 is asked"),
        (fresh, {}, dict(ladder="transfer", sizes=[1, 2]), "a manifest .* is for one ticket"),
    ):
        with pytest.raises(ValueError, match=part):
            certify_ticket(ticket, pairs, **asked | more, settings=replace(settings, **wanted))
    swapped = json.loads(manifest)
    swapped["order"].reverse()
    bare = calibration_module._sealed({"plans": []})  # a ledger, say
    odd = ("[]", "[" * 100_000, '{"a": "\\ud800", "hash": 1}', "NaN", json.dumps(bare))
    for text in (*odd, json.dumps(swapped), manifest[:90], manifest.replace("0.9", "0.95")):
        path.write_text(text)
        with pytest.raises(ValueError, match="m.json is damaged .*: restore it; a new manifest is a new plan"):
            certified(ticket, loaded, fresh, settings)
    for wrong, part in ((tmp_path, "is a folder: name a file"), ("~nosuchuser/m", "nor its user's home")):
        with pytest.raises((ValueError, FileNotFoundError), match=part):
            certified(ticket, loaded, fresh, replace(settings, until=wrong))
    assert path.read_text() == text and ledger.read_text() == entries and len(counted) == done
    with pytest.raises(ValueError, match="certify documents .* without it"):
        replace(settings, groups=["a"] * 24)
    path.unlink()  # another order of the same sentences is another plan, and the ledger knows both
    (found,) = certified(ticket, loaded, fresh, replace(settings, seed=1))
    assert found.facts["spent"] == 0.1


def test_a_plan_for_sentences_needs_no_model(ticket, fresh, monkeypatch):
    monkeypatch.setattr(Ticket, "base", lambda *a: pytest.fail("it loaded a model"))
    with pytest.warns(UserWarning, match="low power: 24 sentences .* with fewer than 183"):
        plan = plan_calibration([*fresh, *fresh], epsilon=0.02, ticket=ticket)
    assert plan.n == 24 and plan.delta == 0.025 and plan.floor == 183 < plan.needed
    exact = plan_calibration(epsilon=0.1, delta=0.1, settings=replace(SHORT, loss="exact"))
    assert exact.method == "clopper-pearson" and exact.needed == exact.floor == 29
    assert plan_calibration(epsilon=0.1, delta=0.1, settings=SHORT).delta == 0.1  # one certificate only
    with pytest.raises(ValueError, match="was used"):
        plan_calibration(
            [*fresh, Pair("a:1", "  " + fresh[0].source, "b")],
            epsilon=0.02,
            ticket=replace(ticket, sentences=[fresh[0].loose]),
        )
    with pytest.raises(ValueError, match="loss 1 is"):
        plan_calibration(epsilon=0.02, pilot=[0.1, float("nan")])


def test_a_claim_names_the_source_of_the_rows(ticket, loaded, fresh):
    "Rows out of Embed Tuning that are compared with another model are not that model's rows."
    other = ticket.embed_rows.scale(loaded[0], 0.9).write(copy.deepcopy(loaded[0]))
    made = [certified(ticket, loaded, fresh, SHORT, reference=r)[0].claim for r in (None, other)]
    assert "taken over from the reference model" in made[0] and "taken over from Embed Tuning" in made[1]


def test_the_model_prompt_and_generation_are_the_recorded_ones(ticket, loaded, fresh, world):
    "Nothing is given but the ticket and fresh sentences."
    facts = replace(ticket.provenance, generation=Generation(max_new_tokens=8, batch_size=5))
    mine = replace(ticket, provenance=facts)
    assert facts.model == str(world.folder)
    settings = CertifySettings("tokens", sizes=[2], progress=False)
    (found,) = certify_ticket(mine, fresh, epsilon=0.9, delta=0.1, settings=settings)
    (same,) = certified(mine, loaded, fresh, replace(settings, prompt=PROMPT, generation=facts.generation))
    assert found == same and found.facts["fingerprints"]["batch_size"] == 5


def test_shared_rows_are_certified_as_shared_rows():
    "On a tied model all moved rows together are the reference model, output included: no loss at all."
    base = talker("gpt2")
    moved = TunedRows([5, 6, 9], TunedRows.of(base, [5, 6, 9]).weight.detach() * -3, "shared")
    tuned = moved.write(copy.deepcopy(base))
    scan = ks_scan(*(m.get_input_embeddings().weight for m in (base, tuned)))
    ids = scan.top(2)
    mine = Ticket(ids, Provenance.of(base, TOY, ids), moved.restrict(ids), scan=scan)
    pairs = [Pair(str(i), f"t{i} t5 t6", f"t{i}") for i in range(7, 27)]
    settings = replace(SHORT, sizes=[3], prompt=Prompt(), vouched=True)
    (found,) = certified(mine, (base, TOY), pairs, settings, reference=tuned)
    assert found.path[-1]["risk"] == 0
    wrong = replace(mine, rows=TunedRows(mine.rows.ids, mine.rows.weight, "input_only"))
    assert certified(wrong, (base, TOY), pairs, settings, reference=tuned)[0].path[-1]["risk"] > 0


@pytest.mark.parametrize(
    "wrong, part",
    [
        (dict(loss="bleu"), "the kind of loss is 'bleu': choose quality_difference"),
        (dict(loss="loss"), "the kind of loss is 'loss'"),
        (dict(ladder="rope"), "choose transfer, tuning or none"),
        (dict(ladder="tuning"), "--train"),
    ],
)
def test_wrong_settings_are_refused_when_they_are_made(wrong, part):
    with pytest.raises(ValueError, match=part):
        CertifySettings(**wrong)


def test_what_cannot_be_certified_is_refused_before_a_model_is_loaded(ticket, fresh, monkeypatch):
    monkeypatch.setattr(Ticket, "base", lambda *a: pytest.fail("it loaded a model"))
    bare = replace(ticket, rows=None, embed_rows=None)
    unknown = replace(ticket, provenance=replace(ticket.provenance, prompt=None))
    for mine, levels, settings, part in (
        (ticket, dict(epsilon=0), QUIET, "epsilon is 0"),
        (ticket, dict(epsilon=0.1, delta=1), QUIET, "delta is 1"),
        (bare, dict(epsilon=0.1), QUIET, "no Embed-Tuned rows"),
        (bare, dict(epsilon=0.1), replace(QUIET, ladder="none"), "no tuned rows of its own"),
        (unknown, dict(epsilon=0.1), CertifySettings(), "records no prompt"),
    ):
        with pytest.raises(ValueError, match=part):
            certify_ticket(mine, fresh, **levels, settings=settings)


def test_a_loss_of_two_texts():
    assert text_loss("exact", "a", "b", "c") == 1
    with pytest.raises(ValueError, match="choose quality_difference, quality_shortfall, exact"):
        text_loss("tokens", "a", "b", "c")


def test_a_ladder_is_lazy_and_no_longer_than_its_ranking():
    asked = []
    rungs = ladder([7, 3, 5], [0, 2, 3], lambda ids: asked.append(ids.tolist()))
    assert list(rungs) == [0, 2, 3] and not asked
    assert rungs[2] is None and asked == [[7, 3]]
    for sizes in ([1, 4], [-1]):
        with pytest.raises(ValueError, match="must lie between 0 and the 3 rows that are ranked"):
            ladder([7, 3, 5], sizes, None)


def test_ladder_sizes():
    assert (
        ladder_sizes(9, 5, 50) == [0, 1, 2, 4, 5, 8, 9]
        and ladder_sizes(1) == [0, 1]
        and ladder_sizes(64, factor=4) == [0, 1, 4, 16, 64]
    )


def test_certify_from_the_command_line(ticket, world, file, tmp_path):
    folder = tmp_path / "ticket"
    forgetful = replace(ticket, provenance=replace(ticket.provenance, train=None))  # it must be told its tuning data
    forgetful.save(folder, {"figure.png": b"kept"})
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    words = ("certify", folder, "--calibration", file, "--limit", 40, "--max-new-tokens", 40)
    status, said, error = kslottery(*words, "--epsilon", 0.5, "--ladder", "none")
    assert status == 0, error
    assert len(re.findall("^(CERTIFIED|ABSTAINS)", said, re.M)) == 2 and "certificates.json" in said
    assert "With probability" not in said
    status, again, error = invoke(*words, "--epsilon", 0.5, "--ladder", "none", "--full")
    assert again.count("With probability at least 0.975") == 2 and said.splitlines()[0] in again, error
    status, said, error = invoke(*words, "--epsilon", 0.6, "--delta", 0.1, "--loss", "tokens", "--json")
    assert status == 0, error
    (made,) = json.loads(said)
    assert (
        made["kind"] == "ticket" and made["confidence"] == 0.9 and made["n"] == 40 and made["facts"]["loss"] == "tokens"
    )
    again = Ticket.load(folder)
    assert len(again.certificates) == 3 and again.certificates[-1].claim == made["claim"]
    card = (folder / "README.md").read_text()
    assert card.count("<details><summary>The full sentence</summary>") == 3 and "**CERTIFIED, 90% sure" in card
    changed = {p.name for p in folder.iterdir() if p.read_bytes() != before.get(p.name)}
    plans = {p.name for p in folder.glob("plan-*.json")}
    assert changed == {"certificates.json", "README.md"} | plans and len(plans) == 2
    (tmp_path / "documents").write_text("\n".join(f"d{i // 10}" for i in range(40)))
    status, said, error = invoke(
        *words, "--epsilon", 0.7, "--loss", "exact", "--ladder", "none", "--groups", tmp_path / "documents", "--json"
    )
    assert status == 0, error
    assert all(c["n"] == 4 and c["unit"] == "document" and c["facts"]["method"] == "mixture" for c in json.loads(said))
    assert all("a delta of 0.15 had been spent" in c["assumptions"][-1] for c in json.loads(said))
    kept = {p: p.read_bytes() for p in (*tmp_path.rglob("*.json"), folder / "README.md")}
    (tmp_path / "spaced.jsonl").write_text(
        "".join(
            json.dumps({"source": p.source.upper().replace(" ", "  "), "target": p.target}) + "\n"
            for p in load_pairs(world.split("train"), limit=40)
        )
    )
    (tmp_path / "copies.jsonl").write_text((file.read_text().splitlines()[0] + "\n") * 40)
    (tmp_path / "few").write_text("d1")
    for wrong, part in (
        (("--groups", tmp_path / "few"), "1 group names for 40 losses"),
        (("--calibration", world.split("train")), "was used to tune"),
        (("--calibration", tmp_path / "spaced.jsonl"), "was used to tune"),
        (("--calibration", tmp_path / "copies.jsonl"), "1 distinct sentence can certify nothing"),
        (("--epsilon", 0.01), "can certify nothing: with fewer than 368"),
        (("--until", tmp_path / "m.json", "--groups", tmp_path / "documents"), "certify documents"),
        (("--epsilon", "0"), "epsilon is 0"),
        (("--ladder", "rope"), "transfer, tuning or none"),
        (("--ladder", "tuning"), "--train"),
        (("--loss", "bleu"), "choose quality_difference"),
        (("--model", tmp_path), "no config.json"),
    ):
        status, _, error = invoke(*words, "--epsilon", 0.5, *wrong)
        assert status == 2 and part in error and error.count("\n") == 1, (wrong, error)
    assert len(Ticket.load(folder).certificates) == 5
    assert {p: p.read_bytes() for p in (*tmp_path.rglob("*.json"), folder / "README.md")} == kept  # nothing was written


def test_until_from_the_command_line(ticket, file, tmp_path):
    folder, manifest = tmp_path / "ticket", tmp_path / "m.json"
    replace(ticket).save(folder)
    words = ("certify", folder, "--calibration", file, "--epsilon", 0.9, "--ladder", "none", "--until", manifest)
    asked = (*words, "--max-new-tokens", 8, "--batch-size", 6, "--n-plan", 30, "--seed", 3)
    status, said, error = invoke(*asked, "--limit", 4)
    assert status == 0, error
    written = manifest_of(manifest)
    assert f"The manifest: {manifest}, hash {written['hash']}" in error and len(written["order"]) == 60
    assert (written["n_plan"], written["seed"]) == (30, 3)
    assert said.count("after 4 sentences (30 planned)") == 2 and said.count("if fixed beforehand") == 2
    status, said, error = invoke(*asked, "--json")
    assert status == 0, error
    assert {c["kind"] for c in json.loads(said)} == {"anytime"} and all(c["holds"] for c in json.loads(said))
    status, _, error = invoke(*asked, "--delta", 0.1)
    assert status == 2 and "was written for delta 0.05" in error and error.count("\n") == 1
    assert spent(Ticket.load(folder).certificates) == [0] * 4


def test_plan_from_the_command_line(file, tmp_path, monkeypatch):
    "No ticket, no model: only what is asked, and a guess or a pilot."
    monkeypatch.setattr("kslottery.cli.load_model", lambda *a, **k: pytest.fail("it loaded a model"))
    words = ("certify", "--plan", "--epsilon", 0.02)
    status, said, error = invoke(*words, "--sd", 0.06, "--n", 200, "--figure", tmp_path / "power.png")
    assert status == 0 and "276 sentences for 80% power" in said and "below 183 sentences" in said
    assert error == "kslottery: low power: 200 sentences certify such a ticket in 28% of cases\n"
    assert (tmp_path / "power.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "pilot.txt").write_text("0.01\n-0.02\n" * 20)
    status, said, error = invoke(*words, "--pilot", tmp_path / "pilot.txt", "--calibration", file, "--json")
    assert status == 0 and json.loads(said)["n"] == 60 and json.loads(said)["delta"] == 0.025
    assert error.startswith("kslottery: low power: 60 sentences") and "nothing is translated" in error
    (tmp_path / "bad.txt").write_text("0.01\nmuch\n")
    for wrong, part in (
        (("--pilot", tmp_path / "bad.txt"), "bad.txt is no pilot: it must hold numbers"),
        (("--sd", 0.1, "--loss", "exact"), "sd is 0.1 and the loss is exact"),
        (("--delta", 2), "delta is 2"),
        (("--sd", 0.1, "--pilot", tmp_path / "pilot.txt"), "sd and pilot are given"),
    ):
        status, said, error = invoke(*words, *wrong)
        assert status == 2 and said == "" and part in error and error.count("\n") == 1, error
    status, _, error = invoke("certify", "--epsilon", 0.02)
    assert status == 2 and "give a ticket and --calibration to certify, or --plan" in error


def test_a_bare_scan_needs_a_reference_and_somebody_who_vouches(ticket, loaded, file, tmp_path):
    model, tokenizer = loaded
    ticket.embed_rows.write(copy.deepcopy(model)).save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    status, _, error = invoke("scan", ticket.provenance.model, tmp_path / "tuned", "--out", tmp_path / "bare")
    assert status == 0, error
    words = [
        "certify",
        tmp_path / "bare",
        "--calibration",
        file,
        "--limit",
        30,
        "--epsilon",
        0.5,
        "--loss",
        "tokens",
        "--max-new-tokens",
        20,
    ]
    asked = ["--languages", "Aldan-Borel", "--template", "babel"]
    reference = ["--reference", tmp_path / "tuned"]
    for more, part in (([], "languages"), (asked, "--reference"), ([*asked, *reference], "--vouched")):
        status, _, error = invoke(*words, *more)
        assert status == 2 and part in error, error
    status, said, error = invoke(*words, *asked, *reference, "--vouched", "--json")
    assert status == 0, error
    (made,) = json.loads(said)
    assert made["path"][0]["risk"] == 0 and any("the caller is right" in a for a in made["assumptions"])
    assert made["path"][0]["size"] == int((Ticket.load(tmp_path / "bare").scan.statistic > 0).sum())


def test_a_damaged_certificate_file_is_named(ticket, tmp_path):
    ticket = replace(ticket)
    ticket.save(tmp_path / "t")
    (tmp_path / "t" / "certificates.json").write_text('[{"claim": ')
    with pytest.raises(ValueError, match="certificates.json is damaged"):
        Ticket.load(tmp_path / "t")
    ticket.folder = tmp_path / "gone"
    with pytest.raises(FileNotFoundError, match="no ticket.json"):
        ticket.add_certificates([])


def test_rows_of_another_model_are_refused(ticket, loaded, fresh):
    with pytest.raises(ValueError, match="do not fit"):
        calibration_of(ticket, loaded, fresh, reference=TunedRows([1], np.zeros((1, 3)))).answers()
