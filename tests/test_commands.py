"""`kslottery merge` and `kslottery peft`: the same greedy text in every form, one sentence for bad input, nothing half-written."""

import json
import os
import resource
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from test_ticket import GREEDY, TOKENIZER, X
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, T5Config, T5ForConditionalGeneration
from typer.testing import CliRunner

from conftest import TIED, talker
from kslottery.cli import app
from kslottery.core import load_model
from kslottery.rows import TunedRows, is_tied
from kslottery.ticket import Ticket


def run(*words):
    "The command in this process: (exit status, standard output, standard error)."
    done = CliRunner().invoke(app, [str(w) for w in words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


def base_in(folder, kind, dtype=torch.float32):
    "A checkpoint folder: model, tokenizer without a padding token, generation settings of its own."
    model = talker(kind).to(dtype)
    model.generation_config = GenerationConfig(max_new_tokens=7, eos_token_id=63, pad_token_id=0)
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()  # Module.to rounds the rotary table too, loading does not


def ticket_in(folder, base, mode="input_only", ids=(9, 4)):
    model, tokenizer = load_model(base)
    rows = TunedRows(ids, torch.randn(len(ids), 16, generator=torch.Generator().manual_seed(0)), mode)
    ticket = Ticket.make(model, tokenizer, ids, name=str(base), rows=rows)
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
    assert run("merge", tmp_path / "t", "--out", tmp_path / "m")[0] == 0
    assert {p.name for p in (tmp_path / "m").iterdir()} >= {"model.safetensors", "config.json", "tokenizer.json", "generation_config.json"}
    assert not [p.name for p in (tmp_path / "m").iterdir() if p.suffix in (".bin", ".pkl", ".pt")]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    assert merged.dtype == dtype and is_tied(merged) == (mode == "shared") and merged.generation_config.max_new_tokens == 7
    assert AutoTokenizer.from_pretrained(tmp_path / "m").pad_token == AutoTokenizer.from_pretrained(tmp_path / "base").pad_token
    with ticket.rows.applied(model):
        assert torch.equal(merged.generate(X, **GREEDY), model.generate(X, **GREEDY))
    assert not torch.equal(merged.generate(X, **GREEDY), model.generate(X, **GREEDY))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_ticket_to_adapter_to_ticket(kind, tmp_path):
    model = base_in(tmp_path / "base", kind)
    mode = "shared" if kind in TIED else "input_only"
    ticket = ticket_in(tmp_path / "t", tmp_path / "base", mode)
    assert run("peft", tmp_path / "t", "--out", tmp_path / "a")[0] == 0 and run("peft", tmp_path / "a", "--out", tmp_path / "again")[0] == 0
    again = Ticket.load(tmp_path / "again")
    assert torch.equal(again.rows.rows, ticket.rows.rows) and again.info["mode"] == mode and again.info["model"] == str(tmp_path / "base")
    with ticket.rows.applied(model):
        text = model.generate(X, **GREEDY)
    assert torch.equal(PeftModel.from_pretrained(model, tmp_path / "a").eval().generate(input_ids=X, **GREEDY), text)
    assert run("merge", tmp_path / "again", "--out", tmp_path / "m")[0] == 0
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval().generate(X, **GREEDY), text)


def test_bad_input_gets_one_sentence_and_writes_nothing(tmp_path):
    base_in(tmp_path / "base", "llama")
    base_in(tmp_path / "gpt2", "gpt2")
    ticket_in(tmp_path / "t", tmp_path / "base")
    ticket_in(tmp_path / "tied", tmp_path / "gpt2")
    ticket_in(tmp_path / "none", tmp_path / "base", ids=())
    model, tokenizer = load_model(tmp_path / "base")
    Ticket.make(model, tokenizer, [4], name="tiny").save(tmp_path / "bare")
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
        ("merge", "t", "--model", "gpt2"): "another embedding",
        ("merge", "t", "--model", "t5"): "choose a decoder-only",
        ("merge", "t", "--model", "nowhere/at/all"): "neither a checkpoint folder",
        ("peft", "none"): "empty",
        ("peft", "tied"): "ties input and output",
        ("peft", "base"): "neither a ticket folder nor",
        ("peft", "nameless"): "--model",
        ("peft", "nameless", "--model", "base"): "adapter_model.safetensors",
    }
    for (command, source, *more), words in cases.items():
        more = [w if w.startswith("-") or "/" in w else tmp_path / w for w in more]
        status, said, error = run(command, tmp_path / source, *more, "--out", tmp_path / "out")
        assert status == 2 and words in error and error.count("\n") == 1 and error.startswith("kslottery: "), (command, source, error)
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    for command in ("merge", "peft"):
        status, _, error = run(command, tmp_path / "t", "--out", tmp_path / "mine")
        assert status == 2 and "something else" in error and os.listdir(tmp_path / "mine") == ["thesis.tex"]


def test_a_full_disk_leaves_nothing(tmp_path):
    "Files may grow to 2 kB only; run as a user would."
    base_in(tmp_path / "base", "llama")
    ticket_in(tmp_path / "t", tmp_path / "base")
    code = f"""import resource, signal
from kslottery.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit({resource.RLIMIT_FSIZE}, (2000, 2000))
main()"""
    done = subprocess.run([sys.executable, "-c", code, "merge", str(tmp_path / "t"), "--out", str(tmp_path / "m")], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.strip().split("\n")[-1].startswith("kslottery: ") and "Traceback" not in done.stderr, done.stderr
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
    status, said, error = run("scan", tmp_path / "base", tmp_path / "tuned", "--top-k", 2, "--out", tmp_path / "t")
    assert status == 0, error
    assert run("merge", tmp_path / "t", "--out", tmp_path / "m")[0] == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    assert is_tied(merged) and torch.equal(merged.generate(X, **GREEDY), model.generate(X, **GREEDY))
    assert (tmp_path / "t" / "adapter_config.json").exists()
