"""A step by kernels (kernels/fused_step.py): what the host hands to them.

Of the tensors of one call those that kernels can step (kinds.py) make `Plan`s: a table of addresses and sizes, and
lists of what each program does. A plan holds while shapes, states and hyper-parameters are the same. A step fills in
where things lie and launches: `begin_step`, which counts, and one kernel for all tensors that are kept alike.

The surprise: what costs here is Python. 300 tensors are stepped in a fraction of a millisecond, and a few calls for
each would take longer. So a step makes lists of addresses, and compares lists; it looks at no tensor by itself.
"""

import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from thriftlab.optim.core import guard
from thriftlab.optim.core.due import steps_to_refresh
from thriftlab.optim.core.fragments import Fragment
from thriftlab.optim.core.kinds import (
    ALL,
    COLUMNS,
    KEPT,
    NOTHING,
    ROWS,
    Kind,
)
from thriftlab.optim.state.counters import Ticks, follow
from thriftlab.optim.state.keys import State, keyed_seed
from thriftlab.optim.state.storage import BLOCK as CODE_BLOCK
from thriftlab.optim.state.storage import codebook
from thriftlab.optim.state.torch_adamw import MOMENTS
from thriftlab.optim.state.weights import LOW_BITS, few_bits, rounds_randomly

Parts = Sequence[str | Fragment]
FREE = {"none": 0, "sign": 1, "sgd": 2}
# Columns of the table, as in kernels/fused_step.py.
FIELDS = 18
W, LOW, G, M, V, M_SCALE, V_SCALE, INDEX, SIZE, WIDTH, CHOSEN, FIRST_W, FIRST_V, STEP, START, ROUNDS, SEED_W, SEED_V = (
    range(FIELDS)
)
STATE = {
    "weight.low": LOW, "exp_avg": M, "exp_avg_sq": V, "exp_avg.scale": M_SCALE, "exp_avg_sq.scale": V_SCALE,
    "step": STEP, "start": START, "weight.step": ROUNDS,
}  # fmt: skip
TILE, ENTRIES, LANES = (4, 256), 1024, 128  # what a program has: of a tensor in rows and columns, or flat; tensors
PASSING = ("params", "names", "lr", "applied", "weight_decay", "betas", "eps")  # of a group: what a plan does not hold


class Options(NamedTuple):
    """How the kernel is compiled that steps a tensor."""

    tiles: bool
    LOW_BITS: int
    RANDOM: bool
    GRAD: int
    KEPT: int
    WHERE: int
    RULE: int
    ALIGN: int


class Plan:
    """What stays from step to step of some tensors of a call, at `places`, whose numbers are the same."""

    def __init__(self, rows: list[tuple], places: list[int], kinds: list[Kind], group: dict[str, Any]):
        self.places, self.kinds = places, kinds
        mine, weights, grads, states = (list(values) for values in zip(*(rows[i] for i in places), strict=True))
        self.looks = looks(weights) + looks(grads)
        self.device = weights[0].device
        held = [(i, key) for i, state in enumerate(states) for key in STATE if key in state]
        self.keys, self.held = [(places[i], key) for i, key in held], [states[i][key] for i, key in held]
        self.sizes = [len(state) for state in states]
        self.counts = any(STATE[key] in (STEP, ROUNDS) for _, key in held)
        self.cells = np.array([i * FIELDS + STATE[key] for i, key in held], np.int64)
        self.ticks, self.left = Ticks(), float("inf")
        if "gap" in group and not kinds[0].plain:
            names = [guard.name_of(part) for part in mine]
            self.left = min(map(steps_to_refresh, names, states, [group] * len(mine)))
            for state in states:
                follow(state["step"], self.ticks)
        self.indices = slots(weights, states, kinds)
        self.table = np.stack([row_of(*row, group) for row in zip(mine, weights, states, kinds, strict=True)])
        self.table[:, INDEX] = addresses(self.indices)
        self.options = options_of(weights, grads, states, kinds, group)
        self.launches: dict[bytes, list[tuple[Options, int, Tensor]]] = {}  # by which tensors are aligned
        self.numbers = torch.empty(len(places), 4, dtype=torch.float32, device=self.device)
        self.hashed = torch.empty(len(places), 2, dtype=torch.int64, device=self.device)
        self.one, self.books = torch.ones((), device=self.device), books(self.device, fake_mode(weights[0]))
        self.last = np.empty(0, np.int64)
        self.fill(weights, grads)

    def fits(self, weights: list[Tensor], grads: list[Tensor], states: list[State]) -> bool:
        """Whether all is as it was when the plan was made, and no refresh is due."""
        if self.left <= 0:
            return False
        if [len(states[i]) for i in self.places] != self.sizes:
            return False
        if not all(map(operator.is_, [states[i].get(key) for i, key in self.keys], self.held)):
            return False
        return looks(self.mine(weights)) + looks(self.mine(grads)) == self.looks

    def mine(self, values: list[Tensor]) -> list[Tensor]:
        return values if len(values) == len(self.places) else [values[i] for i in self.places]

    def step(self, weights: list[Tensor], grads: list[Tensor], group: dict[str, Any], scale: Tensor | None) -> None:
        from thriftlab.kernels import fused_step as kernels

        launches = self.fill(self.mine(weights), self.mine(grads))
        n, applied = self.kinds[0].numbers(group), group.get("applied")
        scale = self.one if scale is None else scale.to(self.device, torch.float32)
        applied = self.one if applied is None else applied.to(self.device, torch.float32)
        beta1, beta2 = n.betas
        if self.counts:
            kernels.begin_step[(-(-len(self.table) // LANES),)](
                self.there, self.numbers, self.hashed, applied, len(self.table), n.lr, beta1, beta2,
                PLAIN=self.kinds[0].plain, EARLY_EPS=n.early_eps, LANES=LANES, enable_fp_fusion=False,
            )  # fmt: skip
        for options, kinds, items in launches:
            arguments = (
                self.there, self.numbers, self.hashed, items, self.books, scale, applied,
                n.keep, beta2, 1 - beta1, 1 - beta2, n.eps, n.free_lr,
            )  # fmt: skip
            words = {**options._asdict(), "enable_fp_fusion": False}
            if words.pop("tiles"):
                sizes = {"DOWN": TILE[0], "ACROSS": TILE[1]}
                kernels.step_tiles[(len(items),)](*arguments, **words, **sizes)
            else:
                kernels.step_entries[(len(items),)](*arguments, **words, KINDS=kinds, ENTRIES=ENTRIES)
        self.left -= 1
        self.ticks.count(applied is self.one)

    def fill(self, weights: list[Tensor], grads: list[Tensor]) -> list[tuple[Options, int, Tensor]]:
        """Copies the table to the device if anything lies elsewhere than in the last step. Returns the options, the
        kinds of items and the items of each launch, which depend on what begins at multiples of 16 bytes."""
        self.table[:, W], self.table[:, G] = addresses(weights), addresses(grads)
        self.table.reshape(-1)[self.cells] = addresses(self.held)
        if not np.array_equal(self.table, self.last):
            self.last = self.table.copy()
            self.there = sent(self.last, self.device)
        aligned = (self.table[:, [W, LOW, G, M, V]] % 16 == 0).all(1)
        if (key := aligned.tobytes()) not in self.launches:
            rows: dict[Options, list[int]] = {}
            for i, options in enumerate(self.options):
                wide = aligned[i] and self.table[i, WIDTH if options.tiles else SIZE] % 16 == 0
                rows.setdefault(options._replace(ALIGN=16 if wide else 1), []).append(i)
            found = [(options, self.items(options, some)) for options, some in rows.items()]
            self.launches[key] = [
                (options, kinds_in(items), sent(items, self.device)) for options, items in found if len(items)
            ]
        return self.launches[key]

    def items(self, options: Options, rows: list[int]) -> np.ndarray:
        """(tensor, block, kind, 0) of each program  # [programs, 4]"""
        found = [np.empty((0, 4), np.int32)]
        for i in rows:
            kind, size, width, chosen = self.kinds[i], *(int(x) for x in self.table[i, [SIZE, WIDTH, CHOSEN]])
            moments = {ALL: size, ROWS: chosen * width, COLUMNS: size // width * chosen, NOTHING: 0}[kind.where]
            if options.tiles:
                found.append(blocks(i, -(-(size // width) // TILE[0]) * -(-width // TILE[1]), 0))
                continue
            found.append(blocks(i, -(-moments // ENTRIES), 0))
            if moments < size and not kind.still:
                found.append(blocks(i, -(-size // ENTRIES), 1))
        return np.concatenate(found)


def addresses(tensors: list[Tensor]) -> list[int]:
    return [t.data_ptr() for t in tensors]


def blocks(row: int, count: int, kind: int) -> np.ndarray:
    items = np.zeros((count, 4), np.int32)
    items[:, 0], items[:, 1], items[:, 2] = row, np.arange(count), kind
    return items


def kinds_in(items: np.ndarray) -> int:
    """0 or 1 where all items are of this kind, 2 where both occur."""
    kinds = set(items[:, 2].tolist())
    return kinds.pop() if len(kinds) == 1 else 2


def looks(tensors: list[Tensor]) -> list[list[Any]]:
    """What has to be as it was, of every tensor."""
    shapes, dtypes, devices = [t.shape for t in tensors], [t.dtype for t in tensors], [t.device for t in tensors]
    return [shapes, dtypes, devices, [t.is_contiguous() for t in tensors]]


def lasting(group: dict[str, Any]) -> dict[str, Any]:
    return {key: x for key, x in group.items() if key not in PASSING and not isinstance(x, Tensor)}


def row_of(part: str | Fragment, weight: Tensor, state: State, kind: Kind, group: dict[str, Any]) -> np.ndarray:
    """What of a tensor's row of the table does not change."""
    row = np.zeros(FIELDS, np.int64)
    row[SIZE], row[WIDTH] = weight.numel(), weight.shape[-1] if weight.ndim else 1
    row[CHOSEN] = len(state["basis.index"]) if kind.where in (ROWS, COLUMNS) else 0
    row[FIRST_W] = part.start if isinstance(part, Fragment) else 0
    row[FIRST_V] = int(state.get("whole.first", 0))
    row[SEED_V] = int(state.get("rounding", 0))
    if few_bits(weight, group):
        row[SEED_W] = keyed_seed(group["weight_seed"], f"{guard.name_of(part)}/weight", 0)
    return row


def options_of(
    weights: list[Tensor], grads: list[Tensor], states: list[State], kinds: list[Kind], group: dict[str, Any]
) -> list[Options]:
    kept = [KEPT[state[MOMENTS[0]].dtype] for state in states if MOMENTS[0] in state]  # alike, as a rule
    found = []
    for weight, grad, state, kind in zip(weights, grads, states, kinds, strict=True):
        few = few_bits(weight, group)
        own = KEPT[state[MOMENTS[0]].dtype] if kind.where != NOTHING else kept[0] if kept else 0
        tiles = kind.where in (ROWS, COLUMNS)
        if own == KEPT[torch.uint8]:
            tiles = kind.where == ROWS and weight.shape[1] % CODE_BLOCK == 0
        found.append(
            Options(
                tiles=tiles,
                LOW_BITS=LOW_BITS[group["weight_dtype"]] if few else -1,
                RANDOM=few and rounds_randomly(group),
                GRAD=KEPT[grad.dtype],
                KEPT=own,
                WHERE=kind.where if kind.where != NOTHING else ALL,
                RULE=FREE[kind.free],
                ALIGN=1,
            )
        )
    return found


def slots(weights: list[Tensor], states: list[State], kinds: list[Kind]) -> list[Tensor]:
    """Of each matrix with chosen rows or columns: these, ascending, and then of all of them their place among the
    chosen, or -1  # int32 [chosen + rows or columns]; of others empty. In a few launches for all."""
    device = weights[0].device
    chosen = [s["basis.index"] if k.where in (ROWS, COLUMNS) else None for s, k in zip(states, kinds, strict=True)]
    lines = [
        0 if index is None else weight.shape[0 if kind.where == ROWS else 1]
        for index, weight, kind in zip(chosen, weights, kinds, strict=True)
    ]
    sizes = [0 if index is None else len(index) + n for index, n in zip(chosen, lines, strict=True)]
    found = torch.full((sum(sizes),), -1, dtype=torch.int32, device=device)
    own, base, places, start = [], [], [], 0
    for index, size in zip(chosen, sizes, strict=True):
        if index is not None:
            places.append(np.arange(len(index)))
            own.append(start + places[-1])
            base.append(np.full(len(index), start + len(index)))
        start += size
    if own:
        index = torch.cat([i for i in chosen if i is not None])
        where, behind, place = (sent(np.concatenate(x).astype(np.int64), device) for x in (own, base, places))
        found[where] = index.int()
        found[behind + index] = place.int()
    return list(found.split(sizes))


def sent(array: np.ndarray, device: torch.device) -> Tensor:
    """An array on the device; the host does not wait for it."""
    here = torch.from_numpy(array)
    return here.clone() if device.type == "cpu" else here.pin_memory().to(device, non_blocking=True)


def fake_mode(tensor: Tensor) -> Any:
    return tensor.fake_mode if isinstance(tensor, FakeTensor) else None


@functools.lru_cache(8)
def books(device: torch.device, mode: Any) -> Tensor:
    """Of signed and of positive codes the 256 levels; from 256 on -inf and the borders between them; from 512 on where
    each decade begins, from 520 on how many levels it has for a unit  # fp32 [2, 1024]"""
    found = torch.full((2, 1024), torch.inf, dtype=torch.float32, device="cpu")
    decades = torch.arange(8, dtype=torch.float64, device="cpu")
    for positive in (0, 1):
        levels = codebook(bool(positive), "cpu")
        found[positive, :256] = levels
        found[positive, 256] = -torch.inf
        found[positive, 257:512] = (levels[1:] + levels[:-1]) / 2
        found[positive, 512:520] = (10 ** (decades - 7)).float()
        found[positive, 520:528] = (10 ** (6 - decades) * 2 ** (decades + positive) / 0.9).float()
    return found.to(device)
