"""verl's own fused forwards on our kernel, against verl's own backends."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM
from verl.models.transformers.dense_common import forward_with_torch_backend, forward_with_triton_backend
from verl.utils.experimental import torch_functional

from aer_fast.integrations.verl import kernel
from aer_fast.integrations.verl.kernel import use_aer_kernel
from tests.helpers.ranks import on_ranks

triton_backend = importlib.import_module("verl.utils.kernel.linear_cross_entropy")
FORWARDS = {"torch": forward_with_torch_backend, "triton": forward_with_triton_backend}
V = 61


@pytest.fixture(autouse=True)
def _off_again() -> Iterator[None]:
    yield
    use_aer_kernel().undo()


def tiny_model(dtype: torch.dtype = torch.float32) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    model: Qwen2ForCausalLM = Qwen2ForCausalLM(config)
    model.to(dtype)
    return model


def run(model: Qwen2ForCausalLM, backend: str, ids: Tensor, **arguments: Any) -> dict[str, Tensor]:
    """Values, and the gradients of a sum weighted at random, for every parameter."""
    model.zero_grad()
    forward = MethodType(FORWARDS[backend], model)
    output = forward(input_ids=ids, return_dict=True, **arguments)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(2, *ids.shape, generator=generator)
    (weights[0] * output.log_probs.float() + weights[1] * output.entropy.float()).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"log_probs": output.log_probs.detach(), "entropy": output.entropy.detach(), **gradients}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("shape", [(1, 13), (3, 5)], ids=["packed", "batch"])
def test_both_backends_compute_what_verls_torch_backend_does(
    backend: str, shape: tuple[int, int], temperature: float
) -> None:
    model, ids = tiny_model(), torch.randint(V, shape)
    expected = run(model, "torch", ids, temperature=temperature)
    with use_aer_kernel():
        actual = run(model, backend, ids, temperature=temperature)
    assert actual["log_probs"].shape == actual["entropy"].shape == shape
    assert actual.keys() == expected.keys()
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= actual.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=2e-5, atol=2e-6, msg=name)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_verls_shifted_labels_are_the_targets(backend: str) -> None:
    model, ids = tiny_model(), torch.randint(V, (1, 9))
    labels = torch.randint(V, (1, 9))
    expected = run(model, "torch", ids, shift_labels=labels)
    with use_aer_kernel():
        actual = run(model, backend, ids, shift_labels=labels)
    torch.testing.assert_close(actual["log_probs"], expected["log_probs"], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("shape", [(), (1,), (9,), (1, 9)])
def test_a_temperature_may_be_a_tensor(shape: tuple[int, ...]) -> None:
    model, ids = tiny_model(), torch.randint(V, (1, 9))
    temperature = torch.rand(shape) + 0.5
    with torch.no_grad():
        logits = model(ids).logits[0] / temperature.reshape(-1, 1)
        logp = logits.log_softmax(-1)
    with use_aer_kernel():
        actual = run(model, "triton", ids, temperature=temperature)
    expected = logp.gather(-1, ids.roll(-1).T)[:, 0]
    torch.testing.assert_close(actual["log_probs"][0], expected, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(actual["entropy"][0], -(logp.exp() * logp).sum(-1), rtol=2e-5, atol=2e-6)


def test_in_bfloat16_the_values_stay_float32() -> None:
    model, ids = tiny_model(torch.bfloat16), torch.randint(V, (1, 33))
    exact = tiny_model(torch.bfloat16)
    with torch.no_grad():
        hidden = exact.model(ids).last_hidden_state.double()
        logp = (hidden @ exact.lm_head.weight.double().T)[0].log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    theirs = run(model, "torch", ids)["entropy"]
    with use_aer_kernel():
        ours = run(model, "torch", ids)
    assert ours["entropy"].dtype == ours["log_probs"].dtype == torch.float32
    error = (ours["entropy"][0] - entropy).abs().max()
    assert error < 1e-5 < (theirs[0] - entropy).abs().max()


def test_undo_restores_the_very_same_objects() -> None:
    def objects() -> tuple[Any, Any]:
        return triton_backend.linear_cross_entropy, torch_functional.FusedLinearForPPO

    before = objects()
    assert before == (triton_backend.LinearCrossEntropy.apply, torch_functional.FusedLinearForPPO)
    switch = use_aer_kernel()
    assert all(now is not then for now, then in zip(objects(), before))
    assert use_aer_kernel() is switch  # idempotent: undone by one undo
    switch.undo()
    assert all(now is then for now, then in zip(objects(), before))
    later = use_aer_kernel()
    switch.undo()  # not its business any more
    assert all(now is not then for now, then in zip(objects(), before))
    with pytest.raises(RuntimeError, match="inside"), later:
        raise RuntimeError("inside")
    assert all(now is then for now, then in zip(objects(), before))


def test_liger_stays_liger(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def forward(self: Any, *inputs: Any) -> tuple[Any, ...]:
        asked.append(self.impl_backend)
        return inputs[:2]

    with use_aer_kernel():
        fused = torch_functional.FusedLinearForPPO(impl_backend="liger")
        monkeypatch.setattr(type(fused).__bases__[0], "forward", forward)
        fused.forward(torch.zeros(1, 2, 3), torch.zeros(4, 3), torch.zeros(1, 2, dtype=torch.long))
    assert asked == ["liger"]


def test_what_it_cannot_do_is_refused() -> None:
    hidden, weight, labels = torch.zeros(1, 2, 3), torch.zeros(4, 3), torch.zeros(1, 2, dtype=torch.long)
    with use_aer_kernel():
        with pytest.raises(ValueError, match="group must be a process group"):
            triton_backend.linear_cross_entropy(hidden, weight, labels, 1.0, "none", object())
        with pytest.raises(ValueError, match="'mean'"):
            triton_backend.linear_cross_entropy(hidden, weight, labels, 1.0, "mean")


def slices() -> None:
    """As verl's own backend in Megatron: statistics of the whole, a part of the gradient of hidden."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(1, 6, 8), torch.randn(V, 8)
    labels, slope = torch.randint(V, (1, 6)), torch.randn(2, 1, 6)
    found = []
    for group in (None, dist.group.WORLD):
        part = weight if group is None else weight.tensor_split(dist.get_world_size())[dist.get_rank()]
        leaves = hidden.clone().requires_grad_(), part.clone().requires_grad_()
        with use_aer_kernel():
            arguments = (*leaves, labels, 0.7, "none", group)
            logprob, entropy = triton_backend.linear_cross_entropy(*arguments)
        (slope[0] * logprob + slope[1] * entropy).sum().backward()
        found.append((logprob.detach(), entropy.detach(), *(x.grad for x in leaves)))
    (logprob, entropy, grad_hidden, grad_weight), ours = found
    torch.testing.assert_close(ours[:2], (logprob, entropy))
    torch.testing.assert_close(ours[3], grad_weight.tensor_split(dist.get_world_size())[dist.get_rank()])
    assert not torch.allclose(ours[2], grad_hidden)
    dist.all_reduce(ours[2])
    torch.testing.assert_close(ours[2], grad_hidden, rtol=1e-4, atol=1e-6)


def test_a_vocabulary_split_between_ranks(tmp_path: Path) -> None:
    on_ranks(2, slices, tmp_path)


def test_importing_the_package_patches_nothing_and_importing_kernel_on_does() -> None:
    assert kernel._switch is None
    on = importlib.import_module("aer_fast.integrations.verl.kernel_on")
    importlib.reload(on)  # a first import elsewhere in this process has been undone
    assert kernel._switch is not None
    assert torch_functional.FusedLinearForPPO is kernel._FusedLinearForPPO
