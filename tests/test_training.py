"""Laws of train: what it optimises, keeps, returns and survives."""

import copy
import io
import math
import signal
import time
import warnings

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import datasets
from truths import normal_points

import helpers
import preparation
import training
from helpers import COUPLINGS, CouplingFlow, ToyDataset
from study import kl_divergence
from training import train

PLAIN = dict(standardize=False, jitter=0, sharpened=False, average=0,
             cosine=False, warmup=0, beta2=0.999, shuffle=False)  # fmt: skip


def small_flow(members=None, seed=0, coupling="affine", K=2, **options):
    return CouplingFlow(K, members, coupling, seed, hidden=8, **options)


def data(N=100, seed=0, d=2):
    means = 2 * normal_points(3, d=d)
    return ToyDataset(helpers.GaussianMixture(means, 0.4), N, seed).data


def quick(flow, points, epochs=4, **options):
    options = dict(batch_size=32, progress=False) | options
    return train(flow, points, epochs, **options)


def listen(monkeypatch, training=None, change=lambda number, log_p: log_p):
    """A list of the points that the flow's density is asked for, in training
    or in validation alone, and of its answers; change(number, answer) may
    give another answer, or raise."""
    seen, original = [], CouplingFlow.log_probability

    def log_probability(self, x):
        log_p = original(self, x)
        if training in (None, torch.is_grad_enabled()):
            log_p = change(len(seen), log_p)
            seen.append((x, log_p.detach()))
        return log_p

    monkeypatch.setattr(CouplingFlow, "log_probability", log_probability)
    return seen


def weights(flow):
    return torch.cat([p.flatten() for p in flow.state_dict().values()])


def split(points, count, seed=0):
    """The points that train fits, and the `count` that it holds out."""
    generator = helpers.random_generator(seed, helpers.TRAINING)
    order = torch.randperm(len(points), generator=generator)
    return points[order[count:]], points[order[:count]]


def same(one, other):
    """Two results, bit by bit, but for the seconds."""
    return all(
        torch.equal(weights(a), weights(b)) if isinstance(a, CouplingFlow)
        else torch.equal(torch.as_tensor(a), torch.as_tensor(b))
        for name, a in vars(one).items() if name != "seconds"
        for b in [getattr(other, name)]
    )  # fmt: skip


def plain_loop(flow, points, epochs, batch_size, learning_rate, cosine,
               average, warmup, beta2):  # fmt: skip
    """The course's loop, with a rise, a cosine and a running mean as
    formulas."""
    flow, losses = copy.deepcopy(flow), []
    fitted, valid = split(points, len(points) // 10)
    adam = torch.optim.Adam(flow.parameters(), betas=(0.9, beta2))
    count = math.ceil(len(fitted) / batch_size)
    mean, step, steps = 0, 0, epochs * count
    for _ in range(epochs):
        total = 0
        for part in fitted.tensor_split(count):
            turn = math.pi * step / steps if cosine else 0
            rise = min(1, (step + 1) / max(1, warmup * steps))
            rate = rise * learning_rate * (1 + math.cos(turn)) / 2
            adam.param_groups[0]["lr"] = rate
            loss = -flow.log_probability(part).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
            step += 1
            share = max(1 - average, 1 / step)
            now = torch.nn.utils.parameters_to_vector(flow.parameters())
            mean = share * now.detach() + (1 - share) * mean
            total += loss.item() * len(part) / len(fitted)
        used = copy.deepcopy(flow)
        torch.nn.utils.vector_to_parameters(mean, used.parameters())
        losses.append((total, -used.log_probability(valid).mean().item()))
    return np.transpose(losses)


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("warmup, beta2", [(0, 0.999), (0.4, 0.9)])
@pytest.mark.parametrize("cosine, average, d", [
    (False, 0, 2), (True, 0, 3), (True, 0.9, 5),
])  # fmt: skip
def test_loop_is_that_of_adam(coupling, cosine, average, d, warmup, beta2):
    """Float64 and 20 steps: sums in another order part by below 1e-7."""
    flow = small_flow(coupling=coupling, dim=d).double()
    points = data(110, d=d).double()
    options = dict(batch_size=32, learning_rate=0.02, cosine=cosine,
                   average=average, warmup=warmup, beta2=beta2)  # fmt: skip
    result = quick(flow, points, 5, **PLAIN | options)
    losses, valid = plain_loop(flow, points, 5, **options)
    np.testing.assert_allclose(result.train_losses, losses, rtol=1e-7)
    np.testing.assert_allclose(result.valid_losses, valid, rtol=1e-7)
    assert result.train_losses[-1] < result.train_losses[0] - 0.05


def test_epoch_is_every_point_once_with_noise_in_any_order(monkeypatch):
    seen, points = listen(monkeypatch, training=True), data(103).double()
    quick(small_flow().double(), points, jitter=1e-3, sharpened=False,
          standardize=False)  # fmt: skip
    epochs = torch.cat([x for x, _ in seen]).reshape(4, 93, 2)
    fitted, _ = split(points, 10)
    away, order = torch.cdist(epochs, fitted.expand(4, -1, -1)).min(2)
    assert (order.sort(1).values == torch.arange(93)).all()
    assert 0 < away.min() and away.max() < 0.01
    assert (order[0] != order[1]).any()


@pytest.mark.parametrize("members", [None, 2])
@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("sharpened, jitter, d", [
    (True, 1.2, 2), (False, 0.6, 2), (True, 1.0, 5),
])  # fmt: skip
def test_jitter_is_the_kernels(
    monkeypatch, members, standardize, sharpened, jitter, d
):
    """An epoch is each centre once plus noise N(0, I) of the width jitter h
    sqrt(2 / d), new in each epoch and for each member: points of the kernel
    estimate."""
    seen, S, points = listen(monkeypatch, True), members or 1, data(200, d=d)
    result = quick(small_flow(members, dim=d), points, 50, jitter=jitter,
                   sharpened=sharpened, shuffle=False,
                   standardize=standardize)  # fmt: skip
    u = torch.cat([x.reshape(S, -1, d) for x, _ in seen], 1)
    x = result.flow.outermost.forward(u.reshape(*u.shape[members is None :]))
    x = x[0].reshape(S, 50, 180, d)
    columns = []
    for i in range(S):
        fitted, _ = split(points, 20, i)
        h = jitter * helpers.select_bandwidth(fitted) * (2 / d) ** 0.5
        own = result.noise.reshape(S, d)[i].tolist()
        assert own == pytest.approx([h] * d)
        centres = helpers.sharpen(fitted, h) if sharpened else fitted
        noise = (x[i] - centres) / h
        assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-6
        columns.append(noise.movedim(1, 0)[:, :20].reshape(180, -1))
    columns = np.hstack(columns)
    gaps = np.corrcoef(columns.T) - np.eye(columns.shape[1])
    assert abs(gaps).max() < 6.5 / 180**0.5


@pytest.mark.parametrize("d", [2, 3])
def test_unit_and_noise_of_many_points_are_those_of_a_part(d):
    """The bandwidth by the rate at which the best one falls, N^(-1/(d+4)).
    The part is the same for members that share the points, and none of it is
    held out, wherever the points stand."""
    points = data(3000, d=d)  # of which 2700 are fitted
    rows = helpers.some_of(3000, 2000)
    part = points[rows]
    for members in (None, 2):
        result = quick(small_flow(members, dim=d), points, 1, jitter=1.0,
                       batch_size=900)  # fmt: skip
        h = helpers.select_bandwidth(part) * 1.35 ** (-1 / (d + 4))
        expected = torch.full_like(result.noise, h * (2 / d) ** 0.5)
        torch.testing.assert_close(result.noise, expected)
        shift = part.mean(0).expand_as(result.noise)
        assert not np.isin(result.held_out, rows).any()
        own = result.flow.outermost.shift[..., 0, :]
        torch.testing.assert_close(own, shift, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("members, average", [(None, 0), (2, 0.9)])
@pytest.mark.parametrize("fraction, count", [
    (0.1, 11), (0.25, 28), (0.001, 1), (0.96, 108),
])  # fmt: skip
def test_losses_are_of_points_that_the_seed_holds_out(
    members, average, fraction, count
):
    """Without noise."""
    points = data(113)
    result = quick(small_flow(members), points, 6, jitter=0.5,
                   average=average, valid_fraction=fraction)  # fmt: skip
    held = torch.stack([split(points, count, i)[1]
                        for i in range(members or 1)])  # fmt: skip
    held = held if members else held[0]
    assert torch.equal(points[result.held_out], held)
    loss = -result.flow.log_probability(held).mean(-1)
    used = torch.as_tensor(result.used_epoch)
    expected = result.valid_losses.gather(0, used[None])[0]
    torch.testing.assert_close(loss.detach(), expected)  # float32


@pytest.mark.parametrize("members", [None, 6])
@pytest.mark.parametrize("tolerance", [1, 0, math.inf])
def test_used_epoch_is_the_last_near_best(monkeypatch, members, tolerance):
    """The last within a standard error, recomputed point by point; the best
    one, or the last. A high rate makes losses that go up and down."""
    seen = listen(monkeypatch, training=False)
    result = quick(
        small_flow(members, seed=1), data(200), 40, average=0, warmup=0,
        learning_rate=0.2, cosine=False, tolerance=tolerance,
        standardize=False,
    )  # fmt: skip
    points = torch.stack([log_p for _, log_p in seen])
    losses = -points.mean(-1)
    assert torch.equal(result.valid_losses, losses)
    points = points.reshape(40, members or 1, -1)
    best, used, lowest = (
        np.atleast_1d(entry) for entry in
        (result.best_epoch, result.used_epoch, result.best_valid_loss)
    )  # fmt: skip
    for i, own in enumerate(losses.reshape(40, -1).T):
        assert best[i] == own.argmin() and lowest[i] == own.min()
        gap = (points[best[i], i] - points[best[i] :, i]).numpy()
        near = (gap.mean(1) <= stats.sem(gap, axis=1)).nonzero()[0]
        assert used[i] == {0: best[i], 1: best[i] + near[-1]}.get(
            tolerance, 39
        )
    if members:  # there was something to choose
        assert (best < 39).any()


@pytest.mark.parametrize("members", [None, 2])
@pytest.mark.parametrize("lost", [1, 3])
def test_epoch_of_no_number_is_never_used(monkeypatch, members, lost):
    """Though all others lose more than 0 nats."""
    listen(monkeypatch, False, lambda k, p: p * (math.nan if k == lost else 1))
    result = quick(small_flow(members), data())
    finite = result.valid_losses.reshape(4, -1).isfinite()
    assert (finite == (torch.arange(4) != lost)[:, None]).all()
    for epoch in (result.best_epoch, result.used_epoch):
        assert (np.ravel(epoch) != lost).all()


@pytest.mark.parametrize("members, shape", [(None, ()), (3, (3,))])
def test_result_has_its_shapes_and_the_flow_is_left_as_it_was(members, shape):
    flow, points = small_flow(members), data()
    before, held = weights(flow).clone(), points.clone()
    result = quick(flow, points)
    assert torch.equal(weights(flow), before) and torch.equal(points, held)
    assert all(p.grad is None for p in flow.parameters())
    assert not torch.equal(before, weights(result.flow))
    for losses in (result.train_losses, result.valid_losses):
        assert losses.shape == (4, *shape) and not losses.requires_grad
    kinds = dict(best_epoch=int, used_epoch=int, best_valid_loss=float,
                 diverged=bool)  # fmt: skip
    assert result.noise.shape == (*shape, 2)
    for name, kind in kinds.items():
        entry = getattr(result, name)
        assert entry.shape == shape if members else isinstance(entry, kind)
    best = torch.as_tensor(result.best_epoch)[None]
    lowest = result.valid_losses.gather(0, best)[0]
    torch.testing.assert_close(torch.as_tensor(result.best_valid_loss), lowest,
                               check_dtype=False)  # fmt: skip
    assert not torch.as_tensor(result.diverged).any()
    assert result.interrupted is False and 0 < result.seconds < 60


def test_same_seed_gives_the_same_bits_whatever_ran_before():
    """And no test touches a global generator."""
    first = quick(small_flow(2), data(), seed=3)
    other = quick(small_flow(2), data(), seed=4)
    assert same(first, quick(small_flow(2), data(), seed=3))
    assert not same(first, other)
    generators = (torch.Generator().manual_seed(5) for _ in range(2))
    assert same(*(quick(small_flow(2), data(), seed=g) for g in generators))


@pytest.mark.parametrize("coupling, bound", [
    ("affine", {}), ("affine", {"bound": None}), ("spline", {}),
])  # fmt: skip
@pytest.mark.parametrize("shared, d", [(False, 2), (True, 2), (False, 3),
                                       (False, 5)])  # fmt: skip
def test_member_is_trained_as_if_alone(coupling, bound, shared, d):
    """All switches on, float64: sums in another order."""
    sets = [data(120, 0 if shared else i, d).double() for i in range(3)]
    flow = small_flow(3, 5, coupling, dim=d, **bound).double()
    many = quick(flow, sets[0] if shared else sets, seed=7)
    for i, points in enumerate(sets):
        single = small_flow(None, 5 + i, coupling, dim=d, **bound).double()
        alone = quick(single, points, seed=7 + i)
        close = dict(rtol=1e-9, atol=1e-9)
        own = weights(many.flow.member(i))
        torch.testing.assert_close(own, weights(alone.flow), **close)
        for name in ("train_losses", "valid_losses"):
            own = getattr(many, name)[:, i]
            torch.testing.assert_close(own, getattr(alone, name), **close)
        torch.testing.assert_close(many.noise[i], alone.noise, **close)
        for name in ("best_epoch", "used_epoch"):
            own = getattr(many, name)[i].item()
            assert own == pytest.approx(getattr(alone, name))
    assert (many.train_losses[:, 0] != many.train_losses[:, 1]).all()


def test_gradients_are_on_where_they_were_off_and_off_where_frozen():
    """What is frozen stays as it is; nothing to train is refused, as are
    modes that forbid gradients."""
    whole = quick(small_flow(), data())
    with torch.no_grad():
        assert same(quick(small_flow(), data()), whole)
    flow = small_flow()
    flow.layers[0].requires_grad_(False)
    result = quick(flow, data()).flow
    for k in (0, 1):
        pairs = zip(flow.layers[k].parameters(),
                    result.layers[k].parameters(), strict=True)  # fmt: skip
        assert all(torch.equal(*pair) == (k == 0) for pair in pairs)
    with torch.inference_mode(), pytest.raises(ValueError, match="flow must"):
        quick(small_flow(), data())


def test_data_may_come_as_a_dataset_points_or_lists():
    dataset = ToyDataset("GaussiansRot", 100, num_gaussians=3)
    points, flow = dataset.data, small_flow(2)
    first = quick(flow, dataset).train_losses
    for other in (
        points, points.numpy(), points.tolist(), [dataset, points.numpy()],
        (points, dataset), torch.stack([points, points]),
    ):  # fmt: skip
        own = quick(flow, other).train_losses
        torch.testing.assert_close(first, own, rtol=1e-4, atol=1e-4)


UNITS = [(1000, 0), (1, 500), (0.001, 7)]


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("a, c", UNITS)
def test_unit_and_origin_do_not_matter(coupling, a, c):
    """In float64, while rounding has no time to grow: the density of the
    same training, transported."""
    points = data(150).double()
    flow = small_flow(coupling=coupling).double()
    here, there = quick(flow, points), quick(flow, a * points + c)
    close = dict(rtol=1e-6, atol=1e-6)
    for name in ("train_losses", "valid_losses"):
        own = getattr(there, name) - 2 * math.log(a)
        torch.testing.assert_close(own, getattr(here, name), **close)
    torch.testing.assert_close(there.noise, a * here.noise, **close)
    x = data(50, 1).double()
    log_p = there.flow.log_probability(a * x + c) + 2 * math.log(a)
    torch.testing.assert_close(log_p, here.flow.log_probability(x), **close)


def scales(points, **options):
    """Those that train finds, and of the points that it fits the largest
    coordinate and the root mean square length, in that unit."""
    flow = quick(small_flow(dim=points.shape[1]), points, 1, **options).flow
    fitted, _ = split(points, len(points) // 10)
    u = flow.outermost.inverse(fitted.double())[0]
    return flow.outermost.scale[0], u.abs().max(), u.square().sum(1).mean()


def test_no_point_lies_beyond_the_interval_of_a_spline():
    points = data(300)
    points[:6] += 9  # a few far out, in a direction of their own
    _, most, square = scales(points)
    assert most.item() == pytest.approx(5, rel=1e-4) and square < 6
    points[:6] += 90  # no more than twofold
    _, most, square = scales(points)
    assert most > 5


def test_an_outlier_does_not_set_the_unit_and_a_cluster_does():
    """Whatever the unit of the other column."""
    points = data(300).double()
    usual, _, _ = scales(points)
    points[:3, 0] = -1e5
    for unit, origin in (1, 0), (1e-3, 0), (1e3, 0), (1, 1e4):
        scale, _, _ = scales(points * torch.tensor([1, unit]) + origin)
        assert scale[0] < 2.5 * usual[0]
    points[:100, 0] = 1e5
    assert scales(points)[0][0] > 1e4
    flags = torch.stack([0.01 * points[:, 1], points[:, 0] < -1e4], 1)
    flags[:9, 1] = 1
    assert scales(flags)[0].isfinite().all()  # not taken as constant


def test_far_from_the_origin_nothing_is_lost():
    """Seconds since 1970, in single precision."""
    points = data(150).double()
    here, there = (quick(small_flow(), points + c) for c in (0, 1.7e9 + 0.3))
    torch.testing.assert_close(there.valid_losses, here.valid_losses)
    log_p = here.flow.log_probability(points)
    far = there.flow.log_probability(points + 1.7e9 + 0.3)
    torch.testing.assert_close(far, log_p, rtol=1e-3, atol=1e-3)


def test_columns_in_units_of_their_own_get_scales_of_their_own():
    """Each with a root mean square of 2.5 / sqrt(d)."""
    points = data(300, d=3).double() * torch.tensor([1, 1000, 0.01])
    flow = quick(small_flow(dim=3), points, 1).flow
    fitted, _ = split(points, 30)
    u = flow.outermost.inverse(fitted)[0]
    rms, far = u.square().mean(0).sqrt(), u.abs().amax()
    expected = torch.full((3,), 2.5 / 3**0.5) / (far / 5 if far > 4.99 else 1)
    assert far < 5 + 1e-3 and (rms <= expected.max() + 1e-3).all()
    torch.testing.assert_close(rms, rms[[0, 0, 0]], rtol=1e-4, atol=0)
    round_ones = quick(small_flow(dim=3), 3 * data(300, d=3), 1).flow
    one = round_ones.outermost.scale[0]
    assert (one == one[0]).all()  # and one where one will do


@pytest.mark.parametrize("d", [2, 3, 5])
def test_points_have_one_length_in_every_unit(d):
    """2.5, in one scale for all, one for each and the covariance's shape."""
    x = torch.from_numpy(np.random.default_rng(d).uniform(-1, 1, (500, d)))
    assert len([*preparation.units(9 * x)]) == 2  # no shape
    x[:, 1] = x[:, 0] + 0.3 * x[:, 1]
    x = x * torch.arange(1, d + 1) + 7
    seen = [unit.inverse(x)[0] for unit in preparation.units(x)]
    for u in seen:
        assert u.abs().max() < 5 and u.mean(0).abs().max() < 1e-9
        length = u.square().sum(1).mean().sqrt().item()
        assert length == pytest.approx(2.5, rel=1e-9)
    one, each, shape = (u.T.cov(correction=0) for u in seen)
    assert each.diagonal().allclose(each[0, 0])
    assert not one.diagonal().allclose(one[0, 0])
    assert shape.allclose(shape[0, 0] * torch.eye(d).double())


def test_columns_that_go_together_get_the_shape_of_their_covariance():
    """And noise of that shape; where they hardly do, one scale is kept."""
    mix = torch.tensor([[1, 50, -2], [0, 10, 3], [0, 0, 0.1]]).double()
    points = data(300, d=3).double() @ mix
    result = quick(small_flow(dim=3), points, 1)
    fitted, _ = split(points, 30)
    u = result.flow.outermost.inverse(fitted)[0]
    round_ones = (u.T.cov() / u.var(0).mean()).round(decimals=4)
    assert torch.equal(round_ones, torch.eye(3).double())
    length, far = u.square().sum(1).mean().sqrt(), u.abs().max()
    assert length.item() == pytest.approx(2.5, rel=1e-3) or far > 4.99
    assert length > 1.25 and far < 5.01
    shares = result.noise / fitted.std(0)
    torch.testing.assert_close(shares, shares[[0, 0, 0]], rtol=1e-4, atol=0)
    log_p = result.flow.log_probability(points[:5])
    assert log_p.isfinite().all()
    hardly = torch.tensor([[1, 0.5, 0], [0, 1, 0.5], [0, 0, 1]]).double()
    for n, other in (300, hardly), (10, mix):  # too few
        flow = quick(small_flow(dim=3), data(n, d=3).double() @ other, 1).flow
        assert torch.equal(flow.outermost.shear, torch.eye(3))


@pytest.mark.parametrize("name, epochs", [
    ("wine", 120), ("breast_cancer", 30), ("iris", 120),
])  # fmt: skip
def test_tables_of_others_are_fitted_better_than_by_one_gaussian(name, epochs):
    """In the units that they come in, held out."""
    x = getattr(datasets, f"load_{name}")().data[:, :10]
    flow = CouplingFlow(4, coupling="spline", dim=x.shape[1])
    result = train(flow, x, epochs, valid_fraction=0.3, progress=False)
    unit = x.std(0)  # scipy takes the covariance for singular in theirs
    u, held_out = x / unit, x[result.held_out] / unit
    u = np.delete(u, result.held_out, 0)
    normal = stats.multivariate_normal(u.mean(0), np.cov(u.T))
    log_p = normal.logpdf(held_out).mean() - np.log(unit).sum()
    assert -result.best_valid_loss > log_p + 0.1


def test_long_tails_do_not_decide_whether_columns_go_together():
    """Student's t with 1.5 degrees of freedom, alone and mixed; and of many
    columns of which each has outliers."""
    random = np.random.default_rng(0)
    alone = random.standard_t(1.5, size=(400, 3))
    mixed = alone @ [[1, 0.9, 0.9], [0, 0.2, 0], [0, 0, 0.2]]
    for x, shape in (alone, False), (mixed, True):
        unit, _ = preparation.unit_and_bandwidth(
            torch.tensor(x), training.Recipe()
        )
        assert torch.equal(unit.shear, torch.eye(3).double()) != shape
    far = np.exp(6 * random.normal(size=(40, 300)))  # hardly a row without
    assert quick(small_flow(dim=300), far, 1).valid_losses.isfinite().all()


def test_repeated_values_do_not_hide_another_unit():
    """A likelihood rewards small h where values repeat, so that one scale for
    all would win; and no flow learns a coordinate a thousandth as wide."""
    random = np.random.default_rng(3)
    steps = random.choice([1000, 2000, 3000, 4000], 500)
    x = np.stack([steps, random.normal(size=500)], 1)
    result = quick(small_flow(coupling="spline"), x, 30)
    unit = result.flow.outermost.scale[0] / torch.tensor(x).std(0)
    assert unit[0].item() == pytest.approx(unit[1].item(), rel=0.05)
    spread = result.flow.sample(2000).std(0) / torch.tensor(x).std(0)
    assert (spread - 1).abs().max() < 0.25


def test_outliers_that_are_not_fitted_are_told():
    """Whether one of them is held out or not."""
    x = np.random.default_rng(0).normal(size=(200, 2))
    held = split(torch.tensor(x), 20)[1]
    far = int((torch.tensor(x) != held[0]).all(1).nonzero()[0])
    x[far] = 1e6
    with pytest.warns(UserWarning, match="higher .* held out, by .* outliers"):
        quick(small_flow(), x)
    x = np.random.default_rng(1).normal(size=(1000, 2))
    held = split(torch.tensor(x), 100)[1]
    fitted = (torch.tensor(x) != held[:, None]).all(2).all(0).nonzero()[:, 0]
    x[fitted[:3]] = 60
    with pytest.warns(UserWarning, match="higher .* held out, by .* outliers"):
        quick(small_flow(coupling="spline"), x, 5)


def test_far_from_the_origin_a_flow_may_change_its_precision():
    """The shift keeps its digits, whichever dtype it is saved and read in."""
    x = data(200).double() + torch.tensor([5e9, -4e8])
    flow = quick(small_flow().double(), x).flow
    expected = flow.log_probability(x)
    loaded = small_flow()
    loaded.load_state_dict(flow.state_dict())
    there = copy.deepcopy(loaded).double()
    for other in (loaded, copy.deepcopy(flow).float(), there):
        actual = other.log_probability(x).double()
        torch.testing.assert_close(actual, expected, rtol=0, atol=0.01)


def test_whole_numbers_are_told():
    """Where kernels are narrower than their steps, and not where noise or a
    wide spread fills these."""
    random = np.random.default_rng(0)
    counts = random.poisson([1000, 3], (600, 2)).astype(float)
    unit = counts.std(0)
    with pytest.warns(UserWarning, match=r"columns \[1\] of data .* comb"):
        quick(small_flow(), counts)
    with pytest.warns(UserWarning, match=r"\[1\] of samples .*comb") as seen:
        helpers.select_bandwidth(counts / unit)
    assert seen[0].filename == __file__
    filled = counts + random.uniform(-0.5, 0.5, counts.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quick(small_flow(), filled)
        helpers.select_bandwidth(filled / unit)
        helpers.select_bandwidth(counts[:3])  # no step is known from three


def test_a_flow_behind_its_target_is_told():
    random = np.random.default_rng(0)
    towns = random.normal(size=(300, 2)) * 0.01
    towns += random.uniform(-90, 90, (5, 2))[random.integers(5, size=300)]
    found = [
        preparation.prepare(
            small_flow(members), [torch.tensor(towns)], training.Recipe(),
            helpers.random_generators(0, members, helpers.TRAINING),
        )[1] for members in (1, 2)
    ]  # fmt: skip
    for members in (None, 2):
        with pytest.warns(UserWarning, match="kernel estimate .* is better"):
            quick(small_flow(members), towns)
    one, two = map(training.target_log_p, found)
    assert one.shape == (1,) and two.shape == (2,) and one[0] == two[0]
    points = found[1]
    away = points.valid[1, :, None].double() - points.centres[1].double()
    scale = points.noise[1, 0].double()
    log_k = torch.tensor(stats.norm.logpdf(away, scale=scale)).sum(2)
    expected = torch.logsumexp(log_k, 1).mean() - np.log(away.shape[1])
    assert two[1].item() == pytest.approx(expected.item())
    bare = points._replace(noise=0 * points.noise)
    assert training.target_log_p(bare).isnan().all()


def test_a_flow_that_has_hardly_begun_is_told():
    """In the beginning it is narrower than the points: best where those that
    are held out lie in the middle."""
    x = data().double()
    held = (x == split(x, 10)[1][:, None]).all(2).any(0)
    x[held] = x.mean(0)
    with pytest.warns(UserWarning, match="epoch . of 60 were .* begun"):
        result = quick(small_flow(), x, 60)
    assert result.used_epoch < 5
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*hardly begun")
        quick(small_flow(), data(), 9, tolerance=math.inf)


def test_rounded_samples_are_told():
    x = data() + torch.tensor([3e6, 0])
    with pytest.warns(UserWarning, match="rounded to .* flow.double"):
        quick(small_flow(), x.double() + 0.1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the data lie so far")
        quick(small_flow().double(), x.double(), 4)
        quick(small_flow(), data() + 500)


def test_outliers_are_the_same_in_every_unit_and_place():
    """Of a column: far from its own median, by its own spread."""
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(100, 3)))
    x[5, 0], x[7, 2] = 1e3, -1e3
    expected = preparation.without_outliers(x).isnan()
    assert expected.nonzero().tolist() == [[5, 0], [7, 2]]
    moved = x * torch.tensor([1e-9, 1, 1e9]) + torch.tensor([1e-3, -1e6, 0])
    assert torch.equal(preparation.without_outliers(moved).isnan(), expected)
    x = torch.from_numpy(np.random.default_rng(1).normal(size=(60, 60)))
    x.diagonal()[:] = 1e3  # in every row, so that none would be left
    assert not preparation.without_outliers(x).isnan().any()
    x[:35].diagonal()[:] = 0
    assert preparation.without_outliers(x).isnan().sum() == 25


def test_a_column_that_follows_from_the_others_is_told():
    x = data(100, d=3).double()
    x[:, 2] = 3 * x[:, 1] - x[:, 0] / 7
    with pytest.warns(UserWarning, match=r"columns \[2\] of data .*leave"):
        flow = quick(small_flow(dim=3), x).flow
    assert torch.equal(flow.outermost.shear, torch.eye(3))


@pytest.mark.parametrize("N", [100, 3000])
def test_centres_are_the_sharpened_points(N):
    """Of many points by a part, with the step that fewer points need."""
    points, recipe = data(N).double(), training.Recipe()
    generators = helpers.random_generators(0, 1, helpers.TRAINING)
    flow, found = preparation.prepare(
        small_flow().double(), [points], recipe, generators
    )
    shift, scale = flow.outermost.shift, flow.outermost.scale
    rows = np.setdiff1d(np.arange(N), found.held_out)
    part = points[helpers.some_of(N, 2000) if N > 2000 else rows]
    h = 1.5 * helpers.select_bandwidth(part)
    step = (len(rows) / len(part)) ** (-2 / 6)
    moved = helpers.sharpen(points[rows], h, step, part)
    expected = ((moved - shift) / scale).numpy()
    actual = found.centres.numpy()
    key = np.lexsort(expected.T), np.lexsort(actual.T)
    np.testing.assert_allclose(actual[key[1]], expected[key[0]], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_rows_and_units_do_not_change_the_fit(coupling):
    """Beyond the scatter of the seeds: rows sorted, a column in another unit,
    which gets a scale of its own, and columns that go together."""
    truth, S = helpers.toy_distribution("Moons"), 4
    data = [ToyDataset(truth, 600, seed).data.double() for seed in range(S)]
    fresh = truth.sample(5000, 99)
    log_p = truth.log_probability(fresh)

    def kls(mix, order=0):
        mix = torch.tensor(mix, dtype=torch.float64)
        sets = [x[x[:, 0].argsort()] if order else x for x in data]
        flow = small_flow(S, coupling=coupling, K=4)
        flow = quick(flow, [x @ mix for x in sets], 60, batch_size=256).flow
        log_q = flow.log_probability(fresh @ mix).detach()
        return (log_p - mix.det().log() - log_q).mean(1)

    drawn, in_rows = (kls([[1, 0], [0, 1]], order) for order in (0, 1))
    assert abs((in_rows - drawn).mean()) < 3 * drawn.std()
    for mix in [[1, 0], [0, 1000]], [[1, 50], [0, 1]]:
        mixed = kls(mix, order=1)
        assert mixed.mean() < 1.5 * drawn.mean() + 3 * drawn.std()


@pytest.mark.parametrize("change", [
    lambda x: torch.cat([x, x]), lambda x: x.round(), lambda x: x.int(),
    lambda x: torch.cat([x[:10]] * 20),
    lambda x: torch.cat([x[:4, :1] + 0.1 * x[:4]] * 50),
])  # fmt: skip
def test_points_that_occur_twice_are_fitted(change):
    points = change(3 * data(100))
    result = quick(small_flow(), points, 30)
    assert result.valid_losses.isfinite().all()
    assert result.valid_losses[-1] < result.valid_losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("d", [2, 3])
def test_trained_flow_is_nearer_the_truth_than_a_gaussian(coupling, d):
    truth = helpers.GaussianMixture(2.5 * torch.eye(3)[:, :d], 0.3)
    points = ToyDataset(truth, 800).data
    normal = helpers.GaussianMixture([points.mean(0)], None, [points.T.cov()])
    flow = CouplingFlow(4, coupling=coupling, hidden=16, dim=d)
    flow = train(flow, points, 60, progress=False).flow
    gauss, own = (kl_divergence(truth, f).value for f in (normal, flow))
    assert 0 < own < 0.7 * gauss


def interrupt(monkeypatch, after):
    """Ctrl-C at the given evaluation of the density, in a training batch
    or in the validation."""

    def stop(number, log_p):
        if number + 1 == after:
            raise KeyboardInterrupt
        return log_p

    listen(monkeypatch, change=stop)


@pytest.mark.parametrize("members", [None, 2])
@pytest.mark.parametrize("after", [9, 10, 12])
def test_interrupt_returns_what_was_reached(monkeypatch, members, after):
    """An epoch is 3 batches and a validation; 9 to 12 lie in the third."""
    flow, points = small_flow(members), data()
    options = dict(cosine=False, warmup=0, average=0.5, seed=2)
    whole = quick(flow, points, 2, **options)
    interrupt(monkeypatch, after)
    with pytest.warns(UserWarning, match="interrupted: .* of 2 epochs"):
        result = quick(flow, points, 10, **options)
    assert result.interrupted and not whole.interrupted
    result.interrupted = False
    assert same(result, whole)


def test_a_flow_behind_a_gaussian_is_told():
    """Not one that has learnt more than a Gaussian can say."""
    x = np.random.default_rng(0).normal(size=(100, 2))
    line = x @ [[1, 2], [0, 0.001]]  # no flow of two layers is so thin
    for unit in (1, 1e3):  # log p of either sign
        with pytest.warns(UserWarning, match="Gaussian is better .* by .* na"):
            quick(small_flow(), line * unit, standardize=False)
    sets = [ToyDataset("Moons", 100).data, torch.tensor(line)]
    with pytest.warns(UserWarning, match="Gaussian is better"):
        quick(small_flow(2), sets, standardize=False)
    generators = helpers.random_generators(0, 1, helpers.TRAINING)
    _, found = preparation.prepare(
        small_flow(), [torch.tensor(line)], training.Recipe(), generators
    )
    rest = np.delete(line, found.held_out, 0)  # as they are, not sharpened
    root = np.cov(rest.T, bias=True)
    normal = stats.multivariate_normal(rest.mean(0), root, allow_singular=True)
    expected = normal.logpdf(line[found.held_out]).mean()
    assert found.gaussian.item() == pytest.approx(expected, rel=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quick(small_flow(K=4), ToyDataset("Circles", 600).data, 30)


def test_a_warning_is_of_the_line_that_called_train(monkeypatch):
    interrupt(monkeypatch, after=9)
    with pytest.warns(UserWarning, match="interrupted") as seen:
        train(small_flow(), data(), 10, batch_size=32, progress=False)
    assert seen[0].filename == __file__


@pytest.mark.parametrize("after", [1, 3, 4])
def test_interrupt_before_the_first_epoch_is_passed_on(monkeypatch, after):
    interrupt(monkeypatch, after)
    with pytest.raises(KeyboardInterrupt):
        quick(small_flow(), data())


@pytest.mark.parametrize("times", [1, 2])
def test_second_interrupt_does_not_wait_for_the_step(monkeypatch, times):
    """The first one does, and both return the last whole epoch."""
    reached = []

    def press(number, log_p):
        if number == 9:  # in the third epoch
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
            reached.append(number)
        return log_p

    # Which a shell takes away from what runs in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    flow, points = small_flow(), data()
    whole = quick(flow, points, 2, cosine=False, warmup=0)
    seen = listen(monkeypatch, change=press)
    with pytest.warns(UserWarning, match="interrupted"):
        result = quick(flow, points, 9, cosine=False, warmup=0)
    assert reached == [9] * (times == 1) and len(seen) == 8 + 3 - times
    assert result.interrupted
    assert torch.equal(weights(result.flow), weights(whole.flow))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.filterwarnings("ignore:interrupted")
def test_interrupt_at_any_moment_returns_what_was_reached(monkeypatch):
    """By real signals: before the end of the first epoch it is passed on,
    and so is one that comes when train has returned; whatever comes between
    returns whole epochs."""
    seen = listen(monkeypatch, training=False)
    flow, points = small_flow(K=1), data(60)
    options = dict(epochs=30, batch_size=20, jitter=0, standardize=False)
    start = time.perf_counter()
    whole = quick(flow, points, **options)
    length, random = time.perf_counter() - start, np.random.default_rng(0)
    alarm = signal.signal(
        signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT)
    )
    reached = []
    for moment in random.uniform(0.01, 0.95, 60):
        seen.clear()
        signal.setitimer(signal.ITIMER_REAL, moment * length)
        try:
            result = quick(flow, points, **options)
        except KeyboardInterrupt:
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert len(seen) in (0, 30)  # before the first epoch, or after all
            continue
        signal.setitimer(signal.ITIMER_REAL, 0)
        n = len(result.valid_losses)
        reached.append(n)
        assert result.interrupted or n == 30
        assert torch.equal(result.valid_losses, whole.valid_losses[:n])
    signal.signal(signal.SIGALRM, alarm)
    assert reached
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.filterwarnings("ignore:members")
def test_diverging_member_is_reported_and_the_others_are_not_disturbed():
    flow = small_flow(3, bound=None)
    calm = quick(flow, data(), 5)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter[1] = 1e20
    with pytest.warns(UserWarning, match=r"members \[1\] diverged"):
        result = quick(flow, data(), 5)
    assert result.diverged.tolist() == [False, True, False]
    assert not calm.diverged.any()
    for i in (0, 2):
        one, other = (weights(r.flow.member(i)) for r in (result, calm))
        assert torch.equal(one, other)
        for name in ("train_losses", "valid_losses", "used_epoch"):
            one, other = (getattr(r, name)[..., i] for r in (result, calm))
            assert torch.equal(one, other)
    assert not result.train_losses[:, 1].isfinite().any()


@pytest.mark.parametrize("members", [None, 2])
def test_divergence_keeps_the_epochs_before(monkeypatch, members):
    flow, points = small_flow(members), data()
    options = dict(cosine=False, warmup=0, average=0.5)
    whole = quick(flow, points, 30, **options)

    def lost(number, log_p):  # in the 31st epoch, which has 3 batches
        return log_p * math.nan if number == 91 else log_p

    listen(monkeypatch, training=True, change=lost)
    with pytest.warns(UserWarning, match="diverged.*learning_rate below"):
        result = quick(flow, points, 50, **options)
    assert len(result.train_losses) == 31 and not result.interrupted
    assert torch.as_tensor(result.diverged).all()
    assert torch.equal(result.train_losses[:30], whole.train_losses)
    assert torch.equal(weights(result.flow), weights(whole.flow))


@pytest.mark.parametrize("members", [None, 2])
def test_all_diverging_names_the_epoch_and_a_remedy(members):
    flow = small_flow(members, bound=None)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.fill_(1e20)
    message = "epoch 1.*learning_rate below 0.03.*bound=2.5"
    with pytest.raises(RuntimeError, match=message):
        quick(flow, data(), 5, learning_rate=0.03)


@pytest.mark.parametrize("where", ["fitted", "held out"])
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_one_outlier_does_not_hide_the_rest(where, coupling):
    """The rest is fitted, and the noise stays within the candidates of the
    robust rule; the likelihood that chooses among them is not robust."""
    points = data(200)
    widest = 1.5 * 1.2 * helpers.reference_bandwidth(points)
    fitted, held_out = split(torch.arange(200), 20)
    points[(fitted if where == "fitted" else held_out)[0]] = 1e4
    flow = small_flow(coupling=coupling)
    result = quick(flow, points, 10)
    assert result.noise.max() < 2 * widest  # quartiles for deviations
    assert result.valid_losses.isfinite().all()
    near = points[points.norm(dim=1) < 1e3]
    gain = [f.log_probability(near).mean().item()
            for f in (flow, result.flow)]  # fmt: skip
    assert gain[1] > gain[0] + 0.05


def test_constant_columns_are_named_and_train_without_unit_and_noise():
    points = data(50, d=3)
    points[:, [0, 2]] = 0.1  # whose mean of 45 is not 0.1
    with pytest.raises(ValueError, match=r"data must vary .* \[0, 2\]"):
        quick(small_flow(dim=3), points)
    with pytest.raises(ValueError, match=r"must differ.*\[1.0, 1.0\]"):
        quick(small_flow(), torch.ones(50, 2), standardize=False)
    losses = quick(small_flow(dim=3), points, **PLAIN).train_losses
    assert losses.isfinite().all() and losses[-1] < losses[0]


@pytest.mark.filterwarnings("error", "ignore:on the held-out points")
@pytest.mark.parametrize("members", [None, 2])
@pytest.mark.parametrize("N", [3, 4, 20])
def test_fewer_points_than_a_batch_train_without_a_warning(N, members):
    result = quick(small_flow(members), data(N), batch_size=256)
    assert result.train_losses.isfinite().all()
    # Of one held-out point no standard error is known: only the best will do.
    if N < 20:
        assert np.array_equal(result.used_epoch, result.best_epoch)


def test_held_out_loss_that_is_never_finite_is_an_error():
    """Not an untrained flow that looks trained."""
    points = data()
    points[(points == split(points, 10)[1][0]).all(1)] = 1e25
    with pytest.raises(RuntimeError, match="held-out"):  # no square in float32
        quick(small_flow(), points, standardize=False, jitter=0)


def test_progress_is_shown_when_asked_for(capsys):
    quick(small_flow(), data())
    assert not capsys.readouterr().err
    quick(small_flow(), data(), progress=True)
    assert "/4 " in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_everything_works_on_a_gpu(coupling):
    flow = small_flow(2, coupling=coupling).to("cuda")
    result = quick(flow, data())
    assert result.flow.log_probability(data()).is_cuda
    assert kl_divergence(helpers.Moons(), result.flow).value.isfinite().all()
    alone, grid = result.flow.member(1), helpers.Grid((0, 1), (0, 1), 3)
    assert alone.sample(3).is_cuda and alone.density(grid).is_cuda
    cpu = quick(small_flow(2, coupling=coupling), data())
    torch.testing.assert_close(
        cpu.train_losses, result.train_losses.cpu(), rtol=1e-3, atol=1e-3
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("members", [None, 2])
def test_own_data_works_on_a_gpu(members):
    """Points that are there already, far from 0, in columns that go together;
    and the weights on a computer without a GPU."""
    mix = torch.tensor([[1, 50, -2], [0, 10, 3], [0, 0, 0.1]]).double()
    points = data(300, d=3).double() @ mix + 100
    flow = small_flow(members, dim=3)
    result = quick(copy.deepcopy(flow).cuda(), points.cuda())
    assert (result.flow.outermost.shear[..., 1, 0] != 0).all()
    path = result.flow.sample_x_each_layer(5, seed=1)
    z, _ = result.flow.inverse(path[-1])
    torch.testing.assert_close(z, path[0], rtol=0.01, atol=0.01)
    saved = io.BytesIO()
    torch.save(result.flow.state_dict(), saved)
    saved.seek(0)
    flow.load_state_dict(torch.load(saved, map_location="cpu"))
    here, there = flow.log_probability(points), result.flow
    there = there.log_probability(points).cpu()
    torch.testing.assert_close(here, there, rtol=1e-3, atol=1e-3)
