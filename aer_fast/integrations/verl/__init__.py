"""verl: an entropy coefficient for every prompt, and the fused kernel behind verl's switch.

    main       the command, for verl's overrides
    trainer    verl's trainers with the controller, as aer_sync, aer_colocate_async, aer_separate_async
    loss       verl's PPO loss minus a bonus with one coefficient per token
    kernel     use_aer_kernel(): linear_token_stats behind verl's use_fused_kernels
    kernel_on  importing it calls use_aer_kernel()
    settings   the section aer of the configuration, and what is refused
    rollouts   what the controller reads of a batch

Nothing of them is imported here: workers unpickle the loss and need no trainer.
"""

from __future__ import annotations

from aer_fast.integrations._versions import require

require("verl")
