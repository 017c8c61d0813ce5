"""The validation part: rows that are not trained on, which choose the best state of a run. The test part chooses nothing."""

from torch import Tensor

from training.distributed import Distributed
from training.evaluation import Examples, ModelRunner, evaluate, macro_f1
from training.optimizer import trained_parameters

LOOKS = 10  # at the validation part, in a whole run


class Validation:
    """Computes the macro-F1 of the validation part LOOKS times a run, and keeps the trained parameters of the best look.

    Without a validation part it does nothing. The score is that of all processes together, so they all decide alike.
    `patience`: the run ends after so many looks that were no better than the best one [it does not end early].
    """

    def __init__(
        self, runner: ModelRunner, examples: Examples | None, num_labels: int, processes: Distributed, patience: int | None
    ):
        self.runner, self.examples, self.num_labels, self.processes = runner, examples, num_labels, processes
        self.patience = patience
        self.looks: list[tuple[int, float]] = []  # step and macro-F1 of each
        self.best: dict[str, Tensor] = {}  # the trained parameters of the best look, by name

    def is_due(self, step: int, steps: int) -> bool:
        """LOOKS times in `steps`, as evenly as possible, the last time at the end."""
        return self.examples is not None and step * LOOKS // steps > (step - 1) * LOOKS // steps

    def look(self, step: int) -> float:
        """The macro-F1 after `step`. Leaves the model in training mode."""
        assert self.examples is not None
        score = macro_f1(evaluate(self.runner, self.examples, self.num_labels, self.processes, title=None))
        self.runner.model.train()
        self.looks.append((step, score))
        if self.best_look() == (step, score):
            self.best = {name: p.detach().clone() for name, p in trained_parameters(self.runner.model).items()}
        return score

    def best_look(self) -> tuple[int, float]:
        """Step and macro-F1. Of several equal ones the first."""
        return max(self.looks, key=lambda look: look[1])

    def ends_the_run(self) -> bool:
        if self.patience is None or not self.looks:
            return False
        return len(self.looks) - 1 - self.looks.index(self.best_look()) >= self.patience

    def keep_best(self) -> tuple[int, float] | None:
        """Give the trained parameters the values of the best look, and say which it was. None if there was no look."""
        for name, parameter in trained_parameters(self.runner.model).items():
            if name in self.best:
                parameter.data.copy_(self.best[name])
        return self.best_look() if self.looks else None
