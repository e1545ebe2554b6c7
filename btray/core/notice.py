"""What every user is told: `NOTICE`."""

NOTICE = "This supports a reader; it is no diagnosis."
