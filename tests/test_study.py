"""Laws of the scores, the interval, the verdict and the sweep."""

import doctest
import math
import os
import subprocess
import sys
import warnings
from functools import partial

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from scipy import stats
from truths import Elsewhere, make_flow

import helpers
import memory
import study
import training
from helpers import GaussianMixture, toy_distribution
from study import kl_divergence, mean_interval, sweep, total_variation
from training import train


@pytest.mark.parametrize("module", [helpers, training, study])
def test_examples_run_as_they_are_printed(module):
    outcome = doctest.testmod(module)
    assert outcome.attempted and not outcome.failed


# Scores


def normal(mean, sigma):
    return GaussianMixture([mean], sigma)


def normal_kl(m, s, n, t):
    """KL(N(m, s^2 I) || N(n, t^2 I))."""
    d, d2 = len(m), math.dist(m, n) ** 2
    return d * (math.log(t / s) + ((s / t) ** 2 - 1) / 2) + d2 / (2 * t**2)


@pytest.mark.parametrize("m, s, n, t", [
    ((0, 0), 1.0, (0.5, -1), 2.0), ((1, 2), 0.3, (1, 2), 0.4),
    ((0,), 2.0, (1,), 1.5), ((3, 0, 1, 0, 0), 0.5, (0,) * 5, 1.0),
])  # fmt: skip
def test_kl_is_the_closed_form(m, s, n, t):
    """And not that of the arguments swapped."""
    estimate = kl_divergence(normal(m, s), normal(n, t), 20_000)
    expected, swapped = normal_kl(m, s, n, t), normal_kl(n, t, m, s)
    allowed = 5 * estimate.standard_error
    assert abs(estimate.value - expected) < allowed
    assert abs(expected - swapped) > allowed


def test_scores_end_where_densities_are_equal_or_apart():
    truth = toy_distribution("Moons")
    assert kl_divergence(truth, truth, 100) == (0, 0)
    assert total_variation(truth, truth, 100) == (0, 0)
    far = normal((0, 0), 0.1), normal((100, 0), 0.1)
    assert total_variation(*far, 100) == (1, 0)


def asked(score, n, seed):
    """The points at which a score asks for the density of a model."""
    truth, seen = toy_distribution("Moons"), []

    class Model(GaussianMixture):
        def log_probability(self, x):
            seen.append(x)
            return super().log_probability(x)

        def sample(self, n, seed=0):
            return truth.sample(n, seed)

    model = Model([(0, 0)], 1.0)
    both = [model] if score is study.entropy else [truth, model]
    score(*both, n, seed)
    return torch.cat(seen)


@pytest.mark.parametrize("score", [
    kl_divergence, total_variation, study.entropy
])  # fmt: skip
def test_scores_are_on_points_that_no_training_saw(score):
    """Neither of the same seed nor of the next."""
    x = asked(score, 600, seed=3)
    assert x.shape == (600, 2) and torch.equal(x, asked(score, 600, seed=3))
    for seed in (3, 4):
        data = helpers.ToyDataset("Moons", 600, seed).data
        assert not torch.isin(x.float(), data).any()


@pytest.mark.parametrize("score", [kl_divergence, total_variation])
def test_standard_error_is_calibrated(score):
    """The scatter of 200 estimates is known to 5 per cent of itself; both
    are of 1 / sqrt(n)."""
    p, q = normal((0, 0), 1.0), normal((0.5, 0), 1.3)
    runs = [score(p, q, 400, seed) for seed in range(200)]
    values, errors = np.array(runs).T
    assert errors.mean() == pytest.approx(values.std(ddof=1), rel=0.25)
    more = score(p, q, 40_000).standard_error
    assert more == pytest.approx(errors.mean() / 10, rel=0.1)


@pytest.mark.parametrize("gap, sigma", [(0.3, 1.0), (1.0, 0.4), (4.0, 2.0)])
def test_total_variation_is_the_closed_form(gap, sigma):
    """Of two Gaussians of one width, in both orders."""
    p, q = normal((0, 0), sigma), normal((0, gap), sigma)
    expected = math.erf(gap / sigma / 8**0.5)
    for one, other in ((p, q), (q, p)):
        estimate = total_variation(one, other, 20_000)
        assert abs(estimate.value - expected) < 5 * estimate.standard_error


@pytest.mark.parametrize("sigma, d", [(0.2, 2), (7.0, 1), (1.0, 5)])
def test_entropy_is_the_closed_form(sigma, d):
    estimate = study.entropy(normal([3] * d, sigma), 20_000)
    expected = d / 2 * math.log(2 * math.pi * math.e * sigma**2)
    assert abs(estimate.value - expected) < 5 * estimate.standard_error
    # -log p varies by sqrt(d / 2) nats, whatever sigma.
    error = (d / 2 / 20_000) ** 0.5
    assert estimate.standard_error == pytest.approx(error, rel=0.1)


def test_scores_come_from_another_device():
    class There(GaussianMixture):
        def log_probability(self, x):
            x = torch.as_tensor(x).as_subclass(torch.Tensor)
            return super().log_probability(x).float().as_subclass(Elsewhere)

        def sample(self, n, seed=0):
            return super().sample(n, seed).float().as_subclass(Elsewhere)

    p, there = normal((0, 0), 1.0), There([(0, 0)], 1.0)
    close = partial(pytest.approx, rel=1e-5, abs=1e-6)
    assert study.entropy(there, 99) == close(study.entropy(p, 99))
    assert study.grid_entropy(there) == close(study.grid_entropy(p))
    assert kl_divergence(p, there, 99) == close((0, 0))


def test_scores_of_an_ensemble_are_its_members():
    truth, flow = toy_distribution("GaussiansGrid"), make_flow(2, 3, size=0.1)
    kl, tv = partial(kl_divergence, truth), partial(total_variation, truth)
    for score in (kl, tv, study.entropy):
        many = score(flow, 9000)  # in parts
        assert many.value.shape == many.standard_error.shape == (3,)
        for i in range(3):
            own = score(flow.member(i), 9000)
            both = many.value[i].item(), many.standard_error[i].item()
            assert both == pytest.approx(own)


@pytest.mark.parametrize("name", helpers.DISTRIBUTIONS)
def test_entropy_on_a_grid_is_that_of_samples(name):
    truth = toy_distribution(name)
    value, error = study.entropy(truth, 40_000)
    assert abs(study.grid_entropy(truth) - value) < 4 * error


# Intervals and verdicts


@pytest.mark.parametrize("n, level", [
    (2, 0.95), (3, 0.999), (4, 0.01), (8, 0.5), (51, 0.99), (1000, 0.95),
])  # fmt: skip
def test_mean_interval_is_scipys(n, level, random):
    values = random.normal(size=n) + 3
    interval = mean_interval(values.tolist(), level)
    low, high = stats.t.interval(
        level, n - 1, values.mean(), stats.sem(values)
    )
    assert interval == pytest.approx((values.mean(), low, high), rel=1e-9)
    assert str(interval) == "{:.3f} [{:.3f}, {:.3f}]".format(*interval)


def test_mean_interval_of_constant_and_of_single_values():
    assert mean_interval([2.0, 2.0, 2.0]) == (2, 2, 2)
    assert mean_interval([3]) == (3, -math.inf, math.inf)


def test_holm_intervals_decide_as_holm_does(random):
    """Against the p-values of scipy, in all orders and sizes; each interval
    has the level at which its claim was judged."""
    for m in (1, 2, 5):
        values = {
            f"claim {k}": random.normal(size=6) + random.uniform(-3, 3)
            for k in range(m)
        }
        intervals = study.holm_intervals(values, 0.9)
        assert list(intervals) == list(values)
        p = {c: stats.ttest_1samp(v, 0).pvalue for c, v in values.items()}
        rejecting, allowed = True, 0.1
        for k, claim in enumerate(sorted(p, key=p.get)):
            if rejecting:
                allowed = 0.1 / (m - k)
                rejecting = p[claim] < allowed
            interval = intervals[claim]
            assert (interval.low > 0 or interval.high < 0) == rejecting
            assert interval == pytest.approx(
                mean_interval(values[claim], 1 - allowed)
            )
    assert study.holm_intervals({"one": [1.0], "two": [1.0, 1.0]}) == {
        "one": (1, -math.inf, math.inf), "two": (1, 1, 1)
    }  # fmt: skip


@pytest.mark.parametrize("low, high, answer", [
    (0.1, 0.4, "supported, 0.250 [0.100, 0.400]"),
    (-0.4, -0.1, "reversed, -0.250 [-0.400, -0.100]"),
    (-0.1, 0.1, "undecided, 0.000 [-0.100, 0.100]"),
    (0.0, 0.3, "undecided, 0.150 [0.000, 0.300]"),
    (-0.3, 0.0, "undecided, -0.150 [-0.300, 0.000]"),
])  # fmt: skip
def test_verdict_has_three_answers(low, high, answer):
    interval = study.Interval((low + high) / 2, low, high)
    assert study.verdict("More helps", interval) == f"More helps: {answer}"


# Sweep


def setting(**changes):
    base = dict(dist_type="GaussiansRot", num_gaussians=3, num_samples=60,
                num_layers=1, hidden=4, epochs=2)  # fmt: skip
    return base | changes


SETTINGS = [
    setting(),
    setting(num_layers=2, coupling="spline"),
    setting(dist_type="Moons", num_samples=90, jitter=0),
]
OPTIONS = dict(seeds=2, points=500, progress=False)
COLUMNS = """setting dist_type num_gaussians num_samples num_layers hidden
epochs coupling jitter seed kl kl_se valid_loss best_epoch parameters seconds
status""".split()


@pytest.fixture(scope="module")
def serial():
    return sweep(SETTINGS, n_jobs=1, results=True, **OPTIONS)


def assert_same_table(one, other):
    drop = ["seconds"]
    pd.testing.assert_frame_equal(
        one.drop(columns=drop), other.drop(columns=drop), check_exact=True
    )


def test_sweep_has_a_row_a_run(serial):
    table, results = serial
    assert list(table.setting) == [0, 0, 1, 1, 2, 2]
    assert list(table.seed) == [0, 1] * 3
    assert set(table.columns) == set(COLUMNS)
    assert (table.status == "ok").all()
    for k, given in enumerate(SETTINGS):
        for name, value in given.items():
            assert (table[name][table.setting == k] == value).all()
    assert (table.kl_se > 0).all() and (table.seconds > 0).all()
    assert len(results) == 3


def test_sweep_runs_what_a_hand_would_run(serial):
    """One seed alone: own data, weights and noise; float32."""
    table, results = serial
    for seed in (0, 1):
        dataset = helpers.ToyDataset("GaussiansRot", 60, seed, num_gaussians=3)
        flow = helpers.CouplingFlow(1, seed=seed, hidden=4)
        result = train(flow, dataset, 2, seed=seed, progress=False)
        score = kl_divergence(dataset.distribution, result.flow, 500)
        row = table.iloc[seed]
        assert row.kl == pytest.approx(score.value, rel=1e-4)
        assert row.kl_se == pytest.approx(score.standard_error, rel=1e-3)
        assert row.valid_loss == pytest.approx(result.best_valid_loss, 1e-4)
        assert row.best_epoch == result.best_epoch
        # One network: 1 -> 4 -> 4 -> 2 with its biases.
        assert row.parameters == 8 + 20 + 10
    alone = sweep(SETTINGS[:1], **OPTIONS | {"seeds": range(1, 2)})
    assert alone.seed[0] == 1
    assert alone.kl[0] == pytest.approx(table.kl[1], rel=1e-4)
    again = kl_divergence(toy_distribution("Moons"), results[2].flow, 500)
    own = table.kl[table.setting == 2].tolist()
    assert own == pytest.approx(again.value.tolist())


def test_each_seed_may_have_a_truth_of_its_own(folder, monkeypatch):
    """Scored on its own truth, and remembered."""
    truths = [study.turned_mixture(3, seed) for seed in (5, 6)]
    table, (result,) = run_all([setting(dist_type=truths)], results=True)
    for i, truth in enumerate(truths):
        own = kl_divergence(truth, result.flow.member(i), OPTIONS["points"])
        assert table.dist_type[i] is truth and table.kl[i] == own.value
    assert table.kl[0] != table.kl[1]
    ran = count_runs(monkeypatch)
    again = [study.turned_mixture(3, seed) for seed in (5, 6)]
    assert run_all([setting(dist_type=again)]).kl.equals(table.kl)
    assert not ran
    with pytest.raises(ValueError, match="a list of 2, one for each seed, go"):
        run_all([setting(dist_type=truths[:1])])


def test_failed_setting_is_a_row_and_the_others_survive(serial):
    settings = [SETTINGS[0], setting(num_samples=1), SETTINGS[1],
                setting(hidden=-3)]  # fmt: skip
    table, results = sweep(settings, n_jobs=1, results=True, **OPTIONS)
    assert len(table) == 8 and list(table.seed) == [0, 1] * 4
    ok = table.status == "ok"
    assert ok.tolist() == [True, True, False, False] * 2
    assert table.status[2].startswith("ValueError: data must leave 2 points")
    assert table.status[6] == "ValueError: hidden must be at least 1, got -3"
    assert table.kl.isna().tolist() == (~ok).tolist()
    assert [result is None for result in results] == [False, True] * 2
    survivors = serial[0].kl[:4].tolist()
    assert table.kl[ok].tolist() == survivors
    alone = sweep(settings[1:2], n_jobs=1, **OPTIONS)
    assert alone[["kl", "kl_se", "valid_loss", "seconds"]].isna().all().all()


def test_diverged_run_says_so(monkeypatch):
    original = helpers.CouplingFlow.__init__

    def broken(self, *args, **options):
        original(self, *args, **options)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter[1] = 1e20

    monkeypatch.setattr(helpers.CouplingFlow, "__init__", broken)
    table = sweep([setting(bound=None)], n_jobs=1, **OPTIONS)
    assert table.status.tolist() == ["ok", "diverged"]
    assert math.isfinite(table.kl[0])


def count_runs(monkeypatch, interrupt_at=None):
    """A list of the settings that are trained; Ctrl-C in one of them."""
    ran, original = [], study.run_setting

    def run(index, *rest, **options):
        ran.append(index)
        return original(index, *rest, **options)

    def stopped(*args, **options):
        result = train(*args, **options)
        result.interrupted = len(ran) - 1 == interrupt_at
        return result

    monkeypatch.setattr(study, "run_setting", run)
    monkeypatch.setattr(study, "train", stopped)
    return ran


def test_interrupt_before_the_first_setting_is_passed_on(monkeypatch):
    count_runs(monkeypatch, interrupt_at=0)
    with pytest.raises(KeyboardInterrupt):
        sweep(SETTINGS, n_jobs=1, **OPTIONS)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_sweep_on_a_dask_cluster_is_the_same(serial):
    distributed = pytest.importorskip("distributed")
    cluster = distributed.LocalCluster(
        n_workers=2, processes=True, threads_per_worker=1,
        dashboard_address=None,
    )  # fmt: skip
    with cluster, distributed.Client(cluster):
        with joblib.parallel_config("dask"):
            table = sweep(SETTINGS, **OPTIONS)
    assert_same_table(table, serial[0])


# What it remembers


@pytest.fixture
def folder(monkeypatch, tmp_path):
    relative = os.path.relpath(tmp_path / "runs", ROOT)
    monkeypatch.setenv("RUNS", relative)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


class Own(GaussianMixture):
    """A density that is not in helpers.py."""


def run_all(settings=SETTINGS, **options):
    return sweep(settings, n_jobs=1, **OPTIONS | options)


def test_second_sweep_trains_only_what_failed(monkeypatch, folder, serial):
    settings = [*SETTINGS, setting(num_samples=1)]
    first, trained = run_all(settings, results=True)
    ran = count_runs(monkeypatch)
    again, remembered = run_all(settings, results=True)
    assert ran == [3] and remembered[3] is None
    pd.testing.assert_frame_equal(first, again, check_exact=True)
    assert first.kl[:6].tolist() == serial[0].kl.tolist()
    for one, other in zip(trained[:3], remembered, strict=False):
        assert torch.equal(one.flow.sample(5), other.flow.sample(5))
    run_all(SETTINGS[::-1])  # in another order, the same
    assert ran == [3]


@pytest.mark.parametrize("change", [
    lambda patch: patch.setattr(torch, "__version__", "1.0"),
    lambda patch: patch.setenv("MKL_CBWR", "other"),
    lambda patch: patch.setenv("ATEN_CPU_CAPABILITY", "other"),
])  # fmt: skip
def test_what_another_library_computed_is_not_used(
    monkeypatch, folder, change
):
    run_all(SETTINGS[:1])
    ran = count_runs(monkeypatch)
    run_all(SETTINGS[:1])
    assert ran == []
    change(monkeypatch)
    run_all(SETTINGS[:1])
    assert ran == [0]


@pytest.mark.parametrize("changes, options", [
    ({"average": 0.5}, {}), ({"epochs": 3}, {}), ({"num_samples": 61}, {}),
    ({"dist_type": GaussianMixture([(0, 0)], 1.0)}, {}), ({}, {"seeds": 3}),
    ({}, {"seeds": range(1, 3)}), ({}, {"points": 501}),
])  # fmt: skip
def test_what_has_changed_is_trained(monkeypatch, folder, changes, options):
    run_all(SETTINGS[:2])
    ran = count_runs(monkeypatch)
    run_all([setting(**changes), SETTINGS[1]], **options)
    assert ran == ([0, 1] if options else [0])


def test_what_may_have_changed_unseen_is_not_kept(monkeypatch, folder):
    ran = count_runs(monkeypatch)
    own = [setting(dist_type=Own([(0, 0)], 1.0))]
    run_all(own), run_all(own)
    monkeypatch.setattr(memory, "IMPORTED", "other sources")
    with pytest.warns(UserWarning, match="restart the kernel"):
        run_all(SETTINGS[:1])
    assert ran == [0] * 3 and not [*folder.rglob("output.pkl")]


def test_without_a_folder_nothing_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("RUNS", "")
    monkeypatch.chdir(tmp_path)
    ran = count_runs(monkeypatch)
    run_all(SETTINGS[:1]), run_all(SETTINGS[:1])
    assert ran == [0, 0] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("named", ["file", "file/below", "nul\0"])
def test_where_nothing_can_be_kept_a_sweep_says_so(
    monkeypatch, tmp_path, serial, named
):
    """And goes on."""
    (tmp_path / "file").write_text("", "utf-8")
    environ = os.environ | {"RUNS": str(tmp_path / named)}
    monkeypatch.setattr(os, "environ", environ)
    ran = count_runs(monkeypatch)
    with pytest.warns(UserWarning, match="RUNS must be a folder to write to"):
        assert_same_table(run_all(SETTINGS[:1]), serial[0][:2].dropna(axis=1))
    assert ran == [0]


def test_damaged_entry_is_trained_again(monkeypatch, folder, serial, caplog):
    """With a warning, and no traceback."""
    run_all()
    entries = sorted(folder.rglob("output.pkl"))
    for entry, size in zip(entries, (0, 7, 2000), strict=True):
        entry.write_bytes(entry.read_bytes()[:size])
    ran = count_runs(monkeypatch)
    with pytest.warns(UserWarning, match="setting . again: what was") as w:
        assert_same_table(run_all(), serial[0])
    assert ran == [0, 1, 2] and len(w) == 3 and not caplog.records
    assert {warning.filename for warning in w} == {__file__}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same_table(run_all(), serial[0])  # and kept whole again
    assert ran == [0, 1, 2]


def test_interrupted_sweep_goes_on_where_it_was(monkeypatch, folder, serial):
    """And returns what is ready."""
    with monkeypatch.context() as first:
        count_runs(first, interrupt_at=2)
        with pytest.warns(UserWarning, match="interrupted: .* 2 of 3 settin"):
            table, results = run_all(results=True)
    assert results[2] is None
    pd.testing.assert_series_equal(table.kl, serial[0].kl[:4])
    ran = count_runs(monkeypatch)
    assert_same_table(run_all(), serial[0])
    assert ran == [2]


@pytest.mark.slow
def test_two_sweeps_at_once_share_a_folder(monkeypatch, folder, serial):
    """And modules with another recipe train anew."""
    other = folder.parent / "other"
    other.mkdir()
    for path in ROOT.glob("*.py"):
        source = path.read_text("utf-8")
        source = source.replace("jitter: float = 1.5", "jitter: float = 1.4")
        (other / path.name).write_text(source, "utf-8")
    code = "from study import sweep; print(sweep(%r, n_jobs=1, **%r).kl.sum())"
    command = [sys.executable, "-c", code % (SETTINGS, OPTIONS)]
    jobs = [
        subprocess.Popen(command, cwd=at, stdout=subprocess.PIPE, text=True)
        for at in (ROOT, ROOT, other)
    ]
    sums = [float(job.communicate(timeout=200)[0]) for job in jobs]
    assert sums[:2] == pytest.approx([serial[0].kl.sum()] * 2)
    assert sums[2] != pytest.approx(sums[0])
    ran = count_runs(monkeypatch)
    assert_same_table(run_all(), serial[0])
    assert not ran
