"""Optical flow between neighbouring frames: warping, occlusion, resizing, and two ways to estimate it.

A flow is (…, 2, H, W): channel 0 is x (columns), channel 1 is y (rows), in pixels of its own grid.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FlowFunction = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Frames (T, 3, H, W) in [0, 1] to the flows i → i+1 and i+1 → i, each (T-1, 2, H, W)."""

MIN_DIS = 32


class FlowError(ValueError):
    """Flow cannot be estimated; the message says what is missing."""


def warp(feature: Tensor, flow: Tensor) -> Tensor:
    """Samples `feature` where the flow points, bilinearly; outside it is zero.

    Args:
        feature: (B, C, H, W).
        flow: (B, 2, H, W).
    Returns:
        (B, C, H, W), feature at (x + flow_x, y + flow_y).
    """
    height, width = feature.shape[-2:]
    y, x = torch.meshgrid(
        torch.arange(height, dtype=flow.dtype, device=flow.device), torch.arange(width, dtype=flow.dtype, device=flow.device), indexing="ij"
    )
    grid_x = 2.0 * (x + flow[:, 0]) / max(width - 1, 1) - 1.0
    grid_y = 2.0 * (y + flow[:, 1]) / max(height - 1, 1) - 1.0
    grid = torch.stack([grid_x, grid_y], dim=-1)
    return F.grid_sample(feature, grid, mode="bilinear", padding_mode="zeros", align_corners=True)


def occlusion(forward: Tensor, backward: Tensor, alpha: float = 0.01, beta: float = 0.5) -> tuple[Tensor, Tensor]:
    """Pixels whose forward and backward flow do not cancel (arXiv 1711.07837, Eq. 1, with plain norms).

    Args:
        forward: (B, 2, H, W), frame a to b.
        backward: (B, 2, H, W), frame b to a.
    Returns:
        (B, H, W) of 1 (occluded) and 0 for frame a, and for frame b.
    """

    def occluded(there: Tensor, back: Tensor) -> Tensor:
        difference = (there + warp(back, there)).norm(dim=1)
        return (difference > alpha * magnitude + beta).to(there.dtype)

    magnitude = forward.norm(dim=1) + backward.norm(dim=1)
    return occluded(forward, backward), occluded(backward, forward)


def resize_flow(flow: Tensor, height: int, width: int) -> Tensor:
    """A flow on another grid: x and y are scaled with their side, then interpolated bilinearly (no antialias).

    Args:
        flow: (B, 2, H, W).
    Returns:
        (B, 2, height, width) in pixels of the new grid.
    """
    ratio = torch.tensor([width / flow.shape[-1], height / flow.shape[-2]], dtype=flow.dtype, device=flow.device)
    return F.interpolate(flow * ratio.view(1, 2, 1, 1), size=(height, width), mode="bilinear", align_corners=False)


def dis_flow(frames_TCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Dense inverse search (arXiv 1603.03590) through OpenCV, preset medium, on 8-bit grey frames; needs no weights.

    One thread: OpenCV cuts the image into as many stripes as it has threads, and the result depends on it.

    Args:
        frames_TCHW: (T, 3, H, W) in [0, 1].
    Returns:
        flows i → i+1 and i+1 → i, each (T-1, 2, H, W) float32 on the frames' device.
    """
    import cv2
    import numpy as np

    frames = frames_TCHW.detach().float().cpu().clamp(0, 1)
    # The search needs patches of 8 on several scales; small frames are extended, which leaves the flow inside as it is.
    height, width = frames.shape[-2:]
    frames = F.pad(frames, (0, max(MIN_DIS - width, 0), 0, max(MIN_DIS - height, 0)), "replicate")
    images = [
        cv2.cvtColor(np.ascontiguousarray((image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()), cv2.COLOR_RGB2GRAY)
        for image in frames
    ]

    def search(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        # A new object every time: OpenCV's carries a state from one pair to the next, and the flow depends on it.
        found: np.ndarray = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(first, second, None)  # type: ignore[call-overload]
        return found

    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        pairs = list(itertools.pairwise(images))
        forward = [search(a, b) for a, b in pairs]
        backward = [search(b, a) for a, b in pairs]
    finally:
        cv2.setNumThreads(threads)

    def stack(flows: list[np.ndarray]) -> Tensor:
        if not flows:
            return frames_TCHW.new_zeros((0, 2, height, width), dtype=torch.float32)
        stacked = torch.from_numpy(np.stack(flows)).permute(0, 3, 1, 2)[..., :height, :width]
        return stacked.contiguous().to(frames_TCHW.device)

    return stack(forward), stack(backward)


def raft_names(key: str) -> str:
    """Name in torchvision's raft_large of a key of the published RAFT checkpoints.

    >>> raft_names("module.fnet.layer2.0.norm1.bias")
    'feature_encoder.layer2.0.convnormrelu1.1.bias'
    """
    key = key.removeprefix("flownet_model.").removeprefix("module.")
    key = re.sub(r"^fnet\.", "feature_encoder.", key)
    key = re.sub(r"^cnet\.", "context_encoder.", key)
    key = re.sub(r"\.(layer\d\.\d)\.conv(\d)\.", r".\1.convnormrelu\2.0.", key)
    key = re.sub(r"\.(layer\d\.\d)\.norm([12])\.", r".\1.convnormrelu\2.1.", key)
    key = re.sub(r"^(feature|context)_encoder\.conv1\.", r"\1_encoder.convnormrelu.0.", key)
    key = re.sub(r"^(feature|context)_encoder\.norm1\.", r"\1_encoder.convnormrelu.1.", key)
    key = re.sub(r"^(feature|context)_encoder\.conv2\.", r"\1_encoder.conv.", key)
    key = re.sub(r"^update_block\.encoder\.convc(\d)\.", r"update_block.motion_encoder.convcorr\1.0.", key)
    key = re.sub(r"^update_block\.encoder\.convf(\d)\.", r"update_block.motion_encoder.convflow\1.0.", key)
    key = re.sub(r"^update_block\.encoder\.conv\.", "update_block.motion_encoder.conv.0.", key)
    key = re.sub(r"^update_block\.gru\.conv([zrq])(\d)\.", r"update_block.recurrent_block.convgru\2.conv\1.", key)
    key = re.sub(r"^update_block\.mask\.0\.", "mask_predictor.convrelu.0.", key)
    return re.sub(r"^update_block\.mask\.2\.", "mask_predictor.conv.", key)


def load_raft(weights: str | Path) -> nn.Module:
    """torchvision's raft_large with weights from a file.

    Args:
        weights: ``.safetensors``, or ``.pth`` that holds nothing but tensors; torchvision's names or the published ones.
    Raises:
        FlowError: the file is missing, unreadable or holds other weights.
    """
    from torchvision.models.optical_flow import raft_large

    path = Path(weights)
    if not path.is_file():
        raise FlowError(f"RAFT weights {path} not found; put the file there, or use sampling.flow=dis")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise FlowError(f"RAFT weights {path} cannot be read: {' '.join(str(error).split())[:200]}") from None
    network = raft_large(weights=None)
    wanted = network.state_dict()
    # norm3 repeats downsample.1, and instance norms have no parameters here.
    renamed = {raft_names(key): value for key, value in state.items() if ".norm3." not in key}
    missing = [key for key in wanted if key not in renamed and not key.endswith("num_batches_tracked")]
    unequal = [key for key in wanted if key in renamed and renamed[key].shape != wanted[key].shape]
    if missing or unequal:
        first = (missing + unequal)[0]
        raise FlowError(f"{path} does not hold RAFT (large): {len(missing)} keys missing, {len(unequal)} of another shape, such as {first}")
    network.load_state_dict({key: renamed.get(key, value) for key, value in wanted.items()})
    return network.eval().requires_grad_(False)


def raft_flow(weights: str | Path, device: str | torch.device = "cpu", published: bool = True, updates: int = 10) -> FlowFunction:
    """A flow function by RAFT (arXiv 2003.12039).

    Args:
        weights: see :func:`load_raft`.
        published: as MGLD-VSR runs it, with images in [0, 1] although the weights expect [-1, 1] (its normalisation is
            commented out); False scales them as trained.
        updates: iterations; MGLD-VSR uses 10.
    """
    network = load_raft(weights).to(device)

    @torch.no_grad()
    def flow(frames_TCHW: Tensor) -> tuple[Tensor, Tensor]:
        frames = frames_TCHW.to(device, torch.float32)
        height, width = frames.shape[-2:]
        # Multiples of 8, and four levels of correlation need feature maps of at least 16.
        down, right = max(128, -(-height // 8) * 8) - height, max(128, -(-width // 8) * 8) - width
        frames = F.pad(frames if published else frames * 2 - 1, (0, right, 0, down), "replicate")

        def run(first: Tensor, second: Tensor) -> Tensor:
            if not len(first):
                return frames.new_zeros((0, 2, height, width))
            # Pair by pair: memory of one pair, whatever the length.
            flows = [network(a[None], b[None], num_flow_updates=updates)[-1] for a, b in zip(first, second, strict=True)]
            return torch.cat(flows)[..., :height, :width].to(frames_TCHW.device)

        return run(frames[:-1], frames[1:]), run(frames[1:], frames[:-1])

    return flow


def estimator(name: str, raft_weights: str | Path | None = None, device: str | torch.device = "cpu") -> FlowFunction | None:
    """The flow function that a setting names: "dis", "raft" or "none" (no guidance)."""
    if name == "none":
        return None
    if name == "dis":
        return dis_flow
    if name == "raft":
        if raft_weights is None:
            raise FlowError("sampling.flow=raft needs a weights file: set backbone.flow_weights, or use sampling.flow=dis")
        return raft_flow(raft_weights, device)
    raise FlowError(f"no flow {name!r}; known: dis, none, raft")
