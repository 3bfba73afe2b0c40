"""Writes tests/fixtures/checkpoints, the files that tests/checkpoints.rs loads.

    pip install torch numpy
    python scripts/make_checkpoints.py            # rewrites tests/fixtures/checkpoints
    python scripts/make_checkpoints.py some/dir   # writes somewhere else

NAME.safetensors is a state dict, NAME.io.safetensors holds an `input` and the `output` that PyTorch
gives for it in evaluation mode. The same files come out on every run. One state dict is also written
as NAME.pth.

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
"""

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


def main() -> None:
    here = Path(__file__).resolve().parent
    default = here.parent / "tests" / "fixtures" / "checkpoints"
    w = Writer(Path(sys.argv[1]) if len(sys.argv) > 1 else default)
    torch.set_num_threads(1)
    torch.manual_seed(20)

    bn = trained(nn.BatchNorm2d(3), 4, 3, 5, 5)
    w.module("batch_norm2d", bn, 2, 3, 4, 5)
    torch.save(bn.state_dict(), w.folder / "batch_norm2d.pth")
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
    print(f"{w.size} bytes of safetensors in {w.folder}")


if __name__ == "__main__":
    main()
