"""The benchmarks of `flacuna evaluate`, in the order of tables and columns, and named sets of them."""

from flacuna_jax.evaluation import bbh, crass, drop, hhh, humaneval, impact, mmlu

BENCHMARKS = (
    mmlu.BENCHMARK,
    bbh.BENCHMARK,
    drop.BENCHMARK,
    crass.BENCHMARK,
    humaneval.BENCHMARK,
    hhh.BENCHMARK,
    impact.BENCHMARK,
)

SUITES = {
    "few_shot": ("mmlu:5", "bbh:3", "drop:3", "crass:3", "humaneval"),
    "zero_shot": ("mmlu:0", "bbh:0", "crass:0"),
    "paper": ("mmlu:5", "bbh:3", "drop:3", "crass:3", "humaneval", "mmlu:0", "bbh:0", "crass:0", "hhh", "impact"),
}
"""The tables of the Flacuna paper; do not add new benchmarks."""
