"""Writes tests/fixtures/scaling, what scikit-learn makes of small data sets.

    pip install torch numpy scikit-learn
    python scripts/make_scaling.py            # rewrites tests/fixtures/scaling
    python scripts/make_scaling.py some/dir   # writes somewhere else

A file is one case. Metadata: `kind` (the scaler), `options` (JSON, in this crate's names), `splits` (JSON, the numbers of samples that
`partial_fit` gets one after the other). Tensors, all f64:

    x            the data that are fitted
    weight       the weight of each sample, if samples are weighted
    probe        other data, some of them beyond the first
    y            the probe, transformed
    back         y, transformed back
    scale        what each feature is divided by
    mean, var    of StandardScaler
    min, max     of MinMaxScaler; max_abs of MaxAbsScaler; center of RobustScaler

scikit-learn counts a scale below 10 epsilon as zero; no feature here has one that is not zero.
"""

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from sklearn.preprocessing import MaxAbsScaler, MinMaxScaler, RobustScaler, StandardScaler

from fixture_io import save

RNG = np.random.default_rng(20)

KINDS = {
    "StandardScaler": (StandardScaler, {"with_mean": True, "with_std": True}),
    "MinMaxScaler": (MinMaxScaler, {"feature_range": (0.0, 1.0), "clip": False}),
    "MaxAbsScaler": (MaxAbsScaler, {"clip": False}),
    "RobustScaler": (
        RobustScaler,
        {"with_centering": True, "with_scaling": True, "quantile_range": (25.0, 75.0)},
    ),
}


def table(rows: int) -> np.ndarray:
    """Features of very different size: a normal one, prices, a count, a heavy tail, tiny numbers."""
    columns = [
        RNG.normal(size=rows),
        RNG.normal(21000.0, 9000.0, rows),
        RNG.integers(2, 9, rows).astype(float),
        RNG.standard_cauchy(rows) * 30.0 - 100.0,
        RNG.normal(3e-6, 1e-6, rows),
    ]
    return np.stack(columns, axis=1)


def with_nan(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x[RNG.random(x.shape) < 0.2] = np.nan
    return x


def constant(rows: int) -> np.ndarray:
    return np.tile([0.1, 0.0, 1e9, -7.3e-5, 3.0], (rows, 1))


def attributes(kind: str, scaler) -> dict[str, np.ndarray]:
    ones = np.ones(scaler.n_features_in_)
    if kind == "StandardScaler":
        # Without a scale scikit-learn keeps none, and no variance.
        var = {} if scaler.var_ is None else {"var": scaler.var_}
        return {"scale": ones if scaler.scale_ is None else scaler.scale_, "mean": scaler.mean_, **var}
    if kind == "MinMaxScaler":
        # The factor of scikit-learn is the inverse of the scale here.
        return {"scale": 1.0 / scaler.scale_, "min": scaler.data_min_, "max": scaler.data_max_}
    if kind == "MaxAbsScaler":
        return {"scale": scaler.scale_, "max_abs": scaler.max_abs_}
    center = {} if scaler.center_ is None else {"center": scaler.center_}
    return {"scale": ones if scaler.scale_ is None else scaler.scale_, **center}


def case(
    folder: Path,
    name: str,
    kind: str,
    x: np.ndarray,
    splits: list[int],
    weight: np.ndarray | None = None,
    **options,
) -> int:
    make, defaults = KINDS[kind]
    options = defaults | options

    def weighted(rows: slice) -> dict:
        return {} if weight is None else {"sample_weight": weight[rows]}

    whole = make(**options).fit(x, **weighted(slice(None)))
    # RobustScaler has no partial_fit there; here it must come out the same.
    if hasattr(whole, "partial_fit"):
        parts = make(**options)
        for start, end in zip(np.cumsum([0, *splits]), np.cumsum(splits)):
            parts.partial_fit(x[start:end], **weighted(slice(start, end)))
        for key, value in attributes(kind, whole).items():
            np.testing.assert_allclose(attributes(kind, parts)[key], value, rtol=1e-9, atol=1e-12)
        whole = parts
    probe = np.concatenate([x[:3], x[:3] * 1.7 + 1.0])
    y = whole.transform(probe)
    tensors = {"x": x, "probe": probe, "y": y, "back": whole.inverse_transform(y), **attributes(kind, whole)}
    if weight is not None:
        tensors["weight"] = weight
    nan = "ignore" if np.isnan(x).any() else "refuse"
    metadata = {"kind": kind, "options": json.dumps(options | {"nan": nan}), "splits": json.dumps(splits)}
    return save(folder / f"{name}.safetensors", {k: torch.tensor(v) for k, v in tensors.items()}, metadata)


def main() -> None:
    default = Path(__file__).parent.parent / "tests/fixtures/scaling"
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else default
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("sklearn_*.safetensors"):
        old.unlink()
    warnings.simplefilter("error")
    sizes = [
        case(folder, f"sklearn_{name}", kind, x, splits, **options)
        for name, kind, x, splits, options in cases()
    ]
    print(f"{len(sizes)} files, {sum(sizes)} bytes, in {folder}")


def cases():
    splits = [1, 20, 4, 12]
    for kind in KINDS:
        short = kind.removesuffix("Scaler").lower()
        yield f"{short}_plain", kind, table(37), splits, {}
        yield f"{short}_even", kind, table(36), [18, 18], {}
        yield f"{short}_nan", kind, with_nan(table(37)), [10, 15, 12], {}
        yield f"{short}_constant", kind, constant(37), splits, {}
        yield f"{short}_one_sample", kind, table(1), [1], {}
        yield f"{short}_two_samples", kind, table(2), [1, 1], {}
    x = table(37)
    yield "standard_no_mean", "StandardScaler", x, splits, {"with_mean": False}
    yield "standard_no_std", "StandardScaler", x, splits, {"with_std": False}
    yield "minmax_symmetric", "MinMaxScaler", x, splits, {"feature_range": (-1.0, 1.0)}
    yield "minmax_clip", "MinMaxScaler", x, splits, {"feature_range": (-2.0, 5.5), "clip": True}
    yield "robust_deciles", "RobustScaler", x, splits, {"quantile_range": (10.0, 90.0)}
    yield "robust_extremes", "RobustScaler", x, splits, {"quantile_range": (0.0, 100.0)}
    yield "robust_no_center", "RobustScaler", x, splits, {"with_centering": False}
    yield "robust_no_scale", "RobustScaler", x, splits, {"with_scaling": False}
    yield "maxabs_clip", "MaxAbsScaler", table(37), splits, {"clip": True}
    weight = RNG.random(37) * 3.0
    yield "standard_weighted", "StandardScaler", table(37), splits, {"weight": weight}
    yield "standard_weighted_nan", "StandardScaler", with_nan(table(37)), [10, 15, 12], {"weight": weight}
    # A sample of weight 3 is one that is there three times, and one of weight 0 is none.
    counts = RNG.integers(0, 4, 37).astype(float)
    yield "standard_weighted_counts", "StandardScaler", table(37), [18, 19], {"weight": counts}
    yield "standard_weighted_large", "StandardScaler", table(37), splits, {"weight": weight * 1e5}


if __name__ == "__main__":
    main()
