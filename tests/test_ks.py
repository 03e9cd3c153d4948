"""The scan against scipy and against exact rational arithmetic, on rows made to be awkward."""

import math
from fractions import Fraction
from functools import cache
from itertools import accumulate

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from kslottery.ks import Scan, critical_value, ks_pvalue, ks_scan, ks_statistic


def awkward(kind, shape, rng):
    "Rows before and after of one kind."
    before = rng.normal(size=shape).astype(np.float32)
    after = (before * rng.uniform(0.3, 2, size=(shape[0], 1)) + 0.1 * rng.normal(size=shape)).astype(np.float32)
    if kind == "integers":
        return np.round(before), np.round(after)
    if kind == "constant":
        return np.ones_like(before), np.full_like(after, 1 + rng.integers(0, 2))
    if kind == "bf16":
        return tuple(torch.tensor(x).bfloat16().float().numpy() for x in (before, after))
    if kind == "permuted":
        return before, rng.permuted(before, axis=1)
    if kind == "denormal":
        return before * np.float32(1e-40), after * np.float32(1e-40)
    if kind == "infinities":
        for x in (before, after):
            x[rng.random(shape) < 0.2] = np.inf
            x[rng.random(shape) < 0.2] = -np.inf
    return before, after


KINDS = ("gaussian", "integers", "constant", "bf16", "permuted", "denormal", "infinities")


@settings(max_examples=120, deadline=None)
@given(kind=st.sampled_from(KINDS), d=st.integers(1, 200), seed=st.integers(0, 2**32 - 1))
def test_statistic_is_scipys(kind, d, seed):
    before, after = awkward(kind, (4, d), np.random.default_rng(seed))
    expected = [round(stats.ks_2samp(a, b, method="asymp").statistic * d) / d for a, b in zip(before, after)]
    assert ks_statistic(before, after).tolist() == expected


@pytest.mark.parametrize("kind", KINDS)
def test_statistic_at_the_width_of_llama(kind):
    before, after = awkward(kind, (3, 4096), np.random.default_rng(1))
    expected = [round(stats.ks_2samp(a, b, method="asymp").statistic * 4096) / 4096 for a, b in zip(before, after)]
    assert ks_statistic(before, after).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_torch_and_every_dtype(dtype):
    before = torch.randn(20, 64).to(dtype)
    after = (before.float() * 1.5).to(dtype)
    expected = ks_statistic(before.double().numpy(), after.double().numpy())
    assert np.array_equal(ks_statistic(before, after), expected) and expected.max() > 0


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 2**32 - 1))
def test_invariances(kind, seed):
    "D is symmetric, blind to the order of columns, and 0 on equal rows."
    rng = np.random.default_rng(seed)
    before, after = awkward(kind, (3, 50), rng)
    D = ks_statistic(before, after)
    assert np.array_equal(D, ks_statistic(after, before))
    assert np.array_equal(D, ks_statistic(rng.permuted(before, axis=1), after))
    assert (ks_statistic(before, before) == 0).all()


@cache
def paths(d):
    "C(2d, d - m) for m = 0 ... d, exact integers."
    return list(accumulate(range(d), lambda c, m: c * (d - m) // (d + m + 1), initial=math.comb(2 * d, d)))


def exact(k, d):
    "P(D >= k/d) as a fraction."
    terms = paths(d)[k::k] if k else []
    return min(Fraction(1), Fraction(2 * (sum(terms[::2]) - sum(terms[1::2])), paths(d)[0])) if k else Fraction(1)


@pytest.mark.parametrize("d", [*range(1, 41), 96, 128, 255, 256])
def test_pvalue_is_exact_for_every_k(d):
    k = np.arange(d + 1)
    expected = np.array([float(exact(int(x), d)) for x in k])
    assert np.allclose(ks_pvalue(k / d, d), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("d", [1024, 4096, 8192])
def test_pvalue_is_exact_where_models_are(d):
    for k in (1, 2, 3, 7, d // 100, d // 40, d // 20, d // 8):
        expected = exact(k, d)
        if expected > Fraction(1, 10**300):
            assert abs(ks_pvalue(k / d, d) / float(expected) - 1) < 1e-12


def test_pvalue_between_steps_and_of_arrays():
    assert ks_pvalue(0.5, 3) == ks_pvalue(2 / 3, 3)  # D = 0.5 is reached by 2/3
    assert ks_pvalue(np.array([[0, 1.0]]), 4).shape == (1, 2) and isinstance(ks_pvalue(0.5, 4), float)


@pytest.mark.parametrize("alpha", [0.5, 0.05, 0.001, 1e-9])
@pytest.mark.parametrize("d", [1, 2, 5, 96, 1000])
def test_critical_value_is_the_smallest_significant_statistic(alpha, d):
    critical = critical_value(alpha, d)
    k = np.arange(d + 1)
    significant = k[ks_pvalue(k / d, d) < alpha]
    assert critical == (significant[0] / d if len(significant) else math.inf)


def test_selection_orders_by_p_then_statistic_then_id():
    scan = Scan(np.array([0.5, 0.9, 0.8, 0.5, 0.1]), np.array([0.01, 0.0, 0.0, 0.01, 0.9]), 10)
    assert scan.select(0.05).tolist() == [1, 2, 0, 3] == scan.top(4).tolist()
    assert scan.top(5).tolist()[-1] == 4 and scan.top(0).tolist() == []


def test_corrections_are_the_textbooks():
    p = np.array([0.001, 0.008, 0.039, 0.041, 0.042, 0.06, 0.074, 0.205, 0.212, 0.216])
    scan = Scan(1 - p, p, 10)
    assert scan.select(0.05).tolist() == [0, 1, 2, 3, 4]
    assert scan.select(0.05, "bonferroni").tolist() == [0]
    assert scan.select(0.05, "bh").tolist() == np.flatnonzero(stats.false_discovery_control(p) < 0.05).tolist() == [0, 1]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_tickets_are_nested(seed):
    before, after = awkward("gaussian", (60, 40), np.random.default_rng(seed))
    scan = ks_scan(before, after)
    for correction in (None, "bh", "bonferroni"):
        small, large = (set(scan.select(a, correction)) for a in (0.01, 0.1))
        assert small <= large <= set(scan.select(0.1))


def test_level_holds_for_independent_samples():
    "Under independence at most alpha of the rows pass: 4000 rows, the count stays under the 1 - 1e-6 quantile of Binomial(4000, .05) (flake rate below 1e-6; the seed is fixed)."
    rng = np.random.default_rng(0)
    passed = len(ks_scan(rng.normal(size=(4000, 100)), rng.normal(size=(4000, 100))).select(0.05))
    assert 0 < passed <= stats.binom.ppf(1 - 1e-6, 4000, 0.05)


good = np.zeros((3, 4), np.float32)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: ks_scan(good, good[:2]), ["(3, 4)", "(2, 4)"]),
        (lambda: ks_scan(good, good.astype(np.float64)), ["float32", "float64"]),
        (lambda: ks_scan(torch.zeros(3, 4), torch.zeros(3, 4).bfloat16()), ["float32", "bfloat16"]),
        (lambda: ks_scan(good, np.where(np.eye(3, 4), np.float32(np.nan), good)), ["row 0", "NaN"]),
        (lambda: ks_scan(good[0], good[0]), ["(4,)"]),
        (lambda: ks_scan(good.astype(int), good.astype(int)), ["int64"]),
        (lambda: ks_scan(good, good).select(0), ["alpha is 0"]),
        (lambda: ks_scan(good, good).select(1.0), ["alpha is 1.0"]),
        (lambda: ks_scan(good, good).select(0.1, "holm"), ["holm", "bonferroni"]),
        (lambda: ks_scan(good, good).top(4), ["top(4)", "3"]),
        (lambda: ks_pvalue(1.5, 4), ["[0, 1]"]),
        (lambda: ks_pvalue(0.5, 0), ["d is 0"]),
        (lambda: critical_value(0.05, 0), ["d is 0"]),
    ],
)
def test_bad_input_gets_one_sentence(call, words):
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    assert all(w in str(caught.value) for w in words) and "\n" not in str(caught.value)
