"""quack: CuTe-DSL kernels, for Hopper and later."""

DEVICES = ("cuda",)


def load():
    from quack import cross_entropy, rmsnorm

    return dict(
        rms_norm=lambda input, normalized_shape, weight, eps: rmsnorm(input, weight, eps=eps),
        cross_entropy=lambda input, target: cross_entropy(input, target, reduction="mean"),
    )
