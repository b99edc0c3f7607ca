"""What notebook 04 measures, against what is known."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import exhibits
import helpers
import study
from helpers import ToyDataset, toy_distribution

TRUTH = toy_distribution("GaussiansRot", 3)


def test_mass_in_the_seas_is_that_beyond_four_sigma():
    """Of the truth itself about exp(-8); of a wide blob nearly all."""
    blob = TRUTH.sample(20_000, 1) * 10
    flows = [TRUTH.sample(20_000, 1), blob]
    flow = SimpleNamespace(sample=lambda n, seed: torch.stack(flows))
    fit = SimpleNamespace(truth=TRUTH, result=SimpleNamespace(flow=flow))
    own, wide = exhibits.mass_in_the_seas(fit)
    assert own == pytest.approx(math.exp(-8), abs=5e-4) and wide > 0.9


def test_kernel_estimates_are_of_their_own_points():
    x = ToyDataset(TRUTH, 300, 5).data.double()
    found = study.kernel_estimates(x)
    h = found["one h"].H[0, 0].item()
    assert found["sharpened"].H[0, 0] == pytest.approx(1.5 * h)
    assert torch.equal(found["one h"].samples, x)
    assert torch.equal(found["sharpened"].samples, helpers.sharpen(x, 1.5 * h))


def test_kernel_in_the_shape_of_the_covariance_turns_and_scales_with_it():
    x = study.turned_mixture(3, 1).sample(200, 0)
    A = torch.tensor([[2, 1, 0], [0, 1, 5], [1, 0, 1]]).double()
    own, moved = (
        study.kernel_estimates(points)["shape of the covariance"]
        for points in (x, x @ A.T)
    )
    covariance = torch.cov(x.T)
    h2 = (own.H @ own.H.T) / covariance
    assert torch.allclose(h2, h2[0, 0], rtol=1e-9)
    shift = own.log_probability(x) - moved.log_probability(x @ A.T)
    assert torch.allclose(shift, A.det().abs().log(), atol=0.02)


def test_kernel_scores_are_remembered(monkeypatch, tmp_path):
    monkeypatch.setenv("RUNS", str(tmp_path))
    jobs = [(TRUTH, 300, 5, 2000), (TRUTH, 300, 6, 2000)]
    kl = study.kernel_kl(jobs)
    x = ToyDataset(TRUTH, 300, 5).data.double()
    own = study.kernel_estimates(x)["one h"]
    expected = study.kl_divergence(TRUTH, own, 2000).value
    assert kl[jobs[0]]["one h"] == expected
    monkeypatch.setattr(study, "run_kernels", None)  # is not called again
    assert study.kernel_kl(jobs[::-1]) == kl


def test_interrupted_kernel_scores_are_passed_on(monkeypatch, tmp_path):
    def run(index, setting):
        if setting["seed"] == 6:
            raise KeyboardInterrupt
        return index, {"one h": 1.0}

    monkeypatch.setenv("RUNS", str(tmp_path))
    monkeypatch.setattr(study, "run_kernels", run)
    with pytest.raises(KeyboardInterrupt):
        study.kernel_kl([(TRUTH, 300, 5, 2000), (TRUTH, 300, 6, 2000)])


def test_turned_mixture_has_its_axes_and_its_sphere():
    p = study.turned_mixture(4, seed=3)
    assert p.means.norm(dim=1).sub(2.5).abs().max() < 1e-12
    for root in p.roots:
        widths = torch.linalg.svdvals(root)
        assert widths[[0, -1]].tolist() == pytest.approx([1, 0.2])
    assert not torch.equal(p.means, study.turned_mixture(4, seed=4).means)


def test_spline_is_drawn_through_its_knots():
    """Rising, the identity outside; and the piece has the slopes drawn."""
    random = torch.Generator().manual_seed(0)
    outputs = torch.randn(11, generator=random)  # of 4 bins
    fig, spline = exhibits.draw_spline(outputs), helpers.SplineCoupling(bins=4)
    whole, piece = fig.axes
    (x, y), (xs, ys) = (line.get_data() for line in whole.lines[:2])
    assert (np.diff(y) > 0).all() and len(xs) == 5
    assert np.allclose(np.interp(xs, x, y), ys, atol=0.05)
    outside = np.abs(x) > 5
    assert np.array_equal(x[outside], y[outside])
    for line in piece.lines[3:]:  # tangents, at a knot in their middle
        (a, b), (low, high) = line.get_data()
        at = torch.tensor([[(a + b) / 2]], dtype=torch.float32)
        log_slope = spline.forward(at, outputs[None])[1].item()
        slope = (high - low) / (b - a)
        assert slope == pytest.approx(math.exp(log_slope), rel=1e-3)
