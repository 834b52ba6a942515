"""Every argument of Megatron with a value is honored, without effect or refused; what no run can have is refused."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

import patches

patches.apply()

from remit_megatron.run.checks import check_supported  # noqa: E402
from remit_megatron.run.megatron_keys import ARCHITECTURE, DEFAULTS, OWNED, UNSUPPORTED  # noqa: E402
from remit_megatron.run.megatron_values import HONORED_VALUES, INERT_VALUES, REFUSED_VALUES  # noqa: E402
from remit_megatron.runtime.errors import UserError  # noqa: E402
from tests.unit.run.test_megatron_args import arguments, run_config  # noqa: E402

ROOT = Path(__file__).resolve().parents[3]
NOT_HONORED = [*(known for names in INERT_VALUES.values() for known in names), *REFUSED_VALUES]


def test_every_argument_with_a_value_is_in_one_table():
    """One that a newer Megatron brings is accepted, and perhaps not done: it must be looked at."""
    from remit_megatron.run.megatron_args import _FLAGS, _known_arguments

    actions, _ = _known_arguments()
    elsewhere = ARCHITECTURE | OWNED.keys() | UNSUPPORTED.keys() | DEFAULTS.keys() | {"help"}
    names = {name for name, action in actions.items() if not isinstance(action, _FLAGS)} - elsewhere

    def covering(name: str) -> list[str]:
        return [known for known in NOT_HONORED if name == known or (known[-1] == "_" and name.startswith(known))]

    assert {name for name in names if (name in HONORED_VALUES) + len(covering(name)) != 1} == set()
    assert HONORED_VALUES - names == set()
    assert {known for known in NOT_HONORED if not any(known in covering(name) for name in names)} == set()


def test_the_documentation_has_the_tables():
    text = (ROOT / "docs/configuration.md").read_text()

    def shown(name: str) -> str:
        return f"`{name}*`" if name[-1] == "_" else f"`{name}`"

    for name, expected in REFUSED_VALUES.items():
        assert f"| {shown(name)} | {expected} |" in text, name
    for reason, names in INERT_VALUES.items():
        assert f"| {reason} | {', '.join(map(shown, sorted(names)))} |" in text, reason


@pytest.mark.parametrize(
    ("megatron", "line"),
    [
        # Silent before: accepted, and not done.
        ({"moe_aux_loss_coeff": 0.1}, "megatron.moe_aux_loss_coeff: found 0.1; expected no such key: it has no effect"),
        ({"rl_generation_lag": 3}, "megatron.rl_generation_lag: found 3; expected no such key: it has no effect"),
        ({"fim_rate": 0.9}, "megatron.fim_rate: found 0.9; expected no such key: it has no effect, the data are read"),
        ({"decoder_seq_length": 64}, "megatron.decoder_seq_length: found 64; expected no such key"),
        ({"flight_recorder_dump_path": "x"}, "megatron.flight_recorder_dump_path: found 'x'; expected no such key"),
        ({"rotary_seq_len_interpolation_factor": 2}, "megatron.rotary_seq_len_interpolation_factor: found 2; expected"),
        ({"experimental_attention_variant": "dsa"}, "megatron.experimental_attention_variant: found 'dsa'"),
        ({"ckpt_step": 2}, "megatron.ckpt_step: found 2; expected nothing: a run goes on from its newest checkpoint"),
        ({"iterations_to_skip": [11]}, "megatron.iterations_to_skip: found 11; expected steps from 1 to before"),
        # Another model than the one that is exported.
        ({"activation_func_clamp_value": 1.0}, "megatron.activation_func_clamp_value: found 1.0; expected no such key"),
        ({"glu_linear_offset": 1.0}, "megatron.glu_linear_offset: found 1.0; expected no such key here: the model's"),
        # The dry run passed, and the run died.
        ({"attention_dropout": -1.0}, "megatron.attention_dropout: found -1.0; expected a share from 0"),
        ({"hidden_dropout": 2.0}, "megatron.hidden_dropout: found 2.0; expected a share from 0 to below 1"),
        ({"attention_backend": "local"}, "megatron.attention_backend: found local; expected auto"),
        ({"eval_micro_batch_size": 0}, "megatron.eval_micro_batch_size: found 0; expected 1 or more"),
        ({"eval_global_batch_size": -1}, "megatron.eval_global_batch_size: found -1; expected 1 or more"),
        ({"eval_iters": -1}, "megatron.eval_iters: found -1; expected 0 or more"),
        ({"expert_model_parallel_size": 0}, "megatron.expert_model_parallel_size: found 0; expected no such key"),
        ({"init_method_std": -1.0}, "megatron.init_method_std: found -1.0; expected 0 or more"),
        ({"init_method_xavier_uniform": True}, "megatron.init_method_xavier_uniform: found True; expected false"),
        ({"ddp_average_in_collective": True}, "megatron.ddp_average_in_collective: found True; expected false"),
        ({"config_logger_dir": "x"}, "megatron.config_logger_dir: found 'x'; expected nothing"),
        ({"gpu_sniff_test_interval": 1}, "megatron.gpu_sniff_test_interval: found 1; expected no such setting without"),
        ({"cuda_graph_impl": "local"}, "megatron.cuda_graph_impl: found 'local'; expected no such setting without a"),
        ({"cpu_offloading_num_layers": 1}, "megatron.cpu_offloading_num_layers: found 1; expected no such setting"),
        ({"fault_injector_num_ranks": 1}, "megatron.fault_injector_num_ranks: found 1; expected nothing"),
        ({"log_memory_interval": 0}, "megatron.log_memory_interval: found 0; expected 1 or more"),
        ({"tensorboard_log_interval": 0}, "megatron.tensorboard_log_interval: found 0; expected 1 or more"),
        (
            {"check_weight_hash_across_dp_replicas_interval": 0},
            "megatron.check_weight_hash_across_dp_replicas_interval",
        ),
        ({"distributed_timeout_minutes": -1}, "megatron.distributed_timeout_minutes: found -1; expected 1 or more"),
        ({"exit_signal": "SIGKILL"}, "megatron.exit_signal: found SIGKILL; expected a signal that asks a process"),
        ({"phase_transition_iterations": "1"}, "megatron.phase_transition_iterations: found '1'; expected"),
        ({"rerun_mode": "report_stats"}, "megatron.rerun_mode: found report_stats; expected disabled or"),
        ({"sharp_enabled_group": "dp"}, "megatron.sharp_enabled_group: found dp; expected nothing without use_sharp"),
        ({"pipeline_model_parallel_layout": ""}, "megatron.pipeline_model_parallel_layout: found ''; expected a text"),
        ({"validation_set_names": ["a"]}, "megatron.validation_set_names: found ['a']; expected one blend"),
        ({"manual_gc": True, "manual_gc_interval": -1}, "megatron.manual_gc_interval: found -1; expected 0 or more"),
        ({"profile": True}, "megatron.use_pytorch_profiler: found false; expected true with megatron.profile"),
        ({"ckpt_format": "torch"}, "megatron.ckpt_format: found torch; expected torch_dist"),
        ({"dist_ckpt_strictness": "return_all"}, "megatron.dist_ckpt_strictness: found return_all; expected one that"),
        ({"cp_comm_type": ["ring"]}, "megatron.cp_comm_type: found ['ring']; expected p2p, all_gather, a2a or a2a+p2p"),
        (
            {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 0},
            "megatron.recompute_num_layers: found 0; expected 1 or more",  # it went round and round
        ),
        (
            {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]},
            "megatron.recompute_modules: found layernorm; expected core_attn or mlp without Transformer Engine",
        ),
        (
            {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
            "megatron.recompute_modules: found ['moe']; expected modules of the model",
        ),
        (
            {"hierarchical_context_parallel_sizes": [1]},
            "megatron.hierarchical_context_parallel_sizes: found [1]; expected nothing: it needs the package einops",
        ),
        ({"result_rejected_tracker_filename": "/"}, "megatron.result_rejected_tracker_filename: found /; expected a"),
    ],
)
def test_refused_before_the_start(megatron, line):
    with pytest.raises(UserError) as caught:
        check_supported(run_config(**megatron), arguments(**megatron))
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "megatron",
    [
        {"moe_router_topk": 2, "rl_default_temperature": 1.0, "dino_local_img_size": 96},  # Megatron's own values
        {"attention_dropout": 0.5, "hidden_dropout": 0.1},
        {"exit_interval": 0, "exit_duration_in_mins": 0, "eval_iters": 0, "manual_gc_interval": 0},
        {"iterations_to_skip": [1, 9]},
        {"exit_signal": "SIGUSR1", "attention_backend": "auto", "cuda_graph_impl": "none"},
        {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
        {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
        {"profile": True, "use_pytorch_profiler": True},
        {"save_params_interval": 1, "dist_ckpt_strictness": "log_all"},
        {"overlap_p2p_comm": True},  # Megatron's own value, which it switches off where there are no virtual stages
    ],
)
def test_accepted(megatron):
    check_supported(run_config(**megatron), arguments(**megatron))


def test_what_megatron_makes_of_a_setting_is_said():
    """With a loss scale that finds itself it switches the check off without a word."""
    with pytest.raises(UserError, match="check_for_nan_in_loss_and_grad: found True; expected False, which Megatron"):
        arguments(fp16=True, check_for_nan_in_loss_and_grad=True)
    arguments(fp16=True, loss_scale=1.0, check_for_nan_in_loss_and_grad=True)


def test_a_trace_of_the_profiler_has_a_place():
    config = run_config(profile=True, use_pytorch_profiler=True)
    config.logging.tensorboard = False
    with pytest.raises(UserError, match=r"logging\.tensorboard: found false; expected true"):
        check_supported(config, arguments(config=config))


def test_signals_that_end_a_process_may_end_a_run():
    assert arguments(exit_signal="SIGUSR2").exit_signal == signal.SIGUSR2
