"""Records PyTorch's norms: outputs, gradients, running statistics, errors at large means.

Run as `python tests/golden/generate.py` with the versions below; it writes the safetensors files
beside itself. The suite reads them, so PyTorch is needed only to record them again.

Each file holds the tensors of one function. Its metadata has `versions` and `cases`, a JSON list in
which each case names its tensors. Tensors that several cases share are stored once.
"""

import json
import pathlib
import struct

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

TORCH, NUMPY = "2.11.0", "2."
HERE = pathlib.Path(__file__).parent
DTYPES = {"f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def splitmix(i):
    z = (i + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def data(seed, length, mean, std):
    """The same numbers, to the bit, as `data` in tests/suite/common.rs."""
    with np.errstate(over="ignore"):
        i = np.uint64(seed) * np.uint64(0x100000000) + np.arange(4 * length, dtype=np.uint64)
        u = (splitmix(i) >> np.uint64(11)).astype(np.float64).reshape(length, 4)
    total = ((u[:, 0] + u[:, 1]) + u[:, 2]) + u[:, 3]
    return (total * (1.0 / 2.0**53) - 2.0) * 1.7320508075688772 * std + mean


def laid_out(t, layout):
    """The values of `t` in the memory order and the offset that `layout` names."""
    if layout == "channels-last":
        order = [0, *range(2, t.dim()), 1]
    elif layout == "transposed":
        order = [1, 0, *range(2, t.dim())]
    else:
        order = list(range(t.dim()))
    back = [order.index(d) for d in range(t.dim())]
    t = t.permute(order).contiguous().permute(back)
    if layout == "narrowed":
        last = t.dim() - 1
        junk = torch.full_like(t.narrow(last, 0, 2), float("nan"))
        t = torch.cat([junk, t, junk], last).narrow(last, 2, t.shape[last])
    return t


class Recorder:
    def __init__(self, op):
        self.op, self.tensors, self.cases, self.refused = op, {}, [], []

    def store(self, key, t):
        t = t.detach().contiguous()
        if key in self.tensors:
            assert torch.equal(self.tensors[key], t), key
        self.tensors[key] = t
        return key

    def shared(self, what, seed, dims, dtype, mean=0.0, std=1.0):
        key = f"{what}/{seed}/{'x'.join(map(str, dims))}/{dtype}/{mean}"
        values = data(seed, int(np.prod(dims)), mean, std)
        t = torch.from_numpy(values).reshape(dims).to(DTYPES[dtype])
        return self.store(key, t), t.clone()

    def case(self, dims, *, dtype="f32", params="f32", weight=True, bias=True, layout="contiguous",
             eps=1e-5, normalized=0, groups=0, training=True, running=None, momentum=0.1, steps=1, mean=0.0):
        """One call, or `steps` calls that move the same running statistics; the last is recorded.

        `momentum` None is the cumulative average: 1 / (number of the step).
        """
        name = f"{len(self.cases)}"
        shape = dims[len(dims) - normalized:] if normalized else [dims[1]]
        spec = dict(dims=dims, dtype=dtype, params=params, layout=layout, eps=eps, normalized=normalized,
                    groups=groups, training=training, momentum=momentum)
        w = b = None
        if weight:
            spec["weight"], w = self.shared("weight", 2, shape, params, 1.0, 0.5)
            w.requires_grad_()
        if bias:
            spec["bias"], b = self.shared("bias", 3, shape, params)
            b.requires_grad_()
        rm = rv = None
        if running:
            spec["running"] = running
            spec["mean_before"], rm = self.shared("running_mean", 4, shape, running)
            spec["var_before"], rv = self.shared("running_var", 5, shape, running, 1.0, 0.25)
        spec["x"], means, variances = [], [], []
        for step in range(steps):
            key, x = self.shared("x", 10 + step, dims, dtype, mean)
            spec["x"].append(key)
            x = laid_out(x, layout).requires_grad_()
            factor = 1.0 / (step + 1) if momentum is None else momentum
            y = self.refusable(spec, lambda: self.call(x, w, b, rm, rv, spec, factor))
            if y is None:
                return
            if running:
                means.append(rm.clone())
                variances.append(rv.clone())
        spec["dy"], dy = self.shared("dy", 1, dims, dtype)
        wrt = [t for t in (x, w, b) if t is not None]
        grads = self.refusable(spec, lambda: list(torch.autograd.grad(y, wrt, dy)))
        if grads is None:
            return
        results = dict(zip(["y", "dx", *(k for k in ("weight", "bias") if k in spec)], [y, *grads]))
        if dtype in ("f16", "bf16"):
            results = self.in_f64(spec, results, [x, w, b], [spec.get("mean_before"), spec.get("var_before")], dy)
        for what, t in results.items():
            key = what if what in ("y", "dx") else f"d{what}"
            spec[key] = self.store(f"{name}/{key}", t)
        if running:
            spec["mean_after"] = self.store(f"{name}/mean_after", torch.stack(means))
            spec["var_after"] = self.store(f"{name}/var_after", torch.stack(variances))
        self.cases.append(spec)

    def in_f64(self, spec, results, leaves, running, dy):
        """The same call on the same numbers in f64, kept in f32; notes how far `results` are from it.

        In half precision PyTorch rounds scales, shifts and sums of gradients to half on the way, here and
        there by a dozen roundoffs: an exact answer is the better reference, and its own error a yardstick.
        """
        wide = [None if t is None else t.detach().double().requires_grad_() for t in leaves]
        running = [None if key is None else self.tensors[key].double() for key in running]
        y = self.call(*wide, *running, spec, 0.0)
        exact = [y, *torch.autograd.grad(y, [t for t in wide if t is not None], dy.double())]
        pairs = zip(results, results.values(), exact)
        spec["errors"] = {what: ((t.double() - e).norm() / e.norm()).item() for what, t, e in pairs}
        return {what: e.float() for what, e in zip(results, exact)}

    def refusable(self, spec, call):
        """`call()`, or None where PyTorch has no answer."""
        try:
            return call()
        except RuntimeError as e:
            affine = [spec["params"], *(key for key in ("weight", "bias") if key in spec)]
            self.refused.append(f"{spec['dtype']} with {' '.join(affine)}: {str(e).splitlines()[0]}")
            return None

    def call(self, x, w, b, rm, rv, spec, momentum):
        eps, shape = spec["eps"], spec["dims"][len(spec["dims"]) - spec["normalized"]:]
        return {
            "batch_norm": lambda: F.batch_norm(x, rm, rv, w, b, spec["training"], momentum, eps),
            "instance_norm": lambda: F.instance_norm(x, rm, rv, w, b, spec["training"], momentum, eps),
            "layer_norm": lambda: F.layer_norm(x, shape, w, b, eps),
            "group_norm": lambda: F.group_norm(x, spec["groups"], w, b, eps),
            "rms_norm": lambda: F.rms_norm(x, shape, w, eps),
        }[self.op]()

    def write(self):
        meta = {"versions": json.dumps(versions()), "cases": json.dumps(self.cases)}
        path = HERE / f"{self.op}.safetensors"
        used = {key for spec in self.cases for v in spec.values() for key in (v if isinstance(v, list) else [v])
                if isinstance(key, str)}
        save_file({key: t for key, t in self.tensors.items() if key in used}, path, metadata=meta)
        print(f"{path.name}: {len(self.cases)} cases, {path.stat().st_size} bytes")
        for why in self.refused:
            print(f"  PyTorch refuses {why}")


def versions():
    return {"torch": torch.__version__, "numpy": np.__version__}


def dtype_cases(case, dims, **flags):
    """dtypes of input and parameters that PyTorch has an answer for, and layouts of two of them."""
    for dtype, params in [("f64", "f64"), ("f16", "f16"), ("bf16", "bf16"), ("f16", "f32"), ("bf16", "f32"),
                          ("f32", "f16"), ("f32", "bf16")]:
        case(dims, dtype=dtype, params=params, **flags)
    for layout in ["channels-last", "transposed", "narrowed"]:
        for dtype in ["f32", "bf16"]:
            case(dims, dtype=dtype, layout=layout, **flags)


def affine(rms=False):
    for weight in (True, False):
        for bias in (False,) if rms else (True, False):
            yield dict(weight=weight, bias=bias)


def batch_norm(case):
    for dims in ([5, 6], [3, 4, 7], [2, 6, 3, 5], [2, 4, 2, 3, 2]):
        for flags in affine():
            case(dims, **flags)
        case(dims, running="f32")
        case(dims, running="f32", training=False)
    dims = [2, 6, 3, 5]
    dtype_cases(case, dims)
    for flags in affine():
        case(dims, running="f32", training=False, **flags)
    for dtype, running in [("f64", "f64"), ("f16", "f32"), ("bf16", "f32")]:
        params = "f64" if dtype == "f64" else "f32"
        for training in (True, False):
            case(dims, dtype=dtype, params=params, running=running, training=training, steps=2)
    for layout in ("channels-last", "narrowed"):
        case(dims, layout=layout, running="f32", steps=3)
        case(dims, layout=layout, running="f32", training=False)
    for momentum in (0.0, 0.01, 0.1, 1.0, None):
        case(dims, running="f32", momentum=momentum, steps=4)
    for eps in (1e-12, 1e-3, 0.5):
        case(dims, eps=eps)
        case(dims, eps=eps, running="f32", training=False)
    case([4, 3, 12, 20], running="f32", mean=100.0)


def instance_norm(case):
    for dims in ([3, 4, 7], [2, 6, 3, 5], [2, 4, 2, 3, 2]):
        for flags in affine():
            case(dims, **flags)
        case(dims, running="f32")
        case(dims, running="f32", training=False)
    dims = [2, 6, 3, 5]
    dtype_cases(case, dims)
    for momentum in (0.1, 1.0, None):
        case(dims, running="f32", momentum=momentum, steps=3)
    for layout in ("channels-last", "narrowed"):
        case(dims, layout=layout, running="f32", steps=2)
        case(dims, layout=layout, running="f32", training=False)
    for eps in (1e-12, 1e-3, 0.5):
        case(dims, eps=eps)
    case([2, 3, 16, 17], mean=100.0)


def group_norm(case):
    for dims in ([5, 6], [3, 6, 7], [2, 6, 3, 5], [2, 6, 2, 3, 2]):
        for groups in (1, 2, 3):
            case(dims, groups=groups)
        for flags in affine():
            case(dims, groups=2, **flags)
    dims = [2, 6, 3, 5]
    case(dims, groups=6)
    dtype_cases(case, dims, groups=3)
    for eps in (1e-12, 1e-3, 0.5):
        case(dims, eps=eps, groups=2)
    case([2, 8, 12, 11], groups=4, mean=100.0)


def layer_norm(case):
    for dims, normalized in [([5, 6], 1), ([5, 6], 2), ([3, 4, 7], 1), ([3, 4, 7], 2), ([2, 6, 3, 5], 1),
                             ([2, 6, 3, 5], 2), ([2, 6, 3, 5], 3), ([2, 6, 3, 5], 4)]:
        for flags in affine():
            case(dims, normalized=normalized, **flags)
    dims = [2, 6, 3, 5]
    for normalized in (1, 3):
        dtype_cases(case, dims, normalized=normalized)
    for eps in (1e-12, 1e-3, 0.5):
        case(dims, eps=eps, normalized=1)
    case([3, 768], normalized=1, mean=100.0)


def rms_norm(case):
    def no_bias(dims, **flags):
        case(dims, **{"bias": False, **flags})

    for dims, normalized in [([5, 6], 1), ([5, 6], 2), ([3, 4, 7], 1), ([3, 4, 7], 2), ([2, 6, 3, 5], 1),
                             ([2, 6, 3, 5], 3), ([2, 6, 3, 5], 4)]:
        for flags in affine(rms=True):
            no_bias(dims, normalized=normalized, **flags)
    dims = [2, 6, 3, 5]
    for normalized in (1, 3):
        dtype_cases(no_bias, dims, normalized=normalized)
    for eps in (1e-12, 1e-3, 0.5):
        no_bias(dims, eps=eps, normalized=1)
    no_bias([3, 768], normalized=1, mean=100.0)


def precision():
    """Errors of PyTorch in f32 against itself in f64 on data that lie far from zero, relative L2.

    The inputs are `data(seed, ..)` rounded to f32, with weight and bias, so that the suite makes the same.
    """
    ops = {
        "batch_norm": ([16, 32, 28, 28], [32], lambda x, w, b: F.batch_norm(x, None, None, w, b, True)),
        "instance_norm": ([8, 16, 28, 28], [16], lambda x, w, b: F.instance_norm(x, None, None, w, b, True)),
        "group_norm": ([4, 64, 32, 32], [64], lambda x, w, b: F.group_norm(x, 32, w, b)),
        "layer_norm": ([256, 1024], [1024], lambda x, w, b: F.layer_norm(x, [1024], w, b)),
        "rms_norm": ([256, 1024], [1024], lambda x, w, b: F.rms_norm(x, [1024], w, 1e-5)),
    }
    torch.set_num_threads(2)
    rows = []
    for op, (dims, shape, call) in ops.items():
        for mean, std in [(0.0, 1.0), (1e4, 1.0), (1e3, 0.1)]:
            def f32(seed, dims, mean, std):
                return torch.from_numpy(data(seed, int(np.prod(dims)), mean, std)).reshape(dims).float()

            x, dy = f32(10, dims, mean, std), f32(1, dims, 0.0, 1.0)
            w, b = f32(2, shape, 1.0, 0.5), f32(3, shape, 0.0, 1.0)

            def run(dtype):
                leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, w, b)]
                y = call(*leaves)
                return [y, *torch.autograd.grad(y, leaves, dy.to(dtype), allow_unused=True)]

            row = dict(op=op, dims=dims, mean=mean, std=std)
            for name, got, exact in zip(["y", "dx", "dweight", "dbias"], run(torch.float32), run(torch.float64)):
                if got is not None:
                    row[name] = ((got.double() - exact).norm() / exact.norm()).item()
            rows.append(row)
            print({k: f"{v:.1e}" if isinstance(v, float) else v for k, v in row.items()})
    text = json.dumps({"versions": versions(), "rows": rows}, indent=1)
    (HERE / "precision.json").write_text(text + "\n")


def main():
    assert torch.__version__.startswith(TORCH) and np.__version__.startswith(NUMPY), versions()
    # data() is what the suite makes from the same seed: this is its first number, to the bit.
    print("data(1, 1)[0] =", struct.pack(">d", data(1, 1, 0.0, 1.0)[0]).hex())
    for op in (batch_norm, instance_norm, group_norm, layer_norm, rms_norm):
        recorder = Recorder(op.__name__)
        op(recorder.case)
        recorder.write()
    precision()


if __name__ == "__main__":
    main()
