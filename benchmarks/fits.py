"""Training K = 4 couplings on 1500 points of five Gaussians."""

import copy
import math
import os
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import normflows as nf
import numpy as np
import torch
import zuko
from nflows import distributions, flows, transforms
from timing import markdown, spread, timed
from torch import nn
from torch.distributions import MultivariateNormal
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, random_split

from helpers import CouplingFlow, ToyDataset, toy_distribution
from training import train

K, N, HIDDEN, BINS, TAIL = 4, 1500, 32, 16, 5.0
BATCH, EPOCHS, TURNS, POINTS = 256, 250, 3, 50_000
TRUTH = toy_distribution("GaussiansRot", 5)


def dataset(seed):
    return ToyDataset("GaussiansRot", N, seed, num_gaussians=5)


def ours(members, coupling, epochs, seed):
    data = [dataset(seed + i) for i in range(members)]
    flow = CouplingFlow(K, members, coupling, seed)
    flow = train(flow, data, epochs, seed=seed, progress=False).flow
    return [flow.member(i) for i in range(members)]


def fit(model, epochs, batches, valid, adam, schedule=None, last=False):
    """The loop that all others share: -> [model], at its best or its last
    epoch."""
    lowest, weights = math.inf, None
    for _ in range(epochs):
        for batch in batches():
            adam.zero_grad()
            (-log_prob(model, batch).mean()).backward()
            adam.step()
            if schedule:
                schedule.step()
        with torch.no_grad():
            loss = -sum(log_prob(model, part).sum().item() for part in valid)
        if loss < lowest or last:
            lowest, weights = loss, copy.deepcopy(model.state_dict())
    model.load_state_dict(weights)
    return [model]


def log_prob(model, x):
    """The same question in three dialects."""
    if isinstance(model, CouplingFlow):
        return model.log_probability(x)
    model = model() if isinstance(model, zuko.lazy.Flow) else model
    return model.log_prob(x)


class Network(nn.Sequential):
    """1 -> HIDDEN -> HIDDEN -> outputs."""

    def __init__(self, outputs=1):
        super().__init__(
            nn.Linear(1, HIDDEN), nn.LeakyReLU(), nn.Linear(HIDDEN, HIDDEN),
            nn.LeakyReLU(), nn.Linear(HIDDEN, outputs),
        )  # fmt: skip

    def forward(self, x, context=None):  # nflows passes a context along
        return super().forward(x)


class CourseFlow(nn.Module):
    """K times x2 = exp(a s(z1)) z2 + t(z1), with a learnt scale a from 0."""

    def __init__(self):
        super().__init__()
        self.s = nn.ModuleList(Network() for _ in range(K))
        self.t = nn.ModuleList(Network() for _ in range(K))
        self.a = nn.ParameterList(torch.zeros(1) for _ in range(K))
        self.prior = MultivariateNormal(torch.zeros(2), torch.eye(2))

    def log_prob(self, x):
        total = torch.zeros(len(x))
        for k in reversed(range(K)):
            order = slice(None, None, -1 if k % 2 else 1)
            kept, changed = x.split(1, 1)[order]
            s, t = self.a[k] * self.s[k](kept), self.t[k](kept)
            changed = (changed - t) * torch.exp(-s)
            x = torch.cat((kept, changed)[order], 1)
            total = total - s.squeeze(1)
        return self.prior.log_prob(x) + total


def course(epochs, seed):
    """The recipe as the course gives it: where fewer than 500 points are held
    out, the last weights."""
    torch.manual_seed(seed)
    flow, parts = CourseFlow(), random_split(dataset(seed), [0.9, 0.1])
    fitted, valid = (DataLoader(part, batch_size=64) for part in parts)
    adam = torch.optim.Adam(flow.parameters(), lr=1e-3)
    return fit(flow, epochs, lambda: fitted, valid, adam, last=True)


def peer(build, epochs, seed):
    """Adam with cosine decay and shuffled batches."""
    torch.manual_seed(seed)
    model, points = build(), dataset(seed).data
    fitted, valid = points.split([N - N // 10, N // 10])
    count = math.ceil(len(fitted) / BATCH)
    adam = torch.optim.Adam(model.parameters(), 1e-2, fused=True)
    cosine = CosineAnnealingLR(adam, epochs * count)

    def batches():
        return fitted[torch.randperm(len(fitted))].tensor_split(count)

    return fit(model, epochs, batches, [valid], adam, cosine)


ZUKO = dict(transforms=K, hidden_features=(HIDDEN, HIDDEN),
            activation=nn.LeakyReLU)  # fmt: skip


def normflows_flow(layers):
    base = nf.distributions.DiagGaussian(2, trainable=False)
    return nf.NormalizingFlow(base, [layer for k in layers for layer in k])


def nflows_flow(kind, **options):
    layers = [kind([k % 2, 1 - k % 2], lambda _, n: Network(n), **options)
              for k in range(K)]  # fmt: skip
    transform = transforms.CompositeTransform(layers)
    return flows.Flow(transform, distributions.StandardNormal([2]))


OURS = {
    "16 members": partial(ours, 16, "affine"),
    "8 members": partial(ours, 8, "affine"),
    "1 member": partial(ours, 1, "affine"),
}
COURSE = {"course's loop": course}
AFFINE = OURS | COURSE | {
    "zuko RealNVP": partial(peer, lambda: zuko.flows.RealNVP(2, **ZUKO)),
    "normflows affine": partial(peer, lambda: normflows_flow(
        (nf.flows.AffineCouplingBlock(Network(2)), nf.flows.Permute(2, "swap"))
        for _ in range(K)
    )),
    "nflows affine": partial(peer, lambda: nflows_flow(
        transforms.AffineCouplingTransform
    )),
}  # fmt: skip
SPLINE = {
    "8 members, spline": partial(ours, 8, "spline"),
    "zuko NSF": partial(peer, lambda: zuko.flows.NSF(2, bins=BINS, **ZUKO)),
    "normflows RQ spline": partial(peer, lambda: normflows_flow(
        [nf.flows.CoupledRationalQuadraticSpline(
            2, 1, HIDDEN, num_bins=BINS, tail_bound=TAIL,
            activation=nn.LeakyReLU, reverse_mask=bool(k % 2),
        )] for k in range(K)
    )),
    "nflows RQ spline": partial(peer, lambda: nflows_flow(
        transforms.PiecewiseRationalQuadraticCouplingTransform,
        num_bins=BINS, tails="linear", tail_bound=TAIL,
    )),
}  # fmt: skip


def divergence(model):
    """KL(truth || model) in nats, on fresh points."""
    x = TRUTH.sample(POINTS, seed=1000)
    with torch.no_grad():
        log_q = log_prob(model.eval(), x.float())
    return (TRUTH.log_probability(x) - log_q).mean().item()


def measure(names, epochs, turns):
    """In turns, after one epoch unmeasured: {name: CPU ms a model and epoch,
    set-up included (turns,)}, {name: KL of each model of each turn}."""
    warnings.simplefilter("ignore")  # of the libraries that are measured
    cost, kl = {name: [] for name in names}, {name: [] for name in names}
    for name in names:
        (AFFINE | SPLINE)[name](1, 0)
    for turn in range(turns):
        for name in names:
            fit = partial((AFFINE | SPLINE)[name], epochs, 16 * turn)
            models, seconds = timed(fit)
            cost[name].append(1e3 * seconds / epochs / len(models))
            kl[name] += [divergence(model) for model in models]
            print(f"{name}: {cost[name][-1]:.1f} ms", file=sys.stderr)
    return {name: np.array(values) for name, values in cost.items()}, kl


def table(names, base, cost, kl):
    rows = [
        (name, spread(cost[name]),
         "1" if name == base else spread(cost[name] / cost[base]),
         f"{spread(kl[name])[:-1]}; {len(kl[name])})")
        for name in names
    ]  # fmt: skip
    return markdown(f"flow | CPU ms | ÷ {base} | KL, nats", rows)


def report(quick):
    """The section on training, in Markdown."""
    run = (2, 1) if quick else (EPOCHS, TURNS)
    same, kl = measure([*AFFINE, *SPLINE], *run)
    (loop,) = COURSE  # some of whose fits are far off: more of them
    kl[loop] += [divergence(*course(run[0], seed)) for seed in range(1, 6)]
    os.environ["MKL_CBWR"] = "AUTO"  # which a new process alone heeds
    with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
        fast, _ = fresh.submit(measure, [*OURS, *COURSE], *run).result()
    rows = [
        (name, spread(same[name]), spread(same[loop] / same[name]),
         spread(fast[name]), spread(fast[loop] / fast[name]))
        for name in fast
    ]  # fmt: skip
    head = "flow | same digits: CPU ms | loop ÷ it | " \
           "MKL's fastest: CPU ms | loop ÷ it"  # fmt: skip
    return f"""## Training

K = {K} layers of 1 → {HIDDEN} → {HIDDEN} → 2, {N} points of five Gaussians,
{run[0]} epochs with their validation. CPU ms of a model and epoch, set-up
included; the ratio is taken turn by turn; the divergence of the truth from the
models is their median (lowest–highest; number of models). The course's loop:
batches of 64, Adam at 1e-3, no shuffling, the last weights, and a network each
for s and t. The libraries: batches of {BATCH}, shuffled, Adam at 1e-2 with
cosine decay, the best epoch on held-out points; the spline of normflows has a
residual network, which is a layer deeper. All run with the kernels that give
the same digits on every processor.

{table(AFFINE, "8 members", same, kl)}

{table(SPLINE, "8 members, spline", same, kl)}

What these kernels cost, beside MKL's fastest (`MKL_CBWR=AUTO`),
and what the course's loop takes in parts of the others' time:

{markdown(head, rows)}"""
