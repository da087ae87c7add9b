"""Records PyTorch's answers for the norms with something around them, composed of its own functions in f64.

Run as `python tests/golden/generate_fused.py` with the versions of `generate.py`; it writes
`fused.safetensors`. Inputs are the suite's numbers, rounded to each dtype; what is recorded is f64, so that
the file says what the composition is, and not how PyTorch rounds it.
"""

import json
import pathlib

import torch
import torch.nn.functional as F
from generate import DTYPES, data
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).parent
DIMS, EPS = (2, 4, 6), 1e-3
ACTIVATIONS = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": lambda z: F.leaky_relu(z, 0.1),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "elu": F.elu,
}


def leaf(seed, dims, dtype):
    n = 1
    for d in dims:
        n *= d
    # A spread of 2 reaches the corners of every activation.
    t = torch.tensor(data(seed, n, 0.5, 2.0)).reshape(dims).to(dtype).to(torch.float64)
    return t.requires_grad_()


def rms(x, weight=None):
    return F.rms_norm(x, (DIMS[-1],), weight, EPS)


def rounded_sum(x, r, dtype):
    """x + r as `dtype` has it, with the gradient of an addition."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    total = x + r
    return total + ((x.to(wide) + r.to(wide)).to(dtype).to(torch.float64) - total).detach()


def functions(dtype):
    """Name, the arguments' shapes by seed, and the composition."""
    c, d, full = (DIMS[1],), (DIMS[-1],), DIMS
    per_sample = (DIMS[0], 1, DIMS[-1])
    yield "add_layer_norm", [full, full, d, d], lambda x, r, w, b: F.layer_norm(rounded_sum(x, r, dtype), d, w, b, EPS)
    yield "add_rms_norm", [full, full, d], lambda x, r, w: rms(rounded_sum(x, r, dtype), 1 + w)
    yield "offset_rms_norm", [full, d], lambda x, w: rms(x, 1 + w)
    yield "modulated_layer_norm", [full, per_sample, per_sample], lambda x, a, b: (1 + a) * F.layer_norm(x, d, eps=EPS) + b
    yield "modulated_rms_norm", [full, per_sample, per_sample], lambda x, a, b: (1 + a) * rms(x) + b
    yield "gated_rms_norm before", [full, full, d], lambda x, g, w: rms(x, w) * F.silu(g)
    yield "gated_rms_norm after", [full, full, d], lambda x, g, w: rms(x * F.silu(g), w)
    for name, act in ACTIVATIONS.items():
        yield f"batch_norm_act {name}", [full, full, c, c], lambda x, s, w, b, a=act: a(F.batch_norm(x, None, None, w, b, True, 0.1, EPS) + s)
        yield f"group_norm_act {name}", [full, full, c, c], lambda x, s, w, b, a=act: a(F.group_norm(x, 2, w, b, EPS) + s)
        yield f"instance_norm_act {name}", [full, full, c, c], lambda x, s, w, b, a=act: a(F.instance_norm(x, None, None, w, b, True, 0.1, EPS) + s)
        yield f"layer_norm_act {name}", [full, full, d, d], lambda x, s, w, b, a=act: a(F.layer_norm(x, d, w, b, EPS) + s)


def main():
    tensors, cases = {}, []
    for dtype_name, dtype in DTYPES.items():
        for name, shapes, run in functions(dtype):
            args = [leaf(i + 1, shape, dtype) for i, shape in enumerate(shapes)]
            y = run(*args)
            dy = leaf(9, DIMS, dtype).detach()
            grads = torch.autograd.grad(y, args, dy)
            key = f"{dtype_name} {name}"
            tensors[key + " y"] = y.detach().clone()
            for i, g in enumerate(grads):
                tensors[f"{key} d{i}"] = g.clone()
            cases.append({"op": name, "dtype": dtype_name, "shapes": [list(s) for s in shapes]})
    metadata = {"versions": json.dumps({"torch": torch.__version__}), "cases": json.dumps(cases)}
    save_file({k: v.contiguous() for k, v in tensors.items()}, HERE / "fused.safetensors", metadata)


if __name__ == "__main__":
    main()
