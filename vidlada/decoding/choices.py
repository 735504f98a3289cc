"""Settings that name a cache policy, a commit rule or a pruning, checked before any work starts."""

from vidlada.decoding.commit import commit_rule
from vidlada.decoding.policies import parse_policy
from vidlada.decoding.policies.base import Policy
from vidlada.decoding.policies.blockwise import Full
from vidlada.decoding.pruning import parse_pruning
from vidlada.generation import GenerationSettings


def check_choices(settings: GenerationSettings) -> None:
    """Refuse settings whose policy or rule is unknown, out of bounds, or excluded by another setting.

    Raises:
        InputError: that is so; the message names it.
    """
    parse_policy(settings.cache)
    commit_rule(settings)
    parse_pruning(settings.visual_prune)


def policy_of(settings: GenerationSettings) -> Policy | None:
    """The cache policy that an answer runs with; None for the plain loop.

    What verifies tokens against keys and values, or drops some of these, needs a KV cache, and with `cache="none"` runs
    as `full`, which gives the same ids.
    """
    policy = parse_policy(settings.cache)
    if policy is None and (commit_rule(settings).revokes or parse_pruning(settings.visual_prune) is not None):
        return Full()
    return policy
