import json

import pandas as pd
import torch

from experiments.positions import Args, run, sentence
from metarec_gym.data.impressions import ImpressionTable


def log_with_decay(folder, decay):
    generator = torch.Generator().manual_seed(0)
    n = 60_000
    item, position = torch.randint(5, (n,), generator=generator), torch.randint(3, (n,), generator=generator)
    logit = -1.5 - decay * torch.log2(1.0 + position)
    click = torch.rand(n, generator=generator) < torch.sigmoid(logit)
    frame = pd.DataFrame(
        {
            "timestamp": 0.0,
            "campaign": "all",
            "strategy": "random",
            "item_id": [f"i{i}" for i in item.tolist()],
            "position": position.numpy() + 1,
            "propensity": 0.2,
            "click": click.numpy().astype(int),
        }
    )
    items = pd.DataFrame({"item_id": sorted(frame["item_id"].unique())})
    ImpressionTable.from_frame(frame, name="made", items=items).save(folder)


def test_the_command_finds_the_decay_that_a_log_was_made_with(tmp_path):
    log_with_decay(tmp_path / "log", 0.5)
    result = run(Args(log=tmp_path / "log", runs=tmp_path / "runs", out=tmp_path / "page.md"))
    found = result["campaigns"]["all together"]
    assert abs(found["decay"] - 0.5) < 2.0 * found["decay_standard_error"]
    assert "later places are surely seen less" in (tmp_path / "page.md").read_text()
    assert json.dumps(result["campaigns"])


def test_what_the_log_cannot_tell_is_said():
    assert sentence(0.1, 0.2).startswith("cannot tell it from 0 (a decay above 0.49")
    assert "surely taken more" in sentence(-1.0, 0.1)
