"""Makes what examples/import_pytorch.rs loads: two small models as PyTorch saves them, and their outputs.

    pip install torch==2.11.0 safetensors==0.8.0 numpy==2.4.6 && python examples/import_pytorch/make.py

resnet.{safetensors,pth}        a ResNet of two blocks with BatchNorm2d, trained for a few steps so that its
                                running statistics are not the initial ones
transformer.{safetensors,pth}   a torch.nn.TransformerEncoderLayer, norm first, with LayerNorm
recorded.safetensors            inputs, outputs in evaluation mode, and labels to fine-tune with
"""

import pathlib

import torch
from safetensors.torch import save_file
from torch import nn

assert torch.__version__.split("+")[0] == "2.11.0", torch.__version__
torch.manual_seed(0)
folder = pathlib.Path(__file__).parent


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.layer1 = Block(8, 8, 1)
        self.layer2 = Block(8, 16, 2)
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        x = self.layer2(self.layer1(torch.relu(self.bn1(self.conv1(x)))))
        return self.fc(x.mean((2, 3)))


def save(name, model):
    torch.save(model.state_dict(), folder / f"{name}.pth")
    save_file(model.state_dict(), folder / f"{name}.safetensors")


resnet = ResNet()
optimizer = torch.optim.AdamW(resnet.parameters(), lr=1e-2)
for _ in range(20):
    labels = torch.randint(10, (32,))
    images = torch.randn(32, 3, 16, 16) + 0.3 * labels.float().reshape(-1, 1, 1, 1)
    optimizer.zero_grad()
    nn.functional.cross_entropy(resnet(images), labels).backward()
    optimizer.step()
resnet.eval()

transformer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
with torch.no_grad():
    for norm in (transformer.norm1, transformer.norm2):
        norm.weight.normal_(1, 0.2)
        norm.bias.normal_(0, 0.2)
transformer.eval()

images, tokens = torch.randn(8, 3, 16, 16), torch.randn(2, 7, 32)
with torch.no_grad():
    recorded = {
        "resnet.input": images,
        "resnet.output": resnet(images),
        "resnet.labels": torch.randint(10, (8,)),
        "transformer.input": tokens,
        "transformer.output": transformer(tokens),
    }
save("resnet", resnet)
save("transformer", transformer)
save_file(recorded, folder / "recorded.safetensors")
