"""The report: what it shows of a run, what it leaves out, and that it is nobody's program."""

import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from peft_dist.cli.main import main
from peft_dist.ledger.events import StepEvent, SystemEvent
from peft_dist.ledger.goodput import PHASES
from peft_dist.report import text
from peft_dist.report.page import render_page
from peft_dist.report.run_data import RunData, read_runs
from peft_dist.report.series import MOST_POINTS, Series, number
from peft_dist.report.time_use import PHASE_ORDER, clock_panels
from peft_dist.report.timeline import MOST_SHOWN, timeline, timeline_of
from tests.unit.run_folders import failure, lease
from tests.unit.whole_runs import Story, write_run

HOSTILE = "<script>document.title = 'gone'</script>"
SAMPLE = {
    "row": 3, "prompt": f"What is {HOSTILE}?\x08\n", "expected": " a cat",
    "before": f" <b>{HOSTILE}</b>", "after": " a cat",
}  # fmt: skip
EVENTFUL: dict[str, Any] = {
    "ranks": 4, "gpus": 4, "interrupted_at": (120,), "cut_off_at": (200,), "skipped": (50, 51),
    "save_failed": (90,), "slow_rank": 2, "samples": (SAMPLE,),
}  # fmt: skip


def the_run(folder: Path, **story: Any) -> RunData:
    return read_runs([write_run(folder, Story(**story))])[0]


def figures(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.S)
    assert found is not None
    read: dict[str, Any] = json.loads(found[1])
    return read


def without_plotly(page: str) -> str:
    """Return the page without plotly.js, which is the longest script of it."""
    longest = max(re.findall(r"<script>(.*?)</script>", page, re.S), key=len)
    assert len(longest) > 1_000_000
    return page.replace(longest, "")


def test_an_eventful_run_shows_every_figure_and_each_has_points(tmp_path: Path) -> None:
    run = the_run(tmp_path / "run", **EVENTFUL)
    found = figures(render_page([run]))
    assert set(found) == {
        "loss", "eval-loss", "eval-accuracy", "lr", "grad-norm", "throughput", "mfu", "rank-times",
        "imbalance", "memory", "bytes", "goodput", "machine",
    }  # fmt: skip
    for key, figure in found.items():
        assert figure["data"], key
        for trace in figure["data"]:
            assert len(trace["x"]) == len(trace["y"]) > 0, (key, trace["name"])
        for axis in ("xaxis", "yaxis"):
            if key not in ("bytes", "goodput") or axis == "xaxis":
                assert figure["layout"][axis]["title"]["text"], (key, axis)


def test_a_run_that_compares_answers_shows_its_rewards(tmp_path: Path) -> None:
    found = figures(render_page([the_run(tmp_path / "run", prefers=True)]))
    for name in ("reward-margin", "reward-accuracy"):
        assert all(trace["x"] for trace in found[name]["data"])
    plain = figures(render_page([the_run(tmp_path / "plain")]))
    assert not [name for name in plain if name.startswith("reward")]


def test_other_nodes_stand_in_the_table_of_the_machine(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", Story(steps=100, ranks=4))
    (alone,) = read_runs([run])
    records = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    sample = next(record for record in records if record["event"] == "system")
    others = [{**sample, "node": 2, "cpu_percent": percent} for percent in (10.0, 30.0)]
    with (run / "ledger.jsonl").open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in others)
    (found,) = read_runs([run])
    before, (panel,) = (
        [panel for panel in clock_panels([one]) if panel.key == "machine"] for one in (alone, found)
    )
    assert panel.figure == before[0].figure
    assert [*panel.rows] == [
        *before[0].rows,
        ["node of rank 2: processor", "20%", "10%", "30%"],
        ["node of rank 2: memory", "20%", "20%", "20%"],
    ]
    assert "other nodes" in panel.note and not before[0].note


def test_every_phase_of_goodput_has_a_place_in_the_bar() -> None:
    assert set(PHASE_ORDER) == set(PHASES)
    assert len(set(PHASE_ORDER.values())) == len(PHASES)


def test_a_clock_that_was_set_back_or_is_absurd_is_no_obstacle(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", Story(steps=50, ranks=2))
    records = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    records[0]["time"], records[-1]["time"] = 1e18, 5.0
    (run / "ledger.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert "9999-12-31" in render_page(read_runs([run]))


def test_what_an_older_ledger_lacks_is_left_out(tmp_path: Path) -> None:
    run = the_run(tmp_path / "run", per_rank=False)
    lean = [
        {k: v for k, v in event.fields().items() if k not in ("device", "hosts", "versions")}
        for event in run.events
        if not isinstance(event, SystemEvent)
    ]
    ledger = tmp_path / "run" / "ledger.jsonl"
    ledger.write_text("".join(json.dumps(record) + "\n" for record in lean), encoding="utf-8")
    (tmp_path / "run" / "result.json").unlink()
    page = render_page(read_runs([tmp_path / "run"]))
    assert set(figures(page)) == {
        "loss", "eval-loss", "eval-accuracy", "lr", "grad-norm", "throughput", "memory", "bytes",
        "goodput",
    }  # fmt: skip
    assert "What the model answers" not in page


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", Story(steps=3, finished=False))
    whole = (run / "ledger.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for lines in (0, 1, 2, len(whole)):
        (run / "ledger.jsonl").write_text("".join(whole[:lines]) + '{"half', encoding="utf-8")
        (found,) = read_runs([run])
        assert "<h1>run</h1>" in render_page([found])
        assert found.state == "not finished"


def test_values_are_text_wherever_they_stand(tmp_path: Path) -> None:
    name = "<img src=x onerror=alert(1)> & 'co'"
    run = write_run(tmp_path / name, Story(**EVENTFUL))
    other = write_run(tmp_path / "other", Story(**EVENTFUL))
    made = json.loads((run / "run.json").read_text())
    made["versions"][HOSTILE], made["command"] = HOSTILE, [HOSTILE]
    (run / "run.json").write_text(json.dumps(made))
    recipe = {"model": {"name": HOSTILE}, "train": {HOSTILE: 1}}
    (run / "recipe.yaml").write_text(json.dumps(recipe))
    failure(run, HOSTILE)
    for runs in ([run], [run, other]):
        page = render_page(read_runs(runs))
        rest = without_plotly(page)
        assert HOSTILE not in rest
        assert "<img" not in rest
        assert "&lt;script&gt;" in rest
        assert "\x08" not in page
        assert page.count("</script>") == 3
        # plotly reads tags in its texts, so that they are escaped for it once more.
        names = [trace["name"] for trace in figures(page)["loss"]["data"]]
        assert len(runs) == 1 or any("&lt;img" in name for name in names), names


def test_the_page_may_load_nothing(tmp_path: Path) -> None:
    page = render_page([the_run(tmp_path / "run", **EVENTFUL)])
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    assert policy[1] == (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    )
    rest = without_plotly(page)
    assert not re.search(r"https?:|//[a-z]|src=|@import|url\(", rest)
    assert re.findall(r"<link [^>]*>", rest) == ['<link rel="icon" href="data:,">']


def test_traces_are_linked_from_wherever_the_page_stands(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a run", Story(steps=5))
    for page, link in (("a run/report.html", ""), ("out/page.html", "../a%20run/")):
        (tmp_path / "out").mkdir(exist_ok=True)
        assert main(["report", str(run), "--out", str(tmp_path / page)]) == 0
        assert "perfetto" not in (tmp_path / page).read_text(encoding="utf-8")
        (run / "profile").mkdir(exist_ok=True)
        trace = run / "profile" / "steps-2-3-a1-rank-0.json.gz"
        trace.touch()
        assert main(["report", str(run), "--out", str(tmp_path / page)]) == 0
        text = (tmp_path / page).read_text(encoding="utf-8")
        assert f'<a href="{link}profile/{trace.name}">{trace.name}</a>' in text
        trace.unlink()


def test_no_secret_of_the_environment_is_in_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "planted-0123456789abcdef"
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, secret)
    run = write_run(tmp_path / "run", Story(**EVENTFUL))
    assert main(["report", str(run)]) == 0
    assert secret not in (run / "report.html").read_text(encoding="utf-8")


def test_the_command_writes_a_private_page_and_says_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one, two = (str(write_run(tmp_path / name, Story(ranks=2))) for name in ("one", "two"))
    assert main(["report", one]) == 0
    assert main(["report", one, two]) == 0
    assert main(["report", one, "--out", "elsewhere.html", "--open", "no"]) == 0
    pages = [Path(one) / "report.html", Path("report.html"), Path("elsewhere.html")]
    for page, line in zip(pages, capsys.readouterr().out.splitlines(), strict=True):
        assert line.startswith(f"{page} (4.9 MB)")
        assert page.stat().st_mode & 0o777 == 0o600
    assert "<h1>2 runs</h1>" in pages[1].read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["none"], "none: is no folder"),
        (["run", "run/"], "is named twice; name it once"),
        (["run", "--out", "no/such/folder.html"], "cannot be written: No such file"),
        (["run", "--out", "run"], "cannot be written: Is a directory; choose another file with"),
        (["new"], "ledger.jsonl: cannot be read: No such file or directory; name the folder of a"),
    ],
)
def test_faults_are_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", Story(ranks=2, steps=20))
    new = write_run(tmp_path / "new", Story(ranks=2, steps=20))
    (new / "ledger.jsonl").unlink()
    assert main(["report", *arguments]) == 2
    line = capsys.readouterr().err
    assert line.startswith("peft-dist: error: ") and line.count("\n") == 1
    assert told in line


def test_without_plotly_the_remedy_is_told(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", Story(ranks=2, steps=20))
    code = (
        "import importlib.util, sys\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'plotly' else find(name, *a)\n"
        "from peft_dist.cli.main import main\n"
        "sys.exit(main(['report', sys.argv[1]]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(run)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == (
        "peft-dist: error: plotly is not installed; pip install 'peft-dist[report]'\n"
    )


def test_what_happened_is_told_in_order(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", Story(**EVENTFUL))
    for attempt in (1, 2, 3):
        lease(run, attempt)
    note = {"rank": 2, "kind": "oom", "step": 200, "error": "out of memory"}
    (run / "attempts" / "00000002-rank-2.json").write_text(json.dumps(note))
    (found,) = read_runs([run])
    told = [(each.attempt, each.step, each.what) for each in timeline_of(found)]
    assert told == [
        (1, 0, "started"),
        (1, 50, "step skipped"),
        (1, 51, "step skipped"),
        (1, 90, "checkpoint not written"),
        (1, 120, "interrupted, and saved"),
        (2, 120, "went on"),
        (2, 200, "cut off"),
        (3, 190, "went on"),
        (3, 400, "finished"),
    ]
    details = {each.what: each.detail for each in timeline_of(found)}
    assert details["cut off"] == "rank 2: out of memory"
    assert details["checkpoint not written"] == "No space left on device"
    assert details["started"] == "4 processes, fsdp, on node1, node2, Slurm job 4242"
    lasted_s = found.events[-1].time - found.events[0].time + 20
    since = [each.since for each in timeline_of(found)]
    assert (since[0], since[-1]) == ("20.0 s", text.duration(lasted_s))


def test_of_a_very_long_timeline_the_first_and_the_last_are_shown(tmp_path: Path) -> None:
    run = the_run(tmp_path / "run", steps=1000, skipped=tuple(range(100, 900)), per_rank=False)
    shown, left_out = timeline([run])
    assert (len(shown), left_out) == (MOST_SHOWN, 802 - MOST_SHOWN)
    assert (shown[0].what, shown[-1].what) == ("started", "finished")
    assert f"… {left_out} more …" in render_page([run])


def test_work_that_was_done_again_is_drawn_once(tmp_path: Path) -> None:
    run = the_run(tmp_path / "run", **EVENTFUL)
    again = [step.step for step in run.of(StepEvent)]
    assert len(again) == 408  # two were skipped, ten done twice
    (each, mean, restart, left_out) = figures(render_page([run]))["loss"]["data"]
    assert each["x"] == sorted(set(again))
    assert len(mean["x"]) == 398
    assert restart["x"] == [120, 190]
    assert left_out["x"] == [50, 51]


def test_samples_are_the_last_told_before_and_after(tmp_path: Path) -> None:
    run = the_run(tmp_path / "run", **EVENTFUL)
    (sample,) = run.samples
    assert (sample.row, sample.before, sample.after) == (3, SAMPLE["before"], " a cat")
    page = render_page([run])
    assert without_plotly(page).count("as expected") == 1
    (unfinished,) = read_runs([_unfinished(tmp_path / "cut")])
    assert [s.after for s in unfinished.samples] == [None]


def _unfinished(path: Path) -> Path:
    run = write_run(path, Story(**{**EVENTFUL, "finished": False}))
    lines = (run / "ledger.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (run / "ledger.jsonl").write_text("".join(lines[:-20]), encoding="utf-8")
    return run


def test_several_runs_are_told_apart_without_colour(tmp_path: Path) -> None:
    stories = [Story(seed=n, rank=8 * (n + 1), **EVENTFUL) for n in range(3)]
    runs = read_runs([write_run(tmp_path / f"run{n}", story) for n, story in enumerate(stories)])
    page = render_page(runs)
    lines = [t for t in figures(page)["eval-loss"]["data"] if t["type"] == "scatter"]
    assert [line["name"] for line in lines] == ["run0", "run1", "run2"]
    assert len({line["line"]["dash"] for line in lines}) == 3
    assert len({line["marker"]["symbol"] for line in lines}) == 3
    bars = figures(page)["bytes"]["data"][:5]
    assert len({bar["marker"]["pattern"]["shape"] for bar in bars}) == 5
    differing = page[page.index("What differs") : page.index('<section id="learning">')]
    assert re.findall(r'<th scope="row">([^<]*)</th>', differing) == ["method.rank"]
    assert re.findall(r"<td>([^<]*)</td>", differing) == ["8", "16", "24"]


def test_runs_whose_shown_names_are_alike_have_bars_of_their_own(tmp_path: Path) -> None:
    names = [f"the-same-beginning-{n}-and-the-same-end" for n in range(3)]
    runs = read_runs([write_run(tmp_path / name, Story(steps=20, ranks=2)) for name in names])
    found = figures(render_page(runs))
    for key in ("bytes", "goodput"):
        assert found[key]["data"][0]["y"] == [0, 1, 2]
        assert found[key]["layout"]["yaxis"]["ticktext"] == ["the-sam…me-end"] * 3


def test_memory_is_held_against_a_plan(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", Story(**EVENTFUL))
    assert "planned" not in without_plotly(render_page(read_runs([run])))
    (run / "plan.json").write_text(
        json.dumps({"bytes_per_rank": 13_500_000_000, "tokens_per_s": 4321.0})
    )
    page = render_page(read_runs([run]))
    (planned,) = [t for t in figures(page)["bytes"]["data"] if t["name"] == "planned"]
    assert planned["x"] == [13_500_000_000] * 4
    assert re.search(r"Planned: 13\.5 GB \([+-]\d+%\)\.", page)
    assert re.search(r"tokens per second\. Planned: 4,321 \([+-]\d+%\)\.", page)


def test_the_bytes_of_a_rank_sum_to_its_peak(tmp_path: Path) -> None:
    page = render_page([the_run(tmp_path / "run", **EVENTFUL)])
    parts = {t["name"]: t["x"] for t in figures(page)["bytes"]["data"]}
    trained = 2_621_440 * 8
    assert parts["base"] == [4_500_000_000 // 4] * 4
    assert parts["adapter"][0] == parts["gradients"][0] == pytest.approx(4 * trained, rel=1e-5)
    assert parts["optimizer"][0] == pytest.approx(8 * trained, rel=1e-5)
    sums = [sum(rank) for rank in zip(*parts.values(), strict=True)]
    assert sums == pytest.approx([12e9 + rank * 1e8 for rank in range(4)], rel=1e-5)


def test_the_slow_rank_is_named(tmp_path: Path) -> None:
    page = render_page([the_run(tmp_path / "run", **EVENTFUL)])
    assert re.search(r"Rank 2 has the longest, 3\d\.\d% above the middle one", page)
    (bars,) = figures(page)["rank-times"]["data"]
    assert max(bars["y"]) == bars["y"][2]


def test_many_ranks_get_marks_and_their_fullest_one_a_bar(tmp_path: Path) -> None:
    run = the_run(tmp_path / "run", steps=60, ranks=64, gpus=8)
    found = figures(render_page([run]))
    assert found["rank-times"]["data"][0]["mode"] == "markers"
    assert len(found["rank-times"]["data"][0]["x"]) == 64
    assert found["bytes"]["layout"]["yaxis"]["ticktext"] == ["rank 63"]
    assert [t["name"] for t in found["memory"]["data"]] == ["fullest rank", "emptiest rank"]


@pytest.mark.parametrize("length", [1, 4, 999, 1000, 1001, 2500, 100_000])
def test_a_thinned_line_keeps_ends_lowest_and_highest_in_order(length: int) -> None:
    dice = random.Random(length)
    series = Series(list(range(length)), [dice.gauss(0, 1) for _ in range(length)])
    thin = series.thinned()
    assert len(thin) <= MOST_POINTS
    assert len(thin) == length or len(thin) > MOST_POINTS * 0.9
    assert list(thin.x) == sorted(set(thin.x))
    assert (thin.x[0], thin.x[-1]) == (0, length - 1)
    assert all(series.y[int(x)] == y for x, y in zip(thin.x, thin.y, strict=True))
    part = -(-length // 499) if length > MOST_POINTS else 1
    for middle in range(part, length - part, 7):
        if series.y[middle] == max(series.y[middle - part : middle + part + 1]):
            assert middle in thin.x  # a spike, as far as a part reaches


def test_a_mean_is_of_a_point_and_its_neighbours() -> None:
    series = Series(list(range(400)), [float(n % 10) for n in range(400)])
    assert series.window == 10
    mean = series.mean()
    assert mean.y[4:390] == pytest.approx([4.5] * 386)
    assert mean.y[0] == pytest.approx(2.5)  # of the six that are there
    assert Series([1, 2], [3.0, 4.0]).mean().y == [3.0, 4.0]


def test_numbers_that_are_none_are_no_points() -> None:
    events = [
        StepEvent(step=n, loss=1.0, tokens_per_s=1.0, mfu=value)
        for n, value in enumerate([0.25, None, 0.5])
    ]
    series = Series.of([*events, StepEvent(step=9, loss=1.0, tokens_per_s=1.0)], "mfu")
    assert (series.x, series.y) == ([0, 2], [0.25, 0.5])
    assert [number(value) for value in (1.0, None, "2", True, 3, math.inf)] == [
        1.0, None, None, None, 3.0, None,
    ]  # fmt: skip


def test_numbers_are_written_as_people_read_them() -> None:
    assert text.size(12_345_678) == "12.3 MB"
    assert text.size(999_950) == "1.0 MB"
    assert text.size(17) == "17 B"
    assert text.sizes([12.0e9, 12.34e9]) == "12.0 to 12.3 GB"
    assert text.sizes([900e6, 1.2e9]) == "900.0 MB to 1.2 GB"
    assert text.duration(200) == "3 min 20 s"
    assert text.duration(59.96) == "60.0 s"
    assert text.duration(3 * 86400 + 7200) == "3 d 2 h"
    assert text.count(1234) == "1,234"
    assert [text.figure(v) for v in (0.0, 4.1534, 1234.5, 5.2e-4)] == [
        "0", "4.153", "1,234", "5.20e-04",
    ]  # fmt: skip
    assert text.rate(0.001) == "0.001"
    assert text.share(0.9149) == "91.5%"
    assert (text.some("restart", 1), text.some("restart", 2)) == ("1 restart", "2 restarts")


@pytest.mark.slow
def test_a_hundred_thousand_steps_make_a_light_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", Story(steps=100_000, ranks=8, gpus=8, evaluate_every=500))
    page = render_page(read_runs([run]))
    assert len(without_plotly(page)) < 600_000
    assert "Lines have 1,000 points at most, of up to" in page
    assert "Of the 100,000 steps of run," in page
    for figure in figures(page).values():
        assert all(len(trace["x"]) <= MOST_POINTS for trace in figure["data"])
