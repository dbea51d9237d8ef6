"""The bookkeeping that training, TRL and verl share."""

import doctest
import importlib
import json
import logging
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from aer_fast import AdaptiveEntropy
from aer_fast.integrations.aer import BINS, DEFAULTS, Bookkeeping, accuracy_metrics
from tests import ROOT

NAN = math.nan


def books(threshold: float = 1.0, **settings: Any) -> Bookkeeping:
    return Bookkeeping(AdaptiveEntropy(**{"rho": 1.0, "alpha_init": 0.1, **settings}), threshold)


def test_it_needs_no_trainer() -> None:
    others = ["transformers", "trl", "verl", "ray", "accelerate", "packaging", "triton"]
    code = f"import sys, aer_fast.integrations.aer; print([m for m in {others} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_docstring_examples() -> None:
    result = doctest.testmod(importlib.import_module("aer_fast.integrations.aer"))
    assert result.attempted > 0
    assert result.failed == 0


def test_the_accuracy_is_the_share_of_the_scores_that_count() -> None:
    score = torch.tensor([[1.0, 0.9], [1.2, NAN], [NAN, NAN], [0.0, -math.inf]])
    found = books().accuracy(score)
    torch.testing.assert_close(found, torch.tensor([0.5, 1.0, NAN, 0.0]), equal_nan=True, rtol=0, atol=0)
    thirds = books().accuracy(torch.tensor([[1.0, 1.0, 0.0]]), torch.float64)
    assert thirds.tolist() == [2 / 3]
    assert books().accuracy(torch.zeros(0, 0)).tolist() == []


def test_scores_meet_the_threshold_in_their_own_dtype() -> None:
    rounded = torch.tensor([[0.7]])  # less than 0.7
    assert books(0.7).accuracy(rounded, torch.float64).tolist() == [1.0]
    assert books(0.7).accuracy(rounded.double()).tolist() == [0.0]


def test_no_bonus_where_the_accuracy_is_not_known() -> None:
    accuracy = torch.tensor([[0.0, NAN], [1.0, 0.5]], dtype=torch.float64)
    assert books().coefficient(accuracy).tolist() == [[0.1, 0.0], [0.0, 0.05]]
    assert books(difficulty="uniform").coefficient(accuracy).tolist() == [[0.1, 0.0], [0.1, 0.1]]


PARTS = [  # entropy and tokens; accuracy and coefficient of each rollout
    (6.0, 4, [0.0, 1 / 3], [0.1, 0.2]),
    (1.0, 3, [0.5, 1.0], [0.4, 0.8]),
    (0.0, 0, [2 / 3, NAN], [1.0, 9.0]),
]


def observed(parts: list[Any], **settings: Any) -> Bookkeeping:
    aer = books(**settings)
    for total, count, accuracy, coefficient in parts:
        aer.observe(
            torch.tensor(total, dtype=torch.float64),
            torch.tensor(count),
            torch.tensor(accuracy, dtype=torch.float64),
            torch.tensor(coefficient, dtype=torch.float64),
        )
    return aer


def test_a_step_is_the_sum_of_its_parts() -> None:
    aer, twin = observed(PARTS), AdaptiveEntropy(alpha_init=0.1)
    twin.update(1.0)
    assert aer.update() == {
        "aer/coefficient/hard": 0.1,
        "aer/coefficient/medium": pytest.approx(0.3),
        "aer/coefficient/easy": pytest.approx(0.9),
        "aer/entropy": 1.0,
        "aer/target": 0.4,
        "aer/alpha": twin.alpha,
    }
    aer.observe(4.0, 8)  # a step of its own
    twin.update(0.5)
    assert aer.update() == {"aer/entropy": 0.5, "aer/target": 0.4, "aer/alpha": twin.alpha}


def test_processes_share_one_reduction() -> None:
    here, there = observed(PARTS[:1]), observed(PARTS[1:])
    calls: list[Tensor] = []

    def reduce(mine: Tensor) -> Tensor:
        calls.append(mine)
        assert there._sums is not None
        return mine + there._sums

    assert here.update(reduce) == observed(PARTS).update()
    assert len(calls) == 1


def test_a_step_without_a_token_moves_nothing() -> None:
    aer = books()
    aer.observe(0.0, 0)
    assert aer.update() == aer.update() == {"aer/alpha": 0.1}
    assert books(target=0.5).update() == {"aer/target": 0.5, "aer/alpha": 0.1}
    aer.observe(9.0, 3)
    aer.forget()
    assert aer.update() == {"aer/alpha": 0.1}
    aer.observe(NAN, 3)
    with pytest.raises(ValueError, match="entropy must be finite"):
        aer.update()
    assert aer.update() == {"aer/alpha": 0.1}


def test_sums_are_kept_in_the_dtype_of_the_entropy() -> None:
    aer = books()
    aer.observe(2.0**60, 1)
    aer.observe(1024.0, 1)  # lost in float32
    assert aer.update()["aer/entropy"] == (2.0**60 + 1024.0) / 2
    aer.observe(torch.tensor(1.0), torch.tensor(2))
    assert aer._sums is not None
    assert aer._sums.dtype == torch.float32


def test_no_graph_is_kept() -> None:
    aer = books()
    for _ in range(2):
        aer.observe(torch.ones(3, requires_grad=True).sum(), 3)
        assert aer._sums is not None
        assert not aer._sums.requires_grad


def test_prompts_fall_into_thirds() -> None:
    accuracy = torch.tensor([0.0, 1 / 3, 0.5, 2 / 3, 1.0, NAN], dtype=torch.float64)
    coefficient = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 0.0], dtype=torch.float64)
    means = {"aer/coefficient/hard": 1.0, "aer/coefficient/medium": 3.0, "aer/coefficient/easy": 12.0}
    assert accuracy_metrics(accuracy, coefficient) == {"aer/accuracy": pytest.approx(0.5)} | means
    assert accuracy_metrics(accuracy[:1], coefficient[:1]) == {
        "aer/accuracy": 0.0,
        "aer/coefficient/hard": 1.0,
    }
    assert accuracy_metrics(accuracy[3:5]) == {"aer/accuracy": pytest.approx(5 / 6)}
    assert accuracy_metrics(accuracy[:0], coefficient[:0]) == {}
    assert list(BINS) == ["hard", "medium", "easy"]


@pytest.mark.parametrize("threshold", [NAN, math.inf, "1", None, True])
def test_the_threshold_is_checked(threshold: Any) -> None:
    with pytest.raises(ValueError, match="threshold must be a finite number"):
        books(threshold)


def test_the_defaults_are_the_controller_s() -> None:
    assert vars(AdaptiveEntropy(**DEFAULTS)) == vars(AdaptiveEntropy())


def test_the_state_comes_back_to_the_bit(tmp_path: Path) -> None:
    aer, back = books(), books()
    aer.controller.update(1 / 3)
    aer.controller.update(0.1)
    aer.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["aer.json"]
    back.load(tmp_path, "the settings")
    assert back.controller.state_dict() == aer.controller.state_dict()


def test_an_interrupted_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aer = books()
    aer.save(tmp_path)
    before = (tmp_path / "aer.json").read_text()
    aer.controller.update(1.0)

    def killed(state: Any, file: Any, **_: Any) -> None:
        file.write('{"alp')
        raise KeyboardInterrupt

    monkeypatch.setattr(json, "dump", killed)
    with pytest.raises(KeyboardInterrupt):
        aer.save(tmp_path)
    assert (tmp_path / "aer.json").read_text() == before


def test_the_state_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[bool] = []
    monkeypatch.setattr("os.fsync", lambda _: synced.append((tmp_path / "aer.json").exists()))
    books().save(tmp_path)
    assert synced == [False]


def test_a_missing_state_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    aer = books()
    with caplog.at_level(logging.WARNING):
        aer.load(tmp_path, "the settings")
    assert f"{tmp_path / 'aer.json'} is missing" in caplog.text
    assert aer.controller.state_dict() == {"alpha": 0.1}


@pytest.mark.parametrize("text", ["", "[]", '{"alpha": 9.0}', '{"alpha": 0.1, "law": {"mean": 0.0}}'])
def test_a_state_that_does_not_fit_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "aer.json").write_text(text)
    with pytest.raises(ValueError, match=r"aer\.json does not fit the section aer: "):
        books().load(tmp_path, "the section aer")
