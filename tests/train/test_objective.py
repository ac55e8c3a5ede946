"""What reaches the optimizer under a signal: the whole batch's objective, however the batch is split."""

import functools
import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from tests.tools import gang
from tests.tools import signal_equations as slow
from tests.tools.gradients import Gradients
from thriftlab.data.loader import Batch
from thriftlab.train import watch
from thriftlab.train.backends import make_backend
from thriftlab.train.feed import arrive
from thriftlab.train.model import GPT, ModelConfig
from thriftlab.train.objective import Objective, StepObjective, Weighted
from thriftlab.train.signals import SIGNALS
from thriftlab.train.step import train_step

ROWS, SEQ, DELIMITER = 8, 12, 3
CONFIG = ModelConfig(preset=None, dim=16, layers=1, heads=2, hidden=24, vocab_size=17, init_std=0.5)
NAMES = ("a", "b", "c", "d")  # the last is in no batch
SOURCE = torch.tensor([0, 1, 0, 2, 2, 1, 0, 0])
PROGRESS = 0.3


class Masked(GPT):
    """Takes windows in which -1 is a token that nobody has to predict."""

    def forward(self, inputs, targets=None, documents=None):
        return super().forward(inputs.clamp(min=0), targets, documents)


def batch_of(rank=0, world=1, seed=5):
    """Rows of very different numbers of targets; one has none."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(17, (ROWS, SEQ + 1), generator=draw)
    for row, first in enumerate([1, 9, 13, 4, 12, 1, 6, 2]):
        tokens[row, 1:first] = -1
    return Batch(tokens[rank::world], SOURCE[rank::world], torch.arange(ROWS)[rank::world])


def reference_of(batch):
    """Of every row by its number."""
    draw = torch.Generator().manual_seed(1)
    return (4 * torch.rand(ROWS, SEQ, generator=draw, dtype=torch.float64))[batch.sample]


def model_of(dtype=torch.float64):
    model = Masked(CONFIG).to(dtype)
    model.init_weights(0)
    return model


def reweight(strategy, r=0.4, **options):
    return lambda x: slow.reweighted(x.losses, x.mask, strategy, r, **options)


def doremi(x):
    alpha, _ = slow.doremi_alpha([1 / 4] * 4, [0.0] * 4, x.losses, x.mask, x.domain, x.reference, 1.0, 1e-3)
    return slow.of_domains(alpha, x.mask, x.domain)


# signal, its options, the papers' weights of every token and what their sum is divided by
CASES = {
    "uniform": ("uniform", {}, lambda x: (x.mask * 1.0, x.mask.sum())),
    "linupper": ("linupper", {}, reweight("linupper")),
    "quadratic": ("quadratic", {"r": 1.0}, reweight("quadratic", 1.0)),
    "extremes": ("extremes", {"r": 0.1}, reweight("extremes", 0.1)),
    "quantile": ("linupper", {"norm": "quantile", "tail": 0.2}, reweight("linupper", norm="quantile", tail=0.2)),
    "mad": ("extremes", {"norm": "mad"}, reweight("extremes", norm="mad")),
    "w_max": ("extremes", {"w_max": 1.1}, reweight("extremes", w_max=1.1)),
    "document": (
        "linupper", {"unit": "document"}, lambda x: slow.by_documents(x.losses, x.mask, x.documents, "linupper", 0.4)
    ),
    "focal": ("focal", {"gamma": 2.0, "detached": True}, lambda x: slow.focal(x.losses, x.mask, 2.0, True)),
    "rho1": ("rho1", {"reference": "-", "keep": 0.6}, lambda x: slow.rho1(x.losses, x.mask, x.reference, 0.6)),
    "doremi": ("doremi", {"reference": "-"}, doremi),
    "domains": (
        "domains", {"alpha": {"a": 3.0, "d": 2.0}}, lambda x: slow.of_domains([3.0, 1.0, 1.0, 2.0], x.mask, x.domain)
    ),
    "task": ("mftcoder", {"balance": "task"}, lambda x: slow.mftcoder(x.mask, x.domain, "task")),
    "sample": ("mftcoder", {"balance": "sample"}, lambda x: slow.mftcoder(x.mask, x.domain, "sample")),
    "task-sample": ("mftcoder", {"balance": "task-sample"}, lambda x: slow.mftcoder(x.mask, x.domain, "task-sample")),
    "coba": ("coba", {}, lambda x: slow.of_domains([0.25] * 4, x.mask, x.domain)),
    "famo": (
        "famo", {}, lambda x: slow.of_domains(slow.inverse_losses(x.losses, x.mask, x.domain, 4), x.mask, x.domain)
    ),
    "hard": ("curriculum", {"first": "hard"}, lambda x: slow.curriculum(x.losses, x.mask, PROGRESS, 0.5, "hard")),
}  # fmt: skip


def objective_of(case, **options):
    name, settings, _ = CASES[case]
    reference = reference_of if "reference" in settings else None
    return Objective(SIGNALS[name](**settings), NAMES, delimiter=DELIMITER, reference=reference, **options)


class Seen:
    """One batch as the papers see it: the losses of all rows at once, by autograd alone."""

    def __init__(self, model, seed=5):
        batch = batch_of(seed=seed)
        inputs, targets = batch.tokens[:, :-1], batch.tokens[:, 1:]
        logits = GPT.forward(model, inputs.clamp(min=0))
        losses = torch.nn.functional.cross_entropy(logits.mT, targets, ignore_index=-1, reduction="none")
        self.loss, self.parameters = losses, list(model.parameters())
        self.losses, self.mask = losses.detach().numpy(), (targets >= 0).numpy()
        self.domain, self.reference = SOURCE.numpy(), reference_of(batch).numpy()
        self.documents = (inputs == DELIMITER).cumsum(1).numpy()

    def gradient(self, weights, denominator):
        goal = (torch.from_numpy(weights) * self.loss).sum() / denominator
        return [g.numpy() for g in torch.autograd.grad(goal, self.parameters, retain_graph=True)]


def stepped(objective, sizes, seeds=(5,), dtype=torch.float64):
    return together([objective], sizes, seeds, dtype)[0]


def together(objectives, sizes, seeds=(5,), dtype=torch.float64):
    """For each objective and micro-batch size what the last step made of a fresh one: gradient, loss, record."""
    backend = make_backend("auto")
    found = [[last_step(backend, objective(), size, seeds, dtype) for size in sizes] for objective in objectives]
    backend.close()
    return found


def last_step(backend, objective, size, seeds, dtype):
    model = model_of(dtype)
    optimizer = Gradients(model.parameters())
    backend.prepare(model, optimizer)
    for step, seed in enumerate(seeds):
        objective.at(step, PROGRESS, watched=True)
        result = train_step(backend, batch_of(backend.rank, backend.world, seed), None, size, "fp32", None, objective)
    said = {key: value.tolist() for key, value in (result.weights or {}).items()}
    return [g.numpy() for g in optimizer.seen[-1]], result.loss, said


def every_case(sizes):
    return dict(zip(CASES, together([functools.partial(objective_of, case) for case in CASES], sizes), strict=True))


def near(got, exact, tolerance=1e-12):
    size = max(np.abs(g).max() for g in exact)
    return all(np.abs(a - b).max() <= tolerance * size for a, b in zip(got, exact, strict=True))


@pytest.fixture(scope="module")
def seen():
    return Seen(model_of())


@pytest.fixture(scope="module")
def found():
    """case -> [(gradient, loss, record)], over one and two ranks and micro-batches of every size."""
    alone, ranks = every_case([1, 2, 3, 8]), gang.ranks(2, every_case, [1, 2, 4])
    return {case: alone[case] + [part for rank in ranks for part in rank[case]] for case in CASES}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_one_objective_for_every_split(case, seen, found):
    exact = seen.gradient(*CASES[case][2](seen))
    uniform = seen.loss.detach().sum().item() / seen.mask.sum()
    assert len(found[case]) == 10
    for gradient, loss, _ in found[case]:
        assert near(gradient, exact), case
        assert loss == pytest.approx(uniform, rel=1e-12)  # the primary curve, whatever the signal


def test_the_cases_are_different_objectives(found):
    gradients = {case: np.concatenate([g.ravel() for g in found[case][0][0]]) for case in CASES}
    same = [
        (a, b)
        for a in CASES
        for b in CASES
        if a < b and np.abs(gradients[a] - gradients[b]).max() < 1e-6 * np.abs(gradients[a]).max()
    ]
    assert same == [("coba", "task")]  # as long as nothing was validated


def test_every_signal_is_tried_here():
    assert set(SIGNALS) == {name for name, _, _ in CASES.values()}


def test_the_gradient_of_the_focal_loss_is_that_of_autograd(seen):
    """Not detached: (1 - p)^2 times the loss, differentiated as a whole."""
    goal = ((-torch.expm1(-seen.loss)) ** 2 * seen.loss).sum() / seen.mask.sum()
    exact = [g.numpy() for g in torch.autograd.grad(goal, seen.parameters, retain_graph=True)]
    found = stepped(lambda: Objective(SIGNALS["focal"](gamma=2.0), NAMES), [1, 3])
    assert all(near(gradient, exact) for gradient, _, _ in found)


def lagged():
    return objective_of("linupper", statistics="lagged")


@pytest.mark.slow
def test_lagged_statistics_are_those_of_the_step_before(seen):
    before = [mean for mean, n in slow.row_means(Seen(model_of(), seed=2).losses, seen.mask) if n]
    means = slow.row_means(seen.losses, seen.mask)
    f = [slow.f_of("linupper", mean, min(before), max(before)) if n else 0.0 for mean, n in means]
    weights = np.exp(np.array(f) / 0.4)[:, None] * seen.mask
    exact, uniform = seen.gradient(weights, weights.sum()), seen.gradient(seen.mask * 1.0, seen.mask.sum())
    alone = [stepped(lagged, [1, 3, 8], seeds) for seeds in ((2, 5), (5,))]
    pairs = [gang.ranks(2, stepped, lagged, [2, 4], seeds) for seeds in ((2, 5), (5,))]
    for results in [alone[0], *pairs[0]]:
        assert all(near(gradient, exact) for gradient, _, _ in results)
    for results in [alone[1], *pairs[1]]:
        assert all(near(gradient, uniform) for gradient, _, _ in results)  # in the first step
    assert not near(exact, uniform, 1e-3)


def parity():
    return objective_of("linupper", statistics="parity")


def of_one_rank():
    return objective_of("linupper", statistics="rank")


def in_parts(seen, parts):
    """The published objective: weights within each part, which counts as much as it has tokens."""
    weights = np.zeros(seen.mask.shape)
    for rows in parts:
        mask = seen.mask[rows]
        if mask.any():
            w, total = slow.reweighted(seen.losses[rows], mask, "linupper", 0.4)
            weights[rows] = w * mask.sum() / total
    return seen.gradient(weights, seen.mask.sum())


def test_parity_is_the_published_objective_and_depends_on_the_split(seen, found):
    halves, quarters = ([list(range(i, i + n)) for i in range(0, 8, n)] for n in (4, 2))
    four, two = stepped(parity, [4, 2])
    assert near(four[0], in_parts(seen, halves)) and near(two[0], in_parts(seen, quarters))
    for rank in gang.ranks(2, stepped, parity, [2]):
        assert near(rank[0][0], in_parts(seen, halves))  # over all ranks
    for rank in gang.ranks(2, stepped, of_one_rank, [2]):
        assert near(rank[0][0], in_parts(seen, [[0, 2], [4, 6], [1, 3], [5, 7]]))
    assert not near(four[0], two[0], 1e-3) and not near(four[0], found["linupper"][0][0], 1e-3)


def shuffled():
    return objective_of("linupper", shuffle=True, seed=3)


def test_the_shuffled_control_does_not_depend_on_the_split(found):
    pair = gang.ranks(2, stepped, shuffled, [2, 4])
    results = stepped(shuffled, [1, 3, 8]) + pair[0] + pair[1]
    assert all(near(gradient, results[0][0]) for gradient, _, _ in results)
    assert not near(results[0][0], found["linupper"][0][0], 1e-3)


def test_the_shuffled_control_has_the_same_weights_in_other_rows():
    backend, objective, tokens = make_backend("single"), shuffled(), batch_of().tokens
    backend.prepare(model_of(), Gradients(model_of().parameters()))
    objective.at(0, PROGRESS)
    of_step = objective.begin(backend, arrive(batch_of(), backend.device), tokens[:, :-1], tokens[:, 1:])
    orders = set()
    for step in range(3):
        objective.at(step, PROGRESS)
        rows = of_step.shuffled(torch.arange(ROWS)[:, None]).flatten().tolist()
        assert sorted(rows) == list(range(ROWS)) and all(row != i for i, row in enumerate(rows))
        orders.add(tuple(rows))
    assert len(orders) == 3


def test_one_gather_and_one_sum_a_step(monkeypatch):
    """One small all-gather a step, and one sum; with weights of domains one more, of their tokens."""
    backend = make_backend("single")
    for case in CASES:
        for mode in ("exact", "lagged"):
            calls = {"gather": 0, "sum": 0}

            def counted(name, original, calls=calls):
                def call(tensor):
                    calls[name] += 1
                    return original(tensor)

                return call

            model, made = model_of(), objective_of(case, statistics=mode)
            backend.prepare(model, Gradients(model.parameters()))
            for name in calls:
                monkeypatch.setattr(backend, name, counted(name, getattr(type(backend), name).__get__(backend)))
            made.at(0, PROGRESS)
            train_step(backend, batch_of(), None, 2, "fp32", None, made)
            assert calls["gather"] <= 1, case
            assert calls["sum"] <= 1 + (made.signal.unit == "domain"), case
            monkeypatch.undo()


class NoWaiting(TorchDispatchMode):
    """Nobody may ask for the value of a tensor, or for a tensor whose size depends on one: on a GPU the host would
    stand still."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "_unique2")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in self.WAITING, "a value was asked for"
        if func.overloadpacket.__name__ in ("index", "index_put_", "index_put"):
            assert not any(i is not None and i.dtype == torch.bool for i in args[1]), "an index depends on values"
        return func(*args, **(kwargs or {}))


def loudly(original):
    def call(tensor):
        assert not isinstance(_get_current_dispatch_mode(), NoWaiting), "a value was asked for"
        return original(tensor)

    return call


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["exact", "lagged", "parity"])
@pytest.mark.parametrize("case", CASES)
def test_no_value_is_waited_for(case, mode, monkeypatch):
    entries = [(StepObjective, name) for name in ("__init__", "total", "finish")]
    for owner, name in [*entries, *((Weighted, name) for name in ("__init__", "settle", "total"))]:
        original = getattr(owner, name)

        def quiet(*args, original=original):
            with NoWaiting():
                return original(*args)

        monkeypatch.setattr(owner, name, quiet)
    for name in ("tolist", "numpy"):  # which ask behind the dispatcher's back
        monkeypatch.setattr(torch.Tensor, name, loudly(getattr(torch.Tensor, name)))
    objective = objective_of(case, statistics=mode)
    steps_of(objective, [batch_of(), batch_of(seed=6)], 4)


def test_uniform_is_bitwise_the_mean_loss():
    def uniform():
        return objective_of("uniform")

    ((gradient, loss, said),) = stepped(uniform, [3], dtype=torch.float32)
    ((bare, bare_loss, _),) = stepped(Bare, [3], dtype=torch.float32)
    assert loss == bare_loss and not said
    assert all((a == b).all() for a, b in zip(gradient, bare, strict=True))


class Bare:
    """The mean loss and nothing else."""

    waits, idle = False, True

    def at(self, *_, **__):
        pass

    def begin(self, backend, batch, inputs, targets, ahead=None):
        self.denominator = (targets >= 0).sum().double()
        self.loss = torch.zeros((), dtype=torch.float64)
        return self

    def total(self, token_loss, rows):
        self.loss += token_loss.detach().sum()
        return token_loss.sum()

    def finish(self):
        return self.loss, self.denominator, self.denominator, self.loss[None][:0], None


# ------------------------------------------------------------------------------------------------------------- edges


def steps_of(objective, batches, size, spoiled=None):
    """Results, gradients and the objective after one process has gone through these batches; `spoiled` is the number of
    a row whose losses are no numbers in the first of them."""
    backend, model = make_backend("single"), model_of()
    optimizer = Gradients(model.parameters())
    backend.prepare(model, optimizer)
    results = []
    for step, batch in enumerate(batches):
        hook = None
        if step == 0 and spoiled is not None:
            row = batch.tokens[spoiled, :-1]
            hook = model.register_forward_hook(
                lambda _, given, out, row=row: torch.where((given[0] == row).all(1, keepdim=True), torch.nan, out)
            )
        objective.at(step, PROGRESS, watched=True)
        results.append(train_step(backend, batch, None, size, "fp32", None, objective))
        if hook:
            hook.remove()
    return results, [[g.numpy() for g in step] for step in optimizer.seen], objective


@pytest.mark.parametrize("mode", ["exact", "lagged"])
@pytest.mark.parametrize("case", CASES)
def test_a_row_that_is_no_number_spoils_its_step_and_no_other(case, mode):
    batches = [batch_of(seed=2), batch_of()]
    results, gradients, _ = steps_of(objective_of(case, statistics=mode), batches, 3, spoiled=0)
    assert [result.applied for result in results] == [False, True]
    assert len(gradients) == 1 and all(np.isfinite(g).all() for g in gradients[0])


def test_statistics_leave_out_a_row_that_is_no_number(seen):
    """Lagged, minimum and maximum are those of the other rows of the step before; so is DoReMi's excess."""
    before = Seen(model_of(), seed=2)
    before.mask[0] = False
    batches = [batch_of(seed=2), batch_of()]
    _, gradients, _ = steps_of(lagged(), batches, 3, spoiled=0)
    means = [mean for mean, n in slow.row_means(before.losses, before.mask) if n]
    f = [
        slow.f_of("linupper", mean, min(means), max(means)) if n else 0.0
        for mean, n in slow.row_means(seen.losses, seen.mask)
    ]
    weights = np.exp(np.array(f) / 0.4)[:, None] * seen.mask
    assert near(gradients[0], seen.gradient(weights, weights.sum()))
    _, _, objective = steps_of(objective_of("doremi"), batches[:1], 3, spoiled=0)
    alpha, _ = slow.doremi_alpha(
        [1 / 4] * 4, [0.0] * 4, before.losses, before.mask, before.domain, before.reference, 1.0, 1e-3
    )
    assert objective.state["alpha"].tolist() == pytest.approx(list(alpha), rel=1e-12)


BY_LOSS = ("linupper", "quadratic", "extremes", "quantile", "mad", "w_max", "hard")


@pytest.mark.parametrize("mode", ["exact", "parity"])
@pytest.mark.parametrize("case", BY_LOSS)
def test_one_row_and_equal_rows_are_the_mean_loss(case, mode):
    one = batch_of()
    one.tokens[1:, 1:] = -1
    equal = batch_of()
    equal.tokens[:] = equal.tokens[0]
    for batch in (one, equal):
        (uniform,) = steps_of(objective_of("uniform"), [batch], 3)[1]
        (gradient,) = steps_of(objective_of(case, statistics=mode), [batch], 3)[1]
        factor = (1 + PROGRESS / 0.5) / 2 if case == "hard" else 1.0  # D = 1/2, and a denominator that has no weights
        assert near(gradient, [factor * g for g in uniform], 1e-9), case


@pytest.mark.parametrize("mode", ["exact", "lagged"])
@pytest.mark.parametrize("case", CASES)
def test_a_batch_without_targets_is_no_step(case, mode):
    batch = batch_of()
    batch.tokens[:, 1:] = -1
    results, gradients, _ = steps_of(objective_of(case, statistics=mode), [batch, batch_of()], 3)
    assert [result.applied for result in results] == [False, True]
    assert all(np.isfinite(g).all() for g in gradients[0])


@pytest.mark.parametrize("mode", ["exact", "lagged", "parity"])
@pytest.mark.parametrize("case", CASES)
def test_a_source_without_targets_spoils_nothing(case, mode):
    """Its rows are in the batch, and in micro-batches of their own, and count for nothing."""
    batch = batch_of()
    batch.tokens[SOURCE == 1, 1:] = -1
    for size in (1, 3):
        (result,), (gradient,), _ = steps_of(objective_of(case, statistics=mode), [batch], size)
        assert result.applied and all(np.isfinite(g).all() for g in gradient)
        assert all(tensor.isfinite().all() for tensor in (result.weights or {}).values())


def test_famo_lagged_takes_an_absent_sources_last_held_out_loss():
    objective = objective_of("famo", statistics="lagged")
    objective.validated(torch.tensor([2.0, 3.0, 4.0, 5.0], dtype=torch.float64))
    without = batch_of(seed=2)
    without.tokens[SOURCE == 1, 1:] = -1
    _, (_, gradient), _ = steps_of(objective, [without, batch_of()], 3)
    seen, before = Seen(model_of()), Seen(model_of(), seed=2)
    before.mask[SOURCE.numpy() == 1] = False
    alpha = slow.inverse_losses(before.losses, before.mask, before.domain, 4)
    alpha[1] = 1 / 3.0
    assert near(gradient, seen.gradient(*slow.of_domains(alpha, seen.mask, seen.domain)))


@pytest.mark.parametrize("name", ["famo", "coba"])
def test_a_held_out_loss_that_is_no_number_says_nothing(name):
    one, other = (
        Objective(SIGNALS[name](**({"window": 20, "warmup": 0} if name == "coba" else {})), NAMES) for _ in range(2)
    )
    draw = torch.Generator().manual_seed(0)
    for step in range(8):
        losses = 3 + torch.rand(4, generator=draw, dtype=torch.float64)
        for objective in (one, other):
            objective.at(10 * step, 0.1)
            objective.validated(losses)
        for bad in (torch.inf, torch.nan):
            one.validated(torch.tensor([1.0, bad, 1.0, 1.0], dtype=torch.float64))
    assert all(torch.equal(one.tensors()[key], tensor) for key, tensor in other.tensors().items())
    assert all(tensor.isfinite().all() for tensor in one.report().values())


@pytest.mark.parametrize("case", [case for case in CASES if case != "uniform"])
def test_what_is_recorded_of_the_weights(case, seen, found):
    weights, total = CASES[case][2](seen)
    relative = weights * seen.mask.sum() / weights.sum()
    for _, _, said in found[case]:
        assert said["loss"] == pytest.approx((weights * seen.losses).sum() / total, rel=1e-9)
        assert said["ess"] == pytest.approx(1 / np.mean(relative[seen.mask] ** 2), rel=1e-6)
        assert said["largest"] == pytest.approx(relative.max(), rel=1e-6)
        share = [weights[seen.domain == k].sum() / weights.sum() for k in range(4)]
        assert said["share"] == pytest.approx(share, rel=1e-6)
        edges = [-1.0, *watch.EDGES, np.inf]
        histogram = np.histogram(relative[seen.mask], edges)[0] / seen.mask.sum()
        assert said["histogram"] == pytest.approx(histogram, abs=1.01 / seen.mask.sum())  # one may lie on an edge
        assert math.isclose(sum(said["histogram"]), 1)
