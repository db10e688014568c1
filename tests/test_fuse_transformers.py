"""Models of transformers, small and random: each is trained for 20 steps as it is and fused, and its report is complete."""

import copy
import re
import time

import pytest
import torch
import transformers

import fusegrad
from fusegrad import nn
from table import BF16, F64

STEPS = 20
transformers.logging.set_verbosity_error()
LLM = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
           head_dim=8, initializer_range=0.1, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
IMAGE = dict(num_labels=5, depths=[1, 2], hidden_sizes=[8, 16])
MODELS = {
    "Llama": LLM, "Qwen3": LLM, "Gemma2": LLM, "Mistral": LLM,
    "ResNet": IMAGE | dict(embedding_size=8, layer_type="basic"), "ConvNext": IMAGE | dict(num_stages=2, patch_size=2),
}  # fmt: skip
OTHERS = ("Qwen2", "Gemma", "Gemma3", "Phi3", "Olmo2", "Granite", "SmolLM3", "Exaone4")  # not trained here
LANGUAGE = [name for name, config in MODELS.items() if config is LLM]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Such small models are slower with two, and their times mean less."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(name):
    torch.manual_seed(7)
    kind = "ImageClassification" if MODELS.get(name, LLM) is not LLM else "CausalLM"
    config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")(**MODELS.get(name, LLM))
    model = getattr(transformers, f"{name}For{kind}")(config)
    with torch.no_grad():
        for p in model.parameters():  # weights of norms that are all one, or scales of 1e-6, would hide much
            if p.dim() == 1:
                p += torch.randn_like(p) * 0.1
    return model.train()


def batches(name):
    for step in range(STEPS):
        make = torch.Generator().manual_seed(step % 4)
        if name in LANGUAGE:
            ids = torch.randint(3, 96, (4, 16), generator=make)
            yield dict(input_ids=ids, labels=ids.masked_fill(torch.rand(ids.shape, generator=make) < 0.2, -100))
        else:
            images = torch.randn(4, 3, 16, 16, generator=make)
            yield dict(pixel_values=images, labels=torch.randint(5, (4,), generator=make))


def train(name, model):
    """The losses, in float64, and the time of the quickest step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    dtype, losses, times = next(model.parameters()).dtype, [], []
    for batch in batches(name):
        batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
        losses.append(loss.item())
    return torch.tensor(losses, dtype=F64), min(times)


def moved(model, seed):
    """The weights half an ulp beside."""
    model, make = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + (torch.rand(p.shape, generator=make, dtype=F64) - 0.5) * torch.finfo(p.dtype).eps)
    return model


def curve_budget(name, model):
    """The loss curve in float64, and how far that of a correct model in float32 may be off at each step: three times the farthest that
    the unfused model was until then, over runs from weights that round to the same."""
    exact, _ = train(name, copy.deepcopy(model).double())
    runs = [train(name, moved(model, seed) if seed else copy.deepcopy(model)) for seed in range(3)]
    errors = torch.stack([(curve - exact).abs() for curve, _ in runs]).amax(0).cummax(0).values
    return exact, 3 * errors + 4 * torch.finfo(torch.float32).eps * exact.abs(), runs[0]


@pytest.mark.parametrize("name", MODELS)
def test_training_is_that_of_the_unfused_model(name, record_property):
    model = build(name)
    exact, allowed, (plain, plain_time) = curve_budget(name, model)
    keys = list(model.state_dict())
    report = fusegrad.fuse(model)
    with fusegrad.strict():
        curve, fused_time = train(name, model)
    assert list(model.state_dict()) == keys
    assert ((curve - exact).abs() <= allowed).all(), f"off by {(curve - exact).abs() - allowed}"
    assert (allowed < 1e-3 * exact).all()  # so that the rule says something
    difference = (curve - plain).abs().max().item()
    figures = f"largest loss difference {difference:.1e}, step time x {fused_time / plain_time:.2f}"
    text = f"{name}: {STEPS} steps, {len(report.replaced)} replaced, {figures}"
    record_property("fuse", text)
    print(text)


@pytest.mark.parametrize("name", MODELS)
def test_a_step_runs_the_kernels(name):
    """Of each layer that the report says is replaced, forward and backward."""
    model, batch = build(name), next(iter(batches(name)))
    fusegrad.fuse(model)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(**batch).loss.backward()
    found = {e.key.removeprefix("fusegrad::"): e.count for e in profile.key_averages() if e.key.startswith("fusegrad::")}
    of_layers = {kind: sum(isinstance(m, kind) for m in model.modules()) for kind in (nn.RMSNorm, nn.BatchNorm2d, nn.LayerNorm2d)}
    expected = dict(rms_norm=of_layers[nn.RMSNorm], channel_norm=of_layers[nn.BatchNorm2d], layer_norm_2d=of_layers[nn.LayerNorm2d])
    expected["rms_norm" if name in LANGUAGE else "channel_norm" if name == "ResNet" else "layer_norm_2d"] or pytest.fail("none")
    if name in LANGUAGE:
        expected |= dict(rotary=2, gated=2, cross_entropy=1)
    for family, count in expected.items():
        assert found.get(f"{family}_fwd", 0) == found.get(f"{family}_bwd", 0) == count, (family, found)


def test_a_wrong_layer_is_seen():
    """The budget of the curve is one that a wrong eps in a single norm, and a wrong offset, break."""
    model = build("Gemma2")
    exact, allowed, _ = curve_budget("Gemma2", model)
    fusegrad.fuse(model)
    for attribute, value in (("eps", 1e-3), ("weight_offset", 0.9999)):
        wrong = copy.deepcopy(model)
        setattr(wrong.model.norm, attribute, value)
        assert not ((train("Gemma2", wrong)[0] - exact).abs() <= allowed).all()


@pytest.mark.parametrize("name", LANGUAGE)
def test_report_of_a_language_model(name):
    model = build(name)
    original = copy.deepcopy(model)
    report = fusegrad.fuse(model)
    replaced = {e.name: e for e in report.replaced}
    gemma = name == "Gemma2"
    for path, m in original.named_modules():
        if "RMSNorm" in type(m).__name__:
            options = "weight_offset=1.0, cast_order='torch'" if gemma else "weight_offset=0.0, cast_order='llama'"
            assert replaced.pop(path).by == f"fusegrad.nn.RMSNorm({options})"
        elif type(m).__name__ == f"{name}MLP":
            assert replaced.pop(path).by == f"fusegrad.functional.{'geglu_tanh' if gemma else 'swiglu'}"
        elif path.endswith("act_fn"):
            assert replaced.pop(path).by == f"in the kernel of its {name}MLP"
        elif path.endswith("self_attn"):
            entry = replaced.pop(path)
            assert (entry.layer, entry.by) == (f"{name}Attention.apply_rotary_pos_emb", "fusegrad.functional.rotary_embedding")
        elif path == "":
            entry = replaced.pop(path)
            assert entry.layer == f"{name}ForCausalLM.loss_function" and "cross_entropy" in entry.by and "ForCausalLMLoss" in entry.by
    assert not replaced
    assert {e.layer for e in report.kept} <= {"Linear", "Embedding", f"{name}RotaryEmbedding", f"{name}TextScaledWordEmbedding"}
    for e in report.replaced:
        changed, before = model.get_submodule(e.name), original.get_submodule(e.name)
        assert isinstance(changed, type(before))  # transformers records attentions by class, trainers sort parameters by it
        assert type(changed).__module__.startswith("fusegrad.") or e.name == ""
    assert fusegrad.unfuse(model) == tuple(e.name for e in report.replaced)
    assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]
    assert model.loss_function is original.loss_function


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_are_replaced_whole(name):
    """Every norm, gated MLP, rotary embedding and the loss; the loss is what it was."""
    model = build(name).eval()
    batch = next(batches("Llama"))
    expected = model(**batch).loss
    report = fusegrad.fuse(model)
    assert {e.layer.removeprefix(name) for e in report.kept} <= {"Linear", "Embedding", "RotaryEmbedding", "TextScaledWordEmbedding"}
    replaced = [e.layer for e in report.replaced]
    parts = [sum(part in layer for layer in replaced) for part in ("MLP", "apply_rotary_pos_emb", "loss_function")]
    assert parts == [2, 2, 1] and sum("Norm" in layer for layer in replaced) >= 5
    torch.testing.assert_close(model(**batch).loss, expected, rtol=1e-5, atol=1e-6)


def test_reports_of_image_models():
    model = build("ResNet")
    report = fusegrad.fuse(model)
    norms = {path: m for path, m in model.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
    layers = {path: m for path, m in model.named_modules() if type(m).__name__ == "ResNetConvLayer"}
    assert all(type(m) is nn.BatchNorm2d for m in norms.values()) and norms.keys() <= {e.name for e in report.replaced}
    for path, layer in layers.items():
        acts = not isinstance(layer.activation, torch.nn.Identity)
        assert layer.normalization.activation == ("relu" if acts else None)
        assert (f"{path}.activation" in {e.name for e in report.replaced}) == acts
    assert "one kernel" in next(e.why for e in report.kept if e.layer == "ReLU")  # behind a residual's sum

    model = build("ConvNext")
    report = fusegrad.fuse(model)
    for m in model.modules():
        if type(m).__name__ == "FusedConvNextLayerNorm":
            assert isinstance(m, nn.LayerNorm2d if m.data_format == "channels_first" else nn.LayerNorm)
        assert type(m).__name__ != "ConvNextLayerNorm"
        if type(m).__name__ == "ConvNextLayer":
            assert type(m.pwconv1) is nn.Linear and m.pwconv1.activation == "gelu" and type(m.act).__name__ == "FusedGELUActivation"


@pytest.mark.parametrize("name", ["Qwen3", "Gemma2"])
def test_norms_in_bfloat16_keep_their_cast_order(name):
    model = build(name).to(BF16)
    original = copy.deepcopy(model)
    fusegrad.fuse(model)
    for weight in (BF16, torch.float32):
        for m in (model, original):
            m.model.norm.to(weight)
        x = torch.randn(200, 32).to(BF16)
        with torch.no_grad():
            ours, theirs = model.model.norm(x), original.model.norm(x)
        assert ours.dtype == theirs.dtype == (torch.float32 if name == "Qwen3" and weight == torch.float32 else BF16)
        assert (ours != theirs).double().mean() < 0.01


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_dtypes_under_autocast_and_of_the_loss(name):
    """A 16-bit model's loss is float32, as the unfused one's, and so is all that the caller gets."""
    model, (batch, *_) = build(name), batches(name)
    fused = copy.deepcopy(model)
    fusegrad.fuse(fused)
    exact = copy.deepcopy(model).double()(**batch).loss.item()
    for contexts in (lambda: torch.autocast("cpu", BF16), lambda: torch.autocast("cpu", enabled=False)):
        results = []
        for m in (model, fused):
            with contexts():
                results.append(m(**batch, output_hidden_states=True))
        a, b = results
        assert a.loss.dtype == b.loss.dtype == torch.float32 and a.logits.dtype == b.logits.dtype
        assert [h.dtype for h in a.hidden_states] == [h.dtype for h in b.hidden_states]
        assert abs(b.loss.item() - exact) <= 3 * abs(a.loss.item() - exact) + 2**-8 * exact / 16
        model, fused = model.to(BF16), fused.to(BF16)


def test_loss_of_micro_batches_and_shifted_labels():
    model = build("Llama")
    theirs = model.loss_function
    fusegrad.fuse(model)
    assert model.loss_function is not theirs and not re.search("fusegrad", theirs.__module__)
    logits, labels = torch.randn(2, 7, 96, dtype=F64), torch.randint(96, (2, 7))
    labels[0, 3:5] = -100
    for options in ({}, dict(num_items_in_batch=9), dict(num_items_in_batch=torch.tensor(9)), dict(labels=labels.relu(), ignore_index=5),
                    dict(shift_labels=labels.roll(-1, 1)), dict(num_items_in_batch=3, unknown=None)):  # fmt: skip
        for dtype in (torch.float32, BF16):
            given = dict(logits=logits.to(dtype), labels=labels, vocab_size=96) | options
            a, b = theirs(**given), model.loss_function(**given)
            assert a.dtype == b.dtype == torch.float32
            torch.testing.assert_close(a, b)


def test_attentions_checkpointing_generation_and_compile():
    name = "Llama"
    model, (batch, *_) = build(name), batches(name)
    model.config._attn_implementation = "eager"
    fused = copy.deepcopy(model)
    fusegrad.fuse(fused)
    ids = batch["input_ids"]
    a, b = (m(input_ids=ids, output_attentions=True) for m in (model, fused))
    assert len(b.attentions) == 2
    torch.testing.assert_close(b.attentions, a.attentions)
    assert torch.equal(*(m.eval().generate(ids[:1], max_new_tokens=6, do_sample=False) for m in (model, fused)))
    compiled = torch.compile(fused.model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(input_ids=ids, use_cache=False).last_hidden_state, model.model(input_ids=ids).last_hidden_state)
    fused.train().gradient_checkpointing_enable()
    model.train()
    grads = [torch.autograd.grad(m(**batch, use_cache=False).loss, m.model.embed_tokens.weight)[0] for m in (model, fused)]
    torch.testing.assert_close(*grads)
