"""Row health: what was planted is found on both sides, what is healthy is not, and special tokens are followed."""

import copy
import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from conftest import MODELS, TIED, TOY, invoke, tiny_model
from kslottery import health
from kslottery.checkpoints import Checkpoint
from kslottery.health import checkpoint_health, odd_rows, row_health

KINDS = ("llama", "qwen2 tied", "gpt2", "gemma")


def tiny(kind):
    "A random model; a tied Qwen2 in bf16 among them, as small ones are stored."
    if kind in ("llama", *TIED):
        return tiny_model(kind)
    torch.manual_seed(0)
    shape = dict(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    return Qwen2ForCausalLM(Qwen2Config(**shape, intermediate_size=32, tie_word_embeddings=True)).bfloat16()


def plant(weight):
    "One row of each kind."
    with torch.no_grad():
        weight[10] = 0
        weight[[11, 12]] = weight[13].clone()
        weight[14] /= 60
        weight[15] *= 60
        weight[16] = -weight[16].abs()  # healthy, though no number of it is large
        weight[17, 3] = torch.nan
    return {"nan": (17,), "zero": (10,), "duplicate": (11, 12, 13), "short": (14,), "long": (15,)}


def keep(model, folder, tokenizer=TOY, **options):
    model.save_pretrained(folder, **options)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokenizer", [TOY, None])
def test_what_was_planted_is_found_once_and_a_healthy_model_is_healthy(kind, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(health, "_NUMBERS", 16 * 9)  # a chunk of nine rows, of which 64 is no multiple
    model = tiny(kind)
    tied, sides = kind != "llama", ("input",) if kind != "llama" else ("input", "output")
    sound = checkpoint_health(keep(model, tmp_path / "sound", tokenizer))
    assert sound.sides == sides and not sound.groups and str(sound).endswith("nothing odd")
    assert Checkpoint(tmp_path / "sound").head() == (None if tied else "lm_head.weight")
    wanted = {("input", what): ids for what, ids in plant(model.get_input_embeddings().weight).items()}
    if not tied:
        with torch.no_grad():
            model.lm_head.weight[[40, 41]] = 0
        wanted["output", "zero"] = (40, 41)
    for options in ({}, {"max_shard_size": "3KB"}):
        found = checkpoint_health(keep(model, tmp_path / str(len(options)), tokenizer, **options))
        assert {(*group.kinds.items(),)[0]: group.ids for group in found.groups} == wanted
        assert found.groups[0].kinds == {"input": "nan"}  # the worst comes first
        assert all(len(group.tokens) == (len(group.ids) if tokenizer else 0) for group in found.groups)
        assert ("t17" in str(found)) == bool(tokenizer) and json.dumps(found.as_dict(), allow_nan=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_few_rows_beside_a_sample(dtype):
    torch.manual_seed(1)
    sample = (torch.randn(700, 32) * torch.rand(700, 1).add(0.3)).to(dtype)  # lengths that differ a lot are no fault
    rows = torch.cat([sample[:2] * 1e-7, sample[2:3], sample[3:4] / 50, sample[4:5] * 50, torch.randn(2, 32).to(dtype)])
    assert odd_rows(rows, sample[2:]) == ["zero"] * 2 + ["duplicate", "short", "long", None, None]
    assert odd_rows(rows[-2:].numpy(force=True) if dtype != torch.bfloat16 else rows[-2:], sample) == [None, None]
    assert odd_rows(0 * rows, 0 * sample) == ["zero"] * len(rows)  # nothing to be measured by


def test_rows_of_never_written_tokens_are_nearly_one_and_the_same():
    torch.manual_seed(2)
    outs = torch.randn(5000, 64) + 1
    outs[4000:4300] = 1.8 * torch.randn(64) + 0.03 * torch.randn(300, 64)
    [found] = row_health(torch.randn(5000, 64), outs).groups
    assert found.kinds == {"output": "duplicate"} and found.ids == (*range(4000, 4300),)


def test_vocabularies_that_are_longer_or_shorter_than_the_matrix():
    torch.manual_seed(0)
    longer, shorter = row_health(torch.randn(70, 16), None, TOY), row_health(torch.randn(60, 16), None, TOY)
    assert not longer.groups and longer.spare == (*range(64, 70),) and "no fault" in str(longer)
    [special, others] = shorter.groups
    assert (special.ids, others.ids, others.kinds) == ((63,), (60, 61, 62), {"input": "missing"})
    with pytest.raises(ValueError, match=r"the head has \[63\] rows and the input 64"):
        row_health(torch.randn(64, 4), torch.randn(63, 4))


def test_padding_is_no_fault_unless_it_ends_texts():
    weight, both = torch.randn(64, 16), copy.deepcopy(TOY)
    weight[[0, 63]], both.pad_token = 0.0, both.eos_token
    for tokenizer, odd in ((TOY, (63,)), (both, (63, 0))):  # t0 is the unknown token, too
        assert [i for group in row_health(weight, None, tokenizer).groups for i in group.ids] == [*odd]
    assert row_health(weight, None, TOY).groups[0].special


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_that_moved_or_never_did(kind, tmp_path):
    model, tokenizer = tiny(kind), copy.deepcopy(TOY)
    keep(model, tmp_path / "base")
    tokenizer.eos_token = "t1"
    with torch.no_grad():
        model.get_input_embeddings().weight[63] *= 2
        if kind == "llama":
            model.lm_head.weight[0] *= 2
            model.get_input_embeddings().weight[1] *= 2
    keep(model, tmp_path / "tuned", tokenizer)
    found = checkpoint_health(tmp_path / "tuned", tmp_path / "base")
    one = {move.token: move.moved for move in found.moves}
    if kind == "llama":
        assert one["t63"] == one["t1"] == {"input": True, "output": False} and one["t0"]["output"]
    else:
        assert one == {"t63": {"input": True}, "t1": {"input": False}, "t0": {"input": False}}
    last = "output" if kind == "llama" else "input"
    assert found.notes == (f"The end token is t1 and was t63; its {last} row never moved: tune it",)
    if kind != "llama":
        return
    status, said, error = invoke("scan", tmp_path / "base", tmp_path / "tuned", "--out", tmp_path / "t", "--json")
    assert status == 0, error
    assert json.loads(said)["health"] == json.loads(json.dumps(found.as_dict()))
    status, said, error = invoke("scan", tmp_path / "base", tmp_path / "tuned", "--out", tmp_path / "t")
    assert status == 0 and str(found) in said and "moved (input) t" in said


def test_an_earlier_checkpoint_of_whole_numbers_is_refused_in_one_sentence(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "tuned")
    tensors = {"model.embed_tokens.weight": torch.zeros(64, 16, dtype=torch.int8)}
    save_file(tensors, tmp_path / "base.safetensors")
    with pytest.raises(ValueError, match="embed_tokens.weight of .*base.safetensors is no matrix of floats, but I8"):
        checkpoint_health(tmp_path / "tuned", tmp_path / "base.safetensors")


def test_a_new_end_token_is_new(tmp_path):
    tokenizer, model = copy.deepcopy(TOY), tiny_model("llama")
    keep(model, tmp_path / "base")
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    model.resize_token_embeddings(65)
    with torch.no_grad():
        model.lm_head.weight[64] = model.lm_head.weight[20]
    keep(model.bfloat16(), tmp_path / "tuned", tokenizer)
    found = checkpoint_health(tmp_path / "tuned", tmp_path / "base")
    assert {move.token: move.moved for move in found.moves}["<|im_end|>"] == {}
    assert not any(any(move.moved.values()) for move in found.moves)  # to bf16 is no move
    first = found.groups[0]  # where resizing starts it, and as set by hand
    assert first.tokens == ("<|im_end|>",) and first.kinds == {"input": "mean", "output": "duplicate"}
    assert "it ends texts; tune its input and output row" in " ".join(str(found).split())
    assert "new <|im_end|>" in str(found)


def test_the_command_reads_a_checkpoint_and_refuses_what_is_none(tmp_path):
    keep(tiny_model("llama"), tmp_path / "m")
    status, said, error = invoke("doctor", tmp_path / "m")
    assert (status, said) == (0, "Row health, 64 rows, input and output: nothing odd\n"), error
    assert json.loads(invoke("doctor", tmp_path / "m", "--json")[1])["rows"] == 64
    for words, sentence in (((tmp_path,), "no safetensors file"), (("--tokenizer", tmp_path / "m"), "name that, too")):
        status, said, error = invoke("doctor", *words)
        assert status == 2 and not said and sentence in error and len(error.splitlines()) == 1


def test_a_real_vocabulary():
    folder = MODELS / "en-de-short"
    if not folder.is_dir():
        pytest.skip("no real models here: shared/models beside the checkout, or KSLOTTERY_MODELS")
    found = {(*group.kinds.items(), group.special): group for group in checkpoint_health(folder).groups}
    never = found[("input", "short"), ("output", "duplicate"), False]
    assert len(never.ids) == 390  # its sentences never have 387 of them, and the others once or twice; none is missed
    assert not {"nan", "long", "zero"} & {kind for group in found.values() for kind in group.kinds.values()}
    assert all("</s>" not in group.tokens for group in found.values())  # the end token was trained
