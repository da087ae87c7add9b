"""PyTorch's side of the comparison: the commands of worker.rs, answered with torch.

`torch_side.py memory ROW_AS_JSON` instead measures one training step in this process.
"""

import json
import os
import sys

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from batches import fastest

aten = torch.ops.aten
NAMES = {"f32": "float32", "bf16": "bfloat16"}


def fused(norm, x, weight, bias, other, running, row):
    """What stands around a norm, as a model writes it."""
    eps, last = row["eps"], x.shape[-1:]
    if norm == "add+LayerNorm":
        s = x + other
        return F.layer_norm(s, last, weight, bias, eps), s
    if norm == "add+RMSNorm":
        s = x + other
        return F.rms_norm(s, last, weight, eps), s
    if norm == "GroupNorm+SiLU":
        return F.silu(F.group_norm(x, row["groups"], weight, bias, eps))
    if norm == "GroupNorm+GELU":
        return F.gelu(F.group_norm(x, row["groups"], weight, bias, eps))
    if norm == "BatchNorm+skip+ReLU":
        return F.relu(F.batch_norm(x, *running, weight, bias, True, row["momentum"], eps) + other)
    if norm == "LayerNorm+modulation":
        return F.layer_norm(x, last, eps=eps) * (1 + weight) + bias
    if norm == "LayerNorm2d":
        # As Segment Anything has it.
        u = x.mean(1, keepdim=True)
        x = (x - u) / torch.sqrt((x - u).pow(2).mean(1, keepdim=True) + eps)
        return weight[:, None, None] * x + bias[:, None, None]
    return F.rms_norm(x * F.silu(other), last, weight, eps)


#: torch.compile of the above; what it made for a row before is of no use to the next.
compiled = torch.compile(fused, dynamic=False)


class Open:
    """A row that is being measured."""

    def __init__(self, row, tensors):
        self.row = row
        self.t = tensors
        for name in self.tracked():
            self.t[name].requires_grad_()

    def tracked(self):
        return [name for name in ("x", "weight", "bias", "other") if name in self.t]

    def arguments(self, tracked):
        """x, weight, bias, and residual, skip or gate."""
        pick = lambda name: self.t[name] if tracked else self.t[name].detach()
        return [pick(name) if name in self.t else None for name in ("x", "weight", "bias", "other")]

    def forward(self, x, weight, bias, other=None):
        """y, or y and the sum."""
        row, t = self.row, self.t
        norm, eps = row["norm"], row["eps"]
        if row["fused"]:
            running = (t["running_mean"], t["running_var"])
            return fused(norm, x, weight, bias, other, running, row)
        if norm.startswith("BatchNorm"):
            training = norm == "BatchNorm"
            return F.batch_norm(
                x, t["running_mean"], t["running_var"], weight, bias, training, row["momentum"], eps
            )
        if norm == "GroupNorm":
            return F.group_norm(x, row["groups"], weight, bias, eps)
        if norm == "InstanceNorm":
            return F.instance_norm(x, weight=weight, bias=bias, eps=eps)
        if norm == "LayerNorm":
            return F.layer_norm(x, weight.shape, weight, bias, eps)
        return F.rms_norm(x, weight.shape, weight, eps)

    def op(self):
        """One call of forward and backward with dy given, by torch's own kernels where it names them.

        That leaves out torch's autograd engine, as candle-norm's figure leaves out candle's graph.
        Instance and RMS norm are compositions in torch: there the engine is part of the op.
        """
        row, t, dy = self.row, self.t, self.t["dy"]
        norm, eps = row["norm"], row["eps"]
        x, weight, bias, _ = self.arguments(tracked=False)
        every = [True, True, True]
        if norm == "LayerNorm":

            def call():
                y, mean, rstd = aten.native_layer_norm(x, weight.shape, weight, bias, eps)
                return y, aten.native_layer_norm_backward(
                    dy, x, weight.shape, mean, rstd, weight, bias, every
                )

        elif norm == "GroupNorm":
            sizes = (x.shape[0], x.shape[1], x[0, 0].numel(), row["groups"])

            def call():
                y, mean, rstd = aten.native_group_norm(x, weight, bias, *sizes, eps)
                return y, aten.native_group_norm_backward(dy, x, mean, rstd, weight, *sizes, every)

        elif norm == "BatchNorm":
            running = (t["running_mean"], t["running_var"])

            def call():
                y, mean, rstd = aten.native_batch_norm(
                    x, weight, bias, *running, True, row["momentum"], eps
                )
                return y, aten.native_batch_norm_backward(
                    dy, x, weight, *running, mean, rstd, True, eps, every
                )

        else:
            arguments = self.arguments(tracked=True)
            wanted = [a for a in arguments if a is not None]

            def call():
                y = self.forward(*arguments)
                return y, torch.autograd.grad(y, wanted, dy)

        return call

    def step(self, forward):
        """A training step behind a loss whose gradient is dy, so that the loss costs nothing."""
        arguments = self.arguments(tracked=True)
        wanted = [a for a in arguments if a is not None]
        dy = self.t["dy"]

        def call():
            for a in wanted:
                a.grad = None
            outputs = forward(*arguments)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            torch.autograd.backward(outputs, [dy] * len(outputs))

        return call

    def compiled(self, x, weight, bias, other):
        running = (self.t["running_mean"], self.t["running_var"])
        return compiled(self.row["norm"], x, weight, bias, other, running, self.row)

    def outputs(self, dtype):
        """y, and in training the gradients by name, computed in `dtype`."""
        training = self.row["norm"] != "BatchNorm eval"
        kept = self.t
        self.t = {k: v.detach().clone() for k, v in kept.items()}
        for name in self.tracked():
            self.t[name] = self.t[name].to(dtype or self.t[name].dtype).requires_grad_(training)
        arguments = self.arguments(tracked=training)
        y = self.forward(*arguments)
        every = y if isinstance(y, tuple) else (y,)
        outputs = {name: t.detach() for name, t in zip(("y", "sum"), every)}
        if training:
            wanted = [a for a in arguments if a is not None]
            dy = [self.t["dy"].to(t.dtype) for t in every]
            outputs |= zip(self.tracked(), torch.autograd.grad(every, wanted, dy))
        self.t = kept
        return outputs

    def compare(self):
        """The largest relative L2 error of candle-norm's results and of torch's own, against torch's in f32."""
        expected = self.outputs(torch.float32)
        ours = {name: self.t.pop(f"out_{name}") for name in expected}
        errors = {}
        for who, got in {"candle-norm": ours, "torch": self.outputs(None)}.items():
            worst = ["y", 0.0]
            for name, e in expected.items():
                error = ((got[name].double().reshape(e.shape) - e.double()).norm() / e.double().norm()).item()
                # Not `>`: a NaN must win.
                if not error <= worst[1]:
                    worst = [name, error]
            errors[who] = worst
        return {"errors": errors}

    def time(self, contender, figure, calls, batches):
        if contender == "compiled" and not self.row["fused"]:
            raise NotImplementedError("one norm is one kernel in torch already")
        forward = self.compiled if contender == "compiled" else self.forward
        if figure == "forward":
            arguments = self.arguments(tracked=False)
            call = lambda: forward(*arguments)
        else:
            if self.row["norm"] == "BatchNorm eval":
                raise NotImplementedError("evaluation is not trained through here")
            if self.row["fused"] and figure == "op":
                raise NotImplementedError("the backward of a composition is not called by itself")
            call = self.op() if figure == "op" else self.step(forward)
        with torch.set_grad_enabled(figure != "forward"):
            call()
            return fastest(call, calls, batches)


def memory(row):
    """Bytes that a training step adds to this process: kept after the forward, and at most."""

    def status(field):
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

    dtype, param_dtype = (getattr(torch, NAMES[row[key]]) for key in ("dtype", "param_dtype"))
    shape, n = row["shape"], row["params"]
    tensors = {"x": torch.randn(shape).to(dtype), "dy": torch.randn(shape).to(dtype)}
    names = [name for name in ("weight", "bias") if name == "weight" or row["bias"]]
    tensors |= {name: torch.randn(n).to(param_dtype) for name in names}
    if row["other"]:
        tensors["other"] = torch.randn(shape).to(dtype)
    tensors |= {"running_mean": torch.zeros(n), "running_var": torch.ones(n)}
    opened = Open(row, tensors)
    arguments = opened.arguments(tracked=True)
    # Thread pools and the like exist before the measured step.
    of_one = lambda a: a.detach()[:1].clone() if a.dim() > 1 else a.detach()
    opened.forward(*(None if a is None else of_one(a) for a in arguments))
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")
    before = status("VmRSS")
    outputs = opened.forward(*arguments)
    kept = status("VmRSS") - before
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, [tensors["dy"]] * len(outputs))
    return {"x": row["bytes"], "kept": kept, "peak": status("VmHWM") - before}


def main():
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if sys.argv[1:2] == ["memory"]:
        print(json.dumps(memory(json.loads(sys.argv[2]))))
        return
    # As `settle` of benches/cases/memory.rs.
    torch.ones((32 << 20) - (64 << 10), dtype=torch.uint8)
    opened = None
    for line in sys.stdin:
        words = line.rstrip("\n").split("\t")
        if words[0] == "open":
            opened = None
            torch._dynamo.reset()
            opened = Open(json.loads(words[1]), load_file(words[2]))
            answer = opened.compare()
        else:
            _, contender, figure, calls, batches = words
            try:
                answer = {"ns": opened.time(contender, figure, int(calls), int(batches))}
            except NotImplementedError as error:
                answer = {"cannot": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
