"""One declaration of a hyper-parameter serves the constructor, the configuration and the search space."""

from collections.abc import Callable
from typing import Annotated, Literal, Protocol, runtime_checkable

import pytest
import torch
from pydantic import BaseModel, Field, ValidationError

from thriftlab.optim import METHODS, AdamW, Frugal, predicted_state_bytes
from thriftlab.optim.core.hyper import Betas, Search, check, descriptions, model_of, search_space


@runtime_checkable
class Shape(Protocol):
    def area(self) -> float: ...


class Square:
    def area(self) -> float:
        return 1.0


class Method:
    """Does a thing.

    At some length.

    Args:
        params: what to do it to.
        lr: how far,
            in a step.
        kind: which: one of several.
    """

    def __init__(
        self,
        params,
        lr: Annotated[float | torch.Tensor, Field(ge=0), Search(1e-4, 1e-2)],
        betas: Annotated[Betas, Field()] = (0.9, 0.999),
        kind: Annotated[Literal["round", "square"] | Shape | Callable[[int], int], Search(choices=["round"])] = "round",
        seed: int = 0,
    ):
        pass


def schedule(progress: float, warmup: Annotated[float, Field(ge=0, le=1)] = 0.1) -> float:
    return progress * warmup


def test_a_model_has_the_name_and_one_field_per_hyper_parameter():
    model = model_of(Method, "thing")
    assert list(model.model_fields) == ["name", "lr", "betas", "kind"]
    assert model(lr=1).model_dump() == {"name": "thing", "lr": 1.0, "betas": (0.9, 0.999), "kind": "round"}
    assert model.__doc__ == "Does a thing."
    assert model.model_fields["lr"].description == "how far, in a step."
    assert model.model_fields["kind"].description == "which: one of several."
    assert list(model_of(schedule, "linear").model_fields) == ["name", "warmup"]


def test_a_model_extends_its_base():
    class Base(BaseModel):
        include: tuple[str, ...] = ()

    model = model_of(Method, "thing", base=Base)
    assert issubclass(model, Base) and model(lr=1, include=("a",)).include == ("a",)


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": -1}, {"lr": "fast"}, {"lr": float("nan")}, {"betas": (0.9, 1.0)}, {"betas": (0.9,)}, {"kind": "flat"},
        {"gap": 3}, {"name": "other"}, {},
    ],
)  # fmt: skip
def test_a_model_refuses_what_is_out_of_bounds_unknown_or_missing(wrong):
    with pytest.raises(ValidationError):
        model_of(Method, "thing")(**({"lr": 1} if wrong and "lr" not in wrong else {}), **wrong)


def test_a_model_is_frozen():
    with pytest.raises(ValidationError):
        model_of(Method, "thing")(lr=1).lr = 2


def test_the_configuration_sees_only_what_text_can_say_and_the_constructor_takes_objects():
    model = model_of(Method, "thing")
    assert "enum" in model.model_json_schema()["properties"]["kind"]
    for thing in (Square(), abs, "square"):
        assert check(Method, {"kind": thing})["kind"] is thing
    with pytest.raises(ValidationError):
        model(lr=1, kind=Square())
    lr = torch.tensor(0.1)
    assert check(Method, {"lr": lr})["lr"] is lr


def test_check_names_the_hyper_parameter_and_its_bound():
    with pytest.raises(ValueError, match=r"^Method: lr=-1: Input should be greater than or equal to 0$"):
        check(Method, {"lr": -1, "params": [], "unknown": 3})
    with pytest.raises(ValueError, match=r"betas=\(0.9, 1.0\): Input should be less than 1"):
        check(Method, {"betas": (0.9, 1.0)})
    with pytest.raises(ValueError, match="kind='flat': Input should be 'round' or 'square'"):
        check(Method, {"kind": "flat"})


def test_search_space_is_what_declares_a_search():
    assert search_space(Method) == {"lr": Search(1e-4, 1e-2), "kind": Search(choices=["round"])}


@pytest.mark.parametrize(
    "arguments", [{}, {"low": 1}, {"low": 2, "high": 1}, {"low": 0, "high": 1}, {"low": 1, "high": 2, "choices": [1]}]
)
def test_search_refuses_what_it_cannot_search(arguments):
    with pytest.raises(ValueError):
        Search(**arguments)
    assert Search(0, 1, scale="linear").low == 0


WIDE = {"apollo", "badam", "fira", "frugal", "galore", "muon"}  # of before; some of their keys change the memory


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_what_is_worth_tuning(name):
    """lr, weight decay and at most one of its own, none of which changes the memory that is compared."""
    method = METHODS[name]
    space = search_space(method)
    assert {"lr", "weight_decay"} <= space.keys()
    if name in WIDE:
        return
    assert len(space) <= 3
    for key, search in space.items():
        specs = []
        for value in search.choices or (search.low, search.high):
            optimizer = method([torch.nn.Parameter(torch.zeros(300, 200))], **{key: value})
            specs.append(predicted_state_bytes(optimizer))
        assert len(set(specs)) == 1, key


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_a_configuration(name):
    method = METHODS[name]
    model = model_of(method, name)
    config = model()
    assert model.model_validate_json(config.model_dump_json()) == config
    assert set(descriptions(method)) == set(model.model_fields) - {"name"}, "each has its words"
    optimizer = method([torch.nn.Parameter(torch.zeros(2, 3))], **config.model_dump(exclude={"name"}))
    for key, value in config.model_dump(exclude={"name"}).items():
        assert optimizer.param_groups[0][key] == value
    for key, search in search_space(method).items():
        for value in search.choices or (search.low, search.high):
            model(**{key: value})
            method([torch.nn.Parameter(torch.zeros(2, 3))], **{key: value})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: AdamW(p, lr=-1), "AdamW: lr=-1: .*greater than or equal to 0"),
        (lambda p: AdamW(p, betas=(0.9, 1)), "betas"),
        (lambda p: AdamW([{"params": p, "lr": -2}]), "lr=-2"),
        (lambda p: Frugal(p, density=1.5), "density=1.5: .*less than or equal to 1"),
        (lambda p: Frugal(p, gap=0), "gap=0"),
        (lambda p: Frugal(p, subspace="cols"), "subspace='cols': .*'columns'"),
        (lambda p: Frugal(p, subspace=object()), "subspace"),
        (lambda p: Frugal(p, order="up"), "order='up'"),
    ],
)
def test_constructors_refuse_what_is_out_of_bounds(make, message):
    with pytest.raises(ValueError, match=message):
        make([torch.nn.Parameter(torch.zeros(2, 3))])
