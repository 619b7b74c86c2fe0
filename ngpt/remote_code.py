"""A checkpoint that carries the code it needs, so that `trust_remote_code=True` loads it where this package is absent."""

import json
import shutil
from pathlib import Path

from ngpt.errors import ConfigError, shown

AUTO_MAP = {
    "AutoConfig": "config.NGPTConfig",
    "AutoModel": "model.NGPTModel",
    "AutoModelForCausalLM": "model.NGPTForCausalLM",
}
CODE = ("config.py", "layers.py", "model.py")


def add_code(folder: str | Path) -> None:
    """Copy the model's source files beside a saved checkpoint and name the classes in its config.json.

    Raises ConfigError when the folder holds no config.json of an nGPT model.
    """
    folder = Path(folder)
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read", found=str(error), remedy="save the model there first") from error
    if config.get("model_type") != "ngpt":
        raise ConfigError(f"{path} is not an nGPT config", expected='model_type "ngpt"', found=shown(config.get("model_type")))
    for name in CODE:
        shutil.copyfile(Path(__file__).with_name(name), folder / name)
    config["auto_map"] = AUTO_MAP
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
