"""DDP and FSDP2 of PyTorch: one script for both, in which only the wrapping of the model differs.

FSDP2's mixed precision rounds every float32 tensor among a module's arguments to bfloat16,
log-probabilities and advantages too. `LossInputs` carries them past it.

Run it:
    torchrun --standalone --nproc-per-node 2 docs/recipes/ddp_fsdp2.py
    torchrun --standalone --nproc-per-node 2 docs/recipes/ddp_fsdp2.py ddp

For a real model: replace `causal_lm()` by `AutoModelForCausalLM.from_pretrained(...)` and the made-up
rollouts by this process's share of yours. `model.model.layers` is where most models of transformers keep
their layers.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from aer_fast import AdaptiveEntropy
from aer_fast.integrations.transformers import LossInputs, fuse_lm_head, next_token_target
from tiny import LENGTH, causal_lm, rollouts

gpu = torch.cuda.is_available()
dist.init_process_group("nccl" if gpu else "gloo")
rank, processes = dist.get_rank(), dist.get_world_size()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
if gpu:
    torch.cuda.set_device(device)

torch.manual_seed(0)  # the same model everywhere
model = causal_lm().to(device)  # yours: AutoModelForCausalLM.from_pretrained(...)
fuse_lm_head(model)
if "ddp" in sys.argv:
    model = DistributedDataParallel(model)
else:
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=precision)
    fully_shard(model, mp_policy=precision)
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
controller = AdaptiveEntropy(target_ratio=0.9, alpha_init=0.1)

torch.manual_seed(1)  # 8 rollouts, of which each process takes its share
ids, mask = rollouts(8)
mask &= torch.arange(LENGTH) < torch.arange(5, 13).unsqueeze(1)  # responses of different lengths
advantage, accuracy = torch.randn(8, 1), torch.rand(8, 1) / 2
ids, mask, advantage, accuracy = (x[rank::processes].to(device) for x in (ids, mask, advantage, accuracy))
target = next_token_target(ids, mask)
count = mask.sum()
tokens = count.clone()
dist.all_reduce(tokens)

with torch.no_grad():
    old = model(ids, loss_inputs=LossInputs(target=target))
weight = controller.weight(accuracy).mean()
controller.update(old.entropy.sum() / count, count, dist.group.WORLD, weight=weight, prompts=len(ids))
for _ in range(3):
    inputs = LossInputs(
        target=target,
        old_logprob=old.logprob,
        advantage=advantage,
        entropy_coef=controller.coefficient(accuracy),
        denominator=tokens / processes,  # DDP and FSDP2 average gradients over the processes
    )
    loss = model(ids, loss_inputs=inputs).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
if rank == 0:
    os.makedirs("runs/recipes", exist_ok=True)
    torch.save({"model": weights, "controller": controller.state_dict()}, "runs/recipes/ddp_fsdp2.pt")
    print(f"{tokens.item()} tokens, alpha {controller.alpha:.3f}")  # 36 tokens, alpha 0.083
dist.barrier()  # nobody leaves while another still talks
dist.destroy_process_group()
