"""The ticket folder: there and back, PEFT, what is refused, and faults injected for real."""

import copy
import json
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from markdown_it import MarkdownIt
from peft import PeftModel
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import forks
from conftest import ARCHITECTURES, ROOT, TIED, invoke, talker, tiny_model
from kslottery.certificate import certify_agreement
from kslottery.core import load_model
from kslottery.data import Pair, Pairs, Prompt, encode_all
from kslottery.evaluation import Generation
from kslottery.ks import critical_value, ks_scan
from kslottery.lottery import find_ticket
from kslottery.rows import TunedRows, add_tokens
from kslottery.ticket import Provenance, Selection, Ticket
from kslottery.tuning import Recipe, partial_tune

X = torch.tensor([[1, 9, 4, 9, 5], [4, 9, 3, 3, 7]])
GREEDY = dict(attention_mask=torch.ones_like(X), max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=63)
TOKENIZER = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel({f"t{i}": i for i in range(64)}, unk_token="t0")), eos_token="t2"
)
OLD = ROOT / "tests" / "fixtures" / "ticket-0.1"
PAIRS = [Pair(f"x:{n}", f"sentence {n}", "y") for n in range(3)]


def bare(model, ids, rows=None, **facts):
    "A ticket with nothing but its model."
    return Ticket(ids, Provenance.of(model, TOKENIZER, ids, **facts), rows)


def ticket_for(model, ids=(9, 4), mode="input_only", name="tiny"):
    width = 16 * (1 + (mode == "both"))
    embed = TunedRows(range(3, 12), torch.randn(9, width, generator=torch.Generator().manual_seed(0)), mode)
    scan = ks_scan(embed.matrix(model).base, embed.matrix(model))
    recipe, prompt = Recipe(lr_embed=1e-3, mode=mode), Prompt("explicit", "en-ca")
    facts = Provenance.of(model, TOKENIZER, ids, selection=Selection(), prompt=prompt, recipe=recipe)
    hashes = tuple(one for pair in PAIRS for one in (pair.hash, pair.loose))
    return Ticket(ids, replace(facts, model=name), embed.restrict(ids), embed, scan, hashes)


def merged(rows, model):
    return rows.write(copy.deepcopy(model))


@pytest.mark.parametrize(
    "kind, mode",
    [*((kind, "input_only") for kind in ARCHITECTURES), *((kind, "shared") for kind in TIED)]
    + [("llama", "head"), ("qwen2", "both")],
)
def test_there_and_back(kind, mode, tmp_path):
    model = tiny_model(kind)
    ticket = ticket_for(model, mode=mode)
    ticket.save(tmp_path / "t")
    again = Ticket.load(tmp_path / "t")
    again.check(model, TOKENIZER)
    assert again.ids.tolist() == [9, 4] and again.provenance == ticket.provenance
    assert again.sentences == ticket.sentences and again.folder == tmp_path / "t"
    record = json.loads((tmp_path / "t" / "ticket.json").read_text())
    assert again.mode == again.rows.mode == again.embed_rows.mode == record["mode"] == mode
    assert torch.equal(again.rows.weight, ticket.rows.weight)
    assert torch.equal(again.embed_rows.weight, ticket.embed_rows.weight)
    assert np.array_equal(again.scan.pvalue, ticket.scan.pvalue)
    assert record["tokens"] == ["t9", "t4"] and record["statistic"] == ticket.scan.statistic[[9, 4]].tolist()
    assert record["schema_version"] == 2 and record["recipe"]["lr_embed"] == 1e-3 and record["alpha"] == 0.05
    assert not list((tmp_path / "t").glob("*.bin")) and not list((tmp_path / "t").glob("*.pkl"))


def test_a_ticket_is_not_for_a_merged_or_resized_model():
    "Two tickets are never merged one after the other: the second is for another embedding by then (PEFT issue 3510)."
    model = tiny_model("llama")
    first, second = ticket_for(model), ticket_for(model, (4, 5))
    resized = tiny_model("llama")
    resized.resize_token_embeddings(72, mean_resizing=False)
    for other in (merged(first.rows, model), resized):
        with pytest.raises(ValueError, match="another embedding"):
            second.check(other, TOKENIZER)


def test_ids_beyond_the_tokenizer(tmp_path):
    "Padded rows have no token string, and are tickets like others (PEFT issue 2415)."
    model = tiny_model("qwen2", vocabulary=80)
    bare(model, [79, 4], TunedRows([79, 4], torch.ones(2, 16))).save(tmp_path / "t")
    again = Ticket.load(tmp_path / "t")
    assert again.provenance.tokens == ("[79]", "t4") and again.ids.tolist() == [79, 4]
    with again.rows.applied(model), torch.no_grad():
        assert torch.equal(
            PeftModel.from_pretrained(tiny_model("qwen2", vocabulary=80), tmp_path / "t").eval()(X + 70).logits,
            model(X + 70).logits,
        )


def test_another_model_or_tokenizer_is_refused():
    ticket = ticket_for(tiny_model("llama"))
    with pytest.raises(ValueError, match="another embedding.*tiny"):
        ticket.check(tiny_model("llama", seed=1), TOKENIZER)
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({f"u{i}": i for i in range(64)}, unk_token="u0")), eos_token="u2"
    )
    with pytest.raises(ValueError, match="another tokenizer"):
        ticket.check(tiny_model("llama"), other)
    padded = TOKENIZER.__class__(tokenizer_object=TOKENIZER.backend_tokenizer, eos_token="t2")
    padded.backend_tokenizer.enable_padding(length=12)  # a setting of use, not another tokenizer
    ticket.check(tiny_model("llama"), padded)


@pytest.mark.parametrize("file", ["rows.safetensors", "embed_rows.safetensors", "scan.safetensors", "ticket.json"])
def test_a_file_cut_short_is_refused(file, tmp_path):
    ticket_for(tiny_model("llama")).save(tmp_path / "t")
    path = tmp_path / "t" / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=f"{file} is damaged"):
        Ticket.load(tmp_path / "t")


def test_a_newer_schema_is_refused(tmp_path):
    ticket_for(tiny_model("llama")).save(tmp_path / "t")
    path = tmp_path / "t" / "ticket.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 99}))
    with pytest.raises(ValueError, match="99.*update"):
        Ticket.load(tmp_path / "t")


def test_a_strangers_folder_is_left_alone(tmp_path):
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "thesis.tex").write_text("years")
    with pytest.raises(FileExistsError, match="something else"):
        ticket_for(tiny_model("llama")).save(tmp_path / "t")
    assert [p.name for p in tmp_path.rglob("*")] == ["t", "thesis.tex"]


def test_two_saves_are_the_same_bytes(tmp_path):
    "In two processes with other seeds of Python's hashes, and with everything that a ticket can have."
    code = f"""
import sys; sys.path.insert(0, {str(ROOT / "tests")!r})
from test_ticket import *
for mode in ("input_only", "shared"):
    ticket = ticket_for(tiny_model("gpt2"), mode=mode)
    ticket.add_certificates([certify_agreement(np.zeros(60), 0.05, epsilon=0.2, vouched=True)])
    ticket.add_audit({{"sentence": "so", "report": "it is"}})
    ticket.save(sys.argv[1] + mode)
"""
    runs = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / n)], env=os.environ | {"PYTHONHASHSEED": n})
        for n in "12"
    ]
    assert [run.wait(timeout=300) for run in runs] == [0, 0]
    for mode, least in (("input_only", 7), ("shared", 9)):
        one, two = (contents(tmp_path / f"{n}{mode}") for n in "12")
        assert one == two and len(one) >= least
        Ticket.load(tmp_path / f"1{mode}").save(tmp_path / f"3{mode}")  # and so are those of what was read again
        assert contents(tmp_path / f"3{mode}") == one


def test_colleagues_can_read_it(tmp_path):
    ticket = ticket_for(tiny_model("llama"))
    before = os.umask(0o022)
    try:
        ticket.save(tmp_path / "t", {"rank.png": b"png"})
        ticket.add_audit({"sentence": "so", "report": "it is"}, b"png")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "t").stat().st_mode) == 0o755
    assert {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "t").iterdir()} == {0o644}


# Version 0.1


def test_a_ticket_of_version_0_1_loads(tmp_path):
    old = Ticket.load(OLD)
    facts = old.provenance
    assert old.ids.tolist() == [9, 11, 4, 5] and facts.tokens == ("t9", "t11", "⏎", "t5")
    assert facts.selection == Selection(alpha=0.05, top_k=4) and old.prompt == Prompt("explicit", "en-ca")
    assert facts.train == {"data": "train.tsv", "languages": "en-ca", "limit": 3}
    assert facts.test == {"data": "test.tsv", "languages": "en-ca", "limit": 2}
    assert facts.generation.max_new_tokens == 40 and facts.license == "mit" and facts.versions["kslottery"] == "0.1.0"
    recipe = old.recipe
    assert (recipe.lr_embed, recipe.lr_partial, recipe.epochs_embed, recipe.epochs_partial) == (2e-5, 1e-2, 2, 2)
    assert (recipe.batch_size, recipe.seed, recipe.mode) == (8, 3, "input_only")
    assert old.rows.ids.tolist() == [4, 5, 9, 11] and old.embed_rows.ids.tolist() == list(range(3, 12))
    assert len(old.scan.statistic) == 64 and old.scan.d == 16 and old.scan.top(4).tolist() == old.ids.tolist()
    assert [c.kind for c in old.certificates] == ["agreement"] and old.audit["verdict"] == "stopping"
    old.check_pairs(PAIRS)
    assert not any(h.startswith("~") for h in old.sentences)  # it knows exact hashes only

    old.save(tmp_path / "new")
    new = Ticket.load(tmp_path / "new")
    assert json.loads((tmp_path / "new" / "ticket.json").read_text())["schema_version"] == 2
    assert new.provenance == facts and new.certificates == old.certificates and new.audit == old.audit
    assert torch.equal(new.rows.weight, old.rows.weight) and np.array_equal(new.scan.pvalue, old.scan.pvalue)
    for name in ("rows", "embed_rows", "scan"):
        stored, before = (load_file(folder / f"{name}.safetensors") for folder in (tmp_path / "new", OLD))
        assert all(np.array_equal(stored[key], before[key]) for key in before)


# What is refused


def changed(tmp_path, **values):
    "A folder of a ticket whose ticket.json says something else."
    shutil.rmtree(tmp_path / "t", ignore_errors=True)
    ticket_for(tiny_model("llama")).save(tmp_path / "t")
    path = tmp_path / "t" / "ticket.json"
    record = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in record.items() if value is not ...}))
    return tmp_path / "t"


@pytest.mark.parametrize(
    "ids", [[9.0, 4], ["9", 4], [True, 4], [[9], [4]], [-1, 4], [9, 9], [9, 64], 9, None, {}, "94"]
)
def test_ids_that_are_none(ids, tmp_path):
    with pytest.raises(ValueError, match=r"ids are|there are .* ids"):
        Ticket.load(changed(tmp_path, ids=ids))
    with pytest.raises((TypeError, ValueError), match=r"ids are|there are .* ids"):
        Ticket(ids, ticket_for(tiny_model("llama")).provenance)


def test_ids_that_are_not_those_of_the_rows(tmp_path):
    with pytest.raises(ValueError, match="2 ids and rows of others"):
        Ticket.load(changed(tmp_path, ids=[59, 54]))


@pytest.mark.parametrize(
    "values, words",
    [
        ({"V": 63}, "the scan is of shape"),
        ({"V": "64"}, "V is '64': it must be int"),
        ({"V": True}, "V is True"),
        ({"d": 8}, "64 x 8"),
        ({"d": 0}, "64 x 0"),
        ({"d": ...}, "d is None"),
        ({"model": ...}, "model is None: it must be str"),
        ({"model": 5}, "model is 5"),
        ({"tokens": ["t9"]}, "2 ids, with tokens or counts"),
        ({"tokens": [9, 4]}, "tokens"),
        ({"counts": ["1", "2"]}, "counts"),
        ({"fingerprints": {"embedding": None, "tokenizer": "0" * 64}}, "SHA-256 of the embedding"),
        ({"fingerprints": {}}, "SHA-256 of the embedding"),
        ({"fingerprints": ["x"]}, "fingerprints is"),
        ({"mode": "output"}, "mode is 'output'"),
        ({"alpha": 2.0}, "alpha is 2.0"),
        ({"alpha": "0.05"}, "alpha is '0.05'"),
        ({"top_k": -1}, "top_k is -1"),
        ({"criterion": "luck"}, "criterion is 'luck'"),
        ({"correction": "some"}, "correction is 'some'"),
        ({"prompt": {"template": 1}}, "prompt is"),
        ({"prompt": ["x"]}, "prompt is"),
        ({"recipe": {"lr_embed": -1}}, "recipe is"),
        ({"recipe": {"nonsense": 1}}, "recipe is"),
        ({"generation": {"max_new_tokens": "many"}}, "generation is"),
        ({"train": {"data": 5}}, "train and test are"),
        ({"schema_version": ...}, "ticket schema None"),
        ({"schema_version": "x"}, "ticket schema 'x'"),
        ({"schema_version": 1, "tokens": ...}, "lacks 'tokens'"),
        ({"versions": 3}, "versions is 3"),
        ({"changed": 1.5}, "changed is 1.5"),
        ({"changed": -998}, "changed is -998"),
        ({"changed": 65}, "changed is 65: it must be a number of the 64 rows"),
        ({"counts": [-3, 4]}, "counts are .*at least 0"),
        ({"counts": []}, "2 ids, with tokens or counts"),
        ({"counts": [True, 4]}, "counts is .*it must be tuple.int"),
        ({"versions": {"torch": 2}}, "versions is .*it must be dict.str, str"),
        ({"size": 3}, "says another size than its rows"),
        ({"statistic": [0.5, 0.5]}, "says another statistic than"),
        ({"dtype": "pickle"}, "dtype is 'pickle': give a floating dtype"),
        ({"dtype": "Tensor"}, "dtype is 'Tensor'"),
        ({"mode": "shared"}, "does not tie the two"),
        ({"mode": "head"}, "read by an output that the provenance does not name"),
        ({"mode": "both", "output_module": "lm_head"}, "do not fit an embedding of 64 x 16"),
        ({"mode": "head", "tied_embeddings": True}, "does not tie input and output"),
        ({"added_tokens": ["<a>", "<a>"]}, "distinct texts"),
        ({"added_tokens": [""]}, "distinct texts"),
        ({"added_tokens": ["<a>"], "end_token": "<a>"}, "'<a>' ends texts, and rows of the input alone never"),
        ({"V": 2**70}, "1 x 1 or more"),
        ({"schema_version": True}, "ticket schema True"),
        ({"fingerprints": {"embedding": "0" * 64, "tokenizer": 5}}, "fingerprints is"),
        ({"license": "\ud800"}, "surrogates not allowed"),
        ({"train": {"data": "x", "rate": float("inf")}}, "Out of range"),
        ({"recipe": {"epochs_embed": True}}, "recipe is .*epochs_embed is True"),
        ({"recipe": {"progress": "yes"}}, "progress is 'yes'"),
        ({"recipe": {"engine": []}}, "recipe is .*no recipe"),
        ({"recipe": {"engine": {"compile": 1}}}, "compile is 1: it must be bool"),
        ({"recipe": {"lr_embed": 10**400}}, "recipe is .*too large"),
        ({"generation": {"num_beams": 2**70}}, "less than 2 .. 31"),
    ],
    ids=str,
)
def test_facts_that_cannot_be(values, words, tmp_path):
    folder = changed(tmp_path, **values)
    with pytest.raises(ValueError, match=words) as told:
        Ticket.load(folder)
    assert str(folder) in str(told.value) and "again" in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize("text", ["0", "[1e999]", "[" * 1200, "{", "", "null", '{"ids": 1e999}', "\x00", '"\\ud800"'])
@pytest.mark.parametrize("file", ["ticket.json", "certificates.json", "audit.json"])
def test_json_of_all_kinds_is_one_sentence(file, text, tmp_path):
    folder = changed(tmp_path)
    (folder / file).write_text(text)
    with pytest.raises(ValueError, match=f"{file} (is damaged|has ticket schema).*again"):
        Ticket.load(folder)


@pytest.mark.parametrize(
    "file, content",
    [
        ("rows", {"ids": np.array([4.0, 9.0]), "rows": np.ones((2, 16), np.float32)}),
        ("rows", {"ids": np.array([4, 9]), "rows": np.ones((2, 16))}),
        ("rows", {"ids": np.array([4, 9]), "rows": np.full((2, 16), np.nan, np.float32)}),
        ("rows", {"ids": np.array([4, 9]), "rows": np.ones((3, 16), np.float32)}),
        ("rows", {"rows": np.ones((2, 16), np.float32)}),
        ("rows", {"ids": np.array([4, 9]), "rows": np.ones((2, 8), np.float32)}),
        ("embed_rows", {"ids": np.array([4, 99]), "rows": np.ones((2, 16), np.float32)}),
        ("scan", {"pvalue": np.ones(64)}),
        ("scan", {"statistic": np.ones(64)}),
        ("scan", ({"statistic": np.ones(64)}, {"d": 999, "criterion": "ks", "decided": None})),
        ("scan", ({"statistic": np.ones(64)}, {"d": -1, "criterion": "ks", "decided": None})),
        ("scan", ({"statistic": np.ones(64)}, {"d": 16, "criterion": "luck", "decided": None})),
        ("scan", ({"statistic": np.ones(64)}, {"d": 16, "criterion": "ks", "decided": 7})),
        ("scan", ({"statistic": np.ones(64, np.float32)}, {"d": 16, "criterion": "ks", "decided": None})),
        (
            "scan",
            ({"statistic": np.ones(64), "pvalue": np.full(64, 1.5)}, {"d": 16, "criterion": "l2", "decided": None}),
        ),
        ("scan", ({"statistic": np.ones(64)}, {"d": 16, "criterion": "l2", "decided": None})),  # not what the ids say
        ("sentences.txt", b"not a hash\n"),
        ("sentences.txt", b"\xff\xfe"),
    ],
    ids=str,
)
def test_files_that_cannot_be(file, content, tmp_path):
    folder = changed(tmp_path)
    if isinstance(content, bytes):
        (folder / file).write_bytes(content)
    else:
        arrays, about = content if isinstance(content, tuple) else (content, None)
        save_file(arrays, folder / f"{file}.safetensors", about and {"scan": json.dumps(about)})
    with pytest.raises(ValueError, match="is damaged.*copy the ticket again"):
        Ticket.load(folder)


PROVEN = certify_agreement(np.zeros(60), 0.05, epsilon=0.2, vouched=True)


@pytest.mark.parametrize(
    "values",
    [{"claim": 5}, {"holds": "yes"}, {"bound": "0.1"}, {"bound": None}, {"n": True}, {"assumptions": "abc"}]
    + [{"assumptions": [1]}, {"path": [1]}, {"facts": []}, {"facts": {"loss": []}}, {"facts": {"extraction": ["a"]}}]
    + [{"facts": {"epsilon": float("inf")}}, {"unit": "\ud800"}, {"luck": 1}, {"kind": ...}],
    ids=ascii,
)
def test_certificates_that_are_none(values, tmp_path):
    record = json.loads(PROVEN.to_json()) | values
    folder = changed(tmp_path)
    (folder / "certificates.json").write_text(json.dumps([{k: v for k, v in record.items() if v is not ...}]))
    with pytest.raises(ValueError, match="certificates.json is damaged.*certify or audit again") as told:
        Ticket.load(folder)
    assert str(told.value).isprintable()


@pytest.mark.parametrize("content", ['{"sentence": "x"}', '{"sentence": 1, "report": "y"}', '["x"]'])
def test_audits_that_are_none(content, tmp_path):
    folder = changed(tmp_path)
    (folder / "audit.json").write_text(content)
    with pytest.raises(ValueError, match="audit.json is damaged.*audit again"):
        Ticket.load(folder)


@pytest.mark.parametrize(
    "file",
    ["ticket.json", "certificates.json", "audit.json", "sentences.txt", "scan.safetensors", "embed_rows.safetensors"],
)
def test_a_file_that_is_a_pipe_or_a_folder_is_not_waited_for(file, tmp_path):
    folder = changed(tmp_path)
    for make in (os.mkfifo, os.mkdir):
        shutil.rmtree(folder / file) if (folder / file).is_dir() else (folder / file).unlink(missing_ok=True)
        make(folder / file)
        with pytest.raises((ValueError, FileNotFoundError), match="name a file|holds no ticket.json"):
            Ticket.load(folder)


@pytest.mark.parametrize("path", ["x" * 300, "a\0b", "file/under", "~nobody-of-this-name/t", ""])
def test_a_path_that_can_be_none(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError) as told:
        Ticket.load(path)
    assert str(told.value).isprintable() and "Errno" not in str(told.value)


@pytest.mark.parametrize("ids", [[6.9, "12", True], [6.9, 7.0], ["12"], [True], [[3], [4]], [[1, 2], [3]], 3, "34"])
def test_rows_of_ids_that_are_none(ids, tmp_path):
    with pytest.raises(TypeError, match="ids are .*: they must be token ids"):
        TunedRows(ids, torch.ones(len(ids) if isinstance(ids, list) else 1, 16))
    ticket_for(tiny_model("llama")).save_peft(tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    for odd in (ids, [-1, 4], [4, 4], None, {"a": [4, 9]}):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"token_indices": odd}))
        with pytest.raises(ValueError, match=f"{tmp_path}.* is damaged.*copy the adapter again"):
            Ticket.from_peft(tmp_path / "a", tiny_model("llama"), TOKENIZER)


def test_a_fuzzed_folder_is_read_or_refused_in_one_sentence(tmp_path):
    "Bytes changed, cut out and put in at random, in every file that is read."
    ticket_for(tiny_model("llama")).save(tmp_path / "t")
    rng = np.random.default_rng(0)
    for name in ("ticket.json", "rows.safetensors", "scan.safetensors", "embed_rows.safetensors", "sentences.txt"):
        path = tmp_path / "t" / name
        whole = path.read_bytes()
        for _ in range(40):
            a, b = sorted(rng.integers(0, len(whole), 2))
            noise = rng.integers(0, 256, rng.integers(0, 4)).astype(np.uint8).tobytes()
            path.write_bytes(whole[:a] + noise + whole[b if rng.random() < 0.3 else a + len(noise) :])
            try:
                Ticket.load(tmp_path / "t")
            except ValueError as error:
                assert str(tmp_path) in str(error) and "\n" not in str(error) and len(str(error)) < 500
        path.write_bytes(whole)
    Ticket.load(tmp_path / "t")


@pytest.mark.parametrize(
    "values",
    [dict(alpha=0.0), dict(alpha=None), dict(alpha=float("nan")), dict(top_k=-1), dict(top_k=2.0), dict(top_k=True)]
    + [dict(criterion="luck"), dict(correction="bonferoni"), dict(alpha="0.05")],
    ids=str,
)
def test_a_selection_is_checked_when_it_is_made(values):
    with pytest.raises((TypeError, ValueError), match=f"{[*values][0]} is .*:"):
        Selection(**values)


def test_a_selection_chooses():
    model = tiny_model("llama")
    scan = ticket_for(model).scan
    assert Selection(top_k=3).ids(scan).tolist() == Selection(top_k=3, alpha=None).ids(scan).tolist()
    assert Selection(top_k=3).ids(scan).tolist() == scan.top(3).tolist()
    assert Selection(alpha=0.01, correction="bh").ids(scan).tolist() == scan.select(0.01, "bh").tolist()


# What a ticket answers


def test_prompt_and_recipe_or_one_sentence():
    model = tiny_model("llama")
    ticket = ticket_for(model)
    assert ticket.prompt == Prompt("explicit", "en-ca") and ticket.recipe == Recipe(lr_embed=1e-3)
    for name in ("prompt", "recipe"):
        with pytest.raises(ValueError, match=f"records no {name}"):
            getattr(bare(model, [9]), name)


def test_the_base_is_what_is_given_or_what_is_recorded(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    ticket = ticket_for(model, name=str(tmp_path / "model"))
    assert ticket.base(model, TOKENIZER) == (model, TOKENIZER)
    found, tokenizer = ticket.base()
    assert torch.equal(found.get_input_embeddings().weight.cpu(), model.get_input_embeddings().weight)
    with pytest.raises(ValueError, match="another embedding"):
        ticket.base(tiny_model("llama", seed=1), TOKENIZER)
    with pytest.raises(ValueError, match="give both model and tokenizer"):
        ticket.base(model)
    with pytest.raises(ValueError, match="does not say which model"):
        ticket_for(model, name="").base()
    with pytest.raises(FileNotFoundError, match="gone"):
        ticket_for(model, name=str(tmp_path / "gone")).base()


def test_what_is_added_is_written_where_the_ticket_lives(tmp_path):
    ticket = ticket_for(tiny_model("llama"))
    test = Pairs(PAIRS)
    test.origin = {"data": "test.tsv", "languages": "en-ca", "limit": None}
    ticket.remember(test, Generation(max_new_tokens=7))  # before there is a folder
    ticket.save(tmp_path / "t")
    before = (tmp_path / "t" / "rows.safetensors").read_bytes()
    proven = certify_agreement(np.zeros(60), 0.05, epsilon=0.2, vouched=True)
    loaded = Ticket.load(tmp_path / "t")
    assert loaded.provenance.test == test.origin and loaded.provenance.generation.max_new_tokens == 7
    for _ in range(2):
        loaded.add_certificates([proven])  # the second time it is there already
    loaded.add_audit({"sentence": "It is an artefact.", "report": "## Why"}, b"png")
    loaded.refresh(base_model="org/tiny", license="mit")
    loaded.remember(generation=Generation(max_new_tokens=9))
    again = Ticket.load(tmp_path / "t")
    assert again.certificates == [proven] and again.audit["sentence"] == "It is an artefact."
    assert again.provenance == loaded.provenance and again.provenance.base_model == "org/tiny"
    assert again.provenance.test == test.origin and again.provenance.generation.max_new_tokens == 9
    assert (tmp_path / "t" / "rows.safetensors").read_bytes() == before
    card = (tmp_path / "t" / "README.md").read_text()
    assert "It is an artefact." in card and "![audit](audit.png)" in card and "CERTIFIED" in card and "org/tiny" in card
    with pytest.raises(ValueError, match="on the Hub"):
        loaded.refresh(base_model="./tiny")
    shutil.rmtree(tmp_path / "t")
    with pytest.raises(FileNotFoundError, match="save the ticket again"):
        loaded.add_certificates([])


def other_certificate(n):
    return replace(PROVEN, claim=f"With probability at least 0.95, {n}.")


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_of_many_that_note_something_at_once_nothing_is_lost(tmp_path):
    "Ten threads have read the same ticket; each adds its own."
    ticket_for(tiny_model("llama")).save(tmp_path / "t")
    mine = [Ticket.load(tmp_path / "t") for _ in range(10)]
    notes = [
        *(lambda t=t, n=n: t.add_certificates([other_certificate(n)]) for n, t in enumerate(mine[:6])),
        lambda: mine[6].add_audit({"sentence": "It is an artefact.", "report": "## Why"}, b"png"),
        lambda: mine[7].refresh(license="mit"),
        lambda: mine[8].remember(generation=Generation(max_new_tokens=9)),
        lambda: mine[9].refresh(base_model="org/tiny"),
    ]
    with ThreadPoolExecutor(10) as pool:
        [done.result() for done in [pool.submit(note) for note in notes]]
    again = Ticket.load(tmp_path / "t")
    facts, card = again.provenance, (tmp_path / "t" / "README.md").read_text()
    assert {c.claim for c in again.certificates} == {other_certificate(n).claim for n in range(6)}
    assert again.audit["report"] == "## Why" and facts.generation.max_new_tokens == 9
    assert (facts.license, facts.base_model) == ("mit", "org/tiny") and card.count("<details>") == 6
    assert "It is an artefact." in card and card == again.card(["audit.png"]) and not list(tmp_path.rglob(".*"))


def test_a_note_is_not_written_into_another_ticket(tmp_path):
    old = ticket_for(tiny_model("llama"))
    old.save(tmp_path / "t")
    shutil.rmtree(tmp_path / "t")
    ticket_for(tiny_model("llama"), (4, 5)).save(tmp_path / "t")
    before = contents(tmp_path / "t")
    with pytest.raises(ValueError, match="holds another ticket than this one: load it again"):
        old.add_certificates([PROVEN])
    assert contents(tmp_path / "t") == before and old.certificates == []


def test_what_a_ticket_says_in_memory_goes_before_what_its_folder_says(tmp_path):
    ticket_for(tiny_model("llama")).save(tmp_path / "t")
    one, two = (Ticket.load(tmp_path / "t") for _ in range(2))
    two.refresh(license="mit")
    one.provenance = replace(one.provenance, revision="main")
    one.add_certificates([PROVEN])
    facts = Ticket.load(tmp_path / "t").provenance
    assert (facts.license, facts.revision) == ("mit", "main") and one.provenance == facts


def test_to_save_a_ticket_again_loses_nothing(tmp_path):
    "Neither what was found about it, nor what others laid beside it."
    ticket_for(tiny_model("llama")).save(tmp_path / "t", {"rank.png": b"png"})
    found = Ticket.load(tmp_path / "t")
    found.add_certificates([PROVEN])
    found.add_audit({"sentence": "so", "report": "it is"}, b"png")
    found.refresh(license="mit")
    (tmp_path / "t" / ".git").mkdir()
    for name in ("thesis.tex", ".git/HEAD", "plan-1.json"):
        (tmp_path / "t" / name).write_text("years")
    before, again = contents(tmp_path / "t"), ticket_for(tiny_model("llama"))
    again.save(tmp_path / "t")
    assert contents(tmp_path / "t") == before
    assert again.certificates == [PROVEN] and again.audit == found.audit and again.provenance == found.provenance


@pytest.mark.parametrize("file", ["audit.json", "certificates.json", "embed_rows.safetensors", "thesis.tex"])
def test_another_ticket_is_replaced_only_if_nothing_is_lost(file, tmp_path):
    model = tiny_model("llama")
    bare(model, [9, 4], TunedRows([9, 4], torch.ones(2, 16))).save(tmp_path / "t")
    bare(model, [3], TunedRows([3], torch.ones(1, 16))).save(tmp_path / "t")
    found = Ticket.load(tmp_path / "t")
    assert found.ids.tolist() == [3]
    if file == "audit.json":
        found.add_audit({"sentence": "so", "report": "it is"})
    elif file == "certificates.json":
        found.add_certificates([PROVEN])
    else:
        (tmp_path / "t" / file).write_text("years")
    before, other = contents(tmp_path), bare(model, [9, 4], TunedRows([9, 4], torch.ones(2, 16)))
    with pytest.raises(FileExistsError, match=f"holds another ticket, and this one has nothing in place of its {file}"):
        other.save(tmp_path / "t")
    assert contents(tmp_path) == before and other.folder is None


@pytest.mark.parametrize("writes", range(1, 5))
def test_a_change_that_is_killed_is_whole_or_never_was(tmp_path, writes):
    "`kill -9` after each of the renames: what is read afterwards is the state before, or the state after."
    ticket_for(tiny_model("llama")).save(tmp_path / "t")
    left, real = [writes], os.replace

    def step(*names):
        left[0] -= 1
        return real(*names) if left[0] else os.kill(os.getpid(), signal.SIGKILL)

    if (child := os.fork()) == 0:
        try:
            found = Ticket.load(tmp_path / "t")
            os.replace = step
            found.certificates = [PROVEN]
            found.add_audit({"sentence": "so", "report": "it is"}, b"png")
        finally:
            os._exit(1)
    os.waitpid(child, 0)
    found = Ticket.load(tmp_path / "t")
    figures = [p.name for p in (tmp_path / "t").glob("*.png")]
    assert (tmp_path / "t" / "README.md").read_text() == found.card(figures)
    assert bool(found.audit) == bool(found.certificates) == bool(figures) and not list(tmp_path.rglob(".*"))


def test_an_audit_that_the_card_cannot_hold_changes_nothing(tmp_path):
    ticket_for(tiny_model("llama")).save(tmp_path / "t")
    before = {p.name: p.read_bytes() for p in (tmp_path / "t").iterdir()}
    for audit in ({"sentence": "no report"}, {"sentence": "x", "report": "y", "decomposition": []}):
        with pytest.raises(ValueError, match="audit again"):
            Ticket.load(tmp_path / "t").add_audit(audit, b"png")
    assert {p.name: p.read_bytes() for p in (tmp_path / "t").iterdir()} == before


def test_advice_says_how_far_and_what_to_change():
    model = tiny_model("llama")
    assert ticket_for(model).advice is None
    still = TunedRows.of(model, [3, 4])
    scan = ks_scan(model.get_input_embeddings().weight, still.matrix(model))
    selection, recipe = Selection(alpha=0.01, correction="bonferroni"), Recipe(lr_embed=1e-7)
    facts = Provenance.of(model, TOKENIZER, [], selection=selection, recipe=recipe)
    advice = Ticket([], facts, still.restrict([]), still, scan).advice
    for word in ("0.01 with bonferroni", "D = 0.000", "is needed", "lr_embed, now 1e-07", "epochs_embed", "top_k"):
        assert word in advice
    assert "to some" not in advice  # nothing moved, so nothing is known
    moved = TunedRows([3], still.restrict([3]).weight + 1e-3)
    scan = ks_scan(model.get_input_embeddings().weight, moved.matrix(model))
    limit, found = critical_value(0.05, 16), scan.statistic[3]
    assert 0 < found < limit  # D grows about with the root of the rate
    facts = Provenance.of(model, TOKENIZER, [], selection=Selection(alpha=0.05), recipe=recipe)
    assert f"to some {1e-7 * (limit / found) ** 2:.1g}" in Ticket([], facts, still.restrict([]), still, scan).advice
    assert "no scan" in bare(model, []).advice


def test_a_ticket_shows_tokens_and_numbers():
    ticket = ticket_for(tiny_model("llama"))
    ticket.provenance = replace(ticket.provenance, tokens=("t9", "<b>&"), counts=(12, 345))
    text, html = repr(ticket), ticket._repr_html_()
    for word in ("2 of 64 rows", "tiny", "token", "D", "p", "count", "t9", "345", f"{ticket.scan.statistic[9]:.3f}"):
        assert word in text and word in html
    assert "<b>&" in text and "<b>&" not in html and "&lt;b&gt;&amp;" in html and "array" not in text
    assert [*ticket.to_frame()] == ["token", "id", "statistic", "pvalue", "count"]
    many = bare(tiny_model("llama"), range(30))
    assert "and 10 more" in repr(many) and len(repr(many).split("\n")) < 26
    assert "no scan" in repr(bare(tiny_model("llama"), []))


# The card


def test_the_card_is_python_that_runs(tmp_path, monkeypatch):
    "Its block is typed in as it stands, in the ticket's folder; the model lies beside it."
    model = tiny_model("llama")
    ticket_for(model, name=str(tmp_path / "tiny")).save(tmp_path / "t")
    model.save_pretrained(tmp_path / "t" / "tiny")
    TOKENIZER.save_pretrained(tmp_path / "t" / "tiny")
    block = re.search(r"```python\n(.*?)```", (tmp_path / "t" / "README.md").read_text(), re.S)[1]
    assert "from kslottery import" in block
    monkeypatch.chdir(tmp_path / "t")
    exec(block, {})


NASTY = "`</td><script>alert(1)</script>|\n```\n# Certified!\n<img src=x onerror=y>"


def test_nobody_writes_html_into_the_card():
    ticket = ticket_for(tiny_model("llama"))
    facts = replace(ticket.provenance, tokens=(NASTY, "t4"), license=NASTY, versions={"kslottery": "1", NASTY: NASTY})
    facts = replace(facts, model=NASTY, base_model=None, tuned=NASTY, tensor=NASTY, revision=NASTY)
    prompt = Prompt(NASTY + "{source}{target}", "en-ca")
    ticket.provenance = replace(facts, prompt=prompt)
    ticket.audit = {"sentence": NASTY, "report": "\n".join(["## Numbers", "5 < 6", "<script>alert(1)</script>"])}
    proven = certify_agreement(np.zeros(60), 0.05, epsilon=0.2, vouched=True)
    ticket.certificates = [replace(proven, claim=NASTY, assumptions=(NASTY,), unit=NASTY)]
    text = ticket.card(["a](x)<script>.png"])
    body = text.split("---\n", 2)[2]
    outside, fence = [], None
    for line in body.split("\n"):
        mark = re.match("`{3,}", line)
        if mark and (fence is None or line == fence):
            fence = None if fence else mark[0]
        elif fence is None:
            outside.append(line)
    assert fence is None
    plain = re.sub(r"(?<!`)(`+)(?!`)(.*?)(?<!`)\1(?!`)", "", "\n".join(outside))  # what is not in a code span
    for own in ("<details>", "</details>", "<summary>", "</summary>"):  # a certificate folds its sentence
        plain = plain.replace(own, "", 1)
    assert not re.findall(r"<[a-zA-Z/!]", plain.replace("&lt;", "")) and "5 < 6" in plain
    assert "# Certified!" not in outside


@pytest.mark.parametrize(
    "text", [NASTY, "## Certified!", "![x](https://example.org/x.png)", "[x](//y)", "``` x\n\n## C"]
)
def test_the_card_is_one_page_whatever_an_audit_says(text):
    "As a browser sees it: the headings of the card, no image and no link but its own, and every certificate folded."
    ticket = ticket_for(tiny_model("llama"))
    ticket.audit = {"sentence": text, "report": f"{text}\n[x]: //y\n\n[x] ![x] ![x][x]\n\n~~~\n{text}"}
    ticket.certificates = [replace(PROVEN, claim=text, unit=text)]
    ticket.provenance = replace(ticket.provenance, versions={"kslottery": text, text: text})
    page = MarkdownIt("commonmark", {"html": True}).enable("table").render(ticket.card().split("---\n", 2)[2])
    quote = page.split("<blockquote>")
    own = "".join(part.split("</blockquote>")[-1] for part in quote)
    assert re.findall("<h2>(.*?)</h2>", own) == [
        "How it was made",
        "Scores, controls and verdict",
        "Certificates",
        "Licence and citation",
    ]
    assert "<img" not in page and re.findall('href="(.*?)"', page) == ["https://arxiv.org/abs/2402.02801"]
    assert len(quote) == 3 and "<h2>" not in quote[1].split("</blockquote>")[0] and page.count("<details>") == 1


SAVER = """
import sys; sys.path.insert(0, {tests!r})
from test_ticket import ticket_for, tiny_model
ticket = ticket_for(tiny_model("llama"), (3, 4, 5))
{before}
print("ready", flush=True)
while True:
    ticket.save({place!r})
    {after}
"""


def start(tmp_path, before="", after=""):
    code = SAVER.format(tests=str(ROOT / "tests"), place=str(tmp_path / "t"), before=before, after=after)
    process = subprocess.Popen([*forks.PYTHON, code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    return process


def test_kill_9_at_any_moment_leaves_a_whole_ticket(tmp_path):
    "A process that saves over and over is killed; what is there can be read."
    for moment in (0.05, 0.11, 0.23):
        process = start(tmp_path, before=f"ticket.save({str(tmp_path / 't')!r})")
        try:
            process.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert Ticket.load(tmp_path / "t").ids.tolist() == [3, 4, 5] and os.listdir(tmp_path) == ["t"]


def test_a_full_disk_leaves_the_old_ticket(tmp_path):
    "Files may grow to 100 bytes only: the write fails as on a full disk, in one error, and the old ticket stands."
    ticket_for(tiny_model("llama")).save(tmp_path / "t")
    process = start(
        tmp_path,
        before="import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        f"resource.setrlimit({resource.RLIMIT_FSIZE}, (100, 100))",
    )
    assert process.wait(timeout=60) != 0
    assert Ticket.load(tmp_path / "t").ids.tolist() == [9, 4]
    assert os.listdir(tmp_path) == ["t"]


# Rows of the output, new tokens


@pytest.mark.parametrize("mode", ["head", "both"])
def test_a_ticket_of_the_output(mode, tmp_path):
    "It names the output's module, and its card its rows; a file of the schema without the new facts loads, too."
    model = talker("llama")
    ticket_for(model, mode=mode).save(tmp_path / "t")
    again = Ticket.load(tmp_path / "t")
    facts = again.provenance
    assert (facts.embedding_module, facts.output_module) == ("model.embed_tokens", "lm_head") and not facts.added_tokens
    assert f"| mode | `{mode}` |" in again.card() and "output embedding (64 rows of 16)" in again.card()
    with again.rows.applied(model):
        text = model.generate(X, **GREEDY)
    assert torch.equal(text, merged(again.rows, model).generate(X, **GREEDY))
    assert not torch.equal(text, model.generate(X, **GREEDY))
    path = tmp_path / "t" / "ticket.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in record.items() if k not in ("added_tokens", "end_token")}))
    assert Ticket.load(tmp_path / "t").provenance == replace(facts, end_token=None)
    bare(model, [9, 4], again.rows, recipe=Recipe(mode=mode))
    with pytest.raises(ValueError, match="does not name: make it with a recipe of that mode"):
        bare(model, [9, 4], again.rows)


def words_only(n=62):
    "A tokenizer of n words: a tiny model has 64 rows."
    known = Tokenizer(models.WordLevel({f"t{i}": i for i in range(n)}, unk_token="t0"))
    known.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=known, eos_token="t2")


@pytest.mark.parametrize("n", [62, 64])
@pytest.mark.parametrize("kind, dtype", [("llama", "float32"), ("mistral", "bfloat16"), ("gpt2", "bfloat16")])
def test_a_ticket_brings_its_tokens_along(kind, dtype, n, tmp_path):
    """A new end token, in a spare row or a resized matrix: tuned, saved, its base found again, merged, loaded plainly.

    The plain model is refused in a sentence, and so is a ticket whose new end nobody could ever say.
    """
    plain, mode = talker(kind).to(getattr(torch, dtype)), "shared" if kind == "gpt2" else "both"
    plain.save_pretrained(tmp_path / "base")
    words_only(n).save_pretrained(tmp_path / "base")
    model, tokenizer = load_model(tmp_path / "base", device="cpu")
    end, other = add_tokens(model, tokenizer, ["<|im_end|>", "<|im_start|>"])
    model, tokenizer.eos_token = copy.deepcopy(model), "<|im_end|>"
    pairs, prompt = (
        [Pair(f"x:{i}", f"t{5 + i} t9", "t4 t7") for i in range(4)],
        Prompt("<|im_start|> {source} {target}"),
    )
    examples = encode_all(tokenizer, prompt, pairs)
    assert all(e.ids[-1] == end and other in e.ids for e in examples)
    recipe = Recipe(lr_partial=0.5, epochs_partial=9, mode=mode, progress=False)
    rows = partial_tune(model, [end, other], examples, recipe)
    ticket = Ticket([end, other], Provenance.of(model, tokenizer, [end, other], recipe=recipe, prompt=prompt), rows)
    ticket.save(tmp_path / "t")
    again = Ticket.load(tmp_path / "t")
    facts = again.provenance
    assert facts.added_tokens == facts.tokens == ("<|im_end|>", "<|im_start|>") and facts.end_token == "<|im_end|>"
    assert facts.V == max(64, n + 2) and "new tokens" in again.peft_obstacle and "add_tokens(model" in again.card()
    with pytest.raises(ValueError, match="brings new tokens along.*<|im_end|>.*Ticket.base"):
        again.check(plain, words_only(n))

    base, own = again.base()
    again.check(base, own)
    assert own.eos_token_id == end and end in base.generation_config.eos_token_id
    own.eos_token = "t2"
    with pytest.raises(ValueError, match="ends texts with '<|im_end|>', and the tokenizer with 't2': .*Ticket.base"):
        again.base(base, own)
    own.eos_token = "<|im_end|>"
    assert all(torch.equal(a, b) for a, b in zip(base.state_dict().values(), model.state_dict().values()))
    status, said, error = invoke("merge", tmp_path / "t", "--out", tmp_path / "m")
    assert status == 0 and "<|im_start|>" in said, error
    whole, reader = load_model(tmp_path / "m", device="cpu")
    assert reader.eos_token_id == end and reader("t5 <|im_end|>")["input_ids"] == [5, end]
    assert end in whole.generation_config.eos_token_id and whole.config.vocab_size == facts.V
    assert end in whole.config.eos_token_id
    asked, how = ["<|im_start|> t5 t9"], dict(max_new_tokens=9, do_sample=False, pad_token_id=0)
    with again.rows.applied(base), torch.no_grad():
        prompts = own(asked, return_tensors="pt")
        read, text = base(**prompts).logits, base.generate(**prompts, **how)
    torch.testing.assert_close(whole(**reader(asked, return_tensors="pt")).logits, read)
    assert torch.equal(whole.generate(**prompts, **how), text)
    assert {p.name for p in (tmp_path / "m").iterdir()} == {p.name for p in (tmp_path / "base").iterdir()}

    with pytest.raises(ValueError, match="rows of the input alone never make a model say it"):
        facts = Provenance.of(model, tokenizer, [end])
        Ticket([end], facts, TunedRows.of(model, [end]))
    with pytest.raises(ValueError, match="never make a model say it"):
        find_ticket(model, tokenizer, pairs, prompt)
