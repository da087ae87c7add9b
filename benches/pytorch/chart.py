"""The comparison as a chart: how many times as fast as PyTorch, a line per shape, a mark per figure."""

import math
from html import escape

LEFT, WIDTH, TOP, STEP, GAP = 250, 640, 84, 22, 10
COLORS = {"forward": "#1f77b4", "op": "#d9480f", "step": "#2b8a3e"}
NAMES = {"forward": "forward", "op": "op, forward+backward", "step": "whole loss.backward() step"}
#: Marks of one line are set apart a little, so that none hides another.
SHIFT = {"forward": -5, "op": 0, "step": 5}


def mark(x, y, figure, dtype):
    color = COLORS[figure]
    fill = color if dtype == "f32" else "#fff"
    return f'<circle cx="{x:.1f}" cy="{y}" r="4.5" fill="{fill}" stroke="{color}" stroke-width="2"/>\n'


def svg(lines, setting):
    low = math.log10(min([0.8] + [line["torch min"] for line in lines])) - 0.03
    high = math.log10(max([5.0] + [line["torch max"] for line in lines])) + 0.03
    place = lambda ratio: LEFT + (math.log10(ratio) - low) / (high - low) * WIDTH
    body, y, last_norm, last_label = "", TOP, None, None
    for line in lines:
        label = f"{line['norm']} {line['shape']}"
        if label != last_label:
            y += STEP + (GAP if last_norm not in (None, line["norm"]) else 0)
            body += f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{y}" y2="{y}" stroke="#e8e8e8"/>\n'
            body += f'<text x="{LEFT - 10}" y="{y + 4}" text-anchor="end">{escape(label)}</text>\n'
        last_norm, last_label = line["norm"], label
        at = y + SHIFT[line["figure"]]
        color = COLORS[line["figure"]]
        body += (
            f'<line x1="{place(line["torch min"]):.1f}" x2="{place(line["torch max"]):.1f}" y1="{at}" y2="{at}"'
            f' stroke="{color}" stroke-opacity="0.35" stroke-width="2"/>\n'
        )
        body += mark(place(line["torch ratio"]), at, line["figure"], line["dtype"])
    bottom = y + STEP
    out = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 30}" height="{bottom + 34}"'
        f' viewBox="0 0 {LEFT + WIDTH + 30} {bottom + 34}" font-family="sans-serif" font-size="12" fill="#222">\n'
        '<rect width="100%" height="100%" fill="#fff"/>\n'
        f'<text x="20" y="28" font-size="17" font-weight="bold">candle-norm on the CPU: times as fast as'
        f" PyTorch 2.11 ({escape(setting)})</text>\n"
    )
    x = 30
    for figure in ("forward", "op", "step"):
        out += mark(x, 54, figure, "f32") + f'<text x="{x + 10}" y="58">{NAMES[figure]}</text>\n'
        x += 40 + 6.8 * len(NAMES[figure])
    out += f'<text x="{x}" y="58" fill="#777">filled: f32, hollow: bf16; median and range of the rounds</text>\n'
    for tick in (0.2, 0.5, 1, 2, 3, 5, 10, 20, 50, 100):
        if low <= math.log10(tick) <= high:
            color, width = ("#222", 1.5) if tick == 1 else ("#d0d0d0", 1)
            at = place(tick)
            out += (
                f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{TOP + 4}" y2="{bottom}" stroke="{color}" stroke-width="{width}"/>\n'
                f'<text x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">{tick}x</text>\n'
            )
    return out + body + "</svg>\n"
