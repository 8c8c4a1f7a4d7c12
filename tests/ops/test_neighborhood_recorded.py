"""Neighborhood attention against recorded answers of natten 0.17.5 (op_na2d.json): output and all gradients."""

import pytest
from neighborhood_record import RECORD, answers, case_id

from golden import unpack


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("case", RECORD["cases"], ids=case_id)
def test_recorded(case, impl):
    for name, tensor in answers(case, impl).items():
        want = unpack(case[name])
        assert (tensor - want).abs().max() <= 1e-12 * want.abs().max(), name
