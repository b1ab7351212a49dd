"""report.html and the training log: what they hold, and what they must never do."""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from soka_serve.compiler.history import read_history
from soka_serve.compiler.report.data import AnswerPair, HistoryPoint, ReportData, history_points, rank_history
from soka_serve.compiler.report.page import render_report, write_report
from soka_serve.errors import BuildError
from tests.support.reports import report_data, spectra

VOID = {"meta"}


@pytest.fixture
def data() -> ReportData:
    return report_data(spectra(3))


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on tags that do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def ids(self) -> set[str]:
        return {value for _, name, value in self.attributes if name == "id"}


def test_big_figures(data: ReportData) -> None:
    text = Page(render_report(data)).text
    for figure in ("2% → 93%", "186 of 200", "95% interval 89–96%", "13,104", "0.71× LoRA r=2 (18,432)", "54.6 kB"):
        assert figure in text
    assert "1 min 35 s" in text
    assert "full fine-tuning" in text
    assert "2026-01-31 12:30 UTC" in text


def test_all_sections_are_there_and_linked(data: ReportData) -> None:
    page = Page(render_report(data))
    sections = {"samples", "trained", "training", "spectra", "ranks", "data", "manifest", "provenance"}
    assert sections <= page.ids()
    anchors = {value[1:] for tag, name, value in page.attributes if (tag, name) == ("a", "href") and value[0] == "#"}
    assert anchors == sections


def test_page_is_self_contained(data: ReportData) -> None:
    page = Page(render_report(data))
    assert not {"script", "link", "img", "iframe", "object", "embed"} & set(page.tags)
    assert [v for _, n, v in page.attributes if n == "content" and "default-src 'none'" in v]
    links = {v for _, n, v in page.attributes if n in ("href", "src", "xlink:href") and not v.startswith("#")}
    assert links == {"./adapter", "./adapter/README.md"}
    assert not re.search(r"url\(|@import", render_report(data))


@pytest.mark.parametrize(
    "hostile",
    [
        "<script>alert(1)</script>",
        "</pre></section><img src=x onerror=alert(1)>",
        '"><svg onload=alert(1)>',
        "{{ 7 * 7 }}{% raw %}",
        "&lt;b&gt; &amp; ' \"",
        "日本語 العربية 🎉",
    ],
)
def test_untrusted_text_stays_text(data: ReportData, hostile: str) -> None:
    clean = Page(render_report(data))
    dirty = replace(
        data,
        name=hostile,
        description=hostile,
        base_name=hostile,
        samples=[AnswerPair(hostile, hostile, hostile, hostile, False, True)],
        manifest_text=hostile,
        data_summary={hostile: hostile},
        lock={hostile: {hostile: hostile}},
        versions={hostile: hostile},
        comparison={hostile: 3, "LoRA r=2": 18432, "full": 4},
        timings_s={hostile: 1.0},
        modules=[replace(m, module=f"{hostile}.{hostile}", policy=hostile) for m in data.modules[:1]],
    )
    page = Page(render_report(dirty))
    assert set(page.tags) <= set(clean.tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert page.text.count(hostile) >= 10


def test_characters_that_html_forbids_or_that_reorder_text_are_made_visible(data: ReportData) -> None:
    html = render_report(replace(data, samples=[AnswerPair("a\x00b", "\x1b[31m", "c\u202ed", "\ud800", None, None)]))
    assert "a␀b" in html
    assert "␛[31m" in html
    assert "c[U+202E]d" in html
    assert "\x00" not in html
    html.encode("utf-8")


def test_artefact_links_cannot_carry_a_scheme(data: ReportData) -> None:
    page = Page(render_report(replace(data, artefacts={"x": "javascript:alert(1)", "y": 'a"b c'})))
    assert {"./javascript%3Aalert%281%29", "./a%22b%20c"} <= {v for _, n, v in page.attributes if n == "href"}


def test_no_history_no_samples_no_accuracy(data: ReportData) -> None:
    bare = replace(data, history=[], samples=[], accuracy_before=None, accuracy_after=None, timings_s={}, artefacts={})
    page = Page(render_report(bare))
    assert "No training step was taken" in page.text
    assert not {"samples", "training"} & page.ids()
    assert "spectra" in page.ids()


def test_loss_takes_the_place_of_accuracy_that_was_not_measured(data: ReportData) -> None:
    text = Page(render_report(replace(data, accuracy_before=None, accuracy_after=(0, 0)))).text
    assert "3 → 0.3" in text
    assert "held-out problems correctly" not in text


@pytest.mark.parametrize("method", ["lora", "pissa", "lokr", "full", "dora"])
def test_other_methods_have_no_spectra(data: ReportData, method: str) -> None:
    page = Page(render_report(replace(data, method=method, modules=[], comparison={})))
    assert not {"spectra", "ranks"} & page.ids()
    assert "SoKA leaves the base model as it is" not in page.text


def test_everything_empty(data: ReportData) -> None:
    empty: dict[str, object] = {}
    for field in fields(ReportData):
        value = getattr(data, field.name)
        if isinstance(value, dict | list):
            empty[field.name] = type(value)()
        elif field.name in ("trainable_parameters", "base_parameters", "adapter_bytes"):
            empty[field.name] = 0
    Page(render_report(replace(data, accuracy_before=None, accuracy_after=None, **empty)))  # type: ignore[arg-type]


def test_values_that_are_not_finite_are_named_and_not_drawn(data: ReportData) -> None:
    history = [HistoryPoint(s, math.nan if s in (20, 30) else 1.0 / s, math.inf, None, None) for s in range(10, 60, 10)]
    html = render_report(replace(data, history=history))
    assert "loss was not a finite number at step 20 and at 1 later step;" in html
    assert "grad norm was not a finite number" in html
    assert not re.search(r' d="[^"]*(nan|inf)', html)


def test_spectra_that_cannot_be_drawn(data: ReportData) -> None:
    first, second, third, fourth = data.modules[:4]
    modules = [
        replace(first, sigma=(math.nan, 1.0, 0.0)),
        replace(second, sigma=(), rank=1),
        replace(third, total_energy=0.0),
        replace(fourth, sigma=(1.0,), rank=0, layer=None),
    ]
    html = render_report(replace(data, modules=modules))
    assert not re.search(r' (d|cx|cy)="[^"]*(nan|inf)', html)
    none_at_all = [replace(m, sigma=(), rank=2) for m in data.modules]
    page = Page(render_report(replace(data, modules=none_at_all)))
    assert "ranks" in page.ids()
    assert "spectra" not in page.ids()


def test_chosen_rank_is_marked_on_every_line(data: ReportData) -> None:
    html = render_report(replace(data, modules=spectra(4, rank=None), history=[]))
    assert html.count("<circle") == 4 * 7
    for layer in range(4):
        assert html.count(f"<title>layer {layer}: rank {layer + 1}, ") == 2 * 7  # the line and its dot
    assert "rank 1–4, 50–71.2% of the energy" in html
    drawn = re.findall(
        r'rank (\d+), [^<]*</title><path class="line" d="M([^"]*)"/><circle cx="([^"]*)" cy="([^"]*)"', html
    )
    assert len(drawn) == 4 * 7
    for rank, path, cx, cy in drawn:
        assert path.split("L")[int(rank) - 1] == f"{cx} {cy}"


def test_the_text_knows_where_the_terms_started(data: ReportData) -> None:
    assert "the ones that training starts from" in Page(render_report(data)).text
    zero = Page(render_report(replace(data, modules=[replace(m, init="zero") for m in data.modules]))).text
    assert "they do not start from these components" in zero
    assert "the ones that training starts from" not in zero
    delta = Page(render_report(replace(data, modules=[replace(m, init="delta") for m in data.modules]))).text
    assert "Before training, the fine-tuned change of each module was split" in delta


def test_layers_are_cut_into_even_tables(data: ReportData) -> None:
    html = render_report(replace(data, modules=spectra(40)))
    assert html.count('<th scope="col">layer</th>') == 4  # two tables for rank, two for energy
    assert html.count("min-width:650px") == 4  # twenty layers each


def test_heat_map_has_a_cell_per_module_and_a_gap_where_none_is(data: ReportData) -> None:
    modules = [m for m in spectra(3, rank=None) if not (m.layer == 1 and m.projection == "v_proj")]
    html = render_report(replace(data, modules=modules))
    assert html.count('title="q_proj, layer 2: 3"') == 1
    assert 'title="v_proj, layer 1' not in html
    assert html.count('<td class="none">') == 2  # one per table: rank and energy


def test_modules_that_share_a_place_are_averaged(data: ReportData) -> None:
    expert = data.modules[0]
    html = render_report(replace(data, modules=[replace(expert, rank=1), replace(expert, module="b.q_proj", rank=4)]))
    assert 'title="q_proj, layer 0: 2.5 (mean of 2, 1–4)"' in html


def test_pruning_is_drawn_only_when_ranks_changed(data: ReportData) -> None:
    assert "Terms kept" not in render_report(replace(data, rank_over_time={"a": [(0, 4), (50, 4)]}))
    html = render_report(replace(data, rank_over_time={"a": [(0, 4), (50, 3)], "b": [(0, 4), (50, 4)]}))
    assert "all weights together, 8 at first, 7 at the end" in html


def test_energy_dropped_is_told_only_when_some_was(data: ReportData) -> None:
    assert "dropped" not in Page(render_report(replace(data, data_summary={}))).text
    assert "dropped 0.25% of" in Page(render_report(replace(data, dropped_energy_frac=0.0025))).text


def test_long_parts_of_the_lock_are_folded(data: ReportData) -> None:
    html = render_report(data)
    assert "<summary>ranks (21 entries)</summary>" in html
    assert html.index("base.sha256") < html.index("<summary>ranks")


def test_a_large_model_stays_small(data: ReportData) -> None:
    html = render_report(replace(data, modules=spectra(32, terms=64, rank=None)))
    Page(html)
    assert len(html.encode()) < 1_000_000


def test_same_data_same_bytes_and_written_whole(tmp_path: Path, data: ReportData) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    write_report(path, data)
    assert path.read_text(encoding="utf-8") == render_report(data)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_write_report_to_a_place_that_is_none(tmp_path: Path, data: ReportData) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildError, match=r"report\.html"):
        write_report(tmp_path / "file" / "report.html", data)


# --- the training log ----------------------------------------------------------------------------------------------


def write_lines(path: Path, *lines: object) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def test_read_history_merges_steps_and_later_lines_win(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "history.jsonl",
        {"step": 10, "loss": 2.0, "grad_norm": 1.0, "learning_rate": 1e-3, "epoch": 0.1},
        {"step": 20, "loss": 9.0},
        {"step": 10, "eval_loss": 2.5},
        "",
        {"step": 20, "loss": 1.0, "grad_norm": None},
        {"step": 30, "epoch": 0.3},
        {"note": "no step"},
    )
    assert history_points(read_history(path)) == [HistoryPoint(10, 2.0, 1.0, 1e-3, 2.5), HistoryPoint(20, 1.0)]


def test_regularisers_have_curves(tmp_path: Path, data: ReportData) -> None:
    lines = [{"step": 10, "loss": 2.0, "sorsa": 0.5}, {"step": 20, "loss": 1.0, "sorsa": 0.25, "kasa": 3.0}]
    points = history_points(read_history(write_lines(tmp_path / "history.jsonl", *lines)))
    assert [point.regularisers for point in points] == [{"sorsa": 0.5}, {"sorsa": 0.25, "kasa": 3.0}]
    html = render_report(replace(data, history=points))
    assert "sorsa over optimiser steps, from 0.5 at step 10 to 0.25 at step 20" in html
    assert "kasa over optimiser steps" in html
    assert "sorsa over" not in render_report(data)


def test_read_history_keeps_nan(tmp_path: Path) -> None:
    (point,) = history_points(read_history(write_lines(tmp_path / "h.jsonl", '{"step": 1, "loss": NaN}')))
    assert point.loss is not None
    assert math.isnan(point.loss)


def test_read_history_without_a_file(tmp_path: Path) -> None:
    assert read_history(tmp_path / "none.jsonl") == []


def test_read_history_passes_over_a_last_line_cut_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_lines(tmp_path / "h.jsonl", {"step": 1, "loss": 1.0}, '{"step": 2, "lo')
    assert [line["step"] for line in read_history(path)] == [1]
    assert "last line (2) is cut off" in caplog.text


def test_read_history_names_a_broken_line(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "h.jsonl", {"step": 1}, "not json", {"step": 2})
    with pytest.raises(BuildError, match=r"h\.jsonl:2: expected a JSON object, got 'not json'"):
        read_history(path)


def test_rank_history(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "h.jsonl",
        {"step": 1, "modules": {"a": {"rank": 4, "sigma": [1.0]}, "b": {"rank": 2}}},
        {"step": 1, "eval_loss": 1.0},
        {"step": 2, "modules": {"a": {"rank": 3}, "b": {"rank": 2}}},
    )
    assert rank_history(read_history(path)) == {"a": [(1, 4), (2, 3)], "b": [(1, 2), (2, 2)]}
