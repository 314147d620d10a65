"""What the compile caches are keyed by."""

import types
from pathlib import Path

import torch
from torch import nn

import lotion_fx
from lotion_fx import compiling, kernels, numerics, passes, private


@torch.library.custom_op("compiling::turned", mutates_args=())
def turned(x: torch.Tensor) -> torch.Tensor:
    """The values in another layout than is said below, as some of PyTorch's own kernels do."""
    return x.T.contiguous().T.clone()


@turned.register_fake
def _(x):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


turned.register_autograd(lambda ctx, grad: torch.ops.compiling.turned(grad))


def test_a_kernel_may_lay_its_result_out_otherwise_than_its_fake_one():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(8, 8), nn.Linear(4, 3)

        def forward(self, x):
            return self.last(torch.ops.compiling.turned(self.first(x)).view(-1, 4))

    torch._dynamo.reset()
    model, x = lotion_fx.transform(Net(), "int4", inner="aot_eager"), torch.randn(6, 8)
    expected = model.last(model.first(x).reshape(-1, 4))
    assert torch.equal(model(x), expected)
    model(x).sum().backward()
    with torch.no_grad():
        assert model.eval()(x).shape == expected.shape


def test_every_source_of_compiled_code_is_in_the_key():
    folders = [Path(package.__path__[0]) for package in (numerics, passes, kernels)]
    sources = set(compiling.source_files())
    assert {str(path) for folder in folders for path in folder.rglob("*.py")} <= sources
    assert str(Path(kernels.__path__[0]) / "tuning.json") in sources


def test_a_new_file_changes_the_key(tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "passes", types.SimpleNamespace(__path__=[str(tmp_path)]))
    (tmp_path / "deep").mkdir()

    def key():
        private.get_hash_for_files.cache_clear()  # as a new process would find it
        return private.get_hash_for_files(compiling.source_files())

    keys = [key()]
    for name, text in (("one.py", "a = 1"), ("deep/two.py", "a = 1"), ("one.py", "a = 2"), ("notes.txt", "none")):
        (tmp_path / name).write_text(text)
        keys.append(key())
    assert len(set(keys[:4])) == 4 and keys[4] == keys[3]
