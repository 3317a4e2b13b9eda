"""The parsers once more, guided by coverage: atheris (libFuzzer) changes bytes wherever that reaches new lines of this package.

    pip install atheris && python bench/fuzz_guided.py -runs=250000 -max_len=400

Where bench/fuzz.py knows the formats, this knows nothing and looks at the code. It ends with a traceback at the first thing raised that is no
CompressorError. Flags are those of libFuzzer; with -runs the counts are
written to bench/results/fuzz_guided.csv. Only compressor's own modules are instrumented.
"""

import sys
import tempfile
from pathlib import Path

import atheris
from rows import write_rows

with atheris.instrument_imports(include=["compressor.strict", "compressor.specs", "compressor.recipe", "compressor.pipelines", "compressor.export"]):
    from compressor.errors import CompressorError
    from compressor.export import shards, task
    from compressor.pipelines import checkpoint, cli, encoder_data, folder_facts, sources
    from compressor.pipelines.measure import task_files
    from compressor.pipelines.report import Report

RESULTS = Path(__file__).resolve().parent / "results" / "fuzz_guided.csv"
PLACE = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
READERS = (
    ("config.json", lambda path: checkpoint.any_config(path.parent)),
    ("model.safetensors", lambda path: shards.read_weights(path.parent, checkpoint.weight_files(path.parent), ())),
    (checkpoint.INDEX, lambda path: checkpoint.weight_files(path.parent)),
    ("recipe.yaml", lambda path: cli.read_recipe(path)),
    ("a.jsonl", lambda path: sources.load(str(path))),
    ("a.csv", lambda path: encoder_data.load(str(path))),
    ("q.jsonl", lambda path: task_files.read(path)),
    ("t.safetensors", lambda path: task.read_alone(path)),
    ("report.json", lambda path: Report.load(path)),
    ("m.gguf", lambda path: folder_facts.facts(path)),
)


COUNT = {"fine": 0, "refused": 0}
WANTED = next((int(flag.partition("=")[2]) for flag in sys.argv if flag.startswith("-runs=")), 0)


def once(content: bytes) -> None:
    """The first byte says what the others are."""
    if WANTED and sum(COUNT.values()) == WANTED - 1000:  # libFuzzer ends the process itself, and runs a few inputs of its own
        write_rows(RESULTS, ["runs", "fine", "refused", "findings"], [{"runs": sum(COUNT.values()), **COUNT, "findings": 0}])
    if not content:
        return
    name, read = READERS[content[0] % len(READERS)]
    path = PLACE / name
    path.write_bytes(content[1:])
    try:
        read(path)
        COUNT["fine"] += 1
    except CompressorError as error:
        COUNT["refused"] += 1
        assert 0 < len(str(error)) <= 500
    finally:
        path.unlink()


if __name__ == "__main__":
    atheris.Setup(sys.argv, once)
    atheris.Fuzz()
