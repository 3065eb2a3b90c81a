"""`biote.load`, and `biote.embed` against plain loops over the original in float64."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

import biote
from biote.apps import embed as embed_module
from biote.apps.embed import POOLS, Embedder, Wanted, pool, special_ids, tokenize
from biote.convert import convert_folder, convert_model
from biote.data.batches import SequenceTooLongError
from biote.port import TE, ModelPort, installed_ports, port_named
from biote.testing.contract import randomize

TEXT_PORTS = [name for name, port in installed_ports().items() if port.build_tokenizer is not None]
TEXTS = ["MKTAYIAKQR", "W", "GSHMLEDPQ", "ACDEFGHIKLMNPQRSTVWY", "GSHMLEDPQ", "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQA"]
SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


@dataclass(frozen=True)
class Pair:
    """A tiny original in float64, every parameter random, and our model with its weights."""

    port: ModelPort
    original: Any
    model: Any

    def states(self, text: str, layer: int = -1) -> np.ndarray:
        """Hidden states of one sequence, [tokens, N], by the original."""
        row = torch.tensor([self.port.build_tokenizer()(text)["input_ids"]])
        with torch.no_grad():
            output = self.original(row, attention_mask=torch.ones_like(row), output_hidden_states=True)
        return output.hidden_states[layer][0].numpy()

    @property
    def count(self) -> int:
        """Of the original's hidden states."""
        with torch.no_grad():
            return len(self.original(torch.tensor([[5]]), output_hidden_states=True).hidden_states)

    def pooled(self, pool_name: str, text: str, layer: int = -1) -> np.ndarray:
        states = self.states(text, layer)
        residues = states[1:-1]
        if pool_name == "cls":
            return states[0]
        return {"mean": np.mean, "max": np.max, "std": np.std}[pool_name](residues, 0)


def pair_of(name: str, **fields: Any) -> Pair:
    port = port_named(name)
    torch.manual_seed(0)
    model = port.classes["AutoModelForMaskedLM"](port.config_class(engine="torch", **SHAPE, **fields))
    original = convert_model(port, randomize(model, 0).double(), "hf", {}).eval()
    return Pair(port, original, convert_model(port, original, TE, {"engine": "torch"}).eval())


@pytest.fixture(scope="module", params=TEXT_PORTS)
def pair(request: pytest.FixtureRequest) -> Pair:
    return pair_of(request.param)


@pytest.mark.parametrize("batch_tokens", [1, 40, None])
@pytest.mark.parametrize("layer", [-1, 2, 0, -3])
@pytest.mark.parametrize("name", POOLS)
def test_pools_and_layers(pair, name, layer, batch_tokens):
    found = biote.embed(pair.model, TEXTS, pools=[name], layers=[layer], batch_tokens=batch_tokens)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, [pair.pooled(name, text, layer) for text in TEXTS], **CLOSE)


def test_several_pools_and_layers(pair):
    found = biote.embed(pair.model, TEXTS, pools=["std", "mean"], layers=[-1, 1], batch_tokens=64)
    last = pair.count - 1
    assert list(found) == [f"std_{last}", f"mean_{last}", "std_1", "mean_1"]
    for name, array in found.items():
        pool_name, layer = name.split("_")
        np.testing.assert_allclose(array, [pair.pooled(pool_name, text, int(layer)) for text in TEXTS], **CLOSE)


@pytest.mark.parametrize("layers", [[-1], [1], [0, 2]])
def test_per_residue(pair, layers):
    found = biote.embed(pair.model, TEXTS, per_residue=True, layers=layers, batch_tokens=50)
    if len(layers) == 1:
        found = {"embedding": found}
    else:
        assert list(found) == [f"residues_{layer}" for layer in layers]
    for layer, arrays in zip(layers, found.values(), strict=True):
        assert [array.shape for array in arrays] == [(len(text), 32) for text in TEXTS]
        for array, text in zip(arrays, TEXTS, strict=True):
            np.testing.assert_allclose(array, pair.states(text, layer)[1:-1], **CLOSE)


def windows(pair: Pair, text: str, size: int, overlap: int, layer: int = -1) -> tuple[np.ndarray, np.ndarray]:
    """Of each residue the mean of its states in all windows that hold it; the mean of the windows' first tokens."""
    starts = list(range(0, len(text), size - overlap))
    starts = [start for start in starts if start + size < len(text)] + [len(text) - size]
    states = [pair.states(text[start : start + size], layer) for start in starts]
    residues = [
        np.mean(
            [one[1 + at - start] for start, one in zip(starts, states, strict=True) if start <= at < start + size], 0
        )
        for at in range(len(text))
    ]
    return np.array(residues), np.mean([one[0] for one in states], 0)


@pytest.mark.parametrize(
    ("size", "overlap"), [(20, 5), (20, None), (20, 0), (20, 19), (33, 8), (12, 11), (1, 0), (17, 0), (34, 3)]
)
@pytest.mark.parametrize("batch_tokens", [1, 1000])
def test_windows(pair, size, overlap, batch_tokens):
    """Windows of 34 residues; sequences that fit are untouched, whatever stands beside them."""
    options = {"max_residues": size, "overlap": overlap, "batch_tokens": batch_tokens}
    found = biote.embed(pair.model, TEXTS, per_residue=True, layers=[-1, 1], **options)
    pools = biote.embed(pair.model, TEXTS, pools=POOLS, **options)
    shared, last = size // 4 if overlap is None else overlap, pair.count - 1
    for place, text in enumerate(TEXTS):
        for layer, arrays in zip((-1, 1), found.values(), strict=True):
            expected, first = windows(pair, text, min(size, len(text)), min(shared, len(text) - 1), layer)
            np.testing.assert_allclose(arrays[place], expected, **CLOSE)
            if layer == -1:
                np.testing.assert_allclose(pools[f"mean_{last}"][place], expected.mean(0), **CLOSE)
                np.testing.assert_allclose(pools[f"max_{last}"][place], expected.max(0), **CLOSE)
                np.testing.assert_allclose(pools[f"std_{last}"][place], expected.std(0), **CLOSE)
                np.testing.assert_allclose(pools[f"cls_{last}"][place], first, **CLOSE)


def test_the_models_own_limit():
    """amplify runs so many positions, two of them special tokens; a limit that is asked for may not exceed it."""
    limited = pair_of("amplify", max_position_embeddings=16)
    found = biote.embed(limited.model, TEXTS, per_residue=True)
    np.testing.assert_allclose(found[5], windows(limited, TEXTS[5], 14, 3)[0], **CLOSE)
    with pytest.raises(ValueError, match="max_residues=15 must be at least 1 and 14, the most that this model takes"):
        biote.embed(limited.model, TEXTS, max_residues=15)


def test_truncate_and_error(pair):
    found = biote.embed(pair.model, TEXTS, long="truncate", max_residues=9, batch_tokens=30)
    np.testing.assert_allclose(found, [pair.pooled("mean", text[:9]) for text in TEXTS], **CLOSE)
    with pytest.raises(ValueError, match="sequence 3 has 20 residues, more than the 10 at once"):
        biote.embed(pair.model, TEXTS, long="error", max_residues=10)
    assert biote.embed(pair.model, TEXTS[:3], long="error", max_residues=10).shape == (3, 32)


def test_a_result_does_not_depend_on_its_neighbours(pair):
    random = np.random.default_rng(0)
    texts = ["".join(random.choice(list("ACDEFGHIKLMNPQRSTVWY"), length)) for length in random.integers(1, 60, 30)]
    alone = np.concatenate([biote.embed(pair.model, [text]) for text in texts])
    for batch_tokens in (1, 100, 10_000):
        order = random.permutation(len(texts))
        found = biote.embed(pair.model, [texts[place] for place in order], batch_tokens=batch_tokens)
        np.testing.assert_allclose(found, alone[order], rtol=1e-12, atol=1e-13)


def test_nothing_in_nothing_out(pair):
    found = biote.embed(pair.model, [])
    assert (found.shape, found.dtype) == ((0, 32), np.float64)
    assert biote.embed(pair.model, [], per_residue=True) == []
    assert list(biote.embed(pair.model, [], layers=[0, 1])) == ["mean_0", "mean_1"]


def test_sequences_are_read_as_the_command_reads_them(pair):
    found = biote.embed(pair.model, ["MKTA", "mk-TA*"])
    np.testing.assert_array_equal(found[0], found[1])


def test_one_layer_by_two_numbers(pair):
    with pytest.raises(ValueError, match=f"layers {pair.count - 1}, -1 name one layer twice"):
        biote.embed(pair.model, ["MK"], layers=[pair.count - 1, -1])


@pytest.mark.parametrize(
    ("sequences", "options", "said"),
    [
        ("MKT", {}, "one string was given"),
        (["MK", None], {}, "sequence 1 is no string but NoneType"),
        (["MK", "M1"], {}, "sequence 1 has '1' at position 2, which is no residue"),
        (["MK", ""], {}, "sequence 1 has no residues"),
        (["MK"], {"pools": ["median"]}, "unknown pool 'median'; choose from mean, max, cls, std"),
        (["MK"], {"pools": []}, "names nothing, or something twice"),
        (["MK"], {"pools": ["max", "max"]}, "names nothing, or something twice"),
        (["MK"], {"pools": ["max"], "per_residue": True}, "no pools can be asked for"),
        (["MK"], {"layers": []}, "names nothing, or something twice"),
        (["MK"], {"layers": [4]}, "layer 4 is not one of the model's hidden states, 0 to"),
        (["MK"], {"layers": [-5]}, "layer -5 is not one of"),
        (["MK"], {"layers": [1, 2, 1]}, "names nothing, or something twice"),
        (["MK"], {"long": "cut"}, "long='cut' is unknown; choose one of window, truncate, skip, error"),
        (["MK"], {"long": "skip"}, "long='skip' would leave sequences without a result"),
        (["MK"], {"max_residues": 0}, "max_residues=0 must be at least 1"),
        (["MK"], {"max_residues": 5, "overlap": 5}, "an overlap of 5 residues does not fit windows of 5"),
        (["MK"], {"max_residues": 5, "overlap": -1}, "an overlap of -1 residues does not fit"),
    ],
)
def test_what_cannot_be_embedded(pair, sequences, options, said):
    with pytest.raises(ValueError, match=said):
        biote.embed(pair.model, sequences, **options)


def test_models_that_cannot_embed(pair):
    with pytest.raises(ValueError, match=r"training mode, with dropout: call model.eval\(\) first"):
        biote.embed(pair.port.classes["AutoModel"](pair.model.config).train(), ["MK"])
    with pytest.raises(ValueError, match=r"Linear is no model of a port: biote.load gives one"):
        biote.embed(torch.nn.Linear(2, 2).eval(), ["MK"], tokenizer=pair.port.build_tokenizer())
    cells = port_named("geneformer")
    with pytest.raises(ValueError, match="GeneformerTEModel has no tokenizer of text: pass one"):
        biote.embed(cells.classes["AutoModel"](cells.config_class(engine="torch", **SHAPE)).eval(), ["MK"])


def test_a_head_does_not_matter(pair):
    np.testing.assert_array_equal(biote.embed(pair.model.base_model, TEXTS), biote.embed(pair.model, TEXTS))


@pytest.mark.parametrize("per_residue", [False, True])
def test_memory_that_runs_out(pair, monkeypatch, per_residue):
    """On a device that holds 30 tokens: every sequence has its result; one of 34 residues is named, or cut."""
    expected = biote.embed(pair.model, TEXTS, per_residue=per_residue, max_residues=25)
    seen, real = [], embed_module.packed

    def packed(rows: list[np.ndarray], device: Any) -> dict[str, Any]:
        seen.append(sum(map(len, rows)))
        if seen[-1] > 30:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(rows, device)

    monkeypatch.setattr(embed_module, "packed", packed)
    found = biote.embed(pair.model, TEXTS, per_residue=per_residue, batch_tokens=1000, max_residues=25)
    assert max(seen) > 30
    for array, reference in zip(found, expected, strict=True):
        np.testing.assert_allclose(array, reference, **CLOSE)
    tokenizer = pair.port.build_tokenizer()
    for most in (None, 29):
        wanted = Wanted(per_residue=per_residue, max_residues=most)
        embedder = Embedder(pair.model, *special_ids(tokenizer), wanted, 1000)
        with pytest.raises(SequenceTooLongError) as stopped:
            embedder(tokenize(tokenizer, [TEXTS[1], TEXTS[5], TEXTS[2]]))
        assert stopped.value.row == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_pooled_in_float32(pair, dtype):
    """Residues' states have the model's precision; what is made of many of them has no more error than one."""
    model = convert_model(pair.port, pair.original, TE, {"engine": "torch"}).eval().to(dtype)
    residues = biote.embed(model, TEXTS, per_residue=True)
    assert residues[0].dtype == np.float32
    for name, expected in (("mean", np.mean), ("std", np.std)):
        exact = [expected(array.astype(np.float64), 0) for array in residues]
        np.testing.assert_allclose(biote.embed(model, TEXTS, pools=[name]), exact, rtol=1e-5, atol=1e-5)


def test_the_mean_of_a_very_long_sequence():
    """Titin has 34,350 residues: their sum in float32 keeps six digits."""
    states = torch.randn(40_000, 8, generator=torch.Generator().manual_seed(0)) + 3
    for name, expected in (("mean", states.double().mean(0)), ("std", states.double().std(0, correction=0))):
        found = pool(name, None, states, [40_000])[0]
        assert float((found - expected).abs().max()) < 2e-5, name


# biote.load


def test_load_by_tag(hub_cache, monkeypatch, tiny_original):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", hub_cache["HF_HUB_CACHE"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    by_folder = biote.load(tiny_original)[0].state_dict()
    for name in ("esm2_t6_8M_UR50D", "facebook/esm2_t6_8M_UR50D"):
        model, tokenizer = biote.load(name)
        assert all(torch.equal(tensor, by_folder[key]) for key, tensor in model.state_dict().items())
        assert (model.training, model.config.engine, tokenizer("MK")["input_ids"]) == (False, "torch", [0, 20, 15, 2])
    with pytest.raises(FileNotFoundError, match="did you mean esm2_t6_8M_UR50D"):
        biote.load("esm2_t6_8M")


@pytest.mark.parametrize("layout", ["hf", "te", "nvidia"])
def test_load_a_folder_of_any_format(tmp_path, pair, layout):
    masked = pair.port.classes["AutoModelForMaskedLM"](pair.model.config).eval()
    randomize(masked, 1).float().save_pretrained(tmp_path / "te")
    if layout != "te":
        convert_folder(tmp_path / "te", tmp_path / layout, layout)
    model, tokenizer = biote.load(tmp_path / layout)
    assert type(model) is type(masked)
    assert tokenizer.get_vocab() == pair.port.build_tokenizer().get_vocab()
    expected = biote.embed(masked, TEXTS)
    np.testing.assert_allclose(biote.embed(model, TEXTS), expected, rtol=1e-5, atol=1e-6)
    base, _ = biote.load(tmp_path / layout, "embedding")
    assert type(base) is pair.port.classes["AutoModel"]
    np.testing.assert_allclose(biote.embed(base, TEXTS), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("task", "auto"),
    [
        (None, "AutoModelForMaskedLM"),
        ("embedding", "AutoModel"),
        ("masked-lm", "AutoModelForMaskedLM"),
        ("token-classification", "AutoModelForTokenClassification"),
        ("sequence-classification", "AutoModelForSequenceClassification"),
    ],
)
def test_load_for_a_task(tiny_original, task, auto):
    assert type(biote.load(tiny_original, task)[0]) is port_named("esm2").classes[auto]


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", torch.float16, "auto", None])
def test_load_in_a_dtype(tiny_original, dtype):
    """A CPU keeps the checkpoint's own, here float32."""
    expected = torch.float32 if dtype in ("auto", None) else getattr(torch, str(dtype).removeprefix("torch."))
    model, _ = biote.load(tiny_original, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}


def test_load_a_model_of_cells(root):
    model, tokenizer = biote.load(root / "models" / "geneformer" / "tests" / "golden")
    assert tokenizer is None
    assert type(model) in port_named("geneformer").classes.values()


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"task": "folding"}, ValueError, "unknown task 'folding'; choose one of embedding, masked-lm, "),
        ({"dtype": "int8"}, ValueError, "unknown dtype 'int8'; choose one of auto, float64, "),
        ({"dtype": torch.int8}, ValueError, "unknown dtype 'int8'"),
        ({"engine": "jax"}, ValueError, "jax"),
        ({"dtype": "fp8"}, (ValueError, RuntimeError), "fp8"),
        ({"port_name": "esm3"}, ValueError, "unknown port 'esm3'"),
        ({"port_name": "amplify"}, ValueError, "model_type 'esm' fits no port"),
        ({"subfolder": "x"}, FileNotFoundError, "x is not a folder"),
    ],
)
def test_what_cannot_be_loaded(tiny_original, options, error, said):
    with pytest.raises(error, match=said):
        biote.load(tiny_original, **options)


def test_load_from_nowhere(tmp_path, pair):
    with pytest.raises(FileNotFoundError, match=r"is neither a folder, nor a known tag, nor a Hub id"):
        biote.load(tmp_path / "nothing here")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        biote.load(tmp_path)
    pair.model.base_model.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"lm_head|head"):
        biote.load(tmp_path / "base", "masked-lm")
