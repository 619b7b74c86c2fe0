"""What the scheduler counts, for metrics."""

from __future__ import annotations

from dataclasses import dataclass

from .events import FinishReason


@dataclass(frozen=True)
class Stats:
    """Gauges of this moment, then counters since the scheduler was made (names ending in ``_total``)."""

    queued: int
    active: int
    slots: int
    free_slots: int
    queue_limit: int
    requests_total: int
    rejected_total: int
    completed_total: int
    cancelled_total: int
    failed_total: int
    prompt_tokens_total: int
    generated_tokens_total: int
    steps_total: int


@dataclass
class Counters:
    """The running totals; whoever holds one guards it with a lock."""

    requests: int = 0
    rejected: int = 0
    completed: int = 0
    cancelled: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0

    def finish(self, reason: FinishReason) -> None:
        """Count a request that ended."""
        self.cancelled += reason == "cancelled"
        self.failed += reason == "error"
        self.completed += reason in ("eos", "stop", "length")

    def stats(self, queued: int, active: int, slots: int, queue_limit: int) -> Stats:
        """The totals beside the gauges."""
        return Stats(
            queued=queued,
            active=active,
            slots=slots,
            free_slots=slots - active,
            queue_limit=queue_limit,
            requests_total=self.requests,
            rejected_total=self.rejected,
            completed_total=self.completed,
            cancelled_total=self.cancelled,
            failed_total=self.failed,
            prompt_tokens_total=self.prompt_tokens,
            generated_tokens_total=self.generated_tokens,
            steps_total=self.steps,
        )
