"""Writes the tables of the README and the documentation from the committed results.

    python -m benchmarks.tables

A table stands between `<!-- NAME -->` and `<!-- end -->`, where NAME is of `TABLES`. The tests
check that what stands there is what this would write.
"""

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import (
    accelerator_step_time,
    any_model,
    cpu_memory_cap,
    data_parallel_13b,
    fine_tuning,
    fine_tuning_plans,
    hbm_traffic,
    kill_and_resume,
    largest_micro_batch,
    load_memory,
    long_run,
    maxtext_recipe,
    nano_comparison,
    nano_learning_rates,
    peak_memory,
    pod_collectives,
    quantized_training,
    real_model,
    roofline,
    scaling,
    smallest_slice,
    state_sizes,
    step_time,
)
from benchmarks.convergence import report as convergence
from benchmarks.convergence import step_time as convergence_step_time
from benchmarks.frontier import report as frontier
from benchmarks.rows import RESULTS, Row, read_rows

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    "accelerator_step_time": accelerator_step_time.table,
    "any_model": any_model.table,
    "convergence": convergence.table,
    "convergence_ablations": convergence.ablation_table,
    "convergence_rates": convergence.rates_table,
    "convergence_sweeps": convergence.sweep_table,
    "convergence_step_time": convergence_step_time.table,
    "compile_time": scaling.target_table,
    "cpu_memory_cap": cpu_memory_cap.table,
    "data_parallel_13b": data_parallel_13b.table,
    "fine_tuning": fine_tuning.table,
    "fine_tuning_plans": fine_tuning_plans.table,
    "frontier": frontier.table,
    "frontier_rules": frontier.rule_table,
    "frontier_long": functools.partial(frontier.setting_table, setting="1m_long"),
    "frontier_batch": functools.partial(frontier.setting_table, setting="1m_batch"),
    "frontier_wide": functools.partial(frontier.setting_table, setting="4m"),
    "hbm_traffic": hbm_traffic.table,
    "kill_and_resume": kill_and_resume.table,
    "largest_micro_batch": largest_micro_batch.table,
    "load_memory": load_memory.table,
    "long_run": long_run.table,
    "maxtext_recipe": maxtext_recipe.table,
    "nano_comparison": nano_comparison.table,
    "nano_learning_rates": nano_learning_rates.table,
    "nano_warmups": nano_learning_rates.warmup_table,
    "peak_memory": peak_memory.table,
    "pod_collectives": pod_collectives.table,
    "quantized_training": quantized_training.table,
    "real_model": real_model.table,
    "roofline": roofline.table,
    "roofline_counts": roofline.count_table,
    "roofline_machine": roofline.machine_table,
    "roofline_pods": roofline.pod_table,
    "roofline_published": roofline.published_table,
    "scaling": scaling.table,
    "scaling_ranks": scaling.rank_table,
    "smallest_slice": smallest_slice.table,
    "state_sizes": state_sizes.table,
    "step_time": step_time.table,
}
# A table has its benchmark's name, but where one has several.
_RESULTS_OF = {
    "convergence_ablations": "convergence",
    "convergence_rates": "convergence",
    "convergence_sweeps": "convergence",
    "frontier_rules": "frontier",
    "frontier_long": "frontier",
    "frontier_batch": "frontier",
    "frontier_wide": "frontier",
    "nano_warmups": "nano_learning_rates",
    "roofline_counts": "roofline",
    "roofline_machine": "roofline",
    "roofline_pods": "roofline",
    "roofline_published": "roofline",
    "scaling_ranks": "scaling",
}
_PLACE = re.compile(r"<!-- (\w+) -->\n.*?<!-- end -->", re.DOTALL)


def with_tables(text: str) -> str:
    """The text of a page with each table as the results have it."""

    def written(place: re.Match[str]) -> str:
        name = place[1]
        table = TABLES[name](read_rows(RESULTS / f"{_RESULTS_OF.get(name, name)}.json"))
        return f"<!-- {name} -->\n{table}\n<!-- end -->"

    return _PLACE.sub(written, text)


def main() -> None:
    """Rewrites the pages."""
    for page in PAGES:
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
