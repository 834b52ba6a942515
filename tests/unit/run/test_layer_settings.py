"""Settings that a model's layers read, in one family and with one kind of layers, are refused in the others."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

import patches

patches.apply()

from megatron.core.transformer.enums import AttnBackend  # noqa: E402

from remit_megatron.models.build import default_arguments, megatron_arguments, model_config  # noqa: E402
from remit_megatron.models.family import families, family_of  # noqa: E402
from remit_megatron.models.fp8 import frozen_arguments  # noqa: E402
from remit_megatron.run import checks  # noqa: E402
from remit_megatron.run.checks import check_layers, check_supported  # noqa: E402
from remit_megatron.run.configuration import ReferenceConfig, load_model_description  # noqa: E402
from remit_megatron.run.dry_run import dry_run  # noqa: E402
from remit_megatron.run.megatron_args import build_arguments  # noqa: E402
from remit_megatron.run.megatron_flags import NEEDS  # noqa: E402
from remit_megatron.run.prepare import examine  # noqa: E402
from remit_megatron.runtime.errors import UserError  # noqa: E402
from tests.families import CASES, hf_values  # noqa: E402
from tests.tiny import make_llama, make_tokenizer  # noqa: E402
from tests.unit.run.test_megatron_args import TINY, arguments, run_config  # noqa: E402

BY_FAMILY = {
    "llama": {"use_te_activation_func", "use_transformer_engine_op_fuser", "qk_clip"},
    "smollm3": {"use_te_activation_func", "use_transformer_engine_op_fuser", "qk_clip"},
    "olmo2": set(),
    "youtu": {"fused_residual_rmsnorm", "qk_clip"},
}
SOME = sorted(set().union(*BY_FAMILY.values()))
OF_FAMILY = {family_of(hf_values(case)).name: hf_values(case) for case in CASES}


def made(layers: str, **settings: Any) -> argparse.Namespace:
    return default_arguments(**settings | {"transformer_impl": layers})


@pytest.fixture
def with_transformer_engine(monkeypatch):
    """As on a GPU: what is asked before a model is built says that it is there."""
    monkeypatch.setattr("remit_megatron.models.spec.transformer_engine_usable", lambda: True)
    for name in ("fused_apply_rotary_pos_emb", "fused_apply_rotary_pos_emb_thd"):
        monkeypatch.setattr(f"megatron.core.models.common.embeddings.rope_utils.{name}", lambda *_: None)

    def built(**megatron: Any) -> argparse.Namespace:
        config = run_config(**megatron)
        architecture = megatron_arguments(load_model_description(TINY))
        return build_arguments(config, architecture, world_size=1, rank=0, gpu=True)

    return built


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("family", BY_FAMILY)
def test_a_family_takes_its_own_flags(family, name):
    args = made("transformer_engine", **{name: True})
    if name in BY_FAMILY[family]:
        check_layers(OF_FAMILY[family], args)
    else:
        with pytest.raises(UserError, match=f"^megatron.{name}: found true; expected false: the layers of {family} do"):
            check_layers(OF_FAMILY[family], args)
    with pytest.raises(UserError, match=f"^megatron.{name}: found true; expected nothing with local layers"):
        check_layers(OF_FAMILY[family], made("local", **{name: True}))


def test_families_say_what_their_layers_read(monkeypatch):
    """Each flag of a family reaches what makes its layers of Transformer Engine; others do not."""
    assert {name: set(family.layer_flags) for name, family in families().items()} == BY_FAMILY
    reached: dict[str, Any] = {}
    names = {"use_te_activation_func": "use_te_activation_func", "use_te_op_fuser": "use_transformer_engine_op_fuser"}

    class Made(Exception):
        pass

    def record(**given: Any):
        reached.update(given)
        raise Made

    monkeypatch.setattr("remit_megatron.models.spec.get_gpt_layer_with_transformer_engine_spec", record)
    place = "remit_megatron.models.latent_attention.get_gpt_layer_with_transformer_engine_submodules"
    monkeypatch.setattr(place, record)
    for family in ("llama", "smollm3", "youtu"):
        reached.clear()
        config = model_config(OF_FAMILY[family], default_arguments()).transformer
        config.transformer_impl = "transformer_engine"
        config.use_te_activation_func = config.use_transformer_engine_op_fuser = True
        with pytest.raises(Made):
            families()[family].layer_spec(config)
        handed_on = {names[key] for key, value in reached.items() if key in names and value}
        assert handed_on == BY_FAMILY[family] & set(names.values()), family


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attention_backend", AttnBackend.flash),
        ("flash_attention_version", 3),
        ("batch_invariant_mode", True),
        ("cp_comm_type", ["a2a"]),
        ("hierarchical_context_parallel_sizes", [2, 2]),
        ("log_max_attention_logit", True),
        ("te_precision_config_file", "precision.yaml"),
        ("tp_comm_overlap", True),
    ],
)
def test_what_local_layers_do_not_read(name, value):
    model = OF_FAMILY["olmo2"]
    check_layers(model, made("transformer_engine", **{name: value}))
    with pytest.raises(UserError, match=f"^megatron.{name}: found .*; expected nothing with local layers"):
        check_layers(model, made("local", **{name: value}))


def test_nothing_of_this_is_on_by_itself(with_transformer_engine):
    for family in OF_FAMILY.values():
        check_layers(family, arguments())
        check_layers(family, with_transformer_engine())


def test_a_reference_of_another_family_has_no_part_in_the_students_step():
    args = made("transformer_engine", qk_clip=True)
    check_layers(OF_FAMILY["olmo2"], frozen_arguments(args))
    args.use_te_activation_func = True  # its layers would fail on it
    with pytest.raises(UserError, match="use_te_activation_func"):
        check_layers(OF_FAMILY["olmo2"], frozen_arguments(args))


@pytest.mark.parametrize(
    ("megatron", "key"),
    [
        ({"cuda_graph_impl": "full_iteration"}, "cuda_graph_impl"),
        ({"cuda-graph-impl": "full_iteration"}, "cuda-graph-impl"),
        ({"cuda_graph_impl": "local", "cuda_graph_scope": "full_iteration"}, "cuda_graph_scope"),
        ({"cuda_graph_impl": "local", "--cuda-graph-scope": ["full_iteration"]}, "--cuda-graph-scope"),
        ({"cuda_graph_impl": "local", "cuda_graph_scope_deprecated": "full_iteration"}, "cuda_graph_scope_deprecated"),
        ({"cuda_graph_impl": "local", "cuda_graph_modules": ["full_iteration"]}, "cuda_graph_modules"),
        ({"cuda_graph_impl": "local", "cuda-graph-modules": ["attn", "full_iteration"]}, "cuda-graph-modules"),
        ({"enable_cuda_graph": True, "cuda_graph_scope": "full_iteration"}, "cuda_graph_scope"),
        ({"enable_cuda_graph": True, "cuda_graph_modules": "full_iteration"}, "cuda_graph_modules"),
        ({"cuda_graph_modules": ["full_iteration"]}, "cuda_graph_modules"),
    ],
)
def test_no_graph_of_the_whole_step(with_transformer_engine, megatron, key):
    for build in (with_transformer_engine, arguments):
        with pytest.raises(UserError) as caught:
            build(**megatron)
        assert (caught.value.field, caught.value.found) == (f"megatron.{key}", "full_iteration")
        assert caught.value.expected.endswith("would have no place for the reference")


def test_what_megatron_makes_of_a_graph_counts(with_transformer_engine, monkeypatch):
    """Also where a newer Megatron makes it of a key that is not known here."""
    assert with_transformer_engine(cuda_graph_impl="local", cuda_graph_modules=["attn"]).cuda_graph_impl == "local"

    def validate_args(args: argparse.Namespace) -> None:
        args.cuda_graph_impl = "full_iteration"

    monkeypatch.setattr("megatron.training.arguments.validate_args", validate_args)
    with pytest.raises(UserError, match=r"^megatron\.cuda_graph_impl: found full_iteration; expected another"):
        with_transformer_engine(cuda_graph_impl="local")


def test_no_graph_of_generation(with_transformer_engine):
    with pytest.raises(
        UserError, match=r"^megatron\.cuda_graph_scope: found full_iteration_inference; expected modules"
    ):
        with_transformer_engine(cuda_graph_impl="local", cuda_graph_scope="full_iteration_inference")


@pytest.mark.parametrize("name", NEEDS)
def test_what_is_read_beside_another_setting_alone(name, with_transformer_engine):
    off = {"use_distributed_optimizer": False, "bf16": False}
    switches = NEEDS[name]
    with pytest.raises(UserError) as caught:
        arguments(**{name: True} | {switch: off[switch] for switch in switches if switch in off})
    assert str(caught.value).startswith(f"megatron.{name}: found true; expected false without megatron.{switches[0]}")


@pytest.mark.parametrize(
    "megatron",
    [
        {"bf16": True, "grad_reduce_in_bf16": True, "use_distributed_optimizer": True},
        {"use_distributed_optimizer": True, "ddp_pad_buckets_for_high_nccl_busbw": True},
        {"profile": True, "use_pytorch_profiler": True, "pytorch_profiler_collect_shapes": True},
    ],
)
def test_accepted_beside_it(megatron):
    arguments(**megatron)


@pytest.mark.parametrize("name", checks._TO_TENSORBOARD)
def test_what_goes_to_tensorboard_needs_it(name):
    config = run_config(**{name: True})
    check_supported(config, arguments(config=config))
    config.logging.tensorboard = False
    with pytest.raises(UserError, match=rf"^logging\.tensorboard: found false; expected true with megatron\.{name}"):
        check_supported(config, arguments(config=config))


def test_a_run_looks_at_both_of_its_models(tmp_path, monkeypatch):
    """Before anything is built, in the dry run, too."""
    seen: list[str] = []
    monkeypatch.setattr(checks, "check_layers", lambda hf_config, args: seen.append(hf_config["model_type"]))
    reference = make_llama(tmp_path / "reference", seed=1, tokenizer=make_tokenizer(tmp_path / "tokenizer"))
    config = run_config()
    config.model = {**OF_FAMILY["olmo2"], "vocab_size": 51}
    config.objective.name, config.data.tokenizer = "remit", str(tmp_path / "tokenizer")
    config.reference = ReferenceConfig(checkpoint=str(reference))
    examine(config, world_size=1, absent=[])
    assert seen == ["olmo2", "llama"]
    monkeypatch.undo()
    config.megatron["use_transformer_engine_op_fuser"] = True
    with pytest.raises(
        UserError, match=r"^megatron\.use_transformer_engine_op_fuser: found true; expected nothing with"
    ):
        dry_run(config)


def test_no_attention_has_the_fused_softmax():
    with pytest.raises(UserError, match=r"^megatron\.masked_softmax_fusion: found true; expected false: no attention"):
        check_supported(run_config(), arguments(masked_softmax_fusion=True))


def test_norms_decay_by_our_own_key():
    for megatron in ({"apply_wd_to_qk_layernorm": True}, {"no_weight_decay_cond_type": "apply_wd_to_qk_layernorm"}):
        with pytest.raises(
            UserError, match=r"apply_wd_to_qk_layernorm: found True; expected optimizer\.decay_norms in"
        ):
            check_supported(run_config(**megatron), arguments(**megatron))
