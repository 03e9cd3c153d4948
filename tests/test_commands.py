"""The commands: what they answer, one sentence and the right status for bad input, nothing half-written.

`merge` and `peft`: the same greedy text in every form.
"""

import json
import os
import pty
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
import torch
import typer
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, T5Config, T5ForConditionalGeneration

import forks
from conftest import ROOT, TIED, invoke, talker
from kslottery import __version__, audit, cli, ticket
from kslottery.babel import World
from kslottery.certificate import certify_agreement
from kslottery.checkpoints import scan_checkpoints
from kslottery.cli import app
from kslottery.core import load_model
from kslottery.data import Prompt, load_pairs
from kslottery.evaluation import Generation
from kslottery.rows import TunedRows, is_tied
from kslottery.ticket import Provenance, Ticket
from test_ticket import GREEDY, TOKENIZER, X


def base_in(folder, kind, dtype=torch.float32):
    "A checkpoint folder: model, tokenizer without a padding token, generation settings of its own."
    model = talker(kind).to(dtype)
    model.generation_config = GenerationConfig(max_new_tokens=7, eos_token_id=63, pad_token_id=0)
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(
        folder
    ).eval()  # Module.to rounds the rotary table too, loading does not


def ticket_in(folder, base, mode="input_only", ids=(9, 4)):
    model, tokenizer = load_model(base)
    rows = TunedRows(ids, torch.randn(len(ids), 16, generator=torch.Generator().manual_seed(0)), mode)
    ticket = Ticket(ids, Provenance.of(model, tokenizer, ids), rows)
    ticket.save(folder)
    return ticket


@pytest.mark.parametrize(
    "kind, mode, dtype",
    [
        *((k, "input_only", torch.float32) for k in ("llama", "qwen2", "mistral", *TIED)),
        *((k, "shared", torch.float32) for k in TIED),
        ("llama", "input_only", torch.bfloat16),
    ],
)
def test_a_merged_checkpoint_is_plain_and_gives_the_same_text(kind, mode, dtype, tmp_path):
    model = base_in(tmp_path / "base", kind, dtype)
    ticket = ticket_in(tmp_path / "t", tmp_path / "base", mode)
    status, said, _ = invoke("merge", tmp_path / "t", "--out", tmp_path / "m")
    assert status == 0
    untied = "were tied and are two matrices now, 0.0 MB more" in said  # 64 x 16 numbers
    assert untied == (kind in TIED and mode == "input_only")
    assert {p.name for p in (tmp_path / "m").iterdir()} >= {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "generation_config.json",
    }
    assert not [p.name for p in (tmp_path / "m").iterdir() if p.suffix in (".bin", ".pkl", ".pt")]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    assert (
        merged.dtype == dtype and is_tied(merged) == (mode == "shared") and merged.generation_config.max_new_tokens == 7
    )
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "m").pad_token
        == AutoTokenizer.from_pretrained(tmp_path / "base").pad_token
    )
    with ticket.rows.applied(model):
        assert torch.equal(merged.generate(X, **GREEDY), model.generate(X, **GREEDY))
    assert not torch.equal(merged.generate(X, **GREEDY), model.generate(X, **GREEDY))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_ticket_to_adapter_to_ticket(kind, tmp_path):
    model = base_in(tmp_path / "base", kind)
    mode = "shared" if kind in TIED else "input_only"
    ticket = ticket_in(tmp_path / "t", tmp_path / "base", mode)
    assert (
        invoke("peft", tmp_path / "t", "--out", tmp_path / "a")[0] == 0
        and invoke("peft", tmp_path / "a", "--out", tmp_path / "again")[0] == 0
    )
    again = Ticket.load(tmp_path / "again")
    assert (
        torch.equal(again.rows.weight, ticket.rows.weight)
        and again.mode == mode
        and again.provenance.model == str(tmp_path / "base")
    )
    with ticket.rows.applied(model):
        text = model.generate(X, **GREEDY)
    assert torch.equal(PeftModel.from_pretrained(model, tmp_path / "a").eval().generate(input_ids=X, **GREEDY), text)
    assert invoke("merge", tmp_path / "again", "--out", tmp_path / "m")[0] == 0
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval().generate(X, **GREEDY), text)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_lora_by_its_command(kind, tmp_path):
    "On a tied model it is the way out that the refusal names; an adapter is read, not written."
    model = base_in(tmp_path / "base", kind)
    ticket = ticket_in(tmp_path / "t", tmp_path / "base")
    status, _, error = invoke("peft", tmp_path / "t", "--out", tmp_path / "a")
    assert (status == 2 and "--as lora" in error) if kind in TIED else status == 0
    status, said, error = invoke("peft", tmp_path / "t", "--as", "lora", "--out", tmp_path / "lora", "--json")
    assert status == 0 and json.loads(said)["form"] == "lora", error
    with ticket.rows.applied(model):
        text = model.generate(X, **GREEDY)
    adapted = PeftModel.from_pretrained(model, tmp_path / "lora").eval()
    assert torch.equal(adapted.generate(input_ids=X, **GREEDY), text)
    for folder, form, words in (("lora", "lora", "--as says how a ticket is written"), ("t", "ia3", "form is 'ia3'")):
        status, _, error = invoke("peft", tmp_path / folder, "--as", form, "--out", tmp_path / "other")
        assert status == 2 and words in error and not (tmp_path / "other").exists()


def test_bad_input_gets_one_sentence_and_writes_nothing(tmp_path, monkeypatch):
    base_in(tmp_path / "base", "llama")
    base_in(tmp_path / "gpt2", "gpt2")
    ticket_in(tmp_path / "t", tmp_path / "base")
    ticket_in(tmp_path / "tied", tmp_path / "gpt2")
    ticket_in(tmp_path / "none", tmp_path / "base", ids=())
    model, tokenizer = load_model(tmp_path / "base")
    Ticket([4], Provenance.of(model, tokenizer, [4])).save(tmp_path / "bare")
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    t5.save_pretrained(tmp_path / "t5")
    TOKENIZER.save_pretrained(tmp_path / "t5")
    torch.save({}, tmp_path / "gpt2" / "pytorch_model.bin")
    (tmp_path / "gpt2" / "model.safetensors").rename(tmp_path / "moved")  # what older checkpoints are like
    with pytest.raises(FileNotFoundError, match="no safetensors file.*convert it"):
        load_model(tmp_path / "gpt2")
    (tmp_path / "moved").rename(tmp_path / "gpt2" / "model.safetensors")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    (tmp_path / "nameless").mkdir()
    (tmp_path / "nameless" / "adapter_config.json").write_text("{}")
    cases = {
        ("merge", "missing"): "not a ticket folder",
        ("merge", "bare"): "no tuned rows",
        ("merge", "none"): "would be the base model",
        ("merge", "t", "--model", "gpt2"): "another embedding",
        ("merge", "t", "--model", "t5"): "choose a decoder-only",
        ("merge", "t", "--model", "nowhere/at/all"): "neither a checkpoint folder",
        ("peft", "none"): "empty",
        ("peft", "tied"): "ties input and output",
        ("peft", "base"): "does not say which model was tuned",
        ("peft", "nameless"): "--model",
        ("peft", "nameless", "--model", "base"): "adapter_model.safetensors",
    }
    for (command, source, *more), words in cases.items():
        more = [w if w.startswith("-") or "/" in w else tmp_path / w for w in more]
        status, said, error = invoke(command, tmp_path / source, *more, "--out", tmp_path / "out")
        assert status == 2 and words in error and error.count("\n") == 1 and error.startswith("kslottery: "), (
            command,
            source,
            error,
        )
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    for command in ("certify", "audit"):  # a ticket of a bare scan
        more = (
            ("--calibration", "c.tsv", "--epsilon", 0.1)
            if command == "certify"
            else ("--train", "none", "--test", "c.tsv")
        )
        status, _, error = invoke(command, tmp_path / "bare", *more)
        assert status == 2 and "name them with --languages" in error, error
    monkeypatch.setattr("kslottery.checkpoints.scan_checkpoints", lambda *a, **more: pytest.fail("it scanned"))
    status, _, error = invoke("scan", tmp_path / "base", tmp_path / "base", "--out", tmp_path / "mine")
    assert status == 2 and "something else" in error
    for command in ("merge", "peft"):
        status, _, error = invoke(command, tmp_path / "t", "--out", tmp_path / "mine")
        assert status == 2 and "something else" in error and os.listdir(tmp_path / "mine") == ["thesis.tex"]


@pytest.fixture
def recorded(tmp_path):
    "A ticket folder that records prompt, data and generation, and the file of its sentences."
    base_in(tmp_path / "base", "llama")
    data = tmp_path / "pairs.tsv"
    data.write_text("source\ttarget\n" + "".join(f"t{i} t5\tt7 t{i}\n" for i in range(10, 16)))
    model, tokenizer = load_model(tmp_path / "base")
    pairs = load_pairs(data, limit=4)
    facts = Provenance.of(model, tokenizer, [9, 4], prompt=Prompt("{source} t8 {target}"), pairs=pairs)
    ticket = Ticket([9, 4], facts, TunedRows.of(model, [9, 4]), sentences=[p.hash for p in pairs])
    ticket.remember(test=load_pairs(data, limit=5), generation=Generation(9, 2, 3))
    ticket.save(tmp_path / "t")
    return tmp_path / "t", data


def test_what_an_option_leaves_open_the_ticket_says(recorded, monkeypatch):
    "The library is asked with these objects; a model that stands elsewhere is not written into the folder."
    folder, data = recorded
    seen = {}

    def certify(ticket, fresh, **more):
        seen.update(more, ticket=ticket, asked=fresh)
        return []

    def audit(ticket, test, **more):
        seen.update(more, ticket=ticket, asked=test)
        raise ValueError("that is enough")

    monkeypatch.setattr("kslottery.certify_ticket", certify)
    monkeypatch.setattr("kslottery.audit_ticket", audit)
    asked = ("certify", folder, "--calibration", data, "--epsilon", 0.1)
    assert invoke(*asked, "--ladder", "tuning")[0] == 0
    settings = seen["settings"]
    assert len(settings.train) == 4 and settings.generation == Generation(9, 2, 3) and len(seen["asked"]) == 6
    assert settings.prompt.template.text == "{source} t8 {target}" and seen["epsilon"] == 0.1
    more = ("--template", "{source} t6 {target}", "--batch-size", 5, "--model", "elsewhere", "--limit", 2)
    assert invoke(*asked, *more)[0] == 0
    settings = seen["settings"]
    assert settings.prompt.template.text == "{source} t6 {target}" and settings.generation == Generation(9, 2, 5)
    assert seen["ticket"].provenance.model == "elsewhere" and len(seen["asked"]) == 2 and settings.train is None
    assert Ticket.load(folder).provenance.model == str(folder.parent / "base")
    assert invoke("audit", folder)[2] == "kslottery: that is enough\n"
    assert len(seen["asked"]) == 5 and len(seen["train"]) == 4 and seen["out"] == folder / "audit"
    assert seen["settings"].generation == Generation(9, 2, 3)
    invoke("audit", folder, "--train", "none", "--test", data, "--num-beams", 1, "--limit", 3)
    assert len(seen["asked"]) == 3 and seen["train"] is None and seen["settings"].generation == Generation(9, 1, 3)


@pytest.mark.parametrize(
    "words, sentence",
    [
        (("certify", "--epsilon", 5), "epsilon is 5"),
        (("certify", "--epsilon", 0.1, "--delta", 0), "delta is 0"),
        (("certify", "--epsilon", 0.1, "--loss", "nicety"), "nicety"),
        (("certify", "--epsilon", 0.1, "--ladder", "sideways"), "choose transfer, tuning or none"),
        (("certify", "--epsilon", 0.1, "--template", "nice"), "template 'nice' is unknown"),
        (("audit", "--samples", 0), "samples is 0"),
        (("audit", "--metric", "blue"), "blue"),
        (("audit", "--delta", -1), "delta is -1"),
        (("audit", "--languages", "english"), "write source-target"),
        (("scan", "--alpha", 2), "alpha is 2"),
        (("scan", "--top-k", -3), "top_k is -3"),
        (("scan", "--criterion", "luck"), "choose ks"),
        (("scan", "--criterion", "l2"), "say how many of the best to take, with --top-k"),
        (("scan", "--csv", "no/such/folder/s.csv"), "in a folder that exists"),
        (("scan", "--correction", "fisher"), "bonferroni"),
    ],
)
def test_a_wrong_value_is_refused_before_anything_is_loaded(words, sentence, recorded, monkeypatch):
    folder, data = recorded
    for name in ("kslottery.ticket.load_model", "kslottery.cli.load_model", "kslottery.checkpoints.open_pair"):
        monkeypatch.setattr(name, lambda *a, **more: pytest.fail("it was loaded"))
    command, *options = words
    needs = {"certify": (folder, "--calibration", data), "audit": (folder,), "scan": ("base", "tuned")}[command]
    status, said, error = invoke(command, *needs, *options)
    assert status == 2 and said == "" and sentence in error and error.count("\n") == 1, error


def test_a_full_disk_leaves_nothing(tmp_path):
    "Files may grow to 2 kB only; run as a user would."
    base_in(tmp_path / "base", "llama")
    ticket_in(tmp_path / "t", tmp_path / "base")
    code = f"""import resource, signal
from kslottery.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit({resource.RLIMIT_FSIZE}, (2000, 2000))
main()"""
    done = subprocess.run(
        [sys.executable, "-c", code, "merge", str(tmp_path / "t"), "--out", str(tmp_path / "m")],
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 2
        and done.stderr.strip().split("\n")[-1].startswith("kslottery: ")
        and "Traceback" not in done.stderr
    ), done.stderr
    assert sorted(os.listdir(tmp_path)) == ["base", "t"]


def test_a_scan_of_tied_checkpoints_is_shared(tmp_path):
    "What moved in a tied matrix moved at both ends; old GPT-2 configurations do not even say that it is tied."
    model = base_in(tmp_path / "base", "gpt2")
    with torch.no_grad():
        model.get_input_embeddings().weight[[5, 9]] *= 30
    model.save_pretrained(tmp_path / "tuned")
    for folder in ("base", "tuned"):
        config = json.loads((tmp_path / folder / "config.json").read_text())
        del config["tie_word_embeddings"]
        (tmp_path / folder / "config.json").write_text(json.dumps(config))
    status, said, error = invoke("scan", tmp_path / "base", tmp_path / "tuned", "--top-k", 2, "--out", tmp_path / "t")
    assert status == 0, error
    assert invoke("merge", tmp_path / "t", "--out", tmp_path / "m")[0] == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    assert is_tied(merged) and torch.equal(merged.generate(X, **GREEDY), model.generate(X, **GREEDY))
    assert (tmp_path / "t" / "adapter_config.json").exists()


def one_sentence(error):
    "What is wrong with how a command refused: nothing, I hope."
    line = error.removesuffix("\n")
    return [] if line.startswith("kslottery: ") and line.isprintable() and len(line) < 1000 else [line]


@pytest.mark.parametrize("more", ["certificates.json", "audit.json", "embed_rows.safetensors", "thesis.tex", ".hidden"])
def test_a_scan_replaces_no_more_than_a_scan(more, tmp_path, monkeypatch):
    "What a scan could make again: so a rerun works. What comes while it scans stays, too."
    for name in ("base", "tuned"):
        base_in(tmp_path / name, "llama")
    monkeypatch.setattr("kslottery.checkpoints.png", lambda *a, **k: b"png")
    asked = ("scan", tmp_path / "base", tmp_path / "tuned", "--top-k", 2, "--out", tmp_path / "t")
    assert [invoke(*asked)[0] for _ in range(2)] == [0, 0]
    real, file = scan_checkpoints, tmp_path / "t" / more

    def meanwhile(*given, **options):
        file.write_text("years")
        return real(*given, **options)

    monkeypatch.setattr("kslottery.checkpoints.scan_checkpoints", meanwhile)
    for scanned in (True, False):
        status, said, error = invoke(*asked)
        assert status == 2 and f"({more}): name another folder with --out" in error.splitlines()[-1]
        assert bool(said) == scanned and file.read_text() == "years"
        monkeypatch.setattr("kslottery.checkpoints.scan_checkpoints", lambda *a, **k: pytest.fail("it scanned"))
    file.unlink()
    about = json.loads((tmp_path / "t" / "ticket.json").read_text()) | {"tensor": None}
    (tmp_path / "t" / "ticket.json").write_text(json.dumps(about))
    assert "(tuned rows)" in invoke(*asked)[2]


def test_what_was_found_is_printed_even_if_it_cannot_be_kept(recorded, tmp_path, monkeypatch):
    folder, data = recorded
    base_in(tmp_path / "tuned", "llama")

    def full(*given, **more):
        raise OSError("t needs more room")

    for name in ("add_certificates", "add_audit", "save"):
        monkeypatch.setattr(Ticket, name, full)
    monkeypatch.setattr("kslottery.checkpoints.png", lambda *a, **k: b"png")
    proven = certify_agreement(np.zeros(70), 0.05, epsilon=0.2, vouched=True)
    monkeypatch.setattr("kslottery.certify_ticket", lambda *a, **k: [proven])
    found = SimpleNamespace(as_dict=lambda: {"verdict": "habit"}, checks=[], lines=[], sentence="It is a habit.")
    monkeypatch.setattr("kslottery.audit_ticket", lambda *a, **k: found)
    (folder / "audit" / "arms").mkdir(parents=True)
    (folder / "audit" / "audit.png").touch()
    commands = {
        ("certify", folder, "--calibration", data, "--epsilon", 0.2): (str(proven), "Kept"),
        ("audit", folder): ("It is a habit.", "card"),
        ("scan", tmp_path / "base", tmp_path / "tuned", "--top-k", 2, "--out", tmp_path / "n"): ("2 of 64", "figures"),
    }
    for words, (part, kept) in commands.items():
        status, said, error = invoke(*words)
        assert status == 2 and error.endswith("kslottery: t needs more room\n") and "Traceback" not in error
        assert part in said and kept not in said
        status, said, _ = invoke(*words, "--json")
        assert status == 2 and json.loads(said)
    monkeypatch.setattr(audit, "png", full)  # the folder of the audit itself
    audited = SimpleNamespace(table=str, as_dict=dict)
    with pytest.raises(OSError) as raised:
        audit._write(audited, folder / "audit")
    assert raised.value.__notes__ == [str(audited)] and os.listdir(folder / "audit") == ["arms", "audit.png"]

    def audited_on_a_full_disk(*given, **more):
        raise raised.value

    monkeypatch.setattr("kslottery.audit_ticket", audited_on_a_full_disk)
    assert invoke("audit", folder)[2] == f"{audited}\nkslottery: t needs more room\n"


@pytest.mark.parametrize(
    "words, sentence",
    [
        (("certify", "--groups", "odd.bin"), "odd.bin holds a NUL"),
        (("certify", "--groups", "."), ". is a folder: name a file"),
        (("certify", "--plan", "--pilot", "odd.bin"), "odd.bin is no pilot"),
        (("certify", "--plan", "--pilot", "x" * 300), "File name too long"),
        (("audit", "--groups", "/dev/zero"), "a pipe or a device"),
        (("audit", "--test", "a\x07b"), "a\\x07b"),
        (("audit", "--out", "~nosuchuser/x"), "user's home"),
        (("audit", "--out", "mine"), "holds something else"),
        (("audit", "--out", "other"), "other exists and holds something else"),
        (("scan", "--counts", "."), ". is a folder"),
        (("scan", "--counts", "odd.bin"), "write a list with a number for each token"),
        (("scan", "--counts", "deep.json"), "deep.json is damaged"),
        (("scan", "--out", "."), "name a folder in it"),
        (("scan", "--out", "~nosuchuser/x"), "user's home"),
        (("scan", "--csv", "\x1b[31m" + "y" * 2000), "in a folder that exists"),
        (("merge", "--out", "odd.bin/x"), "odd.bin"),
        (("merge", "--out", "x" * 300), "too long"),
        (("peft", "--out", "mine"), "something else"),
        (("card", "--base-model", "a\nb"), "a\\nb"),
        (("babel", "--out", "mine"), "something else"),
        (("run", "--parameters-file", "a\x1bb"), "a\\x1bb"),
        (("run", "x" * 300), "there is no notebook"),
        (("run", "~nosuchuser/x"), "there is no notebook"),
    ],
)
def test_odd_paths_get_one_sentence_before_anything_is_loaded(words, sentence, recorded, monkeypatch):
    "And nothing is made, changed or removed."
    folder, data = recorded
    monkeypatch.chdir(folder.parent)
    Path("odd.bin").write_bytes(b"\xff\xfe\x00")
    Path("deep.json").write_text("[" * 100_000)
    for name, file in (("mine", "thesis.tex"), ("other", "audit.md")):
        Path(name).mkdir()
        (Path(name) / file).write_text("years")
    here = lambda: {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()} | {"": os.listdir()}
    before = here()
    for name in ("kslottery.ticket.load_model", "kslottery.cli.load_model", "kslottery.checkpoints.open_pair"):
        monkeypatch.setattr(name, lambda *a, **more: pytest.fail("it was loaded"))
    monkeypatch.setattr("kslottery.build_world", lambda *a, **more: pytest.fail("it was built"))
    needs = {
        "certify": ("t", "--calibration", data, "--epsilon", 0.1),
        "scan": ("base", "tuned"),
        **dict.fromkeys(("audit", "merge", "card"), ("t",)),
        "peft": ("base", "--model", "base"),
    }
    command, *options = words
    status, said, error = invoke(command, *needs.get(command, ()), *options)
    assert status == 2 and said == "" and sentence in error and not one_sentence(error), error
    assert here() == before


@pytest.mark.parametrize("command", ["merge", "peft"])
def test_what_another_makes_meanwhile_stays(command, recorded, monkeypatch):
    "Two at once: the first that is done has it, the other is refused."
    folder, _ = recorded
    out, real = folder.parent / "m", load_model

    def slow(*given, **more):
        out.mkdir()
        (out / "config.json").write_text("theirs")
        return real(*given, **more)

    assert invoke("peft", folder, "--out", folder.parent / "a")[0] == 0
    monkeypatch.setattr(ticket if command == "merge" else cli, "load_model", slow)
    status, said, error = invoke(command, folder if command == "merge" else folder.parent / "a", "--out", out)
    assert status == 2 and said == "" and "something else" in error and not one_sentence(error), error
    assert os.listdir(out) == ["config.json"] and sorted(os.listdir(folder.parent)) == sorted(
        ["a", "base", "m", "pairs.tsv", "t"]
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_unwinds_a_command(number, recorded):
    "Twice, as when a terminal closes: one sentence, a status that names the signal, and nothing left."
    folder, _ = recorded
    room = folder.parent
    code = """import signal, sys, time
from pathlib import Path
from kslottery import cli, ticket
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a shell without job control makes its children deaf
    signal.signal(number, signal.SIG_DFL)
def load(*given, **more):
    try:
        Path("begun").touch()
        time.sleep(60)
    finally:
        Path("begun").unlink()
        time.sleep(0.3)
        Path("ended").touch()
ticket.load_model, sys.argv = load, ["kslottery", "merge", "t", "--out", "m"]
cli.main()"""
    before = set(os.listdir(room))
    process = subprocess.Popen([*forks.PYTHON, code], cwd=room, stderr=subprocess.PIPE, text=True)
    for _ in range(1200):
        if (room / "begun").exists():
            break
        time.sleep(0.05)
    process.send_signal(number)
    if number != signal.SIGINT:
        time.sleep(0.1)
        process.send_signal(number)
    error = process.communicate(timeout=30)[1]
    assert (process.returncode, error) == (
        128 + number,
        "kslottery: interrupted; nothing is half-written: give the same command again\n",
    )
    assert {*os.listdir(room)} - before == {"ended"}


def test_signals_before_the_work_and_under_nohup(monkeypatch, capsys):
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    found = {number: signal.getsignal(number) for number in numbers}

    def stopped():
        raise KeyboardInterrupt

    try:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN if number == signal.SIGHUP else signal.SIG_DFL)
        monkeypatch.setattr(cli, "app", stopped)
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 130 and capsys.readouterr().err.startswith("kslottery: interrupted; ")
        assert [signal.getsignal(number) for number in numbers] == [cli._stop, cli._stop, signal.SIG_IGN]
    finally:
        for number, handler in found.items():
            signal.signal(number, handler)


def test_an_answer_that_cannot_be_written(recorded):
    "One sentence, and no status 0; but who stops reading hears nothing."
    folder, _ = recorded
    with open("/dev/full", "w") as full:
        for command in ([sys.executable, "-c", MAIN, "--version"], ["kslottery", "card", str(folder)]):
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
            assert done.returncode == 2 and "standard output" in done.stderr and not one_sentence(done.stderr)
    pipe = f"kslottery card {folder} | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", pipe], capture_output=True, text=True)
    assert done.stdout.strip() in ("0", "1") and done.stderr == ""


def test_a_copy_of_the_world_replaces_nothing_but_one(tmp_path, monkeypatch):
    world = tmp_path / "world"
    world.mkdir()
    (world / "babel.json").write_text('{"parameters": 1}')
    for name in ("train", "dev", "test", "calibration"):
        (world / f"{name}.jsonl").write_text('{"source": "a", "target": "b"}\n')
    monkeypatch.setattr("kslottery.build_world", lambda *a: World(world))
    asked = ("babel", "--out", tmp_path / "copy")
    assert [invoke(*asked)[0] for _ in range(2)] == [0, 0]
    (tmp_path / "copy" / "thesis.tex").write_text("years")
    assert invoke(*asked)[0] == 2 and (tmp_path / "copy" / "thesis.tex").exists()


COMMANDS = typer.main.get_command(app).commands
MAIN = "from kslottery.cli import main; main()"


def notebook(folder, *sources, kernel=None):
    "A notebook of code cells, the first of them the parameters."
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(
        nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel} if kernel else {}), folder / "own.ipynb"
    )
    return folder / "own.ipynb"


def test_no_command_prints_the_help():
    status, said, error = invoke()
    assert status == 2 and all(name in said + error for name in COMMANDS) and "130 interrupted" in said + error
    status, said, error = invoke("--help")
    assert status == 0 and error == "" and all(name in said for name in COMMANDS)
    assert invoke("--version")[:2] == (0, f"kslottery {__version__}\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_has_an_example(name):
    status, said, _ = invoke(name, "--help")
    assert status == 0 and f"Example: kslottery {name}" in said and "--json" in said


def test_an_option_means_the_same_everywhere():
    "Also the same default; what a command says about its own --out, --train, --test or --delta is its own."
    seen = {}
    for name, command in COMMANDS.items():
        for option in command.params:
            seen.setdefault(option.name, {}).setdefault(
                (tuple(option.opts), str(getattr(option, "type", "")), option.help, repr(option.default)), []
            ).append(name)
    shared = {
        "ticket",
        "model",
        "revision",
        "languages",
        "template",
        "limit",
        "tokenizer",
        "groups",
        "max_new_tokens",
        "batch_size",
        "seed",
        "as_json",
    }
    assert {name for name, meanings in seen.items() if sum(map(len, meanings.values())) > 1} - shared == {
        "out",
        "train",
        "delta",
    }
    assert [(name, meanings) for name, meanings in seen.items() if name in shared and len(meanings) > 1] == []


@pytest.mark.parametrize(
    "words, sentence",
    [
        (("--bogus",), "No such option"),
        (("scna", "a", "b"), "scan"),  # did you mean
        (("scan", "a", "b", "--top", "3"), "No such option"),  # an abbreviation
        (("scan", "a"), "Missing argument"),
        (("scan", "a", "b", "--alpha", "small"), "Invalid value"),
        (("certify", "t", "--calibration", "c", "--epsilon", "0.1", "--batch-size", "0"), "Invalid value"),
        (("run", "-f", "nowhere.yaml"), "there is no settings file nowhere.yaml"),
    ],
)
def test_wrong_usage_is_status_2(words, sentence, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    status, said, error = invoke(*words)
    assert (
        status == 2
        and sentence in error
        and said == ""
        and len([line for line in error.splitlines() if sentence in line]) == 1
    )


def test_a_broken_notebook_is_refused_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.ipynb").write_text("")
    (tmp_path / "cut.ipynb").write_text('{"cells": [')
    (tmp_path / "table.csv").write_text("a,b")
    cases = {
        "nowhere": "there is no notebook nowhere",
        "empty.ipynb": "not a notebook",
        "cut.ipynb": "not a notebook",
        "table.csv": "not a notebook",
        ".": "no notebook",
    }
    cases[notebook(tmp_path, "seed = (", "1")] = "parameters cell"
    for path, words in cases.items():
        status, said, error = invoke("run", path)
        assert (
            status == 2 and words in error and error.count("\n") == 1 and error.startswith("kslottery: ") and said == ""
        ), (path, error)
    notebook(tmp_path, "seed = 0", kernel={"name": "ir", "display_name": "R", "language": "R"})
    assert invoke("run", "own.ipynb")[0] == 2 and "for R" in invoke("run", "own.ipynb")[2]
    (tmp_path / "p.yaml").write_text("seed: !!python/object/apply:os.system ['touch pwned']")
    notebook(tmp_path, "seed = 0")
    status, _, error = invoke("run", "own.ipynb", "-f", "p.yaml")
    assert status == 2 and "not YAML" in error and not (tmp_path / "pwned").exists()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "source, words",
    [
        ("if seed == 0\n    pass", "SyntaxError in cell 2"),
        ("assert seed", "no message (AssertionError in cell 2)"),
        ("import os\nos._exit(9)", "the kernel died in cell 2"),
    ],
    ids=["syntax", "assertion", "killed"],
)
def test_a_failed_cell_is_status_1_and_keeps_the_notebook(source, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, said, error = invoke("run", notebook(tmp_path, "seed = 0\nprint('so far')", source), "--json")
    assert (
        status == 1
        and said == ""
        and error.count("\n") == 1
        and words in error
        and "runs/own/own.ipynb" in error
        and "Jupyter" in error
    )
    kept = nbformat.read(tmp_path / "runs" / "own" / "own.ipynb", as_version=4)
    assert any(o.get("text") == "so far\n" for c in kept.cells for o in c.get("outputs", [])) and os.listdir(
        tmp_path / "runs" / "own"
    ) == ["own.ipynb"]


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_stops_a_run(number, tmp_path):
    own = notebook(
        tmp_path, "seed = 0", "print('begun')\nimport pathlib, time\npathlib.Path('begun').touch()\ntime.sleep(60)"
    )
    # a shell without job control starts its children deaf to it
    hearing = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    process = subprocess.Popen(
        [sys.executable, "-c", hearing + MAIN, "run", str(own)], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    for _ in range(600):
        if (tmp_path / "begun").exists():
            break
        time.sleep(0.05)
    process.send_signal(number)
    error = process.communicate(timeout=30)[1]
    assert (
        process.returncode == 128 + number
        and "interrupted; the notebook so far: runs/own/own.ipynb" in error
        and "Traceback" not in error
    )
    assert (tmp_path / "runs" / "own" / "own.ipynb").exists()


def test_parameters_from_a_file(tmp_path, monkeypatch):
    "What -p says wins; the answer in JSON is all there is on standard output."
    monkeypatch.chdir(tmp_path)
    write = "import json\njson.dump({'summary': [f'{seed} {rate} {name}']}, open(f'{out}/results.json', 'w'))"
    own = notebook(tmp_path, "seed = 0\nrate = 0.1\nname = 'x'\nout = 'o'", write)
    (tmp_path / "p.yaml").write_text("seed: 5\nrate: 1e-5\nname: 'no'\n")
    status, said, error = invoke("run", own, "-f", "p.yaml", "-p", "seed=7", "--json")
    assert status == 0, error
    found = json.loads(said)
    assert (
        found["summary"] == ["7 1e-05 no"]
        and found["results"] == "o/results.json"
        and all(Path(found[k]).exists() for k in ("notebook", "report", "folder"))
    )


def test_colours_are_for_terminals_only(tmp_path):
    "Through a pipe no escape at all; on a terminal colours, unless NO_COLOR is set."

    def on_a_terminal(**more):
        ours, theirs = pty.openpty()
        place = (
            {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "GITHUB_ACTIONS", "PY_COLORS")}
            | {"TERM": "xterm-256color", "COLUMNS": "80"}
            | more
        )
        process = subprocess.Popen([sys.executable, "-c", MAIN, "--help"], stdout=theirs, stderr=theirs, env=place)
        os.close(theirs)
        seen = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            seen += part
        process.wait()
        os.close(ours)
        return seen.decode()

    colour = re.compile(r"\x1b\[[0-9;]*3[0-7]")
    assert colour.search(on_a_terminal()) and not colour.search(on_a_terminal(NO_COLOR="1"))
    for words in (["--help"], ["--bogus"]):
        done = subprocess.run(
            [sys.executable, "-c", MAIN, *words],
            capture_output=True,
            text=True,
            env={k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "GITHUB_ACTIONS", "PY_COLORS")},
        )
        assert "\x1b" not in done.stdout + done.stderr and done.stdout + done.stderr


def test_the_shell_completes(tmp_path):
    command = Path(sys.executable).with_name("kslottery")
    done = subprocess.run(["bash", "-c", f"{command} --show-completion; true"], capture_output=True, text=True)
    assert "_KSLOTTERY_COMPLETE=complete_bash" in done.stdout, done.stderr
    place = {**os.environ, "_KSLOTTERY_COMPLETE": "complete_bash", "COMP_WORDS": "kslottery c", "COMP_CWORD": "1"}
    assert subprocess.run([command], capture_output=True, text=True, env=place).stdout.split() == ["certify", "card"]


def test_no_bars_outside_a_terminal(tmp_path, monkeypatch):
    monkeypatch.delenv("KSLOTTERY_PROGRESS", raising=False)
    for kind in ("base", "tuned"):
        base_in(tmp_path / kind, "llama")
    status, _, error = invoke(
        "scan", tmp_path / "base", tmp_path / "tuned", "--all", "--top-k", "2", "--out", tmp_path / "t"
    )
    assert status == 0 and "\r" not in error and "\x1b" not in error
    status, said, error = invoke(
        "merge", tmp_path / "t", "--model", tmp_path / "base", "--out", tmp_path / "m", "--json"
    )
    assert (
        status == 0
        and error == ""
        and json.loads(said)
        == {
            "out": str(tmp_path / "m"),
            "model": str(tmp_path / "base"),
            "revision": None,
            "rows": 2,
            "mode": "input_only",
            "added_megabytes": 0.0,
            "added_tokens": [],
        }
    )


def test_a_card_for_the_hub(tmp_path):
    "A local path is no base model there; who publishes says which it was, and later certificates and audits keep it."
    base_in(tmp_path / "base", "llama")
    ticket = ticket_in(tmp_path / "t", tmp_path / "base")
    status, said, _ = invoke("card", tmp_path / "t")
    assert (
        status == 0 and said == (tmp_path / "t" / "README.md").read_text() and ModelCard(said).data.base_model is None
    )
    status, said, error = invoke("card", tmp_path / "t", "--base-model", "org/base", "--license", "mit")
    assert status == 0 and "written again" in said, error
    Ticket.load(tmp_path / "t").add_certificates([])
    data = ModelCard((tmp_path / "t" / "README.md").read_text()).data
    assert (data.base_model, data.license) == ("org/base", "mit")
    found = json.loads(invoke("card", tmp_path / "t", "--json")[1])
    assert (found["base_model"], found["model"], found["size"], found["verdict"]) == (
        "org/base",
        str(tmp_path / "base"),
        2,
        None,
    ) and found["text"].startswith("---\n")
    assert torch.equal(Ticket.load(tmp_path / "t").rows.weight, ticket.rows.weight)
    assert invoke("merge", tmp_path / "t", "--out", tmp_path / "m")[0] == 0  # where the model is, it is still known
    for wrong in (tmp_path / "base", "a b"):
        status, _, error = invoke("card", tmp_path / "t", "--base-model", wrong)
        assert status == 2 and "owner/name" in error and error.count("\n") == 1
    (tmp_path / "t" / "README.md").unlink()
    assert invoke("card", tmp_path / "t")[0] == 0 and (tmp_path / "t" / "README.md").exists()


def test_the_built_in_world_by_its_command(tmp_path):
    status, said, error = invoke("babel", "--size", "small", "--out", tmp_path / "world", "--json")
    assert status == 0, error
    found = json.loads(said)
    assert found["model"] == str(tmp_path / "world") and all(
        len(Path(s["path"]).read_text().splitlines()) == s["pairs"] > 0 for s in found["splits"].values()
    )
    assert json.loads(Path(found["splits"]["train"]["path"]).read_text().split("\n")[0]) == found["sample"]
    model, _ = load_model(found["model"])
    assert sum(p.numel() for p in model.parameters()) == found["parameters"]
    status, said, _ = invoke("babel", "--size", "small")
    assert status == 0 and found["sample"]["source"] in said and "In Borel" in said
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    for words, sentence in (
        (("--size", "big"), "choose default, small"),
        (("--size", "small", "--out", tmp_path / "mine"), "something else"),
    ):
        status, _, error = invoke("babel", *words)
        assert status == 2 and sentence in error and error.count("\n") == 1


def test_the_doctor(monkeypatch):
    def refused(*given):
        raise AssertionError("the doctor reads no network")

    monkeypatch.setattr(socket.socket, "connect", refused)
    status, said, error = invoke("doctor", "--json")
    found = json.loads(said)
    assert status == 0 and error == "" and found["ok"] and found["uses"]["kslottery run"]["ok"]
    version = torch.__version__.split("+")  # some wheels name their build in the module, and not in their metadata
    assert found["packages"]["torch"]["version"].split("+")[0] == version[0] and found["devices"][0]["device"] == "cpu"
    stated = re.search(r"^requirements = (.*)", (ROOT / "settings.ini").read_text(), re.MULTILINE)[1].split()
    assert sorted(name + p["needs"] for name, p in found["packages"].items()) == sorted(stated)
    assert invoke("doctor")[0] == 0 and "ready      kslottery run" in invoke("doctor")[1]


def test_the_doctor_where_something_is_missing(monkeypatch):
    for name in ("papermill", "sentencepiece", "numba"):
        monkeypatch.setitem(sys.modules, name, None)
    status, said, _ = invoke("doctor")
    assert (
        status == 0
        and "kslottery run: papermill (pip install 'kslottery[run]')" in said
        and "MISSING    numba" in said
        and "slower" in said
    )
    status, said, error = invoke("run", "quickstart")
    assert status == 2 and said == "" and error.count("\n") == 1 and "pip install 'kslottery[run]'" in error
    code = (
        "import sys; sys.modules.update(torch=None, scipy=None)\n" + MAIN
    )  # from the start: the command needs them itself
    done = subprocess.run([sys.executable, "-c", code, "doctor", "--json"], capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert done.returncode == 1 and [n for n, p in found["packages"].items() if not p["ok"]] == ["torch", "scipy"]
    assert "torch cannot be imported" in found["notes"][0] and done.stderr == ""


def test_an_answer_of_no_utf_8_is_given_all_the_same(tmp_path):
    base_in(tmp_path / "base", "llama")
    ticket_in(tmp_path / "t", tmp_path / "base")
    status, said, error = invoke("merge", tmp_path / "t", "--out", tmp_path / "m", "--revision", "\ud800", "--json")
    assert status == 0 and json.loads(said)["revision"] == "\ud800", error
