"""torch.distributed.checkpoint under FSDP2: restored and trained on, the weights are those of a run that went on."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict as get
from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict as put

from tests.tools import gang
from tests.tools.methods import GAP, MAKERS, frugal, through_a_file
from thriftlab.optim.core.sharded import IDLE, of_one_process

SAVED, END = GAP + 2, 2 * GAP + 1  # other blocks are active than at first, and others again at the end
FULL = StateDictOptions(full_state_dict=True)
BROADCAST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
RULES = {
    "torch": lambda named: torch.optim.AdamW([p for _, p in named], lr=0.01),
    "rows, bf16": lambda named: frugal(named, subspace="rows", density=0.3, state_dtype="bf16"),
    **{name: MAKERS[name] for name in ("adamw", "badam", "columns", "coordinates, project")},
}
OWNED = ["galore", "apollo", "muon", "rows, keep"]


def made(rule, cut):
    """Layers of which the last has fewer rows than there are ranks, and their optimizer."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Linear(9, 7), torch.nn.Linear(7, 1))
    if cut:
        fully_shard(model)
    return model, rule(model.named_parameters())


def train(model, optimizer, steps):
    for step in steps:
        batch = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        model(batch).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [whole(p).detach().numpy().copy() for p in model.parameters()]


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def set_weights(model, weights):
    from torch.distributed.tensor import distribute_tensor

    with torch.no_grad():
        for p, weight in zip(model.parameters(), weights, strict=True):
            weight = torch.tensor(weight)
            p.copy_(distribute_tensor(weight, p.device_mesh, p.placements) if hasattr(p, "device_mesh") else weight)


def same(a, b):
    return all((x == y).all() for x, y in zip(a, b, strict=True))


def read(model, optimizer, folder):
    state = {"optim": get(model, optimizer)}
    dcp.load(state, checkpoint_id=folder)
    put(model, optimizer, state["optim"])


def read_both(model, optimizer, folder):
    parts = dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True))
    dcp.load(parts, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optim"])


def read_plain(model, optimizer, folder):
    get(model, optimizer)  # torch, too, wants a state to load into
    state = {"plain": optimizer.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    optimizer.load_state_dict(state["plain"])


def read_full(model, optimizer, folder):
    put(model, optimizer, torch.load(f"{folder}/full.pt", weights_only=True), options=FULL)


def read_broadcast(model, optimizer, folder):
    state = torch.load(f"{folder}/full.pt", weights_only=True) if dist.get_rank() == 0 else {}
    put(model, optimizer, state, options=BROADCAST)


WAYS = [read, read_both, read_plain, read_full, read_broadcast]


def run(rules, folder):
    """By rule the weights when its state is saved and at the end, and the ways in which it did not come back."""
    dist.init_process_group("gloo")
    found = {}
    for rule in rules:
        model, optimizer = made(RULES[rule], cut=True)
        weights, path = train(model, optimizer, range(SAVED)), f"{folder}/{rule}"
        parts = dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True))
        dcp.save({**parts, "plain": optimizer.state_dict()}, checkpoint_id=path)
        full = get(model, optimizer, options=FULL)
        if dist.get_rank() == 0:
            torch.save(full, f"{path}/full.pt")
        dist.barrier()
        end, wrong = train(model, optimizer, range(SAVED, END)), []
        for way in WAYS:
            model, optimizer = made(RULES[rule], cut=True)
            set_weights(model, weights)
            way(model, optimizer, path)
            if not same(end, train(model, optimizer, range(SAVED, END))):
                wrong.append(way.__name__)
        found[rule] = weights, end, wrong
    dist.destroy_process_group()
    return found


def resumed(rules, folder, found, cut):
    """The rules whose state, as `run` saved it, did not come back on other ranks."""
    dist.init_process_group("gloo")
    wrong = []
    for rule in rules:
        for way in (read,) if cut else (read, read_full):
            model, optimizer = made(RULES[rule], cut)
            set_weights(model, found[rule][0])
            way(model, optimizer, f"{folder}/{rule}")
            if not same(found[rule][1], train(model, optimizer, range(SAVED, END))):
                wrong.append(rule)
    dist.destroy_process_group()
    return wrong


@pytest.mark.slow
def test_every_way_and_number_of_ranks(tmp_path):
    found = gang.ranks(2, run, list(RULES), str(tmp_path))
    for rank in found:
        assert {rule: wrong for rule, (_, _, wrong) in rank.items() if wrong and rule != "torch"} == {}
        assert set(rank["torch"][2]) <= {"read_broadcast"}  # torch's own control
    for world, cut in ((1, False), (4, True)):
        assert gang.ranks(world, resumed, list(RULES), str(tmp_path), found[0], cut) == [[]] * world


def refused():
    """What is said to a state that lies at an owner, and whether its ranks come back from a file of each."""
    dist.init_process_group("gloo")
    said, came_back = [], []
    for rule in OWNED:
        model, optimizer = made(MAKERS[rule], cut=True)
        weights = train(model, optimizer, range(SAVED))
        alone = made(MAKERS[rule], cut=False)
        train(*alone, range(1))
        of_one = alone[1].state_dict()
        for attempt in (
            optimizer.state_dict,
            lambda model=model, optimizer=optimizer: get(model, optimizer, options=FULL),
            lambda optimizer=optimizer, of_one=of_one: optimizer.load_state_dict(of_one),
        ):
            with pytest.raises(ValueError) as error:
                attempt()
            said.append(str(error.value))
        saved = through_a_file(optimizer.rank_state_dict())
        end = train(model, optimizer, range(SAVED, END))
        model, optimizer = made(MAKERS[rule], cut=True)
        set_weights(model, weights)
        optimizer.load_state_dict(saved)
        came_back.append(same(end, train(model, optimizer, range(SAVED, END))))
        with pytest.raises(ValueError, match=r"of rank 3 of 4"):
            optimizer.load_state_dict({**saved, "rank": [3, 4]})
    dist.destroy_process_group()
    return said, came_back


@pytest.mark.slow
def test_state_at_an_owner_is_refused_by_name():
    for said, came_back in gang.ranks(2, refused):
        assert all(
            "the state of 0.weight lies whole at one rank" in line and "rank_state_dict" in line for line in said
        )
        assert said[0].startswith("GaLore: ") and all(came_back)


def changed(rules):
    """Of which rules the weights are those of one process where tensors freeze and come while it trains: that changes
    which rank would own the others."""
    dist.init_process_group("gloo")
    found = []
    for rule in rules:
        ends = []
        for cut in (True, False):
            model, _ = made(MAKERS[rule], cut)
            named = list(model.named_parameters())
            optimizer = MAKERS[rule](named[2:])
            train(model, optimizer, range(2))
            optimizer.add_param_group({"params": named[:2]})
            train(model, optimizer, range(2, 4))
            named[2][1].requires_grad_(False)
            ends.append(train(model, optimizer, range(4, 6)))
        found.append(same(*ends))
    dist.destroy_process_group()
    return found


@pytest.mark.slow
def test_tensors_may_freeze_and_come():
    assert gang.ranks(2, changed, ["galore", "columns"]) == [[True, True]] * 2


def frozen(rules):
    """Of which rules the weights are those of one process where a tensor freezes before its first step, and has a
    gradient."""
    dist.init_process_group("gloo")
    found = []
    for rule in rules:
        ends = []
        for cut in (True, False):
            model, optimizer = made(MAKERS[rule], cut)
            model(torch.ones(4, 6)).square().sum().backward()
            model[0].weight.requires_grad_(False)
            optimizer.step()
            model[0].weight.requires_grad_(True)
            optimizer.zero_grad()
            ends.append(train(model, optimizer, range(3)))
        found.append(same(*ends))
    dist.destroy_process_group()
    return found


@pytest.mark.slow
def test_a_frozen_tensor_with_a_gradient_is_stepped_as_in_one_process():
    assert gang.ranks(2, frozen, ["galore", "muon", "rows, keep", "columns"]) == [[True] * 4] * 2


def test_zeros_of_idle_blocks_are_dropped():
    zeros = {"step": torch.tensor(5), "start": torch.tensor(2), "exp_avg": torch.zeros(2, 3)}
    assert of_one_process({**zeros, "start": torch.tensor(IDLE)}, idle=False).keys() == {"step", "start"}
    assert of_one_process(zeros, idle=True).keys() == {"step", "start"}
    assert of_one_process(zeros, idle=False).keys() == zeros.keys()
    assert of_one_process({**zeros, "exp_avg": torch.eye(3)}, idle=True).keys() == zeros.keys()
