"""`remit evaluate` from end to end: item for item what plain lm-eval says; killed, and shared out."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from remit_megatron import cli
from remit_megatron.evaluation import runner
from tests.unit.evaluation.plain import run_plain

SHOTS = {
    "gsm8k": 5,
    "minerva_math_counting_and_prob": 4,
    "bbh_cot_fewshot_boolean_expressions": 3,
    "bbh_cot_fewshot_word_sorting": 3,
    "arc_challenge": 5,
    "arc_easy": 2,
    "hellaswag": 0,
    "commonsense_qa": 5,
}
LIMIT, BATCH, TOKENS = 4, 2, 6
FOLDERS = {
    "minerva_math_counting_and_prob": "minerva_math/counting_and_probability",
    "bbh_cot_fewshot_boolean_expressions": "bbh/boolean_expressions",
    "bbh_cot_fewshot_word_sorting": "bbh/word_sorting",
}
GENERATES = {"gsm8k", "minerva_math_counting_and_prob", *list(FOLDERS)[1:]}


def write_suite(path: Path, shots: dict[str, int]) -> Path:
    tasks = []
    for name, number in shots.items():
        task: dict[str, Any] = {"task": name, "shots": number}
        task |= {"data": FOLDERS[name]} if name in FOLDERS else {}
        task |= {"generation": {"max_gen_toks": TOKENS}} if name in GENERATES else {}
        tasks.append(task)
    path.write_text(yaml.safe_dump({"tasks": tasks}))
    return path


def options(data: Path, suite: Path, output: Path) -> list[str]:
    return [f"--suite={suite}", f"--data={data}", f"--output={output}", f"--limit={LIMIT}", f"--batch-size={BATCH}"]


def samples(output: Path, model: str, task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "samples" / model / f"{task}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    return write_suite(tmp_path_factory.mktemp("suite") / "eight.yaml", SHOTS)


@pytest.fixture(scope="module")
def evaluated(models, data, suite, tmp_path_factory):
    """The first model, as a checkpoint of ours, and the second one as it is."""
    folder = tmp_path_factory.mktemp("evaluated")
    before = dict(os.environ)
    command = [sys.executable, "-m", "remit_megatron", "import", "--hf", str(models["first"]), "--output"]
    subprocess.run([*command, str(folder / "checkpoint")], check=True, capture_output=True)
    words = ["evaluate", f"first={folder / 'checkpoint'}", f"second={models['second']}"]
    try:
        assert cli.main([*words, *options(data, suite, folder / "output")]) == 0
    finally:
        os.environ.clear()
        os.environ.update(before)
    return folder / "output"


def test_an_exported_checkpoint_gets_what_plain_lm_eval_gives_the_original(evaluated, models, data, tmp_path):
    plain = {}
    for task, number in SHOTS.items():  # one by one, as here: batches of several tasks would round differently
        folder = tmp_path / task
        settings: dict[str, Any] = {"limit": LIMIT, "batch_size": BATCH}
        settings |= {"max_gen_toks": TOKENS} if task in GENERATES else {}
        plain |= run_plain(models["first"], data, folder, shots={task: number}, **settings)
    results = json.loads((evaluated / "results.json").read_text())["first"]
    assert list(results) == list(SHOTS)
    for task, logged in plain.items():
        entry = results[task]
        logged = sorted((one for one in logged if one["filter"] == entry["filter"]), key=lambda one: one["doc_id"])
        ours = samples(evaluated, "first", task)
        assert len(ours) == len(logged) == entry["items"] == LIMIT
        for line, one in zip(ours, logged, strict=True):
            assert line["doc_id"] == one["doc_id"] and line["score"] == float(one[entry["metric"]])
            assert {name: line[name] for name in ("doc_hash", "prompt_hash", "target_hash")} == {
                name: one[name] for name in ("doc_hash", "prompt_hash", "target_hash")
            }
            if task in GENERATES:
                assert line["response"] == one["resps"][0][0]
            else:
                assert line["loglikelihoods"] == [response[0][0] for response in one["resps"]]
        assert entry["shots"] == SHOTS[task]
        assert (entry.get("generation") or {}).get("max_gen_toks") == (TOKENS if task in GENERATES else None)
        assert entry["score"] == pytest.approx(sum(line["score"] for line in ours) / LIMIT)


def test_models_differ_and_tables_say_how_it_was_done(evaluated):
    likelihoods = [
        [line["loglikelihoods"] for line in samples(evaluated, model, "hellaswag")] for model in ("first", "second")
    ]
    assert likelihoods[0] != likelihoods[1]
    table = (evaluated / "results.md").read_text()
    assert "| gsm8k " in table and "Only the first 4 items" in table and "strict-match" in table
    details = json.loads((evaluated / "details.json").read_text())
    assert details["models"]["first"]["digest"] != details["models"]["second"]["digest"]
    assert details["models"]["first"]["versions"]["lm_eval"]
    assert not list((evaluated / "cache" / "exported").iterdir()), "exported models are temporary"


def test_what_is_done_is_not_done_again(evaluated, models, data, suite, monkeypatch):
    from remit_megatron.evaluation import lm

    def refuse(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(lm, "load", refuse)
    before = (evaluated / "results.json").read_bytes()
    assert cli.main(["evaluate", f"second={models['second']}", *options(data, suite, evaluated)]) == 0
    assert (evaluated / "results.json").read_bytes() == before
    # Another model of the same name and place is another model.
    with pytest.raises(AssertionError, match="loaded"):
        cli.main(["evaluate", f"second={models['first']}", *options(data, suite, evaluated)])


def test_scores_of_another_model_that_had_the_name_go(models, data, tmp_path, monkeypatch):
    """Else a table of one name had scores of both: where it is stopped, and of tasks that are not run again."""
    suite = write_suite(tmp_path / "suite.yaml", {"arc_easy": 0, "commonsense_qa": 0})
    output = tmp_path / "output"
    assert cli.main(["evaluate", f"m={models['first']}", *options(data, suite, output)]) == 0
    first = json.loads((output / "results.json").read_text())
    assert list(first["m"]) == ["arc_easy", "commonsense_qa"]
    works = runner._run

    def stopped(request: Any, item: Any, *rest: Any) -> Any:
        if item.entry.name == "commonsense_qa":
            raise KeyboardInterrupt
        return works(request, item, *rest)

    monkeypatch.setattr(runner, "_run", stopped)
    assert cli.main(["evaluate", f"m={models['second']}", *options(data, suite, output)]) == 130
    assert list(json.loads((output / "results.json").read_text())["m"]) == ["arc_easy"]


def test_another_setting_in_the_same_directory_is_refused(evaluated, models, data, suite, capsys):
    words = ["evaluate", f"second={models['second']}", *options(data, suite, evaluated), "--limit=5"]
    assert cli.main(words) == 2
    assert "limit 4" in capsys.readouterr().err


def test_compare_reads_what_evaluate_wrote(evaluated, tmp_path, capsys):
    capsys.readouterr()
    assert cli.main(["evaluate", "compare", str(evaluated), "--output", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "## second against first, on other items" in text and "| first " in text
    found = json.loads((tmp_path / "compare.json").read_text())["second"]
    assert set(found["items"]) == set(SHOTS) and found["seeds"] is None
    assert found["items"]["hellaswag"]["units"] == "4 items"


def start(model: Path, data: Path, suite: Path, output: Path, *more: str) -> subprocess.Popen:
    words = ["evaluate", f"first={model}", *options(data, suite, output), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "remit_megatron", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
    )


def test_killed_it_goes_on_where_it_was(evaluated, models, data, suite, tmp_path):
    process = start(models["first"], data, suite, tmp_path)
    answers = tmp_path / "cache" / "answers"
    deadline = time.monotonic() + 300
    while sum(path.read_bytes().count(b"\n") for path in answers.glob("*/rank_0.jsonl")) < 6:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (path,) = answers.glob("*/rank_0.jsonl")
    kept = path.read_bytes().splitlines()
    again = start(models["first"], data, suite, tmp_path)
    output, _ = again.communicate(timeout=500)
    assert again.returncode == 0, output
    lines = [json.loads(line) for line in path.read_bytes().splitlines() if line.endswith(b"]")]
    keys = [key for _, key, _ in lines]
    assert path.read_bytes().splitlines()[: len(kept) - 1] == kept[:-1]
    assert len(set(keys)) == len(keys), "an answer was made twice"
    for task in SHOTS:
        assert [line["response"] for line in samples(tmp_path, "first", task)] == [
            line["response"] for line in samples(evaluated, "first", task)
        ]


def test_a_stop_keeps_the_answers(evaluated, models, data, suite, tmp_path, capsys, monkeypatch):
    """The file of the answers is as after a kill; the directory is free again, and one line says what to do."""
    from remit_megatron.evaluation.request_cache import RequestCache

    add, before = RequestCache.add, dict(os.environ)

    def told(self: RequestCache, *answer: Any) -> None:
        add(self, *answer)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(RequestCache, "add", told)
    monkeypatch.setattr("remit_megatron.runtime.stop._leave", sys.exit)
    try:
        with pytest.raises(SystemExit) as left:
            cli.main(["evaluate", f"first={models['first']}", *options(data, suite, tmp_path)])
    finally:
        os.environ.clear()
        os.environ.update(before)
    said = "stopped by SIGTERM before the end; start it again to go on"
    assert (left.value.code, capsys.readouterr().err.splitlines()[-1]) == (75, said)
    (path,) = (tmp_path / "cache" / "answers").glob("*/rank_0.jsonl")
    assert len(path.read_bytes().splitlines()) == 1


def test_two_processes_share_the_items(evaluated, models, data, tmp_path):
    shots = {task: SHOTS[task] for task in ("gsm8k", "hellaswag")}
    suite = write_suite(tmp_path / "two.yaml", shots)
    process = start(models["first"], data, suite, tmp_path / "out", "--nproc=2")
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output
    assert b"| gsm8k" in output and output.count(b"Suite two") == 1
    (folder,) = (tmp_path / "out" / "cache" / "answers").iterdir()
    sizes = [len(path.read_bytes().splitlines()) for path in sorted(folder.iterdir())]
    assert sizes == [2 + 8, 2 + 8]  # of 4 prompts and 4 items of 4 choices
    for task in shots:
        ours, theirs = (samples(folder, "first", task) for folder in (tmp_path / "out", evaluated))
        assert [line["doc_id"] for line in ours] == [0, 1, 2, 3]
        assert [line["response"] for line in ours] == [line["response"] for line in theirs]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere", "--suite=gsm8k"], "nowhere"),
        (["{model}"], "--suite: found nothing"),
        (["{model}", "--suite=gsm8k", "--chat-template=yes"], "no chat template"),
        (["{model}", "--suite=humaneval"], "--allow-code"),
        (["{model}", "--suite=mmlu_pro"], "mmlu_pro/test.jsonl"),
        (["{model}", "--suite=gsm8k", "--backend=vllm"], "an environment of its own"),
        (["{model}", "--suite=gsm8k", "--max-length=64"], "max_gen_toks: found 256"),
        (["{model}", "{model}", "--suite=gsm8k"], "names"),
        (["{model}", "--suite=gsm8k", "--max-length=70000"], "--max-length: found 70000; expected at most "),
        (["{model}", "--suite=gsm8k", "--dtype=float31"], "--dtype: found float31"),
        (["{model}", "--suite=gsm8k", "--model-arg=colour=red"], "colour"),
        (["{model}", "--suite=gsm8k", "--output={model}/config.json"], "(a file)"),
        (["{model}", "--suite=gsm8k", "--output={model}"], "the model first itself; expected another directory"),
        (["{broken}", "--suite=gsm8k"], "header"),
        (["{model}", "--suite=truthfulqa_mc1"], "JSON parse error"),
        (["compare", "{model}"], "no results.json"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(words, said, models, data, tmp_path, capsys):
    for task in ("humaneval",):
        (data / task).mkdir(exist_ok=True)
        (data / task / "test.jsonl").write_text('{"prompt": "p", "test": "t", "entry_point": "e"}\n')
    (data / "truthfulqa_mc1").mkdir(exist_ok=True)
    (data / "truthfulqa_mc1" / "validation.jsonl").write_text("{\n")
    broken = tmp_path / "broken"
    shutil.copytree(models["first"], broken)
    (broken / "model.safetensors").write_bytes(b"nothing of the kind")
    words = [word.format(model=models["first"], broken=broken) for word in words]
    words += [] if words[0] == "compare" else [f"--data={data}", "--limit=1"]
    assert cli.main(["evaluate", f"--output={tmp_path / 'output'}", *words]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and said in error[0]
