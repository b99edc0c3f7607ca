"""Laws of the figures and tables of notebook 03."""

import math

import numpy as np
import pytest
import torch
from truths import make_flow

import exhibits
import study
from helpers import GaussianMixture, ToyDataset, sharpen

SETTING = {"dist_type": "Moons", "num_samples": 60, "num_layers": 2,
           "epochs": 2}  # fmt: skip


@pytest.fixture(scope="module")
def fit():
    return study.train_all({"few": SETTING}, seeds=2, points=200)["few"]


def test_losses_of_fitted_and_held_out_points_are_told_apart():
    losses = torch.arange(12.0).reshape(2, 6)
    truth = GaussianMixture([(0, 0)], 1.0)
    flow = study.first_layers(make_flow(2, seed=1), 0)
    fig = exhibits.draw_trainings(truth, {"one": (flow, losses)}, held_out=2)
    lines = {line.get_label(): line.get_ydata() for line in fig.axes[0].lines}
    assert np.allclose(lines["training"], losses[:, 2:].mean(1))
    assert np.allclose(lines["held out"], losses[:, :2].mean(1))


def test_jump_is_the_largest_rise_and_the_worst_points_are_left_out():
    losses = torch.tensor([0.0, 9.0, 1.0, 1.5, 1.2, 1.4])
    truth, flow = GaussianMixture([(0, 0)], 1.0), make_flow(2, seed=1)
    run = flow, truth.sample(5), [1, 3], losses
    row = exhibits.table_of_loops(truth, [run], 2000).loc["seed 0"]
    own = -flow.log_probability(run[1]).detach()
    assert row["held-out loss"] == pytest.approx(own[[1, 3]].mean().item())
    assert row["training loss"] == pytest.approx(own[[0, 2, 4]].mean().item())
    assert row["its largest jump"] == pytest.approx(0.2)
    assert row["without the worst 0.1 %"] < row["KL"]


def test_own_points_are_those_that_were_fitted(fit):
    for seed, own in enumerate(exhibits.kl_on_own_points(fit)):
        kept = np.delete(np.arange(60), fit.result.held_out[seed])
        x = ToyDataset("Moons", 60, seed).data[kept]
        flow = fit.result.flow.member(seed)
        ratio = fit.truth.log_probability(x) - flow.log_probability(x)
        assert own == pytest.approx(ratio.mean().item(), abs=1e-5)


def test_target_is_the_kernel_estimate_of_the_fitted_points(fit):
    for seed, target in enumerate(exhibits.targets(fit, 60)):
        kept = np.delete(np.arange(60), fit.result.held_out[seed])
        x = ToyDataset("Moons", 60, seed).data[kept].double()
        noise = fit.result.noise[seed].double()
        assert torch.allclose(target.H, torch.diag(noise))
        moved = sharpen(x, noise[0].item())  # the unit is one for both
        gap = (target.samples[:, None] - moved).abs().sum(-1).amin(1)
        assert len(target.samples) == 54 and gap.max() < 1e-4


def test_misses_are_the_two_sides_of_one_identity(fit):
    aims = {"few": exhibits.targets(fit, 60)}
    row = exhibits.table_of_misses({"few": fit}, aims, 200).loc["few"]
    kl = [study.kl_divergence(fit.truth, aim, 200).value
          for aim in aims["few"]]  # fmt: skip
    gain = np.mean(fit.kl - kl)
    assert row["seen from the truth"] == pytest.approx(gain)
    assert row["seen from the target"] > 0


def test_every_run_is_a_dot_and_an_endless_one_lies_on_top(fit):
    kls = [0.3, math.inf]
    of = fit._replace(runs=fit.runs.assign(kl=kls))
    fig = exhibits.draw_printed({"one": of}, ["C0"])
    (dots,) = [line for line in fig.axes[1].lines
               if line.get_label() == "one"]  # fmt: skip
    assert np.allclose(dots.get_ydata(), [0.3, 1])
    assert np.allclose(dots.get_xdata(), exhibits.printed_excess(of))


def test_mass_at_sea_of_a_flow_far_off_is_all(fit):
    far = study.first_layers(fit.result.flow, 0)
    far.outermost.set(50, 0.1)
    row = exhibits.table_of_seas({
        "far": fit._replace(result=type(fit.result)(**{
            **vars(fit.result), "flow": far}))
    }).loc["far"]  # fmt: skip
    assert row["flow's mass at sea"] == "100.0%"
    assert float(row["truth's mass at sea"].rstrip("%")) < 5


def test_recipes_are_compared_with_the_first(fit):
    worse = fit._replace(runs=fit.runs.assign(kl=[0.5, 0.52]))
    good = fit._replace(runs=fit.runs.assign(kl=[0.1, 0.104]))
    table = exhibits.table_of_recipes({"ours": good, "without": worse})
    assert table.loc["without", "than ours"].startswith("larger: ×")
    fig = exhibits.draw_recipes({"ours": good, "without": worse})
    dots = [line.get_ydata() for line in fig.axes[0].lines
            if line.get_marker() == "o"]  # fmt: skip
    assert np.allclose(np.concatenate(dots), [0.1, 0.104, 0.5, 0.52])


def test_a_check_that_fails_says_so_by_an_error(capsys):
    values = torch.tensor([0.9, 1.0, 1.1])
    exhibits.print_check("(1)", values, 1.01)
    assert capsys.readouterr().out.endswith("errors: True\n")
    with pytest.raises(AssertionError):
        exhibits.print_check("(1)", values, 2.0)
