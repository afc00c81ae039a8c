"""Digests tell what changed behind the same path, and nothing else."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
from conversation_cases import save_pair

from gracekit.recipe.digests import data_digest, processor_digest, records_digests, weights_digest
from gracekit.recipe.processors import load_processor


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("model") / "one", "qwen2_vl")


def test_data_are_known_by_content_wherever_they_are(tmp_path):
    one, other = tmp_path / "one.json", tmp_path / "other.json"
    one.write_text("[1]")
    other.write_text("[1]")
    assert data_digest(one) == data_digest(other)
    other.write_text("[2]")
    assert data_digest(one) != data_digest(other)
    assert data_digest(tmp_path / "nothing") == ""


def test_a_saved_data_set_is_known_by_its_description_and_sizes(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text('{"_fingerprint": "a"}')
        (tmp_path / name / "data-00000-of-00001.arrow").write_bytes(b"12")
    digest = data_digest(tmp_path / "one")
    assert data_digest(tmp_path / "other") == digest
    (tmp_path / "other" / "state.json").write_text('{"_fingerprint": "b"}')
    assert data_digest(tmp_path / "other") != digest
    (tmp_path / "one" / "data-00000-of-00001.arrow").write_bytes(b"123")
    assert data_digest(tmp_path / "one") != digest


def test_weights_that_were_written_again_are_others(saved, tmp_path):
    one = tmp_path / "one"
    shutil.copytree(saved, one)
    digest = weights_digest(str(one))
    assert digest == weights_digest(saved)  # a copy that keeps the files' times
    (one / "preprocessor_config.json").write_text("{}")
    assert weights_digest(str(one)) == digest
    time = (one / "model.safetensors").stat().st_mtime
    os.utime(one / "model.safetensors", (time + 1, time + 1))
    assert weights_digest(str(one)) != digest


def test_a_processor_is_known_by_tokenizer_template_and_image_processor(saved, tmp_path):
    digest = processor_digest(load_processor(saved))
    used = load_processor(saved)
    used.tokenizer(["a", "longer"], padding=True, truncation=True, max_length=3)
    assert processor_digest(used) == digest
    used.chat_template += " "
    assert processor_digest(used) != digest
    for file, change in (
        ("tokenizer.json", lambda found: found["added_tokens"][0].update(lstrip=True)),
        ("preprocessor_config.json", lambda found: found.update(merge_size=4)),
    ):
        other = tmp_path / file
        shutil.copytree(saved, other)
        found = json.loads((other / file).read_text())
        change(found)
        (other / file).write_text(json.dumps(found))
        assert processor_digest(load_processor(other)) != digest, file


def test_records_are_known_by_their_places_and_the_files_of_their_pictures(tmp_path):
    picture = tmp_path / "a.png"
    picture.write_bytes(b"12")
    record = SimpleNamespace(index=0, images=(picture, object()))
    text = SimpleNamespace(index=4, images=())
    first = records_digests([record, text])
    assert records_digests([record]) == first | {"kept_records": records_digests([record])["kept_records"]}
    assert records_digests([record])["kept_records"] != first["kept_records"]
    picture.write_bytes(b"123")
    changed = records_digests([record, text])
    assert changed["kept_records"] == first["kept_records"]
    assert changed["pictures"] != first["pictures"]
