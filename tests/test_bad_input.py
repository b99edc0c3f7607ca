"""Every public name refuses what it cannot use: at once, by the argument's
name and value."""

import math
import re
import time
from collections import namedtuple
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

import checks as c
import helpers as h
import study as s
from training import Recipe, train

# A value, and what the message says of it:
Says = namedtuple("Says", "value words")


NAN, INF = math.nan, math.inf
POINTS = torch.randn(
    20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64
)
ONE_NAN, ONE_INF = POINTS.clone(), POINTS.clone()
ONE_NAN[3, 1], ONE_INF[4, 0] = NAN, INF
MASKED = np.ma.masked_array(np.ones((2, 2, 2)), np.eye(2)[None].repeat(2, 0))
HUGE, TINY = (
    Says(POINTS * 1e160, r"1e\+150 of 0, got .*e\+160"),
    POINTS * 1e-160,
)
TABLES = [  # of a column of numbers and one of something else
    Says(pd.DataFrame({"a": [1.0, 2.0], "b": pd.Series(odd)}), where)
    for odd, where in [
        ([True, False], r"True at \[0, 1\]"),
        (["u", "v"], r"'u' at \[0, 1\]"),
        (pd.Categorical(["u", "v"]), r"'u' at \[0, 1\]"),
        (pd.array([1, None]), r"<NA> at \[1, 1\]"),
        (pd.to_datetime(["2020", "2021"]), r"2020.* at \[0, 1\]"),
    ]
]
WIDE, FLAT, ONE = torch.zeros(20, 3), torch.zeros(20), POINTS[:1]
TRUTH, KDE = h.Circles(), h.GaussianKDE(POINTS, 0.3)
SOLID, UNIT = h.GaussianMixture(np.eye(3), 1.0), h.Grid((0, 1), (0, 1), 4)
FLOW, MANY = h.CouplingFlow(1), h.CouplingFlow(1, 3)
DEEP = h.CouplingFlow(1, dim=3)
SETTING = dict(dist_type="Moons", num_layers=1, epochs=1, num_samples=9)


def words(value):
    """What a message says of a value: it, or of an array what is wrong."""
    if isinstance(value, torch.Tensor):
        if value.is_complex() or value.dtype == torch.bool:
            return "complex|bool"
        if not value.isfinite().all():
            return r"\b(nan|inf)\b"
        value = tuple(value.shape)
    return re.escape(c.brief(value))


# A call that works; for each of its arguments, values that do not.
# fmt: off
CALLS = [
    (h.Circles, dict(sigma=0.1), dict(
        sigma=[0, -0.5, NAN, INF, True, "1", None, 1e-200, 1e200,
               Says(torch.tensor(0.0), "0.0"), Says(np.bool_(1), "True")])),
    (h.Moons, dict(sigma=0.1), dict(sigma=[0, 1e-9])),
    (h.Spiral, dict(sigma=0.1), dict(sigma=[0])),
    (TRUTH.sample, dict(n=3, seed=0), dict(
        n=[0, -3, 2.5, True, "7", None, NAN],
        seed=[-1, 0.5, True, "0", None, 1 << 32])),
    (TRUTH.log_probability, dict(x=POINTS), dict(
        x=[FLAT, WIDE, torch.zeros(0, 2), ONE_NAN, ONE_INF, POINTS > 0,
           POINTS.to(torch.complex128), Says([[1, 2], [3]], r"\[3\]"),
           "points", None, Says(7, r"\(\)"), torch.zeros(2, 20, 2),
           Says([[1, 10**400]], "10000"), [["1", "2"]], *TABLES])),
    (KDE.log_probability, dict(x=POINTS), dict(x=[WIDE])),
    (FLOW.log_probability, dict(x=POINTS), dict(x=[WIDE])),
    (MANY.log_probability, dict(x=POINTS), dict(x=[
        Says(WIDE, r"\(3, n, 2\)"), torch.zeros(2, 20, 2)])),
    (SOLID.log_probability, dict(x=WIDE), dict(x=[POINTS])),
    (DEEP.log_probability, dict(x=WIDE), dict(x=[POINTS])),
    (TRUTH.density, dict(grid=UNIT), dict(grid=[None])),
    (KDE.density, dict(grid=UNIT), dict(grid=[100])),
    (FLOW.density, dict(grid=UNIT), dict(grid=["grid"])),
    (SOLID.density, None, dict(grid=[Says(UNIT, "dim 3")])),
    (h.GaussianKDE(WIDE, 1.0).density, None, dict(
        grid=[Says(UNIT, "dim 3")])),
    (lambda dist_type: h.toy_distribution(dist_type), dict(
        dist_type="Moons"), dict(dist_type=["Moon", ["Moons"]])),
    (h.ToyDataset, dict(dist_type="Moons", num_samples=3), dict(
        dist_type=[Says(v, f"{', '.join(h.DISTRIBUTIONS)}.*{v}")
                   for v in ("Moon", "circles", None, 3)],
        num_samples=[0], seed=[-1], num_gaussians=[0])),
    (h.GaussianMixture, dict(means=POINTS, sigma=1.0), dict(
        means=[ONE_NAN, HUGE], sigma=[0, None],
        covariances=[Says(np.ones((20, 2, 2)), r"\(20, 2, 2\)")])),
    (partial(h.GaussianMixture, np.eye(2)), dict(covariances=[np.eye(2)] * 2),
     dict(covariances=[
        Says(np.eye(2), r"\(2, 2, 2\)"), Says(-np.ones((2, 2, 2)), "-1"),
        Says([[[1, 2], [0, 1]]] * 2, "symmetric"),
        Says([[[1e-9, 9e-10], [-9e-10, 1e-9]]] * 2, "symmetric"),
        Says(np.full((2, 2, 2), NAN), "nan"), "abc", [[1], [1, 2]],
        Says(MASKED, "masked"), Says([None, None], r"None at \[0\]"),
        torch.ones(2, 2, 2).bool(), torch.ones(2, 2, 2) * 1j])),
    (h.Grid, dict(xlim=(0, 1), ylim=(0, 1), size=9), dict(
        xlim=[(1, 0), (1, 1), (0, NAN), (-INF, INF), (1,), "ab", None,
              (-1e160, 1e160), (1e16, 1e16 + 4), (0, 5e-324)],
        ylim=[(1, 0)], size=[0])),
    (h.Grid.around, dict(samples=POINTS), dict(
        samples=[WIDE], margin=[-0.1])),
    (UNIT.image, dict(values=np.zeros(16)), dict(
        values=[torch.zeros(15)])),
    (c.check_counts, dict(epochs=1), dict(epochs=[0])),
    # Kernel estimation
    (h.GaussianKDE, dict(samples=POINTS, H=1), dict(
        samples=[FLAT, HUGE], H=[
        0, 1e-200, 1e200, [[0, 0], [0, 1]], Says(np.eye(2) * 1e-200, "2 x 2"),
        [[1], [1, 2]], "abc", [[1.0, 2.0], [2.0, 4.0]],
        Says(np.eye(3), r"2 x 2.*1\.0"),
        Says(np.ones((3, 2)), r"\[1\.0, 1\.0\]"),
        Says([[NAN, 0], [0, 1]], "nan"), Says([1.0, 1.0], "np.diag")])),
    (KDE.sample, dict(n=1), dict(n=[0])),
    (h.reference_bandwidth, dict(samples=POINTS), dict(
        samples=[FLAT, Says(ONE, "1$"), HUGE, Says(TINY, "must differ")])),
    (h.LocalKDE, dict(samples=POINTS, neighbours=3), dict(
        samples=[FLAT, Says(ONE, "1$"), ONE_NAN, "points",
                 Says(torch.ones(5, 2), r"\[1.0, 1.0\]")],
        neighbours=[0, 2.5, "3", None])),
    (h.select_bandwidth, dict(samples=POINTS, candidates=[1.0]), dict(
        samples=[FLAT, Says(ONE, "1$"), HUGE, Says(TINY, "must differ")],
        candidates=[[], Says([1e-200, 0.3], "1e-200"), "abc",
                    Says([[1], [1, 2]], r"\[1\]")])),
    (h.select_bandwidth, dict(samples=POINTS), dict(
        samples=[Says(torch.ones(5, 2), r"\[1.0, 1.0\]")])),
    (h.leave_one_out, dict(samples=POINTS, candidates=[1.0]), dict(
        samples=[FLAT, Says(ONE, "1$")],
        candidates=[[], 0.3, None, Says([[0.1]], r"\[0\.1\]"), *(
            Says([0.1, b], str(b)) for b in (0.0, -1.0, NAN, INF, "a", True))],
        )),
    (h.sharpen, dict(samples=POINTS, h=1), dict(
        samples=[FLAT], h=[0, 1e-200], step=[0],
        around=[Says(WIDE, r"\(n, 2\).*\(20, 3\)"), POINTS[:, :1]])),
    # Flows
    (h.CouplingFlow, dict(num_layers=1), dict(
        num_layers=[0], members=[0], dim=[1, 2.5], seed=[-1], hidden=[0],
        coupling=[Says("linear", f"{', '.join(h.COUPLINGS)}.*linear")],
        start=[Says("0", "spread, uniform.*'0'")], bound=[0, 1e-100],
        wings=[Says(8, "")])),
    (h.CouplingFlow, dict(num_layers=1, coupling="spline"), dict(
        bins=[1, 65], interval=[0, 1e60], bound=[Says(1.0, "")])),
    (h.CouplingLayer, dict(mask=[1, 0]), dict(
        mask=[[1, 1], [0, 0], [1, 0, 1], [], "10", None, 3, (2, 0)],
        members=[0], seed=[-1])),
    (FLOW.sample, dict(n=1), dict(n=[0], seed=[-1])),
    (FLOW.sample_x_each_layer, dict(n=1), dict(n=[1.5])),
    (FLOW.forward, dict(z=POINTS), dict(z=[WIDE])),
    (FLOW.inverse, dict(x=POINTS), dict(x=[WIDE])),
    (MANY.inverse, dict(x=POINTS), dict(x=[torch.zeros(2, 20, 2)])),
    (FLOW.member, dict(i=0), dict(i=[1])),
    (MANY.member, dict(i=0), dict(i=[3, -1])),
    # Training
    (partial(train, epochs=1), dict(flow=FLOW, data=POINTS, progress=False),
     dict(flow=[None, 3, Says(h.CouplingLayer([1, 0]), "CouplingLayer"),
                Says(h.CouplingFlow(1).requires_grad_(False), "none")],
          data=[Says(WIDE, r"\(20, 3\): take CouplingFlow\(..., dim=3\)"),
                Says(POINTS * 1e-40, r"vary by 1e-30 or more, got .*e-40"),
                Says(POINTS[:0], r"\(0, 2\)$"),
                Says(POINTS * 1e100, r"e\+100, which is inf in .*float32"),
                Says(POINTS[:2], "2 with valid_fraction 0.1")],
          seed=[-1], progress=[1], shuffle=[0, None, "yes"],
          speed=[Says(3, "no switch of train: there are batch_size, ")],
          lr=[Says(3, r"\(did you mean learning_rate\?\): .*, jitter, ")],
          batchsize=[Says(3, "mean batch_size")])),
    (train, dict(flow=FLOW, data=POINTS, epochs=1, progress=False),
     dict(epochs=[0])),
    (partial(train, MANY), dict(data=POINTS, epochs=1, progress=False), dict(
        data=[torch.zeros(2, 20, 2), Says([POINTS] * 4, "3 sets.*4 of shapes"),
              Says([POINTS, POINTS, POINTS[:9]], r"one size.*\(9, 2\)"),
              Says([POINTS, POINTS, ONE_NAN], "nan"), Says([], r"\(0,\)"),
              Says([None, POINTS, POINTS], "None")])),
    (partial(train, DEEP, epochs=1), None, dict(
        data=[Says(POINTS, r"\(n, 3\).*\(20, 2\)")])),
    (Recipe, {}, dict(
        batch_size=[0, 2.5], learning_rate=[0, INF], beta2=[-0.1, 1],
        warmup=[-0.1, 1], average=[1, True], jitter=[-0.1, INF],
        valid_fraction=[0, 1], cosine=[1], shuffle=[1], sharpened=[1],
        tolerance=[-1, None])),
    # Scores and studies
    *[(score, dict(truth=TRUTH, model=KDE, n=9), dict(
        truth=[None], model=["Moons"], n=[1], seed=[-1]))
      for score in (s.kl_divergence, s.total_variation)],
    (s.entropy, dict(density=TRUTH, n=9), dict(
        density=[None], n=[1], seed=[-1])),
    (s.grid_entropy, dict(density=TRUTH, size=9), dict(
        density=[None], size=[0])),
    (s.mean_interval, dict(values=[1, 2], level=0.9), dict(
        values=["abc", 3, None, [], Says([1, NAN], "nan"), ["1", "2"],
                Says(MASKED[0, 0], "masked"), torch.ones(2) * 1j,
                Says([1, INF], "inf"), Says([[1, 2]], r"\[1\.0, 2\.0\]")],
        level=[0, 1, NAN, "0.9"])),
    (s.holm_intervals, dict(comparisons={"a": [1, 2]}), dict(
        level=[1], comparisons=[[[1, 2]]])),
    (lambda values: s.holm_intervals({"a": values}), dict(values=[1, 2]), dict(
        values=[Says([1, NAN], "nan")])),
    (partial(s.verdict, "claim"), dict(interval=s.Interval(1, 0, 2)), dict(
        interval=[None, (0.1, 0.0, 0.2)])),
    (partial(s.sweep, progress=False), dict(
        settings=[SETTING], seeds=1, points=9), dict(
        settings=[[], SETTING, "Moons", [3]], points=[1],
        seeds=[0, range(0), range(-1, 1), range(1, 5, 2), [1, 2]],
        results=[2], n_jobs=[0, 1.5])),
    (partial(s.sweep, [SETTING]), None, dict(progress=[2])),
    (s.sweep, None, dict(setting=[
        Says([SETTING | {"dept": 3}], "dept.*num_layers"),
        Says([SETTING | {"seed": 3}], "seed"),
        Says([{"dist_type": "Moons", "epochs": 1}], r"lacks .'num_layers'")])),
]
# fmt: on


def cases():
    for call, good, bad in CALLS:
        for name, values in bad.items():
            for value in values:
                shown = getattr(call, "func", call).__qualname__
                yield pytest.param(call, good, name, value, id=shown)


@pytest.mark.parametrize("call, good, name, value", [*cases()])
def test_bad_argument_is_refused_by_name_and_value(call, good, name, value):
    if not isinstance(value, Says):
        value = Says(value, words(value))
    value, said = value
    held, start = POINTS.clone(), time.process_time()
    argument = "settings" if name == "setting" else name
    with pytest.raises((ValueError, TypeError)) as error:
        call(**(good or {}) | {argument: value})
    assert time.process_time() - start < 1
    message = str(error.value)
    assert len(message) < 400 and "\n" not in message
    assert re.search(rf"\b{name}.*{said}", message, re.DOTALL), message
    assert torch.equal(held, POINTS)


@pytest.mark.parametrize("value", [
    "x" * 10**6, ["y" * 10**4] * 10**4, {k: "z" for k in range(10**4)},
    np.zeros((500, 500, 2), str), MANY.layers, range(10**9), -(10**4000),
], ids=lambda value: type(value).__name__)  # fmt: skip
def test_messages_are_short_whatever_the_value_is(value):
    for call in (
        lambda v: h.Circles(sigma=v), lambda v: TRUTH.sample(v),
        lambda v: h.toy_distribution(v), lambda v: KDE.density(v),
        lambda v: h.CouplingLayer(v), lambda v: Recipe(cosine=v),
        lambda v: s.kl_divergence(v, TRUTH), lambda v: s.sweep(v),
        lambda v: train(v, POINTS, 1), lambda v: s.verdict("claim", v),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError)) as error:
            call(value)
        assert len(str(error.value)) < 300


@pytest.mark.parametrize("call, good", [
    case[:2] for case in CALLS if case[1] is not None
])  # fmt: skip
def test_good_arguments_are_taken(call, good):
    call(**good)


@pytest.mark.parametrize("name", Recipe.__dataclass_fields__)
def test_every_switch_is_checked(name):
    for value in ("x", None, -1):
        with pytest.raises((TypeError, ValueError), match=rf"^{name} must"):
            Recipe(**{name: value})


def test_the_courses_recipe_decides_every_switch():
    others = set(Recipe.__dataclass_fields__) - set(s.COURSE)
    assert others == {"valid_fraction"}


@pytest.mark.parametrize("call, message", [
    (lambda: h.CouplingFlow(1, hiden=4),
     r"hiden is no option of the affine coupling \(did you mean hidden\?\): "
     "there are hidden, start, bound"),
    (lambda: h.CouplingFlow(1, coupling="spline", bound=1.0),
     "bound is no option of the spline .*: there are .*bins, interval"),
    (lambda: h.GaussianKDE([[0.0], [1.0]], 1).log_probability(WIDE[:1]),
     r"\(1, 3\): transpose it$"),
    (lambda: train(FLOW, WIDE.T[:2], 1),
     r"\(2, 20\): transpose it, or take CouplingFlow\(..., dim=20\)"),
    (lambda: train(FLOW, np.full((40, 2), "2020", "datetime64[D]"), 1),
     r"got an array of shape \(40, 2\), datetime64\[D\]"),
])  # fmt: skip
def test_a_message_says_what_to_do(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
