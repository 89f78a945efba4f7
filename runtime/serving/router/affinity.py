"""Which replica gets a request: the one that knows most of its prompt, less what it has to do.

What a replica knows is what was sent to it: the sessions, and of prompts without one the pages, by
the same chained digests as in the prefix cache. A request of which nobody knows anything goes by
its key: rendezvous hashing (Thaler and Ravishankar, 1998), so that a replica that comes or goes
moves only its own share, with bounded loads (Mirrokni, Thorup and Zadimoghaddam, 2018).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from tokenspeed_plan.runtime.cache.prefix_cache import as_words, chain_digest

MAX_LOAD = 1.25  # of a replica, in shares of the mean
EXCESS_TOKENS = 256  # what a request above that counts, in tokens that need not be computed
MAX_SESSIONS = 1 << 17
_SEED = b"tokenspeed-route"  # begins the chain of digests


@dataclass(frozen=True, slots=True)
class RouteKey:
    """What a request may have in common with earlier ones.

    Attributes:
        session: the name of its conversation; None without one.
        num_tokens: of its prompt, about.
        pages: digests of the whole pages of its prompt, where it has no session.
    """

    session: str | None = None
    num_tokens: int = 0
    pages: tuple[bytes, ...] = ()

    @property
    def hashed(self) -> bytes:
        """What decides where a request goes that nobody knows; empty where nothing does."""
        if self.session is not None:
            return self.session.encode("utf-8", "backslashreplace")
        return b"".join(self.pages[:1])


def page_digests(token_ids: Sequence[int], page_size: int) -> tuple[bytes, ...]:
    """The chained digests of a prompt's whole pages."""
    digests, digest = [], _SEED
    for end in range(page_size, len(token_ids) + 1, page_size):
        digest = chain_digest(digest, as_words(token_ids[end - page_size : end]))
        digests.append(digest)
    return tuple(digests)


class Affinity:
    """Chooses replicas, and remembers what each was sent.

    Attributes:
        in_flight: requests of each replica that are not answered yet.

    Args:
        num_replicas: how many there are.
        page_size: of the prefix cache, in tokens.
        num_pages: of each replica; it can know no more.
    """

    def __init__(self, num_replicas: int, page_size: int, num_pages: int) -> None:
        self.in_flight = [0] * num_replicas
        self._page_size = page_size
        self._num_pages = num_pages
        self._pages: list[OrderedDict[bytes, None]] = [OrderedDict() for _ in self.in_flight]
        self._first_pages: list[set[bytes]] = [set() for _ in self.in_flight]
        self._num_sessions = [0] * num_replicas
        self._sessions: OrderedDict[str, tuple[int, int]] = OrderedDict()  # replica, tokens

    def choose(self, key: RouteKey, up: Collection[int]) -> int:
        """One of the replicas that are up; there is at least one."""
        known = {replica: self.known_tokens(key, replica) for replica in up}
        limit = self._limit(up)
        if not any(known.values()):
            return self._hashed(key, up, limit)

        def rank(replica: int) -> tuple[int, int, int]:
            excess = max(self.in_flight[replica] + 1 - limit, 0)
            worth = known[replica] - EXCESS_TOKENS * excess
            return worth, -self.in_flight[replica], -replica

        return max(up, key=rank)

    def known_tokens(self, key: RouteKey, replica: int) -> int:
        """How much of a prompt a replica should have in its cache."""
        if key.session is not None:
            known_by, num_tokens = self._sessions.get(key.session, (-1, 0))
            return num_tokens * (known_by == replica)
        pages = self._pages[replica]
        num_pages = 0
        for digest in key.pages:
            if digest not in pages:
                break
            num_pages += 1
        return num_pages * self._page_size

    def note(self, key: RouteKey, replica: int) -> None:
        """Remember that a replica has computed a prompt."""
        if key.session is not None:
            self._end_session(key.session)
            self._sessions[key.session] = (replica, max(key.num_tokens, 1))
            self._num_sessions[replica] += 1
            if len(self._sessions) > MAX_SESSIONS:
                self._end_session(next(iter(self._sessions)))
            return
        pages = self._pages[replica]
        self._first_pages[replica].update(key.pages[:1])
        for digest in reversed(key.pages):  # the first pages are used by most, so they stay longest
            pages[digest] = None
            pages.move_to_end(digest)
        while len(pages) > self._num_pages:
            digest, _ = pages.popitem(last=False)
            self._first_pages[replica].discard(digest)

    def forget(self, replica: int) -> None:
        """A replica has lost its cache."""
        self._pages[replica].clear()
        self._first_pages[replica].clear()
        lost = [name for name, (known_by, _) in self._sessions.items() if known_by == replica]
        for name in lost:
            self._end_session(name)

    def _end_session(self, name: str) -> None:
        replica, _ = self._sessions.pop(name, (-1, 0))
        if replica >= 0:
            self._num_sessions[replica] -= 1

    def _num_held(self, replica: int) -> int:
        """Conversations that a replica has in its cache, as far as they can be told apart."""
        return self._num_sessions[replica] + len(self._first_pages[replica])

    def _limit(self, up: Collection[int]) -> int:
        """How many requests a replica may have, one more included."""
        total = sum(self.in_flight[replica] for replica in up) + 1
        return math.ceil(MAX_LOAD * total / len(up))

    def _hashed(self, key: RouteKey, up: Collection[int], limit: int) -> int:
        """The first replica in the key's own order that has room; without a key the idlest.

        Room is for the request, and in the cache for its conversation: conversations stay, so each
        replica gets its share of them where that leaves a choice.
        """
        if not key.hashed:
            return min(up, key=lambda replica: (self.in_flight[replica], replica))
        order = sorted(up, key=lambda replica: _weight(key.hashed, replica))
        free = [replica for replica in order if self.in_flight[replica] < limit]
        share = (sum(map(self._num_held, up)) + 1) / len(up)
        return next((replica for replica in free if self._num_held(replica) < share), free[0])


def _weight(key: bytes, replica: int) -> bytes:
    return blake2b(key, digest_size=8, salt=replica.to_bytes(4)).digest()
