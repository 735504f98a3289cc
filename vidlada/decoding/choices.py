"""Settings that name a cache policy and a commit rule, checked before any work starts."""

from vidlada.decoding.commit import commit_rule
from vidlada.decoding.policies import parse_policy
from vidlada.generation import GenerationSettings


def check_choices(settings: GenerationSettings) -> None:
    """Refuse settings whose policy or rule is unknown, out of bounds, or excluded by another setting.

    Raises:
        InputError: that is so; the message names it.
    """
    parse_policy(settings.cache)
    commit_rule(settings)
