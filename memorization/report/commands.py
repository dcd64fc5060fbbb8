"""The commands that repeat a run, rebuilt from what it recorded."""

import math
import shlex
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

# Options of train.py that take no value, where others say 0 or 1.
_NO_VALUE = {"nosubdir", "compile", "deterministic", "tensorboard"}
_ONCE = dict.fromkeys(("desc", "dry_run", "overwrite", "show_options"))  # they do not make the run what it is
FEATURES = "features:"  # begins the names of criteria in features; the file that computes them is not recorded
_SAMPLER = {"num_steps": "steps", "discretization": "disc"}  # options of mem_ratio.py under other names


def train_command(
    options: dict[str, Any],  # training_options.json
    outdir: str | PurePath,  # run folder of the repetition
    device: str | None = None,  # cpu or cuda; None: as recorded
) -> list[str]:
    """The `train.py` command whose run has the recorded options, as unquoted words.

    Every option is written out, so that the command stays right where defaults change.

    Raises
    ------
    ValueError
        If these are not options that `train.py` has recorded, or of a run from before it recorded its command.
    """
    if "command" not in options and "network_kwargs" in options:
        raise ValueError("this run was trained before train.py recorded the options of its command line.")
    try:
        named = options["command"] | _ONCE | {"outdir": str(outdir), "nosubdir": True}
        named |= {"device": device or named["device"]}
        return command_words("train.py", named, int(options["num_processes"]))
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise ValueError(f"training_options.json is not as train.py writes it ({type(err).__name__}: {err}).") from None


def measure_command(record: dict[str, Any], expdir: str | PurePath) -> list[str]:
    """The `mem_ratio.py` command with the settings of one record of mem_traj.jsonl, unquoted.

    Raises
    ------
    ValueError
        If the record lacks the settings.
    """
    try:
        named = {"expdir": str(expdir), "knn-ref": record["reference"], "seeds": record["seeds"]}
        named["class"] = record["class"]
        named |= {_SAMPLER.get(key, key): value for key, value in record["sampler"].items()}
        adaptive = record.get("adaptive") or {}
        named |= {"adaptive": adaptive.get("bar"), "confidence": adaptive.get("confidence")}
        named["precision"] = record.get("precision") if record.get("precision") != "fp32" else None
        more = ["--compile"] if record.get("compile") else []
        more += ["--until-above"] if adaptive.get("error_share") else []
        more += ["--other-reference"] if record.get("other_reference") else []
        more += [f"--threshold={text}" for text in record.get("thresholds") or {}]
        more += [f"--criterion={name}" for name in record.get("criteria") or {} if not name.startswith(FEATURES)]
        if (quality := record.get("quality")) and quality["space"]["name"] != "features":
            more += [f"--quality={quality['dataset']}", f"--quality-measures={','.join(quality['measures'])}"]
            more += [f"--quality-space={quality['space']['name']}"]
        return _script("mem_ratio.py", 1) + _flags(named) + more
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise ValueError(f"mem_traj.jsonl lacks settings ({type(err).__name__}: {err}).") from None


def command_words(script: str, values: dict[str, Any], processes: int) -> list[str]:
    """The command with these values of options of train.py, by the names of their parameters; None is left out.

    Raises
    ------
    TypeError
        If a value is none of an option.
    """
    named = {key.replace("_", "-"): value for key, value in values.items() if key not in _NO_VALUE}
    flags = [f"--{key}" for key in values if key in _NO_VALUE and values[key]]
    return _script(script, processes) + _flags(named) + flags


def command_text(words: Sequence[str], width: int = 100) -> str:
    """A command line as it is typed, in several lines where it is long."""
    lines = [""]
    for word in map(shlex.quote, words):
        if lines[-1] and len(lines[-1]) + len(word) > width:
            lines.append("   ")
        lines[-1] += f" {word}" if lines[-1] else word
    return " \\\n".join(lines)


def _script(name: str, processes: int) -> list[str]:
    if processes > 1:
        return ["torchrun", "--standalone", f"--nproc_per_node={processes}", name]
    return ["python", name]


def _flags(named: dict[str, Any]) -> list[str]:
    return [f"--{name}={_text(value)}" for name, value in named.items() if value is not None]


def _text(value: Any) -> str:
    """A recorded value as it is typed: 0.0002, 1 for true, 2,2,2 for a list."""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, list):
        return ",".join(_text(entry) for entry in value)
    if isinstance(value, float) and math.isfinite(value) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    if isinstance(value, (str, int, float)):
        return str(value)
    raise TypeError(f"{type(value).__name__} is no value of an option")
