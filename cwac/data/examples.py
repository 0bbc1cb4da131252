"""The one record that tasks, harmful pools and methods exchange."""

from dataclasses import dataclass

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Example:
    """A prompt and the response a model is trained on or scored against."""

    id: str
    """Unique within its source; written to `data.json` and to every generation file."""
    prompt: str
    """The user's turn, before any chat template."""
    response: str = ""
    """The training target. Empty where only the prompt is used."""
    label: str | None = None
    """What the scorer compares with: a class name, a number; None for open answers."""
    system: str | None = None
    """A system turn; None leaves the model's own default in place."""
    source: str = ""
    """The data set or pool it came from, e.g. `advbench`."""
    group: str = ""
    """A harm category or a benign skill; used for breakdowns only."""
    extra_tokens: int = 0
    """Tokens that a method added to the prompt; the row may exceed the maximum length by them."""
    input: str = ""
    """What the instruction is about, where it is a text of its own; `prompt` ends in it. The Alpaca template puts it
    into a section of its own."""

    @property
    def messages(self) -> Messages:
        """The conversation up to the model's turn."""
        system = [{"role": "system", "content": self.system}] if self.system is not None else []
        user = {"role": "user", "content": self.prompt} | ({"input": self.input} if self.input else {})
        return [*system, user]
