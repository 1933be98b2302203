"""Draw the pictures of docs/how-it-works.md and docs/architecture.md as SVG, readable in light and in dark mode.

python docs/draw.py
"""

import re
from pathlib import Path

PAGE_OF_ROOMS = Path(__file__).parent / "architecture.md"
IMAGES = Path(__file__).parent / "images"
WORDS = ("the", "old", "cat", "sat", "on", "the", "red", "mat")
CELL = 44
GAP = 4
STYLE = """
  .card { fill: #ffffff } text { font: 14px system-ui, sans-serif; fill: #23313c; text-anchor: middle }
  .left { text-anchor: start } .right { text-anchor: end } .title { font-weight: 600 }
  .small { font-size: 12px } .faint { fill: #5c6b77 }
  .mask { fill: #e4e1da } .clean { fill: #a9cbde } .now { fill: #0b5d8a } .alone { fill: #c4541f }
  .hidden { fill: #f3f1ec } .on-now { fill: #ffffff } .line { stroke: #5c6b77; stroke-width: 1.5; fill: none }
  .kept { stroke: #0b5d8a; stroke-width: 2.5; fill: none } .dropped { stroke: #c4541f; stroke-width: 2.5; fill: none }
  @media (prefers-color-scheme: dark) {
    .card { fill: #1b2329 } text { fill: #dfe6eb } .faint { fill: #9aa9b5 } .mask { fill: #46515a }
    .clean { fill: #2f5d78 } .now { fill: #5bb0dd } .alone { fill: #e58655 } .hidden { fill: #262f36 }
    .on-now { fill: #10171c } .line { stroke: #9aa9b5 } .kept { stroke: #5bb0dd } .dropped { stroke: #e58655 }
  }
"""


class Drawing:
    """An SVG of the given size, with a title for those who cannot see it."""

    def __init__(self, name: str, width: int, height: int, title: str):
        self.name, self.parts = name, []
        self.head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" role="img">\n<title>{title}</title>\n<style>{STYLE}</style>\n'
            f'<rect class="card" width="{width}" height="{height}" rx="10"/>'
        )

    def text(self, x: float, y: float, text: str, style: str = "") -> None:
        self.parts.append(f'<text x="{x:g}" y="{y:g}" class="{style}">{text}</text>')

    def cell(self, x: float, y: float, style: str, text: str = "", size: float = CELL, note: str = "") -> None:
        """A square, with a text inside and a small note in its lower right corner."""
        self.parts.append(f'<rect class="{style}" x="{x:g}" y="{y:g}" width="{size:g}" height="{size:g}" rx="4"/>')
        on = "on-now" if style.split()[0] in ("now", "alone") else ""
        if text:
            self.text(x + size / 2, y + size / 2 + (1 if note else 5), text, f"small {on}")
        if note:
            self.text(x + size - 4, y + size - 5, note, f"small right {on or 'faint'}")

    def path(self, d: str, style: str = "line") -> None:
        self.parts.append(f'<path class="{style}" d="{d}"/>')

    def svg(self) -> str:
        return "\n".join([self.head, *self.parts, "</svg>\n"])


def legend(drawing: Drawing, x: float, y: float, entries: list[tuple[str, str, int]]) -> None:
    """Entries are (style, text, width)."""
    for style, text, width in entries:
        drawing.cell(x, y, style, size=14)
        drawing.text(x + 20, y + 12, text, "left small")
        x += width


def phases() -> Drawing:
    """Both phases on eight tokens: what each forward decodes, and what it is fed."""
    groups = [(5, 1), (7, 2), (0,), (3,), (4,), (6,)]
    drawing = Drawing("phases", 900, 430, "The two phases of generation, and what each forward is fed")
    fed_at = 560
    drawing.text(20 + 110 + 4 * (CELL + GAP), 30, "the text, after each forward", "title")
    drawing.text(fed_at, 30, "what is fed, on top of the cache", "title left")
    decoded, previous = set(), ()
    for index, group in enumerate(groups):
        y = 48 + index * (CELL + GAP) + (18 if index >= 2 else 0)
        drawing.text(20, y + 27, f"forward {index + 1}", "left small")
        is_parallel = index < 2
        for position, word in enumerate(WORDS):
            x = 130 + position * (CELL + GAP)
            if position in group:
                drawing.cell(x, y, "now" if is_parallel else "alone", word)
            elif position in decoded:
                drawing.cell(x, y, "clean", word)
            else:
                drawing.cell(x, y, "mask")
        fed = [("clean", WORDS[position], position) for position in previous]
        fed += [("mask", "m", position) for position in group]
        for slot, (style, text, position) in enumerate(fed):
            drawing.cell(fed_at + slot * (CELL + GAP), y, style, text, note=str(position))
        decoded |= set(group)
        previous = group
    drawing.text(860, 96, "diffusion", "right title")
    drawing.text(860, 114, "phase", "right title")
    drawing.text(860, 250, "sequential", "right title")
    drawing.text(860, 268, "phase", "right title")
    drawing.path("M 20 153 H 880", "line")
    entries = [("mask", "mask", 80), ("clean", "decoded before", 140), ("now", "decoded now, in parallel", 200)]
    legend(drawing, 130, 372, [*entries, ("alone", "decoded now, alone", 160)])
    drawing.text(
        130, 412, "Small numbers: the text position that the model is told with each slot.", "left small faint"
    )
    return drawing


ORDER = (5, 1, 7, 2, 0, 3, 4, 6)


def order() -> Drawing:
    """The same text in text order and in generation order, and who sees whom."""
    drawing = Drawing("order", 900, 330, "Text order and generation order, with causal attention over the slots")
    left, step = 150, CELL + GAP
    drawing.text(20, 77, "text order", "left title")
    drawing.text(20, 95, "position", "left small faint")
    drawing.text(20, 227, "generation", "left title")
    drawing.text(20, 245, "order", "left title")
    drawing.text(20, 263, "slot", "left small faint")
    for position, word in enumerate(WORDS):
        drawing.text(left + position * step + CELL / 2, 44, str(position), "small faint")
        drawing.cell(left + position * step, 54, "clean", word)
    for slot, position in enumerate(ORDER):
        is_parallel = slot < 4
        start, end = left + position * step + CELL / 2, left + slot * step + CELL / 2
        drawing.path(f"M {start:g} 100 C {start:g} 155 {end:g} 145 {end:g} 200", "kept" if is_parallel else "dropped")
        drawing.cell(left + slot * step, 202, "now" if is_parallel else "alone", WORDS[position], note=str(position))
        drawing.text(left + slot * step + CELL / 2, 262, str(slot), "small faint")
    drawing.text(left + 2 * step, 288, "diffusion phase: any order", "small")
    drawing.text(left + 6 * step, 288, "sequential: left to right", "small")
    size, x, y = 24, 640, 70
    drawing.text(x + 4 * (size + 2), 36, "attention: each slot sees itself", "title")
    drawing.text(x + 4 * (size + 2), 54, "and the slots before it", "title")
    for row in range(8):
        drawing.text(x - 8, y + row * (size + 2) + 17, str(row), "small right faint")
        drawing.text(x + row * (size + 2) + size / 2, y + 8 * (size + 2) + 14, str(row), "small faint")
        for column in range(8):
            style = "hidden" if column > row else "now" if row < 4 else "alone"
            drawing.cell(x + column * (size + 2), y + row * (size + 2), style, size=size)
    drawing.text(x + 4 * (size + 2), y + 8 * (size + 2) + 36, "slot seen (columns) by slot (rows)", "small faint")
    return drawing


def two_streams() -> Drawing:
    """The attention mask of a row of the sequential phase in training."""
    size, step, x, y = 30, 32, 240, 90
    num_slots, queried = 8, (4, 5, 6, 7)
    drawing = Drawing("two-streams", 900, 560, "The attention of content and query stream in the sequential phase")
    drawing.text(x + 4 * step, 34, "keys: content, clean tokens", "title")
    drawing.text(x + 10 * step + 14, 34, "keys: queries", "title")
    horizons = [*range(num_slots), *queried]
    for index, slot in enumerate(horizons):
        is_query = index >= num_slots
        shift = 14 if is_query else 0
        label = "m" if is_query else WORDS[ORDER[slot]]
        style = "alone" if is_query else "clean"
        drawing.cell(x + index * step + shift, 46, style, label, size=size)
        drawing.cell(x - step - 8, y + index * step + shift, style, "", size=size)
        drawing.text(x - step - 8 + size / 2, y + index * step + shift + 20, str(slot), f"small {'on-now' * is_query}")
        for key, of_key in enumerate(horizons):
            sees = key == index or (key < num_slots and of_key < slot)
            color = ("alone" if is_query else "now") if sees else "hidden"
            drawing.cell(x + key * step + (14 if key >= num_slots else 0), y + index * step + shift, color, size=size)
    drawing.text(20, y + 4 * step - 8, "content stream:", "left title")
    drawing.text(20, y + 4 * step + 10, "causal over slots", "left small")
    drawing.text(20, y + 10 * step + 6, "query stream:", "left title")
    drawing.text(20, y + 10 * step + 24, "the content before its", "left small")
    drawing.text(20, y + 10 * step + 40, "slot, and itself", "left small")
    side = x + 12 * step + 34
    notes = [
        "Rows: who looks. Columns: at whom.",
        "Numbers: the slot.",
        "",
        "Slots 0 to 3: what the diffusion",
        "phase has decoded, in any order.",
        "Slots 4 to 7: what is left,",
        "from left to right.",
        "",
        "Only the slots that were masked",
        "have a query; the loss is there.",
    ]
    for line, note in enumerate(notes):
        drawing.text(side, 120 + 20 * line, note, "left small")
    legend(
        drawing, x, 518, [("now", "content sees", 120), ("alone", "query sees", 110), ("hidden", "does not see", 100)]
    )
    return drawing


def cache() -> Drawing:
    """Three forwards on the cache: clean tokens are kept, masks dropped."""
    step, x = CELL + GAP, 190
    drawing = Drawing("cache", 900, 400, "The exact cache: clean tokens are kept, masks dropped")
    forwards = [(3, (3, 4), (5, 6, 7)), (5, (5, 6, 7), (8, 9)), (8, (8, 9), (10,))]
    drawing.text(x, 32, "slots in generation order", "left title")
    for slot in range(11):
        drawing.text(x + slot * step + CELL / 2, 54, str(slot), "small faint")
    for index, (cached, clean, masks) in enumerate(forwards):
        y = 64 + index * 96
        drawing.text(20, y + 27, f"forward {['i', 'i+1', 'i+2'][index]}", "left title")
        for slot in range(cached):
            drawing.cell(x + slot * step, y, "clean")
        for slot in clean:
            drawing.cell(x + slot * step, y, "now", f"x{slot}")
        for slot in masks:
            drawing.cell(x + slot * step, y, "mask", "m")
            middle = x + slot * step + CELL / 2
            if index < 2:
                drawing.path(
                    f"M {middle:g} {y + CELL + 4} V {y + 88} M {middle - 5:g} {y + 82} l 5 7 l 5 -7", "dropped"
                )
        if index < 2:
            first, last = x + masks[0] * step, x + masks[-1] * step + CELL
            drawing.text(last + 14, y + 72, "drawn from the logits, in parallel", "left small")
            drawing.text(first - 14, y + 72, "keys and values stay", "right small")
    entries = [("clean", "cached: not computed again", 210), ("now", "fed, clean: keys and values are kept", 260)]
    legend(drawing, 60, 364, [*entries, ("mask", "fed, mask: predicts its own token, then dropped", 300)])
    return drawing


FLOORS = (
    ("entrances",),
    ("the network", "training"),
    ("evaluation", "saving"),
    ("generation",),
    ("parts of the network",),
    ("configuration",),
    ("foundations",),
)


def rooms() -> Drawing:
    """The families of modules on their floors, as the table of docs/architecture.md has them."""
    table = PAGE_OF_ROOMS.read_text(encoding="utf-8").split("\n| family |", 1)[1].split("\n\n", 1)[0]
    cells = [line.strip("|").split("|") for line in table.splitlines()[2:]]
    rooms_of = {family.strip(): re.findall(r"`(\w+)\.py`", rooms) for family, rooms, _ in cells}
    line, margin, gap, width = 20, 20, 26, 900
    per_line = {family: 1 if len(floor) > 1 else 3 for floor in FLOORS for family in floor}
    heights = [max(-(-len(rooms_of[family]) // per_line[family]) for family in floor) * line + 44 for floor in FLOORS]
    drawing = Drawing("rooms", width, sum(heights) + gap * len(FLOORS) + margin, "The rooms of the package, by family")
    y = margin
    for floor, height in zip(FLOORS, heights, strict=True):
        wide = (width - 2 * margin - gap * (len(floor) - 1)) / len(floor)
        for index, family in enumerate(floor):
            x = margin + index * (wide + gap)
            style = "clean" if family in ("the network", "entrances") else "mask"
            drawing.parts.append(
                f'<rect class="{style}" x="{x:g}" y="{y:g}" width="{wide:g}" height="{height:g}" rx="8"/>'
            )
            drawing.text(x + 14, y + 23, family, "left title")
            for number, room in enumerate(rooms_of[family]):
                row, column = divmod(number, per_line[family])
                drawing.text(x + 14 + column * 285, y + 46 + row * line, f"{room}.py", "left small")
        y += height
        if floor is not FLOORS[-1]:
            drawing.path(f"M {width / 2:g} {y + 3:g} v {gap - 8} m -5 -6 l 5 7 l 5 -7")
        y += gap
    return drawing


DRAWINGS = (phases, order, two_streams, cache, rooms)


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    for drawing in (draw() for draw in DRAWINGS):
        (IMAGES / f"{drawing.name}.svg").write_text(drawing.svg(), encoding="utf-8")
        print(f"Wrote docs/images/{drawing.name}.svg")


if __name__ == "__main__":
    main()
