"""What is measured, and how: `docs/benchmarks.md` says how to run it, `CONTRIBUTING.md` what each file has.

Suites of pytest: `test_losses`, `test_step`, `tuning`, `profiling`. Programs: `report` renders what they
wrote, `aot` compiles every kernel for GPUs that are not here, `packed` and `ranks` are stages of `gpu.sh`.
"""
