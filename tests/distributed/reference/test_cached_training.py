"""Training from a score cache: the same numbers as live, on every layout, and what happens when scores are missing."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from remit_megatron.reference.cache import ReferenceCache
from remit_megatron.run.configuration import load_config
from remit_megatron.run.prepare import prepare, total_steps
from remit_megatron.run.samples import open_datasets
from remit_megatron.run.score_cache import dataset_names, open_cache, open_run_scores
from remit_megatron.runtime.checkpoints import read_manifest
from remit_megatron.runtime.errors import EXIT_START_ME_AGAIN, UserError
from tests.distributed.training.test_training import LAYOUTS, REMIT, STEPS, configuration, train, train_rank
from tests.distributed.training.test_training import material as material  # a fixture
from tests.tiny import write_documents

COMPARED = ("lm_loss", "objective_loss", "grad_norm", "weight_mean", "weight_std", "delta_mean", "delta_std")


def cached(material, name: str, cache: Path, *, objective=REMIT, reference=None, **megatron: Any) -> dict[str, Any]:
    """A run that reads a cache."""
    config = configuration(material, material["root"] / f"cached_{name}", objective, **megatron)
    config["reference"] |= {"source": "cache", "cache_dir": str(cache)} | (reference or {})
    return config


def final_weights(run_dir: Path) -> dict[str, np.ndarray]:
    """Every tensor of the last checkpoint."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

    (directory,) = (run_dir / "checkpoints").glob("iter_*")
    state = _load_state_dict_from_keys(storage_reader=FileSystemReader(str(directory)), checkpoint_id=str(directory))
    found: dict[str, np.ndarray] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}", inner)
        elif hasattr(value, "numpy"):
            found[prefix] = value.numpy()

    walk("", state)
    return found


@pytest.fixture(scope="module")
def live(pool, material) -> dict[str, Any]:
    """A live run that fills a cache of float32 and one of 16 bits on its way."""
    runs: dict[str, Any] = {}
    for dtype in ("float32", "uint16"):
        cache = material["root"] / f"cache_{dtype}"
        config = configuration(material, material["root"] / f"live_{dtype}", REMIT)
        config["reference"] |= {"write_cache": True, "cache_dir": str(cache), "dtype": dtype}
        runs[dtype] = {"metrics": train(pool, config, world_size=1), "cache": cache, "run_dir": Path(config["run_dir"])}
    return runs


def agree(expected: list[dict[str, Any]], found: list[dict[str, Any]], *, tolerance: float = 1e-4) -> None:
    assert len(expected) == len(found) == STEPS
    for one, other in zip(expected, found, strict=True):
        for name in COMPARED:
            assert math.isclose(one[name], other[name], rel_tol=tolerance, abs_tol=1e-5), (
                f"step {one['iteration']}, {name}: found {other[name]}; expected {one[name]}"
            )


def test_the_same_checkpoint_bit_for_bit(pool, material, live):
    config = cached(material, "exact", live["float32"]["cache"], reference={"on_missing": "refuse"})
    metrics = train(pool, config, world_size=1)
    for one, other in zip(live["float32"]["metrics"], metrics, strict=True):
        assert {name: one[name] for name in COMPARED} == {name: other[name] for name in COMPARED}
    expected, found = final_weights(live["float32"]["run_dir"]), final_weights(Path(config["run_dir"]))
    assert expected.keys() == found.keys() and len(expected) > 10
    for name, array in expected.items():
        np.testing.assert_array_equal(array, found[name], err_msg=name)


@pytest.mark.parametrize("layout", ["dp2", "tp2_pp2", "cp2", "pp2_virtual2"])
def test_every_layout_reads_the_same_scores(pool, material, live, layout):
    world_size, megatron = LAYOUTS[layout]
    config = cached(material, layout, live["float32"]["cache"], reference={"on_missing": "refuse"}, **megatron)
    agree(live["float32"]["metrics"], train(pool, config, world_size=world_size))


def test_resumed_within_an_epoch_on_other_layouts(pool, material, live, tmp_path):
    """Stopped twice, each time going on with other ranks and microbatches: not one token reads another's score."""
    from remit_megatron.data.build import build_dataset

    documents = write_documents(tmp_path / "documents.jsonl", count=110, seed=6)
    build_dataset([str(documents)], tokenizer=str(material["tokenizer"]), output=str(tmp_path / "corpus"))
    small = material | {"corpus": tmp_path / "corpus", "root": tmp_path}
    expected = configuration(small, tmp_path / "live", REMIT, global_batch_size=12)
    expected["reference"] |= {"write_cache": True, "cache_dir": str(tmp_path / "cache"), "dtype": "float32"}
    straight = train(pool, expected, world_size=1)
    (record,) = ReferenceCache.open(tmp_path / "cache").datasets().values()
    assert 24 < record.samples < 48, "the first stop lies within the first epoch, the second within the second"
    parts = [
        (EXIT_START_ME_AGAIN, 3, {"micro_batch_size": 1}),
        (EXIT_START_ME_AGAIN, 4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
        (0, 1, {"micro_batch_size": 4}),
    ]
    for code, world_size, megatron in parts:
        settings = {"global_batch_size": 12, "exit_interval": 2} | megatron
        config = cached(small, "parts", tmp_path / "cache", reference={"on_missing": "refuse"}, **settings)
        path = tmp_path / "parts.yaml"
        path.write_text(json.dumps(config))
        assert pool.run(train_rank, world_size=world_size, config={}, path=str(path)) == [code] * world_size
    found = [json.loads(line) for line in (tmp_path / "cached_parts" / "metrics.jsonl").read_text().splitlines()]
    agree(straight, found)


def test_another_micro_batch_and_sixteen_bits(pool, material, live):
    config = cached(material, "bits", live["uint16"]["cache"], reference={"on_missing": "refuse"}, micro_batch_size=4)
    metrics = train(pool, config, world_size=1)
    for one, other in zip(live["uint16"]["metrics"], metrics, strict=True):
        assert one["lm_loss"] == pytest.approx(other["lm_loss"], rel=1e-5)
        assert one["delta_mean"] == pytest.approx(other["delta_mean"], abs=2e-4)
        assert one["weight_std"] == pytest.approx(other["weight_std"], abs=2e-4)
        assert one["objective_loss"] == pytest.approx(other["objective_loss"], rel=2e-4)


def test_another_objective_seedless(pool, material, live):
    """A second run with another epsilon and one with another objective read the same scores."""
    for number, objective in enumerate(({"name": "remit", "epsilon": None}, {"name": "rho1", "scope": "global_batch"})):
        settings = {"on_missing": "refuse"}
        config = cached(
            material, f"objective{number}", live["float32"]["cache"], objective=objective, reference=settings
        )
        expected = configuration(material, material["root"] / f"live_objective{number}", objective)
        agree(train(pool, expected, world_size=1), train(pool, config, world_size=1), tolerance=1e-7)


@pytest.mark.parametrize("layout", ["one", "tp2_pp2", "pp2_virtual2", "cp2"])
def test_what_is_missing_is_scored_and_added(pool, material, live, layout):
    world_size, megatron = LAYOUTS.get(layout, (1, {}))
    cache = material["root"] / f"cache_partial_{layout}"
    shutil.copytree(live["float32"]["cache"], cache)
    whole, partial = ReferenceCache.open(live["float32"]["cache"]), ReferenceCache.open(cache)
    ((dataset, _),) = whole.datasets().items()
    (shard,) = (cache / dataset).glob("*.scores")
    shard.unlink()
    kept = whole.completeness(dataset).nonzero()[0]
    from remit_megatron.data.blend import open_blend

    blend = open_blend([(1.0, str(material["corpus"]))], sequence_length=64, num_samples=1, seed=1)
    for sample in kept[::3].tolist():
        scores = whole.read_scores(dataset, sample)
        assert scores is not None
        partial.write(dataset, sample, blend.datasets[0][sample], scores)
    partial.close()
    config = cached(material, f"partial_{layout}", cache, **megatron)
    agree(live["float32"]["metrics"], train(pool, config, world_size=world_size))
    completed = ReferenceCache.open(cache).completeness(dataset)
    assert completed[kept].all(), "what was missing has been added"
    for sample in kept.tolist():
        np.testing.assert_allclose(partial.read_scores(dataset, sample), whole.read_scores(dataset, sample), atol=1e-4)


def exit_code(path: str) -> int:
    """One rank of ``remit train``, as the command line ends it."""
    from remit_megatron import cli

    return cli.main(["train", path])


def test_a_run_gets_over_a_damaged_score_by_starting_again(pool, material, live):
    """The score of one rank's sample is damaged, though complete: both ranks leave with 75, and the next start trains
    through as if nothing had been."""
    cache = material["root"] / "cache_damaged"
    shutil.copytree(live["float32"]["cache"], cache)
    config = cached(material, "damaged", cache)
    prepared = prepare(load_config(write(config)), world_size=1)
    blend = open_datasets(prepared, STEPS * 8)[0]
    _, sample = blend.locate(8 * 2 + 2)  # third step, second microbatch: rank 1's
    opened = ReferenceCache.open(cache)
    shard = opened._shard(blend.datasets[0].identity, sample)
    with open(shard.path, "r+b") as file:
        file.seek(shard.key.entry_at(sample) + 100)
        file.write(b"damage")
    assert opened.completeness(blend.datasets[0].identity)[sample]
    for code in (EXIT_START_ME_AGAIN, 0):
        assert pool.run(exit_code, world_size=2, path=write(config)) == [code] * 2
    assert opened.intact(blend.datasets[0].identity)[sample]
    found = [json.loads(line) for line in (Path(config["run_dir"]) / "metrics.jsonl").read_text().splitlines()]
    agree(live["float32"]["metrics"], found[-STEPS:])


def refusal(path: str) -> str | None:
    """What one rank of ``remit train`` finds wrong."""
    try:
        train_rank({}, path)
    except UserError as error:
        return str(error)
    return None


def test_resumed_with_another_batch_size_looks_for_what_is_still_to_be_read(pool, material, tmp_path):
    """Two steps of 8 samples, then steps of 16: the run goes on at sample 16 and not at 2 x 16."""
    config = configuration(material, tmp_path / "run", REMIT, train_samples=64, exit_interval=2)
    del config["megatron"]["train_iters"]
    config["reference"] |= {"write_cache": True, "cache_dir": str(tmp_path / "cache")}
    assert pool.run(exit_code, world_size=1, path=write(config)) == [EXIT_START_ME_AGAIN]
    (record,) = ReferenceCache.open(tmp_path / "cache").datasets().values()
    assert record.samples > 64, "every sample of the run is another one"
    del config["megatron"]["exit_interval"]
    config["megatron"]["global_batch_size"] = 16
    config["reference"] |= {"write_cache": False, "source": "cache", "on_missing": "refuse"}
    (line,) = pool.run(refusal, world_size=1, path=write(config))
    assert line is not None and "found no scores of 48 samples" in line
    config["reference"]["on_missing"] = "score"
    assert pool.run(exit_code, world_size=1, path=write(config)) == [0]
    found = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step["consumed_tokens"] // 64 for step in found] == [8, 16, 32, 48, 64], "all of its samples"
    checkpoints = sorted((tmp_path / "run" / "checkpoints").glob("iter_*"))
    assert [read_manifest(checkpoint).properties["consumed_samples"] for checkpoint in checkpoints] == [16, 64]


def signalled(path: str, log: str) -> tuple[int, float]:
    """`exit_code` of a rank, of which rank 0 gets a real SIGTERM when it waits; and seconds since it began to wait."""
    began = []

    def send() -> None:
        while "waiting for the scores" not in (Path(log).read_text() if Path(log).exists() else ""):
            time.sleep(0.05)
        began.append(time.monotonic())
        if os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    code = exit_code(path)
    thread.join()
    return code, time.monotonic() - began[0]


def test_a_waiting_run_stops_when_it_is_told(pool, material, live):
    """One rank waits, the other has all it needs, and that one gets the signal: both leave with 75, within seconds."""
    cache = material["root"] / "cache_waited_for"
    shutil.copytree(live["float32"]["cache"], cache)
    config = cached(material, "stopped", cache, reference={"on_missing": "wait"}, save_interval=2)
    blend = open_datasets(prepare(load_config(write(config)), world_size=1), STEPS * 8)[0]
    dataset, (_, sample) = blend.datasets[0], blend.locate(8 * 2 + 2)  # third step, second microbatch: rank 1's
    opened = ReferenceCache.open(cache)
    scores = opened.read_scores(dataset.identity, sample)
    assert scores is not None
    opened.forget(dataset.identity, sample)
    log = Path(config["run_dir"]) / "logs" / "rank_1.log"
    for code, seconds in pool.run(signalled, world_size=2, path=write(config), log=str(log)):
        assert code == EXIT_START_ME_AGAIN and seconds < 20
    opened.write(dataset.identity, sample, dataset[sample], scores)
    assert pool.run(exit_code, world_size=2, path=write(config)) == [0, 0]
    found = [json.loads(line) for line in (Path(config["run_dir"]) / "metrics.jsonl").read_text().splitlines()]
    agree(live["float32"]["metrics"], found)


def write(config: dict[str, Any]) -> str:
    run_dir = Path(config["run_dir"])
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "input.yaml").write_text(json.dumps(config))
    return str(run_dir / "input.yaml")


def refused(config: dict[str, Any]) -> str:
    """What the run says before it starts."""
    with pytest.raises(UserError) as failure:
        prepared = prepare(load_config(write(config)), world_size=1)
        samples = total_steps(prepared.arguments) * prepared.arguments.global_batch_size
        open_run_scores(prepared, open_datasets(prepared, samples)[0], rank=0, consumed=0)
    return str(failure.value)


def test_other_inputs_are_refused_with_both_values(material, live):
    cache = live["float32"]["cache"]
    record = json.loads((cache / "manifest.json").read_text())
    known = {name: str(value) for name, value in record["identity"].items()}
    config = cached(material, "refused", cache)
    config["reference"]["checkpoint"] = str(material["student"])
    assert known["reference"] in refused(config)
    line = refused(cached(material, "refused", cache, seq_length=32))
    assert "sequence_length" in line and "found 64" in line and "expected 32" in line
    config = cached(material, "refused", cache)
    config["data"]["packing_seed"] = 5
    assert "packing_seed" in refused(config)
    config = cached(material, "refused", cache)
    config["data"]["document_mask"] = False
    assert "document_mask" in refused(config)


def test_a_changed_text_is_refused(material, live, tmp_path):
    from remit_megatron.data.build import build_dataset

    documents = write_documents(tmp_path / "documents.jsonl", count=400, seed=4)
    build_dataset([str(documents)], tokenizer=str(material["tokenizer"]), output=str(tmp_path / "corpus"))
    for on_missing in ("score", "refuse"):
        config = cached(material, "changed", live["float32"]["cache"], reference={"on_missing": on_missing})
        config["data"]["train"] = [[1.0, str(tmp_path / "corpus")]]
        line = refused(config)
        assert "data set corpus" in line and "text changed" in line


@pytest.mark.parametrize(
    ("prefixes", "names"),
    [
        (["data/corpus"], ["corpus"]),
        (["data/web/train", "data/math/train", "code"], ["web/train", "math/train", "code"]),
        (["/a/x/web/train", "/a/y/web/train", "/b/train"], ["x/web/train", "y/web/train", "b/train"]),
        (["/train", "/a/train", "/b/a/train"], ["train", "a/train", "b/a/train"]),
        (["./one/data", "two/../two/data"], ["one/data", "two/data"]),
    ],
)
def test_names_of_data_sets(prefixes, names):
    assert dataset_names(prefixes) == names


def test_data_sets_of_one_file_name_share_a_cache(material, tmp_path):
    """Declared when the cache is made, found when it is read, and a text that changes is noticed under its name."""
    from remit_megatron.data.build import build_dataset

    def build(folder: str, seed: int) -> str:
        documents = write_documents(tmp_path / f"{seed}.jsonl", count=60, seed=seed)
        (tmp_path / folder).mkdir(exist_ok=True)
        build_dataset(
            [str(documents)],
            tokenizer=str(material["tokenizer"]),
            output=str(tmp_path / folder / "train"),
            overwrite=True,
        )
        return str(tmp_path / folder / "train")

    train = [[0.7, build("web", 1)], [0.3, build("math", 2)]]

    def opened(on_missing: str):
        config = cached(material, "same_name", tmp_path / "cache", reference={"on_missing": on_missing})
        config["data"]["train"] = train
        prepared = prepare(load_config(write(config)), world_size=1)
        blend = open_datasets(prepared, 8)[0]
        return open_cache(prepared, blend, rank=0, create=on_missing == "score"), blend

    cache, blend = opened("score")
    assert sorted(record.name for record in cache.datasets().values()) == ["math/train", "web/train"]
    for dataset, name in zip(blend.datasets, ("web/train", "math/train"), strict=True):
        assert cache.datasets()[dataset.identity] == (name, len(dataset))
    cache, _ = opened("refuse")
    assert len(cache.datasets()) == 2
    build("math", 3)
    for on_missing in ("score", "refuse"):
        with pytest.raises(UserError, match=r"data set math/train.*the text changed"):
            opened(on_missing)


def test_refuse_says_what_is_missing_before_it_starts(material, live):
    config = cached(
        material, "too_long", live["float32"]["cache"], reference={"on_missing": "refuse"}, train_iters=STEPS + 2
    )
    assert "no scores of 16 samples" in refused(config)


def test_kd_has_nothing_to_cache(material, live):
    line = refused(cached(material, "kd", live["float32"]["cache"], objective={"name": "kd"}))
    assert "reference.source" in line and "kd" in line
