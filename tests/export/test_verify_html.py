"""The report's page: complete in itself, well formed, and looked at in a browser at a phone's width."""

from __future__ import annotations

import html.parser
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sd_export.verify.html import difference_map, page
from sd_export.verify.limits import EXACT, Limit
from sd_export.verify.measures import Measure
from sd_export.verify.probe import Probe
from sd_export.verify.report import Drift, LayerError, Report, Row

Pixels = np.ndarray[Any, Any]

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)
PHONE, DESKTOP = 390, 1280  # pixels
VOID = {"img", "meta", "br"}


def disc(radius: float) -> Pixels:
    """A red disc on green, (48, 64, 3) in [0, 1]."""
    y, x = np.mgrid[0:48, 0:64]
    inside = (x - 32) ** 2 + (y - 24) ** 2 < radius**2
    return np.where(inside[..., None], (0.9, 0.1, 0.1), (0.1, 0.7, 0.2)).astype(np.float32)


@pytest.fixture(scope="module")
def report() -> Report:
    """Of a bundle that drifts, with everything that a page can show."""
    rows = [
        Row("tokenizer", "5 texts", Measure(0, 0, 1, np.inf), EXACT),
        Row("text_encoder", "hidden states", Measure(1e-6, 2e-7, 1, 150), Limit("relative", 1e-5)),
        Row("unet", "timestep 981", Measure(0.1, 2e-2, 0.99, 40), Limit("relative", 1e-5)),
        *(Row("loop", f"step {i}", Measure(0.1, i * 1e-4, 1, 60), Limit("relative", 1e-3)) for i in range(1, 13)),
        Row("picture", "", Measure(0.8, 0.1, 0.9, 21.5), Limit("psnr", 60)),
    ]
    layers = tuple(LayerError(f"layer.{i}", 10.0 ** (i / 10 - 7)) for i in range(60))
    return Report(
        bundle="bundles/<odd> & name",
        source="someone/model",
        precision="fp32",
        device="ONNX Runtime on the CPU",
        reference="torch 2, computed now",
        probe=Probe('a "star" <b>', "", 1, 12, 7.5, 48, 64, (981,)),
        rows=tuple(rows),
        seconds={"unet": (0.012, 0.02), "picture": (3.5, 5.0), "taesd": (0.001, None)},
        pictures=(disc(15), disc(15.5)),
        drift=Drift("unet", "timestep 981", 1e-3, layers),
    )


class Checker(html.parser.HTMLParser):
    """Collects what a page refers to, and complains of tags that do not match."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_is_whole_and_needs_nothing_else(report: Report) -> None:
    text = page(report)
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    assert len(checker.references) == 3 and all(ref.startswith("data:image/png;base64,") for ref in checker.references)
    assert "http" not in text and "@import" not in text and "url(" not in text
    assert "<script" not in text
    for row in report.rows:
        assert row.title in checker.text
    told = ("<odd> & name", 'a "star" <b>', "the drift starts at layer.41", "Latent drift", "beyond their limits")
    assert all(text in checker.text for text in told)


def test_page_without_pictures_timings_or_layers(report: Report) -> None:
    plain = replace(report, pictures=None, seconds={}, drift=None, rows=report.rows[:2])
    checker = Checker()
    checker.feed(page(plain))
    assert checker.open == [] and checker.references == []
    assert "All 2 comparisons are within their limits." in checker.text


def test_numbers_that_are_not_finite_do_not_reach_the_plots(report: Report) -> None:
    nan = Measure(np.nan, np.nan, np.nan, np.nan)
    rows = tuple(replace(row, measure=nan) for row in report.rows)
    text = page(replace(report, rows=rows))
    coordinates = re.findall(r' (?:x|y|x1|x2|y1|y2|cx|cy|width|points)="([^"]*)"', text)
    assert coordinates and not any("nan" in value or "inf" in value for value in coordinates)


def test_difference_map() -> None:
    reference, ours = disc(15), disc(15.5)
    shown, factor = difference_map(reference, ours)
    assert shown.max() == 1 and factor == pytest.approx(1 / 0.8)
    assert (shown[0, 0] == 0).all()
    assert difference_map(reference, reference)[1] == 1


# ---- in a browser ----------------------------------------------------------------------------------------------------

in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)")


@pytest.fixture(scope="module")
def url(report: Report, tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(page(report), encoding="utf-8")
    return file.as_uri()


def chromium(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000", *arguments]
    return subprocess.run(command, check=True, capture_output=True, timeout=120)


def share(pixels: Pixels, colour: tuple[int, int, int]) -> float:
    return float((pixels == colour).all(axis=-1).mean())


@in_a_browser
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_looks_right(url: str, width: int, tmp_path: Path) -> None:
    """The pictures are side by side, the plots have their colours, and nothing sticks out to the right."""
    file = tmp_path / "page.png"
    chromium("--hide-scrollbars", f"--window-size={width},1600", f"--screenshot={file}", url)
    pixels = np.asarray(Image.open(file).convert("RGB"))
    assert pixels.shape == (1600, width, 3)
    assert share(pixels[:, -8:], (255, 255, 255)) == 1  # the margin
    red = abs(pixels[:800].astype(int) - (230, 26, 26)).max(axis=-1) < 12
    columns = np.flatnonzero(red.sum(axis=0) > 8)
    assert np.count_nonzero(np.diff(columns) > 4) >= 1  # two discs, and a gap between them
    assert share(pixels, (0x2F, 0x6F, 0xB3)) > 0.001
    assert share(pixels, (0xC0, 0x32, 0x2B)) > 0.001  # the verdict, and limits


@in_a_browser
def test_does_not_scroll_sideways_on_a_phone(url: str, tmp_path: Path) -> None:
    """Asked of the browser itself, through a frame as wide as a phone."""
    probe = tmp_path / "probe.html"
    script = "document.title = f.contentDocument.documentElement.scrollWidth + '/' + f.contentWindow.innerWidth"
    frame = f'<iframe id=f width={PHONE} height=800 style="border:0" src="{url}" onload="{script}"></iframe>'
    probe.write_text(frame)
    dump = chromium("--allow-file-access-from-files", "--dump-dom", probe.as_uri()).stdout.decode()
    title = re.search(r"<title>(\d+)/(\d+)</title>", dump)
    assert title is not None, dump[:500]
    assert int(title[1]) <= int(title[2]) == PHONE
