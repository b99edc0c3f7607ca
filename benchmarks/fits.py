"""Training K = 4 couplings on 1500 points of five Gaussians."""

import copy
import json
import math
import os
import subprocess
import sys
import time
import warnings

import nflows.distributions
import nflows.flows
import nflows.nn.nets
import nflows.transforms
import normflows
import numpy as np
import torch
import zuko
from timing import markdown, spread
from torch import nn
from torch.utils.data import DataLoader, random_split

from helpers import CouplingFlow, ToyDataset, toy_distribution
from training import train

K, N, HIDDEN, BATCH = 4, 1500, 32, 256
EPOCHS, TURNS, POINTS = 250, 3, 50_000
TRUTH = toy_distribution("GaussiansRot", 5)


def dataset(seed):
    return ToyDataset("GaussiansRot", N, seed, num_gaussians=5)


def ours(members, coupling="affine"):
    def fitted(epochs, seed):
        data = [dataset(seed + i) for i in range(members)]
        flow = CouplingFlow(K, members, coupling, seed)
        flow = train(flow, data, epochs, seed=seed, progress=False).flow
        return [flow.member(i) for i in range(members)]

    return fitted


def best_epoch(model, epochs, step_through, loss):
    """The loop that all others share: -> [model], at its best epoch."""
    lowest, weights = math.inf, None
    for _ in range(epochs):
        step_through()
        with torch.no_grad():
            reached = loss()
        if reached < lowest:
            lowest, weights = reached, copy.deepcopy(model.state_dict())
    model.load_state_dict(weights)
    return [model]


class CourseLayer(nn.Module):
    """x2 = exp(a s(z1)) z2 + t(z1), with a learnt scale a from 0."""

    def __init__(self, kept):
        super().__init__()
        self.kept = kept
        self.s, self.t = (
            nn.Sequential(
                nn.Linear(1, HIDDEN), nn.LeakyReLU(),
                nn.Linear(HIDDEN, HIDDEN), nn.LeakyReLU(),
                nn.Linear(HIDDEN, 1),
            )
            for _ in range(2)
        )  # fmt: skip
        self.scale = nn.Parameter(torch.zeros(1))

    def inverse(self, x):
        kept, changed = x.split(1, 1)[:: 1 - 2 * self.kept]
        s, t = self.scale * self.s(kept), self.t(kept)
        both = kept, (changed - t) * torch.exp(-s)
        return torch.cat(both[:: 1 - 2 * self.kept], 1), -s.squeeze(1)


class CourseFlow(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(CourseLayer(k % 2) for k in range(K))
        self.prior = torch.distributions.MultivariateNormal(
            torch.zeros(2), torch.eye(2)
        )

    def log_prob(self, x):
        total = torch.zeros(len(x))
        for layer in reversed(self.layers):
            x, log_det = layer.inverse(x)
            total = total + log_det
        return self.prior.log_prob(x) + total


def course(epochs, seed):
    """The recipe as the course gives it."""
    torch.manual_seed(seed)
    flow, data = CourseFlow(), dataset(seed)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3)
    parts = random_split(data, [0.9, 0.1])
    fitted, valid = (DataLoader(part, batch_size=64) for part in parts)

    def step_through():
        for batch in fitted:
            optimizer.zero_grad()
            (-flow.log_prob(batch).mean()).backward()
            optimizer.step()

    def loss():
        return sum(-flow.log_prob(batch).sum().item() for batch in valid)

    return best_epoch(flow, epochs, step_through, loss)


def peer(build):
    """Adam with cosine decay, shuffled batches, in a plain loop."""

    def fitted(epochs, seed):
        torch.manual_seed(seed)
        model, points = build(), dataset(seed).data
        fitted, valid = points[: int(0.9 * N)], points[int(0.9 * N) :]
        batches = math.ceil(len(fitted) / BATCH)
        adam = torch.optim.Adam(model.parameters(), 1e-2, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            adam, epochs * batches
        )

        def step_through():
            order = torch.randperm(len(fitted))
            for batch in fitted[order].tensor_split(batches):
                adam.zero_grad()
                (-log_prob(model, batch).mean()).backward()
                adam.step()
                schedule.step()

        def loss():
            return -log_prob(model, valid).mean().item()

        return best_epoch(model, epochs, step_through, loss)

    return fitted


def log_prob(model, x):
    """The same question in four dialects."""
    if isinstance(model, CouplingFlow):
        return model.log_probability(x)
    model = model() if isinstance(model, zuko.lazy.Flow) else model
    return model.log_prob(x)


# The peers, as they are shipped


def zuko_flow(kind, **options):
    return kind(2, transforms=K, hidden_features=(HIDDEN, HIDDEN),
                activation=nn.LeakyReLU, **options)  # fmt: skip


def normflows_flow(layers):
    base = normflows.distributions.DiagGaussian(2, trainable=False)
    return normflows.NormalizingFlow(base, layers)


def normflows_affine():
    layers = []
    for _ in range(K):
        net = normflows.nets.MLP([1, HIDDEN, HIDDEN, 2], leaky=0.01)
        layers.append(normflows.flows.AffineCouplingBlock(net))
        layers.append(normflows.flows.Permute(2, mode="swap"))
    return normflows_flow(layers)


def normflows_spline():
    return normflows_flow([
        normflows.flows.CoupledRationalQuadraticSpline(
            2, num_blocks=1, num_hidden_channels=HIDDEN, num_bins=16,
            tail_bound=5.0, activation=nn.LeakyReLU,
            reverse_mask=bool(k % 2),
        )
        for k in range(K)
    ])  # fmt: skip


class NflowsNet(nflows.nn.nets.MLP):
    def __init__(self, fan_in, fan_out):
        widths = [HIDDEN, HIDDEN]
        super().__init__([fan_in], [fan_out], widths, nn.functional.leaky_relu)

    def forward(self, x, context=None):  # which the couplings pass along
        return super().forward(x)


def nflows_flow(kind, **options):
    couplings = [kind([k % 2, 1 - k % 2], NflowsNet, **options)
                 for k in range(K)]  # fmt: skip
    return nflows.flows.Flow(
        nflows.transforms.CompositeTransform(couplings),
        nflows.distributions.StandardNormal([2]),
    )


# Who runs, and what is said of it

EIGHT, EIGHT_SPLINES = "8 members", "8 members, spline"
OURS = {"16 members": ours(16), EIGHT: ours(8), "1 member": ours(1)}
COURSE = {"course's loop": course}
AFFINE = OURS | COURSE | {
    "zuko RealNVP": peer(lambda: zuko_flow(zuko.flows.RealNVP)),
    "normflows affine": peer(normflows_affine),
    "nflows affine": peer(
        lambda: nflows_flow(nflows.transforms.AffineCouplingTransform)
    ),
}  # fmt: skip
SPLINE = {
    EIGHT_SPLINES: ours(8, "spline"),
    "zuko NSF": peer(lambda: zuko_flow(zuko.flows.NSF, bins=16)),
    "normflows RQ spline": peer(normflows_spline),
    "nflows RQ spline": peer(
        lambda: nflows_flow(
            nflows.transforms.PiecewiseRationalQuadraticCouplingTransform,
            num_bins=16,
            tails="linear",
            tail_bound=5.0,
        )
    ),
}
ALL = AFFINE | SPLINE


def divergence(model):
    """KL(truth || model) in nats, on fresh points."""
    x = TRUTH.sample(POINTS, seed=1000)
    with torch.no_grad():
        log_q = log_prob(model.eval(), x.float())
    return (TRUTH.log_probability(x) - log_q).mean().item()


def measure(names, epochs, turns):
    """In turns, after one epoch unmeasured: {name: CPU ms a model and epoch,
    set-up included, one a turn}, {name: KL of each model of each turn}."""
    cost, kl = {name: [] for name in names}, {name: [] for name in names}
    for turn in range(-1, turns):
        for name in names:
            start = time.process_time()
            models = ALL[name](epochs if turn >= 0 else 1, max(0, 16 * turn))
            seconds = time.process_time() - start
            if turn >= 0:
                cost[name].append(1e3 * seconds / epochs / len(models))
                kl[name] += [divergence(model) for model in models]
                print(f"{name}: {cost[name][-1]:.1f} ms", file=sys.stderr)
    return cost, kl


def in_process(kernels, *arguments):
    """measure where MKL_CBWR is `kernels` from the first operation on."""
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(arguments)],
        env={**os.environ, "MKL_CBWR": kernels, "OMP_NUM_THREADS": "1",
             "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    cost, kl = json.loads(done.stdout)
    return {name: np.array(values) for name, values in cost.items()}, kl


def table(names, base, cost, kl):
    return markdown([
        {
            "flow": name,
            "CPU ms": spread(cost[name]),
            f"÷ {base}": "1" if name == base
            else spread(cost[name] / cost[base]),
            "KL, nats": f"{np.mean(kl[name]):.3g} ({min(kl[name]):.3g}–"
            f"{max(kl[name]):.3g}; {len(kl[name])})",
        }
        for name in names
    ])  # fmt: skip


def report(quick):
    """The section on training, in Markdown."""
    epochs, turns = (2, 1) if quick else (EPOCHS, TURNS)
    same, kl = in_process("COMPATIBLE", list(ALL), epochs, turns)
    fast, _ = in_process("AUTO", [*OURS, *COURSE], epochs, turns)
    (loop,) = COURSE
    digits = [
        {
            "flow": name,
            "same digits: CPU ms": spread(same[name]),
            "the course's loop ÷ it": spread(same[loop] / same[name]),
            "fastest: CPU ms": spread(fast[name]),
            "the loop ÷ it": spread(fast[loop] / fast[name]),
        }
        for name in [*OURS, *COURSE]
    ]
    return f"""## Training

K = {K} layers of 1 → {HIDDEN} → {HIDDEN} → 1, {N} points of five Gaussians,
{epochs} epochs with their validation. CPU ms of a model and epoch, set-up
included; the ratio is taken turn by turn; the divergence of the truth from the
models is their mean (lowest–highest; number of models). The course's loop:
batches of 64, Adam at 1e-3, no shuffling. The libraries: batches of {BATCH},
shuffled, Adam at 1e-2 with cosine decay, the best epoch on held-out points.
They use one network for s and t; the spline of normflows has a residual one,
which is a layer deeper. All run with the kernels that give the same digits on
every processor.

{table(AFFINE, EIGHT, same, kl)}

{table(SPLINE, EIGHT_SPLINES, same, kl)}

What these kernels cost, beside the processor's fastest (`MKL_CBWR=AUTO`):

{markdown(digits)}"""


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # of the libraries that are measured
    torch.set_num_threads(1)
    print(json.dumps(measure(*json.loads(sys.argv[1]))))
