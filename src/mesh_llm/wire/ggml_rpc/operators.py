"""ggml's operators and element types by number, as protocols 7.0.0 and 8.0.0 have them (101 operators)."""

F32, F16, I32, I64, BF16 = 0, 1, 26, 27, 30
FLOATS = frozenset({F32, F16, BF16})
INDICES = frozenset({I32, I64})

# enum ggml_op, in order.
_TEXT = """
none dup add add_id add1 acc sub mul div sqr sqrt log sin cos sum sum_rows cumsum mean argmax count_equal
repeat repeat_back concat silu_back norm rms_norm rms_norm_back group_norm l2_norm mul_mat mul_mat_id out_prod
scale set cpy cont reshape view permute transpose get_rows get_rows_back set_rows diag diag_mask_inf
diag_mask_zero soft_max soft_max_back rope rope_back clamp conv_transpose_1d im2col im2col_back im2col_3d
col2im_1d conv_2d conv_3d conv_2d_dw conv_transpose_2d pool_1d pool_2d pool_2d_back upscale pad pad_reflect_1d
roll arange timestep_embedding argsort top_k leaky_relu tri fill flash_attn_ext flash_attn_back ssm_conv
ssm_scan win_part win_unpart get_rel_pos add_rel_pos rwkv_wkv6 gated_linear_attn rwkv_wkv7 solve_tri
gated_delta_net lightning_indexer dsv4_hc_comb dsv4_hc_pre dsv4_hc_post unary map_custom1 map_custom2
map_custom3 custom cross_entropy_loss cross_entropy_loss_back opt_step_adamw opt_step_sgd glu
"""
_NAMES = _TEXT.split()
OPERATORS = {name: number for number, name in enumerate(_NAMES)}
"""Number by name."""

COMPUTE_FLAG = 16
"""Of a tensor's flags: it is to be computed (GGML_TENSOR_FLAG_COMPUTE)."""

IDLE = frozenset(OPERATORS[name] for name in ("none", "reshape", "view", "permute", "transpose"))
"""Operators that compute nothing: their tensors only name memory."""


def operator_name(number: int) -> str:
    """For messages."""
    return _NAMES[number] if number < len(_NAMES) else str(number)
