"""Laws of the whole figures and of the tables."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from truths import make_flow

import plots
import study
from helpers import GaussianMixture, Grid, toy_distribution

TRUTH = toy_distribution("GaussiansRot", 3)
GRID = Grid((-4, 3), (-3, 4), 20)


@pytest.fixture(scope="module")
def fits():
    setting = {"dist_type": "GaussiansRot", "num_gaussians": 3,
               "num_samples": 60, "num_layers": 2, "epochs": 3}  # fmt: skip
    settings = {"two": setting, "three": {**setting, "num_layers": 3}}
    return study.train_all(settings, 3, 200)


def images(fig):
    """{(row, column): image array, limits of the colour scale}"""
    return [
        (ax.images[0].get_array().data, ax.images[0].get_clim())
        for ax in fig.axes if ax.images
    ]  # fmt: skip


def test_fits_show_truth_flow_and_flow_less_truth_on_one_scale(fits):
    fig = plots.draw_fits(fits, GRID)
    exact = TRUTH.density(GRID).numpy()
    top = exact.max()
    for k, of in enumerate(fits.values()):
        flow = of.result.flow.member(of.middle).density(GRID).numpy()
        row = images(fig)[3 * k : 3 * k + 3]
        for (shown, scale), wanted, ends in zip(
            row, (exact, flow, flow - exact),
            ((0, top), (0, top), (-top / 2, top / 2)), strict=True,
        ):  # fmt: skip
            np.testing.assert_allclose(shown, wanted, atol=1e-6)
            assert scale == pytest.approx(ends)
        (losses,) = [ax for ax in fig.axes if ax.get_title() == [*fits][k]]
        thin = [line for line in losses.lines if line.get_linewidth() == 0.3]
        assert len(thin) == 6  # every seed's, training and held out


def test_layers_stand_above_the_densities_of_those_so_far():
    flow = make_flow(3, seed=1)
    flow.outermost.set(torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0, 3]]))
    fig = plots.draw_layers({"mine": flow}, {"mine": [4, 3, 2, 1.5]})
    drawn = images(fig)
    assert len(drawn) == 4
    around = Grid.around(torch.cat(plots.path_of(flow)).clamp(-5, 5), 150,
                         margin=0)  # fmt: skip
    normal = GaussianMixture([[0, 0]], 1)
    for k, (shown, scale) in enumerate(drawn):
        z, log_det = around.points, 0
        for layer in reversed(flow.layers[:k]):
            z, own = layer.inverse(z)
            log_det = log_det + own
        p = (normal.log_probability(z) + log_det).exp()
        p = around.image(p.detach()).numpy()
        np.testing.assert_allclose(shown, p, rtol=1e-3, atol=1e-6)
        assert scale == drawn[0][1]
    titles = [ax.get_title() for ax in fig.axes if ax.get_title()]
    assert titles[0] == "prior\nKL 4.00" and "3\nKL 1.50" in titles[-1]


@pytest.mark.parametrize("share", ["row", "column"])
def test_densities_share_the_scale_of_their_truth(share):
    other = toy_distribution("Moons")
    table = {"a": {"x": TRUTH, "y": other}, "b": {"x": other, "y": TRUTH}}
    fig = plots.draw_densities(table, share)
    scales = np.array([scale[1] for _, scale in images(fig)]).reshape(2, 2)
    same, apart = (scales, scales.T) if share == "row" else (
        scales.T, scales)  # fmt: skip
    assert (same[:, 0] == same[:, 1]).all()
    assert (apart[:, 0] != apart[:, 1]).all()
    assert [ax.get_ylabel() for ax in fig.axes] == ["a", "", "b", ""]


VALUES = {1: [1.0, 2.0, 3.0], 10: [0.1, 0.2, 0.6]}


def seeds_of(ax):
    return [line.get_ydata().tolist() for line in ax.lines
            if line.get_marker() == "o" and len(line.get_ydata())]  # fmt: skip


def test_curves_show_every_seed_its_mean_and_interval():
    fig = plots.draw_curves(
        {"left": {"a": VALUES}, "right": {"b": VALUES}},
        "N",
        lines={"floor": {1: 0.05, 10: 0.05}},
    )
    left, right = fig.axes
    assert left.get_xscale() == left.get_yscale() == "log"
    assert left.get_ylim() == right.get_ylim()
    for ax in (left, right):
        assert seeds_of(ax) == list(VALUES.values())
        means = [np.mean(v) for v in VALUES.values()]
        (curve,) = [line for line in ax.lines if line.get_linestyle() == "-"
                    and len(line.get_xdata()) == 2]  # fmt: skip
        assert curve.get_xdata().tolist() == [1, 10]
        np.testing.assert_allclose(curve.get_ydata(), means)
        ends = [c.get_segments()[0][:, 1] for c in ax.collections]
        for end, values in zip(ends, VALUES.values(), strict=True):
            np.testing.assert_allclose(end, study.mean_interval(values)[1:])


@pytest.mark.parametrize("groups", [
    {"a": [1.0, 2.0], "b": [3.0, 4.0]},
    {"one": {"a": [1.0, 2.0], "b": [3.0, 4.0]}},
])  # fmt: skip
def test_groups_show_every_seed(groups):
    fig = plots.draw_groups(groups, colors={"b": "red"})
    assert seeds_of(fig.axes[0]) == [[1, 2], [3, 4]]
    colors = [line.get_color() for line in fig.axes[0].lines
              if line.get_marker() == "o"]  # fmt: skip
    assert colors[1] == "red" != colors[0]


# Tables, and fits


@pytest.mark.parametrize("interval, words, factors", [
    ((0.5, 0.25, 0.75), "better by 0.500 [0.250, 0.750]",
     "smaller: × 0.61 [0.47, 0.78]"),
    ((-0.5, -0.75, -0.25), "worse by 0.500 [0.250, 0.750]",
     "larger: × 1.65 [1.28, 2.12]"),
    ((0.1, -0.1, 0.3), "cannot tell: gain in [-0.100, 0.300]",
     "cannot tell: × 0.90 [0.74, 1.11]"),
])  # fmt: skip
def test_words_say_which_way(interval, words, factors):
    interval = study.Interval(*interval)
    assert study.in_words(interval) == words
    assert study.in_factors(interval) == factors


def test_tables_read_all_their_comparisons_together():
    gains = {"a": {"x": [1.0, 1.2, 0.5]}, "b": {"x": [0.3, 0.2, 0.4]}}
    table = study.table_of_gains(gains)
    alone = study.in_words(study.mean_interval(gains["b"]["x"]))
    assert alone.startswith("better") and table.loc["b", "x"] != alone
    together = study.holm_intervals({k: v["x"] for k, v in gains.items()})
    for row, interval in together.items():
        assert table.loc[row, "x"] == study.in_words(interval)
    means = study.table_of_means(gains)
    assert means.loc["b", "x"] == str(study.mean_interval([0.3, 0.2, 0.4]))


def test_pairs_say_what_the_second_multiplies():
    a, b = (
        study.Fit(TRUTH, None, pd.DataFrame({"kl": kl}))
        for kl in ([0.2, 0.4, math.nan], [0.1, 0.2, 0.5])
    )
    table = study.table_of_pairs({"ours": (a, b)}, "few", "many")
    told = table.loc["ours"]
    assert told["KL, few"] == "0.400 (0.2–inf)"
    assert told["KL, many"] == "0.200 (0.1–0.5)"
    assert told["many against few"].startswith("smaller: × 0.50 ")
    assert a.middle == 1 and a.log_kl().tolist()[2] == 0  # as 1 nat


def test_kl_by_layer_goes_from_the_prior_to_the_flow(fits):
    of = fits["three"]
    kls = study.kl_by_layer(TRUTH, of.flow, 500)
    assert len(kls) == 4
    assert kls[-1] == study.kl_divergence(TRUTH, of.flow, 500).value
    shift, scale = of.flow.outermost.shift, of.flow.outermost.scale[0]
    wide = scale.square().diag().tolist()
    prior = GaussianMixture(shift, covariances=[wide])
    expected = study.kl_divergence(TRUTH, prior, 500).value
    assert kls[0] == pytest.approx(expected, rel=1e-4)


def test_fits_carry_their_names_and_truths(fits):
    assert [*fits] == ["two", "three"]
    assert [len(of.flow.layers) for of in fits.values()] == [2, 3]
    assert torch.equal(fits["two"].truth.means, TRUTH.means)
    assert (fits["two"].runs.kl.to_numpy() == fits["two"].kl).all()
    with pytest.raises(RuntimeError, match="mine.*learning_rate"):
        study.train_all({"mine": {
            "dist_type": "Moons", "num_layers": 2, "epochs": 1,
            "learning_rate": -1}}, 1, 50)  # fmt: skip


def test_figures_are_numbered_in_the_order_in_which_they_are_shown(
    monkeypatch, tmp_path
):
    monkeypatch.setenv("FIGURES", str(tmp_path))
    monkeypatch.setattr(plots, "SHOWN", {})
    shown = []
    monkeypatch.setattr(plots, "display", lambda what, **_: shown.append(what))
    for name in ("07_a", "07_b", "08_a", "07_a"):
        plots.save_figure(plots.panels()[0], name, "Mine.")
    captions = [what.data for what in shown[1::2]]
    assert captions == [f"*Figure {n}. Mine.*" for n in
                        ("7.1", "7.2", "8.1", "7.1")]  # fmt: skip
