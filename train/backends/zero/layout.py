"""Where DeepSpeed keeps which entry of which parameter, read from its engine and verified; and what is refused.

ZeRO-1 and -2 lay the parameters of a group one after the other and cut the row into as many equal parts as there are
ranks; ZeRO-3 cuts every parameter by itself. Either way the optimizer is handed one flat tensor. Which parameters lie
in it, DeepSpeed writes in fields that are not public. So its version is pinned, and before the first step every rank
compares what it holds with the model's weights, and all ranks together whether every entry is held exactly once.

One surprise: of the two places that tell, `param._hp_mapping` looks official and is wrong under round_robin_gradients.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thriftlab.data.errors import BackendError
from thriftlab.optim.core.fragments import Fragment
from thriftlab.train.backends.pieces import gaps

VERSION = "0.19.8"
FIELDS = {  # of DeepSpeed's optimizer, by its type: what is read here
    "DeepSpeedZeroOptimizer": (
        "single_partition_of_fp32_groups", "round_robin_bit16_groups", "round_robin_bit16_offsets",
        "real_dp_process_group", "averaged_gradients", "update_lp_params",
    ),
    "DeepSpeedZeroOptimizer_Stage3": (
        "fp32_partitioned_groups_flat", "fp16_groups", "dp_process_group", "averaged_gradients",
        "persistent_parameters", "_partition_all_parameters", "_reassign_or_swap_out_partitioned_parameters",
    ),
}  # fmt: skip


class Layout(NamedTuple):
    """What this rank holds: fragments of parameters, each at a position of the flat master weights."""

    flat: Tensor  # [entries of this rank, and padding]
    places: dict[str, tuple[Fragment, int]]  # by name: the fragment, and where it begins in `flat`

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of a tensor that is laid out like the master weights (or of them), by name."""
        return {name: flat[at : at + f.stop - f.start] for name, (f, at) in self.places.items()}


def refuse(engine: Any) -> None:
    """BackendError for what an engine does that would make the result wrong, or that nobody has proved right."""
    wrapper, version = type(engine.optimizer).__name__, deepspeed_version()
    config, zero = engine._config, engine._config.zero_config
    offloads = [part.device for part in (zero.offload_optimizer, zero.offload_param) if part is not None]
    unknown = wrapper not in FIELDS and engine.optimizer is not engine.basic_optimizer
    few_bits = config.bfloat16_config.enabled or config.float16_config.enabled
    for wrong, what, instead in (
        (version != VERSION, f"version {version}", f"install the one whose layout is known: deepspeed=={VERSION}"),
        (engine.has_moe_layers, "a mixture of experts", "use a dense model"),
        (any(device != "none" for device in offloads), "offloading", "use a higher stage, or a method with less state"),
        (config.load_universal_checkpoint, "a universal checkpoint", "it has lost the state; resume the run itself"),
        (zero.round_robin_gradients, "round_robin_gradients", "leave it out"),
        (zero.zero_hpz_partition_size > 1, "a second partition (hpZ)", "leave it out"),
        (zero.zero_quantized_gradients or zero.zero_quantized_weights, "quantised communication", "leave it out"),
        (engine.mpu is not None or engine.sequence_parallel_size > 1, "model or sequence parallelism", "use neither"),
        (few_bits, "the bf16 or fp16 section", "keep fp32 weights, and use torch_autocast for bf16"),
        (unknown, f"its {wrapper}", "keep fp32 weights, and use torch_autocast for bf16"),
    ):
        if wrong:
            raise BackendError(f"{what} of DeepSpeed cannot be used here; {instead}")
    for field in FIELDS.get(wrapper, ()):
        if not hasattr(engine.optimizer, field):
            raise BackendError(f"DeepSpeed's {wrapper} has no {field}; install deepspeed=={VERSION} unchanged")


def deepspeed_version() -> str:
    import deepspeed

    return deepspeed.__version__


def read_layout(zero: Any, names: dict[int, str]) -> Layout:
    """The layout of a ZeRO optimizer with one group. `names` are those of the parameters, by id."""
    if type(zero).__name__ == "DeepSpeedZeroOptimizer_Stage3":
        flats, found = zero.fp32_partitioned_groups_flat, cut_one_by_one(zero)
    else:
        flats, found = zero.single_partition_of_fp32_groups, cut_in_a_row(zero)
    if len(flats) != 1:
        raise BackendError(f"DeepSpeed made {len(flats)} groups of parameters; they must be one (see sub_group_size)")
    places = {}
    for p, shape, start, stop, at in found:
        if start < stop:
            places[names[id(p)]] = (Fragment(names[id(p)], tuple(shape), start, stop), at)
    return Layout(flats[0], places)


def cut_in_a_row(zero: Any) -> Iterator[tuple]:
    """ZeRO-1 and -2: (parameter, shape, start, stop, position in the flat partition)."""
    size = zero.single_partition_of_fp32_groups[0].numel()
    low = torch.distributed.get_rank(zero.real_dp_process_group[0]) * size
    for p, offset in zip(zero.round_robin_bit16_groups[0], zero.round_robin_bit16_offsets[0], strict=True):
        start, stop = max(low - offset, 0), min(low + size - offset, p.numel())
        yield p, p.shape, start, stop, offset + start - low


def cut_one_by_one(zero: Any) -> Iterator[tuple]:
    """ZeRO-3: (parameter, shape, start, stop, position in the flat partition)."""
    rank, at = torch.distributed.get_rank(zero.dp_process_group), 0
    for p in zero.fp16_groups[0]:
        size = p.partition_numel()
        yield p, p.ds_shape, rank * size, min((rank + 1) * size, p.ds_numel), at
        at += size


def verify(
    layout: Layout,
    shapes: dict[str, tuple[int, ...]],
    values: Callable[[str], Tensor],
    share: Callable[[Any], list[Any]],
) -> list[list[Fragment]]:
    """What every rank holds, by rank. BackendError, on all ranks, where an entry is held twice or by nobody, or is not
    the model's.

    Args:
        shapes: of the parameters, by name.
        values: of a whole parameter, flat; collective, and called in the order of `shapes`.
        share: collects the values of all ranks.
    """
    wrong = []
    flat = layout.views(layout.flat)
    for name in shapes:
        whole = values(name)
        if name in layout.places:
            fragment, _ = layout.places[name]
            if not torch.equal(flat[name].to(whole.dtype), whole[fragment.start : fragment.stop]):
                wrong.append(f"{name!r}: entries {fragment.start} to {fragment.stop} are not the model's")
    said = share(([fragment for fragment, _ in layout.places.values()], wrong))
    held = [fragments for fragments, _ in said]
    wrong = [text for _, texts in said for text in texts]
    for name, shape in shapes.items():
        ranges = [(f.start, f.stop) for fragments in held for f in fragments if f.name == name]
        if gap := gaps(ranges, torch.Size(shape).numel()):
            wrong.append(f"{name!r}: {gap}")
    if strangers := {f.name for fragments in held for f in fragments} - shapes.keys():
        wrong.append(f"{sorted(strangers)[:3]} are not parameters of the method")
    if wrong:
        raise BackendError(f"DeepSpeed's layout is not as expected, so nothing was trained: {'; '.join(wrong[:3])}")
    return held
