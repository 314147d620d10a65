"""Products with packed weights on a CPU: the weights bit for bit, sums to float32's error, on every instruction set."""

import multiprocessing
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from lotion_fx.deploy.weights import QuantizedWeight
from lotion_fx.kernels import cpu_build, cpu_linear
from lotion_fx.kernels.cpu_linear import DTYPES, cpu_values
from lotion_fx.numerics.formats import codebook, register_format, resolve
from lotion_fx.numerics.scales import SMALLEST_SCALE

register_format("cpu_linear_ternary", codebook([-1.0, 0.0, 1.0], block=6))
FORMATS = (
    *("nvfp4", "mxfp4", "mxfp4/floor", "fp4", "nf4", "int2", "int3", "int4"),
    *("int4/16", "int4/64", "int4/128", "int4/channel", "int4/tensor", "nf4/2", "nf4/24", "cpu_linear_ternary"),
)
WIDEST = ("scalar", "avx2", "avx512")
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
needs_compiler = pytest.mark.skipif(cpu_linear.instructions() == "aten", reason="no C++ compiler")


@pytest.fixture(params=range(len(WIDEST)), ids=WIDEST)
def widest(request, monkeypatch):
    if cpu_linear.instructions(request.param) != WIDEST[request.param]:
        pytest.skip(f"this processor has no {WIDEST[request.param]}")
    monkeypatch.setattr(cpu_linear, "WIDEST", request.param)


def hard(rows, length, dtype, seed=0):
    """Random weights with ties, zeros of both signs, an all-zero block, subnormals, blocks that saturate."""
    w = torch.randn(rows, length, generator=torch.Generator().manual_seed(seed)) * 0.05
    w[1] = (torch.arange(length) % 13 - 6) * 0.25  # ties of E2M1 and of integers
    w[2, : length // 2 + 1] = 0.0
    w[3] = -0.0
    w[4] *= 1e-39 if dtype != torch.float16 else 1e-6
    w[5, ::5] *= 100
    return w.to(dtype)


numbers = cpu_linear._numbers


def parts(q):
    return q.codes, q.scales, q.tensor_scale


def linear(x, q, bias=None):
    return torch.ops.lotion_fx.cpu_linear(x, *parts(q), bias, q.format.name)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_decoded_bit_for_bit(name, dtype, widest):
    """A product with rows of the identity is the weight that was multiplied."""
    for length in (1, 40, 77, 130):
        q = QuantizedWeight.of(hard(7, length, dtype), resolve(name), -1)
        want = q.dequantize()
        values = cpu_values(*parts(q), name, length, dtype)
        assert torch.equal(values, want) and torch.equal(values.signbit() & (values == 0), want.signbit() & (want == 0))
        rows = torch.eye(length, dtype=dtype).split(16)
        assert torch.equal(torch.cat([linear(each, q) for each in rows]).T, want)


@needs_compiler
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_scales_of_16_bits_are_read_bit_for_bit(stored, widest):
    q = QuantizedWeight.of(hard(7, 77, torch.float32), resolve("int4"), -1)
    halves = q.scales.clamp(2e-7).to(stored)  # float16's subnormals among them
    q, wide = replace(q, scales=halves), replace(q, scales=halves.float())
    assert torch.equal(cpu_values(*parts(q), "int4", 77, torch.float32), wide.dequantize())
    assert torch.equal(torch.cat([linear(each, q) for each in torch.eye(77).split(16)]).T, wide.dequantize())


@needs_compiler
@pytest.mark.parametrize("block", [16, 32, 40])
@pytest.mark.parametrize("dtype, dropped", [(torch.bfloat16, 16), (torch.float16, 13)])
def test_weights_at_ties_and_beside_them_are_rounded_as_torch_rounds(dtype, dropped, block, widest):
    """Level 1 times scales whose dropped bits are a half, one more, one less."""
    kept = torch.arange(32)[:, None] << dropped
    beside = (1 << dropped - 1) + torch.tensor([-(1 << dropped - 1), 1 - (1 << dropped - 1), -1, 0, 1])
    scales = (0x3F800000 + kept + beside).int().view(torch.float32)
    name, length = f"int4/{block}", 5 * block
    one = resolve(name).grid.encode(torch.tensor(1.0))
    codes = (one | one << 4).expand(32, length // 2)
    want = scales.to(dtype)
    assert torch.equal(cpu_values(codes, scales, None, name, length, dtype)[:, ::block], want)
    rows = torch.eye(length, dtype=dtype)[::block]
    assert torch.equal(torch.ops.lotion_fx.cpu_linear(rows, codes, scales, None, None, name).T, want)


@needs_compiler
@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_every_code_of_a_scale_is_read_as_its_type_says(name, widest):
    fmt = resolve(name)
    codes = torch.arange(256).to(torch.uint8)[None]
    ones = torch.full((1, 256 * fmt.block // 2), 0x22, dtype=torch.uint8)  # 0x2 is 1.0 in E2M1
    ts = torch.tensor(1.0) if name == "nvfp4" else None
    got = cpu_values(ones, codes, ts, name, 256 * fmt.block, torch.float32)
    assert torch.equal(got[0, :: fmt.block].nan_to_num(-1), fmt.law.type.decode(codes)[0].nan_to_num(-1))


@needs_compiler
@pytest.mark.parametrize("rows", [1, 2, 5, 16, 17])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_have_the_error_of_float32(dtype, rows, widest):
    for name, length in (("nvfp4", 200), ("int4", 301), ("nf4", 64)):
        q = QuantizedWeight.of(torch.randn(33, length).to(dtype) * 0.1, resolve(name), -1)
        x, bias = torch.randn(2, rows, length).to(dtype)[:1], torch.randn(33).to(dtype)
        want = F.linear(x.double(), q.dequantize().double(), bias.double())
        got = linear(x, q, bias)
        assert got.dtype == dtype and got.shape == (1, rows, 33)
        # The result's own rounding, and that of each of K sums, which go either way.
        sums = length**0.5 * 2.0**-24 * (x.double().abs() @ q.dequantize().double().abs().T).norm()
        assert (got.double() - want).norm() <= ROUNDING[dtype] * want.norm() + sums


def test_many_rows_are_torch_s_own_product():
    q = QuantizedWeight.of(torch.randn(33, 70), resolve("nvfp4"), -1)
    x, bias = torch.randn(17, 70), torch.randn(33)
    assert torch.equal(linear(x, q, bias), F.linear(x, q.dequantize(), bias))


@needs_compiler
@pytest.mark.parametrize("power", [0, -117, 10])
def test_a_rounding_is_left_out_only_where_it_changes_nothing(power):
    """Of a tensor scale that is a power of two; any other one makes weights that bfloat16 does not hold."""
    q = QuantizedWeight.of(torch.randn(16, 64, dtype=torch.bfloat16), resolve("nvfp4"), -1)
    exact = replace(q, tensor_scale=torch.tensor(2.0**power))
    assert cpu_linear._rounding(numbers("nvfp4"), 2.0**power, torch.bfloat16) == torch.float32
    for each in (exact, replace(q, tensor_scale=exact.tensor_scale * 1.1)):
        got = torch.cat([linear(rows, each) for rows in torch.eye(64, dtype=torch.bfloat16).split(16)]).T
        assert torch.equal(got, each.dequantize())
    assert cpu_linear._rounding(numbers("nvfp4"), 1.1, torch.bfloat16) == torch.bfloat16
    assert cpu_linear._rounding(numbers("int4"), 1.0, torch.bfloat16) == torch.bfloat16
    assert cpu_linear._rounding(numbers("mxfp4"), 1.0, torch.float16) == torch.float16
    assert SMALLEST_SCALE / 2.0**-9 == 2.0**-117  # the smallest tensor scale that the law gives


@needs_compiler
@pytest.mark.parametrize("length", [40, 168, 600])
@pytest.mark.parametrize("name", ["nvfp4", "int4"])
def test_a_scale_that_is_no_number_stays_in_its_row(name, length, widest):
    """Rows whose scales lie behind one another, and end within what is read at once."""
    q = QuantizedWeight.of(torch.randn(9, length), resolve(name), -1)
    scales = q.scales.clone()
    scales[3] = 0x7F if name == "nvfp4" else float("nan")
    x = torch.randn(3, length)
    got, want = linear(x, replace(q, scales=scales)), linear(x, q)
    others = torch.arange(9) != 3
    assert got[:, 3].isnan().all() and torch.equal(got[:, others], want[:, others])


@needs_compiler
@pytest.mark.parametrize("power", [-117, 0, 119, 120, 121])
def test_tensor_scales_of_any_size_are_multiplied_once(power, widest):
    """Whatever a code is made a float by must not overflow where its product does not."""
    scales = torch.arange(127).to(torch.uint8)[None]
    ones = torch.full((1, 127 * 8), 0x22, dtype=torch.uint8)
    ts = torch.tensor(1.25 * 2.0**power)
    got = cpu_values(ones, scales, ts, "nvfp4", 127 * 16, torch.float32)
    assert torch.equal(got[0, ::16], resolve("nvfp4").law.type.decode(scales)[0] * ts)


@needs_compiler
def test_what_changed_in_place_is_read_anew():
    q = QuantizedWeight.of(torch.randn(8, 64), resolve("nvfp4"), -1)
    x = torch.randn(1, 64)
    before = linear(x, q)
    q.tensor_scale.mul_(2)
    assert torch.equal(linear(x, q), 2 * before)
    q.codes.zero_()
    assert torch.equal(linear(x, q), torch.zeros(1, 8))
    with pytest.raises(ValueError, match="scales: got torch.uint8 \\[4, 8\\]"):  # the same memory, seen otherwise
        linear(x, replace(q, scales=q.scales.view(4, 8)))


def test_sizes_of_nothing_give_nothing():
    q = QuantizedWeight.of(torch.randn(4, 32), resolve("int4"), -1)
    assert linear(torch.randn(0, 32), q).shape == (0, 4)
    assert linear(torch.randn(2, 32), replace(q, codes=q.codes[:0], scales=q.scales[:0])).shape == (2, 0)


def test_strides_do_not_matter():
    q = QuantizedWeight.of(torch.randn(8, 32), resolve("int4"), -1)
    x = torch.randn(32, 3).T
    spread = replace(q, codes=q.codes.T.contiguous().T, scales=q.scales.repeat(2, 1)[::2].repeat(2, 1)[:8])
    assert torch.equal(linear(x, replace(q, codes=spread.codes)), linear(x.contiguous(), q))


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"codes": torch.zeros(4, 15, dtype=torch.uint8)},
            "codes: got torch.uint8 [4, 15], expected torch.uint8 [..., 16]",
        ),
        ({"codes": torch.zeros(4, 16)}, "codes: got torch.float32 [4, 16]"),
        ({"scales": torch.ones(3, 2)}, "scales: got torch.float32 [3, 2]"),
        ({"scales": torch.ones(4, 2).byte()}, "scales: got torch.uint8"),
        ({"tensor_scale": torch.tensor(1.0)}, "int4/16 has none"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, message):
    """What C++ reads it does not check."""
    q = QuantizedWeight.of(torch.randn(4, 32), resolve("int4/16"), -1)
    with pytest.raises(ValueError) as error:
        linear(torch.randn(1, 32), replace(q, **change))
    assert message in str(error.value)


def test_formats_and_biases_that_do_not_fit_are_refused():
    q = QuantizedWeight.of(torch.randn(4, 32), resolve("int8"), -1)
    with pytest.raises(ValueError, match="fmt='int8': expected codes of up to 4 bits"):
        linear(torch.randn(1, 32), q)
    q = QuantizedWeight.of(torch.randn(4, 32), resolve("int4"), -1)
    with pytest.raises(ValueError, match="bias: got"):
        linear(torch.randn(1, 32), q, torch.randn(5))


def test_operators_trace_with_symbolic_sizes():
    q = QuantizedWeight.of(torch.randn(12, 32), resolve("nvfp4"), -1)
    x = torch.randn(3, 32)
    torch.library.opcheck(torch.ops.lotion_fx.cpu_linear, (x, *parts(q), None, "nvfp4"))
    torch.library.opcheck(torch.ops.lotion_fx.cpu_values, (*parts(q), "nvfp4", 32, torch.float32))


# ------------------------------------------------------------------------------------------------------------- building


@pytest.fixture
def unbuilt(monkeypatch, tmp_path):
    """Nothing built or loaded yet, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu_linear._functions.cache_clear(), cpu_build.library.cache_clear()
    yield tmp_path
    cpu_linear._functions.cache_clear(), cpu_build.library.cache_clear()


def test_without_a_compiler_one_warning_and_the_same_weights(unbuilt, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    q = QuantizedWeight.of(torch.randn(9, 33), resolve("nvfp4"), -1)
    x, bias = torch.randn(2, 33), torch.randn(9)
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler .no-such-compiler -O2.; install one, or name it in CXX"):
        got = linear(x, q, bias)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(linear(x, q, bias), got)
    assert torch.equal(got, F.linear(x, q.dequantize(), bias)) and cpu_linear.instructions() == "aten"


def test_a_compiler_that_fails_is_quoted(tmp_path):
    source = tmp_path / "broken.cpp"
    source.write_text("int main( {")
    with pytest.raises(RuntimeError, match="failed: .*error"):
        cpu_build.built(source, cpu_build.compiler(), tmp_path / "into")
    assert not list((tmp_path / "into").iterdir())


def _build(source, into):
    print(cpu_build.built(source, cpu_build.compiler(), into))


@needs_compiler
def test_two_processes_may_build_at_once(tmp_path):
    source, into = tmp_path / "small.cpp", tmp_path / "into"
    source.write_text('extern "C" int answer() { return 42; }')
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=_build, args=(source, into)) for _ in range(2)]
    [each.start() for each in both]
    [each.join() for each in both]
    assert [each.exitcode for each in both] == [0, 0]
    (library,) = into.iterdir()
    assert cpu_build.ctypes.CDLL(str(library)).answer() == 42
    before = library.stat().st_mtime_ns
    assert cpu_build.built(source, cpu_build.compiler(), into) == library and library.stat().st_mtime_ns == before
    source.write_text('extern "C" int answer() { return 43; }')
    assert cpu_build.built(source, cpu_build.compiler(), into) != library


@needs_compiler
def test_a_folder_that_cannot_be_written_costs_a_build_and_nothing_else(tmp_path):
    source, blocked = tmp_path / "small.cpp", tmp_path / "blocked"
    source.write_text('extern "C" int answer() { return 42; }')
    blocked.write_text("a file, where the folder would be")
    library = cpu_build.built(source, cpu_build.compiler(), blocked)
    assert cpu_build.ctypes.CDLL(str(library)).answer() == 42
