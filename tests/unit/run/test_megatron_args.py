"""Megatron's arguments from a configuration: names, types, defaults, refusals, and the numbers that follow."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import patches

patches.apply()

from remit_megatron.models.build import megatron_arguments, model_config  # noqa: E402
from remit_megatron.models.family import family_of  # noqa: E402
from remit_megatron.run.configuration import (  # noqa: E402
    CheckpointConfig,
    DataConfig,
    RunConfig,
    WandbConfig,
    load_model_description,
)
from remit_megatron.run.derived import (  # noqa: E402
    count_parameters,
    describe,
    layers_of_stage,
    parameters_on_rank,
    plan_numbers,
)
from remit_megatron.run.megatron_args import build_arguments, read_overrides  # noqa: E402
from remit_megatron.run.megatron_keys import ARCHITECTURE, DEFAULTS, OWNED, UNSUPPORTED  # noqa: E402
from remit_megatron.runtime.errors import UserError  # noqa: E402
from tests.families import CASES, hf_values  # noqa: E402

ROOT = Path(__file__).resolve().parents[3]
TINY: dict[str, Any] = {"base": "tiny_llama", "vocab_size": 301}
SMALLEST: dict[str, Any] = {"seq_length": 128, "train_iters": 10, "lr": 1e-3}


def run_config(**megatron: Any) -> RunConfig:
    data = DataConfig(train=[[1.0, "data/a"]], tokenizer="tok")
    return RunConfig(model=TINY, data=data, run_dir="runs/x", megatron=SMALLEST | megatron)


def arguments(world_size: int = 1, *, config: RunConfig | None = None, **megatron: Any) -> argparse.Namespace:
    config = config or run_config(**megatron)
    architecture = megatron_arguments(load_model_description(config.model))
    return build_arguments(config, architecture, world_size=world_size, rank=0, gpu=False)


def test_smallest_run_gives_a_namespace_that_megatron_takes():
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.global_vars import get_args, set_global_variables, unset_global_variables

    config = run_config()
    config.logging.tensorboard = False
    args = arguments(config=config)
    # One hook is Megatron's for the rest of the process: SIGTERM must stay what pytest made of it.
    args.exit_signal_handler = False
    set_global_variables(args, build_tokenizer=False)
    try:
        assert get_args() is args
        container = pretrain_cfg_container_from_args(args, model_config(load_model_description(TINY), args))
        assert container.checkpoint.save == "runs/x/checkpoints"
        assert container.optimizer.lr == 1e-3
    finally:
        unset_global_variables()


def test_defaults_on_a_cpu():
    args = arguments()
    assert args.calculate_per_token_loss is True
    assert args.transformer_impl == "local" and args.distributed_backend == "gloo"
    assert (args.bf16, args.fp16, args.use_distributed_optimizer) == (False, False, False)
    assert (args.attention_dropout, args.hidden_dropout) == (0.0, 0.0)
    fusions = (
        "masked_softmax_fusion bias_dropout_fusion bias_swiglu_fusion gradient_accumulation_fusion apply_rope_fusion"
    )
    assert not any(getattr(args, name) for name in fusions.split())
    assert args.ckpt_format == "torch_dist" and args.dist_ckpt_optim_fully_reshardable
    assert args.create_attention_mask_in_dataloader is False
    assert args.lr_decay_style == "cosine" and args.min_lr == 1e-7
    assert args.eval_iters == 0  # there is no validation data
    assert args.save == args.load == "runs/x/checkpoints" and args.pretrained_checkpoint is None
    assert args.exit_signal_handler and args.exit_signal.name == "SIGTERM"


def test_defaults_on_a_gpu_without_transformer_engine(monkeypatch):
    monkeypatch.setattr("remit_megatron.models.spec.transformer_engine_usable", lambda: False)
    config = run_config()
    architecture = megatron_arguments(load_model_description(TINY))
    args = build_arguments(config, architecture, world_size=2, rank=1, gpu=True)
    assert (args.bf16, args.use_distributed_optimizer, args.distributed_backend) == (True, True, "nccl")
    assert args.transformer_impl == "local" and not args.gradient_accumulation_fusion
    assert args.padded_vocab_size == 320  # 301 up to a multiple of 64
    config.megatron["fp16"] = True
    args = build_arguments(config, architecture, world_size=2, rank=1, gpu=True)
    assert (args.bf16, args.fp16) == (False, True)


def test_every_default_differs_from_megatron_or_is_documented():
    text = (ROOT / "docs/configuration.md").read_text()
    for key, default in DEFAULTS.items():
        assert f"| `{key}` | {default.shown} | {default.reason} |" in text, key
    for key, place in OWNED.items():
        assert f"| `{key}` | {place} |" in text, key
    for key, instead in UNSUPPORTED.items():
        assert f"| `{key}` | {instead} |" in text, key


def test_tables_name_arguments_that_megatron_has():
    from megatron.training.arguments import add_megatron_arguments

    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_megatron_arguments(parser)
    known = {action.dest for action in parser._actions}
    assert not (set(DEFAULTS) | set(OWNED) | set(UNSUPPORTED) | ARCHITECTURE) - known
    assert not set(OWNED) & set(DEFAULTS) and not set(OWNED) & set(UNSUPPORTED)


def test_spellings_of_the_command_line_are_taken():
    read = read_overrides({"tensor-model-parallel-size": 2, "--micro-batch-size": 4, "no-rope-fusion": True})
    assert read == {"tensor_model_parallel_size": 2, "micro_batch_size": 4, "apply_rope_fusion": False}
    assert read_overrides({"disable_bias_linear": False}) == {"add_bias_linear": True}
    assert read_overrides({"no_persist_layer_norm": True}) == {"no_persist_layer_norm": True}
    assert read_overrides({"fp8_format": "hybrid"}) == {"fp8": "hybrid"}


def test_values_are_converted_as_the_command_line_would():
    from megatron.core.transformer.enums import AttnBackend

    read = read_overrides(
        {"train_samples": 1e6, "clip_grad": 1, "attention_backend": "unfused", "recompute_modules": "core_attn"}
    )
    assert read["train_samples"] == 1_000_000 and isinstance(read["train_samples"], int)
    assert isinstance(read["clip_grad"], float)
    assert read["attention_backend"] is AttnBackend.unfused
    assert read["recompute_modules"] == ["core_attn"]
    assert read_overrides({"linear_attention_freq": [0, 1]}) == {"linear_attention_freq": [0, 1]}
    assert read_overrides({"eval_global_batch_size": None}) == {"eval_global_batch_size": None}


WRONG: dict[str, tuple[dict[str, Any], int, str]] = {
    "unknown key": (
        {"tensor_model_paralel_size": 2},
        1,
        "megatron.tensor_model_paralel_size: found 2; "
        "expected an argument of Megatron; did you mean tensor_model_parallel_size?",
    ),
    "two names of one": (
        {"layernorm_epsilon": 1e-5, "norm-epsilon": 1e-5},
        1,
        "megatron.norm-epsilon: found both layernorm_epsilon and norm-epsilon; "
        "expected one of the two names of one argument",
    ),
    "type": ({"lr": "fast"}, 1, "megatron.lr: found 'fast'; expected a number"),
    "no interval of validation": (
        {"eval_interval": None},
        1,
        "megatron.eval_interval: found nothing; expected a number of steps",
    ),
    "no interval of saves": (
        {"save_interval": None},
        1,
        "megatron.save_interval: found nothing; expected a number of steps",
    ),
    "fraction of a step": ({"train_iters": 1.5}, 1, "megatron.train_iters: found 1.5; expected a whole number"),
    "beyond 64 bits": ({"train_iters": 1e308}, 1, "megatron.train_iters: found 1e+308; expected a number of 64 bits"),
    "flag": ({"bias_swiglu_fusion": 1}, 1, "megatron.bias_swiglu_fusion: found 1; expected true or false"),
    "choice": (
        {"lr_decay_style": "cosin"},
        1,
        "megatron.lr_decay_style: found 'cosin'; "
        "expected one of constant, linear, cosine, inverse-square-root, WSD; did you mean cosine?",
    ),
    "ours": (
        {"save": "x"},
        1,
        "megatron.save: found 'x'; expected no such key here, set run_dir (checkpoints go to run_dir/checkpoints)",
    ),
    "always on": (
        {"calculate_per_token_loss": False},
        1,
        "megatron.calculate_per_token_loss: found False; "
        "expected no such key: it is always on, because losses are averaged over tokens",
    ),
    "unsupported": (
        {"perform_rl_step": True},
        1,
        "megatron.perform_rl_step: found True; "
        "expected a post-trained model as reference (post-training is not in this version) instead",
    ),
    "contradiction": ({"num_layers": 5}, 1, "megatron.num_layers: found 5; expected 4, which the model has"),
    "not in the model": (
        {"num_experts": 4},
        1,
        "megatron.num_experts: found 4; expected no such key here: the model's description decides",
    ),
    "no length": (
        {"train_iters": None},
        1,
        "megatron.train_iters: found nothing; expected the number of steps, or megatron.train_samples",
    ),
    "two lengths": (
        {"train_samples": 5},
        1,
        "megatron.train_samples: found 5; expected nothing, because megatron.train_iters is set",
    ),
    "no learning rate": ({"lr": None}, 1, "megatron.lr: found nothing; expected the peak learning rate"),
    "zero": ({"micro_batch_size": 0}, 1, "megatron.micro_batch_size: found 0; expected more than 0"),
    "batch": (
        {"global_batch_size": 6, "micro_batch_size": 2},
        2,
        "megatron.global_batch_size: found 6; expected a multiple of 4 (micro_batch_size 2 x 2 data-parallel ranks)",
    ),
    "world": (
        {"tensor_model_parallel_size": 2},
        3,
        "megatron: parallel sizes: found tensor 2 x pipeline 1 x context 1 = 2; "
        "expected a product that divides the 3 processes of the run",
    ),
    "heads": (
        {"tensor_model_parallel_size": 8},
        8,
        "megatron.tensor_model_parallel_size: found 8; expected a divisor of the model's 4 attention heads",
    ),
    "groups": (
        {"tensor_model_parallel_size": 4},
        4,
        "megatron.tensor_model_parallel_size: found 4; "
        "expected a divisor of the model's 2 query groups (key-value heads)",
    ),
    "layers": (
        {"pipeline_model_parallel_size": 3},
        3,
        "megatron.pipeline_model_parallel_size: found 3; expected a divisor of the model's 4 layers",
    ),
    "virtual stages": (
        {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 3},
        2,
        "megatron.num_layers_per_virtual_pipeline_stage: found 3; "
        "expected a divisor of the 2 layers of a pipeline stage",
    ),
    "length": (
        {"seq_length": 1024},
        1,
        "megatron.seq_length: found 1024; expected at most 512, the model's max_position_embeddings",
    ),
    "context": (
        {"seq_length": 130, "context_parallel_size": 2},
        2,
        "megatron.seq_length: found 130; expected a multiple of 4, twice the context_parallel_size",
    ),
    "sequence parallel alone": (
        {"sequence_parallel": True},
        1,
        "megatron.sequence_parallel: found true with tensor_model_parallel_size 1; "
        "expected false, or a tensor_model_parallel_size above 1",
    ),
    "warm-up": (
        {"lr_warmup_iters": 10},
        1,
        "megatron.lr_warmup_iters: found 10; expected less than 10, the end of decay",
    ),
    "learning rates": ({"min_lr": 1.0}, 1, "megatron.min_lr: found 1.0; expected at most lr, 0.001"),
    "no Transformer Engine": (
        {"transformer_impl": "transformer_engine"},
        1,
        "megatron.transformer_impl: found transformer_engine; expected local: Transformer Engine is not installed",
    ),
    "fp8": ({"fp8": "e4m3"}, 1, "megatron.fp8: found 'e4m3'; expected null: it needs Transformer Engine"),
    # Refused by Megatron itself, in its own words.
    "Megatron's message": (
        {"overlap_param_gather": True},
        1,
        "megatron.overlap_param_gather: found True; expected what Megatron checks: --overlap-param-gather only "
        "supported with distributed optimizer, megatron fsdp, or dist_muon",
    ),
    "Megatron's condition": (
        {"weight_decay_incr_style": "linear"},
        1,
        "megatron.start_weight_decay: found nothing; expected what Megatron checks: start_weight_decay to be set",
    ),
    "Megatron's model configuration": (
        {"recompute_granularity": "full", "recompute_method": "uniform"},
        1,
        "megatron.recompute_granularity: found 'full'; expected what Megatron checks: When using "
        "recompute_granularity: full recompute_num_layers must be between 1 and num_layers_per_pipeline_rank: 4",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_say_what_is_wrong_in_one_line(name):
    megatron, world_size, expected = WRONG[name]
    with pytest.raises(UserError) as caught:
        arguments(world_size, **megatron)
    assert str(caught.value) == expected


def test_an_architecture_key_with_the_models_value_is_no_contradiction():
    assert arguments(num_layers=4, **{"norm-epsilon": 1e-5}).num_layers == 4


def test_training_choices_may_differ_from_the_model():
    assert arguments(hidden_dropout=0.1, init_method_std=0.5).init_method_std == 0.5


def test_vocabulary_is_padded_for_tensor_parallelism_only_as_far_as_needed():
    assert arguments(2, tensor_model_parallel_size=2).padded_vocab_size == 302
    assert arguments(2, tensor_model_parallel_size=2, make_vocab_size_divisible_by=64).padded_vocab_size == 384


def test_the_configuration_owns_paths_seeds_and_loaders():
    config = run_config(eval_iters=3)
    config.seed, config.data.num_workers, config.data.cache_dir = 7, 0, "elsewhere"
    config.data.valid, config.data.mask_eod_loss, config.logging.interval = [[1.0, "data/v"]], True, 5
    config.checkpoint = CheckpointConfig(resume="never")
    args = arguments(config=config)
    assert (args.seed, args.num_workers, args.data_cache_path) == (7, 0, "elsewhere")
    assert (args.eval_iters, args.eod_mask_loss, args.log_interval) == (3, True, 5)
    assert args.load is None and args.tensorboard_dir == "runs/x/tensorboard"


def test_wandb_is_off_where_it_is_not_wanted_or_not_there(monkeypatch, caplog):
    monkeypatch.setenv("WANDB_MODE", "offline")  # build_arguments would set it for the whole process
    monkeypatch.setattr("remit_megatron.run.megatron_args._installed", lambda module: module == "wandb")
    config = run_config()
    config.logging.wandb = WandbConfig(project="p")
    args = arguments(config=config)
    assert (args.wandb_project, args.wandb_exp_name, args.wandb_save_dir) == ("p", "x", "runs/x/wandb")
    config.logging.wandb.mode = "disabled"
    assert arguments(config=config).wandb_project is None
    config.logging.wandb.mode = "offline"
    monkeypatch.setattr("remit_megatron.run.megatron_args._installed", lambda module: False)
    with caplog.at_level(logging.WARNING):
        assert arguments(config=config).wandb_project is None
    assert "wandb is not installed" in caplog.text


def test_our_command_line_is_neither_read_nor_changed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["remit", "train", "x.yaml", "--nproc", "2"])
    arguments()
    assert sys.argv[1:] == ["train", "x.yaml", "--nproc", "2"]
    assert capsys.readouterr().out == ""


def test_asynchronous_saves_are_written_by_a_thread():
    """Megatron would switch them off where no process of its own writes, and start one where it does."""
    args = arguments(async_save=True)
    assert args.async_save and args.async_strategy == "mcore" and not args.use_persistent_ckpt_worker
    assert not arguments().async_save
    for key, value in (("async_strategy", "nvrx"), ("use_persistent_ckpt_worker", True), ("async_ckpt_io_priority", 2)):
        with pytest.raises(UserError, match="a thread of each rank writes"):
            arguments(**{key: value})


def test_two_calls_do_not_share_lists():
    first = arguments()
    first.iterations_to_skip.append(3)
    first.high_priority_stream_groups.append("dp_cp")
    second = arguments()
    assert second.iterations_to_skip == [] and second.high_priority_stream_groups == []


# Published sizes: Hugging Face's count of each model's parameters.
@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("smollm2_135m", 134_515_008),
        ("smollm2_360m", 361_821_120),
        ("smollm2_1b", 1_711_376_384),
        ("llama3_1b", 1_235_814_400),
        ("olmo2_1b", 1_484_916_736),
        ("smollm3_3b", 3_075_098_624),
    ],
)
def test_parameters_are_counted_exactly(model, parameters):
    import transformers

    config = run_config()
    config.model = model
    values = load_model_description(model)
    unlisted = family_of(values).unlisted_parameters(values)
    assert count_parameters(arguments(config=config), unlisted=unlisted) == parameters
    with torch.device("meta"):
        built = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**values))
    assert sum(parameter.numel() for parameter in built.parameters()) == parameters


def test_parameters_of_latent_attention():
    # Youtu-LLM-2B: 1,961,560,064 parameters in Hugging Face's count.
    sizes = dict(num_layers=32, hidden_size=2048, ffn_hidden_size=6144, num_attention_heads=16, vocab_size=128256)
    latent = dict(q_lora_rank=1536, kv_lora_rank=512, qk_head_dim=128, qk_pos_emb_head_dim=64, v_head_dim=128)
    changed = {**vars(arguments()), **sizes, **latent, "multi_latent_attention": True, "qk_layernorm": True}
    assert count_parameters(argparse.Namespace(**changed)) == 1_961_560_064


@pytest.mark.parametrize("untied", [False, True])
def test_parameters_on_a_rank_equal_those_of_the_model_that_is_built(untied):
    from remit_megatron.conversion.processes import process_groups
    from remit_megatron.models.build import build_chunks

    config = run_config(make_vocab_size_divisible_by=64)
    config.model = TINY | {"tie_word_embeddings": not untied}
    args = arguments(config=config)
    with process_groups(alone=True) as groups:
        (model,) = build_chunks(model_config(load_model_description(config.model), args), groups)
        built = sum(parameter.numel() for parameter in model.parameters())
    assert parameters_on_rank(args, 0) == built
    assert count_parameters(args) == built - (320 - 301) * 128 * (2 if untied else 1)


@pytest.mark.parametrize("case", CASES)
def test_parameters_of_every_family_equal_those_of_the_model_that_is_built(case):
    from remit_megatron.conversion.processes import process_groups
    from remit_megatron.models.build import build_chunks

    config = run_config(make_vocab_size_divisible_by=8)
    config.model = hf_values(case)
    args, unlisted = arguments(config=config), family_of(config.model).unlisted_parameters(config.model)
    with process_groups(alone=True) as groups, torch.device("meta"):
        (model,) = build_chunks(model_config(config.model, args), groups)
        built = sum(parameter.numel() for parameter in model.parameters())
    assert parameters_on_rank(args, 0, unlisted=unlisted) == built
    padding = (args.padded_vocab_size - args.vocab_size) * args.hidden_size
    tables = 2 if args.untie_embeddings_and_output_weights else 1
    assert count_parameters(args, unlisted=unlisted) == built - tables * padding


def test_parameters_over_stages_and_shards_add_up():
    whole = arguments()
    split = arguments(4, tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    table, norms = 302 * 128, 4 * 2 * 128
    ranks = [parameters_on_rank(split, stage) for stage in (0, 1)]
    # Twice each shard, less what both tensor-parallel ranks hold, the last stage's copy of the table, and a padded row.
    assert 2 * sum(ranks) - norms - 128 - table - 128 == count_parameters(whole)


@pytest.mark.parametrize(
    ("megatron", "layers"),
    [
        ({}, [2, 2]),
        ({"decoder_first_pipeline_num_layers": 1}, [1, 3]),
        ({"decoder_last_pipeline_num_layers": 1}, [3, 1]),
        ({"pipeline_model_parallel_layout": "Et|tttL"}, [1, 3]),
    ],
)
def test_layers_of_a_stage(megatron, layers):
    args = arguments(2, pipeline_model_parallel_size=2, **megatron)
    assert [layers_of_stage(args, stage) for stage in (0, 1)] == layers


def test_numbers_of_a_plan():
    plan = plan_numbers(
        arguments(4, tensor_model_parallel_size=2, micro_batch_size=2, global_batch_size=12, lr_warmup_iters=4)
    )
    assert (plan.data_parallel, plan.microbatches, plan.samples_per_step) == (2, 3, 12)
    assert (plan.tokens_per_step, plan.steps, plan.total_tokens) == (12 * 128, 10, 10 * 12 * 128)
    assert (plan.warmup_steps, plan.first_learning_rate) == (4, 0.0)
    # Cosine from 1e-3 to 1e-7 over steps 4 to 10; the last step, the tenth, is taken at 9.
    assert plan.last_learning_rate == pytest.approx(1e-7 + 0.5 * (1e-3 - 1e-7) * (1 + -0.8660254037844386), rel=1e-9)


def test_length_in_samples_drops_what_does_not_fill_a_batch():
    plan = plan_numbers(arguments(train_iters=None, train_samples=103, global_batch_size=10))
    assert (plan.steps, plan.total_tokens) == (10, 100 * 128)


def test_length_with_a_growing_batch():
    # In tokens: 2 samples of 128 until 1,024 tokens, then 4.
    plan = plan_numbers(arguments(step_batch_size_schedule="0:2 1024:4"))
    assert (plan.samples_per_step, plan.steps, plan.total_tokens) == (2, 10, (4 * 2 + 6 * 4) * 128)


def test_describe_is_an_aligned_table():
    config = run_config(tensor_model_parallel_size=2)
    lines = describe(config, arguments(2, config=config)).splitlines()
    start = lines[0].index("remit")
    assert all(line[start - 1] == " " and line[start] != " " for line in lines)
    assert "ranks                  2 = tensor 2 x pipeline 1 x context 1 x data 1" in lines
    assert "vocabulary             301, padded to 302" in lines
    assert f"tokens in all          {10 * 128:,} (1.28K)" in lines


def test_plan_numbers_hold_only_plain_values():
    assert all(
        isinstance(value, int | float | tuple) for value in dataclasses.asdict(plan_numbers(arguments())).values()
    )
