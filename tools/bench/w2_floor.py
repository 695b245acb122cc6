"""The floor of the W2 benchmark: nothing but its SGD steps, in one process (`w2` runs one per core).

    python w2_floor.py DATA PEERS ROUNDS STEPS BATCH default|fast     prints one JSON line: seconds per round

`default` is torch as it comes: its own SGD, contiguous images, full-precision products. `fast` is what the engine does when
fast math wins: channels_last images, oneDNN's reduced-precision switch.
"""

import json
import sys
import time

import numpy as np
import torch
from torch.nn import functional as F

from gossipfl.learning.models import build_model

data, peers, rounds, steps, batch, mode = sys.argv[1], *map(int, sys.argv[2:6]), sys.argv[6]
torch.set_num_threads(1)
fast = mode == "fast"
if fast:
    torch.set_float32_matmul_precision("medium")
with np.load(f"{data}/train.npz", allow_pickle=False) as arrays:
    x_train, y_train = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"])
model = build_model("cnn", (1, 28, 28), 10, {}, 0)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
generator = torch.Generator().manual_seed(0)


def step() -> None:
    chosen = torch.randint(len(y_train), (batch,), generator=generator)
    x, y = x_train[chosen], y_train[chosen]
    if fast:
        x = x.to(memory_format=torch.channels_last)  # contiguous() leaves one-channel images as they are
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


for _ in range(5):
    step()
print("ready", flush=True)
sys.stdin.readline()  # all processes of the floor start together
times = []
for _ in range(rounds):
    began = time.perf_counter()
    for _ in range(peers * steps):
        step()
    times.append(time.perf_counter() - began)
print(json.dumps(times), flush=True)
