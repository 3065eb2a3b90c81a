"""Plain assert functions that a port's tests call. References are the original implementation's, in float64.

Shapes: B batch, S padded length, T packed tokens.
"""

import copy
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..convert import convert_folder, convert_model, own_state, state_specs
from ..export import export
from ..files import INDEX, WEIGHTS, CheckpointReader
from ..mapping import Drop, MappingError
from ..port import TE, ModelPort
from ..runtime.verify import (
    ATOL,
    DTYPES,
    FEW,
    FEW_FACTOR,
    GOLDEN_FILE,
    NOISE_FACTOR,
    RTOL,
    check_outputs,
    outputs_of,
    read_golden,
    relative_l2,
)
from ..verification import verify_by_its_own_code, verify_golden


@dataclass(frozen=True)
class Setting:
    """How our side of a comparison runs. The original's runs in float64 on the same device."""

    engine: str = "torch"
    dtype: str = "float64"  # or another of DTYPES, or "fp8": quantised layers in a bfloat16 model
    device: str = "cpu"

    @property
    def model_dtype(self) -> torch.dtype:
        """The dtype of the model's parameters, and the one at which the original's own error is the measure."""
        return DTYPES["bfloat16" if self.dtype == "fp8" else self.dtype]

    def __str__(self) -> str:
        return f"{self.engine}-{self.dtype}-{self.device}"


EXACT = Setting()
GPU_SETTINGS = [
    *(Setting("torch", dtype, "cuda") for dtype in ("float64", "float32", "bfloat16", "float16")),
    *(Setting("te", dtype, "cuda") for dtype in ("float32", "bfloat16", "float16")),
    pytest.param(Setting("te", "fp8", "cuda"), marks=pytest.mark.fp8),
]
# Relative L2 within which two ways to compute the same agree on a tiny random model: coarse, it finds mistakes only;
# how precise we are is judged by the noise floor.
AGREEMENT = {"float32": 1e-4, "float16": 0.03, "bfloat16": 0.2, "fp8": 0.6}
NOISE_MODELS = 5
# In float32 a GPU's attention kernels add up in another order than the original's products: it shows where the model
# is this small; at the published shapes NOISE_FACTOR holds (docs/validation).
GPU_FLOAT32_FACTOR = 1.25
FP8_BOUND = 0.25  # relative L2 to float64 of a tiny random model in fp8; measured: 0.21 at most


@dataclass(frozen=True)
class Case:
    """A tiny model of a port, with which the contract is checked.

    make_original: (Auto class, seed, **options of its configuration) -> the original in float64, EVERY parameter and
    buffer random.
    make_batch: (Auto class, seed) -> input_ids, attention_mask (right-padded, uneven) and labels.
    """

    port: ModelPort
    make_original: Callable[..., PreTrainedModel]
    make_batch: Callable[[str, int], dict[str, Tensor]]

    def with_options(self, **options: Any) -> "Case":
        """The case with other options of the original's configuration."""
        return replace(self, make_original=partial(self.make_original, **options))

    def pair(self, auto: str, setting: Setting = EXACT, seed: int = 0) -> tuple[Any, Any]:
        """The original in float64 and our model with the same weights."""
        original = self.make_original(auto, seed).eval()
        fields = {"engine": setting.engine, **({"layer_precision": "fp8"} if setting.dtype == "fp8" else {})}
        ours = convert_model(self.port, original, TE, fields).eval()
        return original.to(setting.device), ours.to(setting.device, setting.model_dtype)

    def batch(self, auto: str, setting: Setting = EXACT, seed: int = 0) -> dict[str, Tensor]:
        """Inputs and labels; the base model, which has no loss, takes no labels."""
        batch = {key: tensor.to(setting.device) for key, tensor in self.make_batch(auto, seed).items()}
        if auto == "AutoModel":
            batch.pop("labels")
        return batch


def randomize(model: PreTrainedModel, seed: int, scale: float = 0.3) -> PreTrainedModel:
    """Draw every parameter anew, norms and biases too, so that no wrong mapping can hide behind a one or a zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def assert_matches_original(case: Case, auto: str, setting: Setting = EXACT) -> None:
    """Float64: logits, every hidden state, the loss and the gradient of every parameter equal the original's."""
    original, ours = case.pair(auto, setting)
    batch = case.batch(auto, setting)
    theirs_out = original(**batch, output_hidden_states=True)
    ours_out = ours(**batch, output_hidden_states=True)
    keep = batch["attention_mask"].bool()
    states = zip(ours_out.hidden_states, theirs_out.hidden_states, strict=True)
    for index, (mine, reference) in enumerate(states):
        _agree(mine[keep], reference[keep], f"hidden state {index}")
    if auto != "AutoModel":
        select = keep if ours_out.logits.shape[:2] == keep.shape else slice(None)
        _agree(ours_out.logits[select], theirs_out.logits[select], "logits")
    loss, reference_loss = _loss(ours_out, keep), _loss(theirs_out, keep)
    _agree(loss, reference_loss, "loss")
    loss.backward()
    reference_loss.backward()
    expected = _gradients_by_our_names(case, auto, original, ours)
    for name, gradient in _gradients(ours).items():
        _agree(gradient, expected[name], f"gradient of {name}")


def _loss(output: Any, keep: Tensor) -> Tensor:
    """The model's own, or of the base model the sum of squares of its last hidden state at real tokens."""
    return output[0][keep].square().sum() if output.get("loss") is None else output.loss


def _gradients(model: Any) -> dict[str, Tensor]:
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


def _gradients_by_our_names(case: Case, auto: str, original: Any, ours: Any) -> dict[str, Tensor]:
    """Gradients map like the weights they belong to, so the port's mapping carries the original's to our names."""
    gradients = {
        key: torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        for key, tensor in original.state_dict(keep_vars=True).items()
        if key not in (original._tied_weights_keys or {})
    }
    mapping = case.port.formats["hf"].mapping(ours.config, original.config.to_dict(), auto)
    specs = {key: tensor.to("meta") for key, tensor in gradients.items()}
    plan = mapping.plan(specs, state_specs(type(ours), ours.config), "from")
    ours_by_name: dict[str, Tensor] = {}
    for step in plan.steps:
        ours_by_name.update(zip(step.targets, step.apply([gradients[key] for key in step.sources]), strict=True))
    return ours_by_name


class Noise(NamedTuple):
    """Relative L2 to the original in float64: ours at a setting, and the original's own at that dtype.

    Each is the median over a few random models: one of them errs by five percent more or less than the next, and its
    gradients by several times where a ReLU's input lies next to zero.
    """

    ours: float
    original: float
    numbers: int  # in the tensors compared


def noise(case: Case, auto: str, setting: Setting) -> dict[str, Noise]:
    """Errors by quantity: what `outputs_of` gives, all hidden states together, all gradients together."""
    models = [_noise_of_one(case, auto, setting, seed) for seed in range(NOISE_MODELS)]
    return {
        key: Noise(
            statistics.median(one[key].ours for one in models),
            statistics.median(one[key].original for one in models),
            models[0][key].numbers,
        )
        for key in models[0]
    }


def _noise_of_one(case: Case, auto: str, setting: Setting, seed: int) -> dict[str, Noise]:
    original, ours = case.pair(auto, setting, seed)
    lower = copy.deepcopy(original).to(setting.model_dtype)
    batch = case.batch(auto, setting, seed)
    reference, floor, found = (_quantities(case, auto, model, ours, batch) for model in (original, lower, ours))
    return {
        key: Noise(relative_l2(found[key], exact), relative_l2(floor[key], exact), exact.numel())
        for key, exact in reference.items()
    }


def _quantities(case: Case, auto: str, model: Any, ours: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    keep = batch["attention_mask"].bool()
    found = outputs_of(model, batch["input_ids"], batch["attention_mask"])
    output = model(**batch, output_hidden_states=True)
    found["hidden_states"] = torch.cat([state[keep] for state in output.hidden_states]).detach().double().cpu()
    model.zero_grad()
    _loss(output, keep).backward()
    gradients = _gradients(model) if model is ours else _gradients_by_our_names(case, auto, model, ours)
    names = [name for name, _ in ours.named_parameters()]
    found["gradients"] = torch.cat([gradients[name].flatten().double().cpu() for name in names])
    return found


def assert_noise_floor(case: Case, auto: str, setting: Setting) -> dict[str, Noise]:
    """At a lower dtype we are at most NOISE_FACTOR times as far from float64 as the original; returns both errors.

    Gradients, tensors of few numbers, and float32 on a GPU have wider factors: see above.
    """
    errors = noise(case, auto, setting)
    for key, error in errors.items():
        if setting.dtype == "fp8":
            allowed = FP8_BOUND
        elif key == "gradients" or error.numbers < FEW:  # gradients share the rounding of one loss
            allowed = FEW_FACTOR * error.original
        elif setting.dtype == "float32" and setting.device == "cuda":
            allowed = GPU_FLOAT32_FACTOR * error.original
        else:
            allowed = NOISE_FACTOR * error.original
        assert error.ours <= allowed, f"{key} at {setting}: error {error.ours:.3g}, allowed {allowed:.3g}"
    return errors


def assert_contract_on_gpu(case: Case, auto: str, setting: Setting, folder: Path) -> list[dict[str, Any]]:
    """What of the contract depends on device, engine and dtype; returns the errors of `noise`, a row each."""
    if setting.dtype == "float64":
        assert_matches_original(case, auto, setting)
    errors = noise(case, auto, setting) if setting.dtype == "float64" else assert_noise_floor(case, auto, setting)
    if setting.dtype != "fp8":  # each call of a quantised model moves its scales, so that no two are equal
        assert_inputs_and_outputs(case, auto, setting)
    assert_batch_invariant(case, auto, setting)
    if setting.engine == "te" and setting.dtype in ("bfloat16", "float16"):
        assert_graphs_equal_eager(case, auto, setting)
    if auto != "AutoModel":
        assert_gradient_checkpointing(case, auto, setting)
    assert_moves_between_devices(case, auto, setting, folder)
    what = {"port": case.port.name, "class": auto, "engine": setting.engine, "dtype": setting.dtype}
    return [
        {**what, "quantity": key, "error": error.ours, "error_of_original": error.original}
        for key, error in errors.items()
    ]


def assert_graphs_equal_eager(case: Case, auto: str, setting: Setting) -> None:
    """With CUDA graphs, padded and packed batches give what they give without."""
    _, ours = case.pair(auto, setting)
    batch = {key: x for key, x in case.batch(auto, setting).items() if key != "labels"}
    keep = batch["attention_mask"].bool()
    bounds = torch.nn.functional.pad(keep.sum(1).cumsum(0), (1, 0)).int()
    packed = {"input_ids": batch["input_ids"][keep][None], "cu_seq_lens_q": bounds}
    with torch.inference_mode():
        for inputs in (batch, packed):
            expected = ours(**inputs)[0]
            ours.config.cuda_graphs = True
            found = ours(**inputs)[0]
            ours.config.cuda_graphs = False
            error = relative_l2(found.double(), expected.double())
            assert error <= AGREEMENT[setting.dtype] / 10, f"a graph at {setting} differs by {error:.3g}"
    assert len(ours.base_model.graphed.graphs) == 1, "both batches fit one graph"


def assert_moves_between_devices(case: Case, auto: str, setting: Setting, folder: Path) -> None:
    """Saved on the GPU, loaded on the CPU, saved there and loaded on the GPU again: the same tensors."""
    _, ours = case.pair(auto, setting)
    ours.save_pretrained(folder / "gpu")
    loader = getattr(transformers, auto)
    on_cpu = loader.from_pretrained(folder / "gpu", engine="torch", layer_precision="bf16")
    on_cpu.save_pretrained(folder / "cpu")
    again = loader.from_pretrained(folder / "cpu", engine=setting.engine, device_map="cuda")
    assert {tensor.device.type for tensor in again.state_dict().values()} == {"cuda"}
    expected, found = own_state(ours), own_state(again)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def assert_golden(case: Case, folder: Path, dtype_name: str) -> None:
    """The committed original, loaded by from_original, reproduces its committed golden values."""
    golden, provenance = read_golden(folder / GOLDEN_FILE)
    cls: Any = case.port.classes[provenance["auto_class"]]
    model = cls.from_original(str(folder), dtype=DTYPES[dtype_name], engine="torch").eval()
    found = outputs_of(model, golden["input_ids"], golden["attention_mask"])
    assert set(found) == set(golden) - {"input_ids", "attention_mask"}
    for check in check_outputs(found, golden, provenance["noise"], dtype_name, "torch"):
        assert check.passed, check


def assert_inputs_and_outputs(case: Case, auto: str, setting: Setting = EXACT) -> None:
    """Embeddings as input, masks of every type or none, attention maps, tuples: all as in the original."""
    original, ours = case.pair(auto, setting)
    batch = case.batch(auto, setting)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    pairs = mask.bool()[:, None, :, None] & mask.bool()[:, None, None, :]  # [B, 1, S, S]
    with torch.no_grad():
        whole = ours(ids, attention_mask=mask, output_attentions=True)
        theirs = original(ids, attention_mask=mask, output_attentions=True)
        for mine, reference in zip(whole.attentions, theirs.attentions, strict=True):
            _agree(mine, reference * pairs, "attention map", setting)
        for same in (mask.bool(), mask.double(), mask.int()):
            assert torch.equal(ours(ids, attention_mask=same)[0], whole[0])
        _agree(ours(ids)[0], original(ids)[0], "output without a mask", setting)
        embeddings = original.get_input_embeddings()(ids) * mask[..., None]
        keep = mask.bool() if whole[0].shape[:2] == mask.shape else slice(None)
        mine = ours(inputs_embeds=embeddings.to(ours.dtype), attention_mask=mask)[0][keep]
        reference = original(inputs_embeds=embeddings, attention_mask=mask)[0][keep]
        _agree(mine, reference, "output from embeddings", setting)
        as_tuple = ours(ids, attention_mask=mask, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], whole[0])
    with pytest.raises(TypeError, match="atention_mask"):
        ours(ids, atention_mask=mask)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        ours(ids, inputs_embeds=embeddings)
    for bad in (-1, ours.config.vocab_size):
        with pytest.raises(ValueError, match=f"token id {bad} is outside the vocabulary"):
            ours(torch.full((1, 4), bad, device=setting.device))


def assert_round_trip(case: Case, auto: str) -> None:
    """Original -> ours -> original in memory: every tensor is torch.equal, and no storage is shared."""
    original, ours = case.pair(auto)
    back = convert_model(case.port, ours, "hf", {})
    expected, found = original.state_dict(), back.state_dict()
    assert set(expected) - _dropped(case, auto, original) == set(found)
    for key, tensor in found.items():
        assert torch.equal(tensor, expected[key]), key
        assert tensor.data_ptr() != expected[key].data_ptr(), f"{key} shares its storage"


def assert_config_survives(case: Case, auto: str, but: tuple[str, ...] = ()) -> None:
    """Numbers and switches of the original's configuration come back, and any other value that is accepted.

    but: fields that do not matter once there are weights.
    """
    original = case.pair(auto)[0]

    def assert_survives(name: str, value: float) -> None:
        setattr(original.config, name, value)
        back: Any = convert_model(case.port, convert_model(case.port, original, TE, {"engine": "torch"}), "hf", {})
        assert getattr(back.config, name) == value, f"{name}={value} came back as {getattr(back.config, name)}"

    general = PreTrainedConfig().to_dict().keys() - {"pad_token_id", "bos_token_id", "eos_token_id"}
    own = original.config.to_dict().keys() - general - {"use_cache", *but}
    numbers = {name: value for name in own if isinstance(value := getattr(original.config, name), bool | int | float)}
    kept = 0
    for name, value in sorted(numbers.items()):
        assert_survives(name, value)
        odd = not value if isinstance(value, bool) else value + 0.125 if isinstance(value, float) else abs(value - 1)
        try:
            assert_survives(name, odd)
            kept += 1
        except ValueError:
            pass  # refused: a shape that is not that of the weights, or what the port does not compute
        setattr(original.config, name, value)
    assert kept > 3, f"hardly any of {sorted(numbers)} could be changed"


def _dropped(case: Case, auto: str, original: Any) -> set[str]:
    """Keys that the port's mapping reads past, each with its reason."""
    form, theirs = case.port.formats["hf"], original.config.to_dict()
    mapping = form.mapping(form.read_config(theirs, original.state_dict().keys()), theirs, auto)
    return {key for rule in mapping.rules if isinstance(rule, Drop) for key in rule.theirs}


def assert_file_round_trip(case: Case, auto: str, tmp_path: Path, dtype: torch.dtype = torch.float32) -> None:
    """The same over files, sharded on the way, dtype kept, to every format and back."""
    source = tmp_path / "original"
    original: Any = case.make_original(auto, 0)
    original.to(dtype).save_pretrained(source)
    convert_folder(source, tmp_path / "te", TE, max_shard_bytes=20_000)
    assert (tmp_path / "te" / INDEX).is_file()
    _assert_same_model(case, auto, source, tmp_path / "te")
    for name, form in case.port.formats.items():
        if auto in form.architectures:
            convert_folder(tmp_path / "te", tmp_path / name, name, max_shard_bytes=30_000)
            convert_folder(tmp_path / name, tmp_path / f"{name}-te", TE)
            _assert_kept(_tensors(tmp_path / f"{name}-te"), _tensors(tmp_path / "te"), complete=name == "hf")
    reloaded = case.port.formats["hf"].load
    assert reloaded is not None
    expected, found = reloaded(source, auto, dtype).state_dict(), reloaded(tmp_path / "hf", auto, dtype).state_dict()
    kept = set(found) - _dropped(case, auto, original)
    assert all(torch.equal(found[key], expected[key]) for key in kept)


def _assert_same_model(case: Case, auto: str, source: Path, converted: Path) -> None:
    cls: Any = case.port.classes[auto]
    direct, loaded = cls.from_original(source, engine="torch"), cls.from_pretrained(converted, engine="torch")
    assert direct.dtype == loaded.dtype
    found = loaded.state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in direct.state_dict().items())


def _assert_kept(found: dict[str, Tensor], expected: dict[str, Tensor], complete: bool) -> None:
    assert set(found) == set(expected) if complete else set(found) <= set(expected)
    for key, tensor in found.items():
        if complete or "inv_freq" not in key:  # a format without frequencies has them recomputed
            assert tensor.dtype == expected[key].dtype
            assert torch.equal(tensor, expected[key]), key


def _tensors(folder: Path) -> dict[str, Tensor]:
    reader = CheckpointReader(folder)
    return dict(zip(reader.specs, reader.read(reader.specs), strict=True))


def assert_batch_invariant(case: Case, auto: str, setting: Setting = EXACT) -> None:
    """A sequence gets the same output alone, in a batch, left- or right-padded, and packed."""
    _, ours = case.pair(auto, setting)
    batch = case.batch(auto, setting)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    sequences = [row[keep] for row, keep in zip(ids, mask.bool(), strict=True)]
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int().to(setting.device)
    left = [torch.cat((row[len(sequence) :], sequence)) for row, sequence in zip(ids, sequences, strict=True)]
    with torch.no_grad():
        alone = [ours(sequence[None])[0][0] for sequence in sequences]
        padded = ours(ids, attention_mask=mask)[0]
        left_padded = ours(torch.stack(left), attention_mask=mask.flip(1))[0]
        longest = int(lengths.max())
        packed = ours(
            torch.cat(sequences)[None],
            cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=longest, max_length_k=longest,
        )[0]  # fmt: skip
    if padded.shape[:2] != ids.shape:  # one output a sequence
        rows = zip(alone, padded, left_padded, packed, strict=True)
    else:
        keep, keep_left = mask.bool(), mask.flip(1).bool()
        assert not padded[~keep].any(), "padding must come out as zeros"
        rows = zip(
            alone,
            [row[k] for row, k in zip(padded, keep, strict=True)],
            [row[k] for row, k in zip(left_padded, keep_left, strict=True)],
            packed[0].split(lengths.tolist()),
            strict=True,
        )
    for one, *others in rows:
        for other in others:
            _agree(other, one, "another batch", setting, rtol=1e-9, atol=1e-11)


def assert_every_parameter_matters(case: Case, auto: str) -> None:
    """Perturbing any one parameter of ours makes the comparison with the original fail."""
    original, ours = case.pair(auto)
    batch = case.batch(auto)
    inputs = (batch["input_ids"], batch["attention_mask"])
    reference = outputs_of(original, *inputs)
    for name, tensor in own_state(ours).items():
        kept = tensor.clone()
        with torch.no_grad():
            tensor.mul_(1.01).add_(0.01)
            found = outputs_of(ours, *inputs)
            tensor.copy_(kept)
        checks = check_outputs(found, reference, {}, "float64", "torch")
        assert not all(check.passed for check in checks), f"changing {name} goes unnoticed"


def assert_save_and_load(case: Case, auto: str, tmp_path: Path) -> None:
    """save_pretrained (sharded) and Auto…from_pretrained keep every tensor; dtype= casts; no extra keys are stored."""
    _, ours = case.pair(auto)
    ours = ours.float()
    ours.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / INDEX).is_file()
    assert set(_tensors(tmp_path)) == set(own_state(ours))
    loader = getattr(transformers, auto)
    again = loader.from_pretrained(tmp_path)
    assert type(again) is type(ours)
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in ours.state_dict().items())
    half = loader.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in half.buffers()} <= {torch.float32}, "rotary frequencies stay float32"


def assert_every_class_loads(case: Case, auto: str, tmp_path: Path) -> None:
    """Any class takes an original's encoder, with a new head if need be; the masked LM's head must be there."""
    original, ours = case.pair(auto)
    original.save_pretrained(tmp_path / "original")
    classes: dict[str, Any] = {**case.port.classes}
    for name, cls in classes.items():
        if name == "AutoModelForMaskedLM" and name != auto:
            with pytest.raises(ValueError, match=r"the checkpoint lacks .* lm_head"):
                cls.from_original(str(tmp_path / "original"), engine="torch")
            continue
        model = cls.from_original(str(tmp_path / "original"), engine="torch")
        encoder = model.base_model.state_dict()
        assert all(
            torch.equal(encoder[key], x.to(encoder[key].dtype)) for key, x in ours.base_model.state_dict().items()
        )
        model.save_pretrained(tmp_path / name)
        again = getattr(transformers, name).from_pretrained(tmp_path / name, engine="torch")
        assert type(again) is cls
        assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in model.state_dict().items())


def assert_gradient_checkpointing(case: Case, auto: str, setting: Setting = EXACT) -> None:
    """Gradients are the same with and without recomputation."""
    _, ours = case.pair(auto, setting)
    batch = case.batch(auto, setting)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            enable = getattr(ours, "activation_checkpointing_enable", ours.gradient_checkpointing_enable)  # 5.2x, 5.17
            enable()
        ours.train().zero_grad()
        runs: list[None] = []
        hook = ours.base_model.layers[0].mlp.register_forward_pre_hook(lambda *_, seen=runs: seen.append(None))
        ours(**batch).loss.backward()
        hook.remove()
        assert len(runs) == 1 + checkpointing, "a block runs again in the backward pass if and only if it should"
        gradients.append({name: p.grad.clone() for name, p in ours.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    plain, recomputed = (torch.cat([gradient.flatten() for gradient in each.values()]) for each in gradients)
    _agree(recomputed, plain, "gradients", setting, rtol=1e-10, atol=1e-12)


def assert_missing_weights_refused(case: Case, auto: str, tmp_path: Path) -> None:
    """Loading names every weight that is missing; conversion lists missing, unknown and mis-shaped keys at once."""
    original, ours = case.pair(auto)
    ours.save_pretrained(tmp_path / "te")
    state = load_file(tmp_path / "te" / WEIGHTS)
    gone = sorted(state)[:2]
    save_file({key: tensor for key, tensor in state.items() if key not in gone}, tmp_path / "te" / WEIGHTS)
    with pytest.raises(ValueError, match="lacks 2 weights") as error:
        getattr(transformers, auto).from_pretrained(tmp_path / "te")
    assert all(key in str(error.value) for key in gone)

    source = tmp_path / "original"
    original.save_pretrained(source)
    state = load_file(source / WEIGHTS)
    weights = sorted(key for key, tensor in state.items() if tensor.dim() == 2)
    state.pop(weights[0])
    state[weights[1]] = state[weights[1]][:-1].clone()
    state["stranger"] = torch.zeros(1)
    save_file(state, source / WEIGHTS)
    with pytest.raises(MappingError) as problems:
        convert_folder(source, tmp_path / "converted", TE)
    message = str(problems.value)
    assert "missing" in message
    assert "mis-shaped" in message
    assert "unknown stranger" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["original", "te"]


def assert_export_stands_alone(case: Case, original: Path, tmp_path: Path, capsys: Any) -> None:
    """An export verifies where biote cannot be imported, loads by the Hub's means, and notices a changed weight."""
    folder = tmp_path / "exported"
    export(str(original), folder)  # which verifies what it made
    assert "FAILED" not in capsys.readouterr().out
    source_names = {path.name for path in folder.iterdir()}
    expected = {"README.md", "LICENSE", "requirements.txt", "verify.py"}
    of_text = {"tokenizer.json", "modules.json"}  # the second for sentence_transformers
    assert source_names & of_text == (of_text if case.port.build_tokenizer else set())
    assert expected <= source_names
    config = json.loads((folder / "config.json").read_text())
    assert set(config["auto_map"]) == {"AutoConfig", *case.port.classes}
    for code in folder.glob("*.py"):
        assert "from biote.runtime" not in code.read_text()
    state = load_file(folder / WEIGHTS)
    key = next(key for key, tensor in sorted(state.items()) if tensor.dim() == 2)
    state[key] = state[key] * 1.01
    save_file(state, folder / WEIGHTS, {"format": "pt"})
    for verify in (verify_golden, verify_by_its_own_code):
        with pytest.raises(ValueError, match="does not reproduce"):
            verify(folder)


def _agree(
    found: Tensor, expected: Tensor, what: str, setting: Setting = EXACT, rtol: float = RTOL, atol: float = ATOL
) -> None:
    """Float64: element by element; any other dtype: by relative L2, coarsely."""
    if setting.dtype == "float64":
        torch.testing.assert_close(
            found, expected.to(found.dtype), rtol=rtol, atol=atol, msg=lambda text: f"{what}: {text}"
        )
    else:
        error = relative_l2(found.double(), expected.double())
        assert error <= AGREEMENT[setting.dtype], f"{what} at {setting}: relative error {error:.3g}"
