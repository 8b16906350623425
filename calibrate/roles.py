"""Which part of a network an operator is: patterns of operators' names by role, a family's own data.

A layer policy speaks of roles. A pattern that matched no operator would let the policy pass over what it is about, say
the network's two ends, without a word; so what is allowed to match nothing is named beside the patterns.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .scheme import Role


@dataclass(frozen=True)
class Roles:
    """Regular expressions of whole names; the first role that has a match counts, and what none matches is "body".

    `sometimes` holds those of them that some of the family's networks have no operator for. `inside` is what stands
    before every name.
    """

    first: str
    last: str
    time: tuple[str, ...]
    attention: tuple[str, ...] = ()
    sometimes: frozenset[str] = frozenset()
    inside: str = ""

    @property
    def patterns(self) -> Mapping[Role, tuple[str, ...]]:
        return {"first": (self.first,), "last": (self.last,), "time": self.time, "attention": self.attention}

    def __call__(self, name: str) -> Role:
        """The role of an operator, for the layer policy."""
        return next((role for role, many in self.patterns.items() if any(self._is(name, p) for p in many)), "body")

    def unmatched(self, names: Iterable[str]) -> dict[str, Role]:
        """Patterns that match none of `names`, with their roles; without those that need not."""
        names = list(names)
        return {
            pattern: role
            for role, many in self.patterns.items()
            for pattern in many
            if pattern not in self.sometimes and not any(self._is(name, pattern) for name in names)
        }

    def _is(self, name: str, pattern: str) -> bool:
        return re.fullmatch(f"(?:{self.inside})(?:{pattern})", name) is not None
