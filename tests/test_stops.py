"""Why a model does not stop: five faults told apart, no false alarm, odd files, and how little is read."""

import json
import struct
import time

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from conftest import tiny_model
from kslottery import checkpoints
from kslottery.core import read_json, write_json
from kslottery.stops import examine_stops

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
NO_END = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\n{% endfor %}"
WORDS = {name: i for i, name in enumerate(("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "user", "assistant"))}


def words(eos="</s>", pad="<pad>", template=None):
    "A tokenizer of 64 words, the first five of which are control tokens."
    tokenizer = Tokenizer(models.WordLevel(WORDS | {f"t{i}": i for i in range(len(WORDS), 64)}, unk_token="t63"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    more = ["<|im_start|>", "<|im_end|>"]
    found = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos, pad_token=pad, additional_special_tokens=more
    )
    found.chat_template = template
    return found


def saved(folder, kind="llama", ends=2, dtype=torch.float32, shards=None, **tokenizer):
    "A tiny checkpoint in a folder, which stops at `ends`."
    model = tiny_model(kind).to(dtype)
    model.config.eos_token_id = model.generation_config.eos_token_id = ends
    model.save_pretrained(folder, **({"max_shard_size": shards} if shards else {}))
    words(**tokenizer).save_pretrained(folder)
    return folder


def changed(file, **facts):
    write_json(file, read_json(file, dict) | facts)


def head(folder, change, name="lm_head.weight"):
    "Change the rows of the head in place."
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors[name])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def causes(report):
    return [finding.cause for finding in report.findings]


TAUGHT = {"input_ids": [1, 9, 10, 11, 2], "labels": [-100, -100, 10, 11, 2]}
MASKED = {"input_ids": [1, 9, 10, 11, 2, 2], "labels": [-100, -100, 10, 11, -100, -100]}
MISSING = {"input_ids": [1, 9, 10, 11], "labels": [-100, -100, 10, 11]}
TALK = {"messages": [{"role": "user", "content": "t9 t10"}, {"role": "assistant", "content": "t11 t12"}]}
HEALTHY = {
    "llama": {},
    "qwen2": {"kind": "qwen2", "dtype": torch.bfloat16},
    "gpt2": {"kind": "gpt2", "pad": None},
    "gpt2, pad is eos": {"kind": "gpt2", "pad": "</s>"},
    "gemma": {"kind": "gemma"},
    "chat": {"ends": [2, 4], "template": CHATML},
    "chat, eos is the turn's": {"ends": [4, 2], "template": CHATML, "eos": "<|im_end|>", "pad": "</s>"},
    "sharded": {"shards": "4KB"},
}


@pytest.mark.parametrize("name", HEALTHY)
def test_no_false_alarm(name, tmp_path):
    folder = saved(tmp_path / "model", **HEALTHY[name])
    record = TALK if "template" in HEALTHY[name] else TAUGHT
    for data in (None, lines(tmp_path / "data.jsonl", *[record] * 3)):
        report = examine_stops(folder, data=data)
        assert report.ok and str(report).startswith("nothing found"), str(report)
        assert report.example is None or report.example.end == "learned"


def zero(rows):
    rows[2] = 0


def mean(rows):
    rows[2] = rows.mean(0)


BROKEN = {  # how the model is saved, what is done to its folder, the training data; what is found, and words of it
    "masked": ({"pad": "</s>"}, None, MASKED, "pad_masks_end", "</s> (2) is in input_ids"),
    "masked, pad is another": ({}, None, MASKED, "pad_masks_end", "though pad is <pad> (0)"),
    "nothing learned": ({}, None, TAUGHT | {"labels": [-100] * 5}, "pad_masks_end", "every label"),
    "missing": ({}, None, MISSING, "end_not_appended", "data.jsonl"),
    "missing in a padded batch": (
        {"pad": "</s>"},
        None,
        {"input_ids": [1, 9, 10, 2, 2], "labels": [1, 9, 10, -100, -100], "attention_mask": [1, 1, 1, 0, 0]},
        "end_not_appended",
        "1 of 1 examples",
    ),
    "template without an end": ({"template": NO_END}, None, None, "end_not_appended", "chat_template.jinja"),
    "talk without an end": ({"template": NO_END}, None, TALK, "end_not_appended", "chat_template.jinja"),
    "template": ({"template": CHATML}, None, None, "ends_disagree", "<|im_end|> (4) (chat_template.jinja)"),
    "template, of talk": ({"template": CHATML}, None, TALK, "ends_disagree", "stops at </s> (2) (generation_config"),
    "template of another model": (
        {"template": CHATML.replace("<|im_end|>", "<|end|>")},
        None,
        None,
        "ends_disagree",
        "<|end|>, no token of this tokenizer",
    ),
    "eos": ({"eos": "<|im_end|>"}, None, None, "ends_disagree", "<|im_end|> (4) (the tokenizer's eos_token)"),
    "records": ({}, None, {"input_ids": [1, 9, 4], "labels": [-100, 9, 4]}, "ends_disagree", "<|im_end|> (4)"),
    "generation has none": (
        {},
        lambda f: changed(f / "generation_config.json", eos_token_id=None),
        None,
        "ends_disagree",
        "config.json has </s> (2)",
    ),
    "text for a number": (
        {},
        lambda f: changed(f / "generation_config.json", eos_token_id="</s>"),
        None,
        "ends_disagree",
        "'</s>', which is no token's number",
    ),
    "no eos anywhere": ({"ends": None, "eos": None}, None, None, "ends_disagree", "the tokenizer has none"),
    "beyond the vocabulary": ({"ends": [99]}, None, None, "ends_disagree", "stops at [99]"),
    "zero": ({}, lambda f: head(f, zero), None, "end_row_untrained", "</s> (2) in lm_head.weight is zero"),
    "mean": ({}, lambda f: head(f, mean), None, "end_row_untrained", "lm_head.weight is"),
    "tied, zero": (
        {"kind": "gpt2"},
        lambda f: head(f, zero, "transformer.wte.weight"),
        None,
        "end_row_untrained",
        "transformer.wte.weight is zero",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_fault_is_told_and_no_other(name, tmp_path):
    how, harm, record, cause, said = BROKEN[name]
    folder = saved(tmp_path / "model", **how)
    if harm:
        harm(folder)
    report = examine_stops(folder, data=record and lines(tmp_path / "data.jsonl", record))
    assert causes(report) == [cause], str(report)
    assert said in str(report).splitlines()[0] and report.as_dict()["ok"] is False
    json.dumps(report.as_dict(), allow_nan=False)


def test_the_input_row_of_an_untied_model_is_a_note(tmp_path):
    folder = saved(tmp_path / "model")
    head(folder, zero, "model.embed_tokens.weight")
    report = examine_stops(folder)
    assert report.ok and any("model.embed_tokens.weight is zero" in note for note in report.notes)


def sparse(path, tensors):
    "A safetensors file of float16 zeros that takes no room on the disk: a header, and a length."
    header, at = {}, 0
    for name, shape in tensors.items():
        size = 2 * int(np.prod(shape))
        header[name], at = {"dtype": "F16", "shape": shape, "data_offsets": [at, at + size]}, at + size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    return at


def test_a_large_checkpoint_is_looked_at_in_seconds_and_hardly_read(tmp_path, monkeypatch):
    d, V = 4096, 32_000
    layers = {
        f"model.layers.{i}.{part}.weight": (rows, d)
        for i in range(32)
        for part, rows in [("mlp.gate", 11_008), ("mlp.up", 11_008), ("mlp.down", 11_008), ("attention", 4 * d)]
    }
    size = sparse(
        tmp_path / "model.safetensors",
        {"lm_head.weight": (V, d), "model.embed_tokens.weight": (V, d), **layers},
    )
    write_json(tmp_path / "config.json", {"model_type": "llama", "tie_word_embeddings": False, "eos_token_id": 2})
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w2", pad_token="w0").save_pretrained(tmp_path)
    read, slices = [], checkpoints._Slices.__getitem__
    monkeypatch.setattr(
        checkpoints._Slices,
        "__getitem__",
        lambda self, rows: read.append((found := slices(self, rows)).numel() * found.element_size()) or found,
    )
    start = time.process_time()
    report = examine_stops(tmp_path)
    assert time.process_time() - start < 3
    assert size > 13e9 and 0 < sum(read) < size / 1000 and causes(report) == ["end_row_untrained"]
