"""What a policy sees (`View`) and what it answers (`Plan`): the whole interface between the two.

A policy is pure: the same view gives the same plan. What it wants to remember travels in the plan's
`memory` and comes back in the next view. It never sees how long an answer will be. Both types are
NamedTuples because one of each is made per iteration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from sim.core.finetune import JobView, Slice
from sim.core.queue import ORDERS, AdmissionQueue
from sim.core.sequence import Sequence
from sim.core.work import Work


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one pipeline can hold at once."""

    kv_tokens: int
    """Room for cached keys and values of inference, rounded down to whole blocks."""
    block_tokens: int = 16
    max_sequences: int = 256
    max_tokens: int = 512
    """Inference tokens of one iteration."""
    max_sequence_tokens: int = 8192
    """Prompt and output of one request; longer prompts are rejected, longer outputs cut."""
    admission: str = "fcfs"
    """Order of the waiting requests: fcfs, deadline (earliest first), shortest (prompt first)."""
    lookahead: int = 0
    """Iterations planned ahead of the one that runs, so that planning hides behind it: 0 or 1."""

    def __post_init__(self) -> None:
        for key in ("kv_tokens", "block_tokens", "max_sequences", "max_sequence_tokens"):
            if getattr(self, key) < 1:
                raise ValueError(f"cluster.limits.{key} must be at least 1, got {getattr(self, key)}")
        if self.kv_tokens < self.block_tokens:
            raise ValueError(
                f"cluster.limits.kv_tokens must hold a block of {self.block_tokens} tokens, "
                f"got {self.kv_tokens}"
            )
        if self.max_tokens < self.max_sequences:
            raise ValueError(
                f"cluster.limits.max_tokens must be at least max_sequences {self.max_sequences}, since "
                f"all running sequences decode together, got {self.max_tokens}"
            )
        if self.admission not in ORDERS:
            raise ValueError(
                f"cluster.limits.admission must be one of {', '.join(ORDERS)}, got {self.admission!r}"
            )
        if self.lookahead not in (0, 1):
            raise ValueError(f"cluster.limits.lookahead must be 0 or 1, got {self.lookahead}")


class Victim(NamedTuple):
    """A running sequence as a candidate for preemption."""

    id: int
    blocks: int
    """Released by preempting it."""
    decoding: bool
    context_tokens: int
    grows: bool
    """It would take another block in the coming decode."""
    adapter: str | None


class Feedback(NamedTuple):
    """The last iteration that ended: its shape, what the policy predicted, what it took."""

    iteration: int
    work: Work
    predicted_s: float | None
    actual_s: float


class View(NamedTuple):
    """The state of one pipeline as its policy sees it. Read-only by contract; a test holds it."""

    now_s: float
    start_s: float
    """When the planned iteration will start: now, or with a lookahead when the running one is predicted to
    end."""
    limits: Limits
    decode_work: Work
    """The iteration that only decodes every decoding sequence."""
    growth_blocks: int
    """Blocks that the coming decode of all decoding sequences takes."""
    free_blocks: int
    running: int
    """Admitted sequences: decoding and prefilling."""
    prefilling: Seq[Sequence]
    """Admitted sequences whose known tokens are not all computed, in order of admission."""
    waiting: AdmissionQueue
    jobs: tuple[JobView, ...]
    """Jobs with work to do, the one furthest behind its share first."""
    adapters: Mapping[str, int]
    """Adapter -> decoding sequences that use it."""
    token_deadline_s: float
    """Earliest time at which some decoding sequence must have its next token to keep its mean TPOT;
    `inf` when none decodes or none has a bound."""
    answer_pace_s: float
    """Seconds per iteration with which the answers of decoding sequences are expected to end within their
    end-to-end bounds; `inf` when none decodes or none has a bound."""
    late_first_tokens: float
    """Share of the last requests of the worst SLO class whose first token came later than its bound."""
    late_answers: float
    """Share of the last answers of the worst SLO class that ended later than a bound."""
    arrived: int
    """Requests that have arrived so far."""
    last: Feedback | None
    memory: Any
    """`Plan.memory` of the last plan; None at first."""
    victims: Callable[[], Iterator[Victim]]
    """Candidates for preemption, last admitted first."""

    @property
    def decode_count(self) -> int:
        return self.decode_work.decode_count

    @property
    def decode_context_tokens(self) -> int:
        return self.decode_work.decode_context_tokens

    @property
    def late_share(self) -> float:
        """Of both, added up."""
        return self.late_first_tokens + self.late_answers


class Plan(NamedTuple):
    """The decision for one iteration."""

    decode: bool = False
    """All decoding sequences get their next token, or none does; may be True where none decodes."""
    prefills: tuple[tuple[int, int], ...] = ()
    """(sequence id, tokens): chunks of admitted sequences, or of the first waiting ones, admitted."""
    preempted: tuple[int, ...] = ()
    """Sequence ids, in order; each goes back to the queue's front. Excludes admissions."""
    finetune: tuple[Slice, ...] = ()
    overlap: bool = False
    """Windows and backward on a second stream beside inference, instead of inside its kernels."""
    predicted_s: float | None = None
    memory: Any = None


LATER = Plan()
"""The answer, this very object, of a policy that may not plan now and will be asked again: unlike any other
empty plan it says nothing of the work that waits."""


class Policy(Protocol):
    """A pure rule from view to plan. `serves` tells the router whether requests may come here, `finetunes`
    whether memory must be kept for samples in flight."""

    serves: bool
    finetunes: bool

    def plan(self, view: View) -> Plan:
        """Decide the next iteration; a plan without work means: nothing to do until something arrives."""
        ...


class ClusterPolicy(Protocol):
    """A rule for the whole cluster: which policy each pipeline runs."""

    def assign(self, pipelines: int) -> list[Policy]: ...
