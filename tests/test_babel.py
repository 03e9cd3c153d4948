"""The built-in world: one seed, one world; held-out meanings stay out of pre-training; it loads like any checkpoint."""

import errno
import gzip
import itertools
import json
import os
import random
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import ROOT
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
    """The cache knows a world by _VERSION: whoever changes its texts must raise it, or older folders would be read."""
    said = [
        [x.say(m) for x in babel._make_languages(0)] for meanings in babel._make_splits(0).values() for m in meanings
    ]
    tasks = [babel.make_task(task, split, 0) for task in babel.TASKS for split in babel.SPLITS]
    assert (babel._VERSION, fingerprint(json.dumps([said, tasks, babel._FORMATS]))[:16]) == (2, "00f54f83ffbd72c8"), (
        "raise _VERSION and store the new fingerprint here"
    )
    languages = babel._make_languages(0)
    tokenizer = babel._make_tokenizer(languages)
    read = (json.dumps(tokenizer.get_vocab(), sort_keys=True), *corpus(tokenizer, languages, set(), 64))
    marks = ["fcf9d9bfa794e242", "1ec00c842cfab48b", "9daeed99496ee46e"]
    assert [fingerprint(part)[:16] for part in read] == marks, "pre-training reads something else: raise _VERSION too"
    monkeypatch.setitem(babel.SIZES, "tiny", {"hidden": 32, "steps": 2})
    monkeypatch.setenv("KSLOTTERY_CACHE", str(tmp_path))
    with monkeypatch.context() as past:
        past.setattr(babel, "_VERSION", babel._VERSION - 1)
        (babel.build_world(0, "tiny", progress=False).folder / "train.jsonl").write_text("stale")
    assert "stale" not in babel.build_world(0, "tiny", progress=False).split("train").read_text()


# What the cache may have become


@pytest.fixture
def built(tmp_path, monkeypatch):
    "How often a world was built; building takes no time here."
    monkeypatch.setenv("KSLOTTERY_CACHE", str(tmp_path / "cache"))
    seeds = []

    def build(folder, seed, **more):
        seeds.append(seed)
        for name in ("train.jsonl", "model.safetensors", "babel.json"):
            (folder / name).write_text(json.dumps({"parameters": seed}))

    monkeypatch.setattr(babel, "_build", build)
    return seeds


@pytest.mark.parametrize(
    "harm",
    [
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "train.jsonl").write_text(""),
        lambda folder: (folder / "train.jsonl").write_text('{"parameters": 8}'),
        lambda folder: (folder / "babel.json").unlink(),
        lambda folder: (folder / "babel.json").write_text('{"parameters": 7}'),  # as earlier versions wrote it
        lambda folder: (folder / "babel.json").write_text('{"files": 3}'),
        lambda folder: (folder / "babel.json").write_text("[" * 100_000),
        lambda folder: (folder / "babel.json").write_bytes(b"\xff"),
        lambda folder: [path.unlink() for path in folder.iterdir() if "ledger" not in path.name],
    ],
)
def test_a_world_that_is_not_whole_is_built_again(built, harm):
    folder = babel.build_world(7).folder
    (folder / "train.jsonl.ledger.json").write_text("spent")
    (folder / ".train.jsonl.ledger.json.lock").write_text("")
    whole = {path.name: path.read_bytes() for path in folder.glob("[!.]*")}
    assert babel.build_world(7).folder == folder and built == [7]
    harm(folder)
    assert babel.build_world(7).facts["parameters"] == 7 and babel.build_world(7).folder == folder and built == [7, 7]
    assert {path.name: path.read_bytes() for path in folder.glob("[!.]*")} == whole  # what was spent, too


def test_what_is_not_ours_in_the_cache_stays(built, tmp_path):
    folder = tmp_path / "cache" / "babel-v2-small-seed0"
    (folder / "mine").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="seed0 exists and holds something else"):
        babel.build_world(size="small")
    (folder / "mine").rmdir()
    folder.rmdir()
    folder.write_text("mine")
    with pytest.raises(FileExistsError, match="seed0 exists and holds something else"):
        babel.build_world(size="small")
    assert folder.read_text() == "mine" and not built


def test_a_cache_that_cannot_be_written(built, tmp_path, monkeypatch):
    there = babel.build_world(1)
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda path, mode: mode == os.R_OK)  # a root may write anything
        assert babel.build_world(1) == there and built == [1]  # it is only read
        with pytest.raises(PermissionError, match="the cache .* cannot be written .* KSLOTTERY_CACHE"):
            babel.build_world(2)
    (tmp_path / "file").write_text("")
    for name in ("file", "file/below"):
        monkeypatch.setenv("KSLOTTERY_CACHE", str(tmp_path / name))
        with pytest.raises(PermissionError, match="/file is no folder that may be.: name another in the environment"):
            babel.build_world(1)

    def full(folder, *args, **more):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv("KSLOTTERY_CACHE", str(tmp_path / "full"))
    monkeypatch.setattr(babel, "_build", full)
    with pytest.raises(OSError, match="seed1 needs more than .* MB, and its disk is full"):
        babel.build_world(1)
    assert [path.suffix for path in (tmp_path / "full").iterdir()] == [".lock"]


def test_two_that_build_at_once_build_it_once(built):
    with ThreadPoolExecutor(4) as pool:
        worlds = list(pool.map(babel.build_world, [5] * 4))
    assert built == [5] and len(set(worlds)) == 1 and worlds[0].facts["parameters"] == 5


def test_seeds_are_checked_before_work(built):
    for wrong in (2**63, -(2**63), 10**400, "0", 1.5, None):
        with pytest.raises(ValueError, match="seed is .*: give a whole number below 2..63"):
            babel.build_world(wrong)
    assert babel.build_world(-5).facts["parameters"] == -5 and built == [-5]


# Real text, here made up


def sentences(start, stop, language, end="."):
    return [(f"There are {n} trees{end}", f"{language} {n} arbres{end}") for n in range(start, stop)]


def write(file, codes, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(("id", *codes.split("-"))), *(f"{i}\t{a}\t{b}" for i, (a, b) in enumerate(rows))]
    file.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode()))


def short_folder(place):
    "As `short`: files to pre-train on, and those of the experiment, which overlap with them."
    write(place / "pretrain-en-de.tsv.gz", "en-de", sentences(0, 60, "Da") + sentences(0, 5, "Hier"))
    write(place / "pretrain-en-da.tsv.gz", "en-da", sentences(0, 30, "Der"))
    for n, name in enumerate(("dev", "train", "test", "calibration"), 1):
        write(place / f"{name}.tsv.gz", "en-de", sentences(5 * n, 5 * n + 5, "Da"))
    return place


def test_a_folder_with_files_for_an_experiment(tmp_path):
    corpus = babel.load_corpus(short_folder(tmp_path))
    assert corpus.languages == "en-de" and corpus.shares == {"en-de": 0.6, "de-en": 0.15, "en-da": 0.25}
    assert [p.source for p in corpus.held_out] == [a for a, _ in sentences(5, 10, "")]
    kept = [a for a, _ in sentences(0, 5, "") + sentences(25, 60, "") + sentences(0, 5, "")]
    assert [p.source for p in corpus.pairs["en-de"]] == kept  # nothing of the four files
    assert [p.source for p in corpus.pairs["en-da"]] == [a for a, _ in sentences(0, 5, "") + sentences(25, 30, "")]
    assert [p[:0:-1] for p in corpus.pairs["de-en"]] == [p[1:] for p in corpus.pairs["en-de"]]
    (tmp_path / "dev.tsv.gz").unlink()
    assert len(babel.load_corpus(tmp_path).held_out) == 6  # a tenth of the main file
    with pytest.raises(ValueError, match="languages is 'en-fr': choose en-da, en-de"):
        babel.load_corpus(tmp_path, "en-fr")


def test_a_folder_with_train(tmp_path):
    for codes, more in (("en-ca", 100), ("en-es", 40), ("en-ro", 40)):
        write(tmp_path / "train" / f"{codes}.tsv.gz", codes, sentences(0, more, codes))
    write(tmp_path / "train" / "multi6.tsv.gz", "en-xx", sentences(0, 3, "no pair"))
    corpus = babel.load_corpus(tmp_path)
    assert corpus.shares == {"en-ca": 0.6, "ca-en": 0.15, "en-es": 0.125, "en-ro": 0.125}
    assert [p.source for p in corpus.held_out] == [a for a, _ in sentences(90, 100, "")]
    assert [len(side) for side in corpus.pairs.values()] == [90, 90, 40, 40]
    other = babel.load_corpus(tmp_path, "en-es")
    assert other.languages == "en-es" and [p.target[:5] for p in other.held_out] == ["en-es"] * 4
    assert len(other.pairs["en-ca"]) == 96  # what is held out is so in all languages
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty holds neither pretrain-XX-YY.tsv.gz nor train/XX-YY"):
        babel.load_corpus(tmp_path / "empty")


TINY = partial(babel.Pretraining, vocabulary=300, hidden=32, layers=1)
PAIRS = {
    "en-ca": [Pair("x", *p) for p in sentences(0, 40, "Hi ha")],
    "en-de": [Pair("x", *p) for p in sentences(0, 9, "Da")],
}


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def test_documents_of_real_text():
    tokenizer = babel._train_tokenizer(PAIRS, 400)
    opens, stops, eos = tokenizer.convert_tokens_to_ids(["<s>", "<d>", "</s>"])
    begun = {opens: 0, stops: 0}
    asked = {"Catalan": 0, "German": 0}
    for step in range(40):
        for ids, weight in zip(*babel._real_rows(tokenizer, PAIRS, {"en-ca": 3, "en-de": 1}, 0, step)):
            starts = [i for i, x in enumerate(ids) if x in begun]
            assert starts[0] == 0 and len(ids) == 128
            for start, end in itertools.pairwise([*starts, 128]):
                begun[ids[start]] += 1
                document = ids[start:end]
                text = tokenizer.decode(document[1:])
                asked["Catalan"] += "Catalan" in text
                asked["German"] += "German" in text
                ended = ids[start] == stops and end < 128  # one pair and EOS
                assert (document[-1] == eos and text.count("There are") == 1) if ended else eos not in document[:-1]
                assert ids[start] == stops or end == 128  # others go on to the end of the row
            assert set(weight.round(1).tolist()) <= {0, np.float32(0.3), 1}
    assert 0.25 < begun[stops] / sum(begun.values()) < 0.35
    assert 0.2 < asked["German"] / sum(asked.values()) < 0.3


def test_minutes_fix_the_steps_and_a_broken_run_goes_on(tmp_path, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(babel, "time", SimpleNamespace(monotonic=lambda: next(clock)))  # a second each time
    monkeypatch.setattr(babel, "_SAVE_EVERY", 2)
    seen = []

    def watch(step, model, tokenizer):
        seen.append(step)
        if len(seen) in (2, 3):
            raise KeyboardInterrupt
        return {"bleu": float(step)}

    def run(**given):
        return babel.pretrain_on_pairs(PAIRS, tmp_path / "runs" / "a", TINY(**given), watch=watch, progress=False)

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(minutes=0.3)
        clock = itertools.count(0, 1000)  # slower by far: the number of steps stands
        assert [p.name for p in (tmp_path / "runs").iterdir()] == [".a.safetensors"]
    with pytest.raises(ValueError, match="the state of another run .*: name another folder, or remove the file"):
        run(minutes=0.3, seed=1)
    state = tmp_path / "runs" / ".a.safetensors"
    kept = state.read_bytes()
    state.write_bytes(kept[:1000])
    with pytest.raises(ValueError, match="a.safetensors is damaged .*: remove it to start again"):
        run(minutes=0.3)
    state.write_bytes(kept)
    folder = run(minutes=0.3)
    steps = int(0.95 * 18)  # a step took a second
    record = json.loads((folder / "pretrain.json").read_text())
    assert record["steps"] == len(record["losses"]) == steps and seen[1] == seen[2] < steps == seen[-1]
    assert [p["bleu"] for p in record["points"]] == [p["step"] for p in record["points"]] and len(record["points"]) == 6
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["a"]
    monkeypatch.undo()
    whole = babel.pretrain_on_pairs(PAIRS, tmp_path / "b", TINY(steps=steps), progress=False)
    assert weights(whole) == weights(folder)
    assert json.loads((whole / "pretrain.json").read_text())["losses"] == record["losses"]
    before = (folder / "model.safetensors").stat().st_mtime_ns
    run(minutes=0.3)  # is done
    note = (folder / "pretrain.json").read_text()
    (folder / "pretrain.json").write_text(note[:-9])
    with pytest.raises(ValueError, match="pretrain.json is damaged .*: remove its folder"):
        run(minutes=0.3)
    (folder / "pretrain.json").write_text(note)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert weights(run(steps=2, penalty=2.0)) != weights(whole)  # another run, in the place of the finished one


def test_weight_decay_is_on_matrices_only():
    tokenizer = babel._train_tokenizer(PAIRS, 300)
    run = babel._RealRun(babel._new_llama(tokenizer, 32, 1, 0), None, 0)
    assert [(g["weight_decay"], {p.ndim for p in g["params"]}) for g in run.adam.param_groups] == [(0.1, {2}), (0, {1})]
    assert sum(len(g["params"]) for g in run.adam.param_groups) == len(list(run.model.parameters()))


def test_values_are_checked_before_work(tmp_path, monkeypatch):
    monkeypatch.setattr(babel, "_train_tokenizer", None)
    for wrong, sentence in (
        ({"minutes": 0}, "minutes is 0: give how long"),
        ({"minutes": -3.5}, "minutes is -3.5"),
        ({"minutes": float("nan")}, "minutes is nan"),
        ({"minutes": float("inf")}, "minutes is inf"),
        ({"steps": -1}, "steps is -1: give a whole number of at least 0"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"layers": 0}, "layers is 0: give a whole number of at least 1"),
        ({"vocabulary": 0}, "vocabulary is 0"),
        ({"hidden": 30}, "hidden is 30: give a multiple of 8"),
        ({"hidden": 1000}, "hidden is 1000: .*of 64"),
        ({"penalty": -1}, "penalty is -1"),
        ({"seed": 2**63}, "seed is 9223372036854775808: .* below 2"),
        ({"layers": 2**70}, "layers is .* below 2"),
    ):
        with pytest.raises(ValueError, match=sentence):
            TINY(**wrong)
    for shares, sentence in (
        ({"en-fr": 1}, "shares gives en-fr a share of 1: name directions that have pairs"),
        ({"en-ca": 0}, "shares gives en-ca a share of 0"),
    ):
        with pytest.raises(ValueError, match=sentence):
            babel.pretrain_on_pairs(PAIRS, tmp_path / "m", TINY(), shares=shares)
    with pytest.raises(ValueError, match="no pairs to pre-train on"):
        babel.pretrain_on_pairs({"en-ca": []}, tmp_path / "m")
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(FileExistsError, match="something else"):
        babel.pretrain_on_pairs(PAIRS, tmp_path, TINY())


@pytest.mark.skipif(not shutil.which("make"), reason="no make here")
def test_what_make_run_real_would_do(tmp_path):
    "It makes a model where none is given or shared, and runs the experiment on the sentences of the folder."

    def steps(*given):
        names = [f"KSLOTTERY_{kind}={tmp_path / kind.lower()}" for kind in ("DATA", "MODELS")]
        command = ["make", "-n", "-o", ".venv/ready", "run-real", *names, *given]
        place = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of `make test`
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=place).stdout
        model = said.split("test -n ")[1].split()[0].strip('"')
        return model, said.replace("\\\n", "").split("\n")[-2].split()

    short_folder(tmp_path / "data" / "short")
    write(tmp_path / "data" / "train" / "en-ca.tsv.gz", "en-ca", sentences(0, 9, ""))
    assert steps()[0] == ""  # none is shared
    (tmp_path / "models" / "en-de-short").mkdir(parents=True)
    model, experiment = steps()
    assert model == str(tmp_path / "models" / "en-de-short") and f"model={model}" in experiment
    for name in ("train", "test", "calibration"):
        assert f"{name}={tmp_path}/data/short/{name}.tsv.gz" in experiment
    assert {"languages=en-de", "top_k=7", "lr_embed=2e-3", "template=explicit"} <= {*experiment}
    assert steps(f"DATA={tmp_path}/data/short/")[0] == model and steps("MODEL=mine")[0] == "mine"
    assert steps("MODEL=")[0] == ""  # make one all the same
    model, experiment = steps(f"DATA={tmp_path}/data")
    assert model == "" and "model=runs/pretrain/model" in experiment and "languages=en-ca" in experiment
    assert f"test={tmp_path}/data/ntrex/eng.txt,{tmp_path}/data/ntrex/cat.txt" in experiment
