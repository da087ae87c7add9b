"""The comparison as a chart: how many times as fast as PyTorch, a line per shape, a mark per figure."""

import math
from html import escape

LEFT, WIDTH, BETWEEN, TOP, STEP, GAP = 260, 370, 24, 142, 30, 8
#: From the top of a line to its bottom, so that no mark hides another: figure, column, colour, name.
FIGURES = (
    ("forward", "torch", "#1f77b4", "forward"),
    ("op", "torch", "#d9480f", "the norm's own forward and backward"),
    ("step", "torch", "#2b8a3e", "whole loss.backward() step, candle as published"),
    ("step", "patched torch", "#9c36b5", "whole loss.backward() step, candle patched"),
)
#: Of a norm with what stands around it.
FUSED = (
    ("forward", "torch", "#1f77b4", "forward, beside eager PyTorch"),
    ("forward", "compiled", "#d9480f", "forward, beside torch.compile"),
    ("step", "patched torch", "#2b8a3e", "whole step, candle patched, beside eager PyTorch"),
    ("step", "patched compiled", "#9c36b5", "whole step, candle patched, beside torch.compile"),
)
MALLOCS = {
    "default": "malloc: glibc's as it comes; freed tensors of 32 MiB and more go back to the system, and the next is mapped anew",
    "neutral": "malloc: glibc's, told to keep what is freed (MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ raised), for both sides",
    "mimalloc": "malloc: mimalloc 3, as Rust's crate of that name has it, for both sides",
    "jemalloc": "malloc: jemalloc 5, told to keep what is freed (dirty_decay_ms:-1), for both sides",
}
DTYPES = ("f32", "bf16")


def ranges(lines, marks):
    """What is drawn: (line, number of the mark, least, median, most)."""
    for line in lines:
        for number, (figure, column, _, _) in enumerate(marks):
            values = [line.get(f"{column} {what}") for what in ("min", "ratio", "max")]
            if figure == line["figure"] and all(values):
                yield line, number, *map(float, values)


class Scale:
    """Wide enough for every range, and for 1."""

    def __init__(self, drawn):
        self.low = math.log10(min([0.8] + [least for _, _, least, _, _ in drawn])) - 0.05
        self.high = math.log10(max([5.0] + [most for *_, most in drawn])) + 0.05

    def x(self, dtype, ratio):
        left = LEFT + DTYPES.index(dtype) * (WIDTH + BETWEEN)
        return left + (math.log10(ratio) - self.low) / (self.high - self.low) * WIDTH


def dot(x, y, color):
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.8" fill="{color}"/>\n'


def text(x, y, words, more=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{escape(words)}</text>\n'


def places(lines):
    """The height of each shape's line."""
    places, y, last = {}, TOP - STEP / 2, None
    for line in lines:
        name = (line["norm"], line["shape"])
        if name not in places:
            y += STEP + (GAP if last not in (None, line["norm"]) else 0)
            places[name] = y
        last = line["norm"]
    return places


def axes(scale, bottom):
    out = ""
    for dtype in DTYPES:
        middle = (scale.x(dtype, 10**scale.low) + scale.x(dtype, 10**scale.high)) / 2
        out += text(middle, TOP - 10, dtype, 'text-anchor="middle" font-weight="bold"')
        for tick in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100):
            if scale.low <= math.log10(tick) <= scale.high:
                color, width = ("#222", 2) if tick == 1 else ("#d0d0d0", 1)
                at = scale.x(dtype, tick)
                out += (
                    f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{bottom}" stroke="{color}" stroke-width="{width}"/>\n'
                ) + text(at, bottom + 16, f"{tick}x", 'text-anchor="middle"')
        out += text(scale.x(dtype, 1), bottom + 34, "candle-norm is faster \N{RIGHTWARDS ARROW}")
    return out


def head(threads, malloc, marks):
    out = text(
        20,
        28,
        "How many times as fast as PyTorch 2.11 candle-norm is, on the CPU",
        'font-size="17" font-weight="bold"',
    )
    words = f"{threads} thread{'s' if threads > 1 else ''}; right of 1x: candle-norm is faster. A mark is the median of the rounds, its line their range."
    out += text(20, 50, words) + text(20, 68, MALLOCS[malloc])
    for number, (_, _, color, name) in enumerate(marks):
        x, y = 30 + number % 2 * 330, 86 + number // 2 * 18
        out += dot(x, y, color) + text(x + 9, y + 4, name)
    return out


def svg(lines, threads, malloc, marks):
    drawn, heights = list(ranges(lines, marks)), places(lines)
    scale, bottom = Scale(drawn), max(heights.values(), default=TOP) + STEP / 2 + 4
    width = LEFT + 2 * WIDTH + BETWEEN + 30
    body = ""
    for (norm, shape), y in heights.items():
        for dtype in DTYPES:
            ends = scale.x(dtype, 10**scale.low), scale.x(dtype, 10**scale.high)
            body += f'<line x1="{ends[0]:.1f}" x2="{ends[1]:.1f}" y1="{y}" y2="{y}" stroke="#f2f2f2" stroke-width="26"/>\n'
        body += text(LEFT - 10, y + 4, f"{norm} {shape}", 'text-anchor="end"')
    body += axes(scale, bottom)
    for line, number, least, ratio, most in drawn:
        y, color = heights[(line["norm"], line["shape"])] + 6.4 * (number - 1.5), marks[number][2]
        place = lambda ratio: scale.x(line["dtype"], ratio)
        body += (
            f'<line x1="{place(least):.1f}" x2="{place(most):.1f}" y1="{y:.1f}" y2="{y:.1f}"'
            f' stroke="{color}" stroke-opacity="0.45" stroke-width="2"/>\n'
        ) + dot(place(ratio), y, color)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{bottom + 48}"'
        f' viewBox="0 0 {width} {bottom + 48}" font-family="sans-serif" font-size="12" fill="#222">\n'
        '<rect width="100%" height="100%" fill="#fff"/>\n'
    ) + head(threads, malloc, marks) + body + "</svg>\n"
