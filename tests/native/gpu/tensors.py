"""numpy to a device and back, and rows that lie apart as views of larger buffers do."""

import numpy as np
import torch


def on(device: torch.device, array: np.ndarray, dtype: torch.dtype | None = None) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array)).to(device)
    return tensor if dtype is None else tensor.to(dtype)


def apart(device: torch.device, rows: np.ndarray, gap: int = 6) -> torch.Tensor:
    """uint8 (..., row_bytes) whose rows are `gap` bytes of 0xAB apart."""
    wide = np.full((*rows.shape[:-1], rows.shape[-1] + gap), 0xAB, np.uint8)
    wide[..., : rows.shape[-1]] = rows
    return on(device, wide)[..., : rows.shape[-1]]


def back(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().double().numpy()


def seen(x: torch.Tensor) -> np.ndarray:
    """float32 of the values that a kernel gets."""
    return x.detach().cpu().float().numpy()
