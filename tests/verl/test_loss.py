"""The loss against verl's own, and the bonus against float64."""

import pickle
from functools import partial
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.utils.metric import AggregationType, Metric
from verl.workers.config import FSDPActorConfig
from verl.workers.utils.losses import ppo_loss

from aer_fast.integrations.verl.loss import aer_ppo_loss

MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
PROMPT, RESPONSE = (3, 1, 4, 2), (5, 2, 1, 4)
MASKED = (2, 0, 0, 1)  # tokens at the start of a response that are not the policy's


def actor_config(mode: str, **settings: Any) -> FSDPActorConfig:
    scale = 7 if mode == "seq-mean-token-sum-norm" else None
    fixed: dict[str, Any] = {"rollout_n": 1, "use_dynamic_bsz": True, "loss_scale_factor": scale}
    return FSDPActorConfig(loss_agg_mode=mode, calculate_entropy=True, **fixed, **settings)


def nested(rows: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def mask_of(row: int) -> Tensor:
    return (torch.arange(RESPONSE[row]) >= MASKED[row]).long()


class Batch:
    """Four rollouts with random numbers, and what a model would return for them."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        lengths = [p + r for p, r in zip(PROMPT, RESPONSE)]
        self.log_probs = [-3 * torch.rand(n, dtype=dtype) for n in lengths]
        self.entropy = [2 * torch.rand(n, dtype=dtype) for n in lengths]
        for leaf in (*self.log_probs, *self.entropy):
            leaf.requires_grad_()
        names = ("old_log_probs", "advantages", "ref_log_prob", "entropy_coef")
        self.fields = {name: [torch.randn(r, dtype=dtype) for r in RESPONSE] for name in names}
        for name in ("old_log_probs", "ref_log_prob"):
            self.fields[name] = [-3 * torch.rand(r, dtype=dtype) for r in RESPONSE]
        self.fields["entropy_coef"] = [
            c.expand(r).clone() for c, r in zip(torch.rand(4, dtype=dtype), RESPONSE)
        ]

    def data(
        self, rows: tuple[int, ...], padded: bool, dp_size: int = 1, globally: bool = True
    ) -> TensorDict:
        columns: dict[str, list[Tensor]] = {
            "prompts": [torch.ones(PROMPT[row], dtype=torch.long) for row in rows],
            "responses": [torch.ones(RESPONSE[row], dtype=torch.long) for row in rows],
            "response_mask": [mask_of(row) for row in rows],
            **{name: [values[row] for row in rows] for name, values in self.fields.items()},
        }
        tensors = {name: nested(values) for name, values in columns.items()}
        if padded:  # prompts to the left, responses to the right, as verl's padded batches
            width = max(PROMPT[row] for row in rows)
            attention = [torch.ones(PROMPT[row] + RESPONSE[row], dtype=torch.long) for row in rows]
            left = [torch.nn.functional.pad(a, (width - PROMPT[row], 0)) for a, row in zip(attention, rows)]
            tensors = {name: tensor.to_padded_tensor(0) for name, tensor in tensors.items()}
            tensors["attention_mask"] = nested(left).to_padded_tensor(0)
        tokens = int(sum(mask_of(row).sum() for row in range(4))) if globally else None
        info = {"batch_num_tokens": tokens, "global_batch_size": 4 if globally else None, "dp_size": dp_size}
        return tu.get_tensordict(tensors, non_tensor_dict=info)

    def output(self, rows: tuple[int, ...]) -> dict[str, Tensor]:
        return {
            "log_probs": nested([self.log_probs[row] for row in rows]),
            "entropy": nested([self.entropy[row] for row in rows]),
        }

    def gradients(self) -> list[Tensor]:
        leaves = (*self.log_probs, *self.entropy)
        grads = [torch.zeros_like(x) if x.grad is None else x.grad.clone() for x in leaves]
        for leaf in leaves:
            leaf.grad = None
        return grads


ALL = (0, 1, 2, 3)


@pytest.mark.parametrize("padded", [False, True], ids=["nested", "padded"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kl", [False, True], ids=["", "kl"])
def test_one_coefficient_for_all_is_verls_scalar(mode: str, kl: bool, padded: bool) -> None:
    batch = Batch()
    batch.fields["entropy_coef"] = [torch.full((r,), 0.3) for r in RESPONSE]
    ours, theirs = torch.tensor(0.0), torch.tensor(0.0)
    for rows in ((0, 1), (2, 3)):  # two micro-batches, normalised by the whole
        output, data = batch.output(rows), batch.data(rows, padded)
        loss, metrics = aer_ppo_loss(actor_config(mode, use_kl_loss=kl), output, data)
        loss.backward()
        ours = ours + loss.detach()
        assert metrics["actor/aer_bonus"].aggregate() == pytest.approx(
            0.3 * metrics["actor/entropy_loss"].aggregate()
        )
    our_gradients = batch.gradients()
    for rows in ((0, 1), (2, 3)):
        output, data = batch.output(rows), batch.data(rows, padded)
        loss, metrics = ppo_loss(actor_config(mode, use_kl_loss=kl, entropy_coeff=0.3), output, data)
        loss.backward()
        theirs = theirs + loss.detach()
        assert ("kl_loss" in metrics) == kl
    torch.testing.assert_close(ours, theirs)
    for mine, verls in zip(our_gradients, batch.gradients(), strict=True):
        torch.testing.assert_close(mine, verls)
    assert any(grad.abs().sum() > 0 for grad in our_gradients[4:])  # the entropy has a gradient


def bonus_by_hand(batch: Batch, mode: str, dp_size: int) -> tuple[Tensor, list[Tensor]]:
    """The bonus and its gradient for each entropy, from the definitions, row by row."""
    masks = [mask_of(row).double() for row in ALL]
    tokens = sum(mask.sum() for mask in masks)
    total, gradients = torch.zeros((), dtype=torch.float64), []
    for row, mask in enumerate(masks):
        share = {
            "token-mean": mask / tokens,
            "token-sum": mask,
            "seq-mean-token-sum": mask / 4,
            "seq-mean-token-mean": mask / mask.sum() / 4,
            "seq-mean-token-sum-norm": mask / 4 / 7,
        }[mode] * dp_size
        weight = share * batch.fields["entropy_coef"][row]
        # the entropy of a response token stands one place before it
        at = slice(PROMPT[row] - 1, PROMPT[row] + RESPONSE[row] - 1)
        total = total + (weight * batch.entropy[row].detach()[at]).sum()
        gradients.append(torch.zeros_like(batch.entropy[row]))
        gradients[-1][at] = -weight
    return total, gradients


@pytest.mark.parametrize("padded", [False, True], ids=["nested", "padded"])
@pytest.mark.parametrize("dp_size", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_every_rollout_has_its_own_coefficient(mode: str, dp_size: int, padded: bool) -> None:
    batch = Batch(torch.float64)
    data = batch.data(ALL, padded, dp_size)
    loss, metrics = aer_ppo_loss(actor_config(mode), batch.output(ALL), data)
    loss.backward()
    gradients = batch.gradients()
    without, _ = ppo_loss(actor_config(mode), batch.output(ALL), data)
    without.backward()
    theirs = batch.gradients()
    bonus, expected = bonus_by_hand(batch, mode, dp_size)
    torch.testing.assert_close(without - loss, bonus, rtol=1e-7, atol=1e-9)
    assert metrics["actor/aer_bonus"].aggregate() == pytest.approx(bonus.item(), rel=1e-6)
    for mine, hand in zip(gradients[4:], expected, strict=True):
        torch.testing.assert_close(mine, hand, rtol=1e-6, atol=1e-9)
    for mine, verls in zip(gradients[:4], theirs[:4], strict=True):
        assert torch.equal(mine, verls)


@pytest.mark.parametrize("mode", MODES)
def test_without_coefficients_it_is_verls_loss_to_the_bit(mode: str) -> None:
    batch = Batch()
    batch.fields["entropy_coef"] = [torch.zeros(r) for r in RESPONSE]
    results = []
    for loss_fn in (aer_ppo_loss, ppo_loss):
        config = actor_config(mode, entropy_coeff=0.2, use_kl_loss=True)
        loss, metrics = loss_fn(config, batch.output(ALL), batch.data(ALL, False))
        loss.backward()
        numbers = {
            k: m.values for k, m in metrics.items() if isinstance(m, Metric) and k != "actor/aer_bonus"
        }
        results.append((loss.detach(), batch.gradients(), numbers))
    (ours, our_gradients, our_numbers), (theirs, their_gradients, their_numbers) = results
    assert torch.equal(ours, theirs)
    assert all(torch.equal(a, b) for a, b in zip(our_gradients, their_gradients, strict=True))
    assert our_numbers == their_numbers


def test_the_two_coefficients_add_up() -> None:
    batch = Batch()
    batch.fields["entropy_coef"] = [torch.full((r,), 0.1) for r in RESPONSE]
    both, _ = aer_ppo_loss(
        actor_config("token-mean", entropy_coeff=0.2), batch.output(ALL), batch.data(ALL, False)
    )
    theirs, _ = ppo_loss(
        actor_config("token-mean", entropy_coeff=0.3), batch.output(ALL), batch.data(ALL, False)
    )
    torch.testing.assert_close(both, theirs)


@pytest.mark.parametrize(("globally", "kind"), [(True, AggregationType.SUM), (False, AggregationType.MEAN)])
def test_the_bonus_is_logged_like_verls_entropy(globally: bool, kind: AggregationType) -> None:
    batch = Batch()
    data = batch.data(ALL, False, globally=globally)
    loss, metrics = aer_ppo_loss(actor_config("token-mean"), batch.output(ALL), data)
    assert metrics["actor/aer_bonus"].aggregation is kind
    assert metrics["actor/pg_loss"].aggregate() - metrics["actor/aer_bonus"].aggregate() == pytest.approx(
        loss.item(), rel=1e-5
    )


def test_missing_entropy_and_missing_coefficients_are_named() -> None:
    batch = Batch()
    output = {"log_probs": batch.output(ALL)["log_probs"]}
    with pytest.raises(ValueError, match=r"actor\.calculate_entropy=True"):
        aer_ppo_loss(actor_config("token-mean"), output, batch.data(ALL, False))
    with pytest.raises(ValueError, match="entropy_coef"):
        aer_ppo_loss(
            actor_config("token-mean"), batch.output(ALL), batch.data(ALL, False).exclude("entropy_coef")
        )


def test_a_partial_of_it_is_pickled_by_reference() -> None:
    config = actor_config("seq-mean-token-sum", entropy_coeff=0.25)
    from ray import cloudpickle

    for pickler in (pickle, cloudpickle):
        data = pickler.dumps(partial(aer_ppo_loss, config=config))
        assert b"aer_fast.integrations.verl.loss" in data
        again = pickle.loads(data)
        assert again.func is aer_ppo_loss
        assert (again.keywords["config"].loss_agg_mode, again.keywords["config"].entropy_coeff) == (
            "seq-mean-token-sum",
            0.25,
        )
