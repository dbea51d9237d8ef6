"""Say in a line what went wrong."""


def reason(error: BaseException) -> str:
    """An exception's text in one line of at most 300 characters, or its name."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
