"""Two processes under gloo make the steps that one process makes on the same global batch."""

import functools

import pytest
import torch

from tests.runtime import distributed_worker, launching

# torch's own, and hidden by it unless warnings are errors: a compiled region looks at its input, which is no leaf
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


def job(wrapper, **options):
    defaults = {"fmt": "nvfp4", "inner": "aot_eager", "curvature": "factored", "kind": "even", "accumulate": 1}
    defaults |= {"loss": "mean"}
    wrappers = {"ddp": {"outside": False, "bucket": 25}, "fsdp": {"before": True, "regions": "blocks and head"}}
    return wrapper, defaults | wrappers[wrapper] | options


FAST = {
    "ddp split": job("ddp", bucket=0.01),
    "ddp no_sync": job("ddp", accumulate=2),
    "fsdp no_sync": job("fsdp", accumulate=2),
    "ddp ragged": job("ddp", loss="global count"),
}
SLOW = {
    "ddp": job("ddp"),
    "fsdp": job("fsdp"),
    "fsdp first": job("fsdp", before=False),
    "ddp first": job("ddp", outside=True),
    "ddp full": job("ddp", curvature="full"),
    "ddp fisher": job("ddp", curvature="fisher"),
    "ddp split no_sync": job("ddp", bucket=0.01, accumulate=4),
    "fsdp full": job("fsdp", curvature="full"),
    "fsdp fisher": job("fsdp", curvature="fisher"),
    "fsdp blocks": job("fsdp", regions="blocks"),
    "fsdp found blocks": job("fsdp", regions="found"),
    "fsdp whole": job("fsdp", regions=None),
    "ddp refresh": job("ddp", refresh=2),
    "fsdp refresh": job("fsdp", refresh=2),
    "fsdp odd": job("fsdp", kind="odd"),
    "fsdp odd full": job("fsdp", kind="odd", curvature="full", before=False),
    "fsdp flipped": job("fsdp", kind="flipped"),  # shards cut blocks
    "fsdp flipped fisher": job("fsdp", kind="flipped", curvature="fisher"),
    "fsdp tensor": job("fsdp", fmt="int4/tensor"),
    "fsdp tensor full": job("fsdp", fmt="int4/tensor", curvature="full"),
    "fsdp mxfp4": job("fsdp", fmt="mxfp4"),
    "fsdp int8": job("fsdp", fmt="int8"),
    "fsdp scales": job("fsdp", method="scales", fmt="int4"),
    "fsdp scales nvfp4": job("fsdp", method="scales"),
    "ddp scales": job("ddp", method="scales", fmt="int4/tensor"),
    "ddp ragged full": job("ddp", loss="global count", curvature="full"),
    "ddp ragged fisher": job("ddp", loss="global count", curvature="fisher"),
    "ddp ragged means": job("ddp", loss="mean of means"),
    "fsdp ragged": job("fsdp", loss="global count"),
    "fsdp ragged no_sync": job("fsdp", loss="global count", accumulate=2),
    "fsdp ragged full": job("fsdp", loss="global count", curvature="full"),
    "fsdp ragged means": job("fsdp", loss="mean of means", curvature="full"),
}
INDUCTOR = {
    "ddp inductor": job("ddp", inner="inductor"),
    "ddp inductor split": job("ddp", inner="inductor", bucket=0.01),
    "fsdp inductor": job("fsdp", inner="inductor"),
}
SAMPLED = {  # each rank draws its own labels, so none of these makes the very steps of one process
    "ddp ggn": job("ddp", curvature="ggn"),
    "ddp first ggn": job("ddp", curvature="ggn", outside=True),
    "fsdp ggn": job("fsdp", curvature="ggn"),
    "fsdp first ggn": job("fsdp", curvature="ggn", before=False),
}
SAMPLED_SLOW = {"ddp split ggn": job("ddp", curvature="ggn", bucket=0.01, refresh=2)}
EXPECTED = {"ddp expected": ("expected", {"fmt": "int4", "inner": "aot_eager"})}
HAND = {"inner": "aot_eager", "fmt": "nvfp4"}
BY_HAND = {
    "by hand": ("by_hand", HAND | {"told": True, "curvature": "factored"}),
    "by hand in silence": ("by_hand", HAND | {"told": False, "curvature": "factored"}),
}
BY_HAND_SLOW = {
    "by hand full": ("by_hand", HAND | {"told": True, "curvature": "full"}),
    "by hand fisher": ("by_hand", HAND | {"told": True, "curvature": "fisher"}),
    "scaled by hand": ("by_hand", HAND | {"told": False, "curvature": "factored", "after": "scaled"}),
    "apart": ("by_hand", HAND | {"told": False, "curvature": "factored", "after": "none"}),
}
GROUPS = (FAST | SAMPLED | EXPECTED | BY_HAND, SLOW | BY_HAND_SLOW | SAMPLED_SLOW, INDUCTOR)
slow = [pytest.param(name, marks=pytest.mark.slow) for name in (*SLOW, *INDUCTOR)]


@functools.cache
def launched(group: int) -> dict[str, list[dict]]:
    """What each of two ranks found, for all jobs of a group."""
    return launching.launched(GROUPS[group])


@functools.cache
def single(kind, fmt, inner, curvature, loss, regions, refresh=None, method="lotion"):
    torch._dynamo.reset()
    # Means of its own parts in one process: these are its micro-batches.
    parts = 2 if loss == "mean of means" else 1
    options = {"inner": inner, "curvature": curvature, "refresh": refresh, "method": method}
    return distributed_worker.single(kind, regions, fmt, loss, parts, **options)


def ranks_and_reference(name):
    group = next(i for i, jobs in enumerate(GROUPS) if name in jobs)
    ranks = launched(group)[name]
    for found in ranks:
        assert "error" not in found, found["error"]
    options = GROUPS[group][name][1]
    chosen = (options[key] for key in ("kind", "fmt", "inner", "curvature", "loss"))
    # FSDP's hooks on the root break its graph: without regions the blocks and the head are compiled by themselves.
    more = {key: options[key] for key in ("refresh", "method") if key in options}
    return *ranks, single(*chosen, options.get("regions") or "blocks and head", **more)


def assert_close(mine, theirs, tolerance):
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        error = (mine[name] - value).norm() / value.norm()
        assert error < tolerance, (name, error)


@pytest.mark.filterwarnings("ignore:no compiled graph contains head.weight")  # the head is in no region
@pytest.mark.parametrize("name", [*FAST, *slow])
def test_two_ranks_make_the_steps_of_one(name):
    first, second, reference = ranks_and_reference(name)
    for part in ("parameters", "state") if "fisher" not in name else ("parameters",):  # its state is sharded too
        for key, value in second[part].items():  # a rank whose shard is empty keeps no state
            assert torch.equal(value, first[part][key]), (part, key)
    assert first["parameters"].keys() == second["parameters"].keys()
    tolerance = 1e-4 if "inductor" in name else 1e-5
    assert_close(first["parameters"], reference["parameters"], tolerance)
    assert first["estimator"] == second["estimator"] == reference["estimator"]
    if "curvature" in first:
        assert_close(first["curvature"], reference["curvature"], 10 * tolerance)
    for found in (first, second):
        torch.testing.assert_close(found["logits"], reference["logits"], rtol=1e-4, atol=1e-5)


def test_the_expected_loss_under_ddp():
    """Of the blocks the term comes at the step, of the head in the loss: both once, and as one process has them."""
    torch._dynamo.reset()
    reference = distributed_worker.expected(0, 1, **EXPECTED["ddp expected"][1])
    for found in launched(0)["ddp expected"]:
        assert "error" not in found, found["error"]
        assert_close(found["parameters"], reference["parameters"], 1e-5)
        assert found["estimator"] == reference["estimator"]
    assert reference["estimator"].pop("model.head.weight") == "second order"
    assert set(reference["estimator"].values()) == {"analytic"}


@pytest.mark.parametrize("curvature", ["", *(pytest.param(c, marks=pytest.mark.slow) for c in ("full", "fisher"))])
def test_a_loop_that_averages_gradients_itself_names_the_group(curvature):
    found = launched(1 if curvature else 0)[f"by hand {curvature}".strip()]
    reference = single("even", "nvfp4", "aot_eager", curvature or "factored", "mean", None)
    for rank in found:
        assert "error" not in rank, rank["error"]
        assert not rank["warned"]
        assert_close(rank["parameters"], reference["parameters"], 1e-5)
        assert_close(rank["curvature"], reference["curvature"], 1e-4)


def test_a_loop_that_averages_gradients_in_silence_is_told_so():
    first, second = launched(0)["by hand in silence"]
    assert [len(rank["warned"]) for rank in (first, second)] == [1, 1]
    assert any(not torch.equal(value, second["parameters"][key]) for key, value in first["parameters"].items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scaled by hand", "apart"])
def test_processes_that_train_apart_are_told_nothing(name):
    for rank in launched(1)[name]:
        assert "error" not in rank, rank["error"]
        assert not rank["warned"]


def test_a_small_bucket_splits_the_graph():
    ranks = launched(0)
    assert ranks["ddp no_sync"][0]["graphs"] == 1 and ranks["ddp split"][0]["graphs"] > 2


@pytest.mark.slow
def test_parameters_outside_of_regions_take_fisher():
    first, *_ = launched(1)["fsdp blocks"]
    estimators = dict(first["estimator"])
    assert estimators.pop("head.weight") == "fisher" and set(estimators.values()) == {"analytic"}


@pytest.mark.parametrize("name", ["ddp ggn", pytest.param("ddp split ggn", marks=pytest.mark.slow)])
def test_ranks_average_the_curvature_of_labels_of_their_own(name):
    group = next(i for i, jobs in enumerate(GROUPS) if name in jobs)
    first, second = launched(group)[name]
    assert "error" not in first, first
    refresh = GROUPS[group][name][1].get("refresh", 1)
    torch._dynamo.reset()
    reference = distributed_worker.single(inner="aot_eager", curvature="ggn", refresh=refresh)
    assert all(
        state[-1] == pytest.approx(1 - 0.99 ** (refresh * len(range(0, 3, refresh))))
        for state in first["state"].values()
    )
    for part in ("parameters", "state"):
        for key, value in second[part].items():
            assert torch.equal(value, first[part][key]), (part, key)
    assert set(first["estimator"].values()) == {"ggn"} and first["estimator"] == reference["estimator"]
    assert_close(first["parameters"], reference["parameters"], 0.01)
    for key, h in reference["curvature"].items():
        # Inputs are those of the global batch; labels differ, their number does not.
        mine = first["curvature"][key]
        assert_close({key: mine.sum(0) / mine.sum()}, {key: h.sum(0) / h.sum()}, 0.02)
        assert mine.sum() / h.sum() == pytest.approx(1, abs=0.2), key


def test_ggn_is_refused_around_ddp_and_under_fsdp():
    for name, message in (("ddp first ggn", "then wrap it"), ("fsdp ggn", "sharded"), ("fsdp first ggn", "sharded")):
        for found in launched(0)[name]:
            assert "curvature='ggn'" in found["error"] and message in found["error"], name
