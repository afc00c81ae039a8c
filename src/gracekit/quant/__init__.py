"""Learned group-wise integer weights: train them, run them on a kernel, ship them."""

from gracekit._coverage import Coverage
from gracekit.quant.coverage import coverage
from gracekit.quant.deploy import convert, quantize_rtn
from gracekit.quant.formats.awq import export_awq
from gracekit.quant.formats.compressed_tensors import export_compressed_tensors
from gracekit.quant.formats.sidecar import import_grace_sidecar
from gracekit.quant.formats.trained import load_qat, save_qat
from gracekit.quant.lsq import LSQFakeQuantizer, lsq_fake_quantize
from gracekit.quant.qat import prepare_qat, qat_parameter_groups
from gracekit.quant.scheme import LSQConfig
from gracekit.quant.sharding import fully_shard_qat

__all__ = [
    "Coverage",
    "LSQConfig",
    "LSQFakeQuantizer",
    "convert",
    "coverage",
    "export_awq",
    "export_compressed_tensors",
    "fully_shard_qat",
    "import_grace_sidecar",
    "load_qat",
    "lsq_fake_quantize",
    "prepare_qat",
    "qat_parameter_groups",
    "quantize_rtn",
    "save_qat",
]
