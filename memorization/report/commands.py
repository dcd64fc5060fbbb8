"""The commands that repeat a run, rebuilt from what it recorded."""

import math
from pathlib import PurePath
from typing import Any

# Recorded, but a consequence of other options and of the dataset.
_DERIVED = {"total_kimg", "total_nimg", "ema_halflife_nimg", "lr_rampup_nimg", "ema_rampup_ratio", "loss", "versions"}
_DERIVED |= {"dataset_sha256", "labels_sha256"}
_DERIVED_DATA = {"resolution", "max_size", "use_labels"}
_DERIVED_NETWORK = {
    "class_name", "model_type", "embedding_type", "decoder_type", "encoder_type", "channel_mult_noise",
    "resample_filter",
}  # fmt: skip
_DERIVED_OPTIMIZER = {"betas", "eps"}
FEATURES = "features:"  # begins the names of criteria in features; the file that computes them is not recorded
_SAMPLER = {"num_steps": "steps", "discretization": "disc"}  # options of mem_ratio.py under other names


def train_command(
    options: dict[str, Any],  # training_options.json
    outdir: str | PurePath,  # run folder of the repetition
    device: str | None = None,  # cpu or cuda; None: what train.py finds
) -> tuple[list[str], list[str]]:
    """The `train.py` command whose run has the recorded options.

    Every option is written out, so that the command stays right where defaults change.

    Returns
    -------
    words : of the command line, unquoted.
    unknown : recorded keys that no option of the command stands for, "a.b" for key b of a.

    Raises
    ------
    ValueError
        If these are not options that `train.py` has recorded.
    """
    try:
        left = {key: dict(value) if isinstance(value, dict) else value for key, value in options.items()}
        data, network, optimizer = (left.pop(f"{key}_kwargs") for key in ("dataset", "network", "optimizer"))
        named = {"data": data.pop("path"), "cond": left.pop("cond"), "arch": left.pop("arch")}
        named |= {"precond": left.pop("precond"), "duration": left.pop("duration"), "batch": left.pop("batch_size")}
        named |= {"batch-gpu": left.pop("batch_gpu"), "cres": network.pop("channel_mult"), "lr": optimizer.pop("lr")}
        named |= {"dropout": network.pop("dropout"), "augment": left.pop("augment"), "xflip": data.pop("xflip")}
        named |= {"window-size": left.pop("window_size"), "num-blocks": network.pop("num_blocks")}
        named |= {"num-channels": network.pop("model_channels"), "attn-resolutions": network.pop("attn_resolutions")}
        named |= {"skip-connections": network.pop("skip_connections", None), "ema_mode": left.pop("ema_mode")}
        named |= {"weight-decay": optimizer.pop("weight_decay"), "optimizer": optimizer.pop("class_name")}
        named |= {"momentum": optimizer.pop("momentum", None), "fp16": network.pop("use_fp16")}
        named |= {"precision": left.pop("precision", None)}
        named |= {"ls": left.pop("loss_scaling"), "bench": left.pop("cudnn_benchmark"), "cache": data.pop("cache")}
        named |= {"workers": left.pop("num_workers"), "device": device, "mem-eval": left.pop("mem_eval", None)}
        named |= {"stop-at-mem": left.pop("stop_at_mem", None), "stop-patience": left.pop("stop_patience", None)}
        named |= {"tick": left.pop("kimg_per_tick"), "snap": left.pop("snapshot_ticks")}
        named |= {"dump": left.pop("state_dump_ticks"), "seed": left.pop("seed")}
        named |= {"keep-states": left.pop("keep_states", None), "max-nan-ticks": left.pop("max_nan_ticks", None)}
        named |= {"transfer": left.pop("transfer"), "resume": left.pop("resume")}
        # Options that train.py refuses where they would have no effect.
        embed, ema, final_ema = left.pop("embed"), left.pop("ema"), left.pop("final_ema")
        named |= {"embed": embed if named["arch"] != "adm" else None}
        named |= {"ema": ema if named["ema_mode"] != "mode3" else None}
        named |= {"final-ema": final_ema if named["ema_mode"] == "mode4" else None}
        flags = ["--tensorboard"] if left.pop("tensorboard", False) else []
        flags += ["--compile"] if left.pop("compile", False) else []
        flags += ["--deterministic"] if left.pop("deterministic", False) else []
        processes = int(left.pop("num_processes"))
        words = _script("train.py", processes) + [f"--outdir={outdir}", "--nosubdir"] + _flags(named) + flags
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise ValueError(f"training_options.json is not as train.py writes it ({type(err).__name__}: {err}).") from None
    left.pop("num_blocks", None), left.pop("num_channels", None)  # as given; above stands what the network took
    unknown = sorted(left.keys() - _DERIVED)
    for name, entries, derived in (
        ("dataset_kwargs", data, _DERIVED_DATA),
        ("network_kwargs", network, _DERIVED_NETWORK),
        ("optimizer_kwargs", optimizer, _DERIVED_OPTIMIZER),
    ):
        unknown += [f"{name}.{key}" for key in sorted(entries.keys() - derived)]
    return words, unknown


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
        more += [f"--threshold={text}" for text in record.get("thresholds") or {}]
        more += [f"--criterion={name}" for name in record.get("criteria") or {} if not name.startswith(FEATURES)]
        return _script("mem_ratio.py", 1) + _flags(named) + more
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise ValueError(f"mem_traj.jsonl lacks settings ({type(err).__name__}: {err}).") from None


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
