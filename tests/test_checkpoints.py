"""Scans of checkpoints: every layout, every matrix, every criterion; streaming within its memory; faults."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from scipy import stats
from test_ks import KINDS, awkward

from conftest import ARCHITECTURES, kslottery, tiny_model
from kslottery.checkpoints import Checkpoint, scan_all, scan_checkpoints
from kslottery.criteria import CRITERIA, equal_move_null, scan_rows
from kslottery.ks import _compiled, critical_value, ks_pvalue, ks_scan, ks_statistic
from kslottery.ticket import Ticket


@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(KINDS), d=st.integers(1, 300), seed=st.integers(0, 2**32 - 1), wide=st.booleans(), alpha=st.sampled_from([0.5, 0.05, 0.001]))
def test_every_engine_and_the_decision_agree(kind, d, seed, wide, alpha):
    before, after = awkward(kind, (6, d), np.random.default_rng(seed))
    after[0] = before[0]
    if wide:
        before, after = before.astype(np.float64), after.astype(np.float64)
    plain = ks_statistic(before, after, engine="plain")
    assert np.array_equal(plain, ks_statistic(before, after, engine="torch"))
    assert np.array_equal(plain, ks_statistic(before, after, engine="binned"))
    full, decided = ks_scan(before, after), ks_scan(before, after, decide=alpha)
    assert full.select(alpha).tolist() == decided.select(alpha).tolist()
    assert full.select(alpha, "bh").tolist() == decided.select(alpha, "bh").tolist()
    won = full.pvalue < alpha
    assert np.array_equal(full.statistic[won], decided.statistic[won]) and np.isnan(decided.statistic[~won]).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d", [1024, 4096])
def test_the_binning_engine_at_the_width_of_models(kind, d):
    before, after = awkward(kind, (12, d), np.random.default_rng(3))
    after[1] = before[1] + np.float32(1e-4) * np.random.default_rng(4).normal(size=d).astype(np.float32)
    before[2, 0] = 1e30  # one huge outlier spoils the bins, not the result
    expected = ks_statistic(before, after, engine="plain")
    assert np.array_equal(expected, ks_statistic(before, after, engine="binned"))


def test_known_pvalues_and_the_integer_decision():
    assert abs(ks_pvalue(0.0546875, 4096) / 9.526161380350235e-06 - 1) < 1e-13
    assert abs(ks_pvalue(0.029296875, 4096) / 0.05945249341641134 - 1) < 1e-13
    k = round(critical_value(0.05, 4096) * 4096)
    assert ks_pvalue(k / 4096, 4096) < 0.05 <= ks_pvalue((k - 1) / 4096, 4096)
    for d in (10_001, 16_384, 100_000):  # scipy's asymptotic value is close out there; ours has no gap at any d
        D = round(0.02 * d) / d
        assert abs(ks_pvalue(D, d) / stats.kstwobign.sf(D * np.sqrt(d / 2)) - 1) < 0.02


def test_a_decision_says_what_it_is():
    before, after = awkward("gaussian", (40, 200), np.random.default_rng(0))
    scan = ks_scan(before, after, decide=0.01)
    assert scan.decided == 0.01 and len(scan.select(0.001)) <= len(scan.select(0.01))
    with pytest.raises(ValueError, match="0.01 only, not at 0.05"):
        scan.select(0.05)
    with pytest.raises(ValueError, match="decided only"):
        scan.top(40)


def test_without_numba_the_plain_engine_serves(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    _compiled.cache_clear()
    try:
        assert _compiled() is None
        before, after = awkward("gaussian", (5, 60), np.random.default_rng(0))
        assert ks_statistic(before, after).tolist() == ks_statistic(before, after, engine="plain").tolist()
    finally:
        monkeypatch.undo()
        _compiled.cache_clear()


def test_rounding_both_sides():
    before = torch.randn(50, 128)
    after = before.bfloat16()
    after[3] *= 3
    with pytest.raises(ValueError, match="--round"):
        ks_scan(before, after)
    scan = ks_scan(before, after, round=True)
    assert np.flatnonzero(scan.statistic).tolist() == [3]


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
    assert set(everything) == set(stored.names) and sum(s.changed for s in everything.values()) == 2  # tied matrices are stored, and scanned, once
    for name, s in everything.items():
        assert s.rows == (1 if len(stored[name].shape) == 1 else stored[name].shape[0])


def test_a_hub_id_is_downloaded_whatever_dots_it_has(pair, monkeypatch):
    import huggingface_hub

    folders = {"org/Model-2.5B": pair / "base", "org/Model-2.5B-tuned": pair / "tuned"}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: str(folders[name]))
    assert sorted(scan_checkpoints("org/Model-2.5B", "org/Model-2.5B-tuned").select(0.05)) == [5, 9]
    with pytest.raises(FileNotFoundError, match="org/none is neither"):
        Checkpoint("org/none")


def test_columns_and_tensors_are_scipys(pair):
    model = tiny_model("llama", hidden=64, seed=1)
    save(model, pair / "other")
    a, b = (Checkpoint(pair / n) for n in ("base", "other"))
    columns, whole = ({s.name: s.scan for s in scan_all(a, b, per=p)} for p in ("column", "tensor"))
    name = "model.layers.0.mlp.up_proj.weight"
    x, y = a[name][:].numpy(), b[name][:].numpy()
    assert columns[name].statistic.tolist() == [stats.ks_2samp(x[:, j], y[:, j]).statistic for j in range(x.shape[1])]
    assert whole[name].statistic[0] == round(stats.ks_2samp(x.ravel(), y.ravel(), method="asymp").statistic * x.size) / x.size


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), d=st.integers(2, 60))
def test_criteria_are_what_they_say(seed, d):
    before, after = awkward("gaussian", (8, d), np.random.default_rng(seed))
    after[2] = before[2]
    delta = after - before
    value = {c: scan_rows(before, after, c, counts=np.arange(8)) for c in CRITERIA}
    assert np.allclose(value["l2"].statistic, np.sqrt((delta.astype(float) ** 2).sum(1)), rtol=1e-5)
    assert np.array_equal(value["max"].statistic.astype(np.float32), np.abs(delta).max(1))
    assert np.allclose(value["wasserstein"].statistic, [stats.wasserstein_distance(a, b) for a, b in zip(before, after)], rtol=1e-4, atol=1e-7)
    assert np.array_equal(value["ks"].statistic, ks_statistic(before, after))
    expected = [stats.binomtest(int((x > 0).sum()), int((x != 0).sum())).pvalue if (x != 0).any() else 1 for x in delta]
    assert np.allclose(value["sign"].pvalue, expected, rtol=1e-9)
    assert abs(value["lota"].statistic.sum() - 0.1 * delta.size) <= 1 + 1e-3 * delta.size
    for c, scan in value.items():
        assert len(scan.statistic) == 8 and (c == "frequency" or scan.statistic[2] == 0)
        if scan.pvalue is None:
            with pytest.raises(ValueError, match="top"):
                scan.select(0.05)
            assert scan.top(3).tolist() == np.lexsort((np.arange(8), -scan.statistic))[:3].tolist()


def test_the_null_moves_what_moved_by_the_common_amount():
    rng = np.random.default_rng(0)
    before = rng.normal(size=(300, 128)) * rng.choice([0.01, 1.0], (300, 1))
    after = before + 0.1 * rng.normal(size=before.shape)
    after[::3] = before[::3]
    real, null = ks_scan(before, after), equal_move_null(before, after)
    assert (null.statistic[::3] == 0).all() and set(real.select(0.05)) == set(null.select(0.05))  # the small rows that moved


def test_bad_criteria():
    x = np.zeros((3, 4))
    for options, words in (
        ({"criterion": "l3"}, "choose ks"),
        ({"criterion": "frequency"}, "needs counts"),
        ({"criterion": "lota", "lota_share": 2}, "lota_share is 2"),
    ):
        with pytest.raises(ValueError, match=words):
            scan_rows(x, x, **options)


STREAM = """
import sys, threading, time
from pathlib import Path
import numpy, torch, safetensors.torch, numba, scipy.stats, tqdm
from kslottery.checkpoints import scan_checkpoints
from kslottery.ks import ks_scan
anonymous = lambda: int(next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("RssAnon")).split()[1]) / 1024
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
        [sys.executable, "-c", STREAM, str(tmp_path / "base.safetensors"), str(tmp_path / "tuned.safetensors")], capture_output=True, text=True, check=True
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
    status, said, error = kslottery("scan", pair / "base", pair / "tuned", "--out", out, "--all", "--counts", pair / "counts.json")
    assert status == 0, error
    assert "2 of 64 rows of model.embed_tokens.weight" in said
    ticket = Ticket.load(out)
    assert sorted(ticket.ids) == [5, 9] and ticket.info["alpha"] == 0.05 and len(ticket.scan.statistic) == 64
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
    status, said, error = kslottery("scan", pair / "base", pair / "tuned", "--criterion", criterion, "--top-k", 2, "--json", "--out", pair / "t")
    assert status == 0, error
    assert sorted(json.loads(said)["ids"]) == [5, 9] and Ticket.load(pair / "t").scan.criterion == criterion


def test_the_command_on_another_tensor_and_with_nothing_found(pair):
    status, said, error = kslottery("scan", pair / "base", pair / "tuned", "--tensor", "lm_head.weight", "--out", pair / "t")
    assert status == 0 and "0 of 64 rows" in said and "top-k" in said, error
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
        status, said, error = kslottery("scan", pair / "base", *words, "--out", pair / "t")
        assert status == 2 and sentence in error and "Traceback" not in error and len(error.strip().splitlines()[-1]) > 20, (words, error)
        assert not (pair / "t").exists() and not list(pair.glob(".t-*"))
    assert kslottery("scan", pair / "base", half, "--round", "--out", pair / "t")[0] == 0
    status, _, error = kslottery("scan", pair / "base", pair / "tuned", "--out", pair / "base")
    assert status == 2 and "something else" in error and Checkpoint(pair / "base").names


def test_ctrl_c_writes_nothing(tmp_path):
    weight = torch.randn(60_000, 1024).bfloat16()
    save_file({"model.embed_tokens.weight": weight}, tmp_path / "a.safetensors")
    save_file({"model.embed_tokens.weight": weight * 1.1}, tmp_path / "b.safetensors")
    hearing = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "  # a shell without job control starts its children deaf to it
    command = [sys.executable, "-c", hearing + "from kslottery.cli import main; main()", "scan", "a.safetensors", "b.safetensors", "--out", "t"]
    side = tmp_path / "progress"
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env={**os.environ, "KSLOTTERY_PROGRESS": str(side)})
    for _ in range(600):
        if side.exists() and "KS scan" in side.read_text():
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "interrupted; nothing was written" in error and not (tmp_path / "t").exists()


@pytest.mark.gpu
def test_the_torch_engine_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    before, after = awkward("gaussian", (500, 4096), np.random.default_rng(0))
    expected = ks_scan(before, after)
    assert np.array_equal(ks_scan(torch.tensor(before).cuda(), torch.tensor(after).cuda()).statistic, expected.statistic)
    assert np.array_equal(ks_scan(before, after, device="cuda").statistic, expected.statistic)
