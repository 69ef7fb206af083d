"""What a browser would load from a page, and what it would run."""

import html.parser


class Links(html.parser.HTMLParser):
    """Collects addresses, identifiers, and elements that load or run something."""

    def __init__(self):
        super().__init__()
        self.found, self.identifiers, self.scripts, self.texts = [], [], [], []
        self._script = None

    def handle_starttag(self, tag, attributes):
        if tag in {"link", "iframe", "object", "embed", "base"}:
            self.found.append(tag)
        if tag == "script":
            self._script = dict(attributes).get("type", "text/javascript")
        for name, value in attributes:
            if name in {"src", "href", "srcset", "data", "xlink:href", "poster", "action"}:
                self.found.append(value)
            if name.startswith("on"):
                self.found.append(f"{name}={value}")
            if name == "id":
                self.identifiers.append(value)

    def handle_data(self, data):
        if self._script is not None:
            self.scripts.append((self._script, data))
        else:
            self.texts.append(data)

    def handle_endtag(self, tag):
        if tag == "script":
            self._script = None


def read_links(page):
    """Read a page."""
    links = Links()
    links.feed(page)
    return links
