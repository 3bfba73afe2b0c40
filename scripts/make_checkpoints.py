"""Writes tests/fixtures/checkpoints, the files that tests/models/checkpoints.rs loads.

    pip install torch numpy
    python scripts/make_checkpoints.py            # rewrites tests/fixtures/checkpoints
    python scripts/make_checkpoints.py some/dir   # writes somewhere else

NAME.safetensors is a state dict, NAME.io.safetensors holds an `input` and the `output` that PyTorch
gives for it in evaluation mode. The same files come out on every run. NAME.pth is written by
torch.save, NAME_old.pth by its format before PyTorch 1.6, which has addresses of memory in it and
so comes out with other bytes on each run.

    batch_norm2d             after a few steps of training
    instance_norm2d          affine and tracking, after a few steps of training
    switch_norm2d            a SwitchNorm2d as its authors have it, after a few steps of training
    layer_norm, group_norm, rms_norm
    weight_norm_linear       torch.nn.utils.parametrizations.weight_norm
    weight_norm_conv2d       the same around a convolution
    weight_norm_old          torch.nn.utils.weight_norm: weight_g and weight_v
    layer_norm_gamma_beta    the names of early BERT checkpoints, below a prefix
    batch_norm_no_counter    no num_batches_tracked, as candle-nn saves it
    batch_norm_half_stats    statistics in f16
    batch_norm_negative_var  must be refused; there is no output

    batch_norm2d.pth         the state dict of batch_norm2d
    training.pth             the same under "model", beside what a training script saves with it
    two_models.pth           state dicts under "model" and "ema"
    views.pth                tensors of every dtype and layout; views.safetensors has their values
    module.pth               a pickled module, not a state dict
    averaged.safetensors     the weights of a training by step, and what PyTorch's AveragedModel and
                             timm's formula of a warm-up make of them
"""

import argparse
import copy
import random
import sys
import warnings
from pathlib import Path

import torch
from torch import nn

from fixture_io import save


class Writer:
    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        for pattern in ("*.safetensors", "*.pth"):
            for old in folder.glob(pattern):
                old.unlink()
        self.folder, self.size = folder, 0

    def write(self, name: str, state: dict, x: torch.Tensor, y: torch.Tensor) -> None:
        self.size += save(self.folder / f"{name}.safetensors", dict(state))
        self.size += save(self.folder / f"{name}.io.safetensors", {"input": x, "output": y})

    def module(self, name: str, module: nn.Module, *shape: int) -> None:
        x = torch.randn(shape) * 1.3 + 0.4
        with torch.no_grad():
            y = module.eval()(x)
        self.write(name, module.state_dict(), x, y)


class SwitchNorm2d(nn.Module):
    """Luo et al., 2019, by the formulas of the paper, with the names, shapes and unbiased variances of their
    implementation, and its momentum, the weight of the old value."""

    def __init__(self, channels: int, momentum: float = 0.9):
        super().__init__()
        self.momentum = momentum
        for name, value in (("weight", 1.0), ("bias", 0.0)):
            self.register_parameter(name, nn.Parameter(torch.full((1, channels, 1, 1), value)))
        for name in ("mean_weight", "var_weight"):
            self.register_parameter(name, nn.Parameter(torch.ones(3)))
        for name in ("running_mean", "running_var"):
            self.register_buffer(name, torch.zeros(1, channels, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        var, mean = torch.var_mean(x, (2, 3), keepdim=True)

        def union(axis: int) -> tuple[torch.Tensor, torch.Tensor]:
            whole = mean.mean(axis, keepdim=True)
            return whole, (var + (mean - whole) ** 2).mean(axis, keepdim=True)

        sources = [(mean, var), union(1)]
        if self.training:
            sources.append(union(0))
            for old, new in zip((self.running_mean, self.running_var), sources[2]):
                old.lerp_(new.detach().reshape(old.shape), 1 - self.momentum)
        else:
            sources.append((self.running_mean.unsqueeze(3), self.running_var.unsqueeze(3)))
        mixed = []
        for shares, values in zip((self.mean_weight, self.var_weight), zip(*sources)):
            mixed.append(sum(share * value for share, value in zip(shares.softmax(0), values)))
        return (x - mixed[0]) / (mixed[1] + 1e-5).sqrt() * self.weight + self.bias


def trained(module: nn.Module, *shape: int) -> nn.Module:
    """The module after some steps that move its parameters and its statistics."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.3)
    for _ in range(7):
        x = torch.randn(shape) * 2.0 + torch.arange(shape[1]).reshape(1, -1, 1, 1)
        loss = (module(x) * torch.randn(shape)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return module


def randomized(module: nn.Module) -> nn.Module:
    """Parameters that are not the ones and zeros of a new module."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    return module


def write_pth(folder: Path, name: str, value: object) -> None:
    torch.save(value, folder / f"{name}.pth")
    torch.save(value, folder / f"{name}_old.pth", _use_new_zipfile_serialization=False)


def pickles(w: Writer, state: dict, bn: nn.Module) -> None:
    """What people call .pth."""
    write_pth(w.folder, "batch_norm2d", state)
    bn = copy.deepcopy(bn)
    optimizer = torch.optim.Adam(bn.parameters())
    bn.train()(torch.randn(2, 3, 2, 2)).square().sum().backward()
    optimizer.step()
    training = {
        "epoch": 3,
        "model": state,
        "optimizer": optimizer.state_dict(),
        "args": argparse.Namespace(lr=0.1, layers=[1, 2], name="r\u00e9sum\u00e9", resume=None),
        "seed": 2**63 + 5,
        "best": -0.5,
        "rng": torch.arange(5, dtype=torch.uint8),
        "python_rng": random.Random(1).getstate()[1][:3],
    }
    write_pth(w.folder, "training", training)
    ema = {name: value * 2 for name, value in state.items()}
    write_pth(w.folder, "two_models", {"model": state, "ema": ema})
    torch.save(nn.Linear(2, 2), w.folder / "module.pth")

    whole = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
    views = {
        "whole": whole,
        "transposed": whole.transpose(0, 2),
        "row": whole[1],
        "every_other": whole[:, ::2, 1::2],
        "one": whole[1, 2, 3],
        "none": torch.zeros(0, 3),
        "parameter": nn.Parameter(whole[:, 0] * 0.5),
        "f64": whole.double() / 3,
        "f16": whole.half() / 3,
        "bf16": whole.bfloat16() / 3,
        "i64": whole.long() - 12,
    }
    w.size += save(w.folder / "views.safetensors", {k: v.detach() for k, v in views.items()})
    others = {
        "i32": whole.int() - 12,
        "i16": whole.short() - 12,
        "u8": whole.byte(),
        "bool": whole > 11,
        "i8": whole.to(torch.int8),
        "complex": torch.complex(whole, whole),
        "sparse": whole[0].to_sparse(),
    }
    write_pth(w.folder, "views", views | others)


def averages(w: Writer) -> None:
    """Six steps of a training, and averages after each of them."""
    from torch.optim import swa_utils

    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    ema = swa_utils.get_ema_multi_avg_fn(0.75)
    kinds = {
        "swa": swa_utils.AveragedModel(model),
        "ema": swa_utils.AveragedModel(model, multi_avg_fn=ema),
        "ema_statistics": swa_utils.AveragedModel(model, multi_avg_fn=ema, use_buffers=True),
    }
    # timm's ModelEmaV3 in float64: gamma 3, power 0.5, decay 0.33, min_decay 0.25, update_after_step 1.
    warm = {}
    tensors = {}
    for step in range(1, 7):
        model.train()
        loss = model(torch.randn(8, 3) + 1).mul(torch.randn(8, 4)).square().mean()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.5 * parameter.grad)
                parameter.grad = None
        state = {name: value.clone() for name, value in model.state_dict().items()}
        tensors |= {f"model.{step}.{name}": value for name, value in state.items()}
        for kind, averaged in kinds.items():
            averaged.update_parameters(model)
            for name, value in averaged.module.state_dict().items():
                tensors[f"{kind}.{step}.{name}"] = value.clone()
        n = max(0, step - 1 - 1)
        decay = max(min(1 - (1 + n / 3) ** -0.5, 0.33), 0.25) if n > 0 else 0.0
        for name, value in state.items():
            value = value.double() if value.is_floating_point() else value
            if value.is_floating_point() and name in warm:
                value = warm[name] * decay + value * (1 - decay)
            warm[name] = value
            tensors[f"warmup.{step}.{name}"] = value
    w.size += save(w.folder / "averaged.safetensors", tensors)


def main() -> None:
    here = Path(__file__).resolve().parent
    default = here.parent / "tests" / "fixtures" / "checkpoints"
    w = Writer(Path(sys.argv[1]) if len(sys.argv) > 1 else default)
    torch.set_num_threads(1)
    torch.manual_seed(20)

    bn = trained(nn.BatchNorm2d(3), 4, 3, 5, 5)
    w.module("batch_norm2d", bn, 2, 3, 4, 5)
    instance = nn.InstanceNorm2d(3, affine=True, track_running_stats=True)
    w.module("instance_norm2d", trained(instance, 4, 3, 5, 5), 2, 3, 4, 5)
    w.module("layer_norm", randomized(nn.LayerNorm([3, 5])), 4, 3, 5)
    w.module("group_norm", randomized(nn.GroupNorm(2, 6)), 3, 6, 4)
    w.module("rms_norm", randomized(nn.RMSNorm(7, eps=1e-6)), 5, 7)
    new = nn.utils.parametrizations.weight_norm
    w.module("weight_norm_linear", randomized(new(nn.Linear(5, 4))), 3, 5)
    w.module("weight_norm_conv2d", randomized(new(nn.Conv2d(2, 3, 3, padding=1))), 2, 2, 5, 4)
    with warnings.catch_warnings():
        # Deprecated, which is why checkpoints of it are around.
        warnings.simplefilter("ignore", FutureWarning)
        old = nn.utils.weight_norm(nn.Linear(5, 4))
    w.module("weight_norm_old", randomized(old), 3, 5)

    layer = randomized(nn.LayerNorm(6, eps=1e-12))
    x = torch.randn(4, 6)
    names = {"encoder.LayerNorm.gamma": layer.weight, "encoder.LayerNorm.beta": layer.bias}
    w.write("layer_norm_gamma_beta", names, x, layer(x))

    x = torch.randn(2, 3, 4, 5)
    state = bn.state_dict()
    no_counter = {k: v for k, v in state.items() if k != "num_batches_tracked"}
    w.write("batch_norm_no_counter", no_counter, x, bn.eval()(x))

    half = {k: v.half() if k.startswith("running") else v for k, v in state.items()}
    rounded = nn.BatchNorm2d(3).eval()
    rounded.load_state_dict(half)
    w.write("batch_norm_half_stats", half, x, rounded(x))

    negative = {k: v.clone() for k, v in state.items()}
    negative["running_var"][1] = -0.5
    w.size += save(w.folder / "batch_norm_negative_var.safetensors", negative)

    # Last, so that it draws after all others.
    w.module("switch_norm2d", trained(SwitchNorm2d(3), 4, 3, 5, 5), 2, 3, 4, 5)
    pickles(w, state, bn)
    averages(w)
    print(f"{w.size} bytes of safetensors in {w.folder}")


if __name__ == "__main__":
    main()
