"""How the cost grows: a figure of three panels."""

import io
from pathlib import Path

import fits
import kde
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator
from timing import cpu_seconds, write

from helpers import Grid
from plots import COLORS, panels, set_theme

SAMPLES = [10**3, 10**4, 10**5, 10**6]
MEMBERS = [1, 2, 4, 8, 16, 32, 64]
LAYERS = [1, 2, 4, 8, 16]


def _kde_seconds(run, n):
    samples = kde.TRUTH.sample(n, 0)
    grid = Grid.around(samples)
    repeats = 5 if n <= 10_000 else 1
    run(samples[:100], grid, 0.5)
    return np.median([
        cpu_seconds(lambda: run(samples, grid, 0.5)) for _ in range(repeats)
    ])  # fmt: skip


def _epoch_ms(coupling, members=8, layers=fits.K):
    epochs = max(4, 16 // members)  # the first one costs more
    seconds = [
        fits.train_ours(
            coupling, members, epochs, 0, layers, jitter=0
        )[1]
        for _ in range(3)
    ]  # fmt: skip
    return 1e3 * np.median(seconds) / epochs


def _line(ax, values, color, label, marker="o"):
    xs, ys = list(values), list(values.values())
    ax.plot(xs, ys, marker + "-", ms=3, lw=1, color=color, label=label)


def _proportional(ax):
    """A dotted line of slope one through the end of the first line."""
    xs, ys = ax.lines[0].get_xydata().T
    style = {"color": "0.6", "lw": 0.8, "zorder": 0, "label": "proportional"}
    ax.plot(xs, ys[-1] * xs / xs[-1], ":", **style)


def _log_scales(ax):
    ax.set(xscale="log", yscale="log")
    ax.minorticks_off()


def draw(kernels, members, layers):
    """Each: {label: {size: CPU time}}. -> figure"""
    set_theme()
    fig, axes = panels(1, 3, height=2.1)
    colors = {"this repository": COLORS["truth"], "scipy": COLORS["course"]}
    for label, values in kernels.items():
        _line(axes[0, 0], values, colors[label], label)
    for ax, lines in zip(axes[0, 1:], (members, layers), strict=True):
        for label, values in lines.items():
            _line(ax, values, COLORS[label], label)
        ax.set_ylabel("CPU ms an epoch")
    axes[0, 0].set(
        xlabel="samples N", ylabel="CPU s",
        title="kernel estimate, 100 × 100",
    )  # fmt: skip
    axes[0, 1].set(xlabel="members", title=f"training, K = {fits.K}")
    axes[0, 2].set(xlabel="layers K", title="training, 8 members")
    for ax in axes[0]:
        _proportional(ax)
        _log_scales(ax)
    for ax, lines in zip(axes[0, 1:], (members, layers), strict=True):
        sizes = list(next(iter(lines.values())))
        ax.set_xticks(sizes, sizes)
        ax.minorticks_off()
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        ax.yaxis.set_major_formatter("{x:g}")
    for ax in axes[0]:
        ax.legend(loc="best", fontsize=6)
    return fig


def measure(quick, log):
    samples = SAMPLES[:2] if quick else SAMPLES
    kernels = {"this repository": kde.ours, "scipy": kde.scipy}
    times = {label: {} for label in kernels}
    for label, run in kernels.items():
        for n in samples[: None if run is kde.ours else 3]:
            log(f"growth, {label}, N = {n}")
            times[label][n] = _kde_seconds(run, n)
    by_members, by_layers = {}, {}
    for coupling in ("affine", "spline"):
        log(f"growth, {coupling}, members and layers")
        by_members[coupling] = {
            s: _epoch_ms(coupling, members=s)
            for s in (MEMBERS[:2] if quick else MEMBERS)
        }
        by_layers[coupling] = {
            k: _epoch_ms(coupling, layers=k)
            for k in (LAYERS[:2] if quick else LAYERS)
        }
    return times, by_members, by_layers


def report(quick, log):
    """The section on growth, in Markdown; draws the figure."""
    times = measure(quick, log)
    fig = draw(*times)
    text = io.StringIO()
    fig.savefig(text, format="svg", metadata={"Date": None})
    plt.close(fig)
    if not quick:
        folder = Path(__file__).resolve().parents[1] / "figures"
        folder.mkdir(exist_ok=True)
        write(folder / "benchmark_growth.svg", text.getvalue())
    by_members = times[1]["affine"]
    sizes = list(by_members)
    shares = [by_members[s] / s for s in (sizes[0], sizes[-1])]
    return (
        "## Growth\n\n![CPU time against samples, members and layers]"
        "(../figures/benchmark_growth.svg)\n\nOne affine member's epoch "
        f"takes {shares[0]:.1f} CPU ms alone and {shares[1]:.1f} among "
        f"{sizes[-1]}."
    )
