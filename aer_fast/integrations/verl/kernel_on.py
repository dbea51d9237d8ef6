"""Importing this module calls `use_aer_kernel`.

It is a value for verl's ``actor_rollout_ref.model.external_lib``, which every worker imports before it builds
the model. ``aer.fused_kernel: true`` puts it there.
"""

from __future__ import annotations

from aer_fast.integrations.verl.kernel import use_aer_kernel

use_aer_kernel()
