"""Plain lm-eval on local files, by task files written here by hand: what `remit evaluate` is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

# Task -> (built-in file below lm_eval/tasks, folder of its data, splits that it reads).
TASKS = {
    "gsm8k": ("gsm8k/gsm8k.yaml", "gsm8k", ("train", "test")),
    "minerva_math_counting_and_prob": (
        "minerva_math/minerva_math_counting_and_prob.yaml",
        "minerva_math/counting_and_probability",
        ("test",),
    ),
    "bbh_cot_fewshot_boolean_expressions": (
        "bbh/cot_fewshot/boolean_expressions.yaml",
        "bbh/boolean_expressions",
        ("test",),
    ),
    "bbh_cot_fewshot_word_sorting": ("bbh/cot_fewshot/word_sorting.yaml", "bbh/word_sorting", ("test",)),
    "arc_challenge": ("arc/arc_challenge.yaml", "ai2_arc/ARC-Challenge", ("train", "test")),
    "arc_easy": ("arc/arc_easy.yaml", "ai2_arc/ARC-Easy", ("train", "test")),
    "hellaswag": ("hellaswag/hellaswag.yaml", "hellaswag", ("validation",)),
    "commonsense_qa": ("commonsense_qa/default.yaml", "commonsense_qa", ("train", "validation")),
    "mmlu_pro_math": ("mmlu_pro/mmlu_pro_math.yaml", "mmlu_pro", ("test", "validation")),
    "ifeval": ("ifeval/ifeval.yaml", "ifeval", ("train",)),
}


def run_plain(
    model: Path,
    data: Path,
    folder: Path,
    *,
    shots: dict[str, int],
    limit: int,
    batch_size: int,
    max_gen_toks: int | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """lm-eval's own ``simple_evaluate``. Returns its logged samples by task.

    Args:
        shots: of each task; also which tasks.
        folder: for the task files.
    """
    import lm_eval
    import lm_eval.tasks

    folder.mkdir(parents=True, exist_ok=True)
    built_in = Path(lm_eval.tasks.__file__).parent
    for name, number in shots.items():
        file, place, splits = TASKS[name]
        content: dict[str, Any] = {
            "include": str(built_in / file),
            "task": f"plain_{name}",
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {
                "data_files": {split: str(data / place / f"{split}.jsonl") for split in splits},
                "cache_dir": str(folder / "datasets"),
            },
            "num_fewshot": number,
        }
        original = lm_eval.tasks._yaml_loader.load_yaml(built_in / file, resolve_func=False)
        for key in ("training_split", "validation_split", "test_split"):
            split = key.removesuffix("_split").replace("training", "train")
            if split not in splits and original.get(key) not in splits:
                content[key] = None
        if max_gen_toks and original.get("generation_kwargs"):
            content["generation_kwargs"] = {**original["generation_kwargs"], "max_gen_toks": max_gen_toks}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model)},
        tasks=[f"plain_{name}" for name in shots],
        batch_size=batch_size,
        device="cpu",
        limit=limit,
        task_manager=lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )
    assert found is not None
    return {name: found["samples"][f"plain_{name}"] for name in shots}
