"""``remit data mix``: sources of any kind to data sets and a blend, again and again without doing work twice."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
import zstandard
from fsspec.implementations.dirfs import DirFileSystem

from remit_megatron.cli import main
from remit_megatron.data import mix as mixing
from remit_megatron.data.blend import open_blend, parse_blend
from remit_megatron.data.build import build_dataset, build_files
from remit_megatron.data.hub import HubFiles
from remit_megatron.data.indexed import IndexedTokens
from remit_megatron.data.inputs import expand_inputs
from remit_megatron.data.manifest import read_manifest
from remit_megatron.data.mix import parse_tokens, plan_mix
from remit_megatron.data.recipe import HubPlace, load_recipe
from remit_megatron.data.tokenizer import load_tokenizer
from remit_megatron.runtime.errors import UserError
from tests.tiny import make_tokenizer

TEXTS = {
    "lines": [f"line {number}" for number in range(40)],
    "folder": [f"packed {number}" for number in range(30)],
    "table": [f"cell {number}" for number in range(20)],
}
RECIPE = """
sources:
- {name: lines, weight: 6, files: raw/lines.jsonl}
- {name: folder, weight: 3}
- {name: table, weight: 0.5, files: "raw/*.parquet", text_key: content}
- {name: pairs, weight: 0.5, files: raw/pairs.jsonl.zst, template: "q {q} a {a}"}
"""


def lines_of(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def root(tmp_path) -> Path:
    """A corpus of all kinds, and the recipe, in the folder above."""
    root = tmp_path / "root"
    (root / "raw").mkdir(parents=True)
    (root / "folder/deep").mkdir(parents=True)
    (root / "raw/lines.jsonl").write_bytes(lines_of(TEXTS["lines"]))
    (root / "folder/a.jsonl.gz").write_bytes(gzip.compress(lines_of(TEXTS["folder"][:10])))
    (root / "folder/deep/b.jsonl.zstd").write_bytes(zstandard.compress(lines_of(TEXTS["folder"][10:])))
    (root / "folder/README.md").write_text("not data")
    pq.write_table(pa.table({"content": TEXTS["table"], "n": list(range(20))}), root / "raw/table.parquet")
    pairs = "".join(json.dumps({"q": str(number), "a": "yes"}) + "\n" for number in range(10))
    (root / "raw/pairs.jsonl.zst").write_bytes(zstandard.compress(pairs.encode()))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return root


@pytest.fixture
def run(root, tokenizer):
    """Runs the command in this process; gives the exit code."""

    def call(*words: str, recipe: str = "recipe.yaml") -> int:
        return main(
            ["data", "mix", str(root.parent / recipe), "--root", str(root), "--output", str(root.parent / "out"),
             "--tokenizer", str(tokenizer), "--workers", "1", *words]
        )  # fmt: skip

    return call


@pytest.fixture
def builds(monkeypatch) -> list[str]:
    """Names of the sources that are built, as they are."""
    built: list[str] = []

    def recorded(files, tokenizer, output, **kwargs):
        built.append(Path(output).name)
        return build_files(files, tokenizer, output, **kwargs)

    monkeypatch.setattr(mixing, "build_files", recorded)
    return built


def texts_of(prefix: Path, tokenizer: Path) -> list[str]:
    opened, tokens = load_tokenizer(tokenizer), IndexedTokens(str(prefix))
    return [opened.decode(tokens.read(number)[:-1].tolist()) for number in range(len(tokens))]


def test_every_kind_of_source(root, run, tokenizer, builds, caplog):
    out = root.parent / "out"
    assert run() == 0 and builds == ["lines", "folder", "table", "pairs"]
    passed_over = f"{root}/folder: passed over 1 file for the ending, such as {root}/folder/README.md"
    assert [record.getMessage() for record in caplog.records] == [passed_over]
    for name in ("lines", "table"):
        assert texts_of(out / name, tokenizer) == TEXTS[name]
    assert sorted(texts_of(out / "folder", tokenizer)) == sorted(TEXTS["folder"])
    assert texts_of(out / "pairs", tokenizer)[:2] == ["q 0 a yes", "q 1 a yes"]

    entries = parse_blend(str(out / "blend.yaml"))
    assert [(Path(entry.prefix).name, entry.weight) for entry in entries] == [
        ("lines", pytest.approx(0.6)), ("folder", pytest.approx(0.3)),
        ("table", pytest.approx(0.05)), ("pairs", pytest.approx(0.05)),
    ]  # fmt: skip
    opened = load_tokenizer(tokenizer)
    samples = open_blend(
        entries, sequence_length=16, num_samples=100, seed=1, tokenizer_digest=opened.digest, eod_id=opened.eod_id
    )
    assert samples.order.counts(100) == [60, 30, 5, 5] and samples[99]["tokens"].shape == (16,)


def test_a_second_run_builds_nothing(root, run, builds, capsys):
    assert run() == 0
    del builds[:]
    (root.parent / "out/blend.yaml").unlink()
    assert run() == 0 and builds == []
    assert (root.parent / "out/blend.yaml").exists()
    assert capsys.readouterr().out.count(" done\n") == 8


def test_a_run_that_broke_off_goes_on(root, run, builds, capsys):
    good = (root / "raw/table.parquet").read_bytes()
    (root / "raw/table.parquet").write_bytes(good[:200])
    assert run() == 2 and builds == ["lines", "folder", "table"]
    assert "table.parquet" in capsys.readouterr().err
    assert not (root.parent / "out/blend.yaml").exists() and not (root.parent / "out/table.json").exists()
    (root / "raw/table.parquet").write_bytes(good)
    del builds[:]
    assert run() == 0 and builds == ["table", "pairs"]


def test_missing_sources(root, run, builds, capsys):
    (root / "raw/lines.jsonl").unlink()
    assert run() == 2 and builds == ["folder", "table", "pairs"], "what is there is built all the same"
    captured = capsys.readouterr()
    assert f"lines is missing (nothing at {root}/raw/lines.jsonl): put its documents at {root}/raw/" in captured.out
    assert captured.err.count("\n") == 4 or "1 of 4 sources missing (lines)" in captured.err
    assert "1 of 4 sources missing (lines); expected all of them; or --allow-missing" in captured.err
    assert not (root.parent / "out/blend.yaml").exists()

    assert run("--allow-missing") == 0
    text = (root.parent / "out/blend.yaml").read_text()
    assert "# Left out, because missing: lines.\n" in text
    assert yaml.safe_load(text)["blend"] == [[0.75, "folder"], [0.125, "table"], [0.125, "pairs"]]

    (root / "raw/lines.jsonl").write_bytes(lines_of(TEXTS["lines"]))
    del builds[:]
    assert run() == 0 and builds == ["lines"]
    assert "Left out" not in (root.parent / "out/blend.yaml").read_text()


def test_with_a_budget_missing_sources_are_refused_first(root, run, builds, capsys):
    """What is built for the whole recipe is too little for a mix of some of its sources."""
    (root / "raw/lines.jsonl").unlink()
    assert run("--tokens", "200") == 2 and builds == []
    captured = capsys.readouterr()
    assert "lines is missing (" in captured.out and "expected all of them; or --allow-missing" in captured.err
    assert run("--tokens", "200", "--allow-missing") == 0 and builds == ["folder", "table", "pairs"]
    assert read_manifest(root.parent / "out/folder").tokens >= 0.75 * 200

    (root / "raw/lines.jsonl").write_bytes(lines_of(TEXTS["lines"]))
    del builds[:]
    assert run("--tokens", "200") == 0 and builds == ["lines"], "of the others there is more than enough"


def test_a_mix_of_nothing_is_refused(root, run, capsys):
    (root.parent / "empty.yaml").write_text("sources: [{name: none, weight: 1}]")
    assert run("--allow-missing", recipe="empty.yaml") == 2
    assert "1 of 1 sources missing (none)" in capsys.readouterr().err


def test_dry_run_prints_shares_and_tokens_and_writes_nothing(root, capsys):
    command = ["data", "mix", str(root.parent / "recipe.yaml"), "--output", str(root.parent / "out"), "--dry-run"]
    assert main([*command, "--root", str(root), "--tokens", "50B"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["source", "share", "wanted", "tokens", "state"]
    assert rows[1][:3] == ["lines", "60.0000%", "30B"] and rows[3][:3] == ["table", "5.0000%", "2.5B"]
    assert rows[-1] == ["sum", "100.0000%", "50B"]
    assert not (root.parent / "out").exists()
    assert main([*command, "--root", str(root.parent / "nowhere")]) == 0, "missing sources are only told"
    assert capsys.readouterr().out.count(" is missing ") == 4


def test_a_budget_ends_each_source_at_its_share(root, run, builds, tokenizer, capsys):
    out = root.parent / "out"
    assert run("--tokens", "200") == 0
    tokens = {name: read_manifest(out / name).tokens for name in ("lines", "folder", "table", "pairs")}
    wanted = {"lines": 120, "folder": 60, "table": 10, "pairs": 10}
    for name in wanted:  # the document that crosses the share is the last
        assert wanted[name] <= tokens[name] < wanted[name] + 12, name
    assert texts_of(out / "lines", tokenizer) == TEXTS["lines"][: len(texts_of(out / "lines", tokenizer))]

    del builds[:]
    assert run("--tokens", "100") == 0 and builds == [], "there is more than enough"
    assert run("--tokens", "300") == 2 and builds == []
    assert "lines: found built for 120 tokens, and 180 are wanted" in capsys.readouterr().err
    assert run("--tokens", "300", "--overwrite") == 0 and builds == ["lines", "folder", "table", "pairs"]
    del builds[:]
    assert run("--overwrite") == 0 and builds == ["lines", "folder", "table", "pairs"], "no budget wants all there is"
    assert len(texts_of(out / "lines", tokenizer)) == 40


def test_a_source_that_ends_before_its_share_is_finished(root, run, builds, capsys):
    assert run("--tokens", "100000") == 0
    assert "done: the mix goes through it " in capsys.readouterr().out
    del builds[:]
    assert run("--tokens", "200000") == 0 and builds == [], "there is no more of it"


def test_other_contents_are_noticed(root, run, builds, tmp_path_factory, capsys):
    assert run() == 0
    del builds[:]
    with open(root / "raw/lines.jsonl", "ab") as file:
        file.write(lines_of(["one more"]))
    assert run() == 2 and "out/lines: found built from other files" in capsys.readouterr().err
    assert run("--overwrite") == 0 and builds == ["lines"], "and only what has changed is built again"

    (root.parent / "recipe.yaml").write_text(RECIPE.replace("q {q} a {a}", "{q}, {a}"))
    assert run() == 2 and "out/pairs: found built from another text_key or template" in capsys.readouterr().err
    (root.parent / "recipe.yaml").write_text(RECIPE)

    other = make_tokenizer(tmp_path_factory.mktemp("other"))
    content = json.loads((other / "tokenizer.json").read_text())
    content["model"]["vocab"]["~"] = 50
    (other / "tokenizer.json").write_text(json.dumps(content))
    assert run("--tokenizer", str(other)) == 2
    assert "out/lines: found tokens of tokenizer" in capsys.readouterr().err
    assert builds == ["lines"]


def test_finished_sources_need_no_files(root, run, builds):
    assert run() == 0
    del builds[:]
    (root / "raw/lines.jsonl").unlink()
    assert run() == 0 and builds == [], "raw text may be removed"


def test_a_data_set_of_another_origin_is_left_alone(root, run, tokenizer, capsys):
    build_dataset([str(root / "raw/lines.jsonl")], tokenizer, root.parent / "out/lines")
    assert run() == 2
    assert "found a data set that `remit data mix` did not build" in capsys.readouterr().err


def test_the_order_of_files_is_not_that_of_their_names(tmp_path):
    for parent in ("one", "two"):
        (tmp_path / parent / "many").mkdir(parents=True)
        for number in range(30):
            (tmp_path / parent / "many" / f"{number:02}.jsonl").write_bytes(lines_of(["a"]))
    (tmp_path / "recipe.yaml").write_text("sources: [{name: many, weight: 1}]")
    recipe = load_recipe(tmp_path / "recipe.yaml")
    first, second = (
        [Path(file).name for file in plan_mix(recipe, root=str(tmp_path / parent), output=str(tmp_path))[0].files]
        for parent in ("one", "two")
    )
    assert first == second, "but it does not depend on where they are"
    assert sorted(first) != first and len(set(first)) == 30


@pytest.mark.parametrize(
    ("text", "tokens"), [("50e9", 50 * 10**9), ("50B", 50 * 10**9), ("1.5T", 15 * 10**11), ("7", 7)]
)
def test_tokens(text, tokens):
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["", "0", "-5", "5 apples", "nan", "1e400", "0.2"])
def test_wrong_tokens(text):
    with pytest.raises(UserError, match="--tokens: found"):
        parse_tokens(text)


# The hub. What stands in for it has its paths, and is read by the same code; only the connection is not tried here.


@pytest.fixture
def hub(root, monkeypatch) -> DirFileSystem:
    """A file system on which the corpus is a data set of the hub."""
    place = root.parent / "hub/datasets/owner/corpus@v1"
    place.parent.mkdir(parents=True)
    place.symlink_to(root)
    filesystem = DirFileSystem(str(root.parent / "hub"), auto_mkdir=False)
    monkeypatch.setattr("huggingface_hub.HfFileSystem", lambda: filesystem)
    return filesystem


def place(*files: str) -> HubPlace:
    return HubPlace("owner/corpus", files, "v1")


def test_hub_files(hub, root):
    assert HubFiles(place("raw/lines.jsonl")).files == ["raw/lines.jsonl"]
    assert HubFiles(place("folder")).files == ["folder/a.jsonl.gz", "folder/deep/b.jsonl.zstd"]
    assert HubFiles(place("raw/*.parquet", "fold*")).files == [
        "folder/a.jsonl.gz", "folder/deep/b.jsonl.zstd", "raw/table.parquet",
    ]  # fmt: skip
    files = HubFiles(place("raw"))
    assert files.size("raw/lines.jsonl") == (root / "raw/lines.jsonl").stat().st_size
    with files.open("raw/lines.jsonl") as stream:
        assert stream.read(5) == b'{"tex' and stream.seek(0) == 0
        assert stream.read() == (root / "raw/lines.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"hub owner/corpus: found no data file at nothing; expected files ending in"):
        HubFiles(place("raw", "nothing"))


def test_a_mix_from_the_hub_is_the_mix_from_files(hub, root, run, builds, capsys):
    text = RECIPE.replace("raw/", "gone/").replace("{name: folder,", "{name: folder, files: gone/folder,")
    for item, files in {
        "lines": "raw/lines.jsonl",
        "folder": "folder",
        "table": '"raw/*.parquet"',
        "pairs": "raw/pairs.jsonl.zst",
    }.items():
        text = text.replace(
            f"name: {item},", f"name: {item}, hub: {{name: owner/corpus, revision: v1, files: {files}}},"
        )
    (root.parent / "from_hub.yaml").write_text(text)
    assert run(recipe="from_hub.yaml") == 2, "the network is used only where that is asked for"
    assert "or give --hub to read owner/corpus@v1: raw/lines.jsonl" in capsys.readouterr().out and builds == []
    assert run("--hub", recipe="from_hub.yaml") == 0 and builds == ["lines", "folder", "table", "pairs"]
    out = root.parent / "out"
    from_hub = {path.name: path.read_bytes() for path in out.glob("*.bin")}
    del builds[:]
    assert run(recipe="from_hub.yaml") == 0 and builds == [], "what is finished needs no hub"
    for path in out.iterdir():
        path.unlink()
    assert run() == 0
    assert {path.name: path.read_bytes() for path in out.glob("*.bin")} == from_hub


def test_building_again_asks_for_the_hub_too(hub, root, run, builds, capsys):
    """What was built is known without its files. To build it again, the network is used where that is asked for."""
    there = "hub: {name: owner/corpus, revision: v1, files: raw/lines.jsonl}"
    sources = [f"{{name: far, weight: 1, {there}}}", "{name: gone, weight: 1, files: raw/gone.jsonl}"]
    (root.parent / "far.yaml").write_text(f"sources: [{sources[0]}]")
    (root.parent / "both.yaml").write_text(f"sources: [{', '.join(sources)}]")
    (root / "raw/gone.jsonl").write_bytes(lines_of(TEXTS["lines"]))
    assert run("--hub", "--tokens", "100", recipe="both.yaml") == 0 and builds == ["far", "gone"]
    (root / "raw/gone.jsonl").unlink()
    del builds[:]
    before = {path.name: path.read_bytes() for path in (root.parent / "out").iterdir()}
    for options, named in ((["--overwrite"], "far"), (["--overwrite", "--hub"], "gone")):
        assert run("--tokens", "200", *options, recipe="both.yaml") == 2 and builds == [], "found before any is built"
        error = capsys.readouterr().err
        assert f"both.yaml: {named}: found no files to build it again from; expected its files below --root" in error
        assert ("or --hub to read owner/corpus@v1" in error) == (named == "far")
    assert {path.name: path.read_bytes() for path in (root.parent / "out").iterdir()} == before
    assert run("--tokens", "200", "--overwrite", "--hub", recipe="far.yaml") == 0 and builds == ["far"]


class Unreachable:
    """A file system whose every call fails as an HTTP library does: with an error of its own kind."""

    class NoConnection(Exception):
        pass

    def find(self, *_, **__):
        raise self.NoConnection("name not resolved\nand more")

    open = find


def test_a_hub_that_cannot_be_reached_is_one_line(hub):
    with pytest.raises(UserError) as caught:
        HubFiles(place("raw"), filesystem=Unreachable())
    assert str(caught.value) == (
        "hub owner/corpus@v1: raw: found NoConnection: name not resolved; expected a data set that can be reached; "
        "or its files below --root"
    )


def test_a_connection_that_breaks_is_a_file_that_cannot_be_read(hub, root, tokenizer, tmp_path):
    files = HubFiles(place("raw/lines.jsonl"))
    files._filesystem = Unreachable()
    with pytest.raises(UserError, match=r"raw/lines.jsonl: found a file that cannot be read \(NoConnection: name not"):
        build_files(files.files, tokenizer, tmp_path / "x", store=files)
    assert list(tmp_path.glob("x*")) == [] and list(tmp_path.glob(".x*")) == []


def test_patterns_on_the_hub_mean_what_they_mean_here(hub, root):
    """The same entry, the same files, whether they are on this machine or not."""
    for name in ("raw/deep/more.parquet", "raw/.cache/old.jsonl", "folder2/.hidden.jsonl", "folder2/x/train/1.jsonl"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    entries = [
        "raw",
        "raw/*.parquet",
        "raw/*",
        "fold*",
        "*",
        "**/*.jsonl",
        "raw/**",
        "*/*/train",
        "f*2/**/*.jsonl",
        ".",
    ]
    for entry in (*entries, "./raw", "raw/lines.jsonl", "f[o]lder"):
        here = [path.removeprefix(f"{root}/").removeprefix("./") for path in expand_inputs([f"{root}/{entry}"])]
        assert HubFiles(place(entry)).files == sorted(here), entry


def test_the_folder_of_a_corpus_is_no_pattern(root, tokenizer):
    """`[12]` would be 1 or 2, with their files and without its own."""
    for name in ("corpus[12]", "corpus1"):
        (root / name).mkdir()
        (root / name / f"{name[-1]}.jsonl").write_bytes(lines_of([name]))
    (root / "recipe.yaml").write_text('sources: [{name: web, weight: 1, files: "*.jsonl"}]')
    (plan,) = plan_mix(load_recipe(root / "recipe.yaml"), root=str(root / "corpus[12]"), output=str(root / "out"))
    assert plan.files == (f"{root}/corpus[12]/].jsonl",)


def test_sources_called_by_numbers_are_in_the_blend(root, run):
    """Names that YAML takes for something else, and a share that Python writes without a point."""
    sources = [f'{{name: "{name}", weight: {weight}, files: raw/lines.jsonl}}' for name, weight in
               (("2024", 1), ("null", 99999))]  # fmt: skip
    (root.parent / "odd.yaml").write_text(f"sources: [{', '.join(sources)}]")
    assert run(recipe="odd.yaml") == 0
    entries = parse_blend(str(root.parent / "out/blend.yaml"))
    assert [(Path(entry.prefix).name, entry.weight) for entry in entries] == [("2024", 1e-05), ("null", 0.99999)]


def test_a_data_set_with_half_an_origin_is_left_alone(root, run, capsys):
    assert run() == 0
    path = root.parent / "out/lines.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"origin": {"files": None}}))
    assert run() == 2 and "a data set that `remit data mix` did not build" in capsys.readouterr().err
