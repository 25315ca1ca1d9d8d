"""Shapes that operators of recurrent models must have, and triangular systems."""

from mesh_llm.wire.ggml_rpc_operator_names import I32
from mesh_llm.wire.ggml_rpc_shapes import Operands, Rule, contiguous, f32, have, packed, same
from mesh_llm.wire.ggml_rpc_tensor import Tensor


def ssm_conv(dst: Tensor, s: Operands) -> bool:
    """SSM_CONV."""
    x, c = have(s, 2)
    tokens = x.shape[0] - c.shape[0] + 1
    return (
        x.shape[3] == 1
        and c.shape[2:] == (1, 1)
        and x.shape[1] == c.shape[1]
        and tokens >= 0
        and dst.shape == (c.shape[1], tokens, x.shape[2], 1)
        and f32(dst, x, c)
        and packed(x)
        and packed(dst)
        and contiguous(c)
    )


def ssm_scan(dst: Tensor, s: Operands) -> bool:
    """SSM_SCAN."""
    state, x, dt, a, b, c, ids = have(s, 7)
    width, heads, tokens, sequences = x.shape
    kept = dst.params[0]
    return (
        state.shape[:3] == (b.shape[0], width, heads)
        and dt.shape == (heads, tokens, sequences, 1)
        and same(b, c)
        and b.shape[2:] == (tokens, sequences)
        and b.shape[1] > 0
        and heads % b.shape[1] == 0
        and ids.shape == (sequences, 1, 1, 1)
        and ids.type == I32
        and a.shape[1:] == (heads, 1, 1)
        and kept >= 1
        and (a.shape[0] == 1 or (a.shape[0] == state.shape[0] and kept == 1))
        and dst.elements == x.elements + kept * state.shape[0] * width * heads * sequences
        and f32(dst, state, x, dt, a, b, c)
        and contiguous(dst, state, dt, a)
        and all(packed(t) and t.strides[1] == t.shape[0] * 4 for t in (x, b, c))
    )


def linear_attention(first: int, more: int, state_at: int) -> Rule:
    """RWKV and gated linear attention: tensors of one shape, and a state."""

    def check(dst: Tensor, s: Operands) -> bool:
        operands = have(s, state_at + 1)
        state = operands[state_at]
        like = operands[first]
        width, heads, tokens, _ = like.shape
        sequences = state.shape[1]
        same = [operands[i] for i in range(first, first + more)]
        return (
            all(t.shape[:3] == (width, heads, tokens) and t.shape[3] == 1 for t in same)
            and state.elements == width * width * heads * sequences
            and dst.shape == (width * heads, tokens + width * sequences, 1, 1)
            and sequences > 0
            and tokens % sequences == 0
            and f32(dst, *operands)
            and contiguous(dst, *operands)
        )

    return check


def rwkv6(dst: Tensor, s: Operands) -> bool:
    """RWKV_WKV6."""
    k, v, r, first, decay, _ = have(s, 6)
    return (
        all(t.shape == k.shape for t in (v, r, decay))
        and first.elements == k.shape[0] * k.shape[1]
        and linear_attention(0, 1, 5)(dst, s)
    )


def solve_tri(dst: Tensor, s: Operands) -> bool:
    """SOLVE_TRI."""
    a, b = have(s, 2)
    fits = a.shape[0] == a.shape[1] == b.shape[1] and a.shape[2:] == b.shape[2:]
    return fits and same(dst, b) and f32(dst, a, b) and contiguous(dst, a, b)


def gated_delta_net(dst: Tensor, s: Operands) -> bool:
    """GATED_DELTA_NET."""
    q, k, v, g, beta, state = have(s, 6)
    width, heads, tokens, sequences = v.shape
    kept = dst.params[0]
    return (
        same(q, k)
        and q.shape[0] == width
        and q.shape[1] > 0
        and heads % q.shape[1] == 0
        and q.shape[2] == tokens
        and q.shape[3] > 0
        and sequences % q.shape[3] == 0
        and g.shape[0] in {1, width}
        and g.shape[1:] == (heads, tokens, sequences)
        and beta.shape == (1, heads, tokens, sequences)
        and state.shape == (width, width, heads, sequences)
        and kept >= 1
        and dst.shape == (width * heads, (tokens + kept * width) * sequences, 1, 1)
        and f32(dst, q, k, v, g, beta, state)
        and all(packed(t) for t in (q, k, v))
        and contiguous(dst, g, beta, state)
    )
