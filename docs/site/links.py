"""Every link within the built site leads somewhere, anchors too: python docs/site/links.py build/site."""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The anchors of a page, and where it leads to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str | None] = {"", "__top"}
        self.links: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.anchors |= {given.get("id"), given.get("name")}
        self.links += [link for name in ("href", "src") if (link := given.get(name))]


def broken(site: Path) -> list[str]:
    """What leads nowhere, with the page that it is on."""
    pages = {path.resolve(): Page(path) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or path.name == "404.html":  # the last has the server's own paths
                continue
            to = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            to = to / "index.html" if to.is_dir() else to
            if not to.is_file() or (to in pages and unquote(parts.fragment) not in pages[to].anchors):
                found.append(f"{path.relative_to(site.resolve())}: {link}")
    return found


if __name__ == "__main__":
    sys.exit("\n".join(broken(Path(sys.argv[1]))) or None)
