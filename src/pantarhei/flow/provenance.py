"""Where a flow comes from: what decides which questions it may be asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# Couplings that no coupling object has: of a flow from a file which does not say it, of a sampler of a few steps, and of one
# whose weights were led to what somebody measures.
NOT_STATED = "not stated in the file"
DISTILLED = "distilled"
TUNED = "tuned to a measure of its samples"


@dataclass(frozen=True)
class Provenance:
    """Where a flow comes from, as far as it decides what may be asked of it.

    Attributes:
        coupling: how x0 and x1 were paired in training.
        rectified: how many times the coupling was replaced by the flow's own (reflow rounds).
        data: what it was trained on.
        teacher: what made its pairs, where it has any.
        notes: anything else worth keeping (guidance in the pairs, licence of the teacher).
    """

    coupling: str = "independent"
    rectified: int = 0
    data: str = ""
    teacher: str = ""
    notes: dict[str, Any] = field(default_factory=dict)

    def why_not_marginal(self) -> str | None:
        """Why x0 given x_t is not the denoising noise of the data, or None where it is."""
        if self.rectified:
            return f"this flow was rectified {self.rectified}x: its noise and data are no longer independent"
        if self.coupling == TUNED:
            return f"this flow was {TUNED}: it is no denoiser of them"
        if self.coupling != "independent":
            return f"this flow was trained with the coupling {self.coupling!r}: its noise and data are not independent"
        return None

    def why_not_density(self) -> str | None:
        """Why the flow's density is not an estimate of the data's, or None where it is (any coupling keeps it)."""
        return self.why_not_marginal() if self.rectified or self.coupling in (NOT_STATED, TUNED) else None

    def why_not_field(self) -> str | None:
        """Why the network is no velocity field at all times, or None where it is."""
        if self.coupling != DISTILLED:
            return None
        steps = self.notes.get("steps", "a few")
        return f"this flow was distilled to {steps} steps: between them its velocity means nothing"
