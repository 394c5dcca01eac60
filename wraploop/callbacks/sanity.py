"""Finding out at once whether a phase can run: its first step, tried out beforehand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm.auto import tqdm
from typing_extensions import override

from wraploop import processes
from wraploop.callback import Callback, on
from wraploop.callbacks.checks import (
    STANDARD_CHECKS,
    Check,
    NotSeen,
    described,
    is_number,
    listed,
    said,
)
from wraploop.callbacks.seen import Seen, first_step
from wraploop.events import EpochBegin
from wraploop.running import number

if TYPE_CHECKING:
    from wraploop.learner import Learner


class SanityCheckError(RuntimeError):
    """A check has failed; the message is the report, the cause what the step raised."""


class SanityCheck(Callback):
    """Tries the first step of each phase on copies, and ends the fit if a check fails.

    It does so at the phase's first EpochBegin, before anything is trained; nothing is changed by
    it, and no batch or random number lost. The report is printed on rank 0. Of the other callbacks,
    only those that write `step.batch` take part in the step, as copies. Batches that are an
    iterator are left alone, and what needs a step is then not checked.

    Args:
        checks: replace the standard ones, which are `STANDARD_CHECKS`.

    Raises:
        SanityCheckError: on every rank, when a check has failed that is an error.

    Examples:
        >>> import torch
        >>> from wraploop.learner import Learner
        >>> data = [(torch.ones(4, 2), torch.ones(4, 1))] * 8
        >>> learner = Learner(
        ...     torch.nn.Linear(2, 1), torch.nn.L1Loss(), optimizer=torch.optim.SGD, data=data,
        ...     callbacks=[SanityCheck()], default_callbacks=False,
        ... )
        >>> learner.fit(1)  # doctest: +ELLIPSIS
        SanityCheck of TrainingPhase
          batch      (float32 (4, 2), float32 (4, 1))
          outputs    float32 (4, 1)
          loss       ...
          gradients  norm 1.732 (optimizer)
          ok       there are batches
          ok       the step runs
          ok       losses are finite numbers
          ok       some parameter changes
          ok       gradients are finite
          ok       every parameter gets a gradient
          warning  there is validation data: there is none: Learner(data=(training, validation))
    """

    reads = ("callbacks", "data", "loss_fn", "model", "optimizer", "phases", "step")

    def __init__(self, *checks: Check) -> None:
        for check in checks:
            if not isinstance(check, Check):
                raise TypeError(f"Expected a Check(name, function), and got {check!r}.")
        self.checks = checks or STANDARD_CHECKS
        self._passed: set[str] = set()

    @override
    def attach(self, learner: Learner) -> None:
        self._passed = set()

    @on(EpochBegin)
    def check(self, learner: Learner) -> None:
        """Tries the phase's first step, unless that has been done."""
        phase = learner.phase
        if phase.name in self._passed:
            return
        seen = first_step(learner)
        verdicts = [_verdict(c, seen) for c in self.checks if isinstance(phase, c.phase)]
        report = "\n".join([f"SanityCheck of {phase.name}", *_told(seen), *map(str, verdicts)])
        if processes.is_main_process():
            tqdm.write(report)
        if any(verdict.is_error for verdict in verdicts):
            raise SanityCheckError(report) from seen.error
        self._passed.add(phase.name)


class _Verdict(NamedTuple):
    """What a check has found, on all processes alike."""

    name: str
    mark: str
    wrong: str = ""

    @property
    def is_error(self) -> bool:
        return self.mark == "ERROR"

    def __str__(self) -> str:
        return f"  {self.mark:<8} {self.name}{': ' * bool(self.wrong)}{self.wrong}"


def _verdict(check: Check, seen: Seen) -> _Verdict:
    mark, wrong = "ok", ""
    try:
        wrong = check.function(seen)
    except NotSeen:
        mark = "-"
    except Exception as error:
        wrong = f"the check itself raised {said(error)}"
    if processes.any(wrong != "", "what SanityCheck finds"):
        wrong = wrong or "so another process finds"
        mark = "ERROR" if check.is_error else "warning"
    return _Verdict(check.name, mark, wrong)


def _told(seen: Seen) -> list[str]:
    """What was seen, a line for each."""
    told = {"no step": seen.note, "batch": described(seen.batch) if seen.has_batch else ""}
    if "outputs" in seen.stored:
        told["outputs"] = described(seen.stored["outputs"])
    told |= {name: _shown(loss) for name, loss in seen.losses.items()}
    norms = [f"{norm:.4g} ({name})" for name, norm in seen.gradient_norms]
    told["gradients"] = f"norm {', '.join(norms)}" if norms else ""
    told["unchanged"] = listed(seen.unchanged) if seen.gradient_norms else ""
    told["raised"] = said(seen.error) if seen.error else ""
    return [f"  {name:<10} {what}" for name, what in told.items() if what]


def _shown(loss: Any) -> str:
    return f"{number(loss):.5g}" if is_number(loss) else described(loss)
