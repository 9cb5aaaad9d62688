"""Writes the demo's HTML report: figures, loss curves, and images as tiles with questions and answers.

The report is one file without scripts or outside links. Images are embedded, curves are inline SVG.
"""

from __future__ import annotations

import base64
import html
import importlib.resources
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image, ImageDraw

from nvlm_train.demo.pages import render_page
from nvlm_train.tiling import choose_grid
from nvlm_train.train.tracking.metrics_log import read_metrics

_TILE = 64
_COLOURS = ("#1f6feb", "#d1590c", "#2d8a4e", "#8250df", "#b08800")
_WIDTH, _HEIGHT, _MARGIN = 860, 260, 40
Curve = tuple[str, list[tuple[int, float]]]


_STAGES = (
    "The vision encoder stayed frozen; stage 1 trained the projector, stage 2 the projector and the "
    "language model."
)


def write_report(directory: Path, architecture: str, summary: dict[str, Any]) -> None:
    """Writes DIRECTORY/report.html from summary.json's content and metrics.jsonl."""
    _write(
        directory,
        summary,
        title=f"NVLM-{architecture.upper()} demo",
        intro="Two stages on four CPU processes (tensor parallel 2 x pipeline parallel 2)",
        figures=_figures(summary),
        last="Held-out pages, their tiles and the thumbnail",
        examples="".join(_page(example) for example in summary["page_examples"]),
    )


def write_before_after(directory: Path, architecture: str, summary: dict[str, Any]) -> None:
    """Writes the report of a demo that was asked before training and after."""
    _write(
        directory,
        summary,
        title=f"NVLM-{architecture.upper()} on SmolLM2-135M-Instruct",
        intro="Two stages on two CPU processes (pipeline parallel 2)",
        figures=_tiles(
            (
                _accuracy(summary),
                ("Accuracy before training", f"{summary['vqa_accuracy_untrained']:.1%}",
                 "a random projector"),
                _text(summary),
            )
        ),
        last="Questions without an image",
        examples="".join(_text_answers(example) for example in summary["text_examples"]),
    )  # fmt: skip


def _write(directory: Path, summary: dict[str, Any], **parts: str) -> None:
    records = list(read_metrics(directory / "metrics.jsonl"))
    template = importlib.resources.files("nvlm_train.demo").joinpath("report.html").read_text()
    page = Template(template).substitute(
        parts,
        stages=_STAGES,
        pretrain=_chart(_curves(records, "pretrain")),
        sft=_chart(_curves(records, "sft")),
        questions="".join(_question(example) for example in summary["vqa_examples"]),
        seconds=f"{summary['wall_seconds']:.0f}",
    )
    (directory / "report.html").write_text(page)


def _figures(summary: dict[str, Any]) -> str:
    pages = (
        "Character error, held-out pages", f"{summary['page_cer_tiles']:.1%}",
        f"with the thumbnail only {summary['page_cer_thumbnail']:.1%}",
    )  # fmt: skip
    return _tiles((_accuracy(summary), pages, _text(summary)))


def _accuracy(summary: dict[str, Any]) -> tuple[str, str, str]:
    return (
        "easy-VQA accuracy", f"{summary['vqa_accuracy']:.1%}",
        f"images shuffled {summary['vqa_accuracy_shuffled_images']:.1%}, "
        f"question only {summary['vqa_question_only']:.1%}, "
        f"majority {summary['vqa_majority_answer']:.1%}",
    )  # fmt: skip


def _text(summary: dict[str, Any]) -> tuple[str, str, str]:
    return (
        "Text-only loss", f"{summary['text_loss']:.3f}",
        f"backbone {summary['text_loss_backbone']:.3f}, ratio {summary['text_loss_ratio']:.3f}",
    )  # fmt: skip


def _tiles(rows: Sequence[tuple[str, str, str]]) -> str:
    return "".join(
        f'<div class="figure"><b>{value}</b><span>{name}</span><small>{beside}</small></div>'
        for name, value, beside in rows
    )


def _curves(records: Sequence[dict[str, Any]], stage: str) -> list[Curve]:
    """Returns the stage's loss by source, smoothed over five steps."""
    own = [record for record in records if record["stage"] == stage]
    names = sorted({key for record in own for key in record if key.startswith("loss/")})
    curves = []
    for name in names:
        points = [(int(record["step"]), float(record[name])) for record in own if name in record]
        smooth = [
            (step, sum(value for _, value in points[max(0, i - 4) : i + 1]) / min(i + 1, 5))
            for i, (step, _) in enumerate(points)
        ]
        curves.append((name.removeprefix("loss/"), smooth))
    return curves


def _chart(curves: Sequence[Curve]) -> str:
    last = max(step for _, points in curves for step, _ in points)
    top = max(value for _, points in curves for _, value in points)

    def place(step: int, value: float) -> str:
        x = _MARGIN + (step - 1) / max(last - 1, 1) * (_WIDTH - 2 * _MARGIN)
        y = _HEIGHT - _MARGIN + 10 - value / top * (_HEIGHT - 2 * _MARGIN + 10)
        return f"{x:.1f},{y:.1f}"

    lines, legend = [_axes(last, top)], []
    for number, (name, points) in enumerate(curves):
        colour = _COLOURS[number % len(_COLOURS)]
        path = " ".join(place(step, value) for step, value in points)
        lines.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>'
        )
        legend.append(
            f'<span style="color:{colour}">{html.escape(name)} {points[-1][1]:.2f}</span>'
        )
    svg = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(lines)}</svg>'
    return f'{svg}<p class="legend">{" ".join(legend)}</p>'


def _axes(last: int, top: float) -> str:
    bottom = _HEIGHT - _MARGIN + 10
    marks = [
        f'<text x="{_MARGIN - 6}" y="{bottom - share * (_HEIGHT - 2 * _MARGIN + 10) + 4:.0f}" '
        f'text-anchor="end">{share * top:.1f}</text>'
        for share in (0.0, 0.5, 1.0)
    ]
    marks.append(f'<text x="{_MARGIN}" y="{_HEIGHT - 8}">step 1</text>')
    marks.append(f'<text x="{_WIDTH - _MARGIN}" y="{_HEIGHT - 8}" text-anchor="end">{last}</text>')
    line = f'<path d="M{_MARGIN} {_MARGIN - 20}V{bottom}H{_WIDTH - _MARGIN}" class="axis"/>'
    return line + "".join(marks)


def _question(example: dict[str, Any]) -> str:
    image = Image.open(example["image"]).convert("RGB").resize((128, 128), Image.Resampling.NEAREST)
    before = (
        f"<br><small>before: {html.escape(example['before'])}</small>"
        if "before" in example
        else ""
    )
    return (
        f'<figure><img src="{_embed(image)}" alt="">'
        f"<figcaption>{html.escape(example['question'])}<br>{_verdict(example['answer'], example)}{before}"
        "</figcaption></figure>"
    )


def _text_answers(example: dict[str, Any]) -> str:
    return (
        f'<div class="page"><p>{html.escape(example["question"])}</p>'
        f"<p><small>before training</small> {html.escape(example['before'])}</p>"
        f"<p><small>after training</small> {html.escape(example['answer'])}</p></div>"
    )


def _page(example: dict[str, Any]) -> str:
    page = render_page(example["page"], "heldout").image.convert("RGB")
    columns, rows = choose_grid(page.width, page.height, _TILE, 6)
    seen = page.resize((columns * _TILE * 2, rows * _TILE * 2))
    draw = ImageDraw.Draw(seen)
    for number in range(columns * rows):
        x, y = number % columns * _TILE * 2, number // columns * _TILE * 2
        draw.rectangle((x, y, x + _TILE * 2 - 1, y + _TILE * 2 - 1), outline="#d1590c")
        draw.text((x + 3, y + 1), f"<tile_{number + 1}>", fill="#d1590c")
    thumbnail = page.resize((_TILE, _TILE)).resize((_TILE * 2, _TILE * 2), Image.Resampling.NEAREST)
    return (
        f'<div class="page"><img src="{_embed(seen)}" alt=""> '
        f'<img src="{_embed(thumbnail)}" alt="" class="thumbnail">'
        f"<p><small>written</small> {html.escape(example['reference'])}</p>"
        f"<p><small>read with tiles</small> {html.escape(example['tiles'])}</p>"
        f"<p><small>read from the thumbnail</small> {html.escape(example['thumbnail'])}</p></div>"
    )


def _verdict(answer: str, example: dict[str, Any]) -> str:
    if answer == example["reference"]:
        return f'<b class="right">{html.escape(answer)}</b>'
    wanted = html.escape(example["reference"])
    return f'<b class="wrong">{html.escape(answer)}</b> <small>({wanted})</small>'


def _embed(image: Image.Image) -> str:
    stream = BytesIO()
    image.save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
