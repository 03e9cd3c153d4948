"""Losses against a reference model, and `kslottery certify` as a user meets it."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from conftest import TOY, invoke, kslottery, talker
from kslottery.babel import build_world
from kslottery.core import load_model
from kslottery.data import Pair, encode_all, get_template, load_pairs
from kslottery.ks import ks_scan
from kslottery.losses import Calibration, certify_ticket, ladder_sizes, tuned_anew
from kslottery.rows import TunedRows
from kslottery.ticket import Ticket
from kslottery.tuning import embed_tune


@pytest.fixture(scope="module")
def world():
    return build_world(0, "small")


@pytest.fixture(scope="module")
def loaded(world):
    return load_model(str(world.folder))


@pytest.fixture(scope="module")
def ticket(world, loaded):
    model, tokenizer = loaded
    train = load_pairs(world.split("train"), "Aldan-Borel")
    embed_rows = embed_tune(model, encode_all(tokenizer, "babel", train, "Aldan-Borel"), lr=1.5e-3, epochs=1, batch_size=10, progress=False)
    scan = ks_scan(model.get_input_embeddings().weight, embed_rows.merged(model).get_input_embeddings().weight)
    ids = scan.top(3)
    return Ticket.make(
        model, tokenizer, ids, name=world.folder, scan=scan, rows=embed_rows.restrict(ids), embed_rows=embed_rows, sentences=[p.hash for p in train],
        template=asdict(get_template("babel")), languages="Aldan-Borel", settings=dict(lr_partial=1e-2, epochs=1, batch_size=50),
    )  # fmt: skip


@pytest.fixture(scope="module")
def fresh(world):
    return load_pairs(world.split("calibration"), "Aldan-Borel", 24)


def calibration_of(ticket, loaded, fresh, **changes):
    options = dict(template="babel", languages="Aldan-Borel", used=ticket.sentences, max_new_tokens=20, progress=False) | changes
    return Calibration(*loaded, fresh, options.pop("reference", ticket.embed_rows), **options)


def test_the_reference_loses_nothing_and_batches_do_not_matter(ticket, loaded, fresh):
    by_one, by_all = (calibration_of(ticket, loaded, fresh, batch_size=b) for b in (1, 24))
    for kind in ("exact", "tokens", "quality_shortfall"):
        assert not by_all.losses(ticket.embed_rows, kind).values.any()
        part = ticket.embed_rows.restrict(ticket.embed_rows.ids[::2])
        assert np.array_equal(by_one.losses(part, kind).values, by_all.losses(part, kind).values) and by_all.losses(part, kind).values.any()


def test_another_model_as_reference_is_the_same_as_its_rows(ticket, loaded, fresh):
    merged = ticket.embed_rows.merged(loaded[0])
    part = ticket.embed_rows.restrict(ticket.ids)
    by_rows, by_model = calibration_of(ticket, loaded, fresh), calibration_of(ticket, loaded, fresh, reference=merged)
    for kind in ("exact", "tokens", "quality_difference"):
        assert np.array_equal(by_rows.losses(part, kind).values, by_model.losses(part, kind).values)


def test_provenance_travels(ticket, loaded, fresh):
    found = calibration_of(ticket, loaded, fresh).losses(ticket.embed_rows.restrict(ticket.ids), "exact", "whole")
    assert found.hashes == tuple(p.hash for p in fresh) and found.used == frozenset(ticket.sentences) and found.rows == tuple(sorted(ticket.ids.tolist()))
    assert len({found.prints[k] for k in ("model", "reference", "ticket", "data")}) == 4 and not found.vouched


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
    monkeypatch.setattr("kslottery.losses.translate", lambda *a, **k: pytest.fail("it translated"))
    changes = change(ticket, fresh)
    with pytest.raises(ValueError, match=part):
        calibration_of(ticket, loaded, changes.pop("pairs", fresh), **changes)


@pytest.mark.parametrize("kind, extraction, part", [("loss", "whole", "choose exact"), ("exact", "second_line", "choose whole")])
def test_unknown_losses_are_refused(ticket, loaded, fresh, kind, extraction, part):
    with pytest.raises(ValueError, match=part):
        calibration_of(ticket, loaded, fresh).losses(ticket.embed_rows, kind, extraction)


def test_a_ladder_of_tuned_tickets(ticket, loaded, fresh, world):
    model, tokenizer = loaded
    train = load_pairs(world.split("train"), "Aldan-Borel")
    rows_of = tuned_anew(model, tokenizer, ticket, train)
    best = ticket.scan.top(2)
    tuned = rows_of(best)
    assert rows_of(best) is tuned and tuned.ids.tolist() == sorted(best.tolist()) and torch.any(tuned.delta(model) != 0) and len(rows_of([])) == 0
    found = certify_ticket(model, tokenizer, ticket, fresh, 0.9, 0.1, loss="tokens", sizes=[2], rows_of=rows_of, max_new_tokens=20, progress=False)
    assert len(found) == 1 and found[0].size == 2 and found[0].confidence == 0.9
    for wrong in (fresh, train[:20], [*train, fresh[0]]):  # all of its own data, and nothing else
        with pytest.raises(ValueError, match="not the same"):
            tuned_anew(model, tokenizer, ticket, wrong)
    assert tuned_anew(model, tokenizer, ticket, train[::-1])


def test_sentences_that_served_before_are_recognised(ticket, loaded, fresh):
    "In another order, or some of them only: the second certificate says so."
    mine = replace(ticket, certificates=[])
    certify = lambda pairs: certify_ticket(*loaded, mine, pairs, 0.9, 0.1, loss="tokens", sizes=[2], max_new_tokens=8, progress=False)
    first = certify(fresh[:10])
    mine.certificates += first
    assert not any("have served" in a for a in first[0].assumptions)
    for pairs, seen in ((fresh[9::-1], True), (fresh[8:16], True), (fresh[10:], False)):
        assert any("have served" in a for a in certify(pairs)[0].assumptions) == seen


def test_a_claim_names_the_source_of_the_rows(ticket, loaded, fresh):
    "Rows out of Embed Tuning that are compared with another model are not that model's rows."
    model, tokenizer = loaded
    other = ticket.embed_rows.scale(model, 0.9).merged(model)
    made = [
        certify_ticket(model, tokenizer, ticket, fresh, 0.9, 0.1, loss="tokens", sizes=[2], max_new_tokens=8, progress=False, reference=r)[0].claim
        for r in (None, other)
    ]
    assert "taken over from the reference model" in made[0] and "taken over from Embed Tuning" in made[1]


def test_shared_rows_are_certified_as_shared_rows():
    "On a tied model all moved rows together are the reference model, output included: no loss at all."
    base = talker("gpt2")
    moved = TunedRows([5, 6, 9], TunedRows.of(base, [5, 6, 9]).rows.detach() * -3, "shared")
    tuned = moved.merged(base)
    scan = ks_scan(*(m.get_input_embeddings().weight for m in (base, tuned)))
    ids = scan.top(2)
    mine = Ticket.make(base, TOY, ids, name="toy", scan=scan, rows=moved.restrict(ids))
    pairs = [Pair(str(i), f"t{i} t5 t6", f"t{i}") for i in range(7, 27)]
    asked = dict(loss="tokens", sizes=[3], reference=tuned, template="prompt", languages="a-b", vouched=True, max_new_tokens=8, progress=False)
    (found,) = certify_ticket(base, TOY, mine, pairs, 0.9, 0.1, **asked)
    assert found.path[-1]["risk"] == 0
    wrong = replace(mine, info=mine.info | {"mode": "input_only"})
    assert certify_ticket(base, TOY, wrong, pairs, 0.9, 0.1, **asked)[0].path[-1]["risk"] > 0


def test_ladder_sizes():
    assert ladder_sizes(9, 5, 50) == [0, 1, 2, 4, 5, 8, 9] and ladder_sizes(1) == [0, 1] and ladder_sizes(64, factor=4) == [0, 1, 4, 16, 64]


def test_certify_from_the_command_line(ticket, world, tmp_path):
    folder = tmp_path / "ticket"
    ticket.save(folder, {"figure.png": b"kept"})
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    words = ("certify", folder, "--calibration", world.split("calibration"), "--limit", 40, "--max-new-tokens", 40)
    status, said, error = kslottery(*words, "--epsilon", 0.5, "--ladder", "none")
    assert status == 0, error
    assert said.count("With probability at least 0.975") == 2 and "certificates.json" in said
    status, said, error = invoke(*words, "--epsilon", 0.6, "--delta", 0.1, "--loss", "tokens", "--json")
    assert status == 0, error
    (made,) = json.loads(said)
    assert made["kind"] == "ticket" and made["confidence"] == 0.9 and made["n"] == 40 and made["facts"]["loss"] == "tokens"
    again = Ticket.load(folder)
    assert len(again.certificates) == 3 and again.certificates[-1].claim == made["claim"]
    assert made["claim"] in (folder / "README.md").read_text()
    changed = {p.name for p in folder.iterdir() if p.read_bytes() != before.get(p.name)}
    assert changed == {"certificates.json", "README.md"}
    (tmp_path / "documents").write_text("\n".join(f"d{i // 10}" for i in range(40)))
    status, said, error = invoke(*words, "--epsilon", 0.6, "--loss", "exact", "--ladder", "none", "--groups", tmp_path / "documents", "--json")
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
        (("--loss", "bleu"), "choose exact"),
        (("--model", tmp_path), "no config.json"),
    ):
        status, _, error = invoke(*words, "--epsilon", 0.5, *wrong)
        assert status == 2 and part in error and error.count("\n") == 1, (wrong, error)
    assert len(Ticket.load(folder).certificates) == 5


def test_a_bare_scan_needs_a_reference_and_somebody_who_vouches(ticket, loaded, world, tmp_path):
    model, tokenizer = loaded
    ticket.embed_rows.merged(model).save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    status, _, error = invoke("scan", ticket.info["model"], tmp_path / "tuned", "--out", tmp_path / "bare")
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
    ticket.save(tmp_path / "t")
    (tmp_path / "t" / "certificates.json").write_text('[{"claim": ')
    with pytest.raises(ValueError, match="certificates.json is damaged"):
        Ticket.load(tmp_path / "t")
    with pytest.raises(FileNotFoundError, match="no ticket.json"):
        ticket.add_certificates(tmp_path, [])


def test_rows_of_another_model_are_refused(ticket, loaded, fresh):
    with pytest.raises(ValueError, match="do not fit"):
        calibration_of(ticket, loaded, fresh, reference=TunedRows([1], np.zeros((1, 3)))).answers()
