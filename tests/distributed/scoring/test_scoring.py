"""``remit score``: the same scores on every layout, never twice, stopped and resumed, by several jobs at once."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from remit_megatron.reference.cache import ReferenceCache
from remit_megatron.runtime.errors import EXIT_DONE, EXIT_START_ME_AGAIN
from tests.distributed.training.test_training import LAYOUTS, REMIT, STEPS, configuration, train
from tests.distributed.training.test_training import material as material  # a fixture

SAMPLES = STEPS * 8


def scoring(material, name: str, **megatron: Any) -> dict[str, Any]:
    """A configuration whose cache is its own."""
    config = configuration(material, material["root"] / name, REMIT, **megatron)
    cache = str(material["root"] / f"{name}_cache")
    config["reference"] |= {"source": "cache", "cache_dir": cache, "dtype": "float32", "on_missing": "refuse"}
    return config


def write(config: dict[str, Any]) -> str:
    path = Path(f"{config['run_dir']}.yaml")
    path.write_text(json.dumps(config))
    return str(path)


def score_rank(path: str, **options: Any) -> int:
    """One rank of ``remit score``."""
    import patches

    patches.apply()
    from remit_megatron.run.configuration import load_config
    from remit_megatron.scoring.command import score

    return score(load_config(path), **options)


def said(path: str, **options: Any) -> str:
    """What one rank of ``remit score`` writes to the terminal; it must have been done."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        assert score_rank(path, **options) == EXIT_DONE
    return text.getvalue()


def scores_of(config: dict[str, Any]) -> dict[int, np.ndarray]:
    """All scores of a cache with one data set."""
    cache = ReferenceCache.open(config["reference"]["cache_dir"])
    (dataset,) = cache.datasets()
    found = {int(sample): cache.read_scores(dataset, sample) for sample in cache.completeness(dataset).nonzero()[0]}
    assert all(scores is not None for scores in found.values())
    return found  # type: ignore[return-value]


@pytest.fixture(scope="module")
def single(pool, material) -> dict[int, np.ndarray]:
    """Scores of the run's samples from one rank."""
    config = scoring(material, "score_one")
    assert pool.run(score_rank, world_size=1, path=write(config)) == [EXIT_DONE]
    return scores_of(config)


def test_a_run_reads_what_was_scored(pool, material, single):
    """Live, and cached from the scoring job: the same losses, weights and gradients."""
    assert len(single) == SAMPLES
    live = train(pool, configuration(material, material["root"] / "score_live", REMIT), world_size=1)
    cached = train(pool, scoring(material, "score_one"), world_size=1)
    for one, other in zip(live, cached, strict=True):
        for name in ("lm_loss", "objective_loss", "grad_norm", "weight_std", "delta_mean"):
            assert one[name] == pytest.approx(other[name], rel=1e-6, abs=1e-7), name


@pytest.mark.parametrize("layout", ["dp3", "tp2_pp2", "cp2", "pp2_virtual2", "micro_batch4"])
def test_every_layout_scores_alike(pool, material, single, layout):
    world_size, megatron = LAYOUTS.get(layout, (3 if layout == "dp3" else 1, {}))
    config = scoring(material, f"score_{layout}", **megatron)
    if layout == "micro_batch4":
        config["reference"]["micro_batch_size"] = 4
    assert pool.run(score_rank, world_size=world_size, path=write(config)) == [EXIT_DONE] * world_size
    found = scores_of(config)
    assert found.keys() == single.keys()
    for sample, scores in single.items():
        np.testing.assert_allclose(found[sample], scores, atol=2e-5)


def test_whole_data_sets_and_a_second_visit(pool, material):
    config = scoring(material, "score_all")
    path = write(config)
    (text,) = pool.run(said, world_size=1, path=path)
    assert f"scored {SAMPLES} samples; {SAMPLES} of {SAMPLES}" in text
    text, _ = pool.run(said, world_size=2, path=path, whole=True)
    found = scores_of(config)
    assert len(found) > SAMPLES
    assert f"scored {len(found) - SAMPLES} samples; {len(found)} of {len(found)}" in text, "none is scored twice"
    (text,) = pool.run(said, world_size=1, path=path, verify=8)
    difference = re.search(r"verified 8 samples: mean .difference. (\S+) nats", text)
    assert difference is not None and float(difference[1]) < 1e-5


def test_damage_is_found_and_repaired(pool, material, single):
    config = scoring(material, "score_damaged")
    path = write(config)
    pool.run(said, world_size=1, path=path)
    (shard,) = Path(config["reference"]["cache_dir"]).glob("*/*.scores")
    content = bytearray(shard.read_bytes())
    place = content.rindex(single[min(single)].tobytes())
    content[place + 9] ^= 4
    shard.write_bytes(content)
    (text,) = pool.run(said, world_size=1, path=path)
    assert "scored 0 samples" in text, "the map says that all is there"
    text, _ = pool.run(said, world_size=2, path=path, check=True)
    assert "1 damaged scores" in text and "scored 1 samples" in text
    np.testing.assert_allclose(scores_of(config)[min(single)], single[min(single)], atol=2e-5)
    (text,) = pool.run(said, world_size=1, path=path, check=True)
    assert "no damage" in text
    # The same damage where a job that is gone was at work: found without being asked for.
    shard.write_bytes(content)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (dataset,) = ReferenceCache.open(config["reference"]["cache_dir"]).datasets()
    lease = Path(config["reference"]["cache_dir"]) / "leases" / f"{dataset[:16]}.0"
    lease.write_text(json.dumps({"host": socket.gethostname(), "process": gone.pid}))
    (text,) = pool.run(said, world_size=1, path=path)
    assert "scored 1 samples" in text and not lease.exists()
    assert scores_of(config).keys() == single.keys()


def test_verify_finds_another_models_scores(pool, material, single):
    from remit_megatron.data.blend import open_blend
    from tests.distributed.pool import RankFailure

    config = scoring(material, "score_wrong")
    path = write(config)
    assert pool.run(score_rank, world_size=1, path=path) == [EXIT_DONE]
    cache = ReferenceCache.open(config["reference"]["cache_dir"])
    (dataset,) = cache.datasets()
    blend = open_blend([(1.0, str(material["corpus"]))], sequence_length=64, num_samples=1, seed=1)
    generator = np.random.default_rng(1)
    for sample in single:
        noise = generator.normal(scale=0.1, size=64).astype(np.float32)
        cache.write(dataset, sample, blend.datasets[0][sample], single[sample] + noise)
    cache.close()
    with pytest.raises(RankFailure, match="not this reference's"):
        pool.run(score_rank, world_size=1, path=path, verify=8)
    for sample in single:  # finite or not is a difference, too
        cache.write(dataset, sample, blend.datasets[0][sample], np.where(np.arange(64) == 7, np.nan, single[sample]))
    cache.close()
    with pytest.raises(RankFailure, match="8 tokens finite on one side only"):
        pool.run(score_rank, world_size=2, path=path, verify=8)


def test_keys_of_training_do_not_matter(material):
    """What would be refused in a scoring job, or by Megatron beside what a scoring job sets."""
    from remit_megatron.run.configuration import load_config
    from remit_megatron.scoring.command import prepare_scoring

    training = {
        "fp8": "hybrid",
        "fp8_recipe": "tensorwise",
        "fp8_param_gather": True,
        "first_last_layers_bf16": True,
        "use_distributed_optimizer": True,
        "use_precision_aware_optimizer": True,
        "start_weight_decay": 0.1,
        "end_weight_decay": 0.2,
        "weight_decay_incr_style": "linear",
        "overlap_grad_reduce": True,
        "recompute_granularity": "full",
    }
    prepared = prepare_scoring(load_config(write(scoring(material, "score_keys", **training))), world_size=1)
    assert prepared.arguments.fp8 is None and not prepared.arguments.use_distributed_optimizer


def test_another_cache_than_the_followed_run_reads_is_refused(pool, material):
    from tests.distributed.pool import RankFailure

    config = scoring(material, "score_other")
    run_dir = Path(config["run_dir"])
    run_dir.mkdir(parents=True)
    followed = config | {"reference": config["reference"] | {"cache_dir": str(material["root"] / "another")}}
    (run_dir / "config.yaml").write_text(json.dumps(followed))
    with pytest.raises(
        RankFailure, match=r"--follow: reference.cache_dir: found .*another; expected .*score_other_cache"
    ):
        pool.run(score_rank, world_size=1, path=write(config), follow=str(run_dir))


def start(path: str, *options: str) -> subprocess.Popen:
    """``remit score`` in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "remit_megatron", "score", path, *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def scored(job: subprocess.Popen) -> tuple[int, int]:
    """Samples that a job says it scored, and its exit code."""
    out, errors = job.communicate(timeout=600)
    found = re.search(r"scored (\d+) samples", out)
    assert found is not None, out + errors
    return int(found[1]), job.returncode


def wait_for_scores(config: dict[str, Any], count: int, job: subprocess.Popen) -> None:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and job.poll() is None:
        manifest = Path(config["reference"]["cache_dir"]) / "manifest.json"
        if manifest.exists():
            cache = ReferenceCache.open(manifest.parent)
            if sum(int(cache.completeness(dataset).sum()) for dataset in cache.datasets()) >= count:
                return
        time.sleep(0.05)
    raise AssertionError(f"no {count} scores: {job.communicate()}")


@pytest.mark.timeout(1500)  # five starts of a program that imports for seconds, on whatever else the machine does
@pytest.mark.slow
def test_stopped_killed_resumed_and_shared(material, single):
    """SIGTERM gives 75; after SIGKILL, and with a second job at the same time, every sample is scored once."""
    config = scoring(material, "score_shared")
    config["data"]["num_workers"] = 0
    path = write(config)
    first = start(path, "--all")
    wait_for_scores(config, 8, first)
    first.send_signal(signal.SIGTERM)
    count, code = scored(first)
    assert code == EXIT_START_ME_AGAIN
    killed = start(path, "--all")
    wait_for_scores(config, count + 8, killed)
    killed.kill()
    killed.communicate()
    before = len(scores_of(config))
    jobs = [start(path, "--all"), start(path, "--all")]
    results = [scored(job) for job in jobs]
    assert [code for _, code in results] == [EXIT_DONE] * 2
    found = scores_of(config)
    assert before + sum(count for count, _ in results) == len(found), "none twice"
    for sample, scores in single.items():
        np.testing.assert_allclose(found[sample], scores, atol=2e-5)


@pytest.mark.timeout(1500)
def test_a_run_waits_for_the_job_that_scores_ahead_of_it(material, single):
    """The trainer starts on an empty cache; a job that follows it fills what it needs, in its order."""
    config = scoring(material, "score_follow")
    config["reference"] |= {"on_missing": "wait"}
    path = write(config)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "remit_megatron", "train", path]
    trainer = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        deadline = time.monotonic() + 600
        log = Path(config["run_dir"]) / "logs" / "rank_0.log"
        while not (log.exists() and "waiting for the scores of 4 of 4 microbatches" in log.read_text()):
            assert trainer.poll() is None and time.monotonic() < deadline, trainer.communicate()
            time.sleep(0.1)
        count, code = scored(start(path, "--follow", config["run_dir"]))
        assert (count, code) == (SAMPLES, EXIT_DONE)
        _, errors = trainer.communicate(timeout=600)
    finally:
        trainer.kill()
    assert trainer.returncode == EXIT_DONE, errors
    assert "waiting for the scores" in errors and "the scores are there" in errors
    assert len((Path(config["run_dir"]) / "metrics.jsonl").read_text().splitlines()) == STEPS
    assert scores_of(config).keys() == single.keys()
