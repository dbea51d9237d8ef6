"""Tensor parallelism: layers and LM head split between processes by torch's `parallelize_module`.

The head stays split in the loss, which exchanges four numbers a token. In the second half the hidden
states, too, are split, by sequence, and go into `linear_ppo_loss` itself.

Run it:
    torchrun --standalone --nproc-per-node 2 docs/recipes/tensor_parallelism.py

For a real model: replace `causal_lm(...)` by `AutoModelForCausalLM.from_pretrained(...)`, and let `columns`
and `rows` name the linear layers of its attention and its MLP. Every process needs the same batch.
"""

import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from aer_fast import linear_ppo_loss
from aer_fast.integrations.transformers import LossInputs, fuse_lm_head, lm_body, next_token_target
from tiny import causal_lm, rollouts

gpu = torch.cuda.is_available()
dist.init_process_group("nccl" if gpu else "gloo")
rank, processes = dist.get_rank(), dist.get_world_size()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
if gpu:
    torch.cuda.set_device(device)

torch.manual_seed(0)  # the same model, and the same batch, everywhere
model = causal_lm(vocab_size=65).to(device)  # yours: AutoModelForCausalLM.from_pretrained(...)
columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
rows = ("self_attn.o_proj", "mlp.down_proj")
styles: dict[str, ParallelStyle] = {
    "lm_head": ColwiseParallel(output_layouts=Replicate())  # logits, when they are asked for, are whole
}
styles |= {f"model.layers.*.{name}": ColwiseParallel() for name in columns}
styles |= {f"model.layers.*.{name}": RowwiseParallel() for name in rows}
mesh = init_device_mesh(device.type, (processes,))
parallelize_module(model, mesh, styles)
fuse_lm_head(model)
optimizer = torch.optim.SGD(model.parameters(), lr=1.0, foreach=False)

ids, mask = (x.to(device) for x in rollouts(8, vocab_size=65))
target = next_token_target(ids, mask)
advantage = torch.randn(8, 1).to(device)
for _ in range(2):
    out = model(ids, loss_inputs=LossInputs(target=target, advantage=advantage, entropy_coef=0.01))
    out.loss.backward()
    optimizer.step()
    optimizer.zero_grad()

# Each process has its part of every sequence. It is gathered for the head; the gradient that comes back is
# the sum over the processes, and of this part alone.
whole = lm_body(model)(ids).last_hidden_state.detach()
mine = whole.chunk(processes, dim=1)[rank].clone().requires_grad_()
hidden = DTensor.from_local(mine, mesh, [Shard(1)])
again = linear_ppo_loss(hidden, model.lm_head.weight, target, None, advantage, entropy_coef=0.01)
again.loss.backward()

parts = [torch.empty_like(mine) for _ in range(processes)]
dist.all_gather(parts, mine.grad)
weights = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in model.state_dict().items()}
if rank == 0:
    saved = {"model": weights, "grad_hidden": torch.cat(parts, 1), "hidden": whole}
    os.makedirs("runs/recipes", exist_ok=True)
    torch.save(saved, "runs/recipes/tensor_parallelism.pt")
    print(f"{again.metrics['tokens']:.0f} tokens")  # 64 tokens
dist.barrier()
dist.destroy_process_group()
