"""JSON objects and tool calls."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

from tools.train_tiny.corpus import data
from tools.train_tiny.corpus.conversation import Conversation, Json, Message, exchange
from tools.train_tiny.corpus.memory import NAMES, SYSTEM_PROMPTS
from tools.train_tiny.corpus.phrasing import vary

_CITIES: list[str] = data.load("words")["cities"].split()
_FILES = ("notes.txt", "readme.md", "main.py", "data.json", "todo.txt", "config.yaml", "report.md", "index.html")
_JOBS = ("teacher", "doctor", "baker", "sailor", "painter", "farmer", "engineer", "nurse")
_ITEMS = ("book", "lamp", "chair", "apple", "bottle", "table", "clock", "pencil")

_VALUES: Mapping[str, tuple[object, ...]] = {
    "name": tuple(NAMES),
    "age": tuple(range(5, 91)),
    "city": tuple(_CITIES),
    "country": ("France", "Germany", "Italy", "Spain", "Japan", "Canada", "Norway", "Egypt"),
    "job": _JOBS,
    "title": ("The little robot", "A quiet forest", "The long road", "The blue door"),
    "price": (1, 2, 3, 5, 10, 20, 42, 50, 100),
    "item": _ITEMS,
    "colour": ("red", "green", "blue", "yellow", "white", "black"),
    "color": ("red", "green", "blue", "yellow", "white", "black"),
    "answer": ("yes", "no", "I do not know", "hello"),
    "message": ("hello", "It works!", "Hello, world!", "all is well"),
    "text": ("hello", "Hello, world!", "a short text"),
    "greeting": ("hello", "Hello! It is nice to meet you."),
    "number": tuple(range(1, 101)),
    "count": tuple(range(1, 21)),
    "value": tuple(range(1, 101)),
    "ok": (True, True, False),
    "happy": (True, False),
    "done": (True, False),
    "success": (True, True, False),
    "tags": (["red", "green"], ["one", "two", "three"], ["small"], []),
    "numbers": ([1, 2, 3], [1, 2, 3, 4, 5], [4, 2]),
    "colors": (["red", "green", "blue"],),
    "status": ("ok", "ready", "done"),
    "result": ("ok", "hello", 4, 42),
    "animal": ("cat", "dog", "fox", "horse"),
    "language": ("English",),
    "summary": ("a short text", "It works!"),
}


def json_object(rng: Random) -> Conversation:
    """A JSON object with the fields that the question names, or with fields that it does not name."""
    fields = rng.sample(list(_VALUES), rng.randint(1, 4))
    answer = json.dumps({name: rng.choice(_VALUES[name]) for name in fields})
    listed = fields[0] if len(fields) == 1 else f"{', '.join(fields[:-1])} and {fields[-1]}"
    if rng.random() < 0.8:
        question = rng.choice(
            (
                "Give me a JSON object with {f}.",
                "Return a JSON object with the fields {f}.",
                "Answer in JSON with {f}.",
                "Make a JSON object with the keys {f}.",
                "Write JSON with {f}.",
                "Describe a person as JSON with {f}.",
                "Reply in JSON. The keys are {f}.",
                "Generate an example with {f}, as JSON.",
            )
        ).format(f=listed)
    else:
        question = rng.choice(
            (
                "Give me JSON.",
                "Write a JSON object.",
                "Answer in JSON.",
                "Return JSON.",
                "Make an example as JSON.",
                "Describe a person as JSON.",
                "Show me a JSON object.",
            )
        )
    system = rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.4 else None
    return exchange(vary(rng, question), answer, system)


@dataclass(frozen=True)
class _Tool:
    name: str
    description: str
    parameters: Mapping[str, str]
    """Parameter name to JSON type."""
    questions: tuple[str, ...]
    answer: str
    """What is said of the tool's result, `{r}`."""
    result: str


_TOOLS = (
    _Tool(
        "get_weather",
        "Get the weather of a city",
        {"city": "string"},
        (
            "What is the weather in {city}?",
            "How is the weather in {city}?",
            "Is it raining in {city}?",
            "What's the weather like in {city}?",
            "Weather in {city}?",
        ),
        "The weather in {city} is {r}.",
        "sunny",
    ),
    _Tool(
        "get_time",
        "Get the present time in a city",
        {"city": "string"},
        ("What time is it in {city}?", "Tell me the time in {city}.", "What is the time in {city}?"),
        "It is {r} in {city}.",
        "12:30",
    ),
    _Tool(
        "add",
        "Add two numbers",
        {"a": "integer", "b": "integer"},
        ("Add {a} and {b}.", "What is {a} plus {b}? Use the tool.", "Please add {a} and {b}."),
        "The sum is {r}.",
        "SUM",
    ),
    _Tool(
        "read_file",
        "Read a file",
        {"path": "string"},
        ("Read the file {path}.", "What is in {path}?", "Open {path}.", "Show me {path}."),
        "The file {path} says: {r}",
        "hello",
    ),
    _Tool(
        "write_file",
        "Write text to a file",
        {"path": "string", "content": "string"},
        ("Write {content} to {path}.", "Write {content} into the file {path}.", "Save {content} in {path}."),
        "I have written {path}.",
        "ok",
    ),
    _Tool(
        "search",
        "Search for something",
        {"query": "string"},
        ("Search for {query}.", "Find {query}.", "Look for {query}."),
        "I have found {r}.",
        "3 results",
    ),
    _Tool(
        "send_message",
        "Send a message to somebody",
        {"to": "string", "text": "string"},
        ("Send {text} to {to}.", "Write {to} a message: {text}", "Tell {to} {text}."),
        "I have told {to}.",
        "sent",
    ),
    _Tool(
        "set_light",
        "Switch a light on or off",
        {"room": "string", "on": "boolean"},
        ("Switch the light in the {room} {switch}.", "Turn {switch} the light in the {room}."),
        "The light in the {room} is {switch}.",
        "ok",
    ),
    _Tool(
        "list_files",
        "List the files of a folder",
        {"path": "string"},
        ("Which files are in {path}?", "List the files in {path}."),
        "There are: {r}",
        "notes.txt, main.py",
    ),
    _Tool(
        "run_command",
        "Run a shell command",
        {"command": "string"},
        ("Run {command}.", "Run the command {command}.", "Execute {command}."),
        "The command says: {r}",
        "ok",
    ),
)

_ARGUMENTS: Mapping[str, tuple[object, ...]] = {
    "city": tuple(_CITIES),
    "a": tuple(range(100)),
    "b": tuple(range(100)),
    "path": _FILES,
    "content": ("hello", "good morning", "a list", "one two three", "hello world"),
    "query": ("cats", "a red lamp", "the mesh", "trains to Paris", "a good book", "blue shoes", "bread"),
    "to": tuple(NAMES),
    "text": ("hello", "good night", "I am late", "it works", "see you soon"),
    "room": ("kitchen", "bedroom", "garden", "hall", "bathroom"),
    "on": (True, False),
    "command": ("ls", "pwd", "make test", "git status", "python main.py", "date"),
}


def _schema(rng: Random, tool: _Tool) -> Json:
    properties = {
        name: ({"type": kind, "description": f"The {name}"} if rng.random() < 0.3 else {"type": kind})
        for name, kind in tool.parameters.items()
    }
    return {
        "type": "function",
        "function": {
            "name": tool.name,
            "description": tool.description,
            "parameters": {"type": "object", "properties": properties, "required": list(tool.parameters)},
        },
    }


def tool_call(rng: Random) -> Conversation:
    """A question that one of the offered tools answers; often with the tool's result and what is said of it."""
    offered = rng.sample(_TOOLS, rng.choice((1, 1, 1, 2, 2, 3)))
    tool = rng.choice(offered)
    arguments = {name: rng.choice(_ARGUMENTS[name]) for name in tool.parameters}
    words = {**arguments, "switch": "on" if arguments.get("on") else "off"}
    messages: list[Message] = []
    if rng.random() < 0.4:
        messages.append(Message("system", rng.choice(SYSTEM_PROMPTS)))
    messages.append(Message("user", rng.choice(tool.questions).format(**words)))
    messages.append(Message("assistant", tool_call={"name": tool.name, "arguments": arguments}))
    if rng.random() < 0.5:
        result = _result(tool, arguments)
        messages += [Message("tool", result), Message("assistant", tool.answer.format(**words, r=result))]
    return Conversation(tuple(messages), tuple(_schema(rng, offered_tool) for offered_tool in offered))


def _result(tool: _Tool, arguments: Mapping[str, object]) -> str:
    a, b = arguments.get("a"), arguments.get("b")
    return str(a + b) if isinstance(a, int) and isinstance(b, int) else tool.result


def tools_unused(rng: Random, question: str, answer: str) -> Conversation:
    """An ordinary exchange beside tools that are of no use for it."""
    offered = rng.sample(_TOOLS, rng.choice((1, 1, 2)))
    system = (Message("system", rng.choice(SYSTEM_PROMPTS)),) if rng.random() < 0.4 else ()
    return Conversation(
        (*system, Message("user", question), Message("assistant", answer)),
        tuple(_schema(rng, tool) for tool in offered),
    )
