"""Figures: one look for the whole report, a panel or a figure a call.

`plot_...` draws on an axis that it is given, `draw_...` makes a whole figure
of densities, flows or values; none of them trains. `save_figure` shows a
figure with its number and caption, and keeps a vector copy of it. What one
notebook alone shows is drawn in exhibits.py.
"""

import ast
import base64
import hashlib
import inspect
import io
import os
import re
import textwrap
import warnings
from importlib.util import find_spec
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import PIL.Image
import seaborn as sns
import torch
from IPython import get_ipython
from IPython.display import Image, Markdown, display

from checks import brief
from helpers import Grid
from study import first_layers, grid_entropy, mean_interval
from training import inner

WIDTH = 6.3  # inches: the printed column, so that a point is a point
DENSITY = sns.color_palette("mako_r", as_cmap=True)
DIVERGING = sns.color_palette("vlag", as_cmap=True)
_BLIND = sns.color_palette("colorblind").as_hex()
COLORS = {
    "Circles": _BLIND[0], "Moons": _BLIND[1], "GaussiansGrid": _BLIND[2],
    "GaussiansRot": _BLIND[4],
    "narrow mixture": _BLIND[2], "wide mixture": _BLIND[9],
    "spiral": _BLIND[3],
    "one h": _BLIND[2], "sharpened": _BLIND[4],
    "local width": _BLIND[7], "shape of the covariance": _BLIND[5],
    "affine": _BLIND[0], "spline": _BLIND[1], "course": _BLIND[7],
}  # fmt: skip


def set_theme():
    """The report's look, and three decimals in tables."""
    sns.set_theme("paper", "ticks", "colorblind", font_scale=0.85)
    plt.rcParams.update({
        "axes.grid": False, "axes.spines.top": False,
        "axes.spines.right": False, "axes.titlesize": 8,
        "axes.linewidth": 0.6, "xtick.major.width": 0.6,
        "ytick.major.width": 0.6, "xtick.major.size": 3,
        "ytick.major.size": 3, "legend.frameon": False,
        "figure.constrained_layout.use": True, "figure.dpi": 130,
        "figure.max_open_warning": 0,
        "savefig.dpi": 200, "svg.hashsalt": "figures",
        "axes.formatter.limits": (-3, 4),
    })  # fmt: skip
    pd.options.display.float_format = "{:.3f}".format
    pd.options.display.max_columns = 30
    if shell := get_ipython():  # tables that the report can read
        markdown = shell.display_formatter.formatters["text/markdown"]
        markdown.for_type(pd.DataFrame, pipe_table)


def pipe_table(table):
    """A DataFrame as Markdown: its index unless it counts, numbers to three
    decimals and to the right."""
    if not isinstance(table.index, pd.RangeIndex):
        names = [name or "" for name in table.index.names]
        table = table.reset_index(names=names)
    form = pd.options.display.float_format

    def text(value):  # as one cell of one row
        return str(value).replace("|", r"\|").replace("\n", " ")

    numbers = [pd.api.types.is_numeric_dtype(kind) for kind in table.dtypes]
    rows = [
        [form(v) if isinstance(v, float) else text(v) for v in row]
        for row in table.itertuples(index=False)
    ]
    heads = [
        text(" ".join(map(str, head)) if isinstance(head, tuple) else head)
        for head in table.columns
    ]
    rules = ["--:" if number else ":--" for number in numbers]
    lines = [heads, rules, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def panels(rows=1, cols=1, height=2.0, width=WIDTH, **options):
    """A figure as wide as the printed column, `height` inches a row: ->
    figure, array of axes (rows, cols)."""
    size = (width, rows * height)
    return plt.subplots(rows, cols, figsize=size, squeeze=False, **options)


def _numpy(values):
    return torch.as_tensor(values).detach().cpu().numpy()


def _limits(ax, grid, title):
    ax.set(aspect="equal", xlim=grid.xlim, ylim=grid.ylim, title=title)


def plot_samples(ax, x, grid, color, title=None, size=1.5):
    """Points (n, 2), on the limits of a Grid. color: one, or one a point."""
    x = _numpy(x)
    ax.scatter(*x.T, s=size, c=color, linewidths=0, alpha=0.7, rasterized=True)
    _limits(ax, grid, title)


def plot_density(ax, image, grid, vmax=None, title=None, **options):
    """Values (size, size) on a Grid as a picture: -> what a colour bar
    needs. vmax: the end of the colour scale, shared by compared panels."""
    options = {"cmap": DENSITY, "vmin": 0, "vmax": vmax} | options
    image = ax.imshow(
        _numpy(image), origin="lower", extent=grid.extent, **options
    )
    _limits(ax, grid, title)
    return image


def plot_difference(ax, image, exact, grid, vmax, title=None):
    """image - exact on a Grid, signed: red where it is too high."""
    gap = _numpy(image) - _numpy(exact)
    options = {"cmap": DIVERGING, "vmin": -vmax}
    return plot_density(ax, gap, grid, vmax, title, **options)


def bare(axes):
    """Takes ticks and frame from pictures whose axes say nothing new."""
    for ax in np.ravel(axes):
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)


def plain_log(axis):
    """Plain numbers at 1, 2 and 5 times the powers of ten."""
    axis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
    axis.set_minor_formatter(mpl.ticker.NullFormatter())


def color_bar(fig, image, axes, label):
    """One bar for all the axes."""
    bar = fig.colorbar(image, ax=axes, label=label, fraction=0.05, pad=0.02)
    bar.outline.set_visible(False)


def plot_losses(ax, result, entropy, title=None):
    """Every member's losses by epoch, their median, a dot at each epoch whose
    weights are used, and the entropy of the truth: on fresh points no
    density has a lower mean."""
    kinds = [("training", result.train_losses, "C7")]
    kinds += [("held out", result.valid_losses, "C0")]
    for label, losses, color in kinds:
        losses = _numpy(losses).reshape(len(losses), -1).astype(float)
        losses = np.nan_to_num(losses, nan=99, posinf=99).clip(max=99)
        ax.plot(losses, color=color, lw=0.3, alpha=0.4)
        ax.plot(np.median(losses, 1), color=color, lw=1.2, label=label)
    used = np.atleast_1d(_numpy(result.used_epoch))
    there = np.take_along_axis(losses, used[None], 0)[0]
    ax.plot(used, there, "o", ms=2.5, color="C3", label="epoch used")
    ax.axhline(entropy, color="k", lw=0.8, ls=":", label="entropy")
    top = max(entropy + 1.2, np.median(losses[-1]) + 0.2)
    ax.set(xlabel="epoch", ylabel="nats per point", title=title)
    ax.set_ylim(min(entropy, losses.min()) - 0.15, top)


def origin_colors(z):
    """A colour for each point of the prior: hue by angle, paler near 0."""
    z = _numpy(z)
    hue = np.arctan2(z[:, 1], z[:, 0]) / (2 * np.pi) % 1
    strength = np.clip(np.hypot(*z.T) / 1.5, 0.15, 1)
    return mpl.colors.hsv_to_rgb(np.stack([hue, strength, 0 * hue + 0.8], 1))


@torch.no_grad()
def plot_layers(axes, flow, path, grid):
    """One panel a layer: points colored by where they started, over the
    images of a square grid in z. path: path_of(flow, n)."""
    ticks, fine = torch.linspace(-3, 3, 13), torch.linspace(-3, 3, 200)
    upright = torch.cartesian_prod(ticks, fine)
    net = torch.cat([upright, upright.flip(1)])
    net = net.to(next(flow.parameters(), net))
    colors = origin_colors(path[0])
    for k, (ax, x) in enumerate(zip(axes, path, strict=True)):
        if k > 0:
            net, _ = flow.layers[k - 1](net)
        curves = _numpy(net).reshape(26, 200, 2)
        ax.plot(*curves.transpose(2, 1, 0), color="0.75", lw=0.3, zorder=0)
        title = "prior" if k == 0 else f"after layer {k}"
        plot_samples(ax, x, grid, colors, title)


def path_of(flow, n=1000):
    """A sample of the prior and its images after every layer, all in the
    unit in which the layers work: K + 1 tensors (n, 2)."""
    *path, x = flow.sample_x_each_layer(n, seed=1)
    return [*path, flow.outermost.inverse(x)[0]]


def plot_seeds(ax, x, values, color="C0", spread=0.0, beside=0.0):
    """Every seed's value at x, side by side over `spread`; at x + beside
    their mean and its 95 % interval of Student's t."""
    values = np.asarray(values, dtype=float)
    mean, low, high = mean_interval(values)
    at = x + spread * np.linspace(-0.5, 0.5, len(values))
    ax.plot(at, values, "o", ms=2.5, color=color, alpha=0.4, mew=0)
    if len(values) > 1:
        ax.vlines(x + beside, low, high, color=color, lw=1.2)
    ax.plot(x + beside, mean, "D", ms=3.5, color=color)
    return mean


def plot_curve(ax, values, color, style="-"):
    """Values (n,) against numbers, {x: values}, with a line through their
    means."""
    means = [plot_seeds(ax, x, v, color) for x, v in values.items()]
    ax.plot(list(values), means, style, lw=1, color=color)


# Whole figures


def draw_samples(samples, size=1.5):
    """A panel for each of {name: points (n, 2)}, on its own limits."""
    fig, axes = panels(1, len(samples), 5.7 / max(3, len(samples)))
    for ax, (name, x) in zip(axes[0], samples.items(), strict=True):
        shade = COLORS.get(name, "C0")
        plot_samples(ax, x, Grid.around(x), shade, name, size)
    return fig


def draw_densities(table, share="row", notes=None, grids=None, size=100):
    """A panel for each of {row: {column: density}}. Those of a row, or of a
    column, have the limits and the colour scale of its first density, the
    truth. notes: {row: {column: text}} below a panel's title; grids: {row
    (or column): Grid}."""
    rows, columns = list(table), list(next(iter(table.values())))
    height = min(1.4, 6.6 / len(columns), 4.8 / len(rows))
    width = min(WIDTH, 0.25 + (height + 0.05) * len(columns))
    fig, axes = panels(len(rows), len(columns), height, width)
    for i, row in enumerate(rows):
        for k, column in enumerate(columns):
            key = row if share == "row" else column
            first = table[row][columns[0]] if share == "row" else (
                table[rows[0]][column])  # fmt: skip
            grid = (grids or {}).get(key) or Grid.around(
                first.sample(5000), size, 0.1
            )
            top = first.density(grid).flatten().quantile(0.9995).item()
            words = [str(column).replace(", ", ",\n")] if i == 0 else []
            own = (notes or {}).get(row)
            words += [own[column]] if own else []
            plot_density(axes[i, k], table[row][column].density(grid), grid,
                         top, "\n".join(words))  # fmt: skip
        axes[i, 0].set_ylabel(row)
    bare(axes)
    return fig


def draw_fits(fits, grid=None):
    """A row for each of {label: Fit}: the losses of all seeds; the truth, the
    flow of the seed in the middle, and their difference, on one scale."""
    truths = [of.truth for of in fits.values()]
    around = torch.cat([truth.sample(2000) for truth in truths])
    grid = grid or Grid.around(around, 150, 0.1)
    fig, axes = panels(len(fits), 4, 1.45 + 0.4 / len(fits))
    top = max(truth.density(grid).max().item() for truth in truths)
    for row, (label, of) in zip(axes, fits.items(), strict=True):
        exact, image = of.truth.density(grid), of.flow.density(grid)
        plot_losses(row[0], of.result, grid_entropy(of.truth), label)
        drawn = [
            plot_density(row[1], exact, grid, top, "truth"),
            plot_density(row[2], image, grid, top, "flow"),
            plot_difference(row[3], image, exact, grid, top / 2,
                            "flow − truth"),
        ]  # fmt: skip
        bare(row[1:])
    color_bar(fig, drawn[1], axes[:, 1:3], "p(x)")
    color_bar(fig, drawn[2], axes[:, 3:], "")
    handles = axes[0, 0].get_legend_handles_labels()
    fig.legend(*handles, loc="outside lower left", ncols=4)
    return fig


def draw_layers(flows, kls=None):
    """For each of {label: flow} a sample of the prior and its images after
    every layer, over a grid that is carried along; below each the density.
    All are in the unit of the layers. kls: {label: KL after 0, 1, ... layers}
    for the titles."""
    wide = 1 + max(len(flow.layers) for flow in flows.values())
    height = min(1.1, 4.9 / wide + 0.1)
    fig, axes = panels(2 * len(flows), wide, height)
    for ax in axes.flat:
        ax.axis("off")
    for i, (label, flow) in enumerate(flows.items()):
        path = path_of(flow)
        around = Grid.around(torch.cat(path).clamp(-5, 5), 150, margin=0)
        above, below = axes[2 * i : 2 * i + 2, : len(path)]
        for ax in (*above, *below):
            ax.axis("on")
        plot_layers(above, flow, path, around)
        layers = inner(flow)
        images = [first_layers(layers, k).density(around)
                  for k in range(len(path))]  # fmt: skip
        top = max(image.flatten().quantile(0.999) for image in images)
        for k, image in enumerate(images):
            drawn = plot_density(below[k], image, around, top)
            if kls:
                title = f"{above[k].get_title()}\nKL {kls[label][k]:.2f}"
                above[k].set_title(title)
        bare([*above, *below])
        color_bar(fig, drawn, [*above, *below], "p, per unit of area")
        above[0].set_ylabel(label)
    return fig


def draw_motion(path, layers):
    """The points of a path when so many layers are applied, the last in
    part: on the straight way. -> figure, title, text."""
    k = min(int(layers), len(path) - 2)
    x = path[k] + (layers - k) * (path[k + 1] - path[k])
    around = Grid.around(torch.cat(path).clamp(-5, 5), margin=0)
    fig, axes = panels(1, 1, 3.2, width=3.4)
    title = f"layer {layers:.2f}" if layers else "prior"
    plot_samples(axes[0, 0], x, around, origin_colors(path[0]), title)
    bare(axes)
    return fig, title, f"{layers:.2f} of {len(path) - 1} layers applied"


def draw_curves(curves, xlabel, colors=(), lines=None, width=WIDTH):
    """KLs against numbers on log scales, {title: {label: {x: values
    (n,)}}}, a panel a title: every seed's, means and intervals. lines:
    {label: {x: y}}, in every panel, of which nothing scatters."""
    fig, axes = panels(1, len(curves), 2.3, width=width, sharey=True)
    named = {}
    for ax, (title, of) in zip(axes[0], curves.items(), strict=True):
        for label, values in of.items():
            color = dict(colors).get(label, f"C{len(named)}")
            named.setdefault(label, color)
            plot_curve(ax, values, named[label])
        for xs in (lines or {}).values():
            ax.plot(list(xs), list(xs.values()), "k:", marker="_", ms=12)
        ticks = sorted({x for values in of.values() for x in values})
        ax.set(xscale="log", yscale="log", xlabel=xlabel, title=title)
        ax.set_xticks(ticks, [f"{x:g}" for x in ticks])
        ax.minorticks_off()
        plain_log(ax.yaxis)
    seen = np.concatenate([
        v for of in curves.values() for xs in of.values() for v in xs.values()
    ])  # fmt: skip
    seen = seen[np.isfinite(seen) & (seen > 0)]
    # Not the intervals, which may go down to 0 and below.
    axes[0, 0].set_ylim(0.7 * seen.min(), 1.4 * seen.max())
    axes[0, 0].set_ylabel("KL, nats")
    ax = axes[0, -1]
    for label, color in named.items():
        ax.plot([], [], "D-", ms=3.5, lw=1, color=color, label=label)
    for label in lines or {}:
        ax.plot([], [], "k:", marker="_", ms=12, label=label)
    if len(named) > 1 or lines:
        fig.legend(loc="outside upper center", ncols=4)
    return fig


def draw_groups(groups, ylabel="KL, nats", colors=(), width=WIDTH, height=1.9):
    """Every seed's value, mean and interval, on a log scale: a column for
    each of {group: values (n,)}, or of {group: {label: values}}, side by
    side. colors: {group or label: color}."""
    fig, axes = panels(1, 1, height, width=width)
    ax, named = axes[0, 0], {}
    for k, (group, of) in enumerate(groups.items()):
        own = of if isinstance(of, dict) else {group: of}
        for i, (label, values) in enumerate(own.items()):
            shade = dict(colors).get(label, f"C{i}")
            at = k + 0.8 * ((i + 0.5) / len(own) - 0.5)
            gap = 0.3 / len(own)
            plot_seeds(ax, at - gap / 2, values, shade, gap, gap)
            named[label] = shade
    ax.set_xticks(range(len(groups)), [str(group) for group in groups])
    ax.set(ylabel=ylabel, yscale="log", xlim=(-0.5, len(groups) - 0.5))
    plain_log(ax.yaxis)
    if isinstance(of, dict):
        for label, shade in named.items():
            ax.plot([], [], "D", ms=3.5, color=shade, label=label)
        fig.legend(loc="outside upper center", ncols=4)
    return fig


def _fewer_colors(png):
    """The same picture to the eye, of 256 colours."""
    picture = PIL.Image.open(io.BytesIO(png))
    dpi, picture = picture.info.get("dpi"), picture.convert("RGBA")
    opaque = picture.getextrema()[3][0] == 255
    picture = picture.convert("RGB") if opaque else picture
    buffer = io.BytesIO()
    picture.quantize(256, 0 if opaque else 2).save(buffer, "png", dpi=dpi)
    return buffer.getvalue()


def _png(fig, dpi=160):
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", metadata={"Software": None}, dpi=dpi)
    return _fewer_colors(buffer.getvalue())


def _svg(fig):
    """Paths to a hundredth of a point, pixels of 256 colours."""
    buffer = io.StringIO()
    fig.savefig(buffer, format="svg", metadata={"Date": None}, dpi=160)
    text = re.sub(
        r' d="[^"]*"',
        lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]),
        buffer.getvalue(),
    )

    def lighter(match):
        png = _fewer_colors(base64.b64decode(match[0]))
        return base64.b64encode(png).decode()

    return re.sub(r"(?<=png;base64,)[\w+/=\s]+", lighter, text).encode()


SHOWN = {}  # {notebook: names of its figures, in the order of their numbers}


def save_figure(fig, name, caption="", frames=()):
    """Show a figure with its number and caption, and keep it as
    figures/<name>.svg. A name is that of its notebook and its own: 01_samples.

    frames: [(figure, word, ...), ...] become a slider in the HTML report, of
    which fig is the still; the words are their label. The folder is
    $FIGURES, where that is set; where it is empty or cannot be written, no
    copy is kept. The output's metadata are for the report; its digest says
    that the vector copy is of this run.
    """
    if not (isinstance(name, str) and re.fullmatch(r"[\w-]+", name)):
        raise ValueError(
            f"name must be of letters, digits, _ and -, got {brief(name)}"
        )
    folder, svg = os.environ.get("FIGURES", "figures"), _svg(fig)
    try:
        if folder:
            path = Path(__file__).parent / folder / f"{name}.svg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(svg)
    except (OSError, ValueError) as error:
        warnings.warn(
            "FIGURES must be a folder to write to, got "
            f"{brief(folder)}, so no vector copy of {name} is kept: {error}",
            stacklevel=2,
        )
    about = {"figure": name, "caption": caption}
    about["svg"] = hashlib.sha256(svg).hexdigest()[:16]
    if frames:
        about["frames"] = [
            {
                "label": ": ".join(words),
                "png": base64.b64encode(_png(f, 80)).decode(),
            }
            for f, *words in frames
        ]
    display(
        Image(_png(fig), width=int(fig.get_figwidth() * 130)),
        metadata=about,
    )
    for drawn in [fig, *(f for f, *_ in frames)]:
        plt.close(drawn)
    book = name.partition("_")[0]
    order = SHOWN.setdefault(book, [])
    order += [name] * (name not in order)
    number = f"Figure {book.lstrip('0')}.{order.index(name) + 1}"
    words = f"*{number}. {caption}*"
    display(Markdown(words), metadata={"figure_caption": True})


def say(text, *values):
    """A sentence, as Markdown, with values of the run in its braces."""
    display(Markdown(text.format(*values) if values else text))


def slider(frame, **options):
    """In a running Jupyter frame(value), a figure and its words, under a
    slider over the values of its one argument; elsewhere nothing."""
    if "JPY_SESSION_NAME" not in os.environ or not find_spec("ipywidgets"):
        return
    from ipywidgets import SelectionSlider, interact

    ((name, values),) = options.items()

    def turn(**chosen):
        fig, *words = frame(**chosen)
        plt.close(fig), print(": ".join(words))
        return fig

    interact(turn, **{name: SelectionSlider(options=values)})


def show_source(*objects):
    """Code from the modules as it stands there, without its docstrings;
    methods under the name of their class."""
    shown, last = [], None
    for thing in objects:
        source = textwrap.dedent(inspect.getsource(thing))
        doc = ast.get_docstring(ast.parse(source).body[0], clean=False)
        if doc is not None:
            source = re.sub(
                rf' +"""{re.escape(doc)}"""\n', "", source, count=1
            )
        owner, _, _ = thing.__qualname__.rpartition(".")
        if owner:
            source = textwrap.indent(source, "    ")
        if owner and owner != last:
            source = f"class {owner}:\n{source}"
        shown.append(source.rstrip())
        last = owner
    say("```python\n" + "\n\n".join(shown) + "\n```")
