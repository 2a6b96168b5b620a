"""Makes aimet_*.encodings: what aimet-onnx exports for a tiny model of two linear layers.

    pip install aimet-onnx onnx torch
    python make.py OUT_DIR

The weights are written beside them (tiny.json), so that a test can build the same layers.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnx
from aimet_onnx import QuantizationSimModel
from onnx import TensorProto, helper, numpy_helper

out = Path(sys.argv[1])
rng = np.random.default_rng(7)
w1 = rng.normal(0, 0.5, (16, 32)).astype(np.float32)
w2 = rng.normal(0, 0.5, (32, 16)).astype(np.float32)
nodes = [
    helper.make_node("Gemm", ["x", "first.weight"], ["first"], name="first", transB=1),
    helper.make_node("Sigmoid", ["first"], ["sigmoid"], name="sigmoid"),
    helper.make_node("Gemm", ["sigmoid", "second.weight"], ["second"], name="second", transB=1),
]
graph = helper.make_graph(
    nodes, "tiny",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 32])],
    [helper.make_tensor_value_info("second", TensorProto.FLOAT, [4, 32])],
    [numpy_helper.from_array(w1, "first.weight"), numpy_helper.from_array(w2, "second.weight")],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
onnx.checker.check_model(model)
sim = QuantizationSimModel(model, param_type="int8", activation_type="int16")
data = rng.normal(0.3, 1.0, (4, 32)).astype(np.float32)
sim.compute_encodings(lambda session: session.run(None, {"x": data}))
for version in ["0.6.1", "1.0.0", "2.0.0"]:
    sim.export(str(out), f"aimet_{version}", export_model=False, encoding_version=version)
(out / "tiny.json").write_text(json.dumps({
    "first.weight": w1.flatten().tolist(), "second.weight": w2.flatten().tolist(), "x": data.flatten().tolist(),
    "second": sim.session.run(None, {"x": data})[0].flatten().tolist(),
}))
