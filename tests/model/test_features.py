"""The cache of features: sized before it is filled, kept below its limit, sound whatever happens to its files.

Run: pytest tests/model/test_features.py
"""

import multiprocessing
import os
import random
import resource
import threading

import filelock
import pytest
import torch
from packaging.version import Version

from tests.conftest import picture
from vlm_lora.cli import main
from vlm_lora.data.example import ImageRef
from vlm_lora.errors import DataError
from vlm_lora.model import features
from vlm_lora.model.backbone import load_backbone
from vlm_lora.model.families import FAMILIES
from vlm_lora.model.features import FeatureCache, found_again, store_in
from vlm_lora.model.store import COPY, Store, Use

SIZES = [(64, 64), (96, 48), (48, 80), (80, 80), (33, 70), (64, 64)]


@pytest.fixture(scope="module")
def backbone(checkpoints):
    return load_backbone(str(checkpoints["qwen2_vl"]))


@pytest.fixture
def images(tmp_path) -> list[ImageRef]:
    (tmp_path / "images").mkdir()
    found = []
    for i, size in enumerate(SIZES):
        path = tmp_path / "images" / f"{i}.png"
        picture(i, size).save(path)
        found.append(ImageRef(path=path, name=path.name))
    return found


def entries(folder) -> list:
    return sorted((folder / "features").glob("*/*.safetensors"), key=lambda path: path.stat().st_mtime_ns)


def cache_use(folder) -> Use:
    return store_in(folder).use()


def fill(backbone, folder, images, **settings) -> FeatureCache:
    cache = FeatureCache(backbone, folder, **settings)
    cache.survey(images)
    for image in images:
        cache.prepare(image)
    return cache


def equal(one, other) -> bool:
    return all(
        torch.equal(a.values, b.values) and torch.equal(a.grid_thw, b.grid_thw) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_the_size_is_told_before_the_tower_runs(checkpoints, images, tmp_path, monkeypatch, family):
    backbone = load_backbone(str(checkpoints[family]))
    with monkeypatch.context() as patch:
        patch.setattr(type(backbone), "tower", lambda *_: pytest.fail("the tower ran"))
        survey = FeatureCache(backbone, tmp_path).survey([*images, images[0]])  # a copy is counted once
    assert (survey.images, survey.missing) == (len(SIZES), len(SIZES))
    cache = fill(backbone, tmp_path, images)
    assert survey.num_bytes == sum(entry.values.nbytes for entry in cache.get(images))
    assert survey.num_bytes <= cache_use(tmp_path).num_bytes < survey.num_bytes + 400 * len(SIZES)
    again = FeatureCache(backbone, tmp_path).survey(images)
    assert (again.images, again.missing, again.num_bytes) == (len(SIZES), 0, survey.num_bytes)


def test_what_is_read_is_what_is_there_now(backbone, images, tmp_path):
    for folder in (None, tmp_path):
        cache = FeatureCache(backbone, folder)
        before = cache.get(images[:1])
        picture(77, SIZES[0]).save(images[0].path)
        assert not equal(cache.get(images[:1]), before)
        assert equal(cache.get(images[:1]), FeatureCache(backbone, None).get(images[:1]))
        picture(0, SIZES[0]).save(images[0].path)
        assert equal(cache.get(images[:1]), before)


def test_a_file_that_changes_after_it_was_identified_poisons_nothing(backbone, images, tmp_path):
    original = images[0].path.read_bytes()
    cache = FeatureCache(backbone, tmp_path)
    cache.grid(images[0])
    picture(77, SIZES[0]).save(images[0].path)
    for use in (cache.fetch, lambda refs: [cache.prepare(ref) for ref in refs]):
        with pytest.raises(DataError, match=r"'0\.png' has changed since it was first read"):
            use(images[:1])
    cache.get(images[:1])
    images[0].path.write_bytes(original)
    wanted = FeatureCache(backbone, None).get(images[:1])
    assert equal(FeatureCache(backbone, tmp_path).get(images[:1]), wanted)
    assert equal(cache.compute(cache.fetch(images[:1])), wanted)


def test_a_grid_is_the_one_of_the_features(backbone, images, tmp_path):
    cache = FeatureCache(backbone, tmp_path, write=False)
    for image, entry in zip(images, FeatureCache(backbone, None).get(images), strict=True):
        assert torch.equal(cache.prepare(image), entry.grid_thw)
    assert cache.computed == 0


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "text"])
def test_a_damaged_entry_is_computed_again(backbone, images, tmp_path, damage):
    wanted = fill(backbone, tmp_path, images).get(images)
    for path in entries(tmp_path):
        data = path.read_bytes()
        flipped = data[:-100] + bytes([data[-100] ^ 1]) + data[-99:]
        path.write_bytes({"cut": data[:-100], "bit": flipped, "empty": b"", "text": b"{}" * 400}[damage])
    told = []
    cache = FeatureCache(backbone, tmp_path, warn=told.append)
    assert equal(cache.get(images), wanted)
    assert (cache.damaged, cache.computed, cache.read) == (len(SIZES), len(SIZES), 0)
    assert "is damaged" in told[0]
    after = FeatureCache(backbone, tmp_path)
    assert equal(after.get(images), wanted)
    assert (after.damaged, after.computed) == (0, 0)


def test_no_flipped_bit_outside_the_features_passes(backbone, images, tmp_path):
    """The grid, and what the header says of names, shapes, number format and places; an entry of another image."""
    (wanted,) = fill(backbone, tmp_path, images[:1]).get(images[:1])
    (path,) = entries(tmp_path)
    data = path.read_bytes()
    at = 8 + int.from_bytes(data[:8], "little")
    grid = at + data[at:].index(wanted.grid_thw.numpy().tobytes())
    cache = FeatureCache(backbone, tmp_path)
    assert equal([cache._load(path.stem)], [wanted])
    for place in (*range(at), *range(grid, grid + wanted.grid_thw.nbytes)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        found = cache._load(path.stem)
        assert found is None or equal([found], [wanted]), f"byte {place}, {data[place : place + 1]}"
    assert cache.damaged >= grid + wanted.grid_thw.nbytes - at
    for old, new in ((b'"F32"', b'"I32"'), (b"[64,32]", b"[32,64]"), (b'"I64"', b'"F64"')):
        assert old in data
        path.write_bytes(data.replace(old, new))
        assert cache._load(path.stem) is None, new
    name, _ = cache._identify(images[5])  # of another image
    other = path.parents[1] / name[:2] / path.with_stem(name).name
    other.parent.mkdir()
    other.write_bytes(data)
    assert cache._load(name) is None


def test_what_was_used_longest_ago_goes_first(backbone, images, tmp_path):
    fill(backbone, tmp_path, images[:4])
    for age, image in enumerate(images[:4]):  # the first is the one used longest ago ...
        name, _ = FeatureCache(backbone, tmp_path)._identify(image)
        os.utime(tmp_path / "features" / name[:2] / f"{name}.safetensors", (1000 + age, 1000 + age))
    FeatureCache(backbone, tmp_path).get(images[:1])  # ... until it is read
    sizes = [entry.values.nbytes for entry in FeatureCache(backbone, None).get(images)]
    limit = cache_use(tmp_path).num_bytes + 100
    fill(backbone, tmp_path, images[4:5], limit_gb=limit / 1e9)
    there = [bool(FeatureCache(backbone, tmp_path).survey([image]).missing == 0) for image in images[:5]]
    assert there == [True, False, True, True, True]
    assert cache_use(tmp_path).num_bytes <= limit + 400
    assert sizes[4] < sizes[1]


@pytest.mark.parametrize("limit", [10_000, 40_000, 10**9])
def test_room_is_foretold(backbone, images, tmp_path, limit):
    """Without knowing one entry's name: as if none were this run's."""
    fill(backbone, tmp_path, images[:3])
    wanted = sum(entry.values.nbytes + 400 for entry in FeatureCache(backbone, None).get(images[3:]))
    foretold = store_in(tmp_path, limit / 1e9).room_for(wanted)
    found = FeatureCache(backbone, tmp_path, limit_gb=limit / 1e9).survey(images[3:]).room
    assert foretold <= found < foretold + 13_000  # what goes, goes by whole entries
    assert min(limit, wanted) <= foretold <= limit


@pytest.mark.parametrize("share", [0.0, 0.5, 0.8, 1.0])
def test_what_main_memory_still_holds_is_foretold(backbone, monkeypatch, tmp_path, share):
    """Forty images, eight epochs, each in an order of its own."""
    for i in range(40):
        picture(i).save(tmp_path / f"{i}.png")
    images = [ImageRef(path=path, name=path.name) for path in tmp_path.glob("*.png")]
    draw, num_bytes = random.Random(0), FeatureCache(backbone, None).survey(images).num_bytes
    monkeypatch.setattr("vlm_lora.model.features.IN_MEMORY_BYTES", round(share * num_bytes))
    cache = FeatureCache(backbone, None)
    for _ in range(8):
        draw.shuffle(images)
        for image in images:
            cache.get([image])
    assert abs(cache.read / (40 * 7) - found_again(num_bytes)) < 0.06
    assert share not in (0.5, 0.8) or abs(found_again(num_bytes) - share) > 0.3  # negative control


def test_a_running_run_keeps_its_own(backbone, images, tmp_path):
    """With no room for a second half, the first half by name stays, and the other goes through the tower each time."""
    images = sorted(images, key=lambda image: FeatureCache(backbone, None)._identify(image))
    half = sum(entry.values.nbytes + 400 for entry in FeatureCache(backbone, None).get(images[:3]))
    cache = fill(backbone, tmp_path, images, limit_gb=half / 1e9)
    assert cache_use(tmp_path).entries == cache.computed == 3
    assert not cache.complete(images)
    assert cache.complete(images[:3])
    assert equal(cache.get(images), FeatureCache(backbone, None).get(images))
    cache.survey(images)  # as a second process of the same run does
    assert cache_use(tmp_path).entries == 3
    late = FeatureCache(backbone, tmp_path / "late", limit_gb=half / 1e9)
    late.survey(images)
    late.get(images[3:])  # whose room is for the others, which come later
    assert cache_use(tmp_path / "late").entries == 0
    late.get(images)
    assert late.complete(images[:3])


def test_what_is_kept_follows_from_the_images_alone(backbone, tmp_path):
    """Not from their order: a run on the same pictures, on some of them or on more, finds what another one kept."""
    images = []
    for i in range(40):
        picture(i).save(tmp_path / f"{i}.png")
        images.append(ImageRef(path=tmp_path / f"{i}.png", name=f"{i}.png"))
    each = FeatureCache(backbone, None).get(images[:1])[0].values.nbytes + 400
    limit = 15.5 * each / 1e9

    def names(folder) -> set[str]:
        return {path.stem for path in entries(folder)}

    def run(folder, *groups) -> FeatureCache:
        """Two epochs, nothing of which main memory keeps."""
        cache = FeatureCache(backbone, folder, limit_gb=limit, in_memory=False)
        cache.survey(*groups)
        for image in [image for group in groups for image in group]:
            cache.prepare(image)
        assert cache.computed <= 15
        cache.computed = cache.read = 0
        for group in groups:
            cache.get(group)
        return cache

    held_out, train = images[30:], images[:30]
    first = run(tmp_path / "a", held_out, train)
    assert (first.read, first.computed) == (15, 25)
    assert {first._identify(image)[0] for image in held_out} < names(tmp_path / "a")
    chosen = sorted(first._identify(image)[0] for image in train)[:5]
    assert set(chosen) < names(tmp_path / "a")
    run(tmp_path / "b", held_out[::-1], train[::-1])
    assert names(tmp_path / "b") == names(tmp_path / "a")

    again = run(tmp_path / "a", held_out[::-1], train[::-1])
    assert (again.read, again.computed) == (15, 25)
    most = [image for image in train if again._identify(image)[0] != chosen[0]]
    other = run(tmp_path / "a", held_out, most)
    assert (other.read, other.computed) == (15, 24)  # the one that went made room for the next
    assert set(chosen[1:]) < names(tmp_path / "a")


def test_two_runs_in_one_folder_keep_its_limit(backbone, images, tmp_path):
    """Also when both looked before either had written."""
    half = sum(entry.values.nbytes + 400 for entry in FeatureCache(backbone, None).get(images[:3]))
    one, other = (FeatureCache(backbone, tmp_path, limit_gb=half / 1e9) for _ in range(2))
    for cache, own in ((one, images[:3]), (other, images[3:])):
        assert cache.survey(own).room > 0
    for pair in zip(images[:3], images[3:], strict=True):
        for cache, image in zip((one, other), pair, strict=True):
            cache.prepare(image)
            assert cache_use(tmp_path).num_bytes <= half
    assert cache_use(tmp_path).entries >= 2
    assert equal(one.get(images[:3]) + other.get(images[3:]), FeatureCache(backbone, None).get(images))
    (tmp_path / "features" / "count").write_text("")  # killed while it was written
    fill(backbone, tmp_path, images, limit_gb=half / 1e9)
    assert cache_use(tmp_path).num_bytes <= half


def test_the_same_entry_is_counted_once(backbone, images, tmp_path):
    one, other = (FeatureCache(backbone, tmp_path) for _ in range(2))
    fetched = [cache.fetch(images) for cache in (one, other) if cache.survey(images).missing]
    one.compute(fetched[0])
    counted = (tmp_path / "features" / COPY).read_text()
    other.compute(fetched[1])
    assert (tmp_path / "features" / COPY).read_text() == counted
    assert cache_use(tmp_path).num_bytes <= int(counted) < cache_use(tmp_path).num_bytes + 400 * len(SIZES)


def put_many(folder, process: int, limit: int, together) -> None:
    store = Store(folder, limit)
    for i in range(40):
        together.wait(60)
        name = f"{process}{i:03}"
        store.own.add(name)
        store.put(name, 1000, lambda path: path.write_bytes(bytes(1000)))


def test_two_processes_keep_the_limit(tmp_path):
    limit = 50 * 1000
    forked = multiprocessing.get_context("fork")
    together = forked.Barrier(2)
    processes = [forked.Process(target=put_many, args=(tmp_path / "features", i, limit, together)) for i in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    use = cache_use(tmp_path)
    assert use.entries == 50
    assert use.num_bytes <= limit
    assert {path.stem[0] for path in entries(tmp_path)} == {"0", "1"}


@pytest.mark.skipif(Version(filelock.__version__) < Version("4.3.1"), reason="it empties the file that it locks")
def test_a_process_of_an_older_release_is_waited_for(tmp_path):
    """It locks the file ``count`` by flock, and keeps the number in it."""
    fcntl = pytest.importorskip("fcntl")
    store = Store(tmp_path, limit=2500)
    assert store.make_room(2500) == 2500
    with (tmp_path / "count").open("a+") as count:
        fcntl.flock(count, fcntl.LOCK_EX)
        thread = threading.Thread(target=store.put, args=("aa", 1000, lambda path: path.write_bytes(bytes(1000))))
        thread.start()
        thread.join(0.3)
        assert "aa" not in store
        count.truncate(0)
        count.write("1000")  # of an entry
    thread.join()
    assert "aa" in store
    assert (tmp_path / COPY).read_text() == "2000"


def test_on_a_disk_without_locks_entries_are_kept_too(tmp_path, monkeypatch):
    asked = []

    def refuse(lock, **_):
        asked.append(lock)
        raise NotImplementedError("no flock here")

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    store = Store(tmp_path / "features", limit=2500)
    for name in ("aa", "bb", "cc"):
        store.put(name, 1000, lambda path: path.write_bytes(bytes(1000)))
    assert ("aa" in store, "bb" in store, "cc" in store) == (True, True, False)
    assert len(asked) == 1  # each might have to be waited for


def test_an_entry_that_another_process_evicts_is_computed_again(backbone, images, tmp_path):
    cache = fill(backbone, tmp_path, images, in_memory=False)
    wanted = cache.get(images)
    assert main_cache(tmp_path, "--limit", "0") == 0
    assert equal(cache.get(images), wanted)
    assert (cache.damaged, cache_use(tmp_path).entries) == (0, len(SIZES))


def main_cache(folder, *options) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLM_LORA_CACHE", str(folder))
        return main(["cache", *options])


def test_the_command_shows_trims_and_clears(backbone, images, tmp_path, capsys):
    fill(backbone, tmp_path, images)
    assert main_cache(tmp_path) == 0
    kept = sum(path.stat().st_size for path in entries(tmp_path))
    assert f": 6 images, {kept / 1e3:.0f} kB" in capsys.readouterr().out
    assert main_cache(tmp_path, "--limit", str(10_000 / 1e9)) == 0
    assert 0 < cache_use(tmp_path).num_bytes <= 10_000
    assert main_cache(tmp_path, "--limit", "-1") == 2
    assert main_cache(tmp_path, "--clear") == 0
    assert cache_use(tmp_path).entries == 0


def test_a_full_disk_ends_the_caching_and_nothing_else(backbone, images, tmp_path):
    told = []
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))  # a write beyond fails, as on a full disk
    try:
        cache = fill(backbone, tmp_path, images, warn=told.append)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert equal(cache.get(images), FeatureCache(backbone, None).get(images))
    assert len(told) == 1
    assert "no more features are kept" in told[0]
    assert not list((tmp_path / "features").glob("*/*"))


def test_a_folder_that_cannot_be_made_is_told_once(backbone, images, tmp_path):
    (tmp_path / "features").write_text("a file")
    told = []
    cache = fill(backbone, tmp_path, images, warn=told.append)
    assert len(cache.get(images)) == len(SIZES)
    assert len(told) == 1


def test_temporary_files_of_the_dead_are_removed(backbone, images, tmp_path):
    fill(backbone, tmp_path, images)
    old, new = (entries(tmp_path)[0].with_name(name) for name in ("old.tmp", "new.tmp"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (1000, 1000))
    FeatureCache(backbone, tmp_path).survey(images)
    assert (old.exists(), new.exists()) == (False, True)


def test_without_room_an_image_is_still_tested(backbone, images, tmp_path):
    images[1].path.write_bytes(images[1].path.read_bytes()[:-300])
    cache = FeatureCache(backbone, tmp_path, write=False)
    assert cache.survey(images).images == len(SIZES)
    with pytest.raises(DataError, match=r"1\.png.*damaged or cut off"):
        cache.prepare(images[1])


def test_a_thread_may_fetch_while_another_computes(backbone, images, tmp_path, monkeypatch):
    """Nothing is lost or mixed up when memory holds less than what is fetched."""
    monkeypatch.setattr("vlm_lora.model.features.IN_MEMORY_BYTES", 20_000)
    wanted = FeatureCache(backbone, None).get(images)
    cache = fill(backbone, tmp_path, images[:3], limit_gb=1)
    wrong = []

    def fetch():
        for _ in range(30):
            if not equal(cache.get(images[:3]), wanted[:3]):
                wrong.append("fetched")

    thread = threading.Thread(target=fetch)
    thread.start()
    for _ in range(10):
        if not equal(cache.get(images), wanted):
            wrong.append("computed")
    thread.join()
    assert not wrong


def tower_devices(backbone) -> set[str]:
    return {p.device.type for n, p in backbone.model.named_parameters() if ".blocks." in n or ".patch_embed." in n}


@pytest.mark.parametrize("loss", ["damaged", "evicted"])
def test_a_lost_entry_brings_the_tower_back_for_a_moment(checkpoints, images, tmp_path, monkeypatch, loss):
    """Parked means on the meta device here; what it forgets is filled in again."""
    backbone = load_backbone(str(checkpoints["qwen2_vl"]))
    wanted = fill(backbone, tmp_path, images).get(images)
    whole = {n: p.detach().clone() for n, p in backbone.model.named_parameters()}

    def park(device="meta"):
        for part in ("patch_embed", "blocks"):
            module = getattr(backbone.model.model.visual, part)
            module.to_empty(device=device) if str(device) == "cpu" else module.to(device)
        if str(device) == "cpu":
            for name, parameter in backbone.model.named_parameters():
                parameter.data.copy_(whole[name])

    monkeypatch.setattr(backbone, "park_tower", park)
    cache = FeatureCache(backbone, tmp_path, in_memory=False)
    cache.park_tower(images)
    assert tower_devices(backbone) == {"meta"}
    for path in entries(tmp_path):
        path.unlink() if loss == "evicted" else path.write_bytes(b"")
    assert equal(cache.get(images), wanted)
    assert cache.computed == len(SIZES)
    assert tower_devices(backbone) == {"meta"}

    cache.write = False  # what is lost now cannot be kept, and is computed in each step
    entries(tmp_path)[0].unlink()
    assert equal(cache.get(images), wanted)
    assert tower_devices(backbone) == {"cpu"}


@pytest.mark.parametrize("write", [False, True])
def test_a_tower_that_is_needed_is_not_parked(checkpoints, images, tmp_path, write):
    backbone = load_backbone(str(checkpoints["qwen2_vl"]))
    fill(backbone, tmp_path, images[:3])
    devices = []
    backbone.park_tower = lambda device="meta": devices.append(str(device))  # without one: away from the model's
    cache = FeatureCache(backbone, tmp_path, write=write)
    cache.park_tower(images)
    cache.get(images[:4])  # also where each of these is there now: others are not
    assert set(devices) == {"cpu"}


def test_a_parked_tower_is_not_missed_and_comes_back(checkpoints, images, tmp_path):
    backbone = load_backbone(str(checkpoints["qwen2_vl"]))
    wanted = fill(backbone, tmp_path, images).get(images)
    fingerprint = backbone.tower_fingerprint
    backbone.park_tower("cpu")
    assert equal(FeatureCache(backbone, None).get(images), wanted)
    backbone.park_tower("meta")
    tower = [p for n, p in backbone.model.named_parameters() if ".blocks." in n or ".patch_embed." in n]
    assert all(p.device.type == "meta" for p in tower)
    assert backbone.device.type == "cpu"
    cache = FeatureCache(backbone, tmp_path)
    assert cache.complete(images)
    assert equal(cache.get(images), wanted)
    assert backbone.tower_fingerprint == fingerprint


@pytest.mark.parametrize(
    "change",
    [
        lambda backbone: setattr(backbone.processor.image_processor, "image_mean", [0.5, 0.5, 0.5]),
        lambda backbone: setattr(backbone.model.config.vision_config, "spatial_patch_size", 99),
        lambda backbone: backbone.model.model.visual.blocks[0].norm1.weight.data.add_(1),
        lambda backbone: backbone.model.to(torch.bfloat16),
    ],
    ids=["preprocessing", "config", "weights", "number format"],
)
def test_what_decides_the_features_is_in_their_fingerprint(checkpoints, change):
    """Or features would be read that were computed by something else."""
    before, changed = (load_backbone(str(checkpoints["qwen2_vl"])) for _ in range(2))
    change(changed)
    assert changed.tower_fingerprint != before.tower_fingerprint
    changed.model.model.language_model.layers[0].mlp.up_proj.weight.data.add_(1)
    assert load_backbone(str(checkpoints["qwen2_vl"])).tower_fingerprint == before.tower_fingerprint


@pytest.mark.parametrize("at_once", [16384, 100])
@pytest.mark.parametrize("family", FAMILIES)
def test_several_images_through_the_tower_at_once(checkpoints, images, tmp_path, monkeypatch, family, at_once):
    """What a GPU does for captions: to rounding what one at a time gives, in as few passes as fit, and nothing kept."""
    backbone = load_backbone(str(checkpoints[family]))
    expected = FeatureCache(backbone, None).get(images)
    monkeypatch.setattr(features, "SEVERAL_AT_ONCE", ("cpu",))
    monkeypatch.setattr(features, "PATCHES_AT_ONCE", at_once)
    passes, tower = [], backbone.tower
    monkeypatch.setattr(backbone, "tower", lambda values, grids: passes.append(len(values)) or tower(values, grids))
    cache = FeatureCache(backbone, tmp_path, write=False, several=True)
    looked = [cache.look(image) for image in images]
    found = cache.compute([expected[0], *looked])  # the first is known already
    assert found[0] is expected[0]
    patches = [len(each.values) for each in looked]
    assert sum(passes) == sum(patches)
    assert max(passes) <= max(at_once, *patches)
    assert len(passes) == 1 if at_once > sum(patches) else 1 < len(passes) <= len(images)
    assert cache.computed == len(images)
    assert not cache_use(tmp_path).entries
    assert all(one is other for one, other in zip(cache.get(images), found[1:], strict=True))  # from main memory
    assert not FeatureCache(backbone, tmp_path, several=True)._several  # what is kept depends on its image alone
    for one, other in zip(found[1:], expected, strict=True):
        assert torch.equal(one.grid_thw, other.grid_thw)
        torch.testing.assert_close(one.values, other.values, rtol=1e-4, atol=1e-5)
    other = tower(torch.cat([each.values for each in looked[::-1]]), torch.stack([each.grid_thw for each in looked]))
    assert not torch.allclose(other[: patches[0]], found[1].values, atol=1e-2)  # negative control: another's patches
