"""What is measured where: cases by size of machine.

Vocabularies are those of SmolLM2 (49,152), Llama 3 (128,256), Qwen 3 (151,936) and Gemma 3 (262,144). All
providers are measured at the first case of an operation, fewer along the curves against N and V.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench.divergences import DIVERGENCES
from bench.measure import multiplies_bfloat16
from bench.operations import DISTILL, FORWARD, Case

SMOLLM, LLAMA, QWEN, GEMMA = 49_152, 128_256, 151_936, 262_144
SILENT = (0, 30, 60, 90)

LOGITS_OPS = (f"token_stats {FORWARD}", "token_stats", "ppo_loss")
LINEAR_OPS = (f"linear_token_stats {FORWARD}", "linear_token_stats", "linear_ppo_loss")
REVERSE_KL, JSD, FORWARD_KL = DISTILL_OPS = tuple(DISTILL + kind for kind in DIVERGENCES)


def cpu() -> Iterator[Case]:
    """Within twenty minutes on two cores, beside the peers; bfloat16 where no product in it takes minutes."""
    half = [torch.bfloat16] if multiplies_bfloat16() else []
    for op in LOGITS_OPS:
        yield Case(op, 512, QWEN, who="everyone", headline=True)
    yield Case("ppo_loss", 512, QWEN, rows="realistic")
    yield from (Case("ppo_loss", 512, QWEN, dtype=dtype) for dtype in half)
    yield from (Case("ppo_loss", N, SMOLLM) for N in (128, 256, 1024))
    yield from (Case("ppo_loss", 256, V) for V in (LLAMA, GEMMA))

    D = 576
    for op in LINEAR_OPS:
        yield Case(op, 512, SMOLLM, D, who="everyone", headline=op != "linear_ppo_loss")
    yield Case("linear_ppo_loss", 512, QWEN, D, who="many", headline=True)
    yield Case("linear_ppo_loss", 512, SMOLLM, D, rows="realistic")
    yield from (Case("linear_ppo_loss", 256, SMOLLM, D, dtype=dtype) for dtype in half)
    yield from (Case("linear_ppo_loss", 512, SMOLLM, D, rows=f"{share}% silent") for share in SILENT)
    yield from (Case("linear_ppo_loss", N, SMOLLM, D) for N in (128, 1024))
    yield from (Case("linear_ppo_loss", 128, V, D) for V in (LLAMA, GEMMA))

    for op in (REVERSE_KL, JSD):
        yield Case(op, 256, SMOLLM, D, who="everyone", D_ref=D)
    yield Case(FORWARD_KL, 256, SMOLLM, D, D_ref=D)
    yield Case(REVERSE_KL, 256, SMOLLM, D, rows="realistic", D_ref=D)
    yield Case(REVERSE_KL, 1024, QWEN, D, who="many", headline=True, D_ref=D)
    yield Case(JSD, 1024, QWEN, D, D_ref=D)


def gpu() -> Iterator[Case]:
    half = torch.bfloat16
    for op in LOGITS_OPS:
        yield Case(op, 8192, QWEN, dtype=half, who="everyone", headline=True)
        yield from (Case(op, 8192, V, dtype=half, who="many") for V in (SMOLLM, LLAMA, GEMMA))
        for N in (1024, 4096, 16_384, 32_768, 65_536):
            yield Case(op, N, QWEN, dtype=half, who="many")
        yield Case(op, 4096, QWEN, who="many")
    yield Case("ppo_loss", 8192, QWEN, dtype=half, rows="realistic", who="many")

    for op in LINEAR_OPS:
        yield Case(op, 8192, QWEN, 4096, dtype=half, who="everyone", headline=True)
        yield Case(op, 8192, SMOLLM, 576, dtype=half, who="many")
        yield Case(op, 8192, LLAMA, 4096, dtype=half, who="many")
        yield Case(op, 8192, GEMMA, 3840, dtype=half, who="many")
    for N in (1024, 4096, 16_384, 32_768, 65_536):
        yield Case("linear_ppo_loss", N, QWEN, 4096, dtype=half, who="many")
    for V in (SMOLLM, GEMMA):  # with the head's other sizes as above: a curve against V
        yield Case("linear_ppo_loss", 8192, V, 4096, dtype=half, who="many")
    yield Case("linear_ppo_loss", 8192, QWEN, 4096, dtype=half, rows="realistic", who="many")
    for share in SILENT:
        yield Case("linear_ppo_loss", 8192, QWEN, 4096, dtype=half, rows=f"{share}% silent")
    yield Case("linear_ppo_loss", 2048, QWEN, 4096, who="many")

    teacher: dict[str, Any] = {"dtype": half, "who": "everyone", "D_ref": 4096}
    for op in DISTILL_OPS:
        yield Case(op, 8192, QWEN, 4096, headline=op == REVERSE_KL, **teacher)
    yield Case(REVERSE_KL, 8192, QWEN, 1024, **teacher)  # a small student


def tiny() -> Iterator[Case]:
    """Does it run at all?"""
    for op in LOGITS_OPS:
        yield Case(op, 64, 1000, who="everyone", headline=True)
    yield Case("ppo_loss", 64, 1000, rows="realistic")
    for op in LINEAR_OPS:
        yield Case(op, 64, 1024, 128, who="everyone", headline=True)
    yield Case("linear_ppo_loss", 64, 1024, 128, rows="realistic", who="many")
    yield Case("linear_ppo_loss", 64, 1024, 128, dtype=torch.bfloat16, who="many")
    yield Case("linear_ppo_loss", 64, 1024, 128, rows="30% silent")
    for op in DISTILL_OPS:
        yield Case(op, 64, 1024, 128, who="everyone", headline=op == REVERSE_KL, D_ref=192)
    yield Case(REVERSE_KL, 64, 1024, 128, rows="realistic", who="many", D_ref=192)


SIZES: dict[str, Callable[[], Iterator[Case]]] = {"cpu": cpu, "gpu": gpu, "tiny": tiny}
