"""Cache policies by name: `dual`, `interval:prompt=25,response=7`, `mars:ratio=2`."""

from typing import cast

from vidlada.decoding.named import parse_named
from vidlada.decoding.policies.base import Policy
from vidlada.decoding.policies.blockwise import Dual, Frozen, Full, Interval, Prefix
from vidlada.decoding.policies.dkv import DelayedKV
from vidlada.decoding.policies.dllm import DLLM
from vidlada.decoding.policies.elastic import Elastic
from vidlada.decoding.policies.mars import Mars
from vidlada.decoding.policies.sparse import Sparse
from vidlada.generation import CachePolicy

POLICIES: dict[str, type] = {
    kind.name: kind for kind in (Full, Prefix, Dual, Frozen, Interval, DLLM, DelayedKV, Elastic, Sparse, Mars)
}


def parse_policy(cache: str | CachePolicy) -> Policy | None:
    """A policy from its name and settings; None for `none`.

    Args:
        cache: `name` or `name:setting=value,…`; a policy is returned as it is.

    Raises:
        InputError: an unknown name or setting, or a value out of range.
    """
    if not isinstance(cache, str):
        return cast(Policy, cache)
    return None if cache == "none" else parse_named("cache", cache, POLICIES, ["none"])
