"""The ticket folder: there and back, PEFT, and faults injected for real."""

import json
import os
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from conftest import ARCHITECTURES, ROOT, tiny_model
from kslottery.ks import ks_scan
from kslottery.rows import TunedRows
from kslottery.ticket import Ticket

TOKENIZER = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({f"t{i}": i for i in range(64)}, unk_token="t0")), eos_token="t2")


def ticket_for(model, ids=(9, 4)):
    embed = TunedRows(range(3, 12), torch.randn(9, 16, generator=torch.Generator().manual_seed(0)))
    scan = ks_scan(model.get_input_embeddings().weight, embed.merged(model).get_input_embeddings().weight)
    return Ticket.make(
        model, TOKENIZER, list(ids), name="tiny", scan=scan, rows=embed.restrict(ids), embed_rows=embed, sentences=["a" * 64, "b" * 64], alpha=0.05
    )


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_there_and_back(kind, tmp_path):
    model = tiny_model(kind)
    ticket = ticket_for(model)
    ticket.save(tmp_path / "t")
    again = Ticket.load(tmp_path / "t")
    again.check(model, TOKENIZER)
    assert again.ids.tolist() == [9, 4] and again.info == ticket.info and again.sentences == ticket.sentences
    assert torch.equal(again.rows.rows, ticket.rows.rows) and torch.equal(again.embed_rows.rows, ticket.embed_rows.rows)
    assert np.array_equal(again.scan.pvalue, ticket.scan.pvalue)
    record = json.loads((tmp_path / "t" / "ticket.json").read_text())
    assert record["tokens"] == ["t9", "t4"] and record["statistic"] == ticket.scan.statistic[[9, 4]].tolist()
    assert not list((tmp_path / "t").glob("*.bin")) and not list((tmp_path / "t").glob("*.pkl"))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
def test_plain_peft_loads_it(kind, tmp_path):
    model = tiny_model(kind)
    ticket_for(model).save(tmp_path / "t")
    x = torch.tensor([[1, 9, 4, 9, 5]])
    with torch.no_grad():
        with Ticket.load(tmp_path / "t").rows.applied(model):
            ours = model(x).logits
        assert torch.equal(PeftModel.from_pretrained(model, tmp_path / "t").eval()(x).logits, ours)


@pytest.mark.parametrize("kind, ids, reason", [("gpt2", (9, 4), "ties"), ("llama", (), "empty")])
def test_what_peft_cannot_hold_is_named_and_not_written(kind, ids, reason, tmp_path):
    ticket_for(tiny_model(kind), ids).save(tmp_path / "t")
    assert reason in json.loads((tmp_path / "t" / "ticket.json").read_text())["peft"]
    assert not list((tmp_path / "t").glob("adapter*")) and len(Ticket.load(tmp_path / "t").ids) == len(ids)


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
