"""Draws the pictures of docs/images that are described by text: NAME.toml becomes NAME.svg.

    python tools/draw.py            draws
    python tools/draw.py --check    fails unless every picture is what its text describes

A picture with `rows` shows layers: each row has boxes from left to right, or is a `border`, which
is a thick line. A picture with `steps` shows a sequence of calls: each lane is a part of the
program, and each step is an arrow from one lane to another, or a note on a lane.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

IMAGES = Path(__file__).parent.parent / "docs" / "images"

# The paper is part of the picture, so that it can be read on light and on dark pages.
PAPER, INK, FAINT = "#ffffff", "#1f2430", "#9aa3b2"
FILLS = {"ours": "#dbe7ff", "theirs": "#f3e8d6", "public": "#d9f0dd"}
FONT = "font-family='system-ui, sans-serif' font-size='13'"
LINE = 17  # from one line of text to the next


def text(
    x: float, y: float, lines: list[str], anchor: str = "middle", bold: int = 0, fill: str = INK
) -> Iterator[str]:
    """Lines of text; the first `bold` of them in bold."""
    for number, line in enumerate(lines):
        weight = " font-weight='bold'" if number < bold else ""
        yield (
            f"<text x='{x:g}' y='{y + number * LINE:g}' text-anchor='{anchor}' fill='{fill}'"
            f"{weight}>{escape(line)}</text>"
        )


def box(x: float, y: float, width: float, height: float, fill: str) -> str:
    return (
        f"<rect x='{x:g}' y='{y:g}' width='{width:g}' height='{height:g}' rx='6' fill='{fill}'"
        f" stroke='{FAINT}'/>"
    )


def arrow(x1: float, y1: float, x2: float, y2: float, dashed: bool = False) -> str:
    dash = " stroke-dasharray='5 4'" if dashed else ""
    return (
        f"<line x1='{x1:g}' y1='{y1:g}' x2='{x2:g}' y2='{y2:g}' stroke='{INK}'{dash}"
        " marker-end='url(#head)'/>"
    )


def sheet(title: str, width: float, height: float, content: list[str]) -> str:
    head = (
        "<marker id='head' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='8' markerHeight='8'"
        f" orient='auto'><path d='M0 0 L8 4 L0 8 z' fill='{INK}'/></marker>"
    )
    return "\n".join(
        [
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width:g} {height:g}' {FONT}>",
            f"<title>{escape(title)}</title>",
            f"<defs>{head}</defs>",
            f"<rect width='{width:g}' height='{height:g}' rx='10' fill='{PAPER}'/>",
            *content,
            "</svg>\n",
        ]
    )


# ---- Layers --------------------------------------------------------------------------------------


def layers(picture: dict[str, Any]) -> str:
    width, margin, gap = 860, 20, 10
    y = margin
    drawn: list[str] = []
    for row in picture["rows"]:
        if "border" in row:
            drawn.append(
                f"<line x1='{margin}' y1='{y + 13}' x2='{width - margin}' y2='{y + 13}'"
                f" stroke='{INK}' stroke-width='2'/>"
            )
            label = f"  {row['border']}  "
            half = 3.6 * len(label)
            drawn.append(
                f"<rect x='{width / 2 - half:g}' y='{y}' width='{2 * half:g}' height='26'"
                f" fill='{PAPER}'/>"
            )
            drawn += text(width / 2, y + 18, [label.strip()], bold=1)
            y += 26 + gap
            continue
        shares = [each.get("share", 1) for each in row["boxes"]]
        room = width - 2 * margin - gap * (len(shares) - 1)
        wrapped = [
            textwrap.wrap(each.get("text", ""), int(room * share / sum(shares) / 6.9))
            for each, share in zip(row["boxes"], shares, strict=True)
        ]
        height = 16 + LINE * (1 + max(len(lines) for lines in wrapped))
        x: float = margin
        for each, share, lines in zip(row["boxes"], shares, wrapped, strict=True):
            wide = room * share / sum(shares)
            drawn.append(box(x, y, wide, height, FILLS[each.get("kind", "ours")]))
            drawn += text(x + wide / 2, y + 21, [each["name"], *lines], bold=1)
            x += wide + gap
        y += height + gap
    return sheet(picture["title"], width, y - gap + margin, drawn)


# ---- Sequences of calls --------------------------------------------------------------------------


def sequence(picture: dict[str, Any]) -> str:
    lanes: list[dict[str, Any]] = picture["lanes"]
    pitch, top = picture.get("pitch", 165), 20
    width = pitch * len(lanes) + 20
    names = [lane["name"] for lane in lanes]
    middle = {name: 10 + pitch * (number + 0.5) for number, name in enumerate(names)}
    head = 16 + LINE * max(1 + len(lane.get("text", [])) for lane in lanes)

    y: float = top + head + 12
    steps: list[str] = []
    for step in picture["steps"]:
        lines: list[str] = step["text"]
        height = LINE * len(lines)
        if "at" in step:
            wide = max(7.2 * max(map(len, lines)) + 16, 60)
            x = min(max(middle[step["at"]] - wide / 2, 10), width - 10 - wide)
            steps.append(box(x, y, wide, height + 10, FILLS["public"]))
            steps += text(x + wide / 2, y + 17, lines)
            y += height + 22
            continue
        begin, end = middle[step["from"]], middle[step["to"]]
        right = end > begin
        # The words stand above the arrow's tail, on paper, since lanes may cross them.
        wide = 6.7 * max(map(len, lines)) + 4
        x = min(begin + 8, width - 8 - wide) if right else max(begin - 8 - wide, 8)
        steps.append(
            f"<rect x='{x - 2:g}' y='{y:g}' width='{wide:g}' height='{height:g}' fill='{PAPER}'/>"
        )
        steps += (
            text(x, y + 13, lines, "start") if right else text(x + wide - 4, y + 13, lines, "end")
        )
        y += height + 5
        steps.append(arrow(begin, y, end, y, step.get("reply", False)))
        y += 14
    bottom = y + 6

    drawn = [
        f"<line x1='{x:g}' y1='{top + head}' x2='{x:g}' y2='{bottom:g}' stroke='{FAINT}'/>"
        for x in middle.values()
    ]
    for lane in lanes:
        x = middle[lane["name"]]
        drawn.append(box(x - pitch / 2 + 6, top, pitch - 12, head, FILLS[lane.get("kind", "ours")]))
        drawn += text(x, top + 21, [lane["name"], *lane.get("text", [])], bold=1)
    return sheet(picture["title"], width, bottom + 14, drawn + steps)


def main() -> int:
    wrong = 0
    for source in sorted(IMAGES.glob("*.toml")):
        picture = tomllib.loads(source.read_text())
        drawn = layers(picture) if "rows" in picture else sequence(picture)
        target = source.with_suffix(".svg")
        if "--check" not in sys.argv[1:]:
            target.write_text(drawn)
        elif not target.exists() or target.read_text() != drawn:
            print(f"{target} is not what {source.name} describes: run python tools/draw.py")
            wrong += 1
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
