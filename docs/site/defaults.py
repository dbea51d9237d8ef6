"""For mkdocstrings, which reads the source and runs nothing: defaults as the values that they are."""

from __future__ import annotations

from typing import Any

from griffe import Extension, Function, Module, ParameterKind


class Defaults(Extension):
    """Defaults that the integrations take over by name become values; *args and **kwargs have none."""

    def on_function(self, *, func: Function, **_: Any) -> None:
        for parameter in func.parameters:
            if parameter.kind in (ParameterKind.var_positional, ParameterKind.var_keyword):
                parameter.default = None

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        controller = pkg["_adaptive_entropy.AdaptiveEntropy"].parameters
        threshold = pkg["integrations.aer.THRESHOLD"].value
        pkg["integrations.aer.Bookkeeping"].parameters["threshold"].default = threshold
        fields = pkg["integrations.trl.AERGRPOConfig"].attributes
        fields["aer_threshold"].value = threshold
        for name, field in fields.items():
            if str(field.value).startswith("_setting("):
                field.value = controller[name.removeprefix("aer_")].default
