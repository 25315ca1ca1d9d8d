"""The benchmarks there are: what each is called, how it is run, and how much of it `--quick` leaves."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Benchmark:
    """One of them.

    Attributes:
        name: on the command line; `mesh` means every `mesh.` one.
        module: run as `python -m MODULE --json FILE`; it may define `prepare()`, which is called where there still is
            a network. One that is not there is passed over.
        about: one line.
        words: its words for any run.
        quick: further words for a short run.
        packages: a group of tools/system_packages.sh that it needs; empty: none.
        isolates_itself: it prepares and enters a network namespace by itself.
    """

    name: str
    module: str
    about: str
    words: tuple[str, ...] = ()
    quick: tuple[str, ...] = ("--quick",)
    packages: str = ""
    isolates_itself: bool = False


ALL = (
    Benchmark(
        "proxy",
        "bench.proxy",
        "the API against nothing in between, nginx, litellm's proxy and a bare relay",
        packages="bench",
        isolates_itself=True,
    ),
    Benchmark("mesh.tunnel", "bench.mesh.tunnel", "TCP through the mesh against plain TCP: bulk and small messages"),
    Benchmark("mesh.http", "bench.mesh.http", "a remote model against the local one: first byte and chunk rate"),
    Benchmark(
        "mesh.clients",
        "bench.mesh.clients",
        "what passive nodes cost the node they ask, in memory",
        quick=("--clients", "20"),
    ),
    Benchmark(
        "mesh.idle",
        "bench.mesh.idle",
        "what an idle node among ten costs, in CPU time",
        quick=("--nodes", "4", "--seconds", "20"),
    ),
    Benchmark("mesh.models", "bench.mesh.models", "a model taken from neighbours against plain bytes on a stream"),
    Benchmark(
        "on_demand.swaps",
        "bench.on_demand.swaps",
        "what a request for a model that is not loaded costs beside the load; many swaps of two models",
        quick=("--swaps", "20", "--rounds", "2"),
    ),
    Benchmark(
        "on_demand.simulated",
        "bench.on_demand.simulated",
        "models on demand in a simulated mesh of a thousand nodes: loads, and requests that wait",
        quick=("--nodes", "60", "--models", "20", "--minutes", "5", "--rate", "2"),
    ),
    Benchmark(
        "prompt_cache",
        "bench.prompt_cache",
        "a long prompt after a restart, or a move to another node (--moved), against reading it again",
    ),
    Benchmark(
        "proxy.resume",
        "bench.proxy.resume",
        "what it costs the undisturbed stream that it could be continued",
    ),
    Benchmark(
        "firewall",
        "bench.firewall",
        "what the checks before an rpc-server cost a token and a graph",
        quick=("--rounds", "3", "--architecture", "llama"),
    ),
    Benchmark(
        "gpu",
        "bench.gpu",
        "a GPU through the engine's plugin and through a llama.cpp that was built by hand",
    ),
    Benchmark(
        "split",
        "bench.split",
        "a model on one machine, split by llama.cpp's RPC, and split by mesh-llm",
        quick=("--model", "small", "--delays", "0,20", "--passes", "1", "--rounds", "1", "--tokens", "24"),
    ),
    Benchmark(
        "split.prompts",
        "bench.split.prompts",
        "prompts of 512 to 8,192 tokens on one machine, over llama.cpp's RPC, and split by mesh-llm",
        words=("--delays", "0,10"),
        quick=("--delays", "0", "--tokens", "512,1024", "--rounds", "1"),
    ),
    Benchmark(
        "split.clients",
        "bench.split.clients",
        "1 to 32 clients at once on one machine, over llama.cpp's RPC, and split by mesh-llm",
        words=("--delays", "0,10"),
        quick=("--delays", "0", "--clients", "1,8", "--rounds", "1", "--answer", "16"),
    ),
    Benchmark(
        "split.spec",
        "bench.split.spec",
        "tokens guessed ahead, in text that repeats itself and in text that does not, on one machine and split",
        words=("--delays", "0,20"),
        quick=("--delays", "20", "--rounds", "1", "--answers", "2"),
    ),
    Benchmark(
        "split.many_prompts",
        "bench.split.prompts",
        "a prompt over two to eight stand-in machines, which take a set time instead of computing",
        words=("--stand-in", "--tokens", "4096", "--machines", "2,3,4,8", "--delays", "1", "--megabits", "1000"),
        quick=("--machines", "2,4", "--rounds", "1", "--ways", "solo,ours", "--tokens", "2048"),
    ),
    Benchmark(
        "split.many_clients",
        "bench.split.clients",
        "16 clients over two and four stand-in machines",
        words=("--stand-in", "--clients", "16", "--machines", "2,4", "--delays", "1", "--megabits", "1000"),
        quick=("--rounds", "1", "--ways", "solo,ours", "--answer", "16"),
    ),
    Benchmark(
        "split.slow_links",
        "bench.split.prompts",
        "a prompt over two and three stand-in machines at 100 Mbit/s, with rounded activations (--wire) and without",
        words=(
            *("--stand-in", "--tokens", "2048", "--machines", "2,3", "--delays", "1", "--megabits", "100"),
            *("--prompt-rate", "20000", "--answer-rate", "100", "--ways", "ours,f16,q8"),
        ),
        quick=("--machines", "2", "--rounds", "1", "--tokens", "1024"),
    ),
    Benchmark(
        "split.rounding",
        "bench.split.rounding",
        "what rounded activations (--wire) do to what models say",
        quick=("--models", "tiny", "--texts", "2", "--tokens", "24"),
    ),
    Benchmark(
        "split.check",
        "bench.split.check",
        "whether stand-ins show what real engines do with a prompt",
        quick=("--rounds", "1", "--tokens", "1024"),
    ),
    Benchmark(
        "trust",
        "bench.trust",
        "canaries: how surely a host that serves other weights is found, and how rarely an honest one is accused",
    ),
    Benchmark(
        "conform",
        "bench.conform",
        "clients of pinned versions on the engine alone, through a node, and through a client node: what passes",
        quick=("--suite", "openai, Python"),
    ),
)


def chosen(names: list[str]) -> list[Benchmark]:
    """Those that the names mean, in the catalogue's order; all where there is no name. Raises KeyError(name)."""
    for name in names:
        if not any(_meant(benchmark, name) for benchmark in ALL):
            raise KeyError(name)
    return [benchmark for benchmark in ALL if not names or any(_meant(benchmark, name) for name in names)]


def _meant(benchmark: Benchmark, name: str) -> bool:
    return benchmark.name == name or benchmark.name.startswith(f"{name}.")
