"""One suite over every SSD implementation: the checks of `pallas_kernels.ssd.checks` as tests.

Subclass `SsdSuite` with the name of an implementation.
"""

import dataclasses
from typing import ClassVar

import pytest

from pallas_kernels.ssd import checks


class SsdSuite:
    """The tests; a subclass names the implementation, and fields of `Spec` where the defaults do not suit it."""

    implementation: str
    fields: ClassVar[checks.Fields] = {}

    @pytest.mark.parametrize("spec", checks.SPECS, ids=str)
    def test_values_and_gradients(self, spec: checks.Spec) -> None:
        checks.check_against_oracle(self.implementation, spec)

    @pytest.mark.parametrize("regime", ["strong", "slow"])
    def test_long_rows(self, regime: str) -> None:
        spec = dataclasses.replace(checks.LONG, chunk_size=128, regime=regime)
        checks.check_against_oracle(self.implementation, spec)

    @pytest.mark.parametrize("spec", [checks.SPECS[0], *checks.SPECS[-4:-1]], ids=str)
    def test_state_alone(self, spec: checks.Spec) -> None:
        checks.check_state_alone(self.implementation, spec)

    @pytest.mark.parametrize("spec", checks.STARTS, ids=str)
    def test_outputs_from_a_later_token_on(self, spec: checks.Spec) -> None:
        checks.check_against_oracle(self.implementation, dataclasses.replace(spec, **self.fields))

    def test_defaults_are_no_skip_and_a_zero_state(self) -> None:
        checks.check_defaults(self.implementation, self.fields)

    def test_bfloat16(self) -> None:
        checks.check_bfloat16(self.implementation, dataclasses.replace(checks.BFLOAT16, **self.fields))

    def test_padding_changes_nothing(self) -> None:
        checks.check_padding(self.implementation, self.fields)

    def test_extreme_decays_stay_finite(self) -> None:
        checks.check_extreme_decays(self.implementation, self.fields)
