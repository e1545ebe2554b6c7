"""A page as a browser would see it, and input that tries to become mark-up."""

from __future__ import annotations

from html.parser import HTMLParser

HOSTILE = (
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "a|b\n\n# heading [link](https://evil.example) `code` ![x](https://evil.example/x.png)",
    "{{ 7*7 }}{% raw %}",
    "$\\frac{broken$ _\udcff\x00\u202e",
    "_underscored_first",
)


class Page(HTMLParser):
    """The tags and attributes of a page as a browser would see them, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    @property
    def shape(self) -> list[tuple[str, list[str]]]:
        """All tags with the names of their attributes: what stays the same unless input becomes mark-up."""
        return [(tag, sorted(attributes)) for tag, attributes in self.tags]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data
