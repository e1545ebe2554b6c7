"""The sentence that every user of a result reads."""

NOTICE = "This supports a reader; it is not a diagnosis."
