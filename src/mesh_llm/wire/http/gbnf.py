"""Bounds on a GBNF grammar: what llama.cpp would need to parse and follow it, computed before an engine gets it.

llama.cpp's parser (`llama-grammar.cpp`) recurses for each open parenthesis and writes every repetition out. Its search
for left recursion and its stacks of possible continuations follow each way in which a rule can begin. A grammar of one
kilobyte can cause 2^40 of these. `check_grammar` parses the same language, counts, and refuses too much.
"""

import re
from collections.abc import Iterator

MOST_BYTES = 64 * 1024
MOST_DEPTH = 64
"""Most nested parentheses."""
MOST_RULES = 4096
"""Most rules; each pair of parentheses counts as one."""
MOST_NAME = 256
"""Most characters of a rule's name."""
MOST_WRITTEN_OUT = 200_000
"""Most elements of all rules once every `{m,n}` is written out, as llama.cpp does."""
MOST_BEGINNINGS = 1024
"""Most ways in which one rule can begin."""
MOST_CHAIN = 2048
"""Most rules in a chain in which each begins with the next."""

_CHARACTER = re.compile(r"\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|.)|.", re.DOTALL)
_MOST_PREFIX = 64
"""Most elements of one alternative that are compared with another's."""
_MOST_STEPS = 200_000
"""Most elements that are compared in all."""

_COPIES = 2000
"""llama.cpp treats a higher upper bound of a repetition as unlimited (MAX_REPETITION_THRESHOLD)."""
_RULE_OVERHEAD = 12
"""The cost of a generated rule besides its elements, in elements: its name in a table, its ends."""

_TOKEN = re.compile(
    r"""(?P<space>[ \t]+|\#[^\r\n]*)
    |(?P<newline>[\r\n]+)
    |(?P<literal>"(?:[^"\\]|\\.)*")
    |(?P<set>\[(?:[^\]\\]|\\.)*\])
    |(?P<name>[A-Za-z0-9-]+)
    |(?P<define>::=)
    |(?P<token>!?<[^>]*>)
    |\{(?P<repeat>[^{}]*)\}
    |(?P<mark>[()|*+?.])""",
    re.VERBOSE | re.DOTALL,
)
_REPEAT = re.compile(r"\s*(\d{1,9})\s*(,\s*(\d{0,9})\s*)?")


class GrammarError(ValueError):
    """The grammar is not GBNF, or exceeds a bound. The text is one sentence."""


class _Item:
    """One element of a sequence, characters (`rule` None) or another rule, with the repetition that follows it.

    `text` is the source of characters, with quotes or brackets.
    """

    __slots__ = ("least", "most", "rule", "size", "text")

    def __init__(self, rule: "_Rule | None", size: int, text: str = "") -> None:
        self.rule = rule
        self.size = size
        self.text = text
        self.least = 1
        self.most = 1

    @property
    def optional(self) -> bool:
        return self.least == 0 or (self.size == 0 and self.rule is None)

    @property
    def times(self) -> int:
        """How often llama.cpp tries it at one place: an element that can be empty, once for each repetition."""
        return self.most if self.rule is not None and self.rule.nullable else 1


class _Rule:
    __slots__ = ("alternatives", "beginnings", "chain", "defined", "name", "nullable", "state")

    def __init__(self, name: str) -> None:
        self.name = name
        self.alternatives: list[list[_Item]] = []
        self.defined = False
        self.nullable = False
        self.beginnings = 1
        self.chain = 1
        self.state = 0
        """While beginnings are counted: 0 not visited, 1 in progress, 2 done."""


def check_grammar(text: str) -> None:
    """Raises GrammarError if the grammar is not GBNF or exceeds a bound of this module."""
    if len(text.encode("utf-8", "surrogatepass")) > MOST_BYTES:
        raise GrammarError(f"it is longer than {MOST_BYTES // 1024} KiB")
    rules = _Parser().parse(text)
    _find_nullable(rules)
    for rule in rules:
        _count_beginnings(rule)
    for rule in rules:
        for sequence in rule.alternatives:
            _count_ways_on(sequence)
    _check_recursion(rules)


class _Parser:
    def __init__(self) -> None:
        self._named: dict[str, _Rule] = {}
        self._rules: list[_Rule] = []
        self._written_out = 0

    def parse(self, text: str) -> list[_Rule]:
        tokens = _tokens(text)
        # The rule being read, then one for each open parenthesis.
        open_rules: list[_Rule] = []
        current: _Rule | None = None
        continues = False
        """Whether a newline here continues the rule: after `::=`, `|` or an open parenthesis."""
        for kind, value in tokens:
            if kind == "newline":
                if len(open_rules) == 1 and not continues:
                    open_rules.clear()
                continue
            if not open_rules:
                current = self._begin(current, kind, value)
                if kind == "define":
                    open_rules.append(current)
                    current.alternatives = [[]]
                    current, continues = None, True
                continue
            continues = self._take(open_rules, kind, value)
        if current is not None or len(open_rules) > 1:
            raise GrammarError("it ends in the middle of a rule")
        for rule in self._rules:
            if not rule.defined:
                raise GrammarError(f"it uses the rule `{rule.name[:40]}`, which it does not define")
        if "root" not in self._named:
            raise GrammarError("it defines no rule `root`")
        return self._rules

    def _begin(self, current: _Rule | None, kind: str, value: str) -> _Rule:
        """Take a token of the beginning of a rule: a name, then `::=`."""
        if current is None and kind == "name":
            return self._rule(value, defines=True)
        if current is None or kind != "define":
            raise GrammarError(f"a rule is expected at `{value[:20]}`")
        return current

    def _rule(self, name: str, *, defines: bool = False) -> _Rule:
        rule = self._named.get(name)
        if rule is None:
            if len(name) > MOST_NAME:
                raise GrammarError(f"the name of a rule is longer than {MOST_NAME} characters")
            rule = self._named[name] = self._new(name)
        rule.defined |= defines
        return rule

    def _new(self, name: str) -> _Rule:
        if len(self._rules) >= MOST_RULES:
            raise GrammarError(f"it has more than {MOST_RULES} rules")
        rule = _Rule(name)
        self._rules.append(rule)
        return rule

    def _take(self, open_rules: list[_Rule], kind: str, value: str) -> bool:
        """Take a token within a rule. Returns whether a newline after it continues the rule."""
        rule = open_rules[-1]
        sequence = rule.alternatives[-1]
        match kind, value:
            case "mark", "|":
                rule.alternatives.append([])
                return True
            case "mark", "(":
                if len(open_rules) > MOST_DEPTH:
                    raise GrammarError(f"its parentheses are more than {MOST_DEPTH} deep")
                group = self._new("()")
                group.defined, group.alternatives = True, [[]]
                open_rules.append(group)
                return True
            case "mark", ")":
                if len(open_rules) == 1:
                    raise GrammarError("it closes a parenthesis that is not open")
                open_rules.pop()
                self._add(open_rules[-1].alternatives[-1], _Item(rule, 1))
            case ("mark", ".") | ("token", _):
                self._add(sequence, _Item(None, 1, value))
            case "mark", _:
                least, most = {"*": (0, _COPIES + 1), "+": (1, _COPIES + 1), "?": (0, 1)}[value]
                self._repeat(sequence, least, most)
            case "repeat", _:
                self._repeat(sequence, *_numbers(value))
            case (("literal" | "set"), _):
                self._add(sequence, _Item(None, len(value) - 2, value))
            case "name", _:
                self._add(sequence, _Item(self._rule(value), 1))
            case _:
                raise GrammarError(f"`{value[:20]}` is not expected there")
        return len(open_rules) > 1

    def _add(self, sequence: list[_Item], item: _Item) -> None:
        sequence.append(item)
        self._grow(item.size)

    def _repeat(self, sequence: list[_Item], least: int, most: int) -> None:
        if not sequence or (sequence[-1].rule is None and not sequence[-1].size):
            raise GrammarError("it repeats nothing")
        # llama.cpp counts from the upper to the lower bound. It never ends if the lower one is higher.
        if least > most:
            raise GrammarError("the lower bound of one of its repetitions is above the upper one")
        if least > _COPIES:
            raise GrammarError(f"it repeats something {least} times; {_COPIES} are the most")
        item = sequence[-1]
        # The repetition of a repetition becomes the repetition of a rule for the inner one.
        if (item.least, item.most) != (1, 1):
            group = self._new("{}")
            group.defined, group.alternatives = True, [[item]]
            item = sequence[-1] = _Item(group, 1)
        generated = 1 if most > _COPIES else most - least
        self._grow(max(0, least - 1) * item.size + generated * (item.size + _RULE_OVERHEAD))
        item.least, item.most = least, 1 if most > _COPIES else most

    def _grow(self, elements: int) -> None:
        self._written_out += elements
        if self._written_out > MOST_WRITTEN_OUT:
            raise GrammarError(f"its repetitions come to more than {MOST_WRITTEN_OUT} elements")


def _tokens(text: str) -> Iterator[tuple[str, str]]:
    at = 0
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            raise GrammarError(f"it cannot be read at `{text[at : at + 20]}`")
        at = found.end()
        kind = found.lastgroup or ""
        if kind != "space":
            yield kind, found[kind]


def _numbers(text: str) -> tuple[int, int]:
    found = _REPEAT.fullmatch(text)
    if found is None:
        raise GrammarError(f"`{{{text[:20]}}}` is no repetition")
    least = int(found[1])
    if found[2] is None:
        return least, least
    return least, int(found[3]) if found[3] else _COPIES + 1


def _find_nullable(rules: list[_Rule]) -> None:
    """Find the rules that can be empty. Visits each alternative once for each such rule in it."""
    waiting: dict[_Rule, list[list[object]]] = {}
    known: list[_Rule] = []
    for rule in rules:
        for sequence in rule.alternatives:
            needed = {item.rule for item in sequence if not item.optional}
            if None in needed:
                continue
            if not needed:
                known.append(rule)
                continue
            entry: list[object] = [rule, len(needed)]
            for other in needed:
                if other is not None:
                    waiting.setdefault(other, []).append(entry)
    while known:
        rule = known.pop()
        if rule.nullable:
            continue
        rule.nullable = True
        for entry in waiting.get(rule, ()):
            owner, left = entry
            assert isinstance(owner, _Rule)  # noqa: S101 - as it was put in above
            assert isinstance(left, int)  # noqa: S101
            entry[1] = left - 1
            if left == 1:
                known.append(owner)


def _firsts(sequence: list[_Item]) -> Iterator[_Item]:
    """The elements with which a sequence can begin."""
    for item in sequence:
        yield item
        if not (item.optional or (item.rule is not None and item.rule.nullable)):
            return


def _count_beginnings(start: _Rule) -> None:
    """Count the ways in which rules begin, depth first. Raises GrammarError for too many, or for left recursion."""
    todo = [start]
    while todo:
        rule = todo[-1]
        if rule.state == 2:
            todo.pop()
            continue
        firsts = [item for sequence in rule.alternatives for item in _firsts(sequence)]
        if rule.state == 0:
            rule.state = 1
            for item in firsts:
                if item.rule is not None and item.rule.state == 1:
                    raise GrammarError(f"its rule `{rule.name[:40]}` begins with itself (left recursion)")
                if item.rule is not None and item.rule.state == 0:
                    todo.append(item.rule)
            continue
        todo.pop()
        rule.state = 2
        rule.beginnings = int(rule.nullable)
        for item in firsts:
            if item.rule is None:
                rule.beginnings += 1
                continue
            rule.beginnings += item.times * item.rule.beginnings
            rule.chain = max(rule.chain, item.times + item.rule.chain)
        _check_ways(rule.beginnings)
        if rule.chain > MOST_CHAIN:
            raise GrammarError(f"more than {MOST_CHAIN} of its rules begin with one another")


def _count_ways_on(sequence: list[_Item]) -> None:
    """Count the continuations at each place of a sequence. Raises GrammarError for too many."""
    ways = 1
    for item in reversed(sequence):
        here = item.times * item.rule.beginnings if item.rule is not None else 1
        ways = here + (ways if item.optional or (item.rule is not None and item.rule.nullable) else 0)
        _check_ways(ways)


def _check_ways(ways: int) -> None:
    if ways > MOST_BEGINNINGS:
        raise GrammarError(f"it can go on in more than {MOST_BEGINNINGS} ways at one place")


def _check_recursion(rules: list[_Rule]) -> None:
    """Raises GrammarError if two alternatives of a rule begin alike up to the rule itself, and continue after it.

    llama.cpp follows both until they differ, which is after the inner rule, so each level of nesting doubles its
    stacks. The same over several rules is not checked: lists of lists are written like that, and end early.
    """
    steps = 0
    for rule in rules:
        if len(rule.alternatives) < 2:
            continue
        seen: set[tuple[object, ...]] = set()
        for sequence in rule.alternatives:
            prefix, looked = _prefix_to_itself(rule, sequence)
            steps += looked
            if steps > _MOST_STEPS:
                return
            if prefix in seen:
                raise GrammarError(
                    f"two alternatives of its rule `{rule.name[:40]}` begin alike up to that rule itself; write their "
                    'common beginning once, as in `"a" r ("x" | "y")` for `"a" r "x" | "a" r "y"`'
                )
            if prefix:
                seen.add(prefix)


def _prefix_to_itself(rule: _Rule, sequence: list[_Item]) -> tuple[tuple[object, ...], int]:
    """The elements before the rule itself in a sequence (() if it is missing or last), and how many were visited.

    Rules of one alternative are written out.
    """
    prefix: list[object] = []
    looked = 0
    todo = [iter(sequence)]
    while todo and len(todo) + len(prefix) < _MOST_PREFIX:
        item = next(todo[-1], None)
        looked += 1
        if item is None:
            todo.pop()
        elif item.rule is None:
            prefix.extend(_characters(item))
        elif (item.least, item.most) != (1, 1):
            prefix.append((id(_meant(item.rule)), item.least, item.most))
        elif (target := _meant(item.rule)) is _meant(rule):
            goes_on = any(next(rest, None) is not None for rest in todo)
            return (tuple(prefix) if goes_on else ()), looked
        elif len(target.alternatives) == 1:
            todo.append(iter(target.alternatives[0]))
        else:
            prefix.append(id(target))
    return (), looked


def _characters(item: _Item) -> Iterator[object]:
    """The single characters of a literal. A set of one character is that character."""
    inner = item.text[1:-1]
    if (item.least, item.most) != (1, 1):
        yield item.text, item.least, item.most
    elif item.text.startswith('"'):
        yield from _CHARACTER.findall(inner[: 8 * _MOST_PREFIX])
    else:
        yield inner if _CHARACTER.fullmatch(inner) else item.text


def _meant(rule: _Rule) -> _Rule:
    """The rule for which this one is only another name, else this one."""
    for _ in range(_MOST_PREFIX):
        if len(rule.alternatives) != 1 or len(rule.alternatives[0]) != 1:
            break
        item = rule.alternatives[0][0]
        if item.rule is None or (item.least, item.most) != (1, 1):
            break
        rule = item.rule
    return rule
