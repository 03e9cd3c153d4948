"""Why a model does not stop: five faults told apart, no false alarm, odd files, and how little is read."""

import json
import struct
import time
from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from conftest import MODELS, half_and_tied, invoke, tiny_model
from kslottery import checkpoints
from kslottery.core import read_json, write_json
from kslottery.data import Pair, Prompt, Template, encode
from kslottery.decomposition import Interval
from kslottery.stops import CAUSES, Finding, Stopping, StopReport, examine_stops, measure_stops, stop_sentences

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n\n{{ m.content | trim }}<|im_end|>{% endfor %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
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
    model = (half_and_tied() if kind == "tied" else tiny_model(kind)).to(dtype)
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
    "tied": {"kind": "tied", "dtype": torch.bfloat16},
    "mistral": {"kind": "mistral", "template": INST},
    "two ends": {"ends": [2, 4], "template": LLAMA3},
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
    "masked, no pad": ({"pad": None}, None, MASKED, "pad_masks_end", "no pad token, and this one stood in"),
    "masked, pad is another": ({}, None, MASKED, "pad_masks_end", "though pad is <pad> (0)"),
    "nothing learned": ({}, None, TAUGHT | {"labels": [-100] * 5}, "pad_masks_end", "every label"),
    "missing": ({}, None, MISSING, "end_not_appended", "data.jsonl"),
    "missing, filled up with another": (
        {},
        None,
        {"input_ids": [1, 9, 10, 11, 3, 3], "labels": [-100, -100, 10, 11, -100, -100]},
        "end_not_appended",
        "1 of 1 examples, or they were cut",
    ),
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
    "a number beyond all": (
        {},
        lambda f: changed(f / "generation_config.json", eos_token_id=2**70),
        None,
        "ends_disagree",
        "eos_token_id in generation_config.json is 1180591620717411303424, which is no token's number",
    ),
    "no eos anywhere": ({"ends": None, "eos": None}, None, None, "ends_disagree", "the tokenizer has none"),
    "beyond the vocabulary": ({"ends": [99]}, None, None, "ends_disagree", "stops at [99]"),
    "zero": ({}, lambda f: head(f, zero), None, "end_row_untrained", "</s> (2) in lm_head.weight is zero"),
    "mean": ({}, lambda f: head(f, mean), None, "end_row_untrained", "lm_head.weight is "),
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


def adapted(folder, base, target_modules=("q_proj",), **config):
    "A random LoRA of a tiny checkpoint, and whatever else it tunes; or tuned tokens."
    kind = peft.TrainableTokensConfig if "token_indices" in config else lambda **more: peft.LoraConfig(r=2, **more)
    config = kind(target_modules=list(target_modules), **config)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.02)
    model.save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_an_adapter_must_train_the_row_that_it_needs(tmp_path):
    base = saved(tmp_path / "base", ends=[2, 4], template=CHATML)
    head(base, lambda rows: rows[4].zero_())
    for name, config, mended in (
        ("plain", {}, False),
        ("another", {"trainable_token_indices": {"lm_head": [5]}}, False),
        ("whole", {"modules_to_save": ["lm_head"]}, True),
        ("rows", {"trainable_token_indices": {"lm_head": [4]}}, True),
        ("rows of the input", {"trainable_token_indices": [4]}, False),
        ("tokens", {"token_indices": [4], "target_modules": ["lm_head"]}, True),
        ("lora", {"target_modules": ["lm_head"]}, True),
    ):
        report = examine_stops(base, adapter=adapted(tmp_path / name, base, **config))
        assert report.ok == mended, f"{name}: {report}"
        assert mended or "is zero, and the adapter does not train it" in report.findings[0].said


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize(
    ("config", "mended"),
    [
        ({}, False),
        ({"token_indices": [3], "target_modules": ["embed_tokens"]}, False),
        ({"token_indices": [2], "target_modules": ["embed_tokens"]}, True),
        ({"token_indices": [2], "target_modules": ["lm_head"]}, True),
        ({"target_modules": ["q_proj", "lm_head"]}, True),
        ({"modules_to_save": ["lm_head"]}, True),
        ({"modules_to_save": ["embed_tokens"]}, True),
        ({"trainable_token_indices": [2]}, True),
    ],
)
def test_one_tied_matrix_is_trained_by_either_name(config, mended, tmp_path):
    base = saved(tmp_path / "base", kind="tied", dtype=torch.bfloat16)
    head(base, zero, "model.embed_tokens.weight")
    assert examine_stops(base, adapter=adapted(tmp_path / "adapter", base, **config)).ok == mended


@pytest.mark.parametrize("chosen", [5, {"lm_head": 5}, ["x"]])
def test_an_adapter_with_odd_tokens_is_refused_in_one_sentence(chosen, tmp_path):
    base = saved(tmp_path / "base")
    changed(adapted(tmp_path / "adapter", base) / "adapter_config.json", trainable_token_indices=chosen)
    with pytest.raises(ValueError, match="adapter_config.json is damaged .*: save the adapter again"):
        examine_stops(base, adapter=tmp_path / "adapter")


@pytest.mark.parametrize("chat", [False, True])
def test_pairs_say_that_no_template_is_used(chat, tmp_path):
    folder, prompt = saved(tmp_path / "model", template=CHATML), Prompt(Template("p", "{source} {target}", chat=chat))
    data = lines(tmp_path / "pairs.jsonl", {"source": "t9", "target": "t11"})
    report = examine_stops(folder, data=data, prompt=prompt)
    assert causes(report) == ["ends_disagree"] * chat and "as with a base model" in str(report) or chat
    assert not chat or "Mend: add 4 to eos_token_id of generation_config.json and config.json, beside </s> (2)" in str(
        report
    )
    changed(folder / "generation_config.json", eos_token_id=4)  # the end that pairs are given is not heeded
    assert causes(examine_stops(folder, data=data)) == ["ends_disagree"]


def test_the_tokenizer_of_an_adapter_comes_first(tmp_path):
    base = saved(tmp_path / "base")
    adapter = adapted(tmp_path / "adapter", base)
    assert examine_stops(base, adapter=adapter).ok
    words(template=CHATML).save_pretrained(adapter)
    assert causes(examine_stops(base, adapter=adapter)) == ["ends_disagree"]
    longer = words(template=CHATML.replace("<|im_end|>", "<|end|>"))
    longer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    longer.save_pretrained(adapter)
    report = examine_stops(base, adapter=adapter)
    assert causes(report) == ["ends_disagree", "end_row_untrained"]
    assert "<|end|> (64) has no row in lm_head.weight, which has 64" in str(report)


@pytest.mark.parametrize(
    ("records", "said"),
    [
        (['{"input_ids": [1, 2]}'], "line 1 of .* has no list of whole numbers under labels"),
        (['{"input_ids": [[1, 2]], "labels": [[1, 2]]}'], "under input_ids"),
        (['{"input_ids": [1, true], "labels": [1, 1]}'], "under input_ids"),
        (['{"input_ids": [1, 2], "labels": [1]}'], "2 input_ids and 1 labels"),
        (['{"input_ids": [-1], "labels": [-100]}'], "1 input_ids"),
        (['{"input_ids": [1, 5, 6, 2], "labels": [5, 6, 2, -100]}'], "unshifted"),
        (['{"input_ids": [1], "labels": [1], "attention_mask": 3}'], "go together"),
        (['{"input_ids": [1], "labels": [1]}', "[]"], "line 2 of .* is not a JSON object"),
        (['{"messages": []}'], "the last is the assistant's"),
        (['{"messages": [{"role": "user", "content": "t9"}]}'], "the last is the assistant's"),
        (['{"messages": [{"role": "assistant", "content": "t9"}]}'], "there is no chat template"),
        (["{"], "line 1 of .* is not a JSON object"),
        ([], "holds no pairs"),
    ],
)
def test_odd_records_are_refused_in_one_sentence(records, said, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(records) + "\n" if records else "")
    with pytest.raises(ValueError, match=said) as error:
        examine_stops(saved(tmp_path / "model"), data=data)
    assert "\n" not in str(error.value)


def test_odd_files_are_notes_or_one_sentence(tmp_path):
    folder = saved(tmp_path / "model", template="{{ raise_exception('no system') }}")
    report = examine_stops(folder)
    assert report.ok and any("it raises (no system)" in note for note in report.notes)
    with pytest.raises(ValueError, match="line 1"):
        examine_stops(folder, data=lines(tmp_path / "talk.jsonl", TALK))
    (folder / "chat_template.jinja").unlink()
    changed(folder / "tokenizer_config.json", added_tokens_decoder={"40": {"content": "</s>"}})
    report = examine_stops(folder)
    assert causes(report) == ["ends_disagree"] and "is 40 in tokenizer_config.json" in str(report)
    (folder / "tokenizer.json").unlink()
    report = examine_stops(folder, data=lines(tmp_path / "data.jsonl", TAUGHT))
    assert report.ok and "no tokenizer lies beside the checkpoint" in str(report) and report.ends == {2: "[2]"}
    (folder / "generation_config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds list, not dict"):
        examine_stops(folder)


def measured(rate=0.0, other=0.0, p_end=0.01):
    interval = Interval(rate, max(0.0, rate - 0.1), min(1.0, rate + 0.1))
    return Stopping(30, interval, other, p_end, {2: p_end}, 0.0, {"whole": 5.0, "first line": 20.0, "cut": 10.0})


def test_sentences_tell_the_fifth_cause_where_no_other_was_found():
    clean = StopReport("model", {2: "</s>"}, end=2)
    fault = StopReport("model", {2: "</s>"}, (Finding("end_not_appended", "no end"),), end=2)
    for report, facts, found, notes in (
        (clean, measured(), ["not_tuned_to_stop"], 0),
        (clean, measured(rate=0.85), [], 0),
        (clean, measured(p_end=0.9), ["not_tuned_to_stop"], 0),
        (clean, measured(other=0.9, p_end=0.9), ["ends_disagree"], 0),
        (clean, measured(rate=0.5, other=0.45), ["ends_disagree"], 0),
        (clean, replace(measured(), n=9), [], 1),
        (fault, measured(), ["end_not_appended"], 0),
    ):
        judged = report.judged(facts)
        assert causes(judged) == found and len(judged.notes) == notes and judged.ok == (not found)
        assert judged.measured.lost == 0.75 and json.loads(json.dumps(judged.as_dict()))["measured"]["n"] == facts.n


def test_a_causes_mend_is_stated():
    assert all(Finding(cause, "said").mend == CAUSES[cause] for cause in CAUSES)
    with pytest.raises(ValueError, match="choose pad_masks_end"):
        Finding("bad luck", "said")


def test_probabilities_of_the_end_by_hand():
    model, tokenizer = tiny_model("llama"), words()
    pairs = [Pair(str(i), f"t9 t{10 + i}", "t11 t12") for i in range(5)]
    found = measure_stops(model, tokenizer, pairs, Prompt("{source} {target}"), stops=[2], ends=[4, 99], progress=False)
    rows = []
    for pair in pairs:
        ids = torch.tensor([tokenizer(f"{pair.source} {pair.target}")["input_ids"]])
        with torch.no_grad():
            rows.append(model(ids).logits[0].softmax(-1)[-3:, [2, 4]])
    assert found.p_end == pytest.approx(np.mean([r[-1, 0] for r in rows]), rel=1e-5), "what generation heeds"
    assert found.p_each == pytest.approx({2: np.mean([r[-1, 0] for r in rows]), 4: np.mean([r[-1, 1] for r in rows])})
    assert found.p_elsewhere == pytest.approx(np.mean([r[:-1, 0].numpy() for r in rows]), rel=1e-5)
    assert found.rate.low <= found.rate.value <= found.rate.high


def test_the_prompt_of_a_conversation_is_all_but_its_last_message(tmp_path):
    tokenizer = words(template="<s>" + CHATML + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    (pair,), prompt = stop_sentences(tokenizer, lines(tmp_path / "talk.jsonl", TALK))
    assert pair[1:] == ("<s><|im_start|>user\nt9 t10<|im_end|>\n<|im_start|>assistant\n", "t11 t12")
    example = encode(tokenizer, prompt, pair)
    assert example.ids == [1, 3, 5, 9, 10, 4, 3, 6, 11, 12, 2] and example.labels[-3:] == [11, 12, 2]
    assert stop_sentences(tokenizer, lines(tmp_path / "ids.jsonl", TAUGHT))[0] == []


def test_the_command(tmp_path):
    healthy, broken = saved(tmp_path / "healthy"), saved(tmp_path / "broken", template=CHATML)
    pairs = lines(tmp_path / "pairs.jsonl", *[{"source": f"t9 t{i}", "target": "t11"} for i in range(10, 30)])
    asked = ("--data", pairs, "--template", "{source} {target}")
    assert invoke("stops", healthy) == (0, "nothing found\n", "")
    status, said, error = invoke("stops", broken)
    assert status == 1 and said.startswith("ends_disagree: ") and said.count("\n") == 1 and error == ""
    status, said, _ = invoke("stops", healthy, *asked, "--static", "--json")
    assert status == 0 and json.loads(said)["measured"] is None and json.loads(said)["example"]["end"] == "learned"
    status, said, _ = invoke("stops", healthy, *asked, "--limit", 12, "--max-new-tokens", 3)
    assert status == 1 and said.startswith("not_tuned_to_stop: ") and "stopping rate" in said and "BLEU" in said
    status, said, _ = invoke("stops", healthy, *asked, "--limit", 1)
    assert status == 0 and "0% of 1 continuations end; so few tell nothing: give 10 sentences or more" in said
    assert "pairs.jsonl:1 (as kslottery encodes it; your trainer's labels were not seen), its end learned" in said
    fresh = lines(tmp_path / "fresh.jsonl", *[{"source": f"t8 t{i}", "target": "t11"} for i in range(10, 30)])
    status, said, error = invoke("stops", broken, *asked, "--mend", "--fresh", fresh, "--rate", 0.7)
    assert status == 1 and said.startswith("Not mended"), error  # its chat template is no fault where pairs are taught
    adapter = adapted(tmp_path / "adapter", healthy)
    words(eos="<|im_end|>").save_pretrained(adapter)
    status, said, _ = invoke("stops", healthy, "--adapter", adapter, *asked, "--limit", 4, "--json")
    found = json.loads(said)
    assert status == 1 and [f["cause"] for f in found["findings"]] == ["ends_disagree"] and found["end"] == 4
    assert set(found["measured"]["p_each"]) == {"2", "4"} and found["measured"]["n"] == 4
    for words_, said in (
        ((tmp_path / "nothing",), "does not exist"),
        ((adapter,), "is a PEFT adapter"),
        ((healthy, "--adapter", healthy), "adapter_config.json"),
        ((healthy, "--data", tmp_path / "none.jsonl"), "none.jsonl"),
        ((healthy, "--data", pairs, "--template", "who"), "template"),
    ):
        status, _, error = invoke("stops", *words_)
        assert status == 2 and said in error and error.count("\n") == 1, error


@pytest.mark.skipif(not (MODELS / "en-de-short").exists(), reason="needs the shared model en-de-short")
def test_the_small_model_of_real_language_is_sound():
    assert examine_stops(MODELS / "en-de-short").ok
