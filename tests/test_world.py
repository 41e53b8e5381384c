import copy
import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from metarec_gym.world import World, WorldError, resolve_world


def test_a_saved_world_loads_with_the_same_hash(tiny_world, tmp_path):
    loaded = World.load(tiny_world.save(tmp_path / "world"))
    assert loaded.hash == tiny_world.hash
    assert loaded.strategies == ("specialist_0", "specialist_1", "mixed")
    assert torch.equal(loaded.tensors["start_lists"], tiny_world.tensors["start_lists"])


def test_saving_replaces_an_older_world_and_leaves_nothing_beside_it(tiny_world, leaving_world, tmp_path):
    tiny_world.save(tmp_path / "world")
    leaving_world.save(tmp_path / "world")
    assert World.load(tmp_path / "world").hash == leaving_world.hash
    assert [p.name for p in tmp_path.iterdir()] == ["world"]


def test_a_missing_world_says_how_to_build_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"python -m experiments\.build_world"):
        World.load(tmp_path / "none")


def test_a_damaged_table_is_found_by_its_hash(tiny_world, tmp_path):
    folder = tiny_world.save(tmp_path / "world")
    flat = load_file(str(folder / "world.safetensors"))
    flat["world.start_taste"][0, 0] += 1.0
    save_file(flat, str(folder / "world.safetensors"))
    with pytest.raises(WorldError, match="is damaged: its content has hash"):
        World.load(folder)


def test_a_cut_off_file_is_refused_with_what_to_do(tiny_world, tmp_path):
    folder = tiny_world.save(tmp_path / "world")
    data = (folder / "world.safetensors").read_bytes()
    (folder / "world.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(WorldError, match=r"damaged .* build it again: python -m experiments\.build_world"):
        World.load(folder)


def test_a_newer_schema_is_refused(tiny_world, tmp_path):
    folder = tiny_world.save(tmp_path / "world")
    header = json.loads((folder / "world.json").read_text()) | {"schema": 99}
    (folder / "world.json").write_text(json.dumps(header))
    with pytest.raises(WorldError, match="world schema 99"):
        World.load(folder)


def test_an_older_schema_says_to_build_again(tiny_world, tmp_path):
    folder = tiny_world.save(tmp_path / "world")
    header = json.loads((folder / "world.json").read_text()) | {"schema": 1}
    (folder / "world.json").write_text(json.dumps(header))
    with pytest.raises(WorldError, match=r"world schema 1, .* build it again"):
        World.load(folder)


def test_a_folder_of_a_world_holds_no_pickle(tiny_world, tmp_path):
    folder = tiny_world.save(tmp_path / "world")
    assert sorted(p.name for p in folder.iterdir()) == ["world.json", "world.safetensors"]


def test_deep_copies_share_the_frozen_world(tiny_world):
    assert copy.deepcopy(tiny_world) is tiny_world


def test_the_default_world_and_loaded_folders_are_made_once(tiny_world, tmp_path):
    assert resolve_world(None) is resolve_world(None)
    folder = tiny_world.save(tmp_path / "world")
    assert resolve_world(folder) is resolve_world(str(folder))


def test_lists_hold_no_item_of_the_history_and_no_item_twice(tiny_world):
    lists = tiny_world.tensors["start_lists"]
    for start in range(lists.shape[0]):
        for k in range(lists.shape[1]):
            shown = [i for i in lists[start, k].tolist() if i >= 0]
            assert len(shown) == len(set(shown)) == 8


def test_histories_of_start_states_end_with_the_newest_item_and_are_padded_on_the_left(tiny_world):
    # users have two start states: nothing, and three items
    histories = tiny_world.history_of(torch.tensor([0, 1, 3]))
    assert histories.shape == (3, 3)
    assert histories[0].tolist() == [-1, -1, -1]
    events, offsets = tiny_world.tensors["user_events"], tiny_world.tensors["user_event_offsets"]
    assert histories[1].tolist() == events[offsets[0] : offsets[0] + 3].tolist()
    assert histories[2].tolist() == events[offsets[1] : offsets[1] + 3].tolist()


def test_lists_ranked_again_at_a_start_state_are_the_stored_ones(tiny_world):
    starts = torch.arange(tiny_world.tensors["start_user"].shape[0])
    lists = tiny_world.top_lists(tiny_world.history_of(starts), tiny_world.list_length)
    assert torch.equal(lists.to(torch.int32), tiny_world.tensors["start_lists"])


def test_excluded_items_are_not_listed(tiny_world):
    exclude = torch.zeros(1, tiny_world.n_items, dtype=torch.bool)
    first = tiny_world.tensors["start_lists"][0, :, 0].to(torch.int64)
    exclude[0, first] = True
    lists = tiny_world.top_lists(tiny_world.history_of(torch.tensor([0])), 4, exclude=exclude)
    assert not bool(torch.isin(lists, first).any())


def test_a_saved_synthetic_world_still_ranks(tiny_world, tmp_path):
    loaded = World.load(tiny_world.save(tmp_path / "world"))
    histories = tiny_world.history_of(torch.arange(4))
    assert torch.equal(loaded.top_lists(histories, 4), tiny_world.top_lists(histories, 4))


def test_a_world_without_its_strategies_cannot_rank_again(tiny_world):
    with pytest.raises(WorldError, match="no strategies beside it"):
        dataclasses.replace(tiny_world, ranker=None).top_lists(torch.full((1, 0), -1), 4)


def test_a_judge_that_the_world_lacks_is_named(tiny_world):
    assert tiny_world.judge_names("A") == ("main",)
    with pytest.raises(ValueError, match="no judge 'second' for fold A"):
        tiny_world.judge("A", "second")


def test_a_synthetic_world_that_would_run_out_of_items_is_refused():
    with pytest.raises(WorldError, match="items_per_type=20 is too small"):
        World.synthetic(items_per_type=20)


def test_a_null_world_serves_one_list_under_every_name():
    world = World.synthetic(identical=True)
    lists = world.tensors["start_lists"]
    assert bool((lists == lists[:, :1]).all())


def test_importing_the_package_loads_no_torch_and_registers_the_id():
    code = (
        "import sys, metarec_gym, gymnasium; assert 'torch' not in sys.modules; "
        "assert 'MetaRec/Select-v0' in gymnasium.registry"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_running_an_environment_imports_no_pandas_scipy_or_implicit():
    code = (
        "import sys, gymnasium, metarec_gym; env = gymnasium.make('MetaRec/Select-v0'); "
        "env.reset(seed=0); env.step(0); "
        "heavy = {'pandas', 'scipy', 'implicit', 'sklearn', 'pyarrow'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
