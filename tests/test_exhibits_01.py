"""The figures of notebook 01, by what is drawn on their axes."""

import numpy as np
import pytest
import torch

import exhibits
from helpers import GaussianKDE, GaussianMixture, Grid

SIX = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)
ROUND = GaussianMixture([(0, 1)], sigma=0.5)


def ys(line):
    return np.asarray(line.get_ydata(), dtype=float)


def test_the_bumps_add_up_to_their_sum_on_one_scale():
    fig = exhibits.draw_bumps(SIX, [0.3, 0.9])
    for ax in fig.axes:
        *bumps, total, points = ax.lines
        assert len(bumps) == len(SIX)
        assert np.allclose(sum(map(ys, bumps)), ys(total))
        assert np.allclose(points.get_xdata(), SIX)
        x = total.get_xdata()[1] - total.get_xdata()[0]
        assert 0.9 < ys(total).sum() * x < 1.0001
    assert fig.axes[0].get_ylim() == fig.axes[1].get_ylim()
    assert exhibits.draw_bumps(SIX, [1], 0.6).axes[0].get_ylim()[1] == 0.6


def test_the_bins_start_where_they_are_told_and_hold_every_point():
    fig = exhibits.draw_histograms(SIX, 1.0, [0, -0.75])
    for ax, start in zip(fig.axes, (0, -0.75), strict=True):
        assert ax.patches[0].get_x() == pytest.approx(start)
        area = sum(p.get_height() * p.get_width() for p in ax.patches)
        assert area == pytest.approx(1)


def test_every_estimate_is_drawn_and_the_bias_is_that_of_their_mean():
    truth = GaussianMixture([[0.0]], sigma=1.0)
    kdes = [GaussianKDE(truth.sample(50, s), 0.5) for s in range(4)]
    (ax,) = exhibits.draw_estimates(truth, {"h": kdes}, (-3, 3)).axes
    *each, _, mean, exact = ax.lines
    assert len(each) == 4
    assert np.allclose(np.mean([ys(line) for line in each], 0), ys(mean))
    assert ys(exact).max() == pytest.approx(0.3989, abs=1e-3)
    edge = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert edge.max() == pytest.approx(max(ys(exact).max(), ys(mean).max()))


def test_the_outline_is_the_kernel_at_one_standard_deviation():
    H = torch.tensor([[0.5, 0.1], [0.4, 0.25]], dtype=torch.float64)
    samples = torch.tensor([(0.0, 0.0), (1.0, 2.0)], dtype=torch.float64)
    grid = Grid((-2, 4), (-2, 4), 60)
    ax, *_ = exhibits.draw_kernels({"H": GaussianKDE(samples, H)}, grid).axes
    away = np.stack(ax.lines[0].get_data()) - samples[1].numpy()[:, None]
    assert np.allclose(np.linalg.norm(np.linalg.solve(H, away), axis=0), 1)


def test_a_comparison_is_upright_signed_and_on_one_scale():
    narrow = GaussianMixture([(0, 1)], sigma=0.4)
    grid = Grid((-2, 2), (-2, 2), 41)
    fig = exhibits.draw_comparison(ROUND, narrow, grid, 0.5, "narrow")
    exact, image, gap = (ax.images[0] for ax in fig.axes[:3])
    assert exact.get_clim() == image.get_clim() == (0, 0.5)
    assert exact.origin == "lower"
    assert np.allclose(image.get_array(), narrow.density(grid))
    row, column = np.unravel_index(gap.get_array().argmax(), (41, 41))
    assert abs(grid.x[column]) < 0.1 and abs(grid.y[row] - 1) < 0.1
    assert gap.get_clim() == (-0.25, 0.25)


def test_bias_and_variance_are_not_mixed_up():
    measured = {"a": {0.1: np.array([[1e-4, 3e-4], [1e-2, 3e-2]])}}
    theory = {"a": {0.1: (2e-4, 2e-2), 1.0: (0.5, 1e-3)}}
    (ax,) = exhibits.draw_bias_variance(measured, theory).axes
    at = {(line.get_color(), *ys(line)) for line in ax.lines}
    assert ("C3", 2e-4, 0.5) in at and ("C0", 2e-2, 1e-3) in at
    assert ("C3", 1e-4, 3e-4) in at and ("C0", 1e-2, 3e-2) in at  # every seed


def test_the_choice_is_where_leave_one_out_is_best():
    left_out = {"a": torch.tensor([0.3, 0.1, 0.2])}
    fig = exhibits.draw_selection([1.0, 0.5, 0.2], {"a": [4, 5, 6]}, left_out)
    upright = [line for line in fig.axes[0].lines if len(line.get_xdata()) == 2
               and line.get_linestyle() == "--"]  # fmt: skip
    assert [line.get_xdata()[0] for line in upright] == [0.5]
    assert any(list(ys(line)) == [4, 5, 6] for line in fig.axes[0].lines)
