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


class Open:
    """A row that is being measured."""

    def __init__(self, row, tensors):
        self.row = row
        self.t = tensors
        for name in self.tracked():
            self.t[name].requires_grad_()

    def tracked(self):
        return [name for name in ("x", "weight", "bias") if name in self.t]

    def arguments(self, tracked):
        """x, weight, bias."""
        pick = lambda name: self.t[name] if tracked else self.t[name].detach()
        return pick("x"), pick("weight"), pick("bias") if "bias" in self.t else None

    def forward(self, x, weight, bias):
        row, t = self.row, self.t
        norm, eps = row["norm"], row["eps"]
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
        x, weight, bias = self.arguments(tracked=False)
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

    def step(self):
        """A training step behind a loss whose gradient is dy, so that the loss costs nothing."""
        arguments = self.arguments(tracked=True)
        wanted = [a for a in arguments if a is not None]
        dy = self.t["dy"]

        def call():
            for a in wanted:
                a.grad = None
            self.forward(*arguments).backward(dy)

        return call

    def outputs(self, dtype):
        """y, and in training the gradients by name, computed in `dtype`."""
        training = self.row["norm"] != "BatchNorm eval"
        kept = self.t
        self.t = {k: v.detach().clone() for k, v in kept.items()}
        for name in self.tracked():
            self.t[name] = self.t[name].to(dtype or self.t[name].dtype).requires_grad_(training)
        arguments = self.arguments(tracked=training)
        y = self.forward(*arguments)
        outputs = {"y": y.detach()}
        if training:
            wanted = [a for a in arguments if a is not None]
            outputs |= zip(self.tracked(), torch.autograd.grad(y, wanted, self.t["dy"].to(y.dtype)))
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

    def time(self, figure, calls, batches):
        if figure == "forward":
            arguments = self.arguments(tracked=False)
            call = lambda: self.forward(*arguments)
        else:
            if self.row["norm"] == "BatchNorm eval":
                raise NotImplementedError("evaluation is not trained through here")
            call = self.op() if figure == "op" else self.step()
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
    names = ("weight", "bias") if row["norm"] != "RMSNorm" else ("weight",)
    tensors |= {name: torch.randn(n).to(param_dtype) for name in names}
    tensors |= {"running_mean": torch.zeros(n), "running_var": torch.ones(n)}
    opened = Open(row, tensors)
    x, weight, bias = opened.arguments(tracked=True)
    # Thread pools and the like exist before the measured step.
    opened.forward(torch.randn([1, *shape[1:]]).to(dtype), weight.detach(), None if bias is None else bias.detach())
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")
    before = status("VmRSS")
    y = opened.forward(x, weight, bias)
    kept = status("VmRSS") - before
    y.backward(tensors["dy"])
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
            opened = Open(json.loads(words[1]), load_file(words[2]))
            answer = opened.compare()
        else:
            _, _, figure, calls, batches = words
            try:
                answer = {"ns": opened.time(figure, int(calls), int(batches))}
            except NotImplementedError as error:
                answer = {"cannot": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
