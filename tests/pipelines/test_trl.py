"""TRL's SFT applies the head outside of the graph: T is that of its tokens, and accumulation changes nothing."""

import warnings

import pytest
import torch

import lotion_fx

pytest.importorskip("trl")


def test_four_micro_batches_are_one_batch():
    from lotion_fx.examples import with_trl

    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        runs = [with_trl.main(f"by{count}", steps=2, accumulation=count) for count in (1, 4)]
    assert any("no compiled graph contains lm_head.weight" in str(each.message) for each in told)
    for model in runs:
        rows = {row.name: row.estimator for row in lotion_fx.report(model).rows if row.format}
        assert rows.pop("lm_head.weight") == "fisher" and set(rows.values()) == {"analytic"}
        assert lotion_fx.state_dict(model)["phases"][0]["terms"] == 8 * 15  # predicted tokens of a step
    terms = [lotion_fx.report(model).term for model in runs]
    assert terms[1] == pytest.approx(terms[0], rel=1e-3)
    for one, four in zip(runs[0].parameters(), runs[1].parameters(), strict=True):
        torch.testing.assert_close(four, one, rtol=0, atol=2e-4)
