"""NVIDIA Transformer Engine: modules only, so that the functional part is its cross entropy."""

DEVICES = ("cuda",)


def load():
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

    # Cloned, as it writes the gradient over the logits.
    return dict(cross_entropy=lambda input, target: parallel_cross_entropy(input[None].clone(), target[None], 0.0, True, None))
