"""Grammars that would crash or hang llama.cpp are refused, and common ones pass."""

import time
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh_llm.wire.http import gbnf
from mesh_llm.wire.http.gbnf import GrammarError, check_grammar

JSON = r"""
# any JSON
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws ( string ":" ws value ("," ws string ":" ws value)* )? "}" ws
array  ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) )* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws
ws ::= | " " | "\n" [ \t]{0,20}
"""


RIGHT_RECURSIVE = r"""
root ::= value
value ::= object | array | "\"" [a-z]* "\"" | [0-9]+ | "null"
object ::= "{" "}" | "{" members "}"
members ::= pair "," members | pair
pair ::= "\"" [a-z]* "\"" ":" value
array ::= "[" "]" | "[" elements "]"
elements ::= value "," elements | value
"""

C = r"""
root ::= statement*
statement ::= name "=" expression ";" | "if" "(" expression ")" block | "if" "(" expression ")" block "else" block
block ::= "{" statement* "}"
expression ::= term (("+" | "-") term)*
term ::= name | name "(" arguments? ")" | "(" expression ")" | "-" term | [0-9]+
arguments ::= expression ("," expression)*
name ::= [a-z]+
"""

ALIKE = [
    'root ::= "a" root "x" | "a" root "y" | "b"',
    'root ::= "a" root "x" | "a" root "x" | "b"',
    'root ::= ("a" root "x") | "a" (root) "y" | "b"',
    'root ::= (("a" root "x" | "a" root "y" | "b"))',
    'root ::= "ab" root "x" | "a" "b" root "y" | "c"',
    'root ::= "a" root "x" | [a] root "y" | "b"',
    'root ::= one | two | "b"\none ::= "a" root "x"\ntwo ::= begin "y"\nbegin ::= "a" again\nagain ::= root',
    'root ::= [a-z]+ ws root "x" | [a-z]+ ws root "y" | "b"\nws ::= " " | "\\n"',
    'root ::= formula\nformula ::= [a-z] | "(" formula " and " formula ")" | "(" formula " or " formula ")"',
]


@pytest.mark.parametrize(
    "grammar",
    [
        JSON,
        'root ::= "yes" | "no"',
        'root ::= (\n"a" |\n"b"\n)+ [^\\]] . <[5]> !<[6]> <think>',
        'root ::= "a" root | "b"',
        # Lists and expressions as people write them.
        'root ::= item "," root | item\nitem ::= [a-z]+',
        'root ::= item ("," root)?\nitem ::= [a-z]+ | "(" root ")"',
        'root ::= sum\nsum ::= factor "+" sum | factor\nfactor ::= atom "*" factor | atom\natom ::= "1" | "(" sum ")"',
        RIGHT_RECURSIVE,
        C,
        'root ::= "a" root "x" | "b" root "y" | "c"',
        'root ::= "a" root ("x" | "y") | "b"',
        # Both alternatives end here, so they are the same.
        'root ::= "a" root | "a" root | "b"',
        'root ::= "a" b root "x" | "a" c root "y" | ""\nb ::= "b" | "d"\nc ::= "c" | "d"',
        'root ::= "a"{2} root "x" | "a"{3} root "y" | "b"',
        'root ::= "" "a" []',
        'root ::= a{3} # thrice\n\n\na ::= "a"{2,} | "b"{,}'.replace("{,}", "{0,}"),
        "root ::= " + "(" * gbnf.MOST_DEPTH + '"a"' + ")" * gbnf.MOST_DEPTH,
        "\r\n" + 'root::="a"?*+\r\n',
    ],
)
def test_common_grammars_pass(grammar: str) -> None:
    check_grammar(grammar)


def ways(count: int) -> str:
    rules = [f'r{i} ::= r{i + 1} "x" | r{i + 1} "y"' for i in range(count)]
    return "\n".join(["root ::= r0", *rules, f'r{count} ::= "a"'])


@pytest.mark.parametrize(
    ("grammar", "why"),
    [
        ("root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000, "deep"),
        ("root ::= " + "(" * 50_000 + '"a"' + ")" * 50_000, "longer"),
        ("root ::= " + "(" * (gbnf.MOST_DEPTH + 1) + '"a"' + ")" * (gbnf.MOST_DEPTH + 1), "deep"),
        (ways(11), "ways"),
        (ways(40), "ways"),
        # The same, but not at the beginning.
        (ways(11).replace("root ::= r0", 'root ::= "a" ("b" r0)'), "ways"),
        ('root ::= "a" ' + "r? " * 1100 + '\nr ::= "b"', "ways"),
        ('root ::= a root "x" | "y"\na ::= b\nb ::= ""', "begins with itself"),
        ('root ::= root "x" | "y"', "begins with itself"),
        ("\n".join(f"{'root' if i == 0 else f'r{i}'} ::= r{i + 1}" for i in range(3000)) + '\nr3000 ::= "a"', "begin"),
        ("root ::= " + "r{0,40}\n" + "\n".join(f"r{'x' * i} ::= (r{'x' * (i + 1)}{{0,40}})" for i in range(3))
         + '\nrxxx ::= "a"?', "ways"),
        ("root ::= " + '"abcdefgh"{0,2000} ' * 20, "elements"),
        ('root ::= "' + "a" * 1000 + '"{2000}', "elements"),
        ('root ::= "a"{5,2}', "above the upper"),
        ('root ::= "a"{2001}', "repeats"),
        ('root ::= "a"{99999999999999999999}', "repetition"),
        ("root ::= " + "n" * 300, "name"),
        ("root ::= " + '("a")' * 5000, "rules"),
        # Each level doubles the number of parses.
        *((grammar, "begin alike") for grammar in ALIKE),
        ("root ::= *", "repeats nothing"),
        ('root ::= ""{5}', "repeats nothing"),
        ("root ::= foo", "does not define"),
        ('foo ::= "a"', "no rule `root`"),
        ('root ::= ("a"', "middle"),
        ('root ::= "a")', "not open"),
        ("root", "middle"),
        ('root ::= "a', "cannot be read"),
        ('root ::= "a"\n| "b"', "expected"),
        ("", "root"),
    ],
)  # fmt: skip
def test_costly_and_invalid_grammars_are_refused_quickly(grammar: str, why: str) -> None:
    began = time.process_time()
    with pytest.raises(GrammarError, match=why):
        check_grammar(grammar)
    assert time.process_time() - began < 2.0


def test_the_check_for_recursion_is_fast() -> None:
    """Long alternatives, rules that are repeated many times, and rules that only name other rules."""
    shared = 'p ::= "' + "a" * 400 + '" q root\nq ::= ' + '"b" ' * 60 + "\n"
    many = "root ::= " + " | ".join(["p"] * 900) + ' | "c"\n' + shared
    nested = (
        "root ::= r0 r0 root | r0\n" + "\n".join(f"r{i} ::= r{i + 1} r{i + 1}" for i in range(11)) + '\nr11 ::= "a"'
    )
    names = "root ::= " + " | ".join(f'"a" n{i} root' for i in range(900)) + ' | "b"\n'
    names += "\n".join(f"n{i} ::= n{i + 1}" for i in range(900)) + '\nn900 ::= "a"'
    began = time.process_time()
    for grammar in (many, nested, names):
        with suppress(GrammarError):
            check_grammar(grammar)
    assert time.process_time() - began < 2.0


@given(st.text(alphabet='ab()|*+?{},:="[]\\^. \n#-<>!0129', max_size=200))
def test_any_text_is_accepted_or_refused(text: str) -> None:
    with suppress(GrammarError):
        check_grammar(text)
