"""Kernel estimates of five Gaussians on a grid of 100 x 100 points."""

import math
import re
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from KDEpy import FFTKDE
from scipy.stats import gaussian_kde
from sklearn.neighbors import KernelDensity
from timing import cpu_seconds, markdown, rounds, spread

from helpers import GaussianKDE, Grid, select_bandwidth, toy_distribution

N, WIDTHS, REPEATS = 10_000, (0.1, 0.5, 1.0), 5
TRUTH = toy_distribution("GaussiansRot", 5)
OURS = "this repository"
FULL = np.array([[0.4, 0.0], [0.3, 0.2]])  # not diagonal: no shortcut


class ScipyKDE(gaussian_kde):
    """gaussian_kde with the covariance H H^T in place of the data's."""

    def __init__(self, samples, H):
        self._H = H * np.eye(2) if np.ndim(H) == 0 else H
        super().__init__(samples.T)

    def _compute_covariance(self):
        self.covariance = self._H @ self._H.T
        self.cho_cov = np.linalg.cholesky(self.covariance)
        self.log_det = np.linalg.slogdet(2 * math.pi * self.covariance)[1]


# Each takes samples (N, 2) and a Grid, and returns what GaussianKDE.density
# does: from the samples to the image, preparation included.


def ours(samples, grid, h):
    return GaussianKDE(samples, h).density(grid).numpy()


def scipy(samples, grid, h):
    values = ScipyKDE(samples.numpy(), h)(grid.points.numpy().T)
    return values.reshape(grid.size, grid.size)


def sklearn(samples, grid, h):
    tree = KernelDensity(bandwidth=h, rtol=1e-4).fit(samples.numpy())
    values = np.exp(tree.score_samples(grid.points.numpy()))
    return values.reshape(grid.size, grid.size)


def fft(samples, grid, h):
    points = torch.cartesian_prod(grid.x, grid.y).numpy()  # y runs fastest
    estimate = FFTKDE(kernel="gaussian", bw=h).fit(samples.numpy())
    return estimate.evaluate(points).reshape(grid.size, grid.size).T


LIBRARIES = {
    OURS: ours,
    "scipy gaussian_kde": scipy,
    "scikit-learn KernelDensity, rtol 1e-4": sklearn,
    "KDEpy FFTKDE": fft,
}


def direct(samples, points, H):
    """The sum as it is written, in float64: (N, 2), (n, 2) -> (n,)."""
    H = H * np.eye(2) if np.ndim(H) == 0 else H
    a, b = (np.linalg.solve(H, x.numpy().T) for x in (points, samples))
    rows = []
    for part in np.array_split(a, max(1, a.shape[1] // 200), 1):
        u = (part[0][:, None] - b[0]) ** 2 + (part[1][:, None] - b[1]) ** 2
        rows.append(np.exp(-u / 2).mean(1))
    return np.concatenate(rows) / (2 * math.pi * abs(np.linalg.det(H)))


def error(values, reference):
    """The largest difference, in parts of the density's maximum."""
    return np.abs(values.ravel() - reference).max() / reference.max()


def on_the_grid(n, repeats):
    samples = TRUTH.sample(n, 0)
    grid = Grid.around(samples)
    rows = []
    for h in WIDTHS:
        reference = direct(samples, grid.points, h)
        contenders = {
            name: partial(run, samples, grid, h)
            for name, run in LIBRARIES.items()
        }
        seconds = rounds(contenders, repeats)
        rows += [
            {
                "h": h,
                "estimate": name,
                "CPU ms": spread(1e3 * seconds[name]),
                "÷ ours": "1" if name == OURS
                else spread(seconds[name] / seconds[OURS]),
                "largest error ÷ maximum": f"{error(run(), reference):.0e}",
            }
            for name, run in contenders.items()
        ]  # fmt: skip
    return markdown(rows)


def at_points(name, samples, points):
    if name == OURS:
        return GaussianKDE(samples, FULL).log_probability(points).exp()
    return ScipyKDE(samples.numpy(), FULL)(points.numpy().T)


def peak():
    """Most memory of this process so far, in MiB; Linux alone tells."""
    status = Path("/proc/self/status")
    text = status.read_text() if status.exists() else ""
    return int(re.search(r"VmHWM:\s+(\d+)|$", text)[1] or 0) / 1024


def large(n):
    """CPU seconds of n samples on a grid, and the MiB that they needed above
    what drawing them did."""
    samples = TRUTH.sample(n, 0)
    grid = Grid.around(samples)
    before = peak()
    seconds = cpu_seconds(lambda: ours(samples, grid, 0.5))
    return seconds, peak() - before


def report(quick):
    """The section on kernels, in Markdown."""
    n, repeats = (1000, 1) if quick else (N, REPEATS)
    many = 10_000 if quick else 1_000_000
    samples, points = TRUTH.sample(n, 0), TRUTH.sample(n, 1)
    names = OURS, "scipy gaussian_kde"
    full = rounds(
        {k: partial(at_points, k, samples, points) for k in names}, repeats
    )
    reference = direct(samples, points, FULL)
    wrong = [error(np.asarray(at_points(k, samples, points)), reference)
             for k in names]  # fmt: skip
    ladder = cpu_seconds(lambda: select_bandwidth(samples))
    with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
        seconds, mib = fresh.submit(large, many).result()
    return f"""## Kernel estimates

N = {n} samples of five Gaussians, from the samples to the density on 100 × 100
points; the error is measured against the direct sum in float64.

{on_the_grid(n, repeats)}

A full H at {n} scattered points: {OURS} {spread(full[OURS])} CPU s,
scipy {spread(full[names[1]])}, {spread(full[names[1]] / full[OURS])}
times as much; errors {wrong[0]:.0e} and {wrong[1]:.0e}. N = {many} on the
grid: {seconds:.2f} CPU s, and {mib:.0f} MiB more than drawing the samples.
`select_bandwidth` with 16 candidates: {ladder:.2f} CPU s, \
{ladder / (16 * n * n) * 1e9:.1f} ns a pair and candidate."""
