"""Writes tests/fixtures/scaling/series_*.safetensors: what river, pandas, scipy, evidently and PyTorch make of series.

    pip install torch numpy scipy river "pandas<3" evidently
    python scripts/make_scaling_series.py

Each file holds inputs and what the tests must get from them. Where two libraries mean the same, they are compared here first, and
where a formula is written out here, it is compared with a library that has it.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from evidently.legacy.calculations.stattests.psi import _psi
from evidently.legacy.core import ColumnType
from river import stats, utils
from scipy import special
from scipy import stats as scipy_stats

from fixture_io import save

FOLDER = Path(__file__).parent.parent / "tests" / "fixtures" / "scaling"
NAN = float("nan")


def write(name: str, arrays: dict[str, np.ndarray]) -> None:
    tensors = {key: torch.from_numpy(np.ascontiguousarray(a, dtype=np.float64)) for key, a in arrays.items()}
    size = save(FOLDER / f"series_{name}.safetensors", tensors)
    print(f"series_{name}: {size} bytes")


def close(a: np.ndarray, b: np.ndarray, tolerance: float = 1e-9) -> None:
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def walk(rng: np.random.Generator, steps: int) -> np.ndarray:
    """Series of very different level, spread and memory."""
    noise = rng.standard_normal((steps, 3))
    return np.stack([noise[:, 0], 500 + np.cumsum(noise[:, 1]), -3e4 + 20 * noise[:, 2]], axis=1)


def with_gaps(rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x[rng.random(x.shape) < 0.15] = NAN
    x[0] = [0.5, NAN, -3e4]
    return x


def sliding(rng: np.random.Generator) -> None:
    x, window = walk(rng, 120), 16
    arrays: dict[str, np.ndarray] = {"x": x, "window": np.array([window])}
    for ddof in (0, 1):
        by_river = np.full((2, *x.shape), NAN)
        for feature in range(x.shape[1]):
            mean = utils.Rolling(stats.Mean, window_size=window)
            var = utils.Rolling(stats.Var, window_size=window, ddof=ddof)
            for step, value in enumerate(x[:, feature]):
                mean.update(value)
                var.update(value)
                by_river[:, step, feature] = mean.get(), var.get()
        frame = pd.DataFrame(x)
        rows = [x[max(0, t + 1 - window) : t + 1] for t in range(len(x))]
        # river has a variance of 0 where there is none yet; pandas and numpy have NaN.
        first = ddof
        by_numpy = np.stack([np.var(r, axis=0, ddof=ddof) for r in rows[first:]])
        close(by_river[1][first:], by_numpy, 1e-7)
        close(frame.rolling(window, min_periods=1).var(ddof=ddof).to_numpy()[first:], by_numpy, 1e-6)
        by_numpy = np.concatenate([np.full((first, x.shape[1]), NAN), by_numpy])
        arrays |= {"mean": by_river[0], f"var_{ddof}": by_numpy, f"river_var_{ddof}": by_river[1]}
    gaps = with_gaps(rng, x)
    frame = pd.DataFrame(gaps)
    rolling = frame.rolling(window, min_periods=1)
    rows = [gaps[max(0, t + 1 - window) : t + 1] for t in range(len(gaps))]
    means = np.array([[np.nanmean(r[:, f]) if (~np.isnan(r[:, f])).any() else NAN for f in range(3)] for r in rows])
    variances = np.array([[np.nanvar(r[:, f]) if (~np.isnan(r[:, f])).any() else NAN for f in range(3)] for r in rows])
    close(rolling.mean().to_numpy(), means, 1e-7)
    arrays |= {"gaps": gaps, "gaps_mean": means, "gaps_var": variances}
    write("sliding", arrays)


def ewm(rng: np.random.Generator) -> None:
    x, alpha = walk(rng, 120), 0.15
    gaps = with_gaps(rng, x)
    arrays: dict[str, np.ndarray] = {"x": x, "gaps": gaps, "alpha": np.array([alpha])}
    for name, data in (("x", x), ("gaps", gaps)):
        for adjust in (False, True):
            for ignore_na in (False, True):
                frame = pd.DataFrame(data).ewm(alpha=alpha, adjust=adjust, ignore_na=ignore_na)
                key = f"{name}_{'adjust' if adjust else 'plain'}_{'skip' if ignore_na else 'age'}"
                arrays[f"{key}_mean"] = frame.mean().to_numpy()
                arrays[f"{key}_var"] = frame.var(bias=False).to_numpy()
                arrays[f"{key}_var_biased"] = frame.var(bias=True).to_numpy()
    by_river = np.full((2, *x.shape), NAN)
    for feature in range(x.shape[1]):
        mean, var = stats.EWMean(fading_factor=alpha), stats.EWVar(fading_factor=alpha)
        for step, value in enumerate(x[:, feature]):
            mean.update(value)
            var.update(value)
            by_river[:, step, feature] = mean.get(), var.get()
    # river has the recursive form, and forms the variance as a difference of squares: at a level of 3e4 it has lost seven places.
    close(by_river[0], arrays["x_plain_age_mean"])
    close(by_river[1], arrays["x_plain_age_var_biased"], 1e-4)
    arrays |= {"river_mean": by_river[0], "river_var": by_river[1]}
    arrays["decays"] = np.array([pd.DataFrame([0.0, 1.0]).ewm(**how).mean().iloc[1, 0] for how in DECAYS])
    write("ewm", arrays)


# The mean of 0 and then 1 is 1 / (2 − alpha), which says what alpha pandas made of each.
DECAYS = [{"alpha": 0.3}, {"com": 4.0}, {"span": 9.0}, {"halflife": 2.5}]


def edges(reference: np.ndarray, bins: int) -> np.ndarray:
    return np.unique(np.quantile(reference, np.arange(1, bins) / bins))


def psi(reference: np.ndarray, recent: np.ndarray, bins: int) -> float:
    """Bins by the quantiles of the reference; evidently has bins of equal width and the same formula."""
    inner = edges(reference, bins)
    in_bins = [np.searchsorted(inner, values, side="right") for values in (reference, recent)]
    shares = [np.bincount(b, minlength=len(inner) + 1) / len(b) for b in in_bins]
    p, q = (np.where(s == 0, 1e-4, s) for s in shares)
    value = float(np.sum((p - q) * np.log(p / q)))
    # Of numbers of bins, evidently takes each as a bin.
    by_evidently, _ = _psi(pd.Series(in_bins[0]), pd.Series(in_bins[1]), ColumnType.Numerical, 0.1)
    close(np.array(by_evidently), np.array(value), 1e-12)
    return value


def drift(rng: np.random.Generator) -> None:
    # (reference, recent): alike, shifted, wider, of another shape, with ties, far apart.
    pairs = {
        "alike": (rng.standard_normal(300), rng.standard_normal(80)),
        "shifted": (1e3 + rng.standard_normal(300), 1e3 + 0.7 + rng.standard_normal(80)),
        "wider": (rng.standard_normal(300), 2.5 * rng.standard_normal(80)),
        "skewed": (rng.standard_normal(300), rng.exponential(1, 80) - 1),
        "ties": (np.floor(rng.exponential(4, 300)), np.floor(rng.exponential(5, 80))),
        "apart": (rng.standard_normal(300), 20 + rng.standard_normal(80)),
    }
    arrays: dict[str, np.ndarray] = {}
    for name, (reference, recent) in pairs.items():
        exact = scipy_stats.ks_2samp(reference, recent, method="exact")
        metrics = [
            (recent.mean() - reference.mean()) / reference.std(),
            recent.var() / reference.var(),
            psi(reference, recent, 10),
            exact.statistic,
            exact.pvalue,
        ]
        arrays |= {f"{name}_reference": reference, f"{name}_recent": recent, f"{name}_metrics": np.array(metrics)}
    # Beyond 2^20 pairs: Kolmogorov's limit.
    reference, recent = rng.standard_normal(1500), 0.06 + rng.standard_normal(800)
    statistic = scipy_stats.ks_2samp(reference, recent).statistic
    limit = special.kolmogorov(statistic * np.sqrt(1500 * 800 / 2300))
    close(np.array(limit), np.array(scipy_stats.kstwobign.sf(statistic * np.sqrt(1500 * 800 / 2300))), 1e-12)
    metrics = [
        (recent.mean() - reference.mean()) / reference.std(),
        recent.var() / reference.var(),
        psi(reference, recent, 10),
        statistic,
        limit,
    ]
    arrays |= {"large_reference": reference, "large_recent": recent, "large_metrics": np.array(metrics)}
    write("drift", arrays)


def rev_in(rng: np.random.Generator) -> None:
    """The formulas of Kim et al. in PyTorch, the way back with the weight itself and, as the authors' code has it, with w + eps²."""
    eps = 1e-5
    x = torch.tensor(np.array([1.0, 50.0, -2e3]) + rng.standard_normal((4, 12, 3)) * np.array([0.1, 3.0, 40.0]))
    forecast = torch.tensor(rng.standard_normal((4, 5, 3)))
    target = torch.tensor(rng.standard_normal((4, 5, 3)))
    arrays = {"x": x.numpy(), "forecast": forecast.numpy(), "target": target.numpy(), "eps": np.array([eps])}
    for subtract_last in (False, True):
        weight = torch.tensor([0.5, 1.5, -2.0], dtype=torch.float64, requires_grad=True)
        bias = torch.tensor([0.1, 0.0, -0.7], dtype=torch.float64, requires_grad=True)
        center = x[:, -1:] if subtract_last else x.mean(1, keepdim=True)
        std = torch.sqrt(x.var(1, keepdim=True, unbiased=False) + eps)
        y = (x - center) / std * weight + bias
        # The forecast follows the last normalized step, so that the gradient goes both ways.
        ahead = forecast + torch.tanh(y[:, -1:])
        restored = (ahead - bias) / weight * std + center
        ((restored - target) ** 2 / 1e4).sum().backward()
        as_authors = (ahead - bias) / (weight + eps**2) * std + center
        key = "last" if subtract_last else "mean"
        arrays |= {
            f"{key}_y": y.detach().numpy(),
            f"{key}_restored": restored.detach().numpy(),
            f"{key}_restored_by_authors": as_authors.detach().numpy(),
            f"{key}_dweight": weight.grad.numpy(),
            f"{key}_dbias": bias.grad.numpy(),
        }
    arrays |= {"weight": np.array([0.5, 1.5, -2.0]), "bias": np.array([0.1, 0.0, -0.7])}
    write("rev_in", arrays)


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for seed, make in enumerate([sliding, ewm, drift, rev_in]):
        make(np.random.default_rng(seed))
