"""lotion_fx: quantization-aware training by smoothing the quantized loss, in the compiler.

model = lotion_fx.transform(model, fmt="nvfp4")     # then train as before
"""

from lotion_fx import noise, optim, riding, rounding
from lotion_fx.adaptive_rounding import AdaptiveRounding, round_
from lotion_fx.calibration import calibrate
from lotion_fx.coverage import CoverageReport, report
from lotion_fx.deploy.exporting import Exported, export
from lotion_fx.deploy.loading import load
from lotion_fx.deploy.packed_model import quantize
from lotion_fx.deploy.verifying import Verification, verify
from lotion_fx.deploy.weights import QuantizedWeight, quantized
from lotion_fx.diagnostics import Diagnosis, RoundingDiagnosis, diagnose
from lotion_fx.distillation import distillation_loss
from lotion_fx.expected import ExpectedLoss, expected_loss
from lotion_fx.explanation import Explanation, explain, log_as_asked
from lotion_fx.numerics.formats import Format, codebook, formats, register_format, resolve
from lotion_fx.numerics.noise import NoiseLaw, noises, register_noise
from lotion_fx.objective import penalty
from lotion_fx.optimizer_hooks import apply_term
from lotion_fx.passes.registered import register_contraction
from lotion_fx.presets import preset
from lotion_fx.saved import load_state_dict, state_dict
from lotion_fx.suggestion import Suggestion, suggest
from lotion_fx.switches import finish, full_precision, hold_codes, randomized
from lotion_fx.transformation import training_loss, transform

log_as_asked()
riding.watch()

__version__ = "0.2.0"
__all__ = [
    "AdaptiveRounding",
    "CoverageReport",
    "Diagnosis",
    "ExpectedLoss",
    "Explanation",
    "Exported",
    "Format",
    "NoiseLaw",
    "QuantizedWeight",
    "RoundingDiagnosis",
    "Suggestion",
    "Verification",
    "apply_term",
    "calibrate",
    "codebook",
    "diagnose",
    "distillation_loss",
    "expected_loss",
    "explain",
    "export",
    "finish",
    "formats",
    "full_precision",
    "hold_codes",
    "load",
    "load_state_dict",
    "noise",
    "noises",
    "optim",
    "penalty",
    "preset",
    "quantize",
    "quantized",
    "randomized",
    "register_contraction",
    "register_format",
    "register_noise",
    "report",
    "resolve",
    "round_",
    "rounding",
    "state_dict",
    "suggest",
    "training_loss",
    "transform",
    "verify",
]
