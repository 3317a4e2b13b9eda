"""`python -m compressor` is the same as `compressor`."""

from compressor.pipelines.cli import main

main()
