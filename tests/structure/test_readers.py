"""Which modules read one tensor, and what each was given."""

from __future__ import annotations

import torch
from torch import nn

from cur_modifier.structure.readers import LastRead, called_once, first_tensor, recorded


class Block(nn.Module):
    """``q`` and ``k`` read one tensor; ``twice`` runs two times, ``named`` takes a keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.twice = (nn.Linear(3, 3) for _ in range(3))
        self.named, self.never = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.twice(self.twice(self.q(x) + self.k(x))) + self.named(input=x)


NAMES = ["named", "never", "twice", "k", "q"]


def test_the_last_tensor_is_told_from_an_equal_one() -> None:
    last, x = LastRead(), torch.ones(2)
    assert [last.is_again(t) for t in (x, x, x.clone(), x)] == [False, True, False, False]
    last.forget()
    assert not last.is_again(x)


def test_a_tensor_that_is_held_leaves_its_id_to_no_other() -> None:
    last = LastRead()
    assert not any(last.is_again(torch.ones(2)) for _ in range(20))


def test_calls_come_in_the_order_of_execution() -> None:
    model, x = Block(), torch.randn(2, 3)
    with recorded(model, NAMES) as calls:
        model(x)
    assert list(calls) == ["q", "k", "twice", "named"]
    assert calls["q"][0].tensor == calls["k"][0].tensor == id(x)
    torch.testing.assert_close(calls["q"][0].output, model.q(x))
    assert calls["named"][0].args == () and calls["named"][0].kwargs["input"] is x


def test_only_modules_that_ran_once_on_a_first_argument_are_called_once() -> None:
    model = Block()
    with recorded(model, NAMES) as calls:
        model(torch.randn(2, 3))
    assert [len(calls[name]) for name in ("q", "twice")] == [1, 2]
    assert list(called_once(calls)) == ["q", "k"]


def test_nothing_is_recorded_outside() -> None:
    model = Block()
    with recorded(model, NAMES) as calls:
        pass
    model(torch.randn(2, 3))
    assert calls == {} and not any(m._forward_hooks for m in model.modules())


def test_the_tensor_that_is_handed_on() -> None:
    x, loss = torch.ones(2), torch.zeros(())
    for answer in (x, (x, loss), {"loss": loss, "logits": x}, {"logits": x, "hidden_states": None}):
        assert first_tensor(answer) is x
    assert first_tensor({"loss": loss}) is None and first_tensor("else") == "else"
