"""Hugging Face accelerate: gradient accumulation, any number of processes, and checkpoints.

It shows which denominator makes one large batch of the micro-batches of all processes, and how the
controller of the entropy is saved and loaded with the rest.

Run it:
    python docs/recipes/accelerate_loop.py
    accelerate launch --num-processes 8 docs/recipes/accelerate_loop.py
    ACCELERATE_USE_CPU=true torchrun --standalone --nproc-per-node 2 docs/recipes/accelerate_loop.py

The last line is for CPUs. Without the variable, accelerate takes each process for the only one there.

For a real model: replace `causal_lm()` by `AutoModelForCausalLM.from_pretrained(...)` and `scored_rollouts`
by your own rollouts. `batch_size` is the number of rollouts of one optimiser step, of all processes
together.
"""

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import GradientAccumulationPlugin
from torch.utils.data import DataLoader

from aer_fast import AdaptiveEntropy
from aer_fast.integrations.transformers import fuse_lm_head, next_token_target
from tiny import causal_lm, scored_rollouts

torch.manual_seed(0)
model = causal_lm()  # yours: AutoModelForCausalLM.from_pretrained(...)
fuse_lm_head(model)
controller = AdaptiveEntropy(target_ratio=0.9, alpha_init=0.1)
rollouts = scored_rollouts(16)

accelerator = Accelerator(
    # Without sync_with_dataloader=False each micro-batch of the last batch would be a step of its own.
    gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=2, sync_with_dataloader=False),
    dataloader_config=DataLoaderConfiguration(split_batches=True),  # batch_size is of all processes together
)
model, optimizer, loader = accelerator.prepare(
    model, torch.optim.SGD(model.parameters(), lr=1.0), DataLoader(rollouts, batch_size=8)
)
accelerator.register_for_checkpointing(controller)  # after save_state, load_state brings it back

for batch in loader:  # a step's rollouts, this process's share of them
    ids, target = batch["ids"], next_token_target(batch["ids"], batch["mask"])
    tokens = (target != -100).sum()
    with torch.no_grad():
        old = model(ids, target=target)
    # The entropy of all processes' tokens, the weights of their prompts. With one process WORLD is None, and
    # nothing is reduced.
    mean, weight = old.entropy.sum() / tokens, controller.weight(batch["accuracy"]).mean()
    world = torch.distributed.group.WORLD
    controller.update(mean, tokens, world, weight=weight, prompts=len(ids))
    coefficient = controller.coefficient(batch["accuracy"])
    # DDP averages gradients, and accelerator.backward divides by the number of micro-batches.
    averaged = accelerator.num_processes * accelerator.gradient_accumulation_steps
    denominator = accelerator.reduce(tokens, "sum") / averaged
    for rows in torch.arange(len(ids)).tensor_split(accelerator.gradient_accumulation_steps):
        with accelerator.accumulate(model):
            out = model(
                ids[rows],
                target=target[rows],
                old_logprob=old.logprob[rows],
                advantage=batch["advantage"][rows],
                entropy_coef=coefficient[rows],
                denominator=denominator,
            )
            accelerator.backward(out.loss)
            optimizer.step()
            optimizer.zero_grad()

accelerator.save_state("runs/recipes/accelerate")
accelerator.print(f"alpha {controller.alpha:.3f}, target {controller.target:.2f}")  # alpha 0.084, target 3.74
accelerator.wait_for_everyone()  # nobody leaves while another still talks
accelerator.end_training()
