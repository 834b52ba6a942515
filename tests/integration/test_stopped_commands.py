"""A stop signal in commands that go on nowhere: nothing half done is left behind, 75, and again they succeed."""

from __future__ import annotations

import contextlib
import io
import signal
from pathlib import Path

import pytest

from tests.integration.conftest import write
from tests.integration.injected import signalled

TERM, USR2, INT = signal.SIGTERM, signal.SIGUSR2, signal.SIGINT


def start(
    words: list[str], number: signal.Signals | None = None, where: str = ""
) -> tuple[int | str | None, str, bool]:
    """A command that gets a signal at a place: its exit code, what it said, whether the handlers are as before."""
    from remit_megatron.cli import main

    said = io.StringIO()
    handlers = [signal.getsignal(known) for known in (TERM, USR2, INT)]
    with contextlib.redirect_stderr(said):
        try:
            with contextlib.nullcontext() if number is None else signalled(number, where, after=True):
                code: int | str | None = main(words)
        except SystemExit as left:
            code = left.code
    return code, said.getvalue(), handlers == [signal.getsignal(known) for known in (TERM, USR2, INT)]


def words(command: str, root: Path, made: Path) -> list[str]:
    """Of the command; ``made`` is what it makes."""
    if command == "import":
        return ["import", "--hf", str(root / "student"), "--output", str(made)]
    if command == "export":
        return ["export", "--checkpoint", str(root / "imported"), "--output", str(made)]
    texts = write(made.parent / "texts.jsonl", {"text": "one two"})
    return ["logprobs", "--hf", str(root / "student"), "--input", str(texts), "--output", str(made)]


@pytest.mark.parametrize("number", [TERM, USR2, INT])
@pytest.mark.parametrize(
    ("command", "where"),
    [
        ("import", "remit_megatron.conversion.to_megatron:_write_weights"),
        ("import", "remit_megatron.conversion.to_megatron:write_manifest"),
        ("export", "remit_megatron.conversion.to_huggingface:_write_weights"),
        ("logprobs", "remit_megatron.scoring.logprobs:Scorer.score"),
    ],
)
def test_it_cleans_up(material, pool, tmp_path, command, where, number):
    root = material["root"]
    if command == "export" and not (root / "imported").exists():
        assert pool.run(start, world_size=1, words=words("import", root, root / "imported"))[0][0] == 0
    given = words(command, root, tmp_path / "made")
    before = {path.name for path in tmp_path.iterdir()}
    code, said, as_before = pool.run(start, world_size=1, words=given, number=number, where=where)[0]
    line = f"stopped by {number.name} before the end, nothing half done is left behind; start it again"
    assert (code, said.splitlines()[-1], as_before) == (75, line, True)
    assert {path.name for path in tmp_path.iterdir()} == before
    assert pool.run(start, world_size=1, words=given)[0][0] == 0
    assert (tmp_path / "made").exists()
