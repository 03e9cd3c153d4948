"""Scores are sacrebleu's; translation does not depend on batches; extraction does what it says."""

import numpy as np
import pytest
import sacrebleu
import torch

from conftest import tiny_model
from kslottery.data import Example, Role
from kslottery.evaluation import Translation, first_line, paired_bootstrap, score, signatures, translate, whole
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
