"""The report of a run: one file from the files of the run alone, whole, escaped, asking for nothing from outside; and its film."""

from __future__ import annotations

import ast
import base64
import io
import json
import logging
import math
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ddkit
from ddkit.api import resume
from ddkit.data.pictures import eight_bits, radial_spectrum
from ddkit.run import report
from ddkit.run.artifact import Artifact
from ddkit.run.directory import RunDirectory, save_set
from ddkit.run.manifest import read_manifest
from ddkit.run.report import charts
from ddkit.run.report.charts import curves, dots, histogram, number, smoothed, svg
from ddkit.run.report.pictures import picture, pictures, sides
from ddkit.run.report.sections import spectrum_bins
from ddkit.run.snapshots import MOST_BYTES, add_frame, film_rows, is_frame, read_film
from tests.conftest import SMALL, Result

Cli = Callable[..., Result]
VOID = {"meta", "link", "img"}
ODD = ["<script>alert(1)</script>", "a\"b' onerror=x", "line\nbreak\x1b[31m", "‮right", "ü&amp;"]
ALLOWED = {
    "html", "head", "meta", "link", "title", "style", "body", "main", "section", "div", "h1", "h2", "h3", "p", "span", "b", "ul", "li",
    "figure", "figcaption", "img", "svg", "g", "defs", "clippath", "use", "path", "rect", "text", "table", "thead", "tbody", "tr", "th",
    "td", "details", "summary", "pre",
}  # fmt: skip


class Page(HTMLParser):
    """What a report holds: tags, attributes by tag, all text; complains about tags that are not balanced."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str | None]] = []
        self.words: list[str] = []
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        self.open += [] if tag in VOID else [tag]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def values(self, tag: str, name: str) -> list[str | None]:
        return [value for each, key, value in self.attributes if (each, key) == (tag, name)]


def read(run: Path) -> Page:
    return Page((run / "report.html").read_text(encoding="utf-8"))


def check_self_contained(page: Page) -> None:
    """Asserts that nothing in a page is a script or comes from elsewhere."""
    assert set(page.tags) <= ALLOWED
    assert all(str(value).startswith("data:") for tag in ("img", "link") for key in ("src", "href") for value in page.values(tag, key))
    assert not [name for _, name, _ in page.attributes if name.startswith("on") or name in ("action", "srcset")]
    assert {tag for tag, name, _ in page.attributes if name in ("src", "href")} <= {"img", "link"}
    assert all(str(value).startswith("#") for value in page.values("use", "xlink:href"))
    assert all(str(value).startswith("url(#") for _, name, value in page.attributes if name == "clip-path")
    styles = [words for words in page.words if "color-scheme" in words] + [
        str(value) for _, name, value in page.attributes if name == "style"
    ]
    assert not re.search(r"url\(|@import|https?:", " ".join(styles))
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a run of 9 steps with multipliers, evaluated."""
    path = tmp_path_factory.mktemp("finished") / "run"
    ddkit.distill(losses="dm:0.01,dkkt:0.5", ipc=2, pipc=3, sets=SMALL | {"steps": 9, "engine.log_every": 2}, out=path, device="cpu")
    return path


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "copy")


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a run whose class names, data file and recipe hold what HTML and terminals take for orders."""
    folder = tmp_path_factory.mktemp("odd") / "<b>&amp; folder"
    folder.mkdir()
    labels = np.arange(20) % 5
    images = np.random.default_rng(0).integers(0, 255, (20, 6, 7, 3), dtype=np.uint8)
    np.savez(folder / "<b>&amp; d.npz", x_train=images, y_train=labels, x_test=images[:5], y_test=labels[:5], class_names=np.array(ODD))
    table = {"summary": "<img src=https://example.org/x.png onerror=alert(2)>", "losses": {"dm": {}}}
    ddkit.distill(table, dataset=f"npz:{folder / '<b>&amp; d.npz'}", pipc=2, evaluators="none", sets={"steps": 2, "network.width": 4},
                  out=folder / "run", device="cpu")  # fmt: skip
    return folder / "run"


# The page


def test_a_run_ends_with_a_report_that_its_manifest_lists(finished: Path) -> None:
    assert "report.html" in read_manifest(finished)["files"]
    page = read(finished)
    check_self_contained(page)
    titles = ["Images", "Before and after", "Film strip", "Losses", "Other parameters of the set", "Spectra", "Evaluation",
              "Time and environment", "Recipe"]  # fmt: skip
    content = (finished / "report.html").read_text()
    assert re.findall(r"<h2>(.*?)</h2>", content) == titles
    assert "<h1>DM + DKKT on digits, 2 images per class</h1>" in content


def test_that_check_would_see_a_request_and_a_script() -> None:
    style = "<style>:root { color-scheme: light }</style>"
    check_self_contained(Page(style + '<img src="data:image/png;base64,x" alt="a">'))
    for bad in ('<img src="https://example.org/x.png" alt="">', "<script>1</script>", '<a href="x">x</a>', '<p onclick="x">x</p>',
                '<p style="background: url(x)">x</p>', '<svg><use xlink:href="x.svg#a"/></svg>',
                '<b id="a"></b><b id="a"></b>'):  # fmt: skip
        with pytest.raises(AssertionError):
            check_self_contained(Page(style + bad))
    with pytest.raises(AssertionError):
        check_self_contained(Page("<style>color-scheme: light; background: url(x)</style>"))
    with pytest.raises(AssertionError):
        Page("<div><p></div>")


def test_every_image_is_there_and_says_what_it_is(finished: Path) -> None:
    page = read(finished)
    sources, alts = page.values("img", "src"), page.values("img", "alt")
    assert len(sources) == len(alts) == 10 + 20 + 10 * 4  # grid; before and after; film at 0, 1, 4 and 9
    assert all(alt for alt in alts)
    assert all(page.values("svg", "aria-label"))
    for source in sources:
        with Image.open(io.BytesIO(base64.b64decode(str(source).partition(",")[2]))) as image:
            assert image.mode == "RGBA"
            assert min(image.size) >= 72


def test_the_pictures_are_the_pixels_enlarged_by_whole_ones(finished: Path) -> None:
    made = ddkit.load(finished)
    source = str(read(finished).values("img", "src")[3])  # the grid of class 3
    with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as image:
        shown = torch.from_numpy(np.array(image))
    scale = 14  # 112 pixels, as there are few of each class
    assert shown.shape == (8 * scale, 2 * 8 * scale + 2, 4)
    for place, row in enumerate((6, 7)):
        left = place * (8 * scale + 2)
        tile = shown[:, left : left + 8 * scale]
        assert torch.equal(tile[::scale, ::scale, 0], eight_bits(made.images[row])[0])
        assert torch.equal(tile[5::scale, 9::scale, 2], eight_bits(made.images[row])[0])
        assert bool((tile[..., 3] == 255).all())
    assert bool((shown[:, 8 * scale : 8 * scale + 2, 3] == 0).all())


def test_names_paths_and_recipe_are_escaped(odd: Path) -> None:
    page = read(odd)
    check_self_contained(page)
    content = (odd / "report.html").read_text(encoding="utf-8")
    assert not set("\x1b‮") & set(content)
    assert page.tags["script"] == 0
    assert "<script>alert(1)</script>" in page.text
    assert "break\\u001b[31m" in page.text
    assert "\\u202eright" in page.text
    assert "ü&amp;" in page.text
    assert "<img src=https://example.org/x.png onerror=alert(2)>" in page.text
    assert "<b>&amp; d.npz" in page.text  # in the recipe
    assert any("a\"b' onerror=x" in str(alt) for alt in page.values("img", "alt"))


def test_accuracies_losses_and_multipliers_are_those_of_the_files(finished: Path) -> None:
    words = read(finished).text
    (row,) = json.loads((finished / "evaluation.json").read_text())["evaluations"]
    accuracy, real = (f"{100 * row[f'{key}_mean']:.1f} ± {100 * row[f'{key}_std']:.1f} %" for key in ("accuracy", "random_real"))
    assert f"convnet, short, 2 epochs, width 8 2 {accuracy} {real}" in words
    assert f"accuracy {accuracy} random real {real}; convnet, short, 2 epochs, width 8, hard labels, n = 2" in words
    assert "Soft labels" not in words
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    first, last = lines[0]["losses"]["dm"], lines[-1]["losses"]["dm"]
    assert f"dm {' '.join(number(value) for value in (first['raw'], last['raw'], first['weighted'], last['weighted']))}" in words
    assert "weighted, step 8" in words
    values = ddkit.load(finished).parameters["multipliers"].double()
    assert f"multipliers 20 {' '.join(number(float(each)) for each in (values.min(), values.median(), values.max()))}" in words


def test_the_real_spectrum_is_that_of_the_accessible_images(finished: Path) -> None:
    data = ddkit.create("dataset", "digits")
    real = data.images("train", read_manifest(finished)["real_files"])
    assert spectrum_bins(8, 8) == 4
    assert read_manifest(finished)["real_spectrum"] == pytest.approx(radial_spectrum(real, 4)[1], rel=1e-5)
    assert report.known_spectrum(torch.zeros(0, 1, 8, 8)) == {}
    assert report.known_spectrum(torch.rand(2, 1, 3, 3)) == {}


def test_a_report_takes_well_under_a_second(run: Path) -> None:
    facts = read_manifest(run)
    seconds = []
    for _ in range(3):
        began = time.process_time()  # not what it waits for others on a busy machine
        report.report_html(run, facts)
        seconds.append(time.process_time() - began)
    assert min(seconds) < 0.5


def test_rows_of_hard_labels_and_of_the_teachers_stand_apart(run: Path) -> None:
    ddkit.evaluate(run, sets={"evaluators.accuracy.labels": "teacher"}, device="cpu")
    content = (run / "report.html").read_text()
    hard, soft = content.partition("<h3>Hard labels</h3>")[2].split("<h3>The teacher&#39;s labels")
    assert hard.count('<th scope="row">accuracy</th>') == 1
    assert soft.count('<th scope="row">accuracy</th>') == 1


def test_the_figure_at_the_top_is_that_of_the_set_and_of_no_baseline(run: Path) -> None:
    usual = read(run).text
    ddkit.evaluate(run, sets={"evaluators.accuracy.synthetic": False, "evaluators.accuracy.baselines": ["pipc-real"]}, device="cpu")
    rows = json.loads((run / "evaluation.json").read_text())["evaluations"]
    assert [row["images"] for row in rows] == ["synthetic", "pipc-real"]
    assert ("all accessible images reach" in usual, "all accessible images reach" in read(run).text) == (False, True)
    top = usual.partition("hard labels, n = 2")[0].rpartition("accuracy")[2]

    def reported(rows: list[Any]) -> str:
        RunDirectory(run).rewrite("evaluation.json", json.dumps({"schema": 1, "evaluations": rows}).encode())
        report.report(run)
        return read(run).text

    assert f"accuracy{top}hard labels, n = 2" in reported(rows[::-1])
    assert "hard labels, n = 2" not in reported(rows[1:])


def test_what_evaluators_say_in_words_is_told_and_close_images_are_warned_of(cli: Cli, run: Path) -> None:
    assert "Other findings" not in read(run).text
    assert cli("evaluate", run, "--evaluate", "spectrum,memorisation").code == 0
    rows = json.loads((run / "evaluation.json").read_text())["evaluations"]
    told = {row["evaluator"]: row["details"] for row in rows if row["accuracy_mean"] is None}
    words = read(run).text
    assert all(f"{name} {details['summary']}" in words for name, details in told.items())
    warning = "it does not hide the images that it was made from"
    assert told["memorisation"]["close"] > 0
    assert warning in words
    facts = json.loads((run / "evaluation.json").read_text())
    for row in facts["evaluations"]:
        row["details"]["close"] = 0
    RunDirectory(run).rewrite("evaluation.json", json.dumps(facts).encode())
    report.report(run)
    assert warning not in read(run).text


def test_a_known_ceiling_stands_beside_the_accuracy_and_each_class_has_its_own(run: Path) -> None:
    known = read_manifest(run)["teacher"]["test_accuracy"]
    assert f"ceiling {100 * known:.1f}\u00a0% accuracy of the teacher".replace("\u00a0", " ") in read(run).text
    rows = json.loads((run / "evaluation.json").read_text())["evaluations"]
    confusion = rows[0]["details"]["confusion"]
    bars = [place for label in read(run).values("svg", "aria-label") if (place := str(label)).startswith("Accuracy of each class")]
    assert bars == ["Accuracy of each class: convnet, short, 2 epochs, width 8"]
    rows[0]["details"]["class_accuracies"] = {f"class {label}": {"test_images": 9, "accuracy": label / 99} for label in range(99)}
    RunDirectory(run).rewrite("evaluation.json", json.dumps({"schema": 1, "evaluations": rows}).encode())
    report.report(run)
    assert "Accuracy of the 15 best and 15 worst of 99 classes" in read(run).text
    assert len(confusion) == 10


# Made again


def test_the_report_is_made_again_from_the_files_alone_with_the_same_bytes(cli: Cli, run: Path) -> None:
    before, manifest = (run / "report.html").read_bytes(), (run / "manifest.json").read_bytes()
    (run / "report.html").unlink()
    assert cli("report", run).code == 0
    assert (run / "report.html").read_bytes() == before
    assert (run / "manifest.json").read_bytes() == manifest


def test_out_writes_a_new_file_and_leaves_the_run_as_it_is(cli: Cli, run: Path) -> None:
    before = {file.name: file.read_bytes() for file in run.iterdir() if file.is_file()}
    told = cli("report", run, "--out", "talk.html", "--json")
    assert json.loads(told.out) == {"schema": 1, "run": str(run), "report": "talk.html"}
    assert Path("talk.html").read_bytes() == before["report.html"]
    assert cli("report", run, "--out", "no/folder.html").code == 0
    assert Path("no/folder.html").read_bytes() == before["report.html"]
    for place, phrase in (("talk.html", "exists already"), ("talk.html/in.html", "talk.html is not a folder")):
        again = cli("report", run, "--out", place)
        assert (again.code, again.out) == (5, "")
        assert phrase in again.err
    assert {file.name: file.read_bytes() for file in run.iterdir() if file.is_file()} == before


def test_what_is_no_finished_run_has_no_report(cli: Cli, run: Path) -> None:
    for target, message in (
        (run / "synthetic.safetensors", "is not a run directory"),
        ("nowhere", "There is no run nowhere. `ddkit list runs`"),
    ):
        result = cli("report", target)
        assert (result.code, result.out) == (5, "")
        assert message in " ".join(result.err.split())
    (run / "manifest.json").unlink()
    assert "the run is not finished" in " ".join(cli("report", run).err.split())


def test_a_run_of_before_there_were_reports_gets_one(cli: Cli, tmp_path: Path) -> None:
    old = shutil.copytree(Path(__file__).parents[1] / "old_runs" / "run-schema-1", tmp_path / "old")
    assert not (old / "report.html").exists()
    assert cli("report", old).code == 0
    page = read(old)
    check_self_contained(page)
    assert "Film strip" not in page.text
    assert "Losses" in page.text
    assert read_manifest(old)["files"]["report.html"]["bytes"] == (old / "report.html").stat().st_size


def test_a_blend_shows_its_two_sets_beside_it(cli: Cli, run: Path) -> None:
    other = ddkit.load(run)
    order = torch.arange(19, -1, -1)  # classes in another order: images are matched by name
    turned = Artifact(1 - other.images[order], 9 - other.labels[order], other.metadata | {"class_names": other.class_names[::-1]})
    turned.save(Path("turned.safetensors"))
    assert cli("blend", run, "turned.safetensors", "--alpha", "0.25", "--out", "both").code == 0
    film = read_film(Path("both"))
    assert film is not None
    assert film.steps.tolist() == [0, 1]
    assert torch.equal(film.images[0], eight_bits(other.images))
    assert torch.equal(film.images[1], eight_bits(1 - other.images.view(10, 2, 1, 8, 8).flip(1).view(20, 1, 8, 8)))
    page = read(Path("both"))
    check_self_contained(page)
    assert "first: copy blend second: turned.safetensors" in page.text
    assert "Film strip" not in page.text
    assert "Before and after" not in page.text
    assert page.values("img", "alt")[10:13] == ["class 0, first: copy", "class 0, blend", "class 0, second: turned.safetensors"]
    before = (Path("both") / "report.html").read_bytes()
    assert cli("report", "both").code == 0
    assert (Path("both") / "report.html").read_bytes() == before
    assert cli("blend", "turned.safetensors", "turned.safetensors", "--out", "files").code == 0
    assert "alpha 0.5 of turned.safetensors" in read(Path("files")).text


def test_a_report_that_cannot_be_drawn_costs_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(report, "contents", lambda files: 1 / 0)
    run = ddkit.distill(losses="dm", pipc=2, evaluators="none", sets=SMALL, out=tmp_path / "run", device="cpu")
    assert "report.html could not be made (ZeroDivisionError" in caplog.text
    assert "report.html" not in read_manifest(run.path)["files"]
    assert ddkit.load(run.path).images.shape == (10, 1, 8, 8)
    monkeypatch.undo()
    assert report.report(run.path) == run.path / "report.html"


def test_many_images_and_classes_are_cut_and_the_report_says_so(tmp_path: Path) -> None:
    labels = torch.arange(60).repeat_interleave(12)
    made = Artifact(torch.rand(720, 3, 8, 8), labels, {"class_names": [f"c{i}" for i in range(60)], "mean": [0.5] * 3, "std": [0.2] * 3})
    with RunDirectory.claim(tmp_path / "run") as directory:
        save_set(made, directory)
        report.close_run(directory, {"steps": 0, "seconds": 0.0})
    page = read(tmp_path / "run")
    assert page.tags["img"] == 50
    assert "The first 4 of 12 images of each class. The first 50 of 60 classes." in page.text


# The film


def test_frames_are_kept_at_powers_of_four_whatever_the_length_of_a_run(finished: Path) -> None:
    assert [step for step in range(5000) if is_frame(step)] == [0, 1, 4, 16, 64, 256, 1024, 4096]
    film = read_film(finished)
    assert film is not None
    assert film.steps.tolist() == [0, 1, 4]
    assert film.images.shape == (3, 20, 1, 8, 8)
    assert not torch.equal(film.images[0], film.images[2])


def test_a_film_is_the_same_after_a_cut_and_a_prolonged_run_keeps_its_frames(tmp_path: Path) -> None:
    sets = SMALL | {"steps": 5, "engine.checkpoint_every": 2}
    ddkit.distill(losses="dm", pipc=2, evaluators="none", sets=sets, out=tmp_path / "whole", device="cpu")
    cut = shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (cut / "manifest.json").unlink()
    (cut / "checkpoints" / "step-00000005.safetensors").unlink()
    assert read_film(cut) is not None
    resume(cut, device="cpu")
    assert (cut / "film.safetensors").read_bytes() == (tmp_path / "whole" / "film.safetensors").read_bytes()
    ddkit.distill(losses="dm", pipc=2, evaluators="none", sets=sets | {"steps": 3}, out=tmp_path / "short", device="cpu")
    resume(tmp_path / "short", steps=5, device="cpu")
    assert (tmp_path / "short" / "film.safetensors").read_bytes() == (tmp_path / "whole" / "film.safetensors").read_bytes()


def test_frames_of_steps_that_come_again_are_dropped_and_a_film_that_cannot_be_read_is_begun_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def film() -> tuple[list[int], list[int]]:
        found = read_film(tmp_path)
        assert found is not None
        return found.steps.tolist(), found.images[:, 0, 0, 0, 0].tolist()

    labels = torch.tensor([0, 0, 1])
    for step, value in ((0, 0.0), (1, 0.2), (4, 0.4), (1, 0.6)):
        add_frame(tmp_path, step, torch.full((3, 1, 4, 4), value), labels)
    assert film() == ([0, 1], [0, 153])
    (tmp_path / "film.safetensors").write_bytes(b"x")
    add_frame(tmp_path, 4, torch.zeros(3, 1, 4, 4), labels)
    assert "will have no frames of earlier steps" in caplog.text
    assert film() == ([4], [0])


def test_a_frame_stays_small() -> None:
    labels = torch.arange(200).repeat_interleave(3)
    assert film_rows(labels, (3, 32, 32)).tolist() == list(range(0, 300, 3))
    assert film_rows(torch.arange(10).repeat_interleave(50), (1, 8, 8)).tolist() == [50 * c + k for c in range(10) for k in range(10)]
    assert len(film_rows(labels, (3, 224, 224))) * 3 * 224 * 224 <= MOST_BYTES
    assert len(film_rows(labels, (3, 2000, 2000))) == 1


# The charts


def drawn_curves(lines: dict[str, list[tuple[float, float]]]) -> str:
    return svg(curves("file", "title", lines, y="raw"))


def line_of(drawn: str, colour: int = 0) -> list[tuple[float, float]]:
    """Returns the places (x, y) of the only line of a colour; none where it is not drawn."""
    found = re.findall(rf'<path d="([^"]*)"[^>]*stroke: var\(--c{colour}\)', drawn)
    numbers = [float(value) for value in re.findall(r"[-\d.]+", found[-1] if found else "")]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def dots_of(drawn: str, colour: int) -> list[float]:
    return [float(x) for x in re.findall(rf'<use [^>]*?x="([\d.]+)"[^>]*?style="fill: var\(--c{colour}\)', drawn)]


@pytest.mark.parametrize(("values", "log"), [([1, 10, 100], True), ([1, 2, 3], False), ([0, 25, 50], False), ([1, math.nan, 50], True)])
def test_a_line_goes_from_the_first_to_the_last_point_on_the_axis_that_suits(values: list[float], log: bool) -> None:
    lines = {"a": list(enumerate(values))}
    assert ("(log scale)" in curves("file", "title", lines, y="raw").y) == log
    places = line_of(drawn_curves(lines))
    assert len(places) == sum(map(math.isfinite, values))
    if len(places) == 3:
        (x0, y0), (x1, y1), (x2, y2) = places
        assert (x1, y1) == (pytest.approx((x0 + x2) / 2), pytest.approx((y0 + y2) / 2, abs=0.1))
        assert y2 < y0


@pytest.mark.parametrize("values", [[], [1.0], [2.0, 2.0], [0.0, 0.0], [-1.0, 1e30], [1e-9, 2e-9], [1e6, 1e6 + 3]])
def test_any_values_make_a_chart_without_nan_whose_text_is_large_enough(values: list[float]) -> None:
    drawn = drawn_curves({"a": [(float(x), value) for x, value in enumerate(values)]})
    assert "nan" not in drawn
    assert "inf" not in drawn
    Page(drawn)
    sizes = [float(size) for size in re.findall(r"font-size: ([\d.]+)px", drawn)]
    assert min(sizes) * (400 - 2 * 16 - 2 * 12) / 420 >= 12  # on a page of 400 pixels, inside the frame of the chart
    assert 3 <= len(sizes) <= 25


def test_lines_have_the_colours_of_the_page_and_more_than_six_of_them_are_told_apart() -> None:
    drawn = drawn_curves({str(index): [(0.0, float(index)), (1.0, 0.0)] for index in range(8)})
    assert not re.search(r"#[0-9a-f]{6}\b", drawn)
    assert {int(colour) for colour in re.findall(r"stroke: var\(--c(\d)\)", drawn)} == set(range(6))
    assert len(re.findall(r"<path [^>]*stroke-dasharray", drawn)) == 2
    assert "currentColor" in drawn


def test_a_long_line_is_smoothed_and_faint_as_it_is_and_a_short_one_is_not() -> None:
    values = [float(place % 2) for place in range(24)]
    assert smoothed(values)[:2] == [0.0, pytest.approx(1 / 3)]
    assert smoothed([5.0] * 50) == [5.0] * 50
    assert smoothed(values)[10] == pytest.approx(sum(values[8:13]) / 5)
    for count, faint in ((24, 1), (23, 0)):
        drawn = drawn_curves({"a": list(enumerate(values[:count]))})
        assert len(re.findall(r"stroke-opacity: 0\.3|opacity: 0\.3", drawn)) == faint
        heights = [y for _, y in line_of(drawn)]
        assert (max(heights[6:18]) - min(heights[6:18]) < 0.5 * (max(heights) - min(heights))) == bool(faint)


def test_ceilings_are_upright_lines_that_the_legend_names() -> None:
    chart = dots("file", "what", [("convnet", [(50.0, None)])], ["set"], {"the teacher": 80.0})
    assert chart.legend == ["set", "the teacher"]
    drawn = svg(chart)
    (low, _), (high, _) = line_of(drawn, 1)
    assert low == high > dots_of(drawn, 0)[-1]


def test_error_bars_reach_one_standard_deviation_to_each_side() -> None:
    rows = [("convnet", [(50.0, 10.0), (40.0, None)]), ("<b>$x_{", [(50.0, 10.0), None])]
    drawn = svg(dots("file", 'a "chart"', rows, ["set", "real"]))
    assert "&lt;b&gt;$x_{" in drawn
    assert 'aria-label="a &#34;chart&#34;"' in drawn
    (left, _), (right, _) = line_of(drawn)
    centres = dots_of(drawn, 0)
    assert (left + right) / 2 == pytest.approx(centres[-1], abs=0.1)
    (other,) = dots_of(drawn, 1)
    assert centres[-1] - left == pytest.approx(centres[-1] - other, abs=0.2)


def test_a_histogram_counts_every_value() -> None:
    for values, bars in (([0.0] * 3 + [1.0, 0.999], {3: 1, 2: 1}), ([2.0, 2.0], {2: 1})):
        drawn = svg(histogram("name", torch.tensor(values, dtype=torch.float64)))
        found = re.findall(r'<path d="([^"]*)"[^>]*fill: var\(--c0\)', drawn)
        heights = [abs(numbers[1] - numbers[5]) for path in found if (numbers := [float(n) for n in re.findall(r"[-\d.]+", path)])]
        kept = [height for height in heights if height > 0.01]
        assert len(heights) == 20
        assert len(kept) == sum(bars.values())
        assert max(kept) / min(kept) == pytest.approx(max(bars) / min(bars), rel=0.01)


def test_charts_are_drawn_under_no_settings_of_the_user_and_leave_them() -> None:
    import matplotlib

    usual = drawn_curves({"a": [(0.0, 1.0), (1.0, 2.0)]})
    with matplotlib.rc_context({"font.size": 30, "lines.linewidth": 9, "svg.fonttype": "path"}):
        assert drawn_curves({"a": [(0.0, 1.0), (1.0, 2.0)]}) == usual
        assert matplotlib.rcParams["font.size"] == 30


def test_matplotlib_says_nothing_of_fonts_or_of_a_home_that_it_cannot_write(caplog: pytest.LogCaptureFixture) -> None:
    def draw(axes: Any) -> None:
        axes.set_title("中文")  # a warning is an error in tests
        logging.getLogger("matplotlib.font_manager").warning("a temporary cache directory")

    assert "中文" in svg(charts.Chart("file", "title", "what", draw, "x"))
    assert caplog.text == ""


def early_imports(code: str) -> set[str]:
    """Returns which of matplotlib and jinja2 are imported where a module is, not in a function."""
    statements = [each for each in ast.walk(ast.parse(code)) if isinstance(each, ast.Import | ast.ImportFrom) and each.col_offset == 0]
    names = {name.split(".")[0] for each in statements for name in [getattr(each, "module", None) or "", *(a.name for a in each.names)]}
    return names & {"matplotlib", "jinja2", "markupsafe"}


def test_matplotlib_and_jinja2_are_imported_when_a_report_is_made_and_not_before() -> None:
    root = Path(__file__).parents[2]
    assert early_imports("from matplotlib.figure import Figure\nimport jinja2\ndef f():\n import markupsafe") == {"matplotlib", "jinja2"}
    assert not [file for top in ("ddkit", "plugins") for file in (root / top).rglob("*.py") if early_imports(file.read_text("utf-8"))]


def test_figures_are_pdf_and_png_files_of_every_chart_with_the_same_bytes_again(cli: Cli, run: Path) -> None:
    told = cli("report", run, "--figures", "a/paper", "--json")
    drawn = {"accuracy-hard", "classes-hard", "confusion-hard-convnet", "loss-dkkt-primal", "loss-dkkt-stationarity", "loss-dm", "losses",
             "parameter-multipliers", "shares", "spectrum"}  # fmt: skip
    images = {"before-after", "images", "strip"}
    names = sorted([f"a/paper/{name}.{kind}" for name in drawn | images for kind in ("pdf", "png")] + ["a/paper/strip.gif"])
    assert json.loads(told.out) == {"schema": 1, "run": str(run), "report": str(run / "report.html"), "figures": names}
    assert len(drawn) == (run / "report.html").read_text().count("<svg ")
    for name in names:
        assert Path(name).read_bytes().startswith({"pdf": b"%PDF-", "png": b"\x89PNG", "gif": b"GIF8"}[name[-3:]])
    with Image.open("a/paper/strip.gif") as moving:
        assert (moving.n_frames, moving.width >= 640) == (4, True)
    chart = curves("file", "title", {"$x_{": [(0.0, 1.0), (1.0, 2.0)], "中文": [(0.0, 2.0)]}, y="raw")
    assert charts.files(chart) == charts.files(chart)


def test_figures_are_all_there_or_none_is(cli: Cli, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (run / "report.html").stat().st_mtime_ns
    monkeypatch.setattr(report, "files", lambda chart: {f"{chart.file}.pdf": b"%PDF-"})
    for folder in ("full", "empty"):
        Path(folder).mkdir()
    Path("full/mine.txt").write_text("mine")
    for place in ("full", "full/mine.txt"):
        refused = cli("report", run, "--figures", place)
        assert (refused.code, refused.out) == (5, "")
        assert f"--figures {place} exists already" in " ".join(refused.err.split())
    assert [entry.name for entry in Path("full").iterdir()] == ["mine.txt"]
    alike = charts.Chart("Loss-a", "title", "what", print, "x")
    report.write_figures(Path("alike"), [alike] * 3)
    assert sorted(entry.name for entry in Path("alike").iterdir()) == ["Loss-a-2.pdf", "Loss-a-3.pdf", "Loss-a.pdf"]
    told = cli("report", run, "--figures", "empty", "--out", "talk.html").out.splitlines()
    assert told[:3] == ["report   talk.html", "figure   empty/accuracy-hard.pdf", "figure   empty/before-after.pdf"]
    monkeypatch.setattr(Path, "rename", lambda path, target: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    failed = cli("report", run, "--figures", "new/paper", "--out", "again.html")
    assert (failed.code, failed.out) == (5, "")
    assert "--figures new/paper cannot be written: No space left on device" in " ".join(failed.err.split())
    assert not Path("new").exists()
    assert (run / "report.html").stat().st_mtime_ns == before


# The pictures


@pytest.mark.parametrize(
    ("size", "cell", "shown"),
    [((8, 8), 72, (72, 72)), ((32, 32), 72, (64, 64)), ((28, 28), 160, (140, 140)), ((64, 96), 72, (64, 96)), ((224, 112), 72, (112, 56)),
     ((130, 130), 160, (130, 130)), ((1, 500), 72, (1, 112))],
)  # fmt: skip
def test_images_are_enlarged_by_whole_pixels_and_large_ones_reduced(size: tuple[int, int], cell: int, shown: tuple[int, int]) -> None:
    images = torch.randint(0, 255, (7, 3, *size), dtype=torch.uint8)
    assert sides(images, cell) == shown
    found = pictures([images, images], "a", cell=cell)
    assert all(made.width <= 368 and made.height == 2 * shown[0] + 2 for made in found)
    assert sum((made.width + 2) // (shown[1] + 2) for made in found) == 7


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_pictures_of_any_number_of_channels(channels: int) -> None:
    made = picture([torch.zeros(2, channels, 4, 4, dtype=torch.uint8)], "alt", cell=64)
    assert made.source.startswith("data:image/png;base64,")
    assert made[1:] == (130, 64, "alt")
