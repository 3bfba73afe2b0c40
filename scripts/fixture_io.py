"""Writes safetensors files byte for byte the same on every run.

The safetensors package keeps the string metadata in a hash map, so two runs of it write the keys of
the same file in different orders. Committed fixtures should change only when their content does.
"""

import json
import struct
from pathlib import Path

import torch

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}


def save(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> int:
    """Writes one file and returns its size in bytes."""
    # Wide elements first, so that each tensor starts at a multiple of its element size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {}
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    body = bytearray()
    for name in order:
        t = tensors[name].detach().contiguous()
        start = len(body)
        # numpy has no bfloat16, bytes it has.
        body += t.reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b""
        header[name] = {
            "dtype": _NAMES[t.dtype],
            "shape": list(t.shape),
            "data_offsets": [start, len(body)],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = struct.pack("<Q", len(text)) + text + bytes(body)
    path.write_bytes(data)
    return len(data)
