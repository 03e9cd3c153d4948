"""A ticket in the forms of other programs: trainable tokens and LoRA in PEFT, GGUF in llama.cpp; and the way back."""

import copy
import json
import struct
import warnings
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import engines
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from safetensors.torch import load_file, save_file

from conftest import ARCHITECTURES, ROOT, TIED, invoke, talker, tiny_model
from kslottery.adapters import (
    _ENGINE_NAMES,
    RANKS,
    lora_rank,
    module_names,
    obstacle,
    read_adapter,
    write_adapter,
    write_gguf,
)
from kslottery.rows import TunedRows
from kslottery.ticket import Provenance, Ticket
from kslottery.tuning import Recipe
from test_commands import base_in, ticket_in
from test_ticket import GREEDY, TOKENIZER, X, bare, merged, ticket_for


def natural(kind):
    "The mode that PEFT reads a model's rows in."
    return "shared" if kind in TIED else "input_only"


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_plain_peft_loads_it_and_the_way_back(kind, tmp_path):
    "Ticket -> plain PEFT -> what PEFT saves -> ticket: the same rows and the same greedy text everywhere."
    model = talker(kind)
    ticket = ticket_for(model, mode=natural(kind))
    ticket.save(tmp_path / "t")
    ticket.save_peft(tmp_path / "plain")
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
    back = Ticket.from_peft(tmp_path / "saved", model, TOKENIZER)
    back.check(model, TOKENIZER)
    assert back.rows.mode == back.mode == natural(kind) and back.provenance.model == "tiny"
    assert torch.equal(back.rows.ids, ticket.rows.ids) and torch.equal(back.rows.weight, ticket.rows.weight)
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
    assert ticket.ids.tolist() == [9, 3, 7] and ticket.provenance.tokens == ("t9", "t3", "t7")
    assert not torch.equal(adapted.eval().generate(input_ids=X, **GREEDY), talker(kind).generate(X, **GREEDY))
    assert torch.equal(adapted.generate(input_ids=X, **GREEDY), merged(ticket.rows, talker(kind)).generate(X, **GREEDY))


def test_what_is_stored_is_k_by_d(tmp_path):
    "Known trouble: PEFT's automatic choice can store the whole embedding in the adapter (PRs 1383 and 2649)."
    model = tiny_model("llama", vocabulary=4096)
    ticket = bare(model, [9, 4], TunedRows([9, 4], torch.ones(2, 16)))
    ticket.save(tmp_path / "t")
    ticket.save_peft(tmp_path / "a")
    assert [v.shape for v in load_file(tmp_path / "t" / "adapter_model.safetensors").values()] == [(2, 16)]
    assert {p.name for p in (tmp_path / "a").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    for place in ("t", "a"):
        assert sum(p.stat().st_size for p in (tmp_path / place).iterdir()) < 4096 * 16 * 4 / 10


def trained(folder, config, **model):
    "An adapter as PEFT makes it, saved."
    get_peft_model(tiny_model("llama", **model), config).save_pretrained(folder, save_embedding_layers=False)


def test_adapters_that_are_no_tickets(tmp_path):
    model = tiny_model("llama")
    at = lambda *modules, **more: LoraConfig(r=4, target_modules=[*modules], **{"init_lora_weights": False} | more)
    for name, config, more in (
        ("queries", at("q_proj"), {}),
        ("dense", at("embed_tokens"), {}),
        ("fresh", at("embed_tokens", init_lora_weights=True), {}),
        ("patterns", at("embed_tokens", rank_pattern={"embed_tokens": 2}), {}),
        ("dora", at("embed_tokens", use_dora=True), {}),
        ("queries too", at("embed_tokens", "q_proj"), {}),
        ("whole head", at("embed_tokens", modules_to_save=["lm_head"]), {}),
        ("invoked", at("embed_tokens"), {}),
        ("elsewhere", TrainableTokensConfig(token_indices=[3], target_modules=["q_proj"]), {}),
        ("wide", TrainableTokensConfig(token_indices=[3]), {"hidden": 32}),
        ("far", TrainableTokensConfig(token_indices=[70]), {"vocabulary": 80}),
        ("broad", at("embed_tokens"), {"vocabulary": 80}),
    ):
        trained(tmp_path / name, config, **more)
    for name in ("queries too", "whole head", "invoked", "dora"):  # the configuration alone says so
        file = tmp_path / name / "adapter_model.safetensors"
        held = {n: v for n, v in load_file(file).items() if "lora_embedding" in n}
        held["base_model.model.model.embed_tokens.lora_embedding_A"][:, 4:] = 0
        save_file(held, file, {"format": "pt"})
    config = tmp_path / "invoked" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"alora_invocation_tokens": [3]}))
    ticket_for(model).save_peft(tmp_path / "cut")
    whole = (tmp_path / "cut" / "adapter_model.safetensors").read_bytes()
    (tmp_path / "cut" / "adapter_model.safetensors").write_bytes(whole[: len(whole) // 2])
    for folder, error, words in (
        ("queries", ValueError, "q_proj.*no choice of rows; audit it as an adapter"),
        ("dense", ValueError, "changes 64 of 64 rows with a LoRA of rank 4: .*audit it"),
        ("fresh", ValueError, "changes 0 of 64 rows"),
        ("patterns", ValueError, "holds rank_pattern.*audit it"),
        ("queries too", ValueError, "q_proj and holds other tensors: .*audit it"),
        ("whole head", ValueError, "holds modules_to_save:.*audit it"),
        ("invoked", ValueError, "holds alora_invocation_tokens:.*audit it"),
        ("dora", ValueError, "holds use_dora:.*audit it"),
        ("elsewhere", ValueError, "q_proj.*audit it"),
        ("wide", ValueError, "64 x 16"),
        ("far", ValueError, "70.*64 x 16"),
        ("broad", ValueError, "another model.*64 x 16"),
        ("cut", ValueError, "damaged"),
        ("none", FileNotFoundError, "adapter_config.json"),
    ):
        with pytest.raises(error, match=words):
            Ticket.from_peft(tmp_path / folder, model, TOKENIZER)


@pytest.mark.parametrize("kind, ids, reason", [("gpt2", (9, 4), "ties"), ("llama", (), "empty")])
def test_what_peft_cannot_hold_is_named_and_not_written(kind, ids, reason, tmp_path):
    ticket_for(tiny_model(kind), ids).save(tmp_path / "t")
    assert reason in json.loads((tmp_path / "t" / "ticket.json").read_text())["peft"]
    assert not list((tmp_path / "t").glob("adapter*")) and len(Ticket.load(tmp_path / "t").ids) == len(ids)
    with pytest.raises(ValueError, match=f"no adapter of form trainable_tokens can hold.*{reason}") as refused:
        Ticket.load(tmp_path / "t").save_peft(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    offered = "--as lora" in str(refused.value)  # where it can hold it, the sentence and the card say so
    assert offered == ("--as lora" in (tmp_path / "t" / "README.md").read_text()) == (kind == "gpt2")


def moved(model, k=5):
    "Rows of a ticket, and the model's own, of the usual size."
    own = TunedRows.of(model, range(3, 3 + 4 * k, 4))
    return TunedRows(own.ids, own.weight + 0.02 * torch.randn(k, 16, generator=torch.Generator().manual_seed(1)))


def ends(kind, mode):
    "A model, rows of it that read and score as the mode says, and where they came from."
    model = talker(kind)
    own = TunedRows.of(model, range(3, 23, 4), mode)
    moved = own.weight.detach() + 0.02 * torch.randn(own.weight.shape, generator=torch.Generator().manual_seed(1))
    facts = Provenance.of(model, TOKENIZER, own.ids.tolist())
    if mode != "input_only":
        facts = replace(facts, output_module=module_names(model)[1])
    return model, TunedRows(own.ids, moved, mode), facts


MODES = [
    (kind, mode)
    for kind in ARCHITECTURES
    for mode in (("input_only", "shared") if kind in TIED else ("input_only", "head", "both"))
]


@pytest.mark.parametrize("kind, mode", MODES)
def test_every_mode_as_a_lora_and_back(kind, mode, tmp_path):
    "Plain PEFT says what the rows say, in 32 and in 16 bits; the ends of a tied model stay apart; the way back."
    for dtype, limit in ((torch.float32, 2e-5), (torch.bfloat16, 0.05)):
        model, rows, facts = ends(kind, mode)
        model, place = model.to(dtype), tmp_path / str(dtype)
        place.mkdir()
        write_adapter(place, facts, rows, model)
        with warnings.catch_warnings(action="ignore"):  # of tied models
            adapted = PeftModel.from_pretrained(copy.deepcopy(model), place).eval()
        x = torch.cat([X, rows.ids.repeat(2, 1)], 1)
        with torch.no_grad():
            with rows.applied(model):
                ours = model(x).logits
            theirs = adapted(x).logits
            effect = (model(x).logits - ours).abs().max()
        # in 16 bits the input is added in fp32 and rounded once, as ours; the head adds logits, and rounds those
        exact = dtype != torch.float32 and mode == "input_only"
        assert torch.allclose(theirs, ours, rtol=0, atol=0 if exact else limit) and effect > 20 * limit * (limit < 0.01)
        ids, again, _ = read_adapter(place, model)
        assert again.mode == mode and ids == rows.ids.tolist()
        assert torch.allclose(again.weight, rows.weight, rtol=0, atol=3e-7)


@pytest.mark.parametrize(
    "kind, mode", [("llama", "head"), ("qwen2", "both"), ("gpt2", "shared"), ("llama", "input_only")]
)
def test_a_ticket_folder_and_its_lora_at_either_end(kind, mode, tmp_path):
    model, rows, _ = ends(kind, mode)
    ticket = bare(model, rows.ids.tolist()[::-1], rows, recipe=Recipe(mode=mode))
    ticket.save(tmp_path / "t")
    ticket.save_peft(tmp_path / "lora", "lora", model=model, tokenizer=TOKENIZER)
    for folder, limit in (("t", 0), ("lora", 3e-7)):
        with warnings.catch_warnings(action="ignore"):  # of tied models
            adapted = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / folder).eval()
        with torch.no_grad(), rows.applied(model):
            assert torch.allclose(adapted(X).logits, model(X).logits, rtol=0, atol=2e-5)
        back = Ticket.from_peft(tmp_path / folder, model, TOKENIZER)
        assert back.mode == mode and back.ids.tolist() == rows.ids.tolist()
        assert torch.allclose(back.rows.weight, rows.weight, rtol=0, atol=limit)
        for fact in ("embedding_module", "output_module", "tied_embeddings", "V"):
            assert getattr(back.provenance, fact) == getattr(ticket.provenance, fact)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_rows_saved_with_their_embedding(kind, tmp_path):
    "Read if the embedding is the model's own; on a tied model PEFT stores the rows twice, and both must agree."
    a = get_peft_model(talker(kind), TrainableTokensConfig(token_indices=[9, 3], init_weights=False))
    a.save_pretrained(tmp_path, save_embedding_layers=True)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    whole = [name for name in stored if name.endswith("base_layer.weight")]
    assert whole and Ticket.from_peft(tmp_path, talker(kind), TOKENIZER).mode == natural(kind)
    changes = [(whole[0], "made for a base with another .*: load")]
    if kind in TIED:
        changes.append(("base_model.model.lm_head.trainable_tokens_delta", "ties the two: use mode shared"))
    for name, said in changes:
        save_file(stored | {name: stored[name] + 1}, tmp_path / "adapter_model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=said):
            Ticket.from_peft(tmp_path, talker(kind), TOKENIZER)


def test_ranks_that_engines_take(tmp_path):
    assert [lora_rank(k) for k in (1, 2, 8, 18, 257, 512, 513)] == [1, 8, 8, 32, 320, 512, 513]
    model = tiny_model("llama")
    for k, r in ((1, 1), (5, 8), (9, 16)):
        rows = TunedRows(range(k), torch.ones(k, 16))
        bare(model, range(k), rows).save_peft(tmp_path / f"{k}", "lora", model=model, tokenizer=TOKENIZER)
        about = json.loads((tmp_path / f"{k}" / "adapter_config.json").read_text())
        a, b = (v for _, v in sorted(load_file(tmp_path / f"{k}" / "adapter_model.safetensors").items()))
        assert about["r"] == about["lora_alpha"] == r and a.shape == (r, 64) and b.shape == (16, r)
        assert not a[k:].any() and not b[:, k:].any() and (a.sum(1)[:k] == 1).all()
        back = Ticket.from_peft(tmp_path / f"{k}", model, TOKENIZER)
        assert back.ids.tolist() == [*range(k)] and torch.allclose(back.rows.weight, rows.weight, atol=1e-6)
    assert RANKS == tuple(sorted(RANKS))


def test_a_lora_of_rows_by_other_hands(tmp_path):
    "Scaled, in another order, a token twice, with rank-stabilised alpha, or in 16 bits: PEFT's own sum is read."
    model, ids = tiny_model("llama"), [9, 3, 9, 40]
    for name, more in (("plain", {"lora_alpha": 2}), ("stable", {"lora_alpha": 2, "use_rslora": True})):
        config = LoraConfig(r=5, target_modules=["embed_tokens"], init_lora_weights=False, **more)
        trained(tmp_path / name, config)
        path = tmp_path / name / "adapter_model.safetensors"
        a, b = (v.clone() for _, v in sorted(load_file(path).items()))
        a.zero_()[range(4), ids] = torch.tensor([1.0, 2.0, -1.0, 0.5])
        stored = dict(zip(sorted(load_file(path)), (a.bfloat16(), b.bfloat16())))
        save_file(stored, path, {"format": "pt"})
        back = Ticket.from_peft(tmp_path / name, model, TOKENIZER)
        adapted = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / name)
        whole = adapted.merge_and_unload().get_input_embeddings().weight
        assert back.ids.tolist() == [9, 3, 40] and back.rows.ids.tolist() == [3, 9, 40]
        assert torch.allclose(back.rows.weight, whole[[3, 9, 40]], atol=1e-6)
        with torch.no_grad(), back.rows.applied(model):
            assert torch.allclose(model(X).logits, adapted(X).logits, atol=1e-6)


def test_ends_of_a_tied_model_that_differ(tmp_path):
    "No mode of a ticket is that, and an output alone is none, either."
    model, rows, facts = ends("gpt2", "shared")
    write_adapter(tmp_path, facts, rows, model)
    path = tmp_path / "adapter_model.safetensors"
    stored = load_file(path)
    for change in (
        lambda name, v: v * 2 if "lm_head.lora_A" in name else v,
        lambda name, v: None if "embedding" in name else v,
    ):
        new = {name: change(name, v) for name, v in stored.items()}
        save_file({name: v for name, v in new.items() if v is not None}, path, {"format": "pt"})
        with pytest.raises(ValueError, match="ties the two: use mode shared|holds other tensors"):
            read_adapter(tmp_path, model)


def test_a_lora_is_written_as_peft_writes_its_own(tmp_path):
    model = tiny_model("gpt2")
    rows = moved(model)
    ticket = bare(model, rows.ids.tolist(), rows)
    ticket.save_peft(tmp_path / "ours", "lora", model=model, tokenizer=TOKENIZER)
    config = LoraConfig(r=8, lora_alpha=8, target_modules=["transformer.wte"], task_type="CAUSAL_LM")
    with warnings.catch_warnings(action="ignore"):  # of tied models
        get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path / "own", save_embedding_layers=False)
    shapes, about = (
        {place: read(tmp_path / place) for place in ("ours", "own")}
        for read in (
            lambda folder: {n: v.shape for n, v in load_file(folder / "adapter_model.safetensors").items()},
            lambda folder: json.loads((folder / "adapter_config.json").read_text()),
        )
    )
    assert shapes["ours"] == shapes["own"]
    assert {n for n in about["own"] if about["ours"].get(n) != about["own"][n]} <= {"base_model_name_or_path"}


def test_what_no_adapter_can_hold(tmp_path):
    model = tiny_model("gpt2")
    rows = moved(model)
    mine = bare(model, rows.ids.tolist(), rows)
    for form, save in (("lora", lambda t, **m: t.save_peft(tmp_path / "a", "lora", **m)), ("gguf", gguf_in(tmp_path))):
        for ticket, words in ((bare(model, []), "the ticket is empty"), (bare(model, [9]), "no tuned rows")):
            with pytest.raises(ValueError, match=f"no adapter of form {form} can hold this ticket: .*{words}"):
                save(ticket, model=model, tokenizer=TOKENIZER)
        with pytest.raises(ValueError, match="another embedding"):
            save(mine, model=tiny_model("gpt2", seed=1), tokenizer=TOKENIZER)
    with pytest.raises(ValueError, match="form is 'ia3': choose trainable_tokens, lora$"):
        mine.save_peft(tmp_path / "a", "ia3")
    assert not [*tmp_path.iterdir()]
    new = type("Facts", (), vars(mine.provenance) | {"added_tokens": ("<a>", "<b>")})
    for form in ("trainable_tokens", "lora", "gguf"):
        assert "2 new tokens ('<a>', '<b>')" in obstacle(new, rows, "input_only", form) and "merge" in obstacle(
            new, rows, "shared", form
        )
    mine.save_peft(tmp_path / "a", "lora", model=model, tokenizer=TOKENIZER)
    assert Ticket.from_peft(tmp_path / "a", model, TOKENIZER).mode == "input_only"
    with pytest.raises(ValueError, match="for a base with another transformer.wte: load the model it was made for"):
        Ticket.from_peft(tmp_path / "a", tiny_model("gpt2", seed=1), TOKENIZER)


def gguf_in(folder):
    return lambda ticket, **more: ticket.save_gguf(folder / "a.gguf", untied=True, **more)


# GGUF


def read_gguf(content):
    "What a GGUF says and holds, by the letter of its specification: (values, tensors)."
    place = 0

    def take(form):
        nonlocal place
        found = struct.unpack_from("<" + form, content, place)
        place += struct.calcsize("<" + form)
        return found if len(found) > 1 else found[0]

    text = lambda: bytes(take("B") for _ in range(take("Q"))).decode()
    magic, version, many, pairs = take("4sIQQ")
    assert (magic, version) == (b"GGUF", 3)
    values = {text(): {8: text, 6: lambda: take("f")}[take("I")]() for _ in range(pairs)}
    named = []
    for _ in range(many):
        name, dims = text(), take("I")
        shape = [take("Q") for _ in range(dims)]
        named.append((name, shape[::-1], {0: np.float32, 1: np.float16}[take("I")], take("Q")))
    start, found, end = place + -place % 32, {}, 0
    for name, shape, dtype, offset in named:
        assert offset % 32 == 0 and offset == end + -end % 32 and not any(content[start + end : start + offset])
        found[name] = np.frombuffer(content, dtype, int(np.prod(shape)), start + offset).reshape(shape)
        end = offset + found[name].nbytes
    assert len(content) == start + end + -end % 32
    return values, found


@pytest.mark.parametrize("kind, mode", MODES)
def test_a_gguf_is_the_ticket(kind, mode, tmp_path):
    model, rows, _ = ends(kind, mode)
    write_gguf(tmp_path / "a.gguf", rows, model)
    values, tensors = read_gguf((tmp_path / "a.gguf").read_bytes())
    names = {"mistral": "llama", "gemma": "gemma3"}
    assert values == {
        "general.architecture": names.get(kind, kind),
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": len(rows),
    }
    change, found = rows.delta(model).split(16, 1), {}
    if "token_embd.weight.lora_a" in tensors:
        a, b = tensors["token_embd.weight.lora_a"], tensors["token_embd.weight.lora_b"]
        assert (a.shape, a.dtype, b.shape) == ((64, 5), np.float16, (16, 5))
        found["input"] = a @ b.T
    if "output.weight.lora_a" in tensors:
        a, b = tensors["output.weight.lora_a"], tensors["output.weight.lora_b"]
        assert (a.shape, b.shape, b.dtype) == ((5, 16), (64, 5), np.float32)
        found["output"] = b @ a
    sides = {"input_only": ["input"], "head": ["output"]}.get(mode, ["input", "output"])
    assert [*found] == sides and len(tensors) == 2 * len(sides)
    for side, delta in zip(sides, change if mode == "both" else change * 2):
        assert np.array_equal(found[side][rows.ids], delta.numpy()) and np.count_nonzero(found[side]) <= delta.numel()


def test_what_a_gguf_cannot_hold(tmp_path):
    model = tiny_model("gpt2")
    rows = moved(model)
    ticket, known = bare(model, rows.ids.tolist(), rows), {"model": model, "tokenizer": TOKENIZER}
    with pytest.raises(ValueError, match="ties input and output.*own output.weight and say --untied"):
        ticket.save_gguf(tmp_path / "a.gguf", **known)
    ticket.save_gguf(tmp_path / "a.gguf", untied=True, **known)
    before = (tmp_path / "a.gguf").read_bytes()
    for place in ("a.gguf", "none/a.gguf", "."):
        with pytest.raises(FileExistsError, match="name a new file in a folder that exists"):
            ticket.save_gguf(tmp_path / place, untied=True, **known)
    assert [p.name for p in tmp_path.iterdir()] == ["a.gguf"] and (tmp_path / "a.gguf").read_bytes() == before
    ticket.save_gguf(tmp_path / "b.gguf", untied=True, **known)
    assert (tmp_path / "b.gguf").read_bytes() == before
    model.config.model_type = "neox"
    with pytest.raises(ValueError, match="of type neox, only for llama, .*mistral"):
        ticket.save_gguf(tmp_path / "c.gguf", untied=True, **known)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gguf", "b.gguf"]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_forms_by_their_command(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = base_in(tmp_path / "base", kind)
    ticket_in(tmp_path / "t", tmp_path / "base")
    untied = ["--untied"] if kind in TIED else []
    status, said, error = invoke("peft", "t", "--as", "gguf", *untied, "--out", "a.gguf", "--json")
    assert status == 0 and json.loads(said) == {"out": "a.gguf", "holds": "adapter", "form": "gguf"}, error
    ticket = Ticket.load("t")
    ticket.save_gguf("b.gguf", model=model, tokenizer=TOKENIZER, untied=True)
    assert Path("a.gguf").read_bytes() == Path("b.gguf").read_bytes()
    assert invoke("peft", "t", "--as", "lora", "--out", "lora")[0] == 0
    assert invoke("peft", "lora", "--out", "again")[0] == 0
    again = Ticket.load("again")
    assert again.mode == "input_only" and torch.allclose(again.rows.weight, ticket.rows.weight, atol=1e-6)
    for words, sentence in (
        (("t", "--as", "gguf", "--out", "a.gguf", *untied), "new file in a folder that exists"),
        (("t", "--as", "gguf", "--out", "c.gguf"), "--untied" if untied else ""),
        (("t", "--as", "lora", "--out", "other", "--untied"), "--untied is for --as gguf"),
        (("lora", "--as", "gguf", "--out", "other"), "--as says how a ticket is written"),
        (("t", "--as", "ia3", "--out", "other"), "form is 'ia3': choose trainable_tokens, lora, gguf"),
    ):
        status, _, error = invoke("peft", *words)
        assert (status == 2 and sentence in error and error.count("\n") == 1) if sentence else status == 0, error
        assert not Path("other").exists()
    monkeypatch.setattr("kslottery.adapters.RANKS", (1,))
    status, said, _ = invoke("peft", "t", "--as", "lora", "--out", "wide")
    assert status == 0 and "It has 2 ranks: PEFT takes them, and engines such as vLLM take 1 at most" in said
    assert json.loads(Path("wide", "adapter_config.json").read_text())["r"] == 2


# llama.cpp itself


def within(one):
    "Whether what the engine said with a ticket is what transformers says."
    silu = one["type"] in ("llama", "mistral", "qwen2", "qwen3")  # GELU is a table of 16-bit numbers in the engine
    return max(one["base"], one["ticket"]) < (1e-4 if silu else 3e-3) and one["merged"] < 2e-6 < 1 < one["effect"]


def check_engine(result):
    assert all(map(within, result["cases"])) and all(one["same_greedy_tokens"] for one in result["cases"])
    several = result["several"]
    assert max(several[n] for n in ("first", "second", "half of the first", "sum", "none again")) < 1e-4
    assert several["without a reset"] > 0.1  # the next test would see nothing otherwise
    assert result["refused"] == {"another vocabulary": "not loaded", "tied": "abort"}
    assert result["quantised"]["adapter to merged"] < 0.1 * result["quantised"]["effect"]


def test_the_numbers_of_the_page():
    result = json.loads((ROOT / "benchmarks" / "results" / "engines.json").read_text())
    check_engine(result)
    assert {(one["type"], one["mode"], one["tied"]) for one in result["cases"]} == {*engines.CASES}
    assert {one["type"] for one in result["cases"]} == {*_ENGINE_NAMES}


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("llama_cpp") or not find_spec("gguf"), reason="no llama.cpp here: make setup-llama")
def test_llama_cpp_says_what_transformers_says():
    "All types and modes, several adapters in one context, another vocabulary, a tied base: each in its own process."
    check_engine(engines.measure())
