"""Lightning: one line differs, that with `lotion_fx`. Its checkpoints hold what a resume needs.

python examples/with_lightning.py
"""

from __future__ import annotations

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lotion_fx


class Classifier(lightning.LightningModule):
    """Whose `training_step` calls its network, and never itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(20, 64), nn.GELU(), nn.Linear(64, 7))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main(folder: str = "build/with_lightning", epochs: int = 4, checkpoint: str | None = None) -> nn.Module:
    torch.manual_seed(0)
    x, model = torch.randn(256, 20), Classifier()
    lotion_fx.transform(model, "int4", finish=0.4, steps=32)
    trainer = lightning.Trainer(
        max_epochs=epochs, default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False
    )
    trainer.fit(model, DataLoader(TensorDataset(x, x[:, :7].argmax(1)), batch_size=32), ckpt_path=checkpoint)
    trainer.save_checkpoint(f"{folder}/last.ckpt")
    return model


if __name__ == "__main__":
    print(lotion_fx.report(main()))
