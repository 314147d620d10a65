"""A model divided over ranks by `parallelize_module`, alone and under FSDP2, makes the steps of one process."""

import functools

import pytest
import torch

from tests.runtime import launching, tensor_parallel_worker
from tests.runtime.test_distributed import assert_close

WORKER = f"{tensor_parallel_worker.__name__}.tensor_parallel"
ONLY_PARALLEL = ("sequence", "head", "before", "data")
MODEL = {"fmt": "int4", "optimizer": "sgd", "inner": "aot_eager", "curvature": "factored"}


def job(**options):
    return WORKER, MODEL | options


FAST = {"sequence": job(sequence=True, fmt="nvfp4")}
TWO = {
    "plain": job(),
    "head": job(head=True),
    "transformed before": job(before=True),
    "eager": job(inner="eager"),
    "blocks": job(how="blocks"),
    "measured": job(calibrate=True),
    "measured sequence": job(sequence=True, calibrate=True, optimizer="adam"),
    "full sequence": job(curvature="full", sequence=True),
    "fisher adam": job(curvature="fisher", optimizer="adam"),
    "fisher sgd": job(curvature="fisher"),
    "int8": job(fmt="int8"),  # one scale for each row, which RowwiseParallel cuts
    "tensor": job(fmt="int4/tensor"),
    "tensor fisher": job(fmt="int4/tensor", curvature="fisher", optimizer="adam"),
    "tensor fisher sgd": job(fmt="int4/tensor", curvature="fisher"),
    "smoothstep": job(noise="smoothstep"),
    "ste": job(method="ste", fmt="int8"),
    "ste_scale": job(method="ste_scale", fmt="nvfp4"),
    "ste_scale tensor": job(method="ste_scale", fmt="int4/tensor"),
    "rr": job(method="rr"),
    "scales": job(method="scales", optimizer="adam"),
    "scales nvfp4": job(method="scales", fmt="nvfp4"),
}
FOUR = {
    "cut": job(),  # 16 columns a rank, half of a block
    "cut ste_scale": job(method="ste_scale"),
    "cut rr": job(method="rr"),
    "fsdp": job(data="fsdp", how="blocks and head"),
    "fsdp full": job(data="fsdp", how="blocks and head", curvature="full", fmt="nvfp4"),
    "fsdp fisher": job(data="fsdp", how="blocks and head", head=True, curvature="fisher", optimizer="adam"),
    "fsdp blocks": job(data="fsdp", how="blocks"),
    "fsdp int8": job(data="fsdp", how="blocks and head", fmt="int8"),
}
ROWS = {"rows": (f"{tensor_parallel_worker.__name__}.divided_rows", {})}
GROUPS = ((FAST | ROWS, 2), (TWO, 2), (FOUR, 4))
slow = [pytest.param(name, marks=pytest.mark.slow) for name in (*TWO, *FOUR)]


@functools.cache
def launched(group):
    return launching.launched(*GROUPS[group])


@pytest.mark.filterwarnings("ignore:no compiled graph contains head.weight")  # the head is in no region
@pytest.mark.parametrize("name", [*FAST, *slow])
def test_ranks_that_share_a_model_make_the_steps_of_one(name):
    group = next(i for i, (jobs, _) in enumerate(GROUPS) if name in jobs)
    torch._dynamo.reset()
    options = {key: value for key, value in GROUPS[group][0][name][1].items() if key not in ONLY_PARALLEL}
    reference = tensor_parallel_worker.single(**options)
    for found in launched(group)[name]:
        assert "error" not in found, found["error"]
        assert_close(found["parameters"], reference["parameters"], 1e-5)
        assert found["estimator"] == reference["estimator"]
        torch.testing.assert_close(found["logits"], reference["logits"], rtol=1e-4, atol=1e-5)
        if "curvature" in found:
            assert_close(found["curvature"], reference["curvature"], 1e-5)


@pytest.mark.filterwarnings("ignore:no compiled graph contains")
def test_the_rows_of_all_ranks_are_counted():
    assert tensor_parallel_worker.divided(tensor_parallel_worker.MLP(), lambda x: x) == 40
    for found in launched(0)["rows"]:
        assert found == {"graph": 40, "graph, two passes": 40, "Python": 40}, found
