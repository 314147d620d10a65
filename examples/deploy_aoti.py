"""Train, compile ahead of time, and run where neither lotion_fx nor transformers is imported.

python examples/deploy_aoti.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

import lotion_fx
from lotion_fx.examples.tiny import llama, rows

ELSEWHERE = """
import sys, torch
run = torch._inductor.aoti_load_package(sys.argv[1] + "/model.pt2")
torch.save(run(input_ids=torch.load(sys.argv[1] + "/ids.pt")), sys.argv[1] + "/logits.pt")
"""


def main(folder: str = "build/deploy", steps: int = 40) -> tuple[Tensor, Tensor]:
    model = lotion_fx.transform(llama(), "nvfp4")
    optimizer, ids = torch.optim.AdamW(model.parameters(), 1e-2), rows(4)
    for _ in range(steps):
        model(input_ids=rows(32), labels=rows(32)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(lotion_fx.export(model.eval(), Path(folder, "model.pt2"), "aoti", example_inputs={"input_ids": ids}))

    torch.save(ids, Path(folder, "ids.pt"))
    subprocess.run([sys.executable, "-c", ELSEWHERE, folder], check=True)
    with torch.no_grad():
        return model(input_ids=ids).logits, torch.load(Path(folder, "logits.pt"))


if __name__ == "__main__":
    ours, theirs = main()
    print(f"{(theirs - ours).norm() / ours.norm():.1e}")
