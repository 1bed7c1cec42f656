"""What drafting has been worth: what steps took, beside what plain ones would have taken for the same tokens.

    speed-up = sum(tokens of a request * seconds of a plain step) / sum(seconds of the step)

over steps that decode and read no prompt. A plain step takes what it takes, so it counts as one times plain decoding;
of other steps the clock says what a plain one of that batch would take. So the figure holds trials that failed, and
passes whose drafts were lost. It does not hold what prompts take, which is the same either way.
"""

from dataclasses import dataclass


@dataclass
class Worth:
    """Since the start."""

    seconds: float = 0.0
    plain: float = 0.0  # seconds that plain steps would have taken

    def add(self, seconds: float, plain_step: float, tokens: int, requests: int) -> None:
        """tokens: of all requests; plain_step: seconds of a step that gives each of them one."""
        self.seconds += seconds
        self.plain += plain_step * tokens / requests

    @property
    def speed_up(self) -> float | None:
        return self.plain / self.seconds if self.seconds else None
