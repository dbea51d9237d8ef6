"""The linear functions in a loop that is asked for, where the public ones let `plan` choose."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from aer_fast import Plan, linear_distill_loss, linear_ppo_loss, linear_token_loss, linear_token_stats
from aer_fast._linear.call import Call
from aer_fast._linear.distill_loss import distill_loss_of
from aer_fast._linear.ppo_loss import policy_loss_of
from aer_fast._linear.token_loss import token_loss_of
from aer_fast._linear.token_stats import token_stats_of

OF_CALL: dict[Callable[..., Any], Callable[..., Any]] = {
    linear_distill_loss: distill_loss_of,
    linear_ppo_loss: policy_loss_of,
    linear_token_loss: token_loss_of,
    linear_token_stats: token_stats_of,
}


def with_planner(function: Callable[..., Any], planner: Callable[..., Plan]) -> Callable[..., Any]:
    """A linear function that asks ``planner``, which has the arguments of `plan`, for its loops."""
    signature, of_call = inspect.signature(function), OF_CALL[function]
    shared = {field.name for field in fields(Call)}

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        bound = signature.bind(*args, **options)
        bound.apply_defaults()
        given = dict(bound.arguments)
        arguments = {name: given.pop(name) for name in shared & given.keys()}
        return of_call(Call(**arguments, planner=planner), **given)

    return call
