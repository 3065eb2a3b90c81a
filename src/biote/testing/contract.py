"""Plain assert functions that a port's tests call. References are the original implementation's, in float64.

Shapes: B batch, S padded length, T packed tokens.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..convert import convert_folder, convert_model, own_state, state_specs
from ..export import export, verify_isolated
from ..files import INDEX, WEIGHTS, CheckpointReader
from ..mapping import MappingError
from ..port import TE, ModelPort
from ..runtime.verify import (
    ATOL,
    DTYPES,
    GOLDEN_FILE,
    NOISE_FACTOR,
    RTOL,
    check_outputs,
    outputs_of,
    read_golden,
    relative_l2,
)


@dataclass(frozen=True)
class Case:
    """A tiny model of a port, with which the contract is checked.

    make_original: (Auto class, seed) -> the original in float64, EVERY parameter and buffer random.
    make_batch: (Auto class, seed) -> input_ids, attention_mask (right-padded, uneven) and labels.
    """

    port: ModelPort
    make_original: Callable[[str, int], PreTrainedModel]
    make_batch: Callable[[str, int], dict[str, Tensor]]

    def pair(self, auto: str, seed: int = 0, **config_kwargs: Any) -> tuple[Any, Any]:
        """The original and our model with the same weights."""
        original = self.make_original(auto, seed).eval()
        return original, convert_model(self.port, original, TE, {"engine": "torch", **config_kwargs}).eval()


def randomize(model: PreTrainedModel, seed: int, scale: float = 0.3) -> PreTrainedModel:
    """Draw every parameter anew, norms and biases too, so that no wrong mapping can hide behind a one or a zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def assert_matches_original(case: Case, auto: str) -> None:
    """Float64: logits, every hidden state, the loss and the gradient of every parameter equal the original's."""
    original, ours = case.pair(auto)
    batch = case.make_batch(auto, 0)
    if auto == "AutoModel":
        batch.pop("labels")
    theirs_out = original(**batch, output_hidden_states=True)
    ours_out = ours(**batch, output_hidden_states=True)
    keep = batch["attention_mask"].bool()
    states = zip(ours_out.hidden_states, theirs_out.hidden_states, strict=True)
    for index, (mine, reference) in enumerate(states):
        _close(mine[keep], reference[keep], f"hidden state {index}")
    if auto == "AutoModel":
        loss, reference_loss = ours_out[0][keep].square().sum(), theirs_out[0][keep].square().sum()
    else:
        per_token = ours_out.logits.shape[:2] == keep.shape
        select = keep if per_token else torch.ones(len(keep), dtype=torch.bool)
        _close(ours_out.logits[select], theirs_out.logits[select], "logits")
        loss, reference_loss = ours_out.loss, theirs_out.loss
    _close(loss, reference_loss, "loss")
    loss.backward()
    reference_loss.backward()
    _assert_gradients(case, auto, original, ours)


def _assert_gradients(case: Case, auto: str, original: Any, ours: Any) -> None:
    """Gradients map like the weights they belong to, so the port's mapping carries the original's to our names."""
    gradients = {
        key: torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        for key, tensor in original.state_dict(keep_vars=True).items()
        if key not in (original._tied_weights_keys or {})
    }
    mapping = case.port.formats["hf"].mapping(ours.config, original.config.to_dict(), auto)
    specs = {key: tensor.to("meta") for key, tensor in gradients.items()}
    plan = mapping.plan(specs, state_specs(type(ours), ours.config), "from")
    expected: dict[str, Tensor] = {}
    for step in plan.steps:
        expected.update(zip(step.targets, step.apply([gradients[key] for key in step.sources]), strict=True))
    for name, parameter in ours.named_parameters():
        mine = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        _close(mine, expected[name], f"gradient of {name}")


def assert_noise_floor(
    case: Case, auto: str, dtype_name: str, engine: str = "torch", device: str = "cpu"
) -> dict[str, tuple[float, float]]:
    """At a lower dtype we are at most NOISE_FACTOR times as far from float64 as the original; returns both errors."""
    dtype = DTYPES[dtype_name]
    original, ours = case.pair(auto, engine=engine)
    batch = case.make_batch(auto, 0)
    inputs = (batch["input_ids"], batch["attention_mask"])
    on_device = (inputs[0].to(device), inputs[1].to(device))
    reference = outputs_of(original, *inputs)
    floor = outputs_of(copy.deepcopy(original).to(device, dtype), *on_device)
    found = outputs_of(ours.to(device, dtype), *on_device)
    errors = {key: (relative_l2(found[key], reference[key]), relative_l2(floor[key], reference[key])) for key in found}
    for key, (error, noise) in errors.items():
        assert error <= NOISE_FACTOR * noise, f"{key} at {dtype_name}: error {error:.3g}, the original's {noise:.3g}"
    return errors


def assert_golden(case: Case, folder: Path, dtype_name: str) -> None:
    """The committed original, loaded by from_original, reproduces its committed golden values."""
    golden, provenance = read_golden(folder / GOLDEN_FILE)
    cls: Any = case.port.classes[provenance["auto_class"]]
    model = cls.from_original(str(folder), dtype=DTYPES[dtype_name], engine="torch").eval()
    found = outputs_of(model, golden["input_ids"], golden["attention_mask"])
    assert set(found) == set(golden) - {"input_ids", "attention_mask"}
    for check in check_outputs(found, golden, provenance["noise"], dtype_name, "torch"):
        assert check.passed, check


def assert_inputs_and_outputs(case: Case, auto: str) -> None:
    """Embeddings as input, masks of every type or none, attention maps, tuples: all as in the original."""
    original, ours = case.pair(auto)
    batch = case.make_batch(auto, 0)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    pairs = mask.bool()[:, None, :, None] & mask.bool()[:, None, None, :]  # [B, 1, S, S]
    with torch.no_grad():
        whole = ours(ids, attention_mask=mask, output_attentions=True)
        theirs = original(ids, attention_mask=mask, output_attentions=True)
        for mine, reference in zip(whole.attentions, theirs.attentions, strict=True):
            _close(mine, reference * pairs, "attention map")
        for same in (mask.bool(), mask.double(), mask.int()):
            assert torch.equal(ours(ids, attention_mask=same)[0], whole[0])
        _close(ours(ids)[0], original(ids)[0], "output without a mask")
        embeddings = original.get_input_embeddings()(ids) * mask[..., None]
        given = {"inputs_embeds": embeddings, "attention_mask": mask}
        keep = mask.bool() if whole[0].shape[:2] == mask.shape else slice(None)
        _close(ours(**given)[0][keep], original(**given)[0][keep], "output from embeddings")
        as_tuple = ours(ids, attention_mask=mask, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], whole[0])
    with pytest.raises(TypeError, match="atention_mask"):
        ours(ids, atention_mask=mask)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        ours(ids, inputs_embeds=embeddings)
    for bad in (-1, ours.config.vocab_size):
        with pytest.raises(ValueError, match=f"token id {bad} is outside the vocabulary"):
            ours(torch.full((1, 4), bad))


def assert_round_trip(case: Case, auto: str) -> None:
    """Original -> ours -> original in memory: every tensor is torch.equal, and no storage is shared."""
    original, ours = case.pair(auto)
    back = convert_model(case.port, ours, "hf", {})
    expected, found = original.state_dict(), back.state_dict()
    assert {key for key in expected if "pooler" not in key} == set(found)
    for key, tensor in found.items():
        assert torch.equal(tensor, expected[key]), key
        assert tensor.data_ptr() != expected[key].data_ptr(), f"{key} shares its storage"


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
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items() if "pooler" not in key)


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


def assert_batch_invariant(case: Case, auto: str) -> None:
    """A sequence gets the same output alone, in a batch, left- or right-padded, and packed."""
    _, ours = case.pair(auto)
    batch = case.make_batch(auto, 0)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    sequences = [row[keep] for row, keep in zip(ids, mask.bool(), strict=True)]
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
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
            torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-11)


def assert_every_parameter_matters(case: Case, auto: str) -> None:
    """Perturbing any one parameter of ours makes the comparison with the original fail."""
    original, ours = case.pair(auto)
    batch = case.make_batch(auto, 0)
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


def assert_gradient_checkpointing(case: Case, auto: str) -> None:
    """Gradients are the same with and without recomputation."""
    _, ours = case.pair(auto)
    batch = case.make_batch(auto, 0)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            enable = getattr(ours, "activation_checkpointing_enable", ours.gradient_checkpointing_enable)  # 5.2x, 5.17
            enable()
        ours.train().zero_grad()
        ours(**batch).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in ours.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-10, atol=1e-12)


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
    export(str(original), folder)
    verify_isolated(folder)
    assert "FAILED" not in capsys.readouterr().out
    source_names = {path.name for path in folder.iterdir()}
    assert {"README.md", "LICENSE", "requirements.txt", "tokenizer.json", "verify.py"} <= source_names
    config = json.loads((folder / "config.json").read_text())
    assert set(config["auto_map"]) == {"AutoConfig", *case.port.classes}
    for code in folder.glob("*.py"):
        assert "from biote.runtime" not in code.read_text()
    state = load_file(folder / WEIGHTS)
    key = next(key for key, tensor in sorted(state.items()) if tensor.dim() == 2)
    state[key] = state[key] * 1.01
    save_file(state, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match="does not reproduce"):
        verify_isolated(folder)


def _close(found: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(
        found, expected.to(found.dtype), rtol=RTOL, atol=ATOL, msg=lambda text: f"{what}: {text}"
    )
