"""Models trained for the study: equal but for their attention, repeatable, and never trained twice."""

import dataclasses

import pytest
import torch

from openmla.core.errors import ConfigError
from openmla.lab import page, quality, study, study_page


@pytest.fixture(scope="module")
def source():
    return quality.text()


def test_every_form_keeps_what_it_says():
    kept = {(form, size): quality.Model(form, size).kv_numbers for form, size in quality.VARIANTS}
    assert kept["mla", 16] == 24
    assert kept["mqa", 1] == 40
    assert kept["gqa", 2] == 80
    assert kept["mha", 8] == 320


@pytest.mark.parametrize(("form", "size"), [("mla", 8), ("mqa", 1), ("gqa", 2), ("mha", 8)])
def test_no_byte_sees_a_later_one(form, size):
    torch.manual_seed(0)
    model = quality.Model(form, size)
    tokens = torch.randint(256, (1, 12))
    other = tokens.clone()
    other[0, 8:] = 7
    assert torch.allclose(model(tokens)[0, :8], model(other)[0, :8], atol=1e-6)
    assert not torch.allclose(model(tokens)[0, 8:], model(other)[0, 8:], atol=1e-3)


def test_training_learns_and_repeats(source):
    first, again = (quality.train("mla", 16, 3, 12, source) for _ in range(2))
    assert first.loss == again.loss
    assert first.loss < 5.0 < 5.545  # ln 256 is knowing nothing
    assert first.text_sha == source[2]


def test_what_stands_in_the_file_is_not_trained_again(tmp_path, monkeypatch, source):
    path = tmp_path / "rows.jsonl"
    trained = []

    def fake(form, size, seed, steps, source):
        trained.append((form, size, seed))
        return quality.Outcome(form, size, 1, 2, seed, steps, 2.0 + seed, 2.0, 1.0, source[2], "t", "p", "u")

    monkeypatch.setattr(quality, "train", fake)
    quality.run(path, [0], 5, lambda line: None)
    assert len(trained) == len(quality.VARIANTS)
    quality.run(path, [0, 1], 5, lambda line: None)
    assert len(trained) == 2 * len(quality.VARIANTS)
    found = study.losses(quality.read(path))
    assert found[0] == ("mla", 4, 1, 2.5, 1.0)
    path.write_text("{}\n")
    with pytest.raises(ConfigError, match=r"rows\.jsonl:1: not an outcome"):
        quality.read(path)
    with pytest.raises(ConfigError, match=r"python -m openmla\.lab\.quality"):
        quality.read(tmp_path / "none.jsonl")


def test_the_page_shows_them(source):
    one = quality.train("mla", 4, 0, 1, source)
    outcomes = (one, dataclasses.replace(one, form="mha", size=8, kv_numbers=320))
    empty = study.Study(
        study.data_sheet("h100_sxm"), 16, 2.0, 80.0, 61, study.forms(16), (), (), (), (), (), (), (), "m", outcomes
    )
    (section,) = study_page._trained(empty)
    html = page.render(page.Page("t", "l", [section]))
    assert "Latent size against loss" in html
    assert "MHA" in html
