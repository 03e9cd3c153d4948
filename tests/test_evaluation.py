"""Scores are sacrebleu's; translation does not depend on batches; extraction does what it says."""

import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
import sentencepiece
import torch
from scipy.stats import beta, binom
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from conftest import Letters, tiny_model
from kslottery.core import fingerprint
from kslottery.data import TEMPLATES, Example, Pair, Role, collate, get_template
from kslottery.evaluation import (
    EXTRACTIONS,
    METRICS,
    Choice,
    Extraction,
    Translation,
    accuracy,
    approximate_randomisation,
    comet,
    exact_match,
    first_line,
    get_extraction,
    loglikelihood,
    multiple_choice,
    paired_bootstrap,
    prompt_fields,
    restart,
    score,
    score_choices,
    score_statistics,
    sentence_scores,
    sentence_statistics,
    signatures,
    spbleu,
    translate,
    whole,
)
from kslottery.rows import TunedRows


def prompts(n=12):
    rng = np.random.default_rng(0)
    made = []
    for i in range(n):
        ids = [1, *rng.integers(5, 60, rng.integers(2, 9)).tolist()]
        made.append(Example(str(i), [*ids, 7, 2], [-100] * len(ids) + [7, 2], [0] + [1] * (len(ids) - 1) + [3, 0], len(ids)))
    return made


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma", "bloom"])
def test_batches_beams_and_rows(kind):
    model = tiny_model(kind)
    rows = TunedRows(range(5, 60), torch.randn(55, 16, generator=torch.Generator().manual_seed(0)))
    for beams in (1, 2):
        settings = dict(num_beams=beams, max_new_tokens=8, progress=False)
        single = translate(model, Letters(), prompts(), rows=rows, batch_size=1, **settings)
        assert [t.id for t in single] == [str(i) for i in range(12)]
        assert single == translate(rows.merged(model), Letters(), prompts(), batch_size=5, **settings)
        assert single == translate(model, Letters(), prompts(), rows=rows, read_by=list(Role), batch_size=5, **settings)
        assert translate(model, Letters(), prompts(), rows=rows, read_by=[], batch_size=5, **settings) == translate(model, Letters(), prompts(), **settings)


def test_ended_means_eos():
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[2] = 1
        model.model.norm.weight.fill_(1)
        model.model.embed_tokens.weight.fill_(1)  # the hidden state is positive: EOS wins at once
    assert all(t.ended and t.text == "" for t in translate(model, Letters(), prompts(), max_new_tokens=3, progress=False))
    with torch.no_grad():
        model.lm_head.weight[2] = -1
    assert not any(t.ended for t in translate(model, Letters(), prompts(), max_new_tokens=3, progress=False))


def test_extraction():
    assert whole(" a\n b \t c ") == "a b c" and first_line("\n\n a  b \nc") == "a b" and first_line("") == whole("\n") == ""


def test_scores_are_sacrebleus():
    references = ["the cat sat on the mat .", "it is raining in the town today ."]
    outputs = [Translation("0", "the cat sat on a mat .\nthe end", False), Translation("1", "it rains in the town today .", True)]
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
    assert s["last_line"]["chrf"] > 99.99 > s["whole"]["chrf"] and s["signatures"]["last_line"]["chrf"].endswith("|rule:last_line.3")
    assert set(s) == {"whole", "last_line", "eos_rate", "mean_length", "signatures"}
    assert paired_bootstrap({"a": outputs}, references, last, 5)["a"]["bleu"]["score"] == pytest.approx(100)


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
        ("explicit", ["\nEnglish: x", " Catalan: x", "\nTranslate the following sentence from English to Catalan.\nEnglish"]),
        ("paraphrase", ["\nText: x", "\nHere is a text in English.", "\nPlease give the same text in Catalan.", "\nTranslation: x"]),
        ("babel", ["\nInstruction: x", "\nInput: x", "\nResponse: x"]),
        ("# Q\n{source}\n# A {target}", ["\n# Q", " # x"]),
    ],
)
def test_a_restarted_prompt_is_cut(template, again):
    rule = restart(template, ("English", "Catalan"))
    kept = "Un gat, una Texta: dos\nresponse d'or"  # no field of any prompt: not at the start of a word, or not as it is written there
    for more in again:
        assert rule(f" {kept}\n {more} and more") == whole(kept)
    assert rule(kept) == whole(kept) and rule("") == "" and rule(again[0]) == ""
    preset = EXTRACTIONS["restart"]
    assert str(rule) == f"restart({get_template(template).name}).1" and (
        template not in TEMPLATES or all(preset(f"{kept}\n {more}") == whole(kept) for more in again)
    )
    prompt = "".join(text for text, _ in get_template(template).parts("A cat.", "", ("English", "Catalan")))
    assert rule(f"{kept}\n{prompt}") == whole(kept)  # the whole prompt once more


def test_a_prompt_without_fields_is_never_restarted_and_languages_are_asked_for():
    assert prompt_fields("prompt") == prompt_fields("explicit", ("", ""))[1:] == [] and restart("prompt")("Input: a\n### b") == "Input: a ### b"
    with pytest.raises(ValueError, match="languages"):
        restart("explicit")


def test_the_authors_rule():
    rule = EXTRACTIONS["authors"]
    assert rule(" Un gat\nUn gos\n\n### Input: x") == "Un gat Un gos  ### Input: x"  # new lines are spaces, and what follows is scored
    assert rule("Un gat\n### Response: Un gos") == "Un gat"
    assert rule("see: <p>Un gat</p> more") == "Un gat" and rule("a: b") == "a: b"  # no cut at a colon


def spoken(n=40, seed=0):
    "References and two systems with capitals, punctuation, entities, empty lines and letters beyond ASCII."
    rng = np.random.default_rng(seed)
    words = ["L'home", "dóna", "3,5", "pa;", "i", "aigua.", "(sí)", "x&amp;y", "“què?”", "e-mail", "ñ", "10%", "EUA", "no...", "ha", "vist", "un", "gat"]
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
    said = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONUTF8": "1", "NO_COLOR": "1"})
    return said.stdout


@pytest.mark.parametrize("rule", ["whole", "first_line"])
@pytest.mark.parametrize("metric, options", [("bleu", []), ("chrf", []), ("ter", []), ("chrf++", ["--chrf-word-order", "2"])])
def test_scores_equal_sacrebleus_command_line(tmp_path, rule, metric, options):
    references, a, _ = spoken()
    said = json.loads(sacrebleu_says(tmp_path, references, {"a": a}, rule, "-f", "json", "-m", metric.rstrip("+"), *options))
    ours = score(a, references, rules=[rule], metrics=[metric])
    assert f"{ours[rule][metric]:.10f}" == f"{said['score']:.10f}"
    assert ours["signatures"][rule][metric] == f"{said['signature']}|rule:{rule}.1"


@pytest.mark.parametrize("test, samples", [("bs", 300), ("ar", 500)])
def test_significance_equals_sacrebleus_command_line(tmp_path, test, samples):
    references, a, b = spoken()
    options = ["-m", "bleu", "chrf", f"--paired-{test}", f"--paired-{test}-n", str(samples)]
    said = sacrebleu_says(tmp_path, references, {"a": a, "b": b}, "first_line", "-f", "text", *options)  # its JSON of a bootstrap fails under numpy 2
    table = said.split("\n\n")[0]
    ours = (paired_bootstrap if test == "bs" else approximate_randomisation)({"a": a, "b": b}, references, "first_line", samples)
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
        score_statistics([stats.sum(0), stats[some].sum(0)], metric), [score(a, references, metrics=[metric])["first_line"][metric], chosen]
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
        input=str(folder / "text"), model_prefix=str(folder / "tiny"), vocab_size=60, character_coverage=1.0, minloglevel=2
    )
    return folder / "tiny.model"


@pytest.mark.parametrize("name, file", [("flores101", "sacrebleu_tokenizer_spm.model"), ("flores200", "flores200sacrebleuspm")])
def test_spbleu_is_sacrebleus_given_its_model_file(tmp_path, monkeypatch, name, file):
    model = spm_model(tmp_path)
    (tmp_path / "models").mkdir()
    shutil.copy(model, tmp_path / "models" / file)
    monkeypatch.setenv("SACREBLEU", str(tmp_path))  # where the command line looks
    references, a, _ = spoken()
    said = json.loads(sacrebleu_says(tmp_path, references, {"a": a}, "first_line", "-f", "json", "-m", "bleu", "--tokenize", name))
    monkeypatch.setitem(METRICS, "spbleu", partial(spbleu, tokenizer=name, path=model))
    ours = score(a, references, metrics=["spbleu", "bleu"])
    assert f"{ours['first_line']['spbleu']:.10f}" == f"{said['score']:.10f}" and ours["first_line"]["spbleu"] != ours["first_line"]["bleu"]
    assert f"tok:{name}|spm:{fingerprint(model.read_bytes())[:12]}|" in ours["signatures"]["first_line"]["spbleu"]
    monkeypatch.setattr(sacrebleu.utils, "SACREBLEU_DIR", str(tmp_path))
    assert spbleu([references], name).corpus_score([first_line(t.text) for t in a], None).score == ours["first_line"]["spbleu"]


def test_no_other_score_goes_by_the_name_of_spbleu(tmp_path, monkeypatch):
    asked = lambda path=None: score([Translation("0", "a", True)], ["a"], metrics=["spbleu"]) if path is None else spbleu(path=path)
    monkeypatch.setattr(sacrebleu.utils, "SACREBLEU_DIR", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "kslottery\[spbleu\]"'):
        asked()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist: give the path of the SentencePiece model of flores101"):
        asked(tmp_path / "nowhere")

    def half(url, path):
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_bytes(b"")
        raise OSError("no network")

    monkeypatch.setattr("sacrebleu.tokenizers.tokenizer_spm.download_file", half)
    for _ in range(2):  # and nothing is left that a second call would take for a model
        with pytest.raises(
            FileNotFoundError, match=r"flores101, which could not be downloaded \(no network\): fetch https://.* and save it as .*spm.model, or give its path$"
        ):
            asked()


def test_a_model_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "broken").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="broken is no SentencePiece model"):
        spbleu(path=tmp_path / "broken")


STAND_IN = """#!{python}
import json, sys
a = dict(zip(sys.argv[1::2], sys.argv[2::2]))
src, mt, ref = ([line.strip() for line in open(a[k], encoding="utf-8")] for k in ("-s", "-t", "-r"))
if a["--model"] == "none": sys.exit("there is no such model")
json.dump({{a["-t"]: [dict(src=s, mt=m, ref=r, COMET=float(m == r)) for s, m, r in zip(src, mt, ref)]}}, open(a["--to_json"], "w"))
"""


def test_comet_is_asked_by_its_command(tmp_path):
    "A stand-in for `comet-score`, with the options and the file of unbabel-comet 2.2.7: it scores 1 where translation and reference are equal."
    command = tmp_path / "comet-score"
    command.write_text(STAND_IN.format(python=sys.executable))
    command.chmod(0o755)
    outputs, references, sources = (
        [Translation("0", "a b\nmore", False), Translation("1", "", True), Translation("2", "é", True)],
        ["a b", "c", "é"],
        ["x", "y", "z"],
    )
    found = comet(outputs, references, sources, rule="first_line", command=str(command))
    assert found["sentences"] == [1, 0, 1] and found["comet"] == pytest.approx(2 / 3) and found["signature"] == "model:Unbabel/wmt22-comet-da|rule:first_line.1"
    assert comet(outputs, references, sources, command=str(command))["sentences"] == [0, 0, 1]
    with pytest.raises(RuntimeError, match="comet-score failed: there is no such model"):
        comet(outputs, references, sources, model="none", command=str(command))
    with pytest.raises(ValueError, match="2 sources for 3 references"):
        comet(outputs, references, sources[:2], command=str(command))
    with pytest.raises(FileNotFoundError, match="environment of its own"):
        comet(outputs, references, sources, command=str(tmp_path / "nowhere"))


def test_two_kinds_of_bleu_are_compared_side_by_side(monkeypatch):
    monkeypatch.setitem(METRICS, "lower", lambda references=None: sacrebleu.metrics.BLEU(lowercase=True, references=references))
    references, a, b = spoken()
    found = paired_bootstrap({"a": a, "b": b}, references, n_samples=20, metrics=["bleu", "lower"])["b"]
    assert found["bleu"]["score"] == score(b, references)["whole"]["bleu"] and set(found) == {"bleu", "lower"}
    with pytest.raises(ValueError, match="metric is 'rouge': choose bleu, chrf"):
        score(a, references, metrics=["rouge"])


def test_the_bootstrap_interval_covers_and_orders():
    rng = np.random.default_rng(0)
    references = [" ".join(rng.choice(list("abcdefgh"), 8)) for _ in range(80)]
    noisy = lambda e: [Translation(str(i), " ".join("x" if rng.random() < e else w for w in r.split()), True) for i, r in enumerate(references)]
    result = paired_bootstrap({"a": noisy(0.4), "b": noisy(0.1)}, references, n_samples=200)
    for r in result.values():
        assert abs(r["bleu"]["score"] - r["bleu"]["mean"]) < r["bleu"]["ci"]
    assert result["a"]["bleu"]["pvalue"] is None and result["b"]["bleu"]["pvalue"] < 0.05


def test_what_is_refused():
    with pytest.raises(ValueError, match="1 translations for 2 references"):
        score([Translation("0", "a", True)], ["a", "b"])
    with pytest.raises(ValueError, match="no examples"):
        translate(tiny_model("llama"), Letters(), [])
    with pytest.raises(ValueError, match="first_line"):
        paired_bootstrap({"a": [Translation("0", "a", True)]}, ["a"], "second_line")


def answered(n=9):
    "Prompts of different lengths with targets of one to four tokens and an EOS."
    rng, made = np.random.default_rng(1), []
    for i in range(n):
        ids, tail = [1, *rng.integers(5, 60, rng.integers(1, 9)).tolist()], rng.integers(5, 60, 1 + i % 4).tolist()
        made.append(Example(str(i), [*ids, *tail, 2], [-100] * len(ids) + [*tail, 2], [0] + [2] * (len(ids) - 1) + [3] * len(tail) + [0], len(ids)))
    return made


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "gemma", "bloom"])
def test_loglikelihoods_are_those_of_a_plain_loop(kind):
    model = tiny_model(kind)
    rows = TunedRows(range(5, 60), torch.randn(55, 16, generator=torch.Generator().manual_seed(0)))
    merged = rows.merged(model)
    plain = {}
    for name, lm in (("base", model), ("rows", merged)):
        plain[name] = []
        for e in answered():
            with torch.no_grad():
                steps = [lm(torch.tensor([e.ids[:t]])).logits[0, -1].double().log_softmax(-1)[e.ids[t]] for t in range(e.prompt, len(e.ids) - 1)]
            plain[name].append(float(sum(steps)))
    for size in (1, 4, 20):
        settings = dict(batch_size=size, progress=False)
        np.testing.assert_allclose(loglikelihood(model, answered(), **settings), plain["base"], atol=2e-4)
        np.testing.assert_allclose(loglikelihood(model, answered(), rows=rows, **settings), plain["rows"], atol=2e-4)
        np.testing.assert_allclose(loglikelihood(merged, answered(), **settings), plain["rows"], atol=2e-4)
        np.testing.assert_array_equal(loglikelihood(model, answered(), rows=rows, read_by=[], **settings), loglikelihood(model, answered(), **settings))
    with torch.no_grad():  # the EOS that training labels is not counted
        loss = model(**{k: v for k, v in collate(answered(1), 0).items() if k != "roles"}).loss
    assert abs(-float(loss) * 2 - plain["base"][0]) > 0.5


def choosing():
    words = ["<pad>", "<s>", "</s>", ":", *"abcdefgh"]
    tok = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def test_the_most_likely_answer_is_chosen():
    "A head that always prefers c to b to a: one token each, so that the right choice is known without any arithmetic."
    model, tok = tiny_model("llama"), choosing()
    a, b, c = tok.convert_tokens_to_ids(list("abc"))
    with torch.no_grad():
        model.model.norm.weight.zero_()
        model.model.norm.weight[0] = 1
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight[:, 0] = 1
        model.lm_head.weight.zero_()
        for token, value in ((a, 1.0), (b, 2.0), (c, 3.0)):
            model.lm_head.weight[token, 0] = value
    pairs = [Pair(str(i), "d e :", right) for i, right in enumerate((" a", " b", " c", " c"))]
    results = multiple_choice(model, tok, pairs, [" a", " b", " c"], progress=False)
    assert [r.answer for r in results] == [0, 1, 2, 2] and all(int(np.argmax(r.loglikelihood)) == 2 for r in results)
    s = score_choices(results)
    assert s["acc"] == s["acc_norm"] == accuracy([False, False, True, True])
    per_question = [[" c", right] if right != " c" else [" c", " a"] for _, _, right in pairs]
    assert [r.answer for r in multiple_choice(model, tok, pairs, per_question, progress=False)] == [1, 1, 0, 0]
    long = multiple_choice(model, tok, [Pair("0", "d :", " a")], [" a", " b b b b"], progress=False)[0]
    np.testing.assert_allclose(long.per_character, np.divide(long.loglikelihood, [len("a"), len("b b b b")]))  # the space in front is not counted


def test_the_two_accuracies_differ_as_they_should():
    short_but_likely = Choice("0", (-2.0, -3.0), (-2.0 / 1, -3.0 / 6), 1)
    assert score_choices([short_but_likely])["acc"]["accuracy"] == 0 and score_choices([short_but_likely])["acc_norm"]["accuracy"] == 1


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
    assert exact_match(outputs[:1], ["a b\nc"])["whole"]["accuracy"] == exact_match(outputs[:1], ["a b\nc"])["first_line"]["accuracy"] == 1


@pytest.mark.parametrize(
    "choices, words",
    [
        ([" a"], ["at least two"]),
        ([], ["at least two"]),
        ([" a", " a"], ["all different"]),
        ([" a", "  "], ["none empty"]),
        (["a", "b"], ["' a'", "spaces count"]),
        ([[" a", " b"]], ["1 lists of choices for 2 questions"]),
    ],
)
def test_bad_choices_get_one_sentence(choices, words):
    with pytest.raises(ValueError) as caught:
        multiple_choice(tiny_model("llama"), choosing(), [Pair("0", "d :", " a"), Pair("1", "e :", " b")], choices, progress=False)
    assert all(w in str(caught.value) for w in words) and "\n" not in str(caught.value)


def test_nothing_to_score_is_refused():
    for call in (lambda: loglikelihood(tiny_model("llama"), []), lambda: multiple_choice(None, None, [], [" a", " b"]), lambda: accuracy([])):
        with pytest.raises(ValueError, match="there are no"):
            call()
    with pytest.raises(ValueError, match="1 continuations for 2 references"):
        exact_match([Translation("0", "a", True)], ["a", "b"])
