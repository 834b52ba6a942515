"""The report: what is in it, that it needs nothing else, and that a browser shows it on any screen."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from remit_megatron.analysis.axes import chart_axes, labels, linear, logarithmic, short
from remit_megatron.analysis.parts import Chart, Heatmap, Part, Series, Text, read_part, thinned, to_json
from remit_megatron.analysis.report.build import MAXIMUM_BYTES, fitted
from remit_megatron.analysis.report.markdown import sparkline
from remit_megatron.analysis.report.page import Page, standalone
from remit_megatron.analysis.results import read_results
from remit_megatron.cli import main
from tests.unit.analysis.runs import log_line, make_run, setup_line

HOSTILE = "</script><script>alert(1)</script><b>&amp;"


def heatmap(texts: int = 2, tokens: int = 20) -> Heatmap:
    text = {
        "pieces": ["The", *(f" word{i}" for i in range(tokens - 2)), HOSTILE],
        "delta": [None, *(math.sin(i) * 4 for i in range(tokens - 1))],
        "student": [None, *[-1.0] * (tokens - 1)],
        "reference": [None, *[-0.5] * (tokens - 1)],
        "weight": [None, *[1.1] * (tokens - 1)],
    }
    return Heatmap([text] * texts, "a note")


def write_evaluations(run: Path, last: float) -> None:
    """evaluation.jsonl of steps 0, 20 (done again after a kill) and 40: two tasks of accuracy, one of gold answers."""
    lines = []
    for step, score in ((0, 0.0), (20, 0.9), (20, 0.2), (40, last)):
        tasks = {
            name: {"score": score, "stderr": 0.1, "bits_per_byte": 1.0, "items": 8, "metric": "acc", "shots": 5}
            for name in ("arc/rc", "csqa/rc")
        }
        tasks["gold/bpb"] = tasks["arc/rc"] | {"score": 2.0 - score, "metric": "bits_per_byte"}
        record = {"iteration": step, "consumed_tokens": 1000 * step, "suite": "easy", "tasks": tasks}
        lines.append(json.dumps(record | {"seconds": 1.0, "share": 0.125}) + "\n")
    (run / "evaluation.jsonl").write_text("".join(lines))


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """report.html of two runs with results and a part, and report.md beside it."""
    root = tmp_path_factory.mktemp("report")
    runs = [
        make_run(root / "ntp"),
        make_run(root / "remit", objective={"name": "remit", "epsilon": 0.2}, level=1.5, megatron__lr=5e-4),
    ]
    for run, last in zip(runs, (0.25, 0.5), strict=True):
        write_evaluations(run, last)
    (runs[0] / "logs" / "rank_0.log").write_text(
        setup_line(0)
        + log_line(10, "[before the start of training step] datetime: x")
        + log_line(60, "successfully saved checkpoint from iteration      40 to somewhere")
    )
    task = {"score": 0.5, "stderr": 0.01, "metric": "acc", "filter": "none", "shots": 5, "items": 100}
    models = {"ntp": {"gsm8k": task}, "remit": {"gsm8k": task | {"score": 0.625}}}
    (root / "evaluation").mkdir()
    (root / "evaluation" / "results.json").write_text(json.dumps({"models": models}))
    (root / "analysis").mkdir()
    part = Part("heatmap", "A heatmap", "What it shows.", [Text(HOSTILE), heatmap()])
    (root / "analysis" / "heatmap.part.json").write_text(to_json(part))
    outputs = ["--output", str(root / "report.html"), "--output", str(root / "report.md")]
    assert main(["report", *map(str, runs), *outputs]) == 0
    return root / "report.html"


class Reader(HTMLParser):
    """Text by section, and a check that every element is closed."""

    VOID = frozenset({"meta", "input", "line", "path", "circle", "rect", "br", "wbr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sections: dict[str, str] = {}
        self.scripts: list[str] = []
        self._section = ""
        self.feed(text.replace("<wbr>", ""))  # a place where a key may break, no sign
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        if tag == "section":
            self._section = dict(attrs)["id"] or ""
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            assert name not in {"src", "srcset", "action"} and not (
                name == "href" and not (value or "").startswith("#")
            )
            assert not name.startswith("on"), f"a script in an attribute: {name}"

    def handle_startendtag(self, tag, attrs):
        assert tag in self.VOID
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "script" in self.open:
            self.scripts.append(data)
        else:
            self.sections[self._section] = self.sections.get(self._section, "") + data + " "


def test_the_page_needs_nothing_else(page):
    text = page.read_text()
    assert len(text.encode()) < MAXIMUM_BYTES
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text), "an address in the page"
    reader = Reader(text)
    assert "alert(1)" not in "".join(reader.scripts).replace("<\\/script>", "")
    assert text.count("<script>") == 1  # ours; what a text holds is text


def test_what_is_in_it(page):
    sections = Reader(page.read_text()).sections
    order = [
        "overview",
        "configuration",
        "benchmarks",
        "curves",
        "evaluations",
        "weights",
        "heatmap",
        "throughput",
        "time",
        "reproduce",
    ]
    assert [name for name in sections if name] == order
    assert "2 runs, 80K tokens" in sections["overview"]
    found = re.findall(r"[\w.]+__?[\w.]*|megatron\.\w+|objective\.\w+", sections["configuration"])
    assert {"megatron.lr", "objective.epsilon", "objective.name"} <= set(found) and "clip_grad" not in str(found)
    assert "50.0 ± 2.0" in sections["benchmarks"] and "acc, none, 5 shots" in sections["benchmarks"]
    assert "<b>62.5 ± 2.0</b>" in page.read_text() and "<b>50.0" not in page.read_text()
    assert "0.000 → 0.2500 ± 0.20" in sections["evaluations"] and "ntp 12.5%" in sections["evaluations"]
    assert "<b>0.000 → 0.5000 ± 0.20</b>" in page.read_text() and "<b>2.000 → 1.500" in page.read_text()
    assert "25.0%" in sections["throughput"]  # the reference's share of remit's steps
    assert "config.yaml of remit" in sections["reproduce"] and "remit train" in sections["reproduce"]
    assert HOSTILE in sections["heatmap"]
    assert "starting" in sections["time"] and "evaluation" in sections["time"]


def test_curves_are_there_without_a_script(page):
    """The points of a drawn curve, taken back from its pixels, are the run's numbers."""
    text = page.read_text()
    figure = re.search(r"<figure class=\"chart\"><h3>Learning rate.*?</figure>", text, re.DOTALL)
    assert figure is not None
    data = json.loads(re.search(r'<script type="application/json">(.*?)</script>', figure[0])[1])  # type: ignore[index]
    paths = re.findall(r'<path class="curve s(\d)" d="([^"]+)"', figure[0])
    assert [int(number) for number, _ in paths] == [0, 1]
    left, right, top, bottom = data["box"]
    for (_, path), expected in zip(paths, (1e-3, 1e-3), strict=True):
        points = [tuple(map(float, point.split())) for point in re.split("[ML]", path)[1:]]
        assert len(points) == 40
        x = [data["x"][0] + (px - left) / (right - left) * (data["x"][1] - data["x"][0]) for px, _ in points]
        assert x == pytest.approx([1000 * step for step in range(1, 41)], abs=100)
        y = [data["y"][0] + (bottom - py) / (bottom - top) * (data["y"][1] - data["y"][0]) for _, py in points]
        assert y == pytest.approx([expected] * 40, rel=0.01)


def test_markdown_says_the_same(page):
    text = page.with_suffix(".md").read_text()
    titles = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert titles[:3] == ["Overview", "What differed", "Benchmarks"] and titles[-1] == "How to reproduce it"
    assert "**Accuracy, mean of 2 tasks**" in text and "**Learning rate**" in text
    assert re.search(r"\| ntp \| \S+ \| 0.000 \| 0.000 \| 0.2500 \| 0.2500 \|", text), "step 20 as it was done again"
    assert "| gsm8k | acc, none, 5 shots | 100 | 50.0 ± 2.0 | **62.5 ± 2.0** |" in text
    for row in (line for line in text.splitlines() if line.startswith("|")):
        cells = re.split(r"(?<!\\)\|", row)
        assert len(cells) >= 3
    assert "| megatron.lr | 0.001 | 0.0005 |" in text


def test_a_page_that_is_too_long_is_made_shorter():
    """Curves of many steps, and more heatmap than a megabyte holds: both give way, and the page says so."""
    curves = [
        Chart("c", "tokens", "nats", [Series(f"run {i}", list(range(50_000)), [float(x % 97) for x in range(50_000)])])
        for i in range(4)
    ]
    page = Page("t", "s", [Part("p", "t", "s", [*curves, heatmap(texts=300, tokens=100)])])
    html = fitted(page)
    assert len(html.encode()) < MAXIMUM_BYTES
    assert "of 300 texts, so that the page stays small" in html


def test_thinned_curves_keep_their_extremes():
    values: list[float | None] = [1.0] * 1000
    values[500] = 50.0
    values[501] = None
    thin = thinned(Series("a", list(map(float, range(1000))), values), 100)
    assert len(thin.x) == len(thin.y) == len(thin.low) == len(thin.high) == 100
    assert max(v for v in thin.high if v is not None) == 50 and thin.y[0] == 1
    assert max(v for v in thin.y if v is not None) == pytest.approx((8 * 1 + 50) / 9)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 1, ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]), (3, 3, None), (0, 123456, None), (-0.002, 0.004, None)],
)
def test_axes(low, high, ticks):
    axis = linear(low, high)
    assert axis.low <= low and axis.high >= high and 3 <= len(axis.ticks) <= 12
    assert len(set(labels(axis))) == len(axis.ticks)
    if ticks:
        assert labels(axis) == ticks
    assert axis.place(axis.low) == 0 and axis.place(axis.high) == 1


def test_logarithmic_axis():
    axis = logarithmic(0.3, 40)
    assert axis.ticks == pytest.approx([0.5, 1, 2, 5, 10, 20]) and axis.place(axis.high) == pytest.approx(1)
    assert short([0.001, 10.0]) == ["0.001", "10.000"]
    chart = Chart("t", "x", "y", [Series("a", [1.0, 2.0], [0.0, 1.0])], log_y=True)
    axes = chart_axes(chart)
    assert axes is not None and axes[1].low > 0  # a zero has no place on it


def test_sparkline():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([2, 2]) == "▁▁" and sparkline([]) == ""


def test_parts_come_back_as_they_were(tmp_path):
    part = Part("a", "A", "s", [Text("x"), heatmap(), Chart("c", "x", "y", [Series("n", [1.0], [None])])])
    (tmp_path / "a.part.json").write_text(to_json(part))
    assert to_json(read_part(tmp_path / "a.part.json")) == to_json(part)
    (tmp_path / "b.part.json").write_text('{"format": "something else", "version": 1}')
    with pytest.raises(Exception, match="no part of a report"):
        read_part(tmp_path / "b.part.json")


@pytest.mark.parametrize(
    "content",
    [
        {"ntp": {"gsm8k": {"score": 0.5, "metric": "acc", "stderr": None}}},
        {"models": {"ntp": {"tasks": {"gsm8k": {"score": 0.5, "metric": "acc"}}}}},
        {"results": [{"model": "ntp", "task": "gsm8k", "score": 0.5, "metric": "acc", "stderr": "N/A"}]},
        {"models": [{"model": "ntp", "tasks": {"gsm8k": {"score": 0.5, "metric": "acc"}}}]},
    ],
)
def test_results_in_any_nesting(tmp_path, content):
    (tmp_path / "results.json").write_text(json.dumps(content))
    (score,) = read_results([str(tmp_path)])
    assert (score.model, score.task, score.score, score.stderr) == ("ntp", "gsm8k", 0.5, None)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--output", "r.pdf"], "--output: found r.pdf; expected a name that ends in .html or .md"),
        (["--results", "nothing.json"], "--results: found no file nothing.json"),
        (["--parts", "nothing"], "--parts: found no part in nothing"),
    ],
)
def test_wrong_names_are_one_line(page, capsys, words, said):
    assert main(["report", str(page.parent / "ntp"), *words]) == 2
    assert capsys.readouterr().err.startswith("error: " + said)


# In a browser.

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)")


def browse(path: Path, *options: str) -> str:
    """The document as the browser has it, with the network off."""
    assert CHROMIUM is not None
    words = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    words += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={path.parent / 'profile'}", *options]
    done = subprocess.run([*words, path.as_uri()], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-500:]
    return done.stdout


@needs_browser
def test_nothing_is_wider_than_the_screen_and_curves_answer(page):
    """In frames of 390 and 1,400 pixels; a pointer over a curve and over a token shows their numbers."""
    script = """
    addEventListener("load", () => setTimeout(() => {
      const said = {};
      for (const width of [390, 1400]) {
        const frame = document.getElementById("f" + width), inner = frame.contentDocument, view = frame.contentWindow;
        const point = (element, type, x, y) => element.dispatchEvent(
          new view.PointerEvent(type, {clientX: x, clientY: y, bubbles: true}));
        said["over" + width] = inner.documentElement.scrollWidth - inner.documentElement.clientWidth;
        const svg = inner.querySelector("figure.chart svg"), box = svg.getBoundingClientRect();
        said["svg" + width] = [box.left >= 0, box.right <= width, box.width > 300];
        point(svg, "pointermove", box.left + box.width * 0.99, box.top + 20);
        said["curve" + width] = inner.querySelector(".tip").innerText;
        point(svg, "pointerleave", 0, 0);
        const token = inner.querySelectorAll(".hm i")[1];
        point(token, "pointerover", 20, 20);
        said["token" + width] = inner.querySelector(".tip").innerText;
        inner.querySelector(".f-neg").checked = true;
        said["filter" + width] = [".p4", ".n4"].map(
          (name) => view.getComputedStyle(inner.querySelector(".hm .text " + name)).backgroundColor);
      }
      document.body.innerHTML = "";
      document.body.textContent = JSON.stringify(said);
    }, 300));
    """
    frames = "".join(
        f'<iframe id="f{width}" src="{page.name}" style="width:{width}px;height:900px;border:0"></iframe>'
        for width in (390, 1400)
    )
    frame = page.parent / "frames.html"
    frame.write_text(f"<!DOCTYPE html><body>{frames}<script>{script}</script></body>")
    text = re.search(r"<body>(\{.*?\})<", browse(frame, "--dump-dom", "--virtual-time-budget=3000"), re.DOTALL)
    assert text is not None
    said = json.loads(text[1])
    for width in (390, 1400):
        assert said[f"over{width}"] == 0
        assert said[f"svg{width}"] == [True, True, True]
        assert "tokens 40000" in said[f"curve{width}"] and re.search(r"ntp\s+2\b", said[f"curve{width}"])
        assert "Δ" in said[f"token{width}"] and "word1" in said[f"token{width}"]
        clear, coloured = said[f"filter{width}"]
        assert clear == "rgba(0, 0, 0, 0)" and coloured != clear


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_drawn_without_a_script_in_both_schemes(page, tmp_path, scheme):
    """Ink and paper trade places, and curves have their colours, in the page without its scripts (a headless browser
    with JavaScript off takes no screenshot)."""
    import matplotlib.image

    picture, bare = tmp_path / "page.png", tmp_path / "bare.html"
    bare.write_text(re.sub(r"<script.*?</script>", "", page.read_text(), flags=re.DOTALL))
    settings = f"--blink-settings=preferredColorScheme={dict(dark=0, light=1)[scheme]}"
    browse(bare, f"--screenshot={picture}", "--window-size=1400,2400", "--hide-scrollbars", settings)
    pixels = matplotlib.image.imread(picture)[..., :3]
    assert pixels.shape[:2] == (2400, 1400)
    paper = pixels[3, 3].mean()
    assert paper > 0.9 if scheme == "light" else paper < 0.2
    blue, red, green = pixels[..., 2], pixels[..., 0], pixels[..., 1]
    assert ((blue - red > 0.4) & (green < blue)).sum() > 500  # curves of the first run, and tokens
    assert ((red - blue > 0.4) & (red - green > 0.2)).sum() > 500  # curves of the second run


def test_a_standalone_page_is_whole():
    reader = Reader(standalone(Part("heatmap", "T", "s", [heatmap()])))
    assert HOSTILE in reader.sections["heatmap"]
