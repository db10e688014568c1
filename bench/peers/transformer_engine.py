"""NVIDIA Transformer Engine: modules only, so that the functional part is its cross entropy."""


def load():
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

    return dict(cross_entropy=lambda input, target: parallel_cross_entropy(input[None].clone(), target[None], 0.0, True, None))
