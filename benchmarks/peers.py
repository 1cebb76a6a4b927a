"""
Run one arm of train_speed.py that needs an environment of its own: litgpt or LLaMA-Factory.

    .venv-litgpt/bin/python -m benchmarks.peers litgpt-bf16-4x4-lengthgrouped work.json
    .venv-llamafactory/bin/python -m benchmarks.peers llamafactory-bf16-4x4-lengthgrouped work.json

train_speed.py writes work.json with its own Python ("python -m benchmarks.arms work ..."): the
samples of each step, the settings, the model's folder. This module imports nothing that needs our
version of transformers. The last line printed is a result like that of benchmarks/arms.py.
"""

import json
import sys
import tempfile
import time
import types
from importlib.machinery import ModuleSpec
from itertools import pairwise
from pathlib import Path

import torch

from benchmarks import common
from lora.run import runlog

CPU = torch.device("cpu")
PRECISIONS = {"bf16": "bf16-true", "autocast": "bf16-mixed", "fp32": "32-true"}   # litgpt's names


class Record:
    """What a trainer did: the samples that the model received, the loss and the end of each step.

    weight() is the share of a micro-batch in its step's loss: its labelled tokens of all of them.
    """

    def __init__(self, arm: str, work: dict):
        self.steps, self.batch = work["steps"], len(work["steps"][0])
        self.size = common.micro_size(arm, self.batch) or 1
        if "-lengthgrouped" in arm:
            self.steps = [sorted(step, key=lambda s: len(s["input_ids"])) for step in self.steps]
        self.samples = [sample for step in self.steps for sample in step]
        self.n_micro = self.batch // self.size
        self.labelled = [sum(y != common.IGNORE for s in step for y in s["labels"])
                         for step in self.steps]
        self.rows, self.losses, self.ends, self.initial_a = [], [], [], None

    def weight(self, labels: torch.Tensor) -> float:
        step = len(self.losses) // self.n_micro
        return int((labels != common.IGNORE).sum()) / self.labelled[step]

    def result(self) -> dict:
        """Return losses, seconds, hashes and initial_a of the steps."""
        n = self.n_micro * len(self.steps)
        assert len(self.rows) == len(self.losses) == n, (len(self.rows), len(self.losses), n)
        assert len(self.ends) == 1 + len(self.steps)
        windows = [slice(i, i + self.n_micro) for i in range(0, n, self.n_micro)]
        return {"losses": [sum(float(x) for x in self.losses[w]) for w in windows],
                "seconds": [end - start for start, end in pairwise(self.ends)],
                "hashes": [common.step_hash(row for part in self.rows[w] for row in part)
                           for w in windows], "initial_a": self.initial_a}


def unpad(ids: torch.Tensor, labels: torch.Tensor, pad: int) -> list[tuple]:
    """List the (ids, labels) of a batch padded on the right with an id that no sample has."""
    keep = ids != pad
    assert not ((ids == pad) & (labels != common.IGNORE)).any(), "a pad has a label"
    assert (keep.int().diff(dim=1) <= 0).all(), "a pad is not at the end"
    return [(i[k].tolist(), y[k].tolist()) for i, y, k in zip(ids, labels, keep, strict=True)]


# ----- litgpt: its finetune.lora.fit, its GPT, its collator --------------------------------------


def litgpt_model(folder: Path, s: dict, fabric):
    """Build litgpt's GPT with LoRA on every projection and load a Hugging Face folder's weights."""
    from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
    from litgpt.scripts import convert_hf_checkpoint as convert
    from safetensors.torch import load_file

    lora = {"lora_r": s["r"], "lora_alpha": s["alpha"], "lora_dropout": 0.0}
    lora |= {f"lora_{part}": True for part in ("query", "key", "value", "projection", "mlp")}
    hf = json.loads((folder / "config.json").read_text())
    shape = {"n_layer": hf["num_hidden_layers"], "n_head": hf["num_attention_heads"],
             "n_query_groups": hf["num_key_value_heads"], "head_size": hf["head_dim"],
             "n_embd": hf["hidden_size"], "intermediate_size": hf["intermediate_size"],
             "vocab_size": hf["vocab_size"], "padded_vocab_size": hf["vocab_size"],
             "norm_eps": hf["rms_norm_eps"], "block_size": hf["max_position_embeddings"]}
    if hf["model_type"] == "llama":
        shape["rope_base"] = int(hf["rope_parameters"]["rope_theta"])
        config = Config.from_name("SmolLM2-135M", **lora, **shape)
        copy = convert.copy_weights_hf_llama
    elif hf["model_type"] == "gemma3_text":            # litgpt has no 270M: its 1B, made smaller
        local = [int(kind == "sliding_attention") for kind in hf["layer_types"]]
        config = Config.from_name("Gemma-3-1b-it", **lora, **shape, sliding_window_indices=local,
                                  rope_indices=local, sliding_window_size=hf["sliding_window"])
        copy = None
    else:
        raise ValueError(f"litgpt: {hf['model_type']} is not mapped")
    state, weights = {}, load_file(folder / "model.safetensors")
    if copy:
        copy(config, {}, state, weights)
    else:
        convert.copy_weights_gemma_3({}, state, weights, config=config)
    with fabric.init_module(empty_init=False):
        model = GPT(config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all("lora_" in name for name in missing), (missing, unexpected)
    mark_only_lora_as_trainable(model)
    return model


def run_litgpt(arm: str, work: dict) -> dict:
    import lightning
    import torch.nn.functional as F
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.data.base import get_sft_collate_fn
    from litgpt.finetune import lora as finetune
    from torch.utils.data import DataLoader

    s, record, precision = work["settings"], Record(arm, work), arm.split("-")[1]
    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision=PRECISIONS[precision])
    model = litgpt_model(Path(work["folder"]), s, fabric)
    loaded = runlog.peak_memory_gib(CPU)
    # q, k, v lie in one A, one below the other
    pieces = [piece for name, parameter in model.named_parameters() if "lora_A" in name
              for piece in parameter.data.split(s["r"])]
    record.initial_a = common.fill_a(pieces, s["seed"])
    for name, parameter in model.named_parameters():
        assert "lora_B" not in name or not parameter.any()

    used = {i for sample in record.samples for i in sample["input_ids"]}
    pad = next(i for i in range(model.config.vocab_size) if i not in used)
    counts = {"raw": 0, "raw_plus_prompt_template": 0}
    rows = [{"input_ids": torch.tensor(x["input_ids"]), "labels": torch.tensor(x["labels"]),
             "token_counts": counts} for x in record.samples]
    loader, empty = (fabric.setup_dataloaders(DataLoader(
        part, batch_size=record.size, collate_fn=get_sft_collate_fn(pad_id=pad)))
        for part in (rows, []))
    chunk = int(arm.partition("-head")[2].partition("-")[0] or 128)        # fit() says 128
    ids_of, cross_entropy = [], finetune.chunked_cross_entropy

    def note_ids(module, args, kwargs):
        ids_of.append(args[0])
        return args, kwargs | {"lm_head_chunk_size": chunk}

    def loss_of_step(logits, targets):
        """litgpt's mean over a micro-batch, weighted so that the step's loss is the mean over its
        labelled tokens: fit() divides by the number of micro-batches."""
        labels = F.pad(targets, (1, 0), value=common.IGNORE)       # fit() drops the first label
        record.rows.append(unpad(ids_of.pop(), labels, pad))
        loss = cross_entropy(logits, targets) * record.weight(targets)
        record.losses.append(loss.detach())
        return loss * record.n_micro

    parameters = [p for p in model.parameters() if p.requires_grad]
    model.register_forward_pre_hook(note_ids, with_kwargs=True)
    model = fabric.setup_module(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=s["lr"], betas=s["betas"], eps=s["eps"],
                                  weight_decay=s["decay"])
    optimizer.register_step_pre_hook(                              # fit() does not clip
        lambda *_: torch.nn.utils.clip_grad_norm_(parameters, s["clip"]) and None)
    optimizer = fabric.setup_optimizers(optimizer)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    scheduler_step = scheduler.step

    def clock():                                                   # the last thing fit() does
        scheduler_step()
        record.ends.append(time.perf_counter())

    scheduler.step = clock
    finetune.chunked_cross_entropy, finetune.Tokenizer = loss_of_step, lambda folder: None
    finetune.validate = lambda *_, **__: None                      # before the first step
    n = len(record.steps)
    record.ends.append(time.perf_counter())
    finetune.fit(
        fabric=fabric, model=model, optimizer=optimizer, scheduler=scheduler,
        train_dataloader=loader, val_dataloader=empty, devices=1, checkpoint_dir=Path("."),
        out_dir=Path("."), data=None, eval=EvalArgs(interval=n + 1, initial_validation=False),
        train=TrainArgs(global_batch_size=record.batch, micro_batch_size=record.size, epochs=2,
                        max_steps=n, log_interval=10**9, save_interval=None))
    return record.result() | {"loaded_gib": loaded, "dtype": dtype_of(precision)}


# ----- LLaMA-Factory: its run_sft, on samples that are tokens already ----------------------------


def without_torchaudio() -> None:
    """LLaMA-Factory imports torchaudio, for voices; no wheel of it on PyPI fits a CPU build of
    torch. An empty module stands in."""
    sys.modules["torchaudio"] = types.ModuleType("torchaudio")
    sys.modules["torchaudio"].__spec__ = ModuleSpec("torchaudio", None)


def in_dtype(folder: Path, dtype: str, copy: Path) -> str:
    """Link a model's folder into copy, its config saying another dtype: LLaMA-Factory loads a model
    in the dtype that its config names."""
    for file in folder.iterdir():
        if file.name != "config.json":
            (copy / file.name).symlink_to(file.resolve())
    config = json.loads((folder / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"dtype": dtype}))
    return str(copy)


def run_llamafactory(arm: str, work: dict) -> dict:
    without_torchaudio()
    import datasets
    from llamafactory.hparams import get_train_args
    from llamafactory.train.sft import workflow
    from transformers import TrainerCallback

    s, record, precision = work["settings"], Record(arm, work), arm.split("-")[1]
    rows = [{"input_ids": x["input_ids"], "attention_mask": [1] * len(x["input_ids"]),
             "labels": x["labels"]} for x in record.samples]
    batches, loaded = [], []

    class Notes(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            loaded.append(runlog.peak_memory_gib(CPU))
            assert model.dtype == getattr(torch, "float32" if precision == "fp32" else "bfloat16")
            named = dict(model.named_parameters())
            assert not any(p.any() for name, p in named.items() if "lora_B" in name)
            record.initial_a = common.fill_a(
                (p.data for name, p in named.items() if "lora_A" in name), s["seed"])
            model.register_forward_pre_hook(
                lambda module, args, kwargs: batches.append(kwargs), with_kwargs=True)
            model.register_forward_hook(                           # over the step's tokens
                lambda module, args, output: record.losses.append(output["loss"].detach()))
            record.ends.append(time.perf_counter())

        def on_step_end(self, *args, **kwargs):
            record.ends.append(time.perf_counter())

    workflow.get_dataset = lambda *_, **__: {"train_dataset": datasets.Dataset.from_list(rows)}
    with tempfile.TemporaryDirectory() as copy, tempfile.TemporaryDirectory() as out:
        arguments = get_train_args({
            "model_name_or_path": in_dtype(Path(work["folder"]), dtype_of(precision), Path(copy)),
            "stage": "sft", "do_train": True, "finetuning_type": "lora", "template": "empty",
            "dataset": "ours", "cutoff_len": 1 << 20, "disable_shuffling": True,
            "lora_rank": s["r"], "lora_alpha": s["alpha"], "lora_dropout": 0.0,
            "lora_target": ",".join(s["targets"]), "output_dir": out, "use_cpu": True,
            "bf16": precision == "autocast", "per_device_train_batch_size": record.size,
            "gradient_accumulation_steps": record.n_micro, "max_steps": len(record.steps),
            "learning_rate": s["lr"], "lr_scheduler_type": "constant", "warmup_steps": 0,
            "optim": "adamw_torch", "adam_beta1": s["betas"][0], "adam_beta2": s["betas"][1],
            "adam_epsilon": s["eps"], "weight_decay": s["decay"], "max_grad_norm": s["clip"],
            "disable_gradient_checkpointing": "-checkpointing" not in arm, "report_to": "none",
            "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True,
            "plot_loss": False, "seed": s["seed"]})
        workflow.run_sft(*arguments, callbacks=[Notes()])
    record.rows = [common.received([batch]) for batch in batches]
    return record.result() | {"loaded_gib": loaded[0], "dtype": dtype_of(precision)}


# ----- one process -------------------------------------------------------------------------------


def dtype_of(precision: str) -> str:
    return "float32" if precision == "fp32" else "bfloat16"


def main(arm: str, file: str) -> None:
    work = json.loads(Path(file).read_text(encoding="utf-8"))
    run = {"litgpt": run_litgpt, "llamafactory": run_llamafactory}[arm.partition("-")[0]]
    result = run(arm, work)
    print("\n" + json.dumps(result | {"flops": work["flops"],
                                      "peak_gib": runlog.peak_memory_gib(CPU)}))


if __name__ == "__main__":
    common.end_first()
    main(*sys.argv[1:])
