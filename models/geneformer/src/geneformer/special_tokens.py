"""What differs between the vocabularies of V1 and V2: the tokens that are no genes."""

SPECIAL_TOKENS = {"V1": ("<pad>", "<mask>"), "V2": ("<pad>", "<mask>", "<cls>", "<eos>")}


def special_tokens(version: str) -> dict[str, int]:
    """The special tokens' ids, from 0 on; a gene's are larger. ValueError for an unknown version."""
    if version not in SPECIAL_TOKENS:
        raise ValueError(f"version={version!r} is unknown; choose one of {', '.join(SPECIAL_TOKENS)}")
    return {token: number for number, token in enumerate(SPECIAL_TOKENS[version])}
