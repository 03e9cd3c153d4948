"""Where a gain comes from: exact where it is obvious, honest where sentences cannot tell, intervals that cover."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import binom

from conftest import TOY, Letters, tiny_model
from kslottery.data import Pair, Prompt
from kslottery.decomposition import Bootstrap, Interval, decompose, forced_stop, recovery, simultaneous
from kslottery.decomposition import share as part_of
from kslottery.evaluation import METRICS, Generation, Translation, first_line, score, sentence_statistics, translate
from kslottery.plots import plot_decomposition

WORDS = [f"w{i}" for i in range(60)]


def world(n, seed=0, base=0.4, tuned=0.2, rambling=0.7):
    "References, a base that says words wrong and often rambles, and a tuned model that says fewer wrong and stops."
    rng = np.random.default_rng(seed)
    references = [" ".join(rng.choice(WORDS, rng.integers(6, 14))) for _ in range(n)]
    said = lambda r, e: " ".join("x" if rng.random() < e else w for w in r.split())
    more = lambda: "\nInput: " + " ".join(rng.choice(WORDS, 8)) if rng.random() < rambling else ""
    before = [said(r, base) + more() for r in references]
    return (
        references,
        [Translation(str(i), t, "\n" not in t) for i, t in enumerate(before)],
        [Translation(str(i), said(r, tuned), True) for i, r in enumerate(references)],
    )


def as_systems(references):
    right = [Translation(str(i), r, True) for i, r in enumerate(references)]
    rambles = [Translation(t.id, f"{t.text}\n{references[i - 1]}", False) for i, t in enumerate(right)]
    wrong = [Translation(t.id, t.text.replace("1", "x"), True) for t in right]
    return right, rambles, wrong


@pytest.mark.parametrize("metric", sorted(METRICS.keys() - {"spbleu", "spbleu200"}))
def test_the_parts_are_differences_of_scores_and_the_obvious_is_exact(metric):
    references, base, tuned = world(30)
    s = [score(t, references, metrics=[metric]) for t in (base, tuned)]
    sign = -1 if metric == "ter" else 1
    d = decompose(base, tuned, references, metric=metric, bootstrap=Bootstrap(100))
    assert d.whole.value == sign * (s[1]["whole"][metric] - s[0]["whole"][metric]) > 0
    lines = sign * (s[1]["first_line"][metric] - s[0]["first_line"][metric])
    assert np.isclose(d.rules["first line"][0].value, lines)
    by_force = score(forced_stop(base, tuned), references, metrics=[metric])["whole"][metric]
    assert np.isclose(d.rules["forced stop"][1].value, sign * (by_force - s[0]["whole"][metric]))
    assert np.isclose(d.stopping.value, d.whole.value - d.content.value)
    assert d.stopping.value == max(stopping.value for _, stopping in d.rules.values())
    assert np.isclose(d.share.value, d.stopping.value / d.whole.value)
    assert all(i.low <= i.value <= i.high for i in (d.whole, d.content, d.stopping, d.share))
    for found, scored in zip((d.base, d.tuned), s):
        assert found == {
            "whole": scored["whole"][metric],
            "first_line": scored["first_line"][metric],
            **{k: scored[k] for k in ("eos_rate", "mean_length")},
        }
    assert d.signature == s[0]["signatures"]["whole"][metric] + "+first_line.1|cut:words"

    right, rambles, wrong = as_systems(references)
    for before, share, verdict in ((rambles, 1, "stopping"), (wrong, 0, "content")):
        d = decompose(before, right, references, metric=metric, bootstrap=Bootstrap(100))
        nothing = d.content if share else d.stopping
        assert d.share.value == share and d.share.low < share < d.share.high and d.verdict == verdict
        assert nothing.value == 0 and np.isclose(-nothing.low, 100 * (1 - 0.025 ** (1 / 30)))  # the exact limit
        for arm, found in ((right, 1), (before, 0)):
            r = recovery(before, right, arm, references, metric=metric, bootstrap=Bootstrap(100))
            assert r.value == found and r.low < found < r.high, "nobody has seen every sentence"
    firsts = [Translation(t.id, first_line(t.text), True) for t in base]  # only stopped: as much as the stopping share
    arm = recovery(base, tuned, firsts, references, metric=metric, bootstrap=Bootstrap(100))
    d = decompose(base, tuned, references, metric=metric, bootstrap=Bootstrap(100))
    assert np.isclose(arm.value, d.rules["first line"][1].value / d.whole.value)
    line = recovery(wrong, right, rambles, references, rule="first_line", metric=metric, bootstrap=Bootstrap(100))
    assert line.value == 1
    assert recovery(wrong, right, rambles, references, metric=metric, bootstrap=Bootstrap(100)).value < 1


def test_where_the_interval_of_the_gain_holds_nothing_there_is_no_share():
    references, base, tuned = world(40)
    twin = world(40, tuned=0.4, base=0.4, rambling=0)
    for before, after, word, why in (
        (base, base, "no gain", "all 40 texts are the same"),
        (tuned, base, "a loss", "no gain to explain"),
        (twin[1], twin[2], "cannot tell", "the interval holds 0"),
    ):
        d = decompose(before, after, twin[0] if before is twin[1] else references, bootstrap=Bootstrap(200))
        assert (
            d.share == (None, None, None) and d.verdict == word and why in d.sentence and str(d.share) == "cannot tell"
        )
    assert recovery(tuned, base, tuned, references, bootstrap=Bootstrap(200)) == (None, None, None)


@pytest.mark.parametrize("rambling, base, verdict", [(1, 0.2, "stopping"), (0, 0.6, "content"), (1, 0.35, "mixed")])
def test_the_verdict_follows_the_share(rambling, base, verdict):
    references, before, after = world(200, base=base, rambling=rambling)
    d = decompose(before, after, references, bootstrap=Bootstrap(300))
    assert d.verdict == verdict, d.sentence
    assert "\n" not in d.sentence and f"{d.stopping.value:+.1f}" in d.sentence and d.n == d.units == len(references)


def test_a_wide_interval_is_no_verdict():
    "Two sentences that say opposite things: one was only stopped, the other only repaired."
    references = ["a b c d e f g h", "i j k l m n o p"]
    before = [
        Translation("0", "a b c d e f g h\na b c d e f g h i j k l m n o p q r s t u v w x y z", False),
        Translation("1", "i j k l m n o x", True),
    ]
    after = [Translation(str(i), r, True) for i, r in enumerate(references)]
    d = decompose(before, after, references, bootstrap=Bootstrap(300))
    assert d.whole.value > 0 > d.whole.low and d.share == (None, None, None) and d.verdict == "cannot tell"


def test_equal_seeds_equal_intervals_and_plain_types():
    references, base, tuned = world(30)
    d = decompose(base, tuned, references, bootstrap=Bootstrap(200, 3))
    assert d == decompose(base, tuned, references, bootstrap=Bootstrap(200, 3))
    other = decompose(base, tuned, references, bootstrap=Bootstrap(200, 4))
    assert other.share.value == d.share.value and other.share != d.share
    narrow = decompose(base, tuned, references, bootstrap=Bootstrap(200, 3, 0.5))
    assert d.share.low < narrow.share.low <= narrow.share.high < d.share.high
    read = json.loads(json.dumps(d.as_dict()))
    assert (
        read["share"] == {"value": d.share.value, "low": d.share.low, "high": d.share.high}
        and read["sentence"] == d.sentence
        and read["seed"] == 3
    )
    assert (
        json.loads(json.dumps(decompose(base, base, references, bootstrap=Bootstrap(50)).as_dict(), allow_nan=False))[
            "share"
        ]["value"]
        is None
    )


def test_a_share_is_all_that_three_intervals_allow():
    "Held against a search on a grid; where the whole may be 0 there is no share."
    rng = np.random.default_rng(0)
    for _ in range(50):
        part, rest = (
            Interval(middle, middle - wide, middle + wide) for middle, wide in ((20, 8), (rng.normal(0, 9), 6))
        )
        low, high = np.sort(rng.uniform(max(10, part.low + rest.low), part.high + rest.high, 2))
        grid = np.stack(np.meshgrid(np.linspace(*part[1:], 400), np.linspace(*rest[1:], 400)), -1).reshape(-1, 2)
        inside = grid[(low <= grid.sum(1)) & (grid.sum(1) <= high)]
        tried = inside[:, 0] / inside.sum(1)
        if tried.size:
            found = part_of(part, rest, Interval((low + high) / 2, low, high))
            assert np.allclose([found.low, found.high], [tried.min(), tried.max()], atol=0.02)
            assert found.low <= tried.min() + 1e-9 and tried.max() <= found.high + 1e-9
    assert part_of(part, rest, Interval(3, 0, 5)) == (None, None, None)


def test_simultaneous_intervals_hold_together():
    "Twenty arms that are all as good as the base: any of the intervals misses 0 in about 5% of 100 samples, not 60%."
    missed = alone = 0
    for run in range(100):
        values = np.random.default_rng(run).normal(50, 10, size=(40, 21))
        numbers = {f"{value:.9f}": value for value in values.ravel()}
        systems = {
            str(j): ([Translation(str(i), f"{v:.9f}", True) for i, v in enumerate(values[:, j])], "whole")
            for j in range(21)
        }
        contrasts = {str(j): {str(j): 1, "0": -1} for j in range(1, 21)}
        told = lambda texts, _, numbers=numbers: [numbers[text] for text in texts]
        how = dict(metric=told, bootstrap=Bootstrap(200))
        references = [f"sentence {i}" for i in range(40)]
        missed += any(not i.low <= 0 <= i.high for i in simultaneous(systems, contrasts, references, **how).values())
        if run < 20:
            one = [simultaneous(systems, {k: c}, references, **how)[k] for k, c in contrasts.items()]
            alone += any(not i.low <= 0 <= i.high for i in one)
    assert missed <= binom.ppf(0.999, 100, 0.05) and alone > 5


def test_contrasts_are_checked_and_add_up():
    references, base, tuned = world(30)
    systems = {"a": (base, "whole"), "b": (tuned, "whole"), "c": (base, "first_line")}
    found = simultaneous(systems, {"x": {"b": 1, "a": -1}, "y": {"b": 1, "c": -0.5, "a": -0.5}}, references)
    s = [score(base, references), score(tuned, references)]
    assert np.isclose(found["x"].value, s[1]["whole"]["bleu"] - s[0]["whole"]["bleu"])
    middle = (s[0]["whole"]["bleu"] + s[0]["first_line"]["bleu"]) / 2
    assert np.isclose(found["y"].value, s[1]["whole"]["bleu"] - middle)
    assert simultaneous(systems, {}, references) == {}
    for wrong in ({"b": 1, "a": -0.5}, {"b": 1, "z": -1}):
        with pytest.raises(
            ValueError, match="the contrast 'x' is .*give weights that add up to 0, of systems among a, b"
        ):
            simultaneous(systems, {"x": wrong}, references)


def test_the_interval_of_a_recovery_covers_at_its_nominal_rate(monkeypatch):
    """200 samples of 150 sentences from a population of 4000 whose recovery is known; 95% percentile intervals.

    The count of intervals that cover is binomial(200, 0.95) if the rate is nominal: it must lie between its 0.0005 and
    0.9995 quantiles (179 and 199), so that a right interval fails here once in a thousand seeds; the seed is fixed.
    Intervals half as wide must fail. The counts of the population are taken once and looked up.
    """
    references, base, tuned = world(4000, seed=1)
    middle = [
        Translation(t.id, first_line(b.text) if i % 3 else t.text, True) for i, (b, t) in enumerate(zip(base, tuned))
    ]
    rows = {}
    for system in (base, tuned, middle):
        for rule in ("whole", "first_line"):
            rows.update(
                {
                    (rule, t.id, t.text): row
                    for t, row in zip(system, sentence_statistics(system, references, rule=rule))
                }
            )

    monkeypatch.setattr(
        "kslottery.decomposition.sentence_statistics",
        lambda system, _, rule, metric: np.array([rows[rule, t.id, t.text] for t in system]),
    )

    def interval(of, samples, seed=0):
        r, b, t, m = ([x[i] for i in of] for x in (references, base, tuned, middle))
        return recovery(b, t, m, r, bootstrap=Bootstrap(samples, seed))

    truth = interval(range(4000), 2).value
    rng = np.random.default_rng(0)
    covered, halved = 0, 0
    for run in range(200):
        found = interval(rng.choice(4000, 150, replace=False), 300, run)
        covered += found.low <= truth <= found.high
        halved += (found.low + found.value) / 2 <= truth <= (found.high + found.value) / 2
    low, high = binom.ppf([0.0005, 0.9995], 200, 0.95)
    assert halved < low <= covered <= high, (covered, halved)


def test_forced_stop_cuts_at_the_tuned_length():
    made = lambda *tokens: Translation("0", Letters().decode(tokens, True), tokens[-1:] == (2,), tokens)
    long, short = made(5, 6, 7, 8), made(9, 9, 2)
    assert forced_stop([long], [short], Letters()) == [
        Translation("0", "t5 t6", True, (5, 6))
    ]  # the EOS is not counted
    assert forced_stop([short], [long], Letters()) == [short]
    assert forced_stop([made(5, 6, 2)], [short], Letters()) == [made(5, 6, 2)]
    assert (
        forced_stop([long], [made(9, 9)], Letters())[0].text == "t5 t6"
    )  # a tuned model that ran into its limit stopped there
    assert forced_stop([long], [made(2)], Letters())[0].text == ""
    with pytest.raises(ValueError, match="the translation of 0 has no tokens"):
        forced_stop([long._replace(tokens=())], [short], Letters())
    with pytest.raises(ValueError, match="different sentences"):
        forced_stop([long], [short._replace(id="1")], Letters())


def test_forced_stop_is_a_shorter_generation():
    "Greedy text cut after n tokens is greedy text of at most n tokens."
    model = tiny_model("llama")
    rng = np.random.default_rng(0)
    pairs = [Pair(str(i), " ".join(f"t{t}" for t in rng.integers(5, 60, 4)), " t7") for i in range(4)]
    with torch.no_grad():
        model.lm_head.weight[63] = -100 * model.lm_head.weight[63].abs()
    said = lambda n: translate(model, TOY, pairs, Prompt(), generation=Generation(n), progress=False)
    long, short = said(9), said(4)
    assert [(t.text, t.tokens) for t in forced_stop(long, short, TOY)] == [(t.text, t.tokens) for t in short]


def test_pairs_and_their_references_are_split_alike():
    references, base, tuned = world(20)
    pairs, few = [Pair(t.id, "x", r) for t, r in zip(base, references)], Bootstrap(50)
    assert decompose(base, tuned, pairs, bootstrap=few) == decompose(base, tuned, references, bootstrap=few)
    for arm in (base, tuned):
        assert recovery(base, tuned, arm, pairs, bootstrap=few) == recovery(base, tuned, arm, references, bootstrap=few)
    assert decompose(base, tuned, references, bootstrap=few).bootstrap == few


def test_other_sentences_and_names_are_refused():
    references, base, tuned = world(5)
    with pytest.raises(ValueError, match="different sentences"):
        decompose(base, tuned[::-1], references)
    with pytest.raises(ValueError, match="5 translations for 4 references"):
        decompose(base, tuned, references[:4])
    with pytest.raises(ValueError, match="metric is 'meteor'"):
        decompose(base, tuned, references, metric="meteor")
    with pytest.raises(ValueError, match="extraction is 'last'"):
        recovery(base, tuned, tuned, references, rule="last")
    with pytest.raises(ValueError, match="samples is 0: draw at least one"):
        Bootstrap(0)
    for confidence in (0, 1, 95):
        with pytest.raises(ValueError, match=f"confidence is {confidence}: give a share"):
            Bootstrap(confidence=confidence)
    with pytest.raises(ValueError, match="0 translations for 0 references"):
        decompose([], [], [])


def test_the_figure_draws_what_the_numbers_say():
    import matplotlib

    matplotlib.use("Agg")
    references, base, tuned = world(40)
    d = decompose(base, tuned, references, bootstrap=Bootstrap(100))
    losing = replace(d, content=Interval(-5.0, -6.0, -4.0), whole=Interval(d.stopping.value - 5, 0.0, 1.0))
    ax = plot_decomposition({"a$": d, "b": losing, "c": decompose(base, base, references, bootstrap=Bootstrap(20))})
    bars = [(p.get_x(), p.get_width()) for p in ax.patches]
    assert np.allclose(
        bars[:4], [(0, d.stopping.value), (d.stopping.value, d.content.value), (0, d.stopping.value), (0, -5)]
    )
    whiskers = [
        line.get_xdata().tolist() for line in ax.lines if len(line.get_xdata()) == 2 and line.get_marker() == "|"
    ]
    assert [d.stopping.low, d.stopping.high] in whiskers and [-6.0, -4.0] in whiskers and len(whiskers) == 6
    assert [t.get_text() for t in ax.texts][2] == "no gain" and ax.get_xlabel().startswith("gain over the base, BLEU")
    matplotlib.pyplot.close(ax.figure)
