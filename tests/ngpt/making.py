"""Writing deliberately odd checkpoints for tests."""

import json
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

GOLDEN = Path(__file__).parent.parent / "golden"


def golden_tensors(name="gqa"):
    return load_file(GOLDEN / name / "model.safetensors")


def golden_config(name="gqa"):
    return json.loads((GOLDEN / name / "config.json").read_text())


def write_checkpoint(folder, tensors=None, **changes):
    """A folder with golden gqa's config (changed) and tensors (or those given)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**golden_config(), **changes}))
    save_file(golden_tensors() if tensors is None else tensors, folder / "model.safetensors")
    return folder


def write_shards(folder, parts, weight_map=None):
    """Shards from a list of tensor dicts; the index is honest unless given."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(golden_config()))
    honest = {}
    for number, part in enumerate(parts):
        name = f"model-{number}.safetensors"
        save_file(part, folder / name)
        honest |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": honest if weight_map is None else {**honest, **weight_map}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def tokenizer(special=("<|endoftext|>",), size=200):
    """Single bytes and as many special tokens as are named: ids from 0."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:size]
    made = Tokenizer(models.BPE({letter: at for at, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(text, special=True) for text in special])
    return made


def research():
    """What the smaller golden research file holds, to be changed and saved again."""
    return torch.load(GOLDEN / "research-checkpoint" / "ckpt.pt", weights_only=True)


def save(stored, folder):
    """As ckpt.pt in the folder; returns its path."""
    torch.save(stored, folder / "ckpt.pt")
    return folder / "ckpt.pt"


def write_archive(path, members):
    """A zip file of stored members."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def private_bytes():
    """Anonymous memory of this process."""
    values = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Rss"))
    return int(values["RssAnon"].split()[0]) * 1024
