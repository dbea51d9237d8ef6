"""What is measured where: cases by size of machine.

Vocabularies are those of SmolLM2 (49,152), Llama 3 (128,256), Qwen 3 (151,936) and Gemma 3 (262,144). Every
provider runs the first case of an operation; the others are curves, against N and against V.
"""

from collections.abc import Callable, Iterator

import torch

from bench.operations import FORWARD, Case

SMOLLM, LLAMA, QWEN, GEMMA = 49_152, 128_256, 151_936, 262_144
SILENT = (0, 30, 60, 90)

LOGITS_OPS = (f"token_stats {FORWARD}", "token_stats", "ppo_loss")
LINEAR_OPS = (f"linear_token_stats {FORWARD}", "linear_token_stats", "linear_ppo_loss")


def cpu() -> Iterator[Case]:
    """Within ten minutes on two cores, beside the peers."""
    for op in LOGITS_OPS:
        yield Case(op, 1024, QWEN, everyone=True)
    yield Case("ppo_loss", 512, QWEN, rows="realistic")
    yield Case("ppo_loss", 512, QWEN, dtype=torch.bfloat16)
    yield from (Case("ppo_loss", 512, V) for V in (SMOLLM, LLAMA, QWEN, GEMMA))
    yield from (Case("ppo_loss", N, SMOLLM) for N in (128, 2048))

    D = 576
    for op in LINEAR_OPS:
        yield Case(op, 512, QWEN if op == "linear_ppo_loss" else SMOLLM, D, everyone=True)
    yield Case("linear_ppo_loss", 512, SMOLLM, D, rows="realistic")
    yield Case("linear_ppo_loss", 256, SMOLLM, D, dtype=torch.bfloat16)
    yield from (Case("linear_ppo_loss", 512, SMOLLM, D, rows=f"{share}% silent") for share in SILENT)
    yield from (Case("linear_ppo_loss", 128, V, D) for V in (SMOLLM, LLAMA, QWEN, GEMMA))
    yield from (Case("linear_ppo_loss", N, SMOLLM, D) for N in (512, 1024))


def gpu() -> Iterator[Case]:
    half = torch.bfloat16
    for op in LOGITS_OPS:
        yield Case(op, 8192, QWEN, dtype=half, everyone=True)
        yield from (Case(op, 8192, V, dtype=half) for V in (SMOLLM, LLAMA, GEMMA))
        yield from (Case(op, N, QWEN, dtype=half) for N in (1024, 4096, 16_384, 32_768, 65_536))
        yield Case(op, 4096, QWEN)
    yield Case("ppo_loss", 8192, QWEN, dtype=half, rows="realistic")

    for op in LINEAR_OPS:
        yield Case(op, 8192, QWEN, 4096, dtype=half, everyone=True)
        yield Case(op, 8192, SMOLLM, 576, dtype=half)
        yield Case(op, 8192, LLAMA, 4096, dtype=half)
        yield Case(op, 8192, GEMMA, 3840, dtype=half)
    yield from (
        Case("linear_ppo_loss", N, QWEN, 4096, dtype=half) for N in (1024, 4096, 16_384, 32_768, 65_536)
    )
    yield Case("linear_ppo_loss", 8192, QWEN, 4096, dtype=half, rows="realistic")
    yield from (
        Case("linear_ppo_loss", 8192, QWEN, 4096, dtype=half, rows=f"{share}% silent") for share in SILENT
    )
    yield Case("linear_ppo_loss", 2048, QWEN, 4096)


def tiny() -> Iterator[Case]:
    """Does it run at all?"""
    for op in LOGITS_OPS:
        yield Case(op, 64, 1000, everyone=True)
    yield Case("ppo_loss", 64, 1000, rows="realistic")
    for op in LINEAR_OPS:
        yield Case(op, 64, 1024, 128, everyone=True)
    yield Case("linear_ppo_loss", 64, 1024, 128, rows="realistic")
    yield Case("linear_ppo_loss", 64, 1024, 128, dtype=torch.bfloat16)
    yield Case("linear_ppo_loss", 64, 1024, 128, rows="30% silent")


SIZES: dict[str, Callable[[], Iterator[Case]]] = {"cpu": cpu, "gpu": gpu, "tiny": tiny}
