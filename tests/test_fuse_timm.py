"""Models of timm, small and random: what fuse finds in them computes the same."""

import copy

import pytest
import timm
import torch

import fusegrad

MODELS = {  # and what must be among the replacements
    "test_resnet": {"fusegrad.nn.BatchNorm2d(activation='relu')"},
    "test_efficientnet": {"fusegrad.nn.BatchNorm2d(activation='silu')", "fusegrad.nn.BatchNorm2d()"},
    "test_convnext": {"fusegrad.nn.LayerNorm2d()"},
    "test_vit": {"fusegrad.nn.LayerNorm()", "fusegrad.nn.Linear(activation='gelu')"},
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).double()
    original, keys = copy.deepcopy(model), list(model.state_dict())
    report = fusegrad.fuse(model)
    print(report)
    assert list(model.state_dict()) == keys and MODELS[name] <= {e.by for e in report.replaced}
    x, cotangent = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, 3, 160, 160), (2, 5)))
    results = []
    for m in (model, original):
        for training in (True, False):
            y = m.train(training)(x)
            results.append((y, torch.autograd.grad(y, list(m.parameters()), cotangent, allow_unused=True)))
    torch.testing.assert_close(results[:2], results[2:])
    torch.testing.assert_close(list(model.buffers()), list(original.buffers()))
    assert len(fusegrad.unfuse(model)) == len(report.replaced)
    assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]
