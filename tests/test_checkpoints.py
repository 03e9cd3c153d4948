"""Scans of checkpoints and the tickets made of them: every layout, every matrix; memory; faults."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import matplotlib.pyplot as plt
import pytest
import torch
from safetensors.torch import save_file
from scipy import stats

from conftest import ARCHITECTURES, TIED, TOY, invoke, kslottery, tiny_model
from kslottery.checkpoints import Checkpoint, CheckpointScan, scan_all, scan_checkpoints, scan_figures
from kslottery.ks import CRITERIA
from kslottery.ticket import Ticket


def save(model, folder, **options):
    model.save_pretrained(folder, **options)
    return folder


@pytest.fixture
def pair(tmp_path):
    model = tiny_model("llama", hidden=64)
    save(model, tmp_path / "base")
    with torch.no_grad():
        model.get_input_embeddings().weight[[5, 9]] *= 4
    save(model, tmp_path / "tuned")
    return tmp_path


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_layout(kind, tmp_path):
    model = tiny_model(kind, hidden=64)
    base, shards = save(model, tmp_path / "base"), save(model, tmp_path / "shards", max_shard_size="40KB")
    with torch.no_grad():
        model.get_input_embeddings().weight[[5, 9]] *= 4
    tuned = save(model, tmp_path / "tuned")
    for before in (base, shards, base / "model.safetensors"):
        assert sorted(scan_checkpoints(before, tuned).select(0.05)) == [5, 9]
    everything = {s.name: s for s in scan_all(base, tuned)}
    stored = Checkpoint(base)
    assert (
        set(everything) == set(stored.names) and sum(s.changed for s in everything.values()) == 2
    )  # tied matrices are stored, and scanned, once
    for name, s in everything.items():
        assert s.rows == (1 if len(stored[name].shape) == 1 else stored[name].shape[0])


def test_a_hub_id_is_downloaded_whatever_dots_it_has(pair, monkeypatch):
    import huggingface_hub

    folders = {"org/Model-2.5B": pair / "base", "org/Model-2.5B-tuned": pair / "tuned"}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: str(folders[name]))
    assert sorted(scan_checkpoints("org/Model-2.5B", "org/Model-2.5B-tuned").select(0.05)) == [5, 9]
    with pytest.raises(FileNotFoundError, match="org/none is neither"):
        Checkpoint("org/none")


def test_two_checkpoints_become_a_ticket_in_a_few_lines(pair):
    TOY.save_pretrained(pair / "base")
    ticket = scan_checkpoints(pair / "base", pair / "tuned").ticket(alpha=0.05)
    ticket.save(pair / "ticket")
    facts = Ticket.load(pair / "ticket").provenance
    assert sorted(ticket.ids) == sorted(ticket.rows.ids.tolist()) == [5, 9] and not ticket.sentences
    assert sorted(facts.tokens) == ["t5", "t9"] and facts.changed == 2 and facts.prompt is None and facts.V == 64
    assert (facts.model, facts.tuned) == (str(pair / "base"), str(pair / "tuned"))
    assert facts.tensor == "model.embed_tokens.weight" and facts.embedding_module == "model.embed_tokens"
    assert facts.selection.alpha == 0.05 and facts.selection.criterion == "ks"
    base, tuned = tiny_model("llama", hidden=64), tiny_model("llama", hidden=64)
    ticket.check(base, TOY)
    with torch.no_grad():
        tuned.get_input_embeddings().weight[[5, 9]] *= 4
        x = torch.tensor([[1, 5, 9, 20]])
        with ticket.rows.applied(base):
            assert torch.equal(base(x).logits, tuned(x).logits)


def test_a_file_beside_its_tokenizer_keeps_the_names_of_its_tokens(pair):
    TOY.save_pretrained(pair / "base")
    scan = scan_checkpoints(pair / "base" / "model.safetensors", pair / "tuned" / "model.safetensors")
    assert sorted(scan.ticket().provenance.tokens) == ["t5", "t9"]
    (pair / "alone.safetensors").write_bytes((pair / "base" / "model.safetensors").read_bytes())
    assert scan_checkpoints(pair / "alone.safetensors", pair / "tuned").ticket().provenance.tokens == (None, None)


def test_no_code_of_a_checkpoint_is_run(pair):
    TOY.save_pretrained(pair / "base")
    about = pair / "base" / "tokenizer_config.json"
    own = {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}, "tokenizer_class": "Own"}
    about.write_text(json.dumps(json.loads(about.read_text()) | own))
    (pair / "base" / "own.py").write_text(f"open({str(pair / 'was run')!r}, 'w')\n")
    with contextlib.suppress(ValueError):
        scan_checkpoints(pair / "base", pair / "tuned").ticket()
    assert not (pair / "was run").exists()


@pytest.mark.parametrize("kind", TIED)
@pytest.mark.parametrize("both", [True, False])
def test_tied_checkpoints_share_their_rows(kind, both, tmp_path):
    base, tuned = tiny_model(kind, hidden=64), tiny_model(kind, hidden=64)
    with torch.no_grad():
        if not both:  # the tuned checkpoint has an output of its own, so that rows moved in the input only
            tuned.config.tie_word_embeddings = False
            tuned.lm_head.weight = torch.nn.Parameter(tuned.lm_head.weight.clone())
        tuned.get_input_embeddings().weight[[5, 9]] *= 4
    save(base, tmp_path / "base")
    save(tuned, tmp_path / "tuned")
    before, after = (Checkpoint(tmp_path / name) for name in ("base", "tuned"))
    assert (before.tied, after.tied) == (True, both)
    if not both:
        file = tmp_path / "base" / "model.safetensors"  # as some tools store tied weights: twice
        state = {name: before[name][:] for name in before.names}
        save_file(state | {"lm_head.weight": state[before.embedding()].clone()}, file)
    ticket = scan_checkpoints(tmp_path / "base", tmp_path / "tuned").ticket()
    assert ticket.provenance.tied_embeddings and ticket.rows.mode == ("shared" if both else "input_only")
    with torch.no_grad():
        x = torch.tensor([[1, 5, 9, 20]])
        with ticket.rows.applied(base):
            assert torch.allclose(base(x).logits, tuned(x).logits, atol=1e-6)


def test_a_ticket_of_another_matrix_has_no_rows_and_of_no_change_has_no_ids(pair):
    scan = scan_checkpoints(pair / "base", pair / "tuned", tensor="lm_head.weight")
    assert isinstance(scan, CheckpointScan) and scan.tensor == "lm_head.weight"
    ticket = scan.ticket(top_k=3)
    assert ticket.rows is None and len(ticket.ids) == 3 and ticket.provenance.tokens == (None,) * 3
    same = scan_checkpoints(pair / "base", pair / "base").ticket()
    assert not len(same.ids) and same.provenance.changed == 0 and len(same.rows) == 0


def test_equal_checkpoints_are_not_advised_to_tune_longer(pair):
    advice = scan_checkpoints(pair / "base", pair / "base").ticket().advice
    assert "same" in advice and "lr_embed" not in advice and "epochs" not in advice


@pytest.mark.parametrize("criterion", CRITERIA)
def test_what_changed_is_counted_whatever_the_criterion(pair, criterion):
    scan = scan_checkpoints(pair / "base", pair / "tuned", criterion=criterion, counts=range(64))
    facts = scan.ticket(top_k=3).provenance
    assert facts.changed == 2 and facts.selection.criterion == criterion and facts.selection.top_k == 3


def test_a_tensor_may_be_named_where_no_embedding_is_recognised(tmp_path):
    weight = torch.randn(30, 64, generator=torch.Generator().manual_seed(0))
    for name in ("base", "tuned"):
        save_file({"tokens": weight * torch.tensor([1 if name == "base" else 3])}, tmp_path / f"{name}.safetensors")
    files = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    with pytest.raises(ValueError, match="name one with tensor="):
        scan_checkpoints(*files)
    assert len(scan_checkpoints(*files, tensor="tokens").ticket().ids) == 30


def test_bad_values_are_refused_before_anything_is_read(pair, monkeypatch):
    scan = scan_checkpoints(pair / "base", pair / "tuned")
    bare = scan_checkpoints(pair / "base", pair / "tuned", criterion="l2")
    monkeypatch.setattr("kslottery.checkpoints._Slices.__getitem__", lambda self, rows: 1 / 0)
    for call, words in (
        (lambda: scan_checkpoints(pair / "base", pair / "tuned", criterion="l3"), "choose ks"),
        (lambda: scan_checkpoints(pair / "base", pair / "tuned", criterion="frequency"), "needs counts"),
        (lambda: scan_checkpoints(pair / "base", pair / "tuned", counts=[1, 2]), "each of the 64 rows, not 2"),
        (lambda: scan_checkpoints(pair / "base", pair / "tuned", tensor="wte"), "no tensor wte"),
        (lambda: scan_all(pair / "base", pair / "tuned", alpha=2), "alpha is 2"),
        (lambda: scan_all(pair / "base", pair / "tuned", per="head"), "per is 'head'"),
        (lambda: scan.ticket(alpha=2), "alpha is 2"),
        (lambda: scan.ticket(top_k=-1), "top_k is -1"),
        (lambda: scan.ticket(top_k=99), r"top\(99\)"),
        (lambda: scan.ticket(correction="holm"), "bonferroni"),
        (lambda: bare.ticket(), "--top-k"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"correction": "bonferroni"}])
def test_the_figures_of_a_scan_show_the_ticket(pair, options, monkeypatch):
    drawn = []
    monkeypatch.setattr("kslottery.checkpoints.png", lambda plot, *args: drawn.append(plot(*args)) or b"")
    scan = scan_checkpoints(pair / "base", pair / "tuned", criterion="ks")
    ticket = scan.ticket(0.05, **options)
    files = scan_figures(scan, ticket, counts=range(64), everything=True, progress=False)
    assert list(files) == ["rank.png", "pvalues.png", "frequency.png", "layers.png", "layers.json"]
    said = [[t.get_text() for t in ax.get_legend().get_texts()] for ax in (drawn[0], drawn[2])]
    assert all(f"{len(ticket.ids)} rows" in text[1] for text in said)
    assert list(scan_figures(scan, ticket)) == ["rank.png", "pvalues.png"]
    plt.close("all")


def test_columns_and_tensors_are_scipys(pair):
    model = tiny_model("llama", hidden=64, seed=1)
    save(model, pair / "other")
    a, b = (Checkpoint(pair / n) for n in ("base", "other"))
    columns, whole = ({s.name: s.scan for s in scan_all(a, b, per=p)} for p in ("column", "tensor"))
    name = "model.layers.0.mlp.up_proj.weight"
    x, y = a[name][:].numpy(), b[name][:].numpy()
    assert columns[name].statistic.tolist() == [stats.ks_2samp(x[:, j], y[:, j]).statistic for j in range(x.shape[1])]
    assert (
        whole[name].statistic[0]
        == round(stats.ks_2samp(x.ravel(), y.ravel(), method="asymp").statistic * x.size) / x.size
    )


STREAM = """
import sys, threading, time
from pathlib import Path
import numpy, torch, safetensors.torch, numba, scipy.stats, tqdm
from kslottery.checkpoints import scan_checkpoints
from kslottery.ks import ks_scan
status = lambda: Path("/proc/self/status").read_text().splitlines()
anonymous = lambda: int(next(l for l in status() if l.startswith("RssAnon")).split()[1]) / 1024
ks_scan(numpy.zeros((4, 8)), numpy.ones((4, 8)))  # compile
start, peak, done = anonymous(), [0], threading.Event()
def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], anonymous() - start)
thread = threading.Thread(target=watch); thread.start()
scan = scan_checkpoints(sys.argv[1], sys.argv[2])
done.set(); thread.join()
print(peak[0], len(scan.select(0.05)))
"""


def peak_of_scan(tmp_path, V, d):
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(V, d, generator=generator) * 0.02).bfloat16()
    save_file({"model.embed_tokens.weight": weight}, tmp_path / "base.safetensors")
    weight[: V // 10] *= 1.5
    save_file({"model.embed_tokens.weight": weight}, tmp_path / "tuned.safetensors")
    del weight
    said = subprocess.run(
        [sys.executable, "-c", STREAM, str(tmp_path / "base.safetensors"), str(tmp_path / "tuned.safetensors")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return float(said.split()[0]), int(said.split()[1])


def test_streaming_stays_small(tmp_path):
    "Two 16,000 x 4096 bf16 files, 131 MB each: the scan needs a fraction of one of them, whatever their size."
    peak, won = peak_of_scan(tmp_path, 16_000, 4096)
    assert won == 1600 and peak < 100, peak


@pytest.mark.slow
def test_streaming_two_llama_3_embeddings(tmp_path):
    peak, won = peak_of_scan(tmp_path, 128_256, 4096)
    assert won == 12_825 and peak < 500, peak


def test_the_command_writes_a_ticket(pair):
    (pair / "counts.json").write_text(json.dumps(list(range(64))))
    out = pair / "ticket"
    status, said, error = kslottery(
        "scan", pair / "base", pair / "tuned", "--out", out, "--all", "--counts", pair / "counts.json"
    )
    assert status == 0, error
    assert "2 of 64 rows" in said
    ticket = Ticket.load(out)
    assert sorted(ticket.ids) == [5, 9] and ticket.provenance.selection.alpha == 0.05
    assert len(ticket.scan.statistic) == 64
    base, tuned = (tiny_model("llama", hidden=64) for _ in range(2))
    with torch.no_grad():
        tuned.get_input_embeddings().weight[[5, 9]] *= 4
        x = torch.tensor([[1, 5, 9, 20]])
        with ticket.rows.applied(base):
            assert torch.equal(base(x).logits, tuned(x).logits)
    from peft import PeftModel

    assert torch.equal(PeftModel.from_pretrained(base, out).eval()(x).logits, tuned(x).logits)
    for figure in ("rank.png", "pvalues.png", "frequency.png", "layers.png"):
        assert (out / figure).read_bytes().startswith(b"\x89PNG")
    assert sum(s["changed"] for s in json.loads((out / "layers.json").read_text())) == 2


@pytest.mark.parametrize("criterion", ["l2", "sign", "wasserstein"])
def test_the_command_with_another_criterion(pair, criterion):
    status, said, error = kslottery(
        "scan", pair / "base", pair / "tuned", "--criterion", criterion, "--top-k", 2, "--json", "--out", pair / "t"
    )
    assert status == 0, error
    assert sorted(json.loads(said)["ids"]) == [5, 9] and Ticket.load(pair / "t").scan.criterion == criterion


def test_the_command_on_another_tensor_and_with_nothing_found(pair):
    status, said, error = kslottery(
        "scan", pair / "base", pair / "tuned", "--tensor", "lm_head.weight", "--out", pair / "t"
    )
    assert status == 0 and "0 of 64 rows" in said and "hold the same matrix" in said, error
    assert len(Ticket.load(pair / "t").ids) == 0


def test_bad_input_gets_one_sentence_and_writes_nothing(pair):
    cut, nan, narrow, half = (pair / n for n in ("cut", "nan.safetensors", "narrow.safetensors", "half.safetensors"))
    cut.mkdir()
    data = (pair / "tuned" / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(data[: len(data) // 2])
    state = {k: v.clone() for k, v in tiny_model("llama", hidden=64).state_dict().items()}
    save_file({k: v.bfloat16() for k, v in state.items()}, half)
    state["model.embed_tokens.weight"][7, 3] = torch.nan
    save_file(state, nan)
    save_file({**state, "model.embed_tokens.weight": torch.zeros(60, 64)}, narrow)
    (pair / "pickled").mkdir()
    torch.save(state, pair / "pickled" / "pytorch_model.bin")
    cases = {
        (pair / "missing.safetensors",): "does not exist",
        (cut,): "cut short",
        (nan,): "row 7 of after holds NaN",
        (narrow,): "(60, 64)",
        (half,): "--round",
        (pair / "pickled",): "not opened",
        (pair / "tuned", "--alpha", "2"): "alpha is 2",
        (pair / "tuned", "--criterion", "l2"): "top(k)",
        (pair / "tuned", "--criterion", "l3", "--top-k", "2"): "choose ks",
        (pair / "tuned", "--tensor", "wte"): "no tensor wte",
        (pair / "tuned", "--top-k", "99"): "top(99)",
    }
    for words, sentence in cases.items():
        status, said, error = invoke("scan", pair / "base", *words, "--out", pair / "t")
        assert (
            status == 2 and sentence in error and "Traceback" not in error and len(error.strip().splitlines()[-1]) > 20
        ), (words, error)
        assert not (pair / "t").exists() and not list(pair.glob(".t-*"))
    assert invoke("scan", pair / "base", half, "--round", "--out", pair / "t")[0] == 0
    status, _, error = kslottery("scan", pair / "base", pair / "tuned", "--out", pair / "base")
    assert status == 2 and "something else" in error and Checkpoint(pair / "base").names


def test_ctrl_c_writes_nothing(tmp_path):
    weight = torch.randn(60_000, 1024).bfloat16()
    save_file({"model.embed_tokens.weight": weight}, tmp_path / "a.safetensors")
    save_file({"model.embed_tokens.weight": weight * 1.1}, tmp_path / "b.safetensors")
    # a shell without job control starts its children deaf to it
    hearing = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    command = [
        sys.executable,
        "-c",
        hearing + "from kslottery.cli import main; main()",
        "scan",
        "a.safetensors",
        "b.safetensors",
        "--out",
        "t",
    ]
    side = tmp_path / "progress"
    process = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env={**os.environ, "KSLOTTERY_PROGRESS": str(side)}
    )
    for _ in range(600):
        if side.exists() and "KS scan" in side.read_text():
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "interrupted; nothing was written" in error and not (tmp_path / "t").exists()
