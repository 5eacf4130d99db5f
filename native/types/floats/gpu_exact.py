"""F32, F16 and BF16 multiply float32 activations: `native.gpu.exact` adds them up as they are."""

VALUES = {"F32": None, "F16": None, "BF16": None}
