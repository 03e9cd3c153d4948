"""Scans of checkpoints and the tickets made of them: every layout, every matrix; memory; faults."""

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy import stats
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

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


def vocabulary(tokens, folder):
    "A tokenizer of these tokens, in this order, kept in a folder."
    own = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0]))
    PreTrainedTokenizerFast(tokenizer_object=own).save_pretrained(folder)


def embedding(folder, rows, tokens=()):
    "A checkpoint that is nothing but an embedding."
    folder.mkdir(exist_ok=True)
    save_file({"model.embed_tokens.weight": rows.contiguous()}, folder / "model.safetensors")
    if tokens:
        vocabulary(tokens, folder)
    return folder


@pytest.fixture
def resized(pair):
    "The tuned checkpoint once more: in another order, with three new tokens, without t7, and padded to 72 rows."
    TOY.save_pretrained(pair / "base")
    TOY.save_pretrained(pair / "tuned")
    order = [i for i in torch.randperm(64, generator=torch.Generator().manual_seed(1)).tolist() if i != 7]
    tokens = ["<one>", *(f"t{i}" for i in order), "two, three", "日本"]
    model, tuned = tiny_model("llama", vocabulary=72, hidden=64, seed=5), tiny_model("llama", hidden=64)
    tuned.load_state_dict({name: Checkpoint(pair / "tuned")[name][:] for name in Checkpoint(pair / "tuned").names})
    state = {name: x.clone() for name, x in tuned.state_dict().items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = model.state_dict()[name].clone()
        state[name][1:64] = tuned.state_dict()[name][order]
    model.load_state_dict(state)
    vocabulary(tokens, save(model, pair / "resized"))
    return pair


def test_two_vocabularies_are_matched_by_token_and_the_ids_are_the_bases(resized):
    plain = scan_checkpoints(resized / "base", resized / "tuned")
    assert plain.match is None and plain.note == ""
    scan = scan_checkpoints(resized / "base", resized / "resized")
    assert np.array_equal(scan.statistic, plain.statistic) and np.array_equal(scan.pvalue, plain.pvalue)
    match = scan.match
    assert match.by == "token" and (match.new, match.gone, match.padding) == ([0, 64, 65], [7], 0)
    assert "63 of 64 rows are matched by token" in scan.note and "swapped" not in scan.note
    assert "3 tokens (<one>, two, three, 日本)" in scan.note and "Only in the base: 1 token (t7)" in scan.note
    assert scan.apart == [] and {s.name for s in scan_all(scan.base, scan.tuned)} == set(scan.base.names)
    assert sum(s.changed for s in scan_all(scan.base, scan.tuned)) == 2
    back = scan_checkpoints(resized / "resized", resized / "base")
    assert (
        back.match.padding == 6
        and "swapped" not in back.note
        and sorted(back.ticket().provenance.tokens) == ["t5", "t9"]
    )


def test_a_ticket_of_two_vocabularies_is_merged_into_its_base(resized):
    base, out = resized / "base", resized / "t"
    status, said, error = invoke("scan", base, resized / "resized", "--out", out, "--all", "--json")
    record = json.loads(said)
    assert status == 0 and sorted(record["ids"]) == [5, 9] and record["changed"] == 2, error
    assert record["matched"] == {"by": "token", "new": [0, 64, 65], "gone": [7], "padding": 0}
    ticket = Ticket.load(out)
    assert (ticket.provenance.V, ticket.provenance.changed) == (64, 2)
    status, _, error = invoke("merge", out, "--out", resized / "m")
    assert status == 0, error
    merged, tuned = (Checkpoint(resized / name) for name in ("m", "tuned"))
    assert all(torch.equal(merged[name][:], tuned[name][:]) for name in tuned.names)


@pytest.mark.parametrize("lacking", ["base", "resized"])
def test_without_a_tokenizer_rows_are_matched_by_number_and_that_is_said(resized, lacking):
    for file in (resized / lacking).glob("tokenizer*"):
        file.unlink()
    with torch.no_grad():
        moved = tiny_model("llama", vocabulary=72, hidden=64)
        moved.load_state_dict({n: Checkpoint(resized / "resized")[n][:] for n in Checkpoint(resized / "resized").names})
        moved.model.embed_tokens.weight[:64] = Checkpoint(resized / "tuned")["model.embed_tokens.weight"][:]
    save(moved, resized / "resized")
    scan = scan_checkpoints(resized / "base", resized / "resized")
    assert sorted(scan.select(0.05)) == [5, 9] and scan.match.by == "row"
    assert f"64 of 64 rows are matched by number, for want of a tokenizer beside {resized / lacking}." in scan.note
    assert scan.match.new == (list(range(64, 72)) if lacking == "resized" else [64, 65])


def test_padding_is_left_out(tmp_path):
    rows = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    tokens = [f"w{i}" for i in range(60)]
    plain = embedding(tmp_path / "plain", rows[:60], tokens)
    wide = embedding(tmp_path / "wide", torch.cat([rows[:60], 9 * rows[60:]]), tokens)
    there, back = scan_checkpoints(plain, wide), scan_checkpoints(wide, plain)
    assert not there.changed.any() and not back.changed.any() and (there.match.new, back.match.gone) == ([], [])
    assert "differ in their padding" in there.note and "padding: 4 rows" in back.note and "swapped" not in back.note
    assert back.table()["state"].tolist() == ["unchanged"] * 60 + ["padding"] * 4
    more = embedding(tmp_path / "more", torch.cat([rows[:60], 9 * rows[60:]]), [*tokens, "<new>"])
    assert scan_checkpoints(wide, more).match.new == [60]  # a token that took the place of padding
    assert "swapped" in scan_checkpoints(more, wide).note
    strange = embedding(tmp_path / "strange", rows, [f"x{i}" for i in range(64)])
    with pytest.raises(ValueError, match="no token in common"):
        scan_checkpoints(plain, strange)


def test_a_missing_head_or_prefix_is_no_obstacle(resized):
    both = Checkpoint(resized / "tuned")
    bare = {name.removeprefix("model."): both[name][:].clone() for name in both.names if name != "lm_head.weight"}
    save_file(bare, resized / "bare.safetensors")
    expected = scan_checkpoints(resized / "base", resized / "tuned")
    for pair in ((resized / "base", resized / "bare.safetensors"), (resized / "bare.safetensors", resized / "base")):
        scan = scan_checkpoints(*pair)
        assert np.array_equal(scan.statistic, expected.statistic) and scan.apart == ["lm_head.weight"]
        assert "1 tensor (lm_head.weight)" in scan.note
        assert len(scan_all(*pair)) == len(both.names) - 1
    with pytest.raises(ValueError, match="no tensor lm_head"):
        scan_checkpoints(resized / "base", resized / "bare.safetensors", tensor="lm_head.weight")


def test_a_tensor_that_is_named_is_enough(resized):
    for name in ("base", "resized"):
        (resized / name / "tokenizer.json").write_text('{"model": [')
    inner = "model.layers.0.mlp.up_proj.weight"  # its rows are no tokens: no tokenizer is asked
    ticket = scan_checkpoints(resized / "base", resized / "resized", tensor=inner).ticket(top_k=2)
    assert ticket.provenance.tokens == (None, None) and ticket.rows is None
    wide = {"inner": torch.zeros(4, 8)}, {"inner": torch.zeros(6, 8)}
    for state, file in zip(wide, ("a.safetensors", "b.safetensors")):
        save_file(state, resized / file)
    with pytest.raises(ValueError, match=r"shape \(4, 8\).* and \(6, 8\)"):
        scan_checkpoints(resized / "a.safetensors", resized / "b.safetensors", tensor="inner")
    vocabulary("abcdef", resized / "words")  # whoever names the tokenizer says that the rows are tokens
    scan = scan_checkpoints(
        Checkpoint(resized / "a.safetensors", resized / "words"), resized / "b.safetensors", tensor="inner"
    )
    assert scan.match.order.tolist() == [0, 1, 2, 3] and scan.tokenizer().get_vocab()["f"] == 5


def test_a_tokenizer_can_be_named(resized):
    alone = resized / "alone.safetensors"
    shutil.copy(resized / "base" / "model.safetensors", alone)
    assert scan_checkpoints(alone, resized / "resized").match.by == "row"
    scan = scan_checkpoints(Checkpoint(alone, resized / "base" / "tokenizer.json"), resized / "resized")
    assert scan.match.by == "token"
    words = "scan", alone, resized / "resized", "--out", resized / "t", "--json", "--tokenizer", resized / "base"
    record = json.loads(invoke(*words)[1])
    assert record["matched"]["by"] == "token" and sorted(record["tokens"]) == ["t5", "t9"]


def test_the_whole_scan_as_csv(resized):
    counts = resized / "counts.json"
    counts.write_text(json.dumps(list(range(64))))
    words = "scan", resized / "base", resized / "resized", "--out", resized / "t", "--csv", resized / "s.csv"
    status, said, error = invoke(*words, "--counts", counts)
    assert status == 0 and str(resized / "s.csv") in said, error
    assert "2 of 64 rows changed at all" in said and "at another id" in said
    with open(resized / "s.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    scan = Ticket.load(resized / "t").scan
    assert list(rows[0]) == ["id", "token", "D", "p", "count", "state", "tuned_id"] and len(rows) == 67
    assert [int(row["id"]) for row in rows[:64]] == scan.top(64).tolist()
    assert all(float(row["D"]) == scan.statistic[int(row["id"])] for row in rows[:64])
    assert all(row["token"] == f"t{row['id']}" and row["count"] == row["id"] for row in rows[:64])
    assert [row["state"] for row in rows[:3]] == ["changed", "changed", "unchanged"]
    assert {row["token"]: row["state"] for row in rows}["t7"] == "gone"
    assert [(row["token"], row["id"], row["tuned_id"]) for row in rows[64:]] == [
        ("<one>", "", "0"),
        ("two, three", "", "64"),
        ("日本", "", "65"),
    ]
    plain = scan_checkpoints(resized / "base", resized / "tuned", criterion="l2").table()
    assert list(plain) == ["id", "token", "l2", "state"] and sorted(plain["token"][:2]) == ["t5", "t9"]


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_all_that_is_written_can_be_read_by_those_whom_the_umask_lets(resized, umask):
    was, group = os.umask(umask), resized / "group"
    try:
        group.mkdir()
        group.chmod(0o2770)  # what is made here belongs to the folder's group
        assert (
            invoke("scan", resized / "base", resized / "tuned", "--out", group / "t", "--csv", group / "s.csv")[0] == 0
        )
        assert invoke("merge", group / "t", "--out", group / "m")[0] == 0
        assert invoke("peft", group / "t", "--out", group / "a")[0] == 0
        assert invoke("card", group / "t", "--refresh")[0] == 0
    finally:
        os.umask(was)
    made = list(group.rglob("*"))
    assert len(made) > 15 and {p.stat().st_mode & 0o777 for p in made if p.is_file()} == {0o666 & ~umask}
    assert {p.stat().st_mode & 0o2777 for p in made if p.is_dir()} == {0o2777 & ~umask}


def test_a_scan_of_tied_checkpoints_is_an_adapter_of_both_ends(tmp_path):
    from peft import PeftModel

    base, tuned = tiny_model("gpt2", hidden=64), tiny_model("gpt2", hidden=64)
    with torch.no_grad():
        tuned.get_input_embeddings().weight[[5, 9]] *= 4
    save(base, tmp_path / "base")
    save(tuned, tmp_path / "tuned")
    state = Checkpoint(tmp_path / "base")  # as the first GPT-2 is stored: without its prefix
    bare = {name.removeprefix("transformer."): state[name][:].clone() for name in state.names}
    save_file(bare, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    ticket = scan_checkpoints(tmp_path / "base", tmp_path / "tuned").ticket()
    assert ticket.provenance.tensor == "wte.weight"
    assert (ticket.provenance.embedding_module, ticket.provenance.output_module) == ("transformer.wte", "lm_head")
    ticket.save(tmp_path / "t")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "t"
        ).eval()
        x = torch.tensor([[1, 5, 9, 20]])
        assert torch.allclose(model(x).logits, tuned(x).logits, atol=1e-6)


def test_identical_checkpoints_are_called_that(pair):
    status, said, error = invoke("scan", pair / "base", pair / "base", "--top-k", 2, "--out", pair / "t")
    assert status == 0 and "both checkpoints hold the same, and no row is a winner" in said, error
    status, said, error = invoke("scan", pair / "base", pair / "base", "--out", pair / "t")
    assert status == 0 and "both checkpoints hold the same matrix" in said and "lr_embed" not in said, error


def test_what_is_printed_fits_a_terminal(tmp_path):
    rows = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    tokens = ["a" * 300, "語" * 90, "\x1b[2J", "tab\tstop", *(f"w{i}" for i in range(20))]
    base = embedding(tmp_path / "base", rows, tokens)
    tuned = embedding(tmp_path / "tuned", rows * torch.tensor([9.0] * 4 + [1.0] * 20)[:, None], tokens)
    status, said, error = invoke("scan", base, tuned, "--out", tmp_path / "t")
    table = said.split("\n")[2:]
    assert status == 0 and "\x1b" not in said and "\t" not in said and "…" in said, error
    wide = [len(line) + sum(c == "語" for c in line) for line in table if "e-" in line]
    assert len(wide) == 4 and set(wide) == {80}
    assert "array" not in repr(Ticket.load(tmp_path / "t")) + repr(scan_checkpoints(base, tuned))


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
        (lambda: scan_checkpoints(pair / "base", pair / "tuned", counts=[1, 2]), "each of the 64 rows .*not shape"),
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


def peak_of_scan(tmp_path, V, d, shuffled=False):
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(V, d, generator=generator) * 0.02).bfloat16()
    order = torch.randperm(V, generator=generator) if shuffled else torch.arange(V)
    embedding(tmp_path / "base", weight, [f"t{i}" for i in range(V)] if shuffled else ())
    weight[: V // 10] *= 1.5
    embedding(tmp_path / "tuned", weight[order], [f"t{i}" for i in order.tolist()] if shuffled else ())
    del weight
    said = subprocess.run(
        [sys.executable, "-c", STREAM, str(tmp_path / "base"), str(tmp_path / "tuned")],
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
@pytest.mark.parametrize("shuffled", [False, True])
def test_streaming_two_llama_3_embeddings(tmp_path, shuffled):
    "Also if the tokens stand in another order: rows are picked out of the files chunk by chunk."
    peak, won = peak_of_scan(tmp_path, 128_256, 4096, shuffled)
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
    save_file({**state, "model.embed_tokens.weight": torch.zeros(64, 60)}, narrow)
    TOY.save_pretrained(pair / "base")
    shutil.copytree(pair / "tuned", pair / "wordy")
    (pair / "wordy" / "tokenizer.json").write_text('{"model": [')
    (pair / "lora").mkdir()
    (pair / "lora" / "adapter_config.json").write_text("{}")
    save_file({"lora_A": torch.zeros(2, 2)}, pair / "lora" / "adapter_model.safetensors")
    scan_checkpoints(pair / "base", pair / "tuned").ticket().save(pair / "won")
    save_file({"x": torch.zeros(2, 2)}, pair / "strange.safetensors")
    (pair / "pickled").mkdir()
    torch.save(state, pair / "pickled" / "pytorch_model.bin")
    cases = {
        (pair / "missing.safetensors",): "does not exist",
        (cut,): "is damaged",
        (nan,): "row 7 of after holds NaN",
        (narrow,): "(64, 60)",
        (half,): "--round",
        (pair / "pickled",): "not opened",
        (pair / "tuned", "--alpha", "2"): "alpha is 2",
        (pair / "tuned", "--criterion", "l2"): "take, with --top-k",
        (pair / "tuned", "--criterion", "l3", "--top-k", "2"): "choose ks",
        (pair / "tuned", "--tensor", "wte"): "no tensor wte",
        (pair / "tuned", "--top-k", "99"): "top(99)",
        (pair / "tuned", "--tensor", "model.norm.weight"): "name a matrix",
        (pair / "tuned", "--csv", "table.txt"): "ends in .csv",
        (pair / "tuned", "--csv", pair / "nowhere" / "table.csv"): "folder that exists",
        (pair / "lora",): "is a PEFT adapter, not a checkpoint",
        (pair / "won",): "is a ticket, not a checkpoint",
        (pair / "wordy",): "tokenizer of " + str(pair / "wordy") + " cannot be loaded",
        (pair / "tuned", "--tokenizer", pair / "wordy"): "cannot be loaded",
        (pair / "strange.safetensors",): "no tensor in common",
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


def crafted(path, kind, shape, size):
    "A safetensors file of one tensor, of any dtype and shape."
    name = "model.embed_tokens.weight"
    header = json.dumps({name: {"dtype": kind, "shape": shape, "data_offsets": [0, size]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))


INDEX = "model.safetensors.index.json"
ROWS = "model.embed_tokens.weight"


@pytest.mark.parametrize(
    "whole, sentence",
    [
        ("{}", "its weight_map names no file"),
        ("[]", "holds list, not dict"),
        ("{", "is damaged"),
        ('{"a":' * 100_000, "is damaged"),
        ("\xff", "is damaged"),
        ('{"weight_map": null}', "names no file"),
        ('{"weight_map": {}}', "names no file"),
        *(
            (json.dumps({"weight_map": {ROWS: name}}), "only safetensors files inside its folder")
            for name in (
                "../tuned/model.safetensors",
                "sub/../../x.safetensors",
                "/etc/passwd",
                "config.json",
                "",
                ["a"],
            )
        ),
        (json.dumps({"weight_map": {ROWS: None}}), "only safetensors files inside its folder"),
        (json.dumps({"weight_map": {ROWS: "x\0y.safetensors"}}), "lacks .* is the copy complete"),
        (json.dumps({"weight_map": {ROWS: "away.safetensors"}}), "lacks .*away.* is the copy complete"),
        (json.dumps({"weight_map": {ROWS: "pipe.safetensors"}}), "is a pipe"),
    ],
)
def test_an_index_names_files_in_its_folder(tmp_path, whole, sentence):
    base = embedding(tmp_path / "base", torch.ones(4, 8))
    embedding(tmp_path / "b", torch.ones(4, 8))
    (base / INDEX).write_bytes(whole.encode("latin-1"))
    os.mkfifo(base / "pipe.safetensors")
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        Checkpoint(base)


def test_the_files_of_an_index_may_be_links_out_of_the_folder_as_in_the_cache_of_the_hub(pair):
    TOY.save_pretrained(pair / "base")
    save(tiny_model("llama", hidden=64), pair / "shards", max_shard_size="40KB")
    blobs, snapshot = pair / "blobs", pair / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for file in (*(pair / "shards").iterdir(), *(pair / "base").glob("tokenizer*")):
        file.rename(blobs / file.name[::-1])
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name[::-1]}")
    scan = scan_checkpoints(snapshot, pair / "tuned")
    assert sorted(scan.select(0.05)) == [5, 9] and scan.base.folder == snapshot and scan.tokenizer() is not None
    deep = json.loads((snapshot / INDEX).read_text())["weight_map"]  # a folder in the folder is no way out
    (snapshot / "sub").mkdir()
    for name in set(deep.values()):
        (snapshot / name).rename(snapshot / "sub" / name)
        (snapshot / "sub" / name).unlink()
        (snapshot / "sub" / name).symlink_to(f"../../../blobs/{name[::-1]}")
    (snapshot / INDEX).unlink()
    (snapshot / INDEX).write_text(json.dumps({"weight_map": {k: f"sub/{v}" for k, v in deep.items()}}))
    assert Checkpoint(snapshot).folder == snapshot and Checkpoint(snapshot).names == scan.base.names


@pytest.mark.parametrize(
    "file, whole, sentence",
    [
        ("config.json", "[]", "holds list, not dict"),
        ("config.json", "{", "config.json is damaged"),
        ("config.json", "[" * 100_000, "config.json is damaged"),
        ("config.json", '{"model_type": ["llama"]}', "its model_type is"),
        ("config.json", '{"tie_word_embeddings": "no"}', "its tie_word_embeddings is 'no'"),
        ("config.json", '{"architectures": [1]}', "architectures are no names"),
        ("config.json", "\xff", "config.json is damaged"),
        ("tokenizer.json", "{}", "tokenizer of .* cannot be loaded"),
        ("model.safetensors", "", "model.safetensors is damaged"),
        ("model.safetensors", "GGUF\3\0\0\0" * 50, "GGUF, a pickle"),
        ("model.safetensors", "\xff" * 8, "is damaged"),
        ("model.safetensors", "\2\0\0\0\0\0\0\0{}", "holds no tensor"),
    ],
)
def test_a_damaged_file_is_one_sentence_before_the_work(tmp_path, file, whole, sentence, monkeypatch):
    base, tuned = (embedding(tmp_path / name, torch.ones(4, 8)) for name in ("base", "tuned"))
    (base / file).write_bytes(whole.encode("latin-1"))
    monkeypatch.setattr("kslottery.checkpoints.scan_rows", lambda *_, **__: 1 / 0)
    with pytest.raises(ValueError, match=sentence) as caught:
        scan_checkpoints(base, tuned)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 900


@pytest.mark.parametrize(
    "kind, shape, size, sentence",
    [
        ("F32", [0, 16], 0, r"not shape \(0, 16\)"),
        ("F32", [16, 0], 0, r"not shape \(16, 0\)"),
        ("F32", [16], 64, "name a matrix"),
        ("F32", [], 4, "name a matrix"),
        ("F32", [2, 4, 2], 64, "name a matrix"),
        ("F8_E4M3", [4, 4], 16, "floating-point rows, not F8_E4M3"),
        ("F4", [4, 4], 8, "floating-point rows, not F4"),
        ("I64", [2, 4], 64, "floating-point rows, not I64"),
        ("I4", [4, 4], 8, "is damaged .*I4"),
    ],
)
def test_shapes_and_dtypes_that_are_not_scanned(tmp_path, kind, shape, size, sentence):
    files = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    for file in files:
        crafted(file, kind, shape, size)
    for criterion in CRITERIA:
        with pytest.raises((ValueError, TypeError), match=sentence):
            scan_checkpoints(
                tmp_path / "a.safetensors", tmp_path / "b.safetensors", criterion=criterion, counts=[1] * 4
            )
    words = "scan", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--out", tmp_path / "t"
    assert invoke(*words)[0] == 2 and not (tmp_path / "t").exists()


def test_a_tensor_is_there_once(pair):
    state = {name: Checkpoint(pair / "base")[name][:].clone() for name in Checkpoint(pair / "base").names}
    for name, some in (("a", state), ("b", {ROWS: state[ROWS] + 1})):
        save_file(some, pair / "base" / f"{name}.safetensors")
    assert torch.equal(
        Checkpoint(pair / "base")[ROWS][:], state[ROWS]
    )  # as transformers reads it: the one of this name
    (pair / "base" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds \['model.embed_tokens.weight'\] in b.safetensors and once more"):
        Checkpoint(pair / "base")


def test_a_number_is_scanned_with_all_the_others(pair):
    for name in ("base", "tuned"):  # as CLIP keeps its scale
        file = pair / name / "model.safetensors"
        state = {n: Checkpoint(file)[n][:].clone() for n in Checkpoint(file).names}
        save_file(state | {"scale": torch.tensor(float(name == "tuned"))}, file)
    for per in ("row", "column", "tensor"):
        scale = {s.name: s for s in scan_all(pair / "base", pair / "tuned", per=per)}["scale"]
        assert (scale.rows, scale.changed, scale.moved) == (1, 1, 0)


@pytest.mark.parametrize("device", ["cuda:99", "x", "meta", "hpu"])
def test_a_device_that_is_not_here(pair, device):
    for criterion in ("ks", "l2"):
        words = "--device", device, "--criterion", criterion, "--top-k", "2", "--out", pair / "t"
        status, _, error = invoke("scan", pair / "base", pair / "tuned", *words)
        assert status == 2 and f"device is '{device}'" in error and not (pair / "t").exists()


def test_a_configuration_may_leave_open_what_its_architecture_does(pair):
    about = pair / "base" / "config.json"
    for stated, tied in (
        ({"model_type": "gpt2"}, True),
        ({"model_type": "llama"}, False),
        ({"model_type": "nougat"}, False),  # its defaults are not enough for it
        ({"model_type": "unheard of", "limit": [0.0, float("inf")]}, False),  # some write an infinity
        ({"model_type": None, "architectures": ["Unheard", "of"]}, False),
    ):
        about.write_text(json.dumps(stated))
        assert scan_checkpoints(pair / "base", pair / "tuned").ticket().provenance.tied_embeddings is tied


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
    assert process.returncode == 130 and "nothing is half-written" in error and not (tmp_path / "t").exists()
