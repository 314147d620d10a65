"""Every private name of PyTorch's is in one module, with its reason, and is still what that module takes it for."""

import ast
import importlib
from pathlib import Path

import pytest
import torch
from torch import fx, nn

from lotion_fx import private, private_backward, private_ranks
from lotion_fx.holding import step_may_be_skipped
from lotion_fx.private_names import WHY
from tests.models import MLP

ROOT = Path(__file__).parents[2]
OWNERS = [
    ROOT / "lotion_fx" / f"private{name}.py"
    for name in ("", "_backward", "_checkpoints", "_packages", "_ranks", "_threads", "_tracing")
]
FILES = [path for folder in ("lotion_fx", "passes", "kernels", "examples") for path in (ROOT / folder).rglob("*.py")]
# Underscored, and not PyTorch's: namedtuple's method, functools' class, Triton's autotuner that Inductor extends.
OTHERS = {"_replace", "_lru_cache_wrapper", "_precompile_config"}
INSTANCES = {  # what holds the attributes that its class does not
    "torch._ops.OpOverload": lambda: torch.ops.aten.mm.default,
    "torch.nn.Module": nn.Module,
    "torch.nn.RNNBase": lambda: nn.LSTM(1, 1),
    "torch.amp.GradScaler": lambda: torch.amp.GradScaler("cpu"),
}


def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def is_private(name):
    parts = name.split(".")
    hidden = any(part.startswith("_") and not part.startswith("__") for part in parts)
    return parts[0] == "functorch" or (parts[0] == "torch" and hidden)


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def read(tree):
    """Dotted names, such as ``torch._C.x``: the whole chain of attributes."""
    inner = {node.value for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node not in inner:
            yield ast.unparse(node)


def private_names(path):
    tree = parsed(path)
    return {name for name in (*imported(tree), *read(tree)) if is_private(name)}


def underscored(path, own=("self", "cls", "super()")):
    """The underscored attributes that a file reads of other objects, ATen's operators apart."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            owner = ast.unparse(node.value).split(".")
            if owner[0] not in own and owner[-1] not in ("aten", "prims"):
                yield node.attr


def defined(path):
    for node in ast.walk(parsed(path)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def test_no_other_module_imports_or_names_a_private_interface():
    found = {
        str(path.relative_to(ROOT)): names for path in FILES if path not in OWNERS and (names := private_names(path))
    }
    assert not found, f"take these from lotion_fx/private.py, with a reason in its WHY: {found}"


def test_no_other_module_reads_a_private_attribute():
    ours = {name for path in FILES if path not in OWNERS for name in defined(path)} | OTHERS
    taken = {name.rpartition(".")[2] for name in WHY} - {"_init_group"}
    found = {
        str(path.relative_to(ROOT)): names
        for path in FILES
        if path not in OWNERS and (names := {name for name in underscored(path) if name in taken or name not in ours})
    }
    assert not found, f"a function in lotion_fx/private.py should do this: {found}"


def test_every_name_has_a_reason_and_every_reason_a_name():
    """Attributes of objects count as used where the file reads them of anything."""
    names = {name for owner in OWNERS for name in private_names(owner)}
    attributes = {name for owner in OWNERS for name in underscored(owner, own=())}
    held = {name for name in WHY if name in names or name.rpartition(".")[2] in attributes}
    held.add("torch.optim.AdamW._init_group")  # an override in `optim`
    assert set(WHY) == held
    reasoned = {name for name in names for known in WHY if f"{name}.".startswith(f"{known}.")}
    assert names == reasoned
    assert attributes - {"_lotion_fx"} <= {part for name in WHY for part in name.split(".")}
    assert all(WHY.values())


def test_the_module_knows_torch_alone():
    roots = {name.split(".")[0] for owner in OWNERS for name in imported(parsed(owner))}
    assert not roots & {"lotion_fx", "triton", "numpy"} and "torch" in roots


def found_in_torch(name):
    owner, _, last = name.rpartition(".")
    if owner in INSTANCES:
        return getattr(INSTANCES[owner](), last)
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise ImportError(name)


@pytest.mark.parametrize("name", sorted(set(WHY) - {"torch.fx.Node._dynamo_source"}))
def test_a_name_is_there(name):
    try:
        found_in_torch(name)
    except (ImportError, AttributeError):
        pytest.fail(f"torch {torch.__version__} has no {name} any more; we need it because: {WHY[name]}")


def test_a_name_that_is_gone_is_found_out():
    with pytest.raises((ImportError, AttributeError)):
        found_in_torch("torch._C._current_graph_task_id_gone")
    with pytest.raises(AttributeError):
        found_in_torch("torch.nn.Module._call_impl_gone")


def test_options_of_inductor_are_there():
    assert private.EXACT_DIVISION in private.list_options()
    assert "max-autotune" in private.list_mode_options() and private.list_mode_options("max-autotune")["max_autotune"]


def test_dynamo_still_passes_live_parameters_with_their_source():
    seen = {}

    def look(gm, inputs):
        for node, value in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True):
            seen[private.source_of(node).name] = value
        scope = private.frame_names()
        seen["again"] = {name: eval(name, {"L": scope[0], "G": scope[1]}) for name in seen}
        return gm.forward

    model = MLP()
    model.compile(backend=look)
    model(torch.randn(3, 20))
    again = seen.pop("again")
    parameters = {name: value for name, value in seen.items() if isinstance(value, nn.Parameter)}
    assert len(parameters) == 4 and all(again[name] is value for name, value in parameters.items())
    assert any(value is model.up.weight for value in seen.values())
    assert private.frame_names() is None and private.current_context() is None


def test_a_source_gives_the_tensor_behind_a_fake_one():
    found = set()

    def collect(gm, inputs):
        nodes = gm.graph.find_nodes(op="placeholder")
        with private.faked(inputs) as fakes:
            found.update(id(private.live_tensor(node, x)) for node, x in zip(nodes, fakes, strict=True))
        return gm.forward

    model = MLP()
    model.compile(backend=collect)
    model(torch.randn(3, 20))
    assert {id(p) for p in model.parameters()} <= found


def test_an_identity_guard_keeps_a_second_module_from_the_first_one_s_code():
    def compiled_for(guard):
        graphs = []

        def look(gm, inputs):
            graphs.append(gm)
            for node, x in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True):
                if guard and isinstance(x, nn.Parameter):
                    private.guard_identity(private.source_of(node))
            return gm.forward

        def run(module, x):
            return module(x)

        call = torch.compile(run, backend=look, dynamic=False)
        for _ in range(2):
            call(nn.Linear(4, 4), torch.ones(2, 4))
        return len(graphs)

    assert (compiled_for(False), compiled_for(True)) == (1, 2)


def test_a_fake_knows_what_it_was_made_of():
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    with private.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in (first, second)]
        assert [private.real_of(fake) is x for fake, x in zip(fakes, (first, second), strict=True)] == [True, True]
        assert private.real_of(torch.ones(2)) is None
    assert private.real_of(first) is None


def test_inputs_without_a_source_say_so():
    gm = fx.symbolic_trace(lambda x, y: x + y)
    first, second = gm.graph.find_nodes(op="placeholder")
    first._dynamo_source = "L['x']"
    private.complete_sources(gm)
    assert (first._dynamo_source, second._dynamo_source) == ("L['x']", None)
    private.copy_source(first, second)
    assert private.source_of(second) == "L['x']"


def test_callbacks_run_after_those_that_were_queued_first():
    order, numbers = [], [private_backward.current_backward()]
    x = torch.ones(1, requires_grad=True)

    def hook(_):
        numbers.append(private_backward.current_backward())
        private_backward.after_backward(lambda: order.append("ours"))
        torch.autograd.Variable._execution_engine.queue_callback(lambda: order.append("theirs"))

    x.register_post_accumulate_grad_hook(hook)
    for _ in range(2):
        x.sum().backward()
    assert order == ["theirs", "ours"] * 2
    outside, first, second = numbers
    assert outside == -1 and 0 <= first < second


def test_hooks_are_called_under_one_key_and_seen():
    calls, module = [], MLP()
    assert not private.needs_frame(module) and private.needs_frame(nn.Sequential(module))
    private.hook_forward(module, lambda m, args: calls.append("before"), lambda m, args, out: calls.append("after"))
    assert private.needs_frame(module)
    with pytest.raises(RuntimeError):
        module(torch.ones(2, 21))
    assert calls == ["before", "after"]
    module.register_forward_hook(lambda *args: None)
    assert private.needs_frame(module)


def test_a_call_is_replaced_and_left_out():
    module = nn.Linear(2, 2)
    assert private.call_of(module) == private.plain_call(module)
    private.replace_call(module, lambda x: "compiled")
    assert module(torch.ones(2)) == "compiled" == private.call_of(module)(None)
    with private.uncompiled(module):
        assert module(torch.ones(2)).shape == (2,)
    assert module(torch.ones(2)) == "compiled"


def test_attributes_of_a_module_and_a_tensor():
    module = nn.BatchNorm1d(3, affine=False)
    assert private.parameters_of(module) == {"weight": None, "bias": None}
    assert private.buffers_of(module)["running_mean"] is module.running_mean
    x = torch.zeros(2)
    before = private.version_of(x)
    x.add_(1)
    assert private.version_of(x) == before + 1


def test_an_operator_tells_its_arguments():
    found = private.arguments_of(torch.ops.aten.index_put_.default)
    assert [(a.name, a.default_value, bool(a.alias_info and a.alias_info.is_write)) for a in found] == [
        ("self", None, True), ("indices", None, False), ("values", None, False), ("accumulate", False, False),
    ]  # fmt: skip
    assert private.results_of(torch.ops.aten.max.dim) == 2


def test_the_scale_that_a_grad_scaler_divided_out_is_told_once():
    for _ in range(2):  # the second does nothing; other tests of this process find what `install` puts there
        private.watch_grad_scaler(step_may_be_skipped)
    p = nn.Parameter(torch.ones(2))
    optimizer, scaler = torch.optim.SGD([p], lr=0.1), torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(p.sum()).backward()
    assert private.take_grad_scale(optimizer) is None
    scaler.unscale_(optimizer)
    assert private.take_grad_scale(optimizer).item() == 8.0 and private.take_grad_scale(optimizer) is None
    assert p.grad.tolist() == [1.0, 1.0]


def test_a_trace_keeps_composite_ops_whole_and_its_inputs_flat():
    gm = private.trace(
        lambda w, x: [nn.functional.layer_norm(nn.functional.linear(*x, w), (3,))],
        (torch.ones(3, 4), [torch.ones(2, 4)]),
    )
    targets = [node.target for node in gm.graph.nodes if node.op == "call_function"]
    assert targets == [torch.ops.aten.linear.default, torch.ops.aten.layer_norm.default]
    assert len(gm.graph.find_nodes(op="placeholder")) == 2 and gm(torch.ones(3, 4), torch.ones(2, 4))[0].shape == (2, 3)


def test_outside_of_processes_there_is_no_group():
    assert private_ranks.active_data_parallel_group() is None
