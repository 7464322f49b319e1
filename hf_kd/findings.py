"""What the checks of a run found, and how it is shown."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Problem:
    """One thing that would make the run wrong.

    Attributes:
        option: The option or column to change.
        message: What is wrong, with the values, and the fix.
    """

    option: str
    message: str


@dataclass
class Report:
    """What the checks found.

    Attributes:
        problems: What has to change before training.
        warnings: What is probably not meant.
        facts: What was resolved, as (name, value) rows.
        example: One decoded example: (token, whether it counts) pairs, for token tasks.
        sparse: Whether the teacher answers with a few entries of its distribution.
    """

    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    models: list[tuple[str, str, str]] = field(default_factory=list)
    terms: list[tuple[str, str]] = field(default_factory=list)
    example: list[tuple[str, bool]] = field(default_factory=list)
    sparse: bool = False

    def add(self, option: str, message: str) -> None:
        """Note a problem."""
        self.problems.append(Problem(option, message))

    def raise_problems(self) -> None:
        """Raise one `ValueError` that lists every problem, or return if there is none."""
        if not self.problems:
            return
        if len(self.problems) == 1:
            raise ValueError(self.problems[0].message)
        lines = "\n".join(f"  {i}. {p.message}" for i, p in enumerate(self.problems, 1))
        raise ValueError(f"{len(self.problems)} problems before step 0:\n{lines}")

    def render(self, console: Console) -> None:
        """Print the report: models side by side, terms, supervision, an example, problems."""
        from rich.table import Table
        from rich.text import Text

        table = Table("", "teacher", "student", title="Models", title_justify="left")
        for row in self.models:
            table.add_row(*row)
        console.print(table)
        table = Table("weight", "term", title="Loss", title_justify="left")
        for term in self.terms:
            table.add_row(*term)
        console.print(table)
        for name, value in self.facts:
            console.print(Text.assemble((f"{name}: ", "bold"), value))
        if self.example:
            text = Text("first example (what counts is underlined): ")
            for token, counts in self.example:
                text.append(token, style="bold underline" if counts else "dim")
            console.print(text)
        for warning in self.warnings:
            console.print(Text(f"warning: {warning}", style="yellow"))
        for i, problem in enumerate(self.problems, 1):
            console.print(Text(f"problem {i}: {problem.message}", style="red"))
        if not self.problems:
            console.print(Text("no problems found", style="green"))
