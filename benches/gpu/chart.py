"""The measurement as a chart: how many times as fast as each other contender candle-norm is.

A dot plot over a logarithmic axis: a line for each row and figure, a mark for each contender, and how
near the op comes to the bandwidth of a copy in words behind it.
"""

import html
import math

LEFT, WIDTH, TOP, STEP = 400, 640, 92, 20
MARKS = {
    "torch": "#d9480f",
    "torch without cuDNN": "#f08c00",
    "torch.compile": "#9c36b5",
    "Liger": "#2b8a3e",
    "Quack": "#0b7285",
    "candle-nn": "#1f77b4",
}
TICKS = (0.5, 0.8, 1, 1.25, 2, 4, 8, 16, 32, 64)


def svg(lines, about):
    known = [v for line in lines for k, v in line.items() if k.endswith(" ratio") and k[:-6] in MARKS]
    low = math.log(min([0.8, *known]) * 0.93)
    high = math.log(max([4.0, *known]) * 1.1)
    x = lambda ratio: LEFT + (math.log(ratio) - low) / (high - low) * WIDTH
    body, y = [], TOP
    for line in lines:
        y += STEP
        body.append(f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{y}" y2="{y}" stroke="#e4e4e4"/>')
        last = " channels-last" if line.get("layout") == "last" else ""
        label = f"{line['norm']} {line['shape']} {line['dtype']}{last}, {line['figure']}"
        body.append(text(LEFT - 10, y + 4, label, "end"))
        for name, color in MARKS.items():
            ratio = line.get(f"{name} ratio")
            if ratio:
                body.append(f'<circle cx="{x(ratio):.1f}" cy="{y}" r="5" fill="{color}"/>')
        share = line.get("share of copy bandwidth")
        words = f"{share:.0%} of copy" if share else "not measured"
        body.append(text(LEFT + WIDTH + 10, y + 4, words, "start"))
    bottom = y + STEP
    axis = []
    for tick in TICKS:
        if low <= math.log(tick) <= high:
            color, stroke = ("#222", 1.5) if tick == 1 else ("#d0d0d0", 1)
            axis.append(
                f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{TOP + 4}" y2="{bottom}" '
                f'stroke="{color}" stroke-width="{stroke}"/>'
            )
            axis.append(text(x(tick), bottom + 16, f"{tick:g}x", "middle"))
    legend, at = [], 20
    measured = {name: color for name, color in MARKS.items() if any(line.get(f"{name} ratio") for line in lines)}
    for name, color in measured.items():
        legend.append(f'<circle cx="{at + 6}" cy="72" r="5" fill="{color}"/>')
        legend.append(text(at + 16, 76, name, "start"))
        at += 40 + 7 * len(name)
    width, height = LEFT + WIDTH + 130, bottom + 34
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12" fill="#222">',
            '<rect width="100%" height="100%" fill="#fff"/>',
            '<text x="20" y="28" font-size="17" font-weight="bold">'
            "candle-norm on a GPU: times as fast as the others</text>",
            text(20, 50, f"{about['name']}, torch {about['torch']}, {about['date']}; right of 1x candle-norm is faster"),
            *legend,
            *axis,
            *body,
            "</svg>\n",
        ]
    )


def text(x, y, words, anchor="start"):
    return f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}">{html.escape(words)}</text>'
