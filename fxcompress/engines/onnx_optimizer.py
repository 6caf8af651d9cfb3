"""Simplifies ONNX graphs: constant folding and rewrites by onnxscript, in time that grows with the graph.

torch.onnx.export can do it too, with the same rules and a few more. One of those, which makes slices of one value a
split, looks through the whole graph at each node: in a profile it was 62 % of the export of a large transformer.
Engines do as well without.
"""

from __future__ import annotations

from typing import Any

_RULES = (
    "add_0_rule", "cast_cast_rule", "cast_constant_of_shape_rule", "cast_constant_of_shape_without_value_rule",
    "collapse_slice2_rule", "collapse_slice_rule", "div_by_1_rule", "dropout_inference_rule", "dropout_zero_rule",
    "flatten_to_reshape_rule", "fuse_batchnorm_into_conv_rule", "fuse_batchnorm_into_conv_transpose_rule",
    "fuse_batchnorm_into_gemm_rule", "fuse_pad_into_conv_integer_rule", "fuse_pad_into_conv_rule",
    "materialize_reshape_shape_rule", "mul_by_1_rule", "no_op_cast_rule", "no_op_dynamic_scatter_nd_rule",
    "no_op_expand_rule", "no_op_static_scatter_nd_rule", "no_op_transpose_rule",
    "normalize_pad_format_conv_integer_rule", "normalize_pad_format_conv_rule", "one_reshape_matmul_reshape_rule",
    "remove_optional_bias_from_conv_rule", "remove_optional_bias_from_conv_transpose_rule",
    "remove_optional_bias_from_gemm_rule", "remove_optional_bias_from_qlinear_conv_rule", "reshape_reshape_rule",
    "squeeze_reshape_1d_rule", "sub_0_rule", "successive_clip_relu_rule", "successive_clip_rule",
    "successive_relu_clip_rule", "successive_relu_rule", "transpose_transpose_rule",
    "two_reshapes_matmul_reshape_rule", "unsqueeze_unsqueeze_rule",
)  # fmt: skip
"""In ``onnxscript.rewriter.rules.common``: what torch.onnx.export applies by default, less ``slice_split_rule`` and
those of minima and maxima, which left a node that reads a bound that is not there
(onnxscript 0.7, on timm's gemma4_vit)."""


def simplify(model: Any) -> None:
    """Simplifies an ``onnx_ir.Model`` in place; it computes the same."""
    from onnx_ir import passes
    from onnx_ir.passes import common as common_passes
    from onnxscript import optimizer, rewriter
    from onnxscript.rewriter.rules import common as rules

    common: Any = common_passes  # without types in part
    rewrite = rewriter.RewritePass([getattr(rules, name) for name in _RULES])
    common.InlinePass()(model)
    for _ in range(2):  # rewrites make new constants
        optimizer.fold_constants(model, onnx_shape_inference=True)
        rewrite(model)
    passes.Sequential(
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(model)
