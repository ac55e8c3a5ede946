"""One RunConfig is one run: it round-trips, refuses what it does not know, and its fingerprint is of the result."""

import json
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from thriftlab.data.errors import ConfigError
from thriftlab.optim import METHODS
from thriftlab.train.budget import SCHEDULES
from thriftlab.train.config import RunConfig, load
from thriftlab.train.config.help import all_keys, keys
from thriftlab.train.config.schema import SEAMS, fingerprint, settled
from thriftlab.train.signals import SIGNALS

GOLDEN = Path(__file__).with_name("golden_surface.txt")
TEXT = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"], exclude_characters="\x85\u2028\u2029"), min_size=1
)
PATH = TEXT.filter(lambda path: path[0] != "~" and "$" not in path)  # which a shell would have replaced
RATE = st.floats(1e-8, 1e3)
COUNT = st.integers(1, 2**40)


def section(**fields):
    return st.fixed_dictionaries({}, optional=fields)


RUNS = section(
    seed=st.integers(0, 2**63 - 1),
    out=PATH,
    model=section(
        preset=st.sampled_from(["nano", "micro", None]), rope_theta=st.floats(1.5, 1e6), qk_norm=st.booleans()
    ),
    data=section(
        path=PATH,
        sequence_length=COUNT,
        verify=st.booleans(),
        sources=st.dictionaries(TEXT, st.one_of(*(st.fixed_dictionaries({key: RATE}) for key in ("weight", "epochs")))),
    ),
    optim=section(name=st.sampled_from(sorted(METHODS)), lr=RATE, include=st.lists(TEXT.map(re.escape))),
    schedule=section(name=st.sampled_from(sorted(SCHEDULES)), warmup=st.floats(0, 0.5)),
    budget=st.one_of(*(st.fixed_dictionaries({kind: COUNT}) for kind in ("tokens", "flops", "seconds"))),
    train=section(batch_size=COUNT, micro_batch_size=st.none() | COUNT, clip=st.none() | RATE, compile=st.booleans()),
    eval=section(every=st.integers(0, 99), tokens=st.none() | COUNT),
    log=section(wandb=st.sampled_from(["disabled", "offline", "online"]), group=st.none() | TEXT),
)


@given(RUNS.map(RunConfig.model_validate))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_run_written_to_a_file_and_read_back_is_equal(tmp_path, config):
    tree = config.model_dump(mode="json")
    (tmp_path / "run.json").write_text(config.model_dump_json(), encoding="utf-8")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    for file in ("run.json", "run.yaml"):
        assert load(RunConfig, ["--config", str(tmp_path / file)]) == config
    assert RunConfig.model_validate(tree) == config


def test_methods_have_their_own_keys():
    for name in METHODS:
        config = RunConfig(optim={"name": name})
        assert config.optim.name == name
        assert {"lr"} <= config.optim.hyperparameters().keys()
        assert not {"name", "include", "exclude"} & config.optim.hyperparameters().keys()
    assert RunConfig(optim={"name": "frugal", "gap": "7"}).optim.hyperparameters()["gap"] == 7
    with pytest.raises(ValidationError, match=r"optim\.gap"):
        RunConfig(optim={"name": "adamw", "gap": 7})


def sections(model):
    yield model
    for value in dict(model).values():
        if isinstance(value, BaseModel):
            yield from sections(value)


def test_every_section_is_frozen_and_refuses_unknown_keys_and_infinity():
    for part in sections(RunConfig()):
        assert part.model_config["frozen"] and part.model_config["extra"] == "forbid", type(part)
    with pytest.raises(ValidationError):
        RunConfig().seed = 1
    for tree in ({"train": {"clip": float("inf")}}, {"optim": {"lr": float("nan")}}):
        with pytest.raises(ValidationError):
            RunConfig(**tree)


def test_every_key_says_what_it_means():
    sections = [("optim", METHODS), ("schedule", SCHEDULES), ("signal", SIGNALS)]
    for section, names in sections:
        for name in names:
            tree = {section: {"name": name}}
            silent = [key for key, field in keys(RunConfig, tree) if not field.description]
            assert set(silent) <= {f"{choice}.name" for choice in (*SEAMS, "schedule")}  # their help is the names


def test_the_surface_changes_only_on_purpose():
    """What an entry takes is its own business; to accept another change, write `surface` to golden_surface.txt."""
    chosen = tuple(f"({section}.name=" for section in SEAMS)
    surface = [key for key in all_keys(RunConfig) if not any(mark in key for mark in chosen)]
    assert surface == GOLDEN.read_text().splitlines()


@pytest.mark.parametrize(
    "tree, message",
    [
        ({"schedule": {"name": "wsd", "warmup": 0.9}}, "overlap"),
        ({"data": {"sources": {"web": {}}}}, "exactly one of weight and epochs"),
        ({"data": {"sources": {"web": {"weight": 1, "epochs": 1}}}}, "exactly one of weight and epochs"),
        ({"optim": {"include": ["("]}}, "regular expression"),
        ({"budget": {"tokens": 1, "seconds": 1}}, "takes one of"),
        ({"layer": {"include": ["mlp"]}}, "include has no effect with layer 'dense', which replaces nothing"),
        ({"layer": {"exclude": ["mlp"]}}, "exclude has no effect with layer 'dense', which replaces nothing"),
        ({"train": {"rounding": "nearest"}}, "rounding has no effect with weights=fp32, which keeps every bit"),
        ({"train": {"weights": "bf16+16", "rounding": "nearest"}}, "rounding has no effect with weights=bf16\\+16"),
        ({"signal": {"shuffle": True}}, "shuffle=true has no effect with signal 'uniform'"),
        ({"signal": {"statistics": "lagged"}}, "statistics has no effect with signal 'uniform'"),
    ],
)
def test_impossible_combinations(tree, message):
    with pytest.raises(ValidationError, match=message):
        RunConfig(**tree)


def test_a_batch_divides_among_ranks():
    train = RunConfig(train={"batch_size": 12}).train
    assert [train.rows_per_rank(world) for world in (1, 2, 3, 4)] == [12, 6, 4, 3]
    with pytest.raises(ConfigError, match="not a multiple of the 5 ranks"):
        train.rows_per_rank(5)


# ------------------------------------------------------------------------------------------------------ fingerprint


def changed(value, key):
    """Another value of the same type; whether it would be valid is not asked."""
    if value is None:
        return 1
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return f"{value}x" if isinstance(value, str) else (*value, 0.5)


def with_value(model, path, value):
    if not path:
        return value
    return model.model_copy(update={path[0]: with_value(getattr(model, path[0]), path[1:], value)})


def changed_keys(config):
    """Keys whose change changes the fingerprint."""
    before, found = fingerprint(config, "data"), set()
    for key, _ in keys(RunConfig, config.model_dump(exclude={"data": {"sources"}})):
        path = key.split(".")
        if "NAME" in path or key == "plugins":
            continue
        value = config
        for part in path:
            value = getattr(value, part)
        if fingerprint(with_value(config, path, changed(value, key)), "data") != before:
            found.add(key)
    return found


NEVER = {"out", "data.path", "data.verify", "backend.device", "backend.timeout", "backend.witness", "eval.batch_size"}
NEVER |= {"train.max_skipped_steps"}
NEVER |= {f"checkpoint.{key}" for key in ("every", "keep", "background")}
NEVER |= {f"log.{key}" for key in ("every", "wandb", "project", "group", "tensorboard", "progress")}
BY_SPEED = {"backend.name", "train.micro_batch_size", "train.activation_checkpointing", "train.loss_keep_bytes"}
BY_SPEED |= {"train.compile", "train.layerwise", "train.threads", "train.deterministic"}
BY_SPEED |= {"backend.stage", "backend.settings"}


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
@pytest.mark.parametrize("budget, ignored", [({"tokens": 9}, NEVER | BY_SPEED), ({"seconds": 9}, NEVER)])
def test_fingerprint_is_of_what_determines_the_result(budget, ignored):
    config = RunConfig(budget=budget, optim={"name": "frugal"})
    every = {key for key, _ in keys(RunConfig, config.model_dump()) if "NAME" not in key and key != "plugins"}
    assert changed_keys(config) == every - ignored
    assert fingerprint(config, "data") == fingerprint(config.model_copy(), "data") != fingerprint(config, "other data")
    assert re.fullmatch("[0-9a-f]{64}", fingerprint(config, "data"))


RICH = {
    "seed": 7, "out": "runs/rich", "model": {"preset": "micro", "qk_norm": True, "tied": True},
    "layer": {"name": "lost", "include": [r"\.mlp\."]},
    "data": {"path": "prepared/x", "sequence_length": 128, "document_mask": True, "verify": False,
             "sources": {"web": {"weight": 2}, "books": {"epochs": 1.5}}},
    "optim": {"name": "frugal", "lr": 3e-3, "gap": 50, "density": 0.5, "exclude": ["embed"]},
    "signal": {"name": "linupper", "statistics": "lagged"},
    "schedule": {"name": "wsd", "warmup": 0.05, "decay": 0.3},
    "train": {"batch_size": 48, "micro_batch_size": 6, "clip": 0.5, "precision": "bf16", "compile": True, "threads": 2,
              "activation_checkpointing": True, "loss_keep_bytes": None, "max_skipped_steps": 3, "deterministic": True},
    "backend": {"name": "deepspeed", "stage": 2, "settings": {"zero_optimization": {"overlap_comm": True}},
                "witness": False, "timeout": 30},
    "eval": {"every": 20, "batch_size": 16, "tokens": 4096},
    "checkpoint": {"every": 5, "keep": 3, "background": False},
    "log": {"every": 2, "wandb": "offline", "project": "p", "group": "g", "tensorboard": True, "progress": False},
}  # fmt: skip


@pytest.mark.parametrize(
    "tree, expected",
    [
        ({}, "b93c98518bcc8020196ba83fd0f94672d4f294fc942656bdecba3dde6fe50e96"),
        ({"budget": {"seconds": 60}}, "3d3033b2d361f313192150cf8a9b44536f9967d0c1992e0b3ca64eab4dc535bb"),
        (RICH | {"budget": {"flops": 1e12}}, "63abb120e451da452d0173de37da346af39dfaa38e25d3e42b19f8e5c94d37d0"),
        (RICH | {"budget": {"seconds": 60}}, "c6923f1a13ab908afb13e37070971b68ea265b3b5dc6385203a29ec3250d8341"),
    ],
)
def test_fingerprints_of_runs_that_exist_stay(tree, expected):
    """Runs are resumed and records compared by them; another default or a new key changes them, too."""
    assert fingerprint(RunConfig(**tree), "data") == expected


def test_what_auto_is_counts_and_not_that_it_was_left_to_the_device():
    auto, bf16, fp32 = (RunConfig(train={"precision": name}) for name in ("auto", "bf16", "fp32"))
    assert settled(auto, "bf16") == bf16 and settled(auto, "fp32") == fp32
    assert settled(bf16, "fp32") == bf16 and settled(fp32, "bf16") == fp32, "what is given stays"
    assert fingerprint(auto, "data") == fingerprint(fp32, "data") != fingerprint(bf16, "data")
    assert auto == RunConfig() and "matmul" not in RunConfig().model_dump()["train"]
    assert fingerprint(RunConfig(train={"matmul": "tf32"}), "data") != fingerprint(auto, "data")


def test_what_is_kept_of_weights_and_gradients_counts_and_fp32_is_not_written():
    plain = RunConfig(train={"precision": "bf16"})
    assert not {"weights", "rounding", "gradients"} & plain.model_dump()["train"].keys()
    trees = [
        {"weights": "bf16"},
        {"weights": "bf16", "rounding": "nearest"},
        {"weights": "bf16+8"},
        {"gradients": "bf16"},
    ]
    found = {fingerprint(RunConfig(train={"precision": "bf16", **tree}), "data") for tree in [{}, *trees]}
    assert len(found) == 5 and fingerprint(plain, "data") in found


def test_fingerprint_is_the_same_on_every_machine_and_after_a_round_trip():
    config = RunConfig(data={"sources": {"b": {"weight": 1}, "a": {"weight": 2}}})
    other = RunConfig.model_validate(json.loads(config.model_dump_json()) | {"out": "elsewhere"})
    swapped = RunConfig(data={"sources": {"a": {"weight": 2}, "b": {"weight": 1}}})
    assert fingerprint(config, "d") == fingerprint(other, "d") == fingerprint(swapped, "d")


# ---------------------------------------------------------------------------------------------------------- plugins

PLUGIN = """
from typing import Annotated
from pydantic import Field
from thriftlab.train.budget import schedule

@schedule
def plugged(progress, height: Annotated[float, Field(ge=0, le=1)] = 0.5):
    return height
"""


@pytest.fixture
def plugin(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(PLUGIN)
    yield file
    SCHEDULES.pop("plugged", None)


def test_a_plugin_brings_names_and_counts_by_its_content(plugin, tmp_path):
    with pytest.raises(ValidationError, match="unknown name"):
        RunConfig(schedule={"name": "plugged"})
    tree = {"plugins": [str(plugin)], "schedule": {"name": "plugged", "height": 0.25}}
    config = RunConfig.model_validate(tree)
    assert config.schedule.hyperparameters() == {"height": 0.25}
    assert load(RunConfig, ["--plugin", str(plugin), "schedule.name=plugged", "schedule.height=0.25"]) == config

    before = fingerprint(config, "d")
    copy = tmp_path / "copy.py"
    copy.write_text(PLUGIN)
    assert fingerprint(RunConfig.model_validate(tree | {"plugins": [str(copy)]}), "d") == before
    plugin.write_text(PLUGIN + "# another\n")
    assert fingerprint(config, "d") != before


@pytest.mark.parametrize("text, message", [("1 / 0", "ZeroDivisionError: division by zero"), ("def", "SyntaxError")])
def test_a_broken_plugin_is_named(tmp_path, text, message):
    file = tmp_path / "broken.py"
    file.write_text(text)
    with pytest.raises(ConfigError, match=rf"command line: plugins\[0\] = '{file}': {message}"):
        load(RunConfig, ["--plugin", str(file)])
