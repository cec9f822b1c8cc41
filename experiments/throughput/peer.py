"""The peer: a training step of transformers' Qwen3-MoE as one would run it in PyTorch today. Prints one JSON line.

    python experiments/throughput/peer.py --batch 8 [--no-compile] [--layers 12 --dim 1024 ...]

torch.compile, grouped expert matmuls, scaled-dot-product attention, fused AdamW, bfloat16 parameters, which the grouped
matmul needs. Random weights and tokens. Model FLOPs are counted as `qatmoe.benchmark` counts them. It drops no tokens
and does less beside the matmuls than qatmoe's step: no float32 masters, no gradient norm, no balance loss.
"""

import argparse
import json
import statistics
import time

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe import modeling_qwen3_moe

SHAPE = {
    "layers": 12, "dim": 1024, "heads": 16, "kv_heads": 8, "head_dim": 64, "experts": 64, "top_k": 8, "expert_dim": 512,
    "vocab": 32768, "length": 2048, "batch": 8, "steps": 20,
}  # fmt: skip
WARM_UP = 4


def model_of(o: argparse.Namespace) -> Qwen3MoeForCausalLM:
    """The model on the GPU, in bfloat16."""
    config = Qwen3MoeConfig(
        vocab_size=o.vocab, hidden_size=o.dim, num_hidden_layers=o.layers, num_attention_heads=o.heads,
        num_key_value_heads=o.kv_heads, head_dim=o.head_dim, num_experts=o.experts, num_experts_per_tok=o.top_k,
        moe_intermediate_size=o.expert_dim, intermediate_size=o.expert_dim, norm_topk_prob=True, use_cache=False,
        tie_word_embeddings=True, max_position_embeddings=o.length, attn_implementation="sdpa",
        experts_implementation="grouped_mm",
    )  # fmt: skip
    with torch.device("cuda"):
        return Qwen3MoeForCausalLM(config).to(torch.bfloat16)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in SHAPE.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--no-compile", action="store_true")
    o = parser.parse_args()
    torch.manual_seed(0)
    # Under torch.compile transformers makes a dense mask, with which PyTorch has no flash attention; without one
    # attention is causal.
    modeling_qwen3_moe.create_causal_mask = lambda *args, **kwargs: None
    model = model_of(o)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(o.vocab, (o.batch, o.length), device="cuda")

    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        return model(input_ids=tokens, labels=tokens).loss

    forward = loss_of if o.no_compile else torch.compile(loss_of)
    seconds = []
    for _ in range(WARM_UP + o.steps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        forward(tokens).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    step_s = statistics.median(seconds[WARM_UP:])
    params = sum(p.numel() for p in model.parameters())
    in_experts = 3 * o.layers * o.experts * o.dim * o.expert_dim
    active = params - in_experts + in_experts * o.top_k // o.experts
    count = o.batch * o.length
    flops = 6 * active * count + 6 * o.layers * count * o.length * o.heads * o.head_dim
    result = {
        "variant": f"transformers {'eager' if o.no_compile else 'compiled'}",
        "batch_size": o.batch,
        "device": torch.cuda.get_device_name(),
        "params": params,
        "active": active,
        "step_ms": step_s * 1e3,
        "tokens_per_s": count / step_s,
        "model_tflops": flops / step_s / 1e12,
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "compile_s": seconds[0],
        "torch": torch.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
