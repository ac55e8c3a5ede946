"""What a backend and a configuration cannot do together, known without data and model, in a line each."""

from thriftlab.data.errors import BackendError, ConfigError
from thriftlab.kernels import dispatch
from thriftlab.optim import LAYERS
from thriftlab.optim.layers.base import Layer
from thriftlab.train.backends.base import Backend
from thriftlab.train.config.schema import RunConfig
from thriftlab.train.probes.base import SHORTEST

WIDE = "fp32"


def refuse(config: RunConfig, backend: Backend) -> None:
    """UserError for what this backend cannot do, known without data and model."""
    config.train.rows_per_rank(backend.world)
    refuse_few_bits(config, backend)
    if config.train.matmul == "tf32" and backend.device.type == "cpu":
        raise ConfigError("train.matmul = tf32 is of GPUs, and this run is on a CPU; leave it out")
    if why := dispatch.impossible(dispatch.choice(), backend.device.type, config.train.precision):
        raise BackendError(why)
    if config.train.layerwise and not backend.can_layerwise:
        raise ConfigError(
            f"train.layerwise = true needs backend.name=single: with {backend.name!r} a gradient is complete only when "
            f"the ranks have met; start one process, or set train.layerwise=false"
        )
    if config.probes.every and config.data.sequence_length < SHORTEST:
        raise ConfigError(
            f"probes need windows of {SHORTEST} tokens at least, and data.sequence_length = "
            f"{config.data.sequence_length}; raise it, or set probes.every=0"
        )
    if not backend.whole_weights and LAYERS[config.layer.name].before_step is not Layer.before_step:
        raise ConfigError(
            f"layers of layer.name = {config.layer.name} change whole weights between steps, which under backend "
            f"{backend.name!r} no rank has; use backend.name=ddp or backend.name=owned"
        )


def refuse_few_bits(config: RunConfig, backend: Backend) -> None:
    """ConfigError or BackendError for what does not go together, known without data and model."""
    train = config.train
    weights, gradients = train.weights != WIDE, train.gradients != WIDE
    asked = [f"train.weights = {train.weights}"] * weights + [f"train.gradients = {train.gradients}"] * gradients
    if not asked:
        return
    if train.precision != "bf16":
        raise ConfigError(
            f"{asked[0]} is of a model whose products are made in bf16, and this run has train.precision = "
            f"{train.precision}; set train.precision=bf16"
        )
    rows = train.rows_per_rank(backend.world)
    if gradients and (train.micro_batch_size or 0) < rows:
        raise ConfigError(
            f"train.gradients = bf16 needs one micro-batch on a rank, for sums of several are fp32; set "
            f"train.micro_batch_size={rows}, or train.gradients=fp32"
        )
    if backend.why_fp32:
        raise BackendError(f"{asked[0]} is not possible with backend {backend.name!r}: {backend.why_fp32}")
    if backend.one_dtype and weights != gradients:
        raise BackendError(
            f"under backend {backend.name!r} a gradient has the dtype of its weight, and here they are "
            f"train.weights = {train.weights} and train.gradients = {train.gradients}; set "
            f"{'train.gradients=bf16' if weights else 'train.weights, too'}, or use backend.name=owned"
        )
