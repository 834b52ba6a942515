"""The command line itself: where overrides may stand, what is refused."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from remit_megatron.cli import _ANALYZE_COMMANDS, _COMMANDS, _DATA_COMMANDS, _parse, main
from remit_megatron.data.manifest import read_manifest
from tests.unit.data.test_tokenizer import make_tokenizer


@pytest.mark.parametrize(
    "words",
    [
        ["train", "run.yaml", "a.b=1", "c=2", "--nproc", "2"],
        ["train", "run.yaml", "--nproc", "2", "a.b=1", "c=2"],
        ["train", "--nproc", "2", "run.yaml", "a.b=1", "c=2"],
        ["train", "run.yaml", "a.b=1", "--nproc", "2", "c=2"],
    ],
)
def test_overrides_may_stand_anywhere_after_the_configuration(words):
    namespace, room, run = _parse(words)
    assert (namespace.config, namespace.overrides, namespace.nproc) == ("run.yaml", ["a.b=1", "c=2"], 2)
    assert (room, run) == ("training", "run_train")


def test_unknown_options_are_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "run.yaml", "--nprocs", "2"])
    assert stop.value.code == 2
    assert "--nprocs" in capsys.readouterr().err


def test_every_command_has_help(capsys):
    for words in (
        ["doctor"],
        ["quickstart"],
        ["import"],
        ["export"],
        ["logprobs"],
        ["train"],
        ["data", "build"],
        ["data", "mix"],
        ["data", "select"],
        ["report"],
        *(["analyze", name] for name in _ANALYZE_COMMANDS),
    ):
        with pytest.raises(SystemExit) as stop:
            main([*words, "--help"])
        assert stop.value.code == 0
        assert "usage: remit " + " ".join(words) in capsys.readouterr().out


def test_no_command_imports_megatron_before_the_patches():
    """Patches come first, and --help is quick."""
    modules = sorted(
        {command[0] for command in (*_COMMANDS.values(), *_DATA_COMMANDS.values(), *_ANALYZE_COMMANDS.values())}
    )
    code = "import importlib, sys\n" + "".join(
        f"importlib.import_module('remit_megatron.{name}')\nassert 'megatron' not in sys.modules, '{name}'\n"
        for name in modules
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-500:]


def test_a_name_that_no_file_can_have_is_one_line(capsys):
    assert main(["train", "a" * 300 + ".yaml", "--dry-run"]) == 2
    assert main(["import", "--hf", "a" * 300, "--output", "there"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("error: ") for line in lines)


def test_a_name_that_no_text_can_have_is_said(tmp_path):
    """What was built is there, and the line that says so is no traceback."""
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "c.jsonl").write_text('{"text": "the thing"}\n')
    output = tmp_path / os.fsdecode(b"caf\xe9")
    words = ["data", "build", "--input", tmp_path / "c.jsonl", "--tokenizer", tokenizer, "--output", output]
    done = subprocess.run(
        [sys.executable, "-m", "remit_megatron", *map(str, [*words, "--workers", 1])],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"},
        check=False,
    )
    assert (done.returncode, done.stdout.count(rb"caf\udce9: 1 documents")) == (0, 1), done
    assert read_manifest(output, verify=True).documents == 1
