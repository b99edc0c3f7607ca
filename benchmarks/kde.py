"""Kernel estimates of five Gaussians on a grid of 100 x 100 points."""

import contextlib
import json
import math
import os
import resource
import subprocess
import sys
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


def on_the_grid(n, repeats, log):
    samples = TRUTH.sample(n, 0)
    grid = Grid.around(samples)
    rows = []
    for h in WIDTHS:
        log(f"KDE, h = {h}")
        reference = direct(samples, grid.points, h)

        def contender(run, h=h):
            return lambda: cpu_seconds(lambda: run(samples, grid, h))

        seconds = rounds(
            {name: contender(run) for name, run in LIBRARIES.items()}, repeats
        )
        for name, run in LIBRARIES.items():
            wrong = error(run(samples, grid, h), reference)
            rows.append({
                "h": h,
                "estimate": name,
                "CPU ms": spread(seconds[name], 1e3),
                "÷ ours": "1"
                if name == OURS
                else spread(seconds[name] / seconds[OURS]),
                "largest error ÷ maximum": f"{wrong:.0e}",
            })  # fmt: skip
    return markdown(rows)


def _peak():
    """Most memory so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss also counts what the parent had
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _scattered(name, samples, points):
    if name == OURS:
        return GaussianKDE(samples, FULL).log_probability(points).exp()
    return ScipyKDE(samples.numpy(), FULL)(points.numpy().T)


def _job(name, n, scattered):
    """CPU seconds, and bytes above those held before the first call."""
    torch.set_num_threads(1)
    samples = TRUTH.sample(n, 0)
    points, grid = TRUTH.sample(N, 1), Grid.around(samples)

    def run(samples):
        if scattered:
            return _scattered(name, samples, points)
        return LIBRARIES[name](samples, grid, 0.5)

    run(samples[:100])
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # forget the old peak
    before = _peak()
    seconds = cpu_seconds(lambda: run(samples))
    return {"seconds": seconds, "bytes": _peak() - before}


def job(name, n, scattered=False):
    """_job in a process of its own, whose peak nothing else can raise."""
    threads = dict.fromkeys(
        ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"
    )
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, __file__, json.dumps([name, n, scattered])],
        env={**os.environ, **threads, "PYTHONPATH": path},
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return json.loads(done.stdout)


def memory(n_large, n_small, quick, log):
    """What takes long or much, once each, in a process of its own."""
    scattered = f"{N} scattered points, full H"
    rows = []
    for task, name, n in (
        ("grid, h = 0.5", OURS, n_large),
        (scattered, OURS, n_small),
        (scattered, "scipy gaussian_kde", n_small),
    )[: 1 if quick else None]:
        log(f"memory, {task}, N = {n}, {name}")
        cost = job(name, n, task == scattered)
        rows.append({
            "task": task, "N": n, "estimate": name,
            "CPU s": f"{cost['seconds']:.2f}",
            "peak MiB": f"{cost['bytes'] / 2**20:.0f}",
        })  # fmt: skip
    return markdown(rows)


def at_points(n, repeats, log):
    """Full H at scattered points, against scipy, as a sentence."""
    log("KDE, full H")
    samples, points = TRUTH.sample(n, 0), TRUTH.sample(n, 1)
    reference = direct(samples, points, FULL)

    def contender(name):
        return lambda: cpu_seconds(lambda: _scattered(name, samples, points))

    names = OURS, "scipy gaussian_kde"
    seconds = rounds({name: contender(name) for name in names}, repeats)
    wrong = [
        error(np.asarray(_scattered(name, samples, points)), reference)
        for name in names
    ]
    ratio = seconds[names[1]] / seconds[OURS]
    return (
        f"A full H at {n} scattered points, N = {n}: {OURS} "
        f"{spread(seconds[OURS])} s, scipy {spread(seconds[names[1]])} s, "
        f"{spread(ratio)} times as much; errors {wrong[0]:.0e} and "
        f"{wrong[1]:.0e}."
    )


def bandwidth(n, log):
    log(f"select_bandwidth, N = {n}")
    samples = TRUTH.sample(n, 0)
    seconds = cpu_seconds(lambda: select_bandwidth(samples))
    return (
        f"`select_bandwidth` at N = {n}, 16 candidates: {seconds:.1f} CPU s, "
        f"{seconds / (16 * n * n) * 1e9:.1f} ns a pair and candidate."
    )


def report(quick, log):
    """The section on kernels, in Markdown."""
    n, repeats = (1000, 1) if quick else (N, REPEATS)
    large = 10_000 if quick else 1_000_000
    return "\n\n".join([
        f"## Kernel estimates\n\nN = {n} samples of five Gaussians, from "
        "the samples to the density on 100 × 100 points; the error is "
        "measured against the direct sum in float64.",
        on_the_grid(n, repeats, log),
        "Memory above what was held before, in a process of its own:",
        memory(large, n, quick, log),
        at_points(n, repeats, log),
        bandwidth(n, log),
    ])  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(_job(*json.loads(sys.argv[1]))))
