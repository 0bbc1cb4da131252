"""Named harmful splits, disjoint by prompt: no defence may learn from what it is tested on."""

from dataclasses import dataclass, field

from cwac.data.examples import Example


@dataclass(frozen=True)
class Pools:
    """Every harmful (and contrasting harmless) set a run may touch; asserted disjoint by prompt."""

    poison: list[Example]
    """Request -> compliance: what the harmful ratio mixes into the task data."""
    anchors: list[Example]
    """Requests whose activations the weight constraint protects."""
    step: list[Example]
    """Requests sampled in each step for L_safety (Eq. 11)."""
    sae: list[Example]
    """Requests the SAE is fitted on and the safety-critical latents are ranked on."""
    benign: list[Example]
    """Harmless instructions with answers: the contrast for ranking, the SAE's general text."""
    safety: list[Example]
    """Request -> refusal, for defences that train on refusals (SafeInstr, Lisa, BEA)."""
    validation: list[Example]
    """Requests for tuning; never reported."""
    test: dict[str, list[Example]] = field(default_factory=dict)
    """Set name -> unseen requests; HS is reported per set."""
    over_refusal: dict[str, list[Example]] = field(default_factory=dict)
    """Set name -> harmless requests that share words with harmful ones; a refusal here is an over-refusal."""
    align: list[Example] = field(default_factory=list)
    """Request -> refusal for the alignment stage of models that ship unaligned."""
