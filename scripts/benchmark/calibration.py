"""What the model of a step takes, measured here, and how far off it is here."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from .collectives import Collective, Speed
from .crew import Crew, Member
from .links import LOOPBACK
from .measured import Measured
from .scaling import RANKS, Compute, Scaling
from .speeds import line
from .tracing import traced
from .trial import Say, take_rounds
from .ways import CORES, Way, ddp, distributed, muted, plain
from .zoo import CLASSES, Case

TRACED = 2  # processes in which a step is traced, and measured
CROWD = 4  # processes in which it is checked too, though there may be fewer cores
FACTORS = (0.5, 1.0, 2.0)  # of the case's rows, to fit compute to
_LOSS_ROWS = (2**10, 2**15)


@dataclass(frozen=True)
class Check:
    """A measured step beside the predicted one."""

    ranks: int
    way: str
    measured_s: float
    predicted_s: float

    @property
    def error(self) -> float:
        """How much the prediction is off, relative to what was measured."""
        return self.predicted_s / self.measured_s - 1


def calibrated(
    case: Case, speeds: dict[str, Speed], rounds: int, say: Say
) -> tuple[Scaling, list[Check]]:
    """The model of a case's steps, and how far off it is here with the whole batch fixed.

    What is checked is measured in the same rounds as the compute that predicts it, since the
    machine's speed changes from minute to minute.
    """
    model = Scaling(Compute(0, 0), {}, *_loss_and_inputs(case), _sent(case, say), speeds)
    ways = predicted_ways(TRACED)
    alone, mute = _alone(case, TRACED), [Measured(case, muted(way)) for way in ways]
    measured = [Measured(case, way) for way in (ONE, *ways)]
    take_rounds([*alone, *mute, *measured], TRACED, rounds, say)
    overhead_s = {w.name: _overhead_s(alone, m) for w, m in zip(ways, mute, strict=True)}
    model = replace(model, compute=_compute(alone), overhead_s=overhead_s)

    crowd = _alone(case, CROWD)
    crowded = [Measured(case, way) for way in predicted_ways(CROWD)]
    take_rounds([*crowd, *crowded], CROWD, rounds, say)
    in_crowd = replace(model, compute=_compute(crowd))
    return model, [_check(model, m) for m in measured] + [_check(in_crowd, m) for m in crowded]


def _alone(case: Case, processes: int) -> list[Measured]:
    way = replace(ALONE, processes=processes)
    return [Measured(replace(case, rows=round(case.rows * f)), way) for f in FACTORS]


def _compute(alone: Sequence[Measured]) -> Compute:
    rows = [m.case.rows / m.way.processes for m in alone]
    return Compute(*line(rows, [m.step_s for m in alone]))


def _overhead_s(alone: Sequence[Measured], mute: Measured) -> float:
    """What a mute step takes over a plain one of as many rows, in the same round."""
    plainly = alone[FACTORS.index(1.0)]
    return statistics.median(b - a for a, b in zip(plainly.seconds, mute.seconds, strict=True))


def _check(model: Scaling, measured: Measured) -> Check:
    ranks, way = measured.way.processes, measured.way.name
    rows = measured.case.rows / ranks
    predicted_s = model.compute.step_s(rows)
    if ranks > 1:
        predicted_s += max(1.0, ranks / CORES) * model.added_s(way, ranks, rows, LOOPBACK)
    return Check(ranks, way, measured.step_s, predicted_s)


def _sent(case: Case, say: Say) -> dict[str, dict[int, list[Collective]]]:
    """What each way sends in a step, by ranks; traced in `TRACED` processes."""
    sent: dict[str, dict[int, list[Collective]]] = {}
    for way in predicted_ways(TRACED):
        say(f"{case.name}: what {way.name} sends")
        sent[way.name] = {1: [], **traced(case, way, RANKS[1:])}
    return sent


def predicted_ways(processes: int) -> list[Way]:
    """Those that are predicted, in so many processes, as on as many machines."""
    wrapped = [distributed(batch, processes, batch) for batch in ("local", "global")]
    return [replace(way, apart=True) for way in (ddp("ddp-view", processes, view=True), *wrapped)]


ALONE = Way("alone", "plain torch, nothing sent", plain, TRACED, "own", threads=1)
ONE = replace(ALONE, name="one", processes=1)


def _loss_and_inputs(case: Case) -> tuple[float, float]:
    """Seconds of the loss and its gradient, and bytes of a batch, for each row."""
    torch.manual_seed(0)
    batch = case.batch(case.rows)
    with Crew(1) as crew:
        (loss_s,) = crew.ask(1, loss_row_s)
    return loss_s, sum(tensor.nbytes for tensor in batch) / case.rows


# In a process


def loss_row_s(member: Member) -> float:
    """Seconds of the loss and its gradient, for each row."""
    few, many = (_loss_s(rows) for rows in _LOSS_ROWS)
    return max(0.0, (many - few) / (_LOSS_ROWS[1] - _LOSS_ROWS[0]))


def _loss_s(rows: int) -> float:
    outputs = torch.randn(rows, CLASSES, requires_grad=True)
    targets = torch.randint(CLASSES, (rows,))
    taken = []
    for _ in range(20):
        begun_s = time.perf_counter()
        F.cross_entropy(outputs, targets).backward()
        taken.append(time.perf_counter() - begun_s)
    return min(taken)
