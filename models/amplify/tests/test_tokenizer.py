import pytest
from transformers import AutoTokenizer

from biote_amplify import build_tokenizer

BOS, EOS, UNK = 3, 4, 1


@pytest.fixture(scope="module", params=["built", "saved"])
def tokenizer(request, tmp_path_factory):
    built = build_tokenizer()
    if request.param == "built":
        return built
    folder = tmp_path_factory.mktemp("tokenizer")
    built.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_ids_as_published(tokenizer):
    vocabulary = ["<pad>", "<unk>", "<mask>", "<bos>", "<eos>", "|", *"LAGVSERTIDPKQNFYMHWCB"]
    assert tokenizer.convert_ids_to_tokens(range(27)) == vocabulary
    assert len(tokenizer) == 27
    assert tokenizer("KA<mask>ISQ", add_special_tokens=False)["input_ids"] == [17, 7, 2, 14, 10, 18]
    assert tokenizer("KA<mask>ISQ")["input_ids"] == [BOS, 17, 7, 2, 14, 10, 18, EOS]


@pytest.mark.parametrize("text", ["X", "U", "Z", "O", "-", "k", "1", "é", "中", "*"])
def test_each_other_character_is_one_unknown(tokenizer, text):
    assert tokenizer(f"K{text}{text}A")["input_ids"] == [BOS, 17, UNK, UNK, 7, EOS]


def test_white_space_separates_and_special_tokens_are_read(tokenizer):
    assert tokenizer("K A\nI")["input_ids"] == tokenizer("KAI")["input_ids"]
    assert tokenizer("K|A<eos>")["input_ids"] == [BOS, 17, 5, 7, EOS, EOS]
    assert tokenizer("")["input_ids"] == [BOS, EOS]


def test_padding(tokenizer):
    batch = tokenizer(["KA", "KAISQ"], padding=True)
    assert batch["input_ids"][0] == [BOS, 17, 7, EOS, 0, 0, 0]
    assert batch["attention_mask"] == [[1, 1, 1, 1, 0, 0, 0], [1] * 7]
    assert tokenizer.mask_token_id == 2
