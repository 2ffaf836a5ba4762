"""The features of 7wux: what is in them, parts of them, and several copies."""

import numpy
import pytest
import torch

from flashbias.recipes.protenix import features


@pytest.fixture(scope="module")
def whole():
    return features.load()


def test_the_target_is_7wux(whole):
    assert len(whole["token_index"]) == 1218
    assert whole["ref_pos"].shape == (9142, 3)
    assert whole["restype"].dtype == torch.float32
    assert whole["template_distogram"].shape == (4, 1218, 1218, 39)
    assert not whole["template_distogram"].any()
    assert whole["constraint_feature"]["substructure"].shape == (1218, 1218, 4)
    assert bool((whole["atom_to_token_idx"].diff() >= 0).all())


def test_a_part_has_its_tokens_and_their_atoms(whole):
    part = features.load(tokens=100)
    atoms = int((whole["atom_to_token_idx"] < 100).sum())
    assert torch.equal(part["ref_pos"], whole["ref_pos"][:atoms])
    assert torch.equal(part["token_bonds"], whole["token_bonds"][:100, :100])
    assert part["template_distogram"].shape == (4, 100, 100, 39)
    assert part["msa"].shape == (1, 100)


def test_copies_are_further_chains_without_bonds_between_them(whole):
    more = features.load(tokens=1230)
    assert len(more["token_index"]) == 1230
    assert torch.equal(more["token_index"], torch.arange(1230))
    assert int(more["atom_to_token_idx"].max()) == 1229
    assert len(more["ref_pos"]) == len(more["atom_to_token_idx"])
    assert torch.equal(more["restype"][1218:], whole["restype"][:12])
    assert torch.equal(more["token_bonds"][1218:, 1218:], whole["token_bonds"][:12, :12])
    assert not more["token_bonds"][:1218, 1218:].any()
    assert not set(more["asym_id"][:1218].tolist()) & set(more["asym_id"][1218:].tolist())
    assert torch.equal(more["entity_id"][1218:], whole["entity_id"][:12])
    assert more["template_distogram"].shape == (4, 1230, 1230, 39)


def test_other_files_and_pickles_are_refused(tmp_path):
    numpy.savez(tmp_path / "other.npz", a=numpy.zeros(1))
    numpy.savez(tmp_path / "pickled.npz", __dtypes__=numpy.array([{}], dtype=object))
    (tmp_path / "text.npz").write_text("text")
    for name in ("other", "pickled", "text", "missing"):
        with pytest.raises(features.FeaturesError, match="7wux_features"):
            features.load(tmp_path / f"{name}.npz")
