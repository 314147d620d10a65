"""The other examples run, and do what they say."""

import math

import pytest
import torch

from lotion_fx.examples import distillation


@pytest.mark.slow
def test_distillation_brings_the_student_nearer_to_its_teacher():
    assert distillation.main(method="lotion") < distillation.main(method="ptq")


def test_the_divergence_is_that_of_the_formula():
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    found = distillation.divergence(lambda x: q.log(), lambda x: p.log(), torch.zeros(1))
    assert float(found) == pytest.approx(expected)
