import zipfile

import pytest
import torch

from knlightning.checkpoint_files import check_checkpoint, holds_weights_alone, plain_config, read_checkpoint

WHOLE = {
    "epoch": 1,
    "global_step": 5,
    "state_dict": {"a": torch.ones(3)},
    "loops": {},
    "callbacks": {},
    "optimizer_states": [{"state": {}}],
    "lr_schedulers": [],
}


def saved(path, content):
    torch.save(content, path)
    return path


def test_what_was_saved_is_read(tmp_path):
    read = read_checkpoint(saved(tmp_path / "a.ckpt", WHOLE))
    assert read.keys() == WHOLE.keys()
    assert torch.equal(read["state_dict"]["a"], torch.ones(3))
    assert read_checkpoint(tmp_path / "a.ckpt", map_location="meta")["state_dict"]["a"].is_meta


@pytest.mark.parametrize(
    "content", [b"", b"step,loss\n1,2\n", b"\x80\x02", b"PK\x03\x04", b"\x00" * 5000, b"text\n" * 99]
)
def test_other_files_are_named(tmp_path, content):
    (tmp_path / "a.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.ckpt is damaged, or not a checkpoint"):
        read_checkpoint(tmp_path / "a.ckpt")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_file_cut_short_is_named(tmp_path, share):
    path = saved(tmp_path / "a.ckpt", WHOLE)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"a\.ckpt is damaged"):
        read_checkpoint(path)


def test_a_compressed_archive_is_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**7))
    with pytest.raises(ValueError, match="compressed"):
        read_checkpoint(tmp_path / "a.ckpt")


def test_lists_that_grow_without_end_are_refused(tmp_path):
    bomb = [0] * 10
    for _ in range(12):
        bomb = [bomb] * 10
    deep = []
    for _ in range(200):
        deep = [deep]
    for content in (bomb, {"callbacks": deep}):
        with pytest.raises(ValueError, match=r"without end|recursion"):
            read_checkpoint(saved(tmp_path / "a.ckpt", content))


def test_missing_files_are_errors_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "no.ckpt")


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("value", [None, "text", 1.5])
def test_parts_that_are_missing_or_wrong_are_named(name, value):
    without = {key: part for key, part in WHOLE.items() if key != name}
    for content in (without, WHOLE | {name: value}):
        with pytest.raises(ValueError, match=f"a.ckpt is damaged.*'{name}'"):
            check_checkpoint("a.ckpt", content, to_resume=True)


def test_what_is_inside_the_parts_is_checked():
    for wrong in ({"state_dict": {"a": 1}}, {"global_step": -1}, {"optimizer_states": [1]}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            check_checkpoint("a.ckpt", WHOLE | wrong, to_resume=True)
    with pytest.raises(ValueError, match="content"):
        check_checkpoint("a.ckpt", [1], to_resume=True)
    check_checkpoint("a.ckpt", WHOLE, to_resume=True)
    check_checkpoint("a.ckpt", {name: WHOLE[name] for name in ("global_step", "epoch", "state_dict")}, to_resume=False)


def test_weights_alone():
    weights = {"a": torch.ones(1)}
    assert holds_weights_alone(weights)
    assert holds_weights_alone({"model": weights})
    assert holds_weights_alone({"state_dict": weights, "epoch": 3})
    for other in (WHOLE, {}, [], {"a": 1}, None):
        assert not holds_weights_alone(other)


def test_a_configuration_is_made_of_plain_values():
    def read(config):
        return plain_config("a.ckpt", {"callbacks": {"RunConfig": {"config": config}}})

    assert read({"a": [1, None, "b"]}) == {"a": [1, None, "b"]}
    for wrong in ([1], {"a": torch.ones(2)}, "a"):
        with pytest.raises(ValueError, match=r"a\.ckpt is damaged: the configuration"):
            read(wrong)
