"""Records what PyTorch's BatchNorm computes for a whole batch over three steps, for SyncBatchNorm's tests.

PyTorch's SyncBatchNorm runs on GPUs only; by its definition it computes this.
Run: python generate_sync.py. Versions: torch 2.11.0, safetensors.
"""

import pathlib

import torch
from safetensors.torch import save_file

assert torch.__version__.startswith("2.11.0"), torch.__version__

torch.manual_seed(5)
CHANNELS = 3
norm = torch.nn.BatchNorm2d(CHANNELS, dtype=torch.float64)
with torch.no_grad():
    norm.weight.copy_(torch.randn(CHANNELS, dtype=torch.float64))
    norm.bias.copy_(torch.randn(CHANNELS, dtype=torch.float64))
recorded = {"weight": norm.weight.detach().clone(), "bias": norm.bias.detach().clone()}

for step in range(3):
    # 13 samples: uneven for 2 to 6 ranks.
    x = torch.randn(13, CHANNELS, 2, 3, dtype=torch.float64) * 2 + 5
    dy = torch.randn_like(x)
    x.requires_grad_()
    norm.zero_grad()
    y = norm(x)
    y.backward(dy)
    values = {"x": x, "dy": dy, "y": y, "dx": x.grad, "dweight": norm.weight.grad, "dbias": norm.bias.grad,
              "running_mean": norm.running_mean, "running_var": norm.running_var}
    recorded |= {f"step{step}.{name}": value.detach().clone() for name, value in values.items()}

norm.eval()
recorded["evaluation"] = norm(recorded["step0.x"]).detach().clone()
save_file(recorded, pathlib.Path(__file__).with_name("sync_batch_norm.safetensors"),
          metadata={"torch": torch.__version__})
