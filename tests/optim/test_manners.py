"""The manners of torch's optimizers, for every registered method: what torch does without an error is done or refused.

`test_optim.py` of torch is the model, torch's AdamW is among the optimizers as control, and a new method is held to all
of it without a line here. State is in test_saving.py, what does not fit in test_guard.py.
"""

import copy

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from tests.tools.manners import Net, every_method, every_own, give_gradients, same, through_a_file, train, trained
from thriftlab.optim import Frugal
from thriftlab.optim.core.hyper import hyperparameters


@every_method
def test_torchs_switches_may_be_off_and_are_refused_when_on(kind):
    method, hyper = kind
    off = dict.fromkeys(("foreach", "fused"), None) | dict.fromkeys(("capturable", "differentiable", "amsgrad"), False)
    model = Net()
    optimizer = method([{"params": model.parameters(), "foreach": False}], **hyper, **off)
    train(model, optimizer, range(2))
    if method is not torch.optim.AdamW:
        for switch in off:
            with pytest.raises(ValueError, match=f"{switch}=True is not supported"):
                method(Net().parameters(), **hyper, **{switch: True})
            with pytest.raises(ValueError, match=f"{switch}=True is not supported"):
                optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], switch: True})


@every_method
def test_groups_are_given_in_every_way_that_torch_knows(kind):
    method, hyper = kind
    first, second = Net(), Net()
    both = method([{"params": net.named_parameters()} for net in (first, second)], **hyper)  # with equal names
    assert [group["param_names"] for group in both.param_groups] == [["a", "b", "bias", "scalar"]] * 2
    reference, single = trained(kind, 0)
    for step in range(6):
        for net in (first, second, reference):
            give_gradients(net.parameters(), step)
        both.step()
        single.step()
    assert same(first, reference)
    again = method([{"params": net.named_parameters()} for net in (Net(), Net())], **hyper)
    again.load_state_dict(through_a_file(both.state_dict()))

    named = method([{"params": [p], "param_names": [name]} for name, p in Net().named_parameters()], **hyper)
    assert [group["param_names"] for group in named.param_groups] == [["a"], ["b"], ["bias"], ["scalar"]]
    p, q = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(2, 3))
    for params in ([("w", p), q], [q, ("w", p)], [{"params": [("w", p), q]}]):
        with pytest.raises(ValueError, match="pairs for all of them|names|Tensors"):
            method(params, **hyper)


@every_own
@pytest.mark.parametrize("weight_decay", [0.1, 0.3, 1.0])
def test_weight_decay_is_decoupled(kind, weight_decay):
    """AdamW's (1711.05101): without a gradient a step multiplies by 1 - rate * decay, by the rate of that step. BAdam
    leaves matrices that are not active as they are."""
    method, hyper = kind
    net = Net()
    optimizer = method(net.parameters(), **{**hyper, "lr": 0.5, "weight_decay": weight_decay})
    schedule = lr_scheduler.LambdaLR(optimizer, lambda step: (0.2, 0.1)[min(step, 1)])
    before = [p.detach().clone() for p in net.parameters()]
    if method.__name__ == "SOAP":  # whose first step finds bases and moves nothing
        give_gradients(net.parameters(), 0)
        optimizer.step()
        assert all(torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))
    for _ in range(2):
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        schedule.step()
    factor = (1 - 0.1 * weight_decay) * (1 - 0.05 * weight_decay)
    left = [n for n, (p, old) in enumerate(zip(net.parameters(), before, strict=True)) if torch.equal(p, old)]
    assert not left or method.__name__ == "BAdam" and len(left) < len(before)
    for n, (p, old) in enumerate(zip(net.parameters(), before, strict=True)):
        torch.testing.assert_close(p, old if n in left else old * factor)


@every_own
def test_hyper_parameters_are_checked_whatever_the_signature(kind):
    method, hyper = kind

    class Mine(method):
        def __init__(self, params, **kw):
            super().__init__(params, **kw)

    p = nn.Parameter(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="Mine: lr=-1"):
        Mine([p], **{**hyper, "lr": -1})
    with pytest.raises(ValueError, match="weight_decay=-1"):
        Mine([{"params": [p], "weight_decay": -1}], **hyper)
    for kind in (method, Mine):
        with pytest.raises(ValueError, match=r"lr is a tensor of shape \(2,\)"):
            kind([p], **{**hyper, "lr": torch.tensor([0.1, 0.2])})


@every_own
def test_numbers_may_be_tensors_that_are_filled_later(kind):
    method, hyper = kind
    plain, tensors = Net(), Net()
    betas = {"betas": (0.5, 0.75)} if "betas" in hyperparameters(method) else {}
    held = {key: tuple(map(torch.tensor, pair)) for key, pair in betas.items()}
    rate = torch.tensor([0.5])
    a, b = (
        method(plain.parameters(), **{**hyper, **betas}),
        method(tensors.parameters(), **{**hyper, "lr": rate, **held}),
    )
    for beta in held.get("betas", ()):
        beta.fill_(0.25)
    a.param_groups[0].update({key: (0.25, 0.25) for key in betas}, lr=0.03125)
    rate.fill_(0.03125)
    train(plain, a, range(5))
    train(tensors, b, range(5))
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(plain.parameters(), tensors.parameters(), strict=True))


SCHEDULES = {
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3, base_momentum=0.5, max_momentum=0.75),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=9, base_momentum=0.5, max_momentum=0.75),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "chained": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.CosineAnnealingLR(o, 5)], milestones=[2]
    ),
}


@every_method
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedulers_find_what_they_move(kind, schedule):
    method, hyper = kind
    model, optimizer = trained(kind, 0)
    group, seen = optimizer.param_groups[0], []
    if schedule in ("cyclic", "one cycle") and not {"betas", "momentum"} & group.keys():
        with pytest.raises(ValueError, match="momentum"):  # as for torch's own
            SCHEDULES[schedule](optimizer)
        return
    scheduler = SCHEDULES[schedule](optimizer)
    for step in range(8):
        train(model, optimizer, [step])
        scheduler.step(*([1.0] if schedule == "plateau" else []))
        seen.append((group["lr"], group["momentum"] if "momentum" in group else group.get("betas")))
    assert len({lr for lr, _ in seen}) > 1
    if schedule in ("cyclic", "one cycle"):
        momenta = [told[0] if isinstance(told, tuple) else told for _, told in seen]
        assert len(set(momenta)) > 2 and all(0.5 <= momentum <= 0.75 for momentum in momenta)


@every_method
def test_a_step_without_gradients_does_nothing_and_leaves_nothing(kind):
    model, optimizer = trained(kind, 0)
    optimizer.step()
    assert same(model, Net()) and not optimizer.state
    assert optimizer.step(lambda: 3.0) == 3.0
    model.a.requires_grad_(False)
    give_gradients([model.b], 0)
    optimizer.step()
    optimizer.step()  # SOAP's first one moves nothing
    assert torch.equal(model.a, Net().a) and not torch.equal(model.b, Net().b)
    assert all(optimizer.state.values()) and set(optimizer.state) <= {model.b}
    optimizer.zero_grad(set_to_none=False)
    assert not model.b.grad.any()
    optimizer.zero_grad()
    assert model.b.grad is None
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.step()
    assert seen == ["before", "after"] and repr(optimizer)


@every_method
def test_empty_groups_and_empty_tensors(kind):
    method, hyper = kind
    with pytest.raises(ValueError, match="empty parameter list"):
        method([], **hyper)
    model = Net()
    empty = nn.Parameter(torch.zeros(0, 3))
    optimizer = method([{"params": []}, {"params": [*model.parameters(), empty]}], **hyper)
    give_gradients([*model.parameters(), empty], 0)
    optimizer.step()
    optimizer.add_param_group({"params": nn.Parameter(torch.zeros(2)), "lr": 0.5})
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))


def test_an_order_is_not_asked_about_groups_without_a_matrix():
    model = Net()
    groups = [{"params": [model.a], "names": ["a"]}, {"params": [model.bias], "names": ["bias"]}]
    optimizer = Frugal(
        [*groups, {"params": [model.b], "names": ["b"], "split": False}], order=lambda names, count: ["a"]
    )
    train(model, optimizer, range(3))


def test_an_order_may_choose_only_what_its_group_has():
    """A name that is in no group would otherwise be a block that never trains, and nobody told."""
    model = Net()
    groups = [{"params": [model.a], "names": ["a"]}, {"params": [model.b], "names": ["b"]}]
    with pytest.raises(ValueError, match=r"order chose \['a'\], .* among those that it is given"):
        Frugal(groups, order=lambda names, count: ["a"])
    Frugal(groups, order=lambda names, count: [name for name in names if name == "a"])


@every_method
def test_hooks_of_all_optimizers_come_first_and_last_and_may_change_the_arguments(kind):
    _, optimizer = trained(kind, 0)
    seen: list[str] = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("all, before")),
        register_optimizer_step_post_hook(lambda *_: seen.append("all, after")),
        optimizer.register_step_pre_hook(lambda *_: seen.append("one, before")),
        optimizer.register_step_post_hook(lambda *_: seen.append("one, after")),
        optimizer.register_step_pre_hook(lambda self, args, kwargs: ((self, lambda: 4.0), {})),
    ]
    try:
        assert optimizer.step(closure=lambda: 3.0) == 4.0
    finally:
        for handle in handles:
            handle.remove()
    assert seen == ["all, before", "one, before", "one, after", "all, after"]
    assert optimizer.step(lambda: 3.0) == 3.0 and len(seen) == 4


@every_own
def test_a_file_may_lack_any_key_of_a_group(kind):
    """As files of older versions do: what is missing is the optimizer's own."""
    model, optimizer = trained(kind)
    for key in optimizer.param_groups[0].keys() - {"params"}:
        saved = copy.deepcopy(optimizer.state_dict())
        del saved["param_groups"][0][key]
        other, fresh = trained(kind, 0)
        other.load_state_dict(model.state_dict())
        told = repr(saved)
        fresh.load_state_dict(saved)
        assert repr(saved) == told, "loading changes nothing in what is loaded"
        kept = copy.deepcopy((model, optimizer))
        train(*kept, range(4, 6))
        train(other, fresh, range(4, 6))
        assert same(other, kept[0]), key


@every_own
def test_what_is_no_list_of_parameters_or_no_number_is_a_type_or_value_error(kind):
    method, hyper = kind
    tensor, no_leaf = nn.Parameter(torch.zeros(2)), torch.zeros(2, requires_grad=True) * 2
    lists = [None, "abc", ["x"], [{}], [{"params": ["x"]}], [[tensor]], tensor, {tensor}, [no_leaf], iter([]),
             {"a": tensor}]  # fmt: skip
    for params in lists:
        with pytest.raises((TypeError, ValueError, KeyError)):
            method(params, **hyper)
    for wrong in ({"lr": torch.nan}, {"lr": None}, {"nonsense": 1}):
        with pytest.raises((TypeError, ValueError), match="lr|nonsense"):
            method([tensor], **{**hyper, **wrong})
    optimizer = method([nn.Parameter(torch.zeros(2))], **hyper)
    for group in ([tensor], {}, {"params": None}, {"params": ["x"]}, {"params": {tensor}}, {"params": [no_leaf]}):
        with pytest.raises((TypeError, ValueError, KeyError)):
            optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1


@every_method
def test_defaults_are_those_of_groups_that_come_later(kind):
    method, hyper = kind
    optimizer = method([{"params": [nn.Parameter(torch.ones(2))], "lr": 0.3, "mine": [1]}], **hyper)
    assert optimizer.defaults["lr"] == hyper["lr"] and optimizer.param_groups[0]["lr"] == 0.3
    for rate in (hyper["lr"], 0.7):
        optimizer.defaults["lr"] = rate
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
        assert optimizer.param_groups[-1]["lr"] == rate
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    assert optimizer.param_groups[0]["mine"] == [1]


@every_method
def test_shapes_dtypes_and_layouts_of_every_kind(kind):
    method, hyper = kind
    shapes = [(0,), (0, 3), (3, 0), (), (1,), (1, 1), (2, 0, 3), (1, 7), (7, 1), (4, 3, 2, 2)]
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
    params = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes for dtype in dtypes]
    params.append(nn.Parameter(torch.ones(4, 3, 2, 2).to(memory_format=torch.channels_last)))
    params.append(nn.Parameter(torch.ones(8, 12)[::2, ::3]))
    optimizer = method(params, **hyper)
    for step in range(4):
        give_gradients(params, step)
        optimizer.step()
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    optimizer.step()
    assert all(p.isfinite().all() for p in params)


@every_method
def test_a_scheduler_is_resumed_and_a_scaled_gradient_of_infinity_is_passed_over(kind):
    method, hyper = kind
    model, optimizer = trained(kind, 2)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    scheduler.step()
    other = method(model.named_parameters(), **hyper)
    with pytest.raises(KeyError, match="initial_lr"):
        lr_scheduler.ExponentialLR(other, 0.5, last_epoch=1)
    other.load_state_dict(optimizer.state_dict())
    again = lr_scheduler.ExponentialLR(other, 0.5, last_epoch=1)
    again.load_state_dict(scheduler.state_dict())
    for at in (scheduler, again):
        at.step()
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == hyper["lr"] / 4

    scaler, before = torch.amp.GradScaler("cpu", init_scale=4.0), [p.detach().clone() for p in model.parameters()]
    for wrong in (torch.inf, 1.0):
        give_gradients(model.parameters(), 3)
        model.a.grad *= wrong
        scaler.scale(torch.ones(()))
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        moved = any(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
        assert moved == (wrong == 1.0)
