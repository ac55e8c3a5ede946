"""State that is saved, copied and loaded, with the manners of torch's optimizers, for every registered method."""

import copy
import pickle

import pytest
import torch

from tests.tools.manners import Net, every_method, every_own, same, through_a_file, train, trained


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
            del saved["param_groups"][0]["amsgrad"]
            with pytest.raises(ValueError, match="^0: .*amsgrad"):
                optimizer.load_state_dict(saved)
        elif {"exp_avg", "exp_avg_sq", "step"} == keeps.keys() or not keeps:
            optimizer.load_state_dict(saved)
            train(model, optimizer, [3])
        else:
            with pytest.raises(ValueError, match="^0: .*(full AdamW's|another method)"):
                optimizer.load_state_dict(saved)
