"""A report as one page that needs nothing else: pictures, plots and the table, readable on a phone and on paper."""

from __future__ import annotations

import base64
import io
from html import escape

import numpy as np
from sd_runtime.bench.charts import STYLE, Bar, Line, bar_chart, line_chart
from sd_runtime.tensor import Array

from .report import Report, Row

CSS = """
:root{color-scheme:light dark;--good:#2e7d46;--bad:#c0322b;--line:#8884;--soft:#8881}
@media(prefers-color-scheme:dark){:root{--good:#6cc487;--bad:#ff8a80;--series-0:#6ea8e6;--series-1:#e89a5b}}
*{box-sizing:border-box}
body{margin:0 auto;padding:16px;max-width:1120px;font:15px/1.45 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:21px;margin:0 0 4px}h2{font-size:16px;margin:28px 0 8px}p{margin:4px 0}.faint{opacity:.75;font-size:13px}
.summary{display:inline-block;margin:10px 0;padding:5px 12px;border-radius:6px;color:#fff;background:#2e7d46}
.summary.bad{background:#c0322b}
.pictures{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px}
figure{margin:0}figure img{width:100%;image-rendering:pixelated;border-radius:4px;display:block}
figcaption{font-size:13px;margin-top:4px}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(320px,100%),1fr));gap:16px;align-items:start}
.charts>div{border:1px solid var(--line);border-radius:8px;padding:8px;max-width:540px}
table{border-collapse:collapse;width:100%;font-size:13px;font-variant-numeric:tabular-nums}
td,th{padding:5px 8px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
td:first-child,th:first-child{text-align:left;white-space:normal}
.good{color:var(--good)}.broken{color:var(--bad);font-weight:600}tr.bad{background:var(--soft)}
pre{overflow-x:auto;background:var(--soft);padding:10px;border-radius:6px;font-size:12px}
@media(max-width:640px){thead{display:none}tr{display:grid;grid-template-columns:1fr 1fr;padding:6px 0;
border-bottom:1px solid var(--line)}td,td:first-child{border:0;padding:1px 4px;text-align:left}
td:first-child,td:last-child{grid-column:1/3}td:first-child{font-weight:600}
td[data-label]::before{content:attr(data-label) " ";opacity:.65}}
"""


def page(report: Report) -> str:
    """The whole document."""
    probe = report.probe
    what = (
        f"“{probe.prompt}”, seed {probe.seed}, {probe.width} × {probe.height} pixels, "
        f"{probe.num_inference_steps} steps, "
        f"guidance {probe.guidance_scale:g}, {probe.scheduler or 'the model’s own sampler'}"
    )
    name = report.bundle.rstrip("/").rsplit("/", 1)[-1]
    sections = [
        f"<h1>{escape(name)} against its reference</h1>",
        f'<p class="faint">{escape(report.source)}, {report.precision}, {escape(report.device)}; reference: '
        f"{escape(report.reference)}</p>",
        f'<p class="summary{"" if report.passed else " bad"}">{escape(report.summary)}</p>',
        f'<p class="faint">{escape(what)}</p>',
        _pictures(report),
        "<h2>Plots</h2>" + f'<div class="charts">{"".join(f"<div>{chart}</div>" for chart in charts(report))}</div>',
        "" if report.drift is None else f"<h2>Layer by layer</h2><pre>{escape(str(report.drift))}</pre>",
        "<h2>Every comparison</h2>" + _table(report.rows),
        '<p class="faint">relative: ‖ours − reference‖ / ‖reference‖; PSNR refers to the reference’s range, for the '
        "picture to 1.</p>",
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(name)}: parity report</title><style>{CSS}{STYLE}</style></head>"
        f"<body>{''.join(sections)}</body></html>\n"
    )


def charts(report: Report) -> list[str]:
    """Those that the report has data for."""
    found = [_errors(report.rows)]
    drift = [(i + 1.0, row.measure.relative) for i, row in enumerate(_steps(report.rows))]
    if drift:
        limit = _steps(report.rows)[0].limit.value
        line = [Line("latents", drift)]
        found.append(line_chart("Latent drift", line, x_label="step", y_label="relative error", log=True, limit=limit))
    if report.drift is not None:
        layers = [Line("layers", [(i + 1.0, layer.error) for i, layer in enumerate(report.drift.layers)])]
        found.append(
            line_chart(
                f"Error layer by layer: {report.drift.component}", layers,
                x_label="layer, in order of execution", y_label="relative error", log=True, limit=report.drift.limit,
            )
        )  # fmt: skip
    return [*found, _timings(report)] if report.seconds else found


def difference_map(reference: Array, ours: Array) -> tuple[Array, float]:
    """(H, W, 3) pictures in [0, 1] → their absolute difference, brightened to the full range, and by how much."""
    difference = np.abs(ours.astype(np.float64) - reference)
    peak = float(difference.max(initial=0.0))
    return (difference / peak if peak else difference).astype(np.float32), 1 / peak if peak else 1.0


def _steps(rows: tuple[Row, ...]) -> list[Row]:
    return [row for row in rows if row.component == "loop"]


def _errors(rows: tuple[Row, ...]) -> str:
    """The worst relative error of each network, with its limit."""
    worst: dict[str, Row] = {}
    for row in rows:
        if row.limit.kind == "relative" and row.component != "loop":
            known = worst.setdefault(row.component, row)
            if not row.measure.relative <= known.measure.relative:
                worst[row.component] = row
    bars = [
        Bar(name, row.measure.relative, f"{row.measure.relative:.1e}", 0 if row.passed else 1, row.limit.value)
        for name, row in worst.items()
    ]
    return bar_chart("Relative error and limit", bars, log=True)


def _timings(report: Report) -> str:
    """The fastest call of each stage, ours above the reference's."""
    bars = []
    for stage, (ours, theirs) in report.seconds.items():
        bars.append(Bar(stage, ours, _seconds(ours)))
        if theirs is not None:
            bars.append(Bar(stage, theirs, _seconds(theirs), 1))
    return bar_chart("Seconds, logarithmic", bars, series=("ours", "torch"), log=True)


def _seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"


def _pictures(report: Report) -> str:
    if report.pictures is None:
        return ""
    reference, ours = report.pictures
    difference, factor = difference_map(reference, ours)
    gain = f"{float(f'{factor:.2g}'):,.0f}".replace(",", "\u202f")  # two digits, in groups of three
    figures = (
        (reference, "reference"),
        (ours, "this bundle"),
        (difference, f"their difference, {gain} times brighter"),
    )
    shown = [
        f'<figure><img src="{_data(array)}" alt="{text}"><figcaption>{text}</figcaption></figure>'
        for array, text in figures
    ]
    return f'<div class="pictures">{"".join(shown)}</div>'


def _data(picture: Array) -> str:
    """(H, W, 3) in [0, 1] → a PNG as a data URL."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.rint(picture * 255).clip(0, 255).astype(np.uint8)).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _table(rows: tuple[Row, ...]) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("", "max abs", "relative", "cosine", "PSNR", "limit"))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(map(_table_row, rows))}</tbody></table>"


def _table_row(row: Row) -> str:
    m = row.measure
    cells = (
        ("max abs", f"{m.max_abs:.1e}"),
        ("relative", f"{m.relative:.1e}"),
        ("cosine", f"{m.cosine:.7f}"),
        ("PSNR", "equal" if m.psnr == float("inf") else f"{m.psnr:.1f} dB"),
    )
    numbers = "".join(f'<td data-label="{label}">{text}</td>' for label, text in cells)
    kind, word = ("good", "within") if row.passed else ("broken", "beyond")
    outcome = f'<td class="{kind}">{word}: {row.limit}</td>'
    return f"<tr{'' if row.passed else ' class=bad'}><td>{escape(row.title)}</td>{numbers}{outcome}</tr>"
