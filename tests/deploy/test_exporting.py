"""`export` and `load` with layout "lotion"; what is damaged is refused."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import lotion_fx
from lotion_fx.deploy import exporting, manifest
from lotion_fx.deploy.layouts import lotion
from lotion_fx.deploy.writing import MARK
from tests.models import LM, MLP, VOCAB

FILES = (MARK, lotion.FILE)


def trained(fmt="nvfp4", model=None, steps=2):
    torch.manual_seed(0)
    model = lotion_fx.transform(LM() if model is None else model, fmt, inner="aot_eager")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(steps):
        model(torch.randint(VOCAB, (4, 6))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fmt", ["nvfp4", "int4", "mxfp4/even", "int3/tensor", "nf4", "fp8", "mxfp6"])
def test_what_is_loaded_computes_what_eval_computed(tmp_path, fmt, dtype):
    model, x = trained(fmt, LM().to(dtype)), torch.randint(VOCAB, (4, 6))
    told = lotion_fx.export(model, tmp_path / "model")
    loaded = lotion_fx.load(tmp_path / "model", LM(), packed=False)
    assert type(loaded) is LM and not loaded.training
    with torch.no_grad():
        expected = torch.compile(model, backend="eager")(x)
        assert torch.equal(loaded(x), expected)
        packed = lotion_fx.load(tmp_path / "model", LM())
        torch.testing.assert_close(packed(x), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    assert sum(b.nbytes for b in packed.buffers()) < sum(p.nbytes for p in LM().parameters())
    assert sorted(os.listdir(tmp_path / "model")) == sorted(FILES)
    assert told.packed == {name: w.format.name for name, w in lotion_fx.quantized(model).items()} and not told.dense
    assert f"layout lotion, {told.nbytes / 2**20:.2f} MiB" in str(told)


def test_levels_of_your_own_are_read_without_being_registered(tmp_path, monkeypatch):
    lotion_fx.register_format("five_levels", lotion_fx.codebook([-2.0, -0.5, 0.0, 0.75, 3.0], block=8))
    model = trained("five_levels")
    expected = {name: w.dequantize() for name, w in lotion_fx.quantized(model).items()}
    lotion_fx.export(model, tmp_path / "model")
    monkeypatch.setattr(lotion_fx.numerics.formats, "_REGISTERED", {})
    weights, _, _ = lotion.read(tmp_path / "model")
    assert all(torch.equal(weights[name].dequantize(), w) for name, w in expected.items())


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert lotion_fx.export(trained(), "~/model").path == tmp_path / "model"
    lotion_fx.load("~/model", LM())
    assert os.listdir(tmp_path) == ["model"]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.b.weight, self.b.bias = self.a.weight, self.a.bias

    def forward(self, x):
        return self.norm(self.b(self.a(x)))


def test_what_was_one_tensor_is_one_again(tmp_path):
    model = lotion_fx.transform(Tied(), "int4", inner="aot_eager")
    model(torch.randn(4, 8)).sum().backward()
    lotion_fx.export(model, tmp_path / "model")
    loaded = lotion_fx.load(tmp_path / "model", Tied(), packed=False)
    assert loaded.a.weight is loaded.b.weight and loaded.a.bias is loaded.b.bias
    assert loaded.norm.num_batches_tracked == 1


def test_a_client_that_reads_other_weights_is_an_error(tmp_path, monkeypatch):
    model = trained()
    lotion_fx.export(model, tmp_path / "model")
    before = (tmp_path / "model" / MARK).read_bytes()
    read = lotion.Lotion.read

    def off_by_one_bit(self, place, content):
        for i, (name, w) in enumerate(read(self, place, content)):
            yield name, torch.where(torch.arange(w.numel()).view(w.shape) == 3, w.nextafter(w + 1), w) if i else w

    monkeypatch.setattr(lotion.Lotion, "read", off_by_one_bit)
    second = list(lotion_fx.quantized(model))[1]
    with pytest.raises(
        ValueError, match=rf"its client reads another '{second}' than was trained .*nothing was written"
    ):
        lotion_fx.export(model, tmp_path / "model")
    monkeypatch.setattr(lotion.Lotion, "read", lambda *_: iter(()))
    with pytest.raises(ValueError, match="its client does not find"):
        lotion_fx.export(model, tmp_path / "model")
    assert (tmp_path / "model" / MARK).read_bytes() == before and os.listdir(tmp_path) == ["model"]


def test_bad_arguments_are_refused(tmp_path):
    model = trained()
    with pytest.raises(ValueError, match="layout='gptq': expected one of lotion"):
        lotion_fx.export(model, tmp_path / "model", "gptq")
    with pytest.raises(TypeError, match="bits=4: no option of layout='lotion'; it has no options"):
        lotion_fx.export(model, tmp_path / "model", bits=4)
    with pytest.raises(TypeError, match="path=None: expected the name of a folder"):
        lotion_fx.export(model, None)
    with pytest.raises(ValueError, match="not under lotion_fx"):
        lotion_fx.export(LM(), tmp_path / "model")
    lotion_fx.export(model, tmp_path / "model")
    with pytest.raises(ValueError, match="no config.json to make a model from; pass model="):
        lotion_fx.load(tmp_path / "model")
    other = MLP()
    before = {name: p.detach().clone() for name, p in other.named_parameters()}
    with pytest.raises(ValueError, match=r"does not fit this MLP: 'head.weight' is not in the model, and \d+ more"):
        lotion_fx.load(tmp_path / "model", other)
    assert all(torch.equal(p, before[name]) for name, p in other.named_parameters())
    with pytest.raises(ValueError, match="it is under lotion_fx; give a plain module"):
        lotion_fx.load(tmp_path / "model", model)
    for packed in (lotion_fx.quantize(model), lotion_fx.load(tmp_path / "model", LM())):
        with pytest.raises(ValueError, match="packed already; give the transformed model, or the folder"):
            lotion_fx.export(packed, tmp_path / "again")
        with pytest.raises(ValueError, match="packed already"):
            lotion_fx.quantize(packed)
    with pytest.raises(TypeError, match="model=3: expected a transformed nn.Module"):
        lotion_fx.verify(tmp_path / "model", 3)
    with pytest.raises(TypeError, match="expected a plain nn.Module, not str"):
        lotion_fx.load(tmp_path / "model", "LM")
    with pytest.raises(ValueError, match="no export of lotion_fx is here"):
        lotion_fx.load(tmp_path, LM())


# -------------------------------------------------------------------------------------------------------------- damage


def cut(file: Path, draw):
    os.truncate(file, draw.randrange(file.stat().st_size))


def flip(file: Path, draw):
    contents = bytearray(file.read_bytes())
    for _ in range(draw.choice([1, 1, 3])):
        contents[draw.randrange(len(contents))] ^= 1 << draw.randrange(8)
    file.write_bytes(contents)


def lengthen(file: Path, draw):
    file.write_bytes(file.read_bytes() + draw.randbytes(draw.randrange(1, 99)))


def huge_header(file: Path, draw):
    contents = bytearray(file.read_bytes())
    contents[:8] = draw.choice([2**62, 2**31, 10**9, 2**64 - 1]).to_bytes(8, "little")
    file.write_bytes(contents)


def rename_tensor(file: Path, draw):
    """A name, a shape or a dtype of the header is another; where it fits, lengths are kept."""
    contents = file.read_bytes()
    length = int.from_bytes(contents[:8], "little")
    header = json.loads(contents[8 : 8 + length])
    name = draw.choice([n for n in header if n != "__metadata__"])
    entry = header.pop(name)
    change = draw.randrange(4)
    if change == 0:
        name = draw.choice(["../../x", "/etc/passwd", "", name + "\x00", "head.weight"])
    elif change == 1:
        entry["shape"] = draw.choice([[0, 2**62], [2**62, 2**62], [-1], [], [1] * 100])
    elif change == 2:
        entry["dtype"] = draw.choice(["F32", "U8", "F64", "I8", "X", 7])
    else:
        entry["data_offsets"] = draw.choice([[0, 2**62], [5, 3], [0, 0], "all"])
    header[name] = entry
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + contents[8 + length :])


def resealed(file: Path, draw):
    """A manifest that somebody changed, checksum and all."""
    told = json.loads(file.read_text())
    del told["sha256"]
    entry = told["weights"][draw.choice(list(told["weights"]))]
    draw.choice(
        [
            lambda: entry.update(shape=draw.choice([[0, 2**62], [2**62, 2**62], [-1, 4], [], "x", [1.5], None])),
            lambda: entry.update(axis=draw.choice([-1, 7, None, "0", 2**70])),
            lambda: entry.update(dtype=draw.choice(["int8", "load", "__doc__", "", None, "float64"])),
            lambda: entry.update(format=draw.choice([None, 3, {"kind": "Path"}, {"kind": "Format"}, []])),
            lambda: entry["format"].update(block=draw.choice([0, -3, 2**62, "all", None])),
            lambda: entry["format"].update(grid=draw.choice([{"kind": "Integer", "qmax": 2**40}, None, 5])),
            lambda: entry["format"].update(extra=1),
            lambda: told.update(tied={"head.weight": "../../nowhere"}),
            lambda: told.update(tied=draw.choice([None, [], {"a.b.c": "head.weight"}, {1: 2}])),
            lambda: told.update(weights=draw.choice([None, {}, [], {"x": None}])),
            lambda: told.update(files=draw.choice([None, {}, {"../x": {}}, {lotion.FILE: None}, {lotion.FILE: {}}])),
            lambda: told.update(layout=draw.choice([None, "gguf", 5])),
            lambda: told.update(version=draw.choice([None, 2, "1"])),
            lambda: told.pop(draw.choice(list(told))),
        ]
    )()
    file.write_text(json.dumps({**told, "sha256": manifest._digest_of(told)}))


def lose(file: Path, draw):
    file.unlink()


def link_outside(file: Path, draw):
    file.unlink()
    file.symlink_to(draw.choice(["/etc/passwd", "/dev/null", "..", "nowhere", file.name]))


def be_a_folder(file: Path, draw):
    file.unlink()
    file.mkdir()


def be_nonsense(file: Path, draw):
    file.write_text(
        draw.choice(
            ["", "{}", "[]", "null", "[" * 100_000, '{"sha256": 1}', "\ud800".encode("utf-16", "surrogatepass").hex()]
        )
    )


ANY = [cut, flip, flip, flip, lengthen, lose, link_outside, be_a_folder, be_nonsense]


@pytest.mark.parametrize("count", [150, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_damaged_export_is_refused_or_loads_what_was_written(tmp_path, count):
    model = trained()
    expected = {name: w.dequantize() for name, w in lotion_fx.quantized(model).items()}
    lotion_fx.export(model, tmp_path / "intact")
    whole = {name: (tmp_path / "intact" / name).read_bytes() for name in FILES}
    others = lotion.read(tmp_path / "intact")[1]
    refused = 0
    for seed in range(count):
        draw = random.Random(seed)
        folder = tmp_path / "damaged"
        shutil.copytree(tmp_path / "intact", folder)
        file = folder / draw.choice(FILES)
        damage = draw.choice([*ANY, *([resealed] * 6 if file.name == MARK else [huge_header, *[rename_tensor] * 3])])
        damage(file, draw)
        try:
            weights, rest, _ = lotion.read(folder)
            lotion_fx.load(folder, LM(), packed=False)
        except ValueError as error:
            refused += 1
            assert "path=" in str(error) or "model: the export does not fit" in str(error), (seed, damage, error)
        else:
            assert all(torch.equal(weights[name].dequantize(), w) for name, w in expected.items()), (seed, damage)
            assert all(torch.equal(rest[name], w) for name, w in others.items()), (seed, damage)
        shutil.rmtree(folder)
    assert refused > 0.9 * count
    assert {name: (tmp_path / "intact" / name).read_bytes() for name in FILES} == whole
    assert os.listdir(tmp_path) == ["intact"]


def test_every_flipped_bit_of_a_file_is_seen(tmp_path):
    """Also where safetensors, which has no checksum, sees nothing."""
    lotion_fx.export(trained("int4", MLP_of_tokens()), tmp_path / "model")
    file = tmp_path / "model" / lotion.FILE
    contents = file.read_bytes()
    for place in range(len(contents) - 40, len(contents)):
        file.write_bytes(contents[:place] + bytes([contents[place] ^ 1]) + contents[place + 1 :])
        with pytest.raises(ValueError, match="checksum is not the one that was written"):
            lotion.read(tmp_path / "model")


def MLP_of_tokens():
    return nn.Sequential(nn.Embedding(VOCAB, 20), MLP())


def test_equal_is_bit_for_bit_but_for_the_sign_of_zero():
    a = torch.tensor([1.0, 0.0])
    assert exporting.same(a.bfloat16(), torch.tensor([1.0, -0.0]))
    assert not exporting.same(a, torch.tensor([1.0 + 2**-23, 0.0])) and not exporting.same(a, a[:1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_an_export_that_is_killed_leaves_the_old_one_or_the_new_one(tmp_path, kills):
    models = [trained("int4"), trained("nvfp4")]
    expected = [{name: w.dequantize() for name, w in lotion_fx.quantized(model).items()} for model in models]
    lotion_fx.export(models[0], tmp_path / "model")
    draw, seen = random.Random(0), set()
    for _ in range(kills):
        child = os.fork()
        if child == 0:
            try:
                for turn in range(1000):
                    lotion_fx.export(models[turn % 2], tmp_path / "model")
            finally:
                os._exit(0)
        time.sleep(draw.uniform(0, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        weights, _, _ = lotion.read(tmp_path / "model")
        (which,) = [i for i in (0, 1) if all(torch.equal(weights[n].dequantize(), w) for n, w in expected[i].items())]
        seen.add(which)
    assert seen == {0, 1} or kills < 50
    lotion_fx.export(models[0], tmp_path / "model")
    assert os.listdir(tmp_path) == ["model"]


class Configured(MLP):
    """As diffusers' models are: a configuration that is a dictionary, and a way of saving of its own."""

    def __init__(self):
        super().__init__()
        self.config = dict(width=8)

    def save_pretrained(self, folder):
        raise AssertionError


def test_a_configuration_of_its_own_is_none_of_transformers(tmp_path):
    model = lotion_fx.transform(Configured(), "int4", inner="aot_eager").eval()
    lotion_fx.export(model, tmp_path / "out")
    loaded = lotion_fx.load(tmp_path / "out", Configured(), packed=False)
    for name, weight in lotion_fx.quantized(model).items():
        assert torch.equal(loaded.get_parameter(name), weight.dequantize())
