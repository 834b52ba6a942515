"""What is honored is read: by Megatron, outside of its tables of settings, or here."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from pathlib import Path

import patches

patches.apply()

import remit_megatron  # noqa: E402
from remit_megatron.run.megatron_flags import HONORED, NEEDS  # noqa: E402
from remit_megatron.run.megatron_values import HONORED_VALUES  # noqa: E402

PACKAGE = Path(remit_megatron.__file__).parent
_found = importlib.util.find_spec("megatron.core")
assert _found is not None and _found.origin is not None
MEGATRON = Path(_found.origin).parents[1]
# Where settings are declared, checked and passed on, none of which is doing them; and parts that no run here has.
TABLES = (
    "training/arguments.py",
    "training/argument_utils.py",
    "training/yaml_arguments.py",
    "training/config/",
    "core/transformer/transformer_config.py",
    "core/model_parallel_config.py",
    "core/optimizer/optimizer_config.py",
    "core/distributed/distributed_data_parallel_config.py",
)
ELSEWHERE = ("core/inference/", "core/distributed/fsdp/", "core/models/mimo/", "rl/")
# Functions of training/training.py for models that are not made from a configuration, as ours are; one passes on.
UNUSED_FUNCTIONS = {"get_model", "wrap_model_chunks_with_ddp", "get_megatron_ddp_config"}
# Our own lists of names that are refused or counted, where a name stands and does nothing.
OUR_TABLES = ("run/megatron_keys.py", "run/megatron_flags.py", "run/megatron_values.py")

# Honored in a table itself: argument -> a line of that file that does it.
DONE_IN_TABLES = {
    "disable_bf16_reduced_precision_matmul": (
        "core/transformer/transformer_config.py",
        "torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False",
    ),
    "recompute_activations": ("training/arguments.py", "args.recompute_granularity = 'selective'"),
    "grad_reduce_in_bf16": ("training/arguments.py", "args.accumulate_allreduce_grads_in_fp32 = False"),
    "enable_cuda_graph": ("training/arguments.py", 'args.cuda_graph_impl = "local"'),
    "external_cuda_graph": ("training/arguments.py", 'args.cuda_graph_impl = "transformer_engine"'),
    "cuda_graph_scope_deprecated": (
        "training/arguments.py",
        "args.cuda_graph_modules = args.cuda_graph_scope_deprecated",
    ),
    "torch_fsdp2_reshard_after_forward": (
        "training/training.py",
        "return TorchFullyShardedDataParallelConfig(reshard_after_forward=reshard_after_forward)",
    ),
    "init_method_std": ("core/transformer/transformer_config.py", "init_method_normal(self.init_method_std)"),
    "embedding_init_method_std": (
        "core/transformer/transformer_config.py",
        "self.embedding_init_method = init_method_normal(self.embedding_init_method_std)",
    ),
    "main_grads_dtype": ("training/arguments.py", "args.accumulate_allreduce_grads_in_fp32 = True"),
    "no_weight_decay_cond_type": ("training/arguments.py", "args.apply_wd_to_qk_layernorm = True"),
    "num_virtual_stages_per_pipeline_rank": (
        "training/arguments.py",
        "args.virtual_pipeline_model_parallel_size = args.num_virtual_stages_per_pipeline_rank",
    ),
    "num_layers_per_virtual_pipeline_stage": (
        "training/arguments.py",
        "args.virtual_pipeline_model_parallel_size = num_layers_per_pipeline_stage //",
    ),
    "te_precision_config_file": (
        "training/argument_utils.py",
        "kw_args['quant_recipe'] = load_quantization_recipe(args.te_precision_config_file)",
    ),
}
# Taken from a configuration by a beginning of their names, with what says so.
BY_PREFIX = {"muon_": ("core/optimizer/emerging_optimizers.py", 'prefixed = f"{prefix}_{name}"')}


def read_in(tree: ast.AST) -> set[str]:
    """Attributes and items that are looked up by a constant name."""
    names = set()
    for node in walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            names.add(node.attr)
        elif (
            isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load) and isinstance(node.slice, ast.Constant)
        ):
            names.add(node.slice.value)
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) == "getattr"
            and isinstance(node.args[1], ast.Constant)
        ):
            names.add(node.args[1].value)
    return {name for name in names if isinstance(name, str)}


def walk(tree: ast.AST):
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.FunctionDef) and node.name in UNUSED_FUNCTIONS):
            yield node
            yield from walk(node)


@functools.cache
def readers() -> set[str]:
    """Every name that is read where something is done."""
    words = re.compile(rf"\b(?:{'|'.join(sorted(HONORED | HONORED_VALUES | set(passed_on().values())))})\b")
    found: set[str] = set()
    for root, tables in ((MEGATRON, TABLES + ELSEWHERE), (PACKAGE, OUR_TABLES), (PACKAGE.parent / "patches", ())):
        for part in ("core", "training") if root == MEGATRON else (".",):
            for path in (root / part).rglob("*.py"):
                if path.relative_to(root).as_posix().startswith(tables):
                    continue
                text = path.read_text()
                if set(words.findall(text)) - found:
                    found |= read_in(ast.parse(text))
    return found


@functools.cache
def passed_on() -> dict[str, str]:
    """Arguments that a configuration knows by another name: ``kwargs["bucket_size"] = args.ddp_bucket_size``."""
    text = (MEGATRON / "training/training.py").read_text() + (MEGATRON / "training/argument_utils.py").read_text()
    pairs = re.findall(r"""kw\w*\[["'](\w+)["']\]\s*=\s*\\?\s*(?:not |tuple\()*args\.(\w+)""", text)
    return {argument: name for name, argument in pairs if argument != name}


def unread(names: frozenset[str] | set[str]) -> list[str]:
    missing = []
    for name in sorted(names):
        if name in readers() or passed_on().get(name) in readers():
            continue
        place = DONE_IN_TABLES.get(name) or next((BY_PREFIX[p] for p in BY_PREFIX if name.startswith(p)), None)
        if place is None or place[1] not in (MEGATRON / place[0]).read_text():
            missing.append(name)
    return missing


def test_every_honored_flag_has_a_reader():
    assert unread(HONORED) == []


def test_every_honored_value_has_a_reader():
    assert unread(HONORED_VALUES) == []


def test_what_nothing_reads_is_found():
    for name in ("nccl_all_reduce_for_prefill", "dist_ckpt_save_pre_mcore_014", "exit_signal_handler_for_dataloader"):
        assert unread({name}) == [name]


def test_what_belongs_to_another_flag_is_honored():
    assert set(NEEDS) <= HONORED
    assert {switch for switches in NEEDS.values() for switch in switches} <= HONORED | HONORED_VALUES | {
        "use_distributed_optimizer",
        "bf16",
    }
