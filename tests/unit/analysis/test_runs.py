"""What run directories say: differences, efficiency, gradients, post-training, where the time went."""

from __future__ import annotations

import json

import pytest

from remit_megatron.analysis.efficiency import reached
from remit_megatron.analysis.report.sections import benchmarks, reproduce
from remit_megatron.analysis.results import evaluation_commands, read_results
from remit_megatron.analysis.runs import differences, placed, read_runs
from remit_megatron.analysis.wall_time import wall_time
from remit_megatron.cli import main
from remit_megatron.runtime.errors import UserError
from tests.unit.analysis.runs import log_line, make_run, setup_line, write_events


def analyze(*words) -> int:
    return main(["analyze", *(str(word) for word in words)])


def test_only_what_differs(tmp_path):
    first = make_run(tmp_path / "a")
    second = make_run(tmp_path / "b", objective={"name": "remit", "epsilon": 0.2}, megatron__lr=5e-4)
    runs = read_runs([str(first), str(second)])
    assert differences(runs) == {
        "megatron.lr": ["0.001", "0.0005"],
        "objective.epsilon": ["not set", "0.2"],
        "objective.name": ["ntp", "remit"],
        "reference": ["none", "checkpoint reference, source live"],  # a section that one has not at all: one line
    }
    assert [run.objective for run in runs] == ["ntp", "remit (epsilon 0.2)"]


def test_names_tell_runs_apart(tmp_path):
    paths = [make_run(tmp_path / "one" / "remit"), make_run(tmp_path / "two" / "remit")]
    assert [run.name for run in read_runs([str(path) for path in paths])] == ["one/remit", "two/remit"]
    with pytest.raises(UserError, match="the same directory twice"):
        read_runs([str(paths[0]), str(paths[0])])


def test_a_half_written_last_line_is_left_out_and_another_is_named(tmp_path):
    run = make_run(tmp_path / "a", steps=5)
    file = run / "metrics.jsonl"
    file.write_text(file.read_text() + '{"iteration": 6, "cons')
    assert read_runs([str(run)])[0].steps == [1, 2, 3, 4, 5]
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], "{half", *lines[1:5]]) + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl line 2"):
        read_runs([str(run)])


@pytest.mark.parametrize(
    ("remove", "said"),
    [("config.yaml", "without config.yaml"), ("metrics.jsonl", "without metrics.jsonl"), (None, "no directory")],
)
def test_what_is_no_run_is_refused(tmp_path, capsys, remove, said):
    path = make_run(tmp_path / "a") if remove else tmp_path / "nothing"
    if remove:
        (path / remove).unlink()
    assert main(["report", str(path), "--output", str(tmp_path / "r.html")]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_reached_goes_straight_between_points():
    assert reached([0, 10, 20], [3.0, 2.0, 1.0], 1.5, higher=False) == 15
    assert reached([0, 10, 20], [0.0, 0.5, 0.4], 0.25, higher=True) == 5
    assert reached([0, 10], [0.0, 0.2], 0.3, higher=True) is None
    assert reached([5, 10], [0.4, 0.5], 0.3, higher=True) == 5


def test_speed_up_of_a_known_pair(tmp_path):
    """Losses in straight lines: the run that is 0.5 lower all along is where the baseline ends in half of its tokens,
    and as its steps take twice as long, in the same hours."""
    baseline = make_run(tmp_path / "baseline")
    better = make_run(tmp_path / "better", level=1.5)
    lines = [json.loads(line) | {"step_seconds": 2.0} for line in (better / "metrics.jsonl").read_text().splitlines()]
    (better / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert analyze("efficiency", baseline, better, "--output", tmp_path / "out") == 0
    data = json.loads((tmp_path / "out" / "efficiency.json").read_text())
    rows = {row["run"]: row for row in data["runs"]}
    assert data["score"] == "validation loss, nats" and not data["higher_is_better"]
    assert rows["baseline"]["tokens_speed_up"] == pytest.approx(1)
    assert rows["better"]["tokens_to_goal"] == pytest.approx(20_000)
    assert rows["better"]["tokens_speed_up"] == pytest.approx(2)
    assert rows["better"]["device_hours_speed_up"] == pytest.approx(1)
    assert rows["better"]["device_hours"] == pytest.approx(2 * 40 * 2 / 3600)  # 40 steps of 2 s on two ranks
    for name in ("efficiency.png", "efficiency.part.json"):
        assert (tmp_path / "out" / name).stat().st_size


def test_a_curve_that_wavers_is_not_faster_than_itself(tmp_path):
    run = make_run(tmp_path / "a")
    losses = [3.0, 2.0, 2.5, 2.0]
    lines = [json.dumps({"iteration": 10 * (i + 1), "lm_loss": loss}) for i, loss in enumerate(losses)]
    (run / "validation.jsonl").write_text("\n".join(lines) + "\n")
    assert analyze("efficiency", run, "--output", tmp_path / "out") == 0
    (row,) = json.loads((tmp_path / "out" / "efficiency.json").read_text())["runs"]
    assert (row["tokens_speed_up"], row["device_hours_speed_up"], row["tokens_to_goal"]) == (1.0, 1.0, 20_000)


def test_scores_of_checkpoints_are_placed_on_their_run(tmp_path):
    first, second = make_run(tmp_path / "ntp"), make_run(tmp_path / "remit")
    results = {}
    for run, scores in ((first, {10: 0.1, 40: 0.3}), (second, {10: 0.3, 40: 0.5})):
        for step, score in scores.items():
            task = {"score": score, "stderr": 0.01, "metric": "acc", "filter": "none", "shots": 5, "items": 100}
            results[str(run / "checkpoints" / f"iter_{step:07d}")] = {"a": task, "b": task | {"score": score + 0.2}}
    (tmp_path / "results.json").write_text(json.dumps({"results": results}))
    words = ["efficiency", first, second, "--baseline", "ntp", "--results", tmp_path / "results.json"]
    assert analyze(*words, "--output", tmp_path / "out") == 0
    data = json.loads((tmp_path / "out" / "efficiency.json").read_text())
    rows = {row["run"]: row for row in data["runs"]}
    assert (data["score"], data["goal"]) == ("mean of 2 tasks", pytest.approx(0.4))
    assert data["curves"][0]["error"] == pytest.approx([0.01 / 2**0.5] * 2, rel=1e-4)
    assert rows["remit"]["tokens_to_goal"] == pytest.approx(10_000) and rows["remit"]["at_first_point"]
    assert rows["remit"]["tokens_speed_up"] == pytest.approx(4)
    assert analyze(*words, "--task", "a", "--output", tmp_path / "a") == 0
    assert json.loads((tmp_path / "a" / "efficiency.json").read_text())["goal"] == pytest.approx(0.3)
    assert analyze(*words, "--task", "c", "--output", tmp_path / "c") == 2


def test_results_as_remit_evaluate_writes_them(tmp_path):
    """Models by short names; details.json beside them says where they were. Less may be better."""
    first, second = make_run(tmp_path / "ntp"), make_run(tmp_path / "remit")
    results, details = {}, {}
    for run, scores in ((first, {10: 1.2, 40: 0.9}), (second, {10: 0.8, 40: 0.7})):
        for step, score in scores.items():
            path = run / "checkpoints" / f"iter_{step:07d}"
            name = f"model{len(results)}"
            content = {"score": score, "stderr": 0.01, "metric": "bits_per_byte", "higher_is_better": False}
            results[name] = {"gold": content | {"metrics": {"acc,none": {"score": 0.1, "stderr": None}}}}
            details[name] = {"path": str(path), "digest": "x"}
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "details.json").write_text(json.dumps({"setting": {}, "models": details}))
    words = ["efficiency", first, second, "--results", tmp_path / "results.json", "--output", tmp_path / "out"]
    assert analyze(*words) == 0
    data = json.loads((tmp_path / "out" / "efficiency.json").read_text())
    assert (data["score"], data["higher_is_better"], data["goal"]) == ("gold", False, 0.9)
    assert [row["tokens_speed_up"] for row in data["runs"]] == [1.0, 4.0]
    part = benchmarks(read_results([str(tmp_path)]))
    assert part is not None
    (table,) = part.blocks
    assert table.bold == [[0, 6]]  # the lowest, of four models  # type: ignore[union-attr]


def test_how_to_reproduce_it(tmp_path):
    """Commands of the runs and of the scores, and what computed: as the last start that says it."""
    run = make_run(tmp_path / "remit")
    with open(run / "events.jsonl", "w") as file:
        for versions in ({"torch": "2.12.0"}, {"torch": "2.13.0", "megatron-core": "0.19.2"}):
            start = {"event": "start", "step": 0, "ranks": 1, "device": "CPU (x86_64)", "versions": versions}
            file.write(json.dumps(start) + "\n")
        file.write(json.dumps({"event": "end", "step": 40, "code": 0}) + "\nhalf a li")
    (runs,) = read_runs([str(run)])
    assert runs.made_with == "CPU (x86_64), torch 2.13.0, megatron-core 0.19.2"
    setting = {"suite": "mine", "limit": 100, "chat_template": False, "data": "/data/of mine"}
    details = {"setting": setting, "models": {"base": {"path": "/models/a"}, "remit": {"path": "/models/b"}}}
    (tmp_path / "details.json").write_text(json.dumps(details))
    command = "remit evaluate base=/models/a remit=/models/b --suite mine --chat-template no --limit 100"
    command += " --data '/data/of mine' --output NEW_DIRECTORY"
    (tmp_path / "elsewhere").mkdir()
    found = evaluation_commands([str(tmp_path), str(tmp_path / "elsewhere" / "results.json")])
    assert found == [command]
    part = reproduce([runs], found)
    assert [block.text for block in part.blocks[:2]][1] == command  # type: ignore[union-attr]
    assert part.blocks[-1].rows[0][-1] == runs.made_with  # type: ignore[union-attr]
    (tmp_path / "details.json").write_text(json.dumps({**details, "suite_file": "/suites/mine.yaml"}))
    assert "--suite /suites/mine.yaml " in evaluation_commands([str(tmp_path)])[0]


def test_all_that_share_the_best_are_bold(tmp_path):
    scores = {"a": (0.5, 0.2, 0.1), "b": (0.5, 0.3, 0.1), "c": (0.4, 0.3, 0.1)}
    content = {"stderr": None, "metric": "acc", "higher_is_better": True}
    results = {
        model: {
            f"task{task}": content | {"score": score, "column": f"Task {task}"} for task, score in enumerate(values)
        }
        for model, values in scores.items()
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    part = benchmarks(read_results([str(tmp_path / "results.json")]))
    assert part is not None
    (table,) = part.blocks
    # Of the first task, the second, none of the third, and the mean.
    assert table.bold == [[0, 3], [0, 4], [1, 4], [1, 5], [3, 4]]  # type: ignore[union-attr]
    assert [row[0] for row in table.rows] == ["Task 0", "Task 1", "Task 2", "mean of 3"]  # type: ignore[union-attr]
    assert [row[3] for row in table.rows] == ["50.0", "20.0", "10.0", "26.7"]  # type: ignore[union-attr]
    assert table.note.count("remit evaluate compare") == 1  # type: ignore[union-attr]


def test_a_model_of_no_run_is_not_placed(tmp_path):
    runs = read_runs([str(make_run(tmp_path / "ntp"))])
    assert placed(str(tmp_path / "ntp"), runs) == (runs[0], 40)
    assert placed("ntp step 20", runs) == (runs[0], 20)
    assert placed(str(tmp_path / "ntp2"), runs) is None
    assert placed("base", runs) is None
    assert placed("ntp-iter_0000020", runs) == (runs[0], 20)


def test_gradients(tmp_path):
    clipped = make_run(tmp_path / "remit", objective={"name": "remit", "epsilon": 0.2})
    assert analyze("gradients", make_run(tmp_path / "ntp"), clipped, "--output", tmp_path / "out") == 0
    rows = json.loads((tmp_path / "out" / "gradients.json").read_text())["runs"]
    assert [row["objective"] for row in rows] == ["ntp", "remit (epsilon 0.2)"]
    for row in rows:
        assert (row["median"], row["maximum"], row["spikes"]) == (0.5, 4.5, 1)
        assert row["above_clip_grad"] == pytest.approx(1 / 40)


def test_posttrain_takes_seeds_as_one_arm(tmp_path):
    for seed, start in ((0, 0.2), (1, 0.4)):
        log = [{"step": s, "reward": start + 0.1 * s, "loss": 1.0} for s in (1, 2, 3)]
        folder = tmp_path / f"seed{seed}" / "checkpoint-3"
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": [*log, {"train_runtime": 3}]}))
    (tmp_path / "other.jsonl").write_text("".join(json.dumps({"step": s, "reward": 0.5}) + "\n" for s in (1, 2)))
    arms = [f"remit={tmp_path / 'seed0'},{tmp_path / 'seed1'}", f"ntp={tmp_path / 'other.jsonl'}"]
    assert analyze("posttrain", *arms, "--output", tmp_path / "out") == 0
    data = json.loads((tmp_path / "out" / "posttrain.json").read_text())
    assert data["metric"] == "reward"
    assert data["arms"][0]["mean"] == pytest.approx([0.4, 0.5, 0.6]) and data["arms"][0]["step"] == [1, 2, 3]
    assert data["arms"][0]["stderr"] == pytest.approx([0.1] * 3)
    assert data["arms"][1]["stderr"] == [None, None]
    assert analyze("posttrain", *arms, "--metric", "kl", "--output", tmp_path / "out") == 2
    assert analyze("posttrain", "remit", "--output", tmp_path / "out") == 2


def test_posttrain_takes_runs_of_remit_posttrain(tmp_path):
    """Their directories; the loss of GRPO, which is about 0 and says nothing, is not what is drawn."""
    run = tmp_path / "rlvr"
    run.mkdir()
    lines = [{"iteration": s, "loss": 0.0, "reward_mean": 0.1 * s, "reward_std": 0.2} for s in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert analyze("posttrain", f"ntp={run}", "--output", tmp_path / "out") == 0
    data = json.loads((tmp_path / "out" / "posttrain.json").read_text())
    assert data["metric"] == "reward_mean" and data["arms"][0]["mean"] == pytest.approx([0.1, 0.2, 0.3])


# Where the time went.


def test_time_of_one_start(tmp_path):
    log = tmp_path / "logs" / "rank_0.log"
    log.parent.mkdir()
    log.write_text(
        setup_line(0)
        + log_line(10, "[before the start of training step] datetime: x")
        + log_line(50, "saving checkpoint at iteration      40 to somewhere in torch_dist format")
        + log_line(53, "successfully saved checkpoint from iteration      40 to somewhere")
        + log_line(53, "Evaluating iter 1/2")
        + log_line(55, "Evaluating iter 2/2")
        + log_line(57, "done")
    )
    found = wall_time(log, training_seconds=38.0)
    assert found is not None
    assert found.causes == {
        "training": 38.0,
        "saving": 3.0,
        "validation": 4.0,
        "evaluation": 0.0,
        "starting": 10.0,
        "lost": 0.0,
        "other": 2.0,
    }
    assert (found.total, found.stopped, found.resumed_at) == (57.0, 0.0, [0])
    assert found.effective == pytest.approx(38 / 57)
    evaluated = wall_time(log, training_seconds=38.0, evaluation_seconds=1.5)
    assert evaluated is not None and (evaluated.causes["evaluation"], evaluated.causes["other"]) == (1.5, 0.5)


@pytest.mark.parametrize("events", [True, False])
def test_time_of_a_run_that_was_killed_and_resumed(tmp_path, events):
    """Saved at 30 s, killed at 44 s, started again at 100 s from that save: 14 s were done again, 56 s nothing ran."""
    log = tmp_path / "logs" / "rank_0.log"
    log.parent.mkdir()
    log.write_text(
        setup_line(0)
        + log_line(5, "[before the start of training step] datetime: x")
        + log_line(28, "saving checkpoint at iteration      20 to somewhere in torch_dist format")
        + log_line(30, "successfully saved checkpoint from iteration      20 to somewhere")
        + log_line(100, "resuming at step 20").replace("megatron.print", "remit_megatron.training.command")
        + log_line(
            100.2, "> setting tensorboard ..."
        )  # as on a real run: lines of the new process come before this one
        + setup_line(100.5)
        + log_line(106, "[before the start of training step] datetime: x")
        + log_line(130, "saving checkpoint at iteration      40 to somewhere in torch_dist format")
        + log_line(131, "successfully saved checkpoint from iteration      40 to somewhere")
    )
    if events:
        write_events(tmp_path / "tensorboard" / "events.out.tfevents.1.host", [6.0, 20.0, 44.0])
        write_events(tmp_path / "tensorboard" / "events.out.tfevents.2.host", [107.0, 129.0])
    found = wall_time(log, training_seconds=46.0)
    assert found is not None
    assert found.causes["lost"] == pytest.approx(14.0 if events else 0.0)
    assert found.stopped == pytest.approx(56.0 if events else 70.0)
    assert found.resumed_at == [0, 20]
    assert found.causes["saving"] == pytest.approx(3.0)
    assert found.causes["starting"] == pytest.approx(5 + 6)
    assert sum(found.causes.values()) == pytest.approx(found.total)


def test_time_of_a_run_without_a_log(tmp_path):
    assert wall_time(tmp_path / "rank_0.log", training_seconds=1.0) is None
