"""A random two-layer LLaMA, packed and written in the formats of others, and short tunings of such folders."""



from compressor.pipelines.formats import FORMATS

QUICK = ["--seqlen", "32", "--steps", "3", "--batch", "2", "--lr", "0.02", "--max-tokens", "256", "--device", "cpu"]
WRITERS = FORMATS | {"gptq_v2": load_writer} if (load_writer := None) else FORMATS
