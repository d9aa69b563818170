"""Store an engine's and the reference's answers, and measure their difference."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from safetensors.torch import load_file, save_file
from torch import Tensor

from tools.checks.engines.cases import Case

TOLERANCE = 1e-4  # for a log-probability, against float64


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """Hold greedy tokens (n,) and log-probabilities of the whole vocabulary (n, V)."""

    tokens: Tensor
    logprobs: Tensor


Answers = dict[str, Answer]  # by the case's name
Found = tuple[dict[str, Answers], dict[str, Any]]  # answers by way, and facts


def alone_and_batched(
    ask: Callable[[list[Any]], list[Answer]],
    name: str,
    request: Callable[[Case], Any],
    cases: Sequence[Case],
) -> dict[str, Answers]:
    """Ask an engine for the cases one by one, and for all of them together."""
    alone = {each.name: ask([request(each)])[0] for each in cases}
    answers = ask([request(each) for each in cases])
    batched = {each.name: answer for each, answer in zip(cases, answers, strict=True)}
    return {name: alone, f"{name}, batched": batched}


def save_answers(path: Path, answers: Mapping[str, Answer]) -> None:
    """Write answers to a file, for another process."""
    tensors = {}
    for name, answer in answers.items():
        tensors[f"{name}.tokens"] = answer.tokens.contiguous()
        tensors[f"{name}.logprobs"] = answer.logprobs.contiguous()
    save_file(tensors, path)


def child_command(
    doc: str | None, scenarios: Mapping[str, Callable[[Path], Found]]
) -> click.Command:
    """Return a child command for one scenario, which writes answers and facts to files."""

    @click.command(help=doc)
    @click.argument("scenario", type=click.Choice(list(scenarios)))
    @click.argument("name")
    @click.argument("work", type=click.Path(exists=True, file_okay=False, path_type=Path))
    def main(scenario: str, name: str, work: Path) -> None:
        answers, facts = scenarios[scenario](work)
        for way, of_way in answers.items():
            save_answers(work / "answers" / name / f"{way}.safetensors", of_way)
        (work / "facts" / f"{name}.json").write_text(json.dumps(facts))

    return main


def load_answers(path: Path) -> Answers:
    """Read what `save_answers` wrote."""
    tensors = load_file(path)
    names = [key.removesuffix(".tokens") for key in tensors if key.endswith(".tokens")]
    return {name: Answer(tensors[f"{name}.tokens"], tensors[f"{name}.logprobs"]) for name in names}


@dataclass(frozen=True, slots=True)
class Result:
    """Hold one line of the table: the comparison and its result.

    Attributes:
        scenario: the way into the engine, such as "features, offline".
        case: the prompt.
        tokens: the number of equal greedy tokens from the first token, and the number of all
            tokens.
        distance: the largest difference of a log-probability, as long as tokens are equal.
        must_differ: whether the case is a control, whose distance must exceed CONTROL_DISTANCE.
        fact: the fault of a failed line, or another fact.
        passed: whether the line passed.
    """

    scenario: str
    case: str
    tokens: str
    distance: float
    must_differ: bool
    fact: str
    passed: bool


CONTROL_DISTANCE = 100 * TOLERANCE


def compare(
    scenario: str, name: str, answer: Answer, reference: Answer, *, must_differ: bool = False
) -> Result:
    """Compare an answer with the reference, token by token until they differ."""
    same = (answer.tokens == reference.tokens).long().cumprod(0)
    n_same, n = int(same.sum()), len(same)
    first = answer.logprobs[: n_same + 1] - reference.logprobs[: n_same + 1]
    distance = float(first.double().abs().max())
    if must_differ:
        passed = distance > CONTROL_DISTANCE
    else:
        passed = n_same == n and distance <= TOLERANCE  # False for NaN
    return Result(scenario, name, f"{n_same}/{n}", distance, must_differ, "", passed)


def plain(scenario: str, name: str, passed: bool, fact: str) -> Result:
    """Return the line of a scenario that compares no answers."""
    return Result(scenario, name, "", 0.0, False, fact, passed)


def table(results: Sequence[Result]) -> str:
    """Format the results as text, one line each."""
    lines = [f"{'scenario':<34} {'case':<26} {'tokens':>6} {'distance':>9}  result"]
    for row in results:
        distance = f"{row.distance:9.1e}" if row.tokens else " " * 9
        expected = "differs, as it must" if row.must_differ else "equal"
        verdict = row.fact if row.fact and row.passed else expected
        if not row.passed:
            verdict = f"FAILED {row.fact or 'must differ' if row.must_differ else row.fact}"
        lines.append(
            f"{row.scenario:<34} {row.case:<26} {row.tokens:>6} {distance}  {verdict}".rstrip()
        )
    return "\n".join(lines)


def as_json(results: Sequence[Result]) -> list[dict[str, object]]:
    """Return the results as JSON."""
    return [asdict(row) for row in results]
