"""The tokenizer of AMPLIFY: one token per residue."""

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<unk>", "<mask>", "<bos>", "<eos>"]
VOCABULARY = [*SPECIAL, "|", *"LAGVSERTIDPKQNFYMHWCB"]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer of AMPLIFY from the published vocabulary of 27 tokens, without reading any file.

    It gives `<bos> text <eos>`. Each character outside the vocabulary, among them X, U, Z, O, - and small letters, is
    one `<unk>`; white space only separates. Special tokens written in the text are recognised.
    """
    ids = {token: number for number, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\s+"), "removed"), pre_tokenizers.Split(Regex("."), "isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>",
        pair="<bos> $A <eos> $B:1 <eos>:1",
        special_tokens=[(token, ids[token]) for token in ("<bos>", "<eos>")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        bos_token="<bos>",
        eos_token="<eos>",
    )
