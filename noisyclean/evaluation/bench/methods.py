"""The methods of the bench: each a change to one base recipe, so that all else is equal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from noisyclean.errors import UsageError

ORACLE = "oracle"
"""InfoNCE that trains on the true pairs only: what a perfect filter would train, no competitor."""


@dataclass(frozen=True)
class Method:
    """How a method differs from the base recipe.

    Attributes:
        overrides: ``key=value`` changes to the recipe.
        title: its name in tables.
    """

    title: str
    overrides: Sequence[str] = field(default=())


METHODS: dict[str, Method] = {
    "srem": Method("SREM", ["objective.name=srem"]),
    ORACLE: Method("InfoNCE, true pairs only (oracle)", ["objective.name=infonce"]),
    "infonce": Method("InfoNCE", ["objective.name=infonce"]),
    "vse": Method("VSE++", ["objective.name=vse", "objective.warmup_epochs=2"]),
    "ncr": Method("NCR, Gaussian", ["objective.name=ncr", "objective.warmup_epochs=2"]),
    "ncr-beta": Method("NCR, Beta", ["objective.name=ncr", "objective.warmup_epochs=2", "objective.mixture=beta"]),
    "ncr-co": Method(
        "NCR, co-taught", ["objective.name=ncr", "objective.warmup_epochs=2", "objective.co_teaching=true"]
    ),
    "decl": Method("DECL", ["objective.name=decl", "objective.warmup_epochs=3"]),
    "rcl": Method("RCL", ["objective.name=rcl"]),
    "crcl": Method("CRCL", ["objective.name=crcl", "objective.warmup_epochs=2"]),
    "rince": Method("RINCE", ["objective.name=rince"]),
}
"""Method by name, in the order of the tables."""

DEFAULT_METHODS = ("srem", ORACLE, "infonce", "vse", "ncr", "decl", "rcl", "crcl", "rince")


def find_methods(names: Sequence[str]) -> list[str]:
    """The names themselves, without repetition.

    Raises:
        UsageError: there is no such method.
    """
    for name in names:
        if name not in METHODS:
            raise UsageError(f"--methods {name}: no such method; there are {', '.join(METHODS)}")
    return list(dict.fromkeys(names))
