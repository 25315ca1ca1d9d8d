"""Ask llama.cpp for a greedy completion, without the product's code: `MODEL COUNT` and, as JSON on input, tokens.

Prints JSON: the tokens written, why it stopped, and by how much the closest decision was made (in log-probability).
"""

import importlib
import json
import os
import sys


def main() -> None:
    model, count = sys.argv[1], int(sys.argv[2])
    xllamacpp = importlib.import_module("xllamacpp")  # it has no types
    parameters = xllamacpp.CommonParams()
    parameters.model.path = model
    parameters.port = 0
    parameters.n_ctx = 2048
    parameters.n_parallel = 1
    parameters.fit_params = False
    # More threads wait for each other by spinning, which takes long where others use the processor too.
    parameters.cpuparams.n_threads = 1
    server = xllamacpp.Server(parameters)
    request = {"prompt": json.load(sys.stdin), "max_tokens": count, "temperature": 0, "logprobs": 2}
    choice = server.handle_completions(request)["choices"][0]
    steps = choice["logprobs"]["content"]
    best_two = [[alternative["logprob"] for alternative in step["top_logprobs"][:2]] for step in steps]
    result = {
        "tokens": [step["id"] for step in steps],
        "finish": choice["finish_reason"],
        "closest": min(first - second for first, second in best_two),
    }
    print(json.dumps(result), flush=True)
    # The server's threads do not end by themselves.
    os._exit(0)


if __name__ == "__main__":
    main()
