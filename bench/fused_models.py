"""Steps of transformers' models as they are and after `fusegrad.fuse`, in turns: the second table of docs/fuse.md.

python bench/fused_models.py --threads 1
"""

import argparse
import copy

import measure
import torch
import transformers

import fusegrad

LANGUAGE = dict(
    vocab_size=8192,
    hidden_size=256,
    intermediate_size=688,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
IMAGES = ("ResNet", "ConvNext")  # of the sizes that transformers gives them
CASES = [(name, dtype) for name in ("Llama", "Qwen3", "Gemma2", "Mistral") for dtype in (torch.float32, torch.bfloat16)]
CASES += [(name, torch.float32) for name in IMAGES]


def model_and_batch(name, dtype):
    kind = "ImageClassification" if name in IMAGES else "CausalLM"
    config = getattr(transformers, f"{name}Config")(**({} if name in IMAGES else LANGUAGE))
    model = getattr(transformers, f"{name}For{kind}")(config).to(dtype).train()
    if name in IMAGES:
        return model, dict(pixel_values=torch.randn(2, 3, 224, 224), labels=torch.tensor([0, 1]))
    ids = torch.randint(3, LANGUAGE["vocab_size"], (2, 256))
    return model, dict(input_ids=ids, labels=ids)


def step_of(model, batch):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step():
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    print("| model | dtype | layers replaced | step, ms | fused, ms | ratio |\n|---|---|---|---|---|---|")
    for name, dtype in CASES:
        model, batch = model_and_batch(name, dtype)
        fused = copy.deepcopy(model)
        report = fusegrad.fuse(fused)
        clocks = [measure.Clock(step_of(m, batch), "cpu") for m in (model, fused)]
        times = [[clock.seconds() * 1e3 for clock in clocks] for _ in range(args.rounds)]
        plain, ours = (measure.spread(side)["median"] for side in zip(*times))
        dtype = str(dtype).removeprefix("torch.")
        print(f"| {name} | {dtype} | {len(report.replaced)} | {plain:.0f} | {ours:.0f} | {ours / plain:.2f} |", flush=True)


if __name__ == "__main__":
    main()
