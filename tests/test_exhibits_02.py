"""Notebook 02's figures: what is drawn is what was given, on one scale."""

import numpy as np
import torch

import exhibits

Z = torch.linspace(-4, 4, 2001, dtype=torch.float64)
GAUSS = (-Z.square() / 2).exp() / (2 * torch.pi) ** 0.5


def area(strip):
    """Of a filled polygon, by its vertices."""
    x, y = strip.get_paths()[0].vertices.T
    return abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2


def test_map_stands_above_its_densities_and_strips_keep_their_mass():
    above, steep, before, after = exhibits.draw_map(Z, 0.5 * Z, GAUSS).axes
    assert above.get_position().y0 > before.get_position().y1
    assert steep.get_position().y0 > after.get_position().y1
    x, y = above.lines[0].get_data()
    assert np.allclose(y, 0.5 * x)
    assert np.allclose(steep.lines[0].get_ydata(), 0.5)
    assert np.allclose(after.lines[0].get_ydata(), 2 * GAUSS)
    assert before.get_ylim() == after.get_ylim()
    for ax in (before, after):
        areas = [area(strip) for strip in ax.collections]
        assert np.allclose(areas, 1 / 8, atol=2e-3)


def test_steps_are_drawn_in_order_and_on_one_scale():
    steps = [Z, 0.8 * Z, 0.5 * Z]
    log_p = [GAUSS.log() - np.log(a) for a in (1, 0.8, 0.5)]
    axes = exhibits.draw_steps(steps, log_p).axes
    peaks = [ax.lines[0].get_ydata().max() for ax in axes]
    assert np.allclose(peaks, 0.3989 / np.array([1, 0.8, 0.5]), 1e-3)
    assert len({ax.get_ylim() for ax in axes}) == 1


def test_boxes_and_densities_go_where_the_map_sends_them():
    def f(z):  # (z1, z2) to (z1, 2 z2 + z1 + 1): an area twice as large
        z1, z2 = z.T
        return torch.stack([z1, 2 * z2 + z1 + 1], 1), 0 * z1 + np.log(2)

    before, after = exhibits.draw_boxes(f, [[1.0, 0.5]], side=0.4).axes[:2]
    for ax, center in ((before, (1, 0.5)), (after, (1, 3))):
        rim = ax.lines[-1].get_xydata()
        assert np.allclose((rim.min(0) + rim.max(0)) / 2, center)
    meshes = [ax.collections[0] for ax in (before, after)]
    tops = [mesh.get_array().max() for mesh in meshes]
    assert np.isclose(tops[0], 2 * tops[1])
    assert len({mesh.get_clim() for mesh in meshes}) == 1
    assert after.texts[0].get_text() == "× 2.00"
    peak = np.argmax(meshes[1].get_array())
    peak = meshes[1].get_coordinates().reshape(-1, 2)[peak]
    assert np.allclose(peak, (0, 1))


def test_graphs_lead_from_x_to_y_and_back():
    first, second = exhibits.draw_graphs().axes
    for ax, left, right, words in (
        (first, "x", "y", "exp(s)"),
        (second, "y", "x", "exp(−s)"),
    ):
        at = {text.get_text(): text.get_position() for text in ax.texts}
        assert at[f"${left}_1$"][0] < at[f"${right}_1$"][0]
        assert words in at
