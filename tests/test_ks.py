"""The scan against scipy and against exact rational arithmetic, on rows made to be awkward; every engine; criteria."""

import math
import sys
from fractions import Fraction
from functools import cache
from itertools import accumulate

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from conftest import TOY, tiny_model
from kslottery.ks import (
    CRITERIA,
    Scan,
    _compiled,
    checked_counts,
    critical_value,
    equal_move_null,
    ks_pvalue,
    ks_scan,
    ks_statistic,
    scan_rows,
)
from kslottery.plots import plot_scan
from kslottery.rows import TunedRows


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
    assert (
        scan.select(0.05, "bh").tolist() == np.flatnonzero(stats.false_discovery_control(p) < 0.05).tolist() == [0, 1]
    )


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_tickets_are_nested(seed):
    before, after = awkward("gaussian", (60, 40), np.random.default_rng(seed))
    scan = ks_scan(before, after)
    for correction in (None, "bh", "bonferroni"):
        small, large = (set(scan.select(a, correction)) for a in (0.01, 0.1))
        assert small <= large <= set(scan.select(0.1))


def test_level_holds_for_independent_samples():
    """Under independence at most alpha of 4000 rows pass, up to a quantile of 1 - 1e-6 (the seed is fixed)."""
    rng = np.random.default_rng(0)
    passed = len(ks_scan(rng.normal(size=(4000, 100)), rng.normal(size=(4000, 100))).select(0.05))
    assert 0 < passed <= stats.binom.ppf(1 - 1e-6, 4000, 0.05)


class View:
    """The least that a view must be: a matrix of which some rows are read in another version, always in fp32."""

    def __init__(self, base, ids, rows):
        self.base, self.ids, self.rows, self.shape, self.dtype = base, ids, rows, base.shape, torch.float32

    def __getitem__(self, rows):
        whole = self.base.to(torch.float32, copy=True)
        whole[self.ids] = self.rows
        return whole[rows]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_view_is_compared_with_its_base_whatever_the_dtypes(dtype):
    base = torch.randn(40, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    view = View(base, [3, 30], 3 * base[[3, 30]].float())
    for scan in (ks_scan(base, view), ks_scan(view, base)):
        assert np.flatnonzero(scan.statistic).tolist() == [3, 30]
    merged = base.to(torch.float32, copy=True)
    merged[[3, 30]] = view.rows
    assert np.array_equal(ks_scan(base.float(), merged).statistic, ks_scan(base, view).statistic)
    if dtype is not torch.float32:
        with pytest.raises(ValueError, match="--round"):
            ks_scan(base.clone(), view)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_matrix_of_tuned_rows_is_scanned_as_a_merged_model(kind, dtype):
    model = tiny_model(kind, hidden=64).to(dtype)
    before = model.get_input_embeddings().weight
    rows = TunedRows.of(model, [5, 9], "input_only")
    with torch.no_grad():
        rows.weight *= 4
    merged = before.detach().float().clone()
    merged[[5, 9]] = rows.weight.detach()
    scan = ks_scan(before, rows.matrix(model))
    assert np.array_equal(scan.statistic, ks_scan(before.detach().float(), merged).statistic)
    assert sorted(scan.select(0.05)) == [5, 9] and np.flatnonzero(scan.statistic).tolist() == [5, 9]


def test_a_scan_as_a_table():
    scan = Scan(np.array([0.5, 0.9, 0.8]), np.array([0.01, 1e-9, 1e-5]), 64)
    frame = scan.to_frame(TOY, counts=[7, 8, 9])
    assert list(frame) == ["token", "id", "statistic", "pvalue", "count"]
    assert frame["id"].tolist() == scan.top(3).tolist() == [1, 2, 0]
    assert frame["token"].tolist() == ["t1", "t2", "t0"] and frame["count"].tolist() == [8, 9, 7]
    assert list(Scan(scan.statistic, None, 64, "l2").to_frame()) == ["id", "statistic"]
    assert scan.to_frame(TOY, top=2)["token"].tolist() == ["t1", "t2"] and len(scan.to_frame(top=9)) == 3


def test_a_scan_shows_rows_and_no_raw_arrays():
    before, after = awkward("gaussian", (2000, 256), np.random.default_rng(0))
    after[5:] = before[5:]
    for scan in (ks_scan(before, after), ks_scan(before, after, decide=0.05)):
        said = repr(scan)
        assert "2,000 rows of 256 numbers by ks" in said and f"{len(scan.select(0.05))} with p below 0.05" in said
        assert str(scan.top(1)[0]) in said and "array" not in said and len(said.splitlines()) < 12
        assert "<table" in scan._repr_html_() and "array" not in scan._repr_html_()
    named = repr(scan_rows(before, after, "relative"))
    assert "by relative" in named and "relative" in named.splitlines()[1] and "with p" not in named


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    d=st.integers(1, 300),
    seed=st.integers(0, 2**32 - 1),
    wide=st.booleans(),
    alpha=st.sampled_from([0.5, 0.05, 0.001]),
)
def test_every_engine_and_the_decision_agree(kind, d, seed, wide, alpha):
    before, after = awkward(kind, (6, d), np.random.default_rng(seed))
    after[0] = before[0]
    if wide:
        before, after = before.astype(np.float64), after.astype(np.float64)
    plain = ks_statistic(before, after, engine="plain")
    assert np.array_equal(plain, ks_statistic(before, after, engine="torch"))
    assert np.array_equal(plain, ks_statistic(before, after, engine="binned"))
    full, decided = ks_scan(before, after), ks_scan(before, after, decide=alpha)
    assert full.select(alpha).tolist() == decided.select(alpha).tolist()
    assert full.select(alpha, "bh").tolist() == decided.select(alpha, "bh").tolist()
    won = full.pvalue < alpha
    assert np.array_equal(full.statistic[won], decided.statistic[won]) and np.isnan(decided.statistic[~won]).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d", [1024, 4096])
def test_the_binning_engine_at_the_width_of_models(kind, d):
    before, after = awkward(kind, (12, d), np.random.default_rng(3))
    after[1] = before[1] + np.float32(1e-4) * np.random.default_rng(4).normal(size=d).astype(np.float32)
    before[2, 0] = 1e30  # one huge outlier spoils the bins, not the result
    expected = ks_statistic(before, after, engine="plain")
    assert np.array_equal(expected, ks_statistic(before, after, engine="binned"))


def test_known_pvalues_and_the_integer_decision():
    assert abs(ks_pvalue(0.0546875, 4096) / 9.526161380350235e-06 - 1) < 1e-13
    assert abs(ks_pvalue(0.029296875, 4096) / 0.05945249341641134 - 1) < 1e-13
    k = round(critical_value(0.05, 4096) * 4096)
    assert ks_pvalue(k / 4096, 4096) < 0.05 <= ks_pvalue((k - 1) / 4096, 4096)
    for d in (10_001, 16_384, 100_000):  # scipy's asymptotic value is close out there; ours has no gap at any d
        D = round(0.02 * d) / d
        assert abs(ks_pvalue(D, d) / stats.kstwobign.sf(D * np.sqrt(d / 2)) - 1) < 0.02


def test_a_decision_says_what_it_is():
    before, after = awkward("gaussian", (40, 200), np.random.default_rng(0))
    scan = ks_scan(before, after, decide=0.01)
    assert scan.decided == 0.01 and len(scan.select(0.001)) <= len(scan.select(0.01))
    with pytest.raises(ValueError, match="0.01 only, not at 0.05"):
        scan.select(0.05)
    with pytest.raises(ValueError, match="decided only"):
        scan.top(40)


def test_without_numba_the_plain_engine_serves(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    _compiled.cache_clear()
    try:
        assert _compiled() is None
        before, after = awkward("gaussian", (5, 60), np.random.default_rng(0))
        assert ks_statistic(before, after).tolist() == ks_statistic(before, after, engine="plain").tolist()
    finally:
        monkeypatch.undo()
        _compiled.cache_clear()


def test_rounding_both_sides():
    before = torch.randn(50, 128)
    after = before.bfloat16()
    after[3] *= 3
    with pytest.raises(ValueError, match="--round"):
        ks_scan(before, after)
    scan = ks_scan(before, after, round=True)
    assert np.flatnonzero(scan.statistic).tolist() == [3]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), d=st.integers(2, 60))
def test_criteria_are_what_they_say(seed, d):
    before, after = awkward("gaussian", (8, d), np.random.default_rng(seed))
    after[2] = before[2]
    delta = after - before
    value = {c: scan_rows(before, after, c, counts=np.arange(8)) for c in CRITERIA}
    assert np.allclose(value["l2"].statistic, np.sqrt((delta.astype(float) ** 2).sum(1)), rtol=1e-5)
    assert np.array_equal(value["max"].statistic.astype(np.float32), np.abs(delta).max(1))
    assert np.allclose(
        value["wasserstein"].statistic,
        [stats.wasserstein_distance(a, b) for a, b in zip(before, after)],
        rtol=1e-4,
        atol=1e-7,
    )
    assert np.array_equal(value["ks"].statistic, ks_statistic(before, after))
    expected = [stats.binomtest(int((x > 0).sum()), int((x != 0).sum())).pvalue if (x != 0).any() else 1 for x in delta]
    assert np.allclose(value["sign"].pvalue, expected, rtol=1e-9)
    edge = np.quantile(np.abs(delta), 0.9)  # found to 2e-4 of itself: who is as near may be on either side
    near = np.isclose(np.abs(delta), edge, rtol=5e-4, atol=0).sum()
    assert abs(value["lota"].statistic.sum() - 0.1 * delta.size) <= 1 + near
    for c, scan in value.items():
        assert len(scan.statistic) == 8 and (c == "frequency" or scan.statistic[2] == 0)
        if scan.pvalue is None:
            with pytest.raises(ValueError, match="top"):
                scan.select(0.05)
            assert scan.top(3).tolist() == np.lexsort((np.arange(8), -scan.statistic))[:3].tolist()


def test_the_null_moves_what_moved_by_the_common_amount():
    rng = np.random.default_rng(0)
    before = rng.normal(size=(300, 128)) * rng.choice([0.01, 1.0], (300, 1))
    after = before + 0.1 * rng.normal(size=before.shape)
    after[::3] = before[::3]
    real, null = ks_scan(before, after), equal_move_null(before, after)
    assert (null.statistic[::3] == 0).all() and set(real.select(0.05)) == set(
        null.select(0.05)
    )  # the small rows that moved


def test_bad_criteria():
    x = np.zeros((3, 4))
    for options, words in (
        ({"criterion": "l3"}, "choose ks"),
        ({"criterion": "frequency"}, "needs counts"),
        ({"criterion": "lota", "lota_share": 2}, "lota_share is 2"),
    ):
        with pytest.raises(ValueError, match=words):
            scan_rows(x, x, **options)


deep: list = []
for _ in range(2000):
    deep = [deep]


@pytest.mark.parametrize(
    "counts",
    [
        [1, 2],
        [[1], [2], [3]],
        [1, [2], 3],
        deep,
        ["1", "2", "3"],
        [1, 2, -1],
        [1, 2, 0.5],
        [1, 2, math.nan],
        [1e300] * 3,
    ]
    + [[1, 2, 2**63], [10**400] * 3, [True] * 3, [None] * 3, {}, {"a": 1}, 5, "123", torch.ones(3, requires_grad=True)],
)
def test_counts_are_checked_in_one_place(counts):
    scan, x = Scan(np.array([0.5, 0.9, 0.8]), np.array([0.01, 1e-9, 1e-5]), 64), np.ones((3, 64))
    for use in (
        lambda: scan_rows(x, x, "frequency", counts=counts),
        lambda: scan_rows(x, x, "ks", counts=counts),
        lambda: scan.to_frame(counts=counts),
        lambda: plot_scan(scan, counts, {}),
    ):
        with pytest.raises(ValueError, match="whole number, 0 or more, for each of the 3 rows") as caught:
            use()
        assert len(str(caught.value)) < 300


def test_counts_may_be_any_array_of_whole_numbers():
    for counts in ([1.0, 0.0, 2.0], (1, 0, 2), np.array([1, 0, 2], np.uint8), torch.tensor([1, 0, 2])):
        assert checked_counts(counts, 3).tolist() == [1, 0, 2]
    assert checked_counts([2**62] * 2, 2).tolist() == [2**62] * 2


@pytest.mark.parametrize("shape", [(), (4,), (0, 4), (4, 0), (2, 2, 2)])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_only_a_matrix_is_scanned(shape, criterion):
    with pytest.raises(ValueError, match="needs a .rows, columns. matrix"):
        scan_rows(np.zeros(shape), np.ones(shape), criterion, counts=[1] * 4)


@pytest.mark.parametrize("huge", [np.inf, 1e30])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_distance_that_is_not_finite_is_refused(huge):
    before, after = np.ones((2, 64), np.float32), np.ones((2, 64), np.float32)
    after[1] = huge
    for criterion in CRITERIA:
        if criterion in ("l2", "relative") or np.isinf(huge) and criterion in ("max", "wasserstein"):
            with pytest.raises(ValueError, match=rf"row \[1\] .*has no {criterion}: scan by ks or sign"):
                scan_rows(before, after, criterion)
        else:
            assert np.isfinite(scan_rows(before, after, criterion, counts=[1, 2]).statistic).all()


@pytest.mark.parametrize("device", ["cuda:99", "x", "meta"])
def test_a_device_that_is_not_here(device):
    for criterion in CRITERIA:
        with pytest.raises(ValueError, match=f"device is '{device}'"):
            scan_rows(np.zeros((3, 4)), np.ones((3, 4)), criterion, counts=[1, 2, 3], device=device)


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


@pytest.mark.gpu
def test_the_torch_engine_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    before, after = awkward("gaussian", (500, 4096), np.random.default_rng(0))
    expected = ks_scan(before, after)
    assert np.array_equal(
        ks_scan(torch.tensor(before).cuda(), torch.tensor(after).cuda()).statistic, expected.statistic
    )
    assert np.array_equal(ks_scan(before, after, device="cuda").statistic, expected.statistic)
