"""The manners of torch's optimizers, for every registered method: what torch does without an error is done or refused.

`test_optim.py` of torch is the model. A new method is held to all of it without a line here: `KINDS` are the methods
with each subspace and each way to keep moments that they declare. torch's AdamW is among the optimizers, as control.
"""

import copy
import io
import pickle
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler

from thriftlab.optim import METHODS, Frugal
from thriftlab.optim.core.hyper import hyperparameters, textual

SMALL = {"lr": 0.01, "rank": 2, "gap": 3, "density": 0.5}
TORCH = {"torch": torch.optim.AdamW}


def choices(method: type, key: str) -> list[dict[str, Any]]:
    """One setting for each word that a hyper-parameter may be, as it is declared; none where it is not."""
    declared = hyperparameters(method).get(key)
    if declared is None:
        return [{}]
    kinds = [textual(get_args(declared.annotation)[0])]
    words = [word for kind in kinds for word in get_args(kind)]
    words = [leaf for word in words for leaf in (get_args(word) or [word])]
    return [{key: word} for word in words if isinstance(word, str)] or [{}]


def small(method: type) -> dict[str, Any]:
    """Settings by which a small matrix is split too."""
    return {key: value for key, value in SMALL.items() if key in hyperparameters(method) or method in TORCH.values()}


def kinds() -> dict[str, tuple[type, dict[str, Any]]]:
    """Each method with each subspace, and with each way to keep moments."""
    found = {}
    for name, method in METHODS.items():
        for setting in (*choices(method, "subspace"), *choices(method, "state_dtype")):
            found["-".join([name, *setting.values()])] = (method, {**small(method), **setting})
    return found


KINDS = kinds()
PLAIN = {name: (method, small(method) if method in METHODS.values() else {"lr": 0.01}) for name, method in
         {**TORCH, **METHODS}.items()}  # fmt: skip
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
every_method = pytest.mark.parametrize("kind", PLAIN.values(), ids=PLAIN.keys())
OURS = {name: kind for name, kind in PLAIN.items() if name in METHODS}
every_own = pytest.mark.parametrize("kind", OURS.values(), ids=OURS.keys())


class Net(nn.Module):
    def __init__(self, rows: int = 8, columns: int = 6, dtype: torch.dtype = torch.float32):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.a = nn.Parameter(torch.randn(rows, columns, generator=draw).to(dtype))
        self.b = nn.Parameter(torch.randn(columns, rows, generator=draw).to(dtype))
        self.bias = nn.Parameter(torch.randn(rows, generator=draw).to(dtype))
        self.scalar = nn.Parameter(torch.randn((), generator=draw).to(dtype))


def give_gradients(params: Any, step: int) -> None:
    draw = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=draw).to(p.dtype)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        give_gradients(net.parameters(), step)
        optimizer.step()


def trained(kind, steps: int = 4, **net: Any) -> tuple[Net, torch.optim.Optimizer]:
    method, hyper = kind
    model = Net(**net)
    optimizer = method(model.named_parameters(), **hyper)
    train(model, optimizer, range(steps))
    return model, optimizer


def weights(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def has_shape(state: dict[str, Any]) -> bool:
    return any(isinstance(value, torch.Tensor) and value.ndim for value in state.values())


# ---------------------------------------------------------------------------------------------- what does not fit


@every_kind
def test_a_state_of_another_shape_is_refused_at_the_load_and_at_the_step(kind):
    model, optimizer = trained(kind)
    saved = optimizer.state_dict()
    for rows, columns in ((12, 6), (8, 9), (5, 6), (8, 4)):
        other, fresh = trained(kind, 0, rows=rows, columns=columns)
        before = weights(other)
        if not any(map(has_shape, optimizer.state.values())):
            fresh.load_state_dict(saved)  # there is nothing that could have a shape
            continue
        with pytest.raises(ValueError, match=rf"^(a|b|bias): .*(\({rows}, {columns}\)|{columns}, {rows}|{rows},)"):
            fresh.load_state_dict(saved)
        assert not fresh.state
        for name, p in other.named_parameters():
            kept = copy.deepcopy(optimizer.state.get(getattr(model, name), {}))
            unlike = has_shape(kept) and p.shape != getattr(model, name).shape
            if unlike and not any(key.startswith("basis.") for key in kept):  # a basis may be of another density
                fresh.state[p] = kept
                give_gradients([p], 0)
                with pytest.raises(ValueError, match=rf"^{name}: .*\({p.shape[0]}, ?{(*p.shape, '')[1]}\)"):
                    fresh.step()
                p.grad = None
        assert all(torch.equal(p, before[name]) for name, p in other.named_parameters())


@every_kind
def test_a_weight_that_is_replaced_is_refused_with_both_shapes(kind):
    for shape in ((40, 6), (8, 48), (3, 6)):
        model, optimizer = trained(kind)
        model.a.data = torch.zeros(shape)
        with pytest.raises(ValueError, match=rf"^a: .*\({shape[0]}, {shape[1]}\).*\(8, 6\)"):
            optimizer.step()  # on the gradient of the old one
        give_gradients(model.parameters(), 4)
        if has_shape(optimizer.state.get(model.a, {})):
            with pytest.raises(ValueError, match=rf"^a: .*\({shape[0]}, {shape[1]}\)"):
                optimizer.step()
            assert not model.a.any()
            optimizer.state[model.a].clear()
        optimizer.step()
        assert model.a.isfinite().all()


@every_own
def test_a_state_is_replaced_by_one_of_the_new_shape_as_in_loops_that_grow_a_model(kind):
    model, optimizer = trained(kind)
    grown = nn.Parameter(torch.zeros(16))
    state = optimizer.state.pop(model.bias, {})
    for key, value in state.items():
        if value.ndim:
            state[key] = torch.cat([value, torch.zeros_like(value)])
    optimizer.state[grown] = state
    group = optimizer.param_groups[0]
    group["params"][group["names"].index("bias")] = grown
    grown.grad = torch.ones(16)
    optimizer.step()
    assert grown.all()


@every_own
def test_odd_gradients_and_states_are_refused_by_name(kind):
    model, optimizer = trained(kind)
    for key in ("exp_avg", "momentum_buffer"):
        for name, p in model.named_parameters():
            if key in optimizer.state.get(p, {}) and p.ndim and optimizer.state[p][key].shape == p.shape:
                kept = optimizer.state[p][key]
                optimizer.state[p][key] = torch.zeros(()).expand(p.shape)
                optimizer.fit.clear()
                with pytest.raises(ValueError, match=f"^{name}: the state '{key}' .*shares memory"):
                    optimizer.step()
                optimizer.state[p][key] = torch.zeros_like(kept, device="meta")
                with pytest.raises(ValueError, match=f"^{name}: the state '{key}' .* on meta, .* on cpu"):
                    optimizer.step()
                optimizer.state[p][key] = kept
    model.a.grad = model.a.grad.to_sparse()
    with pytest.raises(TypeError, match="^a: .*sparse=False"):
        optimizer.step()
    names, (params, grads) = ["a"], ([model.a.detach()], [torch.zeros(6)])  # a call of `update` by anybody
    with pytest.raises(ValueError, match=r"^a: .*\(8, 6\).*\(6,\)"):
        optimizer.update(names, params, grads, [optimizer.state[model.a]], optimizer.param_groups[0])


# -------------------------------------------------------------------------------------------------- kinds of numbers


@every_kind
def test_weights_may_get_another_dtype(kind):
    """After a step, and by loading the state of fp32 weights: it is kept as `state_dtype` says for the new ones."""
    method, hyper = kind
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        model, optimizer = trained(kind)
        loaded, fresh = trained(kind, 0, dtype=dtype)
        fresh.load_state_dict(optimizer.state_dict())
        model.to(dtype)
        train(model, optimizer, range(4, 9))  # through a refresh
        train(loaded, fresh, range(4, 9))
        for net, at in ((model, optimizer), (loaded, fresh)):
            for group in at.param_groups:
                for name, p in zip(group["names"], group["params"], strict=True):
                    spec = at.expected_spec(name, p, group)
                    assert p.isfinite().all()
                    for key, value in at.state.get(p, {}).items():
                        if value.ndim and key in spec:
                            assert (tuple(value.shape), value.dtype) == spec[key], (name, key)
        assert dtype != torch.float64 or same_state(optimizer, trained(kind, 9)[1]), "fp64 goes on where fp32 was"


def same_state(optimizer: torch.optim.Optimizer, other: torch.optim.Optimizer) -> bool:
    pairs = zip(optimizer.state.values(), other.state.values(), strict=True)
    return all(a.keys() == b.keys() for a, b in pairs)


@every_own
def test_complex_parameters_are_refused_by_name_when_the_group_is_added(kind):
    method, hyper = kind
    p, real = (nn.Parameter(torch.zeros(3, 2, dtype=dtype)) for dtype in (torch.complex64, torch.float32))
    with pytest.raises(ValueError, match="^w is complex.*view_as_real"):
        method([("w", p)], **hyper)
    optimizer = method([("w", real)], **hyper)
    with pytest.raises(ValueError, match="^1 is complex"):
        optimizer.add_param_group({"params": [p]})
    real.data, real.grad = p.data, None
    real.grad = torch.ones_like(real)
    with pytest.raises(ValueError, match="^w is complex"):
        optimizer.step()


@every_kind
@pytest.mark.parametrize("size", [1e19, 1e20, 1e30])
def test_weights_stay_finite_where_gradients_are_huge(kind, size):
    for calm in (0, 3):
        model, optimizer = trained(kind, calm)
        for step in range(calm, 9):
            give_gradients(model.parameters(), step)
            for p in model.parameters():
                p.grad *= size if step < 7 else 1
            optimizer.step()
        assert all(p.isfinite().all() for p in model.parameters())


# --------------------------------------------------------------------------------------------------- saving, loading


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


@every_method
def test_a_copy_a_pickle_and_a_load_go_on_as_the_original(kind):
    model, optimizer = trained(kind)
    copied = copy.deepcopy((model, optimizer))
    pickled = pickle.loads(pickle.dumps((model, optimizer)))
    loaded, fresh = trained(kind, 0)
    loaded.load_state_dict(model.state_dict())
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    for net, at in ((model, optimizer), copied, pickled, (loaded, fresh)):
        train(net, at, range(4, 8))
        assert same(net, model)


@every_method
def test_hooks_of_saving_and_loading_have_the_last_and_the_first_word(kind):
    model, optimizer = trained(kind)
    seen: list[str] = []

    def zero(optimizer, saved):
        for state in saved["state"].values():
            state.update({key: torch.zeros_like(v) for key, v in state.items() if v.is_floating_point() and v.ndim})
        return {"state": saved["state"], "param_groups": [{**saved["param_groups"][0], "lr": 0.125}]}

    def mark(optimizer):
        seen.append("after")
        for p in optimizer.param_groups[0]["params"]:
            optimizer.state[p]["note"] = torch.ones(3)

    optimizer.register_state_dict_pre_hook(lambda optimizer: seen.append("before"))
    optimizer.register_state_dict_post_hook(lambda optimizer, saved: {"mine": saved})
    _, other = trained(kind, 0)
    other.register_load_state_dict_pre_hook(lambda optimizer, saved: saved["mine"])
    other.register_load_state_dict_pre_hook(zero)
    other.register_load_state_dict_post_hook(mark)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert seen == ["before", "after"] and other.param_groups[0]["lr"] == 0.125
    for p in other.param_groups[0]["params"]:
        state = other.state[p]
        assert state.pop("note").sum() == 3
        assert not any(v.any() for v in state.values() if v.is_floating_point() and v.ndim)


@every_own
def test_what_others_keep_in_the_state_stays_and_old_steps_are_numbers(kind):
    model, optimizer = trained(kind)
    saved = optimizer.state_dict()
    notes = {"text": "mine", "list": [1, "two"], "tensor": torch.arange(5)}
    for index in range(4):
        saved["state"].setdefault(index, {}).update(copy.deepcopy(notes))
    for state in saved["state"].values():
        if "step" in state:
            state["step"] = float(state["step"])
    saved["state"]["elsewhere"] = 7
    other, fresh = trained(kind, 0)
    other.load_state_dict(model.state_dict())
    fresh.load_state_dict(saved)
    train(other, fresh, range(4, 8))
    train(model, optimizer, range(4, 8))
    assert same(other, model) and fresh.state["elsewhere"] == 7
    for p in other.parameters():
        assert fresh.state[p]["text"] == "mine" and fresh.state[p]["list"] == [1, "two"]
        assert torch.equal(fresh.state[p]["tensor"], torch.arange(5))


@every_own
def test_names_are_taken_from_a_saved_state_where_ones_own_are_positions(kind):
    method, hyper = kind
    model, optimizer = trained(kind)
    other = Net()
    other.load_state_dict(model.state_dict())
    fresh = method(other.parameters(), **hyper)
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    assert fresh.param_groups[0]["names"] == ["a", "b", "bias", "scalar"]
    train(other, fresh, range(4, 10))
    train(model, optimizer, range(4, 10))
    assert same(other, model)


@every_own
def test_the_state_of_torchs_adamw_is_read_or_refused_with_the_reason(kind):
    """Old files too, where the step is a number; never that of amsgrad."""
    method, hyper = kind
    for amsgrad in (False, True):
        model = Net()
        theirs = torch.optim.AdamW(model.parameters(), lr=0.01, amsgrad=amsgrad)
        train(model, theirs, range(3))
        saved = theirs.state_dict()
        for state in saved["state"].values():
            state["step"] = float(state["step"])
        optimizer = method(model.parameters(), **hyper)
        keeps = optimizer.spec((6, 8), torch.float32)
        if amsgrad:
            with pytest.raises(ValueError, match="amsgrad"):
                optimizer.load_state_dict(saved)
        elif {"exp_avg", "exp_avg_sq", "step"} == keeps.keys() or not keeps:
            optimizer.load_state_dict(saved)
            train(model, optimizer, [3])
        else:
            with pytest.raises(ValueError, match="^0: .*(full AdamW's|another method)"):
                optimizer.load_state_dict(saved)


# ------------------------------------------------------------------------------------------------------- constructors


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
        with pytest.raises((TypeError, ValueError), match="pairs for all of them|names|Tensors"):
            method(params, **hyper)


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
    a, b = method(plain.parameters(), **{**hyper, **betas}), method(tensors.parameters(), **{**hyper, "lr": rate, **held})
    for beta in held.get("betas", ()):
        beta.fill_(0.25)
    a.param_groups[0].update({key: (0.25, 0.25) for key in betas}, lr=0.03125)
    rate.fill_(0.03125)
    train(plain, a, range(5))
    train(tensors, b, range(5))
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(plain.parameters(), tensors.parameters(), strict=True))


# ------------------------------------------------------------------------------------------------------ foreign loops

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
    optimizer = Frugal([*groups, {"params": [model.b], "names": ["b"], "split": False}], order=lambda names, count: ["a"])
    train(model, optimizer, range(3))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.data())
def test_foreign_loops(data):
    """Whatever happens to the tensors in between: a step leaves finite weights, or is refused by the name of a tensor."""
    method, hyper = data.draw(st.sampled_from([*KINDS.values()]))
    dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])
    shapes = st.lists(st.integers(0, 5), max_size=4)
    names = [f"p{i}" for i in range(data.draw(st.integers(1, 4)))]
    params = {n: nn.Parameter(torch.randn(data.draw(shapes)).to(data.draw(dtypes))) for n in names}
    cut = data.draw(st.integers(0, len(names)))
    groups = [{"params": [(n, params[n]) for n in part]} for part in (names[:cut], names[cut:])]
    optimizer = method(groups, **hyper)
    for step in range(data.draw(st.integers(1, 8))):
        name = data.draw(st.sampled_from(names))
        p = params[name]
        what = data.draw(st.sampled_from(["step", "step", "step", "freeze", "grow", "move", "load", "replace", "strides"]))
        if what == "freeze":
            p.requires_grad_(not p.requires_grad)
        elif what == "grow":
            p.data = torch.randn(data.draw(shapes)).to(p.dtype)
        elif what == "move":
            p.data = p.data.to(data.draw(dtypes))
        elif what == "replace":
            p.data = torch.randn_like(p)
        elif what == "strides":
            p.data = p.data.transpose(0, -1).contiguous().transpose(0, -1) if p.ndim else p.data
        elif what == "load":
            try:
                optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
            except ValueError as error:
                assert str(error).split(":")[0] in names
        for q in params.values():
            q.grad = torch.randn_like(q) if q.requires_grad and data.draw(st.booleans()) else None
        try:
            optimizer.step()
        except ValueError as error:
            refused = str(error).split(":")[0]
            assert refused in names
            optimizer.state[params[refused]].clear()
        assert all(q.isfinite().all() for q in params.values())
