"""MaxText's trainer with APOLLO in place of its optimizer.

    python -m benchmarks.maxtext_recipe apollo_mini base.yml run_name=mine base_output_directory=out

trains as `python -m maxtext.trainers.pre_train.train` does with the same arguments, by `adamw`
(MaxText's own, untouched), `apollo` or `apollo_mini`. `base.yml` stands for the one in the package.
Without arguments it trains tiny decoders on the CPU by each of them, on one device and on a mesh of
four, and adds the losses and the bytes of the optimizer state to `results/maxtext_recipe.json`;
minutes. Prints the table of `docs/maxtext.md`, which also says what to install.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from apollo_optax import apollo, apollo_mini, infer_dimension_numbers
from apollo_optax.sharding import shardings_of
from benchmarks.rows import RESULTS, Row, add_row, read_rows

OUTPUT = RESULTS / "maxtext_recipe.json"
COMMAND = "python -m benchmarks.maxtext_recipe"
OPTIMIZERS = ("adamw", "apollo", "apollo_mini")
RANK = 16
TINY = (
    "run_name=tiny dataset_type=synthetic enable_checkpointing=false steps=20 "
    "mlp_activations=[silu,linear] logits_via_embedding=false "
    "base_num_decoder_layers=3 base_emb_dim=128 base_num_query_heads=4 head_dim=32 "
    "base_mlp_dim=344 vocab_size=512 max_target_length=64 "
    "attention=dot_product warmup_steps_fraction=0.1 sharding_tolerance=0.3 "
    "skip_jax_distributed_system=true log_config=false "
    "enable_goodput_recording=false monitor_goodput=false"
)
EXPERTS = "num_experts=4 num_experts_per_tok=2 base_moe_mlp_dim=344 sparse_matmul=false"
DECODERS = {
    "llama2": "base_num_kv_heads=2",
    "mixtral": f"base_num_kv_heads=2 {EXPERTS}",
    "deepseek": f"base_num_kv_heads=4 {EXPERTS} shared_experts=1 first_num_dense_layers=1 "
    "attention_type=mla q_lora_rank=24 kv_lora_rank=32 qk_nope_head_dim=24 qk_rope_head_dim=8 "
    "v_head_dim=16",
}
LEARNING_RATES = {"adamw": 0.001, "apollo": 0.01, "apollo_mini": 0.01}
# Four sequences on one device and on four.
MESHES = {
    "one device": "per_device_batch_size=4",
    "fsdp=2, tensor=2": "per_device_batch_size=1 ici_fsdp_parallelism=2 ici_tensor_parallelism=2",
    "fsdp=2, expert=2": "per_device_batch_size=1 ici_fsdp_parallelism=2 ici_expert_parallelism=2",
}


def require_maxtext() -> None:
    """Raises ImportError, saying what to install, where MaxText is missing."""
    os.environ.setdefault("DECOUPLE_GCLOUD", "TRUE")
    try:
        import maxtext.trainers.pre_train.train  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"MaxText cannot be imported ({error}). It needs Python 3.12 or newer: pip install "
            f"maxtext, and its requirements as docs/maxtext.md lists them."
        ) from error


def use_apollo(name: str, rank: int = 256) -> None:
    """Puts APOLLO in place of the optimizer that MaxText would make of its configuration."""
    from flax import nnx
    from maxtext.optimizers import optimizers

    def get_optimizer(
        config: Any, learning_rate_schedule: optax.Schedule, model: Any = None, mesh: Any = None
    ) -> optax.GradientTransformation:
        del mesh
        graphdef, params, *others = nnx.split(model, nnx.Param, ...)
        shape = (config.micro_batch_size_to_train_on, config.max_target_length)

        def forward(params: Any, others: Any, tokens: jax.Array) -> Any:
            model = nnx.merge(graphdef, params, *others)
            return model(tokens, tokens, jnp.ones_like(tokens), enable_dropout=False)

        arguments: dict[str, Any] = {
            "b1": config.adam_b1,
            "b2": config.adam_b2,
            "eps": config.adam_eps,
            "mu_dtype": config.mu_dtype,
            "weight_decay": config.adam_weight_decay,
            "mask": optimizers.get_adamw_mask(config),
            "weight_dimension_numbers": infer_dimension_numbers(
                forward, params, others, jax.ShapeDtypeStruct(shape, "int32")
            ),
        }
        if name == "apollo_mini":
            return apollo_mini(learning_rate_schedule, **arguments)
        return apollo(learning_rate_schedule, rank, **arguments)

    optimizers.get_optimizer = get_optimizer


def shard_state_like_parameters() -> None:
    """Shards the optimizer state as the parameters are; names alone leave moments whole."""
    from flax import nnx
    from maxtext.utils import maxtext_utils, maxtext_utils_nnx

    sharding_by_names = maxtext_utils.get_abstract_state_nnx

    def get_abstract_state_nnx(
        config: Any, mesh: Any, make_state: Callable[[], Any], is_training: bool = True
    ) -> tuple[Any, Any, Any]:
        if config.shard_optimizer_over_data or config.optimizer_memory_host_offload:
            raise ValueError(
                "shard_optimizer_over_data and optimizer_memory_host_offload place the state by "
                "rules of their own; set both to false and shard the parameters (ici_fsdp_...)."
            )
        abstract, specs, shardings = sharding_by_names(config, mesh, make_state, is_training)
        if not is_training:
            return abstract, specs, shardings
        train_state = nnx.eval_shape(make_state)
        tx = train_state.optimizer.tx
        graphdef, _, *others = nnx.split(train_state.model, nnx.Param, ...)
        placed = nnx.merge(nnx.graphdef(train_state), abstract).model
        _, params, *_ = nnx.split(placed, nnx.Param, ...)

        def optimizer_state(params: Any) -> Any:
            model = nnx.merge(graphdef, params, *others)
            return nnx.to_pure_dict(nnx.state(nnx.Optimizer(model, tx, wrt=nnx.Param)))

        nnx.replace_by_pure_dict(shardings.optimizer, shardings_of(optimizer_state, params))
        abstract = maxtext_utils_nnx.set_named_sharding_nnx(abstract, shardings)
        return abstract, maxtext_utils_nnx.get_partition_spec_nnx(shardings), shardings

    maxtext_utils.get_abstract_state_nnx = get_abstract_state_nnx


def run(
    name: str, arguments: Sequence[str], *, rank: int = 256, follow: bool = True, report: str = ""
) -> None:
    """Runs MaxText's trainer with these arguments, a configuration file first.

    `follow` shards the optimizer state as the parameters are; `report` is a file for its bytes.
    """
    require_maxtext()
    import maxtext
    from absl import app
    from maxtext.trainers.pre_train import train

    if name != "adamw":
        use_apollo(name, rank)
        if follow:
            shard_state_like_parameters()
    if report:
        _report_bytes(report)
    file, *flags = arguments
    if file == "base.yml":
        file = str(Path(maxtext.__file__).parent / "configs" / "base.yml")
    app.run(train.main, argv=["train", file, *flags])


def _report_bytes(path: str) -> None:
    """Writes the bytes of the trainer's initial state to a file."""
    from flax import nnx
    from maxtext.utils import train_utils

    setup = train_utils.setup_train_loop

    def reporting(*arguments: Any, **keywords: Any) -> Any:
        made = setup(*arguments, **keywords)
        sizes = {}
        for name, module in (("weight", made[-1].model), ("state", made[-1].optimizer)):
            kind = nnx.Param if name == "weight" else ...
            arrays = jax.tree.leaves(nnx.to_pure_dict(nnx.state(module, kind)))
            sizes[f"{name}_bytes"] = sum(x.nbytes for x in arrays)
            sizes[f"{name}_bytes_of_a_device"] = sum(
                x.addressable_shards[0].data.nbytes for x in arrays
            )
        Path(path).write_text(json.dumps(sizes))
        return made

    train_utils.setup_train_loop = reporting


def measure(decoder: str, optimizer: str, mesh: str, follow: bool) -> Row:
    """Trains the tiny decoder in a process of its own; returns losses and sizes."""
    flags = (
        f"{TINY} decoder_block={decoder} {DECODERS[decoder]} {MESHES[mesh]} "
        f"learning_rate={LEARNING_RATES[optimizer]}"
    )
    with tempfile.TemporaryDirectory() as folder:
        places = [f"base_output_directory={folder}", f"metrics_file={folder}/metrics"]
        arguments = ["base.yml", *flags.split(), *places]
        keywords = {"rank": RANK, "follow": follow, "report": f"{folder}/bytes"}
        call = f"run({optimizer!r}, {arguments!r}, **{keywords!r})"
        code = f"from benchmarks.maxtext_recipe import run; {call}"
        devices = "1" if mesh == "one device" else "4"
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": devices}
        subprocess.run([sys.executable, "-c", code], env=environment, check=True)
        steps = [json.loads(line) for line in Path(f"{folder}/metrics").read_text().splitlines()]
        sizes = json.loads(Path(f"{folder}/bytes").read_text())
    losses = [step["learning/loss"] for step in steps]
    return {
        "maxtext": importlib.metadata.version("maxtext"),
        "decoder": decoder,
        "optimizer": optimizer,
        "mesh": mesh,
        "state follows parameters": follow,
        "flags": flags,
        **sizes,
        "losses": losses,
    }


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    lines = [
        "| decoder | optimizer | mesh | loss, first to last | state | state of a device |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    for row in rows:
        mesh = row["mesh"]
        if mesh != "one device" and row["optimizer"] != "adamw":
            followed = row["state follows parameters"]
            mesh += ", state sharded" if followed else ", state as MaxText places it"
        losses = f"{row['losses'][0]:.2f} to {row['losses'][-1]:.2g}"
        lines.append(
            f"| {row['decoder']} | {row['optimizer']} | {mesh} | {losses} | "
            f"{row['state_bytes']:,} | {row['state_bytes_of_a_device']:,} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Trains by the optimizer named first, or measures what has no row yet and prints the table."""
    if len(sys.argv) > 1:
        name, *arguments = sys.argv[1:]
        if name not in OPTIMIZERS or not arguments:
            raise SystemExit(f"usage: {COMMAND} {{{','.join(OPTIMIZERS)}}} CONFIG [KEY=VALUE ...]")
        run(name, arguments)
        return
    four = "fsdp=2, tensor=2"
    runs = [("llama2", optimizer, "one device", True) for optimizer in OPTIMIZERS]
    runs += [("llama2", "adamw", four, True)]
    runs += [("llama2", o, four, follow) for o in OPTIMIZERS[1:] for follow in (False, True)]
    runs += [("mixtral", o, "fsdp=2, expert=2", True) for o in OPTIMIZERS]
    runs += [("deepseek", o, four, True) for o in OPTIMIZERS]
    for made in runs:
        keys = ("decoder", "optimizer", "mesh", "state follows parameters")
        if any(tuple(row[key] for key in keys) == made for row in read_rows(OUTPUT)):
            continue
        add_row(OUTPUT, COMMAND, measure(*made))
    print(table(read_rows(OUTPUT)))


if __name__ == "__main__":
    main()
