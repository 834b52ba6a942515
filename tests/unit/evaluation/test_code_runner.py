"""Programs that a model wrote: right and wrong ones told apart, and the limits hold."""

from __future__ import annotations

import time

import pytest

from remit_megatron.evaluation.code_runner import CodeMetric, Limits, code_metric, isolation, run_program


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("assert 1 + 1 == 2", "passed"),
        ("assert 1 + 1 == 3", "failed: AssertionError"),
        ("def f(:", "failed: SyntaxError"),
        ("import os; os._exit(0)", "failed: exit code 0"),
        ("import sys; sys.exit(0)", "failed: exit code 0"),
        ("import os; assert os.listdir('.') == [], os.listdir('.')", "passed"),
        ("import remit_megatron", "failed: ModuleNotFoundError"),
        ("x = ' ' * (2 << 30)", "failed: MemoryError"),
        ("open('big', 'wb').write(b'0' * (2 << 20))", "failed: OSError"),
    ],
)
def test_what_is_said_of_a_program(program, said, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    if program == "import remit_megatron":
        # An editable installation is in the interpreter's own list of places; the working directory must not be.
        (tmp_path / "remit_here.py").write_text("")
        program = "import remit_here"
    assert run_program(program, Limits(memory=1 << 30, file=1 << 20)).startswith(said)


def test_time_is_limited_also_for_what_it_started():
    started = time.monotonic()
    assert run_program("while True: pass", Limits(seconds=1)) == "timed out"
    assert run_program("import time; time.sleep(60)", Limits(seconds=1)) == "timed out"
    assert time.monotonic() - started < 20


def test_no_network():
    if not isolation():
        pytest.skip("this machine does not let a user make namespaces")
    program = "import socket\ns = socket.socket()\ns.settimeout(5)\ns.connect(('127.0.0.1', PORT))"
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        said = run_program(program.replace("PORT", str(server.getsockname()[1])))
    assert said.startswith("failed: OSError"), said


def test_pass_at_k_is_the_original_metrics():
    metric = CodeMetric()
    tests = ["assert add(2, 3) == 5", "assert add(0, 0) == 0"]
    wrong, right = "def add(a, b): return a * b", "def add(a, b): return a + b"
    scores, results = metric.compute(references=tests, predictions=[[wrong, right, wrong], [right] * 3], k=[1, 2, 4])
    # Problem 1: one of three passes; the chance that two drawn contain it is 2/3. Problem 2: all pass.
    assert scores == {"pass@1": pytest.approx((1 / 3 + 1) / 2), "pass@2": pytest.approx((2 / 3 + 1) / 2)}
    assert [entry["passed"] for _, entry in results[0]] == [False, True, False]
    assert results[0][0][1]["completion_id"] == 0 and results[1][2][1]["task_id"] == 1


def test_the_metric_stands_in_only_where_it_is_asked_for():
    import evaluate

    original = evaluate.load
    with code_metric():
        assert isinstance(evaluate.load("code_eval"), CodeMetric)
    assert evaluate.load is original


def test_humanevals_own_solutions_pass_and_empty_ones_do_not(shared_data):
    import gzip
    import json

    with gzip.open(shared_data / "HumanEval.jsonl.gz", "rt") as file:
        problems = [json.loads(line) for line in file]
    tests = [f"{problem['test']}\ncheck({problem['entry_point']})" for problem in problems]
    solved = [[problem["prompt"] + problem["canonical_solution"]] for problem in problems]
    empty = [[problem["prompt"] + "    pass\n"] for problem in problems]
    scores, results = CodeMetric().compute(references=tests, predictions=solved)
    assert scores == {"pass@1": 1.0}, [
        entry for entries in results.values() for _, entry in entries if not entry["passed"]
    ]
    assert CodeMetric().compute(references=tests, predictions=empty)[0] == {"pass@1": 0.0}
