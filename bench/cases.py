"""What is measured: the operations, by name, and their cases, by size of machine.

A case is an operation at a shape. Vocabularies are those of SmolLM2 (49,152), Llama 3 (128,256), Qwen 3
(151,936) and Gemma 3 (262,144). Its coverage says which providers are measured at it: all of them at the
first case of an operation ("full"), fewer along the curves against N and V.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from bench.measure import multiplies_bfloat16

FORWARD = "forward"
STATS = ("token_stats", "linear_token_stats")
LOGITS_OPS = (f"token_stats {FORWARD}", "token_stats", "ppo_loss")
LINEAR_OPS = (f"linear_token_stats {FORWARD}", "linear_token_stats", "linear_ppo_loss")

DISTILL = "linear_distill_loss "  # an operation: by which divergence
DIVERGENCES = ("reverse_kl", "jsd", "forward_kl")
REVERSE_KL, JSD, FORWARD_KL = DISTILL_OPS = tuple(DISTILL + kind for kind in DIVERGENCES)

STEP = "optimiser step"
TOKENS_THAT_FIT = "tokens that fit"

WITHIN = "time within "  # an operation: where it goes
WHOLE, BARE, ROUNDED = "the whole call", "its products alone", "three products in the factors' dtype"

CHOICES = ("tiles of ", "product ", "loops of ")  # operations whose rows are choices that are compared
AS_IT_IS = "as it is"  # of these, the library's own

Coverage = Literal["basic", "wide", "full"]  # each has the providers of those before it
COVERAGES: tuple[Coverage, ...] = ("basic", "wide", "full")


@dataclass(frozen=True)
class Case:
    """An operation at a shape."""

    op: str
    N: int
    V: int
    D: int = 0  # 0: from logits
    dtype: torch.dtype = torch.float32
    rows: str = "all"  # "realistic"; "30% silent"
    coverage: Coverage = "basic"
    headline: bool = False  # of the README and the bars
    D_ref: int = 0  # of a teacher; 0: there is none

    def __str__(self) -> str:
        sizes = [f"{name}={size}" for name, size in self.shape.items()]
        kind = [str(self.dtype).removeprefix("torch.")] + ([] if self.rows == "all" else [self.rows])
        return " ".join([*sizes, *kind])

    @property
    def shape(self) -> dict[str, int]:
        widths = {"D": self.D, "D_ref": self.D_ref}
        return {"N": self.N, "V": self.V} | {name: size for name, size in widths.items() if size}


def divergence_of(op: str) -> str:
    """Of an operation beside a teacher; "" of any other."""
    return op.removeprefix(DISTILL) if op.startswith(DISTILL) else ""


SMOLLM, LLAMA, QWEN, GEMMA = 49_152, 128_256, 151_936, 262_144
SILENT = (0, 30, 60, 90)


def cpu() -> Iterator[Case]:
    """Within twenty minutes on two cores, beside the peers; bfloat16 where no product in it takes minutes."""
    half = [torch.bfloat16] if multiplies_bfloat16() else []
    for op in LOGITS_OPS:
        yield Case(op, 512, QWEN, coverage="full", headline=True)
    yield Case("ppo_loss", 512, QWEN, rows="realistic")
    yield from (Case("ppo_loss", 512, QWEN, dtype=dtype) for dtype in half)
    yield from (Case("ppo_loss", N, SMOLLM) for N in (128, 256, 1024))
    yield from (Case("ppo_loss", 256, V) for V in (LLAMA, GEMMA))

    D = 576
    for op in LINEAR_OPS:
        yield Case(op, 512, SMOLLM, D, coverage="full", headline=op != "linear_ppo_loss")
    yield Case("linear_ppo_loss", 512, QWEN, D, coverage="wide", headline=True)
    yield Case("linear_ppo_loss", 512, SMOLLM, D, rows="realistic")
    yield from (
        Case("linear_ppo_loss", N, V, D, dtype=x) for N, V in ((256, SMOLLM), (512, QWEN)) for x in half
    )
    yield from (Case("linear_ppo_loss", 512, SMOLLM, D, rows=f"{share}% silent") for share in SILENT)
    yield from (Case("linear_ppo_loss", N, SMOLLM, D) for N in (128, 1024))
    yield from (Case("linear_ppo_loss", 128, V, D) for V in (LLAMA, GEMMA))

    for op in (REVERSE_KL, JSD):
        yield Case(op, 256, SMOLLM, D, coverage="full", D_ref=D)
    yield Case(FORWARD_KL, 256, SMOLLM, D, D_ref=D)
    yield Case(REVERSE_KL, 256, SMOLLM, D, rows="realistic", D_ref=D)
    yield Case(REVERSE_KL, 1024, QWEN, D, coverage="wide", headline=True, D_ref=D)
    yield Case(JSD, 1024, QWEN, D, D_ref=D)


def gpu() -> Iterator[Case]:
    half = torch.bfloat16
    for op in LOGITS_OPS:
        yield Case(op, 8192, QWEN, dtype=half, coverage="full", headline=True)
        yield from (Case(op, 8192, V, dtype=half, coverage="wide") for V in (SMOLLM, LLAMA, GEMMA))
        for N in (1024, 4096, 16_384, 32_768, 65_536):
            yield Case(op, N, QWEN, dtype=half, coverage="wide")
        yield Case(op, 4096, QWEN, coverage="wide")
    yield Case("ppo_loss", 8192, QWEN, dtype=half, rows="realistic", coverage="wide")

    for op in LINEAR_OPS:
        yield Case(op, 8192, QWEN, 4096, dtype=half, coverage="full", headline=True)
        yield Case(op, 8192, SMOLLM, 576, dtype=half, coverage="wide")
        yield Case(op, 8192, LLAMA, 4096, dtype=half, coverage="wide")
        yield Case(op, 8192, GEMMA, 3840, dtype=half, coverage="wide")
    for N in (1024, 4096, 16_384, 32_768, 65_536):
        yield Case("linear_ppo_loss", N, QWEN, 4096, dtype=half, coverage="wide")
    for V in (SMOLLM, GEMMA):  # with the head's other sizes as above: a curve against V
        yield Case("linear_ppo_loss", 8192, V, 4096, dtype=half, coverage="wide")
    yield Case("linear_ppo_loss", 8192, QWEN, 4096, dtype=half, rows="realistic", coverage="wide")
    for share in SILENT:
        yield Case("linear_ppo_loss", 8192, QWEN, 4096, dtype=half, rows=f"{share}% silent")
    yield Case("linear_ppo_loss", 2048, QWEN, 4096, coverage="wide")

    teacher: dict[str, Any] = {"dtype": half, "coverage": "full", "D_ref": 4096}
    for op in DISTILL_OPS:
        yield Case(op, 8192, QWEN, 4096, headline=op == REVERSE_KL, **teacher)
    yield Case(REVERSE_KL, 8192, QWEN, 1024, **teacher)  # a small student


def tiny() -> Iterator[Case]:
    """Does it run at all?"""
    for op in LOGITS_OPS:
        yield Case(op, 64, 1000, coverage="full", headline=True)
    yield Case("ppo_loss", 64, 1000, rows="realistic")
    for op in LINEAR_OPS:
        yield Case(op, 64, 1024, 128, coverage="full", headline=True)
    yield Case("linear_ppo_loss", 64, 1024, 128, rows="realistic", coverage="wide")
    yield Case("linear_ppo_loss", 64, 1024, 128, dtype=torch.bfloat16, coverage="wide")
    yield Case("linear_ppo_loss", 64, 1024, 128, rows="30% silent")
    for op in DISTILL_OPS:
        yield Case(op, 64, 1024, 128, coverage="full", headline=op == REVERSE_KL, D_ref=192)
    yield Case(REVERSE_KL, 64, 1024, 128, rows="realistic", coverage="wide", D_ref=192)


SIZES: dict[str, Callable[[], Iterator[Case]]] = {"cpu": cpu, "gpu": gpu, "tiny": tiny}
