"""Pages in HTML that need no other file: pictures are in the page itself, and nothing is fetched."""

import io
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

import torch
from PIL import Image
from torch import Tensor

from knlightning.text import printable

THUMBNAIL_SIDE = 256
"""Longest side of the pictures of a gallery, in pixels."""
LARGEST_PIXELATED = 64
"""Smaller images are stored without loss, and shown with sharp pixels."""

STYLE = """
:root { --ink: #1b1f24; --soft: #667080; --line: #e3e6ea; --paper: #fff; --back: #f6f7f9; --good: #2a8a55;
  --bad: #c8382e; --main: #3f51b5 }
* { box-sizing: border-box }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.55 system-ui, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, "Liberation Sans", sans-serif; font-variant-numeric: tabular-nums }
main { max-width: 1080px; margin: 0 auto; padding: 40px 32px 64px }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 6px } h2 { font-size: 19px; margin: 44px 0 14px }
h3 { font-size: 15px; margin: 28px 0 10px } p { margin: 0 0 12px; max-width: 76ch } .soft { color: var(--soft) }
a { color: var(--main) } code, pre { font: 13px/1.5 ui-monospace, "DejaVu Sans Mono", Consolas, monospace }
section, .box { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 22px 26px }
section { margin-top: 22px } section > h2 { margin-top: 0 } section > :last-child { margin-bottom: 0 }
section img.figure { display: block; max-width: 100%; margin: 0 auto }
pre { background: var(--back); border-radius: 6px; padding: 12px 14px; overflow-x: auto; margin: 0 0 12px }
summary { cursor: pointer; color: var(--main) } details[open] summary { margin-bottom: 10px }
table { border-collapse: collapse; width: 100%; margin: 0 0 12px }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: 13px }
th, td { padding: 6px 12px 6px 0; border-bottom: 1px solid var(--line); vertical-align: middle;
  overflow-wrap: anywhere }
.words th, .words td { overflow-wrap: break-word }
td.number, th.number { text-align: right } td.share { min-width: 110px } td .bar { margin: 0 }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 14px; margin: 24px 0 0 }
.facts .box { padding: 14px 18px } .facts b { display: block; font-size: 25px; line-height: 1.25; font-weight: 650 }
.facts span { color: var(--soft); font-size: 13px }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 20px; align-items: center }
.pair.top { align-items: start; margin-top: 16px }
h1 + .gallery { margin-top: 20px }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(154px, 1fr)); gap: 14px }
.gallery.wide { grid-template-columns: repeat(auto-fill, minmax(440px, 1fr)) }
figure { margin: 0; background: var(--paper); border: 1px solid var(--line); border-radius: 8px; overflow: hidden }
figure img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; background: #eceef1 }
.wide figure img { aspect-ratio: auto } img.sharp { image-rendering: pixelated }
figcaption { padding: 8px 10px 10px; font-size: 13px; line-height: 1.4 }
figcaption b { display: block; overflow-wrap: anywhere }
figcaption small { color: var(--soft); overflow-wrap: anywhere }
.bar { position: relative; display: flex; justify-content: space-between; gap: 6px; padding: 1px 6px; margin: 3px 0;
  border-radius: 3px; background: var(--back); z-index: 0; overflow: hidden }
.bar i { position: absolute; inset: 0 auto 0 0; background: #d3d8e0; z-index: -1 }
.bar.main i { background: #c5cdf3 } .bar.good i { background: #b5e0c7 } .bar.bad i { background: #f6c0bb }
.bar span { overflow-wrap: anywhere } .swatch { display: inline-block; width: 12px; height: 12px; margin: 0 5px 0 14px;
  border-radius: 3px; vertical-align: -1px }
@media (max-width: 700px) { main { padding: 20px 14px } .pair { grid-template-columns: 1fr } }
@media print { body { background: #fff } section, figure { break-inside: avoid } }
"""


@dataclass(frozen=True)
class Bar:
    """A probability in a card.

    Attributes:
        name: Name of the class.
        share: In [0, 1].
        kind: Its colour: "main", "good", "bad", or "" for grey.
    """

    name: str
    share: float
    kind: str = ""


@dataclass(frozen=True)
class Card:
    """An image of a gallery.

    Attributes:
        picture: From `thumbnail`.
        title: What is said first.
        bars: Probabilities of classes.
        note: What is said last, such as the name of the file.
    """

    picture: str
    title: str = ""
    bars: Sequence[Bar] = field(default=())
    note: str = ""


def text(value: object) -> str:
    """Make a text from outside fit for a page."""
    return escape(printable(str(value)))


def page(title: str, body: str) -> str:
    """Write a whole page."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<title>{text(title)}</title><style>{STYLE}</style></head>\n'
        f"<body><main>\n{body}\n</main></body></html>\n"
    )


def body_of(html: str) -> str:
    """Return what a page of `page` shows, for another page."""
    return html.partition("<main>\n")[2].rpartition("\n</main>")[0]


def thumbnail(image: Tensor, side: int = THUMBNAIL_SIDE) -> str:
    """Make a small picture.

    Args:
        image: Image (C, H, W) in [0, 1], or in 0 to 255 if it is uint8; C = 1 or 3.
        side: Length of its longer side, if it is longer.

    Returns:
        An `img` element.
    """
    if image.dtype != torch.uint8:
        image = (image.clamp(0, 1) * 255).round().to(torch.uint8)
    drawn = Image.fromarray(image.expand(3, -1, -1).permute(1, 2, 0).contiguous().cpu().numpy())
    drawn.thumbnail((side, side))
    sharp = max(drawn.size) <= LARGEST_PIXELATED
    file = io.BytesIO()
    drawn.save(file, "PNG" if sharp else "JPEG", quality=88)
    return embedded(file.getvalue(), "png" if sharp else "jpeg", ' class="sharp"' if sharp else "")


def embedded(content: bytes, kind: str = "png", attributes: str = ' class="figure"') -> str:
    """Write an `img` element that holds its picture.

    Args:
        content: The file.
        kind: "png" or "jpeg".
        attributes: Further attributes of the element, with a space before each.
    """
    return f'<img alt=""{attributes} src="data:image/{kind};base64,{b64encode(content).decode()}">'


def bar(shown: Bar) -> str:
    """Write a probability as a bar with its name and its value."""
    width = f"{100 * min(max(shown.share, 0.0), 1.0):.1f}%"
    return (
        f'<div class="bar {shown.kind}"><i style="width:{width}"></i><span>{text(shown.name)}</span>'
        f"<span>{shown.share:.0%}</span></div>"
    )


def gallery(cards: Iterable[Card], wide: bool = False) -> str:
    """Write images side by side."""
    figures = []
    for card in cards:
        title = f"<b>{text(card.title)}</b>" if card.title else ""
        note = f"<small>{text(card.note)}</small>" if card.note else ""
        caption = f"<figcaption>{title}{''.join(map(bar, card.bars))}{note}</figcaption>"
        figures.append(f"<figure>{card.picture}{caption}</figure>")
    return f'<div class="gallery{" wide" if wide else ""}">\n' + "\n".join(figures) + "\n</div>"


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Write a table. Floats between 0 and 1 are bars, other numbers stand on the right.

    Args:
        rows: At least one, all with the same keys, which are the heads of the columns.
    """
    heads = "".join(
        f'<th class="number">{text(key)}</th>' if isinstance(value, int) else f"<th>{text(key)}</th>"
        for key, value in rows[0].items()
    )
    lines = ["".join(map(_cell, row.values())) for row in rows]
    return f"<table><tr>{heads}</tr>\n" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "\n</table>"


def facts(values: Mapping[str, str]) -> str:
    """Write a few values in large letters."""
    boxes = "".join(
        f'<div class="box"><b>{text(value)}</b><span>{text(name)}</span></div>' for name, value in values.items()
    )
    return f'<div class="facts">{boxes}</div>'


def legend(names: Sequence[str], colours: Sequence[Sequence[int]]) -> str:
    """Write which colour stands for which class."""
    pairs = zip(names, colours, strict=True)
    swatches = (f'<span class="swatch" style="background:rgb{tuple(c)}"></span>{text(name)}' for name, c in pairs)
    return f"<p>{''.join(swatches)}</p>"


def _cell(value: object) -> str:
    if isinstance(value, float) and 0 <= value <= 1:
        drawn = f'<div class="bar main"><i style="width:{100 * value:.1f}%"></i><span>{value:.3f}</span></div>'
        return f'<td class="share">{drawn}</td>'
    if isinstance(value, int | float):
        return f'<td class="number">{value:,}</td>'
    return f"<td>{text(value)}</td>"
