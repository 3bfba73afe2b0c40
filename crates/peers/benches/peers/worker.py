"""PyTorch's turns in the peers bench.

A line on stdin is one of
    {...}                    a case: load it, warm it up, answer which peers are ready and what they computed
    run PEER WARM COUNT      answer the nanoseconds of COUNT calls after WARM others
    done                     free the case; no answer
and an answer is one line of JSON on stdout. The first, unasked, is PyTorch's version. Peers are "pytorch" (eager) and "pytorch-compile".
"""

import gc
import json
import os
import sys
import time

import torch
import torch.nn.functional as F
from torch._functorch import config as functorch_config

DTYPES = {"f32": torch.float32, "f64": torch.float64, "f16": torch.float16, "bf16": torch.bfloat16}


def switch_norm(x, w, b, eps):
    """PyTorch has none: the formula in tensor operations, in equal shares of instance, layer and batch."""
    var, mean = torch.var_mean(x, (2, 3), keepdim=True)

    def union(axis):
        whole = mean.mean(axis, keepdim=True)
        return whole, (var + (mean - whole).square()).mean(axis, keepdim=True)

    (layer_mean, layer_var), (batch_mean, batch_var) = union(1), union(0)
    mean, var = (mean + layer_mean + batch_mean) / 3, (var + layer_var + batch_var) / 3
    scale = w.reshape(1, -1, 1, 1) * torch.rsqrt(var + eps)
    return (x - mean) * scale + b.reshape(1, -1, 1, 1)


def masked_batch_norm(case, mean, var):
    """Batch norm of the valid positions, gathered and scattered."""
    n, c, size = case["tensors"]["x"]["shape"]
    lengths = torch.tensor([size - size * (i * 7 % n) // (2 * n) for i in range(n)])
    index = (torch.arange(size) < lengths[:, None]).reshape(-1).nonzero()[:, 0]

    def layer(x, w, b):
        rows = x.transpose(1, 2).reshape(n * size, c)
        y = F.batch_norm(rows[index], mean, var, w, b, training=True, momentum=0.1, eps=case["eps"])
        return torch.zeros_like(rows).index_copy(0, index, y).view(n, size, c).transpose(1, 2).contiguous()
    return layer


def layer_of(case, mean, var):
    """The layer as a function of x, weight and, where it has one, bias."""
    op, eps = case["op"], case["eps"]
    if op == "layer_norm":
        return lambda x, w, b: F.layer_norm(x, w.shape, w, b, eps)
    if op == "rms_norm":
        return lambda x, w: F.rms_norm(x, w.shape, w, eps)
    if op == "batch_norm":
        return lambda x, w, b: F.batch_norm(x, mean, var, w, b, training=True, momentum=0.1, eps=eps)
    if op == "batch_norm_inference":
        return lambda x, w, b: F.batch_norm(x, mean, var, w, b, training=False, eps=eps)
    if op == "group_norm":
        return lambda x, w, b: F.group_norm(x, case["groups"], w, b, eps)
    if op == "instance_norm":
        return lambda x, w, b: F.instance_norm(x, weight=w, bias=b, eps=eps)
    if op == "switch_norm":
        return lambda x, w, b: switch_norm(x, w, b, eps)
    if op == "weight_norm":
        # What torch.nn.utils.parametrizations.weight_norm calls.
        return lambda v, g: torch._weight_norm(v, g, 0)
    if op == "modulated_layer_norm":
        return lambda x, s, b: F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + s.unsqueeze(1)) + b.unsqueeze(1)
    if op == "layer_norm_gelu":
        return lambda x, w, b: F.gelu(F.layer_norm(x, w.shape, w, b, eps))
    if op == "group_norm_silu":
        return lambda x, w, b: F.silu(F.group_norm(x, case["groups"], w, b, eps))
    if op == "batch_norm_relu":
        return lambda x, w, b: F.relu(F.batch_norm(x, mean, var, w, b, training=True, momentum=0.1, eps=eps))
    if op == "gated_rms_norm":
        return lambda x, w, z: F.rms_norm(x, w.shape, w, eps) * F.silu(z)
    if op == "masked_batch_norm":
        return masked_batch_norm(case, mean, var)
    if op == "global_response_norm":
        def global_response_norm(x, w, b):
            lengths = x.norm(dim=(2, 3), keepdim=True)
            shares = lengths / (lengths.mean(1, keepdim=True) + eps)
            return x + torch.addcmul(b.view(1, -1, 1, 1), w.view(1, -1, 1, 1), x * shares)
        return global_response_norm
    if op == "gated_residual":
        return lambda x, w, r: r + x * w
    if op == "softmax":
        return lambda x: F.softmax(x, -1)
    if op == "l2_normalize":
        return lambda x: F.normalize(x, dim=-1, eps=eps)
    raise ValueError(f"unknown op {op}")


def step_of(layer, pass_name, params, dy):
    """One call of the pass: a function that returns all of its results."""
    if pass_name == "forward":
        return lambda: (layer(*params),)
    leaves = [p.detach().clone().requires_grad_() for p in params]
    if pass_name == "backward":
        y = layer(*leaves)
        return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)
    ones = torch.ones_like(dy)

    def train_step():
        y = layer(*leaves)
        return (y, *torch.autograd.grad(y, leaves, ones))
    return train_step


def sample(result, count):
    """As many values of a result as the bench compares."""
    flat = result.detach().reshape(-1)
    n = min(flat.numel(), count)
    index = torch.arange(n) * flat.numel() // n
    return flat[index].double().tolist()


def load(case):
    """The steps of the case by peer, and the answer that says how each of them did."""
    torch.set_num_threads(case["threads"])
    # Here, since around each call it would cost as much as a small layer.
    torch.set_grad_enabled(case["pass"] != "forward")
    # Keeps a shape from being compiled as a variation of the one before.
    torch._dynamo.reset()

    def tensor(name):
        entry = case["tensors"].get(name)
        if entry is None:
            return None
        count = 1
        for size in entry["shape"]:
            count *= size
        mapped = torch.from_file(entry["path"], size=count, dtype=DTYPES[case["dtype"]])
        return mapped.clone().reshape(entry["shape"])

    params = [p for p in map(tensor, ("x", "weight", "bias")) if p is not None]
    dy = tensor("dy")
    steps, answer = {}, {}
    for peer in case["peers"]:
        # A retained graph must not give away the tensors that it saved.
        functorch_config.donated_buffer = case["pass"] != "backward"
        layer = layer_of(case, tensor("mean"), tensor("var"))
        if peer == "pytorch-compile":
            layer = torch.compile(layer, dynamic=False)
        try:
            step = step_of(layer, case["pass"], params, dy)
            results = step()
            for _ in range(3):
                step()
            answer[peer] = {"samples": [sample(r, case["samples"]) for r in results]}
            json.dumps(answer[peer], allow_nan=False)
            steps[peer] = step
        except Exception as error:
            answer[peer] = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    return steps, answer


def run(step, warm, count):
    for _ in range(warm):
        step()
    start = time.perf_counter_ns()
    for _ in range(count):
        step()
    return {"ns": time.perf_counter_ns() - start}


def main():
    # What anything else prints must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps(torch.__version__), file=answers, flush=True)
    steps = {}
    for line in sys.stdin:
        words = line.split()
        if words[0] == "done":
            steps = {}
            gc.collect()
            continue
        if words[0] == "run":
            # The collector pauses at a time of its own choosing.
            gc.disable()
            answer = run(steps[words[1]], int(words[2]), int(words[3]))
            gc.enable()
        else:
            steps, answer = load(json.loads(line))
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
