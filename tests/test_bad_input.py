"""Every public name refuses what it cannot use: at once, by the argument's
name and value. Each kind of wrong value once, then each argument once."""

import math
import re
import time

import numpy as np
import pytest
import torch

from helpers import (
    COUPLINGS,
    DISTRIBUTIONS,
    Circles,
    CouplingFlow,
    CouplingLayer,
    GaussianKDE,
    GaussianMixture,
    Grid,
    Moons,
    Spiral,
    ToyDataset,
    check_counts,
    leave_one_out,
    reference_bandwidth,
    select_bandwidth,
    sharpen,
    toy_distribution,
)
from study import (
    entropy,
    grid_entropy,
    holm_intervals,
    kl_divergence,
    mean_interval,
    sweep,
    total_variation,
    verdict,
)
from training import Recipe, train

NAN, INF = math.nan, math.inf
POINTS = torch.randn(
    20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64
)
ONE_NAN, ONE_INF = POINTS.clone(), POINTS.clone()
ONE_NAN[3, 1], ONE_INF[4, 0] = NAN, INF
WIDE, FLAT = torch.zeros(20, 3), torch.zeros(20)
TRUTH, KDE, UNIT = Circles(), GaussianKDE(POINTS, 0.3), Grid((0, 1), (0, 1), 4)
SOLID = GaussianMixture(torch.eye(3), 1.0)
FLOW, MANY, DEEP = CouplingFlow(1), CouplingFlow(1, 3), CouplingFlow(1, dim=3)
GOOD = dict(dist_type="Moons", num_layers=1, epochs=1, num_samples=9)


def fit(flow=FLOW, data=POINTS, epochs=1, **options):
    return train(flow, data, epochs, **{"progress": False} | options)


def study(settings=None, **options):
    options = {"seeds": 1, "points": 9, "progress": False} | options
    return sweep([GOOD] if settings is None else settings, **options)


def each(call, name, *values):
    """The message of each wrong value holds the name, then the value."""
    return [(lambda v=v: call(v), name, re.escape(repr(v))) for v in values]


# fmt: off
KINDS = [
    *each(TRUTH.sample, "n", 0, -3, 2.5, True, "7", None, NAN),
    *each(Circles, "sigma", 0, -0.5, NAN, INF, True, "1", None),
    *each(lambda v: fit(shuffle=v), "shuffle", 0, 1, None, "yes"),
    *each(lambda v: TRUTH.sample(3, v), "seed",
          -1, 0.5, True, "0", None, 1 << 32),
    *[(lambda x=x: TRUTH.log_probability(x), "x", value) for x, value in (
        (FLAT, r"shape .*\(20,\)"), (WIDE, r"\(n, 2\).*\(20, 3\)"),
        (torch.zeros(0, 2), r"\(0, 2\)"), (ONE_NAN, "nan"), (ONE_INF, "inf"),
        (POINTS.to(torch.complex128), "complex"), (POINTS > 0, "bool"),
        ([[1, 2], [3]], r"\[3\]"), ("points", "points"), (None, "None"),
        (7, r"\(\)"), (torch.zeros(2, 20, 2), r"\(2, 20, 2\)"),
    )],
    *[(lambda v=v: Grid(v, (0, 1)), "xlim", re.escape(repr(v))) for v in (
        (1, 0), (1, 1), (0, NAN), (-INF, INF), (1,), (0, 1, 2), "ab", None)],
    *each(toy_distribution,
          "dist_type.*" + ", ".join(DISTRIBUTIONS),
          "Moon", "circles", None, 3, ["Moons"]),
    *each(lambda c: leave_one_out(POINTS, c), "candidates",
          [], 0.3, None, [[0.1]]),
    *[(lambda b=b: leave_one_out(POINTS, [0.1, b]), "candidates", str(b))
      for b in (0.0, -1.0, NAN, INF, "a", None, True)],
    *each(CouplingLayer, "mask", [1, 1], [0, 0], [1, 0, 1], [], "10", None, 3,
          (2, 0)),
    *[(lambda H=H: GaussianKDE(POINTS, H), "H", value) for H, value in (
        (np.array([[1.0, 2.0], [2.0, 4.0]]), r"\[2\., 4\.\]"), (0, "0"),
        (np.eye(3), r"2 x 2.*1\."), (np.ones((3, 2)), r"\[1\., 1\.\]"),
        ([[NAN, 0], [0, 1]], "nan"), ([1.0, 1.0], r"\(2,\)"))],
    *[(lambda C=C: GaussianMixture(torch.eye(2), covariances=C),
       "covariances", value) for C, value in (
        (np.eye(2), r"\(2, 2, 2\)"), (-np.ones((2, 2, 2)), "-1"),
        (np.array([[[1, 2], [0, 1]]] * 2), "symmetric"),
        (np.full((2, 2, 2), NAN), "nan"))],
    *[(lambda v=v: mean_interval(v), "values", value) for v, value in (
        ("abc", "abc"), (3, "3"), (None, "nan"), ([], r"\[\]"),
        ([1, NAN], "nan"), ([1, INF], "inf"), ([[1, 2]], r"\[1\., 2\.\]"))],
]
ARGUMENTS = [
    *each(lambda n: check_counts(epochs=n), "epochs", 0),
    # Densities
    *each(KDE.sample, "n", 0), *each(FLOW.sample, "n", 0),
    *each(FLOW.sample_x_each_layer, "n", 1.5),
    *each(lambda s: FLOW.sample(3, s), "seed", -1),
    *each(lambda n: ToyDataset("Moons", n), "num_samples", 0),
    *each(lambda s: ToyDataset("Moons", 3, s), "seed", -1),
    *each(lambda k: ToyDataset("Moons", 3, 0, k), "num_gaussians", 0),
    *each(ToyDataset, "dist_type", "Moon"),
    *each(Moons, "sigma", 0), *each(Spiral, "sigma", 0),
    *each(lambda s: GaussianMixture(POINTS, s), "sigma", 0),
    (lambda: GaussianMixture(ONE_NAN, 1.0), "means", "nan"),
    (lambda: GaussianMixture(POINTS), "sigma or covariances", "None"),
    (lambda: GaussianMixture([(0, 0)], 1.0, [np.eye(2)]), "sigma", "1.0"),
    *[(lambda m=m, x=x: m.log_probability(x), "x", value)
      for m, x, value in (
          (KDE, WIDE, r"\(n, 2\)"), (FLOW, WIDE, r"\(n, 2\)"),
          (MANY, WIDE, r"\(3, n, 2\)"), (SOLID, POINTS, r"\(n, 3\)"),
          (DEEP, POINTS, r"\(n, 3\)"))],
    *each(TRUTH.density, "grid", None), *each(KDE.density, "grid", 100),
    *each(FLOW.density, "grid", "grid"),
    (lambda: SOLID.density(UNIT), "grid", "dim 3"),
    *each(lambda v: Grid((0, 1), v), "ylim", (1, 0)),
    *each(lambda n: Grid((0, 1), (0, 1), n), "size", 0),
    (lambda: Grid.around(WIDE), "samples", r"\(20, 3\)"),
    *each(lambda m: Grid.around(POINTS, margin=m), "margin", -0.1),
    (lambda: UNIT.image(np.zeros(15)), "values", r"\(15,\)"),
    # Kernel estimation
    (lambda: GaussianKDE(FLAT, 0.3), "samples", r"\(20,\)"),
    *[(lambda f=f: f(FLAT), "samples", r"\(20,\)")
      for f in (reference_bandwidth, select_bandwidth,
                lambda x: leave_one_out(x, [1.0]), lambda x: sharpen(x, 1))],
    *[(lambda f=f: f(POINTS[:1]), "samples", "1$")
      for f in (reference_bandwidth, select_bandwidth,
                lambda x: leave_one_out(x, [1.0]))],
    (lambda: select_bandwidth(torch.ones(5, 2)), "samples", r"\[1.0, 1.0\]"),
    *each(lambda c: select_bandwidth(POINTS, c), "candidates", []),
    *each(lambda h: sharpen(POINTS, h), "h", 0),
    *each(lambda s: sharpen(POINTS, 0.1, s), "step", 0),
    # Flows
    *each(CouplingFlow, "num_layers", 0),
    *each(lambda n: CouplingFlow(1, n), "members", 0),
    *each(lambda n: CouplingLayer([1, 0], n), "members", 0),
    *each(lambda d: CouplingFlow(1, dim=d), "dim", 1, 2.5),
    *each(lambda s: CouplingFlow(1, seed=s), "seed", -1),
    *each(lambda s: CouplingLayer([1, 0], seed=s), "seed", -1),
    *each(lambda v: CouplingFlow(1, coupling=v),
          "coupling.*" + ", ".join(COUPLINGS), "linear"),
    *each(lambda v: CouplingFlow(1, start=v), "start.*spread, uniform", "0"),
    *each(lambda v: CouplingFlow(1, hidden=v), "hidden", 0),
    *each(lambda v: CouplingFlow(1, bound=v), "bound", 0),
    *each(lambda v: CouplingFlow(1, coupling="spline", bins=v), "bins", 1, 65),
    *each(lambda v: CouplingFlow(1, coupling="spline", interval=v),
          "interval", 0),
    (lambda: CouplingFlow(1, coupling="spline", bound=1.0), "bound", ""),
    (lambda: CouplingFlow(1, wings=8), "wings", ""),
    (lambda: FLOW.forward(WIDE), "z", r"\(20, 3\)"),
    (lambda: FLOW.inverse(WIDE), "x", r"\(20, 3\)"),
    (lambda: MANY.inverse(POINTS.expand(2, 20, 2)), "x",
     r"\(3, n, 2\).*\(2, 20, 2\)"),
    *each(FLOW.member, "i", 1), *each(MANY.member, "i", 3, -1),
    # Training
    *each(lambda f: fit(f), "flow", None, 3),
    (lambda: fit(CouplingLayer([1, 0])), "flow", "CouplingLayer"),
    (lambda: fit(data=WIDE), "data", r"\(n, 2\).*\(20, 3\)"),
    (lambda: fit(DEEP), "data", r"\(n, 3\).*\(20, 2\)"),
    (lambda: fit(data=POINTS * 1e300), "data", "inf"),
    (lambda: fit(data=POINTS[:2]), "data", "2 with valid_fraction 0.1"),
    (lambda: fit(MANY, POINTS.expand(2, 20, 2)), "data", r"\(2, 20, 2\)"),
    (lambda: fit(MANY, [POINTS] * 4), "data", "3 sets.*4 of shapes"),
    (lambda: fit(MANY, [POINTS, POINTS, POINTS[:9]]), "data",
     r"one size.*\(9, 2\)"),
    (lambda: fit(MANY, [POINTS, POINTS, ONE_NAN]), "data", "nan"),
    (lambda: fit(MANY, [None, POINTS, POINTS]), "data", "None"),
    (lambda: fit(MANY, []), "data", r"\(0,\)"),
    *each(lambda n: fit(epochs=n), "epochs", 0),
    *each(lambda s: fit(seed=s), "seed", -1),
    *each(lambda s: fit(progress=s), "progress", 1),
    (lambda: fit(speed=3), "speed", ""),
    *[case for name, values in (
        ("batch_size", (0, 2.5)), ("learning_rate", (0, INF)),
        ("beta2", (-0.1, 1)), ("warmup", (-0.1, 1)), ("average", (1, True)),
        ("jitter", (-0.1, INF)), ("valid_fraction", (0, 1)), ("cosine", (1,)),
        ("shuffle", (1,)), ("sharpened", (1,)), ("tolerance", (1,)),
    ) for case in each(lambda v, n=name: Recipe(**{n: v}), name, *values)],
    # Scores and studies
    *[case for score in (kl_divergence, total_variation) for case in (
        *each(lambda t, s=score: s(t, KDE), "truth", None),
        *each(lambda m, s=score: s(TRUTH, m), "model", "Moons"),
        *each(lambda n, s=score: s(TRUTH, KDE, n), "n", 1),
        *each(lambda v, s=score: s(TRUTH, KDE, 9, v), "seed", -1))],
    *each(entropy, "density", None), *each(grid_entropy, "density", None),
    *each(lambda n: entropy(TRUTH, n), "n", 1),
    *each(lambda s: entropy(TRUTH, 9, s), "seed", -1),
    *each(lambda n: grid_entropy(TRUTH, n), "size", 0),
    *each(lambda v: mean_interval([1, 2], v), "level", 0, 1, NAN, "0.9"),
    *each(lambda v: holm_intervals({"a": [1, 2]}, v), "level", 1),
    (lambda: holm_intervals({"a": [1, NAN]}), "values", "nan"),
    *each(lambda i: verdict("claim", i), "interval", None, (0.1, 0.0, 0.2)),
    *each(study, "settings", [], GOOD, "Moons", [3]),
    (lambda: study([GOOD | {"dept": 3}]), "setting", "dept.*num_layers"),
    (lambda: study([GOOD | {"seed": 3}]), "setting", "seed"),
    (lambda: study([{"dist_type": "Moons", "epochs": 1}]), "setting",
     r"lacks \['num_layers'\]"),
    *each(lambda n: study(seeds=n), "seeds", 0),
    *each(lambda n: study(points=n), "points", 1),
    *each(lambda v: study(results=v), "results", 2),
    *each(lambda v: study(progress=v), "progress", 2),
    *each(lambda v: study(n_jobs=v), "n_jobs", 0, 1.5),
]
# fmt: on


@pytest.mark.parametrize(
    "call, name, value",
    [
        pytest.param(*case, id=f"{k} {case[1]} {case[2]}"[:50])
        for k, case in enumerate(KINDS + ARGUMENTS)
    ],
)
def test_bad_argument_is_refused_by_name_and_value(call, name, value):
    held, start = POINTS.clone(), time.process_time()
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    assert time.process_time() - start < 1
    message = str(error.value)
    assert re.search(rf"\b{name}", message, re.DOTALL), message
    assert re.search(value, message, re.DOTALL), message
    assert torch.equal(held, POINTS)
