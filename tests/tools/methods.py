"""Every method on a few small parameters: how to make it, feed it gradients and compare what comes out."""

import io

import pytest
import torch

from thriftlab.optim import (
    RMNP,
    SOAP,
    AdamMini,
    AdamW,
    Apollo,
    BAdam,
    Conda,
    Dion2,
    Fira,
    Frugal,
    GaLore,
    Muon,
    NorMuon,
    Scale,
    SignSGD,
    SinkGD,
    StableSPAM,
    SubTrack,
)  # fmt: skip

SHAPES = {"a": (6, 8), "b": (8, 6), "bias": (8,), "c": (4, 4), "d": (5, 3), "wide": (2, 3, 4)}
GAP = 4


class Halves:
    """A subspace of one's own: the mean of each pair of columns, and an int32 index to carry along."""

    def refresh(self, grad, name, count, generator):
        flip = torch.randperm(grad.shape[1] // 2, generator=generator).to(torch.int32)
        return {"flip": flip, "odd": torch.tensor([grad.shape[1] % 2], dtype=torch.uint8)}

    def down(self, grad, basis):
        n = len(basis["flip"])
        return (grad[:, : 2 * n : 2] + grad[:, 1 : 2 * n : 2])[:, basis["flip"].long()] / 2**0.5

    def up(self, small, basis):
        pairs = torch.zeros_like(small)
        pairs[:, basis["flip"].long()] = small
        whole = pairs.repeat_interleave(2, dim=1) / 2**0.5
        return torch.nn.functional.pad(whole, (0, int(basis["odd"])))


def frugal(params, **hyper):
    return Frugal(params, **{"lr": 0.01, "gap": GAP, **hyper})


def with_roles(make):
    """A maker that wants groups with roles where there is a model."""
    make.roles = True
    return make


def of_tables(method, **hyper):
    """A maker with a rule for tables: those of a model, or else all there is."""

    def make(params, **k):
        params = list(params)
        groups = params if params and isinstance(params[0], dict) else [{"params": params, "role": "input"}]
        return method(groups, **{"lr": 0.01, **hyper, **k})

    return with_roles(make)


MAKERS = {
    "adamw": lambda params, **k: AdamW(params, **{"lr": 0.01, **k}),
    "signsgd": lambda params, **k: SignSGD(params, **{"lr": 0.01, **k}),
    "blocks": lambda params, **k: frugal(params, **{"density": 0.5, **k}),
    "random blocks": lambda params, **k: frugal(params, order="random", **k),
    "columns": lambda params, **k: frugal(params, subspace="columns", **k),
    "rows, keep": lambda params, **k: frugal(params, subspace="rows", on_refresh="keep", density=0.5, **k),
    "coordinates, project": lambda params, **k: frugal(params, subspace="coordinates", on_refresh="project", **k),
    "lion": lambda params, **k: frugal(params, subspace="columns", rule="lion", free="sgd", density=0.5, **k),
    "badam": lambda params, **k: BAdam(
        params, **{"lr": 0.01, "gap": GAP, "order": "random", "unit": "tensor", "density": 0.6, **k}
    ),
    "lion, all": lambda params, **k: frugal(params, subspace="rows", rule="lion", plain="rule", **k),
    "muon, ember": of_tables(Muon, tables="ember", row_floor=0.1),
    "signsgd, 8bit": of_tables(SignSGD, tables="8bit"),
    "stable_spam, adamw": of_tables(StableSPAM, tables="adamw"),
    "muon": lambda params, **k: Muon(params, **{"lr": 0.01, **k}),
    "scale": with_roles(lambda params, **k: Scale(params, **{"lr": 0.01, **k})),
    "rmnp": with_roles(lambda params, **k: RMNP(params, **{"lr": 0.01, **k})),
    "rmnp, all": with_roles(
        lambda params, **k: RMNP(
            params,
            **{"lr": 0.01, "tables": "own", "nesterov": True, "adjust_lr": True, "plain_decay": "reference", **k},
        )
    ),
    "sinkgd": lambda params, **k: SinkGD(params, **{"lr": 0.01, **k}),
    "swan": lambda params, **k: SinkGD(params, **{"lr": 0.01, "whiten": True, **k}),
    "adam mini": lambda params, **k: AdamMini(params, **{"lr": 0.01, "head_dim": 2, **k}),
    "adam mini, heads": lambda params, **k: AdamMini(
        params, **{"lr": 0.01, "heads": (r"^[ac]$", r"\.[qk]\."), "whole": ("^d$",), "head_dim": 2, **k}
    ),
    "normuon": lambda params, **k: NorMuon(params, **{"lr": 0.01, **k}),
    "normuon, reference": lambda params, **k: NorMuon(params, **{"lr": 0.01, "form": "reference", **k}),
    "stable_spam": lambda params, **k: StableSPAM(params, **{"lr": 0.01, "gap": GAP, "total": 30, **k}),
    "stable_spam, reference": lambda params, **k: StableSPAM(
        params, **{"lr": 0.01, "gap": GAP, "reset": "reference", **k}
    ),
    "soap": lambda params, **k: SOAP(params, **{"lr": 0.01, "gap": GAP, **k}),
    "soap, one side": lambda params, **k: SOAP(
        params, **{"lr": 0.01, "gap": GAP, "max_precond_dim": 6, "normalize_grads": True, "shampoo_beta": 0.9, **k}
    ),
    "conda": lambda params, **k: Conda(params, **{"gap": GAP, **k}),
    "dion2": lambda params, **k: Dion2(params, **k),
    "dion2, ns5": lambda params, **k: Dion2(
        params, **{"fraction": 0.5, "coefficients": "ns5", "adjust_lr_fn": "rms_norm", **k}
    ),
    "own": lambda params, **k: frugal(params, subspace=Halves(), **k),
    "frugal, svd": lambda params, **k: frugal(params, **{"subspace": "svd", "density": 0.5, "stagger": True, **k}),
    "frugal, orthogonal": lambda params, **k: frugal(params, subspace="orthogonal", density=0.5, **k),
    "galore, warm": lambda params, **k: GaLore(params, **{"rank": 2, "gap": GAP, "subspace": "warm_svd", **k}),
    "galore": lambda params, **k: GaLore(params, **{"rank": 2, "gap": GAP, **k}),
    "galore, project": lambda params, **k: GaLore(params, **{"rank": 2, "gap": GAP, "on_refresh": "project", **k}),
    "fira": lambda params, **k: Fira(params, **{"rank": 2, "gap": GAP, **k}),
    "fira, exact": lambda params, **k: Fira(params, **{"rank": 2, "gap": GAP, "residual": "exact", **k}),
    "subtrack": lambda params, **k: SubTrack(params, **{"lr": 0.01, "rank": 2, "gap": GAP, "step_size": 0.01, **k}),
    "subtrack, reference": lambda params, **k: SubTrack(
        params, **{"lr": 0.01, "rank": 2, "gap": GAP, "step_size": 0.01, "form": "reference", **k}
    ),
    "apollo": lambda params, **k: Apollo(params, **{"rank": 2, "gap": GAP, "stagger": True, **k}),
    "mini": lambda params, **k: Apollo(
        params, **{"rank": 1, "gap": GAP, "granularity": "tensor", "scale": 128.0, "subspace": "orthogonal", **k}
    ),
}
every_method = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


def parameters(dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    return {name: torch.nn.Parameter(torch.randn(shape, generator=draw).to(dtype)) for name, shape in SHAPES.items()}


def gradient(name, step):
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(step * 100 + list(SHAPES).index(name)))


def train(params, optimizer, steps):
    for t in steps:
        for name, p in params.items():
            p.grad = gradient(name, t).to(p.dtype)
        optimizer.step()
    return {name: p.detach().clone() for name, p in params.items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
