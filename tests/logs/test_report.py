"""The report is complete and self-contained, and its curves are inside their frames."""

import html
import itertools
import json
import re
import shutil
import subprocess

import pytest

from flacuna_jax.data.report import DataReport, SourceReport
from flacuna_jax.errors import UserError
from flacuna_jax.logs.live_report import LiveReport
from flacuna_jax.logs.report import environment, mixture_rows, read_metrics, write_report


def records(count, **changes):
    made = []
    for step in range(1, count + 1):
        record = {"step": step, "loss": 2.0 / step, "learning_rate": 1e-5, "grad_norm": 0.5, "fill": 0.98}
        made.append({**record, "supervised_tokens_per_second": None if step == 1 else 5000.0, **changes})
    return made


def page_of(tmp_path, rows, config="seed: 42\n", mixture=(), **more):
    path = tmp_path / "report.html"
    write_report(
        path,
        title="run <1>",
        records=rows,
        facts={"trainable parameters": "6,553,600"},
        mixture=mixture,
        config_yaml=config,
        environment={"jax": "0.0"},
        **more,
    )
    return path.read_text()


def points_of(page):
    """Lists of [step, value text, x, y], one per chart."""
    return [json.loads(html.unescape(text)) for text in re.findall(r'data-points="([^"]*)"', page)]


def test_curves_are_inside_their_frames_and_nothing_external_is_referenced(tmp_path):
    page = page_of(tmp_path, records(50))
    charts = points_of(page)
    assert [len(chart) for chart in charts] == [50, 50, 50, 49]
    coordinates = re.findall(
        r"(-?[\d.]+),(-?[\d.]+)", " ".join(re.findall(r'polyline class=\w+ points="([^"]*)"', page))
    )
    assert coordinates
    assert all(0 <= float(x) <= 560 and 0 <= float(y) <= 250 for x, y in coordinates)
    assert charts[0][0][:2] == [1, "2"]
    assert charts[0][-1][:2] == [50, "0.04"]
    assert charts[0][0][3] < charts[0][-1][3]  # a higher loss is drawn higher up
    assert not re.search(r"https?:|src=|href=|@import|url\(", page)
    assert "6,553,600" in page


def test_text_from_the_run_cannot_become_markup(tmp_path):
    mixture = [{"source": "<b>x</b>", "kept": 5}]
    page = page_of(tmp_path, records(3), config="path: '</pre><script>alert(1)</script>' # $title", mixture=mixture)
    assert "<script>alert" not in page
    assert "<b>x</b>" not in page
    assert "run &lt;1&gt;" in page
    assert "# $title" in page


def test_the_report_of_a_long_run_is_small_and_shows_spikes(tmp_path):
    rows = records(100_000, loss=1.0)
    rows[54_321]["loss"] = 9.5
    page = page_of(tmp_path, rows)
    assert len(page) < 400_000
    loss = points_of(page)[0]
    assert len(loss) <= 800
    assert [54_322, "9.5"] in [point[:2] for point in loss]
    assert [point[0] for point in loss] == sorted(point[0] for point in loss)


def test_a_bad_step_is_marked_and_not_part_of_curves(tmp_path):
    rows = records(40)
    rows[19] |= {"loss": 1e6, "grad_norm": None}
    for row in rows[19:]:
        row["skipped"] = 1
    page = page_of(tmp_path, rows)
    losses = points_of(page)[0]
    assert [step for step, *_ in losses] == [step for step in range(1, 41) if step != 20]
    assert page.count("<line class=bad") == 3  # in loss, gradient norm and throughput
    assert "class=bad" not in page_of(tmp_path, records(40))


def test_shows_steps_done_time_left_and_best_loss(tmp_path):
    rows = [evaluation(0, 3.0), *records(40, seconds_per_step=30.0), evaluation(20, 1.5), evaluation(40, 1.75)]
    page = page_of(tmp_path, rows, status="running", total_steps=160)
    assert "40 of 160" in page
    assert "1:00:00" in page
    assert "3.000 → 1.500" in page
    assert "time left" not in page_of(tmp_path, rows, total_steps=160)


@pytest.mark.parametrize("rows", [[], [{"kind": "plan"}], records(1), records(3, loss=None), records(4, loss=0.0)])
def test_short_empty_and_diverged_runs_are_drawn_too(tmp_path, rows):
    page = page_of(tmp_path, rows)
    assert not re.search(r"\b(nan|inf)\b", page.lower())
    assert ("No step was logged" in page) == (not any("loss" in row for row in rows))


def test_mixture_shows_dropped_records():
    flan = SourceReport("data/flan.json", read=10, kept=7, tokens=700, supervised_tokens=300)
    flan.drop("too long", "flan.json:3")
    rows = mixture_rows(DataReport((flan, SourceReport("data/alpaca.json", 3, 3, 90, 100))))
    assert rows[0]["source"] == "flan.json"
    assert rows[0]["dropped"] == "1 too long"
    assert [row["share of supervised"] for row in rows] == ["75.0 %", "25.0 %"]


def test_environment_names_versions_and_devices_but_no_variables(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "secret-value")
    found = environment()
    assert found["devices"].startswith("4 × cpu")
    assert {"jax", "flax", "python", "flacuna_jax"} <= found.keys()
    assert "secret-value" not in str(found)


def test_reads_what_the_run_logged(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": null}\n')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}]


def evaluation(step, loss, sources=("flan", "code")):
    record = {"step": step, "kind": "evaluation"}
    for suffix in ("", *(f"/{name}" for name in sources)):
        record |= {f"eval/loss{suffix}": loss, f"eval/perplexity{suffix}": 2.0, f"eval/token_accuracy{suffix}": 0.25}
        record[f"eval/tokens{suffix}"] = 1234
    return {**record, "tasks/mmlu:5/faithful": 0.3}


def test_evaluations_have_curves_and_a_table_by_source(tmp_path):
    page = page_of(tmp_path, [evaluation(0, 3.0), *records(9), evaluation(10, 1.5)])
    assert [len(chart) for chart in points_of(page)] == [9, 9, 9, 8, 2, 2, 2]
    assert "<td class=n>3.0000 → 1.5000" in page
    assert "<td>0.0</td>" in page, "a version is not a number"
    assert "25.0% → 25.0%" in page
    assert "mmlu:5/faithful" in page
    assert "<td>code</td>" in page
    assert "No step was logged" in page_of(tmp_path, [evaluation(0, 3.0, ())][:0])


def test_first_and_last_sample_answers_are_shown(tmp_path):
    samples = [
        {"step": step, "id": "a", "question": "Why <b>?", "answer": f"because {step}", "expected": "so"}
        for step in (0, 500, 1000)
    ]
    page = page_of(tmp_path, records(3), samples=samples)
    assert "after step 0" in page
    assert "after step 1000" in page
    assert "because 0" in page
    assert "because 1000" in page
    assert "because 500" not in page
    assert "Why &lt;b&gt;?" in page
    assert "after step 0" in page_of(tmp_path, records(3), samples=samples[:1])


def test_a_page_reloads_itself_only_during_the_run(tmp_path):
    assert "http-equiv=refresh" in page_of(tmp_path, records(3), status="running")
    page = page_of(tmp_path, records(3), status="stopped by SIGTERM after step 3")
    assert "http-equiv=refresh" not in page
    assert "stopped by SIGTERM after step 3" in page


def test_incomplete_and_invalid_lines_are_ignored(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]
    path.write_bytes(b'{"step": 1}\nrate too high\n3\n\xff\n{"step": 2}\n')
    assert read_metrics(path) == [{"step": 1}, {"step": 2}], "other text is not a record"
    assert read_metrics(tmp_path / "absent.jsonl") == []


def test_the_live_report_is_rarely_written_and_never_ends_a_run():
    clock, written, said = [0.0], [], []

    def write(status):
        written.append((clock[0], status))
        clock[0] += 3.0  # a long report

    live = LiveReport(write, said.append, clock=lambda: clock[0])
    for now in range(0, 1000, 10):
        clock[0] = max(clock[0], float(now))
        live.refresh()
    assert all(later - earlier >= 150 for (earlier, _), (later, _) in itertools.pairwise(written))
    assert len(written) > 4

    def fail(status):
        raise UserError("no space")

    live = LiveReport(fail, said.append, clock=lambda: clock[0])
    live.refresh()
    clock[0] += 1000
    live.refresh()
    assert len(said) == 1
    live.finish("finished")
    assert said == [
        f"warning: report.html could not be written (status: {status}): no space" for status in ("running", "finished")
    ]


LOOK = """<script>
addEventListener("load", () => {
  const boxes = [...document.querySelectorAll(".tile b, td, th, figcaption")];
  const wide = boxes.filter(e => e.scrollWidth > e.clientWidth + 1);
  const svg = document.querySelector("svg"), box = svg.getBoundingClientRect();
  svg.dispatchEvent(new MouseEvent("mousemove", {clientX: box.right - 40, clientY: box.top + 20}));
  document.title = JSON.stringify({
    overflowing: wide.map(e => e.textContent),
    sideways: document.documentElement.scrollWidth > innerWidth,
    said: document.querySelector("output").textContent,
    sections: [...document.querySelectorAll("h2")].map(e => e.textContent),
    broken: [...document.querySelectorAll("polyline")].some(e => !(e.getBBox().width > 0)),
  });
});
</script></html>"""


@pytest.mark.parametrize("width", [400, 1200])
def test_a_browser_shows_the_report_without_overflow(tmp_path, width):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here")
    samples = [
        {"step": step, "id": "a", "question": "Why? " * 80, "answer": "x" * 300, "expected": "so"} for step in (0, 9)
    ]
    flan = SourceReport("data/flan.json", read=10, kept=7, tokens=700, supervised_tokens=300)
    page_of(
        tmp_path,
        [evaluation(0, 3.0), *records(40), evaluation(40, 1.5)],
        mixture=mixture_rows(DataReport((flan,))),
        samples=samples,
    )
    path = tmp_path / "report.html"
    page = path.read_text()
    long_plan = page.replace(
        "6,553,600", "1 × cpu: replica 1 × data 1 × fsdp 1 × tensor 1; 3 micro-batches of 1 rows, remat"
    )
    path.write_text(long_plan.replace("</html>", LOOK))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},2000", "--dump-dom"]
    found = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=60)
    title = re.search(r"<title>(.*?)</title>", found.stdout, re.DOTALL)
    seen = json.loads(html.unescape(title.group(1)))
    assert seen["overflowing"] == []
    assert not seen["sideways"]
    assert not seen["broken"]
    assert seen["said"].startswith("step ")
    assert seen["sections"] == [
        "Plan",
        "Curves",
        "Held-out records by source",
        "Answers, before and after",
        "Data",
        "Settings",
        "Environment",
    ]
