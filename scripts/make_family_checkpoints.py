"""Writes tests/fixtures/checkpoints/family, the files that tests/models/family_checkpoints.rs loads.

    pip install torch timm diffusers transformers
    python scripts/make_family_checkpoints.py            # rewrites tests/fixtures/checkpoints/family
    python scripts/make_family_checkpoints.py some/dir   # writes somewhere else

Each is a layer of timm, transformers, diffusers or PyTorch with parameters that are not those of a
new one. NAME.safetensors is its state dict. NAME.io.safetensors holds `input` and the `output` that
the package gives for it in evaluation mode, and `condition`, `gate` or `residual` where the layer
takes one. Layers with several outputs have `output`, `output.1` and so on. The same files come out
on every run.
"""

import sys
import warnings
from pathlib import Path

import torch
from diffusers.models import normalization as diffusers
from timm import layers as timm
from timm.layers.grn import GlobalResponseNorm
from torch import nn
from transformers.models.convnextv2.modeling_convnextv2 import ConvNextV2GRN
from transformers.models.dinov2.configuration_dinov2 import Dinov2Config
from transformers.models.dinov2.modeling_dinov2 import Dinov2LayerScale
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated
from transformers.models.zamba2.modeling_zamba2 import Zamba2RMSNormGated

from fixture_io import save


class Writer:
    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.safetensors"):
            old.unlink()
        self.folder, self.size = folder, 0

    def write(self, name: str, module: nn.Module, call, **inputs: torch.Tensor) -> None:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.3)
            for key, buffer in module.named_buffers():
                if key == "running_mean":
                    buffer.normal_()
                elif key == "running_var":
                    buffer.uniform_(0.5, 2)
            module.eval()
            outputs = call(**inputs)
        if isinstance(outputs, torch.Tensor):
            outputs = [outputs]
        io = {"input" if key == "x" else key: value for key, value in inputs.items()}
        for i, output in enumerate(outputs):
            io["output" if i == 0 else f"output.{i}"] = output
        self.size += save(self.folder / f"{name}.safetensors", dict(module.state_dict()))
        self.size += save(self.folder / f"{name}.io.safetensors", io)

    def module(self, name: str, module: nn.Module, *shape: int) -> None:
        self.write(name, module, lambda x: module(x), x=torch.randn(shape) * 1.3 + 0.4)


def gated(w: Writer, name: str, module: nn.Module) -> None:
    x, gate = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    w.write(name, module, lambda x, gate: module(x, gate), x=x, gate=gate)


def conditioned(w: Writer, name: str, module: nn.Module, *shape: int, **more) -> None:
    x, condition = torch.randn(shape), torch.randn(2, 6)
    w.write(name, module, lambda x, condition: module(x, condition, **more), x=x, condition=condition)


class Holder(nn.Module):
    """A layer under the name that it has in its block."""

    def __init__(self, name: str, module: nn.Module):
        super().__init__()
        self.add_module(name, module)
        self.held = name

    def forward(self, *args, **kwargs):
        return getattr(self, self.held)(*args, **kwargs)


def main() -> None:
    here = Path(__file__).resolve().parent
    default = here.parent / "tests" / "fixtures" / "checkpoints" / "family"
    w = Writer(Path(sys.argv[1]) if len(sys.argv) > 1 else default)
    torch.set_num_threads(1)
    torch.manual_seed(21)

    w.module("timm_grn", GlobalResponseNorm(6), 2, 3, 4, 6)
    w.module("timm_grn_channels_first", GlobalResponseNorm(6, channels_last=False), 2, 6, 3, 4)
    w.module("transformers_grn", ConvNextV2GRN(6), 2, 3, 4, 6)
    w.module("timm_layer_scale", timm.LayerScale(6), 2, 3, 6)
    w.module("timm_layer_scale_2d", timm.LayerScale2d(6), 2, 6, 3, 4)
    w.module("transformers_layer_scale", Dinov2LayerScale(Dinov2Config(hidden_size=6)), 2, 3, 6)

    gated(w, "transformers_mamba2_gated", MambaRMSNormGated(8, group_size=4))
    gated(w, "transformers_zamba2_gated", Zamba2RMSNormGated(8, group_size=4))
    gated(w, "transformers_qwen3_next_gated", Qwen3NextRMSNormGated(8))

    w.module("timm_batch_norm_relu", timm.BatchNormAct2d(6), 2, 6, 3, 4)
    w.module("timm_group_norm_silu", timm.GroupNormAct(6, 3, act_layer=nn.SiLU), 2, 6, 3, 4)
    w.module("timm_layer_norm_gelu", timm.LayerNormAct(6, act_layer=nn.GELU), 2, 3, 6)

    w.module("timm_std_conv2d", timm.StdConv2d(3, 4, 3, padding=1), 2, 3, 5, 4)
    w.module("timm_scaled_std_conv2d", timm.ScaledStdConv2d(3, 4, 3, padding=1), 2, 3, 5, 4)
    new = nn.utils.parametrizations.spectral_norm
    w.module("spectral_norm_linear", new(nn.Linear(5, 4)), 3, 5)
    w.module("spectral_norm_conv2d", new(nn.Conv2d(2, 3, 3, padding=1)), 2, 2, 5, 4)
    w.module("spectral_norm_conv_transpose2d", new(nn.ConvTranspose2d(2, 3, 3)), 2, 2, 5, 4)
    with warnings.catch_warnings():
        # Deprecated, which is why checkpoints of it are around.
        warnings.simplefilter("ignore", FutureWarning)
        old = nn.utils.spectral_norm(nn.Linear(5, 4))
    w.module("spectral_norm_old", old, 3, 5)

    zero = Holder("norm1", diffusers.AdaLayerNormZero(8))
    x, condition = torch.randn(2, 3, 8), torch.randn(2, 8)
    w.write("diffusers_ada_zero", zero, lambda x, condition: zero(x, emb=condition), x=x, condition=condition)
    single = Holder("norm1", diffusers.AdaLayerNormZeroSingle(8))
    w.write("diffusers_ada_zero_single", single, lambda x, condition: single(x, emb=condition), x=x, condition=condition)
    sd35 = Holder("norm1", diffusers.SD35AdaLayerNormZeroX(8))
    w.write("diffusers_sd35", sd35, lambda x, condition: sd35(x, condition), x=x, condition=condition)
    continuous = Holder("norm_out", diffusers.AdaLayerNormContinuous(8, 6, elementwise_affine=False, eps=1e-6))
    conditioned(w, "diffusers_ada_continuous", continuous, 2, 3, 8)
    conditioned(w, "diffusers_ada_group", diffusers.AdaGroupNorm(6, 8, 2), 2, 8, 3, 4)
    affine = Holder("norm_out", diffusers.AdaLayerNormContinuous(8, 6, eps=1e-5))
    conditioned(w, "diffusers_ada_continuous_affine", affine, 2, 3, 8)
    lumina = diffusers.LuminaRMSNormZero(8, 1e-5, True)
    w.write("diffusers_lumina", lumina, lambda x, condition: lumina(x, condition), x=x, condition=torch.randn(2, 8))
    print(f"{w.size} bytes in {w.folder}")


if __name__ == "__main__":
    main()
