"""The ticket folder: there and back, PEFT, and faults injected for real."""

import json
import os
import resource
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from conftest import ARCHITECTURES, ROOT, TIED, talker, tiny_model
from kslottery.ks import ks_scan
from kslottery.rows import TunedRows
from kslottery.ticket import Ticket

X = torch.tensor([[1, 9, 4, 9, 5], [4, 9, 3, 3, 7]])
GREEDY = dict(attention_mask=torch.ones_like(X), max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=63)
TOKENIZER = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({f"t{i}": i for i in range(64)}, unk_token="t0")), eos_token="t2")


def ticket_for(model, ids=(9, 4), mode="input_only"):
    embed = TunedRows(range(3, 12), torch.randn(9, 16, generator=torch.Generator().manual_seed(0)), mode)
    scan = ks_scan(model.get_input_embeddings().weight, embed.merged(model).get_input_embeddings().weight)
    return Ticket.make(
        model, TOKENIZER, list(ids), name="tiny", scan=scan, rows=embed.restrict(ids), embed_rows=embed, sentences=["a" * 64, "b" * 64], alpha=0.05
    )


@pytest.mark.parametrize("kind, mode", [*((kind, "input_only") for kind in ARCHITECTURES), *((kind, "shared") for kind in TIED)])
def test_there_and_back(kind, mode, tmp_path):
    model = tiny_model(kind)
    ticket = ticket_for(model, mode=mode)
    ticket.save(tmp_path / "t")
    again = Ticket.load(tmp_path / "t")
    again.check(model, TOKENIZER)
    assert again.ids.tolist() == [9, 4] and again.info == ticket.info and again.sentences == ticket.sentences
    assert again.rows.mode == again.embed_rows.mode == json.loads((tmp_path / "t" / "ticket.json").read_text())["mode"] == mode
    assert torch.equal(again.rows.rows, ticket.rows.rows) and torch.equal(again.embed_rows.rows, ticket.embed_rows.rows)
    assert np.array_equal(again.scan.pvalue, ticket.scan.pvalue)
    record = json.loads((tmp_path / "t" / "ticket.json").read_text())
    assert record["tokens"] == ["t9", "t4"] and record["statistic"] == ticket.scan.statistic[[9, 4]].tolist()
    assert not list((tmp_path / "t").glob("*.bin")) and not list((tmp_path / "t").glob("*.pkl"))


def natural(kind):
    "The mode that PEFT reads a model's rows in."
    return "shared" if kind in TIED else "input_only"


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_plain_peft_loads_it_and_the_way_back(kind, tmp_path):
    "Ticket -> plain PEFT -> what PEFT saves -> ticket: the same rows and the same greedy text everywhere."
    model = talker(kind)
    ticket = ticket_for(model, mode=natural(kind))
    ticket.save(tmp_path / "t")
    ticket.to_peft(tmp_path / "plain")
    with Ticket.load(tmp_path / "t").rows.applied(model), torch.no_grad():
        ours, text = model(X).logits, model.generate(X, **GREEDY)
    assert not torch.equal(model.generate(X, **GREEDY), text)
    for folder in ("t", "plain"):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            adapted = PeftModel.from_pretrained(talker(kind), tmp_path / folder).eval()
        with torch.no_grad():
            theirs = adapted(X).logits
        assert torch.equal(theirs, ours) if natural(kind) == "input_only" else torch.allclose(theirs, ours, atol=1e-5)
        assert torch.equal(adapted.generate(input_ids=X, **GREEDY), text)
    adapted.save_pretrained(tmp_path / "saved", save_embedding_layers=False)
    back = Ticket.from_peft(tmp_path / "saved", model, TOKENIZER, note="by PEFT")
    back.check(model, TOKENIZER)
    assert back.rows.mode == back.info["mode"] == natural(kind) and back.info["note"] == "by PEFT"
    assert torch.equal(back.rows.ids, ticket.rows.ids) and torch.equal(back.rows.rows, ticket.rows.rows)
    with back.rows.applied(model):
        assert torch.equal(model.generate(X, **GREEDY), text)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_rows_that_peft_trained(kind, tmp_path):
    "Ids in no order, rows that PEFT's own training moved."
    adapted = get_peft_model(talker(kind), TrainableTokensConfig(token_indices=[9, 3, 7]))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    adapted(input_ids=X, labels=X).loss.backward()
    optimizer.step()
    adapted.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    ticket = Ticket.from_peft(tmp_path / "a", talker(kind), TOKENIZER)
    assert ticket.ids.tolist() == [9, 3, 7] and ticket.info["tokens"] == ["t9", "t3", "t7"]
    assert not torch.equal(adapted.eval().generate(input_ids=X, **GREEDY), talker(kind).generate(X, **GREEDY))
    assert torch.equal(adapted.generate(input_ids=X, **GREEDY), ticket.rows.merged(talker(kind)).generate(X, **GREEDY))


def test_what_is_stored_is_k_by_d(tmp_path):
    "Known trouble: PEFT's automatic choice can store the whole embedding in the adapter (PRs 1383 and 2649)."
    model = tiny_model("llama", vocabulary=4096)
    ticket = Ticket.make(model, TOKENIZER, [9, 4], name="tiny", rows=TunedRows([9, 4], torch.ones(2, 16)))
    ticket.save(tmp_path / "t")
    ticket.to_peft(tmp_path / "a")
    assert [v.shape for v in load_file(tmp_path / "t" / "adapter_model.safetensors").values()] == [(2, 16)]
    assert {p.name for p in (tmp_path / "a").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    for place in ("t", "a"):
        assert sum(p.stat().st_size for p in (tmp_path / place).iterdir()) < 4096 * 16 * 4 / 10


def test_adapters_that_are_no_tickets(tmp_path):
    model = tiny_model("llama")
    get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    get_peft_model(tiny_model("llama"), TrainableTokensConfig(token_indices=[3], target_modules=["embed_tokens", "lm_head"])).save_pretrained(tmp_path / "head")
    get_peft_model(tiny_model("llama", hidden=32), TrainableTokensConfig(token_indices=[3])).save_pretrained(tmp_path / "wide")
    get_peft_model(tiny_model("llama", vocabulary=80), TrainableTokensConfig(token_indices=[70])).save_pretrained(tmp_path / "far")
    ticket_for(model).to_peft(tmp_path / "cut")
    whole = (tmp_path / "cut" / "adapter_model.safetensors").read_bytes()
    (tmp_path / "cut" / "adapter_model.safetensors").write_bytes(whole[: len(whole) // 2])
    for folder, error, words in (
        ("lora", ValueError, "LORA"),
        ("head", ValueError, "lm_head"),
        ("wide", ValueError, "64 x 16"),
        ("far", ValueError, "70.*64 x 16"),
        ("cut", ValueError, "damaged"),
        ("none", FileNotFoundError, "adapter_config.json"),
    ):
        with pytest.raises(error, match=words):
            Ticket.from_peft(tmp_path / folder, model, TOKENIZER)


def test_a_ticket_is_not_for_a_merged_or_resized_model():
    "Two tickets for one base are never merged one after the other: the second is for another embedding by then (PEFT issue 3510)."
    model = tiny_model("llama")
    first, second = ticket_for(model), ticket_for(model, (4, 5))
    resized = tiny_model("llama")
    resized.resize_token_embeddings(72, mean_resizing=False)
    for other in (first.rows.merged(model), resized):
        with pytest.raises(ValueError, match="another embedding"):
            second.check(other, TOKENIZER)


def test_ids_beyond_the_tokenizer(tmp_path):
    "Padded rows have no token string, and are tickets like others (PEFT issue 2415)."
    model = tiny_model("qwen2", vocabulary=80)
    Ticket.make(model, TOKENIZER, [79, 4], name="tiny", rows=TunedRows([79, 4], torch.ones(2, 16))).save(tmp_path / "t")
    again = Ticket.load(tmp_path / "t")
    assert again.info["tokens"] == [None, "t4"] and again.ids.tolist() == [79, 4]
    with again.rows.applied(model), torch.no_grad():
        assert torch.equal(PeftModel.from_pretrained(tiny_model("qwen2", vocabulary=80), tmp_path / "t").eval()(X + 70).logits, model(X + 70).logits)


@pytest.mark.parametrize("kind, ids, reason", [("gpt2", (9, 4), "ties"), ("llama", (), "empty")])
def test_what_peft_cannot_hold_is_named_and_not_written(kind, ids, reason, tmp_path):
    ticket_for(tiny_model(kind), ids).save(tmp_path / "t")
    assert reason in json.loads((tmp_path / "t" / "ticket.json").read_text())["peft"]
    assert not list((tmp_path / "t").glob("adapter*")) and len(Ticket.load(tmp_path / "t").ids) == len(ids)
    with pytest.raises(ValueError, match=f"PEFT cannot hold this ticket.*{reason}"):
        Ticket.load(tmp_path / "t").to_peft(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_another_model_or_tokenizer_is_refused():
    ticket = ticket_for(tiny_model("llama"))
    with pytest.raises(ValueError, match="another embedding.*tiny"):
        ticket.check(tiny_model("llama", seed=1), TOKENIZER)
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({f"u{i}": i for i in range(64)}, unk_token="u0")), eos_token="u2")
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
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    return process


def test_kill_9_at_any_moment_leaves_a_whole_ticket(tmp_path):
    "A process that saves over and over is killed; what is there can be read."
    for moment in (0.05, 0.11, 0.23):
        process = start(tmp_path)
        try:
            process.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        if (tmp_path / "t").exists():  # the one instant between two renames leaves the old ticket beside it, whole
            assert Ticket.load(tmp_path / "t").ids.tolist() == [3, 4, 5]
        else:
            assert any(Ticket.load(p).ids.tolist() == [3, 4, 5] for p in tmp_path.glob(".t-old-*/was"))


def test_a_full_disk_leaves_the_old_ticket(tmp_path):
    "Files may grow to 100 bytes only: the write fails as on a full disk, in one error, and the old ticket stands."
    ticket_for(tiny_model("llama")).save(tmp_path / "t")
    process = start(
        tmp_path, before=f"import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit({resource.RLIMIT_FSIZE}, (100, 100))"
    )
    assert process.wait(timeout=60) != 0
    assert Ticket.load(tmp_path / "t").ids.tolist() == [9, 4]
    assert os.listdir(tmp_path) == ["t"]
