"""Laws of the coupling flows, at weights far from the identity."""

import copy
import io
import math

import numpy as np
import pytest
import torch
from checks import (
    FALSE_ALARM,
    cell_masses,
    goodness_of_fit,
    jacobian,
    make_flow,
    normal_points,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from helpers import (
    LOG_2PI,
    AffineCoupling,
    CouplingFlow,
    CouplingLayer,
    Grid,
    SplineCoupling,
)

both_couplings = pytest.mark.parametrize("coupling", ["affine", "spline"])
EPS = torch.finfo(torch.float64).eps


FAMILIES = [
    ("affine", {}), ("affine", {"bound": 0.5}), ("affine", {"bound": None}),
    ("spline", {}), ("spline", {"bins": 2, "interval": 2.0}),
    ("spline", {"bins": 20, "interval": 3.0}),
]  # fmt: skip


@st.composite
def flows(draw, dtypes=(torch.float32, torch.float64)):
    """Any flow: -> (flow, points for it, its dtype's eps)."""
    dtype = draw(st.sampled_from(dtypes))
    K = draw(st.integers(1, 8))
    members = draw(st.sampled_from([None, 1, 2, 3, 4]))
    coupling, options = draw(st.sampled_from(FAMILIES))
    seed = draw(st.integers(0, 10**6))
    # Free log-scales overflow when the weights are this large.
    free = options == {"bound": None}
    size = draw(st.floats(0.1, 0.15 if free else 0.5))
    K = min(K, 4) if free else K
    flow = make_flow(
        K, members, coupling, seed, size, dtype,
        hidden=draw(st.sampled_from([4, 32])),
        start=draw(st.sampled_from(["spread", "uniform"])), **options,
    )  # fmt: skip
    own = members is not None and draw(st.booleans())
    shape = (members, 20) if own else (20,)
    points = draw(st.sampled_from([0.1, 1.0, 3.0])) * normal_points(
        *shape, seed=seed, dtype=dtype
    )
    return flow, points, torch.finfo(dtype).eps


def spread(flow, points):
    return points if flow.members is None else points.expand(
        flow.members, *points.shape[-2:]
    )  # fmt: skip


def rounding(flow, points, eps, inverse=False):
    """What going through the flow and back may lose: of the points, and of
    the two log-determinants' sum.

    A step rounds its result to 100 eps of its size, for the some 100 sums
    in a row of its network. On the way back the inverse Jacobians of the
    steps in between multiply that; the log-determinant of each step
    changes by its gradient times what is lost where it starts.
    """
    flow = copy.deepcopy(flow).double()
    steps = [layer.forward for layer in flow.layers]
    if inverse:
        steps = [layer.inverse for layer in flow.layers][::-1]
    x = spread(flow, points).double()
    way = torch.eye(2, dtype=torch.float64).expand(*x.shape, 2)
    ways, sizes, gradients = [way], [1 + x.norm(dim=-1)], []
    for step in steps:
        z = x.clone().requires_grad_()
        gradients.append(torch.autograd.grad(step(z)[1].sum(), z)[0])
        x, J = jacobian(lambda z, step=step: step(z)[0], x)
        ways.append(J @ ways[-1])
        sizes.append(1 + x.norm(dim=-1))

    def lost(k):
        return 100 * eps * sum(
            torch.linalg.matrix_norm(ways[k] @ way.inverse()) * size
            for way, size in zip(ways[k:], sizes[k:], strict=True)
        )  # fmt: skip

    log_dets = [(1 + g.norm(dim=-1)) * lost(k)
                for k, g in enumerate(gradients)]  # fmt: skip
    return lost(0), sum(log_dets)


@given(flows())
@settings(max_examples=40)
def test_inverse_undoes_forward(case):
    flow, z, eps = case
    with torch.no_grad():
        x, log_det = flow.forward(z)
        back, opposite = flow.inverse(x)
    assert x.dtype == z.dtype and x.shape == spread(flow, z).shape
    assert log_det.shape == opposite.shape == x.shape[:-1]
    worst, worst_log_det = rounding(flow, z, eps)
    assert ((back - z).norm(dim=-1) <= worst).all()
    assert ((log_det + opposite).abs() <= worst_log_det).all()


@given(flows())
@settings(max_examples=40)
def test_forward_undoes_inverse(case):
    flow, x, eps = case
    with torch.no_grad():
        z, log_det = flow.inverse(x)
        back, opposite = flow.forward(z)
    worst, worst_log_det = rounding(flow, x, eps, inverse=True)
    assert ((back - x).norm(dim=-1) <= worst).all()
    assert ((log_det + opposite).abs() <= worst_log_det).all()


@given(flows([torch.float64]), st.booleans())
@settings(max_examples=40)
def test_log_determinant_is_that_of_the_jacobian(case, inverse):
    """A determinant loses the Jacobian's condition number in digits."""
    flow, points, eps = case
    points = spread(flow, points)
    function = flow.inverse if inverse else flow.forward
    J = jacobian(lambda p: function(p)[0], points)[1]
    with torch.no_grad():
        log_det = function(points)[1]
    error = (log_det - torch.linalg.slogdet(J).logabsdet).abs()
    assert (error <= 1e4 * eps * torch.linalg.cond(J)).all()
    assert log_det.abs().max() > 1e-3  # no identity


@given(flows([torch.float64]))
@settings(max_examples=20)
def test_stack_is_its_layers_one_after_another(case):
    flow, points, _ = case
    with torch.no_grad():
        for name, layers in (
            ("forward", flow.layers),
            ("inverse", flow.layers[::-1]),
        ):
            x, total = points, 0
            for layer in layers:
                x, log_det = getattr(layer, name)(x)
                total = total + log_det
            whole, log_det = getattr(flow, name)(points)
            assert torch.equal(whole, x) and torch.equal(log_det, total)


@given(flows([torch.float64]))
@settings(max_examples=20)
def test_log_probability_is_the_change_of_variables(case):
    flow, x, _ = case
    with torch.no_grad():
        z, log_det = flow.inverse(x)
        prior = stats.norm.logpdf(z).sum(-1)
        expected = torch.from_numpy(prior) + log_det
        torch.testing.assert_close(flow.log_probability(x), expected)


@both_couplings
@pytest.mark.parametrize("members", [None, 3])
@pytest.mark.parametrize("mask", [[1, 0], [0, 1], (0, 1), "tensor"])
def test_layer_is_triangular_as_its_mask_says(coupling, members, mask):
    mask = torch.tensor([1, 0]) if mask == "tensor" else mask
    layer = CouplingLayer(mask, members, coupling, seed=3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(2).add_(0.05)
    layer.double()
    z = normal_points(*([members] if members else []), 50)
    kept = 0 if list(mask) == [1, 0] else 1
    for function in (layer.forward, layer.inverse):
        y, J = jacobian(lambda p, f=function: f(p)[0], z)
        assert torch.equal(y[..., kept], z[..., kept])
        assert (J[..., kept, kept] == 1).all()
        assert (J[..., kept, 1 - kept] == 0).all()
        assert (J[..., 1 - kept, kept].abs() > 1e-6).any()
        assert (J[..., 1 - kept, 1 - kept] > 0).all()
        assert (J[..., 1 - kept, 1 - kept] != 1).any()


@both_couplings
def test_masks_alternate_and_the_first_keeps_the_first(coupling):
    flow = CouplingFlow(5, coupling=coupling)
    assert [layer.kept for layer in flow.layers] == [0, 1, 0, 1, 0]
    flow = make_flow(1, coupling=coupling)
    z = normal_points(20)
    with torch.no_grad():
        x = flow.forward(z)[0]
    assert torch.equal(x[:, 0], z[:, 0]) and (x[:, 1] != z[:, 1]).any()


def wide_grid(flow):
    return Grid.around(flow.sample(5000, seed=1), 40, margin=0.4)


WIDE = [
    ("affine", {}), ("affine", {"bound": None}),
    ("spline", {}), ("spline", {"bins": 4, "interval": 3.0}),
]  # fmt: skip


@pytest.mark.parametrize("coupling, options", WIDE)
def test_density_has_unit_mass_and_its_samples(coupling, options):
    flow = make_flow(3, None, coupling, seed=5, size=0.1, hidden=8, **options)
    grid = wide_grid(flow)
    masses = cell_masses(flow, grid, 8)
    # Beyond the square lie fewer than 1e-3 of the prior's points; kinks of
    # the density cost the midpoint rule less.
    assert masses.sum() == pytest.approx(1, abs=2e-3)
    samples = flow.sample(40_000, seed=2)
    assert goodness_of_fit(samples, masses, grid) > FALSE_ALARM
    # It could tell: the same points mirrored are refused.
    assert goodness_of_fit(-samples, masses, grid) < FALSE_ALARM


@both_couplings
def test_density_image_is_upright(coupling):
    flow = make_flow(3, 2, coupling, size=0.2)
    grid = Grid((-4, 3), (-2, 5), 20)
    image = flow.density(grid)
    assert image.shape == (2, 20, 20) and not image.requires_grad
    for row, column in ((0, 0), (3, 17), (19, 5)):
        point = [[grid.x[column], grid.y[row]]]
        expected = flow.log_probability(point).exp()[:, 0]
        torch.testing.assert_close(image[:, row, column], expected.detach())


ENSEMBLES = pytest.mark.parametrize(
    "coupling, options",
    [("affine", {}), ("affine", {"bound": None}), ("spline", {})],
)


@ENSEMBLES
@pytest.mark.parametrize("members", [1, 3])
def test_member_alone_equals_member_in_the_ensemble(
    coupling, options, members
):
    """The same sums, perhaps in another order: 1e-12 in float64."""
    flow = make_flow(4, members, coupling, size=0.1, **options)
    x = normal_points(members, 30)
    with torch.no_grad():
        whole, log_det = flow.inverse(x)
        log_p = flow.log_probability(x)
        for i in range(members):
            single = flow.member(i)
            assert single.members is None
            z, own = single.inverse(x[i])
            close = dict(rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(z, whole[i], **close)
            torch.testing.assert_close(own, log_det[i], **close)
            own = single.log_probability(x[i])
            torch.testing.assert_close(own, log_p[i], **close)
            own = single.sample(9, seed=4)
            torch.testing.assert_close(own, flow.sample(9, 4)[i], **close)


def test_member_is_a_copy():
    flow = make_flow(2, 3)
    x = normal_points(10)
    before = flow.log_probability(x)
    with torch.no_grad():
        for parameter in flow.member(1).parameters():
            parameter.zero_()
        for parameter in make_flow(2).member(0).parameters():
            parameter.zero_()
    assert torch.equal(before, flow.log_probability(x))
    assert (before[0] != before[1]).any()
    for parameter in flow.member(1).parameters():  # and holds no other's
        held = parameter.untyped_storage().nbytes()
        assert held == parameter.numel() * parameter.element_size()


@ENSEMBLES
@pytest.mark.parametrize("start", ["spread", "uniform"])
def test_member_i_of_seed_s_has_the_weights_of_seed_s_plus_i(
    coupling, options, start
):
    flow = CouplingFlow(3, 4, coupling, seed=6, start=start, **options)
    for i in range(4):
        single = CouplingFlow(
            3, None, coupling, seed=6 + i, start=start, **options
        )
        state = flow.member(i).state_dict()
        for name, value in single.state_dict().items():
            assert torch.equal(state[name], value)
    weights = [layer.network[0].bias for layer in flow.layers]
    assert not torch.equal(weights[0], weights[1])  # each layer its own
    assert not torch.equal(weights[0][0], weights[0][1])  # so each member


def test_flow_is_a_function_of_its_seed():
    def state(seed):
        flow = CouplingFlow(2, seed=seed)
        return torch.cat([p.flatten() for p in flow.parameters()])

    first = state(3)
    state(4), CouplingLayer([1, 0])
    assert torch.equal(first, state(3)) and (first != state(4)).any()
    generator = torch.Generator().manual_seed(1)
    drawn = state(generator)
    assert torch.equal(drawn, state(torch.Generator().manual_seed(1)))
    assert not torch.equal(drawn, state(generator))


def test_spread_start_is_near_the_identity_and_uniform_is_torchs():
    z = normal_points(200)
    for coupling in ("affine", "spline"):
        flow = CouplingFlow(4, coupling=coupling).double()
        with torch.no_grad():
            x, log_det = flow.forward(z)
        assert 0 < (x - z).abs().max() < 1 and log_det.abs().max() < 1
    first, second, last = CouplingFlow(1, start="uniform").layers[0].network[
        ::2
    ]  # fmt: skip
    for linear, fan_in in ((first, 1), (second, 32), (last, 32)):
        bound = fan_in**-0.5
        values = torch.cat([linear.weight.flatten(), linear.bias.flatten()])
        assert values.abs().max() <= bound
        assert values.detach().abs().max() > 0.8 * bound
    first = CouplingFlow(1).layers[0].network[0]
    kinks = -(first.bias / first.weight).detach()
    assert (first.weight.abs() == 1).all()
    assert 2 < kinks.abs().max() <= 2.5


@ENSEMBLES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saved_weights_give_the_same_density(coupling, options, dtype):
    flow = make_flow(3, 2, coupling, size=0.1, dtype=dtype, **options)
    file = io.BytesIO()
    torch.save(flow.state_dict(), file)
    file.seek(0)
    other = CouplingFlow(3, 2, coupling, seed=9, **options).to(dtype)
    x = normal_points(30, dtype=dtype)
    assert not torch.equal(other.log_probability(x), flow.log_probability(x))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.log_probability(x), flow.log_probability(x))
    assert torch.equal(other.sample(9), flow.sample(9))


@both_couplings
@pytest.mark.parametrize("members", [None, 2])
@pytest.mark.parametrize("K", [1, 4])
def test_path_leads_from_the_prior_to_the_sample(coupling, members, K):
    flow = make_flow(K, members, coupling)
    path = flow.sample_x_each_layer(50, seed=3)
    shape = (50, 2) if members is None else (members, 50, 2)
    assert len(path) == K + 1 and {x.shape for x in path} == {shape}
    generator = torch.Generator().manual_seed(3)
    prior = torch.randn(50, 2, generator=generator, dtype=torch.float64)
    assert torch.equal(path[0], spread(flow, prior))
    assert torch.equal(path[-1], flow.sample(50, seed=3))
    for layer, z, x in zip(flow.layers, path[:-1], path[1:], strict=True):
        with torch.no_grad():
            assert torch.equal(layer.forward(z)[0], x)
    assert not path[-1].requires_grad


@both_couplings
def test_sampler_is_pure(coupling):
    flow = make_flow(3, coupling=coupling)
    first = flow.sample(10, seed=3)
    flow.sample(5, seed=4)
    assert torch.equal(first, flow.sample(10, seed=3))
    assert not torch.equal(first, flow.sample(10, seed=4))
    generator = torch.Generator().manual_seed(3)
    assert torch.equal(first, flow.sample(10, generator))
    assert not torch.equal(first, flow.sample(10, generator))


@both_couplings
def test_double_is_the_same_flow_with_more_digits(coupling):
    flow = make_flow(4, 2, coupling, size=0.1, dtype=torch.float32)
    x = normal_points(40, dtype=torch.float32)
    single, double = flow, copy.deepcopy(flow).double()
    assert single.log_probability(x).dtype == torch.float32
    assert single.sample(3).dtype == torch.float32
    assert double.log_probability(x).dtype == torch.float64
    assert double.sample(3).dtype == torch.float64
    gap = single.log_probability(x) - double.log_probability(x)
    size = 1 + double.log_probability(x).abs()
    assert (gap.abs() / size).max() < 1e-4  # eps of 1e-7, 1e3 roundings
    assert gap.abs().max() > 0


def test_points_of_any_kind_follow_the_flows_dtype():
    flow = make_flow(2, dtype=torch.float32)
    x = [[0.5, 1.5], [2.0, -1.0]]
    expected = flow.log_probability(torch.tensor(x))
    for same in (x, np.array(x), np.float32(x), torch.tensor(x).double()):
        assert torch.equal(flow.log_probability(same), expected)


@both_couplings
def test_flow_is_differentiable_in_points_and_weights(coupling):
    flow = make_flow(3, coupling=coupling)
    x = normal_points(40).requires_grad_()
    flow.log_probability(x).sum().backward()
    for value in (x, *flow.parameters()):
        assert torch.isfinite(value.grad).all() and value.grad.any()


# One coupling function


def test_affine_coupling_is_what_the_formula_says():
    s, t = torch.tensor([[-3.0, 0.5]]), torch.tensor([[1.0, -2.0]])
    condition = torch.stack([s, t])
    y = torch.tensor([2.0, 5.0])
    coupling = AffineCoupling(None, bound=1.5)
    bounded = 1.5 * torch.tanh(s[0] / 1.5)
    out, log_det = coupling(y, condition)
    torch.testing.assert_close(out, bounded.exp() * y + t[0])
    torch.testing.assert_close(log_det, bounded)
    assert bounded.abs().max() < 1.5
    free = AffineCoupling(None, bound=None)
    assert torch.equal(free(y, condition)[0], y + t[0])  # starts at scale 0
    with torch.no_grad():
        free.scale += 0.5
    out, log_det = free(y, condition)
    torch.testing.assert_close(out, (0.5 * s[0]).exp() * y + t[0])
    torch.testing.assert_close(log_det, 0.5 * s[0])


def test_log_scale_stays_within_its_bound():
    flow = make_flow(1, bound=0.7, size=5.0)
    with torch.no_grad():
        log_det = flow.forward(normal_points(500))[1]
    assert 0.69 < log_det.abs().max() <= 0.7


@st.composite
def splines(draw, dtypes=(torch.float32, torch.float64)):
    """-> (spline, its raw outputs, its knots x and y)."""
    bins = draw(st.sampled_from([2, 3, 8, 20, 64]))
    spline = SplineCoupling(None, bins, draw(st.sampled_from([0.5, 5.0])))
    size = draw(st.sampled_from([0.5, 3.0, 30.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    raw = size * torch.randn(1, 1, 3 * bins - 1, generator=generator)
    raw = raw.to(draw(st.sampled_from(dtypes)))
    return (
        spline,
        raw,
        *(
            spline.interval * spline._knots(raw[0, 0, part])
            for part in (slice(0, bins), slice(bins, 2 * bins))
        ),
    )


def evaluate(function, raw, y):
    return function(y, raw.mT.expand(1, -1, len(y)))


@given(splines())
def test_spline_is_the_identity_outside_its_interval(case):
    spline, raw, _, _ = case
    L = spline.interval
    y = torch.tensor([-1e30, -3 * L, -L, L, 1.01 * L, 1e6], dtype=raw.dtype)
    for function in (spline.forward, spline.inverse):
        out, log_det = evaluate(function, raw, y)
        assert torch.equal(out, y) and (log_det == 0).all()


@given(splines([torch.float64]))
def test_spline_passes_its_knots_with_their_slopes(case):
    """A rational-quadratic piece is determined by that. Neither side of a
    knot differs: values, slopes and log-slopes are continuous."""
    spline, raw, xs, ys = case
    slopes = torch.exp(2 * torch.tanh(raw[0, 0, 2 * spline.bins :] / 2))
    one = torch.ones(1, dtype=raw.dtype)
    slopes = torch.cat([one, slopes, one])
    assert slopes.min() >= math.exp(-2) and slopes.max() <= math.exp(2)
    L = spline.interval
    for side in (-1, 0, 1):
        y, log_det = evaluate(spline.forward, raw, xs + side * 1e-13 * L)
        torch.testing.assert_close(y, ys, rtol=0, atol=1e-11 * L)
        torch.testing.assert_close(
            log_det, slopes.log(), rtol=0, atol=1e-6
        )  # 1e-13 aside, where log-slopes change by up to 1e6 a unit
        x, log_det = evaluate(spline.inverse, raw, ys + side * 1e-13 * L)
        torch.testing.assert_close(x, xs, rtol=0, atol=1e-11 * L)
        torch.testing.assert_close(log_det, -slopes.log(), rtol=0, atol=1e-6)


@given(splines([torch.float64]))
def test_spline_is_monotone_with_the_slope_it_says(case):
    spline, raw, _, _ = case
    L = spline.interval
    y = torch.linspace(-1.1 * L, 1.1 * L, 3001, dtype=raw.dtype)
    y.requires_grad_()
    for function in (spline.forward, spline.inverse):
        out, log_det = evaluate(function, raw, y)
        (slope,) = torch.autograd.grad(out.sum(), y)
        assert (out.diff() > 0).all() and (slope > 0).all()
        torch.testing.assert_close(log_det, slope.log(), rtol=0, atol=1e-8)
    there = evaluate(spline.forward, raw, y.detach())[0]
    back = evaluate(spline.inverse, raw, there)[0]
    torch.testing.assert_close(back, y.detach(), rtol=0, atol=1e-9 * L)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@given(case=splines([torch.float32]))
def test_spline_keeps_its_digits_in_float32(direction, case):
    """On its knots, one float to either side of them, where rounding may
    enter a piece with u below 0 or above 1, and in between. An error of
    some eps in the argument grows by the slope."""
    spline, raw, xs, ys = case
    L = spline.interval
    knots, far = (xs if direction == "forward" else ys), xs.new_full((), 2 * L)
    y = torch.cat([
        knots, knots.nextafter(far), knots.nextafter(-far),
        torch.linspace(-L, L, 500),
    ])  # fmt: skip
    function = getattr(spline, direction)
    actual, log_det = evaluate(function, raw, y)
    expected, log_slope = evaluate(function, raw.double(), y.double())
    assert torch.isfinite(log_det).all()
    eps = torch.finfo(torch.float32).eps
    error = (actual - expected).abs() / (1 + log_slope.exp())
    assert error.max() < 10 * eps * L


def test_spline_pieces_are_a_fiftieth_of_the_interval_or_more():
    spline = SplineCoupling(None, bins=8)
    raw = torch.tensor([100.0] + 7 * [0.0])
    widths = spline._knots(raw).diff()
    torch.testing.assert_close(widths[1:], torch.full((7,), 0.04))
    torch.testing.assert_close(widths.sum(), torch.tensor(2.0))


def test_log_2pi():
    assert LOG_2PI == pytest.approx(1.8378770664093453, rel=1e-15)
