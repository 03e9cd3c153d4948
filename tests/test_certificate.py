"""Certificates: exactness, coverage by simulation, power, and what must be refused.

Simulations have fixed seeds, so they cannot flake. With fresh seeds each coverage check would fail by chance with the
probability `FLAKE` at most.
"""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from scipy.stats import beta, binom, binomtest

from kslottery.certificate import _PVALUES as PVALUES
from kslottery.certificate import (
    Certificate,
    Losses,
    anytime_certificate,
    certify_agreement,
    certify_tickets,
    holm,
    ks_margin_bound,
    mixture_evalue,
    paired_difference,
    plan_certificate,
    risk_bound,
    sentences_needed,
)
from kslottery.ks import critical_value

binomial_pvalue, mixture_pvalue, hoeffding_bentkus_pvalue, betting_pvalue = PVALUES.values()
FLAKE = 1e-4
RUNS = 2000
LOSSES = {  # name: (draw n losses whose mean is r, by rng)
    "zero-one": lambda rng, n, r: (rng.random(n) < r).astype(float),
    "rare and large": lambda rng, n, r: np.where(rng.random(n) < 2 * r, 0.5, 0.0),
    "beta": lambda rng, n, r: rng.beta(2 * r, 2 * (1 - r), n),
    "narrow": lambda rng, n, r: r + 0.5 * min(r, 1 - r) * (rng.random(n) - 0.5),
    "three values": lambda rng, n, r: rng.choice([0.0, 0.25, 1.0], n, p=[1 - 1.75 * r, r, 0.75 * r]),
}


def mean_of(name, r):
    "The true mean of a draw, by a large sample: a guard against a mistake in LOSSES."
    return LOSSES[name](np.random.default_rng(0), 400_000, r).mean()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("r", [0.02, 0.1, 0.4])
def test_the_simulated_losses_have_the_risk_they_claim(name, r):
    x = LOSSES[name](np.random.default_rng(1), 1000, r)
    assert 0 <= x.min() and x.max() <= 1 and abs(mean_of(name, r) - r) < 0.004


def fits(method, name):
    return method != "clopper-pearson" or name == "zero-one"


@pytest.mark.parametrize("method, name", [(m, name) for m in PVALUES for name in LOSSES if fits(m, name)])
def test_coverage(method, name):
    "At a risk just above epsilon a certificate is wrong: no more than a share delta of the calibrations may give one."
    rng = np.random.default_rng(7)
    for n, epsilon, delta in ((30, 0.1, 0.05), (100, 0.02, 0.1), (300, 0.1, 0.05)):
        drawn = LOSSES[name](rng, (RUNS, n), 1.001 * epsilon)
        wrong = int(np.sum(PVALUES[method](drawn, epsilon, delta) <= delta))
        assert binomtest(wrong, RUNS, delta, alternative="greater").pvalue > FLAKE, (n, epsilon, delta, wrong)


@pytest.mark.parametrize("method, name", [(m, name) for m in PVALUES for name in LOSSES if fits(m, name)])
def test_power(method, name):
    """At a risk far below epsilon a certificate is given in at least nine of ten calibrations.

    Each is given in over 97%: fewer than 360 of 400 has a chance below 1e-8.
    """
    given_ = np.sum(PVALUES[method](LOSSES[name](np.random.default_rng(8), (400, 300), 0.02), 0.1, 0.05) <= 0.05)
    assert given_ >= 360, given_


def test_coverage_of_the_walk():
    """Nested tickets on the same sentences, the losses strongly dependent.

    A ticket whose risk is above epsilon is certified in at most a share delta of the calibrations.
    """
    rng = np.random.default_rng(9)
    for risks in ([0.101] * 8, [0.0, 0.02, 0.0999, 0.101, 0.101, 0.3], [0.02, 0.11, 0.02, 0.2]):
        wrong = 0
        for _ in range(RUNS):
            u, own = rng.random(120), rng.random((len(risks), 120))
            mixed = np.where(
                rng.random((len(risks), 120)) < 0.7, u, own
            )  # ticket i fails where its number is below its risk
            losses = {10 - i: (mixed[i] < r).astype(int) for i, r in enumerate(risks)}
            size = certify_tickets(losses, 0.1, 0.05, "clopper-pearson", vouched=True).size
            wrong += size is not None and risks[10 - size] > 0.1
        assert binomtest(wrong, RUNS, 0.05, alternative="greater").pvalue > FLAKE, (risks, wrong)


def test_hoeffding_bentkus_by_hand():
    assert np.isclose(hoeffding_bentkus_pvalue([0.2] * 100, 0.3), math.e * binom.cdf(20, 100, 0.3))


def quality(values, **more):
    "Losses of this kind, with ids and hashes."
    names = tuple(f"s{i}" for i in range(len(values)))
    return losses(values, **{**dict(kind="quality_difference", ids=names, hashes=names, rows=(1, 2, 3, 4)), **more})


def test_chrf_differences_need_more_sentences():
    "The floor of every valid method, the mixture's number, and the sentence of a certificate that has too few."
    assert [sentences_needed(e, 0.05) for e in (0.02, 0.04, 0.06)] == [149, 74, 49]
    needed = [sentences_needed((1 + e) / 2, 0.05, "mixture", 0.5) for e in (0.02, 0.04, 0.06)]
    assert all(0 <= n - floor <= 0.2 * floor for n, floor in zip(needed, (149, 74, 49)))
    found = certify_tickets({4: quality([0.5] * 60)}, 0.03, 0.025)
    assert found.abstained and "There are too few sentences" in found.claim
    assert found.facts["needed"] == sentences_needed(0.515, 0.025, "mixture", 0.5) > 60
    assert f"at least {found.facts['needed']} sentences are needed" in found.headline


def test_the_walk_has_power():
    rng = np.random.default_rng(10)
    sizes = [
        certify_tickets(
            {8: rng.random(200) < 0.01, 4: rng.random(200) < 0.02, 2: rng.random(200) < 0.3},
            0.1,
            0.05,
            "clopper-pearson",
            vouched=True,
        ).size
        for _ in range(300)
    ]
    assert sizes.count(4) >= 270 and 2 not in sizes


@given(st.integers(1, 60), st.floats(0.01, 0.99), st.floats(0.001, 0.999))
def test_binomial_and_hoeffding_bentkus_are_super_uniform_exactly(n, epsilon, level):
    "P(p <= level) at risk epsilon, summed over all outcomes, not simulated."
    chances = binom.pmf(np.arange(n + 1), n, epsilon)
    for pvalue in (binomial_pvalue, hoeffding_bentkus_pvalue):
        p = np.array([pvalue(np.repeat([1.0, 0.0], [k, n - k]), epsilon) for k in range(n + 1)])
        assert chances[p <= level].sum() <= level * (1 + 1e-9)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 9), st.floats(0.02, 0.98), st.floats(0.01, 0.5), st.floats(0.01, 0.99))
def test_bets_are_super_uniform_exactly(n, epsilon, delta, level):
    outcomes = np.array(list(itertools.product((0.0, 1.0), repeat=n)))
    chances = np.prod(np.where(outcomes > 0, epsilon, 1 - epsilon), axis=1)
    for pvalue in (betting_pvalue, mixture_pvalue):
        assert chances[pvalue(outcomes, epsilon, delta) <= level].sum() <= level * (1 + 1e-9)
    wealth = [mixture_evalue(x, epsilon, delta) for x in outcomes]
    assert chances @ wealth <= 1 + 1e-9  # an e-value: at most 1 on average


@pytest.mark.parametrize("n, risk, wrong", [(830, 0.05, 0.956), (130, 0.1, 0.342), (50, 0.3, 0.328)])
def test_bets_on_sorted_losses_are_wrong(n, risk, wrong):
    """Sorted, permuted by a published seed, then bet: what only looks free of the order. By enumeration.

    With ascending losses and no permutation, even betting is wrong nearly always; the mixture never notices.
    """
    ones = np.arange(n + 1)
    ascending = (np.arange(n) >= n - ones[:, None]).astype(float)
    permuted = ascending[:, np.random.default_rng(0).permutation(n)]
    error = lambda pvalue, x: binom.pmf(ones, n, risk)[pvalue(x, risk, 0.05) <= 0.05].sum()
    assert round(error(betting_pvalue, permuted), 3) == wrong and error(betting_pvalue, ascending) > 0.9
    assert error(mixture_pvalue, permuted) == error(mixture_pvalue, ascending) < 0.01
    assert error(binomial_pvalue, permuted) <= 0.05


@given(st.integers(1, 400), st.floats(0, 1), st.floats(0.001, 0.5))
def test_clopper_pearson_is_the_quantile_of_a_beta_distribution(n, share, delta):
    k = round(share * n)
    bound = certify_agreement(np.repeat([1, 0], [k, n - k]), delta, "clopper-pearson", vouched=True).bound
    exact = beta.ppf(1 - delta, k + 1, n - k) if k < n else 1  # the textbook form; scipy solves for it to about 1e-12
    assert abs(bound - exact) < 1e-11


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=40),
    st.sampled_from(["hoeffding-bentkus", "mixture", "betting"]),
    st.floats(0.01, 0.5),
)
def test_a_bound_inverts_its_pvalue(values, method, delta):
    bound = risk_bound(Losses(values, vouched=True, manifest="m" * 64), delta, method)
    assert 0 <= bound <= 1 and (method == "betting" or np.mean(values) <= bound + 1e-12)
    if bound < 1:
        assert PVALUES[method](values, bound, delta) <= delta
    if bound > 1e-6:
        assert PVALUES[method](values, bound - 1e-7, delta) >= delta * (1 - 1e-3)


@given(st.floats(0.001, 0.9), st.floats(0.001, 0.9))
def test_sentences_needed(epsilon, delta):
    n = sentences_needed(epsilon, delta)
    assert (1 - epsilon) ** n <= delta * (1 + 1e-9) and (n == 1 or (1 - epsilon) ** (n - 1) > delta * (1 - 1e-9))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.sampled_from([0.02, 0.2, 1.0]))
def test_the_margin_bound_holds_for_every_threshold_rule(seed, d, near):
    """All of it by enumeration: rows of d numbers from {0..4}, the answer A if a weighted sum exceeds a threshold.

    These are half-lines in each number.
    """
    rng = np.random.default_rng(seed)
    rows = 2
    F = rng.dirichlet(np.ones(5), rows)
    G = (1 - near) * F + near * rng.dirichlet(np.ones(5), rows)
    weights, threshold = rng.normal(size=rows * d), rng.normal()
    grids = np.array(list(itertools.product(range(5), repeat=rows * d)))
    answers = (grids - 2) @ weights > threshold
    chance = lambda P: np.prod([P[c // d][grids[:, c]] for c in range(rows * d)], axis=0)[answers].sum()
    tuned, partial = chance(G), chance(F)
    D = np.abs(np.cumsum(F, 1) - np.cumsum(G, 1)).max(axis=1)
    p_a, p_b = max(tuned, 1 - tuned), min(tuned, 1 - tuned)
    certificate = ks_margin_bound(p_a, p_b, D, d)
    assert abs(tuned - partial) <= certificate.bound / 2 + 1e-9
    event(f"the certificate holds: {certificate.holds}")
    if certificate.holds:
        assert (tuned > 0.5) == (partial > 0.5)


def test_rows_that_depend_on_one_another_void_the_margin_bound():
    "Why independence between rows is among the assumptions: D = 0, and the answer changes all the same."
    tuned = np.array([[1, 1], [-1, -1]])  # the two rows are always equal
    base = np.array(list(itertools.product((1, -1), repeat=2)))
    answers = [np.mean(np.prod(draws, axis=1) > 0) for draws in (tuned, base)]
    certificate = ks_margin_bound(1.0, 0.0, [0.0, 0.0], 1)
    assert answers == [1.0, 0.5] and certificate.holds and "independent of one another" in certificate.assumptions[0]


@pytest.mark.parametrize("d", [1, 2, 7, 96, 768, 4096, 16384])
@pytest.mark.parametrize("alpha", [0.05, 0.01, 1e-6])
def test_limits_of_the_margin_bound(d, alpha):
    tau = math.sqrt(-math.log(alpha / 2) / 2) * math.sqrt(2 / d)
    assert 2 * d * tau > 1  # one row at the asymptotic critical value
    if critical_value(alpha, d) <= 1:
        assert ks_margin_bound(1.0, 0.0, [critical_value(alpha, d)], d).vacuous
    sampled = ks_margin_bound(1.0, 0.0, [0.0], d, delta=0.05, tokens=1)
    assert (
        sampled.vacuous
        and sampled.abstained
        and sampled.bound >= min(2 * d, 2 * math.sqrt(2 * d * math.log(80))) - 1e-9
    )
    assert ks_margin_bound(1.0, 0.0, [], d, delta=0.05).holds  # only rows known to be untouched are free


def test_the_union_runs_over_all_touched_tokens():
    few, many = (ks_margin_bound(0.9, 0.1, [0.1], 64, delta=0.05, tokens=r).facts["slack"] for r in (1, 20))
    assert few == 2 * math.sqrt(math.log(4 / 0.05) / 128) and many == 2 * math.sqrt(math.log(80 / 0.05) / 128)


GOOD = dict(kind="exact", ids=("a", "b"), hashes=("x", "y"), used=frozenset(["z"]), rows=(1, 2))


def losses(values=(0, 0), **changes):
    return Losses(np.array(values), **{**GOOD, **changes})


MADE = dict(max_new_tokens=9, num_beams=1, batch_size=16, template="t", languages="en-ca", dtype="bfloat16")
OTHERS = dict(max_new_tokens=8, num_beams=2, batch_size=1, template="u", languages="en-de", dtype="float32")
DIFFERENT = [(MADE, {**MADE, name: other}) for name, other in OTHERS.items()]


@pytest.mark.parametrize(
    "make, part",
    [
        (lambda: losses(used=frozenset(["y"])), "calibration sentence b was used"),
        (lambda: losses(used=frozenset()), "not recorded which sentences"),
        (lambda: losses([], ids=(), hashes=()), "n = 0"),
        (lambda: certify_agreement([], 0.05, vouched=True), "n = 0"),
        (lambda: losses([0, np.nan]), "loss 1 is nan"),
        (lambda: losses([-0.1, 0]), "loss 0 is -0.1"),
        (lambda: losses([0, np.inf]), "loss 1 is inf"),
        (lambda: losses(kind="bleu"), "bleu"),
        (lambda: losses(ids=("a",)), "1 ids"),
        (lambda: certify_agreement([0, 1], 0.05), "vouched=True"),
        (lambda: certify_agreement(losses(), 0), "delta is 0"),
        (lambda: certify_agreement(losses(), 1.0), "delta is 1.0"),
        (lambda: certify_agreement(losses(), float("nan")), "delta is nan"),
        (lambda: certify_agreement(losses(), 0.05, epsilon=1.5), "epsilon is 1.5"),
        (lambda: certify_agreement(losses(), 0.05, "hoeffding"), "choose auto, clopper-pearson"),
        (lambda: certify_agreement([0.5, 0.2], 0.05, "clopper-pearson", vouched=True), "use mixture"),
        (lambda: certify_agreement(losses(), 0.05, "betting"), "no manifest fixed it"),
        (lambda: certify_agreement([0.5, 0.2], 0.05, "betting", vouched=True), "use mixture, which does not"),
        (lambda: certify_tickets({2: losses()}, 0.1, 0.05, "betting"), "no manifest fixed it"),
        (lambda: losses(used=frozenset(["~b"]), loose=("~a", "~b")), "calibration sentence b was used"),
        (lambda: losses(loose=("~a",)), "1 loose hashes"),
        (lambda: losses(loose=("~a", "~a")).grouped(["p", "q"]), "sentence a has a copy in another document"),
        (lambda: losses(hashes=("x", "x")).grouped(["p", "q"]), "sentence a has a copy in another document"),
        (lambda: anytime_certificate(losses(), 0.1, 0.05, 9), "no manifest"),
        (lambda: anytime_certificate(losses(manifest="m", hashes=("x", "x")), 0.1, 0.05, 9), "copies of a sentence"),
        (lambda: anytime_certificate(losses(manifest="m"), 0.1, 0.05, 0), "n_plan is 0"),
        (lambda: anytime_certificate(losses(manifest="m"), 1.1, 0.05, 9), "epsilon is 1.1"),
        (lambda: mixture_evalue([], 0.1, 0.05), "n = 0"),
        (lambda: mixture_evalue([0.5], 0.1, 0.05, n_plan=-1), "n_plan is -1"),
        (lambda: mixture_evalue([np.nan], 0.1, 0.05), "loss 0 is nan"),
        (lambda: plan_certificate(0), "epsilon is 0"),
        (lambda: plan_certificate(0.02, sd=-0.1), "sd is -0.1"),
        (lambda: plan_certificate(0.02, sd=12), "0.1 is 10 chrF points"),
        (lambda: plan_certificate(0.02, loss="tokens", sd=0.1), "a pilot for any other loss"),
        (lambda: plan_certificate(0.02, sd=0.1, pilot=[0.0]), "give one of them"),
        (lambda: plan_certificate(0.02, pilot=[0.0, np.nan]), "loss 1 is nan"),
        (lambda: plan_certificate(0.02, pilot=[]), "n = 0"),
        (lambda: plan_certificate(0.02, power=1.0), "power is 1.0"),
        (lambda: plan_certificate(0.02, n=0), "n_plan is 0"),
        (lambda: plan_certificate(0.02, loss="nicety"), "nicety"),
        (lambda: plan_certificate(0.02, loss="exact", pilot=[0.5]), "use mixture"),
        (lambda: paired_difference(losses(), losses(), 0.05, clip=0), "clip is 0"),
        (lambda: paired_difference(losses(), losses(), 5), "delta is 5"),
        (lambda: paired_difference(losses(), losses(ids=("b", "a"), hashes=("y", "x")), 0.05), "not of the same sent"),
        (lambda: holm([0.1, 2]), "number from 0 to 1"),
        (lambda: holm([np.nan]), "number from 0 to 1"),
        (lambda: certify_tickets({2: [0, 1]}, 0.1, 0.05), "vouched=True"),
        (lambda: certify_tickets({2: losses()}, 0, 0.05), "epsilon is 0"),
        (lambda: certify_tickets({2: losses()}, 0.1, -1), "delta is -1"),
        (lambda: certify_tickets({}, 0.1, 0.05), "no tickets"),
        (lambda: certify_tickets({"two": losses()}, 0.1, 0.05), "two"),
        (lambda: certify_tickets({2: losses(rows=(1, 2, 3))}, 0.1, 0.05), "has 3 rows"),
        (lambda: certify_tickets({2: losses(), 1: losses(rows=(3,))}, 0.9, 0.9), "not nested: row 3"),
        (lambda: certify_tickets({2: losses(), 1: losses(rows=(1,), vouched=True)}, 0.9, 0.9), "provenance"),
        (
            lambda: certify_tickets({2: losses(), 1: losses(rows=(1,), unit="document")}, 0.9, 0.9),
            "not of the same sentences",
        ),
        (lambda: certify_tickets({7: losses(rows=())}, 0.9, 0.9), "has 0 rows"),
        (
            lambda: certify_tickets({2: losses(prints={"max_new_tokens": 9}), 1: losses(rows=(1,))}, 0.9, 0.9),
            "in another way",
        ),
        (lambda: risk_bound([-5.0] * 9, 0.05, "mixture"), "loss 0 is -5.0"),
        (lambda: risk_bound([0.0] * 9, 2, "mixture"), "delta is 2"),
        (lambda: risk_bound([], 0.05), "n = 0"),
        (lambda: risk_bound([0.5, 0.2], 0.05, "betting"), "no manifest fixed it"),
        (lambda: ks_margin_bound(0.9, 0.1, [0.1], 4, delta=0.05), "tokens is None"),
        (
            lambda: certify_tickets({2: losses(), 1: losses(rows=(1,), ids=("b", "a"), hashes=("y", "x"))}, 0.9, 0.9),
            "not of the same sentences",
        ),
        (
            lambda: certify_tickets({2: losses(), 1: losses(rows=(1,), kind="tokens")}, 0.9, 0.9),
            "not of the same sentences",
        ),
        (
            lambda: certify_tickets(
                {2: losses(prints={"reference": "p"}), 1: losses(rows=(1,), prints={"reference": "q"})}, 0.9, 0.9
            ),
            "another reference",
        ),
        (lambda: certify_tickets({2: [0, 0], 1: [0]}, 0.9, 0.9, vouched=True), "not of the same sentences"),
        *(
            (
                lambda old=old, new=new: certify_tickets(
                    {2: losses(prints=old), 1: losses(rows=(1,), prints=new)}, 0.9, 0.9
                ),
                "in another way, than those of the larger ticket (" + next(k for k in old if old[k] != new[k]),
            )
            for old, new in DIFFERENT
        ),
        (lambda: ks_margin_bound(0.7, 0.6, [0.1], 4), "sum is at most 1"),
        (lambda: ks_margin_bound(0.7, 0.2, [1.1], 4), "statistics must lie"),
        (lambda: ks_margin_bound(0.7, 0.2, [float("nan")], 4), "statistics must lie"),
        (lambda: ks_margin_bound(0.7, 0.2, [0.1], 0), "at least 1"),
        (lambda: ks_margin_bound((7, 10), 0.2, [0.1], 4), "give delta"),
        (lambda: ks_margin_bound((11, 10), None, [0.1], 4, delta=0.05, tokens=1), "11 of 10"),
        (lambda: losses().grouped(["one"]), "1 group names for 2 losses"),
        (lambda: Certificate.from_json('{"claim": 1}'), "not a certificate"),
        (lambda: Certificate.from_json("{"), "not a certificate"),
    ],
)
def test_misuse_gets_one_clear_sentence(make, part):
    with pytest.raises(ValueError) as error:
        make()
    assert part in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 250


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=30),
    st.floats(0.001, 0.999),
    st.floats(0.001, 0.999),
    st.sampled_from(["loss", "tokens", "quality_difference"]),
)
def test_every_certificate_says_its_probability_and_survives_json(values, epsilon, delta, kind):
    n = len(values)
    mine = Losses(
        values,
        kind,
        ids=tuple(map(str, range(n))),
        hashes=tuple(f"h{i}" for i in range(n)),
        used=frozenset(["u"]),
        rows=tuple(range(5)),
        prints={"ticket": "é⏎"},
    )
    made = [
        certify_agreement(mine, delta),
        certify_agreement(mine, delta, "hoeffding-bentkus", epsilon=epsilon),
        certify_tickets({1: replace(mine, rows=(0,)), 5: mine}, epsilon, delta),
        ks_margin_bound(0.6, 0.2, values, 3, delta=delta, tokens=n),
        anytime_certificate(replace(mine, manifest="m" * 64), epsilon, delta, 20),
        certify_agreement(replace(mine, manifest="m" * 64), delta, "betting"),
    ]
    for certificate in made:
        assert "With probability at least " in certificate.claim and "\n" not in certificate.headline
        assert certificate.abstained is not certificate.holds and certificate.headline.startswith(
            "CERTIFIED, " if certificate.holds else "ABSTAINS: "
        )
        assert str(certificate).split("\n")[0] == certificate.headline
        assert all(a in str(certificate) for a in certificate.assumptions)
        assert ",," not in certificate.claim + str(certificate) and "  " not in certificate.claim
        assert ("needed" in certificate.headline or "too few" in certificate.claim) <= certificate.abstained
        again = Certificate.from_json(certificate.to_json())
        assert again == certificate and json.loads(again.to_json()) == json.loads(certificate.to_json())
    assert made[2].abstained == (made[2].size is None)


def test_too_few_sentences_are_counted():
    found = certify_tickets({3: [0] * 58}, 0.05, 0.05, "clopper-pearson", vouched=True)
    assert found.size is None and "at least 59" in found.claim and found.facts["needed"] == 59
    assert certify_tickets({3: [0] * 59}, 0.05, 0.05, "clopper-pearson", vouched=True).size == 3


def test_the_method_is_chosen_by_the_kind_and_never_by_the_values():
    zeros = dict(ids=tuple(map(str, range(300))), hashes=tuple(map(str, range(300))), rows=tuple(range(9)))
    for kind, method in (("exact", "clopper-pearson"), ("tokens", "mixture"), ("quality_shortfall", "mixture")):
        mine = losses([0] * 300, kind=kind, **zeros)
        assert certify_tickets({9: mine}, 0.1, 0.05).facts["method"] == method
        assert certify_agreement(mine, 0.05).facts["method"] == method
    assert certify_tickets({9: np.zeros(300), 3: np.ones(300)}, 0.1, 0.05, vouched=True).facts["method"] == "mixture"
    grouped = losses([0] * 300, **zeros).grouped([str(i // 2) for i in range(300)])
    assert grouped.kind == "share" and certify_agreement(grouped, 0.05).facts["method"] == "mixture"


def test_a_lazy_ladder_is_asked_only_for_what_is_needed():
    asked = []

    class Ladder(dict):
        def __getitem__(self, size):
            asked.append(size)
            names = tuple(map(str, range(50)))
            return losses(np.ones(50) if size < 8 else np.zeros(50), ids=names, hashes=names, rows=tuple(range(size)))

    assert certify_tickets(Ladder.fromkeys([2, 4, 8, 16]), 0.2, 0.05).size == 8 and asked == [16, 8, 4]


def test_groups_are_the_units():
    mine = Losses([0, 1, 1, 0.5], "tokens", ids=tuple("abcd"), hashes=tuple("1234"), used=frozenset(["9"]))
    grouped = mine.grouped(["q", "p", "p", "q"])
    assert grouped.values.tolist() == [0.25, 1.0] and grouped.ids == ("q", "p") and len(set(grouped.hashes)) == 2
    found = certify_agreement(grouped, 0.05)
    assert found.n == 2 and found.unit == "document" and "2 calibration documents" in found.claim
    assert any("nothing is claimed about the mean over sentences" in a for a in found.assumptions)


def test_what_is_certified_does_not_complain_of_too_few_sentences():
    "Gains count against losses, so a ticket that is better than the reference needs fewer sentences."
    names = tuple(map(str, range(60)))
    better = losses([0.4] * 60, kind="quality_difference", ids=names, hashes=names)
    found = certify_tickets({2: better}, 0.03, 0.05)
    assert found.holds and found.n < found.facts["needed"] and "too few" not in found.claim


@pytest.mark.parametrize("dtype, size, named", [("bfloat16", 16, True), ("bfloat16", 1, False), ("float32", 16, False)])
def test_a_claim_in_16_bits_names_the_batch(dtype, size, named):
    "There a greedy text depends on its batch in a few sentences of a hundred."
    found = certify_agreement(losses(prints={**MADE, "dtype": dtype, "batch_size": size}), 0.05)
    assert (f"in batches of {size}" in found.claim) == named


def test_copies_of_a_sentence_are_one_unit():
    "300 copies certify nothing; the mean loss of copies counts, and the largest where losses are 0 or 1."
    names = tuple(map(str, range(300)))
    copies = losses([0] * 300, ids=names, hashes=("x",) * 300)
    found = certify_agreement(copies, 0.05, epsilon=0.1)
    assert found.n == 1 and found.abstained and found.facts["repeats"] == 299
    assert any("299 repeats" in a for a in found.assumptions)
    near = dict(ids=tuple("abcd"), hashes=tuple("1234"), loose=("~1", "~2", "~1", "~3"))
    assert certify_agreement(losses([0, 1, 1, 0], **near), 0.05).facts["observed"] == 2 / 3
    assert certify_agreement(losses([0, 1, 0.5, 0], kind="tokens", **near), 0.05).facts["observed"] == 1.25 / 3
    walk = certify_tickets({2: losses([0, 1, 1, 0], **near)}, 0.1, 0.05)
    assert walk.n == 3 and walk.facts["repeats"] == 1


def test_ids_that_look_like_documents_are_asked_about():
    asked = lambda *ids, **more: any(
        "give --groups" in a
        for a in certify_agreement(
            losses([0] * len(ids), ids=ids, hashes=tuple(map(str, range(len(ids)))), **more), 0.05
        ).assumptions
    )
    assert asked("a.txt:1", "a.txt:2", "b.txt:1", "b.txt:2") and asked("doc-1", "doc-2")
    assert asked("news-3.12", "news-3.13", "talk-1.1", "talk-1.2")
    assert not asked("test.tsv:1", "test.tsv:2", "test.tsv:3") and not asked("1", "2", "3")
    assert not asked("a.txt:1", "a.txt:2", "b.txt:1", "b.txt:2", unit="document")


def test_a_certificate_in_markdown_is_bold_bullets_and_folded():
    nasty = replace(losses(), made="`</td><script>alert(1)</script>|\n# Certified!\n[a](b)")
    text = certify_agreement(nasty, 0.05).markdown()
    assert text.startswith("**CERTIFIED, 95% sure: at most 77.64% of sentences") and "<details><summary>" in text
    assert "<script" not in text and "\n# Certified" not in text and "[a](b)" not in text
    assert text.count("\n- ") == len(certify_agreement(nasty, 0.05).assumptions)
    assert certify_agreement(nasty, 0.05)._repr_markdown_() == text


def test_old_certificates_have_a_headline():
    "As version 0.1 wrote them: without the new facts."
    old = dict(kind="agreement", claim="With probability at least 0.95 ...", holds=True, bound=0.0495, confidence=0.95)
    old |= dict(n=60, unit="sentence", assumptions=["one"], vacuous=False, size=None, path=[], facts={})
    found = Certificate.from_json(json.dumps(old))
    assert found.headline == "CERTIFIED, 95% sure: a mean loss of at most 4.95% (60 sentences)"
    walk = dict(old, kind="ticket", size=2, bound=0.05, path=[{"size": 2, "risk": 0, "bound": 0.04}])
    walk["facts"] = {"loss": "exact", "extraction": "first_line", "epsilon": 0.05, "needed": 59}
    assert Certificate.from_json(json.dumps(walk)).headline == (
        "CERTIFIED, 95% sure: 2 rows, the smallest ticket that this walk reached on this ladder: "
        "at most 5% of sentences translated otherwise than by the reference model (first line, 60 sentences)"
    )
    failed = Certificate.from_json(json.dumps(dict(walk, holds=False, size=None, bound=None)))
    assert failed.headline.startswith("ABSTAINS: 2 rows, the largest of this ladder: at most 5% of sentences")


def test_an_anytime_certificate_stops_and_stays():
    "Twenty losses of 0 at a planned n of 1: each purse doubles with each, and 2^5 exceeds 20."
    names = tuple(map(str, range(20)))
    mine = losses([0] * 20, kind="tokens", ids=names, hashes=names, manifest="m" * 64)
    found = anytime_certificate(mine, 0.5, 0.05, 1)
    assert found.holds and found.facts["stopped"] == 5 and np.isclose(found.facts["evalue"], 2.0**20)
    assert 0 < found.bound < 0.5 and found.facts["n_plan"] == 1 and "mmmm" in found.claim
    assert anytime_certificate(replace(mine, values=np.r_[np.zeros(5), np.ones(15)]), 0.5, 0.05, 1).holds
    four = anytime_certificate(losses([0] * 4, ids=names[:4], hashes=names[:4], manifest="m"), 0.5, 0.05, 1)
    assert four.abstained and four.facts["stopped"] is None and four.bound > 0.5


def test_a_plan_says_how_many_and_how_fine():
    plan = plan_certificate(0.04, sd=0.12, n=200)
    assert plan.floor == 74 < plan.needed == min(n for n, p in plan.power.items() if p >= 0.8)
    assert 110 <= plan.needed <= 170 and 0.02 < plan.tolerance < 0.05 and plan.method == "mixture"
    assert plan.power[50] < 0.1 and plan.power[400] > 0.99 and list(plan.power) == sorted(plan.power)
    assert json.loads(json.dumps(plan.as_dict()))["needed"] == plan.needed
    assert f"{plan.needed} sentences for 80% power" in repr(plan) and plan._repr_markdown_().startswith("**")
    perfect = plan_certificate(0.05, loss="exact")
    assert perfect.needed == perfect.floor == 59 and perfect.method == "clopper-pearson"
    assert plan_certificate(0.001, sd=0.3).needed is None


def test_a_pilot_gives_a_range():
    rng = np.random.default_rng(3)
    drawn = np.clip(np.where(rng.random(400) < 0.5, 0, 0.17 * rng.standard_normal(400)), -1, 1)
    plan = plan_certificate(0.05, pilot=drawn)
    low, high = plan.between
    assert 74 > plan.floor == 59 and low <= plan.needed <= high and "pilots like this one" in repr(plan)
    mine = quality((1 + drawn) / 2)
    assert plan_certificate(0.05, pilot=mine) == plan


def test_differences_and_holm_by_hand():
    same = paired_difference(quality([0.5] * 200), quality([0.5] * 200), 0.05)
    assert same.difference == 0 and np.isclose(same.low, -same.high) and 0.01 < same.high < 0.05
    worse = paired_difference(quality([0.55] * 200), quality([0.5] * 200), 0.05)
    assert np.isclose(worse.difference, 0.1) and worse.low > 0.05
    narrow = paired_difference(quality([0.55] * 200), quality([0.5] * 200), 0.05, clip=0.2)
    assert np.isclose(narrow.difference, 0.1) and narrow.high - narrow.low < worse.high - worse.low
    assert holm([0.01, 0.04, 0.03]).tolist() == [0.03, 0.06, 0.06] and holm([0.9, 0.8]).tolist() == [1, 1]


def test_a_difference_is_on_the_scale_of_people():
    mine = losses(
        [0.51] * 300,
        kind="quality_difference",
        ids=tuple(map(str, range(300))),
        hashes=tuple(map(str, range(300))),
        rows=(1, 2, 3, 4),
    )
    found = certify_tickets({4: mine}, 0.05, 0.05)
    assert (
        found.size == 4
        and abs(found.path[0]["risk"] - 0.02) < 1e-12
        and 0.02 < found.path[0]["bound"] < found.bound == 0.05
    )
    assert certify_tickets({4: mine}, 0.01, 0.05).abstained


@pytest.mark.parametrize("odd", [{"confidence": 60}, {"confidence": -1.0}, {"n": -3}, {"size": -1}, {"bound": 1e999}])
def test_numbers_that_no_certificate_has_are_refused(odd):
    sound = certify_agreement(np.zeros(60), 0.05, epsilon=0.2, vouched=True)
    with pytest.raises(ValueError, match="is not a certificate .*confidence, bound, n and size are"):
        Certificate.from_json(json.dumps({**json.loads(sound.to_json()), **odd}))
