"""What attention adds to a token's computation: the part that grows with the tokens that are in the context already.

A token's queries are multiplied with the keys of every token before it and its own, and what comes of that with their
values; layers with a window see its tokens only. The product of a head takes as many multiplications as it has
elements, so the number is in the model's header (`LayerFacts.products`), and times come from the machine's rates
(`Speed.attention`). Everything else that a token takes is the same at every place.
"""

from mesh_llm.core.types.model import LayerFacts, ModelFacts, Speed


def prompt_products(facts: ModelFacts, tokens: int, start: int = 0) -> float:
    """Multiplications of the attention of `tokens` tokens in a row, after `start` others, through all layers."""
    whole = _pairs(start, tokens)
    windowed = _windowed_pairs(start, tokens, facts.window)
    return sum(layer.products * (windowed if _narrow(facts, layer) else whole) for layer in facts.layer_facts)


def prompt_attention(facts: ModelFacts, speed: Speed, tokens: int, start: int = 0, part: float = 1.0) -> float:
    """Seconds of the attention of a prompt's tokens on one machine, which has `part` of the layers."""
    return speed.prompt_attention_seconds(facts.size_bytes, part * prompt_products(facts, tokens, start))


def token_attention(
    facts: ModelFacts, speed: Speed, context: int, part: float = 1.0, layers: tuple[LayerFacts, ...] | None = None
) -> float:
    """Seconds of the attention of one token on one machine.

    Args:
        facts: the model.
        speed: of the machine.
        context: tokens before it.
        part: of the layers that the machine has.
        layers: those that it has instead; None: all.
    """
    products = read = 0.0
    for layer in facts.layer_facts if layers is None else layers:
        seen = min(context, facts.window) if _narrow(facts, layer) else context
        products += layer.products * seen
        read += layer.row * seen
    return speed.token_attention_seconds(facts.size_bytes, part * products, part * read)


def _narrow(facts: ModelFacts, layer: LayerFacts) -> bool:
    return layer.windowed and facts.window > 0


def _pairs(start: int, tokens: int) -> float:
    """How many tokens `tokens` tokens after `start` others see together, each itself too."""
    return tokens * start + tokens * (tokens + 1) / 2


def _windowed_pairs(start: int, tokens: int, window: int) -> float:
    """The same where each sees the last `window` only."""
    growing = min(tokens, max(0, window - start))
    return _pairs(start, growing) + (tokens - growing) * window
