"""What jobs that draw have in common."""


def require_matplotlib(what_needs_it: str) -> None:
    """ImportError, which begins with `what_needs_it` and says what to install, where matplotlib is not."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{what_needs_it} matplotlib: pip install 'biote[plot]'") from error
