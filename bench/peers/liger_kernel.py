"""Liger-Kernel: Triton kernels, for a GPU. What a version lacks is refused there with what Python says. Its kl_div and jsd, which give
the target no gradient, have no place beside ours."""

DEVICES = ("cuda",)


def load():
    import liger_kernel.transformers.functional as liger
    from torch.nn.functional import silu

    def group_norm(input, num_groups, weight, bias, activation):
        return silu(liger.liger_group_norm(input, weight, bias, input.shape[1], num_groups, 1e-5))

    def add_rms_norm(input, residual, normalized_shape, weight, eps):
        return liger.liger_fused_add_rms_norm(input, residual, weight, eps, in_place=False)

    # Cloned logits, as it writes the gradient over them.
    return dict(
        rms_norm=lambda input, normalized_shape, weight, eps: liger.liger_rms_norm(input, weight, eps, in_place=False),
        layer_norm=lambda input, normalized_shape, weight, bias: liger.liger_layer_norm(input, weight, bias, 1e-5),
        add_rms_norm=add_rms_norm,
        group_norm=group_norm,
        dyt=lambda input, alpha, weight, bias: liger.liger_dyt(input, alpha, weight, bias),
        swiglu=lambda gate: liger.liger_swiglu(*gate.chunk(2, -1)),
        geglu_tanh=lambda gate: liger.liger_geglu(*gate.chunk(2, -1)),
        softmax=lambda input, dim: liger.liger_softmax(input),
        cross_entropy=lambda input, target: liger.liger_cross_entropy(input.clone(), target),
        linear_cross_entropy=lambda input, linear_weight, target: liger.liger_fused_linear_cross_entropy(input, linear_weight, target),
    )
