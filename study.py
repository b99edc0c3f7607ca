"""Scores, intervals, verdicts, and sweeps over settings.

Every fit is scored against the exact truth, in nats, on fresh points; every
comparison stands on several seeds, with Student's interval.
"""

import contextlib
import copy
import inspect
import math
import warnings
from dataclasses import fields
from functools import partial
from typing import NamedTuple

import joblib
import numpy as np
import pandas as pd
import torch
from scipy.special import stdtr, stdtrit

from checks import (
    brief,
    check_density,
    check_flag,
    check_integer,
    check_number,
    check_values,
)
from helpers import (
    COUPLINGS,
    SCORING,
    CouplingFlow,
    CouplingLayer,
    Density,
    GaussianKDE,
    GaussianMixture,
    Grid,
    LocalKDE,
    ToyDataset,
    one_thread,
    random_generator,
    select_bandwidth,
    sharpen,
    toy_distribution,
)
from memory import Memory
from training import Recipe, TrainingResult, progress_bar, train

# Scores


class Estimate(NamedTuple):
    """A mean and its standard error: floats, or (S,) tensors."""

    value: float
    standard_error: float


def kl_divergence(truth, model, n=100_000, seed=0):
    """KL(truth || model) = E[log truth(x) - log model(x)], x ~ truth, in
    nats: -> Estimate.

    On n fresh points of the truth: a ToyDataset of the same seed shares
    none of them. (Kullback, Leibler 1951)
    """
    return estimate(log_ratios(truth, model, n, seed))


def total_variation(truth, model, n=100_000, seed=0):
    """Half the integral of |truth - model|, from 0 to 1: -> Estimate.

    It equals E[max(0, 1 - model(x) / truth(x))], x ~ truth, which needs no
    grid and no care at a pole of the truth. (Devroye, Gyorfi 1985)
    """
    excess = -torch.expm1(-log_ratios(truth, model, n, seed))
    return estimate(excess.clamp(min=0))


@torch.no_grad()
def entropy(density, n=100_000, seed=0):
    """E[-log p(x)], x ~ p, in nats: -> Estimate. (Cover, Thomas 2006)"""
    check_density(density, "density")
    n = check_integer(n, "n", at_least=2)
    x = density.sample(n, random_generator(seed, SCORING))
    return estimate(-density.log_probability(x).cpu().double())


@torch.no_grad()
def grid_entropy(density, size=300):
    """-sum p log p over size^2 cells around a sample, in nats: -> float.

    In the plane; for a smooth density in like units exact to 0.001; at a pole,
    or where a cell is wider than what it should show, use `entropy`.
    """
    check_density(density, "density")
    around = density.sample(5000)
    grid = Grid.around(around, check_integer(size, "size"), 0.3)
    log_p = density.log_probability(grid.points).cpu().double()
    return -(log_p.exp() * log_p).sum().item() * grid.cell_area


@torch.no_grad()
@one_thread()
def log_ratios(truth, model, n, seed):
    """log truth(x) - log model(x) at n fresh x ~ truth: (n,) or (S, n)."""
    check_density(truth, "truth"), check_density(model, "model")
    n = check_integer(n, "n", at_least=2)
    x = truth.sample(n, random_generator(seed, SCORING))
    ratios = [
        truth.log_probability(part).cpu().double()
        - model.log_probability(part).cpu().double()
        for part in x.split(8192)
    ]
    return torch.cat(ratios, -1)


def first_layers(flow, k):
    """The flow that the first k layers of a flow are: -> CouplingFlow."""
    part = copy.deepcopy(flow)
    part.layers = part.layers[:k]
    return part


def kl_by_layer(truth, flow, n=10_000, seed=0):
    """KL(truth || what stands after 0, 1, ..., K layers): -> list, nats."""
    return [
        kl_divergence(truth, first_layers(flow, k), n, seed).value
        for k in range(len(flow.layers) + 1)
    ]


def estimate(values):
    mean = values.mean(-1)
    error = values.std(-1) / values.shape[-1] ** 0.5
    if values.dim() == 1:
        return Estimate(mean.item(), error.item())
    return Estimate(mean, error)


# Intervals and verdicts


class Interval(NamedTuple):
    """A mean with the ends of its confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self):
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def mean_interval(values, level=0.95):
    """Mean of values (n,) and its Student's t interval: -> Interval.

    For a comparison paired by seed, give the n differences. One value has
    the interval (-inf, inf): it says nothing of its scatter. ValueError
    unless finite. (Student 1908)
    """
    level = check_number(level, "level", 0, 1)
    values = check_values(values)
    n, mean = len(values), float(values.mean())
    if n == 1:
        return Interval(mean, -math.inf, math.inf)
    half = stdtrit(n - 1, (1 + level) / 2) * float(values.std(ddof=1)) / n**0.5
    return Interval(mean, mean - half, mean + half)


def holm_intervals(comparisons, level=0.95):
    """Intervals of several comparisons that are read together: {claim:
    differences (n,)} -> {claim: Interval}, whose verdicts are all true with
    probability level or more.

    The k-th smallest of m p-values stands if it and those before it are
    below (1 - level) / (m - k + 1), and its interval has that level; the
    others have the level at which the first of them failed. (Holm 1979)
    """
    level = check_number(level, "level", 0, 1)
    if not isinstance(comparisons, dict):
        raise TypeError(
            "comparisons must be a dict of lists of numbers, "
            f"got {brief(comparisons)}"
        )
    alpha = {}
    for claim, values in comparisons.items():
        values = check_values(values)
        n, mean = len(values), abs(values.mean())
        error = values.std(ddof=1) / n**0.5 if n > 1 else math.inf
        t = mean / error if error > 0 else math.inf if mean else 0.0
        alpha[claim] = 2 * stdtr(n - 1, -t) if n > 1 else 1.0
    intervals, allowed, failed = {}, 1 - level, False
    for k, claim in enumerate(sorted(alpha, key=alpha.get)):
        if not failed:
            allowed = (1 - level) / (len(alpha) - k)
            failed = alpha[claim] >= allowed
        intervals[claim] = mean_interval(comparisons[claim], 1 - allowed)
    return {claim: intervals[claim] for claim in comparisons}


def verdict(claim, interval):
    """A claim that a mean difference is positive, judged by its interval:
    -> "claim: supported", "claim: reversed" (it is negative), or "claim:
    undecided" where the interval contains 0, and the interval."""
    if not isinstance(interval, Interval):
        raise TypeError(f"interval must be an Interval, got {brief(interval)}")
    answer = "undecided"
    if interval.low > 0:
        answer = "supported"
    if interval.high < 0:
        answer = "reversed"
    return f"{claim}: {answer}, {interval}"


def in_words(interval):
    """An interval of gains, as people say it: "better by", "worse by", or
    "cannot tell" where it contains 0."""
    mean, low, high = interval
    if low > 0:
        return f"better by {interval}"
    if high < 0:
        return f"worse by {Interval(-mean, -high, -low)}"
    return f"cannot tell: gain in [{low:.3f}, {high:.3f}]"


def in_factors(interval):
    """An interval of gains in log KL, as what the KL is multiplied by."""
    word = "smaller" if interval.low > 0 else "larger"
    if interval.low <= 0 <= interval.high:
        word = "cannot tell"
    mean, high, low = np.exp(np.negative(interval))
    return f"{word}: × {mean:.2f} [{low:.2f}, {high:.2f}]"


def table_of_means(values):
    """{row: {column: values (n,)}} -> DataFrame of means and intervals."""
    return pd.DataFrame(
        {
            row: {column: str(mean_interval(v)) for column, v in of.items()}
            for row, of in values.items()
        }
    ).T


def table_of_gains(gains, words=in_words):
    """{row: {column: gains (n,)}}, all of them read together (Holm) ->
    DataFrame of what they say."""
    flat = {(r, c): v for r, of in gains.items() for c, v in of.items()}
    told = holm_intervals(flat)
    return pd.DataFrame(
        {
            row: {column: words(told[row, column]) for column in of}
            for row, of in gains.items()
        }
    ).T


# Sweeps

# What the course's helper file does: a free log-scale, Adam on batches of 64
# that are never shuffled, and the last weights.
COURSE = {
    "bound": None, "start": "uniform", "learning_rate": 1e-3, "beta2": 0.999,
    "batch_size": 64, "warmup": 0, "cosine": False, "standardize": False,
    "jitter": 0, "sharpened": False, "average": 0, "shuffle": False,
    "tolerance": math.inf,
}  # fmt: skip


def sweep(
    settings, seeds=8, *, points=100_000, n_jobs=-1, results=False,
    progress=True,
):  # fmt: skip
    """Train an ensemble for every setting: -> DataFrame, a row a run.

    settings: dicts with arguments of ToyDataset (dist_type may be a density,
    or a list with one for each seed), CouplingFlow and train. seeds: how
    many, 0, 1, ..., or a range; each has its own data, weights and noise.
    Columns: setting (its index), the settings, seed, kl and kl_se (nats, of
    the weights used, on as many fresh points), valid_loss (nats) and
    best_epoch of the lowest held-out loss, parameters, seconds (CPU, one
    member's share), status: "ok", or what went wrong. results=True: ->
    (table, a TrainingResult a setting, None for a failure).
    The settings run in n_jobs processes (-1: one a core), or where
    joblib.parallel_config sends them, and are kept in runs/, or $RUNS, as
    soon as they are ready, if that can be written and is not empty; but for
    densities of your own class. A KeyboardInterrupt returns what was ready.

    >>> setting = {"dist_type": "Moons", "num_layers": 1, "epochs": 2}
    >>> table = sweep([setting], seeds=2, points=100, progress=False)
    >>> table.status.tolist()
    ['ok', 'ok']
    """
    seeds = check_seeds(seeds)
    check_settings(settings, len(seeds)), check_jobs(n_jobs)
    check_integer(points, "points", at_least=2)
    check_flag(results, "results"), check_flag(progress, "progress")
    run = partial(run_setting, seeds=seeds, points=points)
    memory = Memory([*seeds], points)
    parallel = joblib.Parallel(n_jobs, return_as="generator_unordered")
    done = each_once(run, settings, memory, parallel, progress)
    if len(done) < len(settings):
        if not done:
            raise KeyboardInterrupt
        got = f"{len(done)} of {len(settings)} settings"
        warnings.warn(f"interrupted: returning {got}", stacklevel=2)
    rows = [{"setting": k, **row} for k in sorted(done) for row in done[k][0]]
    trained = [done.get(k, (None, None))[1] for k in range(len(settings))]
    return (pd.DataFrame(rows), trained) if results else pd.DataFrame(rows)


def each_once(run, settings, memory, parallel, progress=True):
    """{index: run(index, setting)}: what the memory has, and then the others,
    in parallel, each kept as soon as it is ready. After a KeyboardInterrupt
    some are missing."""
    done = memory.recall(settings)
    todo = [k for k in range(len(settings)) if k not in done]
    jobs = (joblib.delayed(run)(k, settings[k]) for k in todo)
    bar = progress_bar(
        progress, parallel(jobs) if todo else (), "sweep", len(settings),
        initial=len(done), unit="setting",
        postfix=f"{len(done)} remembered",
    )  # fmt: skip
    with contextlib.suppress(KeyboardInterrupt):
        for k, ready in bar:
            done[k] = ready
            memory.keep(settings[k], ready)
    return done


def table_of_pairs(pairs, first, second):
    """{row: (Fit, Fit)} -> DataFrame: the KL of both in nats, median and
    range, and by what the second multiplies it (log KL, paired, Holm)."""
    pairs = {row: tuple(pair) for row, pair in pairs.items()}
    gains = {
        row: {f"{second} against {first}": a.log_kl() - b.log_kl()}
        for row, (a, b) in pairs.items()
    }
    table = table_of_gains(gains, in_factors)
    for k, name in enumerate((first, second)):
        spreads = [pair[k].spread for pair in pairs.values()]
        table.insert(k, f"KL, {name}", spreads)
    return table


def turned_mixture(d, seed, gaussians=5):
    """Gaussians of standard deviations from 0.2 to 1 along random axes, with
    means on a sphere of radius 2.5: a truth for d dimensions."""
    random = np.random.default_rng(seed)
    means = random.normal(size=(gaussians, d))
    means *= 2.5 / np.linalg.norm(means, axis=1, keepdims=True)
    turn = np.linalg.qr(random.normal(size=(gaussians, d, d)))[0]
    C = turn * np.geomspace(0.2, 1, d) ** 2 @ turn.swapaxes(1, 2)
    return GaussianMixture(means, covariances=(C + C.swapaxes(1, 2)) / 2)


class Fit(NamedTuple):
    """A setting, trained: its truth (or truths, one a seed), its
    TrainingResult, and its runs, a row a seed."""

    truth: Density | list
    result: TrainingResult
    runs: pd.DataFrame

    @property
    def kl(self):
        """KL of every seed, (S,), in nats; inf where it is not a number."""
        return self.runs.kl.fillna(math.inf).to_numpy()

    @property
    def spread(self):
        """Median and range of the KL, as text."""
        kl = self.kl
        return f"{np.median(kl):.3f} ({kl.min():.3g}–{kl.max():.3g})"

    def log_kl(self, most=1.0):
        """Of every seed. Above `most` nats a fit has failed, and by how much
        is a matter of a few points: it counts as `most`."""
        return np.log(self.kl.clip(max=most))

    @property
    def middle(self):
        """The seed whose KL is in the middle."""
        return int(self.kl.argsort()[len(self.kl) // 2])

    @property
    def flow(self):
        """The flow of that seed."""
        return self.result.flow.member(self.middle)


def train_all(settings, seeds=8, points=100_000):
    """{label: setting} -> {label: Fit}, by `sweep`. RuntimeError where a
    setting could not be trained."""
    table, results = sweep([*settings.values()], seeds, points=points,
                           results=True)  # fmt: skip
    fits = {}
    for k, (label, setting) in enumerate(settings.items()):
        runs = table[table.setting == k]
        if results[k] is None:
            raise RuntimeError(f"{label}: {[*runs.status] or 'interrupted'}")
        truth = setting["dist_type"]
        if isinstance(truth, str):
            truth = toy_distribution(truth, setting.get("num_gaussians", 5))
        fits[label] = Fit(truth, results[k], runs)
    return fits


def kernel_estimates(x):
    """Of points (N, d): one h by leave-one-out; 1.5 h sqrt(2 / d) on
    sharpened points; a width of its own on each point; h times a root of the
    covariance. The last three only up to 10 000 points: the work of two of
    them grows with N^2."""
    h = select_bandwidth(x)
    wide = 1.5 * h * math.sqrt(2 / x.shape[1])
    if len(x) > 10_000:
        return {"one h": GaussianKDE(x, h)}
    root = torch.linalg.cholesky(torch.cov(x.T))
    white = torch.linalg.solve_triangular(root, x.T, upper=False).T
    return {
        "one h": GaussianKDE(x, h),
        "sharpened": GaussianKDE(sharpen(x, wide), wide),
        "local width": LocalKDE(x),
        "shape of the covariance": GaussianKDE(
            x, select_bandwidth(white) * root
        ),
    }


def kernel_kl(jobs):
    """KL(truth || each of the kernel_estimates) in nats, of jobs (truth, n,
    seed, points), whose ToyDataset is estimated: -> {job: {estimate: KL}}.
    On all cores, and remembered as sweep's settings are."""
    names = "dist_type", "num_samples", "seed", "points"
    settings = [dict(zip(names, job, strict=True)) for job in jobs]
    parallel = joblib.Parallel(
        -1, return_as="generator_unordered", prefer="threads"
    )
    memory = Memory("kernel_kl")
    done = each_once(run_kernels, settings, memory, parallel)
    if len(done) < len(jobs):
        raise KeyboardInterrupt
    return {job: done[k] for k, job in enumerate(jobs)}


def run_kernels(index, setting):
    """-> index, {estimate: KL}."""
    truth, n, seed, points = setting.values()
    x = ToyDataset(truth, n, seed).data.double()
    return index, {
        kind: kl_divergence(truth, f, points).value
        for kind, f in kernel_estimates(x).items()
    }


def run_setting(index, setting, seeds, points):
    """One ensemble, a member a seed: -> index, (rows, TrainingResult or
    None)."""
    kind = setting["dist_type"]
    kinds = kind if isinstance(kind, list) else [kind] * len(seeds)
    rows = [{**setting, "dist_type": kind, "seed": seed}
            for kind, seed in zip(kinds, seeds, strict=True)]  # fmt: skip
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the row says who diverged
            result, kl = run_ensemble(setting, kinds, seeds, points)
    except Exception as error:
        names = "kl kl_se valid_loss best_epoch parameters seconds".split()
        for row in rows:
            row |= dict.fromkeys(names, math.nan)
            row["status"] = f"{type(error).__name__}: {error}"
        return index, (rows, None)
    size = sum(p.numel() for p in result.flow.parameters()) // len(seeds)
    for i, row in enumerate(rows):
        row |= {
            "kl": kl.value[i].item(),
            "kl_se": kl.standard_error[i].item(),
            "valid_loss": result.best_valid_loss[i].item(),
            "best_epoch": result.best_epoch[i].item(),
            "parameters": size,
            "seconds": result.seconds / len(seeds),
            "status": "diverged" if result.diverged[i] else "ok",
        }
    return index, (rows, result)


def run_ensemble(setting, kinds, seeds, points):
    data_options, flow_options, train_options = (
        {name: setting[name] for name in setting if name in known}
        for known in ROUTES
    )
    data = [
        ToyDataset(**data_options | {"dist_type": kind}, seed=s)
        for kind, s in zip(kinds, seeds, strict=True)
    ]
    flow = CouplingFlow(
        members=len(seeds), seed=seeds[0], dim=data[0].data.shape[1],
        **flow_options,
    )  # fmt: skip
    result = train(flow, data, seed=seeds[0], progress=False, **train_options)
    if result.interrupted:  # half a training is not a result
        raise KeyboardInterrupt
    if not isinstance(setting["dist_type"], list):
        kl = kl_divergence(data[0].distribution, result.flow, points)
        return result, kl
    kls = [
        kl_divergence(x.distribution, result.flow.member(i), points)
        for i, x in enumerate(data)
    ]
    return result, Estimate(*torch.tensor(kls, dtype=torch.float64).T)


def names_of(*functions):
    """The names of their arguments that a setting may have."""
    names = [n for f in functions for n in inspect.signature(f).parameters]
    return set(names) - {"seed", "members", "options", "mask", "dim"}


# Which of a setting's names go to the data, to the flow and to train.
ROUTES = (
    names_of(ToyDataset),
    names_of(CouplingFlow, CouplingLayer, *COUPLINGS.values()),
    {"epochs", *(field.name for field in fields(Recipe))},
)


def check_seeds(seeds):
    """As a range."""
    if not isinstance(seeds, (range, list, tuple)):
        seeds = range(check_integer(seeds, "seeds"))
    ranged = isinstance(seeds, range) and seeds.start >= 0 == seeds.step - 1
    if not ranged or not seeds:
        raise ValueError(
            "seeds must be how many, or a range as range(8, 16), "
            f"got {brief(seeds)}"
        )
    return seeds


def check_jobs(n_jobs):
    """What joblib takes: not 0; below 0, counted from all cores."""
    if check_integer(n_jobs, "n_jobs", at_least=-math.inf) == 0:
        raise ValueError(f"n_jobs must not be 0, got {n_jobs}")


def check_settings(settings, seeds):
    dicts = isinstance(settings, (list, tuple)) and len(settings)
    if not (dicts and all(isinstance(s, dict) for s in settings)):
        raise TypeError(
            "settings must be a non-empty list of dicts, "
            f"got {brief(settings)}"
        )
    known = set().union(*ROUTES)
    for setting in settings:
        unknown = setting.keys() - known
        missing = {"dist_type", "num_layers", "epochs"} - setting.keys()
        if unknown or missing:
            raise ValueError(
                f"setting {brief(setting)} has unknown keys "
                f"{sorted(unknown, key=str)} and lacks {sorted(missing)}; "
                f"known: {', '.join(sorted(known))}"
            )
        kind = setting["dist_type"]
        if isinstance(kind, list) and len(kind) != seeds:
            raise ValueError(
                f"dist_type must be a density, or a list of {seeds}, one for "
                f"each seed, got {len(kind)}"
            )
