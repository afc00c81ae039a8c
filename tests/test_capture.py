"""ActivationTap on plain modules: the values and gradients are the module's own, and nothing is left behind."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gracekit.capture import ActivationTap


class Blocks(nn.Module):
    """Three residual blocks; ``wrap`` says what each returns around its tensor, ``reentrant`` how to checkpoint them."""

    def __init__(self, wrap=lambda hidden: hidden, reentrant=None):
        super().__init__()
        self.blocks = nn.ModuleList(Block(wrap) for _ in range(3))
        self.reentrant = reentrant

    def forward(self, x):
        self.hidden = []
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
            x = x if isinstance(x, torch.Tensor) else next(iter(x.values())) if isinstance(x, dict) else x[0]
            self.hidden.append(x)
        return x


class Block(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.linear, self.wrap = nn.Linear(4, 4), wrap

    def forward(self, x):
        return self.wrap(x + torch.tanh(self.linear(x)))


def hook_count(model):
    return sum(
        len(hooks)
        for module in model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    )


def test_the_tap_returns_the_very_tensor_of_the_module():
    model = Blocks()
    with ActivationTap(model, "blocks.1") as tap:
        model(torch.randn(2, 4))
        assert tap.pop() is model.hidden[1]


def test_the_empty_path_taps_the_model_itself():
    model = Blocks()
    with ActivationTap(model, "") as tap:
        out = model(torch.randn(2, 4))
        assert tap.pop() is out


@pytest.mark.parametrize(
    "wrap",
    [lambda h: (h, "more"), lambda h: [h], lambda h: {"first": h, "second": h + 1}],
    ids=["tuple", "list", "dict"],
)
def test_a_container_gives_its_first_tensor(wrap):
    model = Blocks(wrap)
    with ActivationTap(model, "blocks.0") as tap:
        model(torch.randn(2, 4))
        assert tap.pop() is model.hidden[0]


def test_an_output_without_a_tensor_is_a_type_error():
    model = nn.Sequential(nn.Identity())
    with ActivationTap(model, "0") as tap:
        model("no tensor")
        with pytest.raises(TypeError, match="module '0' must return a tensor or start with one, got str"):
            tap.pop()


def test_of_several_forwards_the_latest_is_popped_and_only_once():
    model = Blocks()
    with ActivationTap(model, "blocks.1") as tap:
        model(torch.randn(2, 4))
        model(torch.randn(3, 4))
        assert tap.pop().shape == (3, 4)
        with pytest.raises(RuntimeError, match=r"no call of module 'blocks\.1' was seen"):
            tap.pop()
        model(torch.randn(5, 4))
        assert tap.pop().shape == (5, 4)


def test_a_value_may_be_popped_after_the_block_but_later_forwards_are_not_seen():
    model = Blocks()
    with ActivationTap(model, "blocks.1") as tap:
        model(torch.randn(2, 4))
    assert tap.pop().shape == (2, 4)
    model(torch.randn(2, 4))
    with pytest.raises(RuntimeError, match="no call of module"):
        tap.pop()


def test_entering_again_forgets_what_was_seen_before():
    model = Blocks()
    tap = ActivationTap(model, "blocks.1")
    with tap:
        model(torch.randn(2, 4))
    with tap, pytest.raises(RuntimeError, match="no call of module"):
        tap.pop()


def test_hooks_are_released_when_the_block_raises():
    model = Blocks()
    before = hook_count(model)
    tap = ActivationTap(model, "blocks.1")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), tap:
        model(torch.randn(2, 5))
    assert hook_count(model) == before
    with tap:
        assert hook_count(model) == before + 1


def test_a_tap_cannot_be_entered_twice_at_once():
    tap = ActivationTap(Blocks(), "blocks.1")
    with tap, pytest.raises(RuntimeError, match="already entered"):
        tap.__enter__()


def gradients(model, x, tapped):
    model.zero_grad()
    with ActivationTap(model, "blocks.1") as tap:
        out = model(x)
        hidden = tap.pop() if tapped else model.hidden[1]
        (out.sum() + hidden.square().sum()).backward()
        if tapped:
            with pytest.raises(RuntimeError, match="no call of module"):
                tap.pop()
    return [parameter.grad.clone() for parameter in model.parameters()]


def test_gradients_through_the_tap_are_those_of_the_models_own_tensor():
    model, x = Blocks(), torch.randn(2, 4, requires_grad=True)
    for got, expected in zip(gradients(model, x, True), gradients(model, x, False), strict=True):
        assert torch.equal(got, expected)


def test_a_checkpointed_replay_is_not_captured():
    """Re-entrant checkpointing runs the whole block again in the backward pass, its hooks included."""
    model, calls = Blocks(reentrant=True), []
    model.blocks[1].register_forward_hook(lambda *_: calls.append(1))
    with ActivationTap(model, "blocks.1") as tap:
        out = model(torch.randn(2, 4, requires_grad=True))
        tap.pop()
        out.sum().backward()
        assert len(calls) == 2
        with pytest.raises(RuntimeError, match="no call of module"):
            tap.pop()


def test_gradients_stay_right_under_checkpointing():
    plain = Blocks()
    replayed = Blocks(reentrant=False)
    replayed.load_state_dict(plain.state_dict())
    x = torch.randn(2, 4, requires_grad=True)
    for got, expected in zip(gradients(replayed, x, True), gradients(plain, x, False), strict=True):
        assert torch.equal(got, expected)


def test_a_model_compiled_inside_the_tap_is_seen():
    model, x = Blocks(), torch.randn(2, 4)
    with ActivationTap(model, "blocks.1") as tap:
        torch.compile(model, backend="aot_eager")(x)
        captured = tap.pop()
    model(x)
    torch.testing.assert_close(captured, model.hidden[1])
    torch.compiler.reset()


def test_an_unknown_path_is_named_with_close_matches():
    with pytest.raises(
        ValueError, match=r"path must name a module of Blocks, got path='block\.1'; close matches: 'blocks"
    ):
        ActivationTap(Blocks(), "block.1")
    with pytest.raises(ValueError, match="got path='zzz'; the model has 7 modules"):
        ActivationTap(Blocks(), "zzz")


def test_arguments_of_the_wrong_type_are_type_errors():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn.Module, got function"):
        ActivationTap(lambda x: x, "blocks.1")
    with pytest.raises(TypeError, match="path must be a string, got path=1"):
        ActivationTap(Blocks(), 1)


def test_repr_names_the_module_and_its_path():
    assert repr(ActivationTap(Blocks(), "blocks.1")) == "ActivationTap(Block, 'blocks.1')"
