"""torch.distributed.checkpoint and its helpers in one process, for every registered method: restored and trained on,
the weights are those of a run that went on, or what cannot be restored is refused by name."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict as get
from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict as put
from torch.utils._pytree import tree_leaves

from tests.tools.manners import KINDS, PLAIN, Net, every_kind, give_gradients, same, through_a_file, train
from thriftlab.optim import METHODS

ODD = {
    f"{name}, density {density:g}": (METHODS[name], {"lr": 0.01, "gap": 3, "density": density})
    for name in ("frugal", "badam")
    for density in (0.0, 1.0)
}
CHOSEN = {**PLAIN, **ODD, **{name: KINDS[name] for name in ("frugal-bf16", "frugal-8bit", "badam-8bit")}}
SAVED, END = 4, 8  # the other block is active than at first, and the first again at the end
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
FULL = StateDictOptions(full_state_dict=True)
OFFLOADED = StateDictOptions(full_state_dict=True, cpu_offload=True)


def made(kind, late, frozen):
    """Network and optimizer; the matrix `b` comes late, in a group of its own."""
    method, hyper = kind
    net = Net()
    net.bias.requires_grad_(not frozen)
    named = dict(net.named_parameters())
    first = {name: p for name, p in named.items() if not late or name != "b"}
    optimizer = method([{"params": [*first.items()]}], **hyper)
    return net, optimizer, {"params": [("b", named["b"])]}


def go(net, optimizer, steps):
    for step in steps:
        give_gradients(net.parameters(), step)
        net.bias.grad = net.bias.grad if net.bias.requires_grad else None
        optimizer.step()
        optimizer.zero_grad()


def read(net, optimizer, saved, options, folder):
    """As torch says: what there is is read over a state dict of the optimizer."""
    dcp.save({"optim": saved}, checkpoint_id=folder)
    state = {"optim": get(net, optimizer, options=options)}
    dcp.load(state, checkpoint_id=folder)
    put(net, optimizer, state["optim"], options=options)


def restore(net, optimizer, saved, options, folder):
    put(net, optimizer, through_a_file(saved), options=options)


WAYS = {
    "read": (read, StateDictOptions()),
    "flat": (read, FLAT),
    "flat file": (restore, FLAT),
    "full": (restore, FULL),
    "offloaded": (read, OFFLOADED),
}
SCENES = {  # late, frozen, steps of the one that is restored, ways
    "fresh": (False, False, 0, [*WAYS]),
    "stepped": (False, True, 6, ["read", "flat file", "full"]),
    "late": (True, True, 1, ["read", "full"]),
}


def active(net, optimizer):
    return {name for name in ("a", "b") if "exp_avg" in optimizer.state.get(getattr(net, name), {})}


@pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES.keys())
@pytest.mark.parametrize("kind", CHOSEN.values(), ids=CHOSEN.keys())
def test_what_torchs_helpers_save_comes_back(kind, scene, tmp_path):
    late, frozen, before, ways = scene
    for way in ways:
        bring_back, options = WAYS[way]
        (net, optimizer, more), (other, fresh, more_too) = made(kind, late, frozen), made(kind, late, frozen)
        go(net, optimizer, range(2))
        go(other, fresh, range(before))
        if late:
            optimizer.add_param_group(more)
            fresh.add_param_group(more_too)
            go(other, fresh, range(1))
        go(net, optimizer, range(2, SAVED))
        saved, weights = get(net, optimizer, options=options), {k: p.clone() for k, p in other.state_dict().items()}
        shaped = any(isinstance(value, torch.Tensor) and value.ndim for value in tree_leaves(saved))
        if options.full_state_dict and not shaped:  # of torch's own SGD without momentum, too
            with pytest.raises(AssertionError, match="Expected device to be set"):
                bring_back(other, fresh, saved, options, str(tmp_path / way))
            continue
        trial, begun, _ = made(kind, late, frozen)
        get(trial, begun)  # takes a step of lr 0, as torch's helpers do with what has no state
        lost = active(net, optimizer) - (active(other, fresh) if before else active(trial, begun))
        if options.flatten_optimizer_state_dict and lost:
            with pytest.raises(ValueError, match=f"^[{''.join(lost)}]: .*exp_avg.*without flatten_optimizer_state"):
                bring_back(other, fresh, saved, options, str(tmp_path / way))
            continue
        bring_back(other, fresh, saved, options, str(tmp_path / way))
        assert all(torch.equal(p, weights[name]) for name, p in other.state_dict().items())
        other.load_state_dict(net.state_dict())
        go(net, optimizer, range(SAVED, END))
        go(other, fresh, range(SAVED, END))
        assert same(other, net), way


@every_kind
def test_the_keys_of_a_state_dict_do_not_depend_on_history_and_every_bit_comes_back(kind):
    """Of what has been stepped: also where the first gradient is not finite, or the block was never active."""
    method, hyper = kind
    net, other = Net(), Net()
    optimizer, fresh = method(net.named_parameters(), **hyper), method(other.named_parameters(), **hyper)
    seen = set()
    for step in range(7):
        give_gradients(net.parameters(), step)
        for p in (net.a, net.b):
            p.grad *= torch.nan if step == 0 else 1
        optimizer.step()
        net.load_state_dict({name: p.nan_to_num() for name, p in net.state_dict().items()})
        saved = optimizer.state_dict()
        seen.add(str({index: sorted(state) for index, state in saved["state"].items()}))
        fresh.load_state_dict(saved)
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            ours, theirs = optimizer.state.get(p, {}), fresh.state.get(q, {})
            assert ours.keys() - theirs.keys() <= {"diagnostic.residual", "diagnostic.overlap", "diagnostic.limiter"}
            for key, value in theirs.items():
                assert torch.equal(value.nan_to_num(), ours[key].nan_to_num()), (step, key)
    assert len(seen) == 1
    assert optimizer.rank_state_dict()["state"] == {
        i: optimizer.state[p] for i, p in enumerate(net.parameters()) if optimizer.state.get(p)
    }


def test_a_state_is_as_large_as_ever_where_it_is_not_for_torchs_helpers():
    net, optimizer, _ = made(PLAIN["badam"], late=False, frozen=False)
    train(net, optimizer, range(2))
    idle = [state.keys() for state in optimizer.rank_state_dict()["state"].values()]
    assert {"step", "start"} in idle
    assert all("exp_avg" in state for state in optimizer.state_dict()["state"].values())
