"""Do the tests notice a wrong helpers.py? `python tests/mutants.py [word]`

Each mutant changes one place of helpers.py; the tests named with it must
then fail. Prints which test caught it; exits 1 when one survives, or when a
mutation no longer applies. A word runs only the mutants that hold it.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
TIMEOUT = 180  # seconds; a test that hangs has noticed, too

# (tests, old, new): the old text occurs once.
MUTANTS = [
    # Arguments
    ("bad_input", "if value < at_least:", "if value < at_least - 1:"),
    ("bad_input", "if not torch.isfinite(x).all():",
     "if torch.isnan(x).any():"),
    ("training -k switch", "or or_equal and value == above",
     "or or_equal and value > above"),
    # Densities
    ("densities", "self.means) / self.sigma\n",
     "self.means) / self.sigma**2\n"),
    ("densities", "LOG_2PI + math.log(len(self.means)) + 2", "LOG_2PI + 2"),
    ("densities -k spiral or Spiral", "[rho, rho, -rho, -rho]",
     "[rho, rho, rho, rho]"),
    ("densities -k spiral or Spiral", "- norm - rho.log()", "- norm"),
    ("densities -k Moons or moons", "where(lower, arc.new_tensor([1, 0.5])",
     "where(lower, arc.new_tensor([1, -0.5])"),
    ("densities -k moons or Moons", "return both - math.log(2)",
     "return both"),
    ("densities", "_on_circle(angles), math.sqrt(0.1)",
     "_on_circle(angles), 0.1"),
    ("densities", "torch.cartesian_prod(self.y, self.x).flip(1)",
     "torch.cartesian_prod(self.x, self.y)"),
    ("densities -k grid", "(0.5 + margin) or 1.0", "(1 + margin) or 1.0"),
    # Kernel estimation
    ("kde", "LOG_2PI + log_det_H + math.log(len(self.samples))",
     "LOG_2PI + log_det_H"),
    ("kde", "LOG_2PI + log_det_H", "LOG_2PI - log_det_H"),
    ("kde -k samples", "generator) @ self.H.T", "generator) @ self.H"),
    ("kde", "torch.linalg.solve(self.H, (", "torch.linalg.solve(self.H.T, ("),
    ("kde", "self.H @ self.H.T\n", "self.H.T @ self.H\n"),
    ("kde -k leave", "d2[torch.arange(len(rows)), rows] = math.inf",
     "pass"),
    ("kde -k leave", "h.log() - math.log(n - 1)", "h.log() - math.log(n)"),
    ("kde -k bandwidth", "scores.argmax()", "scores.argmin()"),
    ("kde -k bandwidth", "scale * len(samples) ** (-1 / 6)",
     "scale * len(samples) ** (-1 / 5)"),
    ("kde -k grid", "hx * hy * len(self.samples))", "hx * hy)"),
    ("kde -k grid", "total += along_y @ along_x.T",
     "total += along_x @ along_y.T"),
    ("kde -k sharpen", "step * (torch.cat(moved) + centre - samples)",
     "step * (torch.cat(moved) + centre)"),
    ("kde -k sharpen", ".div_(-2 * h**2)\n", ".div_(-(h**2))\n"),
    # Flows
    ("flow -k masks or mask", "list(values).index(1)",
     "list(values).index(0)"),
    ("flow -k masks", "([1, 0], [0, 1]) * K", "([0, 1], [1, 0]) * K"),
    ("flow -k undoes or determinant", "return (y - t) * (-s).exp(), -s",
     "return (y - t) * (-s).exp(), s"),
    ("flow -k undoes or formula", "return s.exp() * y + t, s",
     "return s.exp() * y - t, s"),
    ("flow -k undoes or formula", "return s.exp() * y + t, s",
     "return (-s).exp() * y + t, s"),
    ("flow -k affine or log_scale", "self.bound * torch.tanh(s / self.bound)",
     "torch.tanh(s / self.bound)"),
    ("flow -k affine", "return self.scale * s, t", "return s, t"),
    ("flow -k determinant or spline", "2 * ratio.log() + rise.log()",
     "ratio.log() + rise.log()"),
    ("flow -k determinant or spline",
     "rise = d1 * u.square() + 2 * ratio * v + d0 *",
     "rise = d0 * u.square() + 2 * ratio * v + d1 *"),
    ("flow -k undoes or spline",
     "log_det = -self._log_slope(u, ratio, d0, d1)",
     "log_det = self._log_slope(u, ratio, d0, d1)"),
    ("flow -k undoes or spline", "(ratio * u.square() + d0 * v)",
     "(ratio * u.square() + d1 * v)"),
    ("flow -k spline", "bent.where(inside, y)", "bent"),
    ("flow -k spline", "(1, 1), value=1.0)\n        inner",
     "(1, 1), value=1.5)\n        inner"),
    ("flow -k change_of or mass", "z2.square()) / 2 - LOG_2PI",
     "z2.square()) / 2 - LOG_2PI / 2"),
    ("flow -k undoes or stack",
     "x, log_det = layer._inverse(x)\n            total = total +",
     "x, log_det = layer._inverse(x)\n            total ="),
    ("flow -k undoes or stack", "for layer in reversed(self.layers):",
     "for layer in self.layers:"),
    ("flow -k member", '_integer(seed, "seed", at_least=0) + i for',
     '_integer(seed, "seed", at_least=0) for'),
    ("flow -k member", "parameter.data[i].clone()",
     "parameter.data[0].clone()"),
    ("flow -k member", "parameter.data[i].clone()", "parameter.data[i]"),
    ("flow -k path", "layer.forward(path[-1])", "layer.forward(path[0])"),
    # Training
    ("training -k adam or tenth", "points.split([n - held_out, held_out], -2)",
     "points.split([held_out, n - held_out], -2)[::-1]"),
    ("training -k fraction", "round(fraction * n)", "int(fraction * n + 1)"),
    ("training -k standard_error", "kept_epoch = torch.where(keep, epoch,",
     "kept_epoch = torch.where(keep, epoch + 1,"),
    ("training -k best_epoch", "nan_to_num(nan=math.inf).argmin(0)",
     "nan_to_num(nan=math.inf).argmax(0)"),
    ("training -k standard_error", "better = valid_loss < -best.mean(-1)",
     "better = valid_loss < math.inf"),
    ("training -k standard_error",
     "keep = better | (_no_worse(log_p, best) & tolerance)",
     "keep = better"),
    ("training -k tolerance", "(_no_worse(log_p, best) & tolerance)",
     "_no_worse(log_p, best)"),
    ("training -k tolerance or averaging",
     "    nn.utils.vector_to_parameters(flat, weights)\n", ""),
    ("training -k standard_error", "<= loss.std(-1) / loss.shape[-1] ** 0.5",
     "<= loss.std(-1)"),
    ("training -k standard_error", "loss = best - log_p",
     "loss = log_p - best"),
    ("training -k tenth", "log_p = used._log_probability(valid)",
     "log_p = used._log_probability(valid + width[..., None, None])"),
    ("training -k averaging or adam",
     "        used = copy.deepcopy(flow)\n        _, mean = _as_one(used)\n",
     "        used = flow\n"),
    ("training -k jitter", "sharpen(p, h).to(p)", "sharpen(p, 2 * h).to(p)"),
    ("training -k jitter", "[jitter * _bandwidth(p)",
     "[1.5 * jitter * _bandwidth(p)"),
    ("training -k jitter", "width[..., None, None] * noise",
     "width[..., None, None] ** 2 * noise"),
    ("training -k adam", "steps = epochs * batches", "steps = epochs"),
    ("training -k adam", "(done + 1) / (warmup * steps)",
     "done / (warmup * steps)"),
    ("training -k adam", "learning_rate, (0.9, beta2), fused",
     "learning_rate, fused"),
    ("training -k adam", "                schedule.step()\n", ""),
    ("training -k adam", "* batch.shape[-2] / n\n", "/ batches\n"),
    ("training -k left_as", "    flow = copy.deepcopy(flow)\n", ""),
    ("training -k shuffled", "torch.randperm(n, generator=g)",
     "torch.randint(n, (n,), generator=g)"),
    ("training -k diverg", "alive = alive & loss.isfinite()",
     "alive = alive | loss.isfinite()"),
    ("training -k interrupt", "        if reached is None:\n            raise",
     "        if reached is None:\n            pass"),
    # Scores and studies
    ("study", "excess = -torch.expm1(-_", "excess = torch.expm1(_"),
    ("study", "        - model.log_probability", "        + model.log_probab"
     "ility"),
    ("study", "values.std(-1) / values.shape[-1] ** 0.5",
     "values.std(-1) / (values.shape[-1] - 1) ** 0.5"),
    ("study", "_estimate(-density", "_estimate(density"),
    ("study -k bootstrap", "[(1 - level) / 2, (1 + level) / 2]",
     "[1 - level, level]"),
    ("study -k verdict", "if interval.high < 0:", "if interval.mean < 0:"),
    ("study -k verdict", "if interval.low > 0:", "if interval.low >= 0:"),
    ("study -k sweep", "flow.parameters()) // len(seeds)",
     "flow.parameters())"),
    ("study -k sweep", "data = [ToyDataset(seed=s,",
     "data = [ToyDataset(seed=seeds[0],"),
    ("study -k sweep", "\"seconds\": result.seconds / len(seeds)",
     "\"seconds\": 0 * result.seconds"),
    ("study -k diverged", '"diverged" if result.diverged[i] else "ok"',
     '"ok"'),
]  # fmt: skip


def run(mutant):
    """-> (what became of it, what caught it)."""
    where, old, new = mutant
    source = (ROOT / "helpers.py").read_text()
    if source.count(old) != 1:
        return "no longer applies", f"{source.count(old)} places"
    name, _, keyword = where.partition(" -k ")
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(
            ROOT / "tests", f"{folder}/tests",
            ignore=shutil.ignore_patterns("__pycache__", ".*"),
        )  # fmt: skip
        shutil.copy(ROOT / "pyproject.toml", folder)
        Path(folder, "helpers.py").write_text(source.replace(old, new))
        command = [
            sys.executable, "-m", "pytest", "-x", "-q", "--tb=no",
            "-p", "no:cacheprovider", "--hypothesis-profile=mutants",
            f"tests/test_{name}.py", "-k", keyword, "-m", "not slow",
        ]  # fmt: skip
        one_thread = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            done = subprocess.run(
                command, cwd=folder, capture_output=True, text=True,
                timeout=TIMEOUT, env=os.environ | one_thread,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return "caught", "by the clock"
    if done.returncode == 0:
        return "SURVIVED", where
    found = re.search(r"^(?:FAILED|ERROR) (.*)", done.stdout, re.MULTILINE)
    if done.returncode != 1 or not found:
        return "broken", done.stdout[-300:] + done.stderr[-300:]
    return "caught", found[1].split(" - ")[0].removeprefix("tests/")


def main(word=""):
    mutants = [m for m in MUTANTS if word in " ".join(m)]
    bad = 0
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(run, mutants)
        for (_, old, new), (fate, by) in zip(mutants, results, strict=True):
            bad += fate != "caught"
            change = f"{' '.join(old.split())} -> {' '.join(new.split())}"
            print(f"{fate:9} {change}\n          {by}", flush=True)
    print(f"{len(mutants) - bad} of {len(mutants)} mutants caught")
    return bad > 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
