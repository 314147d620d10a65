"""Train in a format of ggml's, export, and let llama.cpp generate.

pip install gguf llama-cpp-python; python examples/deploy_gguf.py
"""

from __future__ import annotations

import torch

import lotion_fx
from lotion_fx.examples.tiny import llama, rows


def main(path: str = "build/deploy/model.gguf", steps: int = 40) -> list[int]:
    model = lotion_fx.transform(llama(), "int4/32/fp16")  # Q4_0; also int8/32/fp16, mxfp4, nvfp4/pow2
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(steps):
        model(input_ids=rows(32), labels=rows(32)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(lotion_fx.export(model.eval(), path, "gguf"))

    from llama_cpp import Llama

    client = Llama(path, n_ctx=64, verbose=False, type_k=0, type_v=0)  # keys and values in float32
    tokens = [token for token, _ in zip(client.generate(rows(1)[0, :4].tolist(), temp=0.0), range(8), strict=False)]
    client.close()
    return tokens


if __name__ == "__main__":
    print(main())
