"""Train, export, and run in onnxruntime and in OpenVINO, in float32 arithmetic.

pip install onnx onnxscript onnxruntime openvino; python examples/deploy_onnx.py
"""

from __future__ import annotations

import torch
from torch import Tensor

import lotion_fx
from lotion_fx.examples.tiny import llama, rows


def main(path: str = "build/deploy/model.onnx", steps: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    model = lotion_fx.transform(llama(), "int4")
    optimizer, ids = torch.optim.AdamW(model.parameters(), 1e-2), rows(4)
    for _ in range(steps):
        model(input_ids=rows(32), labels=rows(32)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(lotion_fx.export(model.eval(), path, "onnx", example_inputs={"input_ids": ids}))

    import onnxruntime
    import openvino

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    first = session.run(None, {"input_ids": ids.numpy()})[0]
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}  # else activations have 8 bits
    second = openvino.Core().compile_model(path, "CPU", exact)([ids.numpy()])[0]
    with torch.no_grad():
        return model(input_ids=ids).logits, torch.from_numpy(first), torch.from_numpy(second)


if __name__ == "__main__":
    ours, *theirs = main()
    print([f"{(each - ours).norm() / ours.norm():.1e}" for each in theirs])
