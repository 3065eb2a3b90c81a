"""The tokenizer of ESM-2: one token per residue."""

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

RESIDUES = "LAGVSERTIDPKQNFYMHWCXBUZO.-"
VOCABULARY = ["<cls>", "<pad>", "<eos>", "<unk>", *RESIDUES, "<null_1>", "<mask>"]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer of ESM-2 from Meta's ESM-2 vocabulary of 33 tokens, without reading any file.

    It gives the ids that `transformers.EsmTokenizer` gives: `<cls> text <eos>`, or `<cls> text <eos> pair <eos>`.
    Case matters. White space only separates, so `LA G` equals `LAG`. A run of characters outside the vocabulary, up
    to white space or the next known token, is one `<unk>`. Special tokens written in the text are recognised.
    """
    # Unigram fuses a run of unknown characters into one <unk>; no two tokens overlap, so one score fits them all.
    tokenizer = Tokenizer(models.Unigram([(token, 0.0) for token in VOCABULARY], unk_id=VOCABULARY.index("<unk>")))
    # For Python, and so for EsmTokenizer, the four separators \x1c to \x1f are white space too; for \s they are not.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\x1c-\x1f]+"), "removed")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<cls> $A <eos>",
        pair="<cls> $A <eos> $B:1 <eos>:1",
        special_tokens=[(token, VOCABULARY.index(token)) for token in ("<cls>", "<eos>")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        cls_token="<cls>",
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        mask_token="<mask>",
    )
