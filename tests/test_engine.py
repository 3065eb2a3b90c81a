"""The choice of engine, and that both engines own the same parameters.

The te engine is built from TransformerEngine where it can run, elsewhere from a stand-in of the same constructors.
"""

import dataclasses
import inspect
import sys
import typing
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

import biote.runtime
from biote.runtime import engine
from biote.runtime.activations import swiglu
from biote.runtime.engine import layers_of, resolve_engine, why_not_te
from biote.runtime.packing import Packing
from biote_esm2 import (
    Esm2TEConfig,
    Esm2TEForMaskedLM,
    Esm2TEForSequenceClassification,
    Esm2TEForTokenClassification,
    Esm2TEModel,
)

CLASSES = [Esm2TEModel, Esm2TEForMaskedLM, Esm2TEForTokenClassification, Esm2TEForSequenceClassification]
TE_NAME = "transformer_engine.pytorch"
KERNELS = "biote.runtime.kernels_te"  # Triton, which a machine without a GPU lacks
ATTENTION = "biote.runtime.attention_te"


class StandIn(nn.Module):
    """A module with TransformerEngine's extra state and default device."""

    def own(self, device: Any, dtype: torch.dtype | None, **shapes: tuple[int, ...]) -> None:
        if device != "meta" and torch.device(device).type == "meta":
            device = "cuda"  # TransformerEngine's linear layers know "meta" as a string only, and leave any other
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.full(shape, 0.5, device=device, dtype=dtype)))

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        assert state.dtype == torch.uint8


class Linear(StandIn):
    def __init__(
        self, in_features: int, out_features: int, *, bias: bool = True, params_dtype: Any = None, device: Any = "cuda"
    ) -> None:
        super().__init__()
        self.use_bias, self.in_features, self.out_features = bias, in_features, out_features
        self.quantizers: dict[str, list] = {"scaling_fwd": [], "scaling_bwd": []}
        biases = {"bias": (out_features,)} if bias else {}
        self.own(device, params_dtype, weight=(out_features, in_features), **biases)
        if not bias:
            self.bias = torch.empty(0)  # as TransformerEngine has it


class NotQuantised:
    """Stands in for TE's global state outside of an autocast region."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        return False


def plain_add_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, post: bool = False
) -> tuple[Tensor, Tensor]:
    """As the kernel reads it: without a bias, an RMS norm."""
    x = x if delta is None else x + delta
    centred = x if bias is None else x - x.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    normed = normed if bias is None else normed + bias
    return normed if post else x, normed


@pytest.fixture
def fresh_layers() -> Iterator[None]:
    """`layers_te` is imported anew in the test, and anew after it."""

    def forget() -> None:
        sys.modules.pop("biote.runtime.layers_te", None)
        vars(biote.runtime).pop("layers_te", None)

    forget()
    yield
    forget()


@pytest.fixture
def te(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Makes engine="te" buildable; "real" or "stand-in"."""
    if why_not_te() is None:
        return "real"
    request.getfixturevalue("fresh_layers")
    package, pytorch = ModuleType("transformer_engine"), ModuleType(TE_NAME)
    package.__spec__ = ModuleSpec("transformer_engine", None)  # peft looks for it
    quantization, kernels, attention = (ModuleType(name) for name in (f"{TE_NAME}.quantization", KERNELS, ATTENTION))
    vars(package)["pytorch"] = pytorch
    vars(pytorch)["Linear"] = Linear
    vars(quantization)["FP8GlobalStateManager"] = NotQuantised
    vars(pytorch)["Float8Quantizer"] = object
    unused = ("add_norm_quantised", "gelu_quantised", "relu_quantised", "swiglu_quantised")
    vars(kernels).update({"add_norm": plain_add_norm, "gelu": F.gelu, "swiglu": swiglu, **dict.fromkeys(unused)})
    vars(attention).update(cudnn_can_attend=lambda qkv: False, cudnn_attention=None, flash_attention=None)
    for module in (package, pytorch, quantization, kernels, attention):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(engine, "why_not_te", lambda: None)
    return "stand-in"


def config_of(engine_name: str) -> Esm2TEConfig:
    return Esm2TEConfig(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20, num_labels=5,
        attention_probs_dropout_prob=0.1, layer_norm_eps=3e-6, initializer_range=0.03, engine=engine_name,
    )  # fmt: skip


def on_meta(cls: type[PreTrainedModel], engine_name: str) -> PreTrainedModel:
    with torch.device("meta"), no_init_weights():
        return cls(config_of(engine_name))


@pytest.mark.parametrize("name", ["", "TE", "cuda", "flash"])
def test_unknown_engine(name: str) -> None:
    with pytest.raises(ValueError, match=rf"unknown engine '{name}'; choose one of auto, te, torch"):
        resolve_engine(name)


def cuda_of(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Card 7")


@pytest.mark.parametrize(
    ("capability", "te_source", "reason"),
    [
        (None, "", r"torch sees no CUDA device"),
        ((7, 5), "", r"Card 7 is older than compute capability 8\.0"),
        ((8, 0), None, r"with Triton, cannot be imported \(ModuleNotFoundError: .*\)"),
        ((9, 0), "raise ImportError('no kernels')", r"cannot be imported \(ImportError: no kernels\)"),
        ((9, 0), "raise OSError('libcudart.so')", r"cannot be imported \(OSError: libcudart\.so\)"),
        ((9, 0), "raise RuntimeError('wrong torch')", r"cannot be imported \(RuntimeError: wrong torch\)"),
        (
            (9, 0),
            "# an older release",
            r"TransformerEngine 2.20 or later.* cannot be imported \(ModuleNotFoundError: .*\)",
        ),
        ((8, 0), "", None),
        ((10, 0), "", None),
    ],
)
def test_where_te_can_run(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capability: tuple[int, int] | None,
    te_source: str | None,
    reason: str | None,
) -> None:
    cuda_of(monkeypatch, capability)
    for name in {"transformer_engine", TE_NAME, *(n for n in sys.modules if n.startswith("transformer_engine."))}:
        monkeypatch.setitem(sys.modules, name, None)
        if te_source is not None:
            monkeypatch.delitem(sys.modules, name)  # and afterwards what the import leaves is undone
    package = tmp_path / "transformer_engine" / "pytorch"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").write_text(te_source or "")
    if te_source == "":
        extensions = package / "cpp_extensions"
        extensions.mkdir()
        (extensions / "__init__.py").touch()
        (extensions / "fused_attn.py").write_text("FusedAttnBackend = None")
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").touch()
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "triton")
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve_engine("torch") == "torch"
    if reason is None:
        assert why_not_te() is None
        assert resolve_engine("auto") == resolve_engine("te") == "te"
    else:
        assert resolve_engine("auto") == "torch"
        with pytest.raises(RuntimeError, match=rf'^engine="te" cannot run here: .*{reason}.*; use engine="torch" or'):
            resolve_engine("te")


def test_torch_never_asks_for_te(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "why_not_te", lambda: pytest.fail("asked"))
    assert resolve_engine("torch") == "torch"


def test_an_old_gpu_is_told_to_take_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_of(monkeypatch, (7, 5))
    model: Any = Esm2TEModel(config_of("torch"))
    model._check_engine(SimpleNamespace(is_cuda=True, dtype=torch.float32, device="cuda"))
    with pytest.raises(RuntimeError, match=r"load the model with dtype=torch\.float32"):
        model._check_engine(SimpleNamespace(is_cuda=True, dtype=torch.float16, device="cuda"))


@pytest.mark.usefixtures("fresh_layers")
def test_layers_te_without_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, TE_NAME, None)
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    with pytest.raises(RuntimeError, match=r'engine="te" needs TransformerEngine'):
        layers_of("te")


@pytest.mark.skipif(why_not_te() is not None, reason="TransformerEngine does not run here")
def test_the_stand_in_takes_what_transformer_engine_takes() -> None:
    real = inspect.signature(sys.modules[TE_NAME].Linear).parameters
    open_ended = any(parameter.kind == parameter.VAR_KEYWORD for parameter in real.values())
    for place, (name, parameter) in enumerate(inspect.signature(Linear).parameters.items()):
        assert name in real or open_ended
        assert parameter.kind == parameter.KEYWORD_ONLY or list(real)[place] == name


@pytest.mark.parametrize("cls", CLASSES)
def test_both_engines_own_the_same_parameters(te: str, cls: type[PreTrainedModel]) -> None:
    ours = {name: on_meta(cls, name) for name in ("te", "torch")}
    for model in ours.values():
        block = model.base_model.layers[0]
        for product in (block.attention.qkv, block.attention.proj, block.mlp.fc1, block.mlp.fc2):
            assert type(product) is nn.Linear
        for norm in (block.attention.norm, block.mlp.norm, model.base_model.final_norm):
            assert type(norm) is nn.LayerNorm
    states = {
        name: {key: (x.device.type, x.dtype, tuple(x.shape)) for key, x in model.state_dict().items()}
        for name, model in ours.items()
    }
    assert states["te"] == states["torch"]
    assert {device for device, _, _ in states["te"].values()} == {"meta"}
    assert not [key for key in states["te"] if "_extra_state" in key]
    trained = {name: [key for key, p in model.named_parameters() if p.requires_grad] for name, model in ours.items()}
    assert sorted(trained["te"]) == sorted(trained["torch"])


def test_layout_of_a_block(te: str) -> None:
    shapes = {
        "attention.norm.weight": (12,), "attention.norm.bias": (12,),
        "attention.qkv.weight": (36, 12), "attention.qkv.bias": (36,),
        "attention.proj.weight": (12, 12), "attention.proj.bias": (12,),
        "mlp.norm.weight": (12,), "mlp.norm.bias": (12,),
        "mlp.fc1.weight": (20, 12), "mlp.fc1.bias": (20,),
        "mlp.fc2.weight": (12, 20), "mlp.fc2.bias": (12,),
    }  # fmt: skip
    for name in ("te", "torch"):
        model = on_meta(Esm2TEModel, name)
        assert {key: tuple(tensor.shape) for key, tensor in model.layers[1].state_dict().items()} == shapes
        norms = (model.layers[0].attention.norm, model.layers[0].mlp.norm, model.final_norm)
        assert [norm.eps for norm in norms] == [3e-6] * 3


def test_a_quantised_product_is_a_linear_to_everyone(te: str) -> None:
    """To peft too, which looks for te.Linear and for nn.Linear; and it has the parameters of one, nothing else."""
    linear = layers_of("te").linear
    for bias in (True, False):
        with torch.device("meta"):
            quantised, plain = linear(8, 6, bias=bias, quantised=True), linear(8, 6, bias=bias, quantised=False)
        assert isinstance(quantised, sys.modules[TE_NAME].Linear)
        assert isinstance(quantised, nn.Linear)
        assert quantised.state_dict().keys() == plain.state_dict().keys()
        assert (quantised.bias is None) == (plain.bias is None)
        assert {x.device.type for x in quantised.parameters()} == {"meta"}
        assert (quantised.in_features, quantised.out_features) == (8, 6)


NORMS = {
    "layer": lambda: nn.LayerNorm(8, eps=0.1),
    "layer without bias": lambda: nn.LayerNorm(8, eps=0.1, bias=False),
    "layer without weights": lambda: nn.LayerNorm(8, eps=0.1, elementwise_affine=False),
    "rms": lambda: nn.RMSNorm(8, eps=0.1),
    "rms of default eps": lambda: nn.RMSNorm(8),
    "replaced": lambda: nn.Sequential(nn.LayerNorm(8), nn.Tanh()),
    "none": nn.Identity,
}


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("kind", NORMS)
def test_a_norm_is_computed_as_the_module_would(te: str, kind: str, post_norm: bool) -> None:
    """By the kernel or not: whoever replaces a norm gets his own."""
    torch.manual_seed(0)
    device = "cuda" if te == "real" else "cpu"
    norm = NORMS[kind]().to(device)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    x, delta = torch.randn(2, 5, 8, device=device)
    for given in (delta, None):
        stream, normed = layers_of("te").add_norm(norm, x, given, post_norm)
        total = x + delta if given is not None else x
        torch.testing.assert_close(normed, norm(total))
        torch.testing.assert_close(stream, norm(total) if post_norm else total)


@pytest.mark.parametrize("first", ["te", "torch"])
def test_one_checkpoint_for_both_engines(te: str, tmp_path: Path, first: str) -> None:
    second = {"te": "torch", "torch": "te"}[first]
    state = {
        key: torch.arange(spec.numel()).view(spec.shape).to(spec.dtype) + number
        for number, (key, spec) in enumerate(on_meta(Esm2TEForMaskedLM, "torch").state_dict().items())
    }
    state["lm_head.decoder.weight"] = state["model.embeddings.word_embeddings.weight"]
    expected = dict(state)
    for name in (first, second):
        if name == first:
            model = Esm2TEForMaskedLM.from_pretrained(None, config=config_of(name), state_dict=state)
        else:
            model = Esm2TEForMaskedLM.from_pretrained(tmp_path / first, engine=name)
        assert model.model.engine == name
        loaded = model.state_dict()
        assert loaded.keys() == expected.keys()
        assert [key for key in expected if not torch.equal(loaded[key].cpu(), expected[key])] == []
        model.save_pretrained(tmp_path / name)
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("te", "torch")]
    assert files[0].keys() == files[1].keys() == expected.keys() - {"lm_head.decoder.weight"}


@pytest.mark.parametrize("name", ["te", "torch"])
def test_both_engines_start_alike(te: str, name: str) -> None:
    torch.manual_seed(0)
    with torch.device("cuda" if te == "real" else "cpu"):
        model = Esm2TEModel(config_of(name))
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            assert not parameter.any(), key
        elif "norm" in key:
            assert bool((parameter == 1).all()), key
        elif parameter.numel() > 100:
            assert abs(float(parameter.detach().std()) - 0.03) < 0.006, key


@pytest.mark.parametrize("lengths", [[4, 4], [5, 2, 1]])
def test_rows_past_the_packed_tokens_come_out_as_zeros(lengths: list[int]) -> None:
    tokens = sum(lengths)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    packing = Packing(bounds, max(lengths), torch.arange(tokens), (1, tokens), None)
    qkv, made_by = torch.randn(16, 2, 3, 8), nn.Linear(1, 1)
    found = layers_of("torch").attend(qkv, made_by, None, packing, 0.0)
    torch.testing.assert_close(found[:tokens], layers_of("torch").attend(qkv[:tokens], made_by, None, packing, 0.0))
    assert not found[tokens:].any()


def test_what_forward_says_it_returns(port):
    """sentence-transformers looks for a dataclass among the hints, and takes its fields."""
    hints = typing.get_type_hints(port.classes["AutoModel"].forward)
    assert {field.name for field in dataclasses.fields(hints["return"])} >= {"last_hidden_state", "hidden_states"}
    assert "labels" not in hints
    assert typing.get_type_hints(port.classes["AutoModelForMaskedLM"].forward)["return"] is typing.Any
