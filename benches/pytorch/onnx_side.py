"""ONNX Runtime's side of the comparison: the forward rows for which it has a kernel on the CPU."""

import json
import os
import sys

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper
from safetensors.numpy import load_file

from batches import fastest

OPS = {
    "BatchNorm eval": ("BatchNormalization", ["weight", "bias", "running_mean", "running_var"], {}),
    "InstanceNorm": ("InstanceNormalization", ["weight", "bias"], {}),
    "LayerNorm": ("LayerNormalization", ["weight", "bias"], {"axis": -1}),
}


def session(row, tensors):
    op, names, attributes = OPS[row["norm"]]
    constants = [
        helper.make_tensor(n, TensorProto.FLOAT, tensors[n].shape, tensors[n].tobytes(), raw=True) for n in names
    ]
    value = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, row["shape"])
    node = helper.make_node(op, ["x", *names], ["y"], epsilon=row["eps"], **attributes)
    graph = helper.make_graph([node], "norm", [value("x")], [value("y")], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = ort.SessionOptions()
    options.intra_op_num_threads = int(os.environ["OMP_NUM_THREADS"])
    options.inter_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


class Open:
    def __init__(self, row, file):
        if row["norm"] not in OPS or row["dtype"] != "f32":
            raise NotImplementedError("no kernel")
        tensors = load_file(file)
        self.session = session(row, tensors)
        self.x = ort.OrtValue.ortvalue_from_numpy(tensors["x"])
        y, expected = self.call()[0].numpy(), tensors["out_y"].reshape(row["shape"])
        error = np.linalg.norm(y - expected) / np.linalg.norm(expected)
        if not error <= row["tolerance"]:
            sys.exit(f"{row['id']}: ONNX Runtime's y is off by {error}")

    def call(self):
        return self.session.run_with_ort_values(["y"], {"x": self.x})

    def time(self, calls, batches):
        self.call()
        return fastest(self.call, calls, batches)


def main():
    opened = None
    for line in sys.stdin:
        words = line.rstrip("\n").split("\t")
        try:
            if words[0] == "open":
                opened = None
                opened = Open(json.loads(words[1]), words[2])
                answer = {}
            elif opened is None or words[2] != "forward":
                raise NotImplementedError("no kernel")
            else:
                answer = {"ns": opened.time(int(words[3]), int(words[4]))}
        except NotImplementedError as error:
            answer = {"cannot": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
