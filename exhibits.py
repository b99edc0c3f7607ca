"""Figures and tables that one notebook alone shows, a call each.

As in plots.py: given results they draw, and none of them trains.
"""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from matplotlib.patches import FancyBboxPatch

from helpers import (
    TRAINING,
    GaussianKDE,
    Grid,
    SplineCoupling,
    ToyDataset,
    random_generators,
)
from plots import (
    COLORS,
    DENSITY,
    _numpy,
    bare,
    color_bar,
    draw_fits,
    draw_groups,
    draw_layers,
    panels,
    plain_log,
    plot_curve,
    plot_density,
    plot_difference,
    plot_layers,
    plot_losses,
    plot_samples,
    save_figure,
)
from preparation import prepare
from study import (
    estimate,
    grid_entropy,
    holm_intervals,
    in_factors,
    kl_by_layer,
    kl_divergence,
    log_ratios,
    mean_interval,
)
from training import Recipe

# Kernel estimates (notebook 01)


def draw_bumps(points, widths, top=None):
    """A panel for each width: the bumps of numbers (n,), each of area 1 / n,
    and their sum. top: the end of the scale, if several figures share it."""
    fig, axes = panels(1, len(widths), 1.6, sharey=True)
    ends = points.min() - 1.5, points.max() + 1.5
    x = torch.linspace(*ends, 400, dtype=torch.float64)[:, None]
    for ax, h in zip(axes[0], widths, strict=True):
        kernels = [GaussianKDE(point.reshape(1, 1), h) for point in points]
        bumps = torch.stack([k.log_probability(x).exp() for k in kernels], 1)
        ax.plot(x, bumps / len(points), color="C0", lw=0.8)
        ax.plot(x, bumps.mean(1), color="k", lw=1.4)
        ax.plot(points, 0 * points, "o", color="C3", ms=4, clip_on=False)
        ax.set(title=f"h = {h:g}", xlabel="x", ylim=(0, top))
    axes[0, 0].set_ylabel("per unit of length")
    return fig


def draw_histograms(points, width, starts):
    """The same numbers (n,) in bins of one width, a panel for each start."""
    fig, axes = panels(1, len(starts), 1.5, sharex=True, sharey=True)
    for ax, start in zip(axes[0], starts, strict=True):
        count = int((points.max() - start) // width) + 2
        edges = start + width * np.arange(count)
        ax.hist(points, edges, density=True, color="C0", alpha=0.6, ec="w")
        ax.plot(points, 0 * points, "o", color="C3", ms=4, clip_on=False)
        ax.set(title=f"bins from {start:g}", xlabel="x")
    axes[0, 0].set_ylabel("per unit of length")
    return fig


def draw_estimates(truth, estimates, xlim):
    """A panel for each of {label: densities on a line}: all of them, their
    mean, and the truth; the bias, mean - truth, is shaded."""
    fig, axes = panels(1, len(estimates), 1.7, sharey=True)
    x = torch.linspace(*xlim, 300, dtype=torch.float64)
    exact = truth.log_probability(x[:, None]).exp()
    for ax, (label, of) in zip(axes[0], estimates.items(), strict=True):
        curves = torch.stack([f.log_probability(x[:, None]).exp() for f in of])
        ax.plot(x, curves.T, color="C0", lw=0.4, alpha=0.6)
        ax.plot([], [], color="C0", lw=0.8, label="estimates")
        ax.plot(x, curves.mean(0), color="C0", lw=1.8, label="their mean")
        ax.plot(x, exact, "k--", lw=1.1, label="truth")
        ax.fill_between(x, exact, curves.mean(0), color="C3", alpha=0.35,
                        lw=0, label="bias")  # fmt: skip
        ax.set(title=label, xlabel="x", ylim=(0, None))
    axes[0, 0].set_ylabel("per unit of length")
    handles = axes[0, 0].get_legend_handles_labels()
    fig.legend(*handles, loc="outside lower center", ncols=4)
    return fig


def draw_kernels(kdes, grid):
    """A panel for each of {label: GaussianKDE}, with its samples and, on the
    topmost of them, the outline of a kernel at one standard deviation."""
    fig, axes = panels(1, len(kdes), 1.8, width=2.0 * len(kdes))
    images = [kde.density(grid) for kde in kdes.values()]
    top = max(image.max() for image in images)
    turn = torch.linspace(0, 2 * np.pi, 100, dtype=torch.float64)
    circle = torch.stack([turn.cos(), turn.sin()])
    panel = zip(axes[0], kdes.items(), images, strict=True)
    for ax, (label, kde), image in panel:
        drawn = plot_density(ax, image, grid, top, label)
        plot_samples(ax, kde.samples, grid, "k", label, size=4)
        peak = kde.samples[kde.samples[:, 1].argmax()]
        ax.plot(*(peak[:, None] + kde.H @ circle), color="C3", lw=1.2)
    color_bar(fig, drawn, axes, "p(x)")
    return fig


def draw_comparison(truth, model, grid, top, label):
    """Truth, estimate and their difference, red where it is too high."""
    fig, axes = panels(1, 3, 1.8)
    exact, image = truth.density(grid), model.density(grid)
    plot_density(axes[0, 0], exact, grid, top, "truth")
    drawn = plot_density(axes[0, 1], image, grid, top, label)
    gap = plot_difference(axes[0, 2], image, exact, grid, top / 2,
                          "estimate − truth")  # fmt: skip
    bare(axes)
    color_bar(fig, drawn, axes[0, :2], "p(x)")
    color_bar(fig, gap, axes[0, 2:], "")
    return fig


def draw_by_h(
    curves, colors, lines=None, marks=None, ylabel="nats", ylim=None
):
    """A panel for each of {title: {label: {h: values (n,)}}}, on log scales:
    every seed's, their means and intervals. lines: {title: {label: {h: y}}};
    marks: {title: {label: h}}, drawn upright. colors: {label: color}."""
    fig, axes = panels(1, len(curves), 1.9, sharey=lines is not None)
    named = {}
    for ax, (title, of) in zip(axes[0], curves.items(), strict=True):
        for label, values in of.items():
            plot_curve(ax, values, colors[label], " " if lines else "-")
            named[label] = ax.plot([], [], "D", ms=3, color=colors[label])[0]
        for label, line in (lines or {title: {}})[title].items():
            xs, ys = list(line), list(line.values())
            named[label] = ax.plot(xs, ys, color=colors[label], lw=1.1)[0]
        for label, h in (marks or {title: {}})[title].items():
            named[label] = ax.axvline(h, color=colors[label], lw=1, ls="--")
        ax.set(xscale="log", yscale="log", xlabel="h", title=title)
        ax.set_xticks([0.1, 0.2, 0.5, 1], ["0.1", "0.2", "0.5", "1"])
        ax.minorticks_off()
        if ylim is None:
            plain_log(ax.yaxis)
        else:
            ax.set_ylim(ylim)
    axes[0, 0].set_ylabel(ylabel)
    fig.legend(named.values(), named, loc="outside lower center", ncols=4)
    return fig


def draw_bias_variance(measured, theory):
    """A panel for each of {title: {h: (bias^2 (n,), variance (n,))}}, a dot
    for every two samples; theory: {title: {h: (bias^2, variance)}}, lines."""
    names = {"bias²": "C3", "variance": "C0"}
    curves, lines = (
        {
            title: {
                label: {h: both[k] for h, both in by_h.items()}
                for k, label in enumerate(names)
            }
            for title, by_h in of.items()
        }
        for of in (measured, theory)
    )
    return draw_by_h(curves, names, lines, None, "over the plane", (1e-7, 1))


def draw_selection(ladder, costs, left_out):
    """KL, and leave-one-out with its sign turned and shifted to it, at the
    bandwidths of a ladder: {title: (k,)} each."""
    names = {"mean log f − LOO": "C0", "KL": "k", "leave-one-out": "C3"}
    curves, lines, marks = {}, {}, {}
    for title, values in left_out.items():
        steps = list(zip(ladder, _numpy(values), strict=True))
        curves[title] = {"mean log f − LOO": {h: [v] for h, v in steps}}
        lines[title] = {"KL": dict(zip(ladder, costs[title], strict=True))}
        best = min(steps, key=lambda step: step[1])[0]
        marks[title] = {"leave-one-out": best}
    return draw_by_h(curves, names, lines, marks)


# Notebook 02: maps, and the densities that they make


def plot_graph(ax, inverse=False):
    """The coupling layer as a computational graph, x to y; or its inverse,
    y to x."""
    source, target = "yx" if inverse else "xy"
    x1, x2 = 1.45, 2.75
    boxes = [(x1, "exp(s)", "×"), (x2, "t", "+")]
    if inverse:
        boxes = [(x1, "t", "−"), (x2, "exp(−s)", "×")]

    def node(x, y, text, width=0.42, color="white"):
        style = "round,pad=0,rounding_size=0.12"
        box = FancyBboxPatch(
            (x - width / 2, y - 0.17), width, 0.34, boxstyle=style,
            fc=color, ec="0.2", lw=0.8, zorder=3,
        )  # fmt: skip
        ax.add_patch(box)
        ax.text(x, y, text, ha="center", va="center", zorder=4)

    def arrow(start, end):
        style = {"arrowstyle": "-|>", "color": "0.2", "lw": 0.8}
        style |= {"shrinkA": 0, "shrinkB": 0, "mutation_scale": 8}
        ax.annotate("", end, start, arrowprops=style, zorder=2)

    pale, tint = "#e8f1f5", "#fdf0dd"
    for row, i in ((1.4, 1), (0.0, 2)):
        node(0, row, f"${source}_{i}$", color=pale)
        node(4.2, row, f"${target}_{i}$", color=pale)
    arrow((0.21, 1.4), (3.99, 1.4))
    for x, label, sign in boxes:
        node(x, 0.72, label, 0.85 if "exp" in label else 0.42, tint)
        node(x, 0, sign, width=0.34)
        arrow((x, 1.4), (x, 0.89))
        arrow((x, 0.55), (x, 0.17))
        ax.plot(x, 1.4, "o", ms=3, color="0.2")
    arrow((0.21, 0), (x1 - 0.17, 0))
    arrow((x1 + 0.17, 0), (x2 - 0.17, 0))
    arrow((x2 + 0.17, 0), (3.99, 0))
    ax.set(xlim=(-0.3, 4.5), ylim=(-0.3, 1.7), aspect="equal")
    ax.axis("off")
    name = r"$f^{-1}$: y to x" if inverse else "$f$: x to y"
    ax.set_title(name)


_EDGES = torch.special.ndtri(torch.arange(1, 8, dtype=torch.float64) / 8)
_HALVES = "affine", "spline"  # blue where z < 0, orange where z > 0


def _strips(ax, z, at, p):
    """A density over the points `at`, in eight strips, each an eighth of the
    Gaussian that they started from at z; darker and paler by turns."""
    z, at, p = _numpy(z), _numpy(at), _numpy(p)
    ax.plot(at, p, "k", lw=1)
    edges = [0, *np.searchsorted(z, _EDGES), len(z) - 1]
    for k, (low, high) in enumerate(zip(edges, edges[1:], strict=False)):
        part, shade = slice(low, high + 1), COLORS[_HALVES[k // 4]]
        ax.fill_between(at[part], p[part], color=shade, lw=0,
                        alpha=0.6 if k % 2 else 0.3)  # fmt: skip


def draw_map(z, x, p):
    """An increasing map of the line, points z (n,) to x (n,), above the
    density p (n,) of z; its slope above the density of x. The lines lead the
    edges of the strips from z to x."""
    slope = _numpy(torch.gradient(x)[0] / torch.gradient(z)[0])
    p, (fig, axes) = _numpy(p), panels(2, 2, 1.3)
    (above, steep), (before, after) = axes
    ends = np.interp(_EDGES, z, x)
    above.plot(z, x, "k", lw=1.2)
    above.vlines(_EDGES, -3, ends, color="0.7", lw=0.6)
    above.hlines(ends, _EDGES, 3, color="0.7", lw=0.6)
    above.set(title="the map", ylabel="$x = f(z)$", ylim=(-3, 3))
    steep.plot(x, slope, "k", lw=1.2)
    steep.axhline(1, color="0.7", lw=0.6)
    steep.set(title="its slope, at the point that lands on $x$",
              ylabel="$f\'(z)$", yscale="log")  # fmt: skip
    plain_log(steep.yaxis)
    steep.text(0.35, slope.max() / 1.6, "steep: thins", fontsize=7)
    steep.text(2.9, 1.15, "flat: piles up", fontsize=7, ha="right")
    _strips(before, z, z, p)
    _strips(after, z, x, p / slope)
    before.set(title="density before", xlabel="$z$", ylabel="density")
    after.set(title="density after", xlabel="$x$")
    for ax in axes.flat:
        ax.set_xlim(-3, 3)
    for ax in axes[1]:
        ax.set_ylim(0, 1.1 * max(p.max(), (p / slope).max()))
    return fig


def draw_steps(steps, log_p):
    """The density after 0, 1, ..., K maps of the line: points and log-
    densities, K + 1 of each (n,), the first a Gaussian's."""
    fig, axes = panels(1, len(steps), 1.4, sharex=True, sharey=True)
    for k, (ax, z, log) in enumerate(zip(axes[0], steps, log_p, strict=True)):
        _strips(ax, steps[0], z, log.exp())
        ax.set(xlim=(-3, 3), xlabel=f"$z^{{({k})}}$")
        ax.set_title(f"after $f_{{{k}}}$" if k else "Gaussian")
    axes[0, 0].set_ylabel("density")
    axes[0, 0].set_ylim(0)
    return fig


def draw_boxes(f, boxes, side=0.4):
    """The plane of z under N(0, I), and its image under f, points (n, 2) ->
    images and log-determinants: densities on one scale, a square grid, and
    boxes, each known by its centre, with the factor of its area."""
    fig, axes = panels(1, 2, 2.0)
    edge = torch.linspace(-3, 3, 97, dtype=torch.float64)
    plane = torch.cartesian_prod(edge, edge)
    x, log_det = f(plane)
    p = (-plane.square().sum(1) / 2).exp() / (2 * np.pi)
    images = (plane, p, "before"), (x, p / log_det.exp(), "after")
    top = max(values.max() for _, values, _ in images)
    turn = torch.tensor([[-1, -1], [1, -1], [1, 1], [-1, 1], [-1, -1]])
    for ax, (at, values, title) in zip(axes[0], images, strict=True):
        at = _numpy(at).reshape(97, 97, 2)
        drawn = ax.pcolormesh(
            *at.transpose(2, 0, 1), _numpy(values).reshape(97, 97),
            shading="gouraud", cmap=DENSITY, vmin=0, vmax=top, rasterized=True,
        )  # fmt: skip
        for net in (at[::16], at[:, ::16].swapaxes(0, 1)):
            ax.plot(*net.transpose(2, 1, 0), color="0.6", lw=0.3)
        ax.set(xlim=(-3, 3), ylim=(-3, 3), title=title, aspect="equal")
    for center in torch.as_tensor(boxes, dtype=torch.float64):
        share = torch.linspace(0, 1, 50, dtype=torch.float64)[:, None]
        corners = center + side / 2 * turn
        ways = corners.diff(dim=0)[:, None]
        rim = (corners[:-1, None] + share * ways).flatten(0, 1)
        factor = f(center[None])[1].exp().item()
        for ax, at in zip(axes[0], (rim, f(rim)[0]), strict=True):
            ax.plot(*at.T, color="C3", lw=1.2)
        ax.text(at[:, 0].max() + 0.12, at[:, 1].mean(), f"× {factor:.2f}",
                fontsize=7, bbox={"fc": "w", "ec": "w", "pad": 1})  # fmt: skip
    axes[0, 0].set(xlabel="$z_1$", ylabel="$z_2$")
    axes[0, 1].set(xlabel="$x_1$", ylabel="$x_2$")
    color_bar(fig, drawn, axes[0], "density, per unit of area")
    return fig


def draw_graphs():
    """The coupling layer and its inverse as computational graphs."""
    fig, axes = panels(1, 2, 1.6)
    plot_graph(axes[0, 0])
    plot_graph(axes[0, 1], inverse=True)
    return fig


# Training flows


def table(rows):
    """{row: {column: value}} -> DataFrame."""
    return pd.DataFrame.from_dict(rows, orient="index")


def draw_trainings(truth, trainings, held_out=150):
    """draw_fits of single flows, {label: TrainingResult or (flow, losses)}:
    losses (epochs, N), of which the first so many points are held out."""
    fits = {}
    for label, own in trainings.items():
        if isinstance(own, tuple):
            flow, losses = own
            own = SimpleNamespace(
                flow=flow, train_losses=losses[:, held_out:].mean(1),
                valid_losses=losses[:, :held_out].mean(1),
                used_epoch=len(losses) - 1,
            )  # fmt: skip
        fits[label] = SimpleNamespace(truth=truth, flow=own.flow, result=own)
    return draw_fits(fits)


def draw_fit(label, fit):
    """draw_fits of one, without its legend."""
    fig = draw_fits({label: fit})
    fig.legends[0].remove()
    return fig


def table_of_loops(truth, runs, n=50_000):
    """Of [(flow, points, rows that were held out, their loss by epoch)]: the
    flow's losses, the largest jump in the second half, and the KL, with and
    without its worst thousandth."""
    rows = {}
    for seed, (flow, x, held_out, course) in enumerate(runs):
        losses = -flow.log_probability(x).detach()
        fitted = torch.ones(len(x)).bool()
        fitted[held_out] = False
        ratio = log_ratios(truth, flow, n, 0).sort().values
        late = course[len(course) // 2 :]
        rows[f"seed {seed}"] = {
            "training loss": losses[fitted].mean().item(),
            "held-out loss": losses[~fitted].mean().item(),
            "its largest jump": late.diff().max().item(),
            "KL": ratio.mean().item(),
            "without the worst 0.1 %": ratio[: -n // 1000].mean().item(),
        }
    return table(rows)


def draw_path(path, flow):
    """A path of points, layer by layer, over the grid that is carried
    along."""
    around = Grid.around(torch.cat(path).clamp(-5, 5), margin=0)
    fig, axes = panels(1, len(path), min(2.0, 6.3 / len(path) + 0.25))
    plot_layers(axes[0], flow, path, around)
    bare(axes)
    return fig


def kl_on_own_points(fit):
    """Of every seed of a Fit, the mean of log truth / flow where the flow
    was fitted: -> (S,)."""
    setting = fit.runs.iloc[0]
    data = torch.stack([
        ToyDataset(fit.truth, int(setting.num_samples), seed).data
        for seed in fit.runs.seed
    ])  # fmt: skip
    log_p = torch.stack([fit.truth.log_probability(x) for x in data])
    ratio = log_p - fit.result.flow.log_probability(data).detach()
    own = ratio.scatter(1, fit.result.held_out, torch.nan)
    return own.nanmean(1).numpy()


def table_of_fits(fits):
    """Entropy, held-out loss, KL, and how far it exceeds that of the points
    that were fitted, of {label: Fit}."""
    gap = {k: fit.kl - kl_on_own_points(fit) for k, fit in fits.items()}
    told, rows = holm_intervals(gap), {}
    for label, fit in fits.items():
        losses, used = fit.result.valid_losses, fit.result.used_epoch
        rows[label] = {
            "entropy": grid_entropy(fit.truth),
            "held-out loss": losses.gather(0, used[None]).mean().item(),
            "KL": str(mean_interval(fit.kl)),
            "worst KL": fit.kl.max(),
            "KL − that of own points": str(told[label]),
        }
    return table(rows)


def table_of_seas(fits, sea=0.05):
    """How much mass of each Fit's flow is in the wrong place; and how much
    of it, and of the truth's, where the truth is below `sea` of its peak."""
    rows = {}
    for label, fit in fits.items():
        grid = Grid.around(fit.truth.sample(5000), 150, 0.3)
        exact, image = (
            of.density(grid) * grid.cell_area for of in (fit.truth, fit.flow)
        )
        land = exact >= sea * exact.max()
        shares = {
            "mass in the wrong place": (image - exact).abs().sum() / 2,
            "flow's mass at sea": 1 - image[land].sum(),
            "truth's mass at sea": 1 - exact[land].sum(),
        }
        rows[label] = {name: f"{share:.1%}" for name, share in shares.items()}
    return table(rows)


def printed_excess(fit):
    """The lowest held-out loss of every seed, less the entropy: (S,)."""
    return fit.runs.valid_loss.to_numpy() - grid_entropy(fit.truth)


def draw_printed(fits, colors=("C7", "C3", "C0"), most=1.0):
    """The losses of the first of {label: Fit}; and of every run of all what
    it printed against the KL of what it returned, clipped at `most`. On the
    dotted line both are equal."""
    fig, axes = panels(1, 2, 2.0)
    first, ax = next(iter(fits.values())), axes[0, 1]
    plot_losses(axes[0, 0], first.result, grid_entropy(first.truth), "losses")
    for (label, fit), shade in zip(fits.items(), colors, strict=True):
        x, kl = printed_excess(fit), fit.kl.clip(max=most)
        ax.plot(x, kl, "o", ms=4, mew=0, alpha=0.7, color=shade, label=label)
    ax.axline((0, 0), slope=1, color="k", lw=0.8, ls=":")
    ax.set(xlabel="printed: lowest held-out loss − entropy, nats",
           ylabel="returned: KL, nats", ylim=(0, None))  # fmt: skip
    handles = [h for a in axes[0] for h in a.get_legend_handles_labels()[0]]
    fig.legend(handles=handles, loc="outside lower center", ncols=4)
    return fig


def table_of_printed(fits):
    """What runs printed and what they returned: medians and extremes."""
    rows = {}
    for label, fit in fits.items():
        printed = printed_excess(fit)
        rows[label] = {
            "printed − entropy, median": np.median(printed),
            "KL, median": np.median(fit.kl),
            "printed − entropy, lowest": printed.min(),
            "KL of that run": f"{fit.kl[printed.argmin()]:.3g}",
            "worst KL": f"{fit.kl.max():.3g}",
        }
    return table(rows)


def geometric_mean(fit):
    """Of the KL as Fit.log_kl counts it, as text, in nats."""
    sign = "≥ " if fit.kl.max() > 1 else ""
    return f"{sign}{np.exp(fit.log_kl().mean()):.3f}"


def table_of_recipes(fits):
    """KL of {label: Fit}, and against the first one's, paired by seed and
    read together (Holm)."""
    logs = {label: fit.log_kl() for label, fit in fits.items()}
    first, *others = logs
    told = holm_intervals({k: logs[first] - logs[k] for k in others})
    return table({
        label: {
            "geometric mean": geometric_mean(fit),
            "median": np.median(fit.kl),
            "worst seed": f"{fit.kl.max():.3g}",
            f"than {first}": in_factors(told[label]) if label in told else "",
        }
        for label, fit in fits.items()
    })  # fmt: skip


def draw_recipes(fits):
    """Every seed's KL, counted as Fit.log_kl does, of {label: Fit}."""
    values, shades = {}, {}
    for label, fit in fits.items():
        name, kind = label.replace(" ", "\n"), label.split(" ")[0]
        values[name] = np.exp(fit.log_kl())
        shades[name] = {"ours": COLORS["affine"], "without": "C2"}.get(
            kind, COLORS["course"]
        )
    return draw_groups(values, colors=shades, height=2.0)


def targets(fit, n):
    """Of every seed of a Fit on n points, trained by the recipe as it is,
    the kernel estimate that its flow was fitted to."""
    S = fit.result.flow.members
    sets = [ToyDataset(fit.truth, n, seed).data.double() for seed in range(S)]
    generators = random_generators(0, S, TRAINING)
    flow, found = prepare(fit.result.flow, sets, Recipe(), generators)
    assert torch.equal(found.held_out, fit.result.held_out)
    centres, _ = flow.outermost.forward(found.centres)
    noise = fit.result.noise.double()
    return [
        GaussianKDE(x.double(), torch.diag(h))
        for x, h in zip(centres, noise, strict=True)
    ]


def table_of_misses(fits, aims, n=10_000):
    """What flows miss of their targets, mean log target / flow over points
    of the target and over points of the truth: {label: Fit}, {label: a
    target a seed}."""
    rows = {}
    for label, fit in fits.items():
        sides = [
            (kl_divergence(aim, fit.result.flow.member(i), n).value,
             fit.kl[i] - kl_divergence(fit.truth, aim, n).value)
            for i, aim in enumerate(aims[label])
        ]  # fmt: skip
        names = "seen from the target", "seen from the truth"
        rows[label] = dict(zip(names, np.mean(sides, 0), strict=True))
    return table(rows)


def print_check(name, values, expected):
    """Whether the mean of values (n,) is expected, to 4 standard errors."""
    mean, error = estimate(values.flatten().double())
    print(f"{name}: {mean:.3f} on points, {float(expected):.3f} on a grid")
    agree = bool(abs(mean - float(expected)) < 4 * error)
    print("equal within 4 standard errors:", agree)
    assert agree


# Depth, size, complexity (notebook 04)


def draw_spline(outputs):
    """What a spline coupling makes of a coordinate, given the network's
    outputs (3 bins - 1,) for one point: the whole curve with its knots, and
    its widest piece with the slopes that a formula names."""
    spline = SplineCoupling(bins=(len(outputs) + 1) // 3)
    ends, bins = spline.interval, spline.bins
    x = torch.linspace(-1.2 * ends, 1.2 * ends, 601)
    y, _ = spline.forward(x[:, None], outputs.expand(len(x), -1))
    widths, heights, _ = outputs.split([bins, bins, bins - 1])
    xs, ys = (ends * spline.knots(part) for part in (widths, heights))
    k = int(xs[1:-1].diff().argmax()) + 1
    (x0, x1), (y0, y1) = xs[k : k + 2].tolist(), ys[k : k + 2].tolist()
    unit = torch.tensor([(x0 + x1) / 2 / ends])
    *_, d0, d1 = spline.piece(unit, outputs[None], inverse=False)
    w, r = x1 - x0, (y1 - y0) / (x1 - x0)
    fig, axes = panels(1, 2, 2.1, width=5)
    for ax in axes[0]:
        ax.plot(x, y[:, 0], color=COLORS["spline"])
        ax.plot(xs, ys, "o", ms=3, color=COLORS["spline"])
        ax.set_xlabel("the coordinate before")
    axes[0, 0].plot(x, x, ":", color="0.5", lw=0.8)
    axes[0, 0].axvspan(x0, x1, color="0.9")
    axes[0, 0].set_ylabel("after")
    axes[0, 0].set_title(f"{bins} pieces")
    piece = axes[0, 1]
    piece.plot([x0, x1], [y0, y1], "--", color="0.5", lw=0.8)
    for at, height, slope in ((x0, y0, d0.item()), (x1, y1, d1.item())):
        step = np.array([-w / 4, w / 4])
        piece.plot(at + step, height + slope * step, color="k", lw=1)
    for text, at in (
        ("$d_0$", (x0, y0)),
        ("$d_1$", (x1, y1)),
        ("$r$", ((x0 + x1) / 2, (y0 + y1) / 2)),
    ):
        piece.annotate(text, at, (6, -10), textcoords="offset points")
    piece.set(xlim=(x0 - w / 3, x1 + w / 3), title="the grey one",
              ylim=(y0 - r * w / 3, y1 + r * w / 3))  # fmt: skip
    return fig


def show_task(name, fits):
    """draw_fits and draw_layers of {label: Fit}, as figures name_density and
    name_layers, with their captions."""
    save_figure(
        draw_fits(fits), f"{name}_density", "Losses of all seeds (thin), "
        "their median, and the epochs used; truth, flow of the middle seed, "
        "and their difference (red: too much).",
    )  # fmt: skip
    flows = {label: fit.flow for label, fit in fits.items()}
    kls = {
        label: kl_by_layer(fit.truth, fit.flow) for label, fit in fits.items()
    }
    save_figure(
        draw_layers(flows, kls), f"{name}_layers", "Above, samples of the "
        "prior and after every layer, coloured by their start; below, the "
        "density. KL from the truth, in nats.",
    )  # fmt: skip


def mass_in_the_seas(fit):
    """Of every seed's flow, the mass further than 4 sigma from every mean of
    the truth, whose own is about exp(-8): -> (S,)."""
    x = fit.result.flow.sample(20_000, seed=3).cpu().double()
    away = torch.cdist(x, fit.truth.means).amin(-1)
    return (away > 4 * fit.truth.sigma).double().mean(-1).numpy()
