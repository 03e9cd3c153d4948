"""Figures: what they say about the rows, and that nothing hides them."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from kslottery.ks import Scan, ks_pvalue
from kslottery.plots import plot_layers, plot_pvalues, plot_rank, plot_scan, png


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def some_scan(V=300, winners=40, d=128):
    rng = np.random.default_rng(0)
    statistic = np.concatenate([rng.uniform(0.25, 0.6, winners), rng.uniform(0, 0.1, V - winners)])
    statistic = np.round(statistic * d) / d
    return Scan(statistic, ks_pvalue(statistic, d), d), rng.integers(1, 1000, V)


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def under_the_legend(ax):
    """How many drawn points, and names of points, the legend covers."""
    ax.figure.draw_without_rendering()
    box = ax.get_legend().get_window_extent()
    points = np.vstack(
        [ax.transData.transform(line.get_xydata()) for line in ax.lines if line.get_linestyle() == "None"]
    )
    names = sum(box.overlaps(text.get_window_extent()) for text in ax.texts)
    return sum(box.contains(x, y) for x, y in points) + names


@pytest.mark.parametrize("size", [(7.5, 4.2), (3, 2)])
def test_no_winner_is_under_a_legend(size):
    "Whatever the size of the axes: the winners are up on the left here, where the legend stood."
    scan, counts = some_scan()
    for plot in (
        lambda ax: plot_scan(scan, counts, {}, ax=ax),
        lambda ax: plot_scan(scan, counts, {}, top_k=12, ax=ax),
        lambda ax: plot_rank(scan, 40, ax),
    ):
        ax = plot(plt.subplots(figsize=size)[1])
        assert under_the_legend(ax) == 0
        assert not ax.get_legend().get_window_extent().overlaps(ax.xaxis.label.get_window_extent())


def test_the_legend_tells_the_size_of_the_ticket():
    scan, counts = some_scan()
    assert "ticket: 40 rows" in legend(plot_scan(scan, counts, {}))
    assert "ticket: the best 12 rows" in legend(plot_scan(scan, counts, {}, top_k=12))
    assert "ticket: the best 1 row" in legend(plot_scan(scan, counts, {}, top_k=1))
    strict = len(scan.select(1e-6, "bonferroni"))
    assert 0 < strict < 40 and f"ticket: {strict} rows" in legend(
        plot_scan(scan, counts, {}, alpha=1e-6, correction="bonferroni")
    )
    assert "ticket: 1 row" in legend(plot_rank(scan, 1))


@pytest.mark.parametrize("tokens", [["a", "<$x$>", "."], {0: "a", 1: "<$x$>", 2: "."}])
def test_names_are_those_that_the_caller_gives(tokens):
    scan = Scan(np.array([0.6, 0.5, 0.4, 0.3]), ks_pvalue(np.array([0.6, 0.5, 0.4, 0.3]), 100), 100)
    ax = plot_scan(scan, [10, 20, 400, 0], tokens)
    assert {text.get_text() for text in ax.texts} == {"a", r"<\$x\$>", "“.”"}  # what never occurs is not drawn
    assert png(plot_scan, scan, [10, 20, 400, 5], tokens)[:4] == b"\x89PNG"


def test_a_criterion_without_p_values():
    scan = Scan(np.arange(10.0), None, 64, "l2")
    ax = plot_scan(scan, np.arange(1, 11), {}, top_k=3)
    assert ax.get_ylabel() == "l2" and not any("critical" in text for text in legend(ax))
    with pytest.raises(ValueError, match="top_k"):
        plot_scan(scan, np.arange(1, 11), {})
    with pytest.raises(ValueError, match="no p-values"):
        plot_pvalues(scan)


def test_counts_that_are_all_zero_leave_nothing_to_draw():
    scan, counts = some_scan()
    ax = plot_scan(scan, 0 * counts, {})
    assert not ax.texts and png(plot_scan, scan, 0 * counts, {})[:4] == b"\x89PNG"


def test_layers_need_a_name_and_two_numbers():
    class Tensor:
        def __init__(self, name, rows, moved):
            self.name, self.rows, self.moved = name, rows, moved

    names = ("model.embed_tokens.weight", "model.layers.0.mlp.up.weight", "model.layers.10.mlp.up.weight")
    ax = plot_layers([Tensor(name, 4, moved) for moved, name in enumerate(names)])
    assert [t.get_text() for t in ax.get_yticklabels()] == ["-", "0", "10"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["embed_tokens", "mlp.up"]
    assert sorted(t.get_text() for t in ax.texts) == ["25%", "50%"]
