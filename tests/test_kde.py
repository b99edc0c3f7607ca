"""Laws of the kernel density estimate and its bandwidth."""

import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats
from truths import assert_mass_and_moments, normal_points

import helpers
from helpers import (
    GaussianKDE,
    LocalKDE,
    leave_one_out,
    select_bandwidth,
    sharpen,
)

FORGET = Path("/proc/self/clear_refs")  # the most memory so far
seeds = st.integers(0, 10**6)
DIMENSIONS = 1, 2, 3, 5
each_d = pytest.mark.parametrize("d", DIMENSIONS)


def draw(seed, N, scale=1.0, d=2):
    return np.random.default_rng(seed).normal(size=(N, d)) * scale


def bandwidth_matrix(seed, d=2, least=0.05):
    """Random, neither symmetric nor triangular, of condition below 50."""
    random = np.random.default_rng(seed)
    turn, turn_back = (
        stats.ortho_group.rvs(d, random_state=random) if d > 1 else np.eye(1)
        for _ in range(2)
    )
    return turn @ np.diag(random.uniform(least, 2, d)) @ turn_back


def direct_sum(samples, H, x):
    """log f, as the assignment writes f, in extended precision."""
    samples, x = np.asarray(samples, float), np.asarray(x, float)
    inverse, d = np.linalg.inv(np.asarray(H, float)), x.shape[1]
    u = ((samples - x[:, None]).astype(np.longdouble)) @ inverse.T
    log_kernel = -(u**2).sum(-1) / 2 - d / 2 * np.log(2 * np.longdouble(np.pi))
    top = log_kernel.max(1)
    log_sum = top + np.log(np.exp(log_kernel - top[:, None]).sum(1))
    norm = np.log(len(samples)) + np.log(abs(np.linalg.det(H)))
    return (log_sum - norm).astype(float)


def assert_close(actual, expected, tolerance=1e-9):
    """Both log-densities: absolute error where p is large, relative in the
    tails, where log p itself is large."""
    np.testing.assert_allclose(actual, expected, rtol=tolerance,
                               atol=tolerance)  # fmt: skip


@given(seed=seeds, N=st.integers(1, 400), d=st.sampled_from(DIMENSIONS),
       scale=st.sampled_from([1, 3, 100, 1e4]))  # fmt: skip
@settings(max_examples=60)
def test_kde_is_the_assignments_sum_also_in_the_tails(seed, N, d, scale):
    samples, H = draw(seed, N, d=d), bandwidth_matrix(seed, d)
    x = draw(seed + 1, 30, scale, d)
    actual = GaussianKDE(samples, H).log_probability(x)
    assert torch.isfinite(actual).all()
    assert_close(actual, direct_sum(samples, H, x))


@each_d
@pytest.mark.parametrize("N", [10, 5000])
def test_kde_agrees_with_scipy(N, d):
    """scipy's bandwidth is a covariance, here factor^2 times the data's:
    any H with H H^T equal to that is the same kernel."""
    samples, x, factor = draw(N, N, d=d), draw(0, 50, 2.0, d), 0.4
    turn = stats.ortho_group.rvs(d, random_state=N) if d > 1 else -np.eye(1)
    covariance = np.cov(samples.T).reshape(d, d)
    H = factor * np.linalg.cholesky(covariance) @ turn
    expected = stats.gaussian_kde(samples.T, factor).logpdf(x.T)
    assert_close(GaussianKDE(samples, H).log_probability(x), expected, 1e-8)


@each_d
def test_kde_has_unit_mass_and_its_samples_moments(d):
    H = bandwidth_matrix(3, d, least=0.5)
    assert_mass_and_moments(GaussianKDE(draw(0, 15, d=d), H))


def test_a_number_h_means_h_times_identity():
    samples, x = draw(0, 30), draw(1, 30)
    expected = GaussianKDE(samples, 0.3 * np.eye(2)).log_probability(x)
    for h in (0.3, np.float64(0.3), torch.tensor(0.3, dtype=torch.float64)):
        assert torch.equal(
            GaussianKDE(samples, h).log_probability(x), expected
        )
    whole = GaussianKDE(samples, 1).log_probability(x)
    assert torch.equal(whole, GaussianKDE(samples, 1.0).log_probability(x))


def test_kde_keeps_its_digits_far_from_the_origin():
    """Nor do its bandwidths, nor a sharpened sample."""
    shift = np.array([2.0**30, -(2.0**29)])
    samples = np.round(draw(0, 100) * 1024) / 1024  # exact after the shift
    x = np.round(draw(1, 50) * 1024) / 1024
    near = GaussianKDE(samples, 0.3).log_probability(x)
    far = GaussianKDE(samples + shift, 0.3).log_probability(x + shift)
    assert_close(far, near)
    assert_close(leave_one_out(samples + shift, [0.1, 0.7]),
                 leave_one_out(samples, [0.1, 0.7]))  # fmt: skip
    moved = sharpen(samples + shift, 0.3) - torch.from_numpy(shift)
    assert abs(moved - sharpen(samples, 0.3)).max() < 1e-6  # an ulp
    local = LocalKDE(samples + shift, 9).log_probability(x + shift)
    assert_close(local, LocalKDE(samples, 9).log_probability(x))


def test_image_keeps_its_digits_far_from_the_origin():
    """A thousand million h away: 1e-12 of the direct sum."""
    away = np.array([3e8, -2e8])
    samples, h = draw(0, 100) + away, 0.3
    grid = helpers.Grid.around(samples, 30)
    expected = np.exp(direct_sum(samples, h * np.eye(2), grid.points))
    actual = GaussianKDE(samples, h).density(grid).flatten()
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-200)


@pytest.mark.parametrize("make", [
    lambda x: GaussianKDE(x, 0.3), LocalKDE,
    lambda x: helpers.GaussianMixture(x, 0.3),
])  # fmt: skip
def test_samples_are_copied(make):
    samples, x = normal_points(50), normal_points(9, seed=1)
    density = make(samples)
    before = density.log_probability(x)
    samples *= 3
    assert torch.equal(density.log_probability(x), before)


@each_d
@pytest.mark.parametrize("N, k", [(2, 30), (40, 5), (300, 30)])
def test_local_widths_are_those_that_the_formula_says(N, k, d):
    """c times the distance to the k-th neighbour, and c the best of the
    ladder by leaving each sample out."""
    samples, x = draw(N, N, d=d), draw(0, 20, 2.0, d)
    kde = LocalKDE(samples, k)
    distances = np.linalg.norm(samples[:, None] - samples, axis=-1)
    far = np.sort(distances, 1)[:, min(k, N - 1)]
    ratio = kde.widths.numpy() / far
    np.testing.assert_allclose(ratio, ratio[0])

    def log_f(x, c, left_out=False):
        parts = stats.norm(samples, c * far[:, None]).pdf(x[..., None, :])
        own = parts.prod(-1)  # of independent coordinates
        return np.log(np.where(left_out, 0, own).sum(-1) / N)

    assert_close(kde.log_probability(x), log_f(x, ratio[0]), 1e-8)
    ladder = 2.0 ** (1 - np.arange(17) / 4)
    scores = [log_f(samples, c, np.eye(N) == 1).mean() for c in ladder]
    assert ratio[0] == pytest.approx(ladder[np.argmax(scores)])


def test_left_out_of_local_widths_reaches_a_lonely_sample():
    """By the definition, up to a constant, where the kernels underflow."""
    samples = np.vstack([draw(0, 40), [(300.0, 0.0)]])
    kde = LocalKDE(samples, 5)
    scale = kde.widths.numpy()[:, None]
    logs = stats.norm(samples, scale).logpdf(samples[:, None]).sum(-1)
    np.fill_diagonal(logs, -np.inf)
    gap = kde.left_out(np.ones(1))[:, 0].numpy() - special.logsumexp(logs, 1)
    assert_close(gap - gap[0], np.zeros(41), 1e-6)


@each_d
def test_local_kde_has_unit_mass_and_its_samples_moments(d):
    assert_mass_and_moments(LocalKDE(draw(0, 30, d=d), 5))


@pytest.mark.parametrize("distance", [1000, 60_000])
def test_the_ladder_goes_on_where_its_end_is_best(distance):
    """Two clusters, far apart: the reference rule is their distance. By 15
    rungs of 2^(1/4) four times, as far as 30 000 of the best width."""
    samples = draw(0, 300)
    samples[::2, 0] += distance
    h = select_bandwidth(samples)
    finer = select_bandwidth(samples, h * 2.0 ** (np.arange(-9, 9) / 4))
    assert h < 1 and finer == h


def test_points_that_occur_twice_do_not_choose_the_bandwidth():
    """A rounded table: its h is that of the points before the rounding, or
    the rounding's, but not the smallest candidate."""
    samples = draw(0, 600)
    h = select_bandwidth(samples)
    assert select_bandwidth(np.vstack([samples] * 2)) > 0.7 * h
    assert select_bandwidth(samples.round(1)) > 0.7 * h
    assert LocalKDE(samples.round()).log_probability(samples).isfinite().all()


@pytest.mark.parametrize("kind", ["number", "diagonal", "swapped", "full"])
@pytest.mark.parametrize("N", [1, 37, 5000])
def test_grid_path_equals_point_path(kind, N):
    H = {
        "number": 0.25,
        "diagonal": [[0.2, 0], [0, -0.7]],
        "swapped": [[0, 0.2], [0.7, 0]],
        "full": bandwidth_matrix(N),
    }[kind]
    kde, grid = GaussianKDE(draw(N, N), H), helpers.Grid((-4, 3), (-3, 5), 41)
    image = kde.density(grid)
    assert image.shape == (41, 41)
    expected = kde.log_probability(grid.points).exp()
    error = (image.flatten() - expected).abs().max() / expected.max()
    assert error < 1e-9


def direct_leave_one_out(samples, h):
    H = h * np.eye(samples.shape[1])
    return np.mean([
        direct_sum(np.delete(samples, i, 0), H, samples[[i]])
        for i in range(len(samples))
    ])  # fmt: skip


@given(seed=seeds, N=st.integers(2, 40), d=st.sampled_from(DIMENSIONS))
@settings(max_examples=15)
def test_leave_one_out_leaves_one_out(seed, N, d):
    samples, widths = draw(seed, N, d=d), [0.05, 0.3, 2.0]
    expected = [direct_leave_one_out(samples, h) for h in widths]
    assert_close(leave_one_out(samples, widths), expected, 1e-10)


@each_d
def test_ladder_of_bandwidths_equals_the_direct_formula(d):
    """From one rung to the next but one a kernel is squared; N = 1500 in
    parts of 43 rows."""
    samples = draw(d, 1500 if d == 2 else 100, d=d)
    samples[::2] += 9  # of two parts, so that the widest is not the best
    widest = 1.2 * helpers.reference_bandwidth(samples)
    ladder = widest * 2.0 ** (-np.arange(16) / 4)
    expected = [direct_leave_one_out(samples, h) for h in ladder[::5]]
    actual = leave_one_out(samples, ladder)
    np.testing.assert_allclose(actual[::5], expected, rtol=1e-12, atol=1e-12)
    shuffled = leave_one_out(samples, ladder[::-1])  # no rung is a square
    np.testing.assert_allclose(shuffled.flip(0), actual, rtol=1e-12)
    assert select_bandwidth(samples) == ladder[actual.argmax()]


def test_select_bandwidth_is_the_best_candidate():
    samples = helpers.ToyDataset("GaussiansRot", 300).data
    candidates = [0.02, 0.1, 0.2, 0.4, 1.0]
    scores = leave_one_out(samples, candidates)
    best = candidates[scores.argmax()]
    assert select_bandwidth(samples, candidates) == best
    assert select_bandwidth(samples, candidates[::-1]) == best
    assert scores.argmax() not in (0, 4)
    for same in (
        torch.tensor(candidates), np.array(candidates, ">f8"),
        torch.tensor(candidates, requires_grad=True),
        pd.Series(candidates, index=range(5, 10)), tuple(candidates),
    ):  # fmt: skip
        assert select_bandwidth(samples, same) == pytest.approx(best)
        torch.testing.assert_close(leave_one_out(samples, same), scores)
    chosen = select_bandwidth(samples.clone().requires_grad_())
    assert leave_one_out(samples, [chosen]) >= scores.max() - 0.01


@each_d
@pytest.mark.parametrize("N", [50, 2000])
def test_reference_bandwidth_is_silvermans_rule(N, d):
    samples = draw(N, N, d=d) * np.arange(1, d + 1)
    spread = samples.std(0, ddof=1)
    quartiles = stats.iqr(samples, axis=0) / (2 * stats.norm.ppf(0.75))
    scale = np.minimum(spread, quartiles).mean()
    rule = stats.gaussian_kde(samples.T, "silverman").factor
    # 1.349 for twice the quartile of a normal, 1.34898: 2e-5.
    assert helpers.reference_bandwidth(samples) == pytest.approx(
        scale * rule, 2e-5
    )


def test_reference_bandwidth_minds_neither_an_outlier_nor_repeats():
    samples = draw(0, 500)
    repeats = np.vstack([samples, np.zeros((1500, 2))])
    assert 0.1 < helpers.reference_bandwidth(repeats) < 0.5
    outlier = np.vstack([samples, [[1e6, 1e6]]])
    # A mean and standard deviation would grow by a factor of 4e4.
    assert helpers.reference_bandwidth(outlier) == pytest.approx(
        helpers.reference_bandwidth(samples), rel=0.05
    )


@each_d
@pytest.mark.parametrize("N", [1, 2, 600])
def test_sharpen_moves_towards_the_kernel_mean(N, d):
    samples, h = draw(N, N, d=d), 0.4
    weights = np.exp(-((samples[:, None] - samples) ** 2).sum(-1) / (2 * h**2))
    mean = weights @ samples / weights.sum(1, keepdims=True)
    np.testing.assert_allclose(sharpen(samples, h), mean, atol=1e-12)
    actual = sharpen(samples, h, step=0.3)
    expected = 0.7 * samples + 0.3 * mean
    np.testing.assert_allclose(actual, expected, atol=1e-12)


@pytest.mark.parametrize("step, ratio", [(0.5, 0.1), (1.0, 1 / 1.2720)])
def test_sharpening_keeps_the_variance_of_a_gaussian(step, ratio):
    """After the move and the kernel's own variance it is sigma^2 again: for
    half a step up to (5/4) r^2 with r = (h / sigma)^2, for a whole one where
    r is the golden section. The sample's variance is known to 0.6 %."""
    x = normal_points(10_000)
    after = sharpen(x, ratio, step).var() + ratio**2
    assert after / x.var() == pytest.approx(1, abs=0.01)


def peak():
    """Most memory of this process since its peak was forgotten, in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024


def memory_taken(log_density, *args):
    """In a process where nothing else ran: what others left changes it."""
    FORGET.write_text("5")
    before = peak()
    assert log_density(*args).isfinite().all()
    return peak() - before


def kde_on_a_grid(N, H):
    kde = GaussianKDE(normal_points(N), H)
    grid = helpers.Grid((-3, 3), (-3, 3), 100)
    if H == 0.1:
        return kde.density(grid)
    return kde.log_probability(grid.points[::10])


def sharpened_and_local(N):
    return LocalKDE(sharpen(normal_points(N), 0.3)).log_probability([(0, 0)])


def mixture_on_a_grid(N):
    mixture = helpers.GaussianMixture(normal_points(N), 0.1)
    return mixture.log_probability(helpers.Grid((-3, 3), (-3, 3), 100).points)


@pytest.mark.slow
@pytest.mark.skipif(not FORGET.exists(), reason="Linux alone tells the peak")
@pytest.mark.parametrize("most, log_density, args", [
    (500, kde_on_a_grid, (1_000_000, 0.1)),
    (500, kde_on_a_grid, (100_000, [[0.1, 0.05], [0, 0.1]])),
    (100, mixture_on_a_grid, (5000,)),
    (100, sharpened_and_local, (8000,)),
])  # fmt: skip
def test_memory_is_bounded(most, log_density, args):
    """1e6 samples on a 100 x 100 grid: all pairs would take 80 GB."""
    fresh = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    with fresh:
        assert fresh.submit(memory_taken, log_density, *args).result() < most


def test_bandwidth_of_many_samples_is_scored_on_some_of_them():
    """Under the estimate from all the others, not from those alone."""
    x = helpers.Moons().sample(5000, seed=1)
    some = helpers.some_of(5000, 4000)
    assert len(set(some.tolist())) == 4000 and some.max() < 5000
    turns = torch.bincount(some % 4)  # rows that come in turns are all there
    assert (turns - 1000).abs().max() < 50
    assert torch.equal(helpers.some_of(5, 5), torch.arange(5))
    tried = [0.05, 0.06, 0.07, 0.09]
    every = helpers.left_out_log_p(x, tried)
    part = helpers.left_out_log_p(x, tried, 4000)
    torch.testing.assert_close(part, every[:, some])
    best = tried[int(part.mean(1).argmax())]
    assert helpers.select_bandwidth(x, tried) == best


def test_ladder_goes_up_where_the_widest_is_best():
    """Long tails: the reference rule is far too narrow."""
    random = np.random.default_rng(3)
    far = np.where(random.random((600, 1)) < 0.02, 20, 1)
    x = random.normal(size=(600, 2)) * far
    h = helpers.select_bandwidth(x)
    own, *others = helpers.leave_one_out(x, [h, h / 1.2, 1.2 * h, 2 * h])
    assert h > 1.3 * helpers.reference_bandwidth(x)
    assert own >= max(others)


def test_bandwidth_does_not_depend_on_rows_that_come_in_turns():
    random = np.random.default_rng(0)
    narrow = 10 + 0.01 * random.normal(size=(2000, 2))
    x = np.stack([narrow, random.normal(size=(2000, 2))], 1).reshape(-1, 2)
    mixed, turned = helpers.select_bandwidth(random.permutation(x)), x[::-1]
    for rows in (x, turned.copy()):
        assert helpers.select_bandwidth(rows) == pytest.approx(mixed, rel=0.6)


@pytest.mark.parametrize("wide", [30, 100, 300, 1000, 5000])
@pytest.mark.parametrize("share", [0, 0.45])
def test_the_ladder_of_widths_leaves_none_out(wide, share, random):
    """Two far clusters, whose best width lies below what the spread
    suggests, and points about one cluster, where it lies above."""
    x = random.normal(size=(400, 2))
    if share:
        x[: int(400 * share)] *= wide
    else:
        x[:200] += wide
    h = helpers.reference_bandwidth(x)
    ladder = 1.2 * h * 2.0 ** (np.arange(-60, 61) / 4)
    best = ladder[helpers.leave_one_out(x, ladder).argmax()]
    assert helpers.select_bandwidth(x) == pytest.approx(float(best))
