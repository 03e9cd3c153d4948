"""Losses against a reference model, and `kslottery certify` as a user meets it."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from conftest import TOY, invoke, kslottery, talker
from kslottery.babel import build_world
from kslottery.calibration import Calibration, CertifySettings, certify_ticket, ladder, ladder_sizes, retuned, text_loss
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
    return Ticket(ids, facts, embed_rows.restrict(ids), embed_rows, scan, tuple(p.hash for p in train))


@pytest.fixture(scope="module")
def fresh(world):
    return load_pairs(world.split("calibration"), limit=24)


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
        and found.used == frozenset(ticket.sentences)
        and found.rows == tuple(sorted(ticket.ids.tolist()))
    )
    assert len({found.prints[k] for k in ("model", "reference", "ticket", "data")}) == 4 and not found.vouched
    made = ("template", "languages", "dtype", "max_new_tokens", "num_beams", "batch_size")
    assert [found.prints[k] for k in made] == [PROMPT.template.text, "Aldan-Borel", "float32", 20, 1, 16]


@pytest.mark.parametrize(
    "change, part",
    [
        (lambda t, p: dict(used=[*t.sentences, p[7].hash]), ":8 was used"),
        (lambda t, p: dict(used=[*t.sentences, p[7]._replace(target="in other words").hash]), ":8 was used"),
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


def test_sentences_that_served_before_are_recognised(ticket, loaded, fresh):
    "In another order, or some of them only: the second certificate says so."
    mine = replace(ticket, certificates=[])
    first = certified(mine, loaded, fresh[:10], SHORT)
    mine.certificates += first
    assert not any("have served" in a for a in first[0].assumptions)
    for pairs, seen in ((fresh[9::-1], True), (fresh[8:16], True), (fresh[10:], False)):
        assert any("have served" in a for a in certified(mine, loaded, pairs, SHORT)[0].assumptions) == seen


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


def test_certify_from_the_command_line(ticket, world, tmp_path):
    folder = tmp_path / "ticket"
    forgetful = replace(ticket, provenance=replace(ticket.provenance, train=None))  # it must be told its tuning data
    forgetful.save(folder, {"figure.png": b"kept"})
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    words = ("certify", folder, "--calibration", world.split("calibration"), "--limit", 40, "--max-new-tokens", 40)
    status, said, error = kslottery(*words, "--epsilon", 0.5, "--ladder", "none")
    assert status == 0, error
    assert said.count("With probability at least 0.975") == 2 and "certificates.json" in said
    status, said, error = invoke(*words, "--epsilon", 0.6, "--delta", 0.1, "--loss", "tokens", "--json")
    assert status == 0, error
    (made,) = json.loads(said)
    assert (
        made["kind"] == "ticket" and made["confidence"] == 0.9 and made["n"] == 40 and made["facts"]["loss"] == "tokens"
    )
    again = Ticket.load(folder)
    assert len(again.certificates) == 3 and again.certificates[-1].claim == made["claim"]
    assert made["claim"] in (folder / "README.md").read_text()
    changed = {p.name for p in folder.iterdir() if p.read_bytes() != before.get(p.name)}
    assert changed == {"certificates.json", "README.md"}
    (tmp_path / "documents").write_text("\n".join(f"d{i // 10}" for i in range(40)))
    status, said, error = invoke(
        *words, "--epsilon", 0.6, "--loss", "exact", "--ladder", "none", "--groups", tmp_path / "documents", "--json"
    )
    assert status == 0, error
    assert all(c["n"] == 4 and c["unit"] == "document" and c["facts"]["method"] == "betting" for c in json.loads(said))
    assert all("have served" in c["assumptions"][-1] for c in json.loads(said))
    (tmp_path / "few").write_text("d1")
    for wrong, part in (
        (("--groups", tmp_path / "few"), "1 group names for 40 losses"),
        (("--calibration", world.split("train")), "was used to tune"),
        (("--epsilon", "0"), "epsilon is 0"),
        (("--ladder", "rope"), "transfer, tuning or none"),
        (("--ladder", "tuning"), "--train"),
        (("--loss", "bleu"), "choose quality_difference"),
        (("--model", tmp_path), "no config.json"),
    ):
        status, _, error = invoke(*words, "--epsilon", 0.5, *wrong)
        assert status == 2 and part in error and error.count("\n") == 1, (wrong, error)
    assert len(Ticket.load(folder).certificates) == 5


def test_a_bare_scan_needs_a_reference_and_somebody_who_vouches(ticket, loaded, world, tmp_path):
    model, tokenizer = loaded
    ticket.embed_rows.write(copy.deepcopy(model)).save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    status, _, error = invoke("scan", ticket.provenance.model, tmp_path / "tuned", "--out", tmp_path / "bare")
    assert status == 0, error
    words = [
        "certify",
        tmp_path / "bare",
        "--calibration",
        world.split("calibration"),
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
