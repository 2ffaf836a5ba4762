"""A featuriser for one chain of a protein: two atoms for each residue."""

import json
from pathlib import Path

import torch


class InferenceDataset:
    def __init__(self, configs):
        self.entries = json.loads(Path(configs.input_json_path).read_text())

    def __getitem__(self, index):
        sequence = self.entries[index]["sequences"][0]["proteinChain"]["sequence"]
        if "?" in sequence:
            return {}, None, "unknown residue"
        kinds = torch.tensor([ord(letter) % 32 for letter in sequence])
        numbers = torch.arange(len(sequence))
        features = {
            "token_index": numbers,
            "residue_index": numbers + 1,
            "restype": torch.nn.functional.one_hot(kinds, 32).float(),
            "atom_to_token_idx": numbers.repeat_interleave(2),
        }
        return {"input_feature_dict": features}, None, ""
