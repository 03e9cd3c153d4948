"""Scores are sacrebleu's; translation does not depend on batches; extraction does what it says."""

import numpy as np
import pytest
import sacrebleu
import torch
from scipy.stats import beta, binom
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from conftest import tiny_model
from kslottery.data import Example, Pair, Role, collate
from kslottery.evaluation import (
    Choice,
    Translation,
    accuracy,
    exact_match,
    first_line,
    loglikelihood,
    multiple_choice,
    paired_bootstrap,
    score,
    score_choices,
    signatures,
    translate,
    whole,
)
from kslottery.rows import TunedRows


class Letters:
    "The least a tokenizer must do here."

    eos_token_id, pad_token_id, bos_token_id = 2, 0, 1

    def decode(self, ids, skip_special_tokens):
        return " ".join(f"t{i}" for i in ids if not (skip_special_tokens and i in (0, 1, 2)))


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
