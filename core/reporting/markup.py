"""HTML by small functions that escape everything which is not markup already.

A template engine would be a dependency of everyone who opens a bundle, for one page; these
forty lines escape by default, which is what one is wanted for.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape


class Html(str):
    """Markup that is safe as it stands. Any other str is text, and is escaped."""

    __slots__ = ()


Child = str | int | None | Iterable["Child"]
VOID = frozenset({"br", "img", "meta", "rect", "circle", "polyline"})


def el(tag: str, *children: Child, **attributes: str | float | bool | None) -> Html:
    """One element. A trailing `_` of an attribute's name is dropped, others become `-`.

    Attributes that are None or False are left out; True stands without a value.
    """
    parts = [f"<{tag}"]
    for key, value in attributes.items():
        name = key.rstrip("_").replace("_", "-")
        if value is True:
            parts.append(f" {name}")
        elif value is not None and value is not False:
            parts.append(f' {name}="{escape(str(value))}"')
    if tag in VOID:
        # With the slash: inside SVG, unlike in HTML, a tag without it stays open.
        parts.append("/>")
    else:
        parts += [">", join(*children), f"</{tag}>"]
    return Html("".join(parts))


def join(*children: Child) -> Html:
    """Children one after another: markup as it is, text escaped, None left out."""
    parts: list[str] = []
    for child in children:
        if isinstance(child, Html):
            parts.append(child)
        elif isinstance(child, str | int):
            parts.append(escape(str(child)))
        elif child is not None:
            parts.append(join(*child))
    return Html("".join(parts))


def code(text: str) -> Html:
    """A name or a digest, in the fixed-width face."""
    return el("code", text)


def section(anchor: str, title: str, *children: Child) -> Html:
    """A part of the page with its heading."""
    heading = el("h2", title, id=f"{anchor}-title")
    return el("section", heading, *children, id=anchor, aria_labelledby=f"{anchor}-title")


def table(
    head: Iterable[Child],
    body: Iterable[Html],
    caption: str,
    kind: str = "",
    numbers: Iterable[int] = (),
) -> Html:
    """A table that scrolls in a box of its own; `body` holds rows, `numbers` right-aligned ones."""
    right = set(numbers)
    cells = [
        el("th", one, scope="col", class_="number" if i in right else None)
        for i, one in enumerate(head)
    ]
    whole = el(
        "table",
        el("caption", caption),
        el("thead", el("tr", cells)),
        el("tbody", list(body)),
        class_=kind or None,
    )
    # Whoever uses a keyboard must be able to scroll it: hence the tab stop, and a name for it.
    return el("div", whole, class_="scroll", tabindex=0, role="region", aria_label=caption)


def row(first: Child, *cells: Child, kind: str = "", numbers: Iterable[int] = ()) -> Html:
    """A table row whose first cell names it."""
    right = set(numbers)
    rest = [
        el("td", one, class_="number" if i in right else None) for i, one in enumerate(cells, 1)
    ]
    return el("tr", el("th", first, scope="row"), rest, class_=kind or None)


def status(word: str) -> Html:
    """A status by sign, word and colour, so that none of them is needed alone."""
    sign = {"passed": "✓", "failed": "✗", "deferred": "…", "info": "i"}.get(word, "?")
    return el(
        "span",
        el("span", sign, class_="sign", aria_hidden="true"),
        word,
        class_=f"status {word.replace(' ', '-')}",
    )


def shorten(digest: str, length: int = 12) -> Html:
    """The start of a digest; the whole of it shows on hovering."""
    return el("code", digest.removeprefix("sha256:")[:length], title=digest)
