"""``remit analyze …`` and ``remit report``. Light to import: torch and transformers come with the work."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from remit_megatron.runtime.errors import EXIT_DONE, UserError

_MODEL_HELP = "Hugging Face directory, checkpoint, or run directory (its newest checkpoint)"


def add_heatmap_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``remit analyze heatmap``."""
    parser.add_argument("--student", required=True, metavar="MODEL", help=_MODEL_HELP)
    parser.add_argument("--reference", required=True, metavar="MODEL", help="the same, of the model that guides")
    _add_input(parser)
    _add_layout(parser)
    _add_epsilon(parser)


def run_heatmap(args: argparse.Namespace) -> int:
    """Colours each token by log p_reference - log p_student."""
    output = _begin(args)
    from remit_megatron.analysis.heatmap import heatmap

    summary = heatmap(
        student=args.student,
        reference=args.reference,
        output=output,
        epsilon=args.epsilon,
        layout=_layout(args),
        **_reading(args),
    )
    return _done(
        f"{summary['tokens']} tokens, mean difference {summary['delta_mean']:+.4f} nats, "
        f"reference ahead on {100 * summary['reference_ahead']:.1f}%: {output / 'heatmap.html'}"
    )


def add_shift_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``remit analyze shift``."""
    parser.add_argument(
        "--models", nargs="+", required=True, metavar="MODEL", help=f"in order of training; {_MODEL_HELP}"
    )
    parser.add_argument("--reference", metavar="MODEL", help="compare each of them with this one, too")
    _add_input(parser)


def run_shift(args: argparse.Namespace) -> int:
    """Compares the distributions of checkpoints with each other and with the reference."""
    if len(args.models) < 2 and args.reference is None:
        raise UserError("--models", "one model and no --reference", "two models, or a reference")
    output = _begin(args)
    from remit_megatron.analysis.shift import shift

    data = shift(models=args.models, reference=args.reference, output=output, **_reading(args))
    return _done(f"{len(data['pairs'])} pairs of models, {data['texts']} texts: {output / 'shift.json'}")


def add_kl_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``remit analyze kl``."""
    parser.add_argument("--student", nargs="+", required=True, metavar="MODEL", help=f"one or more; {_MODEL_HELP}")
    parser.add_argument("--reference", required=True, metavar="MODEL", help="the model that guides")
    _add_input(parser)
    _add_layout(parser)


def run_kl(args: argparse.Namespace) -> int:
    """KL divergence to the reference over the full vocabulary, and bits per byte."""
    output = _begin(args)
    from remit_megatron.analysis.shift import kl

    data = kl(models=args.student, reference=args.reference, output=output, layout=_layout(args), **_reading(args))
    for model in data["models"]:
        mean = model["kl_reference_model"]
        print(
            f"{model['model']}: KL(reference || model) {max(mean['value'], 0):.4f} ± {mean['half']:.4f} nats per token"
        )
    return _done(f"{data['texts']} texts: {output / 'kl.json'}")


def add_weights_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``remit analyze weights``."""
    parser.add_argument(
        "--student", nargs="+", required=True, metavar="MODEL", help=f"in order of training; {_MODEL_HELP}"
    )
    parser.add_argument("--reference", required=True, metavar="MODEL", help="the model that guides")
    parser.add_argument(
        "--min-count", type=int, default=5, metavar="N", help="list tokens that occur at least N times (default: 5)"
    )
    _add_input(parser)
    _add_epsilon(parser)


def run_weights(args: argparse.Namespace) -> int:
    """Which tokens weigh most, and how weights move from checkpoint to checkpoint."""
    output = _begin(args)
    from remit_megatron.analysis.weights import weights

    data = weights(
        models=args.student,
        reference=args.reference,
        output=output,
        epsilon=args.epsilon,
        min_count=args.min_count,
        **_reading(args),
    )
    last = data["models"][-1]
    return _done(f"{last['tokens']} tokens, weights' standard deviation {last['std']:.4f}: {output / 'weights.json'}")


def add_gradients_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``remit analyze gradients``."""
    _add_runs(parser)
    _add_output(parser)


def run_gradients(args: argparse.Namespace) -> int:
    """Gradient norms of runs side by side."""
    output = _begin(args)
    from remit_megatron.analysis.gradients import gradients

    data = gradients(runs=args.runs, output=output)
    return _done(f"{len(data['runs'])} runs: {output / 'gradients.json'}")


def add_efficiency_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``remit analyze efficiency``."""
    _add_runs(parser)
    parser.add_argument("--baseline", metavar="RUN", help="the run whose score is to be reached (default: the first)")
    parser.add_argument(
        "--results",
        nargs="+",
        default=[],
        metavar="FILE",
        help="results.json of `remit evaluate` of the runs' checkpoints",
    )
    parser.add_argument("--task", metavar="NAME", help="one task of the results (default: the mean of all)")
    _add_output(parser)


def run_efficiency(args: argparse.Namespace) -> int:
    """Score against tokens and device hours, with the speed-up to the baseline's score."""
    output = _begin(args)
    from remit_megatron.analysis.efficiency import efficiency

    data = efficiency(runs=args.runs, baseline=args.baseline, results=args.results, task=args.task, output=output)
    for row in data["runs"]:
        ups = [row[f"{name}_speed_up"] for name in ("tokens", "device_hours")]
        text = "not reached" if None in ups else f"{ups[0]:.2f} x in tokens, {ups[1]:.2f} x in device hours"
        print(f"{row['run']}: {data['score']} of {data['baseline']} ({data['goal']:.4f}) {text}")
    return _done(str(output / "efficiency.json"))


def add_posttrain_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``remit analyze posttrain``."""
    parser.add_argument(
        "arms",
        nargs="+",
        metavar="NAME=PATH[,PATH…]",
        help="trainer_state.json, folder of a TRL run, or JSON lines with step; several paths are seeds of one arm",
    )
    parser.add_argument("--metric", metavar="NAME", help="figure of the log (default: reward, accuracy or loss)")
    parser.add_argument(
        "--window", type=int, default=1, metavar="N", help="mean of N logged values a point (default: 1)"
    )
    _add_output(parser)


def run_posttrain(args: argparse.Namespace) -> int:
    """Curves of post-training."""
    output = _begin(args)
    from remit_megatron.analysis.posttrain import posttrain

    data = posttrain(arms=args.arms, metric=args.metric, window=args.window, output=output)
    return _done(f"{data['metric']} of {len(data['arms'])} arms: {output / 'posttrain.json'}")


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``remit report``."""
    _add_runs(parser)
    parser.add_argument(
        "--output",
        action="append",
        default=[],
        metavar="FILE",
        help=".html or .md; may be given twice (default: report.html in the run, or here for several runs)",
    )
    parser.add_argument(
        "--results",
        nargs="+",
        default=[],
        metavar="FILE",
        help="results.json of `remit evaluate` (default: those in and beside the runs)",
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        default=[],
        metavar="DIR",
        help="what `remit analyze` wrote (default: what is in and beside the runs)",
    )
    parser.add_argument("--title", metavar="TEXT", help="heading of the page")


def run_report(args: argparse.Namespace) -> int:
    """One page about one or several runs."""
    from remit_megatron.analysis.report.build import report

    for path in report(runs=args.runs, outputs=args.output, results=args.results, parts=args.parts, title=args.title):
        print(f"{path}: {path.stat().st_size / 1000:.0f} KB")
    return EXIT_DONE


def _add_runs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory")


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="receives data (JSON), PNG and the report's part"
    )


def _add_input(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", required=True, metavar="F.jsonl", help='texts, a line {"text": "..."} each')
    parser.add_argument("--text-key", default="text", metavar="KEY", help="field that holds the text (default: text)")
    parser.add_argument("--max-texts", type=int, metavar="N", help="read the first N texts (default: all)")
    parser.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help="read the first N tokens of each text (default: all; too many are refused)",
    )
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16"),
        default="fp32",
        help="of the models (default: fp32, what figures are stated for)",
    )
    _add_output(parser)


def _add_epsilon(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--epsilon",
        type=_epsilon,
        default=0.2,
        metavar="E",
        help="clip of the weights; none for no clip (default: 0.2)",
    )


def _add_layout(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tp", type=int, default=1, metavar="T", help="tensor-parallel size (default: 1)")
    parser.add_argument("--pp", type=int, default=1, metavar="P", help="pipeline-parallel size (default: 1)")
    parser.add_argument(
        "--nproc", type=int, metavar="N", help="local ranks that the models are spread over (default: TP x PP)"
    )


def _layout(args: argparse.Namespace) -> Any:
    from remit_megatron.analysis.sharded import Layout

    for name in ("tp", "pp", "nproc"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name}", value, "at least 1")
    if (args.nproc or 0) % (args.tp * args.pp):
        raise UserError("--nproc", args.nproc, f"a multiple of TP x PP = {args.tp * args.pp}")
    return Layout(args.tp, args.pp, args.nproc)


def _epsilon(text: str) -> float | None:
    if text in {"none", "null"}:
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise UserError("--epsilon", text, "a number from 0 to 1, or none for no clip")
    return value


def _reading(args: argparse.Namespace) -> dict[str, Any]:
    for option in ("max_texts", "max_tokens"):
        value, least = getattr(args, option), 1 if option == "max_texts" else 2
        if value is not None and value < least:
            raise UserError("--" + option.replace("_", "-"), value, f"at least {least}")
    return {
        "input_path": args.input,
        "text_key": args.text_key,
        "max_texts": args.max_texts,
        "max_tokens": args.max_tokens,
        "dtype": args.dtype,
    }


def _begin(args: argparse.Namespace) -> Any:
    """The output directory, before anything slow; transformers must not look for a network that may not be there."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from remit_megatron.analysis.parts import output_directory

    return output_directory(args.output)


def _done(text: str) -> int:
    sys.stdout.write(text + "\n")
    return EXIT_DONE
