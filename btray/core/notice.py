"""What pages, pictures and messages say alike: the sentence for every user of a result, and shares in percent."""

NOTICE = "This supports a reader; it is not a diagnosis."


def percent(share: float, decimals: int = 1) -> str:
    """Return a share from 0 to 1 as text, in messages, pages and pictures alike."""
    return f"{100 * share:.{decimals}f} %"
