# SPDX-License-Identifier: Apache-2.0
"""What all pages have: a head in which everything is that they need, and a foot that says who made them."""

from __future__ import annotations

from importlib.resources import files
from typing import Final

from virtiova import __version__
from virtiova.report.markup import Markup, join, tag

# Nothing may be loaded, from wherever: all is in the page.
_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def resource(name: str) -> str:
    """A style sheet or script of ours."""
    return files("virtiova.report").joinpath(name).read_text("utf-8")


def head(title: str, *styles: str) -> Markup:
    """The head, with these style sheets in it."""
    return join(
        Markup("<head>\n"),
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup("".join(map(resource, styles)))),
        Markup("</head>\n"),
    )


def footer(made: str) -> Markup:
    """``made``: when and by which command."""
    return tag("footer", tag("p", " · ".join(filter(None, (f"virtiova {__version__}", made))), class_="soft"))
