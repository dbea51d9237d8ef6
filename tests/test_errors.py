"""Bad input: a ValueError that names the argument and what came, before anything is computed."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from aer_fast import _rows, _validation, ppo_loss, reference, token_stats

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
)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", BAD)
def test_token_stats_names_what_is_wrong(name: str, impl: str, device: torch.device) -> None:
    check(token_stats, name, *BAD[name], impl, device, keep=("logits", "target"))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", [*BAD, *BAD_LOSS])
def test_ppo_loss_names_what_is_wrong(name: str, impl: str, device: torch.device) -> None:
    if name == "inplace leaf" and impl == "reference":
        impl = "torch"
    check(ppo_loss, name, *(BAD | BAD_LOSS)[name], impl, device, keep=tuple(arguments(device)))


def check(
    function: Any,
    name: str,
    change: dict[str, Any],
    message: str,
    impl: str,
    device: torch.device,
    keep: tuple[str, ...],
) -> None:
    if device.type != "cpu" and name in ON_THE_CPU:
        pytest.skip("values are read on the CPU only")
    good = {k: v for k, v in arguments(device).items() if k in keep} | {"impl": impl}
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
    """As on a GPU, shown on CPU tensors: the public functions poison such rows instead of reading them."""
    rows = torch.randn(1, 6, V)
    target = torch.tensor([1, V, -1, -100, 1, 1])
    temperature = torch.tensor([1.0, 1, 1, 1, -1, 0])
    fit, poisoned = _validation.poison(target, temperature, V)
    assert ((fit == -100) | ((fit >= 0) & (fit < V))).all()
    *stats, state = _rows.token_stats_fwd(rows, fit, poisoned, None)
    for x in (*stats, *reference.token_stats(rows[0], fit, temperature=poisoned)):
        assert x[[1, 2, 4, 5]].isnan().all()
        assert torch.isfinite(x[[0, 3]]).all()
    ones = torch.ones(6)
    grad = torch.empty_like(rows)
    _rows.token_stats_bwd(rows, fit, poisoned, None, state, ones, ones, grad)
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
    weight = torch.tensor([1.0, -1.0], device=device)
    fields = ppo_loss_fwd(
        rows[:, :2],
        target[:1].repeat(2),
        weight,
        ones[:2],
        ones[:2],
        ones[:2],
        ones[:2],
        ones[:2],
        None,
        scale,
        softcap=0.0,
        ratio_low=0.8,
        ratio_high=1.2,
        dual_clip=torch.inf,
        kl_coef=0.0,
        grad=None,
    )
    assert torch.isfinite(fields[0, 0])
    assert fields[0, 1].isnan()
