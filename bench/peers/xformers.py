"""xformers: Triton RMS norm, for a GPU; versions without its gradient are refused with what they say."""

DEVICES = ("cuda",)


def load():
    from xformers.ops import rms_norm

    return dict(rms_norm=lambda input, normalized_shape, weight, eps: rms_norm(input, weight, eps))
