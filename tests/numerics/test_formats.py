"""Formats by name: the table, options, registration and refusals."""

import pickle
from dataclasses import replace

import pytest
import torch

from lotion_fx.numerics.formats import Format, codebook, formats, register_format, resolve
from lotion_fx.numerics.grids import Integer
from lotion_fx.numerics.scales import Float32Scale, HalfScale, PowerOfTwoScale, TwoLevelScale

TABLE = {
    "int2": (3, 32, 2 + 1), "int3": (7, 32, 3 + 1), "int4": (15, 32, 4 + 1), "int5": (31, 32, 5 + 1),
    "int6": (63, 32, 6 + 1), "int7": (127, 32, 7 + 1), "int8": (255, "channel", 8), "fp4": (15, 32, 4 + 1),
    "fp8": (253, "channel", 8), "nf4": (16, 32, 4 + 1), "nvfp4": (15, 16, 4.5), "mxfp4": (15, 32, 4.25),
    "mxfp6": (63, 32, 6.25), "mxfp6_e2m3": (63, 32, 6.25), "mxfp6_e3m2": (63, 32, 6.25), "mxfp8": (253, 32, 8.25),
    "mxfp8_e4m3": (253, 32, 8.25), "mxfp8_e5m2": (247, 32, 8.25),
}  # fmt: skip


def test_the_built_in_formats():
    assert set(TABLE) <= set(formats())
    for name, (levels, block, bits) in TABLE.items():
        fmt = resolve(name)
        assert (len(fmt.grid.levels), fmt.block, fmt.bits_per_weight) == (levels, block, bits), name
    assert resolve("fp4").grid.levels[7:] == (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    assert resolve("int4").grid.levels == tuple(range(-7, 8))


def test_options_override_the_block_or_the_rule():
    assert resolve("int4/tensor").block == "tensor" and resolve("int4/tensor").name == "int4/tensor"
    assert resolve("fp8/128").block == 128 and resolve("int8/tensor").bits_per_weight == 8
    assert resolve("mxfp4/floor").law == PowerOfTwoScale("floor")
    assert resolve("mxfp4/floor").block == 32
    assert len({resolve("int4"), resolve("int4/32"), resolve("mxfp4"), resolve("mxfp4/ceil")}) == 2
    assert resolve("mxfp8") is resolve("mxfp8_e4m3") and resolve("mxfp6") is resolve("mxfp6_e2m3")
    fmt = resolve("nf4/64")
    assert resolve(fmt) is fmt and pickle.loads(pickle.dumps(fmt)) == fmt


def test_options_of_scales_combine_and_defaults_fall_away():
    assert resolve("nvfp4/pow2").law == replace(resolve("nvfp4").law, tensor="pow2")
    assert resolve("nvfp4/fp32") is resolve("nvfp4") and resolve("int4/32/fp32") == resolve("int4")
    assert resolve("int4/32/bf16") == resolve("int4/bf16") == resolve("int4/032/bf16")
    assert resolve("int4/bf16").bits_per_weight == 4.5 and resolve("int4/bf16").law.stored == torch.bfloat16
    assert resolve("int8/channel/fp16").name == "int8/fp16" and resolve("int8/fp16").law == HalfScale("fp16")
    for base in ("int2", "int4", "int8", "fp4", "fp8", "nf4"):
        for block in ("", "/tensor", "/channel", "/32", "/7"):
            for type in ("", "/fp32", "/bf16", "/fp16"):
                fmt = resolve(base + block + type)
                assert resolve(fmt.name) == fmt and pickle.loads(pickle.dumps(fmt)) == fmt
    own = register_format("test_half", Format("own", Integer(7), 8, HalfScale("bf16")))
    assert resolve("test_half/bf16") == own and resolve("test_half/4").law == own.law
    assert resolve("test_half/fp32").law == Float32Scale()


def test_saturates_is_said_of_scales_that_end_below_float32():
    says = {name: resolve(name).saturates for name in ("int4", "int4/bf16", "int2/bf16", "int4/fp16", "nvfp4/pow2")}
    assert says == {"int4": False, "int4/bf16": False, "int2/bf16": True, "int4/fp16": True, "nvfp4/pow2": True}


@pytest.mark.parametrize(
    ("fmt", "says"),
    [
        ("nvpf4", "did you mean.*nvfp4"),
        ("INT4", "did you mean.*int4"),
        ("int9", "unknown format"),
        ("zzz", "Known: .*fp4, fp8"),
        ("nvfp4/32", "blocks of 16"),
        ("nvfp4/floor", "tensor scale.*/fp32, /pow2"),
        ("mxfp4/64", "blocks of 32.*/ceil, /floor, /even"),
        ("mxfp4/tensor", "scale rule"),
        ("int4/", "/128"),
        ("int4/0", "/128"),
        ("int4/-8", "/128"),
        ("int4/²", "/128"),
        ("int4/floor", "/128"),
        ("int4/32/tensor", "/128"),
        ("int4/bf16/32", "in this order"),
        ("int4/bf16/fp16", "/fp32, /bf16, /fp16"),
        ("int4/32/bf16/", "in this order"),
        ("mxfp4/bf16", "scale rule"),
        ("nvfp4/bf16", "tensor scale"),
        ("int4/pow2", "/fp32, /bf16, /fp16"),
    ],
)
def test_a_bad_name_says_what_was_expected(fmt, says):
    with pytest.raises(ValueError, match=f"(?s)fmt='{fmt}'.*{says}"):
        resolve(fmt)


def test_wrong_types_are_refused():
    with pytest.raises(TypeError, match="fmt=4"):
        resolve(4)
    with pytest.raises(TypeError, match="format='int4'"):
        register_format("mine", "int4")


def test_register_format():
    fmt = register_format("test_ternary", codebook((-1, 0, 1), block=8))
    assert resolve("test_ternary") is fmt and fmt.name == "test_ternary" and "test_ternary" in formats()
    assert resolve("test_ternary/tensor").block == "tensor"
    assert register_format("test_ternary", codebook((-1, 0, 1), block=8)) is fmt
    with pytest.raises(ValueError, match="'test_ternary': another format"):
        register_format("test_ternary", codebook((-2, 0, 2)))
    for name in ("int4", "mxfp8", "a/b", "", "a b", None):
        with pytest.raises(ValueError, match="name="):
            register_format(name, fmt)


@pytest.mark.parametrize(
    ("levels", "says"),
    [
        ((0.0,), "2 to 256"),
        (range(257), "2 to 256"),
        ((-1.0, 0.0, float("nan")), "finite"),
        ((0.0, float("inf")), "finite"),
        ((0.0, 1e39), "finite"),
        ((0.0, 1.0, 0.5), "ascending"),
        ((0.0, 1.0, 1.0), "twice"),
        ((0.0, 1.0, 1.0 + 1e-12), "twice"),
        ((-1.0, 1.0), "0 among"),
    ],
)
def test_a_bad_codebook_says_what_was_expected(levels, says):
    with pytest.raises(ValueError, match=says):
        codebook(levels)


def test_a_format_checks_its_parts():
    for block in (0, -1, True, 1.5, "row", None):
        with pytest.raises(ValueError, match="block="):
            Format("x", Integer(7), block)
    with pytest.raises(ValueError, match="qmax=128"):
        Integer(128)
    with pytest.raises(ValueError, match="rule='up'"):
        PowerOfTwoScale("up")
    with pytest.raises(ValueError, match="name='fp8'"):
        HalfScale("fp8")
    with pytest.raises(ValueError, match="tensor='bf16'"):
        replace(resolve("nvfp4").law, tensor="bf16")
    with pytest.raises(ValueError, match="mantissa"):
        Format("x", Integer(7), 32, PowerOfTwoScale("even"))
    assert Format("x", Integer(7), 32).law == Float32Scale()
    assert isinstance(resolve("nvfp4").law, TwoLevelScale)
