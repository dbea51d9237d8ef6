"""The policy and its optimiser: what the policy says of sequences, and what it learns from them.

Both run sequences through the model in micro-batches, each rank its share; the results depend on neither.
"""

import math
from typing import Any

import torch
from torch import Tensor

from aer_fast import merge_metrics
from training.advantages import aggregation, clip_cov
from training.batch import Batch, Rollout, make_batch, micro_batches, shares
from training.config import Config
from training.distributed import World
from training.policy import Distillation, Objective, Policy, Taught, Tokens
from training.rollout import seed_of
from training.tasks import Problem

Metrics = dict[str, Any]

# What an update reports: its losses, and means over its tokens.
LOSSES = ("loss", "value_loss")
MEANS = ("clip_fraction_low", "clip_fraction_high", "clip_fraction", "approx_kl")


class Learner:
    """The policy, the initial one where the KL needs it apart, the teacher if there is one, and the optimiser
    if the policy is trained."""

    optimizer: torch.optim.Optimizer

    def __init__(
        self,
        policy: Policy,
        reference: Policy | None,
        teacher: Policy | None,
        config: Config,
        here: World,
        *,
        pad: int,
        trains: bool,
    ) -> None:
        self.policy, self.reference, self.teacher = policy, reference, teacher
        self.config, self.here, self.pad = config, here, pad
        self.share = policy.shares and (teacher is None or teacher.shares)  # prompts, in a packed row
        if trains:  # before the first forward, in which FSDP2 exchanges the parameters
            trained = [p for p in policy.parameters() if p.requires_grad]
            self.optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay)
        self.objective = Objective(
            (config.clip_low, config.clip_high),
            config.dual_clip,
            config.kl_coef,
            config.value_coef,
            config.value_clip,
        )
        if teacher is not None:
            alone = not config.reward_loss
            distillation = Distillation(config.divergence, config.jsd_beta, config.distill_coef, alone)
            self.objective = self.objective._replace(distillation=distillation)

    def set_learning_rate(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, step)

    @torch.no_grad()
    def measure(
        self, rollouts: list[Rollout], parts: list[list[int]], *, reference: bool = False
    ) -> list[dict[str, Tensor]]:
        """Of each sequence, by the policy as it is: logprob and entropy; value and final_value where there is
        a value head; ref_logprob if asked for. On the CPU; all ranks get all."""
        found: dict[int, dict[str, Tensor]] = {}
        for rows in parts:
            for micro in self.micro_batches(rollouts, rows):
                batch = self.batch(rollouts, micro)
                stats = self.policy(batch)
                fields = {"logprob": stats.logprob, "entropy": stats.entropy, "value": stats.value}
                if reference:
                    initial = self.reference or self.policy
                    fields["ref_logprob"] = initial(batch, adapter=self.reference is not None).logprob
                sizes = [len(rollouts[i].response) for i in micro]
                # clones: a view would be sent to the other ranks with all that it is a part of
                split = {
                    name: [part.clone() for part in values.float().cpu().split(sizes)]
                    for name, values in fields.items()
                    if values is not None and sizes
                }
                for place, i in enumerate(micro):
                    found[i] = {name: values[place] for name, values in split.items()}
                    if stats.final_value is not None:
                        found[i]["final_value"] = stats.final_value[place].float().cpu().clone()
        found = self.here.gather_shares(found)
        return [found[i] for i in sorted(found)]

    def update(
        self,
        rollouts: list[Rollout],
        old: list[dict[str, Tensor]],
        rows: list[int],
        name: str,
        problems: list[Problem],
    ) -> Metrics:
        """One step of the optimiser on a minibatch, in micro-batches of which the result does not depend."""
        lengths = [len(rollouts[i].response) for i in rows]
        weight, denominator = aggregation(self.config, lengths)
        mask = dict(zip(rows, map(torch.full, [(n,) for n in lengths], weight)))
        if self.config.clip_cov:
            self.drop_by_covariance(rollouts, old, rows, mask, name)
        losses, parts = torch.zeros(len(LOSSES), dtype=torch.float64), []
        for micro in self.micro_batches(rollouts, rows):
            batch = self.batch(rollouts, micro)
            tokens, taught = self.tokens(old, micro, mask), self.taught(batch)
            # FSDP2 averages the gradients of the ranks; what is wanted is their sum
            loss, out, value_loss = self.policy(
                batch, tokens, self.objective, denominator / self.here.size, taught=taught
            )
            loss.backward()
            losses += torch.stack([(x / self.here.size).double().cpu() for x in (loss.detach(), value_loss)])
            parts.append(out.metrics)
        metrics = dict(zip(LOSSES, self.here.total(losses).tolist()))
        merged = {name: x.item() for name, x in merge_metrics(parts, self.here.group).items()}
        metrics |= {name: merged[name] for name in MEANS}
        if self.teacher is not None:
            metrics["divergence"] = merged["divergence"]
        norm = clip_gradients(self.policy, self.config.max_grad_norm)
        if not all(map(math.isfinite, (norm, *metrics.values()))):
            asked = sorted({i // self.config.group_size for i in rows})
            raise FloatingPointError(
                f"{name}: loss {metrics['loss']:g}, gradient norm {norm:g}; nothing was updated with it."
                f" The first of its {len(asked)} prompts: {problems[asked[0]].question!r}"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        return metrics | {"ratio_max": merged["ratio_max"], "grad_norm": norm, "tokens": merged["tokens"]}

    def drop_by_covariance(
        self,
        rollouts: list[Rollout],
        old: list[dict[str, Tensor]],
        rows: list[int],
        mask: dict[int, Tensor],
        name: str,
    ) -> None:
        """Clip-Cov: 0 in the mask of the tokens that it drops from a minibatch, the same on all ranks."""
        now = dict(zip(sorted(rows), self.measure(rollouts, [rows])))
        dropped = clip_cov(
            torch.cat([old[i]["advantage"] for i in rows]),
            torch.cat([now[i]["logprob"] for i in rows]),
            torch.cat([old[i]["logprob"] for i in rows]),
            share=self.config.clip_cov,
            between=self.config.clip_cov_range,
            clip=(self.config.clip_low, self.config.clip_high),
            generator=torch.Generator().manual_seed(seed_of(self.config, f"clip_cov {name}", 0)),
        )
        for i, part in zip(rows, dropped.split([mask[i].numel() for i in rows])):
            mask[i] = mask[i].masked_fill(part, 0.0)

    def micro_batches(self, rollouts: list[Rollout], rows: list[int]) -> list[list[int]]:
        """This rank's part of a minibatch; all ranks get as many micro-batches, empty ones if need be."""
        dealt = shares([rollouts[i].length for i in rows], self.here.size)[self.here.rank]
        mine = [rows[k] for k in dealt]
        if self.share:
            mine.sort()  # responses to one prompt next to each other
        config = self.config
        cut = micro_batches(
            [rollouts[i] for i in mine], config.micro_tokens, packing=config.packing, share=self.share
        )
        batches = [[mine[k] for k in batch] for batch in cut]
        return batches + [[]] * (self.here.most(len(batches)) - len(batches))

    def batch(self, rollouts: list[Rollout], rows: list[int]) -> Batch:
        return make_batch(
            [rollouts[i] for i in rows],
            packing=self.config.packing,
            pad=self.pad,
            device=self.here.device,
            share=self.share,
        )

    @torch.no_grad()
    def taught(self, batch: Batch) -> Taught | None:
        """What the teacher says of a batch."""
        return None if self.teacher is None else self.teacher(batch, teaches=True)

    def tokens(self, old: list[dict[str, Tensor]], rows: list[int], weight: dict[int, Tensor]) -> Tokens:
        """What the loss needs of some sequences."""

        def flat(name: str) -> Tensor | None:
            if name not in old[0]:
                return None
            return torch.cat([old[i][name] for i in rows] or [torch.zeros(0)]).to(self.here.device)

        mask = [weight[i] for i in rows]
        names = ("importance_weight", "ref_logprob", "value", "returns")
        constants = (
            flat("logprob"),
            flat("advantage"),
            torch.cat(mask or [torch.zeros(0)]),
            flat("entropy_coef"),
        )
        return Tokens(*(x.to(self.here.device) for x in constants if x is not None), *map(flat, names))


def mismatch(old: list[dict[str, Tensor]]) -> Metrics:
    """How far the sampler, the reference and the value head are from the policy."""
    found: Metrics = {}
    names = [name for name in old[0] if name != "final_value"]
    columns = {name: torch.cat([stats[name] for stats in old]) for name in names}
    if "importance_weight" in columns:
        found["importance_weight"] = columns["importance_weight"].mean().item()
        found["mismatch"] = columns["mismatch"].log().abs().mean().item()
        found["mismatch_max"] = columns["mismatch"].max().item()
    if "ref_logprob" in columns:
        d = columns["ref_logprob"] - columns["logprob"]
        found["kl"] = (d.exp() - d - 1).mean().item()
    if "returns" in columns:
        spread = columns["returns"].var(unbiased=False)
        unexplained = (columns["returns"] - columns["value"]).var(unbiased=False)
        found["explained_variance"] = (1 - unexplained / spread).item() if spread > 0 else 0.0
    return found


def finite(policy: Policy, here: World) -> bool:
    """Whether all weights are finite, on all ranks."""
    local = [getattr(p, "to_local", lambda p=p: p)() for p in policy.parameters() if p.requires_grad]
    bad = torch.stack([~p.detach().isfinite().all() for p in local]).any()
    return here.most(int(bad)) == 0


def clip_gradients(policy: Policy, norm: float) -> float:
    """Clip to a norm over all ranks; returns the norm before."""
    total = torch.nn.utils.clip_grad_norm_(policy.parameters(), norm)
    full = getattr(total, "full_tensor", None)
    return float(total if full is None else full())


def learning_rate(config: Config, step: int) -> float:
    """Of a step, counted from 1: a linear rise to the peak, then constant, linear or cosine to 0."""
    if step <= config.lr_warmup:
        return config.lr * step / config.lr_warmup
    left = 1.0 - (step - 1 - config.lr_warmup) / max(config.steps - config.lr_warmup, 1)
    if config.lr_decay == "linear":
        return config.lr * left
    if config.lr_decay == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * (1 - left)))
    return config.lr


def merge(updates: list[Metrics]) -> Metrics:
    """Means over the updates of a step, the divergence's over their tokens; the largest of ratio_max and
    grad_norm."""
    means = {name: sum(u[name] for u in updates) / max(len(updates), 1) for name in LOSSES + MEANS}
    if any("divergence" in u for u in updates):
        taught = [{name: u[name] for name in ("tokens", "divergence")} for u in updates]
        means["divergence"] = merge_metrics(taught)["divergence"].item()
    largest = {"grad_norm": 0.0, "ratio_max": 1.0}
    return means | {name: max((u[name] for u in updates), default=x) for name, x in largest.items()}
