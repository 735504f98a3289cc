"""Commit rules: which of a step's proposals become final. One small class a rule, named as in the literature.

What is special about it:
- a rule decides for one block of one request at a time, from what a step found out about its slots, on the CPU;
- what it remembers between steps lies in the rule, and every request has a rule of its own;
- every rule commits at least one slot a step, so a block ends after as many steps as it has slots.

To add one, write a subclass of `CommitRule` and put it into `RULES`: Python, the command line, the server, the
benchmarks and the evaluation then know it as `commit="name:setting=value"`.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vidlada.decoding.named import check_named, parse_named
from vidlada.errors import InputError
from vidlada.generation import MAX_SLOTS, GenerationSettings
from vidlada.settings import setting


@dataclass(frozen=True)
class Proposals:
    """What a step found out about the slots of a block; all (block,).

    Attributes:
        tokens: proposed for each slot.
        confidence: float64, what slots are ranked by: the proposal's probability, or random numbers.
        open: slots that may be committed; at least one.
        measured: float64, what the rule's `measure` asks for; None if it asks for nothing.
    """

    tokens: Tensor
    confidence: Tensor
    open: Tensor
    measured: Tensor | None = None


class CommitRule:
    """Base of all rules.

    Attributes:
        name: in settings.
        measure: a further figure of every slot's distribution that the rule needs: `entropy` in nats, or `gap` between
            the two highest logits.
        paced: follows the number of steps that was asked for.
        revokes: may take committed tokens of the current block back.
    """

    name: ClassVar[str]
    measure: ClassVar[str | None] = None
    paced: ClassVar[bool] = False
    revokes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_named("commit", self)

    def begin_block(self, masked: int, steps: int) -> None:
        """Forget the block before.

        Args:
            masked: slots of the new block that are to be filled.
            steps: it may take, for rules that are paced.
        """

    def adjust(self, logits: Tensor) -> Tensor:
        """The logits (block, vocabulary) that proposals and their probabilities are taken from; once a step."""
        return logits

    def choose(self, proposals: Proposals) -> Tensor:
        """Slots to commit: boolean (block,), a non-empty part of the open ones."""
        raise NotImplementedError

    def revoke(self, probability: Tensor, drafted: Tensor) -> Tensor:
        """Slots to mask again, boolean (block,); asked before `choose`, of rules that revoke.

        Args:
            probability: (block,) of each committed token, predicted without it.
            drafted: boolean (block,): tokens that may be taken back.
        """
        return torch.zeros_like(drafted)

    def kept_bytes(self, block: int, vocabulary: int) -> int:
        """Memory of what the rule keeps between steps, for a block of so many slots."""
        return 0


def spread(masked: int, steps: int, step: int) -> int:
    """Tokens to commit in one step of a block: as even as possible, the first steps take the remainder.

    Args:
        masked: open slots of the block when it began.
        steps: steps it may take.
        step: number of the step in the block.
    """
    base, more = divmod(masked, steps)
    return base + (step < more)


def most_confident(confidence: Tensor, open_slots: Tensor, count: int) -> Tensor:
    """The `count` most confident open slots, or all of them if there are fewer.

    Args:
        confidence: (block,).
        open_slots: boolean (block,): slots that may be committed.
        count: how many to commit.

    Returns:
        Boolean (block,).
    """
    ranked = confidence.masked_fill(~open_slots, -torch.inf)
    chosen = torch.zeros_like(open_slots)
    chosen[ranked.topk(min(count, int(open_slots.sum()))).indices] = True
    return chosen


def or_most_confident(chosen: Tensor, proposals: Proposals) -> Tensor:
    """The chosen slots, or the most confident open one where none was chosen."""
    return chosen if bool(chosen.any()) else most_confident(proposals.confidence, proposals.open, 1)


@dataclass
class TopK(CommitRule):
    """LLaDA's: the k most confident slots, so that a block takes the steps it was given.

    Args:
        tokens: k; by default a block's slots are spread evenly over its steps.
    """

    name: ClassVar[str] = "topk"
    paced: ClassVar[bool] = True
    tokens: int | None = setting(None, "Slots to commit in a step.", minimum=1, maximum=MAX_SLOTS)

    def begin_block(self, masked: int, steps: int) -> None:
        """See `CommitRule`."""
        steps = min(steps, masked) if self.tokens is None else -(-masked // self.tokens)
        self.masked, self.steps, self.step = masked, max(1, steps), 0

    def choose(self, proposals: Proposals) -> Tensor:
        """See `CommitRule`."""
        count = self.tokens or max(1, spread(self.masked, self.steps, self.step))
        self.step += 1
        return most_confident(proposals.confidence, proposals.open, count)


@dataclass
class Threshold(CommitRule):
    """Fast-dLLM's: every slot more confident than a threshold.

    Args:
        confidence: that threshold.
    """

    name: ClassVar[str] = "threshold"
    confidence: float = setting(0.9, "Commit every slot more confident than this.", above=0, maximum=1)

    def choose(self, proposals: Proposals) -> Tensor:
        """See `CommitRule`."""
        return or_most_confident(proposals.open & (proposals.confidence > self.confidence), proposals)


@dataclass
class Factor(CommitRule):
    """Fast-dLLM's: the n most confident slots for the largest n with (n + 1)(1 - confidence of the n-th) < factor.

    Args:
        factor: that bound.
    """

    name: ClassVar[str] = "factor"
    factor: float = setting(1.0, "The bound.", above=0, maximum=10**6)

    def choose(self, proposals: Proposals) -> Tensor:
        """See `CommitRule`."""
        ranked = proposals.confidence[proposals.open].sort(descending=True).values
        counts = torch.arange(1, len(ranked) + 1, device=ranked.device)
        fits = ((counts + 1) * (1 - ranked) < self.factor).nonzero()
        return most_confident(proposals.confidence, proposals.open, int(fits[-1]) + 1 if len(fits) else 1)


@dataclass
class Credit(CommitRule):
    """CreditDecoding (arXiv 2510.06133): what was proposed again and again gets more confident.

    Every step decays all credits and gives the most probable token of each slot its probability to the power of
    `power`; `strength` × log(1 + credit) is added to its logit. Slots above a threshold are committed.

    Args:
        decay: of all credits in every step.
        power: of the probability; below 1, unsure proposals earn more.
        strength: of the credits.
        confidence: threshold.
    """

    name: ClassVar[str] = "credit"
    decay: float = setting(0.65, "What is left of a credit after a step.", minimum=0, maximum=1)
    power: float = setting(0.5, "Of the probability that is credited.", above=0, maximum=10)
    strength: float = setting(0.7, "Of the credits, beside the logits.", minimum=0, maximum=100)
    confidence: float = setting(0.9, "Commit every slot more confident than this.", above=0, maximum=1)

    def begin_block(self, masked: int, steps: int) -> None:
        """See `CommitRule`."""
        self.credit: Tensor | None = None  # (block, vocabulary)

    def adjust(self, logits: Tensor) -> Tensor:
        """See `CommitRule`."""
        if self.credit is None:
            self.credit = torch.zeros_like(logits)
        best = logits.argmax(-1, keepdim=True)
        earned = logits.softmax(-1).gather(-1, best) ** self.power
        self.credit = (self.credit * self.decay).scatter_add_(-1, best, earned)  # not in place: see `rollback`
        return logits + self.strength * self.credit.log1p()

    def kept_bytes(self, block: int, vocabulary: int) -> int:
        """The float32 credits, and those of the step before, from which a step that fails is repeated."""
        return 2 * block * vocabulary * 4

    def choose(self, proposals: Proposals) -> Tensor:
        """See `CommitRule`."""
        return or_most_confident(proposals.open & (proposals.confidence > self.confidence), proposals)


@dataclass
class Prophet(TopK):
    """Prophet (arXiv 2508.19982): top-k, until the model is sure of everything; then the whole block at once.

    It is sure when the gap between the two highest logits, averaged over the open slots, reaches a bound that falls
    with the progress in the block.

    Args:
        early, middle, late: the bound in the first, second and last third of the block's steps.
    """

    name: ClassVar[str] = "prophet"
    measure: ClassVar[str | None] = "gap"
    early: float = setting(7.5, "Mean gap of logits that ends a block in its first third.", minimum=0, maximum=10**6)
    middle: float = setting(5.0, "The same in its second third.", minimum=0, maximum=10**6)
    late: float = setting(2.5, "The same in its last third.", minimum=0, maximum=10**6)

    def choose(self, proposals: Proposals) -> Tensor:
        """See `CommitRule`."""
        assert proposals.measured is not None
        third = min(2, 3 * self.step // self.steps)
        if float(proposals.measured[proposals.open].mean()) >= (self.early, self.middle, self.late)[third]:
            return proposals.open
        return super().choose(proposals)


@dataclass
class EntropyBound(CommitRule):
    """EB-Sampler (arXiv 2505.24857): as many slots, the surest first, as keep the error of deciding them independently
    below a bound: their summed entropy without the largest one.

    Args:
        bound: in nats.
    """

    name: ClassVar[str] = "entropy"
    measure: ClassVar[str | None] = "entropy"
    bound: float = setting(0.1, "Of the entropies' sum but for the largest, in nats.", minimum=0, maximum=10**6)

    def choose(self, proposals: Proposals) -> Tensor:
        """See `CommitRule`."""
        assert proposals.measured is not None
        ranked = proposals.measured[proposals.open].sort().values
        count = int((ranked.cumsum(0) - ranked <= self.bound).sum())  # ascending: the largest is the last
        return most_confident(-proposals.measured, proposals.open, max(1, count))


@dataclass
class HistoryStable(CommitRule):
    """After history-stable decoding (AHD, arXiv 2604.08964): slots whose proposal has not changed for some steps.

    Args:
        steps: for which the proposal must have been the same, the present one included.
        confidence: it must have besides.
        sure: confidence that is enough by itself.
    """

    name: ClassVar[str] = "stable"
    steps: int = setting(3, "For which a proposal must have been the same.", minimum=1, maximum=MAX_SLOTS)
    confidence: float = setting(0.5, "That a stable proposal must have.", minimum=0, maximum=1)
    sure: float = setting(0.9, "Confidence that is enough by itself.", above=0, maximum=1)

    def begin_block(self, masked: int, steps: int) -> None:
        """See `CommitRule`."""
        self.last, self.run = torch.tensor(-1), torch.tensor(0)  # of every slot: its proposal, and for how many steps

    def choose(self, proposals: Proposals) -> Tensor:
        """See `CommitRule`."""
        self.run = torch.where(proposals.tokens == self.last, self.run + 1, 1)
        self.last = proposals.tokens
        is_stable = (self.run >= self.steps) & (proposals.confidence > self.confidence)
        return or_most_confident(proposals.open & (is_stable | (proposals.confidence > self.sure)), proposals)


@dataclass
class Wino(CommitRule):
    """WINO (arXiv 2507.18578), wide in, narrow out: commit boldly, verify, and take back what does not hold.

    Every token committed in the current block is predicted again as if its slot alone were still masked
    (`vidlada.decoding.verify`). Tokens that are then less probable than `verify` are masked again, the worst first, and
    always fewer than the step before committed; so every step wins one slot at least.

    Args:
        draft: confidence a slot is committed at.
        verify: probability below which a token is taken back.
    """

    name: ClassVar[str] = "wino"
    revokes: ClassVar[bool] = True
    draft: float = setting(0.6, "Commit every slot more confident than this.", above=0, maximum=1)
    verify: float = setting(0.9, "Take a token back that is less probable than this.", minimum=0, maximum=1)

    def begin_block(self, masked: int, steps: int) -> None:
        """See `CommitRule`."""
        self.committed = 0  # in the step before

    def choose(self, proposals: Proposals) -> Tensor:
        """See `CommitRule`."""
        chosen = or_most_confident(proposals.open & (proposals.confidence > self.draft), proposals)
        self.committed = int(chosen.sum())
        return chosen

    def revoke(self, probability: Tensor, drafted: Tensor) -> Tensor:
        """See `CommitRule`."""
        doubtful = drafted & (probability < self.verify)
        count = min(int(doubtful.sum()), max(0, self.committed - 1))
        return most_confident(-probability, doubtful, count)


RULES: dict[str, Any] = {
    kind.name: kind for kind in (TopK, Threshold, Factor, Credit, Prophet, EntropyBound, HistoryStable, Wino)
}


def commit_rule(settings: GenerationSettings) -> CommitRule:
    """The rule that settings ask for, new and without memory.

    Raises:
        InputError: an unknown rule or setting, a value out of range, or a rule that other settings exclude.
    """
    if settings.commit is not None:
        rule: CommitRule = parse_named("commit", settings.commit, RULES)
    elif settings.threshold is not None:
        rule = Threshold(settings.threshold)
    elif settings.factor is not None:
        rule = Factor(settings.factor)
    else:
        rule = TopK()
    if settings.steps is not None and not rule.paced:
        raise InputError(f"steps is fixed in advance; it cannot be combined with commit {rule.name}")
    if settings.steps is not None and getattr(rule, "tokens", None) is not None:
        raise InputError(f"commit {settings.commit} and steps {settings.steps} both set the pace; give one of them")
    if settings.remasking == "random" and type(rule) is not TopK:
        raise InputError(f"commit {rule.name} compares probabilities; it needs remasking low_confidence")
    if settings.cfg_scale > 0 and rule.revokes:
        raise InputError(f"commit {rule.name} verifies without guidance; use cfg_scale 0 or another rule")
    return rule


def compute_measure(measure: str, logits: Tensor) -> Tensor:
    """A further figure of every slot's distribution, as `CommitRule.measure` names it.

    Args:
        measure: `entropy` or `gap`.
        logits: (slots, vocabulary) float32.

    Returns:
        (slots,) float64.
    """
    if measure == "entropy":
        probability = logits.double().softmax(-1)
        return torch.special.entr(probability).sum(-1)
    best = logits.double().topk(2, dim=-1).values
    return best[:, 0] - best[:, 1]


def within_nucleus(logits: Tensor, top_p: float, temperature: float) -> Tensor:
    """Logits without the tokens outside the nucleus: the fewest likeliest ones that together reach `top_p`.

    Args:
        logits: (block, vocabulary).
        top_p: probability, in (0, 1].
        temperature: that the probabilities are taken at, above 0.

    Returns:
        (block, vocabulary), minus infinity outside.
    """
    ranked, order = (logits.double() / temperature).sort(-1, descending=True)
    probability = ranked.softmax(-1)
    outside = probability.cumsum(-1) - probability >= top_p  # what stands before it is enough; never the first
    return logits.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), -torch.inf)
