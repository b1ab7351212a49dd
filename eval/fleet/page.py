"""The page of what `simulate_fleet.py` has found: a section, with charts and tables, for each kind of figures."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from eval.fleet.caches import CONCURRENT, EXPONENTS, HOST_COUNTS, SLOT_COUNTS
from eval.fleet.memory import PARALLEL, TIMED
from eval.page import render_page
from soka_serve.compiler.report.charts import Axis, Mark, Series, chart, linear_axis, log_axis
from soka_serve.io.text import percent, size
from soka_vllm.settings import SLOT_DEFAULT

LINES = ("soka_1", "soka_1_weights", "soka_4", "soka_16", "lora_1", "lora_8", "lora_16", "lora_16_sharded")
TITLE = "10,000 adapters, and 70B over 8 GPUs · calculated and simulated"
BODY = """
caption { text-align: left; font-size: 14px; font-weight: 600; padding-bottom: 6px; }
tr :not(:first-child) { text-align: right; } .scroll { margin-top: 16px; }
.bare circle { display: none; } .dots .line { display: none; }
</style></head><body>
<header><p class="quiet">soka-serve</p><h1>10,000 adapters, and 70B over 8 GPUs</h1>
<p><b>Calculated and simulated: nothing here ran on a GPU or in a server.</b> Load times were measured on the 100M model
on a CPU (eval/results/serve_cpu_100m.json); what is scaled from them says so. eval/fleet/simulate.py tells what is
simplified, and fleet.json has all figures and the checks.</p></header>
<main>{% for part in parts %}
<section><h2>{{ part.title }}</h2>
{% for text in part.texts %}<p>{{ text }}</p>{% endfor %}
{% if part.legend %}<ul class="legend">{% for name in part.legend %}
<li class="k{{ loop.index0 }}"><i></i><span>{{ name }}</span></li>{% endfor %}</ul>{% endif %}
<div class="panels">{% for title, svg in part.charts %}
<figure><figcaption>{{ title }}</figcaption>{{ svg }}</figure>{% endfor %}</div>
{% for caption, head, rows in part.tables %}
<div class="scroll"><table><caption>{{ caption }}</caption>
<thead><tr>{% for cell in head %}<th>{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}
</tbody></table></div>{% endfor %}
</section>{% endfor %}
</main>
<footer><p>{{ record.command }} · {{ record.hardware.cpu }}, Python {{ record.versions.python }}, torch
{{ record.versions.torch }}, vLLM {{ record.versions.vllm }}, numpy {{ record.versions.numpy }}, seeds
{{ record.seeds | join(", ") }}</p></footer></body></html>
"""


class PageSection(NamedTuple):
    """A section of the page; the legend's names have the palette's colours in order."""

    title: str
    texts: list[str]
    legend: list[str]
    charts: list[tuple[str, Markup]]
    tables: list[tuple[str, list[str], list[list[str]]]]


def label(method: str) -> str:
    """How the page calls a method."""
    kind, rank, *more = method.split("_")
    if kind == "soka":
        return f"SoKA rank {rank}" + (", from the weights" if more else "")
    return f"LoRA r={rank}" + (", fully sharded" if more else "")


def count_axis(values: Sequence[int], name: str) -> Axis:
    """A log axis with a tick at each value."""
    return Axis(values[0] / 1.15, values[-1] * 1.15, tuple((float(v), f"{v:,}") for v in values), name, log=True)


def series(names: Sequence[str], values: Sequence[Sequence[tuple[float, float]]], css: str = "") -> list[Series]:
    """Lines in the palette's order, with a dot at each value."""
    lines = []
    for i, (name, points) in enumerate(zip(names, values, strict=True)):
        dots = [Mark(x, y, f"{name}: {y:.4g} at {x:,g}") for x, y in points]
        lines.append(Series(points, f"k{i} {css}", tooltip=name, marks=dots))
    return lines


def draw_chart(lines: Sequence[Series], x: Axis, y: Axis, title: str) -> tuple[str, Markup]:
    """A chart and its title."""
    return title, chart(lines, x, y, summary=f"{title}: {y.label} against {x.label}", size=(380, 280))


def memory_part(memory: Mapping[str, Any]) -> PageSection:
    """Slots over tensor parallelism."""
    charts, tables = [], []
    names = [label(key) for key in LINES]
    head = ["", "trained parameters", "file, float32", *(f"slot, TP {n}" for n in PARALLEL)]
    head += ["host, a worker", "host, TP 8", "kept in 4 GiB"]
    for model, found in memory.items():
        if model == "100M":
            continue
        rows = found["adapters"]
        points = [[(float(n), float(g["slot_bytes"])) for n, g in rows[key]["per_gpu"].items()] for key in LINES]
        y = log_axis([value for line in points for _, value in line], "one slot, per GPU", text=size)
        charts.append(draw_chart(series(names, points), count_axis(PARALLEL, "GPUs (tensor parallel)"), y, model))
        body = []
        for key, row in rows.items():
            cells = [row["file_bytes"]["float32"], *(gpu["slot_bytes"] for gpu in row["per_gpu"].values())]
            cells += [row["host_bytes_per_worker"], row["per_gpu"][8]["host_bytes_all_workers"]]
            body.append([label(key), f"{row['trained_parameters']:,}", *map(size, cells), f"{row['kept_in_4_gib']:,}"])
        unset = map(size, found["unset_slot_bytes"].values())
        body.append(["plugin, its variables unset", "", "", *unset, "", "", ""])
        tables.append((f"{model}, calculated", head, body))
    texts = [
        "Calculated, from what vLLM's layers and the plugin's allocate on a device without memory. A SoKA adapter that "
        "starts from the weights is served with twice its rank in terms. Under tensor parallelism every GPU holds all "
        "of Right, and without full sharding one of LoRA's two matrices.",
        "With SOKA_LORA and SOKA_SLOT_PARAMETERS unset, a GPU's slot takes LoRA's buffers of rank 16 too (last row), "
        f"and adapters of more than {SLOT_DEFAULT:,} values per GPU are refused.",
    ]
    return PageSection("Memory", texts, names, charts, tables)


def hits_part(rates: Sequence[Mapping[str, Any]]) -> PageSection:
    """Hit rates over cache sizes, simulated and after Che."""
    names = [f"exponent {exponent:g}" for exponent in EXPONENTS]
    rows = [[row for row in rates if row["exponent"] == exponent] for exponent in EXPONENTS]
    held = [row["adapters_held"] for row in rows[0]]
    x, y = count_axis(held, "adapters held"), linear_axis([0.0, 100.0], "requests that find theirs, %", zero=True)
    points = {key: [[(float(r["adapters_held"]), 100 * r[key]) for r in of] for of in rows] for key in rates[0]}
    lines = [*series(names, points["che"], "bare"), *series(names, points["hit_rate"], "dots")]
    table = [[f"{e:g}", *(percent(r["hit_rate"]) for r in of)] for e, of in zip(EXPONENTS, rows, strict=True)]
    texts = ["Simulated: 10,000 adapters, LRU, independent requests, stationary. Both levels: slots and host."]
    charts = [draw_chart(lines, x, y, "Simulated (dots) and Che's approximation (lines)")]
    return PageSection(
        "Hit rates", texts, names, charts, [("Simulated", ["exponent", *(f"{n:,}" for n in held)], table)]
    )


def loading_part(caches: Mapping[str, Any]) -> PageSection:
    """What misses cost."""
    pairs = [(kind, host) for kind in ("soka_1", "lora_16") for host in HOST_COUNTS]
    names = [f"{label(kind)}, {host:,} on the host" for kind, host in pairs]
    model = "100M, measured"
    y = linear_axis([row["added_ms"][model]["soka_1"] for row in caches["added"]], "ms a request", zero=True)
    charts = []
    for exponent in EXPONENTS:
        rows = [row for row in caches["added"] if row["exponent"] == exponent]
        points = [[(float(r["max_loras"]), r["added_ms"][model][k]) for r in rows if r["host"] == h] for k, h in pairs]
        x = count_axis(SLOT_COUNTS, "slots (max_loras)")
        charts.append(draw_chart(series(names, points, "bare"), x, y, f"100M, exponent {exponent:g}"))
    head = ["", *(f"{label(kind)}, {what}" for kind in TIMED for what in ("disk", "cache"))]
    body = []
    for name, kinds in caches["load_times"].items():
        for how in ("measured", "scaled_by_bytes", "scaled_by_modules"):
            found = [kinds[kind][how] for kind in TIMED]
            if None not in found and (name != "100M" or how == "measured"):
                cells = [f"{ms[key]:,.1f}" for ms in found for key in ("from_disk_ms", "from_cache_ms")]
                body.append([f"{name}, {how.replace('_', ' ')}", *cells])
    counts = "; ".join(f"{ms:.2g} ms with {host:,}" for host, ms in caches["bookkeeping_ms"].items())
    texts = [
        "Simulated hit rates x load times measured on the 100M model on a CPU. Loading takes place in the engine's "
        "loop, so that everybody waits for it.",
        "Measured here: at each step vLLM 0.32 copies the list of the adapters on the host for each adapter of the "
        f"batch, {counts}. With the plugin max_cpu_loras may stay small: SOKA_KEEP_ADAPTERS_GIB spares the files.",
    ]
    return PageSection(
        "Loading", texts, names, charts, [("Milliseconds of one load, from disk and from the host's cache", head, body)]
    )


def waiting_part(waiting: Sequence[Mapping[str, Any]]) -> PageSection:
    """Who has to wait for a slot."""
    names = [f"exponent {exponent:g}" for exponent in EXPONENTS]
    found = {key: [r for r in waiting if (r["exponent"], r["concurrent"]) == key] for key in _cases()}
    charts = []
    for kind, key, name, title in (
        ("burst", "waited", "not in the first step, %", "requests at once"),
        ("closed", "waited", "cannot start at once, %", "users"),
        ("closed", "running", "being served, %", "users"),
    ):
        for requests in CONCURRENT:
            scale = 100 / requests if key == "running" else 100
            points = [
                [(float(r["max_loras"]), scale * r[kind][key]["mean"]) for r in found[exponent, requests]]
                for exponent in EXPONENTS
            ]
            y = linear_axis([0.0, 100.0], name, zero=True)
            x = count_axis(SLOT_COUNTS, "slots (max_loras)")
            charts.append(draw_chart(series(names, points), x, y, f"{requests} {title}"))
    head = ["exponent", "users", "adapters of a burst", *(f"{slots} slots" for slots in SLOT_COUNTS)]
    body = []
    for (exponent, requests), rows in found.items():
        cells = [f"{percent(r['closed']['waited']['mean'])}, {r['closed']['wait']['mean']:.2g}" for r in rows]
        body.append([f"{exponent:g}", f"{requests}", f"{rows[0]['burst']['distinct']['mean']:.1f}", *cells])
    caption = "Users who cannot start at once, and the mean wait in lengths of an answer"
    texts = ["Simulated: a step has at most max_loras distinct adapters, and vLLM leaves the others for later."]
    return PageSection("Waiting for a slot", texts, names, charts, [(caption, head, body)])


def _cases() -> Iterator[tuple[float, int]]:
    return itertools.product(EXPONENTS, CONCURRENT)


def fleet_part(totals: Mapping[str, Any]) -> PageSection:
    """Bytes of all adapters."""
    head = ["", "disk, float32", "disk, bfloat16", "host, a worker", "host, all workers"]
    tables = []
    for name, rows in totals.items():
        body = []
        for key, row in rows.items():
            cells = [*row["disk_bytes"].values(), row["host_bytes_per_worker"], *row["host_bytes_all_workers"].values()]
            body += [] if key.endswith("sharded") else [[label(key), *map(size, cells)]]
        workers = max(rows["soka_1"]["host_bytes_all_workers"])
        tables.append((f"{name}, {workers} workers, calculated", head, body))
    return PageSection("10,000 adapters", ["Calculated; on the host a value takes 2 bytes."], [], [], tables)


def page(record: Mapping[str, Any]) -> str:
    """The whole page, in the style of the comparison's."""
    caches = record["caches"]
    parts = [memory_part(record["memory"]), hits_part(caches["hit_rates"]), loading_part(caches)]
    parts += [waiting_part(record["waiting"]), fleet_part(record["fleet"])]
    return render_page(TITLE, BODY, parts=parts, record=record)
