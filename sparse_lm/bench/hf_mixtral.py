"""A train step of Hugging Face transformers' Mixtral, for another Python environment: one that has torch.

Run by path, never imported: the package itself has no torch. Prints one JSON line when it is ready; then, for each line
`step` on stdin takes a train step and prints its seconds and its loss, and for `peak` prints the FLOP/s of a large
matrix product. Ends with its input. `sparse_lm.bench.against` starts it and takes the turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]

PEAK_SIZES, PEAK_REPEATS = {"cpu": 2048, "cuda": 8192}, 5


def arguments() -> argparse.Namespace:
    """Sizes of the model and the batch, implementation of the experts, dtype of the products, device."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("d_model", "num_layers", "num_experts", "top_k", "d_expert", "num_heads", "vocab_size", "length"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--experts", required=True, help="eager, grouped_mm or batched_mm")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], required=True)
    parser.add_argument("--device", choices=list(PEAK_SIZES), required=True)
    return parser.parse_args()


def build(sizes: argparse.Namespace) -> torch.nn.Module:
    """The model with fresh float32 weights, in training mode, with its own load-balance loss."""
    config = transformers.MixtralConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.d_model,
        intermediate_size=sizes.d_expert,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_heads,
        num_local_experts=sizes.num_experts,
        num_experts_per_tok=sizes.top_k,
        max_position_embeddings=sizes.length,
        tie_word_embeddings=False,
        output_router_logits=True,
        use_cache=False,
    )
    options = {"attn_implementation": "sdpa", "experts_implementation": sizes.experts, "dtype": torch.float32}
    return transformers.AutoModelForCausalLM.from_config(config, **options).to(sizes.device).train()


def stepper(model: torch.nn.Module, sizes: argparse.Namespace) -> Callable[[], float]:
    """A function that takes one AdamW step on random tokens, always the same, and returns the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    # Shifted here: the model would drop the last token of each row, and the other side has a target for it.
    tokens = torch.randint(sizes.vocab_size, (sizes.batch, sizes.length + 1), device=sizes.device)
    labels = tokens[:, 1:].contiguous()

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(sizes.device, torch.bfloat16, enabled=sizes.dtype == "bfloat16"):
            loss = model(input_ids=tokens[:, :-1], labels=labels, shift_labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())  # waits for everything before it on a GPU

    return step


def peak(dtype: str, device: str) -> float:
    """FLOP/s of a square matrix product in this dtype, the median of a few."""
    size = PEAK_SIZES[device]
    x = torch.full((size, size), 1 / size, dtype=getattr(torch, dtype), device=device)
    times = []
    for _ in range(PEAK_REPEATS + 1):  # the first is slower
        start = time.perf_counter()
        float(torch.matmul(x, x)[0, 0])  # one number is fetched, so that a GPU is waited for
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times[1:])


def say(**values: float | str) -> None:
    """One JSON line."""
    print(json.dumps(values), flush=True)


def main() -> None:
    """Serves until the input ends."""
    sizes = arguments()
    torch.manual_seed(0)
    model = build(sizes)
    step = stepper(model, sizes)
    say(
        transformers=transformers.__version__,
        torch=torch.__version__.partition("+")[0],
        parameters=sum(p.numel() for p in model.parameters()),
        threads=torch.get_num_threads(),
    )
    for line in sys.stdin:
        if line.strip() == "peak":
            say(peak=peak(sizes.dtype, sizes.device))
        else:
            start = time.perf_counter()
            loss = step()
            say(seconds=time.perf_counter() - start, loss=loss)


if __name__ == "__main__":
    main()
