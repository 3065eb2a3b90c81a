import pytest

from biote.convert import state_specs
from esm2 import Esm2TEConfig, Esm2TEForMaskedLM


@pytest.mark.parametrize("fields", [{"engine": "te"}, {"layer_precision": "fp8"}, {"quantized_weights": True}])
def test_the_keys_of_a_model_are_known_where_its_engine_cannot_run(fields):
    fields = {"layer_precision": "fp8", **fields}
    assert set(state_specs(Esm2TEForMaskedLM, Esm2TEConfig(**fields))) == set(
        state_specs(Esm2TEForMaskedLM, Esm2TEConfig(engine="torch"))
    )
