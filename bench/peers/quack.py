"""quack: CuTe-DSL kernels, for Hopper and later. Its linear cross entropy goes backward once and so has no place beside ours."""

DEVICES = ("cuda",)


def load():
    from quack import cross_entropy, rmsnorm, softmax

    def add_rms_norm(input, residual, normalized_shape, weight, eps):
        return rmsnorm(input, weight, residual=residual, eps=eps, prenorm=True)

    return dict(
        rms_norm=lambda input, normalized_shape, weight, eps: rmsnorm(input, weight, eps=eps),
        add_rms_norm=add_rms_norm,
        softmax=lambda input, dim: softmax(input),
        cross_entropy=lambda input, target: cross_entropy(input, target, reduction="mean"),
    )
