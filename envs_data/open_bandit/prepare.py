"""Open Bandit, small sample: raw files -> impressions in this folder. Run: python -m envs_data.open_bandit.prepare."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from envs_data.download import DownloadError, PackageSource, fetch, prepared, read_members

if TYPE_CHECKING:
    import pandas as pd

    from metarec_gym.data import ImpressionTable

FOLDER = Path(__file__).resolve().parent
RECIPE = "open_bandit-1"
# the publisher's page has no stable address for the small sample, so there is no official source to try first
MIRROR = PackageSource(
    package="obp",
    version="0.4.1",
    file_name="obp-0.4.1-py3-none-any.whl",
    checksum="sha256:87dec9caf4283c25ab13036532e0a24566f1c7bdcad1653a8ded43b2f5ef8208",
)
STRATEGIES = ("bts", "random")
CAMPAIGNS = ("all", "men", "women")
_STEM = "obp/dataset/obd"


@dataclass(frozen=True)
class Args:
    """Fetches the small Open Bandit sample, checks it, writes it as Parquet; says so and ends when that was done."""

    out: Path = FOLDER
    """Where the prepared table goes; the raw archive goes to its raw/ folder."""
    force: bool = False
    """Prepare again even if the prepared table is intact."""


def main(args: Args) -> None:
    """Prepares the table unless it is there."""
    done = None if args.force else prepared(args.out, RECIPE)
    if done is not None:
        print(
            f"open_bandit is prepared in {args.out}: {done['card']['facts']['rows']:,} impressions, hash {done['hash']}"
        )
        return
    archive, _ = fetch([MIRROR], args.out / "raw")
    table = read_impressions(archive)
    table.save(args.out)
    print(f"open_bandit -> {args.out}, hash {table.hash}")
    for (campaign, strategy), group in table.frame.groupby(["campaign", "strategy"]):
        print(f"  {campaign:6s} {strategy:7s} {len(group):,} impressions, {group['click'].mean():.2%} clicked")


def read_impressions(archive: Path) -> ImpressionTable:
    """The table from the wheel that carries the sample; refuses one that does not have the card's facts."""
    import numpy as np
    import pandas as pd

    from metarec_gym.data import ImpressionTable, parse_times

    card = json.loads((FOLDER / "card.json").read_text(encoding="utf-8"))
    names = [
        f"{_STEM}/{strategy}/{campaign}/{file}.csv"
        for strategy in STRATEGIES
        for campaign in CAMPAIGNS
        for file in (campaign, "item_context")
    ]
    content = read_members(archive, names)
    parts, item_parts = [], []
    for campaign in CAMPAIGNS:
        items, other = (
            _item_groups(content[f"{_STEM}/{strategy}/{campaign}/item_context.csv"]) for strategy in STRATEGIES
        )
        if not items.equals(other):
            raise ValueError(f"item tables of campaign {campaign!r} differ by strategy; delete raw/ and prepare again")
        # items are numbered anew in each campaign
        items["item_id"] = campaign + "/" + items["item_id"].astype(str)
        items.insert(1, "campaign", campaign)
        item_parts.append(items)
        for strategy in STRATEGIES:
            raw = pd.read_csv(io.BytesIO(content[f"{_STEM}/{strategy}/{campaign}/{campaign}.csv"]), index_col=0)
            if len(raw) != card["facts"]["rows_per_campaign_and_strategy"]:
                raise ValueError(f"{strategy}/{campaign} has {len(raw)} impressions; delete raw/ and prepare again")
            affinities = raw[[f"user-item_affinity_{number}" for number in range(len(items))]].to_numpy()
            features = {f"user_feature_{number}": raw[f"user_feature_{number}"].astype(str) for number in range(4)}
            columns = {
                "timestamp": parse_times(raw["timestamp"]),
                "campaign": campaign,
                "strategy": strategy,
                "item_id": campaign + "/" + raw["item_id"].astype(str),
                "position": raw["position"].astype("int64"),
                "propensity": raw["propensity_score"].astype("float64"),
                "click": raw["click"].astype("int64"),
                "affinity": affinities[np.arange(len(raw)), raw["item_id"].to_numpy()],
                **features,
            }
            parts.append(pd.DataFrame(columns).sort_values("timestamp", kind="stable"))
    return ImpressionTable.from_frame(
        pd.concat(parts, ignore_index=True),
        name="open_bandit",
        items=pd.concat(item_parts, ignore_index=True),
        card={**card, "recipe": RECIPE},
    )


def _item_groups(csv: bytes) -> pd.DataFrame:
    """Items with their hashed features as group numbers, in order of first appearance."""
    import pandas as pd

    items = pd.read_csv(io.BytesIO(csv), index_col=0)
    for number in (1, 2, 3):
        # each file was hashed with a salt of its own: the groups agree between files, the hashes do not
        items[f"item_feature_{number}"] = pd.factorize(items[f"item_feature_{number}"])[0].astype("int64")
    return items


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=Args.__doc__))
    except (DownloadError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
