"""Laws of the figures, by what is seen: the colours of their pixels."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from truths import Elsewhere

import plots
from helpers import Grid

GRID = Grid((-3, 5), (10, 18), 4)
# A number for each cell, no two alike, so that no turn or flip is the same.
VALUES = torch.arange(16.0).reshape(4, 4).square() / 225


def axes(n=1):
    """Panels of a figure, and a function for their colours at points in the
    data's units: (n, 2) -> (n, 3), from 0 to 1."""
    figure = Figure((3 * n, 3), dpi=100)
    canvas = FigureCanvasAgg(figure)
    own = figure.subplots(1, n, squeeze=False)[0]

    def colors(points, ax=own[0]):
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba())[::-1, :, :3] / 255
        x, y = ax.transData.transform(np.asarray(points)).astype(int).T
        return pixels[y, x]

    return own, colors


def shades(palette, values):
    return np.array([palette(v)[:3] for v in values.flatten().tolist()])


def test_density_is_drawn_where_it_is():
    """At each cell's centre the colour of its value: y upwards."""
    (ax,), colors = axes()
    plots.plot_density(ax, VALUES, GRID, vmax=1)
    expected = shades(plots.DENSITY, VALUES)
    np.testing.assert_allclose(colors(GRID.points), expected, atol=0.01)
    light = expected.sum(1)  # the higher, the darker
    assert light[0] > light[8] > light[15]


def test_difference_is_red_where_it_is_too_high():
    (ax,), colors = axes()
    gap = VALUES - 0.3
    plots.plot_difference(ax, VALUES, torch.full((4, 4), 0.3), GRID, vmax=1)
    seen, gap = colors(GRID.points), gap.flatten().numpy()
    expected = shades(plots.DIVERGING, (torch.as_tensor(gap) + 1) / 2)
    np.testing.assert_allclose(seen, expected, atol=0.01)
    red, _, blue = seen.T
    far = abs(gap) > 0.1
    assert ((red > blue) == (gap > 0))[far].all() and far.sum() > 8


def test_samples_are_drawn_where_they_are():
    (ax,), colors = axes()
    x = torch.tensor([(-2.0, 11), (4, 12), (0, 17)])
    plots.plot_samples(ax, x, GRID, color=["r", "g", "b"], size=40)
    assert (colors(x).argmax(1) == [0, 1, 2]).all()
    away = [(2, 11), (-2, 16), (4, 16), (0, 11)]
    assert (colors(away) == 1).all()


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_layers_are_drawn_from_prior_to_sample(where):
    """Each in the colour of where it started; also of a flow on a GPU."""
    panels, colors = axes(2)
    z = torch.tensor([(2.0, 0.0), (-2, 0), (0, 2)])
    shift = torch.tensor([1.0, 1.0])
    if where == "elsewhere":
        z, shift = z.as_subclass(Elsewhere), shift.as_subclass(Elsewhere)
    flow = SimpleNamespace(layers=[lambda z: (z + shift, None)])
    flow.parameters = lambda: iter([shift])
    grid = Grid((-4, 4), (-4, 4), 4)
    plots.plot_layers(panels, flow, [z, z + shift], grid)
    hues = plots.origin_colors(z.cpu())
    assert (np.ptp(hues, 0) > 0.1).any()
    for panel, path in zip(panels, (z, z + shift), strict=True):
        (dots,) = panel.collections
        np.testing.assert_allclose(dots.get_offsets(), path.cpu())
        np.testing.assert_allclose(dots.get_facecolors()[:, :3], hues)
    assert [p.get_title() for p in panels] == ["prior", "after layer 1"]
    lines = [line.get_xydata() for line in panels[1].lines]
    assert len(lines) == 26  # the grid in z, moved
    assert min(line.min() for line in lines) == pytest.approx(-2)


def test_losses_are_drawn_with_the_epoch_that_is_used():
    (ax,), _ = axes()
    losses = torch.tensor([[3.0, 4.0], [2.0, 2.5], [2.2, 2.4]])
    result = SimpleNamespace(train_losses=losses + 1, valid_losses=losses,
                             used_epoch=torch.tensor([1, 2]))  # fmt: skip
    plots.plot_losses(ax, result, entropy=1.9)
    by_label = {line.get_label(): line.get_xydata() for line in ax.lines}
    assert by_label["epoch used"].tolist() == [[1, 2], [2, pytest.approx(2.4)]]
    middle = losses.mean(1)  # the median of two members
    np.testing.assert_allclose(by_label["held out"][:, 1], middle)
    np.testing.assert_allclose(by_label["training"][:, 1], middle + 1)
    assert (by_label["entropy"][:, 1] == 1.9).all()
