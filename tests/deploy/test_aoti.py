"""Layout "aoti": the compiled file holds codes, and runs where lotion_fx and transformers cannot be imported."""

import subprocess
import sys
import zipfile

import pytest
import torch
from torch import nn

import lotion_fx
from lotion_fx import private_packages
from tests.deploy.hf import distance, logits, make, rows, under
from tests.models import MLP

pytestmark = pytest.mark.filterwarnings(  # torch's own, as it copies a program
    "ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"
)

BOUND = 2e-6  # of outputs: sums of float32 in another order

ALONE = """
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ("lotion_fx", "transformers"):
            raise ImportError(name)

sys.meta_path.insert(0, Blocked())
import torch
run = torch._inductor.aoti_load_package(sys.argv[1])
args, kwargs = torch.load(sys.argv[2])
torch.save(run(*args, **kwargs), sys.argv[3])
"""


def alone(path, folder, *args, **kwargs):
    """The outputs in a process in which neither lotion_fx nor transformers can be imported."""
    torch.save((args, kwargs), folder / "inputs.pt")
    command = [sys.executable, "-c", ALONE, str(path), str(folder / "inputs.pt"), str(folder / "outputs.pt")]
    subprocess.run(command, check=True, capture_output=True, cwd=folder)
    return torch.load(folder / "outputs.pt")


def ready(model, x, fmt):
    lotion_fx.transform(model.eval(), fmt, inner="eager")
    with torch.no_grad():
        return model, model(x)


def test_example_inputs_are_asked_for(tmp_path):
    model, _ = ready(MLP(), torch.randn(2, 20), "int4")
    with pytest.raises(ValueError, match="layout='aoti' traces the model: pass example_inputs="):
        lotion_fx.export(model, tmp_path / "model.pt2", "aoti")
    assert not any(tmp_path.iterdir())


@pytest.fixture
def compiled(monkeypatch):
    """A compiler that takes no time: what it is given runs in Python, and its constants are the program's."""
    programs = {}

    def compile(program, path):
        with zipfile.ZipFile(path, "w") as package:
            package.writestr("model.so", "")
        programs["last"] = program

    def constants(library):
        once = {each.data_ptr(): name for name, each in programs["last"].state_dict.items()}  # by the last of its names
        return {name: programs["last"].state_dict[name].clone() for name in once.values()}

    monkeypatch.setattr(private_packages, "constants_of", constants)
    monkeypatch.setattr(private_packages, "compile_package", compile)
    monkeypatch.setattr(private_packages, "load_package", lambda path: programs["last"].module())
    return programs


@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp4", "int4", "int3/tensor", "nf4", "fp8", "mxfp6", "int8"])
def test_the_traced_program_holds_codes_and_scales_alone(tmp_path, compiled, fmt, monkeypatch):
    from lotion_fx.deploy.layouts.aoti import Aoti

    x = torch.randn(4, 20)
    model, expected = ready(MLP(), x, fmt)
    weights = lotion_fx.quantized(model)
    content = lotion_fx.deploy.content.Content.of(model)
    with torch.no_grad():
        assert Aoti().write(content, tmp_path / "model.pt2", example_inputs=(x,)) == {}
    state = compiled["last"].state_dict
    assert torch.equal(state["up.parametrizations.weight.original0"], weights["up.weight"].codes)
    held = sum(t.numel() * t.element_size() for name, t in state.items() if "bias" not in name)
    assert 0 <= held - sum(w.nbytes for w in weights.values()) <= 2 * 8 * 4  # small vectors are held nine times
    assert distance(compiled["last"].module()(x), expected) < BOUND


class Shared(nn.Module):
    """One module under two names, and one weight of two modules."""

    def __init__(self):
        super().__init__()
        self.first, self.tied = nn.Linear(20, 20), nn.Linear(20, 20)
        self.tied.weight, self.again = self.first.weight, self.first

    def forward(self, x):
        return self.tied(self.again(self.first(x).tanh()).tanh())


@pytest.mark.parametrize("fmt", ["int4", "nvfp4"])
def test_what_has_several_names_is_held_once(tmp_path, compiled, fmt):
    x = torch.randn(4, 20)
    model, expected = ready(Shared(), x, fmt)
    told = lotion_fx.export(model, tmp_path / "model.pt2", "aoti", example_inputs=(x,))
    assert list(told.packed) == ["first.weight"]
    assert distance(compiled["last"].module()(x), expected) < BOUND
    codes = lotion_fx.quantized(model)["first.weight"].codes
    held = private_packages.constants_of("").values()
    assert sum(each.dtype == codes.dtype and each.shape == codes.shape for each in held) == 1


@pytest.mark.slow
def test_a_file_of_shared_weights_is_read_back(tmp_path):
    x = torch.randn(4, 20)
    model, expected = ready(Shared(), x, "int4")
    told = lotion_fx.export(model, tmp_path / "m.pt2", "aoti", example_inputs=(x,))
    assert distance(torch._inductor.aoti_load_package(str(told.path))(x), expected) < BOUND


def test_a_forward_that_changes_its_inputs_is_compared_on_what_was_given(tmp_path, compiled):
    class Scaled(MLP):
        def forward(self, x):
            return super().forward(x.mul_(0.25))

    x = torch.randn(4, 20)
    model, _ = ready(Scaled(), x.clone(), "int4")
    before = x.clone()
    lotion_fx.export(model, tmp_path / "model.pt2", "aoti", example_inputs=(x,))
    assert torch.equal(x, before)


def test_a_compiled_model_that_computes_something_else_is_an_error(tmp_path, compiled, monkeypatch):
    x = torch.randn(4, 20)
    model, _ = ready(MLP(), x, "int4")
    monkeypatch.setattr(private_packages, "load_package", lambda path: lambda x: 1.001 * compiled["last"].module()(x))
    with pytest.raises(ValueError, match="on example_inputs the compiled model differs by 1.0e-03"):
        lotion_fx.export(model, tmp_path / "model.pt2", "aoti", example_inputs=(x,))
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("fmt", ["nvfp4", "int4/32/fp16", "fp8/tensor"])
def test_the_file_runs_alone(tmp_path, fmt):
    x = torch.randn(4, 512)
    model = nn.Sequential(nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 1024))
    model, expected = ready(model, x, fmt)
    batch = ({0: torch.export.Dim("batch")},)
    told = lotion_fx.export(model, tmp_path / "m.pt2", "aoti", example_inputs=(x,), dynamic_shapes=batch)
    assert len(told.packed) == 2
    assert distance(alone(told.path, tmp_path, x), expected) < BOUND
    with torch.no_grad():
        assert distance(alone(told.path, tmp_path, x.repeat(3, 1)), model(x.repeat(3, 1))) < BOUND
    held = sum(w.nbytes for w in lotion_fx.quantized(model).values())
    assert told.nbytes < held + 2.5e6 < sum(p.numel() for p in model.parameters()) * 4 / 2  # code takes 1.7 MB


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_transformers_model_runs_without_transformers(tmp_path, kind):
    model, ids = under(make(kind), "nvfp4"), rows()
    told = lotion_fx.export(model, tmp_path / "m.pt2", "aoti", example_inputs={"input_ids": ids})
    assert not told.dense
    assert distance(alone(told.path, tmp_path, input_ids=ids), logits(model, ids)) < BOUND


@pytest.mark.slow
def test_a_changed_code_is_seen(tmp_path, monkeypatch):
    from lotion_fx.deploy.layouts import aoti

    x = torch.randn(4, 20)
    model, _ = ready(MLP(), x, "int4")
    monkeypatch.setattr(aoti, "_compare", lambda found, expected: None)
    hold = aoti._hold
    monkeypatch.setattr(
        aoti, "_hold", lambda m, names, w: hold(m, names, aoti.replace(w, codes=w.codes ^ (names[0] == "up.weight")))
    )
    with pytest.raises(ValueError, match="reads another 'up.weight' than was trained"):
        lotion_fx.export(model, tmp_path / "m.pt2", "aoti", example_inputs=(x,))
