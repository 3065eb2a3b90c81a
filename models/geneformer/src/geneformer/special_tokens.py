"""What differs between V1 and V2: the tokens that are no genes, and how many genes of a cell are kept."""

SPECIAL_TOKENS = {"V1": ("<pad>", "<mask>"), "V2": ("<pad>", "<mask>", "<cls>", "<eos>")}
MOST_GENES = {"V1": 2048, "V2": 4094}


def special_tokens(version: str) -> dict[str, int]:
    """The special tokens' ids, from 0 on; a gene's are larger. ValueError for an unknown version."""
    if version not in SPECIAL_TOKENS:
        raise ValueError(f"version={version!r} is unknown; choose one of {', '.join(SPECIAL_TOKENS)}")
    return {token: number for number, token in enumerate(SPECIAL_TOKENS[version])}
