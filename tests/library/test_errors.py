"""Bad input: a ValueError that names the argument and what came, before anything is computed."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from aer_fast import (
    linear_ppo_loss,
    linear_token_loss,
    linear_token_stats,
    plan,
    ppo_loss,
    token_stats,
)
from aer_fast._rows import with_torch

B, T, V = 2, 3, 10
IMPLS = ["torch", "triton", "reference"]


def arguments(device: torch.device) -> dict[str, Any]:
    return {
        "logits": torch.randn(B, T, V, device=device, requires_grad=True),
        "target": torch.randint(V, (B, T), device=device),
        "old_logprob": torch.full((B, T), -2.0, device=device),
        "advantage": torch.randn(B, T, device=device),
    }


half_mask = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])

# name of the case: (what is passed, what the message says)
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "logits list": ({"logits": [1.0]}, "logits must be a tensor, got list"),
    "logits int": ({"logits": torch.ones(B, T, V, dtype=torch.long)}, "logits must be .*int64"),
    "logits sparse": ({"logits": torch.ones(B, T, V).to_sparse()}, "logits must be a dense tensor"),
    "logits 0-d": ({"logits": torch.tensor(1.0)}, r"logits must be \[..., V\]"),
    "logits V=0": ({"logits": torch.ones(B, T, 0)}, r"logits must be .* V >= 1, got \(2, 3, 0\)"),
    "target shape": ({"target": torch.ones(B, dtype=torch.long)}, r"target must .*\(2, 3\), got \(2,\)"),
    "target dtype": ({"target": torch.ones(B, T)}, "target must be int64, got torch.float32"),
    "target none": ({"target": None}, "target must be a tensor, got NoneType"),
    "target high": ({"target": torch.full((B, T), V)}, r"target must be in \[0, V=10\) .*got 10"),
    "target low": ({"target": torch.full((B, T), -1)}, "target must be in .*got -1"),
    "temperature 0": ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
    "temperature tiny": ({"temperature": 1e-39}, "temperature must be .*got 1.*e-39 whose inverse is not"),
    "temperature nan": ({"temperature": torch.full((B, T), torch.nan)}, "temperature must be .*got nan"),
    "temperature one": ({"temperature": torch.tensor([[1.0, 1, -1], [1, 1, 1]])}, "temperature .*got -1.0"),
    "temperature number": (
        {"temperature": -1.0, "target": torch.full((B, T), -100)},
        "temperature .*got -1.0",
    ),
    "temperature inf": ({"temperature": torch.full((B, T), torch.inf)}, "temperature must be .*got inf"),
    "temperature meta": ({"temperature": torch.ones(B, T, device="meta")}, "temperature must be on .*meta"),
    "target meta": (
        {"target": torch.ones(B, T, dtype=torch.long, device="meta")},
        "target must be on .*meta",
    ),
    "temperature text": ({"temperature": "1"}, "temperature must be a finite number, got '1'"),
    "softcap 0": ({"softcap": 0.0}, "softcap must be positive or None, got 0.0"),
    "impl": ({"impl": "cuda"}, "impl must be one of auto, triton, torch, reference, got 'cuda'"),
}
BAD_LOSS: dict[str, tuple[dict[str, Any], str]] = {
    "advantage [B]": ({"advantage": torch.ones(B)}, r"advantage must .*\(2, 3\), got \(2,\)"),
    "advantage [T]": ({"advantage": torch.ones(T)}, r"advantage must .*\(2, 3\), got \(3,\)"),
    "advantage sizes": ({"advantage": torch.ones(B, 2)}, r"advantage must .*got \(2, 2\)"),
    "advantage int": (
        {"advantage": torch.ones(B, T, dtype=torch.long)},
        "advantage must be floating .*int64",
    ),
    "advantage none": ({"advantage": None}, "advantage must be a finite number, got None"),
    "advantage nan": ({"advantage": float("nan")}, "advantage must be a finite number, got nan"),
    "old_logprob [B]": ({"old_logprob": torch.ones(B)}, "old_logprob must"),
    "mask int": ({"mask": torch.ones(B, T, dtype=torch.long)}, "mask must be bool or floating .*int64"),
    "mask [B]": ({"mask": torch.ones(B)}, r"mask must .*got \(2,\)"),
    "mask negative": ({"mask": half_mask - 0.5}, "mask must be >= 0, got -0.5"),
    "mask nan": ({"mask": half_mask / half_mask}, "mask must be >= 0, got nan"),
    "entropy_coef [B]": ({"entropy_coef": torch.ones(B)}, "entropy_coef must"),
    "importance_weight": ({"importance_weight": torch.ones(T)}, "importance_weight must"),
    "ref_logprob [B]": ({"ref_logprob": torch.ones(B), "kl_coef": 0.1}, "ref_logprob must"),
    "advantage meta": ({"advantage": torch.ones(B, T, device="meta")}, "advantage must be on .*got meta"),
    "advantage huge": ({"advantage": 1e39}, "advantage must be a finite number, got 1e"),
    "advantage huger": ({"advantage": 10**400}, "advantage must be a finite number"),
    "mask number": ({"mask": -1.0}, "mask must be >= 0, got -1.0"),
    "kl without ref": ({"kl_coef": 0.1}, "kl_coef=0.1 needs ref_logprob, got None"),
    "kl negative": ({"kl_coef": -0.1, "ref_logprob": 0.0}, "kl_coef must be >= 0, got -0.1"),
    "clip number": ({"clip": 0.2}, "clip must be two numbers"),
    "clip negative": ({"clip": (-0.1, 0.2)}, "clip must be .*-0.1"),
    "clip huge": ({"clip": (0.1, 1e39)}, "clip must be .*1e"),
    "clip nan": ({"clip": (0.1, float("nan"))}, "clip must be .*nan"),
    "dual_clip huge": ({"dual_clip": 1e39}, "dual_clip must be a finite number"),
    "dual_clip": ({"dual_clip": 1.0}, "dual_clip must be greater than 1 or None, got 1.0"),
    "denominator shape": ({"denominator": torch.ones(B)}, r"denominator must be .*\(2,\)"),
    "denominator 0": ({"denominator": 0}, "denominator must be positive, got 0"),
    "denominator tensor": ({"denominator": torch.tensor(-3.0)}, "denominator must be positive, got -3.0"),
    "denominator nan": ({"denominator": torch.tensor(torch.nan)}, "denominator must be a finite .*nan"),
    "advantage 0-d huge": (
        {"advantage": torch.tensor(1e300, dtype=torch.float64)},
        "advantage must be a finite",
    ),
    "inplace text": ({"inplace": "no"}, "inplace must be True or False, got 'no'"),
    "inplace leaf": ({"inplace": True}, "inplace=True would overwrite logits, a leaf"),
}
ON_THE_CPU = (
    "target high",
    "target low",
    "temperature one",
    "temperature nan",
    "temperature inf",
    "mask negative",
    "mask nan",
    "denominator 0",  # right where no token counts
)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", BAD)
def test_token_stats_names_what_is_wrong(name: str, impl: str, device: torch.device) -> None:
    good = {k: arguments(device)[k] for k in ("logits", "target")}
    check(token_stats, name, *BAD[name], impl, device, good)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", [*BAD, *BAD_LOSS])
def test_ppo_loss_names_what_is_wrong(name: str, impl: str, device: torch.device) -> None:
    if name == "inplace leaf" and impl == "reference":
        impl = "torch"
    check(ppo_loss, name, *(BAD | BAD_LOSS)[name], impl, device, arguments(device))


D = 4


def head_arguments(device: torch.device) -> dict[str, Any]:
    return {
        "hidden": torch.randn(B, T, D, device=device, requires_grad=True),
        "weight": torch.randn(V, D, device=device),
        "bias": torch.randn(V, device=device),
        "target": torch.randint(V, (B, T), device=device),
    }


HEAD: dict[str, tuple[dict[str, Any], str]] = {
    "hidden list": ({"hidden": [1.0]}, "hidden must be a tensor, got list"),
    "hidden int": ({"hidden": torch.ones(B, T, D, dtype=torch.long)}, "hidden must be .*int64"),
    "hidden sparse": ({"hidden": torch.ones(B, T, D).to_sparse()}, "hidden must be a dense tensor"),
    "hidden 0-d": ({"hidden": torch.tensor(1.0)}, r"hidden must be \[..., D\]"),
    "hidden D=0": ({"hidden": torch.ones(B, T, 0)}, r"hidden must be .* D >= 1, got \(2, 3, 0\)"),
    "weight none": ({"weight": None}, "weight must be a tensor, got NoneType"),
    "weight [D, V]": ({"weight": torch.ones(D, V)}, r"weight must be \[V, D\] .*D=4, got \(4, 10\)"),
    "weight 1-d": ({"weight": torch.ones(D)}, r"weight must be \[V, D\] .*got \(4,\)"),
    "weight V=0": ({"weight": torch.ones(0, D)}, r"weight must be .*V >= 1 .*got \(0, 4\)"),
    "weight dtype": (
        {"weight": torch.ones(V, D, dtype=torch.bfloat16)},
        "weight must have the dtype of hidden, torch.float32, got torch.bfloat16",
    ),
    "weight sparse": ({"weight": torch.ones(V, D).to_sparse()}, "weight must be a dense tensor"),
    "weight meta": ({"weight": torch.ones(V, D, device="meta")}, "weight must be on .*got meta"),
    "bias shape": ({"bias": torch.ones(D)}, r"bias must be \[V\] with V=10, got \(4,\)"),
    "bias [V, 1]": ({"bias": torch.ones(V, 1)}, r"bias must be \[V\] with V=10, got \(10, 1\)"),
    "bias dtype": ({"bias": torch.ones(V).double()}, "bias must have the dtype of hidden"),
    "bias number": ({"bias": 1.0}, "bias must be a tensor, got float"),
    "target shape": ({"target": torch.ones(B, dtype=torch.long)}, r"target must .*hidden .*got \(2,\)"),
    "chunk 0": ({"chunk_tokens": 0}, "chunk_tokens must be an integer >= 1 or None, got 0"),
    "chunk float": ({"chunk_tokens": 8.0}, "chunk_tokens must be an integer .*got 8.0"),
    "chunk bool": ({"chunk_tokens": True}, "chunk_tokens must be an integer .*got True"),
    "budget": ({"memory_budget": -1}, "memory_budget must be an integer .*got -1"),
}
OF_HIDDEN = {name: case for name, case in BAD.items() if "logits" not in name and name != "target shape"}
HEAD_LOSS = {name: case for name, case in BAD_LOSS.items() if "inplace" not in name}
HEAD_LOSS["stats"] = ({"stats": "some"}, "stats must be 'all' or 'active', got 'some'")
places = torch.tensor
OBJECTIVE: dict[str, tuple[dict[str, Any], str]] = {
    "objective": ({"objective": 1.0}, "objective must be callable, got float"),
    "cu_seqlens list": ({"cu_seqlens": [0, 6]}, "cu_seqlens must be a tensor, got list"),
    "cu_seqlens float": ({"cu_seqlens": places([0.0, 6])}, r"cu_seqlens must be \[S \+ 1\] int32 or int64"),
    "cu_seqlens 2-d": ({"cu_seqlens": places([[0, 6]])}, r"cu_seqlens must be .*\(1, 2\)"),
    "cu_seqlens empty": ({"cu_seqlens": places([]).int()}, r"cu_seqlens must be .*\(0,\)"),
    "cu_seqlens end": ({"cu_seqlens": places([0, 5])}, r"cu_seqlens must .* to .*6, got \[0, 5\]"),
    "cu_seqlens start": ({"cu_seqlens": places([1, 6])}, r"cu_seqlens must ascend .*got \[1, 6\]"),
    "cu_seqlens order": ({"cu_seqlens": places([0, 4, 3, 6])}, "cu_seqlens must ascend"),
    "mask int": BAD_LOSS["mask int"],
    "mask negative": BAD_LOSS["mask negative"],
    "denominator shape": BAD_LOSS["denominator shape"],
    "denominator 0": BAD_LOSS["denominator 0"],
}
TOKEN_TENSORS: list[tuple[Any, str]] = [
    (torch.ones(B), r"token_tensors\[1\] must .*\(2, 3\), got \(2,\)"),
    (torch.ones(B, T, device="meta"), r"token_tensors\[1\] must be on .*meta"),
    ("text", r"token_tensors\[1\] must be a finite number, got 'text'"),
    (None, r"token_tensors\[1\] must be a finite number, got None"),
]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", [*HEAD, *OF_HIDDEN])
def test_linear_token_stats_names_what_is_wrong(name: str, impl: str, device: torch.device) -> None:
    check(linear_token_stats, name, *(OF_HIDDEN | HEAD)[name], impl, device, head_arguments(device))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", [*HEAD, *OF_HIDDEN, *HEAD_LOSS])
def test_linear_ppo_loss_names_what_is_wrong(name: str, impl: str, device: torch.device) -> None:
    good = head_arguments(device) | {k: arguments(device)[k] for k in ("old_logprob", "advantage")}
    check(linear_ppo_loss, name, *(OF_HIDDEN | HEAD | HEAD_LOSS)[name], impl, device, good)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", [*HEAD, *OF_HIDDEN, *OBJECTIVE])
def test_linear_token_loss_names_what_is_wrong(name: str, impl: str, device: torch.device) -> None:
    good = head_arguments(device) | {"objective": lambda logprob, entropy: -logprob}
    check(linear_token_loss, name, *(OF_HIDDEN | HEAD | OBJECTIVE)[name], impl, device, good)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("value", "message"), TOKEN_TENSORS)
def test_token_tensors_are_named_by_their_number(
    value: Any, message: str, impl: str, device: torch.device
) -> None:
    good = head_arguments(device)
    factors = (good["hidden"], good["weight"], good["target"])
    with pytest.raises(ValueError, match=message):
        linear_token_loss(*factors, lambda logprob, *_: -logprob, 1.0, value, impl=impl)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": -1}, "rows must be an integer >= 0, got -1"),
        ({"V": 0}, "V must be an integer >= 1, got 0"),
        ({"D": 1.5}, "D must be an integer >= 1, got 1.5"),
        ({"device": "tpu"}, "device must be 'cuda' or 'cpu', got 'tpu'"),
        ({"operation": "fast"}, "operation must be 'loss' or 'stats', got 'fast'"),
        ({"dtype": torch.int64}, "dtype must be float32, bfloat16, float16 or float64, got torch.int64"),
        ({"impl": "reference"}, "impl must be 'auto', 'triton' or 'torch', got 'reference'"),
        ({"memory_budget": 0}, "memory_budget must be an integer >= 1 or None, got 0"),
        ({"chunk_tokens": 0}, "chunk_tokens must be an integer >= 1 or None, got 0"),
    ],
)
def test_plan_names_what_is_wrong(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(**({"rows": 10, "V": 50, "D": 8} | change))


def check(
    function: Any,
    name: str,
    change: dict[str, Any],
    message: str,
    impl: str,
    device: torch.device,
    good: dict[str, Any],
) -> None:
    if device.type != "cpu" and name in ON_THE_CPU:
        pytest.skip("values are read on the CPU only")
    good = good | {"impl": impl}
    moved = {
        k: v.to(device) if isinstance(v, torch.Tensor) and v.dim() and v.device.type == "cpu" else v
        for k, v in change.items()
    }
    with pytest.raises(ValueError, match=message):
        function(**(good | moved))
    function(**good)  # and the unchanged arguments are fine


def test_overlapping_or_scattered_logits_cannot_be_overwritten(device: torch.device) -> None:
    good = arguments(device)
    leaf = good.pop("logits")
    with pytest.raises(ValueError, match="inplace=True needs logits whose entries do not share storage"):
        ppo_loss((leaf[:1] * 1).expand(B, T, V), inplace=True, **good)
    with pytest.raises(ValueError, match="inplace=True needs logits whose entries do not share storage"):
        ppo_loss((leaf.flatten() * 1).as_strided((B, T, V), (T * 4, 4, 1)), inplace=True, **good)
    with pytest.raises(ValueError, match="inplace=True would overwrite logits"):
        ppo_loss(leaf.view(B, T, V), inplace=True, **good)
    with pytest.raises(ValueError, match="inplace=True needs logits whose vocabulary is contiguous"):
        ppo_loss((leaf * 1).transpose(1, 2).contiguous().transpose(1, 2), inplace=True, **good)


def test_triton_takes_no_float64(device: torch.device) -> None:
    good = arguments(device)
    good["logits"] = good["logits"].double()
    with pytest.raises(ValueError, match=r"impl='triton' takes .*, got torch\.float64"):
        ppo_loss(impl="triton", **good)


def test_triton_needs_a_gpu_or_its_interpreter() -> None:
    code = (
        "import torch, aer_fast\n"
        "x, t = torch.randn(2, 9, requires_grad=True), torch.tensor([1, 2])\n"
        "try: aer_fast.token_stats(x, t, impl='triton')\n"
        "except ValueError as error: print(error)\n"
        "aer_fast.token_stats(x, t).logprob.sum().backward()\n"  # auto: torch
        "aer_fast.token_stats(x.double(), t).logprob.sum().backward()\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "impl='triton' needs tensors on a GPU, got cpu" in result.stdout


def test_the_torch_path_answers_with_nan_where_values_are_not_read() -> None:
    """As on a GPU, shown on CPU tensors: bad temperatures come as NaN, and bad targets lie nowhere."""
    rows = torch.randn(1, 6, V)
    target = torch.tensor([1, V, -1, -100, 1, 1])
    temperature = torch.tensor([1.0, 1, 1, 1, torch.nan, torch.nan])
    *stats, state = with_torch.token_stats_fwd(rows, target, temperature, None)
    for x in stats:
        assert x[[1, 2, 4, 5]].isnan().all()
        assert torch.isfinite(x[[0, 3]]).all()
    ones = torch.ones(6)
    grad = torch.empty_like(rows)
    with_torch.token_stats_bwd(rows, target, temperature, None, state, ones, ones, grad)
    assert grad[0, [1, 2, 4, 5]].isnan().all()
    assert (grad[0, 3] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_integers_are_numbers(impl: str, device: torch.device) -> None:
    good = arguments(device) | {"impl": impl, "ref_logprob": -2}
    whole = {"kl_coef": 1, "dual_clip": 3, "softcap": 30, "clip": (1, 1), "entropy_coef": 1, "temperature": 2}
    a = ppo_loss(**(good | whole)).loss
    b = ppo_loss(**(good | {k: v if k == "clip" else float(v) for k, v in whole.items()})).loss
    assert torch.equal(a, b)


def test_float64_on_auto_is_torch(device: torch.device) -> None:
    good = arguments(device)
    good["logits"] = good["logits"].double()
    assert ppo_loss(**good).loss.dtype == torch.float64


def test_the_kernels_answer_with_nan_where_values_are_not_read(device: torch.device) -> None:
    """What a GPU sees, where checking would wait for it: bad rows are NaN, nothing is read out of bounds."""
    from aer_fast.kernels.layout import CONSTANTS
    from aer_fast.kernels.ppo_loss import ppo_loss_fwd
    from aer_fast.kernels.token_stats import token_stats_bwd, token_stats_fwd

    rows = torch.randn(1, 6, V, device=device)
    target = torch.tensor([1, V, -1, 2**32 + 1, 1, 1], device=device)
    temperature = torch.tensor([1.0, 1, 1, 1, -1, 0], device=device)
    logprob, entropy, state = token_stats_fwd(rows, target, temperature, 0.0)
    ones = torch.ones(6, device=device)
    grad = torch.empty_like(rows)
    token_stats_bwd(rows, target, temperature, 0.0, state, ones, ones, grad)
    for x in (logprob, entropy, grad[0].sum(-1)):
        assert torch.isfinite(x[0])
        assert x[1:].isnan().all()

    scale = torch.ones((), device=device)
    constants = torch.ones(2, len(CONSTANTS), device=device)
    constants[1, CONSTANTS.index("mask")] = -1.0
    fields = ppo_loss_fwd(
        *(rows[:, :2], target[:1].repeat(2), ones[:2], 0.0, constants, scale, None),
        on_policy=False,
        clip_low=0.2,
        clip_high=0.2,
        dual_clip=torch.inf,
        kl_coef=0.0,
    )
    assert torch.isfinite(fields[0, 0])
    assert fields[0, 1].isnan()
