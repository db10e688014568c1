"""flash-attn: its Triton norms and cross entropy and its jitted swiglu, for a GPU."""

DEVICES = ("cuda",)


def load():
    from flash_attn.losses.cross_entropy import CrossEntropyLoss
    from flash_attn.ops.activations import swiglu
    from flash_attn.ops.triton.layer_norm import layer_norm_fn, rms_norm_fn

    def add_rms_norm(input, residual, normalized_shape, weight, eps):
        return rms_norm_fn(input, weight, None, residual=residual, eps=eps, prenorm=True)

    def add_layer_norm(input, residual, normalized_shape, weight, eps, bias):
        return layer_norm_fn(input, weight, bias, residual=residual, eps=eps, prenorm=True)

    return dict(
        rms_norm=lambda input, normalized_shape, weight, eps: rms_norm_fn(input, weight, None, eps=eps),
        layer_norm=lambda input, normalized_shape, weight, bias: layer_norm_fn(input, weight, bias, eps=1e-5),
        add_rms_norm=add_rms_norm,
        add_layer_norm=add_layer_norm,
        swiglu=lambda gate: swiglu(*gate.chunk(2, -1)),
        cross_entropy=lambda input, target: CrossEntropyLoss()(input, target),
    )
