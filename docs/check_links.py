"""Check that every link inside the built site leads to a file and an anchor that exist.

    python docs/check_links.py docs/_build/html

Sphinx checks the references in the sources; this checks what stands in the pages in the end:
navigation, images, scripts, style sheets, downloads. Links to other sites are not followed.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The links and anchors of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors = {"", "top"}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.anchors.add(value)
            elif name in ("href", "src") and value is not None:
                self.links.add(value)
            elif name == "srcset" and value:
                self.links |= {part.split()[0] for part in value.split(",")}


def main(root: Path) -> int:
    # The theme keeps templates among its static files.
    files = (path for path in sorted(root.rglob("*.html")) if "_static" not in path.parts)
    pages = {path: Page(path) for path in files}
    if not pages:
        sys.exit(f"{root} holds no page")
    n_links, broken = 0, []
    for path, page in pages.items():
        for link in sorted(page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            n_links += 1
            place = unquote(parts.path)
            target = (path.parent / place if place else path).resolve()
            if place.startswith("/") or not target.is_file():
                broken.append(f"{path.relative_to(root)}: {link}: no such file")
            elif target in pages and unquote(parts.fragment) not in pages[target].anchors:
                broken.append(f"{path.relative_to(root)}: {link}: no such anchor")
    print(f"{n_links} links in {len(pages)} pages, {len(broken)} broken", *broken, sep="\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
