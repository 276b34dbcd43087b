"""Measuring tools shared by the tests, the benchmarks and `python -m resfuse`: cases, tolerances, comparison with
float64, memory, timing, environment. Importing it loads torch alone; torchvision is imported where a block is made."""
