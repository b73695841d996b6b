"""Evaluation of a model on tasks: `teratron eval`."""

from teratron.tasks.evaluate.choice import Choice
from teratron.tasks.evaluate.lambada import Lambada
from teratron.tasks.evaluate.perplexity import Perplexity
from teratron.tasks.evaluate.report import Report, evaluate
from teratron.tasks.evaluate.task import Mistake, Options, Score, Task

TASKS: dict[str, type[Task]] = {"perplexity": Perplexity, "lambada": Lambada, "choice": Choice}
"""Every task by its name; a new one is a class of its own in this folder, and a line here."""

__all__ = ["TASKS", "Mistake", "Options", "Report", "Score", "Task", "evaluate"]
