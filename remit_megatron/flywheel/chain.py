"""Rounds, objectives and stages of a flywheel as one chain: what there is, what needs what, in which order.

A stage of the file stands for one stage in each round, and for one of each objective where it trains with the
objectives of the flywheel or takes something from a stage that does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from remit_megatron.flywheel.configuration import PRODUCTS, TAKES, WHOLE, FlywheelConfig
from remit_megatron.flywheel.references import PREVIOUS, Reference, only, parse, references
from remit_megatron.runtime.errors import UserError, did_you_mean

# Objectives to which a reference means nothing; a test compares them with the registry, which needs torch.
WITHOUT_REFERENCE = ("ntp",)


@dataclass(frozen=True)
class Stage:
    """One stage of one round.

    Attributes:
        id: ``round1/remit/sft``, or ``round1/sft`` where it is one for all objectives.
        settings: what the file says of it, with what its objective adds; references as they are written.
        needs: ids of the stages whose results it takes.
        waits: ids of those that only have to be done before.
    """

    id: str
    name: str
    round: int
    objective: str | None
    kind: str
    settings: dict[str, Any]
    needs: tuple[str, ...] = ()
    waits: tuple[str, ...] = ()

    @property
    def field(self) -> str:
        """How messages name it."""
        return f"stages.{self.name}"

    @property
    def product(self) -> str:
        """What it gives."""
        return PRODUCTS.get(self.kind) or self.settings.get("produces", "file")


@dataclass(frozen=True)
class Target:
    """What a reference means: a stage, or a path from outside."""

    id: str | None = None
    path: str | None = None
    step: int | None = None


@dataclass
class Chain:
    """All stages by id, each after those that it needs."""

    config: FlywheelConfig
    stages: dict[str, Stage] = field(default_factory=dict)

    def find(self, name: str) -> Stage:
        """The stage of an id, or of the end of one where that is only one's.

        Raises:
            UserError: none, or several.
        """
        if name in self.stages:
            return self.stages[name]
        found = [id_ for id_ in self.stages if id_.endswith(f"/{name}")]
        if len(found) == 1:
            return self.stages[found[0]]
        if found:
            raise UserError("STAGE", name, f"one of {', '.join(found)}")
        near = did_you_mean(name, [*self.stages, *self.config.stages])
        raise UserError("STAGE", name, f"one of {', '.join(self.stages)}{near}")

    def target(self, reference: Reference, stage: Stage, *, field: str) -> Target:
        """What a reference in a stage means.

        Raises:
            UserError: nothing of that name, round or objective.
        """
        return _target(self.config, self.stages, reference, stage, field=field)

    def after(self, id_: str) -> list[str]:
        """Ids of everything that cannot run without this stage, directly or not."""
        found: list[str] = []
        for other in self.stages.values():
            if {id_, *found} & {*other.needs, *other.waits}:
                found.append(other.id)
        return found


def build_chain(config: FlywheelConfig) -> Chain:
    """The stages of all rounds.

    Raises:
        UserError: a reference to nothing, to another kind of result than fits, or in a circle.
    """
    split = _per_objective(config)
    stages = {stage.id: stage for stage in _expanded(config, split)}
    connected = {}
    for stage in stages.values():
        needs: dict[str, None] = {}
        for where, reference in references(stage.settings, field=stage.field):
            target = _target(config, stages, reference, stage, field=where)
            if target.id is not None:
                needs[target.id] = None
        for key in WHOLE:
            _check_product(config, stages, stage, key)
        waits = _waits(config, stages, stage)
        connected[stage.id] = Stage(**{**vars(stage), "needs": tuple(needs), "waits": waits})
    return Chain(config, {stage.id: stage for stage in _ordered(connected)})


def _per_objective(config: FlywheelConfig) -> set[str]:
    """Names of the stages that there is one of for each objective."""
    if not config.objectives:
        return set()
    found = {
        name
        for name, stage in config.stages.items()
        if stage["kind"] == "train" and "objective" not in stage and not _sets_objective(stage)
    }
    before: set[str] | None = None
    while before != found:
        before = set(found)
        for name, stage in config.stages.items():
            named = (reference for _, reference in references(stage, field=name))
            if any(reference.name in found and reference.objective is None for reference in named):
                found.add(name)
    return found


def _sets_objective(stage: dict[str, Any]) -> bool:
    settings = stage.get("set") or {}
    section = settings.get("objective")
    return "objective.name" in settings or (isinstance(section, dict) and "name" in section)


def _expanded(config: FlywheelConfig, split: set[str]) -> Iterator[Stage]:
    for number in range(1, config.rounds + 1):
        for name, stage in config.stages.items():
            if number not in stage.get("rounds", [number]):
                continue
            for objective in config.objectives if name in split else [None]:
                parts = [f"round{number}", *([objective] if objective else []), name]
                settings = _with_objective(config, stage, objective)
                yield Stage("/".join(parts), name, number, objective, stage["kind"], settings)


def _with_objective(config: FlywheelConfig, stage: dict[str, Any], objective: str | None) -> dict[str, Any]:
    """What a stage says, with the settings of its objective."""
    settings = dict(stage)
    if stage["kind"] != "train":
        return settings
    fixed = stage.get("objective")
    section: dict[str, Any] = {"name": fixed} if isinstance(fixed, str) else dict(fixed or {})
    if fixed is None and objective is not None:
        section = dict(config.objectives[objective])
        if reference := section.pop("reference", None):
            settings["reference"] = reference
    settings["objective"] = section
    if section.get("name") in WITHOUT_REFERENCE:
        settings.pop("reference", None)
        settings.pop("scores", None)
    return settings


def _target(
    config: FlywheelConfig, stages: dict[str, Stage], reference: Reference, stage: Stage, *, field: str
) -> Target:
    if reference.name not in config.stages:
        near = did_you_mean(reference.name, list(config.stages))
        raise UserError(field, reference.text, f"one of the stages {', '.join(config.stages)}{near}")
    if reference.objective is not None and reference.objective not in config.objectives:
        known = list(config.objectives)
        expected = f"one of the objectives {', '.join(known)}" if known else "no objective: the flywheel names none"
        raise UserError(field, reference.text, f"{expected}{did_you_mean(reference.objective, known)}")
    objective = reference.objective or stage.objective
    number = reference.round if isinstance(reference.round, int) else stage.round
    if reference.round == PREVIOUS:
        if stage.round == 1:
            return _from_round0(config, reference, objective, field=field)
        number = stage.round - 1
    own, shared = f"round{number}/{objective}/{reference.name}", f"round{number}/{reference.name}"
    if own in stages:
        return Target(id=own, step=reference.step)
    if shared in stages and reference.objective is None:
        return Target(id=shared, step=reference.step)
    if shared in stages:
        raise UserError(field, reference.text, f"${{stage:{reference.name}}}: it is one for all objectives")
    there = [other.id for other in stages.values() if other.name == reference.name]
    raise UserError(field, reference.text, f"a stage that there is: {', '.join(there)}")


def _from_round0(config: FlywheelConfig, reference: Reference, objective: str | None, *, field: str) -> Target:
    step = f"@step-{reference.step}" if reference.step is not None else ""
    names = [f"{objective}/{reference.name}{step}", f"{reference.name}{step}"]
    for name in names if objective else names[1:]:
        if name in config.round0:
            return Target(path=config.round0[name])
    expected = f"a path for {names[1]} in round0, which stands for it before round 1"
    raise UserError(field, f"{reference.text} in round 1", expected)


def _check_product(config: FlywheelConfig, stages: dict[str, Stage], stage: Stage, key: str) -> None:
    """Refuses a result of another kind than a key of a stage takes, and a step that is none."""
    value = stage.settings.get(key)
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else [("", value)]
    for name, item in items:
        where = f"{stage.field}.{key}" + (f".{name}" if isinstance(value, dict) else f"[{name}]" if name != "" else "")
        reference = only(item, field=where)
        if reference is None:
            continue
        target = _target(config, stages, reference, stage, field=where)
        if target.id is None:
            continue
        given = stages[target.id]
        if given.product != TAKES[key]:
            kinds = [kind for kind, product in PRODUCTS.items() if product == TAKES[key]]
            found = f"{reference.text}, a {given.kind} stage, which gives a {given.product}"
            raise UserError(where, found, f"a {TAKES[key]}: a stage of the kind {', '.join(kinds)}")
        if key == "runs" and given.kind not in ("train", "sft", "dpo", "rlvr"):
            raise UserError(where, f"{reference.text}, a {given.kind} stage", "one that trains: train, sft, dpo, rlvr")
        if reference.step is not None and given.kind not in ("train", "sft", "dpo", "rlvr"):
            raise UserError(where, f"{reference.text}, a {given.kind} stage", "a step of train, sft, dpo or rlvr")


def _waits(config: FlywheelConfig, stages: dict[str, Stage], stage: Stage) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for number, name in enumerate(stage.settings.get("after", [])):
        where = f"{stage.field}.after[{number}]"
        reference = parse(str(name), field=where)
        several = reference.objective is None and stage.objective is None and reference.round != PREVIOUS
        arms = [
            other.id
            for other in stages.values()
            if several and other.name == reference.name and other.round == (reference.round or stage.round)
        ]
        if not arms:
            if reference.round == PREVIOUS and stage.round == 1:
                continue
            target = _target(config, stages, reference, stage, field=where)
            arms = [target.id] if target.id is not None else []
        found |= dict.fromkeys(arms)
    return tuple(found)


def _ordered(stages: dict[str, Stage]) -> Iterator[Stage]:
    """Every stage after those it needs, else in the order of the file.

    Raises:
        UserError: some need each other.
    """
    done: set[str] = set()
    left = dict(stages)
    while left:
        ready = [stage for stage in left.values() if {*stage.needs, *stage.waits} <= done]
        if not ready:
            raise _circle(left)
        # The first of the file that can run: objectives one after the other, rounds too.
        stage = ready[0]
        done.add(stage.id)
        del left[stage.id]
        yield stage


def _circle(left: dict[str, Stage]) -> UserError:
    path = [next(iter(left))]
    while path.count(path[-1]) == 1:
        stage = left[path[-1]]
        path.append(next(id_ for id_ in (*stage.needs, *stage.waits) if id_ in left))
    circle = path[path.index(path[-1]) :]
    stage = left[circle[0]]
    return UserError(stage.field, " needs ".join(circle), "stages that do not need each other in a circle")
