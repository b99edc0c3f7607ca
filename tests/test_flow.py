"""Laws of the coupling flows, at weights far from the identity."""

import copy
import io

import numpy as np
import pytest
import torch
import truths
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from truths import jacobian, make_flow, normal_points

import helpers
from helpers import COUPLINGS, CouplingFlow

each_coupling = pytest.mark.parametrize("coupling", COUPLINGS)
PLAIN = [*((name, {}) for name in COUPLINGS), ("affine", {"bound": None})]
FAMILIES = [
    *PLAIN,
    ("affine", {"bound": 0.5}), ("spline", {"bins": 2, "interval": 2.0}),
    ("spline", {"bins": 20, "interval": 3.0}),
]  # fmt: skip
ENSEMBLES = pytest.mark.parametrize("coupling, options", PLAIN)


@st.composite
def flows(draw, dtypes=(torch.float32, torch.float64)):
    """Any flow: -> (flow, points for it)."""
    dtype, d = draw(st.sampled_from(dtypes)), draw(st.sampled_from([2, 3, 5]))
    members = draw(st.sampled_from([None, 1, 2, 3]))
    coupling, options = draw(st.sampled_from(FAMILIES))
    seed = draw(st.integers(0, 10**6))
    # Free log-scales overflow when the weights are larger.
    free = options == {"bound": None}
    size = draw(st.floats(0.1, 0.15 if free else 0.4))
    flow = make_flow(
        4, members, coupling, seed, size, dtype, dim=d,
        hidden=draw(st.sampled_from([4, 32])),
        start=draw(st.sampled_from(["spread", "uniform"])), **options,
    )  # fmt: skip
    # Cut, repeated, reordered: a layer alone knows its mask.
    order = draw(
        st.permutations(range(4)) | st.lists(st.integers(0, 3), max_size=4)
    )
    flow.layers = torch.nn.ModuleList(flow.layers[k] for k in order)
    own = members is not None and draw(st.booleans())
    shape = (members, 20) if own else (20,)
    size = draw(st.sampled_from([0.1, 1.0, 3.0]))
    return flow, size * normal_points(*shape, d=d, seed=seed, dtype=dtype)


def spread(flow, points):
    members = () if flow.members is None else (flow.members,)
    return points.expand(*members, *points.shape[-2:])


def maps(flow, name="forward"):
    """What a flow is made of, in the order in which it is applied."""
    steps = [*flow.layers, flow.outermost]
    return steps if name == "forward" else steps[::-1]


def rounding(flow, points, name):
    """What going through the flow and back may lose: each layer rounds to
    some 100 eps of the points' size, and its Jacobian's condition number
    multiplies what the others lost."""
    lost = 1e3 * torch.finfo(points.dtype).eps
    flow, x = copy.deepcopy(flow).double(), spread(flow, points).double()
    for step in maps(flow, name):
        lost *= 1 + x.norm(dim=-1)
        step = getattr(step, name)
        x, J = jacobian(lambda x, step=step: step(x)[0], x)
        lost *= torch.linalg.cond(J)
    return lost


@pytest.mark.parametrize("name, back", [
    ("forward", "inverse"), ("inverse", "forward"),
])  # fmt: skip
@given(case=flows())
@settings(max_examples=40)
def test_inverse_undoes_forward_and_both_are_their_layers(name, back, case):
    flow, z = case
    with torch.no_grad():
        x, log_det = getattr(flow, name)(z)
        again, opposite = getattr(flow, back)(x)
        step, total = z, 0
        for part in maps(flow, name):
            step, own = getattr(part, name)(step)
            total = total + own
    assert x.dtype == z.dtype and x.shape == spread(flow, z).shape
    assert log_det.shape == opposite.shape == x.shape[:-1]
    lost = rounding(flow, z, name)
    for error in (again - z, x - step):
        assert (error.norm(dim=-1) <= lost).all()
    for error in (log_det + opposite, log_det - total):
        assert (error.abs() <= lost).all()


@given(flows([torch.float64]), st.booleans())
@settings(max_examples=40)
def test_log_determinant_is_that_of_the_jacobian(case, inverse):
    """A determinant loses the Jacobian's condition number in digits. And
    log p is the change of variables."""
    flow, points = case
    points, eps = spread(flow, points), torch.finfo(torch.float64).eps
    function = flow.inverse if inverse else flow.forward
    out, J = jacobian(lambda p: function(p)[0], points)
    with torch.no_grad():
        log_det = function(points)[1]
        if inverse:
            prior = torch.from_numpy(stats.norm.logpdf(out).sum(-1))
            log_p = flow.log_probability(points)
            torch.testing.assert_close(log_p, prior + log_det)
    error = (log_det - torch.linalg.slogdet(J).logabsdet).abs()
    assert (error <= 1e4 * eps * torch.linalg.cond(J)).all()
    assert (J - torch.eye(J.shape[-1])).abs().max() > 1e-3  # no identity


@each_coupling
@pytest.mark.parametrize("members", [None, 3])
@pytest.mark.parametrize("mask", [
    [1, 0], torch.tensor([0, 1]), (1, 0, 0), [0, 0, 1], [1, 1, 0, 0, 0],
    np.array([0, 1, 1, 1, 1]),
], ids=str)  # fmt: skip
def test_layer_is_triangular_as_its_mask_says(coupling, members, mask):
    layer = helpers.CouplingLayer(mask, members, coupling, seed=3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(2).add_(0.05)
    layer.double()
    keep = torch.tensor([int(m) for m in mask]).bool()
    z = normal_points(*([members] if members else []), 50, d=len(keep))
    for function in (layer.forward, layer.inverse):
        y, J = jacobian(lambda p, f=function: f(p)[0], z)
        assert torch.equal(y[..., keep], z[..., keep])
        assert (y[..., ~keep] != z[..., ~keep]).any()
        rows, changed = J[..., keep, :], J[..., ~keep, :]
        assert (rows[..., keep] == torch.eye(int(keep.sum()))).all()
        assert (rows[..., ~keep] == 0).all()
        assert (changed[..., keep].abs() > 1e-6).any((0, -1)).all()
        slopes = changed[..., ~keep]  # each coordinate alone
        diagonal = slopes.diagonal(dim1=-2, dim2=-1)
        assert (diagonal > 0).all()
        assert torch.equal(slopes, torch.diag_embed(diagonal))


@pytest.mark.parametrize("d", [2, 3, 5])
def test_masks_alternate_between_the_first_half_and_the_rest(d):
    first = [1] * (d // 2) + [0] * (d - d // 2)
    rest = [1 - m for m in first]
    masks = [layer.mask for layer in CouplingFlow(5, dim=d).layers]
    assert masks == [first, rest, first, rest, first]


@pytest.mark.parametrize("coupling, options", [
    ("affine", {}), ("affine", {"bound": None}),
    ("spline", {}), ("spline", {"bins": 4, "interval": 3.0}),
])  # fmt: skip
def test_density_has_unit_mass_and_its_samples(coupling, options):
    flow = make_flow(3, None, coupling, seed=5, size=0.1, hidden=8, **options)
    grid = helpers.Grid.around(flow.sample(5000, seed=1), 40, margin=0.4)
    masses = truths.cell_masses(flow, grid, 8)
    # Beyond the square lie fewer than 1e-3 of the prior's points; kinks of
    # the density cost the midpoint rule less.
    assert masses.sum() == pytest.approx(1, abs=2e-3)
    samples = flow.sample(40_000, seed=2)
    assert truths.follow(samples, masses, grid)
    # It could tell: the same points mirrored are refused.
    assert not truths.follow(-samples, masses, grid)


@each_coupling
@pytest.mark.parametrize("d", [2, 3, 5])
def test_density_has_unit_mass_in_any_dimension(coupling, d):
    flow = make_flow(3, None, coupling, 5, 0.1, hidden=8, dim=d)
    truths.assert_mass_and_moments(flow)


@ENSEMBLES
@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("d", [2, 3, 5])
def test_member_alone_is_as_in_the_ensemble(coupling, options, members, d):
    """The same sums, perhaps in another order: 1e-12 in float64."""
    flow = make_flow(4, members, coupling, size=0.1, dim=d, **options)
    x = normal_points(members, 30, d=d)

    def values(flow, x):
        return *flow.inverse(x), flow.log_probability(x), flow.sample(9, 4)

    with torch.no_grad():
        whole = values(flow, x)
        for i in range(members):
            single = flow.member(i)
            assert single.members is None
            for own, all in zip(values(single, x[i]), whole, strict=True):
                torch.testing.assert_close(own, all[i], rtol=1e-10, atol=1e-10)


def test_member_is_a_copy_and_owns_its_weights():
    flow, x = make_flow(2, 3), normal_points(10)
    before = flow.log_probability(x)
    for parameter in flow.member(1).parameters():
        held = parameter.untyped_storage().nbytes()
        assert held == parameter.numel() * parameter.element_size()
        parameter.data.zero_()
    assert torch.equal(before, flow.log_probability(x))


@each_coupling
def test_double_is_the_same_flow_with_more_digits(coupling):
    """And takes points of any kind."""
    flow = make_flow(4, 2, coupling, size=0.1, dtype=torch.float32)
    x = normal_points(40, dtype=torch.float32)
    single = flow.log_probability(x)
    for same in (x.tolist(), x.numpy(), x.double()):
        own = flow.log_probability(same)  # shifted with more digits
        torch.testing.assert_close(own, single, rtol=1e-4, atol=1e-4)
    double = copy.deepcopy(flow).double().log_probability(x)
    assert single.dtype == torch.float32 and double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-4)


@ENSEMBLES
@pytest.mark.parametrize("start", ["spread", "uniform"])
def test_member_i_of_seed_s_starts_as_seed_s_plus_i(coupling, options, start):
    flow = CouplingFlow(3, 4, coupling, 6, start=start, **options)
    for i in range(4):
        single = CouplingFlow(3, None, coupling, 6 + i, start=start, **options)
        state = flow.member(i).state_dict()
        for name, value in single.state_dict().items():
            assert torch.equal(state[name], value)
    weights = [layer.network[0].bias for layer in flow.layers]
    assert not torch.equal(weights[0], weights[1])  # each layer its own
    assert not torch.equal(weights[0][0], weights[0][1])  # so each member


@each_coupling
def test_flow_starts_near_the_identity(coupling):
    """And with its kinks over the data."""
    flow, z = CouplingFlow(4, coupling=coupling).double(), normal_points(200)
    with torch.no_grad():
        x, log_det = flow.forward(z)
    assert 0 < (x - z).abs().max() < 1 and log_det.abs().max() < 1
    first = flow.layers[0].network[0]
    kinks = -(first.bias / first.weight).detach()
    assert (first.weight.abs() == 1).all() and 2 < kinks.abs().max() <= 2.5


def test_a_coupling_needs_no_number_to_be_saved(monkeypatch):
    class Additive(helpers.Coupling):
        outputs = 1

        def __init__(self, members=None):
            super().__init__()

        def forward(self, z, outputs):
            return z + outputs, 0 * z

        def inverse(self, x, outputs):
            return x - outputs, 0 * x

    monkeypatch.setitem(helpers.COUPLINGS, "additive", Additive)
    flow, x = make_flow(2, coupling="additive"), normal_points(5)
    other = CouplingFlow(2, coupling="additive", seed=3).double()
    other.load_state_dict(flow.state_dict())
    assert torch.equal(other.log_probability(x), flow.log_probability(x))


@pytest.mark.parametrize("coupling, saved, other", [
    *((*family, family[1]) for family in PLAIN),
    ("spline", {"interval": 3.0}, {}), ("affine", {"bound": 1.0}, {}),
    ("affine", {}, {"bound": 1.0}),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saved_weights_give_the_same_density(coupling, saved, other, dtype):
    """They bring what they mean: another interval or bound."""
    flow = make_flow(3, 2, coupling, size=0.1, dtype=dtype, **saved)
    file = io.BytesIO()
    torch.save(flow.state_dict(), file)
    file.seek(0)
    other = CouplingFlow(3, 2, coupling, seed=9, **other).to(dtype)
    x = normal_points(30, dtype=dtype)
    assert not torch.equal(other.log_probability(x), flow.log_probability(x))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.log_probability(x), flow.log_probability(x))
    assert torch.equal(other.sample(9), flow.sample(9))


@each_coupling
@pytest.mark.parametrize("members", [None, 2])
@pytest.mark.parametrize("K, d", [(1, 2), (4, 3)])
def test_path_leads_from_the_prior_to_the_sample(coupling, members, K, d):
    flow = make_flow(K, members, coupling, dim=d)
    path = flow.sample_x_each_layer(50, seed=3)
    shape = (50, d) if members is None else (members, 50, d)
    assert len(path) == K + 1 and {x.shape for x in path} == {shape}
    assert stats.kstest(path[0].numpy().ravel(), "norm").pvalue > 1e-6
    if members:  # all from the same z
        assert torch.equal(*path[0])
    assert torch.equal(path[-1], flow.sample(50, seed=3))
    path[-1] = flow.outermost.inverse(path[-1])[0]
    for layer, z, x in zip(flow.layers, path[:-1], path[1:], strict=True):
        with torch.no_grad():
            torch.testing.assert_close(layer.forward(z)[0], x)
    assert not path[-1].requires_grad


def test_points_are_shifted_before_they_are_cast():
    """So a flow in single precision has its digits far from the origin."""
    flow, x = make_flow(2, dtype=torch.float32), normal_points(50)
    flow.outermost.set(0, 1)
    here = flow.log_probability(x)
    flow.outermost.set(2.0**24 + 0.25, 1)
    there = flow.log_probability(x + 2.0**24 + 0.25)
    torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-4)
    assert there.dtype == torch.float32


def test_affine_coupling_is_what_the_formula_says():
    """Rows: (n, d - j) with s and t side by side."""
    s, t = torch.tensor([[-3.0], [0.5]]), torch.tensor([[1.0], [-2.0]])
    outputs, y = torch.cat([s, t], 1), torch.tensor([[2.0], [5.0]])
    bounded = 1.5 * torch.tanh(s / 1.5)
    out, log_slope = helpers.AffineCoupling(bound=1.5).forward(y, outputs)
    torch.testing.assert_close(out, bounded.exp() * y + t)
    torch.testing.assert_close(log_slope, bounded)
    free = helpers.AffineCoupling(bound=None)
    assert torch.equal(free.forward(y, outputs)[0], y + t)  # starts at 0
    with torch.no_grad():
        free.gain += 0.5
    out, log_slope = free.forward(y, outputs)
    torch.testing.assert_close(out, (0.5 * s).exp() * y + t)
    torch.testing.assert_close(log_slope, 0.5 * s)


@st.composite
def splines(draw, dtypes=(torch.float32, torch.float64)):
    """-> (spline, its raw outputs, its knots x and y)."""
    bins = draw(st.sampled_from([2, 3, 8, 20, 64]))
    interval = draw(st.sampled_from([0.5, 5.0]))
    spline = helpers.SplineCoupling(bins=bins, interval=interval)
    size = draw(st.sampled_from([0.5, 3.0, 30.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    raw = size * torch.randn(3 * bins - 1, generator=generator)
    raw = raw.to(draw(st.sampled_from(dtypes)))
    xs, ys = (interval * spline.knots(part)
              for part in (raw[:bins], raw[bins : 2 * bins]))  # fmt: skip
    return spline, raw, xs, ys


def evaluate(function, raw, y):
    """One spline, of one coordinate, at all y: (n,) -> (n,), (n,)."""
    out, log_slope = function(y[:, None], raw.expand(len(y), -1))
    return out[:, 0], log_slope[:, 0]


@given(splines())
def test_spline_is_the_identity_outside_its_interval(case):
    spline, raw, _, _ = case
    L = spline.interval
    y = torch.tensor([-1e30, -3 * L, -L, L, 1.01 * L, 1e6], dtype=raw.dtype)
    y.requires_grad_()
    for function in (spline.forward, spline.inverse):
        out, log_det = evaluate(function, raw, y)
        (slope,) = torch.autograd.grad((out + log_det).sum(), y)
        assert torch.equal(out, y) and (log_det == 0).all()
        assert (slope == 1).all()


@given(splines([torch.float64]))
def test_spline_passes_its_knots_with_their_slopes(case):
    """A rational-quadratic piece is determined by that. Neither side of a
    knot differs: values, slopes and log-slopes are continuous."""
    spline, raw, xs, ys = case
    slopes = torch.exp(2 * torch.tanh(raw[2 * spline.bins :] / 2))
    one = torch.ones(1, dtype=raw.dtype)
    slopes = torch.cat([one, slopes, one])
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


def test_spline_pieces_are_at_least_a_share_of_an_equal_one():
    spline = helpers.SplineCoupling(bins=8)
    raw = torch.tensor([100.0] + 7 * [0.0])
    widths = spline.knots(raw).diff()
    torch.testing.assert_close(widths[1:], torch.full((7,), 2 * 0.16 / 8))
    torch.testing.assert_close(widths.sum(), torch.tensor(2.0))


@pytest.mark.parametrize("members", [None, 3])
@pytest.mark.parametrize("kept", [1, 4])
@pytest.mark.parametrize("start", ["uniform", "spread"])
def test_weights_start_within_the_sizes_that_are_said(start, kept, members):
    """Uniform, so that the largest of many comes near its bound."""
    mask, hidden = [1] * kept + [0] * 100, 200
    layer = helpers.CouplingLayer(
        mask, members, hidden=hidden, start=start, seed=4
    )
    first, second, last = (layer.network[k] for k in (0, 2, 4))
    near, far = kept**-0.5, hidden**-0.5
    bounds = {
        "uniform": (near, near, far, far, far, far),
        "spread": (near, 2.5, far * 6**0.5, far, far / 20, far / 20),
    }[start]
    weights = (w for of in (first, second, last) for w in of.parameters())
    for weight, bound in zip(weights, bounds, strict=True):
        assert 0.95 * bound < weight.abs().max() < 1.0001 * bound
        assert abs(weight.mean()) < 0.2 * bound
    if start == "spread":
        lengths = first.weight.norm(dim=-2)
        torch.testing.assert_close(lengths, torch.ones_like(lengths))


def test_members_of_one_generator_differ():
    one = torch.Generator().manual_seed(0)
    drawn = helpers.random_generators(one, 60, helpers.WEIGHTS)
    assert len({generator.initial_seed() for generator in drawn}) == 60
