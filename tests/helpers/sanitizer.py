"""Every kernel and variant once, on small shapes, for compute-sanitizer:

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    compute-sanitizer --tool memcheck --error-exitcode 9 python -m tests.helpers.sanitizer

Torch's allocator hands out pieces of large blocks, inside which nothing is out of bounds: hence the variable.
Results are compared with float64 all the same. The exit status is 1 if a kernel of kernels/ was not launched,
or not with every value of its HAS_ constants, not with vocabularies that 8 divides and others, or not in
every dtype. Without a GPU, under Triton's interpreter, it checks itself.
"""

import importlib
import math
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

from torch import Tensor

from aer_fast import distill_loss, ppo_loss, reference, token_stats
from aer_fast._rows import pair_ops, row_ops, sums
from aer_fast._rows.pairs import Divergence, Pair
from aer_fast.kernels.primitives import INTERPRETED
from tests import ROOT
from tests.helpers.interpreter import replace_once_a_launch
from tests.helpers.oracle import assert_within_budget

KERNELS = ROOT / "kernels"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# two tiles in units of 8, also of a long row; an odd one whose last tile has one entry; one tile of one warp
VOCABULARIES = (4104, 16_392, 1025, 256)
N = 6


class Recorder:
    """A kernel that notes what it is launched with."""

    def __init__(self, name: str, kernel: Any, seen: "Seen") -> None:
        self.name, self.kernel, self.seen = name, kernel, seen

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        launch = self.kernel[grid]

        def recorded(**arguments: Any) -> Any:
            constants = {k: v for k, v in arguments.items() if k.startswith("HAS_") or k == "ALIGN"}
            constants["dtype"] = arguments["grad_ptr" if "grad_ptr" in arguments else "logits_ptr"].dtype
            if "logits_ptr" in arguments and "grad_ptr" in arguments and arguments.get("HAS_GRAD", True):
                constants["in place"] = arguments["grad_ptr"].data_ptr() == arguments["logits_ptr"].data_ptr()
            for key, value in constants.items():
                self.seen[self.name][key].add(value)
            return launch(**arguments)

        return recorded


# Of each kernel and constant, the values it was launched with.
Seen = dict[str, dict[str, set[Any]]]


def record(modules: tuple[ModuleType, ...]) -> Seen:
    """Put recorders in the place of the kernels of these modules."""
    seen: Seen = defaultdict(lambda: defaultdict(set))
    for module in modules:
        for name in kernels_of(Path(str(module.__file__)).read_text()):
            kernel = getattr(module, name)
            setattr(module, name, Recorder(name, getattr(kernel, "kernel", kernel), seen))
    return seen


def kernel_modules() -> tuple[ModuleType, ...]:
    """Those of kernels/ that have a kernel."""
    paths = [path for path in sorted(KERNELS.glob("*.py")) if kernels_of(path.read_text())]
    return tuple(importlib.import_module(f"aer_fast.kernels.{path.stem}") for path in paths)


def kernels_of(source: str) -> list[str]:
    return re.findall(r"^def (_\w+_kernel)\(", source, re.MULTILINE)


def expected() -> Seen:
    """What has to be seen, from the source of the kernels."""
    wanted: Seen = {}
    for path in sorted(KERNELS.glob("*.py")):
        source = path.read_text()
        for name in kernels_of(source):
            signature = source.split(f"def {name}(")[1].split("\n):")[0]
            constants: dict[str, set[Any]] = {"ALIGN": {1, 8}, "dtype": set(DTYPES)}
            constants |= {flag: {True, False} for flag in re.findall(r"HAS_\w+", signature)}
            if "logits_ptr" in signature and "grad_ptr" in signature:
                constants["in place"] = {True, False}
            wanted[name] = constants
    return wanted


def missing(seen: Seen) -> list[str]:
    """What was not launched, one line each."""
    return [
        f"{name}: not launched with {constant}={value}"
        for name, constants in expected().items()
        for constant, values in constants.items()
        for value in sorted(values - seen[name][constant], key=str)
    ]


def judge(actual: Tensor, eager: Tensor, exact: Tensor, logits: Tensor) -> None:
    scale = logits[logits.isfinite()].abs().max().item() / 0.5
    assert_within_budget(actual, eager, exact, terms=logits.shape[-1], input_scale=scale)


def run(dtype: torch.dtype, V: int, softcap: float | None, device: torch.device) -> None:
    """Every way to launch a kernel on logits [N, V]: one row masked, one ignored, banned entries."""
    torch.manual_seed(0)
    logits = (3 * torch.randn(N, V, device=device)).to(dtype)
    logits[0, : V // 2] = -torch.inf
    logits[3:5] = torch.nan  # masked below: never read
    # in the tiles of several warps, the last row's gradient is zeros
    target = torch.tensor([V - 1, V // 3, V * 4 // 5, 1, reference.IGNORE, V // 3], device=device)
    ignored = target.where(torch.arange(N, device=device) != 3, reference.IGNORE)
    temperature = torch.linspace(0.5, 1.5, N, device=device)
    upstream = torch.randn(2, N, device=device)
    options = {"temperature": temperature, "softcap": softcap}

    def statistics(x: Tensor, impl: str) -> list[Tensor]:
        leaf = x.detach().clone().requires_grad_()
        stats = token_stats(leaf, ignored, impl=impl, **options)
        loss = (upstream.to(stats[0].dtype) * torch.stack(stats)).sum()
        return [*(s.detach() for s in stats), *torch.autograd.grad(loss, leaf)]

    actual, eager = statistics(logits, "triton"), statistics(logits, "reference")
    for a, e, x in zip(actual, eager, statistics(logits.double(), "reference")):
        judge(a, e, x, logits)

    ops = row_ops("triton")
    rows = logits.unsqueeze(0)
    pieces = ops.row_sums(rows, ignored, temperature, softcap)
    for a, whole in zip(sums.finish(pieces, temperature)[:2], actual):
        live = ignored != reference.IGNORE
        torch.testing.assert_close(a[live], whole[live], rtol=1e-5, atol=1e-6)
    _, _, state = ops.token_stats_fwd(rows, ignored, temperature, softcap)
    constants = (ignored, temperature, softcap, state, upstream[0], upstream[1])
    picked = torch.tensor([0, 2, 5], device=device)
    compact = torch.empty(1, 3, V, dtype=dtype, device=device)
    ops.token_stats_bwd(rows, *constants, compact, picked)
    assert torch.equal(compact[0], actual[2][picked])
    written = rows.clone()
    ops.token_stats_bwd(written, *constants, written)
    assert torch.equal(written[0], actual[2])

    old, ref = actual[0] + 0.3, actual[0] - 0.4
    terms = {
        "advantage": torch.tensor([1.0, -1.0, 2.0, 1.0, 1.0, 0.0], device=device),
        "mask": torch.tensor([1.0, 2.0, 1.0, 0.0, 1.0, 1.0], device=device),
        "entropy_coef": torch.tensor([0.1, 0.0, 0.2, 0.1, 0.1, 0.0], device=device),  # the last row is dead
    }
    for old_logprob, ref_logprob in ((old, None), (None, None), (old, ref)):
        kl = {} if ref_logprob is None else {"ref_logprob": ref_logprob, "kl_coef": 0.1}

        def loss(
            x: Tensor,
            impl: str,
            factor: float = 1.0,
            inplace: bool = False,
            settings: Any = (old_logprob, kl),
        ) -> list[Tensor]:
            leaf = x.detach().clone().requires_grad_()
            given = leaf * 1 if inplace else leaf
            out = ppo_loss(
                given, target, settings[0], **terms, **settings[1], inplace=inplace, impl=impl, **options
            )
            return [
                out.loss.detach(),
                out.logprob,
                out.entropy,
                *torch.autograd.grad(factor * out.loss, leaf),
            ]

        actual, eager = loss(logits, "triton"), loss(logits, "reference")
        for a, e, x in zip(actual, eager, loss(logits.double(), "reference")):
            judge(a, e, x, logits)
        over = loss(logits, "triton", inplace=True)
        assert all(torch.equal(a, b) for a, b in zip(actual, over))
        scaled = loss(logits, "triton", factor=2.0, inplace=True)[3]
        assert torch.equal(scaled, 2 * actual[3])
    with torch.no_grad():  # no gradient is written
        alone = ppo_loss(logits, target, old, **terms, impl="triton", **options)
    assert torch.isfinite(alone.loss)


def run_pairs(dtype: torch.dtype, V: int, softcap: float | None, device: torch.device) -> None:
    """Every way to launch a kernel on the logits of a student and a teacher [N, V]."""
    torch.manual_seed(0)
    logits, ref_logits = (3 * torch.randn(2, N, V, device=device)).to(dtype)
    logits[2], ref_logits[2] = torch.nan, torch.nan  # masked: never read
    ref_logits[1] = logits[1]
    logits[5, : V // 3], ref_logits[5, : V // 3] = -torch.inf, -torch.inf
    mask = (torch.arange(N, device=device) != 2).float()
    coef = torch.tensor([1.0, 2.0, 1.0, 0.0, -1.0, 0.5], device=device)  # one row has no gradient
    temperature = torch.linspace(0.5, 1.5, N, device=device)
    options: dict[str, Any] = {"mask": mask, "coef": coef, "temperature": temperature}
    options |= {"entropy_coef": (coef != 0).float() * 0.1, "softcap": softcap, "ref_softcap": softcap}
    for divergence, floor in (
        ("reverse_kl", None),
        ("reverse_kl", -8.0),
        ("forward_kl", None),
        ("jsd", None),
    ):
        which = {"divergence": divergence, "ref_logprob_floor": floor}

        def loss(
            x: Tensor, ref: Tensor, impl: str, inplace: bool = False, which: Any = which
        ) -> list[Tensor]:
            leaf = x.detach().clone().requires_grad_()
            given = leaf * 1 if inplace else leaf
            out = distill_loss(given, ref, inplace=inplace, impl=impl, **which, **options)
            return [out.loss.detach(), out.divergence, out.entropy, *torch.autograd.grad(out.loss, leaf)]

        actual, eager = loss(logits, ref_logits, "triton"), loss(logits, ref_logits, "reference")
        for a, e, x in zip(actual, eager, loss(logits.double(), ref_logits.double(), "reference")):
            judge(a, e, x, logits)
        over = loss(logits, ref_logits, "triton", inplace=True)
        assert all(torch.equal(a, b) for a, b in zip(actual, over))

        target = torch.where(mask != 0, 0, reference.IGNORE)
        found = Divergence(divergence, 0.5, -math.inf if floor is None else floor, softcap, softcap)
        pair = Pair(logits[None], ref_logits[None], target, temperature, temperature, found)
        weight = mask * coef / mask.sum()
        grads = (0 * weight, -0.1 * (weight != 0) * mask / mask.sum(), weight)
        compact = torch.empty(1, N, V, dtype=dtype, device=device)
        rows = pair_ops("triton").pair_loss(pair, lambda *_: grads, compact, compact=True)  # noqa: B023
        assert rows is not None
        assert rows.tolist() == [0, 1, 4, 5]
        torch.testing.assert_close(compact[0, :4], actual[3][rows], rtol=1e-2, atol=1e-6)


def main() -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if INTERPRETED:
        replace_once_a_launch()
    seen = record(kernel_modules())
    for dtype in DTYPES:
        for V in VOCABULARIES:
            for softcap in (None, 20.0):
                run(dtype, V, softcap, device)
                run_pairs(dtype, V, softcap, device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    for name, constants in seen.items():
        values = (f"{k}={'|'.join(sorted(map(str, v)))}" for k, v in sorted(constants.items()))
        print(f"{name}: {', '.join(values)}")
    problems = missing(seen)
    if problems:
        print(
            *problems, "Launch each of these in run() or run_pairs() of tests/helpers/sanitizer.py.", sep="\n"
        )
    else:
        print("every kernel and variant was launched, and its result is right")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
