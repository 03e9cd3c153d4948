"""Scores are sacrebleu's; translation does not depend on batches; extraction does what it says."""

import copy
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
import sentencepiece
import torch
from scipy.stats import beta, binom

from conftest import TOY, tiny_model
from kslottery.core import fingerprint
from kslottery.data import TEMPLATES, Pair, Prompt, Role
from kslottery.evaluation import (
    EXTRACTIONS,
    METRICS,
    Extraction,
    Generation,
    Translation,
    accuracy,
    approximate_randomisation,
    comet,
    exact_match,
    first_line,
    get_extraction,
    get_metric,
    paired_bootstrap,
    restart,
    score,
    score_statistics,
    sentence_scores,
    sentence_statistics,
    signatures,
    spbleu,
    translate,
    whole,
)
from kslottery.rows import TunedRows

PROMPT = Prompt()  # the source itself


def sentences(n=12):
    "Sources of two to eight tokens, each with a target of one."
    rng = np.random.default_rng(0)
    return [Pair(str(i), " ".join(f"t{t}" for t in rng.integers(5, 60, rng.integers(2, 9))), " t7") for i in range(n)]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma", "bloom"])
def test_batches_beams_and_rows(kind):
    model, pairs = tiny_model(kind), sentences()
    rows = TunedRows(range(5, 60), torch.randn(55, 16, generator=torch.Generator().manual_seed(0)))
    written = rows.write(copy.deepcopy(model))
    for beams in (1, 2):
        said = lambda lm, size, rows=None, beams=beams, **more: translate(
            lm, TOY, pairs, PROMPT, rows, generation=Generation(8, beams, size), progress=False, **more
        )
        single = said(model, 1, rows)
        assert [t.id for t in single] == [str(i) for i in range(12)]
        assert single == said(written, 5) == said(model, 5, rows, read_by=list(Role))
        assert said(model, 5, rows, read_by=[]) == said(model, 16) != single
        assert said(model, 5, TunedRows([], np.zeros((0, 16)))) == said(model, 16)  # an empty ticket goes through


def test_the_model_is_asked_as_the_prompt_says():
    "What the model reads is the prompt around the source; the target is not shown."
    read = []

    class Listening(type(tiny_model("llama"))):
        def generate(self, **inputs):
            read.extend(inputs["input_ids"].tolist())
            return super().generate(**inputs)

    model = tiny_model("llama")
    model.__class__ = Listening
    translate(model, TOY, [Pair("0", "t9 t8", "t7")], Prompt("t5 {source} t6 {target}"), progress=False)
    assert read == [[5, 9, 8, 6]]


def test_ended_means_eos():
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[63] = 1
        model.model.norm.weight.fill_(1)
        model.model.embed_tokens.weight.fill_(1)  # the hidden state is positive: EOS wins at once
    said = lambda: translate(model, TOY, sentences(), PROMPT, generation=Generation(3), progress=False)
    assert all(t.ended and t.text == "" and len(t.tokens) == 1 for t in said())
    with torch.no_grad():
        model.lm_head.weight[63] = -1
    assert not any(t.ended or len(t.tokens) < 3 for t in said())


def test_extraction():
    assert (
        whole(" a\n b \t c ") == "a b c"
        and first_line("\n\n a  b \nc") == "a b"
        and first_line("") == whole("\n") == ""
    )


def test_scores_are_sacrebleus():
    references = ["the cat sat on the mat .", "it is raining in the town today ."]
    outputs = [
        Translation("0", "the cat sat on a mat .\nthe end", False),
        Translation("1", "it rains in the town today .", True),
    ]
    s = score(outputs, references)
    lines = [o.text.split("\n")[0] for o in outputs]
    assert (
        s["first_line"]["bleu"] == sacrebleu.corpus_bleu(lines, [references]).score
        and s["first_line"]["chrf"] == sacrebleu.corpus_chrf(lines, [references]).score
    )
    assert s["whole"]["bleu"] == sacrebleu.corpus_bleu([o.text.replace("\n", " ") for o in outputs], [references]).score
    assert s["eos_rate"] == 0.5 and s["mean_length"] == (len(outputs[0].text) + len(outputs[1].text)) / 2
    assert "tok:13a" in signatures(references)["bleu"] and "nc:6" in signatures(references)["chrf"]


def test_extractions_are_data():
    assert {name: rule.name for name, rule in EXTRACTIONS.items()} == {name: name for name in EXTRACTIONS}
    assert str(get_extraction("whole")) == "whole.1" and get_extraction(EXTRACTIONS["whole"]) is EXTRACTIONS["whole"]
    with pytest.raises(ValueError, match="'last_line': choose whole, first_line, authors, restart"):
        get_extraction("last_line")
    references = ["a b c d e f"]
    outputs = [Translation("0", "x\na b c d e f", True)]
    last = Extraction("last_line", 3, lambda text: text.split("\n")[-1])
    s = score(outputs, references, rules=["whole", last], metrics=["chrf"])
    assert s["last_line"]["chrf"] > 99.99 > s["whole"]["chrf"] and s["signatures"]["last_line"]["chrf"].endswith(
        "|rule:last_line.3"
    )
    assert set(s) == {"whole", "last_line", "eos_rate", "mean_length", "signatures"}
    assert paired_bootstrap({"a": outputs}, references, last, samples=5)["a"]["bleu"]["score"] == pytest.approx(100)


@pytest.mark.parametrize(
    "template, again",
    [
        (
            "alpaca",
            [
                "\n\n### Instruction:\nSay",
                "### Input: x",
                "\nBelow is an instruction that desc",
            ],
        ),
        (
            "explicit",
            ["\nEnglish: x", " Catalan: x", "\nTranslate the following sentence from English to Catalan.\nEnglish"],
        ),
        (
            "paraphrase",
            [
                "\nText: x",
                "\nHere is a text in English.",
                "\nPlease give the same text in Catalan.",
                "\nTranslation: x",
            ],
        ),
        ("babel", ["\nInstruction: x", "\nInput: x", "\nResponse: x"]),
        ("# Q\n{source}\n# A {target}", ["\n# Q", " # x"]),
    ],
)
def test_a_restarted_prompt_is_cut(template, again):
    prompt = Prompt(template, "en-ca")
    rule = restart(prompt)
    # no field of any prompt: not at the start of a word, or not as it is written there
    kept = "Un gat, una Texta: dos\nresponse d'or"
    for more in again:
        assert rule(f" {kept}\n {more} and more") == whole(kept)
    assert rule(kept) == whole(kept) and rule("") == "" and rule(again[0]) == ""
    preset = EXTRACTIONS["restart"]
    assert str(rule) == f"restart({prompt.template.name}).1" and (
        template not in TEMPLATES or all(preset(f"{kept}\n {more}") == whole(kept) for more in again)
    )
    again = prompt.text.replace("{source}", "A cat.").replace("{target}", "")
    assert rule(f"{kept}\n{again}") == whole(kept)  # the whole prompt once more


def test_a_prompt_without_fields_is_never_restarted():
    assert restart(Prompt("prompt"))("Input: a\n### b") == "Input: a ### b"


def test_the_authors_rule():
    rule = EXTRACTIONS["authors"]
    assert (
        rule(" Un gat\nUn gos\n\n### Input: x") == "Un gat Un gos  ### Input: x"
    )  # new lines are spaces, and what follows is scored
    assert rule("Un gat\n### Response: Un gos") == "Un gat"
    assert rule("see: <p>Un gat</p> more") == "Un gat" and rule("a: b") == "a: b"  # no cut at a colon


def spoken(n=40, seed=0):
    "References and two systems with capitals, punctuation, entities, empty lines and letters beyond ASCII."
    rng = np.random.default_rng(seed)
    words = [
        "L'home",
        "dóna",
        "3,5",
        "pa;",
        "i",
        "aigua.",
        "(sí)",
        "x&amp;y",
        "“què?”",
        "e-mail",
        "ñ",
        "10%",
        "EUA",
        "no...",
        "ha",
        "vist",
        "un",
        "gat",
    ]
    references = [" ".join(rng.choice(words, rng.integers(3, 15))) for _ in range(n)]
    noisy = lambda e: [" ".join("gos" if rng.random() < e else w for w in r.split()) for r in references]
    a, b = noisy(0.3), noisy(0.2)
    a[3] = ""
    system = lambda texts: [Translation(str(i), f"{t}\nInput: more of it", bool(t)) for i, t in enumerate(texts)]
    return references, system(a), system(b)


def sacrebleu_says(folder, references, systems, rule, *options):
    "What sacrebleu's command line prints of the same texts, with ten digits."
    (folder / "ref").write_text("\n".join(references) + "\n", encoding="utf-8")
    for name, outputs in systems.items():
        (folder / name).write_text("".join(EXTRACTIONS[rule](t.text) + "\n" for t in outputs), encoding="utf-8")
    command = [sys.executable, "-m", "sacrebleu", "ref", "-i", *systems, "-w", "10", *options]
    said = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONUTF8": "1", "NO_COLOR": "1"},
    )
    return said.stdout


@pytest.mark.parametrize("rule", ["whole", "first_line"])
@pytest.mark.parametrize(
    "metric, options", [("bleu", []), ("chrf", []), ("ter", []), ("chrf++", ["--chrf-word-order", "2"])]
)
def test_scores_equal_sacrebleus_command_line(tmp_path, rule, metric, options):
    references, a, _ = spoken()
    said = json.loads(
        sacrebleu_says(tmp_path, references, {"a": a}, rule, "-f", "json", "-m", metric.rstrip("+"), *options)
    )
    ours = score(a, references, rules=[rule], metrics=[metric])
    assert f"{ours[rule][metric]:.10f}" == f"{said['score']:.10f}"
    assert ours["signatures"][rule][metric] == f"{said['signature']}|rule:{rule}.1"


@pytest.mark.parametrize("test, samples", [("bs", 300), ("ar", 500)])
def test_significance_equals_sacrebleus_command_line(tmp_path, test, samples):
    references, a, b = spoken()
    options = ["-m", "bleu", "chrf", f"--paired-{test}", f"--paired-{test}-n", str(samples)]
    said = sacrebleu_says(
        tmp_path, references, {"a": a, "b": b}, "first_line", "-f", "text", *options
    )  # its JSON of a bootstrap fails under numpy 2
    table = said.split("\n\n")[0]
    ours = (paired_bootstrap if test == "bs" else approximate_randomisation)(
        {"a": a, "b": b}, references, "first_line", samples=samples
    )
    expected = []
    for name in "ab":
        for r in (ours[name]["bleu"], ours[name]["chrf"]):
            expected += [f"{r[k]:.10f}" for k in ("score", "mean", "ci") if k in r]
    expected += [f"{ours['b'][m]['pvalue']:.4f}" for m in ("bleu", "chrf")]
    assert re.findall(r"\d+\.\d+", table) == expected and len(expected) == (14 if test == "bs" else 6)
    assert ours["a"]["bleu"]["pvalue"] is None


@pytest.mark.parametrize("metric", ["bleu", "chrf", "chrf++", "ter"])
def test_sentence_statistics_sum_to_the_score(metric):
    references, a, _ = spoken()
    stats = sentence_statistics(a, references, rule="first_line", metric=metric)
    some = [1, 4, 4, 17, 3]
    chosen = score([a[i] for i in some], [references[i] for i in some], metrics=[metric])["first_line"][metric]
    np.testing.assert_array_equal(
        score_statistics([stats.sum(0), stats[some].sum(0)], metric),
        [score(a, references, metrics=[metric])["first_line"][metric], chosen],
    )
    with pytest.raises(ValueError, match="read-only"):
        stats[0] = 0  # kept for the next call
    each = sentence_scores(a, references, rule="first_line", metric=metric)
    one = {"bleu": sacrebleu.sentence_bleu, "chrf": sacrebleu.sentence_chrf, "ter": sacrebleu.sentence_ter}
    if metric in one:
        assert each.tolist() == [one[metric](first_line(t.text), [r]).score for t, r in zip(a, references)]


def test_kept_statistics_are_of_their_own_texts():
    references, a, b = spoken()
    found = [
        sentence_statistics(x, r, rule=rule, metric=m)
        for x in (a, b)
        for r in (references, references[::-1])
        for rule in ("whole", "first_line")
        for m in ("bleu", "chrf")
    ]
    assert not any(np.array_equal(x, y) for i, x in enumerate(found) for y in found[:i])
    before = METRICS["bleu"]
    METRICS["bleu"] = METRICS["ter"]  # a registry may change
    try:
        assert sentence_statistics(a, references).shape[1] == 2
    finally:
        METRICS["bleu"] = before
    np.testing.assert_array_equal(sentence_statistics(a, references), found[0])


def spm_model(folder):
    (folder / "text").write_text("\n".join(spoken(300)[0]), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "tiny"),
        vocab_size=60,
        character_coverage=1.0,
        minloglevel=2,
    )
    return folder / "tiny.model"


@pytest.fixture
def spm_folder(tmp_path, monkeypatch):
    "Where sacrebleu keeps its models: an empty folder, for this process and for those it starts."
    (tmp_path / "models").mkdir()
    monkeypatch.setenv("SACREBLEU", str(tmp_path))
    monkeypatch.setattr("sacrebleu.tokenizers.tokenizer_spm.SACREBLEU_DIR", str(tmp_path))
    return tmp_path / "models"


@pytest.mark.parametrize(
    "metric, name, file",
    [
        ("spbleu", "flores101", "sacrebleu_tokenizer_spm.model"),
        ("spbleu200", "flores200", "flores200sacrebleuspm"),
    ],
)
def test_spbleu_is_sacrebleus_given_its_model_file(tmp_path, spm_folder, metric, name, file):
    model = spm_model(tmp_path)
    shutil.copy(model, spm_folder / file)
    references, a, _ = spoken()
    options = ("-f", "json", "-m", "bleu", "--tokenize", name)
    said = json.loads(sacrebleu_says(tmp_path, references, {"a": a}, "first_line", *options))
    ours = score(a, references, metrics=[metric, "bleu"])
    found = ours["first_line"]
    assert f"{found[metric]:.10f}" == f"{said['score']:.10f}" and found[metric] != found["bleu"]
    assert f"tok:{name}|spm:{fingerprint(model.read_bytes())[:12]}|" in ours["signatures"]["first_line"][metric]
    texts = [first_line(t.text) for t in a]
    assert spbleu([references], name).corpus_score(texts, None).score == found[metric]


def test_no_other_score_goes_by_the_name_of_spbleu(spm_folder, monkeypatch):
    asked = lambda: score([Translation("0", "a", True)], ["a"], metrics=["spbleu"])

    def half(url, path):
        Path(path).write_bytes(b"")
        raise OSError("no network")

    monkeypatch.setattr("sacrebleu.tokenizers.tokenizer_spm.download_file", half)
    words = r"flores101, which could not be downloaded \(no network\): fetch https://.* and save it as .*spm.model$"
    for _ in range(2):  # and nothing is left that a second call would take for a model
        with pytest.raises(FileNotFoundError, match=words):
            asked()
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ImportError, match=r'pip install "kslottery\[spbleu\]"'):
        asked()


def test_a_model_file_that_is_none_is_refused(spm_folder):
    file = spm_folder / "sacrebleu_tokenizer_spm.model"
    file.write_bytes(b"not a model")
    with pytest.raises(ValueError, match="spm.model is no SentencePiece model"):
        spbleu()
    assert file.read_bytes() == b"not a model"  # what somebody put there stays


STAND_IN = """#!{python}
import json, sys
a = dict(zip(sys.argv[1::2], sys.argv[2::2]))
src, mt, ref = ([line.strip() for line in open(a[k], encoding="utf-8")] for k in ("-s", "-t", "-r"))
if a["--model"] == "none": sys.exit("there is no such model")
scored = [dict(src=s, mt=m, ref=r, COMET=float(m == r)) for s, m, r in zip(src, mt, ref)]
json.dump({{a["-t"]: scored}}, open(a["--to_json"], "w"))
"""


def test_comet_is_asked_by_its_command(tmp_path):
    """A stand-in for `comet-score`, with the options and the file of unbabel-comet 2.2.7.

    It scores 1 where translation and reference are equal.
    """
    command = tmp_path / "comet-score"
    command.write_text(STAND_IN.format(python=sys.executable))
    command.chmod(0o755)
    outputs = [Translation("0", "a b\nmore", False), Translation("1", "", True), Translation("2", "é", True)]
    pairs = [Pair("0", "x", "a b"), Pair("1", "y", "c"), Pair("2", "z", "é")]
    found = comet(outputs, pairs, rule="first_line", command=str(command))
    assert found["sentences"] == [1, 0, 1] and found["comet"] == pytest.approx(2 / 3)
    assert found["signature"] == "model:Unbabel/wmt22-comet-da|rule:first_line.1"
    assert comet(outputs, pairs, command=str(command))["sentences"] == [0, 0, 1]
    with pytest.raises(RuntimeError, match="comet-score failed: there is no such model"):
        comet(outputs, pairs, model="none", command=str(command))
    with pytest.raises(ValueError, match="3 translations for 2 references"):
        comet(outputs, pairs[:2], command=str(command))
    with pytest.raises(FileNotFoundError, match="environment of its own"):
        comet(outputs, pairs, command=str(tmp_path / "nowhere"))


def test_two_kinds_of_bleu_are_compared_side_by_side(monkeypatch):
    monkeypatch.setitem(
        METRICS, "lower", lambda references=None: sacrebleu.metrics.BLEU(lowercase=True, references=references)
    )
    references, a, b = spoken()
    found = paired_bootstrap({"a": a, "b": b}, references, samples=20, metrics=["bleu", "lower"])["b"]
    assert found["bleu"]["score"] == score(b, references)["whole"]["bleu"] and set(found) == {"bleu", "lower"}
    with pytest.raises(ValueError, match="metric is 'rouge': choose bleu, chrf"):
        score(a, references, metrics=["rouge"])


def test_the_bootstrap_interval_covers_and_orders():
    rng = np.random.default_rng(0)
    references = [" ".join(rng.choice(list("abcdefgh"), 8)) for _ in range(80)]
    noisy = lambda e: [
        Translation(str(i), " ".join("x" if rng.random() < e else w for w in r.split()), True)
        for i, r in enumerate(references)
    ]
    result = paired_bootstrap({"a": noisy(0.4), "b": noisy(0.1)}, references, samples=200)
    for r in result.values():
        assert abs(r["bleu"]["score"] - r["bleu"]["mean"]) < r["bleu"]["ci"]
    assert result["a"]["bleu"]["pvalue"] is None and result["b"]["bleu"]["pvalue"] < 0.05


def test_what_is_refused():
    with pytest.raises(ValueError, match="1 translations for 2 references"):
        score([Translation("0", "a", True)], ["a", "b"])
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="no pairs"):
        translate(model, TOY, [], PROMPT)
    with pytest.raises(TypeError, match="give a Prompt"):
        translate(model, TOY, sentences(), "{source} {target}")
    with pytest.raises(ValueError, match="first_line"):
        paired_bootstrap({"a": [Translation("0", "a", True)]}, ["a"], "second_line")


@pytest.mark.parametrize("name", ["max_new_tokens", "num_beams", "batch_size"])
@pytest.mark.parametrize("value", [0, -1, 2.0, "16", True, None])
def test_a_generation_is_checked_when_it_is_made(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value!r}: give a whole number of at least 1"):
        Generation(**{name: value})
    assert dataclasses.replace(Generation(), **{name: 3}) == Generation(**{name: 3})


def test_pairs_and_their_references_are_scored_alike():
    references, a, b = spoken()
    pairs = [Pair(t.id, "x", reference) for t, reference in zip(a, references)]
    assert score(a, pairs) == score(a, references) and exact_match(a, pairs) == exact_match(a, references)
    for by in (paired_bootstrap, approximate_randomisation):
        assert by({"a": a, "b": b}, pairs, samples=20) == by({"a": a, "b": b}, references, samples=20)
    for by in (sentence_scores, sentence_statistics):
        np.testing.assert_array_equal(by(a, pairs), by(a, references))
    assert signatures(pairs) == signatures(references) == signatures(references[:1])
    assert str(get_metric("bleu", pairs).get_signature()) == signatures(pairs)["bleu"]


def test_scores_are_a_dictionary_that_reads_as_a_table():
    s = score([Translation("0", "a b c\nd", True), Translation("1", "a", False)], ["a b c", "a b"])
    shown, page = repr(s), s._repr_html_()
    for text in ("bleu", "chrf", "whole", "first line", f"{s['first_line']['chrf']:.1f}", "ends 50%", "4 characters"):
        assert text in shown and text in page
    assert len(shown.splitlines()) == 4 and json.loads(json.dumps(s)) == s == dict(s)


def test_the_interval_is_clopper_and_pearsons_and_covers():
    n, found = 12, []
    for k in range(n + 1):
        low, high = accuracy([True] * k + [False] * (n - k))["ci"]
        assert low == pytest.approx(beta.ppf(0.025, k, n - k + 1) if k else 0, abs=1e-9)
        assert high == pytest.approx(beta.ppf(0.975, k + 1, n - k) if k < n else 1, abs=1e-9)
        found.append((low, high))
    for p in np.linspace(0.01, 0.99, 50):
        assert sum(binom.pmf(k, n, p) for k, (low, high) in enumerate(found) if low <= p <= high) >= 0.95
    assert accuracy(np.array([1, 0]))["n"] == 2


def test_exact_match():
    outputs = [Translation("0", " a  b\nc", False), Translation("1", "a b", True)]
    result = exact_match(outputs, [" a b", "a b"])
    assert result["whole"]["accuracy"] == 0.5 and result["first_line"]["accuracy"] == 1
    assert (
        exact_match(outputs[:1], ["a b\nc"])["whole"]["accuracy"]
        == exact_match(outputs[:1], ["a b\nc"])["first_line"]["accuracy"]
        == 1
    )


def test_nothing_to_score_is_refused():
    with pytest.raises(ValueError, match="there are no answers"):
        accuracy([])
    for translations, references in (([Translation("0", "a", True)], ["a", "b"]), ([], [])):
        with pytest.raises(ValueError, match=f"{len(translations)} translations for {len(references)} references"):
            exact_match(translations, references)
