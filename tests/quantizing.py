"""What the tests of quantized files share."""

import torch

import fxcompress as fxc

ENGINES = {"onnxruntime": ".onnx", "openvino": ".xml"}


def quantized(model, x, target, options=""):
    torch.manual_seed(0)
    program = fxc.trace(model.eval(), x)
    pipeline = f"fold-batchnorm,insert-qdq{{target={target} {options}}}"
    return fxc.PassManager(pipeline).run(program, fxc.Task(calibration=[x])).program
