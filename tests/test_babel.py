"""The built-in world: one seed, one world; held-out meanings stay out of pre-training; it loads like any checkpoint."""

import json
import random
from functools import partial

import numpy as np
import pytest
import torch

from kslottery import babel
from kslottery.core import fingerprint, load_model
from kslottery.data import TEMPLATES, Pair, Prompt, encode, load_pairs


def corpus(tokenizer, languages, held_out, rows):
    "The first rows of what pre-training reads: token ids and their weights."
    rng = random.Random(0)
    translation = partial(babel._translation, rng, languages, held_out)
    return babel._pack(rng, tokenizer, partial(rng.choice, babel._FORMATS), translation, rows, babel._LENGTH)


def test_one_seed_one_world(tmp_path, monkeypatch):
    monkeypatch.setitem(babel.SIZES, "tiny", {"hidden": 32, "steps": 4})
    folders = []
    for cache in ("a", "b"):
        monkeypatch.setenv("KSLOTTERY_CACHE", str(tmp_path / cache))
        torch.manual_seed(hash(cache))
        state = torch.random.get_rng_state()
        folders.append(babel.build_world(3, "tiny", progress=False).folder)
        assert torch.equal(state, torch.random.get_rng_state())  # the global random state is left alone
    first, second = ({p.name: fingerprint(p.read_bytes()) for p in f.iterdir()} for f in folders)
    assert first == second and "model.safetensors" in first
    stamp = (folders[1] / "babel.json").stat().st_mtime_ns
    assert (
        babel.build_world(3, "tiny").folder == folders[1] and (folders[1] / "babel.json").stat().st_mtime_ns == stamp
    )  # cached
    other = babel.build_world(4, "tiny", progress=False)
    assert fingerprint((other.folder / "model.safetensors").read_bytes()) != second["model.safetensors"]
    model, tokenizer = load_model(folders[0])
    assert len(tokenizer) == len(model.get_input_embeddings().weight) == babel._VOCABULARY


def test_held_out_meanings_and_the_prompt_never_occur_in_pre_training():
    languages, splits = babel._make_languages(0), babel._make_splits(0)
    held_out = set().union(*splits.values())
    assert len(held_out) == sum(babel.SPLITS.values())
    tokenizer = babel._make_tokenizer(languages)
    ids, _ = corpus(tokenizer, languages, held_out, 800)
    text = "\n".join(tokenizer.decode(line) for line in ids)
    sentences = {languages[0].say(m) for m in held_out} | {languages[1].say(m) for m in held_out}
    assert not [s for s in sentences if f": {s}" in text]
    opening = TEMPLATES["babel"].text.split("{source_language}")[0]
    assert opening not in text and not [
        w for w in opening.split() if w.strip(":") not in text
    ]  # new arrangement, known words
    assert tokenizer.unk_token not in text


def test_weights_are_on_the_targets():
    languages = babel._make_languages(0)
    tokenizer = babel._make_tokenizer(languages)
    ids, weights = corpus(tokenizer, languages, set(), 50)
    target_words = {
        i for ws in languages[1].words.values() for w in ws for i in tokenizer(w, add_special_tokens=False)["input_ids"]
    }
    for i, w in zip(ids.ravel(), weights.ravel()):
        if i in target_words:
            assert w == 1
    assert set(weights.ravel().round(2).tolist()) == set(np.array([0, 0.3, 1], np.float32).tolist())


def test_every_sentence_has_tokens_for_all_its_words():
    for seed in range(3):
        languages = babel._make_languages(seed)
        tokenizer = babel._make_tokenizer(languages)
        for meaning in babel._make_splits(seed)["test"]:
            for language in languages:
                text = language.say(meaning)
                ids = tokenizer(text, add_special_tokens=False)["input_ids"]
                assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == text


def test_the_fast_world_translates_and_does_not_stop():
    world = babel.build_world(0, "small", progress=False)
    model, tokenizer = load_model(world.folder)
    pairs = load_pairs(world.split("dev"))
    from kslottery.evaluation import Generation, score, translate

    outputs = translate(model, tokenizer, pairs, world.prompt, generation=Generation(50, batch_size=25), progress=False)
    s = score(outputs, pairs)
    assert s["eos_rate"] < 0.1 and s["first_line"]["bleu"] > 3 * s["whole"]["bleu"] > 0


def test_the_tasks_say_what_they_claim():
    for seed in (0, 5):
        aldan, borel = languages = babel._make_languages(seed)
        tokenizer = babel._make_tokenizer(languages)
        meanings = babel._make_splits(seed)["dev"]
        plain = [{word for kind in ("noun", "verb") for word in x.words[kind]} for x in languages]
        for task in babel.TASKS:
            records = babel.make_task(task, "dev", seed)
            assert len(records) == len(meanings) and records == babel.make_task(task, "dev", seed)
            for meaning, record in zip(meanings, records):
                prompt, answer = record["prompt"], record["completion"][1:]
                source = prompt.split("Input: ")[1].removesuffix("\nResponse:")
                assert tokenizer.unk_token_id not in tokenizer(prompt + record["completion"])["input_ids"]
                shown = languages[[x.name for x in languages].index(answer)] if task == "classify" else aldan
                assert source == shown.say(meaning)
                if task == "translate":
                    assert answer == borel.say(meaning)
                    example = encode(tokenizer, Prompt(), Pair("x", prompt, record["completion"]))
                    twin = encode(tokenizer, Prompt("babel", "Aldan-Borel"), Pair("x", source, answer))
                    assert (example.ids, example.labels, example.prompt) == (twin.ids, twin.labels, twin.prompt)
                if task == "summarise":
                    words = iter(borel.say(meaning).replace(".", "").split())
                    short = answer.removesuffix(".").split()
                    assert all(w in words for w in short)  # a subsequence of the translation
                    assert 2 <= len(short) <= 3 and all(any(w.startswith(stem) for stem in plain[1]) for w in short)
        labels = [r["completion"] for r in babel.make_task("classify", "train", seed)]
        assert 0.4 < labels.count(" Aldan") / len(labels) < 0.6 and set(labels) == {" Aldan", " Borel"}


def test_the_prompts_of_the_tasks_never_occur_in_pre_training():
    languages = babel._make_languages(0)
    tokenizer = babel._make_tokenizer(languages)
    ids, _ = corpus(tokenizer, languages, set(), 400)
    text = "\n".join(tokenizer.decode(line) for line in ids)
    for instruction in babel.TASKS.values():
        assert instruction.format(a="Aldan", b="Borel").removesuffix(".") not in text


def test_names_of_splits_and_tasks(tmp_path, monkeypatch):
    monkeypatch.setitem(babel.SIZES, "tiny", {"hidden": 32, "steps": 2})
    monkeypatch.setenv("KSLOTTERY_CACHE", str(tmp_path))
    for name, fields in (
        ("train", ["source", "target"]),
        ("classify-train", ["prompt", "completion"]),
        ("summarise-calibration", ["prompt", "completion"]),
    ):
        lines = open(babel.resolve(f"babel:{name}", 1, "tiny")).read().splitlines()
        assert [list(json.loads(line)) for line in lines] == [fields] * babel.SPLITS[name.split("-")[-1]]
    assert load_pairs(babel.resolve("babel:classify-test", 1, "tiny"))[0].target in (" Aldan", " Borel")
    for name in ("trian", "classify", "classify-", "-train", "rank-train", "classify-classify-train"):
        with pytest.raises(ValueError, match="classify-train"):
            babel.resolve(f"babel:{name}", 1, "tiny")
    with pytest.raises(ValueError, match="'rank'"):
        babel.make_task("rank", "train", 0)


def test_what_the_world_writes_is_part_of_its_name(tmp_path, monkeypatch):
    """The cache knows a world by VERSION: whoever changes its texts must raise it, or older folders would be read."""
    said = [
        [x.say(m) for x in babel._make_languages(0)] for meanings in babel._make_splits(0).values() for m in meanings
    ]
    tasks = [babel.make_task(task, split, 0) for task in babel.TASKS for split in babel.SPLITS]
    assert (babel.VERSION, fingerprint(json.dumps([said, tasks, babel._FORMATS]))[:16]) == (2, "00f54f83ffbd72c8"), (
        "raise VERSION and store the new fingerprint here"
    )
    languages = babel._make_languages(0)
    tokenizer = babel._make_tokenizer(languages)
    read = (json.dumps(tokenizer.get_vocab(), sort_keys=True), *corpus(tokenizer, languages, set(), 64))
    marks = ["fcf9d9bfa794e242", "1ec00c842cfab48b", "9daeed99496ee46e"]
    assert [fingerprint(part)[:16] for part in read] == marks, "pre-training reads something else: raise VERSION too"
    monkeypatch.setitem(babel.SIZES, "tiny", {"hidden": 32, "steps": 2})
    monkeypatch.setenv("KSLOTTERY_CACHE", str(tmp_path))
    with monkeypatch.context() as past:
        past.setattr(babel, "VERSION", babel.VERSION - 1)
        (babel.build_world(0, "tiny", progress=False).folder / "train.jsonl").write_text("stale")
    assert "stale" not in babel.build_world(0, "tiny", progress=False).split("train").read_text()
