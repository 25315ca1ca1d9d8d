"""Whom to ask for a canary and when, against which reference, and what is remembered of each host.

A canary is a request like a client's whose answer is known: another copy of the same file gave it, here, on a host of
an owner that the user trusts, or earlier. Canaries are a set part of the work that this node's own clients give a host:
what is not used is not checked, and no host is asked for more than that part.

Everything here is a value or a rule; time and chance are arguments.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from enum import StrEnum
from typing import NamedTuple

import msgspec

from mesh_llm.core.routing.ranking import RoutingSnapshot, Target
from mesh_llm.core.trust.canaries import NOISE, AnswerToken, CanaryAnswer, Suspicion, judged, verdict
from mesh_llm.core.trust.circle import owner_of
from mesh_llm.core.trust.matched_filter import judged_between
from mesh_llm.core.trust.readback import Reading, ReadSuspicion, read, read_verdict
from mesh_llm.core.types.announcement import Announcement, Member
from mesh_llm.core.types.ids import ModelName, NodeId, OwnerId
from mesh_llm.core.types.model import MAX_SPLIT_NODES, ModelKind, ModelStatus

CANARY_TOKENS = 24
"""Tokens of an answer that are compared."""
WRITING_WORK = 120.0
"""Work of a trusted host that writes what a canary asks: two short texts."""
CANARY_WORK = 40.0
"""Work of one answer, estimated on the large side: the answer, what the host computes until it sees that the asker has
left, and the prompt. Reading an answer back is as much."""
DEFAULT_SHARE = 0.01
"""Part of the work that this node's clients give a host, which canaries may add."""
PROMPT_WEIGHT = 0.1
"""Work of reading a token of a prompt, in tokens of an answer."""

_PATIENCE = 8
"""So often a host that is due is spared because it is busy, or because a client's request needs its place."""

_GAP_SECONDS = 60.0
_LONGEST_GAPS = 8.0
_MOST_SAVED = 5.0
"""So many canaries' work is saved up at most: what was not asked in time is not asked in a burst later."""
_MOST_HOSTS = 512
_HALF_LIFE = 7 * 86400.0
_FORGOTTEN = 90 * 86400.0
_MOST_RECORDS = 1024
_MOST_PROMPTS = 256
_PROMPTS_EACH = 24
STOCK = 8
"""So many recorded answers of a file are kept unused for the time when no copy of it can be asked."""
_BUSY = 0.75


class HostKey(NamedTuple):
    """A model on a host."""

    node: NodeId
    model: ModelName


def work(prompt: int, cached: int, generated: int) -> float:
    """The work of a request, in tokens of an answer. `prompt`: tokens, `cached` of which were not read again."""
    return generated + PROMPT_WEIGHT * max(0, prompt - cached)


class Schedule:
    """When each host is due. Work of this node's clients earns credit; a canary costs what it costs the host.

    A host is due some time after its credit suffices. The wait is drawn from an exponential distribution, so that the
    times say nothing.
    """

    def __init__(self, share: float = DEFAULT_SHARE) -> None:
        """`share`: of the clients' work, above 0."""
        self._share = share
        self._gap = _GAP_SECONDS * min(1.0, DEFAULT_SHARE / share)
        self._credit: dict[HostKey, float] = {}
        self._due: dict[HostKey, float] = {}
        self._spared: dict[HostKey, int] = {}

    def earned(self, key: HostKey, done: float, now: float, chance: float) -> None:
        """A client of this node got an answer from a host, of so much work. `chance`: uniform, 0.0 to below 1.0."""
        saved = self._credit.pop(key, 0.0)
        if not self._credit or key not in self._due:
            self._bound()
        # The one that was used last is the last to be dropped.
        self._credit[key] = min(_MOST_SAVED * CANARY_WORK, saved + self._share * done)
        self._plan(key, now, chance)

    def spent(self, key: HostKey, cost: float, now: float, chance: float, *, checked: bool = True) -> None:
        """A canary was sent to a host, or could not be, or not to its end: then the host is not `checked`."""
        self._credit[key] = self._credit.get(key, 0.0) - cost
        self._spared[key] = 0 if checked else self._spared.get(key, 0) + 1
        self._due.pop(key, None)
        self._plan(key, now, chance)

    def insists(self, key: HostKey) -> bool:
        """Whether the host was spared so often that it is asked although it says that it is busy: it may say that."""
        return self._spared.get(key, 0) >= _PATIENCE

    def due(self, now: float) -> tuple[HostKey, ...]:
        """The hosts that are due, the longest first."""
        found = sorted((at, key) for key, at in self._due.items() if at <= now)
        return tuple(key for _, key in found)

    def deadline(self) -> float | None:
        """When the next host is due; None: only a client's request changes that."""
        return min(self._due.values(), default=None)

    def _plan(self, key: HostKey, now: float, chance: float) -> None:
        if key not in self._due and self._credit[key] >= CANARY_WORK:
            self._due[key] = now + self._gap * min(_LONGEST_GAPS, -math.log1p(-chance))

    def _bound(self) -> None:
        while len(self._credit) >= _MOST_HOSTS:
            oldest = next(iter(self._credit))
            del self._credit[oldest]
            self._due.pop(oldest, None)
            self._spared.pop(oldest, None)


class Standing(StrEnum):
    """What canaries say about a host so far."""

    UNDECIDED = "undecided"
    HONEST = "honest"
    DISTRUSTED = "distrusted"


class HostRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What is remembered of one model on one host.

    Attributes:
        node, model: the host, and what it serves.
        fingerprint: of the file that it announced.
        name: of the host for people, as it was last known.
        workers: other nodes that computed layers there when the present test's answers were given, as the host
            announced. Which of them, or the host, is to blame for a wrong answer, no answer says.
        split: the node is one of the workers of a model that this node split, and `workers` are the others.
        suspicion: evidence of the present test of probabilities.
        between: evidence of the present test between the announced file and a coarser one.
        readback: evidence of the present test of ordinary answers.
        standing: the last decision. A test that ends well is followed by the next one.
        canaries: answers that were compared, in all tests.
        unanswered: canaries without an answer that can be compared, one after another.
        tests: tests that ended well.
        at: UNIX seconds of the last canary.
        since: UNIX seconds at which the standing was decided.
    """

    node: NodeId
    model: ModelName
    fingerprint: str
    name: str = ""
    workers: tuple[NodeId, ...] = ()
    suspicion: Suspicion = Suspicion()
    between: Suspicion = Suspicion()
    readback: ReadSuspicion = ReadSuspicion()
    standing: Standing = Standing.UNDECIDED
    canaries: int = 0
    unanswered: int = 0
    tests: int = 0
    at: float = 0.0
    since: float = 0.0
    split: bool = False

    @property
    def key(self) -> HostKey:
        """What it is about."""
        return HostKey(self.node, self.model)

    def with_workers(self, workers: Iterable[NodeId]) -> "HostRecord":
        """The same, where these nodes compute layers as well.

        What is known of the host stays: otherwise it would only have to announce other workers to begin anew.
        """
        known = tuple(sorted({*self.workers, *workers}))[:MAX_SPLIT_NODES]
        return self if known == self.workers else msgspec.structs.replace(self, workers=known)


def compared(
    record: HostRecord,
    reference: CanaryAnswer,
    answer: CanaryAnswer,
    now: float,
    noise: float = NOISE,
    coarser: CanaryAnswer | None = None,
) -> HostRecord:
    """The record after one more canary. `noise`: see `core.trust.canaries.noise_of`; `coarser`: of a coarser copy.

    Evidence that was not added to fades, by half in a week: what a host did long ago says less about it. A test that
    ends well begins anew, so a host that changes later is found, too. Distrust stays until the user forgets it.
    """
    if record.standing is Standing.DISTRUSTED:
        return record
    faded, greedy = _faded(record, now), greedy_part(answer)
    suspicion = judged(faded.suspicion, reference, greedy, noise)
    if suspicion.silent > faded.suspicion.silent:
        return msgspec.structs.replace(unanswered(record, now), suspicion=suspicion)
    after = msgspec.structs.replace(_answered(faded), suspicion=suspicion)
    if coarser is not None:
        between = judged_between(faded.between, reference, coarser, greedy)
        after = _decided(
            msgspec.structs.replace(after, between=between), verdict(between), now, {"between": Suspicion()}
        )
        if after.standing is Standing.DISTRUSTED:
            return after
    return _decided(after, verdict(suspicion), now, {"suspicion": Suspicion()})


def read_back(record: HostRecord, reading: Reading, now: float) -> HostRecord:
    """The record after an ordinary answer was read back; otherwise as `compared`."""
    if record.standing is Standing.DISTRUSTED:
        return record
    faded = _faded(record, now)
    after = msgspec.structs.replace(_answered(faded), readback=read(faded.readback, reading))
    return _decided(after, read_verdict(after.readback), now, {"readback": ReadSuspicion()})


def unanswered(record: HostRecord, now: float) -> HostRecord:
    """The record after one more canary without an answer that can be compared."""
    return msgspec.structs.replace(_faded(record, now), unanswered=record.unanswered + 1)


def _faded(record: HostRecord, now: float) -> HostRecord:
    left = 0.5 ** (max(0.0, now - record.at) / _HALF_LIFE) if record.at else 1.0
    replace = msgspec.structs.replace
    return replace(
        record,
        suspicion=replace(record.suspicion, evidence=record.suspicion.evidence * left),
        between=replace(record.between, evidence=record.between.evidence * left),
        readback=replace(record.readback, evidence=record.readback.evidence * left),
        at=now,
    )


def _answered(record: HostRecord) -> HostRecord:
    return msgspec.structs.replace(record, canaries=record.canaries + 1, unanswered=0)


def _decided(record: HostRecord, found: str, now: float, anew: Mapping[str, object]) -> HostRecord:
    if found == "suspect":
        return msgspec.structs.replace(record, standing=Standing.DISTRUSTED, since=now)
    if found != "honest":
        return record
    anew = {**anew, "workers": ()}
    return msgspec.structs.replace(record, standing=Standing.HONEST, tests=record.tests + 1, since=now, **anew)


def greedy_part(answer: CanaryAnswer) -> CanaryAnswer:
    """An answer as far as it is greedy by its own probabilities.

    The user of a host may have set penalties for repetition: then it takes another token than the likeliest, and what
    follows is of another text. At that place its probabilities still count, and the likeliest token is put there.
    """
    kept: list[AnswerToken] = []
    for token in answer.tokens:
        if token.top and token.text not in (text for text, logprob in token.top if logprob >= token.top[0][1]):
            text, logprob = token.top[0]
            return CanaryAnswer((*kept, msgspec.structs.replace(token, text=text, logprob=logprob)))
        kept.append(token)
    return answer


class Prompt(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt with the answer that the file gave which is named by its fingerprint.

    Attributes:
        fingerprint: of the file.
        path: of the API that was asked.
        system: the system prompt before it; empty where the path has none.
        text: of the prompt.
        answer: greedy, from a copy here or on a trusted host.
        asked: hosts that got this prompt: none gets it twice.
        at: UNIX seconds of the answer.
        cache_type: of the copy's KV cache; empty: unknown.
        coarser: the answer of a coarser copy, with a KV cache of the same type; None: there was none.
    """

    fingerprint: str
    path: str
    system: str
    text: str
    answer: CanaryAnswer
    asked: tuple[NodeId, ...] = ()
    at: float = 0.0
    cache_type: str = ""
    coarser: CanaryAnswer | None = None


class TrustState(msgspec.Struct, frozen=True, kw_only=True):
    """What the home keeps."""

    hosts: tuple[HostRecord, ...] = ()
    prompts: tuple[Prompt, ...] = ()


def bounded(hosts: Iterable[HostRecord], prompts: Iterable[Prompt], now: float) -> TrustState:
    """What is kept: distrusted hosts first, then what was compared last; prompts that nobody was asked first."""
    recent = [one for one in hosts if one.standing is Standing.DISTRUSTED or now - one.at < _FORGOTTEN]
    recent.sort(key=lambda one: (one.standing is not Standing.DISTRUSTED, -one.at))
    kept: list[Prompt] = []
    each: dict[str, int] = {}
    for prompt in sorted(prompts, key=lambda one: (bool(one.asked), -one.at)):
        each[prompt.fingerprint] = each.get(prompt.fingerprint, 0) + 1
        if each[prompt.fingerprint] <= _PROMPTS_EACH and len(kept) < _MOST_PROMPTS:
            kept.append(prompt)
    return TrustState(hosts=tuple(recent[:_MOST_RECORDS]), prompts=tuple(kept))


def distrusted(hosts: Iterable[HostRecord]) -> tuple[tuple[ModelName, NodeId], ...]:
    """The models on hosts that this node's requests avoid, in a fixed order."""
    return tuple(sorted((one.model, one.node) for one in hosts if one.standing is Standing.DISTRUSTED))


class Source(StrEnum):
    """Where the reference comes from."""

    OWN = "own"
    """A copy of the same file that is loaded here."""
    TRUSTED = "trusted"
    """A host of this node's owner or of the user's group that announces the same file."""
    RECORDED = "recorded"
    """An answer that one of these gave earlier."""


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """A canary to be sent.

    Attributes:
        host: the one to ask.
        fingerprint: of the file that the host announces.
        source: of the reference.
        reference: the target that gives it; None where it is recorded.
        prompt: the recorded one.
    """

    host: Target
    fingerprint: str
    source: Source
    reference: Target | None = None
    prompt: Prompt | None = None


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What a choice is made from.

    Attributes:
        snapshot: the routes.
        members: the other nodes.
        own: fingerprints of the files that are loaded here, by model.
        own_caches: element types of the KV caches here, by model.
        in_flight: requests of this node at each target of the model.
        circle: owners that the user trusts: this node's, and those of the group.
        now: UNIX seconds.
        insists: the host was spared too often: how busy it says it is does not count, and the copy here need not idle.
    """

    snapshot: RoutingSnapshot
    members: Sequence[Member]
    own: Mapping[ModelName, str]
    own_caches: Mapping[ModelName, str]
    in_flight: Mapping[NodeId, int]
    circle: frozenset[OwnerId]
    now: float
    insists: bool = False


def announced_file(announcement: Announcement, model: ModelName) -> str:
    """The fingerprint of the file from which a node says that it serves a model; empty: it does not say."""
    split = announcement.split
    if split is not None and split.model == model and split.leads and split.fingerprint:
        return split.fingerprint
    return next((facts.fingerprint for facts in announcement.on_disk if facts.name == model), "")


def announced_cache(announcement: Announcement, model: ModelName) -> str:
    """The element type of the KV cache with which a node says that it serves a model; empty: it does not say."""
    return next((one.cache_type for one in announcement.serving if one.model == model), "")


def choose(
    key: HostKey, path: str, seen: Seen, prompts: Iterable[Prompt], doubted: Collection[tuple[ModelName, NodeId]]
) -> Check | None:
    """The canary for a host that is due; None: it cannot be checked now.

    Only a host that has a free place is asked, for a model that answers there now; one that never has, or says so, is
    asked in the end all the same (`Schedule.insists`). Hosts of trusted owners and hosts
    that are distrusted already are not checked. This node is one of the hosts where it splits a model with workers that
    the user does not trust. The reference is the copy here if it is idle; else a trusted host that has a free place,
    one that is not itself in doubt; else a recorded answer that this host was not asked for yet. One with a KV cache of
    the type that the host announces goes before all that have another: its answers are nearer.
    """
    route = seen.snapshot.models.get(key.model)
    if route is None or route.kind is not ModelKind.CHAT or (key.model, key.node) in doubted:
        return None
    files = {one.announcement.node: announced_file(one.announcement, key.model) for one in seen.members}
    files[seen.snapshot.node] = seen.own.get(key.model, "")
    caches = {one.announcement.node: announced_cache(one.announcement, key.model) for one in seen.members}
    caches[seen.snapshot.node] = seen.own_caches.get(key.model, "")
    host = next((one for one in route.targets if one.node == key.node and _may_be_asked(one, seen)), None)
    if host is None or any((key.model, worker) in doubted for worker in host.workers):
        return None
    fingerprint, cache = files.get(key.node, ""), caches.get(key.node, "")
    if not fingerprint or _trusted(host, seen):
        return None
    found: list[tuple[str, Check]] = []
    for target in route.targets:
        if files.get(target.node, "") != fingerprint or target.node == host.node or not _trusted(target, seen):
            continue
        known = target.local or (key.model, target.node) not in doubted
        if known and (_idle if target.local and not seen.insists else _free)(target, seen):
            source = Source.OWN if target.local else Source.TRUSTED
            check = Check(host=host, fingerprint=fingerprint, source=source, reference=target)
            found.append((caches.get(target.node, ""), check))
    found += [
        (one.cache_type, Check(host=host, fingerprint=fingerprint, source=Source.RECORDED, prompt=one))
        for one in unasked(prompts, fingerprint, path, key.node)
    ]
    return min(found, key=lambda one: bool(cache) and one[0] != cache)[1] if found else None


def coarser_copy(name: ModelName, cache: str, seen: Seen) -> Target | None:
    """An idle copy of a coarser file than the announced one, here or on a trusted host; None: there is none now.

    Args:
        name: of the coarser model.
        cache: element type of the announced copy's KV cache, which the coarser one must have as well.
        seen: what the choice is made from. A host that was found to lie is none of the trusted.
    """
    members = {one.announcement.node: one.announcement for one in seen.members}
    route = seen.snapshot.models.get(name)
    for target in route.targets if route is not None else ():
        if target.local:
            there, usable = seen.own_caches.get(name, ""), _idle(target, seen)
        else:
            known = target.node in members and (name, target.node) not in seen.snapshot.distrusted
            there = announced_cache(members[target.node], name) if known else ""
            usable = known and _free(target, seen)
        if usable and there and there == cache and _trusted(target, seen):
            return target
    return None


def unasked(prompts: Iterable[Prompt], fingerprint: str, path: str, node: NodeId | None = None) -> list[Prompt]:
    """The recorded prompts of a file that a host was not asked for, the oldest first; None: that nobody was asked."""
    fitting = [one for one in prompts if one.fingerprint == fingerprint and one.path == path]
    return sorted(
        (one for one in fitting if (node not in one.asked if node is not None else not one.asked)),
        key=lambda one: one.at,
    )


def _trusted(target: Target, seen: Seen) -> bool:
    """All nodes that compute the model there are this one, or belong to owners that the user trusts."""
    nodes = [one for one in (target.node, *target.workers) if one != seen.snapshot.node]
    return all(owner_of(one, seen.snapshot.owners, seen.now) in seen.circle for one in nodes)


def _may_be_asked(host: Target, seen: Seen) -> bool:
    return host.status is ModelStatus.WARM if seen.insists else _free(host, seen)


def _free(target: Target, seen: Seen) -> bool:
    """Whether one more request delays nobody there, as far as is known."""
    here = seen.in_flight.get(target.node, 0)
    return target.status is ModelStatus.WARM and here < target.slots and target.load < _BUSY


def _idle(target: Target, seen: Seen) -> bool:
    return _free(target, seen) and not seen.in_flight.get(target.node, 0) and target.load == 0.0
