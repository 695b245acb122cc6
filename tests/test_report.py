"""The report: what is read from a record, what is drawn of it, and what the page may not do."""

from __future__ import annotations

import csv
import json
import math
import re
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tomli_w
from click.testing import CliRunner

import gossipfl
from gossipfl.cli import main
from gossipfl.errors import ConfigError
from gossipfl.scenario.config import load_scenario
from gossipfl.scenario.report import write_report
from gossipfl.scenario.report.curves import accuracy_curve, plot_curves, plot_segment_staleness, run_keys, staleness_by_round
from gossipfl.scenario.report.links import plot_topology, plot_traffic
from gossipfl.scenario.report.page import OWN_TABLE
from gossipfl.scenario.report.plots import log_scale
from gossipfl.scenario.report.reading import read_run, read_runs, short_name, title
from gossipfl.scenario.report.tables import compared, differences, faults, figures, origin, planned, seconds, size
from gossipfl.scenario.report.tensorboard import SUFFIX, write_tensorboard
from gossipfl.scenario.report.timeline import plot_timeline
from gossipfl.scenario.sweep import run_sweep, sweep_runs

HOSTILE = "<img src=x onerror=alert(1)></script><script>alert(2)</script>"


def a_round(peer: str, number: int, **fields: object) -> dict:
    return {
        "event": "round",
        "peer": peer,
        "round": number,
        "time_s": 2.0 * number,
        "accuracy_after": 0.5,
        "train_s": 1.0,
        "wait_s": 0.75,
        "merge_s": 0.25,
        "payload_bytes": 2**20,
        "wire_bytes": 2**20 + 100,
        "segments_mixed": 4,
        "staleness_mean": 0.0,
        "staleness_max": 0,
        **fields,
    }


def a_quick_run(**changes: object) -> dict:
    """A scenario of six peers and three rounds of one step each."""
    return {
        "peers": 6,
        "rounds": 3,
        "model_args": {"hidden": [8]},
        "training": {"local_steps": 1, "batch_size": 8},
        "gossip": {"segments": 2, "replicas": 2},
        **changes,
    }


def write_record(folder: Path, events: list[dict], summary: dict | None = None, scenario: str | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    text = 'name = "small"\nseed = 0\npeers = 3\nrounds = 2\n[topology]\nkind = "ring"\n' if scenario is None else scenario
    (folder / "scenario.toml").write_text(text)
    return folder


@pytest.fixture
def folder(tmp_path):
    """Three peers, two rounds; accuracies 0.2, 0.4, 0.6 and then 0.5, 0.7, 0.9."""
    events = [
        a_round(f"p{peer}", number, accuracy_after=0.2 * (peer + 1) if number == 1 else 0.5 + 0.2 * peer)
        for number in (1, 2)
        for peer in (2, 0, 1)
    ]
    events += [{"event": "finished", "peer": f"p{peer}", "round": 2, "error": None} for peer in range(3)]
    summary = {"scenario": "small", "seed": 0, "clock": "local", "accuracy": {"mean": 0.7, "average_model": 0.95}}
    return write_record(tmp_path / "small", events, summary)


class Tags(HTMLParser):
    """All tags with their attributes, and the text of the page outside of scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._inside = tag

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside not in ("script", "style"):
            self.text += data


def page_of(path: Path) -> Tags:
    return Tags(path.read_text(encoding="utf-8"))


def specs_of(path: Path) -> dict:
    return json.loads(re.search(r'id="plots">(.*?)</script>', path.read_text(encoding="utf-8"))[1])


def rows_of(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_needs_no_network(folder):
    tags = page_of(write_report([folder])).tags
    assert not [attributes for _, attributes in tags if {"src", "href"} & attributes.keys()]
    policy = next(attributes["content"] for tag, attributes in tags if attributes.get("http-equiv"))
    assert policy.startswith("default-src 'none'")


def test_plotly_is_inlined_once_however_many_runs_there_are(folder):
    page = write_report([folder, folder], folder / "twice.html").read_text(encoding="utf-8")
    assert page.count("plotly.js v") == 1


def test_the_report_lies_in_the_first_run_with_its_tables_beside_it(folder):
    assert write_report([folder]) == folder / "report.html"
    assert sorted(path.stem for path in (folder / "report.csv").iterdir()) == [
        "accuracy-over-bytes",
        "accuracy-over-rounds",
        "accuracy-over-time",
        "faults",
        "timeline",
        "topology",
    ]


def test_tables_of_an_earlier_report_do_not_stay_beside_those_of_the_next(folder, tmp_path):
    tables = tmp_path / "page.csv"
    write_report([folder, folder, folder], tmp_path / "page.html")
    assert all(OWN_TABLE.fullmatch(path.name) for path in tables.iterdir()), "and those of every plot"
    assert [row["number"] for row in rows_of(tables / "runs.csv")] == ["1", "2", "3"]
    (tables / "mine.csv").touch()
    write_report([folder, folder], tmp_path / "page.html")
    assert {path.name.partition("-")[0] for path in tables.glob("*-faults.csv")} == {"1", "2"}
    write_report([folder], tmp_path / "page.html")
    assert not list(tables.glob("[0-9]*")) and not (tables / "runs.csv").exists() and (tables / "mine.csv").exists()


def test_every_drawing_of_the_page_has_its_data(folder):
    path = write_report([folder, folder], folder / "twice.html")
    drawn = {attributes["data-plot"] for _, attributes in page_of(path).tags if "data-plot" in attributes}
    assert drawn == specs_of(path).keys() and "run1-timeline" in drawn


def test_text_of_a_record_stays_text(tmp_path):
    events = [
        a_round(HOSTILE, 1),
        {"event": "fault", "at": HOSTILE, "peer": HOSTILE, "round": 1, "kind": HOSTILE, "detail": HOSTILE},
        {"event": "finished", "peer": HOSTILE, "round": 1, "error": HOSTILE, "received_from": {HOSTILE: 5}},
    ]
    summary = {"scenario": HOSTILE, "machine": HOSTILE, "accuracy": HOSTILE, "seed": {HOSTILE: HOSTILE}}
    path = write_report([write_record(tmp_path / "hostile", events, summary, f"# {HOSTILE}\n")])
    page = page_of(path)
    assert not [tag for tag, attributes in page.tags if tag == "img" or "onerror" in attributes]
    assert [tag for tag, _ in page.tags].count("script") == 3  # plotly, the data, and what draws it
    assert page.text.count(HOSTILE) >= 6
    specs = json.dumps(specs_of(path))  # plotly reads tags in labels, and so gets none
    assert "<img" not in specs and "<script" not in specs and "&lt;img" in specs


def test_a_number_that_is_none_leaves_a_gap(tmp_path):
    events = [a_round("p0", 1, accuracy_after=float("nan"), time_s="soon"), a_round("p0", 2, payload_bytes=10**400)]
    path = write_report([write_record(tmp_path / "odd", events, {})])
    assert specs_of(path)["accuracy-over-rounds"]["data"][2]["x"] == [2]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"event": "round"}', '{"event": ["round"]}', "1e999", "[" * 100_000])
def test_whatever_the_events_are_there_is_a_report(tmp_path, text):
    folder = write_record(tmp_path / "odd", [])
    (folder / "events.jsonl").write_text(text)
    assert "No peer has reported a round." in page_of(write_report([folder])).text


def test_a_record_that_was_cut_short_is_reported_with_a_note(folder):
    (folder / "summary.json").unlink()
    with (folder / "events.jsonl").open("a") as file:
        file.write('{"event": "round", "pe')
    text = page_of(write_report([folder])).text
    assert "The record has no summary.json: the run goes on or was cut short, or" in text
    assert "1 line could not be read and is left out." in text
    assert "70.00 %" in text  # the mean of 0.5, 0.7, 0.9


def test_a_record_that_was_cut_short_is_still_one_in_virtual_seconds(folder):
    (folder / "summary.json").unlink()
    assert read_run(folder, "small").time_unit == "seconds"
    (folder / "scenario.toml").write_text('clock = "virtual"\n')
    assert read_run(folder, "small").time_unit == "virtual seconds"


def test_what_changes_how_a_run_is_to_be_read_is_told_first_also_beside_others(folder, tmp_path):
    warning = {"event": "warning", "detail": "training diverges: the loss of p0 in round 1 is nan"}
    odd = write_record(tmp_path / "odd", [a_round("p0", 1), warning, warning], {"exit_code": 1})
    stopped = write_record(tmp_path / "stopped", [a_round("p0", 1)], {"exit_code": 130})
    text = page_of(write_report([folder, odd, stopped])).text
    assert text.index("odd: The run failed: fewer peers") < text.index("Figures, with ratios")
    assert text.index("stopped: The run was interrupted.") < text.index("Figures, with ratios")
    assert text.count("Warning: training diverges: the loss of p0") == 2  # beside the others, and in its own part


def test_a_folder_that_holds_no_run_is_named_with_the_remedy(tmp_path):
    with pytest.raises(ConfigError, match=rf"{tmp_path} holds no run .*events.jsonl.*runs/quickstart"):
        write_report([tmp_path])
    with pytest.raises(ConfigError, match="nowhere is not a folder"):
        write_report([Path("nowhere")])


def test_the_folder_of_a_sweep_stands_for_the_runs_within_it(folder, tmp_path):
    sweep = tmp_path / "sweep"
    for segments in (10, 2):
        write_record(sweep / f"segments={segments}", [a_round("p0", 1)], {})
    (sweep / "notes").mkdir()
    (sweep / "sweep.csv").write_text("run\n")
    path = write_report([sweep, folder])
    assert path == sweep / "report.html"
    assert [run.name for run in read_runs([sweep, folder])] == ["segments=2", "segments=10", "small"]
    assert "segments=2, segments=10, small" in page_of(path).text


def test_runs_of_a_sweep_go_by_their_settings_alone_and_share_one_legend(tmp_path):
    base = tmp_path / "base.toml"
    base.write_text(tomli_w.dumps(a_quick_run(clock="virtual")))
    runs = sweep_runs(base, ["gossip.segments=1,2", "gossip.replicas=1,2"], out=tmp_path / "sweep")
    run_sweep(runs, tmp_path / "sweep", jobs=1)
    path = write_report([tmp_path / "sweep"])
    names = [f"segments={segments} replicas={replicas}" for segments in (1, 2) for replicas in (1, 2)]
    read = read_runs([tmp_path / "sweep"])
    assert [run.name for run in read] == names == [key.name for key in run_keys(read)]
    assert title(read) == "sweep: 4 runs"
    page, specs = page_of(path), specs_of(path)
    assert [attributes["data-group"] for _, attributes in page.tags if "data-group" in attributes] == ["0", "1", "2", "3"]
    for key in ("accuracy-over-rounds", "accuracy-over-time", "accuracy-over-bytes", "consensus-distance"):
        assert specs[key]["layout"]["showlegend"] is False
        assert {trace["legendgroup"] for trace in specs[key]["data"]} == {"0", "1", "2", "3"}
    assert {row["run"] for row in rows_of(path.with_suffix(".csv") / "accuracy-over-rounds.csv")} == set(names)


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("gossip.segments=1,gossip.replicas=2", "segments=1 replicas=2"),
        ("topology.kind=ring,data.partition.kind=iid,seed=0", "topology.kind=ring data.partition.kind=iid seed=0"),
        ("model_args.hidden=_64,32_,seed=1", "hidden=_64,32_ seed=1"),
        ("quickstart-2", "quickstart-2"),
        ("a,b=1", "a,b=1"),
    ],
)
def test_a_folder_of_a_sweep_is_named_in_short(folder, name):
    assert short_name(folder) == name


@pytest.mark.parametrize(("greatest", "settings"), [(1.5, None), (4.0, None), (100.0, "D2"), (10.0**6, 1), (10.0**30, 3)])
def test_labels_of_a_logarithmic_axis_keep_apart(greatest, settings):
    assert log_scale(np.array([1.0, np.nan, 0.0, greatest])).get("dtick") == settings


def test_a_page_is_only_written_where_a_page_may_be(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"--out .*scenario.toml is no page; give a name that ends in .html"):
        write_report([folder], folder / "scenario.toml")
    (tmp_path / "taken.html").mkdir()
    with pytest.raises(ConfigError, match=r"taken.html cannot be written: Is a directory"):
        write_report([folder], tmp_path / "taken.html")


def test_without_plotly_the_extra_to_install_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(ConfigError, match=r"pip install 'gossipfl\[report\]'"):
        write_report([folder])


def test_the_command_tells_where_the_page_is(folder, tmp_path):
    result = CliRunner().invoke(main, ["report", str(folder), "--out", str(tmp_path / "new" / "page.html")])
    assert result.stdout == f"{tmp_path / 'new' / 'page.html'}\n" and result.exit_code == 0
    assert CliRunner().invoke(main, ["report", str(tmp_path / "new")]).exit_code == 2


# --- what is drawn ----------------------------------------------------------------------------------------------------


def test_the_curves_are_mean_worst_and_best_of_each_round(folder):
    rows = rows_of(write_report([folder]).with_suffix(".csv") / "accuracy-over-bytes.csv")
    assert [row["received_mib_per_peer"] for row in rows] == ["1", "2"]
    assert [float(row["mean"]) for row in rows] == pytest.approx([0.4, 0.7])
    assert [float(row["least"]) for row in rows] == pytest.approx([0.2, 0.5])
    assert [float(row["greatest"]) for row in rows] == pytest.approx([0.6, 0.9])
    assert [row["average_model"] for row in rows] == ["", "0.95"]  # the summary knows the last


def test_a_single_evaluation_is_seen_as_a_point(tmp_path):
    state = {"event": "state", "round": 1, "time_s": 2.0, "consensus_distance": 3.0, "average_accuracy": 0.6}
    specs = specs_of(write_report([write_record(tmp_path / "one", [a_round("p0", 1), state])]))
    assert [trace["mode"] for trace in specs["accuracy-over-rounds"]["data"]] == ["lines", "lines", "markers", "markers"]
    assert specs["consensus-distance"]["data"][0]["mode"] == "markers"


def test_where_all_values_are_one_no_scale_tells_of_others(tmp_path):
    events = [a_round(f"p{peer}", 1, received_from={f"p{1 - peer}": 2**20}) for peer in (0, 1)]
    run = read_run(write_record(tmp_path / "even", events), "even")
    traffic = plot_traffic(run).traces[0]
    assert (traffic["zmin"], traffic["zmax"]) == (0, 1)
    assert plot_topology(run).traces[1]["marker"]["showscale"] is False


def test_states_give_the_average_model_and_the_consensus_distance_by_round(folder):
    with (folder / "events.jsonl").open("a") as file:
        for number, distance in (1, 3.0), (2, 0.5):
            state = {"event": "state", "round": number, "time_s": 2.0 * number, "consensus_distance": distance}
            file.write(json.dumps(state | {"average_accuracy": 0.4 + 0.2 * number}) + "\n")
    path = write_report([folder])
    specs = specs_of(path)
    assert specs["consensus-distance"]["data"][0]["y"] == [3.0, 0.5]
    assert specs["accuracy-over-time"]["data"][3]["y"] == [0.6, 0.8]


def test_a_distance_of_nothing_is_told_where_it_cannot_be_drawn(tmp_path):
    state = {"event": "state", "time_s": 2.0, "average_accuracy": 0.6}
    for name, distances in (("apart", (9.0, 1.0)), ("one", (0.0, 0.0))):
        states = [state | {"round": number, "consensus_distance": value} for number, value in enumerate(distances, start=1)]
        write_record(tmp_path / name, [a_round("p0", 1), a_round("p0", 2), *states])
    assert "no place on this logarithmic axis" in plot_curves(read_runs([tmp_path]))[3].about
    assert "no place" not in plot_curves(read_runs([tmp_path / "one"]))[3].about


def test_what_is_not_in_the_record_is_left_out_in_a_line_that_says_why(folder):
    path = write_report([folder])
    text = page_of(path).text
    assert "Consensus distance is left out. The record has no distances." in text
    assert "Staleness is left out. No mixed segment was stale" in text
    assert "Traffic per link is left out. The record does not say who received how much from whom." in text


def test_staleness_is_the_mean_over_segments(tmp_path):
    events = [
        a_round("p0", 1, segments_mixed=3, staleness_mean=1.0, staleness_max=2),
        a_round("p1", 1, segments_mixed=1),
    ]
    rows = rows_of(write_report([write_record(tmp_path / "stale", events, {})]).with_suffix(".csv") / "staleness.csv")
    figures = {"staleness_mean": "0.75", "staleness_max": "2", "segments": "4"}
    assert rows == [{"run": "stale", "round": "1", "time_s": "2", **figures}]


def test_staleness_is_told_for_each_segment_and_adds_up_to_that_of_the_round(tmp_path):
    scenario = a_quick_run(
        rounds=10,
        gossip={"segments": 3, "replicas": 2, "max_staleness": math.inf},
        network={"latency": "30ms", "jitter": "20ms"},
        compute={"step_time": "50ms", "stragglers": {"peers": ["p1"], "slowdown": 3}},
    )
    folder = gossipfl.run(scenario, out=tmp_path / "run").folder
    run = read_run(folder, "run")
    (plot,) = plot_segment_staleness(run)
    assert np.shape(plot.traces[0]["z"]) == (3, len(np.unique(run.rounds["round"])))
    told = staleness_by_round(run)
    whole = run.rounds["segments_mixed"] == 6  # a mean of means is the mean only where all copies came
    assert whole.all() and told["staleness_mean"].max() > 0
    assert np.mean(plot.traces[0]["z"], axis=0) == pytest.approx(told["staleness_mean"], abs=1e-4)
    assert write_report([folder]).with_suffix(".csv").joinpath("staleness-by-segment.csv").is_file()


def test_times_of_a_simulated_run_are_virtual(folder):
    (folder / "summary.json").write_text('{"clock": "virtual"}')
    assert specs_of(write_report([folder]))["accuracy-over-time"]["layout"]["xaxis"]["title"]["text"] == "virtual seconds"


def test_a_round_is_laid_out_backwards_from_its_end(tmp_path):
    folder = write_record(tmp_path / "one", [a_round("p0", 1, time_s=5.0, train_s=1.0, wait_s=2.0, merge_s=0.5)])
    training, waiting, merging = plot_timeline(read_run(folder, "one")).traces
    assert (training["base"], training["x"]) == ([2.0], [1.0])
    assert (waiting["base"], waiting["x"]) == ([3.0], [1.5])  # waiting counts the merging within it
    assert (merging["base"], merging["x"]) == ([4.5], [0.5])
    assert waiting["customdata"] == [[1.0, 1.5]]  # what the pointer shows: the round, and its seconds


def test_the_straggler_of_many_peers_is_drawn_and_named(tmp_path):
    events = [a_round(f"p{peer}", 1, train_s=9.0 if peer == 77 else 1.0) for peer in range(100)]
    plot = plot_timeline(read_run(write_record(tmp_path / "many", events), "many"))
    assert "p77" in plot.layout["yaxis"]["ticktext"] and len(plot.layout["yaxis"]["ticktext"]) == 60
    assert "p77 trains longest: 9 s a round; median of the peers: 1 s." in plot.about
    assert "Thinned: 60 of 100 peers" in plot.about


def test_a_bar_of_a_long_run_sums_several_rounds(tmp_path):
    events = [a_round("p0", number) for number in range(1, 251)]
    plot = plot_timeline(read_run(write_record(tmp_path / "long", events), "long"))
    assert "Thinned: each bar sums 3 rounds." in plot.about
    assert len(plot.traces[0]["x"]) == 84 and plot.traces[0]["x"][0] == 3.0


def test_where_nobody_sends_anything_there_is_no_traffic_rather_than_none_known(tmp_path):
    run = read_run(write_record(tmp_path / "alone", [a_round("p0", 1, payload_bytes=0)]), "alone")
    assert plot_traffic(run).missing == "Nobody received anything."


def test_traffic_is_by_receiver_and_sender(folder):
    with (folder / "events.jsonl").open("a") as file:
        sent = {"p0": 2**20, "p2": 2**21, "stranger": 7}
        file.write(json.dumps({"event": "finished", "peer": "p1", "error": None, "received_from": sent}) + "\n")
    plot = plot_traffic(read_run(folder, "small"))
    assert plot.traces[0]["z"] == [[None, None, None], [1.0, None, 2.0], [None, None, None]]


def test_traffic_has_all_that_was_received_also_by_who_was_killed_or_never_finished(tmp_path):
    churn = {"online": 0.7, "period": "1s"}
    scenario = a_quick_run(
        seed=2, rounds=40, network={"latency": "20ms", "uplink": "1Mbit"}, compute={"step_time": "50ms"}, churn=churn
    )
    result = gossipfl.run(scenario, out=tmp_path / "run")
    run = read_run(result.folder, "run")
    assert len(run.finished) < 6 and any(each.change == "away" for each in run.planned), "the scenario is to take some away"
    rows = plot_traffic(run).columns
    by_peer = Counter()
    for receiver, num_bytes in zip(rows["receiver"], rows["payload_bytes"], strict=True):
        by_peer[receiver] += num_bytes
    assert sum(by_peer.values()) == result.summary["bytes"]["payload"]
    done = np.bincount(run.rounds["peer"].astype(int), run.rounds["payload_bytes"])
    assert all(by_peer[peer] >= num_bytes for peer, num_bytes in zip(run.peers, done, strict=True))
    assert set(by_peer) == set(run.peers) and sum(by_peer.values()) > done.sum()


def test_a_straggler_that_adopts_has_its_training_in_the_timeline(tmp_path):
    scenario = a_quick_run(
        peers=8,
        rounds=30,
        gossip={"segments": 2, "replicas": 2, "max_staleness": math.inf},
        topology={"kind": "regular", "degree": 4},
        network={"latency": "20ms"},
        compute={"step_time": "50ms", "stragglers": {"peers": ["p3"], "slowdown": 8}},
    )
    run = read_run(gossipfl.run(scenario, out=tmp_path / "run").folder, "run")
    of_p3 = run.rounds["peer"] == 3
    adopted = of_p3 & (run.rounds["train_s"] > 0) & np.isnan(run.rounds["train_loss"])
    assert adopted.any() and run.rounds["train_s"][adopted] == pytest.approx(0.4)
    bars = plot_timeline(run).columns
    its = bars["training_at"][np.array(bars["peer"]) == "p3"], bars["end_s"][np.array(bars["peer"]) == "p3"]
    gaps = its[0][1:] - its[1][:-1]  # a round begins where the one before ended
    assert np.abs(gaps).max() < 1e-3 and its[0][0] < 0.1


def test_the_traffic_of_many_peers_is_summed_in_groups(tmp_path):
    events = [{"event": "finished", "peer": f"p{peer}", "error": None, "received_from": {"p0": 2**20}} for peer in range(250)]
    plot = plot_traffic(read_run(write_record(tmp_path / "many", events), "many"))
    assert "each cell sums 3 by 3 peers" in plot.about
    assert len(plot.traces[0]["z"]) == 84 and plot.traces[0]["z"][0][0] == 3.0


def test_peers_are_drawn_with_their_last_accuracy_and_those_that_failed_with_a_cross(folder):
    with (folder / "events.jsonl").open("a") as file:
        file.write(json.dumps({"event": "finished", "peer": "p1", "error": "its process ended"}) + "\n")
    lines, peers = plot_topology(read_run(folder, "small")).traces
    assert peers["marker"]["color"] == [0.5, 0.7, 0.9]
    assert peers["marker"]["symbol"] == ["circle", "x", "circle"]
    assert lines["x"].count(None) == 3  # a ring of three


def test_a_peer_that_was_killed_did_not_finish_though_it_had_no_time_to_say_so(tmp_path):
    churn = {"kill": [{"peer": "p1", "at": "50ms"}, {"peer": "p2", "at": "50ms"}], "rejoin": [{"peer": "p1", "at": "70ms"}]}
    scenario = a_quick_run(rounds=20, compute={"step_time": "10ms"}, churn=churn, min_peers=5)
    run = read_run(gossipfl.run(scenario, out=tmp_path / "run").folder, "run")
    assert run.dead == ["p2"] and dict(figures(run))["peers that did not finish"] == "1"
    assert plot_topology(run).traces[1]["marker"]["symbol"].count("x") == 1
    assert faults(run)[-1] == ("did not finish", "p2", "", "", "1", "was away at the end, as planned")


@pytest.mark.parametrize(
    ("topology", "num_links"),
    [({"kind": "full"}, 15), ({"kind": "regular", "degree": 4}, 12), ({"kind": "ring", "dynamic": True}, 6)],
    ids=lambda value: str(value),
)
def test_the_topology_of_a_run_is_drawn_from_its_record(tmp_path, topology, num_links):
    scenario = a_quick_run(topology=topology)
    run = read_run(gossipfl.run(scenario, clock="virtual", out=tmp_path / "run").folder, "run")
    plot = plot_topology(run)
    drawn = load_scenario(scenario).build_topology()
    first = drawn.rounds[0] if topology.get("dynamic") else drawn
    assert plot.traces[0]["x"].count(None) == num_links, plot.missing
    assert plot.columns["num_neighbours"] == [first.degree(peer) for peer in range(6)]
    assert plot.about.startswith("The graph of round 1;") == topology.get("dynamic", False)


def test_a_graph_of_many_peers_is_thinned_and_says_so(tmp_path):
    scenario = 'peers = 400\nseed = 0\n[topology]\nkind = "full"\n'
    plot = plot_topology(read_run(write_record(tmp_path / "many", [a_round("p0", 1)], {}, scenario), "many"))
    assert len(plot.traces[1]["x"]) == 300
    assert "300 of 400 peers, those nearest to p0" in plot.about and "of 44,850 links" in plot.about


@pytest.mark.parametrize("kind", ["ring", "full", "regular"])
def test_a_graph_of_more_peers_than_any_run_has_is_not_drawn(tmp_path, kind):
    """Else it would take hours."""
    scenario = f'peers = 5_000_000_000\n[topology]\nkind = "{kind}"\n'
    folder = write_record(tmp_path / "edited", [a_round("p0", 1)], {}, scenario)
    assert plot_topology(read_run(folder, "edited")).missing == (
        "The graph cannot be rebuilt from scenario.toml: peers = 5000000000 exceeds 1,000,000; put back the number that the "
        "run had."
    )
    assert write_report([folder]).is_file()


def test_a_function_that_a_record_names_is_not_run(tmp_path):
    scenario = 'peers = 3\n[topology]\nkind = "no_such_module_of_mine:graph"\n'
    folder = write_record(tmp_path / "own", [a_round("p0", 1)], {}, scenario)
    assert "which a report does not run" in plot_topology(read_run(folder, "own")).missing


def test_curves_go_to_tensorboard_by_round(folder, tmp_path, monkeypatch):
    written = {}

    class SummaryWriter:
        def __init__(self, log_dir, filename_suffix):
            self.log_dir = log_dir

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def add_scalar(self, tag, value, step, walltime):
            written[self.log_dir, tag, step] = (round(value, 6), walltime)

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    earlier, theirs = (tmp_path / "board" / "small" / f"events.out.tfevents.1{suffix}" for suffix in (SUFFIX, ""))
    earlier.parent.mkdir(parents=True)
    earlier.touch()
    theirs.touch()
    result = CliRunner().invoke(main, ["report", str(folder), "--tensorboard", str(tmp_path / "board")])
    assert result.exit_code == 0, result.output
    board = str(tmp_path / "board" / "small")
    assert written[board, "accuracy/worst", 1] == (0.2, 2.0) and written[board, "accuracy/mean", 2] == (0.7, 4.0)
    assert written[board, "staleness_max", 2][1] == written[board, "accuracy/mean", 2][1]  # at the time of the round
    assert (board, "accuracy/average_model", 1) not in written
    assert not earlier.exists()  # or both would be drawn as one curve
    assert theirs.exists()


def test_without_tensorboard_the_extra_to_install_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install 'gossipfl\[tensorboard\]'"):
        write_tensorboard([folder], tmp_path / "board")
    told = CliRunner().invoke(main, ["report", str(folder), "--tensorboard", str(tmp_path / "board")])
    assert told.exit_code == 2 and not (folder / "report.html").exists()


# --- tables -----------------------------------------------------------------------------------------------------------


def test_runs_are_compared_by_ratios_to_the_first_and_by_what_differs(tmp_path):
    runs = [
        read_run(
            write_record(
                tmp_path / name,
                [a_round("p0", 1, payload_bytes=num_bytes)],
                {"accuracy": {"mean": accuracy}},
                f'name = "{name}"\n[gossip]\nsegments = {segments}\nreplicas = 2\n',
            ),
            name,
        )
        for name, num_bytes, accuracy, segments in (("a", 1024, 0.5, 1), ("b", 2048, 0.75, 8))
    ]
    rows = {name: [(cell.text, cell.ratio) for cell in cells] for name, cells in compared(runs)}
    assert rows["accuracy, mean of the peers"] == [("50.00 %", ""), ("75.00 %", "× 1.5")]
    assert rows["payload, all"] == [("1.0 KiB", ""), ("2.0 KiB", "× 2")]
    assert differences(runs) == [("gossip.segments", ["1", "8"])]


def test_runs_of_one_name_are_told_apart_by_their_paths(folder, tmp_path):
    other = write_record(tmp_path / "elsewhere" / "small", [a_round("p0", 1)])
    path = write_report([folder, other])
    assert specs_of(path)["accuracy-over-rounds"]["data"][2]["name"] == str(folder)


def test_faults_are_counted_by_kind_and_peer(folder):
    with (folder / "events.jsonl").open("a") as file:
        for number in (1, 2):
            fault = {"event": "fault", "at": f"p{number}", "peer": "p0", "round": number, "kind": "down"}
            file.write(json.dumps(fault | {"detail": f"the connection broke in {number}"}) + "\n")
        file.write(json.dumps({"event": "finished", "peer": "p0", "error": "its process ended"}) + "\n")
    assert faults(read_run(folder, "small")) == [
        ("down", "p0", "p1, p2", "1 to 2", "2", "the connection broke in 1"),
        ("did not finish", "p0", "", "", "1", "its process ended"),
    ]


def test_who_came_and_went_as_planned_is_told_apart_from_faults(folder):
    with (folder / "events.jsonl").open("a") as file:
        for change, peer, time_s in (("kill", "p0", 20.0), ("rejoin", "p0", 40.0), ("kill", "p0", 61.5)):
            file.write(json.dumps({"event": "planned", "change": change, "peer": peer, "time_s": time_s}) + "\n")
    run = read_run(folder, "small")
    assert planned(run) == [("kill", "p0", "2", "20, 61.5"), ("rejoin", "p0", "1", "40")] and faults(run) == []
    path = write_report([folder])
    assert "because the scenario's [churn] says so" in page_of(path).text
    assert rows_of(path.with_suffix(".csv") / "planned.csv")[1] == {
        "what": "rejoin",
        "who": "p0",
        "times": "1",
        "at, seconds": "40",
    }


def test_figures_of_the_summary_come_before_those_of_the_events(folder):
    (folder / "summary.json").write_text('{"accuracy": {"mean": 0.125}, "bytes": {"payload": null}}')
    known = dict(figures(read_run(folder, "small")))
    assert known["accuracy, mean of the peers"] == "12.50 %"
    assert known["accuracy, worst peer"] == "50.00 %"
    assert known["payload, all"] == "6.0 MiB"
    assert "time to simulate" not in known and known["training, all peers"] == "6 s"


def test_virtual_seconds_are_called_so_and_stand_beside_real_ones(folder):
    seconds = {"startup": 1.0, "wall": 2.0, "train": 300.0, "wait": 40.0}
    (folder / "summary.json").write_text(json.dumps({"clock": "virtual", "virtual_seconds": 70.0, "seconds": seconds}))
    known = dict(figures(read_run(folder, "small")))
    assert known["time to simulate"] == "2 s" and known["time to run"] == "70 s virtual"
    assert known["training, all peers"] == "300 s virtual" and known["waiting, all peers"] == "40 s virtual"


def test_a_run_on_sockets_is_measured_by_the_same_clock_as_its_simulation(tmp_path):
    scenario = a_quick_run()
    folders = [gossipfl.run(scenario, clock=clock, out=tmp_path / clock).folder for clock in ("virtual", "local")]
    virtual, local = runs = read_runs(folders)
    rows = dict(compared(runs))
    assert local.figure("seconds", "wall") > 0 and virtual.figure("virtual_seconds") == 0.03
    assert [cell.text for cell in rows["time to run"]] == ["0.03 s virtual", seconds(local.figure("seconds", "wall"))]
    assert [cell.text for cell in rows["time to simulate"]] == [seconds(virtual.figure("seconds", "wall")), "–"]
    by_round, ends = plot_curves(runs)[3].traces
    assert by_round["x"] == [1, 2, 3] and ends["x"] == [1, 3] and ends["mode"] == "markers"
    assert ends["y"] == pytest.approx([local.figure("consensus_distance", end) for end in ("first", "last")], rel=1e-5)
    assert [ends["y"][0], ends["y"][1]] == pytest.approx([by_round["y"][0], by_round["y"][2]], rel=1e-4)


def test_what_it_took_to_the_target_is_told(tmp_path):
    scenario = a_quick_run(rounds=12, training={"local_steps": 8, "learning_rate": 0.5}, compute={"step_time": "10ms"})
    result = gossipfl.run(scenario | {"stop": {"target_accuracy": 0.5}}, out=tmp_path / "run")
    run = read_run(result.folder, "run")
    curve = accuracy_curve(run)
    place = int(np.argmax(curve.mean >= 0.5))
    target = result.summary["to_target"]
    assert 1 < target["round"] == curve.round[place] < 12 and curve.mean[place - 1] < 0.5 <= curve.mean[place]
    assert target["seconds"] == pytest.approx(0.08 * target["round"])
    assert target["payload_bytes"] == 6 * target["round"] * result.summary["bytes"]["payload_per_peer_round"]
    known = dict(figures(run))
    assert known["round of the target"] == f"{target['round']}" and known["target accuracy, reached"] == "50.00 %"
    assert known["time to the target"] == f"{seconds(target['seconds'])} virtual"
    assert known["payload to the target, all"] == size(target["payload_bytes"])


def test_a_target_that_was_not_reached_is_told_without_a_round(tmp_path):
    result = gossipfl.run(a_quick_run(stop={"target_accuracy": 1.0}), clock="virtual", out=tmp_path / "run")
    assert result.summary["to_target"] == {"accuracy": 1.0, "round": None, "seconds": None, "payload_bytes": None}
    known = dict(figures(read_run(result.folder, "run")))
    assert known["target accuracy, not reached"] == "100.00 %" and "target accuracy, reached" not in known


@pytest.mark.parametrize(("num_bytes", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**50, "1,024.0 TiB")])
def test_bytes_are_written_in_the_largest_unit_that_fits(num_bytes, text):
    assert size(num_bytes) == text


def test_peers_are_in_the_order_of_their_numbers(tmp_path):
    folder = write_record(tmp_path / "ten", [a_round(f"p{peer}", 1) for peer in (10, 9, 2)])
    run = read_run(folder, "ten")
    assert run.peers == ["p2", "p9", "p10"] and run.rounds["peer"].tolist() == [2, 1, 0]


def test_a_page_tells_who_has_which_device(tmp_path):
    classes = {"phone": [f"p{number}" for number in range(11)], "server": ["p11", "p12"]}
    summary = {"scenario": "small", "devices": {"classes": classes, "stragglers": ["p3"]}}
    run = read_run(write_record(tmp_path / "run", [a_round("p0", 1)], summary), "small")
    assert dict(origin(run))["devices"] == "phone 11 peers; server p11, p12; stragglers p3"
    plain = read_run(write_record(tmp_path / "plain", [a_round("p0", 1)], {"scenario": "small", "devices": None}), "small")
    assert "devices" not in dict(origin(plain))
