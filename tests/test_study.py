"""Laws of the scores, the interval, the verdict and the sweep."""

import math

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from checks import make_flow
from scipy import stats
from tqdm import tqdm

import helpers
from helpers import (
    DISTRIBUTIONS,
    CouplingFlow,
    Density,
    Estimate,
    GaussianKDE,
    GaussianMixture,
    Grid,
    Interval,
    ToyDataset,
    TrainingResult,
    bootstrap_interval,
    entropy,
    grid_entropy,
    kl_divergence,
    sweep,
    total_variation,
    toy_distribution,
    train,
    verdict,
)

# Scores


def normal(mean, sigma):
    return GaussianMixture([mean], sigma)


def normal_kl(m, s, n, t):
    """KL(N(m, s^2 I) || N(n, t^2 I)) in two dimensions."""
    d2 = (m[0] - n[0]) ** 2 + (m[1] - n[1]) ** 2
    return 2 * math.log(t / s) + (s / t) ** 2 - 1 + d2 / (2 * t**2)


NORMALS = pytest.mark.parametrize("m, s, n, t", [
    ((0, 0), 1.0, (0.5, -1), 2.0), ((1, 2), 0.3, (1, 2), 0.4),
    ((0, 0), 2.0, (1, 0), 1.5), ((3, 0), 0.5, (0, 0), 1.0),
])  # fmt: skip


@NORMALS
def test_kl_is_the_closed_form(m, s, n, t):
    """And not that of the arguments swapped."""
    estimate = kl_divergence(normal(m, s), normal(n, t), 20_000)
    expected, swapped = normal_kl(m, s, n, t), normal_kl(n, t, m, s)
    assert estimate == Estimate(estimate.value, estimate.standard_error)
    allowed = 5 * estimate.standard_error
    assert abs(estimate.value - expected) < allowed
    assert abs(expected - swapped) > allowed


def test_kl_of_a_density_with_itself_is_zero():
    truth = toy_distribution("Moons")
    assert kl_divergence(truth, truth, 100) == (0, 0)
    assert total_variation(truth, truth, 100) == (0, 0)


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


def test_smallest_sample_has_the_deviation_over_n_minus_one():
    """Two values a, b: (a - b)^2 / 2 over n = 2."""
    p, q = normal((0, 0), 1.0), normal((1, 0), 1.0)
    held = []

    class Spy(Density):
        def _log_probability(self, x):
            held.append(x)
            return q.log_probability(x)

        def _sample(self, n, generator):
            raise AssertionError("the model is not sampled")

    value, error = kl_divergence(p, Spy(), 2)
    a, b = (p.log_probability(held[0]) - q.log_probability(held[0])).tolist()
    assert value == pytest.approx((a + b) / 2)
    assert error == pytest.approx(abs(a - b) / 2)


def grid_total_variation(p, q, grid):
    gap = (p.density(grid) - q.density(grid)).abs().sum()
    return 0.5 * gap.item() * grid.cell_area


@pytest.mark.parametrize("p, q", [
    (normal((0, 0), 1.0), normal((1, 0), 1.5)),
    (toy_distribution("GaussiansRot", 3), normal((0, 0), 2.0)),
    (toy_distribution("Moons"), GaussianKDE([(0, 0.5), (1, 0)], 0.5)),
])  # fmt: skip
def test_total_variation_is_the_grids_integral(p, q):
    """160 cells across 16 units: the midpoint rule is good to 1e-3."""
    expected = grid_total_variation(p, q, Grid((-8, 8), (-8, 8), 160))
    for one, other in ((p, q), (q, p)):  # symmetric
        estimate = total_variation(one, other, 20_000)
        allowed = 5 * estimate.standard_error + 1e-3
        assert abs(estimate.value - expected) < allowed
        assert 0 < estimate.value < 1


def test_total_variation_reaches_one_where_nothing_overlaps():
    far = normal((0, 0), 0.1), normal((100, 0), 0.1)
    assert total_variation(*far, 100) == (1, 0)


@pytest.mark.parametrize("sigma", [0.2, 1.0, 7.0])
def test_entropy_is_the_closed_form(sigma):
    estimate = entropy(normal((3, 1), sigma), 20_000)
    expected = math.log(2 * math.pi * math.e * sigma**2)
    assert abs(estimate.value - expected) < 5 * estimate.standard_error
    # -log p varies by 1 nat, whatever sigma.
    assert estimate.standard_error == pytest.approx(20_000**-0.5, rel=0.1)


def test_scores_are_pure():
    truth, model = toy_distribution("GaussiansRot", 3), normal((0, 0), 2.0)
    for score in (kl_divergence, total_variation):
        first = score(truth, model, 300, seed=1)
        assert first == score(truth, model, 300, seed=1)
        assert first != score(truth, model, 300, seed=2)


def test_scores_share_no_points_with_the_dataset_of_their_seed():
    truth, model = toy_distribution("GaussiansRot", 3), normal((0, 0), 2.0)
    seen = []

    class Spy:
        sample = None

        def log_probability(self, x):
            seen.append(x)
            return model.log_probability(x)

    kl_divergence(truth, Spy(), 300, seed=0)
    data = ToyDataset("GaussiansRot", 300, 0, num_gaussians=3).data.double()
    assert torch.cdist(torch.cat(seen), data).min() > 1e-6  # float32


def test_scores_of_an_ensemble_are_its_members():
    truth, flow = toy_distribution("GaussiansGrid"), make_flow(2, 3, size=0.1)
    for score in (kl_divergence, total_variation):
        many = score(truth, flow, 9000)  # in parts
        assert many.value.shape == many.standard_error.shape == (3,)
        for i in range(3):
            own = score(truth, flow.member(i), 9000)
            assert many.value[i].item() == pytest.approx(own.value)
            assert many.standard_error[i].item() == pytest.approx(
                own.standard_error
            )


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_entropy_on_a_grid_is_that_of_samples(name):
    truth = toy_distribution(name)
    value, error = entropy(truth, 40_000)
    assert abs(grid_entropy(truth) - value) < 4 * error


def test_entropy_on_a_grid_is_the_closed_form():
    expected = math.log(2 * math.pi * math.e * 0.3**2)
    assert grid_entropy(normal((3, 1), 0.3)) == pytest.approx(
        expected, abs=1e-3
    )


def test_entropy_of_a_flow_is_that_of_its_density_on_a_grid():
    flow = make_flow(2, size=0.1, hidden=8)
    grid = Grid.around(flow.sample(3000), 300, margin=0.4)
    p = flow.density(grid)
    expected = -torch.xlogy(p, p).sum().item() * grid.cell_area
    estimate = entropy(flow, 10_000)
    allowed = 5 * estimate.standard_error + 1e-3
    assert abs(estimate.value - expected) < allowed


def test_entropy_of_an_ensemble_is_its_members():
    flow = make_flow(2, 3, size=0.1)
    many = entropy(flow, 2000)
    for i in range(3):
        own = entropy(flow.member(i), 2000)
        assert many.value[i].item() == pytest.approx(own.value)


# Interval and verdict


@pytest.mark.parametrize("n", [8, 20, 50])
@pytest.mark.parametrize("level", [0.5, 0.95])
def test_bootstrap_is_scipys_percentile_interval(n, level, random):
    """Ends of 10^4 resamples scatter by some 2 per cent of the deviation
    of the mean at 95 per cent; skewed values tell both ends apart."""
    values = random.exponential(size=n) - 0.5
    interval = bootstrap_interval(values, level)
    expected = stats.bootstrap(
        (values,), np.mean, confidence_level=level, n_resamples=10_000,
        method="percentile", rng=1,
    ).confidence_interval  # fmt: skip
    assert isinstance(interval, Interval)
    assert interval.mean == pytest.approx(values.mean())
    allowed = 0.12 * values.std() / n**0.5
    assert interval.low == pytest.approx(expected.low, abs=allowed)
    assert interval.high == pytest.approx(expected.high, abs=allowed)


def test_bootstrap_of_constant_and_of_single_values():
    assert bootstrap_interval([2.0, 2.0, 2.0]) == (2, 2, 2)
    assert bootstrap_interval([3]) == (3, -math.inf, math.inf)


def test_bootstrap_is_a_function_of_its_seed(random):
    values = random.normal(size=20)
    held = values.copy()
    first = bootstrap_interval(values, seed=1)
    assert first == bootstrap_interval(list(values), seed=1)
    assert first != bootstrap_interval(values, seed=2)
    assert (values == held).all()


def test_bootstrap_covers_the_mean_as_often_as_it_says(random):
    """Of 300 intervals of 40 values; the standard error is 1.3 per cent,
    and percentile intervals of 40 values are some 1 to 2 short."""
    hits = 0
    for seed in range(300):
        low, high = bootstrap_interval(
            random.normal(size=40), resamples=500, seed=seed
        )[1:]
        hits += low < 0 < high
    assert 0.87 < hits / 300 < 0.99


@pytest.mark.parametrize("low, high, answer", [
    (0.1, 0.4, "holds"), (-0.4, -0.1, "does not hold"),
    (-0.1, 0.1, "not decided"), (0.0, 0.3, "not decided"),
    (-0.3, 0.0, "not decided"), (-math.inf, math.inf, "not decided"),
])  # fmt: skip
def test_verdict_has_three_answers(low, high, answer):
    interval = Interval((low + high) / 2, low, high)
    assert verdict("More is better", interval) == f"More is better: {answer}"


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
COLUMNS = {"setting", "dist_type", "num_gaussians", "num_samples",
           "num_layers", "hidden", "epochs", "coupling", "jitter", "seed",
           "kl", "kl_se", "valid_loss", "best_epoch", "parameters",
           "seconds", "status"}  # fmt: skip


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
    assert set(table.columns) == COLUMNS
    assert (table.status == "ok").all()
    for k, given in enumerate(SETTINGS):
        for name, value in given.items():
            assert (table[name][table.setting == k] == value).all()
    assert (table.kl_se > 0).all() and (table.seconds > 0).all()
    assert len(results) == 3
    assert all(isinstance(result, TrainingResult) for result in results)


def test_sweep_runs_what_a_hand_would_run(serial):
    """One seed alone: own data, weights and noise; float32."""
    table, results = serial
    for seed in (0, 1):
        dataset = ToyDataset("GaussiansRot", 60, seed, num_gaussians=3)
        flow = CouplingFlow(1, seed=seed, hidden=4)
        result = train(flow, dataset, 2, seed=seed, progress=False)
        score = kl_divergence(dataset.distribution, result.flow, 500)
        row = table.iloc[seed]
        assert row.kl == pytest.approx(score.value, rel=1e-4)
        assert row.kl_se == pytest.approx(score.standard_error, rel=1e-3)
        assert row.valid_loss == pytest.approx(result.best_valid_loss, 1e-4)
        assert row.best_epoch == result.best_epoch
        # Two networks: 1 -> 4 -> 4 -> 1 with their biases.
        assert row.parameters == 2 * (8 + 20 + 5)
    again = kl_divergence(
        toy_distribution("Moons"), results[2].flow, 500
    ).value.tolist()
    assert table.kl[table.setting == 2].tolist() == pytest.approx(again)


@pytest.mark.slow
def test_sweep_in_two_processes_is_the_same(serial):
    assert_same_table(sweep(SETTINGS, n_jobs=2, **OPTIONS), serial[0])


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


def test_diverged_run_says_so(monkeypatch):
    original = CouplingFlow.__init__

    def broken(self, *args, **options):
        original(self, *args, **options)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter[1] = 1e20

    monkeypatch.setattr(CouplingFlow, "__init__", broken)
    table = sweep([setting(bound=None)], n_jobs=1, **OPTIONS)
    assert table.status.tolist() == ["ok", "diverged"]
    assert math.isfinite(table.kl[0])


def interrupting(after):
    """tqdm in which Ctrl-C is pressed after so many settings."""

    def bar(jobs, what, *rest, **options):
        if what != "sweep":
            return tqdm(jobs, what, *rest, **options)
        return (press() if k == after else job for k, job in enumerate(jobs))

    def press():
        raise KeyboardInterrupt

    return bar


def test_interrupt_keeps_the_finished_settings(monkeypatch, serial):
    monkeypatch.setattr(helpers, "tqdm", interrupting(2))
    with pytest.warns(UserWarning, match="interrupted: .* 2 of 3 settings"):
        table, results = sweep(SETTINGS, n_jobs=1, results=True, **OPTIONS)
    assert len(results) == 2
    pd.testing.assert_series_equal(table.kl, serial[0].kl[:4])


def test_interrupt_before_the_first_setting_is_passed_on(monkeypatch):
    monkeypatch.setattr(helpers, "tqdm", interrupting(0))
    with pytest.raises(KeyboardInterrupt):
        sweep(SETTINGS, n_jobs=1, **OPTIONS)


def test_sweep_leaves_its_settings_and_the_threads_alone(serial):
    settings = [dict(s) for s in SETTINGS[:1]]
    torch.set_num_threads(2)
    try:
        sweep(settings, n_jobs=1, **OPTIONS)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert settings == SETTINGS[:1]


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
