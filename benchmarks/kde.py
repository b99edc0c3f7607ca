"""Kernel estimates of five Gaussians on a grid of 100 x 100 points."""

import math
from functools import partial

import numpy as np
import torch
from KDEpy import FFTKDE
from scipy.stats import gaussian_kde
from sklearn.neighbors import KernelDensity
from timing import markdown, rounds, spread, timed

from helpers import GaussianKDE, Grid, select_bandwidth, toy_distribution

N, MANY, WIDTHS, REPEATS = 10_000, 1_000_000, (0.1, 0.5, 1.0), 5
TRUTH = toy_distribution("GaussiansRot", 5)
FULL = np.array([[0.4, 0.0], [0.3, 0.2]])  # not diagonal: no shortcut

# From samples (N, 2), a Grid and h to the image of the density:


def ours(samples, grid, h):
    return GaussianKDE(samples, h).density(grid).numpy()


def scipy_at(samples, points, H):
    """gaussian_kde with the covariance H H^T in place of the data's."""
    estimate = gaussian_kde(samples.numpy().T)
    estimate.covariance = H @ H.T
    estimate.cho_cov = np.linalg.cholesky(estimate.covariance)
    estimate.log_det = np.log(np.linalg.det(2 * math.pi * H @ H.T))
    return estimate(points.numpy().T)


def scipy(samples, grid, h):
    return scipy_at(samples, grid.points, h * np.eye(2))


def sklearn(samples, grid, h):
    tree = KernelDensity(bandwidth=h, rtol=1e-4).fit(samples.numpy())
    return np.exp(tree.score_samples(grid.points.numpy()))


def fft(samples, grid, h):
    points = torch.cartesian_prod(grid.x, grid.y).numpy()  # y runs fastest
    estimate = FFTKDE(kernel="gaussian", bw=h).fit(samples.numpy())
    return estimate.evaluate(points).reshape(grid.size, grid.size).T


LIBRARIES = {
    "this repository": ours,
    "scipy gaussian_kde": scipy,
    "scikit-learn KernelDensity, rtol 1e-4": sklearn,
    "KDEpy FFTKDE": fft,
}


def direct(samples, points, H):
    """The sum as it is written, in float64: (N, 2), (n, 2) -> (n,)."""
    a, b = (np.linalg.solve(H, x.numpy().T) for x in (points, samples))
    rows = []
    for part in np.array_split(a, max(1, a.shape[1] // 200), 1):
        u = ((part[:, :, None] - b[:, None]) ** 2).sum(0)
        rows.append(np.exp(-u / 2).mean(1))
    return np.concatenate(rows) / (2 * math.pi * abs(np.linalg.det(H)))


def error(values, reference):
    """The largest difference, in parts of the density's maximum."""
    return np.abs(np.ravel(values) - reference).max() / reference.max()


def on_the_grid(samples, repeats):
    grid, rows = Grid.around(samples), []
    for h in WIDTHS:
        reference = direct(samples, grid.points, h * np.eye(2))
        contenders = {
            name: partial(run, samples, grid, h)
            for name, run in LIBRARIES.items()
        }
        seconds = rounds(contenders, repeats)
        base, *_ = seconds.values()
        rows += [
            (h, name, spread(1e3 * own),
             "1" if own is base else spread(own / base),
             f"{error(contenders[name](), reference):.0e}")
            for name, own in seconds.items()
        ]  # fmt: skip
    return markdown("h | estimate | CPU ms | ÷ ours | error", rows)


def report(quick):
    """The section on kernels, in Markdown."""
    n, many, repeats = (1000, 10_000, 1) if quick else (N, MANY, REPEATS)
    samples, points = TRUTH.sample(n, 0), TRUTH.sample(n, 1)

    def scattered():
        return GaussianKDE(samples, FULL).log_probability(points).exp()

    theirs = partial(scipy_at, samples, points, FULL)
    full = rounds({"own": scattered, "scipy": theirs}, repeats)
    reference = direct(samples, points, FULL)
    grid = on_the_grid(samples, repeats)
    ladder = timed(lambda: select_bandwidth(samples))[1]
    large = TRUTH.sample(many, 0)
    seconds = timed(lambda: ours(large, Grid.around(large), 0.5))[1]
    return f"""## Kernel estimates

N = {n} samples of five Gaussians, from the samples to the density on 100 × 100
points; the error is the largest difference from the direct sum in float64,
in parts of the density's maximum.

{grid}

A full H at {n} scattered points: this repository {spread(full["own"])} CPU s,
scipy {spread(full["scipy"])}, {spread(full["scipy"] / full["own"])}
times as much; errors {error(scattered(), reference):.0e} and
{error(theirs(), reference):.0e}. N = {many} on the grid: {seconds:.2f} CPU s.
`select_bandwidth` with 16 candidates: {ladder:.2f} CPU s,
{ladder / (16 * n * n) * 1e9:.1f} ns a pair and candidate."""
