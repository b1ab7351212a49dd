"""`python -m soka_serve`, which `accelerate launch -m soka_serve build ...` needs."""

from soka_serve.cli import main

main(prog_name="soka-serve")
