"""Data as it comes: tables that come with scikit-learn."""

import numpy as np
import torch
from sklearn import datasets, decomposition
from timing import markdown

from helpers import CouplingFlow, GaussianKDE, GaussianMixture, LocalKDE
from preparation import unit_and_bandwidth
from training import Recipe, train

EPOCHS, SPLITS = 200, 5


def digits():
    pixels = datasets.load_digits().data
    return decomposition.PCA(8, random_state=0).fit_transform(pixels)


TABLES = {
    "wine": lambda: datasets.load_wine().data,
    "breast cancer, means": lambda: datasets.load_breast_cancer().data[:, :10],
    "digits, 8 components": digits,
}


def in_unit(kernel, x, y):
    """log p of y by a kernel estimate of x, made in the unit that train
    would choose."""
    unit, h = unit_and_bandwidth(x, Recipe())
    u, log_det = unit.inverse(y)
    return kernel(unit.inverse(x)[0], h).log_probability(u) + log_det


def gaussian(x, y):
    normal = GaussianMixture([x.mean(0)], covariances=[x.T.cov()])
    return normal.log_probability(y)


def flow(x, y, epochs):
    flow = CouplingFlow(4, coupling="spline", dim=x.shape[1])
    flow = train(flow, x, epochs, progress=False).flow
    return flow.log_probability(y).detach()


def report(quick):
    """The section on tables, in Markdown."""
    epochs, splits = (5, 1) if quick else (EPOCHS, SPLITS)
    rows = []
    for name, load in TABLES.items():
        table, scores = torch.from_numpy(load()), []
        for seed in range(splits):
            order = np.random.default_rng(seed).permutation(len(table))
            y, x = table[order].tensor_split([len(table) // 5])
            scores.append([own.mean().item() for own in (
                flow(x, y, epochs), in_unit(GaussianKDE, x, y),
                in_unit(lambda x, _: LocalKDE(x), x, y), gaussian(x, y),
            )])  # fmt: skip
        cells = [f"{v:.2f}" for v in np.mean(scores, 0)]
        rows.append([f"{name}, {len(x)} × {table.shape[1]}", *cells])
    head = "table | spline flow | KDE, one h | KDE, local width | Gaussian"
    return f"""## Tables of scikit-learn

Mean log-probability in nats of a fifth of the rows, held out, higher is
better; means of {splits} splits. K = 4 splines, {epochs} epochs, the recipe as
it is; the kernel estimates in the unit that the recipe chooses.

{markdown(head, rows)}"""
