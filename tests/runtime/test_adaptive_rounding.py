"""`round_`: whole models, what it refuses, and that what it made is what is deployed, wherever it goes."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lotion_fx
from lotion_fx import adaptive_rounding, refining
from lotion_fx.adaptive_rounding import SCALES
from lotion_fx.making_up import MakingUp
from lotion_fx.numerics.adaptive import Curvature, adaptive
from lotion_fx.numerics.formats import resolve
from tests.models import MLP

Batch = tuple[Tensor, Tensor]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, stride=2)
        self.hidden = nn.Linear(6 * 9, 20)
        self.head, self.other = nn.Linear(20, 5), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.relu(self.hidden(torch.relu(self.conv(x)).flatten(1)))
        return self.head(hidden), self.other(hidden)


def loss_of(out: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
    return F.cross_entropy(out[0], y)


def batches(count: int = 2, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    templates = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(9))
    found = []
    for _ in range(count):
        y = torch.randint(5, (64,), generator=generator)
        found.append((templates[y] + 4 * torch.randn(64, 1, 8, 8, generator=generator), y))
    return found


def trained(fmt: str = "int3", steps: int = 60, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = lotion_fx.transform(Net(), fmt, method="ptq", inner="eager", **options)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for x, y in batches(steps, seed=1):
        optimizer.zero_grad()
        loss_of(model(x), y).backward()
        optimizer.step()
    return model


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("method", ["descent", "two_sided", "gptq"])
def test_the_loss_suffers_less(method: Any) -> None:
    model = trained("int2")
    unseen = batches(20, seed=3)
    done = lotion_fx.round_(model, batches(4), loss_of, method=method)
    assert done.rounded < done.nearest and method in {w.method for w in done.weights}
    losses = [sum(float(loss_of(m.eval()(x), y).detach()) for x, y in unseen) for m in (model, trained("int2"))]
    assert losses[0] < losses[1]


def test_rounds_lower_the_batches_loss_and_keep_fixed_points() -> None:
    given, losses = batches(8), []
    for rounds in (0, 1, 4):
        model = trained("int2")
        goal = sum(float(loss_of(model(x), y).detach()) for x, y in given) / len(given)
        done = lotion_fx.round_(model, given, loss_of, method="descent", rounds=rounds)
        losses.append(done.rounded)
        assert any(w.method.endswith(" + rounds") for w in done.weights) == (rounds > 0)
        for name, weight in lotion_fx.quantized(model).items():
            assert torch.equal(weight.dequantize(), model.get_parameter(name)), name
    assert losses[0] > losses[1] >= losses[2] and losses[2] - goal < 0.8 * (losses[0] - goal)


def test_rounds_end_at_the_loss_of_before_clipping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Searched scales clip outliers first, which costs something already."""
    goals: list[float] = []

    def watched(*given: Any) -> Any:
        goals.append(given[-1])
        return refining.refined(*given)

    monkeypatch.setattr(adaptive_rounding, "refined", watched)
    model, given = trained("int2/tensor"), batches(4)
    before = sum(float(loss_of(model(x), y).detach()) for x, y in given) / len(given)
    lotion_fx.round_(model, given, loss_of, scales="searched", rounds=1)
    assert goals == [pytest.approx(before, rel=1e-5)]


def test_a_round_that_raises_the_loss_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refining, "CAREFUL", 1e-9)  # codes go wherever the gradient points
    done = [lotion_fx.round_(trained("int4"), batches(8), loss_of, rounds=rounds) for rounds in (0, 1)]
    assert done[0].rounded == done[1].rounded


def test_rounds_need_all_curvatures_at_a_time() -> None:
    with pytest.raises(ValueError, match=r"rounds=2: they need the curvatures of all weights .* memory=1e-06; raise"):
        lotion_fx.round_(trained(steps=2), batches(2), loss_of, rounds=2, memory=1e-6)


def test_where_it_does_not_help_it_says_so_and_rounds_to_nearest() -> None:
    """The gradients of a loss that has vanished say little of its curvature."""
    model = trained("int2")
    x, _ = batches(1)[0]
    easy = model(x)[0].argmax(1)
    near = {name: weight.dequantize() for name, weight in lotion_fx.quantized(model).items()}
    with pytest.warns(UserWarning, match=r"round_: .* is above .* of rounding to nearest, which is taken"):
        done = lotion_fx.round_(model, [(x, easy)], lambda out, y: loss_of((50 * out[0], out[1]), y))
    assert {w.method for w in done.weights} == {"nearest"} and done.rounded == pytest.approx(done.nearest, rel=1e-6)
    assert any("by 'two_sided' the batches' loss is" in w.why for w in done.weights)
    for name, values in near.items():
        torch.testing.assert_close(model.get_parameter(name), values)


def test_what_was_trained_at_rounded_weights_is_never_worse_nor_learned_by_heart() -> None:
    """Rounding has not raised the batches' loss there, so that rounds have nothing to take back."""
    torch.manual_seed(0)
    given = batches(8)

    def at_rounded_weights() -> nn.Module:
        torch.manual_seed(0)
        model = lotion_fx.transform(Net(), "int2", method="ste_scale", inner="aot_eager")
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(40):
            for x, y in given:
                optimizer.zero_grad()
                loss_of(model(x), y).backward()
                optimizer.step()
        return model.eval()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        alone, further = (
            lotion_fx.round_(at_rounded_weights(), given, loss_of, method="descent", rounds=k) for k in (0, 4)
        )
    assert alone.rounded <= alone.nearest <= alone.latent and further.rounded == alone.rounded


def with_outliers(**options: Any) -> nn.Module:
    """A matrix with one weight far from all others, on an input that is always 0."""
    model = trained("int4/tensor", **options)
    with torch.no_grad():
        model.get_parameter("conv.bias")[-1] = -1e6
        hidden = model.get_parameter("hidden.weight")
        hidden[3, -1] = 20 * hidden.std()
    return model


@pytest.mark.filterwarnings("ignore:round_")  # nearest may be luckier still, at searched scales too
@pytest.mark.parametrize("method, rounds", [("nearest", 0), ("gptq", 0), ("two_sided", 0), ("two_sided", 2)])
def test_searched_scales_are_not_those_of_outliers(method: str, rounds: int) -> None:
    given, found = batches(4), []
    for scales in ("absmax", "searched"):
        model = with_outliers()
        found.append(lotion_fx.round_(model, given, loss_of, method=method, scales=scales, rounds=rounds))
        for name, weight in lotion_fx.quantized(model).items():
            assert torch.equal(weight.dequantize(), model.get_parameter(name)), name
        assert (model.get_parameter("hidden.weight").max() > 2) == (scales == "absmax")
    assert found[1].nearest == found[0].nearest and found[1].rounded < found[0].rounded


def test_where_searched_scales_do_not_help_those_of_the_largest_are_taken() -> None:
    """By nearest the whole model is compared, and by curvature each weight is."""
    model = trained("int4/tensor")
    x, _ = batches(1)[0]
    with torch.no_grad():  # all of its output hangs on the outliers
        for parameter in model.parameters():
            parameter.mul_(0.02 if parameter.dim() > 1 else 0)
        model.get_parameter("conv.weight")[:, :, 1, 1] = torch.linspace(1, 6, 6)[:, None]
        model.get_parameter("hidden.weight")[:, :1] = torch.linspace(1, 6, 20)[:, None]
        model.get_parameter("head.weight")[:, :1] = torch.linspace(1, 6, 5)[:, None]
        target = model(x)[0]
    with pytest.warns(UserWarning, match=r"is above the .* of rounding to nearest, which is taken"):
        done = lotion_fx.round_(
            model, [(x, target)], lambda out, y: F.mse_loss(out[0], y), method="nearest", scales="searched"
        )
    assert done.rounded == done.nearest


@pytest.mark.filterwarnings("ignore:round_")
@pytest.mark.parametrize("method, rounds", [("two_sided", 0), ("two_sided", 2), ("nearest", 0)])
@pytest.mark.parametrize("make", [lambda: trained("int4/tensor"), with_outliers])
def test_of_both_scales_those_are_taken_that_lose_less(make: Callable[[], nn.Module], method: str, rounds: int) -> None:
    given, models = batches(4), {scales: make() for scales in SCALES}
    done = {
        scales: lotion_fx.round_(model, given, loss_of, method=method, scales=scales)
        for scales, model in models.items()
    }
    best = min("absmax", "searched", key=lambda scales: done[scales].rounded)
    assert done["auto"].rounded == done[best].rounded and done["auto"].scales == done[best].scales
    assert all(torch.equal(value, weights(models[best])[name]) for name, value in weights(models["auto"]).items())
    assert f"now, with {done[best].scales} scales" in str(done["auto"])
    if rounds:
        expected, model = (lotion_fx.round_(make(), given, loss_of, scales=best, rounds=rounds), make())
        assert lotion_fx.round_(model, given, loss_of, scales="auto", rounds=rounds).rounded == expected.rounded


@pytest.mark.filterwarnings("ignore:round_")
def test_what_is_left_can_be_trained_on() -> None:
    """With the weights held at their codes: these stay, bit for bit, and the rest learns to live with them."""
    given, model = batches(8), with_outliers()
    done = lotion_fx.round_(model, given, loss_of, scales="searched")
    held = lotion_fx.quantized(model)
    for name in held:
        model.get_parameter(name).requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    for x, y in 5 * given:
        optimizer.zero_grad()
        loss_of(model.train()(x), y).backward()
        optimizer.step()
    losses = [float(loss_of(model.eval()(x), y).detach()) for x, y in given]
    assert sum(losses) / len(losses) < 0.99 * done.rounded
    for name, weight in lotion_fx.quantized(model).items():
        assert torch.equal(weight.codes, held[name].codes) and torch.equal(weight.scales, held[name].scales)


def own_outputs(model: nn.Module, count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """A linear layer's batches, whose targets are what it gives: the loss is zero."""
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randn(24, 24, generator=draw)
    found = [torch.randn(64, 24, generator=draw) @ mixed for _ in range(count)]
    with lotion_fx.full_precision(model), torch.no_grad():
        return [(x, model(x)) for x in found]


def test_weights_that_are_rounded_already_are_said_to_be() -> None:
    torch.manual_seed(0)
    model = lotion_fx.transform(nn.Linear(24, 12), "int3", method="ptq", inner="eager").eval()
    given = [(torch.randn(64, 24), torch.randn(64, 12))]
    lotion_fx.round_(model, given, F.mse_loss, method="nearest")
    before = weights(model)["weight"].clone()
    again = lotion_fx.round_(model, given, F.mse_loss)
    assert again.weights[0].why == "it lies on its levels already" and torch.equal(before, model.weight)


def test_a_loss_that_has_vanished_is_seen_by_labels_that_the_model_draws() -> None:
    torch.manual_seed(0)
    model = lotion_fx.transform(nn.Linear(24, 12), "int3", method="ptq", inner="eager").eval()
    given, before = own_outputs(model, 4, seed=1), weights(model)
    with pytest.warns(UserWarning, match=r"next to nothing beside .* likelihood='gaussian'"):
        done = lotion_fx.round_(model, given, F.mse_loss)
    assert done.rounded == done.nearest and done.weights[0].why == "its gradients vanish"
    model.load_state_dict(before)
    assert lotion_fx.round_(model, given, F.mse_loss, likelihood=F.mse_loss).rounded < 0.7 * done.nearest

    a, b = torch.zeros(24, 24, dtype=torch.float64), torch.zeros(12, 12, dtype=torch.float64)
    for seed, (x, y) in enumerate(given):  # the squares' gradients at the outputs' own N(output, 1/2)
        draw = torch.Generator().manual_seed(seed)
        for _ in range(4):
            g = -2 * 0.5**0.5 * torch.empty_like(y).normal_(generator=draw).double() / y.numel()
            a += (x.double() * g.square().sum(1, keepdim=True)).T @ x.double()
            b += g.T @ g
    expected = adaptive(before["weight"], resolve("int3"), 1, (1, 12, 24), Curvature(b[None], a[None]))
    assert torch.equal(model.weight.detach(), expected.values)  # type: ignore[arg-type]


def test_a_model_under_ggn_has_told_what_its_output_parametrizes() -> None:
    torch.manual_seed(0)
    options = {"curvature": "ggn", "likelihood": "gaussian", "inner": "aot_eager"}
    model = lotion_fx.transform(nn.Linear(24, 12), "int3", **options).eval()  # type: ignore[arg-type]
    done = lotion_fx.round_(model, own_outputs(model, 2, seed=1), F.mse_loss)
    assert done.rounded < 0.7 * done.nearest


RETURNED = {
    "logits": lambda x, z, w, loss: z,
    "a tuple": lambda x, z, w, loss: (z, loss),
    "a dictionary": lambda x, z, w, loss: {"loss": loss, "out": z},
    "logits by name": lambda x, z, w, loss: {"loss": loss, "features": x * w, "logits": z},
    "behind what has no gradient": lambda x, z, w, loss: [loss, x.view(-1, 8), z.detach().exp(), [z, w]],
}


class Returning(MLP):
    """Its logits, its loss, and what else there is."""

    def __init__(self, returned: str) -> None:
        super().__init__()
        self.returned, self.scale = returned, nn.Parameter(torch.ones(20))

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        z = super().forward(x)
        return RETURNED[self.returned](x, z, self.scale, F.cross_entropy(z, labels))


@pytest.mark.parametrize("likelihood", [None, "categorical"])
def test_labels_are_drawn_from_the_output_wherever_a_model_returns_it(likelihood: str | None) -> None:
    said = set()
    for returned in RETURNED:
        torch.manual_seed(0)
        options: Any = {} if likelihood else {"curvature": "ggn"}
        model = lotion_fx.transform(Returning(returned), "int3", inner="aot_eager", **options)
        x, labels = torch.randn(16, 20), torch.arange(16) % 7
        if returned == "logits":
            given, loss_fn = ((x, labels), labels), F.cross_entropy
        else:
            given, loss_fn = (x, labels), None
        found = lotion_fx.round_(model, [given], loss_fn, method="descent", likelihood=likelihood)
        said.add(f"{found} {[weight.tolist() for weight in weights(model).values()]}")
    assert len(said) == 1


def test_a_prediction_of_one_dimension_is_one() -> None:
    torch.manual_seed(0)
    model = lotion_fx.transform(nn.Sequential(nn.Linear(24, 1), nn.Flatten(0)), "int3", method="ptq", inner="eager")
    done = lotion_fx.round_(model, own_outputs(model, 4, seed=1), F.mse_loss, likelihood="gaussian")
    assert done.rounded < done.nearest


def test_a_model_without_an_output_is_told_what_labels_are_drawn_by() -> None:
    class Mean(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).mean()

    model = lotion_fx.transform(Mean(24, 12), "int3", inner="eager")
    with pytest.raises(ValueError, match="^likelihood='bernoulli' .* draws labels .* return logits or predictions"):
        lotion_fx.round_(model, [(torch.randn(4, 24),)], likelihood="bernoulli")


def test_the_losses_are_those_of_the_models() -> None:
    model, given = trained(), batches()
    done = lotion_fx.round_(copy.deepcopy(model), given, loss_of)

    def loss() -> float:
        return sum(float(loss_of(model.eval()(x), y).detach()) for x, y in given) / len(given)

    assert done.nearest == pytest.approx(loss(), rel=1e-5)
    with lotion_fx.full_precision(model):
        assert done.latent == pytest.approx(loss(), rel=1e-5)
    lotion_fx.round_(model, given, loss_of)
    assert done.rounded == pytest.approx(loss(), rel=1e-5)


def test_each_layer_has_the_curvature_of_its_own_inputs_and_gradients() -> None:
    """A linear layer, by hooks on a plain model."""
    model, given = trained("nvfp4"), batches()
    plain = Net()
    plain.load_state_dict(model.state_dict())
    met: dict[str, Tensor] = {}
    plain.hidden.register_forward_hook(lambda m, args, out: met.update(x=args[0].detach()))
    plain.hidden.register_full_backward_hook(lambda m, grads, outs: met.update(g=outs[0]))
    a, b = torch.zeros(54, 54, dtype=torch.float64), torch.zeros(20, 20, dtype=torch.float64)
    for x, y in given:
        loss_of(plain(x), y).backward()
        g, inputs = met["g"].double(), met["x"].double()
        a += (inputs * g.square().sum(1, keepdim=True)).T @ inputs
        b += g.T @ g
    latent = model.get_parameter("hidden.weight").detach().clone()
    lotion_fx.round_(model, given, loss_of)
    expected = adaptive(latent, resolve("nvfp4"), 1, (1, 20, 54), Curvature(b[None], a[None]))
    assert expected.method == "two_sided"
    assert (model.get_parameter("hidden.weight") == expected.values).float().mean() > 0.99  # float32 may tip one


@pytest.mark.filterwarnings("ignore:round_")
@pytest.mark.parametrize("scales", ["absmax", "searched"])
def test_what_was_rounded_is_what_is_deployed(scales: str) -> None:
    model = trained("nvfp4")
    lotion_fx.round_(model, batches(), loss_of, scales=scales)
    made = weights(model)
    x = batches(1)[0][0]
    with lotion_fx.full_precision(model):
        latent = model.eval()(x)
    assert torch.equal(model(x)[0], latent[0])
    for name, weight in lotion_fx.quantized(model).items():
        assert torch.equal(weight.dequantize(), made[name])
    loaded = lotion_fx.transform(Net(), "nvfp4", inner="eager")
    loaded.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), loaded, lotion_fx.quantize(copy.deepcopy(model))):
        assert torch.equal(other.eval()(x)[0], latent[0])


@pytest.mark.filterwarnings("ignore:round_")
@pytest.mark.parametrize("fmt, scales", [("nvfp4/pow2", "absmax"), ("int4/bf16", "searched")])
def test_an_export_holds_it(fmt: str, scales: str, tmp_path: Path) -> None:
    model = trained(fmt)
    lotion_fx.round_(model, batches(), loss_of, scales=scales)
    lotion_fx.export(model, tmp_path / "out")
    held = lotion_fx.load(tmp_path / "out", model=Net(), packed=False)
    assert all(torch.equal(value, weights(model)[name]) for name, value in held.state_dict().items())


@pytest.mark.parametrize(("scales", "in_order"), [("absmax", True), ("searched", False), ("auto", False)])
def test_it_can_be_resumed(scales: str, in_order: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, whole, given = trained(), trained(), batches()
    lotion_fx.round_(whole, given, loss_of, scales=scales, in_order=in_order)
    before, calls = weights(model), []

    def breaks(w: Tensor, *args: Any) -> Any:
        calls.append(w)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return adaptive(w, *args)

    monkeypatch.setattr(adaptive_rounding, "adaptive", breaks)
    with pytest.raises(KeyboardInterrupt):
        lotion_fx.round_(model, given, loss_of, scales=scales, in_order=in_order, folder=tmp_path / "kept")
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    lotion_fx.round_(model, given, loss_of, scales=scales, in_order=in_order, folder=tmp_path / "kept")
    assert len(calls) == 3 * len(SCALES[scales]) + 1  # three weights, and the one again that was interrupted
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(model).items())
    assert not (tmp_path / "kept").exists()


def test_order_goes_with_descent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are the recursions as they are known."""
    made: list[Any] = []
    monkeypatch.setattr(adaptive_rounding, "MakingUp", lambda *given: made.append(given) or MakingUp(*given))
    for method, in_order, expected in [
        ("two_sided", None, 0),
        ("gptq", None, 0),
        ("descent", None, 1),
        ("gptq", True, 1),
    ]:
        made.clear()
        lotion_fx.round_(trained(), batches(), loss_of, method=method, in_order=in_order)
        assert len(made) == expected, method


def test_where_order_does_not_help_weights_are_rounded_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on few rows, where shifts are of what is particular to them; here of nothing at all."""

    class Misled(MakingUp):
        def shifted(self, name: str, weight: Any, latent: Tensor) -> Any:
            return latent.roll(1, 0), super().shifted(name, weight, latent)[1]

    model, apart, given = trained(), trained(), batches()
    done = lotion_fx.round_(apart, given, loss_of, scales="searched", in_order=False)
    assert {w.method for w in done.weights} != {"nearest"}
    monkeypatch.setattr(adaptive_rounding, "MakingUp", Misled)
    assert lotion_fx.round_(model, given, loss_of, scales="searched", in_order=True) == done
    assert all(torch.equal(value, weights(apart)[name]) for name, value in weights(model).items())


@pytest.mark.parametrize("steps, seed", [(60, 5), (20, 0)])
def test_other_weights_or_batches_are_not_resumed(
    steps: int, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adaptive_rounding, "_loss", lambda *args: 1 / 0)  # after all weights are kept
    with pytest.raises(ZeroDivisionError):
        lotion_fx.round_(trained(), batches(), loss_of, folder=tmp_path)
    assert any(tmp_path.iterdir())
    monkeypatch.undo()
    model, fresh = trained(steps=steps), trained(steps=steps)
    lotion_fx.round_(model, batches(seed=seed), loss_of, folder=tmp_path)
    lotion_fx.round_(fresh, batches(seed=seed), loss_of)
    assert all(torch.equal(value, weights(fresh)[name]) for name, value in weights(model).items())


def _other_layer(model: nn.Module) -> None:
    with torch.no_grad():
        model.get_parameter("head.bias").mul_(3)


@pytest.mark.parametrize(
    "change, loss",
    [(lambda model: None, lambda out, y: F.cross_entropy(out[0], y, weight=torch.tensor([9.0, 1, 1, 1, 1]))),
     (_other_layer, loss_of)],
    ids=["other loss", "other layer"],
)  # fmt: skip
def test_another_loss_or_layer_is_not_resumed(
    change: Callable[[nn.Module], None], loss: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Curvature is of all that the loss is made of."""
    monkeypatch.setattr(adaptive_rounding, "_loss", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lotion_fx.round_(trained(), batches(), loss_of, folder=tmp_path)
    monkeypatch.undo()
    model, fresh = trained(), trained()
    for each, options in ((model, {"folder": tmp_path}), (fresh, {})):
        change(each)
        lotion_fx.round_(each, batches(), loss, **options)
    assert all(torch.equal(value, weights(fresh)[name]) for name, value in weights(model).items())


def test_a_damaged_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained()
    monkeypatch.setattr(adaptive_rounding, "_loss", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lotion_fx.round_(model, batches(), loss_of, folder=tmp_path)
    damaged = sorted(tmp_path.iterdir())[0]
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(ValueError, match=rf"folder: .*{damaged.name} cannot be read.*delete it"):
        lotion_fx.round_(model, batches(), loss_of, folder=tmp_path)


def test_memory_only_makes_turns() -> None:
    model, other = trained(), trained()
    lotion_fx.round_(model, batches(), loss_of)
    lotion_fx.round_(other, batches(), loss_of, memory=1e-7)
    assert all(torch.equal(value, weights(other)[name]) for name, value in weights(model).items())


def test_the_table_accounts_for_every_weight() -> None:
    model = trained()
    done = lotion_fx.round_(model, batches(), loss_of)
    (left_out,) = [w for w in done.weights if w.method == "nearest"]
    assert (left_out.name, left_out.why) == ("other.weight", "the loss does not depend on it")
    assert {w.name for w in done.weights} == {n for n, p in model.named_parameters() if p.dim() > 1}
    assert "hidden.weight" in str(done) and "two_sided" in str(done) and f"{done.rounded:.6g} now" in str(done)


class Squared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.weight)


def test_a_weight_that_is_not_linear_is_rounded_to_nearest() -> None:
    model = lotion_fx.transform(Squared(), "int4", only={"weight": "int4"}, inner="eager")
    near = lotion_fx.rounding.rtn(model.weight.detach(), resolve("int4"), -1)  # type: ignore[arg-type]
    x = torch.randn(30, 8)
    done = lotion_fx.round_(model, [(x, torch.randint(5, (30,)))], F.cross_entropy)
    assert torch.equal(model.weight, near) and done.weights[0].method == "nearest"  # type: ignore[arg-type]
    assert "nonlinearly" in done.weights[0].why


def test_no_random_rounding_is_sampled_to_compare_with_the_noise_that_it_leaves() -> None:
    model, (batch,) = trained(steps=2, noise="adaptive"), batches(1)
    assert float(lotion_fx.expected_loss(model, batch, loss_of).total.detach()) > 0
    for what, call in (
        ("samples=3", lambda: lotion_fx.expected_loss(model, batch, loss_of, samples=3)),
        ("calibrate", lambda: lotion_fx.calibrate(model, [batch], loss_of)),
    ):
        with pytest.raises(ValueError, match=f"{what}: .*noise='adaptive'.*no random rounding"):
            call()


def test_bad_arguments() -> None:
    model, given = trained(steps=2), batches(1)
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, "method='best': expected one of descent, two_sided, gptq, nearest", {"method": "best"}),
        (ValueError, "scales='mse': expected one of absmax, searched, auto", {"scales": "mse"}),
        (ValueError, r"scales=\['absmax'\]: expected one of absmax, searched, auto", {"scales": ["absmax"]}),
        (OSError, "folder=.*no folder can be made there", {"folder": __file__}),
        (ValueError, "likelihood='normal': expected one of categorical, bernoulli, gaussian", {"likelihood": "normal"}),
        (ValueError, "in_order='yes': expected True, False, or None", {"in_order": "yes"}),
        (ValueError, "memory=0: expected a number of GiB above 0", {"memory": 0}),
        (ValueError, "rounds=-1: expected the number of rounds, 0 or more", {"rounds": -1}),
        (ValueError, "batches: expected at least one batch", {"batches": []}),
        (TypeError, "of a single one, \\[batch\\]", {"batches": given[0][0]}),
        (ValueError, "batch: expected \\(inputs, targets\\)", {"batches": [given[0][0]]}),
    ]
    for kind, words, changed in cases:
        with pytest.raises(kind, match=words):
            lotion_fx.round_(**{"model": model, "batches": given, "loss_fn": loss_of, **changed})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not under lotion_fx"):
        lotion_fx.round_(Net(), given, loss_of)
    with torch.no_grad():
        model.get_parameter("head.weight")[0, 0] = torch.nan
    with pytest.raises(ValueError, match="'head.weight' has values that are no finite numbers"):
        lotion_fx.round_(model, given, loss_of)


def test_a_folder_that_is_no_path_is_refused():
    with pytest.raises(TypeError, match="folder=3: expected the path of a folder, or None"):
        lotion_fx.round_(trained(), batches(), loss_of, folder=3)
