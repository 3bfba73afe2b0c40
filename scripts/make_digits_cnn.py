"""Trains a small network with PyTorch and writes what examples/pytorch_checkpoint.rs loads.

    pip install torch numpy
    python scripts/make_digits_cnn.py            # rewrites examples/data/digits_cnn*.safetensors
    python scripts/make_digits_cnn.py some/dir   # writes somewhere else

digits_cnn.safetensors is the state dict. digits_cnn.logits.safetensors holds the `logits` of the test
images in evaluation mode. The same files come out on every run on the same machine and torch.
"""

import gzip
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from fixture_io import save

TRAIN = 1297


class DigitsCnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 12, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(12)
        self.conv2 = weight_norm(nn.Conv2d(12, 24, 3, padding=1))
        self.gn = nn.GroupNorm(4, 24)
        self.fc = nn.Linear(24 * 4 * 4, 16)
        self.ln = nn.LayerNorm(16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.avg_pool2d(self.bn(self.conv1(x)).relu(), 2)
        x = self.gn(self.conv2(x)).relu().flatten(1)
        return self.head(self.ln(self.fc(x)).relu())


def main() -> None:
    data = Path(__file__).resolve().parent.parent / "examples" / "data"
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else data
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(20)

    with gzip.open(data / "digits.csv.gz", "rt") as rows:
        table = torch.tensor([[float(value) for value in row.split(",")] for row in rows])
    images, labels = table[:, :64].reshape(-1, 1, 8, 8) / 16, table[:, 64].long()

    model = DigitsCnn()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(8):
        for batch in torch.randperm(TRAIN).split(32):
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    with torch.no_grad():
        logits = model.eval()(images[TRAIN:])
    accuracy = (logits.argmax(1) == labels[TRAIN:]).float().mean()
    size = save(folder / "digits_cnn.safetensors", model.state_dict())
    size += save(folder / "digits_cnn.logits.safetensors", {"logits": logits})
    print(f"{accuracy:.1%} of the test digits right, {size} bytes in {folder}")


if __name__ == "__main__":
    main()
