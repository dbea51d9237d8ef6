import json
import math
import pickle
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from aer_fast import AdaptiveEntropy

DIFFICULTIES = ["linear", "gate", "complement", "uniform"]
LAWS = ["pi", "proportional", "sign", "fixed"]
ENTROPIES = [1.5, 1.5, 0.9, 0.6, 0.3, 0.2, 0.1, 0.4, 0.6, 2.0, 0.01, 0.01]  # 0.6 is 0.4 · 1.5


def weight_by_hand(difficulty: str, accuracy: float, rho: float) -> float:
    return {
        "linear": max(0.0, (rho - accuracy) / rho),
        "gate": 1.0 if accuracy <= rho else 0.0,
        "complement": 1.0 - accuracy,
        "uniform": 1.0,
    }[difficulty]


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
@pytest.mark.parametrize("rho", [0.25, 0.5, 1.0])
def test_weights(difficulty: Any, rho: float) -> None:
    aer = AdaptiveEntropy(difficulty=difficulty, rho=rho, alpha_init=0.1)
    accuracy = torch.tensor([[0.0, 0.125, 0.25], [0.5, 0.75, 1.0]], dtype=torch.float64)
    expected = [[weight_by_hand(difficulty, a, rho) for a in row] for row in accuracy.tolist()]
    assert aer.weight(accuracy).tolist() == expected
    torch.testing.assert_close(aer.coefficient(accuracy), 0.1 * torch.tensor(expected, dtype=torch.float64))
    assert aer.weight(accuracy.float()).dtype == torch.float32
    assert aer.weight(1).item() == weight_by_hand(difficulty, 1.0, rho)
    assert aer.weight([0.0, 1.0]).tolist() == aer.weight(torch.tensor([0.0, 1.0])).tolist()
    whole = torch.tensor([0, 1])
    assert aer.weight(whole).dtype == torch.float32
    assert torch.equal(aer.weight(whole), aer.weight(whole.float()))
    assert torch.equal(aer.weight(whole.bool()), aer.weight(whole.float()))


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("target", [None, 0.6])
@pytest.mark.parametrize("gate", [False, True])
def test_the_laws_against_a_simulation(law: Any, target: float | None, gate: bool) -> None:
    aer = AdaptiveEntropy(
        law=law,
        target=target,
        eta=0.03,
        gain=0.06,
        alpha_init=0.05,
        alpha_min=-0.02,
        alpha_max=0.1,
        gate_above_target=gate,
    )
    alpha, goal, integral = 0.05, target, None
    assert aer.coefficient(0.0).item() == pytest.approx(alpha)  # nothing is known yet: not gated
    for entropy in ENTROPIES:
        aer.update(torch.tensor(entropy, dtype=torch.float64), count=7)
        goal = 0.4 * entropy if goal is None else goal
        if law == "pi":
            error = 1 - entropy / goal
            integral = 0.05 if integral is None and entropy <= goal else integral
            if integral is not None:
                integral = min(max(integral + 0.03 * error, -0.02 - 0.03), 0.1)
            alpha = max(0.06 * error + 0.05, 0.0) if integral is None else 0.06 * error + integral
        elif law == "proportional":
            alpha += 0.03 * (1 - entropy / goal)
        elif law == "sign" and entropy != goal:
            alpha += 0.03 if entropy < goal else -0.03
        alpha = min(max(alpha, -0.02), 0.1)
        assert aer.alpha == alpha
        assert type(aer.alpha) is float
        assert aer.target == goal
        assert aer.initial_entropy == (ENTROPIES[0] if target is None else None)
        expected = 0.0 if gate and entropy > goal else alpha
        assert aer.coefficient(0.0).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("entropy", [0.0, -1e-8, 5e-324, sys.float_info.max])
def test_a_law_takes_any_entropy(law: Any, entropy: float) -> None:
    """Of a policy that has collapsed, where rounding may leave a little less than 0, too."""
    aer = AdaptiveEntropy(law=law, target=0.5, alpha_init=0.01, alpha_min=-0.05, alpha_max=0.2)
    aer.update(entropy)
    assert -0.05 <= aer.alpha <= 0.2


def test_sign_does_not_move_at_equality() -> None:
    aer = AdaptiveEntropy(law="sign", target=0.5, alpha_init=0.1)
    aer.update(0.5)
    assert aer.alpha == 0.1


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("cut", [0, 1, 6])
def test_a_restored_controller_goes_on_exactly(law: Any, cut: int) -> None:
    settings: dict[str, Any] = {"law": law, "alpha_init": 0.01, "gate_above_target": True}
    whole = AdaptiveEntropy(**settings)
    first = AdaptiveEntropy(**settings)
    for entropy in ENTROPIES[:cut]:
        first.update(entropy)
    state = json.loads(json.dumps(first.state_dict()))
    numbers = {name: value for name, value in state.items() if name != "law"} | state.get("law", {})
    assert all(type(value) is float for value in numbers.values())
    second = AdaptiveEntropy(**settings)
    second.load_state_dict(state)
    for k, entropy in enumerate(ENTROPIES):
        whole.update(entropy)
        if k >= cut:
            second.update(entropy)
            assert second.state_dict() == whole.state_dict()
            assert second.coefficient(0.2) == whole.coefficient(0.2)


def test_a_state_from_before_the_target_was_met_takes_the_integral_away() -> None:
    early, late = AdaptiveEntropy(target=0.5), AdaptiveEntropy(target=0.5)
    early.update(0.9)
    for _ in range(5):
        late.update(0.1)
    late.load_state_dict(early.state_dict())
    for aer in (early, late):
        aer.update(0.45)
    assert early.state_dict() == late.state_dict()


def test_a_count_of_0_changes_nothing() -> None:
    aer = AdaptiveEntropy()
    aer.update(math.nan, count=0)
    assert aer.target is None
    assert aer.state_dict() == {"alpha": 0.0}


@pytest.mark.parametrize("gate", [False, True])
def test_anchoring_sets_the_target_and_no_more(gate: bool) -> None:
    aer = AdaptiveEntropy(alpha_init=0.05, target_ratio=0.3, gate_above_target=gate)
    aer.anchor(torch.tensor(2.0, dtype=torch.float64))
    assert (aer.alpha, aer.target, aer.initial_entropy) == (0.05, 0.3 * 2.0, 2.0)
    assert aer.state_dict() == {"alpha": 0.05, "target": 0.3 * 2.0, "initial_entropy": 2.0}
    assert aer.coefficient(0.0).item() == pytest.approx(0.05)  # no update yet: not gated
    aer.update(0.3)  # half the target, which stays
    assert aer.initial_entropy == 2.0
    assert aer.alpha == pytest.approx(0.15 * 0.5 + 0.05 + 0.008 * 0.5)


@pytest.mark.parametrize("entropy", [0.0, -1.0, math.nan, math.inf, "1", True, torch.ones(2)])
def test_what_cannot_be_anchored_to(entropy: Any) -> None:
    aer = AdaptiveEntropy()
    with pytest.raises(ValueError, match="entropy must be"):
        aer.anchor(entropy)
    assert aer.state_dict() == {"alpha": 0.0}


def test_a_known_target_is_not_anchored_again() -> None:
    first, absolute = AdaptiveEntropy(), AdaptiveEntropy(target=0.5)
    first.update(1.0)
    restored = AdaptiveEntropy()
    restored.load_state_dict(first.state_dict())
    for aer, known in (
        (first, "anchored already: 0.4"),
        (restored, "anchored already"),
        (absolute, "absolute: 0.5"),
    ):
        before = aer.state_dict()
        with pytest.raises(ValueError, match=known):
            aer.anchor(2.0)
        assert aer.state_dict() == before


def test_between_which_bounds_alpha_moves() -> None:
    settings = {"alpha_init": 0.05, "alpha_min": 0.01, "alpha_max": 0.3}
    for law in LAWS:
        expected = (0.05, 0.05) if law == "fixed" else (0.01, 0.3)
        assert AdaptiveEntropy(law=law, **settings).alpha_range == expected


def test_the_names_are_those_of_the_documentation() -> None:
    assert list(AdaptiveEntropy.laws) == LAWS
    assert list(AdaptiveEntropy.difficulties) == DIFFICULTIES
    for name in (*LAWS, *DIFFICULTIES):
        line = re.search(rf"^ .* {name}  +", AdaptiveEntropy.__doc__ or "", re.MULTILINE)
        assert line, f"the docstring of AdaptiveEntropy must have a line for {name!r}"


class Integral:
    """A law that remembers."""

    def __init__(self, memory: Any = None) -> None:
        self.memory = {"sum": 0.0} if memory is None else memory

    def __call__(self, alpha: float, entropy: float, target: float, eta: float) -> float:
        self.memory["sum"] += target - entropy
        return eta * self.memory["sum"]

    def state_dict(self) -> Any:
        return self.memory

    def load_state_dict(self, state: Any) -> None:
        self.memory = {"sum": state["sum"] + 0}


def halve(alpha: float, entropy: float, target: float, eta: float) -> float:
    return alpha / 2 if entropy > target else 10.0 + eta


def test_a_law_of_one_s_own_is_clipped() -> None:
    aer = AdaptiveEntropy(law=halve, target=0.5, alpha_init=0.16, alpha_min=0.05)
    alphas = []
    for entropy in (1.0, 1.0, 0.1):
        aer.update(entropy)
        alphas.append(aer.alpha)
    assert alphas == [0.08, 0.05, 0.2]
    assert aer.alpha_range == (0.05, 0.2)
    assert set(aer.state_dict()) == {"alpha", "target", "last_entropy"}


def test_a_law_that_remembers_goes_on_exactly() -> None:
    settings: dict[str, Any] = {"eta": 0.1, "alpha_min": -9.0, "alpha_max": 9.0}
    whole, first = (AdaptiveEntropy(law=Integral(), **settings) for _ in range(2))
    for entropy in ENTROPIES[:6]:
        first.update(entropy)
    kept = first.state_dict()
    state = json.loads(json.dumps(kept))
    law = Integral()
    second = AdaptiveEntropy(law=law, **settings)
    second.load_state_dict(state)
    assert state["law"] == law.memory != {"sum": 0.0}
    first.update(0.1)
    assert kept["law"] == state["law"] == law.memory  # each has its own
    for k, entropy in enumerate(ENTROPIES):
        whole.update(entropy)
        if k >= 6:
            second.update(entropy)
            assert second.state_dict() == whole.state_dict()


def test_a_law_that_remembers_takes_the_state_of_another() -> None:
    built_in = AdaptiveEntropy()
    built_in.update(1.0)
    aer = AdaptiveEntropy(law=Integral({"sum": 3.0}))
    aer.load_state_dict(built_in.state_dict())
    assert aer.state_dict() == built_in.state_dict() | {"law": {"sum": 3.0}}


@pytest.mark.parametrize("returned", [math.nan, math.inf, None, "0.1", True, torch.tensor(0.1)])
def test_what_a_law_returns_is_checked(returned: Any) -> None:
    aer = AdaptiveEntropy(law=lambda *_: returned, alpha_init=0.1)
    with pytest.raises(
        ValueError, match=r"law must return a finite number, got .* entropy=2\.0, target=0\.8"
    ):
        aer.update(2.0)
    assert aer.state_dict() == {"alpha": 0.1}  # not anchored, either


@pytest.mark.parametrize("memory", [{"sum": math.nan}, {"sum": torch.ones(1)}, {1: 2.0}, [1.0]])
def test_what_a_law_remembers_is_checked(memory: Any) -> None:
    with pytest.raises(ValueError, match=r"law\.state_dict\(\).* must be a "):
        AdaptiveEntropy(law=Integral(memory))


def test_a_law_that_remembers_saves_and_loads() -> None:
    class Half(Integral):
        load_state_dict: Any = property()  # not there

    with pytest.raises(ValueError, match="both state_dict and load_state_dict"):
        AdaptiveEntropy(law=Half())


@pytest.mark.parametrize("memory", [{}, {"sum": "1"}, {"sum": math.nan}, 3.0, None])
def test_a_memory_that_does_not_fit_changes_nothing(memory: Any) -> None:
    aer = AdaptiveEntropy(law=Integral(), alpha_init=0.1)
    with pytest.raises(ValueError, match=r"state\['law'\]"):
        aer.load_state_dict({"alpha": 0.2, "law": memory})
    assert aer.state_dict() == {"alpha": 0.1, "law": {"sum": 0.0}}


def test_a_difficulty_of_one_s_own() -> None:
    aer = AdaptiveEntropy(
        difficulty=lambda accuracy, rho: 4 * rho * accuracy * (1 - accuracy), alpha_init=0.1
    )
    accuracy = torch.tensor([[0.0, 0.25], [0.5, 1.0]], dtype=torch.float64)
    assert aer.weight(accuracy).tolist() == [[0.0, 0.375], [0.5, 0.0]]
    assert aer.coefficient(0.5).item() == pytest.approx(0.05)
    whole = AdaptiveEntropy(difficulty=lambda accuracy, rho: accuracy > rho)
    assert whole.weight(accuracy).tolist() == [[0.0, 0.0], [0.0, 1.0]]
    assert whole.weight(accuracy).dtype == torch.float64


@pytest.mark.parametrize(
    ("difficulty", "message"),
    [
        (lambda accuracy, rho: 1.0, r"a tensor of shape \(2,\), got 1\.0"),
        (lambda accuracy, rho: accuracy.sum(), r"a tensor of shape \(2,\)"),
        (lambda accuracy, rho: accuracy.log(), "finite weights, got tensor"),
    ],
)
def test_what_a_difficulty_returns_is_checked(difficulty: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"difficulty must return {message}"):
        AdaptiveEntropy(difficulty=difficulty).weight([0.0, 0.5])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"law": "pid"}, f"law must be one of {', '.join(LAWS)}, got 'pid'"),
        ({"difficulty": "hard"}, f"difficulty must be one of {', '.join(DIFFICULTIES)}, got 'hard'"),
        ({"law": 3}, f"{LAWS[-1]}, or a function (alpha, entropy, target, eta) -> alpha, got 3"),
        ({"law": Integral}, f"{LAWS[-1]}, or a function (alpha, entropy, target, eta) -> alpha, got <class"),
        ({"difficulty": None}, f"{DIFFICULTIES[-1]}, or a function (accuracy, rho) -> weights, got None"),
        (
            {"difficulty": ["linear"]},
            f"{DIFFICULTIES[-1]}, or a function (accuracy, rho) -> weights, got ['linear']",
        ),
    ],
)
def test_the_error_says_what_is_allowed(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        AdaptiveEntropy(**settings)


def test_a_controller_can_be_sent_to_another_process() -> None:
    aer = pickle.loads(pickle.dumps(AdaptiveEntropy(difficulty="gate", law="sign", target=0.5)))
    aer.update(0.1)
    assert (aer.alpha, aer.weight(0.6).item()) == (0.02, 0.0)


BAD_SETTINGS: dict[str, list[Any]] = {
    "target_ratio": [0.0, -1.0, math.nan, "0.4"],
    "target": [0.0, -0.2, math.inf],
    "difficulty": ["hard"],
    "rho": [0.0, 1.5, math.nan],
    "law": ["pid"],
    "eta": [-0.1, math.inf],
    "gain": [-0.1, math.nan],
    "normalize": [None, 1],
    "gate_above_target": ["no", 1],
    "alpha_init": [-0.1, 0.3],
    "alpha_min": [0.1],
    "alpha_max": [-0.1],
}


@pytest.mark.parametrize(("name", "value"), [(k, v) for k, vs in BAD_SETTINGS.items() for v in vs])
def test_settings_are_checked(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        AdaptiveEntropy(**{name: value})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((math.nan,), "entropy must be finite, got nan"),
        ((math.inf,), "entropy must be finite, got inf"),
        ((0.0,), "positive to anchor"),
        ((torch.ones(2),), "entropy must be one number"),
        (("1",), "entropy must be a number"),
        ((True,), "entropy must be a number"),
        ((1.0, -1.0), "count must be"),
        ((1.0, math.nan), "count must be"),
        ((1.0, 1.0, None, math.nan), "weight must be finite, got nan"),
        ((1.0, 1.0, None, "1"), "weight must be a number"),
        ((1.0, 1.0, None, 0.5, -1), "prompts must be a finite number >= 0"),
    ],
)
def test_bad_updates_change_nothing(arguments: tuple[Any, ...], message: str) -> None:
    aer = AdaptiveEntropy(alpha_init=0.1)
    before = aer.state_dict()
    with pytest.raises(ValueError, match=message):
        aer.update(*arguments[:3], **dict(zip(("weight", "prompts"), arguments[3:])))
    assert aer.state_dict() == before


def test_weights_are_divided_by_their_mean() -> None:
    accuracy = torch.tensor([0.0, 0.25, 0.5, 1.0])  # weights 1, 1/2, 0, 0
    for normalize, expected in ((True, [0.2, 0.1, 0.0, 0.0]), (False, [0.1, 0.05, 0.0, 0.0])):
        aer = AdaptiveEntropy(law="fixed", alpha_init=0.1, normalize=normalize)
        assert aer.coefficient(accuracy).tolist() == pytest.approx([0.1, 0.05, 0.0, 0.0])  # not told yet
        aer.update(1.0, weight=torch.tensor(0.5), prompts=4)
        assert aer.coefficient(accuracy).tolist() == pytest.approx(expected)
        aer.update(1.0)  # what was told stays
        assert aer.coefficient(accuracy).tolist() == pytest.approx(expected)
        other = AdaptiveEntropy(law="fixed", alpha_init=0.1, normalize=normalize)
        other.load_state_dict(json.loads(json.dumps(aer.state_dict())))
        assert other.coefficient(accuracy).tolist() == pytest.approx(expected)
    for mean in (0.0, 0.01, 0.1):  # a few hard prompts get no more than ten times α
        aer = AdaptiveEntropy(law="fixed", alpha_init=0.1)
        aer.update(1.0, weight=mean)
        assert aer.coefficient(accuracy).tolist() == pytest.approx([1.0, 0.5, 0.0, 0.0])
    aer.update(1.0, weight=0.5, prompts=0)  # nobody was asked
    assert aer.state_dict()["mean_weight"] == 0.1


def test_the_integral_waits_for_the_target_and_does_not_wind_up() -> None:
    settings: dict[str, Any] = {"target": 1.0, "gain": 0.1, "eta": 0.05, "alpha_init": 0.02}
    aer = AdaptiveEntropy(**settings, alpha_min=-0.1)
    for _ in range(50):  # never met: α neither falls below 0 nor remembers
        aer.update(2.0)
        assert aer.alpha == 0.0
    aer.update(1.0)
    assert aer.alpha == pytest.approx(0.02)
    for _ in range(50):
        aer.update(3.0)
    assert aer.alpha == -0.1
    steps = 0
    while aer.alpha < 0.0 and steps < 50:
        aer.update(0.5)
        steps += 1
    assert steps == 5  # from -0.15 by 0.025 a step, and 0.05 from the error itself
    for _ in range(50):
        aer.update(0.01)
    assert aer.alpha == 0.2
    aer.update(2.0)
    assert aer.alpha == pytest.approx(0.2 - 0.05 - 0.1)


@pytest.mark.parametrize("accuracy", [-0.1, 1.1, math.nan, torch.tensor([0.5, 2.0]), None])
def test_accuracy_is_checked(accuracy: Any) -> None:
    with pytest.raises(ValueError, match="accuracy must be"):
        AdaptiveEntropy().weight(accuracy)


BAD_STATES: list[Any] = [
    {},
    None,
    {"alpha": math.nan},
    {"alpha": 0.1, "beta": 1.0},
    {"alpha": "0.1"},
    {"alpha": 99.0},
    {"alpha": 0.1, "target": -1.0},
    {"alpha": 0.1, "target": 0.6},
]


def test_a_state_does_not_take_an_absolute_target_away() -> None:
    aer = AdaptiveEntropy(target=0.5)
    aer.load_state_dict(AdaptiveEntropy().state_dict())
    assert aer.target == 0.5


@pytest.mark.parametrize("state", BAD_STATES)
def test_bad_states_change_nothing(state: Any) -> None:
    aer = AdaptiveEntropy(alpha_init=0.1, target=0.5)
    before = aer.state_dict()
    with pytest.raises(ValueError, match="state"):
        aer.load_state_dict(state)
    assert aer.state_dict() == before


def test_two_processes_see_the_mean_over_all_tokens(tmp_path: Path) -> None:
    spawn(two_ranks, args=(str(tmp_path),), nprocs=2)
    states = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert states[0] == states[1]

    alone = AdaptiveEntropy(eta=0.1, alpha_max=1.0)
    for entropy in ((1.0 * 30 + 2.0 * 10) / 40, 0.3, 0.2):
        alone.update(entropy)
    final, expected = states[0].pop("final"), alone.state_dict()
    assert final.pop("law") == pytest.approx(expected.pop("law"), rel=1e-12)
    assert final.pop("mean_weight") == 0.4375  # (1 · 0.25 + 3 · 0.5) / 4
    assert final == pytest.approx(expected, rel=1e-12)
    assert states[0] == {"raised": [True] * 4, "unchanged": True}


def two_ranks(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        group = dist.group.WORLD
        aer = AdaptiveEntropy(eta=0.1, alpha_max=1.0)
        aer.update((1.0, 2.0)[rank], (30, 10)[rank], group, weight=(0.25, 0.5)[rank], prompts=(1, 3)[rank])
        aer.update((0.3, math.nan)[rank], (5, 0)[rank], group)  # rank 1 has no token
        aer.update(math.nan, 0, group)  # nobody has
        aer.update(torch.tensor(0.2, dtype=torch.float64), torch.tensor(4), group, weight=math.nan, prompts=0)
        before, raised = aer.state_dict(), list[bool]()
        faults: list[tuple[Any, Any]] = [(math.nan, 1.0), (1.0, -1.0), ("1", 1.0), (torch.ones(2), 1.0)]
        for entropy, count in faults:
            with suppress(ValueError):  # only rank 1 is at fault
                aer.update(entropy if rank else 1.0, count if rank else 1.0, group)
                continue
            raised.append(True)
        state = {"final": before, "raised": raised, "unchanged": aer.state_dict() == before}
        Path(folder, f"rank{rank}.json").write_text(json.dumps(state))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def test_a_law_of_ours_may_go_as_far_as_it_likes_before_it_is_clipped() -> None:
    aer = AdaptiveEntropy(target=1.0, eta=1.0, alpha_init=0.1)
    aer.update(1e39)
    assert aer.alpha == 0.0
