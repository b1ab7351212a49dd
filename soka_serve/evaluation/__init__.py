"""lm-eval tasks: GSM8K, MATH, MBPP and the embedded families, asked in the format that the adapter was trained on.

The YAML files in `eval/tasks` name the functions here. lm-eval is imported only by the caller, or where a question
about another task needs its index.
"""
