import pytest
import torch

from biote.testing import contract
from biote_esm2 import Esm2TEForMaskedLM
from biote_esm2.convert import PORT


@pytest.mark.parametrize("auto", PORT.classes)
def test_save_and_load(case, auto, tmp_path):
    contract.assert_save_and_load(case, auto, tmp_path)


def test_export_stands_alone(case, golden_folder, tmp_path, capsys):
    contract.assert_export_stands_alone(case, golden_folder, tmp_path, capsys)


@pytest.mark.parametrize("auto", PORT.classes)
def test_every_class_loads(case, auto, tmp_path):
    contract.assert_every_class_loads(case, auto, tmp_path)


def test_sizes_of_the_published_checkpoints():
    shapes = {  # layers, hidden, heads, ffn
        "esm2_t6_8M_UR50D": (6, 320, 20, 1280), "esm2_t12_35M_UR50D": (12, 480, 20, 1920),
        "esm2_t30_150M_UR50D": (30, 640, 20, 2560), "esm2_t33_650M_UR50D": (33, 1280, 20, 5120),
        "esm2_t36_3B_UR50D": (36, 2560, 40, 10240), "esm2_t48_15B_UR50D": (48, 5120, 40, 20480),
    }  # fmt: skip
    assert set(PORT.tags) == set(shapes)
    for tag, (layers, hidden, heads, ffn) in shapes.items():
        config = PORT.config_class(
            num_hidden_layers=layers,
            hidden_size=hidden,
            num_attention_heads=heads,
            intermediate_size=ffn,
            engine="torch",
        )
        with torch.device("meta"):
            model = Esm2TEForMaskedLM(config)
        counted = sum(p.numel() for name, p in model.named_parameters() if "contact_head" not in name)
        assert f"{counted:,}" == PORT.tags[tag].facts["parameters"]
