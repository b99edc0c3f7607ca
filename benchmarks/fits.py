"""Training K = 4 couplings on 1500 points of five Gaussians."""

import copy
import math
import time
import warnings

import joblib
import nflows.distributions
import nflows.flows
import nflows.nn.nets
import nflows.transforms
import normflows
import numpy as np
import torch
import zuko
from timing import markdown, matrix_speed, rounds, spread
from torch import nn
from torch.utils.data import DataLoader, random_split

from helpers import CouplingFlow, ToyDataset, toy_distribution
from study import kl_divergence
from training import train

K, N, HIDDEN, BATCH, EPOCHS = 4, 1500, 32, 256, 250
TRUTH = toy_distribution("GaussiansRot", 5)


def dataset(seed):
    return ToyDataset("GaussiansRot", N, seed, num_gaussians=5)


# The course's loop: every model below is followed by what trains it.


class CourseLayer(nn.Module):
    """x2 = exp(a s(z1)) z2 + t(z1), with a learnt scale a from 0."""

    def __init__(self, kept):
        super().__init__()
        self.kept, self.changed = kept, 1 - kept
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
        kept = x[:, self.kept : self.kept + 1]
        changed = x[:, self.changed : self.changed + 1]
        s, t = self.scale * self.s(kept), self.t(kept)
        changed = (changed - t) * torch.exp(-s)
        both = [kept, changed] if self.kept == 0 else [changed, kept]
        return torch.cat(both, 1), -s.squeeze(1)


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


def train_course(data, epochs, seed):
    """The recipe as the course gives it: -> (model, CPU seconds)."""
    torch.manual_seed(seed)
    flow = CourseFlow()
    start = time.process_time()
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3)
    held_out = round(0.1 * len(data))
    fitted, valid = random_split(data, [len(data) - held_out, held_out])
    train_loader = DataLoader(fitted, batch_size=64, shuffle=False)
    valid_loader = DataLoader(valid, batch_size=64, shuffle=False)
    best_loss, best_weights = math.inf, None
    for _ in range(epochs):
        flow.train()
        for batch in train_loader:
            optimizer.zero_grad()
            loss = -flow.log_prob(batch).mean()
            loss.backward()
            optimizer.step()
        flow.eval()
        with torch.no_grad():
            losses = [
                -flow.log_prob(batch).sum().item() for batch in valid_loader
            ]
        valid_loss = sum(losses) / held_out
        if valid_loss < best_loss:
            best_loss = valid_loss
            best_weights = copy.deepcopy(flow.state_dict())
    flow.load_state_dict(best_weights)
    return flow, time.process_time() - start


# The peers, as they are shipped, in one plain loop over tensors


def zuko_affine():
    return zuko.flows.RealNVP(
        2, transforms=K, hidden_features=(HIDDEN, HIDDEN),
        activation=nn.LeakyReLU,
    )  # fmt: skip


def zuko_spline():
    return zuko.flows.NSF(
        2, transforms=K, bins=16, hidden_features=(HIDDEN, HIDDEN),
        activation=nn.LeakyReLU,
    )  # fmt: skip


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
        super().__init__(
            [fan_in], [fan_out], [HIDDEN, HIDDEN], nn.functional.leaky_relu
        )

    def forward(self, x, context=None):  # which the couplings pass along
        return super().forward(x)


def nflows_flow(coupling, **options):
    return nflows.flows.Flow(
        nflows.transforms.CompositeTransform([
            coupling([k % 2, 1 - k % 2], NflowsNet, **options)
            for k in range(K)
        ]),
        nflows.distributions.StandardNormal([2]),
    )  # fmt: skip


def nflows_affine():
    return nflows_flow(nflows.transforms.AffineCouplingTransform)


def nflows_spline():
    return nflows_flow(
        nflows.transforms.PiecewiseRationalQuadraticCouplingTransform,
        num_bins=16, tails="linear", tail_bound=5.0,
    )  # fmt: skip


def log_prob(model, x):
    """The same question in four dialects."""
    if isinstance(model, CouplingFlow):
        return model.log_probability(x)
    return (model() if isinstance(model, zuko.lazy.Flow) else model).log_prob(
        x
    )


def train_peer(build, data, epochs, seed, learning_rate=1e-2):
    """Adam with cosine decay, shuffled batches of 256, best validation
    epoch: -> (model, CPU seconds)."""
    torch.manual_seed(seed)
    model = build()
    start = time.process_time()
    held_out = round(0.1 * len(data))
    fitted, valid = data.data.split([len(data) - held_out, held_out])
    batches = math.ceil(len(fitted) / BATCH)
    optimizer = torch.optim.Adam(model.parameters(), learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, epochs * batches
    )
    best_loss, best_weights = math.inf, None
    for _ in range(epochs):
        order = torch.randperm(len(fitted))
        for batch in fitted[order].tensor_split(batches):
            optimizer.zero_grad()
            (-log_prob(model, batch).mean()).backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            valid_loss = -log_prob(model, valid).mean().item()
        if valid_loss < best_loss:
            best_loss = valid_loss
            best_weights = copy.deepcopy(model.state_dict())
    model.load_state_dict(best_weights)
    return model, time.process_time() - start


def train_ours(coupling, members, epochs, seed, layers=K, **options):
    """-> (one flow a member, CPU seconds of the epochs)."""
    data = [dataset(seed + i) for i in range(members)]
    flow = CouplingFlow(layers, members, coupling, seed)
    result = train(flow, data, epochs, seed=seed, progress=False, **options)
    flows = [result.flow.member(i) for i in range(members)]
    return flows, result.seconds


# Who runs, and what is said of it


AFFINE = {
    "zuko RealNVP": zuko_affine,
    "normflows affine": normflows_affine,
    "nflows affine": nflows_affine,
}
SPLINE = {
    "zuko NSF": zuko_spline,
    "normflows RQ spline": normflows_spline,
    "nflows RQ spline": nflows_spline,
}


def fitted(name, epochs, seed):
    """-> (models, CPU seconds)."""
    if name.startswith("this repository"):
        coupling = "spline" if "spline" in name else "affine"
        members = int(name.split()[-2].removeprefix("("))
        return train_ours(coupling, members, epochs, seed)
    if name == "course's loop":
        model, seconds = train_course(dataset(seed), epochs, seed)
    else:
        build = (AFFINE | SPLINE)[name]
        model, seconds = train_peer(build, dataset(seed), epochs, seed)
    return [model], seconds


OURS = {
    "affine": "this repository (8 members)",
    "spline": "this repository, spline (8 members)",
}
NAMES = {
    "affine": [
        OURS["affine"], "this repository (1 member)", "course's loop",
        *AFFINE,
    ],
    "spline": [OURS["spline"], *SPLINE],
}  # fmt: skip


class Scored:
    """A model as the density that kl_divergence asks for."""

    def __init__(self, model):
        self.model = model.eval()

    def log_probability(self, x):
        return log_prob(self.model, x.float())

    def sample(self, n, seed=0):
        raise NotImplementedError("not needed for KL(truth || model)")


def scores(name, epochs, points):
    """KL(truth || model) in nats of each model, trained once: a list."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # in a process of its own
    models, _ = fitted(name, epochs, 0)
    return [
        kl_divergence(TRUTH, Scored(model), points).value for model in models
    ]


def milliseconds(epochs, repeats):
    """CPU ms a model and epoch: {name: array (repeats,)}."""

    def contender(name, epochs):
        def run():
            models, seconds = fitted(name, epochs, 0)
            return 1e3 * seconds / (epochs * len(models))

        return run

    return rounds(
        {
            name: contender(name, epochs)
            for names in NAMES.values()
            for name in names
        },
        repeats,
    )


def flop(inputs=1):
    """Multiplications and additions in the matrix products of one sample,
    forward, and twice that backward."""
    weights = inputs * HIDDEN + HIDDEN**2 + HIDDEN
    return 3 * 2 * weights * 2 * K  # two networks a layer


def report(quick, log):
    """The section on training, in Markdown."""
    epochs, repeats = (1, 1) if quick else (4, 5)
    log("training, CPU time")
    cost = milliseconds(epochs, repeats)
    every, points = (2, 1000) if quick else (EPOCHS, 100_000)
    log(f"training, {every} epochs for the divergence")
    parallel = joblib.Parallel(n_jobs=1 if quick else -1)
    kl = dict(zip(cost, parallel(
        joblib.delayed(scores)(name, every, points) for name in cost
    ), strict=True))  # fmt: skip
    log("training, preparation")
    start = time.process_time()
    _, seconds = train_ours("affine", 8, 1, 0)
    prepare = (time.process_time() - start - seconds) / 8
    speed = matrix_speed()
    rate = flop() * 0.9 * N / np.median(cost[OURS["affine"]]) * 1e3
    parts = [
        f"## Training\n\nK = {K} layers of 1 → {HIDDEN} → {HIDDEN} → 1, "
        f"{N} points of five Gaussians. CPU ms a model and epoch with its "
        "validation, the ratio turn by turn, and the divergence of the "
        f"truth from the model after {every} epochs (several members: mean "
        "and range). The course's loop: batches of 64, Adam at 1e-3, no "
        f"shuffling. The libraries: batches of {BATCH}, shuffled, Adam at "
        "1e-2 with cosine decay, the best epoch on held-out points. They "
        "use one network for s and t; the spline of normflows has a residual "
        "one, which is a layer deeper."
    ]
    for kind, names in NAMES.items():
        rows = []
        for name in names:
            row = {"flow": name, "CPU ms": spread(cost[name])}
            for base in (OURS[kind], "this repository (1 member)"):
                if base in names:
                    row[f"÷ {base.split('(')[1][:-1]}"] = (
                        spread(cost[name] / cost[base])
                        if name != base
                        else "1"
                    )
            row["KL, nats"] = (
                f"{kl[name][0]:.3g}"
                if len(kl[name]) == 1
                else f"{np.mean(kl[name]):.3f} "
                f"({min(kl[name]):.3f}–{max(kl[name]):.3f})"
            )
            rows.append(row)
        parts += [markdown(rows)]
    parts += [
        f"Not in the table: this repository chooses its noise once, in "
        f"{prepare:.2f} CPU s a model, {prepare / every * 1e3:.1f} ms an "
        f"epoch of {every}.",
        f"The matrix products take {flop() / 1e3:.0f} kFLOP a sample, "
        "forward and backward. With 8 members training does "
        f"{rate / 1e9:.1f} GFLOP/s; a large matrix product does "
        f"{speed / 1e9:.0f} on the same core: {rate / speed:.0%}.",
    ]
    return "\n\n".join(parts)
