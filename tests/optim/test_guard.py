"""Tensors that do not fit each other are refused by name, whoever calls; what has another dtype or is huge goes on."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.tools.manners import (
    KINDS,
    every_kind,
    every_own,
    give_gradients,
    has_shape,
    through_a_file,
    train,
    trained,
    weights,
)
from thriftlab.optim import AdamW
from thriftlab.optim.core import guard
from thriftlab.optim.core.projected import growth_limit


@every_kind
def test_a_state_of_another_shape_is_refused_at_the_load_and_at_the_step(kind):
    model, optimizer = trained(kind)
    saved = optimizer.state_dict()
    for rows, columns in ((12, 6), (8, 9), (5, 6), (8, 4)):
        other, fresh = trained(kind, 0, rows=rows, columns=columns)
        before = weights(other)
        unlike = [p for name, p in model.named_parameters() if p.shape != other.get_parameter(name).shape]
        if not any(has_shape(optimizer.state.get(p, {})) for p in unlike):
            fresh.load_state_dict(saved)  # there is nothing that could have another shape
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
def test_a_plain_step_is_compared_and_not_looked_at_again(kind, monkeypatch):
    """Also where no state is kept, and the optimizer makes an empty one for each step."""
    model, optimizer = trained(kind, 9)
    looked = []
    for step in range(9, 12):
        looked.append(0)
        with monkeypatch.context() as patch:
            patch.setattr(guard, "check_tensor", lambda *given: looked.append(looked.pop() + 1))
            train(model, optimizer, range(step, step + 1))
    assert min(looked) == 0, "a refresh or another block may be looked at"


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


@every_kind
def test_weights_may_get_another_dtype(kind):
    """After a step, and by loading the state of fp32 weights: it is kept as `state_dtype` says for the new ones."""
    method, hyper = kind
    for dtype in (torch.bfloat16, torch.float64):
        model, optimizer = trained(kind, 2)
        loaded, fresh = trained(kind, 0, dtype=dtype)
        fresh.load_state_dict(optimizer.state_dict())
        model.to(dtype)
        train(model, optimizer, range(2, 5))  # through a refresh
        train(loaded, fresh, range(2, 5))
        for at in (optimizer, fresh):
            for group in at.param_groups:
                for name, p in zip(group["names"], group["params"], strict=True):
                    spec = at.expected_spec(name, p, group)
                    assert p.isfinite().all()
                    for key, value in at.state.get(p, {}).items():
                        if value.ndim and key in spec:
                            assert (tuple(value.shape), value.dtype) == spec[key], (name, key)
        if dtype == torch.float64 and kind[1].get("state_dtype") in (None, "fp32"):
            narrow = trained(kind, 5)[0]
            pairs = zip(model.parameters(), narrow.parameters(), strict=True)
            assert all(torch.allclose(p.float(), q, atol=1e-3) for p, q in pairs), "it goes on where it was"


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


@pytest.mark.parametrize("kind", [kind for kind in KINDS.values() if "state_dtype" not in kind[1]])
def test_weights_stay_finite_where_gradients_are_huge(kind):
    for size, calm in ((1e19, 0), (1e20, 0), (1e20, 2), (1e30, 1)):
        model, optimizer = trained(kind, calm)
        for step in range(calm, 5):
            give_gradients(model.parameters(), step)
            for p in model.parameters():
                p.grad *= size if step < 4 else 1
            optimizer.step()
        assert all(p.isfinite().all() for p in model.parameters())


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.data())
def test_foreign_loops(data):
    """Whatever happens to tensors in between: a step leaves finite weights, or is refused by the name of a tensor."""
    method, hyper = data.draw(st.sampled_from([*KINDS.values()]))
    dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])
    shapes = st.lists(st.integers(0, 5), max_size=4)
    names = [f"p{i}" for i in range(data.draw(st.integers(1, 4)))]
    params = {n: nn.Parameter(torch.randn(data.draw(shapes)).to(data.draw(dtypes))) for n in names}
    cut = data.draw(st.integers(0, len(names)))
    groups = [{"params": [(n, params[n]) for n in part]} for part in (names[:cut], names[cut:])]
    optimizer = method(groups, **hyper)
    for _ in range(data.draw(st.integers(1, 8))):
        name = data.draw(st.sampled_from(names))
        p = params[name]
        what = data.draw(st.sampled_from(["step", "freeze", "grow", "move", "load", "replace", "strides"]))
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


def test_a_norm_beyond_the_largest_number_leaves_no_trace_in_the_limiter():
    state, limits = {}, []
    for norm in (1.0, torch.inf, 1.0, 4.0):
        limits.append(growth_limit(torch.tensor(norm), state, gamma=2.0).item())
    assert limits == [1.0, torch.inf, 1.0, pytest.approx(2.0)] and state["limiter"] == pytest.approx(2.0)


def test_moments_with_gaps_are_no_walk_over_memory():
    """All four alike, but not dense: the fused kernel would write between the entries."""
    wide = {key: torch.zeros(4, 6) for key in ("weight", "grad", "exp_avg", "exp_avg_sq")}
    parts = {key: tensor[:, ::2] for key, tensor in wide.items()}
    p, plain = nn.Parameter(parts["weight"]), nn.Parameter(torch.zeros(4, 3))
    parts["grad"].fill_(0.5)
    p.grad, plain.grad = parts["grad"], torch.full((4, 3), 0.5)
    for key in ("exp_avg", "exp_avg_sq"):
        wide[key][:, 1::2] = 7
    optimizers = AdamW([p]), AdamW([plain])
    optimizers[0].state[p] = {"step": torch.tensor(0.0), "exp_avg": parts["exp_avg"], "exp_avg_sq": parts["exp_avg_sq"]}
    for optimizer in optimizers:
        optimizer.step()
    assert torch.allclose(p, plain) and not wide["weight"][:, 1::2].any() and (wide["exp_avg"][:, 1::2] == 7).all()
