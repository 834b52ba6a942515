"""One turn of the flywheel at toy size, as stages: each is a command that can be run by hand.

    text -> token files -> base -> reinforcement learning -> reference -> mid-training of the base, an arm per objective
         -> export -> evaluation -> reinforcement learning again

The quickstart and the study are made of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from remit_megatron.flywheel.toy import ToyText, write_text, write_tokenizer
from remit_megatron.flywheel.toy_evaluation import evaluate_to, sampled_curve_to
from remit_megatron.flywheel.toy_stages import MEGATRON, TRL, Call, Command, Stage
from remit_megatron.runtime.installed import find_config

RUN_CONFIG = "configs/common/quickstart.yaml"
RL_CONFIG = "configs/posttrain/quickstart_rlvr.yaml"
CHECK_SAMPLES = 64  # sequences of four held-out solutions
# On a quiet machine, one thread.
_STEP_SECONDS, _RL_STEP_SECONDS, _REFERENCE_SHARE = 0.055, 0.55, 0.25


@dataclass(frozen=True)
class Lengths:
    """Steps of everything.

    Attributes:
        again: of reinforcement learning from the mid-trained bases, a multiple of ``every``.
        every: steps between two points of its curve.
    """

    base: int = 600
    rl: int = 50
    mid: int = 200
    again: int = 24
    every: int = 4


@dataclass(frozen=True)
class Arm:
    """A way to mid-train the base.

    Attributes:
        objective: the section of the run's configuration.
        reference: what guides it: ``base``, ``reference``, ``reference-N`` after N steps of reinforcement learning,
            ``next-reference`` for what came of the remit arm by reinforcement learning; None for nothing.
        control: name of a control objective that only this process knows (:mod:`toy_controls`).
    """

    objective: Mapping[str, Any]
    reference: str | None = None
    control: str | None = None


ARMS = {
    "ntp": Arm({"name": "ntp"}),
    "remit": Arm({"name": "remit"}, "reference"),
    "rho1": Arm({"name": "rho1"}, "reference"),
    "kd": Arm({"name": "kd"}, "reference"),
    "control": Arm({"name": "remit"}, "base"),
}
AGAIN = ("ntp", "remit")
# What came of the remit arm by reinforcement learning: the reference of a second round.
NEXT = "next-reference"


@dataclass(frozen=True)
class Chain:
    """The stages of one base and its arms.

    Args:
        root: of the stages' names: :class:`~remit_megatron.flywheel.toy_stages.Stages` has its records there.
        text: what is written; its seed is that of everything.
        lengths: of the trainings.
        arms: name -> arm.
        again: arms that reinforcement learning goes on from.
        cell: folder below ``root`` for everything; empty is ``root`` itself.
        kept: steps of the first reinforcement learning whose models are references too.
        label: stands before what the terminal says.
    """

    root: Path
    text: ToyText
    lengths: Lengths = field(default_factory=Lengths)
    arms: Mapping[str, Arm] = field(default_factory=lambda: ARMS)
    again: Sequence[str] = AGAIN
    cell: str = ""
    kept: tuple[int, ...] = ()
    label: str = ""

    @property
    def directory(self) -> Path:
        """Where everything of this chain is."""
        return self.root / self.cell

    def scores(self, name: str) -> Path:
        """The evaluation of a model: ``base``, ``reference`` or an arm."""
        return self.directory / "scores" / f"{name}.json"

    def curve(self, name: str) -> Path:
        """Accuracy at temperature 1 over reinforcement learning from an arm."""
        return self.directory / "scores" / f"after_{name}.json"

    def check(self, name: str) -> Path:
        """What ``remit check reference`` found."""
        return self.directory / "scores" / f"check_{name}.json"

    def stages(self) -> list[Stage]:
        """All of them, the ones that others wait for first."""
        references = sorted({arm.reference for arm in self.arms.values() if arm.reference and arm.reference != "base"})
        assert not set(references) & self.arms.keys(), "both are directories"
        stages = [self._text(), self._data(), self._base(), self._export("base"), self._rl()]
        for name in references:
            stages += [] if name == NEXT else [self._reference(name), self._check(name)]
        for name, arm in self.arms.items():
            stages += [self._midtrain(name, arm), self._export(name)]
            if name in self.again:
                stages.append(self._rl_again(name))
        if NEXT in references:
            stages.append(self._reference(NEXT))
        stages.append(self._score("reference", self.directory / "rlvr" / "model", "rlvr"))
        return _in_order(stages)

    # -- stages ------------------------------------------------------------------------------------------------------

    def _text(self) -> Stage:
        steps = (
            Call(write_text_of, {"directory": str(self.directory / "text"), "text": asdict(self.text)}),
            Call(write_tokenizer_to, {"directory": str(self.directory / "tokenizer")}),
        )
        return self._stage("text", "Text: worked additions with forgotten carries, pages of a telephone book.", steps)

    def _data(self) -> Stage:
        steps = tuple(
            Command(
                (
                    *("data", "build", "--input", self.directory / "text" / f"{name}.jsonl"),
                    *("--tokenizer", self.directory / "tokenizer", "--output", self.directory / "data" / name),
                    *("--workers", 1, "--overwrite"),
                )
            )
            for name in ("train", "heldout")
        )
        return self._stage("data", "Token files: remit data build.", steps, needs=("text",), seconds=4)

    def _base(self) -> Stage:
        overrides = {
            "megatron.train_iters": self.lengths.base,
            "megatron.lr": 3e-3,
            "megatron.lr_decay_style": "constant",
            "megatron.lr_warmup_iters": min(50, self.lengths.base // 2),
        }
        about = f"Base: {self.lengths.base} steps of next-token prediction from random weights, remit train."
        steps = (self._train("base", overrides),)
        seconds = 3 + _STEP_SECONDS * self.lengths.base
        return self._run_stage("base", about, steps, needs=("data",), loads=MEGATRON, seconds=seconds)

    def _export(self, name: str) -> Stage:
        """Export and evaluation: one child does both."""
        model = self.directory / "models" / name
        steps = (
            Command(("export", "--checkpoint", self.directory / name, "--output", model)),
            self._evaluation(name, model),
        )
        return self._stage(
            f"{name}-score", "", steps, needs=(name,), loads=MEGATRON, outputs=(model, self.scores(name))
        )

    def _score(self, name: str, model: Path, need: str) -> Stage:
        steps = (self._evaluation(name, model),)
        return self._stage(f"{name}-score", "", steps, needs=(need,), loads=TRL, outputs=(self.scores(name),))

    def _rl(self) -> Stage:
        about = (
            f"Reference: {self.lengths.rl} steps of GRPO on the base, rewarded for right sums, remit posttrain rlvr."
        )
        overrides: dict[str, Any] = {"trl.max_steps": self.lengths.rl}
        if self.kept:
            overrides["keep.every"] = _common_step(self.kept)
        steps = (self._posttrain("rlvr", "base", overrides),)
        seconds = 3 + _RL_STEP_SECONDS * self.lengths.rl
        return self._run_stage("rlvr", about, steps, needs=("base-score",), loads=TRL, seconds=seconds)

    def _reference(self, name: str) -> Stage:
        place = {"reference": "rlvr/model", NEXT: "after/remit/model"}
        source = place.get(name, f"rlvr/models/step-{name.rpartition('-')[2]}")
        need = "after/remit" if name == NEXT else "rlvr"
        steps = (Command(("import", "--hf", self.directory / source, "--output", self.directory / name)),)
        outputs = (self.directory / name,)
        return self._stage(name, "", steps, needs=(need,), loads=MEGATRON, outputs=outputs, seconds=1)

    def _check(self, name: str) -> Stage:
        overrides = {"init": self.directory / "base", "objective.name": "remit"} | self._guided(name)
        words = self._words(f"check-{name}", overrides)
        steps = (
            Command(
                (
                    *("check", "reference", str(find_config(RUN_CONFIG, announce=False)), *words),
                    *("--samples", CHECK_SAMPLES, "--output", self.check(name)),
                ),
                reads=_content(RUN_CONFIG),
            ),
        )
        about = "Is the reference worth following? remit check reference." if name == "reference" else ""
        needs, outputs = (name, "base-score"), (self.check(name),)
        tells = self.check(name) if about else None
        return self._stage(
            f"check-{name}", about, steps, needs=needs, loads=MEGATRON, outputs=outputs, tells=tells, seconds=4
        )

    def _midtrain(self, name: str, arm: Arm) -> Stage:
        overrides: dict[str, Any] = {
            "init": self.directory / "base",
            "megatron.train_iters": self.lengths.mid,
            "megatron.lr_warmup_iters": min(10, self.lengths.mid // 2),
            **{f"objective.{key}": "null" if value is None else value for key, value in arm.objective.items()},
            **({} if arm.reference is None else self._guided(arm.reference)),
        }
        needs = ("base-score",) if arm.reference in (None, "base") else ("base-score", arm.reference)
        if arm.reference == "reference":
            needs = (*needs, "check-reference")  # it is measured before it is followed
        about = f"Mid-training of the base with {name}, {self.lengths.mid} steps."
        if arm.reference == "base":
            about = f"Mid-training with {name}: remit with the base itself as reference, {self.lengths.mid} steps."
        seconds = 3 + _STEP_SECONDS * self.lengths.mid * (1 + _REFERENCE_SHARE * (arm.reference is not None))
        steps = (*_control(arm), self._train(name, overrides))
        return self._run_stage(name, about, steps, needs=needs, loads=MEGATRON, seconds=seconds)

    def _rl_again(self, name: str) -> Stage:
        run = f"after/{name}"
        overrides = {"trl.max_steps": self.lengths.again, "trl.learning_rate": 1.5e-4, "keep.every": self.lengths.every}
        models = [self.directory / "models" / name]
        points = range(self.lengths.every, self.lengths.again + 1, self.lengths.every)
        models += [self.directory / run / "models" / f"step-{step}" for step in points]
        arguments = {
            "models": [str(model) for model in models],
            "text": str(self.directory / "text"),
            "output": str(self.curve(name)),
            "seed": self.text.seed,
        }
        steps = (self._posttrain(run, name, overrides), Call(sampled_curve_to, arguments))
        about = f"Reinforcement learning from the base of {name}, {self.lengths.again} steps."
        seconds = 8 + _RL_STEP_SECONDS * self.lengths.again + 1.5 * len(models)
        return self._run_stage(
            run, about, steps, needs=(f"{name}-score",), loads=TRL, seconds=seconds, also=(self.curve(name),)
        )

    # -- helpers -----------------------------------------------------------------------------------------------------

    def _stage(self, name: str, about: str, steps: tuple, *, needs: tuple[str, ...] = (), **others: Any) -> Stage:
        said = f"{self.label}{about}" if about else ""
        return Stage(self._name(name), said, steps, needs=tuple(map(self._name, needs)), **others)

    def _run_stage(self, name: str, about: str, steps: tuple, *, also: tuple[Path, ...] = (), **others: Any) -> Stage:
        """A stage whose run directory goes on where it was stopped."""
        return self._stage(name, about, steps, outputs=(self.directory / name, *also), resumes=True, **others)

    def _name(self, name: str) -> str:
        return f"{self.cell}/{name}" if self.cell else name

    def _guided(self, reference: str) -> dict[str, Any]:
        return {"reference.checkpoint": self.directory / reference}

    def _train(self, name: str, overrides: Mapping[str, Any]) -> Command:
        words = self._words(name, overrides)
        return Command(("train", str(find_config(RUN_CONFIG, announce=False)), *words), reads=_content(RUN_CONFIG))

    def _words(self, name: str, overrides: Mapping[str, Any]) -> list[str]:
        everywhere = {
            "run_dir": self.directory / name,
            "data.tokenizer": self.directory / "tokenizer",
            "data.train": json.dumps([[1.0, str(self.directory / "data" / "train")]]),
            "data.valid": json.dumps([[1.0, str(self.directory / "data" / "heldout")]]),
            "data.cache_dir": self.directory / "data" / "cache",
            "seed": self.text.seed,
        }
        return [f"{key}={value}" for key, value in (everywhere | dict(overrides)).items()]

    def _posttrain(self, run: str, model: str, overrides: Mapping[str, Any]) -> Command:
        values = {
            "model": self.directory / "models" / model,
            "run_dir": self.directory / run,
            "data.train": json.dumps([str(self.directory / "text" / "problems.jsonl")]),
            "seed": self.text.seed,
        }
        if self.text.documents < ToyText.documents:
            # A trial of the chain: its few steps solve no problem, and a run without any gradient has failed.
            values["trl.entropy_coef"] = 1e-3
        words = [f"{key}={value}" for key, value in (values | dict(overrides)).items()]
        config = str(find_config(RL_CONFIG, announce=False))
        return Command(("posttrain", "rlvr", config, *words), reads=_content(RL_CONFIG))

    def _evaluation(self, name: str, model: Path) -> Call:
        arguments = {
            "model": str(model),
            "text": str(self.directory / "text"),
            "output": str(self.scores(name)),
            "seed": self.text.seed,
        }
        return Call(evaluate_to, arguments)


def write_text_of(directory: str, text: Mapping[str, Any]) -> None:
    """:func:`~remit_megatron.flywheel.toy.write_text` with arguments that JSON holds."""
    write_text(Path(directory), ToyText(**text))


def write_tokenizer_to(directory: str) -> None:
    """:func:`~remit_megatron.flywheel.toy.write_tokenizer` with an argument that JSON holds."""
    write_tokenizer(Path(directory))


def _content(config: str) -> str:
    return find_config(config, announce=False).read_text()


def _control(arm: Arm) -> tuple[Call, ...]:
    if arm.control is None:
        return ()
    from remit_megatron.flywheel.toy_controls import register

    return (Call(register, {"name": arm.control}),)


def _common_step(steps: Iterable[int]) -> int:
    import math

    return math.gcd(*steps)


def _in_order(stages: Sequence[Stage]) -> list[Stage]:
    """The same, each after those it needs; else in the order given."""
    placed: dict[str, Stage] = {}
    left = list(stages)
    while left:
        stage = next(stage for stage in left if placed.keys() >= set(stage.needs))
        placed[stage.name] = stage
        left.remove(stage)
    return list(placed.values())
