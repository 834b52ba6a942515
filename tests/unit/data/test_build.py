"""`remit data build`: the same bytes whatever the way, complete or absent whatever happens."""

from __future__ import annotations

import errno
import gzip
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import zstandard
from tokenizers import models, pre_tokenizers

from remit_megatron.cli import main
from remit_megatron.data.build import build_dataset
from remit_megatron.data.indexed import IndexedTokens
from remit_megatron.data.largest_id import check_ids
from remit_megatron.data.manifest import read_manifest
from remit_megatron.data.tokenizer import load_tokenizer
from remit_megatron.runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
SHARED = ROOT / "../shared/data"
TEMPLATE = "Question: {question}\nAnswer: {answer}"
TEXTS = [f"text {number} " + "abc é " * (number % 50) for number in range(4000)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    """Every byte a token, and an end-of-document token: 257 entries."""
    vocabulary = {token: number for number, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    folder = tmp_path_factory.mktemp("tokenizer")
    backend.save(str(folder / "tokenizer.json"))
    return str(folder)


@pytest.fixture(scope="module")
def big(tmp_path_factory) -> str:
    """Enough text to be stopped in the middle of: 40 MB, more than ten seconds of work."""
    path = tmp_path_factory.mktemp("big") / "big.jsonl"
    block = "".join(json.dumps({"text": "some words to be counted " * 40}) + "\n" for _ in range(1000))
    path.write_text(block * 40)
    return str(path)


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def contents(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def start(*arguments: object, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "remit_megatron", "data", "build", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def wait_for_data(process: subprocess.Popen, folder: Path) -> None:
    """Until the first tokens are on the disk."""
    deadline = time.monotonic() + 60
    while not any(path.name.endswith(".bin.tmp") and path.stat().st_size for path in folder.iterdir()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def workers_of(process: subprocess.Popen) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def ends_within(pids: list[int], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        states = [Path(f"/proc/{pid}/stat") for pid in pids]
        if not any(path.exists() and path.read_text().rsplit(")", 1)[1].split()[0] != "Z" for path in states):
            return True
        time.sleep(0.05)
    return False


def test_gsm8k_comes_back_to_the_letter(tmp_path):
    source, tokenizer_file = SHARED / "gsm8k_train.jsonl", SHARED / "dolma2_tokenizer.json"
    for path in (source, tokenizer_file):
        if not path.exists():
            pytest.skip(f"{path} is missing")
    manifest = build_dataset([source], tokenizer_file, tmp_path / "g", template=TEMPLATE, workers=2)
    assert (manifest.documents, manifest.skipped, manifest.vocab_size, manifest.eod_id) == (7473, 0, 100_278, 100_257)
    assert manifest.inputs == ("gsm8k_train.jsonl",)
    data, opened = IndexedTokens(tmp_path / "g"), load_tokenizer(tokenizer_file)
    assert manifest.tokens == int(data.lengths.sum()) and manifest.dtype == data.dtype.name == "int32"
    with open(source, encoding="utf-8") as file:
        for number, line in enumerate(file):
            record = json.loads(line)
            ids = data.read(number).tolist()
            assert ids[-1] == 100_257 and 100_257 not in ids[:-1]
            assert opened.decode(ids[:-1]) == f"Question: {record['question']}\nAnswer: {record['answer']}"
    assert number == 7472


def test_humaneval_comes_back_to_the_letter(tmp_path):
    """Code: indentation, blank lines and tabs are what a tokenizer would change first."""
    source, tokenizer_file = SHARED / "HumanEval.jsonl.gz", SHARED / "dolma2_tokenizer.json"
    for path in (source, tokenizer_file):
        if not path.exists():
            pytest.skip(f"{path} is missing")
    template = "{prompt}{canonical_solution}\n{test}"
    manifest = build_dataset([source], tokenizer_file, tmp_path / "h", template=template)
    with gzip.open(source, "rt", encoding="utf-8", newline="") as file:
        records = [json.loads(line) for line in file]
    assert manifest.documents == len(records) == 164 and manifest.skipped == 0
    data, opened = IndexedTokens(tmp_path / "h"), load_tokenizer(tokenizer_file)
    for number, record in enumerate(records):
        *ids, last = data.read(number).tolist()
        assert last == 100_257
        assert opened.decode(ids).encode() == template.format_map(record).encode()


def test_same_bytes_from_any_file_and_any_number_of_workers(tmp_path, tokenizer):
    data = write_lines(tmp_path / "c.jsonl", TEXTS).read_bytes()
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(data))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(data))
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "c.parquet")
    results = set()
    for workers, kind in ((1, "jsonl"), (2, "jsonl"), (3, "jsonl"), (1, "jsonl.gz"), (2, "jsonl.zst"), (1, "parquet")):
        prefix = tmp_path / f"out-{workers}-{kind}"
        manifest = build_dataset([tmp_path / f"c.{kind}"], tokenizer, prefix, workers=workers)
        assert manifest == read_manifest(prefix, verify=True)
        results.add(contents(prefix))
    assert len(results) == 1
    read, opened = IndexedTokens(prefix), load_tokenizer(tokenizer)
    assert [opened.decode(read.read(n)[:-1].tolist()) for n in range(len(read))] == TEXTS
    assert manifest.dtype == "uint16" and manifest.documents == 4000


def test_end_of_document_and_limits(tmp_path, tokenizer):
    source = write_lines(tmp_path / "c.jsonl", ["ab", "c", "def"])
    build_dataset([source], tokenizer, tmp_path / "with")
    build_dataset([source], tokenizer, tmp_path / "without", append_eod=False)
    build_dataset([source, source], tokenizer, tmp_path / "some", max_documents=4)
    assert IndexedTokens(tmp_path / "with").lengths.tolist() == [3, 2, 4]
    assert IndexedTokens(tmp_path / "with").read(2).tolist()[-1] == read_manifest(tmp_path / "with").eod_id == 256
    assert IndexedTokens(tmp_path / "without").lengths.tolist() == [2, 1, 3]
    assert read_manifest(tmp_path / "without").eod_id is None
    assert IndexedTokens(tmp_path / "some").lengths.tolist() == [3, 2, 4, 3]


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_lines(tmp_path, tokenizer, workers, caplog):
    source = write_lines(tmp_path / "c.jsonl", TEXTS)
    lines = source.read_text().splitlines()
    for number, line in ((2000, "{broken"), (2002, '{"text": ""}'), (3999, "[]")):
        lines[number - 1] = line
    source.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match="not JSON") as caught:
        build_dataset([source], tokenizer, tmp_path / "out", workers=workers)
    assert caught.value.field == f"{source}:2000"
    assert os.listdir(tmp_path) == ["c.jsonl"]
    manifest = build_dataset([source], tokenizer, tmp_path / "out", workers=workers, on_error="skip")
    assert (manifest.documents, manifest.skipped) == (3997, 3)
    assert [record.getMessage().split(": ")[0] for record in caplog.records] == [
        f"skipped {source}:{number}" for number in (2000, 2002, 3999)
    ]
    good = [text for number, text in enumerate(TEXTS, start=1) if number not in (2000, 2002, 3999)]
    build_dataset([write_lines(tmp_path / "good.jsonl", good)], tokenizer, tmp_path / "good")
    assert contents(tmp_path / "good") == contents(tmp_path / "out")
    # A line behind the last document that was asked for is not looked at.
    assert build_dataset([source], tokenizer, tmp_path / "few", workers=workers, max_documents=1999).documents == 1999
    with pytest.raises(UserError, match=":2000"):
        build_dataset([source], tokenizer, tmp_path / "more", workers=workers, max_documents=2000)


def test_bad_rows_of_a_table_are_skipped_and_counted(tmp_path, tokenizer, caplog):
    """Beside good ones, by several processes; and what a folder holds besides is named."""
    (tmp_path / "c").mkdir()
    rows = [b"bad \xff" if number in (7, 3000) else text.encode() for number, text in enumerate(TEXTS, start=1)]
    strings = pa.array(rows, pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": strings}), tmp_path / "c" / "c.parquet")
    (tmp_path / "c" / "notes.txt").write_text("no data")
    with pytest.raises(UserError, match=f"^{tmp_path}/c/c.parquet:7: found byte 5 in field 'text', which is not UTF-8"):
        build_dataset([tmp_path / "c"], tokenizer, tmp_path / "out", workers=2)
    caplog.clear()
    manifest = build_dataset([tmp_path / "c"], tokenizer, tmp_path / "out", workers=2, on_error="skip")
    assert (manifest.documents, manifest.skipped) == (3998, 2)
    first, *skipped = [record.getMessage() for record in caplog.records]
    assert first == f"{tmp_path}/c: passed over 1 file for the ending, such as {tmp_path}/c/notes.txt"
    assert [line.split(": ")[0] for line in skipped] == [f"skipped {tmp_path}/c/c.parquet:{n}" for n in (7, 3000)]


def test_text_that_gives_no_token_is_a_bad_line(tmp_path):
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "<|endoftext|>": 1}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    source = tmp_path / "c.jsonl"
    source.write_text('{"text": "a a"}\n{"text": "  "}\n{"text": "a"}\n{broken\n')
    with pytest.raises(UserError, match="no token") as caught:
        build_dataset([source], tmp_path, tmp_path / "out")
    assert caught.value.field == f"{source}:2"
    manifest = build_dataset([source], tmp_path, tmp_path / "out", on_error="skip")
    assert (manifest.documents, manifest.tokens, manifest.skipped) == (2, 5, 2)


def test_wrong_commands_are_one_line_and_exit_code_2(tmp_path, tokenizer, capsys):
    source = write_lines(tmp_path / "c.jsonl", ["a", "b"])
    empty, blank = tmp_path / "empty.jsonl", tmp_path / "blank.jsonl"
    empty.write_text("")
    blank.write_text("\n\n")
    before = sorted(os.listdir(tmp_path))

    def refused(message: str, *, source: object = source, tokenizer: str = tokenizer, output="out", extra=()) -> None:
        arguments = ["--input", str(source), "--tokenizer", tokenizer, "--output", str(tmp_path / output)]
        assert main(["data", "build", *arguments, "--workers", "1", *extra]) == 2
        error = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("tokenizing: ")]
        assert len(error) == 1 and message in error[0], error
        assert sorted(os.listdir(tmp_path)) == before

    refused("--input: found", source=tmp_path / "absent.jsonl")
    refused("--tokenizer: found", tokenizer=str(tmp_path / "absent"))
    refused("no document", source=empty)
    refused("no document", source=blank)
    refused("no field 'body'", extra=("--text-key", "body"))
    refused("(2 bad lines)", extra=("--text-key", "body", "--on-error", "skip"))
    refused("--template: found", extra=("--template", "{x"))
    refused("--max-documents: found 0", extra=("--max-documents", "0"))
    refused("--workers: found 0", extra=("--workers", "0"))
    refused("a folder and a name", output="")
    refused("--output: found", output="c.jsonl/out")
    shutil.copy(source, tmp_path / "c.json")
    before.insert(before.index("c.jsonl"), "c.json")
    refused("would replace the input", source=tmp_path / "c.json", output="c", extra=("--overwrite",))
    refused("which is no manifest", output="c", extra=("--overwrite",))
    refused("which exists", output="c")


def test_command_line(tmp_path, tokenizer, capsys):
    source = tmp_path / "c.jsonl"
    source.write_text(json.dumps({"question": "Why?", "answer": "So."}) + "\n")
    arguments = ["--input", str(source), "--tokenizer", tokenizer, "--output", str(tmp_path / "new" / "out")]
    template = "Q: {question}\\nA: {answer}\\\\n"
    assert main(["data", "build", *arguments, "--template", template, "--workers", "1"]) == 0
    text = load_tokenizer(tokenizer).decode(IndexedTokens(tmp_path / "new" / "out").read(0)[:-1].tolist())
    assert text == "Q: Why?\nA: So.\\n"
    output = capsys.readouterr()
    assert "1 documents, 17 tokens (uint16)" in output.out
    assert "tokenizing: " in output.err and "17 tokens" in output.err


def test_overwrite(tmp_path, tokenizer):
    first, second = write_lines(tmp_path / "a.jsonl", ["a"]), write_lines(tmp_path / "b.jsonl", ["b" * 99])
    build_dataset([first], tokenizer, tmp_path / "out")
    kept = contents(tmp_path / "out")
    with pytest.raises(UserError, match="which exists; expected another prefix, or --overwrite"):
        build_dataset([second], tokenizer, tmp_path / "out")
    second.write_text("broken\n")
    with pytest.raises(UserError, match="not JSON"):
        build_dataset([second], tokenizer, tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == kept and read_manifest(tmp_path / "out", verify=True).documents == 1
    write_lines(second, ["b" * 99])
    assert build_dataset([second], tokenizer, tmp_path / "out", overwrite=True).tokens == 100
    assert read_manifest(tmp_path / "out", verify=True).tokens == 100
    # Files without a manifest may be somebody's own.
    Path(f"{tmp_path / 'out'}.json").unlink()
    with pytest.raises(UserError, match="which exists"):
        build_dataset([first], tokenizer, tmp_path / "out")


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2])
def test_stopped_by_a_signal(tmp_path, tokenizer, big, workers, signal_number):
    arguments = ("--input", big, "--tokenizer", tokenizer, "--output", tmp_path / "out", "--workers", workers)
    process = start(*arguments, start_new_session=True)
    wait_for_data(process, tmp_path)
    pids = workers_of(process)
    assert len(pids) == (workers if workers > 1 else 0)
    os.killpg(process.pid, signal_number)  # a terminal and Slurm both signal the whole group
    _, error = process.communicate(timeout=60)
    last = error.strip().splitlines()[-1]
    said = f"stopped by {signal_number.name} before the end, nothing half done is left behind; start it again"
    assert (process.returncode, last) == (75, said), error
    assert "Traceback" not in error and not os.listdir(tmp_path)
    assert ends_within(pids, 10)


def test_killed_build_leaves_no_output_and_no_workers_and_the_next_one_succeeds(tmp_path, tokenizer, big):
    process = start("--input", big, "--tokenizer", tokenizer, "--output", tmp_path / "out", "--workers", 2)
    wait_for_data(process, tmp_path)
    pids = workers_of(process)
    # While it lives, another build of the same prefix is refused, and one of another prefix is not.
    small = write_lines(tmp_path / "small.jsonl", ["a", "b"])
    with pytest.raises(UserError, match="which another process is writing"):
        build_dataset([small], tokenizer, tmp_path / "out")
    build_dataset([small], tokenizer, tmp_path / "other")
    process.kill()
    process.communicate(timeout=60)
    assert ends_within(pids, 20)
    left = {path.name for path in tmp_path.iterdir()} - {"small.jsonl", "other.bin", "other.idx", "other.json"}
    assert left == {".out.bin.tmp"}
    with pytest.raises(UserError, match="nothing"):
        read_manifest(tmp_path / "out")
    build_dataset([small], tokenizer, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "other")
    assert not list(tmp_path.glob(".*"))


def test_a_file_system_without_locks_is_said(tmp_path, tokenizer, monkeypatch, caplog):
    """Lustre mounted without flock: one line, and the build goes on."""

    def none(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("remit_megatron.runtime.locks.fcntl.flock", none)
    build_dataset([write_lines(tmp_path / "small.jsonl", ["a", "b"])], tokenizer, tmp_path / "out")
    assert read_manifest(tmp_path / "out")
    assert "cannot be locked (Function not implemented): nothing keeps a second build of it out" in caplog.text


_KILLED_AT_RENAME = """
import os, sys
from remit_megatron.data import writer
from remit_megatron.data.build import build_dataset
replace, calls = os.replace, 0
def counted(*arguments):
    global calls
    calls += 1
    if calls == int(sys.argv[1]):
        os.kill(os.getpid(), 9)
    replace(*arguments)
os.replace = counted
build_dataset([sys.argv[2]], sys.argv[3], sys.argv[4], overwrite=True)
"""


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("existing", [False, True])
def test_killed_between_the_renames(tmp_path, tokenizer, at, existing):
    old, new = write_lines(tmp_path / "old.jsonl", ["old"]), write_lines(tmp_path / "new.jsonl", ["new one"])
    if existing:
        build_dataset([old], tokenizer, tmp_path / "out")
    command = [sys.executable, "-c", _KILLED_AT_RENAME, str(at), str(new), tokenizer, str(tmp_path / "out")]
    assert subprocess.run(command, cwd=ROOT, timeout=60).returncode == -signal.SIGKILL
    with pytest.raises(UserError):
        read_manifest(tmp_path / "out")
    assert build_dataset([new], tokenizer, tmp_path / "out").tokens == 8  # without --overwrite: nothing is there
    assert read_manifest(tmp_path / "out", verify=True).tokens == 8
    assert sorted(os.listdir(tmp_path)) == ["new.jsonl", "old.jsonl", "out.bin", "out.idx", "out.json"]


def test_dead_worker(tmp_path, tokenizer, big):
    process = start("--input", big, "--tokenizer", tokenizer, "--output", tmp_path / "out", "--workers", 2)
    wait_for_data(process, tmp_path)
    os.kill(workers_of(process)[0], signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2 and "Traceback" not in error, error
    assert "--workers: found a worker process that ended" in error.strip().splitlines()[-1]
    assert not os.listdir(tmp_path)


def test_file_size_limit(tmp_path, tokenizer, big):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    arguments = ("--input", big, "--tokenizer", tokenizer, "--output", tmp_path / "out", "--workers", 1)
    process = start(*arguments, preexec_fn=limit)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2 and "--output: found file size limit reached" in error.splitlines()[-1], error
    assert not os.listdir(tmp_path)


def test_no_space_left(tmp_path, tokenizer, big):
    """On a real full file system: 1 MiB of memory, mounted in a namespace of its own."""
    mount = f"mount -t tmpfs -o size=1m tmpfs {tmp_path}"
    if (
        not shutil.which("unshare")
        or subprocess.run(["unshare", "-rm", *mount.split()], capture_output=True).returncode
    ):
        pytest.skip("no permission to mount a file system")
    command = f"{sys.executable} -m remit_megatron data build --workers 1 --input {big} --tokenizer {tokenizer}"
    script = f"{mount} && {command} --output {tmp_path}/out; echo rc=$?; ls -A {tmp_path}"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "rc=2\n", done
    assert "--output: found no space left in" in done.stderr.splitlines()[-1], done.stderr


@pytest.mark.parametrize("value", ["1e999", "NaN", '"3"', "3.0", "true", "9" * 5000, str(2**63)])
@pytest.mark.parametrize("name", ["vocab_size", "eod_id", "documents", "tokens", "skipped", "largest_id", "size"])
def test_a_manifest_with_a_number_that_is_none(tmp_path, tokenizer, name, value):
    source = write_lines(tmp_path / "c.jsonl", ["ab"])
    build_dataset([source], tokenizer, tmp_path / "out")
    path = tmp_path / "out.json"
    path.write_text(re.sub(rf'("{name}"): \d+', rf"\1: {value}", path.read_text()))
    with pytest.raises(UserError, match=r"damaged manifest|Exceeds the limit"):
        read_manifest(tmp_path / "out")


@pytest.mark.parametrize("value", ["None", "int64", "", "object", "uint32"])
def test_a_manifest_of_tokens_of_another_kind(tmp_path, tokenizer, value):
    """As older data has it, without the largest id, which is looked for in the tokens."""
    build_dataset([write_lines(tmp_path / "c.jsonl", ["ab"])], tokenizer, tmp_path / "out")
    content = json.loads((tmp_path / "out.json").read_text())
    del content["largest_id"]
    (tmp_path / "out.json").write_text(json.dumps(content | {"dtype": value}))
    with pytest.raises(UserError, match=r"damaged manifest .*dtype"):
        check_ids(tmp_path / "out", 3, field="data.train")
    # The reader of the tokens goes by the index, and so does who looks for the largest of them.
    (tmp_path / "out.json").write_text(json.dumps(content | {"dtype": "int32"}))
    largest = max(IndexedTokens(tmp_path / "out").read(0))
    with pytest.raises(UserError, match=f"ids up to {largest}; expected"):
        check_ids(tmp_path / "out", 3, field="data.train")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_text_that_the_library_gives_up_on_is_a_bad_record(tmp_path, workers):
    """Its engine of patterns takes 10 million steps back at most: as many spaces are too many for the pattern of
    Llama 3 and GPT-4. Here one that needs fewer."""
    vocabulary = {token: number for number, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    split = pre_tokenizers.Split(tokenizers.Regex(r"(a+)+$"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.add_special_tokens(["<|endoftext|>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    text = write_lines(tmp_path / "a.jsonl", ["good", "a" * 40 + "b", "aa"])
    with pytest.raises(UserError, match=r"a.jsonl:2: found text that the tokenizer has no ids for"):
        build_dataset([text], tmp_path, tmp_path / "out", workers=workers)
    manifest = build_dataset([text], tmp_path, tmp_path / "out", workers=workers, on_error="skip")
    assert (manifest.documents, manifest.skipped, manifest.tokens) == (2, 1, len("good") + len("aa") + 2)


@pytest.mark.parametrize("name", ["out.yaml", "out.yml"])
def test_a_prefix_that_a_run_would_take_for_a_blend_file(tmp_path, tokenizer, name):
    text = write_lines(tmp_path / "a.jsonl", ["good"])
    with pytest.raises(
        UserError, match=r"--output: found .*; expected a prefix that does not end as a blend file does"
    ):
        build_dataset([text], tokenizer, tmp_path / name)


def test_texts_that_end_as_documents_do_are_counted(tmp_path, tokenizer, caplog):
    """As Megatron's preprocess_data they get a second end; here with a line."""
    texts = ["plain", "ends<|endoftext|>", "<|endoftext|>", "in<|endoftext|>side", "ends <|endoftext|><|endoftext|>"]
    text = write_lines(tmp_path / "a.jsonl", texts)
    build_dataset([text], tokenizer, tmp_path / "out")
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("3 of 5 documents end in two of <|endoftext|>: their texts spell one")
    data = IndexedTokens(tmp_path / "out")
    assert [data.read(number).tolist().count(256) for number in range(5)] == [1, 2, 2, 2, 3]
    caplog.clear()
    build_dataset([text], tokenizer, tmp_path / "without", append_eod=False)
    build_dataset([text], tokenizer, tmp_path / "first", max_documents=1)
    assert caplog.records == []


def test_a_field_and_a_template_at_once_are_refused(tmp_path, tokenizer, capsys):
    text = write_lines(tmp_path / "a.jsonl", ["good"])
    words = ["data", "build", "--input", str(text), "--tokenizer", tokenizer, "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as caught:
        main([*words, "--text-key", "text", "--template", "{text}"])
    assert caught.value.code == 2 and "--template: not allowed with argument --text-key" in capsys.readouterr().err
