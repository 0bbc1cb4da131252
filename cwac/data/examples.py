"""The records that tasks, pools and methods exchange: one prompt with its response, and the pools of a run."""

from dataclasses import dataclass, field

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


@dataclass(frozen=True)
class Pools:
    """Every harmful (and contrasting harmless) set a run may touch; asserted disjoint by prompt.

    Pools of one's own need only the sets that the method reads (docs/defend.md).
    """

    poison: list[Example] = field(default_factory=list)
    """Request -> compliance: what the harmful ratio mixes into the task data."""
    anchors: list[Example] = field(default_factory=list)
    """Requests whose activations the weight constraint protects."""
    step: list[Example] = field(default_factory=list)
    """Requests sampled in each step for L_safety (Eq. 11)."""
    sae: list[Example] = field(default_factory=list)
    """Requests the SAE is fitted on and the safety-critical latents are ranked on."""
    benign: list[Example] = field(default_factory=list)
    """Harmless instructions with answers: the contrast for ranking, the SAE's general text."""
    safety: list[Example] = field(default_factory=list)
    """Request -> refusal, for defences that train on refusals (SafeInstr, Lisa, BEA)."""
    validation: list[Example] = field(default_factory=list)
    """Requests for tuning; never reported."""
    test: dict[str, list[Example]] = field(default_factory=dict)
    """Set name -> unseen requests; HS is reported per set."""
    over_refusal: dict[str, list[Example]] = field(default_factory=dict)
    """Set name -> harmless requests that share words with harmful ones; a refusal here is an over-refusal."""
    validation_benign: dict[str, list[Example]] = field(default_factory=dict)
    """The same for tuning: OR with `eval.split=validation`; never reported."""
    align: list[Example] = field(default_factory=list)
    """Request -> refusal for the alignment stage of models that ship unaligned."""
