"""Checkpoints as other programs write them: right ones are read, with the right values, and wrong ones refused."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, EsmConfig, EsmForMaskedLM, EsmTokenizer

from biote.convert import convert_folder
from biote.files import WEIGHTS, read_json
from biote.port import ModelPort
from biote.testing.contract import randomize
from biote_amplify.modeling_amplify import AMPLIFY, AMPLIFYConfig
from biote_esm2 import Esm2TEForMaskedLM, build_tokenizer
from biote_esm2.tokenizer import VOCABULARY

LM = "AutoModelForMaskedLM"
IDS = torch.tensor([[0, 5, 9, 32, 7, 2], [0, 4, 32, 2, 1, 1]])
MASK = (IDS != 1).long()


@pytest.fixture
def golden(port: ModelPort, root: Path) -> Path:
    """The tiny original of a port."""
    return root / "models" / port.name / "tests" / "golden"


@pytest.fixture
def esm(tmp_path: Path, tiny_original: Path) -> Path:
    """A copy of ESM-2's tiny original, to be changed."""
    shutil.copytree(tiny_original, tmp_path / "esm", ignore=shutil.ignore_patterns("golden*"))
    return tmp_path / "esm"


def edit(folder: Path, *without: str, **changes: Any) -> Path:
    config = {**read_json(folder / "config.json"), **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in without}))
    return folder


def same_tensors(first: Path, second: Path) -> bool:
    one, other = load_file(first / WEIGHTS), load_file(second / WEIGHTS)
    return one.keys() == other.keys() and all(torch.equal(tensor, other[key]) for key, tensor in one.items())


# nulls


@pytest.mark.parametrize(
    "nulls", [{"token_dropout": None}, {"problem_type": None}, {"emb_layer_norm_before": None, "is_decoder": None}]
)
def test_a_null_means_what_it_means_to_esm(esm, tmp_path, nulls):
    edit(esm, **nulls)
    theirs = EsmForMaskedLM.from_pretrained(esm, dtype=torch.float64).eval()
    ours = Esm2TEForMaskedLM.from_original(str(esm), engine="torch", dtype=torch.float64).eval()
    with torch.no_grad():
        reference = theirs(IDS, attention_mask=MASK).logits
        torch.testing.assert_close(
            ours(IDS, attention_mask=MASK).logits[MASK == 1], reference[MASK == 1], rtol=1e-5, atol=1e-8
        )
    convert_folder(esm, tmp_path / "te", "te")
    convert_folder(tmp_path / "te", tmp_path / "back", "hf")
    back = EsmForMaskedLM.from_pretrained(tmp_path / "back", dtype=torch.float64).eval()
    assert all(bool(getattr(back.config, name)) == bool(getattr(theirs.config, name)) for name in nulls)
    with torch.no_grad():
        assert torch.equal(back(IDS, attention_mask=MASK).logits, reference)


@pytest.mark.parametrize("name", ["hidden_size", "layer_norm_eps", "intermediate_size", "vocab_size"])
def test_a_null_that_says_nothing_is_refused(esm, tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} is null"):
        convert_folder(edit(esm, **{name: None}), tmp_path / "te", "te")


def test_token_dropout_has_to_know_its_token(esm, tmp_path):
    with pytest.raises(ValueError, match="token_dropout needs a mask_token_id"):
        convert_folder(edit(esm, mask_token_id=None), tmp_path / "te", "te")
    convert_folder(edit(esm, token_dropout=False), tmp_path / "te", "te")


@pytest.mark.parametrize("name", ["rms_norm", "att_bias", "ffn_bias", "layer_norm_after_embedding"])
def test_a_null_switch_of_amplify_is_off(tmp_path, name):
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    original: Any = randomize(AMPLIFY(AMPLIFYConfig(**shape, **{name: False})), 0)
    original.save_pretrained(tmp_path / "amplify")
    convert_folder(edit(tmp_path / "amplify", **{name: None}), tmp_path / "te", "te")
    convert_folder(tmp_path / "te", tmp_path / "back", "hf")
    assert read_json(tmp_path / "back" / "config.json")[name] is False
    assert same_tensors(tmp_path / "amplify", tmp_path / "back")


def test_a_null_of_ours_comes_back(port, golden, tmp_path):
    convert_folder(golden, tmp_path / "te", "te")
    edit(tmp_path / "te", pad_token_id=None)
    convert_folder(tmp_path / "te", tmp_path / "back", "hf")
    convert_folder(tmp_path / "back", tmp_path / "again", "te")
    for folder in ("back", "again"):
        assert read_json(tmp_path / folder / "config.json")["pad_token_id"] is None
    assert port.config_class.from_pretrained(tmp_path / "again").pad_token_id is None


# spellings


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_dtype_of_transformers_4_is_kept(port, golden, tmp_path, dtype):
    original = shutil.copytree(golden, tmp_path / "original")
    convert_folder(edit(original, "dtype", torch_dtype=dtype), tmp_path / "te", "te")
    assert read_json(tmp_path / "te" / "config.json")["dtype"] == dtype


@pytest.mark.parametrize("dtype", [-0.5, "x", ["float32"], {}, "nn", True])
def test_a_dtype_that_is_none_is_refused(esm, tmp_path, dtype):
    with pytest.raises(ValueError, match=r"config\.json of .*: dtype is "):
        convert_folder(edit(esm, dtype=dtype), tmp_path / "te", "te")


def test_a_whole_number_is_a_float_too(port, golden, tmp_path):
    convert_folder(golden, tmp_path / "te", "te")
    edit(tmp_path / "te", hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    convert_folder(tmp_path / "te", tmp_path / "back", "hf")
    convert_folder(golden, tmp_path / "te2", "te")
    assert same_tensors(tmp_path / "te", tmp_path / "te2")


@pytest.mark.parametrize("wrong", [{"eos_token_id": [2]}, {"eos_token_id": None}])
def test_several_ends_or_none(esm, tmp_path, wrong):
    convert_folder(edit(esm, **wrong), tmp_path / "te", "te")
    convert_folder(tmp_path / "te", tmp_path / "back", "hf")
    assert read_json(tmp_path / "back" / "config.json")["eos_token_id"] == wrong["eos_token_id"]


@pytest.mark.parametrize("auto", ["AutoModelForTokenClassification", "AutoModelForSequenceClassification"])
def test_labels_that_are_only_counted(port, tmp_path, auto):
    if auto not in port.formats["hf"].architectures:
        pytest.skip(f"{port.title}'s original has no such head")
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    model = port.classes[auto](port.config_class(**shape, vocab_size=40, num_labels=5, engine="torch"))
    model.save_pretrained(tmp_path / "te")
    convert_folder(tmp_path / "te", tmp_path / "hf", "hf")
    edit(tmp_path / "hf", "id2label", "label2id", num_labels=5)
    convert_folder(tmp_path / "hf", tmp_path / "again", "te")
    assert same_tensors(tmp_path / "te", tmp_path / "again")
    assert port.config_class.from_pretrained(tmp_path / "again").num_labels == 5


# heads


def test_the_architecture_is_found_by_the_keys(port, tmp_path):
    """With the port named, or by the class; in the original's format and in ours."""
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    for auto, cls in port.classes.items():
        model = cls(port.config_class(**shape, vocab_size=40, num_labels=5, engine="torch"))
        model.save_pretrained(tmp_path / auto)
        if auto not in port.formats["hf"].architectures:
            continue
        convert_folder(tmp_path / auto, tmp_path / f"{auto}-hf", "hf")
        named = read_json(tmp_path / f"{auto}-hf" / "config.json")["architectures"]
        for folder in (edit(tmp_path / auto, "architectures"), edit(tmp_path / f"{auto}-hf", architectures=None)):
            to = "hf" if folder.name == auto else "te"
            convert_folder(folder, tmp_path / f"{folder.name}-2", to, port_name=port.name)
            found = read_json(tmp_path / f"{folder.name}-2" / "config.json")["architectures"]
            assert found == (named if to == "hf" else [cls.__name__])
            with pytest.raises(ValueError, match="architecture None is not supported"):
                convert_folder(folder, tmp_path / "none", to)
        found = cls.from_original(str(tmp_path / f"{auto}-hf"), engine="torch").state_dict()
        assert all(torch.equal(tensor, found[key]) for key, tensor in model.state_dict().items())


def test_keys_that_are_of_no_class_name_no_architecture(esm, tmp_path):
    state = load_file(esm / WEIGHTS)
    save_file({f"x.{key}": tensor for key, tensor in state.items()}, esm / WEIGHTS)
    with pytest.raises(ValueError, match="names no architecture, and the keys of its weights fit no class of ESM-2"):
        convert_folder(edit(esm, "architectures"), tmp_path / "te", "te", port_name="esm2")


def test_contacts_may_be_left_behind_or_missing(esm, tmp_path):
    without = Esm2TEForMaskedLM.from_original(str(esm), engine="torch", contact_head=False)
    assert not any("contact" in key for key in without.state_dict())
    state = load_file(esm / WEIGHTS)
    save_file({key: tensor for key, tensor in state.items() if "contact" not in key}, esm / WEIGHTS)
    convert_folder(esm, tmp_path / "te", "te")
    assert read_json(tmp_path / "te" / "config.json")["contact_head"] is False
    convert_folder(tmp_path / "te", tmp_path / "back", "hf")
    convert_folder(tmp_path / "back", tmp_path / "again", "te")
    assert same_tensors(tmp_path / "te", tmp_path / "again")
    model = Esm2TEForMaskedLM.from_pretrained(tmp_path / "again", engine="torch")
    with pytest.raises(ValueError, match="contact"):
        model.predict_contacts(IDS, MASK)


# files of other programs


def add_copy(state):
    return {**state, "lm_head.decoder.weight": state["model.embeddings.word_embeddings.weight"].clone()}


def only_copy(state):
    state = add_copy(state)
    del state["model.embeddings.word_embeddings.weight"]
    return state


def add_states(state):
    return {**state, "model.layers.0.mlp.fc1._extra_state": torch.zeros(0, dtype=torch.uint8)}


@pytest.mark.parametrize("change", [add_copy, only_copy, add_states])
def test_folders_that_fsdp_deepspeed_and_te_wrote(tiny_original, tmp_path, change):
    convert_folder(tiny_original, tmp_path / "te", "te")
    convert_folder(tmp_path / "te", tmp_path / "expected", "hf")
    save_file(change(load_file(tmp_path / "te" / WEIGHTS)), tmp_path / "te" / WEIGHTS, {"format": "pt"})
    convert_folder(tmp_path / "te", tmp_path / "back", "hf")
    assert same_tensors(tmp_path / "back", tmp_path / "expected")


def test_a_tied_copy_that_differs_is_refused(tiny_original, tmp_path):
    convert_folder(tiny_original, tmp_path / "te", "te")
    state = add_copy(load_file(tmp_path / "te" / WEIGHTS))
    state["lm_head.decoder.weight"][3, 3] += 1
    save_file(state, tmp_path / "te" / WEIGHTS)
    with pytest.raises(ValueError, match=r"word_embeddings\.weight and lm_head\.decoder\.weight are tied, but differ"):
        convert_folder(tmp_path / "te", tmp_path / "back", "hf")


def test_from_original_takes_what_is_converted_already(port, golden, tmp_path):
    cls = port.classes[LM]
    direct = cls.from_original(str(golden), engine="torch")
    convert_folder(golden, tmp_path / "te", "te")
    again = cls.from_original(str(tmp_path / "te"), engine="torch")
    assert again.dtype == direct.dtype
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in direct.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_padding_rows_never_stop_a_cast(port, golden, tmp_path, dtype):
    """Their bias is the lowest number of its dtype, which a smaller one rounds to minus infinity."""
    if "nvidia" not in port.formats:
        pytest.skip(f"{port.title} has no such format")
    convert_folder(golden, tmp_path / "te", "te")
    convert_folder(tmp_path / "te", tmp_path / "nvidia", "nvidia")
    bias = next(t for key, t in load_file(tmp_path / "nvidia" / WEIGHTS).items() if key.endswith("decoder.bias"))
    assert bias[-1] == torch.finfo(torch.float32).min
    convert_folder(tmp_path / "nvidia", tmp_path / "cast", "te", dtype=dtype)
    convert_folder(golden, tmp_path / "expected", "te", dtype=dtype)
    found, expected = load_file(tmp_path / "cast" / WEIGHTS), load_file(tmp_path / "expected" / WEIGHTS)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items() if "inv_freq" not in key)
    convert_folder(tmp_path / "te", tmp_path / "nvidia-cast", "nvidia", dtype=dtype)
    state = load_file(tmp_path / "nvidia-cast" / WEIGHTS)
    assert next(t for key, t in state.items() if key.endswith("decoder.bias"))[-1] == torch.finfo(dtype).min


# numbers that a file does not bear out


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_hidden_layers", 2000), ("num_hidden_layers", 10**6), ("num_hidden_layers", 10**9),
        ("hidden_size", 10**9), ("num_labels", 10**9), ("num_labels", 0), ("num_labels", "two"),
        ("vocab_size", 10**12), ("intermediate_size", 10**12), ("num_attention_heads", 10**9),
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["hf", "te"])
def test_numbers_are_checked_against_the_file(port, golden, tmp_path, name, value, form):
    folder = tmp_path / form
    shutil.copytree(golden, folder) if form == "hf" else convert_folder(golden, folder, "te")
    begun = time.perf_counter()
    with pytest.raises(ValueError, match=r"^config\.json of|mis-shaped") as error:
        convert_folder(
            edit(folder, "id2label", "label2id", **{name: value}), tmp_path / "out", "te" if form == "hf" else "hf"
        )
    assert time.perf_counter() - begun < 3
    assert len(str(error.value)) < 1500


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool])
@pytest.mark.parametrize("form", ["hf", "te"])
def test_weights_are_no_integers(port, golden, tmp_path, dtype, form):
    folder = tmp_path / form
    shutil.copytree(golden, folder) if form == "hf" else convert_folder(golden, folder, "te")
    state = load_file(folder / WEIGHTS)
    key = next(key for key in sorted(state) if state[key].dim() == 2)
    state[key] = state[key].to(dtype)
    save_file(state, folder / WEIGHTS)
    with pytest.raises(ValueError, match=f"holds {str(dtype)[6:]}, where floating-point numbers are due"):
        convert_folder(folder, tmp_path / "out", "te" if form == "hf" else "hf")


@pytest.mark.parametrize("value", [0, -5, 10**400])
def test_positions_that_cannot_be(tmp_path, root, value):
    source = shutil.copytree(root / "models" / "amplify" / "tests" / "golden", tmp_path / "amplify")
    with pytest.raises(ValueError, match=r"config\.json of .*positions cannot be"):
        convert_folder(edit(source, max_length=value), tmp_path / "te", "te")


@pytest.mark.parametrize(
    "wrong",
    [{"initializer_range": float("inf")}, {"layer_norm_eps": float("nan")}, {"label2id": 3.5}, {"id2label": "x"}],
)
@pytest.mark.parametrize("form", ["hf", "te"])
def test_numbers_and_tables_that_are_none(esm, tmp_path, wrong, form):
    if form == "te":
        convert_folder(esm, tmp_path / "te", "te")
    with pytest.raises(ValueError, match=r"^config\.json of .*: \w+ is (inf|nan|3\.5|'x')"):
        convert_folder(
            edit(tmp_path / ("te" if form == "te" else "esm"), **wrong),
            tmp_path / "out",
            "hf" if form == "te" else "te",
        )


def test_many_unknown_keys_are_one_short_line(esm, tmp_path):
    state = {f"stranger.{number}": torch.zeros(1) for number in range(20_000)}
    save_file({**load_file(esm / WEIGHTS), **state}, esm / WEIGHTS)
    begun = time.perf_counter()
    with pytest.raises(ValueError, match=r"20000 problems: unknown stranger.*; and 19990 more$") as error:
        convert_folder(esm, tmp_path / "te", "te")
    assert time.perf_counter() - begun < 10
    assert len(str(error.value)) < 1000


# tokenizers


def write_vocabulary(folder: Path, tokens: list[str]) -> None:
    (folder / "vocab.txt").write_text("\n".join(tokens))


def write_fast(folder: Path, tokens: list[str]) -> None:
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([token for token in tokens if token not in VOCABULARY])
    tokenizer.save_pretrained(folder)
    if tokens[: len(VOCABULARY)] != VOCABULARY:
        content = read_json(folder / "tokenizer.json")
        content["model"]["vocab"] = [[token, 0.0] for token in tokens]
        content["added_tokens"] = []
        (folder / "tokenizer.json").write_text(json.dumps(content))


def test_a_tokenizer_that_agrees_is_no_matter(esm, tmp_path):
    write_vocabulary(esm, VOCABULARY)
    convert_folder(esm, tmp_path / "te", "te")
    convert_folder(tmp_path / "te", tmp_path / "back", "hf")
    for folder in ("te", "back"):
        assert AutoTokenizer.from_pretrained(tmp_path / folder).get_vocab() == build_tokenizer().get_vocab()


@pytest.mark.parametrize("write", [write_vocabulary, write_fast])
@pytest.mark.parametrize(
    "tokens",
    [
        [*VOCABULARY[:4], VOCABULARY[5], VOCABULARY[4], *VOCABULARY[6:]],
        VOCABULARY[:-1],
        [*VOCABULARY, "<new>"],  # without an embedding
    ],
    ids=["swapped", "too few", "no embedding"],
)
def test_a_tokenizer_that_differs_is_refused(esm, tmp_path, tokens, write):
    write(esm, tokens)
    with pytest.raises(ValueError, match=r"the tokenizer of .* is not this model's.*: .* is "):
        convert_folder(esm, tmp_path / "te", "te")


@pytest.mark.parametrize("write", [write_vocabulary, write_fast])
def test_tokens_past_the_ports_are_carried_over(tmp_path, write):
    tokens = [*VOCABULARY, "<sep>", "<domain>", "J"]
    config = EsmConfig(
        vocab_size=36, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        position_embedding_type="rotary", pad_token_id=1, mask_token_id=32, emb_layer_norm_before=False,
    )  # fmt: skip
    EsmForMaskedLM(config).save_pretrained(tmp_path / "hf")
    write(tmp_path / "hf", tokens)
    write_vocabulary(tmp_path, tokens)
    original = EsmTokenizer(tmp_path / "vocab.txt")
    convert_folder(tmp_path / "hf", tmp_path / "te", "te")
    convert_folder(tmp_path / "te", tmp_path / "back", "hf")
    for folder in ("te", "back"):
        carried = AutoTokenizer.from_pretrained(tmp_path / folder)
        for text in ("MKT<sep>AYI<domain>AKQ", "MKJTA", "M<mask>K"):
            assert carried(text)["input_ids"] == original(text)["input_ids"], text


def test_a_tokenizer_that_is_none_is_one_line(esm, tmp_path):
    (esm / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer"):
        convert_folder(esm, tmp_path / "te", "te")


def test_a_tokenizer_knows_how_much_the_model_takes(port, golden, tmp_path):
    if port.build_tokenizer is None:
        pytest.skip(f"{port.title} reads no text")
    convert_folder(golden, tmp_path / "te", "te")
    model: Any = port.classes["AutoModel"].from_pretrained(tmp_path / "te", engine="torch")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "te")
    limit = model.base_model.max_positions
    if limit is None:
        assert tokenizer.model_max_length > 10**20
        return
    assert tokenizer.model_max_length == limit
    batch = tokenizer(["A" * (limit + 50)], truncation=True, return_tensors="pt")
    assert batch["input_ids"].shape == (1, limit)
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
