"""One self-contained HTML page: escaped elements, sortable tables, a style for light, dark, phone and paper."""

import base64
import hashlib
import html
from collections.abc import Iterable, Sequence

_VOID = ("br", "img", "meta")


class Html(str):
    """Text that is HTML already, made by `tag`; any other text is escaped where it enters a page."""

    __slots__ = ()


def tag(name: str, *content: object, **attributes: object) -> Html:
    """An element with escaped content and attributes.

    Parameters
    ----------
    name : of the element.
    content : `Html` stays as it is; None is left out; anything else is turned into text and escaped.
    attributes : a trailing or inner underscore stands for nothing and a hyphen (``class_``, ``data_sort``);
        None and False are left out, True is an attribute without value.
    """
    text = ""
    for key, value in attributes.items():
        if value is not None and value is not False:
            key = key.rstrip("_").replace("_", "-")
            text += f" {key}" if value is True else f' {key}="{html.escape(str(value), quote=True)}"'
    opening = f"<{name}{text}>"
    return Html(opening if name in _VOID else f"{opening}{join(*content)}</{name}>")


def join(*content: object) -> Html:
    """Elements and text one after another; see `tag`."""
    parts = (part for part in content if part is not None)
    return Html("".join(part if isinstance(part, Html) else html.escape(str(part), quote=False) for part in parts))


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[object]],  # cells: (shown, number to sort by), or what is shown
    *,
    numeric: Iterable[int] = (),  # columns of numbers: aligned right
    sortable: bool = False,
    caption: str | None = None,
) -> Html:
    """A table that scrolls sideways by itself where the screen is narrow; a click on a sortable one's head sorts it."""
    numeric = set(numeric)

    def cell(name: str, i: int, value: object) -> Html:
        shown, key = value if isinstance(value, tuple) else (value, None)
        scope = "col" if name == "th" else None
        return tag(name, shown, class_="num" if i in numeric else None, data_sort=key, scope=scope)

    title = (lambda text: tag("button", text, type="button")) if sortable else (lambda text: text)
    body = [tag("tr", *(cell("td", i, value) for i, value in enumerate(row)), "\n") for row in rows]
    return tag(
        "div",
        tag(
            "table",
            tag("caption", caption) if caption else None,
            tag("thead", tag("tr", *(cell("th", i, title(text)) for i, text in enumerate(head)))),
            tag("tbody", "\n", *body),
            class_="sortable" if sortable else None,
        ),
        class_="scroll",
        tabindex="0",
    )


def image(data: bytes, mime: str, alt: str) -> Html:
    """An image that is part of the page, on white paper of its own in any colour scheme."""
    return tag("img", src=f"data:{mime};base64,{base64.b64encode(data).decode()}", alt=alt, class_="paper")


def figure(content: Html, caption: object) -> Html:
    return tag("figure", content, tag("figcaption", caption))


def section(name: str, title: str, *content: object) -> Html:
    return tag("section", tag("h2", title), *content, id=name)


def page(title: str, *content: object) -> Html:
    """The whole document. Its security policy allows nothing from outside, and no script or style but its own."""
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_digest(STYLE)}'; script-src '{_digest(SCRIPT)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name_="color-scheme", content="light dark"),
        tag("title", title),
        Html(f"<style>{STYLE}</style>"),
    )
    body = tag("body", "\n", tag("main", tag("h1", title), *content), "\n", Html(f"<script>{SCRIPT}</script>"))
    return Html(f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


STYLE = """
:root { --ink: #1c1f23; --soft: #5c646e; --line: #d9dde2; --back: #ffffff; --card: #f5f6f8; --blue: #1f5fa8;
  --red: #c8372d; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #a0a8b3; --line: #363c44; --back: #16191d; --card: #1f2429; --blue: #7db2f0;
    --red: #ff8b7f; }
}
* { box-sizing: border-box; }
html { color-scheme: light dark; -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 24px 20px 48px; }
h1 { font-size: 1.7em; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.2em; margin: 40px 0 10px; padding-bottom: 4px; border-bottom: 1px solid var(--line); }
h3 { font-size: 1em; margin: 18px 0 6px; overflow-wrap: anywhere; }
p { margin: 6px 0 10px; max-width: 96ch; }
.soft, figcaption, caption { color: var(--soft); }
.facts { display: flex; flex-wrap: wrap; gap: 10px; margin: 16px 0; padding: 0; list-style: none; }
.facts li { background: var(--card); border-radius: 8px; padding: 8px 14px; min-width: 110px; }
.facts b { display: block; font-size: 1.25em; font-variant-numeric: tabular-nums; }
.facts span { color: var(--soft); font-size: 0.87em; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: 8px 0 14px; }
table { border-collapse: collapse; font-size: 0.92em; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: 4px; }
th, td { text-align: left; padding: 4px 12px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; vertical-align: bottom; }
.num { text-align: right; white-space: nowrap; }
th button { all: unset; cursor: pointer; font: inherit; white-space: nowrap; }
th button:hover, th button:focus-visible { color: var(--blue); text-decoration: underline; }
th[aria-sort="ascending"] button::after { content: " \\25b2"; font-size: 0.7em; }
th[aria-sort="descending"] button::after { content: " \\25bc"; font-size: 0.7em; }
code, pre { font: 0.87em/1.45 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
code { overflow-wrap: anywhere; }
td code { display: inline-block; min-width: 22ch; }
pre { background: var(--card); border-radius: 8px; padding: 10px 12px; margin: 6px 0 12px; white-space: pre-wrap;
  overflow-wrap: anywhere; }
details { margin: 6px 0; }
summary { cursor: pointer; overflow-wrap: anywhere; }
figure { margin: 0; }
figcaption { font-size: 0.87em; margin-top: 4px; overflow-wrap: anywhere; }
img.paper { display: block; max-width: 100%; height: auto; background: #ffffff; border-radius: 6px; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); gap: 20px; }
.stack { display: grid; gap: 22px; }
.small { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 250px), 1fr)); gap: 18px; }
.small svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font: 10px system-ui, sans-serif; }
svg .axis { stroke: var(--line); fill: none; }
svg .ratio { stroke: var(--red); fill: none; stroke-width: 1.6; }
svg .dot { fill: var(--red); }
svg .loss { stroke: var(--blue); fill: none; stroke-width: 1.4; }
svg .level { stroke: var(--soft); stroke-dasharray: 3 3; fill: none; }
.key-ratio { color: var(--red); } .key-loss { color: var(--blue); }
@media (max-width: 600px) { main { padding: 16px 12px 32px; } body { font-size: 14px; } .facts li { flex: 1 1 40%; } }
@media print {
  :root { --ink: #000; --soft: #444; --line: #bbb; --back: #fff; --card: #f3f3f3; --blue: #1f5fa8; --red: #c8372d; }
  main { max-width: none; padding: 0; } body { font-size: 10pt; }
  h2 { break-after: avoid; } figure, tr, .facts li { break-inside: avoid; } .scroll { overflow: visible; }
  th button::after { content: none !important; }
}
"""

SCRIPT = """
"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const compare = new Intl.Collator(undefined, { numeric: true }).compare;
    const key = row => row.cells[column].dataset.sort ?? row.cells[column].textContent;
    const order = (a, b) => {
      const x = key(a), y = key(b);
      if (x === "" || y === "") return (x === "") - (y === "");
      const difference = Number(x) - Number(y);
      return sign * (Number.isNaN(difference) ? compare(x, y) : difference);
    };
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort(order));
  }));
}
"""
